"""What happens between two steps: ranks agree whether to stop, metrics are logged, states saved."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tinymim.configs.schema import TrainingRecipe
from tinymim.pipeline.order import SampleOrder
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.metrics import formatted
from tinymim.stages.run.progress import Meter, say
from tinymim.stages.training.learner import NEVER, Learner
from tinymim.stages.training.ranks import Ranks, batch_arithmetic
from tinymim.stages.training.states import load_states


@dataclass
class Bookkeeping:
    """The books of a run; every rank keeps them, rank 0 writes.

    Attributes:
        recipe: of the whole run.
        learners: all models that the run trains, each with as many steps.
        ranks: who trains together.
        order: of the stream.
        shards: the names that the order's samples refer to.
        rate_name: of the rate in the metrics, e.g. "views_per_s".
        first_step: steps done before this process; set by `resume`.
    """

    recipe: TrainingRecipe
    learners: Sequence[Learner]
    ranks: Ranks
    order: SampleOrder
    shards: list[str]
    rate_name: str
    first_step: int = 0
    _saved: int | None = None  # the newest state that this process has written

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.learners[0].schedule.total_steps

    def resume(self) -> None:
        """Load the newest states, if there are any and the recipe wants them; only then begins the work of ranks.

        Raises:
            CheckpointError: the states are damaged, or of another recipe.
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
        """Say the run's arithmetic aloud, after `what` it trains on."""
        optim = self.recipe.optim
        batch = batch_arithmetic(optim.batch_size, self.ranks, optim.accumulate)
        epochs = self.total_steps / self.order.steps_per_epoch
        for learner in self.learners:
            rates = f"{learner.schedule.peak_lr:.2e} = {learner.recipe.optim.base_lr:g} x {optim.batch_size:,} / 256"
            say(f"{self.recipe.stage}: {learner.about}, peak lr {rates}")
        say(
            f"{self.recipe.stage}: {what}, {self.total_steps:,} steps = {epochs:.1f} epochs, batch {batch}, "
            f"from step {self.first_step:,}"
        )

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[StopFlag, Meter]]:
        """Logs, signals and progress for as long as the training runs."""
        with contextlib.ExitStack() as stack:
            devices = [learner.device for learner in self.learners]
            for learner in self.learners:
                stack.enter_context(learner.logging(self.first_step, devices.count(learner.device)))
            # Of many ranks each gets the signal once from its parent, and perhaps once more from a terminal.
            stop = stack.enter_context(StopFlag(insists=self.ranks.world_size == 1))
            yield stop, stack.enter_context(Meter(self.recipe.stage, self.total_steps, "steps", self.first_step))

    def close(self, step: int, stop: StopFlag, meter: Meter, save: bool = False) -> None:
        """After `step` steps: agree, log, save when it is due or asked for by `save`.

        Raises:
            UserError: a loss was not finite on some rank, or a parameter is not.
            Interrupted: some rank was asked to stop; the state is saved.
        """
        self.order.step = step
        meter.advance(1)
        last = step == self.total_steps
        log_due = last or (step - 1) % self.recipe.run.log_every == 0
        save_due = save or last or step % self.recipe.checkpoint.every_steps == 0
        asked, requeue = self._agree(step, stop, wait=log_due or save_due)
        save_due = save_due or asked
        if save_due or log_due:
            self._log(step - 1, meter, write=log_due)
        if save_due:
            self.save(step)
        if asked and not last:
            raise Interrupted(f"state of step {step:,} saved; the same command continues", requeue)

    def _agree(self, step: int, stop: StopFlag, wait: bool) -> tuple[bool, bool]:
        """Whether some rank was asked to stop, and by a batch system; raises on all ranks where a loss is broken."""
        while True:
            broken = [learner.watch.first_broken(wait) for learner in self.learners]
            quiet, stays, *broken = self.ranks.least(not stop.requested, not stop.requeue, *broken)
            first = min(broken)
            if wait or (quiet and first == NEVER):
                break
            wait = True  # to name the first broken step, or to save nothing broken: look at the last steps, too
        if first < NEVER:
            learner = self.learners[broken.index(first)]
            learner.refuse_broken(first, step, self.order.whole_batch(first), self.shards)
        return not quiet, not stays

    def _log(self, step: int, meter: Meter, write: bool) -> None:
        notes = []
        for learner in self.learners:
            means = learner.means()
            notes.append(f"{learner.name} loss {formatted('loss', means['loss'])}".lstrip())
            if write:
                rate = {self.rate_name: meter.rate * self.order.batch_size}
                epoch = {"epoch": (step + 1) / self.order.steps_per_epoch}
                learner.log(step, means | {"lr": learner.schedule.lr(step)} | rate | epoch)
        meter.note = ", ".join(notes)

    def save(self, step: int) -> None:
        """Write the states after `step` steps, which is due after `close` only, and only if that did not do it."""
        if step == self._saved:
            return
        for learner in self.learners:
            learner.save(step, self.order)
        for learner in self.learners:  # only now: up to here all students have an older state in common
            learner.prune(step, self.first_step if self._saved is None else None)
        self._saved = step
