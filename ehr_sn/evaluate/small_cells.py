"""Counts → what of them may leave for MLflow, HTML or Markdown: no small ones, and none to infer.

A count is small from 1 to one less than the smallest that is shown (`privacy.smallest_cell`).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "–"  # a count that would tell a small one, by what they add up to
OF_PARTS = (
    *("excluded", "undecided", "few positives", "few negatives"),
    *("misstated risk", "few followed"),
)
"""Checks that count parts of what cohort and labels tell, where a small part would be inferred."""


def is_small(count: float, smallest: int) -> bool:
    """
    >>> [is_small(count, 11) for count in (0, 1, 10, 11)]
    [False, True, True, False]
    """
    return 0 < count < smallest


def shown(count: int, smallest: int) -> int | str:
    """The count, unless it is small.

    >>> shown(7, 11), shown(0, 11), shown(1234, 11)
    ('< 11', 0, 1234)
    """
    return f"< {smallest}" if is_small(count, smallest) else count


def shown_parts(parts: Mapping[str, int], smallest: int) -> dict[str, int | str]:
    """Counts of which a total is known: where a single one is small, the next is hidden, too.

    >>> shown_parts({"old": 70, "young": 3, "unborn": 0, "ageless": 40}, 11)
    {'old': 70, 'young': '< 11', 'unborn': 0, 'ageless': '–'}
    """
    told = {name: shown(count, smallest) for name, count in parts.items()}
    if sum(is_small(count, smallest) for count in parts.values()) == 1:
        others = [name for name, count in parts.items() if count >= smallest]
        if others:
            told[min(others, key=lambda name: parts[name])] = HIDDEN
    return told


def shown_share(share: float, rows: int, smallest: int) -> float:
    """A share of rows that does not tell of few with, or few without: they count as none."""
    if is_small(round(share * rows), smallest):
        return 0.0
    return 1.0 if is_small(round((1 - share) * rows), smallest) else share


def shown_label(counts: Mapping[str, int], smallest: int) -> dict[str, int | str]:
    """How many rows left at each rule of a label, are eligible, and positive, as in a manifest.

    >>> shown_label({"rows": 90, "unknown": 4, "eligible": 86, "positive": 80}, 11)
    {'rows': 90, 'unknown': '< 11', 'eligible': '–', 'positive': '–'}
    """
    leaves = {name: n for name, n in counts.items() if name not in ("rows", "positive")}
    positive, negative = counts["positive"], counts["eligible"] - counts["positive"]
    classes = shown_parts({"positive": positive, "negative": negative}, smallest)
    return {
        "rows": shown(counts["rows"], smallest),
        **shown_parts(leaves, smallest),
        "positive": classes["positive"],
    }


def shown_attrition(steps: Sequence[Mapping[str, Any]], smallest: int) -> list[dict[str, Any]]:
    """Rules and what each left, as in a manifest; one that took few is told with the next.

    >>> from ehr_sn.ingest.eligibility import entry
    >>> steps = [entry("read", 90, 90), entry("usable", 87, 87, 3), entry("adults", 60, 60, 27)]
    >>> [(step["rule"], step["rows"], step["excluded"]) for step in shown_attrition(steps, 11)]
    [('read', 90, 0), ('usable, adults', 60, 30)]
    """
    groups, together = [[steps[0]]], []
    for step in steps[1:]:
        together.append(step)
        before = groups[-1][-1]
        if not any(is_small(before[of] - step[of], smallest) for of in ("rows", "subjects")):
            groups.append(together)
            together = []
    groups[-1] += together  # what the last few took is told with what the one before took
    return [_as_one(group, smallest) for group in groups]


def _as_one(steps: Sequence[Mapping[str, Any]], smallest: int) -> dict[str, Any]:
    """Consecutive rules as one."""
    excluded, unknown = (sum(step[name] for step in steps) for name in ("excluded", "unknown"))
    parts = shown_parts({"excluded": excluded, "unknown": unknown}, smallest)
    return {**steps[-1], "rule": ", ".join(step["rule"] for step in steps), **parts}


def shown_manifest(manifest: Mapping[str, Any], smallest: int) -> dict[str, Any]:
    """A store's manifest without small counts; what is not of patients stays as it is."""
    rows = manifest["rows"]
    features = [
        feature | {"observed_rate": shown_share(feature["observed_rate"], rows, smallest)}
        for feature in manifest["features"]
    ]
    events = {}
    for table, counts in manifest["event_rows"].items():
        parts = {name: n for name, n in counts.items() if name != "read"}
        events[table] = {"read": counts["read"]} | shown_parts(parts, smallest)
    codes = {
        table: told | {"codes": {code: n for code, n in told["codes"].items() if n >= smallest}}
        for table, told in manifest["codes"].items()
    }
    for table, told in codes.items():
        told["events"] = events[table]["kept"]
    return {
        **manifest,
        "features": features,
        "cohort": shown_attrition(manifest["cohort"], smallest),
        "labels": {name: shown_label(n, smallest) for name, n in manifest["labels"].items()},
        "events": {table: counts["kept"] for table, counts in events.items()},
        "event_rows": events,
        "codes": codes,
        "quarantined": [
            entry | {"count": shown(entry["count"], smallest)} for entry in manifest["quarantined"]
        ],
        "findings": [_finding(finding, smallest) for finding in manifest["findings"]],
    }


def _finding(finding: Mapping[str, Any], smallest: int) -> dict[str, Any]:
    """What is found, of which the message may say the count again."""
    count, message = finding["count"], finding["message"]
    told = shown(count, smallest)
    if is_small(finding["of"] - count, smallest) or finding["check"] in OF_PARTS:
        told = HIDDEN
    if told == count:
        return dict(finding)
    message = re.sub(rf"(?<![\w.,-]){count:,}(?![\w]|[.,]\d)", str(told), message)
    hidden = {**finding, "count": told, "message": message, "share": None}
    return hidden | {"of": 0} if finding["check"] in OF_PARTS else hidden
