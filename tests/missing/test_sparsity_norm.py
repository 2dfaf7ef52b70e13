"""Sparsity Normalization does what its derivation promises, and has the limits it admits.

T1–T6 are the properties of docs/method.md; expectations are exact: they run over every subset.
"""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ehr_sn.missing import ConstantScaler, SparsityNormalizer, sparsity_normalize

N = 8
SIZES = range(1, N + 1)
RNG = np.random.default_rng(20200426)
X = RNG.normal(1.0, 2.0, N)
W = RNG.normal(size=N)


def masks_of_size(k, n=N):
    """Every mask with k of n entries observed."""
    return np.array([np.isin(np.arange(n), chosen) for chosen in combinations(range(n), k)])


def normalized(k, K, x=X, exponent=1.0):
    return sparsity_normalize(np.where(masks_of_size(k), x, np.nan), masks_of_size(k), K, exponent)


def zero_imputed(k):
    return np.where(masks_of_size(k), X, 0.0)


def rows_with_missing(dtype=np.float64):
    width = 64 if dtype == np.float64 else 32
    entries = st.floats(-1e6, 1e6, width=width) | st.just(float("nan"))
    return npst.arrays(dtype, npst.array_shapes(min_dims=2, max_dims=2), elements=entries)


@pytest.mark.parametrize("k", SIZES)
def test_t1_zero_imputation_scales_the_expected_output_by_how_much_was_observed(k):
    np.testing.assert_allclose((zero_imputed(k) @ W).mean(), k / N * (W @ X), rtol=1e-12)


@pytest.mark.parametrize("K", [1.0, 4.7, N])
@pytest.mark.parametrize("k", SIZES)
def test_t2_the_expected_linear_output_does_not_depend_on_how_much_was_observed(k, K):
    np.testing.assert_allclose((normalized(k, K) @ W).mean(), K / N * (W @ X), rtol=1e-12)


@pytest.mark.parametrize("K", [3.0, N])
@pytest.mark.parametrize("k", SIZES)
def test_t2_nor_does_that_of_a_deep_affine_network_with_biases(k, K):
    rng = np.random.default_rng(1)
    layers = [(rng.normal(size=(a, b)), rng.normal(size=b)) for a, b in [(N, 6), (6, 5), (5, 1)]]

    def network(rows):
        for weights, bias in layers:
            rows = rows @ weights + bias
        return rows

    np.testing.assert_allclose(
        network(normalized(k, K)).mean(axis=0), network(K / N * X), rtol=1e-10
    )


@pytest.mark.parametrize("k", SIZES)
def test_t3_the_variance_is_that_of_sampling_without_replacement(k):
    K, spread = 5.0, np.var(W * X, ddof=1)
    zero, sn = np.var(zero_imputed(k) @ W), np.var(normalized(k, K) @ W)
    np.testing.assert_allclose(zero, k * (1 - k / N) * spread, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(sn, K**2 * (1 - k / N) * spread / k, rtol=1e-10, atol=1e-12)


def test_t3_the_variance_falls_strictly_as_more_is_known_which_zero_imputation_does_not_achieve():
    assert (np.diff([np.var(normalized(k, N) @ W) for k in SIZES]) < 0).all()
    assert np.diff([np.var(zero_imputed(k) @ W) for k in SIZES])[0] > 0


@pytest.mark.parametrize("seed", range(5))
def test_t4_a_convex_network_s_expected_output_only_falls_as_more_is_known(seed):
    rng = np.random.default_rng(seed)
    hidden, bias, output = rng.normal(size=(N, 16)), rng.normal(size=16), rng.random(16)

    def network(rows):
        return np.maximum(rows @ hidden + bias, 0) @ output

    K = 4.0
    expected = np.array([network(normalized(k, K)).mean() for k in SIZES])
    assert (np.diff(expected) <= 1e-12).all()
    np.testing.assert_allclose(expected[-1], network(K / N * X), rtol=1e-12)
    assert expected[0] > expected[-1]  # a ReLU network is not invariant, and never claimed to be


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_t5_a_full_row_with_k_of_n_is_unchanged_bit_for_bit(dtype, exponent):
    rows = np.vstack([RNG.normal(size=(50, N)), [[0.0, -0.0, 5e-324, 1e-40, 1e30, -1e30, 3, 0.1]]])
    rows = rows.astype(dtype)
    out = SparsityNormalizer(k="features", exponent=exponent).fit_transform(rows)
    assert out.tobytes() == rows.tobytes()


@given(rows_with_missing(), st.randoms(use_true_random=False), st.floats(0, 1))
def test_t5_permuting_features_permutes_the_output(rows, random, exponent):
    order = random.sample(range(rows.shape[1]), rows.shape[1])
    sn = SparsityNormalizer(exponent=exponent)
    np.testing.assert_array_equal(
        sn.fit_transform(rows[:, order]), sn.fit_transform(rows)[:, order]
    )


@pytest.mark.parametrize("k", ["mean", "features", 2.5])
def test_t5_a_row_with_nothing_observed_becomes_zeros_even_in_a_training_set_of_such_rows(k):
    out = SparsityNormalizer(k=k).fit_transform(np.full((3, 4), np.nan))
    np.testing.assert_array_equal(out, np.zeros((3, 4)))


def test_t6_limit_unequal_missing_rates_leave_a_bias_that_differs_by_feature():
    rates = np.array([0.95, 0.9, 0.8, 0.6, 0.5, 0.3, 0.2, 0.1])
    masks = np.vstack([masks_of_size(k) for k in range(N + 1)])
    probability = np.where(masks, rates, 1 - rates).prod(axis=1)
    K = rates.sum()
    expected_factor = probability @ sparsity_normalize(masks.astype(float), masks, K)
    assert (np.diff(expected_factor) < 0).all()  # the rarer a feature is measured, the smaller
    assert expected_factor[0] > 0.9 > 0.15 > expected_factor[-1]


@pytest.mark.parametrize("k", SIZES)
def test_t6_limit_on_zero_mean_data_the_variance_of_sparse_rows_is_inflated(k):
    K, x = 4.0, np.array([1.0, -1.0] * (N // 2))
    observed = masks_of_size(k)
    np.testing.assert_allclose(np.var(x), 1.0)
    np.testing.assert_allclose(
        (normalized(k, K, x)[observed] ** 2).mean(), (K / k) ** 2, rtol=1e-12
    )


@pytest.mark.parametrize("k", SIZES)
def test_an_exponent_of_one_half_keeps_the_expected_squared_length_of_a_row(k):
    squares = (normalized(k, 3.0, exponent=0.5) ** 2).sum(axis=1)
    np.testing.assert_allclose(squares.mean(), 3.0 / N * (X**2).sum(), rtol=1e-12)


def test_an_exponent_of_zero_is_zero_imputation():
    np.testing.assert_array_equal(normalized(3, 5.0, exponent=0.0), zero_imputed(3))


def test_an_observed_zero_counts_as_observed():
    out = SparsityNormalizer(k=2).fit_transform([[0.0, 6.0, np.nan], [np.nan, 6.0, np.nan]])
    np.testing.assert_array_equal(out, [[0.0, 6.0, 0.0], [0.0, 12.0, 0.0]])


def test_k_is_the_mean_number_of_observed_entries_in_training_and_stays_so_in_scoring():
    nan = np.nan
    sn = SparsityNormalizer().fit([[1, 2, 3], [1, nan, nan], [nan, nan, nan], [1, 2, nan]])
    assert sn.k_ == 6 / 4
    sn.transform([[1, 2, 3]])
    assert sn.k_ == 6 / 4
    assert SparsityNormalizer(k="features").fit([[1, nan, nan]]).k_ == 3
    assert SparsityNormalizer(k=7).fit([[1, nan, nan]]).k_ == 7


def test_k_is_one_when_nothing_was_ever_observed():
    assert SparsityNormalizer().fit(np.full((2, 3), np.nan)).k_ == 1


def test_the_mask_is_appended_unscaled():
    out = SparsityNormalizer(k=6, add_mask=True).fit_transform([[5.0, np.nan, 0.0]])
    np.testing.assert_array_equal(out, [[15.0, 0.0, 0.0, 1.0, 0.0, 1.0]])


@given(rows_with_missing(np.float32), st.floats(0.01, 100), st.floats(0, 1))
def test_the_function_and_the_estimator_agree_in_either_dtype(rows, k, exponent):
    out = SparsityNormalizer(k=k, exponent=exponent).fit_transform(rows)
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out, sparsity_normalize(rows, ~np.isnan(rows), k, exponent))


def test_the_function_takes_any_leading_dimensions_and_integers():
    x, observed = RNG.integers(1, 9, (2, 3, 5)), RNG.random((2, 3, 5)) < 0.5
    out = sparsity_normalize(x, observed, 5)
    assert out.dtype == np.float64
    np.testing.assert_array_equal(out[1, 2], sparsity_normalize(x[1, 2], observed[1, 2], 5))


@pytest.mark.parametrize("k", ["median", "", 0, -1.0, np.nan, np.inf, None])
def test_a_k_that_is_no_positive_number_is_refused(k):
    with pytest.raises(ValueError, match="k must be a positive number"):
        SparsityNormalizer(k=k).fit([[1.0]])


@pytest.mark.parametrize("exponent", [-0.1, 1.1, np.nan])
def test_an_exponent_outside_zero_to_one_is_refused(exponent):
    with pytest.raises(ValueError, match="exponent must be in"):
        SparsityNormalizer(exponent=exponent).fit([[1.0]])


def test_a_constant_scale_is_sparsity_normalization_that_does_not_count() -> None:
    rows = np.array([[3.0, 6.0, np.nan], [5.0, np.nan, np.nan], [1.0, 2.0, 3.0]])
    constant = ConstantScaler().fit(rows).transform(rows)
    counted = SparsityNormalizer(k=1).fit(rows).transform(rows)
    assert constant[0] == pytest.approx(counted[0])  # it holds as many entries as the mean row
    assert (constant[1] < counted[1]).sum() == 1
    assert (constant[2] > counted[2]).all()
