"""When does Sparsity Normalization help? Real tables, from which entries are taken by a known rule.

All rows lose entries, those for training and those held out alike, and the networks are trained
anew. So what is missing because of the patient can be told from what is missing by accident, one
rate for all from a rate of each row's own (variable sparsity), and single entries from whole
panels. In the table: for `zero` AUROC on held-out rows (seed-averaged prediction, mean over
diseases and splits), for the others the difference from it with the same scaler, ▲ a gain and ▼ a
loss that is established (paired DeLong, Holm over diseases, p < 0.05), one a disease; in brackets
the slope that the prediction leaves unexplained (`evaluate.diagnostics`), mean over diseases. Cells
that are not in the data folder are trained.

    python benchmarks/made_missing.py configs/nafld.yaml
    python benchmarks/made_missing.py configs/nhanes.yaml --data DIR --splits 1
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ehr_sn.config import load_config
from ehr_sn.evaluate.diagnostics import sparsity_bias
from ehr_sn.evaluate.results import Result, evaluate
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.missing.amputate import Amputation, Mechanism
from ehr_sn.models.train import Cell, HeldOut, read_cell, train_cell

MODELS = {
    "standard": ("zero", "sparsity_normalization", "zero+count", "zero+mask"),
    "minmax": ("zero", "mean", "sparsity_normalization", "zero+count", "zero+mask"),
}
OWN_RATES = np.arange(0, 1, 0.1)
"""A row's own rate is one of these, 45 % on average."""
RULES: dict[str, tuple[Mechanism, bool] | None] = {
    "as it is": None,
    "45 % at random": ("mcar", False),
    "at random, each row its own share": ("mcar", True),
    "whole panels, each row its own share": ("panel", True),
    "45 %, the higher the likelier": ("mnar", False),
}
"""Mechanism, and whether every row has a rate of its own."""


@dataclass(frozen=True)
class Amputated(Store):
    """A store whose rows have lost entries by one of `RULES`."""

    rule: str = "as it is"

    @property
    def fingerprint(self) -> str:
        number = list(RULES).index(self.rule)
        return f"{super().fingerprint}-rule-{number}" if number else super().fingerprint

    def values(self) -> NDArray[np.float32]:
        whole = super().values()
        rule = RULES[self.rule]
        if rule is None:
            return whole
        mechanism, own = rule
        lose = Amputation(mechanism, 0.45).fit(whole, self.measurements)
        if not own:
            return lose(whole).astype(np.float32)
        left = np.empty_like(whole)
        share = np.random.default_rng(0).integers(len(OWN_RATES), size=len(whole))
        for i, rate in enumerate(OWN_RATES):
            rows = np.flatnonzero(share == i)
            lose.rate = float(rate)
            left[rows] = lose(whole[rows], rows)
        return left


def unexplained(store: Store, held_out: dict[str, list[HeldOut]]) -> float:
    """The slope that outcomes leave unexplained by the number of observed entries, mean over
    diseases.
    """
    count, y, dealt = (~np.isnan(store.values())).sum(axis=1), store.labels(), store.splits()
    slopes = []
    for i, splits in enumerate(held_out.values()):
        told = [
            (
                one.y,
                one.ensemble,
                count[(dealt[:, s] == "held_out") & ~np.isnan(y[:, i])],
                one.subject,
                one.weight,
            )
            for s, one in enumerate(splits)
        ]
        slopes.append(sparsity_bias(told).unexplained)
    return float(np.mean(slopes))


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="such as configs/nafld.yaml")
    parser.add_argument("--data", type=Path, help="data_root, as for ehr-sn")
    parser.add_argument("--splits", type=int, help="(default: the configuration's)")
    parser.add_argument("--architecture", default="mlp", help="(default: mlp)")
    args = parser.parse_args()
    config = load_config(args.config)
    if args.data:
        config = config.model_copy(update={"data_root": args.data.absolute()})
    whole = Store(ingest(config))
    stores = [Amputated(whole.path, rule) for rule in RULES]
    splits = range(args.splits or config.splits.repeats)
    print(f"{config.dataset}, {len(splits)} splits, {args.architecture}\n")
    print(f"| | {' | '.join(RULES)} |")
    print("|---" * (len(RULES) + 1) + "|")
    shares = [(~np.isnan(store.values())).mean(axis=1) for store in stores]
    told = [f"{share.mean():.0%} ± {share.std():.0%}" for share in shares]
    print(f"| a row's share of observed entries | {' | '.join(told)} |")
    for scaler, methods in MODELS.items():
        references: dict[str, dict[str, list[HeldOut]]] = {}
        for method in methods:
            cells = [Cell(method, scaler, args.architecture, split) for split in splits]
            found = []
            for store in stores:
                trained = [read_cell(train_cell(config, store, cell), store) for cell in cells]
                held_out = {d: [cell.held_out[d] for cell in trained] for d in store.diseases}
                results = evaluate(held_out, references.get(store.rule))
                references.setdefault(store.rule, held_out)
                found.append(f"{change(results)} ({unexplained(store, held_out):+.2f})")
            print(f"| `{method}`, `{scaler}` | {' | '.join(found)} |", flush=True)


def change(results: Sequence[Result]) -> str:
    """AUROC, or its difference from the reference and the signs of what is established."""
    differences = [r.versus_reference.difference for r in results if r.versus_reference]
    if not differences:
        return f"{np.mean([r.ensemble.value for r in results]):.3f}"
    known = [d for d, r in zip(differences, results, strict=True) if (r.p_holm or 0) < 0.05]
    signs = "".join("▲" if d > 0 else "▼" for d in sorted(known, reverse=True))
    return f"{np.mean(differences):+.3f}{signs}"


if __name__ == "__main__":
    main()
