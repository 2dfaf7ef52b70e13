"""Risks and weights under censoring, beside lifelines and beside the truth of a simulation."""

import warnings

import numpy as np
import pandas as pd
import pytest

from ehr_sn.survival import (
    DIED,
    ILL,
    LEFT,
    _cox,
    _standardised,
    censoring_weights,
    cumulative_incidence,
    status_of,
    still_followed,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lifelines import AalenJohansenFitter, CoxPHFitter, KaplanMeierFitter

HORIZON = 20.0


def cohort(n: int, *, whole_days: bool = True, informative: bool = True, seed: int = 0):
    """Covariates, days and labels; illness and leaving depend on the first covariate."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    ill = rng.exponential(30 / np.exp(0.5 * x[:, 0]))
    died = rng.exponential(80, n)
    left = rng.exponential(25 / np.exp((0.8 * x[:, 0] - 0.3 * x[:, 1]) * informative))
    if whole_days:
        ill, died, left = np.ceil(ill), np.ceil(died), np.ceil(left)
    days = np.minimum.reduce([ill, died, left, np.full(n, HORIZON)])
    is_ill = (ill <= HORIZON) & (ill <= left) & (ill <= died)
    is_well = (left >= HORIZON) | ((died <= left) & (died <= HORIZON))
    label = np.select([is_ill, is_well], [1.0, 0.0], np.nan)
    return x, days, label, ((ill <= HORIZON) & (ill <= died)).mean()


def test_cumulative_incidence_is_that_of_aalen_and_johansen():
    _, days, label, truth = cohort(2000)
    status = status_of(days, label, HORIZON)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it breaks ties by chance; a jitter of 0 leaves them
        fitted = AalenJohansenFitter(calculate_variance=False, jitter_level=0.0).fit(
            days, status, event_of_interest=ILL
        )
    risk = cumulative_incidence(days, status, HORIZON)
    assert risk == pytest.approx(float(fitted.cumulative_density_.iloc[-1, 0]), abs=1e-12)
    assert (
        abs(cumulative_incidence(*_of(cohort(40_000, informative=False)), HORIZON) - truth) < 0.02
    )


def _of(made):
    _, days, label, _ = made
    return days, status_of(days, label, HORIZON)


def test_without_deaths_it_is_one_less_kaplan_meier():
    _, days, label, _ = cohort(2000)
    status = status_of(days, label, HORIZON)
    naive = np.where(status == DIED, LEFT, status)
    fitted = KaplanMeierFitter().fit(days, status == ILL)
    expected = 1 - float(fitted.survival_function_.iloc[-1, 0])
    assert cumulative_incidence(days, naive, HORIZON) == pytest.approx(expected, abs=1e-12)
    assert cumulative_incidence(days, status, HORIZON) < expected  # the dead do not fall ill


def test_share_still_followed_is_kaplan_meiers_just_before_each_time():
    _, days, label, _ = cohort(2000)
    status = status_of(days, label, HORIZON)
    left = (status == LEFT) & (days < HORIZON)
    fitted = KaplanMeierFitter().fit(
        days + 1e-6 * left, left
    )  # who leaves comes after who falls ill
    at = np.unique(days)
    expected = fitted.survival_function_at_times(at - 1e-9).to_numpy()
    np.testing.assert_allclose(still_followed(days, status, HORIZON, at), expected, atol=1e-12)


def test_leaving_by_covariates_is_coxs_model():
    x, days, label, _ = cohort(3000, whole_days=False)
    left = np.isnan(label)
    z = _standardised(x, np.full(len(x), True))
    b, times, hazard = _cox(z, days, left)
    table = pd.DataFrame(z, columns=["a", "b"]).assign(days=days, left=left)
    fitted = CoxPHFitter(baseline_estimation_method="breslow").fit(table, "days", "left")
    np.testing.assert_allclose(b, fitted.params_, atol=0.002)  # ours has a ridge of one row
    baseline = fitted.baseline_cumulative_hazard_.loc[times[-1]].item()
    centre = np.exp(-z.mean(axis=0) @ b)
    assert hazard.sum() == pytest.approx(baseline * centre, rel=0.01)


def test_weighted_rate_is_the_true_risk_where_leaving_is_at_random():
    _, days, label, truth = cohort(60_000, informative=False)
    every = np.full(len(days), True)
    weight = censoring_weights(days, label, HORIZON, every)
    assert np.nanmean(label) > 1.1 * truth  # what is left of them, unweighted
    assert np.average(label == 1, weights=weight) == pytest.approx(truth, rel=0.02)
    assert weight.sum() == pytest.approx(len(days), rel=0.02)


def test_weights_by_covariates_mend_what_kaplan_meiers_cannot():
    x, days, label, truth = cohort(60_000)
    every = np.full(len(days), True)
    alike = np.average(label == 1, weights=censoring_weights(days, label, HORIZON, every))
    by_covariates = censoring_weights(days, label, HORIZON, every, x)
    assert abs(alike / truth - 1) > 0.04
    assert np.average(label == 1, weights=by_covariates) == pytest.approx(truth, rel=0.02)


def test_kaplan_meiers_weighted_rate_is_aalen_and_johansens_risk():
    """The two are the same estimate, written in two ways (Satten and Datta, 2001)."""
    _, days, label, _ = cohort(2000)
    every = np.full(len(days), True)
    weight = censoring_weights(days, label, HORIZON, every)
    risk = cumulative_incidence(days, status_of(days, label, HORIZON), HORIZON)
    assert (weight * (label == 1)).sum() / len(days) == pytest.approx(risk, abs=1e-12)


def test_rows_that_were_never_at_risk_count_for_nothing():
    days, label = np.array([1.0, np.nan, 4.0, 4.0]), np.array([1.0, np.nan, 0.0, 0.0])
    weight = censoring_weights(days, label, 4.0, np.full(4, True))
    np.testing.assert_array_equal(weight, [1, 0, 1, 1])


def test_leaving_is_learned_from_the_rows_to_fit_alone():
    _, days, label, _ = cohort(4000)
    fit = np.arange(4000) < 2000
    whole = censoring_weights(days, label, HORIZON, fit)
    changed = np.where(fit, days, np.minimum(days, 1.0))
    np.testing.assert_array_equal(censoring_weights(changed, label, HORIZON, fit)[fit], whole[fit])


def test_covariates_may_have_gaps():
    x, days, label, truth = cohort(40_000)
    x[np.random.default_rng(1).random(len(x)) < 0.3, 1] = np.nan
    weight = censoring_weights(days, label, HORIZON, np.full(len(x), True), x)
    assert np.isfinite(weight).all()
    assert np.average(label == 1, weights=weight) == pytest.approx(truth, rel=0.03)


def test_covariates_that_say_nothing_change_nothing_where_many_leave_on_one_day():
    rng = np.random.default_rng(3)
    ill, left = np.ceil(rng.exponential(6, 20_000)), np.ceil(rng.exponential(4, 20_000))
    days = np.minimum.reduce([ill, left, np.full(20_000, 7.0)])
    label = np.select([(ill <= 7) & (ill <= left), left >= 7], [1.0, 0.0], np.nan)
    every = np.full(20_000, True)
    alike = censoring_weights(days, label, 7.0, every)
    constant = censoring_weights(days, label, 7.0, every, np.ones((20_000, 1)))
    np.testing.assert_allclose(constant, alike, rtol=1e-9)


def test_covariates_without_an_entry_to_fit_and_far_beyond_them_leave_finite_weights():
    x, days, label, _ = cohort(2000)
    fit = np.arange(2000) < 1000
    x[fit, 1] = np.nan
    x[~fit, 0] *= 1e6
    weight = censoring_weights(days, label, HORIZON, fit, x)
    assert np.isfinite(weight).all()
    assert weight.max() <= 20
