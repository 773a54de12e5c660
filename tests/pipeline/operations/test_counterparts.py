"""Every operation beside Pillow or torchvision: equal to the last bit, or to one level."""

import numpy as np
import pytest

from tinymim.pipeline.operations.registry import OPERATIONS
from tinymim.pipeline.operations.tables import posterize
from tinymim.tests.pipeline.operations.counterparts import EXACT, FILL, GEOMETRY, PICTURES, planes


@pytest.mark.parametrize("name", EXACT)
def test_tables_blends_and_blurs_are_pillows_to_the_last_bit(name: str) -> None:
    several, theirs = EXACT[name]
    for image in PICTURES:
        for arguments in several:
            ours = OPERATIONS[name](planes(image), *arguments)
            np.testing.assert_array_equal(ours, planes(theirs(image, *arguments)), err_msg=f"{arguments}")


def test_a_posterize_that_keeps_no_bit_is_black() -> None:
    """timm asks for it at magnitude 10 with inc1; Pillow 13 refuses it."""
    assert not posterize(planes(PICTURES[0]), 0).any()


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_is_pillows_to_one_level(name: str) -> None:
    """Pillow cuts a double where we cut a multiple of 2^-16 (2^-22 for rotations)."""
    several, theirs = GEOMETRY[name]
    for image in PICTURES:
        for argument in several:
            ours = OPERATIONS[name](planes(image), argument, FILL).astype(int)
            apart = np.abs(ours - planes(theirs(argument)(image)).astype(int))
            assert apart.max() <= 1 and (apart > 0).mean() < (0.06 if name == "rotate" else 0.01), argument
            if argument == 0:
                np.testing.assert_array_equal(ours, planes(image))
