"""Configuration → its cohort's events, labels and splits as MEDS 0.4 data on disk.

The folder holds, as the Medical Event Data Standard has it

- `data/SPLIT/SHARD.parquet`: subject_id, time, code, numeric_value, by subject and time; all usable
  events of the cohort's subjects, at any time, values of a measurement in its unit
- `metadata/`: `subject_splits.parquet` (of the first repeat), `codes.parquet`, `dataset.json`
- `labels/DISEASE/SHARD.parquet`: subject_id, prediction_time, boolean_value, where it is known;
  MEDS has no place for weights, so that these overstate the risk where subjects left early

and, where subjects are no whole numbers, `metadata/subject_ids.parquet`: which number is whom.

A birth, where it is known, is MEDS_BIRTH. A static feature is an event STATIC//NAME: without a time
where no subject's value ever changes, else at each prediction time. Ages are left to the birth.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import duckdb

from ehr_sn.config import SPLITS, Config
from ehr_sn.errors import DataError
from ehr_sn.ingest.code_sets import MEASUREMENTS
from ehr_sn.ingest.features import list_features
from ehr_sn.ingest.folders import disk_errors, hidden_folder
from ehr_sn.ingest.sql import identifier, literal
from ehr_sn.ingest.store import check
from ehr_sn.ingest.tables import connect
from ehr_sn.ingest.wide import feature_columns

MEDS_VERSION = "0.4.1"
SUBJECT_IDS = Path("metadata") / "subject_ids.parquet"
BIRTH, STATIC = "MEDS_BIRTH", "STATIC//"
ELSEWHERE = "name another folder"
_PARTS = ("events", "births", "statics", "labels", "splits", "codes")


def export_meds(
    config: Config,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, of: None,
    shard_rows: int | None = None,
) -> Path:
    """Write the data set to `folder`, complete or not at all; returns the folder.

    Nothing larger than a shard is in memory. `progress` is told how many of how many shards are
    written. What is known only before a prediction time, and not at it, stays so: MEDS counts the
    prediction time itself as known, so that it is written a microsecond earlier.

    Raises
    ------
    DataError
        The folder holds something already, or the tables cannot be used as configured.
    DiskError
        The disk is full. Nothing is left behind.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: exists and is not empty: name a new folder, or empty this one")
    with (
        disk_errors(folder, ELSEWHERE),
        hidden_folder(folder.parent, f".partial-{folder.name}-") as made,
    ):
        staged, built = made / "staged", made / "meds"
        for part in _PARTS:
            (staged / part).mkdir(parents=True)
        (built / "metadata").mkdir(parents=True)
        shards: list[int] = []

        def stage(db: duckdb.DuckDBPyConnection, shard: int) -> None:
            with disk_errors(folder, ELSEWHERE):
                _stage(db, config, staged, shard)
            shards.append(shard)

        check(config, shard_rows, stage)
        with connect(made / "spill") as db:
            _write_whole(db, config, staged, built)
            for done, shard in enumerate(sorted(shards)):
                _write_shard(db, config, staged, built, shard)
                progress(done + 1, len(shards))
        about = {
            "dataset_name": config.dataset,
            "etl_name": "ehr-sn",
            "etl_version": version("ehr-sn"),
            "meds_version": MEDS_VERSION,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        (built / "metadata" / "dataset.json").write_text(json.dumps(about, indent=2) + "\n")
        built.rename(folder)
    return folder


def _stage(db: duckdb.DuckDBPyConnection, config: Config, staged: Path, shard: int) -> None:
    """Write what a shard has, with its own subjects' ids."""
    born = any(one.since and one.unit == "years" for one in config.features.static.values())
    born = born or config.cohort.eligibility.age is not None
    statics = [
        (column, STATIC + column)
        for name, feature in config.features.wide.items()
        if feature.since is None or feature.unit != "years"
        for column in feature_columns(name, feature)
    ]
    at = "prediction_time"
    if not config.cohort.include_prediction_time:
        at = "prediction_time - to_microseconds(1)"
    listed = ", ".join(f"{literal(code)}: {identifier(c)}::FLOAT" for c, code in statics)
    diseases = ", ".join(map(identifier, config.labels))
    known = "lifetimes WHERE born IS NOT NULL" if born else "lifetimes LIMIT 0"
    queries = {
        "events": "SELECT subject_id, time, code, numeric_value::FLOAT AS numeric_value "
        "FROM events_by_code",
        "births": f"SELECT subject_id, born AS time FROM {known}",
        "statics": f"""SELECT subject_id, time, entry.key AS code, entry.value AS numeric_value
            FROM (SELECT subject_id, {at} AS time, unnest(map_entries(MAP {{{listed}}})) AS entry
                FROM cohort) WHERE entry.value IS NOT NULL""",
        "labels": f"SELECT subject_id, {at} AS prediction_time, {diseases} "
        "FROM labels JOIN cohort USING (row)",
        "splits": "SELECT subject_id, split FROM splits",
        "codes": f"""SELECT DISTINCT code, split_part(key, '.', -1) AS measurement
            FROM (SELECT DISTINCT code FROM events_by_code)
            LEFT JOIN (SELECT code, key FROM code_sets
                WHERE starts_with(key, {literal(MEASUREMENTS)})) USING (code)""",
    }
    if not statics:
        queries["statics"] = f"{queries['events']} LIMIT 0"
    for part, query in queries.items():
        _copy(db, query, staged / part / f"{shard}.parquet")


def _write_whole(db: duckdb.DuckDBPyConnection, config: Config, staged: Path, built: Path) -> None:
    """Numbers for subjects, their splits, and the list of codes."""
    splits, statics, births, codes = (
        f"read_parquet({literal(str(staged / part / '*.parquet'))})"
        for part in ("splits", "statics", "births", "codes")
    )
    (dtype,) = db.execute(f"SELECT typeof(subject_id) FROM {splits} LIMIT 1").fetchall()[0]
    number = "subject_id" if dtype == "BIGINT" else "row_number() OVER (ORDER BY subject_id)"
    db.execute(
        f"""CREATE TABLE subjects AS SELECT {number}::BIGINT AS number, subject_id, split
        FROM {splits}"""
    )
    metadata = built / "metadata"
    if dtype != "BIGINT":
        mapping = "SELECT number AS subject_id, subject_id AS source_id FROM subjects"
        _copy(db, f"{mapping} ORDER BY number", built / SUBJECT_IDS)
    numbered = "SELECT number AS subject_id, split FROM subjects ORDER BY number"
    _copy(db, numbered, metadata / "subject_splits.parquet")
    db.execute(
        f"""CREATE TABLE moving AS SELECT DISTINCT code FROM
            (SELECT code FROM {statics} GROUP BY subject_id, code
            HAVING min(numeric_value) <> max(numeric_value))"""
    )
    units = {name: one.unit for name, one in config.features.measurements.items()}
    units |= {STATIC + f.name: f.unit for f in list_features(config) if f.kind == "static"}
    db.execute("CREATE TABLE described (name VARCHAR, description VARCHAR)")
    for name, unit in units.items():
        said = ", ".join(filter(None, (name.removeprefix(STATIC), unit)))
        db.execute("INSERT INTO described VALUES (?, ?)", [name, said])
    _copy(
        db,
        f"""SELECT code, string_agg(DISTINCT description, '; ' ORDER BY description) AS description,
            NULL::VARCHAR[] AS parent_codes
        FROM (SELECT code, measurement AS name FROM {codes}
            UNION ALL SELECT DISTINCT code, code FROM {statics}
            UNION ALL SELECT DISTINCT {literal(BIRTH)}, NULL FROM {births})
        LEFT JOIN described USING (name) GROUP BY code ORDER BY code""",
        metadata / "codes.parquet",
    )


def _write_shard(
    db: duckdb.DuckDBPyConnection, config: Config, staged: Path, built: Path, shard: int
) -> None:
    events, births, statics, labels = (
        f"read_parquet({literal(str(staged / part / f'{shard}.parquet'))})" for part in _PARTS[:4]
    )
    db.execute(
        f"""CREATE OR REPLACE TEMP TABLE part AS
        SELECT number AS subject_id, time, code, numeric_value, split FROM (
            SELECT subject_id, time, code, numeric_value FROM {events}
            UNION ALL SELECT subject_id, time, {literal(BIRTH)}, NULL FROM {births}
            UNION ALL SELECT subject_id, time, code, numeric_value FROM {statics}
                WHERE code IN (SELECT code FROM moving)
            UNION ALL SELECT DISTINCT subject_id, NULL, code, numeric_value FROM {statics}
                WHERE code NOT IN (SELECT code FROM moving)
        ) JOIN subjects USING (subject_id)"""
    )
    for split in SPLITS:
        query = f"SELECT * EXCLUDE (split) FROM part WHERE split = {literal(split)}"
        ordered = "ORDER BY subject_id, time NULLS FIRST, code, numeric_value NULLS FIRST"
        _copy(db, f"{query} {ordered}", built / "data" / split / f"{shard}.parquet")
    db.execute("DROP TABLE part")
    for disease in config.labels:
        _copy(
            db,
            f"""SELECT number AS subject_id, prediction_time,
                {identifier(disease)}::BOOLEAN AS boolean_value
            FROM {labels} JOIN subjects USING (subject_id) WHERE {identifier(disease)} IS NOT NULL
            ORDER BY subject_id, prediction_time""",
            built / "labels" / disease / f"{shard}.parquet",
        )


def _copy(db: duckdb.DuckDBPyConnection, query: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    db.execute(f"COPY ({query}) TO {literal(str(path))} (FORMAT parquet)")
