"""Joined rows of the cohort's tables → those predicted for; how many each rule left.

Everything here looks at one subject's rows alone, so that the counts of parts of a cohort add up.
"""

from typing import Any

import duckdb

from ehr_sn.config import Config, Without
from ehr_sn.ingest.events import recorded
from ehr_sn.ingest.requirements import Requirement, require
from ehr_sn.ingest.sql import days, identifier
from ehr_sn.ingest.times import years_later

Attrition = list[dict[str, Any]]


def stage_eligible(
    db: duckdb.DuckDBPyConnection,
    config: Config,
    row_id: str,
    attrition: Attrition,
    in_order: bool = False,
) -> Attrition:
    """Make the table `wide`, numbered rows of the table `joined`; `row_id` is that one's key.

    With `in_order` it is a view, of rows in their own order; each subject has one of them.

    Returns `attrition` with one entry more a rule, in their order: the rule, how many rows and
    subjects were left after it, and how many rows it excluded, as false or as unknown.

    Raises
    ------
    DataError
        Nobody is left.
    """
    rules = _rules(db, config, row_id)
    verdicts = "".join(f", ({sql})::BOOLEAN AS {_verdict(name)}" for name, sql in rules.items())
    kind = "VIEW" if in_order else "TABLE"
    db.execute(f"CREATE {kind} ruled AS SELECT * {verdicts} FROM joined")
    kept = "TRUE"
    for name in rules:
        verdict = _verdict(name)
        rows, subjects, excluded, unknown = db.execute(
            f"""SELECT count(*) FILTER ({verdict}),
                count(DISTINCT subject_id) FILTER ({verdict}), count(*) FILTER (NOT {verdict}),
                count(*) FILTER ({verdict} IS NULL) FROM ruled WHERE {kept}"""
        ).fetchall()[0]
        attrition = [*attrition, entry(name, rows, subjects, excluded, unknown)]
        kept += f" AND {verdict}"
        nobody = (
            f"{config.where(f'cohort.{name}')}: true for none of the $before rows (unknown for "
            "$unknown): nobody is left to predict for"
        )
        counts = {"before": rows + excluded + unknown, "rows": rows, "unknown": unknown}
        require(db, [Requirement(nobody, counts, needed=("rows",))])
    taken = ""
    if config.cohort.take != "every":
        order = "DESC" if config.cohort.take == "last" else "ASC"
        taken = f"""QUALIFY row_number() OVER (
            PARTITION BY subject_id ORDER BY prediction_time {order}, place {order}) = 1"""
        before, subjects = attrition[-1]["rows"], attrition[-1]["subjects"]
        attrition = [*attrition, entry("take", subjects, subjects, before - subjects)]
    order, by_row = (
        ("", "") if in_order else ("ORDER BY subject_id, prediction_time", "ORDER BY row")
    )
    db.execute(
        f"""CREATE {kind} wide AS SELECT row_number() OVER ({order}) - 1 AS row, *
        FROM (SELECT * FROM ruled WHERE {kept} {"" if in_order else taken}) {by_row}"""
    )
    if not in_order:
        db.execute("DROP TABLE ruled")
    return attrition


def entry(
    rule: str, rows: int, subjects: int, excluded: int = 0, unknown: int = 0
) -> dict[str, Any]:
    """What was left after a rule, and what it took."""
    return {
        "rule": rule,
        "rows": rows,
        "subjects": subjects,
        "excluded": excluded,
        "unknown": unknown,
    }


def _verdict(rule: str) -> str:
    return identifier(f"keeps {rule}")  # with a blank, no table's column is called so


def _rules(db: duckdb.DuckDBPyConnection, config: Config, row_id: str) -> dict[str, str]:
    """SQL of each rule by its key below `cohort`: NULL where it is not known."""
    eligibility, rules = config.cohort.eligibility, {}
    if config.cohort.where is not None:
        rules["where"] = identifier("fulfils where")
    if eligibility.age is not None:
        born, bounds = identifier("time of cohort.eligibility.age.born"), []
        zone = config.clock.time_zone
        if eligibility.age.at_least is not None:
            birthday = years_later(born, eligibility.age.at_least, zone)
            bounds.append(f"{birthday} <= prediction_time")
        if eligibility.age.below is not None:
            bounds.append(f"{years_later(born, eligibility.age.below, zone)} > prediction_time")
        # Of who is born later no age is known.
        rules["eligibility.age"] = (
            f"CASE WHEN {born} <= prediction_time THEN {' AND '.join(bounds)} END"
        )
    if eligibility.observed_days is not None:
        rules["eligibility.observed_days"] = (
            f"observation_start + {days(eligibility.observed_days)} <= prediction_time"
        )
    if eligibility.follow_up_days is not None:
        rules["eligibility.follow_up_days"] = (
            f"follow_up_end >= prediction_time + {days(eligibility.follow_up_days)}"
        )
    for name, without in eligibility.without.items():
        key = f"eligibility.without.{name}"
        found = _with_record(db, config, f"cohort.{key}", without, row_id)
        rules[key] = f"{row_id} NOT IN ({found})"
    return rules


def _with_record(
    db: duckdb.DuckDBPyConnection, config: Config, key: str, without: Without, row_id: str
) -> str:
    """SQL that selects the rows which have a code of the set recorded."""
    since = ""
    if without.washout_days is not None:
        since = f"AND r.time >= j.prediction_time - {days(without.washout_days)}"
    return f"""SELECT j.{row_id} FROM joined j JOIN ({recorded(db, config, key)}) r
        ON j.subject_id = r.subject_id AND r.time <= j.prediction_time {since}"""
