"""MLflow, with users, and Prefect as a hospital runs them: servers of their own, on PostgreSQL."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import chown, rmtree
from socket import socket
from tempfile import mkdtemp

import httpx
import numpy as np
import pandas as pd
import pytest
from sqlalchemy import URL, create_engine, make_url, text

from ehr_sn.config import Promotion
from ehr_sn.errors import EhrSnError
from ehr_sn.models.train import NOTHING
from ehr_sn.scoring.registry import load, promote, register, rollback
from ehr_sn.scoring.score import score_with_champions

pytest.importorskip("psycopg2", reason="psycopg2 is absent")
PASSWORDS = {who: f"{who}-keeps-this-secret" for who in ("database", "admin", "ehr-sn", "reader")}
MLFLOW_USERS = "/api/2.0/mlflow/users/create"
AUTH = """\
[mlflow]
default_permission = READ
database_uri = sqlite:///basic_auth.db
auth_cache_ttl_seconds = 60
"""
HELLO = "from prefect import flow\n\n@flow\ndef hello():\n    pass\n\nhello()\n"


def make_database(server: URL, name: str) -> URL:
    """As docs/operations.md: a role, and a database that is its own; the URL for it."""
    password = PASSWORDS["database"]
    with create_engine(server, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'"))
        connection.execute(text(f"CREATE DATABASE {name} OWNER {name}"))
        connection.execute(text(f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC"))
    return server.set(username=name, password=password, database=name)


def written(url: URL) -> str:
    return url.render_as_string(hide_password=False)


@contextmanager
def running(folder: Path, health: str, environment: dict[str, str], *command: str) -> Iterator[str]:
    """A server of Python's module `command`, once its path `health` answers; its address."""
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    log = folder / "server.log"
    server = subprocess.Popen(
        [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)],
        cwd=folder,
        env=kept | {"DO_NOT_TRACK": "1"} | environment,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while not answers(address + health):
            assert server.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        server.wait(30)
    assert not [who for who, password in PASSWORDS.items() if password in log.read_text()]


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def mlflow_server(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow with basic auth and the users ehr-sn and reader; runs and models on PostgreSQL."""
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is absent")
    environment = {
        "MLFLOW_BACKEND_STORE_URI": written(make_database(make_url(postgres), "mlflow")),
        "MLFLOW_ARTIFACTS_DESTINATION": "artifacts",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the test",
        "MLFLOW_AUTH_CONFIG_PATH": "auth.ini",
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORDS["admin"],
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = ("mlflow", "server", "--app-name", "basic-auth", "--workers", "1")
    folder = tmp_path_factory.mktemp("mlflow")
    (folder / "auth.ini").write_text(AUTH)
    with running(folder, "/health", environment, *command) as address:
        for user in ("ehr-sn", "reader"):
            new = {"username": user, "password": PASSWORDS[user]}
            auth = ("admin", PASSWORDS["admin"])
            told = httpx.post(address + MLFLOW_USERS, json=new, auth=auth, timeout=60)
            assert told.is_success, told.text
        yield address


@pytest.fixture
def login(
    mlflow_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str, str], None]:
    """A function: from now on MLflow is asked by this user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)

    def login(user: str, password: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    return login


def test_models_are_registered_promoted_and_rolled_back_by_those_who_may(
    with_baselines, login, tmp_path: Path, postgres: str
) -> None:
    config, store, disease = with_baselines.config, with_baselines.store, "diabetes"
    lenient = config.model_copy(update={"promotion": Promotion(margin=0.3)})
    trees = (NOTHING, NOTHING, "hist_gradient_boosting")
    login("ehr-sn", PASSWORDS["ehr-sn"])
    assert register(config, store, trees, [disease]) == {disease: 1}
    assert promote(lenient, [disease])[disease].promoted
    folder, _ = score_with_champions(config, tmp_path / "scores", diseases=[disease])
    champion = load(config, disease).package
    assert champion.about["comparison"]["architecture"] == "hist_gradient_boosting"
    scores = pd.read_parquet(folder / "scores.parquet")
    np.testing.assert_array_equal(scores["probability"], champion.score(store.values()).probability)

    networks = with_baselines.comparison("zero+mask")
    assert register(config, store, networks, [disease]) == {disease: 2}
    assert promote(lenient, [disease])[disease].promoted
    other, _ = score_with_champions(config, tmp_path / "scores", diseases=[disease])
    assert other != folder
    assert rollback(config, disease) == (2, 1)
    assert score_with_champions(config, tmp_path / "scores", diseases=[disease]) == (folder, False)

    login("reader", PASSWORDS["reader"])
    assert load(config, disease).version == 1
    for user, password in (("reader", PASSWORDS["reader"]), ("ehr-sn", "guessed-" + "x" * 9)):
        login(user, password)
        with pytest.raises(EhrSnError, match="cannot be reached, or refuses") as told:
            register(config, store, trees, [disease])
        assert re.search("403|401|PERMISSION|authenticated", str(told.value))
        assert password not in str(told.value)
    for logged in (tmp_path / "scores").rglob("*.json"):
        assert not [p for p in PASSWORDS.values() if p in logged.read_text()]
    in_database = make_url(postgres).set(database="mlflow")
    with create_engine(in_database).connect() as connection:
        versions = connection.execute(
            text("SELECT name, version FROM model_versions ORDER BY 1, 2")
        )
        assert [tuple(row) for row in versions] == [
            ("ehr_sn.clinic.diabetes", 1),
            ("ehr_sn.clinic.diabetes", 2),
        ]


def test_nobody_unknown_is_let_in(mlflow_server: str) -> None:
    search = mlflow_server + "/api/2.0/mlflow/registered-models/search"
    assert httpx.get(search).status_code == 401
    assert httpx.get(search, auth=("ehr-sn", "a-wrong-password")).status_code == 401
    assert httpx.get(search, auth=("ehr-sn", PASSWORDS["ehr-sn"])).status_code == 200


@pytest.fixture(scope="module")
def system_postgres() -> Iterator[URL]:
    """A PostgreSQL server of the system's own programs, which asks for passwords.

    Prefect needs the extension pg_trgm, which the one of the fixture `postgres` lacks.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("the system has no PostgreSQL server")
    user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
    folder = Path(mkdtemp(prefix="pg-"))  # not pytest's, which only its owner may enter
    if user:
        chown(folder, user)

    def run(program: str, *arguments: str) -> None:
        command = [found[-1].with_name(program), "-D", folder / "data", *arguments]
        subprocess.run(command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL)

    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    password = folder / "password"
    password.write_text(PASSWORDS["admin"])
    try:
        password.chmod(0o644)
        run("initdb", "-U", "postgres", "--auth=scram-sha-256", f"--pwfile={password}")
        options = f"-k {folder} -p {port} -c listen_addresses=127.0.0.1 -c fsync=off"
        run("pg_ctl", "-w", "-o", options, "-l", str(folder / "log"), "start")
        yield URL.create(
            "postgresql", "postgres", PASSWORDS["admin"], "127.0.0.1", port, "postgres"
        )
        run("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        rmtree(folder)


def test_prefect_records_flow_runs_for_those_with_the_password(
    system_postgres: URL, tmp_path: Path
) -> None:
    database = make_database(system_postgres, "prefect")
    login = f"admin:{PASSWORDS['ehr-sn']}"
    home = {"PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    environment = home | {
        "PREFECT_API_DATABASE_CONNECTION_URL": written(
            database.set(drivername="postgresql+asyncpg")
        ),
        "PREFECT_SERVER_API_AUTH_STRING": login,
    }
    command = ("prefect", "server", "start", "--no-ui")
    with running(tmp_path, "/api/health", environment, *command) as address:
        assert httpx.post(f"{address}/api/flow_runs/filter", json={}).status_code == 401
        asked = os.environ | home | {"PREFECT_API_URL": f"{address}/api"}
        asked |= {"PREFECT_API_AUTH_STRING": login}
        told = subprocess.run(
            [sys.executable, "-c", HELLO], env=asked, capture_output=True, text=True, check=True
        )
        with create_engine(database).connect() as connection:
            runs = connection.execute(text("SELECT state_type FROM flow_run")).scalars().all()
    assert [str(state) for state in runs] == ["COMPLETED"]
    assert PASSWORDS["ehr-sn"] not in told.stdout + told.stderr
