"""A model in training: watched losses, weighted parts, the moving average, the identity of its states."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinymim.configs.errors import UserError
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.configs.sections.loader import OrderConfig
from tinymim.pipeline.order import SampleOrder
from tinymim.stages.run.interrupt import StopFlag
from tinymim.stages.run.progress import Meter
from tinymim.stages.training.bookkeeping import Bookkeeping
from tinymim.stages.training.learner import NEVER, Learner, LossWatch, _Seen
from tinymim.stages.training.optim import state_identity
from tinymim.stages.training.ranks import Ranks
from tinymim.tests.stages.tiny import STUDENT, student_recipe


def learner_of(root: Path, **changes: Any) -> Learner:
    module = nn.Linear(3, 1, bias=False)
    nn.init.ones_(module.weight)
    recipe = student_recipe(root, **{"optim": {"batch_size": 8, "steps": 20, "base_lr": 8, "warmup": 0}} | changes)
    return Learner("", "", recipe, "student", module, (), Ranks(), SampleOrder([16], OrderConfig(), 8, 1), [])


def squares(learner: Learner, inputs: Tensor) -> Tensor:
    out: Tensor = learner.model(inputs).square().mean()
    return out


def test_the_first_broken_loss_is_found_and_stays_found() -> None:
    watch = LossWatch(torch.device("cpu"))
    for step, value in enumerate([1.0, 2.0, float("nan"), float("inf"), 1.0]):
        watch.note(step, torch.tensor(value))
        assert watch.first_broken(wait=False) == (2 if step >= 2 else NEVER)


class Late:
    """The event of a step that a GPU has not come to yet."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None: ...


def test_a_step_that_the_gpu_has_not_come_to_is_waited_for_only_when_asked() -> None:
    watch = LossWatch(torch.device("cpu"))
    watch._seen = [_Seen(3, torch.tensor(False), Late())]
    assert watch.first_broken(wait=False) == NEVER
    assert watch.first_broken(wait=True) == 3


def test_the_first_broken_step_is_named_though_a_later_one_was_seen_first(tmp_path: Path) -> None:
    run = {"folder": tmp_path / "run", "device": "cpu", "log_every": 100}
    seen, late = learner_of(tmp_path, run=run), learner_of(tmp_path / "late", run=run | {"folder": tmp_path / "late"})
    seen.watch.note(5, torch.tensor(torch.nan))
    late.watch._seen = [_Seen(4, torch.tensor(False), Late())]
    books = Bookkeeping(
        seen.recipe, [seen, late], Ranks(), SampleOrder([16], OrderConfig(), 8, 1), ["s"], "views_per_s"
    )
    with pytest.raises(UserError, match="not finite at step 4"):
        books.end_step(6, StopFlag(), Meter("", 20, "steps"))
    assert [path.name for path in (tmp_path / "late").iterdir()] == ["not-finite-00000004.pt"]


def test_parts_add_up_to_the_gradient_and_the_losses_of_the_whole(tmp_path: Path) -> None:
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    whole, parts = learner_of(tmp_path), learner_of(tmp_path)
    with whole.part_of_step(first=True, last=True):
        whole.backward({"loss": squares(whole, inputs)}, 1.0)
    for rows in (slice(0, 2), slice(2, 8)):
        with parts.part_of_step(first=rows.start == 0, last=rows.stop == 8):
            parts.backward({"loss": squares(parts, inputs[rows])}, (rows.stop - rows.start) / 8)
    gradients = [learner.module.weight.grad for learner in (whole, parts)]
    assert isinstance(gradients[0], Tensor) and isinstance(gradients[1], Tensor)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert parts.means() == pytest.approx(whole.means())


def test_the_average_is_the_exponential_one_of_the_weights_after_each_step(tmp_path: Path) -> None:
    learner = learner_of(tmp_path, ema={"decay": 0.9, "warmup": False})
    assert learner.ema is not None
    averaged: Any = learner.ema.module
    trained: Any = learner.module
    seen, expected = [], None
    for step in range(4):
        with learner.part_of_step(True, True):
            learner.backward({"loss": squares(learner, torch.ones(8, 3))}, 1.0)
        learner.update(step)
        seen.append(trained.weight.detach().clone())
        expected = seen[0] if expected is None else 0.9 * expected + 0.1 * seen[-1]
        torch.testing.assert_close(averaged.weight, expected)
    assert not torch.allclose(seen[0], seen[-1])


def test_a_rising_decay_follows_the_weights_at_first(tmp_path: Path) -> None:
    learner = learner_of(tmp_path, ema={"decay": 0.9999})
    assert learner.ema is not None
    decays = [learner.ema.get_decay(step + 1) for step in range(1000)]
    assert decays[:2] == [0.0, pytest.approx(1 - 2 ** (-2 / 3))] and decays == sorted(decays) and decays[-1] > 0.98


class WithUnused(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 1, bias=False)
        self.never = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "module", [nn.Linear(3, 1, bias=False), WithUnused()], ids=lambda module: type(module).__name__
)
def test_a_model_with_parameters_that_nothing_uses_trains_on_ranks_too(tmp_path: Path, module: nn.Linear) -> None:
    nn.init.ones_(module.weight)
    recipe = student_recipe(tmp_path, optim={"batch_size": 8, "steps": 20, "base_lr": 8, "warmup": 0})
    order = SampleOrder([16], OrderConfig(), 8, 1)
    learner = Learner("", "", recipe, "student", module, (torch.zeros(2, 3),), Ranks(0, 2), order, [])
    alone = learner_of(tmp_path)
    store = tmp_path / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)  # DDP needs some group
    try:
        learner.distribute()
        assert learner.model is not module and learner.model.training and module.weight.grad is None
        for step in range(3):
            for each in (learner, alone):
                with each.part_of_step(True, True):
                    each.backward({"loss": squares(each, torch.ones(8, 3))}, 1.0)
                each.update(step)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(module.weight, alone.module.weight)


FREE: list[dict[str, Any]] = [
    {"workers": 1, "max_restarts": 0},
    {"loader": {"workers": 3}},
    {"checkpoint": {"every_steps": 7, "keep": 5, "resume": False}},
    {"optim": {"batch_size": 8, "steps": 20, "base_lr": 0.1, "warmup": 0.2, "accumulate": 2}},
]


@pytest.mark.parametrize("changes", FREE, ids=str)
def test_what_changes_no_number_may_change_at_resume(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert state_identity(student_recipe(tmp_path, **changes), []) == state_identity(student_recipe(tmp_path), [])


@pytest.mark.parametrize("changes", [{"ema": {}}, {"drop_path": 0.2}, {"order": {"lanes": 2}}], ids=str)
def test_what_changes_numbers_changes_the_identity(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert state_identity(student_recipe(tmp_path, **changes), []) != state_identity(student_recipe(tmp_path), [])


def test_a_state_from_before_there_were_ranks_has_the_same_identity(tmp_path: Path) -> None:
    """Fields that came since are no part of it while they are not used; this digest is of version 0.1's recipe."""
    recipe = TrainStudentRecipe.model_validate(
        {
            "stage": "train-student",
            "source": {"shards": "s"},
            "cache": "c",
            "student": STUDENT,
            "optim": {"steps": 1},
            "run": {"folder": "r"},
        }
    )
    assert state_identity(recipe, ["x"]).digest == "ce86321c862414dc2522ed2ac056cd3e"
