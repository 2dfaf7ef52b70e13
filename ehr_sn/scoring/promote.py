"""Challenger + champion + tuning rows → whether the challenger takes the champion's place, and why.

Nothing here looks at held-out rows: whoever promotes by them has none left to report on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import norm

from ehr_sn.config import Config
from ehr_sn.errors import ConfigError, did_you_mean
from ehr_sn.evaluate.diagnostics import LeakAudit
from ehr_sn.evaluate.statistics import paired_delong
from ehr_sn.ingest.store import Store
from ehr_sn.models.weights import taken, weights
from ehr_sn.scoring.package import Package

LEVEL = 0.05
"""Of the one-sided test; see `level`."""


@dataclass
class Decision:
    """What was found, rule by rule; the challenger is promoted where nothing speaks against it.

    `uncompared` is why it was not compared with the champion, where that was allowed.
    """

    against: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    uncompared: str = ""

    @property
    def promoted(self) -> bool:
        return not self.against

    def told(self, disease: str) -> str:
        """One line for people."""
        if not self.promoted:
            return f"{disease}: refused. {'; '.join(self.against)}"
        if self.uncompared:
            return f"{disease}: promoted, not compared with the champion: {self.uncompared}"
        if "auroc_difference" not in self.figures:
            return f"{disease}: promoted; it is the first champion"
        return (
            f"{disease}: promoted; AUROC {self.figures['auroc_difference']:+.4f} against the "
            f"champion, with {_percent(self.figures['confidence'])} confidence above "
            f"{self.figures['auroc_difference_at_least']:+.4f}"
        )

    def as_tags(self) -> dict[str, str]:
        """Return the tags of the model version in MLflow."""
        figures = {f"ehr_sn.{name}": f"{value:.6g}" for name, value in self.figures.items()}
        return figures | {
            "ehr_sn.decision": "promoted" if self.promoted else "refused",
            "ehr_sn.decision_against": "; ".join(self.against),
            "ehr_sn.uncompared": self.uncompared,
        }


def decide(
    config: Config,
    store: Store,
    audits: list[LeakAudit],
    challenger: Package,
    champion: Package | None,
    uncompared: bool = False,
) -> Decision:
    """Judge a challenger by `promotion` in the configuration, on tuning rows of its own store.

    - *Not worse*: by paired DeLong on the same subjects, its AUROC is above the champion's less
      `margin`, with a one-sided p below `level` (a test of non-inferiority: few subjects do not
      make a worse model pass). Without a champion there is nothing to compare with; one that it
      cannot be compared with refuses it, unless that is allowed by `uncompared`.
    - *Calibrated*: slope and intercept, cross-fitted, lie within bounds.
    - *No leaks*: the audit of its store flags no feature but those accepted by name.

    `audits` is `leak_audit(store, split, asked_of(config, store))`.
    """
    decision = Decision()
    why = incomparable(store, challenger, champion) if champion else None
    if why and uncompared:
        decision.uncompared = why
    elif why:
        decision.against.append(f"cannot be compared with the champion: {why}")
    elif champion:
        _compare(config, store, challenger, champion, decision)
    _judge_calibration(config, challenger, decision)
    _judge_leaks(config, store, audits, challenger, decision)
    return decision


def _compare(
    config: Config, store: Store, challenger: Package, champion: Package, decision: Decision
) -> None:
    place, split = store.diseases.index(challenger.disease), challenger.about["split"]
    labels = store.labels()[:, place]
    tuning = store.splits()[:, split] == "tuning"
    rows = tuning & ~np.isnan(labels)
    values = store.values()[rows]
    places = [store.feature_names.index(name) for name in champion.features]
    ours = challenger.score(values).probability
    theirs = champion.score(values[:, places]).probability
    weight = taken(weights(store, split)[place], rows)
    found = paired_delong(labels[rows], ours, theirs, store.subjects()[rows], weight)
    margin = config.promotion.margin
    confidence = 1 - level(challenger, champion)
    lowest = found.difference - norm.ppf(confidence) * found.se
    decision.figures |= {
        "auroc_difference": found.difference,
        "auroc_difference_se": found.se,
        "auroc_difference_at_least": lowest,
        "confidence": confidence,
        "margin": margin,
    }
    if not lowest >= -margin:  # or NaN: too few subjects for a test
        decision.against.append(
            f"may be worse than the champion: AUROC {found.difference:+.4f}, and with "
            f"{_percent(confidence)} confidence only above {lowest:+.4f}, where {-margin:+.4f} is "
            "asked for"
        )


def level(challenger: Package, champion: Package) -> float:
    """The p below which a challenger passes: 0.05, over the number that it was chosen among.

    The best of many on tuning rows looks better there than it is: chosen among 31 equals it passes
    for better in 39 % of cases (benchmarks/optimism.py). Where the champion was chosen among as
    many, both look so, and nothing is taken off; the test then errs on the side of the champion.
    """
    among, before = (p.about.get("chosen_among", 1) for p in (challenger, champion))
    return LEVEL / among if among > before else LEVEL


def _percent(share: float) -> str:
    """
    >>> _percent(0.95), _percent(1 - 0.05 / 31)
    ('95 %', '99.84 %')
    """
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + " %"


def incomparable(store: Store, challenger: Package, champion: Package) -> str | None:
    """Why the champion cannot be judged on the challenger's tuning rows; None if it can.

    It can where it has not been trained on them. A subject's split depends on nothing but its
    identifier and the settings of the splits.
    """
    one, other = (
        (package.about["config"]["splits"], package.about["split"])
        for package in (challenger, champion)
    )
    if one != other:
        return "subjects were dealt to splits differently, so it may have trained on these rows"
    if one[0]["table"] is not None and challenger.about["store"] != champion.about["store"]:
        return "a table gave the splits, and it may have changed since"
    keys = [package.about["config"].get("privacy") for package in (challenger, champion)]
    if keys[0] != keys[1]:
        return "subjects had other pseudonyms, by which they are dealt to splits"
    unknown = sorted(set(champion.features) - set(store.feature_names))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        return f"it takes features that this store lacks: {', '.join(unknown[:3])}{more}"
    return None


def _judge_calibration(config: Config, challenger: Package, decision: Decision) -> None:
    rule = config.promotion
    bounds = {
        "calibration_slope": rule.calibration_slope,
        "calibration_intercept": rule.calibration_intercept,
    }
    for name, (low, high) in bounds.items():
        value: float | None = challenger.about["figures"][name]
        if value is None:
            decision.against.append(f"{name} is not known: too few subjects, or no finite one")
            continue
        decision.figures[name] = value
        if not low <= value <= high:
            decision.against.append(f"{name} {value:.3f} is not within {low:g} to {high:g}")


def _judge_leaks(
    config: Config,
    store: Store,
    audits: list[LeakAudit],
    challenger: Package,
    decision: Decision,
) -> None:
    accepted = accepted_leaks(config, store)
    found: list[Any] = [audit for audit in audits if audit.disease == challenger.disease]
    if not found:
        decision.against.append("the leak audit needs two tuning subjects of either class")
        return
    leaks = [leak for leak in found[0].leaks if leak.feature not in accepted]
    decision.figures["leaks"] = len(leaks)
    decision.figures["leaks_accepted"] = len(found[0].leaks) - len(leaks)
    if leaks:
        named = ", ".join(f"{leak.feature} ({leak.where})" for leak in leaks[:5])
        more = f" and {len(leaks) - 5} more" if len(leaks) > 5 else ""
        decision.against.append(
            f"whether a feature is there gives the disease away: {named}{more}; leave it out, "
            "name in evaluate.asked_of of whom it is asked, or accept it by name in "
            "promotion.accept_leaks"
        )


def accepted_leaks(config: Config, store: Store) -> set[str]:
    """The features that `promotion.accept_leaks` names, by themselves or by their measurement.

    Raises
    ------
    ConfigError
        It names neither.
    """
    accepted: set[str] = set()
    for i, name in enumerate(config.promotion.accept_leaks):
        pairs = zip(store.feature_names, store.measurements, strict=True)
        found = {feature for feature, measurement in pairs if name in (feature, measurement)}
        if not found:
            hint = did_you_mean(name, {*store.feature_names, *store.measurements})
            where = config.where(f"promotion.accept_leaks.{i}")
            raise ConfigError(f"{where}: no feature {name!r}; {hint}")
        accepted |= found
    return accepted
