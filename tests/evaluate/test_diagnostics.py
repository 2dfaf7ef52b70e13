"""What missing entries do to predictions: told from chance, and from what is real."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from numpy.testing import assert_array_equal
from scipy.special import expit, logit

from ehr_sn.config import load_config
from ehr_sn.errors import ConfigError
from ehr_sn.evaluate import diagnostics
from ehr_sn.evaluate.diagnostics import (
    RATES,
    Filled,
    Shift,
    ShiftedRows,
    asked_of,
    diagnose,
    leak_audit,
    missing_table,
    sparsity_bias,
)
from ehr_sn.evaluate.metrics import auroc, calibration
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.missing import make_method
from ehr_sn.models.predict import best_comparison, load_predictor, read_tuning
from ehr_sn.models.train import NOTHING, Cell, cell_path, read_cell, train_cell

ROOT = Path(__file__).parents[2]
TRAIN = {
    "train__seeds": 2,
    "train__max_epochs": 3,
    "train__batch_size": 32,
    "train__architectures": {"mlp": {"hidden": [4]}},
    "train__methods": {"standard": ["zero", "sparsity_normalization+mask"]},
}


def subjects(seed=0, n=20_000):
    """Labels, true risks and numbers of observed entries that have nothing to do with them."""
    rng = np.random.default_rng(seed)
    risk = expit(rng.normal(-1, 0.7, n))
    return rng.random(n) < risk, risk, rng.integers(5, 40, n)


def test_a_prediction_that_moves_with_the_number_of_entries_alone_is_biased():
    y, risk, observed = subjects()
    z = (observed - observed.mean()) / observed.std()
    bias = sparsity_bias([(y, expit(logit(risk) + 0.3 * z), observed)])
    assert bias.slope == pytest.approx(0.3, abs=0.02)
    assert bias.slope_outcome == pytest.approx(0, abs=0.04)
    assert bias.unexplained == pytest.approx(-0.3, abs=0.04)
    assert bias.unexplained_high < 0
    assert bias.spread > 5 * bias.spread_outcome
    assert bias.in_the_large[0] > 0.2 > -0.2 > bias.in_the_large[-1]


def test_a_number_of_entries_that_goes_with_the_outcome_is_no_bias():
    """The sicker are measured more, and the model knows it."""
    rng = np.random.default_rng(1)
    observed = rng.integers(5, 40, 20_000)
    risk = expit((observed - 22) / 12 + rng.normal(-1, 0.5, 20_000))
    bias = sparsity_bias([(rng.random(20_000) < risk, risk, observed)])
    assert bias.slope > 0.5
    assert bias.slope_outcome > 0.5
    assert bias.unexplained_low < 0 < bias.unexplained_high
    assert bias.spread == pytest.approx(bias.spread_outcome, abs=0.04)


def test_the_bias_interval_covers_zero_about_95_percent_of_the_time_without_bias():
    biases = [sparsity_bias([subjects(seed, 600)]) for seed in range(300)]
    covered = [b.unexplained_low <= 0 <= b.unexplained_high for b in biases]
    assert 0.92 < np.mean(covered) < 0.98


def test_bins_are_quantiles_and_small_ones_are_not_shown():
    y, risk, _ = subjects(n=400)
    observed = np.repeat([3, 8, 9], [5, 195, 200])
    bias = sparsity_bias([(y, risk, observed)])
    assert sum(bias.n) <= 400
    assert min(bias.n) >= 11
    assert sparsity_bias([(y, risk, observed)] * 3) == bias


def test_where_everybody_has_the_same_entries_there_is_no_slope():
    y, risk, observed = subjects(n=300)
    bias = sparsity_bias([(y, risk, np.full_like(observed, 9))])
    assert bias.slope == 0
    assert np.isnan([bias.slope_outcome, bias.unexplained]).all()
    assert bias.spread == 0


@pytest.fixture
def trained(busy):
    config = busy.config(**TRAIN)
    store = Store(ingest(config))
    for method in config.train.methods["standard"]:
        train_cell(config, store, Cell(method, "standard", "mlp", 0))
    return config, store


@pytest.mark.parametrize(
    "method",
    [
        "zero",
        "sparsity_normalization+mask",
        "sparsity_normalization_tuned",
        "multiple_imputation",
        "neumiss",
        "gmm",
    ],
)
def test_a_cell_read_back_predicts_bit_for_bit_what_training_left(trained, method):
    config, store = trained
    cell = Cell(method, "standard", "mlp", 0)
    train_cell(config, store, cell)
    held_out = store.splits()[:, 0] == "held_out"
    eligible = ~np.isnan(store.labels()[held_out, 0])
    probability = load_predictor(config, store, cell)(store.values()[held_out])
    assert probability.shape[:2] == (1, 2)
    left = read_cell(cell_path(config, store, cell), store).held_out["diabetes"]
    assert_array_equal(probability[0][:, eligible], left.probability)


def test_choices_are_made_on_tuning_rows(trained):
    config, store = trained
    areas = {}
    for method in config.train.methods["standard"]:
        tuning = read_tuning(config, store, Cell(method, "standard", "mlp", 0))["diabetes"]
        n = (~np.isnan(store.labels()[store.splits()[:, 0] == "tuning", 0])).sum()
        assert tuning.y.shape == (n,)
        areas[method] = auroc(tuning.y, tuning.ensemble)
    assert best_comparison(config, store) == (max(areas, key=areas.get), "standard", "mlp")


def test_every_method_loses_the_same_entries_and_higher_rates_lose_more(trained):
    _, store = trained
    shifted = ShiftedRows.of(store)
    for mechanism in diagnostics.SHIFTS:
        left = [~np.isnan(shifted.rows[mechanism, rate]) for rate in RATES]
        assert all((more <= fewer).all() for fewer, more in pairwise(left))
        lost = 1 - left[3].sum() / left[0].sum()
        assert lost == pytest.approx(0.5, abs=0.12)
        assert_array_equal(left[0], ~np.isnan(store.values()[store.splits()[:, 0] == "held_out"]))


@pytest.mark.parametrize(
    "comparison",
    [
        ("zero", "standard", "mlp"),
        (NOTHING, NOTHING, "hist_gradient_boosting"),
        (NOTHING, NOTHING, "logistic_regression"),
    ],
)
def test_a_diagnosis_is_that_of_the_predictions_and_is_read_back_from_its_curves(
    trained, comparison
):
    config, store = trained
    cell = Cell(*comparison, 0)
    train_cell(config, store, cell)
    held_out = read_cell(cell_path(config, store, cell), store).held_out
    found = diagnose(config, store, comparison, {d: [rows] for d, rows in held_out.items()})
    rows = held_out["diabetes"]
    for shift in found["diabetes"].shifts:
        assert shift.values["auroc"][0] == auroc(rows.y, rows.ensemble)
        assert shift.values["mean_prediction"][0] == pytest.approx(rows.ensemble.mean(), rel=1e-6)
        slope, intercept = calibration(rows.y, rows.ensemble)
        assert shift.values["calibration_slope"][0] == pytest.approx(slope)
        assert shift.values["calibration_intercept"][0] == pytest.approx(intercept)
        assert Shift.from_curves(shift.mechanism, shift.as_curves()) == shift


def test_predictions_that_ignore_the_entries_do_not_change_when_they_go(trained):
    _, store = trained
    p = np.linspace(0.1, 0.6, (store.splits()[:, 0] == "held_out").sum(), dtype=np.float32)
    for shift in ShiftedRows.of(store).shifts(lambda rows: np.tile(p, (1, 2, 1)))[0]:
        assert len(set(shift.values["auroc"])) == 1


def made_store(folder: Path, mask, label, names) -> Store:
    """A store of these masks and labels, dealt to splits in turn."""
    ids = np.arange(len(label))
    keys = pd.DataFrame({"subject_id": ids, "prediction_time": pd.Timestamp(2020, 1, 1)})
    values = pd.DataFrame(np.where(mask, 1.0, np.nan).astype("float32"), columns=names)
    pd.concat([keys, values], axis=1).to_parquet(folder / "values.parquet", index=False)
    keys.assign(ill=label).to_parquet(folder / "labels.parquet", index=False)
    dealt = np.array(["train", "train", "train", "tuning", "held_out"])[ids % 5]
    splits = pd.DataFrame({"subject_id": ids, "split": dealt})
    splits.to_parquet(folder / "splits.parquet", index=False)
    features = [{"name": name, "aggregate": None} for name in names]
    config = {"labels": {"ill": {"positive": "ill == 1", "negative": "ill == 0"}}}
    manifest = {"features": features, "labels": {"ill": {}}, "config": config}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Store(folder)


def test_a_feature_whose_absence_gives_the_label_away_is_named_and_noise_is_not(tmp_path):
    rng = np.random.default_rng(2)
    label = (rng.random(6000) < 0.1).astype("int8")
    mask = rng.random((6000, 30)) < rng.uniform(0.2, 0.9, 30)
    mask[:, 7] = (label == 0) & (rng.random(6000) < 0.5)
    (audit,) = leak_audit(made_store(tmp_path, mask, label, [f"x{j}" for j in range(30)]))
    assert [(leak.feature, leak.when) for leak in audit.leaks] == [("x7", "absent")]
    assert audit.mask.value > 0.7
    assert "x7 (absent)" in str(audit)
    assert [row["mask of"] for row in audit.rows() if row["leak"]] == ["x7"]


def follow_up(folder: Path, refused_by_the_ill: float = 0.0, asked_of_others: float = 0.0) -> Store:
    """Most of the well work, few of the ill do; hours are asked of those who work."""
    rng = np.random.default_rng(4)
    label = (rng.random(8000) < 0.2).astype("int8")
    works = rng.random(8000) < np.where(label, 0.3, 0.8)
    refuses = rng.random(8000) < np.where(label, refused_by_the_ill, 0.0)
    hours = works & ~refuses | ~works & (rng.random(8000) < asked_of_others)
    store = made_store(folder, np.stack([np.ones(8000, bool), hours], 1), label, ["works", "hours"])
    values = pd.read_parquet(folder / "values.parquet").assign(works=works.astype("float32"))
    values.to_parquet(folder / "values.parquet", index=False)
    return store


def test_a_follow_up_question_is_judged_among_those_who_are_asked_it(tmp_path):
    store = follow_up(tmp_path)
    (undeclared,) = leak_audit(store)
    assert [leak.feature for leak in undeclared.leaks] == ["hours"]
    (audit,) = leak_audit(store, asked={"hours": "works"})
    assert audit.leaks == ()
    assert "by design absent elsewhere: hours (asked where works)" in str(audit)
    assert [row["among"] for row in audit.rows() if row["mask of"] == "hours"] == ["works"]


def test_a_leak_among_those_who_are_asked_is_found(tmp_path):
    (audit,) = leak_audit(follow_up(tmp_path, refused_by_the_ill=0.6), asked={"hours": "works"})
    assert [f"{leak.feature} {leak.where}" for leak in audit.leaks] == ["hours absent among works"]


def test_what_is_said_of_who_is_asked_is_ignored_where_it_is_not_so(tmp_path):
    (audit,) = leak_audit(follow_up(tmp_path, asked_of_others=0.1), asked={"hours": "works"})
    assert [(leak.feature, leak.among) for leak in audit.leaks] == [("hours", "")]


def test_a_wrong_name_of_what_is_asked_is_refused(busy):
    config = busy.config(evaluate__asked_of={"sbp.lst": "age"})
    with pytest.raises(ConfigError, match=r"asked_of\.sbp\.lst: there is no feature 'sbp\.lst'"):
        asked_of(config, Store(ingest(config)))


def test_masks_of_mere_chance_raise_no_alarm_even_among_few_subjects(tmp_path):
    rng = np.random.default_rng(3)
    label = (rng.random(300) < 0.1).astype("int8")
    mask = rng.random((300, 200)) < 0.5
    (audit,) = leak_audit(made_store(tmp_path, mask, label, [f"x{j}" for j in range(200)]))
    assert audit.features[0].auroc.value > diagnostics.LEAK_FROM  # as chance has it, in 60 rows
    assert audit.leaks == ()


def test_missing_entries_are_counted_by_label_and_split(tmp_path):
    label = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1], dtype="int8")
    mask = np.array([[True, i not in (0, 1, 6, 8)] for i in range(10)])
    always, sometimes = missing_table(made_store(tmp_path, mask, label, ["always", "sometimes"]))
    assert always.rate("ill", "train", 1) == 0
    assert sometimes.missing["ill", "train", 0] == 2
    assert sometimes.rows["ill", "train", 0] == 3
    assert sometimes.missing["ill", "train", 1] == 1
    assert sometimes.rate("ill", "tuning", 1) == 1
    assert sometimes.rate("ill", "held_out", 1) == 0


def test_the_glucose_tolerance_test_gives_diabetes_away_by_its_absence(shared_data, tmp_path):
    """NHANES spares people with diabetes the test: not having it says what they have."""
    content = yaml.safe_load((ROOT / "configs" / "nhanes.yaml").read_text())
    tables = {n: content["tables"][n] for n in ("DEMO", "BMX", "CBC", "DIQ")}
    content["tables"] = tables | {"OGTT": {"path": "*/OGTT{,_?}.{xpt,parquet}"}}
    content["cohort"]["join"] = [name for name in content["tables"] if name != "DEMO"]
    columns = content["features"]["columns"]
    content["features"] = {
        "columns": {"BMX": columns["BMX"], "CBC": columns["CBC"], "OGTT": ["LBXGLT"]},
        "static": {"age": {"column": "RIDAGEYR"}},
    }
    content["labels"] = {"diabetes": content["labels"]["diabetes"]}
    content |= {"data_root": str(shared_data("nhanes/tables")), "data_dir": str(tmp_path / "data")}
    config = tmp_path / "nhanes.yaml"
    config.write_text(yaml.safe_dump(content))
    (audit,) = leak_audit(Store(ingest(load_config(config))))
    assert [(leak.feature, leak.when) for leak in audit.leaks] == [("LBXGLT", "absent")]


@pytest.mark.parametrize("kept", [0, 2**20])
@pytest.mark.parametrize("name", ["mean", "mice", "sparsity_normalization", "piecewise_linear"])
def test_what_is_filled_once_serves_the_variant_with_the_mask(name, kept, monkeypatch):
    monkeypatch.setattr(diagnostics, "KEPT", kept)
    rng = np.random.default_rng(0)
    rows = np.where(rng.random((60, 4)) < 0.3, np.nan, rng.normal(size=(60, 4))).astype("f4")
    plain, masked = (make_method(n).fit(rows) for n in (name, f"{name}+mask"))
    expected = [method.transform(rows) for method in (plain, masked)]
    filled, calls = Filled(), []
    fill = type(plain[-1])._fill
    monkeypatch.setattr(
        type(plain[-1]), "_fill", lambda self, *rest: calls.append(1) or fill(self, *rest)
    )
    for method, made in zip((plain, masked), expected, strict=True):
        assert_array_equal(filled(method, rows), made)
        assert_array_equal(filled(method, rows), made)
    assert len(calls) == (1 if kept else 4)


def test_methods_of_other_parameters_and_other_rows_are_filled_anew():
    rng = np.random.default_rng(0)
    rows = np.where(rng.random((60, 4)) < 0.3, np.nan, rng.normal(size=(60, 4))).astype("f4")
    filled, turned = Filled(), rows[::-1]
    for exponent in (0.5, 1.0):
        method = make_method("sparsity_normalization", exponent=exponent).fit(rows)
        for table in (rows, turned):
            assert_array_equal(filled(method, table), method.transform(table))
