"""The file behind the `weights` of a recipe. Imports no torch, so that an absent file is reported at once."""

from pathlib import Path
from typing import Final, NamedTuple

from tinymim.configs.errors import CheckpointError

RANDOM: Final = "random"
HUB: Final = "hub"
_PACKAGE: Final = "package:"
# What timm and transformers write into a folder.
_IN_FOLDER: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class WeightsFile(NamedTuple):
    """A file of weights, and the key of the weights in it ("FILE#KEY"), if it holds several models."""

    path: Path
    under: str | None = None


def weights_file(weights: str) -> WeightsFile:
    """The file of "package:NAME", of "FILE" or "FILE#KEY", or in a folder of timm or transformers.

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
        path = next((path / name for name in _IN_FOLDER if (path / name).is_file()), path)
    if not path.is_file():
        raise CheckpointError("weights file does not exist", got=path, hint=hint)
    return WeightsFile(path)
