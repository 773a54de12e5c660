"""What several students cost together: one stream for three beside the three alone, and beside their bare computing.

    python benchmarks/bench_students.py [--data FOLDER_OF_TARS] [--batch 16] [--rounds 5] > table.md

A cache is made first, in a temporary folder: a random teacher of two narrow blocks with ViT-L's 16 heads and 197 tokens
(196 px, patch 14), default codec, two views. Then, in turn, `tinymim train-student` itself: each of three students
alone, and the three from one stream. A student's own computing is the forward pass, loss, backward pass and update of
its own run; the rest of a step is reading, decoding, checking, unpacking and jitter. On a CPU without loader
workers nothing of that hides behind the computing, and CPU time is counted; on a GPU workers load, and wall time
is counted. The first two steps of a run do not count. Without photographs at --data nothing is measured.
Exit code 1 where a step of three costs more than 1.15 of the sum of their own computing. Keep the table under
benchmarks/results/.
"""

import argparse
import contextlib
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import provenance
import timm
import torch
from safetensors.torch import save_file

from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.models.timm_folder import Pixels
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.stages import cache_teacher, train_student
from tinymim.stages.training.bookkeeping import Bookkeeping
from tinymim.stages.training.learner import Learner

DATA = Path(os.environ.get("TINYMIM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
GRID: dict[str, Any] = {"img_size": 196, "patch_size": 14}
STATED = Pixels(IMAGENET_MEAN, IMAGENET_STD).metadata()
TEACHER: dict[str, Any] = {"name": "vit_tiny_patch16_224", "embed_dim": 128, "depth": 2, "num_heads": 16, **GRID}
STUDENTS: dict[str, dict[str, Any]] = {
    "half-tiny": {"name": "vit_tiny_patch16_224", "depth": 6, **GRID},
    "tiny": {"name": "vit_tiny_patch16_224", **GRID},
    "small": {"name": "vit_small_patch16_224", **GRID},
}
WARM = 2  # steps of a run that do not count
MOST = 1.15  # of the sum of the students' own computing


class Clock:
    """Times the steps of one run, and within them what the models take for themselves."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.steps: list[float] = []
        self.own: list[float] = []
        self._own, self._last = 0.0, self.now()

    def now(self) -> float:
        """Seconds: of this process's CPU time, or with a GPU of wall time after all that was sent there."""
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    @contextlib.contextmanager
    def running(self, alone: bool) -> Iterator[None]:
        """Around a training. Only in a run alone are models timed: on a GPU that would hold the others up."""
        part, update, end_step = Learner.part_of_step, Learner.update, Bookkeeping.end_step

        @contextlib.contextmanager
        def timed_part(*args: Any, **kwargs: Any) -> Iterator[None]:
            began = self.now()
            with part(*args, **kwargs):
                yield
            self._own += self.now() - began

        def timed_update(*args: Any, **kwargs: Any) -> None:
            began = self.now()
            update(*args, **kwargs)
            self._own += self.now() - began

        def timed_end_step(*args: Any, **kwargs: Any) -> None:
            now = self.now()
            self.steps.append(now - self._last)
            self.own.append(self._own)
            end_step(*args, **kwargs)  # its logging and saving are not counted
            self._own, self._last = 0.0, self.now()

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(Bookkeeping, "end_step", timed_end_step))
            if alone:
                stack.enter_context(mock.patch.object(Learner, "part_of_step", timed_part))
                stack.enter_context(mock.patch.object(Learner, "update", timed_update))
            yield


def main() -> int:
    parser = argparse.ArgumentParser(description="several students from one stream")
    parser.add_argument("--data", type=Path, default=DATA / "imagenet-sample", help="folder of tars")
    parser.add_argument("--pattern", default="*.tar", help="which of them")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="of a run, which count")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--workers", type=int, default=0, help="that load")
    args = parser.parse_args()
    if not args.data.is_dir():
        print(f"no photographs in {args.data} (--data or TINYMIM_DATA name another folder)", file=sys.stderr)
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_cache(Path(folder), args)
        runs = {name: {"student": model} for name, model in STUDENTS.items()}
        runs["all three"] = {"students": {name: {"model": model} for name, model in STUDENTS.items()}}
        steps: dict[str, list[float]] = {name: [] for name in runs}
        own: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, changes in runs.items():
                clock = Clock(args.device)
                with clock.running(alone=name in STUDENTS):
                    train_student.run(recipe(Path(folder), args, changes))
                steps[name].append(statistics.median(clock.steps[WARM:]))
                own[name].append(statistics.median(clock.own[WARM:]))
    return report(args, steps, own)


def make_cache(root: Path, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    sizes = {name: value for name, value in TEACHER.items() if name != "name"}
    save_file(
        timm.create_model(TEACHER["name"], num_classes=0, **sizes).state_dict(), root / "teacher.safetensors", STATED
    )
    fields: dict[str, Any] = {
        "stage": "cache-teacher",
        "source": {"shards": args.data, "pattern": args.pattern},
        "views": {"size": GRID["img_size"]},
        "teacher": TEACHER | {"block": 2, "weights": str(root / "teacher.safetensors")},
        "cache": root / "cache",
        "batch_size": 16,
        "audit_views": 0,
        "max_unreadable": 1.0,
        "loader": {"workers": 0},
        "run": {"folder": root / "run", "device": args.device, "threads": 1},
    }
    cache_teacher.run(CacheTeacherRecipe.model_validate(fields))


def recipe(root: Path, args: argparse.Namespace, changes: dict[str, Any]) -> TrainStudentRecipe:
    fields: dict[str, Any] = {
        "stage": "train-student",
        "source": {"shards": args.data, "pattern": args.pattern},
        "cache": root / "cache",
        "optim": {"batch_size": args.batch, "steps": WARM + args.steps},
        "verify": {"first": 0},  # as after the first 4096 views of a run
        "loader": {"workers": args.workers},
        "checkpoint": {"resume": False},
        "precision": args.precision,
        "run": {"folder": root / "students", "device": args.device, "threads": 1, "log_every": 10**6},
    }
    return TrainStudentRecipe.model_validate(fields | changes)


def report(args: argparse.Namespace, steps: dict[str, list[float]], own: dict[str, list[float]]) -> int:
    kind = "wall" if args.device == "cuda" else "CPU"
    print(f"# Several students from one stream, {date.today()}\n")
    print(f"- commit {provenance.commit()}, command `{provenance.command()}`")
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{provenance.processor()}, 1 thread"
    print(f"- {device}; Python {platform.python_version()}, torch {torch.__version__}")
    print(f"- batch {args.batch} at {GRID['img_size']} px, {args.precision}, {args.workers} loader workers")
    print(
        f"- n = {args.rounds} rounds of {args.steps} steps, the runs in turn; medians of a run's steps, {kind} time\n"
    )
    print("| run | ms per step, median | min to max | its own computing, ms |\n|---|---|---|---|")
    for name in steps:
        mine = f"{1e3 * statistics.median(own[name]):.0f}" if name in STUDENTS else "not timed"
        low, high = 1e3 * min(steps[name]), 1e3 * max(steps[name])
        print(f"| {name} | {1e3 * statistics.median(steps[name]):.0f} | {low:.0f} to {high:.0f} | {mine} |")
    together = steps["all three"]
    ratios = {
        "three together / sum of their own computing": [
            whole / sum(own[name][i] for name in STUDENTS) for i, whole in enumerate(together)
        ],
        "three together / three runs alone": [
            whole / sum(steps[name][i] for name in STUDENTS) for i, whole in enumerate(together)
        ],
    }
    print("\n| ratio within a round | median | min to max |\n|---|---|---|")
    for label, values in ratios.items():
        print(f"| {label} | {statistics.median(values):.3f} | {min(values):.3f} to {max(values):.3f} |")
    return 0 if statistics.median(next(iter(ratios.values()))) <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
