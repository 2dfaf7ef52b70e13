"""Turn held-out labels and predictions into intervals and tests that say what is established.

Everything here is conditional on the models as trained: it measures the luck of *which subjects*
were held out, not of how a network was initialised. For that, see the spread over seeds.

Rows of one subject are alike, and are not taken for independent: `subject`, (n,), says whose each
row is, and what varies from subject to subject is measured between subjects. Where each row is a
subject of its own, as it is without `subject`, that is what is known as DeLong's. `weight`, (n,),
says how many rows a row stands for (see `metrics`); how weights were estimated is not part of the
luck that is measured, which makes intervals slightly wide (Robins and Rotnitzky, 1992).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import permutations
from math import factorial
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2, f, norm, rankdata, studentized_range
from scipy.stats import t as student

from ehr_sn.evaluate.metrics import (
    Array,
    beaten,
    by_subject,
    checked,
    checked_weight,
    class_sizes,
    numbered,
)

Z95 = float(norm.ppf(0.975))
DRAWS = 1000
BLOCK = 2**22  # drawn counts held at a time by the bootstrap
ARRANGEMENTS = 100_000
"""Friedman's test is exact where the ranks can be arranged in at most as many ways."""


@dataclass(frozen=True)
class MeanSD:
    """Mean and standard deviation (ddof=1) of n values; one value alone has no spread: NaN."""

    mean: float
    sd: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.sd:.3f} (sd of {self.n})"

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """`<prefix>_mean` and `<prefix>_sd`."""
        return {f"{prefix}_mean": self.mean, f"{prefix}_sd": self.sd}


@dataclass(frozen=True)
class AUROC:
    """An area under the ROC curve with DeLong's standard error and 95% interval.

    The interval of an area of 0 or 1 is exact and one-sided: see `delong`. `subjects` is there
    where they have several rows each.

    >>> print(AUROC.from_se(0.8127, 0.011, n=1071, n_positive=140))
    AUROC 0.813 (95% CI 0.791 to 0.834, DeLong; 140 of 1,071 positive)
    >>> print(AUROC.from_se(0.8127, 0.021, n=1071, n_positive=140, subjects=310))
    AUROC 0.813 (95% CI 0.772 to 0.854, DeLong; 140 of 1,071 positive, of 310 subjects)
    """

    value: float
    se: float
    ci_low: float
    ci_high: float
    n: int
    n_positive: int
    subjects: int | None = None

    @classmethod
    def from_se(
        cls, value: float, se: float, *, n: int, n_positive: int, subjects: int | None = None
    ) -> Self:
        """The Wald interval value ± 1.96 se, clipped to [0, 1]."""
        return cls(value, se, *_wald(value, se, low=0.0), n, n_positive, subjects)

    def __str__(self) -> str:
        how = "exact" if self.value in (0, 1) else "DeLong"
        return (
            f"AUROC {self.value:.3f} (95% CI {self.ci_low:.3f} to {self.ci_high:.3f}, {how}; "
            f"{_counted(self)})"
        )

    def as_metrics(self, prefix: str = "auroc") -> dict[str, float]:
        """The value as `<prefix>`, everything else as `<prefix>_<name>`."""
        return _as_metrics(self, "value", prefix)


@dataclass(frozen=True)
class PairedAUROC:
    """Difference (a − b) of two AUROCs on the same subjects, its 95% interval and two-sided p.

    p is NaN where the data allow no test: fewer than two subjects of a class, or a difference
    whose standard error is zero.

    >>> print(PairedAUROC.from_se(0.0123, 0.0047, n=853, n_positive=90))
    AUROC difference +0.012 (95% CI +0.003 to +0.022, p = 0.009, paired DeLong; 90 of 853 positive)
    """

    difference: float
    se: float
    ci_low: float
    ci_high: float
    p: float
    n: int
    n_positive: int
    subjects: int | None = None

    @classmethod
    def from_se(
        cls, difference: float, se: float, *, n: int, n_positive: int, subjects: int | None = None
    ) -> Self:
        """The Wald interval difference ± 1.96 se, clipped to [−1, 1], and p of its z-test."""
        interval = _wald(difference, se, low=-1.0)
        p = _two_sided_p(difference, se)
        return cls(difference, se, *interval, p, n, n_positive, subjects)

    def __str__(self) -> str:
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"
        return (
            f"AUROC difference {self.difference:+.3f} (95% CI {self.ci_low:+.3f} to "
            f"{self.ci_high:+.3f}, {p}, paired DeLong; {_counted(self)})"
        )

    def as_metrics(self, prefix: str = "auroc_difference") -> dict[str, float]:
        """The difference as `<prefix>`, everything else as `<prefix>_<name>`."""
        return _as_metrics(self, "difference", prefix)


@dataclass(frozen=True)
class PairedBootstrap:
    """Difference (a − b) of two AUROCs on the same subjects, with a bootstrap's 95% interval."""

    difference: float
    ci_low: float
    ci_high: float
    n: int
    n_positive: int
    draws: int
    subjects: int | None = None

    def __str__(self) -> str:
        return (
            f"AUROC difference {self.difference:+.3f} (95% CI {self.ci_low:+.3f} to "
            f"{self.ci_high:+.3f}, {self.draws:,} bootstrap draws; {_counted(self)})"
        )

    def as_metrics(self, prefix: str = "auroc_difference_bootstrap") -> dict[str, float]:
        """The difference as `<prefix>`, everything else as `<prefix>_<name>`."""
        return _as_metrics(self, "difference", prefix)


@dataclass(frozen=True)
class Friedman:
    """Do k methods rank alike over n cells? Friedman's test, and Nemenyi's critical difference.

    `mean_ranks` (1 = best) are in the order of `methods`. Two methods differ where their mean ranks
    are at least `critical_difference` apart (at 5%). `p` is that of the permutations of the ranks
    where `exact`, and else that of `f`; `p_chi2` is that of `chi2`.
    """

    methods: tuple[str, ...]
    mean_ranks: tuple[float, ...]
    n: int
    chi2: float
    p_chi2: float
    f: float
    p: float
    critical_difference: float
    exact: bool = False

    def __str__(self) -> str:
        order = np.argsort(self.mean_ranks, kind="stable")
        ranks = ", ".join(f"{self.methods[i]} {self.mean_ranks[i]:.2f}" for i in order)
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"
        how = "exact" if self.exact else f"F = {self.f:.2f}"
        return (
            f"Mean ranks over {self.n} cells: {ranks}; Friedman {p} ({how}), "
            f"Nemenyi's critical difference {self.critical_difference:.2f}"
        )

    def as_metrics(self, prefix: str = "friedman") -> dict[str, float]:
        """`<prefix>_<name>` for each number, and `<prefix>_rank/<method>` for each method."""
        numbers = ("n", "chi2", "p_chi2", "f", "p", "critical_difference")
        ranks = zip(self.methods, self.mean_ranks, strict=True)
        return {f"{prefix}_{name}": float(getattr(self, name)) for name in numbers} | {
            f"{prefix}_rank/{method}": rank for method, rank in ranks
        }

    def alike(self, method: str) -> tuple[str, ...]:
        """The other methods from which this one cannot be told apart."""
        rank = self.mean_ranks[self.methods.index(method)]
        return tuple(
            other
            for other, its in zip(self.methods, self.mean_ranks, strict=True)
            if other != method and abs(its - rank) < self.critical_difference
        )


@dataclass(frozen=True)
class WinTieLoss:
    """In how many cells a method is better, not told apart, and worse."""

    wins: int
    ties: int
    losses: int

    def __str__(self) -> str:
        return f"{self.wins} won, {self.ties} tied, {self.losses} lost"

    def as_metrics(self, prefix: str = "cells") -> dict[str, float]:
        """`<prefix>_wins`, `<prefix>_ties` and `<prefix>_losses`."""
        return {f"{prefix}_{f.name}": float(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True)
class PairedT:
    """Mean of n paired differences, its standard error, 95% interval and two-sided p.

    All but the mean are NaN for a single pair, or for pairs that all differ by the same amount.
    """

    mean: float
    se: float
    ci_low: float
    ci_high: float
    p: float
    n: int

    def __str__(self) -> str:
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"
        return (
            f"difference {self.mean:+.4f} (95% CI {self.ci_low:+.4f} to {self.ci_high:+.4f}, {p}, "
            f"paired t over {self.n} repeats)"
        )

    def as_metrics(self, prefix: str = "delta", suffix: str = "") -> dict[str, float]:
        """The mean as `<prefix><suffix>`, the rest as `<prefix>_<name><suffix>`."""
        names = ("ci_low", "ci_high", "p")
        rest = {f"{prefix}_{name}{suffix}": float(getattr(self, name)) for name in names}
        return {f"{prefix}{suffix}": self.mean} | rest


Estimate = TypeVar("Estimate", AUROC, PairedAUROC)


def delong(
    y: ArrayLike,
    score: ArrayLike,
    subject: ArrayLike | None = None,
    weight: ArrayLike | None = None,
) -> AUROC:
    """AUROC of one prediction with DeLong's 95% interval; all of shape (n,).

    An AUROC of 1, or of 0, has no spread, but is not certain. Its interval reaches from there to
    Clopper and Pearson's bound (Biometrika 26:404, 1934) for k of k independent pairs, 0.025^(1/k),
    k the subjects of the smaller class: so many pairs of a positive and a negative share no
    subject, and all are in order. `se` is that of which 1.96 reach this bound. The bound is
    conservative; others assume a distribution of the scores (N. A. Obuchowski, M. L. Lieber, Acad
    Radiol 9:526, 2002). Fewer than two subjects of a class give a NaN interval. Raises ValueError
    as `metrics.auroc` does. Source: see `delong_covariance`.

    >>> print(delong([0, 0, 0, 1, 1, 1], [0.1, 0.2, 0.6, 0.3, 0.7, 0.8]))
    AUROC 0.889 (95% CI 0.581 to 1.000, DeLong; 3 of 6 positive)
    >>> print(delong([0, 0, 0, 1, 1, 1], [0.1, 0.2, 0.3, 0.6, 0.7, 0.8]))
    AUROC 1.000 (95% CI 0.292 to 1.000, exact; 3 of 6 positive)
    """
    wins = _wins(y, np.asarray(score)[None], subject, weight)
    area, variance = wins.areas_and_covariance()
    value, se = float(area[0]), float(np.sqrt(variance[0, 0]))
    if min(value, 1 - value) < 1e-12 and se < 1e-12:  # weights may round
        value, se = round(value), (1 - 0.025 ** (1 / min(wins.subjects_by_class()))) / Z95
    return AUROC.from_se(value, se, **wins.counts())


def paired_delong(
    y: ArrayLike,
    score_a: ArrayLike,
    score_b: ArrayLike,
    subject: ArrayLike | None = None,
    weight: ArrayLike | None = None,
) -> PairedAUROC:
    """Is the AUROC of `a` different from that of `b` on the same subjects? All of shape (n,).

    DeLong's test for correlated curves, two-sided. Predictions that rank the subjects alike have
    difference 0 and p = 1. Raises ValueError as `metrics.auroc` does. Source: see
    `delong_covariance`.

    >>> y = [0, 0, 0, 0, 1, 1, 1, 1]
    >>> a, b = [1, 2, 3, 5, 4, 6, 7, 8], [1, 6, 3, 7, 4, 5, 2, 8]
    >>> print(paired_delong(y, a, b))
    AUROC difference +0.375 (95% CI -0.072 to +0.822, p = 0.100, paired DeLong; 4 of 8 positive)
    """
    wins = _wins(y, np.stack([score_a, score_b]), subject, weight)
    area, variance = wins.difference().areas_and_covariance()
    return PairedAUROC.from_se(float(area[0]), float(np.sqrt(variance[0, 0])), **wins.counts())


def paired_bootstrap(
    y: ArrayLike,
    score_a: ArrayLike,
    score_b: ArrayLike,
    subject: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> PairedBootstrap:
    """Difference of two AUROCs on the same subjects, by resampling subjects within each class.

    The interval runs from the 2.5% to the 97.5% quantile of the differences in `draws` bootstrap
    samples (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13), each of as many
    subjects with a positive row, and without, as there are; a subject comes with all of its rows.
    It assumes no normal distribution, as DeLong's does. `y`, both scores, `subject` and `weight`
    have shape (n,). Raises ValueError as `metrics.auroc` does.

    >>> y = [0, 0, 0, 0, 1, 1, 1, 1]
    >>> a, b = [1, 2, 3, 5, 4, 6, 7, 8], [1, 6, 3, 7, 4, 5, 2, 8]
    >>> print(paired_bootstrap(y, a, b))
    AUROC difference +0.375 (95% CI +0.000 to +0.750, 1,000 bootstrap draws; 4 of 8 positive)
    """
    positive, scores = checked(y, np.stack([score_a, score_b]), ndim=2)
    class_sizes(positive)
    wins = _wins(y, scores, subject, weight)
    owner = np.arange(len(positive))
    if subject is not None and wins.owners is not None:
        owner = numbered(subject)
    each: NDArray[Any] = np.ones(len(positive), dtype=np.int64)
    if weight is not None:
        each = checked_weight(weight, positive)
    ill = np.unique(owner[positive])
    well = np.setdiff1d(owner, ill)
    rng = np.random.default_rng(seed)
    ranked = []
    for score in scores:
        order = np.argsort(score[~positive])
        below = score[~positive][order]
        ends = [np.searchsorted(below, score[positive], side) for side in ("left", "right")]
        ranked.append((order, *ends))
    differences = np.empty(draws)
    per_block = max(1, BLOCK // len(positive))
    for start in range(0, draws, per_block):
        size = min(per_block, draws - start)
        times = np.empty((size, len(ill) + len(well)), dtype=np.int64)  # that a subject is drawn
        times[:, ill], times[:, well] = (_resampled(rng, len(of), size) for of in (ill, well))
        of_positives = times[:, owner[positive]] * each[positive]
        of_negatives = times[:, owner[~positive]] * each[~positive]
        pairs = 2 * of_positives.sum(axis=1) * of_negatives.sum(axis=1)
        areas = []
        for order, left, right in ranked:
            lost = np.zeros((size, of_negatives.shape[1] + 1), dtype=of_negatives.dtype)
            np.cumsum(of_negatives[:, order], axis=1, out=lost[:, 1:])
            won = lost[:, left] + lost[:, right]
            areas.append(np.einsum("dm,dm->d", of_positives, won) / pairs)
        differences[start : start + size] = areas[0] - areas[1]
    low, high = np.quantile(differences, [0.025, 0.975])
    area = wins.areas_and_covariance()[0]
    return PairedBootstrap(
        float(area[0] - area[1]), float(low), float(high), draws=draws, **wins.counts()
    )


def _resampled(rng: np.random.Generator, n: int, draws: int) -> NDArray[np.intp]:
    """(draws, n): how often each of n subjects is in a sample of n of them, with replacement."""
    drawn = rng.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n)


def friedman(scores: ArrayLike, methods: Sequence[str]) -> Friedman:
    """Rank k methods in each of n cells and test whether they differ.

    Parameters
    ----------
    scores : shape (n, k), higher is better; a row is a data set, or a disease of one
    methods : k names

    Raises
    ------
    ValueError
        Fewer than two cells or methods, a NaN, or shapes that do not match.

    Notes
    -----
    Ties share their middle rank. Friedman's chi-square is corrected for them (W. J. Conover,
    Practical Nonparametric Statistics, 3rd ed., 1999, section 5.8); without ties it is that of
    J. Demšar, JMLR 7:1 (2006), as are Iman and Davenport's F and Nemenyi's critical difference.

    Where the ranks within the cells can be arranged in at most 100,000 ways, (k!)^(n − 1) up to
    the order of the columns, `p` is exact: the share of them whose chi-square is at least as high.
    Beyond that it is the p of F. Where every cell is one tie, p is 1.

    The test takes the cells for independent. Diseases of one cohort are not: there it is a summary,
    not a proof.

    Examples
    --------
    >>> result = friedman([[0.8, 0.7, 0.6], [0.9, 0.7, 0.8], [0.7, 0.6, 0.5]], ["a", "b", "c"])
    >>> print(str(result).replace("; ", chr(10)))
    Mean ranks over 3 cells: a 1.00, b 2.33, c 2.67
    Friedman p = 0.194 (exact), Nemenyi's critical difference 1.91
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(methods) or min(table.shape) < 2:
        raise ValueError(
            f"friedman needs scores of shape (n cells, {len(methods)} methods), two or more of "
            f"each, got {table.shape}"
        )
    if np.isnan(table).any():
        raise ValueError("friedman cannot rank NaN: leave out cells that lack a method")
    n, k = table.shape
    of_cells = rankdata(-table, axis=1)
    ranks, middle = of_cells.mean(axis=0), (k + 1) / 2
    scatter = np.square(of_cells - middle).sum()
    between = n**2 * np.square(ranks - middle).sum()
    statistic = (k - 1) * between / scatter if scatter else 0.0
    exact = factorial(k) ** (n - 1) <= ARRANGEMENTS
    left = n * (k - 1) - statistic
    ratio = (n - 1) * statistic / left if left > 1e-9 else np.inf  # infinite: all cells agree
    q = studentized_range.ppf(0.95, k, np.inf) / np.sqrt(2)
    return Friedman(
        methods=tuple(methods),
        mean_ranks=tuple(ranks.tolist()),
        n=n,
        chi2=float(statistic),
        p_chi2=float(chi2.sf(statistic, k - 1)),
        f=float(ratio),
        p=_arranged(of_cells) if exact else float(f.sf(ratio, k - 1, (k - 1) * (n - 1))),
        critical_difference=float(q * np.sqrt(k * (k + 1) / (6 * n))),
        exact=exact,
    )


def _arranged(ranks: Array) -> float:
    """Share of all arrangements within the rows of `ranks` (n, k) that lie as far apart or further.

    Row by row, which column a sum of ranks is in does not matter: so sums are kept sorted, each
    with its number of arrangements.
    """
    rows = np.rint(2 * ranks).astype(np.int64)  # middle ranks are half-integers
    orders = list(permutations(range(rows.shape[1])))
    sums: NDArray[np.int64] = np.sort(rows[:1])
    ways: NDArray[Any] = np.ones(1, np.int64)
    for row in rows[1:]:
        added = np.sort((sums[:, None] + row[orders]).reshape(-1, len(row)))
        sums, place = np.unique(added, axis=0, return_inverse=True)
        ways = np.bincount(place.ravel(), np.repeat(ways, len(orders))).astype(np.int64)
    as_far = np.square(sums).sum(axis=1) >= np.square(rows.sum(axis=0)).sum()
    return float(ways[as_far].sum() / ways.sum())


def win_tie_loss(intervals: Sequence[tuple[float, float]]) -> WinTieLoss:
    """Count intervals of a difference above zero, with zero in them, and below zero.

    An interval that is not known (NaN) establishes nothing: a tie.

    >>> print(win_tie_loss([(0.01, 0.03), (-0.01, 0.02), (0.0, 0.0), (-0.04, -0.01)]))
    1 won, 2 tied, 1 lost
    """
    wins = sum(low > 0 for low, _ in intervals)
    losses = sum(high < 0 for _, high in intervals)
    return WinTieLoss(wins, len(intervals) - wins - losses, losses)


def paired_t(differences: ArrayLike, test_train_ratio: float = 0.0) -> PairedT:
    """Do two methods differ, over repeats on the same held-out rows and seeds?

    Parameters
    ----------
    differences : (n,), one a repeat
    test_train_ratio : held-out over training rows of a repeat, where repeats resample the same rows
        (k-fold cross-validation: 1 / (k − 1)); 0 where they differ in nothing but the seed

    Notes
    -----
    Repeats that share rows are correlated, and the plain t-test finds far too many differences.
    The variance of the mean is taken as (1/n + ratio) · s², with n − 1 degrees of freedom:
    C. Nadeau and Y. Bengio, Machine Learning 52:239 (2003); for repeated cross-validation
    R. R. Bouckaert and E. Frank, PAKDD (2004). Differences that are all 0 have p = 1. Raises
    ValueError for an empty list.

    >>> print(paired_t([0.01, 0.02, 0.03, 0.02]))
    difference +0.0200 (95% CI +0.0070 to +0.0330, p = 0.016, paired t over 4 repeats)
    >>> print(paired_t([0.01, 0.02, 0.03, 0.02], 1 / 3))
    difference +0.0200 (95% CI +0.0002 to +0.0398, p = 0.049, paired t over 4 repeats)
    """
    found = mean_sd(differences)
    if found.mean == 0 and not found.sd:
        return PairedT(0.0, 0.0, 0.0, 0.0, 1.0, found.n)
    if not found.sd > 0:
        return PairedT(found.mean, np.nan, np.nan, np.nan, np.nan, found.n)
    se = found.sd * float(np.sqrt(1 / found.n + test_train_ratio))
    half = float(student.ppf(0.975, found.n - 1)) * se
    p = float(2 * student.sf(abs(found.mean) / se, found.n - 1))
    return PairedT(found.mean, se, found.mean - half, found.mean + half, p, found.n)


def delong_covariance(
    y: ArrayLike,
    scores: ArrayLike,
    subject: ArrayLike | None = None,
    weight: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """AUROCs of k predictions of the same subjects and the covariance matrix between them.

    Parameters
    ----------
    y : shape (n,), 0 or 1
    scores : shape (k, n)
    subject, weight : shape (n,)

    Returns
    -------
    areas : shape (k,)
    covariance : shape (k, k); NaN with fewer than two subjects of either class

    Raises
    ------
    ValueError
        As `metrics.auroc` does.

    Notes
    -----
    DeLong, DeLong and Clarke-Pearson, Biometrics 44:837 (1988), by the midranks of Sun and Xu,
    IEEE Signal Processing Letters 21:1389 (2014): O(k n log n), ties included. Of subjects with
    several rows: N. A. Obuchowski, Biometrics 53:567 (1997).

    Examples
    --------
    >>> areas, covariance = delong_covariance([0, 0, 1, 1], [[1, 3, 2, 4], [1, 2, 3, 4]])
    >>> areas
    array([0.75, 1.  ])
    >>> covariance
    array([[0.125, 0.   ],
           [0.   , 0.   ]])
    """
    return _wins(y, scores, subject, weight).areas_and_covariance()


def holm(p_values: ArrayLike) -> Array:
    """Holm's step-down adjusted p-values, in the order given (Scand J Statist 6:65, 1979).

    They control the chance of *any* false finding among the tests. A NaN (a test that could not
    be made) stays NaN and does not count as a test. Shape (k,) in and out. Raises ValueError for
    values outside [0, 1].

    >>> holm([0.01, 0.04, float("nan"), 0.03])
    array([0.03, 0.06,  nan, 0.06])
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or ((p < 0) | (p > 1)).any():
        raise ValueError(f"holm needs a flat list of p-values between 0 and 1, got shape {p.shape}")
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN sorts last
    adjusted = np.full_like(p, np.nan)
    still_open = np.arange(order.size, 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(still_open * p[order]))
    return adjusted


def over_splits(results: Sequence[Estimate]) -> Estimate:
    """One result from the same comparison on several random splits of the same subjects.

    The value is the mean over splits. Its standard error is *not* divided by √(number of splits):
    the held-out sets of repeated random splits share subjects, so the splits are correlated by an
    unknown amount, and treating them as independent would call noise a finding. Whatever the
    correlation, the variance of the mean is at most the mean of the variances (it is reached when
    all splits agree completely), so se = √mean(se²). The interval and p follow from that: they are
    conservative, and repeating a split never narrows them.

    Like each split's result it is conditional on the trained models: it says how far the subjects
    held out may have favoured them, not how training again would turn out. n and n_positive are
    rounded means. Raises ValueError for no results, TypeError for a mixture of the two kinds.

    >>> splits = [AUROC.from_se(v, 0.02, n=500, n_positive=60) for v in (0.80, 0.82, 0.84)]
    >>> print(over_splits(splits))
    AUROC 0.820 (95% CI 0.781 to 0.859, DeLong; 60 of 500 positive)
    """
    if not results:
        raise ValueError("no results to combine: pass one result a split")
    kind = type(results[0])
    if any(type(result) is not kind for result in results):
        raise TypeError("results of different kinds: pass only AUROC or only PairedAUROC")
    counts: dict[str, Any] = {
        name: round(np.mean([getattr(r, name) for r in results]))
        for name in ("n", "n_positive", "subjects")
        if getattr(results[0], name) is not None
    }
    values = [r.value if isinstance(r, AUROC) else r.difference for r in results]
    mean = float(np.mean(values))
    return kind.from_se(mean, float(np.sqrt(np.mean([r.se**2 for r in results]))), **counts)


def bootstrap_over_splits(results: Sequence[PairedBootstrap]) -> PairedBootstrap:
    """Average each end of the splits' intervals, as if the draws of all splits agreed.

    >>> one = PairedBootstrap(0.01, -0.01, 0.03, n=500, n_positive=60, draws=2000)
    >>> bootstrap_over_splits([one, one]) == one
    True
    """
    several = results[0].subjects is not None
    numbers = [
        (r.difference, r.ci_low, r.ci_high, r.n, r.n_positive, r.subjects or 0) for r in results
    ]
    difference, low, high, *counts = np.mean(numbers, axis=0).tolist()
    n, n_positive, subjects = map(round, counts)
    return PairedBootstrap(
        difference, low, high, n, n_positive, results[0].draws, subjects if several else None
    )


def mean_sd(values: ArrayLike) -> MeanSD:
    """Mean and sample standard deviation (ddof=1) of a flat list; the sd of one value is NaN.

    It is the spread of single values, say over seeds, and not a standard error of the mean.
    Raises ValueError for an empty list.

    >>> print(mean_sd([0.80, 0.82, 0.84]))
    0.820 ± 0.020 (sd of 3)
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not x.size:
        raise ValueError(f"mean_sd needs a flat list of at least one value, got shape {x.shape}")
    return MeanSD(float(x.mean()), float(x.std(ddof=1)) if x.size > 1 else np.nan, x.size)


@dataclass(frozen=True)
class _Wins:
    """What each positive beats (k, m), and what beats each negative (k, n), for k predictions.

    A tie counts one half. Without weights these are exact half-integers, and are divided only at
    the very end, so that predictions which rank alike differ by exactly zero. `owners` and `each`
    are the subjects and weights of the positives, and of the negatives; None where each row is a
    subject of its own, and counts one.
    """

    below: Array
    above: Array
    owners: tuple[NDArray[np.intp], NDArray[np.intp]] | None = None
    each: tuple[Array, Array] | None = None

    @property
    def subjects(self) -> int | None:
        return None if self.owners is None else len(np.union1d(*self.owners))

    def counts(self) -> dict[str, Any]:
        m = self.below.shape[-1]
        return {"n": m + self.above.shape[-1], "n_positive": m, "subjects": self.subjects}

    def subjects_by_class(self) -> tuple[int, int]:
        """How many subjects have a positive row, and how many a negative one."""
        if self.owners is None:
            return self.below.shape[-1], self.above.shape[-1]
        return len(np.unique(self.owners[0])), len(np.unique(self.owners[1]))

    def difference(self) -> "_Wins":
        """Return the first prediction's wins less the second's, as if of one prediction."""
        below, above = (wins[:1] - wins[1:] for wins in (self.below, self.above))
        return replace(self, below=below, above=above)

    def areas_and_covariance(self) -> tuple[Array, Array]:
        """Wins as fractions are DeLong's structural components; their scatter is the covariance."""
        m, n = self.below.shape[-1], self.above.shape[-1]
        if self.owners is None and self.each is None:
            areas: Array = self.below.sum(axis=-1) / (m * n)
            scatter = _scatter(self.below) / (m * n**2) + _scatter(self.above) / (n * m**2)
            return areas, scatter
        of_positives, of_negatives = self.each or (np.ones(m), np.ones(n))
        owners = self.owners or (np.arange(m), m + np.arange(n))
        subjects = max(owner.max() for owner in owners) + 1
        total = of_positives.sum() * of_negatives.sum()
        areas = self.below @ of_positives / total
        # By how much each row moves the area, added up over the rows of each subject.
        moves = [
            by_subject(each * (wins - areas[:, None] * total / each.sum()) / total, owner, subjects)
            for each, wins, owner in zip(
                (of_positives, of_negatives), (self.below, self.above), owners, strict=True
            )
        ]
        cases, controls = self.subjects_by_class()
        both = len(np.union1d(*owners))
        if min(cases, controls) < 2:
            return areas, np.full((len(areas), len(areas)), np.nan)
        cross = moves[0] @ moves[1].T
        return areas, (
            moves[0] @ moves[0].T * cases / (cases - 1)
            + moves[1] @ moves[1].T * controls / (controls - 1)
            + (cross + cross.T) * both / (both - 1)
        )


def _wins(
    y: ArrayLike, scores: ArrayLike, subject: ArrayLike | None, weight: ArrayLike | None
) -> _Wins:
    """The rank of a positive among all rows less its rank among the positives is what it beats."""
    positive, scores = checked(y, scores, ndim=2)
    m, _ = class_sizes(positive)
    owners = None
    if subject is not None and len(of := numbered(subject)) > of.max() + 1:
        if len(of) != len(positive):
            raise ValueError(f"subject has {len(of)} rows and y {len(positive)}")
        owners = of[positive], of[~positive]
    if weight is not None:
        weight = checked_weight(weight, positive)
        each = weight[positive], weight[~positive]
        below = beaten(scores[:, positive], scores[:, ~positive], each[1])
        above = beaten(-scores[:, ~positive], -scores[:, positive], each[0])
        return _Wins(below, above, owners, each)
    ranks = rankdata(scores, axis=-1)
    below = ranks[:, positive] - rankdata(scores[:, positive], axis=-1)
    above = m - (ranks[:, ~positive] - rankdata(scores[:, ~positive], axis=-1))
    return _Wins(below, above, owners)


def _scatter(wins: Array) -> Array:
    """Covariance (ddof=1) between the rows; NaN where a single column leaves it unknown."""
    k, n = wins.shape
    if n < 2:
        return np.full((k, k), np.nan)
    centred = wins - wins.mean(axis=-1, keepdims=True)
    covariance: Array = np.einsum("in,jn->ij", centred, centred) / (n - 1)
    return covariance


def _counted(result: AUROC | PairedAUROC | PairedBootstrap) -> str:
    rows = f"{result.n_positive:,} of {result.n:,} positive"
    return rows if result.subjects is None else f"{rows}, of {result.subjects:,} subjects"


def _wald(value: float, se: float, *, low: float) -> tuple[float, float]:
    lower, upper = np.clip([value - Z95 * se, value + Z95 * se], low, 1.0)
    return float(lower), float(upper)


def _two_sided_p(difference: float, se: float) -> float:
    if se == 0:
        return 1.0 if difference == 0 else np.nan
    return float(2 * norm.sf(abs(difference) / se))


def _as_metrics(
    result: AUROC | PairedAUROC | PairedBootstrap, main: str, prefix: str
) -> dict[str, float]:
    return {
        prefix if f.name == main else f"{prefix}_{f.name}": float(value)
        for f in fields(result)
        if (value := getattr(result, f.name)) is not None
    }
