"""Class logits: the contract, the sparse loss against a dense float64 one, bytes, classes that do not fit."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tinymim.configs.class_map import class_map_sha256
from tinymim.configs.codecs.kinds import codec_config, codec_parameters
from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.errors import RecipeError
from tinymim.configs.taps import Shapes, Tap
from tinymim.targets.contract import Labels, Tapped
from tinymim.targets.fidelity import GradientMoments
from tinymim.targets.kinds import audit_kind, make_kind, stored_kind
from tinymim.targets.logits.kind import Logits, LogitTarget
from tinymim.tests.targets.contract import TargetKindContract

TAP, CLASSES = Tap("logits"), 300
SHAPES = Shapes(4, 6, 17, 1, (4, 4))
STUDENT = Shapes(3, 4, 17, 1, (4, 4))


def teacher(views: int, seed: int = 0, classes: int = CLASSES) -> Tapped:
    return {TAP: (2 * torch.randn(views, classes, generator=torch.Generator().manual_seed(seed)),)}


def made(**fields: Any) -> Logits:
    """The kind of these fields; `targets` and `rows` of a class map are taken out of them."""
    targets, rows = TargetsConfig(**fields.pop("targets", {})), fields.pop("rows", None)
    constants = {} if rows is None else {"class_map": torch.tensor(rows)}
    kind = make_kind(codec_config(kind="logits", **({"classes": CLASSES} | fields)), 1, targets, constants)
    assert isinstance(kind, Logits)
    return kind


MAP = [*range(0, 40, 2), -1, *range(41, 50)]  # 30 classes of the teacher's 300, and one that it lacks


def mapped(absent: str = "zero", **fields: Any) -> dict[str, Any]:
    class_map = {"sha256": class_map_sha256(tuple(MAP)), "absent": absent}
    return {"classes": len(MAP), "class_map": class_map, "rows": MAP} | fields


def map_file(folder: Path, numbers: Sequence[object], end: str = "\n") -> Path:
    file = folder / "map.txt"
    file.write_bytes(end.join(map(str, numbers)).encode())
    return file


def from_file(file: Path, **fields: Any) -> dict[str, Tensor]:
    """The constants of a class map's file."""
    kind = made(**({"classes": len(MAP), "class_map": {"file": file}} | fields))
    return kind.calibrate([teacher(1)], lambda _tap: (torch.empty(0), None))


class TestLogits(TargetKindContract):
    shapes: ClassVar[Shapes] = SHAPES
    student: ClassVar[Shapes] = STUDENT
    cases: ClassVar[Mapping[str, Any]] = {
        "draws": {},
        "draws, no head, T 2": {"head_k": 0, "temperature": 2},
        "draws, fp16": {"values": "float16", "head_k": 2, "tail_k": 3},
        "topk": {"name": "topk"},
        "topk, fp16": {"name": "topk", "values": "float16", "head_k": 3},
        "dense": {"name": "dense"},
        "dense at T 3 in stage two": {"name": "dense", "targets": {"temperature": 3}},
        "topk at T 3 in stage two": {"name": "topk", "targets": {"temperature": 3}},
        "draws of mapped classes": mapped(),
        "topk of mapped classes": mapped("mean", name="topk"),
    }
    golden: ClassVar[Mapping[str, str]] = {
        "draws": "542b3ad341e5fe63",
        "draws, no head, T 2": "3faa22284fde49c7",
        "draws, fp16": "5128252e941908b4",
        "topk": "6a71c2935041f2a8",
        "topk, fp16": "d611542f0503e75d",
        "dense": "2f38f20a079d8210",
        "dense at T 3 in stage two": "2f38f20a079d8210",
        "topk at T 3 in stage two": "6a71c2935041f2a8",
    }
    refusals: ClassVar[Mapping[str, tuple[Callable[[], object], str]]] = {
        "classes": (
            lambda: made(classes=299).encode(teacher(1), torch.tensor([1])),
            r"another number of classes\n  got: codec\.classes 299",
        ),
        "temperature of draws": (
            lambda: made(targets={"temperature": 2}),
            r"targets\.temperature is not the one that the draws were made at",
        ),
        "field of another kind": (lambda: made(targets={"loss": "mse"}), r"targets\.loss is for another kind"),
    }

    def make(self, case: Any) -> Logits:
        return made(**dict(case))

    def tapped(self, views: int, seed: int = 0) -> Tapped:
        return teacher(views, seed)


# ---------------------------------------------------------------- loss


def dense_loss(z: Tensor, target: LogitTarget, temperature: float) -> Tensor:
    """The published loss: the target written out, [B]."""
    return -(target.dense(z.shape[-1]) * (z / temperature).log_softmax(-1)).sum(-1) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", ["draws", "topk", "dense"])
def test_the_sparse_loss_is_the_dense_one_and_passes_gradcheck(name: Any, temperature: float) -> None:
    kind, keys = made(name=name, classes=21, temperature=temperature), torch.tensor([5, 6])
    target = kind.decode(kind.encode(teacher(2, classes=21), keys), keys, SHAPES)
    z = torch.randn(2, 21, dtype=torch.float64, requires_grad=True)
    found = kind.losses((z,), target)["logits"]
    torch.testing.assert_close(found.parts[:, 0], dense_loss(z, target, temperature), check_dtype=False)
    assert torch.autograd.gradcheck(lambda x: kind.losses((x,), target)["logits"].parts, (z,))


def test_kept_mass_that_fp16_rounds_above_one_leaves_no_negative_share() -> None:
    kind, keys = made(name="topk", values="float16", head_k=9, classes=11), torch.tensor([1])
    logits = torch.zeros(1, 11)
    logits[:, 9:] = -40.0
    for shift in torch.linspace(0, 2, 50):
        logits[:, 0] = shift
        target = kind.decode(kind.encode({TAP: (logits,)}, keys), keys, SHAPES)
        assert (target.share >= 0).all() and target.entropy.isfinite().all()


@pytest.mark.parametrize("name", ["topk", "dense"])
def test_a_temperature_of_stage_two_is_that_of_the_decoded_softmax(name: Any) -> None:
    kind, other = made(name=name, classes=21), made(name=name, classes=21, targets={"temperature": 2.5})
    keys, tapped = torch.tensor([5, 6]), teacher(2, classes=21)
    arrays = kind.encode(tapped, keys)
    assert all(torch.equal(arrays[each], array) for each, array in other.encode(tapped, keys).items())
    softmax = kind.decode(arrays, keys, SHAPES).dense(21)
    hot = other.decode(arrays, keys, SHAPES)
    torch.testing.assert_close(hot.dense(21), (softmax.log() / 2.5).softmax(-1))
    torch.testing.assert_close(hot.entropy, torch.special.entr(hot.dense(21)).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.exact(tapped).weight, (tapped[TAP][0] / 2.5).softmax(-1))


# ---------------------------------------------------------------- labels


def test_the_label_term_is_the_cross_entropy_of_mixed_labels_and_passes_gradcheck() -> None:
    kind = made(name="dense", classes=7, targets={"label_weight": 0.5}, temperature=3)
    z = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    labels = Labels(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 0]), torch.tensor([1.0, 0.25, 0.5]))
    one_hot = torch.nn.functional.one_hot
    mixed = labels.share[:, None] * one_hot(labels.first, 7) + (1 - labels.share)[:, None] * one_hot(labels.second, 7)
    wanted = torch.nn.functional.cross_entropy(z, mixed.double(), reduction="none")
    found = kind.label_losses((z,), labels)["labels"]
    torch.testing.assert_close(found.parts[:, 0], 0.5 * wanted)
    entropy = torch.special.entr(mixed.double()).sum(-1)
    torch.testing.assert_close(found.floor, 0.5 * entropy, check_dtype=False, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda x: kind.label_losses((x,), labels)["labels"].parts, (z,))
    hard = kind.label_losses((z,), Labels.hard(labels.first))["labels"]
    torch.testing.assert_close(
        hard.parts[:, 0], 0.5 * torch.nn.functional.cross_entropy(z, labels.first, reduction="none")
    )
    assert (
        made(name="dense", classes=7).label_losses((z,), labels) == {}
        and made(name="dense", classes=7).label_classes == 0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_label_term_of_extreme_logits_is_finite(dtype: torch.dtype) -> None:
    kind = made(name="dense", classes=5, targets={"label_weight": 1.0})
    z = torch.tensor([[6e4, -6e4, 0, 0, 0], [-6e4] * 5, [0.0] * 5], dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        loss = kind.label_losses((z,), Labels.hard(torch.tensor([1, 0, 4])))["labels"]
    [gradient] = torch.autograd.grad(loss.mean(), z)
    assert loss.parts.dtype == torch.float32 and loss.parts.isfinite().all() and gradient.isfinite().all()


def test_hits_are_the_teachers_first_classes_that_are_labels() -> None:
    logits = torch.tensor([[0.0, 2, 1], [3, 0, 0], [0, 0, 1]])
    found = made(name="dense", classes=3).hits({TAP: (logits,)}, torch.tensor([1, 2, -1]))
    assert found.tolist()[:2] == [1, 0] and found[2].isnan()
    mapped_to = made(name="dense", classes=2, class_map={"sha256": "0" * 64}, rows=[2, 1]).hits(
        {TAP: (logits,)}, torch.tensor([1, 1, 0])
    )
    assert mapped_to.tolist() == [1, 0, 1]


# ---------------------------------------------------------------- class maps


@pytest.mark.parametrize("absent", ["zero", "mean"])
def test_a_map_takes_the_teachers_logits_and_a_class_that_it_lacks_gets_zero_or_their_mean(absent: str) -> None:
    tapped = teacher(2)
    kept = tapped[TAP][0].double()[:, [row for row in MAP if row >= 0]]
    filled = torch.zeros(2) if absent == "zero" else kept.mean(-1)
    wanted = torch.cat([kept[:, :20], filled[:, None].double(), kept[:, 20:]], dim=1).softmax(-1)
    torch.testing.assert_close(made(**mapped(absent)).exact(tapped).weight, wanted.float())


def test_the_mean_logit_is_that_of_the_mean_of_the_classifiers_rows() -> None:
    """As TinyViT converts a classifier: the row of a class without a counterpart is the mean of the mapped rows."""
    features, weight, bias = torch.randn(2, 6), torch.randn(CLASSES, 6), torch.randn(CLASSES)
    rows = [row for row in MAP if row >= 0]
    converted = torch.cat([weight[rows], weight[rows].mean(0, keepdim=True)])
    converted_bias = torch.cat([bias[rows], bias[rows].mean(0, keepdim=True)])
    wanted = torch.nn.functional.linear(features, converted, converted_bias).softmax(-1)[:, -1]
    found = made(**mapped("mean")).exact({TAP: (torch.nn.functional.linear(features, weight, bias),)})
    torch.testing.assert_close(found.weight[:, MAP.index(-1)], wanted)


def test_a_map_may_have_more_classes_than_the_teacher() -> None:
    rows = [0, 1, 2, -1, -1, 2]
    kind = made(classes=6, class_map={"sha256": "0" * 64}, rows=rows, name="dense")
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(kind.exact({TAP: (logits,)}).weight, torch.tensor([[1.0, 2, 3, 0, 0, 3]]).softmax(-1))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_map_comes_from_a_file_and_is_known_by_the_digest_of_its_numbers(end: str, tmp_path: Path) -> None:
    file = map_file(tmp_path, MAP, end)
    assert from_file(file)["class_map"].tolist() == MAP
    config = codec_config(kind="logits", classes=len(MAP), class_map={"file": file})
    sha256 = class_map_sha256(tuple(MAP))
    held = codec_parameters(config)
    assert held["class_map"] == {"file": None, "absent": "zero", "sha256": sha256}
    section = {"name": "draws", "version": 1, "taps": ["logits@0"], "parameters": held}
    stored = stored_kind(section, constants=from_file(file))
    arrays = stored.encode(teacher(1), torch.tensor([1]))
    assert stored.decode(arrays, torch.tensor([1]), SHAPES).index.max() < len(MAP)
    assert "class_map" not in codec_parameters(codec_config(kind="logits", classes=9))  # as in older caches


@pytest.mark.parametrize(
    ("numbers", "fields", "message"),
    [
        ([*MAP[:-1], 300], {}, "names a class that the teacher lacks\n  got: class 300\n  expected: 0 to 299"),
        (MAP[:-1], {}, "another number of classes\n  got: codec.classes 30\n  expected: 29"),
        ([1, -2], {}, "line 2 of the class map .* is no class\n  got: '-2'"),
        ([1, "n01440764"], {}, "line 2 of the class map .* is no class"),
        ([-1] * 30, {}, "maps no class"),
        ([], {}, "maps no class\n  got: 0 lines"),
        (MAP, {"sha256": "0" * 64}, "not the one that the recipe states"),
    ],
)
def test_a_file_that_is_no_map_is_refused(
    numbers: list[object], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        from_file(tmp_path / "map.txt", class_map={"file": map_file(tmp_path, numbers), **fields})


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the class map cannot be read"):
        from_file(tmp_path / "absent.txt")
    with pytest.raises(ValidationError, match="a class map needs its file"):
        made(class_map={})


def test_a_perfect_student_has_no_loss() -> None:
    kind, tapped = made(temperature=2.0), teacher(3)
    torch.testing.assert_close(kind.losses(tapped[TAP], kind.exact(tapped))["logits"].per_part(), torch.zeros(3, 1))


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("classes", [12, 256, 257, 1000, 21841, 65536])
@pytest.mark.parametrize("name", ["draws", "topk"])
def test_class_numbers_come_back(name: Any, classes: int) -> None:
    kind, keys, tapped = made(name=name, classes=classes), torch.arange(4), teacher(4, classes=classes)
    target = kind.decode(kind.encode(tapped, keys), keys, SHAPES)
    assert target.index is not None
    largest = tapped[TAP][0].topk(kind.config.head_k).indices.sort(-1).values
    assert torch.equal(target.index[:, : kind.config.head_k], largest)
    assert int(target.index.max()) < classes
    torch.testing.assert_close(target.dense(classes).sum(-1), torch.ones(4), rtol=0, atol=1e-5)


def test_a_record_of_ten_classes_leaves_room_for_the_digest_in_32_bytes() -> None:
    sizes = {
        name: sum(spec.size_bytes for spec in made(name=name, classes=1000).specs(SHAPES)) for name in ("draws", "topk")
    }
    assert sizes == {"draws": 21, "topk": 23}
    assert max(sizes.values()) + 4 < 32  # TinyViT's: 44 and the keys
    large = made(name="topk", classes=21841, head_k=100)
    assert sum(spec.size_bytes for spec in large.specs(SHAPES)) == 288  # TinyViT's: 404


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_k": 300}, "head_k must leave a class"),
        ({"name": "topk", "head_k": 300}, "head_k must leave a class"),
        ({"tail_k": 0}, "tail_k: draws needs"),
        ({"name": "topk", "tail_k": 2}, "tail_k: draws needs"),
        ({"name": "topk", "head_k": 0}, "head_k: topk needs"),
        ({"classes": 70000}, "classes"),
    ],
)
def test_what_a_record_cannot_hold_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        made(**fields)


def test_a_layer_names_its_kind_and_dense_ones_serve_audits() -> None:
    def section(kind: Logits) -> dict[str, Any]:
        parameters = kind.config.model_dump(mode="json")
        return {"name": kind.name, "version": 1, "taps": ["logits@0"], "parameters": parameters}

    kind = made()
    assert stored_kind(section(kind)) == kind
    dense = made(name="dense")
    assert audit_kind(section(dense), kind, SHAPES, None) == dense


# ---------------------------------------------------------------- fidelity


@pytest.mark.parametrize(("fields", "biased"), [({}, 0.0), ({"name": "topk"}, 1.0), ({"name": "dense"}, 0.0)])
def test_fidelity_finds_the_bias_that_a_codec_has(fields: dict[str, Any], biased: float) -> None:
    kind, views = made(**fields), 64
    torch.manual_seed(0)
    head = kind.head(STUDENT, SHAPES)
    moments = GradientMoments(views)
    common = teacher(1, seed=99)[TAP][0]
    for view in range(views):
        tapped = {TAP: (teacher(1, seed=view)[TAP][0] + common,)}  # a bias shows in what views share
        answers = tuple(answer.detach().requires_grad_() for answer in head(torch.randn(1, 17, 12)))

        def gradient(target: LogitTarget, answers: tuple[Tensor, ...] = answers) -> Tensor:
            parts = kind.losses(answers, target)["logits"].parts
            return torch.autograd.grad(parts.mean(), answers)[0]

        keys = torch.tensor([2 * view, 2 * view + 1])
        drawn = [gradient(kind.decode(kind.encode(tapped, key), key, SHAPES)) for key in (keys[:1], keys[1:])]
        moments.add({"logits": gradient(kind.exact(tapped))}, [{"logits": each} for each in drawn])
    assert moments.summary()["logits"]["biased"] == [biased]
