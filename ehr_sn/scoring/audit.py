"""What was done with models, and by whom → an append-only file whose lines hash one another.

Each line is a JSON object that holds the SHA-256 of the line before it and of itself, so a line
that was altered, taken out or put in is found. Lines cut off the end are not: note elsewhere the
last line's hash, which `verify` returns and every promotion leaves in MLflow.
"""

import fcntl
import getpass
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ehr_sn.config import Config
from ehr_sn.errors import EhrSnError

START = "0" * 64  # what the first line holds for the line before it


def audit_path(config: Config) -> Path:
    """The audit log of everything below the configuration's `data_dir`."""
    return config.data_dir / "audit.jsonl"


def append(path: Path, what: str, **entry: Any) -> str:
    """Add a line to the log, with the time and the user's name; returns the line's hash.

    `entry` must hold no row of any patient. One process writes at a time, and a line is on disk
    when this returns.

    Raises
    ------
    EhrSnError
        The last line is not as it was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(handle, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = file.read().splitlines(keepends=True)
        previous = _checked(path, len(lines), lines[-1]) if lines else {"sha256": START}
        when = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"when": when, "who": _user(), "what": what, **entry}
        content["previous"] = previous["sha256"]
        content["sha256"] = _hash(content)
        file.write((json.dumps(content, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
    return str(content["sha256"])


@contextmanager
def failures(path: Path, what: str, **entry: Any) -> Iterator[None]:
    """Add a line where an error ends the block: the error's class, not what it says."""
    try:
        yield
    except BaseException as error:
        append(path, what, outcome="failed", error=type(error).__name__, **entry)
        raise


def verify(path: Path) -> tuple[int, str]:
    """Check the whole log; returns how many lines it has, and the last one's hash.

    Raises
    ------
    EhrSnError
        Naming the first line that is not as it was written, or does not follow the one before it.
    """
    previous, number = START, 0
    if not path.exists():
        return number, previous
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            entry = _checked(path, number, line)
            if entry["previous"] != previous:
                raise EhrSnError(
                    f"{path}:{number}: does not follow the line before it: lines were taken out, "
                    "put in or moved"
                )
            previous = entry["sha256"]
    return number, previous


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"


def _checked(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
        whole = line.endswith(b"\n") and entry["sha256"] == _hash(entry)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise EhrSnError(
            f"{path}:{number}: is not as it was written; find out who changed it, move the file "
            "away to keep it, and a new log is begun"
        )
    return dict(entry)


def _hash(entry: dict[str, Any]) -> str:
    signed = {key: value for key, value in entry.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()
