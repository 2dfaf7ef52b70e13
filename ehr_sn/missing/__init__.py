"""Scaled rows with missing entries → complete rows, by a named method.

Importing this package fills the registry `METHODS`: a module with a new method is imported here.
"""

from ehr_sn.missing.autoencoder import SparseAutoencoderImputer
from ehr_sn.missing.chained import MiceImputer, MissForestImputer, MultipleImputer
from ehr_sn.missing.gain import GainImputer
from ehr_sn.missing.imputers import (
    METHODS,
    CountAppender,
    Erasure,
    MeanImputer,
    MedianImputer,
    MissingMethod,
    MostFrequentImputer,
    ZeroImputer,
    get_state,
    make_method,
    method_names,
    register,
    set_state,
)
from ehr_sn.missing.low_rank import SoftImputer, soft_impute
from ehr_sn.missing.neighbours import NearestNeighboursImputer
from ehr_sn.missing.piecewise_linear import PiecewiseLinearEncoder
from ehr_sn.missing.scalers import SCALERS, QuantileScaler, Winsoriser, make_scaler
from ehr_sn.missing.sparsity_norm import (
    ConstantScaler,
    SparsityNormalizer,
    SqrtSparsityNormalizer,
    TunedSparsityNormalizer,
    sparsity_normalize,
)

__all__ = [
    "METHODS",
    "SCALERS",
    "ConstantScaler",
    "CountAppender",
    "Erasure",
    "GainImputer",
    "MeanImputer",
    "MedianImputer",
    "MiceImputer",
    "MissForestImputer",
    "MissingMethod",
    "MostFrequentImputer",
    "MultipleImputer",
    "NearestNeighboursImputer",
    "PiecewiseLinearEncoder",
    "QuantileScaler",
    "SoftImputer",
    "SparseAutoencoderImputer",
    "SparsityNormalizer",
    "SqrtSparsityNormalizer",
    "TunedSparsityNormalizer",
    "Winsoriser",
    "ZeroImputer",
    "get_state",
    "make_method",
    "make_scaler",
    "method_names",
    "register",
    "set_state",
    "soft_impute",
    "sparsity_normalize",
]
