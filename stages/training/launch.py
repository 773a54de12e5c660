"""Run a training in this process, or as N workers that `start_local` or `start_ray` starts.

The parent of workers trains nothing. It forwards signals, restarts all workers after a crash, and raises the error
of a worker, so that a run on many workers ends like a run in one process.
"""

import signal
from pathlib import Path
from typing import cast

from tinymim.configs.errors import InternalError, LoaderKilled, in_one_line
from tinymim.configs.schema.recipes import TrainingRecipe
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.stages.run.interrupt import Interrupted, on_signals
from tinymim.stages.run.owner import owned
from tinymim.stages.run.progress import logger
from tinymim.stages.training.ranks import environment_ranks, joined, launched
from tinymim.stages.training.start import R, Start, Training, WorkersDied
from tinymim.stages.training.start_local import LocalStart


def on_ranks(train: Training[R], recipe: R) -> None:
    """Run `train(recipe, ranks)` in this process, alone or as a rank, or in `recipe.workers` processes.

    Args:
        train: a module-level function, so that workers can import it.
        recipe: the recipe to train.

    Raises:
        TinymimError, Interrupted: raised by `train`, in this process or in a worker.
        UserError: another run works in the run folder.
        InternalError, LoaderKilled: workers were killed or crashed more than `recipe.max_restarts` times.
    """
    if not launched() and (recipe.workers > 1 or recipe.cluster == "ray"):
        with owned(run_folders(recipe)):  # by this process: its workers come and go
            if recipe.cluster == "ray":
                from tinymim.stages.training.start_ray import RayStart  # Ray Train is an extra

                _supervised(train, recipe, RayStart(recipe))
            else:
                _supervised(train, recipe, LocalStart())
        return
    # Rank 0 owns it before the ranks meet, so that a second run does not disturb the first one's meeting.
    with owned(run_folders(recipe) if environment_ranks().first else ()), joined(recipe.run) as ranks:
        if recipe.workers not in (1, ranks.world_size):
            logger.info(
                f"{recipe.stage}: {ranks.world_size} ranks were started by an external launcher; ignoring `workers`"
            )
        train(recipe, ranks)


def run_folders(recipe: TrainingRecipe) -> set[Path]:
    """The run folder, and those of its students: another run could name one of them."""
    students = recipe.each().values() if isinstance(recipe, TrainStudentRecipe) else ()
    return {recipe.run.folder, *(own.run.folder for own in students)}


def _supervised(train: Training[R], recipe: R, start: Start) -> None:
    former = _states(recipe)
    stop = _SignalForwarder(start)
    with on_signals(stop.on_signal):
        for restarts in range(recipe.max_restarts + 1):
            try:
                stopped = start(train, recipe)
            except (WorkersDied, LoaderKilled) as died:
                if stop.requested:  # a worker that is still starting has no handler, and the signal kills it
                    raise Interrupted("stopped; what was saved before is intact", stop.requeue) from None
                if restarts == recipe.max_restarts and isinstance(died, LoaderKilled):
                    raise
                if restarts == recipe.max_restarts:
                    raise InternalError(
                        f"the workers failed {restarts + 1} times",
                        got=str(died),
                        hint=f"what was saved in {recipe.run.folder} is intact and the same command continues; "
                        "--debug shows more",
                    ) from died.__cause__
                cause = in_one_line(died) if isinstance(died, LoaderKilled) else str(died)
                logger.info(
                    f"{recipe.stage}: {cause}; restart {restarts + 1} of {recipe.max_restarts} from the last state"
                )
                recipe = resuming(recipe, former)
                continue
            if stopped is not None:
                message, requeue = stopped
                # Workers get SIGTERM for either signal, so their `requeue` counts only where this process got none.
                raise Interrupted(message, stop.requeue or (requeue and not stop.requested))
            return


def _states(recipe: TrainingRecipe) -> dict[Path, int]:
    """The states in the run folder, with the time in ns at which each was written."""
    return {path: path.stat().st_mtime_ns for path in recipe.run.folder.glob("**/state*.pt")}


def resuming(recipe: R, former: dict[Path, int]) -> R:
    """The recipe of a restart: a run from scratch resumes too, once it has saved a state of its own.

    Args:
        recipe: the recipe of the run.
        former: states of earlier runs, from `_states`. They are removed when the run has its own.
    """
    found = _states(recipe)
    if recipe.checkpoint.resume or found.items() <= former.items():
        return recipe
    for path in former:
        if found.get(path) == former[path]:
            path.unlink()
    again = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"resume": True})})
    return cast("R", again)  # of the same class


class _SignalForwarder:
    """The parent's SIGINT and SIGTERM handler: the first signal makes the workers save, the second kills them.

    A terminal or a batch system may send the same signal to the workers as well. They act on the first only.
    """

    def __init__(self, start: Start) -> None:
        self.requested = self.requeue = False
        self._start = start

    def on_signal(self, number: int) -> None:
        """Handle SIGINT or SIGTERM. Raises Interrupted if no worker runs yet, KeyboardInterrupt the second time."""
        if self.requested:
            self._start.kill()
            raise KeyboardInterrupt
        self.requested, self.requeue = True, number == signal.SIGTERM
        logger.info(f"{signal.Signals(number).name} received: finishing the step and saving (again to stop at once)")
        if not self._start.stop(self.requeue):
            raise Interrupted("stopped before it had begun", self.requeue)
