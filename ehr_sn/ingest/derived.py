"""A query and the columns it reads → SQL of its rows and columns, tried on empty tables."""

import re
from collections.abc import Container

import duckdb

from ehr_sn.errors import DataError, did_you_mean
from ehr_sn.ingest.functions import create_functions
from ehr_sn.ingest.queries import Query
from ehr_sn.ingest.sql import identifier, source, typed_columns

_UNKNOWN_COLUMN = (
    r'Referenced column "(.+?)" not found',
    r'does not have a column named "(.+?)"',
    r'Column "(.+?)" does not exist on',
)


def rehearse(
    where: str,
    query: Query,
    read: dict[str, list[tuple[str, str]]],
    every: list[str],
    time_zone: str | None = None,
    with_comma: Container[str] = (),
) -> tuple[str, list[tuple[str, str, str]]]:
    """What to select from for the query's rows, and name, SQL and type of each of its columns.

    `read` holds, by table, name and type of each column that the query may read; `every` the
    names of all columns of these tables. The query is run here on empty tables, in a DuckDB of its
    own that has no access to files or the network: what it finds there is among the loaded tables.

    Raises
    ------
    DataError
        DuckDB does not take it: says why, with the nearest column's name.
    """
    named = ", ".join(
        f"{identifier(table)} AS NOT MATERIALIZED "
        f"(SELECT {', '.join(identifier(name) for name, _ in has) or 'NULL'} "
        f"FROM {source(table)})"
        for table, has in read.items()
    )
    tables = f"WITH {named} " if named else ""
    # In one order, whatever the number of threads.
    relation = f"({tables}SELECT * FROM (\n{query.lenient(with_comma)}\n) ORDER BY ALL)"
    with duckdb.connect(config={"enable_external_access": "false"}) as db:
        db.execute("SET python_enable_replacements = false")
        create_functions(db, time_zone)
        db.execute("CREATE SCHEMA source")
        for table, has in read.items():
            typed = "".join(f", {identifier(name)} {dtype}" for name, dtype in has)
            db.execute(f"CREATE TABLE {source(table)} (_row BIGINT{typed})")
        try:
            columns = typed_columns(db, relation)
        except duckdb.Error as error:
            said = str(error).splitlines()[0].partition(": ")[2].rstrip("!")
            raise DataError(f"{where}: {said}{_hint(said, every)}") from None
    return relation, columns


def _hint(said: str, every: list[str]) -> str:
    """The nearest column, where one is unknown; never all: a file may lack its header."""
    for pattern in _UNKNOWN_COLUMN:
        if unknown := re.search(pattern, said):
            return f"; {did_you_mean(unknown[1], every, list_all=False)}"
    return ""
