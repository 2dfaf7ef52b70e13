"""Fresh extract + models → a folder of calibrated probabilities, in Parquet, with a summary.

`<output>/<fingerprint>/` holds

- `scores.parquet`: subject_id, prediction_time, disease, probability (calibrated), spread (over
  seeds), observed (entries of the row), model_version, scored_at; one row a disease
- `quarantine.parquet`: table_name, row_number, reason, action: what was set aside or made missing
- `summary.json`: counts, models, warnings and the files' SHA-256; no patient's value
- `scores.csv`, where it is asked for

or folders of parts of the first two, where there are many rows. The fingerprint is a hash of the
extract's content, of the models, of the diseases that have none, and of the moment `as_of`. The
folder is made in a hidden one beside it and renamed when whole; what was killed goes on where it
stopped, shard by shard, and what is there is not made again. Only `scored_at`, the moment of the
first attempt, differs between two folders of the same fingerprint.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ehr_sn import tracking
from ehr_sn.config import Config, digest, read_stored
from ehr_sn.errors import DataError, EhrSnError
from ehr_sn.ingest.cells import SET_ASIDE, quarantine_counts
from ehr_sn.ingest.checks import MOST_CODES, code_subjects, common_codes, count_codes
from ehr_sn.ingest.databases import fetched
from ehr_sn.ingest.events import require_events, stage_events
from ehr_sn.ingest.features import feature_blocks, list_features
from ehr_sn.ingest.folders import clear_abandoned, disk_errors
from ehr_sn.ingest.requirements import keep_requirements, kept, summed
from ehr_sn.ingest.shards import KEYS, Work, build_in_threads, prepare, write_json
from ehr_sn.ingest.sql import identifier, literal
from ehr_sn.ingest.store import ABANDONED, added, working
from ehr_sn.ingest.streams import build_in_order
from ehr_sn.ingest.tables import connect, describe_sources, sha256
from ehr_sn.ingest.wide import AS_OF, EMPTY, NOT_REACHED, stage_cohort
from ehr_sn.scoring import audit
from ehr_sn.scoring.extract import Extract, open_extract, require_enough, without_labels
from ehr_sn.scoring.package import Package, Scores, score_many
from ehr_sn.scoring.profile import PROFILE, Profile, expected
from ehr_sn.scoring.registry import (
    Registered,
    chosen,
    load_champions,
    not_scored,
    without_champion,
)
from ehr_sn.scoring.registry import told as registry_faults

FORMAT = 1  # raised whenever the same extract and models would give other files
UNEXPECTED = 1e-3  # probability below which it is no chance that no row has a feature's value
TILE_ROWS = 1024  # turned from columns to rows at a time, within a processor's cache
TABLES = ("scores", "quarantine")  # in parts by shard
ELSEWHERE = "write elsewhere with --output"
SUMMARY, CSV = "summary.json", "scores.csv"


def score(
    config: Config,
    models: Sequence[Registered],
    output: Path,
    source: str | Path | None = None,
    as_of: datetime | None = None,
    with_csv: bool = False,
    shard_rows: int | None = None,
    lacking: Sequence[str] = (),
) -> tuple[Path, bool]:
    """Score the rows of an extract with each of the models; returns the folder, and if it is new.

    Parameters
    ----------
    config : today's, of which paths, `data_root` and `scoring` are used; what the features are made
        of is as in the configuration that the models were trained with
    models : one a disease, trained on the same features
    source : see `open_extract`; by default the tables of the training
    as_of : in UTC, the moment at which the extract was taken: rows whose prediction time lies later
        are set aside, since not all that is known by then can be in the extract
    shard_rows : rows of all tables together that are read into memory at a time
    lacking : diseases that were to be scored, too, and have no model: the summary names them

    Raises
    ------
    DataError
        The extract cannot be used, or lacks too many of the features. Nothing is left behind.
    EhrSnError
        The models were trained on different features.
    DiskError
        The disk is full. Nothing is left behind.
    """
    packages = [model.package for model in models]
    training = _training(config, packages)
    features = packages[0].about["features"]
    extract = open_extract(training, features, source)
    require_enough(config, extract.absent, len(features))
    output = output.absolute()
    with disk_errors(output, ELSEWHERE), fetched(extract.config, output) as reading:
        extract = replace(extract, config=reading)
        sources = {name: one.sha256 for name, one in describe_sources(reading).items()}
        warnings = _changes(training, config)
        if lacking:
            warnings = (not_scored(lacking, models), *warnings)
        job = _Job(config, extract, tuple(models), tuple(lacking), as_of, sources, warnings)
        folder = output / job.fingerprint
        is_new = not folder.exists()
        if is_new:
            _make(job, folder, shard_rows)
        if with_csv and not (folder / CSV).exists():
            _write_csv(folder)
    return folder, is_new


def score_with_champions(
    config: Config,
    output: Path,
    source: str | None = None,
    diseases: Sequence[str] = (),
    as_of: datetime | None = None,
    with_csv: bool = False,
) -> tuple[Path, bool]:
    """Score with the champions of these diseases (of all, by default), and record it.

    A disease without a champion holds up no other: the summary names it. A folder that is new is
    told to MLflow, and every scoring, or failure to, to the audit log.

    Raises
    ------
    EhrSnError
        No disease has a champion, or MLflow cannot be reached; or as `score`.
    """
    started = perf_counter()
    log = audit.audit_path(config)
    with audit.failures(log, "score", diseases=chosen(config, diseases)):
        champions = load_champions(config, diseases)
    models, lacking = list(champions.values()), without_champion(config, diseases, champions)
    versions = {model.package.disease: model.version for model in models}
    with audit.failures(log, "score", models=versions):
        folder, is_new = score(config, models, output, source, as_of, with_csv, lacking=lacking)
        told = summary(folder)
        if is_new:
            with registry_faults():
                tracking.log_scoring(config, told, perf_counter() - started)
    audit.append(
        log,
        "score",
        outcome="scored" if is_new else "scored before",
        fingerprint=folder.name,
        sources=told["sources"],
        models=versions,
        without_champion=lacking,
        rows=told["rows"],
    )
    return folder, is_new


def read_moment(text: str) -> datetime:
    """A moment in UTC, without an offset, from `now` or ISO 8601 (without an offset: in UTC).

    Raises
    ------
    EhrSnError
        It is neither.
    """
    if text == "now":
        return datetime.now(UTC).replace(tzinfo=None, microsecond=0)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise EhrSnError(f"--as-of {text}: give `now`, or a moment as 2026-11-22T03:00") from None
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment


def summary(folder: Path) -> dict[str, Any]:
    """What `score` has told of a folder."""
    content: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
    return content


@dataclass(frozen=True)
class _Job:
    """All that the files depend on, but the moment of scoring; `sources` are SHA-256 by table."""

    config: Config
    extract: Extract
    registered: tuple[Registered, ...]
    lacking: tuple[str, ...]
    as_of: datetime | None
    sources: dict[str, str]
    warnings: tuple[str, ...]

    @property
    def packages(self) -> list[Package]:
        return [model.package for model in self.registered]

    @property
    def models(self) -> dict[str, dict[str, str | int]]:
        return {
            model.package.disease: {
                "name": model.name,
                "version": model.version,
                "sha256": model.package.sha256,
            }
            for model in self.registered
        }

    @property
    def fingerprint(self) -> str:
        as_of = self.as_of and self.as_of.isoformat()
        of_models = {name for package in self.packages for name in package.about["versions"]}
        versions = {name: version(name) for name in of_models | {"duckdb"}}
        content = [FORMAT, versions, self.sources, self.models, as_of]
        return digest([*content, self.lacking] if self.lacking else content)


def _training(config: Config, packages: Sequence[Package]) -> Config:
    """The configuration that all the packages were trained with, as far as features go."""
    stored = [read_stored(package.about["config"], config) for package in packages]
    sections = [json.dumps(without_labels(one).ingest_sections) for one in stored]
    for package, its_own in zip(packages, sections, strict=True):
        if its_own != sections[0] or package.features != packages[0].features:
            raise EhrSnError(
                f"the models of {packages[0].disease} and {package.disease} were trained on "
                "different features: score them apart, with --disease"
            )
    return stored[0]


def _changes(training: Config, config: Config) -> tuple[str, ...]:
    """What is to be said where today's configuration is another than that of the training."""
    one, other = (without_labels(c).ingest_sections for c in (training, config))
    for sections in (one, other):
        sections["tables"] = {name: table.get("sql") for name, table in sections["tables"].items()}
        sections.pop("databases", None)
    changed = [name for name in one if one[name] != other[name]]
    if not changed:
        return ()
    return (
        f"{', '.join(changed)}: changed in the configuration since the models were trained; rows "
        "are made as for the training",
    )


def _make(job: _Job, folder: Path, shard_rows: int | None) -> None:
    with working(folder.parent / f".work-{folder.name}") as work:
        if folder.exists():  # another process was first
            shutil.rmtree(work.folder, ignore_errors=True)
            return
        clear_abandoned(folder.parent, ".work-", ABANDONED)
        reading = job.extract.config
        others = tuple(name for name in reading.tables if name != reading.cohort.table)
        try:
            moment = _moment(work)

            def build(
                db: duckdb.DuckDBPyConnection, config: Config, work: Work, shard: int, scratch: Path
            ) -> None:
                _score_shard(job, moment, db, config, work, shard, scratch)

            work = replace(work, build=build, may_be_empty=others)
            if not build_in_order(reading, work, shard_rows):
                prepare(reading, work, shard_rows)
                build_in_threads(reading, work)
            told = _summary(job, moment, work)
            after = {name: one.sha256 for name, one in describe_sources(reading).items()}
            if after != job.sources:
                raise DataError("--input: a file changed while it was read: score again")
            (work.store / PROFILE).write_text(json.dumps(_profile(job, work)) + "\n")
            (work.store / SUMMARY).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n")
            work.store.chmod(0o700)
            work.store.rename(folder)
        except (DataError, OSError):
            shutil.rmtree(work.folder, ignore_errors=True)
            raise
        shutil.rmtree(work.folder, ignore_errors=True)  # whoever waits may be putting a lock in it


def _moment(work: Work) -> datetime:
    """When the first attempt at this folder began."""
    file = work.folder / "moment.json"
    if not file.exists():
        write_json(file, datetime.now(UTC).isoformat(timespec="seconds"))
    return datetime.fromisoformat(json.loads(file.read_text()))


def _score_shard(
    job: _Job,
    moment: datetime,
    db: duckdb.DuckDBPyConnection,
    config: Config,
    work: Work,
    shard: int,
    scratch: Path,
) -> None:
    """Make the shard's part of the scores and its counts from the tables in `source`."""
    keep_requirements(db)  # what would be odd of many rows may be chance of a few
    if job.as_of is not None:
        db.execute(f"SET VARIABLE {AS_OF} = TIMESTAMP {literal(job.as_of.isoformat(sep=' '))}")
    in_order = shard < work.plan.get("in_order", 0)
    cohort = stage_cohort(db, config, in_order)
    event_rows = stage_events(db, config)
    require_events(db, config)
    if not in_order:
        db.execute("DROP SCHEMA source CASCADE")
    names = job.packages[0].features
    places = [names.index(feature.name) for feature in list_features(config)]
    profile, row = Profile(job.packages), 0
    with closing(_Writer(db, scratch / "scores.parquet", job.registered, moment)) as writer:
        for block in _blocks(db, config, in_order):
            values = np.full((len(block), len(names)), np.nan, dtype=np.float32)
            values[:, places] = block
            keys = db.sql(
                f"""SELECT {", ".join(KEYS)} FROM cohort
                WHERE row >= {row} AND row < {row + len(block)} ORDER BY row"""
            ).to_arrow_table()
            scores = score_many(job.packages, values)
            subjects = keys["subject_id"].combine_chunks().dictionary_encode().indices
            profile.add(values, scores, subjects.to_numpy())
            writer.write(keys, scores)
            row += len(block)
    aside = literal(str(scratch / "quarantine.parquet"))
    db.execute(f"COPY (SELECT * FROM quarantine ORDER BY ALL) TO {aside} (FORMAT parquet)")
    files = {}
    for table in TABLES:
        part = work.part(table, shard)
        files[part.as_posix()] = sha256(scratch / f"{table}.parquet")
        (work.store / part).parent.mkdir(parents=True, exist_ok=True)
        (scratch / f"{table}.parquet").replace(work.store / part)
    told = {
        "rows": row,
        "profile": profile.as_dict(),
        "codes": _codes(db) if event_rows else [],
        "cohort": cohort,
        "event_rows": event_rows,
        "quarantined": quarantine_counts(db),
        "noticed": db.execute(
            "SELECT check_name, place, message, rows FROM notices WHERE check_name <> ?", [EMPTY]
        ).fetchall(),
        "requirements": kept(db),
        "files": files,
    }
    work.counted(shard).parent.mkdir(parents=True, exist_ok=True)
    write_json(work.counted(shard), told)


def _codes(db: duckdb.DuckDBPyConnection) -> list[tuple[str, str, int, int, int]]:
    """The shard's commonest codes."""
    count_codes(db)
    return db.execute(
        f"""SELECT source, code, events, subjects, about FROM code_counts
        ORDER BY events DESC, source, code LIMIT {10 * MOST_CODES}"""
    ).fetchall()


def _blocks(
    db: duckdb.DuckDBPyConnection, config: Config, in_order: bool
) -> Iterator[NDArray[np.float32]]:
    """Yield `feature_blocks`; rows in their own order are not sorted."""
    if not in_order:
        yield from feature_blocks(db, config)
        return
    columns = ", ".join(
        f"coalesce({identifier(feature.name)}::FLOAT, 'nan') AS {identifier(feature.name)}"
        for feature in list_features(config)
    )
    table = db.execute(f"SELECT {columns} FROM cohort").fetchnumpy()
    by_column = np.stack([*table.values()])
    block = np.empty(by_column.T.shape, dtype=np.float32)
    for start in range(0, len(block), TILE_ROWS):
        tile = slice(start, start + TILE_ROWS)
        block[tile] = by_column[:, tile].T
    yield block


class _Writer:
    """Writes scores of blocks of rows, a row group a disease."""

    def __init__(
        self,
        db: duckdb.DuckDBPyConnection,
        path: Path,
        models: Sequence[Registered],
        moment: datetime,
    ):
        self._models, self._moment = models, moment
        keys = db.sql(f"SELECT {', '.join(KEYS)} FROM cohort LIMIT 0").to_arrow_table().schema
        fields = {
            "disease": pa.dictionary(pa.int32(), pa.string()),
            "probability": pa.float64(),
            "spread": pa.float64(),
            "observed": pa.int32(),
            "model_version": pa.int32(),
            "scored_at": pa.timestamp("us", tz="UTC"),
        }
        self._writer = pq.ParquetWriter(
            path,
            pa.schema([*keys, *(pa.field(name, kind) for name, kind in fields.items())]),
            use_dictionary=["disease", "model_version", "scored_at", "observed"],
        )

    def write(self, keys: pa.Table, scores: Sequence[Scores]) -> None:
        rows = keys.num_rows
        zeros = pa.array(np.zeros(rows, dtype=np.int32))
        for model, told in zip(self._models, scores, strict=True):
            columns = [
                pa.DictionaryArray.from_arrays(zeros, pa.array([model.package.disease])),
                pa.array(told.probability),
                _known(told.spread),
                pa.array(told.observed, pa.int32()),
                pa.repeat(pa.scalar(model.version, pa.int32()), rows),
                pa.repeat(pa.scalar(self._moment, pa.timestamp("us", tz="UTC")), rows),
            ]
            table = pa.table([*keys.columns, *columns], schema=self._writer.schema)
            self._writer.write_table(table, row_group_size=rows)

    def close(self) -> None:
        self._writer.close()


def _known(values: NDArray[np.float64]) -> pa.Array:
    return pa.array(values, from_pandas=True)  # NaN: null


def _profile(job: _Job, work: Work) -> dict[str, Any]:
    """What `monitor` compares: counts of these rows, and what is known of those of the training."""
    told = [json.loads(work.counted(shard).read_text()) for shard in work.shards]
    kept = {
        name: sum(shard["event_rows"][name]["kept"] for shard in told)
        for name in told[0]["event_rows"]
    }
    rows = [row for shard in told for row in shard["codes"]]
    codes = common_codes((tuple(row[:4]) for row in rows), kept)
    subjects = code_subjects(((row[0], row[1], row[4]) for row in rows), codes)
    everyone = reduce(added, (shard["cohort"] for shard in told))[-1]["subjects"]
    for table, counts in codes.items():
        counts |= {"subjects": subjects[table], "everyone": everyone}
    now = reduce(added, (shard["profile"] for shard in told)) | {"codes": codes}
    return {"now": now, "then": expected(job.packages)}


def _summary(job: _Job, moment: datetime, work: Work) -> dict[str, Any]:
    """Add up what the shards counted, judge the whole, and tell of it.

    Raises
    ------
    DataError
        No row of the cohort is usable, or too many features are missing in every row.
    """
    told = [json.loads(work.counted(shard).read_text()) for shard in work.shards]
    cohort = reduce(added, (shard["cohort"] for shard in told))
    unmet = [
        requirement
        for together in summed(shard["requirements"] for shard in told)
        for requirement in together
        if not requirement.is_met
    ]
    usable = next(entry["rows"] for entry in cohort if entry["rule"] == "usable")
    quarantined: Counter[tuple[str, ...]] = Counter()
    noticed: Counter[tuple[str, ...]] = Counter()
    for shard in told:
        quarantined.update({tuple(key): n for *key, n in shard["quarantined"]})
        noticed.update({tuple(key): n for *key, n in shard["noticed"]})
    for table, landed in work.landed_counts():
        noticed.update({(check, table, said): n for check, _, n, _, said in landed["notices"]})
    not_due = quarantined[job.extract.config.cohort.table, NOT_REACHED, SET_ASIDE]
    for requirement in unmet:
        if requirement.refused or not (usable or not_due):
            raise DataError(requirement.fault)
    rows = sum(shard["rows"] for shard in told)
    missing_rows = reduce(added, (shard["profile"]["missing"] for shard in told))
    packages = job.packages
    features = packages[0].features
    observed = [rows - missing_rows[name] for name in features]
    missing = packages[0].about["training"]["missing_rate"]
    absent = dict(job.extract.absent)
    for name, seen in zip(features, observed, strict=True):
        if name not in absent and rows and not seen and missing[name] ** rows < UNEXPECTED:
            absent[name] = f"no row has a value, and {1 - missing[name]:.0%} in training had one"
    require_enough(job.config, absent, len(features))
    return {
        "fingerprint": job.fingerprint,
        "dataset": job.config.dataset,
        "scored_at": moment.isoformat(),
        "as_of": job.as_of and job.as_of.isoformat(),
        "rows": rows,
        "features": len(features),
        "observed_rate": round(sum(observed) / max(rows * len(features), 1), 6),
        "models": job.models,
        "without_champion": job.lacking,
        "absent_features": absent,
        "warnings": [*job.warnings, *(requirement.fault for requirement in unmet)],
        "cohort": cohort,
        "event_rows": reduce(added, (shard["event_rows"] for shard in told)),
        "quarantined": [
            dict(zip(("table", "reason", "action"), key, strict=True), count=n)
            for key, n in sorted(quarantined.items())
        ],
        "noticed": [
            dict(zip(("check", "place", "message"), key, strict=True), count=n)
            for key, n in sorted(noticed.items())
            if n
        ],
        "sources": job.sources,
        "lacking_tables": job.extract.lacking,
        "files": dict(sorted(file for shard in told for file in shard["files"].items())),
    }


def _write_csv(folder: Path) -> None:
    """The scores once more, as one CSV file."""
    parts = sorted((folder / "scores").glob("*.parquet")) or [folder / "scores.parquet"]
    with working(folder.parent / f".work-{folder.name}") as work:
        with work.scratch() as scratch, connect(scratch / "spill") as db:
            files = ", ".join(literal(str(part)) for part in parts)
            target = literal(str(scratch / CSV))
            db.execute(f"COPY (FROM read_parquet([{files}])) TO {target} (FORMAT csv, HEADER)")
            (scratch / CSV).replace(folder / CSV)
        shutil.rmtree(work.folder, ignore_errors=True)
