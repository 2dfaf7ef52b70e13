"""Rows of training → what later rows are compared with: shares of groups, never a row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ehr_sn.config import SMALLEST_GROUP

DECILES = np.arange(1, 10) / 10


def bins(values: NDArray[np.floating]) -> dict[str, Any]:
    """The distribution of the entries that are not NaN, (n,), in about ten bins.

    Returns
    -------
    dict with `rows`, how many entries there are; `edges`, which rise strictly: the deciles, each
    once; and `shares`, one more than there are edges: of entries at most the first edge, above it
    and at most the second, …, above the last. Edges between which fewer than 11 entries lie are
    left out, so neither the least nor the greatest entry shows, nor a small group; with fewer than
    11 entries in all, `rows` is 0 and there are no bins.

    >>> bins(np.repeat([0.0, 1.0, np.nan], [75, 25, 10]))
    {'rows': 100, 'edges': [0.0], 'shares': [0.75, 0.25]}
    """
    known = values[~np.isnan(values)].astype(np.float64)
    if len(known) < SMALLEST_GROUP:
        return {"rows": 0, "edges": [], "shares": []}
    edges: list[float] = []
    below = 0
    for edge in np.unique(np.quantile(known, DECILES)):
        until = int(np.count_nonzero(known <= edge))
        if min(until - below, len(known) - until) >= SMALLEST_GROUP:
            edges.append(float(edge))
            below = until
    return {"rows": len(known), "edges": edges, "shares": shares(known, edges).tolist()}


def shares(values: NDArray[np.floating], edges: list[float]) -> NDArray[np.float64]:
    """Share of the entries that are not NaN in each of the bins that `edges` part; sums to 1."""
    known = values[~np.isnan(values)]
    count = np.bincount(np.searchsorted(edges, known), minlength=len(edges) + 1)
    return count / max(len(known), 1)


def missing_rate(values: NDArray[np.floating]) -> list[float]:
    """Share of NaN in each column of (rows, columns).

    Fewer than 11 missing entries count as none, fewer than 11 observed ones as none, too.
    """
    missing = np.isnan(values).sum(axis=0)
    missing[missing < SMALLEST_GROUP] = 0
    missing[len(values) - missing < SMALLEST_GROUP] = len(values)
    return (missing / len(values)).tolist()


def reference(values: NDArray[np.float32], names: list[str]) -> dict[str, Any]:
    """What is to be known of training rows (rows, features) to tell later that rows have changed.

    `missing_rate` a feature, and the `bins` of each feature's `values` and of the number of
    `observed` entries a row.
    """
    columns = zip(names, values.T, strict=True)
    return {
        "rows": len(values),
        "missing_rate": dict(zip(names, missing_rate(values), strict=True)),
        "observed": bins((~np.isnan(values)).sum(axis=1).astype(np.float64)),
        "values": {name: bins(column) for name, column in columns},
    }
