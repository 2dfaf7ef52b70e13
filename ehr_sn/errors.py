"""What went wrong, where, and what to do: the errors a user may meet."""

import errno
import os
from collections.abc import Iterable
from difflib import get_close_matches


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


def did_you_mean(name: str, valid: Iterable[str], list_all: bool = True) -> str:
    """Say which valid name is nearest to `name`, or list the valid ones.

    With `list_all` false, names that are not near stay unsaid: they may hold what is not for all
    eyes, such as the first patient of a file without a header.

    >>> did_you_mean("diabets", ["diabetes", "htn"])
    "did you mean 'diabetes'?"
    >>> did_you_mean("x", ["diabetes", "htn"])
    'valid: diabetes, htn'
    >>> did_you_mean("x", ["diabetes", "htn"], list_all=False)
    'nothing there has a name near it'
    """
    options = sorted(str(option) for option in valid)
    lowered = {option.lower(): option for option in options}
    near = get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.6)
    if near:
        return f"did you mean {lowered[near[0]]!r}?"
    if not options:
        return "there is none to choose from"
    if not list_all:
        return "nothing there has a name near it"
    return f"valid: {', '.join(options[:20])}" + (", …" if len(options) > 20 else "")
