"""Table + labels → trained networks: every disease × seed in one batched computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby, pairwise, product
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ehr_sn.errors import EhrSnError
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.models.layers import Embedding, Encoder
from ehr_sn.models.masking import MaskedRows, Masking, gather
from ehr_sn.models.mixture import Mixture
from ehr_sn.models.mlp import SHUFFLING, StackedMLP, stream

GROUP_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""How large one layer's activations may grow by training replicates together, by device."""

LOOKAHEAD = 64
"""Steps whose batches are drawn up, and sent to the device, at once."""


class TrainingError(EhrSnError, ValueError):
    """This cannot be trained: names the task, the seed and what to change."""


@dataclass(frozen=True)
class Architecture:
    """Hidden widths, share of hidden units dropped in training, and whether to normalise them.

    The rest is as `StackedMLP` takes it.
    """

    hidden: tuple[int, ...] = (64,)
    dropout: float = 0.0
    batch_norm: bool = False
    sparsity_norm: bool = False
    neumiss: bool = False
    mixture: Mixture | None = None
    encoder: Encoder | None = None
    embedding: Embedding | None = None

    def widest(self, n_features: int) -> int:
        """Units of the widest layer, the input among them."""
        encoded = self.encoder.widths if self.encoder else ()
        taken = n_features + (self.embedding.width if self.embedding else 0)
        return max((taken, *self.hidden, *encoded))


@dataclass(frozen=True)
class Budget:
    """How each replicate trains: Adam with decoupled weight decay (AdamW), on binary cross-entropy.

    It stops after `max_epochs`, or when `patience` epochs have brought no better AUROC on its
    tuning rows. With `balance_classes` the positives of a task's training rows weigh together as
    much as its negatives.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 256
    max_epochs: int = 100
    patience: int = 10
    balance_classes: bool = False

    def __post_init__(self) -> None:
        if min(self.batch_size, self.max_epochs, self.patience) < 1:
            raise TrainingError("batch_size, max_epochs and patience must be 1 or more")


@dataclass(frozen=True)
class Task:
    """One disease: what to predict, and for which rows of the table that all tasks share.

    y : (N,), 0 or 1, or NaN where a row is not eligible and so left out
    train_rows, tuning_rows : row numbers, from 0
    weight : (N,), how many rows each stands for, in the loss and in the AUROC; None for one each
    """

    name: str
    y: NDArray[np.floating]
    train_rows: NDArray[np.integer]
    tuning_rows: NDArray[np.integer]
    weight: NDArray[np.floating] | None = None

    def weight_of(self, rows: NDArray[np.integer]) -> NDArray[np.floating] | None:
        """What some rows stand for."""
        return None if self.weight is None else self.weight[rows]


@dataclass(frozen=True)
class Replicate:
    """One network: its seed, and the place of its task among the tasks."""

    seed: int
    task: int


@dataclass
class History:
    """A replicate's numbers, one an epoch, and the epoch (from 0) whose weights were kept."""

    train_loss: list[float] = field(default_factory=list)
    tuning_auroc: list[float] = field(default_factory=list)
    best_epoch: int = -1


@dataclass(frozen=True)
class Fitted:
    """All replicates at their best epochs, task-major: all seeds of the first task come first."""

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
    architecture: Architecture = Architecture(),
    budget: Budget = Budget(),
    *,
    masking: Masking | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """Train a network for every task and seed, all on one table.

    Replicates are exact: one draws only from its own seed's streams, so it becomes what it would
    alone, whatever trains beside it (to rounding; bit for bit on the processors tried, for groups
    of two and more), and bit for bit the same when run again. An epoch is a permutation of its own
    rows, wrapped around to fill the last batch. The output's bias starts at the log odds of the
    training rows (at 0 with `balance_classes`).

    Parameters
    ----------
    x : (N, D), finite; used as float32, and held once
    tasks : what to predict; each needs both classes among its training and its tuning rows
    seeds : distinct non-negative integers, used for every task
    masking : hides entries of the rows trained on, not of those tuned on
    device : where to compute, as PyTorch names it
    progress : called as epochs end with (epochs done, epochs at most), summed over replicates; one
        that has stopped counts with all of its own

    Raises
    ------
    TrainingError
        A ValueError: an argument cannot be used, or a loss became infinite or NaN.

    Examples
    --------
    >>> x = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    >>> task = Task("sign", (x[:, 0] > 0) * 1.0, np.arange(0, 64, 2), np.arange(1, 64, 2))
    >>> fitted = fit(x, [task], seeds=[0, 1], budget=Budget(max_epochs=5))
    >>> fitted.model.predict_proba(x).shape
    torch.Size([2, 64])
    """
    x = np.require(x, np.float32, ["C", "W"])
    if x.ndim != 2 or not np.isfinite(x).all():
        raise TrainingError("x must have the shape (rows, features), without NaN or infinity")
    if not tasks or not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise TrainingError("give at least one task and one seed; seeds are distinct, from 0 up")
    table = torch.from_numpy(x).to(device)
    pairs = product((_ReadyTask(i, task, table) for i, task in enumerate(tasks)), seeds)
    runs = [_Run(place, task, seed, budget) for place, (task, seed) in enumerate(pairs)]
    best = StackedMLP(
        x.shape[1],
        seeds=[run.seed for run in runs],
        **{field.name: getattr(architecture, field.name) for field in fields(architecture)},
    ).to(table.device)
    if not budget.balance_classes:
        # From a bias of 0 a rare disease's low risk would be learned by all columns that are mostly
        # 1, the mask's above all: risk would then rise with every entry that goes missing.
        log_odds = torch.tensor([-math.log(run.task.odds_against) for run in runs])
        best.tensors()["output.bias"].data[:, 0, 0] = log_odds.to(table.device)

    def report() -> None:
        if progress is not None:
            progress(sum(run.epochs_done for run in runs), len(runs) * budget.max_epochs)

    _hold_freed_memory()
    for group in _groups(runs, architecture.widest(x.shape[1]), table.device):
        masked = masking([run.seed for run in group], table) if masking else None
        _train(group, best, table, masked, report)
    return Fitted(
        best.eval(),
        tuple(Replicate(run.seed, run.task.place) for run in runs),
        tuple(run.history for run in runs),
    )


def device_of(name: str) -> str:
    """What a configuration's `device` means here: `auto` is the GPU if there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _train(
    runs: list[_Run],
    best: StackedMLP,
    table: Tensor,
    masked: MaskedRows | None,
    report: Callable[[], None],
) -> None:
    """Train runs side by side until the last has stopped, and leave each at its best in `best`."""
    budget = runs[0].budget
    live = best.select([run.place for run in runs]).train()
    optimiser = _adam(live, budget)
    while runs:
        _take_steps(runs, live, optimiser, table, masked)
        ended = [i for i, run in enumerate(runs) if not len(run.batches)]
        if not ended:
            continue
        improved = []
        for task, members in groupby(ended, key=lambda i: runs[i].task):
            at = list(members)
            scores = live.select(at).predict_proba(table, task.tuning_rows).cpu().numpy()
            aurocs = [_auroc(score, task.tuning_positive, task.tuning_weight) for score in scores]
            improved += [i for i, auroc in zip(at, aurocs, strict=True) if runs[i].end_epoch(auroc)]
        best.put([runs[i].place for i in improved], live, improved)
        going = [i for i, run in enumerate(runs) if not run.stopped]
        if len(going) < len(runs):
            runs = [runs[i] for i in going]
            _keep(live, optimiser, going)
        report()


def _adam(model: StackedMLP, budget: Budget) -> torch.optim.AdamW:
    """AdamW on stacked weights: elementwise, so each replicate has its own.

    The fused kernel is the fastest, but rounds the elements that do not fill its last vector (16
    floats) differently. Parameters whose replicates could fall there are updated without it, and
    no bit depends on the size of the stack.
    """
    whole = [p for p in model.parameters() if p[0].numel() % 16 == 0]
    ragged = [p for p in model.parameters() if p[0].numel() % 16]
    groups: list[dict[str, Any]] = [{"params": whole, "fused": True}, {"params": ragged}]
    return torch.optim.AdamW(
        groups, budget.learning_rate, weight_decay=budget.weight_decay, fused=False
    )


def _keep(live: StackedMLP, optimiser: torch.optim.AdamW, going: Sequence[int]) -> None:
    """Let replicates that have stopped leave the stack, so that they cost no more time."""
    live.keep(going)
    for moments in optimiser.state.values():
        moments.update({name: moments[name][going] for name in ("exp_avg", "exp_avg_sq")})


def _take_steps(
    runs: Sequence[_Run],
    live: StackedMLP,
    optimiser: torch.optim.AdamW,
    table: Tensor,
    masked: MaskedRows | None = None,
) -> None:
    """Step all runs until an epoch of one of them ends, or `LOOKAHEAD` is reached."""
    n_steps = min(LOOKAHEAD, *(len(run.batches) for run in runs))
    batches = [run.take(n_steps) for run in runs]
    labels = [run.task.y[rows] for run, rows in zip(runs, batches, strict=True)]
    rows = torch.from_numpy(np.stack(batches, axis=1)).to(table.device)  # (n_steps, R, B)
    y = torch.from_numpy(np.stack(labels, axis=1)).to(table.device)
    balance = None
    if runs[0].budget.balance_classes:
        balance = torch.tensor([[run.task.odds_against] for run in runs], device=table.device)
    weights: Sequence[Tensor | None] = [None] * n_steps
    if any(run.task.weight is not None for run in runs):
        each = [run.task.weight_of(rows) for run, rows in zip(runs, batches, strict=True)]
        weights = list(torch.from_numpy(np.stack(each, axis=1)).to(table.device))
    losses = torch.zeros(len(runs), device=table.device)
    for step_rows, step_y, weight in zip(rows, y, weights, strict=True):
        x = gather(table, step_rows) if masked is None else masked.take(step_rows, live.seeds)
        loss = binary_cross_entropy_with_logits(
            live(x), step_y, weight, pos_weight=balance, reduction="none"
        ).mean(1)
        optimiser.zero_grad()
        loss.sum().backward()  # The loss of one replicate has no gradient for another's weights.
        optimiser.step()
        losses += loss.detach()
    for run, loss in zip(runs, losses.tolist(), strict=True):
        run.add_loss(loss)


class _ReadyTask:
    """A task, checked: its eligible rows, those to tune on where they are needed."""

    def __init__(self, place: int, task: Task, table: Tensor) -> None:
        self.place, self.name = place, task.name
        self.y = np.asarray(task.y, dtype=np.float32)
        if self.y.shape != (len(table),):
            self._fail(f"y has the shape {self.y.shape}, and x has {len(table)} rows")
        if not np.isin(self.y[~np.isnan(self.y)], (0, 1)).all():
            self._fail("y must be 0, 1 or NaN")
        self.train_rows, positive = self._eligible("train_rows", task.train_rows)
        self.odds_against = float((~positive).sum() / positive.sum())
        tuning_rows, self.tuning_positive = self._eligible("tuning_rows", task.tuning_rows)
        self.weight = self.tuning_weight = None
        if task.weight is not None:
            self.weight = np.asarray(task.weight, dtype=np.float32)
            self.tuning_weight = np.asarray(task.weight, dtype=np.float64)[tuning_rows]
            of = self.weight[self.train_rows].astype(np.float64)
            self.odds_against = float(of[~positive].sum() / of[positive].sum())
        self.tuning_rows = torch.from_numpy(tuning_rows).to(table.device)

    def weight_of(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """What rows, of any shape, stand for."""
        return np.ones(rows.shape, np.float32) if self.weight is None else self.weight[rows]

    def _eligible(
        self, kind: str, rows: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        at = np.asarray(rows, dtype=np.int64)
        if at.size and not 0 <= at.min() <= at.max() < len(self.y):
            self._fail(f"{kind} must be from 0 to {len(self.y) - 1}")
        at = at[~np.isnan(self.y[at])]
        positive = self.y[at] == 1
        if positive.all() or not positive.any():
            self._fail(
                f"of {len(at)} eligible {kind}, {positive.sum()} are positive; at least one "
                "positive and one negative are needed: leave the task out or give it more rows"
            )
        return at, positive

    def _fail(self, why: str) -> NoReturn:
        raise TrainingError(f"task {self.name!r}: {why}")


class _Run:
    """One replicate in training: the batches left of its epoch, and how it has done so far."""

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
        """The rows of the next steps, (n_steps, B)."""
        taken, self.batches = self.batches[:n_steps], self.batches[n_steps:]
        return taken

    @property
    def stopped(self) -> bool:
        epochs = len(self.history.tuning_auroc)
        late = epochs - self.history.best_epoch > self.budget.patience
        return epochs == self.budget.max_epochs or late

    @property
    def epochs_done(self) -> int:
        return self.budget.max_epochs if self.stopped else len(self.history.tuning_auroc)

    def add_loss(self, loss: float) -> None:
        self._must_be_finite("training loss", loss)
        self.loss += loss / self.n_steps

    def end_epoch(self, auroc: float) -> bool:
        """Note an epoch's numbers and begin the next; whether it was the best so far."""
        self._must_be_finite("tuning AUROC", auroc)
        history = self.history
        history.train_loss.append(self.loss)
        history.tuning_auroc.append(auroc)
        improved = auroc > max(history.tuning_auroc[:-1], default=-1.0)
        if improved:
            history.best_epoch = len(history.tuning_auroc) - 1
        self._begin_epoch()
        return improved

    def _must_be_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"task {self.task.name!r}, seed {self.seed}: the {name} became {value} in epoch "
                f"{len(self.history.tuning_auroc)}; try a learning_rate below "
                f"{self.budget.learning_rate:g}, or scale the features"
            )


def _groups(runs: list[_Run], width: int, device: torch.device) -> list[list[_Run]]:
    """Runs that train together: as many as `GROUP_BYTES` allow, in groups of nearly one size.

    More would fall out of the processor's cache and gain nothing (benchmarks/training.py).
    """
    limit = GROUP_BYTES.get(device.type, GROUP_BYTES["cuda"])
    n_groups = -(-len(runs) // max(limit // (4 * runs[0].budget.batch_size * width), 1))
    return [
        runs[start:end]
        for start, end in pairwise(len(runs) * i // n_groups for i in range(n_groups + 1))
    ]


def _auroc(
    score: NDArray[np.float32],
    positive: NDArray[np.bool_],
    weight: NDArray[np.float64] | None = None,
) -> float:
    """Share of (positive, negative) pairs that are ranked rightly, a tie counting one half.

    What `ehr_sn.evaluate.metrics.auroc` gives, in a tenth of its time: two sorts, no ranks.
    """
    if not np.isfinite(score).all():
        return math.nan
    if weight is not None:
        return float(auroc(positive, score, weight))
    low, high = np.sort(score[~positive]), np.sort(score[positive])
    won = np.searchsorted(low, high, "left").sum() + np.searchsorted(low, high, "right").sum()
    return float(won / (2 * len(low) * len(high)))


def _hold_freed_memory() -> None:
    """Let the allocator keep what a step frees, for the next step.

    glibc gives large freed blocks back to the kernel, and each step then waits for its activations
    to be mapped in again: up to twice the time. What it takes for large follows the largest block
    freed so far, up to 32 MiB. So one such block is freed here; never touched, it costs nothing.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
