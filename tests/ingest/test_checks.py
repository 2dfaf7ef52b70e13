"""What a person should know of the data is found, counted, and told without a patient's data."""

import json

import numpy as np
import pandas as pd
import pytest

from ehr_sn.errors import DataError
from ehr_sn.evaluate.small_cells import shown_manifest
from ehr_sn.ingest.checks import code_subjects, common_codes
from ehr_sn.ingest.store import check


@pytest.fixture
def findings(busy):
    """Check a hospital of 300 with some tables changed: gives (where, count, of, message)s."""

    def find(kind, more=None, **changes):
        for name, frame in (more or {}).items():
            whole = pd.read_csv(busy.folder / f"{name}.csv")
            busy.write(**{name: pd.concat([whole, frame], ignore_index=True)})
        found = check(busy.config(**changes))["findings"]
        json.dumps(found)
        return [
            (f["where"], f["count"], f["of"], f["message"]) for f in found if f["check"] == kind
        ]

    return find


def labs(n, **columns):
    return pd.DataFrame({"id": np.arange(1, n + 1), "day": 50, **columns})


def test_sound_data_give_no_findings_but_that_they_are_few(busy):
    found = check(busy.config())["findings"]
    assert {f["check"] for f in found} == {"few positives", "few negatives"}


def test_a_code_that_repeats_another_is_found(findings):
    rng = np.random.default_rng(0)
    values = rng.normal(100, 9, 200).round(1)
    copy = [labs(200, test="a", x=values), labs(200, test="b", x=values)]
    copy.append(labs(200, test="c", x=rng.permutation(values)))
    copy.append(labs(200, test="flag", x=1))
    copy.append(labs(200, test="flag2", x=1))  # equal, but as flags are
    (found,) = findings("repeated code", {"labs": pd.concat(copy)})
    assert found[:3] == ("a, b", 200, 200)
    assert "use only the one you trust" in found[3]


def test_repeated_codes_that_the_configuration_names_come_first(findings):
    values = np.random.default_rng(0).normal(100, 9, (2, 200)).round(1)
    copies = [labs(200, test=code, x=values[0]) for code in ("a", "b")]
    copies += [labs(200, test=code, x=values[1]) for code in ("hdl", "z")]
    found = findings("repeated code", {"labs": pd.concat(copies)})
    assert [where for where, *_ in found] == ["hdl, z", "a, b"]


def test_what_went_to_quarantine_is_counted_by_reason(findings, busy):
    bad = [labs(3, test="sbp", x="high"), labs(4, test="sbp", x=1e4), labs(5, test=None, x=120)]
    found = findings("quarantine", {"labs": pd.concat(bad)})
    assert [(where, count) for where, count, *_ in found] == [("labs", n) for n in (5, 4, 3)]
    assert [message for *_, message in found] == [
        "no code: row set aside",
        "sbp: outside the plausible range 50 to 300: value made missing",
        "x: not a number: value made missing",
    ]
    rows = len(pd.read_csv(busy.folder / "labs.csv"))
    of_sbp = (pd.read_csv(busy.folder / "labs.csv")["test"] == "sbp").sum()
    # Of the table's rows; of the measurement's values, with the one that is a text; of all values.
    assert [of for _, _, of, _ in found] == [rows, of_sbp - 3, rows - 5]


@pytest.fixture
def severe(busy):
    """Check the hospital: gives severity, where, count, share and message of one check's."""

    def find(kind, **changes):
        found = check(busy.config(**changes))["findings"]
        return [
            tuple(f[name] for name in ("severity", "where", "count", "share", "message"))
            for f in found
            if f["check"] == kind
        ]

    return find


def changed(busy, table, **columns):
    """Write a table again with other columns; gives its rows as they were."""
    before = pd.read_csv(busy.folder / f"{table}.csv")
    busy.write(**{table: before.assign(**columns)})
    return before


def test_rows_set_aside_by_the_tenth_are_blocking_with_advice(busy, severe):
    labs = pd.read_csv(busy.folder / "labs.csv")
    days = labs["day"].astype(object)
    days[labs.index % 2 == 0] = "31.12.2019"
    changed(busy, "labs", day=days)
    ((severity, where, count, share, message),) = severe("quarantine")
    assert (severity, where, count) == ("blocking", "labs", (labs.index % 2 == 0).sum())
    assert share == pytest.approx(0.5, abs=0.01)
    assert message.startswith("time does not parse as a time between the years 1 and 9999: row set")
    assert "`clock: {format: …}`" in message


def test_a_measurement_in_another_unit_is_blocking_though_few_of_the_table_are(busy, severe):
    labs = pd.read_csv(busy.folder / "labs.csv")
    kpa = pd.DataFrame({"id": labs["id"][:90], "day": 7, "test": "dbp", "x": 10.7})
    busy.write(labs=pd.concat([labs, kpa.drop_duplicates("id")]))
    sbp = busy.content["features"]["measurements"] | {"dbp": {"plausible": [20, 200]}}
    ((severity, where, _, share, message),) = severe("quarantine", features__measurements=sbp)
    assert (severity, where, share) == ("blocking", "labs", 1.0)
    assert "another unit than `unit` says" in message
    whole = severe("all-missing feature", features__measurements=sbp)
    assert {severity for severity, *_ in whole} == {"blocking"}


def test_reasons_that_are_small_by_themselves_are_added_up(busy, severe):
    labs = pd.read_csv(busy.folder / "labs.csv")
    place = labs.index % 100
    changed(
        busy,
        "labs",
        day=labs["day"].astype(object).where(place >= 8, "soon"),
        test=labs["test"].where((place < 8) | (place >= 15), None),
    )
    assert {severity for severity, *_ in severe("quarantine")} == {"look"}
    ((severity, where, count, share, message),) = severe("set aside")
    assert (severity, where, count) == ("blocking", "labs", (place < 15).sum())
    assert share == pytest.approx(0.15, abs=0.005)
    assert "does not parse" in message
    assert "no code" in message


def test_events_of_subjects_whom_a_rule_excludes_are_no_fault(busy, severe):
    """Else any rule of eligibility would block."""
    ruled = {"cohort__where": "age < 50"}
    aside = [row for row in severe("quarantine", **ruled) if "not in the cohort" in row[-1]]
    assert len(aside) == 2
    assert all(share > 0.3 for *_, share, _ in aside)
    assert {severity for severity, *_ in aside} == {"harmless"}
    changed(busy, "labs", id=1000)
    with pytest.raises(DataError, match="subject is not in the cohort"):
        severe("quarantine")
    changed(busy, "labs", id=np.arange(len(pd.read_csv(busy.folder / "labs.csv"))))
    (found,) = severe("quarantine")
    assert found[0] == "blocking"
    assert "of stays or visits? Then join the tables by SQL" in found[-1]


def test_what_is_declared_is_to_be_looked_at_above_a_half(busy, severe):
    assert severe("excluded", cohort__where="age < 70") == []
    ((severity, where, count, share, _),) = severe("excluded", cohort__where="age < 45")
    assert (severity, where, count) == ("look", "cohort.where", 175)
    assert share == pytest.approx(175 / 300, abs=1e-6)
    labs = busy.content["events"][0] | {"where": "x > 130"}
    ((severity, where, *_),) = severe("left out", events__0=labs)
    assert (severity, where) == ("look", "labs")
    ((severity, *_),) = severe("left out", events__0=labs | {"where": "x > 100"})
    assert severity == "harmless"


def test_a_rule_that_cannot_be_decided_for_many_is_blocking(busy, severe):
    patients = pd.read_csv(busy.folder / "patients.csv")
    changed(busy, "patients", age=patients["age"].where(patients["id"] % 4 > 0, None))
    ((severity, where, count, share, _),) = severe("undecided", cohort__where="age > 0")
    assert (severity, where, count, share) == ("blocking", "cohort.where", 75, 0.25)


def test_findings_come_by_severity(busy):
    labs = pd.read_csv(busy.folder / "labs.csv")
    changed(busy, "labs", day=labs["day"].where(labs.index % 2 == 0, None))
    history = {"smoker": ["F17"], "x": ["zzz"]}
    found = check(busy.config(features__history=history))["findings"]
    order = [("blocking", "look", "harmless").index(f["severity"]) for f in found]
    assert order == sorted(order)
    assert order[0] == 0


def test_a_code_that_never_occurs_is_answered_with_the_nearest_one(findings):
    found = findings("absent code", features__history={"smoker": ["hld"], "x": ["F18"]})
    assert [where for where, *_ in found] == ["features.history.smoker", "features.history.x"]
    assert "code 'hld' occurs in no event; did you mean 'hdl'?" in found[0][3]
    assert "valid: 'E11', 'F17', 'hdl', 'sbp'" in found[1][3]  # F17 is another disease than F18


def test_codes_that_are_not_used_are_counted_by_table(findings):
    more = pd.concat(
        [labs(15, test="crp", x=1), labs(11, test="alt", x=2), labs(10, test="A", x=3)]
    )
    (found,) = findings("unused code", {"labs": more})
    assert found[:2] == ("labs", 36)
    assert found[3] == "3 codes in events that no feature or label uses, such as 'alt'"


def test_a_code_of_few_patients_is_never_shown(findings):
    """It may be a free text about one of them."""
    note = pd.DataFrame({"id": [7, 8], "day": 50, "icd": "SECRET"})
    ((*_, unused),) = findings("unused code", {"diagnoses": note})
    ((*_, absent),) = findings("absent code", features__history={"smoker": ["F17", "SECRE"]})
    assert unused == "1 codes in events that no feature or label uses"
    assert "SECRET" not in absent


def test_features_without_any_or_with_one_value_are_found(findings, busy):
    everyone = pd.read_csv(busy.folder / "patients.csv")
    busy.write(patients=everyone.assign(age=50))
    found = {
        kind: [where for where, *_ in findings(kind, {"labs": labs(9, test="crp", x=None)}, **c)]
        for kind in ("all-missing feature", "constant feature")
        for c in [{"features__measurements__crp": {}, "features__history": {"smoker": ["F99"]}}]
    }
    assert found["constant feature"] == ["age", "history.smoker"]
    assert found["all-missing feature"] == [
        f"crp.{a}" for a in ("last", "mean", "min", "max", "count", "slope", "days_since_last")
    ]


def test_rows_without_any_value_are_counted(findings, busy):
    patients = pd.read_csv(busy.folder / "patients.csv")
    busy.write(patients=patients.assign(age=patients["age"].where(patients["id"] > 10)))
    lab = pd.read_csv(busy.folder / "labs.csv")
    busy.write(labs=lab[lab["id"] > 10])
    changes = {"features.history": None}
    ((_, count, of, message),) = findings("empty row", **changes)
    assert (count, of) == (10, 300)
    assert "nothing at all is observed" in message
    assert findings("empty row") == []  # a history flag is always observed


def test_a_column_that_repeats_another_in_any_unit_is_found(hospital):
    rng = np.random.default_rng(0)
    n = 400
    weight, height = rng.normal(80, 9, n).round(1), rng.normal(170, 9, n).round(1)
    frame = pd.DataFrame(
        {
            "id": range(n),
            "kg": weight,
            "again": np.where(rng.random(n) < 0.5, weight, np.nan),
            "pounds": (weight * 2.2046).round(2),
            "cm": height,
            "flag": 1,
            "also": 1,
            "ill": rng.choice([0, 1], n),
        }
    )
    hospital.write(people=frame)
    hospital.content = {
        "dataset": "hospital",
        "tables": {"people": {"path": "people.csv"}},
        "cohort": {"table": "people", "subject_id": "id"},
        "features": {"columns": {"people": ["kg", "again", "pounds", "cm", "flag", "also"]}},
        "labels": {"ill": {"positive": "ill == 1", "negative": "ill == 0"}},
    }
    found = [f for f in check(hospital.config())["findings"] if f["check"] == "repeated column"]
    both = int(frame["again"].notna().sum())
    assert [(f["where"], f["count"], f["of"]) for f in found] == [
        ("kg, again", both, both),
        ("kg, pounds", n, n),
        ("again, pounds", both, both),
    ]
    assert "hold the same value in" in found[0]["message"]
    assert "lie on one line" in found[1]["message"]


def seen_before_the_diagnosis(busy, days: int, subjects: int) -> pd.DataFrame:
    """Measurements of as many ill subjects, so many days before the diagnosis of each."""
    diagnoses = pd.read_csv(busy.folder / "diagnoses.csv")
    ill = diagnoses[diagnoses.icd == "E11"].head(subjects)
    return pd.DataFrame({"id": ill.id, "day": ill.day - days, "test": "hdl", "x": 50.0})


@pytest.mark.parametrize("days", [30, 365])
def test_a_diagnosis_that_is_recorded_late_is_found_by_the_visit_it_was_made_at(
    busy, findings, days
):
    ((where, count, _, message),) = findings(
        "dated late", {"labs": seen_before_the_diagnosis(busy, days, 60)}
    )
    assert (where, 60 <= count < 75) == ("labels.diabetes", True)
    assert f"seen {days} days before its first event" in message


def test_visits_before_a_diagnosis_are_no_fault_where_it_is_made_at_one_or_they_are_few(
    busy, findings
):
    few = seen_before_the_diagnosis(busy, 365, 8)
    assert findings("dated late", {"labs": few}) == []
    visits = [seen_before_the_diagnosis(busy, days, 70) for days in (365, 0)]
    assert findings("dated late", {"labs": pd.concat(visits)}) == []


@pytest.fixture
def never_seen(busy):
    """Of the 300, none is seen before the prediction and a third never: which those are."""
    tables = {name: pd.read_csv(busy.folder / f"{name}.csv") for name in ("labs", "diagnoses")}
    later = {name: t[(t["id"] <= 200) & (t["day"] > 100)] for name, t in tables.items()}
    busy.write(**later)
    return ~np.isin(np.arange(1, 301), pd.concat(later.values())["id"])


@pytest.mark.parametrize(("later", "never"), [(1.0, 0.2), (0.1, 0.7)])
def test_a_column_that_is_known_of_those_seen_later_is_found(
    busy, findings, never_seen, later, never
):
    known = np.random.default_rng(0).random(300) < np.where(never_seen, never, later)
    patients = pd.read_csv(busy.folder / "patients.csv").assign(weight=np.where(known, 70, np.nan))
    busy.write(patients=patients)
    static = {"age": {"column": "age"}, "weight": {"column": "weight"}}
    ((where, count, of, message),) = findings("known later", features__static=static)
    assert (where, count, of) == ("weight", known[~never_seen].sum(), (~never_seen).sum())
    assert f"first seen after the prediction {known[~never_seen].mean():.0%} have it" in message
    assert f"never seen {known[never_seen].mean():.0%}" in message


def test_a_column_that_some_lack_is_no_fault_if_visits_play_no_part(busy, findings, never_seen):
    weight = np.where(np.arange(300) % 2, 70, np.nan)
    patients = pd.read_csv(busy.folder / "patients.csv").assign(weight=weight)
    busy.write(patients=patients)
    assert findings("known later", features__static={"weight": {"column": "weight"}}) == []


def test_subjects_of_common_codes_add_up_over_shards() -> None:
    common = common_codes([("labs", "a", 50, 20), ("labs", "rare", 9, 3)], {"labs": 59})
    rows = [("labs", "a", 12), ("labs", "rare", 3), ("labs", "a", 8)]
    assert code_subjects(rows, common) == {"labs": {"a": 20}}


def test_common_codes_come_in_one_order_whatever_that_of_the_counts() -> None:
    rows = [("labs", code, 50, 30) for code in ("c", "a", "b")] + [("labs", "rare", 50, 3)]
    told = common_codes(rows, {"labs": 200})
    assert list(told["labs"]["codes"]) == ["a", "b", "c"]
    assert common_codes(rows[::-1], {"labs": 200}) == told
    shards = [("labs", "a", 20, 6), ("labs", "a", 30, 6)]
    assert common_codes(shards, {"labs": 50}) == {"labs": {"events": 50, "codes": {"a": 50}}}


# -- Values that stand for missing ---------------------------------------------------------------


def with_sentinel(busy, value, rows, column="age"):
    patients = pd.read_csv(busy.folder / "patients.csv")
    changed(busy, "patients", **{column: patients["age"].where(patients["id"] > rows, value)})
    return {"features__static": {column: {"column": column}}}


@pytest.mark.parametrize("value", [-1, -9, -99, 999, 9999])
def test_a_value_that_stands_for_missing_is_suspected(busy, severe, value):
    ((severity, where, count, share, message),) = severe(
        "suspected sentinel", **with_sentinel(busy, value, 30)
    )
    assert (severity, where, count, share) == ("blocking", "features.static.age", 30, 0.1)
    assert message.startswith(f"{value} lies outside the other values")
    assert f"`missing_codes: [{value}]`" in message


def test_a_zero_where_the_rest_lies_far_from_it_is_suspected(busy, severe):
    changes = with_sentinel(busy, 0, 30)
    assert severe("suspected sentinel", **changes) == []  # some are 20 years old
    patients = pd.read_csv(busy.folder / "patients.csv")
    changed(busy, "patients", age=patients["age"] + 100 * (patients["age"] > 0))
    ((_, where, *_),) = severe("suspected sentinel", **changes)
    assert where == "features.static.age"


@pytest.mark.parametrize(("value", "rows"), [(-9, 10), (79, 30), (99, 30), (-9.5, 30)])
def test_a_value_of_few_or_one_like_the_others_is_not_suspected(busy, severe, value, rows):
    assert severe("suspected sentinel", **with_sentinel(busy, value, rows)) == []


def test_answers_beyond_a_scale_are_suspected_together(busy, severe):
    ids = pd.read_csv(busy.folder / "patients.csv")["id"]
    answers = np.where(ids % 20 == 0, 7, np.where(ids % 20 == 1, 9, 1 + ids % 5))
    changed(busy, "patients", health=answers)
    static = {"health": {"column": "health"}}
    ((severity, where, count, _, message),) = severe("suspected sentinel", features__static=static)
    assert (severity, where, count) == ("blocking", "features.static.health", 30)
    assert "`missing_codes: [7, 9]`" in message
    changed(busy, "patients", health=ids % 10)
    assert severe("suspected sentinel", features__static=static) == []


def test_one_that_is_declared_plausible_is_to_be_looked_at(busy, severe):
    changes = with_sentinel(busy, -9, 15)
    changes["features__static"]["age"]["plausible"] = [-10, 120]
    ((severity, *_),) = severe("suspected sentinel", **changes)
    assert severity == "look"
    changes["features__static"]["age"] = {"column": "age", "missing_codes": [-9]}
    assert severe("suspected sentinel", **changes) == []


def test_columns_that_share_a_sentinel_are_told_together(busy, severe):
    ids = pd.read_csv(busy.folder / "patients.csv")["id"]
    rng = np.random.default_rng(0)
    columns = {f"q{i}": np.where(ids <= 4 + 10 * i, -9, rng.normal(50, 9, 300)) for i in range(4)}
    changed(busy, "patients", **columns)
    features = {"patients": list(columns)}
    ((severity, where, count, _, message),) = severe(
        "suspected sentinel", features__columns=features
    )
    assert (where, count) == ("features.columns.patients.0 and 3 more", 4 + 14 + 24 + 34)
    assert severity == "blocking"
    assert "in each of 4 columns -9 lies outside" in message


def test_a_measurement_has_sentinels_too(busy, severe):
    labs = pd.read_csv(busy.folder / "labs.csv")
    hdl = (labs["test"] == "hdl") & (labs["id"] < 40)
    changed(busy, "labs", x=labs["x"].where(~hdl, 999))
    ((severity, where, count, _, message),) = severe("suspected sentinel")
    assert (severity, where) == ("blocking", "features.measurements.hdl")
    assert count == hdl.sum()
    assert "999 lies outside" in message


def test_sentinels_are_counted_in_every_shard(busy):
    config = busy.config(**with_sentinel(busy, -9, 150))
    found = [check(config, rows)["findings"] for rows in (None, 900)]
    assert found[0] == found[1]
    assert "suspected sentinel" in {finding["check"] for finding in found[0]}


# -- Codes that are spelt otherwise --------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "occurs"),
    [
        ("F17", "f17"),
        ("F17.2", "F172"),
        ("F172", "F17.2"),
        ("F17 2", "F172"),
        ("F-17", "F17"),
        ("305.0", "305"),
        ("041", "41"),
        ("F17.*", "F172"),
        ("f17*", "F17.2"),
        ({"range": ["f16", "f18"]}, "F17.2"),
    ],
)
def test_a_code_that_is_only_spelt_otherwise_is_blocking(busy, severe, listed, occurs):
    diagnoses = pd.read_csv(busy.folder / "diagnoses.csv")
    changed(busy, "diagnoses", icd=diagnoses["icd"].replace("F17", occurs))
    ((severity, where, count, _, message),) = severe(
        "code spelling", features__history={"smoker": [listed]}
    )
    assert (severity, where, count) == ("blocking", "features.history.smoker", 75)
    assert f"matches no event, but {occurs!r} differ in nothing but case" in message
    assert severe("absent code", features__history={"smoker": [listed]}) == []


@pytest.mark.parametrize("listed", ["F18", "F1", "17", "E117", "041*", {"range": ["001", "139"]}])
def test_a_code_that_is_another_is_only_absent(busy, severe, listed):
    diagnoses = pd.read_csv(busy.folder / "diagnoses.csv")
    changed(busy, "diagnoses", icd=diagnoses["icd"].replace("F17", "41.12"))
    assert severe("code spelling", features__history={"x": [listed]}) == []
    assert len(severe("absent code", features__history={"x": [listed]})) == 1


def test_rare_spellings_are_counted_and_not_shown(busy, severe):
    diagnoses = pd.read_csv(busy.folder / "diagnoses.csv")
    note = pd.DataFrame({"id": [7, 8], "day": 50, "icd": "f-1-8"})
    busy.write(diagnoses=pd.concat([diagnoses, note]))
    ((*_, message),) = severe("code spelling", features__history={"x": ["F18"]})
    assert "but 1 codes differ" in message
    assert "f-1-8" not in message


def test_a_range_that_takes_codes_of_another_length_is_told(busy, severe):
    diagnoses = pd.read_csv(busy.folder / "diagnoses.csv")
    more = [
        pd.DataFrame({"id": np.arange(1, 21), "day": 50, "icd": code})
        for code in ("390", "41", "410.1", "41234", "4")
    ]
    busy.write(diagnoses=pd.concat([diagnoses, *more]))
    history = {"heart": [{"range": ["390", "459"]}]}
    ((severity, where, count, share, message),) = severe("code length", features__history=history)
    assert (severity, where, count, share) == ("look", "features.history.heart", 60, 0.6)
    assert "holds 3 codes that are shorter or longer than its ends, such as '4', '41'," in message
    assert severe("code length", features__history={"heart": [{"range": ["F16", "F18"]}]}) == []


# -- Classes by split ----------------------------------------------------------------------------


def test_few_of_a_class_in_a_split_are_told_by_label_and_split(busy, severe):
    dealt = {"train": 0.5, "tuning": 0.4, "held_out": 0.1, "repeats": 2}
    for name in ("patients", "labs", "diagnoses"):
        table = pd.read_csv(busy.folder / f"{name}.csv")
        busy.write(**{name: pd.concat([table.assign(id=table["id"] + i * 300) for i in range(3)])})
    found = severe("few positives", splits=dealt)
    splits = [message.partition(" are dealt to ")[2] for *_, message in found]
    assert [text.partition(" by ")[0] for text in splits] == ["held_out"]
    severity, where, count, share, _ = found[0]
    assert (severity, where) == ("look", "labels.diabetes")
    assert 2 <= count < 50
    assert 0.2 < share < 0.5
    assert severe("few negatives", splits=dealt | {"repeats": 1}) == []


def test_few_of_a_class_are_counted_over_shards(busy):
    found = [check(busy.config(splits__repeats=2), rows)["findings"] for rows in (None, 900)]
    assert found[0] == found[1]


def test_few_of_a_class_are_not_told_to_mlflow(busy):
    """The rest of a label's rows would tell how many a small split has."""
    manifest = check(busy.config())
    told = shown_manifest(manifest, 11)["findings"]
    few = [finding for finding in told if finding["check"].startswith("few ")]
    assert {(f["count"], f["of"], f["share"]) for f in few} == {("–", 0, None)}
    labs = pd.read_csv(busy.folder / "labs.csv")
    changed(busy, "labs", day=labs["day"].where(labs.index > 4, None))
    small = shown_manifest(check(busy.config()), 11)
    (aside,) = [f for f in small["findings"] if f["check"] == "quarantine"]
    assert (aside["count"], aside["share"], aside["severity"]) == ("< 11", None, "harmless")


# -- Columns, categories and units ---------------------------------------------------------------


def test_an_empty_column_is_named_as_that(busy, severe):
    changed(busy, "patients", weight=None, sex=None)
    static = {
        "weight": {"column": "weight"},
        "sex": {"column": "sex", "categories": ["m", "f"]},
        "age": {"column": "age"},
    }
    found = severe("empty column", features__static=static)
    assert [(severity, where) for severity, where, *_ in found] == [
        ("blocking", "sex"),
        ("blocking", "weight"),
    ]
    assert found[1][-1] == "column 'weight' of table patients is empty in all 300 rows"
    assert severe("all-missing feature", features__static=static) == []
    one, many = (check(busy.config(features__static=static), n)["findings"] for n in (None, 900))
    assert one == many


def test_an_empty_column_of_values_is_named_as_that(busy, severe):
    before = changed(busy, "labs", x=None)
    ((severity, where, count, _, message),) = severe("empty column")
    assert (severity, where, count) == ("blocking", "labs", len(before))
    assert message == f"column 'x' of table labs is empty in all {count:,} rows"


def test_categories_in_another_case_are_told_by_their_declared_name(busy, severe):
    ids = pd.read_csv(busy.folder / "patients.csv")["id"]
    race = np.select([ids <= 20, ids <= 150], ["NON  hispanic", "asian"], "non hispanic")
    changed(busy, "patients", race=race)
    static = {"race": {"column": "race", "categories": ["non hispanic", "asian", "other"]}}
    ((severity, where, count, _, message),) = severe("category spelling", features__static=static)
    assert (severity, where, count) == ("look", "race", 20)
    assert "the category 'non hispanic' in nothing but case or blanks" in message
    assert "NON" not in message
    static["race"]["categories"] = ["Non Hispanic", "Asian"]
    with pytest.raises(DataError, match=r"none of the categories 'Non Hispanic', 'Asian' in any"):
        severe("category spelling", features__static=static)


def test_a_unit_that_is_only_spelt_otherwise_is_told(busy, severe):
    labs = pd.read_csv(busy.folder / "labs.csv")
    changed(busy, "labs", unit=np.where(labs.index % 2, "mm Hg", "k-Pa"))
    events = busy.content["events"][0] | {"unit": "unit"}
    sbp = {"sbp": {"unit": "mmHg", "units": {"kPa": 7.5}}, "hdl": {}}
    found = severe("unit spelling", events__0=events, features__measurements=sbp)
    assert [(severity, where) for severity, where, *_ in found] == [("blocking", "sbp")] * 2
    assert sum(count for _, _, count, *_ in found) == (labs["test"] == "sbp").sum()
    assert any("the declared 'kPa' in nothing but case" in message for *_, message in found)
    config = busy.config(events__0=events, features__measurements=sbp)
    assert check(config)["findings"] == check(config, 900)["findings"]


def test_missing_codes_of_a_measurement_are_counted_and_not_listed(busy, severe):
    labs = pd.read_csv(busy.folder / "labs.csv")
    hdl = (labs["test"] == "hdl") & (labs["id"] < 40)
    values = labs["x"].astype(object).where(~hdl, -9)
    values[(labs["test"] == "hdl") & (labs["id"] == 40)] = "n/a"
    values[(labs["test"] == "sbp") & (labs["id"] == 50)] = -9
    changed(busy, "labs", x=values)
    coded = hdl | ((labs["test"] == "hdl") & (labs["id"] == 40))
    measured = {"sbp": {"plausible": [50, 300]}, "hdl": {"missing_codes": [-9, "n/a"]}}
    ((severity, where, count, _, message),) = severe(
        "missing code", features__measurements=measured
    )
    assert (severity, where, count) == ("harmless", "hdl", coded.sum())
    assert message == "-9, 'n/a' made missing"
    (aside,) = severe("quarantine", features__measurements=measured)  # of sbp, -9 is a value
    assert "sbp: outside the plausible range" in aside[-1]
    assert severe("suspected sentinel", features__measurements=measured) == []
    assert check(busy.config(features__measurements=measured))["features"][8]["observed_rate"] < 1


# -- Who leaves before the window ends -----------------------------------------------------------


@pytest.fixture
def leaving(busy):
    """Give the patients of 300 of whom a third fall ill other ends of follow-up, and deaths."""

    def leave(end, dead=0):
        changed(busy, "patients", end=end, dead=dead)

    return leave


IDS = np.arange(1, 301)


@pytest.mark.parametrize(
    ("censoring", "severity"), [("ipcw", "harmless"), ("complete", None), ("drop", "look")]
)
def test_labels_that_misstate_the_risk_are_found(busy, severe, leaving, censoring, severity):
    leaving(np.where(IDS % 3 == 0, 200, 1000))
    found = severe("misstated risk", labels__diabetes__censoring=censoring)
    if severity is None:  # who leaves is like who stays
        assert found == []
        return
    ((told, where, *_, message),) = found
    assert (told, where) == (severity, "labels.diabetes")
    assert "Kaplan and Meier's estimate of the risk is" in message
    assert ("the rows are weighted for that" in message) == (censoring == "ipcw")
    assert ("times what they should be. With `censoring: ipcw`" in message) == (censoring == "drop")


def test_a_risk_is_estimated_as_by_hand(busy, leaving):
    leaving(np.where(IDS % 3 == 0, 200, 1000), np.where(IDS % 6 == 0, 1, 0))
    manifest = check(busy.config(cohort__died="dead == 1"))
    patients = pd.read_csv(busy.folder / "patients.csv")
    diagnoses = pd.read_csv(busy.folder / "diagnoses.csv")
    onset = patients["id"].map(diagnoses[diagnoses["icd"] == "E11"].set_index("id")["day"])
    ill = (onset <= patients["end"]).to_numpy()
    days = np.minimum(onset.fillna(1000), patients["end"]).to_numpy() - patients["index"].to_numpy()
    days = np.minimum(days, 365)
    died = ~ill & (days < 365) & (patients["dead"] == 1).to_numpy()

    def risk(deaths):
        well, total = 1.0, 0.0
        for day in np.unique(days):
            at_risk, now = (days >= day).sum(), days == day
            total += well * (ill & now).sum() / at_risk
            well *= 1 - ((ill | (died & deaths)) & now).sum() / at_risk
        return total

    known = ill | died | (days == 365)
    told = manifest["risks"]["diabetes"]
    assert told["labelled"] == pytest.approx(ill[known].mean(), rel=5e-3)
    assert told["estimated"] == pytest.approx(risk(True), rel=5e-3)
    assert told["deaths_as_leaving"] == pytest.approx(risk(False), rel=5e-3)
    assert told["estimated"] < told["deaths_as_leaving"]


def test_deaths_that_are_declared_are_told_beside_the_risk_without_them(severe, leaving):
    leaving(np.where(IDS % 2, 250, 1000), np.where(IDS % 10 == 1, 1, 0))
    ((*_, message),) = severe("misstated risk", cohort__died="dead == 1")
    assert "Aalen and Johansen's estimate of the risk is" in message
    assert "(Kaplan and Meier's, which counts deaths as leaving," in message


def test_a_condition_that_finds_no_death_is_told(findings, leaving):
    leaving(np.where(IDS % 2, 250, 1000), np.where(IDS % 10 == 1, "yes", "no"))
    ((where, count, _, message),) = findings("nobody died", cohort__died="dead == 'Y'")
    assert (where, count) == ("cohort.died", 0)
    assert "they count as having left alive" in message
    assert findings("nobody died", cohort__died="dead == 'yes'") == []


def test_few_who_are_followed_to_the_end_are_found(findings, leaving):
    leaving(np.where(IDS % 100 == 0, 1000, 150 + IDS % 200), IDS % 4 == 0)
    ((where, count, of, message),) = findings("few followed", cohort__died="dead == 'True'")
    assert (where, of) == ("labels.diabetes", 300)
    assert count <= 3
    assert "take a shorter window" in message
    assert findings("few followed", labels__diabetes__within_days=100) == []


def test_where_few_are_ill_no_rate_is_told(busy, leaving):
    leaving(np.where(IDS % 3 == 0, 200, 1000))
    diagnoses = pd.read_csv(busy.folder / "diagnoses.csv")
    ill = diagnoses.index[diagnoses["icd"] == "E11"]
    busy.write(diagnoses=diagnoses.drop(ill[10:]))
    manifest = check(busy.config(splits={"train": 0.34, "tuning": 0.33, "held_out": 0.33}))
    assert manifest["risks"] == {}
    assert not any(f["check"] == "misstated risk" for f in manifest["findings"])


def test_what_is_told_of_follow_up_counts_no_few_in_what_leaves(busy, leaving):
    leaving(np.where(IDS % 3 == 0, 200, 1000))
    shown = shown_manifest(check(busy.config()), 11)
    (found,) = [f for f in shown["findings"] if f["check"] == "misstated risk"]
    assert (found["count"], found["of"], found["share"]) == ("–", 0, None)


def test_a_feature_that_tells_who_died_is_refused(busy, leaving):
    leaving(1000)
    static = {"dead": {"column": "dead"}}
    with pytest.raises(DataError, match="the feature would tell who died later"):
        check(busy.config(cohort__died="dead == 1", features__static=static))
