"""Cohort rows and events → labels as of each prediction time, and subjects dealt to splits.

DuckDB tables made here:

- `labels`: row, then one column a disease: 1, 0, or NULL where the row is not eligible
- `splits`: subject_id, then one column a repeat: train, tuning or held_out
"""

import duckdb

from ehr_sn.config import SPLITS, Config, Label
from ehr_sn.ingest.requirements import Requirement, require
from ehr_sn.ingest.tables import identifier, literals

MIN_PER_CLASS = 2  # the variance of an AUROC needs two of each class


def stage_labels(db: duckdb.DuckDBPyConnection, config: Config) -> dict[str, dict[str, int]]:
    """Make the table `labels`; returns for each disease how many rows left at each rule.

    With t the prediction time, a disease with `within_days` is 1 where first recorded in
    (t, t + within_days]; 0 where the subject was followed to the end of that window without a
    record; and unknown where it was recorded by t or follow-up ended too early. So subjects who
    died or moved away within the window without the disease are left out. A prevalent disease is
    1 where recorded by t, else 0. One stated by conditions is 1, 0, or unknown as they say.
    """
    attrition = {}
    outcomes = {name: identifier(f"outcome_{name}") for name in config.labels}
    for name, label in config.labels.items():
        outcome = outcomes[name]
        if label.codes is None:
            attrition[name] = _take_stated(db, name, outcome)
            continue
        db.execute(
            f"""CREATE TABLE {outcome} AS
            SELECT row, recorded_before, ({_rule(label)})::TINYINT AS label
            FROM (
                SELECT c.row, any_value(c.prediction_time) AS prediction_time,
                    any_value(c.follow_up_end) AS follow_up_end,
                    coalesce(bool_or(e.time <= c.prediction_time), FALSE) AS recorded_before,
                    min(e.time) FILTER (e.time > c.prediction_time) AS first_after
                FROM cohort c LEFT JOIN events e
                    ON c.subject_id = e.subject_id AND e.code IN ({literals(label.codes)})
                GROUP BY c.row)"""
        )
        rows, before, eligible, positive = db.execute(
            f"""SELECT count(*), count(*) FILTER (recorded_before), count(label),
                count(*) FILTER (label = 1) FROM {outcome}"""
        ).fetchall()[0]
        left = (
            {}
            if label.prevalent
            else {"recorded_before": before, "followed_too_short": rows - before - eligible}
        )
        attrition[name] = {"rows": rows, **left, "eligible": eligible, "positive": positive}
    joins = " ".join(f"JOIN {outcome} USING (row)" for outcome in outcomes.values())
    columns = ", ".join(f"{outcome}.label AS {identifier(n)}" for n, outcome in outcomes.items())
    db.execute(f"CREATE TABLE labels AS SELECT row, {columns} FROM cohort {joins} ORDER BY row")
    return attrition


def _take_stated(db: duckdb.DuckDBPyConnection, name: str, outcome: str) -> dict[str, int]:
    """A label that conditions over the cohort's columns have stated already."""
    db.execute(f"CREATE TABLE {outcome} AS SELECT row, {identifier(name)} AS label FROM stated")
    rows, eligible, positive = db.execute(
        f"SELECT count(*), count(label), count(*) FILTER (label = 1) FROM {outcome}"
    ).fetchall()[0]
    return {"rows": rows, "unknown": rows - eligible, "eligible": eligible, "positive": positive}


def stage_splits(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Make the table `splits`: each repeat deals every subject by a keyed hash.

    A subject's split does not depend on who else is in the cohort.

    Raises
    ------
    DataError
        A disease has fewer than two positives, or negatives, in a split.
    """
    splits = config.splits
    deals = []
    for i, column in enumerate(splits.columns):
        place = f"md5_number_lower('{splits.seed + i}:' || subject_id::VARCHAR) / {2.0**64!r}"
        deals.append(
            f"""CASE WHEN {place} < {splits.train!r} THEN 'train'
                WHEN {place} < {splits.train + splits.tuning!r} THEN 'tuning'
                ELSE 'held_out' END AS {column}"""
        )
    db.execute(
        f"""CREATE TABLE splits AS SELECT subject_id, {", ".join(deals)}
        FROM (SELECT DISTINCT subject_id FROM cohort) ORDER BY subject_id"""
    )
    require(
        db,
        [
            requirement
            for disease in config.labels
            for column in splits.columns
            for requirement in _of_each_class(db, config, disease, column)
        ],
    )


def _rule(label: Label) -> str:
    if label.prevalent:
        return "recorded_before::INTEGER"
    window_end = f"prediction_time + to_microseconds({int(label.within_days * 86400e6)})"  # type: ignore[operator]
    return f"""CASE WHEN recorded_before THEN NULL
        WHEN first_after <= {window_end} THEN 1
        WHEN follow_up_end >= {window_end} THEN 0 END"""


def _of_each_class(
    db: duckdb.DuckDBPyConnection, config: Config, disease: str, column: str
) -> list[Requirement]:
    counted = db.execute(
        f"""SELECT {column}, count(*) FILTER ({identifier(disease)} = 1),
            count(*) FILTER ({identifier(disease)} = 0)
        FROM labels JOIN cohort USING (row) JOIN splits USING (subject_id) GROUP BY 1"""
    ).fetchall()
    per_split = {split: (positive, negative) for split, positive, negative in counted}
    where = config.where(f"labels.{disease}")
    return [
        Requirement(
            f"{where}: {column} deals $positive positive and $negative negative rows to {split}; "
            f"at least {MIN_PER_CLASS} of each are needed. Widen the label's window or codes, "
            "take other fractions in `splits`, or leave the disease out",
            {"positive": positive, "negative": negative},
            needed=("positive", "negative"),
            least=MIN_PER_CLASS,
        )
        for split in SPLITS
        for positive, negative in [per_split.get(split, (0, 0))]
    ]
