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
import pytest

from ehr_sn.config import load_config
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


def test_processes_make_the_same_store_and_the_same_networks(
    clinic: Path, small_shards: None
) -> None:
    few = "[sparsity_normalization, zero, zero+mask]"
    clinic.write_text(clinic.read_text().replace(few, "[zero]").replace("repeats: 2", "repeats: 1"))
    config = with_runner(clinic, "{kind: processes, workers: 2}")
    pipeline(str(clinic))
    pipeline(config, force=True)
    stores = [Store(Path(ingest(path))) for path in (str(clinic), config)]
    assert stores[0].manifest["files"] == stores[1].manifest["files"]
    for architecture in ("mlp", "mlp_dropout"):
        cell = training.Cell("zero", "standard", architecture, 0)
        paths = [training.cell_path(load_config(clinic), store, cell) for store in stores]
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
