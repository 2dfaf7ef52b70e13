"""Rows while they are scored → counts that tell later how far they are from the training rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ehr_sn.scoring.package import Package, Scores

PROFILE = "profile.json"  # its name in a folder of scores
SAMPLED = 2**13
"""Rows of a block whose values are looked at, evenly spaced: shares need no more."""


class Profile:
    """Counts over blocks of rows, in the bins that the packages' training rows were put in.

    Of every row: which entries are missing, how many are observed, and the scores. Of a sample:
    the values.
    """

    def __init__(self, packages: Sequence[Package]):
        self._packages = packages
        self._training = packages[0].about["training"]
        self.rows = 0
        self.missing = np.zeros(len(packages[0].features), dtype=np.int64)
        self.observed = _no_counts(self._training["observed"])
        self.values = [_no_counts(bins) for bins in self._training["values"].values()]
        self.scores = [_no_counts(package.about["scores"]) for package in packages]
        self.sums = np.zeros(len(packages))

    def add(self, values: NDArray[np.float32], scores: Sequence[Scores]) -> None:
        """A block of rows (rows, features), NaN = missing, and what each package made of it."""
        absent = np.isnan(values)
        self.rows += len(values)
        self.missing += absent.sum(axis=0)
        present = (values.shape[1] - absent.sum(axis=1)).astype(np.float64)
        self.observed += _counts(present, self._training["observed"])
        sample = values[:: max(1, len(values) // SAMPLED)]
        for count, column, bins in zip(
            self.values, sample.T, self._training["values"].values(), strict=True
        ):
            count += _counts(column, bins)
        for i, (package, told) in enumerate(zip(self._packages, scores, strict=True)):
            self.scores[i] += _counts(told.probability, package.about["scores"])
            self.sums[i] += told.probability.sum()

    def as_dict(self) -> dict[str, Any]:
        """Of features and diseases by name; all of it adds up over shards."""
        names = self._packages[0].features
        diseases = [package.disease for package in self._packages]
        return {
            "rows": self.rows,
            "missing": dict(zip(names, self.missing.tolist(), strict=True)),
            "observed": self.observed.tolist(),
            "values": {n: c.tolist() for n, c in zip(names, self.values, strict=True)},
            "scores": {d: c.tolist() for d, c in zip(diseases, self.scores, strict=True)},
            "sums": dict(zip(diseases, self.sums.tolist(), strict=True)),
        }


def expected(packages: Sequence[Package]) -> dict[str, Any]:
    """What a profile of these packages is compared with."""
    return {
        "training": packages[0].about["training"],
        "scores": {package.disease: package.about["scores"] for package in packages},
        "figures": {package.disease: package.about["figures"] for package in packages},
    }


def _no_counts(bins: dict[str, Any]) -> NDArray[np.int64]:
    return np.zeros(len(bins["shares"]), dtype=np.int64)


def _counts(values: NDArray[np.floating], bins: dict[str, Any]) -> NDArray[np.int64]:
    """How many values, NaN left out, lie in each bin."""
    if not bins["shares"]:
        return np.zeros(0, dtype=np.int64)
    known = values[~np.isnan(values)]
    return np.bincount(np.searchsorted(bins["edges"], known), minlength=len(bins["shares"]))
