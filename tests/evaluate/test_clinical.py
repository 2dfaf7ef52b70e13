"""Whom a model flags, what that gains, for whom it works, and what it looks at."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import expit, logit
from sklearn.metrics import confusion_matrix

from ehr_sn.errors import ConfigError
from ehr_sn.evaluate.clinical import (
    Proportion,
    by_group,
    decision_curve,
    net_benefit,
    operating_points,
    subject_groups,
)
from ehr_sn.evaluate.importance import (
    can_explain,
    integrated_gradients,
    permutation_importance,
)
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.models.learning_curve import FewerRows
from ehr_sn.models.predict import load_predictor
from ehr_sn.models.train import NOTHING, Cell, cell_path, train_cell


def cohort(seed=0, n=4000):
    rng = np.random.default_rng(seed)
    p = expit(rng.normal(-1.5, 1.2, n))
    return (rng.random(n) < p).astype(float), p


def test_net_benefit_is_that_of_vickers_and_elkin():
    y, p = cohort()
    tn, fp, fn, tp = confusion_matrix(y, p >= 0.2).ravel()
    assert tn + fn > 0
    assert net_benefit(y, p, 0.2) == pytest.approx(tp / 4000 - fp / 4000 * 0.25)
    with pytest.raises(ValueError, match="between 0 and 1"):
        net_benefit(y, p, 1)


def test_a_calibrated_model_is_worth_using_and_one_that_knows_nothing_is_not():
    y, p = cohort()
    curve = decision_curve([(y, p), (y, p)])
    assert (np.array(curve.model) >= np.array(curve.treat_all) - 0.002).all()
    assert (np.array(curve.model)[10:] > 0).all()
    low, high = curve.useful()
    assert low < 0.15 < 0.5 < high
    blind = decision_curve([(y, np.full_like(p, y.mean()))])
    assert blind.useful() is None
    assert_allclose(blind.model[0], blind.treat_all[0])


def test_the_decision_curve_of_a_rare_disease_begins_below_its_share_of_cases():
    rng = np.random.default_rng(0)
    p = expit(rng.normal(-7, 1.2, 60_000))
    y = (rng.random(len(p)) < p).astype(float)
    assert y.mean() < 0.005
    curve = decision_curve([(y, p), (y, p)])
    assert curve.threshold[0] == pytest.approx(y.mean() / 10)
    assert curve.treat_all[0] > 0 > curve.treat_all[-1]
    low, high = curve.useful()
    assert low < y.mean() < high
    assert decision_curve([cohort()]).threshold[0] == 0.01
    assert decision_curve([(y, np.full_like(p, y.mean()))]).threshold[-1] > y.mean()
    assert decision_curve([(np.zeros(9), np.full(9, 0.3))]).threshold[0] == 0.01


def test_the_interval_of_a_decision_curve_is_that_of_a_bootstrap_of_the_subjects():
    y, p = cohort(n=600)
    curve = decision_curve([(y, p)], points=4)
    assert decision_curve([(y, p)] * 3, points=4).low == pytest.approx(curve.low)
    rng = np.random.default_rng(0)
    samples = [rng.integers(len(y), size=len(y)) for _ in range(2000)]
    for i, t in enumerate(curve.threshold):
        model = np.array([net_benefit(y[rows], p[rows], t) for rows in samples])
        rates = np.array([y[rows].mean() for rows in samples])
        gain = model - (rates - (1 - rates) * t / (1 - t))
        low, high = np.quantile(model, [0.025, 0.975])
        assert (curve.low[i], curve.high[i]) == pytest.approx((low, high), abs=0.004)
        gains = [np.quantile(over, 0.025) for over in (model, gain)]
        assert curve.gain_low[i] == pytest.approx(min(gains), abs=0.004)


def test_few_subjects_establish_less():
    y, p = cohort()
    many, few = (decision_curve([(y[:n], p[:n])]) for n in (4000, 80))
    low, high = many.useful(surely=True)
    assert many.useful()[0] <= low < high <= many.useful()[1]
    sure = few.useful(surely=True)
    assert sure is None or sure[1] - sure[0] < high - low
    assert decision_curve([(y, np.full_like(p, y.mean()))]).useful(surely=True) is None


def test_wilsons_interval_is_the_published_one():
    """15 of 148 (R. G. Newcombe, Stat Med 17:857, 1998, table I): 0.0624 to 0.1605."""
    share = Proportion.of(15, 148)
    assert (share.ci_low, share.ci_high) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert Proportion.of(0, 20).ci_low == 0
    assert str(Proportion.of(0, 0)) == "–"


def test_operating_points_are_chosen_on_tuning_rows_and_judged_on_held_out_ones():
    tuning, held_out = cohort(1), cohort(2)
    for point in operating_points([tuning], [held_out]):
        y, p = tuning
        assert point.aim <= (p[y == 1] >= point.threshold).mean() < point.aim + 0.01
        tn, fp, fn, tp = confusion_matrix(held_out[0], held_out[1] >= point.threshold).ravel()
        assert point.sensitivity.value == pytest.approx(tp / (tp + fn))
        assert point.specificity.value == pytest.approx(tn / (tn + fp))
        assert point.ppv.value == pytest.approx(tp / (tp + fp))
        assert point.npv.value == pytest.approx(tn / (tn + fn))
        assert point.alerts_per_1000 == pytest.approx((tp + fp) / 4)
    assert operating_points([tuning] * 2, [held_out] * 2) == operating_points([tuning], [held_out])


@pytest.mark.parametrize("m", [1, 2, 3, 7, 10, 20, 100])
@pytest.mark.parametrize("decimals", [1, 2, 9])
def test_an_operating_point_has_the_highest_threshold_with_the_aim_on_tuning_rows(m, decimals):
    rng = np.random.default_rng(m)
    y, p = np.repeat([1, 0], [m, 3 * m]), rng.random(4 * m).round(decimals)
    aims = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1)
    for point in operating_points([(y, p)], [(y, p)], aims):
        reached = [t for t in p if (p[y == 1] >= t).sum() >= point.aim * m - 1e-9]
        assert point.threshold == max(reached)
        assert point.sensitivity.value >= point.aim - 1e-12


def test_a_group_for_whom_the_model_is_wrong_is_seen():
    y, p = cohort()
    old = np.arange(4000) < 1000
    p = np.where(old, expit(logit(p) - 1), p)
    rare = np.arange(4000) == 7
    groups = {"age": {"old": old, "young": ~old, "centenarian": rare}}
    first, second = by_group([(y, p, np.arange(4000))], groups)
    assert (first.level, first.n, second.n) == ("old", 1000, 3000)
    assert first.in_the_large[1] > 0.7
    assert second.in_the_large[1] < 0 < second.in_the_large[2]
    assert first.auroc.ci_low < 0.9
    assert by_group([(y, p, np.arange(4000))] * 4, groups)[0] == first


def test_groups_are_by_age_and_sex_unless_configured(busy):
    config = busy.config()
    store = Store(ingest(config))
    levels = subject_groups(config, store)["age"]
    assert list(levels) == ["below 40", "40 to below 65", "65 to below 80"]
    assert sum(rows.sum() for rows in levels.values()) == len(store.values())
    by_sbp = busy.config(evaluate__groups={"pressure": {"feature": "sbp.last", "edges": [120]}})
    assert list(subject_groups(by_sbp, store)["pressure"]) == [
        "below 120",
        "120 and above",
        "missing",
    ]
    assert subject_groups(busy.config(evaluate__groups={}), store) == {}


def test_a_group_that_cannot_be_made_says_where_and_what_to_do(busy):
    store = Store(ingest(busy.config()))
    typo = busy.config(evaluate__groups={"old": {"feature": "agee", "edges": [65]}})
    with pytest.raises(ConfigError, match=r"hospital.yaml:\d+: evaluate.groups.old.*'age'"):
        subject_groups(typo, store)
    with pytest.raises(ConfigError, match="give `edges`"):
        subject_groups(busy.config(evaluate__groups={"age": {"feature": "age"}}), store)
    with pytest.raises(ConfigError, match="edges must rise"):
        busy.config(evaluate__groups={"age": {"feature": "age", "edges": [65, 40]}})


def test_smaller_shares_of_the_training_rows_are_nested_and_leave_other_splits_alone(busy):
    store = Store(ingest(busy.config()))
    whole = store.splits()
    tenth, half = (FewerRows(store.path, share).splits() for share in (0.1, 0.5))
    assert (tenth == "train").sum() == pytest.approx(0.1 * (whole == "train").sum(), abs=1)
    assert ((tenth == "train") <= (half == "train")).all()
    for part in ("tuning", "held_out"):
        assert ((half == part) == (whole == part)).all()
    config = busy.config()
    cell = Cell("zero", "standard", "mlp", 0)
    paths = {cell_path(config, FewerRows(store.path, share), cell) for share in (0.1, 0.5, 1.0)}
    assert len(paths) == 3
    assert cell_path(config, store, cell) in paths


NETWORK = Cell("zero+mask", "standard", "mlp", 0)
TREES, LINEAR = (
    Cell(NOTHING, NOTHING, name, 0) for name in ("hist_gradient_boosting", "logistic_regression")
)


@pytest.fixture(params=[NETWORK, TREES, LINEAR], ids=["network", "trees", "linear"])
def knows_age(busy, request):
    """A model trained to tell who is old, from age alone among noise."""
    patients = busy.folder / "patients.csv"
    old = [row.split(",")[0] for row in patients.read_text().split()[1:] if row[-2:] > "50"]
    rows = "".join(f"{i},400,E12\n" for i in old)
    (busy.folder / "diagnoses.csv").write_text("id,day,icd\n" + rows)
    config = busy.config(
        labels={"old": {"codes": ["E12"], "within_days": 600}},
        features__history=None,
        train={
            "seeds": 2,
            "max_epochs": 30,
            "batch_size": 32,
            "learning_rate": 0.02,
            "architectures": {"mlp": {"hidden": [8]}},
            "methods": {"standard": ["zero+mask"]},
            "baselines": [TREES.architecture, LINEAR.architecture],
        },
    )
    store = Store(ingest(config))
    train_cell(config, store, request.param)
    return store, load_predictor(config, store, request.param)


def test_what_the_model_looks_at_comes_first(knows_age):
    store, predict = knows_age
    ranked = permutation_importance(predict, store)["old"]
    assert {entry.measurement for entry in ranked} == {"age", "sbp", "hdl"}
    assert ranked[0].measurement == "age"
    assert ranked[0].drop > 0.2 > 5 * abs(ranked[1].drop)
    assert permutation_importance(predict, store) == {"old": ranked}


@pytest.mark.parametrize("knows_age", [NETWORK, LINEAR], indirect=True)
@pytest.mark.skipif(not can_explain(), reason="captum is not installed")
def test_integrated_gradients_point_at_the_same(knows_age):
    store, predict = knows_age
    attributed = integrated_gradients(predict, store)["old"]
    assert max(attributed, key=attributed.get) == "age"
