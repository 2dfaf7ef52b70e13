"""A row that stands for k rows counts as if it were there k times."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import expit
from sklearn.metrics import brier_score_loss, roc_auc_score

from ehr_sn.evaluate.clinical import decision_curve, operating_points
from ehr_sn.evaluate.diagnostics import sparsity_bias
from ehr_sn.evaluate.metrics import auroc, brier, calibration, summarise
from ehr_sn.evaluate.plots import binned_calibration
from ehr_sn.evaluate.statistics import delong, paired_bootstrap, paired_delong
from ehr_sn.scoring.calibrate import CalibrationMap


@pytest.fixture
def rows():
    """Labels, two probabilities, whole weights, and the places that write the weights out."""
    rng = np.random.default_rng(0)
    y = rng.random(300) < 0.3
    a, b = (expit((rng.normal(size=300) + y).round(1) - 1.5) for _ in range(2))
    weight = rng.integers(1, 5, 300)
    return y, a, b, weight.astype(float), np.repeat(np.arange(300), weight)


def test_metrics(rows):
    y, a, _, weight, written = rows
    weighted, out = summarise(y, a, weight), summarise(y[written], a[written])
    assert weighted == pytest.approx(out, rel=1e-9)
    assert auroc(y, a, weight) == pytest.approx(roc_auc_score(y, a, sample_weight=weight))
    assert brier(y, a, weight) == pytest.approx(brier_score_loss(y, a, sample_weight=weight))


def test_areas_of_many_predictions_at_once(rows):
    y, a, b, weight, _ = rows
    many = auroc(y, np.stack([[a, b], [b, -a]]), weight)
    assert many.shape == (2, 2)
    assert_allclose(many, [[auroc(y, a, weight), auroc(y, b, weight)],
                           [auroc(y, b, weight), 1 - auroc(y, a, weight)]])  # fmt: skip


def test_intervals_are_those_of_the_rows_that_are_there(rows):
    """Rows that stand for others are not more rows: the interval does not narrow."""
    y, a, b, weight, written = rows
    found = delong(y, a, None, weight)
    as_subjects = delong(y[written], a[written], written)
    assert found.value == pytest.approx(as_subjects.value)
    assert found.se == pytest.approx(as_subjects.se, rel=1e-9)
    assert found.n == 300
    paired = paired_delong(y, a, b, None, weight)
    assert paired.se == pytest.approx(paired_delong(y[written], a[written], b[written], written).se)
    drawn = paired_bootstrap(y, a, b, None, weight, draws=2000)
    assert drawn.difference == pytest.approx(paired.difference)
    assert drawn.ci_high - drawn.ci_low == pytest.approx(paired.ci_high - paired.ci_low, rel=0.1)


def test_a_weight_of_one_changes_nothing(rows):
    y, a, b, *_ = rows
    one = np.ones(300)
    assert delong(y, a, None, one).se == pytest.approx(delong(y, a).se, rel=1e-12)
    assert paired_delong(y, a, b, None, one).p == pytest.approx(paired_delong(y, a, b).p, rel=1e-9)
    assert calibration(y, a, one) == pytest.approx(calibration(y, a))


def test_what_clinicians_ask(rows):
    y, a, b, weight, written = rows
    weighted = decision_curve([(y, a, None, weight)])
    out = decision_curve([(y[written], a[written], written)])
    for name in ("model", "low", "high", "treat_all"):
        at = np.interp(weighted.threshold, out.threshold, getattr(out, name))
        assert_allclose(getattr(weighted, name), at, atol=0.02)
    split, copied = (y, b, None, weight), (y[written], b[written], written)
    for mine, other in zip(
        operating_points([split], [(y, a, None, weight)], [0.9, 0.5]),
        operating_points([copied], [(y[written], a[written], written)], [0.9, 0.5]),
        strict=True,
    ):
        assert mine.threshold == other.threshold
        assert mine.alerts_per_1000 == pytest.approx(other.alerts_per_1000)
        for name in ("sensitivity", "specificity", "ppv", "npv"):
            assert getattr(mine, name).value == pytest.approx(getattr(other, name).value)


def test_calibration_and_bias(rows):
    y, a, _, weight, written = rows
    mine, out = CalibrationMap.fit(y, a, weight), CalibrationMap.fit(y[written], a[written])
    assert (mine.slope, mine.intercept) == pytest.approx((out.slope, out.intercept), rel=1e-4)
    observed = np.random.default_rng(1).integers(1, 9, 300)
    ours = sparsity_bias([(y, a, observed, None, weight)])
    assert np.isfinite([ours.unexplained_low, ours.unexplained_high]).all()
    predicted, seen = binned_calibration(y, a, None, weight, bins=1)
    assert predicted == pytest.approx(np.average(a, weights=weight))
    assert seen == pytest.approx(np.average(y, weights=weight))


@pytest.mark.parametrize("wrong", [[0.0], [-1.0], [np.nan], [np.inf]])
def test_weights_that_count_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="number above 0"):
        auroc([0, 1, 1], [0.1, 0.2, 0.3], [1.0, 1.0, *wrong])


def test_weights_of_other_rows_are_refused():
    with pytest.raises(ValueError, match="weight has shape"):
        auroc([0, 1, 1], [0.1, 0.2, 0.3], [1.0, 1.0])
