"""Histograms of oriented gradients (HOG) of images: FastMIM's target of masked pre-training (Guo et al., 2022).

Shapes: B image, S pixel, C cell of a side.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, normalize, pad

CELL = 8  # pixels along a side of a cell
BINS = 9  # of 20 degrees; opposite gradients are in the same bin
HOG_MEAN = 0.25  # of a bin of real images, normalised; between 1 / 9 (one direction) and 1 / 3 (all alike)
FEATURES = 3 * BINS  # of a cell: the bins of red, of green, of blue
_EPS = 1e-12


def hog(images: Float[Tensor, "B 3 S S"], normalise: bool = True) -> Float[Tensor, "B 27 C C"]:
    """Histograms of the gradients' directions in cells of 8 x 8 pixels, for each colour.

    Gradients are Sobel's, on an image whose border is reflected. Each pixel adds its gradient's length to one bin
    alone; there is no interpolation between bins, no window and no normalisation over blocks of cells.

    Args:
        images: of any scale, S a multiple of 8. Computed in float32 at least, also within autocast: a cell adds 64
            lengths.
        normalise: divide the bins of each cell and colour by their Euclidean length.

    Returns:
        bin b of colour c at channel 9 c + b.
    """
    with torch.autocast(images.device.type, enabled=False):
        images = images if images.dtype == torch.float64 else images.float()
        sobel = images.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        planes = pad(images, (1, 1, 1, 1), mode="reflect").flatten(0, 1)[:, None]  # [B * 3, 1, S + 2, S + 2]
        x, y = conv2d(planes, torch.stack([sobel, sobel.T])[:, None]).unbind(1)
        number = (torch.atan2(x, y) / math.pi * BINS).floor().long() % BINS
        bins = torch.zeros(len(x), BINS, *x.shape[1:], dtype=x.dtype, device=x.device)
        bins.scatter_(1, number[:, None], torch.hypot(x, y)[:, None])
        cells = avg_pool2d(bins, CELL, divisor_override=1)
        cells = normalize(cells, dim=1, eps=_EPS) if normalise else cells
        found: Tensor = cells.unflatten(0, (len(images), 3)).flatten(1, 2)
        return found
