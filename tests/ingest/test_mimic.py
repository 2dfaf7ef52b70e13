"""Every admission of a real hospital, predicted for a day after it began; counted by hand."""

import numpy as np
import pandas as pd
import pytest

from ehr_sn.ingest.store import Store, ingest

POTASSIUM, GLUCOSE, LACTATE = "50971", "50931", "50813"
CONTENT = {
    "dataset": "mimic",
    "tables": {
        "admissions": {"path": "hosp/admissions.csv.gz"},
        "patients": {"path": "hosp/patients.csv.gz"},
        "labs": {"path": "hosp/labevents.csv.gz"},
    },
    "events": [
        {
            "table": "labs",
            "subject_id": "subject_id",
            "time": "charttime",
            "code": "itemid",
            "numeric_value": "valuenum",
            "unit": "valueuom",
            "where": "flag IS NULL or flag != 'abnormal' or valuenum >= 0",
        }
    ],
    "cohort": {
        "table": "admissions",
        "subject_id": "subject_id",
        "join": ["patients"],
        "prediction_time": "admittime",
        "hours_after": 24,
        "where": "anchor_age >= 18",
        "eligibility": {"without": {"lactate": {"codes": [LACTATE], "washout_days": 1}}},
    },
    "features": {
        "static": {"anchor_age": {"column": "anchor_age"}},
        "measurements": {
            "potassium": {
                "codes": [POTASSIUM],
                "unit": "mmol/L",
                "units": {"meq/l": 1},
                "aggregates": ["count"],
            },
            "glucose": {"codes": ["5093*"], "aggregates": ["count"]},
        },
    },
    "labels": {"lactate": {"codes": [LACTATE], "until": "dischtime", "prior": "ignored"}},
}


@pytest.fixture
def mimic(hospital, shared_data):
    hospital.content = CONTENT | {"data_root": str(shared_data("mimic4_demo"))}
    return lambda **changes: Store(ingest(hospital.config(**changes)))


def test_every_admission_is_a_row_as_counted_by_hand(mimic, shared_data):
    store = mimic()
    folder = shared_data("mimic4_demo/hosp")
    stays = pd.read_csv(folder / "admissions.csv.gz", parse_dates=["admittime", "dischtime"])
    labs = pd.read_csv(folder / "labevents.csv.gz", parse_dates=["charttime"])
    assert labs["labevent_id"].is_unique  # each row is a measurement of its own
    labs = labs[["subject_id", "charttime", "itemid", "valuenum", "flag"]]
    left_out = (labs["flag"] == "abnormal") & ~(labs["valuenum"] >= 0)
    rows = store.manifest["event_rows"]["labs"]
    assert rows["read"] == len(labs) == sum(rows.values()) - rows["read"]
    assert rows["left_out"] == left_out.sum() > 0

    stays["t"] = stays["admittime"] + pd.Timedelta("24h")
    pairs = stays.merge(labs[~left_out], on="subject_id")
    before = (pairs["t"] - pairs["charttime"]) / pd.Timedelta("1D")
    lactate = pairs["itemid"] == int(LACTATE)
    recent = set(pairs[lactate & before.between(0, 1)]["hadm_id"])
    later = set(
        pairs[lactate & (before < 0) & (pairs["charttime"] <= pairs["dischtime"])]["hadm_id"]
    )
    read, usable, adults, without = store.manifest["cohort"]
    assert read["rows"] == usable["rows"] == adults["rows"] == len(stays)
    assert read["subjects"] == 100
    kept = stays[~stays["hadm_id"].isin(recent)].sort_values(["subject_id", "t"])
    assert (without["excluded"], without["rows"]) == (len(recent), len(kept))

    stored = pd.read_parquet(store.path / "values.parquet")
    assert stored["prediction_time"].tolist() == kept["t"].tolist()
    known = pairs[(before >= 0) & pairs["valuenum"].notna()]
    for name, codes in (("potassium", [int(POTASSIUM)]), ("glucose", range(50930, 50940))):
        counts = known[known["itemid"].isin(codes)].groupby("hadm_id").size()
        np.testing.assert_array_equal(stored[f"{name}.count"], kept["hadm_id"].map(counts))
    ill = kept["hadm_id"].isin(later).where(kept["dischtime"] > kept["t"])
    np.testing.assert_array_equal(store.labels()[:, 0], ill.astype(float))
    label = store.manifest["labels"]["lactate"]
    assert label["no_window"] == (kept["dischtime"] <= kept["t"]).sum() > 0
    assert label["positive"] == ill.sum()


def test_the_last_admission_of_each_patient_may_be_taken(mimic):
    store = mimic(cohort__take="last")
    assert store.manifest["cohort"][-1]["rule"] == "take"
    assert store.manifest["rows"] == store.manifest["cohort"][-1]["subjects"]
