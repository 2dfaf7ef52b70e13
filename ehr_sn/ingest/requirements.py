"""Counts that decide whether tables are usable → an error, or a record to add up over shards.

On one shard an unmet requirement is an error at once. Of several shards none sees the whole: each
keeps its counts, in the DuckDB table `requirements`, and they are judged when added up.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from string import Template
from typing import Any

import duckdb

from ehr_sn.errors import DataError

REASONS = "$reasons"  # in a message: why rows of the requirement's table were set aside


@dataclass(frozen=True)
class Requirement:
    """At least `least` of each count in `needed`, unless the count `unless_none` is zero.

    In `message` a count stands as `$name`; it must otherwise be the same for every shard.
    """

    message: str
    counts: dict[str, int]
    needed: tuple[str, ...]
    least: int = 1
    unless_none: str | None = None
    table: str | None = None

    @property
    def is_met(self) -> bool:
        if self.unless_none is not None and not self.counts[self.unless_none]:
            return True
        return all(self.counts[name] >= self.least for name in self.needed)

    def fault(self, reasons_of: Callable[[str], str]) -> str:
        """The message with its counts."""
        counts = {name: f"{n:,}" for name, n in self.counts.items()}
        if self.table is not None:
            counts["reasons"] = reasons_of(self.table)
        return Template(self.message).safe_substitute(counts)


def require(
    db: duckdb.DuckDBPyConnection,
    requirements: Iterable[Requirement],
    reasons_of: Callable[[str], str] = str,
) -> None:
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
        _raise_unmet(together, reasons_of)


def keep_requirements(db: duckdb.DuckDBPyConnection) -> None:
    """Make the table `requirements`: this connection holds one of several shards."""
    db.execute("CREATE TABLE requirements (together VARCHAR)")


def kept(db: duckdb.DuckDBPyConnection) -> list[list[dict[str, Any]]]:
    """What was required, in its order, as JSON holds it."""
    if not _are_kept(db):
        return []
    rows = db.execute("SELECT together FROM requirements ORDER BY rowid").fetchall()
    return [json.loads(together) for (together,) in rows]


def require_of_all(
    shards: Iterable[list[list[dict[str, Any]]]], reasons_of: Callable[[str], str]
) -> None:
    """Judge what several shards have kept, as one shard would have.

    Raises
    ------
    DataError
        Of the first requirements that are not met.
    """
    summed: dict[int, dict[str, Requirement]] = {}
    for shard in shards:
        for place, together in enumerate(shard):
            known = summed.setdefault(place, {})
            for entry in together:
                one = Requirement(**entry | {"needed": tuple(entry["needed"])})
                if (other := known.get(one.message)) is not None:
                    counts = {name: n + other.counts[name] for name, n in one.counts.items()}
                    one = replace(one, counts=counts)
                known[one.message] = one
    for of_all in summed.values():
        _raise_unmet(list(of_all.values()), reasons_of)


def _raise_unmet(together: list[Requirement], reasons_of: Callable[[str], str]) -> None:
    unmet = [requirement for requirement in together if not requirement.is_met]
    if unmet:
        raise DataError("\n".join(requirement.fault(reasons_of) for requirement in unmet))


def _are_kept(db: duckdb.DuckDBPyConnection) -> bool:
    found = db.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = 'requirements'")
    return bool(found.fetchall())
