"""Held-out predictions → one result a disease: what a method achieved, and what is established."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ehr_sn.evaluate.intervals import intervals
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.evaluate.plots import Curve
from ehr_sn.evaluate.statistics import (
    AUROC,
    Friedman,
    PairedAUROC,
    PairedBootstrap,
    WinTieLoss,
    bootstrap_over_splits,
    delong,
    friedman,
    holm,
    mean_sd,
    over_splits,
    paired_bootstrap,
    paired_delong,
    win_tie_loss,
)
from ehr_sn.models.train import NOTHING, HeldOut


@dataclass(frozen=True)
class Result:
    """One method's performance for one disease, over all splits and seeds.

    `aurocs` holds for each split its seeds. `ensemble` is the AUROC of the seed-averaged
    prediction, and the other metrics are that prediction's, each the mean over splits, with the
    ends of their 95% `intervals` by name.
    `versus_reference` is its paired difference from zero imputation, and `bootstrap` the same with
    another interval; `p_holm` is corrected over the diseases.
    """

    disease: str
    aurocs: tuple[tuple[float, ...], ...]
    ensemble: AUROC
    auprc: float
    brier: float
    calibration_slope: float
    calibration_intercept: float
    intervals: Mapping[str, tuple[float, float]]
    versus_reference: PairedAUROC | None = None
    bootstrap: PairedBootstrap | None = None
    p_holm: float | None = None

    @property
    def auroc_per_seed(self) -> tuple[float, ...]:
        """AUROC of each seed, averaged over splits."""
        return tuple(np.mean(self.aurocs, axis=0).tolist())

    @property
    def auroc_per_split(self) -> tuple[float, ...]:
        """AUROC of each split, averaged over seeds."""
        return tuple(np.mean(self.aurocs, axis=1).tolist())

    @property
    def auroc_sd_within_split(self) -> float:
        """Sd over seeds on one and the same split, √mean(variance) over splits."""
        return float(np.sqrt(np.mean([mean_sd(split).sd ** 2 for split in self.aurocs])))

    def as_metrics(self) -> dict[str, float]:
        """Flat names and numbers, as MLflow's run table shows them; `delta`: from the reference."""
        seeds, splits = mean_sd(self.auroc_per_seed), mean_sd(self.auroc_per_split)
        metrics = {
            "test_auroc": seeds.mean,
            "test_auroc_std": seeds.sd,
            "test_auroc_seed_std": self.auroc_sd_within_split,
            "test_auroc_split_std": splits.sd,
            "test_auroc_ensemble": self.ensemble.value,
            "test_auroc_ci_low": self.ensemble.ci_low,
            "test_auroc_ci_high": self.ensemble.ci_high,
            "test_auprc": self.auprc,
            "test_brier": self.brier,
            "test_calibration_slope": self.calibration_slope,
            "test_calibration_intercept": self.calibration_intercept,
            "n_held_out": float(self.ensemble.n),
            "n_positive": float(self.ensemble.n_positive),
        }
        for name, (low, high) in self.intervals.items():
            metrics |= {f"test_{name}_ci_low": low, f"test_{name}_ci_high": high}
        if self.ensemble.subjects is not None:
            metrics["n_subjects"] = float(self.ensemble.subjects)
        if self.versus_reference is not None and self.p_holm is not None:
            difference = self.versus_reference
            metrics |= {
                "delta_auroc": difference.difference,
                "delta_ci_low": difference.ci_low,
                "delta_ci_high": difference.ci_high,
                "delta_p": difference.p,
                "delta_p_holm": self.p_holm,
            }
        if self.bootstrap is not None:
            metrics |= {
                "delta_bootstrap_ci_low": self.bootstrap.ci_low,
                "delta_bootstrap_ci_high": self.bootstrap.ci_high,
            }
        return metrics


def evaluate(
    held_out: Mapping[str, Sequence[HeldOut]],
    reference: Mapping[str, Sequence[HeldOut]] | None = None,
) -> list[Result]:
    """Evaluate one method: disease → its held-out predictions, one entry a split.

    With `reference`, the same of zero imputation, each disease also gets the paired difference
    and its p, corrected by Holm over the diseases.
    """
    results = []
    for disease, splits in held_out.items():
        aurocs = np.stack([auroc(split.y, split.probability, split.weight) for split in splits])
        figures = intervals([split.sample for split in splits])
        paired = bootstrap = None
        if reference is not None:
            pairs = [
                (a.y, a.ensemble, b.ensemble, a.subject, a.weight)
                for a, b in zip(splits, reference[disease], strict=True)
            ]
            paired = over_splits([paired_delong(*pair) for pair in pairs])
            bootstrap = bootstrap_over_splits([paired_bootstrap(*pair) for pair in pairs])
        results.append(
            Result(
                disease=disease,
                aurocs=tuple(map(tuple, aurocs.tolist())),
                ensemble=over_splits([delong(*split.sample) for split in splits]),
                versus_reference=paired,
                bootstrap=bootstrap,
                intervals={name: (low, high) for name, (_, low, high) in figures.items()},
                **{name: value for name, (value, *_) in figures.items()},
            )
        )
    if reference is None:
        return results
    corrected = holm([result.versus_reference.p for result in results if result.versus_reference])
    return [replace(r, p_holm=float(p)) for r, p in zip(results, corrected, strict=True)]


def name_of(method: str, scaler: str, architecture: str) -> str:
    """A method, or a baseline, as ranks and figures call it.

    >>> name_of("sparsity_normalization+mask", "minmax", "mlp")
    'SN+mask · minmax'
    >>> name_of("none", "none", "logistic_regression")
    'logistic_regression'
    """
    if method == NOTHING:
        return architecture
    short = method.replace("sparsity_normalization", "SN")
    return short if scaler == "standard" else f"{short} · {scaler}"


def rank_methods(results: Sequence[Mapping[str, Any]]) -> Friedman | None:
    """Rank methods (with their scalers) over diseases and architectures; None for too few.

    `results` are flat dicts with disease, architecture, method, scaler and auroc_ensemble, as
    `tracking` gives them. Cells that lack a method are left out, and so are baselines, which have
    no architecture in common with the methods.
    """
    table: dict[tuple[str, str], dict[str, float]] = {}
    for r in results:
        if r["method"] != NOTHING:
            cell = table.setdefault((r["disease"], r["architecture"]), {})
            cell[name_of(r["method"], r["scaler"], r["architecture"])] = r["auroc_ensemble"]
    methods = list(dict.fromkeys(name for cell in table.values() for name in cell))
    whole = [[cell[m] for m in methods] for cell in table.values() if len(cell) == len(methods)]
    return friedman(whole, methods) if min(len(whole), len(methods)) >= 2 else None


def records(results: Sequence[Mapping[str, Any]]) -> dict[str, WinTieLoss]:
    """Method → its wins, ties and losses against zero imputation, over diseases and architectures.

    Of the same scaler and architecture; a tie is an interval of the difference that includes zero.
    """
    intervals: dict[str, list[tuple[float, float]]] = {}
    for r in results:
        if r["delta_auroc"] is not None:
            low, high = (
                np.nan if r[k] is None else r[k] for k in ("delta_ci_low", "delta_ci_high")
            )
            name = name_of(r["method"], r["scaler"], r["architecture"])
            intervals.setdefault(name, []).append((low, high))
    return {name: win_tie_loss(known) for name, known in intervals.items()}


def curves(splits: Sequence[HeldOut]) -> list[Curve]:
    """The seed-averaged prediction of each split, for `plots.roc_and_calibration`."""
    return [(f"split {i + 1}", *split.sample) for i, split in enumerate(splits)]
