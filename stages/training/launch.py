"""One process or many: `workers: N` starts a training N times on this machine, by torch elastic (torchrun's launcher).

The parent trains nothing. It hands signals on, starts all workers again where one was killed or has crashed, and
raises what they raise, so that a run on many workers ends like a run in one process.
"""

import signal
from pathlib import Path

from tinymim.configs.errors import InternalError
from tinymim.configs.schema import TrainingRecipe
from tinymim.stages.run.interrupt import Interrupted, on_signals
from tinymim.stages.run.progress import say
from tinymim.stages.training.ranks import joined, launched
from tinymim.stages.training.start import R, Start, Training, WorkersDied
from tinymim.stages.training.start_local import LocalStart


def on_ranks(train: Training[R], recipe: R) -> None:
    """Run `train(recipe, ranks)`: as the rank that this process was started as, here alone, or in `recipe.workers`.

    Args:
        train: a function of a module, so that workers can import it.
        recipe: its recipe.

    Raises:
        TinymimError, Interrupted: those of `train`, wherever it ran.
        InternalError: workers were killed or crashed more than `recipe.max_restarts` times.
    """
    if not launched() and (recipe.workers > 1 or recipe.cluster == "ray"):
        if recipe.cluster == "ray":
            from tinymim.stages.training.start_ray import RayStart  # Ray Train is an extra

            _supervised(train, recipe, RayStart(recipe))
        else:
            _supervised(train, recipe, LocalStart())
        return
    with joined(recipe.run) as ranks:
        if recipe.workers not in (1, ranks.world_size):
            say(f"{recipe.stage}: {ranks.world_size} ranks were started, not by this command: workers says nothing")
        train(recipe, ranks)


def _supervised(train: Training[R], recipe: R, start: Start) -> None:
    began_with = _states(recipe)
    stop = _Forwarding(start)
    with on_signals(stop.on_signal):
        for restarts in range(recipe.max_restarts + 1):
            try:
                stopped = start(train, recipe)
            except WorkersDied as died:
                if stop.requested:  # while workers were starting, say
                    raise Interrupted("stopped; what was saved before is intact", stop.requeue) from None
                if restarts == recipe.max_restarts:
                    raise InternalError(
                        f"the workers failed {restarts + 1} times",
                        got=str(died),
                        hint=f"what was saved in {recipe.run.folder} is intact and the same command continues; "
                        "--debug shows more",
                    ) from died.__cause__
                say(f"{recipe.stage}: {died}; restart {restarts + 1} of {recipe.max_restarts} from the last state")
                recipe = resuming(recipe, began_with)
                continue
            if stopped is not None:
                message, requeue = stopped
                raise Interrupted(message, stop.requeue or (requeue and not stop.requested))
            return


def _states(recipe: TrainingRecipe) -> dict[Path, int]:
    """The states in the run folder, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in recipe.run.folder.glob("**/state*.pt")}


def resuming(recipe: R, began_with: dict[Path, int]) -> R:
    """The recipe of a restart: also a run that was begun anew goes on from what it has saved itself.

    Args:
        recipe: of the run.
        began_with: the states of earlier runs, which go, now that there are newer ones.
    """
    found = _states(recipe)
    if recipe.checkpoint.resume or found.items() <= began_with.items():
        return recipe
    for path in began_with:
        if found.get(path) == began_with[path]:
            path.unlink()
    return recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"resume": True})})


class _Forwarding:
    """What the parent does with SIGINT and SIGTERM: the first goes to the workers, which save; a second kills them.

    A terminal sends its Ctrl-C, and a batch system its SIGTERM, to the workers as well: they count one signal only.
    """

    def __init__(self, start: Start) -> None:
        self.requested = self.requeue = False
        self._start = start

    def on_signal(self, number: int) -> None:
        """Of SIGINT or SIGTERM. Raises Interrupted where there is no worker yet, KeyboardInterrupt the second time."""
        if self.requested:
            self._start.kill()
            raise KeyboardInterrupt
        self.requested, self.requeue = True, number == signal.SIGTERM
        say(f"{signal.Signals(number).name} received: finishing the step at hand and saving (again to stop at once)")
        if not self._start.stop(self.requeue):
            raise Interrupted("stopped before it had begun", self.requeue)
