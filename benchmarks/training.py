"""Time batched training against a plain PyTorch loop and a DataLoader loop, side by side.

The same networks, initial weights, batches and optimiser (fused AdamW) in all three, no evaluation
and no early stopping, on simulated tables of NAFLD's size: five tasks, one or five seeds each.
Repeats are interleaved and the fastest counts, so other work on the machine disturbs little. The
weights that batched and plain training arrive at are compared as well.

The last lines time a typical job of this project with all it takes (evaluation, early stopping).
"""

import argparse
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

from ehr_sn.models.fit import (
    Architecture,
    Budget,
    Task,
    _adam,
    _groups,
    _hold_freed_memory,
    _keep,
    _ReadyTask,
    _Run,
    _take_steps,
    fit,
)
from ehr_sn.models.mlp import StackedMLP

N_ROWS, N_FEATURES, N_TASKS = 17_549, 45, 5
Networks = list[list[Tensor]]


def simulate(seed: int = 0) -> tuple[np.ndarray, list[Task]]:
    """A table and five diseases, for each of which other rows are eligible."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((N_ROWS, N_FEATURES)).astype(np.float32)
    factors = np.tanh(x @ rng.standard_normal((N_FEATURES, 8)) / 3)
    split = rng.choice(3, N_ROWS, p=[0.6, 0.2, 0.2])
    tasks = []
    for i, eligible in enumerate([0.95, 0.5, 0.7, 0.9, 0.6]):
        risk = factors @ rng.standard_normal(8) - 2.5
        y = (rng.random(N_ROWS) < 1 / (1 + np.exp(-risk))).astype(np.float32)
        y[rng.random(N_ROWS) > eligible] = np.nan
        tasks.append(Task(f"task {i}", y, np.flatnonzero(split == 0), np.flatnonzero(split == 1)))
    return x, tasks


class Contest:
    """One setting, that each way of training starts from afresh and brings to the same end."""

    def __init__(
        self, x: Tensor, tasks: Sequence[Task], n_replicates: int, hidden: int, budget: Budget
    ) -> None:
        self.x, self.hidden, self.budget = x, hidden, budget
        self.tasks = [_ReadyTask(i, task, x) for i, task in enumerate(tasks)]
        self.seeds = range(n_replicates // N_TASKS)
        self.y = torch.from_numpy(np.stack([task.y for task in self.tasks])).to(x.device)

    def _start(self) -> tuple[list[_Run], StackedMLP]:
        pairs = [(task, seed) for task in self.tasks for seed in self.seeds]
        runs = [_Run(i, task, seed, self.budget) for i, (task, seed) in enumerate(pairs)]
        seeds = [run.seed for run in runs]
        return runs, StackedMLP(N_FEATURES, (self.hidden,), seeds=seeds).to(self.x.device)

    def batched(self) -> Networks:
        """This project's training loop, less its evaluation."""
        runs, start = self._start()
        networks: Networks = [[] for _ in runs]
        for group in _groups(runs, max(N_FEATURES, self.hidden), self.x.device):
            model = start.select([run.place for run in group]).train()
            optimiser = _adam(model, self.budget)
            epochs_left = dict.fromkeys(group, self.budget.max_epochs)
            while group:
                _take_steps(group, model, optimiser, self.x)
                for i, run in enumerate(group):
                    if not len(run.batches):
                        epochs_left[run] -= 1
                        run._begin_epoch()
                        networks[run.place] = [p[i].detach().clone() for p in model.parameters()]
                going = [i for i, run in enumerate(group) if epochs_left[run]]
                if len(going) < len(group):
                    group = [group[i] for i in going]
                    _keep(model, optimiser, going)
        return networks

    def plain(self) -> Networks:
        """One replicate after the other; tensors in memory, batches by index."""
        runs, start = self._start()
        networks = []
        for run in runs:
            model = _plain(start, run.place)
            optimiser = self._optimiser(model)
            y = self.y[run.task.place]
            for epoch in range(self.budget.max_epochs):
                if epoch:
                    run._begin_epoch()
                for rows in torch.from_numpy(run.batches).to(self.x.device):
                    self._step(model, optimiser, self.x.index_select(0, rows), y[rows])
            networks.append(_weights(model))
        return networks

    def loader(self) -> Networks:
        """One replicate after the other; batches by a DataLoader, as tutorials have it."""
        runs, start = self._start()
        for run in runs:
            model = _plain(start, run.place)
            optimiser = self._optimiser(model)
            rows = torch.from_numpy(run.task.train_rows).to(self.x.device)
            data = TensorDataset(self.x[rows], self.y[run.task.place][rows])
            batches = DataLoader(data, batch_size=self.budget.batch_size, shuffle=True)
            for _ in range(self.budget.max_epochs):
                for x, y in batches:
                    self._step(model, optimiser, x, y)
        return []

    def _step(self, model: nn.Module, optimiser: torch.optim.AdamW, x: Tensor, y: Tensor) -> None:
        loss = binary_cross_entropy_with_logits(model(x).squeeze(1), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def _optimiser(self, model: nn.Module) -> torch.optim.AdamW:
        rate = self.budget.learning_rate
        return torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0, fused=True)


def _plain(start: StackedMLP, place: int) -> nn.Sequential:
    """The replicate at `place` as an ordinary network."""
    stacked = {name: tensor.detach()[place] for name, tensor in start.tensors().items()}
    n_in, n_out = stacked["layers.0.weight"].shape
    model = nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU(), nn.Linear(n_out, 1)).to(
        start.output.weight.device
    )
    names = ["layers.0.weight", "layers.0.bias", "output.weight", "output.bias"]
    for parameter, name in zip(model.parameters(), names, strict=True):
        parameter.data.copy_(stacked[name].T.reshape(parameter.shape))
    return model


def _weights(model: nn.Module) -> list[Tensor]:
    """In the order and shapes of a StackedMLP's replicate."""
    return [p.detach().T if p.ndim == 2 else p.detach()[None] for p in model.parameters()]


def timed(train: Callable[[], Networks]) -> tuple[float, Networks]:
    """Seconds, and what was trained."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = perf_counter()
    networks = train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - started, networks


def compare(args: argparse.Namespace, x: np.ndarray, tasks: Sequence[Task]) -> None:
    """Print the table."""
    table = torch.from_numpy(x).to(args.device)
    print(f"{'R':>3} {'batch':>5}   {'batched':>8} {'plain':>8} {'loader':>8}   ", end="")
    print(f"{'plain/batched':>13} {'loader/batched':>14}   weights differ by")
    for batch_size in args.batch_size:
        for n_replicates in args.replicates:
            budget = Budget(batch_size=batch_size, max_epochs=args.epochs)
            contest = Contest(table, tasks, n_replicates, args.hidden, budget)
            ways = [contest.batched, contest.plain, contest.loader]
            times = np.empty((args.repeats, len(ways)))
            for repeat in range(args.repeats):
                ends = [timed(way) for way in ways]
                times[repeat] = [seconds for seconds, _ in ends]
            (_, batched), (_, plain), _ = ends
            pairs = [pair for b, p in zip(batched, plain, strict=True) for pair in zip(b, p)]  # noqa: B905
            difference = max(float((b - p).abs().max()) for b, p in pairs)
            assert difference < args.tolerance, f"batched and plain differ by {difference}"
            fast, slow, slowest = times.min(axis=0)
            print(
                f"{n_replicates:3} {batch_size:5}   {fast:7.3f}s {slow:7.3f}s {slowest:7.3f}s   "
                f"{slow / fast:12.1f}× {slowest / fast:13.1f}×   {difference:.1e}",
                flush=True,
            )


def typical(args: argparse.Namespace, x: np.ndarray, tasks: Sequence[Task]) -> None:
    """Print how long a whole job takes."""
    print(f"\nA whole fit: {N_TASKS} tasks × 5 seeds, hidden {args.hidden}, batch 256, patience 10")
    for dropout in (0.0, 0.5):
        seconds = []
        for _ in range(min(args.repeats, 3)):
            started = perf_counter()
            fitted = fit(
                x, tasks, range(5), Architecture((args.hidden,), dropout), device=args.device
            )
            seconds.append(perf_counter() - started)
        epochs = np.mean([len(history.tuning_auroc) for history in fitted.history])
        print(
            f"dropout {dropout}: {min(seconds):.2f} s, {epochs:.0f} epochs on average", flush=True
        )


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", help="as PyTorch names it, such as cuda (default: cpu)")
    add(
        "--threads",
        type=int,
        default=1,
        help="PyTorch's threads (default: 1, as the pipeline trains, one job a core; with more, "
        "any other work on the machine slows small networks down many times)",
    )
    add("--replicates", type=int, nargs="+", default=[5, 25], help="multiples of 5 (default: 5 25)")
    add("--batch-size", type=int, nargs="+", default=[64, 256, 1024], help="(default: 64 256 1024)")
    add("--hidden", type=int, default=64, help="hidden units (default: 64)")
    add("--epochs", type=int, default=2, help="epochs each replicate trains (default: 2)")
    add("--repeats", type=int, default=5, help="the fastest of so many counts (default: 5)")
    add("--tolerance", type=float, default=1e-3, help="how far weights may differ (default: 1e-3)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.device}, {args.threads} thread(s), PyTorch {torch.__version__}; ", end="")
    print(f"{args.epochs} epochs of {N_FEATURES} features, hidden {args.hidden}\n")
    _hold_freed_memory()
    x, tasks = simulate()
    compare(args, x, tasks)
    typical(args, x, tasks)


if __name__ == "__main__":
    main()
