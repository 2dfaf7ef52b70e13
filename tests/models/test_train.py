"""Every method that a configuration may name is trained, as its description says."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from ehr_sn.ingest.store import Store, ingest
from ehr_sn.missing import make_method, set_state
from ehr_sn.models.methods import NETWORK_METHODS, find_method, method_names
from ehr_sn.models.mlp import StackedMLP
from ehr_sn.models.train import Cell, train_cell

TRAIN = {"seeds": 2, "batch_size": 64, "max_epochs": 3, "winsorise": 0.0}


@pytest.fixture
def trained(busy):
    """A function: method, and what its network is like → its cell's file, store and config."""

    def train(method: str, **network) -> tuple[Path, Store]:
        settings = TRAIN | {
            "methods": {"standard": [method]},
            "architectures": {"net": {"hidden": [8]} | network},
        }
        config = busy.config(train=settings)
        store = Store(ingest(config))
        return train_cell(config, store, Cell(method, "standard", "net", 0)), store

    return train


@pytest.mark.parametrize("name", [*NETWORK_METHODS, "piecewise_linear+mask"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_cell_holds_all_that_scoring_takes(trained, name, masked):
    path, store = trained(name, augment_missing=masked)
    tensors = load_file(path)
    state = {
        kind: {k.removeprefix(kind): t for k, t in tensors.items() if k.startswith(kind)}
        for kind in ("method/", "network/")
    }
    method = make_method(find_method(name).rows, winsorise=0.0)
    set_state(method, {k: t.numpy() for k, t in state["method/"].items()})
    model = StackedMLP.from_state(state["network/"])
    held_out = store.values()[store.splits()[:, 0] == "held_out"]
    probability = model.predict_proba(method.transform(held_out).astype(np.float32))
    expected = tensors["probability/held_out"].reshape(2, -1)
    np.testing.assert_array_equal(probability.numpy(), expected.numpy())


def test_the_network_is_the_one_that_the_method_names(trained):
    found = {}
    for name in NETWORK_METHODS:
        path, _ = trained(name)
        tensors = load_file(path)
        found[name] = {
            "gmm": "network/expected.mean" in tensors,
            "neumiss": "network/neumiss.weight" in tensors,
            "hidden": bool(tensors["network/sparsity_norm"]),
        }
    for name, kinds in found.items():
        assert [kind for kind, there in kinds.items() if there] == [name.rpartition("+")[2]]


def test_masking_is_cells_apart(trained):
    assert trained("zero+mask")[0] != trained("zero+mask", augment_missing=True)[0]


def test_every_name_is_listed_once():
    assert len(set(method_names())) == len(method_names())
    assert set(NETWORK_METHODS) < set(method_names())
