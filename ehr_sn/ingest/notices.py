"""What the steps of ingest find and count, for the checks to tell."""

import duckdb


def create_notices(db: duckdb.DuckDBPyConnection) -> None:
    """Make the table `notices`: what the steps of ingest find, for the checks to tell."""
    db.execute(
        """CREATE TABLE IF NOT EXISTS notices (
            check_name VARCHAR, place VARCHAR, rows BIGINT, of_rows BIGINT, message VARCHAR)"""
    )


def notice(
    db: duckdb.DuckDBPyConnection, check: str, place: str, rows: int, of_rows: int, message: str
) -> None:
    """Add a row to `notices`. The message holds no patient's value."""
    db.execute("INSERT INTO notices VALUES (?, ?, ?, ?, ?)", [check, place, rows, of_rows, message])


def count(db: duckdb.DuckDBPyConnection, query: str) -> int:
    """The single number that `query` returns."""
    (value,) = db.execute(query).fetchall()[0]
    return int(value)
