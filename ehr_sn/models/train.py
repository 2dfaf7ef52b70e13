"""Store + method → trained cell on disk: one split's networks for every disease and seed.

A cell is one file, named by the hash of all it depends on and written beside its final name: what
an interrupted run finished is found again, and nothing else is.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
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

from ehr_sn.config import (
    NOTHING,
    REFERENCE,
    ArchitectureConfig,
    Config,
    RepresentationConfig,
    digest,
)
from ehr_sn.errors import EhrSnError
from ehr_sn.evaluate.metrics import Sample
from ehr_sn.ingest.store import Store
from ehr_sn.missing import get_state, make_method, set_state
from ehr_sn.missing.amputate import find_panels
from ehr_sn.models.baselines import BASELINES, fit_baseline, with_masked_copies
from ehr_sn.models.fit import Architecture, Budget, Fitted, Task, device_of, fit
from ehr_sn.models.layers import Embedding
from ehr_sn.models.masking import Masking, masking_of
from ehr_sn.models.methods import find_method
from ehr_sn.models.mixture import Mixture, fit_mixture
from ehr_sn.models.representation import Learned, learn
from ehr_sn.models.trees import StackedTrees
from ehr_sn.models.weights import taken, weights

PREDICTED = ("tuning", "held_out")  # rows; the latter are not there while settings are tuned
FORMAT = 4  # raised whenever the same cell would be trained differently
BASELINE_FORMAT = 4  # the same for baselines
BLEND_FORMAT = 1  # the same for blends

Comparison = tuple[str, str, str]
"""Method, scaler and architecture, by their names."""
Tensors = dict[str, torch.Tensor]
Settings = dict[str, Any]
"""Parameters that tuning sets, by their names in `tune.search` or of the method."""


@dataclass(frozen=True)
class Cell:
    """One method, scaler and architecture (or baseline, or blend) on one split (from 0)."""

    method: str
    scaler: str
    architecture: str
    split: int


@dataclass(frozen=True)
class HeldOut:
    """Labels and predictions of one disease on one split's held-out, eligible rows.

    y has shape (rows,), probability (seeds, rows); `subject` and `weight`, (rows,), are whose each
    row is and what it stands for, as in `metrics.Sample`.
    """

    y: NDArray[np.float32]
    probability: NDArray[np.float32]
    subject: NDArray[np.int64] | None = None
    weight: NDArray[np.float64] | None = None

    @property
    def ensemble(self) -> NDArray[np.float32]:
        """The seed-averaged prediction, shape (rows,)."""
        return self.probability.mean(axis=0)

    @property
    def sample(self) -> Sample:
        """The rows with the seed-averaged prediction, for what judges it."""
        return Sample(self.y, self.ensemble, self.subject, self.weight)


def rows_of(
    store: Store, split: int, part: str, probability: NDArray[np.float32]
) -> dict[str, HeldOut]:
    """Disease → the eligible rows of a split's part, from predictions of all of its rows.

    `probability` has shape (diseases, seeds, rows of the part).
    """
    mine = store.splits()[:, split] == part
    labels, subjects = store.labels()[mine], store.subjects()[mine]
    found = {}
    for i, (disease, weight) in enumerate(zip(store.diseases, weights(store, split), strict=True)):
        eligible = ~np.isnan(labels[:, i])
        found[disease] = HeldOut(
            labels[eligible, i],
            probability[i][:, eligible],
            subjects[eligible],
            taken(taken(weight, mine), eligible),
        )
    return found


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

    A baseline is an architecture with neither method nor scaler, and so is a blend.
    """
    train = config.train
    networks = [
        (method, scaler, architecture)
        for scaler, methods in train.methods.items()
        for method in sorted(methods, key=lambda method: method != REFERENCE)
        for architecture in train.architectures
    ]
    return networks + [(NOTHING, NOTHING, name) for name in (*train.baselines, *train.blends)]


def members_of(config: Config, cell: Cell) -> list[Cell]:
    """The cells whose mean a blend predicts; none where the cell is no blend."""
    members = config.train.blends.get(cell.architecture, ())
    return [Cell(*comparison, cell.split) for comparison in members]


def blended(probabilities: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """What a blend predicts: the mean of its members' predictions, which have one shape."""
    total = probabilities[0].copy()
    for others in probabilities[1:]:
        total += others  # one by one: the bits do not depend on how many rows there are
    return total / np.float32(len(probabilities))


def reference_of(config: Config, comparison: Comparison) -> Comparison | None:
    """What a comparison is tested against: zero imputation with its scaler and architecture.

    Baselines and blends are tested against the first of the zero imputations. None for zero
    imputation itself and where the comparison has none.
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
    """Where the cell's file is, or will be.

    Raises
    ------
    EhrSnError
        Its settings are to be tuned, and were not.
    """
    if members := members_of(config, cell):
        key = [BLEND_FORMAT, *(cell_path(config, store, member).stem for member in members)]
        return store.path.parent / "cells" / f"{digest(key)}.safetensors"
    settings = tuned(config, store, cell)
    key = [_format(cell), store.fingerprint, asdict(cell), *_depends_on(config, cell)]
    name = digest([*key, settings] if settings else key)
    return store.path.parent / "cells" / f"{name}.safetensors"


def tuning_path(config: Config, store: Store, cell: Cell) -> Path:
    """Where the study of a cell's trials is, or will be; it goes on if more trials are asked for.

    A store with fewer training rows shares those of the whole.
    """
    train, architecture = _depends_on(config, cell)
    train["seeds"] = config.tune.seeds
    space = config.tune.space(cell.architecture)
    searched = {name: numbers.model_dump(mode="json") for name, numbers in space.items()}
    key = [_format(cell), store.path.name, asdict(cell), train, architecture, searched]
    return store.path.parent / "tuning" / f"{digest(key)}.db"


@dataclass(frozen=True)
class Trial:
    """Settings that were tried, and how they did on tuning rows.

    `aurocs` are means over diseases: of the first seed's prediction, of the average of the first
    two, and so on. A pruned trial was given up after some of the seeds, maybe the first.
    """

    settings: Settings
    aurocs: list[float]
    pruned: bool


def trials_path(config: Config, store: Store, cell: Cell) -> Path:
    """Where the cell's finished trials are, or will be."""
    path = tuning_path(config, store, cell)
    return path.with_name(f"{path.stem}-{config.tune.trials}.json")


def read_trials(config: Config, store: Store, cell: Cell) -> list[Trial]:
    """The cell's trials.

    Raises
    ------
    EhrSnError
        They are not finished.
    """
    try:
        written = trials_path(config, store, cell).read_text()
    except FileNotFoundError:
        raise EhrSnError(
            f"{cell.method} · {cell.architecture} · {cell.scaler} is not tuned on split "
            f"{cell.split + 1}: run `ehr-sn run CONFIG --force`"
        ) from None
    return [Trial(**trial) for trial in json.loads(written)]


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The one with the highest AUROC, of equals the first, among those that were not pruned."""
    return max((trial for trial in trials if not trial.pruned), key=lambda trial: trial.aurocs[-1])


def tuned(config: Config, store: Store, cell: Cell) -> Settings:
    """The settings that the tuning rows chose for a cell; none for a blend, nor without `tune`.

    Raises
    ------
    EhrSnError
        It is not tuned yet.
    """
    if not config.tune.trials or members_of(config, cell):
        return {}
    return best_trial(read_trials(config, store, cell)).settings


def with_settings(config: Config, cell: Cell, settings: Settings) -> Config:
    """The configuration with the settings of a cell's network in place of its own."""
    train = config.train
    network = train.architectures.get(cell.architecture)
    if network is None:
        return config
    changes = {name: v for name, v in settings.items() if name == "dropout"}
    if "width" in settings:
        changes["hidden"] = (settings["width"],) * len(network.hidden)
    budget = {name: v for name, v in settings.items() if name in type(train).model_fields}
    networks = train.architectures | {cell.architecture: network.model_copy(update=changes)}
    train = train.model_copy(update=budget | {"architectures": networks})
    return config.model_copy(update={"train": train})


def train_cell(config: Config, store: Store, cell: Cell) -> Path:
    """Train the cell, unless its file is there; returns the file.

    Scales, imputer and K are fitted on all training rows of the split; each disease's networks
    on its eligible ones, stopped early on its eligible tuning rows. Of a blend the members are
    trained, unless their files are there.

    Raises
    ------
    ValueError
        A disease lacks a class among its training or tuning rows.
    """
    path = cell_path(config, store, cell)
    if path.exists():
        return path
    if members := members_of(config, cell):
        tensors, about = _blend([train_cell(config, store, member) for member in members])
    else:
        seeds = range(config.train.seeds)
        tensors, about = fit_cell(config, store, cell, seeds, tuned(config, store, cell))
    about |= {"cell": asdict(cell), "store": store.fingerprint, "diseases": store.diseases}
    _write(path, tensors, about)
    return path


def fit_cell(
    config: Config,
    store: Store,
    cell: Cell,
    seeds: Sequence[int],
    settings: Settings,
    completed: Callable[[Settings], "Completed"] | None = None,
) -> tuple[Tensors, dict[str, Any]]:
    """Train a cell's networks, or baseline, of some seeds: what its file is to hold.

    `completed` takes the place of `complete` for this cell, such as to keep what it returns.
    """
    # Cells train side by side, a core each: that is as fast as all cores on one cell, several times
    # faster where other work competes for them, and the bits do not depend on how many there are.
    torch.set_num_threads(1)
    threadpool_limits(1)  # for NumPy and scikit-learn
    if cell.method == NOTHING:
        return _baseline(config, store, cell, seeds, settings)
    completed = completed or partial(complete, config, store, cell)
    return _networks(with_settings(config, cell, settings), store, cell, seeds, settings, completed)


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
    held_out = rows_of(store, about["cell"]["split"], "held_out", probability)
    seconds = about["impute_seconds"], about["fit_seconds"]
    return TrainedCell(held_out, curves, *seconds, about["chosen"], representation)


def filled_as(cell: Cell) -> Cell:
    """The cell with the method and scaler that fill its rows: a baseline names its own."""
    if cell.method != NOTHING:
        return cell
    return replace(cell, method=BASELINES[cell.architecture].method or NOTHING, scaler="standard")


def fitted_method(
    config: Config, store: Store, cell: Cell, params: Settings
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
class Completed:
    """All rows as a fitted method leaves them, and what else of the networks' input it decides."""

    params: Settings
    method: Pipeline
    table: NDArray[np.float32]
    masking: Masking | None
    mixture: Mixture | None
    seconds: float


def complete(config: Config, store: Store, cell: Cell, params: Settings) -> Completed:
    """Apply the cell's method, with these parameters, to the store's rows."""
    method, seconds = fitted_method(config, store, cell, params)
    started = perf_counter()
    values = store.values()
    table = method.transform(values)
    training_rows = store.splits()[:, cell.split] == "train"
    masking = None
    if config.train.architectures[cell.architecture].augment_missing:
        masking = masking_of(method, values, _panels(store, cell.split))
    of_layer = find_method(cell.method).layer == "gmm"
    mixture = _mixture(table[training_rows]) if of_layer else None
    return Completed(params, method, table, masking, mixture, seconds + perf_counter() - started)


@dataclass(frozen=True)
class _Part:
    """The networks of some seeds, trained on one completion of the table."""

    networks: Fitted
    rows: Completed
    learned: Learned | None
    fit_seconds: float


def _networks(
    config: Config,
    store: Store,
    cell: Cell,
    seeds: Sequence[int],
    settings: Settings,
    completed: Callable[[Settings], Completed],
) -> tuple[Tensors, dict[str, Any]]:
    """Train the cell's networks with every candidate of its method, and keep the best.

    A candidate that `settings` name is the only one. A method of several draws gives each seed a
    draw of its own.
    """
    method = make_method(find_method(cell.method).rows, cell.scaler)["method"]
    candidates = [c for c in method.candidates if c.items() <= settings.items()]
    groups = [[seed] for seed in seeds] if method.draws else [list(seeds)]
    tried = []
    for params in candidates or method.candidates:
        draws = [params | {"draw": group[0]} if method.draws else params for group in groups]
        parts = [
            _train(config, store, cell, completed(draw), group)
            for draw, group in zip(draws, groups, strict=True)
        ]
        tried.append((params, parts))
    chosen, parts = max(tried, key=lambda candidate: _tuning_auroc(candidate[1]))

    shape = (len(store.diseases), len(seeds))
    states = [part.networks.model.state() for part in parts]
    tensors = {f"network/{k}": _stacked([s[k] for s in states], shape[0]) for k in states[0]}
    for i, part in enumerate(parts):
        prefix = f"method/{i}" if method.draws else "method"
        fitted = get_state(part.rows.method).items()
        tensors |= {f"{prefix}/{k}": torch.from_numpy(v) for k, v in fitted}
    split = store.splits()[:, cell.split]
    for name in np.intersect1d(PREDICTED, split):
        predicted = [
            part.networks.model.predict_proba(torch.from_numpy(part.rows.table[split == name]))
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
        names = parts[0].rows.method.get_feature_names_out(
            np.array(store.feature_names, dtype=object)
        )
        named = {"inputs": names.tolist()}
    every = [part for _, parts in tried for part in parts]
    about = {
        "impute_seconds": sum(part.rows.seconds for part in every),
        "fit_seconds": sum(part.fit_seconds for part in every),
        "chosen": dict(chosen),
    }
    return tensors, about | named


def _train(
    config: Config, store: Store, cell: Cell, rows: Completed, seeds: Sequence[int]
) -> _Part:
    train, how = config.train, find_method(cell.method)
    network = train.architectures[cell.architecture]
    learned, learn_seconds = None, 0.0
    if network.representation is not None:
        learned, learn_seconds = _learned(config, store, cell, network.representation, rows, seeds)
    started = perf_counter()
    networks = fit(
        rows.table,
        _tasks(store, cell.split),
        seeds=seeds,
        architecture=Architecture(
            network.hidden,
            network.dropout,
            network.batch_norm,
            sparsity_norm=how.sparsity_norm,
            neumiss=how.layer == "neumiss",
            mixture=rows.mixture,
            encoder=learned.encoder if learned else None,
            embedding=_embedding(network, rows.method) if how.layer is None else None,
        ),
        budget=Budget(
            learning_rate=train.learning_rate,
            weight_decay=train.weight_decay,
            batch_size=train.batch_size,
            max_epochs=train.max_epochs,
            patience=train.patience,
            balance_classes=train.balance_classes,
        ),
        masking=rows.masking,
        device=device_of(train.device),
    )
    return _Part(networks, rows, learned, learn_seconds + perf_counter() - started)


def _embedding(network: ArchitectureConfig, method: Pipeline) -> Embedding | None:
    return Embedding(method[-1].sources(), network.embedding) if network.embedding else None


def _learned(
    config: Config,
    store: Store,
    cell: Cell,
    representation: RepresentationConfig,
    completed: Completed,
    seeds: Sequence[int],
) -> tuple[Learned, float]:
    """The cell's representation, learned from its split's training rows, and the seconds it took.

    It is kept on disk, and found again by cells of other architectures, whether they train it on
    or not, and with fewer labels.
    """
    given = representation.model_dump(mode="json", exclude={"fine_tune"})
    how = [
        find_method(cell.method).rows,
        cell.scaler,
        config.train.winsorise,
        dict(completed.params),
    ]
    key = digest([FORMAT, store.rows_fingerprint, cell.split, how, given, list(seeds)])
    path = store.path.parent / "representations" / f"{key}.safetensors"
    if not path.exists():
        started = perf_counter()
        values, split = store.values(), store.splits()[:, cell.split]
        masking = None
        if representation.denoise:
            panels = _panels(store, cell.split)
            masking = masking_of(completed.method, values[split == "train"], panels)
        learned = learn(
            representation,
            completed.table,
            completed.method[:-1].transform(values),
            train_rows=split == "train",
            tuning_rows=split == "tuning",
            seeds=list(seeds),
            masking=masking,
            device=device_of(config.train.device),
        )
        _write(path, learned.state(), {"seconds": round(perf_counter() - started, 3)})
    with safe_open(path, framework="pt") as file:
        seconds = json.loads(file.metadata()["about"])["seconds"]
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Learned.from_state(state, representation, list(seeds)), seconds


def _baseline(
    config: Config, store: Store, cell: Cell, seeds: Sequence[int], settings: Settings
) -> tuple[Tensors, dict[str, Any]]:
    """Fit a baseline for every disease and seed."""
    baseline, tasks = BASELINES[cell.architecture], _tasks(store, cell.split)
    x, impute_seconds = store.values(), 0.0
    tensors: Tensors = {}
    if baseline.method is not None:
        method, impute_seconds = fitted_method(config, store, filled_as(cell), {})
        x = method.transform(x)
        tensors = {f"method/{k}": torch.from_numpy(v) for k, v in get_state(method).items()}
    started = perf_counter()
    given = (x, tasks)
    if baseline.masked_copies:
        given = with_masked_copies(x, tasks, _panels(store, cell.split))
    model = fit_baseline(cell.architecture, *given, seeds, settings)
    kind = "trees" if isinstance(model, StackedTrees) else "network"
    tensors |= {f"{kind}/{k}": tensor for k, tensor in model.state().items()}
    split = store.splits()[:, cell.split]
    for name in np.intersect1d(PREDICTED, split):
        probability = model.predict_proba(x[split == name])
        tensors[f"probability/{name}"] = probability.reshape(len(tasks), len(seeds), -1)
    seconds = perf_counter() - started
    return tensors, {"impute_seconds": impute_seconds, "fit_seconds": seconds, "chosen": {}}


def _blend(paths: Sequence[Path]) -> tuple[Tensors, dict[str, Any]]:
    """The mean of what the members' files hold of predictions; it took as long as they all."""
    read, abouts = [], []
    for path in paths:
        with safe_open(path, framework="np") as file:
            abouts.append(json.loads(file.metadata()["about"]))
            read.append([file.get_tensor(f"probability/{name}") for name in PREDICTED])
    tensors = {
        f"probability/{name}": torch.from_numpy(blended(members))
        for name, members in zip(PREDICTED, zip(*read, strict=True), strict=True)
    }
    seconds = {k: sum(about[k] for about in abouts) for k in ("impute_seconds", "fit_seconds")}
    return tensors, seconds | {"chosen": {}}


def _format(cell: Cell) -> int:
    return BASELINE_FORMAT if cell.method == NOTHING else FORMAT


def _depends_on(config: Config, cell: Cell) -> tuple[dict[str, Any], Any]:
    """What of the configuration a cell depends on, tuning aside."""
    listed = {"methods", "architectures", "baselines", "blends"}
    train = config.train.model_dump(mode="json", exclude=listed)
    network = config.train.architectures.get(cell.architecture)
    return train, network.model_dump(mode="json") if network else cell.architecture


def _panels(store: Store, split: int) -> NDArray[np.int64]:
    """Features that come together in a split's training rows."""
    training_rows = store.splits()[:, split] == "train"
    return find_panels(~np.isnan(store.values()[training_rows]), store.measurements)


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
            weight=weight,
        )
        for i, (disease, weight) in enumerate(
            zip(store.diseases, weights(store, split), strict=True)
        )
    ]


def never_observed(store: Store) -> dict[str, list[str]]:
    """Disease → the features that no eligible training row has, in one of its splits at least."""
    observed, eligible = ~np.isnan(store.values()), ~np.isnan(store.labels())
    train = store.splits() == "train"
    found = {}
    for i, disease in enumerate(store.diseases):
        seen = [observed[eligible[:, i] & rows].any(axis=0) for rows in train.T]
        unseen = np.flatnonzero(~np.all(seen, axis=0))
        if unseen.size:
            found[disease] = [store.feature_names[j] for j in unseen]
    return found


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
