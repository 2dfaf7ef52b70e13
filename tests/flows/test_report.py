"""The report of a whole pipeline: complete, self-contained, and true to what was recorded."""

import re
from html.parser import HTMLParser
from pathlib import Path

from flows.pipeline import pipeline
from flows.register import register
from flows.retrain import retrain

import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from ehr_sn import cli, tracking
from ehr_sn.config import load_config
from ehr_sn.errors import EhrSnError
from ehr_sn.ingest.store import Store
from ehr_sn.models.train import Cell, cell_path

VOID = {"meta", "link", "br", "img", "input", "hr", "use", "path"}


class Page(HTMLParser):
    """Tags, attributes, ids and text of a page; that every element is closed is asserted."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def reported(lasting_clinic: Path) -> tuple[str, Page]:
    """The MLflow run of a clinic and the page about it; the clinic is in the current folder."""
    config = lasting_clinic.read_text() + "  baselines: [hist_gradient_boosting]\n"
    lasting_clinic.write_text(config + "evaluate: {learning_curve: true}\n")
    parent_id = pipeline(str(lasting_clinic))
    done = CliRunner().invoke(cli.app, ["report", str(lasting_clinic)])
    assert done.exit_code == 0, done.output
    return parent_id, Page(Path("reports/clinic/report.html").read_text())


def test_the_page_is_whole_needs_nothing_else_and_is_in_mlflow(reported) -> None:
    parent_id, page = reported
    assert not page.tags & {"script", "link", "img", "iframe"}
    outside = [v for k, v in page.attributes if k in ("src", "href", "xlink:href") and v[0] != "#"]
    assert outside == []
    assert "@import" not in page.text
    assert not re.search(r"url\((?!#)", page.text)
    assert "prefers-color-scheme: dark" in page.text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    linked = {v[1:] for k, v in page.attributes if k == "href" and "xlink" not in k}
    assert linked <= set(ids)
    sections = "answer methods sparsity shift leaks calibration decision thresholds groups"
    assert set(f"{sections} importance learning missing protocol".split()) <= set(ids)
    files = MlflowClient(tracking.tracking_uri()).list_artifacts(parent_id, "report")
    assert {file.path for file in files} == {"report/report.html", "report/model_card.md"}

    config = load_config("clinic.yaml")
    for result in tracking.finished_run(config).results():
        assert f"{result['auroc_mean']:.3f}" in page.text
        assert f"{result['ci_low']:.3f} to {result['ci_high']:.3f}" in page.text
    _, _, rest = Path("reports/clinic/report.html").read_text().partition('<h2 id="shift"')
    assert rest.partition("<h2")[0].count("hist_gradient_boosting") == 2 * 6  # in every figure
    for r in tracking.finished_run(config).results():
        shift = tracking.finished_run(config).curves(r["run_id"], "shift_mcar_auroc")
        assert sorted(shift["shift_mcar_auroc"]) == [0, 10, 30, 50, 70, 90]
    curves = [
        tracking.finished_run(config).curves(r["run_id"], "learning_curve_auroc")
        for r in tracking.finished_run(config).results()
    ]
    learned = [list(curve["learning_curve_auroc"]) for curve in curves if curve]
    assert len(learned) in (2, 4)  # the best method, and zero unless that is it, for two diseases
    assert all(sorted(steps) == [10, 25, 50, 100] for steps in learned)

    card = Path("reports/clinic/model_card.md").read_text()
    assert "{{" not in card
    assert "| diabetes |" in card
    rows = [line.count("|") for line in card.splitlines() if line.startswith("| diabetes | age")]
    assert rows
    assert set(rows) == {6}


def test_a_run_whose_networks_are_gone_says_how_to_get_them_back(reported) -> None:
    config = load_config("clinic.yaml")
    (manifest,) = Path("data/clinic").glob("*/manifest.json")
    path = cell_path(config, Store(manifest.parent), Cell("zero", "standard", "mlp", 1))
    path.rename(path.with_suffix(".away"))
    done = CliRunner().invoke(cli.app, ["report", "clinic.yaml"])
    path.with_suffix(".away").rename(path)
    assert "1 of the 14 trained cells of this run are not in" in str(done.exception)
    assert "--force" in str(done.exception)


def test_a_run_of_other_settings_is_not_reported_on(reported) -> None:
    changed = Path("changed.yaml")
    changed.write_text(Path("clinic.yaml").read_text().replace("max_epochs: 12", "max_epochs: 13"))
    done = CliRunner().invoke(cli.app, ["report", str(changed), "--output", "elsewhere"])
    assert isinstance(done.exception, EhrSnError)
    assert "has changed since its newest finished run" in str(done.exception)
    assert not Path("elsewhere").exists()


def test_models_of_a_run_are_registered_promoted_and_rolled_back_by_commands(reported) -> None:
    def ehr_sn(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(cli.app, [*arguments])
        assert done.exit_code == code, done.output
        return done.output

    config = Path("clinic.yaml")
    one = ("clinic.yaml", "--disease", "diabetes")
    strict = "promotion: {calibration_slope: [5, 6]}\n"
    config.write_text(config.read_text() + strict)  # which asks for no new run
    assert "ehr_sn.clinic.diabetes version 1\n" in ehr_sn("register", *one, "--method", "zero")
    assert "refused. calibration_slope" in ehr_sn("promote", *one, code=1)
    wide = "promotion: {margin: 0.4, calibration_slope: [0.1, 9], calibration_intercept: [-2, 2]}\n"
    config.write_text(config.read_text().replace(strict, wide))
    assert "promoted; it is the first champion" in ehr_sn("promote", *one)
    assert "version 2\n" in ehr_sn("register", *one, "--method", "zero+mask")
    assert "promoted; AUROC" in ehr_sn("promote", *one)
    assert "version 1 is the champion again, in place of 2" in ehr_sn("rollback", *one)
    assert "4 lines, each as it was written" in ehr_sn("audit", "verify", "clinic.yaml")
    with pytest.raises(EhrSnError, match="no comparison 'mean' to keep"):
        CliRunner().invoke(cli.app, ["register", *one, "--method", "mean"], catch_exceptions=False)
    client = MlflowClient(tracking.tracking_uri(), tracking.tracking_uri())
    version = client.get_model_version("ehr_sn.clinic.diabetes", "2")
    run = client.get_run(version.run_id)
    assert (run.data.params["method"], run.data.params["disease"]) == ("zero+mask", "diabetes")
    assert register("clinic.yaml")["hypertension"] == 1  # all of it again, as flows
    assert retrain("clinic.yaml")["hypertension"]
    assert client.get_model_version_by_alias("ehr_sn.clinic.hypertension", "champion").version == 1
