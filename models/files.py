"""The file behind the `weights` of a recipe. Imports no torch, so that an absent file is reported at once."""

import re
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from tinymim.configs.errors import CheckpointError, first_line

RANDOM: Final = "random"
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
    """The file of "package:NAME", of "FILE" or "FILE#KEY", in a folder of timm or transformers, or of the hub.

    A file of the hub, "hf://OWNER/NAME/FILE", is copied into the hub's local cache; without a path it is the
    repository's model.safetensors.

    Raises:
        CheckpointError: no such file.
    """
    if weights.startswith("hf://"):
        return WeightsFile(_from_hub(weights))
    named, _, key = weights.rpartition("#")
    if key and named and not Path(weights).exists():
        return WeightsFile(weights_file(named).path, key)
    if weights.startswith(_PACKAGE):
        folder = Path(__file__).with_name("weights")
        path = folder / f"{weights.removeprefix(_PACKAGE)}.safetensors"
        shipped = ", ".join(sorted(p.stem for p in folder.glob("*.safetensors"))) or "none"
        hint = f"shipped weights: {shipped}"
    else:
        path, hint = Path(weights), "give a .safetensors or .pth file, hf://OWNER/NAME/FILE, 'hub', or 'package:NAME'"
        path = next((path / name for name in _IN_FOLDER if (path / name).is_file()), path)
    if not path.is_file():
        raise CheckpointError("weights file does not exist", got=path, hint=hint)
    return WeightsFile(path)


@cache
def _from_hub(url: str) -> Path:
    """The local copy of a file of a model repository, fetched once."""
    match = re.fullmatch(r"hf://(?:models/)?([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?(?:/([^#?]+))?", url)
    if match is None:
        raise CheckpointError("weights name no file of the hub", got=url, expected="hf://OWNER/NAME[@REVISION][/FILE]")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(match[1], match[3] or "model.safetensors", revision=match[2]))
    except Exception as error:  # the client raises many kinds: no network, no such file, no access
        raise CheckpointError(
            f"{url} cannot be fetched",
            got=first_line(error),
            hint="check the name, the network, and for a private repository HF_TOKEN",
        ) from None
