"""Rows with their mask, or hidden activations → what the next layer of stacked networks takes.

Layers for missing entries. In those of stacked networks, as in mlp.py, the first axis of every
tensor is the replicate's; `SparsityNorm` takes any shape, `SparsityNormConv2d` images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, pad

from ehr_sn.models.mixture import Mixture

NEUMISS_DEPTH = 5
"""Terms of the Neumann series."""

MEAN_COUNT_MOMENTUM = 0.1
"""Weight of the newest batch in the running average of counts, as in batch normalisation."""

LEAST_VARIANCE = 1e-12
"""Below it a sum of missing entries' variances counts as none."""

Activation = Literal["sigmoid", "tanh", "relu", "linear"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


def activate(name: Activation, z: Tensor) -> Tensor:
    """The activation function of that name; `linear` changes nothing."""
    return z if name == "linear" else getattr(torch, name)(z)


@dataclass(frozen=True)
class Encoder:
    """Layers that were learned before the network, and without labels, by each seed for itself.

    seeds : S seeds
    layers : for each layer its weight (S, n_in, n_out) and bias (S, 1, n_out)
    fine_tune : whether the network trains them on
    """

    seeds: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]
    activation: Activation
    fine_tune: bool

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of each layer."""
        return tuple(weight.shape[2] for weight, _ in self.layers)


@dataclass(frozen=True)
class Embedding:
    """Units of each feature's own, which see the columns that stem from it and no others.

    source : (D,) the feature, from 0, that each column of the input stems from; −1 for none
    units : how many each feature has
    """

    source: NDArray[np.integer]
    units: int

    @property
    def columns(self) -> NDArray[np.int64]:
        """(F, widest) the columns of each feature; −1 where it has fewer than the one with most."""
        n_features = int(self.source.max()) + 1
        own = [np.flatnonzero(self.source == feature) for feature in range(n_features)]
        columns = np.full((n_features, max(map(len, own))), -1)
        for row, places in zip(columns, own, strict=True):
            row[: len(places)] = places
        return columns

    @property
    def width(self) -> int:
        """Units of all features."""
        return self.units * (int(self.source.max()) + 1)


class StackedEmbedding(nn.Module):
    """What each feature's own units add to a layer that takes the input: (R, B, D) to (R, B, H).

    A unit is the ReLU of an affine map of the columns of one feature (its value, its bins, whether
    it is observed). With it the layer combines curves of features and not only values.

    Y. Gorishniy, I. Rubachev, A. Babenko, "On Embeddings for Numerical Features in Tabular Deep
    Learning", NeurIPS 2022, arXiv 2203.05556.

    Parameters
    ----------
    own : (R, F, E, widest), the units' weights, in the order of `Embedding.columns`
    weight : (R, H, F·E), the layer's for them
    """

    source: Tensor

    def __init__(self, embedding: Embedding, own: Tensor, weight: Tensor) -> None:
        super().__init__()
        replicates, features, units, _ = own.shape
        self.own, self.weight = nn.Parameter(own), nn.Parameter(weight)
        self.bias = nn.Parameter(own.new_zeros(replicates, features, units, 1))
        source = torch.from_numpy(np.asarray(embedding.source, dtype=np.int64))
        self.register_buffer("source", source.repeat(replicates, 1))
        columns = torch.from_numpy(embedding.columns)
        # A place without a column takes any, with weight 0. Not buffers: replicates share them.
        self.columns, self.there = columns.clamp(min=0).flatten(), (columns >= 0)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        # Rows stand along the last axis, so that no step copies or strides over the many units.
        replicates, features, units, widest = self.own.shape
        columns = x.transpose(1, 2).index_select(1, self.columns.to(x.device))
        columns = columns.reshape(replicates * features, widest, -1)
        own = (self.own * self.there.to(x.device)).flatten(0, 1)
        h = torch.baddbmm(self.bias.flatten(0, 1), own, columns).relu_()
        return torch.bmm(self.weight, h.view(replicates, features * units, -1)).transpose(1, 2)


class SparsityNorm(nn.Module):
    """Sparsity Normalization as a layer: (K / max(|m|₁, 1)) ** exponent · (m ⊙ h).

    h : (…, n). Without `observed`, m is where h is not zero: the units that a ReLU, or dropout, let
    through. It has no parameters, and no gradient flows through the count.

    With `k="mean"`, K is the mean of |m|₁ over training batches: the first batch's, then a running
    average, as batch normalisation keeps its moments. Training and scoring use that one number, so
    that the layer keeps the average scale of what it is given.

    J. Yi, J. Lee, K. J. Kim, S. J. Hwang, E. Yang, "Why Not to Use Zero Imputation? Correcting
    Sparsity Bias in Training Neural Networks", ICLR 2020, arXiv 1906.00150.

    >>> SparsityNorm(k=4)(torch.tensor([[0.0, 2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]]))
    tensor([[0., 4., 0., 6.],
            [0., 0., 0., 0.]])
    """

    mean_count: Tensor

    def __init__(self, k: float | Literal["mean"], exponent: float = 1.0) -> None:
        super().__init__()
        if (k != "mean" and not 0 < k < math.inf) or not 0 <= exponent <= 1:
            raise ValueError(
                f'k must be positive or "mean", and exponent in [0, 1]; got {k!r}, {exponent!r}'
            )
        self.k, self.exponent = k, exponent
        if k == "mean":
            self.register_buffer("mean_count", torch.zeros(()))

    def forward(self, h: Tensor, observed: Tensor | None = None) -> Tensor:
        m = h != 0 if observed is None else observed
        count = m.sum(-1, keepdim=True).to(torch.promote_types(h.dtype, torch.float32))
        return self.factor(count).to(h.dtype) * (
            h if observed is None else h.where(observed, h.new_zeros(()))
        )

    def factor(self, count: Tensor) -> Tensor:
        """What entries are times of which so many (floats, any shape) are counted together."""
        k = self.k if self.k != "mean" else self._mean(count)
        return (k / count.clamp(min=1)) ** self.exponent

    def _mean(self, count: Tensor) -> Tensor:
        """The mean of training batches' counts, in training with this one; at least 1."""
        if self.training:
            mean = count.mean(dtype=torch.float32)
            share = torch.where(self.mean_count == 0, 1.0, MEAN_COUNT_MOMENTUM)
            self.mean_count.lerp_(mean, share)
        return self.mean_count.clamp(min=1).to(count.dtype)


class SparsityNormConv2d(nn.Conv2d):
    """A convolution whose every window is sparsity-normalised: (B, C, H, W) to (B, C', H', W').

    For a window x with mask m, and the filter w and bias b of an output channel, it gives

        (K / max(|m|₁, 1)) ** exponent · w·(m ⊙ x) + b

    with |m|₁ counted over all input channels. Without `observed`, m is where x is not zero. Padding
    is not observed: a window at the border counts only what it holds. With `norm.k` the size of a
    window (C · kernel area) it is, but for windows with nothing observed, the partial convolution
    of G. Liu et al., "Image Inpainting for Irregular Holes Using Partial Convolutions", ECCV 2018,
    arXiv 1804.07723; over one window that spans the input, a dense layer after `SparsityNorm`.

    >>> conv = SparsityNormConv2d(1, 1, 2, SparsityNorm(k=4), bias=False)
    >>> _ = nn.init.ones_(conv.weight)
    >>> conv(torch.tensor([[[[1.0, 2.0], [0.0, 0.0]]]])).item()  # 4 / 2 · (1 + 2)
    6.0
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm: SparsityNorm,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.norm, self.padded = norm, padding

    def forward(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """`observed` : bool (B, C, H, W), or (B, 1, H, W) for all channels of a pixel together."""
        if observed is not None:
            x = x.where(observed, x.new_zeros(()))
        with torch.no_grad():
            m = x != 0 if observed is None else observed.expand_as(x)
            # In float32, since lower precision cannot hold the counts of large windows.
            held = m.sum(1, keepdim=True, dtype=torch.float32)
            held = pad(held, 4 * (self.padded,))
            count = avg_pool2d(held, self.kernel_size, self.stride, divisor_override=1)
            factor = self.norm.factor(count)
        out = conv2d(x, self.weight, None, self.stride, self.padding)
        out = out * factor.to(out.dtype)
        return out if self.bias is None else out + self.bias.to(out.dtype)[:, None, None]


class NeuMiss(nn.Module):
    """Fills missing entries by a learned map of the observed ones: (R, B, 2D) to (R, B, D).

    For jointly normal features with mean μ and covariance Σ, the missing entries' expectation given
    the observed ones is μ_mis + Σ_mis,obs Σ_obs⁻¹ (x_obs − μ_obs). The inverse is a Neumann series,
    of which each turn of the loop computes a term, with one matrix for every pattern of
    missingness: with W = I − αΣ and V = αΣ (α small enough that W is a contraction) the block
    converges to that expectation as the depth grows. Here μ, W and V are learned; W is shared by
    all turns.

    M. Le Morvan, J. Josse, T. Moreau, E. Scornet, G. Varoquaux, "NeuMiss networks: differentiable
    programming for supervised learning with missing values", NeurIPS 2020, arXiv 2007.01627.

    Parameters
    ----------
    weight, mixing : (R, D, D), the first W and V
    depth : turns of the loop

    The input is [x | m], with 0 in x where m is 0; observed entries come out as they are.
    """

    def __init__(self, weight: Tensor, mixing: Tensor, depth: int = NEUMISS_DEPTH) -> None:
        super().__init__()
        self.weight, self.mixing = nn.Parameter(weight), nn.Parameter(mixing)
        self.mean = nn.Parameter(weight.new_zeros(len(weight), 1, weight.shape[1]))
        self.depth = depth

    def forward(self, rows: Tensor) -> Tensor:
        x, m = rows.chunk(2, dim=2)
        centred = (x - self.mean) * m
        h = centred
        for _ in range(self.depth):
            h = torch.bmm(h, self.weight) * m + centred
        return x + (1 - m) * torch.baddbmm(self.mean, h, self.mixing)


class ExpectedReLU(nn.Module):
    """The mean of a ReLU layer over what the missing entries may be: (R, B, 2D) to (R, B, H).

    What is missing follows a Gaussian mixture with diagonal covariances, given what is observed:
    component c has the posterior weight p_c(x_obs), and then w·x + b is normal, with mean a_c and
    variance s_c² (the missing entries' sum of w_j² σ²_cj). So with t = a_c / s_c the unit gives

        Σ_c p_c(x_obs) (s_c φ(t) + a_c Φ(t))

    and for a complete row ReLU(w·x + b). The mixture is that of all training rows and is not
    trained on, unlike the authors': it says what the features are, not what predicts.

    M. Śmieja, Ł. Struski, J. Tabor, B. Zieliński, P. Spurek, "Processing of missing data by neural
    networks", NeurIPS 2018, arXiv 1805.07405.
    """

    log_weight: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, mixture: Mixture, n_replicates: int) -> None:
        super().__init__()
        for name in Mixture.NAMES:
            array = torch.from_numpy(getattr(mixture, name).astype(np.float32))
            self.register_buffer(name, array.expand(n_replicates, *array.shape).clone())

    def forward(self, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The layer's expected output, for its weight (R, D, H) and bias (R, 1, H)."""
        x, m = rows.chunk(2, dim=2)
        posterior = self._posterior(x, m)
        known = torch.baddbmm(bias, x, weight)
        missing, squared = 1 - m, weight.square()
        expected = torch.zeros_like(known)
        for c in range(self.mean.shape[1]):
            centre = known + torch.bmm(missing * self.mean[:, c, None], weight)
            variance = torch.bmm(missing * self.variance[:, c, None], squared)
            spread = variance.clamp(min=LEAST_VARIANCE).sqrt()
            t = centre / spread
            density = torch.exp(-0.5 * t.square()) / math.sqrt(2 * math.pi)
            part = spread * density + centre * torch.special.ndtr(t)
            expected = expected + posterior[:, :, c, None] * part
        return expected

    def _posterior(self, x: Tensor, m: Tensor) -> Tensor:
        """p_c(x_obs): (R, B, C)."""
        precision = (1 / self.variance).transpose(1, 2)
        mean = self.mean.transpose(1, 2)
        constant = -0.5 * (precision * mean.square() - torch.log(precision / (2 * math.pi)))
        logits = torch.baddbmm(self.log_weight[:, None], x.square(), -0.5 * precision)
        logits = torch.baddbmm(logits, x, precision * mean)
        return torch.baddbmm(logits, m, constant).softmax(dim=2)
