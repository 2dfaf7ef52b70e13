"""Registered models: loaded back as they were, promoted by rule, rolled back, and written down."""

import json
import socket
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from sklearn.metrics import roc_auc_score

from ehr_sn import tracking
from ehr_sn.config import Promotion
from ehr_sn.errors import EhrSnError
from ehr_sn.models.predict import read_tuning
from ehr_sn.models.train import NOTHING, Cell, Comparison, comparisons
from ehr_sn.scoring import audit
from ehr_sn.scoring.registry import (
    CHALLENGER,
    choose,
    load,
    load_champions,
    model_name,
    promote,
    register,
    rollback,
)


@pytest.fixture(scope="module")
def mlflow_here(tmp_path_factory: pytest.TempPathFactory):
    """MLflow on SQLite below a folder of its own, for all tests of the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("service"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield MlflowClient(tracking.tracking_uri(), tracking.tracking_uri())


def test_the_best_of_everything_compared_is_chosen_baselines_too(with_baselines) -> None:
    config, store = with_baselines.config, with_baselines.store

    def on_tuning(comparison: Comparison) -> float:
        rows = read_tuning(config, store, Cell(*comparison, 0)).values()
        return float(np.mean([roc_auc_score(each.y, each.ensemble) for each in rows]))

    assert choose(config, store) == max(comparisons(config), key=on_tuning)
    boosting = (NOTHING, NOTHING, "hist_gradient_boosting")
    assert choose(config, store, architecture=boosting[2]) == boosting


@pytest.fixture(scope="module")
def registered(clinic, mlflow_here) -> dict[str, int]:
    return register(clinic.config, clinic.store, clinic.comparison())


def test_a_model_is_loaded_back_as_it_was_registered(clinic, registered) -> None:
    assert registered == {"diabetes": 1, "hypertension": 1}
    found = load(clinic.config, "diabetes", CHALLENGER)
    assert found.package.about["comparison"]["method"] == "zero+mask"
    assert (found.name, found.version) == ("ehr_sn.clinic.diabetes", 1)
    with pytest.raises(EhrSnError, match="has no champion: run `ehr-sn promote CONFIG` first"):
        load(clinic.config, "diabetes")
    none = r"clinic\.diabetes, ehr_sn\.clinic\.hypertension: MLflow at .* has no champion: run"
    with pytest.raises(EhrSnError, match=none):
        load_champions(clinic.config)
    with pytest.raises(EhrSnError, match="did you mean 'diabetes'"):
        load_champions(clinic.config, ["diabets"])


def test_what_is_registered_already_gets_no_second_version(clinic, registered) -> None:
    assert register(clinic.config, clinic.store, clinic.comparison(), ["diabetes"]) == {
        "diabetes": 1
    }


def test_mlflow_itself_scores_as_the_package_and_lets_features_be_absent(
    clinic, registered
) -> None:
    mlflow.set_tracking_uri(tracking.tracking_uri())
    name = model_name(clinic.config, "diabetes")
    model = mlflow.pyfunc.load_model(f"models:/{name}@{CHALLENGER}")
    rows = pd.DataFrame(
        clinic.store.values()[:20].astype(float), columns=clinic.store.feature_names
    )
    package = load(clinic.config, "diabetes", CHALLENGER).package
    expected = package.score(rows.to_numpy(np.float32))
    np.testing.assert_array_equal(model.predict(rows)["probability"], expected.probability)
    fewer = model.predict(rows[["age"]])
    assert (fewer["observed"] == 1).all()
    inputs = model.metadata.signature.inputs
    assert all(column.type.name == "double" and not column.required for column in inputs)
    assert inputs.input_names() == clinic.store.feature_names
    example = model.input_example
    assert list(example.columns) == clinic.store.feature_names
    real = {tuple(row) for row in rows.to_numpy()}
    assert tuple(example.to_numpy()[0]) not in real  # nobody's


def test_no_file_of_a_registered_model_is_a_pickle(clinic, registered, mlflow_here) -> None:
    version = mlflow_here.get_model_version(model_name(clinic.config, "diabetes"), "1")
    root = Path(version.source.removeprefix("file://"))
    files = [path for path in root.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {"", ".json", ".yaml", ".txt", ".py", ".safetensors"}
    assert not any(path.read_bytes().startswith(b"\x80") for path in files)
    ids = clinic.store.read("values", ["subject_id"])["subject_id"].to_pylist()
    text = " ".join(path.read_text() for path in files if path.suffix != ".safetensors")
    assert not any(f'"{i}"' in text for i in ids)


def test_promotion_writes_its_figures_and_rollback_undoes_it(
    clinic, registered, mlflow_here
) -> None:
    config = clinic.config
    name = model_name(config, "diabetes")
    log = audit.audit_path(config)
    before = audit.verify(log)[0]  # lines of other tests with this clinic
    first = promote(config, ["diabetes"])["diabetes"]
    assert first.promoted
    assert "auroc_difference" not in first.figures  # there was no champion
    again = promote(config, ["diabetes"])["diabetes"]
    assert again.against == ["version 1 is the champion already"]
    with pytest.raises(EhrSnError, match="is the first champion"):
        rollback(config, "diabetes")

    register(config, clinic.store, clinic.comparison("multiple_imputation"), ["diabetes"])
    second = promote(config, ["diabetes"])["diabetes"]
    assert not second.promoted
    tags = mlflow_here.get_model_version(name, "2").tags
    assert tags["ehr_sn.decision"] == "refused"
    assert "may be worse than the champion" in tags["ehr_sn.decision_against"]
    lowest = float(tags["ehr_sn.auroc_difference_at_least"])
    assert -0.1 < lowest < -config.promotion.margin
    assert load(config, "diabetes").version == 1

    lenient = config.model_copy(update={"promotion": Promotion(margin=0.1)})
    assert promote(lenient, ["diabetes"])["diabetes"].promoted
    tags = mlflow_here.get_model_version(name, "2").tags
    assert (tags["ehr_sn.decision"], tags["ehr_sn.previous_champion"]) == ("promoted", "1")
    champion = load(config, "diabetes")
    assert champion.version == 2
    assert load_champions(config, ["diabetes"], {"diabetes": champion})["diabetes"] is champion

    assert rollback(config, "diabetes") == (2, 1)
    assert load(config, "diabetes").version == 1
    assert "version 2 was rolled back on" in promote(config, ["diabetes"])["diabetes"].against[0]

    lines = [json.loads(line) for line in log.read_text().splitlines()[before:]]
    assert [(line["what"], line["outcome"]) for line in lines] == [
        ("promote", "promoted"),
        ("promote", "refused"),  # the champion already
        ("rollback", "failed"),
        ("promote", "refused"),
        ("promote", "promoted"),
        ("rollback", "rolled back"),
        ("promote", "refused"),
    ]
    assert lines[4]["sha256"] == tags["ehr_sn.audit"]
    assert (lines[4]["version"], lines[4]["champion"]) == (2, 1)
    assert lines[4]["store"] == clinic.store.fingerprint
    assert lines[4]["rows"] == champion.package.about["figures"]["n"]
    assert audit.verify(log) == (before + 7, lines[6]["sha256"])


def test_a_disease_without_a_challenger_holds_up_no_other(
    clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = clinic.config.model_copy(update={"promotion": Promotion(margin=0.1)})
    with pytest.raises(EhrSnError, match="has no challenger: run `ehr-sn register CONFIG` first"):
        promote(config)
    register(config, clinic.store, clinic.comparison(), ["hypertension"])
    decisions = promote(config)
    assert list(decisions) == ["diabetes", "hypertension"]
    assert decisions["hypertension"].promoted
    told = decisions["diabetes"].told("diabetes")
    assert told == "diabetes: refused. it has no challenger; run `ehr-sn register CONFIG` first"
    assert list(load_champions(config)) == ["hypertension"]
    lines = audit.audit_path(config).read_text().splitlines()[-3:]
    told_of = [(line["outcome"], line.get("model")) for line in map(json.loads, lines)]
    assert told_of == [
        ("failed", None),
        ("refused", "ehr_sn.clinic.diabetes"),
        ("promoted", "ehr_sn.clinic.hypertension"),
    ]


def test_an_altered_file_in_the_registry_is_refused(clinic, registered, mlflow_here) -> None:
    name = model_name(clinic.config, "hypertension")
    version = mlflow_here.get_model_version(name, "1")
    folder = Path(version.source.removeprefix("file://")) / "artifacts" / "package"
    about = (folder / "package.json").read_text()
    sums = (folder / "SHA256SUMS").read_text()
    try:
        (folder / "package.json").write_text(about.replace('"slope": ', '"slope": 1'))
        with pytest.raises(EhrSnError, match="is not as it was written"):
            load(clinic.config, "hypertension", CHALLENGER)
        # With sums that fit, it is still not what was registered.
        (folder / "package.json").write_text(about)
        (folder / "SHA256SUMS").write_text(sums + "\n")
        with pytest.raises(EhrSnError, match="are not those that were registered"):
            load(clinic.config, "hypertension", CHALLENGER)
    finally:
        (folder / "package.json").write_text(about)
        (folder / "SHA256SUMS").write_text(sums)


def test_a_registry_that_is_down_is_tried_again_and_then_named(clinic, monkeypatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    with pytest.raises(EhrSnError, match=rf"http://127\.0\.0\.1:{port} cannot be reached") as told:
        load(clinic.config, "diabetes")
    assert "secret" not in str(told.value)
