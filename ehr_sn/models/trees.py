"""Fitted boosted trees ↔ plain arrays, and rows → their probabilities.

Nothing is pickled: what is written is numbers, or the text of the package that grew the trees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.ensemble._hist_gradient_boosting.common import PREDICTOR_RECORD_DTYPE
from sklearn.ensemble._hist_gradient_boosting.predictor import TreePredictor
from torch import Tensor

__all__ = ["HistTrees", "PackageTrees", "StackedTrees", "trees_from_state"]

Rows = NDArray[np.float32]

BLOCK = 1024
"""Rows at a time: they stay in the processor's cache while all trees look at them."""
FIELDS = (
    "feature_idx",
    "num_threshold",
    "missing_go_to_left",
    "left",
    "right",
    "is_leaf",
    "value",
)
"""Of scikit-learn's nodes, what a prediction reads; features are numbers, none a category."""


class StackedTrees(ABC):
    """R models, each a sum of trees, that predict the same rows: as `StackedMLP` for networks."""

    @classmethod
    @abstractmethod
    def stacked(cls, models: Sequence[Self]) -> Self:
        """Models of the same package as one, in their order."""

    @abstractmethod
    def select(self, index: Sequence[int]) -> Self:
        """Some of the models, in the order of `index`."""

    @abstractmethod
    def predict_proba(self, x: Rows) -> Tensor:
        """Probabilities (R, N), float32, of x (N, D), NaN = missing; each row by itself."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All there is to the models, flat, for safetensors; `trees_from_state` reads it."""


class HistTrees(StackedTrees):
    """Models of scikit-learn's HistGradientBoostingClassifier, by the arrays of their nodes.

    Parameters
    ----------
    nodes : for each model its trees, each a structured array (n_nodes,) with at least `FIELDS`
    intercepts : for each model the log odds to which its trees add
    """

    def __init__(
        self, nodes: Sequence[Sequence[NDArray[np.void]]], intercepts: Sequence[float]
    ) -> None:
        self.nodes, self.intercepts = nodes, intercepts

    @classmethod
    def of(
        cls,
        model: HistGradientBoostingClassifier,
        n_trees: int,
        features: NDArray[np.intp] | None = None,
    ) -> HistTrees:
        """One fitted model of two classes, cut off after its first trees.

        `features`: the columns of x from which it learned, in their order; None stands for all.
        """
        trees = [predictor.nodes for (predictor,) in model._predictors[:n_trees]]
        if features is not None:
            trees = [nodes.copy() for nodes in trees]
            for nodes in trees:
                nodes["feature_idx"] = features[nodes["feature_idx"]]
        return cls([trees], [model._baseline_prediction.item()])

    @classmethod
    def stacked(cls, models: Sequence[Self]) -> Self:
        return cls(
            [trees for model in models for trees in model.nodes],
            [intercept for model in models for intercept in model.intercepts],
        )

    def select(self, index: Sequence[int]) -> Self:
        return type(self)([self.nodes[i] for i in index], [self.intercepts[i] for i in index])

    def predict_proba(self, x: Rows) -> Tensor:
        no_category, of_no_feature = np.empty((0, 8), np.uint32), np.empty(0, np.uint32)
        models = [[TreePredictor(n, no_category, no_category) for n in own] for own in self.nodes]
        out = torch.empty(len(models), len(x))
        for start in range(0, len(x), BLOCK):
            rows = x[start : start + BLOCK].astype(np.float64)
            for i, (trees, intercept) in enumerate(zip(models, self.intercepts, strict=True)):
                log_odds = np.full(len(rows), intercept)
                for tree in trees:
                    log_odds += tree.predict(rows, no_category, of_no_feature, n_threads=1)
                out[i, start : start + BLOCK] = torch.from_numpy(expit(log_odds))
        return out

    def state(self) -> dict[str, Tensor]:
        every = [tree for trees in self.nodes for tree in trees]
        nodes = np.concatenate(every)
        tensors = {name: torch.from_numpy(_plain(nodes[name])) for name in FIELDS}
        return tensors | {
            "nodes_of_tree": torch.tensor([len(tree) for tree in every]),
            "trees_of_model": torch.tensor([len(trees) for trees in self.nodes]),
            "intercept": torch.tensor(self.intercepts, dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> HistTrees:
        nodes = np.zeros(len(state["value"]), dtype=PREDICTOR_RECORD_DTYPE)
        for name in FIELDS:
            nodes[name] = state[name].numpy()
        trees = _cut(nodes, state["nodes_of_tree"])
        return cls(_cut(trees, state["trees_of_model"]), state["intercept"].tolist())


class PackageTrees(StackedTrees):
    """Models of LightGBM or XGBoost, as the package writes them itself.

    Parameters
    ----------
    package : one of `READERS`
    written : for each model its text (LightGBM) or UBJSON (XGBoost)
    """

    def __init__(self, package: str, written: Sequence[bytes]) -> None:
        self.package, self.written = package, written

    @cached_property
    def _models(self) -> list[Callable[[Rows], NDArray[np.floating]]]:
        return [READERS[self.package](model) for model in self.written]

    def predict_proba(self, x: Rows) -> Tensor:
        out = torch.empty(len(self.written), len(x))
        for row, predict in zip(out, self._models, strict=True):
            row[:] = torch.from_numpy(predict(x))
        return out

    @classmethod
    def stacked(cls, models: Sequence[Self]) -> Self:
        return cls(models[0].package, [text for model in models for text in model.written])

    def select(self, index: Sequence[int]) -> Self:
        return type(self)(self.package, [self.written[i] for i in index])

    def state(self) -> dict[str, Tensor]:
        return {
            f"{self.package}/{i}": torch.frombuffer(bytearray(text), dtype=torch.uint8)
            for i, text in enumerate(self.written)
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> PackageTrees:
        package = next(iter(state)).partition("/")[0]
        written = [state[f"{package}/{i}"].numpy().tobytes() for i in range(len(state))]
        return cls(package, written)


def trees_from_state(state: Mapping[str, Tensor]) -> StackedTrees:
    """The trees whose `state()` this is.

    >>> x = np.arange(200, dtype=np.float32)[:, None]
    >>> model = HistGradientBoostingClassifier(max_iter=3).fit(x, x[:, 0] > 99)
    >>> trees = HistTrees.of(model, n_trees=3)
    >>> trees_from_state(trees.state()).predict_proba(x).equal(trees.predict_proba(x))
    True
    """
    return (HistTrees if "value" in state else PackageTrees).from_state(state)


def _read_lightgbm(model: bytes) -> Callable[[Rows], NDArray[np.floating]]:
    from lightgbm import Booster

    booster = Booster(model_str=model.decode())
    return lambda x: np.asarray(booster.predict(x, num_threads=1))


def _read_xgboost(model: bytes) -> Callable[[Rows], NDArray[np.floating]]:
    from xgboost import Booster, DMatrix

    booster = Booster({"nthread": 1}, model_file=bytearray(model))
    return lambda x: booster.predict(DMatrix(x, nthread=1))


READERS = {"lightgbm": _read_lightgbm, "xgboost": _read_xgboost}


def _plain(array: NDArray) -> NDArray:
    """A contiguous copy, of a type that every reader of safetensors knows."""
    return np.ascontiguousarray(array, np.int32 if array.dtype.kind in "iu" else array.dtype)


def _cut(array: Any, sizes: Tensor) -> list[Any]:
    """Consecutive pieces of these sizes."""
    ends = [0, *torch.cumsum(sizes, 0).tolist()]
    return [array[start:end] for start, end in pairwise(ends)]
