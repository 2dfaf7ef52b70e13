"""Entries of a set of codes, as a configuration writes them → the codes that they mean.

An entry is a code, a prefix (`C*`), a range of prefixes, a file of codes and prefixes, or the
descendants of a concept. A `*` elsewhere than at the end is a character like any other.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ehr_sn.errors import did_you_mean

_KINDS = ("range", "file", "descendants_of")
_LAST = "\U0010ffff"  # sorts behind every other character


@dataclass(frozen=True)
class CodeRange:
    """Codes from one prefix to another, both included, as chapters of the ICD are given."""

    range: tuple[str, str]


@dataclass(frozen=True)
class CodeFile:
    """A file of codes and prefixes, one a line, as it was when the configuration was read."""

    file: str
    entries: tuple[str, ...]


@dataclass(frozen=True)
class Descendants:
    """A concept and all that lie below it, by the OMOP table `concept_ancestor`."""

    descendants_of: str


Entry = str | CodeRange | CodeFile | Descendants


@dataclass(frozen=True)
class Pattern:
    """An interval of texts: from `low` on, up to all that begin with `high`.

    `exact` ones hold a single text. DuckDB and Python sort texts alike, by code points.
    """

    written: str
    low: str
    high: str
    exact: bool = False

    def overlaps(self, other: "Pattern") -> bool:
        """Whether a text lies in both."""
        return self.low <= other._end and other.low <= self._end

    @property
    def _end(self) -> str:
        return self.high if self.exact else self.high + _LAST


def read_entry(value: Any, folder: Path | None) -> Entry:
    """An entry from what the YAML holds. Files are found below `folder`.

    Without a folder, from what a store's manifest holds: a file's entries are then there.

    Raises
    ------
    ValueError
        It is no such entry, or its file cannot be read.
    """
    if not isinstance(value, dict):
        return _pattern(_text(value)).written
    if folder is None and value.keys() == {"file", "entries"}:
        return CodeFile(value["file"], tuple(value["entries"]))
    if len(value) != 1 or next(iter(value)) not in _KINDS:
        unknown = next((str(key) for key in value if key not in _KINDS), "")
        raise ValueError(
            f"give a code, or one of: {', '.join(_KINDS)}"
            + (f"; {unknown!r} is none, {did_you_mean(unknown, _KINDS)}" if unknown else "")
        )
    ((kind, given),) = value.items()
    if kind == "range":
        return _range(given)
    if kind == "file":
        return _file(given, folder or Path())
    return Descendants(_text(given))


def patterns(entry: Entry) -> tuple[Pattern, ...]:
    """What an entry means as text; nothing of descendants, which only the data tell.

    >>> [p.overlaps(Pattern("I2", "I2", "I2")) for p in patterns(CodeRange(("I10", "I20")))]
    [True]
    """
    match entry:
        case str():
            return (_pattern(entry),)
        case CodeRange(range=(low, high)):
            return (Pattern(written(entry), low, high),)
        case CodeFile(entries=entries):
            return tuple(map(_pattern, entries))
    return ()


def written(entry: Entry) -> str:
    """An entry in a few words.

    >>> written(CodeRange(("I20", "I25"))), written(Descendants("201826"))
    ('I20 to I25', 'descendants of 201826')
    """
    match entry:
        case CodeRange(range=(low, high)):
            return f"{low} to {high}"
        case CodeFile(file=file):
            return file
        case Descendants(descendants_of=concept):
            return f"descendants of {concept}"
    return entry


def as_configured(entry: Entry) -> str | dict[str, Any]:
    """An entry as the YAML has it, for the manifest."""
    match entry:
        case CodeRange(range=bounds):
            return {"range": list(bounds)}
        case CodeFile(file=file):
            return {"file": file}
        case Descendants(descendants_of=concept):
            return {"descendants_of": concept}
    return entry


def share_a_code(one: tuple[Entry, ...], other: tuple[Entry, ...]) -> bool:
    """Whether a code may be in both sets, as far as their texts tell."""
    descended = {entry for entry in one if isinstance(entry, Descendants)} & set(other)
    return bool(descended) or any(a.overlaps(b) for a in _all(one) for b in _all(other))


def _all(entries: tuple[Entry, ...]) -> Iterator[Pattern]:
    for entry in entries:
        yield from patterns(entry)


def _pattern(entry: str) -> Pattern:
    entry = re.sub(r"^([1-9]\d{3,})\.0+$", r"\1", entry)  # as `cells.as_code` has the tables' codes
    if not entry.endswith("*"):
        return Pattern(entry, entry, entry, exact=True)
    prefix = entry.removesuffix("*")
    if not prefix:
        raise ValueError("'*' alone is every code: name how the codes begin")
    return Pattern(entry, prefix, prefix)


def _text(value: Any) -> str:
    """Codes are text; a whole number in the YAML means its digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError("YAML does not read this as text: put the code in quotes")


def _range(given: Any) -> CodeRange:
    if not isinstance(given, list) or len(given) != 2:
        raise ValueError("range: give the first and the last prefix, as in [I20, I25]")
    low, high = map(_text, given)
    if not low or not high or "*" in low + high:
        raise ValueError("range: its ends are prefixes already: leave * out")
    if low > high + _LAST:
        raise ValueError(f"range: compared as text, {low!r} comes after {high!r}")
    return CodeRange((low, high))


def _file(given: Any, folder: Path) -> CodeFile:
    if not isinstance(given, str):
        raise ValueError("file: give its path")
    path = (folder / given).resolve()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*")), list_all=False)
        raise ValueError(f"file: cannot read {path} as UTF-8 text; {near}") from None
    codes = [line for line in (_code_of(line) for line in lines) if line]
    if not codes:
        raise ValueError(f"file: {path} names no code")
    return CodeFile(given, tuple(dict.fromkeys(_pattern(code).written for code in codes)))


def _code_of(line: str) -> str:
    """A line without its comment.

    >>> _code_of("E11*  # type 2"), _code_of("# none"), _code_of("A#1")
    ('E11*', '', 'A#1')
    """
    return "" if line.lstrip().startswith("#") else re.split(r"\s#", line)[0].strip()
