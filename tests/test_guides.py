"""The documents: their code runs, their links lead somewhere, and the files that they name are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import how_it_works
import pytest
import readme_picture
from PIL import Image

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "examples" / "guides").glob("*.md"))
RUN = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *GUIDES]
"""The documents whose python blocks are run."""


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _blocks(path: Path) -> list[str]:
    """The python blocks of a document."""
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def _param(path: Path, number: int, code: str) -> Any:
    compiles = "make_train_step" in code and "compile=False" not in code
    marks = [pytest.mark.compile, pytest.mark.slow] if compiles else []
    return pytest.param(_name(path), code, id=f"{_name(path)}-{number}", marks=marks)


_BLOCKS = [_param(path, number, code) for path in RUN for number, code in enumerate(_blocks(path), start=1)]


def test_readme_has_code_that_promises_something() -> None:
    assert len(_blocks(ROOT / "README.md")) >= 2


@pytest.mark.parametrize("path", GUIDES, ids=_name)
def test_a_guide_has_code_and_is_short(path: Path) -> None:
    assert _blocks(path) and len(path.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize(("name", "code"), _BLOCKS)
def test_code_runs(name: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every python block, from a fresh namespace; where the block says `# prints: ...`, that is what it prints."""
    promised = re.findall(r"# prints: (.*)", code)
    assert promised, f"{name}: a block promises nothing"
    exec(compile(code, name, "exec"), {})
    printed = capsys.readouterr().out
    for line in promised:
        assert line in printed


def test_readme_fits_on_a_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("path", [*RUN, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=_name)
def test_links_lead_to_files(path: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
    for link in links:
        assert link.startswith("https://") or (path.parent / link).exists(), f"{_name(path)}: {link}"


def test_each_change_has_one_file_that_is_there() -> None:
    """The table of CONTRIBUTING.md, "Where do I change ...?"."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("## Where do I change ...?")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]  # without the head
    assert len(rows) == 15
    for row in rows:
        _, change, file, _ = row.split("|")
        (name,) = re.findall(r"`([^`]+\.py)`", file)
        assert (ROOT / name).is_file(), f"{change}: {name}"


def test_how_it_works_agrees_with_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    how_it_works.main(["--members", "3"])
    printed = capsys.readouterr().out
    assert "equal to 3 networks" in printed and "equal to functorch_ens.make_forward" in printed
    with pytest.raises(SystemExit) as stopped:
        how_it_works.main(["--help"])
    assert stopped.value.code == 0 and "--members" in capsys.readouterr().out


def test_the_picture_is_drawn_from_the_results(tmp_path: Path) -> None:
    readme_picture.main(["--out", str(tmp_path / "readme.png")])
    with Image.open(tmp_path / "readme.png") as image, Image.open(readme_picture.RESULTS / "readme.png") as kept:
        assert image.format == "PNG" and image.size == kept.size
