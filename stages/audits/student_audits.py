"""Audits of students during training: KL to dense teacher rows of held-out images, k-NN, alarms.

The training loss does not distinguish wrong targets from right ones (`stages/audits/alarm.py`). An audit does not
affect the training run: it draws no random number and leaves the students unchanged.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tinymim.configs.errors import UserError
from tinymim.configs.schema.train import TrainStudentRecipe
from tinymim.models.student import StudentModel
from tinymim.stages.audits.alarm import Audited, alarms, points_of
from tinymim.stages.audits.batch import audit_batches
from tinymim.stages.audits.knn import AuditKnn
from tinymim.stages.cache.opened import Opened
from tinymim.stages.run.folder import AUDIT_NAME, read_audits
from tinymim.stages.run.interrupt import Interrupted, StopFlag
from tinymim.stages.run.metrics import EMA, audit_metrics
from tinymim.stages.run.progress import logger
from tinymim.stages.training.bookkeeping import Bookkeeping
from tinymim.stages.training.learner import Learner
from tinymim.stages.training.ranks import Ranks
from tinymim.stages.training.student_step import Student
from tinymim.storage.manifest import Manifest

_RECENT_STEPS = 16  # about the window of the running mean of the training KL


@dataclass
class _Subject:
    """One student, and a running mean of its training KL."""

    learner: Learner
    student: StudentModel
    losses: Mapping[str, str]  # the audited losses, and their names in the metrics
    steps: int = 0
    recent: dict[str, Tensor] = field(default_factory=dict)  # on the device, so that no step waits for it

    def note(self) -> None:
        """Add the losses of the last step to the running mean."""
        self.steps += 1
        for target, name in self.losses.items():
            loss = self.learner.losses[name]
            before = self.recent.get(target, torch.zeros_like(loss))
            self.recent[target] = before + (loss - before) / min(self.steps, _RECENT_STEPS)

    def train_kl(self) -> dict[str, float]:
        """The running mean by loss, over this process's last steps and this rank's samples; empty before any step."""
        return {target: float(mean) for target, mean in self.recent.items()}

    def versions(self) -> dict[str, StudentModel]:
        """The student itself, and its moving average, by prefix of the metrics."""
        averaged: Any = None if self.learner.ema is None else self.learner.ema.module
        return {"": self.student} | ({} if averaged is None else {EMA: averaged})


class StudentAudits:
    """All audits of a training run. The first rank makes them while the others wait.

    Args:
        recipe: the recipe; without `audit`, nothing happens.
        training: manifest of the cache that students are trained on.
        opened: the layers of it that students learn from.
        students: all students of the run.
        ranks: the ranks of the run.
        size: the students' input size.

    Raises:
        As `audit_batches` and `AuditKnn`, on the first rank.
    """

    def __init__(
        self,
        recipe: TrainStudentRecipe,
        training: Manifest,
        opened: Sequence[Opened],
        students: Sequence[Student],
        ranks: Ranks,
        size: int,
    ) -> None:
        self._config, self._first = recipe.audit, ranks.first
        self._ranks = ranks
        self._subjects: list[_Subject] = []
        self._knn: AuditKnn | None = None
        if self._config is None or not ranks.first:
            return
        self._batches = audit_batches(self._config, training, opened, size)
        self._measures = {name: each.term.kind.measure for each in self._batches for name in each.losses}
        metrics = {name: each.term.metric(loss) for each in self._batches for name, loss in each.losses.items()}
        self._subjects = [_Subject(learner, model, metrics) for _, model, learner in students]
        if self._config.knn is not None:
            self._knn = AuditKnn(self._config.knn, size, recipe.loader)

    def after(self, step: int, books: Bookkeeping, stop: StopFlag) -> None:
        """Make the audit that is due after `step` steps.

        All ranks call this before the first step and after every step.

        Raises:
            UserError: an alarm, with `on_alarm: stop`; the state is saved.
        """
        if self._config is None:
            return
        if self._first and step > books.first_step:
            for subject in self._subjects:
                subject.note()
        every = max(1, round(self._config.every_epochs * books.order.steps_per_epoch))
        regular = step % every == 0 or step == books.total_steps
        if not regular and step != books.first_step:
            return
        raised = self._audit(step, regular, books, stop) if self._first else []
        # The other ranks wait here for the first one, on the CPU, at most for gloo's limit of half an hour.
        shared = self._ranks.from_first("\n  ".join(raised).encode() or None)
        if shared and self._config.on_alarm == "stop":
            books.save(step)
            raise UserError(
                f"the audit after {step:,} steps raised an alarm, and audit.on_alarm is stop",
                got=shared.decode(),
                hint="the state is saved. `tinymim cache verify --deep` compares the cache with its teacher; "
                "on_alarm: warn continues",
            )

    def _audit(self, step: int, regular: bool, books: Bookkeeping, stop: StopFlag) -> list[str]:
        """Audit the students that have no audit after `step` steps yet, and return the alarms.

        Args:
            regular: whether an audit is due at this step. Otherwise only students without any audit are audited, such
                as those of a run that had no `audit` before.
        """
        began_s = time.monotonic()
        earlier = [read_audits(each.learner.folder) for each in self._subjects]
        wanted = [
            (each, lines)
            for each, lines in zip(self._subjects, earlier, strict=True)
            if (regular and all(line["step"] != step for line in lines)) or not lines
        ]
        if not wanted:
            return []
        with _in_eval_mode([each.student for each, _ in wanted]):
            found = [{of: self._compare(s) for of, s in each.versions().items()} for each, _ in wanted]
            accuracies = self._knn_accuracies([each for each, _ in wanted], stop)
        raised = []
        for (each, lines), compared, accuracy in zip(wanted, found, accuracies, strict=True):
            entry: dict[str, Any] = {"step": step, "epoch": step / books.order.steps_per_epoch}
            entry |= {
                of + name: asdict(one) | {"measure": self._measures[name]}
                for of, all_ in compared.items()
                for name, one in all_.items()
            }
            entry |= accuracy | {"train_kl": each.train_kl()}
            entry["alarms"] = [
                text
                for name, one in compared[""].items()
                for text in alarms(name, one, points_of(name, [*lines, entry]))
            ]
            entry["seconds"] = time.monotonic() - began_s  # one audit covers all students
            raised += [f"{each.learner.name} {text}".lstrip() for text in entry["alarms"]]
            _write(each, entry)
        for text in raised:
            logger.info(f"train-student: AUDIT ALARM after {step:,} steps: {text}")
        return raised

    def _compare(self, student: StudentModel) -> dict[str, Audited]:
        """The audits of a student by loss, over all layers."""
        return {name: one for batch in self._batches for name, one in batch.compare(student).items()}

    def _knn_accuracies(self, wanted: Sequence[_Subject], stop: StopFlag) -> list[dict[str, float]]:
        """k-NN accuracies of every student by metric; empty without `audit.knn`, or where the run is being stopped."""
        versions = [(number, of, s.vit) for number, each in enumerate(wanted) for of, s in each.versions().items()]
        found: list[dict[str, float]] = [{} for _ in wanted]
        if self._knn is None:
            return found
        try:
            accuracies = self._knn.accuracy([vit for *_, vit in versions], stop)
        except Interrupted:
            return found  # the run ends after the next step; this audit has no accuracies
        for (number, of, _), accuracy in zip(versions, accuracies, strict=True):
            found[number] |= {of + name: value for name, value in accuracy.items()}
        return found


@contextmanager
def _in_eval_mode(students: Sequence[nn.Module]) -> Iterator[None]:
    for student in students:  # averages are always in eval mode
        student.eval()
    try:
        yield
    finally:
        for student in students:
            student.train()


def _write(subject: _Subject, entry: Mapping[str, Any]) -> None:
    with open(subject.learner.folder / AUDIT_NAME, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(entry) + "\n")
    # As for all metrics, the step is the last one done, counted from 0.
    subject.learner.log(max(entry["step"] - 1, 0), audit_metrics(entry))
