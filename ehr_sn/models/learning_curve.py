"""Store → the same store with fewer training rows, or labels: what would more of them bring?"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ehr_sn.config import Config
from ehr_sn.ingest.store import Store
from ehr_sn.models.predict import best_comparison
from ehr_sn.models.train import Comparison, reference_of

SHARES = (0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class FewerRows(Store):
    """A store of which only a share of each split's training rows is for training.

    A larger share holds the rows of a smaller one; tuning and held-out rows are as they were.
    """

    share: float = 1.0

    @property
    def fingerprint(self) -> str:
        whole = super().fingerprint
        return whole if self.share == 1 else f"{whole}-{self.share:g}"

    def splits(self) -> NDArray[np.str_]:
        dealt = super().splits().astype(object)
        for i, column in enumerate(dealt.T):
            column[_left_out(column, self.subjects(), self.share, i)] = "not used"
        return dealt.astype(str)


@dataclass(frozen=True)
class FewerLabels(Store):
    """A store of which only a share of one split's training rows has labels.

    What is learned without labels has all rows. The rows with labels are those of `FewerRows`.
    """

    share: float = 1.0
    split: int = 0

    @property
    def fingerprint(self) -> str:
        whole = super().fingerprint
        return whole if self.share == 1 else f"{whole}-labels-{self.share:g}-{self.split}"

    @property
    def rows_fingerprint(self) -> str:
        return super().fingerprint

    def labels(self) -> NDArray[np.float32]:
        known = super().labels()
        known[self._left_out()] = np.nan
        return known

    def follow_up(self) -> NDArray[np.float64] | None:
        days = super().follow_up()
        if days is not None:
            days[self._left_out()] = np.nan
        return days

    def _left_out(self) -> NDArray[np.int64]:
        return _left_out(self.splits()[:, self.split], self.subjects(), self.share, self.split)


def _left_out(
    dealt: NDArray[np.str_], subjects: NDArray[np.int64], share: float, split: int
) -> NDArray[np.int64]:
    """Training rows of the subjects beyond a share; a larger share leaves out fewer of the same."""
    rows = np.flatnonzero(dealt == "train")
    first = np.unique(subjects[rows], return_index=True)[1]  # a row of each subject
    order = np.random.default_rng([split, len(first)]).permutation(rows[np.sort(first)])
    beyond = subjects[order[round(share * len(order)) :]]
    return rows[np.isin(subjects[rows], beyond)]


def compared(config: Config, store: Store) -> list[Comparison]:
    """The best method by tuning rows, and before it what that is compared with, if anything."""
    best = best_comparison(config, store)
    reference = reference_of(config, best)
    return [best] if reference is None else [reference, best]


def further_cells(config: Config, store: Store) -> list[tuple[float, Comparison, int]]:
    """(share, comparison, split) of the cells to train; those of all rows are trained already."""
    return [
        (share, comparison, split)
        for comparison in compared(config, store)
        for share in SHARES[:-1]
        for split in range(config.splits.repeats)
    ]
