"""The command line: help that teaches, exit codes, data on stdout, messages on stderr."""

import errno
import functools
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from cyclopts import App

import tinymim
from tinymim import __version__, cli
from tinymim.commands import tools
from tinymim.configs.errors import InternalError, SourceError
from tinymim.configs.schema.recipes import RECIPES
from tinymim.configs.shipped import shipped_recipes
from tinymim.stages import make_shards
from tinymim.stages.run import preflight
from tinymim.stages.run.interrupt import Interrupted

COMMITTED_CACHE = Path(__file__).parent / "data" / "cache_v1"


def verbs(app: App = cli.app, above: tuple[str, ...] = ()) -> list[list[str]]:
    """The words of every command of an app and of the apps in it."""
    named = [name for name in app.resolved_commands() if not name.startswith("-")]
    inner = [verbs(app[name], (*above, name)) for name in named]
    return [each for name, found in zip(named, inner, strict=True) for each in found or [[*above, name]]]


VERBS = verbs()

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.run_command(arguments)
        return code, *capsys.readouterr()

    return call


def api_name(verb: list[str]) -> str:
    """The name of a command in the library, by the rule of docs/api.md."""
    return "run_recipe" if verb[0] in RECIPES else "_".join(verb).replace("-", "_").removeprefix("hub_")


def installed(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """The `tinymim` command as a user has it."""
    script = shutil.which("tinymim", path=str(Path(sys.executable).parent))
    assert script, "install the package: make test does"
    return subprocess.run([script, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)


# ---------------------------------------------------------------- the installed command


def test_version_help_and_usage_errors_of_the_installed_command(tmp_path: Path) -> None:
    version = installed("--version", cwd=tmp_path)
    assert (version.returncode, version.stdout.strip(), version.stderr) == (0, f"tinymim {__version__}", "")
    unknown = installed("no-such-verb", cwd=tmp_path)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith("error: ") and "no-such-verb" in unknown.stderr
    typo = installed("pretrain-mae", "demo-teacher", "--set", "optim.stepz=3", cwd=tmp_path)
    assert (typo.returncode, typo.stdout) == (2, "")
    assert "optim.stepz: unknown key" in typo.stderr and "did you mean `steps`" in typo.stderr
    assert "Traceback" not in typo.stderr
    assert list(tmp_path.iterdir()) == []


HEAVY = {"torch", "timm", "torchvision", "numpy", "zarr", "obstore", "matplotlib", "ray"}


def imported_by(lines: list[list[str]], cwd: Path) -> set[str]:
    """Names of the packages that a fresh process has imported once it has run these command lines."""
    code = f"""
import sys
from tinymim import cli
for line in {lines!r}:
    cli.run_command(line)
print("imported", *{{name.partition(".")[0] for name in sys.modules}})
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("imported")[2].split())


def test_help_and_recipes_import_neither_the_schema_nor_anything_heavy(tmp_path: Path) -> None:
    lines = [["--help"], ["recipes"], ["recipes", "demo-teacher"], *([*verb, "--help"] for verb in [["cache"], *VERBS])]
    assert imported_by(lines, tmp_path) & (HEAVY | {"pydantic", "yaml", "asyncio"}) == set()


def test_a_wrong_recipe_imports_the_schema_and_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "yaml.yaml").write_text("stage: [")
    (tmp_path / "type.yaml").write_text("stage: evaluate\nbatch_size: many\nnothing: 1\n")
    recipes = ["missing", "yaml.yaml", "type.yaml", "recipe-of-no-command"]
    lines = [[stage, recipe] for stage in [*RECIPES, "plan"] for recipe in recipes]
    lines += [["cache", "repair", "type.yaml"], ["cache", "verify", "nowhere", "--deep", "type.yaml"]]
    imported = imported_by(lines, tmp_path)
    assert imported & (HEAVY | {"rich", "asyncio"}) == set() and {"pydantic", "yaml"} <= imported


def test_looking_at_a_cache_imports_no_torch(tmp_path: Path) -> None:
    lines = [["cache", verb, "nowhere"] for verb in ("list", "info", "verify", "remove")]
    imported = imported_by([*lines, ["cache", "copy", "nowhere", "elsewhere"]], tmp_path)
    assert imported & HEAVY == {"numpy", "obstore"}  # what reading a cache needs


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    script = shutil.which("tinymim", path=str(Path(sys.executable).parent))
    with subprocess.Popen([script, "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:  # type: ignore[list-item]
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_says_what_is_read_and_written_and_gives_an_example(verb: list[str], run: Run) -> None:
    code, out, err = run(*verb, "--help")
    assert (code, err) == (0, "")
    assert "Reads " in out and "rites " in out
    assert f"Example: tinymim {' '.join(verb)}" in out
    assert "--debug" in out


@pytest.mark.parametrize("verb", [[], ["cache"], *VERBS], ids=" ".join)
def test_help_is_plain_and_fits_a_terminal(verb: list[str], run: Run) -> None:
    out = run(*verb, "--help")[1]
    words = [line.strip("│* ") for line in out.splitlines()]
    assert [line for line in words if line.startswith(("Of ", "That ", "How many ", "Where ", "With "))] == []
    text = inspect.getdoc(functools.reduce(lambda app, name: app[name], verb, cli.app).default_command) or ""
    long = [line for line in text.partition("\nParameters\n")[0].splitlines() if len(line) > 79]
    assert long == [], "a terminal of 80 columns breaks these lines"


@pytest.mark.parametrize("stage", RECIPES)
def test_help_of_a_recipe_verb_names_its_shipped_recipes_and_they_load(stage: str, run: Run) -> None:
    out = " ".join(run(stage, "--help")[1].split())
    listed = out.partition("Shipped recipes: ")[2].partition(".")[0].split(", ")
    own = [name for name in shipped_recipes() if yaml.safe_load(run("recipes", name)[1])["stage"] == stage]
    assert listed == own and own


def test_fields_of_a_recipe_are_explained_on_stdout(run: Run) -> None:
    code, out, err = run("recipes", "--fields", "evaluate")
    assert (code, err) == (0, "") and "| `weights` | text | required |" in out
    assert run("recipes", "--fields", "evaluates")[0] == 2
    code, out, err = run("recipes", "demo-wide", "--fields", "evaluate")
    assert (code, out) == (2, "") and "exclude each other" in err


def test_examples_in_help_name_recipes_that_exist(run: Run) -> None:
    for stage in RECIPES:
        example = run(stage, "--help")[1].partition("Example: tinymim ")[2].split()
        assert example[0] == stage and example[1] in shipped_recipes()


def test_help_lists_every_verb(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0 and all(f"│ {verb[0]} " in out for verb in VERBS)


def test_the_defaults_of_make_shards_are_those_of_its_stage() -> None:
    flags = inspect.signature(tools.make_shards).parameters
    options = make_shards.Options()
    assert all(flags[name].default == value for name, value in vars(options).items())


# ---------------------------------------------------------------- the library

# Options with another name in the library, or that other functions replace.
RENAMED = {"deep": "recipe", "every": "every_s", "yes": "confirmed"}
REPLACED = {("recipes", "fields"): "recipe_fields", ("cache_copy", "to_format"): "cache_upgrade"}


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != ["completion"]], ids=" ".join)
def test_the_command_line_uses_nothing_that_the_library_cannot(verb: list[str]) -> None:
    name = api_name(verb)
    assert name in tinymim.__all__
    function = getattr(tinymim, name)
    signature = inspect.signature(function)
    assert all(each.annotation is not inspect.Parameter.empty for each in signature.parameters.values())
    assert re.search(r"dict|list", str(signature.return_annotation)) or name == "live"  # a server; its state is JSON
    assert function.__doc__ and ("Raises:" in function.__doc__ or name in ("doctor", "recipes"))
    own = {*signature.parameters} | ({*vars(tinymim.ShardOptions())} if name == "make_shards" else set())
    command = functools.reduce(lambda app, word: app[word], verb, cli.app).default_command
    assert command is not None
    options = [each for each, kind in inspect.signature(command).parameters.items() if kind.kind is kind.KEYWORD_ONLY]
    for option in options:
        if option != "as_json":  # how to print it
            found = RENAMED.get(option, option) in own or REPLACED.get((name, option)) in tinymim.__all__
            assert found, f"{option} of {' '.join(verb)}"


def test_commands_return_data_in_the_library(tmp_path: Path) -> None:
    index = tinymim.make_shards("drawn", tmp_path / "shards", tinymim.ShardOptions(count=3))
    assert index["num_samples"] == 3 and (tmp_path / "shards" / "index.json").is_file()
    assert [*tinymim.recipes()] == shipped_recipes() and "| `weights` |" in tinymim.recipe_fields("evaluate")
    cache = COMMITTED_CACHE.parent / "cache_v2"
    report = tinymim.cache_copy(cache, tmp_path / "caches" / "copy")
    assert report["copied_bytes"] > 0 and tinymim.cache_verify(str(tmp_path / "caches"))["sound"]
    [found] = tinymim.cache_list(str(tmp_path / "caches"))
    assert found["spec_id"] == tinymim.cache_info(str(tmp_path / "caches" / "copy"))["spec_id"]
    with pytest.raises(tinymim.UserError, match="this removes"):
        tinymim.cache_remove(tmp_path / "caches" / "copy", confirmed=False)
    assert tinymim.cache_remove(tmp_path / "caches" / "copy", confirmed=True)["foreign"] == []
    sources = "demo-cache", f"source.shards={tmp_path / 'shards'}"
    drawn = tinymim.views(sources[0], tmp_path / "views.html", sources[1], images=2, views=2)
    assert drawn["images"] == 2 and (tmp_path / "views.png").is_file()
    with tinymim.live([str(tmp_path)], port=0) as server:
        assert server.server_address[1] > 0
    with pytest.raises(tinymim.UserError, match="sample or min_agreement"):
        tinymim.cache_verify(cache, sample=0)


# ---------------------------------------------------------------- usage errors


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["pretrain-mae"], "RECIPE"),
        (["pretrain-mae", "demo-teacher", "--sett", "a=1"], "--sett"),
        (["make-shards", "drawn", "out", "--count", "many"], "many"),
        (["make-shards", "drawn"], "DST"),
        (["cache", "inform", "x"], "inform"),
        (["demo", "surplus"], "surplus"),
    ],
)
def test_usage_errors_exit_2_on_stderr(line: list[str], words: str, run: Run) -> None:
    code, out, err = run(*line)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and words in err and "hint: tinymim --help" in err


def test_a_recipe_of_another_verb_names_the_right_one(run: Run) -> None:
    code, out, err = run("evaluate", "demo-teacher")
    assert (code, out) == (2, "")
    assert "hint: run: tinymim pretrain-mae demo-teacher" in err


# ---------------------------------------------------------------- data on stdout


def test_recipes_are_listed_with_their_headline_and_printed_as_they_are(run: Run) -> None:
    _, listing, _ = run("recipes")
    lines = listing.splitlines()
    assert [line.split()[0] for line in lines] == shipped_recipes()
    assert all(len(line.split()) > 4 for line in lines), "every recipe begins with a comment that says what it is"
    for name in shipped_recipes():
        code, out, _ = run("recipes", name)
        file = Path(cli.__file__).parent / "configs" / "recipes" / f"{name}.yaml"
        assert code == 0 and out == file.read_text()
    code, out, err = run("recipes", "nothing")
    assert (code, out) == (2, "") and "demo-teacher" in err


def test_make_shards_prints_counts(run: Run, tmp_path: Path) -> None:
    line = ["make-shards", "drawn", str(tmp_path / "s"), "--count", "5", "--images-per-shard", "2", "--prefix", "p"]
    code, out, err = run(*line)
    assert code == 0 and json.loads(out) == {"num_samples": 5, "shards": 3, "unreadable": 0}
    assert "5 images in 3 shards" in err
    assert (tmp_path / "s" / "p-000002.tar").is_file()
    code, out, err = run(*line)
    assert (code, out) == (2, "") and "not empty" in err and "  hint: " in err


def test_cache_info_prints_text_or_json(run: Run) -> None:
    code, text, _ = run("cache", "info", str(COMMITTED_CACHE))
    assert code == 0 and "spec " in text
    code, out, _ = run("cache", "info", str(COMMITTED_CACHE), "--json")
    assert code == 0 and json.loads(out)["spec_id"] in text
    assert run("cache", "info", str(COMMITTED_CACHE / "units"))[0] == 2


def test_evaluate_prints_its_result_and_set_reaches_the_recipe(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinymim.stages import evaluate

    seen: list[Any] = []

    def stage_run(recipe: object) -> dict[str, float]:
        seen.append(recipe)
        return {"knn": 0.5}

    monkeypatch.setattr(evaluate, "run", stage_run)
    monkeypatch.setattr(preflight, "preflight", lambda _: None)
    code, out, _ = run(
        "evaluate", "tinyimagenet40-eval", "--set", "weights=random", "--set=batch_size=7", "--set", "batch_size=9"
    )
    assert code == 0 and json.loads(out) == {"knn": 0.5}
    assert (seen[0].weights, seen[0].batch_size) == ("random", 9)


@pytest.mark.parametrize("verb", ["pretrain", "pretrain-mae", "cache-teacher", "train-student"])
def test_training_verbs_run_their_stage(verb: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    seen: list[Any] = []
    stage = verb.removesuffix("-mae").replace("-", "_")
    monkeypatch.setattr(importlib.import_module(f"tinymim.stages.{stage}"), "run", seen.append)
    monkeypatch.setattr(preflight, "preflight", lambda _: None)
    name = next(name for name in shipped_recipes() if f"stage: {verb}\n" in run("recipes", name)[1])
    assert run(verb, name) == (0, "", "")
    assert isinstance(seen[0], RECIPES[verb])


# ---------------------------------------------------------------- errors of a stage


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage_run(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(make_shards, "run", stage_run)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            SourceError("no images", got=0, expected="some", hint="look elsewhere"),
            2,
            "error: no images\n  got: 0\n  expected: some\n  hint: look elsewhere\n",
        ),
        (InternalError("a bug"), 1, "error: a bug\n"),
        (Interrupted("state of step 3 saved"), 130, "interrupted: state of step 3 saved\n"),
        (Interrupted("state of step 3 saved", requeue=True), 75, "interrupted: state of step 3 saved\n"),
        (KeyboardInterrupt(), 130, "interrupted: stopped at once"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: Permission denied: /x\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device"),
        (ZeroDivisionError("by zero"), 1, "internal error: ZeroDivisionError: by zero\n  hint: "),
        (BrokenPipeError(errno.EPIPE, "a worker has died"), 1, "internal error: BrokenPipeError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_of_a_stage_becomes_a_message_and_an_exit_code(
    error: BaseException, code: int, message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(error, monkeypatch)
    got, out, err = run("make-shards", "a", "b")
    assert (got, out) == (code, "")
    assert err.startswith(message) and "Traceback" not in err
    if code in (1, 2):
        for line in (["--debug", "make-shards", "a", "b"], ["make-shards", "a", "b", "--debug"]):
            got, out, debugged = run(*line)
            assert (got, out) == (code, "")
            assert debugged.startswith("Traceback") and debugged.endswith(err)


def test_main_exits_with_the_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tinymim", "recipes", "nothing"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2 and "nothing" in capsys.readouterr().err


def test_an_unknown_command_cannot_command_the_terminal(tmp_path: Path) -> None:
    # In a process of its own: cyclopts formats later help texts differently after an unknown command.
    done = installed("\x1b[31mred\x07", cwd=tmp_path)
    assert done.returncode == 2 and r"\x1b[31mred\x07" in done.stderr and "\x1b" not in done.stderr


# ---------------------------------------------------------------- completion

_COMPLETE = """
source "$1"; shift
complete -p tinymim > /dev/null || exit 3
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
_tinymim
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completed(tmp_path: Path, *words: str) -> set[str]:
    """The candidates that bash offers for the last of these words."""
    script = tmp_path / "completion.bash"
    if not script.exists():
        script.write_text(installed("completion", "bash", cwd=tmp_path).stdout)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "--norc", "-c", _COMPLETE, "bash", str(script), "tinymim", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.split())


def test_bash_completes_commands_options_recipes_and_files(tmp_path: Path, run: Run) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mind").mkdir()
    (tmp_path / "mine.jpg").touch()
    commands = {name for name in cli.app.resolved_commands() if not name.startswith("-")}
    assert completed(tmp_path, "") == commands
    assert completed(tmp_path, "cache", "in") == {"info"}
    assert "--more-views" in completed(tmp_path, "cache", "info", "--")
    assert completed(tmp_path, "train-student", "demo-") >= {"demo-wide", "demo-narrow"}
    assert completed(tmp_path, "train-student", "min") == {"mine.yaml", "mind/"}
    assert completed(tmp_path, "completion", "") == {"bash", "zsh", "fish"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_sound(shell: str, tmp_path: Path, run: Run) -> None:
    code, out, err = run("completion", shell)
    assert (code, err) == (0, "") and "tinymim" in out and "cache-teacher" in out
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed, so its script is not parsed")
    (tmp_path / "script").write_text(out)
    assert subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True).stderr == b""
