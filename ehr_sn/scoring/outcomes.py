"""Scores + labels that have become known → probability and label of each row that has both.

A table of labels is somebody else's file: what a row means is never guessed. A label that is none
refuses the table, and so do labels that contradict each other. A row that meets no score is set
aside, and counted by its reason.
"""

from __future__ import annotations

import csv
import glob
import gzip
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ehr_sn.config import Clock, Config
from ehr_sn.errors import DataError
from ehr_sn.evaluate.small_cells import is_small
from ehr_sn.ingest.cells import as_subject
from ehr_sn.ingest.pseudonyms import create_function
from ehr_sn.ingest.sql import is_integer, literal, literals, stands_for_nobody, typed_columns
from ehr_sn.ingest.store import Store
from ehr_sn.ingest.tables import connect
from ehr_sn.ingest.times import moment_of
from ehr_sn.models.weights import weights

COLUMNS = ("subject_id", "prediction_time", "disease", "label")

NO_SUBJECT = "no subject_id"
NO_TIME = "no prediction_time"
NO_MOMENT = "prediction_time is not ISO 8601, such as 2026-11-22 or 2026-11-22T03:00+01:00"
OTHER_DISEASE = "disease was not scored"
OTHER_SUBJECT = "subject was not scored"
OTHER_TIME = "subject was not scored at this prediction_time"
REPEATED = "repeats an earlier row"

_DELIMITERS = (",", ";", "\t", "|")  # of two that fit alike, the first


@dataclass(frozen=True)
class Outcomes:
    """Scored rows whose label is known; arrays of shape (n,).

    disease, probability, positive : what was scored, the score, and what became of it
    subject : codes from 0 on; rows of one subject have the same
    weight : what each row of a store stands for, as in `metrics.Sample`; of a table, 1
    rows, met : of the table, how many there are, and how many met a score, each once; a row that
        did may have an empty label
    unused : rows that met none or repeat another, by reason

    Of a store, `rows` and `met` are 0 and `unused` is empty: it may well hold more subjects than
    were scored.
    """

    disease: NDArray[np.object_]
    probability: NDArray[np.float64]
    positive: NDArray[np.bool_]
    subject: NDArray[np.int64]
    weight: NDArray[np.float64]
    rows: int = 0
    met: int = 0
    unused: dict[str, int] = field(default_factory=dict)


def read_outcomes(config: Config, scores: Path, labels: Path) -> Outcomes:
    """Join a folder of scores with a store, or with a table of labels.

    Raises
    ------
    DataError
        The labels are neither, the table lacks a column, a label is none of 1, 0, true, false and
        empty, or labels of the same subject, time and disease differ.
    """
    parts = sorted((scores / "scores").glob("*.parquet")) or [scores / "scores.parquet"]
    with tempfile.TemporaryDirectory(prefix="ehr-sn-") as spill, connect(Path(spill)) as db:
        db.execute(
            f"""CREATE VIEW scored AS SELECT subject_id, prediction_time,
                disease::VARCHAR AS disease, probability FROM {_parquet(parts)}"""
        )
        if is_store(labels):
            db.register("of_store", _of_store(Store(labels)))
            return _joined(db, "FROM of_store", "subject_id::VARCHAR", "prediction_time")
        timed = config.cohort.prediction_time is not None
        _read(db, labels, timed)
        _judge(db, config, timed)
        _refuse(db, labels)
        usable = (
            "SELECT subject, time, disease, label, 1.0 AS weight FROM judged WHERE reason IS NULL"
        )
        found = _joined(db, usable, "subject_id", "prediction_time" if timed else "NULL")
        counted = db.execute(
            "SELECT reason, count(*) FROM judged GROUP BY 1 ORDER BY 2 DESC, 1"
        ).fetchall()
    unused = {reason: n for reason, n in counted if reason is not None}
    rows = sum(n for _, n in counted)
    return replace(found, rows=rows, met=rows - sum(unused.values()), unused=unused)


def is_store(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def told(rows: int, met: int, unused: Mapping[str, int], smallest: int = 0) -> list[str]:
    """Say how many rows of a table of labels met a score, and why the others did not.

    No count below `smallest`, nor one that would tell it.

    >>> told(9001, 7000, {"no prediction_time": 2000, "no subject_id": 1})
    ... # doctest: +NORMALIZE_WHITESPACE
    ['labels: 7,000 of 9,001 rows met a score',
     'labels: 2,000 rows not used: no prediction_time', 'labels: 1 row not used: no subject_id']
    >>> told(9001, 8997, {"no subject_id": 4}, smallest=11)
    ['labels: all but < 11 of 9,001 rows met a score', 'labels: < 11 rows not used: no subject_id']
    """
    if is_small(rows - met, smallest):
        share = f"all but < {smallest}"
    else:
        share = f"{met:,}" if not is_small(met, smallest) else f"< {smallest}"
    said = [f"labels: {share} of {rows:,} rows met a score"]
    for reason, count in unused.items():
        if is_small(count, smallest):
            those = f"< {smallest} rows"
        else:
            those = "1 row" if count == 1 else f"{count:,} rows"
        said.append(f"labels: {those} not used: {reason}")
    return said


def _joined(db: duckdb.DuckDBPyConnection, known: str, subject: str, time: str) -> Outcomes:
    """Join the scores with the SQL of known labels: subject, time, disease, label and weight."""
    joined = db.execute(
        f"""SELECT scored.disease, probability, label = 1 AS positive, weight::DOUBLE AS weight,
            dense_rank() OVER (ORDER BY scored.subject_id) - 1 AS subject
        FROM scored JOIN ({known}) AS known ON known.subject = scored.{subject}
            AND known.time IS NOT DISTINCT FROM {time} AND known.disease = scored.disease
        WHERE label IS NOT NULL"""
    ).fetchnumpy()
    return Outcomes(
        joined["disease"],
        joined["probability"],
        joined["positive"].astype(bool),
        joined["subject"].astype(np.int64),
        np.asarray(joined["weight"]),
    )


def _of_store(store: Store) -> pa.Table:
    """Labels of a store, a row each, and what each row stands for: itself, and those who left."""
    keys, labels = store.read("labels", ["subject_id", "prediction_time"]), store.labels()
    tables = []
    for i, (disease, weight) in enumerate(zip(store.diseases, weights(store, None), strict=True)):
        known = np.flatnonzero(~np.isnan(labels[:, i]))
        mine = keys.take(known)
        columns = {
            "subject": mine["subject_id"].cast(pa.string()),
            "time": mine["prediction_time"],
            "disease": pa.repeat(disease, len(known)),
            "label": labels[known, i],
            "weight": np.ones(len(known)) if weight is None else weight[known],
        }
        tables.append(pa.table(columns))
    return pa.concat_tables(tables)


def _parquet(files: Sequence[Path]) -> str:
    return f"read_parquet([{literals(tuple(glob.escape(str(file)) for file in files))}])"


# -- a table of labels -----------------------------------------------------------------------------


def _read(db: duckdb.DuckDBPyConnection, labels: Path, timed: bool) -> None:
    """Make the table `given`: row, id, time (a moment), time_given, disease, label, label_given."""
    try:
        relation, columns = _opened(db, labels)
        wanted = [name for name in COLUMNS if timed or name != "prediction_time"]
        lacking = [name for name in wanted if name not in columns]
        if lacking:
            raise DataError(
                f"{labels}: lacks {', '.join(lacking)}; give {', '.join(wanted)}, or a store"
            )
        id_, time, disease, label = (columns.get(name, ("NULL", "")) for name in COLUMNS)
        moment = moment_of(time[1], time[0], Clock())
        text = f"lower(({label[0]})::VARCHAR)"
        db.execute(
            f"""CREATE TABLE given AS SELECT row_number() OVER () AS row,
                CASE WHEN NOT {stands_for_nobody(f"({id_[0]})::VARCHAR")}
                    THEN ({id_[0]})::VARCHAR END AS id,
                CASE WHEN {timed} AND isfinite(({moment})::TIMESTAMP) THEN {moment} END AS time,
                ({time[0]}) IS NOT NULL AS time_given,
                ({disease[0]})::VARCHAR AS disease,
                CASE WHEN regexp_full_match({text}, '1(\\.0+)?|true') THEN 1
                    WHEN regexp_full_match({text}, '0(\\.0+)?|false') THEN 0 END AS label,
                {text} IS NOT NULL AS label_given
            FROM {relation}"""
        )
    except duckdb.OutOfMemoryException:
        raise
    except (duckdb.Error, OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error):
        # What they say may quote a row.
        raise DataError(
            f"{labels}: is no store, and no whole Parquet file or CSV file in UTF-8, each of whose "
            "rows has as many cells as its header"
        ) from None


def _opened(db: duckdb.DuckDBPyConnection, labels: Path) -> tuple[str, dict[str, tuple[str, str]]]:
    """Return a file as a relation, and each column's SQL and type; of a CSV file all is text."""
    file = literal(glob.escape(str(labels)))
    if labels.suffix.lower() == ".parquet":
        relation = f"read_parquet({file}, hive_partitioning = false)"
        return relation, {name: (sql, kind) for name, sql, kind in typed_columns(db, relation)}
    opened = gzip.open if labels.suffix.lower() == ".gz" else open
    with opened(labels, "rt", encoding="utf-8-sig", newline="") as lines:
        line = lines.readline()
    headers = {
        sign: [name.strip() for name in next(csv.reader([line], delimiter=sign, strict=True), [])]
        for sign in _DELIMITERS
    }
    delimiter = max(headers, key=lambda sign: len({*COLUMNS} & {*headers[sign]}))
    header = headers[delimiter]
    for name in COLUMNS:
        if header.count(name) > 1:
            raise DataError(f"{labels}: has {header.count(name)} columns {name}: leave one of them")
    types = {f"c{i}": "VARCHAR" for i in range(len(header))}
    relation = (
        f"read_csv({file}, auto_detect = false, columns = {types}, header = true, "
        f"delim = {literal(delimiter)}, quote = '\"', escape = '\"')"
    )
    return relation, {name: (f"nullif(trim(c{i}), '')", "VARCHAR") for i, name in enumerate(header)}


def _judge(db: duckdb.DuckDBPyConnection, config: Config, timed: bool) -> None:
    """Make the table `judged`: row, subject, time, disease, label, and why it is of no use.

    `reason` is NULL where it is of use; `no_label` and `contradicted` refuse the whole table.
    """
    no_moment = f"""WHEN NOT time_given THEN {literal(NO_TIME)}
        WHEN time IS NULL THEN {literal(NO_MOMENT)}"""
    other_time = f"WHEN moment.prediction_time IS NULL THEN {literal(OTHER_TIME)}"
    db.execute(
        f"""CREATE TABLE judged AS
        WITH read AS (SELECT *, {_subject(db, config)} AS subject FROM given),
        judged AS (
            SELECT row, subject, time, disease, label, label_given, CASE
                WHEN id IS NULL THEN {literal(NO_SUBJECT)}
                {no_moment if timed else ""}
                WHEN scored_disease IS NULL THEN {literal(OTHER_DISEASE)}
                WHEN person.subject_id IS NULL THEN {literal(OTHER_SUBJECT)}
                {other_time if timed else ""} END AS reason
            FROM read
            LEFT JOIN (SELECT DISTINCT disease AS scored_disease FROM scored)
                ON disease = scored_disease
            LEFT JOIN (SELECT DISTINCT subject_id FROM scored) AS person
                ON subject = person.subject_id
            LEFT JOIN (SELECT DISTINCT subject_id, prediction_time FROM scored) AS moment
                ON {timed} AND subject = moment.subject_id AND time = moment.prediction_time)
        SELECT row, subject, time, disease, label,
            label_given AND label IS NULL AS no_label,
            subject IS NOT NULL AND disease IS NOT NULL AND (time IS NOT NULL OR NOT {timed})
                AND min(label) OVER same <> max(label) OVER same AS contradicted,
            CASE WHEN reason IS NOT NULL OR label IS NULL THEN reason
                WHEN row_number() OVER of_known > 1 THEN {literal(REPEATED)} END AS reason
        FROM judged
        WINDOW same AS (PARTITION BY subject, time, disease),
            of_known AS (PARTITION BY subject, time, disease, reason, label IS NULL ORDER BY row)"""
    )


def _refuse(db: duckdb.DuckDBPyConnection, labels: Path) -> None:
    """Refuse a table of which it is not known what became of some rows; no value is named."""
    for flag, fault in (
        ("no_label", "whose label is none of 1, 0, true, false and empty"),
        ("contradicted", "whose label differs from another row's of the same subject, time and "
         "disease"),
    ):  # fmt: skip
        ((n, first),) = db.execute(f"SELECT count(*), min(row) FROM judged WHERE {flag}").fetchall()
        if n:
            raise DataError(
                f"{labels}: has {n:,} {'row' if n == 1 else 'rows'} {fault}; the first is row "
                f"{first:,} below the header: mend the table"
            )


def _subject(db: duckdb.DuckDBPyConnection, config: Config) -> str:
    """SQL for a row's subject as the scores have it."""
    whole = as_subject("id", "BIGINT")
    if config.pseudonym_key is None:
        ((_, kind, *_),) = db.execute("DESCRIBE SELECT subject_id FROM scored").fetchall()
        return whole if is_integer(kind) else "id"
    create_function(db, config.pseudonym_key)
    # Pseudonyms do not tell if ids were compared as text: an id that only a text can be tells it.
    ((as_text,),) = db.execute(
        f"""SELECT count(*) FROM given WHERE id IS DISTINCT FROM ({whole})::VARCHAR
        AND pseudonym(id) IN (SELECT subject_id::VARCHAR FROM scored)"""
    ).fetchall()
    return f"pseudonym({'id' if as_text else f'({whole})::VARCHAR'})"
