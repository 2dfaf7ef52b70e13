"""Shares of two groups of rows → could chance alone make them differ so much?

Fisher's exact test of two shares (R. A. Fisher, Statistical Methods for Research Workers, 5th ed.,
1934, § 21.02) serves all that is watched: its null distribution is known for any number of rows,
and it takes both shares as estimated. Where values spread over many bins, Wilcoxon's rank sum
(Biometrics Bulletin 1:80, 1945) is beside it, which tells a shift from fewer rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import hypergeom, norm

from ehr_sn.config import SMALLEST_GROUP

SPREAD = 0.25
"""A bin that holds more makes ranks of so few values that their sum is far from normal."""
HIDDEN = SMALLEST_GROUP - 1
"""So many rows at most lie where a share is said to be 0: fewer than 11 are not told apart."""


def fisher(now: ArrayLike, n: int, then: ArrayLike, m: int) -> NDArray[np.float64]:
    """Two-sided p of Fisher's exact test: `now` of `n` rows against `then` of `m`, in [0, 1].

    Twice the tail on the side of the difference. `now` and `then` broadcast; p has their shape.

    >>> fisher([3, 0], 3, [1, 2], 3).round(3)
    array([0.4, 0.4])
    """
    now, then = np.broadcast_arrays(*(np.rint(np.asarray(each, float)) for each in (now, then)))
    fewer = now * m < then * n
    tail = hypergeom.cdf(
        np.where(fewer, now, then), n + m, now + then, np.where(fewer, n, m)
    )  # that few of the drawn are of these rows
    return np.minimum(2 * tail, 1.0)


def p_of_share(share: float, rows: float, then: float, known: dict[str, Any]) -> float:
    """p of a share of `rows` rows against a share `then` of a training profile.

    Where `then` is 0 or 1, up to 10 rows may have been left out of it: as many are taken to have
    been as make the difference least. `known` has `rows` and `effective` (see `effective`).
    """
    hidden = HIDDEN / known["rows"]
    low = 1 - hidden if then == 1 else then
    high = hidden if then == 0 else then
    n, m = round(rows), effective(known)
    return float(fisher(share * n, n, np.clip(share, low, high) * m, m))


def p_of_bins(counts: NDArray[np.float64], rows: float, then: dict[str, Any]) -> float:
    """p of counts of a night in the `bins` of the training, (k,), k at least 2.

    `rows` are as many as the night's would be worth if they were of different subjects.

    All up to each edge, and each bin between two edges, is held against the training by Fisher's
    test, and the ranks by Wilcoxon's, which gets half of what chance is allowed; the others share
    the other half (Bonferroni). Where edges are the training's own quantiles, rows of one
    distribution fall between them as exchangeable spacings do, and the test is conservative. Bins
    of which it is hidden how many training rows they hold, and those that have taken these rows in,
    are given the share that makes the difference least.
    """
    q, p = counts / counts.sum(), np.asarray(then["shares"])
    small = np.pad(p == 0, 1).astype(float)
    hidden = HIDDEN / then["rows"]
    beside = hidden * (small[:-2] + small[2:])  # of a bin
    across = hidden * (small[1:-2] + small[2:-1])  # of an edge
    below = p.cumsum()[:-1]
    now = np.concatenate([q.cumsum()[:-1], q[1:-1]])
    low = np.concatenate([below - across, (p - beside)[1:-1]])
    high = np.concatenate([below + across, (p + hidden * small[1:-1])[1:-1]])
    n, m = round(rows), effective(then)
    each = fisher(now * n, n, np.clip(np.clip(now, low, high), 0, 1) * m, m)
    return float(min(1.0, 2 * len(each) * each.min(), 2 * _p_of_ranks(q, p, n, m)))


def _p_of_ranks(q: NDArray[np.float64], p: NDArray[np.float64], n: int, m: int) -> float:
    """Two-sided p of Wilcoxon's rank sum, ties allowed for; 1 where a bin holds too much.

    Normal, as a sum of ranks nearly is; its tails are heavier than those of the sum, whose terms
    are bounded.
    """
    pooled = (n * q + m * p) / (n + m)
    if pooled.max() > SPREAD:
        return 1.0
    rank = pooled.cumsum() - pooled / 2
    variance = (pooled * (rank - 0.5) ** 2).sum() * (1 / n + 1 / m)
    return float(2 * norm.sf(abs((q - p) @ rank) / np.sqrt(variance)))


def effective(known: dict[str, Any]) -> int:
    """How many rows of different subjects a training profile's rows are worth.

    One of an earlier version does not say: each row is then taken for a subject's only one.
    """
    return round(known.get("effective", known["rows"]))


def worth(rows: float, squares: float | None) -> float:
    """Rows of different subjects that tell as much as `rows` of which subjects have several.

    `squares` is the sum over subjects of their numbers of rows, squared; None: each has one. A
    subject's rows are taken to be all alike, which is the worst case (L. Kish, Survey Sampling,
    1965, § 5.4, with an intraclass correlation of 1).

    >>> worth(6, 2**2 + 2**2 + 1 + 1)
    3.6
    """
    return rows**2 / squares if squares else rows
