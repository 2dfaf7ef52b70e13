"""Counts that decide whether tables are usable → an error, or a record to add up over shards.

On one shard an unmet requirement is an error at once. Of several shards none sees the whole: each
keeps its counts, in the DuckDB table `requirements`, and they are judged when added up.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from string import Template
from typing import Any

import duckdb

from ehr_sn.errors import DataError

REASONS = "$reasons"  # in a message: the requirement's reasons, each after how many it is of


@dataclass(frozen=True)
class Requirement:
    """A demand on counts: at least `least` of each in `needed`, and none of those in `refused`.

    `at_most` names a count, and which share it may be of another count: ("bad", 0.01, "rows").
    Where the count `unless_none` is zero, nothing is required. In `message` a count stands as
    `$name`, and `REASONS` for the reasons; it must otherwise be the same for every shard.
    """

    message: str
    counts: dict[str, int]
    needed: tuple[str, ...] = ()
    least: int = 1
    refused: tuple[str, ...] = ()
    at_most: tuple[str, float, str] | None = None
    unless_none: str | None = None
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def is_met(self) -> bool:
        if self.unless_none is not None and not self.counts[self.unless_none]:
            return True
        if self.at_most is not None:
            name, share, of = self.at_most
            if self.counts[name] > share * self.counts[of]:
                return False
        enough = all(self.counts[name] >= self.least for name in self.needed)
        return enough and not any(self.counts[name] for name in self.refused)

    @property
    def fault(self) -> str:
        """The message with its counts, and with its reasons, the most frequent first."""
        counts = {name: f"{n:,}" for name, n in self.counts.items()}
        reasons = sorted(self.reasons.items(), key=lambda reason: (-reason[1], reason[0]))
        told = "; ".join(f"{n:,} {why}" for why, n in reasons if n)
        message = self.message if told else self.message.replace(f" ({REASONS})", "")
        return Template(message).safe_substitute(counts, reasons=told)

    def __add__(self, other: "Requirement") -> "Requirement":
        """Return the requirement on the counts of two shards together."""
        counts = {name: n + other.counts[name] for name, n in self.counts.items()}
        return replace(
            self, counts=counts, reasons=dict(Counter(self.reasons) + Counter(other.reasons))
        )


def require(db: duckdb.DuckDBPyConnection, requirements: Iterable[Requirement]) -> None:
    """Raise what is not met; on one of several shards, keep the counts instead.

    Raises
    ------
    DataError
        Naming each of these requirements that is not met.
    """
    together = list(requirements)
    if _are_kept(db):
        db.execute("INSERT INTO requirements VALUES (?)", [json.dumps([*map(asdict, together)])])
    else:
        _raise_unmet(together)


def keep_requirements(db: duckdb.DuckDBPyConnection) -> None:
    """Make the table `requirements`: this connection holds one of several shards."""
    db.execute("CREATE TABLE IF NOT EXISTS requirements (together VARCHAR)")


def kept(db: duckdb.DuckDBPyConnection) -> list[list[dict[str, Any]]]:
    """What was required, in its order, as JSON holds it."""
    if not _are_kept(db):
        return []
    rows = db.execute("SELECT together FROM requirements ORDER BY rowid").fetchall()
    return [json.loads(together) for (together,) in rows]


def require_of_all(shards: Iterable[list[list[dict[str, Any]]]]) -> None:
    """Judge what several shards have kept, as one shard would have.

    Raises
    ------
    DataError
        Of the first requirements that are not met.
    """
    for together in summed(shards):
        _raise_unmet(together)


def summed(shards: Iterable[list[list[dict[str, Any]]]]) -> list[list[Requirement]]:
    """What several shards have kept, added up."""
    of_all: dict[int, dict[str, Requirement]] = {}
    for shard in shards:
        for place, together in enumerate(shard):
            known = of_all.setdefault(place, {})
            for entry in together:
                one = Requirement(**entry)
                other = known.get(one.message)
                known[one.message] = one if other is None else other + one
    return [list(known.values()) for known in of_all.values()]


def _raise_unmet(together: list[Requirement]) -> None:
    faults = [requirement.fault for requirement in together if not requirement.is_met]
    if faults:
        raise DataError("\n".join(faults))


def _are_kept(db: duckdb.DuckDBPyConnection) -> bool:
    found = db.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = 'requirements'")
    return bool(found.fetchall())
