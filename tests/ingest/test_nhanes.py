"""The survey in one YAML: who is in it, what they were told, and none of its known traps."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from ehr_sn.config import load_config
from ehr_sn.ingest.fetch import TABLES_SINCE_2017, file_name
from ehr_sn.ingest.store import Store, ingest

CONFIG = Path(__file__).parents[2] / "configs" / "nhanes.yaml"
NEWEST = CONFIG.with_name("nhanes_2017.yaml")
LEAKS = (
    r"(DIQ|DID|BPQ|BPD|MCQ|KIQ|RXD|PFQ|WHQ|WHD|DRQSD|LBXGLT)"  # asked of, or of, the ill
    r"|LBX(GH|GLU|SGL|SOSSI|IN)$"  # what diabetes is diagnosed from
    r"|LBX(SCH|STR)$|LBDLDL|LBD.*SI$"  # copies
    r"|WT|SDMV|SDDSRVYR|SEQN"  # the survey's design
    r"|LBXH(A|BC|BS|CR?|E\w)$"  # hepatitis
)


@pytest.fixture(scope="module")
def nhanes(shared_data, tmp_path_factory):
    root = shared_data("nhanes/tables")
    config = load_config(CONFIG).model_copy(
        update={"data_root": root.absolute(), "data_dir": tmp_path_factory.mktemp("data")}
    )
    return Store(ingest(config))


def test_the_configuration_is_valid_without_the_data():
    config = load_config(CONFIG)
    assert config.cohort.where == "RIDAGEYR >= 20"
    assert len(config.cohort.join) == len(config.tables) - 1


def test_the_cohort_is_every_adult_of_five_cycles(nhanes):
    read, *_, where = nhanes.manifest["cohort"]
    assert (read["rows"], where["rule"]) == (50_965, "where")
    assert (where["rows"], where["excluded"], where["unknown"]) == (28_461, 22_504, 0)
    assert nhanes.values().shape == (28_461, len(nhanes.feature_names))
    assert 150 <= len(nhanes.feature_names) <= 170


@pytest.mark.parametrize(
    ("disease", "known", "rate"),
    [
        ("cardiovascular", 28_453, 0.099),
        ("liver_condition", 28_407, 0.036),
        ("hypertension", 28_416, 0.353),
        ("heart_failure", 28_376, 0.033),
        ("diabetes", 27_841, 0.123),
    ],
)
def test_labels_are_as_counted_by_hand(nhanes, disease, known, rate):
    label = nhanes.labels()[:, nhanes.diseases.index(disease)]
    assert (~np.isnan(label)).sum() == known == nhanes.manifest["labels"][disease]["eligible"]
    assert np.nanmean(label) == pytest.approx(rate, abs=0.0005)


def test_every_row_of_every_table_is_accounted_for(nhanes):
    tables = nhanes.manifest["tables"]
    assert tables["DEMO"]["rows"] == 10_348 + 10_149 + 10_537 + 9_756 + 10_175
    assert len(tables["DEMO"]["files"]) == 5
    assert len(tables["CRP"]["files"]) == 3
    aside = [q for q in nhanes.manifest["quarantined"] if q["action"] == "row set aside"]
    assert aside == []


def leaking(manifest):
    used = [column for f in manifest["features"] for column in f["columns"]]
    assert used
    return [c for c in used if re.match(LEAKS, c.rpartition(".")[2])]


def test_no_column_that_is_known_to_leak_is_a_feature(nhanes):
    assert leaking(nhanes.manifest) == []


def test_sentinels_and_impossible_zeros_are_gone(nhanes):
    values = pd.DataFrame(nhanes.values(), columns=nhanes.feature_names)
    assert values["diastolic"].min() >= 10
    assert values["sleep"].max() == 12
    assert values["drinks_a_day"].max() == 83
    assert values["meals_out"].max() == 21
    assert values["sedentary"].max() == 1380
    assert set(values["trouble_sleeping"].dropna()) == {0, 1}
    assert set(values["education"].dropna()) == {0, 1, 2, 3, 4}
    assert values.filter(like="ethnicity=").sum(axis=1).eq(1).all()
    married = values.filter(like="marital=")
    assert married.shape[1] == 6
    assert set(married.sum(axis=1, min_count=1).dropna()) == {1}


def test_values_are_those_of_the_tables(nhanes, shared_data):
    demo = pd.read_parquet(shared_data("nhanes/tables/2009-2010/DEMO.parquet")).set_index("SEQN")
    bpx = pd.read_parquet(shared_data("nhanes/tables/2009-2010/BPX.parquet")).set_index("SEQN")
    stored = pd.read_parquet(nhanes.path / "values.parquet").set_index("subject_id")
    adults = demo.index[demo["RIDAGEYR"] >= 20]
    np.testing.assert_array_equal(stored.loc[adults, "age"], demo.loc[adults, "RIDAGEYR"])
    readings = bpx.reindex(adults)[[f"BPXSY{i}" for i in (1, 2, 3, 4)]]
    mean = readings.mean(axis=1).to_numpy(dtype="float32")
    np.testing.assert_allclose(stored.loc[adults, "systolic"], mean, rtol=1e-6)


def test_the_xport_files_give_the_same_store_as_the_parquet_tables(shared_data, tmp_path):
    """The cycle and the ten tables of which both are at hand, every number bit for bit."""
    pytest.importorskip("pyreadstat", reason="the package pyreadstat is not installed")
    names = [file.stem[:-2] for file in sorted(shared_data("nhanes/xpt/2013-2014").iterdir())]
    assert len(names) == 10
    content = yaml.safe_load(CONFIG.read_text())
    content["tables"] = {n: {"path": f"2013-2014/{n}{{,_?}}.{{xpt,parquet}}"} for n in names}
    content["cohort"]["join"] = [name for name in names if name != "DEMO"]
    columns = {
        name: list(pd.read_parquet(shared_data(f"nhanes/tables/2013-2014/{name}.parquet")))
        for name in names
        if name not in ("DIQ", "BPQ", "MCQ")
    }
    content["features"] = {
        "columns": {n: [c for c in cs if c != "SEQN"] for n, cs in columns.items()}
    }
    content["splits"] = {}
    stores = []
    for kind in ("xpt", "tables"):
        path = tmp_path / f"{kind}.yaml"
        root = shared_data(f"nhanes/{kind}").absolute()
        more = {"data_root": str(root), "data_dir": str(tmp_path / kind)}
        path.write_text(yaml.safe_dump(content | more, sort_keys=False))
        stores.append(Store(ingest(load_config(path))))
    xpt, parquet = stores
    assert xpt.values().shape == (5_769, 135)
    np.testing.assert_array_equal(xpt.values().view("uint32"), parquet.values().view("uint32"))
    assert (xpt.values() == 0).sum() > 1000
    for name in ("values", "mask", "labels", "splits", "quarantine"):
        file = f"{name}.parquet"
        assert (xpt.path / file).read_bytes() == (parquet.path / file).read_bytes()


# -- the newest releases: made-up people, in files named as CDC names them -------------------------

# What only one of the two releases has, as the configuration marks it.
# fmt: off
ONLY = {
    "2017-2020": [
        "LBXTR", "SMD030", "PAQ605", "PAQ620", "PAQ635", "PAQ650", "PAQ665", "SLQ050", "HUQ051",
        "HUQ071", "DBQ700", "DBQ197", "DBD895", "DBD900", "DBD905", "DBD910", "URXUIO",
    ],
    "2021-2023": ["LBXTLG", "DMDHHSIZ"],
}
# fmt: on
WEIGHTS = {"2017-2020": ["WTINTPRP", "WTMECPRP"], "2021-2023": ["WTINT2YR", "WTMEC2YR"]}
FIRST = {"2017-2020": 109_300, "2021-2023": 130_400}
ADULTS = 60  # of each release, and a child
MARGARET, SILENT, RUTH = 109_301, 109_302, 130_401
ASKED = {
    "MCQ": ["MCQ160B", "MCQ160C", "MCQ160D", "MCQ160E", "MCQ160F", "MCQ160L"],
    "BPQ": ["BPQ020"],
    "DIQ": ["DIQ010"],
}
YES, NO, REFUSED, UNKNOWN = 1, 2, 7, 9
# fmt: off
ANSWERS = {
    MARGARET: {
        "RIDAGEYR": 80, "RIAGENDR": 2, "DMDMARTZ": 2, "DMDBORN4": 2,
        "BPXOSY1": 120, "BPXOSY2": 124, "BPXOSY3": 128, "BPXODI1": 70, "BPXODI2": 74, "BPXODI3": 72,
        "BPXOPLS1": 61, "BPXOPLS2": 63, "BPXOPLS3": 62, "LBXHSCRP": 3.25, "LBXTR": 95, "SLD012": 2,
        "SLD013": 14, "ALQ121": 10, "HUQ051": 8, "SMQ040": 3, "SMD030": 0, "PAQ605": 2, "FSDAD": 4,
        "MCQ160B": YES, "MCQ160C": UNKNOWN, "MCQ160D": NO, "MCQ160E": YES, "MCQ160F": NO,
        "MCQ160L": NO, "BPQ020": NO, "DIQ010": 3,
    },
    RUTH: {
        "RIDAGEYR": 20, "DMDHHSIZ": 7, "BPXOSY1": 110, "BPXOSY2": None, "BPXOSY3": None,
        "LBXTLG": 110, "ALQ121": 1,
        "MCQ160B": NO, "MCQ160C": UNKNOWN, "MCQ160D": REFUSED, "MCQ160E": None, "MCQ160F": NO,
        "MCQ160L": YES, "BPQ020": YES, "DIQ010": YES,
    },
    SILENT: {
        "MCQ160B": UNKNOWN, "MCQ160C": UNKNOWN, "MCQ160D": UNKNOWN, "MCQ160E": REFUSED,
        "MCQ160F": UNKNOWN, "MCQ160L": UNKNOWN, "BPQ020": REFUSED, "DIQ010": UNKNOWN,
    },
}
# fmt: on


def static_columns(feature):
    return [feature["column"]] if isinstance(feature["column"], str) else feature["column"]


def columns_of(table, content):
    """What the configuration reads from a table, in either release."""
    prefixes = {
        "DEMO": r"RI|DMD|IND",
        "TRIGLY": r"LBXTR|LBXTLG",
        **{name: f"{name[:2]}[{name[2]}D]" for name in content["tables"] if name[-1] == "Q"},
    }
    listed = content["features"]["columns"].get(table, [])
    static = [c for f in content["features"]["static"].values() for c in static_columns(f)]
    own = [c for c in static if re.match(prefixes.get(table, table), c)]
    return [*listed, *own, *ASKED.get(table, [])]


def answers(seqn, content):
    """A made-up person's cells, by column; 1 in those that are not named."""
    person = seqn - FIRST["2021-2023" if seqn >= FIRST["2021-2023"] else "2017-2020"]
    ill = YES if person % 2 else NO
    told = {"RIDAGEYR": 40 if person < ADULTS else 12, "ALQ121": 5}
    for reading in (1, 2, 3):
        told |= {f"BPXOSY{reading}": 118, f"BPXODI{reading}": 71, f"BPXOPLS{reading}": 66}
    told |= {column: ill for columns in ASKED.values() for column in columns}
    if seqn == SILENT:
        for feature in content["features"]["static"].values():
            for column in static_columns(feature) if "missing_codes" in feature else ():
                told[column] = feature["missing_codes"][-1]
    return told | ANSWERS.get(seqn, {})


@pytest.fixture(scope="module")
def newest(tmp_path_factory):
    """The store of both releases, every table in XPORT."""
    pyreadstat = pytest.importorskip("pyreadstat", reason="the package pyreadstat is not installed")
    content = yaml.safe_load(NEWEST.read_text())
    root = tmp_path_factory.mktemp("newest")
    for cycle, first in FIRST.items():
        (root / cycle).mkdir()
        (other,) = ONLY.keys() - {cycle}
        people = {first + i: answers(first + i, content) for i in range(ADULTS + 1)}
        for table in content["tables"]:
            columns = [c for c in columns_of(table, content) if c not in ONLY[other]]
            if not columns and table == "UIO":
                continue
            columns += WEIGHTS[cycle] if table == "DEMO" else []
            rows = [
                {"SEQN": seqn} | {c: told.get(c, 1) for c in columns}
                for seqn, told in people.items()
            ]
            name = file_name(table, cycle)
            path = root / cycle / f"{name}.xpt"
            frame = pd.DataFrame(rows).astype(float)
            pyreadstat.write_xport(frame, str(path), file_format_version=5, table_name=name)
    # The people of 2017-2018 are in the combined files already: their own files are left alone.
    (root / "2017-2018").mkdir()
    for table in ("DEMO", "MCQ"):
        copy = (root / "2017-2020" / f"P_{table}.xpt").read_bytes()
        (root / "2017-2018" / f"{table}_J.xpt").write_bytes(copy)
    update = {"data_root": root, "data_dir": tmp_path_factory.mktemp("data")}
    return Store(ingest(load_config(NEWEST).model_copy(update=update)))


def of_person(store, name, seqn):
    table = pd.read_parquet(store.path / f"{name}.parquet").set_index("subject_id")
    return table.loc[seqn]


def test_both_newest_releases_are_stacked_and_2017_2018_is_left_alone(newest):
    read, *_, where = newest.manifest["cohort"]
    assert (read["rows"], where["rows"], where["excluded"]) == (2 * ADULTS + 2, 2 * ADULTS, 2)
    tables = newest.manifest["tables"]
    assert {name: len(table.get("files", "1")) for name, table in tables.items()} == {
        name: 1 if name == "UIO" else 2 for name in TABLES_SINCE_2017
    }
    assert [q for q in newest.manifest["quarantined"] if q["action"] == "row set aside"] == []


def test_the_newest_configuration_has_the_labels_of_the_older_one():
    older, newer = (load_config(path).labels for path in (CONFIG, NEWEST))
    assert newer == older


def test_columns_of_the_newest_releases_become_features(newest):
    expected = {
        "age": 80,
        "female": 1,
        "marital=1": 0,
        "marital=2": 1,
        "marital=3": 0,
        "born_in_us": 0,
        "systolic": 124,
        "diastolic": 72,
        "pulse": 62,
        "LBXHSCRP": 3.25,
        "triglycerides": 95,
        "smokes_now": 0,
        "age_began_smoking": np.nan,  # never did
        "how_often_drank": 1,
        "vigorous_work": 0,
        "sleep": 2,
        "sleep_weekends": 14,
        "visits_a_year": 8,
        "food_insecurity": 4,
        "household": np.nan,
    }
    margaret = of_person(newest, "values", MARGARET)[list(expected)].astype(float)
    np.testing.assert_array_equal(margaret, list(expected.values()))
    expected = {"age": 20, "systolic": 110, "triglycerides": 110, "how_often_drank": 10}
    expected |= {"household": 7, "visits_a_year": np.nan}
    ruth = of_person(newest, "values", RUTH)[list(expected)].astype(float)
    np.testing.assert_array_equal(ruth, list(expected.values()))


def test_what_only_one_of_the_newest_releases_has_is_missing_in_the_other(newest):
    values = pd.read_parquet(newest.path / "values.parquet").set_index("subject_id")
    in_2021 = values.index >= FIRST["2021-2023"]
    there = {
        "2017-2020": values[~in_2021].notna().any(),
        "2021-2023": values[in_2021].notna().any(),
    }
    of_one = {
        cycle: {f["name"] for f in newest.manifest["features"] if plain(f) <= set(ONLY[cycle])}
        for cycle in ONLY
    }
    assert set(there["2021-2023"].index[~there["2021-2023"]]) == of_one["2017-2020"]
    assert set(there["2017-2020"].index[~there["2017-2020"]]) == of_one["2021-2023"]
    assert {cycle: len(names) for cycle, names in of_one.items()} == {
        "2017-2020": 16,
        "2021-2023": 1,
    }


def plain(feature):
    return {column.rpartition(".")[2] for column in feature["columns"]}


def test_the_configuration_marks_what_only_one_of_the_newest_releases_has():
    lines = NEWEST.read_text().partition("features:")[2].splitlines()
    for cycle, columns in ONLY.items():
        for column in set(columns) - {"LBXTR", "LBXTLG", "DBQ197"}:
            (line,) = [line for line in lines if re.search(rf"\b{column}\b", line)]
            assert f"({cycle[:4]})" in line


def test_refused_and_unknown_answers_are_missing_in_the_newest_releases(newest):
    static = yaml.safe_load(NEWEST.read_text())["features"]["static"]
    coded = [name for name, feature in static.items() if "missing_codes" in feature]
    silent = of_person(newest, "values", SILENT)
    of_coded = [name for name in silent.index if name.partition("=")[0] in coded]
    assert len(of_coded) > 40
    assert silent[of_coded].isna().all()
    assert silent[["age", "systolic", "LBXHSCRP", "triglycerides"]].notna().all()


@pytest.mark.parametrize(
    ("seqn", "expected"),
    [
        (MARGARET, [1, 0, 0, 1, np.nan]),  # borderline diabetes
        (RUTH, [0, 1, 1, 0, 1]),  # no stroke, and no answer about the heart
        (SILENT, [np.nan] * 5),
    ],
)
def test_labels_of_the_newest_releases(newest, seqn, expected):
    diseases = ["cardiovascular", "liver_condition", "hypertension", "heart_failure", "diabetes"]
    labels = of_person(newest, "labels", seqn)[diseases].astype(float)
    np.testing.assert_array_equal(labels, expected)


def test_no_weight_and_no_leak_is_a_feature_of_the_newest_releases(newest):
    assert leaking(newest.manifest) == []
