"""What students learn from: layers of a cache that holds every record, joined with its images."""

from types import TracebackType

import torch

from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.pipeline.joined import join, partners_of_source
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.replay import ReplayedViews
from tinymim.pipeline.shards import open_shards
from tinymim.stages.cache.opened import Opened, arrays_of, kinds_of, opened_layers
from tinymim.stages.run.progress import logger
from tinymim.stages.training.device_stream import MakeTargets, cached_targets
from tinymim.stages.training.student_step import trained_on, view_size
from tinymim.storage.catalog import resolve
from tinymim.storage.reader import CacheReader


class CachedInput:
    """The input of students from a cache alone; a context manager, as `TeacherInput`.

    Args:
        recipe: the training recipe.
        num_views: views per image; None: those that all shards have.
        device: the device that `opened` is on.

    Attributes:
        manifest: the cache's manifest.
        source: its images.
        num_views: views per image.
        opened: the layers.
        size: side of the students' input in pixels.
        partners: the pairs of the view law, for the order.
        content: digests of the data that a training state depends on.

    Raises:
        As `join` and `opened_layers`.
    """

    def __init__(self, recipe: TrainStudentRecipe, num_views: int | None, device: torch.device) -> None:
        assert recipe.on_missing != "teacher"
        self._recipe, self._reader = recipe, CacheReader(resolve(recipe.cache))
        names, shards = [name for name, _ in recipe.each_layer()], open_shards(recipe.source)
        self.manifest = self._reader.manifest
        self.size = view_size(recipe, self._reader)
        self.source = join(shards, self._reader, names, num_views, recipe.on_missing, self.size)
        self.partners = partners_of_source(self.source, self._reader, self.manifest)
        self.num_views: int | None = self.source.num_views
        self.opened: list[Opened] = opened_layers(self._reader, recipe, device)
        self.content = trained_on(self._reader, self.source)

    def __enter__(self) -> "CachedInput":
        source = self.source
        for skipped in source.skipped[:5]:
            logger.info(f"train-student: shard {skipped} is not in the cache (yet) and is skipped")
        if source.skipped or source.without_record:
            logger.info(
                f"train-student: skipped {len(source.skipped):,} shards, and {source.without_record:,} "
                "images of the others that have no record in the cache (on_missing: skip)"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is open."""

    def views(self, order: SampleOrder) -> ReplayedViews:
        """The views of the order's rank."""
        arrays, lanes = arrays_of(self.opened), len(order.lanes)
        return ReplayedViews(
            self._reader, self.manifest, self.source, arrays, self._recipe.verify, lanes, order.slices_per_lane
        )

    def targets(self, device: torch.device) -> MakeTargets:
        """The function that computes targets on a device."""
        return cached_targets(kinds_of(opened_layers(self._reader, self._recipe, device)))
