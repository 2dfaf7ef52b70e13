"""Tables of timed events → events in one shape; what cannot be used goes to quarantine.

DuckDB table made here:

- `events`: source, subject_id, time, code, numeric_value
"""

import duckdb
import numpy as np
import pyarrow as pa

from ehr_sn.config import Config, Events
from ehr_sn.ingest.cells import (
    MADE_MISSING,
    NO_TIME,
    SET_ASIDE,
    as_subject,
    as_time,
    implausible,
    is_given,
    require_some_number,
    require_usable,
    set_aside,
    subject_type_of,
    types_of,
    value_reason_of,
)
from ehr_sn.ingest.expressions import number
from ehr_sn.ingest.tables import count, identifier, literal, literals, source

HASHES_AT_ONCE = 2**25  # eight bytes each, beside what DuckDB holds


def stage_events(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Make the table `events` from all sources of events. Needs `cohort`.

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
    for i, events in enumerate(config.events):
        if events.numeric_value:
            where = config.where(f"events.{i}.numeric_value")
            require_some_number(db, where, events.table, events.numeric_value)
        _judge(db, config, events, subject_type)
        set_aside(db, "judged", events.table, "reason", SET_ASIDE)
        kept = "CASE WHEN reason IS NULL THEN value_reason END"
        set_aside(db, "judged", events.table, kept, MADE_MISSING)
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
        usable = count(db, f"SELECT count(*) FROM events WHERE source = {literal(events.table)}")
        require_usable(db, config.where(f"events.{i}"), events.table, usable)


def _judge(
    db: duckdb.DuckDBPyConnection, config: Config, events: Events, subject_type: str
) -> None:
    """Make the table `judged`: a source's rows, with the reasons against row and value."""
    value = identifier(events.numeric_value) if events.numeric_value else "NULL::DOUBLE"
    value_reason = value_reason_of("value", events.numeric_value, _implausible_event(config))
    types = types_of(db, events.table)
    db.execute(
        f"""CREATE TABLE judged AS SELECT _row, subject_id, time, code,
            {number("value")} AS number,
            CASE
                WHEN NOT subject_given THEN 'no subject_id'
                WHEN subject_id IS NULL THEN 'subject is not in the cohort'
                WHEN NOT time_given THEN 'no time'
                WHEN time IS NULL THEN 'time {NO_TIME}'
                WHEN code IS NULL THEN 'no code'
            END AS reason,
            {value_reason} AS value_reason
        FROM (SELECT _row, known.subject_id, {value} AS value,
                {is_given(events.subject_id)} AS subject_given,
                {as_time(events.time, events.clock or config.clock, types)} AS time,
                {is_given(events.time)} AS time_given,
                {identifier(events.code)}::VARCHAR AS code
            FROM {source(events.table)} LEFT JOIN (SELECT DISTINCT subject_id FROM cohort) known
                ON known.subject_id = {as_subject(events.subject_id, subject_type, types)})"""
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


def _implausible_event(config: Config) -> str:
    codes = config.features.measured_codes
    return "".join(
        implausible("value", measurement, name, f"code IN ({literals(codes[name])})")
        for name, measurement in config.features.measurements.items()
    )
