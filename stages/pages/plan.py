"""What `tinymim plan` prints: the measured rates, both stages with their arithmetic, and the verdict."""

from collections.abc import Iterator, Mapping
from typing import Any

from tinymim.stages.pages.numbers import (
    duration,
    exact_bytes,
    format_bytes,
    format_cores,
    format_rate,
    plural,
    short_time,
)

_LIMITED_BY = {
    "models": "limited by the models",
    "loading": "LIMITED BY LOADING",
    "cores": "models and loading together keep all cores busy",
}


def format_plan(plan: Mapping[str, Any]) -> str:
    """`plan.run`'s dictionary as text for a terminal."""
    machine, measured, forecast = plan["machine"], plan["measured"], plan["forecast"]
    lines = [
        f"measured  for {machine['measured_for_s']:.0f} s on {machine['device']}, {plural(machine['cores'], 'core')}, "
        f"{plural(machine['torch_threads'], 'torch thread')}"
        + (", random weights: sketches of a trained teacher are larger" if plan["options"]["random_weights"] else ""),
        *_stage_one(measured["teacher"], forecast["stage_one"]),
    ]
    for costs, training in zip(measured["students"], forecast["trainings"], strict=True):
        lines += ["", *_training(costs, training)]
    return "\n".join([*lines, "", *_verdict(plan)])


def _stage_one(costs: Mapping[str, Any], one: Mapping[str, Any]) -> Iterator[str]:
    for name, seconds in costs["phase_s"].items():
        note = f"  {plural(costs['audit_views'], 'view')} of each of {plural(costs['num_units'], 'unit')}"
        yield f"  {name:<8}{1 / seconds:>10,.1f} views/s{note if name == 'audit' else ''}"
    (own, size_bytes), *_ = one["codec_bytes"].items()
    count = f"{costs['num_images']:,} images x {plural(costs['num_views'], 'view')}"
    yield ""
    yield f"cache     {count} x {exact_bytes(size_bytes / one['num_records'])} = {format_bytes(size_bytes)}"
    for name, size in one["codec_bytes"].items():
        yield f"  {name:<32}{format_bytes(size):>12}{'  (this recipe)' if name == own else ''}"
    yield f"stage one {_run(one['num_records'], one['per_view'], one['seconds'])}; one device"
    yield f"  loading {format_cores(one['loader_cores'])}; the recipe has loader.workers {costs['workers']}"


def _run(views: int, per_view: Mapping[str, Any], seconds: float, ranks: int = 1) -> str:
    shared = f" / {ranks} ranks" if ranks > 1 else ""
    return (
        f"{views:,} views x {short_time(per_view['seconds'])}{shared} = {duration(seconds)}, "
        f"{format_rate(ranks / per_view['seconds'])}, {_LIMITED_BY[per_view['limited_by']]}"
    )


def _training(costs: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[str]:
    views, ranks = training["views"], costs["ranks"]
    yield (
        f"training  {costs['name']}: {costs['steps']:,} steps x {costs['batch_size']:,} = {views:,} views, "
        f"{training['epochs']:,.1f} epochs"
    )
    yield f"  cached  {_run(views, training['per_view'], training['cached_s'], ranks)}"
    if costs["in_loop"] is not None:
        yield from _in_loop(costs["in_loop"])
    yield f"  online  {_run(views, training['online_per_view'], training['online_s'], ranks)}; the teacher in the loop"
    if ranks > 1:
        yield "          (each rank is assumed to have a machine like this one; gradient exchange is not measured)"
    fed = format_cores(training["loader_cores"]) + (" for each rank" if ranks > 1 else "")
    yield f"  loading {fed}; the recipe has loader.workers {costs['workers']}"
    runs, epochs = training["break_even_runs"], training["break_even_epochs"]
    if runs is None:
        yield "  break-even: never; a run with the cache takes no less time than one with the teacher in the loop"
    else:
        yield f"  break-even at {plural(runs, 'such run')}, or at {plural(epochs, 'epoch')} of a single run"


def _in_loop(loop: Mapping[str, Any]) -> Iterator[str]:
    every = f", and {' and '.join(loop['layers'])} of all" if loop["layers"] else ""
    yield f"          (the teacher in the loop computes {loop['share']:.1%} of the views{every})"
    weights = f"{format_bytes(loop['weights_bytes'])} of teacher weights"
    activations = "the activations" if loop["pass_bytes"] is None else format_bytes(loop["pass_bytes"])
    yield f"  memory  {weights}, and {activations} of up to {loop['pass_views']} views, on each device"


def _verdict(plan: Mapping[str, Any]) -> Iterator[str]:
    forecast, trainings = plan["forecast"], plan["options"]["trainings"]
    cached_s, online_s = forecast["cached_device_s"], forecast["online_device_s"]
    if forecast["cache"] is None:
        yield "verdict   open: name the train-student recipes too, a cache saves time in training only"
        return
    runs = f"{trainings} x " if trainings > 1 else ""
    yield (
        f"in all    cached {duration(cached_s)}, online {duration(online_s)} of device time: stage one and "
        f"{runs}{plural(len(forecast['trainings']), 'training run')}"
    )
    said = "cache" if forecast["cache"] else "do not cache"
    yield f"verdict   {said}: {cached_s / online_s:.0%} of the device time of training with the teacher in the loop"
    yield "          (a cache repeats its views; online, every epoch has new ones)"
