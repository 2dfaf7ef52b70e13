"""Kill ingest and training at random moments, run them again, compare with an undisturbed run.

Each time one process ingests simulated tables, trains every cell and keeps a model, in a folder of
its own, and is killed (SIGKILL) after a random part of the time that the undisturbed run took; then
it runs to its end. Fails where a store, cell or model differs by a bit, or where a file under its
final name is not whole when the process is killed.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from safetensors import safe_open

TRAIN = """
import sys
from pathlib import Path
from ehr_sn.config import load_config
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models.train import Cell, comparisons, train_cell
from ehr_sn.scoring.package import write_package

config, out = load_config(sys.argv[1]), Path(sys.argv[2])
config = config.model_copy(update={"data_dir": out / "data"})
print("ready", flush=True)
store = Store(ingest(config))
for comparison in comparisons(config):
    for split in range(config.splits.repeats):
        train_cell(config, store, Cell(*comparison, split))
kept = out / "model"
if not kept.exists():
    write_package(config, store, comparisons(config)[0], store.diseases[0], kept)
"""
TRAINED = """\
train:
  seeds: 3
  methods: {standard: [zero, zero+mask, mice]}
  architectures: {mlp: {hidden: [32]}, mlp_dropout: {hidden: [32], dropout: 0.5}}
  baselines: [hist_gradient_boosting]
  max_epochs: 15
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="(default: 20)")
    parser.add_argument("--subjects", type=int, default=3000, help="(default: 3000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory(prefix="ehr-sn-killed-") as scratch:
        folder = Path(scratch)
        simulate = ["simulate", "--subjects", str(args.subjects), "--to", str(folder / "tables")]
        cli = "from ehr_sn.cli import main; main()"
        subprocess.run([sys.executable, "-c", cli, *simulate], check=True, capture_output=True)
        config = folder / "simulated.yaml"
        given = Path(__file__).parents[1] / "configs" / "simulated.yaml"
        text = given.read_text().partition("\ntrain:")[0]
        text = text.replace("../data/simulated", str(folder / "tables"))
        config.write_text(f"{text}\n{TRAINED}")
        seconds = run(config, folder / "whole")
        expected = contents(folder / "whole")
        resumed = 0
        for kill in range(args.kills):
            out = folder / f"killed_{kill}"
            run(config, out, kill_after=rng.uniform(0, seconds))
            left = contents(out)  # fails where a file under its final name cannot be read
            resumed += len(left) > 0
            if torn := [name for name in left if left[name] != expected.get(name)]:
                sys.exit(f"kill {kill}: not whole under its final name: {', '.join(torn)}")
            run(config, out)
            found = contents(out)
            if found != expected:
                names = sorted(found.keys() | expected.keys())
                other = [name for name in names if found.get(name) != expected.get(name)]
                sys.exit(f"kill {kill}: other than undisturbed: {', '.join(other)}")
    Console().print(
        f"{args.kills} kills within {seconds:.1f} s: every store, cell and model as undisturbed; "
        f"{resumed} went on from what was finished"
    )


def run(config: Path, out: Path, kill_after: float = 600) -> float:
    """Seconds from the start of the ingest to the end."""
    command = [sys.executable, "-c", TRAIN, str(config), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        started = time.perf_counter()
        try:
            if process.wait(kill_after):
                sys.exit(process.stderr.read().decode())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
    return time.perf_counter() - started


def contents(out: Path) -> dict[str, object]:
    """Every file with a final name: its bytes, or of a cell the tensors, which tell no seconds."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if not path.is_file() or hidden or path.name == "manifest.json":
            continue
        if path.suffix == ".safetensors" and path.parent.name in ("cells", "imputers"):
            with safe_open(path, framework="np") as file:
                tensors = {key: file.get_tensor(key).tobytes() for key in sorted(file.keys())}
            found[name] = tensors
        else:
            found[name] = path.read_bytes()
    return found


if __name__ == "__main__":
    main()
