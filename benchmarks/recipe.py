"""Choose the network's default recipe by tuning rows alone, beside trees tuned equally hard.

Every candidate is a cell of the project (`train_cell`, kept in the data folder, so that a run goes
on where another ended), judged by the AUROC of its seed-averaged prediction on the tuning rows,
averaged over diseases and splits. Its networks stop early on those same rows, and so do the trees:
the figures choose, they do not promise. Held-out rows are never read.

    python benchmarks/recipe.py configs/nafld.yaml --splits 3 --seeds 5
    python benchmarks/recipe.py configs/nafld.yaml --splits 2 --trees 8 --shift 0.25 0.5

`--shift` measures as well what a further loss of entries does: AUROC and mean prediction on tuning
rows that were amputated, for each candidate with and without random masking.
"""

import argparse
import warnings
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from safetensors import safe_open
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.pipeline import Pipeline

from ehr_sn.config import ArchitectureConfig, Config, load_config
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.missing import make_method, set_state
from ehr_sn.missing.amputate import MECHANISMS, Amputation
from ehr_sn.models.methods import find_method
from ehr_sn.models.mlp import StackedMLP
from ehr_sn.models.train import Cell, train_cell
from ehr_sn.models.weights import Weights, taken, weights


@dataclass(frozen=True)
class Candidate:
    """One setting of the network."""

    method: str
    scaler: str
    hidden: tuple[int, ...]
    dropout: float
    weight_decay: float
    learning_rate: float
    batch_size: int
    masking: bool
    embedding: int

    def __str__(self) -> str:
        width = "-".join(map(str, self.hidden))
        return (
            f"{self.method:22} {self.scaler:8} hidden {width:7} dropout {self.dropout:<4g} decay "
            f"{self.weight_decay:<6g} rate {self.learning_rate:<6g} batch {self.batch_size:<4d} "
            f"{'masking' if self.masking else '-':7} embedding {self.embedding}"
        )

    def config(self, base: Config, seeds: int) -> Config:
        """The configuration that trains this candidate alone."""
        network = ArchitectureConfig(
            hidden=self.hidden,
            dropout=self.dropout,
            augment_missing=self.masking,
            embedding=self.embedding,
        )
        changes = {
            "methods": {self.scaler: (self.method,)},
            "architectures": {"candidate": network},
            "seeds": seeds,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "batch_size": self.batch_size,
            "device": "cpu",
        }
        return base.model_copy(update={"train": base.train.model_copy(update=changes)})


@dataclass(frozen=True)
class Split:
    """The rows of one split that may be seen: its number, table, labels, and which are which."""

    number: int
    values: np.ndarray
    y: np.ndarray
    train: np.ndarray
    tuning: np.ndarray
    weights: tuple[Weights, ...]


def read_splits(store: Store, n_splits: int) -> list[Split]:
    values, y, splits = store.values(), store.labels(), store.splits()
    rows = [[np.flatnonzero(s == name) for name in ("train", "tuning")] for s in splits.T]
    return [Split(i, values, y, *rows[i], weights(store, i)) for i in range(n_splits)]


def tuning_aurocs(split: Split, probability: np.ndarray) -> np.ndarray:
    """AUROC of each disease, from probabilities (diseases, tuning rows)."""
    y = split.y[split.tuning].T
    known = ~np.isnan(y)
    rows = zip(y, probability, known, split.weights, strict=True)
    return np.array([auroc(t[k] == 1, p[k], taken(w, split.tuning[k])) for t, p, k, w in rows])


def networks(
    base: Config, store: Store, split: Split, candidate: Candidate, seeds: int
) -> tuple[np.ndarray, Path]:
    """Tuning probabilities (diseases, seeds, rows), and the cell's file."""
    config = candidate.config(base, seeds)
    cell = Cell(candidate.method, candidate.scaler, "candidate", split.number)
    path = train_cell(config, store, cell)
    with safe_open(path, framework="np") as file:
        return file.get_tensor("probability/tuning"), path


def judge(base: Config, store: Store, splits: list[Split], candidate: Candidate, seeds: int):
    """AUROC (diseases,) of the seed-averaged prediction, mean over splits; sd over single seeds."""
    ensemble, single = [], []
    for split in splits:
        probability, _ = networks(base, store, split, candidate, seeds)
        ensemble.append(tuning_aurocs(split, probability.mean(axis=1)))
        single.append([tuning_aurocs(split, probability[:, s]).mean() for s in range(seeds)])
    return np.mean(ensemble, axis=0), float(np.mean(single, axis=0).std(ddof=min(seeds - 1, 1)))


TREES = [
    {"learning_rate": rate, "max_leaf_nodes": leaves, "l2_regularization": l2}
    for leaves, rate, l2 in product([4, 8, 16, 31], [0.03, 0.1], [0.0, 10.0])
]


def judge_trees(splits: list[Split], seeds: int, settings: dict) -> np.ndarray:
    """The same for HistGradientBoosting: the number of trees that suits the tuning rows best."""
    scores = []
    for split in splits:
        for i in range(split.y.shape[1]):
            y = split.y[:, i]
            train, tuning = (rows[~np.isnan(y[rows])] for rows in (split.train, split.tuning))
            stages = []
            for seed in range(seeds):
                trees = HistGradientBoostingClassifier(
                    **settings,
                    max_iter=300 if settings["learning_rate"] < 0.1 else 100,
                    min_samples_leaf=20,
                    max_features=0.5,
                    early_stopping=False,
                    random_state=seed,
                ).fit(split.values[train], y[train], taken(split.weights[i], train))
                staged = trees.staged_predict_proba(split.values[tuning])
                stages.append(np.stack([p[:, 1] for p in staged][4::5]))
            ensemble = np.mean(stages, axis=0)
            weight = taken(split.weights[i], tuning)
            scores.append(max(auroc(y[tuning] == 1, p, weight) for p in ensemble))
    return np.reshape(scores, (len(splits), -1)).mean(axis=0)


def line(name: str, scores: np.ndarray, more: str = "") -> None:
    print(f"{name}  {scores.mean():.4f}  " + " ".join(f"{s:.3f}" for s in scores), more, flush=True)


def restore(base: Config, candidate: Candidate, path: Path) -> tuple[Pipeline, StackedMLP]:
    """The method and the networks in a cell's file."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    method, network = (
        {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
        for kind in ("method/", "network/")
    )
    rows = find_method(candidate.method).rows
    empty = make_method(rows, candidate.scaler, base.train.winsorise)
    fitted = set_state(empty, {name: t.numpy() for name, t in method.items()})
    return fitted, StackedMLP.from_state(network).eval()


def shift(
    base: Config,
    store: Store,
    splits: list[Split],
    candidate: Candidate,
    seeds: int,
    rates: list[float],
) -> None:
    """Print eligible rows' AUROC and mean prediction when a further share of entries goes missing.

    Once from all features alike, once sparing those that training rows never lack.
    """
    for masking in (False, True):
        chosen = replace(candidate, masking=masking)
        found: dict[str, list] = {}
        for split in splits:
            probability, path = networks(base, store, split, chosen, seeds)
            method, model = restore(base, chosen, path)
            rows, train = split.values[split.tuning], split.values[split.train]
            complete = np.flatnonzero(~np.isnan(train).any(axis=0))
            eligible = ~np.isnan(split.y[split.tuning].T)
            tables = {"whole": rows}
            for spare, mechanism, rate in product([(), complete], MECHANISMS, rates):
                lost = Amputation(mechanism, rate, seed=split.number, spare=spare)
                lost.fit(train, store.measurements)
                kind = "incomplete features" if len(spare) else "all features"
                tables[f"{mechanism} {rate:.0%} of {kind}"] = lost(rows, split.tuning)
            for name, table in tables.items():
                p = model.predict_proba(method.transform(table)).numpy()
                p = p.reshape(probability.shape).mean(axis=1)
                mean = [p[i, k].mean() for i, k in enumerate(eligible)]
                found.setdefault(name, []).append([tuning_aurocs(split, p), mean])
        whole, before = np.mean(found["whole"], axis=0)
        print(chosen)
        for name, pairs in found.items():
            scores, after = np.mean(pairs, axis=0)
            moved = after / before - 1
            line(
                f"  {name:32}",
                scores,
                f" {scores.mean() - whole.mean():+.4f}, mean prediction "
                + " ".join(f"{change:+.0%}" for change in moved),
            )


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config")
    add("--data", help="data_root, as for ehr-sn")
    add("--splits", type=int, default=1)
    add("--seeds", type=int, default=2)
    add("--methods", nargs="+", default=["zero+mask", "piecewise_linear+mask"])
    add("--scalers", nargs="+", default=["quantile"])
    add("--hidden", nargs="+", default=["64"], help="widths, as 64-64")
    add("--dropouts", type=float, nargs="+", default=[0.5])
    add("--decays", type=float, nargs="+", default=[1e-2])
    add("--rates", type=float, nargs="+", default=[3e-3], help="learning rates")
    add("--batch-sizes", type=int, nargs="+", default=[256])
    add("--masking", type=int, nargs="+", default=[1])
    add("--embeddings", type=int, nargs="+", default=[0, 4, 8], help="units of each feature's own")
    add("--trees", type=int, default=0, help="settings of HistGradientBoosting to try")
    add("--shift", type=float, nargs="*", help="measure the loss of these shares of entries")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    config = load_config(args.config)
    if args.data:
        config = config.model_copy(update={"data_root": Path(args.data).absolute()})
    store = Store(ingest(config))
    splits = read_splits(store, args.splits)
    print(
        f"{store.path.parent.name}: {args.splits} splits, {args.seeds} seeds; tuning AUROC: ",
        end="",
    )
    print("mean,", ", ".join(store.diseases))
    for method, scaler, hidden, dropout, decay, rate, size, masking, embedding in product(
        args.methods,
        args.scalers,
        [tuple(map(int, widths.split("-"))) for widths in args.hidden],
        args.dropouts,
        args.decays,
        args.rates,
        args.batch_sizes,
        args.masking,
        args.embeddings,
    ):
        candidate = Candidate(
            method, scaler, hidden, dropout, decay, rate, size, bool(masking), embedding
        )
        started = perf_counter()
        scores, sd = judge(config, store, splits, candidate, args.seeds)
        line(str(candidate), scores, f" sd {sd:.4f}  {perf_counter() - started:.0f} s")
        if args.shift:
            shift(config, store, splits, candidate, args.seeds, args.shift)
    for settings in TREES[:: max(len(TREES) // args.trees, 1)] if args.trees else []:
        started = perf_counter()
        name = ", ".join(f"{key} {value:g}" for key, value in settings.items())
        line(
            f"trees: {name:70}",
            judge_trees(splits, args.seeds, settings),
            f" {perf_counter() - started:.0f} s",
        )


if __name__ == "__main__":
    main()
