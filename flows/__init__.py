"""Thin Prefect flows around `ehr_sn`. They run with or without a Prefect server."""

import atexit
import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from multiprocessing.process import BaseProcess

import psutil

# Set before Prefect is imported. Without an API URL each process starts a server of its own,
# which on a busy machine takes longer than Prefect's default patience.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")

# Set in every process that runs a flow or a task: what they write is for its owner alone.
os.umask(0o077)


def fall_silent() -> None:
    """Keep from the user what libraries say of themselves while Python shuts down."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _end_with(parent: BaseProcess) -> None:
    """Wait for the parent's end, and end likewise: with the server that Prefect started here."""
    parent.join()
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has ended meanwhile
            child.terminate()
    os._exit(1)


if (parent := multiprocessing.parent_process()) is not None:
    atexit.register(fall_silent)
    # A worker whose parent is killed would wait for its next task for ever, and hold its memory.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # Ctrl-C reaches every process of the terminal. A worker that raised it would leave Prefect
    # waiting for ever; it finishes its cell, and the command, which waits for that, stops.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
