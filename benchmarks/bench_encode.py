"""What encoding costs beside the teacher: ViT-L/16 to block 18, default sketch of its Q-K and V-V relations.

    python benchmarks/bench_encode.py [--device cpu] [--batch 16] [--teacher-batch 2] > table.md
    python benchmarks/bench_encode.py --device cuda > table.md          # bf16, batch 256

All paths in one run and in turn, the same q, k, v and keys: what the codec does; torch operations a few views at a
time; the same operations over the whole batch at once, as the codec did before. Keep the table under
benchmarks/results/. Exit code 1 on a GPU where encoding adds more than 5 % to the teacher.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import NamedTuple

import provenance
import timm
import torch
from torch import Tensor

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.codecs.relations import Relation
from tinymim.models.taps import CutTeacher
from tinymim.targets.counter import uniforms
from tinymim.targets.kinds import make_kind
from tinymim.targets.record import to_gaps
from tinymim.targets.relations.draws import sample_rows, stream_of
from tinymim.targets.relations.kernels.encode import fused, sketch_rows_torch
from tinymim.targets.relations.kind import mean_entropy
from tinymim.targets.relations.qkv import QKV, relation_probs
from tinymim.targets.relations.sparsify import quantise, systematic_draws, top_entries

HEADS, TOKENS, WIDTH = 16, 197, 64  # ViT-L/16 at 224 px
RELATIONS: tuple[Relation, ...] = ("qk", "vv")
ROWS, TAIL_K = 64, 8  # the default codec's
MOST = 0.05  # of the teacher's forward


class Timing(NamedTuple):
    """Milliseconds a view over the repeats, and the memory that a call takes beyond its arguments."""

    name: str
    ms: list[float]
    peak_mib: float | None  # None: not known on this device

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ms)


def main() -> int:
    parser = argparse.ArgumentParser(description="encode beside the teacher's forward")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, help="views encoded at once; 16 on a CPU, 256 on a GPU")
    parser.add_argument("--teacher-batch", type=int, help="views in the teacher's forward; 2 on a CPU, else --batch")
    parser.add_argument("--head-k", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7)
    flags = parser.parse_args()
    device = torch.device(flags.device)
    on_gpu = device.type == "cuda"
    batch = flags.batch or (256 if on_gpu else 16)
    teacher_batch = flags.teacher_batch or (batch if on_gpu else 2)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    config = codec_config(head_k=flags.head_k, tail_k=TAIL_K, rows=ROWS, relations=RELATIONS)
    kind = make_kind(config, 18)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    # As a block leaves them: strided views of one projection.
    qkv = QKV.split(torch.randn(batch, TOKENS, 3 * HEADS * WIDTH, device=device, dtype=dtype), HEADS)
    tapped = {kind.taps[0]: (qkv.q, qkv.k, qkv.v)}
    keys = torch.arange(batch, device=device)
    name = "codec, fused kernel" if fused(qkv, "qk") else "codec, a few views at a time"
    paths: dict[str, Callable[[], object]] = {
        name: lambda: kind.encode(tapped, keys),
        "torch operations, all views at once (before)": lambda: encode_eager(qkv, keys, flags.head_k),
    }
    if fused(qkv, "qk"):
        paths["torch operations, in chunks"] = lambda: encode_torch(qkv, keys, flags.head_k)
    timings = measure(paths, batch, flags.repeats, device)

    model = timm.create_model("vit_large_patch16_224", num_classes=0)
    teacher = CutTeacher(model, kind.taps).to(device, dtype).eval().requires_grad_(False)
    images = torch.randn(teacher_batch, 3, 224, 224, device=device, dtype=dtype)
    with torch.no_grad():
        repeats = flags.repeats if on_gpu else min(flags.repeats, 3)
        teacher_ms = measure({"teacher's forward to block 18": lambda: teacher(images)}, teacher_batch, repeats, device)
    print(header(device, batch, teacher_batch, dtype, flags.head_k), table([*timings, *teacher_ms]), sep="\n")
    share = timings[0].median_ms / teacher_ms[0].median_ms
    if on_gpu and share > MOST:
        print(f"bench_encode: encoding adds {share:.1%}, more than {MOST:.0%}", file=sys.stderr)
        return 1
    return 0


def encode_eager(qkv: QKV, keys: Tensor, head_k: int) -> dict[str, Tensor]:
    """The sketch as it reads, over the whole batch: what the codec did before it had a kernel."""
    out: dict[str, Tensor] = {}
    for relation in RELATIONS:
        probs = relation_probs(qkv, relation, sample_rows(keys, relation, HEADS, TOKENS, ROWS))
        index, head = top_entries(probs, head_k)
        u_head = uniforms(keys, stream_of("rounding", relation), tuple(head.shape[1:]))
        u_tail = uniforms(keys, stream_of("tail", relation), tuple(probs.shape[1:3]))
        out[f"{relation}_entropy"] = mean_entropy(probs)
        out[f"{relation}_head_gap"] = to_gaps(index).to(torch.uint8)
        out[f"{relation}_head_code"] = quantise(head, u_head).to(torch.uint8)
        out[f"{relation}_tail_gap"] = to_gaps(systematic_draws(probs, index, u_tail, TAIL_K)).to(torch.uint8)
    return out


def encode_torch(qkv: QKV, keys: Tensor, head_k: int) -> dict[str, Tensor]:
    """The chunked path, on a device where the codec takes the kernel."""
    out: dict[str, Tensor] = {}
    for relation in RELATIONS:
        rows = sample_rows(keys, relation, HEADS, TOKENS, ROWS)
        sketch = sketch_rows_torch(qkv, relation, rows, keys, head_k, TAIL_K)
        out[f"{relation}_entropy"] = sketch.entropy
        out[f"{relation}_head_gap"] = to_gaps(sketch.head_index).to(torch.uint8)
        out[f"{relation}_head_code"] = sketch.head_code.to(torch.uint8)
        out[f"{relation}_tail_gap"] = to_gaps(sketch.tail_index).to(torch.uint8)
    return out


def measure(paths: dict[str, Callable[[], object]], views: int, repeats: int, device: torch.device) -> list[Timing]:
    """Every path in turn, `repeats` times, after one call that compiles and fills caches."""
    peaks = {name: _peak_mib(call, device) for name, call in paths.items()}
    ms: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(repeats):
        for name, call in paths.items():
            ms[name].append(_call_ms(call, device) / views)
    return [Timing(name, ms[name], peaks[name]) for name in paths]


def _call_ms(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began_s = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began_s)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    call()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended))


def _peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    call()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def header(device: torch.device, batch: int, teacher_batch: int, dtype: torch.dtype, head_k: int) -> str:
    """Where, what and how, as a list."""
    flags = " ".join(sys.argv[1:]) or f"--device {device.type}"
    kind = str(dtype).removeprefix("torch.")
    return f"""\
# Encoding beside the teacher, {date.today()}

- commit {provenance.commit()}, command `python benchmarks/bench_encode.py {flags}`
- {_hardware(device)}; Python {platform.python_version()}, torch {torch.__version__}
- {HEADS} heads x {TOKENS} tokens x {WIDTH}, {kind}; relations {" and ".join(RELATIONS)}, {ROWS} rows x \
{TAIL_K} draws, head_k {head_k}; batch {batch}
- teacher: vit_large_patch16_224 cut in block 18, random weights, {kind}, batch {teacher_batch}
"""


def table(timings: list[Timing]) -> str:
    """Median, spread, and the share of the last line, which is the teacher's."""
    teacher_ms = timings[-1].median_ms
    lines = ["| | ms per view | min to max | of the forward | peak MiB |", "|---|---|---|---|---|"]
    for timing in timings:
        share = timing.median_ms / teacher_ms
        peak = "-" if timing.peak_mib is None else f"{timing.peak_mib:,.0f}"
        cells = (timing.name, f"{timing.median_ms:.4g}", f"{min(timing.ms):.4g} to {max(timing.ms):.4g}")
        lines.append("| " + " | ".join([*cells, f"{100 * share:.2f} %", peak]) + " |")
    return "\n".join([*lines, "", f"Medians of {len(timings[0].ms)} calls in turn ({len(timings[-1].ms)} forwards)."])


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{provenance.processor()}, {provenance.cores()} cores, 1 thread"


if __name__ == "__main__":
    sys.exit(main())
