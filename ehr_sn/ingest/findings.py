"""What a check says: about what, how many of how many, and how much it matters."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ehr_sn.config import SMALLEST_GROUP

Severity = Literal["blocking", "look", "harmless"]
SEVERITIES: tuple[Severity, ...] = ("blocking", "look", "harmless")
BLOCKING_FROM = 0.1  # share that is lost of a table, of the cohort or of a column's values
LOOK_FROM = 0.01


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing: which check, about what, and how many of how many.

    `severity`: `blocking` where the result is very likely wrong until it is mended, `look` where a
    person should look, else `harmless`.
    """

    check: str
    where: str
    count: int
    of: int
    message: str
    severity: Severity = "look"

    @property
    def share(self) -> float | None:
        """Count by rows; None where there are no rows to relate it to."""
        return round(self.count / self.of, 6) if self.of else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


def by_share(count: int, of: int, usual: float = 0.0) -> Severity:
    """How much it matters that `count` rows are lost, where a share of `usual` was to be expected.

    Fewer than SMALLEST_GROUP are never blocking: the severity would tell their number.

    >>> by_share(45, 100), by_share(5, 100), by_share(45, 100, 0.4), by_share(1, 1000)
    ('blocking', 'look', 'look', 'harmless')
    >>> by_share(5, 10)
    'look'
    """
    share = count / of - usual if of else 0.0
    if share > BLOCKING_FROM and count >= SMALLEST_GROUP:
        return "blocking"
    return "look" if share > LOOK_FROM else "harmless"
