"""Encoding without the relation map: chunks give the reference's bits, the Triton kernel the same numbers.

The kernel runs under Triton's interpreter in a child process (this file as a script: the variable that chooses the
interpreter is read when triton is imported, and the GPU tests need the compiler).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.codecs.relations import Relation
from tinymim.targets.counter import uniforms
from tinymim.targets.relations.draws import sample_rows, stream_of
from tinymim.targets.relations.kernels import encode
from tinymim.targets.relations.kernels.encode import (
    RowSketch,
    fused,
    probs_in_chunks,
    sketch_rows,
    sketch_rows_torch,
    top_rows,
)
from tinymim.targets.relations.kind import mean_entropy
from tinymim.targets.relations.qkv import QKV, relation_probs
from tinymim.targets.relations.sparsify import quantise, systematic_draws, top_entries
from tinymim.tests.targets.relations.plain import make_codec

MakeQKV = Callable[..., QKV]


class Case(NamedTuple):
    """Q of None: all rows. `kind` is how the logits are made, see `make_case`."""

    B: int
    H: int
    T: int
    D: int
    Q: int | None
    head_k: int
    tail_k: int
    dtype: str
    relation: Relation = "qk"
    kind: str = "normal"

    def __str__(self) -> str:
        return "-".join(map(str, self))


# Each T, D, number of heads, head_k, tail_k and kind at least once; under the interpreter a block of rows takes 50 ms.
CASES: Final = [
    Case(2, 3, 50, 12, None, 3, 8, "float32"),
    Case(1, 16, 65, 16, 5, 0, 8, "float16"),
    Case(2, 3, 197, 24, 20, 4, 1, "float32", "vv"),
    Case(1, 4, 257, 48, 17, 1, 8, "float16", "qq"),
    Case(1, 3, 785, 64, 9, 2, 3, "float32", "kk"),
    Case(0, 3, 50, 12, 7, 1, 2, "float32"),
    Case(1, 2, 6, 5, None, 5, 2, "float32"),
    Case(1, 1, 50, 160, 16, 0, 4, "float32"),
    Case(1, 3, 50, 16, 7, 2, 4, "float16", "qk", "6e4"),
    Case(1, 3, 50, 16, 7, 3, 4, "float32", "qk", "peaked"),
    Case(1, 3, 50, 16, 7, 3, 4, "float32", "qk", "equal"),
    Case(1, 3, 50, 16, 7, 0, 4, "float32", "qk", "one-hot"),
    Case(2, 3, 50, 16, 7, 2, 4, "float32", "qk", "inf"),
]
GPU_CASES: Final = [
    *CASES,
    *(case._replace(dtype="bfloat16") for case in CASES),
    *(Case(4, H, T, D, 40, head_k, 8, "bfloat16") for T, D in [(50, 12), (65, 16), (197, 64), (257, 24), (785, 48)]
      for H, head_k in [(3, 0), (16, 8)]),
    Case(2, 3, 197, 64, None, 20, 9, "float32"),
]  # fmt: skip


def make_case(case: Case) -> tuple[QKV, Tensor | None, Tensor]:
    """q, k, v as strided views of one projection, query rows, and view keys."""
    generator = torch.Generator().manual_seed(0)
    x = 1.5 * torch.randn(case.B, case.T, 3, case.H, case.D, generator=generator)
    if case.kind != "normal":
        x[:, :, 0, :, 0], x[:, :, 0, :, 1:] = case.D**0.5, 0.0  # the logits are the keys' first channel
        first = {
            "6e4": torch.where(torch.arange(case.T) % 3 == 0, 6e4, -6e4),
            "peaked": -200.0 * torch.arange(case.T).flip(0),
            "equal": torch.zeros(case.T),
            "one-hot": torch.where(torch.arange(case.T) == 11, 1e4, -1e4),
            "inf": torch.linspace(-2, 2, case.T),
        }[case.kind]
        x[:, :, 1, :, 0] = first[None, :, None]
        if case.kind == "inf":
            x[1, 4, 1] = torch.inf
    q, k, v = x.to(getattr(torch, case.dtype)).permute(2, 0, 3, 1, 4).unbind(0)
    keys = torch.arange(case.B) * 0x0123456789ABCDEF - 1
    rows = None if case.Q is None else sample_rows(keys, case.relation, case.H, case.T, case.Q)
    return QKV(q, k, v), rows, keys


def reference(
    qkv: QKV, relation: Relation, rows: Tensor | None, keys: Tensor, head_k: int, tail_k: int
) -> tuple[RowSketch, Tensor]:
    """`sketch_rows` as it reads, the whole batch at once, and the probabilities of its rows."""
    probs = relation_probs(qkv, relation, rows)
    head_index, head = top_entries(probs, head_k)
    u_head = uniforms(keys, stream_of("rounding", relation), tuple(head.shape[1:]))
    u_tail = uniforms(keys, stream_of("tail", relation), tuple(probs.shape[1:3]))
    entropy = torch.special.entr(probs).sum(-1).mean((1, 2)).float()
    draws = systematic_draws(probs, head_index, u_tail, tail_k)
    return RowSketch(head_index, quantise(head, u_head), draws, entropy), probs


def assert_identical(got: RowSketch, expected: RowSketch) -> None:
    for name, value in vars(expected).items():
        assert getattr(got, name).dtype == value.dtype, name
        torch.testing.assert_close(getattr(got, name), value, rtol=0, atol=0, equal_nan=True, msg=name)


def compare(case: Case, got: RowSketch, expected: RowSketch, probs: Tensor) -> None:
    """The same numbers up to the last bits of exp, and up to the choice among equal entries of the head."""
    for name, value in vars(expected).items():
        assert getattr(got, name).shape == value.shape and getattr(got, name).dtype == value.dtype, name
    bad = ~expected.entropy.isfinite()
    assert torch.equal(~got.entropy.isfinite(), bad)
    got, expected = (RowSketch(*(x[~bad] for x in vars(s).values())) for s in (got, expected))
    probs = probs[~bad]
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-5, atol=1e-5)

    index = torch.cat([got.head_index, got.tail_index], dim=-1)
    if index.numel() == 0:
        return
    assert index.min() >= 0 and index.max() < case.T
    assert (got.head_index.diff(dim=-1) > 0).all() and (got.tail_index.diff(dim=-1) >= 0).all()
    kept, wanted = (probs.gather(-1, s.head_index) for s in (got, expected))
    torch.testing.assert_close(kept.sort(-1).values, wanted.sort(-1).values, rtol=1e-5, atol=0)
    assert not (got.tail_index[..., :, None] == got.head_index[..., None, :]).any()
    rest = probs.scatter(-1, got.head_index, 0.0)
    drawn = rest.gather(-1, got.tail_index)
    assert ((drawn > 0).all(-1) | (rest == 0).all(-1)).all(), "an entry of probability 0 was drawn"
    # Where both heads hold the same tokens, codes and draws are the same but for a few on an edge.
    same = (got.head_index == expected.head_index).all(-1)
    assert case.kind in ("equal", "6e4", "peaked") or same.double().mean() >= 0.999
    if same.any():
        codes, draws = got.head_code[same] - expected.head_code[same], got.tail_index[same] - expected.tail_index[same]
        assert codes.abs().max() <= 1 if codes.numel() else True
        assert draws.abs().max() <= 1
        for off in codes, draws:
            assert (off != 0).sum() <= 0.001 * off.numel()


# ---------------------------------------------------------------- chunks


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 40])
def test_chunks_give_the_bits_of_the_reference(case: Case, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encode._CHUNK_BYTES, "cpu", chunk_bytes)
    qkv, rows, keys = make_case(case)
    expected, probs = reference(qkv, case.relation, rows, keys, case.head_k, case.tail_k)
    got = sketch_rows(qkv, case.relation, rows, keys, case.head_k, case.tail_k)
    assert_identical(got, expected)
    index, value = top_rows(qkv, case.relation, rows, case.head_k)
    assert torch.equal(index, expected.head_index)
    torch.testing.assert_close(value, probs.gather(-1, index), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_k", [0, 3])
def test_a_vitl_batch_in_chunks_of_its_own(dtype: torch.dtype, head_k: int, make_qkv: MakeQKV) -> None:
    # As many rows as fill two chunks and a half: the real budget, heads and width.
    keys = torch.arange(5)
    qkv = make_qkv(5, 16, 197, 64, dtype=dtype)
    rows = sample_rows(keys, "qk", 16, 197, 64)
    assert len(list(probs_in_chunks(qkv, "qk", rows))) > 1
    assert_identical(sketch_rows(qkv, "qk", rows, keys, head_k, 8), reference(qkv, "qk", rows, keys, head_k, 8)[0])


def test_memory_holds_a_chunk_of_the_wanted_rows_only(make_qkv: MakeQKV) -> None:
    keys = torch.arange(40)
    qkv = make_qkv(40, 4, 197, 8, dtype=torch.float32)
    rows = sample_rows(keys, "qk", 4, 197, 64)
    chunks = [(views, probs.shape, probs.nbytes) for views, probs in probs_in_chunks(qkv, "qk", rows)]
    assert [v for views, _, _ in chunks for v in range(40)[views]] == list(range(40))
    assert all(shape[1:] == (4, 64, 197) for _, shape, _ in chunks)
    assert max(size for _, _, size in chunks) <= encode._CHUNK_BYTES["cpu"]


def test_autocast_changes_nothing(make_qkv: MakeQKV) -> None:
    keys, qkv = torch.arange(2), make_qkv(2, 3, 50, 12, dtype=torch.float32)
    plain = sketch_rows(qkv, "qk", None, keys, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(sketch_rows(qkv, "qk", None, keys, 2, 4), plain)


def test_the_entropy_is_the_records(make_qkv: MakeQKV) -> None:
    keys, qkv = torch.arange(3), make_qkv(3, 2, 17, 5)
    expected = mean_entropy(relation_probs(qkv, "vv")).float()
    assert torch.equal(sketch_rows(qkv, "vv", None, keys, 0, 2).entropy, expected)


def test_an_empty_batch_has_empty_records(make_qkv: MakeQKV) -> None:
    made = make_codec(codec_config(rows=6, head_k=2))
    arrays = made.encode(make_qkv(0, 2, 17, 5), torch.empty(0, dtype=torch.int64))
    assert [(name, x.shape) for name, x in arrays.items()] == [(s.name, (0, *s.shape)) for s in made.arrays(2, 17)]


def test_cpu_tensors_take_the_torch_path(make_qkv: MakeQKV) -> None:
    assert not fused(make_qkv(1, 2, 17, 5, dtype=torch.float32), "qk")


# ---------------------------------------------------------------- the kernel under the interpreter


def run_cases() -> Iterator[dict[str, Any]]:
    """In the child process: what is wrong with each case, empty where nothing is; and the kernel's uniforms."""
    from tinymim.targets.relations.kernels.encode_triton import sketch_rows_triton

    for case in CASES:
        qkv, rows, keys = make_case(case)
        expected, probs = reference(qkv, case.relation, rows, keys, case.head_k, case.tail_k)
        wrong = ""
        try:
            arguments = (qkv, case.relation, rows, keys, case.head_k, case.tail_k)
            with np.errstate(invalid="ignore" if case.kind == "inf" else "warn"):  # inf - inf is meant
                got = RowSketch(*sketch_rows_triton(*arguments))
            compare(case, got, expected, probs)
            if case.kind == "equal":
                assert (got.head_index == torch.arange(case.head_k)).all(), "of equal entries the first are the head"
        except Exception as problem:
            wrong = f"{type(problem).__name__}: {problem}"
        yield {"case": str(case), "wrong": wrong}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What is wrong with each case under the interpreter."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-W", "error", str(Path(__file__))],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return {line["case"]: line["wrong"] for line in map(json.loads, child.stdout.splitlines())}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_gives_the_same_numbers_under_the_interpreter(case: Case, interpreted: dict[str, str]) -> None:
    assert interpreted[str(case)] == ""


# ---------------------------------------------------------------- the kernel on a GPU


@pytest.mark.parametrize(("dtype", "T", "head_k", "arch"), [("bf16", 197, 0, 90), ("fp32", 785, 2, 80)])
def test_the_kernel_compiles_without_a_gpu(
    dtype: str, T: int, head_k: int, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tinymim.targets.relations.kernels.encode_triton import _sketch_kernel, launch_options

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    options = launch_options(T, 64, 2 if dtype == "bf16" else 4)
    constants = {"HAS_ROWS": True, "WIDTH": 64, "HEAD_K": head_k, "TAIL_K": 8, "a_stride_d": 1, "b_stride_d": 1}
    constants |= {name: options.pop(name) for name in list(options) if name.startswith("BLOCK")}
    floats = {"a_ptr": dtype, "b_ptr": dtype, "grid_ptr": "fp64", "entropy_ptr": "fp32"}
    scalars = {"scale": "fp32", "rounding_offset": "i64", "tail_offset": "i64"}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        return f"*{floats.get(name, 'i64')}" if name.endswith("_ptr") else scalars.get(name, "i32")

    names = _sketch_kernel.arg_names
    source = ASTSource(
        _sketch_kernel,
        {name: kind(name) for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith(("_ptr", "_t", "_h", "_b"))},
    )
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert made.asm["cubin"]
    assert made.metadata.shared <= 99 << 10, "more shared memory than the smaller GPUs have"


def on_gpu(qkv: QKV, rows: Tensor | None, keys: Tensor) -> tuple[QKV, Tensor | None, Tensor]:
    return QKV(qkv.q.cuda(), qkv.k.cuda(), qkv.v.cuda()), None if rows is None else rows.cuda(), keys.cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_the_kernel_gives_the_same_numbers_on_a_gpu(case: Case) -> None:
    qkv, rows, keys = on_gpu(*make_case(case))
    assert fused(qkv, case.relation)
    arguments = (qkv, case.relation, rows, keys, case.head_k, case.tail_k)
    got = sketch_rows(*arguments)
    assert_identical(sketch_rows(*arguments), got)
    expected, probs = reference(*arguments)
    assert_identical(sketch_rows_torch(*arguments), expected)
    compare(case, got, expected, probs)


@pytest.mark.gpu
def test_longer_rows_and_doubles_fall_back_to_torch_on_a_gpu(make_qkv: MakeQKV) -> None:
    for shape, dtype in [((1, 2, 1025, 8), torch.float32), ((1, 2, 50, 8), torch.float64)]:
        qkv, _, keys = on_gpu(make_qkv(*shape, dtype=dtype), None, torch.tensor([1]))
        assert not fused(qkv, "qk")
        rows = sample_rows(keys, "qk", 2, shape[2], 9)
        assert_identical(sketch_rows(qkv, "qk", rows, keys, 2, 3), reference(qkv, "qk", rows, keys, 2, 3)[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in run_cases():
        print(json.dumps(line))
