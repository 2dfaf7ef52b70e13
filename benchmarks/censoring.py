"""How far from the truth are risks and AUROCs where patients leave before a window ends?

Of simulated patients the outcomes are known also where they left or died. They are ingested with
each way of handling those who leave (`labels.DISEASE.censoring`), and a model is trained: gradient
boosting, one split, calibrated on tuning rows. On held-out patients at risk, the mean over
diseases of

- risk: the mean calibrated probability over the share who fell ill, 1 if right;
- AUROC: what is reported, from those who stayed, less that of the same predictions among all.

    python benchmarks/censoring.py [--subjects 40000] [--picture docs/censoring.svg]
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ehr_sn.config import load_config
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.ingest.simulate import Simulation, simulate
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models.predict import load_predictor, read_tuning
from ehr_sn.models.train import NOTHING, Cell, read_cell, train_cell
from ehr_sn.scoring.calibrate import CalibrationMap

CONFIG = Path(__file__).parents[1] / "configs" / "simulated.yaml"
WORLDS = {
    "nobody leaves": {},
    "at random": {"leaving": 0.12},
    "the older leave": {"leaving": 0.08, "leaving_by_age": 0.7},
    "the older leave and die": {"leaving": 0.08, "leaving_by_age": 0.7, "deaths": 0.01},
}
WAYS = {
    "drop": {"censoring": "drop"},
    "complete": {"censoring": "complete"},
    "ipcw": {"censoring": "ipcw"},
    "ipcw by age": {"censoring": "ipcw", "censoring_by": ["age"]},
}
CELL = Cell(NOTHING, NOTHING, "hist_gradient_boosting", 0)


def configured(folder, way):
    """The shipped configuration on the tables in a folder, with one way and one model."""
    text = CONFIG.read_text().replace("../data/simulated", str(folder / "tables"))
    content = yaml.safe_load(text)
    content["data_dir"] = str(folder / "stores")
    for label in content["labels"].values():
        label |= WAYS[way]
    content["train"] = {"seeds": 1, "methods": {"standard": ["zero"]},
                        "architectures": {"mlp": {}}, "baselines": [CELL.architecture]}  # fmt: skip
    path = folder / f"{way.replace(' ', '_')}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_config(path)


def judged(config, truth):
    """For each disease the mean prediction over the true rate, and the error of the AUROC."""
    store = Store(ingest(config))
    held_out = read_cell(train_cell(config, store, CELL), store).held_out
    rows = store.splits()[:, 0] == "held_out"
    who = store.read("values", ["subject_id"])["subject_id"].to_pandas()[rows]
    risk = load_predictor(config, store, CELL)(store.values()[rows])[:, 0]
    known = truth.loc[who]
    found = []
    for i, (disease, tuning) in enumerate(read_tuning(config, store, CELL).items()):
        at_risk = known[f"at_risk_{disease}"].to_numpy()
        ill = known[f"outcome_{disease}"].to_numpy()[at_risk]
        calibrate = CalibrationMap.fit(tuning.y, tuning.ensemble, tuning.weight)
        mine = held_out[disease]
        reported = auroc(mine.y, mine.ensemble, mine.weight)
        whole = auroc(ill, risk[i][at_risk])
        found.append((calibrate(risk[i][at_risk]).mean() / ill.mean(), reported - whole))
    return np.array(found)


def truth_of(folder):
    """Each subject's outcomes, and of whom they are asked: those without an earlier record."""
    truth = pd.read_parquet(folder / "tables" / "truth.parquet").set_index("person_id")
    diseases = [name.removeprefix("outcome_") for name in truth if name.startswith("outcome_")]
    return truth.assign(**{f"at_risk_{name}": True for name in diseases})


def drawn(table, path):
    """A picture of the calibrated risks."""
    figure = Figure(figsize=(7, 3.2))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.16, 0.6, 0.72))
    for i, way in enumerate(WAYS):
        ratio = [table[world][way][:, 0].mean() for world in WORLDS]
        axes.plot(range(len(WORLDS)), ratio, "os^D"[i], label=way, color=f"C{i}", markersize=8)
    axes.axhline(1, color="#8a8a8a", linewidth=0.8)
    axes.set_xticks(range(len(WORLDS)), [w.replace(" and", "\nand") for w in WORLDS], fontsize=8)
    axes.set_ylabel("predicted ÷ true risk")
    axes.set_title("Mean predicted risk where patients leave", loc="left", fontsize=10)
    axes.legend(title="censoring", frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--subjects", type=int, default=40_000)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    table = {}
    print(f"{args.subjects:,} subjects: predicted / true risk, error of the AUROC")
    print(f"{'who leaves':26}" + "".join(f"{way:>18}" for way in WAYS))
    for world, leaving in WORLDS.items():
        with TemporaryDirectory() as name:
            folder = Path(name)
            simulate(Simulation(subjects=args.subjects, **leaving), folder / "tables", "parquet")
            truth = truth_of(folder)
            table[world] = {way: judged(configured(folder, way), truth) for way in WAYS}
        cells = [table[world][way].mean(axis=0) for way in WAYS]
        print(f"{world:26}" + "".join(f"{risk:10.3f} {area:+.4f}" for risk, area in cells))
    if args.picture:
        drawn(table, args.picture)


if __name__ == "__main__":
    main()
