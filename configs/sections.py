"""The sections that recipes are made of: frozen, typed, unknown keys refused, all problems reported at once.

`docs/recipes.md` explains them in prose. Defaults are TinyMIM's (Ren et al., CVPR 2023) where it has one.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tinymim.configs.place import Place

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Precision = Literal["fp32", "bf16", "fp16"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Workers = Positive  # training processes, one per GPU, unless torchrun has started them
Cluster = Literal["local", "ray"]  # where these are started: on this machine, or by Ray Train on a cluster
Restarts = Annotated[int, Field(ge=0)]  # times that a killed or crashed worker makes all of them begin again


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, defaults checked like given values."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class SpoolConfig(Section):
    """Local copies of an object store's shards, shared by all processes of a machine. Local shards need none."""

    folder: Path | None = None  # on a local disk; None: tinymim/spool in the user's cache folder
    gib: Annotated[float, Field(gt=0)] = 20.0  # at most; the shards used longest ago go first


class SourceConfig(Section):
    """Where images come from: webdataset tars, with the index `make-shards` wrote or without one."""

    shards: Place  # a folder, or the URL of one in an object store
    pattern: str = "*.tar"  # which tars of the folder belong to the set
    spool: SpoolConfig = SpoolConfig()


class ViewConfig(Section):
    """The view law (I1): RandomResizedCrop + flip, a function of (seed, key, view index) alone."""

    size: Positive = 224  # output pixels, square
    scale: tuple[Fraction, Fraction] = (0.2, 1.0)  # share of the image area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, log-uniform
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip: Fraction = 0.5  # probability of a horizontal flip
    seed: int = 0
    scaled_decode: bool = True  # JPEGs are decoded at 1/2, 1/4 or 1/8 where the box stays at least `size` long

    def identity(self) -> dict[str, Any]:
        """The law as a cache's manifest holds it: caches from before scaled decoding lack the field."""
        return self.model_dump(mode="json", exclude=None if self.scaled_decode else {"scaled_decode"})

    @model_validator(mode="after")
    def _ordered(self) -> "ViewConfig":
        if not 0.0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be 0 < low <= high, got {self.scale}")
        if not 0.0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be 0 < low <= high, got {self.ratio}")
        return self


class ModelConfig(Section):
    """A plain ViT by its timm name; the sizes given here override the named architecture."""

    name: str = "vit_tiny_patch16_224"
    img_size: Positive = 224
    patch_size: Positive | None = None
    embed_dim: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None


class TeacherConfig(ModelConfig):
    """The teacher: a timm ViT, its weights, and the block whose q, k, v are taken."""

    name: str = "vit_large_patch16_224.mae"
    # "hub": timm's pretrained weights of `name`; "package:NAME": weights shipped with tinymim; else a file.
    weights: str = "hub"
    block: Positive = 18  # counted from 1; the teacher is cut after this block's qkv
    precision: Precision = "fp32"
    compile: bool = False  # torch.compile of the blocks before the tapped one; no part of a cache's identity
    # Per-channel normalisation of pixels in 0..1; None: what timm states for hub weights, ImageNet's for a file.
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


class OptimConfig(Section):
    """AdamW with linear warm-up and a cosine to `min_lr`, per step. Give `epochs` or `steps`, not both."""

    batch_size: Positive = 256
    epochs: Positive | None = None
    steps: Positive | None = None
    base_lr: Annotated[float, Field(gt=0)] = 1.5e-4  # lr at batch 256; scaled linearly with the batch
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup: Fraction = 0.05  # share of all steps (TinyMIM: 15 of 300 epochs)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.05  # none on biases and 1-D parameters
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    accumulate: Positive = 1  # parts into which a rank cuts its share of a batch, one after the other in memory

    @model_validator(mode="after")
    def _one_length(self) -> "OptimConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give epochs or steps, exactly one; got epochs={self.epochs}, steps={self.steps}")
        return self


class LayerwiseOptimConfig(OptimConfig):
    """AdamW for fine-tuning; the rate is the head's, and each layer below has `layer_decay` of that above it."""

    base_lr: Annotated[float, Field(gt=0)] = 5e-4
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65  # 1: the same rate everywhere


class LoaderConfig(Section):
    """Reading and decoding. None of this changes a pixel or the order of samples."""

    workers: Annotated[int, Field(ge=0)] = 2
    prefetch: Positive = 4  # batches per worker; at least the batches of one decode, see order.views_per_decode


class OrderConfig(Section):
    """The order of samples: a function of (seed, epoch) alone, whatever the number of workers (I10)."""

    seed: int = 0
    shuffle_units: Positive = 4  # shards whose samples are mixed with one another, in every lane
    # Views of an image that one decode serves: its batch and the next ones hold the same images, other views.
    views_per_decode: Positive = 1
    views_per_epoch: Positive | Literal["all"] = 1  # views of every image in one epoch, the next ones in the next
    # Parts into which an epoch's shards are dealt: a multiple of every number of ranks that will train with it.
    lanes: Positive = 1

    @model_validator(mode="after")
    def _whole_decodes(self) -> "OrderConfig":
        if self.views_per_epoch != "all" and self.views_per_epoch % self.views_per_decode:
            raise ValueError(
                f"views_per_epoch must be a multiple of views_per_decode, or all; "
                f"got {self.views_per_epoch} and {self.views_per_decode}"
            )
        return self


class RunConfig(Section):
    """What every training or caching run shares."""

    folder: Path  # resolved recipe, versions, metrics.jsonl, TensorBoard, checkpoints
    device: Device = "auto"
    seed: int = 0
    threads: Positive | None = None  # torch intra-op threads; None: torch's choice
    log_every: Positive = 20  # steps between metric lines


class MaeConfig(Section):
    """Masked autoencoder (He et al., CVPR 2022), decoder sizes; defaults are MAE-Lite's for ViT-T."""

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    decoder_dim: Positive = 96
    decoder_depth: Positive = 1
    decoder_heads: Positive = 3
    norm_pixels: bool = True  # predict pixels normalised per patch


class JitterConfig(Section):
    """Student-only photometric jitter (I3), in the manner of torchvision's ColorJitter."""

    brightness: Fraction = 0.4
    contrast: Fraction = 0.4
    saturation: Fraction = 0.4


class AugmentConfig(Section):
    """What fine-tuning does to a view, by timm: RandAugment, random erasing, mixup or CutMix. 0 or null: not at all."""

    rand_augment: str | None = "rand-m9-mstd0.5-inc1"  # timm's notation
    erasing: Fraction = 0.25  # share of the images in which a box becomes noise
    mixup: Annotated[float, Field(ge=0)] = 0.8  # alpha; of both the coin decides, batch by batch
    cutmix: Annotated[float, Field(ge=0)] = 1.0  # alpha

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


class VerifyConfig(Section):
    """How many replayed views have their pixel digest compared with the stored one (I2)."""

    first: Annotated[int, Field(ge=0)] = 4096  # all of the first so many samples after a start or resume
    every: Annotated[int, Field(ge=0)] = 16  # then one in so many; 0: none


class EmaConfig(Section):
    """Exponential moving average of the weights (timm's ModelEmaV3), exported beside the weights themselves."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    warmup: bool = True  # the decay begins at 0 and rises as 1 - (1 + step)^(-2/3), up to `decay`


class CheckpointConfig(Section):
    """Training states for resume, each written atomically."""

    every_steps: Positive = 1000
    keep: Positive = 2  # newest states kept; the one before is used where the newest is damaged
    resume: bool = True  # continue from the run folder's newest state if there is one


class ClusterConfig(Section):
    """Workers of stage one on a Ray cluster, each with a teacher of its own."""

    # "auto": what RAY_ADDRESS names, else the Ray that runs on this machine, else as "local": one begun for this run.
    address: Annotated[str, Field(pattern=r"^(local|auto|(ray://)?[^/\s]+:\d+)$")] = "auto"
    workers: Positive | None = None  # None: as many as the cluster has room for when the run begins
    gpus_per_worker: Annotated[float, Field(ge=0)] = 1.0  # below 1: several workers on one GPU; 0: on CPUs
    cpus_per_worker: Annotated[float, Field(gt=0)] = 2.0  # what Ray counts; `loader.workers` come in addition

    @model_validator(mode="after")
    def _whole_gpus(self) -> "ClusterConfig":
        if self.gpus_per_worker not in (0.0, 1.0) and not 0 < self.gpus_per_worker < 1:
            raise ValueError(
                f"gpus_per_worker is 0, a fraction or 1: a worker uses one GPU; got {self.gpus_per_worker}"
            )
        return self


class ValidationConfig(Section):
    """Accuracy on the validation set during fine-tuning; at its end in any case."""

    every_epochs: Positive = 1
    batch_size: Positive = 256  # of one rank
    resize_ratio: Annotated[float, Field(ge=1)] = 1.143  # short side = size x ratio, then centre crop (256/224)


class KnnConfig(Section):
    """Weighted k-NN on l2-normalised features (Wu et al., CVPR 2018; Caron et al., ICCV 2021)."""

    k: Positive = 20
    temperature: Annotated[float, Field(gt=0)] = 0.07


class KnnEvaluator(KnnConfig):
    """An evaluator: top-1 and top-5 accuracy of k-NN."""

    name: Literal["knn"]


class LinearEvaluator(Section):
    """An evaluator: accuracy of multinomial logistic regression on standardised features by L-BFGS, full batch."""

    name: Literal["linear"]
    l2: Annotated[float, Field(ge=0)] = 1e-3
    max_iter: Positive = 200


Evaluator = Annotated[KnnEvaluator | LinearEvaluator, Field(discriminator="name")]


class AuditKnnConfig(KnnConfig):
    """k-NN accuracy of students in training: centre crops of labelled shards."""

    train: SourceConfig
    val: SourceConfig
    resize_ratio: Annotated[float, Field(ge=1)] = 1.143  # as in `evaluate`
    batch_size: Positive = 256


class AuditConfig(Section):
    """Students in training compared with dense targets of images that they are not trained on."""

    cache: Place  # dense or hidden, of the teacher and view size of the training's cache
    source: SourceConfig  # its images: held out
    every_epochs: Annotated[float, Field(gt=0)] = 10.0  # and before the first step, and after the last
    num_images: Annotated[int, Field(ge=8)] = 64  # the first so many of the cache, one view of each
    knn: AuditKnnConfig | None = None
    on_alarm: Literal["warn", "stop"] = "warn"
