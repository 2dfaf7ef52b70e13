"""Configuration → Parquet store of values, masks, labels and splits; and reading it back.

A store is a folder `<data dir>/<dataset>/<fingerprint>/`. It is written beside its final name and
renamed when whole, so a reader sees all of it or nothing. The fingerprint is a hash of the source
files and of the configuration's ingest part: the same input is never ingested twice, and a changed
one is never mistaken for the old.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ehr_sn.config import Config, digest
from ehr_sn.errors import DataError
from ehr_sn.ingest.checks import FeatureStatistics, find_all
from ehr_sn.ingest.cohort import stage_labels, stage_splits
from ehr_sn.ingest.databases import fetched
from ehr_sn.ingest.events import require_events, stage_events
from ehr_sn.ingest.features import feature_blocks, list_features
from ehr_sn.ingest.tables import (
    Source,
    connect,
    describe_sources,
    identifier,
    literal,
    load_tables,
    sha256,
)
from ehr_sn.ingest.wide import stage_cohort

FORMAT = 2  # raised whenever the same input would give another store

CENSORING = (
    "a label is unknown where follow-up ends before its window does and nothing was recorded in it"
)
KEYS = ("subject_id", "prediction_time")


def check(config: Config) -> dict[str, Any]:
    """Read and check everything that ingest would, and write nothing.

    Returns what the store's manifest would say.
    """
    with (
        fetched(config, None) as config,
        tempfile.TemporaryDirectory(prefix="ehr-sn-") as spill,
    ):
        return _build(config, describe_sources(config), None, Path(spill))


def ingest(config: Config) -> Path:
    """Make the store of this configuration and its sources, or find it; returns its folder.

    Raises
    ------
    DataError
        The tables cannot be used as configured. Nothing is left behind.
    """
    with fetched(config, config.data_dir / config.dataset) as config:
        return _ingest(config)


def _ingest(config: Config) -> Path:
    sources = describe_sources(config)
    folder = config.data_dir / config.dataset
    store = folder / fingerprint(config, sources)
    if store.exists():
        return store
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        built = Path(partial) / "store"
        built.mkdir()
        manifest = _build(config, sources, built, Path(partial) / "spill")
        if describe_sources(config) != sources:
            raise DataError(
                f"{config.where('tables')}: a file changed while it was read: ingest again"
            )
        manifest["files"] = {file.name: sha256(file) for file in sorted(built.iterdir())}
        (built / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False))
        try:
            built.rename(store)
        except OSError:
            if not store.exists():  # else another process was first, with the same content
                raise
    return store


def fingerprint(config: Config, sources: dict[str, Source]) -> str:
    """Hash of the sources' bytes and of the configuration's ingest part, in its order."""
    hashes = {name: source.sha256 for name, source in sources.items()}
    sections = json.dumps(config.ingest_sections)  # whose order is the order of the columns
    return digest({"format": FORMAT, "sources": hashes, "config": sections})


def _build(
    config: Config, sources: dict[str, Source], folder: Path | None, spill: Path
) -> dict[str, Any]:
    with connect(spill) as db, _no_values_in_errors(config):
        table_rows = load_tables(db, config)
        cohort = stage_cohort(db, config)
        event_rows = stage_events(db, config)
        require_events(db, config)
        db.execute("DROP SCHEMA source CASCADE")
        attrition = stage_labels(db, config)
        stage_splits(db, config)
        features = list_features(config)
        statistics = FeatureStatistics.of(len(features))
        names = [feature.name for feature in features]
        with closing(_MatrixWriter(db, folder, names)) if folder else nullcontext() as writer:
            for block in feature_blocks(db, config):
                statistics.add(block)
                if writer:
                    writer.write(block)
        if folder:
            _write_tables(db, config, folder)
        findings = find_all(db, config, features, statistics, table_rows)
        quarantined = db.execute(
            "SELECT table_name, action, count(*) FROM quarantine GROUP BY ALL ORDER BY ALL"
        ).fetchall()
        events = db.execute("SELECT source, count(*) FROM events GROUP BY 1 ORDER BY 1").fetchall()
    observed_rates = statistics.observed / statistics.rows
    return {
        "dataset": config.dataset,
        "title": config.title,
        "fingerprint": fingerprint(config, sources),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": statistics.rows,
        "features": [
            feature.as_dict() | {"observed_rate": round(float(rate), 6)}
            for feature, rate in zip(features, observed_rates, strict=True)
        ],
        "cohort": cohort,
        "labels": attrition,
        "censoring": CENSORING,
        "tables": {
            name: source.as_dict() | {"rows": table_rows[name]} for name, source in sources.items()
        },
        "events": dict(events),
        "event_rows": event_rows,
        "quarantined": [
            {"table": table, "action": action, "count": n} for table, action, n in quarantined
        ],
        "findings": [finding.as_dict() for finding in findings],
        "config": config.ingest_sections,
        "versions": {name: version(name) for name in ("ehr-sn", "duckdb", "pyarrow")},
    }


@contextmanager
def _no_values_in_errors(config: Config) -> Iterator[None]:
    """Hide the message of DuckDB's errors about values, which it quotes: a patient's, maybe."""
    try:
        yield
    except (duckdb.DataError, duckdb.InvalidInputException) as error:
        raise DataError(
            f"{config.where('tables')}: DuckDB stops at a value it cannot take; its message is "
            f"left out, for it may quote a patient's data ({type(error).__name__}). Please report "
            "this with the types of your tables' columns"
        ) from None


class _MatrixWriter:
    """Writes blocks of the feature matrix to `values.parquet` and `mask.parquet`."""

    def __init__(self, db: duckdb.DuckDBPyConnection, folder: Path, names: list[str]):
        self._db, self._names, self._row = db, names, 0
        keys = db.sql(f"SELECT {', '.join(KEYS)} FROM cohort LIMIT 0").to_arrow_table().schema
        self._writers = {
            kind: pq.ParquetWriter(
                folder / f"{kind}.parquet",
                pa.schema([*keys, *(pa.field(name, dtype) for name in names)]),
            )
            for kind, dtype in (("values", pa.float32()), ("mask", pa.bool_()))
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


def _write_tables(db: duckdb.DuckDBPyConnection, config: Config, folder: Path) -> None:
    labels = ", ".join(identifier(name) for name in config.labels)
    queries = {
        "labels": f"SELECT {', '.join(KEYS)}, {labels} FROM labels JOIN cohort USING (row) "
        "ORDER BY row",
        "splits": "SELECT * FROM splits ORDER BY subject_id",
        "quarantine": "SELECT * FROM quarantine ORDER BY ALL",
    }
    for name, query in queries.items():
        target = literal(str(folder / f"{name}.parquet"))
        db.execute(f"COPY ({query}) TO {target} (FORMAT parquet)")


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

    @cached_property
    def feature_names(self) -> list[str]:
        return [feature["name"] for feature in self.manifest["features"]]

    @cached_property
    def measurements(self) -> list[str]:
        """For every feature the measurement of which it is an aggregate, or its own name."""
        return [
            feature["name"].removesuffix(f".{feature['aggregate']}")
            for feature in self.manifest["features"]
        ]

    @cached_property
    def diseases(self) -> list[str]:
        return list(self.manifest["labels"])

    def values(self) -> np.ndarray:
        """(rows, features) float32, NaN = missing."""
        table = pq.read_table(self.path / "values.parquet", columns=self.feature_names)
        matrix = np.empty((table.num_rows, table.num_columns), dtype=np.float32)
        for i, column in enumerate(table.columns):
            matrix[:, i] = column.to_numpy()
        return matrix

    def labels(self) -> np.ndarray:
        """(rows, diseases) float32: 1, 0, or NaN where the row is not eligible."""
        table = pq.read_table(self.path / "labels.parquet", columns=self.diseases)
        return np.stack([c.cast(pa.float32()).to_numpy() for c in table.columns], axis=1)

    def splits(self) -> np.ndarray:
        """(rows, repeats) of the strings train, tuning, held_out."""
        keys = pq.read_table(self.path / "values.parquet", columns=["subject_id"]).to_pandas()
        splits = pq.read_table(self.path / "splits.parquet").to_pandas().set_index("subject_id")
        return splits.loc[keys["subject_id"]].to_numpy(dtype=str)
