"""Predictions → what a clinician asks: whom the model flags, what that gains, for whom.

Everything takes a list of splits and gives the mean over them; intervals are as wide as those of
one split (see `statistics.over_splits`), and measure what varies from subject to subject.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit

from ehr_sn.config import SMALLEST_GROUP, Config, GroupConfig
from ehr_sn.errors import ConfigError, did_you_mean
from ehr_sn.evaluate.metrics import (
    CLIP,
    Array,
    Sample,
    by_subject,
    calibration_in_the_large,
    checked,
    class_sizes,
)
from ehr_sn.evaluate.statistics import AUROC, Z95, delong, over_splits
from ehr_sn.ingest.store import Store

Split = tuple[Any, ...]
"""The parts of a `metrics.Sample`: of one split's rows the labels, probabilities and, where they
are not simple, subjects and weights; all (n,)."""

SENSITIVITIES = (0.95, 0.9, 0.8, 0.7, 0.5)
AGE_EDGES = (40.0, 65.0, 80.0)
SEXES = ("male", "female", "sex", "gender")
MOST_LEVELS = 10


@dataclass(frozen=True)
class DecisionCurve:
    """Net benefit at each threshold: of the model, and of treating everybody (nobody's is 0).

    `low` and `high` are the ends of the model's 95% interval, threshold by threshold, and
    `gain_low` the lower end of what it gains over everybody or nobody, whichever is lower.
    """

    threshold: tuple[float, ...]
    model: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    treat_all: tuple[float, ...]
    gain_low: tuple[float, ...]

    def useful(self, *, surely: bool = False) -> tuple[float, float] | None:
        """The widest run of thresholds at which the model beats both; None if there is none.

        `surely`: by more than the luck of who was held out.
        """
        gain = self.gain_low if surely else np.subtract(self.model, np.maximum(self.treat_all, 0))
        ends = np.flatnonzero(np.diff(np.concatenate([[0], np.array(gain) > 1e-12, [0]])))
        if not ends.size:
            return None
        starts, stops = ends[::2], ends[1::2] - 1
        widest = int(np.argmax(stops - starts))
        return self.threshold[starts[widest]], self.threshold[stops[widest]]


def net_benefit(y: ArrayLike, p: ArrayLike, threshold: float) -> float:
    """True positives a subject, less false positives weighed by the threshold's odds.

    Somebody who treats at a risk of t holds that 1/t − 1 needless treatments outweigh one that was
    needed (A. J. Vickers, E. B. Elkin, Med Decis Making 26:565, 2006). Labels and probabilities
    have shape (n,). Raises ValueError as `metrics.brier` does, and for a threshold not in (0, 1).

    >>> round(net_benefit([1, 0, 0, 1], [0.9, 0.6, 0.1, 0.3], 0.5), 3)
    0.0
    """
    if not 0 < threshold < 1:
        raise ValueError(f"a threshold lies between 0 and 1, not at {threshold}")
    return float(_benefits(Sample(y, p), threshold)[0].mean())


def decision_curve(splits: Sequence[Split], *, points: int = 60) -> DecisionCurve:
    """The decision curve of a model over the thresholds at which people might act on it.

    The `points` thresholds, evenly spaced, begin at 1 %, or at a tenth of the share of cases where
    that is lower: at a rare disease, the treatment of everybody pays only below 1 %. They end at
    the 99th percentile of the predictions, but not below 2 % or twice the share of cases, whichever
    is lower, and not above 99 %.

    Net benefit is a mean over subjects, and so has the standard error of a mean: that to which a
    bootstrap of the subjects tends.
    """
    samples = [Sample(*split) for split in splits]
    highest = np.quantile(np.concatenate([np.asarray(sample.p) for sample in samples]), 0.99)
    cases = float(np.mean([sample.mean(sample.y) for sample in samples])) or 1.0
    first, last = min(0.01, cases / 10), np.clip(highest, min(0.02, 2 * cases), 0.99)
    thresholds = np.linspace(first, last, points)
    columns = []
    for threshold in thresholds:
        parts = [_benefits(sample, threshold) for sample in samples]
        model, se = _over_splits(samples, [benefit for benefit, _ in parts])
        everybody, _ = _over_splits(samples, [of_all for _, of_all in parts])
        gain, gain_se = _over_splits(samples, [benefit - of_all for benefit, of_all in parts])
        low, high = model - Z95 * se, model + Z95 * se
        columns.append((model, low, high, everybody, min(low, gain - Z95 * gain_se)))
    return DecisionCurve(
        tuple(thresholds.tolist()), *(tuple(column) for column in zip(*columns, strict=True))
    )


def _benefits(sample: Sample, threshold: float) -> tuple[Array, Array]:
    """What each row adds to the net benefit of the model, and to that of treating everybody."""
    positive, p = checked(sample.y, sample.p, ndim=1, probabilities=True)
    of_all = np.where(positive, 1.0, -threshold / (1 - threshold))
    return of_all * (p >= threshold), of_all


def _over_splits(samples: Sequence[Sample], parts: Sequence[Array]) -> tuple[float, float]:
    """The mean over splits of a mean over rows, and its standard error: that of one split."""
    pairs = list(zip(samples, parts, strict=True))
    squares = [sample.variance_of_mean(part) for sample, part in pairs]
    return float(np.mean([s.mean(part) for s, part in pairs])), float(np.sqrt(np.mean(squares)))


@dataclass(frozen=True)
class Proportion:
    """A share with Wilson's 95% interval (E. B. Wilson, JASA 22:209, 1927).

    >>> print(Proportion.of(45, 50))
    90% (79 to 96)
    """

    value: float
    ci_low: float
    ci_high: float

    @classmethod
    def of(cls, k: float, n: float) -> Proportion:
        """k of n; all NaN where n is 0."""
        if n == 0:
            return cls(np.nan, np.nan, np.nan)
        share, z2 = k / n, Z95**2
        middle = (share + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 / (1 + z2 / n) * np.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
        return cls(float(share), float(max(0, middle - half)), float(min(1, middle + half)))

    @classmethod
    def over_splits(
        cls, parts: Sequence[tuple[Sample, NDArray[np.bool_], NDArray[np.bool_]]]
    ) -> Proportion:
        """Return a share, given for each split its sample, which rows are the base and which count.

        Where rows stand for others, or several are of one subject, the interval is that of as
        many rows as would vary as much (E. L. Korn, B. I. Graubard, Surv Methodol 24:193, 1998).
        """
        counted, base, effective = [], [], []
        for sample, of, counts in parts:
            of_base = sample.where(of)
            each = np.broadcast_to(sample.each, of.shape)
            counted.append(each[of & counts].sum())
            base.append(each[of].sum())
            effective.append(_effective_rows(of_base, counts[of]))
        k, n, rows = (float(np.mean(numbers)) for numbers in (counted, base, effective))
        return cls.of(k, n) if rows == n else cls.of(k / n * rows if n else 0.0, rows)

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "–"
        return f"{self.value:.0%} ({100 * self.ci_low:.0f} to {100 * self.ci_high:.0f})"


@dataclass(frozen=True)
class OperatingPoint:
    """What flagging everybody from `threshold` on does, on held-out rows.

    `aim` is the sensitivity for which the threshold was chosen, on tuning rows.
    """

    aim: float
    threshold: float
    sensitivity: Proportion
    specificity: Proportion
    ppv: Proportion
    npv: Proportion
    alerts_per_1000: float


def operating_points(
    tuning: Sequence[Split], held_out: Sequence[Split], aims: Sequence[float] = SENSITIVITIES
) -> list[OperatingPoint]:
    """Judge, on held-out rows, the highest threshold with each aimed sensitivity on tuning rows.

    Each split has its own threshold; what is given is their mean. Raises ValueError where a tuning
    split has only one class.

    >>> y, p = [0, 0, 0, 1, 1], [0.1, 0.2, 0.6, 0.5, 0.9]
    >>> (point,) = operating_points([(y, p)], [(y, p)], [1.0])
    >>> point.threshold, str(point.specificity), point.alerts_per_1000
    (0.5, '67% (21 to 94)', 600.0)
    """
    samples = [Sample(*split) for split in held_out]
    points = []
    for aim in aims:
        thresholds, judged = [], []
        for for_choice, sample in zip(tuning, samples, strict=True):
            thresholds.append(_highest_threshold(Sample(*for_choice), aim))
            positive, p = checked(sample.y, sample.p, ndim=1, probabilities=True)
            judged.append((sample, positive, p >= thresholds[-1]))
        everybody = [np.ones_like(positive) for _, positive, _ in judged]
        alerts = [
            (sample, of, flagged)
            for (sample, _, flagged), of in zip(judged, everybody, strict=True)
        ]
        points.append(
            OperatingPoint(
                aim=aim,
                threshold=float(np.mean(thresholds)),
                sensitivity=Proportion.over_splits(judged),
                specificity=Proportion.over_splits([(s, ~ill, ~flag) for s, ill, flag in judged]),
                ppv=Proportion.over_splits([(s, flag, ill) for s, ill, flag in judged]),
                npv=Proportion.over_splits([(s, ~flag, ~ill) for s, ill, flag in judged]),
                alerts_per_1000=1000 * Proportion.over_splits(alerts).value,
            )
        )
    return points


def _highest_threshold(sample: Sample, aim: float) -> float:
    """The highest threshold from which on at least `aim` of the positives' predictions lie."""
    positive, p = checked(sample.y, sample.p, ndim=1, probabilities=True)
    class_sizes(positive)
    order = np.argsort(-p[positive], kind="stable")
    reached = np.cumsum(np.broadcast_to(sample.each, p.shape)[positive][order])
    place = np.searchsorted(reached, (aim - 1e-9) * reached[-1])  # 0.7 · 10 is not 8
    return float(p[positive][order][place])


def _effective_rows(sample: Sample, counts: NDArray[np.bool_]) -> float:
    """Return how many independent rows would give their share the variance that it has."""
    if sample.simple:
        return float(counts.size)
    share, variance = sample.mean(counts), sample.variance_of_mean(counts)
    if variance > 0:
        return min(share * (1 - share) / variance, float(counts.size))
    of_subjects = by_subject(np.broadcast_to(sample.each, counts.shape)[None], sample.owners)
    return float(of_subjects.sum() ** 2 / np.square(of_subjects).sum())


@dataclass(frozen=True)
class GroupResult:
    """How the model does in one group of subjects; n and n_positive are a split's means.

    What cannot be known with so few of a class is None. Calibration-in-the-large above 0: the
    predicted risks of this group are too low.
    """

    group: str
    level: str
    n: int
    n_positive: int
    auroc: AUROC | None
    in_the_large: tuple[float, float, float] | None

    def as_metrics(self, prefix: str = "group") -> dict[str, float]:
        """`<prefix>_<metric>/<group>/<level>`, of what is known; for names that MLflow takes."""
        at = f"{self.group}/{self.level}"
        metrics: dict[str, float] = {f"{prefix}_n/{at}": float(self.n)}
        if self.auroc:
            metrics[f"{prefix}_auroc/{at}"] = self.auroc.value
        if self.in_the_large:
            metrics[f"{prefix}_calibration_intercept/{at}"] = self.in_the_large[0]
        return metrics


def subject_groups(config: Config, store: Store) -> dict[str, dict[str, NDArray[np.bool_]]]:
    """Group → level → its rows (rows,), as `evaluate.groups` says.

    Where it says nothing: by age, if there is a feature `age`, and by sex, if there is one named
    male, female, sex or gender. Rows without the feature are a level of their own.

    Raises
    ------
    ConfigError
        A group's feature does not exist, or needs edges.
    """
    wanted: Mapping[str, GroupConfig] | None = config.evaluate.groups
    if wanted is None:
        wanted = {"age": GroupConfig(feature="age", edges=AGE_EDGES)}
        wanted |= {name: GroupConfig(feature=name) for name in SEXES}
        wanted = {k: group for k, group in wanted.items() if group.feature in store.feature_names}
    values = store.values()
    groups = {}
    for name, group in wanted.items():
        where = config.where(f"evaluate.groups.{name}")
        if group.feature not in store.feature_names:
            hint = did_you_mean(group.feature, store.feature_names)
            raise ConfigError(f"{where}: there is no feature {group.feature!r}; {hint}")
        column = values[:, store.feature_names.index(group.feature)]
        if not group.edges and len(np.unique(column[~np.isnan(column)])) > MOST_LEVELS:
            raise ConfigError(
                f"{where}: {group.feature!r} has more than {MOST_LEVELS} different values; give "
                "`edges`, such as [40, 65]"
            )
        levels = dict(_bands(column, group.edges) if group.edges else _values(column))
        groups[name] = {level: rows for level, rows in levels.items() if rows.any()}
    return groups


def _bands(column: Array, edges: Sequence[float]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    yield f"below {edges[0]:g}", column < edges[0]
    for low, high in pairwise(edges):
        yield f"{low:g} to below {high:g}", (column >= low) & (column < high)
    yield f"{edges[-1]:g} and above", column >= edges[-1]
    yield "missing", np.isnan(column)


def _values(column: Array) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    for value in np.unique(column[~np.isnan(column)]):
        yield f"{value:g}", column == value
    yield "missing", np.isnan(column)


def by_group(
    splits: Sequence[tuple[Any, ...]],
    groups: Mapping[str, Mapping[str, NDArray[np.bool_]]],
    smallest: int = SMALLEST_GROUP,
) -> list[GroupResult]:
    """How a model does in each group; levels of fewer than `smallest` subjects are left out.

    `splits` holds for each split its labels (n,), probabilities (n,) and row numbers (n,), which
    are the places of its rows in a level's mask of all rows; and, where they are not simple, its
    subjects (n,) and weights (n,), as in `metrics.Sample`.
    """
    results = []
    for group, levels in groups.items():
        for level, member in levels.items():
            parts = [Sample(y, p, *more).where(member[rows]) for y, p, rows, *more in splits]
            n, subjects = (
                float(np.mean(counts))
                for counts in (
                    [len(s.owners) for s in parts],
                    [len(np.unique(s.owners)) for s in parts],
                )
            )
            known = [sample for sample in parts if min(sample.subjects_by_class) >= 2]
            if subjects >= smallest:
                results.append(
                    GroupResult(
                        group=group,
                        level=level,
                        n=round(n),
                        n_positive=round(np.mean([np.sum(sample.y) for sample in parts])),
                        auroc=over_splits([delong(*sample) for sample in known]) if known else None,
                        in_the_large=_in_the_large(known) if known else None,
                    )
                )
    return results


def _in_the_large(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """Calibration-in-the-large and its 95% interval, from the likelihood's curvature.

    Where rows stand for others, or several are of one subject, from the score of each subject, too.
    """
    values, variances = [], []
    for sample in samples:
        positive, p = checked(sample.y, sample.p, ndim=1, probabilities=True)
        a = calibration_in_the_large(positive, p, sample.weight)
        risk = expit(a + logit(np.clip(p, CLIP, 1 - CLIP)))
        values.append(a)
        variance = 1 / (sample.each * risk * (1 - risk)).sum()
        if not sample.simple:
            variance = variance**2 * sample.squares(sample.each * (positive - risk))
        variances.append(variance)
    mean, se = float(np.mean(values)), float(np.sqrt(np.mean(variances)))
    return mean, mean - Z95 * se, mean + Z95 * se
