"""The output of `tinymim fidelity`: tables in Markdown and the plot of the frontier."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from tinymim.stages.pages.look import png
from tinymim.stages.pages.tables import markdown_table
from tinymim.storage.atomic import write_bytes_atomic

NOISE_FLOOR: Final = 1e-4  # the noise ratio at which codecs without noise are drawn
COLOURS: Final = {
    "relations": "tab:blue",
    "ff": "tab:cyan",
    "gram": "tab:olive",
    "features": "tab:green",
    "cls": "tab:purple",
    "bank": "tab:pink",
    "attention": "tab:orange",
    "logits": "tab:brown",
}  # by kind of target
# Statistics of a kind that the second table has a column for, where a codec in it has them.
STATISTICS: Final = {
    "entropy_nats": ("entropy", "{:.2f}"),
    "kept_mass": ("kept", "{:.3f}"),
    "rms": ("rms", "{:.3g}"),
    "relative_error": ("relative error", "{:.2g}"),
}


def format_tables(result: Mapping[str, Any]) -> str:
    """Two tables per student: the gradient of all parameters, and per loss that of the head (means over its parts)."""
    teacher = result["teacher"]
    lines = [
        f"{teacher['name']}, block {teacher['block']}, {teacher['tokens']} tokens; {result['num_views']} images, one "
        f"view each; {result['device']}",
    ]
    for student, by_codec in result["students"].items():
        rows = [_student_row(name, values, result["codecs"][name]) for name, values in by_codec.items()]
        header = [
            "codec",
            "bytes/view",
            "bias ± se",
            "noise ratio",
            "angle °",
            "norm",
            "loss error",
            "encode ms",
            "decode ms",
        ]
        lines += [
            "",
            f"Student {student}: gradient of all its parameters, against dense targets",
            "",
            *markdown_table(header, rows),
        ]
        lines += ["", f"Student {student}: gradient of its head, means over parts", ""]
        parts = [(name, loss, values[loss]) for name, values in by_codec.items() for loss in values if loss != "all"]
        stated = [each for each in STATISTICS if any(each in part for *_, part in parts)]
        words = [STATISTICS[each][0] for each in stated]
        header = ["codec", "target", *words, "loss", "bias ± se", "noise ratio", "angle °", "norm"]
        lines += markdown_table(header, [_part_row(*each, stated) for each in parts])
    return "\n".join(lines)


def is_biased(values: Mapping[str, Any]) -> bool:
    """Whether the bias of the whole gradient is significant given its standard error."""
    return bool(values["all"]["biased"][0])


def _student_row(name: str, values: Mapping[str, Any], cost: Mapping[str, Any]) -> list[str]:
    whole = values["all"]
    error = [v for loss, part in values.items() if loss != "all" for v in part["loss_error_nats"]]
    mark = " (biased)" if is_biased(values) else ""
    return [
        name,
        f"{cost['bytes_per_view']:,.0f}",
        f"{whole['bias'][0]:.3f} ± {whole['bias_se'][0]:.3f}{mark}",
        f"{whole['noise_ratio'][0]:.4f}",
        f"{whole['angle_deg'][0]:.1f}",
        f"{whole['norm_ratio'][0]:.3f}",
        f"{_mean(error):+.3f}",
        f"{cost['encode_ms_per_view']:.2f}",
        f"{cost['decode_ms_per_view']:.2f}",
    ]


def _part_row(name: str, loss: str, part: Mapping[str, Any], stated: Sequence[str]) -> list[str]:
    return [
        name,
        loss,
        *(STATISTICS[each][1].format(_mean(part[each])) if each in part else "" for each in stated),
        f"{_mean(part['kl_nats']):.3f}",
        f"{_mean(part['bias']):.3f} ± {_mean(part['bias_se']):.3f}",
        f"{_mean(part['noise_ratio']):.4f}",
        f"{_mean(part['angle_deg']):.1f}",
        f"{_mean(part['norm_ratio']):.3f}",
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def draw_frontier(result: Mapping[str, Any], path: Path) -> None:
    """Plot noise ratio over bytes per view, a panel per student. Biased codecs are hollow and labelled with their bias.

    A logarithmic axis has no place for an exact codec, whose noise is 0, so NOISE_FLOOR stands for it.
    """
    students = result["students"]
    figure = Figure(figsize=(7.0 * len(students), 5.6), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(students), squeeze=False, sharey=True)[0]
    for axis, (student, by_codec) in zip(axes, students.items(), strict=True):
        points = [
            (result["codecs"][name]["bytes_per_view"], max(values["all"]["noise_ratio"][0], NOISE_FLOOR), name)
            for name, values in by_codec.items()
        ]
        points.sort()
        unbiased = [point for point in points if not is_biased(by_codec[point[2]])]
        best = [p for p in unbiased if not any(q[0] <= p[0] and q[1] < p[1] for q in unbiased)]
        for x, y, name in points:
            values = by_codec[name]["all"]
            biased = is_biased(by_codec[name])
            colour = "tab:red" if biased else COLOURS[result["codecs"][name]["parameters"].get("kind", "relations")]
            axis.plot(x, y, "o", color=colour, markerfacecolor="none" if biased else colour)
            left = biased or (
                (x, y, name) in best and best.index((x, y, name)) % 2 == 1
            )  # or labels of neighbours overlap
            axis.annotate(
                f"{name} (bias {values['bias'][0]:.2f})" if biased else name,
                (x, y),
                xytext=(-6, -7) if left else (6, 2),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=7.5,
            )
        axis.set(xscale="log", yscale="log", xlabel="stored bytes per view", title=f"student {student}")
        axis.grid(visible=True, which="major", alpha=0.3)
        axis.margins(x=0.28, y=0.08)
    axes[0].set_ylabel("noise ratio: added / image-to-image gradient variance")
    title = (
        "Size of a codec and the noise it adds to the gradient\nHollow red: biased, which more steps do not average out"
    )
    figure.suptitle(title, fontsize=11)
    write_bytes_atomic(path, png(figure))
