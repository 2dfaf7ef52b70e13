"""Rows with their mask, or hidden activations → what the next layer of stacked networks takes.

Layers for missing entries. As in mlp.py, the first axis of every tensor is the replicate's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ehr_sn.models.mixture import Mixture

NEUMISS_DEPTH = 5
"""Terms of the Neumann series."""

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


class SparsityNorm(nn.Module):
    """Sparsity Normalization as a layer: (K / max(|m|₁, 1)) ** exponent · (m ⊙ h).

    h : (…, n). Without `observed`, m is where h is not zero: the units that a ReLU, or dropout, let
    through. It has no parameters, and no gradient flows through the count.

    J. Yi, J. Lee, K. J. Kim, S. J. Hwang, E. Yang, "Why Not to Use Zero Imputation? Correcting
    Sparsity Bias in Training Neural Networks", ICLR 2020, arXiv 1906.00150.

    >>> SparsityNorm(k=4)(torch.tensor([[0.0, 2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]]))
    tensor([[0., 4., 0., 6.],
            [0., 0., 0., 0.]])
    """

    def __init__(self, k: float, exponent: float = 1.0) -> None:
        super().__init__()
        if not 0 < k < math.inf or not 0 <= exponent <= 1:
            raise ValueError(f"k must be positive and exponent in [0, 1]; got {k!r}, {exponent!r}")
        self.k, self.exponent = k, exponent

    def forward(self, h: Tensor, observed: Tensor | None = None) -> Tensor:
        m = h != 0 if observed is None else observed
        factor = (self.k / m.sum(-1, keepdim=True).clamp(min=1).to(h.dtype)) ** self.exponent
        return factor * (h if observed is None else h.where(observed, h.new_zeros(())))


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
