"""A tuned pipeline: one more run a comparison in MLflow, and the rest as ever."""

from pathlib import Path

from flows.pipeline import pipeline

import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from ehr_sn import cli, tracking
from ehr_sn.config import load_config
from ehr_sn.ingest.store import Store
from ehr_sn.models import train as training

TRIALS = 3
BASELINE = ("none", "none", "logistic_regression")
BLEND = ("none", "none", "both")


@pytest.fixture(scope="module")
def parent_id(lasting_clinic: Path) -> str:
    """The MLflow run of a tuned clinic, which is in the current folder."""
    text = lasting_clinic.read_text()
    text = text.replace("[sparsity_normalization, zero, zero+mask]", "[zero]")
    text = text.replace("    mlp_dropout: {hidden: [8], dropout: 0.5}\n", "")
    text += "  baselines: [logistic_regression]\n"
    text += "  blends: {both: [[zero, standard, mlp], logistic_regression]}\n"
    text += f"tune: {{trials: {TRIALS}, seeds: 2}}\n"
    lasting_clinic.write_text(text)
    return pipeline(str(lasting_clinic))


def below(parent_id: str) -> list:
    client = MlflowClient(tracking.tracking_uri())
    experiment = client.get_experiment_by_name("clinic").experiment_id
    return list(client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent_id}'"))


def test_trials_stand_below_a_run_of_their_own(parent_id: str) -> None:
    kinds = [run.data.tags.get("ehr_sn.kind") for run in below(parent_id)]
    assert sorted(kinds, key=str) == [None] * 6 + ["tuning"] * 2
    for run in below(parent_id):
        if run.data.tags.get("ehr_sn.kind") != "tuning":
            continue
        metrics = run.data.metrics
        assert 0.5 < metrics["tuning_auroc_untuned"] <= metrics["tuning_auroc"] < 1
        trials = below(run.info.run_id)
        assert {trial.data.tags["ehr_sn.kind"] for trial in trials} == {"trial"}
        places = {(t.data.params["split"], t.data.params["trial"]) for t in trials}
        assert places == {(s, t) for s in ("1", "2") for t in ("0", "1", "2")}
        best = [
            max(
                t.data.metrics["tuning_auroc"]
                for t in trials
                if t.data.params["split"] == split and t.data.params["pruned"] == "False"
            )
            for split in ("1", "2")
        ]
        assert metrics["tuning_auroc"] == pytest.approx(sum(best) / 2)


def test_a_comparison_shows_the_parameters_chosen(parent_id: str) -> None:
    config = load_config("clinic.yaml")
    (manifest,) = Path("data/clinic").glob("*/manifest.json")
    store = Store(manifest.parent)
    results = [run.data.params for run in below(parent_id) if "disease" in run.data.params]
    assert {frozenset(params) for params in results} == {frozenset(results[0])}
    for params in results:
        assert params["trials"] == str(TRIALS)
        comparison = params["method"], params["scaler"], params["architecture"]
        members = "zero · standard · mlp, logistic_regression" if comparison == BLEND else ""
        assert params["blend_of"] == members
        chosen = [training.tuned(config, store, training.Cell(*comparison, s)) for s in (0, 1)]
        if comparison in (BASELINE, BLEND):
            told = (f"C={one['C']}" if one else "as configured" for one in chosen)
            assert params["chosen"] == (", ".join(told) if any(chosen) else "")
            continue
        for name, default in (("learning_rate", 0.02), ("weight_decay", 0.01)):
            values = [str(settings.get(name, default)) for settings in chosen]
            assert params[name] == (values[0] if len(set(values)) == 1 else ", ".join(values))
        assert params["hidden"].split(", ")[0] == str(chosen[0].get("width", 8))
    assert any(params["learning_rate"] != "0.02" for params in results)


def test_the_table_and_the_report_say_what_was_tuned_on_what(parent_id: str) -> None:
    said = CliRunner().invoke(cli.app, ["compare", "clinic.yaml"]).output
    told = " ".join(said.split())
    assert "Tuned: 3 trials each, on tuning rows." in told
    assert "both: the mean of zero · standard · mlp, logistic_regression." in told
    done = CliRunner().invoke(cli.app, ["report", "clinic.yaml"])
    assert done.exit_code == 0, done.output
    page = Path("reports/clinic/report.html").read_text()
    assert "both: the mean of what zero · standard · mlp, logistic_regression predict." in page
    for name in ("report.html", "model_card.md"):
        text = Path("reports/clinic", name).read_text()
        assert "3 trials each, on tuning rows" in text
