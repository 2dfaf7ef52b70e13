"""Hold a stated load on the online service, and report how long single rows take to answer.

    python benchmarks/api.py --rate 50 --seconds 60

Five diseases, the features of `configs/simulated.yaml` (106), five seeds of 64 hidden units, one
row a request, over HTTP on this machine. Requests are sent at fixed times whether or not earlier
ones are answered, and timed from when they were due: a service that stalls cannot hide it.
"""

import argparse
import asyncio
import socket
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, sleep

import httpx
import numpy as np
import uvicorn

from ehr_sn.config import load_config
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models.train import Cell, train_cell
from ehr_sn.scoring.api import create_app
from ehr_sn.scoring.package import read_package, write_package
from ehr_sn.scoring.registry import Registered

COMPARISON = ("zero+mask", "standard", "mlp")


def make_champions(folder: Path, subjects: int) -> tuple[dict[str, Path], list[dict[str, float]]]:
    """Packages of a model trained briefly on made-up patients, and their rows."""
    simulate = ["simulate", "--subjects", str(subjects), "--to", str(folder / "tables")]
    command = "from ehr_sn.cli import main; main()"
    subprocess.run([sys.executable, "-c", command, *simulate], check=True, capture_output=True)
    text = (Path(__file__).parents[1] / "configs" / "simulated.yaml").read_text()
    path = folder / "simulated.yaml"
    path.write_text(text.replace("../data/simulated", "tables"))
    config = load_config(path)
    train = config.train.model_copy(update={"seeds": 5, "max_epochs": 2})
    config = config.model_copy(update={"train": train, "data_dir": folder / "data"})
    store = Store(ingest(config))
    train_cell(config, store, Cell(*COMPARISON, 0))
    packages = {
        disease: write_package(config, store, COMPARISON, disease, folder / disease)
        for disease in store.diseases
    }
    names = store.feature_names
    rows = [
        {name: float(x) for name, x in zip(names, row, strict=True) if not np.isnan(x)}
        for row in store.values()[:500]
    ]
    return packages, rows


def serve(packages: dict[str, Path], port: int) -> None:
    champions = {name: Registered(name, 1, read_package(path)) for name, path in packages.items()}
    uvicorn.run(create_app(champions), port=port, access_log=False, log_level="warning")


async def load(port: int, rows: list[dict[str, float]], rate: float, seconds: float) -> None:
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=30, trust_env=False
    ) as client:
        begin = perf_counter() + 0.1
        latencies: list[float] = []

        async def ask(i: int) -> None:
            due = begin + i / rate
            await asyncio.sleep(max(0, due - perf_counter()))
            answer = await client.post("/score", json={"rows": [rows[i % len(rows)]]})
            answer.raise_for_status()
            latencies.append(perf_counter() - due)

        await asyncio.gather(*(ask(i) for i in range(int(rate * seconds))))
        took = perf_counter() - begin
    p50, p95, p99 = 1000 * np.percentile(latencies, [50, 95, 99])
    print(
        f"{len(latencies):,} requests in {took:.1f} s ({rate:g} a second asked for): "
        f"p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms, "
        f"longest {1000 * max(latencies):.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rate", type=float, default=50, help="requests a second")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--subjects", type=int, default=4000, help="to train on")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        packages, rows = make_champions(Path(folder), arguments.subjects)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        service = get_context("spawn").Process(target=serve, args=(packages, port))
        service.start()
        try:
            for _ in range(200):
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                    break
                except httpx.ConnectError:
                    sleep(0.1)
            asyncio.run(load(port, rows, arguments.rate, arguments.seconds))
        finally:
            service.terminate()
            service.join()


if __name__ == "__main__":
    main()
