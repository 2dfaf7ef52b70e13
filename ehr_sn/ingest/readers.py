"""One file of a table, of whatever format → what DuckDB selects from: SQL and type of each column.

What a cell means is decided where it is used. Here, what is no text comes as a number, a date or a
time, and text comes without the blanks around it; nothing there is NULL.
"""

import csv
import glob
import gzip
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ehr_sn.config import Table
from ehr_sn.errors import DataError, disk_is_full
from ehr_sn.ingest import fhir
from ehr_sn.ingest.sql import DAY, AnyCase, identifier, literal, typed_columns

XPT_ROWS = 100_000  # read at a time
XPT_RECORD = 80  # bytes, of which every XPORT file is made
LONGEST_LINE = 2**25  # bytes of a text file, which is also how much of it is read at a time
DAMAGED = "the file is damaged, cut off, or not what its name says"
DURATION = "DURATION"  # the type of a column that can be refused only

DELIMITERS = {"csv": ",", "tsv": "\t", "psv": "|"}
_TEXT = (*DELIMITERS, "txt", "dat")
_SIGNS = (";", "\t", "|", ",")  # that a header may have where another is configured
_NOT_UTF8 = "the file is not UTF-8 text: save it so, or name its `encoding`, such as cp1252"
_CONVERT = {
    "xlsx": "a spreadsheet: save each sheet as CSV UTF-8, with dates as YYYY-MM-DD",
    "xls": "a spreadsheet: save each sheet as CSV UTF-8, with dates as YYYY-MM-DD",
    "sav": "SPSS: convert it by pyreadstat.read_sav(FILE)[0].to_parquet(…)",
    "dta": "Stata: convert it by pyreadstat.read_dta(FILE)[0].to_parquet(…)",
    "sas7bdat": "SAS: write it as SAS XPORT (.xpt)",
    "rds": "R: convert it by arrow::write_parquet(readRDS(FILE), …)",
    "json": "JSON, which is read for FHIR alone: say which resource, as in `fhir: Patient`",
    "ndjson": "JSON, which is read for FHIR alone: say which resource, as in `fhir: Patient`",
}
_SAS_EPOCH = -3653  # 1960-01-01 in days from 1970-01-01
_SAS_DATES = re.compile(
    r"(E8601|B8601|IS8601)?DA(TE)?|(DD|MM|YY)?(MMDDYY|DDMMYY|YYMMDD|YYMM|MMYY)[BCDNPS]?|DAY|DOWNAME"
    r"|JULIAN|JULDAY|MONNAME|MONTH|MONYY|NLDATE\w*|QTRR?|WEEKDAT[EX]|WEEKDAY|WORDDAT[EX]|YEAR|YYQ\w*"
)
_SAS_DATETIMES = re.compile(r"(E8601|B8601|IS8601)D[TZN]|DATETIME|DATEAMPM|DT\w+|NLDATM\w*|MDYAMPM")


@dataclass(frozen=True)
class Opened:
    """A file that can be read: what to select from, and SQL and type of each column.

    `parts` gives the relations that hold given columns, one after another. `verbatim` has the SQL
    of columns that are read otherwise where they hold no numbers. `version` is SQL for which of the
    file's things a row is of, where several rows may be of one; `numbered` files have their `_row`.
    """

    where: str
    parts: Callable[[list[str]], Iterator[str]]
    columns: list[tuple[str, str, str]]
    fault: str = DAMAGED  # where it cannot be read to its end
    verbatim: Mapping[str, str] = field(default_factory=dict)
    version: str | None = None
    numbered: bool = False
    empty: frozenset[str] = frozenset()  # columns without a single cell, of whatever type
    lines_above: int = 0  # that are not counted in what DuckDB says

    @cached_property
    def by_name(self) -> AnyCase:
        """Name, SQL and type of each column, by its name in any case."""
        return AnyCase((column[0], column) for column in self.columns)


def open_file(
    db: duckdb.DuckDBPyConnection, table: Table, path: Path, where: str, spill: Path
) -> Opened:
    """A table's file, by its ending. What has to be written otherwise first is written to `spill`.

    Raises
    ------
    DataError
        The format is unknown, or the file is not of it.
    """
    if table.fhir is not None:
        return _open_fhir(db, table.fhir, path, where)
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if table.optional and not path.stat().st_size:
        return open_nothing(db, table, where, spill)
    if kind in _TEXT or (table.delimiter is not None and kind not in ("parquet", "xpt")):
        delimiter = table.delimiter or DELIMITERS.get(kind)
        if delimiter is None:
            raise DataError(f"{where}: say what separates its cells: `delimiter`")
        return _open_text(table, path, delimiter, where, spill)
    if kind == "parquet":
        return _open_parquet(db, table, path, where)
    if kind == "xpt":
        return _open_xpt(db, table, path, where, spill.name)
    said = "not a known format"
    if kind in _CONVERT:
        said = f"a .{kind} file is {_CONVERT[kind]}"
    raise DataError(
        f"{where}: {said}; use .csv, .tsv, .psv (all also .gz), .parquet, .xpt, or .txt and .dat "
        "with a `delimiter`"
    )


def open_relation(
    db: duckdb.DuckDBPyConnection, where: str, relation: str, fault: str = DAMAGED
) -> Opened:
    """What DuckDB can select from already."""
    return of_one_part(where, relation, typed_columns(db, relation), fault)


def of_one_part(
    where: str, relation: str, columns: list[tuple[str, str, str]], fault: str = DAMAGED
) -> Opened:
    return Opened(where, lambda wanted: iter((relation,)), columns, fault)


def open_nothing(db: duckdb.DuckDBPyConnection, table: Table, where: str, spill: Path) -> Opened:
    """A table that is not there: its columns, as far as they are known, and no row."""
    if table.fhir is not None:
        nothing = spill.with_suffix(".ndjson")
        nothing.touch()
        return _open_fhir(db, table.fhir, nothing, where)
    columns = [(name, "NULL", "VARCHAR") for name in table.optional_columns]
    return Opened(where, lambda wanted: iter(()), columns)


def plain(frame: Any) -> Any:
    """A frame in which a column of mixed objects is text."""
    mixed = [name for name, dtype in frame.dtypes.items() if str(dtype) == "object"]
    return frame.astype(dict.fromkeys(mixed, "string"))


@contextmanager
def said_without_values(
    where: str, otherwise: str = DAMAGED, lines_above: int = 0
) -> Iterator[None]:
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
        number = int(line[1]) - ("Malformed JSON" in message) + lines_above if line else None
        place = f"line {number}: " if line else ""
        fault = next((said for sign, said in _FAULTS.items() if sign in message), otherwise)
        raise DataError(f"{where}: {place}{fault}") from None


_FAULTS = {
    "Maximum line size": f"longer than {LONGEST_LINE:,} bytes: leave its column of long texts "
    "out of the file",
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


def _open_fhir(db: duckdb.DuckDBPyConnection, resource: str, path: Path, where: str) -> Opened:
    if path.name.lower().removesuffix(".gz").rpartition(".")[2] not in ("ndjson", "jsonl"):
        raise DataError(f"{where}: FHIR is read from .ndjson or .jsonl (both also .gz)")
    relation = fhir.flat(literal(glob.escape(str(path))), resource)
    with said_without_values(where):
        columns = typed_columns(db, relation)
    parts = lambda wanted: iter((relation,))  # noqa: E731
    return Opened(where, parts, columns, version="line")


def _open_parquet(db: duckdb.DuckDBPyConnection, table: Table, path: Path, where: str) -> Opened:
    quoted = literal(glob.escape(str(path)))
    with said_without_values(where):
        opened = open_relation(db, where, f"read_parquet({quoted}, hive_partitioning = false)")
    try:
        file = pq.ParquetFile(path)
        schema, empty = file.schema_arrow, _without_cells(file.metadata)
    except (OSError, pa.ArrowException):
        return opened  # which DuckDB can read, and need not hold anything of Arrow's own
    durations = {column.name for column in schema if pa.types.is_duration(column.type)}
    columns = [
        (name, sql, DURATION if name in durations else kind) for name, sql, kind in opened.columns
    ]
    verbatim = {name: sql for name, sql, kind in columns if kind == "VARCHAR"}
    columns = [
        (name, _number_of(sql, sql, table) if name in verbatim else sql, kind)
        for name, sql, kind in columns
    ]
    return Opened(where, opened.parts, columns, verbatim=verbatim, empty=empty)


def _without_cells(metadata: pq.FileMetaData) -> frozenset[str]:
    """The columns of which Parquet's statistics say that every cell is missing."""
    rows, missing = metadata.num_rows, Counter[str]()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.statistics is not None and column.statistics.has_null_count:
                missing[column.path_in_schema] += column.statistics.null_count
    return frozenset(name for name, n in missing.items() if n == rows)


def _open_text(table: Table, path: Path, delimiter: str, where: str, spill: Path) -> Opened:
    if table.encoding is not None or table.skip_rows:
        path = _as_utf8(path, table.encoding or "utf-8-sig", where, spill, table.skip_rows)
    header = _header(path, delimiter, where, table.skip_rows)
    # Nothing is left to DuckDB's sniffer: it skips lines at the top that look unlike the rest, and
    # a damaged file would lose patients without a word.
    columns = {f"c{i}": "VARCHAR" for i in range(len(header))}
    file = literal(glob.escape(str(path)))
    relation = (
        f"read_csv({file}, auto_detect = false, columns = {columns}, header = true, "
        f"delim = {literal(delimiter)}, quote = '\"', escape = '\"', "
        f"max_line_size = {LONGEST_LINE}, buffer_size = {LONGEST_LINE})"
    )
    cells = {name: f"nullif(trim(c{i}), '')" for i, name in enumerate(header)}
    columns_of_text = [
        (name, _number_of(f"trim(c{i})", cells[name], table), "VARCHAR")
        for i, name in enumerate(header)
    ]
    opened = of_one_part(where, relation, columns_of_text)
    return Opened(where, opened.parts, columns_of_text, verbatim=cells, lines_above=table.skip_rows)


def _number_of(trimmed: str, cell: str, table: Table) -> str:
    """SQL for a cell: where it is a number by the table's own signs, as SQL writes it.

    A number that had a comma gets an exponent, as `is_plain_number` wants it.
    """
    signs = "[ \u00a0\u202f]" if table.thousands == " " else f"[{table.thousands}]"
    decimal, together = re.escape(table.decimal), _quoted(signs)
    grouped = rf"\d{{1,3}}({signs}\d{{3}})+" if table.thousands else ""
    whole = rf"(\d+|{grouped})" if grouped else r"\d+"
    fraction = rf"{decimal}\d+"
    if table.decimal == ".":
        if not grouped:
            return cell
        number = rf"[+-]?{grouped}({fraction})?"
        return f"""CASE WHEN regexp_full_match({trimmed}, '{_quoted(number)}')
            THEN regexp_replace({trimmed}, '{together}', '', 'g') ELSE {cell} END"""
    with_comma = (
        rf"[+-]?((?:{whole})?{fraction}|{whole}{decimal}|{grouped or whole})([eE][+-]?\d+)?"
    )
    bare = f"regexp_replace({trimmed}, '{together}', '', 'g')" if grouped else trimmed
    point = f"lower(replace({bare}, ',', '.'))"
    exponent = rf"regexp_replace({point}, 'e([+-]?)(\d+)$', 'e\1 00\2')"
    signed = f"replace(replace(replace({exponent}, 'e 00', 'e+00'), '+ 00', '+00'), '- 00', '-00')"
    return f"""CASE WHEN regexp_full_match({trimmed}, '{_quoted(with_comma)}')
        THEN CASE WHEN NOT contains({trimmed}, ',') THEN {point}
            WHEN contains({point}, 'e') THEN {signed} ELSE {point} || 'e+00' END
        ELSE {cell} END"""


def _quoted(pattern: str) -> str:
    return pattern.replace("'", "''")


def _as_utf8(path: Path, encoding: str, where: str, spill: Path, skip: int) -> Path:
    """A copy in UTF-8, without the lines above the header, to be read as any other file."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with (
            opened(path, "rt", encoding=encoding, newline="") as file,
            spill.open("w", encoding="utf-8", newline="") as copy,
        ):
            for _ in range(skip):
                file.readline()
            shutil.copyfileobj(file, copy, 1 << 20)
    except UnicodeError:
        said = _NOT_UTF8 if encoding == "utf-8-sig" else f"the file is not {encoding} text"
        raise DataError(f"{where}: {said}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{where}: {DAMAGED}") from None
    return spill


def _header(path: Path, delimiter: str, where: str, skip: int) -> list[str]:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    line = skip + 1
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file, delimiter=delimiter, strict=True), [])
    except csv.Error:
        raise DataError(f"{where}: line {line}: {_FAULTS['invalid state']}") from None
    except UnicodeDecodeError:
        raise DataError(f"{where}: {_NOT_UTF8}") from None
    except (OSError, EOFError, zlib.error):
        raise DataError(f"{where}: {DAMAGED}") from None
    if not header:
        lines = (
            "its first line is" if not skip else f"line {line}, which is to name the columns, is"
        )
        raise DataError(f"{where}: the file is empty, or {lines}")
    if len(header) == 1 and (sign := next((s for s in _SIGNS if s in header[0]), None)):
        raise DataError(
            f"{where}: line {line} is one cell, with {sign!r} in it: is that the `delimiter`?"
        )
    return [name.strip() for name in header]


def _open_xpt(
    db: duckdb.DuckDBPyConnection, table: Table, path: Path, where: str, name: str
) -> Opened:
    """SAS XPORT. Not by pandas, which reads a stored 0 as 5.4e-79.

    Dates are converted here: pyreadstat stops at those after the year 9999, which SAS can write.
    """
    try:
        import pyreadstat
    except ImportError:
        raise DataError(
            f"{where}: needs the package pyreadstat: pip install 'ehr-sn[xpt]'"
        ) from None

    def read(encoding: str | None, **options: Any) -> Any:
        try:
            return pyreadstat.read_xport(
                str(path), encoding=encoding, disable_datetime_conversion=True, **options
            )
        except (pyreadstat.ReadstatError, pyreadstat.PyreadstatError):
            raise DataError(f"{where}: {DAMAGED}") from None

    if path.stat().st_size % XPT_RECORD:
        raise DataError(f"{where}: {DAMAGED}")
    encoding, of_labels = table.encoding, False
    try:
        first, meta = read(encoding, row_limit=1)
    except UnicodeDecodeError:
        # Windows' encoding reads every file; it matters only where text that is used is not ASCII.
        encoding, of_labels = "cp1252", True
        first, meta = read(encoding, row_limit=1)
    formats = {column: kind or "" for column, kind in meta.original_variable_types.items()}

    def frame_of(frame: Any) -> Any:
        if of_labels and not all(map(_is_ascii, _texts(frame))):
            raise DataError(f"{where}: {_NOT_UTF8}")
        return plain(frame.assign(**_sas_times(frame, formats)))

    def parts(columns: list[str]) -> Iterator[str]:
        relation, start = f"xpt_{name}", 0
        while True:
            try:
                frame, _ = read(encoding, usecols=columns, row_offset=start, row_limit=XPT_ROWS)
            except UnicodeDecodeError:
                raise DataError(f"{where}: {_NOT_UTF8}") from None
            db.register(relation, frame_of(frame))
            yield identifier(relation)
            db.unregister(relation)
            start += len(frame)
            if len(frame) < XPT_ROWS:
                return

    db.register(f"xpt_{name}", plain(first.assign(**_sas_times(first, formats))))
    columns = [
        (column, f"TRY_CAST({sql} AS DATE)", "DATE")
        if _is_sas(_SAS_DATES, formats[column])
        else (column, sql, kind)
        for column, sql, kind in typed_columns(db, identifier(f"xpt_{name}"))
    ]
    db.unregister(f"xpt_{name}")
    return Opened(where, parts, columns)


def _is_sas(formats: re.Pattern[str], written: str) -> bool:
    """Whether a variable's format, without its width, is one of these."""
    return formats.fullmatch(re.sub(r"[\d.]*$", "", written.upper())) is not None


def _sas_times(frame: Any, formats: Mapping[str, str]) -> dict[str, Any]:
    """SAS counts days, or seconds, from 1960: as microseconds from 1970, as far as they go."""
    times = {}
    for column in frame.columns:
        unit = None
        if _is_sas(_SAS_DATES, formats[column]):
            unit = DAY
        elif _is_sas(_SAS_DATETIMES, formats[column]):
            unit = 1e6
        if unit is not None and frame[column].dtype == float:
            counted = frame[column].to_numpy() * unit + _SAS_EPOCH * DAY
            known = ~np.isnan(counted)
            stamps = np.full(len(counted), np.datetime64("NaT"), dtype="datetime64[us]")
            stamps[known] = (
                np.clip(counted[known], -9e18, 9e18).astype("int64").astype(stamps.dtype)
            )
            times[column] = stamps
    return times


def _texts(frame: Any) -> Iterator[str]:
    for column in frame.columns:
        if frame[column].dtype not in (float, "datetime64[us]"):
            yield from frame[column].dropna().astype(str)


def _is_ascii(text: str) -> bool:
    return text.isascii()
