"""What the kinds that are compared by a mean square share.

Shapes: B view.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tinymim.targets.contract import Loss, Yardstick


def squared_error(
    student: Float[Tensor, "B ..."], teacher: Float[Tensor, "B ..."], square: Float[Tensor, " B"]
) -> Loss:
    """The mean squared error; `square` is the teacher's exact mean square, which the floor is made of."""
    parts = _mean(student * (student - 2 * teacher.to(student.dtype)))[:, None]
    return Loss(parts, -square.to(student.dtype))


def square_yardstick(targets: Sequence[tuple[Float[Tensor, "B ..."], Float[Tensor, " B"]]]) -> Yardstick:
    """The error of zeros, and of the mean over all other views, for pairs of values and their mean squares."""
    count = sum(len(values) for values, _ in targets)
    total = torch.stack([values.sum(0, dtype=torch.float64) for values, _ in targets]).sum(0)
    even = common = 0.0
    for values, square in targets:
        others = ((total - values) / (count - 1)).to(values.dtype)
        even += float(squared_error(torch.zeros_like(others), values, square).mean()) * len(others)
        common += float(squared_error(others, values, square).mean()) * len(others)
    return Yardstick(even / count, common / count)


def square_statistics(
    exact: Float[Tensor, "B ..."], decoded: Float[Tensor, "B ..."]
) -> dict[str, Float[Tensor, "B 1"]]:
    """`rms` of the exact values, and `relative_error`, the squared error over the mean square."""
    square, error = _mean(exact.square()), _mean((decoded - exact).square())
    found = {"rms": square.sqrt(), "relative_error": error / square.clamp(min=torch.finfo(torch.float32).tiny)}
    return {name: value[:, None] for name, value in found.items()}


def _mean(values: Float[Tensor, "B ..."]) -> Float[Tensor, " B"]:
    return values.mean(tuple(range(1, values.ndim)))
