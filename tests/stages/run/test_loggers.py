"""`run.loggers`: the metrics of a run at W&B and MLflow, by the real packages, offline; resume continues their runs."""

import json
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tinymim.configs.errors import UserError
from tinymim.stages import train_student
from tinymim.stages.run import loggers
from tinymim.stages.run.folder import read_metrics
from tinymim.tests.stages.tiny import run_in, student_recipe

Run = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages, about themselves


def trained(made: Path, folder: Path, name: str, steps: int, total: int = 4) -> None:
    """Train up to `steps`, or resume."""
    run: dict[str, Any] = run_in(folder) | {"log_every": 1, "loggers": ["tensorboard", name]}
    optim = {"batch_size": 8, "steps": total, "base_lr": 0.1}
    recipe = student_recipe(made, optim=optim, run=run, checkpoint={"every_steps": 2})
    if steps == total:
        return train_student.run(recipe)
    with pytest.MonkeyPatch.context() as patch:
        from tinymim.stages.training.bookkeeping import Bookkeeping

        end_step = Bookkeeping.end_step

        def stopping(self: Bookkeeping, step: int, *rest: Any) -> None:
            end_step(self, step, *rest)
            if step == steps:
                raise UserError("stopped by the test")

        patch.setattr(Bookkeeping, "end_step", stopping)
        with pytest.raises(UserError, match="stopped by the test"):
            train_student.run(recipe)
    return None


def test_mlflow_gets_every_metric_once_also_after_a_resume(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    trained(made, tmp_path / "run", "mlflow", steps=2)
    client = MlflowClient()
    [experiment] = [each for each in client.search_experiments() if each.name == "tinymim"]
    [first] = client.search_runs([experiment.experiment_id])
    assert first.info.status == "FAILED" and first.data.params["optim.batch_size"] == "8"
    trained(made, tmp_path / "run", "mlflow", steps=4)
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == first.info.run_id and run.info.status == "FINISHED"
    lines = read_metrics(tmp_path / "run")
    for name in ("loss", "lr"):
        history = {each.step: each.value for each in client.get_metric_history(run.info.run_id, name)}
        assert history == pytest.approx({int(line["step"]): line[name] for line in lines})
    assert (tmp_path / "run" / "tensorboard").is_dir()


def test_wandb_writes_offline_runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    trained(made, tmp_path / "run", "wandb", steps=2)
    known = json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"]
    trained(made, tmp_path / "run", "wandb", steps=4)
    assert json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"] == known
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/*{known}.wandb"))
    assert files
    stored = b"".join(path.read_bytes() for path in files)
    assert b"loss" in stored and b"batch_size" in stored and b"f" * 40 not in stored


def test_a_removed_folder_is_named_without_a_traceback_of_tensorboards_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_value))
    board = loggers._TensorBoard(student_recipe(tmp_path, run=run_in(tmp_path / "run")), None)
    shutil.rmtree(tmp_path / "run")
    with suppress(FileNotFoundError):  # raised here, or by `close`: the thread writes when it likes
        board.log(0, {"loss": 1.0})
    with pytest.raises(FileNotFoundError, match=r"removed during the run: .*run/tensorboard"):
        board.close(failed=True)
    other = threading.Thread(target=lambda: [][0])
    other.start()
    other.join()
    assert [type(each) for each in shown] == [IndexError]


def test_a_logger_that_is_not_installed_is_refused_at_once(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    from tinymim.configs.load import dump_recipe

    recipe = student_recipe(made, run=run_in(tmp_path / "run") | {"loggers": ["wandb"]})
    (tmp_path / "mine.yaml").write_text(dump_recipe(recipe))
    code, _, err = run("train-student", tmp_path / "mine.yaml")
    assert code == 2 and "pip install 'tinymim[wandb]'" in err and not (tmp_path / "run").exists()


def test_a_server_that_fails_costs_its_logger_and_not_the_run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Down:
        def __init__(self, recipe: Any, first_step: int | None) -> None: ...

        def log(self, step: int, values: Any) -> None:
            asked.append(step)
            if step:
                raise ConnectionError("no answer")

        def close(self, failed: bool) -> None:
            raise AssertionError("it was dropped before")

    monkeypatch.setitem(loggers._MAKERS, "mlflow", Down)
    monkeypatch.setattr(loggers, "find_spec", lambda name: object())
    trained(made, tmp_path / "run", "mlflow", steps=4)
    assert asked == [0, 1] and len(read_metrics(tmp_path / "run")) == 4
    assert "Down failed and gets no further metrics" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_that_a_logger_refuses_does_not_start(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(recipe: Any, first_step: int | None) -> None:
        raise RuntimeError("no login\nmore")

    monkeypatch.setitem(loggers._MAKERS, "wandb", refuse)
    monkeypatch.setattr(loggers, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="wandb cannot log this run") as caught:
        trained(made, tmp_path / "run", "wandb", steps=4)
    assert "no login" in str(caught.value) and "WANDB_MODE=offline" in str(caught.value)
