"""Places of a run's metrics beside `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow (`run.loggers`).

Credentials, servers and projects come from the environment variables of these packages, never from a recipe.
"""

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from tinymim.configs.errors import UserError, first_line
from tinymim.configs.load import dump_recipe
from tinymim.stages.run.progress import logger

if TYPE_CHECKING:
    from tinymim.configs.schema.recipes import RunRecipe

BOARD_NAME = "tensorboard"  # a folder
IDS_NAME = "loggers.json"  # the run's ids at W&B and MLflow, for resume
PROJECT: Final = "tinymim"  # at W&B and MLflow, unless the environment names another
_MOST_CHARS: Final = 500  # of a parameter, for MLflow


class Logger(Protocol):
    """One place of metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add the metrics of a step."""

    def close(self, failed: bool) -> None:
        """Write what is buffered, and the outcome of the run."""


def require_loggers(recipe: "RunRecipe") -> None:
    """Raises UserError where the package of a logger is not installed."""
    for name in recipe.run.loggers:
        if name != "tensorboard" and find_spec(name) is None:
            raise UserError(f"run.loggers names {name}, which is not installed", hint=f"pip install 'tinymim[{name}]'")


def open_loggers(recipe: "RunRecipe", first_step: int | None) -> list[Logger]:
    """The loggers of a recipe; a run that resumes continues its runs at W&B and MLflow.

    Args:
        recipe: the recipe of the run, whose folder exists.
        first_step: number of steps done before; None where several processes log into one folder, each for itself.

    Raises:
        UserError: a package is not installed, or refuses the run.
    """
    require_loggers(recipe)
    found: list[Logger] = []
    for name in dict.fromkeys(recipe.run.loggers):
        try:
            found.append(_MAKERS[name](recipe, first_step))
        except Exception as error:  # these packages raise many kinds: no server, no login, no such project
            for each in found:
                each.close(failed=True)
            raise UserError(
                f"{name} cannot log this run",
                got=f"{type(error).__name__}: {first_line(error)}",
                hint="set WANDB_MODE=offline, or log in" if name == "wandb" else "check MLFLOW_TRACKING_URI",
            ) from error
    return found


def log_to(loggers: list[Logger], step: int, values: Mapping[str, float]) -> None:
    """Give metrics to every logger. A server that fails loses its logger, not the run."""
    for each in list(loggers):
        try:
            each.log(step, values)
        except Exception as error:  # of any kind, from any of its libraries
            _drop(each, error)
            loggers.remove(each)


def close_all(loggers: list[Logger], failed: bool) -> None:
    """Close every logger; failures are treated as those of `log_to`."""
    for each in loggers:
        try:
            each.close(failed)
        except Exception as error:
            _drop(each, error)


def _drop(own: Logger, error: Exception) -> None:
    """Report a logger that failed. TensorBoard writes beside metrics.jsonl, so its failure is the run's, too."""
    if isinstance(own, _TensorBoard):
        raise error
    logger.info(
        f"warning: {type(own).__name__.strip('_')} failed and gets no further metrics of this process "
        f"({type(error).__name__}: {first_line(error)}); metrics.jsonl has all of them"
    )


class _TensorBoard:
    def __init__(self, recipe: "RunRecipe", first_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = recipe.run.folder / BOARD_NAME
        if not isinstance(threading.excepthook, _WithoutBoards):
            threading.excepthook = _WithoutBoards(threading.excepthook)
        self._board = SummaryWriter(str(self._folder), purge_step=first_step or None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        with self._explained():
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        with self._explained():
            self._board.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Name the folder, if it is gone, rather than a file in it."""
        try:
            yield
        except OSError as error:
            if self._folder.exists():
                raise
            raise FileNotFoundError(
                errno.ENOENT, "this folder was removed during the run", str(self._folder)
            ) from error


class _WithoutBoards:
    """A `threading.excepthook` without OSErrors of TensorBoard's threads: the next `log` or `close` raises them."""

    def __init__(self, others: Callable[[threading.ExceptHookArgs], object]) -> None:
        self._others = others

    def __call__(self, args: threading.ExceptHookArgs) -> None:
        of_board = type(args.thread).__module__.startswith("tensorboard.")
        if not (of_board and isinstance(args.exc_value, OSError)):
            self._others(args)


class _Wandb:
    def __init__(self, recipe: "RunRecipe", first_step: int | None) -> None:
        import wandb

        folder: Path = recipe.run.folder
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", folder.name),
            dir=str(folder),
            config=recipe.model_dump(mode="json"),
            id=_known_id(folder, "wandb") if first_step else None,
            resume="allow",
            reinit="create_new",  # several students log at once
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True),
        )
        _keep_id(folder, "wandb", str(self._run.id))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    def __init__(self, recipe: "RunRecipe", first_step: int | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        folder: Path = recipe.run.folder
        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        known = _known_id(folder, "mlflow") if first_step else None
        if known is None:
            self._id = str(self._client.create_run(number, run_name=folder.name).info.run_id)
            flat = _flat(recipe.model_dump(mode="json"), "").items()
            params = [Param(key, str(value)[:_MOST_CHARS]) for key, value in flat]
            for start in range(0, len(params), 100):  # MLflow's most in one request
                self._client.log_batch(self._id, params=params[start : start + 100])
            self._client.set_tag(self._id, "tinymim.recipe", dump_recipe(recipe)[:5000])
        else:
            self._id = known
            self._client.update_run(self._id, "RUNNING")
        _keep_id(folder, "mlflow", self._id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now_ms, step) for name, value in values.items()])

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


_MAKERS: Final[dict[str, Callable[["RunRecipe", int | None], Logger]]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}


def _flat(values: Mapping[str, Any], above: str) -> dict[str, Any]:
    """Nested sections as dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return found


def _known_id(folder: Path, name: str) -> str | None:
    with suppress(OSError, ValueError, AttributeError):
        found = json.loads((folder / IDS_NAME).read_text()).get(name)
        return found if isinstance(found, str) else None
    return None


def _keep_id(folder: Path, name: str, value: str) -> None:
    known: dict[str, str] = {}
    with suppress(OSError, ValueError):
        known = json.loads((folder / IDS_NAME).read_text())
    (folder / IDS_NAME).write_text(json.dumps({**known, name: value}) + "\n")
