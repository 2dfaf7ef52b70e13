"""Results and tests → sentences: which method to use, how sure that is, and what was lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ehr_sn.evaluate.diagnostics import LeakAudit
from ehr_sn.evaluate.results import name_of, rank_methods, records
from ehr_sn.evaluate.table import ESTABLISHED, SN, Results
from ehr_sn.models.train import NOTHING, REFERENCE, Comparison

HALF = 50
"""Percent of the entries lost, at which robustness is compared."""


def words(name: str) -> str:
    """A name of the configuration as a person reads it.

    >>> words("fatty_liver")
    'Fatty liver'
    """
    return name.replace("_", " ").capitalize()


def of(results: Results, comparison: Comparison) -> list[dict[str, Any]]:
    """The results of one method, scaler and architecture, a disease each."""
    return [r for r in results if (r["method"], r["scaler"], r["architecture"]) == comparison]


def established(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Where a method surely differs from zero imputation: (better, worse), by Holm-corrected p."""
    sure = [r for r in results if r["delta_p_holm"] is not None and r["delta_p_holm"] < ESTABLISHED]
    better = [_cell(r) for r in sure if r["delta_auroc"] > 0]
    return better, [_cell(r) for r in sure if r["delta_auroc"] < 0]


def recommendation(results: Results, best: Comparison) -> list[str]:
    """Which method to use and how sure that is, from the paired tests on held-out subjects."""
    method, scaler, architecture = best
    chosen = of(results, best)
    used = architecture if method == NOTHING else f"{method} ({scaler} scaler, {architecture})"
    said = [
        f"Use {used}: it had the highest AUROC on the tuning rows. On held-out subjects its AUROC "
        f"is {_mean(chosen, 'auroc_mean'):.3f} on average over {_count(len(chosen), 'disease')}."
    ]
    if method == REFERENCE:
        return [*said, "No way of handling missing entries did better than plain zero imputation."]
    tested = [r for r in chosen if r["delta_auroc"] is not None]
    if not tested:
        return [*said, "It was not compared with zero imputation under the same scaler."]
    ahead = sum(r["delta_auroc"] > 0 for r in tested)
    better, worse = ([cell.split(" · ")[0] for cell in cells] for cells in established(tested))
    said.append(
        f"Against zero imputation it is ahead in {ahead} of {len(tested)} diseases, by "
        f"{_mean(tested, 'delta_auroc'):+.3f} AUROC on average."
    )
    if worse:
        said.append(f"It is surely worse for {_listed(worse)}.")
    if len(better) == len(tested):
        said.append("How sure: sure; it is established for every disease (corrected p < 0.05).")
    elif better:
        said.append(
            f"How sure: it is established for {_listed(better)} (corrected p < 0.05); for the "
            "others these data cannot tell it from zero imputation."
        )
    else:
        said.append(
            "How sure: not established. For no single disease is it better than zero imputation "
            "beyond chance (corrected p < 0.05); another sample might choose another method."
        )
    return said


def on_sparsity_normalization(results: Results) -> list[str]:
    """What became of Sparsity Normalization, scaler by scaler, losses as plain as wins."""
    said = []
    for scaler in dict.fromkeys(r["scaler"] for r in results):
        cells = [
            r
            for r in results
            if r["method"] == SN and r["scaler"] == scaler and r["delta_auroc"] is not None
        ]
        if not cells:
            continue
        record = records(cells)[name_of(SN, scaler, "")]
        better, worse = established(cells)
        if better or worse:
            outcome = "; ".join(
                f"it is surely {kind} for {_listed(where)}"
                for kind, where in (("better", better), ("worse", worse))
                if where
            )
        else:
            outcome = "corrected for their number, no difference is established"
        said.append(
            f"Sparsity Normalization against zero imputation ({scaler} scaler), over "
            f"{_count(len(cells), 'cell')} of disease and architecture: by 95% intervals {record}, "
            f"{_mean(cells, 'delta_auroc'):+.3f} AUROC on average; {outcome}."
        )
    return said


def on_ranks(results: Results) -> list[str]:
    """What Friedman's test says of all methods together."""
    ranking = rank_methods(results)
    if ranking is None:
        return []
    first = ranking.methods[int(np.argmin(ranking.mean_ranks))]
    alike = ranking.alike(first)
    if not alike:
        told = f"{first} ranks first, and apart from every other method."
    elif len(alike) == len(ranking.methods) - 1:
        told = f"{first} ranks first, but none of the others can be told from it."
    else:
        told = f"{first} ranks first; it cannot be told from {_listed(list(alike))}."
    caution = "Cells of one cohort are not independent: take this as a summary, not as a proof."
    return [f"{ranking}. {told} {caution}"]


def on_robustness(lost: Mapping[Comparison, float], best: Comparison) -> list[str]:
    """Which method loses least when half of the entries go; `lost`: AUROC lost on average."""
    if best not in lost:
        return []
    least = min(lost, key=lambda comparison: lost[comparison])
    said = f"With half of the held-out entries lost at random, {_name(best)} loses {lost[best]:.3f}"
    reference = (REFERENCE, *best[1:])
    if reference in lost and reference != best:
        said += f" AUROC and {_name(reference)} {lost[reference]:.3f}"
    if least == best:
        return [said + "; no other method loses less."]
    return [said + f"; {_name(least)} loses least, {lost[least]:.3f}."]


def on_leaks(audits: Sequence[LeakAudit]) -> list[str]:
    """A warning where the absence of single features tells a disease."""
    telling = [
        f"{words(audit.disease)} ({_listed([f'{x.feature} {x.where}' for x in audit.leaks])})"
        for audit in audits
        if audit.leaks
    ]
    if not telling:
        return []
    return [
        f"Beware: whether single features are there tells {_listed(telling)}. What a method gains "
        "by seeing the mask may be just that, and need not hold where the model is used."
    ]


def _name(comparison: Comparison) -> str:
    method, scaler, architecture = comparison
    name = name_of(method, scaler, architecture)
    return name if name == architecture else f"{name} ({architecture})"


def _cell(result: Mapping[str, Any]) -> str:
    return f"{words(result['disease'])} · {result['architecture']}"


def _mean(results: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(np.mean([r[key] for r in results]))


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    """
    >>> _listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
