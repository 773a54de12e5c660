"""From a minute's measurements to a whole run: the time of both stages, and when a cache breaks even. Arithmetic only.

Times are wall seconds per view unless a name says otherwise. "Online" is training without a cache, with the teacher in
the loop: every step runs the teacher on its batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TeacherCosts:
    """What was measured of stage one."""

    num_images: int  # of the whole cache, as the next two
    num_views: int
    num_units: int
    audit_views: int  # audited views of every unit
    workers: int  # loading processes; 0: the process itself loads
    # Of one view, by phase. On one core: "decode", and "read" of its record. In the stage's process: "teacher" to the
    # tapped block, "encode" to a record in host memory, "digest" of its pixels, "audit" of an audited view, "write" to
    # the committed record.
    phase_s: Mapping[str, float]
    cores: float  # cores that teacher and codec keep busy
    codec_bytes: Mapping[str, float]  # one view on disk by codec, keys and metadata included; the recipe's own first


@dataclass(frozen=True)
class InLoop:
    """What was measured of a teacher in the loop of a training run that reads a cache (`on_missing: teacher`)."""

    share: float  # of the run's views, whose records are all missing
    step_s: float  # the models' part of a step, per such view: teacher, codec and student
    cores: float  # cores that it keeps busy
    layers: Sequence[str]  # layers that the cache lacks; they are computed for all views
    weights_bytes: int  # the teachers' weights, on every device of every rank
    pass_views: int  # most views of a teacher's pass
    pass_bytes: int | None  # most memory of such a pass, beside the weights; None: a CPU keeps no count


@dataclass(frozen=True)
class StudentCosts:
    """What was measured of one training run."""

    name: str  # the recipe's
    num_images: int  # of its source
    steps: int  # of the whole run
    batch_size: int  # shared by the ranks
    ranks: int  # processes that train together, each assumed to have a machine like this one
    workers: int  # loading processes of each rank; 0: the rank itself loads
    views_per_decode: int  # the recipe's
    step_s: float  # the models' part of a step, per view that the cache holds
    cores: float  # cores that the step keeps busy
    replay_s: float  # one view of the cache on one core: decode, crop, compare digests; without reading records
    in_loop: InLoop | None = None  # None: the cache holds all records


@dataclass(frozen=True)
class Overlap:
    """Seconds per view of models and loading together, and which of "models", "loading" and "cores" limits them."""

    seconds: float
    limited_by: str


@dataclass(frozen=True)
class StageOne:
    """Forecast of `cache-teacher` on one device."""

    num_records: int
    codec_bytes: Mapping[str, float]  # the whole cache by codec; the recipe's own first
    per_view: Overlap
    seconds: float
    loader_cores: float  # cores of loading that keep the teacher fed


@dataclass(frozen=True)
class Training:
    """Forecast of one `train-student`."""

    views: int  # views that the student sees
    epochs: float  # the same in passes over the images
    per_view: Overlap
    online_per_view: Overlap
    cached_s: float  # wall time of the run with the cache
    online_s: float  # wall time of the run with the teacher in the loop
    loader_cores: float  # cores of loading that keep one rank fed
    # The fewest such runs that, stage one included, take less device time than as many runs with the teacher in the
    # loop, and the same for a single longer run, in epochs; None: never.
    break_even_runs: int | None
    break_even_epochs: int | None


@dataclass(frozen=True)
class Forecast:
    """Both stages, and device seconds of everything with the cache and with the teacher in the loop."""

    stage_one: StageOne
    trainings: Sequence[Training]
    cached_device_s: float
    online_device_s: float
    cache: bool | None  # the verdict: whether to cache; None: there is no student to decide for


def forecast(teacher: TeacherCosts, students: Sequence[StudentCosts], cores: int, trainings: int) -> Forecast:
    """The forecast for a machine of `cores` cores, each student trained `trainings` times."""
    one = forecast_stage_one(teacher, cores)
    runs = [forecast_training(costs, teacher, one.seconds, cores) for costs in students]
    ranks = [costs.ranks for costs in students]
    cached_s = one.seconds + trainings * sum(run.cached_s * count for run, count in zip(runs, ranks, strict=True))
    online_s = trainings * sum(run.online_s * count for run, count in zip(runs, ranks, strict=True))
    return Forecast(one, runs, cached_s, online_s, cached_s < online_s if students else None)


def forecast_stage_one(costs: TeacherCosts, cores: int) -> StageOne:
    """Stage one on one device."""
    records, phase_s = costs.num_images * costs.num_views, costs.phase_s
    audited = min(costs.audit_views * costs.num_units / records, 1.0)
    main_s = sum(phase_s[name] for name in ("teacher", "encode", "digest", "write"))
    main_s += audited * phase_s.get("audit", 0.0)
    per_view = overlapped(main_s, costs.cores, phase_s["decode"], costs.workers, cores)
    return StageOne(
        num_records=records,
        codec_bytes={name: records * size for name, size in costs.codec_bytes.items()},
        per_view=per_view,
        seconds=records * per_view.seconds,
        loader_cores=phase_s["decode"] / main_s,
    )


def forecast_training(costs: StudentCosts, teacher: TeacherCosts, stage_one_s: float, cores: int) -> Training:
    """One training run with the cache, and online: teacher and student on every batch, no records to read.

    With the cache, a teacher in the loop computes what is missing. Online, the student's step is assumed to be the
    same; this favours the online side, whose targets are dense.
    """
    views = costs.steps * costs.batch_size
    epochs = views / costs.num_images
    held, parts = 1.0, [(costs.step_s, costs.cores)]
    if (loop := costs.in_loop) is not None:
        held = 1.0 - loop.share
        parts = [(held * costs.step_s, costs.cores), (loop.share * loop.step_s, loop.cores)]
    step_s = sum(seconds for seconds, _ in parts)
    step_cores = sum(seconds * count for seconds, count in parts) / step_s
    read_s = held * teacher.phase_s["read"]
    cached = overlapped(step_s, step_cores, costs.replay_s, costs.workers, cores, read_s)
    both_s = teacher.phase_s["teacher"] + costs.step_s
    busy = (teacher.phase_s["teacher"] * teacher.cores + costs.step_s * costs.cores) / both_s
    online = overlapped(both_s, busy, costs.replay_s, costs.workers, cores)
    saved_s = views * (online.seconds - cached.seconds)
    return Training(
        views=views,
        epochs=epochs,
        per_view=cached,
        online_per_view=online,
        cached_s=views * cached.seconds / costs.ranks,
        online_s=views * online.seconds / costs.ranks,
        loader_cores=costs.replay_s / step_s,
        break_even_runs=break_even(stage_one_s, saved_s),
        break_even_epochs=break_even(stage_one_s, saved_s / epochs),
    )


def overlapped(main_s: float, busy: float, input_s: float, workers: int, cores: int, read_s: float = 0.0) -> Overlap:
    """Seconds per view of a process whose models keep `busy` cores busy while `workers` processes load.

    The slowest of three decides: the models; the loaders, each on a core of its own, or the threads of the process
    itself, which need `read_s` for reading; or all cores of the machine, where all of these want more cores than there
    are. Without workers one follows the other.
    """
    if workers == 0:
        return Overlap(main_s + input_s + read_s, "models" if main_s >= input_s + read_s else "loading")
    everything_s = main_s * busy + input_s + read_s
    limits = {"models": main_s, "loading": max(input_s / workers, read_s), "cores": everything_s / cores}
    slowest = max(limits, key=lambda name: limits[name])
    return Overlap(limits[slowest], slowest)


def break_even(once_s: float, saved_s: float) -> int | None:
    """The smallest n for which n x `saved_s` is more than `once_s`; None: there is none."""
    return math.floor(once_s / saved_s) + 1 if saved_s > 0 else None
