"""The file behind the `weights` of a recipe. Imports no torch, so that an absent file is reported at once."""

from pathlib import Path
from typing import Final, NamedTuple

from tinymim.configs.errors import CheckpointError
from tinymim.configs.sections import FACTORY as FACTORY
from tinymim.configs.sections import HUB as HUB

RANDOM: Final = "random"
_PACKAGE: Final = "package:"


class WeightsFile(NamedTuple):
    """A file of weights, and the key of the weights in it ("FILE#KEY"), if it holds several models."""

    path: Path
    under: str | None = None


def weights_file(weights: str) -> WeightsFile:
    """The file of "package:NAME", of "FILE" or "FILE#KEY", or in a folder that timm loads.

    Raises:
        CheckpointError: no such file.
    """
    named, _, key = weights.rpartition("#")
    if key and named and not Path(weights).exists():
        return WeightsFile(weights_file(named).path, key)
    if weights.startswith(_PACKAGE):
        folder = Path(__file__).with_name("weights")
        path = folder / f"{weights.removeprefix(_PACKAGE)}.safetensors"
        shipped = ", ".join(sorted(p.stem for p in folder.glob("*.safetensors"))) or "none"
        hint = f"shipped weights: {shipped}"
    else:
        path, hint = Path(weights), "give a .safetensors or .pth file, 'hub', or 'package:NAME'"
        if (inside := path / "model.safetensors").is_file():  # a folder for timm
            path = inside
    if not path.is_file():
        raise CheckpointError("weights file does not exist", got=path, hint=hint)
    return WeightsFile(path)
