"""Shards and cells come to the same bytes wherever they run, and a lost worker costs a retry."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from flows.ingest import ingest
from flows.pipeline import pipeline
from flows.tasks import task_runner

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from prefect.client.orchestration import get_client

from ehr_sn import tracking
from ehr_sn.config import DATA_ROOT, METHODS, load_config
from ehr_sn.errors import ConfigError
from ehr_sn.ingest import shards
from ehr_sn.ingest.store import Store
from ehr_sn.models import train as training

ROWS = 500  # a shard


def with_runner(config: Path, runner: str) -> str:
    """The configuration with another runner and data folder, beside the first."""
    other = config.with_name(f"other{len(list(config.parent.glob('*.yaml')))}.yaml")
    other.write_text(f"{config.read_text()}runner: {runner}\ndata_dir: {other.stem}\n")
    return str(other)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", ROWS)


def kill_one_when(ready: Path, pids: list[int]) -> None:
    while len(list(ready.glob("clinic/.work-*/shards/*.json"))) < 3:
        time.sleep(0.02)
    os.kill(pids[0], signal.SIGKILL)


def test_a_dask_cluster_that_loses_a_worker_makes_the_same_store(
    clinic: Path, small_shards: None
) -> None:
    distributed = pytest.importorskip("distributed")
    here = Store(Path(ingest(str(clinic))))
    assert len(list((here.path / "values").iterdir())) > 6
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        config = with_runner(clinic, f"{{kind: dask, address: '{cluster.scheduler_address}'}}")
        with distributed.Client(cluster) as client:
            pids = list(client.run(os.getpid).values())
        killer = threading.Thread(
            target=kill_one_when, args=(Path(Path(config).stem), pids), daemon=True
        )
        killer.start()
        there = Store(Path(ingest(config)))
        killer.join(timeout=10)
    assert not killer.is_alive()
    assert there.path != here.path
    assert there.manifest["files"] == here.manifest["files"]
    assert [path.name for path in there.path.parent.iterdir()] == [there.fingerprint]


def test_workers_need_no_database_and_know_of_this_process_s_settings(
    small_clinic: Path, small_shards: None, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed")
    from adbc_driver_postgresql import dbapi

    here = Store(Path(ingest(str(small_clinic))))
    with dbapi.connect(postgres, autocommit=True) as connection, connection.cursor() as cursor:
        labs = pa.table(pd.read_csv(small_clinic.with_name("labs.csv")))
        cursor.adbc_ingest("clinic_labs", labs, mode="replace")
    moved = small_clinic.with_name("moved")
    moved.mkdir()
    for table in ("people", "diagnoses"):
        small_clinic.with_name(f"{table}.csv").rename(moved / f"{table}.csv")
    in_database = "{database: pg, table: clinic_labs}\n"
    text = small_clinic.read_text().replace("{path: labs.csv}\n", in_database)
    small_clinic.write_text(text + "databases: {pg: {url_env: PG}}\n")
    monkeypatch.setenv(METHODS, "of another process")  # so the workers' own environment has it
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        monkeypatch.setenv("PG", postgres)
        monkeypatch.setenv(DATA_ROOT, str(moved))
        monkeypatch.setenv(METHODS, "zero")
        config = with_runner(
            small_clinic, f"{{kind: dask, address: '{cluster.scheduler_address}'}}"
        )
        parent = tracking.finished_run(load_config(config), pipeline(config))
        there = Store(Path(ingest(config)))
    assert {result["method"] for result in parent.results()} == {"zero"}
    assert len(list((there.path / "values").iterdir())) > 6
    np.testing.assert_array_equal(here.values(), there.values())
    assert [path.name for path in there.path.parent.glob(".*")] == []
    with get_client(sync_client=True) as client:
        runs = [*client.read_flow_runs(), *client.read_task_runs()]
    assert runs
    assert not [run for run in runs if postgres in run.model_dump_json()]


def test_processes_make_the_same_store_and_the_same_networks(
    small_clinic: Path, small_shards: None
) -> None:
    config = with_runner(small_clinic, "{kind: processes, workers: 2}")
    pipeline(str(small_clinic))
    pipeline(config, force=True)
    stores = [Store(Path(ingest(path))) for path in (str(small_clinic), config)]
    assert stores[0].manifest["files"] == stores[1].manifest["files"]
    for method in ("zero", "zero+mask"):
        cell = training.Cell(method, "standard", "mlp", 0)
        paths = [training.cell_path(load_config(small_clinic), store, cell) for store in stores]
        one, other = (training.read_cell(path, stores[0]).held_out for path in paths)
        for disease in one:
            np.testing.assert_array_equal(one[disease].probability, other[disease].probability)


def test_without_prefect_dask_the_error_says_what_to_install(
    clinic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    config = load_config(with_runner(clinic, "{kind: dask}"))
    with pytest.raises(ConfigError, match=r"runner.kind: dask needs .* 'ehr-sn\[dask\]'"):
        task_runner(config)
