"""`tinymim cache verify`: check every byte of a cache against its records."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinymim.configs.errors import CacheCorrupt
from tinymim.stages.cache.inspection import inspect_cache
from tinymim.stages.pages.numbers import format_bytes, plural
from tinymim.storage.catalog import resolve
from tinymim.storage.packed import open_cache_store


def run(place: Path | str) -> dict[str, Any]:
    """Check every byte of a cache, or of the only cache in a root.

    Returns:
        The report, as JSON values. Findings are data; `refuse_unsound` raises an error for them.

    Raises:
        UserError: there is no cache at `place`.
        StoreError: the object store refuses or fails.
        CacheMismatch: the format version is unknown.
        CacheCorrupt: the manifest is damaged, so the rest cannot be checked.
    """
    store = open_cache_store(resolve(place))
    return {"path": str(store.place), **inspect_cache(store, "cache verify").to_json()}


def refuse_unsound(report: Mapping[str, Any]) -> None:
    """Raise CacheCorrupt if a report has findings or a failed deep check."""
    repair = "`tinymim cache repair RECIPE` recomputes what is damaged, and nothing else"
    if count := len(report["findings"]):
        first = report["findings"][0]
        raise CacheCorrupt(f"{count} finding(s) in {report['path']}, the first is {first['path']}", hint=repair)
    deep = report.get("deep")
    if deep is not None and not deep["passed"]:
        raise CacheCorrupt(
            f"the records of layer {deep['layer']} of {report['path']} differ from those of this teacher",
            got=f"{deep['agreement']:.2%} of the sampled elements agree, {deep['wrong_pixels']} digests of "
            f"pixels differ, {deep['unreadable']} images are unreadable",
            expected=f"at least {deep['min_agreement']:.2%}, and no other difference",
            hint="another decoder gives other pixels; other hardware rounds a few draws differently, and more of them "
            "below fp32; if another teacher made the cache, remove it and run `tinymim cache-teacher` again",
        )


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = [
        f"cache     {report['path']}",
        f"spec      {report['spec_id']}",
        f"checked   {report['units']:,} units, {format_bytes(report['bytes'])}: every byte against its checksums, "
        "decoding, keys, commit records, the layers against one another",
    ]
    for name, layer in report["layers"].items():
        lines.append(
            f"  {name}: {plural(layer['units'], 'unit')}, {layer['records']:,} records, {format_bytes(layer['bytes'])}"
        )
    for writer in report["being_written"]:
        holder = writer["holder"] or "an unknown process"
        lines.append(f"writer    {holder} holds {writer['lease']}: uncommitted files are not checked")
    lines += [f"foreign   {path}: not part of a cache, harmless, left alone" for path in report["foreign"]]
    lines += [f"{found['kind']:<10}{found['path']}: {found['what']}" for found in report["findings"]]
    deep = report.get("deep")
    if deep is not None:
        lines += _deep_lines(deep)
    elif "deep" in report:
        lines.append("teacher   not run: repair the findings first")
    sound = report["sound"] and (deep is None or deep["passed"])
    return "\n".join([*lines, f"verdict   {'sound' if sound else 'NOT SOUND'}"])


def _deep_lines(deep: Mapping[str, Any]) -> list[str]:
    count = deep["records"]
    lines = [
        f"teacher   run again on {count:,} records of {plural(deep['units'], 'unit')} of layer {deep['layer']}",
        f"  pixels               {count - deep['wrong_pixels']:,} of {count:,} have the stored digest",
        f"  all elements         {deep['agreement']:.2%} equal, at least {deep['min_agreement']:.2%} wanted",
    ]
    lines += [f"  {name:<20} {share:.2%}" for name, share in deep["agreement_by_array"].items()]
    lines += [f"  differs: {example}" for example in deep["examples"]]
    lines += [f"  warning: {warning}" for warning in deep["warnings"]]
    return lines
