"""The teacher in the loop against the cache: step, input, memory, and cost per student.

    python benchmarks/online_vs_cached.py [--device cuda] [--students T S B] [--rounds 5] > page.md

The online side is as good as it can be had: the teacher is cut at its tap, sees the student's batch without gradients
(in bf16 on a GPU), and its q, k, v become the target where they are: as dense maps, and as the records' own sketch,
of which the faster counts. Student, batch, views, jitter and loss are the same on both sides: the step is that of
`train-student`. Once more there is the same step without any target, and what is left to pay beside it is what the
cache costs.

On a GPU: ViT-L/16, block 18 of 24, students T, S and B at 224 px, wall time. On a CPU: ViT-B/16, block 9 of 12, the
same students at 112 px, CPU time of one thread. Weights are random: speed does not depend on them. The cache is made
first, in a temporary folder, by a shallow teacher with the heads and tokens of the real one, so that its records have
their size. Variants take turns, step by step; the first step of each does not count. Without photographs at --data
nothing is measured. Targets that hold for GPUs stand beside; exit code 1 where a GPU misses one. Keep the page
under benchmarks/results/.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, ClassVar

import provenance
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tinymim.configs.codecs.relations import SketchCodec
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.models import ModelConfig, TeacherConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.configs.taps import Shapes
from tinymim.models.student import StudentModel, shapes_of
from tinymim.models.taps import CutTeacher
from tinymim.models.teacher import Teacher
from tinymim.models.timm_folder import Pixels
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD, build_vit
from tinymim.pipeline.dataset import ImageViews, ViewBatch
from tinymim.pipeline.joined import join
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.records import of_layer
from tinymim.pipeline.replay import ReplayedViews
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages import cache_teacher
from tinymim.stages.training.optim import parts_of
from tinymim.stages.training.ranks import Ranks
from tinymim.stages.training.student_step import Student, StudentStep, make_students
from tinymim.stages.training.terms import Term
from tinymim.storage.blocks import encode_arrays
from tinymim.storage.reader import CacheReader
from tinymim.targets.contract import Answers, Loss, StudentTarget, Target, TargetKind
from tinymim.targets.kinds import make_kind

DATA = Path(os.environ.get("TINYMIM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
STUDENTS = {"T": "vit_tiny_patch16_224", "S": "vit_small_patch16_224", "B": "vit_base_patch16_224"}
STATED = Pixels(IMAGENET_MEAN, IMAGENET_STD).metadata()
SCALES: dict[str, dict[str, Any]] = {
    "cuda": {"teacher": "vit_large_patch16_224", "block": 18, "size": 224, "batch": 256, "precision": "bf16"},
    "cpu": {"teacher": "vit_base_patch16_224", "block": 9, "size": 112, "batch": 16, "precision": "fp32"},
}
CODEC = SketchCodec()
VARIANTS = ("no target", "cached", "online, dense maps", "online, sketched")
EPOCHS, CACHED_VIEWS = 300, (10, 300)
FREE, LEAST = 1.05, 4.0  # targets on a GPU: cached / no target, online / cached with student T
Lap = Callable[[str], None]


@dataclass
class Setting:
    """What all variants of one student share."""

    recipe: TrainStudentRecipe
    teacher: Teacher
    kind: TargetKind
    shapes: Shapes
    layer: str
    batch: ViewBatch
    student: Student

    @property
    def device(self) -> torch.device:
        """Of teacher and student."""
        return self.student.learner.device


class NoTarget:
    """In the place of a target kind: a loss that costs next to nothing and trains all that the others train."""

    measure: ClassVar[str] = "no"

    def __init__(self, kind: TargetKind) -> None:
        self.head, self.taps = kind.head, kind.taps

    def losses(self, answers: Answers, target: Target) -> dict[str, Loss]:
        """Mean squares of the answers."""
        squares = torch.stack([side.float().square().flatten(1).mean(1) for side in answers]).sum(0)
        return {"target": Loss(squares[:, None], torch.zeros_like(squares))}


@dataclass
class Measured:
    """By variant: seconds of the steps, of the parts of one, and peak memory in bytes."""

    steps: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in VARIANTS})
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)

    def ratios(self, above: str, below: str) -> list[float]:
        """Within each round."""
        return [a / b for a, b in zip(self.steps[above], self.steps[below], strict=True)]


def now_s(device: torch.device) -> float:
    """Of a GPU wall time after all that was sent there; of a CPU this process's CPU time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def one_step(setting: Setting, variant: str, lap: Lap) -> None:
    """A whole step, from a batch in memory to updated weights; `lap` is called at the end of every part."""
    kind, teacher, shapes, student = setting.kind, setting.teacher, setting.shapes, setting.student

    def target(pixels: Tensor, records: Mapping[str, Tensor], view_keys: Tensor, _: object) -> tuple[Target, ...]:
        if variant == "no target":
            return (None,)
        if variant == "cached":
            found = kind.decode(of_layer(records, setting.layer), view_keys, shapes)
            lap("unpack the target")
            return (found,)
        tapped = teacher(pixels)
        lap("teacher")
        if variant == "online, dense maps":
            found = kind.exact(tapped)
        else:
            found = kind.decode(kind.encode(tapped, view_keys), view_keys, shapes)
        lap("make the target")
        return (found,)

    compared: StudentTarget = NoTarget(kind) if variant == "no target" else kind
    count = len(setting.batch.keys)
    # Made anew for every step: it holds its last target, which would count as memory of the next variant.
    terms = [Term(compared, shapes)]
    step = StudentStep(setting.recipe, [student], terms, {setting.device: target}, torch.arange(count), count)
    step.take(0, setting.batch)
    with student.model.register_forward_pre_hook(lambda *_: lap("jitter")):
        for part in parts_of(count, accumulate=1):
            step.add(0, part)
    lap("student, forward and backward")
    step.update(0)
    lap("optimiser")


def measure(setting: Setting, rounds: int, steps: int) -> Measured:
    """All variants, `steps` steps each in turn."""
    found = Measured()
    for variant in VARIANTS:
        reset_peak(setting.device)
        one_step(setting, variant, lambda _: None)
        found.peak[variant] = peak_bytes(setting.device)
    for number in range(rounds):
        for place in range(len(VARIANTS)):  # another one begins each round
            variant = VARIANTS[(number + place) % len(VARIANTS)]
            began = now_s(setting.device)
            for _ in range(steps):
                one_step(setting, variant, lambda _: None)
            found.steps[variant].append((now_s(setting.device) - began) / steps)
    for variant in VARIANTS:
        parts: dict[str, float] = {}
        last = now_s(setting.device)

        def lap(name: str, parts: dict[str, float] = parts) -> None:
            nonlocal last
            here = now_s(setting.device)
            parts[name] = here - last
            last = here

        one_step(setting, variant, lap)
        found.parts[variant] = parts
    return found


def reset_peak(device: torch.device) -> None:
    """Begin to watch memory: of a GPU what torch holds there, of a CPU the process's resident memory (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return max([0, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))])


# ---------------------------------------------------------------- models, cache and input


def make_teacher(scale: dict[str, Any], kind: TargetKind, root: Path, device: torch.device) -> Teacher:
    path = root / "teacher.safetensors"
    model = timm.create_model(scale["teacher"], num_classes=0, img_size=scale["size"])
    save_file(model.state_dict(), path, STATED)
    fields = {"name": scale["teacher"], "img_size": scale["size"], "weights": str(path)}
    config = TeacherConfig.model_validate(fields | {"block": scale["block"], "precision": scale["precision"]})
    return Teacher(config, kind.taps).to(device)


def make_cache(args: argparse.Namespace, scale: dict[str, Any], heads: int, root: Path) -> CacheReader:
    """By a shallow teacher with as many heads and tokens."""
    sizes = {"img_size": scale["size"], "embed_dim": 8 * heads, "depth": 2, "num_heads": heads}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    save_file(model.state_dict(), root / "shallow.safetensors", STATED)
    fields: dict[str, Any] = {
        "stage": "cache-teacher",
        "source": {"shards": args.data, "pattern": args.pattern},
        "views": {"size": scale["size"]},
        "num_views": 2,
        "teacher": {
            "name": "vit_tiny_patch16_224",
            "block": 2,
            "weights": str(root / "shallow.safetensors"),
            **sizes,
        },
        "codec": CODEC,
        "cache": root / "cache",
        "audit_views": 0,
        "max_unreadable": 1.0,
        "loader": {"workers": 0},
        "run": {"folder": root / "run", "device": args.device, "threads": 1},
    }
    cache_teacher.run(CacheTeacherRecipe.model_validate(fields))
    return CacheReader(root / "cache")


def training(args: argparse.Namespace, scale: dict[str, Any], name: str, root: Path) -> TrainStudentRecipe:
    """The recipe of a student; nothing is written to its folder."""
    fields: dict[str, Any] = {
        "stage": "train-student",
        "source": {"shards": args.data, "pattern": args.pattern},
        "cache": root / "cache",
        "student": {"name": STUDENTS[name], "img_size": scale["size"]},
        "optim": {"batch_size": args.batch, "steps": 1, "base_lr": 1e-6},
        "order": {"shuffle_units": 2},
        "verify": {"first": 0},  # as after the first 4096 views of a run
        "precision": scale["precision"],
        "run": {"folder": root / name, "device": args.device, "threads": 1},
    }
    return TrainStudentRecipe.model_validate(fields)


def measure_input(
    args: argparse.Namespace, recipe: TrainStudentRecipe, arrays: Sequence[str], reader: CacheReader
) -> tuple[dict[str, float], SampleOrder, ViewBatch]:
    """Seconds per view on one core of both sides' input, in turn; their order, and one batch with its records."""
    source = join(open_shards(recipe.source), reader)
    batch_size = recipe.optim.batch_size
    order = SampleOrder(source.counts, recipe.order, batch_size, source.num_views)
    by_layer = {layer: arrays for layer in source.layers}
    replayed = ReplayedViews(
        reader, reader.manifest, source, by_layer, recipe.verify, len(order.lanes), order.slices_per_lane
    )
    law = ViewConfig.model_validate(reader.manifest.views)
    drawn = ImageViews(source.shards, RandomViews(law), law.seed)
    times: dict[str, list[float]] = {"views of the cache": [], "views drawn anew": []}
    batch: ViewBatch | None = None
    for entry in order.plan(min(order.steps_per_epoch, args.input_steps + 1)):
        began = time.process_time()
        found = replayed.batch(entry[0])
        middle = time.process_time()
        drawn.batch(found.items)
        times["views of the cache"].append((middle - began) / batch_size)
        times["views drawn anew"].append((time.process_time() - middle) / batch_size)
        if batch is None:
            batch = found.pin_memory() if args.device == "cuda" else found  # as a loader hands it over
    reads = []
    for info in reader.units(reader.layer().name)[:4]:
        began = time.process_time()
        reader.read_views(info)
        reads.append((time.process_time() - began) / info.num_records)
    assert batch is not None, "fewer photographs than one batch"
    # The first batch reads units that later ones use: means over all count reading as often as it comes.
    result = {name: statistics.mean(values) for name, values in times.items()}
    return result | {"of it, reading and unpacking a record": statistics.median(reads)}, order, batch


def stage_one_s(setting: Setting) -> float:
    """Seconds per view of what stage one does beside decoding: teacher, encoding, packing."""
    pixels, keys = setting.batch.pixels.to(setting.device), setting.batch.view_keys.to(setting.device)
    walls = []
    for _ in range(3):
        began = now_s(setting.device)
        records = setting.kind.encode(setting.teacher(pixels), keys)
        encode_arrays({name: array.cpu().numpy() for name, array in records.items()})
        walls.append((now_s(setting.device) - began) / len(pixels))
    return statistics.median(walls[1:])


def flop_limit(scale: dict[str, Any], student: str) -> tuple[float, float]:
    """GFLOP per image of the cut teacher's forward pass, and of the student's step; counted without computing."""
    kind = make_kind(CODEC, scale["block"])
    with torch.device("meta"):
        whole = timm.create_model(scale["teacher"], num_classes=0, img_size=scale["size"])
        vit = build_vit(ModelConfig(name=STUDENTS[student], img_size=scale["size"]))
        model = StudentModel(vit, kind.head(shapes_of(vit), shapes_of(whole))).eval()
        teacher = CutTeacher(whole, kind.taps)
        images = torch.zeros(1, 3, scale["size"], scale["size"])
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        teacher(images)
    with FlopCounterMode(display=False) as step:
        NoTarget(kind).losses(model(images), None)["target"].mean().backward()
    return forward.get_total_flops() / 1e9, step.get_total_flops() / 1e9


# ---------------------------------------------------------------- page


def header(args: argparse.Namespace, scale: dict[str, Any], batch_size: int) -> Iterator[str]:
    yield f"# The teacher online, or cached, {date.today()}\n"
    yield f"- commit {provenance.commit()}, command `{provenance.command()}`"
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{provenance.processor()}, 1 thread"
    yield f"- {device}; Python {platform.python_version()}, torch {torch.__version__}"
    yield (
        f"- teacher {scale['teacher']}, block {scale['block']}, {scale['precision']}, random weights; "
        f"{scale['size']} px, batch {batch_size}; records of {CODEC.rows} rows x {CODEC.tail_k} draws"
    )
    kind = "wall time" if args.device == "cuda" else "CPU time"
    yield f"- n = {args.rounds} rounds of {args.steps} steps, the variants in turn; medians (min to max), {kind}"
    if args.device == "cpu":
        yield "- a small run: the targets are for a GPU at full size (`--device cuda`) and stand beside for orientation"
    yield ""


def input_table(times: dict[str, float]) -> Iterator[str]:
    yield "## Input, one core\n\n| | ms a view | views/s |\n|---|---|---|"
    for name, seconds in times.items():
        yield f"| {name} | {1e3 * seconds:.3f} | {1 / seconds:,.0f} |"
    yield ""


def student_page(
    name: str, scale: dict[str, Any], found: Measured, batch_size: int, once_s: float, input_s: dict[str, float]
) -> Iterator[str]:
    yield f"## Student {name}\n\n| step | ms | images/s | peak memory, MiB | cores that decode for it |"
    yield "|---|---|---|---|---|"
    for variant in VARIANTS:
        seconds = statistics.median(found.steps[variant])
        rate = batch_size / seconds
        side = "views of the cache" if variant == "cached" else "views drawn anew"
        yield (
            f"| {variant} | {spread([1e3 * s for s in found.steps[variant]], '.1f')} | {rate:,.1f} | "
            f"{found.peak[variant] / 2**20:,.0f} | {rate * input_s[side]:.2f} |"
        )
    online = min(VARIANTS[2:], key=lambda variant: statistics.median(found.steps[variant]))
    forward, step = flop_limit(scale, name)
    full_forward, full_step = flop_limit(SCALES["cuda"], name)
    free, gain = found.ratios("cached", "no target"), found.ratios(online, "cached")
    yield "\n| ratio within a round | measured | target on a GPU | by FLOP | by FLOP at full size |"
    yield "|---|---|---|---|---|"
    yield f"| cached / no target | {spread(free, '.3f')} | at most {FREE} | 1 | 1 |"
    yield (
        f"| {online} / cached | {spread(gain, '.2f')} | {f'at least {LEAST:g}' if name == 'T' else '-'} | "
        f"{(forward + step) / step:.2f} = ({forward:.2f} + {step:.2f}) / {step:.2f} GFLOP | "
        f"{(full_forward + full_step) / full_step:.2f} = ({full_forward:.1f} + {full_step:.1f}) / {full_step:.1f} |"
    )
    yield "\n| part of a step, ms | " + " | ".join(VARIANTS) + " |"
    yield "|---|" + "---|" * len(VARIANTS)
    for part in dict.fromkeys(part for parts in found.parts.values() for part in parts):
        cells = [f"{1e3 * found.parts[v][part]:.1f}" if part in found.parts[v] else "" for v in VARIANTS]
        yield f"| {part} | {' | '.join(cells)} |"
    cached, live = (statistics.median(found.steps[v]) / batch_size for v in ("cached", online))
    yield f"\nCost of one student, device seconds per image of the source, {EPOCHS} epochs; stage one is shared:\n"
    yield "| students | online | " + " | ".join(f"cached, {views} views" for views in CACHED_VIEWS) + " |"
    yield "|---|---|" + "---|" * len(CACHED_VIEWS)
    for students in (1, 2, 4):
        cells = []
        for views in CACHED_VIEWS:
            cost = EPOCHS * cached + views * once_s / students
            cells.append(f"{cost:.3g} ({EPOCHS * live / cost:.2f}x less)")
        yield f"| {students} | {EPOCHS * live:.3g} | {' | '.join(cells)} |"
    yield ""


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> int:
    parser = argparse.ArgumentParser(description="the teacher online against the cache")
    parser.add_argument("--data", type=Path, default=DATA / "imagenet-sample", help="folder of tars")
    parser.add_argument("--pattern", default="*.tar", help="which of them")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--batch", type=int, help="None: 16 on a CPU, 256 on a GPU")
    parser.add_argument("--steps", type=int, help="of a variant in a round; None: 1 on a CPU, 10 on a GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--input-steps", type=int, default=20, help="batches whose input is timed")
    args = parser.parse_args()
    if not args.data.is_dir():
        print(f"no photographs in {args.data} (--data or TINYMIM_DATA name another folder)", file=sys.stderr)
        return 0
    torch.set_num_threads(1)
    args.steps = args.steps or (10 if args.device == "cuda" else 1)
    scale, device = SCALES[args.device], torch.device(args.device)
    args.batch = batch_size = args.batch or scale["batch"]
    kind = make_kind(CODEC, scale["block"])
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        teacher = make_teacher(scale, kind, Path(folder), device)
        shapes = teacher.shapes()
        reader = make_cache(args, scale, shapes.heads, Path(folder))
        recipes = {name: training(args, scale, name, Path(folder)) for name in args.students}
        arrays = [spec.name for spec in kind.specs(shapes)]
        times, order, batch = measure_input(args, recipes[args.students[0]], arrays, reader)
        print("\n".join([*header(args, scale, batch_size), *input_table(times)]), flush=True)
        for name, recipe in recipes.items():
            [student] = make_students(recipe, [Term(kind, shapes)], Ranks(), order, [])
            setting = Setting(recipe, teacher, kind, shapes, reader.layer().name, batch, student)
            found = measure(setting, args.rounds, args.steps)
            once_s = stage_one_s(setting)
            print("\n".join(student_page(name, scale, found, batch_size, once_s, times)), flush=True)
            if args.device == "cuda":
                gain = min(statistics.median(found.ratios(online, "cached")) for online in VARIANTS[2:])
                missed |= statistics.median(found.ratios("cached", "no target")) > FREE or (
                    name == "T" and gain < LEAST
                )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
