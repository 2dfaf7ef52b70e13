"""Scaled rows with NaN → zero-filled rows, each rescaled by how much of it was observed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ehr_sn.missing.imputers import Erasure, MissingMethod, register

__all__ = [
    "ConstantScaler",
    "SparsityNormalizer",
    "SqrtSparsityNormalizer",
    "TunedSparsityNormalizer",
    "sparsity_factor",
    "sparsity_normalize",
]


def sparsity_normalize(
    x: ArrayLike, observed: ArrayLike, k: float, exponent: float = 1.0
) -> NDArray[np.floating]:
    """Return (k / max(|m|₁, 1)) ** exponent · (m ⊙ x), row by row, with m the observed entries.

    Parameters
    ----------
    x : array (..., n_features); what it holds where nothing was observed does not matter
    observed : bool array like x; an observed zero counts as observed
    k : the number of observed entries at which a row keeps its scale, > 0
    exponent : from 0 (zero imputation) to 1 (sparsity normalization)

    Returns
    -------
    Array like x (float32 stays float32). A row with nothing observed becomes zeros; one with
    exactly k observed entries keeps them bit for bit.

    >>> import numpy as np
    >>> x = np.array([[4.0, 2.0, 0.0, 6.0], [4.0, np.nan, np.nan, np.nan]])
    >>> sparsity_normalize(x, ~np.isnan(x), k=4)
    array([[ 4.,  2.,  0.,  6.],
           [16.,  0.,  0.,  0.]])
    """
    x, observed = np.asarray(x), np.asarray(observed, dtype=bool)
    dtype = np.result_type(x, np.float32)
    factor = sparsity_factor(observed.sum(axis=-1, keepdims=True), k, exponent)
    return factor.astype(dtype) * np.where(observed, x, dtype.type(0))


def sparsity_factor(count: ArrayLike, k: float, exponent: float = 1.0) -> NDArray[np.float64]:
    """Return (k / max(count, 1)) ** exponent: what a row of `count` observed entries is times.

    For rows that are kept sparse, where only what is observed is stored.

    >>> sparsity_factor([0, 1, 4], k=4)
    array([4., 4., 1.])
    """
    _check(k, exponent)
    factor: NDArray[np.float64] = (k / np.maximum(count, 1)) ** exponent
    return factor


@register("sparsity_normalization")
class SparsityNormalizer(MissingMethod):
    """Sparsity Normalization: zero imputation without the bias from how much was measured.

    With zero imputation the expected output of a network moves with the number of observed
    entries |m|₁. For a row x with mask m (1 where observed, i.e. not NaN),

        SN(x) = (K / max(|m|₁, 1)) ** exponent · (m ⊙ x)

    For an exponent of 1, entries missing completely at random, and a network of affine layers,
    the expected output is f(K x / n) however many of the n entries were observed. The factor is
    formed before it is applied: a full row with K = n is returned bit for bit. A row with nothing
    observed becomes zeros, an observed zero counts as observed, and nothing becomes NaN.

    Input and output are float arrays (n_rows, n_features), scaled beforehand: NaN in, 0 out;
    (n_rows, 2 · n_features) with the mask.

    Parameters
    ----------
    k : "mean", "features" or a positive number, default "mean"
        K. "mean": the mean of |m|₁ over the training rows, which keeps the average scale of the
        input and so a tuned learning rate; 1 if nothing at all was observed. "features": n.
    exponent : float in [0, 1], default 1.0
        0 is zero imputation; ½ gives centred, independent features the same variance whatever
        |m|₁; 1 is the published method.
    add_mask : bool, default False
        Append the mask, one 0/1 column for every feature.

    Attributes
    ----------
    k_ : float
        The K in use, one constant for training and scoring.

    Notes
    -----
    What it does not do:

    - The factor is one for the whole row. Where features differ in how often they are missing,
      each keeps a bias of its own: a rarely measured one still comes out too small on average.
    - On features with mean zero there is no mean to correct, and a sparse row's observed entries
      have their variance inflated by (K / |m|₁)².
    - With convex activations (ReLU) the expected output is not constant: with non-negative output
      weights it falls towards f(K x / n) as more is observed.

    References
    ----------
    J. Yi, J. Lee, K. J. Kim, S. J. Hwang, E. Yang, "Why Not to Use Zero Imputation? Correcting
    Sparsity Bias in Training Neural Networks", ICLR 2020, arXiv 1906.00150.

    Examples
    --------
    >>> nan = float("nan")
    >>> sn = SparsityNormalizer().fit([[1.0, 2.0, 3.0], [1.0, nan, nan]])
    >>> sn.k_
    2.0
    >>> sn.transform([[3.0, 6.0, 9.0], [nan, 6.0, nan], [nan, nan, nan]])
    array([[ 2.,  4.,  6.],
           [ 0., 12.,  0.],
           [ 0.,  0.,  0.]])
    """

    def __init__(
        self,
        *,
        k: Literal["mean", "features"] | float = "mean",
        exponent: float = 1.0,
        add_mask: bool = False,
    ) -> None:
        super().__init__(add_mask=add_mask)
        self.k = k
        self.exponent = exponent

    def _fit(self, X: NDArray[np.floating]) -> None:
        if self.k == "mean":
            self.k_ = float((~np.isnan(X)).sum(axis=1).mean()) or 1.0
        elif self.k == "features":
            self.k_ = float(X.shape[1])
        else:
            _check(self.k, self.exponent)
            self.k_ = float(self.k)
        _check(self.k_, self.exponent)

    def _fill(self, X: NDArray[np.floating], observed: NDArray[np.bool_]) -> NDArray[np.floating]:
        return sparsity_normalize(X, observed, self.k_, self.exponent)

    def _erasure(self) -> Erasure:
        n = self.n_features_in_
        return Erasure(np.arange(n), np.zeros(n), self.exponent, scaled=n)


@register("sparsity_normalization_sqrt")
class SqrtSparsityNormalizer(SparsityNormalizer):
    """Sparsity Normalization with the exponent ½: for centred, independent features of variance 1
    and weights w, the output w·x has the variance K/n · ‖w‖² whatever |m|₁.
    """

    def __init__(
        self,
        *,
        k: Literal["mean", "features"] | float = "mean",
        exponent: float = 0.5,
        add_mask: bool = False,
    ) -> None:
        super().__init__(k=k, exponent=exponent, add_mask=add_mask)


@register("sparsity_normalization_tuned")
class TunedSparsityNormalizer(SparsityNormalizer):
    """Sparsity Normalization whose exponent the tuning rows choose, in the comparison.

    Networks are trained with each of the `candidates`, and those kept whose AUROC on the tuning
    rows, averaged over diseases and seeds, is highest. By itself it is Sparsity Normalization with
    the `exponent` given.
    """

    candidates: ClassVar[tuple[Mapping[str, Any], ...]] = tuple(
        {"exponent": exponent} for exponent in (0.0, 0.25, 0.5, 0.75, 1.0)
    )


@register("constant_scale")
class ConstantScaler(MissingMethod):
    """Zero imputation times 1 / mean |m|, one constant for all rows.

    What is left of Sparsity Normalization with K = 1 when it no longer looks at the row: beside it,
    it tells the effect of a smaller input from that of counting what was observed.

    Attributes
    ----------
    scale_ : float
        1 over the training rows' mean number of observed entries; 1 if nothing was observed.

    >>> nan = float("nan")
    >>> ConstantScaler().fit_transform([[1.0, 2.0, 3.0], [1.0, nan, nan]])
    array([[0.5, 1. , 1.5],
           [0.5, 0. , 0. ]])
    """

    def _fit(self, X: NDArray[np.floating]) -> None:
        self.scale_ = 1 / (float((~np.isnan(X)).sum(axis=1).mean()) or 1.0)

    def _fill(self, X: NDArray[np.floating], observed: NDArray[np.bool_]) -> NDArray[np.floating]:
        return X.dtype.type(self.scale_) * np.where(observed, X, X.dtype.type(0))

    def _erasure(self) -> Erasure:
        n = self.n_features_in_
        return Erasure(np.arange(n), np.zeros(n))


def _check(k: object, exponent: float) -> None:
    if not isinstance(k, int | float | np.number) or not 0 < float(k) < np.inf:
        raise ValueError(f'k must be a positive number (or in fit "mean" or "features"); got {k!r}')
    if not 0 <= exponent <= 1:
        raise ValueError(f"exponent must be in [0, 1]; got {exponent!r}")
