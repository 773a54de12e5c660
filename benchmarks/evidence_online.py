"""The students of `evidence.py` with the teacher in the loop: its dense relations, its features, or a control.

The step is that of `train-student`; the teacher makes its targets. `train-student` itself trains so with `on_missing:
teacher`, from records. Here are float32 targets that no codec rounds, and controls that no cache can hold.
"""

import contextlib
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.taps import Shapes, Tap
from tinymim.models.checkpoints import to_safetensors
from tinymim.models.taps import Tapped
from tinymim.models.teacher import Teacher
from tinymim.models.timm_folder import Pixels
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages.run.folder import STUDENT_NAME
from tinymim.stages.training.bookkeeping import Bookkeeping
from tinymim.stages.training.ranks import Ranks, set_up
from tinymim.stages.training.student_step import StudentStep, make_students
from tinymim.stages.training.terms import Term
from tinymim.storage.atomic import write_bytes_atomic
from tinymim.targets.contract import Answers, Loss, Target, TargetKind
from tinymim.targets.kinds import make_kind

# What the student is to match: the relations of its image; the features of its image; the relations of another image.
Wanted = Literal["relations", "features", "strange relations"]


class FeatureHead(nn.Module):
    """A linear layer from the student's final tokens [B, T, C] to the teacher's channels."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, channels)

    def forward(self, tokens: Tensor) -> Answers:
        """[B, T, teacher's channels]."""
        return (self.linear(tokens),)


class Features:
    """A `StudentTarget`: the tapped input, standardised per token, compared by mean squared error."""

    measure: ClassVar[str] = "mse"

    def __init__(self, tap: Tap) -> None:
        self.tap, self.taps = tap, (tap,)

    def exact(self, tapped: Tapped) -> Tensor:
        """The target [B, T, C]."""
        x = tapped[self.tap][3]
        return nn.functional.layer_norm(x, x.shape[-1:])

    def head(self, student: Shapes, teacher: Shapes) -> FeatureHead:
        """The student's head."""
        return FeatureHead(student.width, teacher.width)

    def losses(self, answers: Answers, target: Tensor) -> dict[str, Loss]:
        """The one loss, in one part."""
        error = (answers[0] - target).square().mean((1, 2))
        return {"features": Loss(error[:, None], torch.zeros_like(error))}


def train(recipe: TrainStudentRecipe, cache: CacheTeacherRecipe, wanted: Wanted) -> None:
    """Train as `train_student.run` does with a cache of `cache`, and write `student.safetensors`.

    Args:
        recipe: the student's recipe; `recipe.cache` is not opened.
        cache: names teacher, views and relations.
        wanted: `strange relations` are those of the image before in the batch, whatever it is.
    """
    # ---- teacher in the loop
    ranks = Ranks()
    device = set_up(recipe, ranks)
    relations = make_kind(*cache.layers[cache.layer_name])
    teacher = Teacher(cache.teacher, relations.taps).to(device)
    kind: Features | TargetKind = Features(relations.taps[0]) if wanted == "features" else relations

    def target(pixels: Tensor, records: Mapping[str, Tensor], view_keys: Tensor, _: object) -> tuple[Target, ...]:
        tapped: Tapped = teacher(pixels)
        if wanted == "strange relations":
            tapped = {tap: tuple(each.roll(1, dims=0) for each in tensors) for tap, tensors in tapped.items()}
        return (kind.exact(tapped),)

    # ---- student
    source, batch_size = open_shards(recipe.source), recipe.optim.batch_size
    order = SampleOrder(source.counts, recipe.order, batch_size, cache.num_views)
    content = [wanted, *(shard.content_hash for shard in source.shards)]
    terms = [Term(kind, teacher.shapes())]
    [student] = make_students(recipe, terms, ranks, order, content)
    do_step = StudentStep(
        recipe, [student], terms, {student.learner.device: target}, torch.from_numpy(order.places), batch_size
    )
    names = [shard.name for shard in source.shards]
    books = Bookkeeping(recipe, [student.learner], ranks, order, names, "views_per_s")
    books.resume()

    # ---- train
    views = ImageViews(source.shards, RandomViews(cache.views), cache.views.seed)
    stream = batches(views, order.plan(books.total_steps), recipe.loader)
    with contextlib.closing(stream), books.running() as (stop, meter):
        for step, batch in enumerate(stream, start=books.first_step):
            do_step(step, batch)
            books.end_step(step + 1, stop, meter)
    write_bytes_atomic(
        recipe.run.folder / STUDENT_NAME,
        to_safetensors(student.model.vit.state_dict(), Pixels(IMAGENET_MEAN, IMAGENET_STD).metadata()),
    )
