"""Time ingest against pandas and against a plain scan of the Parquet files, side by side.

From the same simulated OMOP tables to values and masks at 100 codes × 5 aggregates (last, mean,
min, max, count), each contender in a process of its own on the same cores, and all of its threads
and children counted. What they do differs:

- scan: DuckDB reads the four columns that are needed, once: no ingest can be faster
- group by: DuckDB makes the same aggregates of each subject and code, long and unordered, and keeps
  none: no checks, no cutting at the prediction time, no matrix
- pandas: read_parquet, cut at the prediction time, groupby and unstack, write values and masks;
  no checks, no quarantine, no labels, no splits, every event held in memory
- ehr-sn: `ehr_sn.ingest.store.ingest`, with all of those, hashes of sources and store, and as many
  shards at a time as there are cores, DuckDB held to 1 GB in each

Contenders take turns, and the fastest of `--repeats` counts, so other work on the machine disturbs
little; processor time, of all cores together, is disturbed less than the clock's. The rows that
pandas and ehr-sn arrive at are compared as well.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

CODES = 100
EVENTS_PER_SUBJECT = 212.9  # of measurements, as simulated below
AGGREGATES = ["last", "mean", "min", "max", "count"]
err = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--events",
        type=lambda text: int(float(text)),
        default=[10_000_000],
        nargs="+",
        metavar="N",
        help="how many measurements, such as 10e6; several to see how time and memory grow "
        "(default: 10e6)",
    )
    parser.add_argument(
        "--folder", type=Path, help="keep the simulated tables there, and find them again next time"
    )
    parser.add_argument("--cores", type=int, default=2, help="held to so many (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: 3)")
    parser.add_argument(
        "--pandas-up-to",
        type=lambda text: int(float(text)),
        default=20_000_000,
        metavar="N",
        help="leave pandas out beyond, where it does not fit (default: 20e6)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the timings there, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ehr-sn-benchmark-") as scratch:
        folder = args.folder or Path(scratch)
        results = [result for n in args.events for result in contest(n, folder, scratch, args)]
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def contest(n: int, folder: Path, scratch: str, args: argparse.Namespace) -> list[dict]:
    tables = simulated(n, folder)
    events = pq.read_metadata(tables / "measurement.parquet").num_rows
    contenders: dict[str, Callable] = {"scan": scan, "group by": group_by, "ehr-sn": ehr_sn}
    if n <= args.pandas_up_to:
        contenders["pandas"] = with_pandas
    best: dict[str, dict] = {}
    for _ in range(args.repeats):
        for name, contender in contenders.items():
            done = measured(contender, tables, Path(scratch) / "out", args.cores)
            done["peak_mb"] = max(done["peak_mb"], best.get(name, done)["peak_mb"])
            done["cpu"] = min(done["cpu"], best.get(name, done)["cpu"])
            if name not in best or done["seconds"] < best[name]["seconds"]:
                best[name] = done
            best[name] |= {key: done[key] for key in ("peak_mb", "cpu")}
    if "pandas" in best:
        np.testing.assert_allclose(best["pandas"]["content"], best["ehr-sn"]["content"], rtol=1e-6)
    show(best, events, args)
    return [{"events": events, "contender": name, **result} for name, result in best.items()]


def show(best: dict[str, dict], events: int, args: argparse.Namespace) -> None:
    table = Table(title=f"{events:,} events, {args.cores} cores, fastest of {args.repeats}")
    table.add_column("")
    for column in ("Seconds", "M events/s", "× pandas", "× scan", "CPU µs/event", "Peak memory"):
        table.add_column(column, justify="right")
    for name, result in best.items():
        ratios = [
            f"{best[other]['seconds'] / result['seconds']:.3g}" if other in best else ""
            for other in ("pandas", "scan")
        ]
        table.add_row(
            name,
            f"{result['seconds']:.2f}",
            f"{events / result['seconds'] / 1e6:.2f}",
            *ratios,
            f"{result['cpu'] / events * 1e6:.3f}",
            f"{result['peak_mb']:,.0f} MB",
        )
    Console().print(table)


def simulated(n: int, folder: Path) -> Path:
    """The tables with about n measurements, made unless they are there."""
    from ehr_sn.ingest.simulate import Simulation, simulate

    subjects = max(1, round(n / EVENTS_PER_SUBJECT))
    tables = folder / f"{subjects}-subjects"
    if not tables.exists():
        with Progress(console=err) as bar:
            task = bar.add_task(f"Simulating {n:,} events", total=subjects)
            simulation = Simulation(subjects=subjects, codes=CODES, visits=5)
            simulate(simulation, tables, progress=lambda done: bar.advance(task, done))
    return tables


def measured(contender: Callable, tables: Path, out: Path, cores: int) -> dict:
    """Seconds of clock and processors, peak memory and content of a run in a fresh process."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(contender, tables, out, cores, send))
    process.start()
    send.close()
    watched, peak = psutil.Process(process.pid), 0
    while not receive.poll(0.02):
        try:
            family = [watched, *watched.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in family))
        except psutil.NoSuchProcess:
            continue
    try:
        seconds, cpu = receive.recv()
        content = receive.recv()  # which takes memory of its own, after the peak was taken
    except EOFError:
        raise SystemExit(f"{contender.__name__} failed: see above") from None
    finally:
        process.join()
        shutil.rmtree(out)
    return {"seconds": seconds, "cpu": cpu, "peak_mb": peak / 2**20, "content": content}


def _run(contender: Callable, tables: Path, out: Path, cores: int, send) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    work, summary = contender(tables, out)
    begun, cpu = time.perf_counter(), _cpu()
    done = work()
    send.send((time.perf_counter() - begun, _cpu() - cpu))
    send.send(summary(done))


def _cpu() -> float:
    """Seconds of processors that this process and its finished children have taken."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


# Each contender imports what it needs, and returns the work to time and a summary of its outcome.


def scan(tables: Path, out: Path):
    import duckdb

    db = duckdb.connect()
    query = f"""SELECT max(person_id), max(measurement_datetime), max(measurement_concept_id),
        sum(value_as_number) FROM '{tables / "measurement.parquet"}'"""
    return lambda: db.execute(query).fetchall(), lambda done: None


def group_by(tables: Path, out: Path):
    import duckdb

    db = duckdb.connect()
    db.execute(f"SET memory_limit = '1GB'; SET temp_directory = '{out}'")
    query = f"""SELECT sum(value), sum(mean), min(low), max(high), sum(n) FROM (
        SELECT arg_max(value_as_number, measurement_datetime) AS value,
            avg(value_as_number) AS mean, min(value_as_number) AS low,
            max(value_as_number) AS high, count(*) AS n
        FROM '{tables / "measurement.parquet"}' GROUP BY person_id, measurement_concept_id)"""
    return lambda: db.execute(query).fetchall(), lambda done: None


def ehr_sn(tables: Path, out: Path):
    from ehr_sn.config import load_config
    from ehr_sn.ingest.simulate import FIRST_CONCEPT
    from ehr_sn.ingest.store import Store, ingest

    content = yaml.safe_load((Path(__file__).parents[1] / "configs" / "simulated.yaml").read_text())
    for name, table in content["tables"].items():
        if "path" in table:
            table["path"] = str((tables / f"{name}.parquet").absolute())
    content["features"]["measurements"] = {
        f"lab_{c + 1}": {"codes": [FIRST_CONCEPT + 1_001 + c]} for c in range(CODES)
    }
    content["features"] |= {"static": {}, "history": {}, "aggregates": AGGREGATES}
    content["data_dir"] = str(out)
    (out / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    config = load_config(out / "config.yaml")

    def summary(store: Path) -> list[float]:
        return _summary(Store(store).values())

    return lambda: ingest(config), summary


def with_pandas(tables: Path, out: Path):
    import pandas as pd

    def work():
        events = pd.read_parquet(
            tables / "measurement.parquet",
            columns=[
                "person_id",
                "measurement_datetime",
                "measurement_concept_id",
                "value_as_number",
            ],
        )
        cohort = pd.read_parquet(
            tables / "cohort.parquet", columns=["subject_id", "cohort_start_date"]
        )
        cohort["cohort_start_date"] = pd.to_datetime(cohort["cohort_start_date"])
        events = events.merge(cohort, left_on="person_id", right_on="subject_id")
        events = events[events["measurement_datetime"] <= events["cohort_start_date"]]
        events = events.sort_values("measurement_datetime")
        grouped = events.groupby(["person_id", "measurement_concept_id"])["value_as_number"]
        wide = grouped.agg(AGGREGATES).unstack("measurement_concept_id")
        values = wide.swaplevel(axis=1).sort_index(axis=1, level=0, sort_remaining=False)
        values = values.reindex(cohort["subject_id"]).astype("float32")
        values.columns = [f"{code}.{aggregate}" for code, aggregate in values.columns]
        values.to_parquet(out / "values.parquet")
        values.notna().to_parquet(out / "mask.parquet")
        return values

    return work, lambda values: _summary(values.to_numpy())


def _summary(values: np.ndarray) -> list[float]:
    """Columns in no order: how many are observed, and the sum of each aggregate over all codes."""
    by_aggregate = values.reshape(len(values), CODES, len(AGGREGATES))
    sums = np.nansum(by_aggregate, axis=(0, 1), dtype=float)
    return [float(np.isfinite(values).sum()), *sorted(sums.tolist())]


if __name__ == "__main__":
    main()
