"""docs/backbones.md: every cell of its table is tried here, on one small instance of every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tinymim.configs.codecs.kinds import CodecConfig, codec_config
from tinymim.configs.errors import RecipeError, UserError
from tinymim.configs.sections.decoders import LightDecoderConfig, PredictedConfig
from tinymim.configs.sections.masks import PretrainMaskConfig
from tinymim.configs.sections.models import TeacherConfig
from tinymim.configs.taps import Shapes, Tap
from tinymim.models import backbone
from tinymim.models.mim import MaskedModel
from tinymim.models.student import StudentModel, build_student, final_tokens, fit_of, fitted_shapes, shapes_of
from tinymim.models.taps import CutTeacher
from tinymim.models.teacher import Teacher
from tinymim.targets.kinds import make_kind
from tinymim.tests.models.families import FAMILIES, made

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"
CLASSES = 5
CODECS: dict[str, CodecConfig] = {
    "relations": codec_config(name="dense"),
    "features": codec_config(kind="features", name="int8"),
    "cls": codec_config(kind="cls", name="int8", at="pooled"),
    "logits": codec_config(kind="logits", name="dense", classes=CLASSES),
}
COLUMNS = [*(f"teacher {kind}" for kind in CODECS), *(f"student {kind}" for kind in CODECS)]
HIDES = ("paint", "token", "drop")


def pixels_for(family: str) -> torch.Tensor:
    size = FAMILIES[family].img_size
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def teach(family: str, codec: CodecConfig, tmp_path: Path) -> None:
    """Write a file of random weights, and encode and decode its targets at the last place."""
    model, own = made(family, num_classes=CLASSES), FAMILIES[family]
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    place = len(backbone.widths(model))
    fields = own.config().model_dump() | {"mean": (0.5,) * 3, "std": (0.5,) * 3, "block": place}
    config = TeacherConfig.model_validate(fields | {"weights": str(tmp_path / "w.safetensors")})
    kind = make_kind(codec, place)
    teacher = Teacher(config, kind.taps)
    tapped, shapes = teacher(pixels_for(family)), teacher.shapes()
    keys = torch.arange(2)
    arrays = kind.encode(tapped, keys)
    assert {spec.name: tuple(arrays[spec.name].shape[1:]) for spec in kind.specs(shapes)} == {
        spec.name: spec.shape for spec in kind.specs(shapes)
    }
    kind.decode(arrays, keys, shapes)


def learn(family: str, codec: CodecConfig, _tmp_path: Path) -> None:
    """Take the gradient of a student at the target of a ViT with as many prefix tokens, whose grid is twice as fine."""
    own = FAMILIES[family]
    student = build_student(own.config())
    shapes = shapes_of(student, own.img_size)
    side = 2 * shapes.grid[0]
    teacher = Shapes(1, 8, side * side + shapes.prefix_tokens, shapes.prefix_tokens, (side, side))
    kind = make_kind(codec, 1)
    fit = fit_of(shapes, teacher, kind.taps)
    model = StudentModel(student, kind.head(fitted_shapes(shapes, fit), teacher), fits=[fit])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, teacher.tokens, 8, generator=generator)
    given: dict[str, tuple[torch.Tensor, ...]] = {
        "qkv": (*(tokens[:, None],) * 3, tokens),
        "tokens": (tokens, tokens[:, : teacher.prefix_tokens]),
        "pooled": (tokens[:, 0],),
        "logits": (torch.randn(2, CLASSES, generator=generator),),
    }
    target = kind.exact({tap: given[tap.kind] for tap in kind.taps})
    [*losses] = kind.losses(model(pixels_for(family) / 255.0), target).values()
    torch.stack([loss.mean() for loss in losses]).sum().backward()
    first = next(parameter for parameter in student.parameters() if parameter.requires_grad)
    assert first.grad is not None and first.grad.isfinite().all() and first.grad.any()


def mask(family: str, hide: str) -> None:
    """Take the gradient of masked pre-training; squares are as wide as the last cells."""
    own, student = FAMILIES[family], build_student(FAMILIES[family].config())
    hidden = PretrainMaskConfig.model_validate({"hide": hide, "block": backbone.strides(student)[-1]})
    sizes, target = LightDecoderConfig(dim=8, heads=2, position=True), PredictedConfig(name="pixels")
    model = MaskedModel(student, own.img_size, hidden, target, sizes)
    model(pixels_for(family) / 255.0, torch.arange(model.rows**2).expand(2, -1))[0].backward()
    first = next(parameter for parameter in student.parameters() if parameter.requires_grad)
    assert first.grad is not None and first.grad.isfinite().all() and first.grad.any()


def tried(run: Callable[..., None], *given: Any) -> str | None:
    """None where it works; else the first line of the refusal."""
    try:
        run(*given)
    except UserError as error:
        return str(error).splitlines()[0]
    return None


def row_of(family: str, tmp_path: Path) -> list[str | None]:
    ways = [(teach, codec) for codec in CODECS.values()] + [(learn, codec) for codec in CODECS.values()]
    return [tried(run, family, codec, tmp_path) for run, codec in ways]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell_of_the_table_is_what_happens(family: str, tmp_path: Path) -> None:
    text, found = PAGE.read_text(), row_of(family, tmp_path)
    cells = ["yes" if refusal is None else "no" for refusal in found]
    cells.append(", ".join(hide for hide in HIDES if tried(mask, family, hide) is None) or "no")
    assert f"| {family} | `{FAMILIES[family].name}` | {' | '.join(cells)} |" in text
    for column, refusal in zip(COLUMNS, found, strict=True):
        if refusal is not None:
            general = refusal.replace(f"'{FAMILIES[family].name}'", "'NAME'").replace("qkv@2", "qkv@N")
            assert general.replace("qkv@4", "qkv@N").replace("qkv@5", "qkv@N") in text, f"{column}: {general}"


def test_the_table_has_a_row_for_every_family_and_no_other() -> None:
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if "| yes |" in line]
    assert rows == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_places_widths_and_grids_are_those_of_the_tokens(family: str) -> None:
    model, size, images = made(family, num_classes=CLASSES), FAMILIES[family].img_size, pixels_for(family) / 255.0
    prefix = backbone.prefix_tokens(model) if backbone.is_plain(model) else 0
    for place, width in enumerate(backbone.widths(model), start=1):
        rows, columns = backbone.grid(model, size, place)
        assert backbone.tokens_at(model, images, place).shape == (2, prefix + rows * columns, width)
    shapes = shapes_of(model, size)
    assert final_tokens(model, images).shape == (2, shapes.tokens, shapes.width)
    features = model.forward_features(images)  # type: ignore[operator]
    assert backbone.classified(model, features, logits=False).shape == (2, backbone.pooled_width(model))
    assert torch.equal(backbone.classified(model, features, logits=True), model(images))


@pytest.mark.parametrize("family", [name for name in FAMILIES if not backbone.is_plain(made(name))])
@torch.no_grad()
def test_maps_and_final_features_of_one_pass_are_those_of_two(family: str) -> None:
    model, images = made(family), pixels_for(family) / 255.0
    last = len(backbone.widths(model))
    features, maps = backbone.features_and_maps(model, images, [last, 1], whole=True)
    assert torch.equal(features, model.forward_features(images))  # type: ignore[operator]
    for place in (1, last):
        alone = backbone.features_and_maps(model, images, [place], whole=False)[1][place]
        assert torch.equal(maps[place], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_have_the_same_gradient(family: str) -> None:
    images, gradients = pixels_for(family) / 255.0, []
    for again in (False, True):
        model = made(family, num_classes=CLASSES)
        if again:
            backbone.recompute(model)
        for layer in model.modules():  # a batch norm would see the batch twice
            layer.training = not isinstance(layer, nn.modules.batchnorm._BatchNorm)
        model(images).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, one in gradients[0].items():
        torch.testing.assert_close(one, gradients[1][name])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_drops_paths_or_says_that_it_cannot(family: str) -> None:
    def build() -> None:
        model = StudentModel(build_student(FAMILIES[family].config(), drop_path=0.5), nn.Identity()).train()
        assert model.drop_paths
        model.draw(torch.Generator().manual_seed(0), torch.arange(2), 2)
        model(pixels_for(family) / 255.0)
        assert {path.keep_prob for path in model.drop_paths} <= {0.5, *(path.keep_prob for path in model.drop_paths)}

    refusal = tried(build)
    assert (refusal is None) == (family not in {"repvit"}), refusal


def test_blocks_are_compiled_in_plain_vits_only() -> None:
    cut = CutTeacher(made("swin"), [Tap("tokens", 3)])
    with pytest.raises(RecipeError, match="compile needs a plain ViT"):
        cut.compile_blocks()
