"""Made-up patients: the tables are OMOP's, what is missing is as asked, and the truth is true."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from ehr_sn.cli import main
from ehr_sn.config import load_config
from ehr_sn.errors import ConfigError, DataError
from ehr_sn.evaluate.statistics import paired_delong
from ehr_sn.ingest.simulate import (
    CHUNK_SUBJECTS,
    DISEASES,
    FIRST_CONCEPT,
    STANDARD,
    Simulation,
    simulate,
)
from ehr_sn.ingest.store import Store, check, ingest
from ehr_sn.survival import censoring_weights

CONFIG = Path(__file__).parents[2] / "configs" / "simulated.yaml"
NAMES = [disease.name for disease in DISEASES]
KEYS = {
    "person": "person_id",
    "observation_period": "observation_period_id",
    "visit_occurrence": "visit_occurrence_id",
    "condition_occurrence": "condition_occurrence_id",
    "measurement": "measurement_id",
    "drug_exposure": "drug_exposure_id",
    "procedure_occurrence": "procedure_occurrence_id",
    "observation": "observation_id",
    "death": "person_id",
    "concept": "concept_id",
    "cohort": "subject_id",
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A function: knobs → every table, each simulation made once."""
    made: dict[tuple, dict[str, pd.DataFrame]] = {}

    def of(**knobs):
        key = tuple(sorted(knobs.items()))
        if key not in made:
            folder = simulate(Simulation(**knobs), tmp_path_factory.mktemp("simulated") / "new")
            made[key] = {file.stem: pd.read_parquet(file) for file in folder.iterdir()}
        return made[key]

    return of


def known(tables):
    """Measurements before the index date, by (subject, code): number and mean."""
    index = tables["cohort"].set_index("subject_id")["cohort_start_date"]
    rows = tables["measurement"]
    past = rows[rows.measurement_datetime < pd.to_datetime(rows.person_id.map(index))]
    grouped = past.groupby(["person_id", "measurement_concept_id"])["value_as_number"]
    return (
        grouped.agg(["size", "mean"])
        .unstack("measurement_concept_id")
        .reindex(tables["person"].person_id)
    )


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


@pytest.mark.parametrize("file_format", ["parquet", "csv"])
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path, file_format):
    one, again, other = (
        digests(simulate(Simulation(subjects=200, seed=seed), tmp_path / name, file_format))
        for name, seed in (("one", 1), ("again", 1), ("other", 2))
    )
    assert one == again
    concepts = {f"{name}.{file_format}" for name in ("concept", "concept_ancestor")}
    assert {name for name in one if one[name] == other[name]} == concepts


def test_the_first_whole_chunk_does_not_depend_on_how_many_follow(tmp_path):
    few, many = (
        simulate(Simulation(subjects=CHUNK_SUBJECTS + n, codes=2), tmp_path / str(n))
        for n in (0, 10)
    )
    for name in ("person", "measurement", "truth"):
        short, long = (pq.read_table(folder / f"{name}.parquet") for folder in (few, many))
        assert long.slice(0, len(short)).equals(short)
        assert len(long) > len(short)


def test_csv_says_what_parquet_says(tmp_path):
    simulation = Simulation(subjects=100, codes=3)
    parquet = simulate(simulation, tmp_path / "parquet")
    text = simulate(simulation, tmp_path / "csv", "csv")
    for name in KEYS:
        expected = pd.read_parquet(parquet / f"{name}.parquet")
        found = pd.read_csv(text / f"{name}.csv")
        assert list(found) == list(expected)
        for column in expected:
            if "date" in column:
                found[column], expected[column] = map(
                    pd.to_datetime, (found[column], expected[column])
                )
            same = (found[column] == expected[column]) | expected[column].isna()
            assert (same & (found[column].isna() == expected[column].isna())).all()


def test_tables_have_omop_columns_and_types(tables):
    made = tables(subjects=500)
    assert set(made) == {*KEYS, "concept_ancestor", "truth"}
    columns = {name: len(made[name].columns) for name in KEYS}
    # As in the CDM 5.4 field list; its cohort has four, ours age and male beside them.
    assert columns == {
        "person": 18,
        "observation_period": 5,
        "visit_occurrence": 17,
        "condition_occurrence": 16,
        "measurement": 23,
        "drug_exposure": 23,
        "procedure_occurrence": 16,
        "observation": 21,
        "death": 7,
        "concept": 10,
        "cohort": 4 + 2,
    }


def test_types_do_not_depend_on_what_is_filled(tmp_path):
    folder = simulate(Simulation(subjects=10), tmp_path / "new")
    for name in KEYS:
        for field in pq.read_schema(folder / f"{name}.parquet"):
            if field.name.endswith("concept_id") or field.name == KEYS[name]:
                assert field.type == pa.int64()
            elif field.name.endswith("_datetime"):
                assert field.type == pa.timestamp("us")
            elif field.name.endswith("_date"):
                assert field.type == pa.date32()


def test_keys_are_unique_and_refer_to_rows_that_are_there(tables):
    made = tables(subjects=CHUNK_SUBJECTS + 500, codes=5)
    for name, key in KEYS.items():
        assert made[name][key].is_unique
    persons = set(made["person"].person_id)
    assert persons == set(range(1, CHUNK_SUBJECTS + 501))
    for name in KEYS.keys() - {"concept", "cohort"}:
        assert set(made[name].person_id) <= persons
    assert list(made["truth"].person_id) == list(made["person"].person_id)
    visits = made["visit_occurrence"].set_index("visit_occurrence_id")
    measured = made["measurement"]
    visit = visits.loc[measured.visit_occurrence_id]
    assert (visit.person_id.to_numpy() == measured.person_id.to_numpy()).all()
    at = visit.visit_start_datetime.to_numpy()
    assert (at == measured.measurement_datetime.to_numpy()).all()
    concepts = made["concept"].set_index("concept_id")
    assert concepts.index.min() > FIRST_CONCEPT
    for column, source in (
        ("measurement_concept_id", "measurement_source_value"),
        ("unit_concept_id", "unit_source_value"),
    ):
        named = concepts.concept_name.loc[measured[column]]
        assert (named.to_numpy() == measured[source].to_numpy()).all()


def test_everything_lies_within_the_observation_period(tables):
    made = tables(subjects=500)
    period = made["observation_period"].set_index("person_id")
    for name, column in (
        ("visit_occurrence", "visit_start_date"),
        ("measurement", "measurement_date"),
        ("condition_occurrence", "condition_start_date"),
        ("drug_exposure", "drug_exposure_start_date"),
        ("procedure_occurrence", "procedure_date"),
        ("observation", "observation_date"),
        ("death", "death_date"),
    ):
        own = period.loc[made[name].person_id]
        day = pd.to_datetime(made[name][column]).to_numpy()
        assert (day >= pd.to_datetime(own.observation_period_start_date).to_numpy()).all()
        assert (day <= pd.to_datetime(own.observation_period_end_date).to_numpy()).all()


@pytest.mark.parametrize("disease", DISEASES, ids=NAMES)
def test_prevalence_is_as_stated(tables, disease):
    truth = tables(subjects=20_000, codes=1)["truth"]
    noise = 4 * np.sqrt(disease.prevalence / 20_000)
    for kind in ("outcome", "true", "bayes"):  # bayes_observed is not: missing informatively
        assert truth[f"{kind}_{disease.name}"].mean() == pytest.approx(
            disease.prevalence, abs=noise + 0.001
        )


def test_a_diagnosis_is_recorded_if_it_comes_within_follow_up(tables):
    made = tables(subjects=2_000, codes=1, lost=0.3)
    concepts = made["concept"].set_index("concept_name").concept_id
    ill = made["condition_occurrence"]
    end = pd.to_datetime(made["cohort"].set_index("subject_id").cohort_end_date)
    start = pd.to_datetime(made["cohort"].set_index("subject_id").cohort_start_date)
    lost = (end - start).dt.days < 1826
    assert lost.mean() == pytest.approx(0.3, abs=0.04)
    for name in NAMES:
        recorded = set(ill[ill.condition_concept_id == concepts[name]].person_id)
        truth = made["truth"].set_index("person_id")[f"outcome_{name}"]
        assert recorded <= set(truth[truth].index)
        assert set(truth[truth & ~lost].index) <= recorded


def test_half_of_the_lost_have_died_when_follow_up_ends(tables):
    made = tables(subjects=2_000, codes=1, lost=0.3)
    end = made["cohort"].set_index("subject_id").cohort_end_date
    died = made["death"].set_index("person_id").death_date
    assert len(died) == pytest.approx(0.15 * 2_000, abs=60)
    assert (died == end[died.index]).all()


def days_of_follow_up(made):
    cohort = made["cohort"].set_index("subject_id")
    start, end = (pd.to_datetime(cohort[f"cohort_{side}_date"]) for side in ("start", "end"))
    return (end - start).dt.days


def test_subjects_leave_at_the_rate_that_is_asked_for_and_the_rest_stays_as_it_is(tables):
    plain, left = (tables(subjects=8_000, codes=1, lost=0, leaving=rate) for rate in (0, 0.1))
    stayed = (days_of_follow_up(left) >= 1826).mean()
    assert stayed == pytest.approx(np.exp(-0.1 * 5), abs=0.02)
    assert len(left["death"]) == 0
    for name in NAMES:
        assert (left["truth"][f"true_{name}"] == plain["truth"][f"true_{name}"]).all()
        assert (left["truth"][f"outcome_{name}"] == plain["truth"][f"outcome_{name}"]).all()
    assert len(left["condition_occurrence"]) < len(plain["condition_occurrence"])


@pytest.mark.parametrize("by_age", [-0.8, 0.0, 0.8])
def test_leaving_may_depend_on_age(tables, by_age):
    made = tables(subjects=8_000, codes=1, lost=0, leaving=0.1, leaving_by_age=by_age)
    age = made["cohort"].set_index("subject_id").age
    stayed = days_of_follow_up(made) >= 1826
    for low, high in ((30, 40), (50, 60), (70, 80)):
        of_age = age.between(low, high)
        expected = np.exp(-0.5 * np.exp(by_age * (age[of_age] - 55) / 10)).mean()
        assert stayed[of_age].mean() == pytest.approx(expected, abs=0.05)


def test_deaths_come_before_some_diseases_and_the_truth_knows_it(tables):
    plain, made = (tables(subjects=20_000, codes=1, lost=0, deaths=rate) for rate in (0, 0.03))
    age = made["cohort"].age
    died = made["cohort"].subject_id.isin(made["death"].person_id)
    rate = 0.03 * 2 ** ((age - 55) / 8)
    within = days_of_follow_up(made).to_numpy() < 1826
    assert (died & within).mean() == pytest.approx((1 - np.exp(-5 * rate)).mean(), abs=0.01)
    assert died[within].all()  # nobody leaves alive
    end = made["cohort"].set_index("subject_id").cohort_end_date
    death = made["death"].set_index("person_id").death_date
    assert (death == end[death.index]).all()
    lived = (1 - np.exp(-5 * rate)) / (5 * rate)  # P(no death before a time uniform in 5 years)
    for disease in DISEASES:
        true, outcome = (made["truth"][f"{kind}_{disease.name}"] for kind in ("true", "outcome"))
        np.testing.assert_allclose(true / plain["truth"][f"true_{disease.name}"], lived, rtol=2e-3)
        assert outcome.mean() == pytest.approx(true.mean(), abs=4 * np.sqrt(0.25 / 20_000) * 0.7)
        assert (outcome <= plain["truth"][f"outcome_{disease.name}"]).all()
        for kind in ("bayes", "bayes_observed"):
            assert made["truth"][f"{kind}_{disease.name}"].mean() == pytest.approx(
                true.mean(), abs=0.01
            )


def test_weights_by_age_make_up_for_informative_leaving(tmp_path):
    """What is estimated from rows that left comes to the true risk in a world with deaths."""
    knobs = {"leaving": 0.1, "leaving_by_age": 0.8, "deaths": 0.02}
    folder = tmp_path / "data" / "simulated"
    simulate(Simulation(subjects=12_000, codes=1, visits=1, lost=0, **knobs), folder)
    content = yaml.safe_load(CONFIG.read_text())
    content["features"]["measurements"] = {
        "systolic_bp": content["features"]["measurements"]["systolic_bp"]
    }
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "simulated.yaml"
    path.write_text(yaml.safe_dump({**content, "data_dir": str(tmp_path / "s")}, sort_keys=False))
    store = Store(ingest(load_config(path)))
    truth = pd.read_parquet(folder / "truth.parquet")
    age = store.values()[:, [store.feature_names.index("age")]]
    everyone = np.ones(len(age), dtype=bool)
    for i, name in enumerate(store.diseases):
        label, days, horizon = store.labels()[:, i], store.follow_up()[:, i], store.horizons[i]
        known = ~np.isnan(label)

        def weighted(covariates, label=label, days=days, horizon=horizon, known=known):
            weights = censoring_weights(days, label, horizon, everyone, covariates)
            return np.average(label[known], weights=weights[known])

        risk = truth[f"outcome_{name}"].mean()
        assert weighted(age) == pytest.approx(risk, abs=0.01)
        assert abs(weighted(age) - risk) < abs(label[known].mean() - risk)
    assert "misstated risk" in {f["check"] for f in store.manifest["findings"]}


def test_each_concept_is_below_itself_and_below_its_standard_ones(tables):
    made = tables(subjects=500)
    above = made["concept_ancestor"].groupby("descendant_concept_id").ancestor_concept_id.agg(set)
    names = made["concept"].set_index("concept_id").concept_name
    assert set(above.index) == set(names.index)
    for concept, ancestors in above.items():
        assert ancestors == {concept, *STANDARD.get(names[concept], ())}


def share(tables, **knobs):
    """Share of (subject, code) with a value by the index date."""
    return float(known(tables(subjects=1_000, **knobs))["size"].notna().to_numpy().mean())


def test_missing_rates_move_as_the_knobs_say(tables):
    assert share(tables, missing="none") == 1
    for more, less in (
        ({"missing": "random", "dropped": 0.4, "visits": 2}, {"dropped": 0.8}),
        ({"missing": "visits", "visits": 4}, {"visits": 2}),
        ({"missing": "visits", "visits": 4}, {"ordered": 0.2}),
        ({"missing": "visits", "visits": 4}, {"visit_spread": 4.0}),
        ({"missing": "informative", "visits": 2}, {"ordered": 0.2}),
    ):
        assert share(tables, **more) > share(tables, **(more | less)) + 0.03
    assert share(tables, missing="random", dropped=0.4, visits=2) == pytest.approx(
        1 - 0.4**2, abs=0.01
    )
    assert share(tables, missing="visits", visits=3, visit_spread=0.0) == pytest.approx(
        1 - 0.5 * np.exp(-2 * 0.5), abs=0.02
    )


@pytest.mark.parametrize("missing", ["random", "visits", "informative", "all"])
def test_only_informative_missingness_makes_the_count_predict_disease(tables, missing):
    made = tables(subjects=4_000, missing=missing)
    measured = known(made)["size"].fillna(0).to_numpy().sum(axis=1)
    assert (measured == made["truth"].measured).all()
    noise = 4 * 0.29 / np.sqrt(4_000 * 0.067)  # at the rarest disease
    for name in NAMES:
        auc = roc_auc_score(made["truth"][f"outcome_{name}"], measured)
        if missing in ("informative", "all"):
            assert auc > 0.53
        else:
            assert abs(auc - 0.5) < noise


def test_informativeness_is_a_knob(tables):
    def auc(informativeness):
        truth = tables(subjects=4_000, missing="informative", informativeness=informativeness)
        truth = truth["truth"]
        return roc_auc_score(truth["outcome_hypertension"], truth["measured"])

    assert auc(0.0) == pytest.approx(0.5, abs=0.04)
    assert auc(0.2) + 0.03 < auc(1.0)


def test_what_is_known_orders_how_well_one_can_predict(tables):
    truth = tables(subjects=20_000, codes=8, missing="visits", ordered=0.3)["truth"]
    for name in NAMES:
        outcome = truth[f"outcome_{name}"]
        aucs = [
            roc_auc_score(outcome, truth[f"{kind}_{name}"])
            for kind in ("true", "bayes", "bayes_observed")
        ]
        assert aucs[0] > aucs[1] > aucs[2] > 0.6


@pytest.mark.parametrize("disease", NAMES)
def test_bayes_optimum_is_reached_and_not_exceeded(tables, disease):
    """A logistic regression on everything measured is optimal here, but for what it must learn."""
    made = tables(subjects=12_000, missing="none", visits=3)
    truth = made["truth"]
    X = known(made)["mean"].to_numpy()
    X = np.column_stack([(X - X.mean(axis=0)) / X.std(axis=0), made["cohort"][["age", "male"]]])
    X[:, -2] = (X[:, -2] - 55) / 10
    y = truth[f"outcome_{disease}"].to_numpy()
    train = np.arange(len(y)) < 6_000
    model = LogisticRegression(C=1.0, max_iter=500).fit(X[train], y[train])
    learned = model.predict_proba(X[~train])[:, 1]
    optimal = truth[f"bayes_{disease}"].to_numpy()[~train]
    np.testing.assert_array_equal(
        truth[f"bayes_{disease}"], truth[f"bayes_observed_{disease}"]
    )  # as nothing is missing
    compared = paired_delong(y[~train], learned, optimal)
    assert abs(compared.difference) < 0.008
    assert compared.ci_low < 0.001  # never better
    assert np.corrcoef(learned, optimal)[0, 1] > 0.96


def test_check_and_ingest_run_and_every_row_reconciles(tmp_path):
    folder = simulate(Simulation(subjects=1_500), tmp_path / "data" / "simulated")
    content = yaml.safe_load(CONFIG.read_text())
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "simulated.yaml"
    path.write_text(yaml.safe_dump({**content, "data_dir": str(tmp_path / "s")}, sort_keys=False))
    report = check(load_config(path))
    store = Store(ingest(load_config(path)))
    truth = pd.read_parquet(folder / "truth.parquet")
    for name in ("measurement", "condition_occurrence"):
        rows = pq.read_metadata(folder / f"{name}.parquet").num_rows
        aside = sum(
            q["count"]
            for q in report["quarantined"]
            if q["table"] == name and q["action"] == "row set aside"
        )
        assert report["tables"][name]["rows"] == rows == report["events"][name] + aside
        assert aside <= 2  # two equal values in one minute
    assert report["findings"] == store.manifest["findings"]
    counts = [i for i, n in enumerate(store.feature_names) if n.endswith(".count")]
    measured = np.nansum(store.values()[:, counts], axis=1)
    np.testing.assert_allclose(measured, truth.measured, atol=2)
    assert store.diseases == NAMES
    labels = pd.DataFrame(store.labels(), columns=NAMES)
    for name in NAMES:
        eligible = labels[name].notna()
        assert 0.85 < eligible.mean() < 1
        assert (labels[name][eligible] == truth[f"outcome_{name}"][eligible]).all()


def test_every_code_in_the_configuration_is_one_the_generator_writes():
    config = load_config(CONFIG)
    assert tuple(config.features.measurements) == tuple(
        lab.name for lab in Simulation(subjects=1).labs
    )
    units = {name: m.unit for name, m in config.features.measurements.items()}
    assert units == {lab.name: lab.unit for lab in Simulation(subjects=1).labs}


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("dear to me")
    with pytest.raises(DataError, match="exists and is not empty"):
        simulate(Simulation(subjects=10), tmp_path)
    with pytest.raises(DataError, match="exists and is not empty"):
        simulate(Simulation(subjects=10), tmp_path / "mine.txt")
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_what_is_interrupted_leaves_nothing(tmp_path):
    def stop(subjects):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(Simulation(subjects=10), tmp_path / "new", progress=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"subjects": 0}, "subjects: must be from 1, not 0"),
        ({"dropped": 1.5}, "dropped: must be from 0 to 1, not 1.5"),
        ({"missing": "rando"}, "missing: 'rando'; did you mean 'random'"),
    ],
)
def test_an_impossible_wish_is_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        Simulation(**{"subjects": 1, **knobs})


@pytest.mark.parametrize(
    "extreme",
    [
        {"ordered": 0.0},
        {"ordered": 1.0, "missing": "visits"},
        {"dropped": 1.0},
        {"codes": 1},
        {"visits": 1, "visit_spread": 0.0},
        {"lost": 1.0},
    ],
    ids=str,
)
def test_the_ends_of_every_knob_work(tables, extreme):
    truth = tables(subjects=50, **extreme)["truth"]
    assert not truth.isna().to_numpy().any()


def test_memory_does_not_grow_with_subjects(tmp_path):
    """In a process of its own: ten chunks more must not cost what one chunk holds."""
    code = f"""
from pathlib import Path
import psutil
from ehr_sn.ingest.simulate import *
held = []
simulate(
    Simulation(subjects=12 * CHUNK_SUBJECTS, codes=10),
    Path({str(tmp_path / "new")!r}),
    progress=lambda subjects: held.append(psutil.Process().memory_info().rss / 2**20),
)
print(max(held[:2]), max(held))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    early, peak = map(float, done.stdout.split())
    assert peak < early + 60  # MB
    assert peak < 1_000


def test_the_command_line_does_the_same(tmp_path, monkeypatch, capsys):
    arguments = ["--subjects", "100", "--to", str(tmp_path / "cli"), "--missing", "random"]
    monkeypatch.setattr(sys, "argv", ["ehr-sn", "simulate", *arguments])
    with pytest.raises(SystemExit) as finished:
        main()
    assert finished.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "cli")
    direct = simulate(Simulation(subjects=100, missing="random"), tmp_path / "direct")
    assert digests(direct) == digests(tmp_path / "cli")
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 1
    assert "exists and is not empty" in capsys.readouterr().err
