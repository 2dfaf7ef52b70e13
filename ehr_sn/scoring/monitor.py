"""Profile of scores (+ labels that have arrived) → how far patients and model drifted, alarms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logit

from ehr_sn import __version__, tracking
from ehr_sn.config import SMALLEST_GROUP, Config, Monitor
from ehr_sn.errors import DataError
from ehr_sn.evaluate.metrics import CLIP, calibration
from ehr_sn.evaluate.report import templates
from ehr_sn.evaluate.small_cells import shown_share
from ehr_sn.evaluate.statistics import delong
from ehr_sn.scoring.outcomes import Outcomes, is_store, read_outcomes, told
from ehr_sn.scoring.profile import PROFILE
from ehr_sn.scoring.registry import told as registry_faults

SURE = 1.96  # standard errors


@dataclass(frozen=True)
class Drift:
    """One thing that is watched.

    `then` is what it was at the training, on training or tuning rows, and `now` what it is in these
    scores; None where there is nothing to compare with. `by` is how far they differ, in the terms
    of `limit`; with `alarm`, further than that and than chance explains.
    """

    what: str
    where: str
    then: float | None
    now: float | None
    by: float
    limit: float
    alarm: bool

    def __str__(self) -> str:
        name = f"{self.what} of {self.where}" if self.where else self.what
        values = "" if self.now is None else f": {_short(self.then)} → {_short(self.now)}"
        return f"{name}{values} (differs by {self.by:.3f}, limit {self.limit:g})"


@dataclass(frozen=True)
class Monitored:
    """What was found in one folder of scores. `outcomes` is by disease, where labels are known.

    `unused` counts, by reason, the rows of a table of labels that could not be used.
    """

    summary: dict[str, Any]
    drifts: tuple[Drift, ...]
    outcomes: dict[str, dict[str, float]]
    unused: dict[str, int]
    smallest_cell: int

    @cached_property
    def alarms(self) -> list[Drift]:
        """The furthest beyond its limit first."""
        return sorted((d for d in self.drifts if d.alarm), key=lambda d: -d.by / d.limit)

    @property
    def warnings(self) -> list[str]:
        """What is to be said of the labels where everybody may read it: without small counts."""
        return told(self.unused, self.smallest_cell)

    def as_dict(self) -> dict[str, Any]:
        return {
            "fingerprint": self.summary["fingerprint"],
            "scored_at": self.summary["scored_at"],
            "rows": self.summary["rows"],
            "models": self.summary["models"],
            "alarms": [str(drift) for drift in self.alarms],
            "drifts": [asdict(drift) for drift in self.drifts],
            "outcomes": self.outcomes,
            "warnings": self.warnings,
        }

    def metrics(self) -> dict[str, float]:
        """For MLflow: of each thing watched how far it has drifted, and what it is now."""
        values: dict[str, float] = {"alarms": len(self.alarms), "rows": self.summary["rows"]}
        for drift in self.drifts:
            name = "/".join(filter(None, (drift.what.replace(" ", "_"), drift.where)))
            values[f"drift_{name}"] = drift.by
        for disease, outcome in self.outcomes.items():
            values |= {f"{name}/{disease}": value for name, value in outcome.items()}
        return {name: value for name, value in values.items() if np.isfinite(value)}


def monitor(config: Config, scores: Path, labels: Path | None = None) -> Monitored:
    """Compare a folder of scores with what its models were trained on.

    Parameters
    ----------
    scores : a folder that `score` has made
    labels : outcomes that have become known since: a store, or a table (Parquet or CSV) with the
        columns subject_id (the source's id, also where the scores have pseudonyms),
        prediction_time (ISO 8601, without an offset in UTC; not read in a data set without
        prediction times), disease and label (1, 0, true, false, or empty). A row that cannot be
        used is counted.

    Notes
    -----
    Distributions are compared by the population stability index over the training's deciles,
    PSI = Σ (q − p) ln(q / p). Of rows from the same distribution it is (bins − 1)(1/n + 1/m) on
    average (B. Yurdakul, Statistical properties of population stability index, 2018), which is
    taken off before it is held against its limit. Rates, AUROC and calibration raise an alarm where
    their 95 % interval lies beyond the limit.

    Raises
    ------
    DataError
        There are no scores, too few rows of them, or a table's labels belong to none.
    """
    profile = _read(scores)
    rule = config.monitor
    now, then = profile["now"], profile["then"]
    if now["rows"] < rule.min_rows:
        raise DataError(
            f"{scores}: holds {now['rows']:,} rows, fewer than monitor.min_rows ({rule.min_rows}): "
            "too few to judge"
        )
    smallest = config.privacy.smallest_cell
    outcomes: dict[str, dict[str, float]] = {}
    unused: dict[str, int] = {}
    if labels is not None:
        known = read_outcomes(config, scores, labels)
        outcomes, unused = _by_disease(known), known.unused
        if not outcomes and not is_store(labels):  # of which it is not said that they are of these
            reasons = "".join(f"\n  {said}" for said in told(unused, smallest))
            raise DataError(
                f"{labels}: no disease has {SMALLEST_GROUP} labels of either class among these "
                f"scores{reasons}"
            )
    drifts = [
        *_missing_rates(rule, now, then["training"]),
        *_distributions(rule, now, then),
        *_codes(rule, now, then["training"]),
        *_performance(rule, outcomes, then["figures"]),
    ]
    summary = json.loads((scores / "summary.json").read_text())
    return Monitored(summary, tuple(drifts), outcomes, unused, smallest)


def monitor_and_record(
    config: Config, scores: Path, labels: Path | None, output: Path
) -> tuple[Monitored, list[Path]]:
    """As `monitor`, of the newest scores; with a page below `output`, and on record in MLflow.

    Raises
    ------
    DataError
        As `monitor`.
    EhrSnError
        MLflow cannot be reached.
    """
    found = monitor(config, newest_scores(scores), labels)
    files = write_page(config, found, output)
    with registry_faults():
        tracking.log_monitoring(config, found.as_dict() | {"metrics": found.metrics()}, files)
    return found, files


def write_page(config: Config, found: Monitored, folder: Path) -> list[Path]:
    """Write `monitoring.html` and `monitoring.json` into the folder; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "monitoring.html", folder / "monitoring.json"
    template = templates().get_template("monitor.html.j2")
    page.write_text(template.render(config=config, found=found, version=__version__))
    data.write_text(json.dumps(found.as_dict(), indent=2) + "\n")
    return [page, data]


def newest_scores(folder: Path) -> Path:
    """The newest of the folders of scores below a folder, or the folder itself if it is one.

    Raises
    ------
    DataError
        There is none.
    """
    if (folder / PROFILE).is_file():
        return folder
    moments = {
        path.parent: json.loads((path.parent / "summary.json").read_text())["scored_at"]
        for path in folder.glob(f"*/{PROFILE}")
    }
    if not moments:
        raise DataError(f"{folder}: holds no scores; run `ehr-sn score CONFIG --output {folder}`")
    return max(moments, key=lambda path: moments[path])


def psi(now: ArrayLike, then: ArrayLike) -> float:
    """Population stability index of two lists of shares; a share of 0 counts as 1 in 10,000.

    >>> psi([0.5, 0.5], [0.5, 0.5])
    0.0
    >>> round(psi([0.2, 0.8], [0.5, 0.5]), 4)
    0.4159
    """
    q, p = (np.maximum(np.asarray(shares, dtype=np.float64), 1e-4) for shares in (now, then))
    return float(((q - p) * np.log(q / p)).sum())


def _missing_rates(rule: Monitor, now: dict[str, Any], then: dict[str, Any]) -> Iterator[Drift]:
    rows = now["rows"]
    for feature, missing in now["missing"].items():
        before = then["missing_rate"][feature]
        after = shown_share(missing / rows, rows, SMALLEST_GROUP)  # as `before` was made
        by = abs(after - before)
        chance = SURE * np.sqrt(before * (1 - before) * (1 / rows + 1 / then["rows"]))
        yield Drift(
            "missing rate", feature, before, after, by, rule.missing_rate,
            bool(by - chance > rule.missing_rate),
        )  # fmt: skip


def _distributions(rule: Monitor, now: dict[str, Any], then: dict[str, Any]) -> Iterator[Drift]:
    training = then["training"]
    yield from _shifted(rule, "observed entries", "", now["observed"], training["observed"])
    for feature, counts in now["values"].items():
        yield from _shifted(rule, "values", feature, counts, training["values"][feature])
    for disease, counts in now["scores"].items():
        yield from _shifted(rule, "scores", disease, counts, then["scores"][disease])


def _shifted(
    rule: Monitor, what: str, where: str, counts: list[int], then: dict[str, Any]
) -> Iterator[Drift]:
    """Nothing where either side has too few values to tell."""
    n = sum(counts)
    if len(counts) < 2 or n < SMALLEST_GROUP:
        return
    by_chance = (len(counts) - 1) * (1 / n + 1 / then["rows"])
    by = max(psi(np.array(counts) / n, then["shares"]) - by_chance, 0.0)
    yield Drift(what, where, None, None, by, rule.psi, by > rule.psi)


def _codes(rule: Monitor, now: dict[str, Any], then: dict[str, Any]) -> Iterator[Drift]:
    """Codes of many events that are new, or gone; by their share of their table's events."""
    known = then.get("codes")
    if known is None:  # the model was trained before codes were kept, or on a wide table
        return
    for table, counts in now["codes"].items():
        before = known.get(table, {"events": 0, "codes": {}})
        for code in sorted(counts["codes"].keys() | before["codes"].keys()):
            then_share = before["codes"].get(code, 0) / max(before["events"], 1)
            now_share = counts["codes"].get(code, 0) / max(counts["events"], 1)
            if then_share and now_share:
                continue
            what = "new code" if now_share else "vanished code"
            by = max(then_share, now_share)
            yield Drift(
                what, f"{table}: {code}", then_share, now_share, by, rule.code_share,
                by > rule.code_share,
            )  # fmt: skip


def _performance(
    rule: Monitor, outcomes: dict[str, dict[str, float]], figures: dict[str, dict[str, float]]
) -> Iterator[Drift]:
    """What it was is known only as well as the tuning rows tell: they widen the interval."""
    for disease, now in outcomes.items():
        tuning = figures[disease]
        sure = SURE * np.sqrt(1 + now["n"] / tuning["n"])
        for name, then, limit in (
            ("auroc", tuning["auroc"], rule.auroc_drop),
            ("calibration_slope", 1.0, rule.calibration_slope),
            ("calibration_intercept", 0.0, rule.calibration_intercept),
        ):
            by = then - now[name] if name == "auroc" else abs(now[name] - then)
            what = "AUROC" if name == "auroc" else name.replace("_", " ")
            alarm = bool(by - sure * now[f"{name}_se"] > limit)
            yield Drift(what, disease, then, now[name], by, limit, alarm)


def _by_disease(known: Outcomes) -> dict[str, dict[str, float]]:
    """Judge how well the scores have foretold each disease that has labels of both classes."""
    found = {}
    for disease in np.unique(known.disease):
        of_it = known.disease == disease
        y, p = known.positive[of_it], known.probability[of_it]
        if min(y.sum(), (~y).sum()) >= SMALLEST_GROUP:
            found[str(disease)] = _judged(y, p)
    return found


def _judged(y: NDArray[np.bool_], p: NDArray[np.float64]) -> dict[str, float]:
    area, found = delong(y, p), calibration(y, p)
    lp = logit(np.clip(p, CLIP, 1 - CLIP))
    weight = p * (1 - p)  # of a calibrated model: what the alarm is to be told from
    centred = lp - np.average(lp, weights=weight)
    return {
        "n": float(len(y)),
        "n_positive": float(y.sum()),
        "mean_prediction": float(p.mean()),
        "observed_rate": float(y.mean()),
        "auroc": area.value,
        "auroc_se": area.se,
        "auroc_ci_low": area.ci_low,
        "auroc_ci_high": area.ci_high,
        "calibration_slope": found.slope,
        "calibration_slope_se": float((weight * centred**2).sum() ** -0.5),
        "calibration_intercept": found.intercept,
        "calibration_intercept_se": float(weight.sum() ** -0.5),
    }


def _read(scores: Path) -> dict[str, Any]:
    try:
        profile: dict[str, Any] = json.loads((scores / PROFILE).read_text())
    except FileNotFoundError:
        raise DataError(
            f"{scores}: holds no scores to monitor; name a folder that `ehr-sn score` has made"
        ) from None
    return profile


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
