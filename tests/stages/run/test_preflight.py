"""What is not there is said before torch is imported, in the words of the stage itself."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tinymim.configs.errors import CheckpointError, RecipeError, TinymimError
from tinymim.configs.load import load_recipe
from tinymim.stages import make_shards
from tinymim.stages.run.preflight import preflight, require_inputs
from tinymim.stages.training.states import read_state

CACHE = Path(__file__).parents[2] / "data" / "cache_v2"
NO_SOURCE = "source folder does not exist"
NO_SHARDS = "no shards match 'no-*.tar'"
NO_WEIGHTS = "weights file does not exist"
NO_CACHE = "there is no cache at "
NO_STATE = "there is no training state"
WEIGHTS, SHARDS = "weights=nowhere.pth", "source.shards=shards"
LABELLED = ("train={shards: shards}", "val={shards: shards}")

# By command and shipped recipe: what is set, and what is missing then.
INPUTS = [
    ("pretrain-mae", "demo-teacher", (), NO_SOURCE),
    ("pretrain-mae", "demo-teacher", (SHARDS, "source.pattern=no-*.tar"), NO_SHARDS),
    ("cache-teacher", "demo-cache", (), NO_SOURCE),
    ("cache-teacher", "demo-cache", (SHARDS, f"teacher.{WEIGHTS}"), NO_WEIGHTS),
    ("train-student", "demo-narrow", (SHARDS, "cache=nowhere"), NO_CACHE),
    ("train-student", "demo-narrow", (f"cache={CACHE}", "layer=rel"), NO_SOURCE),
    ("evaluate", "tinyimagenet40-eval", ("train={shards: shards}", "val.shards=nowhere", WEIGHTS), NO_SOURCE),
    ("evaluate", "tinyimagenet40-eval", (*LABELLED, WEIGHTS), NO_WEIGHTS),
    ("finetune", "tinyimagenet40-finetune", ("train.shards=nowhere", WEIGHTS), NO_SOURCE),
    ("finetune", "tinyimagenet40-finetune", (*LABELLED, WEIGHTS), NO_WEIGHTS),
    ("fidelity", "imagenet-sample-fidelity", ("source.shards=nowhere",), NO_SOURCE),
    ("fidelity", "imagenet-sample-fidelity", (SHARDS, f"teacher.{WEIGHTS}"), NO_WEIGHTS),
]
STATE = (SHARDS, "teacher.weights=hub", "student_state=nowhere")
_KNN = "{train: {shards: shards}, val: {shards: nowhere}}"
AUDIT = f"audit={{cache: {CACHE}, source: {{shards: shards}}, knn: {_KNN}}}"
# Of those that only the command line knows.
LINES = [
    (["fidelity", "imagenet-sample-fidelity", *(f"--set={each}" for each in STATE)], NO_STATE),
    (["train-student", "demo-narrow", f"--set={SHARDS}", f"--set=cache={CACHE}", f"--set={AUDIT}"], NO_SOURCE),
    (["chain", "imagenet-tinymim-chain", "--set=set=[source.shards=nowhere]"], NO_SOURCE),
    (["chain", "imagenet-tinymim-chain", "--set=set=[nothing=1]"], "nothing: unknown key"),
    (["plan", "demo-cache", "demo-narrow"], NO_SOURCE),
    (["plan", "demo-cache", f"--set={SHARDS}", f"--set=teacher.{WEIGHTS}"], "or measure with --random-weights"),
    (["plan", "demo-narrow", f"--set={SHARDS}"], "tinymim plan CACHE_RECIPE [STUDENT_RECIPE ...]"),
    (["cache", "repair", "demo-cache"], NO_SOURCE),
    (["cache", "verify", str(CACHE), "--deep", "demo-cache"], NO_SOURCE),
    (["cache", "info", "nowhere"], NO_CACHE),
    (["pretrain-mae", "demo-teacher", f"--set={SHARDS}", "--set=run.folder=a-file/run"], "run.folder cannot be made"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards of eight labelled images, and a file."""
    root = tmp_path_factory.mktemp("preflight")
    make_shards.run("drawn", root / "shards", make_shards.Options(count=8, images_per_shard=8))
    (root / "a-file").touch()
    return root


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def test_what_is_missing_is_said_before_torch_is_imported(place: Path) -> None:
    cases = [([stage, name, *(f"--set={each}" for each in given)], said) for stage, name, given, said in INPUTS] + LINES
    code = """
import contextlib, io, json, sys
from tinymim import cli
found = []
for line in json.loads(sys.stdin.read()):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = cli.run_command(line)
    found.append((code, said.getvalue(), sorted({"torch", "timm", "ray"} & sys.modules.keys())))
print(json.dumps(found))
"""
    before = sorted(place.rglob("*"))
    lines = json.dumps([line for line, _ in cases])
    done = subprocess.run([sys.executable, "-P", "-c", code], input=lines, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for (line, said), (exit_code, message, heavy) in zip(cases, json.loads(done.stdout), strict=True):
        assert (exit_code, heavy) == (2, []), line
        assert said in message, line
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(("stage", "name", "given", "said"), INPUTS)
def test_the_error_is_the_stages_own(stage: str, name: str, given: tuple[str, ...], said: str) -> None:
    recipe = load_recipe(Path(name), stage, (*given, "run.folder=run"))
    module = "pretrain" if stage == "pretrain-mae" else stage.replace("-", "_")  # one stage of two commands
    with pytest.raises(TinymimError) as early:
        require_inputs(recipe)  # type: ignore[arg-type]  # not a chain
    with pytest.raises(TinymimError) as late:
        importlib.import_module(f"tinymim.stages.{module}").run(recipe)
    assert (type(early.value), str(early.value)) == (type(late.value), str(late.value))
    assert said in str(early.value)


def test_the_error_of_a_lost_state_is_its_readers() -> None:
    with pytest.raises(CheckpointError) as early:
        require_inputs(load_recipe(Path("imagenet-sample-fidelity"), "fidelity", STATE))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError) as late:
        read_state(Path("nowhere"))
    assert str(early.value) == str(late.value)


def test_a_recipe_whose_inputs_are_there_passes_and_nothing_is_written(place: Path) -> None:
    before = sorted(place.rglob("*"))
    for name, stage, given in (
        ("demo-teacher", "pretrain-mae", (SHARDS,)),
        ("demo-cache", "cache-teacher", (SHARDS,)),
        ("demo-narrow", "train-student", (SHARDS, f"cache={CACHE}")),
        ("tinyimagenet40-eval", "evaluate", (*LABELLED, "weights=random")),
        ("tinyimagenet40-finetune", "finetune", (*LABELLED, "weights=hub")),
        ("imagenet-sample-fidelity", "fidelity", (SHARDS, "teacher.weights=hub")),
    ):
        preflight(load_recipe(Path(name), stage, (*given, "run.folder=runs/new", "loader.workers=0")))
    assert sorted(place.rglob("*")) == before


def test_a_run_folder_that_cannot_be_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, kind in (("a-file", RecipeError), ("shards/new", PermissionError)):
        recipe = load_recipe(Path("demo-teacher"), "pretrain-mae", (SHARDS, f"run.folder={folder}"))
        monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
        with pytest.raises(kind):
            preflight(recipe)
