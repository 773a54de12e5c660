"""The hidden codec: relations come back from few bits, any of them, and a record says nothing of its batch."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.codecs.relations import HiddenCodec
from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.errors import CacheMismatch, RecipeError
from tinymim.configs.taps import Tap
from tinymim.models.taps import CutTeacher
from tinymim.targets.packing import Packing
from tinymim.targets.relations.draws import sample_rows
from tinymim.targets.relations.hidden import (
    Hidden,
    _logit_metric,
    _uniform_quantiser,
    allocate,
    calibrate,
    check_projection,
    quantised,
)
from tinymim.targets.relations.qkv import QKV, relation_probs
from tinymim.targets.relations.rows import Rows
from tinymim.tests.targets.relations.plain import make_codec, shapes, stored_codec, tapped

TOKENS, WIDTH, HEADS = 17, 24, 3
KEYS = torch.tensor([11, -12, 13, 14])
SHAPES = shapes(HEADS, TOKENS)
ALL: Any = ("qk", "vv", "qq", "kk")
CODECS: list[dict[str, Any]] = [
    {"bits": 8},
    {"bits": 4},
    {"basis": "pca", "bits": 0.5},
    {"basis": "pca", "bits": 1},
    {"basis": "pca", "bits": 2.3},
    {"basis": "pca", "bits": 8},
]


def config_of(fields: dict[str, Any]) -> HiddenCodec:
    return HiddenCodec(name="hidden", **fields)


def projection() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(3 * WIDTH, WIDTH, generator=generator) / WIDTH**0.5,
        0.3 * torch.randn(3 * WIDTH, generator=generator),
    )


def inputs(views: int, seed: int) -> Tensor:
    """Correlated channels of very unlike sizes, off zero."""
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) * 0.75 ** torch.arange(WIDTH)
    shift = torch.randn(WIDTH, generator=generator)
    generator.manual_seed(seed)
    return 0.3 * torch.randn(views, TOKENS, WIDTH, generator=generator) @ mix.T + shift


def block(x: Tensor) -> QKV:
    weight, bias = projection()
    return replace(QKV.split(torch.nn.functional.linear(x, weight, bias), HEADS), x=x)


CALIBRATION = inputs(200, seed=1)
VIEWS = CALIBRATION[-4:]  # no value outside the calibrated ranges


def made(fields: dict[str, Any], **targets: Any) -> Hidden:
    constants = calibrate(config_of(fields), CALIBRATION, *projection(), HEADS)
    return Hidden(config_of(fields), TargetsConfig(**targets), 1, constants)


def roundtrip(fields: dict[str, Any], **targets: Any) -> Rows:
    codec = made(fields, **targets)
    return codec.decode(codec.encode(tapped(block(VIEWS)), KEYS), KEYS, SHAPES)


def divergence(target: Rows, heads: int = HEADS) -> float:
    """Mean KL(exact rows || decoded rows), in nats."""
    parts = []
    for relation, rows in target.items():
        exact = relation_probs(block(VIEWS).resplit(heads), relation, rows.rows)
        parts.append((exact * (exact / rows.dense()).log()).sum(-1).mean())
    return float(torch.stack(parts).mean())


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 13, 40])
def test_unpacking_is_the_inverse_of_packing(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    for most in (1, 3, 8):
        bits = torch.randint(1, most + 1, (width,), generator=generator).to(torch.uint8)
        codes = (torch.randint(0, 256, (2, 5, width), generator=generator) & ((1 << bits.int()) - 1)).to(torch.uint8)
        packing = Packing(bits)
        packed = packing.pack(codes)
        assert packed.dtype == torch.uint8 and packed.shape == (2, 5, -(-int(bits.sum()) // 8))
        assert torch.equal(packing.unpack(packed), codes)
        number, place = 0, 0  # the same by the words of the format: little endian, end to end
        for code, count in zip(codes[1, 3].tolist(), bits.tolist(), strict=True):
            number, place = number + (code << place), place + count
        assert bytes(packed[1, 3].tolist()) == number.to_bytes(packing.num_bytes, "little")


def test_whole_bytes_are_stored_as_they_are() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 4, 64)
    packing = Packing(torch.full((64,), 8, dtype=torch.uint8))
    assert packing.pack(codes) is codes and packing.unpack(codes) is codes


def test_no_other_allocation_of_the_bits_has_a_smaller_error() -> None:
    variance = torch.tensor([9.0, 1.0, 4.0, 0.05], dtype=torch.float64)
    error = torch.tensor([1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041])
    for total in range(1, 7):
        bits = allocate(variance, total)
        assert int(bits.sum()) == total
        others = (other for other in itertools.product(range(total + 1), repeat=4) if sum(other) == total)
        best = min(float((variance * error[list(other)]).sum()) for other in others)
        assert float((variance * error[bits]).sum()) == pytest.approx(best)
    assert allocate(variance, 1000).tolist() == [8, 8, 8, 8]


def test_the_metric_is_the_squared_logit_error() -> None:
    """One view of many tokens; what an error adds to a whole row of logits is gone after the softmax."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, error = torch.randn(4, 300, 4, generator=generator, dtype=torch.float64) + 0.5
    metric = _logit_metric(torch.cat([q, k, v], dim=-1), 1)
    centred = (error @ k.T).sub((error @ k.T).mean(1, keepdim=True)) / 2
    by_query, by_key = centred.square().mean(), (q @ error.T / 2).square().mean()
    second = error.T @ error / 300
    assert float((metric[0] * second).sum()) == pytest.approx(float(by_query), rel=0.01)
    assert float((metric[1] * second).sum()) == pytest.approx(float(by_key), rel=0.01)


def test_one_bit_is_decoded_to_the_conditional_means() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, 2, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 0.1]) + 5
    step, low = _uniform_quantiser(scores, torch.tensor([1, 1]))
    above = scores > scores.mean(0)
    for i in range(2):
        upper, lower = scores[above[:, i], i].mean(), scores[~above[:, i], i].mean()
        assert float(low[i]) == pytest.approx(float(lower), rel=0.03)
        assert float(low[i] + step[i]) == pytest.approx(float(upper), rel=0.03)


@pytest.mark.parametrize("fields", [{"bits": 8}, {"bits": 4}, {"basis": "pca", "bits": 8}])
def test_folding_the_dequantiser_into_the_projection_changes_nothing(fields: dict[str, Any]) -> None:
    constants = {name: array.double() for name, array in made(fields).constants.items()}
    codes = quantised(VIEWS, constants).double()
    encode = constants["encode_weight"]
    encode = torch.diag(encode) if encode.ndim == 1 else encode
    assert encode.shape == (WIDTH, WIDTH)  # nothing dropped, so codes can be undone exactly
    dequantised = torch.linalg.solve(encode, (codes - constants["encode_bias"])[..., None])[..., 0]
    weight, bias = projection()
    reference = dequantised @ weight.double().T + bias.double()
    folded = codes @ constants["qkv_weight"].T + constants["qkv_bias"]
    torch.testing.assert_close(folded, reference, rtol=0, atol=2e-5 * float(reference.abs().max()))


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("fields", CODECS)
def test_arrays_are_as_specified_and_of_the_stated_size(fields: dict[str, Any]) -> None:
    codec = made(fields)
    (spec,) = codec.specs(SHAPES)
    assert codec.specs(SHAPES) == Hidden(codec.config, codec.targets, 1).specs(SHAPES), "calibration changes nothing"
    assert (spec.name, spec.dtype) == ("code", "uint8")
    assert spec.shape == (TOKENS, -(-round(config_of(fields).bits * WIDTH) // 8))
    (array,) = codec.encode(tapped(block(VIEWS)), KEYS).values()
    assert array.shape == (4, *spec.shape) and array.dtype == torch.uint8


@pytest.mark.parametrize("fields", CODECS)
def test_a_record_is_a_function_of_its_view_alone(fields: dict[str, Any]) -> None:
    codec = made(fields)
    batch = codec.encode(tapped(block(VIEWS)), KEYS)["code"]
    for i in range(4):
        assert torch.equal(codec.encode(tapped(block(VIEWS[i : i + 1])), KEYS[:1] + 5)["code"][0], batch[i])
    with torch.autocast("cpu", torch.bfloat16):
        decoded = codec.decode({"code": batch}, KEYS, SHAPES)
    assert torch.equal(decoded["qk"].dense(), roundtrip(fields)["qk"].dense())


@pytest.mark.gpu
@pytest.mark.parametrize("fields", CODECS)
def test_a_gpu_gives_the_same_codes_and_relations(fields: dict[str, Any]) -> None:
    codec, here = made(fields, rows=5), roundtrip(fields, rows=5)
    there = Hidden(codec.config, codec.targets, 1, {name: array.cuda() for name, array in codec.constants.items()})
    exact = block(VIEWS)
    on_gpu = QKV(exact.q.cuda(), exact.k.cuda(), exact.v.cuda(), VIEWS.cuda())
    records = there.encode(tapped(on_gpu), KEYS.cuda())
    assert torch.equal(records["code"].cpu(), codec.encode(tapped(block(VIEWS)), KEYS)["code"])
    for relation, rows in there.decode(records, KEYS.cuda(), SHAPES).items():
        torch.testing.assert_close(rows.dense().cpu(), here[relation].dense(), rtol=1e-4, atol=1e-6)


def test_calibration_gives_the_same_constants_again() -> None:
    for fields in CODECS[1], CODECS[3]:
        first, again = made(fields).constants, made(fields).constants
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_eight_bits_are_close_and_the_error_falls_with_every_further_bit() -> None:
    assert divergence(roundtrip({"bits": 8})) < 2e-4
    assert divergence(roundtrip({"bits": 4})) < 0.05
    errors = [divergence(roundtrip({"basis": "pca", "bits": bits})) for bits in (0.25, 0.5, 1, 2, 3, 4, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.3 and errors[5] < divergence(roundtrip({"bits": 4})) / 3 and errors[6] < 1e-4


def test_a_tokens_product_with_itself_keeps_its_size() -> None:
    codec = made({"basis": "pca", "bits": 0.5})
    records = codec.encode(tapped(block(VIEWS)), KEYS)
    without = Hidden(codec.config, codec.targets, 1, {**codec.constants, "lost": 0 * codec.constants["lost"]})
    own = [
        target["vv"].dense().diagonal(dim1=-2, dim2=-1).mean()
        for target in (codec.decode(records, KEYS, SHAPES), without.decode(records, KEYS, SHAPES))
    ]
    exact = relation_probs(block(VIEWS), "vv").diagonal(dim1=-2, dim2=-1).mean()
    assert own[1] < own[0] and abs(own[0] - exact) < 0.5 * abs(own[1] - exact)


@pytest.mark.parametrize("heads", [None, 1, 2, 8])
@pytest.mark.parametrize("rows", [None, 5, 99])
def test_any_relation_any_heads_any_rows(heads: int | None, rows: int | None) -> None:
    target = roundtrip({"bits": 8}, relations=ALL, relation_heads=heads, rows=rows)
    assert tuple(target) == ALL
    count = heads or HEADS
    for relation, got in target.items():
        wanted = sample_rows(KEYS, relation, count, TOKENS, 5) if rows == 5 else None
        assert (got.rows is None) if wanted is None else torch.equal(got.rows, wanted)  # type: ignore[arg-type]
        exact = relation_probs(block(VIEWS).resplit(count), relation, wanted)
        assert got.shape == exact.shape and got.dense().dtype == torch.float32
        torch.testing.assert_close(got.dense(), exact, rtol=0, atol=0.03)
        torch.testing.assert_close(got.entropy, torch.special.entr(got.dense()).sum(-1).mean((1, 2)))
    assert divergence(target, count) < 5e-4
    if rows == 5:  # the rows that the whole maps have, their own entry corrected alike
        whole = roundtrip({"bits": 8}, relations=ALL, relation_heads=heads)
        for relation, got in target.items():
            assert got.rows is not None
            index = got.rows[..., None].expand(-1, -1, -1, TOKENS)
            torch.testing.assert_close(got.dense(), whole[relation].dense().gather(2, index))


def test_a_projection_without_bias_and_a_constant_channel() -> None:
    weight, _ = projection()
    x = VIEWS.clone()
    x[..., 3] = 2.5
    for fields in CODECS:
        constants = calibrate(config_of(fields), x, weight, None, HEADS)
        codec = Hidden(config_of(fields), TargetsConfig(), 1, constants)
        qkv = replace(QKV.split(x @ weight.T, HEADS), x=x)
        target = codec.decode(codec.encode(tapped(qkv), KEYS), KEYS, SHAPES)
        assert all(rows.dense().isfinite().all() for rows in target.values())


# ---------------------------------------------------------------- refusals


def test_heads_that_do_not_divide_the_teachers_width_are_refused() -> None:
    with pytest.raises(RecipeError, match="width 24 cannot be split into 5"):
        made({"bits": 8}, relation_heads=5).relation_heads(HEADS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changed", [{}, {"qk_norm": True}])
def test_q_and_k_that_are_no_linear_layer_of_the_input_are_refused(changed: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes, **changed).to(dtype).eval()
    cut = CutTeacher(model, [Tap("qkv", 2)])
    with torch.no_grad():
        qkv = QKV(*cut(torch.randn(2, 3, 32, 32).to(dtype))[Tap("qkv", 2)])
    layer: Any = cut.attention(Tap("qkv", 2)).qkv
    if not changed:
        check_projection(qkv, layer.weight.detach(), layer.bias.detach())
        with pytest.raises(RecipeError, match="not a linear layer"):
            check_projection(qkv, layer.weight.detach(), layer.bias.detach() + 0.3)
        return
    with pytest.raises(RecipeError, match="not a linear layer") as caught:
        check_projection(qkv, layer.weight.detach(), layer.bias.detach())
    assert "sketch" in str(caught.value.hint) and str(caught.value.got).startswith("q differs")


def test_another_version_is_refused() -> None:
    parameters = codec_config(name="hidden", basis="pca", bits=1).model_dump(mode="json")
    section = {"name": "hidden", "version": 1, "taps": ["qkv@1"], "parameters": parameters}
    assert stored_codec(section) == make_codec(codec_config(**parameters))
    with pytest.raises(CacheMismatch, match="another codec"):
        stored_codec(section | {"version": 2})
