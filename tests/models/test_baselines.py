"""Baselines learn from training rows, choose on tuning rows, see no others, and are kept whole."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from ehr_sn import config
from ehr_sn.config import baseline_is_installed
from ehr_sn.errors import EhrSnError
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.models.baselines import BASELINES, PENALTIES, fit_baseline, with_masked_copies
from ehr_sn.models.fit import Task
from ehr_sn.models.mlp import StackedMLP
from ehr_sn.models.trees import HistTrees, StackedTrees, trees_from_state

N = 900
TRAIN, TUNING, HELD_OUT = np.split(np.arange(N), [500, 700])
installed = pytest.mark.parametrize(
    "name",
    [n for n, kind in BASELINES.items() if baseline_is_installed(n) and not kind.masked_copies],
)


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


def fitted(name: str, x: np.ndarray, tasks: Sequence[Task], seeds: Sequence[int]) -> np.ndarray:
    """Probabilities (tasks, seeds, rows)."""
    model = fit_baseline(name, x, tasks, seeds)
    return model.predict_proba(x).reshape(len(tasks), len(seeds), -1).numpy()


def test_the_configuration_knows_every_baseline() -> None:
    assert tuple(BASELINES) == config.BASELINES


@installed
def test_held_out_rows_are_ranked_by_their_risk(name: str, table: np.ndarray, task: Task) -> None:
    p = fitted(name, taken_by(name, table), [task, task], seeds=[0, 1])
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
    one, other = fitted(name, x, tasks, seeds=[3])
    assert one.tobytes() == other.tobytes()


def test_a_tree_takes_a_gap_for_information() -> None:
    """Who was measured is ill, whatever the value: only the gap tells."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, 1)).astype(np.float32)
    y = (rng.random(N) < 0.3).astype(np.float32)
    x[y == 0] = np.nan
    p = fitted("hist_gradient_boosting", x, [Task("ill", y, TRAIN, TUNING)], seeds=[0])
    assert auroc(y[HELD_OUT], p[0, 0, HELD_OUT]) == 1


def test_logistic_regression_takes_the_penalty_that_tunes_best(
    table: np.ndarray, task: Task
) -> None:
    x = np.nan_to_num(table)
    (p,) = fitted("logistic_regression", x, [task], seeds=[0])
    tuned = auroc(task.y[task.tuning_rows], p[0, task.tuning_rows])
    for penalty in PENALTIES:
        model = LogisticRegression(C=penalty).fit(x[task.train_rows], task.y[task.train_rows])
        found = model.predict_proba(x[task.tuning_rows])[:, 1].astype(np.float32)
        assert auroc(task.y[task.tuning_rows], found) <= tuned + 1e-6


@installed
def test_what_is_kept_predicts_the_same_bits_a_row_alone_and_among_others(
    name: str, table: np.ndarray, task: Task
) -> None:
    x = taken_by(name, table)
    model = fit_baseline(name, x, [task], seeds=[0, 1])
    read = trees_from_state if isinstance(model, StackedTrees) else StackedMLP.from_state
    kept = read({k: tensor.clone() for k, tensor in model.state().items()})
    p = model.predict_proba(x).numpy()
    assert p.shape == (2, N)
    assert kept.predict_proba(x).numpy().tobytes() == p.tobytes()
    empty = np.full_like(x[:1], 0 if BASELINES[name].method else np.nan)
    assert np.isfinite(kept.predict_proba(empty).numpy()).all()
    assert kept.predict_proba(x[:0]).shape == (2, 0)
    rows = np.random.default_rng(4).permutation(N)[:400]
    assert kept.predict_proba(x[rows]).numpy().tobytes() == p[:, rows].tobytes()
    for row in rows[:20]:
        assert kept.predict_proba(x[[row]]).numpy().tobytes() == p[:, [row]].tobytes()


def test_kept_trees_are_scikit_learns_to_the_bit() -> None:
    """Of any depth, on values at a threshold, infinite ones, and gaps that training never had."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 6)).astype(np.float32).round(1)
    x[:, 5] = np.where(rng.random(3000) < 0.3, np.nan, x[:, 5])
    y = rng.random(3000) < 1 / (1 + np.exp(-np.nan_to_num(x) @ [1, -1, 1, 0, 0, 1]))
    unseen = x.copy()
    unseen[rng.random(x.shape) < 0.3] = np.nan
    unseen[0], unseen[1] = np.inf, -np.inf
    settings = [{"max_leaf_nodes": 2}, {"max_leaf_nodes": None, "max_iter": 30}, {}]
    models = [HistGradientBoostingClassifier(random_state=0, **s).fit(x, y) for s in settings]
    trees = HistTrees.stacked([HistTrees.of(model, n_trees=model.n_iter_) for model in models])
    for found, model in zip(trees.predict_proba(unseen), models, strict=True):
        expected = model.predict_proba(unseen)[:, 1].astype(np.float32)
        assert found.numpy().tobytes() == expected.tobytes()


def test_the_state_holds_arrays_of_plain_types_only(table: np.ndarray, task: Task) -> None:
    state = fit_baseline("hist_gradient_boosting", table, [task], seeds=[0, 1]).state()
    assert {str(tensor.dtype) for tensor in state.values()} <= {
        "torch.float64",
        "torch.int32",
        "torch.int64",
    }
    assert state["nodes_of_tree"].sum() == len(state["value"])
    assert state["trees_of_model"].sum() == len(state["nodes_of_tree"])


def test_masked_copies_are_training_rows_with_less_in_them(table: np.ndarray) -> None:
    x = np.where(np.isnan(table), table, np.arange(N, dtype=np.float32)[:, None])
    y = (np.arange(N) % 3 == 0).astype(np.float32)
    tasks = [Task("all", y, TRAIN, TUNING), Task("half", y, TRAIN[::2], TUNING)]
    extended, changed = with_masked_copies(x, tasks, panels=np.array([0, 1, 1, 2]))
    assert extended[:N].tobytes() == x.tobytes()
    for given, made in zip(tasks, changed, strict=True):
        n = len(given.train_rows)
        np.testing.assert_array_equal(made.tuning_rows, given.tuning_rows)
        np.testing.assert_array_equal(made.train_rows[:n], given.train_rows)
        copied = made.train_rows[n:]
        assert 0.6 < len(copied) / n < 1  # of two draws half lose something, if there is any
        some_left = copied[~np.isnan(extended[copied]).all(axis=1)]
        source = np.nanmax(extended[some_left], axis=1).astype(int)
        assert set(source) <= set(given.train_rows)
        assert len(set(source)) > 0.4 * n
        lost = np.isnan(extended[some_left]) & ~np.isnan(x[source])
        assert lost.any(axis=1).all()
        both = ~np.isnan(x[source, 1]) & ~np.isnan(x[source, 2])
        assert (lost[both, 1] == lost[both, 2]).mean() > 0.6  # a panel is often lost as one
        np.testing.assert_array_equal(made.y[some_left], y[source])


def test_trees_that_saw_masked_copies_keep_their_level_when_entries_go_missing() -> None:
    """Trees that never saw a gap send it where most rows went: here, to the healthy."""
    rng = np.random.default_rng(0)
    ill = rng.random(N) < 0.3
    x = (ill[:, None] + 0.8 * rng.standard_normal((N, 6))).astype(np.float32)
    task = Task("ill", ill.astype(np.float32), TRAIN, TUNING)
    sparse = np.where(rng.random((N, 6)) < 0.7, np.nan, x).astype(np.float32)[HELD_OUT]
    copied, (masked,) = with_masked_copies(x, [task], panels=np.arange(6))
    plain = fit_baseline("hist_gradient_boosting", x, [task], seeds=[0])
    robust = fit_baseline("hist_gradient_boosting", copied, [masked], seeds=[0])
    predicted = [float(model.predict_proba(sparse).mean()) for model in (plain, robust)]
    assert predicted[0] < 0.22
    assert 0.27 < predicted[1] < 0.33
    assert auroc(ill[HELD_OUT], robust.predict_proba(x[HELD_OUT]).numpy()[0]) > 0.95


@pytest.mark.skipif(baseline_is_installed("xgboost"), reason="xgboost is installed")
def test_an_absent_package_is_told_with_how_to_install_it(table: np.ndarray, task: Task) -> None:
    with pytest.raises(EhrSnError, match=r"pip install 'ehr-sn\[xgboost\]'"):
        fit_baseline("xgboost", table, [task], seeds=[0])


every = pytest.mark.parametrize("name", [n for n in BASELINES if baseline_is_installed(n)])


@every
def test_a_feature_that_no_training_row_has_changes_nothing_but_the_numbers_of_the_others(
    name: str, table: np.ndarray, task: Task
) -> None:
    unseen = np.full((N, 1), np.nan, dtype=np.float32)
    unseen[HELD_OUT] = 3.5  # somebody has it later
    x = taken_by(name, np.column_stack([table[:, :1], unseen, table[:, 1:]]))
    panels = np.arange(x.shape[1])
    given = with_masked_copies(x, [task], panels) if BASELINES[name].masked_copies else (x, [task])
    model = fit_baseline(name, *given, seeds=[0])
    read = trees_from_state if isinstance(model, StackedTrees) else StackedMLP.from_state
    kept = read({k: tensor.clone() for k, tensor in model.state().items()})
    p = kept.predict_proba(x).numpy()
    assert p.tobytes() == model.predict_proba(x).numpy().tobytes()
    eligible = HELD_OUT[~np.isnan(task.y[HELD_OUT])]
    assert auroc(task.y[eligible], p[0, eligible]) > 0.7
    others = np.where(np.arange(x.shape[1]) == 1, -7, x).astype(np.float32)
    if not BASELINES[name].method:
        assert kept.predict_proba(others).numpy().tobytes() == p.tobytes()


def test_boosting_without_the_feature_that_no_training_row_has_is_the_same(
    table: np.ndarray, task: Task
) -> None:
    with_it = np.column_stack([table[:, :1], np.full((N, 1), np.nan), table[:, 1:]])
    with_it = with_it.astype(np.float32)
    (p,) = fitted("hist_gradient_boosting", table, [task], seeds=[0])
    (q,) = fitted("hist_gradient_boosting", with_it, [task], seeds=[0])
    assert p.tobytes() == q.tobytes()


def test_a_disease_whose_training_rows_have_no_feature_at_all_is_refused(task: Task) -> None:
    with pytest.raises(EhrSnError, match="no eligible training row of ill has any feature"):
        fit_baseline("hist_gradient_boosting", np.full((N, 2), np.nan, "f4"), [task], seeds=[0])
