"""Training states: whole or absent, the newest that is intact, no more of them than wanted."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tinymim.configs.errors import CheckpointError, UserError
from tinymim.stages.training.states import (
    drop_states,
    dump_state,
    load_states,
    newest_payloads,
    prune_states,
    read_state,
    save_state,
    state_path,
    write_state,
)
from tinymim.storage.identity import Identity

ID = Identity("id", {"optim": {"steps": 1, "base_lr": 0.1}, "data": {"0": "weights 12"}})


def model_of(value: float) -> nn.Linear:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    return model


def save(folder: Path, *steps: int) -> None:
    """States whose weights are all the number of their step."""
    folder.mkdir(exist_ok=True)
    for step in steps:
        save_state(folder, step, ID, {"model": model_of(step)})


def load(*folders: Path, identity: Identity = ID) -> tuple[int, list[Tensor]]:
    models = [model_of(-1) for _ in folders]
    step = load_states(folders, [identity] * len(folders), [{"model": model} for model in models])
    return step, [model.weight.detach() for model in models]


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def steps_in(folder: Path) -> Sequence[int]:
    return sorted(int(path.stem.removeprefix("state-")) for path in folder.glob("state-*.pt"))


def test_nothing_saved_is_step_0(tmp_path: Path) -> None:
    assert load(tmp_path)[0] == 0 and newest_payloads([tmp_path]) is None
    with pytest.raises(CheckpointError, match="no training state"):
        read_state(tmp_path)


def test_the_newest_is_loaded_by_number_and_not_by_name(tmp_path: Path) -> None:
    save(tmp_path, 9, 100_000_000, 20_000_000)
    step, (weight,) = load(tmp_path)
    assert step == 100_000_000 and bool((weight == step).all())


def test_so_many_are_kept_and_leftovers_of_a_kill_are_not(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4)
    (tmp_path / "state-00000005.pt.123.partial").write_bytes(b"cut")
    (tmp_path / "state.pt").write_bytes(b"of an old run")
    prune_states(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-00000003.pt", "state-00000004.pt"]


def test_a_damaged_one_falls_back_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, 2, 3)
    damage(state_path(tmp_path, 3))
    state_path(tmp_path, 2).write_bytes(b"")
    step, (weight,) = load(tmp_path)
    assert step == 1 and bool((weight == 1).all())
    assert capsys.readouterr().err.count("is damaged (its digest differs); using the state before it") == 2
    damage(state_path(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"state-00000003\.pt is damaged"):
        load(tmp_path)


def test_students_go_on_from_the_newest_step_that_all_have_intact(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    save(one, 1, 2, 3, 4)
    save(other, 1, 2, 3)
    damage(state_path(other, 3))
    step, weights = load(one, other)
    assert step == 2 and all(bool((weight == 2).all()) for weight in weights)
    assert load(one, tmp_path / "new")[0] == 0


def test_an_old_runs_only_state_still_loads_after_those_with_a_number(tmp_path: Path) -> None:
    save(tmp_path, 7)
    state_path(tmp_path, 7).rename(tmp_path / "state.pt")
    assert load(tmp_path)[0] == 7 and read_state(tmp_path)["step"] == 7
    save(tmp_path, 8)
    assert load(tmp_path)[0] == 8
    damage(state_path(tmp_path, 8))
    assert load(tmp_path)[0] == 7


def test_another_recipes_state_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    other = Identity("other", {"optim": {"steps": 2, "base_lr": 0.1, "clip_norm": 1.0}, "data": {"0": "weights 34"}})
    with pytest.raises(CheckpointError, match="another recipe or other data: 3 field") as caught:
        load(tmp_path, identity=other)
    assert caught.value.got == ("data.0 = 'weights 12'; optim.clip_norm = '(absent)'; optim.steps = 1 (stored)")
    assert caught.value.expected == "data.0 = 'weights 34'; optim.clip_norm = 1.0; optim.steps = 2 (wanted)"


def test_a_state_of_an_older_version_is_refused_by_its_digest(tmp_path: Path) -> None:
    write_state(state_path(tmp_path, 1), {"step": 1, "identity": "id", "parts": {"model": model_of(1).state_dict()}})
    assert load(tmp_path)[0] == 1
    with pytest.raises(CheckpointError, match="another recipe or other data\n") as caught:
        load(tmp_path, identity=Identity("other", {"optim": {}}))
    assert (caught.value.got, caught.value.expected) == ("id", "other")


@pytest.mark.parametrize(("first_step", "left"), [(0, [6]), (4, [2, 4, 6]), (5, [2, 4, 6])])
def test_states_that_a_run_did_not_go_on_from_are_dropped(tmp_path: Path, first_step: int, left: list[int]) -> None:
    save(tmp_path, 2, 4, 6, 8)
    (tmp_path / "state.pt").write_bytes(b"of an old run")
    drop_states(tmp_path, first_step, but=6)
    assert steps_in(tmp_path) == left
    assert (tmp_path / "state.pt").exists() == (first_step > 0)


def test_a_state_with_a_broken_parameter_is_not_saved_but_may_be_dumped(tmp_path: Path) -> None:
    model = model_of(1)
    with torch.no_grad():
        model.weight[0, 0] = torch.inf
    with pytest.raises(UserError, match="after step 2"):
        save_state(tmp_path, 2, ID, {"model": model})
    assert not list(tmp_path.iterdir())
    dump_state(tmp_path / "folder" / "dump.pt", 2, ID, {"model": model}, {"ranks": [1]})
    assert (tmp_path / "folder" / "dump.pt").exists() and load(tmp_path / "folder")[0] == 0
