"""Measure how far each method stays below the best AUROC that the observed entries allow.

Rows are independent. Behind the 20 features stand standard normal values z in five panels, with
correlations of 0.6 within a panel and 0.2 between; the outcome has the risk σ(α + β·z). Each
feature is an increasing function of its own z (some have a mean of 2 or 4, some are lognormal): to
know the one is to know the other, and the optimum does not depend on the scale of a feature.

Given the observed entries the linear predictor is normal, its mean and variance are in closed
form, and the Bayes-optimal risk is the mean of σ over it (Gauss-Hermite). That is the optimum while
missingness is ignorable (D. B. Rubin, Biometrika 63:581, 1976): `mcar`; `mar`, given the driver,
which is always observed; and `visits`, where each row has a rate of its own from U(0, 0.9), which
depends on nothing. Under `mnar` absence is telling, and this is the best of those who ignore why
entries are missing (`ignoring` below); the optimum, which knows the mechanism, is had there by
weighting draws of what is missing with the chance that they would be lost.

Every AUROC is the expected one: each test row counts as a case by its true risk and as a control
by the rest, which leaves out the chance of drawing outcomes. Rows lose entries alike in training,
tuning and test. Methods are cells of the project (`train_cell`): fitted on training rows, stopped
early on tuning rows, predictions averaged over seeds. Printed are shortfalls in thousandths of
AUROC, and how much the predicted log-odds change per standard deviation of the number of observed
entries, beside that of the optimum (`diagnostics.sparsity_bias`).

    python benchmarks/simulated_truth.py
    python benchmarks/simulated_truth.py --mechanisms visits --tables 5 --methods standard/zero
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from scipy.special import expit, ndtr
from sklearn.metrics import roc_auc_score

from ehr_sn.config import SPLITS, Config, load_config
from ehr_sn.evaluate.diagnostics import sparsity_bias
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.missing.amputate import Amputation
from ehr_sn.models.baselines import BASELINES
from ehr_sn.models.train import NOTHING, Cell, read_cell, train_cell

FEATURES, PANEL = 20, 4
SPREAD, ALPHA = 1.6, -1.4
"""Standard deviation of the linear predictor, and its mean: a quarter of all rows are cases."""

MEAN_RATE = 0.45
"""Of `visits`, U(0, 0.9), and of the equal rates that it is compared with."""

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(41)

COMPARISONS = [
    "standard/zero",
    "standard/sparsity_normalization",
    "standard/sparsity_normalization_sqrt",
    "standard/zero+mask",
    "standard/sparsity_normalization+mask",
    "standard/mice",
    "standard/softimpute",
    "standard/knn",
    "standard/neumiss",
    "standard/gmm",
    "minmax/zero",
    "minmax/sparsity_normalization",
    "minmax/zero+mask",
    "none/zero",
    "none/sparsity_normalization",
    "none/zero+mask",
    "logistic_regression",
    "hist_gradient_boosting",
]
SLOPES = [
    f"{s}/{m}" for s in ("standard", "minmax", "none") for m in ("zero", "sparsity_normalization")
]


def correlation() -> np.ndarray:
    """(D, D), of z."""
    panel = np.arange(FEATURES) // PANEL
    return np.where(panel[:, None] == panel, 0.6, 0.2) + 0.4 * np.eye(FEATURES)


def effects() -> np.ndarray:
    """β (D,): unequal, every fifth negative."""
    j = np.arange(FEATURES)
    beta = np.where(j % 5 == 4, -1.0, 1.0) / (1 + (7 * j + 10) % FEATURES)
    return SPREAD * beta / np.sqrt(beta @ correlation() @ beta)


@dataclass(frozen=True)
class Rows:
    """Complete rows: z and x (n, D), true risk and outcome (n,)."""

    z: np.ndarray
    x: np.ndarray
    risk: np.ndarray
    y: np.ndarray

    @classmethod
    def draw(cls, n: int, seed: int) -> "Rows":
        rng = np.random.default_rng(seed)
        z = rng.standard_normal((n, FEATURES)) @ np.linalg.cholesky(correlation()).T
        x = z + np.tile([0.0, 4.0, 0.0, 2.0], FEATURES // 4)
        x[:, 2::4] = np.exp(0.6 * z[:, 2::4])
        risk = expit(ALPHA + z @ effects())
        return cls(z, x, risk, rng.random(n) < risk)


def linear_predictor(z: np.ndarray, observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (n,) of α + β·z given the observed entries of each row."""
    R, beta = correlation(), effects()
    m = observed.astype(float)
    # A missing entry stands alone, and tells nothing: its row of the system is the identity's.
    system = R * m[:, :, None] * m[:, None, :] + np.eye(FEATURES) * (1 - m)[:, :, None]
    covariance = m * (R @ beta)
    w = np.linalg.solve(system, covariance[..., None])[..., 0]
    return ALPHA + (w * m * z).sum(1), beta @ R @ beta - (w * covariance).sum(1)


def bayes_risk(z: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """P(y = 1 | observed entries) (n,), why entries are missing being ignored."""
    mean, variance = linear_predictor(z, observed)
    at = mean[:, None] + np.sqrt(np.maximum(variance, 0))[:, None] * NODES
    return expit(at) @ WEIGHTS / WEIGHTS.sum()


def bayes_risk_mnar(
    z: np.ndarray, observed: np.ndarray, rate: float, draws: int = 4000
) -> np.ndarray:
    """The same (n,) where it is known that `Amputation("mnar", rate)` removed what is missing.

    Importance sampling: prior draws are moved onto what a row shows (J. P. Chilès, P. Delfiner,
    Geostatistics, 2012, on conditioning by kriging), and each weighs its chance of being lost.
    """
    R, beta = correlation(), effects()
    prior = np.random.default_rng(0).standard_normal((draws, FEATURES)) @ np.linalg.cholesky(R).T
    risk = np.empty(len(z))
    for i, (row, seen) in enumerate(zip(z, observed, strict=True)):
        onto = np.linalg.solve(R[np.ix_(seen, seen)], R[np.ix_(seen, ~seen)])
        drawn = prior[:, ~seen] + (row[seen] - prior[:, seen]) @ onto
        rank = ndtr(drawn)
        lost = 2 * rate * rank if rate <= 0.5 else 1 - 2 * (1 - rate) * (1 - rank)
        weight = lost.prod(axis=1)
        risks = expit(ALPHA + row[seen] @ beta[seen] + drawn @ beta[~seen])
        risk[i] = weight @ risks / weight.sum()
    return risk


def expected_auroc(risk: np.ndarray, score: np.ndarray) -> float:
    """AUROC of `score` where each row is a case with weight `risk` and a control with the rest."""
    y = np.repeat([1, 0], len(risk))
    weight = np.concatenate([risk, 1 - risk])
    return float(roc_auc_score(y, np.tile(score, 2), sample_weight=weight))


def lose(mechanism: str, rate: float, x: np.ndarray, train: np.ndarray, seed: int) -> np.ndarray:
    """x with NaN for what is lost; `train` (n,) says from which rows a mechanism learns ranks."""
    if mechanism == "visits":
        rng = np.random.default_rng(seed)
        rates = 2 * rate * rng.random((len(x), 1))
        return np.where(rng.random(x.shape) < rates, np.nan, x)
    return Amputation(mechanism, rate, seed=seed).fit(x[train])(x)


def make_store(
    folder: Path, x: np.ndarray, y: np.ndarray, split: np.ndarray, train: dict
) -> tuple[Config, Store]:
    """A wide table of x, and what the project makes of it."""
    names = [f"x{j:02}" for j in range(x.shape[1])]
    table = pd.DataFrame(x, columns=names).assign(row=range(len(x)), y=y.astype(int), split=split)
    table.to_parquet(folder / "rows.parquet", index=False)
    content = {
        "dataset": "truth",
        "data_dir": str(folder / "data"),
        "tables": {"rows": {"path": "rows.parquet"}, "parts": {"path": "rows.parquet"}},
        "cohort": {"table": "rows", "subject_id": "row"},
        "features": {"columns": {"rows": names}},
        "labels": {"outcome": {"positive": "y == 1", "negative": "y == 0"}},
        "splits": {"table": "parts"},
        "train": train,
    }
    (folder / "truth.yaml").write_text(yaml.safe_dump(content))
    config = load_config(folder / "truth.yaml")
    store = Store(ingest(config))
    if not np.array_equal(store.labels()[:, 0], y):
        raise AssertionError("the store's rows are in another order")
    return config, store


@dataclass(frozen=True)
class Outcome:
    """On the test rows: the optimum, and by comparison the shortfall and the slope of log-odds."""

    bound: float
    bound_slope: float
    shortfall: dict[str, float]
    slope: dict[str, float]


def measure(
    comparisons: list[str],
    mechanism: str,
    rate: float,
    sizes: tuple[int, int, int],
    seed: int = 0,
    **train: object,
) -> Outcome:
    """Train and judge `comparisons` ("scaler/method", or a baseline) on one drawn table.

    `sizes` are rows to train, to tune and to test on; `train` goes into the configuration.
    """
    split = np.repeat(SPLITS, sizes)
    rows = Rows.draw(len(split), seed)
    x = lose(mechanism, rate, rows.x, split == "train", seed)
    test = split == "held_out"
    observed = ~np.isnan(x[test])
    risk, ignoring = rows.risk[test], bayes_risk(rows.z[test], observed)
    best = ignoring
    if mechanism == "mnar":
        best = bayes_risk_mnar(rows.z[test], observed, rate)
    bound, number = expected_auroc(risk, best), observed.sum(1)
    shortfall, slope = {"ignoring": bound - expected_auroc(risk, ignoring)}, {}
    with tempfile.TemporaryDirectory(prefix="truth-") as folder:
        given = {"device": "cpu", "architectures": {"mlp": {}}} | train
        config, store = make_store(Path(folder), x, rows.y, split, given)
        for name in comparisons:
            scaler, _, method = name.rpartition("/")
            cell = Cell(method, scaler, "mlp", 0)
            if name in BASELINES:
                cell = Cell(NOTHING, NOTHING, name, 0)
            p = read_cell(train_cell(config, store, cell), store).held_out["outcome"].ensemble
            shortfall[name] = bound - expected_auroc(risk, p)
            slope[name] = sparsity_bias([(rows.y[test], p, number)]).slope
    best_slope = sparsity_bias([(rows.y[test], best, number)]).slope
    return Outcome(bound, best_slope, shortfall, slope)


def print_table(title: str, cases: list[str], lines: dict[str, list[str]]) -> None:
    """One line a comparison, one column a case, as Markdown."""
    print(f"\n{title}\n")
    print("| |", " | ".join(cases), "|")
    print("|---" * (len(cases) + 1) + "|")
    for name, cells in lines.items():
        print(f"| {name} |", " | ".join(cells), "|")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    mechanisms = ["mcar", "mar", "mnar", "visits"]
    add("--mechanisms", nargs="+", default=mechanisms, choices=mechanisms)
    add("--rates", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7], help="not of visits")
    add("--methods", nargs="+", default=COMPARISONS, help="scaler/method, or a baseline")
    add("--tables", type=int, default=1, help="tables to draw, of which the mean is taken")
    add("--seeds", type=int, default=3)
    add("--sizes", type=int, nargs=3, default=[6000, 2000, 10_000], help="train, tuning, test")
    args = parser.parse_args()

    cases = [(m, rate) for m in args.mechanisms if m != "visits" for rate in args.rates]
    if "visits" in args.mechanisms:
        cases += [("visits", MEAN_RATE), ("mcar", MEAN_RATE)]
    found = []
    for mechanism, rate in cases:
        print(f"{mechanism} {rate:.0%}", file=sys.stderr, flush=True)
        found.append(
            [
                measure(args.methods, mechanism, rate, args.sizes, seed, seeds=args.seeds)
                for seed in range(args.tables)
            ]
        )

    def across(value, form: str) -> list[str]:
        """The mean over tables in each case, and with several tables ± their standard deviation."""
        drawn = [[value(outcome) for outcome in outcomes] for outcomes in found]
        spread = [f" ± {np.std(v, ddof=1):{form.lstrip('+')}}" if len(v) > 1 else "" for v in drawn]
        return [f"{np.mean(v):{form}}{sd}" for v, sd in zip(drawn, spread, strict=True)]

    names = [f"{mechanism} {rate:.0%}" for mechanism, rate in cases]
    optimum = {"optimal AUROC": across(lambda o: o.bound, ".3f")}
    short = {
        m: across(lambda o, m=m: 1000 * o.shortfall[m], ".1f") for m in ["ignoring", *args.methods]
    }
    print_table("Shortfall from the optimum, thousandths of AUROC", names, optimum | short)
    steep = {"optimum": across(lambda o: o.bound_slope, "+.2f")}
    steep |= {m: across(lambda o, m=m: o.slope[m], "+.2f") for m in args.methods if m in SLOPES}
    print_table("Predicted log-odds per sd of the number of observed entries", names, steep)


if __name__ == "__main__":
    main()
