"""Chance: what is tested keeps its level, whatever the numbers of rows, and sees what is there."""

import numpy as np
import pytest
from scipy.stats import fisher_exact

from ehr_sn.scoring.chance import fisher, p_of_bins, p_of_share, worth
from ehr_sn.scoring.reference import bins


def counted(values: np.ndarray, then: dict) -> np.ndarray:
    places = np.searchsorted(then["edges"], values)
    return np.bincount(places, minlength=len(then["shares"])).astype(float)


@pytest.mark.parametrize(
    ("now", "n", "then", "m"), [(3, 11, 20, 200), (0, 50, 900, 2000), (40, 50, 3, 80)]
)
def test_it_is_fishers_exact_test_with_the_smaller_tail_doubled(now, n, then, m) -> None:
    table = [[now, n - now], [then, m - then]]
    tails = [fisher_exact(table, alternative=side).pvalue for side in ("less", "greater")]
    assert fisher(now, n, then, m) == pytest.approx(min(1, 2 * min(tails)))


@pytest.mark.parametrize("n", [11, 30, 200])
@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, n: rng.normal(size=n),
        lambda rng, n: (rng.random(n) < 0.02).astype(float),
        lambda rng, n: np.where(rng.random(n) < 0.1, rng.geometric(0.3, n), 0.0),
        lambda rng, n: rng.poisson(8, n).astype(float),
    ],
    ids=["normal", "rare flag", "count with zeros", "count"],
)
def test_p_of_bins_is_below_a_level_no_more_often_than_that(draw, n: int) -> None:
    rng = np.random.default_rng(0)
    p = []
    for _ in range(400):
        then = bins(draw(rng, 500))
        p.append(p_of_bins(counted(draw(rng, n), then), n, then))
    for level in (0.02, 0.1):
        assert np.mean(np.array(p) < level) <= level + 2 * np.sqrt(level / 400)


def test_what_hides_ten_rows_may_have_them() -> None:
    known = {"rows": 1000, "effective": 1000}
    assert p_of_share(0.01, 100, 0.0, known) == 1
    assert p_of_share(0.99, 100, 1.0, known) == 1
    assert p_of_share(0.01, 1000, 0.0, known) == 1
    assert p_of_share(0.2, 100, 0.0, known) < 1e-9
    then = bins(np.r_[np.zeros(990), np.ones(10)])
    assert then["shares"] == [0, 1, 0]
    assert p_of_bins(np.array([0, 99.0, 1]), 100, then) == 1
    assert p_of_bins(np.array([0, 60.0, 40]), 100, then) < 1e-9


def test_a_shift_of_half_a_standard_deviation_shows_in_150_rows() -> None:
    rng = np.random.default_rng(0)
    then = bins(rng.normal(size=5000))
    p = [p_of_bins(counted(rng.normal(0.5, 1, 150), then), 150, then) for _ in range(50)]
    assert np.mean(np.array(p) < 1e-4) > 0.9


def test_rows_that_are_all_alike_are_worth_their_subjects() -> None:
    assert worth(400, None) == 400
    assert worth(400, 100 * 4**2) == 100
    codes = np.repeat(np.arange(50), 4)
    assert bins(np.repeat(np.arange(50.0), 4), codes)["effective"] == 50
    assert bins(np.arange(200.0))["effective"] == 200
