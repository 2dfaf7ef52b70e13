"""Store → how many rows each labelled row stands for.

Who left before a label's window ended has no label. Those like them who stayed stand for them, with
weights by `ehr_sn.survival`: learned, in each split, from its training rows.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ehr_sn.ingest.store import Store
from ehr_sn.survival import censoring_weights

Weights = NDArray[np.float64] | None
"""(rows,): what each labelled row of a disease stands for; None where each stands for itself."""


@lru_cache(maxsize=4)
def weights(store: Store, split: int | None) -> tuple[Weights, ...]:
    """Return what each disease's rows stand for; rows without a label stand for nothing.

    Leaving is learned from the split's training rows, or without a split from all rows. Of those
    with a label the mean is 1, so that their loss is as large as without.
    """
    days = store.follow_up()
    if days is None:
        return (None,) * len(store.diseases)
    labels, values = store.labels(), store.values()
    train = np.full(len(labels), True) if split is None else store.splits()[:, split] == "train"
    found: list[Weights] = []
    for i, (horizon, names) in enumerate(zip(store.horizons, store.censoring_by, strict=True)):
        left = np.isnan(labels[:, i]) & ~np.isnan(days[:, i])
        if horizon is None or not left[train].any():
            found.append(None)
            continue
        by = values[:, [store.feature_names.index(name) for name in names]] if names else None
        weight = censoring_weights(days[:, i], labels[:, i], horizon, train, by)
        weight /= weight[train & (weight > 0)].mean()
        weight.setflags(write=False)  # all who ask share it
        found.append(weight)
    return tuple(found)


def taken(weight: Weights, rows: NDArray[np.generic]) -> Weights:
    """What some of the rows stand for, by a mask or their numbers."""
    return None if weight is None else weight[rows]
