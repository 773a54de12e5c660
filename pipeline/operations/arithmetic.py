"""Functions of real numbers with the same bits on every machine: sine, exponential, quantiles of the normal law."""

import math
from functools import lru_cache
from statistics import NormalDist

NORMAL_BITS = 12


def sine_cosine(degrees: float) -> tuple[float, float]:
    """By their series, since the last bit may differ between math libraries."""
    x = math.fmod(degrees, 360.0) * (math.pi / 180.0)
    terms = _terms(x, 60)
    signed = [-term if power % 4 > 1 else term for power, term in enumerate(terms)]
    return math.fsum(signed[1::2]), math.fsum(signed[::2])  # `sum` rounds differently since Python 3.12


def exponential(x: float) -> float:
    """e to the power of x, |x| < 4, by its series."""
    return math.fsum(_terms(x, 60))


def _terms(x: float, count: int) -> list[float]:
    """x^n / n!"""
    terms = [1.0]
    for power in range(1, count):
        terms.append(terms[-1] * x / power)
    return terms


@lru_cache(maxsize=1)
def normal_quantiles() -> tuple[float, ...]:
    """The middles of 4096 equal shares of the normal law, as multiples of 2^-16."""
    shares = 1 << NORMAL_BITS
    return tuple(round(NormalDist().inv_cdf((k + 0.5) / shares) * 65536) / 65536 for k in range(shares))
