"""Listed codes and those that occur → which are one and the same, or of another kind."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator

import duckdb

from ehr_sn.config import SMALLEST_GROUP, Config
from ehr_sn.errors import quoted
from ehr_sn.ingest.codes import CodeRange, Pattern
from ehr_sn.ingest.findings import Finding

SHOWN = 5  # spellings that are named
UNDOTTED = 3  # places that codes of the ICD have after the third, where they are written undotted


Known = tuple[str, int, bool]  # a code, its events, and whether enough subjects have it


def plain(code: str) -> str:
    """A code as far as its spelling does not matter: without case, dots, blanks and hyphens.

    >>> plain("e11.9"), plain("I-10 ")
    ('E119', 'I10')
    """
    return re.sub(r"[\s.\-_]", "", code).upper()


def as_number(code: str) -> str:
    """Return `plain(code)`, and of digits the number: without leading zeros and a final `.0`.

    >>> as_number("0410.0"), as_number("410"), as_number("0"), as_number("e11.0")
    ('410', '410', '0', 'E110')
    """
    text = plain(re.sub(r"(?<=^\d)(\d*)\.0$", r"\1", code.strip()))
    return text.lstrip("0") or "0" if text.isdecimal() else text


class Spellings:
    """The codes that occur, to be found by a spelling like theirs. Needs `code_counts`."""

    def __init__(self, db: duckdb.DuckDBPyConnection):
        self._as_numbers: dict[str, list[Known]] = {}
        plainly = []
        for code, events, subjects in db.execute(
            "SELECT code, sum(events)::BIGINT, sum(subjects) FROM code_counts GROUP BY 1"
        ).fetchall():
            known = (code, events, subjects >= SMALLEST_GROUP)
            self._as_numbers.setdefault(as_number(code), []).append(known)
            plainly.append((plain(code), known))
        self._plainly = sorted(plainly)

    def like(self, patterns: Iterable[Pattern]) -> list[Known]:
        """The codes that patterns would match if spelling did not matter, the commonest first."""
        found = {one for pattern in patterns for one in self._like(pattern)}
        return sorted(found, key=lambda one: (-one[1], one[0]))

    def _like(self, pattern: Pattern) -> Iterator[Known]:
        if pattern.exact:
            yield from self._as_numbers.get(as_number(pattern.low), ())
            return
        low, high = plain(pattern.low), plain(pattern.high)
        if not low or not high:
            return
        for spelling, known in self._plainly[bisect_left(self._plainly, (low,)) :]:
            if spelling[: len(high)] > high:
                break
            yield known


def spelt_otherwise(key: str, said: str, alike: list[Known]) -> Finding:
    """The finding about entries that match nothing but for their spelling.

    A rare code is not named: it may be free text about one patient.
    """
    named = [code for code, _, common in alike if common][:SHOWN]
    rest = len(alike) - len(named)
    others = f"{rest:,} {'others' if named else 'codes'}" if rest else ""
    told = " and ".join(filter(None, [quoted(named), others]))
    return Finding(
        "code spelling",
        key,
        sum(events for _, events, _ in alike),
        0,
        f"{said}, but {told} differ in nothing but case, dots, blanks, hyphens, a trailing .0 or "
        "leading zeros: write it as the data do",
        "blocking",
    )


def of_another_length(db: duckdb.DuckDBPyConnection, config: Config) -> list[Finding]:
    """Ranges, which compare texts, that hold codes longer or shorter than their ends.

    Needs `code_counts` and `code_sets`.
    """
    ranges = {
        (key, place): entry
        for key, entries in config.code_sets.items()
        for place, entry in enumerate(entries)
        if isinstance(entry, CodeRange)
    }
    if not ranges:
        return []
    held: dict[tuple[str, int], list[Known]] = {}
    for key, place, code, events, subjects in db.execute(
        """SELECT key, entry, code, sum(events)::BIGINT, sum(subjects)
        FROM (SELECT DISTINCT key, entry, code FROM code_sets) JOIN code_counts USING (code)
        GROUP BY 1, 2, 3 ORDER BY 4 DESC, 3"""
    ).fetchall():
        held.setdefault((key, place), []).append((code, events, subjects >= SMALLEST_GROUP))
    findings = []
    for (key, place), entry in ranges.items():
        codes = held.get((key, place), [])
        odd = [one for one in codes if not _fits(one[0], entry, [code for code, *_ in codes])]
        if not odd:
            continue
        low, high = entry.range
        named = [code for code, _, common in odd if common][:SHOWN]
        findings.append(
            Finding(
                "code length",
                key,
                sum(events for _, events, _ in odd),
                sum(events for _, events, _ in codes),
                f"the range {low!r} to {high!r} compares texts, and so holds {len(odd):,} codes "
                "that are shorter or longer than its ends"
                + (f", such as {quoted(named)}" if named else "")
                + ": are they meant? Else list prefixes or codes",
            )
        )
    return findings


def _fits(code: str, entry: CodeRange, codes: list[str]) -> bool:
    """Whether a code's part before the dot is as long as those of the range's ends.

    Codes without any dot may go on: in 401 to 405 lies 40190. But none of digits goes on for long.

    >>> codes = ["390", "410.1", "40", "41234"]
    >>> [_fits(code, CodeRange(("390", "459")), codes) for code in codes]
    [True, True, False, False]
    >>> codes = ["4019", "40", "412345"]
    >>> [_fits(code, CodeRange(("390", "459")), codes) for code in codes]
    [True, False, False]
    """
    whole = len(code.partition(".")[0])
    ends = [len(end.partition(".")[0]) for end in entry.range]
    if min(ends) <= whole <= max(ends):
        return True
    if whole < min(ends) or "." in code:
        return False
    dotted = any("." in other for other in (*codes, *entry.range))
    return not dotted and (not code.isdecimal() or whole < max(ends) + UNDOTTED)
