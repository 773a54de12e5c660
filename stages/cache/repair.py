"""`tinymim cache repair`: recompute damaged or missing parts of a recipe's cache, and nothing else."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, StoreError, UserError
from tinymim.configs.schema.cache import CacheTeacherRecipe
from tinymim.stages.cache.inspection import Inspection, inspect_cache
from tinymim.stages.cache.render import render_units
from tinymim.stages.run.progress import logger
from tinymim.stages.units.constants import calibrated, require_rebuildable
from tinymim.stages.units.fill import fill
from tinymim.stages.units.prepare import Prepared, cache_place, prepare
from tinymim.storage import layout
from tinymim.storage.constants import constants_digest, constants_places, encode_constants
from tinymim.storage.layout import METADATA, VIEWS, UnitId
from tinymim.storage.manifest import Layer, Manifest, check_same, check_same_layer
from tinymim.storage.reader import CacheReader
from tinymim.storage.repair import LayerUnit, rebuild_layer, rebuild_manifest, repair
from tinymim.storage.store import Store, open_store
from tinymim.storage.writer import CacheWriter


def run(recipe: CacheTeacherRecipe) -> dict[str, Any]:
    """Inspect the recipe's cache, repair what needs no teacher, drop damaged units, and recompute missing ones.

    The view layers and the recipe's layers are repaired. Units and constants of other layers need their own recipes.
    Sound files are not touched. On the same hardware and libraries, recomputed units get their original bytes.

    Returns:
        The report, as JSON values; `left` are the findings about other layers.

    Raises:
        UserError: there is no cache or no such layer, or it cannot be written, or a writer holds a damaged shard.
        CacheMismatch: another recipe made the cache or the layer; nothing was changed.
        CacheCorrupt: this recipe cannot recompute the damage.
        Interrupted: a signal stopped the repair; the same command continues.
        and the errors of `cache-teacher`.
    """
    # ---- refuse another recipe before anything changes
    parts = prepare(recipe)
    store = open_store(cache_place(recipe, parts.layers))
    manifest, rebuilt = _settled_manifest(store, parts.manifest)
    layers: dict[str, Layer] = {}
    for name, wanted in parts.layers.items():
        layers[name], rebuilt_layer = _settled_layer(store, wanted, manifest)
        rebuilt += rebuilt_layer

    # ---- findings
    inspection = inspect_cache(store, "cache repair", manifest)
    for finding in inspection.findings:
        logger.info(f"cache repair: {finding}")
    view_layers = inspection.survey.view_layers
    ours = [f for f in inspection.findings if f.kind in ("group", "stray") or f.layer in (*view_layers, *layers)]
    left = [finding for finding in inspection.findings if finding not in ours and finding.kind != "views"]
    shards = parts.source.by_name()
    lost = [f for f in ours if f.kind in ("commit", "unit", "views") and f.unit and f.unit.shard not in shards]
    if lost:
        raise CacheCorrupt(
            f"{len(lost)} finding(s) in {store.place} are about shards that the recipe's source lacks; "
            "nothing was changed",
            got=str(lost[0]),
            hint="name a source with all shards of the cache",
        )

    # ---- constants first, because units are checked against them; then groups, strays, damaged units
    restored = [
        path for layer in layers.values() for path in _restore_constants(store, recipe, parts, layer, inspection)
    ]
    digests = {name: constants_digest(store, layer) for name, layer in layers.items()}
    others = [finding for finding in ours if finding.kind not in ("constants", "layer", "views")]
    done = repair(store, manifest, inspection.survey.layers, digests, others)
    if done.held:
        raise UserError(
            f"{len(done.held)} finding(s) in {store.place} could not be repaired: a writer is active on these shards",
            got=str(done.held[0]),
            hint="run the same command again when the writer has ended",
        )

    # ---- recompute missing units, cut into the same ranges of views as before: views by rendering, then targets
    good = {(info.layer, info.unit) for info in inspection.survey.all_units()} - set(done.dropped)
    former = [*done.dropped, *done.uncommitted]
    known = {info.unit.shard: info for info in inspection.survey.all_units() if (info.layer, info.unit) in good}
    for view_name in view_layers:  # the one with the keys comes first
        if views := _missing_views(inspection, view_name, good, done.dropped):
            logger.info(f"cache repair: rendering {len(views)} units of layer {view_name} again")
            with CacheWriter.open(store.place, manifest, [], recipe.lease_s) as writer:
                render_units(writer, recipe, parts.source, views, known, view_name)
    new = parts.manifest.shards.keys() - manifest.shards.keys()
    if new:
        logger.info(f"cache repair: {len(new)} shards of the source are new to the cache and are computed as well")
    require_rebuildable(parts.kinds, parts.teachers)
    by_views: defaultdict[int, list[str]] = defaultdict(list)  # layers may have grown apart
    for layer_name in layers:
        own = [unit for name, unit in (*good, *done.dropped) if name == layer_name]
        by_views[max((unit.first_view + unit.num_views for unit in own), default=recipe.num_views)].append(layer_name)
    for num_views, names in by_views.items():
        cut_like = [unit for name, unit in former if name in (*view_layers, *names)]
        # The place is given, because in `cache_root` it depends on all of the recipe's layers.
        here = {"num_views": num_views, "cache": store.place, "cache_root": None}
        fill(recipe.only(names).model_copy(update=here), parts, cut_like)
    reader = CacheReader(store.place)
    now = [info for name in (*reader.view_layers, *layers) for info in reader.units(name)]
    return {
        "path": str(store.place),
        "spec_id": manifest.spec_id,
        "layer": ", ".join(layers),
        "findings": len(inspection.findings) + len(rebuilt),
        "rewritten": rebuilt + done.rewritten + restored,
        "computed": [f"{info.layer} {info.unit}" for info in now if (info.layer, info.unit) not in good],
        "removed": done.removed,
        "left": [str(finding) for finding in left],
        "foreign": inspection.survey.foreign,
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report of `run` as text for a terminal."""
    lines = [f"cache       {report['path']}", f"spec        {report['spec_id']}, layer {report['layer']}"]
    for what in ("rewritten", "removed", "computed", "left"):
        lines += [f"{what:<12}{name}" for name in report[what]]
    lines += [f"left alone  {path}: not part of a cache" for path in report["foreign"]]
    count, left = report["findings"], len(report["left"])
    verdict = f"all repaired; views and layer {report['layer']} are complete" if not left else f"{left} left"
    return "\n".join([*lines, f"{count} finding(s), {verdict}"])


def refuse_left(report: Mapping[str, Any]) -> None:
    """Raise CacheCorrupt if findings about other layers are left."""
    if report["left"]:
        raise CacheCorrupt(
            f"{len(report['left'])} finding(s) about other layers of {report['path']} are left",
            got=report["left"][0],
            hint="run `tinymim cache repair` with the recipe of that layer, or remove it with "
            "`tinymim cache remove PATH --layer NAME`",
        )


def _settled_manifest(store: Store, wanted: Manifest) -> tuple[Manifest, list[str]]:
    """The stored manifest, and its path if it was rebuilt from the recipe because it could not be read.

    Raises:
        CacheMismatch: the recipe does not fit the stored manifest, or the units of a cache without one.
    """
    try:
        manifest = layout.read_manifest(store)
    except (CacheMismatch, StoreError):
        raise
    except UserError as error:  # damaged, missing, or no cache at all; rebuild_manifest checks the commit records
        rebuild_manifest(store, wanted)
        logger.info(f"cache repair: {error.what}: rebuilt from the recipe")
        return wanted, [METADATA]
    for difference in check_same(manifest, wanted):
        logger.info(f"cache repair: warning: {difference}")
    return manifest, []


def _settled_layer(store: Store, wanted: Layer, manifest: Manifest) -> tuple[Layer, list[str]]:
    """The stored description of the recipe's layer, and its path if it was rebuilt.

    Raises:
        UserError: the cache has no such layer.
        CacheMismatch: the recipe does not fit the layer.
    """
    folder = layout.layer_folder(wanted.name)
    try:
        layer = layout.read_layer(store, wanted.name, manifest)
    except (CacheMismatch, StoreError):
        raise
    except UserError as error:
        if not any(layout.is_commit(entry.path) for entry in store.list(folder)):
            raise UserError(
                f"the cache {store.place} has no layer {wanted.name} to repair",
                got=", ".join(layout.layer_names(store)) or "no target layer",
                hint="`tinymim cache-teacher RECIPE` adds it; or name the recipe of a layer that is there",
            ) from error
        rebuild_layer(store, wanted)
        logger.info(f"cache repair: {error.what}: rebuilt from the recipe")
        return wanted, [f"{folder}/{METADATA}"]
    for difference in check_same_layer(layer, wanted):
        logger.info(f"cache repair: warning: {difference}")
    return layer, []


def _missing_views(
    inspection: Inspection, layer: str, good: set[LayerUnit], dropped: Iterable[LayerUnit]
) -> list[UnitId]:
    """The units that a view layer must get: those that were dropped, and the views that targets need besides."""
    manifest, layers = inspection.survey.manifest, inspection.survey.layers
    resting = {name for name, each in layers.items() if layout.view_layer(manifest, each.view_size) == layer}
    if layer == VIEWS:
        resting = {*layers, *inspection.survey.view_layers} - {VIEWS}
    held: dict[str, list[UnitId]] = {}
    for name, unit in sorted(good):
        if name == layer:
            held.setdefault(unit.shard, []).append(unit)
    missing: list[UnitId] = []
    # Former units first, so that they come back as they were; then the ranges of targets, without what is there.
    wanted = sorted(unit for name, unit in dropped if name == layer)
    wanted += sorted(unit for name, unit in good if name in resting)
    for unit in wanted:
        others = held.setdefault(unit.shard, [])
        borders = {unit.first_view, unit.first_view + unit.num_views}
        for other in others:
            borders |= {other.first_view, other.first_view + other.num_views}
        inside = sorted(border for border in borders if unit.first_view <= border <= unit.first_view + unit.num_views)
        for first, end in pairwise(inside):
            part = UnitId(unit.shard, first, end - first)
            if not any(part.overlaps(other) for other in others):
                missing.append(part)
                others.append(part)
    return sorted(missing)


def _restore_constants(
    store: Store, recipe: CacheTeacherRecipe, parts: Prepared, layer: Layer, inspection: Inspection
) -> list[str]:
    """Calibrate and write damaged or missing constants of the layer again; returns the paths of the files written.

    Raises:
        CacheCorrupt: calibration gives other constants than the units were made with.
    """
    if not any(finding.kind == "constants" and finding.layer == layer.name for finding in inspection.findings):
        return []
    path, record_path = constants_places(layer.name)
    named = {info.constants for info in inspection.survey.units[layer.name]}
    kind = parts.kinds[layer.name]
    if not named or not kind.calibration_views:
        # No unit depends on them, so `fill` may calibrate new ones.
        store.remove([record_path, path])
        return []
    arrays = calibrated(kind, recipe.views, recipe.given_batch_size, parts.source, parts.teachers[layer.name])
    data, record = encode_constants(layer, {name: array.numpy() for name, array in arrays.items()})
    digest = json.loads(record)["record_digest"]
    if named != {digest}:
        raise CacheCorrupt(
            f"the constants of {store.place} cannot be recomputed: calibration gives others than its units need",
            got=f"constants {digest}",
            expected=" and ".join(f"constants {name}" for name in sorted(map(str, named))),
            hint=f"restore {record_path} and {path} from a copy; calibration takes the first images of the source and "
            "needs the same hardware; otherwise remove the layer and make it again",
        )
    # Readers may be active: sound files stay, and each other file is replaced atomically.
    written = []
    for place, content in {path: data, record_path: record}.items():
        if not _holds(store, place, content):
            store.write(place, content)
            written.append(place)
    return written


def _holds(store: Store, path: str, data: bytes) -> bool:
    try:
        return store.read(path, len(data)) == data
    except (FileNotFoundError, ValueError, OSError):
        return False
