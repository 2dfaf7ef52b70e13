"""Intervals of AUPRC, Brier score and calibration, beside the bootstrap of subjects."""

import numpy as np
import pytest
from scipy.special import expit

from ehr_sn.evaluate.intervals import FIGURES, intervals
from ehr_sn.evaluate.metrics import Sample, summarise
from ehr_sn.evaluate.statistics import Z95


def clinic(seed, subjects=250, rows=4, weighted=True):
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(subjects), rng.integers(1, 2 * rows, subjects) if rows > 1 else 1)
    lp = rng.normal(-1, 1, subjects)[owner] + 0.5 * rng.normal(size=len(owner))
    y = (rng.random(subjects) < expit(rng.normal(-1, 1, subjects) * 0.3 + np.bincount(
        owner, lp) / np.bincount(owner)))[owner]  # fmt: skip
    weight = rng.uniform(1, 3, len(owner)) if weighted else None
    return Sample(y, expit(lp).round(2), owner, weight)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_they_are_as_wide_as_a_bootstrap_of_the_subjects_says(rows, weighted):
    sample = clinic(0, rows=rows, weighted=weighted)
    found = intervals([sample])
    values = summarise(sample.y, sample.p, sample.weight)
    rng, owner, drawn = np.random.default_rng(1), sample.owners, []
    rows_of = [np.flatnonzero(owner == s) for s in range(owner.max() + 1)]
    for _ in range(400):
        rows_drawn = np.concatenate(
            [rows_of[s] for s in rng.integers(len(rows_of), size=len(rows_of))]
        )
        part = sample.where(rows_drawn)
        drawn.append(summarise(part.y, part.p, part.weight))
    for name in FIGURES:
        value, low, high = found[name]
        assert value == pytest.approx(values[name])
        spread = np.std([one[name] for one in drawn])
        assert (high - low) / (2 * Z95) == pytest.approx(spread, rel=0.15), name


def test_a_row_moves_the_average_precision_by_what_is_computed():
    from ehr_sn.evaluate.intervals import _moves_of_auprc
    from ehr_sn.evaluate.metrics import auprc

    sample = clinic(2, subjects=40)
    y, p, each = np.asarray(sample.y), np.asarray(sample.p), sample.each
    moves, step = _moves_of_auprc(y, p, each), 1e-6
    for row in range(0, len(y), 7):
        more = each.copy()
        more[row] += step * each[row]
        change = (auprc(y, p, more) - auprc(y, p, each)) / step
        assert moves[row] == pytest.approx(change, abs=1e-6)


def test_rows_written_twice_add_nothing():
    sample = clinic(3, rows=1, weighted=False)
    twice = sample._replace(subject=np.arange(250)).where(np.repeat(np.arange(250), 2))
    for name in FIGURES:
        assert intervals([twice])[name] == pytest.approx(intervals([sample])[name], rel=1e-6)


def test_they_cover():
    truth = np.mean([intervals([clinic(s, 4000)])["brier"][0] for s in range(900, 905)])
    hits = 0
    for seed in range(100):
        _, low, high = intervals([clinic(seed)])["brier"]
        hits += low <= truth <= high
    assert hits >= 88


def test_several_splits_are_no_surer_than_one():
    sample = clinic(4)
    once, thrice = intervals([sample]), intervals([sample] * 3)
    assert thrice == {name: pytest.approx(figure) for name, figure in once.items()}
