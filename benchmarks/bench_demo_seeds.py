"""The demo's comparison for several seeds: a markdown table with mean and sample deviation per arm.

    .venv/bin/python benchmarks/bench_demo_seeds.py [--folder runs/demo-seeds] [--seeds 0 1 2] > table.md

Varies with the seed: views of the cache, sketches, initial weights, order of samples, masks. Fixed: teacher and images.
A folder that holds finished demos is only read again. Keep the table under benchmarks/results/.
"""

import argparse
import contextlib
import platform
import resource
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import provenance

from tinymim.stages import demo
from tinymim.stages.run.progress import logger

Results = list[list[dict[str, float | str]]]  # by seed, then arm


def main() -> None:
    parser = argparse.ArgumentParser(description="seed noise of the demo")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags = parser.parse_args()
    if len(flags.seeds) < 2:
        parser.error("a deviation needs two seeds or more")
    began_s, began_cpu_s = time.monotonic(), _cpu_s()
    results: Results = []
    for seed in flags.seeds:
        logger.info(f"bench_demo_seeds: seed {seed}")
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table alone
            found = demo.run(flags.folder / f"seed-{seed}", seed)
        results.append(found["arms"])
    print(_header(flags.seeds, time.monotonic() - began_s, _cpu_s() - began_cpu_s))
    print(_arms(results), _margins(results), sep="\n\n")


def _cpu_s() -> float:
    """CPU seconds of this process and of the children that have ended (loader workers have)."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


def _header(seeds: list[int], wall_s: float, cpu_s: float) -> str:
    return f"""\
# The demo over {len(seeds)} seeds, {date.today()}

- commit {provenance.commit()}, command `python benchmarks/bench_demo_seeds.py --seeds {" ".join(map(str, seeds))}`
- {provenance.processor()}, {provenance.cores()} cores, Python {platform.python_version()}; \
{wall_s:.0f} s wall, {cpu_s:.0f} CPU s in all
- varies with the seed: views, sketches, initial weights, order, masks; fixed: teacher, 2,400 + 600 drawn images
- mean ± sample standard deviation over n = {len(seeds)} seeds, in percent; in brackets the seeds in order
"""


def _arms(results: Results) -> str:
    lines = ["| model | how trained | steps | k-NN top-1 | linear top-1 |", "|---|---|---|---|---|"]
    for arm, first in enumerate(results[0]):
        knn, linear = ([_percent(seed[arm][probe]) for seed in results] for probe in ("knn_top1", "linear_top1"))
        cells = (first["model"], first["how_trained"], first["steps"], _spread(knn), _spread(linear))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _margins(results: Results) -> str:
    """Taught minus untaught twin, paired by seed."""
    lines = ["| taught minus | k-NN points | linear points |", "|---|---|---|"]
    taught = 0
    for arm, first in enumerate(results[0]):
        if str(first["how_trained"]).startswith("distilled"):
            taught = arm
        elif arm > taught > 0:
            knn, linear = (
                [_percent(seed[taught][probe]) - _percent(seed[arm][probe]) for seed in results]
                for probe in ("knn_top1", "linear_top1")
            )
            lines.append(f"| {first['model']}, {first['how_trained']} | {_spread(knn)} | {_spread(linear)} |")
    return "\n".join(lines)


def _percent(share: float | str) -> float:
    return 100 * float(share)


def _spread(values: list[float]) -> str:
    each = " ".join(f"{value:.1f}" for value in values)
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ({each})"


if __name__ == "__main__":
    main()
