"""Trials: as many for everybody, on tuning rows alone, the same however often interrupted."""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from ehr_sn.config import Config, Train
from ehr_sn.errors import ConfigError, EhrSnError
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models import tune as tuning
from ehr_sn.models.fit import TrainingError
from ehr_sn.models.predict import read_tuning
from ehr_sn.models.train import (
    NOTHING,
    Cell,
    Trial,
    best_trial,
    cell_path,
    comparisons,
    read_cell,
    read_trials,
    train_cell,
    trials_path,
    tuned,
)
from ehr_sn.models.tune import tune

TRAIN = {
    "seeds": 2,
    "max_epochs": 3,
    "batch_size": 32,
    "methods": {"standard": ["zero", "sparsity_normalization_tuned", "multiple_imputation"]},
    "architectures": {"mlp": {"hidden": [4, 8], "dropout": 0.5}},
    "baselines": ["logistic_regression", "hist_gradient_boosting"],
}
TUNE = {"trials": 7, "seeds": 2, "search": {"networks": {"width": [2, 4, 8]}}}
ZERO = Cell("zero", "standard", "mlp", 1)


@pytest.fixture
def config(busy) -> Config:
    return busy.config(train=TRAIN, tune=TUNE, splits={"repeats": 2})


@pytest.fixture
def store(config: Config) -> Store:
    return Store(ingest(config))


def with_trials(config: Config, trials: int) -> Config:
    tune = config.tune.model_copy(update={"trials": trials})
    return config.model_copy(update={"tune": tune})


def write_trials(config: Config, store: Store, cell: Cell, *trials: Trial) -> None:
    path = trials_path(config, store, cell)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([asdict(trial) for trial in trials]))


def moved(store: Store, folder: Path) -> Store:
    """The same store in a folder without cells and studies."""
    return Store(Path(shutil.copytree(store.path, folder / store.path.name)))


def test_every_comparison_has_as_many_trials_of_its_own_parameters(
    config: Config, store: Store
) -> None:
    of_network = {"learning_rate", "weight_decay", "batch_size", "width", "dropout"}
    tried = {
        "zero": of_network,
        "sparsity_normalization_tuned": of_network | {"exponent"},
        "multiple_imputation": of_network,
        "logistic_regression": {"C"},
        "hist_gradient_boosting": set(type(config.tune.search.hist_gradient_boosting).model_fields),
    }
    few = with_trials(config, 2)
    for comparison in comparisons(few):
        cell = Cell(*comparison, 0)
        tune(few, store, cell)
        first, second = read_trials(few, store, cell)
        assert first.settings == {}
        name = cell.architecture if cell.method == NOTHING else cell.method
        assert second.settings.keys() == tried[name]
        seeds = 1 if name == "logistic_regression" else 2
        assert all(len(trial.aurocs) == seeds for trial in (first, second))


def test_a_network_without_dropout_stays_without(busy) -> None:
    train = TRAIN | {"architectures": {"mlp": {"hidden": [4]}}}
    config = busy.config(train=train, tune={"trials": 2, "seeds": 1})
    store, cell = Store(ingest(config)), Cell("zero", "standard", "mlp", 0)
    tune(config, store, cell)
    assert "dropout" not in read_trials(config, store, cell)[1].settings


def test_rows_held_out_are_not_seen(config: Config, store: Store, tmp_path: Path) -> None:
    """Other labels and other values of them lead to the same trials, to the last bit."""
    other = moved(store, tmp_path / "other")
    held_out = store.splits()[:, ZERO.split] == "held_out"
    for table, columns in (("labels", store.diseases), ("values", store.feature_names)):
        (path,) = (
            (other.path / table).glob("*")
            if (other.path / table).is_dir()
            else [other.path / f"{table}.parquet"]
        )
        frame = pd.read_parquet(path)
        frame.loc[held_out, columns] = 1 - frame.loc[held_out, columns]
        frame.to_parquet(path)
    assert np.nanmax(np.abs(other.labels() - store.labels())) == 1
    few = with_trials(config, 3)
    for cell in (ZERO, Cell(NOTHING, NOTHING, "logistic_regression", 1)):
        assert tune(few, store, cell).read_bytes() == tune(few, other, cell).read_bytes()


def test_an_interrupted_study_goes_on_and_comes_to_the_same(
    config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(config, store, ZERO).read_bytes()
    other = moved(store, tmp_path / "other")
    fit_cell, fits = tuning.fit_cell, []

    def loses_power(*args):
        fits.append(args[4])
        if len(fits) in (1, 6, 7):  # in the first trial, in the third and when that is made again
            raise KeyboardInterrupt
        return fit_cell(*args)

    monkeypatch.setattr(tuning, "fit_cell", loses_power)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            tune(config, other, ZERO)
        with pytest.raises(EhrSnError, match="zero · mlp · standard is not tuned on split 2"):
            cell_path(config, other, ZERO)
    tune(with_trials(config, 5), other, ZERO)  # then more are asked for
    assert tune(config, other, ZERO).read_bytes() == whole
    trained = sum(len(trial.aurocs) for trial in read_trials(config, other, ZERO))
    assert len(fits) == trained + 3
    assert fits[5] == fits[6] == fits[7] != {}


def test_trials_that_begin_badly_are_given_up_and_never_chosen(
    config: Config, store: Store
) -> None:
    more = with_trials(config, 9)
    tune(more, store, ZERO)
    trials = read_trials(more, store, ZERO)
    pruned = [trial for trial in trials if trial.pruned]
    assert pruned
    assert all(len(trial.aurocs) == 1 for trial in pruned)
    best = best_trial(trials)
    assert not best.pruned
    assert best.aurocs[-1] == max(trial.aurocs[-1] for trial in trials if not trial.pruned)
    lucky = Trial({"width": 4}, [0.99], pruned=True)
    assert best_trial([lucky, *trials]) == best


def test_a_trial_that_diverges_is_given_up_but_not_the_configuration_itself(
    config: Config, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_cell, fails = tuning.fit_cell, True

    def diverges(*args):
        if bool(args[4]) == fails:
            return fit_cell(*args)
        raise TrainingError("the training loss became inf")

    few = with_trials(config, 3)
    monkeypatch.setattr(tuning, "fit_cell", diverges)
    with pytest.raises(TrainingError):
        tune(few, store, ZERO)
    fails = False
    tune(few, store, ZERO)
    first, *others = read_trials(few, store, ZERO)
    assert [(trial.aurocs, trial.pruned) for trial in others] == [([], True)] * 2
    assert best_trial([*others, first]) == first


def test_a_cell_trains_with_what_was_chosen(config: Config, store: Store) -> None:
    train = config.train.model_dump()
    train["architectures"]["mlp"] |= {"hidden": [2, 2], "dropout": 0.25}
    by_hand = with_trials(config, 0).model_copy(
        update={"train": Train.model_validate(train | {"learning_rate": 0.02, "batch_size": 64})}
    )
    chosen = {"learning_rate": 0.02, "batch_size": 64, "width": 2, "dropout": 0.25}
    write_trials(config, store, ZERO, Trial({}, [0.5, 0.5], False), Trial(chosen, [0.6], False))
    assert tuned(config, store, ZERO) == chosen
    one, other = train_cell(config, store, ZERO), train_cell(by_hand, store, ZERO)
    assert one != other
    assert load_file(one).keys() == load_file(other).keys()
    for name, array in load_file(one).items():
        np.testing.assert_array_equal(array, load_file(other)[name])

    regression = Cell(NOTHING, NOTHING, "logistic_regression", 0)
    strong, weak = Trial({"C": 1e-4}, [0.6], False), Trial({"C": 1.0}, [0.6], False)
    spreads = []
    for trial in (strong, weak):
        write_trials(config, store, regression, trial)
        trained = read_cell(train_cell(config, store, regression), store)
        spreads.append(trained.held_out["diabetes"].probability.std())
    assert 2 * spreads[0] < spreads[1]


def test_what_was_best_untuned_is_the_untuned_cell(config: Config, store: Store) -> None:
    untuned = with_trials(config, 0)
    alone = with_trials(config, 1)
    tune(alone, store, ZERO)
    assert cell_path(alone, store, ZERO) == cell_path(untuned, store, ZERO)
    train_cell(alone, store, ZERO)
    (trial,) = read_trials(alone, store, ZERO)
    rows = read_tuning(alone, store, ZERO)["diabetes"]
    assert trial.aurocs[-1] == pytest.approx(auroc(rows.y, rows.ensemble), abs=1e-3)


def test_without_tuning_cells_are_found_where_they_were(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "0123456789abcdef"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    path = cell_path(with_trials(config, 0), Store(folder), ZERO)
    assert path.name == "ab44bf7cf8b5efac.safetensors"


def test_optuna_is_asked_for_where_it_is_absent(
    config: Config, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"hospital.yaml:\d+: tune: .*'ehr-sn\[tune\]'"):
        tune(config, store, ZERO)
    assert not trials_path(config, store, ZERO).exists()
