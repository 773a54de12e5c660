"""`on_missing: teacher`: what a cache lacks is computed in the loop, encoded and decoded as stage one does.

So a computed record has the bits of a stored one, up to the rounding of a teacher that runs on batches of another size.
Nothing behind the records differs: targets, losses, audits.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinymim.configs.codecs.kinds import codec_config
from tinymim.configs.codecs.relations import SketchCodec
from tinymim.configs.errors import CheckpointError, UserError
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.configs.schema.train import LayerConfig, TrainStudentRecipe
from tinymim.configs.sections.masks import MaskConfig
from tinymim.configs.sections.models import TeacherConfig
from tinymim.configs.sections.views import ViewConfig
from tinymim.configs.taps import Shapes
from tinymim.models.taps import Tapped
from tinymim.models.teacher import Teacher
from tinymim.pipeline.dataset import Lacking, partners_of_shards
from tinymim.pipeline.masks import visible_patches
from tinymim.pipeline.misses import PartlyReplayedViews, join_partly
from tinymim.pipeline.order import SampleOrder
from tinymim.pipeline.records import named
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import law_of
from tinymim.stages.cache.opened import Opened, arrays_of, kinds_of, opened_layer
from tinymim.stages.cache.write_back import WriteBack
from tinymim.stages.run.device import require_view_size
from tinymim.stages.run.progress import logger
from tinymim.stages.training.device_stream import MakeTargets, cached_targets
from tinymim.stages.training.student_step import check_students, refuse_other_size, with_mask
from tinymim.stages.training.terms import naming
from tinymim.stages.units.constants import calibrated, on_device, require_rebuildable, settle_constants
from tinymim.stages.units.drops import drawn_drops
from tinymim.stages.units.prepare import make_layer, make_manifest
from tinymim.storage.catalog import resolve
from tinymim.storage.constants import digest_of_constants
from tinymim.storage.layout import METADATA
from tinymim.storage.manifest import Layer, check_same, check_same_layer, grown
from tinymim.storage.packed import open_cache_store
from tinymim.storage.reader import CacheReader
from tinymim.storage.writer import CacheWriter
from tinymim.targets.contract import Target, TargetKind
from tinymim.targets.kinds import make_kind

VIEWS_AT_ONCE: Final = 64  # of a pass of the teacher: dense relations of 64 views of a ViT-L take 1.3 GB
Arrays = dict[str, npt.NDArray[Any]]


class _Wanted(NamedTuple):
    """A layer to learn from.

    Attributes:
        name, config: of the training recipe; the name is the layer's.
        recipe: the cache recipe that would make this layer alone.
        kind: its codec, without constants.
        stored: the layer as the cache has it; None: the cache lacks it.
    """

    name: str
    config: LayerConfig
    recipe: CacheTeacherRecipe
    kind: TargetKind
    stored: Layer | None


class TeacherInput:
    """The input of students from a teacher, and from what a cache holds by then; a context manager.

    Args, attributes: as `CachedInput`; `num_views` may be None: no view comes twice.

    Attributes:
        write_back: writes units, where the recipe wants it.

    Raises:
        UserError: the recipe does not state a layer or a view law that the cache lacks.
        CacheMismatch: source, views, teacher or codec are not those of the cache; a student does not fit.
        CheckpointError: the teacher's weights do not exist or do not fit.
        RecipeError: teacher, codec, views and students do not fit one another.
    """

    def __init__(self, recipe: TrainStudentRecipe, num_views: int | None, device: torch.device) -> None:
        self._recipe, self.num_views, self._keeps = recipe, num_views, False
        self._stack = ExitStack()
        self.write_back: WriteBack | None = None
        shards = open_shards(recipe.source)
        self._place, self._reader = _found(recipe.cache)
        law = _law(recipe, self._reader)
        self.size = law.size
        self.partners = None if law.pairs is None else partners_of_shards(shards.shards, law.seed)
        wanted = [_wanted(recipe, law, self._reader, name, config) for name, config in recipe.each_layer()]

        # ---- the teachers, and the identity of their layers (I6)
        self._wanted = {each.name: each for each in wanted}
        self._teachers = {device: self._loaded(device)}
        manifest = make_manifest(wanted[0].recipe, shards)
        differences = [] if self._reader is None else check_same(self._reader.manifest, manifest)
        self.layers: dict[str, Layer] = {}
        for name, recipe_of, kind, stored in ((each.name, each.recipe, each.kind, each.stored) for each in wanted):
            with naming(name if len(wanted) > 1 else ""):
                teacher = self._teacher_of(name, device)
                made = make_layer(name, recipe_of.layers[name], manifest, teacher, kind, recipe_of.mask)
                require_rebuildable({name: kind}, {name: teacher})
                differences += [] if stored is None else check_same_layer(stored, made)
            self.layers[name] = made if stored is None else stored
        self._constants_of: dict[str, Arrays | None] = dict.fromkeys(self.layers)
        self._refuse_misfits(device)

        # ---- the cache, to be written and read
        for difference in dict.fromkeys(differences):
            logger.info(f"train-student: warning: {difference}")
        try:
            self._writer: CacheWriter | None = None
            if recipe.write_back:
                self._writer = self._stack.enter_context(
                    CacheWriter.open(self._place, manifest, list(self.layers.values()))
                )
                manifest = self._writer.manifest
            for each in wanted:
                self._constants_of[each.name] = self._constants(each, shards, self._teacher_of(each.name, device))
            if self._writer is not None:
                self._reader = CacheReader(self._place)
            self.manifest = manifest if self._reader is None else grown(self._reader.manifest, manifest)
            self.source = join_partly(shards, self._reader, list(self.layers), num_views)
        except BaseException:
            self._stack.close()
            raise
        self.opened = self._opened(device)
        self.content = []
        for name, layer in self.layers.items():
            held = self._constants_of[name]
            self.content += [layer.spec_id, *([digest_of_constants(layer, held)] if held else [])]
        self.content += [shard.content_hash for shard in self.source.shards]

    def __enter__(self) -> "TeacherInput":
        if self._reader is None:
            logger.info(f"train-student: there is no cache at {self._place}: the teacher computes every view")
        elif self.num_views is not None:
            held, whole = self.source.held(self.num_views), len(self.source.shards) * self.num_views
            logger.info(
                f"train-student: the cache holds all records of {held:,} of {whole:,} views of shards; the teacher "
                "computes the others"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if self.write_back is not None:
            dropped, incomplete = self.write_back.dropped, len(self.write_back.incomplete)
            logger.info(
                f"train-student: wrote {self.write_back.written:,} units to {self._place}"
                + (f"; {dropped:,} others were there by then, another job's, or without view 0" if dropped else "")
                + (f"; {incomplete:,} lack images that this run did not compute in one pass" if incomplete else "")
            )

    def views(self, order: SampleOrder) -> PartlyReplayedViews:
        """The views of the order's rank; begins to write units."""
        lanes, per_lane = len(order.lanes), order.slices_per_lane
        views = PartlyReplayedViews(
            self._reader,
            self.manifest,
            self.source,
            arrays_of(self.opened),
            self._recipe.verify,
            lanes,
            per_lane,
            self._writer is not None,
        )
        if self._writer is not None:
            most = 2 * lanes * per_lane
            self.write_back = WriteBack(self._writer, self.source.shards, most, views.look_again)
            self._stack.enter_context(self.write_back)
        return views

    def weights_bytes(self, device: torch.device) -> int:
        """Memory of the weights of the teachers on a device."""
        weights = [each for teacher in self._teachers[device].values() for each in teacher.state_dict().values()]
        return sum(each.nbytes for each in weights)

    def targets(self, device: torch.device) -> MakeTargets:
        """The function that computes targets on a device, which gets a teacher of its own."""
        if device not in self._teachers:
            self._teachers[device] = self._loaded(device)
        teachers = [(teacher, names) for names, teacher in self._teachers[device].items()]
        codecs = {
            name: make_kind(*each.recipe.layers[name], constants=on_device(self._constants_of[name], device))
            for name, each in self._wanted.items()
        }
        keep, self._keeps = (None if self._keeps else self.write_back), True  # one device's records make the units
        masks = {name: layer.mask for name, layer in self.layers.items()}
        return TeacherTargets(kinds_of(self._opened(device)), codecs, teachers, masks, keep)

    def _opened(self, device: torch.device) -> list[Opened]:
        wanted, constants = self._wanted.items(), self._constants_of
        return [
            opened_layer(self.layers[name], each.config, on_device(constants[name], device), several=len(wanted) > 1)
            for name, each in wanted
        ]

    def _refuse_misfits(self, device: torch.device) -> None:
        """Check students before anything is written."""
        terms = [each.term for each in self._opened(device)]
        recipe = with_mask(self._recipe, terms)
        for own in recipe.each().values():
            assert own.student is not None  # by TrainStudentRecipe.each
            refuse_other_size(own.student, [self.size])
        check_students(recipe, terms)

    # ---- teachers

    def _loaded(self, device: torch.device) -> dict[tuple[str, ...], Teacher]:
        """The teachers on a device, by the layers that they serve; equal ones are loaded once."""
        groups: dict[str, list[_Wanted]] = {}
        for each in self._wanted.values():
            groups.setdefault(each.recipe.teacher.model_dump_json(exclude={"block"}), []).append(each)
        found = {}
        for layers in groups.values():
            config = layers[0].recipe.teacher.model_copy(update={"block": 1})
            with naming(layers[0].name if len(self._wanted) > 1 else ""):
                found[tuple(each.name for each in layers)] = _teacher(config, layers, device)
        return found

    def _teacher_of(self, layer: str, device: torch.device) -> Teacher:
        return next(teacher for names, teacher in self._teachers[device].items() if layer in names)

    def _constants(self, wanted: _Wanted, shards: Any, teacher: Teacher) -> Arrays | None:
        """The constants of a layer: the cache's, else made as stage one makes them."""
        if not wanted.kind.calibration_views:
            return None
        found: Mapping[str, Tensor] | None = None
        if self._writer is not None:
            found = settle_constants(self._writer, wanted.name, wanted.recipe, shards, teacher)
        elif self._reader is not None and wanted.stored is not None:
            found = on_device(self._reader.constants(wanted.name), torch.device("cpu"))
        if found is None:
            recipe = wanted.recipe
            # Units that come later are made with constants of another job, perhaps of another device.
            (self._reader.layers if self._reader is not None else {}).pop(wanted.name, None)
            found = calibrated(wanted.kind, recipe.views, recipe.given_batch_size, shards, teacher, recipe.mask)
        return {name: array.cpu().numpy() for name, array in found.items()}


# ---------------------------------------------------------------- on a device


class TeacherTargets:
    """`MakeTargets` that first computes the records that are missing.

    Args:
        kinds: as `cached_targets`.
        codecs: by layer, its kind as stage one encodes with it, with constants on the device.
        teachers: teachers on the device, each with the layers that it serves.
        masks: by layer the mask of its views.
        keep: takes computed records, for units; None: they are dropped.
    """

    def __init__(
        self,
        kinds: Mapping[str, tuple[TargetKind, Shapes]],
        codecs: Mapping[str, TargetKind],
        teachers: Sequence[tuple[Teacher, Sequence[str]]],
        masks: Mapping[str, MaskConfig | None],
        keep: Callable[[Lacking, str, npt.NDArray[np.int64], Mapping[str, Tensor]], None] | None = None,
    ) -> None:
        self._codecs, self._keep = codecs, keep
        # A teacher runs once for its layers of one mask.
        self._passes = [
            (teacher, mask, [layer for layer in layers if masks[layer] == mask])
            for teacher, layers in teachers
            for mask in dict.fromkeys(masks[layer] for layer in layers)
        ]
        self._decode = cached_targets(kinds)
        self._used = {layer: [spec.name for spec in kind.specs(shapes)] for layer, (kind, shapes) in kinds.items()}

    def __call__(
        self, pixels: Tensor, records: Mapping[str, Tensor], view_keys: Tensor, lacking: Lacking | None
    ) -> tuple[Target, ...]:
        """The targets of all views; `lacking` states which records are missing from `records`."""
        assert lacking is not None, "the views come from PartlyReplayedViews"
        records = dict(records)
        for teacher, mask, layers in self._passes:
            missing = {layer: lacking.layers[layer] for layer in layers if layer in lacking.layers}
            rows = np.flatnonzero(np.any(list(missing.values()), axis=0)) if missing else np.zeros(0, np.int64)
            for start in range(0, len(rows), VIEWS_AT_ONCE):
                some = rows[start : start + VIEWS_AT_ONCE]
                lack = {layer: np.flatnonzero(each[some]) for layer, each in missing.items()}
                self._compute(teacher, mask, some, lack, pixels, records, view_keys, lacking)
        return self._decode(pixels, records, view_keys, lacking)

    def _compute(
        self,
        teacher: Teacher,
        mask: MaskConfig | None,
        rows: npt.NDArray[np.int64],
        lack: Mapping[str, npt.NDArray[np.int64]],
        pixels: Tensor,
        records: dict[str, Tensor],
        view_keys: Tensor,
        lacking: Lacking,
    ) -> None:
        """Put the records of some rows, at most `VIEWS_AT_ONCE`, into `records`; `lack` has places in `rows`."""
        device = pixels.device
        used = {layer: self._codecs[layer] for layer, places in lack.items() if len(places)}
        taps = {tap for kind in used.values() for tap in kind.taps}
        # Finite values are required here, for each pass: a codec would make plausible records of others.
        kept = visible_patches(mask, [lacking.named[row] for row in rows], teacher.grid, device)
        at = torch.from_numpy(rows).to(device)
        tapped: Tapped = teacher(pixels[at], taps=taps, kept=kept, drops=drawn_drops(teacher, view_keys[at]))
        for layer, kind in used.items():
            own: Tapped = tapped
            if len(lack[layer]) < len(rows):
                at = torch.from_numpy(lack[layer]).to(device)
                own = {tap: tuple(tensor[at] for tensor in tapped[tap]) for tap in kind.taps}
            of_layer = rows[lack[layer]]
            index = torch.from_numpy(of_layer).to(device)
            arrays = kind.encode(own, view_keys[index])
            for array in self._used[layer]:
                _put(records, named(layer, array), arrays[array], index, len(pixels))
            if self._keep is not None:
                self._keep(lacking, layer, of_layer, arrays)


def _put(records: dict[str, Tensor], name: str, rows: Tensor, index: Tensor, count: int) -> None:
    """Put rows of an array into the records of a batch, which has the array unless all its rows are missing."""
    if name not in records:
        records[name] = torch.empty((count, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    held = records[name]
    if held.dtype == torch.uint16:  # CUDA cannot index uint16
        held, rows = held.view(torch.int16), rows.view(torch.int16)
    held[index] = rows


# ---------------------------------------------------------------- from the recipe and the cache


def _found(place: Path | str) -> tuple[Path | str, CacheReader | None]:
    """The cache at a place, or in a root that holds one; None where there is none yet."""
    try:
        place = resolve(place)
    except UserError:
        if open_cache_store(place).exists(METADATA):
            raise
        return place, None
    return place, CacheReader(place)


def _law(recipe: TrainStudentRecipe, reader: CacheReader | None) -> ViewConfig:
    """The view law: the recipe's, which `check_same` compares, or the cache's."""
    if recipe.views is not None:
        return recipe.views
    if reader is None:
        raise UserError(
            f"there is no cache at {recipe.cache}, and the recipe names no view law",
            hint="name an existing cache, or give `views` and, by layer, `teacher` and `codec` (docs/training.md)",
        )
    return law_of(reader.manifest.views, reader.manifest.environment).config


def _wanted(
    recipe: TrainStudentRecipe, law: ViewConfig, reader: CacheReader | None, name: str | None, config: LayerConfig
) -> _Wanted:
    """A layer with the cache recipe that would make it, from the training recipe or from the layer's description."""
    stored = None
    if reader is not None and (name is None or name in reader.layers):
        stored = reader.layer(name)
    if stored is None and (name is None or config.teacher is None):
        held = "no cache" if reader is None else f"layers {', '.join(reader.layers) or '(none)'}"
        raise UserError(
            f"the recipe does not state the teacher of layer {name or '(without a name)'}, which the cache lacks",
            got=f"{held} at {recipe.cache}",
            hint="give `layers` with `teacher` and `codec` by name (docs/training.md), or name a layer of the cache",
        )
    name = stored.name if stored is not None else name
    assert name is not None
    teacher = config.teacher or _teacher_config(stored)
    codec = config.codec or (SketchCodec() if stored is None else codec_config(**stored.target["parameters"]))
    if stored is not None and config.teacher is None:
        block = max(tap.place for tap in stored.taps) or 1
        teacher = teacher.model_copy(update={"block": block})
    require_view_size(law.size, teacher, f"layers.{name}.teacher")
    made = CacheTeacherRecipe(
        stage="cache-teacher",
        source=recipe.source,
        views=law,
        teacher=teacher,
        codec=codec,
        mask=None if stored is None else stored.mask,
        layer=name,
        cache=recipe.cache,
        loader=recipe.loader,
        run=recipe.run,
    )
    return _Wanted(name, config, made, make_kind(*made.layers[name]), stored)


def _teacher_config(stored: Layer | None) -> TeacherConfig:
    """The teacher of a layer that the cache holds."""
    assert stored is not None
    held = stored.teacher
    fields = {name: value for name, value in held["arch"].items() if name in TeacherConfig.model_fields}
    others = {name: value for name, value in held["arch"].items() if name not in fields}
    return TeacherConfig(
        name=held["name"],
        **fields | ({"args": others} if others else {}),
        weights=held["weights_origin"] or "",
        precision=held["precision"],
        mean=held["mean"],
        std=held["std"],
        drop_path=held.get("drop_path", 0.0),
    )


def _teacher(config: TeacherConfig, layers: Sequence[_Wanted], device: torch.device) -> Teacher:
    try:
        return Teacher(config, {tap for each in layers for tap in each.kind.taps}).to(device)
    except CheckpointError as error:
        if layers[0].config.teacher is not None:
            raise
        hint = f"if the weights have moved, set layers.{layers[0].name}.teacher with their place (docs/training.md)"
        raise CheckpointError(error.what, got=error.got, expected=error.expected, hint=hint) from error
