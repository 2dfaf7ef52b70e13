"""Layers learned without labels, in front of the classifiers of a whole comparison."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.decomposition import PCA

from ehr_sn.config import Config, RepresentationConfig
from ehr_sn.errors import ConfigError
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models.fit import Architecture, Budget, Task, TrainingError, fit
from ehr_sn.models.layers import Encoder
from ehr_sn.models.learning_curve import FewerLabels, FewerRows
from ehr_sn.models.mlp import StackedMLP
from ehr_sn.models.predict import load_predictor
from ehr_sn.models.representation import learn
from ehr_sn.models.train import Cell, cell_path, read_cell, train_cell

SPARSE = {"kind": "sparse_autoencoder", "units": 5, "epochs": 3, "batch_size": 64}
ARCHITECTURES = {
    "mlp": {"hidden": [4]},
    "tuned": {"hidden": [4], "representation": SPARSE | {"denoise": True}},
    "frozen": {"hidden": [4], "representation": SPARSE | {"fine_tune": False}},
    "stacked": {"hidden": [4], "representation": SPARSE | {"kind": "stacked", "units": [6, 3]}},
    "pca": {"hidden": [4], "representation": {"kind": "pca", "units": 3}},
}
TRAIN = {
    "seeds": 2,
    "max_epochs": 3,
    "batch_size": 32,
    "methods": {"standard": ["zero", "sparsity_normalization+mask"]},
    "architectures": ARCHITECTURES,
}


@pytest.fixture
def config(busy) -> Config:
    return busy.config(train=TRAIN)


@pytest.fixture
def store(config: Config) -> Store:
    return Store(ingest(config))


def encoder(n_in: int, widths: list[int], seeds: list[int], *, fine_tune: bool) -> Encoder:
    rng, layers = np.random.default_rng(0), []
    for width in widths:
        weight = rng.normal(size=(len(seeds), n_in, width)).astype(np.float32)
        bias = rng.normal(size=(len(seeds), 1, width)).astype(np.float32)
        layers.append((torch.from_numpy(weight), torch.from_numpy(bias)))
        n_in = width
    return Encoder(tuple(seeds), tuple(layers), "sigmoid", fine_tune)


@pytest.mark.parametrize("fine_tune", [False, True])
def test_a_network_trains_its_encoder_on_or_leaves_it(fine_tune: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    y = (x[:, 0] > 0) * 1.0
    tasks = [
        Task(name, label, np.arange(100), np.arange(100, 200))
        for name, label in (("one", y), ("other", 1 - y))
    ]
    given = encoder(6, [5, 4], [3, 8], fine_tune=fine_tune)
    architecture = Architecture((4,), encoder=given)
    fitted = fit(x, tasks, [3, 8], architecture, Budget(max_epochs=3, batch_size=20))
    for i, (weight, _) in enumerate(given.layers):
        trained = fitted.model.encoder.layers[i].weight.detach()
        for r, replicate in enumerate(fitted.replicates):
            start = weight[given.seeds.index(replicate.seed)]
            assert torch.equal(trained[r], start) != fine_tune
    alone = fit(x, tasks[1:], [8], architecture, Budget(max_epochs=3, batch_size=20))
    torch.testing.assert_close(
        alone.model.predict_proba(x)[0], fitted.model.predict_proba(x)[3], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("fine_tune", [False, True])
def test_a_network_with_an_encoder_comes_back_from_its_state(fine_tune: bool) -> None:
    model = StackedMLP(
        6, (4,), seeds=[1, 2, 1], encoder=encoder(6, [5], [1, 2], fine_tune=fine_tune)
    )
    if fine_tune:
        model.encoder.layers[0].weight.data[2] += 1  # replicates of one seed may differ
    again = StackedMLP.from_state(model.state())
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), model(x))
    torch.testing.assert_close(model.select([2])(x)[0], model(x)[2])
    trained = [name for name, p in again.named_parameters() if p.requires_grad]
    assert ("encoder.layers.0.weight" in trained) == fine_tune


def test_principal_components_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    table = (rng.normal(size=(300, 5)) * [4, 3, 2, 1, 0.5] + 1).astype(np.float32)
    train = np.arange(300) < 200
    found = learn(
        RepresentationConfig(kind="pca", units=3),
        table,
        table,
        train_rows=train,
        tuning_rows=~train,
        seeds=[0, 1],
    )
    pca = PCA(3).fit(table[train])
    ((weight, bias),) = found.encoder.layers
    codes = table @ weight[1].numpy() + bias[1].numpy()
    np.testing.assert_allclose(np.abs(codes), np.abs(pca.transform(table)), atol=1e-4)
    lost = table[~train] - pca.inverse_transform(pca.transform(table[~train]))
    np.testing.assert_allclose(found.error[0], np.square(lost).mean(axis=0), rtol=1e-3)
    with pytest.raises(TrainingError, match="6 principal components need as many columns"):
        learn(
            RepresentationConfig(kind="pca", units=6),
            table,
            table,
            train_rows=train,
            tuning_rows=~train,
            seeds=[0],
        )


@pytest.mark.parametrize("architecture", ["tuned", "frozen", "stacked", "pca"])
def test_a_cell_with_a_representation_is_trained_and_predicts(
    config: Config, store: Store, architecture: str
) -> None:
    cell = Cell("sparsity_normalization+mask", "standard", architecture, 0)
    path = train_cell(config, store, cell)
    predict = load_predictor(config, store, cell)
    values = store.values()[store.splits()[:, 0] == "held_out"]
    batch = predict(values)
    assert batch.tobytes() == load_file(path)["probability/held_out"].tobytes()
    alone = np.concatenate([predict(row[None]) for row in values[:5]], axis=2)
    assert alone.tobytes() == batch[:, :, :5].tobytes()
    seen = read_cell(path, store).representation
    n = len(store.feature_names)
    assert seen.error.shape == (2, n)
    assert seen.weight.shape[:2] == (2, 2 * n)
    assert seen.inputs == [*store.feature_names, *(f"{f}.observed" for f in store.feature_names)]
    assert seen.rates.shape == (2, {"stacked": 9, "pca": 3}.get(architecture, 5))
    assert np.isfinite(seen.rates).all()


def test_it_learns_from_training_rows_without_labels_and_from_no_others(
    config: Config, store: Store
) -> None:
    """Other held-out values change nothing, other labels not the frozen layers."""

    def rates(of: Store) -> np.ndarray:
        path = train_cell(config, of, Cell("zero", "standard", "frozen", 0))
        return load_file(path)["network/encoder.layers.0.weight"]

    class Changed(Store):
        fingerprint = "changed"

        def values(self) -> np.ndarray:
            values = super().values()
            values[self.splits()[:, 0] != "train"] *= 2
            return values

    whole = rates(store)
    np.testing.assert_array_equal(rates(Changed(store.path)), whole)
    np.testing.assert_array_equal(rates(FewerLabels(store.path, 0.5, 0)), whole)
    assert not np.array_equal(rates(FewerRows(store.path, 0.5)), whole)


def test_what_was_learned_is_found_again_where_nothing_that_it_depends_on_changed(
    config: Config, store: Store
) -> None:
    def train(of: Store, architecture: str) -> dict[str, int]:
        train_cell(config, of, Cell("zero", "standard", architecture, 0))
        folder = store.path.parent / "representations"
        return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    first = train(store, "frozen")
    assert train(FewerLabels(store.path, 0.5, 0), "frozen") == first
    assert len(train(store, "tuned")) == 2  # it learns to denoise
    assert len(train(FewerRows(store.path, 0.5), "frozen")) == 3


def test_fewer_labels_are_those_of_the_training_rows_alone(store: Store) -> None:
    fewer, split = FewerLabels(store.path, 0.25, 0), store.splits()[:, 0]
    known = ~np.isnan(store.labels()[:, 0])
    left = ~np.isnan(fewer.labels()[:, 0])
    assert (left[split != "train"] == known[split != "train"]).all()
    kept = FewerRows(store.path, 0.25).splits()[:, 0] == "train"
    assert (left == known & (kept | (split != "train"))).all()
    assert fewer.fingerprint != store.fingerprint != replace(fewer, split=1).fingerprint


def test_without_a_representation_a_cell_is_what_it_was(busy, config: Config, store: Store) -> None:
    plain = busy.config(train=TRAIN | {"architectures": {"mlp": {"hidden": [4]}}})
    none = {"mlp": {"hidden": [4], "representation": "none"}}
    named = busy.config(train=TRAIN | {"architectures": none})
    cell = Cell("zero", "standard", "mlp", 0)
    paths = {cell_path(c, store, cell) for c in (plain, named, config)}
    assert len(paths) == 1
    assert plain.training_hash == named.training_hash
    assert "representation" not in plain.train.architectures["mlp"].model_dump()


def test_a_kind_alone_stands_for_its_defaults(busy) -> None:
    kinds = ("pca", "sparse_autoencoder", "stacked")
    config = busy.config(train__architectures={kind: {"representation": kind} for kind in kinds})
    units = {name: a.representation.units for name, a in config.train.architectures.items()}
    assert units == {"pca": (64,), "sparse_autoencoder": (64,), "stacked": (64, 64)}


@pytest.mark.parametrize(
    ("representation", "message"),
    [
        ("stakced", r"hospital.yaml:\d+: .*'stakced' is not valid; did you mean 'stacked'"),
        ({"kind": "pca", "units": [3, 2]}, "units: pca has one layer; for several there is"),
        ({"kind": "pca", "rho": 0.1}, "rho: principal components have none"),
        ({"kind": "stacked", "roh": 0.1}, "unknown key; did you mean 'rho'"),
        ({"kind": "stacked", "denoise": True, "solver": "lbfgs"}, "need `solver: adam`"),
    ],
)
def test_a_representation_that_cannot_be_is_refused(busy, representation, message) -> None:
    with pytest.raises(ConfigError, match=message):
        busy.config(train__architectures={"mlp": {"representation": representation}})


def test_it_does_not_go_with_a_layer_that_takes_the_mask(busy) -> None:
    with pytest.raises(ConfigError, match="a layer of the method neumiss takes the rows"):
        busy.config(
            train__methods={"standard": ["zero", "neumiss"]},
            train__architectures={"mlp": {"representation": "pca"}},
        )
