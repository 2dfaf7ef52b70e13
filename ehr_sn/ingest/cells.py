"""What a cell means: a subject, a time, a number; and why one is set aside.

One rule decides what happens to a bad cell. A bad key (subject, time, code) sets the row aside. A
bad value (text, not finite, implausible) becomes missing and the row stays. Either way the
quarantine names table, row number and reason, never the value.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType

import duckdb

from ehr_sn.config import Clock, Config, Range
from ehr_sn.ingest.notices import count
from ehr_sn.ingest.requirements import REASONS, Requirement, require
from ehr_sn.ingest.sql import (
    AnyCase,
    as_text,
    id_text,
    identifier,
    is_integer,
    literal,
    literals,
    number,
    source,
    stands_for_nobody,
    trimmed,
)

SET_ASIDE = "row set aside"
MADE_MISSING = "value made missing"
EXACTLY = ("=", "==", "eq", "EQ", "0", "4172703")  # the last is OMOP's concept of =, 0 that of none
NUMBER_FAULTS = ("not a number", "not finite", "a bound", "signs between", "a decimal")
LARGEST = 1e18  # beyond it no measurement lies, and a slope per year may leave float32


def types_of(db: duckdb.DuckDBPyConnection, table: str) -> Mapping[str, str]:
    """DuckDB's type of each column of a loaded table."""
    described = db.execute(f"DESCRIBE {source(table)}").fetchall()
    return AnyCase((name, dtype) for name, dtype, *_ in described)


def subject_type_of(db: duckdb.DuckDBPyConnection, config: Config) -> str:
    """BIGINT where every subject of the cohort is a whole number, as MEDS has it, else VARCHAR.

    One of several shards was told, for it sees its own subjects only.
    """
    told = db.execute("SELECT getvariable('subject_type')").fetchall()[0][0]
    if told is not None:
        return str(told)
    table, subject = config.cohort.table, config.cohort.subject_id
    types = types_of(db, table)
    others = count(db, f"SELECT count(*) FROM {source(table)} WHERE {is_no_number(subject, types)}")
    return "VARCHAR" if others else "BIGINT"


def is_no_number(column: str, types: Mapping[str, str] = MappingProxyType({})) -> str:
    """SQL that is true of a subject who has an id that is no whole number."""
    text, number = (as_subject(column, kind, types) for kind in ("VARCHAR", "BIGINT"))
    return f"{text} IS NOT NULL AND {number} IS NULL"


def as_subject(
    column: str, subject_type: str, types: Mapping[str, str] = MappingProxyType({})
) -> str:
    """SQL for a subject as it is compared: as written, or as a whole number; NULL for nobody.

    7 and 7.0 (as tables with gaps hold whole numbers) are the same; 007 and 7.6, which a plain cast
    would also take for numbers, are none. NA, NULL and the like stand for a missing id.
    """
    dtype = types.get(column, "VARCHAR")
    if is_integer(dtype):
        return f"TRY_CAST({identifier(column)} AS {subject_type})"
    written = as_text(identifier(column), dtype)
    if subject_type == "VARCHAR":
        return id_text(written)
    as_number = r"TRY_CAST(regexp_extract({}, '^(0|-?[1-9]\d*)(\.0+)?$', 1) AS BIGINT)"
    if dtype != "VARCHAR":
        return as_number.format(written)
    return f"coalesce({as_number.format(written)}, {as_number.format(trimmed(written))})"


def is_given_subject(column: str, types: Mapping[str, str]) -> str:
    """SQL that is true of an id which stands for somebody."""
    if types.get(column, "VARCHAR") != "VARCHAR":
        return is_given(column)
    return f"{is_given(column)} AND NOT {stands_for_nobody(identifier(column))}"


def as_code(cell: str, dtype: str) -> str:
    """SQL for a code as it is compared: without blanks around it; 201826 also where it is 201826.0.

    No coding system writes .0 behind four digits, and tables with gaps do; 428.0 is ICD-9's.
    """
    text = f"nullif({trimmed(as_text(cell, dtype))}, '')"
    if dtype != "VARCHAR":
        return text
    return rf"regexp_replace({text}, '^([1-9]\d{{3,}})\.0+$', '\1')"


def is_bound(comparator: str, dtype: str) -> str:
    """SQL that is true of a sign, or of an OMOP operator concept, which makes a value a bound."""
    sign = rf"regexp_replace({as_code(comparator, dtype)}, '^(\d+)\.0+$', '\1')"
    return f"coalesce({sign} NOT IN ({literals(EXACTLY)}), FALSE)"


def create_quarantine(db: duckdb.DuckDBPyConnection) -> None:
    """Make the table `quarantine`."""
    db.execute(
        """CREATE TABLE quarantine (
            table_name VARCHAR, row_number BIGINT, reason VARCHAR, action VARCHAR)"""
    )


def set_aside(
    db: duckdb.DuckDBPyConnection, judged: str, table: str, reason: str, action: str
) -> None:
    """Put the rows of `judged` that have a reason into the quarantine."""
    db.execute(
        f"""INSERT INTO quarantine SELECT {literal(table)}, _row, {reason}, {literal(action)}
        FROM {judged} WHERE {reason} IS NOT NULL"""
    )


def is_given(column: str | float | datetime | None) -> str:
    if column is None:
        return "FALSE"
    return f"{identifier(column)} IS NOT NULL" if isinstance(column, str) else "TRUE"


def value_reason_of(value: str, column: str | None, implausible: str, decimal: str = ".") -> str:
    """SQL for why a value is unusable, or NULL. A value that is not given has no reason.

    `implausible` holds further branches, tried in their order; `decimal` is the table's sign.
    """
    kinds = "\n".join(
        f"WHEN regexp_full_match({value}::VARCHAR, {literal(pattern)}) "
        f"THEN {literal(f'{column}: {why}')}"
        for why, pattern in _not_quite_numbers(decimal).items()
    )
    endless = literal(f"{column}: not finite, or beyond {LARGEST:g}")
    return f"""CASE
        WHEN {value} IS NULL THEN NULL
        WHEN {_is_text(value, decimal)} THEN CASE {kinds}
            ELSE {literal(f"{column}: not a number")} END
        WHEN abs({number(value, decimal)}) > {LARGEST!r} THEN {endless}
        {implausible} END"""


def _is_text(value: str, decimal: str = ".") -> str:
    """SQL that is true of a value that is no number; NaN, which means missing, is one."""
    return (
        f"TRY_CAST({'_number' if decimal == '.' else '_comma_number'}({value}) AS DOUBLE) IS NULL"
    )


def _not_quite_numbers(decimal: str) -> dict[str, str]:
    """What text may be in the place of a number, each with its pattern."""
    point, comma = (r"\.", ",") if decimal == "." else (",", r"\.")
    other = {
        ".": {'a decimal comma: declare `decimal: ","`': r"[+-]?\d*,\d+"},
        ",": {"a decimal point, where `decimal` is a comma": r"[+-]?\d*\.\d+"},
    }
    return {
        "a bound, which is no value": r"[<>≤≥=~]+ ?[+-]?\d.*",
        "signs between thousands: declare `thousands`": rf"[+-]?\d{{1,3}}({comma}\d{{3}})+"
        rf"({point}\d+)?",
        **other[decimal],
    }


def implausible(
    value: str, quantity: Range, name: str, of: str = "TRUE", decimal: str = "."
) -> str:
    """A branch of `value_reason_of` for the rows where the condition `of` holds."""
    if quantity.plausible is None:
        return ""
    low, high = quantity.plausible
    reason = literal(f"{name}: outside the plausible range {low:g} to {high:g}")
    return (
        f"WHEN {of} AND {number(value, decimal)} NOT BETWEEN {low!r} AND {high!r} THEN {reason}\n"
    )


def plausible(quantity: Range) -> tuple[float, float]:
    """Between which values, both included, `value_reason_of` and `implausible` have no reason."""
    low, high = quantity.plausible or (-LARGEST, LARGEST)
    return max(low, -LARGEST), min(high, LARGEST)


def require_some_number(
    db: duckdb.DuckDBPyConnection,
    table: str,
    columns: Sequence[tuple[str, str]],
    decimal: str = ".",
) -> None:
    """Refuse columns in which every value is text, with what the text looks like.

    `columns` holds where the configuration names a column, and its name.

    Raises
    ------
    DataError
        Naming each: it is the wrong column, or numbers are written otherwise than the table says.
    """
    if not columns:
        return
    counted = ", ".join(
        f"count({value}), count(*) FILTER ({value} IS NOT NULL AND {_is_text(value, decimal)})"
        for value in (identifier(column) for _, column in columns)
    )
    counts = db.execute(f"SELECT {counted} FROM {source(table)}").fetchall()[0]
    requirements = []
    for (where, column), given, texts in zip(columns, counts[::2], counts[1::2], strict=True):
        message = (
            f"{where}: column {column!r} of table {table} holds text in all of its $given "
            f"filled rows, where numbers belong ({REASONS})"
        )
        requirements.append(
            Requirement(
                message,
                {"given": given, "numbers": given - texts},
                needed=("numbers",),
                unless_none="given",
                reasons=_looks(db, table, column, decimal) if given == texts else {},
            )
        )
    require(db, requirements)


def _looks(db: duckdb.DuckDBPyConnection, table: str, column: str, decimal: str) -> dict[str, int]:
    """What the texts of a column look like, and how many do."""
    patterns, value = _not_quite_numbers(decimal), identifier(column)
    alike = ", ".join(
        f"count(*) FILTER (regexp_full_match({value}::VARCHAR, {literal(pattern)}))"
        for pattern in patterns.values()
    )
    texts, *looks = db.execute(f"SELECT count({value}), {alike} FROM {source(table)}").fetchall()[0]
    reasons = {f"hold {why}": n for why, n in zip(patterns, looks, strict=True)}
    return reasons | {"hold other text: is it the right column?": texts - sum(looks)}


def require_usable(
    db: duckdb.DuckDBPyConnection, where: str, table: str, rows: int, clock: Clock | None = None
) -> None:
    """Refuse a table of which no row is usable, with the reasons and how often each occurs."""
    message = f"{where}: no row of table {table} is usable ({REASONS})"
    if clock is not None and clock.unit == "timestamp" and clock.format is None:
        message += "; times that are not ISO 8601 need their `format` in `clock`"
    reasons = {} if rows else _reasons(db, table)
    require(db, [Requirement(message, {"rows": rows}, needed=("rows",), reasons=reasons)])


def _reasons(db: duckdb.DuckDBPyConnection, table: str) -> dict[str, int]:
    """Why rows of a table were set aside or left out, and how many for each reason."""
    reasons = db.execute(
        """SELECT reason, count(*) FROM quarantine WHERE table_name = $1 AND action = $2 GROUP BY 1
        UNION ALL SELECT message, sum(rows)::BIGINT FROM notices
        WHERE place = $1 AND check_name = 'left out' GROUP BY 1""",
        [table, SET_ASIDE],
    ).fetchall()
    return {f"rows: {reason}": n for reason, n in reasons}


def quarantine_counts(db: duckdb.DuckDBPyConnection) -> list[tuple[str, str, str, int]]:
    """Count the quarantined rows by table, reason and action."""
    return db.execute(
        "SELECT table_name, reason, action, count(*) FROM quarantine GROUP BY ALL"
    ).fetchall()
