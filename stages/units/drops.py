"""Stochastic depth of a teacher: the branches dropped for a view, a function of (seed, sample key, view index) (I1).

A branch is dropped by its number in the whole model, so a layer's records do not depend on the teacher's other taps.
"""

from typing import Final

from jaxtyping import Float64, Int64
from torch import Tensor

from tinymim.models.teacher import Teacher
from tinymim.targets.counter import uniforms

_DROPS: Final = 900  # stream; another number would give other records


def drawn_drops(teacher: Teacher, view_keys: Int64[Tensor, " B"]) -> Float64[Tensor, "B N"] | None:
    """What `Teacher` drops branches by, on the device of the view keys; None for a teacher that drops none."""
    return uniforms(view_keys, _DROPS, (teacher.branches,)) if teacher.branches else None
