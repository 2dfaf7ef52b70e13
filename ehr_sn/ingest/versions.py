"""Rows that share a key → the one that counts; the others are left out, and told.

Exports overlap, and correct what earlier ones said. Of the versions of one key the newest counts. A
version that is there twice counts once. Where versions differ and nothing says which is newer, none
counts: nobody can say which is right. Rows without a key are left alone.
"""

from collections.abc import Sequence

import duckdb

from ehr_sn.ingest.notices import count, notice
from ehr_sn.ingest.sql import identifier

VERSION = "_version"  # column: which of the resources, or rows, of its files a row is of
OLDER, REPEATED = "older version", "repeated version"
CONTRADICTED = "contradicted key"
SHOWN = 5  # rows that a message names
LEFT_OUT = "superseded"


def settle(
    db: duckdb.DuckDBPyConnection,
    table: str,
    relation: str,
    key: Sequence[str],
    newest: Sequence[str],
    compared: Sequence[str],
    deleted: str | None = None,
) -> int:
    """Make the table `superseded` of the numbers (`_row`) of rows that do not count.

    Returns how many there are.

    Parameters
    ----------
    relation : SQL of the rows, with `_row` and `_version`
    key : the columns that tell rows apart
    newest : SQL of what is larger the newer a version is, the weightiest first
    compared : columns that say what a version says
    deleted : SQL that is true of rows, called `told`, of versions that have been deleted
    """
    keys = ", ".join(map(identifier, key))
    known = " AND ".join(f"{identifier(column)} IS NOT NULL" for column in key)
    several = f"""SELECT {keys} FROM {relation} WHERE {known} GROUP BY ALL
        HAVING count(DISTINCT {VERSION}) > 1"""
    known_age = [part for sql in newest for part in (f"({sql}) IS NOT NULL", sql)]
    age = f"row({', '.join([*known_age, '0'])})"  # NULL is older than anything
    content = f"hash(0, {', '.join(map(identifier, compared))})"
    db.execute(
        f"""CREATE OR REPLACE TEMP TABLE {LEFT_OUT} AS
        WITH versions AS (
            SELECT {keys}, {VERSION}, max({age}) AS age, list({content} ORDER BY _row) AS content
            FROM {relation} JOIN ({several}) USING ({keys}) GROUP BY ALL),
        ranked AS (
            SELECT {keys}, {VERSION}, content,
                rank() OVER (PARTITION BY {keys} ORDER BY age DESC NULLS LAST) AS place
            FROM versions),
        judged AS (
            SELECT {keys}, {VERSION}, CASE
                WHEN place > 1 THEN '{OLDER}'
                WHEN count(DISTINCT content) OVER same > 1 THEN '{CONTRADICTED}'
                WHEN row_number() OVER (same ORDER BY {VERSION}) > 1 THEN '{REPEATED}' END AS why
            FROM ranked WINDOW same AS (PARTITION BY {keys}, place))
        SELECT _row, why FROM {relation} JOIN judged USING ({keys}, {VERSION})
        WHERE why IS NOT NULL
        {f"UNION SELECT _row, 'deleted' FROM {relation} told WHERE {deleted}" if deleted else ""}"""
    )
    _tell(db, table, key, count(db, f"SELECT count(*) FROM {relation}"))
    return count(db, f"SELECT count(DISTINCT _row) FROM {LEFT_OUT}")


def _tell(db: duckdb.DuckDBPyConnection, table: str, key: Sequence[str], of_rows: int) -> None:
    named = ", ".join(key)
    said = {
        OLDER: f"older versions of rows with the same {named}: left out, for the newest counts",
        REPEATED: f"the same rows with the same {named} once more: left out",
        CONTRADICTED: f"rows with the same {named} say different things, and nothing says which is "
        "newer: all are set aside; name a column as `newest`, or give each its own key",
        "deleted": "named as deleted since: left out",
    }
    found = db.execute(
        f"""SELECT why, count(*), list(_row ORDER BY _row)[:{SHOWN}] FROM {LEFT_OUT}
        GROUP BY why ORDER BY why"""
    ).fetchall()
    for why, rows, first in found:
        places = ""
        if why == CONTRADICTED:
            more = ", …" if rows > SHOWN else ""
            places = f" (rows {', '.join(f'{row:,}' for row in first)}{more})"
        notice(db, why, table, rows, of_rows, said[why] + places)
