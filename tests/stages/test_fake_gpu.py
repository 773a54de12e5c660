"""What a GPU would refuse, without one: torch's fake tensors know devices, and raise where two of them meet."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.sections.augment import JitterConfig
from tinymim.configs.sections.models import TeacherConfig
from tinymim.models.taps import finite_views
from tinymim.models.teacher import Teacher
from tinymim.pipeline import jitter
from tinymim.pipeline.dataset import ViewBatch
from tinymim.pipeline.views import View
from tinymim.stages.units.draft import encode
from tinymim.stages.units.ledger import Piece
from tinymim.storage.layout import UnitId
from tinymim.targets.fidelity import GradientMoments, StatisticMoments
from tinymim.targets.kinds import make_kind
from tinymim.targets.relations import sparsify
from tinymim.targets.relations.kernels import encode as encode_kernel
from tinymim.targets.relations.kernels import loss as loss_kernel
from tinymim.targets.relations.qkv import QKV
from tinymim.tests.stages.tiny import STATED, TEACHER
from tinymim.tests.targets.relations.plain import make_codec, relation_loss, tapped

CODECS: list[dict[str, Any]] = [
    {},
    {"head_k": 1},
    {"head_k": 2, "tail": "renormalise"},
    {"head_k": 2, "tail": "uniform"},
    {"head_k": 2, "tail": "ghost"},
    {"name": "dense"},
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A GPU whose tensors have a device and a shape, and no numbers."""
    for kernels in (encode_kernel, loss_kernel):
        monkeypatch.setattr(kernels, "triton_works", lambda: False)  # Triton wants real ones
    with FakeTensorMode(allow_non_fake_inputs=True):  # constants of modules: fake ones of the CPU
        yield torch.device("cuda")
    jitter._tables.cache_clear()  # these hold fake tensors now
    sparsify._grid.cache_clear()


@pytest.mark.parametrize("fields", CODECS, ids=str)
def test_records_targets_and_losses_stay_on_the_gpu(gpu: torch.device, fields: dict[str, Any]) -> None:
    codec = make_codec(codec_config(**fields))
    keys = torch.arange(3, device=gpu)
    qkv = QKV(*torch.randn(3, 3, 2, 17, 8, device=gpu))
    records, finite = codec.encode(qkv, keys), finite_views(tapped(qkv))
    target = codec.decode(records, keys, 17)
    student = QKV(*torch.randn(3, 3, 2, 17, 4, device=gpu))
    losses = relation_loss(student, target)
    moments = StatisticMoments()
    moments.add(codec.kind.statistics(tapped(qkv), target), 3)
    assert len(losses) == 2
    found = [*records.values(), *losses.values(), finite]
    assert {tensor.device.type for tensor in found} == {"cuda"}


def test_what_an_audit_sums_up_is_all_on_the_cpu(gpu: torch.device) -> None:
    """Where its summary mixes sums of gradients with squares of them, and would wait for the GPU for each."""
    moments = GradientMoments(views=8, groups=4)
    for _ in range(8):
        gradients = torch.randn(3, 2, 50, device=gpu)
        moments.add({"qk": gradients[0]}, [{"qk": gradients[1]}, {"qk": gradients[2]}])
    held = {name: value.device.type for name, value in vars(moments._parts["qk"]).items() if isinstance(value, Tensor)}
    assert len(held) == 6 and set(held.values()) == {"cpu"}, held


def test_jitter_is_that_of_the_images_device(gpu: torch.device) -> None:
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8, device=gpu)
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        generator = torch.Generator().manual_seed(0)
    factors, orders = torch.ones(4, 3, device=gpu), torch.zeros(4, dtype=torch.int64, device=gpu)
    assert jitter.apply_jitter(pixels.float(), factors, orders).device.type == "cuda"
    assert jitter.jitter(pixels, JitterConfig(), generator).device.type == "cuda"


class LikeCuda(TorchDispatchMode):
    """Refuses what CUDA refuses: to index uint16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor and args[0].dtype == torch.uint16:
            raise NotImplementedError("\"index_cuda\" not implemented for 'UInt16'")
        return func(*args, **(kwargs or {}))


def test_views_of_more_than_256_tokens_are_picked_for_the_audit(tmp_path: Path) -> None:
    """Their indices are uint16."""
    from safetensors.torch import save_file

    from tinymim.models.vit import build_model

    sizes = TEACHER | {"img_size": 68, "patch_size": 4}  # 17 x 17 patches and a class token
    torch.manual_seed(0)
    config = TeacherConfig.model_validate(sizes | {"weights": str(tmp_path / "teacher.safetensors"), "block": 2})
    save_file(build_model(config).state_dict(), tmp_path / "teacher.safetensors", STATED)
    kind = make_kind(codec_config(rows=4, tail_k=3), 2)
    items = np.array([[0, sample, view] for sample in range(2) for view in range(2)])
    batch = ViewBatch(
        items=items,
        keys=["a", "a", "b", "b"],
        pixels=torch.randint(0, 256, (4, 3, 68, 68), dtype=torch.uint8),
        labels=torch.zeros(4, dtype=torch.int64),
        views=[View(0, 0, 68, 68, False)] * 4,
        view_keys=torch.arange(4),
    )
    piece = Piece(UnitId("shard-000000.tar", 0, 2), ("a",), range(2), True, True)
    with LikeCuda():  # type: ignore[no-untyped-call]  # torch's
        encoded = encode({"a": Teacher(config, kind.taps)}, {"a": kind}, batch, piece, 16, torch.device("cpu"))
    assert encoded.audited is not None and encoded.arrays["a"]["qk_tail_gap"].dtype == torch.uint16
    for name, picked in encoded.audited.records["a"].items():
        whole: Tensor = encoded.arrays["a"][name]
        assert picked.dtype == whole.dtype and torch.equal(picked.long(), whole.long()[[0, 2]]), name
