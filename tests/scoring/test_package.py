"""Packages: they score as the trained cell does, a row the same in any company, or not at all."""

import json
import subprocess
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ehr_sn.config import baseline_is_installed
from ehr_sn.errors import DataError, EhrSnError
from ehr_sn.evaluate.metrics import auroc, brier
from ehr_sn.models.predict import load_predictor
from ehr_sn.models.train import NOTHING, Cell, cell_path, comparisons
from ehr_sn.scoring.package import (
    BLOCK,
    CHUNK,
    Package,
    Scores,
    read_package,
    score_many,
    write_package,
)

FILES = {"model.safetensors", "package.json", "SHA256SUMS"}


@pytest.fixture(scope="session")
def folders(clinic, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(method, disease) → the folder of its package."""
    folder = tmp_path_factory.mktemp("packages")
    return {
        (method, disease): write_package(
            clinic.config,
            clinic.store,
            clinic.comparison(method),
            disease,
            folder / f"{method}-{disease}",
        )
        for method in ("zero+mask", "multiple_imputation")
        for disease in clinic.store.diseases
    }


@pytest.fixture(scope="session")
def packages(folders: dict[tuple[str, str], Path]) -> list[Package]:
    return [read_package(folder) for folder in folders.values()]


@pytest.fixture(scope="session")
def of_baselines(with_baselines, tmp_path_factory: pytest.TempPathFactory) -> list[Package]:
    """Packages of both diseases of every baseline and blend."""
    folder = tmp_path_factory.mktemp("baselines")
    config, store = with_baselines.config, with_baselines.store
    return [
        read_package(
            write_package(config, store, comparison, disease, folder / f"{comparison[2]}-{disease}")
        )
        for comparison in comparisons(config)
        if comparison[0] == NOTHING
        for disease in store.diseases
    ]


def same(one: Scores, other: Scores, rows: slice = slice(None)) -> bool:
    """Bit for bit."""
    return all(
        getattr(one, name).tobytes() == getattr(other, name)[rows].tobytes()
        for name in ("probability", "spread", "observed")
    )


def many_rows(values: np.ndarray, n: int) -> np.ndarray:
    """Rows like those of the store, and some without any entry."""
    rng = np.random.default_rng(0)
    rows = values[rng.integers(len(values), size=n)] + rng.normal(0, 1, (n, 1))
    rows[::97] = np.nan
    return rows.astype(np.float32)


def test_it_scores_as_the_trained_cell_predicts_but_calibrated(clinic, packages) -> None:
    check_predictions(clinic, packages)


def check_predictions(clinic, packages) -> None:
    values = clinic.store.values()[:300]
    for package in packages:
        comparison = package.about["comparison"].values()
        predict = load_predictor(clinic.config, clinic.store, Cell(*comparison, 0))
        seeds = predict(values)[clinic.store.diseases.index(package.disease)]
        scores = package.score(values)
        expected = package.calibration(seeds.astype(float).mean(axis=0))
        np.testing.assert_allclose(scores.probability, expected, atol=1e-6)
        if package.about["seeds"] > 1:
            spread = package.calibration(seeds).std(axis=0, ddof=1)
            np.testing.assert_allclose(scores.spread, spread, atol=1e-6)
        np.testing.assert_array_equal(scores.observed, (~np.isnan(values)).sum(axis=1))


def test_a_row_scores_the_same_alone_and_among_many_by_one_model_and_by_several(
    clinic, packages
) -> None:
    check_company(packages, many_rows(clinic.store.values(), 2 * CHUNK + 5))


def check_company(packages, rows: np.ndarray) -> None:
    together = score_many(packages, rows)
    for package, scores in zip(packages, together, strict=True):
        assert same(package.score(rows), scores)
        for i in (0, 1, BLOCK - 1, CHUNK, len(rows) - 1):
            assert same(package.score(rows[i : i + 1]), scores, slice(i, i + 1))
        backwards = package.score(np.asfortranarray(rows[: BLOCK + 7][::-1]))
        assert same(backwards, scores, np.s_[BLOCK + 6 :: -1])
        assert np.isfinite(scores.probability).all()
    assert not any(len(scores.probability) for scores in score_many(packages, rows[:0]))


def test_baselines_score_as_trained_and_a_row_the_same_in_any_company(
    with_baselines, of_baselines, packages
) -> None:
    check_predictions(with_baselines, of_baselines)
    rows = many_rows(with_baselines.store.values(), CHUNK + 5)
    check_company([*packages[:1], *of_baselines], rows)


def test_what_a_baseline_draws_nothing_for_is_kept_once(of_baselines) -> None:
    seeds = {p.about["comparison"]["architecture"]: p.about["seeds"] for p in of_baselines}
    assert seeds == {
        "hist_gradient_boosting": 2,
        "logistic_regression": 1,
        "boosting+masked_copies": 2,
        "lightgbm": 2,
        "of_all_kinds": 2,
        "of_draws": 2,
    }
    values = np.zeros((3, 7), dtype=np.float32)
    for package in of_baselines:
        assert np.isnan(package.score(values).spread).all() == (package.about["seeds"] == 1)


def test_members_of_a_blend_score_with_other_models_of_their_kind(packages, of_baselines) -> None:
    together = packages + of_baselines
    parts = {part.alike for package in together for part in package.parts}
    assert parts == {part.alike for package in together[:-4] for part in package.parts}


def test_a_blend_is_not_kept_while_a_member_s_cell_is_gone(with_baselines, tmp_path: Path) -> None:
    config, store = with_baselines.config, with_baselines.store
    member = cell_path(config, store, Cell(NOTHING, NOTHING, "logistic_regression", 0))
    member.rename(member.with_suffix(".away"))
    try:
        with pytest.raises(EhrSnError, match="of_all_kinds was not trained"):
            write_package(
                config, store, (NOTHING, NOTHING, "of_all_kinds"), "diabetes", tmp_path / "a"
            )
    finally:
        member.with_suffix(".away").rename(member)


@pytest.mark.skipif(baseline_is_installed("xgboost"), reason="xgboost is installed")
@pytest.mark.parametrize("name", ["lightgbm", "of_draws"])
def test_a_package_whose_library_is_absent_says_which(
    of_baselines, tmp_path: Path, name: str
) -> None:
    folder = next(p.folder for p in of_baselines if name in p.folder.name)
    assert "lightgbm" in json.loads((folder / "package.json").read_text())["versions"]
    for file in FILES:
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    about = (folder / "package.json").read_text().replace('"lightgbm"', '"xgboost"')
    (tmp_path / "package.json").write_text(about)
    subprocess.run(
        "sha256sum model.safetensors package.json > SHA256SUMS",
        shell=True,
        cwd=tmp_path,
        check=True,
    )
    with pytest.raises(EhrSnError, match=r"xgboost, .* pip install 'ehr-sn\[xgboost\]'"):
        read_package(tmp_path)


def test_diseases_of_one_method_share_its_rows_and_one_forward_pass(packages) -> None:
    zero, other, *drawn = packages
    assert [part.alike for part in zero.parts] == [part.alike for part in other.parts]
    assert [len(package.parts) for package in drawn] == [2, 2]  # a draw for each seed
    assert [part.alike for part in drawn[0].parts] == [part.alike for part in drawn[1].parts]
    assert len({part.alike for package in packages for part in package.parts}) == 3


def test_the_same_cell_gives_the_same_bytes(clinic, folders, tmp_path: Path) -> None:
    folder = folders["zero+mask", "diabetes"]
    again = write_package(
        clinic.config, clinic.store, clinic.comparison(), "diabetes", tmp_path / "again"
    )
    assert {path.name for path in again.iterdir()} == FILES
    for name in FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=again, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]  # nothing unfinished is left


def test_it_says_what_it_was_trained_on_in_groups_of_eleven_or_more(clinic, packages) -> None:
    about = deepcopy(packages[0].about)
    values = clinic.store.values()[clinic.store.splits()[:, 0] == "train"]
    training = about["training"]
    assert training["rows"] == len(values)
    for name, column in zip(clinic.store.feature_names, values.T, strict=True):
        assert training["missing_rate"][name] == pytest.approx(np.isnan(column).mean())
        bins = training["values"][name]
        known = column[~np.isnan(column)]
        assert bins["rows"] == len(known)
        assert sum(bins["shares"]) == pytest.approx(1)
        assert min(share for share in bins["shares"] if share) * len(known) > 10.5
        beyond = known[known >= max(bins["edges"])]
        assert len(beyond) >= 11  # nobody's value is an edge, unless 11 have it
    assert sum(about["scores"]["shares"]) == pytest.approx(1)
    assert about["scores"]["rows"] == (clinic.store.splits()[:, 0] == "tuning").sum()  # all of them
    glucose = next(f for f in about["features"] if f["name"] == "glucose.last")
    assert (glucose["unit"], glucose["plausible"], glucose["aggregate"]) == (
        "mg/dL",
        [20, 400],
        "last",
    )
    assert about["config"] == json.loads(json.dumps(clinic.config.ingest_sections))
    ids = clinic.store.read("values", ["subject_id"])["subject_id"].to_pylist()
    assert training["codes"]["labs"]["codes"].keys() == {"glucose", "pressure"}
    text = json.dumps(about | {"training": training | {"codes": None}})  # whose counts look alike
    assert not any(f'"{i}"' in text or f" {i}," in text for i in ids)


def test_calibration_changes_no_ranking_and_is_judged_on_subjects_it_was_not_fitted_on(
    clinic, packages
) -> None:
    store = clinic.store
    tuning = store.splits()[:, 0] == "tuning"
    for package in packages[:2]:
        y = store.labels()[tuning, store.diseases.index(package.disease)]
        scores = package.score(store.values()[tuning])
        figures = package.about["figures"]
        known = ~np.isnan(y)
        assert figures["n"] == known.sum()
        assert figures["auroc"] == pytest.approx(auroc(y[known], scores.probability[known]))
        assert scores.probability[known].mean() == pytest.approx(y[known].mean(), abs=1e-3)
        assert figures["calibration_slope"] != pytest.approx(1, abs=1e-4)  # as it would be refitted
        assert figures["calibration_slope"] == pytest.approx(1, abs=0.2)
        assert abs(figures["calibration_intercept"]) < 0.1


def test_what_is_reported_of_a_model_is_of_rows_that_chose_nothing(clinic, packages) -> None:
    held_out = clinic.store.splits()[:, 0] == "held_out"
    package = packages[0]
    y = clinic.store.labels()[held_out, clinic.store.diseases.index(package.disease)]
    p, known = package.score(clinic.store.values()[held_out]).probability, ~np.isnan(y)
    assert package.reported["n"] == known.sum() != package.about["figures"]["n"]
    assert package.reported["auroc"] == pytest.approx(auroc(y[known], p[known]))
    assert package.reported["brier"] == pytest.approx(brier(y[known], p[known]))
    older = {k: v for k, v in package.about.items() if k != "held_out"}
    assert replace(package, about=older).reported == package.about["figures"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_an_altered_or_missing_file_is_refused(folders, tmp_path: Path, name: str) -> None:
    source = folders["zero+mask", "diabetes"]
    for file in FILES:
        (tmp_path / file).write_bytes((source / file).read_bytes())
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 3] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EhrSnError, match="is not as it was written"):
        read_package(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(EhrSnError, match="holds no model"):
        read_package(tmp_path)


def test_what_cannot_be_scored_or_kept_is_refused_by_name(clinic, packages, tmp_path: Path) -> None:
    package = packages[0]
    with pytest.raises(DataError, match=r"rows of 7 features, not an array of \(1, 3\)"):
        package.score(np.zeros((1, 3), dtype=np.float32))
    with pytest.raises(DataError, match="age: holds infinity"):
        package.score(np.full((1, 7), np.inf, dtype=np.float32))
    with pytest.raises(EhrSnError, match="did you mean 'diabetes'"):
        write_package(clinic.config, clinic.store, clinic.comparison(), "diabets", tmp_path / "a")
    untrained = ("mean", "standard", "mlp")
    with pytest.raises(EhrSnError, match="was not trained"):
        write_package(clinic.config, clinic.store, untrained, "diabetes", tmp_path / "a")
    with pytest.raises(EhrSnError, match="exists already"):
        write_package(clinic.config, clinic.store, clinic.comparison(), "diabetes", tmp_path)
