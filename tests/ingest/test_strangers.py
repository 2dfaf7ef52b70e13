"""What a stranger's table leaves open is settled by a key of the configuration, or refused."""

import pandas as pd
import pytest

from ehr_sn.errors import ConfigError, DataError
from ehr_sn.ingest.checks import common_codes, count_codes
from ehr_sn.ingest.requirements import Requirement
from ehr_sn.ingest.store import Store, check, ingest

NOON = "2020-01-01 12:00"


def noticed(staged, name):
    """Place, rows and message of what a check notices."""
    found = staged.rows("SELECT check_name, place, rows, message FROM notices WHERE rows > 0")
    return [
        (place, rows, message) for check_name, place, rows, message in found if check_name == name
    ]


# -- one thing under several codes -----------------------------------------------------------------


@pytest.fixture
def coded(hospital, stage):
    """A function: laboratory values with a row id → how they are staged."""
    hospital.draw(
        patients="id index end age\n1 500 1000 50\n2 500 1000 60", diagnoses="id day icd\n1 600 E11"
    )
    hospital.draw(
        labs="""
            id day test  x   key
            1  50  sbp   120 a
            1  50  SYS   120 a
            1  60  SYS   140 b
            1  60  sbp   140 c
            2  70  hdl   50  d
            2  70  other 50  d
            2  70  hdl   50  d"""
    )

    def read(**events):
        labs = {"table": "labs", "subject_id": "id", "time": "day", "code": "test"}
        diagnoses = {"table": "diagnoses", "subject_id": "id", "time": "day", "code": "icd"}
        return stage(
            hospital.config(
                events=[labs | {"numeric_value": "x"} | events, diagnoses],
                features__measurements={"sbp": {"codes": ["sbp", "SYS"]}, "hdl": {}},
            )
        )

    return read


def test_rows_with_one_row_id_that_differ_in_their_code_count_once(coded):
    staged = coded(row_id="key")
    values = staged.features()
    assert values.loc[1, "sbp.count"] == 3  # a under both of its codes, b, c
    assert values.loc[2, "hdl.count"] == 1
    assert noticed(staged, "several codes") == [
        ("labs", 2, "further codes of the same thing: it counts once, under each of them")
    ]
    assert staged.quarantine() == [("labs", 7, "repeats an earlier row")]


def test_codes_of_one_thing_are_counted_each_for_itself(coded):
    staged = coded(row_id="key")
    count_codes(staged.db)
    assert staged.rows("SELECT code, events, subjects FROM code_counts ORDER BY ALL") == [
        ("E11", 1, 1), ("SYS", 2, 1), ("hdl", 1, 1), ("other", 1, 1), ("sbp", 2, 1)
    ]  # fmt: skip
    assert staged.rows("SELECT code, events, numbers FROM coding_counts ORDER BY ALL") == [
        ("E11", 1, 0), ("SYS", 1, 1), ("SYS = sbp", 1, 1), ("hdl = other", 1, 1), ("sbp", 1, 1)
    ]  # fmt: skip


def test_a_rare_code_stays_hidden_where_others_have_it_beside_another_code(hospital, stage):
    people = range(1, 31)
    hospital.write(
        patients=pd.DataFrame({"id": people, "index": 500, "end": 1000, "age": 50}),
        labs=pd.DataFrame(
            [
                (i, 50, code, 5, i)
                for i in people
                for code in ("hdl", "common" if i > 5 else "rare")
            ],
            columns=["id", "day", "test", "x", "key"],
        ),
        diagnoses=pd.DataFrame({"id": [1], "day": [600], "icd": ["E11"]}),
    )
    staged = stage(hospital.config(events__0__row_id="key"))
    count_codes(staged.db)
    counted = staged.rows("SELECT source, code, events, subjects FROM code_counts")
    told = common_codes(counted, {"labs": 30, "diagnoses": 1})
    assert told["labs"] == {"events": 30, "codes": {"hdl": 30, "common": 25}}


def test_without_a_row_id_each_code_is_a_measurement(coded):
    staged = coded()
    assert staged.features().loc[1, "sbp.count"] == 4
    assert noticed(staged, "several codes") == []


def test_a_share_is_judged_over_all_shards_together():
    def shard(bad, rows):
        return Requirement("x", {"bad": bad, "rows": rows}, at_most=("bad", 0.01, "rows"))

    assert not shard(2, 100).is_met
    assert (shard(2, 100) + shard(0, 100)).is_met
    assert not (shard(3, 100) + shard(0, 100)).is_met
    assert shard(0, 0).is_met


# -- several rows a subject, and none says when ----------------------------------------------------


@pytest.fixture
def encounters(hospital):
    """A function: a wide table of hospital encounters → a configuration."""
    rows = [(subject, visit) for subject in range(120) for visit in range(1 + subject % 3)]
    hospital.write(
        stays=pd.DataFrame(
            {
                "id": [subject for subject, _ in rows],
                "number": [visit for _, visit in rows],
                "days": [100 * visit + subject for subject, visit in rows],
                "back": [(subject + visit) % 2 for subject, visit in rows],
            }
        )
    )
    hospital.content = {
        "dataset": "stays",
        "tables": {"stays": {"path": "stays.csv"}},
        "cohort": {"table": "stays", "subject_id": "id"},
        "features": {"columns": {"stays": ["days"]}},
        "labels": {"back": {"positive": "back == 1", "negative": "back == 0"}},
        "splits": {"train": 0.4, "tuning": 0.3, "held_out": 0.3},
    }
    return hospital.config


@pytest.mark.parametrize("take", ["every", "first", "last"])
def test_rows_that_nothing_puts_in_an_order_are_refused(encounters, take):
    with pytest.raises(DataError) as error:
        ingest(encounters(cohort__take=take))
    assert "in 200 of the 240 rows of table stays the subject has several rows" in str(error.value)
    assert "a column as `order_by` with `take: first` or `take: last`" in str(error.value)


@pytest.mark.parametrize(("take", "expected"), [("first", 0), ("last", 100)])
def test_a_column_may_tell_which_row_is_first(encounters, take, expected):
    store = Store(ingest(encounters(cohort__take=take, cohort__order_by="number")))
    values = store.read("values").to_pandas().set_index("subject_id")["days"]
    assert len(values) == 120
    assert values.loc[1] == 1 + expected
    assert values.loc[2] == 2 + 2 * expected


def test_an_order_is_for_taking_one_row(encounters):
    with pytest.raises(ConfigError, match="goes with `take: first`"):
        encounters(cohort__order_by="number")


def test_without_an_id_each_row_is_a_subject_and_that_is_said(encounters):
    config = encounters(cohort__subject_id="row")
    store = Store(ingest(config))
    assert sorted(store.read("values")["subject_id"].to_pylist()) == list(range(1, 241))
    (finding,) = (f for f in store.manifest["findings"] if f["check"] == "no subject id")
    assert "fall into different splits" in finding["message"]
    assert (finding["count"], finding["severity"]) == (240, "look")


def test_a_column_named_row_is_a_column(encounters, hospital):
    stays = pd.read_csv(hospital.folder / "stays.csv")
    hospital.write(stays=stays.drop_duplicates("id").rename(columns={"id": "row"}))
    store = Store(ingest(encounters(cohort__subject_id="row")))
    assert store.manifest["rows"] == 120
    assert not [f for f in store.manifest["findings"] if f["check"] == "no subject id"]


# -- clocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clock", "utc"),
    [
        ({"unit": "days", "origin": "1899-12-30"}, NOON),  # as Excel counts
        ({"unit": "days", "origin": "1899-12-30", "time_zone": "Asia/Tokyo"}, "2020-01-01 03:00"),
        ({"unit": "days", "origin": "1899-12-30T00:00:00Z", "time_zone": "Asia/Tokyo"}, NOON),
    ],
)
def test_numbers_count_on_the_wall_clock_unless_their_origin_has_an_offset(
    hospital, stage, clock, utc
):
    hospital.draw(
        patients="id index end age\n1 43831.5 50000 50",
        labs="id day test x\n1 43830 sbp 120",
        diagnoses="id day icd\n1 43900 E11",
    )
    staged = stage(hospital.config(clock=clock))
    ((time,),) = staged.rows("SELECT prediction_time FROM cohort")
    assert time == pd.Timestamp(utc)


@pytest.mark.parametrize(("clock", "told"), [({}, 1), ({"time_zone": "Europe/Berlin"}, 0)])
def test_times_without_an_offset_beside_others_are_told(hospital, stage, clock, told):
    hospital.draw(
        patients="id index end age\n1 2020-01-01T12:00Z 2022-01-01T00:00Z 50",
        labs="id day test x\n1 2019-12-01T08:00 sbp 120",
        diagnoses="id day icd\n1 2020-06-01T00:00Z E11",
    )
    found = noticed(stage(hospital.config(clock={"unit": "timestamp"} | clock)), "time zone")
    assert [(place, rows) for place, rows, _ in found] == [("labs", 1)] * told
    assert all("clock: {time_zone: Europe/Berlin}" in message for *_, message in found)


# -- tables that may be absent, and folders that look like columns ---------------------------------


def test_an_optional_table_that_is_absent_is_told(busy):
    config = busy.config(
        tables__notes={"path": "notes.csv", "optional": True, "optional_columns": ["id", "stars"]},
        cohort__join=["notes"],
    )
    findings = [f for f in check(config)["findings"] if f["check"] == "absent table"]
    assert [(f["where"], f["severity"]) for f in findings] == [("notes", "look")]
    busy.write(notes=pd.DataFrame({"id": [1], "stars": [3]}))
    assert not [f for f in check(config)["findings"] if f["check"] == "absent table"]


def test_a_column_that_only_folders_name_is_told_as_such(busy):
    (busy.folder / "site=north").mkdir()
    (busy.folder / "patients.csv").rename(busy.folder / "site=north" / "patients.csv")
    config = busy.config(
        tables__patients={"path": "site=*/patients.csv"}, cohort__where="site == 1"
    )
    with pytest.raises(DataError, match="folders named site=… are not read as a column"):
        check(config)
