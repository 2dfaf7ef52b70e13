"""Baselines learn from training rows, choose on tuning rows, and see no others."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from ehr_sn import config
from ehr_sn.config import baseline_is_installed
from ehr_sn.errors import EhrSnError
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.models.baselines import BASELINES, PENALTIES, fit_baseline
from ehr_sn.models.fit import Task

N = 900
TRAIN, TUNING, HELD_OUT = np.split(np.arange(N), [500, 700])
installed = pytest.mark.parametrize("name", [n for n in BASELINES if baseline_is_installed(n)])


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((N, 4)).astype(np.float32)
    x[np.random.default_rng(1).random(x.shape) < 0.2] = np.nan
    return x


@pytest.fixture(scope="module")
def task(table: np.ndarray) -> Task:
    risk = np.nan_to_num(table) @ [1.5, -1, 0, 0]
    y = (np.random.default_rng(2).random(N) < 1 / (1 + np.exp(-risk))).astype(np.float32)
    y[::10] = np.nan  # not eligible
    eligible = ~np.isnan(y)
    return Task("ill", y, TRAIN[eligible[TRAIN]], TUNING[eligible[TUNING]])


def taken_by(name: str, table: np.ndarray) -> np.ndarray:
    return np.nan_to_num(table) if BASELINES[name].method else table


def test_the_configuration_knows_every_baseline() -> None:
    assert tuple(BASELINES) == config.BASELINES


@installed
def test_held_out_rows_are_ranked_by_their_risk(name: str, table: np.ndarray, task: Task) -> None:
    p = fit_baseline(name, taken_by(name, table), [task, task], seeds=[0, 1])
    assert p.shape == (2, 2, N)
    assert p.dtype == np.float32
    assert ((p > 0) & (p < 1)).all()
    eligible = HELD_OUT[~np.isnan(task.y[HELD_OUT])]
    assert auroc(task.y[eligible], p[0][:, eligible]).min() > 0.72
    assert p[0].tobytes() == p[1].tobytes()  # the same task again: the same bits
    assert (p[0, 0] != p[0, 1]).any() == BASELINES[name].seeded


@installed
def test_labels_of_held_out_rows_are_not_seen(name: str, table: np.ndarray, task: Task) -> None:
    flipped = task.y.copy()
    flipped[HELD_OUT] = 1 - flipped[HELD_OUT]
    x = taken_by(name, table)
    tasks = [task, replace(task, y=flipped)]
    one, other = fit_baseline(name, x, tasks, seeds=[3])
    assert one.tobytes() == other.tobytes()


def test_a_tree_takes_a_gap_for_information() -> None:
    """Who was measured is ill, whatever the value: only the gap tells."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, 1)).astype(np.float32)
    y = (rng.random(N) < 0.3).astype(np.float32)
    x[y == 0] = np.nan
    p = fit_baseline("hist_gradient_boosting", x, [Task("ill", y, TRAIN, TUNING)], seeds=[0])
    assert auroc(y[HELD_OUT], p[0, 0, HELD_OUT]) == 1


def test_logistic_regression_takes_the_penalty_that_tunes_best(
    table: np.ndarray, task: Task
) -> None:
    x = np.nan_to_num(table)
    (p,) = fit_baseline("logistic_regression", x, [task], seeds=[0])
    tuned = auroc(task.y[task.tuning_rows], p[0, task.tuning_rows])
    for penalty in PENALTIES:
        model = LogisticRegression(C=penalty).fit(x[task.train_rows], task.y[task.train_rows])
        found = model.predict_proba(x[task.tuning_rows])[:, 1].astype(np.float32)
        assert auroc(task.y[task.tuning_rows], found) <= tuned


@pytest.mark.skipif(baseline_is_installed("xgboost"), reason="xgboost is installed")
def test_an_absent_package_is_told_with_how_to_install_it(table: np.ndarray, task: Task) -> None:
    with pytest.raises(EhrSnError, match=r"pip install 'ehr-sn\[xgboost\]'"):
        fit_baseline("xgboost", table, [task], seeds=[0])
