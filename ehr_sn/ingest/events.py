"""Tables of timed events → events in one shape; what cannot be used goes to quarantine.

DuckDB table made here:

- `events`: source, subject_id, time, code, numeric_value
"""

import duckdb
import numpy as np
import pyarrow as pa

from ehr_sn.config import Config, Conversion, Events
from ehr_sn.errors import DataError
from ehr_sn.ingest.cells import (
    LARGEST,
    MADE_MISSING,
    NO_TIME,
    SET_ASIDE,
    as_subject,
    as_time,
    implausible,
    is_given,
    nothing_usable,
    require_some_number,
    set_aside,
    subject_type_of,
    types_of,
    value_reason_of,
)
from ehr_sn.ingest.code_sets import MEASUREMENTS, held_by
from ehr_sn.ingest.columns import of_table
from ehr_sn.ingest.expressions import Expression, number
from ehr_sn.ingest.tables import count, identifier, literal, literals, notice, source

HASHES_AT_ONCE = 2**25  # eight bytes each, beside what DuckDB holds


def stage_events(db: duckdb.DuckDBPyConnection, config: Config) -> dict[str, dict[str, int]]:
    """Make the table `events` from all sources of events. Needs `cohort` and `code_sets`.

    Returns for each table how many rows were read, left out by `where`, set aside, and kept.

    Raises
    ------
    DataError
        A column of values holds no number at all.
    """
    subject_type = subject_type_of(db, config)
    tables = literals(tuple(config.tables))
    db.execute(
        f"""CREATE TABLE events (source ENUM ({tables}), subject_id {subject_type},
            time TIMESTAMP, code VARCHAR, numeric_value DOUBLE)"""
    )
    rows: dict[str, dict[str, int]] = {}
    for i, events in enumerate(config.events):
        if events.numeric_value:
            where = config.where(f"events.{i}.numeric_value")
            require_some_number(db, where, events.table, events.numeric_value)
        _judge(db, config, events, subject_type)
        told = _told(db, events)
        before = rows.get(events.table, dict.fromkeys(told, 0))  # a table may be named twice
        rows[events.table] = {name: before[name] + n for name, n in told.items()}
        set_aside(db, "judged", events.table, "reason", SET_ASIDE)
        kept = "CASE WHEN reason IS NULL THEN value_reason END"
        set_aside(db, "judged", events.table, kept, MADE_MISSING)
        db.execute(
            f"""INSERT INTO events SELECT {literal(events.table)}, subject_id, time, code,
                CASE WHEN value_reason IS NULL THEN number END
            FROM judged WHERE reason IS NULL"""
        )
        db.execute("DROP TABLE judged")
    _notice_impossible_times(db)
    return rows


def require_events(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Refuse a table of events of which nothing is usable: its columns may be confused.

    Raises
    ------
    DataError
        With the reasons and how often each occurs.
    """
    for i, events in enumerate(config.events):
        if not count(db, f"SELECT count(*) FROM events WHERE source = {literal(events.table)}"):
            raise DataError(nothing_usable(db, config.where(f"events.{i}"), events.table))


def recorded(db: duckdb.DuckDBPyConnection, config: Config, key: str) -> str:
    """SQL that selects subject_id and time of every row whose code is in one set of codes.

    It reads the source tables: before there is a cohort, there are no `events`.
    """
    subject_type = subject_type_of(db, config)
    selected = []
    for events in config.events:
        types = types_of(db, events.table)
        selected.append(
            f"""SELECT {as_subject(events.subject_id, subject_type, types)} AS subject_id,
                {as_time(events.time, events.clock or config.clock, types)} AS time
            FROM {_counted_in(events)} WHERE {identifier(events.code)}::VARCHAR IN ({held_by(key)})
            """
        )
    return " UNION ALL ".join(selected)


def _judge(
    db: duckdb.DuckDBPyConnection, config: Config, events: Events, subject_type: str
) -> None:
    """Make the table `judged`: a source's rows, with the reasons against row and value."""
    value = identifier(events.numeric_value) if events.numeric_value else "NULL::DOUBLE"
    unit = f"coalesce(trim({identifier(events.unit)}::VARCHAR), '')" if events.unit else "''"
    converted, against = _measured(db, config) if events.numeric_value else ("number", "")
    value_reason = value_reason_of("value", events.numeric_value, against)
    types = types_of(db, events.table)
    db.execute(
        f"""CREATE TABLE judged AS SELECT _row, subject_id, time, code, converted AS number,
            CASE
                WHEN NOT subject_given THEN 'no subject_id'
                WHEN subject_id IS NULL THEN 'subject is not in the cohort'
                WHEN NOT time_given THEN 'no time'
                WHEN time IS NULL THEN 'time {NO_TIME}'
                WHEN code IS NULL THEN 'no code'
            END AS reason,
            {value_reason} AS value_reason
        FROM (SELECT *, {converted} AS converted
            FROM (SELECT _row, _subject AS subject_id, {value} AS value,
                    {number(value)} AS number, {unit} AS unit,
                    {is_given(events.subject_id)} AS subject_given,
                    {as_time(events.time, events.clock or config.clock, types)} AS time,
                    {is_given(events.time)} AS time_given,
                    {identifier(events.code)}::VARCHAR AS code
                FROM {_counted_in(events)}
                LEFT JOIN (SELECT DISTINCT subject_id AS _subject FROM cohort)
                ON _subject = {as_subject(events.subject_id, subject_type, types)}))"""
    )
    _judge_repeats(db)


def _counted_in(events: Events) -> str:
    """SQL for the rows of a source that its `where` does not leave out."""
    if events.where is None:
        return source(events.table)
    condition = Expression.parse(events.where).sql(
        lambda name: identifier(of_table(events.table, name))
    )
    return f"(SELECT * FROM {source(events.table)} WHERE {condition})"


def _told(db: duckdb.DuckDBPyConnection, events: Events) -> dict[str, int]:
    """How many of a source's rows came to what; says so if some were left out."""
    read = count(db, f"SELECT count(*) FROM {source(events.table)}")
    judged, kept = db.execute(
        "SELECT count(*), count(*) FILTER (reason IS NULL) FROM judged"
    ).fetchall()[0]
    if judged < read:
        said = "left out, for `where` is not true of them"
        notice(db, "left out", events.table, read - judged, read, said)
    return {"read": read, "left_out": read - judged, "set_aside": judged - kept, "kept": kept}


def _judge_repeats(db: duckdb.DuckDBPyConnection) -> None:
    """Give all but the first of equal rows in `judged` their reason.

    A group for every row would not fit in memory. So the rows that may be equal are found first, by
    hashes of their content that occur more than once.
    """
    content = "hash(subject_id, time, code, number, value_reason)"
    parts = 1 + count(db, "SELECT count(*) FROM judged") // HASHES_AT_ONCE
    for part in range(parts):
        hashes = db.execute(
            f"""SELECT {content} AS content FROM judged
            WHERE reason IS NULL AND {content} % {parts} = {part}"""
        ).fetchnumpy()["content"]
        hashes.sort()
        suspects = pa.table({"content": np.unique(hashes[1:][hashes[1:] == hashes[:-1]])})
        if not suspects.num_rows:
            continue
        db.register("suspects", suspects)
        db.execute(
            f"""UPDATE judged SET reason = 'repeats an earlier row'
            FROM (SELECT _row FROM judged
                WHERE reason IS NULL AND {content} IN (SELECT content FROM suspects)
                QUALIFY row_number() OVER (PARTITION BY subject_id, time, code, number, value_reason
                    ORDER BY _row) > 1) repeated
            WHERE judged._row = repeated._row"""
        )
        db.unregister("suspects")


def _measured(db: duckdb.DuckDBPyConnection, config: Config) -> tuple[str, str]:
    """SQL for a value in its measurement's unit, and branches for why it is unusable."""
    in_unit, against = "", ""
    for name, measurement in config.features.measurements.items():
        held = db.execute(f"{held_by(MEASUREMENTS + name)} GROUP BY 1 ORDER BY 1").fetchall()
        if not held:
            continue
        of = f"code IN ({literals(tuple(code for (code,) in held))})"
        if measurement.units:
            in_unit += f"WHEN {of} THEN CASE {_conversions(measurement.conversions)} END\n"
            against += f"""WHEN {of} AND number IS NOT NULL AND converted IS NULL THEN
                CASE WHEN unit = '' THEN {literal(f"{name}: no unit is given")}
                ELSE {literal(f"{name}: the unit is not declared")} END
            WHEN {of} AND abs(converted) > {LARGEST!r} THEN
                {literal(f"{name}: beyond {LARGEST:g}")}
            """
        against += implausible("converted", measurement, name, of)
    return (f"CASE {in_unit} ELSE number END" if in_unit else "number"), against


def _conversions(conversions: dict[str, Conversion]) -> str:
    """Branches by unit: as it is written, or in any case where that leaves no doubt."""
    lowered = [name.lower() for name in conversions]
    tests = {f"unit = {literal(name)}": conversion for name, conversion in conversions.items()}
    tests |= {
        f"lower(unit) = {literal(name.lower())}": conversion
        for name, conversion in conversions.items()
        if lowered.count(name.lower()) == 1
    }
    return " ".join(
        f"WHEN {test} THEN number * {one.factor!r} + {one.offset!r}" for test, one in tests.items()
    )


def _notice_impossible_times(db: duckdb.DuckDBPyConnection) -> None:
    """Events on a day before the subject's birth, or after its follow-up has ended."""
    found = db.execute(
        """SELECT source, count(*), count(*) FILTER (time::DATE < born::DATE),
            count(*) FILTER (time::DATE > followed_to::DATE)
        FROM events JOIN lifetimes USING (subject_id) GROUP BY 1 ORDER BY 1"""
    ).fetchall()
    for table, events, unborn, beyond in found:
        for check, n, said in (
            ("event before birth", unborn, "recorded before the day of the subject's birth"),
            ("event after follow-up", beyond, "recorded after the day that follow-up ends"),
        ):
            if n:
                notice(db, check, table, n, events, said)
