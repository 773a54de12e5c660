"""The file behind the `weights` of a recipe. Imports no torch, so that an absent file is reported at once."""

from pathlib import Path
from typing import Final

from tinymim.configs.errors import CheckpointError

RANDOM: Final = "random"
HUB: Final = "hub"
_PACKAGE: Final = "package:"


def weights_path(weights: str) -> Path:
    """The file of "package:NAME" or of a path.

    Raises:
        CheckpointError: no such file.
    """
    if weights.startswith(_PACKAGE):
        folder = Path(__file__).with_name("weights")
        path = folder / f"{weights.removeprefix(_PACKAGE)}.safetensors"
        shipped = ", ".join(sorted(p.stem for p in folder.glob("*.safetensors"))) or "none"
        hint = f"shipped weights: {shipped}"
    else:
        path, hint = Path(weights), "give a .safetensors or .pth file, 'hub', or 'package:NAME'"
    if not path.is_file():
        raise CheckpointError("weights file does not exist", got=path, hint=hint)
    return path
