"""load.py, overrides.py, strict_yaml.py: what a recipe may hold, how flags beat it, how each mistake is answered."""

import os
import threading
import time
from pathlib import Path

import pytest

from tinymim.configs import shipped
from tinymim.configs.errors import RecipeError
from tinymim.configs.load import dump_recipe, load_recipe, recipe_digest
from tinymim.configs.schema.recipes import RECIPES, Recipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.shipped import shipped_recipes
from tinymim.configs.strict_yaml import parse_yaml

STUDENT = """\
stage: train-student
source: {shards: shards/train}
cache: caches/demo
student:
  name: vit_tiny_patch16_224
optim:
  steps: 300
  base_lr: 1e-3
run:
  folder: runs/student
"""
TEACHER = """\
stage: cache-teacher
source: {shards: shards/train}
teacher: {weights: hub, block: 9}
cache: caches/demo
run: {folder: runs/cache}
"""


def _recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def _student(folder: Path, *overrides: str, text: str = STUDENT) -> TrainStudentRecipe:
    recipe = load_recipe(_recipe(folder, text), "train-student", overrides)
    assert isinstance(recipe, TrainStudentRecipe)
    return recipe


def _error(folder: Path, text: str, *overrides: str, stage: str = "train-student") -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(_recipe(folder, text), stage, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---- what is read ----


def test_a_file_becomes_its_recipe_with_defaults(tmp_path: Path) -> None:
    recipe = _student(tmp_path)
    assert (recipe.optim.steps, recipe.optim.base_lr, recipe.optim.betas) == (300, 1e-3, (0.9, 0.95))


def test_relative_paths_stay_relative_to_the_working_directory(tmp_path: Path) -> None:
    assert _student(tmp_path).source.shards == Path("shards/train")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "1.0e-3", ".1e-2", "+1e-3", "0.001", "10e-4"])
def test_every_spelling_of_a_float_is_a_float(tmp_path: Path, text: str) -> None:
    assert _student(tmp_path, f"optim.base_lr={text}").optim.base_lr == 1e-3
    assert parse_yaml(text, "a recipe") == 1e-3


@pytest.mark.parametrize("text", ["e-3", "1e", "1e-3x", "v1e3", "-e3", "1.2.3e4"])
def test_what_only_looks_like_a_float_stays_text(text: str) -> None:
    assert parse_yaml(text, "a recipe") == text


def test_a_pipe_is_read_like_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(STUDENT,))
    writer.start()
    assert load_recipe(path, "train-student") == _student(tmp_path)
    writer.join()


# ---- overrides ----


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optim.steps=5", "optim.steps", 5),
        ("jitter.brightness=0", "jitter.brightness", 0.0),  # a section that the file does not name
        ("verify={first: 1, every: 0}", "verify.every", 0),
        ("optim.betas=[0.9, 0.99]", "optim.betas", (0.9, 0.99)),
        ("precision=bf16", "precision", "bf16"),
        ("run.folder=runs/a=b", "run.folder", Path("runs/a=b")),
        (" run.seed = 3", "run.seed", 3),
    ],
)
def test_an_override_beats_file_and_default(tmp_path: Path, override: str, path: str, value: object) -> None:
    found: object = _student(tmp_path, override)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


def test_later_overrides_beat_earlier_ones(tmp_path: Path) -> None:
    assert _student(tmp_path, "optim.steps=5", "optim.steps=6").optim.steps == 6


def test_epochs_can_take_the_place_of_steps(tmp_path: Path) -> None:
    optim = _student(tmp_path, "optim.steps=null", "optim.epochs=2").optim
    assert (optim.steps, optim.epochs) == (None, 2)


def test_an_override_fills_an_empty_section(tmp_path: Path) -> None:
    assert _student(tmp_path, "jitter.contrast=0.1", text=STUDENT + "jitter:\n").jitter.contrast == 0.1


def test_an_override_does_not_reach_the_anchor_s_twin(tmp_path: Path) -> None:
    text = """\
stage: evaluate
train: &set {shards: a}
val: *set
model: {}
weights: random
run: {folder: r}
"""
    recipe = load_recipe(_recipe(tmp_path, text), "evaluate", ["val.shards=b"])
    assert recipe.model_dump(include={"train": {"shards"}, "val": {"shards"}}) == {
        "train": {"shards": Path("a")},
        "val": {"shards": Path("b")},
    }


@pytest.mark.parametrize("override", ["optim.steps", "=5", "optim.=5", ".steps=5", ""])
def test_a_malformed_override_is_named(tmp_path: Path, override: str) -> None:
    message = _error(tmp_path, STUDENT, override)
    assert "--set needs a dotted name" in message
    assert "optim.steps=300" in message


def test_an_override_inside_a_plain_value_is_refused(tmp_path: Path) -> None:
    message = _error(tmp_path, STUDENT, "optim.steps.x=5")
    assert message == "--set optim.steps.x=5: `x` cannot be set inside a plain value\n  got: 300"


def test_bad_yaml_in_an_override_names_the_override(tmp_path: Path) -> None:
    assert "--set optim.betas=[0.9, line 1" in _error(tmp_path, STUDENT, "optim.betas=[0.9")


# ---- stage ----


def test_a_recipe_for_another_command_names_it(tmp_path: Path) -> None:
    message = _error(tmp_path, TEACHER)
    assert "is for `tinymim cache-teacher`, not for `tinymim train-student`" in message
    assert f"hint: run: tinymim cache-teacher {tmp_path / 'recipe.yaml'}" in message


def test_a_recipe_without_a_stage_says_what_to_add(tmp_path: Path) -> None:
    message = _error(tmp_path, STUDENT.partition("\n")[2])
    assert "expected: stage: train-student" in message


@pytest.mark.parametrize(
    ("value", "reply"),
    [("train-studnet", "did you mean `train-student`?"), ("[1]", "pretrain, cache-teacher")],
)
def test_an_unknown_stage_gets_a_suggestion(tmp_path: Path, value: str, reply: str) -> None:
    assert reply in _error(tmp_path, STUDENT.replace("train-student", value, 1))


# ---- schema problems ----


def test_all_problems_come_at_once_one_a_line(tmp_path: Path) -> None:
    overrides = ["optim.step=9", "optim.base_lr=-1", "precision=fp8", "student.depth=x", "source=null"]
    message = _error(tmp_path, STUDENT, *overrides)
    assert message.splitlines()[:-1] == [
        f"recipe {tmp_path / 'recipe.yaml'} has 5 problems:",
        "  optim.base_lr: got -1; input should be greater than 0",
        "  optim.step: unknown key (value 9); did you mean `steps`?",
        "  precision: got 'fp8'; input should be 'fp32', 'bf16' or 'fp16'",
        "  source: got None; input should be a valid dictionary or instance of SourceConfig",
        "  student.depth: got 'x'; input should be a valid integer, unable to parse string as an integer",
    ]
    assert "hint:" in message


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optm={steps: 1}", "optm: unknown key (value {'steps': 1}); did you mean `optim`?"),
        ("verify.zzz=1", "verify.zzz: unknown key (value 1); fields here: first, every"),
        ("optim.steps=null", "optim: give epochs or steps, exactly one; got epochs=None, steps=None"),
        ("optim.betas=[0.5]", "optim.betas.1: required, but missing"),
        ("view={1: 2}", "view: unknown key"),
        ("verify={1: 2}", "verify.1: got 1; keys should be strings"),
        (
            "student.name=null",
            "student.name: got None; input should be a valid string",
        ),
    ],
)
def test_a_problem_is_named_with_value_and_remedy(tmp_path: Path, override: str, line: str) -> None:
    message = _error(tmp_path, STUDENT, override)
    assert "has 1 problem:" in message
    assert f"\n  {line}" in message


EVALUATE = "stage: evaluate\ntrain: {shards: a}\nval: {shards: b}\nmodel: {}\nweights: random\nrun: {folder: r}\n"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("evaluators=[{name: knn, kk: 1}]", "evaluators.0.kk: unknown key (value 1); did you mean `k`?"),
        ("evaluators=[{name: linear, k: 1}]", "evaluators.0.k: unknown key (value 1); fields here: name, l2, max_iter"),
        ("evaluators=[{name: knn}, {name: kn}]", "evaluators.1.name: got 'kn'; expected one of 'knn', 'linear'"),
        ("evaluators=[{k: 5}]", "evaluators.0.name: missing, and it has no default"),
        ("evaluators=[{name: knn, k: 5}, {name: knn}]", "recipe: evaluators names knn twice"),
        ("evaluators=[]", "recipe: evaluators is empty: name at least one"),
        ("knn={k: 5}", "knn: unknown key (value {'k': 5}); fields here: stage, train, val, "),
        ("linear.l2=0.1", "linear: unknown key (value {'l2': 0.1}); fields here: stage, train, val, "),
    ],
)
def test_an_evaluator_is_named_by_its_place_in_the_list(tmp_path: Path, override: str, line: str) -> None:
    message = _error(tmp_path, EVALUATE, override, stage="evaluate")
    assert "has 1 problem:" in message
    assert f"\n  {line}" in message


@pytest.mark.parametrize(
    ("codec", "line"),
    [
        ("{kind: cls, bitz: 3}", "codec.bitz: unknown key (value 3); did you mean `bits`?"),
        ("{kind: features, name: pq, stages: 0}", "codec.stages: got 0; "),
        ("{kind: features, name: pq, stagez: 2}", "codec.stagez: unknown key (value 2); did you mean `stages`?"),
        ("{name: hidden, basis: none}", "codec.basis: got 'none'; "),
    ],
)
def test_a_field_of_a_codec_is_named_without_the_kind_that_chose_it(codec: str, line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("imagenet-sample-cache"), "cache-teacher", [f"codec={codec}"])
    assert f"\n  {line}" in str(caught.value)


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    assert "run: required, but missing" in _error(tmp_path, STUDENT.partition("run:")[0])


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    assert len(_error(tmp_path, STUDENT, f"precision={'x' * 9999}")) < 500


# ---- bad YAML ----


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("stage: train-student\nrun: {folder: [\n", "line 3"),
        ("stage: train-student\n\tcache: x\n", "line 2, column 1"),
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1"),
        ("a: {x: 1, x: 2}\n", "line 1, column 11"),
        ("a: 1\nb: *nowhere\n", "line 2"),
        ("a: 1\nb: !!python/object:os.system {}\n", "line 2"),
        ("a: 1\nb: !!int x\n", "line 2"),
        ("a: 1\nb: !!bool x\n", "line 2"),
        ("a: 1\nb: !!int ''\n", "line 2"),
        ("a: 1\nb: !!timestamp x\n", "line 2"),
        ("a: 1\nb: 2026-13-01\n", "line 2"),
        ("a: 1\n? [x]\n: 2\n", "line 2"),
        ("a: 1\n---\nb: 2\n", "line 2"),
        ("a: 1\nb: \x00\n", "line 2"),
    ],
)
def test_bad_yaml_is_answered_with_its_line(tmp_path: Path, text: str, where: str) -> None:
    message = _error(tmp_path, text)
    assert where in message.splitlines()[0]
    assert "not valid YAML" in message


def test_a_repeated_key_says_where_it_stood_first(tmp_path: Path) -> None:
    assert "key `cache` is repeated; it first appears in line 3" in _error(tmp_path, STUDENT + "cache: y\n")


def test_merged_keys_are_no_repetition(tmp_path: Path) -> None:
    text = STUDENT + "verify: {<<: {first: 1}, first: 2}\n"
    assert _student(tmp_path, text=text).verify.first == 2


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "just text\n", "3"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    assert "has no fields" in _error(tmp_path, text)


def test_endless_nesting_is_refused(tmp_path: Path) -> None:
    assert "nested too deeply" in _error(tmp_path, "a: " + "[" * 5000)


def test_a_section_inside_itself_is_refused(tmp_path: Path) -> None:
    assert "an alias to a section that it is in" in _error(tmp_path, STUDENT + "jitter: &j {contrast: *j}\n")


def _bomb(doubling: str) -> str:
    lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {doubling.format(n - 1)}" for n in range(1, 40))]
    return STUDENT + "\n".join(lines) + "\n"


@pytest.mark.parametrize("doubling", ["[*a{0}, *a{0}]", "{{y: *a{0}, z: *a{0}}}", "{{<<: [*a{0}, *a{0}]}}"])
def test_aliases_that_double_forty_times_are_refused_at_once(tmp_path: Path, doubling: str) -> None:
    began_s = time.monotonic()
    assert "aliases that stand for over 10,000 values" in _error(tmp_path, _bomb(doubling))
    assert time.monotonic() - began_s < 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('cache: "a\\0b"', "text that no file name can hold"),
        ('cache: "a\\ud800b"', "text that no file name can hold"),
        (f"num_views: {'1:59' * 1}{':59' * 200}", "not a valid int: 604 characters"),
        (f"num_views: 0x{'f' * 200}", "not a valid int: 202 characters"),
    ],
)
def test_values_that_nothing_can_use_are_refused_with_their_line(tmp_path: Path, text: str, words: str) -> None:
    error = _error(tmp_path, f"stage: train-student\n{text}\n")
    assert "line 2" in error and words in error


def test_an_endless_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").symlink_to("/dev/zero")
    with pytest.raises(RecipeError, match="over 1,000,000 bytes"):
        load_recipe(tmp_path / "recipe.yaml", "train-student")


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("source.pattern=*.tar", "source.pattern", "*.tar"),
        ("source.pattern='*.tar'", "source.pattern", "*.tar"),
        ("source.pattern=[ab]*.tar", "source.pattern", "[ab]*.tar"),
        ("source.pattern=2024", "source.pattern", "2024"),
        ("source.pattern=yes", "source.pattern", "yes"),
        ("source.pattern=#1", "source.pattern", "#1"),
        ("run.folder=2024-01-01", "run.folder", Path("2024-01-01")),
        ("run.folder=a: b", "run.folder", Path("a: b")),
        ("cache=1e3", "cache", Path("1e3")),
        ("source.spool.folder=null", "source.spool.folder", None),
        ("source.spool.folder=@here", "source.spool.folder", Path("@here")),
    ],
)
def test_an_override_of_a_text_is_taken_as_it_stands_where_its_yaml_is_no_text(
    tmp_path: Path, override: str, field: str, value: object
) -> None:
    found: object = _student(tmp_path, override)
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value


def test_an_override_inside_a_named_section_finds_its_field(tmp_path: Path) -> None:
    text = STUDENT.replace("student:\n  name", "students:\n  a:\n    model:\n      name")
    students = _student(tmp_path, "students.a.model.name=*", text=text).students
    assert students is not None and students["a"].model.name == "*"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cache=s3:/bucket/x", "cache: got 's3:/bucket/x'"),
        ("cache=foo:/bucket/x", "cache: got 'foo:/bucket/x'"),
        ("cache=s3:///x", "expected SCHEME://BUCKET/PREFIX"),
        ("run.folder=s3://bucket/x", "run.folder: got 's3://bucket/x'"),
        ("run.folder=''", "run.folder: got ''; expected a path"),
        ("source.spool.folder=gs:/b", "source.spool.folder: got 'gs:/b'"),
        ("source.pattern=/etc/*", "source.pattern: expected a glob below the folder"),
        ("source.pattern=../*", "source.pattern: expected a glob below the folder"),
        ("source.pattern=**/*.tar", "source.pattern: expected a glob below the folder"),
        ("student.patch_size=225", "student: img_size must be a multiple of patch_size"),
        ("student={img_size: 225, patch_size: 16}", "student: img_size must be a multiple of patch_size"),
        ("student={embed_dim: 10, num_heads: 3}", "student: num_heads must divide embed_dim"),
        ("drop_path=1", "drop_path: got 1; input should be less than 1"),
        ("optim.base_lr=.inf", "optim.base_lr: got inf; input should be a finite number"),
        ("optim.weight_decay=.nan", "optim.weight_decay: got nan"),
        ("optim.betas=[0.9, 1.0]", "optim.betas.1: got 1.0"),
        ("run.seed=9223372036854775808", "run.seed: got 9223372036854775808"),
        ("run.device=cuda:99999999999", "run.device: got 'cuda:99999999999'"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(tmp_path: Path, override: str, words: str) -> None:
    assert words in _error(tmp_path, STUDENT, override)


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"stage: train-student\ncache: \xff\xfe\n")
    with pytest.raises(RecipeError, match="line 2: not valid UTF-8"):
        load_recipe(path, "train-student")


# ---- shipped recipes ----


@pytest.fixture
def _shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    (package / "demo").mkdir(parents=True)
    (package / "demo" / "student.yaml").write_text(STUDENT)
    (package / "plain.yaml").write_text(STUDENT)
    monkeypatch.setattr(shipped, "RECIPE_FILES", package)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_shipped")
def test_a_bare_name_is_a_shipped_recipe(tmp_path: Path) -> None:
    assert shipped_recipes() == ["demo/student", "plain"]
    assert load_recipe(Path("demo/student"), "train-student") == _student(tmp_path)


@pytest.mark.usefixtures("_shipped")
def test_a_file_beats_a_shipped_recipe_and_a_folder_does_not(tmp_path: Path) -> None:
    Path("plain").write_text(STUDENT.replace("300", "7"))
    Path("demo/student").mkdir(parents=True)
    assert load_recipe(Path("plain"), "train-student") == _student(tmp_path, "optim.steps=7")
    assert load_recipe(Path("demo/student"), "train-student") == _student(tmp_path)


@pytest.mark.usefixtures("_shipped")
@pytest.mark.parametrize("name", ["demo/studnet", "demo/student.yml"])
def test_a_recipe_not_found_lists_the_shipped_ones(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path(name), "train-student")
    assert "shipped recipe: demo/student, plain" in str(caught.value)
    assert "did you mean `demo/student`?" in str(caught.value)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="got: a folder"):
        load_recipe(tmp_path, "train-student")


def test_a_name_the_file_system_refuses_is_no_traceback() -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(Path("x" * 5000), "train-student")


def test_every_shipped_recipe_is_valid() -> None:
    for name in shipped_recipes():
        stage = parse_yaml(shipped.text(name), name)["stage"]
        assert isinstance(load_recipe(Path(name), stage), RECIPES[stage])


# ---- writing ----


@pytest.fixture
def odd(tmp_path: Path) -> Recipe:
    names = {
        "student.name": '"1e-3"',
        "run.folder": "'yes'",
        "cache": '"größe: [#\\n"',
        "source.pattern": "'null'",
    }
    return _student(tmp_path, "optim.min_lr=1e-9", *(f"{key}={value}" for key, value in names.items()))


def test_a_dumped_recipe_loads_back_equal(tmp_path: Path, odd: Recipe) -> None:
    text = dump_recipe(odd)
    assert load_recipe(_recipe(tmp_path, text), "train-student") == odd
    assert dump_recipe(_student(tmp_path, text=text)) == text


def test_a_dump_is_whole_in_schema_order_and_inline_for_lists(tmp_path: Path) -> None:
    text = dump_recipe(_student(tmp_path))
    assert [line for line in text.splitlines() if not line.startswith(" ")][:3] == [
        "stage: train-student",
        "source:",
        "cache: caches/demo",
    ]
    assert "  betas: [0.9, 0.95]\n" in text
    assert "  every_steps: 1000\n" in text


def test_the_digest_is_of_values_not_of_spelling(tmp_path: Path) -> None:
    recipe = _student(tmp_path)
    assert recipe_digest(recipe) == recipe_digest(_student(tmp_path, "jitter.contrast=4e-1"))
    assert recipe_digest(recipe) != recipe_digest(_student(tmp_path, "jitter.contrast=0.5"))


def test_the_digest_never_changes_by_accident(tmp_path: Path) -> None:
    assert recipe_digest(_student(tmp_path).jitter) == "04178cb713b76c253535b22f0cc7618e"
