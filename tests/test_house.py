"""House rules that no linter knows: packages, import direction, one copy of each class, no unread field."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import tinymim
import tinymim.api
from tinymim.configs.schema.recipes import RECIPES
from tinymim.configs.sections.base import Section
from tinymim.configs.shipped import shipped_recipes

ROOT = Path(__file__).resolve().parents[1]
NOT_PACKAGED = {"benchmarks", "build", "caches", "data", "dist", "docs", "examples", "runs", "tests"}
MAY_IMPORT = {
    "configs": {"configs"},
    "storage": {"storage", "configs"},
    "targets": {"targets", "configs"},
    "models": {"models", "configs"},
    "pipeline": {"pipeline", "storage", "configs"},
    "stages": {"stages", "pipeline", "models", "targets", "storage", "configs"},
    "api": {"api", "stages", "pipeline", "models", "targets", "storage", "configs"},
    "commands": {"commands", "api", "stages", "configs"},
    "cli": {"cli", "commands", "stages", "configs"},
    "__init__": {"api"},  # for the type checker, and at first use
}
# The rooms of stages/, lowest first: a room imports from its own and lower ones only; a command imports no command.
ROOMS = [
    {"run"},
    {"units", "training", "pages"},
    {"evaluation", "cache"},
    {"audits", "planning"},
]
# Commands that run other commands, one after another.
RUN_OTHERS = {"chain", "demo"}


@cache
def _modules() -> dict[Path, ast.Module]:
    """Every .py file of the package, by path relative to the root, parsed."""
    paths = []
    for folder, subfolders, names in os.walk(ROOT):
        skipped = NOT_PACKAGED if Path(folder) == ROOT else set()
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.startswith((".", "__"))]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    return {path.relative_to(ROOT): ast.parse(path.read_text(), str(path)) for path in sorted(paths)}


def _with_benchmarks() -> dict[Path, ast.Module]:
    found = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    return _modules() | {path: ast.parse(text, str(path)) for path, text in found.items()}


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


def _name(path: Path) -> str:
    """The dotted name of a file: tinymim.stages.run.folder."""
    parts = ("tinymim", *path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _arrows() -> dict[str, set[str]]:
    """By module the modules of the package that it imports, also inside functions."""
    modules = {_name(path): tree for path, tree in _modules().items()}
    arrows: dict[str, set[str]] = {name: set() for name in modules}
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                found = {f"{node.module}.{alias.name}" for alias in node.names}
                arrows[name] |= (found & modules.keys()) or ({node.module} & modules.keys())
            elif isinstance(node, ast.Import):
                arrows[name] |= {alias.name for alias in node.names} & modules.keys()
        arrows[name] -= {name, "tinymim"}
    return arrows


def test_no_module_imports_itself_by_way_of_others() -> None:
    left = {name: set(found) for name, found in _arrows().items()}
    while leaves := [name for name, found in left.items() if not found & left.keys()]:
        for name in leaves:
            del left[name]
    assert left == {}, "these import one another in a circle, or import such a circle"


def _floor(module: str) -> tuple[int, str]:
    """The floor and the name of the room of stages/ that a module is in; commands are on the top floor."""
    _, _, room, *_ = module.split(".")
    floor = next((number for number, rooms in enumerate(ROOMS) if room in rooms), None)
    return (len(ROOMS), "") if floor is None else (floor, room)


def test_rooms_of_stages_import_downwards_only() -> None:
    wrong = []
    for name, found in _arrows().items():
        for other in found:
            if not all(each.startswith("tinymim.stages.") for each in (name, other)):
                continue
            (floor, room), (other_floor, other_room) = _floor(name), _floor(other)
            on_top = not room and not other_room and name.rpartition(".")[2] not in RUN_OTHERS
            if floor < other_floor or (floor == other_floor and room != other_room) or on_top:
                wrong.append(f"{name} imports {other}")
    assert sorted(wrong) == []


def test_stages_holds_rooms_and_one_file_per_command() -> None:
    from tinymim.cli import app

    rooms = {path.parts[1] for path in _modules() if path.parts[0] == "stages" and len(path.parts) == 3}
    assert rooms == set().union(*ROOMS)
    files = {path.stem for path in _modules() if path.parts[0] == "stages" and len(path.parts) == 2} - {"__init__"}
    commands = {name.replace("-", "_") for name in app.resolved_commands() if not name.startswith("-")}
    assert files == commands - {"recipes", "cache", "completion", "pretrain_mae"}, (
        "see configs/shipped.py, stages/cache/, cli.py, stages/pretrain.py"
    )


def test_tests_mirror_the_tree() -> None:
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folder = path.parent.relative_to(ROOT / "tests")
        assert folder in (Path(), Path("fuzz")) or (ROOT / folder).is_dir(), (
            f"{path} is in a folder that the package does not have"
        )


def test_only_relations_name_what_relations_are_made_of() -> None:
    """Models give taps, configs hold the section, format 1 knew no others; the rest knows kinds by their contract."""
    words = re.compile(r"\bqkv\b|\bQKV\b|relation_heads|\bkl_(qk|vv|qq|kk)\b|[\"'](qk|vv|qq|kk)[\"']")
    own = {Path("targets/relations"), Path("models"), Path("configs"), Path("tests"), Path("storage/v1")}
    wrong = [
        f"{path}:{number}: {line.strip()}"
        for path in _modules()
        if not own & {path, *path.parents}
        for number, line in enumerate((ROOT / path).read_text().splitlines(), start=1)
        if words.search(line)
    ]
    assert wrong == []


def test_every_top_level_part_has_a_rule() -> None:
    parts = {path.parts[0].removesuffix(".py") for path in _modules()} - {"__init__"}
    assert parts <= MAY_IMPORT.keys()


def test_root_init_imports_nothing_but_the_api_and_that_for_the_type_checker_only() -> None:
    tree = _modules()[Path("__init__.py")]
    at_start = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in at_start] == ["from typing import TYPE_CHECKING, Any"]
    assert sorted(tinymim.__all__) == sorted(["__version__", *tinymim.api.__all__])


def test_no_init_under_tests() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_bare_imports_do_not_work_in_tests() -> None:
    # Two copies of a class would make `except RecipeError` miss. The root must not be on sys.path here.
    assert str(ROOT) not in sys.path
    assert sys.modules["tinymim.configs.schema.recipes"].RECIPES is RECIPES
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
    holders = tuple(f"tinymim.configs.{name}" for name in ("schema.", "sections.", "codecs.", "load"))
    read = set[str]()
    for path, tree in _modules().items():
        sources = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        if path.parts[0] != "configs" and any(source.startswith(holders) for source in sources):
            read |= _read_attributes(tree)
    unread = sorted(
        f"{section.__name__}.{name}"
        for section in _sections()
        for name in section.model_fields
        if name not in read and name != "stage"  # configs/load.py reads `stage` before there is a section
    )
    assert not unread, f"remove these fields, or read each as an attribute where it acts: {' '.join(unread)}"


# How timm builds a model inside. Fields of a recipe's `config` have some of these names, too.
INSIDE_A_MODEL = {
    *("attn", "blocks", "cls_token", "embed_dim", "feature_info", "grid_size", "has_class_token", "norm", "norm_pre"),
    *("num_heads", "num_prefix_tokens", "patch_embed", "patch_size", "pos_embed", "qkv"),
}


def _reads_inside(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names of `INSIDE_A_MODEL` that a file reads, as `x.name` or by getattr and hasattr, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in INSIDE_A_MODEL:
            owner = ast.unparse(node.value)
            if owner not in {"config", "backbone"}:
                yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "hasattr"}:
            name = ast.unparse(node.args[1]).strip("'")
            if name in INSIDE_A_MODEL:
                yield name, node.lineno


def test_only_three_files_look_inside_a_model() -> None:
    inside = {Path("models", f"{name}.py") for name in ("backbone", "hiding", "initialise")}
    wrong = [
        f"{path}:{line} reads .{name}"
        for path, tree in _with_benchmarks().items()
        for name, line in _reads_inside(tree)
        if path not in inside and path.parts[0] != "configs"
    ]
    assert wrong == [], "give models/backbone.py a function for it"


def test_only_format_1_has_stored_boxes() -> None:
    named = {
        path
        for path, tree in _with_benchmarks().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value == "box"
    }
    about_format_1 = {Path("storage", "v1", "arrays.py"), Path("benchmarks", "bench_partial_reads.py")}
    assert named == about_format_1, "the view law draws boxes again, and digests prove them"


def test_the_wheel_holds_every_module_recipe_and_weight_and_says_that_it_is_typed(tmp_path: Path) -> None:
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
    assert held == {Path("tinymim", path).as_posix() for path in [*_modules(), Path("py.typed"), *recipes, *weights]}
