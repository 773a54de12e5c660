"""The table of metrics: name, header, format, and whether higher or lower is better.

Names are those in `metrics.jsonl`, in `evaluation.json`, and in a comparison's results. A `*` stands for a part that a
recipe chooses: a relation, an evaluator, the model or its average. If several entries match a name, the longest
counts. A name without an entry is the loss of a target that chose the name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, Literal

from tinymim.stages.run.folder import AUDIT_NAME, METRICS_NAME

Better = Literal["lower", "higher"]
EMA: Final = "ema_"  # prefix of metrics of the moving average of the weights
MISSING: Final = "-"  # shown where a run has no value


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of them.

    Attributes:
        name: the name, with at most one `*`.
        header: the header of a column; `{}` is replaced by the part that `*` matches.
        format: a Python format specification.
        better: the better direction; None where neither is.
        curve: the file in a run folder that holds its curve for comparisons; "" where there is none.
        column: whether it is a column of a comparison where a run has it; columns are in the order of `METRICS`.
    """

    name: str
    header: str
    format: str
    better: Better | None = None
    curve: str = ""
    column: bool = False


METRICS: Final = (
    Metric("steps", "steps", ",.0f", column=True),
    Metric("epochs", "epochs", ".1f", column=True),
    # ---- losses of a training step
    Metric("loss", "loss", ".4f", "lower", METRICS_NAME, column=True),
    Metric("r2", "R²", ".3f", "higher", METRICS_NAME, column=True),
    Metric("kl_*", "KL {}", ".4f", "lower", METRICS_NAME, column=True),
    Metric("label_top1", "agreement with labels", ".1%", "higher"),
    Metric("label_top1_*", "agreement with labels, {}", ".1%", "higher"),
    Metric("weight_*", "weight of {}", ".3g"),
    # ---- student audits: KL to dense targets of held-out images, in nats per row; k-NN
    Metric("audit_kl_*", "audit KL {}", ".4f", "lower", AUDIT_NAME, column=True),
    Metric("audit_ema_kl_*", "audit KL {}, average", ".4f", "lower", AUDIT_NAME),
    Metric("audit_gap_*", "audit gap {}", ".4f", "higher"),
    Metric("audit_*", "audit {}", ".4g"),
    Metric("alarms", "alarms", ",.0f", "lower", column=True),
    Metric("audit_knn_top1", "audit k-NN", ".1%", "higher", AUDIT_NAME, column=True),
    Metric("audit_knn_top5", "audit k-NN top-5", ".1%", "higher", AUDIT_NAME),
    Metric("audit_ema_knn_top1", "audit k-NN, average", ".1%", "higher", AUDIT_NAME),
    Metric("audit_ema_knn_top5", "audit k-NN top-5, average", ".1%", "higher", AUDIT_NAME),
    # ---- evaluators
    Metric("knn_top1", "k-NN", ".1%", "higher", column=True),
    Metric("linear_top1", "linear", ".1%", "higher", column=True),
    Metric("real_top1", "ReaL", ".1%", "higher", column=True),
    Metric("throughput_images_per_s", "images/s of a pass", ",.0f", "higher", column=True),
    Metric("params_m", "M params", ",.2f", "lower", column=True),
    Metric("gmacs", "GMACs", ",.2f", "lower", column=True),
    Metric("*_top1", "{}", ".1%", "higher", column=True),
    Metric("*_top5", "{} top-5", ".1%", "higher"),
    Metric("ema_*_top1", "{}, average", ".1%", "higher"),
    Metric("ema_*_top5", "{} top-5, average", ".1%", "higher"),
    # ---- fine-tuning
    Metric("finetuned_best_top1", "best top-1", ".1%", "higher", column=True),
    Metric("finetuned_last_top1", "last top-1", ".1%", "higher", column=True),
    Metric("finetuned_*_top1", "{} top-1", ".1%", "higher"),
    Metric("finetuned_*_top5", "{} top-5", ".1%", "higher"),
    Metric("val_*_top1", "validation top-1, {}", ".1%", "higher", METRICS_NAME),
    Metric("val_*_top5", "validation top-5, {}", ".1%", "higher", METRICS_NAME),
    Metric("val_*_loss", "validation loss, {}", ".4f", "lower", METRICS_NAME),
    # ---- cost of a run
    Metric("elapsed_s", "seconds", ",.0f", "lower", column=True),
    Metric("device_h", "device-h", ",.3f", "lower", column=True),
    Metric("teacher_h", "teacher-h", ",.3f", "lower", column=True),
    Metric("teacher_share", "teacher share", ".0%", "lower", column=True),
    Metric("computed_share", "by the teacher", ".0%", curve=METRICS_NAME, column=True),
    Metric("computed_views", "views by the teacher", ",.0f", column=True),
    # ---- other numbers of a step, and of stage one
    Metric("step", "step", ",.0f"),
    Metric("epoch", "epoch", ".1f"),
    Metric("lr", "learning rate", ".2e"),
    Metric("views_per_s", "views/s", ",.1f", "higher"),
    Metric("images_per_s", "images/s", ",.1f", "higher"),
    Metric("records", "records", ",.0f"),
    Metric("gib_written", "GiB written", ",.2f"),
    Metric("units_left", "units left", ",.0f", "lower"),
    Metric("units_failed", "units failed", ",.0f", "lower"),
    Metric("eta_s", "seconds left", ",.0f", "lower"),
    Metric("*_share", "{}, share of time", ".0%"),
)


@cache
def metric(name: str) -> Metric:
    """The entry of one metric, with its own name and header."""
    entry = _entry(name)
    if entry is None:
        return Metric(name, name.replace("_", " "), ".4g", None, METRICS_NAME, column=True)
    word = members(entry.name, [name])[name]
    return replace(entry, name=name, header=entry.header.format(word))


def formatted(name: str, value: float | None) -> str:
    """The value in the metric's format; `MISSING` for None."""
    return MISSING if value is None else format(value, metric(name).format)


def members(family: str, names: Iterable[str]) -> dict[str, str]:
    """The names of a family such as `kl_*`, in their order, each with the part that `*` matches."""
    matches = {name: _pattern(family).fullmatch(name) for name in names}
    return {name: match[1] for name, match in matches.items() if match is not None}


def in_order(names: Iterable[str]) -> list[str]:
    """Each name once, in the order of `METRICS`, unknown losses after `kl_*`; the sort is stable."""
    entries = [each.name for each in METRICS]
    unknown = entries.index("kl_*")

    def place(name: str) -> float:
        entry = _entry(name)
        return unknown + 0.5 if entry is None else METRICS.index(entry)

    return sorted(dict.fromkeys(names), key=place)


def audit_metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in one line of `audit.jsonl`: losses of the student and of its average, gaps, k-NN accuracies."""
    losses = {name: each for name, each in line.items() if isinstance(each, Mapping) and "kl" in each}
    students = {name: each for name, each in losses.items() if not name.startswith(EMA)}
    accuracies = members("*_top1", line) | members("*_top5", line)
    return (
        {f"audit_{_with_measure(each.get('measure', 'kl'), name)}": each["kl"] for name, each in losses.items()}
        | {f"audit_gap_{name}": each["gap"] for name, each in students.items() if "gap" in each}
        | {f"audit_{name}": value for name, value in line.items() if name in accuracies}
    )


def _with_measure(measure: str, loss: str) -> str:
    """The loss's name with the measure in front, but after `EMA`."""
    own = loss.removeprefix(EMA)
    return f"{loss.removesuffix(own)}{measure}_{own}"


def _entry(name: str) -> Metric | None:
    found = [each for each in METRICS if _pattern(each.name).fullmatch(name)]
    return max(found, key=lambda each: len(each.name), default=None)


@cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile("(.+)".join(map(re.escape, name.split("*"))) + ("" if "*" in name else "()"))
