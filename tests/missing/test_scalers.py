"""Winsorising and scaling: what each does to values, gaps and odd columns."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.preprocessing import QuantileTransformer

from ehr_sn.missing import SCALERS, QuantileScaler, Winsoriser, make_scaler

every_scaler = pytest.mark.parametrize("scaler", SCALERS)
pytestmark = pytest.mark.filterwarnings("error")
nan = np.nan


def column(values):
    return np.asarray(values, dtype=float)[:, None]


@every_scaler
def test_a_missing_entry_stays_missing_and_an_observed_one_stays_observed(scaler):
    X = np.random.default_rng(0).normal(size=(60, 4))
    X[np.random.default_rng(1).random(X.shape) < 0.4] = nan
    np.testing.assert_array_equal(np.isnan(make_scaler(scaler).fit_transform(X)), np.isnan(X))


@every_scaler
def test_scaling_uses_observed_training_entries_only(scaler):
    values = np.random.default_rng(0).normal(size=50)
    gappy = column(np.concatenate([values, [nan] * 50]))
    new = column([-3.0, 0.0, 0.2, 3.0])
    np.testing.assert_allclose(
        make_scaler(scaler).fit(gappy).transform(new),
        make_scaler(scaler).fit(column(values)).transform(new),
        atol=0.01 if scaler == "quantile" else 0,  # its 100 or 50 stored quantiles differ
    )


@every_scaler
def test_a_column_never_observed_in_training_stays_missing_without_a_warning(scaler):
    fitted = make_scaler(scaler).fit([[1.0, nan], [2.0, nan]])
    out = fitted.transform([[1.5, 3.0]])
    assert np.isfinite(out[0, 0])
    assert np.isnan(out[0, 1])


def test_winsorising_clips_to_the_training_quantiles_and_keeps_gaps():
    train = column([*range(101), nan])
    out = Winsoriser(quantile=0.05).fit(train).transform(column([-1e9, 4, 50, 96, 1e9, nan]))
    np.testing.assert_allclose(out, column([5, 5, 50, 95, 95, nan]))


def test_winsorising_at_zero_changes_nothing_even_beyond_the_training_range():
    new = column([-1e300, -0.0, 1e300, nan])
    assert Winsoriser(quantile=0).fit([[1.0]]).transform(new).tobytes() == new.tobytes()


def test_winsorising_never_erases_a_flag_that_is_rarer_than_the_quantile():
    flag = column(np.arange(1000) == 7)
    np.testing.assert_array_equal(Winsoriser(quantile=0.005).fit_transform(flag), flag)


def test_winsorising_holds_a_constant_column_at_its_constant():
    fitted = Winsoriser().fit(column([0.1, nan, 0.1]))
    np.testing.assert_array_equal(
        fitted.transform(column([5.0, nan, -5.0])), column([0.1, nan, 0.1])
    )


@pytest.mark.parametrize("quantile", [-0.1, 0.5, nan])
def test_a_winsorising_quantile_outside_zero_to_one_half_is_refused(quantile):
    with pytest.raises(ValueError, match="quantile must be in"):
        Winsoriser(quantile=quantile).fit([[1.0]])


def test_minmax_keeps_later_rows_between_zero_and_one():
    out = make_scaler("minmax").fit(column([10, 20])).transform(column([-99, 15, 99, nan]))
    np.testing.assert_array_equal(out, column([0, 0.5, 1, nan]))


def test_standard_scores_have_mean_zero_and_deviation_one_over_observed_entries():
    out = make_scaler("standard").fit_transform(column([3, nan, 5, 13, nan, 1]))
    np.testing.assert_allclose([np.nanmean(out), np.nanstd(out)], [0, 1], atol=1e-12)


def test_quantile_scores_agree_with_scikit_learn_s_away_from_the_ends():
    X = np.random.default_rng(0).lognormal(size=(500, 3))
    peer = QuantileTransformer(n_quantiles=500, output_distribution="normal", subsample=None)
    low, high = X.min(axis=0), X.max(axis=0)
    inner = ((low < X) & (high > X)).all(axis=1)
    np.testing.assert_allclose(
        QuantileScaler().fit_transform(X)[inner], peer.fit_transform(X)[inner], rtol=1e-5, atol=1e-9
    )


def test_tied_entries_share_the_score_of_their_middle_rank():
    flag = column([0] * 900 + [1] * 100)
    out = np.unique(QuantileScaler().fit_transform(flag))
    np.testing.assert_allclose(out, norm.ppf([0.45, 0.95]), atol=0.01)


def test_quantile_scores_of_values_beyond_the_training_range_are_bounded():
    fitted = QuantileScaler().fit(np.random.default_rng(0).normal(size=(2000, 1)))
    np.testing.assert_allclose(
        fitted.transform(column([-1e9, 1e9])), column([-3.29, 3.29]), atol=0.01
    )


def test_at_least_one_quantile_is_needed():
    with pytest.raises(ValueError, match="n_quantiles must be at least 1"):
        QuantileScaler(n_quantiles=0).fit([[1.0]])


def test_an_error_about_many_infinite_columns_names_five():
    with pytest.raises(ValueError, match=r"in 2 of 2 rows, columns \[0, 1, 2, 3, 4\] and 3 more"):
        Winsoriser().fit(np.full((2, 8), np.inf))
