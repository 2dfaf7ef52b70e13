"""Store + method → trained cell on disk: one split's networks for every disease and seed.

A cell is one file, named by the hash of all it depends on and written beside its final name: what
an interrupted run finished is found again, and nothing else is.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from ehr_sn.config import REFERENCE, Config, RepresentationConfig, digest
from ehr_sn.ingest.store import Store
from ehr_sn.missing import get_state, make_method, set_state
from ehr_sn.missing.amputate import find_panels
from ehr_sn.models.baselines import BASELINES, fit_baseline
from ehr_sn.models.fit import Architecture, Budget, Fitted, Task, fit
from ehr_sn.models.masking import masking_of
from ehr_sn.models.methods import find_method
from ehr_sn.models.mixture import Mixture, fit_mixture
from ehr_sn.models.representation import Learned, learn

NOTHING = "none"  # the method and the scaler of a baseline
FORMAT = 3  # raised whenever the same cell would be trained differently

Comparison = tuple[str, str, str]
"""Method, scaler and architecture, by their names."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Cell:
    """One method, scaler and architecture (or baseline) on one split (from 0)."""

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
class Representation:
    """What there is to see of the layers that were learned without labels, as `Learned` has it.

    `inputs` and `features` name the rows of `weight` and the columns of `error`.
    """

    rates: NDArray[np.float32]
    error: NDArray[np.float32]
    weight: NDArray[np.float32]
    inputs: list[str]
    features: list[str]


@dataclass(frozen=True)
class TrainedCell:
    """What training left: held-out predictions a disease, learning curves, and how long it took.

    `curves` has arrays of shape (diseases, seeds, epochs), NaN after a replicate stopped; a
    baseline has none. `impute_seconds` are those of fitting and applying the method (fitted once,
    if several cells share it), `fit_seconds` those of training. `chosen` holds the parameters of
    the method that the tuning rows chose. `representation` is there if the architecture has one.
    """

    held_out: dict[str, HeldOut]
    curves: dict[str, NDArray[np.float32]]
    impute_seconds: float
    fit_seconds: float
    chosen: dict[str, float]
    representation: Representation | None = None


def comparisons(config: Config) -> list[Comparison]:
    """Every (method, scaler, architecture) of the comparison; the reference method first.

    A baseline is an architecture with neither method nor scaler.
    """
    train = config.train
    networks = [
        (method, scaler, architecture)
        for scaler, methods in train.methods.items()
        for method in sorted(methods, key=lambda method: method != REFERENCE)
        for architecture in train.architectures
    ]
    return networks + [(NOTHING, NOTHING, baseline) for baseline in train.baselines]


def reference_of(config: Config, comparison: Comparison) -> Comparison | None:
    """What a comparison is tested against: zero imputation with its scaler and architecture.

    A baseline is tested against the first of the zero imputations. None for zero imputation itself
    and where the comparison has none.
    """
    method, scaler, architecture = comparison
    references = [c for c in comparisons(config) if c[0] == REFERENCE]
    if method == REFERENCE:
        return None
    if method == NOTHING:
        return references[0] if references else None
    same = (REFERENCE, scaler, architecture)
    return same if same in references else None


def cell_path(config: Config, store: Store, cell: Cell) -> Path:
    """Where the cell's file is, or will be."""
    listed = {"methods", "architectures", "baselines"}
    train = config.train.model_dump(mode="json", exclude=listed)
    network = config.train.architectures.get(cell.architecture)
    architecture = network.model_dump(mode="json") if network else cell.architecture
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
    # Cells train side by side, a core each: that is as fast as all cores on one cell, several times
    # faster where other work competes for them, and the bits do not depend on how many there are.
    torch.set_num_threads(1)
    threadpool_limits(1)  # for NumPy and scikit-learn
    train = _baseline if cell.method == NOTHING else _networks
    tensors, about = train(config, store, cell)
    about |= {"cell": asdict(cell), "store": store.fingerprint, "diseases": store.diseases}
    _write(path, tensors, about)
    return path


def read_cell(path: Path, store: Store) -> TrainedCell:
    """Read a cell's file and line its predictions up with the store's labels."""
    with safe_open(path, framework="np") as file:
        about = json.loads(file.metadata()["about"])
        probability = file.get_tensor("probability/held_out")
        curves = {
            name.removeprefix("curve/"): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
            if name.startswith("curve/")
        }
        representation = None
        if "inputs" in about:
            seen = {name: file.get_tensor(f"representation/{name}") for name in Learned.SEEN}
            features = store.feature_names
            representation = Representation(**seen, inputs=about["inputs"], features=features)
    labels = store.labels()[store.splits()[:, about["cell"]["split"]] == "held_out"]
    held_out = {}
    for i, disease in enumerate(store.diseases):
        eligible = ~np.isnan(labels[:, i])
        held_out[disease] = HeldOut(labels[eligible, i], probability[i][:, eligible])
    seconds = about["impute_seconds"], about["fit_seconds"]
    return TrainedCell(held_out, curves, *seconds, about["chosen"], representation)


def fitted_method(
    config: Config, store: Store, cell: Cell, params: Mapping[str, Any]
) -> tuple[Pipeline, float]:
    """The cell's method, fitted on its split's training rows, and the seconds that this took.

    What was fitted is kept on disk, and found again by cells of other architectures, and by the
    variant with the mask: only the first of them spends the time.
    """
    rows, winsorise = find_method(cell.method).rows, config.train.winsorise
    plain = rows.removesuffix("+mask")
    key = digest(
        [FORMAT, store.rows_fingerprint, plain, cell.scaler, cell.split, winsorise, dict(params)]
    )
    path = store.path.parent / "imputers" / f"{key}.safetensors"
    if not path.exists():
        started = perf_counter()
        training_rows = store.values()[store.splits()[:, cell.split] == "train"]
        fitted = make_method(plain, cell.scaler, winsorise, **params).fit(training_rows)
        state = {k: torch.from_numpy(v) for k, v in get_state(fitted).items()}
        _write(path, state, {"seconds": round(perf_counter() - started, 3)})
    with safe_open(path, framework="np") as file:
        seconds = json.loads(file.metadata()["about"])["seconds"]
        learned = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    pipeline = make_method(rows, cell.scaler, winsorise, **params)
    return set_state(pipeline, learned), seconds


@dataclass(frozen=True)
class _Part:
    """The networks of some seeds, trained on one completion of the table."""

    networks: Fitted
    method: Pipeline
    table: NDArray[np.float32]
    learned: Learned | None
    impute_seconds: float
    fit_seconds: float


def _networks(config: Config, store: Store, cell: Cell) -> tuple[Tensors, dict[str, Any]]:
    """Train the cell's networks with every candidate of its method, and keep the best.

    A method of several draws gives each seed a draw of its own.
    """
    method = make_method(find_method(cell.method).rows, cell.scaler)["method"]
    seeds = range(config.train.seeds)
    groups = [[seed] for seed in seeds] if method.draws else [list(seeds)]
    tried = []
    for params in method.candidates:
        draws = [params | {"draw": group[0]} if method.draws else params for group in groups]
        pairs = zip(draws, groups, strict=True)
        tried.append((params, [_train(config, store, cell, *pair) for pair in pairs]))
    chosen, parts = max(tried, key=lambda candidate: _tuning_auroc(candidate[1]))

    shape = (len(store.diseases), len(seeds))
    states = [part.networks.model.state() for part in parts]
    tensors = {f"network/{k}": _stacked([s[k] for s in states], shape[0]) for k in states[0]}
    for i, part in enumerate(parts):
        prefix = f"method/{i}" if method.draws else "method"
        fitted = get_state(part.method).items()
        tensors |= {f"{prefix}/{k}": torch.from_numpy(v) for k, v in fitted}
    split = store.splits()[:, cell.split]
    for name in ("tuning", "held_out"):
        predicted = [
            part.networks.model.predict_proba(torch.from_numpy(part.table[split == name]))
            for part in parts
        ]
        tensors[f"probability/{name}"] = _stacked(predicted, shape[0]).reshape(*shape, -1)
    histories = [
        history
        for task in range(shape[0])
        for part in parts
        for replicate, history in zip(part.networks.replicates, part.networks.history, strict=True)
        if replicate.task == task
    ]
    tensors["curve/train_loss"] = _padded([h.train_loss for h in histories], shape)
    tensors["curve/tuning_auroc"] = _padded([h.tuning_auroc for h in histories], shape)
    tensors["best_epoch"] = torch.tensor([h.best_epoch for h in histories]).reshape(shape)
    learned = [part.learned for part in parts if part.learned is not None]
    named = {}
    if learned:
        for name in Learned.SEEN:
            seen = torch.cat([getattr(one, name) for one in learned])
            tensors[f"representation/{name}"] = seen
        names = parts[0].method.get_feature_names_out(np.array(store.feature_names, dtype=object))
        named = {"inputs": names.tolist()}
    every = [part for _, parts in tried for part in parts]
    about = {
        "impute_seconds": sum(part.impute_seconds for part in every),
        "fit_seconds": sum(part.fit_seconds for part in every),
        "chosen": dict(chosen),
    }
    return tensors, about | named


def _train(
    config: Config, store: Store, cell: Cell, params: Mapping[str, Any], seeds: list[int]
) -> _Part:
    train, how = config.train, find_method(cell.method)
    network = train.architectures[cell.architecture]
    method, impute_seconds = fitted_method(config, store, cell, params)
    started = perf_counter()
    values = store.values()
    table = method.transform(values)
    training_rows = store.splits()[:, cell.split] == "train"
    masking = None
    if network.augment_missing:
        masking = masking_of(method, values, _panels(store, values[training_rows]))
    impute_seconds += perf_counter() - started
    learned, learn_seconds = None, 0.0
    if network.representation is not None:
        learned, learn_seconds = _learned(
            config, store, cell, network.representation, params, seeds, method, table
        )
    started = perf_counter()
    networks = fit(
        table,
        _tasks(store, cell.split),
        seeds=seeds,
        architecture=Architecture(
            network.hidden,
            network.dropout,
            network.batch_norm,
            sparsity_norm=how.sparsity_norm,
            neumiss=how.layer == "neumiss",
            mixture=_mixture(table[training_rows]) if how.layer == "gmm" else None,
            encoder=learned.encoder if learned else None,
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
    fit_seconds = learn_seconds + perf_counter() - started
    return _Part(networks, method, table, learned, impute_seconds, fit_seconds)


def _learned(
    config: Config,
    store: Store,
    cell: Cell,
    representation: RepresentationConfig,
    params: Mapping[str, Any],
    seeds: list[int],
    method: Pipeline,
    table: NDArray[np.float32],
) -> tuple[Learned, float]:
    """The cell's representation, learned from its split's training rows, and the seconds it took.

    It is kept on disk, and found again by cells of other architectures, whether they train it on
    or not, and with fewer labels.
    """
    given = representation.model_dump(mode="json", exclude={"fine_tune"})
    how = [find_method(cell.method).rows, cell.scaler, config.train.winsorise, dict(params)]
    key = digest([FORMAT, store.rows_fingerprint, cell.split, how, given, seeds])
    path = store.path.parent / "representations" / f"{key}.safetensors"
    if not path.exists():
        started = perf_counter()
        values, split = store.values(), store.splits()[:, cell.split]
        masking = None
        if representation.denoise:
            rows = values[split == "train"]
            masking = masking_of(method, rows, _panels(store, rows))
        learned = learn(
            representation,
            table,
            method[:-1].transform(values),
            train_rows=split == "train",
            tuning_rows=split == "tuning",
            seeds=seeds,
            masking=masking,
            device=_device(config.train.device),
        )
        _write(path, learned.state(), {"seconds": round(perf_counter() - started, 3)})
    with safe_open(path, framework="pt") as file:
        seconds = json.loads(file.metadata()["about"])["seconds"]
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Learned.from_state(state, representation, seeds), seconds


def _panels(store: Store, training_rows: NDArray[np.float32]) -> NDArray[np.int64]:
    return find_panels(~np.isnan(training_rows), store.measurements)


def _baseline(config: Config, store: Store, cell: Cell) -> tuple[Tensors, dict[str, Any]]:
    """Fit a baseline; only what it predicts is kept."""
    x, impute_seconds = store.values(), 0.0
    filled_by = BASELINES[cell.architecture].method
    if filled_by is not None:
        as_cell = replace(cell, method=filled_by, scaler="standard")
        method, impute_seconds = fitted_method(config, store, as_cell, {})
        x = method.transform(x)
    started = perf_counter()
    seeds = range(config.train.seeds)
    probability = fit_baseline(cell.architecture, x, _tasks(store, cell.split), seeds)
    split = store.splits()[:, cell.split]
    tensors = {
        f"probability/{name}": torch.from_numpy(probability[..., split == name])
        for name in ("tuning", "held_out")
    }
    seconds = perf_counter() - started
    return tensors, {"impute_seconds": impute_seconds, "fit_seconds": seconds, "chosen": {}}


def _tasks(store: Store, split: int) -> list[Task]:
    """Every disease, to be trained and tuned on its eligible rows of a split."""
    labels, part = store.labels(), store.splits()[:, split]
    eligible = ~np.isnan(labels)
    return [
        Task(
            name=disease,
            y=labels[:, i],
            train_rows=np.flatnonzero(eligible[:, i] & (part == "train")),
            tuning_rows=np.flatnonzero(eligible[:, i] & (part == "tuning")),
        )
        for i, disease in enumerate(store.diseases)
    ]


def _tuning_auroc(parts: Sequence[_Part]) -> float:
    """AUROC on the tuning rows, the mean over diseases and seeds."""
    histories = [history for part in parts for history in part.networks.history]
    return float(np.mean([history.tuning_auroc[history.best_epoch] for history in histories]))


def _stacked(parts: Sequence[torch.Tensor], n_tasks: int) -> torch.Tensor:
    """Replicates of several parts, each task-major along the first axis, as one: task-major."""
    first = parts[0]
    if len(parts) == 1 or first.ndim == 0:  # or a setting, the same in all parts
        return first
    by_task = [part.reshape(n_tasks, -1, *first.shape[1:]) for part in parts]
    return torch.cat(by_task, dim=1).reshape(-1, *first.shape[1:])


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
