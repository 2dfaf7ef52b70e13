"""Tables of a made-up clinic, for all tests of pipelines and of scoring."""

from pathlib import Path

import numpy as np
import pandas as pd


def simulate(folder: Path, subjects: int = 900, seed: int = 0) -> None:
    """Three CSV tables: two tests, each of two thirds of the people, and the diseases they drive.

    Nothing else but the tests drives them, so a model of the first thousand holds for the next.
    """
    rng = np.random.default_rng(seed)
    person = np.arange(1000, 1000 + subjects)
    people = pd.DataFrame(
        {"person": person, "age": rng.integers(20, 90, subjects), "last_day": 2000}
    )
    labs, diagnoses = [], []
    for test, icd in (("glucose", "E11"), ("pressure", "I10")):
        level = rng.normal(100, 15, subjects)
        measured = rng.random(subjects) < 2 / 3
        for day in (-300, -20):
            result = level + rng.normal(0, 3, subjects)
            rows = {"person": person, "day": day, "test": test, "result": result.round(1)}
            labs.append(pd.DataFrame(rows)[measured])
        ill = rng.random(subjects) < 1 / (1 + np.exp(-(level - 110) / 5))
        rows = {"person": person, "day": rng.integers(1, 1000, subjects), "icd": icd}
        diagnoses.append(pd.DataFrame(rows)[ill])
    people.to_csv(folder / "people.csv", index=False)
    pd.concat(labs).to_csv(folder / "labs.csv", index=False)
    pd.concat(diagnoses).to_csv(folder / "diagnoses.csv", index=False)
