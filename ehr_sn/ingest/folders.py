"""Hidden folders to work in: gone when the work ends, and cleared away where it was killed."""

import fcntl
import glob
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb

from ehr_sn.errors import DiskError, disk_is_full

UNLOCKED = 60  # seconds in which whoever makes a hidden folder has locked it


@contextmanager
def hidden_folder(beside: Path | None, prefix: str = ".partial-") -> Iterator[Path]:
    """A new folder in `beside`, or where the system keeps temporary files.

    Those of the same prefix in `beside` that killed processes left are removed first.
    """
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
        clear_abandoned(beside, prefix, UNLOCKED)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=beside) as folder,
        (Path(folder) / "lock").open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(folder)


def clear_abandoned(beside: Path, prefix: str, after: float) -> None:
    """Remove folders whose file `lock` nobody holds, and that have not changed for so long."""
    for folder in beside.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError):  # it is at work, or gone
            changed = max(path.stat().st_mtime for path in (folder, *folder.glob("*")))
            if time.time() - changed < after:
                continue
            with (folder / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


@contextmanager
def disk_errors(folder: Path, instead: str) -> Iterator[None]:
    """Say of a full disk that it is full, and what to do instead of making room."""
    try:
        yield
    except (OSError, duckdb.Error) as error:
        if not disk_is_full(error):
            raise
        raise DiskError(
            f"{folder}: the disk is full, or a limit on the size of files is reached; what was "
            f"written is removed. Make room, or {instead}"
        ) from None
