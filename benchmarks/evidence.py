"""Does a student from the cache learn what one with the teacher at its side learns? Ten experiments on 64-px images.

    python benchmarks/evidence.py tune > rates.md              # learning rates, by images that no result is read off
    python benchmarks/evidence.py run [--only 1 4] [--seeds 0] # all runs that have no result yet
    python benchmarks/evidence.py page [--only 8] > page.md    # results so far: tables, differences, commands

Several processes may `run` at once, in one folder: each takes the next run that nobody has taken; a killed one is taken
again. The teacher is that of `tinymim pretrain-mae tinyimagenet40-mae`; the one of the page lies beside its results, so
that runs which come later have the same: another machine's would differ in rounding. Results are one small JSON file
per run, in `--results`; keep them and the page under benchmarks/results/. `evidence_arms.py` says what is compared,
`evidence_page.py` how it is judged. Data: `--data`, shards of 20,000 labelled training and 2,000 validation images of
40 classes.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import evidence_online
import evidence_page
import provenance
import torch
from evidence_arms import CACHES, EXPERIMENTS, FINETUNE_STEPS, RATES, TARGETS, Arm, Kind, all_runs, of_target

from tinymim.configs.load import load_recipe
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.evaluate import EvaluateRecipe
from tinymim.configs.schema.finetune import FinetuneRecipe
from tinymim.configs.schema.pretrain import PretrainMaeRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.models import ModelConfig
from tinymim.models.student import StudentModel, shapes_of
from tinymim.models.teacher import Teacher
from tinymim.models.vit import Normalise, build_vit
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages import cache_teacher, evaluate, finetune, pretrain, train_student
from tinymim.stages.cache.info import describe
from tinymim.stages.fidelity import spread_items
from tinymim.stages.run.folder import ENCODER_NAME, LAST_NAME, RECIPE_NAME, STUDENT_NAME
from tinymim.stages.run.progress import logger
from tinymim.stages.training.states import read_state
from tinymim.storage.atomic import write_json_atomic
from tinymim.storage.layout import VIEWS
from tinymim.targets.kinds import make_kind

DATA = Path(os.environ.get("TINYMIM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "tinyimagenet40"
RESULTS = Path(__file__).parent / "results" / "evidence"
TUNE_SEED = 9
TRIED = (4e-3, 1.2e-2, 2.4e-2, 4.8e-2)
# Of kinds of targets; that of relations is the one above. The outer two only where the best lies at that end.
TRIED_FOR_TARGETS = (1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2, 1.92e-1)
TUNED: tuple[Kind, ...] = ("cached", "features", "mae", "supervised")
ONLINE: dict[Kind, evidence_online.Wanted] = {
    "online": "relations",
    "features": "features",
    "strange": "strange relations",
}
# No augmentation but the views, no smoothing, one rate for all layers: what the other arms have, with labels.
PLAIN = ["augment={rand_augment: null, erasing: 0, mixup: 0, cutmix: 0}", "smoothing=0", "pool=cls"]


class Lab:
    """Folders and settings of one call, and how recipes are put together from them."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.data, self.folder, self.results = flags.data, flags.folder, flags.results
        self.teacher, self.classifier = flags.teacher, flags.classifier
        self.threads = flags.threads

    def _run(self, folder: Path, seed: int = 0) -> list[str]:
        return [f"run.folder={folder}", f"run.seed={seed}", f"run.threads={self.threads}"]

    def cache(self, name: str) -> CacheTeacherRecipe:
        """The recipe of a cache by its name in `CACHES`."""
        cache = CACHES[name]
        weights = self.classifier if cache.classifier else self.teacher
        sets = [f"source.shards={self.data}", f"teacher.weights={weights}", *cache.sets]
        sets += [f"cache={self.place(cache.after or name)}", "loader.workers=1"]
        # A process of its own: several may write one cache.
        sets += self._run(self.folder / "caching" / f"{name.replace(' ', '-')}-{os.getpid()}")
        return cast(CacheTeacherRecipe, load_recipe(Path(cache.recipe), "cache-teacher", sets))

    def place(self, cache: str) -> Path:
        """Where a cache is."""
        folder: Path = self.folder / "caches"
        return folder / cache.replace(" ", "-")

    def rate(self, arm: Arm) -> list[str]:
        """`--set` of the learning rate; those that come with the arm's own settings go before it."""
        if not arm.target:
            return [f"optim.base_lr={RATES[arm.kind]}"] if arm.kind in RATES else []
        if arm.target == "relations":
            return [f"optim.base_lr={RATES['cached']}"]
        best = self.best_rate(arm.target) or RATES["cached"]
        return [f"optim.base_lr={best}"]

    def best_rate(self, target: str) -> float | None:
        """That of the highest sum of k-NN and linear probe, of those tried so far; None before the first."""
        names = {rate: _name(of_rate(target, rate), TUNE_SEED) for rate in TRIED_FOR_TARGETS}
        tried = {rate: self.results / f"{name}.json" for rate, name in names.items()}
        found = {rate: json.loads(path.read_bytes()) for rate, path in tried.items() if path.exists()}
        return max(found, key=lambda rate: found[rate]["knn_top1"] + found[rate]["linear_top1"], default=None)

    def training(self, arm: Arm, seed: int, folder: Path) -> tuple[str, str, list[str]]:
        """Command, shipped recipe and `--set`s that make an arm's student; those of `online` arms are its settings."""
        rate = self.rate(arm)
        if arm.kind == "supervised":
            own = [*rate, *PLAIN, "weights=random", "optim.layer_decay=1", "optim.betas=[0.9, 0.95]", "optim.min_lr=0"]
            return "finetune", "tinyimagenet40-finetune", self.finetuning(arm.steps, seed, folder, [*own, *arm.sets])
        sets = [f"source.shards={self.data}", f"optim.steps={arm.steps}", f"order.seed={seed}", "loader.workers=1"]
        sets += [*self._run(folder, seed), f"checkpoint.every_steps={arm.steps}", "checkpoint.keep=1", *rate]
        if arm.kind == "mae":
            model = self.student().model_dump(exclude_none=True)
            sets += [f"model={json.dumps(model)}", "mae.decoder_dim=48", *arm.sets]
            return "pretrain-mae", "tinyimagenet40-mae", sets
        return "train-student", "tinyimagenet40-student", [*sets, f"cache={self.place(arm.cache)}", *arm.sets]

    def finetuning(self, steps: int, seed: int, folder: Path, sets: list[str]) -> list[str]:
        """`--set`s of `finetune tinyimagenet40-finetune`."""
        data = [f"train.shards={self.data}", f"val.shards={self.data}", "optim.epochs=null", f"optim.steps={steps}"]
        data += [f"order.seed={seed}", "loader.workers=1", "validation.every_epochs=100", "checkpoint.keep=1"]
        return [*data, *self._run(folder, seed), f"checkpoint.every_steps={steps}", *sets]

    def student(self) -> ModelConfig:
        """The student of all arms that do not name others."""
        recipe = cast(TrainStudentRecipe, load_recipe(Path("tinyimagenet40-student"), "train-student"))
        assert recipe.student is not None
        return recipe.student

    def probes(self, model: ModelConfig, weights: str, seed: int, folder: Path, *more: str) -> dict[str, Any]:
        """k-NN and linear probe: 10,000 training images against the validation set, unless `more` sets another."""
        sets = [f"train.shards={self.data}", "train.pattern=train-00000?.tar", f"weights={weights}"]
        sets += [f"model={json.dumps(model.model_dump(exclude_none=True))}", "loader.workers=1"]
        sets += [f"val.shards={self.data}", *self._run(folder, seed), *more]
        recipe = cast(EvaluateRecipe, load_recipe(Path("tinyimagenet40-eval"), "evaluate", sets))
        return evaluate.run(recipe)


def main() -> None:
    flags = _flags()
    lab = Lab(flags)
    torch.set_num_threads(flags.threads)
    if flags.what == "page":
        print(evidence_page.page(flags.results, lab_commands(lab, flags.only), flags.only))
    elif flags.what == "tune":
        for number, arm in _rates(lab):
            if number in flags.only:
                _once(lab, "tune", arm, TUNE_SEED)
        print(evidence_page.rates(flags.results))
    else:
        for number, arm, seed in all_runs():
            if number in flags.only and seed in flags.seeds:
                _once(lab, number, arm, seed)
        for number, arm, seed in all_runs():
            if number in flags.only and seed in flags.seeds and seed in arm.finetuned:
                _finetuned(lab, arm, seed)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="students from the cache against students with the teacher")
    parser.add_argument("what", choices=("tune", "run", "page"))
    parser.add_argument("--only", nargs="+", default=list(EXPERIMENTS), choices=list(EXPERIMENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(100)))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"), help="caches and run folders")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--teacher", type=Path, default=RESULTS / "teacher.safetensors", help="its weights")
    parser.add_argument("--classifier", type=Path, default=Path("runs/evidence/classifier/last.safetensors"))
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _rates(lab: Lab) -> Iterator[tuple[str, Arm]]:
    """Number of an experiment that wants it, and arm."""
    for kind in TUNED:
        for rate in TRIED:
            yield "4", Arm(f"{kind}, base_lr {rate:g}", kind, sets=(f"optim.base_lr={rate}",))
    lowest, *middle, highest = TRIED_FOR_TARGETS
    for target in TARGETS:
        if target != "relations":
            for rate in middle:
                yield "8", of_rate(target, rate)
            ends = {middle[0]: lowest, middle[-1]: highest}
            if (further := ends.get(lab.best_rate(target) or 0)) is not None:
                yield "8", of_rate(target, further)


def of_rate(target: str, rate: float) -> Arm:
    """The arm that tries a learning rate for a target."""
    return of_target(target, sets=(f"optim.base_lr={rate}",), name=f"{target}, base_lr {rate:g}")


# ---------------------------------------------------------------- one run


def _once(lab: Lab, number: str, arm: Arm, seed: int) -> None:
    """Make the student, probe it, write the result; nothing where there is one or another process is at it."""
    name = _name(arm, seed)
    result = lab.results / f"{name}.json"
    folder = lab.folder / "runs" / name
    if result.exists() or not _taken(folder):
        return
    logger.info(f"evidence: experiment {number}, {arm.name}, seed {seed}")
    if arm.kind == "cached":
        for cache, own in CACHES.items():
            if arm.cache in (cache, own.after):
                cache_teacher.run(lab.cache(cache))  # at once where it is there already
    began_s, began_cpu_s = time.monotonic(), _cpu_s()
    students = _train(lab, arm, seed, folder)
    train = {"train_s": time.monotonic() - began_s, "train_cpu_s": _cpu_s() - began_cpu_s}
    more = ["val.pattern=train-00001[89].tar"] if number == "tune" else []
    more += ["pool=cls"] if arm.kind == "supervised" else []
    for student, (model, weights) in students.items():
        found = lab.probes(model, weights, seed, folder / student / "evaluation", *more)
        record: dict[str, Any] = {"experiment": number, "arm": arm.name, "student": student, "seed": seed}
        record |= {key: found[key] for key in ("knn_top1", "knn_top5", "linear_top1", "linear_top5")}
        record |= {"weights_sha256": found["weights_sha256"], "model": found["model"], **train}
        record["commit"] = provenance.commit()
        if arm.judged and arm.kind in ("cached", "online", "strange"):
            record |= held_out_kl(lab, model, folder / student)
        if arm.kind == "cached":
            record["bytes_per_view"] = _bytes_per_view(lab, arm, folder)
        path = result.with_name(f"{name}{'-' + student if student else ''}.json")
        lab.results.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, record)
    if not result.exists():  # of several students: done
        write_json_atomic(result, {"arm": arm.name, "seed": seed, "students": list(students)})


def _bytes_per_view(lab: Lab, arm: Arm, folder: Path) -> float:
    """Of the view layer and the layers that an arm reads."""
    recipe = cast(TrainStudentRecipe, load_recipe(folder / RECIPE_NAME, "train-student"))
    read = {VIEWS} | {name for name, _ in recipe.each_layer()}
    layers = describe(str(lab.place(arm.cache)))["layers"]
    if len(layers) == 2:  # its only target, whatever the recipe calls it
        return float(sum(layer["bytes_per_view"] for layer in layers))
    return float(sum(layer["bytes_per_view"] for layer in layers if layer["name"] in read))


def _finetuned(lab: Lab, arm: Arm, seed: int) -> None:
    """Fine-tune a student that is there, at the shipped recipe's settings, and write what accuracy that gives."""
    trained = lab.folder / "runs" / _name(arm, seed)
    result = lab.results / f"finetune-{_name(arm, seed)}.json"
    folder = lab.folder / "finetuned" / _name(arm, seed)
    if not (lab.results / f"{_name(arm, seed)}.json").exists() or result.exists() or not _taken(folder):
        return
    name = {"mae": ENCODER_NAME, "supervised": LAST_NAME}.get(arm.kind, STUDENT_NAME)
    weights = "random" if arm.kind == "random" else trained / name
    sets = lab.finetuning(FINETUNE_STEPS, seed, folder, [f"weights={weights}"])
    recipe = cast(FinetuneRecipe, load_recipe(Path("tinyimagenet40-finetune"), "finetune", sets))
    report = finetune.run(recipe)
    assert report is not None
    last = report["weights"][LAST_NAME]
    record = {"arm": arm.name, "seed": seed, "finetune_top1": last["top1"], "top5": last["top5"]}
    write_json_atomic(result, record | {"commit": provenance.commit()})


def _name(arm: Arm, seed: int) -> str:
    return f"{arm.name}-seed{seed}".translate(str.maketrans(" ", "-", ",=()"))


def _train(lab: Lab, arm: Arm, seed: int, folder: Path) -> dict[str, tuple[ModelConfig, str]]:
    """Model and weights of an arm's students, by name; "" where there is one."""
    command, base, sets = lab.training(arm, seed, folder)
    model = lab.student()
    if arm.kind == "random":
        return {"": (model, "random")}
    if arm.kind == "supervised":
        finetune.run(cast(FinetuneRecipe, load_recipe(Path(base), command, sets)))
        return {"": (model, str(folder / LAST_NAME))}
    if arm.kind == "mae":
        pretrain.run(cast(PretrainMaeRecipe, load_recipe(Path(base), command, sets)))
        return {"": (model, str(folder / ENCODER_NAME))}
    recipe = cast(TrainStudentRecipe, load_recipe(Path(base), command, sets))
    if arm.kind in ONLINE:
        evidence_online.train(recipe, lab.cache(arm.cache), ONLINE[arm.kind])
    else:
        train_student.run(recipe)
    return {name: (own.student or model, str(own.run.folder / STUDENT_NAME)) for name, own in recipe.each().items()}


@torch.no_grad()
def held_out_kl(lab: Lab, model: ModelConfig, folder: Path, num_images: int = 512) -> dict[str, float]:
    """KL in nats of a trained student's relations against dense ones, of one view of validation images each."""
    cache = lab.cache("64x8")
    kind = make_kind(*cache.layers[cache.layer_name])
    teacher = Teacher(cache.teacher, kind.taps)
    vit = build_vit(model)
    student = StudentModel(vit, kind.head(shapes_of(vit), teacher.shapes()))
    student.load_state_dict(read_state(folder)["parts"]["student"])
    student.eval()
    source = open_shards(cache.source.model_copy(update={"pattern": "val-*.tar"}))
    views = ImageViews(source.shards, RandomViews(cache.views), cache.views.seed)
    total: dict[str, float] = {}
    for items in spread_items(source, num_images, 64):
        batch = views.batch(items)
        answers = student(Normalise()(batch.pixels.float()))
        for name, loss in kind.losses(answers, kind.exact(teacher(batch.pixels))).items():
            total[f"kl_{name}"] = total.get(f"kl_{name}", 0.0) + float(loss.mean()) * len(batch.keys) / num_images
    return total


def _taken(folder: Path) -> bool:
    """Whether this process may work in a run folder: nobody living has taken it."""
    folder.mkdir(parents=True, exist_ok=True)
    claim = folder / "taken-by"
    try:
        with claim.open("x") as file:
            file.write(str(os.getpid()))
        return True
    except FileExistsError:
        owner = claim.read_text() or "0"
        if Path(f"/proc/{owner}").exists() and int(owner) != os.getpid():
            return False
        claim.write_text(str(os.getpid()))
        return True


def _cpu_s() -> float:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


def lab_commands(lab: Lab, only: Sequence[str]) -> list[str]:
    """The commands that make the caches and each arm of seed 0 by hand, without what changes no number."""
    runs = [arm for number, arm, seed in all_runs() if seed == 0 and number in only]
    read = {arm.cache for arm in runs if arm.kind in ("cached", *ONLINE)}
    read |= {CACHES[name].after for name in read} - {""}
    lines = [
        _command("cache-teacher", each.recipe, list(each.sets), each.after or name)
        for name, each in CACHES.items()
        if name in read or each.after in read
    ]
    for arm in runs:
        if arm.kind in ("cached", "mae", "supervised"):
            command, base, sets = lab.training(arm, 0, Path("runs/evidence") / _name(arm, 0))
            lines.append(_command(command, base, sets, arm.cache if arm.kind == "cached" else ""))
    return lines


def _command(command: str, recipe: str, sets: list[str], cache: str) -> str:
    quiet = ("loader.", "checkpoint.", "run.threads", "source.shards", "train.shards", "val.shards", "cache=")
    kept = [each for each in sets if not each.startswith(quiet)]
    kept += [f"cache=caches/{cache.replace(' ', '-')}"] if cache else []
    return f"tinymim {command} {recipe} " + " ".join(f"--set '{each}'" for each in kept)


if __name__ == "__main__":
    main()
