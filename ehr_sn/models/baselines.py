"""Features + labels → probabilities, by what one would use instead of a network.

What a baseline chooses, it chooses as the networks do: by AUROC on the tuning rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from ehr_sn.config import baseline_is_installed
from ehr_sn.errors import EhrSnError
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.models.fit import Task

__all__ = ["BASELINES", "Baseline", "fit_baseline"]

Rows = NDArray[np.float32]
Params = dict[str, Any]

PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Inverse penalties (scikit-learn's C) that logistic regression chooses from."""

MOST_TREES, PATIENCE = 600, 30
LEARNING_RATE, LEAVES, ROWS_IN_LEAF, FEATURES_A_SPLIT, ROWS_A_TREE = 0.05, 15, 20, 0.5, 0.8


@dataclass(frozen=True)
class Baseline:
    """How it fits: table, task, seed, parameters → probabilities (rows,) of all rows.

    method : how missing entries are filled, after z-scoring; None leaves features as they are
    seeded : whether anything is drawn; if not, one fit stands for all seeds
    """

    fit: Callable[[Rows, Task, int, Params], NDArray[np.floating]]
    method: str | None = None
    seeded: bool = True


def fit_baseline(
    name: str, x: Rows, tasks: Sequence[Task], seeds: Sequence[int], params: Params | None = None
) -> NDArray[np.float32]:
    """Probabilities (tasks, seeds, rows) of all rows of x, fitted on each task's training rows.

    Parameters
    ----------
    name : one of `BASELINES`
    x : (rows, features), filled by the baseline's `method`, or with NaN where it has none
    params : in place of its own, by the names of the package that fits it

    Raises
    ------
    EhrSnError
        It needs a package that is not installed.
    """
    if not baseline_is_installed(name):
        raise EhrSnError(
            f"the baseline {name!r} needs a package of that name: pip install 'ehr-sn[{name}]', "
            "or take it out of train.baselines"
        )
    baseline, params = BASELINES[name], params or {}
    if baseline.seeded:
        drawn = [[baseline.fit(x, task, seed, params) for seed in seeds] for task in tasks]
    else:
        drawn = [[baseline.fit(x, task, 0, params)] * len(seeds) for task in tasks]
    return np.array(drawn, dtype=np.float32)


def _hist_gradient_boosting(x: Rows, task: Task, seed: int, params: Params) -> NDArray[np.floating]:
    """Boosting stops on the tuning rows' loss; kept are the trees up to their best AUROC."""
    train, tuning = task.train_rows, task.tuning_rows
    settings = {
        "learning_rate": LEARNING_RATE,
        "max_iter": MOST_TREES,
        "max_leaf_nodes": LEAVES,
        "min_samples_leaf": ROWS_IN_LEAF,
        "max_features": FEATURES_A_SPLIT,
        "early_stopping": True,
        "n_iter_no_change": PATIENCE,
        "scoring": "loss",
        "random_state": seed,
    }
    model = HistGradientBoostingClassifier(**settings | params)
    model.fit(x[train], task.y[train], X_val=x[tuning], y_val=task.y[tuning])
    stages = np.stack([p[:, 1] for p in model.staged_predict_proba(x[tuning])])
    best = int(auroc(task.y[tuning], stages).argmax())
    return next(islice(model.staged_predict_proba(x), best, None))[:, 1]


def _logistic_regression(x: Rows, task: Task, seed: int, params: Params) -> NDArray[np.floating]:
    """L2-penalised; C as given, or the one of `PENALTIES` with the best AUROC on tuning rows."""
    train, tuning = task.train_rows, task.tuning_rows
    found = []
    for penalty in [params["C"]] if params else PENALTIES:
        model = LogisticRegression(C=penalty, max_iter=1000).fit(x[train], task.y[train])
        found.append((float(auroc(task.y[tuning], model.decision_function(x[tuning]))), model))
    _, best = max(found, key=lambda pair: pair[0])
    return best.predict_proba(x)[:, 1]


def _lightgbm(x: Rows, task: Task, seed: int, params: Params) -> NDArray[np.floating]:
    from lightgbm import Dataset, early_stopping, train

    rows = Dataset(x[task.train_rows], task.y[task.train_rows])
    tuning = Dataset(x[task.tuning_rows], task.y[task.tuning_rows], reference=rows)
    settings = {
        "objective": "binary",
        "metric": "auc",
        "learning_rate": LEARNING_RATE,
        "num_leaves": LEAVES,
        "min_data_in_leaf": ROWS_IN_LEAF,
        "feature_fraction_bynode": FEATURES_A_SPLIT,
        "bagging_fraction": ROWS_A_TREE,
        "bagging_freq": 1,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": 1,
        "verbosity": -1,
    }
    stop = early_stopping(PATIENCE, verbose=False)
    model = train(settings | params, rows, MOST_TREES, valid_sets=[tuning], callbacks=[stop])
    return np.asarray(model.predict(x, num_iteration=model.best_iteration))


def _xgboost(x: Rows, task: Task, seed: int, params: Params) -> NDArray[np.floating]:
    from xgboost import DMatrix, train

    rows = DMatrix(x[task.train_rows], task.y[task.train_rows], nthread=1)
    tuning = DMatrix(x[task.tuning_rows], task.y[task.tuning_rows], nthread=1)
    settings = {
        "objective": "binary:logistic",
        "eval_metric": "auc",
        "eta": LEARNING_RATE,
        "grow_policy": "lossguide",
        "max_leaves": LEAVES,
        "max_depth": 0,
        "min_child_weight": 2,
        "colsample_bynode": FEATURES_A_SPLIT,
        "subsample": ROWS_A_TREE,
        "seed": seed,
        "nthread": 1,
    }
    model = train(
        settings | params,
        rows,
        MOST_TREES,
        evals=[(tuning, "tuning")],
        early_stopping_rounds=PATIENCE,
        verbose_eval=False,
    )
    trees = (0, model.best_iteration + 1)
    return model.predict(DMatrix(x, nthread=1), iteration_range=trees)


BASELINES = {
    "hist_gradient_boosting": Baseline(_hist_gradient_boosting),
    "logistic_regression": Baseline(_logistic_regression, method="mean+mask", seeded=False),
    "lightgbm": Baseline(_lightgbm),
    "xgboost": Baseline(_xgboost),
}
"""Name → baseline. The trees take NaN as it is, and send it down the better side of each split."""
