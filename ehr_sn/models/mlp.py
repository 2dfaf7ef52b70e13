"""Features → logits of disease: R independent multilayer perceptrons, stacked to compute as one.

A *replicate* is one place along the first axis of every tensor here: its weights, its inputs, its
logits. One batched matrix product does the work of R small ones, and replicate r computes what it
would compute alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ehr_sn.models.layers import (
    ACTIVATIONS,
    Embedding,
    Encoder,
    ExpectedReLU,
    NeuMiss,
    SparsityNorm,
    StackedEmbedding,
    activate,
)
from ehr_sn.models.mixture import Mixture

INITIAL_WEIGHTS, SHUFFLING, DROPOUT, MASKING, INPUT_WEIGHTS = range(5)
PRETRAINING, PRETRAINING_WEIGHTS = range(5, 7)
NORM_MOMENTUM, NORM_EPSILON = 0.1, 1e-5  # as torch.nn.BatchNorm1d


def stream(seed: int, purpose: int) -> np.random.SFC64:
    """Random bits of one seed for one purpose, the same on every device.

    Nothing else that is drawn moves them. So replicates with one seed share initial weights,
    shuffles and dropout, whatever their task or method: *common random numbers*, which make the
    difference between two methods less noisy.

    >>> stream(3, SHUFFLING).random_raw() == stream(3, SHUFFLING).random_raw()
    True
    """
    return np.random.SFC64(np.random.SeedSequence([seed, purpose]))


class StackedLinear(nn.Module):
    """R affine maps, (R, B, n_in) to (R, B, n_out); their weights are (R, n_in, n_out)."""

    def __init__(self, weight: Tensor, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        zeros = weight.new_zeros(len(weight), 1, weight.shape[2])
        self.bias = nn.Parameter(zeros) if bias else None

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """``gain · x @ weight + bias``; scaling the small weight is cheaper than scaling x."""
        weight = self.weight if gain == 1.0 else self.weight * gain
        if self.bias is None:
            return torch.bmm(x, weight)
        if weight.shape[2] > 1:
            return torch.baddbmm(self.bias, x, weight)
        # With one column, sum(x · w) is several times faster than a batched matrix product.
        return (x * weight.transpose(1, 2)).sum(2, keepdim=True) + self.bias


class StackedEncoder(nn.Module):
    """Initial layers (R, B, D) to (R, B, H) that an `Encoder` gives, each replicate its seed's."""

    def __init__(self, encoder: Encoder, seeds: Sequence[int]) -> None:
        super().__init__()
        at = [encoder.seeds.index(seed) for seed in seeds]
        self.activation, self.fine_tune = encoder.activation, encoder.fine_tune
        self.layers = nn.ModuleList()
        for weight, bias in encoder.layers:
            layer = StackedLinear(weight[at])
            layer.bias = nn.Parameter(bias[at])
            self.layers.append(layer.requires_grad_(encoder.fine_tune))

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = activate(self.activation, layer(h))
        return h

    def state(self) -> dict[str, Tensor]:
        """What its weights do not tell."""
        return {
            "encoder.activation": torch.tensor(ACTIVATIONS.index(self.activation)),
            "encoder.fine_tune": torch.tensor(self.fine_tune),
        }


class StackedBatchNorm(nn.Module):
    """R batch normalisations, (R, B, n) to the same (Ioffe and Szegedy, ICML 2015).

    As `torch.nn.BatchNorm1d`: the batch's own moments in training, their running averages after.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, n_replicates: int, n_units: int) -> None:
        super().__init__()
        shape = (n_replicates, 1, n_units)
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = x.mean(1, keepdim=True)
            centred = x - mean
            var = centred.square().mean(1, keepdim=True)  # torch.var is 50 times slower here
            unbiased = x.shape[1] / max(x.shape[1] - 1, 1)
            self.running_mean.lerp_(mean.detach(), NORM_MOMENTUM)
            self.running_var.lerp_(var.detach() * unbiased, NORM_MOMENTUM)
        else:
            centred, var = x - self.running_mean, self.running_var
        return torch.addcmul(self.bias, centred, self.weight * torch.rsqrt(var + NORM_EPSILON))


class StackedMLP(nn.Module):
    """R perceptrons, each with ReLU hidden layers and one logit: (R, B, D) to (R, B).

    A hidden layer is linear, batch norm if asked for, ReLU, dropout in training. Replicate r's
    weights start from ``seeds[r]`` alone: uniform within ±1/√fan-in, PyTorch's own default, which
    on tuning rows did better than the larger start of He et al. (ICCV 2015); biases start at zero.
    All is float32.

    Parameters
    ----------
    n_features : D
    hidden : units of each hidden layer; none gives logistic regression
    seeds : R non-negative integers, which may repeat
    dropout : share of hidden units dropped in training, in [0, 1), to the nearest 1/256; the kept
        ones are scaled up to match (Srivastava et al., JMLR 15:1929, 2014)
    batch_norm : normalise each hidden layer over the batch, before its ReLU
    sparsity_norm : sparsity-normalise each hidden layer's output, with K = its number of units;
        units that dropout leaves out count as missing, and nothing else makes up for them
    neumiss : take rows [x | mask] of D columns in all, and fill x by a NeuMiss block first
    mixture : take rows [x | mask] of D columns in all, and let the first hidden layer give its
        expected ReLU under this distribution of what is missing; not with batch norm
    encoder : layers that come first, learned before; not with NeuMiss or a mixture
    embedding : units of each feature's own, which the first layer takes besides the input; not with
        an encoder, NeuMiss or a mixture

    Examples
    --------
    >>> model = StackedMLP(3, (8,), seeds=[0, 1])
    >>> model(torch.zeros(5, 3)).shape  # five rows that both replicates share
    torch.Size([2, 5])
    """

    def __init__(
        self,
        n_features: int,
        hidden: Sequence[int] = (64,),
        *,
        seeds: Sequence[int],
        dropout: float = 0.0,
        batch_norm: bool = False,
        sparsity_norm: bool = False,
        neumiss: bool = False,
        mixture: Mixture | None = None,
        encoder: Encoder | None = None,
        embedding: Embedding | None = None,
    ) -> None:
        super().__init__()
        if mixture is not None and (batch_norm or neumiss or not hidden):
            raise ValueError("an expected ReLU needs a hidden layer, and no batch norm or NeuMiss")
        self.seeds = tuple(seeds)
        self.dropout = round(dropout * 256) / 256
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, not {dropout}")
        rngs = [np.random.Generator(stream(seed, INITIAL_WEIGHTS)) for seed in self.seeds]
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        self.sparsity_norm = sparsity_norm
        takes_mask = neumiss or mixture is not None
        if encoder is not None and takes_mask:
            raise ValueError("NeuMiss and an expected ReLU take the mask, and no code for it")
        n_in = n_features // 2 if takes_mask else n_features
        self.encoder = None
        if encoder is not None:
            self.encoder = StackedEncoder(encoder, self.seeds)
            n_in = encoder.widths[-1]
        own = [np.random.Generator(stream(seed, INPUT_WEIGHTS)) for seed in self.seeds]
        self.embedding = None
        if embedding is not None:
            if encoder is not None or takes_mask:
                raise ValueError(
                    "an embedding takes columns of features, and nothing else's output"
                )
            n_in += embedding.width
        self.neumiss = self.expected = None
        if neumiss:
            self.neumiss = NeuMiss(_uniform(own, n_in, n_in), _uniform(own, n_in, n_in))
        if mixture is not None:
            self.expected = ExpectedReLU(mixture, len(rngs))
        weights = [_uniform(rngs, *shape) for shape in pairwise([n_in, *hidden, 1])]
        if embedding is not None:
            units, rest = weights[0].split([embedding.width, n_features], dim=1)
            weights[0] = rest.contiguous()
            units = units.transpose(1, 2).contiguous()
            self.embedding = StackedEmbedding(embedding, _embedded(own, embedding), units)
        for weight in weights[:-1]:
            # Batch norm cancels a bias before it: its gradient is rounding noise, which Adam would
            # scale up to full steps.
            self.layers.append(StackedLinear(weight, bias=not batch_norm))
            if batch_norm:
                self.norms.append(StackedBatchNorm(len(rngs), weight.shape[2]))
        self.output = StackedLinear(weights[-1])
        self._noise = {seed: stream(seed, DROPOUT) for seed in self.seeds}

    def __len__(self) -> int:
        """R, the number of replicates."""
        return len(self.seeds)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (R, B) of x: (R, B, D), or (B, D) for rows that all replicates share."""
        h = x if x.ndim == 3 else x.expand(len(self), -1, -1)
        dropout = self.dropout if self.training else 0.0
        gain = 1.0
        if self.encoder is not None:
            h = self.encoder(h)
        own = self.embedding(h) if self.embedding is not None else None
        if self.neumiss is not None:
            h = self.neumiss(h)
        for i, layer in enumerate(self.layers):
            if i == 0 and self.expected is not None:
                h = self.expected(h, layer.weight, layer.bias)
            else:
                h = layer(h, gain)
            if i == 0 and own is not None:
                h = h.add_(own)
            if self.norms:
                h = self.norms[i](h)
            if dropout:
                # A unit is dropped by a zero before its ReLU, through which no gradient flows
                # back: autograd need not know. Scaling the kept ones up is left to `gain`.
                h.detach().mul_(self._kept(h))
                gain = 1 / (1 - dropout)
            h = h.relu_()
            if self.sparsity_norm:
                h, gain = SparsityNorm(k=h.shape[2])(h), 1.0
        logit = self.output(h, gain)
        if not self.layers and own is not None:
            logit = logit + own
        return logit.squeeze(2)

    def _kept(self, h: Tensor) -> Tensor:
        """Which units of h (R, B, n) to keep: 1 or 0 (uint8), by a random byte a unit and seed."""
        shape, count = h.shape[1:], h[0].numel()
        noise = np.stack([bits.random_raw(-(-count // 8)) for bits in self._noise.values()])
        kept = noise.view(np.uint8)[:, :count] >= int(self.dropout * 256)
        by_seed = torch.from_numpy(kept.view(np.uint8)).to(h.device).view(-1, *shape)
        place = {seed: i for i, seed in enumerate(self._noise)}
        return by_seed.index_select(0, torch.tensor([place[s] for s in self.seeds]).to(h.device))

    @torch.no_grad()
    def predict_proba(
        self,
        x: Tensor | NDArray[np.float32],
        rows: Tensor | None = None,
        *,
        block: int = 1024,
    ) -> Tensor:
        """Probabilities (R, N), float32, of x (N, D), or of those `rows` of it.

        Rows are scored `block` (a multiple of 64) at a time, the last block padded with zeros. A
        matrix product of another shape may round differently; with one shape, a row gives bit for
        bit the same wherever it stands and whatever rows surround it, on one machine.
        """
        if isinstance(x, np.ndarray):
            x = torch.from_numpy(np.require(x, np.float32, "W"))
        n_rows = len(x) if rows is None else len(rows)
        device = self.output.weight.device
        padded = torch.zeros(block, x.shape[1], device=device)
        out = torch.empty(len(self), n_rows, device=device)
        was_training = self.training
        self.eval()
        for start in range(0, n_rows, block):
            part = slice(start, min(start + block, n_rows))
            n = part.stop - start
            padded[:n] = x[part] if rows is None else x.index_select(0, rows[part])
            padded[n:] = 0
            # One replicate at a time, lest threads share a replicate's rows out unevenly: sigmoid
            # rounds the elements that do not fill a last vector differently.
            for r, logits in enumerate(self(padded)):
                out[r, part] = logits.sigmoid()[:n]
        self.train(was_training)
        return out

    def keep(self, index: Sequence[int]) -> None:
        """Drop all other replicates, in place; the noise of those kept goes on as it would have."""
        self.seeds = tuple(self.seeds[i] for i in index)
        self._noise = {seed: self._noise[seed] for seed in self.seeds}
        for tensor in self.tensors().values():
            tensor.data = tensor.data[list(index)]

    @torch.no_grad()
    def put(self, index: Sequence[int], source: StackedMLP, at: Sequence[int]) -> None:
        """Overwrite the replicates `index` by those of `source` at `at`."""
        for mine, theirs in zip(self.tensors().values(), source.tensors().values(), strict=True):
            mine[list(index)] = theirs[list(at)]

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer by name, each with the replicates along its first axis."""
        return dict(self.named_parameters()) | dict(self.named_buffers())

    def select(self, index: Sequence[int]) -> Self:
        """A copy of some replicates, in the order of `index`; its dropout noise begins anew."""
        at = torch.as_tensor(index, dtype=torch.long)
        state = {name: t[at] if t.ndim else t for name, t in self.state().items()}
        return self.from_state(state).to(self.output.weight.device)

    def state(self) -> dict[str, Tensor]:
        """A copy of all there is to the model, on the CPU: flat and contiguous, for safetensors."""
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.tensors().items()}
        if self.encoder is not None:
            tensors |= self.encoder.state()
        return tensors | {
            "seeds": torch.tensor(self.seeds, dtype=torch.int64),
            "dropout": torch.tensor(self.dropout, dtype=torch.float64),
            "sparsity_norm": torch.tensor(self.sparsity_norm),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """The model whose `state()` this is, on the CPU.

        >>> model = StackedMLP(3, (8, 4), seeds=[0, 1], batch_norm=True)
        >>> x = torch.ones(1, 3)
        >>> torch.equal(StackedMLP.from_state(model.state())(x), model(x))
        True
        """
        n_layers = sum(name.startswith("layers.") and "weight" in name for name in state)
        weights = [state[f"layers.{i}.weight"] for i in range(n_layers)] + [state["output.weight"]]
        mixture = None
        if "expected.mean" in state:
            mixture = Mixture(*(state[f"expected.{name}"][0].numpy() for name in Mixture.NAMES))
        neumiss = "neumiss.weight" in state
        takes_mask = neumiss or mixture is not None
        seeds = state["seeds"].tolist()
        encoder = _encoder(state, seeds)
        n_features = (encoder.layers[0][0] if encoder else weights[0]).shape[1]
        embedding = None
        if "embedding.source" in state:
            source = state["embedding.source"][0].numpy()
            embedding = Embedding(source, units=state["embedding.own"].shape[2])
            n_features = len(source)
        model = cls(
            n_features * (2 if takes_mask else 1),
            [weight.shape[2] for weight in weights[:-1]],
            seeds=seeds,
            dropout=float(state["dropout"]),
            batch_norm="norms.0.weight" in state,
            sparsity_norm=bool(state["sparsity_norm"]),
            neumiss=neumiss,
            mixture=mixture,
            encoder=encoder,
            embedding=embedding,
        )
        for name, tensor in model.tensors().items():
            tensor.data = state[name].detach().clone()
        return model


def _encoder(state: Mapping[str, Tensor], seeds: Sequence[int]) -> Encoder | None:
    """The encoder in a model's state. Fine-tuned, replicates of one seed differ: the first's."""
    if "encoder.activation" not in state:
        return None
    n_layers = sum(name.startswith("encoder.layers.") for name in state) // 2
    layers = [
        (state[f"encoder.layers.{i}.weight"], state[f"encoder.layers.{i}.bias"])
        for i in range(n_layers)
    ]
    activation = ACTIVATIONS[int(state["encoder.activation"])]
    return Encoder(tuple(seeds), tuple(layers), activation, bool(state["encoder.fine_tune"]))


def _uniform(rngs: Sequence[np.random.Generator], n_in: int, n_out: int) -> Tensor:
    """Weights (R, n_in, n_out), each replicate's from its own generator."""
    bound = n_in**-0.5
    drawn = np.stack([rng.uniform(-bound, bound, (n_in, n_out)) for rng in rngs])
    return torch.from_numpy(drawn.astype(np.float32))


def _embedded(rngs: Sequence[np.random.Generator], embedding: Embedding) -> Tensor:
    """Weights (R, F, E, widest), uniform within ±1/√(columns of the feature)."""
    columns = embedding.columns
    bound = (columns >= 0).sum(axis=1)[:, None, None] ** -0.5
    shape = (len(columns), embedding.units, columns.shape[1])
    drawn = np.stack([rng.uniform(-bound, bound, shape) for rng in rngs])
    return torch.from_numpy(drawn.astype(np.float32))
