"""What was computed → JSON that every reader takes: null stands for a number that is not finite."""

import json
import math
from typing import Any


def dumps(told: Any, indent: int = 2) -> str:
    """JSON of what `plain` makes of it.

    >>> dumps([0.5, float("nan")], indent=0).split()
    ['[', '0.5,', 'null', ']']
    """
    return json.dumps(plain(told), indent=indent, allow_nan=False)


def plain(told: Any) -> Any:
    """Replace each number that JSON has no word for by None.

    >>> plain({"slope": float("nan"), "areas": [0.5, float("inf")]})
    {'slope': None, 'areas': [0.5, None]}
    """
    if isinstance(told, dict):
        return {name: plain(value) for name, value in told.items()}
    if isinstance(told, list | tuple):
        return [plain(value) for value in told]
    return None if isinstance(told, float) and not math.isfinite(told) else told
