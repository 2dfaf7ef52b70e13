"""Turn held-out predictions and comparisons into figures.

Every function returns a `matplotlib.figure.Figure` that knows how to save itself and touches no
global state (no pyplot), so figures can be made in any thread and are freed like any other object.
Positions are set by hand: a layout engine would take longer than the drawing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from sklearn.metrics import roc_curve

from ehr_sn.evaluate.metrics import Array, calibration, checked
from ehr_sn.evaluate.statistics import AUROC, delong, over_splits

DPI = 100
SMALLEST_GROUP = 11
"""Groups of fewer subjects are not shown, as is usual in releases of health data."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which readers with any colour vision can tell apart."""

GREY, FAINT = "#8a8a8a", "#ececec"

Curve = tuple[str, ArrayLike, ArrayLike]
Result = Mapping[str, Any]


def roc_and_calibration(curves: Sequence[Curve], *, title: str = "") -> Figure:
    """ROC curve on the left, calibration curve on the right, one line a split.

    Parameters
    ----------
    curves : list of (label, y, p)
        For each split its name, the held-out labels (n,) and the probabilities (n,), typically
        averaged over seeds.
    title : str
        What is predicted, and by which method.

    Raises
    ------
    ValueError
        No curves, or labels and probabilities that `metrics.calibration` refuses.

    Notes
    -----
    ROC curves are drawn through 101 fixed false-positive rates instead of one vertex a subject,
    and a point of the calibration curve stands for at least 11 subjects. More than seven splits
    are not named one by one.

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
    _draw_roc(figure.add_axes((0.065, 0.11, 0.40, 0.75)), curves)
    _draw_calibration(figure.add_axes((0.58, 0.11, 0.40, 0.75)), curves)
    return figure


def seed_strip(results: Sequence[Result], *, title: str = "") -> Figure:
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
    name_scaler = len(_distinct(r["scaler"] for r in results)) > 1
    rows = _distinct(_row_name(r, name_scaler) for r in results)

    columns = min(5, len(diseases))
    panels = _panels(
        len(diseases),
        columns,
        wide=2.4,
        high=0.25 + len(rows) * (0.14 + 0.13 * len(architectures)),
        left=0.35 + 0.078 * max(map(len, rows)),
    )
    figure = _figure(*panels.pop(), title)
    width, height = figure.get_size_inches()
    for i, (disease, (x, y, wide, high)) in enumerate(zip(diseases, panels, strict=True)):
        axes = figure.add_axes((x / width, y / height, wide / width, high / height))
        _draw_strip(axes, results, disease, rows, architectures, name_scaler)
        axes.tick_params(labelleft=i % columns == 0)
    _strip_legend(figure, architectures)
    return figure
