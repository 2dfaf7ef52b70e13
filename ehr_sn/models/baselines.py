"""Features + labels → fitted models, by what one would use instead of a network.

What a baseline chooses, it chooses as the networks do: by AUROC on the tuning rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from ehr_sn.config import baseline_is_installed
from ehr_sn.errors import EhrSnError
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.missing.amputate import hide
from ehr_sn.models.fit import Task
from ehr_sn.models.mlp import MASKING, StackedMLP, stream
from ehr_sn.models.trees import HistTrees, PackageTrees, StackedTrees

__all__ = ["BASELINES", "Baseline", "fit_baseline", "with_masked_copies"]

Rows = NDArray[np.float32]
Params = dict[str, Any]

PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Inverse penalties (scikit-learn's C) that logistic regression chooses from."""

MOST_TREES, PATIENCE = 600, 30
LEARNING_RATE, LEAVES, ROWS_IN_LEAF, FEATURES_A_SPLIT, ROWS_A_TREE = 0.05, 15, 20, 0.5, 0.8

MASKED_COPIES = 2
"""With half of their rows left whole, as many rows are masked as whole: what networks see, too."""


@dataclass(frozen=True)
class Baseline:
    """How it fits: table, task, seed, parameters → one model; and how several become one.

    method : how missing entries are filled, after z-scoring; None leaves features as they are
    masked_copies : whether it learns from masked copies of the training rows besides
    seeded : whether anything is drawn; if not, one fit stands for all seeds
    """

    fit: Callable[[Rows, Task, int, Params], Any]
    stacked: Callable[[Sequence[Any]], StackedTrees | StackedMLP]
    method: str | None = None
    masked_copies: bool = False
    seeded: bool = True


def fit_baseline(
    name: str, x: Rows, tasks: Sequence[Task], seeds: Sequence[int], params: Params | None = None
) -> StackedTrees | StackedMLP:
    """A model for each task and seed, task-major, fitted on the task's training rows of x.

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
    models = []
    for task in tasks:
        if baseline.seeded:
            models += [baseline.fit(x, task, seed, params) for seed in seeds]
        else:
            models += [baseline.fit(x, task, 0, params)] * len(seeds)
    return baseline.stacked(models)


def with_masked_copies(
    x: Rows, tasks: Sequence[Task], panels: NDArray[np.integer]
) -> tuple[Rows, list[Task]]:
    """A table (N, D), NaN = missing, and below it masked copies of the tasks' training rows.

    For learners that take a table and no stream. The tasks train on the copies, too, and tune on
    whole rows. Of `MASKED_COPIES` draws of the random masking, rows that lost an entry are added.
    """
    rng = np.random.Generator(stream(0, MASKING))
    rows = np.unique(np.concatenate([task.train_rows for task in tasks]))
    source = np.tile(rows, MASKED_COPIES)
    lost = hide(rng, len(source), panels) & ~np.isnan(x[source])
    source, lost = source[lost.any(axis=1)], lost[lost.any(axis=1)]
    copies = np.where(lost, np.float32(np.nan), x[source])
    extended = []
    for task in tasks:
        mine = len(x) + np.flatnonzero(np.isin(source, task.train_rows))
        y = np.concatenate([task.y, task.y[source]])
        train_rows = np.concatenate([task.train_rows, mine])
        weight = task.weight
        if weight is not None:
            weight = np.concatenate([weight, weight[source]])
        extended.append(replace(task, y=y, train_rows=train_rows, weight=weight))
    return np.concatenate([x, copies]), extended


def _hist_gradient_boosting(x: Rows, task: Task, seed: int, params: Params) -> HistTrees:
    """Boosting stops on the tuning rows' loss; kept are the trees up to their best AUROC.

    Features that no training row has are left out: scikit-learn cannot bin them.
    """
    train, tuning = task.train_rows, task.tuning_rows
    seen = np.flatnonzero(~np.isnan(x[train]).all(axis=0))
    if not seen.size:
        raise EhrSnError(f"no eligible training row of {task.name} has any feature: leave it out")
    x = x if seen.size == x.shape[1] else x[:, seen]
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
    model.fit(
        x[train],
        task.y[train],
        task.weight_of(train),
        X_val=x[tuning],
        y_val=task.y[tuning],
        sample_weight_val=task.weight_of(tuning),
    )
    stages = np.stack([p[:, 1] for p in model.staged_predict_proba(x[tuning])])
    areas = auroc(task.y[tuning], stages, task.weight_of(tuning))
    return HistTrees.of(model, int(areas.argmax()) + 1, features=seen)


def _logistic_regression(x: Rows, task: Task, seed: int, params: Params) -> LogisticRegression:
    """L2-penalised; C as given, or the one of `PENALTIES` with the best AUROC on tuning rows."""
    train, tuning = task.train_rows, task.tuning_rows
    found = []
    for penalty in [params["C"]] if params else PENALTIES:
        model = LogisticRegression(C=penalty, max_iter=1000)
        model.fit(x[train], task.y[train], task.weight_of(train))
        score = model.decision_function(x[tuning])
        found.append((float(auroc(task.y[tuning], score, task.weight_of(tuning))), model))
    return max(found, key=lambda pair: pair[0])[1]


def _as_networks(models: Sequence[LogisticRegression]) -> StackedMLP:
    """Logistic regression is a network without hidden layers, and is kept and read as one."""
    network = StackedMLP(models[0].n_features_in_, (), seeds=[0] * len(models))
    learned = {
        "output.weight": np.stack([model.coef_.T for model in models]),
        "output.bias": np.stack([model.intercept_[:, None] for model in models]),
    }
    tensors = {k: torch.from_numpy(array.astype(np.float32)) for k, array in learned.items()}
    return StackedMLP.from_state(network.state() | tensors)


def _lightgbm(x: Rows, task: Task, seed: int, params: Params) -> PackageTrees:
    from lightgbm import Dataset, early_stopping, train

    rows, tuning = (
        Dataset(x[at], task.y[at], weight=task.weight_of(at))
        for at in (task.train_rows, task.tuning_rows)
    )
    tuning.set_reference(rows)
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
    text = model.model_to_string(num_iteration=model.best_iteration)
    return PackageTrees("lightgbm", [text.encode()])


def _xgboost(x: Rows, task: Task, seed: int, params: Params) -> PackageTrees:
    from xgboost import DMatrix, train

    rows, tuning = (
        DMatrix(x[at], task.y[at], weight=task.weight_of(at), nthread=1)
        for at in (task.train_rows, task.tuning_rows)
    )
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
    written = model[: model.best_iteration + 1].save_raw("ubj")
    return PackageTrees("xgboost", [bytes(written)])


BASELINES = {
    "hist_gradient_boosting": Baseline(_hist_gradient_boosting, HistTrees.stacked),
    "boosting+masked_copies": Baseline(
        _hist_gradient_boosting, HistTrees.stacked, masked_copies=True
    ),
    "logistic_regression": Baseline(
        _logistic_regression, _as_networks, method="mean+mask", seeded=False
    ),
    "lightgbm": Baseline(_lightgbm, PackageTrees.stacked),
    "xgboost": Baseline(_xgboost, PackageTrees.stacked),
}
"""Name → baseline. The trees take NaN as it is, and send it down the better side of each split."""
