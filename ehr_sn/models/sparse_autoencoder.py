"""Rows with missing entries → codes that are mostly inactive, learned without labels.

A. Ng, "Sparse autoencoder", CS294A lecture notes, Stanford 2011; the UFLDL tutorial of A. Ng, J.
Ngiam, C. Y. Foo, Y. Mai, C. Suen. As in mlp.py the first axis of every tensor is the replicate's:
the autoencoders of several seeds train in one batched computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.base import ClassNamePrefixFeaturesOutMixin
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_array, check_is_fitted
from torch import Tensor

from ehr_sn.errors import did_you_mean
from ehr_sn.missing import make_method
from ehr_sn.missing.model_imputer import product
from ehr_sn.missing.scalers import RowTransformer
from ehr_sn.models.layers import ACTIVATIONS, Activation, Encoder, activate
from ehr_sn.models.masking import MaskedRows, Masking, gather, masking_of
from ehr_sn.models.mlp import PRETRAINING, PRETRAINING_WEIGHTS, stream

__all__ = [
    "Objective",
    "Optimiser",
    "SparseAutoencoder",
    "StackedSparseAutoencoder",
    "Weights",
    "cost_and_gradient",
    "decode",
    "encode",
    "encoder_of",
    "pretrain",
    "sparsity_penalty",
]

EDGE = 1e-4
"""So near to 0 and to 1 the penalty of a mean activation goes on as a straight line."""
BLOCK = 256
FUNCTIONS: dict[Activation, Callable[[NDArray[np.floating]], NDArray[np.floating]]] = {
    "sigmoid": expit,
    "tanh": np.tanh,
    "relu": lambda z: np.maximum(z, 0),
    "linear": lambda z: z,
}
Solver = Literal["adam", "lbfgs"]


class Weights(NamedTuple):
    """R autoencoders of D inputs, H hidden units and n outputs."""

    encode: Tensor  # (R, D, H), W1
    encode_bias: Tensor  # (R, 1, H), b1
    decode: Tensor  # (R, H, n), W2
    decode_bias: Tensor  # (R, 1, n), b2


@dataclass(frozen=True)
class Objective:
    """What is minimised, beside the reconstruction error.

    rho, beta : target of each unit's mean activation, in (0, 1), and weight of missing it
    weight_decay : λ, of the weights and not of the biases
    activation, output : of hidden units and of the reconstruction
    running_mean : share of the mean activation that stems from the batches before, in [0, 1)
    """

    rho: float = 0.05
    beta: float = 3.0
    weight_decay: float = 1e-4
    activation: Activation = "sigmoid"
    output: Activation = "linear"
    running_mean: float = 0.0

    def __post_init__(self) -> None:
        for name in ("activation", "output"):
            if getattr(self, name) not in ACTIVATIONS:
                hint = did_you_mean(str(getattr(self, name)), ACTIVATIONS)
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; {hint}")
        if not 0 < self.rho < 1 or not 0 <= self.running_mean < 1:
            raise ValueError("rho must be above 0 and below 1, running_mean from 0 to below 1")
        if self.beta < 0 or self.weight_decay < 0:
            raise ValueError("beta and weight_decay must be 0 or more")


@dataclass(frozen=True)
class Optimiser:
    """`adam` in minibatches, or `lbfgs` on all rows at once, the classical recipe.

    epochs : passes over the rows, or iterations of L-BFGS at most
    """

    solver: Solver = "adam"
    epochs: int = 50
    batch_size: int = 256
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        if self.solver not in get_args(Solver):
            hint = did_you_mean(str(self.solver), get_args(Solver))
            raise ValueError(f"unknown solver {self.solver!r}; {hint}")
        if min(self.epochs, self.batch_size) < 1 or not self.learning_rate > 0:
            raise ValueError("epochs and batch_size must be 1 or more, learning_rate above 0")


def sparsity_penalty(rho: float, rho_hat: Tensor) -> tuple[Tensor, Tensor]:
    """KL(ρ ‖ ρ̂) = ρ log(ρ/ρ̂) + (1 − ρ) log((1 − ρ)/(1 − ρ̂)), and its derivative by ρ̂.

    Outside [EDGE, 1 − EDGE], where a ReLU's mean may go, it goes on as its tangent: it stays
    finite, convex and smooth, and a unit that is always off or on is still drawn back.

    >>> value, slope = sparsity_penalty(0.2, torch.tensor(0.1, dtype=torch.float64))
    >>> f"{value:.10f}, {slope:.4f}"
    '0.0444030076, -1.1111'
    """
    inside = rho_hat.clamp(EDGE, 1 - EDGE)
    slope = (1 - rho) / (1 - inside) - rho / inside
    value = rho * torch.log(rho / inside) + (1 - rho) * torch.log((1 - rho) / (1 - inside))
    return value + slope * (rho_hat - inside), slope


def cost_and_gradient(
    weights: Weights,
    x: Tensor,
    target: Tensor,
    observed: Tensor | None,
    objective: Objective,
    rho_hat_before: Tensor | None = None,
) -> tuple[Tensor, Weights, Tensor]:
    """The cost of each replicate, its gradient in closed form, and ρ̂ (R, 1, H).

        J = n/|m| Σ ½ (m ⊙ (h(x) − t))² + λ/2 (‖W1‖² + ‖W2‖²) + β Σ_j KL(ρ ‖ ρ̂_j)

    with n features, of whose entries m says the |m| that were observed. With nothing missing the
    first term is the mean over rows of ½ ‖h(x) − t‖². ρ̂_j is the mean activation of unit j over
    the batch, that of tanh mapped to (0, 1) first; with `rho_hat_before` it is the running mean,
    and its derivative is taken as that of the batch's.

    Parameters
    ----------
    x : (R, B, D), what is encoded
    target : (R, B, n), what is to come out; any number where it was not observed
    observed : (R, B, n), 1 or 0; None if nothing is missing
    """
    n_rows = x.shape[1]
    w1, b1, w2, b2 = weights
    code = activate(objective.activation, torch.baddbmm(b1, x, w1))
    out = activate(objective.output, torch.baddbmm(b2, code, w2))
    error = out - target
    if observed is None:
        share = torch.full_like(error[:, :1, :1], 1 / n_rows)
    else:
        error = error * observed
        share = target.shape[2] / observed.sum((1, 2), keepdim=True).clamp(min=1)
    decay = objective.weight_decay
    cost = 0.5 * (share * error.square()).sum((1, 2))
    cost = cost + decay / 2 * (w1.square().sum((1, 2)) + w2.square().sum((1, 2)))

    centred = objective.activation == "tanh"
    rho_hat = code.mean(1, keepdim=True)
    rho_hat = (1 + rho_hat) / 2 if centred else rho_hat
    if rho_hat_before is not None:
        rho_hat = torch.lerp(rho_hat, rho_hat_before, objective.running_mean)
    by_out = share * error * _slope(objective.output, out)
    by_code = torch.bmm(by_out, w2.transpose(1, 2))
    if objective.beta:
        penalty, slope = sparsity_penalty(objective.rho, rho_hat)
        cost = cost + objective.beta * penalty.sum((1, 2))
        by_code += objective.beta * slope * ((0.5 if centred else 1.0) / n_rows)
    by_input = by_code * _slope(objective.activation, code)
    gradient = Weights(
        torch.baddbmm(w1, x.transpose(1, 2), by_input, beta=decay),
        by_input.sum(1, keepdim=True),
        torch.baddbmm(w2, code.transpose(1, 2), by_out, beta=decay),
        by_out.sum(1, keepdim=True),
    )
    return cost, gradient, rho_hat


def _slope(name: Activation, a: Tensor) -> Tensor | float:
    """The derivative of an activation function where it gives a."""
    match name:
        case "sigmoid":
            return a * (1 - a)
        case "tanh":
            return 1 - a.square()
        case "relu":
            return (a > 0).to(a.dtype)
    return 1.0


def pretrain(
    table: Tensor,
    target: Tensor,
    widths: Sequence[int],
    *,
    seeds: Sequence[int],
    objective: Objective = Objective(),
    optimiser: Optimiser = Optimiser(),
    masking: Masking | None = None,
) -> list[Weights]:
    """Train a stack of autoencoders greedily: each layer on the codes of the one below.

    Initial weights are uniform within ±√6/√(n_in + n_out + 1), biases 0. What a seed draws depends
    on that seed alone.

    Parameters
    ----------
    table : (N, D), complete rows to encode, float32 or float64
    target : (N, n), what the first layer reconstructs, NaN = missing
    widths : hidden units of each layer
    seeds : one replicate each
    masking : hides entries of the rows that the first layer encodes, not of its target; by Adam
    """
    if masking is not None and optimiser.solver == "lbfgs":
        raise ValueError("L-BFGS needs the same rows at every step: denoise with the solver adam")
    layers: list[Weights] = []
    for width, output in zip(widths, _outputs(objective, len(widths)), strict=True):
        own = replace(objective, output=output)
        layers.append(_train(table, target, width, seeds, own, optimiser, masking))
        table = target = encode(layers[-1:], table, objective.activation)
        masking = None
    return layers


def encode(layers: Sequence[Weights], rows: Tensor, activation: Activation) -> Tensor:
    """Codes (R, N, H) of rows (N, D), which all replicates share, or (R, N, D)."""
    h = rows if rows.ndim == 3 else rows.expand(len(layers[0].encode), -1, -1)
    for layer in layers:
        h = activate(activation, torch.baddbmm(layer.encode_bias, h, layer.encode))
    return h


def decode(layers: Sequence[Weights], codes: Tensor, objective: Objective) -> Tensor:
    """The reconstruction (R, N, n) of codes (R, N, H)."""
    h, functions = codes, _outputs(objective, len(layers))
    for layer, function in zip(layers[::-1], functions[::-1], strict=True):
        h = activate(function, torch.baddbmm(layer.decode_bias, h, layer.decode))
    return h


def _outputs(objective: Objective, n_layers: int) -> list[Activation]:
    """What each layer reconstructs with: a deeper one with the bounded activation of its inputs."""
    bounded = objective.activation in ("sigmoid", "tanh")
    deeper: Activation = objective.activation if bounded else "linear"
    return [objective.output] + [deeper] * (n_layers - 1)


def encoder_of(
    layers: Sequence[Weights], seeds: Sequence[int], activation: Activation, *, fine_tune: bool
) -> Encoder:
    """The encoding half, as initial layers of a `StackedMLP`."""
    halves = tuple((layer.encode.float(), layer.encode_bias.float()) for layer in layers)
    return Encoder(tuple(seeds), halves, activation, fine_tune)


def _train(
    table: Tensor,
    target: Tensor,
    width: int,
    seeds: Sequence[int],
    objective: Objective,
    optimiser: Optimiser,
    masking: Masking | None = None,
) -> Weights:
    observed = None
    if target.isnan().any():
        observed = (~target.isnan()).to(table.dtype)
        target = target.nan_to_num(nan=0.0)
    weights = _initial(table, target.shape[-1], width, seeds)
    if optimiser.solver == "lbfgs":
        return _lbfgs(weights, table, target, observed, objective, optimiser)
    masked = masking(seeds, table) if masking is not None else None
    _adam(weights, table, target, observed, seeds, objective, optimiser, masked)
    return weights


def _initial(table: Tensor, n_out: int, width: int, seeds: Sequence[int]) -> Weights:
    rngs = [np.random.Generator(stream(seed, PRETRAINING_WEIGHTS)) for seed in seeds]

    def drawn(n_in: int, n_out: int) -> Tensor:
        bound = (6 / (n_in + n_out + 1)) ** 0.5
        weight = np.stack([rng.uniform(-bound, bound, (n_in, n_out)) for rng in rngs])
        return torch.from_numpy(weight).to(table)

    w1, w2 = drawn(table.shape[-1], width), drawn(width, n_out)
    zeros = [w.new_zeros(len(seeds), 1, w.shape[2]) for w in (w1, w2)]
    return Weights(w1, zeros[0], w2, zeros[1])


def _adam(
    weights: Weights,
    table: Tensor,
    target: Tensor,
    observed: Tensor | None,
    seeds: Sequence[int],
    objective: Objective,
    optimiser: Optimiser,
    masked: MaskedRows | None,
) -> None:
    """Change the weights in place, each seed by batches of its own order of the rows."""
    rngs = [np.random.Generator(stream(seed, PRETRAINING)) for seed in seeds]
    n_rows = table.shape[-2]
    size = min(optimiser.batch_size, n_rows)
    shape = (-(-n_rows // size), size)
    adam = torch.optim.Adam(weights, optimiser.learning_rate, fused=True)
    rho_hat: Tensor | None = None
    for _ in range(optimiser.epochs):
        orders = [np.resize(rng.permutation(n_rows), shape) for rng in rngs]
        for rows in torch.from_numpy(np.stack(orders, axis=1)).to(table.device):
            x = gather(table, rows) if masked is None else masked.take(rows, seeds)
            seen = None if observed is None else gather(observed, rows)
            t = x if target is table and masked is None else gather(target, rows)
            before = rho_hat if objective.running_mean else None
            _, gradient, rho_hat = cost_and_gradient(weights, x, t, seen, objective, before)
            for tensor, slope in zip(weights, gradient, strict=True):
                tensor.grad = slope
            adam.step()
    for tensor in weights:
        tensor.grad = None


def _lbfgs(
    weights: Weights,
    table: Tensor,
    target: Tensor,
    observed: Tensor | None,
    objective: Objective,
    optimiser: Optimiser,
) -> Weights:
    """SciPy's L-BFGS-B, one replicate after the other; the cost is computed in the table's type."""

    def cost(flat: NDArray[np.float64], r: int) -> tuple[float, NDArray[np.float64]]:
        at = _unflatten(torch.from_numpy(flat).to(table), weights)
        seen = None if observed is None else _of(observed, r)
        rows, wanted = _of(table, r), _of(target, r)
        value, gradient, _ = cost_and_gradient(at, rows, wanted, seen, objective)
        return value.item(), torch.cat([g.flatten() for g in gradient]).cpu().double().numpy()

    found = []
    for r in range(len(weights.encode)):
        start = torch.cat([w[r].flatten() for w in weights]).cpu().double().numpy()
        options = {"maxiter": optimiser.epochs, "maxfun": 2 * optimiser.epochs, "maxcor": 20}
        end = minimize(cost, start, (r,), "L-BFGS-B", jac=True, options=options).x
        found.append(_unflatten(torch.from_numpy(end).to(table), weights))
    return Weights(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _unflatten(flat: Tensor, like: Weights) -> Weights:
    parts = flat.split([w[0].numel() for w in like])
    return Weights(*(p.view(1, *w.shape[1:]) for p, w in zip(parts, like, strict=True)))


def _of(tensor: Tensor, replicate: int) -> Tensor:
    """The replicate's own rows, (1, N, D)."""
    return tensor[None] if tensor.ndim == 2 else tensor[replicate : replicate + 1]


class SparseAutoencoder(ClassNamePrefixFeaturesOutMixin, RowTransformer):
    """One hidden layer whose units are active for few rows each.

    The cost is that of `cost_and_gradient`. Rows are scaled beforehand; missing entries are NaN and
    have no part in the cost.

    Parameters
    ----------
    units : hidden units
    activation, output : `sigmoid`, `tanh`, `relu` or `linear`, of hidden units and reconstruction
    rho, beta : target of each unit's mean activation, and weight of missing it; with beta 0 this is
        the plain autoencoder
    weight_decay : λ
    running_mean : share of the mean activation that stems from the batches before, with Adam
    fill : the entry of `ehr_sn.missing.METHODS` that makes the rows that are encoded
    denoise : at every step hide further observed entries of half of the rows, as training with
        `augment_missing` does, and reconstruct them too; with Adam
    solver : `adam`, or `lbfgs`, on all rows at once
    epochs : passes over the rows, or iterations of L-BFGS at most
    batch_size, learning_rate : of Adam
    seed : of initial weights, batches and what `denoise` hides

    Attributes
    ----------
    layers_ : list of one `Weights`, with R = 1
    method_ : the fitted pipeline that fills missing entries

    Examples
    --------
    >>> X = np.random.default_rng(0).normal(size=(200, 6))
    >>> X[::3, 1] = np.nan
    >>> codes = SparseAutoencoder(units=4, rho=0.1, beta=30, solver="lbfgs").fit_transform(X)
    >>> codes.shape, bool(codes.mean() < 0.15)
    ((200, 4), True)
    """

    layers_: list[Weights]
    method_: Pipeline

    def __init__(
        self,
        *,
        units: int = 64,
        activation: Activation = "sigmoid",
        output: Activation = "linear",
        rho: float = 0.05,
        beta: float = 3.0,
        weight_decay: float = 1e-4,
        running_mean: float = 0.0,
        fill: str = "zero",
        denoise: bool = False,
        solver: Solver = "adam",
        epochs: int = 50,
        batch_size: int = 256,
        learning_rate: float = 3e-3,
        seed: int = 0,
    ) -> None:
        self.units = units
        self.activation = activation
        self.output = output
        self.rho = rho
        self.beta = beta
        self.weight_decay = weight_decay
        self.running_mean = running_mean
        self.fill = fill
        self.denoise = denoise
        self.solver = solver
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.seed = seed

    @property
    def _widths(self) -> Sequence[int]:
        return (self.units,)

    @property
    def _n_features_out(self) -> int:
        return self._widths[-1]

    @property
    def _objective(self) -> Objective:
        return Objective(
            self.rho,
            self.beta,
            self.weight_decay,
            self.activation,
            self.output,
            self.running_mean,
        )

    def _fit(self, X: NDArray[np.floating]) -> None:
        if not self._widths or min(self._widths) < 1:
            raise ValueError(f"units must be 1 or more, not {self._widths!r}")
        self.method_ = make_method(self.fill, scaler="none", winsorise=0).fit(X)
        masking = masking_of(self.method_, X, np.arange(X.shape[1])) if self.denoise else None
        self.layers_ = pretrain(
            torch.from_numpy(self.method_.transform(X)),
            torch.from_numpy(np.require(self.method_[:-1].transform(X), requirements="W")),
            self._widths,
            seeds=[self.seed],
            objective=self._objective,
            optimiser=Optimiser(self.solver, self.epochs, self.batch_size, self.learning_rate),
            masking=masking,
        )

    def _transform(self, X: NDArray[np.floating]) -> NDArray[np.floating]:
        rows = self.method_.transform(X)
        steps = [(layer.encode, layer.encode_bias, self.activation) for layer in self.layers_]
        return _through(steps, rows)

    def inverse_transform(self, codes: ArrayLike) -> NDArray[np.floating]:
        """Reconstruction (n_rows, n_features), without NaN, of codes (n_rows, units)."""
        check_is_fitted(self)
        checked = check_array(codes, dtype=[np.float64, np.float32])
        functions = _outputs(self._objective, len(self.layers_))
        steps = [
            (layer.decode, layer.decode_bias, function)
            for layer, function in zip(self.layers_, functions, strict=True)
        ]
        return _through(steps[::-1], checked)

    def score(self, X: ArrayLike, y: object = None) -> float:
        """Minus the mean squared error of the reconstruction, over the observed entries of X."""
        codes = self.transform(X)
        error = self.inverse_transform(codes) - self._checked(X, reset=False)
        return -float(np.nanmean(np.square(error)))

    def encoder(self, *, fine_tune: bool = True) -> Encoder:
        """Return the weights as the first layers of `StackedMLP`s with this seed."""
        check_is_fitted(self)
        return encoder_of(self.layers_, [self.seed], self.activation, fine_tune=fine_tune)


class StackedSparseAutoencoder(SparseAutoencoder):
    """Sparse autoencoders upon one another, trained greedily: each on the codes of the one below.

    As `SparseAutoencoder`, but for `units`, the hidden units of each layer from the bottom. The
    code is the topmost layer's, and all layers together reconstruct. A classifier on top tunes the
    whole from there: see `encoder`.

    Y. Bengio, P. Lamblin, D. Popovici, H. Larochelle, "Greedy Layer-Wise Training of Deep
    Networks", NeurIPS 2006.

    >>> X = np.random.default_rng(0).normal(size=(200, 6))
    >>> StackedSparseAutoencoder(units=(5, 3)).fit(X).transform(X).shape
    (200, 3)
    """

    units: Sequence[int]  # type: ignore[assignment]

    @property
    def _widths(self) -> Sequence[int]:
        return np.atleast_1d(self.units).tolist()


def _through(
    steps: Sequence[tuple[Tensor, Tensor, Activation]], rows: NDArray[np.floating]
) -> NDArray[np.floating]:
    """Rows through layers of one replicate, each row to the same bits whatever surrounds it."""
    done = []
    for start in range(0, len(rows), BLOCK):
        h = rows[start : start + BLOCK]
        for weight, bias, function in steps:
            z = product(h, weight[0].numpy().astype(h.dtype)) + bias[0].numpy().astype(h.dtype)
            h = FUNCTIONS[function](z)
        done.append(h)
    return np.concatenate(done)
