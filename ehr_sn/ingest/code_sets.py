"""Configured sets of codes → which of the tables' codes each of them holds.

DuckDB tables made here:

- `event_codes`: code_id, code: every code in the tables of events
- `coded_0`, `coded_1`, … for each entry of `events`: cell (as the table holds the code), code_id
- `code_sets`: key (of the configuration), entry (its place in that list, from 0), written (the
  entry, or the line of its file), code, code_id
"""

from itertools import combinations

import duckdb
import pyarrow as pa

from ehr_sn.config import CONCEPTS, Config, gives_away
from ehr_sn.ingest.cells import as_code, as_subject, types_of
from ehr_sn.ingest.codes import Descendants, patterns, written
from ehr_sn.ingest.notices import count
from ehr_sn.ingest.requirements import Requirement, require
from ehr_sn.ingest.sql import identifier, is_integer, is_number, literal, source

MEASUREMENTS = "features.measurements."


def stage_code_sets(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Make the tables above, from every code in the tables of events.

    Raises
    ------
    DataError
        A feature would give a label away, or one code has two units.
    """
    db.execute(
        """CREATE TABLE code_sets (
            key VARCHAR, entry INTEGER, written VARCHAR, code VARCHAR, code_id INTEGER)"""
    )
    _stage_event_codes(db, config)
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
        """INSERT INTO code_sets SELECT key, entry, written, code, code_id
            FROM patterns JOIN event_codes ON code = low WHERE exact
        UNION ALL SELECT key, entry, written, code, code_id FROM patterns JOIN event_codes
            ON code >= low AND left(code, length(high)) <= high WHERE NOT exact"""
    )
    db.unregister("patterns")
    for key, entries in config.code_sets.items():
        for i, entry in enumerate(entries):
            if isinstance(entry, Descendants):
                _add_descendants(db, key, i, entry)
    _require_no_label_among_features(db, config)
    _require_one_unit(db, config)


def held_by(key: str) -> str:
    """SQL that selects the code_id of each code of one set."""
    return f"SELECT code_id FROM code_sets WHERE key = {literal(key)}"


def _stage_event_codes(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    cells = []
    for i, events in enumerate(config.events):
        dtype = types_of(db, events.table)[events.code]
        _require_no_fraction(db, config, i, dtype)
        db.execute(
            f"""CREATE TEMP TABLE cells_{i} AS SELECT cell, {as_code("cell", dtype)} AS code
            FROM (SELECT DISTINCT {identifier(events.code)} AS cell FROM {source(events.table)})"""
        )
        cells.append(f"SELECT DISTINCT code FROM cells_{i}")
    every = " UNION ".join(cells) or "SELECT NULL::VARCHAR AS code"
    db.execute(
        f"""CREATE TABLE event_codes AS
        SELECT (row_number() OVER (ORDER BY code) - 1)::INTEGER AS code_id, code
        FROM ({every}) WHERE code IS NOT NULL ORDER BY code_id"""
    )
    for i in range(len(cells)):
        joined = f"cells_{i} JOIN event_codes USING (code)"
        db.execute(f"CREATE TABLE coded_{i} AS SELECT cell, code_id FROM {joined}")
        db.execute(f"DROP TABLE cells_{i}")


def _require_no_fraction(db: duckdb.DuckDBPyConnection, config: Config, i: int, dtype: str) -> None:
    """Refuse codes that a table holds as numbers with fractions, where 250.1 may be 250.10."""
    events = config.events[i]
    if is_integer(dtype) or not is_number(dtype):
        return
    code = identifier(events.code)
    broken = count(db, f"SELECT count(*) FROM {source(events.table)} WHERE {code} % 1 <> 0")
    message = (
        f"{config.where(f'events.{i}.code')}: column {events.code!r} of table {events.table} holds "
        "its codes as numbers, $broken of them with a fraction, so that 250.1 and 250.10, or 428 "
        "and 428.0, cannot be told apart: write the codes as text"
    )
    require(db, [Requirement(message, {"broken": broken}, refused=("broken",))])


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
        f"""INSERT INTO code_sets SELECT ?, ?, ?, code, code_id FROM event_codes
        WHERE code = {above} OR code IN
            (SELECT {descendant} FROM {source(CONCEPTS)} WHERE {ancestor} = {above})""",
        [key, entry, written(concept)],
    )


def require_codes_of_labels(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Refuse labels of whose codes no event has one: nobody would be ill.

    Raises
    ------
    DataError
        Naming each of these labels.
    """
    keys = [f"labels.{name}" for name, label in config.labels.items() if label.codes]
    found = dict(
        db.execute("SELECT key, count(DISTINCT code_id) FROM code_sets GROUP BY key").fetchall()
    )
    require(
        db,
        [
            Requirement(
                f"{config.where(key)}: no event has any of its codes: are they written as the "
                "tables write them, with the same letters' case, dots and prefixes?",
                {"codes": found.get(key, 0)},
                needed=("codes",),
            )
            for key in keys
        ],
    )


def _require_no_label_among_features(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    keys = sorted(key for key in config.code_sets if key.startswith("features."))
    sets = [
        (key, f"labels.{name}", gives_away(config.where(key), name))
        for name, label in config.labels.items()
        if label.prevalent and label.codes
        for key in keys
    ]
    _require_disjoint(db, sets)


def _require_one_unit(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """An event has one value, whichever measurements its code belongs to."""
    measurements = config.features.measurements
    sets = []
    declared = {
        name: (one.conversions, one.unit if one.units else "") for name, one in measurements.items()
    }
    for one, other in combinations(measurements, 2):
        if declared[one] == declared[other]:
            continue
        said = (
            f"{config.where(MEASUREMENTS + other)}: holds a code of {MEASUREMENTS}{one}, which "
            "has other units: give both the same `unit` and `units`"
        )
        sets.append((MEASUREMENTS + one, MEASUREMENTS + other, said))
    _require_disjoint(db, sets)


def _require_disjoint(db: duckdb.DuckDBPyConnection, sets: list[tuple[str, str, str]]) -> None:
    """Refuse pairs of sets that share a code; each pair comes with what is wrong where it does."""
    if not sets:
        return
    shared = {
        (one, other): codes
        for one, other, codes in db.execute(
            """SELECT a.key, b.key, count(DISTINCT code_id)
            FROM code_sets a JOIN code_sets b USING (code_id) WHERE a.key <> b.key GROUP BY 1, 2"""
        ).fetchall()
    }
    require(
        db,
        [
            Requirement(said, {"shared": shared.get((one, other), 0)}, refused=("shared",))
            for one, other, said in sets
        ],
    )
