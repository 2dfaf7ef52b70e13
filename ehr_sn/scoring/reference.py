"""Rows of training → what later rows are compared with: shares of groups, never a row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ehr_sn.config import SMALLEST_GROUP
from ehr_sn.scoring.chance import worth

DECILES = np.arange(1, 10) / 10
FEW_LEVELS = 20
"""Up to so many different values, each is a bin of its own."""
COMMON = 0.1
"""A value of so large a share of the entries is a bin of its own in any case."""


def bins(
    values: NDArray[np.floating], subjects: NDArray[np.integer] | None = None
) -> dict[str, Any]:
    """The distribution of the entries that are not NaN, (n,).

    Each value of a feature that has few, and in any case each that is common, is a bin of its own,
    so that flags and counts with many zeros are watched; the deciles of all other entries part
    these. What lies beside such values, as what was never seen in training will, is in bins, too.

    A bin never tells of fewer than 11 entries: deciles between which fewer lie are left out, a
    value that fewer have has no bin, and where a bin holds 1 to 10 its share is 0 and its neighbour
    has them. So neither the least nor the greatest entry shows, unless 11 entries have it. A
    constant shows: that a flag is 0 in all rows, or in all but 10, is told of none.

    Parameters
    ----------
    subjects : codes from 0 on of whom the entries are of, (n,); without them, each of another

    Returns
    -------
    dict with `rows`, how many entries there are; `effective`, how many of different subjects they
    are worth (see `worth`); `edges`, which rise strictly; and `shares`, one more than there are
    edges: of entries at most the first edge, above it and at most the second, …, above the last.
    With fewer than 11 entries `rows` is 0 and there are no bins.

    >>> told = bins(np.repeat([0.0, 1.0, np.nan], [75, 25, 10]))
    >>> np.round(told["edges"], 3), told["shares"]
    (array([-0.,  0.,  1.,  1.]), [0.0, 0.75, 0.0, 0.25, 0.0])
    """
    is_known = ~np.isnan(values)
    known = np.sort(values[is_known].astype(np.float64))
    n = len(known)
    if n < SMALLEST_GROUP:
        return {"rows": 0, "effective": 0, "edges": [], "shares": []}
    edges = _edges(known)
    counts = np.diff(np.searchsorted(known, edges, side="right"), prepend=0, append=n)
    for i in np.flatnonzero((counts > 0) & (counts < SMALLEST_GROUP)):
        if len(counts) > 1:
            counts[i - 1 if i else 1] += counts[i]
            counts[i] = 0
    squares = None if subjects is None else float((np.bincount(subjects[is_known]) ** 2).sum())
    return {
        "rows": n,
        "effective": round(worth(n, squares), 2),
        "edges": edges,
        "shares": (counts / n).tolist(),
    }


def _edges(known: NDArray[np.float64]) -> list[float]:
    """Edges of the bins of sorted entries: on both sides of levels, and deciles of the rest."""
    values, counts = np.unique(known, return_counts=True)
    least = SMALLEST_GROUP
    if len(values) > FEW_LEVELS:
        least = max(least, int(np.ceil(COMMON * len(known))))
    levels = values[counts >= least]
    rest = known[~np.isin(known, levels)]
    fixed = np.unique([*map(_just_below, levels), *levels])
    quantiles = np.quantile(rest, DECILES) if len(rest) else np.zeros(0)
    edges: list[float] = []
    below = 0
    for edge in np.union1d(fixed, quantiles):
        until = int(np.searchsorted(known, edge, side="right"))
        if edge not in fixed:
            above = fixed[fixed > edge]
            end = np.searchsorted(known, above[0], side="right") if len(above) else len(known)
            if min(until - below, end - until) < SMALLEST_GROUP:
                continue
        edges.append(float(edge))
        below = until
    return edges


def _just_below(value: float) -> float:
    """The next smaller number of those that features are made of."""
    return float(np.nextafter(np.float32(value), np.float32(-np.inf)))


def missing_rate(values: NDArray[np.floating]) -> list[float]:
    """Share of NaN in each column of (rows, columns).

    Fewer than 11 missing entries count as none, fewer than 11 observed ones as none, too.
    """
    missing = np.isnan(values).sum(axis=0)
    missing[missing < SMALLEST_GROUP] = 0
    missing[len(values) - missing < SMALLEST_GROUP] = len(values)
    return (missing / len(values)).tolist()


def reference(
    values: NDArray[np.float32], names: list[str], subjects: NDArray[Any] | None = None
) -> dict[str, Any]:
    """What is to be known of training rows (rows, features) to tell later that rows have changed.

    `missing_rate` a feature, and the `bins` of each feature's `values` and of the number of
    `observed` entries a row. `subjects` (rows,) are whose the rows are; without them, each is of
    another.
    """
    codes = None if subjects is None else np.unique(subjects, return_inverse=True)[1]
    columns = zip(names, values.T, strict=True)
    observed = bins((~np.isnan(values)).sum(axis=1).astype(np.float64), codes)
    return {
        "rows": len(values),
        "effective": observed["effective"],
        "missing_rate": dict(zip(names, missing_rate(values), strict=True)),
        "observed": observed,
        "values": {name: bins(column, codes) for name, column in columns},
    }
