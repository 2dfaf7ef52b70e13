"""Kill scoring at random moments, run it again, and compare what it leaves with an undisturbed run.

Each time one process scores the same table into a folder of its own and is killed (SIGKILL) after a
random part of the time that the undisturbed run took; then it runs to its end. Fails where a file
is visible under its final name before all are, where anything but `scored_at` differs, or where
anything else is left behind.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from scoring import in_a_process, simulate, train

SCORE = """
import sys
from pathlib import Path
from ehr_sn.config import load_config
from ehr_sn.scoring.package import read_package
from ehr_sn.scoring.registry import Registered
from ehr_sn.scoring.score import score

config, table, output, rows, *folders = sys.argv[1:]
models = [Registered(Path(folder).name, 1, read_package(folder)) for folder in folders]
print("ready", flush=True)
score(load_config(config), models, Path(output), table, shard_rows=int(rows))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="(default: 20)")
    parser.add_argument("--rows", type=int, default=60_000, help="(default: 60000)")
    parser.add_argument("--shard-rows", type=int, default=4_000, help="(default: 4000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    args.features, args.diseases, args.seeds, args.method = 20, 2, 2, "zero"
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory(prefix="ehr-sn-killed-") as scratch:
        folder = Path(scratch)
        models = in_a_process(train, 2, folder, args)["result"]
        simulate(folder / "rows.parquet", args.rows, args, seed=1)
        seconds = run(folder, "whole", models, args)
        expected = contents(folder / "whole")
        resumed = 0
        for kill in range(args.kills):
            out = f"killed_{kill}"
            run(folder, out, models, args, kill_after=rng.uniform(0, seconds))
            finished = [path for path in (folder / out).glob("*") if path.name[0] != "."]
            if any(not (path / "summary.json").exists() for path in finished):
                sys.exit(f"kill {kill}: part of the scores was visible under its final name")
            resumed += bool(list((folder / out).glob(".work-*/shards/*.json")))
            run(folder, out, models, args)
            if contents(folder / out) != expected:
                sys.exit(f"kill {kill}: what was left differs from the undisturbed run")
    Console().print(
        f"{args.kills} kills within {seconds:.1f} s: every folder as undisturbed; "
        f"{resumed} went on from finished shards"
    )


def run(
    folder: Path, out: str, models: list[str], args: argparse.Namespace, kill_after: float = 600
) -> float:
    """Seconds from the start of scoring to its end."""
    paths = [folder / "scoring.yaml", folder / "rows.parquet", folder / out]
    command = [sys.executable, "-c", SCORE, *map(str, paths), str(args.shard_rows), *models]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        started = time.perf_counter()
        try:
            if process.wait(kill_after):
                sys.exit("scoring failed")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
    return time.perf_counter() - started


def contents(out: Path) -> dict[str, object]:
    """Every file below, by its name: its bytes, or a table without the moment of scoring."""
    return {
        str(path.relative_to(out)): pq.read_table(path).drop_columns("scored_at")
        if path.parent.name == "scores"
        else path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "summary.json"
    }


if __name__ == "__main__":
    main()
