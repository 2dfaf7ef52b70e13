"""Scaled rows with NaN → complete rows, filled from the most similar training rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ehr_sn.missing.imputers import register
from ehr_sn.missing.model_imputer import ModelImputer, Rows

__all__ = ["NearestNeighboursImputer"]


@register("knn")
class NearestNeighboursImputer(ModelImputer):
    """Fill an entry with its mean over the k nearest donors in which it was observed.

    Donors are a random sample of the training rows. Their distance is Euclidean over the z-scores
    that both rows have, scaled up to all n columns: √(n / n_both · Σ (a − b)²). A donor without a
    column in common is none; an entry without any donor gets the training mean.

    O. Troyanskaya et al., "Missing value estimation methods for DNA microarrays", Bioinformatics
    17:520 (2001).

    Parameters
    ----------
    k : donors whose mean is taken
    max_rows : size of the sample

    Examples
    --------
    >>> nan = float("nan")
    >>> knn = NearestNeighboursImputer(k=2).fit([[1.0, 10.0], [2.0, 20.0], [9.0, 90.0], [1.0, nan]])
    >>> knn.transform([[1.0, nan]])
    array([[ 1., 15.]])
    """

    def __init__(
        self, *, k: int = 10, max_rows: int = 1000, seed: int = 0, add_mask: bool = False
    ) -> None:
        super().__init__(max_rows=max_rows, seed=seed, add_mask=add_mask)
        self.k = k

    def _learn(self, Z: Rows) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1; got {self.k!r}")
        self.donors_ = Z

    def _predict(self, Z: Rows) -> Rows:
        missing = np.isnan(Z)
        distance = self._squared_distances(Z, missing)
        offered = ~np.isnan(self.donors_)
        completed = np.where(missing, 0.0, Z)
        for j in np.flatnonzero(missing.any(axis=0)):
            rows, donors = np.flatnonzero(missing[:, j]), np.flatnonzero(offered[:, j])
            to_donors = distance[np.ix_(rows, donors)]
            k = min(self.k, len(donors))
            nearest = np.argpartition(to_donors, k - 1, axis=1)[:, :k]
            usable = np.isfinite(np.take_along_axis(to_donors, nearest, axis=1))
            total = np.where(usable, self.donors_[donors, j][nearest], 0.0).sum(axis=1)
            completed[rows, j] = total / np.maximum(usable.sum(axis=1), 1)
        return completed

    def _squared_distances(self, Z: Rows, missing: NDArray[np.bool_]) -> Rows:
        """(rows, donors), infinite where no column is shared."""
        b, offered = np.nan_to_num(self.donors_), (~np.isnan(self.donors_)).astype(float)
        total = np.zeros((len(Z), len(b)))
        for j in range(Z.shape[1]):
            rows = np.flatnonzero(~missing[:, j])
            squares = Z[rows, j, None] - b[:, j]
            squares *= squares
            squares *= offered[:, j]
            total[rows] += squares
        shared = (~missing).astype(float) @ offered.T  # whole numbers: exact in any order
        return np.where(shared > 0, total * Z.shape[1] / np.maximum(shared, 1.0), np.inf)
