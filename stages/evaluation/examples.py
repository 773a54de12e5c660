"""Pictures of cached views: what teacher, cache and students say about them (`tinymim look`, the demo's report)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.errors import CheckpointError
from tinymim.configs.load import load_recipe
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.loader import VerifyConfig
from tinymim.configs.taps import Shapes
from tinymim.models.student import StudentModel, shapes_of
from tinymim.models.teacher import Teacher
from tinymim.models.vit import Normalise
from tinymim.pipeline.joined import join
from tinymim.pipeline.masks import visible_patches
from tinymim.pipeline.records import of_layer
from tinymim.pipeline.replay import ReplayedViews
from tinymim.pipeline.shards import open_shards
from tinymim.stages.pages.pictures import STORED, TEACHER, Example
from tinymim.stages.run.folder import RECIPE_NAME
from tinymim.stages.training.states import read_state
from tinymim.stages.training.student_step import student_model, with_mask
from tinymim.stages.training.terms import Term
from tinymim.stages.units.constants import on_device
from tinymim.stages.units.drops import drawn_drops
from tinymim.storage.reader import CacheReader
from tinymim.targets.contract import Answers, PictureLine, Target, TargetKind
from tinymim.targets.kinds import stored_kind

EXAMPLE_IMAGES = (0, 3, 5, 8)  # in the first shard: stripes, rings, bricks, waves
QUERIES_PER_IMAGE = 2
_CPU = torch.device("cpu")


class TrainedStudent(NamedTuple):
    """A student with its heads, from the training state of its run folder.

    Attributes:
        recipe: its recipe, with the mask of its layers.
        model: the student, on the CPU, in eval mode.
        layers: names of the layers that it learns from, in the order of its heads.
        targets: by layer, the part of the records that it is compared on.
    """

    recipe: TrainStudentRecipe
    model: StudentModel
    layers: tuple[str, ...]
    targets: Mapping[str, TargetsConfig]

    @property
    def size(self) -> int:
        """The side of its input in pixels."""
        assert self.recipe.student is not None  # by `load_student`
        return self.recipe.student.img_size

    @torch.no_grad()
    def answers(self, pixels: Tensor, named: Sequence[tuple[str, int]]) -> dict[str, Answers]:
        """The answers for uint8 views [B, 3, S, S], given their (sample key, view index), by layer."""
        kept = visible_patches(self.recipe.mask, named, shapes_of(self.model.vit, self.size).grid, _CPU)
        images = Normalise()(pixels)
        found = self.model.by_head(self.model(images) if kept is None else self.model(images, kept))
        return dict(zip(self.layers, found, strict=True))


def load_student(folder: Path, reader: CacheReader) -> TrainedStudent:
    """The student of a run folder. Heads are in the training state, not in the exported weights.

    Args:
        folder: the run folder of train-student; for several students, the folder of one.
        reader: a cache with the layers that the student learnt from.

    Raises:
        CheckpointError: the folder is not that of one student, or its state does not fit this cache.
        UserError: the cache has no such layer.
    """
    file = folder / RECIPE_NAME
    recipe = load_recipe(file, "train-student") if file.exists() else None
    if not isinstance(recipe, TrainStudentRecipe) or recipe.student is None:
        raise CheckpointError(
            "this is not the run folder of one student",
            got=folder,
            expected=f"a folder of train-student with {RECIPE_NAME} and a training state",
            hint="a run of several students has a folder for each",
        )
    configs = {reader.layer(name).name: config for name, config in recipe.each_layer()}
    targets = {name: config.targets for name, config in configs.items()}
    terms = []
    for name, own in configs.items():
        layer = reader.layer(name)
        kind = stored_kind(layer.target, own.targets, on_device(reader.constants(name), _CPU))
        terms.append(Term(kind, layer.shapes, name, mask=layer.mask, student_block=own.student_block))
    recipe = with_mask(recipe, terms)
    model = student_model(recipe, terms).eval()
    try:
        model.load_state_dict(read_state(folder)["parts"]["student"])
    except RuntimeError as error:
        raise CheckpointError(
            f"the state in {folder} does not fit this cache",
            got=str(error).splitlines()[0],
            hint="name the cache that the student was trained from",
        ) from error
    return TrainedStudent(recipe, model, tuple(targets), targets)


def examples(
    kind: TargetKind,
    shapes: Shapes,
    columns: Mapping[str, Target],
    pixels: Tensor | None,
    lines: int,
    views: int,
    kept: Int64[Tensor, "B M"] | None = None,
) -> Iterator[Example]:
    """The lines of every view's picture.

    Args:
        kind: the kind of the layer.
        shapes: the teacher's shapes.
        columns: targets of the same B views by the title of their column; exact ones first.
        pixels: uint8 [B, 3, S, S]; None: not at hand.
        lines: most lines of a view.
        views: B.
        kept: the patches that a masked layer's teacher saw; hidden ones are nan in the pictures.
    """
    seen = shapes if kept is None else replace(shapes, grid=(1, shapes.visible))
    for view in range(views):
        one = {name: kind.pick(target, slice(view, view + 1)) for name, target in columns.items()}
        image = None if pixels is None else pixels[view].permute(1, 2, 0).numpy()
        for line in kind.picture(one, seen, lines):
            yield Example(image, line if kept is None else _on_grid(line, kept[view], shapes.grid))


def _on_grid(line: PictureLine, kept: Int64[Tensor, " M"], grid: tuple[int, int]) -> PictureLine:
    """A line about visible patches, [1, M] each, with the patches in their places."""

    def placed(values: Tensor) -> Tensor:
        if values.ndim == 1:  # bars
            return values
        whole = values.new_full((grid[0] * grid[1], *values.shape[2:]), torch.nan)
        whole[kept] = values[0]
        on_grid: Tensor = whole.unflatten(0, grid)
        return on_grid

    panels = {group: {name: placed(each) for name, each in own.items()} for group, own in line.panels.items()}
    if line.query is None:
        return line._replace(panels=panels)
    row, column = divmod(int(kept[line.query[1]]), grid[1])
    return line._replace(query=(row, column), panels=panels)


@torch.no_grad()
def relation_examples(
    cache: CacheTeacherRecipe, students: Mapping[str, TrainStudentRecipe], reader: CacheReader
) -> Iterator[Example]:
    """Pictures of some views of the demo's cache by teacher, sketch and students."""
    # ---- the views, exactly as in training
    layer = reader.layer()
    source, shapes = join(open_shards(cache.source), reader), layer.shapes
    kind = stored_kind(layer.target)
    images = sorted({image % source.counts[0] for image in EXAMPLE_IMAGES})
    arrays = {layer.name: [spec.name for spec in kind.specs(shapes)]}
    views = ReplayedViews(reader, reader.manifest, source, arrays, VerifyConfig())
    batch = views.batch(np.array([[0, image, 0, number] for number, image in enumerate(images)], dtype=np.int64))

    # ---- teacher, cache and students
    teacher = Teacher(cache.teacher, kind.taps)
    columns = {
        TEACHER: kind.exact(teacher(batch.pixels, drops=drawn_drops(teacher, batch.view_keys))),
        STORED: kind.decode(of_layer(batch.records, layer.name), batch.view_keys, shapes),
    }
    for name, recipe in students.items():
        answers = load_student(recipe.run.folder, reader).answers(batch.pixels, batch.named)
        columns[name] = kind.answered(answers[layer.name], shapes)
    yield from examples(kind, shapes, columns, batch.pixels, QUERIES_PER_IMAGE, len(batch.keys))
