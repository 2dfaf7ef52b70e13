"""What went wrong, where, and what to do: the errors a user may meet."""

import errno
import os
import re
from collections.abc import Iterable
from difflib import SequenceMatcher


class EhrSnError(Exception):
    """Base of all errors that are the user's to mend. The message never holds a patient's value."""


class ConfigError(EhrSnError):
    """The configuration is wrong: names the file, the key and what would be valid."""


class DataError(EhrSnError):
    """The tables cannot be used as configured: names the table, the column and counts."""


class DiskError(EhrSnError):
    """There is no room to write: names the folder."""


def disk_is_full(error: Exception) -> bool:
    """Whether the disk, a quota or a limit on files' sizes is what an error is about.

    >>> disk_is_full(OSError(errno.ENOSPC, "No space left on device"))
    True
    """
    signs = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return any(os.strerror(sign) in str(error) for sign in signs)


def quoted(texts: Iterable[object]) -> str:
    """Texts in quotes, in which blanks show, and numbers as they are.

    >>> quoted(["m ", 7])
    "'m ', 7"
    """
    return ", ".join(f"{one:g}" if isinstance(one, (int, float)) else repr(one) for one in texts)


def did_you_mean(name: str, valid: Iterable[str], list_all: bool = True) -> str:
    """Say which valid name is nearest to `name`, or list the valid ones.

    With `list_all` false, names that are not near stay unsaid: they may hold what is not for all
    eyes, such as the first patient of a file without a header.

    >>> did_you_mean("diabets", ["diabetes", "htn"])
    "did you mean 'diabetes'?"
    >>> did_you_mean("LBXCRP", ["LBXSCR", "SEQN"])
    "valid: 'LBXSCR', 'SEQN'"
    >>> did_you_mean("x", ["diabetes", "htn"], list_all=False)
    'nothing there has a name near it'
    """
    options = sorted(str(option) for option in valid)
    near = [(away, option) for option in options if (away := _away(str(name), option)) is not None]
    if near:
        return f"did you mean {min(near)[1]!r}?"
    if not options:
        return "there is none to choose from"
    if not list_all:
        return "nothing there has a name near it"
    return f"valid: {quoted(options[:20])}" + (", …" if len(options) > 20 else "")


def _away(name: str, option: str) -> float | None:
    """How far a name is from another that may have been meant; None where it was hardly meant.

    A name of three letters, and one in capitals such as LBXSCR, is another name with any letter
    changed; and one in capitals with any digit changed.

    >>> _away("patient id", "Patient_ID"), _away("heigth", "height"), _away("prediction", "predict")
    (0, 1, 2.3)
    >>> _away("hdl", "ldl"), _away("F18", "F17"), _away("BPXDI5", "BPXDI1")
    (None, None, None)
    """
    one, other = (re.sub(r"[\W_]", "", text.lower()) or text for text in (name, option))
    if one == other:
        return 0
    if min(len(one), len(other)) == 1:
        return None
    longer, shorter = sorted((one, other), key=len, reverse=True)
    coded = all(re.search("[A-Z]", text) and text == text.upper() for text in (name, option))
    if coded and re.sub(r"\D", "", one) != re.sub(r"\D", "", other):
        return None
    edits = _edits(one, other)
    if coded or len(longer) <= 3:
        substituted = len(one) == len(other) and sorted(one) != sorted(other)
        near = edits == 1 and not substituted
    else:
        near = edits <= (1 if len(longer) < 8 else 2)
    if near:
        return edits
    common = SequenceMatcher(None, one, other, autojunk=False).find_longest_match().size
    is_part = common == len(shorter) >= 4 and 2 * common >= len(longer)
    shares_much = not coded and common >= 6 and 10 * common >= 7 * len(longer)
    return 2 + round(1 - common / len(longer), 1) if is_part or shares_much else None


def _edits(one: str, other: str) -> int:
    """Letters to put in, take out, change, or swap with the next, to come from one to the other.

    >>> _edits("roh", "rho"), _edits("il", "ill"), _edits("", "abc")
    (1, 1, 3)
    """
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one):
        earlier, before, row = before, row, [i + 1]
        for j, wanted in enumerate(other):
            least = min(before[j] + (letter != wanted), before[j + 1] + 1, row[j] + 1)
            if i and j and letter == other[j - 1] and one[i - 1] == wanted:
                least = min(least, earlier[j - 1] + 1)
            row.append(least)
    return row[-1]
