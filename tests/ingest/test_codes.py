"""An entry means the codes that it says, and a set of them is one set wherever it is used."""

import pandas as pd
import pytest

from ehr_sn.errors import ConfigError, DataError
from ehr_sn.ingest.codes import CodeRange, patterns, read_entry, share_a_code
from ehr_sn.ingest.store import Store, check, ingest

PATIENTS = "id index end age \n" + "\n".join(f"{i} 100 1000 50" for i in range(1, 10))
LABS = "id day test x \n 1 50 sbp 120 \n 2 50 sbp-left 130 \n 3 50 GLU* 5"
CODES = ["E11", "E11.9", "E1", "E12", "E13.65", "E14", "e11", "*E", "4019"]
DIAGNOSES = "id day icd \n" + "\n".join(f"{i} 50 {code}" for i, code in enumerate(CODES, 1))


@pytest.fixture
def holders(hospital, stage):
    """The codes in the diagnoses that a history of these entries takes."""
    hospital.draw(patients=PATIENTS, labs=LABS, diagnoses=DIAGNOSES)

    def find(*entries, **changes):
        found = stage(hospital.config(features__history={"set": list(entries)}, **changes))
        flagged = found.features()["history.set"]
        return [code for code, flag in zip(CODES, flagged, strict=True) if flag]

    return find


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("E11", ["E11"]),
        ("E11*", ["E11", "E11.9"]),
        ("E1*", ["E11", "E11.9", "E1", "E12", "E13.65", "E14"]),
        ("*E", ["*E"]),  # a star that is not at the end is a star
        ("**", ["*E"]),
        ({"range": ["E11", "E13"]}, ["E11", "E11.9", "E12", "E13.65"]),
        ({"range": ["E11.5", "E13.6"]}, ["E11.9", "E12", "E13.65"]),
        ({"range": [401, 405]}, ["4019"]),
        ({"range": ["E12", "E12"]}, ["E12"]),
    ],
)
def test_an_entry_means_these_codes(holders, entry, expected):
    assert holders(entry) == expected


def test_entries_that_overlap_count_an_event_once(hospital, stage):
    hospital.draw(patients=PATIENTS, labs=LABS, diagnoses=DIAGNOSES)
    pressure = {"codes": ["sbp", "sbp*", {"range": ["s", "t"]}], "aggregates": ["count"]}
    found = stage(hospital.config(features__measurements={"pressure": pressure})).features()
    assert found["pressure.count"].tolist()[:2] == [1, 1]
    assert found["pressure.count"].sum() == 2


def test_a_file_holds_entries_and_comments(holders, hospital):
    (hospital.folder / "sets").mkdir()
    file = hospital.folder / "sets" / "dm.txt"
    file.write_text("# diabetes\nE11  # exactly\n\nE13*\n", encoding="utf-8-sig")
    assert holders({"file": "sets/dm.txt"}) == ["E11", "E13.65"]


def test_descendants_are_found_in_the_table_of_concepts(holders, hospital):
    hospital.draw(
        concept_ancestor="""
        ancestor_concept_id  descendant_concept_id
        7                    7
        7                    8.0
        7                    4019
        9                    8
        """
    )
    hospital.draw(diagnoses=DIAGNOSES.replace("E14", "8"))
    tables = {
        name: {"path": f"{name}.csv"}
        for name in ("patients", "labs", "diagnoses", "concept_ancestor")
    }
    held = ["E14", "4019"]  # E14 stands for 8, which took its place
    assert holders({"descendants_of": 7}, tables=tables) == held
    assert holders({"descendants_of": 8}, tables=tables) == ["E14"]
    with pytest.raises(DataError, match=r"features\.history\.set: holds a code of labels\.ill"):
        holders(
            {"descendants_of": 7},
            tables=tables,
            labels={"ill": {"codes": [{"descendants_of": 9}], "prevalent": True}},
        )
    with pytest.raises(ConfigError, match="descendants_of needs OMOP's concept_ancestor"):
        holders({"descendants_of": 7})


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("*", "'*' alone is every code"),
        (1.5, "put the code in quotes"),
        ({"range": ["I25", "I20"]}, "compared as text, 'I25' comes after 'I20'"),
        ({"range": [9, 10]}, "compared as text, '9' comes after '10'"),
        ({"range": ["I20*", "I25"]}, "leave \\* out"),
        ({"range": ["I20"]}, "give the first and the last prefix"),
        ({"range": ["", "I20"]}, "its ends are prefixes"),
        ({"rnage": ["I20", "I25"]}, "did you mean 'range'"),
        ({"file": "dn.txt"}, "cannot read .*dn.txt as UTF-8 text; did you mean 'dm.txt'"),
        ({"file": "empty.txt"}, "names no code"),
        ({}, "give a code, or one of: range, file, descendants_of"),
        ({"range": ["A", "B"], "file": "x"}, "give a code, or one of"),
    ],
)
def test_what_is_no_entry_is_refused_with_its_line(hospital, entry, said):
    (hospital.folder / "dm.txt").write_text("E11")
    (hospital.folder / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ConfigError, match=rf"hospital.yaml:\d+: features.history.set.1: .*{said}"):
        hospital.config(features__history={"set": ["E11", entry]})


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("E11", "E11", True),
        ("E11", "E11.9", False),
        ("E11*", "E11.9", True),
        ("E11*", "E11.9*", True),
        ("E11*", "E1", False),
        ("E1", CodeRange(("E0", "E1")), True),
        ("E19", CodeRange(("E0", "E1")), True),
        ("E2*", CodeRange(("E0", "E1")), False),
        ("E*", CodeRange(("E0", "E1")), True),
        ("D*", CodeRange(("E0", "E1")), False),
        (CodeRange(("E10", "E14")), CodeRange(("E14.2", "E20")), True),
        (CodeRange(("E10", "E13")), CodeRange(("E14", "E20")), False),
    ],
)
def test_whether_two_entries_share_a_code_is_told_by_their_text(one, other, shared):
    assert share_a_code((one,), ("X", other)) is shared
    assert share_a_code((other,), (one,)) is shared


def test_a_range_that_is_one_prefix_is_that_prefix():
    (in_range,), (prefix,) = patterns(read_entry({"range": ["E1", "E1"]}, None)), patterns("E1*")
    assert (in_range.low, in_range.high, in_range.exact) == (prefix.low, prefix.high, prefix.exact)


@pytest.mark.parametrize("entry", ["E11*", {"range": ["E10", "E14"]}, {"file": "dm.txt"}])
@pytest.mark.parametrize("feature", ["history.known", "measurements.known"])
def test_a_feature_that_overlaps_a_prevalent_label_is_refused(hospital, entry, feature):
    (hospital.folder / "dm.txt").write_text("E11.*\n")
    codes = ["E11.9"] if feature.startswith("history") else {"codes": ["E11.9"]}
    changes = {
        "labels.diabetes": {"codes": [entry], "prevalent": True},
        f"features.{feature}": codes,
    }
    with pytest.raises(ConfigError, match=f"features.{feature}: holds a code of labels.diabetes"):
        hospital.config(**changes)


@pytest.fixture
def coded(busy):
    """Findings of the busy hospital about codes."""

    def find(kind, **changes):
        found = check(busy.config(**changes))["findings"]
        return [(f["where"], f["message"]) for f in found if f["check"] == kind]

    return find


def test_an_entry_that_holds_nothing_is_a_finding(coded, busy):
    (busy.folder / "some.txt").write_text("F17\nF18\nF19*\n")
    history = {"a": ["X*", {"range": ["E2", "E9"]}], "b": ["F1*"], "c": [{"file": "some.txt"}]}
    assert coded("absent code", features__history=history) == [
        ("features.history.a", "no code in the events is of 'X*'"),
        ("features.history.a", "no code in the events is of E2 to E9"),
        ("features.history.c", "2 of the 3 entries of some.txt occur in no event"),
    ]


def test_a_code_that_a_pattern_holds_is_used(coded):
    assert coded("unused code", features__history={"smoker": ["F*"]}) == []
    assert coded("unused code", features__history={"smoker": [{"range": ["F1", "F2"]}]}) == []
    ((where, said),) = coded("unused code", features__history={"smoker": ["F18*"]})
    assert (where, said.split(",")[0]) == (
        "diagnoses",
        "1 codes in events that no feature or label uses",
    )


def test_the_manifest_lists_entries_as_written_and_a_changed_file_is_another_store(busy):
    (busy.folder / "smoke.txt").write_text("F17\n")
    entries = ["F18", "G*", {"range": ["F10", "F19"]}, {"file": "smoke.txt"}]
    config = busy.config(features__history={"smoker": entries})
    store = Store(ingest(config))
    assert store.manifest["features"][-1]["codes"] == entries
    (busy.folder / "smoke.txt").write_text("# tobacco\nF17\n")
    assert ingest(busy.config(features__history={"smoker": entries})) == store.path
    (busy.folder / "smoke.txt").write_text("F16\n")
    assert ingest(busy.config(features__history={"smoker": entries})) != store.path


def test_a_prefix_serves_labels_as_well(busy):
    diagnoses = pd.read_csv(busy.folder / "diagnoses.csv")
    finer = diagnoses.assign(icd=diagnoses["icd"] + [f".{i % 3}" for i in range(len(diagnoses))])
    exact = check(busy.config())["labels"]
    busy.write(diagnoses=finer)
    assert check(busy.config(labels__diabetes__codes=["E11.*"]))["labels"] == exact
