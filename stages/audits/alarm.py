"""Alarms of a student's audits: wrong targets, and training images learnt by heart.

**Alike for any image.** If records do not belong to their images, a student learns only what the rows of all images
have in common. Its loss falls as in a correct training run, but its answers fit another image as well as their own.
The check starts once the student has learnt most of what images have in common. It compares the gap (KL to another
image's rows minus KL to the own rows) with the smaller of two numbers: the KL learnt so far, and the KL left to a
student that ignores its image. All numbers are nats per row, so the thresholds hold for any teacher, relation or scale.

**Does not follow.** The training loss falls, and the KL to the dense rows of held-out images does not.

docs/decisions/011-student-audits.md has the measurements behind the constants.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from jaxtyping import Float
from torch import Tensor

from tinymim.targets.contract import Yardstick

# Share of the KL from even rows to the mean row, above which a student has learnt what images have in common.
LEARNT: Final = 0.8
# From there on, the gap should exceed this share of the KL learnt, and by this number of standard errors.
LEAST_GAP: Final = 0.1
STANDARD_ERRORS: Final = 2.0
# Share of the training KL at an earlier audit; a fall below it without a fall of the audit's KL is an alarm.
FELL_TO: Final = 0.75


@dataclass(frozen=True)
class Audited:
    """One loss of a student against the teacher's whole targets.

    Attributes:
        per_head: KL by head.
        kl: mean of `per_head`.
        gap: KL to the rows of another image minus `kl`.
        gap_se: standard error of `gap`.
        yardstick: reference values of the same teacher rows.
    """

    per_head: list[float]
    kl: float
    gap: float
    gap_se: float
    yardstick: Yardstick

    @classmethod
    def of(cls, own: Float[Tensor, "N H"], other: Float[Tensor, "N H"], yardstick: Yardstick) -> "Audited":
        """The audit of N images, at least two, from their KLs to their own and to another image's rows."""
        gaps = (other - own).mean(1).double()
        return cls(
            own.mean(0).tolist(),
            float(own.mean()),
            float(gaps.mean()),
            float(gaps.std() / len(gaps) ** 0.5),
            yardstick,
        )

    def alike_for_any_image(self) -> bool:
        """Whether the student has learnt what images have in common and hardly anything else."""
        even, common = self.yardstick.even, self.yardstick.common
        learnt = even - self.kl
        if learnt <= 0 or learnt < LEARNT * (even - common):
            return False
        return self.gap + STANDARD_ERRORS * self.gap_se < LEAST_GAP * min(learnt, common)


@dataclass(frozen=True)
class Point:
    """One loss at an audit: the step, the audit's KL, and the training KL of the steps before."""

    step: int
    kl: float
    train_kl: float


def alarms(loss: str, audited: Audited, points: Sequence[Point]) -> list[str]:
    """The alarms of a loss, as text with numbers and likely causes.

    Args:
        loss: name of the loss.
        audited: the last audit.
        points: all audits that followed at least one training step, in order.
    """
    found = []
    mark = audited.yardstick
    if audited.alike_for_any_image():
        found.append(
            f"{loss}: the student answers alike for any image: KL {audited.kl:.4f} to the teacher's rows of its "
            f"own image, {audited.kl + audited.gap:.4f} to another's; {mark.common:.4f} needs no look at the image. "
            "Likely causes: the cache's records belong to other images or views than its keys; the student's features "
            "have collapsed"
        )
    now = points[-1] if points else None
    for before in points[:-1]:
        if now is not None and now.train_kl < FELL_TO * before.train_kl and now.kl >= before.kl:
            found.append(
                f"{loss}: since step {before.step:,} the training's KL fell from {before.train_kl:.4f} to "
                f"{now.train_kl:.4f}, while the audit's went from {before.kl:.4f} to {now.kl:.4f}. Likely causes: "
                "targets of another teacher, block or relation than in the cache's manifest; a biased codec (tail); "
                "too few images, learnt by heart"
            )
            break
    return found


def points_of(loss: str, audits: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The points of a loss from the lines of an audit.jsonl."""
    return [
        Point(line["step"], line[loss]["kl"], line["train_kl"][loss]) for line in audits if loss in line["train_kl"]
    ]
