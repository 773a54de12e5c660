"""Typed reads of an opened cache."""

import torch
from torch import Tensor

from tinymim.configs.codecs import TargetsConfig
from tinymim.stages.units.constants import on_device
from tinymim.storage.constants import read_constants
from tinymim.storage.manifest import Manifest
from tinymim.storage.reader import CacheReader
from tinymim.storage.store import Store
from tinymim.targets.contract import TargetKind
from tinymim.targets.kinds import stored_kind


def opened_kind(reader: CacheReader, targets: TargetsConfig, device: torch.device) -> TargetKind:
    """The target kind of a cache, restricted to `targets`, with its constants on `device`."""
    constants = stored_constants(reader.store, reader.manifest, device)
    return stored_kind(reader.manifest.codec, reader.manifest.block, targets, constants)


def stored_constants(store: Store, manifest: Manifest, device: torch.device) -> dict[str, Tensor] | None:
    """The constants of a cache on `device`, None if it has none; errors as `storage.constants.read_constants`."""
    return on_device(read_constants(store, manifest), device)
