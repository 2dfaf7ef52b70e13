"""Whom is predicted for, when, and how many each rule left; nothing later decides it."""

import pandas as pd
import pytest

from ehr_sn.errors import DataError
from ehr_sn.ingest.store import check
from ehr_sn.ingest.tables import connect, load_tables
from ehr_sn.ingest.wide import stage_cohort

STAYS = """
id  at                  seen        first       born        age
1   2020-01-01T10:00    2021-01-01  2018-01-01  1990-05-05  30
1   2020-06-01T10:00    2021-01-01  2018-01-01  1990-05-05  30
2   2020-01-01T10:00    2020-01-20  2019-12-01  2002-01-01  18
3   2020-01-01T10:00    .           .           .           40
4   2020-01-01T10:00    2021-01-01  2018-01-01  2002-01-02  17
5   soon                2021-01-01  2018-01-01  1950-01-01  70
6   2020-01-01T10:00    2021-01-01  2018-01-01  2021-01-01  0
"""
LABS = """
id  day         test  x
1   2019-12-31  sbp   120
"""
DIAGNOSES = """
id  day         icd
1   2020-03-01  C50.1
2   2017-01-01  C18
4   2020-01-02  C18
"""


@pytest.fixture
def cohort(hospital):
    """Stage with changes to the cohort: gives the rows' times by subject, and the attrition."""
    hospital.draw(patients=STAYS, labs=LABS, diagnoses=DIAGNOSES)

    def staged(**changes):
        settings = {
            "table": "patients",
            "subject_id": "id",
            "prediction_time": "at",
            "follow_up_end": "seen",
            "observation_start": "first",
        }
        config = hospital.config(clock={}, cohort=settings | changes)
        with connect() as db:
            load_tables(db, config)
            attrition = stage_cohort(db, config)
            rows = db.execute(
                "SELECT subject_id, strftime(prediction_time, '%m-%d %H') FROM cohort ORDER BY row"
            ).fetchall()
            aside = db.execute("SELECT row_number, reason FROM quarantine ORDER BY ALL").fetchall()
        steps = {step.pop("rule"): tuple(step.values()) for step in attrition}
        return rows, steps, aside

    return staged


def test_every_visit_is_a_row_and_prediction_may_be_hours_later(cohort):
    rows, steps, _ = cohort(hours_after=25.5)
    assert rows[:3] == [(1, "01-02 11"), (1, "06-02 11"), (2, "01-02 11")]
    assert steps == {"read": (7, 6, 0, 0), "usable": (6, 5, 1, 0)}


def test_prediction_may_be_at_one_date_for_all_and_the_first_or_last_row_be_taken(cohort):
    rows, steps, _ = cohort(take="first")
    assert [row for row in rows if row[0] == 1] == [(1, "01-01 10")]
    assert steps["take"] == (5, 5, 1, 0)
    assert (1, "06-01 10") in cohort(take="last")[0]
    dated = cohort(
        table="patients", prediction_time=pd.Timestamp("2020-02-03").date(), where="id>1"
    )
    assert dated[0] == [(i, "02-03 00") for i in (2, 3, 4, 5, 6)]


def test_age_is_in_whole_years_and_who_is_born_later_has_none(cohort):
    born = {"born": "born"}
    rows, steps, aside = cohort(eligibility={"age": born | {"at_least": 18, "below": 90}})
    assert [subject for subject, _ in rows] == [1, 1, 2]  # 2 turned 18 that day, 4 the day after
    assert steps["eligibility.age"] == (3, 2, 1, 2)
    assert aside == [(6, "prediction time does not parse as a time between the years 1 and 9999")]
    rows, *_ = cohort(eligibility={"age": born | {"below": 18}})
    assert [subject for subject, _ in rows] == [4]


def test_rules_on_observation_and_follow_up_count_to_the_moment(cohort, hospital):
    rows, steps, _ = cohort(eligibility={"observed_days": 31, "follow_up_days": 19})
    assert [subject for subject, _ in rows] == [1, 1, 4, 6]  # 2 was followed 18.6 days
    assert steps["eligibility.observed_days"] == (5, 4, 0, 1)
    assert steps["eligibility.follow_up_days"] == (4, 3, 1, 0)
    rows, *_ = cohort(eligibility={"observed_days": 31.5})
    assert 2 not in dict(rows)
    rows, *_ = cohort(eligibility={"observed_days": 31.4})
    assert 2 in dict(rows)


def test_a_date_of_observation_that_does_not_parse_is_told(cohort, hospital):
    hospital.draw(patients=STAYS.replace("2019-12-01", "then"))
    rows, steps, aside = cohort(eligibility={"observed_days": 31})
    assert 2 not in dict(rows)
    assert steps["eligibility.observed_days"][2:] == (0, 2)
    assert (3, "first does not parse as a time between the years 1 and 9999") in aside


def test_who_has_a_code_recorded_by_then_is_left_out(cohort):
    rows, steps, _ = cohort(eligibility={"without": {"cancer": ["C*"]}})
    assert rows[0] == (1, "01-01 10")
    assert [subject for subject, _ in rows] == [1, 3, 4, 6]
    assert steps["eligibility.without.cancer"] == (4, 4, 2, 0)
    recent = {"codes": [{"range": ["C00", "C97"]}], "washout_days": 365}
    rows, *_ = cohort(eligibility={"without": {"cancer": recent}})
    assert [subject for subject, _ in rows] == [1, 2, 3, 4, 6]


def test_rules_come_in_order_and_add_up(cohort):
    rules = {
        "without": {"cancer": ["C*"], "other": ["X"]},
        "follow_up_days": 10,
        "observed_days": 10,
        "age": {"born": "born", "at_least": 1},
    }
    _, steps, _ = cohort(where="age >= 18", eligibility=rules, take="last")
    assert list(steps) == [
        "read",
        "usable",
        "where",
        "eligibility.age",
        "eligibility.observed_days",
        "eligibility.follow_up_days",
        "eligibility.without.cancer",
        "eligibility.without.other",
        "take",
    ]
    left = [rows for rows, *_ in steps.values()]
    lost = [excluded + unknown for *_, excluded, unknown in steps.values()]
    assert left == [left[0] - sum(lost[: i + 1]) for i in range(len(lost))]


def test_a_rule_that_nobody_keeps_is_refused_with_its_counts(cohort):
    said = (
        r"hospital\.yaml:\d+: cohort\.eligibility\.age: true for none of the 6 rows \(unknown for"
    )
    with pytest.raises(DataError, match=said):
        cohort(eligibility={"age": {"born": "born", "at_least": 99}})


def test_each_part_of_a_cohort_is_counted_alone(cohort, hospital):
    """Subject by subject, the counts add up to those of all."""
    rules = {"age": {"born": "born", "at_least": 18}, "without": {"cancer": ["C*"]}}
    header, *lines = STAYS.strip().splitlines()
    parts = [[line for line in lines if line[0] in subjects] for subjects in ("12", "3456")]
    # Someone of each part is eligible, or that part would be refused.
    parts[1].append(lines[0].replace("1", "7", 1))
    found = []
    for part in parts:
        hospital.draw(patients="\n".join([header, *part]))
        found.append(cohort(eligibility=rules, take="first"))
    hospital.draw(patients="\n".join([header, *parts[0], *parts[1]]))
    whole, steps, _ = cohort(eligibility=rules, take="first")
    assert sorted(found[0][0] + found[1][0]) == whole
    for rule, counts in steps.items():
        assert counts == tuple(map(sum, zip(found[0][1][rule], found[1][1][rule], strict=True)))


def test_years_since_a_time_are_a_feature_known_only_of_the_past(hospital, stage):
    hospital.draw(patients=STAYS, labs=LABS, diagnoses=DIAGNOSES)
    static = {
        "age": {"since": "born", "unit": "years", "plausible": [0, 29.8]},
        "known": {"since": "first", "unit": "days"},
    }
    config = hospital.config(
        clock={},
        cohort__prediction_time="at",
        cohort__follow_up_end="seen",
        features__static=static,
    )
    found = stage(config)
    features = found.features()
    hours = pd.Timedelta("10h") / pd.Timedelta("1D")
    days = (pd.Timestamp("2020-01-01") - pd.Timestamp("1990-05-05")).days + hours
    assert features["age"].iloc[0] == pytest.approx(days / 365.25)
    assert features["known"].iloc[0] == pytest.approx(730 + hours)
    assert features["age"].isna().tolist() == [False, True, False, True, False, True]
    assert [row for row in found.quarantine() if "prediction time does" not in row[2]] == [
        ("patients", 2, "age: outside the plausible range 0 to 29.8"),
        ("patients", 7, "age: born is after the prediction time"),
    ]


def test_events_before_birth_and_after_follow_up_are_findings(busy):
    patients = pd.read_csv(busy.folder / "patients.csv")
    busy.write(patients=patients.assign(born=-300, end=250))
    static = {"age": {"since": "born", "unit": "years"}}
    report = check(busy.config(features__static=static, labels__diabetes__within_days=100))
    found = {(f["check"], f["where"]): (f["count"], f["of"]) for f in report["findings"]}
    for table in ("labs", "diagnoses"):
        days = pd.read_csv(busy.folder / f"{table}.csv")["day"]
        for kind, n in (("birth", (days < -300).sum()), ("follow-up", (days > 250).sum())):
            kind = f"event {'before' if kind == 'birth' else 'after'} {kind}"
            assert found.get((kind, table), (0, 0)) == ((n, len(days)) if n else (0, 0))
    assert ("event before birth", "labs") in found
