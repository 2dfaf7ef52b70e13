"""A value counts in its measurement's unit or not at all, and every row is accounted for."""

import numpy as np
import pandas as pd
import pytest

from ehr_sn.errors import DataError
from ehr_sn.ingest.store import Store, check, ingest

PATIENTS = "id index end age \n" + "\n".join(f"{i} 100 1000 50" for i in range(1, 12))
DIAGNOSES = "id day icd \n 1 150 E11"
LABS = """
id  day  test  x     u
1   50   GLU   99    mg/dL
2   50   GLU   5.5   mmol/L
3   50   GLU   5.5   MMOL/l
4   50   GLU   5.5   g/L
5   50   GLU   5.5   .
6   50   GLU   high  mmol/L
7   50   GLU   60    mmol/L
8   50   T     98.6  degF
9   50   T     37    Cel
10  50   Na    140   mmol/L
11  50   Na    141   .
"""
EVENTS = [
    {
        "table": "labs",
        "subject_id": "id",
        "time": "day",
        "code": "test",
        "numeric_value": "x",
        "unit": "u",
    },
    {"table": "diagnoses", "subject_id": "id", "time": "day", "code": "icd"},
]
GLUCOSE = {
    "codes": ["GLU*"],
    "unit": "mg/dL",
    "units": {"mmol/L": 18.016},
    "plausible": [10, 1000],
}
TEMPERATURE = {
    "codes": ["T"],
    "unit": "Cel",
    "units": {"degF": {"factor": 5 / 9, "offset": -160 / 9}},
}


@pytest.fixture
def staged(hospital, stage):
    """The last value of each patient, and the quarantine, by measurements."""
    hospital.draw(patients=PATIENTS, labs=LABS, diagnoses=DIAGNOSES)

    def values(events=EVENTS, **measurements):
        changes = {"features__measurements": measurements, "features__aggregates": ["last"]}
        found = stage(hospital.config(events=events, **changes))
        return found.features().filter(like=".last"), found.quarantine()

    return values


def test_a_value_is_converted_from_its_unit_or_made_missing(staged):
    features, aside = staged(glucose=GLUCOSE, temperature=TEMPERATURE, sodium={"codes": ["Na"]})
    glucose = features["glucose.last"].loc[[1, 2, 3]].tolist()
    assert glucose == pytest.approx([99, 99.088, 99.088])
    assert features["glucose.last"].count() == 3
    assert features["temperature.last"].loc[[8, 9]].tolist() == pytest.approx([37, 37])
    assert features["sodium.last"].loc[[10, 11]].tolist() == [140, 141]  # looks at no unit
    assert aside == [
        ("labs", 4, "glucose: the unit is not declared"),
        ("labs", 5, "glucose: no unit is given"),
        ("labs", 6, "x: not a number"),
        ("labs", 7, "glucose: outside the plausible range 10 to 1000"),  # after conversion
    ]


def test_both_micro_signs_are_one_unit(staged, hospital):
    labs = "id day test x u\n1 50 GLU 5 \u00b5mol/L\n2 50 GLU 6 \u03bcmol/L\n3 50 GLU 7 \u00b5g/L"
    hospital.draw(labs=labs)
    for own, other in (("\u00b5mol/L", "\u03bcg/L"), ("\u03bcmol/L", "\u00b5g/L")):
        features, aside = staged(glucose={"codes": ["GLU"], "unit": own, "units": {other: 2}})
        assert features["glucose.last"].loc[[1, 2, 3]].tolist() == [5, 6, 14]
        assert aside == []


def test_a_value_without_a_unit_counts_where_that_is_declared(staged):
    units = {"mmol/L": 18.016, "": 18.016}
    features, aside = staged(glucose=GLUCOSE | {"units": units})
    assert features["glucose.last"].loc[5] == pytest.approx(99.088)
    assert 5 not in [row for _, row, _ in aside]
    bare = [{key: value for key, value in EVENTS[0].items() if key != "unit"}]
    bare[0]["numeric_value"] = "x"
    both = [*EVENTS, bare[0] | {"table": "labs", "code": "u"}]  # a source without units
    features, aside = staged(both, odd=GLUCOSE | {"codes": ["g/L"]})
    assert ("labs", 4, "odd: no unit is given") in aside


def test_letters_case_counts_only_where_it_must(staged, hospital):
    hospital.draw(labs=LABS.replace("MMOL/l", "Mmol/L").replace("g/L ", "mMOL/L "))
    units = {"mmol/L": 1, "Mmol/L": 1e9}
    features, aside = staged(glucose={"codes": ["GLU"], "unit": "mmol/L", "units": units})
    assert features["glucose.last"].loc[[2, 3]].tolist() == pytest.approx([5.5, 5.5e9])
    assert ("labs", 4, "glucose: the unit is not declared") in aside


def test_one_code_cannot_have_two_units(staged):
    with pytest.raises(DataError, match=r"features\.measurements\.b: holds a code of .*\.a, which"):
        staged(a=GLUCOSE, b={"codes": ["GLU"]})
    features, _ = staged(a=GLUCOSE, b=GLUCOSE | {"codes": ["GLU"]})
    assert features["a.last"].equals(features["b.last"])


def test_an_absurd_product_is_no_value(staged):
    units = {"mmol/L": 1e18}
    _, aside = staged(glucose={"codes": ["GLU"], "unit": "mg/dL", "units": units})
    assert ("labs", 2, "glucose: beyond 1e+18") in aside


# -- where ---------------------------------------------------------------------------------------


def test_rows_for_which_a_condition_is_not_true_are_left_out_unseen(hospital, stage):
    hospital.draw(
        patients=PATIENTS,
        diagnoses=DIAGNOSES,
        labs="""
        id  day  test  x    error
        1   50   sbp   120  .
        1   51   sbp   500  rejected
        9   bad  .     1    rejected
        2   50   sbp   130  0
        """,
    )
    found = stage(hospital.config(events__0__where="error IS NULL or labs.error == 0"))
    assert found.quarantine() == []
    assert found.rows("SELECT subject_id FROM events WHERE source = 'labs' ORDER BY 1") == [
        (1,),
        (2,),
    ]
    assert found.rows("SELECT place, rows, of_rows FROM notices WHERE rows > 0") == [("labs", 2, 4)]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("eror IS NULL", r"events\.0\.where: table labs has no column 'eror'"),
        ("labs.eror > 1", r"events\.0\.where: table labs has no column 'eror'"),
        ("test == 'X'", r"events\.0: no row of table labs is usable \(.*where"),
    ],
)
def test_a_condition_that_cannot_be_meant_is_refused(busy, where, said):
    with pytest.raises(DataError, match=said):
        check(busy.config(events__0__where=where))


def test_every_row_is_kept_set_aside_or_left_out(busy):
    rng = np.random.default_rng(0)
    labs = pd.read_csv(busy.folder / "labs.csv", dtype=str)
    labs["u"] = rng.choice(["mmHg", "kPa", "cm", ""], len(labs))
    labs["error"] = rng.choice(["", "void", "odd"], len(labs))
    labs = pd.concat([labs, labs.sample(50, random_state=1)], ignore_index=True)
    for key in ("id", "day", "test", "x"):
        spoilt = rng.random(len(labs)) < 0.05
        labs.loc[spoilt, key] = rng.choice(["", "odd", "-1e40"], spoilt.sum())
    busy.write(labs=labs)
    sbp = {"unit": "mmHg", "units": {"kPa": 7.5}}
    config = busy.config(
        events__0__where="error IS NULL",
        events__0__unit="u",
        features__measurements={"sbp": sbp, "hdl": {}},
        cohort__eligibility={"without": {"none": ["X*"]}},
    )
    store = Store(ingest(config))
    rows, manifest = store.manifest["event_rows"], store.manifest
    for table, kept in manifest["events"].items():
        assert rows[table]["read"] == manifest["tables"][table]["rows"]
        assert rows[table]["kept"] == kept
        aside = [
            q["count"]
            for q in manifest["quarantined"]
            if (q["table"], q["action"]) == (table, "row set aside")
        ]
        assert rows[table]["set_aside"] == sum(aside)
        assert rows[table]["read"] == kept + sum(aside) + rows[table]["left_out"]
    assert rows["labs"]["left_out"] == (labs["error"] != "").sum()
    assert rows["diagnoses"]["left_out"] == 0
    quarantine = pd.read_parquet(store.path / "quarantine.parquet")
    told = quarantine["reason"].value_counts()
    assert told["sbp: the unit is not declared"] > 20 < told["sbp: no unit is given"]
