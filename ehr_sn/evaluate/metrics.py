"""Turn held-out labels and predicted probabilities into numbers that say how good they are.

Labels `y` are 0 or 1, one a row, shape `(n,)`. Scores may be any numbers that rise with risk; what
is called `p` must be probabilities. A `weight`, (n,), says how many rows each row stands for, such
as those like it whose follow-up ended too early (`ehr_sn.survival`); without, each is one.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score

CLIP = 1e-6
"""Probabilities nearer than this to 0 or 1 are moved to it before their logit is taken."""

Array = NDArray[np.float64]


class Sample(NamedTuple):
    """Labels and probabilities of the same rows, whose rows they are, and what each stands for.

    All (n,). Without `subject` each row is a subject of its own, without `weight` each counts one:
    then it is `simple`, and has the errors of independent rows.
    """

    y: ArrayLike
    p: ArrayLike
    subject: ArrayLike | None = None
    weight: ArrayLike | None = None

    def where(self, rows: NDArray[np.bool_]) -> "Sample":
        """Only some of the rows."""
        subject, weight = (
            None if part is None else np.asarray(part)[rows] for part in (self.subject, self.weight)
        )
        return Sample(np.asarray(self.y)[rows], np.asarray(self.p)[rows], subject, weight)

    @property
    def owners(self) -> NDArray[np.intp]:
        """(n,): each row's subject, numbered from 0."""
        return (
            np.arange(len(np.asarray(self.y))) if self.subject is None else numbered(self.subject)
        )

    @property
    def simple(self) -> bool:
        owners = self.owners
        return self.weight is None and len(owners) == owners.max(initial=-1) + 1

    @property
    def each(self) -> Array:
        """What the rows count, (n,) or one number for all."""
        return np.asarray(1.0 if self.weight is None else self.weight, dtype=np.float64)

    def mean(self, x: Any) -> float:
        """Return the weighted mean of something known of each row, (n,)."""
        return float(np.mean(x) if self.weight is None else np.average(x, weights=self.each))

    def variance_of_mean(self, x: ArrayLike) -> float:
        """The square of the standard error of `mean`, between subjects."""
        x = np.asarray(x, dtype=np.float64)
        if self.simple:
            return float(x.var() / x.size)
        each = np.broadcast_to(self.each, x.shape)
        return self.variance_of_sum(each * (x - self.mean(x)) / each.sum())

    def variance_of_sum(self, moves: Array) -> float:
        """The variance of what rows move by `moves` (n,), which sum up to 0, between subjects."""
        n = self.owners.max() + 1
        return self.squares(moves) * n / (n - 1) if n > 1 else np.nan

    def squares(self, moves: Array) -> float:
        """The sum over subjects of the squares of what their rows add up to, of (n,)."""
        return float(np.square(by_subject(moves[None], self.owners)).sum())

    @property
    def subjects_by_class(self) -> tuple[int, int]:
        """How many subjects have a positive row, and how many a negative one.

        >>> Sample([1, 1, 0, 0], [0.1, 0.2, 0.3, 0.4], ["a", "a", "a", "b"]).subjects_by_class
        (1, 2)
        """
        y, owners = np.asarray(self.y), self.owners
        return len(np.unique(owners[y == 1])), len(np.unique(owners[y == 0]))


class Calibration(NamedTuple):
    """How far the predicted probabilities can be taken at their word: ideally 1 and 0."""

    slope: float
    intercept: float


def auroc(y: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> Array:
    """Area under the ROC curve, a tie counting one half, for one prediction or many at once.

    Parameters
    ----------
    y : shape (n,), 0 or 1
    score : shape (..., n), higher = more likely positive; each row is one prediction of `y`
    weight : shape (n,)

    Returns
    -------
    shape (...), a NumPy scalar for one prediction

    Raises
    ------
    ValueError
        Labels other than 0 and 1, only one class, a NaN score, or shapes that do not match.

    Notes
    -----
    The Mann–Whitney statistic from midranks, O(n log n): (R − m(m+1)/2) / (m(n−m)), where R is the
    sum of the ranks of the m positives (Hanley and McNeil, Radiology 143:29, 1982). With weights a
    pair weighs the product of its two: with those of censoring, the cumulative/dynamic AUROC of
    Uno et al., JASA 102:527 (2007).

    Examples
    --------
    >>> float(auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]))
    0.75
    >>> auroc([0, 1, 1], [[1, 2, 3], [3, 2, 1], [0, 0, 0]])
    array([1. , 0. , 0.5])
    """
    positive, score = checked(y, score)
    m, k = class_sizes(positive)
    if weight is not None:
        weight = checked_weight(weight, positive)
        below = beaten(score[..., positive], score[..., ~positive], weight[~positive])
        total = weight[positive].sum() * weight[~positive].sum()
        weighted: Array = (below * weight[positive]).sum(axis=-1) / total
        return weighted
    rank_sum: Array = rankdata(score, axis=-1)[..., positive].sum(axis=-1)
    return (rank_sum - m * (m + 1) / 2) / (m * k)


def beaten(score: Array, others: Array, weight: Array) -> Array:
    """The weight of the `others` (..., k) that each score (..., m) lies above, ties at one half.

    >>> beaten(np.array([2.0, 3.0]), np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    array([3., 5.])
    """
    if score.ndim > 1:
        return np.stack([beaten(s, o, weight) for s, o in zip(score, others, strict=True)])
    order = np.argsort(others, kind="stable")
    total = np.concatenate([[0.0], np.cumsum(weight[order])])
    low, high = (np.searchsorted(others[order], score, side) for side in ("left", "right"))
    return (total[low] + total[high]) / 2


def auprc(y: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Area under the precision–recall curve, as average precision (no interpolation).

    `y` and `score` have shape (n,). A prediction without information scores the prevalence.
    Raises ValueError as `auroc` does.

    >>> round(auprc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
    0.8333
    """
    positive, score = checked(y, score, ndim=1)
    class_sizes(positive)
    weight = None if weight is None else checked_weight(weight, positive)
    return float(average_precision_score(positive, score, sample_weight=weight))


def brier(y: ArrayLike, p: ArrayLike, weight: ArrayLike | None = None) -> Array:
    """Mean squared difference between label and probability (Brier, 1950); lower is better.

    `y` has shape (n,), `p` shape (..., n); returns shape (...). Raises ValueError for labels other
    than 0 and 1 and for values of `p` outside [0, 1]; a single class is fine.

    >>> round(float(brier([0, 1], [0.1, 0.8])), 3)
    0.025
    """
    positive, p = checked(y, p, probabilities=True)
    square = np.square(p - positive)
    if weight is not None:
        return np.asarray(np.average(square, axis=-1, weights=checked_weight(weight, positive)))
    error: Array = square.mean(axis=-1)
    return error


def calibration(y: ArrayLike, p: ArrayLike, weight: ArrayLike | None = None) -> Calibration:
    """Calibration slope, and intercept as *calibration-in-the-large*.

    Two separate logistic models of `y` (shape (n,)) given lp = logit(p), `p` of shape (n,):

    - slope: b in logit P(y=1) = a + b·lp. Below 1 the predictions are too extreme, as after
      overfitting; above 1 too timid.
    - intercept: a in logit P(y=1) = a + lp, with lp as an offset, so its slope stays at 1. Above 0
      the predicted risks are too low on average. It is *not* the `a` of the slope's model.

    The definitions are those of Van Calster et al., J Clin Epidemiol 74:167 (2016) and
    BMC Medicine 17:230 (2019). `p` is first moved to at least 1e-6 from 0 and 1.

    The slope is NaN where no finite one exists: constant `p`, or `p` that separates the classes.
    Raises ValueError as `auroc` does, and for values of `p` outside [0, 1].

    >>> result = calibration([0, 1, 0, 1, 1, 0], [0.2, 0.6, 0.5, 0.7, 0.4, 0.3])
    >>> f"slope {result.slope:.2f}, intercept {result.intercept:.2f}"
    'slope 2.89, intercept 0.23'
    """
    positive, p = checked(y, p, ndim=1, probabilities=True)
    class_sizes(positive)
    lp = logit(np.clip(p, CLIP, 1 - CLIP))
    weight = None if weight is None else checked_weight(weight, positive)
    return Calibration(
        _recalibration_slope(positive, lp, weight), _in_the_large(positive, lp, weight)
    )


def calibration_in_the_large(y: ArrayLike, p: ArrayLike, weight: ArrayLike | None = None) -> float:
    """The intercept of `calibration` alone, which needs no slope; y and p of shape (n,).

    >>> round(calibration_in_the_large([0, 0, 1], [0.1, 0.2, 0.3]), 2)
    0.73
    """
    positive, p = checked(y, p, ndim=1, probabilities=True)
    class_sizes(positive)
    weight = None if weight is None else checked_weight(weight, positive)
    return _in_the_large(positive, logit(np.clip(p, CLIP, 1 - CLIP)), weight)


def summarise(y: ArrayLike, p: ArrayLike, weight: ArrayLike | None = None) -> dict[str, float]:
    """Every metric of this module for one prediction; `y` and `p` have shape (n,).

    Raises ValueError as `calibration` does.

    >>> for name, value in summarise([0, 1, 0, 1], [0.2, 0.4, 0.5, 0.8]).items():
    ...     print(name, round(value, 3))
    auroc 0.75
    auprc 0.833
    brier 0.172
    calibration_slope 1.701
    calibration_intercept 0.123
    """
    slope, intercept = calibration(y, p, weight)
    return {
        "auroc": float(auroc(y, p, weight)),
        "auprc": auprc(y, p, weight),
        "brier": float(brier(y, p, weight)),
        "calibration_slope": slope,
        "calibration_intercept": intercept,
    }


_SHAPES = {None: "(..., n)", 1: "(n,)", 2: "(k, n)"}


def checked(
    y: ArrayLike, score: ArrayLike, *, ndim: int | None = None, probabilities: bool = False
) -> tuple[NDArray[np.bool_], Array]:
    """Labels as booleans (n,) and scores as float64 (..., n), or a ValueError that says why not.

    `ndim` is the number of dimensions the scores must have, `probabilities` their limits.

    >>> checked([0, 2], [0.1, 0.2])
    Traceback (most recent call last):
    ValueError: y must be 0 or 1, but 1 of 2 labels is not: leave out subjects not eligible
    """
    labels = np.asarray(y)
    score = np.asarray(score, dtype=np.float64)
    if labels.ndim != 1 or score.shape[-1:] != labels.shape or ndim not in (None, score.ndim):
        raise ValueError(
            f"y has shape {labels.shape} and the scores {score.shape}: "
            f"pass y of shape (n,) and scores of shape {_SHAPES[ndim]} for the same subjects"
        )
    if wrong := labels.size - np.count_nonzero((labels == 0) | (labels == 1)):
        raise ValueError(
            f"y must be 0 or 1, but {wrong} of {labels.size} labels {'is' if wrong == 1 else 'are'}"
            " not: leave out subjects not eligible"
        )
    if missing := np.count_nonzero(np.isnan(score)):
        raise ValueError(
            f"{missing} of {score.size} scores are NaN: "
            "look for a training that diverged, or for missing entries that reached the model"
        )
    if probabilities and (outside := np.count_nonzero((score < 0) | (score > 1))):
        raise ValueError(
            f"{outside} of {score.size} values of p are outside [0, 1]: "
            "pass probabilities, not logits"
        )
    return labels == 1, score


def checked_weight(weight: ArrayLike, positive: NDArray[np.bool_]) -> Array:
    """Weights as float64 (n,), or a ValueError that says why not."""
    weight = np.asarray(weight, dtype=np.float64)
    if weight.shape != positive.shape:
        raise ValueError(f"weight has shape {weight.shape} and y {positive.shape}")
    if not (np.isfinite(weight) & (weight > 0)).all():
        raise ValueError("every weight must be a number above 0: leave out rows that count nothing")
    return weight


def numbered(subject: ArrayLike) -> NDArray[np.intp]:
    """Subjects as numbers from 0."""
    return np.unique(np.asarray(subject), return_inverse=True)[1]


def by_subject(x: Array, owners: NDArray[np.intp], subjects: int | None = None) -> Array:
    """Sums over the rows of each subject, numbered from 0: (k, n) to (k, subjects).

    >>> by_subject(np.array([[1.0, 2.0, 4.0]]), np.array([0, 1, 0]))
    array([[5., 2.]])
    """
    return np.stack([np.bincount(owners, weights=row, minlength=subjects or 0) for row in x])


def class_sizes(positive: NDArray[np.bool_]) -> tuple[int, int]:
    """Numbers of positives and negatives; ValueError if there are none of either."""
    m = int(np.count_nonzero(positive))
    if m in (0, positive.size):
        raise ValueError(
            f"only one class among {positive.size} labels, where both are needed: "
            "evaluate on more subjects, stratify the split, or leave this disease out"
        )
    return m, positive.size - m


def _in_the_large(positive: NDArray[np.bool_], lp: Array, weight: Array | None) -> float:
    """The a that solves mean(expit(a + lp)) = prevalence; the two ends bracket it."""

    def mean(x: NDArray[Any]) -> float:
        return float(x.mean() if weight is None else np.average(x, weights=weight))

    prevalence = mean(positive)
    low, high = logit(prevalence) - lp.max() - 1, logit(prevalence) - lp.min() + 1
    return float(brentq(lambda a: mean(expit(a + lp)) - prevalence, low, high, xtol=1e-12))


def _recalibration_slope(
    positive: NDArray[np.bool_], lp: Array, weight: Array | None = None
) -> float:
    """Maximum likelihood slope of logit P(y=1) = a + b·lp by Newton's method, halving its step."""
    cases, controls = lp[positive], lp[~positive]
    if cases.min() >= controls.max() or controls.min() >= cases.max():
        return np.nan  # separated, or constant: the likelihood has no finite maximum in b
    scale = lp.std()
    X = np.column_stack([np.ones_like(lp), (lp - lp.mean()) / scale])
    w = np.float64(1.0) if weight is None else weight / weight.mean()

    def loss(coefficients: Array) -> float:
        eta = X @ coefficients
        return float((w * (np.logaddexp(0, eta) - positive * eta)).mean())

    coefficients = np.array([logit((w * positive).mean()), 0.0])
    for _ in range(50):
        p = expit(X @ coefficients)
        hessian = X.T @ (X * (w * p * (1 - p))[:, None])
        step = np.linalg.lstsq(hessian, X.T @ (w * (positive - p)))[0]
        if np.abs(step).max() < 1e-10:
            return float(coefficients[1] / scale)
        while loss(coefficients + step) > loss(coefficients) + 1e-12:
            step /= 2
        coefficients = coefficients + step
    return np.nan
