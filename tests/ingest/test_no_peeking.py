"""Whatever is recorded later, who is eligible and what is known then stay as they are."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ehr_sn.errors import DataError

# Two visits of 1 and 2, prediction 12 hours after; their windows are (t + 5, t + 30] and later.
VISITS = """
id  index  end   born    age  out
1   100    1000  -9000   50   160
1   200    1000  -9000   50   260
2   100    1000  -8000   60   140
2   150    210   -8000   60   .
3   100    1000  90      1    900
"""
PREDICTED = {1: (100.5, 200.5), 2: (100.5, 150.5), 3: (100.5,)}
UNITS = st.sampled_from(["mg/dL", "mmol/L", "?", "."])
TESTS = st.sampled_from(["GLU", "GLU-2", "sbp", "C34"])
CODES = st.sampled_from(["E11", "E11.9", "E13", "C34", "C50.1", "F17", "GLU", "X"])
subjects, days = st.integers(1, 3), st.decimals(-400, 600, places=2)
values = st.decimals(0, 300, places=1)
labs = st.lists(st.tuples(subjects, days, TESTS, values, UNITS), max_size=25)
diagnoses = st.lists(st.tuples(subjects, days, CODES), max_size=12)
late = st.decimals(100, 300, places=1)
later_labs = st.lists(st.tuples(subjects, late, TESTS, values, UNITS), max_size=4)
later_codes = st.lists(st.tuples(subjects, late, CODES), max_size=4)
on_tables = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.generate],  # to shrink an example takes minutes
)
GAP = 5
LABELS = {
    "diabetes": {"codes": ["E11*"], "gap_days": GAP, "within_days": 25},
    "washed": {"codes": [{"range": ["E10", "E14"]}], "gap_days": GAP, "within_days": 25}
    | {"washout_days": 50},
    "again": {"codes": ["E11", "E13"], "gap_days": GAP, "within_days": 25, "prior": "ignored"},
    "inside": {"codes": ["E*"], "gap_days": GAP, "until": "out"},
}


@pytest.fixture
def build(hospital, stage):
    def staged(labs, diagnoses, include=True, take="every"):
        hospital.draw(
            patients=VISITS,
            labs=drawing("id day test x u", [(1, 0, "sbp", 120, "."), *labs]),
            diagnoses=drawing("id day icd", [(1, 0, "F17"), *diagnoses]),
        )
        glucose = {"codes": ["GLU*"], "unit": "mg/dL", "units": {"mmol/L": 18}}
        return stage(
            hospital.config(
                events__0__unit="u",
                events__0__where="test != 'sbp' or x >= 100",
                cohort__hours_after=12,
                cohort__take=take,
                cohort__include_prediction_time=include,
                cohort__eligibility={
                    "age": {"born": "born", "at_least": 0},
                    "without": {"cancer": ["C*"], "new": {"codes": ["X"], "washout_days": 30}},
                },
                features__static={"age": {"since": "born", "unit": "years"}},
                features__measurements={"glucose": glucose, "sbp": {}},
                features__history={"smoker": ["F1*"], "ill": [{"range": ["E00", "E90"]}]},
                labels=LABELS,
            )
        )

    return staged


def drawing(header, events):
    return "\n".join([header, *(" ".join(map(str, event)) for event in events)])


def told(staged):
    """Features, to the bit, by subject and days of the prediction time."""
    time = "epoch(prediction_time - TIMESTAMP '2020-01-01') / 86400"
    keys = staged.rows(f"SELECT subject_id, {time} FROM cohort ORDER BY row")
    return dict(zip(keys, staged.features().to_numpy().view(np.uint32).tolist(), strict=True))


@on_tables
@given(
    labs=labs,
    codes=diagnoses,
    more_labs=later_labs,
    more_codes=later_codes,
    include=st.booleans(),
)
def test_nothing_later_changes_features_or_eligibility(
    build, labs, codes, more_labs, more_codes, include
):
    def rows(labs, codes):
        with suppress(DataError):  # nobody is left
            return told(build(labs, codes, include))
        return {}

    before, after = rows(labs, codes), rows(labs + more_labs, codes + more_codes)
    for subject, times in PREDICTED.items():
        more = [event[1] for event in more_labs + more_codes if event[0] == subject]
        for t in times:
            if all(day > t for day in more):
                assert before.get((subject, t)) == after.get((subject, t))


@on_tables
@given(codes=diagnoses, later=later_codes, take=st.sampled_from(["first", "last"]))
def test_which_row_is_taken_does_not_depend_on_what_comes_after_all_of_them(
    build, codes, later, take
):
    codes = [event for event in codes if event[2][0] not in "CX"]  # somebody is eligible
    later = [event for event in later if event[1] > max(PREDICTED[event[0]])]
    before = told(build([], codes, take=take))
    assert before == told(build([], codes + later, take=take))
    place = {"first": 0, "last": -1}[take]
    assert list(before) == [(subject, PREDICTED[subject][place]) for subject in PREDICTED]


@on_tables
@given(
    codes=st.lists(st.tuples(subjects, late, CODES), max_size=12),
    more=st.lists(st.tuples(subjects, st.decimals("0.01", GAP, places=2), CODES), max_size=4),
    visit=st.sampled_from([0, -1]),
)
def test_what_is_recorded_in_the_gap_makes_nobody_ill(build, codes, more, visit):
    codes = [event for event in codes if event[2][0] not in "CX"]  # all stay eligible
    in_gap = [
        (subject, PREDICTED[subject][visit] + float(after), code)
        for subject, after, code in more
        if code[0] not in "CX"
    ]
    before, after = build([], codes), build([], codes + in_gap)
    query = f"SELECT {', '.join(LABELS)} FROM labels ORDER BY row"
    again = list(LABELS).index("again")
    for (subject, t), was, now in zip(
        told(before), before.rows(query), after.rows(query), strict=True
    ):
        if t == PREDICTED[subject][visit]:
            assert all(a == b or b is None for a, b in zip(was, now, strict=True))
            assert was[again] == now[again]  # of a recurrent outcome it is not even looked at
