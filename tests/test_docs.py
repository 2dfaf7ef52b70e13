"""What README and docs/ say runs as they say it."""

import re
from pathlib import Path

import pytest
import yaml

from ehr_sn.config import load_config
from ehr_sn.ingest.fhir import RESOURCES
from ehr_sn.models.methods import method_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_run(page: Path) -> None:
    for snippet in blocks(page, "python"):
        exec(compile(snippet, page.name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_piece_of_configuration_may_take_its_place_in_the_example(tmp_path: Path) -> None:
    first, *rest = map(yaml.safe_load, blocks(ROOT / "docs" / "data.md", "yaml"))
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "heart.txt").write_text("I51*\n")
    first["tables"]["concept_ancestor"] = {"path": "concept_ancestor.csv"}
    for piece in (first, *rest):
        whole = first | piece
        if "dataset" not in piece:
            whole["tables"] = first["tables"] | piece.get("tables", {})
        (tmp_path / "clinic.yaml").write_text(yaml.safe_dump(whole))
        config = load_config(tmp_path / "clinic.yaml")
        if "train" in piece:
            assert config.train.methods["minmax"] == ("zero", "sparsity_normalization")
    assert sum("train" in piece for piece in rest) == 1


def test_snippets_about_sources_are_valid(tmp_path: Path) -> None:
    clinic = yaml.safe_load(blocks(ROOT / "docs" / "data.md", "yaml")[0])
    for number, snippet in enumerate(blocks(ROOT / "docs" / "data-sources.md", "yaml")):
        sections = yaml.safe_load(snippet)
        path = tmp_path / f"{number}.yaml"
        tables = clinic["tables"] | sections["tables"]
        path.write_text(yaml.safe_dump({**clinic, **sections, "tables": tables}))
        assert load_config(path).tables.keys() == tables.keys()


def test_every_column_of_a_resource_is_listed() -> None:
    page = (ROOT / "docs" / "data-sources.md").read_text()
    for name, resource in RESOURCES.items():
        (row,) = re.findall(rf"^\| `{name}` \| (.*) \|$", page, flags=re.MULTILINE)
        listed = re.sub(r" \(.*?\)", "", row).split(", ")
        assert listed == list(resource.columns)


def test_every_method_is_described() -> None:
    described = (ROOT / "docs" / "method.md").read_text()
    names = {name.removesuffix("+mask") for name in method_names()}
    assert [name for name in names if f"`{name}`" not in described] == []
