"""Scaled rows with missing entries → complete rows, by a named method.

Importing this package fills the registry `METHODS`: a module with a new method is imported here.
"""

from ehr_sn.missing.imputers import (
    METHODS,
    Erasure,
    MeanImputer,
    MedianImputer,
    MissingMethod,
    ZeroImputer,
    get_state,
    make_method,
    method_names,
    register,
    set_state,
)
from ehr_sn.missing.piecewise_linear import PiecewiseLinearEncoder
from ehr_sn.missing.scalers import SCALERS, QuantileScaler, Winsoriser, make_scaler
from ehr_sn.missing.sparsity_norm import SparsityNormalizer, sparsity_normalize

__all__ = [
    "METHODS",
    "SCALERS",
    "Erasure",
    "MeanImputer",
    "MedianImputer",
    "MissingMethod",
    "PiecewiseLinearEncoder",
    "QuantileScaler",
    "SparsityNormalizer",
    "Winsoriser",
    "ZeroImputer",
    "get_state",
    "make_method",
    "make_scaler",
    "method_names",
    "register",
    "set_state",
    "sparsity_normalize",
]
