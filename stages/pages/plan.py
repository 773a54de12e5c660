"""What `tinymim plan` prints: what was measured, what follows from it, what times what, and the verdict."""

from collections.abc import Iterator, Mapping
from typing import Any

from tinymim.stages.pages.numbers import (
    GB,
    duration,
    exact_bytes,
    format_amount,
    format_bytes,
    format_cores,
    format_rate,
    format_speed,
    plural,
    short_time,
)

_WAITS_FOR = {
    "models": "the models decide",
    "loading": "WAITS FOR LOADING",
    "cores": "models and loading together keep all cores busy",
}


def format_plan(plan: Mapping[str, Any]) -> str:
    """`plan.run`'s dictionary as text for a terminal, the arithmetic said aloud."""
    machine, forecast = plan["machine"], plan["forecast"]
    teacher, students = plan["measured"]["teacher"], plan["measured"]["students"]
    device = machine["device"]
    lines = [
        f"measured  for {machine['measured_for_s']:.0f} s on {device}, {plural(machine['cores'], 'core')}, "
        f"{plural(machine['torch_threads'], 'torch thread')}"
        + (", random weights: sketches of a trained teacher take more" if plan["options"]["random_weights"] else "")
    ]
    if teacher is not None:
        lines += [*_measured_teacher(teacher), "", *_stage_one(teacher, forecast["stage_one"])]
    for costs, training in zip(students, forecast["trainings"], strict=True):
        lines += ["", *_training(costs, training)]
    lines += ["", *_verdict(plan)]
    if plan["compared"]:
        lines += ["", *_compared(plan["compared"])]
    return "\n".join(lines)


def _measured_teacher(costs: Mapping[str, Any]) -> Iterator[str]:
    rates = {
        "teacher": (costs["teacher"]["seconds"], "to the tapped block"),
        "encode": (costs["encode"]["seconds"], "q, k, v to records"),
        "audit": (
            costs["audit"]["seconds"],
            f"{plural(costs['audit_views'], 'view')} of each of {plural(costs['num_units'], 'unit')}",
        ),
        "write": (
            costs["write"]["seconds"],
            f"records, {format_speed(costs['record_bytes'], costs['write']['seconds'])}",
        ),
        "decode": (costs["decode_s"], f"on one core, {plural(costs['num_views'], 'view')} of an image at a time"),
    }
    for name, (seconds, what) in rates.items():
        if seconds:
            yield f"  {name:<8}{1 / seconds:>10,.1f} views/s  {what}"


def _stage_one(costs: Mapping[str, Any], one: Mapping[str, Any]) -> Iterator[str]:
    records, per_view = one["num_records"], one["per_view"]
    count = f"{costs['num_images']:,} images x {plural(costs['num_views'], 'view')}"
    yield f"cache     {count} x {exact_bytes(costs['record_bytes'])} = {format_bytes(one['cache_bytes'])}"
    for number, (name, size_bytes) in enumerate(one["codec_bytes"].items()):
        own = "  (this recipe)" if number == 0 else ""
        yield f"  {name:<32}{format_bytes(size_bytes):>12}{own}"
    yield (
        f"stage one {records:,} views x {short_time(per_view['seconds'])} + {costs['start_s']:.1f} s start = "
        f"{duration(one['seconds'])} on one device, {format_rate(one['views_per_s'])}; "
        f"{_WAITS_FOR[per_view['waits_for']]}"
    )
    yield f"  loading {format_cores(one['loader_cores'])}; the recipe has loader.workers {costs['workers']}"


def _training(costs: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[str]:
    ranks = f" / {training['ranks']} ranks" if training["ranks"] > 1 else ""
    per_view, online = training["per_view"], training["online_per_view"]
    yield (
        f"training  {costs['name']}: {costs['steps']:,} steps x {costs['batch_size']:,} = {training['views']:,} views, "
        f"{training['epochs']:,.1f} epochs"
    )
    yield (
        f"  step    {short_time(costs['step']['seconds'])} a view; a view of the cache {short_time(costs['replay_s'])} "
        f"on one core, drawn anew {short_time(costs['draw_s'])}"
    )
    yield (
        f"  cached  {training['views']:,} x {short_time(per_view['seconds'])}{ranks} + {costs['start_s']:.1f} s start "
        f"= {duration(training['cached_s'])}, {format_rate(training['views_per_s'])}; "
        f"{_WAITS_FOR[per_view['waits_for']]}"
    )
    if online is not None:
        yield (
            f"  online  {training['views']:,} x {short_time(online['seconds'])}{ranks} + {costs['start_s']:.1f} s "
            f"start = {duration(training['online_s'])}: the teacher beside the student at every step"
        )
    if training["ranks"] > 1:
        yield "          (each rank taken to have a machine like this one; the exchange of gradients is not measured)"
    amplified, each = training["records_read_per_view"], " for each rank" if training["ranks"] > 1 else ""
    yield (
        f"  reading {format_rate(training['views_per_s'])} x {amplified:,.0f} records x "
        f"{exact_bytes(costs['record_bytes'])} = {training['read_bytes_per_s'] / 2**20:,.1f} MiB/s "
        f"(whole units, {plural(max(costs['workers'], 1), 'loading process', 'loading processes')} a rank); measured "
        f"{format_speed(costs['record_bytes'], costs['read_s'])} a core"
    )
    enough = training["loader_cores"]
    if enough is None:
        yield "  loading no number of workers keeps the student fed: raise order.views_per_decode, so that a unit that"
        yield "          is read serves more of its views"
    else:
        yield f"  loading {format_cores(enough)}{each}; the recipe has loader.workers {costs['workers']}"
    if online is not None:
        trainings, single = training["pays_from_trainings"], training["pays_from_epochs"]
        if trainings is None:
            yield "  pays    never: with the cache the training takes no less time than with the teacher beside"
        else:
            few = plural(trainings, "such training")
            yield f"  pays    from {few} on; a single one, from {plural(single, 'epoch')} on"


def _verdict(plan: Mapping[str, Any]) -> Iterator[str]:
    verdict, options = plan["forecast"]["verdict"], plan["options"]
    one = plan["forecast"]["stage_one"]
    if verdict["storage_per_month"] is not None:
        yield (
            f"storage   {format_amount(one['cache_bytes'] / GB)} GB x {options['per_gb_month']:g} = "
            f"{format_amount(verdict['storage_per_month'])} a month"
        )
    if verdict["cached_device_s"] is not None:
        each = f"{verdict['trainings']} x " if verdict["trainings"] > 1 else ""
        yield (
            f"in all    cached {duration(verdict['cached_device_s'])}, online {duration(verdict['online_device_s'])} "
            f"of a device: stage one and {each}{plural(len(plan['forecast']['trainings']), 'training')}"
        )
    if verdict["saved"] is not None:
        line = f"saved     {format_amount(verdict['saved'])} at {options['per_device_hour']:g} a device hour"
        if verdict["saved"] > 0 and verdict["storage_per_month"]:
            line += f": what {verdict['saved'] / verdict['storage_per_month']:,.1f} months of storage cost"
        yield line
    said = {True: "cache", False: "do not cache", None: "open"}[verdict["cache"]]
    yield f"verdict   {said}: {verdict['why']}"
    if verdict["cache"] is not None:
        yield "          (a cache repeats its views; online every epoch has new ones)"


def _compared(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "finished runs of these recipes"
    for row in rows:
        show = duration if row["what"] == "seconds" else format_bytes
        notes = [] if row["same_recipe"] else ["the recipe there is another"]
        notes += [] if row["same_machine"] else ["made on another machine"]
        note = f" ({', '.join(notes)})" if notes else ""
        yield (
            f"  {row['name']}: forecast {show(row['forecast'])} / actual {show(row['actual'])} = {row['ratio']:.2f}, "
            f"{row['folder']}{note}"
        )


# ---------------------------------------------------------------- numbers as words
