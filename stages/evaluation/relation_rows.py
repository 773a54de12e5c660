"""What the demo's report shows side by side: relation rows of the teacher, of the cache and of the students."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinymim.configs.schema import CacheTeacherRecipe, TrainStudentRecipe
from tinymim.configs.sections import VerifyConfig
from tinymim.models.taps import StudentWithTap
from tinymim.models.teacher import Teacher
from tinymim.models.vit import Normalise, build_vit
from tinymim.pipeline.replay import ReplayedViews, join
from tinymim.pipeline.shards import open_shards
from tinymim.stages.pages.demo import SKETCH, Example
from tinymim.stages.training.optim import state_identity
from tinymim.stages.training.states import load_states
from tinymim.stages.training.student_step import trained_on
from tinymim.storage.reader import CacheReader
from tinymim.targets.kinds import stored_codec
from tinymim.targets.relations.qkv import QKV, relation_probs
from tinymim.targets.relations.rows import RowTarget

EXAMPLE_IMAGES = (0, 3, 5, 8)  # of the first shard: stripes, rings, bricks, waves
QUERIES_PER_IMAGE = 2


@torch.no_grad()
def relation_examples(
    cache: CacheTeacherRecipe, students: Mapping[str, TrainStudentRecipe], reader: CacheReader
) -> Iterator[Example]:
    """Relation rows of some cached views by teacher, sketch and students, for queries whose sketch is in the cache."""
    # ---- the views, exactly as the students got them
    manifest = reader.manifest
    heads, tokens, prefix = (int(manifest.teacher[key]) for key in ("heads", "tokens", "prefix_tokens"))
    grid = tuple(manifest.teacher["grid"])
    source = join(open_shards(cache.source), reader)
    codec = stored_codec(manifest.codec)
    arrays = [spec.name for spec in codec.arrays(heads, tokens)]
    images = sorted({image % source.counts[0] for image in EXAMPLE_IMAGES})
    views = ReplayedViews(reader, source, arrays, VerifyConfig(), resident_units=1)
    batch = views.batch(np.array([[0, image, 0, number] for number, image in enumerate(images)], dtype=np.int64))
    sketches = codec.decode(batch.records, batch.view_keys, tokens)

    # ---- what teacher and students make of them (the tap is in the training state, not in the export)
    content = trained_on(reader, source)
    said = {"teacher": QKV(*Teacher(cache.teacher)(batch.pixels))}
    for name, recipe in students.items():
        assert recipe.student is not None  # the demo's recipes have one each
        student = StudentWithTap(build_vit(recipe.student)).eval()
        load_states([recipe.run.folder], [state_identity(recipe, content)], [{"student": student}])
        said[name] = QKV(*student(Normalise()(batch.pixels))).resplit(codec.relation_heads(heads))
    exact = {r: {who: relation_probs(qkv, r) for who, qkv in said.items()} for r in sketches}

    # ---- the most selective queries of every view
    entropy = torch.stack([torch.special.entr(maps["teacher"]).sum(-1) for maps in exact.values()]).sum(0)
    for view, key in enumerate(batch.keys):
        for head, query in _queries(entropy[view], [sketch.rows for sketch in sketches.values()], view, prefix):
            maps: dict[str, dict[str, Any]] = {}
            for relation, by_whom in exact.items():
                rows = {who: probs[view, head, query] for who, probs in by_whom.items()}
                teacher_row, *student_rows = rows.items()
                rows = dict([teacher_row, (SKETCH, _sketched(sketches[relation], view, head, query)), *student_rows])
                maps[str(relation)] = {who: row[prefix:].reshape(grid).numpy() for who, row in rows.items()}
            place = divmod(query - prefix, grid[1])
            yield Example(key, batch.pixels[view].permute(1, 2, 0).numpy(), head + 1, place, maps)


def _queries(entropy: Tensor, sampled: Sequence[Tensor | None], view: int, prefix: int) -> list[tuple[int, int]]:
    """(head, query) pairs of one view, the lowest entropy [H, T] of each head first, that every relation sampled."""
    held = torch.ones_like(entropy, dtype=torch.bool)
    held[:, :prefix] = False
    for rows in sampled:
        if rows is not None:
            held &= torch.zeros_like(held).scatter(1, rows[view], True)
    least, query = entropy.masked_fill(~held, torch.inf).min(dim=1)
    order = [head for head in least.argsort().tolist() if least[head] < torch.inf]
    return [(head, int(query[head])) for head in order[:QUERIES_PER_IMAGE]]


def _sketched(target: RowTarget, view: int, head: int, query: int) -> Tensor:
    """The stored row of `query`, written out [T]."""
    place = query if target.rows is None else int((target.rows[view, head] == query).nonzero())
    return target.dense()[view, head, place]
