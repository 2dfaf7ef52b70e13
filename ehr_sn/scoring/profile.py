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
    the values. `squares` are sums over subjects of their numbers of rows, or of entries of a
    feature in the sample, squared: by them `worth` tells what rows of the same subjects are worth.
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
        self.squares = 0
        self.value_squares = np.zeros(len(packages[0].features), dtype=np.int64)

    def add(
        self,
        values: NDArray[np.float32],
        scores: Sequence[Scores],
        subjects: NDArray[np.integer] | None = None,
    ) -> None:
        """Count a block of rows (rows, features), NaN = missing, and what each package made of it.

        `subjects` (rows,) are codes from 0 on of whom the rows are of; without them, each of
        another. Of a subject in several blocks it is not told that they are of one.
        """
        absent = np.isnan(values)
        self.rows += len(values)
        self.missing += absent.sum(axis=0)
        present = (values.shape[1] - absent.sum(axis=1)).astype(np.float64)
        self.observed += _counts(present, self._training["observed"])
        step = max(1, len(values) // SAMPLED)
        sample = values[::step]
        self.squares += int(_squares(np.ones((len(values), 1), dtype=bool), subjects)[0])
        self.value_squares += _squares(
            ~np.isnan(sample), None if subjects is None else subjects[::step]
        )
        for count, column, bins in zip(
            self.values, sample.T, self._training["values"].values(), strict=True
        ):
            count += _counts(column, bins)
        for i, (package, told) in enumerate(zip(self._packages, scores, strict=True)):
            self.scores[i] += _counts(told.probability, package.about["scores"])
            self.sums[i] += told.probability.sum()

    def as_dict(self) -> dict[str, Any]:
        """Return the counts of features and diseases by name; they add up over shards."""
        names = self._packages[0].features
        diseases = [package.disease for package in self._packages]
        return {
            "rows": self.rows,
            "missing": dict(zip(names, self.missing.tolist(), strict=True)),
            "observed": self.observed.tolist(),
            "values": {n: c.tolist() for n, c in zip(names, self.values, strict=True)},
            "scores": {d: c.tolist() for d, c in zip(diseases, self.scores, strict=True)},
            "sums": dict(zip(diseases, self.sums.tolist(), strict=True)),
            "squares": self.squares,
            "value_squares": dict(zip(names, self.value_squares.tolist(), strict=True)),
        }


def expected(packages: Sequence[Package]) -> dict[str, Any]:
    """What a profile of these packages is compared with."""
    return {
        "training": packages[0].about["training"],
        "scores": {package.disease: package.about["scores"] for package in packages},
        "figures": {package.disease: package.reported for package in packages},
        "weighted": [p.disease for p in packages if p.about.get("weighted")],
    }


def _squares(present: NDArray[np.bool_], subjects: NDArray[np.integer] | None) -> NDArray[np.int64]:
    """Sum over subjects of their numbers of rows, squared, for each column of (rows, columns)."""
    if subjects is None or len(np.unique(subjects)) == len(subjects):
        return present.sum(axis=0)
    order = np.argsort(subjects, kind="stable")
    starts = np.flatnonzero(np.diff(subjects[order], prepend=-1))
    of_subjects = np.add.reduceat(present[order].astype(np.int64), starts, axis=0)
    return (of_subjects**2).sum(axis=0)


def _no_counts(bins: dict[str, Any]) -> NDArray[np.int64]:
    return np.zeros(len(bins["shares"]), dtype=np.int64)


def _counts(values: NDArray[np.floating], bins: dict[str, Any]) -> NDArray[np.int64]:
    """How many values, NaN left out, lie in each bin."""
    if not bins["shares"]:
        return np.zeros(0, dtype=np.int64)
    known = values[~np.isnan(values)]
    return np.bincount(np.searchsorted(bins["edges"], known), minlength=len(bins["shares"]))
