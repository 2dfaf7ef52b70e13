"""Training rows with missing entries → a Gaussian mixture with diagonal covariances, by EM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

COMPONENTS = 5
MAX_STEPS, TOLERANCE = 200, 1e-4
LEAST_VARIANCE = 1e-2
"""Of scaled features, and the weight of one prior observation of the column's own moments: a
component never shrinks onto a point, nor loses a column that none of its rows has."""


@dataclass(frozen=True)
class Mixture:
    """C components over D features: log weights (C,), means and variances (C, D)."""

    NAMES: ClassVar = ("log_weight", "mean", "variance")
    log_weight: NDArray[np.floating]
    mean: NDArray[np.floating]
    variance: NDArray[np.floating]

    def log_density(
        self, x: NDArray[np.floating], observed: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        """Each component's log weight × density of the observed entries: (n_rows, C)."""
        m = observed.astype(np.float64)
        x = np.where(observed, x, 0.0)
        constant = self.mean**2 / self.variance + np.log(2 * np.pi * self.variance)
        square = x**2 @ (1 / self.variance).T - 2 * x @ (self.mean / self.variance).T
        return self.log_weight - 0.5 * (square + m @ constant.T)

    def log_likelihood(self, x: NDArray[np.floating], observed: NDArray[np.bool_]) -> float:
        """Mean over rows of the log density of what was observed."""
        return float(logsumexp(self.log_density(x, observed), axis=1).mean())


def fit_mixture(
    x: NDArray[np.floating], observed: NDArray[np.bool_], components: int = COMPONENTS
) -> Mixture:
    """Maximise the likelihood of the observed entries, missing ones integrated out.

    Exact EM: with diagonal covariances a row's missing entries drop out of both steps (A. P.
    Dempster, N. M. Laird, D. B. Rubin, J. R. Stat. Soc. B 39:1, 1977). The moments of each column
    count as one more observation in every component. The start is drawn from a fixed seed.

    Parameters
    ----------
    x : (n_rows, D), scaled; what stands where `observed` is false does not matter
    observed : (n_rows, D)
    """
    m = observed.astype(np.float64)
    x = np.where(observed, x, 0.0).astype(np.float64)
    count = np.maximum(m.sum(axis=0), 1)
    centre = x.sum(axis=0) / count
    spread = np.maximum((m * (x - centre) ** 2).sum(axis=0) / count, LEAST_VARIANCE)
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(x), components, replace=len(x) < components)
    mixture = Mixture(
        np.full(components, -np.log(components)),
        np.where(observed[chosen], x[chosen], centre),
        np.tile(spread, (components, 1)),
    )
    before = -np.inf
    for _ in range(MAX_STEPS):
        joint = mixture.log_density(x, observed)
        total = logsumexp(joint, axis=1, keepdims=True)
        if total.mean() - before < TOLERANCE:
            break
        before = total.mean()
        share = np.exp(joint - total).T
        seen = share @ m + 1
        mean = (share @ x + centre) / seen
        square = (share @ x**2 + spread + centre**2) / seen
        mixture = Mixture(
            np.log((share.sum(axis=1) + 1) / (len(x) + components)),
            mean,
            np.maximum(square - mean**2, LEAST_VARIANCE),
        )
    return mixture
