"""Entries are removed at the rate asked for, in the way asked for, row by row."""

import numpy as np
import pytest

from ehr_sn.missing.amputate import MECHANISMS, Amputation, find_panels, hide

N = 4000
every_mechanism = pytest.mark.parametrize("mechanism", MECHANISMS)


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    """Three panels of two, two of them gappy; column 0 is always there and drives column 2."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((N, 6)).astype(np.float32)
    z[:, 2] += z[:, 0]
    z[rng.random(N) < 0.3, 2:4] = np.nan
    z[rng.random(N) < 0.1, 4:] = np.nan
    return z


def lost_entries(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    return np.isnan(out) & ~np.isnan(x)


@every_mechanism
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_the_share_of_observed_entries_that_is_lost_is_the_rate(x, mechanism, rate):
    out = Amputation(mechanism, rate).fit(x)(x)
    columns = range(1, 6) if mechanism == "mar" else range(6)
    for j in columns:
        lost = lost_entries(x, out)[~np.isnan(x[:, j]), j].mean()
        assert lost == pytest.approx(rate, abs=0.035)


@every_mechanism
def test_what_is_left_is_unchanged_and_what_was_missing_stays_so(x, mechanism):
    out = Amputation(mechanism, 0.5).fit(x)(x)
    assert out.dtype == x.dtype
    kept = ~np.isnan(out)
    np.testing.assert_array_equal(out[kept], x[kept])
    assert np.isnan(out[np.isnan(x)]).all()


@every_mechanism
def test_a_row_loses_the_same_whatever_stands_around_it(x, mechanism):
    amputation = Amputation(mechanism, 0.5, seed=7).fit(x)
    whole, some = amputation(x), np.array([17, 3, 3999])
    np.testing.assert_array_equal(amputation(x[some], some), whole[some])
    np.testing.assert_array_equal(amputation(x), whole)


@every_mechanism
def test_another_seed_removes_others_and_a_higher_rate_more(x, mechanism):
    def lost(seed, rate):
        return lost_entries(x, Amputation(mechanism, rate, seed=seed).fit(x)(x))

    assert (lost(0, 0.5) != lost(1, 0.5)).mean() > 0.2
    assert not (lost(0, 0.3) & ~lost(0, 0.5)).any()


def correlation(lost: np.ndarray, value: np.ndarray) -> float:
    return float(np.corrcoef(lost, value)[0, 1])


def test_at_random_tells_nothing_of_values_and_the_other_ways_do():
    z = np.random.default_rng(1).standard_normal((N, 4))
    lost = {m: lost_entries(z, Amputation(m, 0.5).fit(z)(z)) for m in MECHANISMS}
    for mechanism in ("mcar", "panel"):
        assert abs(correlation(lost[mechanism][:, 2], z[:, 2])) < 0.06
        assert abs(correlation(lost[mechanism][:, 2], z[:, 0])) < 0.06
    assert correlation(lost["mnar"][:, 2], z[:, 2]) > 0.5
    assert abs(correlation(lost["mnar"][:, 2], z[:, 0])) < 0.06
    assert correlation(lost["mar"][:, 2], z[:, 0]) > 0.5
    assert abs(correlation(lost["mar"][:, 2], z[:, 2])) < 0.06
    assert not lost["mar"][:, 0].any()


def test_a_panel_is_lost_as_a_whole(x):
    out = Amputation("panel", 0.5).fit(x)(x)
    for pair in ([0, 1], [2, 3], [4, 5]):
        gone = np.isnan(out[:, pair])
        np.testing.assert_array_equal(gone[:, 0], gone[:, 1])


def test_panels_are_columns_whose_masks_agree(x):
    np.testing.assert_array_equal(find_panels(~np.isnan(x)), [0, 0, 1, 1, 2, 2])


def test_all_pairs_of_a_panel_agree_not_only_neighbours():
    m = np.ones((100, 3), dtype=bool)
    m[:4, 1] = m[:8, 2] = False
    assert len(set(find_panels(m))) == 2


def test_aggregates_of_one_measurement_are_one_panel():
    m = np.random.default_rng(0).random((200, 4)) < 0.5
    panels = find_panels(m, ["age", "bp", "bp", "hdl"])
    np.testing.assert_array_equal(panels, [0, 1, 1, 2])
    np.testing.assert_array_equal(find_panels(m[:, :1]), [0])


def test_training_hides_from_half_of_the_rows_and_from_half_of_those_whole_panels():
    panels = np.repeat(np.arange(40), 5)
    hidden = hide(np.random.default_rng(0), 8000, panels)
    touched = hidden.any(axis=1)
    assert touched.mean() == pytest.approx(0.5, abs=0.03)
    by_panel = hidden.reshape(-1, 40, 5)
    whole = (by_panel.all(axis=2) == by_panel.any(axis=2)).all(axis=1)
    assert whole[touched].mean() == pytest.approx(0.5, abs=0.03)
    rates = hidden[touched].mean(axis=1)
    assert rates.mean() == pytest.approx(0.375, abs=0.02)
    assert np.quantile(rates[~whole[touched]], 0.99) < 0.85


@pytest.mark.parametrize(
    ("mechanism", "rate", "message"), [("mcra", 0.5, "did you mean 'mcar'"), ("mar", 1.5, "0 to 1")]
)
def test_what_cannot_be_done_is_refused(mechanism, rate, message):
    with pytest.raises(ValueError, match=message):
        Amputation(mechanism, rate)


@every_mechanism
def test_what_is_to_be_spared_is_kept_whole_and_the_rest_is_lost_as_before(x, mechanism):
    spared = Amputation(mechanism, 0.5, spare=[1, 3]).fit(x)(x)
    np.testing.assert_array_equal(spared[:, [1, 3]], x[:, [1, 3]])
    rest = [0, 2, 4, 5]
    expected = Amputation(mechanism, 0.5).fit(x)(x)
    np.testing.assert_array_equal(spared[:, rest], expected[:, rest])
