"""k-NN of students and teacher on the audited images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tinymim.configs.sections.audits import AuditKnnConfig
from tinymim.configs.sections.loader import LoaderConfig
from tinymim.models import backbone
from tinymim.models.vit import Normalise
from tinymim.pipeline.shards import open_shards
from tinymim.pipeline.views import CentreView
from tinymim.stages.evaluation import knn
from tinymim.stages.evaluation.classes import count_classes
from tinymim.stages.evaluation.encode import Encoder
from tinymim.stages.evaluation.problem import Sets
from tinymim.stages.run.interrupt import StopFlag


class _SideBySide(nn.Module):
    """Several ViTs of one grid as one model with the channels of all, so that images are decoded once."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.num_prefix_tokens = backbone.prefix_tokens(models[0])

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, T, sum of widths]."""
        return torch.cat([model.forward_features(images) for model in self.models], dim=-1)  # type: ignore[operator]


class AuditKnn:
    """The k-NN accuracy of any number of students at once.

    Args:
        config: the section `audit.knn` of the recipe.
        size: side of the students' input in pixels.
        loader: the loader section of the training run.

    Raises:
        SourceError: bad or unlabelled shards.
    """

    def __init__(self, config: AuditKnnConfig, size: int, loader: LoaderConfig) -> None:
        self.config, self.loader = config, loader
        self._sets = open_shards(config.train), open_shards(config.val)
        self._law = CentreView(size, config.resize_ratio)
        count_classes(*self._sets)

    def accuracy(self, vits: Sequence[nn.Module], stop: StopFlag) -> list[dict[str, float]]:
        """{"knn_top1", "knn_top5"} of each of `vits`, which are in eval mode.

        Images are decoded once for all models on one device. Raises Interrupted if `stop` is requested.
        """
        found: dict[int, dict[str, float]] = {}
        devices = [next(vit.parameters()).device for vit in vits]
        for device in dict.fromkeys(devices):
            here = [number for number, own in enumerate(devices) if own == device]
            found |= dict(zip(here, self._on(device, [vits[number] for number in here], stop), strict=True))
        return [found[number] for number in range(len(vits))]

    def _on(self, device: torch.device, vits: Sequence[nn.Module], stop: StopFlag) -> list[dict[str, float]]:
        model, batch_size = _SideBySide(vits), self.config.batch_size
        encoder = Encoder(model, Normalise(), self._law, None, "mean", batch_size, self.loader, device)
        train, val = (
            encoder.encode(source.shards, stop, f"audit k-NN, {name}")
            for name, source in zip(("train", "val"), self._sets, strict=True)
        )
        widths = [backbone.widths(vit)[-1] for vit in vits]
        parts = [set_._replace(features=part) for set_ in (train, val) for part in set_.features.split(widths, dim=1)]
        pairs = zip(parts[: len(vits)], parts[len(vits) :], strict=True)
        return [knn.run(encoder, Sets(*pair), self.config) for pair in pairs]
