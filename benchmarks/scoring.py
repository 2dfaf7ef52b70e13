"""Time scoring against a plain read and write of the same rows, and against scikit-learn's trees.

One Parquet table of `--features` columns, a row a subject, 40 % of the entries missing, scored for
`--diseases` diseases by `--seeds` networks each. Each contender runs in a process of its own on the
same cores, and all of its threads are counted:

- read + write: Parquet is read and written again, in batches, by pyarrow: as fast as it can be
- ehr-sn: `ehr_sn.scoring.score.score`, Parquet to Parquet, with all checks, the hashes of the
  input and of what is written, the quarantine and the summary
- trees: HistGradientBoosting, one a disease, predicts the same rows: Parquet to Parquet, in
  batches, no checks

Contenders take turns, and the fastest of `--repeats` counts, so other work on the machine disturbs
little; the seconds of CPU are less disturbed still.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

BATCH_ROWS = 100_000
TRAINING_ROWS = 4_000
CONFIG = """\
dataset: scoring
tables: {{people: {{path: {table}}}}}
cohort: {{table: people, subject_id: subject_id, prediction_time: day}}
features: {{columns: {{people: [{features}]}}}}
labels: {{{labels}}}
train:
  seeds: {seeds}
  methods: {{standard: [{method}]}}
  max_epochs: 2
  architectures: {{mlp: {{hidden: [64]}}}}
data_dir: {data}
"""
err = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = {"type": lambda text: int(float(text)), "nargs": "+", "metavar": "N"}
    parser.add_argument("--rows", default=[1_000_000], help="such as 1e6 (default: 1e6)", **rows)
    parser.add_argument("--features", type=int, default=100, help="(default: 100)")
    parser.add_argument("--diseases", type=int, default=5, help="(default: 5)")
    parser.add_argument("--seeds", type=int, default=5, help="networks a disease (default: 5)")
    parser.add_argument("--method", default="zero", help="of missing entries (default: zero)")
    parser.add_argument("--cores", type=int, default=2, help="held to so many (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: 3)")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="leave out the others")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the timings there, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ehr-sn-benchmark-") as folder:
        models = in_a_process(train, args.cores, Path(folder), args)["result"]
        results = [result for n in args.rows for result in contest(n, Path(folder), models, args)]
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def contest(n: int, folder: Path, models: list[str], args: argparse.Namespace) -> list[dict]:
    path = folder / f"{n}.parquet"
    in_a_process(simulate, args.cores, path, n, args)
    best: dict[str, dict] = {}
    for _ in range(args.repeats):
        for name in args.only or CONTENDERS:
            told = in_a_process(CONTENDERS[name], args.cores, path, folder, models, args)
            shutil.rmtree(folder / "out")
            if name not in best or told["seconds"] < best[name]["seconds"]:
                best[name] = told
    path.unlink()
    table = Table(title=f"{n:,} rows × {args.features} features × {args.diseases} diseases")
    for column in ("", "seconds", "CPU seconds", "rows a second", "× read + write", "peak MB"):
        table.add_column(column, justify="right" if column else "left")
    least = best.get("read + write", {}).get("seconds", np.nan)
    for name, told in best.items():
        seconds = told["seconds"]
        table.add_row(
            name,
            f"{seconds:.1f}",
            f"{told['cpu_seconds']:.1f}",
            f"{n / seconds:,.0f}",
            f"{seconds / least:.1f}",
            f"{told['peak'] / 2**20:,.0f}",
        )
    Console().print(table)
    return [{"contender": name, "rows": n} | told for name, told in best.items()]


def in_a_process(work: Callable, cores: int, *args: object) -> dict:
    """What a function of its own process came to, its seconds, and the peak of its memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (work, cores, *args))


def measured(work: Callable, cores: int, *args: object) -> dict:
    # Before libraries count them: other numbers of threads would be another contest.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.cpu_count = lambda: cores
    process, done, peak = psutil.Process(), Event(), [0]

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss)

    prepared = work(*args)
    watcher = Thread(target=watch)
    watcher.start()
    before, started = process.cpu_times(), time.perf_counter()
    result = prepared() if callable(prepared) else prepared
    seconds, after = time.perf_counter() - started, process.cpu_times()
    done.set()
    watcher.join()
    cpu = after.user + after.system - before.user - before.system
    return {"seconds": seconds, "cpu_seconds": cpu, "peak": peak[0], "result": result}


def simulate(path: Path, n: int, args: argparse.Namespace, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    writer = None
    for start in range(0, n, BATCH_ROWS):
        rows = min(BATCH_ROWS, n - start)
        values = rng.standard_normal((args.features, rows), dtype=np.float32)
        values[rng.random(values.shape, dtype=np.float32) < 0.4] = np.nan
        table = pa.table(
            {
                "subject_id": np.arange(start, start + rows),
                "day": np.full(rows, np.datetime64("2026-01-01", "us")),
                **{f"x{i}": pa.array(x, from_pandas=True) for i, x in enumerate(values)},
                **outcomes(values, args.diseases),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()


def outcomes(values: np.ndarray, diseases: int) -> dict[str, np.ndarray]:
    known = np.nan_to_num(values)
    return {f"y{i}": (known[i] + known[i + 1] > 0).astype(np.int8) for i in range(diseases)}


def train(folder: Path, args: argparse.Namespace) -> list[str]:
    """Packages of all diseases, from a small table; and the trees."""
    import joblib
    from sklearn.ensemble import HistGradientBoostingClassifier

    from ehr_sn.config import load_config
    from ehr_sn.ingest.store import Store, ingest
    from ehr_sn.models.train import Cell, comparisons, train_cell
    from ehr_sn.scoring.package import write_package

    simulate(folder / "training.parquet", TRAINING_ROWS, args)
    labels = ", ".join(
        f"disease{i}: {{positive: y{i} == 1, negative: y{i} == 0}}" for i in range(args.diseases)
    )
    (folder / "scoring.yaml").write_text(
        CONFIG.format(
            table=folder / "training.parquet",
            features=", ".join(f"x{i}" for i in range(args.features)),
            labels=labels,
            seeds=args.seeds,
            method=args.method,
            data=folder / "data",
        )
    )
    config = load_config(folder / "scoring.yaml")
    store = Store(ingest(config))
    comparison = comparisons(config)[-1]
    train_cell(config, store, Cell(*comparison, 0))
    y = store.labels()
    for i in range(args.diseases):
        trees = HistGradientBoostingClassifier().fit(store.values(), y[:, i])
        joblib.dump(trees, folder / f"trees{i}.joblib")
    return [
        str(write_package(config, store, comparison, disease, folder / disease))
        for disease in config.labels
    ]


def read_and_write(path: Path, folder: Path, models: list[str], args: argparse.Namespace):
    def work() -> None:
        (folder / "out").mkdir()
        file = pq.ParquetFile(path)
        with pq.ParquetWriter(folder / "out" / "copy.parquet", file.schema_arrow) as writer:
            for batch in file.iter_batches(BATCH_ROWS):
                writer.write_batch(batch)

    return work


def ehr_sn(path: Path, folder: Path, models: list[str], args: argparse.Namespace):
    from ehr_sn.config import load_config
    from ehr_sn.scoring.package import read_package
    from ehr_sn.scoring.registry import Registered
    from ehr_sn.scoring.score import score, summary

    config = load_config(folder / "scoring.yaml")
    packages = [Registered(Path(model).name, 1, read_package(model)) for model in models]

    def work() -> int:
        made, _ = score(config, packages, folder / "out", path)
        return summary(made)["rows"]

    return work


def trees(path: Path, folder: Path, models: list[str], args: argparse.Namespace):
    import joblib

    fitted = [joblib.load(folder / f"trees{i}.joblib") for i in range(args.diseases)]
    names = [f"x{i}" for i in range(args.features)]

    def work() -> None:
        (folder / "out").mkdir()
        writer = None
        for batch in pq.ParquetFile(path).iter_batches(
            BATCH_ROWS, columns=["subject_id", "day", *names]
        ):
            values = np.stack([batch[name].to_numpy(zero_copy_only=False) for name in names], 1)
            for i, model in enumerate(fitted):
                table = pa.table(
                    {
                        "subject_id": batch["subject_id"],
                        "prediction_time": batch["day"],
                        "disease": pa.array([f"disease{i}"] * len(values)).dictionary_encode(),
                        "probability": model.predict_proba(values)[:, 1],
                    }
                )
                writer = writer or pq.ParquetWriter(folder / "out" / "s.parquet", table.schema)
                writer.write_table(table)
        writer.close()

    return work


CONTENDERS = {"read + write": read_and_write, "ehr-sn": ehr_sn, "trees": trees}

if __name__ == "__main__":
    main()
