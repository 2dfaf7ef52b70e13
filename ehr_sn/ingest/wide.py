"""The cohort's table, and those joined to it → one row a subject and prediction time.

DuckDB tables made here:

- `cohort`: row (from 0, by subject and time), subject_id, prediction_time, follow_up_end, and one
  column a feature that a table's columns hold, named as the feature
- `stated`: row, and one column a label that the cohort's columns state: 1, 0, or NULL where
  unknown; or, of a label with `until`, the time at which its window ends; and, where
  `cohort.died` is given, "ended by death"
- `given_splits`: subject_id, split: as a table gives them
- `lifetimes`: subject_id, born, followed_to (the last of its rows); NULL where not known
- `code_sets`, by code_sets.py
- `quarantine`: table_name, row_number, reason, action
- `notices`: what is counted by column instead of by row
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import duckdb

from ehr_sn.config import Clock, Config, StaticFeature
from ehr_sn.errors import quoted
from ehr_sn.ingest.cells import (
    MADE_MISSING,
    SET_ASIDE,
    as_subject,
    create_quarantine,
    implausible,
    is_given,
    is_given_subject,
    plausible,
    require_some_number,
    require_usable,
    set_aside,
    subject_type_of,
    types_of,
    value_reason_of,
)
from ehr_sn.ingest.code_sets import stage_code_sets
from ehr_sn.ingest.columns import Column, Columns
from ehr_sn.ingest.eligibility import Attrition, entry, stage_eligible
from ehr_sn.ingest.expressions import Expression
from ehr_sn.ingest.expressions import is_one_of as _is_one_of
from ehr_sn.ingest.notices import count, create_notices, notice
from ehr_sn.ingest.pseudonyms import pseudonymise
from ehr_sn.ingest.requirements import Requirement, require
from ehr_sn.ingest.sql import DAY, YEAR, identifier, is_number, literal, number, source
from ehr_sn.ingest.tables import headers
from ehr_sn.ingest.times import NO_TIME, as_time, why_no_time

AS_OF = "as_of"  # a variable of DuckDB: the moment at which the tables were copied, where told
EMPTY = "empty column"  # the check that notices one
NOT_REACHED = "the prediction time was not reached when the tables were copied"

DIED = "ended by death"  # with blanks, no label is called so

_ALIKE = "subject appears again{}, with other values"
_REPEATS = "repeats an earlier row"
FEW_ROWS = 0.01  # share of rows without an order up to which they are set aside, and not refused
MANY_COLUMNS = 100  # of features, from which DuckDB's plans of them take long to be optimised
_QUADRATIC = "common_subexpressions,projection_placement"  # in the columns of a statement


def stage_cohort(
    db: duckdb.DuckDBPyConnection, config: Config, in_order: bool = False
) -> Attrition:
    """Make the tables above; returns how many rows of the cohort's table each rule left.

    With `in_order`, no subject is twice in the cohort's table: its rows are then numbered in their
    own order, none is compared with another, and `cohort` is a view, to be read once.

    Raises
    ------
    DataError
        No row is usable, or a feature's column holds nothing that it could be made of.
    """
    pseudonymise(db, config, in_order)
    if len(config.features.wide) > MANY_COLUMNS:
        db.execute(f"SET disabled_optimizers = {literal(_QUADRATIC)}")
    create_quarantine(db)
    create_notices(db)
    stage_code_sets(db, config)
    columns = Columns(config, headers(db, config))
    kind = "VIEW" if in_order else "TABLE"
    _judge_cohort(db, config, columns, in_order)
    for table in config.cohort.join:
        _judge_joined(db, config, columns, table)
    attrition = _join(db, config, columns, in_order)
    values: dict[str, str] = {}
    judged: list[_Judged] = []
    counted: list[_Counted] = []
    numbers = _numbers(db, config, columns)
    ends = _ends(db, numbers)
    for name, feature in config.features.wide.items():
        for column in columns.of_features[name]:
            counted += _counted(name, feature, column)
        values |= _feature(db, config, name, feature, columns.of_features[name], ends, judged)
    _tell(db, counted)
    _tell(db, list(_respelt(db, config, columns)))
    if not in_order:
        _notice_empty(db, columns)
    selected = "".join(f", {sql} AS {identifier(name)}" for name, sql in values.items())
    db.execute(
        f"""CREATE {kind} cohort AS
        SELECT row, subject_id, prediction_time, follow_up_end {selected}
        FROM wide {"" if in_order else "ORDER BY row"}"""
    )
    _set_values_aside(db, judged)
    stated = "".join(
        f", {_label(columns, name)} AS {identifier(name)}"
        for name, label in config.labels.items()
        if label.positive is not None or label.until is not None
    )
    if config.cohort.died is not None:
        died = f"coalesce({_condition(columns, 'cohort.died')}, FALSE)"
        stated += f", {died} AS {identifier(DIED)}"
    db.execute(f"CREATE TABLE stated AS SELECT row {stated} FROM wide ORDER BY row")
    _stage_lifetimes(db, config)
    if not in_order:  # else the view is yet to be read
        db.execute("DROP TABLE wide")
        db.execute("RESET disabled_optimizers")
    _stage_given_splits(db, config)
    return attrition


def _judge_cohort(
    db: duckdb.DuckDBPyConnection, config: Config, columns: Columns, in_order: bool
) -> None:
    """Make the table `judged_cohort`: rows of the cohort's table, with the reason against each."""
    cohort = config.cohort
    # Everyone's prediction time is the clock's origin where none is given.
    time = cohort.prediction_time if cohort.prediction_time is not None else 0.0
    clock = config.clock
    if cohort.prediction_time is None and clock.unit == "timestamp":
        clock = clock.model_copy(update={"unit": "days"})
    types = types_of(db, cohort.table)
    subject = as_subject(cohort.subject_id, subject_type_of(db, config), types)
    raw, content = _used(db, columns, cohort.table)
    at = f"{as_time(time, clock, types)} + to_microseconds({int(cohort.hours_after * 3600e6)})"
    alike = _ALIKE.format(" at this prediction time")
    if read := config.reads(cohort.table):
        joined = " or ".join(read)
        alike += f" (does its SQL join {joined} more than one row wide? Give it a `key`)"
    place, apart = "0", ""
    if cohort.order_by is not None:
        place = _order(cohort.order_by, clock, types)
        apart = ", place"
    repeats = f"""WHEN min(content) OVER same <> max(content) OVER same
                THEN {literal(alike)}
            WHEN row_number() OVER (same ORDER BY {_row_of(cohort.table)}) > 1 THEN '{_REPEATS}'"""
    same = f"WINDOW same AS (PARTITION BY subject_id, prediction_time{apart})"
    db.execute(
        f"""CREATE {"VIEW" if in_order else "TABLE"} judged_cohort AS SELECT *, CASE
            WHEN subject_id IS NULL THEN 'no subject_id'
            WHEN NOT time_given THEN 'no prediction time'
            WHEN prediction_time IS NULL
                THEN {why_no_time("prediction time", identifier("given time"))}
            WHEN prediction_time > getvariable('{AS_OF}') THEN '{NOT_REACHED}'
            {"" if in_order else repeats} END AS reason
        FROM (SELECT *, hash(0 {content}) AS content
            FROM (SELECT _row AS {_row_of(cohort.table)},
                {subject} AS subject_id,
                CASE WHEN {at} < TIMESTAMP '10000-01-01' THEN {at} END AS prediction_time,
                {is_given(time)} AS time_given,
                {identifier(time) if isinstance(time, str) else "NULL"} AS "given time",
                {place} AS place {raw}
            FROM {source(cohort.table)}))
        {"" if in_order else same}"""
    )
    _set_row_aside(db, "judged_cohort", cohort.table)
    usable = count(db, "SELECT count(*) FROM judged_cohort WHERE reason IS NULL")
    require_usable(db, config.where("cohort"), cohort.table, usable, config.clock)
    if cohort.prediction_time is None:
        _require_one_row_a_subject(db, config, alike)


def _require_one_row_a_subject(db: duckdb.DuckDBPyConnection, config: Config, reason: str) -> None:
    """Refuse rows in no order: were they set aside, only who has a single row would be left."""
    table = config.cohort.table
    rows, several = db.execute(
        "SELECT count(*), count(*) FILTER (reason = ?) FROM judged_cohort", [reason]
    ).fetchall()[0]
    message = (
        f"{config.where('cohort')}: in $several of the $rows rows of table {table} the subject has "
        "several rows, and nothing tells which comes first: name their `prediction_time`; or, to "
        "take one of each subject, a column as `order_by` with `take: first` or `take: last`"
    )
    counts = {"rows": rows, "several": several}
    require(db, [Requirement(message, counts, at_most=("several", FEW_ROWS, "rows"))])


def _order(column: str, clock: Clock, types: Mapping[str, str]) -> str:
    """SQL for the place of a row in its subject's order: by time, number or text."""
    name = identifier(column)
    return f"row({as_time(column, clock, types)}, {number(name)}, {name}::VARCHAR)"


def _judge_joined(
    db: duckdb.DuckDBPyConnection, config: Config, columns: Columns, table: str
) -> None:
    """Make the table `joined_TABLE`: its rows of the cohort's subjects, one a subject."""
    subject = config.cohort.subject_id
    types = types_of(db, table)
    key = as_subject(subject, subject_type_of(db, config), types)
    raw, content = _used(db, columns, table)
    db.execute(
        f"""CREATE TABLE {_joined(table)} AS SELECT *, CASE
            WHEN NOT given THEN 'no subject_id'
            WHEN joined_subject IS NULL THEN 'subject is not in the cohort'
            WHEN min(content) OVER same <> max(content) OVER same THEN '{_ALIKE.format("")}'
            WHEN row_number() OVER (same ORDER BY {_row_of(table)}) > 1 THEN '{_REPEATS}'
            END AS reason
        FROM (SELECT *, hash(0 {content}) AS content
            FROM (SELECT _row AS {_row_of(table)}, _subject AS joined_subject,
                    {is_given_subject(subject, types)} AS given {raw}
                FROM {source(table)} LEFT JOIN (SELECT DISTINCT subject_id AS _subject
                    FROM judged_cohort WHERE reason IS NULL)
                ON _subject = {key}))
        WINDOW same AS (PARTITION BY joined_subject)"""
    )
    _set_row_aside(db, _joined(table), table)
    usable = count(db, f"SELECT count(*) FROM {_joined(table)} WHERE reason IS NULL")
    where = config.where(f"cohort.join.{config.cohort.join.index(table)}")
    if config.tables[table].optional and not count(db, f"SELECT count(*) FROM {source(table)}"):
        return
    require_usable(db, where, table, usable)


def _join(
    db: duckdb.DuckDBPyConnection, config: Config, columns: Columns, in_order: bool
) -> Attrition:
    """Make the table `wide` of the rows that are predicted for; returns what each rule left.

    With `in_order` it is a view, as are those that it is made from.
    """
    cohort = config.cohort
    condition = "TRUE"
    if cohort.where is not None:
        condition = _condition(columns, "cohort.where")
    joins = " ".join(
        f"LEFT JOIN {_joined(table)} ON base.subject_id = {_joined(table)}.joined_subject "
        f"AND {_joined(table)}.reason IS NULL"
        for table in cohort.join
    )
    held = "".join(
        f", {_joined(table)}.{identifier(name)}"
        for table in cohort.join
        for name in (f"{table}._row", *map(str, columns.used(table)))
    )
    constants = {
        "observation_start": cohort.observation_start,
        "follow_up_end": cohort.follow_up_end,
    }
    times = {name: as_time(time, config.clock) for name, time in constants.items()}
    for key, column in columns.of_times.items():
        name = key.removeprefix("cohort.")
        times[name if name in constants else f"time of {key}"] = _time(db, config, column)
    timed = "".join(f", {sql} AS {identifier(name)}" for name, sql in times.items())
    db.execute(
        f"""CREATE {"VIEW" if in_order else "TABLE"} joined AS
        SELECT * {timed}, ({condition})::BOOLEAN AS "fulfils where"
        FROM (SELECT base.* {held} FROM judged_cohort base {joins}
            WHERE base.reason IS NULL)"""
    )
    for column in dict.fromkeys(columns.of_times.values()):
        end = column == columns.of_times.get("cohort.follow_up_end")
        said = literal(f"{'end of follow-up' if end else column.name} {NO_TIME}")
        none = f"""CASE WHEN "fulfils where" AND {identifier(str(column))} IS NOT NULL
            AND {_time(db, config, column)} IS NULL THEN {said} END"""
        _set_value_aside(db, column.table, none, "joined")
    read, subjects, usable, of_subjects = db.execute(
        """SELECT count(*), count(DISTINCT subject_id), count(*) FILTER (reason IS NULL),
            count(DISTINCT subject_id) FILTER (reason IS NULL) FROM judged_cohort"""
    ).fetchall()[0]
    left = [entry("read", read, subjects), entry("usable", usable, of_subjects, read - usable)]
    left = stage_eligible(db, config, _row_of(cohort.table), left, in_order)
    if not in_order:
        for table in ("judged_cohort", "joined", *map(_joined, cohort.join)):
            db.execute(f"DROP TABLE {table}")
    return left


def _time(db: duckdb.DuckDBPyConnection, config: Config, column: Column) -> str:
    """SQL for a column of the cohort's tables, under its name there, as a time."""
    dtype = types_of(db, column.table)[column.name]
    return as_time(str(column), config.clock, {str(column): dtype})


def _stage_lifetimes(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Subjects are born when the age of eligibility counts from, or a feature in years."""
    keys = ["cohort.eligibility.age.born"]
    for name, feature in config.features.static.items():
        if feature.unit == "years":
            keys.append(f"features.static.{name}.since")
    born = next((f"time of {key}" for key in keys if key in config.times), None)
    db.execute(
        f"""CREATE TABLE lifetimes AS SELECT subject_id,
            {f"min({identifier(born)})" if born else "NULL::TIMESTAMP"} AS born,
            max(follow_up_end) AS followed_to
        FROM wide GROUP BY 1 HAVING born IS NOT NULL OR followed_to IS NOT NULL"""
    )


def _stage_given_splits(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    table = config.splits.table
    if table is None:
        return
    subject = as_subject(config.cohort.subject_id, subject_type_of(db, config), types_of(db, table))
    db.execute(
        f"""CREATE TABLE given_splits AS
        SELECT DISTINCT _subject AS subject_id,
            {identifier(config.splits.column)}::VARCHAR AS split
        FROM {source(table)} JOIN (SELECT DISTINCT subject_id AS _subject FROM cohort)
            ON _subject = {subject}
        WHERE {identifier(config.splits.column)} IS NOT NULL"""
    )


@dataclass(frozen=True)
class _Judged:
    """SQL of what a column holds and of why that may be unusable; `value`: the feature made of it.

    None where a feature is made of several columns.
    """

    table: str
    given: str
    reason: str
    value: str | None


def _numbers(db: duckdb.DuckDBPyConnection, config: Config, columns: Columns) -> dict[Column, str]:
    """DuckDB's type of each column that has one of numbers; text in all of another is refused."""
    types = {table: types_of(db, table) for table in (config.cohort.table, *config.cohort.join)}
    numbers = {}
    untyped: dict[str, list[tuple[str, str]]] = {table: [] for table in types}
    for name, feature in config.features.wide.items():
        for column in columns.of_features[name]:
            dtype = types[column.table][column.name]
            if is_number(dtype):
                numbers[column] = dtype
            elif feature.since is None and feature.categories is None:
                where = config.where(config.features.key(name))
                untyped[column.table].append((where, column.name))
    for table, named in untyped.items():
        require_some_number(db, table, named, config.decimal_of(table))
    return numbers


def _ends(
    db: duckdb.DuckDBPyConnection, numbers: dict[Column, str]
) -> dict[Column, tuple[float, float, bool]]:
    """Least and greatest value of each column of numbers, zeros of an empty one; if it is FLOAT."""
    if not numbers:
        return {}
    ends = ", ".join(
        f"coalesce({end}({identifier(str(column))})::DOUBLE, 0)"
        for column in numbers
        for end in ("min", "max")
    )
    found = db.execute(f"SELECT {ends} FROM wide").fetchall()[0]
    floats = [dtype == "FLOAT" for dtype in numbers.values()]
    return dict(zip(numbers, zip(found[::2], found[1::2], floats, strict=True), strict=True))


def _feature(
    db: duckdb.DuckDBPyConnection,
    config: Config,
    name: str,
    feature: StaticFeature,
    columns: list[Column],
    ends: dict[Column, tuple[float, float, bool]],
    judged: list[_Judged],
) -> dict[str, str]:
    """SQL of each of the store's columns that a feature becomes; what to judge is added."""
    where = config.where(config.features.key(name))
    if feature.since is not None:
        (column,) = columns
        return {name: _since(name, feature, column, judged)}
    if feature.categories is not None:
        (column,) = columns
        given = _given(feature, column)
        none = (
            f"{where}: column {column.name!r} of table {column.table} holds none of the "
            f"categories {quoted(feature.categories)} in any of its $given filled rows: write them "
            "as its cells are, in upper or lower case, numbers plainly, texts in quotes"
        )
        seen = _is_one_of(given, feature.categories)
        rows, filled = db.execute(
            f"SELECT count(*) FILTER ({seen}), count({given}) FROM wide"
        ).fetchall()[0]
        counts = {"rows": rows, "given": filled}
        require(db, [Requirement(none, counts, needed=("rows",), unless_none="given")])
        return _categories(name, feature, given)
    values = []
    for column in columns:
        given = _given(feature, column)
        low, high = plausible(feature)
        if column in ends and low <= ends[column][0] and ends[column][1] <= high:
            values.append(f"({given})::{'FLOAT' if ends[column][2] else 'DOUBLE'}")
            continue
        decimal = config.decimal_of(column.table)
        against = implausible(given, feature, name, decimal=decimal)
        bad = value_reason_of(given, column.name, against, decimal)
        value = number(given, decimal)
        judged.append(_Judged(column.table, given, bad, name if len(columns) == 1 else None))
        values.append(f"CASE WHEN {value} BETWEEN {low!r} AND {high!r} THEN {value} END")
    if len(values) == 1:
        return {name: values[0]}
    return {name: f"list_avg([{', '.join(values)}])"}  # of those that are there


def _since(name: str, feature: StaticFeature, column: Column, judged: list[_Judged]) -> str:
    """SQL of how long before the prediction time a time lies; what to judge is added."""
    time = identifier(f"time of features.static.{name}.since")
    length = {"days": DAY, "years": YEAR}[feature.unit]
    since = f"((epoch_us(prediction_time) - epoch_us({time})) / {length!r})"
    bad = f"""CASE
        WHEN {time} > prediction_time
            THEN {literal(f"{name}: {column.name} is after the prediction time")}
        {implausible(since, feature, name)} END"""
    judged.append(_Judged(column.table, time, bad, name))
    return f"CASE WHEN ({bad}) IS NULL THEN {since} END"


def _given(feature: StaticFeature, column: Column) -> str:
    """SQL of a column's cell, NULL where it holds a code for missing."""
    raw = identifier(str(column))
    if feature.missing_codes is None:
        return raw
    return f"CASE WHEN NOT {_is_one_of(raw, feature.missing_codes)} THEN {raw} END"


def _categories(name: str, feature: StaticFeature, given: str) -> dict[str, str]:
    categories = feature.categories or ()
    if feature.ordinal:
        places = " ".join(
            f"WHEN {_is_one_of(given, (cell,))} THEN {place}"
            for place, cell in enumerate(categories)
        )
        return {name: f"(CASE {places} END)::DOUBLE"}
    seen = _is_one_of(given, categories)
    return {
        column: f"CASE WHEN {seen} THEN {_is_one_of(given, (cell,))}::INTEGER::DOUBLE END"
        for cell, column in zip(categories, feature_columns(name, feature), strict=True)
    }


def feature_columns(name: str, feature: StaticFeature) -> list[str]:
    """The store's columns of one feature that tables' columns hold."""
    return feature.stored_as(name)


def _label(columns: Columns, name: str) -> str:
    if columns.config.labels[name].until is not None:
        return identifier(f"time of labels.{name}.until")
    positive = _condition(columns, f"labels.{name}.positive")
    negative = _condition(columns, f"labels.{name}.negative")
    return f"(CASE WHEN {positive} THEN 1 WHEN {negative} THEN 0 END)::TINYINT"


def _condition(columns: Columns, key: str) -> str:
    found = columns.of_conditions[key]
    text = columns.config.conditions[key]
    config = columns.config
    with_comma = [name for name, column in found.items() if config.decimal_of(column.table) == ","]
    return Expression.parse(text).sql(lambda name: identifier(str(found[name])), with_comma)


def _used(db: duckdb.DuckDBPyConnection, columns: Columns, table: str) -> tuple[str, str]:
    """SQL that selects the used columns of a table, and SQL of what makes two rows alike."""
    raw, content = "", ""
    times = set(columns.of_times.values())
    for column in columns.used(table):
        name = identifier(str(column))
        raw += f", {identifier(column.name)} AS {name}"
        content += f", {number(name)}"
        if column in columns.compared:
            content += f", CASE WHEN {number(name)} IS NULL THEN {name}::VARCHAR END"
        if column in times:
            content += f", {_time(db, columns.config, column)}"
    return raw, content


@dataclass(frozen=True)
class _Counted:
    """A reason why many cells of a column may become missing: told by count, not row by row."""

    check: str
    feature: str
    column: Column
    test: str
    message: str


def _counted(name: str, feature: StaticFeature, column: Column) -> Iterator[_Counted]:
    if feature.missing_codes is not None:
        coded = _is_one_of(identifier(str(column)), feature.missing_codes)
        message = f"{column}: {quoted(feature.missing_codes)} made missing"
        yield _Counted("missing code", name, column, coded, message)
    if feature.categories is not None:
        given = _given(feature, column)
        unseen = f"({given}) IS NOT NULL AND NOT {_is_one_of(given, feature.categories)}"
        message = f"{column}: what is none of its categories made missing"
        yield _Counted("unseen category", name, column, unseen, message)


def _tell(db: duckdb.DuckDBPyConnection, counted: list[_Counted]) -> None:
    """Count over the eligible rows, in one pass."""
    if not counted:
        return
    tests = ", ".join(
        f"count(*) FILTER ({one.test}), count({identifier(str(one.column))})" for one in counted
    )
    counts = db.execute(f"SELECT {tests} FROM wide").fetchall()[0]
    for one, rows, filled in zip(counted, counts[::2], counts[1::2], strict=True):
        notice(db, one.check, one.feature, rows, filled, one.message)


def _respelt(db: duckdb.DuckDBPyConnection, config: Config, columns: Columns) -> Iterator[_Counted]:
    """Categories that a column with unseen cells holds in another case, or with other blanks."""
    unseen = "SELECT place FROM notices WHERE check_name = 'unseen category' AND rows > 0"
    for (name,) in db.execute(unseen).fetchall():
        feature, (column,) = config.features.wide[name], columns.of_features[name]
        given = f"({_given(feature, column)})::VARCHAR"
        plain = f"lower(regexp_replace({given}, '\\s', '', 'g'))"
        for cell in feature.categories or ():
            if isinstance(cell, str):
                alike = f"""{plain} = lower(regexp_replace({literal(cell)}, '\\s', '', 'g'))
                    AND {given} <> {literal(cell.strip())}"""
                message = f"{column}: cells that differ from the category {cell!r} in nothing but "
                message += "case or blanks are made missing: spell it as the cells do, or mend them"
                yield _Counted("category spelling", name, column, alike, message)


def _notice_empty(db: duckdb.DuckDBPyConnection, columns: Columns) -> None:
    """Notice columns without any cell, with the rows of this shard."""
    used = [(name, column) for name, several in columns.of_features.items() for column in several]
    if not used:
        return
    filled = ", ".join(f"count({identifier(str(column))})" for _, column in used)
    rows, *given = db.execute(f"SELECT count(*), {filled} FROM wide").fetchall()[0]
    for (name, column), n in zip(used, given, strict=True):
        if not n:
            said = f"column {column.name!r} of table {column.table} is empty"
            notice(db, EMPTY, name, rows, rows, said)


def _set_row_aside(db: duckdb.DuckDBPyConnection, judged: str, table: str) -> None:
    rows = f"(SELECT {_row_of(table)} AS _row, reason FROM {judged})"
    set_aside(db, rows, table, "reason", SET_ASIDE)


def _set_value_aside(
    db: duckdb.DuckDBPyConnection, table: str, reason: str, among: str = "wide"
) -> None:
    # A joined row may serve several rows of the cohort: it is told once.
    rows = f"(SELECT DISTINCT {_row_of(table)} AS _row, {reason} AS reason FROM {among})"
    set_aside(db, rows, table, "reason", MADE_MISSING)


def _set_values_aside(db: duckdb.DuckDBPyConnection, judged: list[_Judged]) -> None:
    """Quarantine the values of columns in which more is given than their features hold."""
    if not judged:
        return
    given = db.execute(f"SELECT {', '.join(f'count({one.given})' for one in judged)} FROM wide")
    of_columns = given.fetchall()[0]
    held = ", ".join(f"count({identifier(one.value) if one.value else 'NULL'})" for one in judged)
    of_features = db.execute(f"SELECT {held} FROM cohort").fetchall()[0]
    for one, n, usable in zip(judged, of_columns, of_features, strict=True):
        if n > usable:
            _set_value_aside(db, one.table, one.reason)


def _row_of(table: str) -> str:
    return identifier(f"{table}._row")


def _joined(table: str) -> str:
    return identifier(f"joined_{table}")
