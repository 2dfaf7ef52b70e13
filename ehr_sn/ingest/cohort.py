"""Cohort rows and events → labels as of each prediction time, and subjects dealt to splits.

DuckDB tables made here:

- `labels`: row, then one column a disease: 1, 0, or NULL where the row is not eligible
- `follow_up`: row, then one column for each disease whose rows are weighted: days from the window's
  beginning to the first of disease, death, end of follow-up and end of the window, which is then
  the label's `within_days`; NULL where the row is not at risk. Without such a disease there is none
- `outcome_DISEASE`: row, label, left_at (the rule at which it left) and, with `within_days`, `days`
  as above and `ended`, what ended them (LEFT, ILL, DIED), whatever the label's censoring
- `splits`: subject_id, then one column a repeat: train, tuning or held_out
"""

import duckdb

from ehr_sn.config import SPLITS, Config, Label
from ehr_sn.ingest.code_sets import held_by, require_codes_of_labels
from ehr_sn.ingest.notices import count
from ehr_sn.ingest.requirements import REASONS, Requirement, require
from ehr_sn.ingest.sql import DAY, days, identifier, literal, literals
from ehr_sn.ingest.times import day_of
from ehr_sn.ingest.wide import DIED as ENDED_BY_DEATH
from ehr_sn.survival import DIED, ILL, LEFT

MIN_PER_CLASS = 2  # the variance of an AUROC needs two of each class


def stage_labels(db: duckdb.DuckDBPyConnection, config: Config) -> dict[str, dict[str, int]]:
    """Make the table `labels`; returns for each disease how many rows left at each rule.

    With t the prediction time, the window of a disease is (t + gap_days, t + gap_days +
    within_days], or (t + gap_days, until]. Unknown is where it was recorded by t (with
    `washout_days`: in so many days before t), or in the gap; with `prior: ignored` what was
    recorded before the window plays no part. Else, with `within_days`, it depends on `censoring`:

    - `ipcw`: 1 where first recorded in the window, by the day on which follow-up ended; 0 where the
      subject was followed to the window's end without that, or died before it; unknown where it
      left alive, or where follow-up did not reach the window.
    - `complete`: the same among those who were followed to the window's end, or died before it;
      all others are unknown, also who fell ill and left.
    - `drop`: 1 where first recorded in the window, 0 where the subject was followed to its end
      without a record, else unknown.

    With `until` everyone is followed to the window's end, and unknown is whose window ends before
    it begins. A prevalent disease is 1 where recorded by t, else 0. One stated by conditions is 1,
    0, or unknown as they say.
    """
    attrition = {}
    db.execute(
        """CREATE TEMP TABLE of_labels AS SELECT subject_id, time, code_id FROM event_rows
        WHERE code_id IN (SELECT code_id FROM code_sets WHERE starts_with(key, 'labels.'))"""
    )
    for name, label in config.labels.items():
        if label.codes is None:
            attrition[name] = _take_stated(db, name)
            continue
        attrition[name] = _take_recorded(db, config, name, label)
    _collect(db, "labels", "label", list(config.labels))
    if config.weighted_labels:
        _collect(db, "follow_up", "days", config.weighted_labels)
    db.execute("DROP TABLE of_labels")
    return attrition


def outcome_table(disease: str) -> str:
    """The SQL name of the table `outcome_DISEASE`."""
    return identifier(f"outcome_{disease}")


def _collect(db: duckdb.DuckDBPyConnection, table: str, column: str, diseases: list[str]) -> None:
    """Make a table of one column of each disease's outcomes."""
    outcomes = {name: outcome_table(name) for name in diseases}
    joins = " ".join(f"JOIN {outcome} USING (row)" for outcome in outcomes.values())
    columns = ", ".join(f"{outcome}.{column} AS {identifier(n)}" for n, outcome in outcomes.items())
    db.execute(f"CREATE TABLE {table} AS SELECT row, {columns} FROM cohort {joins} ORDER BY row")


def _take_recorded(
    db: duckdb.DuckDBPyConnection, config: Config, name: str, label: Label
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
    at_risk = " AND NOT ".join(["coalesce(follow_up_end > begins, FALSE)", *leaves.values()])
    positive = "recorded"
    if label.prevalent:
        positive = "before"
    elif label.until is not None:
        leaves["no_window"] = "coalesce(ends <= begins, TRUE)"
    elif label.censoring == "drop":
        leaves["followed_too_short"] = "NOT recorded AND NOT whole"
    else:
        leaves["no_follow_up"] = "NOT at_risk"
        seen = "" if label.censoring == "complete" else "NOT seen AND"
        leaves["left_early"] = f"{seen} NOT whole AND NOT died"
        positive = "seen"
    rules = " ".join(f"WHEN {test} THEN {literal(rule)}" for rule, test in leaves.items())
    zone = config.clock.time_zone
    died, last_day = "FALSE", day_of("follow_up_end", zone)
    whole = f"{day_of('ends', zone)} <= {last_day}"
    if label.censoring == "drop":
        whole = "follow_up_end >= ends"
    if config.cohort.died is not None:
        died = f"any_value({identifier(ENDED_BY_DEATH)})"
    table = outcome_table(name)
    # On the day on which follow-up ends illness and health are seen: its time is often only a day.
    db.execute(
        f"""CREATE TABLE {table} AS
        SELECT row, left_at, CASE WHEN left_at IS NULL THEN ({positive})::TINYINT END AS label,
            {_days_and_end(label)}
        FROM (SELECT *, CASE {rules or "WHEN FALSE THEN ''"} END AS left_at FROM (SELECT *,
                coalesce(first_after <= ends, FALSE) AS recorded,
                coalesce({day_of("first_after", zone)} <= {last_day}, FALSE) AND recorded AS seen,
                coalesce({whole}, FALSE) AS whole,
                {at_risk} AS at_risk
            FROM (SELECT c.row, any_value(c.follow_up_end) AS follow_up_end, {died} AS died,
                any_value({begin}) AS begins, any_value({ends}) AS ends,
                coalesce(bool_or(e.time <= c.prediction_time AND {washout}), FALSE) AS before,
                coalesce(bool_or(e.time > c.prediction_time AND e.time <= {begin}), FALSE)
                    AS in_gap,
                min(e.time) FILTER (e.time > {begin}) AS first_after
            FROM cohort c JOIN stated USING (row)
            LEFT JOIN (SELECT subject_id, time FROM of_labels
                WHERE code_id IN ({held_by(f"labels.{name}")})) e ON c.subject_id = e.subject_id
            GROUP BY c.row)))"""
    )
    counts = dict(db.execute(f"SELECT left_at, count(*) FROM {table} GROUP BY 1").fetchall())
    return {
        "rows": sum(counts.values()),
        **{rule: counts.get(rule, 0) for rule in leaves},
        "eligible": counts.get(None, 0),
        "positive": count(db, f"SELECT count(*) FROM {table} WHERE label = 1"),
    }


def _days_and_end(label: Label) -> str:
    """SQL of the columns `days` and `ended` of a label's outcomes."""
    if label.within_days is None:
        return "NULL::DOUBLE AS days, NULL::TINYINT AS ended"
    last = "CASE WHEN seen THEN first_after ELSE follow_up_end END"
    whole = f"{label.within_days!r}::DOUBLE"
    return f"""CASE WHEN NOT at_risk THEN NULL WHEN whole AND NOT seen THEN {whole}
            ELSE least((epoch_us({last}) - epoch_us(begins)) / {DAY!r}, {whole}) END AS days,
        CASE WHEN NOT at_risk THEN NULL WHEN seen THEN {ILL}
            WHEN died AND NOT whole THEN {DIED} ELSE {LEFT} END::TINYINT AS ended"""


def _take_stated(db: duckdb.DuckDBPyConnection, name: str) -> dict[str, int]:
    """A label that conditions over the cohort's columns have stated already."""
    outcome = outcome_table(name)
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
        f"negative rows to {split}; at least {MIN_PER_CLASS} of each are needed. Give the label "
        "more codes, or a longer window (where too few are negative, a shorter one: few may be "
        "followed to its end), take other fractions in `splits`, or leave the disease out",
        dict(zip(("positive", "negative"), counts, strict=True)),
        needed=("positive", "negative"),
        least=MIN_PER_CLASS,
    )
