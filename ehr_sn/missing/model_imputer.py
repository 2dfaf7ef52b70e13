"""Base of the methods that predict a row's missing entries from its observed ones."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ehr_sn.missing.imputers import MissingMethod

__all__ = ["ModelImputer", "product"]

Rows = NDArray[np.float64]


def product(a: NDArray[np.floating], W: NDArray[np.floating]) -> NDArray[np.floating]:
    """``a @ W``, summed column by column of `a`, so that a row's bits do not depend on its batch.

    A library's matrix product may round a row differently at another place or in another shape.
    """
    out = np.zeros((len(a), W.shape[1]), dtype=np.result_type(a, W))
    for column, weights in zip(a.T, W, strict=True):
        out += column[:, None] * weights
    return out


class ModelImputer(MissingMethod):
    """A model of z-scored rows, learned from a bounded sample of the training rows.

    A subclass writes `_learn(Z)`, for z-scored rows with NaN, and `_predict(Z)`, which completes
    some of them, each by itself. What is predicted is clipped to the range of the column's
    observed training entries. A column without observed entries in the sample takes no part, and
    is filled with its training mean (0 where it was never observed).

    Parameters
    ----------
    max_rows : training rows that the model is learned from, drawn at random where there are more
    seed : of that draw, and of whatever else the model draws

    Attributes
    ----------
    fill_ : float64 array (n_features,), the mean of a column's observed training entries
    columns_ : int array (p,), the columns that take part
    centre_, scale_, low_, high_ : float64 arrays (p,), mean and standard deviation of those columns
        (1 where they do not vary), and the range of their z-scores
    """

    block: ClassVar[int] = 256
    """Rows that are completed at once, which bounds the memory taken."""

    def __init__(self, *, max_rows: int = 4000, seed: int = 0, add_mask: bool = False) -> None:
        super().__init__(add_mask=add_mask)
        self.max_rows = max_rows
        self.seed = seed

    def _fit(self, X: NDArray[np.floating]) -> None:
        rows = np.arange(len(X))
        if len(X) > self.max_rows:
            rng = np.random.default_rng(self.seed)
            rows = np.sort(rng.choice(len(X), self.max_rows, replace=False))
        observed = ~np.isnan(X)
        known, modelled = observed.any(axis=0), observed[rows].any(axis=0)
        self.fill_ = np.zeros(X.shape[1])
        self.fill_[known] = np.nanmean(X[:, known], axis=0, dtype=np.float64)
        self.columns_ = np.flatnonzero(modelled)
        x = X[:, self.columns_].astype(np.float64)
        low, high = np.nanmin(x, axis=0), np.nanmax(x, axis=0)
        flat = low == high
        self.centre_ = np.where(flat, low, self.fill_[self.columns_])
        self.scale_ = np.where(flat, 1.0, np.nanstd(x, axis=0))
        self.scale_[self.scale_ == 0] = 1.0  # variances too small for a float
        self.low_, self.high_ = (
            (low - self.centre_) / self.scale_,
            (high - self.centre_) / self.scale_,
        )
        self._learn((x[rows] - self.centre_) / self.scale_)

    def _fill(self, X: NDArray[np.floating], observed: NDArray[np.bool_]) -> NDArray[np.floating]:
        filled = np.where(observed, X, self.fill_.astype(X.dtype))
        gaps = np.flatnonzero(~observed[:, self.columns_].all(axis=1))
        for start in range(0, len(gaps), self.block):
            rows = gaps[start : start + self.block]
            x = X[np.ix_(rows, self.columns_)].astype(np.float64)
            predicted = self._predict((x - self.centre_) / self.scale_)
            z = np.clip(predicted, self.low_, self.high_)
            completed = np.where(np.isnan(x), self.centre_ + self.scale_ * z, x)
            filled[np.ix_(rows, self.columns_)] = completed
        return filled

    @abstractmethod
    def _learn(self, Z: Rows) -> None: ...

    @abstractmethod
    def _predict(self, Z: Rows) -> Rows: ...
