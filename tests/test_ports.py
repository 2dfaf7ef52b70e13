"""A port to listen on is free, or one line says why not and which option chooses another."""

import socket
from pathlib import Path

import pytest
from test_cli import ehr_sn

from ehr_sn.errors import EhrSnError
from ehr_sn.ports import require_free


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_is_in_use_while_somebody_listens_there(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EhrSnError, match=f"port {port} is in use by another program: choose"):
            require_free(host, port)
    require_free(host, port)


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(
        EhrSnError, match=r"--host 203\.0\.113\.7: this machine has no such address"
    ):
        require_free("203.0.113.7", 0)
    with pytest.raises(EhrSnError, match="--host not a host: there is no such address"):
        require_free("not a host", 0)


def test_ui_and_serve_say_at_once_that_the_port_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "prefect.yaml").write_text("deployments: []\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for command in ("ui", "serve"):
            done = ehr_sn(tmp_path, command, "--port", port)
            assert done.returncode == 1
            said = f"Error: port {port} is in use by another program: choose another with --port"
            assert done.stderr.strip() == said
            assert done.stdout == ""
