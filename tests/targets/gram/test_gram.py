"""Gram matrices: the contract, loss and gradient against float64, entries, bytes."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.contract import Tapped
from tinymim.targets.gram.kind import Gram, GramTarget
from tinymim.targets.kinds import audit_kind, make_kind
from tinymim.tests.targets.contract import TargetKindContract

BLOCK, TOKENS, PREFIX, WIDTH = 2, 18, 2, 24
SHAPES = Shapes(4, 6, TOKENS, PREFIX, (4, 4))
STUDENT = Shapes(3, 4, 17, 1, (4, 4))
TAP = Tap("tokens")


def teacher(views: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tapped:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(views, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype) + 0.4
    return dict.fromkeys((TAP, Tap("tokens", BLOCK), Tap("normed", BLOCK)), (tokens, tokens[:, :PREFIX]))


def made(targets: TargetsConfig | None = None, **fields: Any) -> Gram:
    kind = make_kind(codec_config(kind="gram", **fields), BLOCK, targets or TargetsConfig())
    assert isinstance(kind, Gram)
    return kind


def plain(tokens: Tensor) -> Tensor:
    unit = normalize(tokens, dim=-1)
    return torch.einsum("bqc,bkc->bqk", unit, unit)


class TestGram(TargetKindContract):
    shapes: ClassVar[Shapes] = SHAPES
    student: ClassVar[Shapes] = STUDENT
    cases: ClassVar[Mapping[str, Any]] = {
        "entries": {"rows": 5, "columns": 7},
        "all columns, of a block": {"rows": 5, "columns": 99, "at": "block"},
        "all entries": {"rows": 99, "columns": 16},
        "dense": {"name": "dense", "at": "normed"},
    }
    golden: ClassVar[Mapping[str, str]] = {
        "entries": "36716d1c04d0284c",
        "all columns, of a block": "8b85576eba329ba0",
        "all entries": "6e4bec63121d0cc5",
        "dense": "748da6d8881d27cd",
    }
    refusals: ClassVar[Mapping[str, tuple[Callable[[], object], str]]] = {
        "loss": (lambda: made(TargetsConfig(loss="mse")), r"targets\.loss is for another kind"),
        "grid": (lambda: made().head(Shapes(3, 4, 10, 1, (3, 3)), SHAPES), r"student\.img_size"),
    }

    def make(self, case: Any) -> Gram:
        return made(**case)

    def tapped(self, views: int, seed: int = 0) -> Tapped:
        return teacher(views, seed)


def test_the_loss_is_the_squared_distance_of_gram_matrices_and_passes_gradcheck() -> None:
    kind, tapped, keys = made(rows=5, columns=7), teacher(2, dtype=torch.float64), torch.tensor([5, 6])
    s = torch.randn(2, 16, 9, dtype=torch.float64, requires_grad=True)
    wanted = (plain(s) - plain(tapped[TAP][0][:, PREFIX:])).square().mean((1, 2))
    torch.testing.assert_close(kind.losses((s,), kind.exact(tapped))["gram"].per_part()[:, 0], wanted)
    target = kind.decode(kind.encode(tapped, keys), keys, SHAPES)
    assert torch.autograd.gradcheck(lambda x: kind.losses((x,), target)["gram"].parts, (s,))


def test_entries_are_those_of_rows_and_columns_within_a_step() -> None:
    kind, tapped, keys = made(rows=5, columns=7), teacher(3), torch.tensor([4, 5, 6])
    target: GramTarget = kind.decode(kind.encode(tapped, keys), keys, SHAPES)
    assert (
        target.rows is not None and target.columns is not None and not torch.equal(target.rows, target.columns[:, :5])
    )
    exact = kind.exact(tapped).cosines
    for view in range(3):
        entries = exact[view][target.rows[view]][:, target.columns[view]]
        assert ((target.cosines[view] - entries).abs() <= 1.001 / 127).all()
        torch.testing.assert_close(target.square[view], entries.square().mean())
    assert float(kind.statistics(tapped, target)["gram"]["relative_error"].max()) < 1e-3


def test_a_record_takes_the_stated_bytes() -> None:
    large = Shapes(16, 64, 197, 1, (14, 14))
    sizes = [sum(spec.size_bytes for spec in kind.specs(large)) for kind in (made(), made(name="dense"))]
    assert sizes == [1028, 76836]


def test_dense_layers_serve_audits() -> None:
    parameters = codec_config(kind="gram", name="dense").model_dump(mode="json")
    section = {"name": "dense", "version": 1, "taps": ["tokens@0"], "parameters": parameters}
    audit = audit_kind(section, made(), SHAPES, None)
    assert audit.whole and audit.meaning == made().meaning
