"""The arithmetic of `tinymim plan`, against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest

from tinymim.stages.planning.forecast import (
    InLoop,
    Overlap,
    StudentCosts,
    TeacherCosts,
    break_even,
    forecast,
    forecast_stage_one,
    forecast_training,
    overlapped,
)
from tinymim.stages.planning.teacher import as_record

# 1,000 images x 4 views; the teacher takes 10 ms a view, the student 2 ms.
PHASES = {
    "decode": 0.004,
    "teacher": 0.010,
    "encode": 0.0008,
    "digest": 0.0002,
    "audit": 0.1,
    "write": 5e-4,
    "read": 5e-5,
}
TEACHER = TeacherCosts(
    num_images=1000,
    num_views=4,
    num_units=2,
    audit_views=20,
    workers=2,
    phase_s=PHASES,
    cores=1.0,
    codec_bytes={"own": 5000, "dense": 2.5e6},
)
STUDENT = StudentCosts(
    name="tiny",
    num_images=1000,
    steps=100,
    batch_size=50,
    ranks=1,
    workers=4,
    views_per_decode=1,
    step_s=0.002,
    cores=1.0,
    replay_s=0.003,
)


def test_the_slowest_of_models_loaders_and_cores_decides() -> None:
    assert overlapped(5.0, 1.0, 4.0, workers=2, cores=8).limited_by == "models"
    assert overlapped(5.0, 1.0, 4.0, workers=2, cores=8).seconds == 5.0
    loading = overlapped(1.0, 1.0, 6.0, workers=2, cores=8)
    assert (loading.seconds, loading.limited_by) == (3.0, "loading")
    # 2 cores: the models keep both busy for 5 s, the loader wants 4 core-seconds more: (10 + 4) / 2
    cores = overlapped(5.0, 2.0, 4.0, workers=1, cores=2)
    assert (cores.seconds, cores.limited_by) == (7.0, "cores")


def test_without_workers_one_follows_the_other() -> None:
    both = overlapped(5.0, 2.0, 4.0, workers=0, cores=64)
    assert (both.seconds, both.limited_by) == (9.0, "models")
    assert overlapped(1.0, 1.0, 4.0, workers=0, cores=64).limited_by == "loading"


def test_stage_one_counts_every_view_once_and_its_audit_and_commit() -> None:
    one = forecast_stage_one(TEACHER, cores=16)
    # 2 units x 20 audited of 4,000 views: a hundredth of 100 ms beside 10 + 0.8 + 0.2 + 0.5 ms
    assert one.per_view.seconds == pytest.approx(0.0125) and one.per_view.limited_by == "models"
    assert one.seconds == pytest.approx(4000 * 0.0125)
    assert one.codec_bytes == {"own": 20e6, "dense": 10e9}
    assert one.loader_cores == pytest.approx(0.004 / 0.0125)


def test_a_training_run_reads_one_record_a_view_whatever_the_unit_and_the_workers() -> None:
    training = forecast_training(STUDENT, TEACHER, 56.0, cores=16)
    # loading: 3 ms / 4 = 0.75 ms, less than the student's 2 ms; reading beside it
    assert (training.per_view.seconds, training.per_view.limited_by) == (0.002, "models")
    assert training.views == 5000 and training.epochs == 5
    assert training.cached_s == pytest.approx(5000 * 0.002)
    alone = forecast_training(replace(STUDENT, workers=0), TEACHER, 56.0, cores=16)
    assert alone.per_view.seconds == pytest.approx(0.002 + 0.003 + 5e-5)
    assert forecast_training(STUDENT, replace(TEACHER, num_views=300), 56.0, cores=16).per_view == training.per_view


def test_reading_has_threads_of_its_own_and_takes_its_share_of_the_cores() -> None:
    assert overlapped(1.0, 1.0, 4.0, workers=4, cores=64, read_s=3.0) == Overlap(3.0, "loading")
    assert overlapped(1.0, 1.0, 4.0, workers=4, cores=2, read_s=3.0) == Overlap(4.0, "cores")


def test_the_loader_cores_named_are_enough_and_fewer_are_not() -> None:
    fast = replace(STUDENT, step_s=0.0008)
    cores = forecast_training(fast, TEACHER, 56.0, cores=64).loader_cores
    assert cores == pytest.approx(0.003 / 0.0008)  # 3.75

    def limited_by(workers: int) -> str:
        return forecast_training(replace(fast, workers=workers), TEACHER, 56.0, cores=64).per_view.limited_by

    assert limited_by(math.ceil(cores)) == "models" and limited_by(math.floor(cores)) == "loading"


def test_online_is_teacher_and_student_and_decoding_without_records() -> None:
    training = forecast_training(STUDENT, TEACHER, 56.0, cores=16)
    assert training.online_s == pytest.approx(5000 * 0.012)
    # One run saves 60 - 10 = 50 s of the 56 that the cache takes, an epoch 10 s.
    assert training.break_even_runs == 2
    assert training.break_even_epochs == 6


def test_online_keeps_the_cores_of_both_busy() -> None:
    # 10 ms of two cores and 2 ms of one, on two cores, beside 3 ms of decoding: (20 + 2 + 3) / 2
    training = forecast_training(STUDENT, replace(TEACHER, cores=2.0), 56.0, cores=2)
    assert training.online_per_view.seconds == pytest.approx(0.0125)
    assert training.online_per_view.limited_by == "cores"


def test_many_ranks_train_faster_and_break_even_is_in_device_time() -> None:
    training = forecast_training(replace(STUDENT, ranks=4), TEACHER, 56.0, cores=16)
    assert training.cached_s == pytest.approx(5000 * 0.002 / 4)
    assert training.online_s == pytest.approx(5000 * 0.012 / 4)
    assert training.break_even_runs == 2  # 12.5 s less on each of 4 devices: 50 s


@pytest.mark.parametrize(("once", "saved", "n"), [(10, 4, 3), (10, 5, 3), (10, 20, 1), (10, 0, None), (10, -1, None)])
def test_break_even_is_the_smallest_number_that_takes_less(once: float, saved: float, n: int | None) -> None:
    assert break_even(once, saved) == n
    if n is not None:
        assert once < n * saved and not once < (n - 1) * saved


def test_never_is_an_answer() -> None:
    # The student waits for its loaders in both cases.
    bound = replace(STUDENT, workers=1, replay_s=0.050)
    training = forecast_training(bound, TEACHER, 56.0, cores=16)
    assert training.per_view.limited_by == "loading"
    assert training.break_even_runs is None and training.break_even_epochs is None


def test_the_verdict_counts_all_training_runs_and_may_be_no() -> None:
    short = replace(STUDENT, steps=80)
    once = forecast(TEACHER, [short], cores=16, trainings=1)
    assert once.cache is False  # 50 + 8 s against 48
    assert once.cached_device_s == pytest.approx(58) and once.online_device_s == pytest.approx(48)
    assert forecast(TEACHER, [short], cores=16, trainings=2).cache is True
    assert forecast(TEACHER, [short, short], cores=16, trainings=1).cache is True


def test_the_verdict_counts_every_device() -> None:
    four = forecast(TEACHER, [replace(STUDENT, ranks=4)], cores=16, trainings=1)
    assert four.cached_device_s == pytest.approx(50 + 4 * 2.5) and four.online_device_s == pytest.approx(4 * 15)


def test_without_a_student_there_is_no_verdict() -> None:
    alone = forecast(TEACHER, [], cores=4, trainings=1)
    assert alone.cache is None and alone.stage_one.seconds > 0


def test_a_codec_s_record_has_a_size_also_where_units_compress_better_than_samples() -> None:
    assert as_record(300.0, 100.0, 120.0) == 320.0  # a unit adds 20 bytes
    assert as_record(100.0, 100.0, 60.0) == 60.0
    assert as_record(20.0, 100.0, 60.0) == 12.0  # the difference of the two would be negative


def test_a_teacher_in_the_loop_takes_its_share_of_the_views_and_of_what_a_cache_saves() -> None:
    loop = InLoop(share=0.25, step_s=0.014, cores=3.0, layers=[], weights_bytes=1, pass_views=64, pass_bytes=None)
    training = forecast_training(replace(STUDENT, in_loop=loop), TEACHER, 56.0, cores=16)
    # 3/4 x 2 ms + 1/4 x 14 ms; online is as without a cache: 12 ms
    assert training.per_view.seconds == pytest.approx(0.005) and training.per_view.limited_by == "models"
    assert training.cached_s == pytest.approx(5000 * 0.005) and training.online_s == pytest.approx(5000 * 0.012)
    assert training.break_even_runs == 2  # 35 s less a run, of 56
    # Without workers: replay, and reading for the views that are read.
    alone = forecast_training(replace(STUDENT, in_loop=loop, workers=0), TEACHER, 56.0, cores=16)
    assert alone.per_view.seconds == pytest.approx(0.005 + 0.003 + 0.75 * 5e-5)
    # On two cores: (1.5 ms x 1 + 3.5 ms x 3 + 3 ms + read) / 2
    busy = forecast_training(replace(STUDENT, in_loop=loop), TEACHER, 56.0, cores=2)
    assert busy.per_view.seconds == pytest.approx((0.0015 + 0.0105 + 0.003 + 0.75 * 5e-5) / 2)
    all_new = forecast_training(replace(STUDENT, in_loop=replace(loop, share=1.0)), TEACHER, 56.0, cores=16)
    assert all_new.break_even_runs is None
