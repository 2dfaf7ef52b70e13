"""Configuration → Parquet store of values, masks, labels and splits; and reading it back.

A store is a folder `<data dir>/<dataset>/<fingerprint>/`. It is made in a hidden folder beside it
and renamed when whole, so a reader sees all of it or nothing. The fingerprint is a hash of the
source files and of the configuration's ingest part: the same input is never ingested twice, and a
changed one is never mistaken for the old. An ingest that was killed goes on where it stopped.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, reduce
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ehr_sn.config import Config, digest
from ehr_sn.errors import DataError, DiskError
from ehr_sn.ingest.checks import Counts, code_subjects, common_codes, find_all
from ehr_sn.ingest.databases import fetched
from ehr_sn.ingest.features import list_features
from ehr_sn.ingest.folders import clear_abandoned, disk_errors
from ehr_sn.ingest.follow_up import estimate_risks
from ehr_sn.ingest.requirements import require_of_all
from ehr_sn.ingest.shards import CODE_TABLES, Work, build_in_threads, prepare
from ehr_sn.ingest.sql import literal
from ehr_sn.ingest.tables import Source, connect, describe_sources

FORMAT = 6  # raised whenever the same input would give another store

CENSORING = {
    "ipcw": "a label is unknown where the subject left, alive and without a record, before its "
    "window ended; the others are weighted by the inverse of the probability of still being "
    "followed",
    "complete": "a label is unknown where follow-up ended, and the subject had not died, before "
    "its window ended",
    "drop": "a label is unknown where follow-up ended before its window did and nothing was "
    "recorded in it: the labelled rows overstate the risk",
}
ELSEWHERE = "put the store elsewhere with data_dir"
ABANDONED = 24 * 3600  # seconds after which another ingest's unfinished work is cleared away


def check(
    config: Config,
    shard_rows: int | None = None,
    also: Callable[[duckdb.DuckDBPyConnection, int], None] | None = None,
) -> dict[str, Any]:
    """Read and check everything that ingest would, and write nothing.

    Returns what the store's manifest would say. `also` is called with DuckDB and the shard's
    number for each shard, when its cohort, events, labels and splits are staged.
    """
    with (
        tempfile.TemporaryDirectory(prefix="ehr-sn-") as folder,
        disk_errors(Path(folder), "name another folder in TMPDIR"),
        fetched(config, Path(folder)) as config,
    ):
        sources = describe_sources(config)
        work = Work(Path(folder), writes=False, also=also)
        prepare(config, work, shard_rows)
        build_in_threads(config, work)
        return _manifest(config, sources, work)


def ingest(
    config: Config,
    prepare: Callable[[Config, Work], None] = prepare,
    build: Callable[[Config, Work], None] = build_in_threads,
) -> Path:
    """Make the store of this configuration and its sources, or find it; returns its folder.

    `prepare` reads the tables, and `build` builds the unfinished shards: here, or where it likes.

    Raises
    ------
    DataError
        The tables cannot be used as configured. Nothing is left behind.
    DiskError
        The disk is full. Nothing is left behind.
    """
    folder = config.data_dir.absolute() / config.dataset
    with disk_errors(folder, ELSEWHERE), fetched(config, folder) as config:
        return _ingest(config, folder, prepare, build)


def _ingest(
    config: Config,
    folder: Path,
    prepare: Callable[[Config, Work], None],
    build: Callable[[Config, Work], None],
) -> Path:
    sources = describe_sources(config)
    store = folder / fingerprint(config, sources)
    if store.exists():
        return store
    with working(folder / f".work-{store.name}") as work:
        if store.exists():  # another process was first
            shutil.rmtree(work.folder, ignore_errors=True)
            return store
        clear_abandoned(folder, ".work-", ABANDONED)
        try:
            with disk_errors(folder, ELSEWHERE):
                prepare(config, work)
                build(config, work)
                manifest = _manifest(config, sources, work)
                if describe_sources(config) != sources:
                    raise DataError(
                        f"{config.where('tables')}: a file changed while it was read: ingest again"
                    )
                (work.store / "manifest.json").write_text(
                    json.dumps(manifest, indent=2, ensure_ascii=False)
                )
                work.store.chmod(0o700)
                work.store.rename(store)
        except (DataError, DiskError, OSError):
            shutil.rmtree(work.folder, ignore_errors=True)
            raise
        shutil.rmtree(work.folder, ignore_errors=True)  # whoever waits may be putting a lock in it
    return store


def fingerprint(config: Config, sources: dict[str, Source]) -> str:
    """Hash of the sources' bytes and of the configuration's ingest part, in its order."""
    hashes = {name: source.sha256 for name, source in sources.items()}
    sections = json.dumps(config.ingest_sections)  # whose order is the order of the columns
    return digest({"format": FORMAT, "sources": hashes, "config": sections})


def _manifest(config: Config, sources: dict[str, Source], work: Work) -> dict[str, Any]:
    """Add up what the shards counted, judge the whole, and tell of it."""
    told = [json.loads(work.counted(shard).read_text()) for shard in work.shards]
    counts = Counts.from_dict(told[0]["counts"])
    for shard in told[1:]:
        counts += Counts.from_dict(shard["counts"])
    require_of_all(shard["requirements"] for shard in told)
    features = list_features(config)
    rows = dict(work.plan["rows"])
    for name, landed in work.landed_counts():
        rows[name] = landed["rows"]
        for check, place, n, of, message in landed["notices"]:
            counts.noticed[check, place, message] = (n, of)
    cohort = reduce(added, (shard["cohort"] for shard in told))
    risks = estimate_risks(config, counts.ended, counts.labelled(config))
    with connect() as db:
        parts = {
            table: ", ".join(literal(str(work.codes(table, shard))) for shard in work.shards)
            for table in CODE_TABLES
        }
        for table, counted in (
            ("coding_counts", ("events", "numbers")),
            ("code_counts", ("events", "subjects", "about")),
        ):
            sums = ", ".join(f"sum({name})::BIGINT AS {name}" for name in counted)
            db.execute(
                f"""CREATE TABLE {table} AS SELECT source, code, {sums}
                FROM read_parquet([{parts[table]}]) GROUP BY ALL"""
            )
        db.execute(
            f"""CREATE TABLE code_sets AS
            SELECT DISTINCT key, entry, written, code FROM read_parquet([{parts["code_sets"]}])"""
        )
        findings = find_all(db, config, features, counts, rows, cohort, risks)
        codes = db.execute("SELECT source, code, events, subjects FROM code_counts").fetchall()
        about = db.execute("SELECT source, code, about FROM code_counts").fetchall()
        held_in = dict(
            db.execute(
                """SELECT key, list(DISTINCT source ORDER BY source)
                FROM code_sets JOIN code_counts USING (code) GROUP BY key"""
            ).fetchall()
        )
    by_action: dict[tuple[str, str], int] = {}
    for (table, _, action), n in counts.quarantined.items():
        by_action[table, action] = by_action.get((table, action), 0) + n
    event_rows = reduce(added, (shard["event_rows"] for shard in told))
    observed_rates = counts.features.observed / counts.features.rows
    events = {name: event_rows[name]["kept"] for name in config.tables if name in event_rows}
    common = common_codes(codes, events)
    return {
        "dataset": config.dataset,
        "title": config.title,
        "fingerprint": fingerprint(config, sources),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": counts.features.rows,
        "features": [
            feature.as_dict()
            | {
                "observed_rate": round(float(rate), 6),
                "tables": held_in.get(feature.code_set, []),
            }
            for feature, rate in zip(features, observed_rates, strict=True)
        ],
        "cohort": cohort,
        "labels": reduce(added, (shard["attrition"] for shard in told)),
        "censoring": {
            name: CENSORING[label.censoring]
            for name, label in config.labels.items()
            if label.censoring is not None
        },
        "risks": {name: risk.as_dict() for name, risk in risks.items()},
        "tables": {
            name: source.as_dict() | {"rows": rows[name]} for name, source in sources.items()
        },
        "events": events,
        "codes": common,
        "code_subjects": code_subjects(about, common),
        "event_rows": event_rows,
        "quarantined": [
            {"table": table, "action": action, "count": n}
            for (table, action), n in sorted(by_action.items())
        ],
        "findings": [finding.as_dict() for finding in findings],
        "config": config.ingest_sections,
        "versions": {name: version(name) for name in ("ehr-sn", "duckdb", "pyarrow")},
    } | ({"files": _files(told)} if work.writes else {})


def _files(told: list[dict[str, Any]]) -> dict[str, str]:
    """SHA-256 of each of the store's files but the manifest."""
    return dict(sorted(entry for shard in told for entry in shard["files"].items()))


def added(one: Any, other: Any) -> Any:
    """Counts of two shards together, however they are nested; what names them stays."""
    if isinstance(one, dict):
        return {key: added(one[key], other[key]) for key in one}
    if isinstance(one, list):
        return [added(*pair) for pair in zip(one, other, strict=True)]
    return one if isinstance(one, str) else one + other


@contextmanager
def working(folder: Path) -> Iterator[Work]:
    """The folder to work in, for one process at a time: a second waits until the first is done."""
    while True:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            lock = (folder / "lock").open("w")
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_there(folder, lock):
            break
        lock.close()  # the folder that it was in has been removed by whom we waited for
    with lock:
        shutil.rmtree(folder / "scratch", ignore_errors=True)  # of tasks that were killed
        yield Work(folder)


def _is_there(folder: Path, lock: IO[str]) -> bool:
    try:
        return os.path.samestat((folder / "lock").stat(), os.fstat(lock.fileno()))
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Store:
    """A finished store, read back as arrays over its rows."""

    path: Path

    def __post_init__(self) -> None:
        if not (self.path / "manifest.json").is_file():
            raise DataError(f"{self.path}: holds no finished store; run `ehr-sn ingest CONFIG`")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What was ingested: features, labels, sources, findings, configuration, versions."""
        content: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        return content

    @property
    def fingerprint(self) -> str:
        return self.path.name

    @property
    def rows_fingerprint(self) -> str:
        """Names all but the labels: what is fitted without them."""
        return self.fingerprint

    @cached_property
    def feature_names(self) -> list[str]:
        return [feature["name"] for feature in self.manifest["features"]]

    @cached_property
    def measurements(self) -> list[str]:
        """Measurement of which each feature is an aggregate, or the feature's own name."""
        return [
            feature["name"].removesuffix(f".{feature['aggregate']}")
            for feature in self.manifest["features"]
        ]

    @cached_property
    def diseases(self) -> list[str]:
        return list(self.manifest["labels"])

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """One of the store's tables: values, mask, labels, splits, quarantine; or follow_up."""
        parts = sorted((self.path / table).glob("part-*.parquet"))
        paths = parts or [self.path / f"{table}.parquet"]
        # Of a column that is full in some part only, DuckDB says so in that part's schema.
        return pa.concat_tables(
            (pq.read_table(path, columns=columns) for path in paths), promote_options="default"
        )

    def values(self) -> np.ndarray:
        """(rows, features) float32, NaN = missing."""
        table = self.read("values", self.feature_names)
        matrix = np.empty((table.num_rows, table.num_columns), dtype=np.float32)
        for i, column in enumerate(table.columns):
            matrix[:, i] = column.to_numpy()
        return matrix

    def labels(self) -> np.ndarray:
        """(rows, diseases) float32: 1, 0, or NaN where the row is not eligible."""
        table = self.read("labels", self.diseases)
        return np.stack([c.cast(pa.float32()).to_numpy() for c in table.columns], axis=1)

    def subjects(self) -> np.ndarray:
        """(rows,) int64: each row's subject, numbered from 0."""
        ids = self.read("values", ["subject_id"])["subject_id"]
        return pc.rank(ids, tiebreaker="dense").to_numpy().astype(np.int64) - 1

    def follow_up(self) -> np.ndarray | None:
        """(rows, diseases) float64: days from the window's beginning to what ended it.

        That is the disease, a death without it, the end of follow-up, or the end of the window
        (its `horizons`). NaN where the row was not at risk and for diseases that are not weighted;
        None where none is.
        """
        columns = [i for i, horizon in enumerate(self.horizons) if horizon is not None]
        if not columns:
            return None
        table = self.read("follow_up", [self.diseases[i] for i in columns])
        days = np.full((table.num_rows, len(self.diseases)), np.nan)
        for i in columns:
            days[:, i] = table[self.diseases[i]].to_numpy()
        return days

    @cached_property
    def horizons(self) -> list[float | None]:
        """Days that each disease's window lasts; None where rows are not weighted."""
        return [
            label["within_days"] if label.get("censoring") == "ipcw" else None
            for label in self._labels
        ]

    @property
    def censoring(self) -> dict[str, str]:
        """How each disease treats those who leave early: ipcw, complete or drop; else ""."""
        labels = zip(self.diseases, self._labels, strict=True)
        return {name: label.get("censoring") or "" for name, label in labels}

    @cached_property
    def censoring_by(self) -> list[tuple[str, ...]]:
        """Features by which leaving is modelled, for each disease."""
        return [tuple(label.get("censoring_by", ())) for label in self._labels]

    @property
    def _labels(self) -> list[dict[str, Any]]:
        configured = self.manifest["config"]["labels"]
        return [configured[name] for name in self.diseases]

    def splits(self) -> np.ndarray:
        """(rows, repeats) of the strings train, tuning, held_out."""
        keys = self.read("values", ["subject_id"]).to_pandas()
        splits = self.read("splits").to_pandas().set_index("subject_id")
        return splits.loc[keys["subject_id"]].to_numpy(dtype=str)
