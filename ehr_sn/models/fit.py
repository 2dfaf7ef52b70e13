"""Table + labels → trained networks: every disease × seed in one batched computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ehr_sn.errors import EhrSnError
from ehr_sn.models.mlp import SHUFFLING, StackedMLP, stream

WORKING_SET = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
"""Bytes of one layer's activations up to which replicates train as one group, a device."""

LOOKAHEAD = 64
"""Steps whose row numbers are drawn up (and sent to the device) at once."""


class TrainingError(EhrSnError, ValueError):
    """This cannot be trained as asked: names the task, the seed and what to change."""


@dataclass(frozen=True)
class Architecture:
    """The network: hidden widths, share of hidden units dropped in training, batch norm."""

    hidden: tuple[int, ...] = (64,)
    dropout: float = 0.0
    batch_norm: bool = False


@dataclass(frozen=True)
class Budget:
    """How long and how each replicate trains: Adam with decoupled weight decay (AdamW).

    Training stops after `max_epochs`, or once `patience` epochs have passed without a better AUROC
    on the tuning rows. With `balance_classes` a positive row weighs as many times a negative one
    as there are negatives to each positive among the task's training rows.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 256
    max_epochs: int = 100
    patience: int = 10
    balance_classes: bool = False


@dataclass(frozen=True)
class Task:
    """One disease: what to predict, for whom.

    y : (N,) 0 or 1, or NaN where a row is not eligible; such a row is left out
    train_rows, tuning_rows : row numbers of the shared table, from 0
    """

    name: str
    y: NDArray[np.floating]
    train_rows: NDArray[np.integer]
    tuning_rows: NDArray[np.integer]


@dataclass(frozen=True)
class Replicate:
    """One trained network: its seed, and its task's place in the list of tasks."""

    seed: int
    task: int


@dataclass
class History:
    """One replicate's training, a number an epoch; `best_epoch` (from 0) is the one that was kept."""

    train_loss: list[float] = field(default_factory=list)
    tuning_auroc: list[float] = field(default_factory=list)
    best_epoch: int = -1


@dataclass(frozen=True)
class Fitted:
    """Every replicate at its best epoch. Place r is the same network in all three.

    Replicates are task-major: all seeds of the first task, then all seeds of the second.
    """

    model: StackedMLP
    replicates: tuple[Replicate, ...]
    history: tuple[History, ...]

    def of_task(self, task: int) -> StackedMLP:
        """The networks of one task, one a seed."""
        return self.model.select([i for i, r in enumerate(self.replicates) if r.task == task])


def fit(
    x: NDArray[np.float32],
    tasks: Sequence[Task],
    seeds: Sequence[int],
    architecture: Architecture = Architecture(),  # noqa: B008
    budget: Budget = Budget(),  # noqa: B008
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Train one network for every task and seed, all on the same table.

    Replicates are exact: each draws from streams of its own seed only, so it equals itself trained
    alone, to rounding, whatever trains beside it; run again on the same machine, bit for bit.
    An epoch is a permutation of the replicate's own rows, wrapped around to fill the last batch.

    Parameters
    ----------
    x : (N, D) without NaN, used as float32; kept in memory once
    tasks : what to predict; each has rows of both classes to train and to tune on
    seeds : distinct non-negative integers, the same for every task
    device : where to compute, as PyTorch names it
    progress : called after each epoch with epochs done and epochs in all, over all replicates; one
        that stops early has then done all of its own

    Raises
    ------
    TrainingError
        A ValueError: x, a task or a seed cannot be used, or a loss became infinite or NaN.

    Examples
    --------
    >>> x = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    >>> task = Task("positive", (x[:, 0] > 0).astype(float), np.arange(0, 64, 2), np.arange(1, 64, 2))
    >>> fitted = fit(x, [task], seeds=[0, 1], budget=Budget(learning_rate=0.01, max_epochs=20))
    >>> fitted.model.predict_proba(x).shape, max(fitted.history[0].tuning_auroc)
    (torch.Size([2, 64]), 1.0)
    """
    x = np.ascontiguousarray(x, dtype=np.float32)
    _check(x, tasks, seeds, architecture, budget)
    table = torch.from_numpy(x).to(device)
    ready = [_ReadyTask(place, task, table) for place, task in enumerate(tasks)]
    runs = [
        _Run(place, *task_and_seed, budget)
        for place, task_and_seed in enumerate(product(ready, seeds))
    ]
    best = StackedMLP(
        x.shape[1],
        architecture.hidden,
        seeds=[run.seed for run in runs],
        dropout=architecture.dropout,
        batch_norm=architecture.batch_norm,
    ).to(table.device)

    def report() -> None:
        if progress is not None:
            progress(sum(run.epochs_done for run in runs), len(runs) * budget.max_epochs)

    _hold_freed_memory()
    for group in _groups(runs, max(x.shape[1], *architecture.hidden), table.device):
        _train(group, best, table, budget, report)
    return Fitted(
        best.eval(),
        tuple(Replicate(run.seed, run.task.place) for run in runs),
        tuple(run.history for run in runs),
    )


def _train(
    runs: Sequence[_Run],
    best: StackedMLP,
    table: Tensor,
    budget: Budget,
    report: Callable[[], None],
) -> None:
    """Train runs side by side until the last one stops; leave each at its best in `best`."""
    live = best.select([run.place for run in runs]).train()
    optimiser = torch.optim.AdamW(
        live.parameters(), budget.learning_rate, weight_decay=budget.weight_decay, fused=True
    )
    while runs:
        _take_steps(live, optimiser, table, runs)
        ended = [i for i, run in enumerate(runs) if run.epoch_is_over]
        if not ended:
            continue
        improved = []
        for task, members in groupby(ended, key=lambda i: runs[i].task):
            together = list(members)
            scores = live.select(together).predict_proba(table, task.tuning_rows).cpu().numpy()
            for i, score in zip(together, scores, strict=True):
                if runs[i].end_epoch(auroc=_auroc(score, task.tuning_positive)):
                    improved.append(i)
        best.put([runs[i].place for i in improved], live, improved)
        going = [i for i, run in enumerate(runs) if not run.stopped]
        if len(going) < len(runs):
            runs = [runs[i] for i in going]
            live.keep(going)
            for moments in optimiser.state.values():
                for name in ("exp_avg", "exp_avg_sq"):
                    moments[name] = moments[name][going]
        report()


def _take_steps(
    live: StackedMLP, optimiser: torch.optim.Optimizer, table: Tensor, runs: Sequence[_Run]
) -> None:
    """Step all runs on, to the next end of an epoch of any of them or as far as is drawn up."""
    n_steps = min(LOOKAHEAD, *(len(run.batches) for run in runs))
    batches = [run.take(n_steps) for run in runs]
    labels = [run.task.y[rows] for run, rows in zip(runs, batches, strict=True)]
    rows = torch.from_numpy(np.stack(batches, axis=1)).to(table.device)
    y = torch.from_numpy(np.stack(labels, axis=1)).to(table.device)
    weight = None
    if runs[0].budget.balance_classes:
        weight = torch.tensor([[run.task.balance] for run in runs], device=table.device)
    losses = torch.zeros(len(runs), device=table.device)
    for step_rows, step_y in zip(rows, y, strict=True):
        x = table.index_select(0, step_rows.view(-1)).view(*step_y.shape, -1)
        loss = binary_cross_entropy_with_logits(
            live(x), step_y, pos_weight=weight, reduction="none"
        ).mean(1)
        optimiser.zero_grad()
        loss.sum().backward()  # no replicate's loss moves another's weights
        optimiser.step()
        losses += loss.detach()
    for run, loss in zip(runs, losses.tolist(), strict=True):
        run.add_loss(loss)


class _ReadyTask:
    """A task with its eligible rows found, checked, and where they are needed."""

    def __init__(self, place: int, task: Task, table: Tensor) -> None:
        self.place, self.name = place, task.name
        self.y = np.asarray(task.y, dtype=np.float32)
        if self.y.shape != (len(table),):
            raise TrainingError(
                f"task {task.name!r}: y has shape {self.y.shape}, x has {len(table)} rows"
            )
        self.train_rows = self._eligible("train_rows", task.train_rows)
        tuning_rows = self._eligible("tuning_rows", task.tuning_rows)
        self.tuning_rows = torch.from_numpy(tuning_rows).to(table.device)
        self.tuning_positive = self.y[tuning_rows] == 1
        train_positive = int(self.y[self.train_rows].sum())
        self.balance = (len(self.train_rows) - train_positive) / train_positive

    def _eligible(self, kind: str, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not (0 <= rows.min() and rows.max() < len(self.y)):
            raise TrainingError(f"task {self.name!r}: {kind} must be from 0 to {len(self.y) - 1}")
        rows = rows[~np.isnan(self.y[rows])]
        n, positive = len(rows), int((self.y[rows] == 1).sum())
        negative = int((self.y[rows] == 0).sum())
        if positive + negative < n:
            raise TrainingError(f"task {self.name!r}: y must be 0, 1 or NaN")
        if not (positive and negative):
            raise TrainingError(
                f"task {self.name!r}: its {n} eligible {kind} hold {positive} positives and "
                f"{negative} negatives, and need at least one of each; leave the task out, "
                "or give it more rows"
            )
        return rows


class _Run:
    """One replicate while it trains: the batches left of its epoch, and how it has done so far."""

    def __init__(self, place: int, task: _ReadyTask, seed: int, budget: Budget) -> None:
        self.place, self.task, self.seed, self.budget = place, task, seed, budget
        self.history = History()
        self.rng = np.random.Generator(stream(seed, SHUFFLING))
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        size = self.budget.batch_size
        self.n_steps = -(-len(self.task.train_rows) // size)
        self.batches = np.resize(self.rng.permutation(self.task.train_rows), (self.n_steps, size))
        self.loss = 0.0

    def take(self, n_steps: int) -> NDArray[np.int64]:
        """The rows of the next steps, (n_steps, batch_size)."""
        taken, self.batches = self.batches[:n_steps], self.batches[n_steps:]
        return taken

    @property
    def epoch_is_over(self) -> bool:
        return not len(self.batches)

    @property
    def stopped(self) -> bool:
        epochs = len(self.history.tuning_auroc)
        late = epochs - 1 - self.history.best_epoch >= self.budget.patience
        return epochs == self.budget.max_epochs or late

    @property
    def epochs_done(self) -> int:
        return self.budget.max_epochs if self.stopped else len(self.history.tuning_auroc)

    def add_loss(self, loss: float) -> None:
        self.loss += loss / self.n_steps
        self._must_be_finite(loss, "training loss")

    def end_epoch(self, auroc: float) -> bool:
        """Note how the epoch went, and make the next one ready; whether it was the best so far."""
        self._must_be_finite(auroc, "tuning AUROC")
        history = self.history
        best = not history.tuning_auroc or auroc > history.tuning_auroc[history.best_epoch]
        history.train_loss.append(self.loss)
        history.tuning_auroc.append(auroc)
        if best:
            history.best_epoch = len(history.tuning_auroc) - 1
        self._begin_epoch()
        return best

    def _must_be_finite(self, value: float, name: str) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"task {self.task.name!r}, seed {self.seed}: the {name} became {value} in epoch "
                f"{len(self.history.tuning_auroc)}; try a learning_rate below "
                f"{self.budget.learning_rate:g}, or inputs on a smaller scale"
            )


def _groups(runs: Sequence[_Run], width: int, device: torch.device) -> list[list[_Run]]:
    """Runs to train together: as many as have activations that fit the processor's cache.

    Beyond it a replicate's step takes longer in a larger group, not shorter (benchmarks/training.py).
    """
    bytes_each = 4 * runs[0].budget.batch_size * width
    size = max(WORKING_SET.get(device.type, WORKING_SET["cuda"]) // bytes_each, 1)
    n_groups = -(-len(runs) // size)
    edges = [len(runs) * i // n_groups for i in range(n_groups + 1)]
    return [list(runs[start:end]) for start, end in pairwise(edges)]


def _auroc(score: NDArray[np.float32], positive: NDArray[np.bool_]) -> float:
    """Share of (positive, negative) pairs that are ranked rightly, a tie counting one half.

    The same number as `ehr_sn.evaluate.metrics.auroc`, without ranks: ten times faster.
    """
    if np.isnan(score).any():
        return math.nan
    low, high = np.sort(score[~positive]), np.sort(score[positive])
    won = np.searchsorted(low, high, "left").sum() + np.searchsorted(low, high, "right").sum()
    return float(won / (2 * len(low) * len(high)))


def _hold_freed_memory() -> None:
    """Let the allocator keep what one step frees for the next one to use.

    glibc hands freed blocks above a size back to the kernel, and then each step page-faults its
    activations in again: up to twice the time. That size follows the largest block freed so far,
    up to 32 MiB, so freeing one such block (never touched, hence free of charge) settles it.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _check(
    x: NDArray[np.float32],
    tasks: Sequence[Task],
    seeds: Sequence[int],
    architecture: Architecture,
    budget: Budget,
) -> None:
    if x.ndim != 2 or not np.isfinite(x).all():
        raise TrainingError(f"x must be a table (rows, features) without NaN or infinities")
    if not tasks or not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise TrainingError("name at least one task and one seed; seeds must differ, from 0 up")
