"""What starts the workers of a training run: the protocol that `start_local` and `start_ray` implement."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from tinymim.configs.schema import FinetuneRecipe, PretrainMaeRecipe, TrainStudentRecipe
from tinymim.stages.training.ranks import Ranks

R = TypeVar("R", PretrainMaeRecipe, TrainStudentRecipe, FinetuneRecipe)


Training = Callable[[R, Ranks], None]


class WorkersDied(Exception):
    """Workers were killed or crashed; an error of ours is never the reason. Its text says which and how."""


class Start(Protocol):
    """A way to start all workers, and to reach them."""

    def __call__(self, train: Training[R], recipe: R) -> tuple[str, bool] | None:
        """Run all workers to their end. Returns what a clean stop said, with its `requeue`; else None.

        Raises:
            TinymimError: a worker's.
            WorkersDied: of any other reason.
        """

    def stop(self, requeue: bool) -> bool:
        """Ask the workers to save and end; False: there are none."""

    def kill(self) -> None:
        """End them at once."""
