"""Tables made by SQL from the others: the same at any time, and of nothing but those tables."""

import pandas as pd
import pytest

from ehr_sn.config import Config, load_config
from ehr_sn.errors import ConfigError, DataError
from ehr_sn.ingest.store import Store, ingest
from ehr_sn.ingest.tables import connect, load_tables


@pytest.fixture
def derive(hospital):
    """A function: SQL by name of table → the loaded rows of one of them."""
    hospital.draw(
        patients="""
            id index end  age
            1  100   1000 50
            2  100   1000 60""",
        labs="""
            id day test x
            1  50  sbp  120
            2  60  sbp  140
            2  70  sbp  oops
            1  50  sbp  110""",
        stays="""
            id ward from to
            2  ICU  55   65
            1  ER   40   60""",
        diagnoses="""
            id day icd
            1  150 E11""",
    )

    def load(columns="*", of="labs", **sql):
        tables = {name: {"path": f"{name}.csv"} for name in ("patients", "diagnoses", "stays")}
        config = hospital.config(
            tables=tables
            | {"raw": {"path": "labs.csv"}}
            | {name: {"sql": text} for name, text in sql.items()}
        )
        with connect() as db:
            load_tables(db, config)
            return db.execute(f"SELECT {columns} FROM source.{of} ORDER BY _row").fetchall()

    return load


JOIN = """
    SELECT r.id, day, test, TRY_CAST(x AS DOUBLE) AS x FROM raw r
    JOIN stays s ON r.id = s.id AND day::INT BETWEEN "from"::INT AND "to"::INT"""


def test_a_join_is_a_table_in_one_order(derive):
    read = derive(labs=JOIN)
    assert read == [
        (1, "1", "50", "sbp", 110),
        (2, "1", "50", "sbp", 120),
        (3, "2", "60", "sbp", 140),
    ]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM raw",
        "FROM raw",
        "SELECT id, day, test, x FROM raw; ",
        "SELECT id, day, test, x FROM raw -- as they are",
        "SELECT RAW.ID AS id, Day AS day, tesT AS test, x FROM Raw",
        "WITH raw AS (SELECT * FROM raw) SELECT * FROM raw",
        "WITH q AS (SELECT id, day, test, x FROM raw) SELECT q.* FROM q",
        "SELECT COLUMNS('id|day|test|x') FROM raw",
        "SELECT id, day, test, x FROM raw NATURAL JOIN (SELECT DISTINCT id, day FROM raw)",
        "SELECT unnest(r) FROM raw r",
    ],
)
def test_whatever_is_read_is_loaded(derive, sql):
    assert [row[1:] for row in derive(labs=sql)] == [
        ("1", "50", "sbp", "110"),
        ("1", "50", "sbp", "120"),
        ("2", "60", "sbp", "140"),
        ("2", "70", "sbp", "oops"),
    ]


def test_a_natural_join_sees_every_column(derive):
    """Of columns that are not named too: those alike in both tables must join."""
    sql = (
        "SELECT id, day, test, x FROM raw NATURAL JOIN (SELECT id, day, test, '120' AS x FROM raw)"
    )
    assert len(derive(labs=sql)) == 2  # a join by id alone would give 8


def test_types_are_numbers_timestamps_and_texts(derive):
    sql = """SELECT id::INT AS id, DATE '2020-01-01' + day::INT AS day, x = '120' AS test,
        ' a ' AS x FROM raw"""
    read = derive("id, day::VARCHAR, test, x", labs=sql)
    assert read[0] == (1, "2020-02-20", 0, "a")


def test_tables_may_be_defined_in_any_order(derive):
    first = "SELECT id, day, test, x FROM made WHERE x > 115"
    made = "SELECT id, day, test, TRY_CAST(x AS DOUBLE) AS x FROM raw"
    assert len(derive(labs=first, made=made)) == len(derive(made=made, labs=first)) == 2


def test_only_columns_that_are_named_are_loaded(derive):
    sql = "SELECT raw.id, day, test, x FROM raw, (SELECT count(*) AS n, max(ward) AS w FROM stays)"
    columns = derive(
        "DISTINCT column_name", "labs, duckdb_columns() WHERE table_name = 'stays' --", labs=sql
    )
    assert sorted(columns) == [("_row",), ("id",), ("ward",)]


def test_no_row_is_an_empty_table(derive):
    with pytest.raises(DataError, match=r"tables\.labs\.sql: the table is empty"):
        derive(labs="SELECT * FROM raw WHERE x = 'none'")


def test_a_cast_that_fails_gives_a_missing_entry(derive):
    read = derive("x", labs="SELECT id, day, test, x::DOUBLE AS x FROM raw")
    assert sorted(read, key=str) == [(110.0,), (120.0,), (140.0,), (None,)]


def test_a_value_that_cannot_be_compared_is_not_told(derive):
    with pytest.raises(DataError) as error:
        derive(labs="SELECT id, day, test, x FROM raw JOIN (SELECT 5 AS y) ON x = y")
    assert "tables.labs.sql: DuckDB stops at a value that the SQL cannot take" in str(error.value)
    assert "TRY(" in str(error.value)
    assert "oops" not in str(error.value)


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        (
            "SELECT id, dya FROM raw",
            "column \"dya\" not found in FROM clause; did you mean 'day'?",
        ),
        ("SELECT r.dya FROM raw r", "did you mean 'day'?"),
        ("SELECT 1 FROM raw JOIN stays USING (idd)", "did you mean 'id'?"),
        ("SELECT lowr(id) FROM raw", "Scalar Function with name lowr does not exist"),
        ("SELECT id, count(*) FROM raw", 'column "id" must appear in the GROUP BY clause'),
        ("SELECT id + DATE '2020-01-01' FROM raw", "No function matches"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(derive, sql, said):
    with pytest.raises(DataError) as error:
        derive(labs=sql)
    assert "hospital.yaml:" in str(error.value)
    assert ": tables.labs.sql: " in str(error.value)
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SELEC 1", 'syntax error at or near "SELEC"'),
        ("SELECT id FROM raww", "no table 'raww'; did you mean 'raw'?"),
        ("SELECT 1; SELECT 2", "give one SELECT, not several statements"),
        ("DELETE FROM raw", "only a SELECT is possible here"),
        ("COPY raw TO 'x.csv'", "only a SELECT is possible here"),
        ("ATTACH 'x.db'", "only a SELECT is possible here"),
        ("SET enable_external_access = true", "only a SELECT is possible here"),
        ("DESCRIBE raw", "only a SELECT is possible here"),
        ("SELECT * FROM 'patients.csv'", "no table 'patients.csv'"),
        ("SELECT * FROM read_csv('patients.csv')", "read_csv() may not be used here"),
        ("SELECT * FROM read_text('https://example.org')", "read_text() may not be used here"),
        ("SELECT * FROM glob('/*')", "glob() may not be used here"),
        ("SELECT * FROM duckdb_settings()", "duckdb_settings() may not be used here"),
        ("SELECT * FROM query('FROM raw')", "query() may not be used here"),
        ("SELECT * FROM query_table('raw')", "query_table() may not be used here"),
        ("SELECT * FROM source.raw", "name tables without a schema: raw"),
        ("SELECT * FROM information_schema.tables", "name tables without a schema: tables"),
        ("SELECT id, now() AS day FROM raw", "now may not be used"),
        ("SELECT id, current_date AS day FROM raw", "current_date may not be used"),
        ("SELECT id, ago(INTERVAL 1 DAY) FROM raw", "ago may not be used"),
        ("SELECT random() FROM raw", "random may not be used"),
        ("SELECT id FROM raw USING SAMPLE 5", "a sample would differ each time"),
        ("SELECT * FROM labs", "reads labs, which is made from labs itself"),
    ],
)
def test_only_a_query_of_the_configured_tables_is_taken(derive, sql, said):
    with pytest.raises(ConfigError) as error:
        derive(labs=sql)
    assert ": tables.labs.sql: " in str(error.value)
    assert said in str(error.value)


def test_a_cycle_is_refused(derive):
    with pytest.raises(ConfigError, match=r"tables\.\w+\.sql: reads \w+, which is made from"):
        derive(labs="SELECT * FROM one", one="SELECT * FROM two", two="SELECT * FROM labs")


def test_a_file_without_a_header_is_not_quoted(derive, hospital):
    (hospital.folder / "labs.csv").write_text("SECRET1,SECRET2,SECRET3,x\n1,50,sbp,120\n")
    with pytest.raises(DataError) as error:
        derive(labs="SELECT id, day, test, x FROM raw")
    assert "SECRET" not in str(error.value)


def test_memory_beyond_the_limit_is_spilled(hospital, tmp_path):
    n = 200_000
    pd.DataFrame(
        {"id": range(n), "day": 1, "test": [f"{i * 7919 % n:0200d}" for i in range(n)], "x": 1}
    ).to_parquet(hospital.folder / "raw.parquet")
    (hospital.folder / "patients.csv").write_text("id,index,end,age\n1,100,1000,50\n")
    (hospital.folder / "diagnoses.csv").write_text("id,day,icd\n1,150,E11\n")
    config = hospital.config(
        tables__raw={"path": "raw.parquet"},
        tables__labs={"sql": "SELECT test AS id, day, test, x FROM raw"},
    )
    (tmp_path / "spill").mkdir()
    with connect(tmp_path / "spill", "80MB") as db:
        assert load_tables(db, config)["labs"] == n
        (out_of_order,) = db.execute(
            """SELECT count(*) FROM (SELECT id < lag(id) OVER (ORDER BY _row) AS out_of_order
            FROM source.labs) WHERE out_of_order"""
        ).fetchone()
    assert out_of_order == 0


def test_its_source_is_its_text_and_the_tables_it_reads(busy):
    def stored(sql="SELECT id, day, test, x FROM raw") -> tuple[str, Config]:
        config = busy.config(tables__labs={"sql": sql}, tables__raw={"path": "labs.csv"})
        return ingest(config), config

    plain = Store(ingest(busy.config()))
    store, config = stored()
    derived = Store(store)
    assert stored()[0] == store
    for name in ("values", "mask", "labels", "splits"):
        file = f"{name}.parquet"
        assert (derived.path / file).read_bytes() == (plain.path / file).read_bytes()
    tables = derived.manifest["tables"]
    assert (
        tables["labs"]["rows"] == tables["raw"]["rows"] == plain.manifest["tables"]["labs"]["rows"]
    )
    assert tables["labs"]["location"] == "sql"
    with_comment = Store(stored("SELECT id, day, test, x FROM raw -- all")[0])
    assert with_comment.manifest["tables"]["labs"]["sha256"] != tables["labs"]["sha256"]
    with (busy.folder / "labs.csv").open("a") as file:
        file.write("1,5,sbp,100\n")
    changed = Store(stored()[0]).manifest["tables"]
    assert changed["labs"]["sha256"] != tables["labs"]["sha256"]
    assert load_config(busy.folder / "hospital.yaml").tables["labs"].sql is not None
    assert config.loading_order.index("raw") < config.loading_order.index("labs")
