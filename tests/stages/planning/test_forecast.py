"""The arithmetic of `tinymim plan`, against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest

from tinymim.stages.planning.forecast import (
    Cost,
    StudentCosts,
    TeacherCosts,
    forecast,
    forecast_stage_one,
    forecast_training,
    judge,
    overlapped,
    pays_from,
)

# 1,000 images x 4 views; the teacher takes 10 ms a view, the student 1 ms.
TEACHER = TeacherCosts(
    num_images=1000,
    num_views=4,
    num_units=2,
    audit_views=20,
    workers=2,
    decode_s=0.004,
    teacher=Cost(0.010, 1.0),
    encode=Cost(0.001, 1.0),
    audit=Cost(0.100, 1.0),
    write=Cost(0.0005, 1.0),
    record_bytes=5000,
    codec_bytes={"own": 5000, "dense": 2.5e6},
    start_s=6.0,
)
STUDENT = StudentCosts(
    name="tiny",
    num_images=1000,
    steps=100,
    batch_size=50,
    ranks=1,
    workers=4,
    views_per_decode=1,
    unit_views=4,
    step=Cost(0.002, 1.0),
    replay_s=0.003,
    draw_s=0.0025,
    read_s=0.00005,
    record_bytes=5000,
    start_s=1.0,
)


def test_costs_one_after_the_other_keep_their_busy_cores() -> None:
    both = Cost(1.0, 2.0) + Cost(3.0, 1.0)
    assert both == Cost(4.0, 5 / 4)
    assert Cost(2.0, 1.5).times(0.5) == Cost(1.0, 1.5)
    assert Cost(0.0) + Cost(0.0) == Cost(0.0, 1.0)


def test_the_slowest_of_models_loaders_and_cores_decides() -> None:
    assert overlapped(Cost(5.0), 4.0, workers=2, cores=8).waits_for == "models"
    assert overlapped(Cost(5.0), 4.0, workers=2, cores=8).seconds == 5.0
    loading = overlapped(Cost(1.0), 6.0, workers=2, cores=8)
    assert (loading.seconds, loading.waits_for) == (3.0, "loading")
    # 2 cores: the models keep both busy for 5 s, the loader wants 4 core-seconds more: (10 + 4) / 2
    cores = overlapped(Cost(5.0, 2.0), 4.0, workers=1, cores=2)
    assert (cores.seconds, cores.waits_for) == (7.0, "cores")


def test_without_workers_one_follows_the_other() -> None:
    joined = overlapped(Cost(5.0, 2.0), 4.0, workers=0, cores=64)
    assert (joined.seconds, joined.waits_for) == (9.0, "models")
    assert overlapped(Cost(1.0), 4.0, workers=0, cores=64).waits_for == "loading"


def test_stage_one_counts_every_view_once_and_its_audit_and_commit() -> None:
    one = forecast_stage_one(TEACHER, cores=16)
    # 2 units x 20 audited of 4,000 views: a hundredth of 100 ms
    assert one.main.seconds == pytest.approx(0.010 + 0.001 + 0.001 + 0.0005)
    assert one.per_view.waits_for == "models"
    assert one.seconds == pytest.approx(6.0 + 4000 * 0.0125)
    assert one.views_per_s == pytest.approx(80)
    assert one.cache_bytes == 4000 * 5000
    assert one.codec_bytes == {"own": 20e6, "dense": 10e9}
    assert one.loader_cores == pytest.approx(0.004 / 0.0125)


def test_a_training_reads_whole_units_in_every_worker() -> None:
    training = forecast_training(STUDENT, cores=16)
    assert training.records_read_per_view == 16  # 4 views of a unit for the one in use, by 4 workers
    # loading: (3 ms + 16 x 0.05 ms) / 4 = 0.95 ms, less than the student's 2 ms
    assert (training.per_view.seconds, training.per_view.waits_for) == (0.002, "models")
    assert training.views == 5000 and training.epochs == 5
    assert training.cached_s == pytest.approx(1 + 5000 * 0.002)
    assert training.read_bytes_per_s == pytest.approx(500 * 16 * 5000)
    assert training.online_s is None and training.pays_from_trainings is None


def test_the_loader_cores_named_are_enough_and_fewer_are_not() -> None:
    fast = replace(STUDENT, step=Cost(0.001))
    cores = forecast_training(fast, cores=64).loader_cores
    assert cores == pytest.approx(0.003 / (0.001 - 4 * 0.00005))  # 3.75

    def waits_for(workers: int) -> str:
        return forecast_training(replace(fast, workers=workers), cores=64).per_view.waits_for

    assert waits_for(math.ceil(cores)) == "models" and waits_for(math.floor(cores)) == "loading"


def test_no_number_of_loaders_is_enough_where_reading_alone_takes_too_long() -> None:
    # 300 views in a unit of which one is used: 15 ms of reading per view in every worker
    slow = replace(STUDENT, unit_views=300)
    assert forecast_training(slow, cores=64).loader_cores == math.inf
    assert forecast_training(replace(slow, views_per_decode=300), cores=64).loader_cores < 2


def test_views_of_one_decode_share_the_reading() -> None:
    assert forecast_training(replace(STUDENT, views_per_decode=4), cores=16).records_read_per_view == 4
    assert forecast_training(replace(STUDENT, workers=0), cores=16).records_read_per_view == 4
    # Units that hold fewer views than one decode serves are read whole, and nothing else is.
    assert forecast_training(replace(STUDENT, views_per_decode=4, unit_views=2), cores=16).records_read_per_view == 4


def test_online_is_teacher_and_student_and_decoding_without_records() -> None:
    training = forecast_training(STUDENT, cores=16, teacher=Cost(0.010), stage_one_s=56.0)
    assert training.online_s == pytest.approx(1 + 5000 * 0.012)
    # One training saves 61 - 11 = 50 s of the 56 that the cache takes, an epoch 10 s.
    assert training.pays_from_trainings == 2
    assert training.pays_from_epochs == 6


def test_many_ranks_train_faster_and_break_even_is_in_device_time() -> None:
    training = forecast_training(replace(STUDENT, ranks=4), 16, teacher=Cost(0.010), stage_one_s=56.0)
    assert training.cached_s == pytest.approx(1 + 5000 * 0.002 / 4)
    assert training.online_s == pytest.approx(1 + 5000 * 0.012 / 4)
    assert training.pays_from_trainings == 2  # (16 - 3.5) s x 4 devices = 50 s


@pytest.mark.parametrize(("once", "saved", "n"), [(10, 4, 3), (10, 5, 3), (10, 20, 1), (10, 0, None), (10, -1, None)])
def test_pays_from_is_the_smallest_number_that_is_cheaper(once: float, saved: float, n: int | None) -> None:
    assert pays_from(once, saved) == n
    if n is not None:
        assert once < n * saved and not once < (n - 1) * saved


def test_never_is_an_answer() -> None:
    # The student waits for its loaders in both cases, and the cache's records make them slower.
    bound = replace(STUDENT, workers=1, replay_s=0.050, draw_s=0.049)
    training = forecast_training(bound, cores=16, teacher=Cost(0.010), stage_one_s=56.0)
    assert training.per_view.waits_for == "loading"
    assert training.pays_from_trainings is None and training.pays_from_epochs is None


def test_the_verdict_counts_all_trainings_and_may_be_no() -> None:
    once = forecast(TEACHER, [STUDENT], cores=16)
    assert once.verdict.cache is False  # 56 + 11 s against 61
    assert once.verdict.cached_device_s == pytest.approx(67) and once.verdict.online_device_s == pytest.approx(61)
    assert forecast(TEACHER, [STUDENT], cores=16, trainings=2).verdict.cache is True
    assert forecast(TEACHER, [STUDENT, STUDENT], cores=16).verdict.cache is True


def test_money_is_weighed_only_where_device_hours_have_a_price() -> None:
    one = forecast_stage_one(TEACHER, cores=16)
    students = [forecast_training(STUDENT, 16, TEACHER.teacher, one.seconds)]
    # 0.02 GB; two trainings save 122 - 78 = 44 s of a device
    dear = judge(one, students, trainings=2, per_gb_month=1.0)
    assert dear.cache is True and dear.storage_per_month == pytest.approx(0.02) and dear.saved is None
    dear = judge(one, students, trainings=2, per_gb_month=1.0, per_device_hour=1.0)
    assert dear.saved == pytest.approx(44 / 3600)
    assert dear.cache is False and "storage" in dear.why  # 0.012 saved, 0.02 a month
    assert judge(one, students, trainings=2, per_gb_month=1.0, per_device_hour=3.0).cache is True


def test_half_of_the_recipes_gives_half_of_the_answer() -> None:
    alone = forecast(TEACHER, [], cores=4)
    assert alone.verdict.cache is None and "train-student" in alone.verdict.why
    alone = forecast(None, [STUDENT], cores=4)
    assert alone.stage_one is None and alone.verdict.cache is None and "cache-teacher" in alone.verdict.why
    assert alone.trainings[0].online_s is None and alone.trainings[0].cached_s > 0
