"""Trained cell on disk → predictions of any rows, with nothing fitted again."""

import json
from collections.abc import Callable
from dataclasses import dataclass
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
from ehr_sn.models.train import Cell, Comparison, HeldOut, cell_path, comparisons, filled_as
from ehr_sn.models.trees import StackedTrees, trees_from_state

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Raw rows (rows, features), NaN = missing, to probabilities (diseases, seeds, rows)."""


@dataclass(frozen=True)
class NetworkPredictor:
    """A fitted way of handling what is missing, and the networks trained behind it.

    The networks are stacked by disease, then by seed.
    """

    method: Pipeline
    network: StackedMLP
    diseases: int

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw rows (rows, features) to probabilities (diseases, seeds, rows)."""
        probability = self.network.predict_proba(self.method.transform(values))
        return probability.reshape(self.diseases, -1, len(values)).numpy()


@dataclass(frozen=True)
class TreesPredictor:
    """Trees, stacked by disease, then by seed; they take missing entries as they are."""

    trees: StackedTrees
    diseases: int

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw rows (rows, features) to probabilities (diseases, seeds, rows)."""
        return self.trees.predict_proba(values).reshape(self.diseases, -1, len(values)).numpy()


def load_predictor(config: Config, store: Store, cell: Cell) -> Predict:
    """What the trained cell predicts with.

    For the held-out rows it gives, bit for bit, the probabilities that the file holds.
    """
    with safe_open(cell_path(config, store, cell), framework="pt") as file:
        chosen = json.loads(file.metadata()["about"])["chosen"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    diseases = len(store.diseases)
    if trees := _below("trees/", tensors):
        return TreesPredictor(trees_from_state(trees), diseases)
    network = StackedMLP.from_state(_below("network/", tensors))

    def method(prefix: str, **params: Any) -> Pipeline:
        filled = filled_as(cell)
        rows, winsorise = find_method(filled.method).rows, config.train.winsorise
        pipeline = make_method(rows, filled.scaler, winsorise, **chosen, **params)
        return set_state(pipeline, {k: t.numpy() for k, t in _below(prefix, tensors).items()})

    if "method/0" not in {name.rpartition("/")[0] for name in tensors}:
        return NetworkPredictor(method("method/"), network, diseases)
    seeds = config.train.seeds
    of_seed = [
        NetworkPredictor(
            method(f"method/{seed}/", draw=seed),
            network.select(range(seed, diseases * seeds, seeds)),
            diseases,
        )
        for seed in range(seeds)
    ]
    return lambda values: np.concatenate([predict(values) for predict in of_seed], axis=1)


def read_tuning(config: Config, store: Store, cell: Cell) -> dict[str, HeldOut]:
    """As `read_cell(...).held_out`, of the tuning rows, on which choices are made."""
    with safe_open(cell_path(config, store, cell), framework="np") as file:
        probability = file.get_tensor("probability/tuning")
    labels = store.labels()[store.splits()[:, cell.split] == "tuning"]
    eligible = ~np.isnan(labels)
    return {
        disease: HeldOut(labels[eligible[:, i], i], probability[i][:, eligible[:, i]])
        for i, disease in enumerate(store.diseases)
    }


def best_comparison(config: Config, store: Store) -> Comparison:
    """The (method, scaler, architecture) with the highest AUROC on tuning rows.

    Of the seed-averaged prediction, averaged over diseases and splits.
    """
    return max(comparisons(config), key=lambda comparison: _on_tuning(config, store, comparison))


def _on_tuning(config: Config, store: Store, comparison: Comparison) -> float:
    return float(
        np.mean(
            [
                auroc(rows.y, rows.ensemble)
                for split in range(config.splits.repeats)
                for rows in read_tuning(config, store, Cell(*comparison, split)).values()
            ]
        )
    )


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
