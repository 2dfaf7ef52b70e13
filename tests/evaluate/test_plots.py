import io
import time
from itertools import combinations

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import same_color
from matplotlib.text import Text
from numpy.testing import assert_allclose
from scipy.special import expit

from ehr_sn.evaluate.figures import Line, lines
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.evaluate.plots import COLOURS, binned_calibration, roc_and_calibration, seed_strip


def curve(seed, n=800, base=-1.5):
    rng = np.random.default_rng(seed)
    p = expit(base + rng.normal(size=n))
    return f"split {seed}", rng.random(n) < p, p


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def summaries(diseases=("Diabetes", "Fatty liver"), methods=("zero", "SN"), architectures=("64",)):
    return [
        {
            "disease": disease,
            "architecture": architecture,
            "method": method,
            "scaler": "z-score",
            "auroc_mean": 0.80,
            "auroc_per_seed": [0.79, 0.80, 0.81],
            "auroc_ensemble": 0.81,
            "ci_low": 0.77,
            "ci_high": 0.85,
        }
        for disease in diseases
        for method in methods
        for architecture in architectures
    ]


@pytest.fixture
def boxes_of_texts(monkeypatch):
    """Draw a figure and return where each text that was really drawn came to stand."""

    def boxes(figure):
        drawn = []
        draw = Text.draw
        with monkeypatch.context() as patch:
            patch.setattr(Text, "draw", lambda text, to: drawn.append(text) or draw(text, to))
            figure.canvas.draw()
        shown = [text for text in drawn if text.get_visible() and text.get_text()]
        return [(text.get_text(), text.get_window_extent()) for text in shown]

    return boxes


def test_each_split_is_one_roc_curve_named_with_its_area_and_interval():
    curves = [curve(seed) for seed in range(3)]
    roc, _ = roc_and_calibration(curves, title="Diabetes").axes
    lines = roc.get_lines()[:3]
    assert legend_of(roc)[0].startswith(f"split 0   {auroc(*curves[0][1:]):.3f} (0.")
    assert [name.split()[0] for name in legend_of(roc)] == ["split"] * 3 + ["mean"]
    assert len({line.get_color() for line in lines}) == 3


def test_roc_curves_are_drawn_on_a_fixed_grid_and_keep_their_area():
    _, y, p = curve(0)
    roc, _ = roc_and_calibration([("split 0", y, p)]).axes
    false_positives, sensitivity = roc.get_lines()[0].get_data()
    assert_allclose(false_positives, np.linspace(0, 1, 101))
    assert (sensitivity[0], sensitivity[-1]) == (0, 1)
    assert (np.diff(sensitivity) >= 0).all()
    assert np.trapezoid(sensitivity, false_positives) == pytest.approx(auroc(y, p), abs=0.01)


def test_a_roc_curve_of_fewer_than_eleven_positives_is_not_drawn():
    y, p = np.arange(200) < 10, np.linspace(0.9, 0.1, 200) ** 2
    roc, _ = roc_and_calibration([("small", y, p)]).axes
    assert np.isnan(roc.get_lines()[0].get_ydata()).all()
    assert legend_of(roc)[0].endswith("not drawn")


def test_the_calibration_panel_shows_the_bins_the_slope_and_the_diagonal():
    _, y, p = curve(1)
    _, panel = roc_and_calibration([("split 1", y, p)]).axes
    points, diagonal = panel.get_lines()
    assert_allclose(points.get_data(), binned_calibration(y, p))
    assert_allclose(diagonal.get_xdata(), diagonal.get_ydata())
    assert panel.get_xlim() == panel.get_ylim()
    assert panel.get_xlim()[1] > points.get_xdata().max()
    assert legend_of(panel)[0].startswith("split 1   ")


def test_bins_hold_equal_numbers_and_lie_on_the_diagonal_for_true_probabilities():
    _, y, p = curve(2, n=100_000)
    predicted, observed = binned_calibration(y, p)
    assert predicted.shape == observed.shape == (10,)
    assert_allclose(observed, predicted, atol=0.02)
    assert predicted.mean() == pytest.approx(p.mean(), rel=1e-3)


def test_a_bin_of_fewer_than_eleven_subjects_is_suppressed():
    for middle, shown in ((10, [0.1, 0.9]), (11, [0.1, 0.5, 0.9])):
        p = np.repeat([0.1, 0.5, 0.9], [20, middle, 20])
        predicted, _ = binned_calibration(np.arange(p.size) % 2, p)
        assert_allclose(predicted, shown)


@pytest.mark.parametrize("n", [11, 21, 22, 75, 109, 110, 115, 1000])
def test_no_bin_is_smaller_than_eleven_whatever_the_sample_size(n):
    p = np.random.default_rng(n).random(n)
    predicted, _ = binned_calibration(np.arange(n) % 2, p)
    assert predicted.size == min(10, n // 11)


def test_too_few_subjects_leave_a_note_in_place_of_points():
    figure = roc_and_calibration([("few", np.arange(10) % 2, np.linspace(0.1, 0.9, 10))])
    _, panel = figure.axes
    assert panel.get_lines()[0].get_xdata().size == 0
    assert "11 subjects" in panel.texts[0].get_text()


def test_the_legend_keeps_clear_of_points_above_the_diagonal():
    _, y, p = curve(3)
    _, timid = roc_and_calibration([("too low", y, p / 3)]).axes
    _, bold = roc_and_calibration([("too high", y, np.sqrt(p))]).axes
    timid.figure.canvas.draw()
    bold.figure.canvas.draw()
    assert timid.get_legend().get_window_extent().y1 < bold.get_legend().get_window_extent().y0


def test_more_splits_than_colours_are_summed_up_by_their_mean():
    curves = [curve(seed, n=200) for seed in range(len(COLOURS) + 1)]
    roc, panel = roc_and_calibration(curves).axes
    assert [name.split()[0] for name in legend_of(roc)] == ["mean"]
    assert panel.get_legend() is None


def test_the_strip_has_a_panel_a_disease_and_a_row_a_method_in_the_order_given():
    figure = seed_strip(summaries(methods=("zero", "SN", "mean")), title="NAFLD")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Diabetes", "Fatty liver"]
    left, right = ([t.get_text() for t in axes.get_yticklabels()] for axes in figure.axes)
    assert left == ["zero", "SN", "mean"]
    assert not any(right)
    assert figure.axes[0].yaxis_inverted()


def test_the_strip_shows_means_seeds_and_intervals():
    panel = seed_strip(summaries()).axes[0]
    ensemble, seeds, mean = panel.get_lines()
    (bars,) = panel.collections
    assert_allclose(mean.get_xdata(), [0.80, 0.80])
    assert_allclose(seeds.get_xdata(), [0.79, 0.80, 0.81] * 2)
    assert_allclose(seeds.get_ydata(), [0, 0, 0, 1, 1, 1])
    assert_allclose(ensemble.get_xdata(), [0.81, 0.81])
    assert_allclose([bar[:, 0] for bar in bars.get_segments()], [[0.77, 0.85]] * 2)


def test_architectures_differ_by_colour_and_stand_apart_within_a_row():
    panel = seed_strip(summaries(architectures=("64", "128"))).axes[0]
    first, second = panel.get_lines()[2], panel.get_lines()[5]
    assert same_color(first.get_color(), COLOURS[0])
    assert same_color(second.get_color(), COLOURS[1])
    assert (first.get_ydata() < second.get_ydata()).all()


def test_scalers_are_named_only_where_there_are_several():
    rows = summaries()
    rows += [{**row, "scaler": "min-max"} for row in rows]
    names = [label.get_text() for label in seed_strip(rows).axes[0].get_yticklabels()]
    assert names == ["zero · z-score", "SN · z-score", "zero · min-max", "SN · min-max"]


def test_a_method_missing_for_one_disease_or_with_one_seed_leaves_the_rest_in_place():
    rows = summaries()[:-1] + summaries(("Diabetes",), ("trees",), ("trees",))
    rows[-1] |= {"auroc_per_seed": [0.8], "ci_low": np.nan, "ci_high": np.nan}
    figure = seed_strip(rows)
    figure.canvas.draw()
    assert len(figure.axes) == 2


@pytest.mark.parametrize(
    "figure",
    [
        lambda: roc_and_calibration([curve(seed) for seed in range(5)], title="Diabetes · SN"),
        lambda: roc_and_calibration([curve(0, n=20_000, base=-6)], title="Rare"),
        lambda: seed_strip(
            summaries(
                ("Cardiovascular", "Fatty liver", "Hypertension", "Heart failure", "Diabetes"),
                ("zero", "zero + mask", "SN", "SN + mask", "mean", "median", "iterative", "KNN"),
                ("64", "128×64"),
            ),
            title="Held out",
        ),
        lambda: seed_strip(summaries(("Diabetes",)), title="Held out"),
        lambda: seed_strip(summaries([f"Disease {i}" for i in range(7)]), title="Held out"),
        lambda: lines(
            [Line(n, (0, 1), (0, 1)) for n in ("SN+mask · quantile", "boosting+masked_copies")],
            x="further entries missing: whole panels",
            y="AUROC",
            title="Diabetes",
        ),
    ],
    ids=["five splits", "rare disease", "full study", "one disease", "two lines", "long names"],
)
def test_no_text_overlaps_another_or_leaves_the_figure(figure, boxes_of_texts):
    figure = figure()
    texts = boxes_of_texts(figure)
    assert len(texts) > 10
    assert not [(a, b) for (a, box), (b, other) in combinations(texts, 2) if box.overlaps(other)]
    width, height = figure.bbox.size
    assert not [
        text for text, box in texts if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height
    ]


def test_figures_save_as_png_quickly():
    curves = [curve(seed) for seed in range(5)]
    roc_and_calibration(curves)
    start = time.process_time()
    png = io.BytesIO()
    roc_and_calibration(curves, title="Diabetes").savefig(png, format="png")
    assert time.process_time() - start < 2  # about 0.1 s; never near this
    assert png.getvalue().startswith(b"\x89PNG")


def test_pyplot_does_not_hold_on_to_the_figures():
    roc_and_calibration([curve(0)]).canvas.draw()
    seed_strip(summaries()).canvas.draw()
    assert pyplot.get_fignums() == []


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="one \\(label, y, p\\) a split"):
        roc_and_calibration([])
    with pytest.raises(ValueError, match="one mapping a method and disease"):
        seed_strip([])
