"""Times of follow-up → how far the labelled rows misstate a disease's risk.

Who leaves before the window ends is labelled only if ill, or not at all. So the share of ill among
the labelled rows differs from the risk, which Aalen and Johansen's estimator (without deaths Kaplan
and Meier's) gives from all rows at risk. Only the rates are told, and none that rests on few.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import duckdb
import numpy as np

from ehr_sn.config import SMALLEST_GROUP, Config, Label
from ehr_sn.ingest.cohort import outcome_table
from ehr_sn.ingest.findings import Finding, Severity
from ehr_sn.survival import DIED, LEAST, LEFT, cumulative_incidence, still_followed

Ended = Counter[tuple[str, int, int]]
"""Rows by label, step of its window (the last is that of its end), and what ended it."""

FINEST = 1000  # steps of a window at least, and one a day
MISSTATED_FROM = 0.1  # of the risk
FEW_FOLLOWED = 0.05


@dataclass(frozen=True)
class Risk:
    """The share of ill among one label's labelled rows, and what is estimated from all rows.

    `deaths_as_leaving` is the estimate for a world without deaths; None where none is declared.
    `still_followed` is the share that would be followed to the window's end, were nobody to fall
    ill or die.
    """

    labelled: float
    estimated: float
    deaths_as_leaving: float | None
    still_followed: float

    def as_dict(self) -> dict[str, float | None]:
        """Rounded, so that nobody can tell from a rate of how many it is."""
        return {
            name: None if rate is None else float(f"{rate:.3g}")
            for name, rate in asdict(self).items()
        }


def count_ended(db: duckdb.DuckDBPyConnection, config: Config) -> Ended:
    """Count the rows at risk of each label with a window of days. Needs its `outcome_DISEASE`."""
    ended: Ended = Counter()
    for name, label in config.labels.items():
        if label.within_days is not None:
            steps = _steps(label)
            place = f"least(floor(days / {label.within_days!r} * {steps}), {steps - 1})"
            counted = db.execute(
                f"""SELECT CASE WHEN days >= {label.within_days!r} THEN {steps}
                    ELSE {place}::INTEGER END AS step, ended, count(*)
                FROM {outcome_table(name)} WHERE days IS NOT NULL GROUP BY ALL"""
            ).fetchall()
            ended.update({(name, step, how): n for step, how, n in counted})
    return ended


def estimate_risks(
    config: Config, ended: Ended, labelled: Mapping[str, tuple[int, int]]
) -> dict[str, Risk]:
    """The risk of each label with a window of days, but of those with few of a class.

    `labelled` says of each label how many rows are 1 and 0.
    """
    risks = {}
    for name, label in config.labels.items():
        counts = [(step, how, n) for (of, step, how), n in sorted(ended.items()) if of == name]
        positive, negative = labelled.get(name, (0, 0))
        if not counts or min(positive, negative) < SMALLEST_GROUP:
            continue
        step, how, n = np.array(counts).T
        days, status = np.repeat(step, n), np.repeat(how, n)
        steps = _steps(label)
        as_leaving = None
        if config.cohort.died is not None:
            without_deaths = np.where(status == DIED, LEFT, status)
            as_leaving = cumulative_incidence(days, without_deaths, steps)
        risks[name] = Risk(
            positive / (positive + negative),
            cumulative_incidence(days, status, steps),
            as_leaving,
            float(still_followed(days, status, steps, [steps])[0]),
        )
    return risks


def follow_up_findings(
    config: Config,
    risks: Mapping[str, Risk],
    ended: Ended,
    labelled: Mapping[str, tuple[int, int]],
) -> Iterator[Finding]:
    """Labels whose rows misstate the risk, and those of which few are followed to the end."""
    if config.cohort.died is not None and ended and not any(how == DIED for *_, how in ended):
        said = (
            "true of none of the rows that were followed: if people died, the condition does not "
            "find them, and they count as having left alive"
        )
        yield Finding("nobody died", "cohort.died", 0, sum(ended.values()), said, "look")
    for name, risk in risks.items():
        label = config.labels[name]
        positive, rows = labelled[name][0], sum(labelled[name])
        if abs(risk.labelled - risk.estimated) > MISSTATED_FROM * risk.estimated:
            severity, said = _misstated(risk, label)
            yield Finding("misstated risk", f"labels.{name}", positive, rows, said, severity)
        if risk.still_followed < FEW_FOLLOWED:
            at_risk = sum(n for (of, *_), n in ended.items() if of == name)
            whole = ended[name, _steps(label), LEFT]
            said = (
                "followed to the end of the window, free of the disease: were nobody to fall ill "
                f"or die, {risk.still_followed:.1%} would be, so that what is known of its end "
                "rests on few"
            )
            if label.weighted:
                said += f" (none of which stands for more than {1 / LEAST:.0f})"
            said += ": take a shorter window"
            yield Finding("few followed", f"labels.{name}", whole, at_risk, said)


def _misstated(risk: Risk, label: Label) -> tuple[Severity, str]:
    said = f"of the labelled rows {risk.labelled:.1%} are ill; allowing for those who left, "
    if risk.deaths_as_leaving is None:
        said += f"Kaplan and Meier's estimate of the risk is {risk.estimated:.1%}"
    else:
        said += (
            f"Aalen and Johansen's estimate of the risk is {risk.estimated:.1%} (Kaplan and "
            f"Meier's, which counts deaths as leaving, {risk.deaths_as_leaving:.1%})"
        )
    if label.weighted:
        by = (
            f", and for leaving by {' and '.join(label.censoring_by)}" if label.censoring_by else ""
        )
        return "harmless", f"{said}: the rows are weighted for that{by}"
    factor = risk.labelled / risk.estimated if risk.estimated else math.inf
    return "look", (
        f"{said}: predicted risks would be {factor:.2f} times what they should be. With "
        "`censoring: ipcw`, the default, rows are weighted for that"
    )


def _steps(label: Label) -> int:
    return max(FINEST, math.ceil(label.within_days or 0))
