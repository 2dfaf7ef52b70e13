"""One table of one row a subject → shards of consecutive rows, each built while the next is read.

Nothing is sorted or dealt to disk, and only a few shards are in memory at a time. Subjects that
are in the table more than once, whom one row alone cannot judge, make the last shard together.
"""

import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ehr_sn.config import Config
from ehr_sn.ingest.cells import as_subject
from ehr_sn.ingest.requirements import keep_requirements
from ehr_sn.ingest.shards import (
    SHARD_MEMORY,
    SHARD_ROWS,
    Work,
    no_values_in_errors,
    subject_type,
    write_json,
)
from ehr_sn.ingest.sql import literal, source
from ehr_sn.ingest.tables import OpenedTable, connect, opened_tables

CHUNK_ROWS = 2**17  # in a shard of consecutive rows
HASHES_AT_ONCE = 2**21  # eight bytes each


def build_in_order(config: Config, work: Work, chunk_rows: int | None = None) -> bool:
    """Build the shards of a single, large table; false where the tables are not like that.

    The plan's `in_order` is how many of the shards are of consecutive rows.

    Raises
    ------
    DataError
        The table cannot be used as configured.
    """
    chunk_rows = CHUNK_ROWS if chunk_rows is None else chunk_rows
    tables = list(config.tables.values())
    if config.events or len(tables) > 1 or tables[0].query or tables[0].told_apart_by:
        return False
    with (
        work.scratch() as scratch,
        no_values_in_errors(config),
        connect(scratch / "spill", SHARD_MEMORY, config.clock.time_zone) as db,
        opened_tables(db, config) as (table,),
    ):
        db.execute("SET enable_external_file_cache = false")  # the file is read once
        rows = table.tally()
        if rows <= chunk_rows:
            return False
        stream = _Stream.of(db, config, table, rows)
        if len(stream.several) > SHARD_ROWS:
            return False
        in_order = -(-rows // chunk_rows)
        plan = {
            "shards": in_order + bool(len(stream.several)),
            "in_order": in_order,
            "subject_type": stream.subject_type,
            "rows": {table.name: rows},
        }
        write_json(work.folder / "plan.json", plan)
        stream.build_chunks(work, chunk_rows)
        if len(work.shards) > in_order and not work.counted(in_order).exists():
            stream.build_several(work, in_order)
    return True


class _FailedError(Exception):
    """A shard cannot be built: not the fault of the file that is being read meanwhile."""

    def __init__(self, shard: Future[None]):
        super().__init__()
        self.shard = shard


@dataclass(frozen=True)
class _Stream:
    """The table, and hashes of the subjects that are in it more than once."""

    db: duckdb.DuckDBPyConnection
    config: Config
    table: OpenedTable
    subject_type: str
    several: NDArray[np.uint64]

    @classmethod
    def of(
        cls, db: duckdb.DuckDBPyConnection, config: Config, table: OpenedTable, rows: int
    ) -> "_Stream":
        kind = subject_type(config, table)
        hashed = f"hash({as_subject(config.cohort.subject_id, kind, table.columns)})"
        parts = 1 + rows // HASHES_AT_ONCE
        several = []
        for part in range(parts):
            hashes: list[NDArray[np.uint64]] = []

            def collect(query: str, part: int = part, into: list = hashes) -> int:
                found = db.sql(f"SELECT {hashed} AS h FROM ({query}) WHERE h % {parts} = {part}")
                into.append(found.fetchnumpy()["h"])
                return 1  # there may be none of this part

            table.read(collect)
            together = np.concatenate(hashes)
            together.sort()
            several.append(np.unique(together[1:][together[1:] == together[:-1]]))
        return cls(db, config, table, kind, np.concatenate(several))

    def build_chunks(self, work: Work, chunk_rows: int) -> None:
        """Every shard of consecutive rows, side by side, while the table is read."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            building: set[Future[None]] = set()
            pending: list[pa.Table] = []
            shard = 0

            def build(chunk: pa.Table) -> None:
                nonlocal shard, building
                if not work.counted(shard).exists():
                    if len(building) > (os.cpu_count() or 1):
                        done, building = wait(building, return_when=FIRST_COMPLETED)
                        if failed := next((one for one in done if one.exception()), None):
                            raise _FailedError(failed)
                    building.add(pool.submit(self._build_chunk, work, shard, chunk))
                shard += 1

            def take(query: str) -> int:
                nonlocal pending
                rows = 0
                for batch in self.db.sql(query).to_arrow_reader(chunk_rows):
                    rows += batch.num_rows
                    pending.append(pa.Table.from_batches([batch]))
                    while sum(map(len, pending)) >= chunk_rows:
                        together = pa.concat_tables(pending)
                        build(together.slice(0, chunk_rows))
                        pending = [together.slice(chunk_rows)]
                return rows

            try:
                self.table.read(take)
                if rest := [part for part in pending if len(part)]:
                    build(pa.concat_tables(rest))
                for one in building:
                    one.result()
            except _FailedError as error:
                pool.shutdown(cancel_futures=True)
                error.shard.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def build_several(self, work: Work, shard: int) -> None:
        """The shard of the subjects that are in the table more than once."""
        with self._shard_of(work) as (db, scratch):
            chunks: list[pa.Table] = []

            def take(query: str) -> int:
                self.db.register("several", pa.table({"subject": self.several}))
                found = self.db.sql(f"FROM ({query}) WHERE {self._of_several}").to_arrow_table()
                chunks.append(found)
                return int(self.db.sql(f"SELECT count(*) FROM ({query})").fetchall()[0][0])

            self.table.read(take)
            db.register("chunk", pa.concat_tables(chunks))
            db.execute(f"CREATE TABLE {source(self.table.name)} AS FROM chunk")
            self._build(db, work, shard, scratch)

    def _build_chunk(self, work: Work, shard: int, chunk: pa.Table) -> None:
        with self._shard_of(work) as (db, scratch):
            db.execute("SET threads = 1")
            db.register("chunk", chunk)
            where = ""
            if len(self.several):
                db.register("several", pa.table({"subject": self.several}))
                where = f"WHERE NOT coalesce({self._of_several}, FALSE)"
            db.execute(f"CREATE VIEW {source(self.table.name)} AS FROM chunk {where}")
            self._build(db, work, shard, scratch)

    def _build(self, db: duckdb.DuckDBPyConnection, work: Work, shard: int, scratch: Path) -> None:
        assert work.build
        work.build(db, self.config, work, shard, scratch)

    @property
    def _of_several(self) -> str:
        subject = as_subject(self.config.cohort.subject_id, self.subject_type, self.table.columns)
        return f"hash({subject}) IN (SELECT subject FROM several)"

    @contextmanager
    def _shard_of(self, work: Work) -> Iterator[tuple[duckdb.DuckDBPyConnection, Path]]:
        with (
            work.scratch() as scratch,
            no_values_in_errors(self.config),
            connect(scratch / "spill", SHARD_MEMORY, self.config.clock.time_zone) as db,
        ):
            db.execute(f"SET VARIABLE subject_type = {literal(self.subject_type)}")
            keep_requirements(db)
            db.execute("CREATE SCHEMA source")
            yield db, scratch
