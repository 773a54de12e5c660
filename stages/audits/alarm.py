"""When the audits of a student say that it is trained by wrong targets, or learns what its images alone have.

**Alike for any image.** Where records and images do not belong together, a student learns what the rows of all images
have in common and nothing else: as far as its loss falls, that is what a right training looks like, too. But its
answers then fit another image as well as their own. So, once it has learnt most of what images have in common, the gap
(KL to another image's rows minus KL to the own ones) is compared with what it has learnt, or with what only the image
can tell, whichever is less. All of these are nats per row, so no teacher, relation or scale has thresholds of its own.

**Does not follow.** The loss falls, and the KL to the dense rows of held-out images does not.

docs/decisions/011-student-audits.md has the measurements behind the constants.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from jaxtyping import Float
from torch import Tensor

from tinymim.targets.contract import Yardstick

# What images have in common is learnt, once so much of the way from even rows to their mean row is done.
LEARNT: Final = 0.8
# Then the gap should be more than this part of what is learnt, by so many standard errors.
LEAST_GAP: Final = 0.1
STANDARD_ERRORS: Final = 2.0
# The training's KL fell to this part of what it was at an earlier audit, while the audit's did not fall.
FELL_TO: Final = 0.75


@dataclass(frozen=True)
class Audited:
    """What a student says about one loss, held against the teacher's whole targets.

    Attributes:
        per_head: KL by head.
        kl: mean of these.
        gap: how much larger the KL is to the rows of another image.
        gap_se: its standard error.
        yardstick: of the same teacher rows.
    """

    per_head: list[float]
    kl: float
    gap: float
    gap_se: float
    yardstick: Yardstick

    @classmethod
    def of(cls, own: Float[Tensor, "N H"], other: Float[Tensor, "N H"], yardstick: Yardstick) -> "Audited":
        """From the KLs of N images, at least two, to their own and to another image's rows."""
        gaps = (other - own).mean(1).double()
        return cls(
            own.mean(0).tolist(),
            float(own.mean()),
            float(gaps.mean()),
            float(gaps.std() / len(gaps) ** 0.5),
            yardstick,
        )

    def alike_for_any_image(self) -> bool:
        """Whether the student has learnt what images have in common, and hardly anything else."""
        even, common = self.yardstick.even, self.yardstick.common
        learnt = even - self.kl
        if learnt <= 0 or learnt < LEARNT * (even - common):
            return False
        return self.gap + STANDARD_ERRORS * self.gap_se < LEAST_GAP * min(learnt, common)


@dataclass(frozen=True)
class Point:
    """What an audit found of one loss: its step, its value, and the training's value of the steps before."""

    step: int
    kl: float
    train_kl: float


def alarms(loss: str, audited: Audited, points: Sequence[Point]) -> list[str]:
    """What is wrong, in words with numbers and likely causes.

    Args:
        loss: its name.
        audited: the last audit.
        points: of all audits that had a training before them, the last one at the end.
    """
    found = []
    mark = audited.yardstick
    if audited.alike_for_any_image():
        found.append(
            f"{loss}: the student answers alike for any image: KL {audited.kl:.4f} to the teacher's rows of its "
            f"own image, {audited.kl + audited.gap:.4f} to another's; {mark.common:.4f} needs no look at the image. "
            "Likely causes: the cache's records belong to other images or views than it says; a student whose features "
            "have collapsed"
        )
    now = points[-1] if points else None
    for before in points[:-1]:
        if now is not None and now.train_kl < FELL_TO * before.train_kl and now.kl >= before.kl:
            found.append(
                f"{loss}: since step {before.step:,} the training's KL fell from {before.train_kl:.4f} to "
                f"{now.train_kl:.4f}, while the audit's went from {before.kl:.4f} to {now.kl:.4f}. Likely causes: "
                "targets of another teacher, block or relation than the cache says; a biased codec (tail); too few "
                "images, learnt by heart"
            )
            break
    return found


def points_of(loss: str, audits: Sequence[Mapping[str, Any]]) -> list[Point]:
    """From the lines of an audit.jsonl."""
    return [
        Point(line["step"], line[loss]["kl"], line["train_kl"][loss]) for line in audits if loss in line["train_kl"]
    ]
