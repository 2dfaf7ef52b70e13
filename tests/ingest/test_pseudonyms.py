"""Pseudonyms: one person, one pseudonym, everywhere; and no id in anything that is kept."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from ehr_sn.config import read_stored
from ehr_sn.errors import ConfigError
from ehr_sn.ingest import shards, store
from ehr_sn.ingest.meds import SUBJECT_IDS, export_meds
from ehr_sn.ingest.store import Store, ingest

KEY, OTHER = "k" * 32, "o" * 32
FIRST = 7_310_000_001  # of the ids: long, so that no number of another kind is taken for one


@pytest.fixture
def keyed(busy, monkeypatch: pytest.MonkeyPatch):
    """A hospital whose subjects have long ids, and are to have pseudonyms."""
    monkeypatch.setenv("EHR_SN_TEST_KEY", KEY)
    for table in ("patients", "labs", "diagnoses"):
        frame = pd.read_csv(busy.folder / f"{table}.csv")
        frame["id"] += FIRST
        frame.to_csv(busy.folder / f"{table}.csv", index=False)
    busy.content = busy.content | {"privacy": {"pseudonym_key_env": "EHR_SN_TEST_KEY"}}
    return busy


def ids_in(folder: Path) -> list[Path]:
    """Files that hold an id as text, as eight bytes, or in a column of a Parquet file."""
    signs = [str(FIRST)[:6].encode(), *((FIRST + i).to_bytes(8, "little") for i in (1, 50, 299))]
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".parquet":
                content += pq.read_table(path).to_pandas().to_csv().encode()
            if any(sign in content for sign in signs):
                found.append(path)
    return found


def rows_by_content(made: Store) -> list[tuple]:
    """Rows without their subjects, sorted: values and labels."""
    frame = pd.DataFrame(np.nan_to_num(np.hstack([made.values(), made.labels()]), nan=-1))
    return sorted(frame.itertuples(index=False, name=None))


def test_a_store_holds_pseudonyms_and_is_else_the_same(keyed) -> None:
    plain = Store(ingest(keyed.config(privacy=None, data_dir=str(keyed.folder / "plain"))))
    made = Store(ingest(keyed.config()))
    assert ids_in(plain.path), "the scan would find an id"
    assert ids_in(keyed.folder / "data") == []
    assert rows_by_content(made) == rows_by_content(plain)
    subjects = {
        name: made.read(name, ["subject_id"])["subject_id"].to_pylist()
        for name in ("values", "mask", "labels", "splits")
    }
    assert all(len(one) == 32 and int(one, 16) >= 0 for one in subjects["values"])
    assert subjects["values"] == subjects["mask"] == subjects["labels"] == subjects["splits"]
    assert subjects["values"] == sorted(set(subjects["values"]))  # nor does their order tell
    assert made.read("quarantine").schema.names[:2] == ["table_name", "row_number"]


def test_several_shards_make_the_same_subjects(keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Store(ingest(keyed.config()))
    monkeypatch.setattr(shards, "SHARD_ROWS", 900)
    config = keyed.config(data_dir=str(keyed.folder / "sharded"))
    several = Store(ingest(config, prepare=lambda c, w: shards.prepare(c, w, 900)))
    assert len(list((several.path / "values").iterdir())) > 1
    assert ids_in(several.path.parent) == []
    frames = [
        s.read("values").to_pandas().set_index("subject_id").sort_index() for s in (one, several)
    ]
    pd.testing.assert_frame_equal(*frames)


def test_tables_may_write_an_id_differently_and_share_it(keyed) -> None:
    one = Store(ingest(keyed.config()))
    labs = pd.read_csv(keyed.folder / "labs.csv").astype({"id": float})
    keyed.write(".parquet", labs=labs)
    joined = pd.read_csv(keyed.folder / "patients.csv")[["id"]].assign(split="train")
    joined["split"] = np.resize(["train", "tuning", "held_out"], len(joined))
    keyed.write(given=joined)
    config = keyed.config(
        tables__labs__path="labs.parquet",
        tables__given={"path": "given.csv"},
        splits={"table": "given", "column": "split"},
    )
    other = Store(ingest(config))
    tables = [s.read("values").to_pandas() for s in (one, other)]
    pd.testing.assert_frame_equal(*tables)
    assert other.read("splits").num_rows == 300


def test_queries_see_ids_and_their_results_pseudonyms(keyed) -> None:
    one = Store(ingest(keyed.config()))
    query = (
        f"SELECT * FROM patients WHERE id LIKE '{FIRST // 1000}%' AND id IN (SELECT id FROM labs)"
    )
    config = keyed.config(tables__grown={"sql": query}, cohort__table="grown")
    other = Store(ingest(config))
    known = set(one.read("splits")["subject_id"].to_pylist())
    assert 200 < len(set(other.read("splits")["subject_id"].to_pylist()) & known) <= 300


def test_another_key_makes_other_people_and_another_store(
    keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = keyed.config()
    one = Store(ingest(config))
    assert ingest(config) == one.path
    monkeypatch.setenv("EHR_SN_TEST_KEY", OTHER)
    other = Store(ingest(config))
    assert other.path != one.path
    subjects = [set(s.read("splits")["subject_id"].to_pylist()) for s in (one, other)]
    assert not subjects[0] & subjects[1]
    assert rows_by_content(other) == rows_by_content(one)
    for made in (one, other):
        manifest = (made.path / "manifest.json").read_text()
        assert not any(key in manifest for key in (KEY, OTHER))
    with pytest.raises(ConfigError, match=r"pseudonym_key_env: the model was trained with pseud"):
        read_stored(one.manifest["config"], config)
    with pytest.raises(ConfigError, match="the model was trained with pseudonyms"):
        read_stored(one.manifest["config"], keyed.config(privacy=None))
    assert read_stored(other.manifest["config"], config).ingest_sections == config.ingest_sections


@pytest.mark.parametrize(
    ("value", "said"), [(None, "is not set"), ("short", "fewer than 16 bytes")]
)
def test_without_a_good_key_nothing_is_ingested(
    keyed, monkeypatch: pytest.MonkeyPatch, value: str | None, said: str
) -> None:
    monkeypatch.delenv("EHR_SN_TEST_KEY")
    if value:
        monkeypatch.setenv("EHR_SN_TEST_KEY", value)
    with pytest.raises(
        ConfigError, match=rf"hospital\.yaml:\d+: privacy\.pseudonym_key_env.*{said}"
    ):
        ingest(keyed.config())
    assert not list((keyed.folder / "data").rglob("*.parquet"))


def test_meds_has_pseudonyms_and_no_ids(keyed) -> None:
    folder = export_meds(keyed.config(), keyed.folder / "meds")
    assert ids_in(folder) == []
    listed = pq.read_table(folder / SUBJECT_IDS)["source_id"].to_pylist()
    store_of = Store(ingest(keyed.config()))
    assert listed == store_of.read("splits")["subject_id"].to_pylist()


def test_only_the_owner_enters_a_store(keyed) -> None:
    before = os.umask(0o022)
    try:
        made = store.ingest(keyed.config())
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == 0o700
