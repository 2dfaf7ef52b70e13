"""Images, complete or with missing pixels → accuracy of VGG networks without and with SN.

Without `--data` the images are scikit-learn's digits (8 × 8) and the network is a small VGG; with
it they are CIFAR-10 and the network is VGG-16. SN is in every layer: the first counts observed
pixels, the others activations that are not zero. A cell is one network, width and kind of image in
one repeat, in which all variants share rows, missing pixels, initial weights and shuffles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, model_validator
from sklearn.model_selection import train_test_split

from ehr_sn.config import Distinct, Some, StrictModel
from ehr_sn.models.fit import device_of
from ehr_sn.studies.autoencoder import FACTORS, Factor
from ehr_sn.studies.framework import CONSTANT_SCALE, TUNED, StudyConfig
from ehr_sn.studies.images import Images, image_files, observed_pixels, read_images
from ehr_sn.studies.result import (
    CountCurve,
    Part,
    Score,
    StudyResult,
    count_curve,
    count_edges,
)
from ehr_sn.studies.vgg import (
    VGG,
    VGG_6,
    VGG_16,
    Budget,
    Inputs,
    Layout,
    fit_network,
    predict,
)

FORMAT = 1
ZERO, SN, IMAGE = "zero", "SN", "SN of the image alone"
FACTOR = {
    ZERO: FACTORS["zero"],
    SN: FACTORS["zero"],
    IMAGE: FACTORS["SN"],
    f"{IMAGE}, K = 1": FACTORS["SN, K = 1"],
    CONSTANT_SCALE: FACTORS[CONSTANT_SCALE],
}
"""What images are times, before the first layer; the SN of all layers is in the network."""

METRIC = "accuracy"
SPARSEST, DRIFT = "accuracy, most pixels missing", "mean output, change with most pixels missing"
WIDTHS = {1.0: "full width", 0.5: "half width", 0.25: "quarter width"}

Network = Literal["VGG", "VGG+BN"]
Kind = Literal["complete", "pixels missing"]
KINDS: tuple[Kind, ...] = ("complete", "pixels missing")


class Training(StrictModel):
    """How networks train; tuned ones choose from `learning_rates` and `weight_decays`.

    The first of each is that of variants that are not tuned.
    """

    learning_rates: Annotated[tuple[PositiveFloat, ...], Some, Distinct]
    weight_decays: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Some, Distinct]
    batch_size: int = Field(ge=2)
    epochs: int = Field(ge=1)

    def budgets(self) -> list[Budget]:
        pairs = product(self.learning_rates, self.weight_decays)
        return [Budget(rate, decay, self.batch_size, self.epochs) for rate, decay in pairs]


class Config(StudyConfig):
    """Keys of configs/studies/vision.yaml.

    Each image lacks a share of its pixels drawn between the two of `missing`. Of the digits
    `held_out` are scored, CIFAR-10 has test images of its own; `tuning` is a share of the others.
    Networks in `ablation` train in all variants, tuned and not, at the first of the `widths`.
    """

    networks: Annotated[tuple[Network, ...], Some, Distinct] = ("VGG", "VGG+BN")
    widths: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Some, Distinct]
    kinds: Annotated[tuple[Kind, ...], Some, Distinct] = KINDS
    ablation: Annotated[tuple[Network, ...], Distinct] = ()
    missing: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    scaler: Literal["minmax", "standard"] = "minmax"
    repeats: int = Field(5, ge=1)
    held_out: float = Field(0.2, gt=0, lt=1)
    tuning: float = Field(0.15, gt=0, lt=1)
    digits: Training
    cifar10: Training
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _missing_rises(self) -> Self:
        if self.missing[0] >= self.missing[1]:
            raise ValueError("missing: give the lower rate first, and a higher one")
        return self

    def for_cell(self, cell: str) -> Self:
        """All but how many repeats there are."""
        return self.model_copy(update={"repeats": 1})


@dataclass(frozen=True)
class Job:
    """A network, its width and its images, in a repeat (from 0)."""

    network: Network
    width: float
    kind: Kind
    repeat: int

    @property
    def batch_norm(self) -> bool:
        return self.network == "VGG+BN"


@dataclass(frozen=True)
class Rows:
    """Which images are for what."""

    train: NDArray[np.int64]
    tuning: NDArray[np.int64]
    held_out: NDArray[np.int64]


@dataclass(frozen=True)
class Given:
    """A job's images: with the pixels drawn for each, and all with the fewest or most missing."""

    drawn: Inputs
    fewest: Inputs
    most: Inputs

    def times(self, factor: Factor, mean_count: float) -> Given:
        """Each image as one row, times the factor of its own count."""
        inputs = (self.drawn, self.fewest, self.most)
        return Given(*(i.times(factor(i.counts(), mean_count)) for i in inputs))


def files(config: Config, data: Path | None) -> list[Path]:
    return [] if data is None else image_files(data)


def cells(config: Config, data: Path | None) -> list[str]:
    """A network, width, kind of image and repeat each."""
    return list(_jobs(config, data))


def _jobs(config: Config, data: Path | None) -> dict[str, Job]:
    parts = product(config.kinds, config.networks, config.widths, range(config.repeats))
    jobs = (Job(network, width, kind, repeat) for kind, network, width, repeat in parts)
    return {f"{_setting(job, data)}, repeat {job.repeat + 1}": job for job in jobs}


def _setting(job: Job, data: Path | None) -> str:
    name = _layout(data).name + "+BN" * job.batch_norm
    return f"{name}, {WIDTHS.get(job.width, f'width {job.width:g}')}, {job.kind}"


def _layout(data: Path | None) -> Layout:
    return VGG_6 if data is None else VGG_16


def run_cell(config: Config, data: Path | None, cell: str) -> Part:
    """Train every variant on the same images, and score each on the held-out ones."""
    job = _jobs(config, data)[cell]
    setting, images = _setting(job, data), read_images(data)
    rows = split(config, images, config.seed + job.repeat)
    given = _given(config, images, rows, job)
    label = images.labels[rows.held_out]
    whole = job.network in config.ablation and job.width == config.widths[0]
    budgets = (config.digits if data is None else config.cifar10).budgets()
    scores, curves, chosen = [], [], {}
    for variant in FACTOR if whole else (ZERO, SN):
        if job.kind == "complete" and variant.startswith(IMAGE):
            continue  # all images have one count
        mine = given.times(FACTOR[variant], float(given.drawn.counts()[rows.train].mean()))
        fitted = [
            _fitted(config, job, images, mine.drawn, rows, variant, _layout(data), budget)
            for budget in (budgets if whole else budgets[:1])
        ]
        named = {variant: fitted[0]}
        if whole:
            best = max(range(len(fitted)), key=lambda i: fitted[i][0])
            named[variant + TUNED] = fitted[best]
            rate, decay = budgets[best].learning_rate, budgets[best].weight_decay
            chosen[f"{setting} · {variant}"] = f"learning rate {rate:g}, weight decay {decay:g}"
        for name, (_, model) in named.items():
            probability = predict(model, mine.drawn, rows.held_out)
            found = {METRIC: accuracy(probability, label)}
            if job.kind != "complete":
                most, fewest = (predict(model, i, rows.held_out) for i in (mine.most, mine.fewest))
                found |= {SPARSEST: accuracy(most, label), DRIFT: drift(fewest, most)}
                if name in (ZERO, SN):
                    curves.append(_curve(config, images, rows, given, setting, name, probability))
            scores += [Score(setting, name, job.repeat, *pair) for pair in found.items()]
    return Part(tuple(scores), tuple(curves), chosen)


def split(config: Config, images: Images, seed: int) -> Rows:
    """Every class in proportion; the images' own test rows, where there are any, are held out."""
    rest, held_out = np.arange(len(images)), images.test
    if held_out is None:
        rest, held_out = _divided(images, rest, config.held_out, seed)
    else:
        rest = np.setdiff1d(rest, held_out)
    train, tuning = _divided(images, rest, config.tuning, seed)
    return Rows(train, tuning, held_out)


def _divided(
    images: Images, rows: NDArray[np.int64], share: float, seed: int
) -> list[NDArray[np.int64]]:
    parts: list[NDArray[np.int64]] = train_test_split(
        rows, test_size=share, stratify=images.labels[rows], random_state=seed
    )
    return parts


def accuracy(probability: NDArray[np.float32], label: NDArray[np.int64]) -> float:
    """The share of images whose likeliest class is theirs."""
    return float((probability.argmax(axis=1) == label).mean())


def drift(fewest: NDArray[np.float32], most: NDArray[np.float32]) -> float:
    """How far the mean output moves: total variation between two means of probabilities.

    0 where both means are alike, 1 where they have no class in common.

    >>> drift(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.75, 0.25], [0.75, 0.25]]))
    0.25
    """
    return float(np.abs(fewest.mean(axis=0) - most.mean(axis=0)).sum() / 2)


def _given(config: Config, images: Images, rows: Rows, job: Job) -> Given:
    device = torch.device(device_of(config.device))
    low, high = config.missing if job.kind == "pixels missing" else (0.0, 0.0)
    drawn, fewest, most = (
        observed_pixels(images.pixels.shape, rates, config.seed + job.repeat)
        for rates in ((low, high), (low, low), (high, high))
    )
    inputs = Inputs(images, drawn, rows.train, config.scaler, device)
    return Given(inputs, inputs.observing(fewest), inputs.observing(most))


def _fitted(
    config: Config,
    job: Job,
    images: Images,
    inputs: Inputs,
    rows: Rows,
    variant: str,
    layout: Layout,
    budget: Budget,
) -> tuple[float, VGG]:
    """A trained network and its accuracy on tuning rows."""
    seed = config.seed + job.repeat
    model = VGG(
        images.pixels.shape[1:3],
        int(images.labels.max()) + 1,
        layout,
        width=job.width,
        batch_norm=job.batch_norm,
        sparsity_norm=variant == SN,
        seed=seed,
    )
    return fit_network(model, inputs, rows.train, rows.tuning, budget, seed=seed), model


def _curve(
    config: Config,
    images: Images,
    rows: Rows,
    given: Given,
    setting: str,
    name: str,
    probability: NDArray[np.float32],
) -> CountCurve:
    """One class's: the means of all classes together would always be alike."""
    common = int(np.bincount(images.labels).argmax())  # the same in every repeat
    counts = given.drawn.counts()[rows.held_out]
    n_pixels = images.pixels[0, 0].size
    edges = count_edges((1 - np.linspace(*config.missing, 1000)) * n_pixels)
    is_it = images.labels[rows.held_out] == common
    return count_curve(setting, name, counts, probability[:, common], is_it, edges)


def summarise(config: Config, data: Path | None, parts: Sequence[Part]) -> StudyResult:
    """Tuned variants and the ablation's stand in the table of every variant."""
    scores = [score for part in parts for score in part.scores]

    def mean(setting: str, variant: str, metric: str) -> float:
        wanted = (setting, variant, metric)
        return float(np.mean([s.value for s in scores if _named(s) == wanted]))

    drifts = [
        f"{setting}: {mean(setting, ZERO, DRIFT):.3f} w/o SN and {mean(setting, SN, DRIFT):.3f} "
        f"w/ SN (accuracy {mean(setting, ZERO, SPARSEST):.3f} and "
        f"{mean(setting, SN, SPARSEST):.3f} with {config.missing[1]:.0%} missing)"
        for setting in dict.fromkeys(s.setting for s in scores if s.metric == DRIFT)
    ]
    low, high = config.missing
    notes = [
        "Published, w/o and w/ SN: VGG-16 0.8050 ± 0.0185 and 0.8094 ± 0.0173, VGG-16+BN "
        "0.8755 ± 0.0066 and 0.8800 ± 0.0101."
    ]
    if drifts:
        notes += [
            f"Images lack from {low:.0%} to {high:.0%} of their pixels.",
            f"Change of the mean output (total variation) from {low:.0%} to {high:.0%} missing in "
            f"all held-out images: {'; '.join(drifts)}.",
        ]
    of_its_own = "" if data is None else ", all with CIFAR-10's own test images"
    return StudyResult(
        study=config.study,
        title=f"{config.title} · {'digits, 8 × 8' if data is None else 'CIFAR-10'}",
        parts=tuple(parts),
        metric=METRIC,
        higher_is_better=True,
        reference=ZERO,
        sn=SN,
        repeats_are=f"{config.repeats} random splits{of_its_own}",
        test_train_ratio=(
            config.held_out / ((1 - config.held_out) * (1 - config.tuning)) if data is None else 0
        ),
        notes=tuple(notes),
        axes=("observed pixels", "mean probability of one class"),
    )


def _named(score: Score) -> tuple[str, str, str]:
    return score.setting, score.variant, score.metric
