import numpy as np
import pytest

from ehr_sn.evaluate.results import evaluate, rank_methods
from ehr_sn.models.train import HeldOut


def held_out(aurocs):
    """Predictions of ten subjects a split, each seed's with the given number of mistakes of 25."""
    y = np.repeat([0.0, 1.0], 5).astype(np.float32)
    splits = []
    for split in aurocs:
        p = np.tile(np.where(y == 1, 0.9, 0.1), (len(split), 1)).astype(np.float32)
        for seed, mistakes in enumerate(split):
            p[seed, 5] = 0.05 + mistakes / 100  # ahead of as many of the five negatives …
            p[seed, :5] = 0.055 + np.arange(5) / 100
        splits.append(HeldOut(y, p))
    return {"diabetes": splits}


def test_the_spread_over_seeds_is_told_from_the_spread_over_splits():
    same_seeds = evaluate(held_out([(0, 0), (5, 5)]))[0]
    assert same_seeds.auroc_sd_within_split == 0
    assert np.std(same_seeds.auroc_per_split, ddof=1) == pytest.approx(0.2 / np.sqrt(2))
    same_splits = evaluate(held_out([(0, 5), (5, 0)]))[0]
    assert same_splits.auroc_sd_within_split == pytest.approx(0.2 / np.sqrt(2))
    assert np.std(same_splits.auroc_per_split) == pytest.approx(0)
    # averaged over splits first, each seed's bad luck cancels: that sd alone would be misleading
    assert np.std(same_splits.auroc_per_seed) == pytest.approx(0)


def test_a_bootstrap_interval_stands_beside_delongs():
    predictions = held_out([(0, 1), (2, 3)])
    metrics = evaluate(predictions, predictions)[0].as_metrics()
    assert metrics["delta_bootstrap_ci_low"] == metrics["delta_ci_low"] == 0
    assert metrics["test_auroc_seed_std"] > 0


def test_baselines_stand_beside_the_ranks_of_methods_and_hinder_none():
    def cell(disease, method, architecture, auroc):
        scaler = "none" if method == "none" else "standard"
        named = {"disease": disease, "architecture": architecture}
        return named | {"method": method, "scaler": scaler, "auroc_ensemble": auroc}

    diseases = ["diabetes", "stroke", "cancer"]
    methods = [cell(d, m, "mlp", a) for d in diseases for m, a in (("zero", 0.70), ("knn", 0.75))]
    ranking = rank_methods(methods + [cell(d, "none", "trees", 0.9) for d in diseases])
    assert dict(zip(ranking.methods, ranking.mean_ranks, strict=True)) == {"zero": 2, "knn": 1}
