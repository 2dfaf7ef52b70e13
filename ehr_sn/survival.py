"""Times to a disease, some of them cut short → risks, and weights that make up for who left.

A row's time runs from the beginning of its label's window to the first of: the disease, a death
without it, the end of follow-up, the end of the window. What ended it is its `status`. Rows of one
subject may be several: risks and weights hold for them as they are, standard errors would not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

LEFT, ILL, DIED = 0, 1, 2
"""What a time ended with. Who reached the end of the window has left, too, but at its end."""

LEAST = 0.05
"""No row stands for more than 1 / LEAST rows: beyond that a few would decide everything."""


def status_of(days: ArrayLike, label: ArrayLike, horizon: float) -> NDArray[np.int8]:
    """What ended each time, from the label (1, 0, NaN = unknown) and the days; all (n,).

    A label of 0 before the end of the window, `horizon` days, can only be a death.

    >>> status_of([3.0, 9.0, 4.0, 2.0], [1, 0, 0, float("nan")], 9.0)
    array([1, 0, 2, 0], dtype=int8)
    """
    days, label = np.asarray(days, dtype=np.float64), np.asarray(label, dtype=np.float64)
    return np.select([label == 1, (label == 0) & (days < horizon)], [ILL, DIED], LEFT).astype("i1")


def cumulative_incidence(days: ArrayLike, status: ArrayLike, horizon: float) -> float:
    """Risk of the disease within `horizon` days, where deaths preclude it: Aalen–Johansen.

    Parameters
    ----------
    days, status : (n,), as the module says
    horizon : in days

    Notes
    -----
    O. O. Aalen and S. Johansen, Scand J Stat 5:141 (1978). Without deaths it is one less
    Kaplan and Meier's estimate (JASA 53:457, 1958). At equal times who fell ill or died comes
    before who left. NaN without rows.

    >>> cumulative_incidence([1, 2, 3, 4], [1, 0, 1, 0], 4)
    0.625
    >>> cumulative_incidence([1, 2, 3, 4], [1, 2, 1, 0], 4)
    0.5
    """
    days, status = np.asarray(days, dtype=np.float64), np.asarray(status)
    if not days.size:
        return np.nan
    times, place = np.unique(days, return_inverse=True)
    at_risk = len(days) - np.searchsorted(np.sort(days), times)
    ill, died = (np.bincount(place[status == s], minlength=len(times)) for s in (ILL, DIED))
    alive_and_well = np.cumprod(1 - (ill + died) / at_risk)
    before = np.concatenate([[1.0], alive_and_well[:-1]])
    return float((before * ill / at_risk)[times <= horizon].sum())


def still_followed(days: ArrayLike, status: ArrayLike, horizon: float, at: ArrayLike) -> Array:
    """Kaplan–Meier's share that would not have left before each of the times `at`, (m,).

    Parameters
    ----------
    days, status : (n,), as the module says; who left at the window's end, `horizon`, has stayed
    at : (m,), in days

    Notes
    -----
    Leaving is now what is waited for, and illness or death what hides it. At equal times who left
    comes after who fell ill, so that the share is that just before each time.

    >>> still_followed([1, 2, 3, 4], [0, 1, 0, 0], 4, [1, 2, 4])
    array([1.   , 0.75 , 0.375])
    """
    days, at = np.asarray(days, dtype=np.float64), np.asarray(at, dtype=np.float64)
    left = (np.asarray(status) == LEFT) & (days < horizon)
    times, place = np.unique(days, return_inverse=True)
    # Of those of equal times only who left, or has stayed longer, was there to leave.
    earlier = np.searchsorted(np.sort(days), times)
    ended = np.bincount(place[~left & (days < horizon)], minlength=len(times))
    at_risk = np.maximum(len(days) - earlier - ended, 1)
    share = np.cumprod(1 - np.bincount(place[left], minlength=len(times)) / at_risk)
    return np.concatenate([[1.0], share])[np.searchsorted(times, at)]


def censoring_weights(
    days: ArrayLike,
    label: ArrayLike,
    horizon: float,
    fit_rows: NDArray[np.bool_],
    covariates: NDArray[np.floating] | None = None,
) -> Array:
    """How many rows each labelled row stands for: itself, and those like it who left before.

    Parameters
    ----------
    days : (n,), NaN where a row was never at risk
    label : (n,), 1, 0 or NaN
    horizon : days that the window lasts
    fit_rows : (n,), on which leaving is learned: the training rows
    covariates : (n, d), NaN = missing; where leaving depends on them. Without, everybody leaves
        at the same rates.

    Returns
    -------
    (n,): the inverse of the probability of still being followed just before the row's time; 0
    where the label is unknown. At most 1 / `LEAST`.

    Notes
    -----
    J. M. Robins and A. Rotnitzky (1992); for the AUROC see H. Uno et al., JASA 102:527 (2007) and
    P. Blanche, J.-F. Dartigues and H. Jacqmin-Gadda, Stat Med 32:5381 (2013). With covariates the
    rate of leaving follows D. R. Cox's proportional hazards (J R Stat Soc B 34:187, 1972), with
    N. Breslow's baseline. It assumes that who left fares like who stayed (and has the same
    covariates).

    >>> censoring_weights([1, 2, 3, 4], [float("nan"), 1, float("nan"), 0], 4, np.full(4, True))
    array([0.        , 1.33333333, 0.        , 2.66666667])
    """
    days, label = np.asarray(days, dtype=np.float64), np.asarray(label, dtype=np.float64)
    known = ~np.isnan(label) & ~np.isnan(days)
    fit = fit_rows & ~np.isnan(days)
    status = status_of(days, label, horizon)
    if covariates is None:
        share = still_followed(days[fit], status[fit], horizon, days[known])
    else:
        share = _still_followed_by(covariates, days, status, horizon, fit, known)
    weights = np.zeros(len(days))
    weights[known] = 1 / np.maximum(share, LEAST)
    return weights


def _still_followed_by(
    covariates: NDArray[np.floating],
    days: Array,
    status: NDArray[np.int8],
    horizon: float,
    fit: NDArray[np.bool_],
    known: NDArray[np.bool_],
) -> Array:
    """Return the share still followed of each row in `known`, by its own covariates."""
    x = _standardised(covariates, fit)
    left = (status == LEFT) & (days < horizon)
    # At equal times those who fell ill or died come first: they were not there to leave any more.
    there = np.where(left | (days >= horizon), days, np.nextafter(days, -np.inf))
    b, times, hazard = _cox(x[fit], there[fit], left[fit])
    stays = np.log1p(-np.minimum(hazard, 1 - 1e-12))  # a product, as Kaplan and Meier's
    until = np.concatenate([[0.0], np.cumsum(stays)])[np.searchsorted(times, days[known])]
    return np.exp(until * np.exp(x[known] @ b))


def _standardised(covariates: NDArray[np.floating], fit: NDArray[np.bool_]) -> Array:
    """Z-scores by the rows `fit`, gaps at the mean, and a column of gaps for each that has any.

    What lies outside the range of these rows is moved to its ends.
    """
    x = np.asarray(covariates, dtype=np.float64)
    gaps = np.isnan(x)
    known = ~gaps[fit].all(axis=0)  # of the others nothing is learned
    mean, sd = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    mean[known], sd[known] = (f(x[fit][:, known], axis=0) for f in (np.nanmean, np.nanstd))
    z = np.where(gaps | ~known, 0.0, (x - mean) / np.where(sd > 0, sd, 1.0))
    z = np.clip(z, z[fit].min(axis=0), z[fit].max(axis=0))  # nor beyond what was seen
    told = gaps[fit].any(axis=0) & known
    return np.column_stack([z, gaps[:, told] - gaps[fit][:, told].mean(axis=0)])


def _cox(x: Array, days: Array, left: NDArray[np.bool_]) -> tuple[Array, Array, Array]:
    """Coefficients (d,) of leaving, the times at which somebody left, and the baseline's hazards.

    Newton's method on Breslow's partial likelihood, with a ridge of one row's worth, so that a
    covariate that separates has a finite coefficient.
    """
    order = np.argsort(-days, kind="stable")  # the last come first: who is at risk adds up
    x, days, left = x[order], days[order], left[order]
    times, leavers = np.unique(days[left], return_counts=True)
    last = np.searchsorted(-days, -times, side="right") - 1  # of those still there at each time
    gone = x[left].sum(axis=0)
    b = np.zeros(x.shape[1])
    for _ in range(50):
        risk = np.exp(x @ b)
        total = np.cumsum(risk)[last]
        mean = np.cumsum(risk[:, None] * x, axis=0)[last] / total[:, None]
        gradient = gone - leavers @ mean - b
        hessian = np.eye(len(b)) - np.einsum("t,ti,tj->ij", leavers, mean, mean)
        of_time = np.zeros(len(days))  # Σ over times of leavers/total, for rows at risk then
        np.add.at(of_time, last, leavers / total)
        of_time = np.cumsum(of_time[::-1])[::-1]
        hessian += (x * (risk * of_time)[:, None]).T @ x
        step = np.linalg.solve(hessian, gradient)
        b = b + np.clip(step, -2, 2)
        if np.abs(step).max(initial=0.0) < 1e-9:
            break
    return b, times, leavers / np.cumsum(np.exp(x @ b))[last]
