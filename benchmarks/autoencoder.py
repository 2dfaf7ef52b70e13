"""Time the training of sparse autoencoders beside a plain PyTorch loop and the machine's limit.

The same networks, initial weights, batches and optimiser (fused Adam) in both: one seed after the
other by autograd, and all seeds at once by this project's closed-form gradient. The limit is the
time of the five matrix products a step cannot do without (two forward, three backward), in the
same shapes and nothing else. Repeats are interleaved and the fastest counts, so other work on the
machine disturbs little. The weights that both arrive at are compared as well.

    python benchmarks/autoencoder.py
"""

import argparse
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from ehr_sn.models.mlp import PRETRAINING, stream
from ehr_sn.models.sparse_autoencoder import (
    Objective,
    Optimiser,
    Weights,
    _initial,
    pretrain,
    sparsity_penalty,
)

OBJECTIVE = Objective(rho=0.1, beta=3.0, weight_decay=3e-3)
SHAPES = ((32, 64, 10_000), (155, 128, 10_000), (784, 196, 10_000))  # inputs, units, rows


def batched(x: Tensor, units: int, seeds: range, optimiser: Optimiser) -> Weights:
    """This project's training."""
    (weights,) = pretrain(x, x, [units], seeds=seeds, objective=OBJECTIVE, optimiser=optimiser)
    return weights


def plain(x: Tensor, units: int, seeds: range, optimiser: Optimiser) -> Weights:
    """One autoencoder after the other; its cost as one would write it, its gradient autograd's."""
    start = _initial(x, x.shape[1], units, seeds)
    found = []
    for r, seed in enumerate(seeds):
        one, two = nn.Linear(x.shape[1], units), nn.Linear(units, x.shape[1])
        for layer, weight in ((one, start.encode[r]), (two, start.decode[r])):
            layer.weight.data = weight.T.contiguous()
            layer.bias.data.zero_()
        adam = torch.optim.Adam(
            [*one.parameters(), *two.parameters()], optimiser.learning_rate, fused=True
        )
        rng = np.random.Generator(stream(seed, PRETRAINING))
        for _ in range(optimiser.epochs):
            size = optimiser.batch_size
            shape = (-(-len(x) // size), size)
            for rows in torch.from_numpy(np.resize(rng.permutation(len(x)), shape)):
                batch = x.index_select(0, rows)
                code = torch.sigmoid(one(batch))
                cost = (two(code) - batch).square().sum(1).div(2).mean()
                decay = one.weight.square().sum() + two.weight.square().sum()
                penalty, _ = sparsity_penalty(OBJECTIVE.rho, code.mean(0))
                cost = cost + OBJECTIVE.weight_decay / 2 * decay + OBJECTIVE.beta * penalty.sum()
                adam.zero_grad()
                cost.backward()
                adam.step()
        found.append([one.weight.T, one.bias[None], two.weight.T, two.bias[None]])
    return Weights(*(torch.stack(parts).detach() for parts in zip(*found, strict=True)))


def products(x: Tensor, units: int, seeds: range, optimiser: Optimiser) -> None:
    """The matrix products of as many steps, on whatever numbers."""
    n, size = x.shape[1], optimiser.batch_size
    batch, code = torch.rand(size, n), torch.rand(size, units)
    w1, w2 = torch.rand(n, units), torch.rand(units, n)
    outs = [torch.empty(s) for s in ((size, units), (size, n), (size, units), w1.shape, w2.shape)]
    for _ in range(len(seeds) * optimiser.epochs * -(-len(x) // size)):
        torch.mm(batch, w1, out=outs[0])
        torch.mm(code, w2, out=outs[1])
        torch.mm(batch, w2.T, out=outs[2])
        torch.mm(batch.T, code, out=outs[3])
        torch.mm(code.T, batch, out=outs[4])


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--threads", type=int, default=1, help="PyTorch's threads (default: 1, as cells train)")
    add("--seeds", type=int, nargs="+", default=[1, 5], help="how many at once (default: 1 5)")
    add("--batch-size", type=int, default=256, help="(default: 256)")
    add("--epochs", type=int, default=1, help="(default: 1)")
    add("--repeats", type=int, default=5, help="the fastest of so many counts (default: 5)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    optimiser = Optimiser(epochs=args.epochs, batch_size=args.batch_size)
    print(f"{args.threads} thread(s), PyTorch {torch.__version__}; thousand rows a second\n")
    print("inputs units seeds   batched   plain   limit   batched/plain   of the limit   differ by")
    for n, units, rows in SHAPES:
        x = torch.rand(rows, n, generator=torch.Generator().manual_seed(0))
        for n_seeds in args.seeds:
            seeds = range(n_seeds)
            times = np.empty((args.repeats, 3))
            for repeat in range(args.repeats):
                ends = []
                for i, way in enumerate((batched, plain, products)):
                    started = perf_counter()
                    ends.append(way(x, units, seeds, optimiser))
                    times[repeat, i] = perf_counter() - started
            differ = max(float((a - b).abs().max()) for a, b in zip(*ends[:2], strict=True))
            assert differ < 1e-2, f"batched and plain differ by {differ}"
            fast, slow, limit = args.epochs * n_seeds * rows / 1000 / times.min(axis=0)
            print(
                f"{n:6} {units:5} {n_seeds:5} {fast:9.0f} {slow:7.0f} {limit:7.0f} "
                f"{fast / slow:14.1f}× {fast / limit:13.0%} {differ:12.0e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
