"""Turn held-out predictions and comparisons into figures.

Every function returns a `matplotlib.figure.Figure` that knows how to save itself and touches no
global state (no pyplot), so figures can be made in any thread and are freed like any other object.
Positions are set by hand: a layout engine would take longer than the drawing.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from sklearn.metrics import roc_curve

from ehr_sn.config import SMALLEST_GROUP
from ehr_sn.evaluate.metrics import Array, Sample, calibration, checked, numbered
from ehr_sn.evaluate.statistics import AUROC, delong, over_splits

DPI = 100

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which readers with any colour vision can tell apart."""

GREY, FAINT = "#8a8a8a", "#ececec"

Curve = tuple[Any, ...]
"""A name and the parts of a `metrics.Sample`, of which subjects and weights may be left out."""
Summary = Mapping[str, Any]
Corner = Literal["lower right", "upper left"]


def roc_and_calibration(curves: Sequence[Curve], *, title: str = "") -> Figure:
    """ROC curve on the left, calibration curve on the right, one line a split.

    Parameters
    ----------
    curves : list of (label, y, p), or (label, y, p, subject, weight)
        For each split its name, the held-out labels (n,) and the probabilities (n,), typically
        averaged over seeds; whose each row is, and what it stands for, as in `metrics.Sample`.
    title : str
        What is predicted, and by which method.

    Raises
    ------
    ValueError
        No curves, or labels and probabilities that `metrics.calibration` refuses.

    Notes
    -----
    Subjects are not to be singled out: ROC curves are drawn through 101 fixed false-positive rates
    instead of one vertex a subject, and not at all with fewer than 11 subjects in a class; a point
    of the calibration curve stands for at least 11 subjects. More than seven splits are not named
    one by one.

    Examples
    --------
    >>> y, p = [0, 1] * 60, [0.2, 0.3, 0.4, 0.7] * 30
    >>> figure = roc_and_calibration([("split 0", y, p)], title="Diabetes")
    >>> [axes.get_title(loc="left") for axes in figure.axes]
    ['ROC', 'Calibration']
    """
    if not curves:
        raise ValueError("no curves to draw: pass one (label, y, p) a split")
    figure = _figure(9.6, 5.0, title)
    _draw_roc(figure.add_axes((0.08, 0.115, 0.40, 0.735)), curves)
    _draw_calibration(figure.add_axes((0.58, 0.115, 0.40, 0.735)), curves)
    return figure


def seed_strip(results: Sequence[Summary], *, title: str = "") -> Figure:
    """Every method's AUROC on every disease: mean, single seeds, and interval of the ensemble.

    One panel a disease, one row a method (and scaler, where several were used), one colour an
    architecture. A large dot is the mean over seeds, small dots are the seeds, and the bar is the
    95% interval of the seed-averaged prediction, whose AUROC is its tick.

    Parameters
    ----------
    results : list of mappings
        Keys `disease`, `architecture`, `method`, `scaler`, `auroc_mean`, `auroc_per_seed` (a
        list), `auroc_ensemble`, `ci_low`, `ci_high`. Panels, rows and colours keep the order in
        which their names first appear. Each panel has its own AUROC axis.
    title : str
        What was compared.

    Raises
    ------
    ValueError
        No results.

    Examples
    --------
    >>> row = dict(disease="Diabetes", architecture="64", method="SN", scaler="z-score",
    ...            auroc_mean=0.81, auroc_per_seed=[0.80, 0.82], auroc_ensemble=0.82,
    ...            ci_low=0.79, ci_high=0.85)
    >>> figure = seed_strip([row, {**row, "method": "zero"}], title="Held out")
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['SN', 'zero']
    """
    if not results:
        raise ValueError("no results to draw: pass one mapping a method and disease")
    diseases = _distinct(r["disease"] for r in results)
    architectures = _distinct(r["architecture"] for r in results)
    rows = _distinct((r["method"], r["scaler"]) for r in results)
    one_scaler = len({scaler for _, scaler in rows}) == 1
    names = [str(method) if one_scaler else f"{method} · {scaler}" for method, scaler in rows]

    columns = min(5, len(diseases))  # from here on in inches
    lines = -(-len(diseases) // columns)
    left, top, bottom, gap = 0.3 + 0.08 * max(map(len, names)), 0.85, 1.05, 0.25
    wide = max(2.3, (6.5 - left) / columns - gap)
    high = 0.2 + len(rows) * (0.14 + 0.13 * len(architectures))
    across, down = wide + gap, high + 0.75
    width, height = left + columns * across, top + lines * down - 0.75 + bottom
    figure = _figure(width, height, title)
    for i, disease in enumerate(diseases):
        x, y = left + i % columns * across, height - top - i // columns * down - high
        axes = figure.add_axes((x / width, y / height, wide / width, high / height))
        _draw_strip(axes, [r for r in results if r["disease"] == disease], rows, architectures)
        axes.set_yticks(range(len(names)), names if i % columns == 0 else [])
        axes.set_title(disease, loc="left", fontsize=10, fontweight="bold")
    _strip_legend(figure, architectures)
    return figure


def binned_calibration(
    y: ArrayLike,
    p: ArrayLike,
    subject: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    *,
    bins: int = 10,
    at_least: int = SMALLEST_GROUP,
) -> tuple[Array, Array]:
    """Mean predicted probability and observed fraction in quantile bins of `p`.

    Equal probabilities share a bin. A small sample gets fewer bins, so that each can hold
    `at_least` subjects, and a bin that ties leave smaller than that is suppressed. All have shape
    (n,); both results have shape (at most `bins`,). Raises ValueError for labels other than 0 and
    1 and for values of `p` outside [0, 1].

    >>> p = [0.1] * 20 + [0.4] * 5 + [0.8] * 20
    >>> predicted, observed = binned_calibration([0, 0, 0, 1] * 11 + [1], p)
    >>> predicted.round(2), observed.round(2)
    (array([0.1, 0.8]), array([0.25, 0.3 ]))
    """
    positive, p = checked(y, p, probabilities=True)
    owner = np.arange(p.size) if subject is None else numbered(subject)
    each = np.ones(p.size) if weight is None else np.asarray(weight, dtype=np.float64)
    bins = max(1, min(bins, len(np.unique(owner)) // at_least))
    edges = np.unique(np.quantile(p, np.arange(1, bins) / bins))
    bin_of = np.searchsorted(edges, p)
    total, predicted, observed = (np.bincount(bin_of, weights=each * x) for x in (1.0, p, positive))
    subjects = np.bincount(np.unique(np.stack([bin_of, owner]), axis=1)[0], minlength=len(total))
    shown = subjects >= at_least
    return predicted[shown] / total[shown], observed[shown] / total[shown]


def _draw_roc(axes: Axes, curves: Sequence[Curve]) -> None:
    grid = np.linspace(0, 1, 101)
    samples = [Sample(*parts) for _, *parts in curves]
    areas = [delong(*sample) for sample in samples]
    styles = _styles(curves)
    for (label, *_), sample, area, style in zip(curves, samples, areas, styles, strict=True):
        too_few = min(sample.subjects_by_class) < SMALLEST_GROUP
        name = _entry(label, area) + (", not drawn" if too_few else "")
        false_positive_rate, true_positive_rate, _ = roc_curve(
            *checked(sample.y, sample.p), sample_weight=sample.weight
        )
        sensitivity = np.interp(grid, false_positive_rate, true_positive_rate)
        sensitivity[0] = 0
        axes.plot(grid, np.full(101, np.nan) if too_few else sensitivity, label=name, **style)
    _against_diagonal(axes, "ROC", "1 − specificity", "sensitivity", limit=1)
    mean = _entry("mean", over_splits(areas)) if len(areas) > 1 else None
    _legend(axes, "AUROC (95% interval)", loc="lower right", last=mean)


def _draw_calibration(axes: Axes, curves: Sequence[Curve]) -> None:
    samples = [Sample(*parts) for _, *parts in curves]
    bins = [binned_calibration(*sample) for sample in samples]
    styles = _styles(curves)
    for (label, *_), sample, points, style in zip(curves, samples, bins, styles, strict=True):
        slope, intercept = calibration(sample.y, sample.p, sample.weight)
        name = f"{label}   {slope:.2f}, {intercept:+.2f}"
        axes.plot(*points, marker="o", markersize=3.5, label=name, **style)
    predicted, observed = np.concatenate(bins, axis=1)
    if not predicted.size:
        note = f"every bin holds fewer than\n{SMALLEST_GROUP} subjects: not drawn"
        axes.text(0.95, 0.05, note, transform=axes.transAxes, ha="right", fontsize=8.5)
    highest = max(predicted.max(initial=0), observed.max(initial=0)) or 1
    limit = min(1, 1.08 * highest)
    _against_diagonal(axes, "Calibration", "predicted probability", "observed fraction", limit)
    free_corner: Corner = "lower right" if observed.sum() > predicted.sum() else "upper left"
    _legend(axes, "slope, intercept (ideally 1, 0)", loc=free_corner)


def _draw_strip(
    axes: Axes,
    results: Sequence[Summary],
    rows: Sequence[tuple[str, str]],
    architectures: Sequence[str],
) -> None:
    for row in range(0, len(rows), 2):
        axes.axhspan(row - 0.5, row + 0.5, color=FAINT, linewidth=0, zorder=0)
    for a, architecture in enumerate(architectures):
        mine = [r for r in results if r["architecture"] == architecture]
        shift = 0.66 * ((a + 0.5) / len(architectures) - 0.5)
        y = np.array([rows.index((r["method"], r["scaler"])) + shift for r in mine])
        low, high, ensemble, mean = (
            [r[key] for r in mine] for key in ("ci_low", "ci_high", "auroc_ensemble", "auroc_mean")
        )
        seeds = [(seed, at) for r, at in zip(mine, y, strict=True) for seed in r["auroc_per_seed"]]
        style: dict[str, Any] = {"color": COLOURS[a % len(COLOURS)], "linestyle": "none"}
        axes.hlines(y, low, high, color=style["color"], alpha=0.35, linewidth=3)
        axes.plot(ensemble, y, "|", markersize=7, **style)
        axes.plot(*np.array(seeds).reshape(-1, 2).T, ".", markersize=3, **style)
        axes.plot(mean, y, "o", markersize=5.5, markeredgecolor="white", **style)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set_xlabel("AUROC", fontsize=9)
    axes.tick_params(labelsize=9, length=0, axis="y")
    axes.tick_params(labelsize=8, length=3, axis="x")
    axes.grid(axis="x", color="#d4d4d4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _strip_legend(figure: Figure, architectures: Sequence[str]) -> None:
    """Two lines below everything: what the colours mean, what the marks mean."""

    def mark(marker: str, label: str, **style: Any) -> Line2D:
        return Line2D([], [], marker=marker, linestyle="none", label=label, **style)

    colours = [
        mark("s", str(name), color=COLOURS[i % len(COLOURS)])
        for i, name in enumerate(architectures)
    ]
    shapes = [
        mark("o", "mean of seeds", color=GREY, markersize=5.5),
        mark(".", "one seed", color=GREY, markersize=3),
        mark("|", "seed-averaged prediction", color=GREY, markersize=8),
        Line2D([], [], color=GREY, alpha=0.5, linewidth=3, label="its 95% interval"),
    ]
    for handles, inches in ((colours, 0.32), (shapes, 0.08)):
        figure.legend(
            handles=handles,
            loc="lower center",
            bbox_to_anchor=(0.5, inches / figure.get_figheight()),
            borderaxespad=0,
            ncols=len(handles),
            frameon=False,
            fontsize=9,
            handletextpad=0.4,
        )


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.15 / width, 1 - 0.15 / height, title, va="top", fontsize=12, fontweight="bold")
    return figure


def _against_diagonal(axes: Axes, title: str, x: str, y: str, limit: float) -> None:
    axes.plot([0, limit], [0, limit], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set(xlim=(0, limit), ylim=(0, limit))
    axes.set_title(title, loc="left", fontsize=11, y=1.02)  # a given y spares a layout pass
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    axes.xaxis.set_label_coords(0.5, -0.085)
    axes.yaxis.set_label_coords(-0.13, 0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes, title: str, loc: Corner, last: str | None = None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > len(COLOURS):
        handles, labels = [], []
    if last:
        handles, labels = [*handles, Line2D([], [], linestyle="none")], [*labels, last]
    if handles:
        legend = axes.legend(
            handles, labels, title=title, loc=loc, fontsize=8.5, title_fontsize=8.5, frameon=False
        )
        legend.set_alignment("left")


def _entry(label: str, area: AUROC) -> str:
    return f"{label}   {area.value:.3f} ({area.ci_low:.3f} to {area.ci_high:.3f})"


def _styles(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """A colour each while the palette lasts; beyond that all alike, for then none is named."""
    if len(curves) > len(COLOURS):
        return [{"color": COLOURS[0], "linewidth": 0.8, "alpha": 0.5}] * len(curves)
    return [{"color": colour, "linewidth": 1.1} for colour in COLOURS[: len(curves)]]


def _distinct(names: Iterable[Any]) -> list[Any]:
    """In order of first appearance."""
    return list(dict.fromkeys(names))
