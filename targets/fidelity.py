"""Distance between a student's gradients under a codec and under the dense target: bias, noise, angle (I5).

Notation: g_i is the gradient of view i under the dense target, d_ir the one under draw r, e_ir = d_ir - g_i.

- noise ratio: variance of e over views and draws / variance of g over views. A minibatch gradient of n views has
  variance Var(g) / n already; the codec multiplies it by one plus this ratio. Zero for exact targets.
- bias: |E e| / |E g|. The squared norm of a mean of n noisy vectors is too large by the noise, so it is estimated by
  the mean over pairs of *different* views of <e_i, e_j> (a U-statistic, unbiased), its standard error by a jackknife
  over groups of views. `bias` is the root of the estimate (0 where that is negative).
- angle and norm ratio of the mean gradients over all views.

Shapes: P part (a head, or one for a whole network), N gradient coordinate, G group.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

Gradients = Mapping[str, Float[Tensor, "P N"]]  # by name: "all", or a loss with its parts

SIGNIFICANT_DIGITS: Final = 4  # of reported values: rounding hides the order in which threads add
# A bias is significant above this number of standard errors: one-sided, 2.3 % false alarms each.
STANDARD_ERRORS: Final = 2.0


class GradientMoments:
    """Sums over views, for the fidelity of one codec.

    Args:
        views: number of views that will be added.
        groups: number of groups of views for the jackknife; at most one per view.
    """

    def __init__(self, views: int, groups: int = 16) -> None:
        self.groups = min(views, groups)
        self.views = 0
        self._parts: dict[str, _PartMoments] = {}

    def add(self, dense: Gradients, draws: Sequence[Gradients]) -> None:
        """Add one view: its gradient under the dense target and under one or more independent draws of the codec."""
        group = self.views % self.groups
        for name, gradient in dense.items():
            exact = gradient.cpu()  # sums on the CPU, so that `summary` does not wait behind the teacher on a GPU
            if name not in self._parts:
                self._parts[name] = _PartMoments(self.groups, exact)
            self._parts[name].add(group, exact, torch.stack([draw[name] for draw in draws]).cpu())
        self.views += 1

    def summary(self) -> dict[str, dict[str, list[float]]]:
        """bias, bias_se, biased (0 or 1), noise_ratio, angle_deg and norm_ratio by name, each a list over parts."""
        return {name: part.summary() for name, part in self._parts.items()}


class _PartMoments:
    def __init__(self, groups: int, like: Float[Tensor, "P N"]) -> None:
        self.count = torch.zeros(groups, dtype=torch.float64)
        self.draws = 0
        self.exact_sum = torch.zeros_like(like)
        self.error_sum = like.new_zeros(groups, *like.shape)  # of the views' mean errors
        self.exact_square = torch.zeros(len(like), dtype=torch.float64)
        self.error_square = torch.zeros(len(like), dtype=torch.float64)  # of single draws
        self.mean_error_square = torch.zeros(groups, len(like), dtype=torch.float64)

    def add(self, group: int, exact: Float[Tensor, "P N"], draws: Float[Tensor, "R P N"]) -> None:
        errors = draws - exact
        mean_error = errors.mean(0)
        self.count[group] += 1
        self.draws += len(draws)
        self.exact_sum += exact
        self.error_sum[group] += mean_error
        self.exact_square += _square(exact)
        self.error_square += _square(errors).sum(0)
        self.mean_error_square[group] += _square(mean_error)

    def summary(self) -> dict[str, list[float]]:
        views = float(self.count.sum())
        exact_mean, error_mean = self.exact_sum / views, self.error_sum.sum(0) / views
        exact_norm = _square(exact_mean).sqrt()
        scale = exact_norm.clamp(min=1e-300)  # a part may have no gradient
        between_views = (self.exact_square - views * _square(exact_mean)) / max(views - 1, 1)
        noise = (self.error_square - self.draws * _square(error_mean)).clamp(min=0) / max(self.draws - 1, 1)
        bias_square, se = self._bias_square()
        bias = bias_square.clamp(min=0).sqrt()
        # The root of one standard error up: near zero the root of the error, far from zero error / (2 bias).
        bias_se = (bias_square.clamp(min=0) + se).sqrt() - bias
        found = exact_mean + error_mean
        norm = _square(found).sqrt()
        cosine = (found.double() * exact_mean.double()).sum(-1) / (norm * exact_norm).clamp(min=1e-300)
        values = {
            "bias": bias / scale,
            "bias_se": bias_se / scale,
            "biased": (bias_square > STANDARD_ERRORS * se + 1e-12 * exact_norm.square()).double(),
            "noise_ratio": noise / between_views.clamp(min=1e-300),
            "angle_deg": cosine.clamp(-1, 1).arccos() * (180 / math.pi),
            "norm_ratio": norm / scale,
        }
        return {name: [rounded(float(v)) for v in value] for name, value in values.items()}

    def _bias_square(self) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
        """Estimate of |E e|^2 and its jackknife standard error."""

        def estimate(count: Tensor, total: Tensor, squares: Tensor) -> Tensor:
            pairs = (count * (count - 1)).clamp(min=1)
            return (_square(total) - squares) / pairs

        count, total, squares = self.count.sum(), self.error_sum.sum(0), self.mean_error_square.sum(0)
        whole = estimate(count, total, squares)
        seen = [g for g in range(len(self.count)) if self.count[g]]
        if len(seen) < 2:
            return whole, torch.full_like(whole, math.inf)
        left_out = torch.stack(
            [
                estimate(count - self.count[g], total - self.error_sum[g], squares - self.mean_error_square[g])
                for g in seen
            ]
        )
        spread = (left_out - left_out.mean(0)).square().sum(0) * (len(seen) - 1) / len(seen)
        return whole, spread.sqrt()


class StatisticMoments:
    """Means over views of `TargetKind.statistics`, per loss and part."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {}
        self.views = 0

    def add(self, statistics: Mapping[str, Mapping[str, Float[Tensor, "B P"]]], views: int) -> None:
        """Add the statistics of B = `views` further views."""
        self.views += views
        for loss, values in statistics.items():
            sums = self._sums.setdefault(loss, {})
            for name, value in values.items():
                per_part = value.sum(dim=0).double().cpu()
                sums[name] = sums[name] + per_part if name in sums else per_part

    def summary(self) -> dict[str, dict[str, list[float]]]:
        """The means by loss and name, each a list over parts."""
        return {
            loss: {name: [rounded(v) for v in (s / self.views).tolist()] for name, s in sums.items()}
            for loss, sums in self._sums.items()
        }


def rounded(value: float) -> float:
    """The value in `SIGNIFICANT_DIGITS` digits."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def merged(*summaries: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    """Summaries of the same views as one, merged name by name."""
    result: dict[str, Any] = {}
    for summary in summaries:
        for name, values in summary.items():
            result.setdefault(name, {}).update(values)
    return result


def _square(x: Float[Tensor, "... N"]) -> Tensor:
    """Squared norms over the last axis, float64."""
    return x.double().square().sum(-1)
