"""MovieLens ratings → RMSE of neural collaborative filtering without and with SN.

Models are autoencoders of sparse rows (`autoencoder`): AutoRec of items and of users, and a deep
one of items. A cell is one model on one random split. In it each variant, that is, what rows are
multiplied by, trains with each learning rate and weight decay; the tuning ratings stop it and
choose. Held-out ratings are scored at the end, and nothing before that has seen them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, PositiveFloat

from ehr_sn.models.fit import device_of
from ehr_sn.studies.autoencoder import (
    FACTORS,
    Budget,
    Network,
    Rows,
    fit_autoencoder,
    rmse,
)
from ehr_sn.studies.framework import TUNED, StudyConfig
from ehr_sn.studies.ratings import WHERE, Ratings, Split, ratings_file, read_ratings, split
from ehr_sn.studies.result import Part, Score, StudyResult, count_curve, count_edges

FORMAT = 1
ZERO, SN, *ABLATION = FACTORS
MEANS = "biases only"
METRIC = "RMSE"
GIVEN = 0.25
"""Share of each row's ratings that is given where the effect of fewer ratings is measured."""
THINNED, DRIFT = "RMSE, a quarter given", "mean output, change when a quarter is given"

Model = Literal["I-AutoRec", "U-AutoRec", "deep I-autoencoder"]
MODELS: tuple[Model, ...] = ("I-AutoRec", "U-AutoRec", "deep I-autoencoder")


class Config(StudyConfig):
    """Keys of configs/studies/recommender.yaml.

    `hidden` unless given: one unit for every 2,000 ratings, from 50 to 200. `tuning` is a share of
    the ratings not held out. The first learning rate and weight decay are those of variants that
    are not tuned. Models in `ablation` train with a constant scale and with K = 1 as well.
    """

    models: list[Model] = Field(list(MODELS), min_length=1)
    ablation: list[Model] = Field([MODELS[0]])
    repeats: int = Field(5, ge=2)
    held_out: float = Field(0.1, gt=0, lt=1)
    tuning: float = Field(0.05, gt=0, lt=1)
    hidden: int | None = Field(None, ge=2)
    learning_rates: list[PositiveFloat] = Field([1e-3, 3e-3], min_length=1)
    weight_decays: list[PositiveFloat] = Field([1e-4, 1e-3], min_length=1)
    batch_size: int = Field(128, ge=1)
    max_epochs: int = Field(100, ge=1)
    patience: int = Field(3, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"


def files(config: Config, data: Path | None) -> list[Path]:
    return [] if data is None else [ratings_file(data)]


def cells(config: Config, data: Path | None) -> list[str]:
    return [_cell(model, k) for model in config.models for k in range(config.repeats)]


def _cell(model: str, repeat: int) -> str:
    return f"{model} · repeat {repeat + 1}"


def run_cell(config: Config, data: Path | None, cell: str) -> Part:
    """Train one model on one split in all variants, and score each on the held-out ratings."""
    model, repeat = next(
        pair for pair in product(config.models, range(config.repeats)) if _cell(*pair) == cell
    )
    ratings = read_ratings(data)
    seed = config.seed + repeat
    parts = split(len(ratings), held_out=config.held_out, tuning=config.tuning, seed=seed)
    network = network_of(model, config.hidden or hidden_units(len(ratings)))
    rows = Rows(ratings, parts.train, network.axis)
    tuning = rows.pairs(ratings, parts.tuning), ratings.value[parts.tuning]
    held_out, rating = rows.pairs(ratings, parts.held_out), ratings.value[parts.held_out]
    edges = count_edges(_training_counts(config, ratings, rows))
    scores = [Score(model, MEANS, repeat, METRIC, rmse(rows.biases(held_out), rating))]
    curves, chosen = [], {}
    for variant in (ZERO, SN, *(ABLATION if model in config.ablation else [])):
        found = {}
        for rate, decay in product(config.learning_rates, config.weight_decays):
            found[rate, decay] = fit_autoencoder(
                rows,
                tuning,
                network,
                Budget(rate, decay, config.batch_size, config.max_epochs, config.patience),
                FACTORS[variant],
                seed=seed,
                device=device_of(config.device),
            )
        (rate, decay), best = min(found.items(), key=lambda pair: pair[1].tuning_rmse)
        chosen[f"{model} · {variant}"] = f"learning rate {rate:g}, weight decay {decay:g}"
        untuned = next(iter(found.values())).predict(held_out)
        predicted = best.predict(held_out)
        scores += [
            Score(model, variant, repeat, METRIC, rmse(untuned, rating)),
            Score(model, variant + TUNED, repeat, METRIC, rmse(predicted, rating)),
        ]
        if variant in (ZERO, SN):
            name = variant + TUNED
            thinned = best.predict(held_out, _thinned(ratings, parts, rows, seed))
            drift = float(np.mean(thinned - predicted))
            scores += [
                Score(model, name, repeat, THINNED, rmse(thinned, rating)),
                Score(model, name, repeat, DRIFT, drift),
            ]
            count = rows.count[held_out.row]
            curves.append(count_curve(model, name, count, predicted, rating, edges))
    return Part(tuple(scores), tuple(curves), chosen)


def summarise(config: Config, data: Path | None, parts: Sequence[Part]) -> StudyResult:
    ratings = read_ratings(data)
    scores = [score for part in parts for score in part.scores]

    def mean(model: str, variant: str, metric: str) -> float:
        wanted = (model, variant + TUNED, metric)
        return float(
            np.mean([s.value for s in scores if (s.setting, s.variant, s.metric) == wanted])
        )

    drifts = [
        f"{m} {mean(m, ZERO, DRIFT):+.2f} w/o SN and {mean(m, SN, DRIFT):+.2f} w/ SN (RMSE "
        f"{mean(m, ZERO, THINNED):.3f} and {mean(m, SN, THINNED):.3f})"
        for m in config.models
    ]
    source = f"{ratings.n_users:,} users, {ratings.n_items:,} items"
    return StudyResult(
        study=config.study,
        title=f"Collaborative filtering · {len(ratings):,} ratings",
        parts=tuple(parts),
        metric=METRIC,
        higher_is_better=False,
        reference=ZERO + TUNED,
        sn=SN + TUNED,
        repeats_are=f"{config.repeats} random splits",
        test_train_ratio=config.held_out / ((1 - config.held_out) * (1 - config.tuning)),
        notes=(
            f"{'Given ratings' if data else 'Embedded ratings'}: {source}. {WHERE}",
            "When only a quarter of each row's ratings is given, the mean output changes by: "
            + "; ".join(drifts)
            + ".",
            "Published on MovieLens 1M, for orientation: I-AutoRec 0.831, U-AutoRec 0.874, "
            "BiasedMF 0.845, CF-NADE 0.829.",
        ),
        axes=("ratings given of the row", "mean predicted rating"),
    )


def network_of(model: Model, hidden: int) -> Network:
    """The architecture of that name, with so many units in its first hidden layer."""
    if model == "deep I-autoencoder":
        return Network("item", (hidden, hidden // 2, hidden), "selu", dropout=0.5)
    return Network("item" if model == "I-AutoRec" else "user", (hidden,))


def hidden_units(n_ratings: int) -> int:
    """One for every 2,000 ratings, from 50 to 200."""
    return min(max(n_ratings // 2000, 50), 200)


def _training_counts(config: Config, ratings: Ratings, rows: Rows) -> np.ndarray:
    """Return about how many ratings of each rating's row are trained on, whatever the split."""
    row = rows.pairs(ratings, np.arange(len(ratings))).row
    share = (1 - config.held_out) * (1 - config.tuning)
    return np.bincount(row)[row] * share


def _thinned(ratings: Ratings, parts: Split, rows: Rows, seed: int) -> Rows:
    """The training rows with a random share of their ratings, and no others."""
    kept = np.random.default_rng([seed, 1]).random(len(parts.train)) < GIVEN
    return Rows(ratings, parts.train[kept], rows.axis)
