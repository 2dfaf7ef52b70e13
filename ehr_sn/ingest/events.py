"""Tables of timed events → events in one shape; what cannot be used goes to quarantine.

Made here in DuckDB:

- `events`: source, subject_id, time, code, numeric_value
- `event_rows`: the same, with code_id for the code
- `events_by_code`: the same without source, and one row a code of what has several
- `joint_codes`: code_id of what has several codes, and code_id (`member`) and code of each

They are views of the judged rows: no event is copied, and codes are compared as numbers.
"""

from collections.abc import Iterator

import duckdb
import numpy as np
import pyarrow as pa

from ehr_sn.config import MICRO, Config, Conversion, Events
from ehr_sn.errors import quoted
from ehr_sn.ingest.cells import (
    LARGEST,
    MADE_MISSING,
    SET_ASIDE,
    as_code,
    as_subject,
    implausible,
    is_bound,
    is_given,
    is_given_subject,
    require_some_number,
    require_usable,
    set_aside,
    subject_type_of,
    types_of,
    value_reason_of,
)
from ehr_sn.ingest.code_sets import MEASUREMENTS, held_by
from ehr_sn.ingest.columns import of_table
from ehr_sn.ingest.expressions import Expression, is_one_of
from ehr_sn.ingest.notices import count, notice
from ehr_sn.ingest.sql import TIME_TYPES, identifier, literal, number, source
from ehr_sn.ingest.tables import IDENTITY
from ehr_sn.ingest.times import as_time, day_of, moment_of, offset_of_text, why_no_time

SAMPLED = 1000  # rows of a table in which offsets are looked for
MERGED = "another code of an earlier row"
HASHES_AT_ONCE = 2**25  # eight bytes each, beside what DuckDB holds


def stage_events(db: duckdb.DuckDBPyConnection, config: Config) -> dict[str, dict[str, int]]:
    """Make the views above from all sources of events. Needs `cohort`, and the tables of codes.

    Returns for each table how many rows were read, left out by `where`, set aside, and kept.

    Raises
    ------
    DataError
        A column of values holds no number at all.
    """
    subject_type = subject_type_of(db, config)
    db.execute("CREATE TABLE joint_codes (code_id INTEGER, member INTEGER, code VARCHAR)")
    rows: dict[str, dict[str, int]] = {}
    kept = []
    for i, events in enumerate(config.events):
        if events.numeric_value:
            where = config.where(f"events.{i}.numeric_value")
            decimal = config.decimal_of(events.table)
            require_some_number(db, events.table, [(where, events.numeric_value)], decimal)
        judged = f"judged_{i}"
        _judge(db, config, i, subject_type)
        told = _told(db, events, judged, config.row_id_of(events) is not None)
        if events.numeric_value:
            _notice_missing_codes(db, config, judged)
            _notice_units(db, config, events, judged)
        before = rows.get(events.table, dict.fromkeys(told, 0))  # a table may be named twice
        rows[events.table] = {name: before[name] + n for name, n in told.items()}
        reason = f"nullif(reason, '{MERGED}')" if told["merged"] else "reason"
        set_aside(db, judged, events.table, reason, SET_ASIDE)
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
    db.execute(
        """CREATE VIEW events_by_code AS SELECT subject_id, time, numeric_value,
            coalesce(j.code, c.code) AS code
        FROM event_rows JOIN event_codes c USING (code_id)
            LEFT JOIN joint_codes j USING (code_id)"""
    )
    _notice_impossible_times(db, config)
    _notice_times_without_offset(db, config)
    return rows


def require_events(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Refuse a table of events of which nothing is usable: its columns may be confused.

    Raises
    ------
    DataError
        With the reasons and how often each occurs.
    """
    for i, events in enumerate(config.events):
        its_own = f"source = {literal(events.table)}"
        usable = count(db, f"SELECT count(*) FROM event_rows WHERE {its_own}")
        read = count(db, f"SELECT count(*) FROM {source(events.table)}")
        if not read and config.may_be_empty(events.table):
            continue
        where, clock = config.where(f"events.{i}"), config.clock_of(events)
        require_usable(db, where, events.table, usable, clock)


def recorded(db: duckdb.DuckDBPyConnection, config: Config, key: str) -> str:
    """SQL that selects subject_id and time of every row whose code is in one set of codes.

    It reads the source tables: before there is a cohort, there are no `events`.
    """
    subject_type = subject_type_of(db, config)
    selected = []
    for i, events in enumerate(config.events):
        types = types_of(db, events.table)
        selected.append(
            f"""SELECT {as_subject(events.subject_id, subject_type, types)} AS subject_id,
                {as_time(events.time, config.clock_of(events), types)} AS time
            FROM {_counted_in(config, events)} WHERE {identifier(events.code)} IN
                (SELECT cell FROM coded_{i} WHERE code_id IN ({held_by(key)}))"""
        )
    return " UNION ALL ".join(selected)


def _judge(db: duckdb.DuckDBPyConnection, config: Config, i: int, subject_type: str) -> None:
    """Make the table `judged_I` of a source's rows, with the reasons against row and value."""
    events, judged = config.events[i], f"judged_{i}"
    types, decimal = types_of(db, events.table), config.decimal_of(events.table)
    value = identifier(events.numeric_value) if events.numeric_value else "NULL::DOUBLE"
    unit, bound, row_id = "''", "FALSE", ""
    coded = _missing_codes(db, config, value) if events.numeric_value else ""
    if coded:
        value = f"CASE WHEN NOT coalesce({coded}, FALSE) THEN {value} END"
    if events.unit:
        signs = ", ".join(map(literal, MICRO))
        code = as_code(identifier(events.unit), types[events.unit])
        unit = f"coalesce(replace({code}, {signs}), '')"
    if events.comparator:
        bound = is_bound(identifier(events.comparator), types[events.comparator])
    if told_apart := config.row_id_of(events):
        row_id = f"CASE WHEN {is_given(told_apart)} THEN hash({identifier(told_apart)}) END"
    converted, against = _measured(db, config) if events.numeric_value else ("number", "")
    is_bounded = literal(f"{events.numeric_value}: a bound, which is no value")
    against = f"WHEN bound THEN {is_bounded}\n{against}" if events.comparator else against
    value_reason = value_reason_of("value", events.numeric_value, against, decimal)
    db.execute(
        f"""CREATE TABLE {judged} AS SELECT _row, subject_id, time, code_id, converted AS number,
            CASE
                WHEN NOT subject_given THEN 'no subject_id'
                WHEN subject_id IS NULL THEN 'subject is not in the cohort'
                WHEN NOT time_given THEN 'no time'
                WHEN time IS NULL THEN {why_no_time("time", identifier("given time"))}
                WHEN code_id IS NULL THEN 'no code'
            END AS reason,
            {value_reason} AS value_reason
            {", row_id" if row_id else ""} {", coded" if coded else ""}
        FROM (SELECT *, {converted} AS converted
            FROM (SELECT _row, _subject AS subject_id, {value} AS value,
                    {number(value, decimal)} AS number, {unit} AS unit, {bound} AS bound,
                    {f"{row_id} AS row_id," if row_id else ""}
                    {is_given_subject(events.subject_id, types)} AS subject_given,
                    {as_time(events.time, config.clock_of(events), types)} AS time,
                    {is_given(events.time)} AS time_given,
                    {identifier(events.time)} AS "given time", _code_id AS code_id
                    {f", {coded} AS coded" if coded else ""}
                FROM {_counted_in(config, events)}
                LEFT JOIN (SELECT DISTINCT subject_id AS _subject FROM cohort)
                    ON _subject = {as_subject(events.subject_id, subject_type, types)}
                LEFT JOIN (SELECT cell AS _cell, code_id AS _code_id FROM coded_{i})
                    ON _cell = {identifier(events.code)}))"""
    )
    identity = IDENTITY if IDENTITY in types else None
    _judge_repeats(db, events.table, judged, "row_id" if row_id else identity)
    if told_apart:
        _merge_codings(db, judged, events.table)


def _counted_in(config: Config, events: Events) -> str:
    """SQL for the rows of a source that its `where` does not leave out."""
    if events.where is None:
        return source(events.table)
    where = Expression.parse(events.where)
    with_comma = where.columns if config.decimal_of(events.table) == "," else ()
    condition = where.sql(lambda name: identifier(of_table(events.table, name)), with_comma)
    return f"(SELECT * FROM {source(events.table)} WHERE {condition})"


def _told(
    db: duckdb.DuckDBPyConnection, events: Events, judged: str, told_apart: bool
) -> dict[str, int]:
    """How many of a source's rows came to what; notices how many were left out."""
    read = count(db, f"SELECT count(*) FROM {source(events.table)}")
    counted, kept = db.execute(
        f"SELECT count(*), count(*) FILTER (reason IS NULL) FROM {judged}"
    ).fetchall()[0]
    merged = (
        count(db, f"SELECT count(*) FROM {judged} WHERE reason = '{MERGED}'") if told_apart else 0
    )
    said = "left out, for `where` is not true of them"
    notice(db, "left out", events.table, read - counted, read, said)
    return {
        "read": read,
        "left_out": read - counted,
        "set_aside": counted - kept - merged,
        "merged": merged,
        "kept": kept,
    }


def _judge_repeats(
    db: duckdb.DuckDBPyConnection, table: str, judged: str, identity: str | None
) -> None:
    """Give all but the first of equal rows in `judged` their reason.

    They are equal also in their `identity`, a column of `judged` or of the source, if there is one.
    A group for every row would not fit in memory. So the rows that may be equal are found first, by
    hashes of their content that occur more than once.
    """
    columns = "subject_id, time, code_id, number, value_reason"
    same = f"{columns}, {identity}" if identity else columns
    for suspected in _suspects(db, judged, f"hash({columns})"):
        rows = f"(SELECT * FROM {judged} WHERE {suspected})"
        if identity == IDENTITY:
            rows += f" JOIN (SELECT _row, {IDENTITY} FROM {source(table)}) USING (_row)"
        db.execute(
            f"""UPDATE {judged} SET reason = 'repeats an earlier row'
            FROM (SELECT _row FROM {rows}
                QUALIFY row_number() OVER (PARTITION BY {same} ORDER BY _row) > 1
            ) repeated WHERE {judged}._row = repeated._row"""
        )


def _merge_codings(db: duckdb.DuckDBPyConnection, judged: str, table: str) -> None:
    """Make one row, of a code that is in the sets of all of theirs, of rows that are one thing.

    These are rows with one identity which differ in their code alone, as the codings of a FHIR
    concept do: translations of one another, which a set may hold several of.
    """
    columns = "subject_id, time, number, value_reason, row_id"
    found = [
        db.sql(
            f"""SELECT list(_row ORDER BY _row) AS rows, list_sort(list(code_id)) AS codes
            FROM {judged} WHERE {suspected} GROUP BY {columns} HAVING count(*) > 1"""
        ).to_arrow_table()
        for suspected in _suspects(db, judged, f"hash({columns})", "AND row_id IS NOT NULL")
    ]
    if not found:
        return
    db.register("found", pa.concat_tables(found))
    db.execute(
        """CREATE OR REPLACE TEMP TABLE joint AS
        SELECT codes, (SELECT coalesce(max(code_id), -1) FROM event_codes)
            + row_number() OVER (ORDER BY codes) AS code_id
        FROM (SELECT DISTINCT codes FROM found)"""
    )
    members = "(SELECT code_id AS joint_id, unnest(codes) AS code_id FROM joint)"
    db.execute(
        f"""INSERT INTO joint_codes SELECT joint_id, code_id, code FROM {members} m
        JOIN event_codes USING (code_id)"""
    )
    db.execute(
        f"""INSERT INTO event_codes SELECT joint_id, string_agg(code, ' = ' ORDER BY code)
        FROM {members} JOIN event_codes USING (code_id) GROUP BY 1"""
    )
    db.execute(
        f"""INSERT INTO code_sets SELECT DISTINCT key, entry, written, event_codes.code, joint_id
        FROM {members} m JOIN code_sets USING (code_id)
        JOIN event_codes ON event_codes.code_id = joint_id"""
    )
    db.execute(
        f"""UPDATE {judged} SET code_id = of_first.code_id FROM
            (SELECT rows[1] AS _row, joint.code_id FROM found JOIN joint USING (codes)) of_first
        WHERE {judged}._row = of_first._row"""
    )
    others = "(SELECT unnest(rows[2:]) FROM found)"
    merged = count(db, f"SELECT count(*) FROM {others}")
    read = count(db, f"SELECT count(*) FROM {judged}")
    db.execute(f"UPDATE {judged} SET reason = '{MERGED}' WHERE _row IN {others}")
    said = "further codes of the same thing: it counts once, under each of them"
    notice(db, "several codes", table, merged, read, said)
    db.unregister("found")


def _suspects(
    db: duckdb.DuckDBPyConnection, judged: str, content: str, more: str = ""
) -> Iterator[str]:
    """Conditions on usable rows, in parts, that are true where the hash `content` repeats."""
    parts = 1 + count(db, f"SELECT count(*) FROM {judged}") // HASHES_AT_ONCE
    for part in range(parts):
        usable = f"reason IS NULL {more}"
        of_part = f"AND {content} % {parts} = {part}" if parts > 1 else ""
        hashes = db.execute(
            f"SELECT {content} AS content FROM {judged} WHERE {usable} {of_part}"
        ).fetchnumpy()["content"]
        hashes.sort()
        suspects = pa.table({"content": np.unique(hashes[1:][hashes[1:] == hashes[:-1]])})
        if suspects.num_rows:
            db.register("suspects", suspects)
            yield f"{usable} AND {content} IN (SELECT content FROM suspects)"
            db.unregister("suspects")


def _missing_codes(db: duckdb.DuckDBPyConnection, config: Config, value: str) -> str:
    """SQL that is true of values that stand for missing; empty where none are declared."""
    tests = []
    for name, measurement in config.features.measurements.items():
        if measurement.missing_codes:
            held = [str(code) for (code,) in db.execute(held_by(MEASUREMENTS + name)).fetchall()]
            of = f"_code_id IN ({', '.join(held)})" if held else "FALSE"
            tests.append(f"({of} AND {is_one_of(value, measurement.missing_codes)})")
    return " OR ".join(tests)


def _notice_missing_codes(db: duckdb.DuckDBPyConnection, config: Config, judged: str) -> None:
    for name, measurement in config.features.measurements.items():
        if measurement.missing_codes:
            coded, given = db.execute(
                f"""SELECT count(*) FILTER (coded), count(*) FILTER (coded OR number IS NOT NULL)
                FROM {judged}
                WHERE reason IS NULL AND code_id IN ({held_by(MEASUREMENTS + name)})"""
            ).fetchall()[0]
            said = f"{quoted(measurement.missing_codes)} made missing"
            notice(db, "missing code", name, coded, given, said)


def _notice_units(
    db: duckdb.DuckDBPyConnection, config: Config, events: Events, judged: str
) -> None:
    """Notice units that are declared but for case, dots, blanks or hyphens in their names."""
    declared = {
        (name, unit): f"{name}: the unit is not declared"
        for name, measurement in config.features.measurements.items()
        for unit in measurement.conversions
        if unit
    }
    if events.unit is None or not declared:
        return
    unlike = db.execute(
        f"""SELECT value_reason, {_plain_unit(f"{identifier(events.unit)}::VARCHAR")}, count(*)
        FROM {judged} JOIN {source(events.table)} USING (_row)
        WHERE ends_with(value_reason, ': the unit is not declared') GROUP BY 1, 2"""
    ).fetchall()
    for (name, unit), reason in declared.items():
        (plain,) = db.execute(f"SELECT {_plain_unit('$1')}", [unit]).fetchall()[0]
        alike = sum(n for why, written, n in unlike if why == reason and written == plain)
        said = f"its unit differs from the declared {unit!r} in nothing but case, dots, blanks or "
        said += "hyphens: declare it among `units` as the table writes it"
        if of := sum(n for why, _, n in unlike if why == reason):
            notice(db, "unit spelling", name, alike, of, said)


def _plain_unit(text: str) -> str:
    signs = ", ".join(map(literal, MICRO))
    return f"lower(regexp_replace(replace({text}, {signs}), '[-\\s._]', '', 'g'))"


def _notice_times_without_offset(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Notice local times beside others that say their offset, where no time zone is named.

    Queries are left out: what `moment` and `known` give has an offset, whatever the source had.
    """
    cohort = config.cohort
    columns = [(cohort.table, cohort.prediction_time, config.clock)]
    columns += [(one.table, one.time, config.clock_of(one)) for one in config.events]
    without, with_offset = [], False
    for table, column, clock in columns:
        of_text = clock.unit == "timestamp" and clock.format is None
        if not isinstance(column, str) or not of_text or config.tables[table].query is not None:
            continue
        name = identifier(column)
        sample = f"(SELECT {name} FROM {source(table)} WHERE {name} IS NOT NULL LIMIT {SAMPLED})"
        kind = types_of(db, table)[column]
        if kind not in ("VARCHAR", *TIME_TYPES):
            continue
        has_offset = {"VARCHAR": offset_of_text(name), TIME_TYPES[-1]: "TRUE"}.get(kind, "FALSE")
        found, lacking = db.execute(
            f"SELECT count(*) FILTER ({has_offset}), count(*) FROM {sample}"
        ).fetchall()[0]
        with_offset |= found > 0
        if found < lacking:
            usable = moment_of(kind, name, clock)
            without.append((table, name, f"({usable}) IS NOT NULL AND NOT {has_offset}"))
    if not with_offset or config.clock.time_zone is not None:
        return
    for table, name, is_local in without:
        lacking, of = db.execute(
            f"SELECT count(*) FILTER ({is_local}), count({name}) FROM {source(table)}"
        ).fetchall()[0]
        said = (
            "times do not say their offset from UTC, and others do: they are taken as UTC; name "
            "the site's time zone, as in `clock: {time_zone: Europe/Berlin}`"
        )
        notice(db, "time zone", table, lacking, of, said)


def _measured(db: duckdb.DuckDBPyConnection, config: Config) -> tuple[str, str]:
    """SQL for a value in its measurement's unit, and branches for why it is unusable."""
    in_unit, against = "", ""
    held = dict(
        db.execute(
            "SELECT key, list(DISTINCT code_id ORDER BY code_id) FROM code_sets GROUP BY key"
        ).fetchall()
    )
    for name, measurement in config.features.measurements.items():
        if MEASUREMENTS + name not in held:
            continue
        of = f"code_id IN ({', '.join(map(str, held[MEASUREMENTS + name]))})"
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


def _notice_impossible_times(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Events on a day before the subject's birth, or after its follow-up has ended."""
    day, birth, end = (
        day_of(time, config.clock.time_zone) for time in ("time", "born", "followed_to")
    )
    found = db.execute(
        f"""SELECT source, count(*), count(*) FILTER ({day} < {birth}),
            count(*) FILTER ({day} > {end})
        FROM event_rows JOIN lifetimes USING (subject_id) GROUP BY 1 ORDER BY 1"""
    ).fetchall()
    for table, events, unborn, beyond in found:
        for check, n, said in (
            ("event before birth", unborn, "recorded before the day of the subject's birth"),
            ("event after follow-up", beyond, "recorded after the day that follow-up ends"),
        ):
            notice(db, check, table, n, events, said)
