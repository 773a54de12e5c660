"""What audits of students look at: some held-out images with the teacher's dense rows, and labelled sets for k-NN.

Shapes: N image, B some of them, H head, T token.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tinymim.configs.codecs import Relation, TargetsConfig
from tinymim.configs.errors import CacheMismatch, UserError
from tinymim.configs.sections import AuditConfig, VerifyConfig
from tinymim.models.taps import StudentWithTap
from tinymim.models.vit import Normalise
from tinymim.pipeline.dataset import ViewBatch
from tinymim.pipeline.replay import ReplayedViews, join
from tinymim.pipeline.shards import open_shards
from tinymim.stages.audits.alarm import Audited, Yardstick
from tinymim.stages.cache.opened import stored_constants
from tinymim.stages.run.progress import say
from tinymim.storage.catalog import resolve
from tinymim.storage.manifest import PROVENANCE_KEYS, Manifest
from tinymim.storage.reader import CacheReader
from tinymim.targets.kinds import stored_codec
from tinymim.targets.record import Codec
from tinymim.targets.relations.hidden import DEFAULT_RELATIONS
from tinymim.targets.relations.losses import dense_kl
from tinymim.targets.relations.qkv import QKV
from tinymim.targets.relations.rows import DenseRows

_CHUNK = 8  # views whose rows are computed at a time: of a ViT-L 20 MB a relation
_LEAST_PROBABILITY = 2.0**-24  # the smallest that fp16 holds


class AuditBatch:
    """The images that every audit looks at, and what the teacher says of them.

    The teacher's rows stay in memory in float32: 64 views of a ViT-L take 320 MB.

    Args:
        config: of the audit.
        training: manifest of the cache that is trained on.
        targets: what of it.
        relation_heads: into how many heads its relations are split.

    Raises:
        CacheMismatch: the audit's cache is of another teacher or view size, or its records are not whole maps.
        ViewMismatch, SourceError, CacheCorrupt: its images or records are not what they were.
        UserError: it covers too few images of its source.
    """

    def __init__(
        self,
        config: AuditConfig,
        training: Manifest,
        targets: TargetsConfig,
        relation_heads: int,
    ) -> None:
        reader = CacheReader(resolve(config.cache))
        _require_same_teacher(training, reader.manifest, reader.place)
        relations = targets.relations or training.codec["parameters"].get("relations", DEFAULT_RELATIONS)
        constants = stored_constants(reader.store, reader.manifest, torch.device("cpu"))
        codec = _whole_maps(reader.manifest, tuple(relations), relation_heads, constants)
        batch = _first_views(config, reader, codec)
        self.relation_heads = relation_heads
        self._images = Normalise()(batch.pixels)
        self._teacher = _decoded(codec, batch, int(reader.manifest.teacher["tokens"]))
        self._yardsticks = {name: _yardstick(rows) for name, rows in self._teacher.items()}
        shards = {shard.content_hash for shard in reader.manifest.source}
        if shared := [shard.name for shard in training.source if shard.content_hash in shards]:
            say(f"audit: warning: {shared[0]} is in the training's cache, too: what is learnt by heart looks well here")

    @torch.no_grad()
    def compare(self, student: StudentWithTap) -> dict[str, Audited]:
        """By relation, a student in eval mode, where it is: in fp32, whatever it is trained in."""
        device = student.tap.weight.device
        parts = [student(images.to(device)) for images in self._images.split(_CHUNK)]
        qkv = QKV(*(torch.cat(sides) for sides in zip(*parts, strict=True))).resplit(self.relation_heads)
        # Every answer is held against its own image, and against the one before: both means are of the same answers.
        others = QKV(*(side.roll(-1, 0) for side in (qkv.q, qkv.k, qkv.v)))
        found = {}
        for relation, rows in self._teacher.items():
            own, other = (
                torch.cat([_kl(answers, relation, rows, start) for start in range(0, len(rows), _CHUNK)])
                for answers in (qkv, others)
            )
            found[str(relation)] = Audited.of(own.cpu(), other.cpu(), self._yardsticks[relation])
        return found


def _kl(answers: QKV, relation: Relation, rows: Float[Tensor, "N H T T"], start: int) -> Float[Tensor, "B H"]:
    some = slice(start, start + _CHUNK)
    probs = rows[some].to(answers.q.device)
    teacher = DenseRows(None, probs, torch.special.entr(probs).sum(-1).mean((1, 2)))
    return dense_kl(QKV(answers.q[some], answers.k[some], answers.v[some]), relation, teacher)


def _decoded(codec: Codec, batch: ViewBatch, tokens: int) -> dict[Relation, Tensor]:
    """By relation, the teacher's rows, float32 [N, H, T, T]."""
    parts: dict[Relation, list[Tensor]] = {}
    for start in range(0, len(batch.keys), _CHUNK):
        some = slice(start, start + _CHUNK)
        records = {name: array[some] for name, array in batch.records.items()}
        for relation, rows in codec.decode(records, batch.view_keys[some], tokens).items():
            parts.setdefault(relation, []).append(rows.dense())
    return {relation: torch.cat(each) for relation, each in parts.items()}


def _yardstick(rows: Float[Tensor, "N H T T"]) -> Yardstick:
    """What an audit's numbers are measured by, from the teacher alone."""
    total, entropy, cross = rows.sum(0, dtype=torch.float64), 0.0, 0.0
    for each in rows:
        own = each.double()
        others = (total - own) / (len(rows) - 1)
        entropy += float(torch.special.entr(own).sum(-1).mean())
        cross -= float((own * others.clamp(min=_LEAST_PROBABILITY).log()).sum(-1).mean())
    return Yardstick(math.log(rows.shape[-1]) - entropy / len(rows), (cross - entropy) / len(rows))


def _require_same_teacher(training: Manifest, audit: Manifest, place: object) -> None:
    """Raises CacheMismatch where the two caches are not of one teacher, as far as it changes what a row means."""
    ignored = PROVENANCE_KEYS | {"precision"}
    wanted = {f"teacher.{name}": value for name, value in training.teacher.items() if name not in ignored}
    found = {f"teacher.{name}": value for name, value in audit.teacher.items() if name not in ignored}
    wanted["views.size"], found["views.size"] = training.views["size"], audit.views["size"]
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CacheMismatch(
                f"the audit's cache {place} is not of the training's teacher: {name} differs",
                got=found.get(name),
                expected=wanted.get(name),
                hint="make audit.cache by the recipe of `cache`, with codec: {name: dense} and held-out shards",
            )


def _whole_maps(
    manifest: Manifest, relations: tuple[Relation, ...], heads: int, constants: dict[str, Tensor] | None
) -> Codec:
    """The codec that gives dense rows of the training's relations and heads. Raises CacheMismatch where none does."""
    name = manifest.codec["name"]
    if name not in ("dense", "hidden"):
        raise CacheMismatch(
            "the audit's cache holds no whole relation maps",
            got=f"codec {name}",
            expected="dense, or hidden",
            hint="make audit.cache with codec: {name: dense}, of so many images as audit.num_images and one view",
        )
    targets = TargetsConfig(relations=relations, relation_heads=heads if name == "hidden" else None)
    codec = stored_codec(manifest.codec, targets, constants)
    held = codec.relation_heads(int(manifest.teacher["heads"]))
    if held != heads:
        raise CacheMismatch(
            "the audit's cache splits its relations into other heads than the training",
            got=held,
            expected=heads,
            hint="make audit.cache with the relation_heads of the training's codec",
        )
    return codec


def _first_views(config: AuditConfig, reader: CacheReader, codec: Codec) -> ViewBatch:
    """One view of each of the first images that the cache holds, every pixel digest checked."""
    source = join(open_shards(config.source), reader, 1, "skip")
    if sum(source.counts) < config.num_images:
        raise UserError(
            "the audit's cache holds too few images of audit.source",
            got=sum(source.counts),
            expected=f"audit.num_images: {config.num_images}",
            hint="cache more shards, or lower audit.num_images",
        )
    places = [(shard, image) for shard, count in enumerate(source.counts) for image in range(count)]
    items = [(*place, 0, number) for number, place in enumerate(places[: config.num_images])]
    teacher = reader.manifest.teacher
    arrays = [spec.name for spec in codec.arrays(int(teacher["heads"]), int(teacher["tokens"]))]
    views = ReplayedViews(reader, source, arrays, VerifyConfig(first=config.num_images), resident_units=1)
    return views.batch(np.array(items, dtype=np.int64))


# ---------------------------------------------------------------- k-NN
