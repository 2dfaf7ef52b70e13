"""Ports of this machine that a command is to listen on: free, or an error that names the option."""

import errno
import socket

from ehr_sn.errors import EhrSnError

_FAULTS = {
    errno.EADDRINUSE: "port {port} is in use by another program: choose another with --port",
    errno.EACCES: "you may not listen on port {port}: choose one from 1024 on with --port",
    errno.EADDRNOTAVAIL: "--host {host}: this machine has no such address",
}


def require_free(host: str, port: int) -> None:
    """Check that this machine can listen on a port, before anything slow is begun.

    Raises
    ------
    EhrSnError
        Another program listens there, or the address or the port cannot be listened on.
    """
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
                probe.bind(address)
    except socket.gaierror:
        raise EhrSnError(f"--host {host}: there is no such address") from None
    except OSError as error:
        fault = _FAULTS.get(error.errno or 0, "port {port} of {host} cannot be listened on")
        raise EhrSnError(fault.format(port=port, host=host)) from None
