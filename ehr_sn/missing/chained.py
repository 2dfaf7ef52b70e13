"""Scaled rows with NaN → complete rows, by a regression of each column on the others, in turns.

scikit-learn's `IterativeImputer` runs the rounds in training. What it learned is kept as plain
arrays, so that it can be saved without pickles, and its rounds are walked again here for new rows.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from sklearn.exceptions import ConvergenceWarning

from ehr_sn.missing.imputers import register
from ehr_sn.missing.model_imputer import ModelImputer, Rows

__all__ = ["MiceImputer", "MissForestImputer", "MultipleImputer"]

STRIDE = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ divided by the golden ratio


class _ChainedImputer(ModelImputer):
    """Start from column means; then, step by step, predict a column's gaps from other columns.

    Attributes
    ----------
    initial_ : float64 array (p,), what gaps hold at first
    targets_ : int array (steps,), the column that each step fills
    predictors_ : int array (steps, m), the columns it is predicted from
    """

    block = 1024  # a step is a few calls of NumPy, whatever the rows

    def __init__(
        self,
        *,
        rounds: int,
        tol: float = 1e-3,
        n_nearest_features: int = 30,
        max_rows: int,
        seed: int = 0,
        add_mask: bool = False,
    ) -> None:
        super().__init__(max_rows=max_rows, seed=seed, add_mask=add_mask)
        self.rounds = rounds
        self.tol = tol
        self.n_nearest_features = n_nearest_features

    def _learn(self, Z: Rows) -> None:
        from sklearn.experimental import enable_iterative_imputer  # noqa: F401
        from sklearn.impute import IterativeImputer  # late: slow to import

        self.initial_ = np.nan_to_num(np.nanmean(Z, axis=0)) if Z.size else np.zeros(Z.shape[1])
        steps: list[Any] = []
        if Z.shape[1] > 1:
            imputer = IterativeImputer(
                self._regression(),
                max_iter=self.rounds,
                tol=self.tol,
                n_nearest_features=self.n_nearest_features if self._is_wide(Z) else None,
                min_value=self.low_,
                max_value=np.where(self.high_ > self.low_, self.high_, self.low_ + 1),
                **self._options(),
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # the rounds are bounded
                imputer.fit(Z)
            steps = imputer.imputation_sequence_
        self.targets_ = np.array([step.feat_idx for step in steps], dtype=np.int64)
        self.predictors_ = np.array([step.neighbor_feat_idx for step in steps], dtype=np.int64)
        self._keep([step.estimator for step in steps])

    def _predict(self, Z: Rows) -> Rows:
        missing = np.isnan(Z)
        noise = self._noise(Z)
        completed = np.where(missing, self.initial_, Z)
        for step, j in enumerate(self.targets_):
            rows = np.flatnonzero(missing[:, j])
            if rows.size:
                predicted = self._step(step, completed, rows) + noise(step, rows)
                completed[rows, j] = np.clip(predicted, self.low_[j], self.high_[j])
        return completed

    def _is_wide(self, Z: Rows) -> bool:
        return Z.shape[1] - 1 > self.n_nearest_features

    def _noise(self, Z: Rows) -> Callable[[int, NDArray[np.intp]], Any]:
        """What a step adds to its predictions for some rows of Z."""
        return lambda step, rows: 0.0

    def _options(self) -> dict[str, Any]:
        """Further options of `IterativeImputer`."""
        return {"random_state": self.seed}

    @abstractmethod
    def _regression(self) -> Any: ...

    @abstractmethod
    def _keep(self, models: list[Any]) -> None:
        """Keep the model of each step, as arrays."""

    @abstractmethod
    def _step(self, step: int, Z: Rows, rows: NDArray[np.intp]) -> Rows:
        """Predict a step's column for some rows of Z, in which nothing is missing."""


@register("mice")
class MiceImputer(_ChainedImputer):
    """Fill each column by Bayesian ridge regression on the others, round after round.

    The single, most probable completion, as scikit-learn's `IterativeImputer` with
    `BayesianRidge` gives it. In a wide table each regression takes `n_nearest_features`
    predictors, drawn anew each time with odds by absolute correlation.

    S. van Buuren, K. Groothuis-Oudshoorn, "mice: Multivariate Imputation by Chained Equations in
    R", J Stat Softw 45(3) (2011).

    Parameters
    ----------
    rounds : at most; fewer where no entry moves by more than `tol` of the largest
    n_nearest_features : predictors of each regression, at most
    max_rows : training rows that the regressions are fitted on, at most

    Examples
    --------
    >>> nan = float("nan")
    >>> table = [[float(i), 2.0 * i + 1] for i in range(20)]
    >>> MiceImputer().fit(table).transform([[5.0, nan]]).round(3)
    array([[ 5., 11.]])
    """

    def __init__(
        self,
        *,
        rounds: int = 5,
        tol: float = 1e-3,
        n_nearest_features: int = 30,
        max_rows: int = 4000,
        seed: int = 0,
        add_mask: bool = False,
    ) -> None:
        super().__init__(
            rounds=rounds,
            tol=tol,
            n_nearest_features=n_nearest_features,
            max_rows=max_rows,
            seed=seed,
            add_mask=add_mask,
        )

    def _regression(self) -> Any:
        from sklearn.linear_model import BayesianRidge

        return BayesianRidge()

    def _keep(self, models: list[Any]) -> None:
        self.coef_ = np.array([model.coef_ for model in models])
        self.intercept_ = np.array([float(model.intercept_) for model in models])

    def _step(self, step: int, Z: Rows, rows: NDArray[np.intp]) -> Rows:
        taken = Z[rows[:, None], self.predictors_[step]]
        predicted: Rows = (taken * self.coef_[step]).sum(axis=1) + self.intercept_[step]
        return predicted


@register("multiple_imputation")
class MultipleImputer(MiceImputer):
    """One random completion a `draw`, from the same regressions as `mice`.

    A draw first draws the coefficients of every regression from their posterior, then for each
    row and gap a residual, by a hash of the row's own observed entries: the same row gets the same
    draw, alone or in any batch, and unlike rows get independent ones. The comparison trains the
    networks of seed s on draw s and lets them predict on draw s of the held-out rows; the
    seed-averaged prediction then pools over imputations, as multiple imputation for prediction
    should.

    D. B. Rubin, *Multiple Imputation for Nonresponse in Surveys* (1987); A. Perez-Lebel et al.,
    "Benchmarking missing-values approaches for predictive models on health databases",
    GigaScience 11:giac013 (2022).

    Parameters
    ----------
    draw : which draw, from 0
    rounds, n_nearest_features, max_rows : as for `mice`; all rounds are made
    """

    draws: ClassVar[bool] = True

    def __init__(
        self,
        *,
        draw: int = 0,
        rounds: int = 5,
        n_nearest_features: int = 30,
        max_rows: int = 4000,
        seed: int = 0,
        add_mask: bool = False,
    ) -> None:
        super().__init__(
            rounds=rounds,
            n_nearest_features=n_nearest_features,
            max_rows=max_rows,
            seed=seed,
            add_mask=add_mask,
        )
        self.draw = draw

    def _options(self) -> dict[str, Any]:
        (state,) = np.random.SeedSequence([self.seed, self.draw]).generate_state(1)
        return {"random_state": int(state), "sample_posterior": True}

    def _keep(self, models: list[Any]) -> None:
        super()._keep(models)
        rng = np.random.default_rng([self.seed, self.draw])
        for step, model in enumerate(models):
            drawn = rng.multivariate_normal(model.coef_, model.sigma_, method="eigh")
            self.intercept_[step] += model.X_offset_ @ (model.coef_ - drawn)
            self.coef_[step] = drawn
        self.residual_ = np.array([model.alpha_**-0.5 for model in models])

    def _noise(self, Z: Rows) -> Callable[[int, NDArray[np.intp]], Any]:
        key = _hash(_row_keys(Z) + np.uint64(self.draw))

        def residuals(step: int, rows: NDArray[np.intp]) -> Rows:
            bits = _hash(key[rows] + np.array(step + 1, dtype=np.uint64) * STRIDE) >> np.uint64(11)
            drawn: Rows = self.residual_[step] * ndtri((bits + 0.5) * 2.0**-53)
            return drawn

        return residuals


@register("missforest")
class MissForestImputer(_ChainedImputer):
    """Fill each column by a random forest on the others, round after round.

    D. J. Stekhoven, P. Bühlmann, "MissForest: non-parametric missing value imputation for
    mixed-type data", Bioinformatics 28:112 (2012), within bounds: ten trees where it has a
    hundred, at most eight splits deep, a bounded sample of rows, three rounds.

    Parameters
    ----------
    trees, max_depth, min_samples_leaf : of each forest
    rounds : at most; fewer where no entry moves by more than `tol` of the largest
    n_nearest_features : predictors of each forest, at most, as for `mice`
    max_rows : training rows that the forests are fitted on, at most

    Attributes
    ----------
    roots_ : int array (steps, trees), the first node of each tree
    feature_, threshold_, left_, right_, value_ : arrays (nodes,), those of all trees one after
        another: a row goes left if its column `feature_` is at most `threshold_`; a leaf leads to
        itself
    """

    def __init__(
        self,
        *,
        trees: int = 10,
        max_depth: int = 8,
        min_samples_leaf: int = 5,
        rounds: int = 3,
        tol: float = 1e-3,
        n_nearest_features: int = 50,
        max_rows: int = 1500,
        seed: int = 0,
        add_mask: bool = False,
    ) -> None:
        super().__init__(
            rounds=rounds,
            tol=tol,
            n_nearest_features=n_nearest_features,
            max_rows=max_rows,
            seed=seed,
            add_mask=add_mask,
        )
        self.trees = trees
        self.max_depth = max_depth
        self.min_samples_leaf = min_samples_leaf

    def _regression(self) -> Any:
        from sklearn.ensemble import RandomForestRegressor

        return RandomForestRegressor(
            self.trees,
            max_depth=self.max_depth,
            min_samples_leaf=self.min_samples_leaf,
            max_features="sqrt",
            random_state=self.seed,
        )

    def _keep(self, models: list[Any]) -> None:
        features, thresholds, lefts, rights, values = [], [], [], [], []
        roots, n_nodes = [], 0
        for predictors, model in zip(self.predictors_, models, strict=True):
            for tree in (estimator.tree_ for estimator in model.estimators_):
                itself, leaf = np.arange(tree.node_count), tree.children_left < 0
                features.append(predictors[np.where(leaf, 0, tree.feature)])
                thresholds.append(tree.threshold)
                lefts.append(n_nodes + np.where(leaf, itself, tree.children_left))
                rights.append(n_nodes + np.where(leaf, itself, tree.children_right))
                values.append(tree.value[:, 0, 0])
                roots.append(n_nodes)
                n_nodes += tree.node_count
        self.roots_ = np.array(roots, dtype=np.int64).reshape(len(models), self.trees)
        self.feature_ = np.concatenate([[], *features]).astype(np.int32)
        self.threshold_ = np.concatenate([[], *thresholds])
        self.left_ = np.concatenate([[], *lefts]).astype(np.int32)
        self.right_ = np.concatenate([[], *rights]).astype(np.int32)
        self.value_ = np.concatenate([[], *values])

    def _step(self, step: int, Z: Rows, rows: NDArray[np.intp]) -> Rows:
        node = np.broadcast_to(self.roots_[step], (len(rows), self.roots_.shape[1]))
        taken = Z[rows].astype(np.float32)  # as scikit-learn's trees see their input
        of_row = np.arange(len(rows))[:, None]
        for _ in range(self.max_depth):
            goes_left = taken[of_row, self.feature_[node]] <= self.threshold_[node]
            node = np.where(goes_left, self.left_[node], self.right_[node])
        predicted: Rows = self.value_[node].mean(axis=1)
        return predicted


def _row_keys(Z: Rows) -> NDArray[np.uint64]:
    """(rows,): a hash of each row's observed entries and of where they stand."""
    bits = np.where(np.isnan(Z), np.inf, Z + 0.0).view(np.uint64)  # + 0.0: there is no −0
    places = np.arange(1, Z.shape[1] + 1, dtype=np.uint64) * STRIDE
    keys: NDArray[np.uint64] = _hash(bits + places).sum(axis=1, dtype=np.uint64)
    return keys


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Well-mixed bits of 64-bit integers: the finaliser of SplitMix64.

    G. L. Steele, D. Lea, C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA
    2014.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
