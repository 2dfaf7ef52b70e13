"""Tables in databases → copies of the columns that are used, as sorted Parquet files.

A database says nothing of the order of its rows, so they are sorted by all columns: the same
content always gives the same file, the same row numbers and the same SHA-256. All tables of a
database are read in one transaction, so that they fit each other.
"""

import hashlib
import json
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol
from urllib.parse import quote

import duckdb
import pyarrow as pa

from ehr_sn.config import Config, Database, Fetched, Table
from ehr_sn.errors import DataError, did_you_mean, disk_is_full
from ehr_sn.ingest.folders import hidden_folder
from ehr_sn.ingest.sql import identifier, literal, typed_columns
from ehr_sn.ingest.tables import columns_used, connect

WAITS = (1, 4, 16)  # seconds before each new attempt, after a connection was lost
BATCH_ROWS = 50_000  # of SQLite, read at a time
LOCKED_AFTER = 5  # seconds that SQLite waits for a writer

_DECIMAL_DIGITS = 38  # that DuckDB's DECIMAL holds


class _Table(NamedTuple):
    """A table in a database: how its SQL and how people name it, and its columns.

    Each column has SQL, in the database's own dialect, and DuckDB's type for what that gives.
    """

    relation: str
    name: str
    columns: dict[str, tuple[str, str]]


class _Reader(Protocol):
    """An open database, as it is at one moment."""

    kind: str

    def names(self) -> dict[str, tuple[str, str]]:
        """Schema and table, by each name that a configuration may give them."""

    def table(self, schema: str, name: str) -> _Table: ...

    def rows(self, table: _Table, columns: list[str]) -> str | Iterator[pa.RecordBatch]:
        """The rows: what to select from in DuckDB, or batches."""


class _LostConnectionError(Exception):
    """The server cannot be reached just now; another attempt may succeed."""


@contextmanager
def fetched(config: Config, beside: Path | None) -> Iterator[Config]:
    """The configuration, and with it copies of its databases' tables for as long as this lasts.

    The copies lie in a hidden folder in `beside`, or where the system keeps temporary files. Those
    that a killed process left in `beside` are removed.

    Raises
    ------
    DataError
        A database cannot be opened or read, or has no such table. Nobody's credentials are in the
        message, and no server's name.
    """
    if not any(table.database for table in config.tables.values()):
        yield config
        return
    with hidden_folder(beside) as folder:
        copies = _attempt(lambda: _fetch(config, folder))
        yield config.with_fetched(copies)


@contextmanager
def fetched_headers(config: Config) -> Iterator[Config]:
    """Yield the configuration with its databases' tables as copies without rows, if they exist."""
    if not any(table.database for table in config.tables.values()):
        yield config
        return

    def describe() -> dict[str, Fetched]:
        with _readers(config, Path(folder)) as (db, readers):
            there = {
                name: readers[str(table.database)]
                for name, table in _in_databases(config).items()
                if (table.table or name) in readers[str(table.database)].names()
            }
            return _headers(db, config, Path(folder), there)[1]

    with tempfile.TemporaryDirectory(prefix="ehr-sn-") as folder:
        yield config.with_fetched(_attempt(describe))


def _attempt(read: Callable[[], dict[str, Fetched]]) -> dict[str, Fetched]:
    """Again, and again later, where a connection is lost."""
    for wait in WAITS:
        try:
            return read()
        except _LostConnectionError:
            time.sleep(wait)
    try:
        return read()
    except _LostConnectionError as lost:
        raise DataError(f"{lost}, after {len(WAITS) + 1} attempts") from None


def _in_databases(config: Config) -> dict[str, Table]:
    return {name: table for name, table in config.tables.items() if table.database is not None}


@contextmanager
def _readers(
    config: Config, folder: Path
) -> Iterator[tuple[duckdb.DuckDBPyConnection, dict[str, _Reader]]]:
    """Every database that a table lies in, opened."""
    with ExitStack() as stack:
        db = stack.enter_context(connect(folder / "spill"))
        used = dict.fromkeys(str(table.database) for table in _in_databases(config).values())
        yield db, {name: stack.enter_context(_open(db, config, name)) for name in used}


def _headers(
    db: duckdb.DuckDBPyConnection, config: Config, folder: Path, readers: dict[str, _Reader]
) -> tuple[dict[str, _Table], dict[str, Fetched]]:
    """Return each table as its reader has it, and a copy of it without rows."""
    tables, copies = {}, {}
    for name, reader in readers.items():
        tables[name] = _find(config, name, reader)
        header = folder / f"{name}.header.parquet"
        _write(db, tables[name], list(tables[name].columns), iter(()), header)
        copies[name] = Fetched(header, "", "", 0)
    return tables, copies


def _fetch(config: Config, folder: Path) -> dict[str, Fetched]:
    wanted = _in_databases(config)
    with _readers(config, folder) as (db, readers):
        its_own = {name: readers[str(entry.database)] for name, entry in wanted.items()}
        tables, copies = _headers(db, config, folder, its_own)
        used = columns_used(db, config.with_fetched(copies))
        for name, entry in wanted.items():
            reader, table = its_own[name], tables[name]
            columns = used[name] or list(table.columns)[:1]  # of an unused table, rows are counted
            path = folder / f"{name}.parquet"
            try:
                _write(db, table, columns, reader.rows(table, columns), path)
            except duckdb.OutOfMemoryException:
                raise  # not the database's fault
            except duckdb.Error as error:
                if disk_is_full(error):
                    raise
                raise DataError(
                    f"{config.where(f'tables.{name}')}: {table.name} cannot be read to its end "
                    f"({type(error).__name__}; the message may quote values)"
                ) from None
            copies[name] = Fetched(
                path, f"{reader.kind}:{entry.database}/{table.name}", *_digest(db, path)
            )
    return copies


def _find(config: Config, name: str, reader: _Reader) -> _Table:
    wanted, names = config.tables[name].table or name, reader.names()
    if wanted not in names:
        alike = [name for name in names if name.lower() == wanted.lower()]
        wanted = alike[0] if len(alike) == 1 else wanted
    if wanted not in names:
        key = f"tables.{name}.table" if config.tables[name].table else f"tables.{name}"
        hint = did_you_mean(wanted, names)
        raise DataError(
            f"{config.where(key)}: database {config.tables[name].database} has no table "
            f"{wanted!r}; {hint}"
        )
    return reader.table(*names[wanted])


def _write(
    db: duckdb.DuckDBPyConnection,
    table: _Table,
    columns: list[str],
    rows: str | Iterator[pa.RecordBatch],
    path: Path,
) -> None:
    """Write rows, in the order of all their columns, as numbers, timestamps and texts."""
    relation = rows if isinstance(rows, str) else "fetched_rows"
    if not isinstance(rows, str):
        types = {name: table.columns[name][1] for name in columns}
        typed = ", ".join(f"{identifier(name)} {dtype}" for name, dtype in types.items())
        db.execute(f"CREATE OR REPLACE TABLE fetched_rows ({typed})")
        cast = ", ".join(f"{identifier(name)}::{dtype}" for name, dtype in types.items())
        for batch in rows:
            db.register("fetched_batch", pa.Table.from_batches([batch]).rename_columns(columns))
            db.execute(f"INSERT INTO fetched_rows SELECT {cast} FROM fetched_batch")
            db.unregister("fetched_batch")
    selected = ", ".join(
        f"{sql} AS {identifier(name)}" for name, sql, _ in typed_columns(db, relation)
    )
    db.execute(
        f"""COPY (SELECT {selected} FROM {relation} ORDER BY ALL)
        TO {literal(str(path))} (FORMAT parquet)"""
    )
    db.execute("DROP TABLE IF EXISTS fetched_rows")


def _digest(db: duckdb.DuckDBPyConnection, path: Path) -> tuple[str, int]:
    """SHA-256 and length of a file's content: its columns and types, then each row, as JSON."""
    file = f"read_parquet({literal(str(path))})"
    columns = db.execute(f"DESCRIBE SELECT * FROM {file}").fetchall()
    head = json.dumps([[name, dtype] for name, dtype, *_ in columns]) + "\n"
    cells = ", ".join(f"{identifier(name)}::VARCHAR" for name, *_ in columns)
    hashed, size = hashlib.sha256(head.encode()), len(head.encode())
    query = f"SELECT json_array({cells})::VARCHAR || chr(10) AS line FROM {file}"
    for batch in db.cursor().sql(query).to_arrow_reader():
        lines = "".join(batch.column(0).to_pylist()).encode()
        hashed.update(lines)
        size += len(lines)
    return hashed.hexdigest(), size


def _open(db: duckdb.DuckDBPyConnection, config: Config, name: str) -> AbstractContextManager[Any]:
    database, where = config.databases[name], config.where(f"databases.{name}")
    if database.path is None:
        return _open_postgres(_url(config, database, where), where)
    path = config.resolve(database.path)
    if not path.is_file():
        near = did_you_mean(
            path.name, (p.name for p in path.parent.glob("*") if p.is_file()), list_all=False
        )
        raise DataError(f"{where}: no file {path}; {near}")
    with path.open("rb") as file:
        start = file.read(16)
    if start == b"SQLite format 3\0":
        return _open_sqlite(path, f"{where}: {path}")
    if start[8:12] == b"DUCK":
        return _open_duckdb(db, path, f"{where}: {path}", f"database_{name}")
    raise DataError(f"{where}: {path}: is neither a DuckDB nor a SQLite database")


def _url(config: Config, database: Database, where: str) -> str:
    if database.url_env is not None:
        url = os.environ.get(database.url_env, "")
        place = f"the environment variable {database.url_env}"
    else:
        path = config.resolve(str(database.url_file))
        place = f"the file {path}"
        try:
            url = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise DataError(f"{where}: {place} cannot be read") from None
    url = url.strip()
    if not url:
        raise DataError(f"{where}: {place} is empty or not set: it is to hold the database's URL")
    if not url.startswith(("postgresql://", "postgres://")):
        raise DataError(f"{where}: {place} holds no URL that begins with postgresql://")
    return url


# -- DuckDB --------------------------------------------------------------------------------------


@contextmanager
def _open_duckdb(
    db: duckdb.DuckDBPyConnection, path: Path, where: str, alias: str
) -> Iterator[_Reader]:
    attached = identifier(alias)
    try:
        db.execute(f"ATTACH {literal(str(path))} AS {attached} (READ_ONLY)")
    except duckdb.Error as error:
        if "lock" in str(error):
            raise DataError(
                f"{where}: another process has it open for writing: close that first, or give a "
                "copy"
            ) from None
        raise DataError(
            f"{where}: is damaged, encrypted, or of a version that DuckDB "
            f"{duckdb.__version__} does not read"
        ) from None
    try:
        yield _DuckDB(db, alias, where)
    finally:
        db.execute(f"DETACH {attached}")


class _DuckDB:
    kind = "duckdb"

    def __init__(self, db: duckdb.DuckDBPyConnection, alias: str, where: str):
        self._db, self._alias, self._where = db, alias, where

    def names(self) -> dict[str, tuple[str, str]]:
        found = self._db.execute(
            """SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = $1
            UNION ALL SELECT schema_name, view_name FROM duckdb_views()
            WHERE database_name = $1 AND NOT internal""",
            [self._alias],
        ).fetchall()
        return {f"{schema}.{name}": (schema, name) for schema, name in found} | {
            name: (schema, name) for schema, name in found if schema == "main"
        }

    def table(self, schema: str, name: str) -> _Table:
        relation = ".".join(map(identifier, (self._alias, schema, name)))
        try:
            found = typed_columns(self._db, relation)
        except duckdb.Error:
            raise DataError(
                f"{self._where}: the view {schema}.{name} cannot be read from outside the file: "
                "name the schema of each table in it"
            ) from None
        columns = {
            # Parquet has no integers so large.
            column: (f"{sql}::VARCHAR", "VARCHAR") if "HUGE" in dtype else (sql, dtype)
            for column, sql, dtype in found
        }
        return _Table(relation, f"{schema}.{name}", columns)

    def rows(self, table: _Table, columns: list[str]) -> str:
        selected = ", ".join(f"{table.columns[name][0]} AS {identifier(name)}" for name in columns)
        return f"(SELECT {selected} FROM {table.relation})"


# -- SQLite --------------------------------------------------------------------------------------


@contextmanager
def _open_sqlite(path: Path, where: str) -> Iterator[_Reader]:
    with (
        _sqlite_faults(where),
        closing(
            sqlite3.connect(
                f"file:{quote(str(path))}?mode=ro",
                uri=True,
                isolation_level=None,
                timeout=LOCKED_AFTER,
            )
        ) as connection,
    ):
        connection.execute("BEGIN")
        yield _SQLite(connection, where)


@contextmanager
def _sqlite_faults(where: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        said = "cannot be read: is it damaged?"
        if "locked" in str(error):
            said = "another program is writing to it: wait until it has finished, or give a copy"
        elif "decode" in str(error):
            said = "holds text that is not UTF-8"
        raise DataError(f"{where}: {said}") from None


class _SQLite:
    """What a cell holds is asked of each cell, not of the column's declaration."""

    kind = "sqlite"
    _TYPES: ClassVar = {"integer": "BIGINT", "real": "DOUBLE", "text": "VARCHAR"}
    _ARROW: ClassVar = {"BIGINT": pa.int64(), "DOUBLE": pa.float64(), "VARCHAR": pa.string()}

    def __init__(self, connection: sqlite3.Connection, where: str):
        self._connection, self._where = connection, where

    def names(self) -> dict[str, tuple[str, str]]:
        found = self._connection.execute(
            "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')"
        ).fetchall()
        return {written: ("main", name) for (name,) in found for written in (name, f"main.{name}")}

    def table(self, schema: str, name: str) -> _Table:
        relation = f"{identifier(schema)}.{identifier(name)}"
        described = self._connection.execute(f"SELECT * FROM {relation} LIMIT 0").description
        names = [column for column, *_ in described]
        held = ", ".join(f"group_concat(DISTINCT typeof({identifier(name)}))" for name in names)
        row = self._connection.execute(f"SELECT {held} FROM {relation}").fetchone()
        columns = {}
        for column, kinds in zip(names, row, strict=True):
            types = set((kinds or "null").split(",")) - {"null"}
            one = self._TYPES.get(next(iter(types))) if len(types) == 1 else "VARCHAR"
            columns[column] = (identifier(column), "BLOB" if "blob" in types else str(one))
        return _Table(relation, name, columns)

    def rows(self, table: _Table, columns: list[str]) -> Iterator[pa.RecordBatch]:
        types = [table.columns[name][1] for name in columns]
        for name, dtype in zip(columns, types, strict=True):
            if dtype == "BLOB":
                raise DataError(
                    f"{self._where}: column {name!r} of table {table.name} holds binary data"
                )
        selected = ", ".join(table.columns[name][0] for name in columns)
        query = f"SELECT {selected} FROM {table.relation}"
        # A cursor that stays open would keep its lock after the connection is closed.
        with closing(self._connection.execute(query)) as cursor:
            while rows := cursor.fetchmany(BATCH_ROWS):
                arrays = [
                    pa.array(map(_text, cells) if dtype == "VARCHAR" else cells, self._ARROW[dtype])
                    for cells, dtype in zip(zip(*rows, strict=True), types, strict=True)
                ]
                yield pa.RecordBatch.from_arrays(arrays, names=columns)


def _text(cell: str | float | None) -> str | None:
    return cell if cell is None or isinstance(cell, str) else repr(cell)


# -- PostgreSQL ----------------------------------------------------------------------------------


@contextmanager
def _open_postgres(url: str, where: str) -> Iterator[_Reader]:
    try:
        from adbc_driver_postgresql import dbapi
    except ImportError:
        raise DataError(
            f"{where}: needs the package adbc-driver-postgresql: pip install 'ehr-sn[postgres]'"
        ) from None
    with ExitStack() as stack:
        with _postgres_faults(where):
            connection = stack.enter_context(closing(dbapi.connect(url, autocommit=True)))
            cursor = stack.enter_context(closing(connection.cursor()))
            cursor.execute("SET client_encoding TO 'UTF8'")
            cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        yield _Postgres(cursor, where)


@contextmanager
def _postgres_faults(where: str) -> Iterator[None]:
    """Say what is wrong in own words: libpq names the server, its user and cells."""
    from adbc_driver_postgresql import dbapi

    try:
        yield
    except (dbapi.Error, OSError, pa.ArrowException) as error:
        state = getattr(error, "sqlstate", None) or ""
        said = _STATES.get(state)
        if not state:
            said = next((said for sign, said in _LIBPQ.items() if sign in str(error)), None)
        if said is None and (not state or state.startswith(_PASSING)):
            raise _LostConnectionError(
                f"{where}: the server cannot be reached, or the connection was lost"
            ) from None
        raise DataError(f"{where}: {said or f'PostgreSQL stops with SQLSTATE {state}'}") from None


_PASSING = ("08", "57P", "53300", "40001", "25P03")
_STATES = {
    "42501": "this user may not read the table: GRANT SELECT on it",
    "57014": "the server cancelled the query: is its statement_timeout too short?",
    "22P05": "holds text that is not UTF-8",
    "22021": "holds text that is not UTF-8",
}
_LIBPQ = {
    "authentication failed": "the server refuses the user or the password",
    "no password supplied": "the server wants a password, and the URL has none",
    "pg_hba.conf": "the server does not admit this user from here",
    'database "': "the server has no such database, or does not admit to it",
    'role "': "the server refuses the user or the password",
    "invalid port": "the URL is not written as PostgreSQL wants it",
    "invalid integer": "the URL is not written as PostgreSQL wants it",
    "invalid connection option": "the URL is not written as PostgreSQL wants it",
    "invalid URI": "the URL is not written as PostgreSQL wants it",
    'missing "="': "the URL is not written as PostgreSQL wants it",
}


class _Postgres:
    kind = "postgresql"

    def __init__(self, cursor: Any, where: str):
        self._cursor, self._where = cursor, where

    def names(self) -> dict[str, tuple[str, str]]:
        found = self._query(
            """SELECT n.nspname::text, c.relname::text, pg_table_is_visible(c.oid)
            FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relkind IN ('r', 'v', 'm', 'p', 'f')
                AND n.nspname NOT IN ('pg_catalog', 'information_schema')"""
        )
        return {f"{schema}.{name}": (schema, name) for schema, name, _ in found} | {
            name: (schema, name) for schema, name, visible in found if visible
        }

    def table(self, schema: str, name: str) -> _Table:
        relation = f"{identifier(schema)}.{identifier(name)}"
        columns = self._query(
            f"""SELECT attname::text, format_type(atttypid, atttypmod) FROM pg_attribute
            WHERE attrelid = {literal(relation)}::regclass AND attnum > 0 AND NOT attisdropped
            ORDER BY attnum"""
        )
        typed = {column: _from_postgres(identifier(column), dtype) for column, dtype in columns}
        return _Table(relation, f"{schema}.{name}", typed)

    def rows(self, table: _Table, columns: list[str]) -> Iterator[pa.RecordBatch]:
        selected = ", ".join(table.columns[name][0] for name in columns)
        with _postgres_faults(f"{self._where}: {table.name}"):
            self._cursor.execute(f"SELECT {selected} FROM {table.relation}")
            reader = self._cursor.fetch_record_batch()
        while True:
            with _postgres_faults(f"{self._where}: {table.name}"):
                batch = next(reader, None)
            if batch is None:
                return
            yield batch

    def _query(self, sql: str) -> list[Any]:
        with _postgres_faults(self._where):
            self._cursor.execute(sql)
            rows: list[Any] = self._cursor.fetchall()
        return rows


def _from_postgres(column: str, dtype: str) -> tuple[str, str]:
    """SQL that gives a column without loss, and DuckDB's type for it."""
    plain = {
        "smallint": "SMALLINT",
        "integer": "INTEGER",
        "bigint": "BIGINT",
        "boolean": "BOOLEAN",
        "real": "FLOAT",
        "double precision": "DOUBLE",
    }
    if dtype in plain:
        return column, plain[dtype]
    if dtype == "date" or dtype.startswith("timestamp"):
        # Infinity, which Arrow cannot say, becomes the first moment that is no usable time.
        return (
            f"CASE WHEN {column} > '9999-12-31 23:59:59.999999' THEN '10000-01-01' "
            f"WHEN {column} < '0001-01-01' THEN '0001-12-31 BC' ELSE {column} END",
            "DATE"
            if dtype == "date"
            else "TIMESTAMPTZ"
            if dtype.endswith("with time zone")
            else "TIMESTAMP",
        )
    if dtype.startswith("numeric"):
        exact = f"nullif({column}, 'NaN')::text"
        limits = re.fullmatch(r"numeric\((\d+),(\d+)\)", dtype)
        if limits and int(limits[2]) <= int(limits[1]) <= _DECIMAL_DIGITS:
            return exact, f"DECIMAL({limits[1]},{limits[2]})"
        return exact, "VARCHAR"
    return f"{column}::text", "VARCHAR"
