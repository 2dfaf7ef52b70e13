"""Each blend of a configuration beside its members: are they better together?

The mean of probabilities has nothing to choose, so nothing is fitted. AUROC of the seed-averaged
prediction on tuning rows (on which all stopped: to choose by) and on held-out rows, mean over
splits; then the paired differences of held-out AUROC, the blend from each member and the members
from one another (DeLong; ▲ ▼ where Holm's p over diseases is below 0.05). Cells that are not in the
data folder are trained; with `tune` in the configuration, by the trials of an earlier run. With
`--against` all are compared with another configuration's baselines, such as tuned ones, as well.

    python benchmarks/blend.py configs/nafld.yaml
    python benchmarks/blend.py configs/nhanes.yaml --data DIR --against tuned.yaml
"""

import argparse
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path

import numpy as np

from ehr_sn.config import Config, load_config
from ehr_sn.evaluate.results import Result, evaluate, name_of
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models.predict import read_tuning
from ehr_sn.models.train import NOTHING, Cell, HeldOut, members_of, read_cell, train_cell


def told(result: Result, digits: int = 3) -> str:
    """A difference, its interval and what it is worth; or an AUROC."""
    d = result.versus_reference
    if d is None:
        return f"{result.ensemble.value:.{digits}f}"
    sign = "" if (result.p_holm or 0) >= 0.05 else "▲" if d.difference > 0 else "▼"
    return f"{d.difference:+.{digits}f} ({d.ci_low:+.3f} to {d.ci_high:+.3f}) {sign}".rstrip()


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="such as configs/nafld.yaml; it has to have `blends`")
    parser.add_argument("--data", type=Path, help="data_root, as for ehr-sn")
    parser.add_argument("--against", metavar="CONFIG", help="another one of the same cohort")
    args = parser.parse_args()
    config = loaded(args.config, args.data)
    store = Store(ingest(config))
    splits = range(config.splits.repeats)

    def on_tuning(cell: Cell) -> dict[str, HeldOut]:
        return read_tuning(config, store, cell)

    def on_held_out(cell: Cell) -> dict[str, HeldOut]:
        return read_cell(train_cell(config, store, cell), store).held_out

    def rows(model: Cell, read: Callable[[Cell], dict[str, HeldOut]]) -> dict[str, list[HeldOut]]:
        cells = [Cell(model.method, model.scaler, model.architecture, split) for split in splits]
        each = [read(cell) for cell in cells]
        return {disease: [one[disease] for one in each] for disease in store.diseases}

    print(f"| {config.dataset} | mean | {' | '.join(store.diseases)} |")
    print("|---" * (len(store.diseases) + 2) + "|")
    others: dict[str, dict[str, list[HeldOut]]] = {}
    if args.against:
        other = loaded(args.against, args.data)
        if Store(ingest(other)).fingerprint != store.fingerprint:
            parser.error(f"{args.against} makes another store")
        for name in other.train.baselines:
            cell = Cell(NOTHING, NOTHING, name, 0)
            others[f"{name} of {Path(args.against).name}"] = rows(
                cell, lambda one: read_cell(train_cell(other, store, one), store).held_out
            )
    for blend in config.train.blends:
        whole = Cell(NOTHING, NOTHING, blend, 0)
        models = [whole, *members_of(config, whole)]
        found = {called(model): rows(model, on_held_out) for model in models}  # trains them
        tuning = {called(model): rows(model, on_tuning) for model in models}
        for where, of_all in (("tuning", tuning), ("held out", found | others)):
            for name, predicted in of_all.items():
                results = evaluate(predicted)
                mean = np.mean([result.ensemble.value for result in results])
                print(f"| {name}, {where} | {mean:.4f} | {' | '.join(map(told, results))} |")
        for one, reference in [*combinations(found, 2), *product(found, others)]:
            results = evaluate(found[one], (found | others)[reference])
            mean = np.mean([r.versus_reference.difference for r in results if r.versus_reference])
            print(f"| {one} − {reference} | {mean:+.4f} | {' | '.join(map(told, results))} |")


def loaded(path: str, data: Path | None) -> Config:
    """The configuration, with its tables in `data` if that is given."""
    config = load_config(path)
    return config.model_copy(update={"data_root": data.absolute()}) if data else config


def called(model: Cell) -> str:
    """A cell's model, as figures call it."""
    return name_of(model.method, model.scaler, model.architecture)


if __name__ == "__main__":
    main()
