"""Measure how often monitoring raises an alarm where nothing has drifted, and where something has.

Rows are simulated of one known kind: in every ten features five lab values of one panel, each
measured in 70 % of the rows; two flags, of 30 % and of 0.3 % of the rows; a count with 90 % zeros;
a flag that is never set; and a value that 3 % of the rows have. Two diseases are scored, with
labels drawn from the scores themselves, so that the models are calibrated. A training profile is
made of `--training` rows, and the profile of the scores of a tenth as many; nights are counted and
compared as `ehr-sn score` and `ehr-sn monitor` do, with the default limits; every 20 nights there
is a new training. Of the nights of a row of the table it says how many

- false: have any alarm, where nothing has drifted (wanted: at most `monitor.false_alarms`, 0.02);
  also where each subject has four rows that are all alike, without labels
- shift: have an alarm of the values of the lab value whose mean has moved by half a standard
  deviation
- unit: likewise, where a lab value is given in another unit, 18 times as small
- panel: have an alarm of the missing rate of a lab value whose panel is no longer sent

with 95 % intervals (Wilson).
"""

import argparse
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.special import expit
from scipy.stats import binomtest

from ehr_sn.config import Monitor
from ehr_sn.evaluate.metrics import Sample
from ehr_sn.evaluate.statistics import delong
from ehr_sn.scoring.monitor import compare, judged
from ehr_sn.scoring.profile import Profile, expected
from ehr_sn.scoring.reference import bins, reference

KINDS = ("false", "false, 4 rows a subject", "shift", "unit", "panel")
NIGHTS_OF_A_TRAINING = 20
LAB = "x0"  # the value that drifts
Rows = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"type": lambda text: int(float(text)), "nargs": "+", "metavar": "N"}
    parser.add_argument("--rows", default=[50, 200, 1000, 100_000], help="a night", **numbers)
    parser.add_argument("--features", default=[30, 160], **numbers)
    parser.add_argument("--nights", type=int, default=1000, help="without drift (default: 1000)")
    parser.add_argument("--drifted", type=int, default=200, help="with drift (default: 200)")
    parser.add_argument("--training", type=int, default=10_000, help="rows (default: 10000)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    table = Table("rows a night", "features", *args.kinds)
    for features in args.features:
        for rows in args.rows:
            found = [f"{rows:,}", str(features)]
            for kind in args.kinds:
                nights = args.nights if kind.startswith("false") else args.drifted
                rng = np.random.default_rng([args.seed, features, rows, KINDS.index(kind)])
                found.append(alarmed(rng, kind, rows, features, args.training, nights))
            table.add_row(*found)
    Console(width=150).print(table)


def alarmed(
    rng: np.random.Generator, kind: str, rows: int, features: int, training: int, nights: int
) -> str:
    """Share of nights with an alarm that counts, with its interval."""
    found = 0
    shown = Console(stderr=True)
    for night in track(range(nights), f"{features} × {rows:,} {kind}", console=shown):
        if night % NIGHTS_OF_A_TRAINING == 0:
            packages = trained(rng, features, training)
        alarms = one_night(rng, packages, kind, rows)
        what = {"panel": "missing rate"}.get(kind, "values")
        found += bool(alarms if kind.startswith("false") else (what, LAB) in alarms)
    low, high = binomtest(found, nights).proportion_ci(method="wilson")
    return f"{found / nights:.1%} ({low:.1%} to {high:.1%})"


def one_night(
    rng: np.random.Generator, packages: list[Any], kind: str, rows: int
) -> set[tuple[str, str]]:
    """What of what raises an alarm."""
    each = 4 if "4 rows" in kind else 1
    values = draw(rng, rows // each, len(packages[0].features))
    if kind == "shift":
        values[:, 0] += 0.5 * 15
    if kind == "unit":
        values[:, 0] /= 18
    if kind == "panel":
        values[:, :5] = np.nan
    subjects = np.repeat(np.arange(len(values)), each)
    values = np.repeat(values, each, axis=0)
    scores = probabilities(values)
    profile = Profile(packages)
    told = [SimpleNamespace(probability=p) for p in scores]
    profile.add(values, told, subjects)  # type: ignore[arg-type]
    outcomes = None
    if each == 1:
        outcomes = {}
        for package, p in zip(packages, scores, strict=True):
            y = rng.random(len(p)) < p
            if min(y.sum(), (~y).sum()) >= 11:
                outcomes[package.disease] = judged(Sample(y, p, subjects))
    now = profile.as_dict() | {"codes": {}}
    drifts, _ = compare(Monitor(), now, expected(packages), outcomes)
    return {(drift.what, drift.where) for drift in drifts if drift.alarm}


def trained(rng: np.random.Generator, features: int, rows: int) -> list[Any]:
    """What monitoring needs of the packages of two diseases."""
    names = [f"x{i}" for i in range(features)]
    training = reference(draw(rng, rows, features), names)
    packages = []
    for i, p in enumerate(probabilities(draw(rng, max(rows // 10, 500), features))):
        area = delong(rng.random(len(p)) < p, p)
        about = {
            "training": training,
            "scores": bins(p),
            "figures": {"n": area.n, "auroc": area.value},
        }
        told = {"features": names, "disease": f"disease {i}", "about": about, "reported": {}}
        packages.append(SimpleNamespace(**told))
    return packages


def draw(rng: np.random.Generator, rows: int, features: int) -> Rows:
    """Rows (rows, features); NaN = missing."""
    values = np.empty((rows, features), dtype=np.float32)
    for start in range(0, features, 10):
        panel = rng.random(rows) < 0.7
        level = rng.standard_normal(rows)
        block = values[:, start : start + 10]
        for i in range(5):
            noise = rng.standard_normal(rows)
            block[:, i] = np.where(panel, 100 + 15 * (0.6 * level + 0.8 * noise), np.nan)
        block[:, 5] = rng.random(rows) < 0.3
        block[:, 6] = rng.random(rows) < 0.003
        block[:, 7] = np.where(rng.random(rows) < 0.1, rng.geometric(0.3, rows), 0)
        block[:, 8] = 0
        block[:, 9] = np.where(rng.random(rows) < 0.03, rng.standard_normal(rows), np.nan)
    return values


def probabilities(values: Rows) -> list[NDArray[np.float64]]:
    """Scores of two diseases, of about 10 and 25 % of the rows."""
    lab = np.nan_to_num((values[:, 1].astype(np.float64) - 100) / 15)
    flag = values[:, 5].astype(np.float64)
    return [expit(-2.5 + lab + flag), expit(-1.3 + 0.7 * lab - flag)]


if __name__ == "__main__":
    main()
