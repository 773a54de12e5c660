"""Codecs: what they say they store is what they store, and it comes back, at the edges too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.errors import CacheMismatch, RecipeError
from tinymim.targets.kinds import divided_targets
from tinymim.targets.relations.draws import sample_rows
from tinymim.targets.relations.qkv import QKV, relation_probs
from tinymim.targets.relations.rows import DenseRows, Rows, SparseRows
from tinymim.tests.targets.relations.plain import Plain, make_codec, stored_codec

MakeQKV = Callable[..., QKV]
CODECS: list[dict[str, Any]] = [
    {"rows": 6, "head_k": 2, "tail_k": 4},
    {"rows": 6, "head_k": 0, "tail_k": 3},
    {"rows": 999, "head_k": 3, "tail_k": 1, "relations": ("kk", "qq", "vv", "qk")},
    {"rows": 6, "relation_heads": 1},
    {"rows": 6, "head_k": 4, "tail": "renormalise"},
    {"rows": 6, "head_k": 4, "tail": "uniform"},
    {"rows": 6, "head_k": 4, "tail": "ghost", "relation_heads": 5},
    {"name": "dense"},
]


def codec(**fields: Any) -> Plain:
    return make_codec(codec_config(**fields))


def made_name(fields: dict[str, Any]) -> str:
    return codec(**fields).name


def roundtrip(fields: dict[str, Any], qkv: QKV, keys: Tensor) -> Rows:
    made = codec(**fields)
    return made.decode(made.encode(qkv, keys), keys, qkv.q.shape[2])


def one_view(*rows: list[float]) -> QKV:
    """q, k, v whose qk rows are softmax(rows): one head, keys the identity."""
    logits = torch.tensor(rows, dtype=torch.float64)
    assert logits.shape[0] == logits.shape[1]
    eye = torch.eye(len(rows), dtype=torch.float64)
    q = logits * len(rows) ** 0.5
    return QKV(q[None, None], eye[None, None], eye[None, None])


# ---------------------------------------------------------------- interface


@pytest.mark.parametrize("fields", CODECS)
@pytest.mark.parametrize("tokens", [17, 256, 257])
def test_arrays_are_as_specified(fields: dict[str, Any], tokens: int, make_qkv: MakeQKV) -> None:
    made, keys = codec(**fields), torch.tensor([3, -4])
    arrays = made.encode(make_qkv(2, 2, tokens, 5), keys)
    specs = made.arrays(2, tokens, head_dim=5)
    assert list(arrays) == [spec.name for spec in specs]
    for spec in specs:
        assert arrays[spec.name].shape == (2, *spec.shape)
        assert str(arrays[spec.name].dtype) == f"torch.{spec.dtype}"
        assert str(arrays[spec.name].numpy().dtype) == spec.dtype
        if spec.name.endswith("gap"):
            assert spec.dtype == ("uint8" if tokens <= 256 else "uint16")
            assert arrays[spec.name].int().cumsum(-1).max() < tokens


def test_names_and_bytes_of_the_default_record() -> None:
    specs = make_codec(codec_config()).arrays(16, 197)
    assert [spec.name for spec in specs] == [
        f"{relation}_{field}" for relation in ("qk", "vv") for field in ("tail_gap", "entropy")
    ]
    sizes = {"uint8": 1, "float32": 4}
    assert sum(torch.Size(s.shape).numel() * sizes[s.dtype] for s in specs) == 2 * (16 * 64 * 8 + 4)


@pytest.mark.parametrize("fields", CODECS)
def test_decoded_rows_are_the_teachers(fields: dict[str, Any], make_qkv: MakeQKV) -> None:
    qkv, keys = make_qkv(3, 2, 17, 5), torch.tensor([1, 2, 3])
    target = roundtrip(fields, qkv, keys)
    assert tuple(target) == fields.get("relations", ("qk", "vv"))
    for relation, got in target.items():
        heads = codec(**fields).relation_heads(2)
        probs = relation_probs(qkv.resplit(heads), relation, got.rows)
        assert got.shape == probs.shape
        dense = got.dense()
        if not isinstance(got, SparseRows) or got.tail != "ghost":
            torch.testing.assert_close(dense.sum(-1), torch.ones(got.shape[:3]), rtol=0, atol=2e-3)
        if isinstance(got, DenseRows):
            torch.testing.assert_close(dense, probs.float(), rtol=1e-3, atol=1e-7)
        elif got.rows is not None:
            assert torch.equal(got.rows, sample_rows(keys, relation, heads, 17, 6))
        if made_name(fields) == "topk":
            assert isinstance(got, SparseRows)
            kept = probs.topk(4).values.sort(-1).values.float()
            if got.tail == "none":
                kept /= kept.sum(-1, keepdim=True)
            torch.testing.assert_close(got.weight.sort(-1).values, kept, rtol=2e-3, atol=1e-6)
        else:
            entropy = torch.special.entr(probs).sum(-1).mean((1, 2)).float()
            torch.testing.assert_close(got.entropy, entropy)


def test_the_head_is_exact_to_the_grid_and_the_tail_is_outside(make_qkv: MakeQKV) -> None:
    qkv, keys = make_qkv(3, 2, 17, 5), torch.tensor([1, 2, 3])
    got = roundtrip({"rows": 6, "head_k": 3, "tail_k": 5, "relations": ("qk",)}, qkv, keys)["qk"]
    assert isinstance(got, SparseRows)
    probs = relation_probs(qkv, "qk", got.rows)
    assert torch.equal(got.index[..., :3], probs.topk(3).indices.sort(-1).values)
    ratio = got.weight[..., :3] / probs.gather(-1, got.index[..., :3])
    assert ratio.min() > 2 ** (-16 / 254) - 1e-6 and ratio.max() < 2 ** (16 / 254) + 1e-6
    assert not (got.index[..., :3, None] == got.index[..., None, 3:]).any()
    assert (got.weight[..., 3:] == got.weight[..., 3:4]).all()


@pytest.mark.parametrize("fields", CODECS)
def test_a_record_is_a_function_of_its_view_and_key_alone(fields: dict[str, Any], make_qkv: MakeQKV) -> None:
    made, qkv, keys = codec(**fields), make_qkv(4, 2, 17, 5), torch.tensor([9, 8, 7, 6])
    batch = made.encode(qkv, keys)
    for i in range(4):
        alone = made.encode(QKV(qkv.q[i : i + 1], qkv.k[i : i + 1], qkv.v[i : i + 1]), keys[i : i + 1])
        assert all(torch.equal(alone[name][0], batch[name][i]) for name in batch)
    again = made.encode(qkv, keys)
    assert all(torch.equal(again[name], batch[name]) for name in batch)
    if made.name == "sketch":
        other = made.encode(qkv, keys + 1)
        assert not torch.equal(other["qk_tail_gap"], batch["qk_tail_gap"])


def test_half_precision_teachers_are_sketched_in_fp32(make_qkv: MakeQKV) -> None:
    keys = torch.tensor([1])
    half = make_qkv(1, 2, 17, 5, dtype=torch.float16)
    full = QKV(half.q.float(), half.k.float(), half.v.float())
    made = codec(rows=6)
    a, b = made.encode(half, keys), made.encode(full, keys)
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- edges


def test_one_hot_rows_come_back_exactly() -> None:
    qkv = one_view(*(1e4 * torch.eye(5)).tolist())
    for head_k in (1, 2, 4):
        got = roundtrip({"head_k": head_k, "tail_k": 3, "relations": ("qk",)}, qkv, torch.tensor([5]))["qk"]
        assert torch.equal(got.dense(), torch.eye(5)[None, None])
        assert got.entropy.item() == 0


def test_a_row_of_two_halves_leaves_nothing_to_the_tail_on_average() -> None:
    logits = torch.full((4, 4), -1e4)
    logits[:, :2] = 0
    qkv = one_view(*logits.tolist())
    n = 4000
    many = QKV(*(x.expand(n, -1, -1, -1) for x in (qkv.q, qkv.k, qkv.v)))
    got = roundtrip({"head_k": 2, "tail_k": 2, "relations": ("qk",)}, many, torch.arange(n))["qk"].dense()
    torch.testing.assert_close(got.sum(-1), torch.ones(n, 1, 4))
    se = got.std(0) / n**0.5
    assert ((got.mean(0) - torch.tensor([0.5, 0.5, 0, 0])).abs() <= 5 * se).all()


@pytest.mark.parametrize("head_k", [0, 1, 5])
def test_equal_entries(head_k: int) -> None:
    got = roundtrip(
        {"head_k": head_k, "tail_k": 2, "relations": ("qk",)}, one_view(*[[0.0] * 6] * 6), torch.tensor([1])
    )
    assert isinstance(got["qk"], SparseRows)
    index = got["qk"].index.sort(-1).values
    assert (index[..., : head_k + 1].diff(dim=-1) >= 0).all()
    heads = got["qk"].index[0, 0, :, :head_k].tolist()
    assert all(len(set(head)) == head_k for head in heads)
    torch.testing.assert_close(got["qk"].dense().sum(-1), torch.ones(1, 1, 6))
    assert got["qk"].entropy.item() == pytest.approx(torch.tensor(6.0).log().item())


def test_the_largest_head_leaves_one_token() -> None:
    qkv = one_view(*torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).tolist())
    fields = {"head_k": 4, "tail_k": 2, "relations": ("qk",)}
    dense = roundtrip(fields, qkv, torch.tensor([1]))["qk"].dense()
    # Four values to 4.5 % each; the fifth takes the difference.
    torch.testing.assert_close(dense, relation_probs(qkv, "qk").float(), rtol=0, atol=0.05)


@pytest.mark.parametrize(("tail", "most"), [("sampled", 4), ("renormalise", 5)])
def test_a_head_as_long_as_the_row_is_refused(tail: str, most: int) -> None:
    codec(head_k=most, tail=tail).arrays(1, 5)
    with pytest.raises(RecipeError, match=r"codec\.head_k is too large") as caught:
        codec(head_k=most + 1, tail=tail).arrays(1, 5)
    assert caught.value.got == most + 1 and caught.value.expected == f"at most {most}"


def test_make_codec_picks_by_name_and_tail() -> None:
    made = [codec(**fields) for fields in CODECS]
    assert [(c.name, c.version) for c in made] == 4 * [("sketch", 2)] + 3 * [("topk", 2)] + [("dense", 1)]


# ---------------------------------------------------------------- reading


def section(made: Plain, **fields: Any) -> dict[str, Any]:
    """The codec section of a manifest."""
    return {"name": made.name, "version": made.version, "parameters": codec_config(**fields).model_dump(mode="json")}


@pytest.mark.parametrize("fields", CODECS)
def test_a_manifest_names_its_codec(fields: dict[str, Any]) -> None:
    made = codec(**fields)
    assert stored_codec(section(made, **fields)) == made
    with pytest.raises(CacheMismatch, match="another codec"):
        stored_codec(section(made, **fields) | {"version": made.version + 1})


def test_a_student_may_leave_relations_out(make_qkv: MakeQKV) -> None:
    qkv, keys = make_qkv(2, 2, 17, 5), torch.tensor([1, 2])
    for fields in CODECS[0], CODECS[-1]:
        made = codec(**fields)
        arrays = made.encode(qkv, keys)
        both = made.decode(arrays, keys, 17)
        one = make_codec(codec_config(**fields), TargetsConfig(relations=("vv",)))
        assert [spec.name[:2] for spec in one.arrays(2, 17)] == ["vv"] * (len(arrays) // 2)
        got = one.decode({spec.name: arrays[spec.name] for spec in one.arrays(2, 17)}, keys, 17)
        assert list(got) == ["vv"] and torch.equal(got["vv"].dense(), both["vv"].dense())


def test_dense_rows_can_be_sampled_at_read(make_qkv: MakeQKV) -> None:
    qkv, keys = make_qkv(2, 2, 17, 5), torch.tensor([1, 2])
    made = make_codec(codec_config(name="dense"), TargetsConfig(rows=5))
    got = made.decode(made.encode(qkv, keys), keys, 17)["qk"]
    assert got.rows is not None and torch.equal(got.rows, sample_rows(keys, "qk", 2, 17, 5))
    probs = relation_probs(qkv, "qk", got.rows)
    torch.testing.assert_close(got.dense(), probs.float(), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(got.entropy, torch.special.entr(probs).sum(-1).mean((1, 2)).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("fields", "targets", "message"),
    [
        ({}, {"relations": ("qk", "qq")}, "does not hold the relation qq"),
        ({}, {"rows": 3}, r"targets\.rows is not what"),
        ({"relation_heads": 4}, {"relation_heads": 2}, r"targets\.relation_heads is not what"),
        ({"name": "dense"}, {"relation_heads": 2}, r"targets\.relation_heads is not what"),
    ],
)
def test_what_a_cache_does_not_hold_is_refused(fields: dict[str, Any], targets: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_codec(codec_config(**fields), TargetsConfig(**targets))


def test_a_shared_loss_goes_to_the_kinds_that_have_it() -> None:
    configs = [codec_config(**fields) for fields in ({}, {"kind": "features"}, {"name": "hidden"}, {"kind": "ff"})]
    losses = {
        loss: [each.loss for each in divided_targets(configs, TargetsConfig(loss=loss))]
        for loss in ("cosine", "smooth_l1", "kl", None)
    }
    assert losses == {
        "cosine": [None, "cosine", "cosine", None],
        "smooth_l1": [None, "smooth_l1", None, None],
        "kl": ["kl", None, "kl", None],
        None: [None] * 4,
    }
    assert divided_targets(configs[:1], TargetsConfig(loss="mse"))[0].loss == "mse"  # which `make_kind` refuses
