"""`tinymim cache verify`: every byte of a cache against its records; with a recipe, a sample against the teacher."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinymim.configs.errors import CacheCorrupt
from tinymim.stages.cache.inspection import inspect_cache
from tinymim.stages.pages.numbers import format_bytes
from tinymim.storage.catalog import resolve
from tinymim.storage.store import open_store


def run(place: Path | str) -> dict[str, Any]:
    """Read and check all of a cache, or of the only one in a root.

    Returns:
        What was found, as JSON values; `refuse_unsound` makes an error of it.

    Raises:
        UserError: there is no cache at `place`.
        StoreError: the object store refuses or fails.
        CacheMismatch: an unknown format version.
        CacheCorrupt: the manifest is damaged, so that nothing can be said of the rest.
    """
    store = open_store(resolve(place))
    return {"path": str(store.place), **inspect_cache(store, "cache verify").to_json()}


def refuse_unsound(report: Mapping[str, Any]) -> None:
    """Raise CacheCorrupt, so that the command fails, where a report says that something is wrong."""
    repair = "`tinymim cache repair RECIPE` mends it and computes nothing that is good"
    if count := len(report["findings"]):
        first = report["findings"][0]
        raise CacheCorrupt(f"{count} finding(s) in {report['path']}, the first is {first['path']}", hint=repair)
    deep = report.get("deep")
    if deep is not None and not deep["passed"]:
        raise CacheCorrupt(
            f"the records of {report['path']} are not what this teacher gives",
            got=f"{deep['agreement']:.2%} of the sampled elements agree, {deep['wrong_views']} views and "
            f"{deep['wrong_pixels']} digests of pixels differ, {deep['unreadable']} images are unreadable",
            expected=f"at least {deep['min_agreement']:.2%}, and no other difference",
            hint="another decoder gives other pixels; other hardware rounds a few draws differently, and more of them "
            "below fp32; if the teacher was another, remove the cache and make it anew",
        )


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = [
        f"cache     {report['path']}",
        f"spec      {report['spec_id']}",
        f"checked   {report['units']:,} units, {report['files']:,} files, {format_bytes(report['bytes'])}: "
        "sizes, digests, decoding, keys, commit records",
        f"cached    {report['covered_views']:,} of {report['num_views']:,} views",
    ]
    for writer in report["being_written"]:
        lines.append(
            f"writer    {writer['holder'] or 'somebody'} holds {writer['lease']}: what is not committed is not checked"
        )
    lines += [f"foreign   {path}: no file of a cache; it harms nothing and is left alone" for path in report["foreign"]]
    lines += [f"{found['kind']:<10}{found['path']}: {found['what']}" for found in report["findings"]]
    deep = report.get("deep")
    if deep is not None:
        lines += _deep_lines(deep)
    elif "deep" in report:
        lines.append("teacher   not asked: the findings come first")
    sound = report["sound"] and (deep is None or deep["passed"])
    return "\n".join([*lines, f"verdict   {'sound' if sound else 'NOT SOUND'}"])


def _deep_lines(deep: Mapping[str, Any]) -> list[str]:
    count = deep["records"]
    lines = [
        f"teacher   run again on {count:,} records of {deep['units']:,} units",
        f"  boxes and flips      {count - deep['wrong_views']:,} of {count:,} as the view law draws them",
        f"  pixels               {count - deep['wrong_pixels']:,} of {count:,} have the stored digest",
        f"  all elements         {deep['agreement']:.2%} equal, at least {deep['min_agreement']:.2%} wanted",
    ]
    lines += [f"  {name:<20} {share:.2%}" for name, share in deep["agreement_by_array"].items()]
    lines += [f"  differs: {example}" for example in deep["examples"]]
    lines += [f"  warning: {warning}" for warning in deep["warnings"]]
    return lines
