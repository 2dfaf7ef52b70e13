"""Images with their observed pixels → VGG networks that name their class, without and with SN."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ehr_sn.models.fit import TrainingError
from ehr_sn.models.layers import SparsityNorm, SparsityNormConv2d
from ehr_sn.models.mlp import INITIAL_WEIGHTS, SHUFFLING, stream
from ehr_sn.studies.images import Images

KERNEL = 3
BLOCK = 512
"""Images scored at once."""

Pooled = Literal["pool"]
POOL: Pooled = "pool"


@dataclass(frozen=True)
class Layout:
    """A VGG: channels of its convolutions, all 3 × 3, with pooling between; units of dense layers.

    K. Simonyan and A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition", ICLR 2015, arXiv 1409.1556. For images of 32 × 32 pixels the dense layers have 512
    units in place of 4,096.
    """

    name: str
    convolutions: tuple[int | Pooled, ...]
    dense: tuple[int, ...]


VGG_16 = Layout(
    "VGG-16",
    (64, 64, POOL, 128, 128, POOL, *(256,) * 3, POOL, *(512,) * 3, POOL, *(512,) * 3, POOL),
    (512, 512),
)
VGG_6 = Layout("VGG-6", (16, 16, POOL, 32, 32, POOL), (64,))


class VGG(nn.Module):
    """Images (B, C, H, W) to logits (B, classes), for square images.

    A layer is a convolution or a dense layer, batch norm if asked for, and ReLU. With
    `sparsity_norm` what each layer is given is sparsity-normalised, K being its mean count: in the
    first layer by the pixels observed, in the others by the activations that are not zero. Weights
    start as in K. He et al., ICCV 2015 (arXiv 1502.01852), from the seed alone; biases at zero.
    """

    def __init__(
        self,
        image: tuple[int, int],
        n_classes: int,
        layout: Layout,
        *,
        width: float = 1.0,
        batch_norm: bool = False,
        sparsity_norm: bool = False,
        seed: int,
    ) -> None:
        """`image` : channels and side; `width` : the share of the layout's channels and units."""
        super().__init__()
        n_in, side = image
        steps: list[nn.Module] = []
        for size in layout.convolutions:
            if size == POOL:
                steps.append(nn.MaxPool2d(2))
                side //= 2
                continue
            n_out = max(round(size * width), 1)
            conv: nn.Conv2d
            if sparsity_norm:
                conv = SparsityNormConv2d(
                    n_in, n_out, KERNEL, SparsityNorm("mean"), padding=1, bias=not batch_norm
                )
            else:
                conv = nn.Conv2d(n_in, n_out, KERNEL, padding=1, bias=not batch_norm)
            steps += [conv, *[nn.BatchNorm2d(n_out)] * batch_norm, nn.ReLU(inplace=True)]
            n_in = n_out
        steps.append(nn.Flatten())
        n_in *= side**2
        for size in layout.dense:
            n_out = max(round(size * width), 1)
            steps += [*_row_norm(sparsity_norm), nn.Linear(n_in, n_out, bias=not batch_norm)]
            steps += [*[nn.BatchNorm1d(n_out)] * batch_norm, nn.ReLU(inplace=True)]
            n_in = n_out
        steps += [*_row_norm(sparsity_norm), nn.Linear(n_in, n_classes)]
        self.first, *rest = steps
        self.rest = nn.Sequential(*rest)
        rng = np.random.Generator(stream(seed, INITIAL_WEIGHTS))
        for layer in steps:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                drawn = rng.standard_normal(tuple(layer.weight.shape), dtype=np.float32)
                drawn *= math.sqrt(2 / layer.weight[0].numel())
                layer.weight.data.copy_(torch.from_numpy(drawn))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, observed: Tensor) -> Tensor:
        """x holds 0 where a pixel is not observed; observed : bool (B, 1, H, W)."""
        normalised = isinstance(self.first, SparsityNormConv2d)
        h = self.first(x, observed) if normalised else self.first(x)
        logits: Tensor = self.rest(h)
        return logits


@dataclass(frozen=True)
class Budget:
    """How a network trains: AdamW, its learning rate falling to 0 along half a cosine."""

    learning_rate: float
    weight_decay: float
    batch_size: int
    epochs: int


class Inputs:
    """Images as inputs on a device: pixels scaled, then 0 where not observed.

    `minmax` takes pixels to [0, 1]; `standard` each channel to mean 0 and variance 1 over the
    observed pixels of the images `train`.
    """

    def __init__(
        self,
        images: Images,
        observed: NDArray[np.bool_],
        train: NDArray[np.int64],
        scaler: Literal["minmax", "standard"],
        device: torch.device,
    ) -> None:
        self.pixels = torch.from_numpy(images.pixels).to(device)
        self.labels = torch.from_numpy(images.labels).to(device)
        channels = images.pixels.shape[1]
        shift, scale = np.zeros(channels), np.full(channels, images.top)
        if scaler == "standard":
            seen = [images.pixels[train, c][observed[train, 0]] for c in range(channels)]
            shift, scale = np.array([s.mean() for s in seen]), np.array([s.std() for s in seen])
        self.shift, self.scale = self._placed(shift), self._placed(scale)
        self.observed = torch.from_numpy(observed).to(device)
        self.gain = self._placed(np.ones((len(images), 1)))

    def observing(self, observed: NDArray[np.bool_]) -> Inputs:
        """The same images with other pixels observed."""
        other = copy.copy(self)
        other.observed = torch.from_numpy(observed).to(self.pixels.device)
        return other

    def times(self, gain: NDArray[np.floating]) -> Inputs:
        """The same images, each times its own gain (N,)."""
        other = copy.copy(self)
        other.gain = self._placed(gain[:, None])
        return other

    def counts(self) -> NDArray[np.int64]:
        """Observed pixels of each image, (N,)."""
        count: NDArray[np.int64] = self.observed.sum(dim=(1, 2, 3)).cpu().numpy()
        return count

    def _placed(self, numbers: NDArray[Any]) -> Tensor:
        at = torch.tensor(numbers, dtype=torch.float32, device=self.pixels.device)
        return at[..., None, None]

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and their observed pixels (B, 1, H, W)."""
        observed = self.observed[rows]
        x = (self.pixels[rows] - self.shift) / self.scale * (observed * self.gain[rows])
        if x.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, observed


def fit_network(
    model: VGG,
    inputs: Inputs,
    rows: NDArray[np.int64],
    tuning: NDArray[np.int64],
    budget: Budget,
    *,
    seed: int,
) -> float:
    """Train in place on cross-entropy; returns the accuracy on the tuning rows.

    The epoch that is kept has the highest such accuracy, of equal ones the last. Networks of one
    seed share their shuffles. On CUDA it computes in bfloat16, channels last.

    Raises
    ------
    TrainingError
        A loss became infinite or NaN.
    """
    device = inputs.pixels.device
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(
        model.parameters(), budget.learning_rate, weight_decay=budget.weight_decay, fused=True
    )
    steps = -(-len(rows) // budget.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps * budget.epochs)
    rng = np.random.Generator(stream(seed, SHUFFLING))
    best, kept = -1.0, model.state_dict()
    for epoch in range(budget.epochs):
        model.train()
        total = torch.zeros((), device=device)
        for batch in np.array_split(rng.permutation(rows), steps):
            at = torch.from_numpy(batch).to(device)
            with _autocast(device):
                loss = cross_entropy(model(*inputs.take(at)), inputs.labels[at])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.detach()
        if not math.isfinite(total):
            raise TrainingError(
                f"the loss became {float(total)} in epoch {epoch}; try a learning_rate below "
                f"{budget.learning_rate:g}"
            )
        right = predict(model, inputs, tuning).argmax(1) == inputs.labels[tuning].cpu().numpy()
        if right.mean() >= best:
            best, kept = float(right.mean()), copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return best


@torch.no_grad()
def predict(model: VGG, inputs: Inputs, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Probabilities (n, classes) of the images `rows`."""
    device = inputs.pixels.device
    was_training = model.training
    model.eval()
    found = []
    for start in range(0, len(rows), BLOCK):
        at = torch.from_numpy(rows[start : start + BLOCK]).to(device)
        with _autocast(device):
            logits = model(*inputs.take(at))
        found.append(logits.float().softmax(1).cpu().numpy())
    model.train(was_training)
    return np.concatenate(found)


def _row_norm(wanted: bool) -> list[nn.Module]:
    return [SparsityNorm("mean")] if wanted else []


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
