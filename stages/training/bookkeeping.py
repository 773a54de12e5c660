"""The end of a step: ranks agree whether to stop, metrics are logged, states are saved."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tinymim.configs.schema.recipes import TrainingRecipe
from tinymim.pipeline.order import SampleOrder
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.metrics import formatted
from tinymim.stages.run.progress import Meter, logger
from tinymim.stages.training.learner import NEVER, Learner
from tinymim.stages.training.ranks import Ranks, batch_arithmetic
from tinymim.stages.training.states import load_states


@dataclass
class Bookkeeping:
    """Logging, saving and stopping of a training run. Every rank calls it, only rank 0 writes.

    Attributes:
        recipe: the recipe of the whole run.
        learners: all models of the run; they take the same number of steps.
        ranks: the ranks of the run.
        order: the order of samples.
        shards: names of shards, by the first column of the order's items.
        rate_name: the metric that holds the rate, e.g. "views_per_s".
        metrics: further metrics of a step, from the step and the number of all steps.
        first_step: number of steps done before this process; set by `resume`.
    """

    recipe: TrainingRecipe
    learners: Sequence[Learner]
    ranks: Ranks
    order: SampleOrder
    shards: list[str]
    rate_name: str
    metrics: Callable[[int, int], dict[str, float]] = lambda _step, _total: {}
    first_step: int = 0
    _saved: int | None = None  # the step of the newest state that this process has written

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.learners[0].schedule.total_steps

    def resume(self) -> None:
        """Load the newest states if the recipe resumes; then distribute the learners over the ranks.

        Raises:
            CheckpointError: the states are damaged, or belong to another recipe.
        """
        if self.recipe.checkpoint.resume:
            self.first_step = load_states(
                [learner.folder for learner in self.learners],
                [learner.identity for learner in self.learners],
                [learner.parts | {"order": self.order} for learner in self.learners],
                self.ranks,
            )
        for learner in self.learners:
            learner.distribute()

    def describe(self, what: str) -> None:
        """Print the run's arithmetic; `what` describes the data, e.g. "1,000 images"."""
        optim = self.recipe.optim
        batch = batch_arithmetic(optim.batch_size, self.ranks, optim.accumulate)
        epochs = self.total_steps / self.order.steps_per_epoch
        for learner in self.learners:
            rates = f"{learner.schedule.peak_lr:.2e} = {learner.recipe.optim.base_lr:g} x {optim.batch_size:,} / 256"
            logger.info(f"{self.recipe.stage}: {learner.about}, peak lr {rates}")
        logger.info(
            f"{self.recipe.stage}: {what}, {self.total_steps:,} steps = {epochs:.1f} epochs, batch {batch}, "
            f"from step {self.first_step:,}"
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[tuple[StopFlag, Meter]]:
        """Open logs, signal handlers and the meter for the training loop."""
        with contextlib.ExitStack() as stack:
            devices = [learner.device for learner in self.learners]
            for learner in self.learners:
                stack.enter_context(learner.logging(self.first_step, devices.count(learner.device)))
            # A rank among many can get one signal twice, from its parent and from the terminal. Its parent handles
            # the second one.
            stop = stack.enter_context(StopFlag(has_parent=self.ranks.world_size > 1))
            yield stop, stack.enter_context(Meter(self.recipe.stage, self.total_steps, "steps", self.first_step))

    def end_step(self, step: int, stop: StopFlag, meter: Meter, save: bool = False) -> None:
        """Agree with the other ranks after `step` steps; log and save when due, save also if `save`.

        Raises:
            UserError: a loss or a parameter is not finite on some rank.
            Interrupted: some rank was asked to stop; the state is saved.
        """
        self.order.step = step
        meter.advance(1)
        last = step == self.total_steps
        log_due = last or (step - 1) % self.recipe.run.log_every == 0
        save_due = save or last or step % self.recipe.checkpoint.every_steps == 0
        # On all ranks at every step, because a signal may reach one rank only, and all must stop at the same step.
        asked, requeue = self._agree(step, stop, wait=log_due or save_due)
        save_due = save_due or asked
        if save_due or log_due:
            self._log(step - 1, meter, write=log_due)
        if save_due:
            self.save(step)
        if asked and not last:  # after the last step there is nothing to continue: the run ends as usual
            raise Interrupted(f"state of step {step:,} saved; the same command continues", requeue)

    def _agree(self, step: int, stop: StopFlag, wait: bool) -> tuple[bool, bool]:
        """Whether some rank was asked to stop, and whether by SIGTERM; all ranks raise where one's loss is broken.

        Without `wait` this waits for no GPU and may miss the last steps, which a GPU has not computed yet.
        """
        while True:
            broken = [learner.watch.first_broken(wait) for learner in self.learners]
            # One exchange for all of it. `least` is a minimum, so the flags are negated: 0 on one rank wins.
            quiet, stays, *broken = self.ranks.least(not stop.requested, not stop.requeue, *broken)
            first = min(broken)
            if wait or (quiet and first == NEVER):
                break
            # Once more, with all steps: an earlier step may be broken too, and a state to save must not be. All ranks
            # got the same answer, so all of them loop.
            wait = True
        if first < NEVER:
            learner = self.learners[broken.index(first)]
            learner.raise_not_finite(first, step, self.order.whole_batch(first), self.shards)
        return not quiet, not stays

    def _log(self, step: int, meter: Meter, write: bool) -> None:
        notes = []
        for learner in self.learners:
            means = learner.means()  # on every rank, also where only rank 0 writes: it adds over ranks
            shown = [f"{name} {formatted(name, means[name])}" for name in ("loss", "r2") if name in means]
            notes.append(" ".join([learner.name, *shown]).lstrip())
            if write:
                rate = {self.rate_name: meter.rate * self.order.batch_size}
                epoch = {"epoch": (step + 1) / self.order.steps_per_epoch}
                further = {"lr": learner.schedule.lr(step)} | self.metrics(step, self.total_steps)
                learner.log(step, means | further | rate | epoch)
        meter.note = ", ".join(notes)

    def save(self, step: int) -> None:
        """Write the states after `step` steps, unless `end_step` did so; call it after `end_step` only."""
        if step == self._saved:
            return
        for learner in self.learners:
            learner.save(step, self.order)
        # Not in the loop above: a kill between two saves must leave an older state that all students have.
        for learner in self.learners:
            learner.prune(step, self.first_step if self._saved is None else None)
        self._saved = step
