"""From the results of `evidence.py` to a page: means, spreads, and differences with their confidence intervals."""

import json
import math
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from evidence_arms import EXPERIMENTS, FINETUNE_STEPS, STEPS, Arm, Experiment
from provenance import commit, cores, processor

# Two-sided 95 % quantiles of Student's t by degrees of freedom: few seeds, wide intervals.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
Record = dict[str, Any]
Metric = tuple[str, Callable[[Record], float | None], int]  # heading, value, digits

METRICS: tuple[Metric, ...] = (
    ("k-NN top-1 %", lambda r: 100 * r["knn_top1"], 1),
    ("linear top-1 %", lambda r: 100 * r["linear_top1"], 1),
    ("fine-tuned top-1 %", lambda r: 100 * r["finetune_top1"] if "finetune_top1" in r else None, 1),
    ("held-out KL, nats", lambda r: r["kl_qk"] + r["kl_vv"] if "kl_qk" in r else None, 4),
)


def page(results: Path, commands: Sequence[str], only: Sequence[str]) -> str:
    """Some experiments, as markdown; arms without a result are said to have none."""
    of_them = {arm.name for number in only for arm in EXPERIMENTS[number].arms}
    records = [each for each in _records(results) if each["experiment"] == "tune" or each["arm"] in of_them]
    parts = [_header([each for each in records if each["experiment"] != "tune"])]
    parts.append(
        "## Learning rates\n\nBy 2,000 training images, which students saw without labels "
        "(supervised ones with them); seed 9.\n\n" + rates(results)
    )
    parts += [_experiment(number, EXPERIMENTS[number], records) for number in only]
    parts.append("## Commands\n\nOf seed 0; other seeds differ in `run.seed` and `order.seed`.\n")
    parts.append("\n".join(f"    {line}" for line in commands))
    return "\n\n".join(parts)


def rates(results: Path) -> str:
    """The learning rates that were tried, as markdown."""
    tried = [record for record in _records(results) if record["experiment"] == "tune"]
    rows = [f"| {r['arm']} | {100 * r['knn_top1']:.1f} | {100 * r['linear_top1']:.1f} |" for r in tried]
    return "\n".join(["| arm | k-NN top-1 % | linear top-1 % |", "|---|---|---|", *rows])


def _records(results: Path) -> list[Record]:
    found = [json.loads(path.read_bytes()) for path in sorted(results.glob("*.json"))]
    tuned = {(r["arm"], r["seed"]): r["finetune_top1"] for r in found if "finetune_top1" in r}
    probed = [record for record in found if "knn_top1" in record]
    for record in probed:
        if not record["student"] and (record["arm"], record["seed"]) in tuned:
            record["finetune_top1"] = tuned[record["arm"], record["seed"]]
    return probed


def _header(records: list[Record]) -> str:
    cpu_h = sum(record["train_cpu_s"] for record in records) / 3600
    commits = Counter(record.get("commit", "commits that they do not name") for record in records)
    made_at = ", ".join(f"{name} ({count})" for name, count in sorted(commits.items()))
    return f"""\
# What students learn from a cache, {date.today()}

- `python benchmarks/evidence.py run`, then `page`;
  page of commit {commit()}, runs of {made_at} (docs/evidence.md)
- {processor()}, {cores()} cores shared with other work, Python {platform.python_version()}; one thread a run;
  {cpu_h:.1f} CPU hours of training
- teacher: MAE, 128 wide, 6 blocks, 4 heads, 6,000 steps of 64 (`tinyimagenet40-mae`); student: 64 wide, 4 blocks,
  {STEPS} steps of 64
- CPU s: of the training, without cache and probes, under that load; of a training that was stopped, its last part only
- 20,000 training images of 40 classes at 64 px, patch 8, 65 tokens; k-NN and linear probe on frozen features of the
  first 10,000 of them, judged on 2,000 others (chance 2.5 %); fine-tuning: {FINETUNE_STEPS} steps of 64
- a seed is initial weights, order and jitter; arms of one seed share them. mean ± sample sd over seeds; differences
  are paired by seed, with their 95 % interval (Student's t): it is wide for three seeds"""


def _experiment(number: str, experiment: Experiment, records: list[Record]) -> str:
    rows = [
        (arm, student, _of(records, arm, student)) for arm in experiment.arms for student in _students(records, arm)
    ]
    metrics = [metric for metric in METRICS if any(metric[1](r) is not None for *_, found in rows for r in found)]
    with_bytes = any("bytes_per_view" in record for *_, found in rows for record in found)
    heads = ["arm", "seeds", *(["bytes a view"] if with_bytes else [])]
    heads += [name for name, *_ in metrics] + [f"Δ {name}" for name, *_ in metrics] + ["CPU s"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    first = rows[0][2]
    for arm, name, found in rows:
        cells = [f"{arm.name}{', ' + name if name else ''}", str(len(found))]
        cells += [_bytes(found)] if with_bytes else []
        cells += [_spread([metric[1](r) for r in found], metric[2]) for metric in metrics]
        cells += ["" if found is first else _difference(found, first, metric) for metric in metrics]
        cells.append(f"{statistics.mean(r['train_cpu_s'] for r in found):.0f}" if found else "")
        lines.append("| " + " | ".join(cells) + " |")
    return f"## {number}. {experiment.title}\n\n{experiment.question}\n\n" + "\n".join(lines)


def _students(records: list[Record], arm: Arm) -> list[str]:
    return list(dict.fromkeys(r["student"] for r in records if r["arm"] == arm.name)) or [""]


def _of(records: list[Record], arm: Arm, student: str) -> list[Record]:
    """Of one arm and student, by seed."""
    found = [r for r in records if r["arm"] == arm.name and r["student"] == student and r["experiment"] != "tune"]
    return sorted(found, key=lambda record: int(record["seed"]))


def _bytes(found: list[Record]) -> str:
    return f"{found[0]['bytes_per_view']:,.0f}" if found and "bytes_per_view" in found[0] else ""


def _spread(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    sd = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{sd}"


def _difference(found: list[Record], first: list[Record], metric: Metric) -> str:
    """Mean and 95 % interval of the difference to the first arm, over the seeds that both have."""
    by_seed = {record["seed"]: metric[1](record) for record in first}
    pairs = [(metric[1](record), by_seed.get(record["seed"])) for record in found]
    deltas = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    if len(deltas) < 2:
        return f"{deltas[0]:+.{metric[2]}f}" if deltas else ""
    half = T95[len(deltas) - 1] * statistics.stdev(deltas) / math.sqrt(len(deltas))
    return f"{statistics.mean(deltas):+.{metric[2]}f} ± {half:.{metric[2]}f}"
