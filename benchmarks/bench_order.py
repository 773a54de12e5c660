"""Start of an epoch, and resume in its middle, on 10,000 shards of 1,000 images: seconds and memory.

    python benchmarks/bench_order.py [--shards 10000] [--images 1000] > table.md

Each case takes the first batch of `SampleOrder.plan` in this process, on one thread: medians of CPU time, which other
work on the machine does not distort, and the peak of Python's and numpy's allocations in one further round
(tracemalloc). Exit code 1 where a case takes 0.1 s or 50 MiB. Keep the table under benchmarks/results/.
"""

import argparse
import statistics
import sys
import time
import tracemalloc
from datetime import date

import provenance

from tinymim.configs.sections.loader import OrderConfig
from tinymim.pipeline.order import SampleOrder

BATCH = 4096
MOST_S, MOST_BYTES = 0.1, 50 * 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description="start of an epoch of a large source")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=1_000, help="images per shard")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"# Start of an epoch, {date.today()}\n")
    print(f"- commit {provenance.commit()}, command `{provenance.command()}`")
    print(f"- {provenance.processor()}, {provenance.cores()} cores; n = {args.rounds}")
    print(f"- {args.shards:,} shards x {args.images:,} images, batches of {BATCH:,}\n")
    print("| lanes | views per decode | first batch of | CPU time, median | min to max | peak memory |")
    print("|---|---|---|---|---|---|")
    worst_s, worst_bytes = 0.0, 0
    for lanes, k in ((1, 1), (1, 4), (8, 1)):
        config = OrderConfig(lanes=lanes, views_per_decode=k, views_per_epoch=k)
        order = SampleOrder([args.images] * args.shards, config, BATCH, 300)
        for name, step in (("an epoch", order.steps_per_epoch), ("a resumed run", order.steps_per_epoch * 3 // 2)):
            order.step = step
            seconds = [first_batch_s(order) for _ in range(args.rounds)]
            tracemalloc.start()
            first_batch_s(order)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            worst_s, worst_bytes = max(worst_s, statistics.median(seconds)), max(worst_bytes, peak)
            spread = f"{1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f} ms"
            median = f"{1e3 * statistics.median(seconds):.1f} ms"
            print(f"| {lanes} | {k} | {name} | {median} | {spread} | {peak / 2**20:.1f} MiB |")
    return 0 if worst_s < MOST_S and worst_bytes < MOST_BYTES else 1


def first_batch_s(order: SampleOrder) -> float:
    began = time.process_time()
    next(order.plan(order.step + order.order.views_per_decode))
    return time.process_time() - began


if __name__ == "__main__":
    sys.exit(main())
