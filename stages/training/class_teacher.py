"""DeiT's distillation in fine-tuning: a classifier in the loop teaches a distillation token (Touvron et al., 2021).

Shapes: B image, S pixel, K class.
"""

import torch
from jaxtyping import Bool, Float
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from tinymim.configs.errors import CheckpointError, RecipeError
from tinymim.configs.schema.finetune import FinetuneRecipe
from tinymim.configs.sections.models import ClassTeacherConfig
from tinymim.models import backbone
from tinymim.models.checkpoints import tensors_sha256
from tinymim.models.distilled import PooledDistilled
from tinymim.models.vit import Normalise
from tinymim.models.weights import build_with_weights, stated
from tinymim.stages.run.device import autocast


class ClassTeacher:
    """A frozen classifier that sees the student's augmented and mixed batch, in its own normalisation.

    Args:
        recipe: the recipe, with `distil`.
        student: the model in training; it is set to answer with both of its heads.
        normalise: the student's normalisation, on the device.
        device: the device of the teacher.

    Attributes:
        sha256: the digest of the teacher's weights.

    Raises:
        CheckpointError: the weights do not exist, do not fit or have another number of classes.
        RecipeError: the student has no distillation token.
    """

    def __init__(self, recipe: FinetuneRecipe, student: nn.Module, normalise: Normalise, device: torch.device) -> None:
        assert recipe.distil is not None
        config = self._config = recipe.distil
        if not isinstance(student, VisionTransformerDistilled | PooledDistilled):
            raise RecipeError(
                "distil needs a student with a distillation token",
                got=recipe.model.name,
                hint="set model.name to deit_tiny_distilled_patch16_224, or small or base",
            )
        student.set_distilled_training(True)
        self._model = build_with_weights(config, config.weights, classifier=True).to(device).eval()
        if (classes := backbone.classes(self._model)) != backbone.classes(student):
            raise CheckpointError(
                "distil: the teacher has other classes than the training set",
                got=f"{classes:,} classes in {config.weights}",
                expected=f"{backbone.classes(student):,}",
            )
        pixels = stated(self._model, config, config.weights, config.mean, config.std)
        self._own, self._normalise = normalise, Normalise(pixels.mean, pixels.std).to(device)
        self._size, self._precision, self._device = config.img_size, recipe.precision, device
        self.sha256 = tensors_sha256(self._model.state_dict())

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B K"]:
        """Logits for the student's normalised images, which are resized if the teacher has another input size."""
        pixels = self._normalise(images * self._own.std + self._own.mean)
        if pixels.shape[-1] != self._size:
            pixels = nn.functional.interpolate(
                pixels, size=(self._size, self._size), mode="bicubic", align_corners=False, antialias=True
            )
        with autocast(self._device, self._precision):
            logits: Tensor = self._model(pixels)
        return logits.float()

    def losses(
        self, logits: tuple[Tensor, Tensor], labels_loss: Tensor, teacher: Float[Tensor, "B K"], targets: Tensor
    ) -> dict[str, Tensor]:
        """The losses of a part: "loss" is trained.

        Args:
            logits: the student's, of the class token and of the distillation token, each [B, K].
            labels_loss: the cross entropy of the first with the labels.
            teacher: the teacher's logits.
            targets: the labels, [B, K]; a row of zeros is the replacement of an unreadable image and trains nothing.
        """
        distilled = distillation_loss(logits[1].float(), teacher, targets.any(dim=1), self._config)
        weight = self._config.weight
        return {
            "loss": (1 - weight) * labels_loss + weight * distilled,
            "ce_labels": labels_loss,
            "ce_teacher": distilled,
        }


def distillation_loss(
    student: Float[Tensor, "B K"], teacher: Float[Tensor, "B K"], counts: Bool[Tensor, " B"], config: ClassTeacherConfig
) -> Float[Tensor, ""]:
    """DeiT's loss, summed over the rows that count and divided by B.

    Hard: cross entropy with the teacher's class. Soft: T^2 KL(teacher / T || student / T) / K, as in DeiT's code.
    """
    if config.loss == "hard":
        rows = nn.functional.cross_entropy(student, teacher.argmax(dim=1), reduction="none")
    else:
        t = config.temperature
        ours, theirs = (student / t).log_softmax(dim=1), (teacher / t).log_softmax(dim=1)
        rows = nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).mean(dim=1) * t**2
    return torch.where(counts, rows, 0.0).mean()
