"""The recipe and boosted trees, averaged: are they better together?

The mean of two probabilities has nothing to choose, so nothing is fitted. AUROC of the
seed-averaged prediction on tuning rows (on which both stopped: to choose by) and on held-out rows,
mean over splits; then the paired difference of the mean from each of the two on held-out rows
(DeLong; ▲ ▼ where Holm's p over diseases is below 0.05). Cells that are not in the data folder are
trained.

    python benchmarks/blend.py configs/nafld.yaml
    python benchmarks/blend.py configs/nhanes.yaml --data DIR
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ehr_sn.config import load_config
from ehr_sn.evaluate.results import Result, evaluate
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models.predict import read_tuning
from ehr_sn.models.train import NOTHING, Cell, HeldOut, read_cell, train_cell

RECIPE = ("piecewise_linear+mask", "quantile", "recipe")
TREES = (NOTHING, NOTHING, "hist_gradient_boosting")
Rows = dict[str, list[HeldOut]]


def mean_of(one: Rows, other: Rows) -> Rows:
    """Disease → splits' rows, predicted by the mean of both."""
    return {
        disease: [
            HeldOut(a.y, (a.probability + b.probability) / 2)
            for a, b in zip(one[disease], other[disease], strict=True)
        ]
        for disease in one
    }


def told(result: Result) -> str:
    """A difference, its interval and what it is worth."""
    d = result.versus_reference
    if d is None:
        return f"{result.ensemble.value:.3f}"
    sign = "" if (result.p_holm or 0) >= 0.05 else "▲" if d.difference > 0 else "▼"
    return f"{d.difference:+.3f} ({d.ci_low:+.3f} to {d.ci_high:+.3f}) {sign}".rstrip()


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="such as configs/nafld.yaml")
    parser.add_argument("--data", type=Path, help="data_root, as for ehr-sn")
    args = parser.parse_args()
    config = load_config(args.config)
    if args.data:
        config = config.model_copy(update={"data_root": args.data.absolute()})
    store = Store(ingest(config))
    splits = range(config.splits.repeats)

    def rows(comparison: tuple[str, str, str], read: Callable[[Cell], dict[str, HeldOut]]) -> Rows:
        cells = [Cell(*comparison, split) for split in splits]
        for cell in cells:
            train_cell(config, store, cell)
        each = [read(cell) for cell in cells]
        return {disease: [one[disease] for one in each] for disease in store.diseases}

    readers: dict[str, Callable[[Cell], dict[str, HeldOut]]] = {
        "tuning": lambda cell: read_tuning(config, store, cell),
        "held out": lambda cell: read_cell(train_cell(config, store, cell), store).held_out,
    }
    print(f"| {config.dataset} | mean | {' | '.join(store.diseases)} |")
    print("|---" * (len(store.diseases) + 2) + "|")
    for where, read in readers.items():
        recipe, trees = rows(RECIPE, read), rows(TREES, read)
        both = mean_of(recipe, trees)
        for name, found in (("recipe", recipe), ("trees", trees), ("mean of both", both)):
            results = evaluate(found)
            mean = np.mean([r.ensemble.value for r in results])
            print(f"| {name}, {where} | {mean:.4f} | {' | '.join(map(told, results))} |")
    for name, reference in (("recipe", recipe), ("trees", trees)):
        results = evaluate(both, reference)
        mean = np.mean([r.versus_reference.difference for r in results if r.versus_reference])
        print(f"| mean of both − {name} | {mean:+.4f} | {' | '.join(map(told, results))} |")


if __name__ == "__main__":
    main()
