"""When an audit raises an alarm: from numbers alone."""

import pytest
import torch

from tinymim.stages.audits.alarm import Audited, Point, alarms
from tinymim.targets.contract import Yardstick

# Even rows are 1.4 nats off, the mean row over other images 0.4.
MARK = Yardstick(even=1.4, common=0.4)


def audited(kl: float, gap: float, gap_se: float = 0.001, mark: Yardstick = MARK) -> Audited:
    return Audited([kl], kl, gap, gap_se, mark)


def test_the_gap_is_between_two_images_and_its_error_over_images() -> None:
    own, other = torch.tensor([[1.0, 3.0], [2.0, 4.0]]), torch.tensor([[2.0, 4.0], [5.0, 7.0]])
    found = Audited.of(own, other, MARK)
    assert (found.per_head, found.kl, found.gap) == ([1.5, 3.5], 2.5, 2.0)
    assert found.gap_se == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("kl", "gap", "gap_se", "alike"),
    [
        (0.45, 0.001, 0.002, True),  # the mean row and nothing else
        (0.45, -0.02, 0.002, True),  # fits other images better than its own
        (0.45, 0.06, 0.002, False),  # some of what there is in images
        (0.45, 0.001, 0.03, False),  # perhaps: too few images to tell
        (0.80, 0.001, 0.002, False),  # has not learnt what they have in common yet
        (1.45, 0.001, 0.002, False),  # has learnt nothing
        (0.05, 0.60, 0.02, False),  # has learnt all
    ],
)
def test_alike_for_any_image(kl: float, gap: float, gap_se: float, alike: bool) -> None:
    assert audited(kl, gap, gap_se).alike_for_any_image() is alike
    found = alarms("qk", audited(kl, gap, gap_se), [])
    assert len(found) == alike and all("qk: the student answers alike for any image: KL 0.45" in text for text in found)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_thresholds_have_no_scale(scale: float) -> None:
    mark = Yardstick(1.4 * scale, 0.4 * scale)
    assert audited(0.45 * scale, 0.001 * scale, 0.002 * scale, mark).alike_for_any_image()
    assert not audited(0.45 * scale, 0.06 * scale, 0.002 * scale, mark).alike_for_any_image()


def test_images_that_have_nothing_in_common_are_no_alarm_at_the_start() -> None:
    """The mean row is then as bad as even rows, and a student that knows nothing has "learnt" it."""
    mark = Yardstick(even=1.0, common=1.1)
    assert not audited(1.02, 0.0, mark=mark).alike_for_any_image()
    assert not audited(0.98, 0.01, mark=mark).alike_for_any_image()  # half of what it has learnt is of the image


def test_an_audit_that_does_not_follow_the_training() -> None:
    fine = audited(0.30, 0.3)
    falls = [Point(100, 0.5, 0.8), Point(200, 0.35, 0.6), Point(300, 0.30, 0.4)]
    assert alarms("vv", fine, falls) == [] == alarms("vv", fine, falls[:1]) == alarms("vv", fine, [])
    level = [Point(100, 0.5, 0.8), Point(200, 0.51, 0.7), Point(300, 0.5, 0.4)]
    (text,) = alarms("vv", fine, level)
    assert text.startswith("vv: since step 100 the training's KL fell from 0.8000 to 0.4000, while the audit's")
    rises = [Point(100, 0.5, 0.8), Point(200, 0.3, 0.6), Point(300, 0.31, 0.4)]
    assert "since step 200" in alarms("vv", fine, rises)[0]
    both_stay = [Point(100, 0.5, 0.8), Point(200, 0.5, 0.7)]
    assert alarms("vv", fine, both_stay) == []
