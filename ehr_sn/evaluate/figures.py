"""Diagnostics → small figures of one panel each, for MLflow and for the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Protocol

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ehr_sn.evaluate.clinical import DecisionCurve
from ehr_sn.evaluate.diagnostics import RATES, Shift
from ehr_sn.evaluate.plots import COLOURS, DPI
from ehr_sn.evaluate.statistics import Friedman

WIDTH, HEIGHT = 4.2, 3.3  # inches: readable on a phone without zooming
WIDEST_LABEL = 20  # signs: longer names have a row of the legend to themselves
INK, RULE = "#1b1f24", "#8a8f98"
"""Colours that `as_svg` hands over to the page: of its text, and of its rules."""

OWN_IDS = re.compile(r' id="[A-Za-z0-9.]+_\d+"')  # of groups; several figures share a page
MECHANISM_NAMES = {"mcar": "at random", "panel": "whole panels", "mnar": "the highest values"}


@dataclass(frozen=True)
class Line:
    """One line of a figure, in the palette's next colour; a `reference` in ink, dashed.

    `band` holds the lower and upper ends of an interval, drawn as a shade.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marker: str = ""
    reference: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None


def lines(
    series: Sequence[Line],
    *,
    x: str,
    y: str,
    title: str = "",
    percent: bool = False,
    diagonal: bool = False,
    y_from: float | None = None,
    height: float = HEIGHT,
) -> Figure:
    """Lines over one another, with their names below; `percent` writes the x axis so."""
    columns = 1 if any(len(line.label) > WIDEST_LABEL for line in series) else 2
    rows = -(-len(series) // columns)
    total = height + 0.2 * rows
    figure = Figure(figsize=(WIDTH, total), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    bottom = (0.62 + 0.2 * rows) / total
    axes = figure.add_axes((0.18, bottom, 0.79, 1 - bottom - (0.36 if title else 0.12) / total))
    drawn = [line for line in series if not line.reference]
    for line in series:
        colour = INK if line.reference else COLOURS[drawn.index(line) % (len(COLOURS) - 1)]
        style = (0, (4, 2)) if line.reference else _dashes(drawn.index(line))
        axes.plot(
            line.x,
            line.y,
            color=colour,
            linestyle=style,
            marker=line.marker,
            markersize=3.5,
            linewidth=1.5,
            label=line.label,
        )
        if line.band:
            axes.fill_between(line.x, *line.band, color=colour, alpha=0.2, linewidth=0)
    if diagonal:
        highest = max((max(line.x, default=0) for line in series), default=1)
        axes.plot([0, highest], [0, highest], color=RULE, linewidth=0.8, zorder=0)
    if y_from is not None:
        axes.set_ylim(bottom=y_from)
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    if percent:
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.tick_params(labelsize=9, color=RULE, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.grid(color=RULE, alpha=0.25, linewidth=0.6)
    if series:
        figure.legend(
            loc="lower left",
            bbox_to_anchor=(0.12, 0),
            ncols=columns,
            fontsize=9,
            frameon=False,
            labelcolor=INK,
            handlelength=2.2,
            columnspacing=1.2,
        )
    return figure


class ByCount(Protocol):
    """Means a bin of the number of observed entries: of that number, of outputs, of outcomes."""

    @property
    def observed(self) -> tuple[float, ...]: ...
    @property
    def prediction(self) -> tuple[float, ...]: ...
    @property
    def outcome(self) -> tuple[float, ...]: ...


def sparsity_bias_figure(
    biases: Mapping[str, ByCount],
    title: str = "",
    x: str = "observed entries",
    y: str = "mean probability",
) -> Figure:
    """Mean prediction of each method by number of observed entries, and the real rate, dashed."""
    series = [
        Line(name, bias.observed, bias.prediction, marker="o") for name, bias in biases.items()
    ]
    first = next(iter(biases.values()))
    series.append(Line("observed outcome", first.observed, first.outcome, "s", reference=True))
    return lines(series, x=x, y=y, title=title)


def shift_figure(
    shifts: dict[str, Shift], metric: str = "auroc", title: str = "", rate: float | None = None
) -> Figure:
    """One metric of each method as further entries go missing; `rate`: the real outcome's."""
    names = {"auroc": "AUROC", "mean_prediction": "mean probability"}
    series = [Line(name, RATES, shift.values[metric], "o") for name, shift in shifts.items()]
    if rate is not None:
        series.append(Line("observed outcome", (0, RATES[-1]), (rate, rate), reference=True))
    mechanism = next(iter(shifts.values())).mechanism
    return lines(
        series,
        x=f"further entries missing: {MECHANISM_NAMES[mechanism]}",
        y=names.get(metric, metric.replace("_", " ")),
        title=title,
        percent=True,
    )


def as_svg(figure: Figure, label: str) -> str:
    """The figure for a page: scalable, transparent, its ink the page's own, `label` for readers.

    Text stays text, in the page's font.
    """
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    written = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    svg = OWN_IDS.sub("", svg)
    head, rest = svg.split(">", 1)
    plain = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    width = f'width="{figure.get_figwidth() * 72:g}pt"'
    height = f'height="{figure.get_figheight() * 72:g}pt"'
    head = head.replace(width, "").replace(height, "")
    return f'{head} role="img" aria-label="{plain}">{rest}'


def _dashes(i: int) -> str | tuple[int, tuple[float, float]]:
    """Beyond six lines colours come again, dotted."""
    return "-" if i < len(COLOURS) - 1 else (0, (1, 1.2))


def learning_curve_figure(
    curves: dict[str, tuple[list[float], list[float]]], title: str = ""
) -> Figure:
    """AUROC of each method by share of the training rows."""
    series = [Line(name, x, y, "o") for name, (x, y) in curves.items()]
    return lines(series, x="training rows used", y="AUROC", title=title, percent=True)


def decision_figure(curve: DecisionCurve, title: str = "") -> Figure:
    """Net benefit of the model, of treating everybody (as far as it is positive), and nobody."""
    shown = np.where(np.array(curve.treat_all) > -0.02, curve.treat_all, np.nan).tolist()
    series = [
        Line("model, 95% interval", curve.threshold, curve.model, band=(curve.low, curve.high)),
        Line("treat everybody", curve.threshold, shown, reference=True),
        Line("treat nobody", curve.threshold, [0.0] * len(curve.threshold)),
    ]
    return lines(series, x="threshold probability", y="net benefit", title=title, percent=True)


def critical_difference_figure(ranks: Friedman, title: str = "") -> Figure:
    """Methods by their mean rank, the best first; bars join those that cannot be told apart.

    A bar spans at most Nemenyi's critical difference (J. Demšar, JMLR 7:1, 2006).
    """
    order = np.argsort(ranks.mean_ranks, kind="stable")
    names = [ranks.methods[i] for i in order]
    at = np.array(ranks.mean_ranks)[order]
    height = 1.1 + 0.22 * len(names)
    figure = Figure(figsize=(1.5 * WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.4, 0.55 / height, 0.57, 1 - 0.95 / height))
    y = np.arange(len(names))
    axes.hlines(y, 1, at, color=RULE, linewidth=0.6, alpha=0.5)
    axes.plot(at, y, "o", color=COLOURS[0], markersize=5)
    reached = -1
    for first, rank in enumerate(at):
        last = int(np.flatnonzero(at - rank < ranks.critical_difference).max())
        if last > max(first, reached):
            axes.plot([rank, rank], [first, last], color=INK, linewidth=2.2)
            reached = last
    axes.set_yticks(y, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=1)
    difference = ranks.critical_difference
    told = f"mean rank over {ranks.n}; critical difference {difference:.2f}"
    axes.set_xlabel(told, fontsize=10, color=INK)
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.tick_params(labelsize=9, color=RULE, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    return figure
