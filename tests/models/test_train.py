"""Cells: which rows train what, what the tuning rows choose, and what is shared on disk."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ehr_sn.config import Config
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.missing import make_method
from ehr_sn.models.fit import Architecture, Budget, Task, fit
from ehr_sn.models.predict import load_predictor, read_tuning
from ehr_sn.models.train import (
    NOTHING,
    Cell,
    cell_path,
    comparisons,
    members_of,
    never_observed,
    read_cell,
    reference_of,
    train_cell,
)

TRAIN = {
    "seeds": 2,
    "max_epochs": 6,
    "batch_size": 32,
    "methods": {"standard": ["mean", "zero"], "minmax": ["mean"]},
    "architectures": {"mlp": {"hidden": [4]}, "wide": {"hidden": [8]}},
    "baselines": [
        "logistic_regression",
        "hist_gradient_boosting",
        "boosting+masked_copies",
    ],
}


@pytest.fixture
def config(busy) -> Config:
    return busy.config(train=TRAIN)


@pytest.fixture
def store(config: Config) -> Store:
    return Store(ingest(config))


def trained(config: Config, store: Store, method: str, architecture: str = "mlp") -> Path:
    scaler = NOTHING if method == NOTHING else "standard"
    return train_cell(config, store, Cell(method, scaler, architecture, 0))


def test_baselines_join_the_comparison_and_have_a_reference(config: Config) -> None:
    every = comparisons(config)
    assert every[:2] == [("zero", "standard", "mlp"), ("zero", "standard", "wide")]
    assert every[-3:] == [(NOTHING, NOTHING, name) for name in TRAIN["baselines"]]
    assert reference_of(config, ("mean", "standard", "wide")) == ("zero", "standard", "wide")
    assert reference_of(config, ("mean", "minmax", "wide")) is None  # no zero with that scaler
    assert reference_of(config, every[-1]) == ("zero", "standard", "mlp")
    assert reference_of(config, every[0]) is None


def test_a_baseline_predicts_for_the_subjects_of_the_networks(config: Config, store: Store) -> None:
    network = read_cell(trained(config, store, "zero"), store)
    for name, alike in (("logistic_regression", True), ("hist_gradient_boosting", False)):
        baseline = read_cell(trained(config, store, NOTHING, name), store)
        theirs, ours = network.held_out["diabetes"], baseline.held_out["diabetes"]
        np.testing.assert_array_equal(ours.y, theirs.y)
        assert ours.probability.shape == theirs.probability.shape
        assert (ours.probability[0] == ours.probability[1]).all() == alike
        assert baseline.fit_seconds > 0
        assert baseline.curves == {}


@pytest.mark.parametrize("name", TRAIN["baselines"])
def test_a_baselines_cell_predicts_what_it_recorded(
    config: Config, store: Store, name: str
) -> None:
    path = trained(config, store, NOTHING, name)
    cell = Cell(NOTHING, NOTHING, name, 0)
    predict = load_predictor(config, store, cell)
    recorded = load_file(path)
    values, split = store.values(), store.splits()[:, 0]
    for rows in ("tuning", "held_out"):
        found = predict(values[split == rows])
        assert found.tobytes() == recorded[f"probability/{rows}"].tobytes()
    one = np.flatnonzero(split == "held_out")[[3]]
    np.testing.assert_array_equal(predict(values[one])[..., 0], found[..., 3])
    assert read_tuning(config, store, cell)["diabetes"].probability.shape[0] == 2


def test_masked_copies_are_a_model_of_their_own(config: Config, store: Store) -> None:
    plain, masked = (
        load_file(trained(config, store, NOTHING, name))["probability/held_out"]
        for name in TRAIN["baselines"][1:]
    )
    assert (plain != masked).any()


BLEND = {"both": [["mean", "standard", "mlp"], "hist_gradient_boosting", "logistic_regression"]}


def test_a_blend_is_the_mean_of_its_members_which_are_trained_once(busy) -> None:
    config = busy.config(train=TRAIN | {"blends": BLEND})
    store, blend = Store(ingest(config)), Cell(NOTHING, NOTHING, "both", 0)
    assert comparisons(config)[-1] == (NOTHING, NOTHING, "both")
    assert reference_of(config, comparisons(config)[-1]) == ("zero", "standard", "mlp")
    network = train_cell(config, store, Cell("mean", "standard", "mlp", 0))
    before = network.stat().st_mtime_ns
    path = train_cell(config, store, blend)
    members = [cell_path(config, store, member) for member in members_of(config, blend)]
    assert set(path.parent.iterdir()) == {path, *members}
    assert network.stat().st_mtime_ns == before
    kept = load_file(path)
    for rows in ("probability/tuning", "probability/held_out"):
        mean = np.mean([load_file(member)[rows].astype(float) for member in members], axis=0)
        np.testing.assert_allclose(kept[rows], mean, atol=1e-7)
    each = [read_cell(member, store) for member in members]
    assert read_cell(path, store).fit_seconds == sum(cell.fit_seconds for cell in each)
    values, split = store.values(), store.splits()[:, 0]
    predicted = load_predictor(config, store, blend)(values[split == "held_out"])
    assert predicted.tobytes() == kept["probability/held_out"].tobytes()
    wider = TRAIN | {"blends": {"both": [["mean", "standard", "wide"], *BLEND["both"][1:]]}}
    assert cell_path(busy.config(train=TRAIN | {"blends": BLEND}), store, blend) == path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ehr_sn.models.train.FORMAT", 99)  # a member that is trained otherwise
        assert cell_path(config, store, blend) != path
    assert cell_path(busy.config(train=wider), store, blend) != path


@pytest.mark.parametrize("method", ["zero+mask", "piecewise_linear+mask", "zero+count", "gmm"])
def test_an_embedding_sees_each_features_columns_whatever_the_method(busy, method: str) -> None:
    architectures = {"mlp": {"hidden": [4], "embedding": 3}}
    methods = {"standard": ["zero", method]}
    config = busy.config(train=TRAIN | {"methods": methods, "architectures": architectures})
    store, cell = Store(ingest(config)), Cell(method, "standard", "mlp", 0)
    kept = load_file(train_cell(config, store, cell))
    if method == "gmm":  # whose first layer takes the mask itself
        assert not any("embedding" in name for name in kept)
    else:
        features = len(store.feature_names)
        assert kept["network/embedding.own"].shape[1:3] == (features, 3)
    values, split = store.values(), store.splits()[:, 0]
    found = load_predictor(config, store, cell)(values[split == "held_out"])
    assert found.tobytes() == kept["probability/held_out"].tobytes()


def test_what_was_imputed_is_learned_once_for_all_architectures_and_the_mask(
    config: Config, store: Store
) -> None:
    trained(config, store, "knn")
    folder = store.path.parent / "imputers"
    (learned,) = folder.iterdir()
    before = learned.stat().st_mtime_ns
    trained(config, store, "knn", "wide")
    masked = trained(config, store, "knn+mask")
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == [before]
    assert read_cell(masked, store).impute_seconds > 0
    trained(config, store, "mean")
    assert len(list(folder.iterdir())) == 2


def test_each_seed_trains_on_its_own_draw(config: Config, store: Store) -> None:
    """The cell's networks of a seed are those trained alone on that draw."""
    cell = load_file(trained(config, store, "multiple_imputation"))
    split, y = store.splits()[:, 0], store.labels()[:, 0]
    eligible = ~np.isnan(y)
    rows = [np.flatnonzero(eligible & (split == name)) for name in ("train", "tuning")]
    budget = Budget(config.train.learning_rate, config.train.weight_decay, 32, 6, 8)
    values = store.values()
    probabilities = []
    for seed in range(2):
        method = make_method("multiple_imputation", draw=seed).fit(values[split == "train"])
        x = method.transform(values)
        alone = fit(x, [Task("diabetes", y, *rows)], [seed], Architecture((4,)), budget)
        probabilities.append(alone.model.predict_proba(x[split == "held_out"])[0].numpy())
        np.testing.assert_allclose(
            cell["probability/held_out"][0, seed], probabilities[-1], atol=1e-5
        )
    assert np.abs(probabilities[0] - probabilities[1]).max() > 1e-3


def test_the_tuning_rows_choose_the_exponent(config: Config, store: Store) -> None:
    def tuning_auroc(method: str) -> float:
        curves = load_file(trained(config, store, method))["curve/tuning_auroc"]
        return float(np.nanmax(curves, axis=-1).mean())

    path = trained(config, store, "sparsity_normalization_tuned")
    chosen = read_cell(path, store).chosen["exponent"]
    assert chosen in (0, 0.25, 0.5, 0.75, 1)
    found = {
        0.0: tuning_auroc("zero"),
        0.5: tuning_auroc("sparsity_normalization_sqrt"),
        1.0: tuning_auroc("sparsity_normalization"),
    }
    best = tuning_auroc("sparsity_normalization_tuned")
    assert best >= max(found.values())
    assert found.get(chosen, best) == pytest.approx(best)


def test_naming_other_methods_leaves_a_cell_what_it_is(config: Config, store: Store) -> None:
    train = config.train.with_methods("mice,hist_gradient_boosting")
    assert train.methods == {"standard": ("zero", "mice")}
    assert train.baselines == ("hist_gradient_boosting",)
    cell = Cell("zero", "standard", "mlp", 0)
    other = config.model_copy(update={"train": train})
    assert cell_path(other, store, cell) == cell_path(config, store, cell)


def test_features_that_no_eligible_training_row_has_are_named(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert never_observed(store) == {}
    values, train = store.values(), store.splits()[:, 0] == "train"
    eligible = ~np.isnan(store.labels()[:, 0])
    values[train & eligible, 2] = np.nan
    monkeypatch.setattr(Store, "values", lambda _: values)
    assert never_observed(store) == {store.diseases[0]: [store.feature_names[2]]}
