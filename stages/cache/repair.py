"""`tinymim cache repair`: recompute damaged or missing parts of a recipe's cache, and nothing else."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tinymim.configs.errors import CacheCorrupt, CacheMismatch, StoreError, UserError
from tinymim.configs.schema import CacheTeacherRecipe
from tinymim.stages.cache.inspection import Inspection, inspect_cache
from tinymim.stages.run.progress import logger
from tinymim.stages.units.constants import calibrated, require_rebuildable
from tinymim.stages.units.fill import fill
from tinymim.stages.units.prepare import Prepared, cache_place, prepare
from tinymim.storage import layout
from tinymim.storage.constants import constants_digest, constants_files
from tinymim.storage.layout import CONSTANTS, CONSTANTS_RECORD
from tinymim.storage.manifest import Manifest, check_same
from tinymim.storage.reader import CacheReader
from tinymim.storage.repair import rebuild_manifest, repair
from tinymim.storage.store import Store, open_store


def run(recipe: CacheTeacherRecipe) -> dict[str, Any]:
    """Inspect the recipe's cache, repair what needs no teacher, drop damaged units, and recompute missing ones.

    Sound files are not touched. On the same hardware and libraries, recomputed units get their original bytes.

    Returns:
        The report, as JSON values.

    Raises:
        UserError: there is no cache, or it cannot be written, or a writer holds a damaged shard.
        CacheMismatch: another recipe made the cache; nothing was changed.
        CacheCorrupt: this recipe cannot recompute the damage.
        Interrupted: a signal stopped the repair; the same command continues.
        and the errors of `cache-teacher`.
    """
    # ---- refuse another recipe before anything changes
    parts = prepare(recipe)
    store = open_store(cache_place(recipe, parts.manifest))
    manifest, rebuilt = _settled_manifest(store, parts.manifest)

    # ---- findings
    inspection = inspect_cache(store, "cache repair", manifest)
    for finding in inspection.findings:
        logger.info(f"cache repair: {finding}")
    shards = parts.source.by_name()
    lost = [f for f in inspection.findings if f.kind in ("commit", "unit") and f.unit and f.unit.shard not in shards]
    if lost:
        raise CacheCorrupt(
            f"{len(lost)} finding(s) in {store.place} are about shards that the recipe's source lacks; "
            "nothing was changed",
            got=str(lost[0]),
            hint="name a source with all shards of the cache",
        )

    # ---- constants first, because units are checked against them; then groups, strays, damaged units
    restored = _restore_constants(store, recipe, parts, manifest, inspection)
    others = [finding for finding in inspection.findings if finding.kind != "constants"]
    done = repair(store, manifest, constants_digest(store, manifest), others)
    if done.held:
        raise UserError(
            f"{len(done.held)} finding(s) in {store.place} could not be repaired: a writer is active on these shards",
            got=str(done.held[0]),
            hint="run the same command again when the writer has ended",
        )

    # ---- recompute missing units, cut into the same ranges of views as before
    good = {info.unit for info in inspection.survey.units} - set(done.dropped)
    new = parts.manifest.shards.keys() - manifest.shards.keys()
    if new:
        logger.info(f"cache repair: {len(new)} shards of the source are new to the cache and are computed as well")
    cut_like = [*done.dropped, *done.uncommitted]
    whole = recipe.model_copy(update={"num_views": manifest.num_views})
    require_rebuildable(parts.kind, parts.teacher)
    fill(whole, parts._replace(manifest=replace(parts.manifest, num_views=manifest.num_views)), cut_like)
    return {
        "path": str(store.place),
        "spec_id": manifest.spec_id,
        "findings": len(inspection.findings) + rebuilt,
        "rewritten": ([layout.METADATA] if rebuilt else []) + done.rewritten + restored,
        "computed": [str(info.unit) for info in CacheReader(store.place).units() if info.unit not in good],
        "removed": done.removed,
        "foreign": inspection.survey.foreign,
    }


def format_report(report: Mapping[str, Any]) -> str:
    """The report of `run` as text for a terminal."""
    lines = [f"cache       {report['path']}", f"spec        {report['spec_id']}"]
    for what in ("rewritten", "removed", "computed"):
        lines += [f"{what:<12}{name}" for name in report[what]]
    lines += [f"left alone  {path}: not part of a cache" for path in report["foreign"]]
    return "\n".join([*lines, f"{report['findings']} finding(s), all repaired; the cache is complete"])


def _settled_manifest(store: Store, wanted: Manifest) -> tuple[Manifest, bool]:
    """The stored manifest, and whether it was rebuilt from the recipe because it could not be read.

    Raises:
        CacheMismatch: the recipe does not fit the stored manifest, or the units of a cache without one.
    """
    try:
        manifest = layout.read_manifest(store)
    except (CacheMismatch, StoreError):
        raise
    except UserError as error:  # damaged, missing, or no cache at all; rebuild_manifest checks the commit records
        manifest = rebuild_manifest(store, wanted)
        logger.info(f"cache repair: {error.what}: rebuilt from the recipe")
        return manifest, True
    for difference in check_same(manifest, wanted):
        logger.info(f"cache repair: warning: {difference}")
    return manifest, False


def _restore_constants(
    store: Store, recipe: CacheTeacherRecipe, parts: Prepared, manifest: Manifest, inspection: Inspection
) -> list[str]:
    """Calibrate and write damaged or missing constants again; returns the paths of the files written.

    Raises:
        CacheCorrupt: calibration gives other constants than the units were made with.
    """
    if not any(finding.kind == "constants" for finding in inspection.findings):
        return []
    named = {info.constants for info in inspection.survey.units}
    if not named or not parts.kind.calibration_views:
        # No unit depends on them, so `fill` may calibrate new ones.
        store.remove([CONSTANTS_RECORD])
        store.remove_tree(CONSTANTS)
        return []
    arrays = calibrated(parts.kind, recipe.views, recipe.given_batch_size, parts.source, parts.teacher)
    files, record = constants_files(manifest.spec_id, {name: array.numpy() for name, array in arrays.items()})
    digest = json.loads(record)["record_digest"]
    if named != {digest}:
        raise CacheCorrupt(
            f"the constants of {store.place} cannot be recomputed: calibration gives others than its units need",
            got=f"constants {digest}",
            expected=" and ".join(f"constants {name}" for name in sorted(map(str, named))),
            hint=f"restore {CONSTANTS_RECORD} and the folder {CONSTANTS}/ from a copy; calibration takes the first "
            "images of the source and needs the same hardware; otherwise remove the cache and make it again",
        )
    # Readers may be active: sound files stay, and each other file is replaced atomically.
    written = []
    for path, data in {
        **{f"{CONSTANTS}/{name}": data for name, data in files.items()},
        CONSTANTS_RECORD: record,
    }.items():
        if not _holds(store, path, data):
            store.write(path, data)
            written.append(path)
    return written


def _holds(store: Store, path: str, data: bytes) -> bool:
    try:
        return store.read(path, len(data)) == data
    except (FileNotFoundError, ValueError, OSError):
        return False
