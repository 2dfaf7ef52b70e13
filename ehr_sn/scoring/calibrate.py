"""Seed-averaged predictions of tuning rows → the map that makes them probabilities."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from ehr_sn.evaluate.metrics import CLIP, calibration, calibration_in_the_large, checked

FOLDS = 5


@dataclass(frozen=True)
class CalibrationMap:
    """p ↦ expit(intercept + slope · logit p): *logistic recalibration* (Cox, Biometrika 45, 1958).

    Two numbers, which some hundred rows determine, where isotonic regression needs thousands; and
    as the slope is positive, it leaves every ranking, and so the AUROC, as it is.

    >>> CalibrationMap(slope=1.0, intercept=0.0)([0.25, 0.5])
    array([0.25, 0.5 ])
    """

    slope: float
    intercept: float

    @classmethod
    def fit(cls, y: ArrayLike, p: ArrayLike, weight: ArrayLike | None = None) -> CalibrationMap:
        """Fit by maximum likelihood from labels, probabilities and weights, all (n,).

        Predictions without information, or that separate the classes, have no finite slope above
        zero: then only their level is corrected, and the slope is 1. Raises ValueError as
        `metrics.calibration` does.
        """
        positive, p = checked(y, p, ndim=1, probabilities=True)
        slope = calibration(positive, p, weight).slope
        if not slope > 0:  # or NaN
            return cls(1.0, calibration_in_the_large(positive, p, weight))
        model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
        model.fit(_logit(p)[:, None], positive, weight)
        return cls(float(model.coef_[0, 0]), float(model.intercept_[0]))

    def __call__(self, p: ArrayLike) -> NDArray[np.float64]:
        """Calibrated probabilities, float64, of probabilities of any shape."""
        return expit(self.intercept + self.slope * _logit(p))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cross_fitted(
    y: ArrayLike, p: ArrayLike, subjects: ArrayLike | None, weight: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Each row's probability by a map fitted on other subjects' rows; all of shape (n,).

    So a map can be judged on the very rows that there are to fit it. All are NaN where a class has
    too few subjects to be in each of the `FOLDS`.
    """
    positive, p = checked(y, p, ndim=1, probabilities=True)
    mapped = np.full(len(p), np.nan)
    subjects = np.arange(len(p)) if subjects is None else np.asarray(subjects)
    if min(len(np.unique(subjects[positive == c])) for c in (True, False)) < FOLDS:
        return mapped
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    for fit, judge in folds.split(p, positive, subjects):
        each = None if weight is None else np.asarray(weight)[fit]
        mapped[judge] = CalibrationMap.fit(positive[fit], p[fit], each)(p[judge])
    return mapped


def _logit(p: ArrayLike) -> NDArray[np.float64]:
    return logit(np.clip(np.asarray(p, dtype=np.float64), CLIP, 1 - CLIP))
