"""A whole pipeline of patients with pseudonyms: who may read it, and what of it leaves."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from flows.ingest import ingest
from flows.monitor import monitor
from flows.pipeline import pipeline

import pandas as pd
import pyarrow.parquet as pq
import pytest
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL
from typer.testing import CliRunner

from ehr_sn import cli, tracking
from ehr_sn.config import load_config
from ehr_sn.errors import DataError
from ehr_sn.ingest import shards
from ehr_sn.ingest.store import Store
from ehr_sn.scoring.registry import promote, register
from ehr_sn.scoring.score import score_with_champions

KEY = "EHR_SN_TEST_KEY"
FIRST = 7_310_000_000
RULES = "promotion: {margin: 0.2, calibration_slope: [0.01, 99], calibration_intercept: [-9, 9]}"


def changed(path: Path, how: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    how(pd.read_csv(path)).to_csv(path, index=False)


@pytest.fixture
def keyed_clinic(small_clinic: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of 900 people with long ids, three without one, and four known to be diabetic before."""
    monkeypatch.setenv(KEY, "k" * 32)
    folder = small_clinic.parent
    for table in ("people", "labs", "diagnoses"):
        changed(folder / f"{table}.csv", lambda t: t.assign(person=t["person"] + FIRST))
    nobody = pd.DataFrame({"person": [None] * 3, "age": 50, "last_day": 2000})
    changed(folder / "people.csv", lambda people: pd.concat([people, nobody]).convert_dtypes())
    before = pd.DataFrame({"person": FIRST + 1000 + pd.Series(range(4)), "day": -9, "icd": "E11"})
    changed(folder / "diagnoses.csv", lambda diagnoses: pd.concat([diagnoses, before]))
    privacy = f"privacy: {{pseudonym_key_env: {KEY}}}\n"
    small_clinic.write_text(f"{small_clinic.read_text()}{privacy}{RULES}\n")
    return small_clinic


def ids_in(folder: Path) -> list[Path]:
    signs = [str(FIRST)[:6].encode(), *((FIRST + 1000 + i).to_bytes(8, "little") for i in (4, 500))]
    found = []
    for path in filter(Path.is_file, folder.rglob("*")):
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content += pq.read_table(path).to_pandas().to_csv().encode()
        found += [path] * any(sign in content for sign in signs)
    return found


def open_to_others(*folders: Path) -> list[Path]:
    every = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    assert len(every) > 10
    data = [path for path in every if path.name != "pyfunc.py"]  # this project's code, copied
    return [path for path in data if path.stat().st_mode & 0o077]


def test_nothing_kept_names_anybody_or_is_for_others_and_small_counts_stay(
    keyed_clinic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = pipeline(str(keyed_clinic))
    config = load_config(keyed_clinic)
    register(config, store := Store(Path(ingest(str(keyed_clinic)))))
    promote(config, ["diabetes"])
    folder, _ = score_with_champions(config, Path("scores"), diseases=["diabetes"])
    done = CliRunner().invoke(cli.app, ["report", str(keyed_clinic)])
    assert done.exit_code == 0, done.output
    kept = [Path(name) for name in ("data", "scores", "mlruns", "reports")]
    assert [path for one in kept for path in ids_in(one)] == []
    assert open_to_others(*kept) == []
    assert pq.read_table(folder / "scores.parquet").num_rows == 900

    exact = store.manifest["labels"]["diabetes"]
    assert exact["recorded_before"] == 4
    manifest = json.loads(artifact(parent, "manifest.json"))
    told = manifest["labels"]["diabetes"]
    assert told["recorded_before"] == "< 11"
    assert told["eligible"] == "–"  # or the four could be reckoned
    assert told["positive"] == exact["positive"]
    assert [step["rule"] for step in store.manifest["cohort"]][:2] == ["read", "usable"]
    assert manifest["cohort"][0]["rule"] == "read, usable"
    assert manifest["cohort"][0]["rows"] == 900
    assert store.manifest["code_subjects"]["diagnoses"]["E11"] > 0
    assert "code_subjects" not in manifest
    aside = {"table": "people", "action": "row set aside"}
    assert aside | {"count": 3} in store.manifest["quarantined"]
    assert aside | {"count": "< 11"} in manifest["quarantined"]
    found = [f for f in manifest["findings"] if f["where"] == "people"]
    assert all(finding["count"] in ("< 11", "–") for finding in found)
    for name in ("cohort.json", "labels.json"):
        assert '"< 11"' in artifact(parent, name)
    (run,) = tracking.finished_run(config, parent).run.inputs.dataset_inputs
    assert json.loads(run.dataset.profile)["labels"]["diabetes"]["recorded_before"] == "< 11"
    for page in Path("reports").rglob("*.*"):
        cells = (f">{exact['eligible']}<", f"| {exact['eligible']} |")
        assert not any(cell in page.read_text() for cell in cells)
    page = Path("reports/clinic/report.html").read_text()
    diabetes, hypertension = re.findall(r"<th>\(rows\)</th>(.*?)</tr>", page)[:2]
    assert diabetes.count("–") == 6  # which add up to the eligible
    assert "–" not in hypertension


def test_other_processes_write_for_the_owner_only_too(
    keyed_clinic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 900)
    text = keyed_clinic.read_text()
    keyed_clinic.write_text(f"{text}runner: {{kind: processes, workers: 1}}\n")
    store = Path(ingest(str(keyed_clinic)))
    assert len(list((store / "values").iterdir())) > 1
    assert ids_in(Path("data")) == []
    assert open_to_others(Path("data")) == []


MARK = "Zebra"  # in every cell of a table of labels that may hold text


def marked_labels(folder: Path) -> list[Path]:
    """Tables of labels, each with a fault of its own: no two of their cells may be repeated."""
    header = f"subject_id,prediction_time,disease,label,{MARK}\n"
    time, somebody = "2020-01-01T00:00", FIRST + 1004
    sound = f"{somebody},{time},diabetes,1,{MARK}\n"
    texts = {
        "label": f"{sound}{somebody + 1},{time},diabetes,{MARK},\n",
        "contradicted": f"{sound}{sound.replace(',1,', ',0,')}",
        "nobody meets a score": f"{MARK},{MARK},{MARK},1,{MARK}\n{MARK},{time},diabetes,0,{MARK}\n",
        "ragged": f"{sound}{MARK},{MARK},{MARK},{MARK},{MARK},{MARK}\n",
        "quote": f'{sound}"{MARK},{MARK},{MARK},{MARK}\n',
        "latin": f"{sound}{MARK}é,{time},diabetes,1,\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.csv").write_bytes((header + text).encode("latin-1"))
    (folder / "columns.csv").write_text(sound)
    rows = {"subject_id": [somebody], "prediction_time": [time], "disease": [MARK], "label": ["1"]}
    for name in rows:
        odd = rows | {name: [{"of": MARK, "at": [MARK]}]}
        pd.DataFrame(odd).to_parquet(folder / f"odd {name}.parquet")
    return sorted(folder.iterdir())


def test_no_refusal_of_labels_repeats_a_cell_anywhere(
    keyed_clinic: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline(str(keyed_clinic))
    config = load_config(keyed_clinic)
    register(config, Store(Path(ingest(str(keyed_clinic)))))
    promote(config, ["diabetes"])
    folder, _ = score_with_champions(config, Path("scores"), diseases=["diabetes"])
    (tables := tmp_path / "tables of labels").mkdir()
    said = []
    for path in marked_labels(tables):
        with pytest.raises(DataError) as error:
            monitor(str(keyed_clinic), str(folder), str(path))
        done = CliRunner().invoke(
            cli.app,
            ["monitor", str(keyed_clinic), "--scores", str(folder), "--labels", str(path)],
        )
        assert done.exit_code == 1
        said += [str(error.value), done.output, str(done.exception)]
    said += [caplog.text]
    database = Path(PREFECT_API_DATABASE_CONNECTION_URL.value().partition(":///")[2])
    kept = [database, database.with_name(f"{database.name}-wal")]
    kept += [path for name in ("mlruns", "reports") for path in Path(name).rglob("*.*")]
    content = b"".join(path.read_bytes() for path in kept if path.is_file())
    assert b"has 1 row whose label is none of" in content  # it is the right database
    content += "".join(said).encode()
    for sign in (MARK, str(FIRST + 1004), str(FIRST + 1005)):
        assert sign.encode() not in content


def artifact(run_id: str, name: str) -> str:
    client = tracking._client()
    return Path(client.download_artifacts(run_id, name)).read_text()
