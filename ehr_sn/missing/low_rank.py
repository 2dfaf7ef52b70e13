"""Scaled rows with NaN → complete rows, by a low-rank approximation of the training table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ehr_sn.missing.imputers import register
from ehr_sn.missing.model_imputer import ModelImputer, Rows, product

__all__ = ["SoftImputer", "soft_impute"]

PATH = np.geomspace(0.7, 0.01, 10)
"""Penalties tried, as shares of the largest singular value."""


def soft_impute(
    Z: Rows,
    penalty: float,
    *,
    start: Rows | None = None,
    max_rank: int | None = None,
    max_iter: int = 200,
    tol: float = 1e-5,
) -> tuple[Rows, Rows]:
    """Minimise ½ Σ over observed (Z − L)² + penalty · ‖L‖* over matrices L.

    Each iteration fills the gaps of Z with the present L and soft-thresholds the singular values
    (algorithm 1 of Mazumder, Hastie and Tibshirani, JMLR 11:2287, 2010). It stops once the squared
    change of L, relative to L, is below `tol`.

    Parameters
    ----------
    Z : (n, p), NaN where missing
    start : L to start from, by default zeros
    max_rank : singular values kept at most

    Returns
    -------
    L (n, p), and B (p, rank) = V √S of its singular value decomposition U S Vᵀ, so that a complete
    row's scores on B are a ridge regression with the same penalty.
    """
    observed = ~np.isnan(Z)
    low = np.zeros(Z.shape) if start is None else start
    loadings = np.zeros((Z.shape[1], 0))
    for _ in range(max_iter):
        filled = np.where(observed, Z, low)
        squares, V = np.linalg.eigh(filled.T @ filled)  # p by p: the rows may be many
        singular, V = np.sqrt(np.maximum(squares[::-1], 0.0)), V[:, ::-1]
        rank = min(int((singular > penalty).sum()), max_rank or len(singular))
        singular, V = singular[:rank], V[:, :rank]
        previous, low = low, (filled @ (V * (1 - penalty / singular))) @ V.T
        loadings = V * np.sqrt(singular - penalty)
        if np.square(low - previous).sum() <= tol * np.square(previous).sum():
            break
    return low, loadings


@register("softimpute")
class SoftImputer(ModelImputer):
    """Fill entries from a low-rank matrix whose nuclear norm was penalised (softImpute).

    The penalty, and with it the rank, is the one of a path of ten whose prediction of a tenth of
    the *observed training entries*, hidden meanwhile, is best. A row, seen in training or not, is
    filled with B a, where its scores a are the ridge regression of its observed entries x_o on
    their loadings: a = (B_oᵀ B_o + λ I)⁻¹ B_oᵀ x_o. For a training row that is its row of the
    matrix found.

    R. Mazumder, T. Hastie, R. Tibshirani, "Spectral Regularization Algorithms for Learning Large
    Incomplete Matrices", JMLR 11:2287 (2010).

    Parameters
    ----------
    max_rank : singular values kept at most
    max_rows : training rows that the matrix has at most

    Attributes
    ----------
    loadings_ : float64 array (p, rank), B
    penalty_ : float, λ

    Examples
    --------
    >>> import numpy as np
    >>> one = np.linspace(-1, 1, 50)
    >>> table = np.column_stack([one, 2 * one, 3 * one])
    >>> row = SoftImputer().fit(table).transform([[0.5, 1.0, float("nan")]])
    >>> bool(abs(row[0, 2] - 1.5) < 0.1)
    True
    """

    def __init__(
        self, *, max_rank: int = 30, max_rows: int = 4000, seed: int = 0, add_mask: bool = False
    ) -> None:
        super().__init__(max_rows=max_rows, seed=seed, add_mask=add_mask)
        self.max_rank = max_rank

    def _learn(self, Z: Rows) -> None:
        rng = np.random.default_rng(self.seed)
        hidden = ~np.isnan(Z) & (rng.random(Z.shape) < 0.1)
        kept = np.where(hidden, np.nan, Z)
        largest = float(np.linalg.norm(np.nan_to_num(Z), 2)) if Z.size else 0.0
        low, errors = None, []
        for share in PATH:
            low, _ = soft_impute(kept, share * largest, start=low, max_rank=self.max_rank)
            errors.append(np.square(low - Z)[hidden].sum())
        self.penalty_ = float(PATH[np.argmin(errors)] * largest)
        _, self.loadings_ = soft_impute(Z, self.penalty_, start=low, max_rank=self.max_rank)

    def _predict(self, Z: Rows) -> Rows:
        observed, B = ~np.isnan(Z), self.loadings_
        rank = B.shape[1]
        if rank == 0:
            return np.where(observed, Z, 0.0)
        products = (B[:, :, None] * B[:, None, :]).reshape(len(B), -1)
        gram = product(observed.astype(float), products).reshape(-1, rank, rank)
        target = product(np.where(observed, Z, 0.0), B)
        ridge: NDArray[np.float64] = gram + self.penalty_ * np.eye(rank)
        scores = np.linalg.solve(ridge, target[:, :, None])[:, :, 0]
        return np.where(observed, Z, product(scores, B.T))
