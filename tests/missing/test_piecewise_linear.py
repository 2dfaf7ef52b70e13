"""Each entry is told by its place among the quantile bins of training rows."""

import numpy as np
import pytest

from ehr_sn.missing import PiecewiseLinearEncoder, make_method

NAN = float("nan")


def test_a_bin_fills_up_from_left_to_right_and_missing_is_zero_in_all():
    encoder = PiecewiseLinearEncoder(bins=4, add_mask=True).fit(np.arange(5.0)[:, None])
    expected = {
        0.0: [0, 0, 0, 0],
        0.5: [0.5, 0, 0, 0],
        2.0: [1, 1, 0, 0],
        3.25: [1, 1, 1, 0.25],
        4.0: [1, 1, 1, 1],
        NAN: [0, 0, 0, 0],
    }
    out = encoder.transform(np.array(list(expected))[:, None])
    np.testing.assert_array_equal(out[:, 1:5], list(expected.values()))
    np.testing.assert_array_equal(out[:, 0], [0, 0.5, 2, 3.25, 4, 0])
    np.testing.assert_array_equal(out[:, 5], [1, 1, 1, 1, 1, 0])


def test_beyond_the_training_range_only_the_entry_itself_goes_on():
    encoder = PiecewiseLinearEncoder(bins=2).fit(np.arange(5.0)[:, None])
    np.testing.assert_array_equal(encoder.transform([[-9.0], [99.0]]), [[-9, 0, 0], [99, 1, 1]])


def test_bins_hold_equally_many_observed_training_entries():
    x = np.random.default_rng(0).lognormal(size=(1600, 1))
    x[::3] = NAN
    encoder = PiecewiseLinearEncoder(bins=16).fit(x)
    known = x[~np.isnan(x)]
    counts, _ = np.histogram(known, np.append(encoder.lower_, np.inf))
    assert len(counts) == 16
    assert counts.min() >= len(known) // 16 - 1


def test_flags_and_constants_get_no_bins_and_ties_fewer():
    rng = np.random.default_rng(0)
    x = np.stack([rng.integers(0, 2, 500), np.ones(500), rng.integers(0, 4, 500)], axis=1)
    encoder = PiecewiseLinearEncoder().fit(x.astype(float))
    np.testing.assert_array_equal(encoder.source_, [2, 2, 2])
    assert list(encoder.get_feature_names_out(["flag", "one", "class"])) == [
        "flag", "one", "class", "class.bin_1", "class.bin_2", "class.bin_3",
    ]  # fmt: skip


def test_a_linear_map_of_the_encoding_is_any_broken_line_through_the_edges():
    rng = np.random.default_rng(1)
    encoder = PiecewiseLinearEncoder(bins=5).fit(rng.normal(size=(300, 1)))
    edges = np.append(encoder.lower_, encoder.lower_[-1] + encoder.width_[-1])
    heights = rng.normal(size=6)
    x = rng.uniform(edges[0], edges[-1], 50)
    out = heights[0] + encoder.transform(x[:, None])[:, 1:] @ np.diff(heights)
    np.testing.assert_allclose(out, np.interp(x, edges, heights))


def test_the_scaler_only_stretches_the_bins():
    x = np.random.default_rng(2).lognormal(size=(200, 3))
    a, b = (
        make_method("piecewise_linear", scaler).fit_transform(x) for scaler in ("none", "minmax")
    )
    np.testing.assert_allclose(a[:, 3:], b[:, 3:], atol=1e-9)


@pytest.mark.parametrize("bins", [0, 1])
def test_fewer_than_two_bins_are_refused(bins):
    with pytest.raises(ValueError, match="at least 2"):
        PiecewiseLinearEncoder(bins=bins).fit([[1.0], [2.0]])


def test_the_encoding_takes_memory_for_bins_in_use_only():
    x = np.zeros((100, 50), dtype=np.float32)
    x[:, 0] = np.arange(100)
    out = make_method("piecewise_linear+mask").fit_transform(x)
    assert out.shape == (100, 50 + 8 + 50)
    assert out.dtype == np.float32
