"""Every ```python block of README.md and docs/*.md runs, each in a namespace of its own."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def examples():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
            line = text[: block.start()].count("\n") + 2
            yield pytest.param(page, line, block[1], id=f"{page.name}:{line}")


@pytest.mark.parametrize("page, line, code", list(examples()))
def test_example(page, line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))],
                         ids=lambda page: page.name)
def test_links(page):
    """A link to a file of the repository leads to one."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"
