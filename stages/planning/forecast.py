"""From a minute's measurements to a whole run: what a cache costs, what it saves, and when it pays. Arithmetic only.

Times are wall seconds per view unless a name says otherwise; `planning/teacher.py` measures them. `overlapped` joins
what runs at the same time, and `pays_from` decides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tinymim.stages.pages.numbers import GB


@dataclass(frozen=True)
class Cost:
    """What one view takes of the process that runs the models.

    Attributes:
        seconds: of wall time.
        cores: kept busy meanwhile by this process: its CPU time over wall time.
    """

    seconds: float
    cores: float = 1.0

    def __add__(self, other: "Cost") -> "Cost":
        """Both, one after the other."""
        total = self.seconds + other.seconds
        busy = self.cores * self.seconds + other.cores * other.seconds
        return Cost(total, busy / total if total else 1.0)

    def times(self, factor: float) -> "Cost":
        """So much of it."""
        return Cost(self.seconds * factor, self.cores)


@dataclass(frozen=True)
class TeacherCosts:
    """What was measured of stage one.

    Attributes:
        num_images, num_views, num_units: of the whole cache.
        audit_views: compared with dense maps in every unit.
        workers: that decode; 0: the process itself.
        decode_s: one view on one core, `num_views` views of an image at a time.
        teacher: forward pass to the tapped block.
        encode: from q, k, v to a record.
        audit: one audited view.
        write: of one record, compressed and committed.
        record_bytes: of one view on disk, keys and all.
        codec_bytes: the same of other codec settings, by what they are; the recipe's own included.
        start_s: until the first batch is there.
    """

    num_images: int
    num_views: int
    num_units: int
    audit_views: int
    workers: int
    decode_s: float
    teacher: Cost
    encode: Cost
    audit: Cost
    write: Cost
    record_bytes: float
    codec_bytes: Mapping[str, float]
    start_s: float


@dataclass(frozen=True)
class StudentCosts:
    """What was measured of one training.

    Attributes:
        name: of its recipe.
        num_images: of its source.
        steps, batch_size: of the whole run; a batch is shared by the ranks.
        ranks: processes that train together, each taken to have a machine like this one.
        workers: that load for each rank; 0: the rank itself.
        views_per_decode: of the recipe.
        unit_views: views of an image that lie in one unit of the cache: they are read together.
        step: everything that the models take, per view.
        replay_s: a view of the cache on one core: decode, crop, join, compare digests; without reading records.
        draw_s: the same view drawn anew, without a cache.
        read_s: one record, read and unpacked on one core.
        record_bytes: of one view on disk.
        start_s: until the first batch is there.
    """

    name: str
    num_images: int
    steps: int
    batch_size: int
    ranks: int
    workers: int
    views_per_decode: int
    unit_views: int
    step: Cost
    replay_s: float
    draw_s: float
    read_s: float
    record_bytes: float
    start_s: float


@dataclass(frozen=True)
class Joined:
    """Models and loading at the same time: seconds per view, and which of them it waits for."""

    seconds: float
    waits_for: str


@dataclass(frozen=True)
class StageOne:
    """Forecast of `cache-teacher` on one device."""

    num_records: int
    cache_bytes: float
    codec_bytes: Mapping[str, float]  # of the whole cache, by codec setting
    main: Cost  # of one view: teacher, encode, audit, write
    per_view: Joined
    views_per_s: float
    seconds: float
    loader_cores: float  # that keep the teacher fed


@dataclass(frozen=True)
class Training:
    """Forecast of one `train-student`; what needs the teacher is None where no teacher was measured.

    Attributes:
        views: that the student sees.
        epochs: the same in passes over the images.
        views_per_s: of all ranks, with the cache.
        cached_s, online_s: wall time with the cache, and with the teacher beside the student.
        records_read_per_view: by a loader, because units are read whole, and by every worker.
        read_bytes_per_s: of all ranks, at the forecast speed.
        loader_cores: of one rank, that keep the student fed; infinite where reading alone takes too long.
        pays_from_trainings: the fewest such trainings for which cache and trainings take less device time than
            training them with the teacher; None: never.
        pays_from_epochs: the same for one training, in epochs.
    """

    name: str
    views: int
    epochs: float
    ranks: int
    per_view: Joined
    online_per_view: Joined | None
    views_per_s: float
    cached_s: float
    online_s: float | None
    records_read_per_view: float
    read_bytes_per_s: float
    loader_cores: float
    pays_from_trainings: int | None
    pays_from_epochs: int | None


@dataclass(frozen=True)
class Verdict:
    """Whether to cache, for `trainings` of every student named; None: too little was named to say."""

    cache: bool | None
    why: str
    trainings: int
    cached_device_s: float | None = None
    online_device_s: float | None = None
    storage_per_month: float | None = None
    saved: float | None = None  # in the currency of the prices


@dataclass(frozen=True)
class Forecast:
    """All of it."""

    stage_one: StageOne | None
    trainings: Sequence[Training]
    verdict: Verdict


def overlapped(main: Cost, input_s: float, workers: int, cores: int) -> Joined:
    """Seconds per view of a process that runs models while `workers` processes load.

    The slowest of three decides: the models; the loaders, each on a core of its own; or all cores of the machine
    together, where models and loaders want more of them than there are. Without workers one follows the other.
    """
    if workers == 0:
        return Joined(main.seconds + input_s, "models" if main.seconds >= input_s else "loading")
    limits = {
        "models": main.seconds,
        "loading": input_s / workers,
        "cores": (main.seconds * main.cores + input_s) / cores,
    }
    waits_for = max(limits, key=lambda name: limits[name])
    return Joined(limits[waits_for], waits_for)


def pays_from(once_s: float, saved_s: float) -> int | None:
    """The smallest n with once + n x with < n x without, where saved = without - with; None: there is none."""
    return math.floor(once_s / saved_s) + 1 if saved_s > 0 else None


def forecast_stage_one(costs: TeacherCosts, cores: int) -> StageOne:
    """Stage one on one device: every view once, a unit's audit and commit included."""
    records = costs.num_images * costs.num_views
    audited = costs.audit_views * costs.num_units / records if records else 0.0
    main = costs.teacher + costs.encode + costs.audit.times(min(audited, 1.0)) + costs.write
    per_view = overlapped(main, costs.decode_s, costs.workers, cores)
    return StageOne(
        num_records=records,
        cache_bytes=records * costs.record_bytes,
        codec_bytes={name: records * size for name, size in costs.codec_bytes.items()},
        main=main,
        per_view=per_view,
        views_per_s=1 / per_view.seconds,
        seconds=costs.start_s + records * per_view.seconds,
        loader_cores=costs.decode_s / main.seconds,
    )


def forecast_training(
    costs: StudentCosts, cores: int, teacher: Cost | None = None, stage_one_s: float | None = None
) -> Training:
    """One training with the cache, and with the teacher online: the same student behind the teacher's forward pass.

    Online costs teacher + student, and decodes views without reading records; the student's step is taken to be the
    same, which favours the online side where its target is dense.
    """
    views = costs.steps * costs.batch_size
    epochs = views / costs.num_images
    whole_units = max(costs.unit_views / costs.views_per_decode, 1.0)
    amplified = whole_units * max(costs.workers, 1)
    per_view = overlapped(costs.step, costs.replay_s + amplified * costs.read_s, costs.workers, cores)
    views_per_s = costs.ranks / per_view.seconds
    cached_s = costs.start_s + views / views_per_s
    online = None if teacher is None else overlapped(teacher + costs.step, costs.draw_s, costs.workers, cores)
    online_s = None if online is None else costs.start_s + views * online.seconds / costs.ranks
    # W loaders feed the student where W / (replay + W x whole units x read) is at least the student's rate.
    left = costs.step.seconds - whole_units * costs.read_s
    saved_s = None if online_s is None else (online_s - cached_s) * costs.ranks
    return Training(
        name=costs.name,
        views=views,
        epochs=epochs,
        ranks=costs.ranks,
        per_view=per_view,
        online_per_view=online,
        views_per_s=views_per_s,
        cached_s=cached_s,
        online_s=online_s,
        records_read_per_view=amplified,
        read_bytes_per_s=views_per_s * amplified * costs.record_bytes,
        loader_cores=costs.replay_s / left if left > 0 else math.inf,
        pays_from_trainings=None if saved_s is None or stage_one_s is None else pays_from(stage_one_s, saved_s),
        pays_from_epochs=None if saved_s is None or stage_one_s is None else pays_from(stage_one_s, saved_s / epochs),
    )


def judge(
    stage_one: StageOne | None,
    students: Sequence[Training],
    trainings: int = 1,
    per_gb_month: float = 0.0,
    per_device_hour: float | None = None,
) -> Verdict:
    """By device time, and where an hour of a device has a price also by money: a month of storage against it.

    Args:
        stage_one: None: it was not measured.
        students: the trainings named.
        trainings: how often each of them will be trained.
        per_gb_month: price of 1e9 bytes for a month.
        per_device_hour: in the same currency.
    """
    storage = None if stage_one is None else stage_one.cache_bytes / GB * per_gb_month
    if stage_one is None:
        return Verdict(None, "name the cache-teacher recipe too: the teacher was not measured", trainings)
    if not students:
        return Verdict(
            None, "name the train-student recipes too: without them nothing is saved", trainings, None, None, storage
        )
    cached = stage_one.seconds + trainings * sum(each.cached_s * each.ranks for each in students)
    online = trainings * sum((each.online_s or 0.0) * each.ranks for each in students)
    saved = None if per_device_hour is None else (online - cached) / 3600 * per_device_hour
    if cached >= online:
        why = "the teacher's pass and the trainings take no less device time than training with the teacher beside"
        return Verdict(False, why, trainings, cached, online, storage, saved)
    assert storage is not None
    if saved is not None and saved <= storage:
        why = "a month of storage costs more than the device hours that it saves"
        return Verdict(False, why, trainings, cached, online, storage, saved)
    why = f"it takes {cached / online:.0%} of the device time of training with the teacher beside"
    return Verdict(True, why, trainings, cached, online, storage, saved)


def forecast(
    teacher: TeacherCosts | None,
    students: Sequence[StudentCosts],
    cores: int,
    trainings: int = 1,
    per_gb_month: float = 0.0,
    per_device_hour: float | None = None,
) -> Forecast:
    """Everything that follows from the measurements; arguments as of `judge`, `cores` those of this machine."""
    one = None if teacher is None else forecast_stage_one(teacher, cores)
    forward = None if teacher is None else teacher.teacher
    each = [forecast_training(costs, cores, forward, None if one is None else one.seconds) for costs in students]
    return Forecast(one, each, judge(one, each, trainings, per_gb_month, per_device_hour))
