"""Rows set aside and values made missing → findings: which rule did it, and what to do about it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from ehr_sn.config import Config
from ehr_sn.ingest.cells import NUMBER_FAULTS, SET_ASIDE
from ehr_sn.ingest.findings import BLOCKING_FROM, Finding, Severity, by_share
from ehr_sn.ingest.times import NO_TIME
from ehr_sn.ingest.wide import feature_columns

DECLARED_FROM = 0.5  # share that a declared rule takes, from which a person should look
NOT_IN_COHORT = "subject is not in the cohort"
REPEATS = "repeats an earlier row"

_ADVICE = {
    NO_TIME: "if times are written otherwise, say how with `clock: {format: …}`, of this table "
    "alone in its entry of `events`",
    "is a number: say": "such as `clock: {unit: days, origin: 2000-01-01}`",
    NOT_IN_COHORT: "does its column of the subject hold the same ids as cohort.subject_id, or "
    "those of stays or visits? Then join the tables by SQL; a table of more people than the "
    "cohort's is no fault",
    "no subject_id": "is it the right column? What is of nobody cannot be used",
    "no time": "is it the right column? What has no time cannot be used",
    "no prediction time": "is it the right column?",
    "no code": "is it the right column?",
    "subject appears again": "give one row a subject and prediction time, by SQL",
    "not a number": "are there units or words in the cells? Take them apart by SQL",
    "no unit is given": 'if they have one and the same unit, declare `""` among its `units`',
    "the unit is not declared": "declare each among its `units`",
    "outside the plausible range": "another unit than `unit` says, two quantities under one name, "
    "or a value that stands for missing (`missing_codes`)",
    "after the prediction time": "is it the right column, on the right clock?",
}


@dataclass(frozen=True)
class Usable:
    """Values that have no fault: of each feature, of each measurement, of each table of events."""

    features: Mapping[str, int]
    measurements: Mapping[str, int]
    tables: Mapping[str, int]

    @classmethod
    def of(cls, db: duckdb.DuckDBPyConnection, features: Mapping[str, int]) -> "Usable":
        """Needs `coding_counts` and `code_sets`."""
        measurements = db.execute(
            """SELECT replace(key, 'features.measurements.', ''), sum(numbers)::BIGINT
            FROM (SELECT DISTINCT key, code FROM code_sets
                WHERE starts_with(key, 'features.measurements.'))
            JOIN coding_counts USING (code) GROUP BY 1"""
        ).fetchall()
        tables = db.execute(
            "SELECT source, sum(numbers)::BIGINT FROM coding_counts GROUP BY 1"
        ).fetchall()
        return cls(features, dict(measurements), dict(tables))


def lost(
    config: Config,
    counted: Counter[tuple[str, str, str]],
    table_rows: Mapping[str, int],
    attrition: Sequence[Mapping[str, Any]],
    usable: Usable,
) -> list[Finding]:
    """What was set aside, by table and reason; what the rules of the cohort took.

    Parameters
    ----------
    counted : of table, reason, action
    table_rows : of each table, as it was read
    attrition : the rows and subjects left by each rule of the cohort
    """
    findings = []
    aside: dict[str, dict[str, Finding]] = {}
    by_table = sorted(counted.items(), key=lambda entry: (entry[0][0], -entry[1], entry[0][1]))
    for (table, reason, action), n in by_table:
        of = _rows_judged(config, table, table_rows)
        if action != SET_ASIDE:
            of = max(_values_judged(config, counted, usable, table, reason) or of, n)
        severity = _severity(config, table, reason, n, of, attrition)
        said = f"{reason}: {action}"
        if severity != "harmless":
            said += "".join(f"; {advice}" for why, advice in _ADVICE.items() if why in reason)
        findings.append(Finding("quarantine", table, n, of, said, severity))
        if action == SET_ASIDE and reason != REPEATS:
            aside.setdefault(table, {})[reason] = findings[-1]
    return [*findings, *_lost_together(aside), *_ruled_out(attrition)]


def _rows_judged(config: Config, table: str, table_rows: Mapping[str, int]) -> int:
    """A table that is named twice in `events` is judged twice."""
    times = sum(events.table == table for events in config.events)
    return table_rows[table] * max(times, 1)


def _values_judged(
    config: Config,
    counted: Counter[tuple[str, str, str]],
    usable: Usable,
    table: str,
    reason: str,
) -> int | None:
    """How many values there are of what a reason is about; None where it is not known."""
    name, _, fault = reason.partition(": ")
    events = [one for one in config.events if one.table == table]
    about_a_column = fault.startswith(NUMBER_FAULTS)
    if events and about_a_column:
        return usable.tables.get(table, 0) + _unusable(counted, table)
    if events and name in config.features.measurements:
        return usable.measurements.get(name, 0) + _unusable(counted, None, f"{name}: ")
    if not events:
        held = {
            feature: feature_columns(feature, one)[0]
            for feature, one in config.features.wide.items()
            if (name in (c.rpartition(".")[2] for c in one.columns) and len(one.columns) == 1)
            or (feature == name and not about_a_column)
        }
        if len(held) == 1:
            (feature,) = held
            (column,) = config.features.wide[feature].columns[:1]
            unusable = _unusable(counted, table, f"{feature}: ", f"{column.rpartition('.')[2]}: ")
            return usable.features.get(held[feature], 0) + unusable
    return None


def _unusable(counted: Counter[tuple[str, str, str]], table: str | None, *begins: str) -> int:
    return sum(
        n
        for (of, reason, action), n in counted.items()
        if action != SET_ASIDE
        and (table is None or of == table)
        and (not begins or reason.startswith(begins))
    )


def _severity(
    config: Config,
    table: str,
    reason: str,
    n: int,
    of: int,
    attrition: Sequence[Mapping[str, Any]],
) -> Severity:
    if reason == REPEATS:  # what it says is there once more
        return "look" if n > BLOCKING_FROM * of else "harmless"
    usual = 0.0
    if reason == NOT_IN_COHORT and table not in config.cohort.join:
        usual = _ruled_out_subjects(attrition)
    return by_share(n, of, usual)


def _ruled_out_subjects(attrition: Sequence[Mapping[str, Any]]) -> float:
    """The share of the usable subjects whom declared rules took: their events have no subject."""
    usable, left = (attrition[i]["subjects"] for i in (1, -1))
    return 1 - left / usable if usable else 0.0


def _lost_together(aside: Mapping[str, Mapping[str, Finding]]) -> list[Finding]:
    """Tables that lose more than a tenth of their rows, though to no single reason."""
    together = []
    for table, findings in aside.items():
        reasons = {why: f for why, f in findings.items() if f.severity != "harmless"}
        n, of = sum(f.count for f in reasons.values()), max(f.of for f in findings.values())
        blocked = any(f.severity == "blocking" for f in reasons.values())
        if not blocked and by_share(n, of) == "blocking":
            said = f"set aside in all, for one of these reasons each: {'; '.join(reasons)}"
            together.append(Finding("set aside", table, n, of, said, "blocking"))
    return together


def _ruled_out(attrition: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Rules of the cohort that take more than half, or that could often not be decided."""
    findings = []
    for step in attrition[2:]:
        before = step["rows"] + step["excluded"] + step["unknown"]
        key = f"cohort.{step['rule']}"
        if by_share(step["unknown"], before) == "blocking":
            said = "the rule excludes these rows because they lack what it needs: is it the right "
            said += "column, and does it parse?"
            findings.append(Finding("undecided", key, step["unknown"], before, said, "blocking"))
        if step["rule"] != "take" and step["excluded"] > DECLARED_FROM * before:
            said = "the rule excludes so many rows of those that were left"
            findings.append(Finding("excluded", key, step["excluded"], before, said))
    return findings
