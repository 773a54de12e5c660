"""Our own arithmetic beside that of `math`."""

import math

import numpy as np
import pytest

from tinymim.pipeline.operations.arithmetic import exponential, normal_quantiles, sine_cosine


def test_series_and_normal_table() -> None:
    for degrees in (0.0, 13.0, -30.0, 90.0, 179.0, 400.0, -1000.5):
        np.testing.assert_allclose(
            sine_cosine(degrees), (math.sin(math.radians(degrees)), math.cos(math.radians(degrees))), atol=1e-14
        )
    for x in (-1.2, 0.0, 0.3, 1.2):
        assert exponential(x) == pytest.approx(math.exp(x), rel=1e-15)
    table = np.array(normal_quantiles())
    assert len(table) == 4096 and abs(table.mean()) < 1e-6 and table.std() == pytest.approx(1.0, abs=2e-3)
    assert (np.diff(table) > 0).all() and table[0] == -table[-1]
