"""Cohort rows and events → labels as of each prediction time, and subjects dealt to splits.

DuckDB tables made here:

- `labels`: row, then one column a disease: 1, 0, or NULL where the row is not eligible
- `splits`: subject_id, then one column a repeat: train, tuning or held_out
"""

import duckdb

from ehr_sn.config import SPLITS, Config, Label
from ehr_sn.ingest.code_sets import held_by, require_codes_of_labels
from ehr_sn.ingest.notices import count
from ehr_sn.ingest.requirements import REASONS, Requirement, require
from ehr_sn.ingest.sql import days, identifier, literal, literals

MIN_PER_CLASS = 2  # the variance of an AUROC needs two of each class


def stage_labels(db: duckdb.DuckDBPyConnection, config: Config) -> dict[str, dict[str, int]]:
    """Make the table `labels`; returns for each disease how many rows left at each rule.

    With t the prediction time, the window of a disease is (t + gap_days, t + gap_days +
    within_days], or (t + gap_days, until]. It is 1 where first recorded in the window; 0 where the
    subject was followed to the window's end without a record; and unknown where it was recorded
    by t (with `washout_days`: in so many days before t), where it was recorded in the gap, or
    where follow-up ended too early. So subjects who died or moved away within the window without
    the disease are left out. With `until` everyone is followed to the window's end, and unknown is
    whose window ends before it begins. With `prior: ignored` what was recorded before the window
    plays no part. A prevalent disease is 1 where recorded by t, else 0. One stated by conditions
    is 1, 0, or unknown as they say.
    """
    attrition = {}
    outcomes = {name: identifier(f"outcome_{name}") for name in config.labels}
    db.execute(
        """CREATE TEMP TABLE of_labels AS SELECT subject_id, time, code_id FROM event_rows
        WHERE code_id IN (SELECT code_id FROM code_sets WHERE starts_with(key, 'labels.'))"""
    )
    for name, label in config.labels.items():
        outcome = outcomes[name]
        if label.codes is None:
            attrition[name] = _take_stated(db, name, outcome)
            continue
        attrition[name] = _take_recorded(db, name, label, outcome)
    joins = " ".join(f"JOIN {outcome} USING (row)" for outcome in outcomes.values())
    columns = ", ".join(f"{outcome}.label AS {identifier(n)}" for n, outcome in outcomes.items())
    db.execute(f"CREATE TABLE labels AS SELECT row, {columns} FROM cohort {joins} ORDER BY row")
    db.execute("DROP TABLE of_labels")
    return attrition


def _take_recorded(
    db: duckdb.DuckDBPyConnection, name: str, label: Label, outcome: str
) -> dict[str, int]:
    """A label by its codes in the events. Rows leave at the first rule that they break."""
    begin = f"c.prediction_time + {days(label.gap_days)}"
    ends = identifier(name) if label.until else f"{begin} + {days(label.within_days or 0)}"
    washout = "TRUE"
    if label.washout_days is not None:
        washout = f"e.time >= c.prediction_time - {days(label.washout_days)}"
    leaves = {}  # in their order
    if label.prior == "excluded" and not label.prevalent:
        leaves["recorded_before"] = "before"
        if label.gap_days:
            leaves["recorded_in_gap"] = "in_gap"
    if label.until is not None:
        leaves["no_window"] = "coalesce(ends <= begins, TRUE)"
    if label.within_days is not None:
        censored = "coalesce(follow_up_end < ends, TRUE)"
        leaves["followed_too_short"] = f"coalesce(first_after > ends, TRUE) AND {censored}"
    rules = " ".join(f"WHEN {test} THEN {literal(rule)}" for rule, test in leaves.items())
    positive = "before" if label.prevalent else "coalesce(first_after <= ends, FALSE)"
    db.execute(
        f"""CREATE TABLE {outcome} AS
        SELECT row, left_at, CASE WHEN left_at IS NULL THEN ({positive})::TINYINT END AS label
        FROM (SELECT *, CASE {rules or "WHEN FALSE THEN ''"} END AS left_at FROM (
            SELECT c.row, any_value(c.follow_up_end) AS follow_up_end,
                any_value({begin}) AS begins, any_value({ends}) AS ends,
                coalesce(bool_or(e.time <= c.prediction_time AND {washout}), FALSE) AS before,
                coalesce(bool_or(e.time > c.prediction_time AND e.time <= {begin}), FALSE)
                    AS in_gap,
                min(e.time) FILTER (e.time > {begin}) AS first_after
            FROM cohort c {"JOIN stated USING (row)" if label.until else ""}
            LEFT JOIN (SELECT subject_id, time FROM of_labels
                WHERE code_id IN ({held_by(f"labels.{name}")})) e ON c.subject_id = e.subject_id
            GROUP BY c.row))"""
    )
    counts = dict(db.execute(f"SELECT left_at, count(*) FROM {outcome} GROUP BY 1").fetchall())
    return {
        "rows": sum(counts.values()),
        **{rule: counts.get(rule, 0) for rule in leaves},
        "eligible": counts.get(None, 0),
        "positive": count(db, f"SELECT count(*) FROM {outcome} WHERE label = 1"),
    }


def _take_stated(db: duckdb.DuckDBPyConnection, name: str, outcome: str) -> dict[str, int]:
    """A label that conditions over the cohort's columns have stated already."""
    db.execute(f"CREATE TABLE {outcome} AS SELECT row, {identifier(name)} AS label FROM stated")
    rows, eligible, positive = db.execute(
        f"SELECT count(*), count(label), count(*) FILTER (label = 1) FROM {outcome}"
    ).fetchall()[0]
    return {"rows": rows, "unknown": rows - eligible, "eligible": eligible, "positive": positive}


def stage_splits(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Make the table `splits`: each repeat deals every subject by a keyed hash.

    A subject's split does not depend on who else is in the cohort. Or a table has given it.

    Raises
    ------
    DataError
        A disease has fewer than two positives, or negatives, in a split; or a subject is given no
        split, or several.
    """
    splits = config.splits
    if splits.table is not None:
        _require_given(db, config)
        dealt = f"SELECT subject_id, split AS {splits.columns[0]} FROM given_splits"
    else:
        deals = []
        for i, column in enumerate(splits.columns):
            place = f"md5_number_lower('{splits.seed + i}:' || subject_id::VARCHAR) / {2.0**64!r}"
            deals.append(
                f"""CASE WHEN {place} < {splits.train!r} THEN 'train'
                    WHEN {place} < {splits.train + splits.tuning!r} THEN 'tuning'
                    ELSE 'held_out' END AS {column}"""
            )
        dealt = f"""SELECT subject_id, {", ".join(deals)}
            FROM (SELECT DISTINCT subject_id FROM cohort)"""
    db.execute(f"CREATE TABLE splits AS {dealt} ORDER BY subject_id")
    require_codes_of_labels(db, config)
    by_column = {column: classes_by_split(db, config, column) for column in splits.columns}
    require(
        db,
        [
            _of_each_class(config, disease, column, split, classes.get((split, disease), (0, 0)))
            for disease in config.labels
            for column, classes in by_column.items()
            for split in SPLITS
        ],
    )


def _require_given(db: duckdb.DuckDBPyConnection, config: Config) -> None:
    """Every subject of the cohort has one split, and it is one of ours."""
    ours = literals(SPLITS)
    subjects, without, unknown, several = db.execute(
        f"""SELECT count(*), count(*) FILTER (given = 0), count(*) FILTER (others),
            count(*) FILTER (given > 1)
        FROM (SELECT subject_id, count(split) AS given, bool_or(split NOT IN ({ours})) AS others
            FROM (SELECT DISTINCT subject_id FROM cohort) LEFT JOIN given_splits USING (subject_id)
            GROUP BY 1)"""
    ).fetchall()[0]
    table = config.splits.table
    faults = {
        f"have no split in table {table}": without,
        f"have a split there that is none of {', '.join(SPLITS)}": unknown,
        "have several splits there": several,
    }
    message = (
        f"{config.where('splits.table')}: of the cohort's $subjects subjects {REASONS}: each needs "
        "exactly one"
    )
    counts = {"subjects": subjects, "faults": sum(faults.values())}
    require(db, [Requirement(message, counts, refused=("faults",), reasons=faults)])


def classes_by_split(
    db: duckdb.DuckDBPyConnection, config: Config, column: str
) -> dict[tuple[str, str], tuple[int, int]]:
    """Positives and negatives of each split and disease."""
    counted = ", ".join(
        f"[count(*) FILTER ({name} = 1), count(*) FILTER ({name} = 0)]"
        for name in map(identifier, config.labels)
    )
    found = db.execute(
        f"""SELECT {column}, {counted}
        FROM labels JOIN cohort USING (row) JOIN splits USING (subject_id) GROUP BY 1"""
    ).fetchall()
    return {
        (split, disease): (positive, negative)
        for split, *counts in found
        for disease, (positive, negative) in zip(config.labels, counts, strict=True)
    }


def _of_each_class(
    config: Config, disease: str, column: str, split: str, counts: tuple[int, int]
) -> Requirement:
    return Requirement(
        f"{config.where(f'labels.{disease}')}: {column} deals $positive positive and $negative "
        f"negative rows to {split}; at least {MIN_PER_CLASS} of each are needed. Widen the label's "
        "window or codes, take other fractions in `splits`, or leave the disease out",
        dict(zip(("positive", "negative"), counts, strict=True)),
        needed=("positive", "negative"),
        least=MIN_PER_CLASS,
    )
