"""Raw feature rows → winsorised and scaled rows, in which NaN still means missing.

Everything here is fitted on the observed entries of the training rows alone. A column without any
observed training entry has no known scale: whatever turns up in it later is treated as missing.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri
from sklearn import preprocessing
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from ehr_sn.errors import did_you_mean

__all__ = [
    "SCALERS",
    "MinMaxScaler",
    "QuantileScaler",
    "RowTransformer",
    "StandardScaler",
    "Winsoriser",
    "make_scaler",
]


class RowTransformer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator, ABC):
    """A transformer of float rows (n_rows, n_features) in which NaN means missing.

    A subclass writes `_fit(X)` and `_transform(X)` for rows that were checked here: float32 or
    float64, as many columns as in training, no infinity. `_transform` returns a new array of the
    same dtype and computes each row from that row and the fitted state alone.
    """

    def fit(self, X: ArrayLike, y: object = None) -> Self:
        """Learn from training rows; forgets any earlier fit."""
        self._fit(self._checked(X, reset=True))
        return self

    def transform(self, X: ArrayLike) -> NDArray[np.floating]:
        """Transform rows; changes nothing that was fitted."""
        check_is_fitted(self)
        return self._transform(self._checked(X, reset=False))

    @abstractmethod
    def _fit(self, X: NDArray[np.floating]) -> None: ...

    @abstractmethod
    def _transform(self, X: NDArray[np.floating]) -> NDArray[np.floating]: ...

    def _checked(self, rows: ArrayLike, *, reset: bool) -> NDArray[np.floating]:
        X: NDArray[np.floating] = validate_data(
            self, rows, reset=reset, dtype=[np.float64, np.float32], ensure_all_finite=False
        )
        infinite = np.isinf(X)
        if infinite.any():
            columns = np.flatnonzero(infinite.any(axis=0))
            names = getattr(self, "feature_names_in_", np.arange(X.shape[1]))[columns[:5]].tolist()
            more = f" and {len(columns) - 5} more" if len(columns) > 5 else ""
            raise ValueError(
                f"Input contains infinity in {infinite.any(axis=1).sum()} of {len(X)} rows, "
                f"columns {names}{more}. Write missing entries as NaN (not inf) and correct others."
            )
        return X

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class Winsoriser(RowTransformer):
    """Clip each column to the [q, 1 − q] quantiles of its observed training entries.

    A missing entry stays missing. Where both quantiles coincide though the column varies (a flag
    or count that is rarer than q), the column's training minimum and maximum are the limits
    instead: clipping tames outliers and never erases a column.

    Parameters
    ----------
    quantile : float, default 0.005
        q, in [0, 0.5). With 0 nothing is clipped.

    Attributes
    ----------
    lower_, upper_ : float64 arrays (n_features,)
        The limits; NaN for a column without observed training entries, all of whose entries then
        come out missing.

    Examples
    --------
    >>> import numpy as np
    >>> sbp = np.array([[110.0], [120.0], [np.nan], [130.0], [140.0], [13682.0]])
    >>> Winsoriser(quantile=0.25).fit_transform(sbp).ravel()
    array([120., 120.,  nan, 130., 140., 140.])
    """

    def __init__(self, *, quantile: float = 0.005) -> None:
        self.quantile = quantile

    def _fit(self, X: NDArray[np.floating]) -> None:
        q = self.quantile
        if not 0 <= q < 0.5:
            raise ValueError(f"quantile must be in [0, 0.5); got {q!r}")
        limits = np.full((2, X.shape[1]), np.nan)
        known = ~np.isnan(X).all(axis=0)
        if q == 0:
            limits[:, known] = [[-np.inf], [np.inf]]
        else:
            limits[:, known] = np.nanquantile(X[:, known], [q, 1 - q], axis=0)
            flat = limits[0] == limits[1]
            limits[:, flat] = np.nanmin(X[:, flat], axis=0), np.nanmax(X[:, flat], axis=0)
        self.lower_, self.upper_ = limits

    def _transform(self, X: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.clip(X, self.lower_.astype(X.dtype), self.upper_.astype(X.dtype))


class QuantileScaler(RowTransformer):
    """Map each column to normal scores: Φ⁻¹ of the entry's rank among observed training entries.

    Ranks lie in [0, 1], are interpolated linearly between stored quantiles, and tied entries
    share their middle rank, so a constant column becomes 0 and the two values of a flag stay near
    0. Ranks are kept a margin away from 0 and 1, which bounds the score of an entry beyond the
    training range: half a quantile step, or half an observation where fewer were made (±3.29
    from 1000 observations on).

    scikit-learn's `QuantileTransformer` differs at the ends: it sends every entry that equals the
    training minimum or maximum to ±5.2, and so a constant column, both values of a flag, and
    everything that a winsoriser clipped.

    Parameters
    ----------
    n_quantiles : int, default 1000
        Quantiles stored a column; never more than there are training rows.

    Attributes
    ----------
    quantiles_ : float64 array (number of quantiles, n_features)
        At evenly spaced ranks from 0 to 1; NaN for a column without observed training entries.
    margin_ : float64 array (n_features,)
        The least distance of a rank from 0 and 1.

    Examples
    --------
    >>> import numpy as np
    >>> scaler = QuantileScaler().fit([[10.0], [30.0], [90.0], [2700.0]])  # ferritin
    >>> scaler.transform([[10.0], [50.0], [9000.0], [np.nan]]).ravel().round(2)
    array([-1.15, -0.14,  1.15,   nan])
    """

    def __init__(self, *, n_quantiles: int = 1000) -> None:
        self.n_quantiles = n_quantiles

    def _fit(self, X: NDArray[np.floating]) -> None:
        if self.n_quantiles < 1:
            raise ValueError(f"n_quantiles must be at least 1; got {self.n_quantiles!r}")
        ranks = np.linspace(0, 1, min(self.n_quantiles, len(X)))
        count = (~np.isnan(X)).sum(axis=0)
        known = count > 0
        self.margin_ = 0.5 / np.clip(count, 1, self.n_quantiles)
        self.quantiles_ = np.full((len(ranks), X.shape[1]), np.nan)
        self.quantiles_[:, known] = np.maximum.accumulate(
            np.nanquantile(X[:, known], ranks, axis=0)  # rounding may break their order
        )

    def _transform(self, X: NDArray[np.floating]) -> NDArray[np.floating]:
        ranks = np.linspace(0, 1, len(self.quantiles_))
        scores = np.full_like(X, np.nan)
        for j in np.flatnonzero(~np.isnan(self.quantiles_[0])):
            x, quantiles = X[:, j], self.quantiles_[:, j]
            highest = np.interp(x, quantiles, ranks)
            lowest = 1 - np.interp(-x, -quantiles[::-1], ranks)
            middle = (lowest + highest) / 2
            scores[:, j] = ndtri(np.clip(middle, self.margin_[j], 1 - self.margin_[j]))
        return scores


class _QuietFit:
    """scikit-learn fits a column without observed entries correctly (it stays NaN), but warns."""

    def fit(self, X: ArrayLike, y: object = None) -> Self:
        with np.errstate(invalid="ignore"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
            return super().fit(X, y)  # type: ignore[misc]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()  # type: ignore[misc]
        tags.array_api_support = False  # NumPy throughout, like all other steps
        return tags


class StandardScaler(_QuietFit, preprocessing.StandardScaler):
    """z-scores; a column of flags (0 and 1 only) is centred, and keeps its unit.

    Dividing a rare flag by its standard deviation would make it larger than any measurement: one
    present in 1 of 400 rows would reach 20. After A. Gelman, "Scaling regression inputs by dividing
    by two standard deviations", Statistics in Medicine 27:2865 (2008), who leaves flags unscaled.
    Otherwise scikit-learn's `StandardScaler`, silent about columns without observed training
    entries.

    >>> StandardScaler().fit_transform([[2.0, 1.0], [4.0, 0.0], [6.0, 0.0], [8.0, 1.0]])[:, 1]
    array([ 0.5, -0.5, -0.5,  0.5])
    """

    def fit(self, X: ArrayLike, y: object = None) -> Self:
        super().fit(X, y)
        X = check_array(X, dtype="numeric", ensure_all_finite="allow-nan")
        flags = np.isin(X, (0, 1)) | np.isnan(X)
        self.scale_: NDArray[np.floating] = np.where(flags.all(axis=0), 1.0, self.scale_)
        return self


class MinMaxScaler(_QuietFit, preprocessing.MinMaxScaler):
    """scikit-learn's `MinMaxScaler`, silent about columns without observed training entries."""


SCALERS: dict[str, Callable[[], BaseEstimator]] = {
    "none": partial(Winsoriser, quantile=0),
    "standard": StandardScaler,
    "minmax": partial(MinMaxScaler, clip=True),
    "quantile": QuantileScaler,
}
"""Name → factory. `none` changes no value; `standard` gives z-scores; `minmax` gives [0, 1], also
for later rows; `quantile` gives normal scores."""


def make_scaler(name: str) -> BaseEstimator:
    """Return a new scaler: `none`, `standard`, `minmax` or `quantile`.

    Raises ValueError, with the nearest valid names, for any other.

    >>> make_scaler("minmax").fit_transform([[1.0], [float("nan")], [3.0]]).ravel()
    array([ 0., nan,  1.])
    """
    if name not in SCALERS:
        raise ValueError(f"unknown scaler {name!r}; {did_you_mean(name, SCALERS)}")
    return SCALERS[name]()
