"""What every registered method promises, on its own and after every scaler.

A new entry of METHODS or SCALERS is tested here by being registered.
"""

from functools import cache

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors import numpy as safetensors
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from ehr_sn.missing import (
    METHODS,
    SCALERS,
    MissingMethod,
    get_state,
    make_method,
    make_scaler,
    method_names,
    register,
    set_state,
)

NEVER, CONSTANT, FLAG, COMPLETE = 4, 5, 6, 7  # columns of `rows`; 0 to 3 are ordinary
EMPTY_ROW = 3
N_FEATURES = 8

SLOW = {
    "mice",
    "multiple_imputation",
    "missforest",
    "gain",
    "sparse_autoencoder",
}  # to fit: after one scaler only


def is_slow(name):
    return name.removesuffix("+mask") in SLOW


every_method = pytest.mark.parametrize("name", METHODS)
every_method_and_scaler = pytest.mark.parametrize(
    ("name", "scaler"),
    [(name, s) for name in METHODS for s in SCALERS if s == "standard" or not is_slow(name)],
)
every_dtype = pytest.mark.parametrize("dtype", [np.float64, np.float32])

pytestmark = pytest.mark.filterwarnings("error")


def rows(n=60, seed=0, dtype=np.float64):
    """Skewed and gappy, with a column never observed, a constant, a rare flag, an empty row."""
    rng = np.random.default_rng(seed)
    X = rng.lognormal(1.0, 1.0, (n, N_FEATURES))
    X[:, CONSTANT] = 0.1
    X[:, FLAG] = np.arange(n) == n - 1
    X[rng.random(X.shape) < 0.35] = np.nan
    X[:, NEVER] = np.nan
    X[:, COMPLETE] = rng.normal(size=n)
    X[-1, FLAG], X[-2, FLAG] = 1.0, 0.0
    X[EMPTY_ROW] = np.nan
    return X.astype(dtype)


@cache
def fitted(name, scaler, dtype=np.float64):
    """Shared by tests; none may change it (`transform` must not, which is tested)."""
    return make_method(name, scaler).fit(rows(dtype=dtype))


def mask_of(out):
    return out[:, -N_FEATURES:]


@parametrize_with_checks(
    [make() for name, make in METHODS.items() if not (is_slow(name) and name.endswith("+mask"))]
    + [make_scaler(name) for name in SCALERS]
)
def test_scikit_learn_s_own_checks_pass(estimator, check):
    check(estimator)


@every_method_and_scaler
@every_dtype
def test_output_is_finite_of_the_input_s_dtype_and_wider_by_the_mask(name, scaler, dtype):
    out = fitted(name, scaler, dtype).transform(rows(seed=1, dtype=dtype))
    plain = fitted(name.removesuffix("+mask"), scaler, dtype).transform(rows(seed=1, dtype=dtype))
    assert out.dtype == dtype
    assert out.shape == (60, plain.shape[1] + N_FEATURES * name.endswith("+mask"))
    assert plain.shape[1] >= N_FEATURES
    assert np.isfinite(out).all()


@every_method_and_scaler
@every_dtype
def test_one_row_alone_gives_what_it_gives_in_a_batch_bit_for_bit(name, scaler, dtype):
    method, X = fitted(name, scaler, dtype), rows(seed=1, dtype=dtype)
    batch = method.transform(X)
    alone = np.vstack([method.transform(row[None]) for row in X])
    assert alone.tobytes() == batch.tobytes()
    assert method.transform(np.asfortranarray(X)).tobytes() == batch.tobytes()


@every_method_and_scaler
def test_entries_missing_only_at_test_time_are_filled_and_masked(name, scaler):
    complete = np.random.default_rng(2).normal(size=(30, N_FEATURES))
    gappy = np.where(np.random.default_rng(3).random(complete.shape) < 0.5, np.nan, complete)
    out = make_method(name, scaler).fit(complete).transform(gappy)
    assert np.isfinite(out).all()
    if name.endswith("+mask"):
        np.testing.assert_array_equal(mask_of(out), ~np.isnan(gappy))


@every_method_and_scaler
def test_an_entry_in_a_column_never_observed_in_training_is_treated_as_missing(name, scaler):
    X = rows(seed=1)
    surprise = X.copy()
    surprise[:, NEVER] = 1e9
    method = fitted(name, scaler)
    assert method.transform(surprise).tobytes() == method.transform(X).tobytes()
    if name.endswith("+mask"):
        assert not mask_of(method.transform(surprise))[:, NEVER].any()


@every_method_and_scaler
def test_an_empty_row_is_finite_and_its_mask_is_zero(name, scaler):
    out = fitted(name, scaler).transform(rows()[[EMPTY_ROW]])
    assert np.isfinite(out).all()
    if name.endswith("+mask"):
        assert not mask_of(out).any()


@every_method_and_scaler
def test_training_rows_without_any_observation_give_a_method_that_still_works(name, scaler):
    method = make_method(name, scaler).fit(np.full((5, N_FEATURES), np.nan))
    assert np.isfinite(method.transform(rows())).all()


@every_method_and_scaler
def test_a_single_training_row_gives_a_method_that_still_works(name, scaler):
    method = make_method(name, scaler).fit(rows()[:1])
    assert np.isfinite(method.transform(rows())).all()


@every_method
@pytest.mark.parametrize("scaler", [name for name in SCALERS if name != "none"])
@every_dtype
def test_a_constant_column_becomes_zero_whatever_turns_up_in_it_later(name, scaler, dtype):
    X = rows(dtype=dtype)
    X[::2, CONSTANT] = 1e6
    out = fitted(name, scaler, dtype).transform(X)
    np.testing.assert_allclose(out[:, CONSTANT], 0.0, atol=1e-6)


@every_method_and_scaler
def test_fitting_and_transforming_leave_the_input_alone(name, scaler):
    X = rows()
    before = X.tobytes()
    make_method(name, scaler).fit(X).transform(X)
    assert X.tobytes() == before


@every_method_and_scaler
def test_transforming_changes_nothing_that_was_fitted(name, scaler):
    method = make_method(name, scaler).fit(rows())
    before = get_state(method)
    method.transform(rows(seed=9) * 1000)
    after = get_state(method)
    assert {key: value.tobytes() for key, value in before.items()} == {
        key: value.tobytes() for key, value in after.items()
    }


@every_method_and_scaler
def test_a_second_fit_forgets_the_first(name, scaler):
    refitted = make_method(name, scaler).fit(rows(n=50, seed=5) * 7)
    refitted.fit(rows())
    assert refitted.transform(rows()).tobytes() == fitted(name, scaler).transform(rows()).tobytes()


@every_method_and_scaler
def test_the_state_as_safetensors_restores_the_same_output_and_names(name, scaler):
    frame = pd.DataFrame(rows(), columns=[f"lab/{i}" for i in range(N_FEATURES)])
    original = make_method(name, scaler).fit(frame)
    saved = safetensors.save(get_state(original))
    restored = set_state(make_method(name, scaler), safetensors.load(saved))
    assert restored.transform(frame).tobytes() == original.transform(frame).tobytes()
    assert list(restored.get_feature_names_out()) == list(original.get_feature_names_out())
    with pytest.raises(ValueError, match="feature names should match"):
        restored.transform(frame[frame.columns[::-1]])


@every_method_and_scaler
def test_feature_names_begin_with_the_columns_and_end_with_observed_for_each_of_them(name, scaler):
    frame = pd.DataFrame(rows(), columns=[f"lab/{i}" for i in range(N_FEATURES)])
    method = make_method(name, scaler).set_output(transform="pandas").fit(frame)
    names, features = list(method.transform(frame).columns), list(frame.columns)
    assert names[:N_FEATURES] == features
    assert len(set(names)) == len(names)
    if name.endswith("+mask"):
        assert names[-N_FEATURES:] == [f"{column}.observed" for column in features]


@every_method_and_scaler
@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
def test_infinity_is_refused_naming_the_column_and_no_value(name, scaler, infinity):
    frame = pd.DataFrame(rows(), columns=[f"lab/{i}" for i in range(N_FEATURES)])
    infinite = frame.copy()
    infinite.loc[2, "lab/1"] = infinity
    with pytest.raises(ValueError, match=r"infinity in 1 of 60 rows, columns \['lab/1'\]"):
        make_method(name, scaler).fit(infinite)
    with pytest.raises(ValueError, match=r"infinity in 1 of 60 rows"):
        fitted(name, scaler).transform(infinite.to_numpy())


@every_method
def test_the_method_alone_also_refuses_infinity(name):
    with pytest.raises(ValueError, match="infinity"):
        METHODS[name]().fit([[np.inf]])


@every_method_and_scaler
def test_a_clone_is_unfitted_and_equal_once_fitted(name, scaler):
    copy = clone(fitted(name, scaler))
    with pytest.raises(ValueError, match="not fitted"):
        copy.transform(rows())
    out = copy.fit(rows()).transform(rows())
    assert out.tobytes() == fitted(name, scaler).transform(rows()).tobytes()


@every_method
def test_observed_entries_of_a_mask_variant_are_those_of_the_plain_method(name):
    plain = name.removesuffix("+mask")
    expected = fitted(plain, "standard").transform(rows())
    out = fitted(name, "standard").transform(rows())[:, : expected.shape[1]]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", [name for name in METHODS if not name.endswith("+mask")])
@settings(max_examples=30, deadline=None)
@given(
    npst.arrays(
        np.float64, (7, 3), elements=st.floats(-1e100, 1e100) | st.just(float("nan")), fill=None
    )
)
def test_no_table_of_numbers_makes_a_method_return_nan(name, X):
    assert np.isfinite(METHODS[name]().fit_transform(X)).all()


def test_every_method_has_its_mask_variant_and_every_name_is_listed():
    plain = {"zero", "sparsity_normalization", "mean", "median", "piecewise_linear"}
    assert plain | {f"{name}+mask" for name in plain} <= set(method_names())
    assert method_names() == list(METHODS)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'zero' is already registered"):
        register("zero")(MissingMethod)


def test_unknown_names_are_refused_with_the_nearest_valid_ones():
    with pytest.raises(
        ValueError,
        match=r"unknown method 'sparsity_normalisation'; did you mean 'sparsity_normalization'\?$",
    ):
        make_method("sparsity_normalisation")
    with pytest.raises(ValueError, match=r"unknown method '\w+'; did you mean 'median'\?$"):
        make_method("medain")
    with pytest.raises(ValueError, match=r"unknown scaler 'standart'; did you mean 'standard'\?$"):
        make_method("zero", scaler="standart")


def test_parameters_reach_the_method():
    method = make_method("sparsity_normalization+mask", k="features", exponent=0.5).fit(rows())
    assert method["method"].k_ == N_FEATURES
    assert method["method"].exponent == 0.5
    with pytest.raises(TypeError, match="exponent"):
        make_method("mean", exponent=0.5)


def test_a_mean_and_a_median_use_observed_training_entries_only():
    X = [[1.0, np.nan], [2.0, np.nan], [9.0, np.nan], [np.nan, np.nan]]
    assert make_method("mean", "none", 0).fit(X).transform([[np.nan] * 2]).tolist() == [[4, 0]]
    assert make_method("median", "none", 0).fit(X).transform([[np.nan] * 2]).tolist() == [[2, 0]]


def test_the_state_of_another_pipeline_is_refused():
    state = get_state(fitted("mean", "standard"))
    with pytest.raises(ValueError, match="build it with the arguments of the saved one"):
        set_state(make_method("mean", "minmax"), state)
    with pytest.raises(ValueError, match="no fitted attribute"):
        set_state(make_method("mean"), state | {"method.MeanImputer.transform": np.zeros(1)})


def test_the_state_of_an_unfitted_pipeline_is_refused():
    with pytest.raises(ValueError, match="not fitted"):
        get_state(make_method("mean"))


@every_method
def test_each_column_s_source_is_the_feature_whose_loss_changes_it(name):
    """Of methods that fill by constants; others may change further columns, too."""
    X = rows()
    method = METHODS[name]().fit(X)
    sources = method.sources()
    assert len(sources) == method.transform(X).shape[1]
    if method.erasure() is None:
        return
    np.testing.assert_array_equal(sources, method.erasure().source)


def test_the_count_of_all_features_stems_from_none():
    sources = METHODS["zero+count"]().fit(rows()).sources()
    assert sources.tolist() == [*range(N_FEATURES), -1]
