"""What was known at the prediction time: each aggregate by hand, and never anything later."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ehr_sn.config import AGGREGATES
from ehr_sn.ingest import features as matrix

PATIENTS = """
id  index  end   age
1   100    1000  50
2   100    1000  .
3   100    1000  60
4   50     1000  70
"""
LABS = """
id  day    test  x
1   70     sbp   130
1   40     sbp   120
1   100    sbp   150
1   100.5  sbp   299
2   90     sbp   110
2   90     sbp   140
2   90     hdl   .
3   101    sbp   200
4   -3     hdl   0
"""
DIAGNOSES = """
id  day  icd
1   100  F17
2   101  F17
3   -10  F17
3   99   E10
"""
nan = np.nan


@pytest.fixture
def features(hospital, stage):
    """Features of the tables above under a changed configuration."""
    hospital.draw(patients=PATIENTS, labs=LABS, diagnoses=DIAGNOSES)
    return lambda **changes: stage(hospital.config(**changes)).features()


@pytest.mark.parametrize(
    ("aggregate", "known_then", "known_before"),
    [
        ("last", [150, 140, nan, nan], [130, 140, nan, nan]),
        ("mean", [400 / 3, 125, nan, nan], [125, 125, nan, nan]),
        ("min", [120, 110, nan, nan], [120, 110, nan, nan]),
        ("max", [150, 140, nan, nan], [130, 140, nan, nan]),
        ("count", [3, 2, nan, nan], [2, 2, nan, nan]),
        # By day 40, 70, 100 (mean 70): (-30·120 + 0·130 + 30·150) / (2·30²) = 0.5 a day.
        ("slope", [0.5 * 365.25, nan, nan, nan], [10 / 30 * 365.25, nan, nan, nan]),
        ("days_since_last", [0, 10, nan, nan], [30, 10, nan, nan]),
    ],
)
def test_an_aggregate_is_what_one_computes_by_hand(features, aggregate, known_then, known_before):
    including = features()[f"sbp.{aggregate}"]
    np.testing.assert_allclose(including, known_then, rtol=1e-6)
    excluding = features(cohort__include_prediction_time=False)[f"sbp.{aggregate}"]
    np.testing.assert_allclose(excluding, known_before, rtol=1e-6)


def test_all_aggregates_are_tested_above():
    marks = test_an_aggregate_is_what_one_computes_by_hand.pytestmark
    assert {case[0] for case in marks[0].args[1]} == set(AGGREGATES)


def test_an_observed_zero_is_a_value_and_an_empty_cell_is_none(features):
    found = features()
    assert found.loc[4, "hdl.last"] == 0
    assert found.loc[4, "hdl.count"] == 1
    assert np.isnan(found.loc[2, "hdl.last"])
    assert np.isnan(found.loc[2, "hdl.count"])


def test_static_features_come_as_they_are(features):
    np.testing.assert_array_equal(features()["age"], [50, nan, 60, 70])


def test_a_history_flag_is_always_observed_and_set_by_any_of_its_codes(features):
    found = features(features__history={"smoker": ["F17"], "any": ["F17", "E10"], "none": ["X"]})
    assert found["history.smoker"].tolist() == [1, 0, 1, 0]
    assert found["history.any"].tolist() == [1, 0, 1, 0]
    assert found["history.none"].tolist() == [0, 0, 0, 0]
    before = features(cohort__include_prediction_time=False)
    assert before["history.smoker"].tolist() == [0, 0, 1, 0]


def test_the_lookback_window_includes_its_first_moment(features):
    found = features(features__lookback_days=30)
    assert found.loc[1, "sbp.count"] == 2
    assert found.loc[4, "hdl.count"] != 1
    assert found["history.smoker"].tolist() == [1, 0, 0, 0]
    assert features(features__lookback_days=29.9).loc[1, "sbp.count"] == 1


def test_codes_may_be_pooled_and_used_twice(features):
    found = features(
        features__measurements={
            "pooled": {"codes": ["sbp", "hdl"], "aggregates": ["count"]},
            "sbp": {"aggregates": ["count"]},
        }
    )
    assert list(found) == ["age", "pooled.count", "sbp.count", "history.smoker"]
    np.testing.assert_array_equal(found["pooled.count"], [3, 2, nan, 1])
    np.testing.assert_array_equal(found["sbp.count"], [3, 2, nan, nan])


def test_features_may_be_static_alone(features):
    found = features(features={"static": {"age": {"column": "age"}}})
    assert found.shape == (4, 1)


def test_nothing_known_before_anyone_s_prediction_time_leaves_only_gaps(features):
    found = features(features__lookback_days=0.001, cohort__include_prediction_time=False)
    assert found.filter(like="sbp").isna().all(axis=None)
    assert (found["history.smoker"] == 0).all()


@pytest.mark.parametrize("block_rows", [1, 2, 3, 4])
def test_blocks_of_any_size_hold_the_same(hospital, stage, block_rows):
    hospital.draw(patients=PATIENTS, labs=LABS, diagnoses=DIAGNOSES)
    staged = stage(hospital.config())
    assert staged.features(block_rows).equals(staged.features())


def test_the_events_of_one_patient_may_span_many_batches(hospital, stage):
    """DuckDB streams some 100,000 rows a batch."""
    n = 300_000
    hospital.draw(patients=PATIENTS, labs=LABS, diagnoses=DIAGNOSES)
    second = np.arange(n)
    more = {"id": 3, "day": -365 + second / 86_400, "test": "sbp", "x": 100 + second % 2}
    labs = pd.read_csv(hospital.folder / "labs.csv")
    hospital.write(labs=pd.concat([labs, pd.DataFrame(more)]))
    staged = stage(hospital.config())
    found = staged.features(block_rows=1).loc[3]
    assert found["sbp.count"] == n
    assert found["sbp.mean"] == 100.5
    assert staged.features().loc[1].equals(staged.features(block_rows=1).loc[1])


@pytest.mark.parametrize("include", [True, False])
def test_no_aggregate_sees_what_came_later(hospital, stage, include):
    def features_with(more=""):
        hospital.draw(patients=PATIENTS, labs=LABS + more, diagnoses=DIAGNOSES)
        return stage(hospital.config(cohort__include_prediction_time=include)).features()

    before = features_with()
    later = "1 100.0001 sbp 60 \n 3 500 sbp 61 \n 3 510 sbp 62 \n 4 50.5 hdl 7 \n"
    if not include:
        later += "1 100 sbp 60 \n 3 100 sbp 60 \n"
    after = features_with(later)
    earlier = features_with("3 80 sbp 100 \n 3 90 sbp 110")
    for aggregate in AGGREGATES:
        columns = [f"sbp.{aggregate}", f"hdl.{aggregate}"]
        assert same_bits(before[columns], after[columns])
        assert not same_bits(before[columns], earlier[columns])


INDEX = {1: 100, 2: 100, 3: 100, 4: 50}
patients, days = st.integers(1, 4), st.decimals(-400, 600, places=2)
results = st.decimals(50, 300, places=2)
labs = st.lists(st.tuples(patients, days, st.sampled_from(["sbp", "hdl"]), results), max_size=30)
diagnoses = st.lists(st.tuples(patients, days, st.sampled_from(["F17", "E11"])), max_size=10)
on_tables = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def build(hospital, stage, labs, diagnoses, include):
    hospital.draw(
        patients=PATIENTS,
        labs=drawing("id day test x", [(1, 0, "sbp", 120), *labs]),
        diagnoses=drawing("id day icd", [(1, 0, "F17"), *diagnoses]),
    )
    return stage(hospital.config(cohort__include_prediction_time=include))


def drawing(header, events):
    return "\n".join([header, *(" ".join(map(str, event)) for event in events)])


@on_tables
@given(labs=labs, more_labs=labs, codes=diagnoses, more_codes=diagnoses, include=st.booleans())
def test_no_feature_changes_by_a_bit_whatever_comes_later(
    hospital, stage, labs, more_labs, codes, more_codes, include
):
    def later(events):
        return [e for e in events if e[1] > INDEX[e[0]] or (e[1] == INDEX[e[0]] and not include)]

    before = build(hospital, stage, labs, codes, include)
    after = build(hospital, stage, labs + later(more_labs), codes + later(more_codes), include)
    assert same_bits(before.features(), after.features())
    assert before.labels() == expected_labels(codes)
    assert after.labels() == expected_labels(codes + later(more_codes))


@on_tables
@given(
    labs=labs,
    include=st.booleans(),
    block_rows=st.integers(1, 4),
    held=st.sampled_from([0, matrix.HELD_EVENTS]),
)
def test_aggregates_equal_a_plain_loop_s(
    hospital, stage, monkeypatch, labs, include, block_rows, held
):
    monkeypatch.setattr(matrix, "HELD_EVENTS", held)
    found_by_patient = build(hospital, stage, labs, [], include).features(block_rows)
    for patient, index in INDEX.items():
        for test in ("sbp", "hdl"):
            known = sorted(
                {
                    (day - index, float(result))
                    for p, day, t, result in [(1, 0, "sbp", 120), *labs]
                    if (p, t) == (patient, test) and (day < index or (include and day == index))
                }
            )
            found = found_by_patient.loc[patient].filter(like=test).to_numpy()
            np.testing.assert_allclose(found, aggregates(known), rtol=1e-4, atol=1e-6)


def aggregates(known):
    """The seven aggregates of (days from the prediction time, value) pairs in order."""
    if not known:
        return [nan] * 7
    when, values = np.array(known, dtype=float).T
    apart = when - when.mean()
    slope = (
        365.25 * (apart @ (values - values.mean())) / (apart @ apart) if len(set(when)) > 1 else nan
    )
    return [values[-1], values.mean(), values.min(), values.max(), len(values), slope, -when[-1]]


def expected_labels(diagnoses):
    labels = {}
    for patient, index in INDEX.items():
        when = [day - index for p, day, code in diagnoses if (p, code) == (patient, "E11")]
        if any(day <= 0 for day in when):
            labels[patient] = None
        else:
            labels[patient] = int(any(day <= 365 for day in when))
    return labels


def same_bits(a, b):
    return np.array_equal(a.to_numpy().view(np.uint32), b.to_numpy().view(np.uint32))
