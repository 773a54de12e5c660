"""Time of the loss and its gradients, against TinyMIM's dense formula, side by side in one run: a markdown page.

    .venv/bin/python benchmarks/bench_loss.py [--device cuda] [--student vit_small] [--batch 32] > page.md

Both relations, forward and backward, from the student's q, k, v (views of one qkv tensor, as a block gives them) and a
target at hand: no teacher, no decoding. 16 heads x 197 tokens and the default codec. The contenders take turns. On a
GPU also peak memory, and the time of a student's step without targets. Keep pages under benchmarks/results/.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date

import provenance
import timm
import torch
from torch import Tensor

from tinymim.configs.codecs.relations import SketchCodec
from tinymim.configs.taps import Shapes
from tinymim.targets.kinds import make_kind
from tinymim.targets.relations.kernels.loss import relation_cross_entropy_chunked
from tinymim.targets.relations.losses import reference_cross_entropy
from tinymim.targets.relations.qkv import QKV, relation_logits
from tinymim.targets.relations.rows import DenseRows, Rows, SparseRows

HEADS, TOKENS = 16, 197
TEACHER = Shapes(HEADS, 64, TOKENS, 1, (14, 14))
KIND = make_kind(SketchCodec(), block=18)
WIDTHS = {"vit_tiny": 192, "vit_small": 384}

Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description="time of the loss and its gradients")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, help="views; 32 on a CPU, 256 on a GPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--student", choices=list(WIDTHS), default="vit_tiny")
    parser.add_argument("--repeats", type=int, default=9)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    batch = flags.batch or (256 if flags.device == "cuda" else 32)

    steps = contenders(torch.device(flags.device), batch, WIDTHS[flags.student] // HEADS)
    if flags.device == "cuda":
        steps["student step without targets"] = student_step(flags.student, batch)
    times_ms, peaks_mib = measure(steps, flags.repeats, flags.device == "cuda")
    print(header(flags, batch))
    print(table(times_ms, peaks_mib, flags.device == "cuda"))


# ---------------------------------------------------------------- contenders


def contenders(device: torch.device, batch: int, head_width: int) -> dict[str, Step]:
    """By name; the first is what the ratios are against."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    qkv = torch.randn(batch, TOKENS, 3, HEADS, head_width, generator=generator).to(device, dtype).requires_grad_()
    dense, sparse = targets(batch, generator, device)

    def timed(loss: Callable[[QKV, Rows], Tensor], target: Rows) -> Step:
        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                q, k, v = qkv.permute(2, 0, 3, 1, 4)
                total = loss(QKV(q, k, v), target)
            torch.autograd.grad(total, qkv)

        return step

    def one_view_at_a_time() -> None:
        for view in range(batch):
            one: Rows = KIND.pick(dense, slice(view, view + 1))
            leaf = qkv[view, None].detach().requires_grad_()
            torch.autograd.grad(ours(QKV(*leaf.permute(2, 0, 3, 1, 4)), one) / batch, leaf)

    def chunked_torch() -> None:
        q, k, v = qkv.detach().permute(2, 0, 3, 1, 4)
        for t, (a, b) in zip(sparse.values(), ((q, k), (v, v)), strict=True):
            assert isinstance(t, SparseRows)
            relation_cross_entropy_chunked(a, b, t.rows, t.index, t.weight, t.tail, True)

    steps: dict[str, Step] = {"dense, eager: TinyMIM's formula": timed(ours, dense)}
    if device.type == "cpu":
        steps["dense, eager, one view at a time"] = one_view_at_a_time
    steps["sampled rows, eager"] = timed(textbook, sparse)
    if device.type == "cuda":
        steps["the operator in torch chunks, without autograd"] = chunked_torch
    steps["the operator"] = timed(ours, sparse)
    return steps


def targets(batch: int, generator: torch.Generator, device: torch.device) -> tuple[Rows, Rows]:
    """Dense rows and the default codec's sketch of the same random teacher."""
    exact: list[Rows] = []
    records: dict[str, list[Tensor]] = {}
    keys = torch.arange(batch)
    for part in keys.split(8):
        q, k, v = torch.randn(3, len(part), HEADS, TOKENS, TEACHER.head_dim, generator=generator)
        tapped = {KIND.taps[0]: (q, k, v)}
        for name, array in KIND.encode(tapped, part).items():
            records.setdefault(name, []).append(array.to(device))
        exact.append(KIND.pick(KIND.exact(tapped), slice(None), device))
    sparse: Rows = KIND.decode({name: torch.cat(arrays) for name, arrays in records.items()}, keys.to(device), TEACHER)
    dense = {r: torch.cat([each[r].dense() for each in exact]) for r in sparse}
    return {r: DenseRows(None, probs, sparse[r].entropy) for r, probs in dense.items()}, sparse


def ours(student: QKV, target: Rows) -> Tensor:
    losses = KIND.losses((student.q, student.k, student.v), target)
    return torch.stack([loss.mean() for loss in losses.values()]).sum()


def textbook(student: QKV, target: Rows) -> Tensor:
    """As `ours`, from all logits of the sampled rows at once, with autograd's gradients."""
    parts = [
        reference_cross_entropy(relation_logits(student, relation, rows.rows), rows).mean() - rows.entropy.mean()
        for relation, rows in target.items()
    ]
    return torch.stack(parts).sum()


def student_step(name: str, batch: int) -> Step:
    """Forward and backward of the whole student under bf16 autocast."""
    model = timm.create_model(f"{name}_patch16_224", num_classes=0).cuda().train()
    images = torch.randn(batch, 3, 224, 224, device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(images).float().square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


# ---------------------------------------------------------------- measurement and page


def measure(steps: dict[str, Step], repeats: int, cuda: bool) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Wall times in ms by contender, taking turns, after two warm-up rounds; peak GPU memory of a step in MiB."""
    times_ms: dict[str, list[float]] = {name: [] for name in steps}
    peaks_mib: dict[str, float] = {}
    for turn in range(-2, repeats):
        for name, step in steps.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            start = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
                peaks_mib[name] = (torch.cuda.max_memory_allocated() - held) / 2**20
            if turn >= 0:
                times_ms[name].append(1e3 * (time.perf_counter() - start))
        print(f"bench_loss: round {turn + 3} of {repeats + 2}", file=sys.stderr)
    return times_ms, peaks_mib


def table(times_ms: dict[str, list[float]], peaks_mib: dict[str, float], cuda: bool) -> str:
    dense = next(iter(times_ms))
    lines = ["| contender | median ms | min to max ms | dense / this |", "|---|---|---|---|"]
    if cuda:
        lines = [lines[0] + " peak MiB | dense / this | share of step |", lines[1] + "---|---|---|"]
    for name, times in times_ms.items():
        ratios = sorted(d / t for d, t in zip(times_ms[dense], times, strict=True))
        cells = [
            name,
            f"{statistics.median(times):.2f}",
            f"{min(times):.2f} to {max(times):.2f}",
            f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})",
        ]
        if cuda:
            step_ms = statistics.median(times_ms["student step without targets"])
            cells += [f"{peaks_mib[name]:.0f}", f"{peaks_mib[dense] / peaks_mib[name]:.1f}"]
            cells.append(f"{100 * statistics.median(times) / step_ms:.1f} %")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def header(flags: argparse.Namespace, batch: int) -> str:
    where = f"{provenance.processor()}, {provenance.cores()} cores, {flags.threads} threads"
    if flags.device == "cuda":
        where = f"{torch.cuda.get_device_name()}, bf16 autocast"
    return f"""\
# The loss, {date.today()}

- commit {provenance.commit()}, command `{provenance.command()}`
- {where}, torch {torch.__version__}, Python {platform.python_version()}
- student {flags.student} ({HEADS} heads x {TOKENS} tokens x {WIDTHS[flags.student] // HEADS}), batch {batch}
- relations qk and vv, forward and backward; n = {flags.repeats} rounds of all contenders in turn, ratios within a round
"""


if __name__ == "__main__":
    main()
