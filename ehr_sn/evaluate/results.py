"""Held-out predictions → one result a disease: what a method achieved, and what is established."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ehr_sn.evaluate.metrics import auroc, summarise
from ehr_sn.evaluate.plots import Curve
from ehr_sn.evaluate.statistics import (
    AUROC,
    PairedAUROC,
    delong,
    holm,
    mean_sd,
    over_splits,
    paired_delong,
)
from ehr_sn.models.train import HeldOut


@dataclass(frozen=True)
class Result:
    """One method's performance for one disease, over all splits and seeds.

    `auroc_per_seed` holds for each seed the mean over splits, `auroc_per_split` for each split the
    mean over seeds: the two spreads are told apart. `ensemble` is the AUROC of the seed-averaged
    prediction, and the other metrics are that prediction's, each the mean over splits.
    `versus_reference` is its paired difference from zero imputation; `p_holm` is corrected over
    the diseases.
    """

    disease: str
    auroc_per_seed: tuple[float, ...]
    auroc_per_split: tuple[float, ...]
    ensemble: AUROC
    auprc: float
    brier: float
    calibration_slope: float
    calibration_intercept: float
    versus_reference: PairedAUROC | None = None
    p_holm: float | None = None

    def as_metrics(self) -> dict[str, float]:
        """Flat names and numbers, as MLflow's run table shows them; `delta`: from the reference."""
        seeds, splits = mean_sd(self.auroc_per_seed), mean_sd(self.auroc_per_split)
        metrics = {
            "test_auroc": seeds.mean,
            "test_auroc_std": seeds.sd,
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
        if self.versus_reference is not None and self.p_holm is not None:
            difference = self.versus_reference
            metrics |= {
                "delta_auroc": difference.difference,
                "delta_ci_low": difference.ci_low,
                "delta_ci_high": difference.ci_high,
                "delta_p": difference.p,
                "delta_p_holm": self.p_holm,
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
        per_seed = np.stack([auroc(split.y, split.probability) for split in splits])
        metrics = [summarise(split.y, split.ensemble) for split in splits]
        paired = None
        if reference is not None:
            pairs = zip(splits, reference[disease], strict=True)
            paired = over_splits([paired_delong(a.y, a.ensemble, b.ensemble) for a, b in pairs])
        results.append(
            Result(
                disease=disease,
                auroc_per_seed=tuple(per_seed.mean(axis=0).tolist()),
                auroc_per_split=tuple(per_seed.mean(axis=1).tolist()),
                ensemble=over_splits([delong(split.y, split.ensemble) for split in splits]),
                versus_reference=paired,
                **{
                    name: float(np.mean([m[name] for m in metrics]))
                    for name in ("auprc", "brier", "calibration_slope", "calibration_intercept")
                },
            )
        )
    if reference is None:
        return results
    corrected = holm([result.versus_reference.p for result in results if result.versus_reference])
    return [replace(r, p_holm=float(p)) for r, p in zip(results, corrected, strict=True)]


def curves(splits: Sequence[HeldOut]) -> list[Curve]:
    """The seed-averaged prediction of each split, for `plots.roc_and_calibration`."""
    return [(f"split {i + 1}", split.y, split.ensemble) for i, split in enumerate(splits)]
