"""What a further loss of entries does to trained models, on held-out rows of every split.

Entries are removed from rows that no model has seen: at random, by whole panels, by their own value
(the higher, the likelier), each from the features that training rows ever lack (age and sex are
always known), and at random from all features. For each model the change of the AUROC of the
seed-averaged prediction, mean over diseases ± sd over splits, and the largest relative change of a
disease's mean prediction (mean over splits). The configuration's blends are judged, too. Cells that
are not in the data folder are trained.

    python benchmarks/robustness.py configs/nafld.yaml
    python benchmarks/robustness.py configs/nhanes.yaml --data DIR --rate 0.25
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ehr_sn.config import load_config
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.missing.amputate import Amputation, Mechanism
from ehr_sn.models.predict import Predict, load_predictor
from ehr_sn.models.train import NOTHING, Cell, train_cell

MODELS = [
    ("zero", "standard", "mlp_dropout"),
    ("mean", "standard", "mlp_dropout"),
    ("sparsity_normalization", "standard", "mlp_dropout"),
    ("zero+mask", "standard", "mlp_dropout"),
    ("zero+mask", "standard", "recipe"),
    ("piecewise_linear+mask", "quantile", "mlp_dropout"),
    ("piecewise_linear+mask", "quantile", "recipe"),
    (NOTHING, NOTHING, "hist_gradient_boosting"),
    (NOTHING, NOTHING, "boosting+masked_copies"),
]
LOSSES: dict[str, tuple[Mechanism, bool]] = {
    "at random": ("mcar", True),
    "whole panels": ("panel", True),
    "by their own value": ("mnar", True),
    "at random, of all features": ("mcar", False),
}
"""Mechanism, and whether features that training rows never lack are spared."""


def amputated(store: Store, split: int, rate: float) -> dict[str, NDArray[np.float32]]:
    """The split's held-out rows, whole and after each loss."""
    values, dealt = store.values(), store.splits()[:, split]
    train, rows = values[dealt == "train"], np.flatnonzero(dealt == "held_out")
    complete = np.flatnonzero(~np.isnan(train).any(axis=0))
    tables = {"whole": values[rows]}
    for name, (mechanism, spare) in LOSSES.items():
        lose = Amputation(mechanism, rate, seed=split, spare=complete if spare else ())
        tables[name] = lose.fit(train, store.measurements)(values[rows], rows).astype(np.float32)
    return tables


def judged(
    predict: Predict, tables: dict[str, NDArray[np.float32]], y: NDArray[np.float32]
) -> NDArray[np.float64]:
    """(losses, diseases, 2): AUROC and mean prediction of the eligible rows."""
    eligible = ~np.isnan(y)
    return np.array(
        [
            [
                (auroc(truth[known] == 1, p[known]), p[known].mean())
                for truth, known, p in zip(y, eligible, predict(table).mean(axis=1), strict=True)
            ]
            for table in tables.values()
        ]
    )


def line(name: str, found: NDArray[np.float64]) -> str:
    """A row of the table, from (splits, losses, diseases, 2)."""
    scores = found[..., 0].mean(axis=2)  # (splits, losses)
    means = found[..., 1].mean(axis=0)  # (losses, diseases)
    cells = [f"{scores[:, 0].mean():.3f}"]
    sd = (scores - scores[:, :1]).std(axis=0, ddof=min(len(scores) - 1, 1))
    for loss in range(1, len(means)):
        change = (scores[:, loss] - scores[:, 0]).mean()
        moved = np.abs(means[loss] / means[0] - 1).max()
        cells.append(f"{change:+.3f} ± {sd[loss]:.3f} ({moved:.0%})")
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="such as configs/nafld.yaml")
    parser.add_argument("--data", type=Path, help="data_root, as for ehr-sn")
    parser.add_argument("--rate", type=float, default=0.5, help="share that goes (default: 0.5)")
    parser.add_argument("--splits", type=int, help="(default: the configuration's)")
    args = parser.parse_args()
    config = load_config(args.config)
    if args.data:
        config = config.model_copy(update={"data_root": args.data.absolute()})
    store = Store(ingest(config))
    splits = range(args.splits or config.splits.repeats)
    tables = [amputated(store, split, args.rate) for split in splits]
    print(f"{config.dataset}: a further {args.rate:.0%} of held-out rows' entries lost, ", end="")
    print(f"{len(splits)} splits\n\n| | nothing lost | {' | '.join(LOSSES)} |")
    print("|---" * (len(LOSSES) + 2) + "|")
    blends = [(NOTHING, NOTHING, name) for name in config.train.blends]
    for method, scaler, architecture in MODELS + blends:
        found = []
        for split in splits:
            cell = Cell(method, scaler, architecture, split)
            train_cell(config, store, cell)
            y = store.labels()[store.splits()[:, split] == "held_out"].T
            found.append(judged(load_predictor(config, store, cell), tables[split], y))
        behind = "" if method == NOTHING else f", `{method}`, `{scaler}`"
        print(line(f"{architecture}{behind}", np.array(found)), flush=True)


if __name__ == "__main__":
    main()
