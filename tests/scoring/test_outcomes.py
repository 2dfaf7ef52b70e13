"""Labels from a stranger's file: what each row means, and what is set aside instead of guessed."""

import gzip
import hmac
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ehr_sn.config import Config
from ehr_sn.errors import DataError
from ehr_sn.scoring import outcomes
from ehr_sn.scoring.outcomes import Outcomes, read_outcomes

HEADER = "subject_id,prediction_time,disease,label\n"
KEY = "EHR_SN_TEST_KEY"

Read = Callable[..., Outcomes]


def write_scores(folder: Path, subjects: list[Any], time: str = "2020-01-01 02:00") -> None:
    """Scores of two diseases: a subject's place in the list, as a share, is the probability."""
    rows = {
        "subject_id": subjects,
        "prediction_time": pd.Timestamp(time),
        "probability": np.arange(len(subjects)) / 10,
    }
    frame = pd.DataFrame(rows)
    both = [frame.assign(disease=name) for name in ("diabetes", "gout")]
    pd.concat(both).astype({"disease": "category"}).to_parquet(folder / "scores.parquet")


@pytest.fixture
def read(hospital, tmp_path: Path) -> Read:
    """A function: text of a CSV file, or a frame for a Parquet file → what is known by it."""

    def read(
        table: str | pd.DataFrame, config: Config | None = None, name: str = "labels.csv"
    ) -> Outcomes:
        path = tmp_path / name
        if isinstance(table, str):
            path.write_text(table)
        else:
            path = path.with_suffix(".parquet")
            table.to_parquet(path)
        return read_outcomes(config or hospital.config(), tmp_path, path)

    write_scores(tmp_path, [6, 7, 8, 9])
    return read


def known(found: Outcomes) -> dict[tuple[str, float], bool]:
    rows = zip(found.disease, found.probability, found.positive, strict=True)
    return {(str(disease), float(p)): bool(y) for disease, p, y in rows}


def row(subject: str = "7", time: str = "2020-01-01T02:00", label: str = "1") -> str:
    return f"{HEADER}{subject},{time},diabetes,{label}\n"


SEVEN = {("diabetes", 0.1): True}


@pytest.mark.parametrize(
    "time",
    [
        "2020-01-01T02:00",
        "2020-01-01 02:00:00",
        "2020-01-01T02:00:00.000",
        "2020-01-01T02:00Z",
        "2020-01-01T04:00+02:00",
        "2019-12-31T23:00:00-03",
    ],
)
def test_a_moment_is_iso_8601_and_in_utc_unless_it_has_an_offset(read: Read, time: str) -> None:
    found = read(row(time=time))
    assert (known(found), found.unused) == (SEVEN, {})


@pytest.mark.parametrize(
    "time",
    [
        "20-01-01",
        "01/01/20",
        "01.01.2020",
        "2020-01-01 02:00 BST",
        "2020-01-01 02:00 PM",
        "2020-01-01 02:00 UTC",
        "2020-1-1",
        "20200101",
        "2020-02-30",
        "epoch",
        "infinity",
        "1577844000",
        "0",
        "NA",
    ],
)
def test_any_other_time_sets_its_row_aside(read: Read, time: str) -> None:
    found = read(row(time=time))
    assert (known(found), found.unused) == ({}, {outcomes.NO_MOMENT: 1})


@pytest.mark.parametrize(
    ("time", "unused"),
    [
        (datetime(2020, 1, 1, 2), {}),
        (datetime(2020, 1, 1, 2, tzinfo=UTC), {}),
        (pd.Timestamp("2020-01-01T04:00+02:00"), {}),
        ("2020-01-01T02:00", {}),
        (None, {outcomes.NO_TIME: 1}),
        (date(2020, 1, 1), {outcomes.OTHER_TIME: 1}),
        (1577844000.0, {outcomes.NO_MOMENT: 1}),
    ],
)
def test_times_of_a_parquet_file_are_what_their_type_says(
    read: Read, monkeypatch: pytest.MonkeyPatch, time: Any, unused: dict[str, int]
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    other = {"subject_id": 6, "prediction_time": time, "disease": "diabetes", "label": None}
    frame = pd.DataFrame([other, other | {"subject_id": 7, "label": 1.0}])
    found = read(frame)
    assert found.unused == {reason: 2 * n for reason, n in unused.items()}
    assert known(found) == ({} if unused else SEVEN)


def test_a_date_is_its_midnight_and_all_dates_of_a_file_are_read_alike(
    read: Read, tmp_path: Path
) -> None:
    write_scores(tmp_path, [6, 7], time="2020-02-03")
    # DuckDB's sniffer would take the whole column for dates that begin with the year, or the day.
    found = read(f"{HEADER}6,20-02-03,diabetes,0\n7,20-02-03,diabetes,1\n")
    assert (known(found), found.unused) == ({}, {outcomes.NO_MOMENT: 2})
    assert known(read(row(time="2020-02-03"))) == SEVEN


@pytest.mark.parametrize(
    ("label", "positive"),
    [
        ("1", True),
        ("1.0", True),
        ("true", True),
        ("TRUE", True),
        ("0", False),
        ("0.0", False),
        ("False", False),
    ],
)
def test_a_label_is_1_0_true_or_false(read: Read, label: str, positive: bool) -> None:
    found = read(row(label=label))
    assert (known(found), found.unused) == ({("diabetes", 0.1): positive}, {})


@pytest.mark.parametrize("label", ["2", "-1", "0.5", "10", "yes", "E11", "NA", "nan", "1e0"])
def test_any_other_label_refuses_the_table_with_the_count_and_no_value(
    read: Read, label: str
) -> None:
    rest = f"70,2020-01-01T02:00,diabetes,1\n71,,asthma,{label}\n"
    said = r"labels\.csv: has 2 rows whose label is none of 1, 0, true, false and empty; the first "
    with pytest.raises(DataError, match=said + "is row 1 below") as error:
        read(row(label=label) + rest)
    assert f"'{label}'" not in str(error.value)
    with pytest.raises(DataError, match="has 1 row whose label"):
        read(row() + f"9,2020-01-01T02:00,diabetes,{label}\n")


def test_an_empty_label_is_unknown_and_meets_its_score(read: Read) -> None:
    found = read(row(label=""))
    assert (known(found), found.unused, found.met, found.rows) == ({}, {}, 1, 1)
    frame = pd.DataFrame({"subject_id": [6, 7], "label": [True, False], "disease": "diabetes"})
    frame["prediction_time"] = pd.Timestamp("2020-01-01 02:00")
    assert known(read(frame)) == {("diabetes", 0.0): True, ("diabetes", 0.1): False}


@pytest.mark.parametrize("subject", ["", " ", "NA", "NULL", r"\N"])
def test_who_has_no_id_is_nobody(read: Read, tmp_path: Path, subject: str) -> None:
    for subjects in ([7, 8], ["7", "NA", "NULL", r"\N"]):
        write_scores(tmp_path, subjects)
        assert read(row(subject)).unused == {outcomes.NO_SUBJECT: 1}


def test_subjects_are_compared_as_numbers_where_all_are_numbers(read: Read, tmp_path: Path) -> None:
    for same in ("7", "7.0", " 7 "):
        assert known(read(row(same))) == SEVEN
    for other in ("007", "7.6", "77", "A7"):
        assert read(row(other)).unused == {outcomes.OTHER_SUBJECT: 1}
    write_scores(tmp_path, ["A7", "007", "7"])
    assert known(read(row("007"))) == {("diabetes", 0.1): True}
    assert known(read(row("A7"))) == {("diabetes", 0.0): True}
    assert read(row("7.0")).unused == {outcomes.OTHER_SUBJECT: 1}


@pytest.mark.parametrize("subjects", [[6, 7, 70], ["6", "7", "007", "7.0", "A7"]])
def test_pseudonyms_change_nothing_of_who_is_who(
    hospital, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subjects: list[Any]
) -> None:
    monkeypatch.setenv(KEY, "k" * 32)
    config = hospital.config(privacy={"pseudonym_key_env": KEY})
    digest = [hmac.digest(b"k" * 32, str(s).encode(), "sha256").hex()[:32] for s in subjects]
    ids = ("6", "7.0", "007", "A7", "8")
    table = HEADER + "".join(f"{i},2020-01-01T02:00,diabetes,{i == '007':d}\n" for i in ids)
    write_scores(tmp_path, subjects)
    plain = read(table)
    write_scores(tmp_path, digest)
    hidden = read(table, config)
    assert known(hidden) == known(plain)
    assert hidden.unused == plain.unused


def test_who_or_what_was_not_scored_is_counted(read: Read) -> None:
    found = read(
        f"{HEADER}7,2020-01-01T02:00,diabetes,1\n"
        "70,2020-01-01T02:00,diabetes,1\n71,2020-01-01T02:00,diabetes,\n"
        "7,2020-01-01T03:00,diabetes,1\n7,2020-01-01T02:00,asthma,1\n7,2020-01-01T02:00,,1\n"
    )
    assert known(found) == SEVEN
    assert found.unused == {
        outcomes.OTHER_DISEASE: 2,
        outcomes.OTHER_SUBJECT: 2,
        outcomes.OTHER_TIME: 1,
    }
    assert (found.met, found.rows) == (1, 6)


def test_labels_that_contradict_each_other_refuse_the_table(read: Read) -> None:
    two = "6,2020-01-01T02:00,diabetes,1\n6.0,2020-01-01T03:00+01:00,diabetes,0\n"
    said = "has 2 rows whose label differs from another row's of the same subject, time and disease"
    with pytest.raises(DataError, match=said):
        read(f"{HEADER}{two}7,2020-01-01T02:00,diabetes,1\n")
    with pytest.raises(DataError, match="has 2 rows whose label differs"):  # nor where none is met
        read(f"{HEADER}{two.replace('6', '66')}7,2020-01-01T02:00,diabetes,1\n")


def test_a_label_that_is_there_twice_counts_once(read: Read) -> None:
    found = read(
        f"{HEADER}7,2020-01-01T02:00,diabetes,1\n7,2020-01-01 02:00,diabetes,true\n"
        "7,2020-01-01T02:00,diabetes,\n7,2020-01-01T02:00,gout,0\n"
        "8,2020-01-01T02:00,diabetes,\n8,2020-01-01T02:00,diabetes,0\n"
    )
    assert known(found) == SEVEN | {("gout", 0.1): False, ("diabetes", 0.2): False}
    assert len(found.disease) == 3  # nobody counts twice
    assert found.unused == {outcomes.REPEATED: 1}
    assert (found.met, found.rows) == (5, 6)


def test_rows_of_one_subject_are_told_by_their_code(read: Read) -> None:
    found = read(
        f"{HEADER}8,2020-01-01T02:00,gout,1\n7,2020-01-01T02:00,gout,0\n"
        "7,2020-01-01T02:00,diabetes,1\n9,2020-01-01T02:00,diabetes,\n"
    )
    by_score = zip(found.probability, found.subject, strict=True)
    assert sorted(by_score) == [(0.1, 0), (0.1, 0), (0.2, 1)]
    assert found.subject.dtype == np.int64


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Kolkata", "Pacific/Kiritimati"])
def test_the_time_zone_of_the_machine_changes_nothing(
    read: Read, monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    monkeypatch.setenv("TZ", zone)
    for time in ("2020-01-01T02:00", "2020-01-01T04:00+02:00", "2019-12-31T23:00:00-03"):
        assert known(read(row(time=time))) == SEVEN


def test_the_delimiter_is_the_one_that_gives_most_of_the_columns_and_of_equals_the_first(
    read: Read,
) -> None:
    header = HEADER.strip().replace(",", ";")
    assert known(read(f"{header};a,b\n7;2020-01-01T02:00;diabetes;1;x,y\n")) == SEVEN
    with pytest.raises(DataError, match="lacks prediction_time, disease, label"):
        read("subject_id\n7\n")


def test_a_data_set_without_prediction_times_needs_none(hospital, read: Read) -> None:
    config = hospital.config(
        events=None,
        features={"static": {"age": {"column": "age"}}},
        labels={"diabetes": {"positive": "ill == 1", "negative": "ill == 0"}},
        cohort={"table": "patients", "subject_id": "id"},
        tables={"patients": {"path": "patients.csv"}},
    )
    assert known(read("subject_id,disease,label\n7,diabetes,1\n8,diabetes,\n", config)) == SEVEN
    assert known(read(row(time="12.3.2021"), config)) == SEVEN  # a column that is not asked for
    with pytest.raises(DataError, match="has 2 rows whose label differs"):
        read(f"{HEADER}7,2020-01-01,diabetes,1\n7,2021-01-01,diabetes,0\n", config)
    with pytest.raises(DataError, match=r"lacks label; give subject_id, disease, label, or a"):
        read("subject_id,disease\n7,diabetes\n", config)
    with pytest.raises(DataError, match="lacks prediction_time; give subject_id, prediction_time,"):
        read("subject_id,disease,label\n7,diabetes,1\n")


def test_every_common_way_to_write_the_file_is_read(hospital, read: Read, tmp_path: Path) -> None:
    for sign in (";", "\t", "|"):
        assert known(read(row().replace(",", sign))) == SEVEN
    assert known(read("\ufeff" + row().replace("\n", "\r\n"))) == SEVEN
    zipped = tmp_path / "labels.csv.gz"
    zipped.write_bytes(gzip.compress(row().encode()))
    assert known(read_outcomes(hospital.config(), tmp_path, zipped)) == SEVEN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Jane Doe",
        f"{HEADER}7,2020-01-01,Jane Doe\n",
        row("7,Jane Doe"),
        row('"Jane Doe'),
        row("Jane Doe é"),
        HEADER.replace("disease", "label"),
    ],
)
def test_what_is_no_table_is_refused_without_a_word_of_it(
    hospital, read: Read, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"labels\.csv: ") as error:
        read_outcomes(hospital.config(), tmp_path, path)
    assert "Doe" not in str(error.value)
    with pytest.raises(DataError, match=r"copy\.parquet: is no store"):
        read_outcomes(hospital.config(), tmp_path, path.rename(tmp_path / "copy.parquet"))
