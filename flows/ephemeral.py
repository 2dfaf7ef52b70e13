"""The server that Prefect starts for a flow where no other is set: one a command, and no more."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED, temporary_settings


@contextmanager
def own_server() -> Iterator[None]:
    """Start Prefect's own server, unless another one is set, for this process and its workers.

    Prefect would start it at the first flow, and a terminal's Ctrl-C would end it before that flow:
    with a traceback of what it was at, and the flow left talking to nobody. And each worker would
    start one more, which takes longer than many a cell. It is ended with this process.
    """
    if PREFECT_API_URL.value() or not PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        yield
        return
    server = SubprocessASGIServer()
    starting = Thread(target=_start_without_interrupts, args=(server,), daemon=True)
    starting.start()
    starting.join()  # here Ctrl-C gets through
    # If it did not start, Prefect tries it once more at the flow, and says why not.
    with temporary_settings({PREFECT_API_URL: server.api_url} if server.running else {}):
        yield


def _start_without_interrupts(server: SubprocessASGIServer) -> None:
    """A process inherits the signals that the thread starting it has blocked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    server.start()
