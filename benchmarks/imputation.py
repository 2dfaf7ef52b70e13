"""How well do imputers recover observed entries that were hidden from them?

Fitted on the training rows of a split as they are. Of its held-out rows, a share of the observed
entries is removed, singly (`mcar`) or by whole panels; the figure is the root mean squared error on
those alone, in standard deviations of the feature. Beside it the time to fit, and to fill a row.

    python benchmarks/imputation.py configs/nafld.yaml
"""

import argparse
from time import perf_counter

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from ehr_sn.config import load_config
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.missing import make_method
from ehr_sn.missing.amputate import Amputation

METHODS = ("mean", "knn", "mice", "softimpute", "gain", "sparse_autoencoder")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", help="such as configs/nafld.yaml")
    add("--methods", nargs="+", default=METHODS, help=f"(default: {' '.join(METHODS)})")
    add("--mechanisms", nargs="+", default=["mcar", "panel"], help="(default: mcar panel)")
    add("--rate", type=float, default=0.3, help="share of entries removed (default: 0.3)")
    add("--splits", type=int, default=3, help="(default: 3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)
    store = Store(ingest(load_config(args.config)))
    values = store.values()
    print("| | " + " | ".join(args.mechanisms) + " | seconds to fit | µs a row |")
    print("|---" * (len(args.mechanisms) + 3) + "|")
    for name in args.methods:
        errors, seconds, filling = [], [], []
        for dealt in store.splits()[:, : args.splits].T:
            train, held_out = values[dealt == "train"], values[dealt == "held_out"]
            started = perf_counter()
            method = make_method(name, "standard").fit(train)
            seconds.append(perf_counter() - started)
            scaled = method[:-1].transform(held_out)
            for mechanism in args.mechanisms:
                remove = Amputation(mechanism, args.rate, seed=1).fit(train, store.measurements)
                gappy = remove(held_out)
                hidden = np.isnan(gappy) & ~np.isnan(scaled)
                started = perf_counter()
                filled = method.transform(gappy)
                filling.append((perf_counter() - started) / len(gappy))
                error = (filled - scaled)[hidden]
                errors.append(np.sqrt(np.square(error).mean()))
        table = np.reshape(errors, (args.splits, -1))
        sd = table.std(axis=0, ddof=min(args.splits - 1, 1))
        cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(table.mean(axis=0), sd, strict=True)]
        times = f"{np.mean(seconds):.1f} | {1e6 * np.mean(filling):.0f}"
        print(f"| `{name}` | {' | '.join(cells)} | {times} |", flush=True)


if __name__ == "__main__":
    main()
