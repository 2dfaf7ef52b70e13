"""Tables of timed events → events in one shape; what cannot be used goes to quarantine.

Made here in DuckDB:

- `events`: source, subject_id, time, code, numeric_value
- `event_rows`: the same, with code_id for the code; `event_codes`: code_id, code

The two are views of the judged rows: no event is copied, and codes are compared as numbers.
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
    db.execute("CREATE TABLE event_codes (code_id INTEGER, code VARCHAR)")
    kept = []
    for i, events in enumerate(config.events):
        if events.numeric_value:
            where = config.where(f"events.{i}.numeric_value")
            require_some_number(db, where, events.table, events.numeric_value)
        judged = f"judged_{i}"
        _judge(db, config, events, subject_type, judged)
        set_aside(db, judged, events.table, "reason", SET_ASIDE)
        value_reason = "CASE WHEN reason IS NULL THEN value_reason END"
        set_aside(db, judged, events.table, value_reason, MADE_MISSING)
        kept.append(
            f"""SELECT {literal(events.table)} AS source, subject_id, time, code_id,
                CASE WHEN value_reason IS NULL THEN number END AS numeric_value
            FROM {judged} WHERE reason IS NULL"""
        )
    nothing = f"""SELECT ''::VARCHAR AS source, NULL::{subject_type} AS subject_id,
        NULL::TIMESTAMP AS time, 0 AS code_id, 0::DOUBLE AS numeric_value WHERE FALSE"""
    db.execute(f"CREATE VIEW event_rows AS {' UNION ALL '.join(kept or [nothing])}")
    db.execute(
        """CREATE VIEW events AS SELECT source, subject_id, time, code, numeric_value
        FROM event_rows JOIN event_codes USING (code_id)"""
    )


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
    db: duckdb.DuckDBPyConnection, config: Config, events: Events, subject_type: str, judged: str
) -> None:
    """Make the table `judged`: a source's rows, with the reasons against row and value."""
    db.execute(
        f"""CREATE OR REPLACE TEMP TABLE written AS
        SELECT DISTINCT {identifier(events.code)} AS written FROM {source(events.table)}"""
    )
    db.execute(
        """INSERT INTO event_codes
        SELECT (SELECT count(*) FROM event_codes) + row_number() OVER (ORDER BY code) - 1, code
        FROM (SELECT DISTINCT written::VARCHAR AS code FROM written)
        WHERE code IS NOT NULL AND code NOT IN (SELECT code FROM event_codes)"""
    )
    value = identifier(events.numeric_value) if events.numeric_value else "NULL::DOUBLE"
    value_reason = value_reason_of("value", events.numeric_value, _implausible_event(config))
    types = types_of(db, events.table)
    db.execute(
        f"""CREATE TABLE {judged} AS SELECT _row, subject_id, time, code_id,
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
                coded._code AS code, coded._code_id AS code_id
            FROM {source(events.table)} LEFT JOIN (SELECT DISTINCT subject_id FROM cohort) known
                ON known.subject_id = {as_subject(events.subject_id, subject_type, types)}
            LEFT JOIN (SELECT written AS _written, code AS _code, code_id AS _code_id
                FROM written JOIN event_codes ON written::VARCHAR = code) coded
                ON coded._written = {identifier(events.code)})"""
    )
    _judge_repeats(db, judged)


def _judge_repeats(db: duckdb.DuckDBPyConnection, judged: str) -> None:
    """Give all but the first of equal rows in `judged` their reason.

    A group for every row would not fit in memory. So the rows that may be equal are found first, by
    hashes of their content that occur more than once.
    """
    columns = "subject_id, time, code_id, number, value_reason"
    content = f"hash({columns})"
    parts = 1 + count(db, f"SELECT count(*) FROM {judged}") // HASHES_AT_ONCE
    for part in range(parts):
        hashes = db.execute(
            f"""SELECT {content} AS content FROM {judged}
            WHERE reason IS NULL AND {content} % {parts} = {part}"""
        ).fetchnumpy()["content"]
        hashes.sort()
        suspects = pa.table({"content": np.unique(hashes[1:][hashes[1:] == hashes[:-1]])})
        if not suspects.num_rows:
            continue
        db.register("suspects", suspects)
        db.execute(
            f"""UPDATE {judged} SET reason = 'repeats an earlier row'
            FROM (SELECT _row FROM {judged}
                WHERE reason IS NULL AND {content} IN (SELECT content FROM suspects)
                QUALIFY row_number() OVER (PARTITION BY {columns} ORDER BY _row) > 1) repeated
            WHERE {judged}._row = repeated._row"""
        )
        db.unregister("suspects")


def _implausible_event(config: Config) -> str:
    codes = config.features.measured_codes
    return "".join(
        implausible("value", measurement, name, f"code IN ({literals(codes[name])})")
        for name, measurement in config.features.measurements.items()
    )
