"""Time AutoRec of a generated matrix of MovieLens 1M's shape against plain matrix products.

Prints how many floating-point operations a second training does (the five products of a step:
encoder and decoder, the gradients of both weights and of the hidden layer; nothing else is counted)
as a share of what matrix products of the same shapes do alone, and the peak memory of the process.
Seconds are processor time, so that other work on the machine disturbs little.
"""

import argparse
import resource
from time import process_time

import torch

from ehr_sn.studies.autoencoder import FACTORS, Autoencoder, Budget, Network, Rows, epochs
from ehr_sn.studies.ratings import simulate_ratings, split

GIGA = 1e9


def product_rate(batch: int, n_columns: int, hidden: int, repeats: int = 20) -> float:
    """Of the encoder's and decoder's products alone, the faster, in operations a second."""
    x, v = torch.randn(batch, n_columns), torch.randn(n_columns, hidden)
    h, w = torch.randn(batch, hidden), torch.randn(hidden, n_columns)
    best = 0.0
    for a, b in ((x, v), (h, w)):
        for _ in range(repeats):
            started = process_time()
            torch.mm(a, b)
            best = max(best, 2 * batch * n_columns * hidden / (process_time() - started))
    return best


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--users", type=int, default=6040)
    add("--items", type=int, default=3706)
    add("--ratings", type=int, default=1_000_000)
    add("--hidden", type=int, default=500, help="(default: 500, as published)")
    add("--batch-size", type=int, default=128, help="rows a step (default: 128)")
    add("--epochs", type=int, default=3, help="the fastest counts (default: 3)")
    add("--threads", type=int, default=1, help="PyTorch's (default: 1, as cells train)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratings = simulate_ratings(args.users, args.items, args.ratings)
    parts = split(len(ratings), held_out=0.1, tuning=0.05, seed=0)
    print(f"{args.users:,} users × {args.items:,} items, {len(ratings):,} ratings, ", end="")
    print(f"{args.hidden} hidden, {args.threads} thread(s), PyTorch {torch.__version__}\n")
    for axis in ("item", "user"):
        rows = Rows(ratings, parts.train, axis)
        size = min(args.batch_size, len(rows.trained))
        rate = product_rate(size, rows.shape[1], args.hidden)
        for variant in ("zero", "SN"):
            network = Network(axis, (args.hidden,))
            model = Autoencoder(rows.shape[1], network, mean=rows.mean, seed=0)
            budget = Budget(1e-3, 1e-4, args.batch_size, max_epochs=args.epochs)
            seconds, started = [], process_time()
            for _ in epochs(model, rows, budget, FACTORS[variant], seed=0):
                seconds.append(process_time() - started)
                started = process_time()
            done = 5 * 2 * len(rows.trained) * rows.shape[1] * args.hidden / min(seconds)
            print(f"{axis:4} {variant:4} {min(seconds):6.2f} s an epoch,", end=" ")
            print(f"{done / rate:4.0%} of the rate of a product ({rate / GIGA:.0f} Gflop/s)")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
