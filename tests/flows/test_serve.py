"""Schedules fire by themselves, without a Prefect server set up, and a killed `serve` is mended."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from flows.serve import read_deployments

import httpx
import pytest

from ehr_sn.errors import ConfigError

FLOW = """\
import time
from pathlib import Path
from prefect import flow

@flow(name="tick")
def tick() -> None:
    with Path("ticks").open("a") as file:
        file.write("begin\\n")
    while Path("hold").exists():
        time.sleep(0.2)
    with Path("ticks").open("a") as file:
        file.write("end\\n")
"""
SCHEDULES = """\
deployments:
  - name: often
    entrypoint: tick.py:tick
    schedules: [{interval: 4}]
"""


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one scheduled flow; Prefect as on a machine where it was never used."""
    (tmp_path / "tick.py").write_text(FLOW)
    (tmp_path / "prefect.yaml").write_text(SCHEDULES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Serve = Callable[[], subprocess.Popen[str]]


@pytest.fixture
def serve(clock: Path, port: int) -> Iterator[Serve]:
    """A function that starts `ehr-sn serve`; all it leaves is ended after the test."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_API")}
    mine |= {"PREFECT_HOME": str(clock / "home"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    code = "from ehr_sn.cli import main; main()"
    started = []

    def start() -> subprocess.Popen[str]:
        log = (clock / f"log{len(started)}").open("w")
        command = [sys.executable, "-c", code, "serve", "--port", str(port)]
        started.append(subprocess.Popen(command, env=mine, stdout=log, stderr=log, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
    subprocess.run(["pkill", "-9", "-f", f"server start --port {port}"], check=False)
    subprocess.run(["pkill", "-9", "-f", f"api.server:create_app.*--port {port}"], check=False)


def until(holds: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.3)


def test_a_schedule_fires_and_what_a_killed_serve_left_is_cleared(
    clock: Path, port: int, serve: Serve
) -> None:
    ticks, hold = clock / "ticks", clock / "hold"  # while it is there, no run ends

    def ticked(what: str) -> int:
        return ticks.read_text().split().count(what) if ticks.exists() else 0

    hold.touch()
    first = serve()
    until(lambda: ticked("begin") == 1)  # nobody asked for it but the schedule
    first.kill()
    first.wait()
    time.sleep(9)  # two are missed

    second = serve()
    until(lambda: "Serving." in (clock / "log1").read_text())
    hold.unlink()
    until(lambda: ticked("end") >= 2)
    said = (clock / "log1").read_text()
    assert "often: 1 still ran by itself: ended" in said
    assert "often: 1 left by a process that is gone: crashed" in said
    assert "missed is made up for" in said
    third = serve()
    third.wait(60)
    assert third.returncode == 1
    assert "is being served by another process already" in (clock / "log2").read_text()

    second.send_signal(signal.SIGTERM)
    second.wait(60)
    assert second.returncode == 130
    assert "Traceback" not in (clock / "log1").read_text()


def test_a_server_of_its_own_stops_with_it(clock: Path, port: int, serve: Serve) -> None:
    (clock / "prefect.yaml").write_text(SCHEDULES.replace("interval: 4", "cron: '0 0 1 1 *'"))
    serving = serve()
    until(lambda: "Serving." in (clock / "log0").read_text())
    assert httpx.get(f"http://127.0.0.1:{port}/api/health").text == "true"
    serving.send_signal(signal.SIGINT)
    serving.wait(60)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/api/health")


def test_a_faulty_file_is_named_with_line_and_key(clock: Path) -> None:
    file = clock / "prefect.yaml"
    file.write_text(SCHEDULES.replace("interval: 4", "intervall: 4"))
    with pytest.raises(ConfigError, match=r"prefect\.yaml:4: .*intervall: unknown key.*'interval'"):
        read_deployments(file)
    file.write_text(SCHEDULES.replace("tick.py:tick", "tack.py:tick"))
    with pytest.raises(ConfigError, match=r"often: no flow could be loaded from 'tack\.py:tick'"):
        read_deployments(file)
