"""Predictions + masks → what missing entries do to them: bias, robustness, leaks, counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

from ehr_sn.config import SMALLEST_GROUP, SPLITS, Config
from ehr_sn.errors import ConfigError, did_you_mean
from ehr_sn.evaluate.metrics import (
    CLIP,
    Array,
    Sample,
    auroc,
    by_subject,
    calibration,
    calibration_in_the_large,
    checked,
)
from ehr_sn.evaluate.small_cells import shown_parts
from ehr_sn.evaluate.statistics import AUROC, Z95, delong
from ehr_sn.ingest.store import Store
from ehr_sn.missing import get_state
from ehr_sn.missing.amputate import Amputation, Mechanism
from ehr_sn.models.predict import Predict, load_predictor
from ehr_sn.models.train import Cell, Comparison, HeldOut
from ehr_sn.models.weights import Weights, taken, weights

BINS = 5
RATES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
SHIFTS: tuple[Mechanism, ...] = ("mcar", "panel", "mnar")
SHIFT_METRICS = ("auroc", "mean_prediction", "calibration_slope", "calibration_intercept")
SHIFTED = 10_000
KEPT = 2**29
LEAK_FROM = 0.60
"""A feature's absence is said to predict a disease where its AUROC is surely above this."""
MOST_NOT_ASKED = 0.01
"""Share of a feature's entries that may be in rows of which it is said not to be asked."""


@dataclass(frozen=True)
class SparsityBias:
    """How predictions move with the number of observed entries, beside how the outcome does.

    The first five hold a value a bin of that number: its mean, the subjects, mean prediction,
    outcome rate, and calibration-in-the-large (NaN where a class is absent).

    `slope` and `slope_outcome` are the change of the log-odds, predicted and real, per standard
    deviation of the number; `spread` and `spread_outcome` the range over the bins. `unexplained`
    is the change of the real log-odds *given the prediction*: zero without bias, negative where
    the prediction rises with the number faster than the outcome does.
    """

    observed: tuple[float, ...]
    n: tuple[float, ...]
    prediction: tuple[float, ...]
    outcome: tuple[float, ...]
    in_the_large: tuple[float, ...]
    slope: float
    slope_outcome: float
    unexplained: float
    unexplained_low: float
    unexplained_high: float

    @property
    def spread(self) -> float:
        return float(np.ptp(self.prediction)) if self.prediction else np.nan

    @property
    def spread_outcome(self) -> float:
        return float(np.ptp(self.outcome)) if self.outcome else np.nan

    def __str__(self) -> str:
        return (
            f"per sd of observed entries: predicted log-odds {self.slope:+.2f}, real "
            f"{self.slope_outcome:+.2f}, unexplained {self.unexplained:+.2f} (95% CI "
            f"{self.unexplained_low:+.2f} to {self.unexplained_high:+.2f})"
        )

    def as_metrics(self, prefix: str = "sparsity") -> dict[str, float]:
        """The summary numbers as `<prefix>_<name>`."""
        names = ("slope", "slope_outcome", "spread", "spread_outcome")
        unexplained = ("unexplained", "unexplained_low", "unexplained_high")
        return {f"{prefix}_{name}": float(getattr(self, name)) for name in (*names, *unexplained)}


def sparsity_bias(splits: Sequence[tuple[Any, ...]]) -> SparsityBias:
    """Relate predictions and outcomes to how much of each subject is observed.

    Parameters
    ----------
    splits : list of (y, p, observed), or (y, p, observed, subject, weight)
        For each split its held-out labels, probabilities and numbers of observed entries, whose
        each row is, and what it stands for, as in `metrics.Sample`; all (n,). What is returned is
        the mean over the splits, whose common bins are quantiles of the number; the interval is as
        wide as that of one split (see `statistics.over_splits`).

    Raises
    ------
    ValueError
        As `metrics.calibration` does.

    Notes
    -----
    Variable sparsity: J. Yi et al., ICLR 2020 (arXiv 1906.00150). With z the standardised number,
    `slope` is the least-squares slope of logit(p) on z, `slope_outcome` the coefficient b in
    logit P(y=1) = a + b·z, and `unexplained` the b in logit P(y=1) = logit(p) + a + b·z. Bins of
    fewer than 11 subjects are left out.

    Examples
    --------
    >>> observed = np.arange(2000) % 20
    >>> y, risk = np.arange(2000) // 20 % 4 == 0, np.full(2000, 0.25)
    >>> bias = sparsity_bias([(y, expit(logit(risk) + observed / 10), observed)])
    >>> f"{bias.slope:.2f}, {bias.slope_outcome:.2f}, {bias.unexplained:.2f}"
    '0.58, 0.00, -0.58'
    """
    pooled = np.concatenate([np.asarray(observed) for _, _, observed, *_ in splits])
    edges = np.unique(np.quantile(pooled, np.arange(1, BINS) / BINS))
    bins, numbers = [], []
    for labels, probability, observed, *more in splits:
        y, p = checked(labels, probability, ndim=1, probabilities=True)
        sample = Sample(y, p, *more)
        count = np.asarray(observed, dtype=np.float64)
        z = (count - count.mean()) / (count.std() or 1)
        lp = logit(np.clip(p, CLIP, 1 - CLIP))
        b, se = _coefficient(z, sample, offset=lp)
        numbers.append((float(lp @ z / len(z)), _coefficient(z, sample)[0], b, se))
        bins.append(_in_bins(np.searchsorted(edges, count), len(edges) + 1, count, sample))
    table = _mean(np.stack(bins))
    table = table[:, table[1] >= SMALLEST_GROUP]
    slope, slope_outcome, unexplained, _ = np.mean(numbers, axis=0).tolist()
    se = float(np.sqrt(np.mean([se**2 for *_, se in numbers])))
    observed, n, prediction, outcome_rate, large = (tuple(row) for row in table.tolist())
    return SparsityBias(
        observed=observed,
        n=n,
        prediction=prediction,
        outcome=outcome_rate,
        in_the_large=large,
        slope=slope,
        slope_outcome=slope_outcome,
        unexplained=unexplained,
        unexplained_low=unexplained - Z95 * se,
        unexplained_high=unexplained + Z95 * se,
    )


def _in_bins(place: NDArray[np.intp], bins: int, count: Array, sample: Sample) -> Array:
    """(5, bins): as the first five fields of `SparsityBias`, NaN for an empty bin."""
    columns = np.full((5, bins), np.nan)
    columns[1] = 0
    for i in np.unique(place):
        here = place == i
        mine = sample.where(here)
        n = mine.owners.max() + 1
        both = 0 < np.sum(mine.y) < here.sum()
        large = calibration_in_the_large(mine.y, mine.p, mine.weight) if both else np.nan
        columns[:, i] = count[here].mean(), n, mine.mean(mine.p), mine.mean(mine.y), large
    return columns


def _mean(stacked: Array) -> Array:
    """Mean over the first axis of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(stacked)
    n = known.sum(axis=0)
    total = np.where(known, stacked, 0).sum(axis=0)
    return np.divide(total, n, out=np.full(total.shape, np.nan), where=n > 0)


def _coefficient(z: Array, sample: Sample, offset: Array | float = 0.0) -> tuple[float, float]:
    """b and its standard error in logit P(y=1) = offset + a + b·z, by Newton's method.

    Where rows stand for others, or several are of one subject, the error is Liang and Zeger's
    (Biometrika 73:13, 1986), from the sums of the score over each subject's rows.
    """
    y, w = np.asarray(sample.y), sample.each
    X = np.column_stack([np.ones_like(z), z])
    coefficients = np.zeros(2)
    hessian = np.eye(2)
    if not z.any():
        return np.nan, np.nan
    for _ in range(50):
        p = expit(X @ coefficients + offset)
        hessian = X.T @ (X * (w * p * (1 - p))[:, None])
        step = np.linalg.lstsq(hessian, X.T @ (w * (y - p)))[0]
        coefficients = coefficients + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            variance = np.linalg.inv(hessian)
            if not sample.simple:
                score = by_subject((X * (w * (y - p))[:, None]).T, sample.owners)
                variance = variance @ (score @ score.T) @ variance
            return float(coefficients[1]), float(np.sqrt(variance[1, 1]))
    return np.nan, np.nan  # the number of observed entries separates the classes


@dataclass(frozen=True)
class Shift:
    """One mechanism's effect on one disease, at each of `RATES`: the metrics of `SHIFT_METRICS`."""

    mechanism: Mechanism
    values: dict[str, tuple[float, ...]]

    def as_curves(self, prefix: str = "shift") -> dict[str, dict[int, float]]:
        """`<prefix>_<mechanism>_<metric>`: rate in percent → value."""
        steps = [round(100 * rate) for rate in RATES]
        return {
            f"{prefix}_{self.mechanism}_{name}": dict(zip(steps, curve, strict=True))
            for name, curve in self.values.items()
        }

    @classmethod
    def from_curves(
        cls, mechanism: Mechanism, curves: Mapping[str, Mapping[int, float]], prefix: str = "shift"
    ) -> Shift:
        """What `as_curves` gave."""
        values = {
            name: tuple(
                value for _, value in sorted(curves[f"{prefix}_{mechanism}_{name}"].items())
            )
            for name in SHIFT_METRICS
        }
        return cls(mechanism, values)


class Filled:
    """Takes rows through fitted methods, and keeps what came of it, up to `KEPT` bytes.

    To fill the gaps may take far longer than to predict. Other networks behind the same method, and
    its variant with the mask, find the rows filled. The tables given must stay as they are, and
    live as long as this: they are told apart by their identity.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], NDArray[np.float32]] = {}  # the last used come last

    def __call__(self, method: Pipeline, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """What `method.transform(values)` gives."""
        scaled, last = method[:-1].transform(values), method[-1]
        key = _what_it_does(method), id(values)
        filled = self._kept.pop(key, None)
        if filled is None:
            filled = copy(last).set_params(add_mask=False).transform(scaled)
        self._kept[key] = filled
        while sum(table.nbytes for table in self._kept.values()) > KEPT:
            del self._kept[next(iter(self._kept))]
        return cast(NDArray[np.float32], last.finish(filled, scaled))


@lru_cache(maxsize=8)
def _what_it_does(method: Pipeline) -> str:
    """Names a fitted pipeline by its parameters, but for the mask, and by what it has learned."""
    params = {k: v for k, v in method.get_params().items() if "__" in k}
    del params["method__add_mask"]
    hashed = sha256(repr(params).encode())
    for name, array in get_state(method).items():
        hashed.update(name.encode())
        hashed.update(array.tobytes())
    return hashed.hexdigest()


@dataclass(frozen=True)
class ShiftedRows:
    """Held-out rows of one split as they are, and with further entries missing.

    The same for every method, so that methods are compared on the same losses.
    """

    rows: dict[tuple[Mechanism, float], NDArray[np.float32]]
    labels: NDArray[np.float32]
    weight: Sequence[Weights] = ()
    filled: Filled = field(default_factory=Filled)

    @classmethod
    @lru_cache(maxsize=2)
    def of(cls, store: Store, split: int = 0) -> ShiftedRows:
        """The mechanisms learn panels and ranks from the split's training rows.

        Of a large store, some `SHIFTED` of the held-out rows are taken.
        """
        values, dealt = store.values(), store.splits()[:, split]
        held_out = np.flatnonzero(dealt == "held_out")
        if len(held_out) > SHIFTED:
            rng = np.random.default_rng(split)
            held_out = np.sort(rng.choice(held_out, SHIFTED, replace=False))
        rows = {}
        for mechanism in SHIFTS:
            lose = Amputation(mechanism, 0.0, seed=split)
            lose.fit(values[dealt == "train"], store.measurements)
            for rate in RATES:
                lose.rate = rate
                rows[mechanism, rate] = lose(values[held_out], held_out).astype(np.float32)
        weight = [taken(of_disease, held_out) for of_disease in weights(store, split)]
        return cls(rows, store.labels()[held_out], weight)

    def shifts(self, predict: Predict) -> list[list[Shift]]:
        """Return, for each disease, what each mechanism does to the seed-averaged predictions."""
        found: dict[tuple[int, str], list[tuple[float, ...]]] = {}
        intact = predict(self.rows[SHIFTS[0], 0.0]).mean(axis=1)
        for (mechanism, rate), rows in self.rows.items():
            probability = predict(rows).mean(axis=1) if rate else intact
            for i, p in enumerate(probability):
                sample = Sample(self.labels[:, i], p, weight=self.weight[i])
                numbers = _shift_metrics(sample.where(~np.isnan(self.labels[:, i])))
                found.setdefault((i, mechanism), []).append(numbers)
        return [
            [
                Shift(m, dict(zip(SHIFT_METRICS, zip(*found[i, m], strict=True), strict=True)))
                for m in SHIFTS
            ]
            for i in range(self.labels.shape[1])
        ]


def _shift_metrics(sample: Sample) -> tuple[float, ...]:
    y, p, _, weight = sample
    slope, intercept = calibration(y, p, weight)
    return float(auroc(y, p, weight)), sample.mean(p), slope, intercept


@dataclass(frozen=True)
class Diagnosis:
    """What missing entries do to one method's predictions of one disease."""

    bias: SparsityBias
    shifts: tuple[Shift, ...]


def diagnose(
    config: Config,
    store: Store,
    comparison: Comparison,
    held_out: Mapping[str, Sequence[HeldOut]],
) -> dict[str, Diagnosis]:
    """Disease → the diagnosis of one (method, scaler, architecture), from its trained cells.

    `held_out` is its predictions, one entry a split. The shifts are those of the first split: it
    is slow to predict everything many times.
    """
    splits = range(config.splits.repeats)
    observed = (~np.isnan(store.values())).sum(axis=1)
    labels, dealt = store.labels(), store.splits()
    shifted = ShiftedRows.of(store)
    predict = load_predictor(config, store, Cell(*comparison, 0), shifted.filled)
    shifts = shifted.shifts(predict)
    found = {}
    for i, disease in enumerate(store.diseases):
        rows = [(dealt[:, split] == "held_out") & ~np.isnan(labels[:, i]) for split in splits]
        parts = zip(held_out[disease], rows, strict=True)
        bias = sparsity_bias(
            [(p.y, p.ensemble, observed[mine], p.subject, p.weight) for p, mine in parts]
        )
        found[disease] = Diagnosis(bias, tuple(shifts[i]))
    return found


@dataclass(frozen=True)
class MaskLeak:
    """How well a feature's mere presence or absence predicts a disease.

    The AUROC is that of `when`: 'absent' or 'present' speaks for the disease. `among`: the feature
    that says of which rows this one is asked, where it is judged among these alone.
    """

    feature: str
    when: str
    auroc: AUROC
    among: str = ""

    @property
    def where(self) -> str:
        """When the mask speaks for the disease, such as 'absent' or 'absent among work=1'."""
        return f"{self.when} among {self.among}" if self.among else self.when

    def __str__(self) -> str:
        return f"{self.feature} {self.where}: {self.auroc}"


@dataclass(frozen=True)
class LeakAudit:
    """What masks alone say about one disease, on tuning rows.

    `mask` is a logistic regression on the whole mask, `count` the number of observed entries alone,
    in the direction it had in training rows. `features` is every feature, the most telling first;
    `leaks` are those whose interval, corrected for the number of features, lies above `LEAK_FROM`,
    on training rows as well: a handful of cases may all lack the same entry by chance. A feature
    that is asked of some rows only is judged among those.
    """

    disease: str
    mask: AUROC
    count: AUROC
    features: tuple[MaskLeak, ...]
    leaks: tuple[MaskLeak, ...]

    def __str__(self) -> str:
        named = ", ".join(f"{leak.feature} ({leak.where})" for leak in self.leaks) or "none"
        told = f"{self.disease}: mask alone {self.mask}; telling features: {named}"
        return told + (f"; by design absent elsewhere: {self.by_design}" if self.by_design else "")

    @property
    def by_design(self) -> str:
        """Features asked of some rows only, such as 'hours_worked (asked where work=1)'."""
        some = sorted((leak.feature, leak.among) for leak in self.features if leak.among)
        return ", ".join(f"{feature} (asked where {among})" for feature, among in some)

    def as_metrics(self, prefix: str = "leak") -> dict[str, float]:
        """`<prefix>_<what>/<disease>`."""
        return {
            f"{prefix}_mask_auroc/{self.disease}": self.mask.value,
            f"{prefix}_count_auroc/{self.disease}": self.count.value,
            f"{prefix}_features/{self.disease}": float(len(self.leaks)),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A table: the whole mask, the number of observed entries, the most telling features."""
        shown = self.features[: max(10, len(self.leaks))]
        told = [("(the whole mask)", "", "", self.mask), ("(their number)", "", "", self.count)]
        told += [(leak.feature, leak.when, leak.among, leak.auroc) for leak in shown]
        return [
            {
                "disease": self.disease,
                "mask of": feature,
                "speaks for it": when,
                "among": among,
                "auroc": round(area.value, 4),
                "ci_low": round(area.ci_low, 4),
                "ci_high": round(area.ci_high, 4),
                "leak": any(feature == leak.feature for leak in self.leaks),
            }
            for feature, when, among, area in told
        ]


def asked_of(config: Config, store: Store) -> dict[str, str]:
    """`evaluate.asked_of`, for `leak_audit`.

    Raises
    ------
    ConfigError
        It names a feature that the store lacks.
    """
    for pair in config.evaluate.asked_of.items():
        for name in pair:
            if name not in store.feature_names:
                where = config.where(f"evaluate.asked_of.{pair[0]}")
                hint = did_you_mean(name, store.feature_names)
                raise ConfigError(f"{where}: there is no feature {name!r}; {hint}")
    return dict(config.evaluate.asked_of)


def leak_audit(
    store: Store, split: int = 0, asked: Mapping[str, str] | None = None
) -> list[LeakAudit]:
    """Ask of each disease what the mask alone gives away.

    An order for a test says what the physician suspected, and a test that is not done on people
    known to be ill says that they are. Whether that may be used is for people to decide; here it
    is found. Everything fitted is fitted on the split's training rows and judged on its tuning
    rows. Diseases that lack two subjects of either class there are left out.

    `asked` is `asked_of(config, store)`: feature → the one that is above zero in the rows of which
    it is asked. Elsewhere its absence says no more than the other's value does, so it is judged
    among these rows. All rows count nevertheless where more than `MOST_NOT_ASKED` of its entries
    are in others, for then it is not so, and where these rows lack two subjects of a class.
    """
    values = store.values()
    mask = ~np.isnan(values)
    asked_rows = {}
    for name, other in (asked or {}).items():
        observed = mask[:, store.feature_names.index(name)]
        there = values[:, store.feature_names.index(other)] > 0
        if (observed & ~there).sum() <= MOST_NOT_ASKED * observed.sum():
            asked_rows[name] = there
    dealt, labels, subjects = store.splits()[:, split], store.labels(), store.subjects()
    audits = []
    for i, (disease, weight) in enumerate(zip(store.diseases, weights(store, split), strict=True)):
        eligible = ~np.isnan(labels[:, i])
        train, tuning = (eligible & (dealt == name) for name in ("train", "tuning"))
        y, seen = labels[:, i] == 1, mask.mean(axis=1)
        everybody = Sample(y, y, subjects, weight)

        def area(score: ArrayLike, rows: NDArray[np.bool_], of: Sample = everybody) -> AUROC:
            """Return the AUROC of a score of some rows only."""
            return delong(*of.where(rows)._replace(p=score))

        if not all(_both_classes(everybody.where(rows)) for rows in (train, tuning)):
            continue
        varies = mask[train].any(axis=0) & ~mask[train].all(axis=0)
        score = np.zeros(tuning.sum())
        if varies.any():
            model = LogisticRegression(C=0.1, max_iter=500)
            model.fit(mask[train][:, varies].astype(np.float32), y[train], taken(weight, train))
            score = model.decision_function(mask[tuning][:, varies].astype(np.float32))
        sign = 1 if area(seen[train], train).value >= 0.5 else -1
        features, leaks = [], []
        z = norm.ppf(1 - 0.025 / mask.shape[1])
        for name, observed in zip(store.feature_names, mask.T, strict=True):
            among, for_choice, for_judging = "", train, tuning
            if name in asked_rows:
                parts = [rows & asked_rows[name] for rows in (train, tuning)]
                if all(_both_classes(everybody.where(rows)) for rows in parts):
                    among, (for_choice, for_judging) = (asked or {})[name], parts
            present = area(observed[for_choice], for_choice).value > 0.5
            told = observed if present else ~observed
            found = area(told[for_judging], for_judging)
            features.append(MaskLeak(name, "present" if present else "absent", found, among))
            if found.value - z * found.se > LEAK_FROM:
                before = area(told[for_choice], for_choice)
                if before.value - z * before.se > LEAK_FROM:
                    leaks.append(features[-1])
        features.sort(key=lambda leak: -leak.auroc.value)
        leaks.sort(key=lambda leak: -leak.auroc.value)
        audits.append(
            LeakAudit(
                disease,
                area(score, tuning),
                area(sign * seen[tuning], tuning),
                tuple(features),
                tuple(leaks),
            )
        )
    return audits


def _both_classes(sample: Sample) -> bool:
    """Are there two subjects of either class?"""
    return min(sample.subjects_by_class) >= 2


@dataclass(frozen=True)
class MissingCount:
    """One feature's missing entries: rows and missing ones, by (disease, split, label 0 or 1)."""

    feature: str
    missing: dict[tuple[str, str, int], int]
    rows: dict[tuple[str, str, int], int]

    def rate(self, disease: str, split: str, label: int) -> float:
        """Share of the group's rows without the feature; NaN for an empty group."""
        key = (disease, split, label)
        return self.missing[key] / self.rows[key] if self.rows[key] else np.nan

    def shown(self, disease: str, split: str, label: int, smallest: int) -> int | str:
        """How many rows lack the feature, unless few do or few do not."""
        missing, rows = (counts[disease, split, label] for counts in (self.missing, self.rows))
        return shown_parts({"missing": missing, "observed": rows - missing}, smallest)["missing"]


def missing_table(store: Store, split: int = 0) -> list[MissingCount]:
    """Missing entries of every predictor by label and split, as TRIPOD+AI item 20b asks.

    G. S. Collins et al., BMJ 385:e078378 (2024).
    """
    missing = np.isnan(store.values())
    dealt, labels = store.splits()[:, split], store.labels()
    groups = {
        (disease, name, label): (dealt == name) & (labels[:, i] == label)
        for i, disease in enumerate(store.diseases)
        for name in SPLITS
        for label in (0, 1)
    }
    rows = {key: int(group.sum()) for key, group in groups.items()}
    counts = {key: missing[group].sum(axis=0) for key, group in groups.items()}
    return [
        MissingCount(feature, {key: int(n[j]) for key, n in counts.items()}, rows)
        for j, feature in enumerate(store.feature_names)
    ]
