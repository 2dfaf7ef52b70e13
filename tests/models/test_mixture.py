"""The mixture fits what was observed, and nothing that was not."""

import numpy as np
import pytest
from scipy.stats import norm

from ehr_sn.models.mixture import fit_mixture


def two_groups(missing: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    group = rng.random(3000) < 0.3
    x = rng.normal(np.where(group[:, None], [3, -2, 0], [-1, 1, 0]), [0.5, 1.0, 1.0])
    return x, rng.random(x.shape) >= missing


def test_groups_are_found_though_entries_are_missing():
    x, observed = two_groups()
    mixture = fit_mixture(np.where(observed, x, np.nan), observed, components=2)
    order = np.argsort(mixture.mean[:, 0])
    np.testing.assert_allclose(mixture.mean[order], [[-1, 1, 0], [3, -2, 0]], atol=0.15)
    np.testing.assert_allclose(np.exp(mixture.log_weight[order]), [0.7, 0.3], atol=0.05)
    np.testing.assert_allclose(mixture.variance[order], [[0.25, 1, 1]] * 2, atol=0.2)


def test_a_missing_entry_is_integrated_out_whatever_stands_there():
    x, observed = two_groups()
    mixture = fit_mixture(x, observed)
    other = fit_mixture(np.where(observed, x, 1e6), observed)
    np.testing.assert_array_equal(mixture.mean, other.mean)
    row, seen = np.array([[0.5, 9.0, -1.0]]), np.array([[True, False, True]])
    marginal = np.exp(mixture.log_weight) * np.prod(
        norm.pdf(row[:, [0, 2]], mixture.mean[:, [0, 2]], mixture.variance[:, [0, 2]] ** 0.5),
        axis=1,
    )
    np.testing.assert_allclose(np.exp(mixture.log_density(row, seen))[0], marginal)


def test_more_components_never_fit_training_rows_much_worse():
    x, observed = two_groups()

    def likelihood(components: int) -> float:
        joint = fit_mixture(x, observed, components).log_density(x, observed)
        return float(np.logaddexp.reduce(joint, axis=1).mean())

    one, two, five = (likelihood(n) for n in (1, 2, 5))
    assert two > one + 0.1
    assert five > two - 0.01


@pytest.mark.parametrize("n_rows", [1, 3, 200])
def test_flags_constants_and_empty_columns_leave_a_proper_density(n_rows):
    rng = np.random.default_rng(0)
    x = np.stack([rng.random(n_rows) < 0.02, np.ones(n_rows), np.zeros(n_rows)], axis=1) * 1.0
    observed = np.array([True, True, False]) & np.ones((n_rows, 1), dtype=bool)
    mixture = fit_mixture(x, observed)
    assert np.isfinite(mixture.log_density(x, observed)).all()
    assert (mixture.variance > 0).all()
    assert np.exp(mixture.log_weight).sum() == pytest.approx(1)
