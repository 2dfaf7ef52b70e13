"""Rows of the training table → the same rows with entries hidden, drawn anew at every step.

Random masking in training: a network that has seen rows with less in them depends less on how much
is there. Evaluation and scoring take rows as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

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


class Masking(ABC):
    """How to make a batch of rows that have lost entries. Its noise depends on the seed alone."""

    @abstractmethod
    def begin(self, seeds: Sequence[int], table: Tensor) -> MaskedRows:
        """Start each seed's stream; `table` (N, D') is what the networks are trained on."""


class MaskedRows(ABC):
    """One training's stream of masked batches."""

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


@dataclass(frozen=True)
class Erasing(Masking):
    """Hides entries of the finished rows themselves: for methods that say what it changes.

    observed : (N, D), what the method found observed in the table's rows
    panels : (D,), as `find_panels` gives
    erasure : the method's
    """

    observed: NDArray[np.bool_]
    panels: NDArray[np.integer]
    erasure: Erasure

    def begin(self, seeds: Sequence[int], table: Tensor) -> MaskedRows:
        return _ErasedRows(seeds, table, self)


class _ErasedRows(MaskedRows):
    def __init__(self, seeds: Sequence[int], table: Tensor, how: Erasing) -> None:
        super().__init__(seeds, table)
        self.panels, self.exponent, self.scaled = (
            how.panels,
            how.erasure.exponent,
            how.erasure.scaled,
        )
        self.source = torch.from_numpy(how.erasure.source).to(table.device)
        blank = torch.from_numpy(how.erasure.blank.astype(np.float32)).to(table.device)
        self.blank = blank if blank.any() else None
        self.observed = torch.from_numpy(how.observed).to(table.device) if self.exponent else None

    def take(self, rows: Tensor, seeds: Sequence[int]) -> Tensor:
        noise, at = self._by_seed(seeds)
        hidden = np.stack([hide(rng, rows.shape[1], self.panels) for rng in noise])
        kept = torch.from_numpy(~hidden).to(self.table.device)
        x = self.table.index_select(0, rows.view(-1)).view(*rows.shape, -1)
        here = kept.index_select(2, self.source).index_select(0, at)
        x = x.mul_(here) if self.blank is None else torch.where(here, x, self.blank)
        if self.observed is not None:
            before = self.observed.index_select(0, rows.view(-1)).view(*rows.shape, -1)
            after = before & kept.index_select(0, at)
            counts = [m.sum(2, keepdim=True).clamp_(min=1) for m in (before, after)]
            x[:, :, : self.scaled] *= (counts[0] / counts[1]) ** self.exponent
        return x


@dataclass(frozen=True)
class Copies(Masking):
    """Takes rows of masked copies of the table, made beforehand: for any method at all.

    copies : (K, N, D')
    """

    copies: NDArray[np.float32]

    def begin(self, seeds: Sequence[int], table: Tensor) -> MaskedRows:
        stacked = torch.from_numpy(self.copies.reshape(-1, table.shape[1])).to(table.device)
        return _CopiedRows(seeds, stacked, len(self.copies))


class _CopiedRows(MaskedRows):
    def __init__(self, seeds: Sequence[int], stacked: Tensor, n_copies: int) -> None:
        super().__init__(seeds, stacked)
        self.n_copies = n_copies

    def take(self, rows: Tensor, seeds: Sequence[int]) -> Tensor:
        noise, at = self._by_seed(seeds)
        drawn = np.stack([rng.integers(self.n_copies, size=rows.shape[1]) for rng in noise])
        copy = torch.from_numpy(drawn).to(self.table.device).index_select(0, at)
        place = rows + copy * (len(self.table) // self.n_copies)
        return self.table.index_select(0, place.view(-1)).view(*rows.shape, -1)


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
        return Erasing(~np.isnan(method[:-1].transform(values)), panels, erasure)
    rng = np.random.Generator(stream(0, MASKING))
    return Copies(
        np.stack(
            [
                method.transform(np.where(hide(rng, len(values), panels), np.nan, values))
                for _ in range(COPIES)
            ]
        ).astype(np.float32)
    )
