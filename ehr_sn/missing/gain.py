"""Scaled rows with NaN → complete rows, by a generator trained against a discriminator."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from ehr_sn.missing.imputers import register
from ehr_sn.missing.model_imputer import ModelImputer, Rows, product

__all__ = ["GainImputer"]

BATCH = 128
NOISE = 0.01  # the largest value that the generator sees where an entry is missing


@register("gain")
class GainImputer(ModelImputer):
    """Generative Adversarial Imputation Nets.

    J. Yoon, J. Jordon, M. van der Schaar, "GAIN: Missing Data Imputation using Generative
    Adversarial Nets", ICML 2018. The generator G completes a row from its observed entries, scaled
    to [0, 1], the mask m, and noise where an entry is missing; the discriminator D guesses from
    the completed row and a hint, which tells most of m, which entries were observed:

        D minimises  −mean of m log D + (1 − m) log(1 − D)
        G minimises  −mean of (1 − m) log D + alpha · mean squared error of its observed entries

    The noise was drawn once, a number a column, so that filling is a function of the row alone.
    Both networks have two hidden ReLU layers. Nothing is trained after `fit`.

    Parameters
    ----------
    hint_rate : share of m that the hint tells
    alpha : weight of reconstructing what was observed
    epochs : passes over the training rows, in batches of 128
    max_units : width of the hidden layers, at most; else twice the number of columns, and 16 or
        more
    max_rows : training rows it is trained on, at most

    Attributes
    ----------
    noise_ : float32 array (p,)
    weight_1_, bias_1_, weight_2_, bias_2_, weight_3_, bias_3_ : float32 arrays, the generator
    """

    def __init__(
        self,
        *,
        hint_rate: float = 0.9,
        alpha: float = 100.0,
        epochs: int = 20,
        max_units: int = 128,
        max_rows: int = 10_000,
        seed: int = 0,
        add_mask: bool = False,
    ) -> None:
        super().__init__(max_rows=max_rows, seed=seed, add_mask=add_mask)
        self.hint_rate = hint_rate
        self.alpha = alpha
        self.epochs = epochs
        self.max_units = max_units

    def _learn(self, Z: Rows) -> None:
        n = Z.shape[1]
        self.noise_ = NOISE * np.random.default_rng(self.seed).random(n, dtype=np.float32)
        layers = self._train(Z) if n else []
        for i in range(3):
            weight, bias = layers[i] if layers else (np.zeros((0, 0)), np.zeros(0))
            setattr(self, f"weight_{i + 1}_", weight)
            setattr(self, f"bias_{i + 1}_", bias)

    def _train(self, Z: Rows) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        import torch  # late: slow to import
        from torch import nn
        from torch.nn.functional import binary_cross_entropy_with_logits, softplus

        rng = torch.Generator().manual_seed(self.seed)
        n, units = Z.shape[1], min(max(2 * Z.shape[1], 16), self.max_units)

        def network() -> Any:
            sizes = ((2 * n, units), (units, units), (units, n))
            layers = [nn.utils.skip_init(nn.Linear, *size) for size in sizes]
            for layer in layers:
                nn.init.xavier_uniform_(layer.weight, generator=rng)
                nn.init.zeros_(layer.bias)
            first, second, last = layers
            return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)

        generator, discriminator = network(), network()
        optimise_g, optimise_d = (
            torch.optim.Adam(net.parameters(), 1e-3, foreach=True)
            for net in (generator, discriminator)
        )
        table = torch.from_numpy(np.nan_to_num(self._unit(Z)).astype(np.float32))
        masks = torch.from_numpy((~np.isnan(Z)).astype(np.float32))
        noise = torch.from_numpy(self.noise_)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(table), generator=rng).split(BATCH):
                x, m = table[rows], masks[rows]
                seen = m * x + (1 - m) * noise
                made = generator(torch.cat([seen, m], 1)).sigmoid()
                completed = m * x + (1 - m) * made
                untold = (torch.rand(m.shape, generator=rng) >= self.hint_rate).float()
                hint = m + untold * (0.5 - m)
                guess = discriminator(torch.cat([completed.detach(), hint], 1))
                optimise_d.zero_grad()
                missed = binary_cross_entropy_with_logits(guess, m, reduction="none")
                ((untold * missed).sum() / untold.sum().clamp(min=1)).backward()
                optimise_d.step()
                guess = discriminator(torch.cat([completed, hint], 1))
                fooled = (untold * (1 - m) * softplus(-guess)).sum()
                wrong = (m * (x - made)).square().sum()
                optimise_g.zero_grad()
                ((fooled + self.alpha * wrong) / m.numel()).backward()
                optimise_g.step()
        linear = [layer for layer in generator if isinstance(layer, nn.Linear)]
        return [
            (layer.weight.detach().numpy().T.copy(), layer.bias.detach().numpy().copy())
            for layer in linear
        ]

    def _predict(self, Z: Rows) -> Rows:
        missing = np.isnan(Z)
        seen = np.where(missing, self.noise_, np.clip(self._unit(Z), 0, 1)).astype(np.float32)
        h = np.hstack([seen, (~missing).astype(np.float32)])
        h = np.maximum(product(h, self.weight_1_) + self.bias_1_, 0)
        h = np.maximum(product(h, self.weight_2_) + self.bias_2_, 0)
        made = expit((product(h, self.weight_3_) + self.bias_3_).astype(np.float64))
        return np.where(missing, self.low_ + (self.high_ - self.low_) * made, Z)

    def _unit(self, Z: Rows) -> Rows:
        """z-scores as shares of the range between the column's training minimum and maximum."""
        width = self.high_ - self.low_
        return (Z - self.low_) / np.where(width > 0, width, 1.0)
