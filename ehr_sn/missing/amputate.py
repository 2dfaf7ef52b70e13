"""Rows → the same rows with fewer entries: at random, by panel, by another entry or by their own.

To *amputate* is to remove observed entries on purpose, so that what their loss does can be
measured, or trained for. What is missing already stays missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from ehr_sn.errors import did_you_mean

__all__ = ["AGREEMENT", "MECHANISMS", "Amputation", "Mechanism", "find_panels", "hide"]

AGREEMENT = 0.95
"""Share of training rows in which two features of one panel are both there or both missing."""

Mechanism = Literal["mcar", "panel", "mar", "mnar"]
MECHANISMS: tuple[Mechanism, ...] = get_args(Mechanism)


def find_panels(
    observed: NDArray[np.bool_], measurements: Sequence[str] | None = None
) -> NDArray[np.int64]:
    """Group features that come together, such as the results of one blood count.

    Two features are in one panel where their masks agree in `AGREEMENT` of the rows, and all pairs
    of a panel do (complete linkage); panels that share a measurement are then one.

    Parameters
    ----------
    observed : (n_rows, n_features), the mask of training rows
    measurements : for every feature what it is an aggregate of, or its own name

    Returns
    -------
    (n_features,), the panel of each feature, numbered from 0 in the order of the features.

    >>> m = np.array([[1, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 0]], dtype=bool)
    >>> find_panels(m)
    array([0, 0, 1, 2])
    >>> find_panels(m, ["hb", "hct", "bnp", "bnp"])
    array([0, 0, 1, 1])
    """
    n = observed.shape[1]
    if n < 2:
        return np.zeros(n, dtype=np.int64)
    there = observed.astype(np.float32)
    agreement = (there.T @ there + (1 - there).T @ (1 - there)) / len(there)
    apart = squareform(1 - agreement, checks=False)
    panel = fcluster(linkage(apart, "complete"), 1 - AGREEMENT + 1e-6, criterion="distance")
    names = np.asarray(measurements if measurements is not None else np.arange(n))
    for name in np.unique(names):
        shared = np.unique(panel[names == name])
        panel[np.isin(panel, shared)] = shared[0]
    _, first, inverse = np.unique(panel, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


def hide(rng: np.random.Generator, n_rows: int, panels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Draw what random masking in training hides: (n_rows, n_features), true = hidden.

    Every row is left whole with probability ½. Else it gets a rate from U(0, ¾), at which it loses
    single entries or, with probability ½, whole panels.
    """
    n_panels = int(panels.max()) + 1
    drawn = rng.random((n_rows, 3 + len(panels) + n_panels), dtype=np.float32)
    chosen, rate, by_panel = drawn[:, 0] < 0.5, 0.75 * drawn[:, 1:2], drawn[:, 2:3] < 0.5
    entry, panel = drawn[:, 3 : 3 + len(panels)], drawn[:, 3 + len(panels) :]
    lost = np.where(by_panel, panel[:, panels], entry) < rate
    return lost & chosen[:, None]


class Amputation:
    """Removes a share of the observed entries, in one of four ways.

    - `mcar`: every entry alike, by its own coin (missing completely at random).
    - `panel`: as `mcar`, by one coin a panel, whose entries are lost together.
    - `mar`: the higher the row's *driver* (its most often observed feature, itself never removed),
      the likelier (missing at random, given the driver).
    - `mnar`: the higher the entry itself, the likelier (missing not at random).

    For `mar` and `mnar` the probability runs linearly with the rank r in [0, 1] among the training
    rows' observed entries: 2 · rate · r, or 1 − 2 (1 − rate)(1 − r) for rates above ½: `rate` on
    average where values are distributed as in training. Ties share their middle rank; a row without
    the driver has rank ½.

    Coins are hashed from the seed, the row's number and the column: a row loses the same entries
    whatever stands around it, and what a higher rate removes includes what a lower one does.

    Parameters
    ----------
    mechanism : one of `MECHANISMS`
    rate : share of observed entries to remove, in [0, 1]
    seed : another seed removes other entries
    spare : numbers of features that lose nothing, such as age and sex, which are always known

    Raises
    ------
    ValueError, for an unknown mechanism or a rate outside [0, 1].

    References
    ----------
    D. B. Rubin, "Inference and missing data", Biometrika 63:581, 1976.

    Examples
    --------
    >>> x = np.arange(6.0).reshape(3, 2)
    >>> Amputation("mcar", 0.5, seed=1).fit(x)(x)
    array([[nan, nan],
           [ 2., nan],
           [ 4.,  5.]])
    """

    def __init__(
        self, mechanism: Mechanism, rate: float, *, seed: int = 0, spare: Sequence[int] = ()
    ) -> None:
        if mechanism not in MECHANISMS:
            hint = did_you_mean(mechanism, MECHANISMS)
            raise ValueError(f"unknown mechanism {mechanism!r}; {hint}")
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be from 0 to 1, not {rate!r}")
        self.mechanism, self.rate, self.seed, self.spare = mechanism, rate, seed, list(spare)

    def fit(self, X: ArrayLike, measurements: Sequence[str] | None = None) -> Amputation:
        """Learn panels, driver and ranks from training rows (n_rows, n_features), NaN = missing.

        `measurements` is as `find_panels` takes it.
        """
        rows = np.asarray(X)
        observed = ~np.isnan(rows)
        self.panels_ = find_panels(observed, measurements)
        self.driver_ = int(observed.sum(axis=0).argmax())
        self.sorted_ = [np.sort(column[~np.isnan(column)]) for column in rows.T]
        return self

    def __call__(
        self, X: ArrayLike, row_numbers: NDArray[np.integer] | None = None
    ) -> NDArray[np.floating]:
        """X with fewer entries; `row_numbers` (n_rows,) where X holds some rows of a table."""
        rows = np.asarray(X)
        numbers = np.arange(len(rows)) if row_numbers is None else np.asarray(row_numbers)
        columns = self.panels_ if self.mechanism == "panel" else np.arange(rows.shape[1])
        lost = _coins(self.seed, numbers, columns) < self._probability(rows)
        lost[:, self.spare] = False
        return np.where(lost, rows.dtype.type(np.nan), rows)

    def _probability(self, rows: NDArray[np.floating]) -> NDArray[np.floating] | float:
        if self.mechanism in ("mcar", "panel"):
            return self.rate
        if self.mechanism == "mar":
            rank = self._rank(rows, self.driver_)[:, None].repeat(rows.shape[1], axis=1)
        else:
            rank = np.stack([self._rank(rows, j) for j in range(rows.shape[1])], axis=1)
        low = self.rate <= 0.5
        probability = 2 * self.rate * rank if low else 1 - 2 * (1 - self.rate) * (1 - rank)
        if self.mechanism == "mar":
            probability[:, self.driver_] = 0
        return probability

    def _rank(self, rows: NDArray[np.floating], j: int) -> NDArray[np.floating]:
        x, known = rows[:, j], self.sorted_[j]
        ends = np.searchsorted(known, x, "left") + np.searchsorted(known, x, "right")
        return np.where(np.isnan(x), 0.5, ends / (2 * max(len(known), 1)))


def _coins(
    seed: int, rows: NDArray[np.integer], columns: NDArray[np.integer]
) -> NDArray[np.float64]:
    """Uniform numbers (n_rows, n_columns) in [0, 1), each a hash of seed, row and column.

    The hash is SplitMix64's (G. Steele, D. Lea, C. Flood, OOPSLA 2014).
    """
    key = _mixed(_mixed(np.array([seed], np.uint64))[:, None] + rows.astype(np.uint64)[:, None])
    mixed = _mixed(key + columns.astype(np.uint64)[None, :])
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
