"""Trained predictor + tuning rows → which measurements its predictions rest on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray

from ehr_sn.evaluate.metrics import auroc
from ehr_sn.ingest.store import Store
from ehr_sn.models.predict import NetworkPredictor, Predict
from ehr_sn.models.weights import Weights, taken, weights

REPEATS = 3
ROWS = 2000
"""Tuning rows at most; more would sharpen little and take long."""
STEPS = 32


@dataclass(frozen=True)
class Importance:
    """How much one measurement, with all its aggregates, matters for one disease.

    `drop` is the loss of AUROC when its entries, and their absence, are shuffled among subjects.
    """

    measurement: str
    drop: float
    sd: float


def permutation_importance(
    predict: Predict, store: Store, split: int = 0, *, seed: int = 0
) -> dict[str, list[Importance]]:
    """Return each disease's measurements, the most important first, judged on tuning rows.

    All aggregates of a measurement are shuffled together: each alone would be made up for by the
    others. The prediction is the seed-averaged one, the sd that of three shuffles (L. Breiman,
    Machine Learning 45:5, 2001; A. Fisher et al., JMLR 20:177, 2019). Diseases that lack a class
    among the rows are left out.
    """
    rng = np.random.default_rng(seed)
    values, labels, weight = _tuning(store, split, rng)
    owner = np.array(store.measurements)
    whole = _aurocs(predict(values), labels, weight)
    names = list(dict.fromkeys(store.measurements))
    drops = np.empty((len(names), REPEATS, labels.shape[1]))
    for i, name in enumerate(names):
        for repeat in range(REPEATS):
            shuffled = values.copy()
            mine = owner == name
            shuffled[:, mine] = values[rng.permutation(len(values))][:, mine]
            drops[i, repeat] = whole - _aurocs(predict(shuffled), labels, weight)
    mean, sd = drops.mean(axis=1), drops.std(axis=1, ddof=1)
    return {
        disease: sorted(
            (Importance(name, *map(float, pair)) for name, *pair in zip(names, m, s, strict=True)),
            key=lambda importance: -importance.drop,
        )
        for disease, m, s in zip(store.diseases, mean.T, sd.T, strict=True)
        if not np.isnan(m).any()
    }


def integrated_gradients(
    predictor: NetworkPredictor, store: Store, split: int = 0, *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return the mean |attribution| to the logit by disease and measurement, on tuning rows.

    M. Sundararajan, A. Taly, Q. Yan, ICML 2017 (arXiv 1703.01365), by the package captum, along
    the straight line from the method's output for a row with nothing observed. Averaged over seeds.

    Raises
    ------
    ModuleNotFoundError
        captum is not installed: `pip install ehr-sn[explain]`.
    """
    from captum.attr import IntegratedGradients

    values, *_ = _tuning(store, split, np.random.default_rng(seed))
    x = torch.from_numpy(predictor.method.transform(values))
    empty = np.full((1, values.shape[1]), np.nan, dtype=np.float32)
    baseline = torch.from_numpy(predictor.method.transform(empty))
    owners = _owners(predictor, store)
    network, found = predictor.network, {}
    for i, disease in enumerate(store.diseases):

        def logit(rows: torch.Tensor, i: int = i) -> torch.Tensor:
            return network(rows).reshape(predictor.diseases, -1, len(rows))[i].mean(0)

        attributed = IntegratedGradients(logit).attribute(
            x, baseline, n_steps=STEPS, internal_batch_size=ROWS
        )
        found[disease] = {
            name: float(attributed[:, owners == name].sum(1).abs().mean())
            for name in dict.fromkeys(store.measurements)
        }
    return found


def can_explain() -> bool:
    """Whether captum is installed."""
    return find_spec("captum") is not None


def _owners(predictor: NetworkPredictor, store: Store) -> NDArray[np.str_]:
    """The measurement from which each of the network's inputs stems; of the count of all, none."""
    return np.array([*store.measurements, ""])[predictor.method[-1].sources()]


def _tuning(
    store: Store, split: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32], list[Weights]]:
    """Values, labels and weights of tuning rows."""
    rows = np.flatnonzero(store.splits()[:, split] == "tuning")
    if len(rows) > ROWS:
        rows = np.sort(rng.choice(rows, ROWS, replace=False))
    weight = [taken(of_disease, rows) for of_disease in weights(store, split)]
    return store.values()[rows], store.labels()[rows], weight


def _aurocs(
    probability: NDArray[np.float32],
    labels: NDArray[np.float32],
    weight: Sequence[Weights],
) -> NDArray[np.float64]:
    """(diseases,) of the seed-averaged prediction; NaN where a class is absent."""
    areas = np.full(labels.shape[1], np.nan)
    for i, p in enumerate(probability.mean(axis=1)):
        y = labels[:, i]
        eligible = ~np.isnan(y)
        if 0 < y[eligible].sum() < eligible.sum():
            areas[i] = auroc(y[eligible], p[eligible], taken(weight[i], eligible))
    return areas
