"""What a further loss of entries does to trained models, on held-out rows of every split.

Entries are removed from rows that no model has seen: at random, by whole panels, by their own value
(the higher, the likelier), each from the features that training rows ever lack (age and sex are
always known), and at random from all features. For each model the change of the AUROC of the
seed-averaged prediction, mean over diseases ± sd over splits; in brackets the relative change, up
or down, of a disease's mean prediction (mean over splits): mean and largest over diseases.

The configuration's blends are judged, too. The last rows are models that were trained on rows which
had lost as much in the same way, for each loss one. Cells that are not in the data folder are
trained.

    python benchmarks/robustness.py configs/nafld.yaml
    python benchmarks/robustness.py configs/nhanes.yaml --data DIR --rate 0.25
    python benchmarks/robustness.py configs/nafld.yaml --rows tuning
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ehr_sn.config import Config, load_config
from ehr_sn.evaluate.metrics import Sample, auroc
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.missing.amputate import Amputation, Mechanism
from ehr_sn.models.predict import Predict, load_predictor
from ehr_sn.models.train import NOTHING, Cell, train_cell
from ehr_sn.models.weights import Weights, taken, weights

UNMASKED = "recipe, without random masking"
MODELS = [
    ("zero", "standard", "mlp_dropout"),
    ("mean", "standard", "mlp_dropout"),
    ("sparsity_normalization", "standard", "mlp_dropout"),
    ("zero+mask", "standard", "mlp_dropout"),
    ("zero+mask", "quantile", UNMASKED),
    ("zero+mask", "quantile", "recipe"),
    ("mice+mask", "quantile", UNMASKED),
    ("softimpute+mask", "quantile", "recipe"),
    ("mice+mask", "quantile", "recipe"),
    (NOTHING, NOTHING, "hist_gradient_boosting"),
    (NOTHING, NOTHING, "boosting+masked_copies"),
]
INFORMED = {
    "network": [("zero+mask", "quantile", UNMASKED)],
    "trees": [(NOTHING, NOTHING, "hist_gradient_boosting")],
}
INFORMED["both"] = INFORMED["network"] + INFORMED["trees"]
"""Models to be trained on rows that have lost entries, too; the mean of what several predict."""
LOSSES: dict[str, tuple[Mechanism, bool]] = {
    "at random": ("mcar", True),
    "whole panels": ("panel", True),
    "by their own value": ("mnar", True),
    "at random, of all features": ("mcar", False),
}
"""Mechanism, and whether features that training rows never lack are spared."""


def loss(store: Store, split: int, name: str, rate: float) -> Amputation:
    """One of `LOSSES`, as a split's training rows tell how to."""
    mechanism, spare = LOSSES[name]
    train = store.values()[store.splits()[:, split] == "train"]
    complete = np.flatnonzero(~np.isnan(train).any(axis=0))
    lose = Amputation(mechanism, rate, seed=split, spare=complete if spare else ())
    return lose.fit(train, store.measurements)


@dataclass(frozen=True)
class Amputated(Store):
    """A store whose every row, for training as well as held out, has suffered a loss."""

    split: int
    name: str
    rate: float

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint}-{self.split}-{self.name}-{self.rate}"

    def values(self) -> NDArray[np.float32]:
        lose = loss(Store(self.path), self.split, self.name, self.rate)
        return lose(super().values()).astype(np.float32)


def amputated(store: Store, split: int, part: str, rate: float) -> dict[str, NDArray[np.float32]]:
    """The split's held-out (or tuning) rows, whole and after each loss."""
    rows = np.flatnonzero(store.splits()[:, split] == part)
    values = store.values()[rows]
    tables = {"whole": values}
    for name in LOSSES:
        tables[name] = loss(store, split, name, rate)(values, rows).astype(np.float32)
    return tables


def judged(
    predicted: Sequence[NDArray[np.float32]], y: NDArray[np.float32], weight: Sequence[Weights]
) -> NDArray[np.float64]:
    """(losses, diseases, 2): AUROC and mean prediction of the eligible rows.

    `predicted` are probabilities (diseases, seeds, rows), one array a loss.
    """
    return np.array(
        [
            [
                (auroc(s.y, s.p, s.weight), s.mean(s.p))
                for truth, p, w in zip(y, one.mean(axis=1), weight, strict=True)
                for s in [Sample(truth, p, None, w).where(~np.isnan(truth))]
            ]
            for one in predicted
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
        moved = np.abs(means[loss] / means[0] - 1)
        cells.append(f"{change:+.3f} ± {sd[loss]:.3f} ({moved.mean():.0%}, {moved.max():.0%})")
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
    parser.add_argument(
        "--rows",
        choices=("held_out", "tuning"),
        default="held_out",
        help="tuning: to choose by; all stopped on them (default: held_out)",
    )
    args = parser.parse_args()
    config = load_config(args.config)
    if args.data:
        config = config.model_copy(update={"data_root": args.data.absolute()})
    networks = config.train.architectures
    unmasked = networks["recipe"].model_copy(update={"augment_missing": False})
    train = config.train.model_copy(update={"architectures": networks | {UNMASKED: unmasked}})
    config = config.model_copy(update={"train": train})
    store = Store(ingest(config))
    splits = range(args.splits or config.splits.repeats)
    tables = [amputated(store, split, args.rows, args.rate) for split in splits]
    whose = args.rows.replace("_", "-")
    print(f"{config.dataset}: a further {args.rate:.0%} of {whose} rows' entries lost, ", end="")
    print(f"{len(splits)} splits\n\n| | nothing lost | {' | '.join(LOSSES)} |")
    print("|---" * (len(LOSSES) + 2) + "|")
    blends = [(NOTHING, NOTHING, name) for name in config.train.blends]
    rows = [store.splits()[:, split] == args.rows for split in splits]
    truth = [store.labels()[mine].T for mine in rows]
    weight = [[taken(w, rows[split]) for w in weights(store, split)] for split in splits]
    for model in MODELS + blends:
        found = []
        for split in splits:
            predict = trained(config, store, Cell(*model, split))
            lost = [predict(table) for table in tables[split].values()]
            found.append(judged(lost, truth[split], weight[split]))
        print(line(named(model), np.array(found)), flush=True)
    for name, models in INFORMED.items():
        found = []
        for split in splits:
            stores = [store] + [Amputated(store.path, split, loss, args.rate) for loss in LOSSES]
            predicted = [
                np.mean([trained(config, one, Cell(*m, split))(table) for m in models], axis=0)
                for one, table in zip(stores, tables[split].values(), strict=True)
            ]
            found.append(judged(predicted, truth[split], weight[split]))
        print(line(f"{name}, trained on such rows", np.array(found)), flush=True)


def trained(config: Config, store: Store, cell: Cell) -> Predict:
    """A cell's model, which is trained now if it has not been."""
    train_cell(config, store, cell)
    return load_predictor(config, store, cell)


def named(model: tuple[str, str, str]) -> str:
    """A model's row in the table."""
    method, scaler, architecture = model
    return architecture if method == NOTHING else f"{architecture}, `{method}`, `{scaler}`"


if __name__ == "__main__":
    main()
