"""Scaled rows with NaN → complete rows, by the reconstruction of a sparse autoencoder."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from ehr_sn.missing.imputers import register
from ehr_sn.missing.model_imputer import ModelImputer, Rows, product

__all__ = ["SparseAutoencoderImputer"]

WEIGHTS = ("encode_", "encode_bias_", "decode_", "decode_bias_")


@register("sparse_autoencoder")
class SparseAutoencoderImputer(ModelImputer):
    """Fill entries with what a denoising sparse autoencoder makes of the observed ones.

    It encodes [z-scores with 0 where missing | mask], of which training hides further observed
    entries at random, and is asked for all entries that were observed, hidden or not. Its cost and
    the sparsity of its sigmoid units are those of `ehr_sn.models.sparse_autoencoder`; its output is
    linear. Nothing is trained after `fit`.

    P. Vincent, H. Larochelle, Y. Bengio, P.-A. Manzagol, "Extracting and Composing Robust Features
    with Denoising Autoencoders", ICML 2008; A. Ng, "Sparse autoencoder", CS294A lecture notes.

    Parameters
    ----------
    rho, beta, weight_decay : of its cost
    epochs : passes over the training rows, in batches of 128
    max_units : hidden units at most; else twice the number of columns, and 16 or more
    max_rows : training rows it is trained on, at most

    Attributes
    ----------
    encode_, encode_bias_, decode_, decode_bias_ : float32 arrays (2p, H), (H,), (H, p), (p,)
    """

    def __init__(
        self,
        *,
        rho: float = 0.2,
        beta: float = 0.1,
        weight_decay: float = 1e-4,
        epochs: int = 100,
        max_units: int = 128,
        max_rows: int = 10_000,
        seed: int = 0,
        add_mask: bool = False,
    ) -> None:
        super().__init__(max_rows=max_rows, seed=seed, add_mask=add_mask)
        self.rho = rho
        self.beta = beta
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.max_units = max_units

    def _learn(self, Z: Rows) -> None:
        weights = self._train(Z) if Z.shape[1] else [np.zeros((0, 0)), np.zeros(0)] * 2
        for name, array in zip(WEIGHTS, weights, strict=True):
            setattr(self, name, array)

    def _train(self, Z: Rows) -> list[NDArray[np.float32]]:
        from ehr_sn.models.sparse_autoencoder import SparseAutoencoder  # late: slow to import

        fitted = SparseAutoencoder(
            units=min(max(2 * Z.shape[1], 16), self.max_units),
            rho=self.rho,
            beta=self.beta,
            weight_decay=self.weight_decay,
            fill="zero+mask",
            denoise=True,
            epochs=self.epochs,
            batch_size=128,
            seed=self.seed,
        ).fit(Z.astype(np.float32))
        encode, encode_bias, decode, decode_bias = (w[0].numpy() for w in fitted.layers_[0])
        return [encode, encode_bias[0], decode, decode_bias[0]]

    def _predict(self, Z: Rows) -> Rows:
        missing = np.isnan(Z)
        rows = np.hstack([np.where(missing, 0.0, Z), ~missing]).astype(np.float32)
        code = expit(product(rows, self.encode_) + self.encode_bias_)
        made = product(code, self.decode_) + self.decode_bias_
        return np.where(missing, made.astype(np.float64), Z)
