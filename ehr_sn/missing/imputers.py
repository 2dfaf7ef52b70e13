"""Scaled rows with NaN → complete rows a network can take; and the registry of all such methods.

A method is registered by one decorator, and thereby gets its `+mask` variant, `make_method`,
its saved state, and every test in tests/missing/test_all_methods.py:

    @register("my_method")
    class MyImputer(MissingMethod): ...
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from ehr_sn.errors import did_you_mean
from ehr_sn.missing.scalers import RowTransformer, Winsoriser, make_scaler

__all__ = [
    "METHODS",
    "CountAppender",
    "Erasure",
    "MeanImputer",
    "MedianImputer",
    "MissingMethod",
    "MostFrequentImputer",
    "ZeroImputer",
    "get_state",
    "make_method",
    "method_names",
    "register",
    "set_state",
]


@dataclass(frozen=True)
class Erasure:
    """What becomes of a method's output row when entries of the input row go missing.

    source : (n_columns,) the feature that each column of the output stems from
    blank : (n_columns,) what the column holds where that feature is missing
    exponent, scaled : the first `scaled` columns are then multiplied by
        (|m| before / |m| after) ** exponent, where |m| counts observed entries and is at least 1
    """

    source: NDArray[np.integer]
    blank: NDArray[np.floating]
    exponent: float = 0.0
    scaled: int = 0


class MissingMethod(RowTransformer):
    """Base of every method: turns rows with NaN into rows without, and appends the mask if asked.

    A subclass writes `_fit(X)`, which sets attributes that end in "_" and hold numbers, arrays or
    text (so that `get_state` can save them), and `_fill(X, observed)`, which returns a new array
    of X's dtype without NaN: X's columns, and after them any that the method adds (named by
    `_names`). It may write `_erasure()`, so that training can hide entries at little cost.

    Parameters
    ----------
    add_mask : bool, default False
        Return [filled | mask], of shape (n_rows, 2 · n_features): after the filled features one
        0/1 column `<name>.observed` for every feature, whether or not it was missing in training.
    """

    candidates: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    """Parameters among which the tuning rows choose, in the comparison."""
    draws: ClassVar[bool] = False
    """Whether each seed of the comparison trains on a draw of its own, by the parameter `draw`."""

    def __init__(self, *, add_mask: bool = False) -> None:
        self.add_mask = add_mask

    def _transform(self, X: NDArray[np.floating]) -> NDArray[np.floating]:
        return self.finish(self._fill(X, ~np.isnan(X)), X)

    def finish(self, filled: NDArray[np.floating], X: NDArray[np.floating]) -> NDArray[np.floating]:
        """What `transform` makes of rows X that are filled already: appends the mask, if asked."""
        return np.hstack([filled, (~np.isnan(X)).astype(X.dtype)]) if self.add_mask else filled

    def erasure(self) -> Erasure | None:
        """How output rows change when entries go missing; None if other entries change as well."""
        filled = self._erasure()
        if filled is None or not self.add_mask:
            return filled
        n = self.n_features_in_
        return replace(
            filled,
            source=np.concatenate([filled.source, np.arange(n)]),
            blank=np.concatenate([filled.blank, np.zeros(n)]),
        )

    def _erasure(self) -> Erasure | None:
        return None

    def sources(self) -> NDArray[np.int64]:
        """(n_columns,) the feature that each output column stems from; −1 for no single one."""
        mask = np.arange(self.n_features_in_ if self.add_mask else 0)
        return np.concatenate([self._sources(), mask])

    def _sources(self) -> NDArray[np.int64]:
        return np.arange(self.n_features_in_)

    @abstractmethod
    def _fill(
        self, X: NDArray[np.floating], observed: NDArray[np.bool_]
    ) -> NDArray[np.floating]: ...

    def get_feature_names_out(self, input_features: ArrayLike | None = None) -> NDArray[np.object_]:
        """Names of the output columns: the features, what the method adds, then with `add_mask`
        `<name>.observed`.
        """
        features = super().get_feature_names_out(input_features)
        names = self._names(features)
        return np.concatenate([names, features + ".observed"]) if self.add_mask else names

    def _names(self, features: NDArray[np.object_]) -> NDArray[np.object_]:
        return features


METHODS: dict[str, Callable[..., MissingMethod]] = {}
"""Name → factory, which takes the method's parameters."""

_Method = TypeVar("_Method", bound=type[MissingMethod])


def register(name: str) -> Callable[[_Method], _Method]:
    """Class decorator: enter a method as `name`, and with the mask appended as `name+mask`."""

    def enter(cls: _Method) -> _Method:
        if name in METHODS:
            raise ValueError(f"method {name!r} is already registered")
        METHODS[name] = cls
        METHODS[f"{name}+mask"] = lambda **params: cls(add_mask=True, **params)
        return cls

    return enter


class _ColumnImputer(MissingMethod):
    """Fill each column with one number, `fill_` (n_features,), learned from training rows."""

    def _fit(self, X: NDArray[np.floating]) -> None:
        known = ~np.isnan(X).all(axis=0)
        self.fill_ = np.zeros(X.shape[1])
        self.fill_[known] = self._statistic(X[:, known])

    def _fill(self, X: NDArray[np.floating], observed: NDArray[np.bool_]) -> NDArray[np.floating]:
        return np.where(observed, X, self.fill_.astype(X.dtype))

    def _erasure(self) -> Erasure:
        return Erasure(np.arange(len(self.fill_)), self.fill_)

    @abstractmethod
    def _statistic(self, X: NDArray[np.floating]) -> NDArray[np.floating] | float: ...


@register("zero")
class ZeroImputer(_ColumnImputer):
    """Fill missing entries with 0; after z-scoring this *is* mean imputation.

    >>> nan = float("nan")
    >>> ZeroImputer(add_mask=True).fit_transform([[1.0, nan], [3.0, 0.0]])
    array([[1., 0., 1., 0.],
           [3., 0., 1., 1.]])
    """

    def _statistic(self, X: NDArray[np.floating]) -> float:
        return 0.0


@register("mean")
class MeanImputer(_ColumnImputer):
    """Fill with the mean of a column's observed training entries; 0 where there are none.

    >>> nan = float("nan")
    >>> MeanImputer().fit_transform([[1.0, nan], [nan, nan], [3.0, nan]])
    array([[1., 0.],
           [2., 0.],
           [3., 0.]])
    """

    def _statistic(self, X: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.nanmean(X, axis=0, dtype=np.float64)


@register("median")
class MedianImputer(_ColumnImputer):
    """Fill with the median of a column's observed training entries; 0 where there are none.

    >>> MedianImputer().fit([[1.0], [2.0], [900.0]]).transform([[float("nan")]])
    array([[2.]])
    """

    def _statistic(self, X: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.nanmedian(X, axis=0)


@register("most_frequent")
class MostFrequentImputer(_ColumnImputer):
    """Fill with the most frequent observed training entry of a column, the smallest of several.

    0 where there is none. Meant for flags and categories: of a continuous measurement no entry may
    occur twice, and then this is its minimum.

    >>> MostFrequentImputer().fit([[1.0], [0.0], [1.0]]).transform([[float("nan")]])
    array([[1.]])
    """

    def _statistic(self, X: NDArray[np.floating]) -> NDArray[np.floating]:
        counted = (np.unique(x[~np.isnan(x)], return_counts=True) for x in X.T)
        return np.array([values[count.argmax()] for values, count in counted])


@register("zero+count")
class CountAppender(MissingMethod):
    """Fill with 0 and append how many entries of the row are observed, as a z-score.

    What sparsity normalization corrects for is this number, so it is the plainest alternative:
    tell it to the network. Mean and sd are those of training rows.

    >>> nan = float("nan")
    >>> CountAppender().fit_transform([[1.0, nan], [2.0, 3.0]])
    array([[ 1.,  0., -1.],
           [ 2.,  3.,  1.]])
    """

    def _fit(self, X: NDArray[np.floating]) -> None:
        count = (~np.isnan(X)).sum(axis=1)
        self.count_mean_ = float(count.mean())
        self.count_sd_ = float(count.std()) or 1.0

    def _fill(self, X: NDArray[np.floating], observed: NDArray[np.bool_]) -> NDArray[np.floating]:
        z = (observed.sum(axis=1, keepdims=True) - self.count_mean_) / self.count_sd_
        return np.hstack([np.where(observed, X, X.dtype.type(0)), z.astype(X.dtype)])

    def _sources(self) -> NDArray[np.int64]:
        return np.append(np.arange(self.n_features_in_), -1)

    def _names(self, features: NDArray[np.object_]) -> NDArray[np.object_]:
        return np.append(features, "observed.count")


def method_names() -> list[str]:
    """Names that `make_method` takes.

    >>> method_names()[:4]
    ['zero', 'zero+mask', 'mean', 'mean+mask']
    """
    return list(METHODS)


def make_method(
    name: str, scaler: str = "standard", winsorise: float = 0.005, **params: Any
) -> Pipeline:
    """Return a new pipeline: winsorise → scale → handle what is missing.

    The order matters: filling and sparsity normalization act on scaled values, so that 0 means
    the training mean (`standard`), about the median (`quantile`), or the training minimum
    (`minmax`).

    Parameters
    ----------
    name : one of `method_names()`
    scaler : one of `SCALERS`
    winsorise : the quantile at which both tails are clipped; 0 clips nothing
    **params : passed to the method, such as `k` and `exponent` of sparsity normalization

    Returns
    -------
    sklearn.pipeline.Pipeline with the steps `winsoriser`, `scaler` and `method`: (n_rows,
    n_features) floats with NaN in, the same dtype without NaN out, wider by n_features with
    `+mask`. A column without any observed training entry counts as missing in every row, in the
    mask too.

    Raises
    ------
    ValueError, with the nearest valid names, for an unknown `name` or `scaler`.

    Examples
    --------
    >>> nan = float("nan")
    >>> method = make_method("zero+mask", scaler="minmax", winsorise=0)
    >>> method.fit([[40.0, 1.0], [60.0, nan], [80.0, 3.0]]).transform([[70.0, nan]])
    array([[0.75, 0.  , 1.  , 0.  ]])
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {did_you_mean(name, METHODS)}")
    return Pipeline(
        [
            ("winsoriser", Winsoriser(quantile=winsorise)),
            ("scaler", make_scaler(scaler)),
            ("method", METHODS[name](**params)),
        ]
    )


def get_state(pipeline: Pipeline) -> dict[str, NDArray[Any]]:
    """Everything a fitted pipeline of `make_method` has learned, as plain arrays.

    Keys are `<step>.<class>.<attribute>`. All arrays are numeric, so that `np.savez` and
    safetensors both take them: text (feature names) travels as the UTF-8 bytes of its JSON under
    a key that ends in `:json`. Constructor parameters are not part of the state.
    """
    check_is_fitted(pipeline)
    state = {}
    for owner, step in _owners(pipeline).items():
        for attribute, value in vars(step).items():
            if not _is_fitted_attribute(attribute):
                continue
            array = np.asarray(value)
            if array.dtype.kind in "OU":
                text = json.dumps(array.tolist()).encode()
                state[f"{owner}.{attribute}:json"] = np.frombuffer(text, dtype=np.uint8)
            else:
                state[f"{owner}.{attribute}"] = array.copy()
    return state


def set_state(pipeline: Pipeline, state: dict[str, NDArray[Any]]) -> Pipeline:
    """Give a new pipeline what `get_state` took from a fitted one; returns the pipeline.

    The pipeline must have been built with the same arguments; a state of other steps raises
    ValueError.

    >>> nan = float("nan")
    >>> fitted = make_method("mean", scaler="none").fit([[1.0, nan], [3.0, 5.0]])
    >>> restored = set_state(make_method("mean", scaler="none"), get_state(fitted))
    >>> bool((restored.transform([[nan, nan]]) == fitted.transform([[nan, nan]])).all())
    True
    """
    owners = _owners(pipeline)
    split = {key: key.rpartition(".")[::2] for key in state}
    if {owner for owner, _ in split.values()} != set(owners):
        raise ValueError(
            f"the state belongs to {sorted({owner for owner, _ in split.values()})}, but the "
            f"pipeline has {sorted(owners)}: build it with the arguments of the saved one"
        )
    for key, (owner, attribute) in split.items():
        attribute, _, encoding = attribute.partition(":")
        if not _is_fitted_attribute(attribute):
            raise ValueError(f"the state holds {key!r}, which is no fitted attribute")
        value: Any = state[key]
        if encoding == "json":
            value = json.loads(value.tobytes())
            value = np.array(value, dtype=object) if isinstance(value, list) else value
        else:
            value = value.item() if value.ndim == 0 else value.copy()
        setattr(owners[owner], attribute, value)
    return pipeline


def _owners(pipeline: Pipeline) -> dict[str, Any]:
    return {f"{name}.{type(step).__name__}": step for name, step in pipeline.steps}


def _is_fitted_attribute(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_")
