"""`tinymim demo`: one teacher pass, two students, and the same networks without it. Works offline, on a CPU."""

import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from tinymim.configs.codecs.relations import DenseCodec, SketchCodec
from tinymim.configs.errors import CacheMismatch, CheckpointError, SourceError, UserError
from tinymim.configs.load import load_recipe, recipe_digest
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.evaluate import EvaluateRecipe
from tinymim.configs.schema.pretrain import PretrainMaeRecipe
from tinymim.configs.schema.recipes import RECIPES
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.models import ModelConfig
from tinymim.models.checkpoints import read_metadata, tensors_sha256
from tinymim.models.files import weights_file
from tinymim.models.vit import count_parameters
from tinymim.pipeline.decode import environment
from tinymim.pipeline.index import INDEX_NAME, read_index
from tinymim.stages import cache_teacher, evaluate, make_shards, pretrain, train_student
from tinymim.stages.evaluation.encode import load_encoder
from tinymim.stages.evaluation.examples import relation_examples
from tinymim.stages.pages.demo import Arm, Report, text_table, write_report
from tinymim.stages.run.folder import ENCODER_NAME, EVALUATION_NAME, STUDENT_NAME, read_metrics
from tinymim.stages.run.progress import logger
from tinymim.storage.atomic import write_json_atomic
from tinymim.storage.layout import VIEWS
from tinymim.storage.reader import CacheReader
from tinymim.targets.kinds import make_kind

RESULTS_NAME = "results.json"
TEACHER = "package:demo-teacher"
TEACHER_IMAGES, TEACHER_IMAGE_SEED = 10_000, 1  # the images of configs/recipes/demo-teacher.yaml
STUDENTS = ("wide", "narrow")
# Other images than the teacher's (1), and than those on which the demo's recipes were tuned (101).
TRAIN_IMAGE_SEED, VAL_IMAGE_SEED = 100, 102


_R = TypeVar("_R", CacheTeacherRecipe, TrainStudentRecipe, PretrainMaeRecipe)


@dataclass(frozen=True)
class DemoSize:
    """The size of the demo; None keeps the value of the shipped recipes."""

    train_images: int = 2400
    val_images: int = 600
    images_per_shard: int = 600
    steps: int | None = None
    batch_size: int | None = None
    workers: int = 1
    threads: int | None = None


@dataclass(frozen=True)
class Recipes:
    """The shipped recipes with the paths and seeds of this demo; by name of student, and of arm for the probes."""

    cache: CacheTeacherRecipe
    students: dict[str, TrainStudentRecipe]
    autoencoders: dict[str, PretrainMaeRecipe]
    probes: dict[str, EvaluateRecipe]


def run(
    folder: str | Path, seed: int = 0, size: DemoSize | None = None, teacher_weights: str = TEACHER
) -> dict[str, Any]:
    """Run the steps that are missing in `folder`, print the table and write the report.

    Args:
        folder: the folder for shards, cache and runs; one folder per seed.
        seed: the seed of views, sketches, initial weights and orders. It does not change the images and the teacher.
        size: the size of the demo; tests use smaller ones.
        teacher_weights: weights to use instead of the shipped teacher's.

    Returns:
        JSON values: `report` (the path of report.html), `seed`, and `arms`, the encoders with their accuracies
        (shares, not percent).

    Raises:
        UserError: `folder` holds the demo of another seed or size, or something else.
        Interrupted: a signal stopped the demo; the same command continues.
    """
    size = size or DemoSize()
    root = Path(os.path.abspath(folder))
    recipes = load_recipes(root, seed, size, teacher_weights)
    weights_file(teacher_weights)  # refuse missing weights before drawing the images

    logger.info(f"demo 1/5: draw {size.train_images:,} + {size.val_images:,} images")
    draw_images(root / "images" / "train", size.train_images, TRAIN_IMAGE_SEED, size.images_per_shard)
    draw_images(root / "images" / "val", size.val_images, VAL_IMAGE_SEED, size.images_per_shard)

    logger.info(f"demo 2/5: cache {recipes.cache.num_views} views of every training image with the teacher")
    with folder_hint(CacheMismatch):
        cache_teacher.run(recipes.cache)

    logger.info("demo 3/5: train two students from the cache, without the teacher")
    for student in recipes.students.values():
        with folder_hint(CacheMismatch, CheckpointError):
            train_student.run(student)

    logger.info("demo 4/5: train the same two networks as masked autoencoders, for the same number of steps")
    for autoencoder in recipes.autoencoders.values():
        with folder_hint(CheckpointError):
            pretrain.run(autoencoder)

    logger.info("demo 5/5: evaluate all seven encoders by k-NN and linear probe")
    arms = measure(recipes)
    results = {"seed": seed, "arms": [asdict(arm) for arm in arms]}
    write_json_atomic(root / RESULTS_NAME, results)
    path = write_report(make_report(recipes, arms, seed, size), root)

    print(f"{text_table(arms)}\n\n{describe_teacher(recipes.cache, arms[0])}\n")
    print(f"report: {Path(folder) / path.name}\n\n{NEXT_COMMANDS}")
    return {"report": str(Path(folder) / path.name)} | results


NEXT_COMMANDS = """\
On your own images (a folder of class folders, or a flat folder):
  tinymim make-shards PICTURES data/mine
  tinymim cache-teacher demo-cache --set source.shards=data/mine --set cache=caches/mine --set run.folder=runs/cache
  tinymim train-student demo-wide --set source.shards=data/mine --set cache=caches/mine --set run.folder=runs/mine
For a real teacher, start from the recipes imagenet-mae-l-cache and imagenet-tinymim-t."""


# ---- recipes and images


def load_recipes(root: Path, seed: int, size: DemoSize, teacher_weights: str) -> Recipes:
    """Load and validate all recipes of the demo. Writes nothing."""
    runs, train = root / "runs", root / "images" / "train"

    def common(name: str) -> dict[str, Any]:
        run_section = {"run.folder": runs / name, "run.seed": seed}
        threads = {"run.threads": size.threads} if size.threads else {}
        return {"source.shards": train, "loader.workers": size.workers, **run_section, **threads}

    def training(name: str) -> dict[str, Any]:
        optim = {"optim.steps": size.steps, "optim.batch_size": size.batch_size}
        return {**common(name), "order.seed": seed, **{key: value for key, value in optim.items() if value}}

    cache = _load(
        "demo-cache",
        CacheTeacherRecipe,
        {**common("cache"), "cache": root / "cache", "views.seed": seed, "teacher.weights": teacher_weights},
    )
    students = {
        name: _load(f"demo-{name}", TrainStudentRecipe, {**training(name), "cache": root / "cache"})
        for name in STUDENTS
    }
    autoencoders = {
        name: _load(f"demo-{name}-mae", PretrainMaeRecipe, {**training(f"{name}-mae"), "views.seed": seed})
        for name in STUDENTS
    }
    teacher = cache.teacher
    sizes = teacher.model_dump(include=set(ModelConfig.model_fields))
    pixels = {"mean": teacher.mean, "std": teacher.std}
    probes = {"teacher": _probe(cache, "teacher", sizes, teacher.weights, block=teacher.block, **pixels)}
    for name, student in students.items():
        assert student.student is not None  # the demo's recipes have one each
        arms = {
            name: str(student.run.folder / STUDENT_NAME),
            f"{name}-mae": str(autoencoders[name].run.folder / ENCODER_NAME),
            f"{name}-random": "random",
        }
        for arm, weights in arms.items():
            probes[arm] = _probe(student, arm, student.student.model_dump(), weights)
    return Recipes(cache, students, autoencoders, probes)


def _load(name: str, kind: type[_R], overrides: dict[str, Any]) -> _R:
    """Load a shipped recipe. Values are quoted as JSON, a subset of YAML, so that any path is possible."""
    quoted = [
        f"{key}={json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)}"
        for key, value in overrides.items()
    ]
    (stage,) = (stage for stage, recipe in RECIPES.items() if recipe is kind)
    recipe = load_recipe(Path(name), stage, quoted)
    assert isinstance(recipe, kind)
    return recipe


def _probe(
    like: CacheTeacherRecipe | TrainStudentRecipe, arm: str, model: Any, weights: str, **more: Any
) -> EvaluateRecipe:
    """The recipe that evaluates one encoder on the demo's images: the whole image, mean over patch tokens."""
    images = Path(like.source.shards).parent
    return EvaluateRecipe.model_validate(
        {
            "stage": "evaluate",
            "train": {"shards": images / "train"},
            "val": {"shards": images / "val"},
            "model": model,
            "weights": weights,
            "resize_ratio": 1.0,
            "loader": like.loader,
            "run": {**like.run.model_dump(), "folder": like.run.folder.parent / f"eval-{arm}"},
            **more,
        }
    )


def draw_images(target: Path, count: int, seed: int, images_per_shard: int) -> None:
    """Make one set of drawn shards unless it exists. It appears complete, by rename.

    Raises:
        SourceError: `target` holds other images.
    """
    options = make_shards.Options(images_per_shard=images_per_shard, count=count, seed=seed)
    wanted = {"source": make_shards.DRAWN, **make_shards.recorded(make_shards.DRAWN, options)}
    if target.exists():
        found = read_index(target)["made_by"] if (target / INDEX_NAME).exists() else "no index"
        if found == wanted:
            return
        raise SourceError(
            f"{target} holds other images",
            got=found,
            expected=wanted,
            hint="give another --folder; nothing was changed",
        )
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():  # of an interrupted demo
        shutil.rmtree(partial)
    make_shards.run(make_shards.DRAWN, partial, options)
    partial.rename(target)


@contextmanager
def folder_hint(*kinds: type[UserError]) -> Iterator[None]:
    """Add the demo's remedy to the hint of a stage's error."""
    try:
        yield
    except kinds as error:
        ours = "in the demo: give another --folder, or the --seed of this one"
        hint = f"{error.hint}; {ours}" if error.hint else ours
        raise type(error)(error.what, got=error.got, expected=error.expected, hint=hint) from error


# ---- evaluation


def measure(recipes: Recipes) -> list[Arm]:
    """Evaluate the teacher, and every student's network distilled, as a masked autoencoder, and untrained."""
    block, depth = recipes.cache.teacher.block, recipes.cache.teacher.depth
    made_of = read_metadata(*weights_file(recipes.cache.teacher.weights))
    steps = int(made_of["steps"]) if made_of.get("steps", "").isdigit() else None
    arms = [_arm(recipes, "teacher", f"teacher, block {block} of {depth}", "masked autoencoder", steps, "-")]
    for name, student in recipes.students.items():
        label = f"{name} student"
        arms += [
            _arm(recipes, name, label, "distilled from the cache", student.optim.steps, "1 for both"),
            _arm(recipes, f"{name}-mae", label, "masked autoencoder", recipes.autoencoders[name].optim.steps, "0"),
            _arm(recipes, f"{name}-random", label, "not at all", 0, "0"),
        ]
    return arms


def _arm(recipes: Recipes, name: str, label: str, how_trained: str, steps: int | None, passes: str) -> Arm:
    recipe = recipes.probes[name]
    model, _, _ = load_encoder(recipe)
    identity = {"recipe_digest": recipe_digest(recipe), "weights_sha256": tensors_sha256(model.state_dict())}
    stored = recipe.run.folder / EVALUATION_NAME
    found = json.loads(stored.read_bytes()) if stored.exists() else {}
    if any(found.get(key) != value for key, value in identity.items()):
        found = evaluate.run(recipe)
    parameters = count_parameters(model)
    return Arm(label, parameters, how_trained, steps, passes, found["knn_top1"], found["linear_top1"])


def describe_teacher(recipe: CacheTeacherRecipe, teacher: Arm) -> str:
    """One sentence on what the teacher is."""
    millions, config = teacher.parameters / 1e6, recipe.teacher
    network = f"a {millions:.1f} M-parameter ViT ({config.embed_dim} wide, {config.depth} blocks)"
    steps = "" if teacher.steps is None else f" for {teacher.steps:,} steps"
    if config.weights == TEACHER:
        return (
            f"The demo teacher is {network}, trained with `tinymim pretrain-mae demo-teacher` on {TEACHER_IMAGES:,} "
            f"other generated images (seed {TEACHER_IMAGE_SEED}){steps}. It has seen no photograph and no label."
        )
    return f"The teacher is {network} from {config.weights}, trained{steps or ' for an unknown number of steps'}."


# ---- the report


def make_report(recipes: Recipes, arms: Sequence[Arm], seed: int, size: DemoSize) -> Report:
    """The content of the page, read from the cache and the run folders."""
    assert recipes.cache.cache is not None  # `load_recipes` sets it
    reader = CacheReader(recipes.cache.cache)
    layer, codec = reader.layer(), recipes.cache.codec
    assert isinstance(codec, SketchCodec)
    num_records = reader.coverage(layer.name).num_records
    by_layer = reader.bytes_by_component()
    views, target = by_layer[VIEWS], by_layer[layer.name]
    dense = make_kind(DenseCodec(name="dense", relations=codec.relations), recipes.cache.teacher.block)
    one_error = 100 * 0.5 / size.val_images**0.5
    student = recipes.students[STUDENTS[0]]
    lesson = (
        f"A teacher encoded {recipes.cache.num_views} views of each of {size.train_images:,} images once, and a cache "
        "keeps a sketch of its token relations for every view. Two students of different size were trained from this "
        f"cache, without the teacher, for {student.optim.steps:,} steps of {student.optim.batch_size} views. For "
        "comparison, the same two networks were trained as masked autoencoders, on the same images for the same number "
        "of steps, and evaluated untrained. Labels are used for evaluation only."
    )
    caveat = (
        f"k-NN and linear probe on frozen features (mean of the patch tokens): {size.train_images:,} labelled images, "
        f"evaluated on {size.val_images:,} held-out ones; 10 classes, so chance is 10%. The standard error due to the "
        f"choice of the held-out images is at most {one_error:.1f} points. Another seed also changes the figures."
    )
    return Report(
        arms=arms,
        lesson=lesson,
        teacher=describe_teacher(recipes.cache, arms[0]),
        caveat=caveat,
        student_curves={f"{name} student": read_metrics(r.run.folder) for name, r in recipes.students.items()},
        mae_curves={f"{name} student": read_metrics(r.run.folder) for name, r in recipes.autoencoders.items()},
        examples=list(relation_examples(recipes.cache, recipes.students, reader)),
        bytes_per_view={
            "sketches": target["records"] / num_records,
            "digests": views["records"] / num_records,
            "keys": views["keys"] / num_records,
            "overhead": (views["overhead"] + target["overhead"]) / num_records,
        },
        dense_bytes=sum(spec.size_bytes for spec in dense.specs(layer.shapes) if spec.dtype == "float16"),
        head_k=codec.head_k,
        tail_k=codec.tail_k,
        provenance={
            "layer (spec id)": layer.spec_id,
            "teacher weights (sha256)": str(layer.teacher["weights_sha256"]),
            "codec": f"{layer.target['name']} {layer.target['version']}: {codec.rows} rows per head, "
            f"{codec.head_k} exact + {codec.tail_k} drawn entries, relations {', '.join(codec.relations)}",
            "seed of views, sketches, weights, orders": str(seed),
            "seeds of the drawn images": f"{TRAIN_IMAGE_SEED} (training), {VAL_IMAGE_SEED} (validation)",
            "libraries": ", ".join(f"{name} {version}" for name, version in environment().items()),
            "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        },
    )
