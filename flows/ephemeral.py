"""The server that Prefect starts for a flow where no other is set, out of reach of Ctrl-C."""

import signal
from threading import Thread

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED


def start_server() -> None:
    """Start Prefect's own server now, unless another one is set, and wait until it answers.

    Prefect would start it at the first flow, and a terminal's Ctrl-C would end it before that flow:
    with a traceback of what it was at, and the flow left talking to nobody. A process inherits the
    signals that the thread starting it has blocked. It is ended with this process.
    """
    if PREFECT_API_URL.value() or not PREFECT_SERVER_EPHEMERAL_ENABLED.value():
        return
    starting = Thread(target=_start_without_interrupts, daemon=True)
    starting.start()
    starting.join()  # here Ctrl-C gets through


def _start_without_interrupts() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    SubprocessASGIServer().start()
