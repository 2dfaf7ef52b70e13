"""Who counts as ill, as well, or as unknown; and which split a subject is dealt to."""

import math
from collections import Counter

import pytest

from ehr_sn import survival
from ehr_sn.errors import DataError
from ehr_sn.ingest import cohort
from ehr_sn.ingest.cohort import stage_splits

# Prediction on day 100; the window of a year ends on day 465.
PATIENTS = """
id  index  end   age  dead
1   100    1000  50   0
2   100    1000  50   0
3   100    1000  50   0
4   100    1000  50   0
5   100    1000  50   0
6   100    464   50   0
7   100    465   50   0
8   100    200   50   0
9   100    1000  50   0
10  100    .     50   0
11  100    .     50   0
12  100    464   50   0
13  100    200   50   1
14  100    200   50   1
15  100    464   50   .
16  100    1000  50   1
17  100    100   50   1
18  100    200   50   0
19  100    200   50   0
"""
DIAGNOSES = """
id  day  icd
2   101  E11
3   100  E11
4   465  E11
5   466  E11
8   150  E11
9   50   E11
9   150  E11
11  150  E11
12  466  E11
14  150  E11
18  200.9  E11
19  201  E11
1   150  I10
1   99   F17
"""
LABS = """
id  day  test  x
1   50   sbp   120
"""
RECORDED_BEFORE, NO_FOLLOW_UP, LEFT, DIED = None, None, None, 0
DEATHS = {"cohort__died": "dead == 1"}


@pytest.fixture
def staged(hospital, stage):
    hospital.draw(patients=PATIENTS, labs=LABS, diagnoses=DIAGNOSES)
    return lambda **changes: stage(hospital.config(**changes))


@pytest.mark.parametrize("include", [True, False])
def test_an_incident_label_follows_its_rules_to_the_moment(staged, include):
    found = staged(cohort__include_prediction_time=include, **DEATHS)
    assert found.labels() == {
        1: 0,  # another disease
        2: 1,
        3: RECORDED_BEFORE,  # exactly at the prediction time
        4: 1,  # at the window's last moment
        5: 0,  # ill, but later
        6: LEFT,
        7: 0,  # followed exactly to the window's end
        8: 1,  # ill before follow-up ended
        9: RECORDED_BEFORE,
        10: NO_FOLLOW_UP,  # not known to have been followed
        11: NO_FOLLOW_UP,  # though ill
        12: LEFT,  # before falling ill
        13: DIED,  # and will never fall ill
        14: 1,  # before dying
        15: LEFT,  # not known to have died
        16: 0,  # died after the window
        17: NO_FOLLOW_UP,  # died before the window began
        18: 1,  # on the day on which follow-up ended, of which the time may not be known
        19: LEFT,  # recorded after follow-up ended: of others nothing would be recorded then
    }
    assert found.attrition["diabetes"] == {
        "rows": 19,
        "recorded_before": 2,
        "no_follow_up": 3,
        "left_early": 4,
        "eligible": 10,
        "positive": 5,
    }


def test_it_is_known_how_long_each_row_at_risk_was_followed(staged):
    found = staged(**DEATHS)
    never = dict.fromkeys((3, 9, 10, 11, 17))
    whole = dict.fromkeys((1, 4, 5, 7, 16), 365)
    partly = {2: 1, 6: 364, 8: 50, 12: 364, 13: 100, 14: 50, 15: 364, 18: 100.9, 19: 100}
    assert found.days() == pytest.approx(never | whole | partly)
    ended = dict(
        found.rows("SELECT subject_id, ended FROM outcome_diabetes JOIN cohort USING (row)")
    )
    assert {who for who, how in ended.items() if how == survival.ILL} == {2, 4, 8, 14, 18}
    assert {who for who, how in ended.items() if how == survival.DIED} == {13}
    days, labels = found.days(), found.labels()
    at_risk = [who for who in days if days[who] is not None]
    status = survival.status_of(
        [days[who] for who in at_risk],
        [math.nan if labels[who] is None else labels[who] for who in at_risk],
        365,
    )
    assert list(status) == [ended[who] for who in at_risk]


def test_where_no_deaths_are_declared_who_died_has_left(staged):
    found = staged()
    assert found.labels()[13] is LEFT
    assert found.attrition["diabetes"]["left_early"] == 5


def test_of_complete_follow_up_nobody_counts_who_left(staged):
    found = staged(labels__diabetes__censoring="complete", **DEATHS)
    labels = found.labels()
    assert {who for who, label in labels.items() if label == 1} == {2, 4, 14}
    assert {who for who, label in labels.items() if label == 0} == {1, 5, 7, 13, 16}
    assert found.attrition["diabetes"] == {
        "rows": 19,
        "recorded_before": 2,
        "no_follow_up": 3,
        "left_early": 6,  # also those who fell ill before: 8 and 18
        "eligible": 8,
        "positive": 3,
    }
    without = staged(labels__diabetes__censoring="complete")
    assert {who for who, label in without.labels().items() if label == 1} == {2, 4}


@pytest.mark.parametrize("deaths", [{}, DEATHS])
def test_who_left_without_a_record_may_be_dropped_and_all_others_kept(staged, deaths):
    found = staged(labels__diabetes__censoring="drop", **deaths)
    labels = found.labels()
    assert {who for who, label in labels.items() if label == 1} == {2, 4, 8, 11, 14, 18, 19}
    assert {who for who, label in labels.items() if label == 0} == {1, 5, 7, 16}
    assert found.attrition["diabetes"] == {
        "rows": 19,
        "recorded_before": 2,
        "followed_too_short": 6,
        "eligible": 11,
        "positive": 7,
    }
    assert found.rows("SELECT * FROM duckdb_tables() WHERE table_name = 'follow_up'") == []


def test_the_day_on_which_follow_up_ends_is_the_sites(hospital, stage):
    hospital.draw(
        patients="""id index end
            1 2020-03-01 2020-04-01T12:00
            2 2020-03-01 2020-04-01T12:00
            3 2020-03-01 2020-04-01T12:00""",
        labs="id day test x \n 1 2020-02-01 sbp 120",
        diagnoses="""id day icd
            1 2020-04-01T23:00 E11
            2 2020-04-02T01:00 E11
            3 2020-04-02T04:30Z E11""",
    )
    config = {"features__static": {}, "clock": {"unit": "timestamp"}}
    assert stage(hospital.config(**config)).labels() == {1: 1, 2: None, 3: None}
    config["clock"]["time_zone"] = "America/Los_Angeles"  # 3: at 21:30
    assert stage(hospital.config(**config)).labels() == {1: 1, 2: None, 3: 1}


def test_the_window_may_end_within_a_day(staged):
    # 364.9999 days end a moment before day 465, 0.5 before day 101.
    assert staged(labels__diabetes__within_days=364.9999).labels()[4] == 0
    assert staged(labels__diabetes__within_days=0.5).labels()[2] == 0


def test_a_disease_may_have_several_codes(staged):
    found = staged(labels__diabetes__codes=["E11", "I10"]).labels()
    assert found[1] == found[2] == 1
    found = staged(labels__diabetes__codes=["E11", "F17"]).labels()
    assert found[1] is RECORDED_BEFORE


def test_a_prevalent_label_is_known_of_everyone(staged):
    found = staged(labels__diabetes={"codes": ["E11"], "prevalent": True})
    assert found.labels() == {patient: int(patient in (3, 9)) for patient in range(1, 20)}
    assert found.attrition["diabetes"] == {"rows": 19, "eligible": 19, "positive": 2}


def test_follow_up_may_end_on_one_day_for_all(staged):
    found = staged(cohort__follow_up_end=465).labels()
    assert found[10] == found[6] == 0
    # All but who was ill by day 100, or falls ill by day 464: 3, 9; 2, 8, 11, 14, 18, 19.
    assert staged(cohort__follow_up_end=464).attrition["diabetes"]["left_early"] == 11


def test_the_day_on_which_follow_up_ends_counts_for_the_healthy_as_for_the_ill(hospital, stage):
    """The window ends within that day: who is ill on it is known to be, and who is not, too."""
    patients = "id index end age \n 1 100.5 465 50 \n 2 100.5 465 50 \n 3 100.5 464 50"
    hospital.draw(patients=patients, labs=LABS, diagnoses="id day icd \n 1 465.2 E11")
    found = stage(hospital.config())
    rows = dict(found.rows("SELECT subject_id, diabetes FROM cohort JOIN labels USING (row)"))
    assert rows == {1: 1, 2: 0, 3: None}
    days = dict(found.rows("SELECT subject_id, diabetes FROM cohort JOIN follow_up USING (row)"))
    assert days[2] == 365
    dropped = stage(hospital.config(labels__diabetes__censoring="drop"))
    rows = dict(dropped.rows("SELECT subject_id, diabetes FROM cohort JOIN labels USING (row)"))
    assert rows[2] is None  # as it was


def test_labels_may_have_any_name_that_is_not_taken(staged):
    names = ["label", "recorded_before", "select", "age"]
    staged(labels={name: {"codes": ["E11"], "within_days": 365} for name in names})


def test_each_prediction_time_of_a_subject_has_its_own_label(hospital, stage):
    patients = "id index end age \n 1 100 1000 50 \n 1 600 1000 51 \n 2 0 1000 50"
    hospital.draw(patients=patients, labs=LABS, diagnoses="id day icd \n 1 300 E11")
    found = stage(hospital.config())
    rows = found.rows("SELECT subject_id, age, diabetes FROM cohort JOIN labels USING (row)")
    assert sorted(rows) == [(1, 50, 1), (1, 51, RECORDED_BEFORE), (2, 50, 0)]


# -- windows -------------------------------------------------------------------------------------

# Prediction on day 100, a gap of 2 days, a window of 30: (102, 132].
RECORDS = """
id  day     icd
1   102     E11
2   102.01  E11
3   132     E11
4   132.01  E11
5   60      E11
5   110     E11
6   90      E11
6   101     E11
6   110     E11
7   101     E11
7   110     E11
8   100     E11
"""
WARD = """
id  index  end   out
1   100    1000  132
2   100    1000  132
3   100    1000  131
4   100    1000  140
5   100    1000  132
6   100    1000  102
7   100    1000  .
8   100    1000  132
9   100    131   132
10  100    132   99
"""


@pytest.fixture
def windowed(hospital, stage):
    """Labels and attrition of the drawings above, by settings of the label."""
    hospital.draw(patients=WARD, labs=LABS, diagnoses=RECORDS)

    def label(**settings):
        diabetes = {"codes": ["E11"], "gap_days": 2, "within_days": 30} | settings
        diabetes = {key: value for key, value in diabetes.items() if value is not None}
        static = {"index": {"column": "index"}}
        found = stage(hospital.config(labels={"diabetes": diabetes}, features__static=static))
        return list(found.labels().values()), found.attrition["diabetes"]

    return label


def test_what_is_recorded_in_the_gap_is_neither_ill_nor_well(windowed):
    labels, attrition = windowed()
    assert labels == [None, 1, 1, 0, None, None, None, None, None, 0]
    assert attrition == {
        "rows": 10,
        "recorded_before": 3,
        "recorded_in_gap": 2,
        "no_follow_up": 0,
        "left_early": 1,
        "eligible": 4,
        "positive": 2,
    }


def test_only_records_in_the_washout_exclude(windowed):
    labels, attrition = windowed(washout_days=10)
    assert labels == [None, 1, 1, 0, 1, None, None, None, None, 0]
    assert attrition["recorded_before"] == 2
    assert windowed(washout_days=9.9)[1]["recorded_before"] == 1
    assert windowed(washout_days=40)[1]["recorded_before"] == 3


def test_of_a_recurrent_outcome_nothing_before_the_window_counts(windowed):
    labels, attrition = windowed(prior="ignored")
    assert labels == [0, 1, 1, 0, 1, 1, 1, 0, None, 0]
    assert list(attrition) == ["rows", "no_follow_up", "left_early", "eligible", "positive"]


def test_a_window_may_end_at_a_time_of_the_row_and_is_then_followed_to_its_end(windowed):
    labels, attrition = windowed(within_days=None, until="out")
    assert labels == [None, 1, 0, 1, None, None, None, None, 0, None]
    assert attrition == {
        "rows": 10,
        "recorded_before": 3,
        "recorded_in_gap": 2,
        "no_window": 1,
        "eligible": 4,
        "positive": 2,
    }
    labels, attrition = windowed(within_days=None, until="out", prior="ignored")
    assert labels == [0, 1, 0, 1, 1, None, None, 0, 0, None]
    assert attrition["no_window"] == 3  # ends in the gap, at no time, or before it


# -- splits --------------------------------------------------------------------------------------


def deal(staged):
    stage_splits(staged.db, staged.config)
    names = staged.config.splits.columns
    return {row[0]: dict(zip(names, row[1:], strict=True)) for row in staged.rows("FROM splits")}


@pytest.fixture
def crowd(hospital, stage):
    """Subjects without illness, half of them with, dealt to splits."""

    def deal_crowd(subjects, **changes):
        patients = "\n".join(f"{i} 100 1000 50" for i in subjects)
        ill = "\n".join(f"{i} 150 E11" for i in list(subjects)[::2])
        hospital.draw(
            patients=f"id index end age\n{patients}",
            labs=f"id day test x\n{next(iter(subjects))} 0 sbp 120",
            diagnoses=f"id day icd\n{ill}",
        )
        return deal(stage(hospital.config(**changes)))

    return deal_crowd


def test_a_subject_keeps_its_split_when_others_join(crowd):
    few = crowd(range(1, 201))
    many = crowd(range(1, 2001))
    assert few.items() <= many.items()


def test_a_number_keeps_its_split_when_the_subjects_become_text(crowd):
    numbers = crowd(range(1, 201))
    text = crowd([*range(1, 201), "A7"])
    assert text.pop("A7")
    assert text == {str(subject): splits for subject, splits in numbers.items()}


def test_fractions_are_about_as_configured(crowd):
    found = Counter(
        splits["split"]
        for splits in crowd(
            range(4000), splits={"train": 0.5, "tuning": 0.3, "held_out": 0.2}
        ).values()
    )
    for split, share in (("train", 0.5), ("tuning", 0.3), ("held_out", 0.2)):
        assert found[split] / 4000 == pytest.approx(share, abs=0.03)


def test_repeats_deal_anew_and_so_does_another_seed(crowd):
    found = crowd(range(2000), splits__repeats=3)
    assert list(found[0]) == ["split", "split_1", "split_2"]
    agree = sum(s["split"] == s["split_1"] for s in found.values()) / 2000
    assert agree == pytest.approx(0.6**2 + 0.2**2 + 0.2**2, abs=0.05)  # as chance has it
    first = {subject: splits["split"] for subject, splits in found.items()}
    other = {s: splits["split"] for s, splits in crowd(range(2000), splits__seed=7).items()}
    assert first != other


def test_too_few_of_a_class_in_a_split_is_refused_with_counts_and_line(hospital, stage):
    hospital.draw(patients=PATIENTS, labs=LABS, diagnoses=DIAGNOSES)
    staged = stage(hospital.config())
    with pytest.raises(DataError) as error:
        stage_splits(staged.db, staged.config)
    said = str(error.value).splitlines()
    assert all(line.startswith(str(hospital.folder / "hospital.yaml")) for line in said)
    assert all("labels.diabetes: split deals" in line for line in said)
    assert all("at least 2 of each are needed" in line for line in said)
    assert {"train", "tuning", "held_out"} >= {
        line.split(" rows to ")[1].split(";")[0] for line in said
    }


@pytest.fixture
def given(hospital, stage):
    """The splits that this table gives to the first twelve of the subjects drawn above."""

    def deal_given(rows, **changes):
        hospital.draw(
            patients="\n".join(PATIENTS.splitlines()[:14]),
            labs=LABS,
            diagnoses=DIAGNOSES,
            subject_splits="id part\n" + "\n".join(rows),
        )
        tables = ("patients", "labs", "diagnoses", "subject_splits")
        changes = {"splits": {"table": "subject_splits", "column": "part"}} | changes
        config = hospital.config(tables={t: {"path": f"{t}.csv"} for t in tables}, **changes)
        return deal(stage(config))

    return deal_given


SPLIT = [f"{i} {('train', 'tuning', 'held_out')[i % 3]}" for i in range(20)]


def test_a_table_may_give_the_splits(given, monkeypatch):
    monkeypatch.setattr(cohort, "MIN_PER_CLASS", 0)
    found = given([*SPLIT, SPLIT[5]])  # said twice
    assert {subject: splits["split"] for subject, splits in found.items()} == {
        i: ("train", "tuning", "held_out")[i % 3] for i in range(1, 13)
    }


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (SPLIT[:12], "1 have no split in table subject_splits"),
        ([*SPLIT[:12], "12 ."], "1 have no split in table subject_splits"),
        ([*SPLIT, "5 train", "6 tuning"], "2 have several splits there"),
        (
            [*SPLIT[:12], "12 test"],
            "1 have a split there that is none of train, tuning, held_out",
        ),
    ],
)
def test_a_subject_without_exactly_one_split_is_refused_with_counts(given, rows, said):
    with pytest.raises(DataError) as error:
        given(rows)
    assert f"splits.table: of the cohort's 12 subjects {said}: each needs" in str(error.value)
    assert "hospital.yaml:" in str(error.value)
