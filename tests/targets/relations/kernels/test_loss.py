"""The loss operator against the textbook in float64: both implementations, every tail, and what autograd needs.

Triton's kernels run here under its interpreter, in one child process (`python test_loss.py`): the interpreter has to be
asked for before Triton is first imported, and would stay on for the tests on a GPU.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tinymim.configs.codecs.kinds import codec_config
from tinymim.targets.relations.kernels.loss import (
    CPU_CHUNK_BYTES,
    cross_entropy,
    relation_cross_entropy,
    relation_cross_entropy_chunked,
)
from tinymim.targets.relations.losses import reference_cross_entropy
from tinymim.targets.relations.qkv import QKV, relation_logits
from tinymim.targets.relations.rows import SparseRows, Tail
from tinymim.tests.targets.relations.plain import make_codec, relation_loss

TAILS: tuple[Tail, ...] = ("none", "uniform", "ghost")
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """Shapes of one comparison; Q = T stands for rows=None."""

    B: int
    H: int
    Q: int
    T: int
    D: int
    K: int
    tail: Tail
    dtype: torch.dtype = torch.float32
    columns_dtype: torch.dtype | None = None  # where b has another than a


# Every T, D, tail, number of heads and dtype at least once, with sampled rows and with all.
CASES = (
    Case(2, 3, 17, 50, 12, 8, "none"),
    Case(1, 3, 17, 50, 12, 8, "none", torch.bfloat16, torch.float32),
    Case(1, 16, 50, 50, 24, 3, "uniform", torch.float16),
    Case(1, 3, 65, 65, 16, 1, "ghost"),
    Case(1, 1, 7, 65, 12, 64, "ghost", torch.bfloat16),
    Case(1, 4, 64, 197, 12, 8, "none", torch.bfloat16),
    Case(1, 3, 64, 197, 24, 8, "uniform"),
    Case(1, 3, 197, 197, 24, 2, "ghost", torch.float16),
    Case(1, 3, 64, 257, 48, 5, "none", torch.float16),
    Case(1, 3, 1, 257, 64, 8, "uniform", torch.bfloat16),
    Case(1, 2, 31, 785, 64, 8, "none"),
    Case(1, 2, 40, 785, 48, 9, "ghost"),
    Case(0, 3, 17, 50, 12, 8, "none"),
    Case(0, 3, 50, 50, 12, 8, "ghost"),
)


def made(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, SparseRows]:
    """Sides a and b as strided views of one [B, T, 3, H, D] tensor, and a target with repeats and negative weights."""
    generator = torch.Generator().manual_seed(0)
    B, H, Q, T, D, K = case.B, case.H, case.Q, case.T, case.D, case.K
    a, _, b = torch.randn(B, T, 3, H, D, generator=generator).to(case.dtype).permute(2, 0, 3, 1, 4)
    weight = torch.rand(B, H, Q, K, generator=generator)
    weight = weight / weight.sum(-1, keepdim=True)
    if case.tail == "none":
        index = torch.randint(T, (B, H, Q, K), generator=generator)
        if K > 1:
            weight[..., :2] += torch.tensor([0.3, -0.3])
    else:
        index = torch.rand(B, H, Q, T, generator=generator).argsort(-1)[..., :K]
        index[:, :, 0] = torch.arange(K)  # with K = 64, a tile without any other token
        weight = 0.7 * weight
    rows = torch.rand(B, H, T, generator=generator).argsort(-1)[..., :Q].sort().values if Q < T else None
    target = SparseRows(rows, index, weight, torch.zeros(B), T, case.tail)
    return a.to(device), b.to(case.columns_dtype or case.dtype).to(device), on(target, device)


def on(target: SparseRows, device: str) -> SparseRows:
    rows = None if target.rows is None else target.rows.to(device)
    index, weight, entropy = (x.to(device) for x in (target.index, target.weight, target.entropy))
    return SparseRows(rows, index, weight, entropy, target.tokens, target.tail)


def textbook(a: Tensor, b: Tensor, target: SparseRows) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy [B, H] and its gradients by the reference and autograd, in float64."""
    a, b = (x.detach().double().requires_grad_() for x in (a, b))
    ce = reference_cross_entropy(relation_logits(QKV(a, b, b), "qk", target.rows), target).mean(-1)
    da, db = torch.autograd.grad(ce.sum(), (a, b))
    return ce.detach(), da, db


def arguments(a: Tensor, b: Tensor, target: SparseRows, with_grad: bool = True) -> tuple[Any, ...]:
    return a, b, target.rows, target.index, target.weight, target.tail, with_grad


def check(operator: Callable[..., tuple[Tensor, ...]], case: Case, device: str = "cpu") -> None:
    a, b, target = made(case, device)
    found = operator(*arguments(a, b, target))
    for name, got, expected in zip(("ce", "da", "db"), found, textbook(a, b, target), strict=True):
        assert got.dtype == torch.float32 and got.shape == expected.shape, name
        # Split products hold 16 bits or more of the softmax: 2e-5 of the largest entry is the worst of them.
        tolerance = 2e-5 if case.dtype in HALF else 4e-6
        error, largest = (x.abs().max().item() if x.numel() else 0.0 for x in (got - expected, expected))
        assert error <= tolerance * largest, f"{name} is {error / largest:.1e} of its largest entry off"
    if case.T <= 65:
        alone = operator(*arguments(a, b, target, with_grad=False))[0]
        if device == "cuda":  # another variant of the kernel: a compiler may contract other products
            torch.testing.assert_close(alone, found[0], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(alone, found[0])
    if device == "cuda":
        assert all(torch.equal(x, y) for x, y in zip(found, operator(*arguments(a, b, target)), strict=True))


def ids(case: Case) -> str:
    dtypes = [str(dtype).removeprefix("torch.") for dtype in (case.dtype, case.columns_dtype) if dtype]
    return "-".join([f"B{case.B}H{case.H}Q{case.Q}T{case.T}D{case.D}K{case.K}", case.tail, *dtypes])


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_chunked_torch_is_the_textbook(case: Case) -> None:
    check(relation_cross_entropy_chunked, case)


@pytest.mark.parametrize("tail", TAILS)
def test_chunks_of_views_and_of_heads_are_the_textbook(tail: Tail) -> None:
    # 3 views of 3 x 60 x 197 logits: two fit in a chunk. One view of 4 x 785 x 785: no head does.
    assert 2 * 3 * 60 * 197 * 4 < CPU_CHUNK_BYTES < 785 * 785 * 4
    check(relation_cross_entropy_chunked, Case(7, 3, 60, 197, 12, 8, tail))
    check(relation_cross_entropy_chunked, Case(1, 4, 785, 785, 12, 8, tail))


def test_triton_is_the_textbook_under_its_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-W", "ignore", __file__]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr
    assert f"{len(CASES) + 2 * len(TAILS)} checks passed" in child.stdout


def interpreted() -> None:
    """What the child process runs: every case, peaked rows, and the operator as training calls it."""
    assert "tinymim.targets.relations.kernels.loss_triton" not in sys.modules  # nobody needs Triton to import the loss
    from tinymim.targets.relations.kernels.loss_triton import relation_cross_entropy_triton

    torch.set_num_threads(1)
    for case in CASES:
        print(ids(case), flush=True)
        check(relation_cross_entropy_triton, case)
    for tail in TAILS:
        print("peaked", tail, flush=True)
        check_peaked(relation_cross_entropy_triton, tail)
        print("through the operator", tail, flush=True)
        check_backward(tail)
    print(f"{len(CASES) + 2 * len(TAILS)} checks passed")


VARIANTS = [(0, True), (1, True), (2, True), (0, False)]  # tail; half precision, whose products are split


@pytest.mark.parametrize(("tail", "half"), VARIANTS)
@pytest.mark.parametrize("kernel", ["_rows_kernel", "_columns_kernel"])
def test_the_kernels_compile_without_a_gpu(
    kernel: str, tail: int, half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tinymim.targets.relations.kernels import loss_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(loss_triton, kernel)
    names = function.arg_names
    tiles = loss_triton._HALF if half else loss_triton._FLOAT
    block_q, block_t, warps = tiles.rows if kernel == "_rows_kernel" else tiles.columns
    constants: dict[str, Any] = {
        "K": 8,
        "TAIL": tail,
        "HAS_ROWS": True,
        "SPLIT": half,
        "WITH_GRAD": True,
        "Q": 64,
        "T": 197,
    }
    constants |= {"BLOCK_Q": block_q, "BLOCK_T": block_t, "BLOCK_D": 64}
    side = "*bf16" if half else "*fp32"
    pointers = {"a": side, "b": side, "rows": "*i64", "index": "*i64"}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in pointers:
            return pointers[name]
        return "i32" if name.startswith(("a_", "b_")) or len(name) == 1 else "fp32" if name == "scale" else "*fp32"

    source = ASTSource(
        function,
        {name: kind(name) for name in names},
        {(names.index(name),): value for name, value in constants.items() if name in names},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"]
    assert made.metadata.shared <= 99 << 10, "more shared memory than the smaller GPUs have"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_triton_on_a_gpu_is_the_textbook(case: Case) -> None:
    pytest.importorskip("triton")
    from tinymim.targets.relations.kernels.loss_triton import relation_cross_entropy_triton

    check(relation_cross_entropy_triton, case, "cuda")
    check(relation_cross_entropy_chunked, case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tail", TAILS)
def test_the_operator_on_a_gpu(tail: Tail) -> None:
    check_peaked(relation_cross_entropy, tail, "cuda")
    check_backward(tail, "cuda")


# ---------------------------------------------------------------- peaked rows


def check_peaked(operator: Callable[..., tuple[Tensor, ...]], tail: Tail, device: str = "cpu") -> None:
    """Logits of 200 against 0, so entries of e^-200, and of +6e4 against -6e4: the textbook's numbers, all finite."""
    case = Case(1, 2, 17, 65, 16, 2, tail)
    for largest in (200.0, 6e4):
        a, b, target = made(case, device)
        # The logits of every row: `largest` at one token, its negative at another, 0 elsewhere.
        a, b = torch.zeros_like(a), torch.zeros_like(b)
        a[..., 0] = 4.0 * largest
        b[..., 5, 0], b[..., 6, 0] = 1.0, -1.0
        for peak_kept in (False, True):
            target.index.copy_(torch.arange(10, 12))  # a tail wants them distinct
            if peak_kept:
                target.index[..., 0] = 5
            found = operator(*arguments(a, b, target))
            for got, expected in zip(found, textbook(a, b, target), strict=True):
                assert got.isfinite().all()
                torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("tail", TAILS)
def test_peaked_rows_are_finite_and_right(tail: Tail) -> None:
    check_peaked(relation_cross_entropy_chunked, tail)


# ---------------------------------------------------------------- the operator in autograd, compile and autocast


def check_backward(tail: Tail, device: str = "cpu") -> None:
    """Gradients of the loss through the operator, for upstream gradients that differ by view and head."""
    a, b, target = made(Case(2, 3, 17, 50, 12, 2, tail), device)
    a, b = (x.clone().requires_grad_() for x in (a, b))
    upstream = torch.linspace(-1.0, 2.0, 6, device=device).view(2, 3)
    ce = cross_entropy(a, b, target)
    found = torch.autograd.grad(ce, (a, b), upstream)
    expected_ce, *expected = textbook(a, b, target)
    torch.testing.assert_close(ce.detach(), expected_ce.float())
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, (want * upstream[..., None, None]).float())


@pytest.mark.parametrize("tail", TAILS)
def test_gradients_through_the_operator(tail: Tail) -> None:
    check_backward(tail)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("rows", [3, 5])
def test_gradcheck(tail: Tail, rows: int) -> None:
    a, b, target = made(Case(2, 2, rows, 5, 3, 2, tail))
    leaves = [x.double().requires_grad_() for x in (a, b)]
    assert torch.autograd.gradcheck(lambda a, b: cross_entropy(a, b, target), leaves)
    # One tensor on both sides, as in the vv relation.
    assert torch.autograd.gradcheck(lambda a: cross_entropy(a, a, target), leaves[:1])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own copies
@pytest.mark.parametrize("rows", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, rows: int) -> None:
    a, b, target = made(Case(2, 2, rows, 5, 3, 2, "none", dtype))
    torch.library.opcheck(relation_cross_entropy, arguments(a, b, target, with_grad=False))
    a, b = (x.requires_grad_() for x in (a, b))
    torch.library.opcheck(relation_cross_entropy, arguments(a, b, target))


def test_without_gradients_none_are_computed() -> None:
    a, b, target = made(Case(2, 2, 3, 5, 3, 2, "none"))
    assert not cross_entropy(a, b, target).requires_grad
    with torch.no_grad():
        assert not cross_entropy(a.clone().requires_grad_(), b, target).requires_grad
    _, da, db = relation_cross_entropy(*arguments(a, b, target, with_grad=False))
    assert da.shape == db.shape == (0,)


def student_and_target(tokens: int = 50, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Any]:
    """q, k, v in one [3, 2, 3, tokens, 12] leaf and a decoded sketch of the default codec, rows and tail reduced."""
    generator = torch.Generator().manual_seed(1)
    teacher, student = torch.randn(2, 3, 2, 3, tokens, 12, generator=generator)
    codec, keys = make_codec(codec_config(rows=16, tail_k=4)), torch.arange(2)
    target = codec.decode(codec.encode(QKV(*teacher), keys), keys, tokens)
    return student.to(dtype).requires_grad_(), target


def test_compiled_loss_is_the_loss() -> None:
    student, target = student_and_target()

    def loss(student: Tensor) -> Tensor:
        return torch.stack(list(relation_loss(QKV(*student.unbind()), target).values())).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = loss(student), compiled(student)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (wanted,), (got,) = torch.autograd.grad(expected, student), torch.autograd.grad(found, student)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    student, target = student_and_target(dtype=dtype)
    outside = relation_loss(QKV(*student.unbind()), target)
    with torch.autocast("cpu", torch.bfloat16):
        inside = relation_loss(QKV(*student.unbind()), target)
    for relation, value in inside.items():
        assert value.dtype == torch.float32 and torch.equal(value, outside[relation])
    (gradient,) = torch.autograd.grad(inside["qk"] + inside["vv"], student)
    assert gradient.dtype == dtype and gradient.isfinite().all()


# ---------------------------------------------------------------- memory


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, inside the operator too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("rows", [64, 197])
def test_no_map_is_ever_held(rows: int) -> None:
    case = Case(4, 16, rows, 197, 12, 8, "none")
    a, b, target = made(case)
    inputs = max(a.numel(), target.index.numel())
    a, b = (x.requires_grad_() for x in (a, b))
    with LargestTensor() as seen:
        relation_cross_entropy_chunked(*arguments(a.detach(), b.detach(), target))
        torch.autograd.grad(cross_entropy(a, b, target).sum(), (a, b))
    assert 0 < seen.largest <= max(CPU_CHUNK_BYTES // 4, inputs)
    assert CPU_CHUNK_BYTES // 4 < 16 * 197 * 197  # a chunk holds less than the maps of one of the four views
    with LargestTensor() as seen:
        reference_cross_entropy(relation_logits(QKV(a, b, b), "qk", target.rows), target)
    assert seen.largest == 4 * 16 * rows * 197  # the mode sees what there is to see


# ---------------------------------------------------------------- refusals


def test_a_student_of_another_shape_is_refused() -> None:
    _, _, target = made(Case(2, 2, 4, 11, 6, 3, "none"))
    for shape in [(2, 3, 11, 6), (2, 2, 12, 6), (3, 2, 11, 6), (2, 2, 10, 6)]:
        x = torch.randn(shape)
        with pytest.raises(AssertionError, match="student"):
            cross_entropy(x, x, target)


def test_a_tail_needs_a_token_to_lie_on() -> None:
    a, b, target = made(Case(1, 2, 4, 5, 6, 5, "ghost"))
    with pytest.raises(AssertionError, match="tail"):
        cross_entropy(a, b, target)


if __name__ == "__main__":
    interpreted()
