"""The survey in one YAML: who is in it, what they were told, and none of its known traps."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from ehr_sn.config import load_config
from ehr_sn.ingest.store import Store, ingest

CONFIG = Path(__file__).parents[2] / "configs" / "nhanes.yaml"


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


def test_no_column_that_is_known_to_leak_is_a_feature(nhanes):
    used = [column for f in nhanes.manifest["features"] for column in f["columns"]]
    leaks = (
        r"(DIQ|DID|BPQ|BPD|MCQ|KIQ|RXD|PFQ|WHQ|WHD|DRQSD|LBXGLT)"  # asked of, or of, the ill
        r"|LBX(GH|GLU|SGL|SOSSI|IN)$"  # what diabetes is diagnosed from
        r"|LBX(SCH|STR)$|LBDLDL|LBD.*SI$"  # copies
        r"|WT|SDMV|SDDSRVYR|SEQN"  # the survey's design
        r"|LBXH(A|BC|BS|CR?|E\w)$"  # hepatitis
    )
    assert [c for c in used if re.match(leaks, c.rpartition(".")[2])] == []


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
