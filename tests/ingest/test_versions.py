"""Of rows, or resources, with one key one version counts, or none; what repeats counts once."""

import gzip
import json

import pandas as pd
import pytest

from ehr_sn.errors import ConfigError, DataError
from ehr_sn.ingest import shards
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.ingest.tables import connect, load_tables

OLDER, REPEATED = "older version", "repeated version"
CONTRADICTED, DELETED = "contradicted key", "deleted"
DIAGNOSES = "id day icd\n1 600 E11"


def told_of(staged, table):
    """How many rows of a table are left out, by the reason, and what is told of the last one."""
    found = staged.rows(
        f"SELECT check_name, rows, message FROM notices WHERE rows > 0 AND place = '{table}'"
    )
    of_versions = (OLDER, REPEATED, CONTRADICTED, DELETED)
    return {check: n for check, n, _ in found if check in of_versions}, [m for *_, m in found]


# -- tables with a key ---------------------------------------------------------------------------


@pytest.fixture
def settled(hospital, stage):
    """A function: drawn laboratory values → the numbers of rows that count, how many do not."""
    hospital.draw(patients="id index end age\n1 500 1000 50", diagnoses=DIAGNOSES)

    def read(drawn, **table):
        if isinstance(drawn, str):
            hospital.draw(labs=drawn)
        else:
            hospital.write(labs=drawn)
        found = stage(hospital.config(tables__labs={"path": "labs.csv", **table}))
        rows = [row for (row,) in found.rows("SELECT _row FROM source.labs ORDER BY _row")]
        return rows, *told_of(found, "labs")

    return read


LABS = """
id  day  test  x   key  said
1   1    hdl   10  a    1
1   1    hdl   11  a    20
1   1    hdl   12  a    3
1   2    hdl   20  b    1
1   3    hdl   30  .    1
1   3    hdl   31  .    2
"""


def test_of_rows_with_one_key_the_newest_counts(settled):
    rows, left_out, _ = settled(LABS, key="key", newest="said")
    assert rows == [2, 4, 5, 6]
    assert left_out == {OLDER: 2}


def test_without_newest_rows_that_differ_are_all_set_aside(settled):
    rows, left_out, said = settled(LABS, key="key")
    assert rows == [4, 5, 6]
    assert left_out == {CONTRADICTED: 3}
    assert said[0].startswith("rows with the same key say different things, and nothing says which")
    assert said[0].endswith("(rows 1, 2, 3)")


def test_equally_new_rows_that_differ_are_all_set_aside_and_the_older_with_them(settled):
    rows, left_out, _ = settled(LABS.replace("a    3", "a   20"), key="key", newest="said")
    assert rows == [4, 5, 6]
    assert left_out == {OLDER: 1, CONTRADICTED: 2}


def test_a_row_that_does_not_say_how_new_it_is_is_older_than_one_that_does(settled):
    drawn = LABS.replace("a    20", "a    .").replace("a    3", "a    ?")
    rows, left_out, _ = settled(drawn, key="key", newest="said")
    assert rows == [1, 4, 5, 6]
    assert left_out == {OLDER: 2}


def test_equal_rows_with_one_key_count_once_whatever_nobody_reads(settled):
    drawn = LABS.replace("11  a    20", "10  a    20").replace("12  a    3", "10  a    4")
    rows, left_out, _ = settled(drawn, key="key")
    assert rows == [1, 4, 5, 6]
    assert left_out == {REPEATED: 2}


def test_a_key_may_be_of_several_columns_in_any_case(settled):
    rows, left_out, _ = settled(LABS, key=["KEY", "X"], newest="Said")
    assert (rows, left_out) == ([1, 2, 3, 4, 5, 6], {})
    rows, left_out, _ = settled(LABS, key=["Key", "day"], newest="SAID")
    assert (rows, left_out) == ([2, 4, 5, 6], {OLDER: 2})


@pytest.mark.parametrize("time_zone", [None, "America/Los_Angeles"])
def test_times_say_what_is_newer_in_the_site_s_zone(hospital, stage, time_zone):
    hospital.write(
        patients=pd.DataFrame({"id": [1], "index": "2020-02-01", "end": "2021-01-01", "age": 50}),
        labs=pd.DataFrame(
            {
                "id": 1,
                "day": "2020-01-01",
                "test": "hdl",
                "x": [10, 11, 12, 13],
                "key": ["a", "a", "b", "b"],
                "said": [
                    *("2020-01-02T05:00Z", "2020-01-01 23:30"),  # the second is newer in California
                    *("2020-01-01T20:00-08:00", "2020-01-02T03:00Z"),
                ],
            }
        ),
        diagnoses=pd.DataFrame({"id": [1], "day": "2020-03-01", "icd": "E11"}),
    )
    clock = {"unit": "timestamp"} | ({"time_zone": time_zone} if time_zone else {})
    table = {"path": "labs.csv", "key": "key", "newest": "said"}
    found = stage(hospital.config(tables__labs=table, clock=clock))
    expected = [(11 if time_zone else 10,), (12,)]
    assert found.rows("SELECT x::INT FROM source.labs ORDER BY _row") == expected


def test_a_message_names_only_the_first_rows_and_no_value(settled):
    drawn = pd.DataFrame({"id": 1, "day": 1, "test": "hdl", "x": range(7), "key": "SECRET"})
    rows, _, said = settled(drawn, key="key")
    assert rows == []
    assert said[0].endswith("(rows 1, 2, 3, 4, 5, …)")
    assert "SECRET" not in said[0]


def test_a_key_is_of_columns_that_are_there(settled, hospital):
    with pytest.raises(DataError, match=r"tables\.labs\.key: table labs has no column 'kee'"):
        settled(LABS, key="kee")
    with pytest.raises(DataError, match=r"tables\.labs\.newest: table labs has no column 'sayd'"):
        settled(LABS, key="key", newest="sayd")
    with pytest.raises(ConfigError, match="newest: of which rows"):
        hospital.config(tables__labs={"path": "labs.csv", "newest": "said"})


# -- resources -----------------------------------------------------------------------------------


def observation(one, value, updated=None, version=None, **fields):
    told = {"resourceType": "Observation", "subject": {"reference": "Patient/1"}}
    told |= {"effectiveDateTime": "2020-01-05T10:00:00Z", "status": "final"}
    told |= {"code": {"coding": [{"code": "hdl"}]}, "valueInteger": value}
    meta = {"lastUpdated": updated, "versionId": version}
    told |= {"id": one, "meta": {key: said for key, said in meta.items() if said}}
    return {key: said for key, said in (told | fields).items() if said is not None}


def lines(resources):
    return "".join(json.dumps(one) + "\n" for one in resources).encode()


@pytest.fixture
def of_export(hospital):
    """A function: resources of an export, and of a later one → ids and values that count."""
    hospital.draw(patients="id index end age\n1 100 1000 50", diagnoses=DIAGNOSES)

    def read(*exports, deleted=None, kind="Observation", columns="id, value", **files):
        for place, resources in enumerate(exports):
            (hospital.folder / f"{kind}.{place}.ndjson").write_bytes(lines(resources))
        for name, content in files.items():
            (hospital.folder / name.replace("_", ".")).write_bytes(content)
        table = {"path": f"{kind}.*.ndjson", "fhir": kind}
        config = hospital.config(
            tables__fhir=table | ({"deleted": deleted} if deleted else {}),
            tables__labs={
                "sql": f"SELECT id, {columns.split(', ')[1]} AS x, 1 AS day, 'a' AS test FROM fhir"
            },
        )
        with connect() as db:
            load_tables(db, config)
            found = db.execute(
                "SELECT check_name, rows FROM notices WHERE rows > 0 AND place = 'fhir'"
            ).fetchall()
            query = f"SELECT {columns} FROM source.fhir ORDER BY _row"
            return db.execute(query).fetchall(), dict(found)

    return read


@pytest.mark.parametrize("in_order", [True, False])
def test_of_a_resource_the_newest_version_counts_in_whatever_file(of_export, in_order):
    full = [
        observation("a", 900, "2020-01-06T00:00:00Z"),
        observation("b", 5, "2020-01-06T20:00:00-08:00"),
        observation("c", 6, "2020-01-06T00:00:00Z"),
    ]
    later = [
        observation("a", 90, "2020-01-06T02:00:00+01:00"),
        observation("b", 7, "2020-01-07T03:00:00Z"),
    ]
    read, told = of_export(*((full, later) if in_order else (later, full)))
    assert sorted(read) == [("a", "90"), ("b", "5"), ("c", "6")]
    assert told == {OLDER: 2}


@pytest.mark.parametrize(
    ("first", "second", "counts"),
    [
        (("2020-01-06T00:00:00Z", "10"), ("2020-01-06T00:00:00Z", "9"), ["1"]),
        ((None, "9"), (None, "10"), ["2"]),
        (("2020-01-06T00:00:00.001Z", None), ("2020-01-06T00:00:00Z", None), ["1"]),
        (("2020-01-06T00:00:00Z", "1"), ("2020-01-06T00:00:00Z", "1"), []),
        (("2020-01-06T00:00:00Z", None), ("2020-01-06T01:00:00+01:00", None), []),
        ((None, None), (None, None), []),
        ((None, "a"), (None, "b"), []),
    ],
)
def test_last_updated_says_what_is_newer_and_then_the_version(of_export, first, second, counts):
    other = observation("b", 3)
    read, told = of_export([observation("a", 1, *first), other], [observation("a", 2, *second)])
    assert [value for one, value in read if one == "a"] == counts
    assert told == ({OLDER: 1} if counts else {CONTRADICTED: 2})


@pytest.mark.parametrize(
    ("first", "second", "counts"),
    [
        ((None, "10"), ("2020-01-06T00:00:00Z", "1"), "2"),
        (("2020-01-06T00:00:00Z", None), (None, None), "1"),
        (("2020-01-06T00:00:00Z", None), ("yesterday", None), "1"),
        (("2020-01-06T00:00:00Z", "1"), ("2020-01-06T00:00:00Z", None), "1"),
    ],
)
def test_a_version_that_says_when_it_is_of_is_newer_than_one_that_does_not(
    of_export, first, second, counts
):
    read, told = of_export([observation("a", 1, *first)], [observation("a", 2, *second)])
    assert (read, told) == ([("a", counts)], {OLDER: 1})


def test_a_resource_that_several_exports_hold_counts_once(of_export):
    same = observation("a", 1, "2020-01-06T00:00:00Z", "3")
    unversioned, nameless = observation("b", 2), observation(None, 3)
    read, told = of_export([same, unversioned, nameless], [unversioned, same], [same, nameless])
    assert read == [("a", "1"), ("b", "2"), (None, "3"), (None, "3")]
    assert told == {REPEATED: 3}


def test_a_version_counts_with_all_its_rows_or_with_none(of_export):
    parts = [{"code": {"coding": [{"code": c}, {"code": "x"}]}, "valueInteger": 1} for c in "abc"]
    older = observation("a", None, "2020-01-06T00:00:00Z", component=parts)
    newer = observation("a", None, "2020-01-07T00:00:00Z", component=parts[1:])
    read, told = of_export([older], [newer], columns="id, code")
    assert read == [("a", code) for code in ("b", "x", "c", "x")]
    assert told == {OLDER: 6}


def test_a_corrected_patient_is_who_is_predicted_for(hospital, stage):
    people = [
        {"resourceType": "Patient", "id": "1", "birthDate": "1960-01-01"},
        {"resourceType": "Patient", "id": "2", "birthDate": "1970-01-01"},
    ]
    people = [one | {"meta": {"lastUpdated": "2020-01-01T00:00:00Z"}} for one in people]
    meta = {"lastUpdated": "2020-01-02T00:00:00Z"}
    corrected = people[0] | {"birthDate": "1930-01-01", "meta": meta}
    (hospital.folder / "Patient.ndjson").write_bytes(lines(people))
    (hospital.folder / "Patient_since.ndjson").write_bytes(lines([corrected]))
    hospital.draw(labs="id day test x\n1 50 hdl 1", diagnoses="id day icd\n1 150 E11")
    born = 'id, 100 AS "index", 1000 AS "end", 2020 - year(birth_date::DATE) AS age'
    config = hospital.config(
        tables__people={"path": "Patient*.ndjson", "fhir": "Patient"},
        tables__patients={"sql": f"SELECT {born} FROM people"},
    )
    assert stage(config).features()["age"].to_dict() == {1: 90, 2: 50}


def test_another_key_may_tell_resources_apart(hospital, of_export):
    """Where a server gave new ids to what it copied."""
    copies = [observation("a", 1), observation("b", 1)]
    assert of_export(copies)[0] == [("a", "1"), ("b", "1")]
    (hospital.folder / "Observation.0.ndjson").write_bytes(lines(copies))
    table = {"path": "Observation.*.ndjson", "fhir": "Observation"}
    changes = {
        "tables__labs": {"sql": "SELECT value AS x, 1 AS id, 1 AS day, 'a' AS test FROM fhir"}
    }
    config = hospital.config(
        tables__fhir=table | {"key": ["subject_id", "time", "code"]}, **changes
    )
    with connect() as db:
        load_tables(db, config)
        assert db.execute("SELECT value FROM source.fhir").fetchall() == [("1",)]


# -- what was deleted ----------------------------------------------------------------------------


def bundle(*urls, at=None):
    entries = [{"request": {"method": "DELETE", "url": url}} for url in urls]
    told = {"resourceType": "Bundle", "type": "transaction", "entry": entries}
    return told | ({"meta": {"lastUpdated": at}} if at else {})


def test_what_an_export_names_as_deleted_is_left_out(of_export):
    resources = [observation(one, 1, "2020-01-06T00:00:00Z") for one in "abcde"]
    gone = [
        bundle("Observation/a", "https://example.org/fhir/Observation/b/_history/3"),
        bundle("Patient/c", "Observation?subject=1"),
        bundle("Observation/d", at="2020-01-07T00:00:00+01:00"),
        bundle("Observation/e", at="2020-01-05T23:59:59Z"),  # and made anew since
    ]
    read, told = of_export(resources, deleted="deleted.ndjson", deleted_ndjson=lines(gone))
    assert [one for one, _ in read] == ["c", "e"]
    assert told == {DELETED: 3}


def test_all_versions_and_rows_of_a_deleted_resource_are_left_out(of_export):
    older, newer = (observation("a", n, f"2020-01-0{n}T00:00:00Z") for n in (1, 2))
    gone = lines([bundle("Observation/a", at="2020-01-03T00:00:00Z")])
    read, _ = of_export([older], [newer, observation("b", 1)], deleted="*.gone.ndjson.gz",
        **{"1_gone_ndjson_gz": gzip.compress(gone)})  # fmt: skip
    assert [one for one, _ in read] == ["b"]
    gone = lines([bundle("Observation/a", at="2020-01-01T12:00:00Z")])
    read, _ = of_export([older], [newer], deleted="gone.ndjson", gone_ndjson=gone)
    assert read == [("a", "2")]


def test_nothing_need_have_been_deleted(of_export):
    one = [observation("a", 1)]
    assert of_export(one, deleted="deleted/*.ndjson") == ([("a", "1")], {})
    assert of_export(one, deleted="deleted.ndjson") == ([("a", "1")], {})


def test_a_list_of_deletions_may_have_no_bytes(of_export):
    one = [observation("a", 1)]
    assert of_export(one, deleted="d.ndjson", d_ndjson=b"") == ([("a", "1")], {})


def test_a_list_of_deletions_holds_bundles_and_is_of_fhir(of_export, hospital):
    with pytest.raises(DataError) as error:
        of_export([observation("a", 1)], deleted="d.ndjson", d_ndjson=lines([observation("b", 5)]))
    assert "another type" in str(error.value)
    with pytest.raises(ConfigError, match="deleted: names FHIR Bundles: give `fhir` too"):
        hospital.config(tables__labs={"path": "labs.csv", "deleted": "deleted.ndjson"})


def test_a_list_of_deletions_is_a_source_as_its_table_is(busy):
    (busy.folder / "Condition.ndjson").write_bytes(
        lines([{"resourceType": "Condition", "id": "c", "subject": {"reference": "Patient/1"}}])
    )
    table = {"path": "Condition.ndjson", "fhir": "Condition", "deleted": "deleted.ndjson"}
    stores = []
    for gone in ([bundle()], [bundle("Condition/other")]):
        (busy.folder / "deleted.ndjson").write_bytes(lines(gone))
        stores.append(Store(ingest(busy.config(tables__conditions=table))))
    one, other = (store.manifest["tables"]["conditions"]["sha256"] for store in stores)
    assert one != other
    assert stores[0].fingerprint != stores[1].fingerprint


# -- rows that repeat ----------------------------------------------------------------------------

SAME_DAY = """
id  day  test  x  specimen  ward
1   1    hdl   5  s1        w
1   1    hdl   5  s2        w
1   1    hdl   8  s3        w
"""


@pytest.fixture
def measured(hospital, stage):
    """A function: drawn parts of laboratory values → how many count, their mean, and repeats."""
    hospital.draw(patients="id index end age\n1 500 1000 50", diagnoses=DIAGNOSES)

    def read(*parts, **changes):
        for place, drawn in enumerate(parts):
            hospital.draw(**{f"labs{place}": drawn})
        found = stage(hospital.config(tables__labs={"path": "labs?.csv"}, **changes))
        features = found.features()
        aside = [row for _, row, reason in found.quarantine() if reason == "repeats an earlier row"]
        return features["hdl.count"].item(), features["hdl.mean"].item(), aside

    return read


def test_specimens_of_one_day_with_one_value_are_measurements_of_their_own(measured):
    assert measured(SAME_DAY) == (3, 6, [])
    lines_of_table = SAME_DAY.strip().splitlines()
    nothing_tells_apart = "\n".join(line.rsplit(maxsplit=2)[0] for line in lines_of_table)
    assert measured(nothing_tells_apart) == (2, 6.5, [2])


def test_exports_that_overlap_count_once(measured):
    assert measured(SAME_DAY, SAME_DAY) == (3, 6, [4, 5, 6])


def test_rows_that_differ_in_anything_are_their_own(measured):
    """Where no column alone tells all rows apart."""
    drawn = SAME_DAY.replace("s3", "s1")
    count, _, repeats = measured(drawn, drawn.replace("s1        w", "s1        v"))
    assert (count, repeats) == (5, [5])
    assert measured(drawn, drawn) == (3, 6, [4, 5, 6])


def test_row_id_says_which_rows_are_one(measured):
    assert measured(SAME_DAY, events__0__row_id="specimen") == (3, 6, [])
    assert measured(SAME_DAY, events__0__row_id="WARD") == (2, 6.5, [2])
    nameless = SAME_DAY.replace("s1", ". ").replace("s2", ". ")
    assert measured(nameless, events__0__row_id="specimen") == (2, 6.5, [2])


WARD_FIRST = """
id  day  test  x  ward  specimen
1   1    hdl   5  w     s1
1   1    hdl   5  w     s2
1   1    hdl   8  w     s3
"""


@pytest.mark.parametrize("rows", [0, 1])
def test_what_tells_rows_apart_is_not_taken_from_a_first_part_of_few_rows(measured, rows):
    header = WARD_FIRST.strip().splitlines()[0]
    first = "\n".join([header, *["1 9 hdl 6 v s0"] * rows])
    assert measured(first, WARD_FIRST) == (3 + rows, 6, [])


# -- shards --------------------------------------------------------------------------------------


def small(config, work):
    shards.prepare(config, work, 300)


@pytest.fixture
def updated(busy):
    """The busy hospital with a key and versions of its values, and FHIR of its diagnoses."""
    labs = pd.read_csv(busy.folder / "labs.csv", dtype=str)
    labs["key"] = labs.index.astype(str)
    labs["said"] = "1"
    older = labs.sample(200, random_state=0).assign(x="99", said="0")
    disputed = labs.tail(9).assign(x="77")
    busy.write(labs=pd.concat([older, labs, labs.head(50), disputed], ignore_index=True))
    conditions = [
        {
            "resourceType": "Condition",
            "id": f"c{i}",
            "meta": {"lastUpdated": "2020-01-01T00:00:00Z"},
            "subject": {"reference": f"Patient/{row.id}"},
            "code": {"coding": [{"code": row.icd}, {"code": f"{row.icd}x"}]},
            "recordedDate": f"{pd.Timestamp('2020-01-01') + pd.Timedelta(row.day, 'D'):%Y-%m-%d}",
        }
        for i, row in enumerate(pd.read_csv(busy.folder / "diagnoses.csv").itertuples())
    ]
    refuted = [
        one | {"code": {"coding": [{"code": "Z"}]}, "meta": {"lastUpdated": "2020-02-01T00:00:00Z"}}
        for one in conditions[:20]
    ]
    disputed = [one | {"recordedDate": "2019-01-01"} for one in conditions[20:25]]
    (busy.folder / "Condition.ndjson").write_bytes(lines(conditions))
    (busy.folder / "Condition_since.ndjson").write_bytes(
        lines([*refuted, *conditions[30:40], *disputed])
    )
    gone = [bundle(*(f"Condition/c{i}" for i in range(50, 60)), at="2020-03-01T00:00:00Z")]
    (busy.folder / "deleted.ndjson").write_bytes(lines(gone))
    tables = busy.content["tables"] | {
        "labs": {"path": "labs.csv", "key": "key", "newest": "said"},
        "diagnoses": {
            "path": "Condition*.ndjson",
            "fhir": "Condition",
            "deleted": "deleted.ndjson",
        },
    }
    events = [
        busy.content["events"][0],
        {
            "table": "diagnoses",
            "subject_id": "subject_id",
            "time": "known",
            "code": "code",
            "row_id": "fact_id",
            "clock": {"unit": "timestamp"},
        },
    ]
    busy.content = busy.content | {"tables": tables, "events": events}
    return busy


def test_many_shards_count_the_same_versions_as_one(updated):
    one = Store(ingest(updated.config(data_dir=str(updated.folder / "one"))))
    many = Store(ingest(updated.config(data_dir=str(updated.folder / "many")), prepare=small))
    assert one.fingerprint == many.fingerprint
    assert len([*(many.path / "values").iterdir()]) > 3
    keys = ["subject_id", "prediction_time"]
    for table in ("values", "mask", "labels"):
        first, second = (
            store.read(table).to_pandas().sort_values(keys, ignore_index=True)
            for store in (one, many)
        )
        pd.testing.assert_frame_equal(first, second, check_exact=True)
    kept = ("findings", "quarantined", "event_rows", "events", "labels")
    said = [{key: store.manifest[key] for key in kept} for store in (one, many)]
    assert said[0] == said[1]
    told = {(f["check"], f["where"]): f["count"] for f in one.manifest["findings"]}
    assert told[OLDER, "labs"] == 200
    assert told[REPEATED, "labs"] == 50
    assert told[CONTRADICTED, "labs"] == 18
    assert told[OLDER, "diagnoses"] == 2 * 20
    assert told[REPEATED, "diagnoses"] == 2 * 10
    assert told[CONTRADICTED, "diagnoses"] == 2 * 2 * 5
    assert told[DELETED, "diagnoses"] == 2 * 10
