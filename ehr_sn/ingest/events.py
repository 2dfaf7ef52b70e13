"""Tables → cohort rows and events in one shape; what cannot be used goes to quarantine.

One rule decides what happens to a bad cell. A bad key (subject, time, code) sets the row aside. A
bad value (text, not finite, implausible) becomes missing and the row stays. Either way the
quarantine names table, row number and reason, never the value.

DuckDB tables made here:

- `cohort`: row (from 0, by subject and time), subject_id, prediction_time, follow_up_end, and one
  column a static feature, named as the feature
- `events`: source, subject_id, time, code, numeric_value
- `quarantine`: table_name, row_number, reason, action
"""

from collections.abc import Mapping
from types import MappingProxyType

import duckdb
import numpy as np
import pyarrow as pa

from ehr_sn.config import Clock, Config, Events, Range
from ehr_sn.errors import DataError
from ehr_sn.ingest.tables import count, identifier, literal, literals, source

SET_ASIDE = "row set aside"
MADE_MISSING = "value made missing"
HASHES_AT_ONCE = 2**25  # eight bytes each, beside what DuckDB holds
LARGEST = 1e18  # beyond it no measurement lies, and a slope per year may leave float32

_SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}
_NO_TIME = "does not parse as a time between the years 1 and 9999"


def stage_cohort(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Make the table `cohort`, one row a subject and prediction time.

    Raises
    ------
    DataError
        No row is usable, or a static feature's column holds no number at all.
    """
    _create_quarantine(db)
    cohort = config.cohort
    statics = config.features.static
    raw = {name: identifier(f"raw_{name}") for name in statics}
    values = "".join(f", {identifier(s.column)} AS {raw[name]}" for name, s in statics.items())
    db.execute(
        f"""CREATE TABLE staged_cohort AS SELECT _row,
            {_subject(cohort.subject_id, _subject_type(db, config))} AS subject_id,
            {_time(cohort.prediction_time, config.clock)} AS prediction_time,
            {_time(cohort.follow_up_end, config.clock)} AS follow_up_end,
            {_given(cohort.prediction_time)} AS time_given,
            {_given(cohort.follow_up_end)} AS end_given {values}
        FROM {source(cohort.table)}"""
    )
    # Alike in all that is used: later ones repeat the first. Else nobody can say which one is
    # right, and all of them are set aside.
    used = ["follow_up_end", *(_number(raw[name]) for name in statics)]
    db.execute(
        f"""CREATE TABLE judged_cohort AS SELECT *, CASE
            WHEN subject_id IS NULL THEN 'no subject_id'
            WHEN NOT time_given THEN 'no prediction time'
            WHEN prediction_time IS NULL THEN 'prediction time {_NO_TIME}'
            WHEN min(content) OVER same <> max(content) OVER same
                THEN 'subject appears again at this prediction time, with other values'
            WHEN row_number() OVER (same ORDER BY _row) > 1 THEN 'repeats an earlier row'
            END AS reason
        FROM (SELECT *, hash({", ".join(used)}) AS content FROM staged_cohort)
        WINDOW same AS (PARTITION BY subject_id, prediction_time)"""
    )
    _quarantine(db, "judged_cohort", cohort.table, "reason", SET_ASIDE)
    if not count(db, "SELECT count(*) FROM judged_cohort WHERE reason IS NULL"):
        raise DataError(_nothing_usable(db, config.where("cohort"), cohort.table))
    no_end = f"""CASE WHEN reason IS NULL AND end_given AND follow_up_end IS NULL
        THEN 'end of follow-up {_NO_TIME}' END"""
    _quarantine(db, "judged_cohort", cohort.table, no_end, MADE_MISSING)
    usable = ""
    for name, static in statics.items():
        where = config.where(f"features.static.{name}")
        _require_some_number(db, where, cohort.table, static.column)
        bad = _value_reason(raw[name], static.column, _implausible(raw[name], static, name))
        reason = f"CASE WHEN reason IS NULL THEN {bad} END"
        _quarantine(db, "judged_cohort", cohort.table, reason, MADE_MISSING)
        usable += f", CASE WHEN {bad} IS NULL THEN {_number(raw[name])} END AS {identifier(name)}"
    db.execute(
        f"""CREATE TABLE cohort AS SELECT
            row_number() OVER (ORDER BY subject_id, prediction_time) - 1 AS row,
            subject_id, prediction_time, follow_up_end {usable}
        FROM judged_cohort WHERE reason IS NULL ORDER BY row"""
    )
    db.execute("DROP TABLE staged_cohort; DROP TABLE judged_cohort")


def stage_events(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Make the table `events` from all sources of events. Needs `cohort`.

    Raises
    ------
    DataError
        A column of values holds no number at all.
    """
    subject_type = _subject_type(db, config)
    tables = tuple(dict.fromkeys(events.table for events in config.events))
    db.execute(
        f"""CREATE TABLE events (source ENUM ({literals(tables)}), subject_id {subject_type},
            time TIMESTAMP, code VARCHAR, numeric_value DOUBLE)"""
    )
    for i, events in enumerate(config.events):
        if events.numeric_value:
            where = config.where(f"events.{i}.numeric_value")
            _require_some_number(db, where, events.table, events.numeric_value)
        _judge(db, config, events, subject_type)
        _quarantine(db, "judged", events.table, "reason", SET_ASIDE)
        kept = "CASE WHEN reason IS NULL THEN value_reason END"
        _quarantine(db, "judged", events.table, kept, MADE_MISSING)
        db.execute(
            f"""INSERT INTO events SELECT {literal(events.table)}, subject_id, time, code,
                CASE WHEN value_reason IS NULL THEN number END
            FROM judged WHERE reason IS NULL"""
        )
        db.execute("DROP TABLE judged")


def require_events(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Refuse a table of events of which nothing is usable: its columns may be confused.

    Raises
    ------
    DataError
        With the reasons and how often each occurs.
    """
    for i, events in enumerate(config.events):
        if not count(db, f"SELECT count(*) FROM events WHERE source = {literal(events.table)}"):
            raise DataError(_nothing_usable(db, config.where(f"events.{i}"), events.table))


def _judge(
    db: duckdb.DuckDBPyConnection, config: Config, events: Events, subject_type: str
) -> None:
    """Make the table `judged`: a source's rows, with the reasons against row and value."""
    value = identifier(events.numeric_value) if events.numeric_value else "NULL::DOUBLE"
    value_reason = _value_reason("value", events.numeric_value, _implausible_event(config))
    types = _types(db, events.table)
    db.execute(
        f"""CREATE TABLE judged AS SELECT _row, subject_id, time, code,
            {_number("value")} AS number,
            CASE
                WHEN NOT subject_given THEN 'no subject_id'
                WHEN subject_id IS NULL THEN 'subject is not in the cohort'
                WHEN NOT time_given THEN 'no time'
                WHEN time IS NULL THEN 'time {_NO_TIME}'
                WHEN code IS NULL THEN 'no code'
            END AS reason,
            {value_reason} AS value_reason
        FROM (SELECT _row, known.subject_id, {value} AS value,
                {_given(events.subject_id)} AS subject_given,
                {_time(events.time, events.clock or config.clock, types)} AS time,
                {_given(events.time)} AS time_given,
                {identifier(events.code)}::VARCHAR AS code
            FROM {source(events.table)} LEFT JOIN (SELECT DISTINCT subject_id FROM cohort) known
                ON known.subject_id = {_subject(events.subject_id, subject_type, types)})"""
    )
    _judge_repeats(db)


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


def _types(db: duckdb.DuckDBPyConnection, table: str) -> dict[str, str]:
    """DuckDB's type of each column of a loaded table."""
    return {name: dtype for name, dtype, *_ in db.execute(f"DESCRIBE {source(table)}").fetchall()}


def _subject_type(db: duckdb.DuckDBPyConnection, config: Config) -> str:
    """BIGINT where every subject of the cohort is a whole number, as MEDS has it, else VARCHAR."""
    subject = identifier(config.cohort.subject_id)
    others = count(
        db,
        f"""SELECT count(*) FROM {source(config.cohort.table)}
        WHERE {subject} IS NOT NULL AND {_subject(config.cohort.subject_id, "BIGINT")} IS NULL""",
    )
    return "VARCHAR" if others else "BIGINT"


def _subject(
    column: str, subject_type: str, types: Mapping[str, str] = MappingProxyType({})
) -> str:
    """SQL for a subject as it is compared: as written, or as a whole number.

    7 and 7.0 (as tables with gaps hold whole numbers) are the same number; 007 and 7.6, which a
    plain cast would also take for numbers, are none.
    """
    written = f"{identifier(column)}::VARCHAR"
    if subject_type == "VARCHAR":
        return written
    if types.get(column) in ("TINYINT", "SMALLINT", "INTEGER", "BIGINT"):
        return f"{identifier(column)}::BIGINT"
    return rf"TRY_CAST(regexp_extract({written}, '^(0|-?[1-9]\d*)(\.0+)?$', 1) AS BIGINT)"


def _create_quarantine(db: duckdb.DuckDBPyConnection) -> None:
    db.execute(
        """CREATE TABLE quarantine (
            table_name VARCHAR, row_number BIGINT, reason VARCHAR, action VARCHAR)"""
    )


def _quarantine(
    db: duckdb.DuckDBPyConnection, judged: str, table: str, reason: str, action: str
) -> None:
    db.execute(
        f"""INSERT INTO quarantine SELECT {literal(table)}, _row, {reason}, {literal(action)}
        FROM {judged} WHERE {reason} IS NOT NULL"""
    )


def _time(
    column: str | float | None, clock: Clock, types: Mapping[str, str] = MappingProxyType({})
) -> str:
    """SQL for a column, or a constant on the clock, as a timestamp in UTC, NULL if it is none."""
    if column is None:
        return "NULL::TIMESTAMP"
    written = identifier(column) if isinstance(column, str) else repr(column)
    if clock.unit != "timestamp":
        since = f"TRY_CAST({written} AS DOUBLE) * {_SECONDS[clock.unit]}e6"
        origin = f"TIMESTAMP {literal(clock.origin.isoformat(sep=' '))}"
        time = f"TRY({origin} + to_microseconds(CAST({since} AS BIGINT)))"
    elif clock.format is not None:
        time = f"try_strptime({written}::VARCHAR, {literal(clock.format)})::TIMESTAMP"
    elif types.get(str(column)) == "TIMESTAMP":
        time = written
    else:
        # Not straight to TIMESTAMP: that would drop an offset without a word.
        time = f"TRY_CAST({written} AS TIMESTAMPTZ)::TIMESTAMP"
    return f"""CASE WHEN {time} >= TIMESTAMP '0001-01-01' AND {time} < TIMESTAMP '10000-01-01'
        THEN {time} END"""


def _given(column: str | float | None) -> str:
    if column is None:
        return "FALSE"
    return f"{identifier(column)} IS NOT NULL" if isinstance(column, str) else "TRUE"


def _number(value: str) -> str:
    """SQL for a value as a double; NaN is how some tables write a missing one."""
    return f"nullif(TRY_CAST({value} AS DOUBLE), 'nan'::DOUBLE)"


def _value_reason(value: str, column: str | None, implausible: str) -> str:
    """SQL for why a value is unusable, or NULL. A value that is not given has no reason."""
    text = literal(f"{column}: not a number")
    endless = literal(f"{column}: not finite, or beyond {LARGEST:g}")
    return f"""CASE
        WHEN {value} IS NULL THEN NULL
        WHEN TRY_CAST({value} AS DOUBLE) IS NULL THEN {text}
        WHEN abs({_number(value)}) > {LARGEST!r} THEN {endless}
        {implausible} END"""


def _implausible(value: str, quantity: Range, name: str, of: str = "TRUE") -> str:
    """A branch of `_value_reason` for the rows where the condition `of` holds."""
    if quantity.plausible is None:
        return ""
    low, high = quantity.plausible
    reason = literal(f"{name}: outside the plausible range {low:g} to {high:g}")
    return f"WHEN {of} AND {_number(value)} NOT BETWEEN {low!r} AND {high!r} THEN {reason}\n"


def _implausible_event(config: Config) -> str:
    codes = config.features.measured_codes
    return "".join(
        _implausible("value", measurement, name, f"code IN ({literals(codes[name])})")
        for name, measurement in config.features.measurements.items()
    )


def _require_some_number(
    db: duckdb.DuckDBPyConnection, where: str, table: str, column: str
) -> None:
    value = identifier(column)
    given, numbers = db.execute(
        f"SELECT count({value}), count(TRY_CAST({value} AS DOUBLE)) FROM {source(table)}"
    ).fetchall()[0]
    if given and not numbers:
        raise DataError(
            f"{where}: column {column!r} of table {table} holds text in all of its {given:,} "
            "filled rows, where numbers belong: is it the right column?"
        )


def _nothing_usable(db: duckdb.DuckDBPyConnection, where: str, table: str) -> str:
    reasons = db.execute(
        f"""SELECT reason, count(*) AS n FROM quarantine
        WHERE table_name = {literal(table)} AND action = {literal(SET_ASIDE)}
        GROUP BY 1 ORDER BY n DESC, 1"""
    ).fetchall()
    told = "; ".join(f"{n:,} rows: {reason}" for reason, n in reasons)
    return f"{where}: no row of table {table} is usable ({told})"
