"""Labels and predictions → 95 % intervals of the figures that are no AUROC, by subject.

Each figure moves a little as a row counts a little more. These moves, added up over the rows of
each subject, vary as much as the figure does from sample to sample: the infinitesimal jackknife
(L. A. Jaeckel, Bell Laboratories, 1972; B. Efron, Biometrika 68:589, 1981), of which a bootstrap of
the subjects is the slow form. For calibration it is Liang and Zeger's error (Biometrika 73:13,
1986).
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import expit, logit

from ehr_sn.evaluate.metrics import (
    CLIP,
    Array,
    Sample,
    auprc,
    brier,
    calibration,
    calibration_in_the_large,
    checked,
)
from ehr_sn.evaluate.statistics import Z95

Figures = dict[str, tuple[float, float, float]]
"""Name → value, and the lower and upper end of its 95 % interval."""

FIGURES = ("auprc", "brier", "calibration_slope", "calibration_intercept")
WITHIN = {"auprc": (0.0, 1.0), "brier": (0.0, 1.0)}


def intervals(samples: Sequence[Sample]) -> Figures:
    """Return each of `FIGURES`, a mean over splits, with an interval as wide as that of one split.

    A slope that has no finite value is NaN. Raises ValueError as `metrics.calibration` does.

    >>> y, p = [0, 0, 1, 0, 1, 1] * 20, [0.1, 0.3, 0.4, 0.5, 0.6, 0.8] * 20
    >>> for name, figure in intervals([Sample(y, p)]).items():
    ...     print(name, *(round(number, 2) for number in figure))
    auprc 0.92 0.87 0.96
    brier 0.15 0.13 0.17
    calibration_slope 2.53 2.01 3.05
    calibration_intercept 0.25 -0.1 0.6
    """
    told: Figures = {}
    for name in FIGURES:
        found = [_figure(name, sample) for sample in samples]
        value = float(np.mean([one for one, _ in found]))
        half = Z95 * float(np.sqrt(np.mean([variance for _, variance in found])))
        low, high = WITHIN.get(name, (-np.inf, np.inf))
        told[name] = value, max(value - half, low), min(value + half, high)
    return told


def _figure(name: str, sample: Sample) -> tuple[float, float]:
    """A figure of one sample, and its variance."""
    y, p = checked(sample.y, sample.p, ndim=1, probabilities=True)
    each, lp = np.broadcast_to(sample.each, p.shape), logit(np.clip(p, CLIP, 1 - CLIP))
    if name == "auprc":
        value, moves = auprc(y, p, sample.weight), _moves_of_auprc(y, p, each)
    elif name == "brier":
        value = float(brier(y, p, sample.weight))
        moves = each * (np.square(p - y) - value) / each.sum()
    elif name == "calibration_intercept":
        value = calibration_in_the_large(y, p, sample.weight)
        risk = expit(value + lp)
        moves = each * (y - risk) / (each * risk * (1 - risk)).sum()
    else:
        value = calibration(y, p, sample.weight).slope
        if np.isnan(value):
            return value, np.nan
        tilted = expit(value * lp)
        risk = expit(calibration_in_the_large(y, tilted, sample.weight) + value * lp)
        x = np.column_stack([np.ones_like(lp), lp])
        information = x.T @ (x * (each * risk * (1 - risk))[:, None])
        moves = np.linalg.solve(information, x.T * (each * (y - risk)))[1]
    return value, sample.variance_of_sum(moves)


def _moves_of_auprc(y: np.ndarray, p: Array, each: Array) -> Array:
    """Return by how much each row moves the average precision.

    That is the mean precision at the positives' scores: a row changes it at all scores up to its
    own, and a positive adds its own precision besides.
    """
    place = np.unique(-p, return_inverse=True)[1]  # among the scores, the highest first
    hits, rows = (np.cumsum(np.bincount(place, weights=w)) for w in (each * y, each))
    mine = np.bincount(place, weights=each * y) / hits[-1]  # of each score, its share of positives
    precision = hits / rows
    area = float(mine @ precision)
    hit_more = np.cumsum((mine / rows)[::-1])[::-1]  # at each score, and below it
    row_more = np.cumsum((mine * hits / np.square(rows))[::-1])[::-1]
    own = y * (precision[place] - area) / hits[-1]
    moves: Array = each * (own + y * hit_more[place] - row_more[place])
    return moves
