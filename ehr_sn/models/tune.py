"""Cell + budget of trials → the settings that its tuning rows choose; a study on disk.

Each split has a study of its own, which sees none of the rows that the split holds out: settings
shared by several splits would have seen each one's held-out rows as another's. The study is an
SQLite file beside the cells, and goes on where it was interrupted.
"""

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ehr_sn.config import Config, Numbers
from ehr_sn.errors import ConfigError
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.ingest.store import Store
from ehr_sn.missing import make_method
from ehr_sn.models.baselines import BASELINES
from ehr_sn.models.fit import TrainingError
from ehr_sn.models.methods import find_method
from ehr_sn.models.train import (
    NOTHING,
    Cell,
    Completed,
    Settings,
    Trial,
    complete,
    fit_cell,
    trials_path,
    tuning_path,
)
from ehr_sn.models.weights import taken, weights

NEVER_PRUNED = 5  # trials with whose median a later trial's first seeds are compared
DIGITS = 3  # of a number that is tried


def tune(config: Config, store: Store, cell: Cell) -> Path:
    """Try settings for the cell on tuning rows, unless that was done; returns the trials' file.

    A trial's settings depend on the split, the trial's number and the trials before it. Methods
    whose parameters are the same try the same settings until the search begins to follow its
    findings. What a method of several candidates would choose itself is one more parameter.

    Raises
    ------
    ConfigError
        Optuna is not installed.
    TrainingError
        The configuration as it is, the first trial, cannot be trained.
    """
    path = trials_path(config, store, cell)
    if path.exists():
        return path
    optuna = _optuna(config)
    study_path = tuning_path(config, store, cell)
    study_path.parent.mkdir(parents=True, exist_ok=True)
    with study_path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits, and finds the trials
        storage = optuna.storages.RDBStorage(f"sqlite:///{study_path}")
        try:
            trials = _search(optuna, storage, config, WithoutHeldOut(store.path, cell.split), cell)
        finally:
            storage.engine.dispose()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps([asdict(trial) for trial in trials], indent=1))
        partial.replace(path)
    return path


@dataclass(frozen=True)
class WithoutHeldOut(Store):
    """A store that lacks the rows which one of its splits holds out."""

    split: int

    @cached_property
    def _seen(self) -> NDArray[np.bool_]:
        return np.asarray(super().splits()[:, self.split] != "held_out")

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.str_]]:
        seen = self._seen
        arrays = super().values()[seen], super().labels()[seen], super().splits()[seen]
        for array in arrays:
            array.setflags(write=False)  # all trials share them
        return arrays

    def values(self) -> NDArray[np.float32]:
        return self._arrays[0]

    def labels(self) -> NDArray[np.float32]:
        return self._arrays[1]

    def splits(self) -> NDArray[np.str_]:
        return self._arrays[2]

    def subjects(self) -> NDArray[np.int64]:
        return super().subjects()[self._seen]

    def follow_up(self) -> NDArray[np.float64] | None:
        days = super().follow_up()
        return None if days is None else days[self._seen]


def _optuna(config: Config) -> ModuleType:
    try:
        import optuna
    except ImportError:
        where = config.where("tune")
        raise ConfigError(
            f"{where}: needs the package optuna: pip install 'ehr-sn[tune]', or take it out"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _search(
    optuna: ModuleType, storage: Any, config: Config, store: WithoutHeldOut, cell: Cell
) -> list[Trial]:
    """Make the trials that the study still lacks, and return all."""
    states = optuna.trial.TrialState
    study = optuna.create_study(
        storage=storage,
        study_name="trials",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=NEVER_PRUNED),
    )
    for interrupted in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        study.tell(interrupted.number, state=states.FAIL)
    space, n_seeds = _space(config, cell), _n_seeds(config, cell)
    running_aurocs = _trainer(config, store, cell, n_seeds)
    finished = (states.COMPLETE, states.PRUNED)
    for number in range(len(study.get_trials(states=finished)), config.tune.trials):
        # A sampler a trial, so that an interruption changes nothing. Not multivariate: the first
        # trial has no parameters, so there are none that all trials share.
        (seed,) = np.random.SeedSequence([cell.split, number]).generate_state(1)
        study.sampler = optuna.samplers.TPESampler(seed=int(seed), multivariate=False)
        trial = study.ask()
        for name, numbers in space.items() if number else ():
            _suggest(trial, name, numbers)
        told: dict[str, Any] = {"state": states.PRUNED}
        try:
            for step, value in enumerate(running_aurocs(_settings(trial.params, space))):
                trial.report(value, step)
                if step + 1 == n_seeds:
                    told = {"values": value}
                elif trial.should_prune():
                    break
        except TrainingError:  # it diverged
            if not number:
                raise
        study.tell(trial, **told)
    return [
        Trial(
            _settings(trial.params, space),
            [auroc for _, auroc in sorted(trial.intermediate_values.items())],
            trial.state == states.PRUNED,
        )
        for trial in study.get_trials(states=finished)[: config.tune.trials]
    ]


def _space(config: Config, cell: Cell) -> dict[str, Numbers]:
    """What is tried: of the configured search, what the cell has; and its method's candidates."""
    space = config.tune.space(cell.architecture)
    network = config.train.architectures.get(cell.architecture)
    if network is None:
        return space
    if not network.dropout:
        del space["dropout"]
    candidates = make_method(find_method(cell.method).rows, cell.scaler)["method"].candidates
    choices = {name: tuple(c[name] for c in candidates) for name in candidates[0]}
    return space | {name: Numbers(choices=values) for name, values in choices.items()}


def _n_seeds(config: Config, cell: Cell) -> int:
    drawn = cell.method != NOTHING or BASELINES[cell.architecture].seeded
    return config.tune.seeds if drawn else 1


def _suggest(trial: Any, name: str, numbers: Numbers) -> None:
    if numbers.choices:
        trial.suggest_categorical(name, numbers.choices)
    elif numbers.whole:
        trial.suggest_int(name, int(numbers.low), int(numbers.high), log=numbers.log)
    else:
        trial.suggest_float(name, numbers.low, numbers.high, log=numbers.log)


def _settings(params: Settings, space: Mapping[str, Numbers]) -> Settings:
    """Numbers as they are used: whole, or rounded so that a person can read them.

    >>> from ehr_sn.config import WholeNumbers
    >>> space = {"rate": Numbers(high=1), "width": WholeNumbers(choices=(32, 64))}
    >>> _settings({"rate": 0.0123456, "width": 64.0}, space)
    {'rate': 0.0123, 'width': 64}
    """
    return {
        name: int(value) if space[name].whole else float(f"{value:.{DIGITS}g}")
        for name, value in params.items()
    }


def _trainer(
    config: Config, store: WithoutHeldOut, cell: Cell, n_seeds: int
) -> Callable[[Settings], Iterator[float]]:
    """A function: settings → the trial's AUROC on tuning rows after each seed.

    Of the average of the seeds' predictions so far, the mean over diseases. What the method makes
    of the rows is kept from trial to trial.
    """
    tuning = store.splits()[:, cell.split] == "tuning"
    y = store.labels()[tuning].T
    eligible = ~np.isnan(y)
    weight = [taken(of_disease, tuning) for of_disease in weights(store, cell.split)]

    @lru_cache(maxsize=n_seeds)
    def kept(params: tuple[tuple[str, Any], ...]) -> Completed:
        return complete(config, store, cell, dict(params))

    def running_aurocs(settings: Settings) -> Iterator[float]:
        total = np.zeros_like(y)
        for seed in range(n_seeds):
            tensors, _ = fit_cell(
                config, store, cell, [seed], settings, lambda params: kept(tuple(params.items()))
            )
            total += tensors["probability/tuning"][:, 0].numpy()
            scored = zip(y, total, eligible, weight, strict=True)
            yield float(np.mean([auroc(t[k], p[k], taken(w, k)) for t, p, k, w in scored]))

    return running_aurocs
