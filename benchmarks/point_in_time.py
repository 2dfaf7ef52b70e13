"""What NAFLD looks like if features may know what came after the diagnosis, and where they may not.

The cohort as of day 0, a year after fatty liver was found, and as of 30 days before that (day -395,
as configs/nafld.yaml has it), each with and without the body mass index, which has no date. AUROC
of the seed-averaged prediction on held-out rows, mean over splits. Stores and cells are kept in the
data folder.

    python benchmarks/point_in_time.py
"""

import argparse

import numpy as np

from ehr_sn.config import Config, load_config
from ehr_sn.evaluate.metrics import auroc
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models.train import NOTHING, Cell, read_cell, train_cell

MODELS = {
    "`zero`, MLP+dropout": ("zero", "standard", "mlp_dropout"),
    "`zero+mask`, MLP+dropout": ("zero+mask", "standard", "mlp_dropout"),
    "`zero+mask`, recipe": ("zero+mask", "quantile", "recipe"),
    "trees": (NOTHING, NOTHING, "hist_gradient_boosting"),
}


def variant(day: float, with_bmi: bool) -> Config:
    """configs/nafld.yaml with another prediction time, and maybe with what has no date."""
    config = load_config("configs/nafld.yaml")
    features = config.features
    if with_bmi:
        bmi = features.static["age"].model_copy(
            update={"column": ("bmi",), "plausible": (12.0, 80.0)}
        )
        features = features.model_copy(update={"static": features.static | {"bmi": bmi}})
    cohort = config.cohort.model_copy(
        update={"prediction_time": day, "include_prediction_time": day != 0}
    )
    labels = dict(config.labels)
    if day == 0:
        at_day_0 = {"within_days": None, "prevalent": True}
        labels["fatty_liver"] = labels["fatty_liver"].model_copy(update=at_day_0)
    return config.model_copy(update={"cohort": cohort, "features": features, "labels": labels})


def main() -> None:
    """Read the command line and run."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    diseases = load_config("configs/nafld.yaml").labels
    print(f"| as of | body mass index | | mean | {' | '.join(diseases)} |")
    print("|---" * (len(diseases) + 4) + "|")
    for day in (0.0, -395.0):
        for with_bmi in (True, False):
            config = variant(day, with_bmi)
            store = Store(ingest(config))
            for name, comparison in MODELS.items():
                found = []
                for split in range(config.splits.repeats):
                    path = train_cell(config, store, Cell(*comparison, split))
                    held_out = read_cell(path, store).held_out.values()
                    found.append([auroc(rows.y, rows.ensemble, rows.weight) for rows in held_out])
                areas = np.mean(found, axis=0)
                told = " | ".join(f"{area:.3f}" for area in areas)
                bmi = "with" if with_bmi else "without"
                print(f"| day {day:g} | {bmi} | {name} | {areas.mean():.4f} | {told} |", flush=True)


if __name__ == "__main__":
    main()
