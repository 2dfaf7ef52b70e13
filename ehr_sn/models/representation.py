"""Training rows, labelled or not → the layers that an architecture's networks begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ehr_sn.config import RepresentationConfig
from ehr_sn.models.fit import TrainingError
from ehr_sn.models.layers import Activation, Encoder
from ehr_sn.models.masking import Masking
from ehr_sn.models.sparse_autoencoder import (
    Objective,
    Optimiser,
    Weights,
    decode,
    encode,
    encoder_of,
    pretrain,
)

LAYER = ("layer_weight", "layer_bias")

__all__ = ["Learned", "learn", "principal_components"]


@dataclass(frozen=True)
class Learned:
    """An encoder, one a seed, and what there is to see of it.

    rates : (S, units of all layers), each unit's mean activation over the training rows
    error : (S, n), mean squared error of the reconstruction of each feature, over the tuning rows'
        observed entries; NaN where there are none
    """

    SEEN: ClassVar = ("rates", "error", "weight")
    encoder: Encoder
    rates: Tensor
    error: Tensor

    @property
    def weight(self) -> Tensor:
        """The first layer's, (S, D, H)."""
        return self.encoder.layers[0][0]

    def state(self) -> dict[str, Tensor]:
        """All there is to it but its seeds and its configuration, for safetensors."""
        layers = {
            f"{name}_{i}": tensor
            for i, layer in enumerate(self.encoder.layers)
            for name, tensor in zip(LAYER, layer, strict=True)
        }
        return layers | {"rates": self.rates, "error": self.error}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], config: RepresentationConfig, seeds: Sequence[int]
    ) -> Self:
        """What `learn` gave with these seeds and this configuration, but for `fine_tune`."""
        weight, bias = LAYER
        layers = [(state[f"{weight}_{i}"], state[f"{bias}_{i}"]) for i in range(len(config.units))]
        activation: Activation = "linear" if config.kind == "pca" else config.activation
        encoder = Encoder(tuple(seeds), tuple(layers), activation, config.fine_tune)
        return cls(encoder, state["rates"], state["error"])


def learn(
    config: RepresentationConfig,
    table: NDArray[np.float32],
    target: NDArray[np.float32],
    *,
    train_rows: NDArray[np.bool_],
    tuning_rows: NDArray[np.bool_],
    seeds: Sequence[int],
    masking: Masking | None = None,
    device: str | torch.device = "cpu",
) -> Learned:
    """Learn a representation of each seed, all in one batched computation, from the training rows.

    Parameters
    ----------
    table : (N, D), complete rows, as networks take them
    target : (N, n), the scaled features, NaN = missing: what is to be reconstructed
    masking : of the training rows alone, numbered from 0; what `denoise` hides
    """
    x, t = (torch.from_numpy(np.require(a, np.float32, "W")).to(device) for a in (table, target))
    train, tuning = (torch.from_numpy(rows).to(device) for rows in (train_rows, tuning_rows))
    if config.kind == "pca":
        objective = Objective(activation="linear")
        layers = [principal_components(x[train], config.units[0], len(seeds))]
        t = x[:, : t.shape[1]].where(~t.isnan(), torch.nan)  # the rows themselves, such as SN's
    else:
        objective = Objective(
            config.rho,
            config.beta,
            config.weight_decay,
            config.activation,
            running_mean=config.running_mean,
        )
        optimiser = Optimiser(config.solver, config.epochs, config.batch_size, config.learning_rate)
        layers = pretrain(
            x[train],
            t[train],
            config.units,
            seeds=seeds,
            objective=objective,
            optimiser=optimiser,
            masking=masking,
        )
    rates = [
        encode(layers[: i + 1], x[train], objective.activation).mean(1) for i in range(len(layers))
    ]
    codes = encode(layers, x[tuning], objective.activation)
    error = (decode(layers, codes, objective)[:, :, : t.shape[1]] - t[tuning]).square()
    return Learned(
        encoder_of(layers, seeds, objective.activation, fine_tune=config.fine_tune),
        torch.cat(rates, dim=1),
        error.nanmean(1),
    )


def principal_components(x: Tensor, units: int, replicates: int) -> Weights:
    """The projection of rows (N, D) on their first principal components, for all replicates alike.

    Raises
    ------
    TrainingError
        There are fewer columns or rows than components.
    """
    if units > min(x.shape):
        raise TrainingError(
            f"representation: {units} principal components need as many columns and rows, and the "
            f"training rows have the shape {tuple(x.shape)}: give fewer units"
        )
    mean = x.mean(0, keepdim=True)
    axes = torch.linalg.svd(x - mean, full_matrices=False)[2][:units]
    # A component's sign is arbitrary: its largest weight is made positive.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    axes = axes * largest.sign()
    one = Weights(axes.T, -mean @ axes.T, axes, mean)
    return Weights(*(w.expand(replicates, -1, -1).contiguous() for w in one))
