"""Monitoring: what is as in training raises no alarm; what has drifted does, by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from ehr_sn import cli, tracking
from ehr_sn.config import Monitor
from ehr_sn.errors import DataError
from ehr_sn.evaluate.metrics import Sample
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.scoring.monitor import (
    Drift,
    Monitored,
    Unwatched,
    _codes,
    _performance,
    _shifted,
    compare,
    judged,
    monitor,
    newest_scores,
    psi,
    write_page,
)
from ehr_sn.scoring.profile import Profile, expected
from ehr_sn.scoring.reference import bins, reference
from ehr_sn.scoring.score import score

Extract = Callable[..., Path]


@pytest.fixture(scope="module")
def scored(clinic, models, write_tables, tmp_path_factory) -> Extract:
    """A function: what to change of a table → the folder of the scores of 600 other people."""

    def make(
        how: Callable[[pd.DataFrame], pd.DataFrame] | None = None, table: str = "labs"
    ) -> Path:
        folder = tmp_path_factory.mktemp("extract")
        write_tables(folder, 600, seed=5)
        if how is not None:
            path = folder / f"{table}.csv"
            how(pd.read_csv(path)).to_csv(path, index=False)
        return score(clinic.config, models, folder / "scores", folder)[0]

    return make


def alarms(clinic, folder: Path) -> set[tuple[str, str]]:
    return {(d.what, d.where) for d in monitor(clinic.config, folder).alarms}


def test_people_of_the_same_kind_raise_no_alarm(clinic, scored) -> None:
    found = monitor(clinic.config, scored())
    assert found.alarms == []
    watched = {drift.what for drift in found.drifts}
    assert watched == {"missing rate", "values", "observed entries", "scores"}


def test_what_is_no_longer_measured_is_named(clinic, scored) -> None:
    folder = scored(lambda labs: labs[(labs["test"] != "glucose") | (labs["person"] % 3 == 0)])
    found = alarms(clinic, folder)
    assert ("missing rate", "glucose.last") in found
    assert ("observed entries", "") in found
    assert ("missing rate", "pressure.last") not in found


def test_another_unit_is_seen_in_the_values_and_the_scores(clinic, scored) -> None:
    def in_mmol(labs: pd.DataFrame) -> pd.DataFrame:
        glucose = labs["test"] == "glucose"
        return labs.assign(result=labs["result"].where(~glucose, labs["result"] / 2))

    found = alarms(clinic, scored(in_mmol))
    assert {("values", "glucose.last"), ("values", "glucose.mean")} <= found
    assert ("scores", "diabetes") in found
    assert ("values", "pressure.last") not in found
    assert ("missing rate", "glucose.last") not in found


def test_a_new_and_a_vanished_code_are_named(clinic, scored) -> None:
    folder = scored(lambda known: known.replace({"icd": {"I10": "I10.9"}}), "diagnoses")
    codes = {("new code", "diagnoses: I10.9"), ("vanished code", "diagnoses: I10")}
    assert alarms(clinic, folder) == codes


def test_once_outcomes_are_known_discrimination_and_calibration_are_judged(
    clinic, scored, models, write_tables, tmp_path: Path
) -> None:
    folder = scored()
    (tmp_path / "later").mkdir()
    write_tables(tmp_path / "later", 600, seed=5)
    config = clinic.config.model_copy(
        update={"data_root": tmp_path / "later", "data_dir": tmp_path / "data"}
    )
    tables = {n: t.model_copy(update={"path": f"{n}.csv"}) for n, t in config.tables.items()}
    later = Store(ingest(config.model_copy(update={"tables": tables})))
    found = monitor(clinic.config, folder, later.path)
    assert found.alarms == []
    outcome = found.outcomes["diabetes"]
    assert outcome["auroc"] > 0.75
    y = later.labels()[:, later.diseases.index("diabetes")]
    assert outcome["n"] == (~np.isnan(y)).sum()
    assert outcome["n_positive"] == np.nansum(y)

    scores = pd.read_parquet(folder / "scores.parquet")
    rng = np.random.default_rng(0)
    table = scores[["subject_id", "prediction_time", "disease"]].assign(
        label=rng.random(len(scores)) < 0.5  # nothing to do with the scores
    )
    table.astype({"label": int, "disease": str}).to_csv(tmp_path / "labels.csv", index=False)
    wrong = monitor(clinic.config, folder, tmp_path / "labels.csv")
    named = {(d.what, d.where) for d in wrong.alarms}
    assert {("AUROC", "diabetes"), ("calibration slope", "diabetes")} <= named

    table.drop(columns="label").to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(DataError, match="lacks label"):
        monitor(clinic.config, folder, tmp_path / "labels.csv")


def test_labels_that_cannot_be_used_are_counted_and_said_with_no_small_count_on_the_page(
    clinic, scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = scored()
    scores = pd.read_parquet(folder / "scores.parquet").astype({"disease": str})
    table = scores[["subject_id", "prediction_time", "disease"]].astype({"prediction_time": str})
    table["label"] = (np.random.default_rng(0).random(len(table)) < scores["probability"]) * 1
    table.loc[:19, "prediction_time"] = "01/01/20"
    table.loc[20:22, "subject_id"] = [1, 2, 3]
    table.to_csv("labels.csv", index=False)
    command = ["monitor", str(clinic.folder / "clinic.yaml"), "--scores", str(folder)]
    done = CliRunner().invoke(cli.app, [*command, "--labels", "labels.csv"])
    assert done.exit_code == 0, done.output
    assert "labels: 20 rows not used: prediction_time is not ISO 8601" in done.stderr
    assert "labels: 3 rows not used: subject was not scored" in done.stderr
    assert f"labels: {len(table) - 23:,} of {len(table):,} rows met a score" in done.stderr
    page = Path("reports/clinic/monitoring.html").read_text()
    assert "labels: 20 rows not used" in page
    assert "labels: &lt; 11 rows not used: subject was not scored" in page
    told = json.loads(Path("reports/clinic/monitoring.json").read_text())
    assert len(told["warnings"]) == 3
    assert "3 rows" not in "".join(told["warnings"])

    table.assign(prediction_time="01/01/20").to_csv("labels.csv", index=False)
    with pytest.raises(DataError, match="no disease has 11 labels") as error:
        monitor(clinic.config, folder, Path("labels.csv"))
    assert f"\n  labels: 0 of {len(table):,} rows met a score" in str(error.value)
    assert f"\n  labels: {len(table):,} rows not used: prediction_time is not" in str(error.value)


def test_shards_add_up_to_the_whole(clinic, models, write_tables, tmp_path: Path) -> None:
    write_tables(tmp_path, 600, seed=5)
    whole, _ = score(clinic.config, models, tmp_path / "a", tmp_path)
    parts, _ = score(clinic.config, models, tmp_path / "b", tmp_path, shard_rows=500)
    assert (parts / "scores").is_dir()
    one, other = (json.loads((f / "profile.json").read_text()) for f in (whole, parts))
    for now in (one["now"], other["now"]):
        for sums in now["sums"]:
            now["sums"][sums] = round(now["sums"][sums], 6)
    assert one == other


def test_the_command_ends_with_3_on_an_alarm_and_mlflow_keeps_a_step_each_time(
    clinic, scored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    usual, odd = scored(), scored(lambda labs: labs[labs["person"] % 5 == 0])
    config = str(clinic.folder / "clinic.yaml")
    for folder, code in ((usual, 0), (usual, 0), (odd, 3)):
        done = CliRunner().invoke(cli.app, ["monitor", config, "--scores", str(folder.parent)])
        assert done.exit_code == code, done.output
    assert "alarm: missing rate of glucose.last" in done.output
    page = Path("reports/clinic/monitoring.html").read_text()
    assert "have drifted too far" in page
    assert "glucose.last" in page
    client = MlflowClient(tracking.tracking_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'clinic'")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`ehr_sn.kind` = 'monitor'")
    steps = client.get_metric_history(run.info.run_id, "alarms")
    assert [(m.step, m.value > 0) for m in sorted(steps, key=lambda m: m.step)] == [
        (0, False),
        (1, True),
    ]


def test_few_rows_or_no_scores_are_refused(clinic, models, write_tables, tmp_path: Path) -> None:
    write_tables(tmp_path, 40, seed=5)
    folder, _ = score(clinic.config, models, tmp_path / "scores", tmp_path)
    with pytest.raises(DataError, match=r"40 rows, fewer than monitor\.min_rows \(50\)"):
        monitor(clinic.config, folder)
    with pytest.raises(DataError, match="holds no scores"):
        newest_scores(tmp_path / "data")


def test_psi_of_equal_shares_is_0_and_grows_with_the_difference() -> None:
    assert psi([0.3, 0.7], [0.3, 0.7]) == 0
    assert 0 < psi([0.35, 0.65], [0.3, 0.7]) < psi([0.5, 0.5], [0.3, 0.7])
    assert np.isfinite(psi([0, 1], [0.3, 0.7]))


# -- alarms that mean something --------------------------------------------------------------------


def shifted(now: np.ndarray, then: np.ndarray) -> Drift | Unwatched:
    told = bins(np.asarray(then, dtype=float))
    places = np.searchsorted(told["edges"], now)
    counts = np.bincount(places, minlength=len(told["shares"])).tolist()
    (found,) = _shifted(Monitor(), "values", "x", counts, told)
    return found


@pytest.mark.parametrize("n", [11, 20, 30, 75, 200])
def test_values_that_few_rows_have_raise_no_more_alarms_than_others(n: int) -> None:
    rng = np.random.default_rng(0)
    then = rng.normal(size=20_000)
    alarms = [shifted(rng.normal(size=n), then).alarm for _ in range(300)]
    assert np.mean(alarms) <= 0.02


ZEROS = np.zeros(10_000)
COUNTS = np.r_[np.tile(np.arange(1, 6), 140), np.zeros(9300)]


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (ZEROS, np.ones(500)),
        (ZEROS + 1, np.zeros(500)),
        (ZEROS, -np.ones(500)),
        (np.r_[np.ones(10), ZEROS], np.arange(500) % 2),
        (np.r_[np.ones(300), ZEROS], np.zeros(500) + 0.5),
        (COUNTS, 500 * COUNTS),
        (COUNTS, COUNTS / 10),
        (COUNTS, np.zeros(10_000)),
    ],
    ids=[
        "a flag that was never set, and always is",
        "a flag that always was set, and never is",
        "a constant that becomes less",
        "a flag that 10 had, and half of the rows have",
        "a flag that is no flag any more",
        "a count in another unit",
        "a count in a larger unit",
        "a count that has become 0",
    ],
)
def test_what_hardly_varied_is_watched(then: np.ndarray, now: np.ndarray) -> None:
    assert shifted(now, then).alarm
    assert not shifted(np.random.default_rng(0).choice(then, 500), then).alarm


def packages(rows: np.ndarray, subjects: np.ndarray | None = None) -> list[Any]:
    """Of a made-up disease, what monitoring needs of its package; the scores are uniform."""
    names = [f"x{i}" for i in range(rows.shape[1])]
    scores = bins(np.random.default_rng(9).random(2000))
    about = {"training": reference(rows, names, subjects), "scores": scores, "figures": {}}
    return [SimpleNamespace(features=names, disease="gout", about=about, reported={})]


def night(rng: np.random.Generator, of: list[Any], rows: np.ndarray, each: int = 1) -> set[str]:
    """Features that raise an alarm, where each subject has so many rows, which are all alike."""
    profile = Profile(of)
    probability = np.repeat(rng.random(len(rows)), each)
    subjects = np.repeat(np.arange(len(rows)), each)
    told: Any = [SimpleNamespace(probability=probability)]
    profile.add(np.repeat(rows, each, axis=0), told, subjects)
    drifts, _ = compare(Monitor(), profile.as_dict() | {"codes": {}}, expected(of))
    return {drift.where for drift in drifts if drift.alarm}


def mixed(rng: np.random.Generator, n: int) -> np.ndarray:
    """Thirty features: lab values, one of which few rows have; flags; counts with many zeros."""
    labs = rng.normal(size=(n, 10))
    labs[rng.random((n, 10)) < 0.3] = np.nan
    labs[rng.random(n) < 0.9, 0] = np.nan
    flags = rng.random((n, 10)) < [0, 0.002, 0.01, 0.05, 0.1, 0.3, 0.5, 0.9, 0.999, 1]
    counts = np.where(rng.random((n, 10)) < 0.15, rng.geometric(0.3, (n, 10)), 0)
    return np.concatenate([labs, flags, counts], axis=1).astype(np.float32)


@pytest.mark.parametrize("each", [1, 4])
@pytest.mark.parametrize("n", [50, 200])
def test_a_page_without_drift_has_an_alarm_in_at_most_one_of_fifty_nights(
    n: int, each: int
) -> None:
    rng = np.random.default_rng(n + each)
    false = 0
    for _ in range(4):
        of = packages(mixed(rng, 3000))
        false += sum(bool(night(rng, of, mixed(rng, n // each), each)) for _ in range(25))
    assert false <= 5  # of 100: with 2 % there are more in 1.5 % of such tests


def test_a_page_tells_a_shift_a_lost_panel_and_another_unit() -> None:
    rng = np.random.default_rng(0)
    of = packages(mixed(rng, 3000))
    for _ in range(5):
        rows = mixed(rng, 300)
        rows[:, 3] += 0.5
        rows[:, 4:6] = np.nan
        rows[:, 25] *= 10
        assert {"x3", "x4", "x5", "x25"} <= night(rng, of, rows)


def test_tests_share_the_false_alarms_of_a_page(clinic, scored) -> None:
    folder = scored()
    found = monitor(clinic.config, folder)
    assert {drift.level for drift in found.drifts} == {0.02 / len(found.drifts)}
    rule = clinic.config.monitor.model_copy(update={"false_alarms": 0.5})
    config = clinic.config.model_copy(update={"monitor": rule})
    assert {d.level for d in monitor(config, folder).drifts} == {0.5 / len(found.drifts)}


def test_an_alarm_is_beyond_its_limit_and_beyond_chance() -> None:
    drift = Drift("scores", "gout", None, None, by=0.2, limit=0.1, p=1e-6, level=1e-4)
    assert drift.alarm
    assert not replace(drift, by=0.05).alarm
    assert not replace(drift, p=1e-3).alarm
    assert not replace(drift, by=np.nan).alarm


def codes(events: int, of: dict[str, tuple[int, int]], everyone: int) -> dict[str, Any]:
    """One table's codes: events and subjects of each."""
    counts = {code: n for code, (n, _) in of.items()}
    subjects = {code: n for code, (_, n) in of.items()}
    told = {"events": events, "codes": counts, "subjects": subjects, "everyone": everyone}
    return {"codes": {"labs": told}}


def test_a_code_vanishes_only_where_so_few_subjects_would_not_do_without_it() -> None:
    then = codes(100_000, {"I10": (10_000, 6000), "Z99": (9000, 120)}, 20_000)
    for everyone, gone in ((30, False), (60, False), (2000, True)):
        one, other = _codes(Monitor(), codes(5 * everyone, {}, everyone), then)
        assert isinstance(one, Drift)
        assert isinstance(other, Drift)
        assert (one.what, one.where) == ("vanished code", "labs: I10")
        assert replace(one, level=1e-3).alarm == gone
        # The other's many events are of few, of whom by chance none may be there.
        assert not replace(other, level=1e-3).alarm


def test_a_new_code_must_be_of_more_subjects_than_were_left_out_in_training() -> None:
    then = codes(100_000, {"I10": (10_000, 6000)}, 20_000)
    for subjects, alarm in ((11, False), (60, True)):
        now = codes(1000, {"I10": (100, 60), "I11": (100, subjects)}, 600)
        (found,) = _codes(Monitor(), now, codes(100_000, {"I10": (10_000, 6000)}, 2000))
        assert isinstance(found, Drift)
        assert (found.where, replace(found, level=1e-3).alarm) == ("labs: I11", alarm)
    (found,) = _codes(Monitor(), codes(1000, {"I10": (100, 60), "I11": (100, 11)}, 200), then)
    assert isinstance(found, Drift)
    assert replace(found, level=1e-3).alarm


def test_every_feature_is_watched_or_said_not_to_be_and_why(clinic, scored, tmp_path: Path) -> None:
    folder = scored(lambda labs: labs[(labs["test"] != "glucose") | (labs["person"] < 1008)])
    profile = json.loads((folder / "profile.json").read_text())
    profile["then"]["training"]["values"]["age"] = bins(np.full(5, 50.0))
    (folder / "profile.json").write_text(json.dumps(profile))
    found = monitor(clinic.config, folder)
    told = {(thing.what, thing.where): thing.reason for thing in found.unwatched}
    assert told["values", "age"] == "fewer than 11 training rows have a value"
    assert told["values", "glucose.last"] == "fewer than 11 rows have a value"
    watched = {drift.where for drift in found.drifts if drift.what == "values"}
    unwatched = {where for what, where in told if what == "values"}
    assert watched | unwatched == {*clinic.store.feature_names}
    assert not watched & unwatched
    page, data = (path.read_text() for path in write_page(clinic.config, found, tmp_path))
    assert "values of age: fewer than 11 training rows have a value" in page
    listed = json.loads(data)["unwatched"]
    assert {"what": "values", "where": "age", "reason": told["values", "age"]} in listed
    assert found.metrics()["unwatched"] == len(told)


def test_profiles_of_the_build_before_are_monitored(clinic, scored) -> None:
    folder = scored(lambda labs: labs[(labs["test"] != "glucose") | (labs["person"] % 3 == 0)])
    profile = json.loads((folder / "profile.json").read_text())
    now, training = profile["now"], profile["then"]["training"]
    del now["squares"], now["value_squares"], training["effective"]
    for told in [
        *training["values"].values(),
        training["observed"],
        *profile["then"]["scores"].values(),
    ]:
        del told["effective"]
    for told in [*now["codes"].values(), *training["codes"].values()]:
        del told["subjects"], told["everyone"]
    n = training["values"]["glucose.count"]["rows"]
    training["values"]["glucose.count"] = {"rows": n, "edges": [], "shares": [1.0]}
    now["values"]["glucose.count"] = [200]
    (folder / "profile.json").write_text(json.dumps(profile))
    found = monitor(clinic.config, folder)
    assert ("missing rate", "glucose.last") in {(d.what, d.where) for d in found.alarms}
    reasons = {(thing.what, thing.where): thing.reason for thing in found.unwatched}
    assert reasons.keys() == {
        ("values", "glucose.count"), ("codes", "labs"), ("codes", "diagnoses")
    }  # fmt: skip
    assert all("of an earlier version" in reason for reason in reasons.values())


def test_performance_is_on_the_pages_budget_and_what_has_no_estimate_is_not_watched() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(0.1, 0.9, 400)
    y, subject = rng.random(400) < p, np.arange(400)
    then = {"figures": {"gout": {"n": 500, "auroc": 0.77}, "asthma": {"n": 500, "auroc": 0.7}}}
    *sound, other = _performance(Monitor(), {"gout": judged(Sample(y, p, subject))}, then)
    assert [drift.alarm for drift in sound if isinstance(drift, Drift)] == [False] * 3
    assert other == Unwatched("performance", "asthma", "fewer than 11 labels of either class")
    found = [*_performance(Monitor(), {"gout": judged(Sample(~y, p, subject))}, then)][:3]
    alarms = [drift.what for drift in found if isinstance(drift, Drift) and drift.alarm]
    assert alarms == ["AUROC", "calibration slope"]
    by_table = _performance(
        Monitor(), {"gout": judged(Sample(y, p, subject))}, then | {"weighted": ["gout"]}
    )
    assert [
        thing.what for thing in by_table if thing.where == "gout" and isinstance(thing, Unwatched)
    ] == ["calibration intercept"]
    fewer = judged(Sample(rng.random(400) < p**3, p, subject))
    *_, intercept = [*_performance(Monitor(), {"gout": fewer}, then)][:3]
    assert isinstance(intercept, Drift)
    assert intercept.alarm
    apart = judged(Sample(p > 0.5, p, subject))
    found = [*_performance(Monitor(), {"gout": apart}, then)]
    assert {thing.what for thing in found if isinstance(thing, Unwatched)} == {
        "performance", "calibration slope",
    }  # fmt: skip
    text = json.dumps(
        Monitored({"fingerprint": "", "scored_at": "", "rows": 400, "models": {}}, (), (),
                  {"gout": apart}, None, 11).as_dict(),
        allow_nan=False,
    )  # fmt: skip
    assert json.loads(text)["outcomes"]["gout"]["calibration_slope"] is None


def test_all_json_of_models_scores_and_monitoring_is_strict(
    clinic, models, scored, tmp_path: Path
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    folder = scored()
    _, data = write_page(clinic.config, monitor(clinic.config, folder), tmp_path)
    files = [data, folder / "profile.json", folder / "summary.json"]
    files += [model.package.folder / "package.json" for model in models]
    for file in files:
        json.loads(file.read_text(), parse_constant=refuse)


def test_rows_of_one_subject_make_calibration_no_surer() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(0.1, 0.9, 300)
    y, subject = rng.random(300) < p, np.arange(300)
    once = judged(Sample(y, p, subject))
    often = judged(Sample(*(np.repeat(each, 5) for each in (y, p, subject))))
    assert often["subjects_of_a_class"] == once["subjects_of_a_class"]
    for name in ("calibration_slope_se", "calibration_intercept_se"):
        assert often[name] == pytest.approx(once[name], rel=0.1)
