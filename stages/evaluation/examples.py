"""Examples for the demo's report: relation rows of the teacher, the cache and the students."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from tinymim.configs.schema import CacheTeacherRecipe, TrainStudentRecipe
from tinymim.configs.sections import VerifyConfig
from tinymim.models.student import StudentModel, shapes_of
from tinymim.models.teacher import Teacher
from tinymim.models.vit import Normalise, build_student
from tinymim.pipeline.records import of_layer
from tinymim.pipeline.replay import ReplayedViews, join
from tinymim.pipeline.shards import open_shards
from tinymim.stages.pages.demo import SKETCH, Example
from tinymim.stages.training.optim import state_identity
from tinymim.stages.training.states import load_states
from tinymim.stages.training.student_step import trained_on
from tinymim.storage.reader import CacheReader
from tinymim.targets.kinds import stored_kind
from tinymim.targets.relations.kind import RelationKind
from tinymim.targets.relations.picture import query_maps

EXAMPLE_IMAGES = (0, 3, 5, 8)  # in the first shard: stripes, rings, bricks, waves
QUERIES_PER_IMAGE = 2


@torch.no_grad()
def relation_examples(
    cache: CacheTeacherRecipe, students: Mapping[str, TrainStudentRecipe], reader: CacheReader
) -> Iterator[Example]:
    """Relation rows of some cached views by teacher, sketch and students, for queries whose sketch is in the cache."""
    # ---- the views, exactly as in training
    layer = reader.layer()
    source, shapes = join(open_shards(cache.source), reader), layer.shapes
    kind = stored_kind(layer.target)
    assert isinstance(kind, RelationKind)  # the demo's recipe
    images = sorted({image % source.counts[0] for image in EXAMPLE_IMAGES})
    arrays = {layer.name: [spec.name for spec in kind.specs(shapes)]}
    views = ReplayedViews(reader, reader.manifest, source, arrays, VerifyConfig())
    batch = views.batch(np.array([[0, image, 0, number] for number, image in enumerate(images)], dtype=np.int64))
    sketches = kind.decode(of_layer(batch.records, layer.name), batch.view_keys, shapes)

    # ---- the students' answers (the head is in the training state, not in the export)
    content = trained_on(reader, source)
    answers = {}
    for name, recipe in students.items():
        assert recipe.student is not None  # the demo's recipes have one each
        vit = build_student(recipe.student)
        student = StudentModel(vit, kind.head(shapes_of(vit, recipe.student.img_size), shapes)).eval()
        load_states([recipe.run.folder], [state_identity(recipe, content)], [{"student": student}])
        answers[name] = student(Normalise()(batch.pixels))

    # ---- the most selective queries of every view
    tapped = Teacher(cache.teacher, kind.taps)(batch.pixels)
    for found in query_maps(kind, shapes, tapped, (SKETCH, sketches), answers, QUERIES_PER_IMAGE):
        pixels = batch.pixels[found.view].permute(1, 2, 0).numpy()
        maps = {name: {who: row.numpy() for who, row in rows.items()} for name, rows in found.maps.items()}
        yield Example(batch.keys[found.view], pixels, found.head + 1, divmod(found.query, shapes.grid[1]), maps)
