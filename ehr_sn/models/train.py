"""Store + method → trained cell on disk: one split's networks for every disease and seed.

A cell is one file, named by the hash of all it depends on and written beside its final name: what
an interrupted run finished is found again, and nothing else is.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from ehr_sn.config import Config, digest
from ehr_sn.ingest.store import Store
from ehr_sn.missing import get_state, make_method
from ehr_sn.missing.amputate import find_panels
from ehr_sn.models.fit import Architecture, Budget, Task, fit
from ehr_sn.models.masking import masking_of
from ehr_sn.models.methods import find_method
from ehr_sn.models.mixture import Mixture, fit_mixture

REFERENCE = "zero"  # every other method is compared with it, on the same subjects
FORMAT = 2  # raised whenever the same cell would be trained differently


@dataclass(frozen=True)
class Cell:
    """One method, scaler and architecture (by their names) on one split (from 0)."""

    method: str
    scaler: str
    architecture: str
    split: int


@dataclass(frozen=True)
class HeldOut:
    """Labels and predictions of one disease on one split's held-out, eligible rows.

    y has shape (rows,), probability (seeds, rows).
    """

    y: NDArray[np.float32]
    probability: NDArray[np.float32]

    @property
    def ensemble(self) -> NDArray[np.float32]:
        """The seed-averaged prediction, shape (rows,)."""
        return self.probability.mean(axis=0)


@dataclass(frozen=True)
class TrainedCell:
    """What training left: held-out predictions a disease, learning curves, and how long it took.

    `curves` has arrays of shape (diseases, seeds, epochs), NaN after a replicate stopped.
    """

    held_out: dict[str, HeldOut]
    curves: dict[str, NDArray[np.float32]]
    best_epoch: NDArray[np.int64]
    seconds: float


def comparisons(config: Config) -> list[tuple[str, str, str]]:
    """Every (method, scaler, architecture) of the comparison; the reference method first."""
    return [
        (method, scaler, architecture)
        for scaler, methods in config.train.methods.items()
        for method in sorted(methods, key=lambda method: method != REFERENCE)
        for architecture in config.train.architectures
    ]


def cell_path(config: Config, store: Store, cell: Cell) -> Path:
    """Where the cell's file is, or will be."""
    train = config.train.model_dump(mode="json", exclude={"methods", "architectures"})
    architecture = config.train.architectures[cell.architecture].model_dump(mode="json")
    key = digest([FORMAT, store.fingerprint, asdict(cell), train, architecture])
    return store.path.parent / "cells" / f"{key}.safetensors"


def train_cell(config: Config, store: Store, cell: Cell) -> Path:
    """Train the cell, unless its file is there; returns the file.

    Scales, imputer and K are fitted on all training rows of the split; each disease's networks
    on its eligible ones, stopped early on its eligible tuning rows.

    Raises
    ------
    ValueError
        A disease lacks a class among its training or tuning rows.
    """
    path = cell_path(config, store, cell)
    if path.exists():
        return path
    started = perf_counter()
    split = store.splits()[:, cell.split]
    how = find_method(cell.method)
    method = make_method(how.rows, cell.scaler, config.train.winsorise)
    values = store.values()
    x = method.fit(values[split == "train"]).transform(values)
    labels = store.labels()
    eligible = ~np.isnan(labels)
    tasks = [
        Task(
            name=disease,
            y=labels[:, i],
            train_rows=np.flatnonzero(eligible[:, i] & (split == "train")),
            tuning_rows=np.flatnonzero(eligible[:, i] & (split == "tuning")),
        )
        for i, disease in enumerate(store.diseases)
    ]
    train = config.train
    network = train.architectures[cell.architecture]
    masking = None
    if network.augment_missing:
        panels = find_panels(~np.isnan(values[split == "train"]), store.measurements)
        masking = masking_of(method, values, panels)
    # Cells train side by side, a core each: that is as fast as all cores on one cell, several times
    # faster where other work competes for them, and the bits do not depend on how many there are.
    torch.set_num_threads(1)
    fitted = fit(
        x,
        tasks,
        seeds=range(train.seeds),
        architecture=Architecture(
            network.hidden,
            network.dropout,
            network.batch_norm,
            sparsity_norm=how.sparsity_norm,
            neumiss=how.layer == "neumiss",
            mixture=_mixture(x[split == "train"]) if how.layer == "gmm" else None,
        ),
        budget=Budget(
            learning_rate=train.learning_rate,
            weight_decay=train.weight_decay,
            batch_size=train.batch_size,
            max_epochs=train.max_epochs,
            patience=train.patience,
            balance_classes=train.balance_classes,
        ),
        masking=masking,
        device=_device(train.device),
    )
    shape = (len(tasks), train.seeds)
    tensors = {f"network/{name}": tensor for name, tensor in fitted.model.state().items()}
    tensors |= {f"method/{k}": torch.from_numpy(v) for k, v in get_state(method).items()}
    for name in ("tuning", "held_out"):
        probability = fitted.model.predict_proba(torch.from_numpy(x[split == name]))
        tensors[f"probability/{name}"] = probability.reshape(*shape, -1)
    tensors["curve/train_loss"] = _padded([h.train_loss for h in fitted.history], shape)
    tensors["curve/tuning_auroc"] = _padded([h.tuning_auroc for h in fitted.history], shape)
    best = torch.tensor([h.best_epoch for h in fitted.history])
    tensors["best_epoch"] = best.reshape(shape)
    about = {"cell": asdict(cell), "store": store.fingerprint, "diseases": store.diseases}
    _write(path, tensors, about | {"seconds": round(perf_counter() - started, 3)})
    return path


def read_cell(path: Path, store: Store) -> TrainedCell:
    """Read a cell's file and line its predictions up with the store's labels."""
    with safe_open(path, framework="np") as file:
        about = json.loads(file.metadata()["about"])
        probability = file.get_tensor("probability/held_out")
        curves = {name: file.get_tensor(f"curve/{name}") for name in ("train_loss", "tuning_auroc")}
        best_epoch = file.get_tensor("best_epoch")
    labels = store.labels()[store.splits()[:, about["cell"]["split"]] == "held_out"]
    held_out = {}
    for i, disease in enumerate(store.diseases):
        eligible = ~np.isnan(labels[:, i])
        held_out[disease] = HeldOut(labels[eligible, i], probability[i][:, eligible])
    return TrainedCell(held_out, curves, best_epoch, about["seconds"])


def _mixture(rows: NDArray[np.float32]) -> Mixture:
    """The mixture of training rows [x | mask]."""
    x, mask = np.hsplit(rows, 2)
    return fit_mixture(x, mask > 0)


def _device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _padded(curves: list[list[float]], shape: tuple[int, int]) -> torch.Tensor:
    """Curves of different lengths as one (diseases, seeds, epochs) tensor, NaN at the end."""
    longest = max(len(curve) for curve in curves)
    padded = torch.full((len(curves), longest), torch.nan)
    for row, curve in zip(padded, curves, strict=True):
        row[: len(curve)] = torch.tensor(curve)
    return padded.reshape(*shape, longest)


def _write(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    os.close(handle)
    try:
        contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        save_file(contiguous, partial, metadata={"about": json.dumps(about)})
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)
