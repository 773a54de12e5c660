"""Anything in the files of a run ends in an error of ours or is passed over; no page and no resume breaks."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from tinymim.models.checkpoints import tensors_sha256
from tinymim.pipeline.members import Keys, Members
from tinymim.pipeline.spool import _load_members, _save_members
from tinymim.stages import compare
from tinymim.stages.pages.summary import read_runs
from tinymim.stages.run import owner
from tinymim.stages.training.states import newest_payloads, save_state
from tinymim.storage.identity import Identity
from tinymim.tests.fuzz.damage import damaged, outcomes
from tinymim.tests.fuzz.odd import altered


def numbers(small: int, large: int) -> pytest.MarkDecorator:
    """A few inputs always, many in the slow suite."""
    return pytest.mark.parametrize("count", [small, pytest.param(large, marks=pytest.mark.slow)])


def lines(*objects: dict[str, Any]) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in objects).encode()


def make_runs(root: Path) -> tuple[list[Path], dict[Path, bytes]]:
    """A training, its evaluation and a fine-tuning, and the files that `compare` reads, by path."""
    student, evaluated, tuned = (root / name for name in ("student", "eval", "tuned"))
    weights = {"weight": torch.arange(3.0)}
    for folder in (student, evaluated, tuned):
        folder.mkdir()
    save_file(weights, student / "student.safetensors")
    digest = tensors_sha256(weights)
    steps = [{"step": step, "epoch": (step + 1) / 10, "loss": 2.0 - step / 10, "kl_qk": 1.0} for step in range(5)]
    recipes = {
        student: {"stage": "train-student", "cache": "c", "optim": {"batch_size": 8}, "run": {"folder": str(student)}},
        evaluated: {"stage": "evaluate", "weights": str(student / "student.safetensors")},
        tuned: {"stage": "finetune", "weights": "random"},
    }
    versions = {"libraries": {"torch": "2.0"}, "git_commit": "abc", "device": "cpu", "parameters": 10}
    session = {"session": "a", "device": "H200", "elapsed_s": 5.0, "device_s": 10.0}
    files = {folder / "recipe.yaml": yaml.safe_dump(recipe).encode() for folder, recipe in recipes.items()}
    files |= {folder / "versions.json": json.dumps(versions).encode() for folder in recipes}
    files |= {
        student / "metrics.jsonl": lines(*steps),
        student / "sessions.jsonl": lines(session, session | {"session": "b"}),
        student / "audit.jsonl": lines({"step": 0, "epoch": 0.0, "qk": {"kl": 1.0}, "knn_top1": 0.5, "alarms": ["x"]}),
        evaluated / "evaluation.json": json.dumps(
            {"knn_top1": 0.3, "linear_top1": 0.4, "weights_sha256": digest}
        ).encode(),
        tuned / "metrics.jsonl": lines({"step": 9, "val_model_top1": 0.5, "val_model_loss": 1.5}),
        tuned / "finetuned.json": json.dumps(
            {"weights": {"best.safetensors": {"top1": 0.5, "top5": 0.8, "weights_sha256": digest}}}
        ).encode(),
    }
    for path, data in files.items():
        path.write_bytes(data)
    return list(recipes), files


def changed(path: Path, data: bytes, rng: random.Random) -> bytes:
    """Bytes at random, or a file whose values are altered."""
    if path.suffix == ".yaml":
        return data  # tests/fuzz/test_recipes.py
    if rng.random() < 0.3:
        return damaged(data, rng)
    if rng.random() < 0.05:
        return b"[" * 3000
    if path.suffix == ".json":
        return json.dumps(altered(json.loads(data), rng)).encode()
    rows = [json.loads(line) for line in data.splitlines()]
    return lines(*altered(rows, rng))


@numbers(10, 3_000)
def test_compare_reads_any_run_folder(count: int, tmp_path: Path) -> None:
    folders, intact = make_runs(tmp_path)
    rng, page = random.Random(0), tmp_path / "page.html"

    def one(number: int) -> str:
        path = rng.choice([path for path in intact if path.suffix != ".yaml"])
        path.write_bytes(changed(path, intact[path], rng))
        try:
            # The pictures take most of the time.
            runs = read_runs(folders) if number % 8 else compare.run(folders, page)
            compare.as_text(runs)
            json.dumps(compare.as_json(runs))
        finally:
            path.write_bytes(intact[path])
        return "read"

    found = outcomes(one, count)
    print(f"run folders: {count:,} inputs: {dict(found)}")
    assert found["read"] > count / 3


@numbers(100, 5_000)
def test_a_training_state_resumes_or_is_refused(count: int, tmp_path: Path) -> None:
    model, rng = nn.Linear(3, 2), random.Random(1)
    save_state(tmp_path, 3, Identity("id", {}), {"model": model})
    [path] = tmp_path.glob("state-*.pt")
    whole = path.read_bytes()
    wanted = newest_payloads([tmp_path])

    def one(_number: int) -> str:
        path.write_bytes(damaged(whole, rng))
        assert newest_payloads([tmp_path]) == wanted
        return "intact"

    found = outcomes(one, count)
    print(f"states: {count:,} inputs: {dict(found)}")
    assert set(found) <= {"intact", "CheckpointError"} and found["CheckpointError"] > 0.9 * count


def test_members_beside_a_spooled_shard(tmp_path: Path) -> None:
    path, rng = tmp_path / "members" / "a.json", random.Random(2)
    column = np.arange(4, dtype=np.int64)
    _save_members(path, Members(Keys.of(["a", "b", "é", "d"]), column, column + 1, column - 1), "sha256:x")
    fuzz_json(path, rng, lambda: _load_members(path), 4_000)


def test_the_lock_of_a_run_folder(tmp_path: Path) -> None:
    path, rng = tmp_path / "owner.lock", random.Random(3)
    path.write_text(json.dumps({"pid": 4, "host": "h", "beat": 3}))

    def read() -> None:
        with open(path, "rb") as file:
            owner._named(owner._content(file))

    fuzz_json(path, rng, read, 4_000)


def fuzz_json(path: Path, rng: random.Random, read: Callable[[], object], count: int) -> None:
    """Read a JSON file whose content is altered or damaged; nothing may be raised at all."""
    whole = path.read_bytes()
    for number in range(count):
        data = json.dumps(altered(json.loads(whole), rng)).encode() if number % 2 else damaged(whole, rng)
        path.write_bytes(b"[" * 4000 if number % 500 == 0 else data)
        try:
            read()
        except Exception as error:
            raise AssertionError(f"input {number}: {path.read_bytes()[:300]!r}: {error!r}") from error
