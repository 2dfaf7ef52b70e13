"""Configured sets of codes → which of the tables' codes each of them holds.

DuckDB table made here:

- `code_sets`: key (of the configuration), entry (its place in that list, from 0), written (the
  entry, or the line of its file), code
"""

from itertools import combinations

import duckdb
import pyarrow as pa

from ehr_sn.config import CONCEPTS, Config, gives_away
from ehr_sn.errors import DataError
from ehr_sn.ingest.cells import as_subject, types_of
from ehr_sn.ingest.codes import Descendants, patterns, written
from ehr_sn.ingest.tables import identifier, literal, source

MEASUREMENTS = "features.measurements."


def stage_code_sets(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Make the table above, from every code in the tables of events.

    Raises
    ------
    DataError
        A feature would give a label away, or one code has two units.
    """
    db.execute("CREATE TABLE code_sets (key VARCHAR, entry INTEGER, written VARCHAR, code VARCHAR)")
    if not config.events:
        return
    present = " UNION ".join(
        f"SELECT {identifier(events.code)}::VARCHAR AS code FROM {source(events.table)}"
        for events in config.events
    )
    db.execute(f"CREATE TEMP TABLE present AS {present}")
    listed = [
        (key, i, pattern.written, pattern.low, pattern.high, pattern.exact)
        for key, entries in config.code_sets.items()
        for i, entry in enumerate(entries)
        for pattern in patterns(entry)
    ]
    names = ("key", "entry", "written", "low", "high", "exact")
    types = (pa.string(), pa.int32(), pa.string(), pa.string(), pa.string(), pa.bool_())
    columns = zip(*listed, strict=True) if listed else ((),) * len(names)
    arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
    db.register("patterns", pa.table(arrays, names=names))
    db.execute(
        """INSERT INTO code_sets SELECT key, entry, written, code FROM patterns JOIN present
            ON code = low WHERE exact
        UNION ALL SELECT key, entry, written, code FROM patterns JOIN present
            ON code >= low AND left(code, length(high)) <= high WHERE NOT exact"""
    )
    db.unregister("patterns")
    for key, entries in config.code_sets.items():
        for i, entry in enumerate(entries):
            if isinstance(entry, Descendants):
                _add_descendants(db, key, i, entry)
    db.execute("DROP TABLE present")
    _require_no_label_among_features(db, config)
    _require_one_unit(db, config)


def held_by(key: str) -> str:
    """SQL that selects the codes of one set."""
    return f"SELECT code FROM code_sets WHERE key = {literal(key)}"


def _add_descendants(
    db: duckdb.DuckDBPyConnection, key: str, entry: int, concept: Descendants
) -> None:
    types = types_of(db, CONCEPTS)
    ancestor, descendant = (
        f"{as_subject(f'{side}_concept_id', 'BIGINT', types)}::VARCHAR"
        for side in ("ancestor", "descendant")
    )
    above = literal(concept.descendants_of)
    db.execute(
        f"""INSERT INTO code_sets SELECT ?, ?, ?, code FROM present
        WHERE code = {above} OR code IN
            (SELECT {descendant} FROM {source(CONCEPTS)} WHERE {ancestor} = {above})""",
        [key, entry, written(concept)],
    )


def _require_no_label_among_features(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    faults = [
        gives_away(config.where(key), name)
        for name, label in config.labels.items()
        if label.prevalent
        for (key,) in db.execute(
            f"""SELECT DISTINCT key FROM code_sets WHERE starts_with(key, 'features.')
                AND code IN ({held_by(f"labels.{name}")}) ORDER BY 1"""
        ).fetchall()
    ]
    if faults:
        raise DataError("\n".join(faults))


def _require_one_unit(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """An event has one value, whichever measurements its code belongs to."""
    measurements = config.features.measurements
    for one, other in combinations(measurements, 2):
        a, b = measurements[one], measurements[other]
        if a.conversions == b.conversions and (a.unit == b.unit or not a.units):
            continue
        shared = f"({held_by(MEASUREMENTS + one)}) INTERSECT ({held_by(MEASUREMENTS + other)})"
        if db.execute(f"{shared} LIMIT 1").fetchall():
            raise DataError(
                f"{config.where(MEASUREMENTS + other)}: holds a code of {MEASUREMENTS}{one}, which "
                "has other units: give both the same `unit` and `units`"
            )
