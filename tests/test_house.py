"""House rules that no linter knows: packages, import direction, one copy of each class, no unread field."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

from tinymim.configs.load import shipped_recipes
from tinymim.configs.schema import RECIPES
from tinymim.configs.sections import Section

ROOT = Path(__file__).resolve().parents[1]
NOT_PACKAGED = {"benchmarks", "build", "caches", "data", "dist", "docs", "runs", "tests"}
MAY_IMPORT = {
    "configs": {"configs"},
    "storage": {"storage", "configs"},
    "targets": {"targets", "configs"},
    "models": {"models", "configs"},
    "pipeline": {"pipeline", "storage", "configs"},
    "stages": {"stages", "pipeline", "models", "targets", "storage", "configs"},
    "cli_shared": {"configs"},
    "cli_cache": {"cli_shared", "stages", "configs"},
    "cli_compare": {"cli_shared", "stages"},
    "cli_plan": {"cli_shared", "stages", "configs"},
    "cli_stages": {"cli_shared", "stages", "configs"},
    "cli": {
        "cli",
        "cli_cache",
        "cli_compare",
        "cli_plan",
        "cli_shared",
        "cli_stages",
        "stages",
        "pipeline",
        "models",
        "targets",
        "storage",
        "configs",
    },
}


@cache
def _modules() -> dict[Path, ast.Module]:
    """Every .py file of the package, by path relative to the root, parsed."""
    paths = []
    for folder, subfolders, names in os.walk(ROOT):
        skipped = NOT_PACKAGED if Path(folder) == ROOT else set()
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.startswith((".", "__"))]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return {path.relative_to(ROOT): ast.parse(path.read_text(), str(path)) for path in sorted(paths)}


def _declared_packages() -> list[str]:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages: list[str] = pyproject["tool"]["setuptools"]["packages"]
    return packages


def test_declared_packages_are_the_folders_with_an_init() -> None:
    folders = [path.parent for path in _modules() if path.name == "__init__.py"]
    assert sorted(_declared_packages()) == sorted(".".join(["tinymim", *folder.parts]) for folder in folders)


def test_no_module_lies_in_a_folder_without_an_init() -> None:
    assert [path for path in _modules() if path.parent / "__init__.py" not in _modules()] == []


def _imported_layers(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Top-level parts of tinymim that a module imports, with the line; also inside functions."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for name in [prefix + alias.name for alias in node.names]:
            package, _, rest = name.partition(".")
            layer = rest.partition(".")[0]
            if package == "tinymim" and layer in MAY_IMPORT:
                yield layer, node.lineno


def test_imports_go_one_way() -> None:
    wrong = [
        f"{path}:{line} imports tinymim.{layer}"
        for path, tree in _modules().items()
        for layer, line in _imported_layers(tree)
        if layer not in MAY_IMPORT.get(path.parts[0].removesuffix(".py"), set())
    ]
    assert wrong == []


def test_every_top_level_part_has_a_rule() -> None:
    parts = {path.parts[0].removesuffix(".py") for path in _modules()} - {"__init__"}
    assert parts <= MAY_IMPORT.keys()


def test_root_init_holds_a_docstring_and_the_version_only() -> None:
    docstring, version = _modules()[Path("__init__.py")].body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(version, ast.Assign)
    assert [ast.unparse(target) for target in version.targets] == ["__version__"]


def test_no_init_under_tests() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_bare_imports_do_not_work_in_tests() -> None:
    # Two copies of a class would make `except RecipeError` miss. The root must not be on sys.path here.
    assert str(ROOT) not in sys.path
    assert sys.modules["tinymim.configs.schema"].RECIPES is RECIPES
    assert "configs" not in sys.modules


def _sections() -> set[type[Section]]:
    """Every section class that a recipe can hold."""
    found: set[type[Section]] = set()
    todo: list[object] = list(RECIPES.values())
    while todo:
        kind = todo.pop()
        if isinstance(kind, type) and issubclass(kind, Section):
            if kind not in found:
                found.add(kind)
                todo += [field.annotation for field in kind.model_fields.values()]
        else:
            todo += get_args(kind)
    return found


def _read_attributes(tree: ast.Module) -> set[str]:
    """Names read as `x.name`, method calls excluded: `tensor.mean()` does not read a field `mean`."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in called
    }


def test_every_schema_field_is_read() -> None:
    # Only files that import from these can hold a section.
    holders = {f"tinymim.configs.{name}" for name in ("schema", "sections", "load")}
    read = set[str]()
    for path, tree in _modules().items():
        sources = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        if path.parts[0] != "configs" and sources & holders:
            read |= _read_attributes(tree)
    unread = sorted(
        f"{section.__name__}.{name}"
        for section in _sections()
        for name in section.model_fields
        if name not in read and name != "stage"  # configs/load.py reads `stage` before there is a section
    )
    assert not unread, f"remove these fields, or read each as an attribute where it acts: {' '.join(unread)}"


def test_the_wheel_holds_every_module_recipe_and_weight(tmp_path: Path) -> None:
    # From a copy: setuptools leaves build/ behind and would pack stale files from it the next time.
    source = tmp_path / "anything"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", *NOT_PACKAGED)
    shutil.copytree(ROOT, source, ignore=ignored)
    options = ["--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([sys.executable, "-P", "-m", "build", *options, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("tinymim/")}
    weights = [
        path.relative_to(ROOT)
        for path in (ROOT / "models" / "weights").glob("*")
        if path.suffix in {".safetensors", ".json"}
    ]
    recipes = [Path("configs", "recipes", f"{name}.yaml") for name in shipped_recipes()]
    assert held == {Path("tinymim", path).as_posix() for path in [*_modules(), *recipes, *weights]}
