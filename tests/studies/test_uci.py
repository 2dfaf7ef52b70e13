"""Small tables: what may be a feature, how rows are dealt, and that nothing held out is seen."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from ehr_sn import studies
from ehr_sn.errors import ConfigError, DataError
from ehr_sn.studies import uci
from ehr_sn.studies.tables import TableConfig, read_table

SMALL = {
    "study": "uci",
    "repeats": 1,
    "folds": 3,
    "removed": [0.5],
    "training": {"hidden": [8], "max_epochs": 6, "learning_rates": [0.01, 0.03]},
    "variants": {
        "zero": {"method": "zero"},
        "sparsity_normalization": {"method": "sparsity_normalization"},
        "constant_scale": {"method": "constant_scale"},
        "zero · tuned": {"method": "zero"},
    },
    "tables": {"iris": {"sklearn": "iris", "complete": True}},
}


def small(folder: Path, **changes: object) -> uci.Config:
    path = folder / "small.yaml"
    content = SMALL | {"data_dir": str(folder / "data")} | changes
    path.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
    return studies.load_study("uci", path)


def ward() -> pd.DataFrame:
    n = 120
    return pd.DataFrame(
        {
            "ward": ["north"] * n,
            "person": np.arange(n) // 2,
            "age": [np.nan, 400.0, *np.linspace(20, 80, n - 2)],
            "age_measured": ["f"] + ["t"] * (n - 1),
            "colour": [None, "red", "green", "blue"] * (n // 4),
            "flag": ["no", "yes"] * (n // 2),
            "grade": [1, 2, 3] * (n // 3),
            "ill": [None] + ["b", "a", "c"] * (n // 3 - 1) + ["a", "b"],
        }
    )


def test_a_table_holds_what_its_configuration_lets_in(tmp_path: Path) -> None:
    ward().to_parquet(tmp_path / "ward.parquet")
    how = TableConfig(
        file="ward.parquet",
        label="ill",
        positive=("a",),
        drop=("*_measured", "ward"),
        categories=("grade",),
        plausible={"age": (0, 120)},
        group="person",
    )
    table = read_table(how, tmp_path, "tables.ward")
    assert table.x.shape == (119, 1 + 3 + 1 + 3)  # the row without a label is left out
    assert np.isnan(table.x[0, 0])  # 400 years
    colours = table.x[:, 1:4]
    assert np.isnan(colours).all(axis=1).sum() == 29
    assert (np.nansum(colours, axis=1) == ~np.isnan(colours[:, 0])).all()
    assert set(table.x[:, 4]) == {0, 1}
    assert table.labels.shape == (119, 1)
    assert table.labels.sum() == (ward().ill == "a").sum()


def test_each_class_of_some_size_is_predicted_against_the_others(tmp_path: Path) -> None:
    frame = ward()[["age", "ill"]]
    frame.loc[1:5, "ill"] = "rare"
    frame.to_parquet(tmp_path / "ward.parquet")
    table = read_table(TableConfig(file="ward.parquet", label="ill"), tmp_path, "tables.ward")
    assert table.labels.shape == (119, 3)
    assert (table.labels.sum(axis=1) == 0).sum() == 5


def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    ward().to_parquet(tmp_path / "ward.parquet")
    how = TableConfig(file="ward.parquet", label="il", positive=("a",))
    with pytest.raises(ConfigError, match="no column 'il'; did you mean 'ill'"):
        read_table(how, tmp_path, "tables.ward")


def test_rows_of_a_group_and_rows_alike_are_never_on_two_sides_of_a_split(tmp_path: Path) -> None:
    ward().to_parquet(tmp_path / "ward.parquet")
    how = TableConfig(file="ward.parquet", label="ill", positive=("a",), group="person")
    frame = pd.concat([ward()[["age", "flag", "ill"]]] * 2).assign(ill=["a", "b"] * 120)
    frame.to_parquet(tmp_path / "twice.parquet")
    alike = TableConfig(file="twice.parquet", label="ill", positive=("a",))
    for one in (how, alike):
        table = read_table(one, tmp_path, "tables.ward")
        folds = uci._folds(table, 5, seed=0)
        assert set(folds) == set(range(5))
        where = pd.Series(folds).groupby(table.groups).nunique()
        assert (where == 1).all()
        assert len(where) < len(folds)


def test_held_out_labels_do_not_reach_the_networks(tmp_path: Path) -> None:
    config = small(tmp_path)
    job = uci.Job("iris", 0.5, "minmax", 0)
    table = read_table(config.tables["iris"], None, "tables.iris")
    x, fold = uci._removed(table.x, 0.5, 0), uci._folds(table, 3, 0)
    variant = config.variants["zero"]
    honest, _ = uci._out_of_fold(config, variant, "zero", job, x, table.labels, fold)
    turned = table.labels.copy()
    turned[fold == 1] = 1 - turned[fold == 1]
    again, _ = uci._out_of_fold(config, variant, "zero", job, x, turned, fold)
    assert (again[:, :, fold == 1] == honest[:, :, fold == 1]).all()
    assert (again[:, :, fold == 2] != honest[:, :, fold == 2]).any()
    x[fold == 1] += 1
    moved, _ = uci._out_of_fold(config, variant, "zero", job, x, table.labels, fold)
    assert (moved[:, :, fold == 2] != honest[:, :, fold == 2]).any()


def test_a_study_runs_without_any_service_and_resumes_where_it_stopped(tmp_path: Path) -> None:
    config = small(tmp_path, repeats=2)
    names = uci.cells(config, None)
    assert names == ["iris, 50% removed, min-max, repeat 1", "iris, 50% removed, min-max, repeat 2"]
    first = studies.finish_cell(config, None, names[0])
    (kept,) = (tmp_path / "data" / "studies" / "uci").iterdir()
    written = kept.stat().st_mtime_ns
    told: list[tuple[int, int, str]] = []
    result = studies.run(config, None, lambda *progress: told.append(progress))
    assert told == [(0, 2, names[0]), (1, 2, names[1])]
    assert kept.stat().st_mtime_ns == written
    assert result.parts[0] == first
    assert len(result.values("iris, 50% removed, min-max", "zero")) == 6
    assert all(0.5 < score.value <= 1 for score in result.scores)
    chosen = result.chosen()["iris, 50% removed, min-max · zero · tuned"]
    assert chosen.count("lr 0.0") == 6
    assert not result.friedman  # one table ranks nothing
    more = small(tmp_path, repeats=2, removed=[0.5, 0.7])  # keeps what is finished
    assert [studies.finish_cell(more, None, name) for name in names] == list(result.parts)


def test_ranks_are_over_tables_of_a_rate_and_over_all_each_once(tmp_path: Path) -> None:
    tables = {
        "iris": {"sklearn": "iris", "complete": True},
        "wine": {"sklearn": "wine", "complete": True},
        "wine_again": {"sklearn": "wine", "complete": True, "ranked": False},
        "whole": {"sklearn": "breast_cancer", "positive": [0]},
    }
    config = small(tmp_path, tables=tables, removed=[0.1, 0.5], repeats=2)
    result = uci.summarise(config, None, [])
    at_half = ["iris, 50% removed, min-max", "wine, 50% removed, min-max"]
    assert result.rankings["50% removed, min-max"] == at_half
    assert result.rankings["as they are, min-max"] == ["whole, min-max"]
    assert result.rankings["all tables, min-max"] == [*at_half, "whole, min-max"]
    assert result.ranked == ["zero", "sparsity_normalization"]  # neither scaled nor tuned ones


def test_the_same_cell_comes_out_the_same(tmp_path: Path) -> None:
    config = small(tmp_path)
    (cell,) = uci.cells(config, None)
    assert uci.run_cell(config, None, cell) == uci.run_cell(config, None, cell)


def test_a_misspelt_key_names_file_line_and_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"small.yaml:\d+: training.hiden: .*'hidden'"):
        small(tmp_path, training={"hiden": [8]})
    with pytest.raises(ConfigError, match=r"tables.iris.sklern: .*'sklearn'"):
        small(tmp_path, tables={"iris": {"sklern": "iris"}})
    with pytest.raises(ConfigError, match=r"variants.zero.method: .*did you mean 'zero'"):
        small(tmp_path, variants={"zero": {"method": "zeros"}})
    with pytest.raises(ConfigError, match=r"variants: sparsity_normalization is missing"):
        small(tmp_path, variants={"zero": {"method": "zero"}})
    with pytest.raises(ConfigError, match=r"tables.iris.without: .*did you mean 'zero'"):
        small(tmp_path, tables={"iris": {"sklearn": "iris", "without": ["zer"]}})
    with pytest.raises(ConfigError, match="no study 'vison'; did you mean 'vision'"):
        studies.load_study("vison")
    with pytest.raises(ConfigError, match="study: is 'vision'"):
        small(tmp_path, study="vision")


def test_a_file_that_is_not_below_data_is_named(tmp_path: Path) -> None:
    table = {"file": "horses.parquet", "label": "ill", "positive": ["a"]}
    config = small(tmp_path, tables={"horses": table})
    with pytest.raises(DataError, match=r"small.yaml:\d+: tables.horses.file: .*horses.parquet"):
        uci.files(config, tmp_path)


def test_the_clinical_tables_come_without_their_traps(shared_data: Callable[[str], Path]) -> None:
    folder = shared_data("uci")
    config = studies.load_study("uci")
    tables = {
        name: read_table(table, folder, name) for name, table in config.tables.items() if table.file
    }
    assert len(uci.files(config, folder)) == len(tables) == 12
    prevalence = {name: round(float(t.labels.mean()), 2) for name, t in tables.items()}
    assert prevalence["heart_disease"] == 0.55
    assert prevalence["thyroid"] == 0.26
    assert prevalence["sick"] == 0.06
    # Each hormone, and not the flag that says whether it was measured.
    assert tables["thyroid"].x.shape == (9172, 22)
    assert tables["sick"].x.shape == (3772, 21)
    assert tables["horse_colic"].groups.max() + 1 == 283
    assert tables["dermatology"].labels.shape == (366, 5)
    chol = 0.033 + 172 / 920
    heart = pd.read_parquet(folder / "heart_disease_4sites.parquet")
    place = 1 + 1 + 4 + 1  # age, sex and four kinds of pain, blood pressure
    assert list(heart.columns[:5]) == ["age", "sex", "cp", "trestbps", "chol"]
    assert np.isnan(tables["heart_disease"].x[:, place]).mean() == pytest.approx(chol, abs=0.001)
