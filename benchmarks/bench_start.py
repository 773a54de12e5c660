"""What a command costs before it does anything, and how long a training takes to its first step.

    python benchmarks/bench_start.py [--rounds 5] > table.md

Each round runs the installed `tinymim` on every line once: help, list, wrong recipes, inputs that are not there, and a
training of one step on drawn images with no loader workers and with two. CPU seconds are those of the command and of
all processes it started, user and system. The first step ends when its line of metrics is written.
Exit code 1 where a target is missed. Keep the table under benchmarks/results/.
"""

import argparse
import ctypes
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import NamedTuple

import provenance

HELP_CPU_S, WORKERS_RATIO = 0.3, 1.3  # targets
TINYMIM = str(Path(sys.executable).with_name("tinymim"))
WRONG = "stage: train-student\nsorce: 3\noptim: {steps: many}\n"
SMALL = {
    "help": ["--help"],
    "help of a verb": ["train-student", "--help"],
    "list of recipes": ["recipes"],
    "recipe that is not there": ["train-student", "nowhere"],
    "recipe that is no YAML": ["train-student", "broken.yaml"],
    "recipe with wrong fields": ["train-student", "wrong.yaml"],
}
ABSENT = {
    "cache that is not there": ["train-student", "demo-narrow", "--set", "cache=nowhere"],
    "source that is not there": ["cache-teacher", "demo-cache", "--set", "source.shards=nowhere"],
    "weights that are not there": ["cache-teacher", "demo-cache", "--set", "teacher.weights=nowhere.pth"],
}
WORKERS = (0, 2)
RUN = Path("run")


class Cost(NamedTuple):
    """Seconds: on the clock to the end, on it to the first line of metrics, of all processors."""

    wall_s: float
    first_step_s: float
    cpu_s: float


def training(workers: int) -> list[str]:
    """One step of the demo's smaller student."""
    settings = {"source.shards": "data/demo-train", "cache": "caches/demo", "run.folder": RUN, "run.log_every": 1}
    settings |= {"optim.steps": 1, "optim.batch_size": 16, "loader.workers": workers}
    return ["train-student", "demo-narrow", *(f"--set={name}={value}" for name, value in settings.items())]


def reap() -> None:
    """Wait for all processes that commands have left behind."""
    with suppress(ChildProcessError):
        while True:
            os.wait()


def run(line: list[str]) -> Cost:
    """Run a command line to the end of all processes that it starts."""
    shutil.rmtree(RUN, ignore_errors=True)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    subprocess.run([TINYMIM, *line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    wall_s = time.time() - began
    reap()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    metrics = RUN / "metrics.jsonl"
    first_step_s = metrics.stat().st_mtime - began if metrics.exists() else wall_s
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall_s, first_step_s, cpu_s)


def spread(values: list[float], digits: int = 2) -> str:
    """Median, and from where to where."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> int:
    """Measure, print the table, and say whether the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: a fork server outlives its parent by a moment
    lines = SMALL | ABSENT | {f"training, {workers} workers": training(workers) for workers in WORKERS}
    costs: dict[str, list[Cost]] = {name: [] for name in lines}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("wrong.yaml").write_text(WRONG)
        Path("broken.yaml").write_text("stage: [")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
        subprocess.run([TINYMIM, "make-shards", "drawn", "data/demo-train", "--count", "64"], **quiet)  # type: ignore[call-overload]
        subprocess.run([TINYMIM, "cache-teacher", "demo-cache"], **quiet)  # type: ignore[call-overload]
        reap()
        for _ in range(rounds):
            for name, line in lines.items():
                costs[name].append(run(line))
        os.chdir("/")

    print(f"# Start-up, {date.today()}\n")
    print(f"- commit {provenance.commit()}, command `{provenance.command()}`")
    print(f"- {provenance.processor()}, {provenance.cores()} cores, load {os.getloadavg()[0]:.1f} at the end")
    print(f"- Python {platform.python_version()}; n = {rounds} rounds, lines in turn; median (min to max)\n")
    print("| line | CPU s | to the first step, s | to the end, s |\n|---|---|---|---|")
    for name, found in costs.items():
        wall, first, cpu = ([getattr(cost, field) for cost in found] for field in Cost._fields)
        step = spread(first) if name.startswith("training") else ""
        print(f"| {name} | {spread(cpu)} | {step} | {spread(wall)} |")
    worst = max(statistics.median(cost.cpu_s for cost in costs[name]) for name in SMALL)
    none, two = (costs[f"training, {workers} workers"] for workers in WORKERS)
    ratio = statistics.median(b.first_step_s / a.first_step_s for a, b in zip(none, two, strict=True))
    print("\n| | measured | target | met |\n|---|---|---|---|")
    for name, value, target in (
        ("CPU s of help, list and wrong recipes, the worst", worst, HELP_CPU_S),
        ("first step with two workers / with none, median of rounds", ratio, WORKERS_RATIO),
    ):
        print(f"| {name} | {value:.2f} | <= {target} | {'yes' if value <= target else 'no'} |")
    return int(worst > HELP_CPU_S or ratio > WORKERS_RATIO)


if __name__ == "__main__":
    sys.exit(main())
