"""The students of `evidence.py` that have the teacher at their side: its dense relations, its features, or a control.

Not a part of tinymim, which caches instead; made of its parts, so that all but the target is as in `train-student`:
initial weights, images, their order, views, jitter, optimiser, schedule, tap.
"""

import contextlib
from typing import Literal

import torch
from torch import Tensor, nn

from tinymim.configs.schema import CacheTeacherRecipe, TrainStudentRecipe
from tinymim.models import backbone
from tinymim.models.checkpoints import to_safetensors
from tinymim.models.taps import StudentWithTap
from tinymim.models.teacher import Teacher
from tinymim.models.vit import Normalise, build_vit
from tinymim.pipeline.dataset import ImageViews
from tinymim.pipeline.jitter import jitter
from tinymim.pipeline.loader import batches
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import RandomViews
from tinymim.stages.run.folder import STUDENT_NAME
from tinymim.stages.training.bookkeeping import Bookkeeping
from tinymim.stages.training.learner import Learner
from tinymim.stages.training.optim import seeded
from tinymim.stages.training.ranks import Ranks
from tinymim.storage.atomic import write_bytes_atomic
from tinymim.targets.relations.fidelity import exact_target
from tinymim.targets.relations.losses import relation_loss
from tinymim.targets.relations.qkv import QKV

CPU = torch.device("cpu")

# What the student is to match: the relations of its image; the features of its image; the relations of another image.
Wanted = Literal["relations", "features", "strange relations"]


class FeatureStudent(nn.Module):
    """A plain ViT and a linear layer from its final norm to the teacher's channels, dropped at export."""

    def __init__(self, student: StudentWithTap, channels: int) -> None:
        super().__init__()
        self.vit = student.vit
        self.tap = nn.Linear(backbone.widths(student.vit)[-1], channels)

    def forward(self, images: Tensor) -> Tensor:
        """[B, T, C] for normalised images [B, 3, S, S]."""
        features: Tensor = self.tap(self.vit.forward_features(images))
        return features


def train(recipe: TrainStudentRecipe, cache: CacheTeacherRecipe, wanted: Wanted) -> None:
    """Train as `train_student.run` does with a cache of `cache`, and write `student.safetensors`.

    Args:
        recipe: of the student; `recipe.cache` is not opened.
        cache: says teacher, views and relations.
        wanted: `features` are the tapped block's input, standardised per token, compared by mean squared error;
            `strange relations` are those of the image before in the batch, whatever it is.
    """
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    assert recipe.student is not None and cache.codec.name == "sketch"
    source = open_shards(recipe.source)
    order = SampleOrder(source.counts, recipe.order, recipe.optim.batch_size, cache.num_views)
    teacher = Teacher(cache.teacher)
    torch.manual_seed(recipe.run.seed)
    student = StudentWithTap(build_vit(recipe.student, drop_path=recipe.drop_path))
    width = backbone.widths(teacher.cut.model)[-1]
    module: nn.Module = FeatureStudent(student, width) if wanted == "features" else student
    example = (torch.zeros(2, 3, recipe.student.img_size, recipe.student.img_size),)
    content = [wanted, *(shard.content_hash for shard in source.shards)]
    learner = Learner("", "student", recipe, "student", module, example, Ranks(), order, content)
    books = Bookkeeping(recipe, [learner], Ranks(), order, [shard.name for shard in source.shards], "views_per_s")
    books.resume()
    normalise = Normalise()
    stream = batches(
        ImageViews(source.shards, RandomViews(cache.views), cache.views.seed),
        order.plan(books.total_steps),
        recipe.loader,
    )
    with contextlib.closing(stream), books.opened() as (stop, meter):
        for step, batch in enumerate(stream, start=books.first_step):
            q, k, v, x = teacher(batch.pixels)
            images = normalise(jitter(batch.pixels, recipe.jitter, seeded(CPU, recipe.run.seed, step)))
            with learner.part_of_step(first=True, last=True):
                if wanted == "features":
                    standard = nn.functional.layer_norm(x, x.shape[-1:])
                    learner.backward({"loss": nn.functional.mse_loss(learner.model(images), standard)}, 1.0)
                else:
                    if wanted == "strange relations":
                        q, k, v = (each.roll(1, dims=0) for each in (q, k, v))
                    student.draw(seeded(CPU, recipe.run.seed, step), torch.arange(len(images)), len(images))
                    target = exact_target(QKV(q, k, v), cache.codec.relations)
                    losses = relation_loss(QKV(*learner.model(images)).resplit(q.shape[1]), target)
                    learner.backward({"loss": torch.stack(list(losses.values())).sum()} | losses, 1.0)
            learner.update(step)
            books.close(step + 1, stop, meter)
    write_bytes_atomic(recipe.run.folder / STUDENT_NAME, to_safetensors(student.vit.state_dict(), {}))
