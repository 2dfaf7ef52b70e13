"""An export full of defects becomes a store by the YAML of docs/data.md alone."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from ehr_sn.config import DATA_ROOT, load_config
from ehr_sn.errors import DataError
from ehr_sn.ingest.store import Store, check, ingest

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
MINUTES, DAYS = "%d.%m.%Y %H:%M", "%d.%m.%Y"
H = pd.Timedelta("1h")


@pytest.fixture
def klinik(tmp_path, monkeypatch):
    """The page's configuration, and its tables written to disk: (configuration, tables)."""
    pieces = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    (text,) = (piece for piece in pieces if piece.startswith("dataset: klinik"))
    (tmp_path / "klinik.yaml").write_text(text, encoding="utf-8")
    folder = tmp_path / "klinik"
    folder.mkdir()
    tables = export(np.random.default_rng(0), 400)
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", sep=";", encoding="cp1252", index=False)
    monkeypatch.setenv(DATA_ROOT, str(folder))
    monkeypatch.chdir(tmp_path)
    return load_config(tmp_path / "klinik.yaml"), tables


def export(rng, patients):
    """Tables of a hospital. Every cell is text, as the export writes it."""
    of = [f"P-{i:04}" for i in range(patients)]
    born = pd.Timestamp("1930-01-01") + pd.to_timedelta(rng.integers(0, 20_000, patients), "D")
    people = pd.DataFrame(
        {
            "PatNr": of,
            "Geburtsdatum": born.strftime(DAYS),
            "Geschlecht": rng.choice(["w", "m", "W", "unbekannt"], patients),
            "Wohnort": "Köln",
        }
    )
    stays = []
    for number in range(3 * patients):
        begun = pd.Timestamp("2018-01-01") + int(rng.integers(0, 900 * 24)) * H
        end = begun + int(rng.integers(30, 300)) * H
        patient = of[rng.integers(patients)]
        stays.append((f"F{number:05}", patient, begun.strftime(MINUTES), end.strftime(MINUTES)))
    faelle = pd.DataFrame(stays, columns=["FallNr", "PatNr", "Aufnahme", "Entlassung"])
    begun = pd.to_datetime(faelle["Aufnahme"], format=MINUTES)

    def at_stays(n, hours):
        stay = rng.integers(0, len(faelle), n)
        return faelle["FallNr"].to_numpy()[stay], begun[stay] + rng.integers(0, hours, n) * H

    tables = {"faelle": pd.concat([faelle, faelle.head(5)]), "patienten": people}
    for ward in ("innere", "chirurgie"):
        fall, when = at_stays(3000, 48)
        code = rng.choice(["GLU", "HB"], 3000)
        unit = np.where(rng.random(3000) < 0.5, "mmol/l", np.where(code == "GLU", "mg/dl", "g/dl"))
        unit[:9] = "Stück"
        metric = np.where(code == "GLU", rng.normal(6, 1, 3000), rng.normal(8.5, 0.5, 3000))
        factor = np.where(unit == "mmol/l", 1, np.where(code == "GLU", 18.016, 1.6114))
        value = [f"{v:.2f}".replace(".", ",") for v in metric * factor]
        value[10:15] = ["hämolytisch"] * 5
        written = when.dt.strftime(MINUTES).to_numpy()
        written[20:23] = "31.02.2019 10:00"
        fall = np.where(np.arange(3000) % 500 == 499, "F99999", fall)  # nobody's
        status = np.where(np.arange(3000) % 100 == 50, "storniert", "final")
        columns = [fall, written, code, value, unit, status]
        names = ["FallNr", "Zeit", "Test", "Wert", "Einheit", "Status"]
        tables[f"labor_{ward}"] = pd.DataFrame(dict(zip(names, columns, strict=True)))
    fall, when = at_stays(2000, 48)
    pressure = [f"{a}/{b}" for a, b in rng.integers([110, 60], [160, 95], (2000, 2))]
    pressure[:30] = ["n. m."] * 30
    tables["vitalwerte"] = pd.DataFrame(
        {"FallNr": fall, "Zeit": when.dt.strftime(MINUTES).to_numpy(), "RR": pressure}
    )
    ill = faelle["FallNr"][rng.random(len(faelle)) < 0.3]
    coded = pd.DataFrame({"FallNr": ill, "ICD": "E11.90"})
    tables["diagnosen"] = pd.concat([coded, coded.head(20)])
    day = begun[: 2 * patients].dt.strftime(DAYS)
    tables["verordnungen"] = pd.DataFrame(
        {"PatNr": faelle["PatNr"][: 2 * patients], "Datum": day, "ATC": "C10AA01"}
    )
    return tables


def test_what_is_wrong_is_counted_and_what_is_right_is_kept(klinik):
    config, tables = klinik
    store = Store(ingest(config))
    stays = tables["faelle"].drop_duplicates()
    assert store.manifest["rows"] == len(stays)
    findings = {
        (finding["where"], finding["message"]): finding["count"]
        for finding in store.manifest["findings"]
    }
    assert findings["faelle", "repeats an earlier row: row set aside"] == 5
    assert findings["labor", "no subject_id: row set aside"] == 12
    assert findings["labor", "Wert: not a number: value made missing"] == 10
    assert sum(n for (_, said), n in findings.items() if "unit is not declared" in said) == 18
    assert findings["labor", "left out, for `where` is not true of them"] == 60
    assert sum(n for (_, said), n in findings.items() if "does not parse as a time" in said) == 6
    rows = store.manifest["event_rows"]["labor"]
    assert rows["read"] == 6000 == rows["left_out"] + rows["set_aside"] + rows["kept"]
    assert store.manifest["tables"]["druck"]["rows"] == 2 * (2000 - 30)

    values = pd.read_parquet(store.path / "values.parquet")
    assert values["glucose.mean"].dropna().between(40, 180).all()
    assert values["hemoglobin.mean"].dropna().between(10, 18).all()
    ill = set(tables["diagnosen"]["FallNr"])
    labels = pd.read_parquet(store.path / "labels.parquet")
    begun = pd.to_datetime(stays["Aufnahme"], format=MINUTES) + 24 * H
    own = stays.assign(prediction_time=begun, subject_id=stays["PatNr"])
    own = own.merge(labels, on=["subject_id", "prediction_time"])
    assert (own[own["FallNr"].isin(ill)]["diabetes"] == 1).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoding": None}, "name its `encoding`"),
        ({"delimiter": ","}, "is that the `delimiter`?"),
        ({"decimal": "."}, 'hold a decimal comma: declare `decimal: ","`'),
        ({"clock": {"unit": "timestamp"}}, "does not parse as a time"),
    ],
)
def test_what_the_page_names_is_said(klinik, tmp_path, changes, said):
    content = yaml.safe_load((tmp_path / "klinik.yaml").read_text(encoding="utf-8"))
    content |= {key: value for key, value in changes.items() if key == "clock"}
    for table in content["tables"].values():
        if "path" in table and "clock" not in changes:
            table |= changes
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(content))
    config = load_config(tmp_path / "wrong.yaml")
    with pytest.raises(DataError, match=re.escape(said)):
        check(config)
