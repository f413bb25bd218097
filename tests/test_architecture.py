"""The shape of the house: who may import whom, what is exported, what is documented."""

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import core
from core import hookspecs

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "core": {"core"},
    "kernels_common": {"core", "kernels_common"},
    "plugins": {"core", "kernels_common", "plugins"},
    "harness": {"core", "kernels_common", "harness"},
}
METHOD_FILES = {"__init__.py", "strategy.py", "reference.py", "README.md"}


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        rooms = {module.split(".")[0] for module in imported_modules(path)} & ALLOWED.keys()
        assert rooms <= ALLOWED[room], f"{path.relative_to(ROOT)} imports {rooms - ALLOWED[room]}"


def test_plugins_do_not_import_each_other_or_diffusers():
    for path in (ROOT / "plugins").rglob("*.py"):
        for module in imported_modules(path):
            parts = module.split(".")
            assert parts[0] not in {"diffusers", "transformers"}, path
            if parts[0] == "plugins" and path.parent != ROOT / "plugins":
                assert parts[1] == path.relative_to(ROOT / "plugins").parts[0], f"{path} imports {module}"


def test_core_names_no_strategy():
    for path in (ROOT / "core").rglob("*.py"):
        literals = {
            node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
        }
        assert not literals & {"sparge", "svg-smart", "tome", "gilbert-block", "combined"}, path


def test_importing_core_is_light():
    code = "import core, sys; print(sorted({'diffusers', 'triton', 'cv2', 'skimage'} & sys.modules.keys()))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_exports_are_sorted_and_real():
    assert core.__all__ == sorted(core.__all__)
    public = {name for name in vars(core) if not name.startswith("_")}
    modules = {path.stem for path in (ROOT / "core").iterdir()}
    assert public - modules <= set(core.__all__)


def test_every_plugin_has_the_same_files_and_an_entry_point():
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "sparse_attn"
    ]
    folders = [path for path in (ROOT / "plugins").iterdir() if path.is_dir() and path.name != "__pycache__"]
    for folder in folders:
        assert {path.name for path in folder.iterdir()} >= METHOD_FILES, folder
        assert f"plugins.{folder.name}" in entry_points.values()
    named = {value.split(".")[1] for value in entry_points.values() if value.startswith("plugins.")}
    assert named == {folder.name for folder in folders}


def hooks() -> dict[str, inspect.Signature]:
    functions = inspect.getmembers(hookspecs, inspect.isfunction)
    return {
        name: inspect.signature(function)
        for name, function in functions
        if hasattr(function, "sparse_attn_spec")
    }


def test_every_hook_is_documented_with_its_arguments():
    text = (ROOT / "docs" / "hooks.md").read_text()
    assert len(hooks()) == 6
    for name, signature in hooks().items():
        assert f"### `{name}({', '.join(signature.parameters)})`" in text


def test_every_hook_has_a_plugin_that_uses_it():
    sources = [*(ROOT / "plugins").rglob("*.py"), *(ROOT / "core" / "processors").glob("*.py")]
    sources += [ROOT / "harness" / "metrics.py", *(ROOT / "tests" / "example_plugin").rglob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    for name in hooks():
        assert f"def {name}(" in text, f"no plugin implements {name}"


def test_no_stray_files_are_large():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    paths = [ROOT / name.decode() for name in listed.split(b"\0") if name]
    total = sum(path.stat().st_size for path in paths if path.is_file())
    assert total < 55 * 2**20
