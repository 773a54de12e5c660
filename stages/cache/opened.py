"""Typed reads of an opened cache."""

import torch

from tinymim.configs.codecs import TargetsConfig
from tinymim.stages.units.constants import on_device
from tinymim.storage.manifest import Layer
from tinymim.storage.reader import CacheReader
from tinymim.targets.contract import TargetKind
from tinymim.targets.kinds import stored_kind


def opened_kind(reader: CacheReader, layer: Layer, targets: TargetsConfig, device: torch.device) -> TargetKind:
    """The target kind of a layer, restricted to `targets`, with its constants on `device`."""
    return stored_kind(layer.target, targets, on_device(reader.constants(layer.name), device))
