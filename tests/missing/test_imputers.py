"""Each imputer beside an independent implementation, or a case whose answer is known."""

import warnings

import numpy as np
import pytest
from sklearn.ensemble import RandomForestRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from sklearn.linear_model import BayesianRidge

from ehr_sn.missing import (
    GainImputer,
    MiceImputer,
    MissForestImputer,
    MostFrequentImputer,
    MultipleImputer,
    NearestNeighboursImputer,
    SoftImputer,
    soft_impute,
)

nan = np.nan


def correlated(n=300, p=6, missing=0.3, seed=0):
    """Complete rows of two latent factors and some noise, and the same rows with gaps."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 2)) @ rng.normal(size=(2, p)) + 0.3 * rng.normal(size=(n, p))
    return X, np.where(rng.random(X.shape) < missing, nan, X)


def scored(X, fitted):
    """z-scores of the columns, as the method takes them inwardly."""
    return (X - fitted.centre_) / fitted.scale_


def error(imputed, X, gappy):
    """Root mean squared error where entries were missing, in standard deviations."""
    wrong = (imputed - X) / X.std(axis=0)
    return float(np.sqrt(np.square(wrong[np.isnan(gappy)]).mean()))


def test_most_frequent_is_scikit_learn_s():
    X = np.random.default_rng(0).integers(0, 4, (50, 3)).astype(float)
    X[::3, 1] = nan
    ours = MostFrequentImputer().fit(X)
    assert (
        ours.transform(X).tolist()
        == SimpleImputer(strategy="most_frequent").fit_transform(X).tolist()
    )
    assert MostFrequentImputer().fit([[3.0], [1.0]]).fill_.tolist() == [1]  # a tie: the smallest


def test_knn_is_scikit_learn_s_on_z_scores():
    _, train = correlated(seed=1)
    _, new = correlated(n=80, seed=2)
    knn = NearestNeighboursImputer(k=7).fit(train)
    peer = KNNImputer(n_neighbors=7).fit(scored(train, knn))
    np.testing.assert_allclose(
        scored(knn.transform(new), knn), peer.transform(scored(new, knn)), atol=1e-10
    )


def test_knn_without_any_donor_gives_the_training_mean():
    knn = NearestNeighboursImputer().fit([[1.0, nan], [3.0, nan], [nan, 5.0], [nan, 9.0]])
    assert knn.transform([[2.0, nan]]).tolist() == [[2, 7]]  # nobody has both columns


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_mice_is_scikit_learn_s_on_z_scores(missing):
    _, train = correlated(seed=1, missing=missing)
    _, new = correlated(n=80, seed=2)
    mice = MiceImputer(rounds=4).fit(train)
    peer = IterativeImputer(
        BayesianRidge(), max_iter=4, min_value=mice.low_, max_value=mice.high_, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        peer.fit(scored(train, mice))
    np.testing.assert_allclose(
        scored(mice.transform(new), mice), peer.transform(scored(new, mice)), atol=1e-10
    )


def test_missforest_is_scikit_learn_s_on_z_scores():
    _, train = correlated(n=150, seed=1)
    _, new = correlated(n=80, seed=2)
    forest = MissForestImputer(trees=4, rounds=2).fit(train)
    peer = IterativeImputer(
        RandomForestRegressor(
            4, max_depth=8, min_samples_leaf=5, max_features="sqrt", random_state=0
        ),
        max_iter=2,
        min_value=forest.low_,
        max_value=forest.high_,
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        peer.fit(scored(train, forest))
    np.testing.assert_allclose(
        scored(forest.transform(new), forest), peer.transform(scored(new, forest)), atol=1e-10
    )


@pytest.mark.parametrize("method", [MiceImputer, MissForestImputer])
def test_a_wide_table_takes_a_bounded_number_of_predictors(method):
    X, train = correlated(n=120, p=25)
    fitted = method(n_nearest_features=12, rounds=1, tol=0).fit(train)
    assert fitted.predictors_.shape == (25, 12)
    assert error(fitted.transform(train), X, train) < 0.8
    alone = np.vstack([fitted.transform(row[None]) for row in train])
    assert alone.tobytes() == fitted.transform(train).tobytes()


def test_draws_have_the_spread_of_the_posterior_prediction():
    """Two normal variables: missing y given x is normal, its mean and variance known."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=2000)
    y = 0.6 * x + 0.8 * rng.normal(size=2000)
    train = np.column_stack([x, np.where(np.arange(2000) % 2, y, nan)])
    new = np.column_stack([x, np.full(2000, nan)])
    draws = np.stack([MultipleImputer(draw=d).fit(train).transform(new)[:, 1] for d in range(4)])
    residuals = draws - 0.6 * x
    assert residuals.std() == pytest.approx(0.8, abs=0.05)
    assert abs(residuals.mean()) < 0.1
    assert np.abs(np.corrcoef(residuals) - np.eye(4)).max() < 0.1
    mean = MiceImputer().fit(train).transform(new)[:, 1]
    assert np.abs(mean - 0.6 * x).max() < 0.25


def test_a_row_gets_the_same_draw_wherever_it_stands():
    _, train = correlated(seed=1)
    draw = MultipleImputer(draw=3).fit(train)
    shuffled = np.random.default_rng(0).permutation(len(train))
    assert (draw.transform(train[shuffled]) == draw.transform(train)[shuffled]).all()


def objective(Z, L, penalty):
    seen = ~np.isnan(Z)
    nuclear = np.linalg.svd(L, compute_uv=False).sum()
    return np.square(Z - L)[seen].sum() / 2 + penalty * nuclear


def test_softimpute_of_a_complete_table_soft_thresholds_its_singular_values():
    Z, _ = correlated(n=40)
    U, s, Vt = np.linalg.svd(Z, full_matrices=False)
    low, _ = soft_impute(Z, 3.0)
    np.testing.assert_allclose(low, (U * np.maximum(s - 3, 0)) @ Vt, atol=1e-8)


def test_softimpute_is_the_paper_s_algorithm_and_its_objective_never_rises():
    _, Z = correlated(n=60)
    plain, values = np.zeros(Z.shape), []
    for iteration in range(30):
        U, s, Vt = np.linalg.svd(np.where(np.isnan(Z), plain, Z), full_matrices=False)
        plain = (U * np.maximum(s - 2, 0)) @ Vt
        low, _ = soft_impute(Z, 2.0, max_iter=iteration + 1, tol=0)
        np.testing.assert_allclose(low, plain, atol=1e-8)
        values.append(objective(Z, low, 2.0))
    assert (np.diff(values) < 1e-9).all()


def test_a_training_row_is_completed_as_in_the_matrix_found():
    _, train = correlated(n=100)
    fitted = SoftImputer().fit(train)
    Z = scored(train, fitted)
    low, loadings = soft_impute(Z, fitted.penalty_, tol=1e-14, max_iter=5000)
    fitted.loadings_ = loadings
    gaps = np.isnan(train)
    expected = np.clip(low, fitted.low_, fitted.high_)
    np.testing.assert_allclose(
        scored(fitted.transform(train), fitted)[gaps], expected[gaps], atol=1e-4
    )


def test_softimpute_recovers_a_low_rank_table():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 2)) @ rng.normal(size=(2, 10))
    gappy = np.where(rng.random(X.shape) < 0.3, nan, X)
    fitted = SoftImputer().fit(gappy)
    assert error(fitted.transform(gappy), X, gappy) < 0.2


def test_gain_recovers_a_linear_relation_in_unseen_rows_better_than_the_mean():
    rng = np.random.default_rng(0)
    x = rng.normal(size=2400)
    X = np.column_stack([x, -2 * x, 0.5 * x, rng.normal(size=2400)])
    gappy = X.copy()
    gappy[np.arange(2400), rng.integers(0, 3, 2400)] = nan
    gain = GainImputer(epochs=60, alpha=10, hint_rate=0.5).fit(gappy[:1900])
    assert error(gain.transform(gappy[1900:]), X[1900:], gappy[1900:]) < 0.8  # the mean's is 1


def test_gain_gives_the_same_bits_again():
    _, train = correlated(n=100)
    one, two = (GainImputer(epochs=2).fit(train).transform(train) for _ in range(2))
    assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("method", [MiceImputer, MissForestImputer, NearestNeighboursImputer])
def test_a_sample_of_the_training_rows_bounds_the_fit(method):
    X, train = correlated(n=400)
    fitted = method(max_rows=100).fit(train)
    assert error(fitted.transform(train), X, train) < 0.8
    np.testing.assert_allclose(fitted.fill_, np.nanmean(train, axis=0))  # of all rows
