"""Who left before a label's window ended is stood for by those like them, in training and after."""

import numpy as np
import pandas as pd
import pytest
import torch

from ehr_sn.evaluate.results import evaluate
from ehr_sn.evaluate.statistics import delong
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models.baselines import fit_baseline
from ehr_sn.models.fit import Budget, Task, fit
from ehr_sn.models.learning_curve import FewerLabels
from ehr_sn.models.predict import read_tuning
from ehr_sn.models.train import Cell, read_cell, train_cell
from ehr_sn.models.tune import WithoutHeldOut
from ehr_sn.models.weights import weights

ROWS = 600


def task(weight=None, copies=None):
    """A task of rows 0 to 399 for training, and the rest for tuning; or with rows written out."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 4)).astype("f4")
    y = (rng.random(ROWS) < 1 / (1 + np.exp(2 - x[:, 0]))).astype("f4")
    train = np.arange(400) if copies is None else np.repeat(np.arange(400), copies[:400])
    tuning = np.arange(400, ROWS)
    if copies is not None:
        tuning = np.repeat(tuning, copies[400:])
    return x, Task("d", y, train, tuning, weight)


WHOLE = np.random.default_rng(1).integers(1, 4, ROWS)


@pytest.mark.parametrize("name", ["hist_gradient_boosting", "logistic_regression", "lightgbm"])
def test_baselines_learn_from_weighted_rows_as_if_these_were_written_out(name):
    if name == "lightgbm":
        pytest.importorskip("lightgbm")
    x, weighted = task(weight=WHOLE.astype(float))
    _, copied = task(copies=WHOLE)
    _, plain = task()
    params = {"max_iter": 30, "min_samples_leaf": 40} if name.startswith("hist") else None
    risk = {
        key: fit_baseline(name, x, [one], [0], params).predict_proba(x).numpy()[0]
        for key, one in (("weighted", weighted), ("copied", copied), ("plain", plain))
    }
    far = np.abs(risk["plain"] - risk["weighted"]).mean()
    assert far > 1e-4
    if name == "logistic_regression":  # trees also count rows, of which copies are more
        np.testing.assert_allclose(risk["weighted"], risk["copied"], atol=2e-3)


def test_networks_follow_the_weights():
    """Positives that stand for four rows each raise the risk that is learned."""
    x, plain = task()
    _, ones = task(weight=np.ones(ROWS))
    y = plain.y
    _, fours = task(weight=np.where(y == 1, 4.0, 1.0))
    budget = Budget(max_epochs=3, learning_rate=0.01)
    mean = [
        float(fit(x, [t], [0], budget=budget).model.predict_proba(torch.from_numpy(x)).mean())
        for t in (plain, ones, fours)
    ]
    assert mean[0] == mean[1]
    assert mean[2] > 1.5 * mean[0]
    share = 4 * y[:400].mean() / (4 * y[:400].mean() + 1 - y[:400].mean())
    assert mean[2] == pytest.approx(share, rel=0.15)


def test_tasks_with_and_without_weights_train_side_by_side():
    x, plain = task()
    _, weighted = task(weight=WHOLE.astype(float))
    budget = Budget(max_epochs=2)
    both = fit(x, [plain, weighted], [0, 1], budget=budget).model.predict_proba(torch.from_numpy(x))
    alone = fit(x, [weighted], [0, 1], budget=budget).model.predict_proba(torch.from_numpy(x))
    np.testing.assert_allclose(both[2:], alone, atol=1e-6)


@pytest.fixture
def censored(busy):
    """A hospital of which many patients leave within the label's window."""
    patients = pd.read_csv(busy.folder / "patients.csv")
    stays = np.random.default_rng(0).exponential(600, len(patients)).round()
    busy.write(patients=patients.assign(end=patients["index"] + stays))
    config = busy.config(
        train={
            "seeds": 2,
            "max_epochs": 3,
            "methods": {"standard": ["zero"]},
            "architectures": {"mlp": {"hidden": [4]}},
            "baselines": ["hist_gradient_boosting"],
        }
    )
    return config, Store(ingest(config))


def test_held_out_rows_carry_their_weights_and_subjects(censored):
    config, store = censored
    cell = Cell("zero", "standard", "mlp", 0)
    held_out = read_cell(train_cell(config, store, cell), store).held_out["diabetes"]
    labels = store.labels()[:, 0]
    mine = (store.splits()[:, 0] == "held_out") & ~np.isnan(labels)
    np.testing.assert_array_equal(held_out.weight, weights(store, 0)[0][mine])
    np.testing.assert_array_equal(held_out.subject, store.subjects()[mine])
    assert held_out.weight.std() > 0
    (result,) = evaluate({"diabetes": [held_out]})
    weighted = delong(held_out.y, held_out.ensemble, None, held_out.weight)
    assert result.ensemble == weighted
    assert weighted.value != delong(held_out.y, held_out.ensemble).value
    tuning = read_tuning(config, store, cell)["diabetes"]
    assert tuning.weight.shape == tuning.y.shape


def test_weights_are_learned_from_training_rows_and_are_one_there_on_average(censored):
    _, store = censored
    found, labels = weights(store, 0)[0], store.labels()[:, 0]
    train = store.splits()[:, 0] == "train"
    assert found[train & ~np.isnan(labels)].mean() == pytest.approx(1)
    assert not found[np.isnan(labels)].any()
    days = store.follow_up()[:, 0]
    known = ~np.isnan(labels)
    order = np.argsort(days[known], kind="stable")
    assert (np.diff(found[known][order]) >= 0).all()  # the longer, the more have left


def test_a_store_with_fewer_labels_does_not_take_its_rows_for_patients_who_left(censored):
    _, store = censored
    fewer = FewerLabels(store.path, 0.5)
    lost = np.isnan(fewer.labels()[:, 0]) & ~np.isnan(store.labels()[:, 0])
    assert lost.any()
    assert np.isnan(fewer.follow_up()[lost, 0]).all()


def test_without_held_out_rows_those_that_are_left_have_the_same_weights(censored):
    _, store = censored
    seen = store.splits()[:, 0] != "held_out"
    fewer = WithoutHeldOut(store.path, 0)
    np.testing.assert_array_equal(weights(fewer, 0)[0], weights(store, 0)[0][seen])
    np.testing.assert_array_equal(fewer.subjects(), store.subjects()[seen])


def test_where_everyone_is_followed_no_row_stands_for_another(busy):
    store = Store(ingest(busy.config()))
    assert store.follow_up() is not None
    assert weights(store, 0) == (None,)
