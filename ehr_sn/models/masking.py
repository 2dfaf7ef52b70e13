"""Rows of the training table → the same rows with entries hidden, drawn anew at every step.

Random masking in training: a network that has seen rows with less in them depends less on how much
is there. Evaluation and scoring take rows as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline
from torch import Tensor

from ehr_sn.missing import Erasure
from ehr_sn.missing.amputate import hide
from ehr_sn.models.mlp import MASKING, stream

COPIES = 4
"""Masked copies of the table, where a method fills entries by one another."""


def gather(table: Tensor, rows: Tensor) -> Tensor:
    """The rows (R, B) of a table (N, D), or of each replicate's own (R, N, D): (R, B, D)."""
    if table.ndim == 3:
        rows = rows + torch.arange(len(table), device=rows.device)[:, None] * table.shape[1]
        table = table.flatten(0, 1)
    return table.index_select(0, rows.reshape(-1)).view(*rows.shape, -1)


class MaskedRows(ABC):
    """One training's stream of batches of masked rows; its noise depends on the seeds alone."""

    def __init__(self, seeds: Sequence[int], table: Tensor) -> None:
        self.table = table
        self._noise = {seed: np.random.Generator(stream(seed, MASKING)) for seed in seeds}

    @abstractmethod
    def take(self, rows: Tensor, seeds: Sequence[int]) -> Tensor:
        """Batches (R, B, D') of the table's `rows` (R, B), for replicates with these seeds."""

    def _by_seed(self, seeds: Sequence[int]) -> tuple[list[np.random.Generator], Tensor]:
        """A generator a distinct seed, and the place of each replicate's seed among them."""
        distinct = list(dict.fromkeys(seeds))
        at = torch.tensor([distinct.index(seed) for seed in seeds]).to(self.table.device)
        return [self._noise[seed] for seed in distinct], at


Masking = Callable[[Sequence[int], Tensor], MaskedRows]
"""Starts the stream of a training, from its seeds and its table (N, D')."""


class ErasedRows(MaskedRows):
    """Hides entries of the finished rows themselves: for methods that say what it changes.

    Parameters
    ----------
    observed : (N, D), what the method found observed in the table's rows
    panels : (D,), as `find_panels` gives
    erasure : the method's
    """

    def __init__(
        self,
        seeds: Sequence[int],
        table: Tensor,
        *,
        observed: NDArray[np.bool_],
        panels: NDArray[np.integer],
        erasure: Erasure,
    ) -> None:
        super().__init__(seeds, table)
        self.panels, self.exponent, self.scaled = panels, erasure.exponent, erasure.scaled
        self.source = torch.from_numpy(erasure.source).to(table.device)
        blank = torch.from_numpy(erasure.blank.astype(np.float32)).to(table.device)
        self.blank = blank if blank.any() else None
        self.observed = torch.from_numpy(observed).to(table.device) if self.exponent else None

    def take(self, rows: Tensor, seeds: Sequence[int]) -> Tensor:
        noise, at = self._by_seed(seeds)
        hidden = np.stack([hide(rng, rows.shape[1], self.panels) for rng in noise])
        kept = torch.from_numpy(~hidden).to(self.table.device)
        x = gather(self.table, rows)
        here = kept.index_select(2, self.source).index_select(0, at)
        x = x.mul_(here) if self.blank is None else torch.where(here, x, self.blank)
        if self.observed is not None:
            before = gather(self.observed, rows)
            after = before & kept.index_select(0, at)
            counts = [m.sum(2, keepdim=True).clamp_(min=1) for m in (before, after)]
            x[:, :, : self.scaled] *= (counts[0] / counts[1]) ** self.exponent
        return x


class CopiedRows(MaskedRows):
    """Takes rows of masked copies of the table, made beforehand: for any method at all.

    Parameters
    ----------
    copies : (K, N, D')
    """

    def __init__(self, seeds: Sequence[int], table: Tensor, *, copies: NDArray[np.float32]) -> None:
        super().__init__(seeds, torch.from_numpy(copies).flatten(0, 1).to(table))
        self.n_copies, self.n_rows = copies.shape[:2]

    def take(self, rows: Tensor, seeds: Sequence[int]) -> Tensor:
        noise, at = self._by_seed(seeds)
        drawn = np.stack([rng.integers(self.n_copies, size=rows.shape[1]) for rng in noise])
        copy = torch.from_numpy(drawn).to(self.table.device).index_select(0, at)
        return gather(self.table, rows + copy * self.n_rows)


def masking_of(
    method: Pipeline, values: NDArray[np.floating], panels: NDArray[np.integer]
) -> Masking:
    """Random masking of a table (N, D), NaN = missing, that goes through a fitted pipeline.

    Exact either way: a masked row is what the method makes of the row without those entries. A
    method that fills every column by a constant is told apart and masked anew at every step; any
    other sees `COPIES` masked copies of the table, drawn once, of whose rows half are whole.
    """
    erasure = method[-1].erasure()
    if erasure is not None:
        observed = ~np.isnan(method[:-1].transform(values))
        return partial(ErasedRows, observed=observed, panels=panels, erasure=erasure)
    rng = np.random.Generator(stream(0, MASKING))
    hidden = (hide(rng, len(values), panels) for _ in range(COPIES))
    copies = [method.transform(np.where(h, np.nan, values)).astype(np.float32) for h in hidden]
    return partial(CopiedRows, copies=np.stack(copies))
