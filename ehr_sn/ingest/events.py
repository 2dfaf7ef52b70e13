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

import duckdb

from ehr_sn.config import Clock, Config, Range
from ehr_sn.errors import DataError
from ehr_sn.ingest.tables import count, identifier, literal, literals

SET_ASIDE = "row set aside"
MADE_MISSING = "value made missing"

_SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}


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
    source = identifier(cohort.table)
    values = "".join(f", {identifier(s.column)} AS {_raw(name)}" for name, s in statics.items())
    db.execute(
        f"""CREATE TABLE staged_cohort AS SELECT _row,
            {identifier(cohort.subject_id)}::{_subject_type(db, config)} AS subject_id,
            {_time(cohort.prediction_time, config.clock)} AS prediction_time,
            {_time(cohort.follow_up_end, config.clock)} AS follow_up_end,
            {_given(cohort.prediction_time)} AS time_given {values}
        FROM {source}"""
    )
    # Identical but for the row number: later ones repeat the first. Else nobody can say which
    # one is right, and all of them are set aside.
    db.execute(
        f"""CREATE TABLE judged_cohort AS SELECT *, CASE
            WHEN subject_id IS NULL THEN 'no subject_id'
            WHEN NOT time_given THEN 'no prediction time'
            WHEN prediction_time IS NULL THEN 'prediction time does not parse'
            WHEN min(content) OVER same <> max(content) OVER same
                THEN 'subject appears more than once, with different values'
            WHEN row_number() OVER (same ORDER BY _row) > 1 THEN 'repeats an earlier row'
            END AS reason
        FROM (SELECT *, hash({_columns(db, "staged_cohort")}) AS content FROM staged_cohort)
        WINDOW same AS (PARTITION BY subject_id, prediction_time)"""
    )
    _quarantine(db, "judged_cohort", cohort.table, "reason", SET_ASIDE)
    if not count(db, "SELECT count(*) FROM judged_cohort WHERE reason IS NULL"):
        reasons = db.execute("SELECT reason, count(*) FROM judged_cohort GROUP BY 1").fetchall()
        told = "; ".join(f"{n} rows: {reason}" for reason, n in reasons)
        raise DataError(f"{config.where('cohort')}: no row of {cohort.table} is usable ({told})")
    usable = ""
    for name, static in statics.items():
        raw = _raw(name)
        _require_some_number(db, config.where(f"features.static.{name}"), "judged_cohort", raw)
        bad = _value_reason(raw, static.column, _implausible(raw, static, name))
        reason = f"CASE WHEN reason IS NULL THEN {bad} END"
        _quarantine(db, "judged_cohort", cohort.table, reason, MADE_MISSING)
        usable += f", CASE WHEN {bad} IS NULL THEN {_number(raw)} END AS {identifier(name)}"
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
    db.execute(
        f"""CREATE TABLE events (source VARCHAR, subject_id {subject_type}, time TIMESTAMP,
            code VARCHAR, numeric_value DOUBLE)"""
    )
    for i, source in enumerate(config.events):
        value = identifier(source.numeric_value) if source.numeric_value else "NULL"
        bad = _value_reason("value", source.numeric_value, _implausible_event(config))
        table = identifier(source.table)
        if source.numeric_value:
            _require_some_number(db, config.where(f"events.{i}.numeric_value"), table, value)
        db.execute(
            f"""CREATE TABLE staged AS SELECT s._row,
                TRY_CAST(s.{identifier(source.subject_id)} AS {subject_type}) AS subject_id,
                s.{identifier(source.subject_id)} IS NOT NULL AS subject_given,
                {_time(source.time, source.clock or config.clock)} AS time,
                {_given(source.time)} AS time_given,
                s.{identifier(source.code)}::VARCHAR AS code,
                {value} AS value
            FROM {table} s"""
        )
        db.execute(
            f"""CREATE TABLE judged AS SELECT * REPLACE (CASE
                    WHEN reason IS NULL AND copy > 1 THEN 'repeats an earlier row'
                    ELSE reason END AS reason)
            FROM (SELECT *, row_number() OVER (
                    PARTITION BY reason, subject_id, time, code, TRY_CAST(value AS DOUBLE),
                        CASE WHEN TRY_CAST(value AS DOUBLE) IS NULL THEN value::VARCHAR END
                    ORDER BY _row) AS copy
                FROM (SELECT staged.*,
                    CASE
                        WHEN NOT subject_given THEN 'no subject_id'
                        WHEN known.subject_id IS NULL THEN 'subject is not in the cohort'
                        WHEN NOT time_given THEN 'no time'
                        WHEN time IS NULL THEN 'time does not parse'
                        WHEN code IS NULL THEN 'no code'
                    END AS reason,
                    {bad} AS value_reason
                FROM staged LEFT JOIN (SELECT DISTINCT subject_id FROM cohort) known
                    ON staged.subject_id = known.subject_id))"""
        )
        _quarantine(db, "judged", source.table, "reason", SET_ASIDE)
        kept = "CASE WHEN reason IS NULL THEN value_reason END"
        _quarantine(db, "judged", source.table, kept, MADE_MISSING)
        db.execute(
            f"""INSERT INTO events SELECT {literal(source.table)}, subject_id, time, code,
                CASE WHEN value_reason IS NULL THEN {_number("value")} END
            FROM judged WHERE reason IS NULL"""
        )
        db.execute("DROP TABLE staged; DROP TABLE judged")


def _subject_type(db: duckdb.DuckDBPyConnection, config: Config) -> str:
    """BIGINT where every subject is a whole number, as MEDS has it, whatever the file's type."""
    subject = identifier(config.cohort.subject_id)
    whole = f"coalesce(TRY_CAST({subject} AS BIGINT)::VARCHAR = {subject}::VARCHAR, FALSE)"
    table = identifier(config.cohort.table)
    others = count(db, f"SELECT count(*) FROM {table} WHERE {subject} IS NOT NULL AND NOT {whole}")
    return "VARCHAR" if others else "BIGINT"


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


def _time(column: str | float | None, clock: Clock) -> str:
    """SQL for a column, or a constant on the clock, as a timestamp; NULL where it is none."""
    if column is None:
        return "NULL::TIMESTAMP"
    written = identifier(column) if isinstance(column, str) else repr(float(column))
    if clock.unit != "timestamp":
        since = f"TRY_CAST({written} AS DOUBLE) * {_SECONDS[clock.unit]}e6"
        origin = f"TIMESTAMP {literal(clock.origin.isoformat(sep=' '))}"
        return f"TRY({origin} + to_microseconds(CAST({since} AS BIGINT)))"
    if clock.format is not None:
        return f"try_strptime({written}::VARCHAR, {literal(clock.format)})"
    return f"TRY_CAST({written}::VARCHAR AS TIMESTAMP)"


def _given(column: str | float | None) -> str:
    return f"{identifier(column)} IS NOT NULL" if isinstance(column, str) else "TRUE"


def _number(value: str) -> str:
    """SQL for a value as a double; NaN is how some tables write a missing one."""
    return f"nullif(TRY_CAST({value} AS DOUBLE), 'nan'::DOUBLE)"


def _value_reason(value: str, column: str | None, implausible: str) -> str:
    """SQL for why a value is unusable, or NULL. A value that is not given has no reason."""
    text, infinite = (literal(f"{column}: {what}") for what in ("not a number", "not finite"))
    return f"""CASE
        WHEN {value} IS NULL THEN NULL
        WHEN TRY_CAST({value} AS DOUBLE) IS NULL THEN {text}
        WHEN isinf(TRY_CAST({value} AS DOUBLE)) THEN {infinite}
        {implausible} END"""


def _implausible(value: str, quantity: Range, name: str, of: str = "TRUE") -> str:
    """A branch of `_value_reason` for the rows where the condition `of` holds."""
    if quantity.plausible is None:
        return ""
    low, high = quantity.plausible
    reason = literal(f"{name}: outside the plausible range {low:g} to {high:g}")
    return f"WHEN {of} AND {_number(value)} NOT BETWEEN {low!r} AND {high!r} THEN {reason}\n"


def _implausible_event(config: Config) -> str:
    return "".join(
        _implausible("value", m, name, f"code IN ({literals(m.codes or (name,))})")
        for name, m in config.features.measurements.items()
    )


def _require_some_number(
    db: duckdb.DuckDBPyConnection, where: str, table: str, column: str
) -> None:
    given, numbers = db.execute(
        f"SELECT count({column}), count(TRY_CAST({column} AS DOUBLE)) FROM {table}"
    ).fetchall()[0]
    if given and not numbers:
        raise DataError(
            f"{where}: the column holds text in all of its {given} filled rows, where numbers "
            "belong: is it the right column?"
        )


def _raw(name: str) -> str:
    return identifier(f"raw_{name}")


def _columns(db: duckdb.DuckDBPyConnection, table: str) -> str:
    names = [row[0] for row in db.execute(f"DESCRIBE {table}").fetchall()]
    return ", ".join(identifier(name) for name in names if name != "_row")
