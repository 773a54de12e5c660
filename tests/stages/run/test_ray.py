"""Joining a cluster that is not there: said at once, by what the user named."""

import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import ray

from tinymim.configs.errors import RecipeError
from tinymim.stages.run.ray import join_ray
from tinymim.stages.training.start_ray import RayStart
from tinymim.tests.stages.tiny import student_recipe


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address at which nobody answers; Ray itself, which would try for minutes, must not be asked."""

    def init(**settings: Any) -> NoReturn:
        raise AssertionError(f"Ray was asked: {settings}")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as taken:  # bound, not listening: the port stays ours until the test has its number
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_answers_is_refused_at_once(nobody: str, scheme: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot join the Ray cluster: .*refused") as caught:
        join_ray(scheme + nobody)
    assert caught.value.got == scheme + nobody and "ray start --head" in str(caught.value.hint)


def test_a_training_says_what_ray_address_names(nobody: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.train.torch", exc_type=ImportError, reason="Ray Train is not installed")
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    with pytest.raises(RecipeError, match="cannot join the Ray cluster") as caught:
        RayStart(student_recipe(tmp_path, cluster="ray"))
    assert caught.value.got == nobody


@pytest.mark.parametrize(
    ("address", "environment", "asked"),
    [("auto", None, None), ("auto", "auto", None), ("local", "10.0.0.1:1", "local")],
)
def test_what_names_no_host_is_left_to_ray(
    address: str, environment: str | None, asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(ray, "init", lambda **settings: calls.append(settings["address"]))
    if environment is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    join_ray(address)
    assert calls == [asked]
