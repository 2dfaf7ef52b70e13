"""What a cell means: a subject, a time, a number; and why one is set aside.

One rule decides what happens to a bad cell. A bad key (subject, time, code) sets the row aside. A
bad value (text, not finite, implausible) becomes missing and the row stays. Either way the
quarantine names table, row number and reason, never the value.
"""

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType

import duckdb

from ehr_sn.config import Config, Range
from ehr_sn.ingest.requirements import REASONS, Requirement, require
from ehr_sn.ingest.sql import identifier, literal, number, source
from ehr_sn.ingest.tables import count

SET_ASIDE = "row set aside"
MADE_MISSING = "value made missing"
LARGEST = 1e18  # beyond it no measurement lies, and a slope per year may leave float32


def types_of(db: duckdb.DuckDBPyConnection, table: str) -> dict[str, str]:
    """DuckDB's type of each column of a loaded table."""
    return {name: dtype for name, dtype, *_ in db.execute(f"DESCRIBE {source(table)}").fetchall()}


def subject_type_of(db: duckdb.DuckDBPyConnection, config: Config) -> str:
    """BIGINT where every subject of the cohort is a whole number, as MEDS has it, else VARCHAR.

    One of several shards was told, for it sees its own subjects only.
    """
    told = db.execute("SELECT getvariable('subject_type')").fetchall()[0][0]
    if told is not None:
        return str(told)
    subject = identifier(config.cohort.subject_id)
    others = count(
        db,
        f"""SELECT count(*) FROM {source(config.cohort.table)}
        WHERE {subject} IS NOT NULL AND {as_subject(config.cohort.subject_id, "BIGINT")} IS NULL""",
    )
    return "VARCHAR" if others else "BIGINT"


def as_subject(
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


def value_reason_of(value: str, column: str | None, implausible: str) -> str:
    """SQL for why a value is unusable, or NULL. A value that is not given has no reason.

    `implausible` holds further branches, tried in their order.
    """
    text = literal(f"{column}: not a number")
    endless = literal(f"{column}: not finite, or beyond {LARGEST:g}")
    return f"""CASE
        WHEN {value} IS NULL THEN NULL
        WHEN TRY_CAST({value} AS DOUBLE) IS NULL THEN {text}
        WHEN abs({number(value)}) > {LARGEST!r} THEN {endless}
        {implausible} END"""


def implausible(value: str, quantity: Range, name: str, of: str = "TRUE") -> str:
    """A branch of `_value_reason` for the rows where the condition `of` holds."""
    if quantity.plausible is None:
        return ""
    low, high = quantity.plausible
    reason = literal(f"{name}: outside the plausible range {low:g} to {high:g}")
    return f"WHEN {of} AND {number(value)} NOT BETWEEN {low!r} AND {high!r} THEN {reason}\n"


def plausible(quantity: Range) -> tuple[float, float]:
    """Between which values, both included, `value_reason_of` and `implausible` have no reason."""
    low, high = quantity.plausible or (-LARGEST, LARGEST)
    return max(low, -LARGEST), min(high, LARGEST)


def require_some_number(db: duckdb.DuckDBPyConnection, where: str, table: str, column: str) -> None:
    value = identifier(column)
    given, numbers = db.execute(
        f"SELECT count({value}), count(TRY_CAST({value} AS DOUBLE)) FROM {source(table)}"
    ).fetchall()[0]
    message = (
        f"{where}: column {column!r} of table {table} holds text in all of its $given "
        "filled rows, where numbers belong: is it the right column? Decimal commas need "
        '`decimal: ","`'
    )
    counts = {"given": given, "numbers": numbers}
    require(db, [Requirement(message, counts, needed=("numbers",), unless_none="given")])


def require_usable(db: duckdb.DuckDBPyConnection, where: str, table: str, rows: int) -> None:
    """Refuse a table of which no row is usable, with the reasons and how often each occurs."""
    message = f"{where}: no row of table {table} is usable ({REASONS})"
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
    """Of each table, reason and action, the rows."""
    return db.execute(
        "SELECT table_name, reason, action, count(*) FROM quarantine GROUP BY ALL"
    ).fetchall()
