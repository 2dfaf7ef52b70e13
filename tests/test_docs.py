"""What README and docs/ say runs as they say it."""

import re
from pathlib import Path

import pytest

from ehr_sn.config import load_config
from ehr_sn.missing import method_names

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


def test_the_example_configuration_is_valid(tmp_path: Path) -> None:
    example = tmp_path / "clinic.yaml"
    example.write_text("".join(blocks(ROOT / "docs" / "data.md", "yaml")))
    config = load_config(example)
    assert config.train.methods["minmax"] == ("zero", "sparsity_normalization")


def test_every_method_is_described() -> None:
    described = (ROOT / "docs" / "method.md").read_text()
    names = {name.removesuffix("+mask") for name in method_names()}
    assert [name for name in names if f"`{name}`" not in described] == []
