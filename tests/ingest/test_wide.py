"""Wide tables: joined on the subject, read by conditions, with codes and categories by column."""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ehr_sn.cli import main
from ehr_sn.config import load_config
from ehr_sn.errors import ConfigError, DataError
from ehr_sn.ingest.store import Store, check, ingest
from ehr_sn.ingest.tables import connect, load_tables
from ehr_sn.ingest.wide import stage_cohort

NAN = np.nan
SURVEY = {
    "dataset": "survey",
    "tables": {
        "people": {"path": "people.csv"},
        "exam": {"path": "exam.csv"},
        "asked": {"path": "asked.csv"},
    },
    "cohort": {
        "table": "people",
        "subject_id": "id",
        "join": ["exam", "asked"],
        "where": "age >= 20",
    },
    "features": {
        "static": {"age": {"column": "age", "plausible": [0, 120]}},
        "columns": {"exam": ["weight", "height"]},
    },
    "labels": {"diabetes": {"positive": "told == 1", "negative": "told == 2"}},
}
PEOPLE = """
id  age  sex  race
1   50   F    1
2   19   M    2
3   20   M    3
4   .    F    1
5   70   F    9
"""
EXAM = """
id  weight  height  bp1  bp2
1   80      170     120  110
3   .       160     0    90
5   77      abc     .    .
2   60      150     100  100
"""
ASKED = """
id  told  smokes
1   1     2
3   2     7
5   9     1
"""


@pytest.fixture
def survey(hospital):
    hospital.content = SURVEY
    hospital.draw(people=PEOPLE, exam=EXAM, asked=ASKED)
    return hospital


@pytest.fixture
def features(survey, stage):
    """Stage with changes: gives the features as a list by subject."""

    def staged(**changes):
        found = stage(survey.config(**changes)).features()
        return {
            subject: [None if np.isnan(v) else v for v in row.tolist()]
            for subject, row in zip(found.index, found.to_numpy(), strict=True)
        }

    return staged


# -- who -----------------------------------------------------------------------------------------


def test_columns_of_joined_tables_are_features_of_the_eligible(features):
    assert features() == {1: [50, 80, 170], 3: [20, None, 160], 5: [70, 77, None]}


def test_who_left_at_the_condition_is_counted(survey):
    with connect() as db:
        config = survey.config()
        load_tables(db, config)
        counts = ("rows", "subjects", "excluded", "unknown")
        left = {step["rule"]: tuple(map(step.get, counts)) for step in stage_cohort(db, config)}
        assert left == {"read": (5, 5, 0, 0), "usable": (5, 5, 0, 0), "where": (3, 3, 1, 1)}


def test_without_a_condition_all_are_eligible(features):
    assert set(features(cohort__where=None)) == {1, 2, 3, 4, 5}


def test_a_condition_that_nobody_fulfils_is_refused(survey, stage):
    said = r"cohort\.where: true for none of the 5 rows \(unknown for 1\)"
    with pytest.raises(DataError, match=said):
        stage(survey.config(cohort__where="age > 100"))


def test_everyone_s_prediction_time_is_the_clock_s_origin_by_default(survey, stage):
    staged = stage(survey.config())
    times = staged.rows("SELECT DISTINCT prediction_time::VARCHAR FROM cohort")
    assert times == [("2000-01-01 00:00:00",)]
    staged = stage(survey.config(clock={"unit": "days", "origin": "2013-06-01"}))
    times = staged.rows("SELECT DISTINCT prediction_time::VARCHAR FROM cohort")
    assert times == [("2013-06-01 00:00:00",)]


def test_repeated_rows_of_a_joined_table_are_quarantined_and_contradictions_set_aside(
    survey, stage
):
    exam = "id weight height \n 1 80 170 \n 1 80.0 170 \n 3 70 160 \n 3 71 160 \n 5 60 150"
    survey.draw(exam=exam)
    staged = stage(survey.config())
    assert staged.features()["weight"].tolist() == pytest.approx([80, NAN, 60], nan_ok=True)
    assert staged.quarantine() == [
        ("exam", 2, "repeats an earlier row"),
        ("exam", 3, "subject appears again, with other values"),
        ("exam", 4, "subject appears again, with other values"),
    ]


def test_rows_of_nobody_are_quarantined_but_those_of_the_not_eligible_are_not(survey, stage):
    survey.draw(exam="id weight height \n 2 60 150 \n 8 70 160 \n . 50 150 \n x 1 1 \n 1 80 170")
    assert stage(survey.config()).quarantine() == [
        ("exam", 2, "subject is not in the cohort"),
        ("exam", 3, "no subject_id"),
        ("exam", 4, "subject is not in the cohort"),
    ]


def test_a_joined_table_of_which_nothing_fits_is_refused(survey, stage):
    survey.draw(exam="id weight height \n 81 60 150 \n 82 70 160")
    with pytest.raises(DataError, match=r"cohort\.join\.0: no row of table exam is usable"):
        stage(survey.config())


def test_bad_values_are_quarantined_in_their_own_table_and_only_of_the_eligible(survey, stage):
    survey.draw(exam="id weight height \n 2 odd 150 \n 1 odd 170 \n 3 1e30 160 \n 5 60 150")
    assert stage(survey.config()).quarantine() == [
        ("exam", 2, "weight: not a number"),
        ("exam", 3, "weight: not finite, or beyond 1e+18"),
    ]


def test_a_joined_row_serves_each_prediction_time_and_is_quarantined_once(survey, stage):
    survey.draw(
        people="id age day \n 1 50 2020-01-01 \n 1 51 2021-01-01 \n 3 30 2020-01-01",
        exam="id weight height \n 1 odd 170 \n 3 60 160",
        asked="id told \n 1 1 \n 3 2",
    )
    staged = stage(survey.config(cohort__prediction_time="day"))
    assert staged.features()["height"].tolist() == [170, 170, 160]
    assert staged.quarantine() == [("exam", 1, "weight: not a number")]


@pytest.mark.parametrize("dtype", ["int64", "float64", "float32"])
def test_subjects_are_the_same_whether_a_table_holds_them_as_whole_numbers_or_not(
    survey, stage, dtype
):
    exam = pd.DataFrame({"id": np.array([1, 3, 5], dtype), "weight": [1, 2, 3], "height": 7})
    survey.write(".parquet", exam=exam)
    staged = stage(survey.config(tables__exam__path="exam.parquet"))
    assert staged.features()["weight"].to_dict() == {1: 1, 3: 2, 5: 3}


# -- names ---------------------------------------------------------------------------------------


def test_a_column_of_two_tables_must_be_named_with_its_table(survey, stage):
    survey.draw(asked="id told weight \n 1 1 999 \n 3 2 999 \n 5 9 999")
    with pytest.raises(DataError) as error:
        stage(survey.config(features__static={"w": {"column": "weight"}}, features__columns={}))
    assert str(error.value).endswith(
        "features.static.w.column: 2 tables have a column 'weight': write exam.weight or "
        "asked.weight"
    )
    staged = stage(
        survey.config(
            features={"static": {"w": {"column": "asked.weight"}}, "columns": {"exam": ["weight"]}},
            cohort__where="exam.weight is not missing and asked.weight == 999",
        )
    )
    assert staged.features().loc[1].tolist() == [999, 80]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"cohort__where": "agee >= 20"},
            "cohort.where: none of the cohort's tables has a column 'agee'; did you mean 'age'?",
        ),
        (
            {"labels__diabetes__positive": "asked.toldd == 1"},
            "labels.diabetes.positive: table asked has no column 'toldd'; did you mean 'told'?",
        ),
        (
            {"features__columns__exam": ["weight", "heigth"]},
            "features.columns.exam.1: table exam has no column 'heigth'; did you mean 'height'?",
        ),
        (
            {"cohort__join": ["asked"]},
            "features.columns.exam.0: table exam is none of the cohort's: add it to cohort.join",
        ),
    ],
)
def test_a_wrong_name_is_told_with_its_line_and_the_nearest_valid_one(survey, stage, changes, said):
    with pytest.raises(DataError) as error:
        stage(survey.config(**changes))
    first = str(error.value).splitlines()[0]
    assert said in first
    assert "hospital.yaml:" in first


def test_a_wrong_table_is_told_when_the_configuration_is_read(survey):
    with pytest.raises(ConfigError, match=r"cohort\.join\.0: no table 'exams'; did you mean 'exam"):
        survey.config(cohort__join=["exams"])
    with pytest.raises(ConfigError, match=r"features\.columns\.exan: no table 'exan'"):
        survey.config(features__columns={"exan": ["weight"]})


def test_names_of_listed_columns_are_names_of_features(survey):
    with pytest.raises(ConfigError, match=r"features\.columns\.weight: the name is taken"):
        survey.config(features__static__weight={"column": "age"})
    with pytest.raises(ConfigError, match="the name is taken"):
        survey.config(features__columns={"exam": ["weight"], "asked": ["Weight"]})


# -- features ------------------------------------------------------------------------------------


def test_missing_codes_are_missing_and_counted_by_column_not_by_row(survey, stage):
    survey.draw(asked="id told smokes \n 1 1 2 \n 2 1 9 \n 3 2 7 \n 5 9 9")
    smokes = {"column": "smokes", "missing_codes": [7, 9]}
    staged = stage(survey.config(features__static={"smokes": smokes}))
    assert staged.features()["smokes"].tolist() == pytest.approx([2, NAN, NAN], nan_ok=True)
    assert staged.rows(
        "SELECT check_name, place, rows, of_rows, message FROM notices WHERE rows > 0"
    ) == [("missing code", "smokes", 2, 3, "asked.smokes: 7, 9 made missing")]
    assert ("asked", 3) not in [entry[:2] for entry in staged.quarantine()]


def test_a_missing_code_may_be_text_or_lie_outside_the_plausible_range(survey, stage):
    survey.draw(exam="id weight height \n 1 n/a 170 \n 3 0 160 \n 5 60 150")
    weight = {"column": "weight", "missing_codes": ["n/a", 0], "plausible": [20, 300]}
    staged = stage(survey.config(features={"static": {"w": weight}}))
    assert staged.features()["w"].tolist() == pytest.approx([NAN, NAN, 60], nan_ok=True)
    assert staged.quarantine() == []


def test_of_several_columns_the_mean_of_what_is_there_is_taken(features):
    bp = {"column": ["bp1", "bp2"], "missing_codes": [0], "plausible": [50, 300]}
    assert features(features={"static": {"bp": bp}}) == {1: [115], 3: [90], 5: [None]}


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        ([1, 3], {1: [1, 0], 3: [0, 1], 5: [None, None]}),
        (["1", "3"], {1: [1, 0], 3: [0, 1], 5: [None, None]}),
        ([3, 1, 9], {1: [0, 1, 0], 3: [1, 0, 0], 5: [0, 0, 1]}),
    ],
)
def test_categories_become_a_feature_each_and_an_unseen_one_is_missing_in_all(
    features, categories, expected
):
    race = {"column": "race", "categories": categories}
    assert features(features={"static": {"race": race}}) == expected


def test_the_features_of_categories_are_named_by_them(survey, stage):
    statics = {
        "race": {"column": "race", "categories": [3, 1.5, 1]},
        "sex": {"column": "sex", "categories": ["F", "M"]},
    }
    found = stage(survey.config(features={"static": statics})).features()
    assert list(found) == ["race=3", "race=1.5", "race=1", "sex=F", "sex=M"]
    assert found["sex=F"].tolist() == [1, 0, 1]


def test_ordinal_categories_become_their_place_in_the_list(features):
    statics = {
        "sex": {"column": "sex", "categories": ["M", "F"], "ordinal": True},
        "race": {"column": "race", "categories": [3, 2, 1], "ordinal": True},
    }
    assert features(features={"static": statics}) == {1: [1, 2], 3: [0, 0], 5: [1, None]}


def test_unseen_categories_are_counted(survey, stage):
    staged = stage(
        survey.config(features__static={"race": {"column": "race", "categories": [1, 2, 3]}})
    )
    assert staged.rows("SELECT check_name, place, rows, of_rows FROM notices WHERE rows > 0") == [
        ("unseen category", "race", 1, 3)
    ]


def test_categories_that_no_row_holds_are_refused(survey, stage):
    sex = {"column": "sex", "categories": [1, 2]}
    with pytest.raises(DataError, match=r"features\.static\.sex: .* none of the categories"):
        stage(survey.config(features={"static": {"sex": sex}}))


@pytest.mark.parametrize(
    ("feature", "said"),
    [
        ({"column": "race", "ordinal": True}, "needs `categories`"),
        ({"column": ["race", "sex"], "categories": [1]}, "of one column"),
        ({"column": "race", "categories": [1], "plausible": [0, 3]}, "leave `plausible` out"),
        ({"column": "race", "categories": [1, 7], "missing_codes": [7]}, "missing code cannot"),
        ({"column": "sex", "categories": ["m", "M"]}, "differ in more than upper and lower"),
        ({"column": "sex", "categories": [True]}, "quotes"),
        ({"column": "sex", "categories": []}, "name at least one"),
        ({"column": []}, "name at least one"),
        ({"column": "race", "missing_code": [7]}, "did you mean 'missing_codes'?"),
    ],
)
def test_a_feature_that_cannot_be_meant_is_refused(survey, feature, said):
    with pytest.raises(ConfigError) as error:
        survey.config(features__static={"f": feature})
    assert "features.static.f" in str(error.value)
    assert said in str(error.value)


# -- labels --------------------------------------------------------------------------------------


def test_a_label_is_positive_negative_or_unknown(survey, stage):
    staged = stage(survey.config())
    assert staged.labels() == {1: 1, 3: 0, 5: None}
    assert staged.attrition["diabetes"] == {"rows": 3, "unknown": 1, "eligible": 2, "positive": 1}


def test_positive_wins_and_what_is_missing_is_unknown(survey, stage):
    survey.draw(
        people="id age \n 1 50 \n 2 50 \n 3 50 \n 4 50 \n 5 50",
        asked="id mi stroke \n 1 2 1 \n 2 2 2 \n 3 . 2 \n 4 . 9 \n 5 1 .",
    )
    either = {"positive": "mi == 1 or stroke == 1", "negative": "mi == 2 or stroke == 2"}
    staged = stage(survey.config(labels__diabetes=either))
    assert staged.labels() == {1: 1, 2: 0, 3: 0, 4: None, 5: 1}


def test_labels_of_conditions_and_of_codes_go_together(hospital, stage):
    hospital.draw(
        patients="id index end age dead \n 1 100 1000 50 1 \n 2 100 1000 60 0",
        labs="id day test x \n 1 50 sbp 120",
        diagnoses="id day icd \n 2 150 E11",
    )
    dead = {"positive": "dead == 1", "negative": "dead == 0"}
    staged = stage(hospital.config(labels__dead=dead))
    assert staged.labels("dead") == {1: 1, 2: 0}
    assert staged.labels("diabetes") == {1: 0, 2: 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"features__columns": {"asked": ["told"]}},
            "features.columns.asked.0: the column asked.told is read by labels.diabetes",
        ),
        (
            {"features__static__t": {"column": ["age", "asked.told"]}},
            "features.static.t: the column asked.told is read by labels.diabetes",
        ),
        (
            {"features__columns": {"asked": ["smokes"]}, "labels__diabetes__keep_out": ["asked"]},
            "features.columns.asked.0: the column asked.smokes is kept out by labels.diabetes",
        ),
        (
            {"labels__diabetes__keep_out": ["weight"]},
            "features.columns.exam.0: the column exam.weight is kept out by labels.diabetes",
        ),
        (
            {"labels__diabetes__keep_out": ["exams"]},
            "labels.diabetes.keep_out.0: none of the cohort's tables has a column 'exams'",
        ),
        (
            {"features__static__t": {"column": "id"}},
            "features.static.t: the column people.id names the subject",
        ),
    ],
)
def test_a_feature_that_would_give_a_label_away_is_refused(survey, stage, changes, said):
    with pytest.raises(DataError) as error:
        stage(survey.config(**changes))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels__diabetes": {"positive": "told == 1"}}, "give both of: positive, negative"),
        ({"labels__diabetes": {}}, "give either codes, or positive and negative"),
        ({"labels__diabetes__codes": ["E11"]}, "give either codes, or positive and negative"),
        ({"labels__diabetes__prevalent": True}, "go with codes"),
        ({"labels__diabetes__positive": "told = 1"}, "write == for 'equals'"),
        ({"cohort__join": ["people", "exam"]}, "names cohort.table"),
        ({"cohort__join": ["exam", "exam"]}, "only once"),
        ({"cohort__where": "age"}, "age alone is no condition"),
        ({"labels__diabetes": {"codes": ["E11"], "prevalent": True}}, "looked up in `events`"),
        ({"features__measurements": {"sbp": {}}}, "looked up in `events`"),
        ({"features__history": {"s": ["F17"]}}, "looked up in `events`"),
        (
            {"events": [{"table": "exam", "subject_id": "id", "time": "t", "code": "c"}]},
            "cohort.prediction_time: is required",
        ),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(survey, changes, said):
    with pytest.raises(ConfigError) as error:
        survey.config(**changes)
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_tables_may_have_the_names_of_steps(survey, stage):
    names = {"people": "judged_cohort", "exam": "cohort", "asked": "joined"}
    staged = stage(
        survey.config(
            tables={new: {"path": f"{old}.csv"} for old, new in names.items()},
            cohort={"table": "judged_cohort", "subject_id": "id", "join": ["cohort", "joined"]},
            features__columns={"cohort": ["weight"]},
        )
    )
    assert staged.features().loc[1].tolist() == [50, 80]


def test_no_value_of_a_patient_is_in_any_message(survey, stage):
    survey.draw(exam="id weight height \n 1 SECRET SECRET \n 3 SECRET 150 \n 5 SECRET 1")
    with pytest.raises(DataError) as error:
        stage(survey.config())
    assert "holds text in all of its 3 filled rows" in str(error.value)
    assert "SECRET" not in str(error.value)


# -- stores --------------------------------------------------------------------------------------


@pytest.fixture
def crowd(hospital):
    """A survey of 400, of whom a fifth are under 20."""
    rng = np.random.default_rng(0)
    ids = np.arange(1, 401)
    weight = rng.normal(80, 9, 200)
    hospital.content = SURVEY
    hospital.write(
        people=pd.DataFrame({"id": ids, "age": np.where(ids % 5, 40, 10)}),
        exam=pd.DataFrame({"id": ids[::2], "weight": weight, "height": 170 + ids[::2]}),
        asked=pd.DataFrame({"id": ids, "told": rng.choice([1, 2, 9], 400)}),
    )
    return hospital


def test_a_store_without_events_has_the_same_format(crowd):
    config = crowd.config()
    store = Store(ingest(config))
    assert store.values().shape == (320, 3)
    assert store.feature_names == ["age", "weight", "height"]
    assert store.manifest["cohort"][-1]["rows"] == 320
    assert store.manifest["events"] == {}
    assert store.manifest["features"][1]["columns"] == ["exam.weight"]
    assert [f["observed_rate"] for f in store.manifest["features"]] == [1, 0.5, 0.5]
    assert check(config)["rows"] == 320
    assert ("constant feature", "age") in {
        (f["check"], f["where"]) for f in store.manifest["findings"]
    }


def test_a_large_table_is_read_in_blocks(crowd, stage):
    staged = stage(crowd.config())
    pd.testing.assert_frame_equal(staged.features(), staged.features(block_rows=7))


def test_the_data_may_lie_elsewhere(crowd, monkeypatch, tmp_path):
    there = ingest(crowd.config())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for table in ("people", "exam", "asked"):
        (crowd.folder / f"{table}.csv").rename(elsewhere / f"{table}.csv")
    with pytest.raises(DataError, match="no file"):
        ingest(crowd.config(splits__seed=1))
    assert ingest(crowd.config(data_root="elsewhere")) == there
    monkeypatch.setenv("EHR_SN_DATA_ROOT", str(elsewhere))
    assert ingest(crowd.config(data_root="nowhere")) == there


def test_the_command_line_says_where_the_data_lie_and_who_is_eligible(crowd, monkeypatch, capsys):
    crowd.config(data_root="nowhere")
    command = f"ehr-sn check {crowd.folder}/hospital.yaml --data {crowd.folder}"
    monkeypatch.setenv("EHR_SN_DATA_ROOT", "to be restored")
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["where", "80", "0", "320", "320"] in said


def test_a_joined_file_without_a_header_is_not_quoted(survey, stage):
    (survey.folder / "exam.csv").write_text("1,SECRET1,SECRET2\n3,SECRET3,SECRET4\n")
    with pytest.raises(DataError) as error:
        stage(survey.config(features__static={"w": {"column": "SECRETO"}}))
    assert "Does its first line name the columns?" in str(error.value)
    assert "SECRET" not in str(error.value).replace("SECRETO", "")


# -- the documentation's example -----------------------------------------------------------------


def test_the_worked_example_works(tmp_path):
    """The YAML of docs/data-wide.md, on tables such as it describes."""
    pyreadstat = pytest.importorskip("pyreadstat", reason="the package pyreadstat is not installed")
    page = (Path(__file__).parents[2] / "docs" / "data-wide.md").read_text()
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "checkup.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    data = tmp_path / "data" / "checkup"
    rng = np.random.default_rng(0)
    ids = np.arange(1, 301)
    for year, half in (("2021", ids[:150]), ("2022", ids[150:])):
        (data / year).mkdir(parents=True)
        blood = pd.DataFrame({"id": half, "hb": 14.0, "creat": 1.0, "albumin": 4.0})
        if year == "2021":
            pyreadstat.write_xport(blood, str(data / year / "blood.xpt"), file_format_version=5)
        else:
            blood.drop(columns="albumin").to_parquet(data / year / "blood.parquet")
    people = pd.DataFrame(
        {
            "id": ids,
            "age": 20.5,
            "pregnant": 2,
            "sex": rng.choice(["F", "M", "ä"], 300),
            "region": rng.choice([1, 2, 3, 4, 5], 300),
            **{f"sbp{i}": 120 + i for i in (1, 2, 3)},
        }
    )
    people.to_csv(data / "people.csv", sep=";", decimal=",", encoding="cp1252", index=False)
    asked = {"id": ids, "sleep": 77, "told_diabetes": ids % 3, "insulin": 1, "diet_for_diabetes": 1}
    pd.DataFrame(asked).to_csv(data / "asked.tsv.gz", sep="\t", index=False)
    report = check(load_config(path))
    observed = {feature["name"]: feature["observed_rate"] for feature in report["features"]}
    assert list(observed) == [
        *("age", "sleep", "systolic", "sex", "region=1", "region=2", "region=3", "region=4"),
        *("hb", "creat", "albumin"),
    ]
    assert observed["age"] == observed["systolic"] == observed["hb"] == 1
    assert observed["sleep"] == 0
    assert observed["albumin"] == 0.5
    assert report["labels"]["diabetes"] == {
        "rows": 300,
        "unknown": 100,
        "eligible": 200,
        "positive": 100,
    }


def test_tables_of_very_many_columns_are_staged_alike(features, monkeypatch):
    """DuckDB 2.0.0 then plans without two optimisers (findings/duckdb_plans_of_many_columns.sh)."""
    plain = features()
    monkeypatch.setattr("ehr_sn.ingest.wide.MANY_COLUMNS", 0)
    assert features() == plain
