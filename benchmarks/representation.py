"""Does a representation learned from all rows help a classifier, and the more so with few labels?

The same network behind nothing, principal components, a sparse autoencoder and a stack of two, with
a share of the training labels each; what is learned without labels has all training rows. AUROC on
held-out rows: mean ± sd over seeds of the mean over splits, and the paired difference of the
seed-averaged prediction from the network alone (DeLong over splits, p by Holm over diseases).
Cells are kept in the data folder, so that a run goes on where another ended.

    python benchmarks/representation.py configs/nafld.yaml
    python benchmarks/representation.py configs/nafld.yaml --method zero --shares 0.05 1
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ehr_sn.config import ArchitectureConfig, Config, load_config
from ehr_sn.evaluate.results import Result, evaluate
from ehr_sn.ingest.store import ingest
from ehr_sn.models.learning_curve import FewerLabels
from ehr_sn.models.train import Cell, HeldOut, read_cell, train_cell

SPARSE = {"rho": 0.2, "beta": 0.1, "epochs": 25}
ONE = SPARSE | {"kind": "sparse_autoencoder", "units": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "none": {},
    "none, two hidden layers": {"hidden": (64, 64)},
    "pca": {"representation": {"kind": "pca", "units": 32}},
    "sparse_autoencoder": {"representation": ONE},
    "sparse_autoencoder, frozen": {"representation": ONE | {"fine_tune": False}},
    "stacked": {"representation": SPARSE | {"kind": "stacked", "units": (64, 64)}},
}
"""One hidden layer of 64 each; the second tells what is gained by mere depth."""


def comparison(base: Config, method: str, scaler: str, seeds: int) -> Config:
    """The configuration with all of them."""
    architectures = {
        name: ArchitectureConfig.model_validate(given) for name, given in ARCHITECTURES.items()
    }
    changes = {"methods": {scaler: (method,)}, "architectures": architectures, "seeds": seeds}
    return base.model_copy(update={"train": base.train.model_copy(update=changes)})


def held_out(
    config: Config, store: Path, name: str, share: float, splits: int
) -> dict[str, list[HeldOut]]:
    """Disease → its held-out predictions, one entry a split."""
    ((scaler, (method,)),) = config.train.methods.items()
    cells = []
    for split in range(splits):
        fewer = FewerLabels(store, share, split)
        path = train_cell(config, fewer, Cell(method, scaler, name, split))
        cells.append(read_cell(path, fewer))
    return {disease: [cell.held_out[disease] for cell in cells] for disease in cells[0].held_out}


def report(results: Mapping[str, list[Result]]) -> None:
    """A row a representation, a column a disease; ▲ and ▼ mark what is established."""
    first = next(iter(results.values()))
    print("| | mean | " + " | ".join(r.disease.replace("_", " ") for r in first) + " |")
    print("|---" * (len(first) + 2) + "|")
    for name, of_name in results.items():
        cells = []
        for r in of_name:
            metrics = r.as_metrics()
            cell = f"{metrics['test_auroc']:.3f} ± {metrics['test_auroc_std']:.3f}"
            if r.versus_reference is not None:
                d = r.versus_reference
                cell += f" ({d.difference:+.3f}, {d.ci_low:+.3f} to {d.ci_high:+.3f})"
                if r.p_holm is not None and r.p_holm < 0.05:
                    cell += " ▲" if d.difference > 0 else " ▼"
            cells.append(cell)
        mean = np.mean([r.as_metrics()["test_auroc"] for r in of_name])
        print(f"| `{name}` | {mean:.3f} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", help="such as configs/nafld.yaml")
    add("--method", default="zero+mask", help="(default: zero+mask)")
    add("--scaler", default="standard", help="(default: standard)")
    add("--shares", type=float, nargs="+", default=[0.05, 0.2, 1.0], help="of training labels")
    add("--splits", type=int, default=3, help="(default: 3)")
    add("--seeds", type=int, default=5, help="(default: 5)")
    args = parser.parse_args()
    config = comparison(load_config(args.config), args.method, args.scaler, args.seeds)
    store = ingest(config)
    for share in args.shares:
        results: dict[str, list[Result]] = {}
        reference = None
        for name in ARCHITECTURES:
            started = perf_counter()
            found = held_out(config, store, name, share, args.splits)
            results[name] = evaluate(found, reference)
            reference = reference or found
            print(f"  {share:.0%} {name}: {perf_counter() - started:.0f} s", flush=True)
        print(f"\n{share:.0%} of the training labels, {args.method}, {args.splits} splits:\n")
        report(results)
        print()


if __name__ == "__main__":
    main()
