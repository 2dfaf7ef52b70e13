"""Measure how much better models look on tuning rows than on rows that took part in no decision.

The tuning rows stop the training early, choose among comparisons, fit the calibration map, decide
on promotion, and give the AUROC that monitoring compares with. Three parts:

1. *Noise*: outcomes that depend on nothing, in tables of 20 features of which 30 % are missing.
   Every true AUROC is 0.5. All comparisons of the configuration are trained.
2. *Promotion*: drawn scores of a champion (AUROC 0.75) and of challengers, of which the best on
   tuning rows is promoted or not: by the rule of `ehr_sn.scoring.promote`; with its level divided
   by the number of challengers; and where one half of the rows chooses and the other judges.
3. *Real*: the configuration's own data. Tuning and held-out rows differ by chance, and for all
   models alike. So the difference of a control, which uses no tuning rows, is taken off; without
   that the standard errors would be several times as large. With `--mends` all is trained twice
   more, stopped on one half of the tuning rows and judged on the other, and the other way round.

    python benchmarks/optimism.py configs/nafld.yaml
    python benchmarks/optimism.py configs/nafld.yaml --parts real --splits 8 --mends 3
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
import torch
import yaml
from safetensors import safe_open
from scipy.special import logit
from scipy.stats import norm, rankdata
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_limits

from ehr_sn.config import Config, load_config
from ehr_sn.evaluate.metrics import CLIP, auroc, calibration
from ehr_sn.evaluate.statistics import Z95, delong, paired_delong
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models.train import PREDICTED, Cell, comparisons, train_cell
from ehr_sn.scoring.calibrate import CalibrationMap, cross_fitted
from ehr_sn.scoring.promote import LEVEL

FEATURES, MISSING = 20, 0.3
REPEATS = 3  # random splits of a table of noise, as many as the configurations have
CHAMPION, WORSE, CORRELATION = 0.75, 0.02, 0.9
NUMBERS = (1000, 3500)  # of tuning rows
TREES, RATE = 100, 0.05  # of the control
DEALT = 8
"""Splits that are dealt, of which the first are used: whoever asks for more finds these again."""


@dataclass(frozen=True)
class Half(Store):
    """A store of whose tuning rows one half stops training; the other is predicted as held out."""

    part: int

    @property
    def fingerprint(self) -> str:
        return f"{self.path.name}-{self.part}"

    @property
    def rows_fingerprint(self) -> str:
        return self.path.name

    def splits(self) -> np.ndarray:
        splits = super().splits()
        other = halves(self) != self.part
        return np.where((splits == "tuning") & other[:, None], "held_out", splits)


def halves(store: Store) -> np.ndarray:
    """0 or 1 (rows,) by a hash of the subject."""
    subjects = store.read("values", ["subject_id"])["subject_id"].to_pylist()
    return np.array([sha256(f"half {subject}".encode()).digest()[0] % 2 for subject in subjects])


def predictions(config: Config, store: Store, cell: Cell) -> np.ndarray:
    """Train the cell, or find it; predictions (outcomes, seeds, rows), NaN on training rows."""
    path = train_cell(config, store, cell)
    split = store.splits()[:, cell.split]
    shape = (len(store.diseases), config.train.seeds, len(split))
    predicted = np.full(shape, np.nan, dtype=np.float32)
    with safe_open(path, framework="np") as file:
        for name in PREDICTED:
            predicted[..., split == name] = file.get_tensor(f"probability/{name}")
    return predicted


def train_all(config: Config, store: Store, split: int) -> np.ndarray:
    """Predictions (comparisons, outcomes, seeds, rows) of every comparison."""
    started = perf_counter()
    cells = [Cell(*comparison, split) for comparison in comparisons(config)]
    found = np.stack([predictions(config, store, cell) for cell in cells])
    seconds = perf_counter() - started
    print(f"{store.fingerprint} split {split + 1}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return found


def kinds(config: Config) -> dict[str, list[int]]:
    """Places of the comparisons that stop in the same way."""
    listed: dict[str, list[int]] = {"one network": []}
    for i, (_, _, architecture) in enumerate(comparisons(config)):
        network = architecture in config.train.architectures
        listed.setdefault("one network" if network else architecture, []).append(i)
    return listed


def calibrated(y: np.ndarray, p: np.ndarray, subjects: np.ndarray) -> tuple[float, float]:
    """Slope and intercept on tuning rows, cross-fitted, as a package's figures have them."""
    mapped = cross_fitted(y, p, subjects)
    return (np.nan, np.nan) if np.isnan(mapped).any() else tuple(calibration(y, mapped))


def lowest(y: np.ndarray, challenger: np.ndarray, champion: np.ndarray) -> float:
    """Lower bound of the AUROC difference, as `promote` has it; 0 where both rank alike."""
    found = paired_delong(y, challenger, champion)
    return found.difference - norm.ppf(1 - LEVEL) * found.se


def told(values: Sequence[float], form: str = "+.4f") -> str:
    """The mean and its standard error."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return format(known.mean(), form) if len(known) else "–"
    return f"{known.mean():{form}} ± {known.std(ddof=1) / np.sqrt(len(known)):{form.lstrip('+')}}"


def print_table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Markdown."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for cells in lines:
        print(f"| {' | '.join(cells)} |")
    sys.stdout.flush()


# --- 1. Noise


def noise_store(
    folder: Path, config: Config, rows: int, prevalence: float, outcomes: int, seed: int
) -> tuple[Config, Store]:
    """A table of noise with `outcomes` columns of labels, and what the project makes of it."""
    rng = np.random.default_rng([seed, rows, int(1000 * prevalence)])
    x = np.where(rng.random((rows, FEATURES)) < MISSING, np.nan, rng.normal(size=(rows, FEATURES)))
    y = rng.random((rows, outcomes)) < prevalence
    features, labels = (
        [f"{k}{i:02}" for i in range(n)] for k, n in (("x", FEATURES), ("y", outcomes))
    )
    table = pd.DataFrame(x, columns=features)
    table[labels] = y.astype(int)
    table.assign(row=range(rows)).to_parquet(folder / "rows.parquet", index=False)
    content = {
        "dataset": "noise",
        "data_dir": str(folder / "data"),
        "tables": {"rows": {"path": "rows.parquet"}},
        "cohort": {"table": "rows", "subject_id": "row"},
        "features": {"columns": {"rows": features}},
        "labels": {
            name: {"positive": f"{name} == 1", "negative": f"{name} == 0"} for name in labels
        },
        "splits": {"repeats": REPEATS},
        "train": config.train.model_dump(mode="json") | {"seeds": 2},
    }
    (folder / "noise.yaml").write_text(yaml.safe_dump(content))
    made = load_config(folder / "noise.yaml")
    return made, Store(ingest(made))


def noise(config: Config, rows: int, prevalence: float, outcomes: int, seed: int) -> dict[str, str]:
    """One case: what to print, by the name of its line."""
    with tempfile.TemporaryDirectory(prefix="noise-") as folder:
        made, store = noise_store(Path(folder), config, rows, prevalence, outcomes, seed)
        labels, splits = store.labels(), store.splits()
        subjects = np.arange(len(labels))
        tuning = np.empty((2, len(comparisons(made)), REPEATS, outcomes))  # by seed
        held_out = np.empty_like(tuning)
        bounds: dict[str, list[float]] = {"seed": [], "first": [], "best": []}
        slopes: dict[str, list[tuple[float, float, float, float]]] = {"first": [], "best": []}
        for s in range(REPEATS):
            p = train_all(made, store, s)
            for o in range(outcomes):
                t, h = splits[:, s] == "tuning", splits[:, s] == "held_out"
                y_t, y_h = labels[t, o], labels[h, o]
                for seed in range(2):
                    tuning[seed, :, s, o] = auroc(y_t, p[:, o, seed, t])
                    held_out[seed, :, s, o] = auroc(y_h, p[:, o, seed, h])
                best = tuning[:, :, s, o].argmax(axis=1)
                judge = partial(lowest, y_t)
                champion = p[0, o, 0, t]
                bounds["seed"].append(judge(p[0, o, 1, t], champion))
                bounds["first"].append(judge(p[best[1], o, 1, t], champion))
                bounds["best"].append(judge(p[best[1], o, 1, t], p[best[0], o, 0, t]))
                for name, c in (("first", 0), ("best", best[0])):
                    later = CalibrationMap.fit(y_t, p[c, o, 0, t])(p[c, o, 0, h])
                    slope, intercept = calibrated(y_t, p[c, o, 0, t], subjects[t])
                    slopes[name].append((slope, intercept, *calibration(y_h, later)))
        lines = {}
        for name, places in kinds(made).items():
            lines[f"{name}: tuning AUROC − 0.5"] = told(tuning[0, places].mean(axis=(0, 1)) - 0.5)
        every = len(tuning[0])
        lines[f"best of {every}, one outcome and split"] = told(
            tuning[0].max(axis=0).mean(axis=0) - 0.5
        )
        of_all = tuning[0].mean(axis=1).argmax(axis=0)
        by_outcome = np.arange(outcomes)
        lines[f"best of {every}, mean of {REPEATS} splits"] = told(
            tuning[0].mean(axis=1)[of_all, by_outcome] - 0.5
        )
        lines["… its held-out AUROC − 0.5"] = told(
            held_out[0].mean(axis=1)[of_all, by_outcome] - 0.5
        )
        lines["every one's held-out AUROC − 0.5"] = told(held_out[0].mean(axis=(0, 1)) - 0.5)
        for name, told_as in (("first", "zero imputation's network"), ("best", "best")):
            there = np.nanmedian(slopes[name], axis=0)
            lines[f"{told_as}: slope on tuning rows, later (median)"] = (
                f"{there[0]:.2f}, {there[2]:.2f}"
            )
            lines[f"{told_as}: intercept on tuning rows, later (median)"] = (
                f"{there[1]:+.2f}, {there[3]:+.2f}"
            )
        for name, pair in (
            ("seed", "another seed against the first"),
            ("first", f"best of {every} against zero imputation's network"),
            ("best", f"best of {every} against best of {every}"),
        ):
            found = np.array(bounds[name])
            better, passed = np.mean(found > 0), np.mean(found >= -config.promotion.margin)
            lines[f"{pair}: called better, promoted"] = f"{better:.0%}, {passed:.0%}"
    return lines


def show_noise(config: Config, sizes: Sequence[int], outcomes: int, seed: int) -> None:
    cases = [(rows, prevalence) for rows in sizes for prevalence in (0.1, 0.3)]
    found = [noise(config, *case, outcomes, seed) for case in cases]
    head = ["", *(f"{rows:,} rows, {prevalence:.0%} cases" for rows, prevalence in cases)]
    lines = [[name, *(case[name] for case in found)] for name in found[0]]
    print_table("Noise: means over outcomes ± standard error; all true AUROCs are 0.5", head, lines)


# --- 2. Promotion


@dataclass(frozen=True)
class Case:
    """How a challenger is chosen: by the mean AUROC over `outcomes`, of which one is judged.

    `correlation` (k, k) is that of the scores of all models within a class. The champion is the
    first of them, or with `chosen_champion` the best of the first half, by the same rows.
    """

    name: str
    correlation: np.ndarray
    outcomes: int = 1
    chosen_champion: bool = False

    @property
    def champions(self) -> int:
        return len(self.correlation) // 2 if self.chosen_champion else 1

    @property
    def challengers(self) -> int:
        return len(self.correlation) - self.champions

    def draw(self, n: int, difference: float, draws: int) -> dict[str, np.ndarray]:
        """Differences and their standard errors (draws, 2), by the rows that choose and judge.

        The challengers' AUROC lies by `difference` above the champions'. Halves choose on one and
        judge on the other.
        """
        rng = np.random.default_rng([n, len(self.correlation), int(1000 * abs(difference))])
        y, half = np.arange(n) % 10 == 0, np.arange(n) // 10 % 2 == 0
        models = len(self.correlation)
        areas = CHAMPION + difference * (np.arange(models) >= self.champions)
        shift = np.sqrt(2) * norm.ppf(areas)[:, None] * y
        factor = np.linalg.cholesky(self.correlation + 1e-6 * np.eye(models))
        everyone = np.full(n, True)
        found: dict[str, list[tuple[float, float]]] = {"same": [], "halves": []}
        for _ in range(draws):
            scores = [
                factor @ rng.standard_normal((models, n)) + shift for _ in range(self.outcomes)
            ]
            for name, choose, judge in (("same", everyone, everyone), ("halves", half, ~half)):
                mean = np.mean([auroc(y[choose], each[:, choose]) for each in scores], axis=0)
                ours = self.champions + mean[self.champions :].argmax()
                theirs = mean[: self.champions].argmax()
                pair = paired_delong(y[judge], scores[0][ours, judge], scores[0][theirs, judge])
                found[name].append((pair.difference, pair.se))
        return {name: np.array(pairs) for name, pairs in found.items()}


def alike(models: int) -> np.ndarray:
    """A matrix in which all correlate by `CORRELATION`."""
    return np.full((models, models), CORRELATION) + (1 - CORRELATION) * np.eye(models)


def show_promotion(config: Config, cases: Sequence[Case], draws: int) -> None:
    """One line for each number of rows, case and way to judge."""
    margin, lines = config.promotion.margin, []
    for n, case in product(NUMBERS, cases):
        as_good, worse = (case.draw(n, difference, draws) for difference in (0.0, -WORSE))
        ways = [("same", LEVEL), ("same", LEVEL / case.challengers), ("halves", LEVEL)]
        for rows, level in ways if case.challengers > 1 else ways[:1]:
            z = norm.ppf(1 - level)
            equal, less = (f[rows][:, 0] - z * f[rows][:, 1] for f in (as_good, worse))
            rates = np.mean(equal > 0), np.mean(less >= -margin), np.mean(equal >= -margin)
            lines.append([f"{n:,}", case.name, rows, f"{level:.2%}", *(f"{r:.1%}" for r in rates)])
    print_table(
        f"Promotion: 10 % cases, AUROC {CHAMPION}, margin {margin:g}, {draws} draws; mistakes (the "
        f"first two rates) are to be {LEVEL:.0%}",
        [
            "tuning rows",
            "challengers",
            "rows",
            "level",
            "as good: called better",
            f"worse by {WORSE}: promoted",
            "as good: promoted",
        ],
        lines,
    )


# --- 3. Real


@dataclass(frozen=True)
class Seen:
    """Of every model (k, outcomes) on one split's tuning and held-out rows."""

    tuning: np.ndarray
    held_out: np.ndarray
    slope: np.ndarray  # (2, k, outcomes) of the first, the best and the last: on tuning rows,
    # cross-fitted, and of the map fitted on them, on held-out rows
    intercept: np.ndarray
    alarm: np.ndarray  # that AUROC dropped, of held-out rows
    bound: np.ndarray  # of the difference from the first model, on tuning rows

    def less(self, control: int) -> np.ndarray:
        """Tuning less held-out AUROC (k, outcomes), of each less that of the control."""
        gap = self.tuning - self.held_out
        return gap - gap[control]


def control(store: Store, split: int) -> np.ndarray:
    """Predictions (outcomes, rows) of boosting with a number of trees that nothing has chosen."""
    values, labels, part = store.values(), store.labels(), store.splits()[:, split]
    found = []
    for y in labels.T:
        train = (part == "train") & ~np.isnan(y)
        model = HistGradientBoostingClassifier(
            learning_rate=RATE, max_iter=TREES, max_leaf_nodes=8, min_samples_leaf=20,
            max_features=0.5, early_stopping=False, random_state=0,
        )  # fmt: skip
        found.append(model.fit(values[train], y[train]).predict_proba(values)[:, 1])
    return np.array(found)


def see(
    config: Config, store: Store, p: np.ndarray, tuning: np.ndarray, held_out: np.ndarray
) -> Seen:
    """Judge predictions (k, outcomes, rows) on two sets of rows."""
    labels = store.labels()
    subjects = store.read("values", ["subject_id"])["subject_id"].to_numpy()
    shape = p.shape[:2]
    areas, slope, intercept = (np.full((2, *shape), np.nan) for _ in range(3))
    alarm, bound = np.empty(shape), np.empty(shape)
    for o, y in enumerate(labels.T):
        t, h = (rows & ~np.isnan(y) for rows in (tuning, held_out))
        for i, rows in enumerate((t, h)):
            areas[i, :, o] = auroc(y[rows], p[:, o, rows])
        for k in range(shape[0]):
            sure = Z95 * np.sqrt(1 + h.sum() / t.sum()) * delong(y[h], p[k, o, h]).se
            alarm[k, o] = areas[0, k, o] - areas[1, k, o] - sure > config.monitor.auroc_drop
            bound[k, o] = lowest(y[t], p[k, o, t], p[0, o, t])
    for k in {0, int(areas[0, :-1].mean(axis=1).argmax()), shape[0] - 1}:
        for o, y in enumerate(labels.T):
            t, h = (rows & ~np.isnan(y) for rows in (tuning, held_out))
            slope[0, k, o], intercept[0, k, o] = calibrated(y[t], p[k, o, t], subjects[t])
            mapped = CalibrationMap.fit(y[t], p[k, o, t])(p[k, o, h])
            slope[1, k, o], intercept[1, k, o] = calibration(y[h], mapped)
    return Seen(*areas, slope, intercept, alarm, bound)


def bootstrapped(y: np.ndarray, p: np.ndarray, rng: np.random.Generator, draws: int) -> float:
    """Optimism of the best of p (k, outcomes, rows), by choosing on resampled tuning rows.

    Judged on the rows that were not drawn (I. Tsamardinos et al., Machine Learning 107:1895, 2018).
    """
    found = []
    for _ in range(draws):
        drawn = rng.integers(len(y), size=len(y))
        left = np.setdiff1d(np.arange(len(y)), drawn)
        areas = []
        for rows in (drawn, left):
            known = [rows[~np.isnan(y[rows, o])] for o in range(y.shape[1])]
            areas.append(np.mean([auroc(y[k, o], p[:, o, k]) for o, k in enumerate(known)], axis=0))
        best = areas[0].argmax()
        found.append(areas[0][best] - areas[1][best] - np.mean(areas[0] - areas[1]))
    return float(np.mean(found))


def show_real(config: Config, splits: int, seeds: int, mends: int, draws: int, trials: int) -> None:
    train = config.train.model_copy(update={"seeds": seeds})
    dealt = config.splits.model_copy(update={"repeats": max(splits, DEALT)})
    config = config.model_copy(update={"train": train, "splits": dealt})
    store = Store(ingest(config))
    parts, labels = store.splits(), store.labels()
    half = halves(store)
    whole, crossed, corrected, related = [], [], [], []
    rng = np.random.default_rng(0)
    for s in range(splits):
        tuning, held_out = parts[:, s] == "tuning", parts[:, s] == "held_out"
        base = control(store, s)[None]
        p = np.concatenate([train_all(config, store, s).mean(axis=2), base])
        whole.append(see(config, store, p, tuning, held_out))
        corrected.append(bootstrapped(labels[tuning], p[:-1][..., tuning], rng, draws))
        for o, y in enumerate(labels.T):
            z = logit(np.clip(p[:-1, o, tuning & (y == 0)], CLIP, 1 - CLIP))
            related.append(np.corrcoef(norm.ppf((rankdata(z, axis=1) - 0.5) / z.shape[1])))
        for part in (0, 1) if s < mends else ():
            stopped = Half(store.path, part)
            q = np.concatenate([train_all(config, stopped, s).mean(axis=2), base])
            stops, judges = tuning & (half == part), tuning & (half != part)
            crossed.append(
                (s, see(config, store, q, stops, held_out), see(config, store, q, judges, held_out))
            )
    every, last = len(comparisons(config)), len(comparisons(config))
    gaps = np.array([seen.less(last)[:every] for seen in whole])  # (splits, comparisons, outcomes)
    on_tuning = np.array([seen.tuning[:every] for seen in whole])

    def line(name: str, values: np.ndarray) -> list[str]:
        """Of values (splits, outcomes)."""
        return [name, told(values.mean(axis=1)), *(told(v) for v in values.T)]

    def chosen(by_split: np.ndarray, of: np.ndarray) -> np.ndarray:
        """Values (splits, outcomes) of the comparison (splits,) that was chosen."""
        return of[np.arange(len(of)), by_split]

    best = on_tuning.mean(axis=2).argmax(axis=1)  # (splits,), over all outcomes
    each = on_tuning.argmax(axis=1)  # (splits, outcomes)
    raw = np.array([seen.tuning - seen.held_out for seen in whole])
    lines = [line("control, nothing taken off", raw[:, last])]
    lines += [line(name, gaps[:, places].mean(axis=1)) for name, places in kinds(config).items()]
    lines += [
        line("all: stopping alone", gaps.mean(axis=1)),
        line(f"best of {every} by mean AUROC", chosen(best, gaps)),
        line("… more than the mean of all: the choice", chosen(best, gaps) - gaps.mean(axis=1)),
        line(
            f"best of {every} for each outcome",
            np.take_along_axis(gaps, each[:, None], axis=1)[:, 0],
        ),
        line(
            "best's tuning difference from the first, less held-out",
            chosen(best, gaps) - gaps[:, 0],
        ),
    ]
    head = ["AUROC on tuning rows less held-out rows, less the control's", "mean", *store.diseases]
    correlation = np.mean(related, axis=0)
    pairs = correlation[np.triu_indices(every, 1)]
    print_table(
        f"{config.dataset}: {splits} splits, {seeds} seeds, mean ± standard error over splits; "
        f"log-odds of controls correlate by {np.mean(pairs):.2f} between comparisons",
        head,
        lines,
    )
    bounds = np.array([seen.bound[:every] for seen in whole])
    alarms = np.array([seen.alarm for seen in whole])
    rows = [
        ["choice's optimism, bootstrapped from tuning rows", told(corrected)],
        ["AUROC-drop alarms on held-out rows, all comparisons", f"{alarms[:, :every].mean():.1%}"],
        ["AUROC-drop alarms on held-out rows, control", f"{alarms[:, last].mean():.1%}"],
        ["best called better than the first", f"{(chosen(best, bounds) > 0).mean():.0%}"],
    ]
    for name in ("slope", "intercept"):
        both = np.array([getattr(seen, name) for seen in whole])  # (splits, 2, k, outcomes)
        for which, values in (
            ("first", both[:, :, 0]),
            ("best", np.stack([chosen(best, both[:, i, :every]) for i in (0, 1)], axis=1)),
            ("control", both[:, :, last]),
        ):
            t, h = np.nanmean(values, axis=2).T
            rows.append([f"calibration {name}, {which}: tuning", told(t, ".3f")])
            rows.append([f"calibration {name}, {which}: held-out", told(h, ".3f")])
    print_table(f"{config.dataset}: what follows", ["", "mean"], rows)
    cases = [
        Case(f"{every - 1}, correlated so, by the mean of {k}", correlation, k) for k in (1, 5)
    ]
    show_promotion(config, cases, trials)
    if crossed:
        show_mends(config, store, whole, crossed, best)


def show_mends(
    config: Config,
    store: Store,
    whole: list[Seen],
    crossed: list[tuple[int, Seen, Seen]],
    best: np.ndarray,
) -> None:
    """Stopped and chosen on one half of the tuning rows, judged on the other."""
    every = len(comparisons(config))
    judged, cost, cost_of_best, choice = [], [], [], []
    for split in sorted({s for s, _, _ in crossed}):
        pairs = [(stops, judges) for s, stops, judges in crossed if s == split]
        judged.append(
            np.mean([judges.less(every)[:every] for _, judges in pairs], axis=0).mean(axis=0)
        )
        held_out = whole[split].held_out
        cost.append(
            np.mean([j.held_out[:every] - held_out[:every] for _, j in pairs], axis=0).mean(axis=0)
        )
        picks = [stops.tuning[:every].mean(axis=1).argmax() for stops, _ in pairs]
        choice.append(
            np.mean([j.less(every)[k] for (_, j), k in zip(pairs, picks, strict=True)], axis=0)
        )
        picked = [j.held_out[k] for (_, j), k in zip(pairs, picks, strict=True)]
        cost_of_best.append(np.mean(picked, axis=0) - held_out[best[split]])
    print_table(
        "Halves: stopped and chosen on one, judged on the other (mean of both ways)",
        ["AUROC", "mean", *store.diseases],
        [
            [name, told(np.mean(values, axis=1)), *(told(v) for v in np.transpose(values))]
            for name, values in (
                ("judging half less held-out, all comparisons", judged),
                ("judging half less held-out, chosen on the other", choice),
                ("held-out, stopped on a half less on the whole", cost),
                ("held-out of the chosen, by a half less by the whole", cost_of_best),
            )
        ],
    )


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", help="such as configs/nafld.yaml")
    add("--data", type=Path, help="data_root, as for ehr-sn")
    parts = ["noise", "promotion", "real"]
    add("--parts", nargs="+", default=parts, choices=parts)
    add("--sizes", type=int, nargs="+", default=[600, 2000], help="rows of noise")
    add("--outcomes", type=int, default=4, help="outcomes of each table of noise")
    add("--draws", type=int, default=100, help="sets of scores drawn for promotion")
    add("--splits", type=int, default=3, help="random splits of the configuration's data")
    add("--seeds", type=int, default=1, help="networks a comparison on the configuration's data")
    add("--bootstrap", type=int, default=10, help="draws to correct the choice by")
    add("--mends", type=int, default=0, help="splits whose tuning rows are halved as well")
    add("--seed", type=int, default=0, help="of the noise")
    args = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)
    config = load_config(args.config)
    if args.data:
        config = config.model_copy(update={"data_root": args.data.absolute()})
    if "noise" in args.parts:
        show_noise(config, args.sizes, args.outcomes, args.seed)
    if "promotion" in args.parts:
        every = len(comparisons(config))
        cases = [
            Case("1", alike(2)),
            Case(f"{every}", alike(1 + every)),
            Case(f"{every}, champion chosen likewise", alike(2 * every), chosen_champion=True),
        ]
        show_promotion(config, cases, args.draws)
    if "real" in args.parts:
        show_real(config, args.splits, args.seeds, args.mends, args.bootstrap, args.draws)


if __name__ == "__main__":
    main()
