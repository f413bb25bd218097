"""Documentation that names code must agree with it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "plugins").rglob("*.md")]


def test_the_tutorial_shows_the_tested_package():
    text = (ROOT / "docs" / "writing_a_plugin.md").read_text()
    shown = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert len(shown) == 4
    for name, source in shown:
        assert source == (ROOT / name).read_text(), name


@pytest.mark.parametrize("document", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not target.startswith(("http", "#", "mailto:")):
            assert (document.parent / target.split("#")[0]).exists(), target


def test_the_readme_has_two_set_up_commands():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"<!-- command: (\w+) -->\n```sh\n(.+)\n```", text)
    assert [name for name, _ in commands] == ["bench", "tests"]
    assert all(command.startswith("python3 -m venv") for _, command in commands)


def test_the_readme_s_examples_run():
    """All but the first, which downloads a checkpoint."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "from_pretrained" in blocks[0] and len(blocks) == 3
    for block in blocks[1:]:
        scope: dict[str, object] = {}
        exec(compile(block, "README.md", "exec"), scope)
        assert scope["output"].shape == scope["query"].shape
