"""Method name → how rows are made, and what is different about the network that takes them.

Most methods are entries of `ehr_sn.missing.METHODS`, whose rows an ordinary network takes. For some
a layer of the network handles what is missing: they are listed here.
"""

from dataclasses import dataclass
from typing import Literal

from ehr_sn.missing.imputers import method_names as row_method_names


@dataclass(frozen=True)
class Method:
    """rows : the entry of `ehr_sn.missing.METHODS` that makes the network's input
    layer : what takes [x | mask] before, or as, the first layer
    sparsity_norm : whether hidden activations are sparsity-normalised
    """

    rows: str
    layer: Literal["gmm", "neumiss"] | None = None
    sparsity_norm: bool = False


NETWORK_METHODS = {
    "gmm": Method("zero+mask", layer="gmm"),
    "neumiss": Method("zero+mask", layer="neumiss"),
    "sparsity_normalization+hidden": Method("sparsity_normalization", sparsity_norm=True),
}


def method_names() -> list[str]:
    """Every name that `train.methods` takes."""
    return [*row_method_names(), *NETWORK_METHODS]


def find_method(name: str) -> Method:
    """The method of that name.

    >>> find_method("neumiss")
    Method(rows='zero+mask', layer='neumiss', sparsity_norm=False)
    >>> find_method("mean").rows
    'mean'
    """
    return NETWORK_METHODS.get(name, Method(name))
