"""Profile of scores (+ labels that have arrived) → how far patients and model drifted, alarms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logit
from scipy.stats import t as student

from ehr_sn import __version__, tracking
from ehr_sn.config import SMALLEST_GROUP, Config, Monitor
from ehr_sn.errors import DataError
from ehr_sn.evaluate.metrics import CLIP, Array, Sample, calibration, checked
from ehr_sn.evaluate.report import templates
from ehr_sn.evaluate.small_cells import shown_share
from ehr_sn.evaluate.statistics import delong
from ehr_sn.ingest.checks import MOST_CODES
from ehr_sn.scoring.chance import HIDDEN, effective, fisher, p_of_bins, p_of_share, worth
from ehr_sn.scoring.outcomes import Outcomes, is_store, read_outcomes, told
from ehr_sn.scoring.profile import PROFILE
from ehr_sn.scoring.registry import told as registry_faults
from ehr_sn.strict_json import plain

UNWEIGHTED = (
    "a table of labels does not tell who left before their window ended, and the ill are too many "
    "among the others: give a store as --labels"
)
ABOUT = 0.9  # of an approximate number of subjects, what there surely are


@dataclass(frozen=True)
class Drift:
    """One thing that is watched.

    what, where : of which feature, disease, or code of which table
    then, now : what it was at the training, on training or held-out rows, and is in these scores;
        None where there is nothing to compare with
    by, limit : how far they differ, and how far they may
    p : how often chance alone would make them differ so much or more; 1 where they do not differ
        beyond the limit, and so are not tested. It is not told anywhere: with it a small count
        could be reckoned
    level : below which p chance does not explain it
    """

    what: str
    where: str
    then: float | None
    now: float | None
    by: float
    limit: float
    p: float
    level: float

    @property
    def beyond_chance(self) -> bool:
        return bool(self.p < self.level)

    @property
    def alarm(self) -> bool:
        """Further than its limit, and than chance explains."""
        return bool(self.by > self.limit) and self.beyond_chance

    def __str__(self) -> str:
        name = f"{self.what} of {self.where}" if self.where else self.what
        values = "" if self.now is None else f": {_short(self.then)} → {_short(self.now)}"
        return f"{name}{values} (differs by {self.by:.3f}, limit {self.limit:g})"

    def as_dict(self) -> dict[str, Any]:
        names = ("what", "where", "then", "now", "by", "limit", "beyond_chance", "alarm")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Unwatched:
    """One thing that cannot be watched, and why."""

    what: str
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what} of {self.where}: {self.reason}" if self.where else self.reason


@dataclass(frozen=True)
class Monitored:
    """What was found in one folder of scores. `outcomes` is by disease, where labels are known.

    `known` says of a table of labels how many rows met a score, and why the others did not.
    """

    summary: dict[str, Any]
    drifts: tuple[Drift, ...]
    unwatched: tuple[Unwatched, ...]
    outcomes: dict[str, dict[str, float]]
    known: Outcomes | None
    smallest_cell: int

    @cached_property
    def alarms(self) -> list[Drift]:
        """The furthest beyond its limit first."""
        return sorted((d for d in self.drifts if d.alarm), key=lambda d: -d.by / d.limit)

    @property
    def warnings(self) -> list[str]:
        """What is to be said of the labels where everybody may read it: without small counts."""
        return self.said_of_labels(self.smallest_cell)

    def said_of_labels(self, smallest: int = 0) -> list[str]:
        """What is to be said of a table of labels, without counts below `smallest`."""
        known = self.known
        return told(known.rows, known.met, known.unused, smallest) if known and known.rows else []

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON holds it: None where a number is not known or not finite."""
        return plain(
            {
                "fingerprint": self.summary["fingerprint"],
                "scored_at": self.summary["scored_at"],
                "rows": self.summary["rows"],
                "models": self.summary["models"],
                "alarms": [str(drift) for drift in self.alarms],
                "drifts": [drift.as_dict() for drift in self.drifts],
                "unwatched": [vars(thing) for thing in self.unwatched],
                "outcomes": self.outcomes,
                "warnings": self.warnings,
            }
        )

    def metrics(self) -> dict[str, float]:
        """Return, for MLflow, how far each thing watched has drifted, and what it is now."""
        values: dict[str, float] = {
            "alarms": len(self.alarms),
            "rows": self.summary["rows"],
            "watched": len(self.drifts),
            "unwatched": len(self.unwatched),
        }
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
        prediction times), disease and label (1, 0, true, false, or empty). A row that meets no
        score is counted.

    Notes
    -----
    There is an alarm where the difference is beyond its limit and p below the level of a test. The
    level is `monitor.false_alarms` divided by how many things are watched: so many false alarms are
    expected on a page at most, whatever they have to do with each other (Bonferroni).

    Distributions differ by the population stability index over the training's bins,
    PSI = Σ (q − p) ln(q / p). Of rows from the same distribution it is (bins − 1)(1/n + 1/m) on
    average (B. Yurdakul, Statistical properties of population stability index, 2018), which is
    taken off. For p see `p_of_bins`, and for that of rates `p_of_share`. p of AUROC and calibration
    is that of Student's t with one degree of freedom less than the smaller class has subjects.

    Rows of one subject are not independent. All but AUROC and calibration are tested as if a
    subject's rows were all alike (`worth`), on both sides.

    Raises
    ------
    DataError
        There are no scores, too few rows of them, or the labels are refused (see `read_outcomes`)
        or belong to no score.
    """
    profile = _read(scores)
    rule = config.monitor
    now, then = profile["now"], profile["then"]
    if now["rows"] < rule.min_rows:
        raise DataError(
            f"{scores}: holds {now['rows']:,} rows, fewer than monitor.min_rows ({rule.min_rows}): "
            "too few to judge"
        )
    outcomes: dict[str, dict[str, float]] = {}
    known = None if labels is None else read_outcomes(config, scores, labels)
    smallest = config.privacy.smallest_cell
    if labels is not None and known is not None:
        outcomes = _by_disease(known)
        if not outcomes and not is_store(labels):  # of which nobody said that they are of these
            reasons = told(known.rows, known.met, known.unused, smallest)
            raise DataError(
                f"{labels}: no disease has {SMALLEST_GROUP} labels of either class among these "
                "scores" + "".join(f"\n  {said}" for said in reasons)
            )
    if labels is not None and is_store(labels):
        then = then | {"weighted": []}  # a store has weights, too
    drifts, unwatched = compare(rule, now, then, None if known is None else outcomes)
    summary = json.loads((scores / "summary.json").read_text())
    return Monitored(summary, drifts, unwatched, outcomes, known, smallest)


def compare(
    rule: Monitor,
    now: dict[str, Any],
    then: dict[str, Any],
    outcomes: dict[str, dict[str, float]] | None = None,
) -> tuple[tuple[Drift, ...], tuple[Unwatched, ...]]:
    """Compare what `Profile` counted with what was `expected`; see `monitor`.

    `outcomes` are `judged` figures by disease; None where no labels are known yet.
    """
    training = then["training"]
    found: list[Drift | Unwatched] = [
        *_missing_rates(rule, now, training),
        *_distributions(rule, now, then),
        *_codes(rule, now, training),
        *(() if outcomes is None else _performance(rule, outcomes, then)),
    ]
    drifts = [each for each in found if isinstance(each, Drift)]
    level = rule.false_alarms / max(len(drifts), 1)
    return (
        tuple(replace(drift, level=level) for drift in drifts),
        tuple(each for each in found if isinstance(each, Unwatched)),
    )


def monitor_and_record(
    config: Config, scores: Path, labels: Path | None, output: Path
) -> tuple[Monitored, list[Path]]:
    """Monitor the newest scores, write a page below `output`, and record it in MLflow.

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
    data.write_text(json.dumps(found.as_dict(), indent=2, allow_nan=False) + "\n")
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
    tell = worth(rows, now.get("squares"))
    for feature, missing in now["missing"].items():
        before = then["missing_rate"][feature]
        after = shown_share(missing / rows, rows, SMALLEST_GROUP)  # as `before` was made
        by = abs(after - before)
        p = p_of_share(missing / rows, tell, before, then) if by > rule.missing_rate else 1.0
        yield Drift(
            "missing rate", feature, before, after, by, rule.missing_rate, p, rule.false_alarms
        )


def _distributions(
    rule: Monitor, now: dict[str, Any], then: dict[str, Any]
) -> Iterator[Drift | Unwatched]:
    training, squares = then["training"], now.get("squares")
    observed = now["observed"], training["observed"]
    yield from _shifted(rule, "observed entries", "", *observed, squares)
    of_values = now.get("value_squares", {})
    for feature, counts in now["values"].items():
        before = training["values"][feature]
        yield from _shifted(rule, "values", feature, counts, before, of_values.get(feature))
    for disease, counts in now["scores"].items():
        yield from _shifted(rule, "scores", disease, counts, then["scores"][disease], squares)


def _shifted(
    rule: Monitor,
    what: str,
    where: str,
    counts: list[int],
    then: dict[str, Any],
    squares: float | None = None,
) -> Iterator[Drift | Unwatched]:
    """Compare counts of bins with their shares at the training; see `worth` for `squares`.

    Judged as if nothing else were watched.
    """
    if (reason := _why_unwatched(counts, then)) is not None:
        yield Unwatched(what, where, reason)
        return
    tell = worth(sum(counts), squares)
    held = np.array(counts, dtype=np.float64)
    by = _difference(held, tell, then)
    p = p_of_bins(held, tell, then) if by > rule.psi else 1.0
    yield Drift(what, where, None, None, by, rule.psi, p, rule.false_alarms)


def _why_unwatched(counts: list[int], then: dict[str, Any]) -> str | None:
    if not then["shares"]:
        return f"fewer than {SMALLEST_GROUP} training rows have a value"
    if len(counts) < 2:
        return (
            "it did not vary in training, and the model is of an earlier version, which keeps no "
            "bins of such values: register it again"
        )
    n = sum(counts)
    return None if n >= SMALLEST_GROUP else f"fewer than {SMALLEST_GROUP} rows have a value"


def _difference(counts: NDArray[np.float64], rows: float, then: dict[str, Any]) -> float:
    """PSI less what chance gives. A bin that one side lacks counts there as half a row.

    As up to 10 rows, if it is the training that says to have none, and so may hide them.
    """
    q, p = counts / counts.sum(), np.asarray(then["shares"])
    q_seen = np.where(q == 0, np.minimum(0.5 / rows, p), q)
    p_seen = np.where(p == 0, np.minimum(HIDDEN / then["rows"], q), p)
    by_chance = (np.count_nonzero(p) - 1) * (1 / rows + 1 / effective(then))
    return float(max(psi(q_seen, p_seen) - by_chance, 0.0))


def _codes(rule: Monitor, now: dict[str, Any], then: dict[str, Any]) -> Iterator[Drift | Unwatched]:
    """Codes of many events that are new, or gone.

    They differ by their share of their table's events, and are tested by the subjects who have
    them, of all: one subject's events are not independent. A code that is not among those that are
    kept may have 10 subjects nevertheless; and if as many codes are kept as ever are, as many as
    the rarest of these has events.
    """
    known = then.get("codes")
    if known is None:  # the model was trained before codes were kept, or on a wide table
        return
    for table, counts in now["codes"].items():
        nothing = {"events": 0, "codes": {}, "subjects": {}, "everyone": 1}
        before = known.get(table, nothing)
        if "subjects" not in counts or "subjects" not in before:
            reason = (
                "scores or model are of an earlier version, which did not count the subjects of "
                "each code: score again, or ingest, train and register again"
            )
            yield Unwatched("codes", table, reason)
            continue
        for code in sorted(counts["codes"].keys() | before["codes"].keys()):
            then_share = before["codes"].get(code, 0) / max(before["events"], 1)
            now_share = counts["codes"].get(code, 0) / max(counts["events"], 1)
            by = max(then_share, now_share)
            if (then_share and now_share) or by <= rule.code_share:  # never an alarm
                continue
            n, m = counts["everyone"], before["everyone"]
            if now_share:
                having, had = ABOUT * counts["subjects"][code], min(_unknown(before), m)
                differs = having / n > had / m
            else:
                having, had = min(_unknown(counts), n), ABOUT * before["subjects"][code]
                differs = having / n < had / m
            p = float(fisher(having, n, had, m)) if differs else 1.0
            what = "new code" if now_share else "vanished code"
            yield Drift(
                what, f"{table}: {code}", then_share, now_share, by, rule.code_share, p,
                rule.false_alarms,
            )  # fmt: skip


def _unknown(codes: dict[str, Any]) -> float:
    """Return how many subjects at most have a code that is not among those of the table."""
    kept = codes["codes"].values()
    return max(HIDDEN, min(kept)) if len(kept) >= MOST_CODES else HIDDEN


def _performance(
    rule: Monitor, outcomes: dict[str, dict[str, float]], expected: dict[str, Any]
) -> Iterator[Drift | Unwatched]:
    """What it was is known only as well as held-out rows tell: they widen the standard error."""
    for disease, before in expected["figures"].items():
        now = outcomes.get(disease)
        if now is None:
            reason = f"fewer than {SMALLEST_GROUP} labels of either class"
            yield Unwatched("performance", disease, reason)
            continue
        widened = np.sqrt(1 + now["n"] / before["n"])
        for name, then, limit in (
            ("auroc", before["auroc"], rule.auroc_drop),
            ("calibration_slope", 1.0, rule.calibration_slope),
            ("calibration_intercept", 0.0, rule.calibration_intercept),
        ):
            what = "AUROC" if name == "auroc" else name.replace("_", " ")
            if name == "calibration_intercept" and disease in expected.get("weighted", ()):
                yield Unwatched(what, disease, UNWEIGHTED)
                continue
            by = then - now[name] if name == "auroc" else abs(now[name] - then)
            error = widened * now[f"{name}_se"]
            if not (np.isfinite(by) and error > 0):
                yield Unwatched(what, disease, "the labels and scores known allow no estimate")
                continue
            tails = 1 if name == "auroc" else 2
            p = float(min(1.0, tails * student.sf(by / error, now["subjects_of_a_class"] - 1)))
            yield Drift(what, disease, then, now[name], by, limit, p, rule.false_alarms)


def _by_disease(known: Outcomes) -> dict[str, dict[str, float]]:
    """Judge how well the scores have foretold each disease that has labels of both classes."""
    found = {}
    for disease in np.unique(known.disease):
        of_it = known.disease == disease
        y, weight = known.positive[of_it], known.weight[of_it]
        if min(y.sum(), (~y).sum()) >= SMALLEST_GROUP:
            alike = None if (weight == 1).all() else weight
            found[str(disease)] = judged(
                Sample(y, known.probability[of_it], known.subject[of_it], alike)
            )
    return found


def judged(sample: Sample) -> dict[str, float]:
    """Figures of one disease whose labels are known, of 11 rows of either class.

    Standard errors of calibration are those of a calibrated model.
    """
    y, p = checked(sample.y, sample.p, ndim=1, probabilities=True)
    area, found = delong(*sample), calibration(y, p, sample.weight)
    lp = logit(np.clip(p, CLIP, 1 - CLIP))
    information = sample.each * p * (1 - p)
    centred = lp - np.average(lp, weights=information)
    surprise = sample.each * (y - p)
    return {
        "n": float(area.n),
        "n_positive": float(area.n_positive),
        "subjects_of_a_class": float(min(sample.subjects_by_class)),
        "mean_prediction": sample.mean(p),
        "observed_rate": sample.mean(y),
        "auroc": area.value,
        "auroc_se": area.se,
        "auroc_ci_low": area.ci_low,
        "auroc_ci_high": area.ci_high,
        "calibration_slope": found.slope,
        "calibration_slope_se": _error(surprise * centred, information * centred**2, sample),
        "calibration_intercept": found.intercept,
        "calibration_intercept_se": _error(surprise, information, sample),
    }


def _error(score: Array, information: Array, sample: Sample) -> float:
    """Standard error of a maximum likelihood estimate, by subject; both of shape (rows,).

    The model's, 1 / √Σ information; where subjects have several rows, or rows stand for others, the
    sandwich's with scores added up by subject (K.-Y. Liang and S. L. Zeger, Biometrika 73:13, 1986)
    if that is larger.
    """
    total = information.sum()
    return float(np.sqrt(total if sample.simple else max(total, sample.squares(score))) / total)


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
