"""Layers learned without labels → how active units are, what drives them, and what they lose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ehr_sn.evaluate.figures import Line, lines
from ehr_sn.evaluate.plots import DPI
from ehr_sn.models.train import Representation

STRONGEST = 5
"""Inputs named of each unit."""

__all__ = ["activity_figure", "error_table", "filters_picture", "units_table"]


def units_table(representation: Representation) -> pd.DataFrame:
    """Each unit of the first seed: its mean activation, and the first layer's strongest inputs.

    >>> one = np.ones(1, np.float32)
    >>> weight = np.array([[[0.5], [-2.0]]], np.float32)
    >>> seen = Representation(0.05 * one[None], one[None], weight, ["age", "sbp"], ["age"])
    >>> units_table(seen).to_dict("list")
    {'unit': [0], 'mean_activation': [0.05], 'strongest_inputs': ['sbp -2.00, age +0.50']}
    """
    weight = representation.weight[0]
    rows = []
    for unit, rate in enumerate(representation.rates[0]):
        strongest = ""
        if unit < weight.shape[1]:
            w = weight[:, unit]
            order = np.argsort(-np.abs(w), kind="stable")[:STRONGEST]
            strongest = ", ".join(f"{representation.inputs[i]} {w[i]:+.2f}" for i in order)
        rows.append((unit, round(float(rate), 4) + 0.0, strongest))
    return pd.DataFrame(rows, columns=["unit", "mean_activation", "strongest_inputs"])


def error_table(representations: Sequence[Representation]) -> pd.DataFrame:
    """Mean squared error of each scaled feature's reconstruction, over seeds and splits."""
    error = np.mean([r.error.mean(axis=0) for r in representations], axis=0)
    columns = {"feature": representations[0].features, "mean_squared_error": error.round(4)}
    return pd.DataFrame(columns)


def activity_figure(
    representations: Sequence[Representation], rho: float | None, title: str = ""
) -> Figure:
    """Mean activation of each unit, the least active first, and ρ; averaged by rank over seeds."""
    rates = np.concatenate([np.sort(r.rates, axis=1) for r in representations]).mean(axis=0)
    units = np.arange(1, len(rates) + 1).tolist()
    series = [Line("units", units, rates.tolist(), marker="o")]
    if rho is not None:
        series.append(Line("ρ", [1, len(rates)], [rho, rho], reference=True))
    return lines(series, x="unit, by activity", y="mean activation", title=title)


def filters_picture(weight: NDArray[np.floating], shape: tuple[int, int]) -> Figure:
    """What drives each unit most: its weights (pixels, units) as small images, a unit an image.

    Under ‖x‖ ≤ 1 a unit is most active for x = w/‖w‖. Grey is 0; each image has its own scale.
    """
    height, width = shape
    n = weight.shape[1]
    across = int(np.ceil(np.sqrt(n)))
    down = -(-n // across)
    canvas = np.zeros((down * (height + 1) + 1, across * (width + 1) + 1))
    for unit, w in enumerate(weight.T):
        top, left = (unit // across) * (height + 1) + 1, (unit % across) * (width + 1) + 1
        tile = w.reshape(shape) / (np.abs(w).max() or 1)
        canvas[top : top + height, left : left + width] = tile
    inches = 8.0
    size = (inches, inches * canvas.shape[0] / canvas.shape[1])
    figure = Figure(figsize=size, dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(canvas, cmap="gray", vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    return figure
