"""Does what a configuration calls its default hold on splits that no choice has seen?

Three models: each blend of the configuration, its members, and gradient boosting tuned for each
split, on subjects dealt anew. Seed-averaged AUROC on held-out rows, mean over splits, and the
paired difference from the tuned trees (DeLong; ▲ ▼ where Holm's p over diseases is below 0.05): of
the first splits, of all, and of the held-out rows which the configuration's own splits, by which
its settings were chosen, only trained on. Nothing is chosen here but the trees' settings, on each
split's tuning rows. What is done is kept in the data folder.

    python benchmarks/confirm.py configs/nafld.yaml
    python benchmarks/confirm.py configs/nhanes.yaml --data DIR --splits 5 --trials 10
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
from blend import called, loaded, told
from numpy.typing import NDArray

from ehr_sn.config import Config, Tune
from ehr_sn.evaluate.results import evaluate
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models.train import NOTHING, Cell, HeldOut, members_of, read_cell, train_cell
from ehr_sn.models.tune import tune

TREES = "hist_gradient_boosting"
FIRST = 3  # splits, as many as the configurations have
Splits = dict[str, list[HeldOut]]
"""Disease → its held-out rows, an entry a split."""


def dealt_anew(config: Config, seed: int, splits: int) -> Config:
    """The configuration with other splits, whose keys are none of its own."""
    own = config.splits
    keys = range(own.seed, own.seed + own.repeats)
    if set(keys) & set(range(seed, seed + splits)):
        raise SystemExit(f"--seed {seed}: its own splits have {keys.start} to {keys.stop - 1}")
    anew = own.model_copy(update={"seed": seed, "repeats": splits})
    return config.model_copy(update={"splits": anew})


def train(config: Config, store: Store, cell: Cell) -> None:
    """Tune a cell, if its configuration says so, and train it."""
    if config.tune.trials:
        tune(config, store, cell)
    train_cell(config, store, cell)


def only_trained_on(config: Config, store: Store) -> NDArray[np.bool_]:
    """Of another dealing's rows, those that all of the configuration's own splits trained on."""
    own = Store(ingest(config))
    if not np.array_equal(own.labels(), store.labels(), equal_nan=True):
        raise SystemExit("the two dealings have other rows")
    return (own.splits() == "train").all(axis=1)


def show(found: dict[str, Splits], reference: str) -> None:
    """Rows of the table: each model's AUROC, and the differences from the reference."""
    for name, splits in found.items():
        results = evaluate(splits)
        mean = np.mean([result.ensemble.value for result in results])
        print(f"| {name} | {mean:.4f} | {' | '.join(told(result, 4) for result in results)} | |")
    for name in found:
        if name != reference:
            results = evaluate(found[name], found[reference])
            d = [r.versus_reference.difference for r in results if r.versus_reference]
            ahead = f"{sum(x >= 0 for x in d)} of {len(d)}"
            cells = " | ".join(told(result, 4) for result in results)
            print(f"| {name} less {reference} | {np.mean(d):+.4f} | {cells} | {ahead} |")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="such as configs/nafld.yaml; it has to have `blends`")
    parser.add_argument("--data", type=Path, help="data_root, as for ehr-sn")
    parser.add_argument("--seed", type=int, default=100, help="of the splits (%(default)s)")
    parser.add_argument("--splits", type=int, default=10, help="how many (%(default)s)")
    parser.add_argument("--trials", type=int, default=20, help="to tune trees by (%(default)s)")
    args = parser.parse_args()
    config = loaded(args.config, args.data)
    anew = dealt_anew(config, args.seed, args.splits)
    store = Store(ingest(anew))
    blends = [Cell(NOTHING, NOTHING, blend, 0) for blend in config.train.blends]
    members = [member for blend in blends for member in members_of(config, blend)]
    reference = f"trees, {args.trials} trials"
    models = {called(cell): (anew, cell) for cell in (*members, *blends)}
    searched = anew.model_copy(update={"tune": Tune(trials=args.trials)})
    models[reference] = searched, Cell(NOTHING, NOTHING, TREES, 0)
    splits = range(args.splits)
    alone = [model for model in models.values() if not members_of(*model)]
    side_by_side([(which, store, replace(cell, split=s)) for s in splits for which, cell in alone])
    found: dict[str, Splits] = {}
    for name, (which, cell) in models.items():
        paths = [train_cell(which, store, replace(cell, split=split)) for split in splits]
        each = [read_cell(path, store).held_out for path in paths]
        found[name] = {disease: [one[disease] for one in each] for disease in store.diseases}
    unseen = only_trained_on(config, store)
    print(f"| {config.dataset} | mean | {' | '.join(store.diseases)} | ahead |")
    print("|---" * (len(store.diseases) + 3) + "|")
    head = "| **{}** " + "| " * (len(store.diseases) + 2) + "|"
    print(head.format(f"the first {FIRST} splits"))
    show({name: {k: v[:FIRST] for k, v in one.items()} for name, one in found.items()}, reference)
    print(head.format(f"all {args.splits} splits"))
    show(found, reference)
    print(head.format(f"of these the {unseen.mean():.0%} of rows that were only trained on"))
    show({name: _among(unseen, one, store) for name, one in found.items()}, reference)


def side_by_side(cells: Sequence[tuple[Config, Store, Cell]]) -> None:
    """Train cells, a core each, and say on stderr how far that is."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        futures = [pool.submit(train, *cell) for cell in cells]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            print(f"{done} of {len(cells)} cells trained", file=sys.stderr, flush=True)


def _among(rows: NDArray[np.bool_], found: Splits, store: Store) -> Splits:
    labels, dealt = store.labels(), store.splits()
    among: Splits = {}
    for i, disease in enumerate(store.diseases):
        among[disease] = []
        for split, held_out in enumerate(found[disease]):
            eligible = (dealt[:, split] == "held_out") & ~np.isnan(labels[:, i])
            kept = rows[eligible]
            whose = held_out.subject, held_out.weight
            among[disease].append(
                HeldOut(
                    held_out.y[kept],
                    held_out.probability[:, kept],
                    *(None if part is None else part[kept] for part in whose),
                )
            )
    return among


if __name__ == "__main__":
    main()
