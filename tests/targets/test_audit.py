"""The audit's numbers are those of the dense maps."""

from typing import Any

import torch

from tinymim.configs.schema import CodecConfig, codec_config
from tinymim.targets.audit import Audit
from tinymim.targets.codecs import make_codec
from tinymim.targets.relations import QKV, relation_probs


def random_qkv(views: int) -> QKV:
    torch.manual_seed(0)
    return QKV(*(torch.randn(views, 2, 9, 4) for _ in range(3)))


def audited(config: CodecConfig, views: int = 6, most: int = 4) -> dict[str, Any]:
    qkv, codec, audit = random_qkv(views), make_codec(config), Audit(most)
    keys = torch.arange(views)
    encoded = codec.encode(qkv, keys)
    for start in range(0, views, 2):
        part = QKV(qkv.q[start : start + 2], qkv.k[start : start + 2], qkv.v[start : start + 2])
        records = {name: array[start : start + 2] for name, array in encoded.items()}
        if audit.wants_more:
            audit.add(part, codec.decode(records, keys[start : start + 2], 9))
    return audit.summary()


def test_dense_keeps_everything_and_states_the_entropy() -> None:
    summary = audited(codec_config(name="dense"))
    rows = relation_probs(random_qkv(6), "qk")[:4]
    entropy = torch.special.entr(rows).sum(-1).mean(dim=(0, 2))
    assert summary["views"] == 4
    assert summary["qk"]["entropy_nats"] == [round(v, 6) for v in entropy.tolist()]
    torch.testing.assert_close(torch.tensor(summary["vv"]["kept_mass"]), torch.ones(2), rtol=0, atol=1e-5)


def test_top_k_keeps_the_mass_of_the_largest_entries() -> None:
    summary = audited(codec_config(rows=9, head_k=2, tail="renormalise"))
    largest = relation_probs(random_qkv(6), "vv")[:4].topk(2).values.sum(-1).mean(dim=(0, 2))
    torch.testing.assert_close(torch.tensor(summary["vv"]["kept_mass"]), largest, rtol=0, atol=1e-5)
