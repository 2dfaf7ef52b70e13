"""Scores a setting, variant and repeat → tests, tables, figures: a study's result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from rich.table import Table

from ehr_sn.config import SMALLEST_GROUP
from ehr_sn.evaluate.figures import critical_difference_figure, sparsity_bias_figure
from ehr_sn.evaluate.statistics import (
    Friedman,
    MeanSD,
    PairedT,
    WinTieLoss,
    friedman,
    holm,
    mean_sd,
    paired_t,
    win_tie_loss,
)
from ehr_sn.evaluate.table import ESTABLISHED, p_value, plain_table

BINS = 5
SHORT_SN = ("sparsity_normalization", "SN")
MOST_COLUMNS = 5  # settings that a table of every variant has room for
SHORTEST_NAME = 10  # signs of a setting in a line, on a terminal of 80 columns


@dataclass(frozen=True)
class Score:
    """One number on held-out rows: of a setting, a variant and a repeat (from 0)."""

    setting: str
    variant: str
    repeat: int
    metric: str
    value: float


@dataclass(frozen=True)
class CountCurve:
    """Mean output of a model by how much of its input is observed: the bias of zero imputation.

    A value a bin of that number: how many held-out items, and the means of their observed entries,
    of the model's outputs and of what was to be predicted.
    """

    setting: str
    variant: str
    n: tuple[float, ...]
    observed: tuple[float, ...]
    prediction: tuple[float, ...]
    outcome: tuple[float, ...]


def count_edges(observed: ArrayLike, bins: int = BINS) -> NDArray[np.floating]:
    """Where to cut numbers of observed entries (n,) into bins of about equally many items.

    >>> count_edges([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    array([2.8, 4.6, 6.4, 8.2])
    """
    return np.unique(np.quantile(np.asarray(observed), np.arange(1, bins) / bins))


def count_curve(
    setting: str,
    variant: str,
    observed: ArrayLike,
    prediction: ArrayLike,
    outcome: ArrayLike,
    edges: ArrayLike,
) -> CountCurve:
    """The curve of some held-out items, all (n,); `edges` are the same for all of a setting's.

    >>> count_curve("a", "SN", [1, 2, 9], [0.5, 0.25, 1.0], [0, 0, 1], [5]).prediction
    (0.375, 1.0)
    """
    place = np.searchsorted(edges, observed)
    bins = np.size(edges) + 1
    n = np.bincount(place, minlength=bins)
    columns = (np.asarray(column, dtype=np.float64) for column in (observed, prediction, outcome))
    means = (np.bincount(place, column, bins) / np.maximum(n, 1) for column in columns)
    return CountCurve(setting, variant, tuple(n.tolist()), *(tuple(m.tolist()) for m in means))


@dataclass(frozen=True)
class Part:
    """What one cell leaves; `chosen` says what tuning rows chose, by `setting · variant`."""

    scores: tuple[Score, ...]
    curves: tuple[CountCurve, ...] = ()
    chosen: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def timed(self, seconds: float) -> Part:
        return replace(self, seconds=seconds)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Part:
        content = json.loads(text)
        curves = [
            CountCurve(setting, variant, *map(tuple, columns))
            for setting, variant, *columns in map(dict.values, content.pop("curves"))
        ]
        scores = (Score(**score) for score in content.pop("scores"))
        return cls(tuple(scores), tuple(curves), **content)


@dataclass(frozen=True)
class StudyResult:
    """All scores of a study, what they mean, and what they establish.

    Parameters
    ----------
    metric : the score that is tested and shown; others are recorded only
    higher_is_better : of that metric
    reference, sn : the variants without and with SN, which the first table compares
    repeats_are : what a repeat is, such as "5 × 5-fold cross-validation", to stand below the tables
    test_train_ratio : held-out over training rows of a repeat, for repeats that resample the same
        rows (Nadeau and Bengio's correction); 0 for repeats that differ in nothing but the seed
    rankings : title → settings over which variants are ranked; give independent settings
    ranked : the variants that are ranked; by default all that every setting has
    notes : sentences to stand below the tables, such as published numbers
    axes : what the figures of the bias call observed entries and outputs
    """

    study: str
    title: str
    parts: tuple[Part, ...]
    metric: str
    higher_is_better: bool
    reference: str
    sn: str
    repeats_are: str
    test_train_ratio: float = 0.0
    rankings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    ranked: Sequence[str] = ()
    notes: tuple[str, ...] = ()
    axes: tuple[str, str] = ("observed entries", "mean output")

    @cached_property
    def scores(self) -> tuple[Score, ...]:
        return tuple(score for part in self.parts for score in part.scores)

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(score.setting for score in self.scores))

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(score.variant for score in self.scores))

    @property
    def seconds(self) -> float:
        """Seconds of all cells together, as if they had run one after the other."""
        return sum(part.seconds for part in self.parts)

    @cached_property
    def _values(self) -> dict[tuple[str, str, str], dict[int, float]]:
        found: dict[tuple[str, str, str], dict[int, float]] = {}
        for s in self.scores:
            found.setdefault((s.setting, s.variant, s.metric), {})[s.repeat] = s.value
        return found

    def values(self, setting: str, variant: str, metric: str = "") -> dict[int, float]:
        """Repeat → value of a metric, by default the one tested; empty where there is none."""
        return self._values.get((setting, variant, metric or self.metric), {})

    def mean_sd(self, setting: str, variant: str) -> MeanSD | None:
        """Over repeats."""
        found = self.values(setting, variant)
        return mean_sd(list(found.values())) if found else None

    @cached_property
    def tests(self) -> dict[tuple[str, str], tuple[PairedT, float]]:
        """(setting, variant) → its paired difference from the reference, and p after Holm.

        Paired by repeat. Holm's correction is over the settings of a variant.
        """
        found: dict[tuple[str, str], tuple[PairedT, float]] = {}
        for variant in self.variants:
            pairs = {}
            for setting in self.settings:
                a, b = self.values(setting, variant), self.values(setting, self.reference)
                shared = sorted(a.keys() & b.keys())
                if variant != self.reference and shared:
                    difference = [a[repeat] - b[repeat] for repeat in shared]
                    pairs[setting] = paired_t(difference, self.test_train_ratio)
            corrected = holm([test.p for test in pairs.values()])
            for (setting, test), p in zip(pairs.items(), corrected, strict=True):
                found[setting, variant] = test, float(p)
        return found

    @cached_property
    def friedman(self) -> dict[str, Friedman]:
        """Ranking's title → mean ranks of the variants; without rankings of fewer than two each."""
        found = {}
        sign = 1 if self.higher_is_better else -1
        for title, settings in self.rankings.items():
            ranked = self.ranked or self.variants
            means = {(s, v): self.mean_sd(s, v) for s in settings for v in ranked}
            whole = [v for v in ranked if all(means[s, v] for s in settings)]
            if min(len(whole), len(settings)) >= 2:
                rows = [[sign * means[s, v].mean for v in whole] for s in settings]  # type: ignore[union-attr]
                found[title] = friedman(rows, whole)
        return found

    def record(self, variant: str) -> WinTieLoss:
        """In how many settings a variant beats the reference, by its uncorrected interval."""
        sign = 1 if self.higher_is_better else -1
        intervals = [
            tuple(sorted((sign * test.ci_low, sign * test.ci_high)))
            for (_, of), (test, _) in self.tests.items()
            if of == variant
        ]
        return win_tie_loss([(low, high) for low, high in intervals])

    def tables(self) -> list[Table]:
        """Without SN against with SN; every variant; mean ranks."""
        return [self._headline(), self._every_variant(), *self._ranks()]

    def _headline(self) -> Table:
        table = plain_table(f"{self.title} · {self.metric}")
        table.add_column("", min_width=SHORTEST_NAME)
        for column in ("w/o SN", "w/ SN", "Difference\n[95 % CI]", "p", "p (Holm)"):
            table.add_column(column, justify="right", no_wrap=True)
        for setting in self.settings:
            if (setting, self.sn) in self.tests:
                test, p = self.tests[setting, self.sn]
                both = (_shown(self.mean_sd(setting, v)) for v in (self.reference, self.sn))
                name = setting.replace("_", " ")  # so that it can go on in another line
                table.add_row(name, *both, _interval(test), p_value(test.p), p_value(p))
        return table

    def _every_variant(self) -> Table:
        table = plain_table("Every variant")
        table.add_column("")
        columns = self.settings if len(self.settings) <= MOST_COLUMNS else []
        for setting in columns:
            table.add_column(setting, justify="right")
        if not columns:
            table.add_column("Mean difference", justify="right")
        table.add_column("Better · tied · worse", justify="right")
        for variant in self.variants:
            cells = [_shown(self.mean_sd(s, variant)) + self._mark(s, variant) for s in columns]
            found = [test.mean for (_, v), (test, _) in self.tests.items() if v == variant]
            if not columns:
                cells.append(f"{np.mean(found):+.4f}" if found else "reference")
            record = self.record(variant)
            told = f"{record.wins} · {record.ties} · {record.losses}" if found else ""
            table.add_row(variant.replace(*SHORT_SN), *cells, told)
        return table

    def _mark(self, setting: str, variant: str) -> str:
        test, p = self.tests.get((setting, variant), (None, 1.0))
        if test is None or not p < ESTABLISHED:
            return " "
        return "▲" if test.mean > 0 else "▼"

    def _ranks(self) -> list[Table]:
        if not self.friedman:
            return []
        table = plain_table("Mean ranks (1 = best)")
        table.add_column("")
        for title, found in self.friedman.items():
            table.add_column(f"{title} ({found.n})", justify="right")
        variants = dict.fromkeys(v for found in self.friedman.values() for v in found.methods)
        for variant in variants:
            ranks = (
                f"{f.mean_ranks[f.methods.index(variant)]:.2f}" if variant in f.methods else ""
                for f in self.friedman.values()
            )
            table.add_row(variant.replace(*SHORT_SN), *ranks)
        table.add_section()
        critical = (f"{f.critical_difference:.2f}" for f in self.friedman.values())
        table.add_row("critical difference", *critical)
        table.add_row("Friedman p", *(p_value(f.p) for f in self.friedman.values()))
        return [table]

    def explain(self) -> str:
        """What the numbers in the tables are."""
        how = "paired t-test over repeats"
        if self.test_train_ratio:
            how += (
                ", its variance enlarged for repeats that share rows (Nadeau and Bengio 2003, "
                f"held-out/training rows {self.test_train_ratio:.2f})"
            )
        better = "higher" if self.higher_is_better else "lower"
        told = (
            f"{self.metric} on held-out rows ({better} is better): mean ± sd over "
            f"{self.repeats_are}. Difference from {self.reference}: {how}; p (Holm) over the rows "
            "of the table. Better · tied · worse: settings whose 95 % interval, uncorrected, lies "
            "on that side of 0."
        )
        if len(self.settings) <= MOST_COLUMNS:
            told += f" ▲ ▼: above, below {self.reference}, p (Holm) < {ESTABLISHED}."
        return "\n".join((told, *self.notes))

    def figures(self) -> dict[str, Figure]:
        """File name → figure: the bias by observed count, a setting each; ranks."""
        found = {
            f"sparsity_bias/{setting}.png": sparsity_bias_figure(
                {v.replace(*SHORT_SN): self.curve(setting, v) for v in variants},
                title=setting,
                x=self.axes[0],
                y=self.axes[1],
            )
            for setting, variants in self._curve_names.items()
        }
        for title, ranks in self.friedman.items():
            figure = critical_difference_figure(ranks, title=title)
            found[f"critical_difference/{title}.png"] = figure
        return found

    @property
    def _curve_names(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for part in self.parts:
            for curve in part.curves:
                variants = names.setdefault(curve.setting, [])
                if curve.variant not in variants:
                    variants.append(curve.variant)
        return names

    def curve(self, setting: str, variant: str) -> CountCurve:
        """The mean of all repeats' curves; bins of fewer than 11 items are left out."""
        mine = [
            curve
            for part in self.parts
            for curve in part.curves
            if (curve.setting, curve.variant) == (setting, variant)
        ]
        n = np.array([curve.n for curve in mine])
        shown = n.sum(axis=0) >= SMALLEST_GROUP
        columns = (
            np.array([getattr(curve, name) for curve in mine])
            for name in ("observed", "prediction", "outcome")
        )
        weight = n.sum(axis=0)[shown]
        means = ((column * n).sum(axis=0)[shown] / weight for column in columns)
        return CountCurve(
            setting, variant, tuple(weight.tolist()), *(tuple(m.tolist()) for m in means)
        )

    def as_metrics(self, variant: str) -> dict[str, float]:
        """Flat names and numbers of one variant: `<metric>/<setting>`, its sd, its test."""
        metrics: dict[str, float] = {}
        for (setting, of, metric), found in self._values.items():
            if of == variant:
                name = f"{metric}/{setting}"
                metrics |= {name: float(np.mean(list(found.values())))}
                if len(found) > 1:
                    metrics[f"{metric}_sd/{setting}"] = float(np.std(list(found.values()), ddof=1))
        for (setting, of), (test, p) in self.tests.items():
            if of == variant:
                metrics |= test.as_metrics("delta", f"/{setting}") | {f"delta_p_holm/{setting}": p}
        if variant != self.reference:
            metrics |= self.record(variant).as_metrics("settings")
        for title, ranks in self.friedman.items():
            if variant in ranks.methods:
                metrics[f"rank/{title}"] = ranks.mean_ranks[ranks.methods.index(variant)]
        return {name: value for name, value in metrics.items() if not np.isnan(value)}

    def per_repeat(self, variant: str) -> dict[str, list[float]]:
        """`<metric>_repeat/<setting>` → values in the order of the repeats."""
        return {
            f"{metric}_repeat/{setting}": [found[repeat] for repeat in sorted(found)]
            for (setting, of, metric), found in self._values.items()
            if of == variant
        }

    def chosen(self) -> dict[str, str]:
        """What tuning rows chose, by `setting · variant`, repeat by repeat."""
        found: dict[str, list[str]] = {}
        for part in self.parts:
            for name, what in part.chosen.items():
                found.setdefault(name, []).append(what)
        return {name: "; ".join(each) for name, each in found.items()}


def _shown(value: MeanSD | None) -> str:
    if value is None:
        return "–"
    return f"{value.mean:.3f}" + ("" if np.isnan(value.sd) else f" ± {value.sd:.3f}")


def _interval(test: PairedT) -> str:
    numbers = (test.mean, test.ci_low, test.ci_high)
    if np.isnan(test.ci_low):
        return f"{test.mean:+.4f}"
    difference, low, high = (f"{number:+.4f}" for number in numbers)
    return f"{difference}\n[{low}, {high}]"
