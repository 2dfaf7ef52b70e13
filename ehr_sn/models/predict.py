"""Trained cell on disk → predictions of any rows, with nothing fitted again."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from sklearn.pipeline import Pipeline

from ehr_sn.config import Config
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.ingest.store import Store
from ehr_sn.missing import make_method, set_state
from ehr_sn.models.methods import find_method
from ehr_sn.models.mlp import StackedMLP
from ehr_sn.models.train import (
    Cell,
    Comparison,
    HeldOut,
    Tensors,
    blended,
    cell_path,
    comparisons,
    filled_as,
    members_of,
    rows_of,
)
from ehr_sn.models.trees import StackedTrees, trees_from_state

LEARNED = ("network/", "method/", "trees/")
Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Raw rows (rows, features), NaN = missing, to probabilities (diseases, seeds, rows)."""
Fill = Callable[[Pipeline, NDArray[np.float32]], NDArray[np.float32]]
"""Takes rows through a fitted method, as `Pipeline.transform` does."""


@dataclass(frozen=True)
class NetworkPredictor:
    """A fitted way of handling what is missing, and the networks trained behind it.

    The networks are stacked by disease, then by seed, and see `block` rows at a time.
    """

    method: Pipeline
    network: StackedMLP
    diseases: int
    block: int = 1024
    fill: Fill = Pipeline.transform

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw rows (rows, features) to probabilities (diseases, seeds, rows)."""
        rows = self.fill(self.method, values)
        probability = self.network.predict_proba(rows, block=self.block)
        return probability.reshape(self.diseases, -1, len(values)).numpy()


@dataclass(frozen=True)
class TreesPredictor:
    """Trees, stacked by disease, then by seed; they take missing entries as they are."""

    trees: StackedTrees
    diseases: int

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw rows (rows, features) to probabilities (diseases, seeds, rows)."""
        return self.trees.predict_proba(values).reshape(self.diseases, -1, len(values)).numpy()


@dataclass(frozen=True)
class Preparation:
    """How rows are made for the networks of a cell: what `make_method` takes, by names.

    `chosen` are the parameters that the tuning rows chose.
    """

    method: str
    scaler: str
    winsorise: float
    chosen: dict[str, Any]

    def pipeline(self, state: Mapping[str, torch.Tensor], **params: Any) -> Pipeline:
        """The fitted method whose `get_state` this is."""
        rows = find_method(self.method).rows
        pipeline = make_method(rows, self.scaler, self.winsorise, **self.chosen, **params)
        return set_state(pipeline, {name: tensor.numpy() for name, tensor in state.items()})


def load_predictor(
    config: Config, store: Store, cell: Cell, fill: Fill = Pipeline.transform
) -> Predict:
    """What the trained cell predicts with.

    For the held-out rows it gives, bit for bit, the probabilities that the file holds. `fill` may
    take the place of `Pipeline.transform`, such as to keep what several cells need.
    """
    if members := members_of(config, cell):
        blend = [load_predictor(config, store, member, fill) for member in members]
        return lambda values: blended([predict(values) for predict in blend])
    preparation, tensors = read_model(config, store, cell)
    if trees := below("trees/", tensors):
        return TreesPredictor(trees_from_state(trees), len(store.diseases))
    loaded = network_predictors(preparation, tensors, len(store.diseases))
    parts = [replace(part, fill=fill) for part in loaded]
    if len(parts) == 1:
        return parts[0]
    return lambda values: np.concatenate([predict(values) for predict in parts], axis=1)


def read_model(config: Config, store: Store, cell: Cell) -> tuple[Preparation, Tensors]:
    """Read from a trained cell what `network_predictors` takes, or the state of trees."""
    with safe_open(cell_path(config, store, cell), framework="pt") as file:
        chosen = json.loads(file.metadata()["about"])["chosen"]
        names = [name for name in file.keys() if name.startswith(LEARNED)]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
    filled = filled_as(cell)
    return Preparation(filled.method, filled.scaler, config.train.winsorise, chosen), tensors


def network_predictors(
    preparation: Preparation, tensors: Tensors, diseases: int
) -> list[NetworkPredictor]:
    """One predictor for all seeds, or one a seed where each has its own draw of the method."""
    network = StackedMLP.from_state(below("network/", tensors)).eval()
    seeds = len(network) // diseases
    if not below("method/0/", tensors):
        return [
            NetworkPredictor(preparation.pipeline(below("method/", tensors)), network, diseases)
        ]
    return [
        NetworkPredictor(
            preparation.pipeline(below(f"method/{seed}/", tensors), draw=seed),
            network.select(range(seed, diseases * seeds, seeds)).eval(),
            diseases,
        )
        for seed in range(seeds)
    ]


def below(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def read_tuning(config: Config, store: Store, cell: Cell) -> dict[str, HeldOut]:
    """Read a cell's predictions of tuning rows, on which choices are made, as `HeldOut`."""
    return rows_of(store, cell.split, "tuning", tuning_probability(config, store, cell))


def tuning_probability(config: Config, store: Store, cell: Cell) -> NDArray[np.float32]:
    """Predictions (diseases, seeds, rows) of all tuning rows, eligible or not."""
    with safe_open(cell_path(config, store, cell), framework="np") as file:
        probability: NDArray[np.float32] = file.get_tensor("probability/tuning")
    return probability


def best_comparison(config: Config, store: Store, among: Sequence[Comparison] = ()) -> Comparison:
    """The (method, scaler, architecture) with the highest AUROC on tuning rows.

    Of the seed-averaged prediction, averaged over diseases and splits. `among` those given, or
    else of all.
    """
    return max(
        among or comparisons(config),
        key=lambda comparison: _on_tuning(config, store, comparison),
    )


def _on_tuning(config: Config, store: Store, comparison: Comparison) -> float:
    return float(
        np.mean(
            [
                auroc(rows.y, rows.ensemble, rows.weight)
                for split in range(config.splits.repeats)
                for rows in read_tuning(config, store, Cell(*comparison, split)).values()
            ]
        )
    )
