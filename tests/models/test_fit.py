"""Batched training gives each disease and seed the network it would have had alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ehr_sn.evaluate.metrics import auroc
from ehr_sn.models import fit as module
from ehr_sn.models.fit import Architecture, Budget, Fitted, Replicate, Task, TrainingError, fit
from ehr_sn.models.layers import Embedding
from ehr_sn.models.mixture import Mixture
from ehr_sn.models.mlp import SHUFFLING, StackedMLP, stream

N, D = 700, 6

BUDGET = Budget(learning_rate=0.01, batch_size=32, max_epochs=8, patience=2)
ARCHITECTURES = {
    "linear": Architecture(hidden=()),
    "plain": Architecture(hidden=(16,)),
    "deep with dropout": Architecture(hidden=(16, 8), dropout=0.5),
    "batch norm": Architecture(hidden=(16,), batch_norm=True),
    "all": Architecture(hidden=(12, 5), dropout=0.25, batch_norm=True),
    "sparsity norm": Architecture(hidden=(16, 8), dropout=0.25, sparsity_norm=True),
    "embedding": Architecture(
        hidden=(16,), dropout=0.25, embedding=Embedding(np.array([0, 1, 2, 0, 1, 1]), units=3)
    ),
}
MIXTURE = Mixture(np.log([0.5, 0.5]), np.array([[-1.0] * 3, [1.0] * 3]), np.ones((2, 3)))
TAKES_MASK = {
    "neumiss": Architecture(hidden=(16,), neumiss=True),
    "gmm": Architecture(hidden=(16,), dropout=0.25, mixture=MIXTURE),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the pipeline trains; more threads wait for one another wherever other work runs too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)


@pytest.fixture(scope="module")
def tasks(x) -> list[Task]:
    """Three diseases: of many, fewer and few eligible rows, easy and hard."""
    rng = np.random.default_rng(1)
    made = []
    for name, missing, slope in [("easy", 0.0, 4.0), ("hard", 0.4, 0.5), ("rare", 0.7, 1.0)]:
        risk = slope * (x[:, 0] * x[:, 1] + x[:, 2]) - (1.5 if name == "rare" else 0)
        y = (rng.random(N) < 1 / (1 + np.exp(-risk))).astype(np.float64)
        y[rng.random(N) < missing] = np.nan
        made.append(Task(name, y, np.arange(450), np.arange(450, N)))
    return made


def assert_same(one: StackedMLP, other: StackedMLP, atol: float = 1e-4) -> None:
    for name, tensor in one.tensors().items():
        torch.testing.assert_close(tensor, other.tensors()[name], atol=atol, rtol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_replicate_is_what_it_would_be_alone(x, tasks, architecture):
    assert_exact(x, tasks, architecture)


@pytest.mark.parametrize("architecture", TAKES_MASK.values(), ids=TAKES_MASK)
def test_so_is_one_that_takes_rows_with_their_mask(x, tasks, architecture):
    values, mask = np.hsplit(x, 2)
    mask = (mask > -0.5).astype(np.float32)
    assert_exact(np.hstack([values * mask, mask]), tasks, architecture)


def assert_exact(x, tasks, architecture) -> None:
    together = fit(x, tasks, [3, 0, 8], architecture, BUDGET)
    stops = {len(history.tuning_auroc) for history in together.history}
    assert len(stops) > 1, "replicates should stop at different epochs here"
    for r, replicate in enumerate(together.replicates):
        alone = fit(x, [tasks[replicate.task]], [replicate.seed], architecture, BUDGET)
        assert_same(together.model.select([r]), alone.model)
        mine, its = together.history[r], alone.history[0]
        assert mine.best_epoch == its.best_epoch
        assert mine.train_loss == pytest.approx(its.train_loss, abs=1e-4)
        assert mine.tuning_auroc == pytest.approx(its.tuning_auroc, abs=1e-3)


def test_a_replicate_is_what_a_plain_training_loop_gives(x, tasks):
    budget = replace(BUDGET, max_epochs=3, patience=9, weight_decay=0.1, balance_classes=True)
    fitted = fit(x, tasks, [0, 5], Architecture((16,)), budget)
    for r, (seed, t) in enumerate((rep.seed, rep.task) for rep in fitted.replicates):
        start = StackedMLP(D, (16,), seeds=[seed])
        net = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, 1))
        for linear, layer in [(net[0], start.layers[0]), (net[2], start.output)]:
            linear.weight.data = layer.weight.data[0].T.clone()
            linear.bias.data = layer.bias.data[0, 0].clone()
        adam = torch.optim.AdamW(net.parameters(), budget.learning_rate, weight_decay=0.1)
        rng = np.random.Generator(stream(seed, SHUFFLING))
        y = tasks[t].y
        rows = np.array([i for i in tasks[t].train_rows if not np.isnan(y[i])])
        weight = torch.tensor((y[rows] == 0).sum() / (y[rows] == 1).sum())
        for epoch in range(budget.max_epochs):
            order, losses = list(rng.permutation(rows)), []
            for start_of_batch in range(0, len(rows), 32):
                batch = (order * 2)[start_of_batch : start_of_batch + 32]
                logits = net(torch.from_numpy(x[batch])).squeeze(1)
                loss = binary_cross_entropy_with_logits(
                    logits, torch.tensor(y[batch], dtype=torch.float32), pos_weight=weight
                )
                adam.zero_grad()
                loss.backward()
                adam.step()
                losses.append(float(loss.detach()))
            assert fitted.history[r].train_loss[epoch] == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.parametrize("group_bytes", [1, 32 * 16 * 4 * 2, 32 * 16 * 4 * 5])
def test_how_replicates_are_grouped_changes_nothing(x, tasks, monkeypatch, group_bytes):
    architecture = Architecture(hidden=(16,), dropout=0.25)
    together = fit(x, tasks, [0, 1], architecture, BUDGET)
    monkeypatch.setitem(module.GROUP_BYTES, "cpu", group_bytes)
    apart = fit(x, tasks, [0, 1], architecture, BUDGET)
    assert_same(together.model, apart.model)
    assert [h.best_epoch for h in together.history] == [h.best_epoch for h in apart.history]


@pytest.mark.parametrize("architecture", [ARCHITECTURES["plain"], ARCHITECTURES["all"]])
def test_a_second_run_gives_the_same_bits(x, tasks, architecture):
    first, second = (fit(x, tasks, [0, 1], architecture, BUDGET) for _ in range(2))
    assert first.history == second.history
    for name, tensor in first.model.state().items():
        assert torch.equal(tensor, second.model.state()[name])


def test_the_best_epoch_is_what_is_returned(x, tasks):
    fitted = fit(x, tasks, [0, 1, 2], ARCHITECTURES["all"], BUDGET)
    best_epochs = [history.best_epoch for history in fitted.history]
    assert any(best < len(h.tuning_auroc) - 1 for best, h in zip(best_epochs, fitted.history))  # noqa: B905
    probability = fitted.model.predict_proba(x).numpy()
    for r, (replicate, history) in enumerate(zip(fitted.replicates, fitted.history, strict=True)):
        task = tasks[replicate.task]
        rows = task.tuning_rows[~np.isnan(task.y[task.tuning_rows])]
        score = roc_auc_score(task.y[rows], probability[r, rows])
        assert score == pytest.approx(max(history.tuning_auroc), abs=2e-4)
        assert history.tuning_auroc[history.best_epoch] == max(history.tuning_auroc)


def test_training_stops_when_patience_or_epochs_run_out(x, tasks):
    fitted = fit(x, tasks, range(4), ARCHITECTURES["plain"], BUDGET)
    for history in fitted.history:
        epochs = len(history.tuning_auroc)
        assert len(history.train_loss) == epochs
        assert epochs == min(history.best_epoch + 1 + BUDGET.patience, BUDGET.max_epochs)


def test_replicates_come_task_by_task(x, tasks):
    fitted = fit(x, tasks[:2], [4, 2], ARCHITECTURES["plain"], replace(BUDGET, max_epochs=1))
    assert fitted.replicates == tuple(Replicate(seed, task) for task in (0, 1) for seed in (4, 2))
    torch.testing.assert_close(
        fitted.of_task(1).predict_proba(x), fitted.model.predict_proba(x)[2:]
    )
    assert not fitted.model.training


def simple(y: np.ndarray, n: int = 800) -> Task:
    return Task("simple", y, np.arange(n // 2), np.arange(n // 2, n))


def mean_auroc(fitted: Fitted) -> float:
    return float(np.mean([max(history.tuning_auroc) for history in fitted.history]))


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_separable_disease_is_learned(architecture):
    x = np.random.default_rng(2).standard_normal((800, D)).astype(np.float32)
    task = simple((x @ [1, -1, 1, 0, 0, 0] > 0).astype(float))
    budget = Budget(learning_rate=0.01, batch_size=32, max_epochs=15)
    assert mean_auroc(fit(x, [task], [0, 1], architecture, budget)) > 0.95


def test_an_interaction_is_learned_by_hidden_units_only():
    x = np.random.default_rng(3).standard_normal((800, 2)).astype(np.float32)
    task = simple((x[:, 0] * x[:, 1] > 0).astype(float))
    budget = Budget(learning_rate=0.02, batch_size=32, max_epochs=25)
    assert mean_auroc(fit(x, [task], [0, 1], Architecture((32,)), budget)) > 0.95
    assert mean_auroc(fit(x, [task], [0, 1], Architecture(()), budget)) < 0.7


def test_ineligible_rows_are_left_out(x, tasks):
    task = tasks[1]
    named = [rows[~np.isnan(task.y[rows])] for rows in (task.train_rows, task.tuning_rows)]
    explicit = replace(task, train_rows=named[0], tuning_rows=named[1])
    one, other = (fit(x, [t], [0], ARCHITECTURES["plain"], BUDGET) for t in (task, explicit))
    assert one.history == other.history


def test_balanced_classes_raise_the_predicted_risk_of_a_rare_disease(x, tasks):
    plain, balanced = (
        fit(x, [tasks[2]], [0, 1], Architecture(()), replace(BUDGET, balance_classes=balance))
        for balance in (False, True)
    )
    assert balanced.model.predict_proba(x).mean() > plain.model.predict_proba(x).mean() + 0.05


def test_fewer_rows_than_a_batch_are_wrapped_around(x, tasks):
    task = replace(tasks[0], train_rows=np.arange(20))
    fitted = fit(x, [task], [0], Architecture((4,)), replace(BUDGET, batch_size=64, max_epochs=2))
    assert np.isfinite(fitted.history[0].train_loss).all()


def test_progress_never_falls_and_ends_at_the_whole(x, tasks):
    seen: list[tuple[int, int]] = []
    fit(x, tasks, [0, 1], ARCHITECTURES["plain"], BUDGET, progress=lambda *at: seen.append(at))
    done = [epochs for epochs, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {6 * BUDGET.max_epochs}
    assert seen[-1][0] == seen[-1][1]


def test_the_tuning_auroc_is_that_of_the_evaluation_ties_included():
    rng = np.random.default_rng(5)
    y = rng.random(300) < 0.2
    for score in (rng.random(300), rng.integers(0, 4, 300), np.zeros(300)):
        given = module._auroc(score.astype(np.float32), y)
        assert given == pytest.approx(float(auroc(y, score)), abs=1e-12)


def test_a_loss_that_explodes_names_its_task_and_seed(x, tasks):
    budget = replace(BUDGET, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"task 'easy', seed 7: .* learning_rate below 1e\+30"):
        fit(x, tasks, [7], ARCHITECTURES["plain"], budget)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.zeros(N)}, "450 eligible train_rows, 0 are positive"),
        ({"y": np.where(np.arange(N) < 450, np.nan, 1)}, "of 0 eligible train_rows"),
        ({"y": np.where(np.arange(N) < 450, np.arange(N) % 2, 1)}, "250 eligible tuning_rows"),
        ({"y": np.zeros(3)}, "x has 700 rows"),
        ({"y": np.full(N, 2.0)}, "0, 1 or NaN"),
        ({"train_rows": np.array([0, N])}, "from 0 to 699"),
        ({"tuning_rows": np.array([-1, 3])}, "from 0 to 699"),
    ],
)
def test_a_task_that_cannot_be_trained_is_named(x, tasks, change, message):
    with pytest.raises(TrainingError, match=f"task 'easy'.*{message}"):
        fit(x, [replace(tasks[0], **change)], [0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_table_with_holes_is_refused(x, tasks, bad):
    holed = x.copy()
    holed[3, 2] = bad
    with pytest.raises(ValueError, match="without NaN"):
        fit(holed, tasks, [0])


@pytest.mark.parametrize("seeds", [[], [1, 1], [-1]])
def test_seeds_must_be_distinct_and_not_negative(x, tasks, seeds):
    with pytest.raises(TrainingError, match="seed"):
        fit(x, tasks, seeds)


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(TrainingError, match="1 or more"):
        Budget(patience=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_gpu_trains_the_same_networks(x, tasks, architecture):
    budget = replace(BUDGET, max_epochs=2)
    cpu = fit(x, tasks, [0, 1], architecture, budget)
    gpu = fit(x, tasks, [0, 1], architecture, budget, device="cuda")
    assert gpu.model.output.weight.is_cuda
    torch.testing.assert_close(
        gpu.model.predict_proba(x).cpu(), cpu.model.predict_proba(x), atol=0.02, rtol=0
    )


def test_a_rare_disease_is_predicted_rarely_from_the_start(x, tasks):
    budget = replace(BUDGET, learning_rate=1e-6, max_epochs=1)
    fitted = fit(np.zeros_like(x), tasks, [0, 1], ARCHITECTURES["plain"], budget)
    for r, replicate in enumerate(fitted.replicates):
        task = tasks[replicate.task]
        prevalence = np.nanmean(task.y[task.train_rows])
        assert fitted.model.predict_proba(x[:1] * 0)[r, 0] == pytest.approx(prevalence, abs=1e-3)
    assert len({replicate.task for replicate in fitted.replicates}) == 3
