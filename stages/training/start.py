"""The protocol for starting the workers of a training run; `start_local` and `start_ray` implement it."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from tinymim.configs.schema.recipes import TrainingRecipe
from tinymim.stages.training.ranks import Ranks

R = TypeVar("R", bound=TrainingRecipe)


Training = Callable[[R, Ranks], None]


class WorkersDied(Exception):
    """Workers were killed or crashed, not by a final error; the text names the workers and the cause."""


class Start(Protocol):
    """Starts all workers of a run, and stops them."""

    def __call__(self, train: Training[R], recipe: R) -> tuple[str, bool] | None:
        """Run all workers to their end.

        Returns:
            message and `requeue` of their Interrupted; None after a complete run.

        Raises:
            TinymimError: raised by a worker; a LoaderKilled may not come again.
            WorkersDied: workers ended for any other reason.
        """

    def stop(self, requeue: bool) -> bool:
        """Request that the workers save and end; False: no worker runs."""

    def kill(self) -> None:
        """End the workers at once."""
