import warnings

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from ehr_sn.evaluate.metrics import auprc, auroc, brier, calibration, summarise

ONE_CLASS_MATTERS = [auroc, auprc, calibration, summarise]


def outcomes(rng, n, *, base=-1.0, spread=1.2):
    """Labels drawn from true probabilities, and those probabilities."""
    p = expit(base + spread * rng.normal(size=n))
    return (rng.random(n) < p).astype(np.int8), p


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_is_scikit_learns_with_many_ties_or_few(levels):
    rng = np.random.default_rng(levels)
    y = rng.integers(0, 2, 300)
    score = rng.integers(0, levels, 300) + y
    assert auroc(y, score) == pytest.approx(roc_auc_score(y, score), abs=1e-14)


def test_auroc_of_many_predictions_at_once_is_that_of_each_alone():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    scores = rng.normal(size=(3, 4, 200)).round(1)
    together = auroc(y, scores)
    assert together.shape == (3, 4)
    alone = [[roc_auc_score(y, score) for score in row] for row in scores]
    assert_allclose(together, alone, rtol=1e-14)


def test_auroc_depends_on_ranks_alone_and_flips_with_the_score():
    rng = np.random.default_rng(1)
    y, p = outcomes(rng, 500)
    assert auroc(y, p) == auroc(y, logit(p)) == auroc(y, np.exp(20 * p))
    assert auroc(y, -p) == pytest.approx(1 - auroc(y, p), abs=1e-15)


def test_a_constant_prediction_has_auroc_one_half_and_auprc_the_prevalence():
    y = np.arange(40) % 4 == 0
    assert auroc(y, np.full(40, 0.3)) == 0.5
    assert auprc(y, np.full(40, 0.3)) == 0.25


def test_labels_may_be_booleans_integers_floats_or_a_pandas_series():
    y, p = outcomes(np.random.default_rng(2), 100)
    kinds = [y, y.astype(bool), y.astype(float), y.tolist(), pd.Series(y, index=range(100, 0, -1))]
    assert len({float(auroc(kind, p)) for kind in kinds}) == 1


def test_auprc_and_brier_are_scikit_learns():
    y, p = outcomes(np.random.default_rng(3), 400)
    p = p.round(2)
    assert auprc(y, p) == pytest.approx(average_precision_score(y, p))
    assert brier(y, p) == pytest.approx(brier_score_loss(y, p))
    assert_allclose(brier(y, np.stack([p, 1 - p])), [brier(y, p), brier(y, 1 - p)])


def test_true_probabilities_have_slope_one_and_intercept_zero():
    y, p = outcomes(np.random.default_rng(4), 200_000)
    slope, intercept = calibration(y, p)
    assert slope == pytest.approx(1, abs=0.02)
    assert intercept == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("stretch", [0.5, 2.0])
def test_slope_recovers_how_far_the_logits_were_stretched(stretch):
    y, p = outcomes(np.random.default_rng(5), 200_000)
    assert calibration(y, expit(stretch * logit(p))).slope == pytest.approx(1 / stretch, rel=0.02)


@pytest.mark.parametrize("shift", [-1.0, 0.7])
def test_intercept_recovers_how_far_the_logits_were_shifted_and_slope_does_not_move(shift):
    y, p = outcomes(np.random.default_rng(6), 200_000)
    shifted = calibration(y, expit(logit(p) + shift))
    assert shifted.intercept == pytest.approx(-shift, abs=0.02)
    assert shifted.slope == pytest.approx(calibration(y, p).slope, rel=1e-6)


def test_intercept_is_calibration_in_the_large_not_that_of_the_slopes_model():
    y, p = outcomes(np.random.default_rng(7), 5_000, base=-3)
    overfitted = expit(2.5 * logit(p))
    lp = logit(overfitted)
    intercept = calibration(y, overfitted).intercept
    assert expit(lp + intercept).mean() == pytest.approx(y.mean(), abs=1e-6)
    with_slope = LogisticRegression(C=np.inf, tol=1e-10).fit(lp[:, None], y)
    assert abs(with_slope.intercept_[0] - intercept) > 0.5


@pytest.mark.parametrize("seed", range(5))
def test_slope_is_that_of_an_unpenalised_logistic_regression(seed):
    rng = np.random.default_rng(seed)
    y, p = outcomes(rng, 150, base=rng.normal(-2, 1))
    p = expit(rng.normal(1, 0.5) * logit(p) + rng.normal())
    fit = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12)
    fit.fit(logit(p)[:, None], y)
    assert calibration(y, p).slope == pytest.approx(fit.coef_[0, 0], rel=1e-6)


@pytest.mark.parametrize(
    "p",
    [[0.3, 0.3, 0.3, 0.3], [0.1, 0.2, 0.7, 0.8], [0.8, 0.7, 0.2, 0.1], [0.0, 0.0, 1.0, 1.0]],
    ids=["constant", "separated", "separated the wrong way", "certain"],
)
def test_a_slope_that_does_not_exist_is_nan_without_a_warning(p):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slope, intercept = calibration([0, 0, 1, 1], p)
    assert np.isnan(slope)
    assert np.isfinite(intercept)


def test_probabilities_of_exactly_zero_and_one_are_survived():
    y, p = outcomes(np.random.default_rng(8), 1000)
    p[p < 0.1], p[p > 0.9] = 0.0, 1.0
    assert np.isfinite(list(summarise(y, p).values())).all()


def test_summary_holds_every_metric_as_a_plain_float():
    y, p = outcomes(np.random.default_rng(9), 300)
    summary = summarise(y, p)
    assert list(summary) == [
        "auroc",
        "auprc",
        "brier",
        "calibration_slope",
        "calibration_intercept",
    ]
    assert {type(value) for value in summary.values()} == {float}
    assert summary["auroc"] == auroc(y, p)
    assert summary["calibration_slope"] == calibration(y, p).slope


@pytest.mark.parametrize("metric", ONE_CLASS_MATTERS)
@pytest.mark.parametrize("label", [0, 1])
def test_one_class_is_an_error_that_says_what_to_do(metric, label):
    with pytest.raises(ValueError, match=r"only one class among 5 labels.*stratify"):
        metric([label] * 5, np.linspace(0.1, 0.9, 5))


def test_no_subjects_at_all_is_an_error():
    with pytest.raises(ValueError, match="only one class among 0 labels"):
        auroc([], [])


@pytest.mark.parametrize("metric", [*ONE_CLASS_MATTERS, brier])
@pytest.mark.parametrize(
    ("y", "p", "message"),
    [
        ([0, 1, np.nan], [0.123, 0.2, 0.3], "1 of 3 labels is not: leave out"),
        ([0, 1, 2], [0.123, 0.2, 0.3], "1 of 3 labels is not"),
        ([0, 1, 1], [0.123, 0.2, np.nan], "1 of 3 scores are NaN"),
        ([0, 1, 1], [0.123, 0.2], r"y has shape \(3,\) and the scores \(2,\)"),
        ([[0, 1]], [[0.123, 0.2]], r"y has shape \(1, 2\)"),
    ],
)
def test_labels_and_scores_that_cannot_be_used_are_refused_without_naming_a_value(
    metric, y, p, message
):
    with pytest.raises(ValueError, match=message) as error:
        metric(y, p)
    assert "0.123" not in str(error.value)


@pytest.mark.parametrize("metric", [auprc, calibration, summarise])
def test_what_takes_one_prediction_refuses_many(metric):
    with pytest.raises(ValueError, match=r"scores of shape \(n,\)"):
        metric([0, 1, 1], [[0.1, 0.2, 0.3]] * 2)


@pytest.mark.parametrize("metric", [brier, calibration, summarise])
def test_logits_in_place_of_probabilities_are_refused(metric):
    with pytest.raises(ValueError, match="2 of 3 values of p are outside"):
        metric([0, 1, 1], [-2.0, 0.4, 3.0])
