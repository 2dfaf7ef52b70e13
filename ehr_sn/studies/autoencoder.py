"""Sparse ratings → autoencoders that predict the ratings not given, without and with SN."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor, nn

from ehr_sn.missing.sparsity_norm import sparsity_factor
from ehr_sn.models.fit import TrainingError
from ehr_sn.models.mlp import DROPOUT, INITIAL_WEIGHTS, SHUFFLING, stream
from ehr_sn.studies.framework import CONSTANT_SCALE
from ehr_sn.studies.ratings import Ratings

Axis = Literal["item", "user"]
Factor = Callable[[NDArray[np.integer], float], NDArray[np.floating]]
"""(observed entries of each row, their mean over training rows) → what each row is times."""

FACTORS: dict[str, Factor] = {
    "zero": lambda count, mean: np.ones(len(count)),
    "SN": sparsity_factor,
    "SN, K = 1": lambda count, mean: sparsity_factor(count, 1),
    CONSTANT_SCALE: lambda count, mean: np.full(len(count), 1 / mean),
}
LEAST_STEPS = 20
"""Steps an epoch has at least: where rows are few, batches become smaller."""
BLOCK = 2**22
"""Entries of a dense block when predicting."""
SHRINKAGE = {"item": 25.0, "user": 10.0}
"""Ratings at the mean that each item and user is given beforehand (Y. Koren, KDD 2008)."""


@dataclass(frozen=True)
class Network:
    """Rows, hidden widths, activation and dropout (of the innermost layer) of an autoencoder.

    `axis` says what a row is: an item, with the ratings of all users, or a user.
    """

    axis: Axis
    hidden: tuple[int, ...]
    activation: Literal["sigmoid", "selu"] = "sigmoid"
    dropout: float = 0.0


@dataclass(frozen=True)
class Budget:
    """How a network trains: Adam, on the squared error of observed ratings, L2 on weights.

    The loss is the mean over the training ratings plus weight_decay / 2 · Σ w². It stops after
    `max_epochs`, or when `patience` epochs have brought no better RMSE on the tuning ratings.
    """

    learning_rate: float
    weight_decay: float
    batch_size: int = 128
    max_epochs: int = 100
    patience: int = 3


@dataclass(frozen=True)
class Pairs:
    """n places in the matrix, all (n,)."""

    row: NDArray[np.int64]
    column: NDArray[np.int64]


class Rows:
    """Ratings to train on, as sparse rows that are made dense a batch at a time.

    What is stored is what is observed: a rating of 0 counts. `count` holds the observed entries of
    each row and `mean_count` their mean over `trained`, the rows that have any; `means` the biases
    of rows and columns, and `limits` the lowest and highest rating.

    Parameters
    ----------
    ratings, chosen : all ratings, and the places of those to train on
    axis : what a row is
    """

    def __init__(self, ratings: Ratings, chosen: NDArray[np.integer], axis: Axis) -> None:
        self.axis = axis
        value = ratings.value[chosen]
        at = self.pairs(ratings, chosen)
        items_by_users = (ratings.n_items, ratings.n_users)
        self.shape = items_by_users if axis == "item" else items_by_users[::-1]
        self.matrix = csr_array((value, (at.row, at.column)), shape=self.shape)
        self.count = np.diff(self.matrix.indptr)
        self.column_count = np.bincount(at.column, minlength=self.shape[1])
        self.trained = np.flatnonzero(self.count)
        self.mean_count = float(self.count[self.trained].mean())
        self.mean, self.limits = float(value.mean()), (float(value.min()), float(value.max()))
        item = _shrunken(ratings.item[chosen], value - self.mean, ratings.n_items, "item")
        rest = value - self.mean - item[ratings.item[chosen]]
        user = _shrunken(ratings.user[chosen], rest, ratings.n_users, "user")
        self.bias = (item, user) if axis == "item" else (user, item)

    def pairs(self, ratings: Ratings, chosen: NDArray[np.integer]) -> Pairs:
        """Where some ratings are in the matrix."""
        user, item = ratings.user[chosen], ratings.item[chosen]
        return Pairs(item, user) if self.axis == "item" else Pairs(user, item)

    def biases(self, at: Pairs) -> NDArray[np.float32]:
        """Mean + item's bias + user's bias, within the limits; (n,). Unseen ones have bias 0."""
        predicted = self.mean + self.bias[0][at.row] + self.bias[1][at.column]
        return np.clip(predicted, *self.limits).astype(np.float32)

    def take(
        self, rows: NDArray[np.integer], factor: NDArray[np.floating], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows as inputs (B, D), 0 where nothing is observed, each times its own factor (B,).

        Also where the n observed entries are in the flattened inputs, and their ratings: both (n,).
        """
        part = self.matrix[rows]
        row = np.repeat(np.arange(len(rows)), np.diff(part.indptr))
        at = torch.from_numpy(row * self.shape[1] + part.indices).to(device)
        scaled = part.data * factor.astype(np.float32)[row]
        x = torch.zeros(len(rows), self.shape[1], device=device)
        x.view(-1)[at] = torch.from_numpy(scaled).to(device)
        return x, at, torch.from_numpy(part.data).to(device)


class Autoencoder(nn.Module):
    """A row's ratings → all its ratings: hidden layers, then a linear one. (B, D) to (B, D).

    One hidden sigmoid layer is AutoRec (S. Sedhain, A. K. Menon, S. Sanner, L. Xie, "AutoRec:
    Autoencoders Meet Collaborative Filtering", WWW 2015). Several of SELU with dropout follow
    O. Kuchaiev and B. Ginsburg, "Training Deep AutoEncoders for Collaborative Filtering", 2017,
    arXiv 1708.01715. Weights start within ±1/√fan-in, from the seed alone; the output's bias starts
    at the mean rating.
    """

    def __init__(self, n_columns: int, network: Network, *, mean: float, seed: int) -> None:
        super().__init__()
        widths = (n_columns, *network.hidden, n_columns)
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in pairwise(widths))
        rng = np.random.Generator(stream(seed, INITIAL_WEIGHTS))
        with torch.no_grad():
            for (n_in, n_out), weight, bias in zip(
                pairwise(widths), self.weights(), self.biases(), strict=True
            ):
                drawn = rng.uniform(-(n_in**-0.5), n_in**-0.5, (n_out, n_in))
                weight.copy_(torch.from_numpy(drawn))
                bias.zero_()
            bias.fill_(mean)
        self.activation = getattr(torch, network.activation)
        self.dropout = network.dropout
        self._noise = np.random.Generator(stream(seed, DROPOUT))

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < last:
                x = self.activation(x)
            if self.training and self.dropout and i == (last - 1) // 2:
                kept = self._noise.random(tuple(x.shape), dtype=np.float32) >= self.dropout
                x = x * torch.from_numpy(kept).to(x.device) / (1 - self.dropout)
        return x

    def weights(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name.endswith("weight")]

    def biases(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name.endswith("bias")]


@dataclass(frozen=True)
class Fitted:
    """A network at its best epoch, with its RMSE on the tuning ratings and the epochs it took."""

    model: nn.Module
    rows: Rows
    factor: Factor
    tuning_rmse: float = math.nan
    epochs: int = 0

    @torch.no_grad()
    def predict(self, at: Pairs, given: Rows | None = None) -> NDArray[np.float32]:
        """Ratings at n places, (n,), from training ratings alone; within the limits of those.

        A row or column without training ratings is nothing the network has learned of: there the
        biases predict. With `given`, inputs are its rows instead of those trained on.
        """
        rows = self.rows if given is None else given
        factor = self.factor(rows.count, self.rows.mean_count)
        device = next(iter(self.model.parameters()), torch.empty(0)).device
        predicted = self.rows.biases(at)
        known = np.flatnonzero(
            (self.rows.count[at.row] > 0) & (self.rows.column_count[at.column] > 0)
        )
        known = known[np.argsort(at.row[known], kind="stable")]
        distinct, place = np.unique(at.row[known], return_inverse=True)
        step = max(BLOCK // rows.shape[1], 1)
        was_training = self.model.training
        self.model.eval()
        for start in range(0, len(distinct), step):
            block = distinct[start : start + step]
            out = self.model(rows.take(block, factor[block], device)[0]).cpu().numpy()
            mine = slice(*np.searchsorted(place, (start, start + step)))
            predicted[known[mine]] = out[place[mine] - start, at.column[known[mine]]]
        self.model.train(was_training)
        return np.clip(predicted, *self.rows.limits)


def fit_autoencoder(
    rows: Rows,
    tuning: tuple[Pairs, NDArray[np.float32]],
    network: Network,
    budget: Budget,
    factor: Factor,
    *,
    seed: int,
    device: str | torch.device = "cpu",
) -> Fitted:
    """Train on the ratings in `rows`, and stop by those of `tuning` (places, ratings).

    Networks of one seed share initial weights, shuffles and dropout, whatever their `factor`.

    Raises
    ------
    TrainingError
        The RMSE on the tuning ratings became infinite or NaN.
    """
    device = torch.device(device)
    model = Autoencoder(rows.shape[1], network, mean=rows.mean, seed=seed).to(device)
    fitted, best, best_epoch = Fitted(model, rows, factor), math.inf, -1
    kept = model.state_dict()
    for epoch, _ in enumerate(epochs(model, rows, budget, factor, seed)):
        score = rmse(fitted.predict(tuning[0]), tuning[1])
        if not math.isfinite(score):
            raise TrainingError(
                f"the RMSE became {score} in epoch {epoch}; try a learning rate below "
                f"{budget.learning_rate:g}"
            )
        if score < best:
            best, best_epoch, kept = score, epoch, copy.deepcopy(model.state_dict())
        if epoch - best_epoch >= budget.patience:
            break
    model.load_state_dict(kept)
    return Fitted(model, rows, factor, best, epoch + 1)


def epochs(
    model: Autoencoder, rows: Rows, budget: Budget, factor: Factor, seed: int
) -> Iterator[None]:
    """Train `model` in place; yields as each epoch ends."""
    device = model.weights()[0].device
    groups: list[dict[str, Any]] = [
        {"params": model.weights(), "weight_decay": budget.weight_decay},
        {"params": model.biases()},
    ]
    optimiser = torch.optim.Adam(groups, lr=budget.learning_rate, fused=True)
    factors = factor(rows.count, rows.mean_count)
    rng = np.random.Generator(stream(seed, SHUFFLING))
    size = max(min(budget.batch_size, len(rows.trained) // LEAST_STEPS), 1)
    for _ in range(budget.max_epochs):
        order = rng.permutation(rows.trained)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            x, at, rating = rows.take(batch, factors[batch], device)
            out = model(x)
            # The error where nothing is observed is 0 and never computed.
            gradient = torch.zeros_like(out)
            error = out.detach().view(-1)[at] - rating
            gradient.view(-1)[at] = error.mul_(2 / (len(batch) * rows.mean_count))
            optimiser.zero_grad()
            out.backward(gradient)
            optimiser.step()
        yield


def rmse(predicted: NDArray[np.floating], rating: NDArray[np.floating]) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt(np.mean(np.square(predicted - rating, dtype=np.float64))))


def _shrunken(
    group: NDArray[np.integer], value: NDArray[np.floating], n: int, kind: Axis
) -> NDArray[np.float64]:
    """Each group's sum of values over its size + shrinkage; 0 for a group without values."""
    total = np.bincount(group, value, minlength=n)
    shrunken: NDArray[np.float64] = total / (np.bincount(group, minlength=n) + SHRINKAGE[kind])
    return shrunken
