"""Tables → shards of subjects → each shard's part of the store, and its counts.

What fits in one shard is read into memory and made at once. A larger data set is dealt to disk
first, by a hash of the subject, and each shard is then a task of its own: on any thread, process or
machine that sees the folder. How many shards there are depends on the rows alone. All work lies in
one folder, where an interrupted ingest finds what is finished:

- `plan.json`: how many shards, and what had to be known of the whole before
- `landed/whole/TABLE/`: all rows in one Parquet file, of a table without a subject, which shards
  share, of the result of a query, and of what that reads; `table.json` counts them
- `landed/dealt/TABLE/`: a table's rows, one Parquet file a shard, counted likewise
- `shards/SHARD.json`: written last of a shard: its counts, and the SHA-256 of its files
- `store/`: the store's files, each written beside its final name
"""

import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ehr_sn.config import Config
from ehr_sn.errors import DataError
from ehr_sn.ingest.cells import as_subject, is_no_number
from ehr_sn.ingest.checks import FeatureStatistics, Suspects, count_all, find_suspects
from ehr_sn.ingest.cohort import stage_labels, stage_splits
from ehr_sn.ingest.events import require_events, stage_events
from ehr_sn.ingest.features import feature_blocks, list_features
from ehr_sn.ingest.requirements import keep_requirements, kept
from ehr_sn.ingest.sql import identifier, is_integer, literal, source
from ehr_sn.ingest.tables import OpenedTable, connect, load_tables, opened_tables, sha256
from ehr_sn.ingest.versions import LEFT_OUT
from ehr_sn.ingest.wide import stage_cohort

SHARD_ROWS = 2**21  # of all tables with a subject together
SHARD_MEMORY = "1GB"  # of DuckDB; beyond it a shard spills
BATCH_ROWS = 2**19  # dealt at a time
GROUP_ROWS = 2**14  # at least so many in a row group of what is dealt, but the last
KEYS = ("subject_id", "prediction_time")

TABLES = ("values", "mask", "labels", "splits", "quarantine")  # the store's, in parts by shard
FOLLOW_UP = "follow_up"  # one more, where the rows of some label are weighted
CODE_TABLES = ("coding_counts", "code_counts", "code_sets")  # that the checks need of every shard


@dataclass(frozen=True)
class Work:
    """The folder in which a store is made. With `writes` false, only counts are.

    `also` is called once for each shard when its cohort, events, labels and splits are staged.
    `build` makes something else of a shard's tables than a part of a store: from DuckDB with the
    tables in the schema `source`, the configuration, this, the shard's number and a scratch folder.
    Tables in `may_be_empty` may hold no row.
    """

    folder: Path
    writes: bool = True
    also: Callable[[duckdb.DuckDBPyConnection, int], None] | None = None
    build: "Callable[[duckdb.DuckDBPyConnection, Config, Work, int, Path], None] | None" = None
    may_be_empty: tuple[str, ...] = ()

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @cached_property
    def plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = json.loads((self.folder / "plan.json").read_text())
        return plan

    @property
    def shards(self) -> range:
        return range(self.plan["shards"])

    @property
    def unfinished(self) -> list[int]:
        """The shards that are still to be built, the first of which goes before all others."""
        return [shard for shard in self.shards if not self.counted(shard).exists()]

    def counted(self, shard: int) -> Path:
        return self.folder / "shards" / f"{shard:05}.json"

    def codes(self, table: str, shard: int) -> Path:
        return self.folder / "shards" / table / f"{shard:05}.parquet"

    def landed(self, table: str, whole: bool) -> Path:
        return self.folder / "landed" / ("whole" if whole else "dealt") / table

    def landed_counts(self) -> list[tuple[str, dict[str, Any]]]:
        """Return each landed table's name, its rows and what was noticed while reading it."""
        told = sorted((self.folder / "landed").glob("*/*/table.json"))
        return [(path.parent.name, json.loads(path.read_text())) for path in told]

    def part(self, table: str, shard: int) -> Path:
        """Where a shard's part of one of the store's tables lies below `store`."""
        if len(self.shards) == 1:
            return Path(f"{table}.parquet")
        return Path(table) / f"part-{shard:05}.parquet"

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for one task, gone when it ends."""
        (self.folder / "scratch").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder / "scratch") as folder:
            yield Path(folder)


def prepare(config: Config, work: Work, shard_rows: int | None = None) -> None:
    """Read all tables: build the only shard, or deal them to several, of `shard_rows` rows each.

    Raises
    ------
    DataError
        The tables cannot be used as configured.
    """
    shard_rows = SHARD_ROWS if shard_rows is None else shard_rows
    plan = work.folder / "plan.json"
    if plan.exists() and work.plan["versions"] != _versions():
        shutil.rmtree(work.folder / "landed", ignore_errors=True)
        shutil.rmtree(work.folder / "shards", ignore_errors=True)
        plan.unlink()
        vars(work).pop("plan", None)
    with work.scratch() as scratch, no_values_in_errors(config):
        if not plan.exists():
            with connect(scratch / "spill", time_zone=config.clock.time_zone) as db:
                rows = load_tables(db, config, shard_rows, work.may_be_empty)
                if rows is not None:
                    write_json(plan, {"shards": 1, "rows": rows, "versions": _versions()})
                    (work.build or _build)(db, config, work, 0, scratch)
                    return
        with (
            connect(scratch / "spill", time_zone=config.clock.time_zone) as db,
            opened_tables(db, config, work.may_be_empty) as opened,
        ):
            whole = _needed_whole(config)
            tables = [
                _land_whole(db, config, work, table, scratch) if table.name in whole else table
                for table in opened
            ]
            if not plan.exists():
                write_json(plan, _plan(config, tables, shard_rows))
            if len(work.shards) > 1:
                for table in tables:
                    dealt = _subject_of(config, table.name) is not None
                    if dealt and not work.landed(table.name, whole=False).exists():
                        _land(db, config, work, table, scratch)
                return
        if work.unfinished:
            with connect(scratch / "spill", time_zone=config.clock.time_zone) as db:
                load_tables(db, config, None, work.may_be_empty)
                (work.build or _build)(db, config, work, 0, scratch)


def build_shard(config: Config, work: Work, shard: int) -> None:
    """Make one shard's part of the store, unless it is made. The first goes before all others.

    The first shard runs alone, on all cores; the others share them, one each.

    Raises
    ------
    DataError
        DuckDB stops at a value.
    """
    if work.counted(shard).exists():
        return
    with (
        work.scratch() as scratch,
        no_values_in_errors(config),
        connect(scratch / "spill", SHARD_MEMORY, config.clock.time_zone) as db,
    ):
        if shard:
            db.execute("SET threads = 1")
        db.execute(f"SET VARIABLE subject_type = {literal(work.plan['subject_type'])}")
        keep_requirements(db)
        db.execute("CREATE SCHEMA source")
        for table in config.tables:
            whole = _subject_of(config, table) is None
            file = work.landed(table, whole) / ("all" if whole else f"{shard:05}")
            db.execute(f"CREATE VIEW {source(table)} AS FROM {_parquet(file)}")
        (work.build or _build)(db, config, work, shard, scratch)


def build_in_threads(config: Config, work: Work) -> None:
    """Build the unfinished shards in threads of this process."""
    if work.unfinished[:1] == [0]:
        build_shard(config, work, 0)
    with ThreadPoolExecutor(config.runner.workers or os.cpu_count()) as pool:
        building = [pool.submit(build_shard, config, work, shard) for shard in work.unfinished]
        try:
            for built in building:
                built.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _build(
    db: duckdb.DuckDBPyConnection, config: Config, work: Work, shard: int, scratch: Path
) -> None:
    """Build the shard's part of the store and its counts from the tables in `source`."""
    cohort = stage_cohort(db, config)
    event_rows = stage_events(db, config)
    require_events(db, config)
    db.execute("DROP SCHEMA source CASCADE")
    attrition = stage_labels(db, config)
    stage_splits(db, config)
    if work.also:
        work.also(db, shard)
    features = list_features(config)
    if shard:
        first = json.loads(work.counted(0).read_text())["suspects"]
        suspects = Suspects(**{name: tuple(map(tuple, found)) for name, found in first.items()})
    else:
        suspects = find_suspects(db, config, features)
    statistics = FeatureStatistics.of(len(features))
    names = [feature.name for feature in features]
    with closing(_MatrixWriter(db, scratch, names)) if work.writes else nullcontext() as writer:
        for block in feature_blocks(db, config):
            statistics.add(block)
            if writer:
                writer.write(block)
    if work.writes:
        _write_tables(db, config, scratch)
    counts = count_all(db, config, statistics, suspects)
    for table in CODE_TABLES:
        file = literal(str(scratch / f"{table}.parquet"))
        db.execute(f"COPY {table} TO {file} (FORMAT parquet)")
    files = {}
    for table in _tables(config) if work.writes else ():
        part = work.part(table, shard)
        files[part.as_posix()] = sha256(scratch / f"{table}.parquet")
        (work.store / part).parent.mkdir(parents=True, exist_ok=True)
        (scratch / f"{table}.parquet").replace(work.store / part)
    for table in CODE_TABLES:
        work.codes(table, shard).parent.mkdir(parents=True, exist_ok=True)
        (scratch / f"{table}.parquet").replace(work.codes(table, shard))
    told = {
        "cohort": cohort,
        "attrition": attrition,
        "event_rows": event_rows,
        "counts": counts.as_dict(),
        "suspects": asdict(suspects),
        "requirements": kept(db),
        "files": files,
    }
    write_json(work.counted(shard), told)


def _plan(config: Config, tables: list[OpenedTable], shard_rows: int) -> dict[str, Any]:
    """How many shards, by the rows of all tables that have a subject."""
    rows = {table.name: table.tally() for table in tables}
    dealt = sum(n for name, n in rows.items() if _subject_of(config, name))
    shards = -(-dealt // shard_rows)
    if any(len(config.subject_columns(name)) > 1 for name in rows):
        shards = 1  # a row cannot be dealt by two subjects
    cohort = next(table for table in tables if table.name == config.cohort.table)
    return {
        "shards": max(shards, 1),
        "subject_type": subject_type(config, cohort),
        "rows": rows,
        "versions": _versions(),
    }


def subject_type(config: Config, cohort: OpenedTable) -> str:
    """Return the type of subjects in the cohort's table before it is loaded."""
    subject = config.cohort.subject_id
    if cohort.counts_as_subjects or is_integer(cohort.columns[subject]):
        return "BIGINT"
    others = cohort.tally(lambda name: is_no_number(name, cohort.columns), subject)
    return "VARCHAR" if others else "BIGINT"


def _subject_of(config: Config, table: str) -> str | None:
    """The column that holds a table's subject; None of a table that all shards share."""
    return next(iter(config.subject_columns(table)), None)


def _needed_whole(config: Config) -> set[str]:
    """Tables that all shards share, queries, what these read, and tables with a key."""
    keyed = {name for name, table in config.tables.items() if table.told_apart_by}
    queries = {name for name, table in config.tables.items() if table.query is not None}
    shared = {name for name in config.tables if _subject_of(config, name) is None}
    return keyed | queries | shared | {read for name in queries for read in config.reads(name)}


def _land_whole(
    db: duckdb.DuckDBPyConnection, config: Config, work: Work, table: OpenedTable, scratch: Path
) -> OpenedTable:
    """Write a table's rows to one Parquet file, if need be, and make it the view `source.TABLE`."""
    folder = work.landed(table.name, whole=True)
    if not folder.exists():
        _land_as(db, table, ["all"], "0", folder, scratch)
    landed = table.in_source()
    typed = "".join(f", {identifier(c)}::{t} AS {identifier(c)}" for c, t in landed.held.items())
    db.execute(
        f"CREATE VIEW {source(table.name)} AS SELECT _row {typed} FROM {_parquet(folder / 'all')}"
    )
    return landed


def _land(
    db: duckdb.DuckDBPyConnection, config: Config, work: Work, table: OpenedTable, scratch: Path
) -> None:
    """Deal a table's rows to one Parquet file a shard."""
    subject = str(_subject_of(config, table.name))
    names = [f"{shard:05}" for shard in work.shards]
    compared = as_subject(subject, work.plan["subject_type"], table.columns)
    # By the hash's range: the subjects of least hash, whom the checks sample, come first.
    place = f"(hash({compared}) >> 32) * {len(names)} >> 32"
    key = f"CASE WHEN {compared} IS NULL THEN 0 ELSE {place} END"
    _land_as(db, table, names, key, work.landed(table.name, whole=False), scratch)


def _land_as(
    db: duckdb.DuckDBPyConnection,
    table: OpenedTable,
    names: list[str],
    key: str,
    target: Path,
    scratch: Path,
) -> None:
    """Write a table's rows to files, by the SQL `key` of a file's place."""
    folder = scratch / table.name
    folder.mkdir()
    with closing(_Dealer([folder / f"{name}.parquet" for name in names])) as dealer:

        def deal(query: str) -> int:
            keyed = db.sql(f"SELECT *, ({key})::USMALLINT AS shard FROM ({query})")
            return dealer.take(keyed.to_arrow_reader(BATCH_ROWS))

        rows = table.read(deal)
    whole = folder / "all"
    if names == [whole.name] and table.settle(_parquet(whole)):
        kept = folder / "kept.parquet"
        rest = f"SELECT * FROM {_parquet(whole)} WHERE _row NOT IN (SELECT _row FROM {LEFT_OUT})"
        db.execute(f"COPY ({rest}) TO {literal(str(kept))} (FORMAT parquet)")
        kept.replace(whole.with_suffix(".parquet"))
    noticed = db.execute("SELECT * FROM notices WHERE place = ?", [table.name]).fetchall()
    write_json(folder / "table.json", {"rows": rows, "notices": noticed})
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.replace(target)


def _parquet(file: Path) -> str:
    """SQL for the rows of a file, named without its ending."""
    return f"read_parquet({literal(glob.escape(f'{file}.parquet'))})"


class _Dealer:
    """Writes the rows of batches to files, by the batches' last column."""

    def __init__(self, paths: list[Path]):
        self._paths = paths
        self._writers: list[pq.ParquetWriter] = []
        self._pending: list[list[pa.Table]] = [[] for _ in paths]
        self._pool = ThreadPoolExecutor(1)  # sorts while DuckDB reads on, and writes in order

    def take(self, batches: Iterable[pa.RecordBatch]) -> int:
        rows = 0
        dealing: Future[None] | None = None
        for batch in batches:
            rows += batch.num_rows
            if dealing:
                dealing.result()
            dealing = self._pool.submit(self._deal, batch)
        if dealing:
            dealing.result()
        return rows

    def close(self) -> None:
        self._pool.shutdown()
        for shard, writer in enumerate(self._writers):
            self._flush(shard)
            writer.close()

    def _deal(self, batch: pa.RecordBatch) -> None:
        table = pa.Table.from_batches([batch])
        shard = table.column("shard").to_numpy()
        table = table.drop_columns("shard")
        if not self._writers:
            self._writers = [_dealt_writer(path, table.schema) for path in self._paths]
        if len(self._paths) > 1:
            table = table.take(pa.array(np.argsort(shard, kind="stable")))
        stops = np.cumsum(np.bincount(shard, minlength=len(self._paths)))
        for place, (start, stop) in enumerate(pairwise([0, *stops])):
            self._pending[place].append(table.slice(start, stop - start))
            if sum(part.num_rows for part in self._pending[place]) >= GROUP_ROWS:
                self._flush(place)

    def _flush(self, shard: int) -> None:
        if self._pending[shard]:
            table = pa.concat_tables(self._pending[shard])
            self._writers[shard].write_table(table, row_group_size=max(table.num_rows, 1))
            self._pending[shard] = []


def _dealt_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """What is written once and read once: whole numbers and times by their differences, text by
    lists and compressed, real numbers as they are."""
    text = [field.name for field in schema if pa.types.is_string(field.type)]
    whole = [
        field.name
        for field in schema
        if pa.types.is_integer(field.type)
        or pa.types.is_timestamp(field.type)
        or pa.types.is_date(field.type)
    ]
    return pq.ParquetWriter(
        path,
        schema,
        compression={name: "lz4" if name in text else "none" for name in schema.names},
        use_dictionary=text,
        column_encoding=dict.fromkeys(whole, "DELTA_BINARY_PACKED"),
        write_statistics=False,
    )


class _MatrixWriter:
    """Writes blocks of the feature matrix to `values.parquet` and `mask.parquet`."""

    def __init__(self, db: duckdb.DuckDBPyConnection, folder: Path, names: list[str]):
        self._db, self._names, self._row = db, names, 0
        keys = db.sql(f"SELECT {', '.join(KEYS)} FROM cohort LIMIT 0").to_arrow_table().schema
        # Of real numbers few are equal, but their exponents are: so split by byte, not listed.
        encoded = {"use_dictionary": False, "use_byte_stream_split": names, "compression": "zstd"}
        self._writers = {
            kind: pq.ParquetWriter(
                folder / f"{kind}.parquet",
                pa.schema([*keys, *(pa.field(name, dtype) for name in names)]),
                **options,
            )
            for kind, dtype, options in (
                ("values", pa.float32(), encoded),
                ("mask", pa.bool_(), {}),
            )
        }

    def write(self, block: np.ndarray) -> None:
        stop = self._row + len(block)
        keys = self._db.sql(
            f"""SELECT {", ".join(KEYS)} FROM cohort
            WHERE row >= {self._row} AND row < {stop} ORDER BY row"""
        ).to_arrow_table()
        for kind, writer in self._writers.items():
            columns = [
                pa.array(column, from_pandas=True)
                if kind == "values"
                else pa.array(~np.isnan(column))
                for column in block.T
            ]
            writer.write_table(
                pa.table([*keys.columns, *columns], schema=writer.schema), row_group_size=len(block)
            )
        self._row = stop

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def _tables(config: Config) -> tuple[str, ...]:
    """The tables of this configuration's store."""
    return (*TABLES, FOLLOW_UP) if config.weighted_labels else TABLES


def _write_tables(db: duckdb.DuckDBPyConnection, config: Config, folder: Path) -> None:
    queries = {
        table: f"SELECT {', '.join(KEYS)}, {', '.join(map(identifier, diseases))} "
        f"FROM {table} JOIN cohort USING (row) ORDER BY row"
        for table, diseases in (("labels", config.labels), (FOLLOW_UP, config.weighted_labels))
        if diseases
    } | {
        "splits": "SELECT * FROM splits ORDER BY subject_id",
        "quarantine": "SELECT * FROM quarantine ORDER BY ALL",
    }
    for name, query in queries.items():
        target = literal(str(folder / f"{name}.parquet"))
        db.execute(f"COPY ({query}) TO {target} (FORMAT parquet)")


def write_json(path: Path, content: Any) -> None:
    """Beside its final name, then renamed."""
    partial = path.with_name(f".{path.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        partial.write_text(json.dumps(content))
        partial.replace(path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("ehr-sn", "duckdb", "pyarrow")}


@contextmanager
def no_values_in_errors(config: Config) -> Iterator[None]:
    """Hide the message of DuckDB's errors about values, which it quotes: a patient's, maybe."""
    try:
        yield
    except (duckdb.DataError, duckdb.InvalidInputException) as error:
        raise DataError(
            f"{config.where('tables')}: DuckDB stops at a value it cannot take; its message is "
            f"left out, for it may quote a patient's data ({type(error).__name__}). Please report "
            "this with the types of your tables' columns"
        ) from None
