"""prefect.yaml → its deployments, run on their schedules until stopped.

Prefect's ephemeral server never fires a schedule. Where no API URL is configured, a real server is
started here, on SQLite, and stopped at the end.
"""

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self
from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import ConcurrencyLimitConfig, FlowRun, StateType
from prefect.client.schemas.schedules import construct_schedule
from prefect.deployments.runner import RunnerDeployment
from prefect.runner import Runner
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Crashed
from prefect.types._datetime import now
from pydantic import model_validator

from ehr_sn.config import Name, StrictModel, read_yaml
from ehr_sn.errors import ConfigError, EhrSnError
from ehr_sn.ports import require_free

PORT = 4200
STARTS_WITHIN = 120  # seconds that a server may take on a busy machine
STOPS_WITHIN = 30
PAGE = 200  # flow runs that the server tells of at a time


class Schedule(StrictModel):
    """When: as cron has it, or every so many seconds."""

    cron: str | None = None
    interval: timedelta | None = None
    timezone: str = "UTC"

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.cron is None) == (self.interval is None):
            raise ValueError("give exactly one of: cron, interval")
        construct_schedule(**self.model_dump())
        return self


class Limit(StrictModel):
    """How many runs of a deployment at a time, and what becomes of one more."""

    limit: int = 1
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = "CANCEL_NEW"


class Deployment(StrictModel):
    """A flow (`FILE.py:FUNCTION`), its parameters, and when it runs."""

    name: Name
    entrypoint: str
    description: str = ""
    parameters: dict[str, Any] = {}
    schedules: tuple[Schedule, ...] = ()
    concurrency_limit: Limit = Limit()
    tags: tuple[str, ...] = ()
    work_pool: dict[str, Any] = {}  # only of interest to `prefect deploy`


class Deployments(StrictModel):
    """What of a prefect.yaml is used here. `prefect deploy --all` reads the same file."""

    name: str = ""
    pull: list[dict[str, Any]] = []
    deployments: tuple[Deployment, ...]


def read_deployments(file: Path) -> list[RunnerDeployment]:
    """The deployments of a prefect.yaml.

    Raises
    ------
    ConfigError
        Naming file, line and key of every fault, and the nearest valid name.
    """
    made = []
    for one in read_yaml(file, Deployments)[0].deployments:
        limit = ConcurrencyLimitConfig(**one.concurrency_limit.model_dump())
        schedules = [construct_schedule(**schedule.model_dump()) for schedule in one.schedules]
        try:
            deployment = RunnerDeployment.from_entrypoint(
                one.entrypoint,
                one.name,
                schedules=schedules,
                concurrency_limit=limit,
                parameters=one.parameters,
                description=one.description,
                tags=list(one.tags),
            )
        except (OSError, ImportError, AttributeError, ValueError) as error:
            kind = type(error).__name__
            raise ConfigError(
                f"{file}: deployment {one.name}: no flow could be loaded from {one.entrypoint!r} "
                f"({kind}); give FILE.py:FUNCTION, from the folder of {file.name}"
            ) from error
        made.append(deployment)
    return made


def serve(file: Path, port: int = PORT, say: Callable[[str], None] = print) -> None:
    """Run a file's deployments on their schedules, until interrupted.

    What a killed `serve` left running is marked as crashed, so that it holds up no further run, and
    of the runs that a deployment has missed only the newest is made up for. Both are safe: a flow
    finds what is finished, and goes on from there.

    Parameters
    ----------
    port : of the server that is started where no API URL is configured

    Raises
    ------
    ConfigError
        The file cannot be used.
    EhrSnError
        It is being served already, the port is in use, or the server does not start.
    """
    file = file.resolve()
    os.chdir(file.parent)  # its paths are meant from there
    with _alone(file), _api(port, say) as url:
        deployments = read_deployments(file)
        runner = _Runner(name=f"ehr-sn {file.parent.name}", limit=None, pause_on_shutdown=False)
        ids = {runner.add_deployment(deployment): deployment.name for deployment in deployments}
        with get_client(sync_client=True) as client:
            for told in recover(client, ids):
                say(told)
        for deployment in deployments:
            when = ", ".join(_when(schedule.schedule) for schedule in deployment.schedules or ())
            say(f"{deployment.flow_name}/{deployment.name}: {when or 'when asked for'}")
        say(f"Serving. Runs and logs: {url.removesuffix('/api')}  (Ctrl-C ends it)")
        asyncio.run(runner.start())


class _Runner(Runner):
    """Stops for SIGTERM as it does for Ctrl-C."""

    def handle_sigterm(self, *_: Any) -> None:
        signal.raise_signal(signal.SIGINT)


def recover(client: SyncPrefectClient, deployments: dict[UUID, str]) -> list[str]:
    """Clear what nobody runs any more, and all but the newest of what was missed; tells of it."""
    told = []
    for deployment, name in deployments.items():
        left = _runs(client, deployment, StateType.RUNNING, StateType.PENDING, StateType.CANCELLING)
        missed = [
            run
            for run in _runs(client, deployment, StateType.SCHEDULED)
            if run.next_scheduled_start_time and run.next_scheduled_start_time < now("UTC")
        ]
        missed.sort(key=lambda run: run.next_scheduled_start_time)
        ended = _end({str(run.id) for run in left})
        gone = Crashed(message="The process that ran it is gone. The next run goes on from there.")
        later = Cancelled(message="Nobody served it in time; a later run does its work.")
        for runs, state, what in (
            (left, gone, "left by a process that is gone: crashed"),
            (missed[:-1], later, "missed and superseded: cancelled"),
        ):
            for run in runs:
                client.set_flow_run_state(run.id, state)
            if runs:
                told.append(f"{name}: {len(runs)} {what}")
        if ended:
            told.append(f"{name}: {ended} still ran by itself: ended")
        if missed:
            told.append(f"{name}: the newest of {len(missed)} missed is made up for")
    return told


def _end(runs: set[str]) -> int:
    """End processes of these runs that outlived the `serve` that started them; how many."""
    orphans = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("PREFECT__FLOW_RUN_ID") in runs:
                process.terminate()
                orphans.append(process)
    for process in psutil.wait_procs(orphans, timeout=10)[1]:
        process.kill()
    return len(orphans)


def _runs(client: SyncPrefectClient, deployment: UUID, *types: StateType) -> list[FlowRun]:
    wanted = filters.FlowRunFilter(
        deployment_id=filters.FlowRunFilterDeploymentId(any_=[deployment]),
        state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=list(types))),
    )
    runs: list[FlowRun] = []
    while page := client.read_flow_runs(flow_run_filter=wanted, limit=PAGE, offset=len(runs)):
        runs += page
    return runs


def _when(schedule: Any) -> str:
    if hasattr(schedule, "cron"):
        return f"{schedule.cron} ({schedule.timezone or 'UTC'})"
    return f"every {schedule.interval}"


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Keep a second process from serving the same file: it would take this one's runs for dead."""
    with file.open() as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EhrSnError(f"{file}: is being served by another process already") from None
        yield


@contextmanager
def _api(port: int, say: Callable[[str], None]) -> Iterator[str]:
    """The API's URL: as configured, of the server at that port, or of one that runs meanwhile."""
    if configured := PREFECT_API_URL.value():
        yield configured
        return
    url = f"http://127.0.0.1:{port}/api"
    if _answers(url):  # also that of a `serve` that was killed
        with _use(url):
            yield url
        return
    require_free("127.0.0.1", port)
    say("Starting a Prefect server …")
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us: the server goes last
    )
    try:
        until = time.monotonic() + STARTS_WITHIN
        while not _answers(url):
            if server.poll() is not None or time.monotonic() > until:
                raise EhrSnError(
                    f"no Prefect server could be started at port {port}: choose another --port, or "
                    f"see what `prefect server start --port {port}` says"
                )
            time.sleep(0.5)
        with _use(url):
            yield url
    finally:
        server.terminate()
        try:
            server.wait(STOPS_WITHIN)
        except subprocess.TimeoutExpired:
            server.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).text == "true"
    except httpx.HTTPError:
        return False


@contextmanager
def _use(url: str) -> Iterator[None]:
    """Have this process, and the runs that it starts, use that API."""
    os.environ["PREFECT_API_URL"] = url  # runs are processes of their own
    try:
        with temporary_settings({PREFECT_API_URL: url}):
            yield
    finally:
        del os.environ["PREFECT_API_URL"]
