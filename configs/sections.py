"""The sections that recipes are made of: frozen, typed, unknown keys refused, all problems reported at once.

Each field's `description` is its documentation: `tinymim recipes --fields STAGE` prints it, and `docs/recipes.md` is
generated from it. Defaults are TinyMIM's (Ren et al., CVPR 2023) if it has one.
"""

import math
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from tinymim.configs.errors import RecipeError
from tinymim.configs.place import checked_folder, checked_place
from tinymim.configs.rand_augment import checked_rand_augment

Factory = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$", max_length=200)]
Place = Annotated[Path | str, BeforeValidator(checked_place)]  # str: a URL, without a slash at its end
Folder = Annotated[Path, BeforeValidator(checked_folder)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")]
Name = Annotated[str, Field(pattern=r"^[\w-]+$", max_length=100)]  # of the user's choice; may become a folder
Precision = Literal["fp32", "bf16", "fp16"]
Title = Annotated[str, Field(min_length=1, max_length=100)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
LAYER_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
LayerName = Annotated[str, Field(pattern=LAYER_NAME)]
DropRate = Annotated[float, Field(ge=0.0, lt=1.0)]
# Integers fit into the types of torch and numpy, and the sizes of tensors into memory.
LARGEST = 2**31 - 1
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Whole = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Side = Annotated[int, Field(ge=1, le=8192)]
Width = Annotated[int, Field(ge=1, le=65536)]
Depth = Annotated[int, Field(ge=1, le=1000)]
Processes = Annotated[int, Field(ge=1, le=1024)]
Threads = Annotated[int, Field(ge=1, le=256)]
Batch = Annotated[int, Field(ge=1, le=2**20)]
Weight = Annotated[float, Field(ge=0.0, le=1e6)]  # of a loss
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Aspect = Annotated[float, Field(ge=1e-3, le=1e3)]
Level = Annotated[int, Field(ge=0, le=255)]
Spread = Annotated[float, Field(ge=0.0, le=255.0)]
Sigma = Annotated[float, Field(gt=0.0, le=20.0)]
ResizeRatio = Annotated[float, Field(ge=1.0, le=10.0)] | Literal["squeeze"]
Mean = tuple[Fraction, Fraction, Fraction]
Deviation = Annotated[float, Field(gt=0.0, le=1.0)]
Std = tuple[Deviation, Deviation, Deviation]
Cluster = Literal["local", "ray"]
HUB = "hub"  # words for weights that no file names
FACTORY = "factory"
MEAN_DESCRIPTION = (
    "Mean per RGB channel, for pixels in 0..1. Default: what the weights or their timm name state; required where "
    "they state none (docs/parity.md)."
)
STD_DESCRIPTION = "Standard deviation per RGB channel. Default: as for `mean`."
RESIZE_RATIO_DESCRIPTION = (
    "The short side is resized to input size x ratio, then the centre is cropped (256/224). `squeeze`: the whole image "
    "becomes the square (TinyViT at 384 px)."
)


def _checked_pattern(pattern: str) -> str:
    parts = PurePosixPath(pattern).parts
    if not parts or pattern.startswith("/") or {"..", "**"} & set(parts):
        raise ValueError("expected a glob below the folder, such as *.tar or train/*.tar, without .. and **")
    return pattern


Pattern = Annotated[str, AfterValidator(_checked_pattern)]


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, defaults checked like given values."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, defer_build=True, allow_inf_nan=False)

    @classmethod
    def choice(cls) -> dict[str, str]:
        """The values that select this section among possible ones: `kind`, and `name` unless `kind` implies it."""
        fields = {name: cls.model_fields.get(name) for name in ("kind", "name")}
        single = {n: f for n, f in fields.items() if f is not None and get_origin(f.annotation) is Literal}
        found = {n: f for n, f in single.items() if len(get_args(f.annotation)) == 1}
        return {
            name: get_args(field.annotation)[0]
            for name, field in found.items()
            if name == "kind" or field.is_required() or "kind" not in found
        }


class SpoolConfig(Section):
    """Local copies of an object store's shards, shared by all processes of a machine. Local shards need none."""

    folder: Folder | None = Field(
        default=None, description="Folder on a local disk. Default: tinymim/spool in the user's cache folder."
    )
    gib: float = Field(
        default=20.0, gt=0, le=1e9, description="Size limit in GiB. The least recently used shards go first."
    )


class SourceConfig(Section):
    """Images: webdataset tars, with or without the index that `make-shards` writes."""

    shards: Place = Field(description="Folder of tars, or its URL in an object store (docs/object-stores.md).")
    pattern: Pattern = Field(default="*.tar", description="Glob for the tars of the folder that belong to the set.")
    spool: SpoolConfig = Field(default=SpoolConfig(), description="Local copies of shards in an object store.")


class OperationsConfig(Section):
    """Operations on a view's pixels, in the order of the fields, drawn from (seed, sample key, view index) alone (I1).

    They change the pixels that teacher and student see. Fill and noise are levels of 255 and part of the law, so they
    do not depend on a model's normalisation.
    """

    version: Literal[1] = Field(default=1, description="Version of the laws of this section.")
    color_jitter: tuple[Fraction, Fraction, Fraction, Annotated[float, Field(ge=0.0, le=0.5)]] = Field(
        default=(0.0, 0.0, 0.0, 0.0), description="Largest changes of brightness, contrast, saturation and hue."
    )
    color_jitter_share: Fraction = Field(default=0.8, description="Share of the views that `color_jitter` changes.")
    grayscale: Fraction = Field(default=0.0, description="Share of the views that become grey.")
    blur: Fraction = Field(default=0.0, description="Share of the views with a Gaussian blur.")
    blur_sigma: tuple[Sigma, Sigma] = Field(default=(0.1, 2.0), description="Limits of the blur's deviation in pixels.")
    solarize: Fraction = Field(default=0.0, description="Share of the views whose values from 128 on are inverted.")
    rand_augment: Annotated[str | None, AfterValidator(checked_rand_augment)] = Field(
        default=None, description="RandAugment in timm's notation, e.g. rand-m9-mstd0.5-inc1. null: none."
    )
    erasing: Fraction = Field(default=0.0, description="Share of the views in which a box is erased.")
    erasing_mode: Literal["const", "pixel"] = Field(
        default="pixel", description="Erase with the colour `fill` (const), or with normal noise per pixel (pixel)."
    )
    fill: tuple[Level, Level, Level] = Field(
        default=(124, 116, 104), description="Colour of gaps in levels of 255. Default: ImageNet's mean."
    )
    noise_mean: tuple[Spread, Spread, Spread] = Field(
        default=(123.675, 116.28, 103.53), description="Mean of the noise per channel in levels of 255."
    )
    noise_std: tuple[Spread, Spread, Spread] = Field(
        default=(58.395, 57.12, 57.375), description="Standard deviation of the noise per channel in levels of 255."
    )

    @model_validator(mode="after")
    def _draws_something(self) -> "OperationsConfig":
        jitter = self.color_jitter_share and any(self.color_jitter)
        if not any([jitter, self.grayscale, self.blur, self.solarize, self.rand_augment, self.erasing]):
            raise ValueError("no operation is on; set operations to null for boxes and flips alone")
        if self.blur_sigma[0] > self.blur_sigma[1]:
            raise ValueError(f"blur_sigma must be low <= high, got {self.blur_sigma}")
        return self


Alpha = Annotated[float, Field(ge=0.0, le=4.0)]  # of Beta(alpha, alpha)


class PairsConfig(Section):
    """Mixup and CutMix of a view with its partner's, another image of the shard, drawn anew in every view (I1).

    Operations are applied to both before. The record belongs to the mixed view.
    """

    version: Literal[1] = Field(default=1, description="Version of the laws of this section.")
    mixup: Alpha = Field(default=0.8, description="Alpha of mixup. 0: none; else at least 0.05.")
    cutmix: Alpha = Field(default=1.0, description="Alpha of CutMix. 0: none; else at least 0.05.")
    cutmix_share: Fraction = Field(default=0.5, description="Share of CutMix among the pairs, if mixup is on, too.")
    share: Fraction = Field(default=1.0, description="Share of the pairs that are mixed.")

    @model_validator(mode="after")
    def _mixes_something(self) -> "PairsConfig":
        if not self.share or not (self.mixup or self.cutmix):
            raise ValueError("nothing is mixed; set pairs to null for views of single images")
        for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if 0.0 < alpha < 0.05:
                raise ValueError(f"{name} must be 0, or from 0.05 to 4, got {alpha}")
        return self


class ViewConfig(Section):
    """The view law: RandomResizedCrop, flip, operations, drawn from (seed, sample key, view index) alone (I1).

    Pairs are drawn from seed, view index and all keys of the image's shard.
    These fields are part of a cache's identity: other values need another cache.
    """

    size: Side = Field(default=224, description="Width and height of a view in pixels; the model's `img_size`.")
    scale: tuple[Fraction, Fraction] = Field(default=(0.2, 1.0), description="Crop area as a share of the image area.")
    ratio: tuple[Aspect, Aspect] = Field(
        default=(3 / 4, 4 / 3), description="Crop width / height, drawn log-uniformly."
    )
    interpolation: Literal["bicubic", "bilinear"] = Field(default="bicubic", description="Filter of the resize.")
    flip: Fraction = Field(default=0.5, description="Probability of a horizontal flip.")
    seed: Seed = Field(default=0, description="Seed of all views.")
    scaled_decode: bool = Field(
        default=True,
        description="Decode JPEGs at 1/2, 1/4 or 1/8 if the crop stays at least `size` long (docs/views.md).",
    )
    operations: OperationsConfig | None = Field(
        default=None, description="Operations on the pixels: RandAugment, erasing and more (docs/views.md). null: none."
    )
    pairs: PairsConfig | None = Field(
        default=None, description="Mixup and CutMix with another image of the shard (docs/views.md). null: none."
    )

    def identity(self) -> dict[str, Any]:
        """The law as a cache's manifest holds it: a field that is newer than format 2 is left out where it is off."""
        off = {name for name in ("scaled_decode", "operations", "pairs") if not getattr(self, name)}
        return self.model_dump(mode="json", exclude=off)

    @model_validator(mode="after")
    def _ordered(self) -> "ViewConfig":
        if not 0.0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be 0 < low <= high, got {self.scale}")
        if not 0.0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be 0 < low <= high, got {self.ratio}")
        return self


# Arguments of timm that fields of recipes decide.
_DECIDED = ("img_size", "num_classes", "in_chans", "drop_path_rate", "global_pool", "pretrained")


class ModelConfig(Section):
    """A model by its timm name. Sizes given here override those of the named architecture (docs/backbones.md)."""

    name: str = Field(default="vit_tiny_patch16_224", description="Model name in timm.")
    img_size: Side = Field(default=224, description="Input width and height in pixels.")
    patch_size: Side | None = Field(default=None, description="Patch width in pixels. Default: by name.")
    embed_dim: Width | None = Field(default=None, description="Width of the tokens. Default: by name.")
    depth: Depth | None = Field(default=None, description="Number of blocks. Default: by name.")
    num_heads: Width | None = Field(default=None, description="Attention heads. Default: by name.")
    factory: Factory | None = Field(
        default=None,
        description="`package.module:function` that returns a module of your own, which `name` then labels "
        "(docs/custom-models.md). Default: timm's model of that name.",
    )
    args: dict[str, JsonValue] = Field(
        default={},
        description="Further arguments of timm's class, such as `{window_size: 4, depths: [2, 2, 6, 2]}`, or all "
        "those of `factory`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _named_by_factory(cls, data: Any) -> Any:
        """Fill in what differs with `factory`: the label, and a teacher's weights, which its module brings along."""
        if not isinstance(data, dict) or not isinstance(data.get("factory"), str):
            return data
        named = {"name": data["factory"].rpartition(":")[2].rpartition(".")[2] or "custom"}
        return named | ({"weights": FACTORY} if "weights" in cls.model_fields else {}) | data

    @model_validator(mode="after")
    def _one_maker(self) -> "ModelConfig":
        sizes = [name for name in ("patch_size", "embed_dim", "depth", "num_heads") if getattr(self, name) is not None]
        if self.factory and sizes:
            raise ValueError(f"{', '.join(sizes)} are timm's; give sizes to the factory by args")
        return self

    @model_validator(mode="after")
    def _arguments_of_timm(self) -> "ModelConfig":
        if self.factory:
            return self
        given = {name for name in ("patch_size", "embed_dim", "depth", "num_heads") if getattr(self, name) is not None}
        if taken := sorted(self.args.keys() & {*_DECIDED, *given}):
            raise ValueError(f"args repeats what a field of the recipe decides; got {', '.join(taken)}")
        flat = [each for value in self.args.values() for each in (value if isinstance(value, list) else [value])]
        if any(isinstance(each, dict | list) for each in flat):
            raise ValueError(f"args of timm are values and lists of values; got {self.args}")
        return self

    @model_validator(mode="after")
    def _whole_patches(self) -> "ModelConfig":
        if self.patch_size and self.img_size % self.patch_size:
            raise ValueError(
                f"img_size must be a multiple of patch_size, or border pixels would be left out; "
                f"got {self.img_size} and {self.patch_size}"
            )
        if self.embed_dim and self.num_heads and self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads must divide embed_dim; got {self.num_heads} and {self.embed_dim}")
        return self


class TeacherConfig(ModelConfig):
    """The teacher: a timm ViT, its weights, and the block that is tapped.

    All fields but `compile` are part of a cache's identity. The teacher's relation heads must divide the student's
    width.
    """

    name: str = Field(default="vit_large_patch16_224.mae", description="Model name in timm.")
    weights: str = Field(
        default="hub",
        description="`hub` (timm's pretrained weights), `package:NAME` (shipped with tinymim), a .safetensors or "
        ".pth file (docs/parity.md), or `factory`, those of the factory's module.",
        json_schema_extra={"default": "`hub`; `factory` with `factory`"},
    )
    block: Positive = Field(
        default=18, description="Tapped block, counted from 1. The teacher stops there, unless the codec reads its end."
    )
    precision: Precision = Field(default="fp32", description="Precision of the teacher's forward pass.")
    drop_path: DropRate = Field(
        default=0.0,
        description="Stochastic depth of the teacher: one rate in every block but the last, drawn anew for every view "
        "(docs/targets.md).",
    )
    compile: bool = Field(
        default=False, description="Apply torch.compile to the blocks before the tap. Needs a C++ compiler or Triton."
    )
    mean: Mean | None = Field(default=None, description=MEAN_DESCRIPTION)
    std: Std | None = Field(default=None, description=STD_DESCRIPTION)

    @model_validator(mode="after")
    def _weights_of_its_maker(self) -> "TeacherConfig":
        if self.weights == (HUB if self.factory else FACTORY):
            raise ValueError(f"weights: {self.weights} {'needs a timm model' if self.factory else 'needs a factory'}")
        return self

    @model_validator(mode="after")
    def _no_compiled_drops(self) -> "TeacherConfig":
        if self.compile and self.drop_path:
            raise ValueError(f"compile cannot be combined with drop_path; got drop_path {self.drop_path}")
        return self


class OptimConfig(Section):
    """AdamW with linear warm-up, then a cosine to `min_lr`, per step. Give `epochs` or `steps`, not both."""

    batch_size: Batch = Field(default=256, description="Images per step, over all ranks.")
    epochs: Positive | None = Field(default=None, description="Length of the training run in epochs.")
    steps: Positive | None = Field(default=None, description="Length of the training run in steps.")
    base_lr: float = Field(
        default=1.5e-4, gt=0, description="Learning rate at batch 256. The peak is base_lr x batch_size / 256."
    )
    min_lr: float = Field(default=0.0, ge=0, description="Learning rate at the end.")
    warmup: Fraction = Field(
        default=0.05, description="Share of all steps used for warm-up (TinyMIM: 15 of 300 epochs)."
    )
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), description="Betas of AdamW.")
    weight_decay: float = Field(default=0.05, ge=0, description="Weight decay; none on biases, norms and tokens.")
    clip_norm: float | None = Field(default=None, gt=0, description="Largest gradient norm. Default: no clipping.")
    accumulate: Positive = Field(
        default=1, description="Gradient accumulation: a rank splits its share of a batch into N parts."
    )

    @model_validator(mode="after")
    def _one_length(self) -> "OptimConfig":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"give epochs or steps, exactly one; got epochs={self.epochs}, steps={self.steps}")
        return self


class LayerwiseOptimConfig(OptimConfig):
    """The optimiser of fine-tuning, with a lower rate in each lower layer (timm's `param_groups_layer_decay`).

    `base_lr` is the rate of the head.
    """

    name: Literal["adamw", "sgd"] = Field(
        default="adamw", description="`adamw`, or `sgd` with Nesterov's momentum, which transfer to small sets uses."
    )
    momentum: Beta = Field(default=0.9, description="Momentum of `sgd`.")
    base_lr: float = Field(
        default=5e-4, gt=0, description="Learning rate of the head at batch 256; scales with the batch as above."
    )
    min_lr: float = Field(default=1e-6, ge=0, description="Learning rate of the head at the end.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="Betas of `adamw`.")
    layer_decay: float = Field(
        default=0.65,
        gt=0,
        le=1,
        description="Rate of a layer relative to the layer above it. 1: the same rate everywhere.",
    )


class ClassTeacherConfig(ModelConfig):
    """A classifier that teaches the distillation token of a DeiT during fine-tuning (Touvron et al., ICML 2021)."""

    name: str = Field(default="regnety_160.deit_in1k", description="Model name in timm.")
    weights: str = Field(default="hub", description="`hub`, or a file of a classifier of the same classes.")
    loss: Literal["hard", "soft"] = Field(
        default="hard", description="Learn the teacher's class (hard), or its probabilities (soft)."
    )
    weight: Fraction = Field(default=0.5, description="Weight of this loss; the labels have the rest.")
    temperature: float = Field(default=1.0, gt=0, le=1000, description="Temperature of `soft`.")
    mean: Mean | None = Field(default=None, description=MEAN_DESCRIPTION)
    std: Std | None = Field(default=None, description=STD_DESCRIPTION)


class LoaderConfig(Section):
    """Reading and decoding. These fields change neither a pixel nor the order of samples."""

    workers: int = Field(
        default=2,
        ge=0,
        le=1024,
        description="Loader processes per rank. 0: load in the training process, without overlap.",
    )
    prefetch: Processes = Field(
        default=4, description="Batches kept ready per loader process; at least `order.views_per_decode`."
    )


class OrderConfig(Section):
    """The order of samples: a function of (seed, epoch), whatever the number of workers (I10)."""

    seed: Seed = Field(default=0, description="Seed of the order.")
    shuffle_units: Positive = Field(
        default=4, description="Shards whose samples are mixed, per lane. Memory grows with it (docs/training.md)."
    )
    views_per_decode: Positive = Field(
        default=1, description="Views made from one decode. Consecutive batches then hold the same images."
    )
    views_per_epoch: Positive | Literal["all"] = Field(
        default=1, description="Views of every image per epoch: a multiple of `views_per_decode`, or `all`."
    )
    lanes: Positive = Field(
        default=1, description="Parts of an epoch. Must be a multiple of every number of ranks and divide the batch."
    )

    @model_validator(mode="after")
    def _whole_decodes(self) -> "OrderConfig":
        if self.views_per_epoch != "all" and self.views_per_epoch % self.views_per_decode:
            raise ValueError(
                f"views_per_epoch must be a multiple of views_per_decode, or all; "
                f"got {self.views_per_epoch} and {self.views_per_decode}"
            )
        return self


class RunConfig(Section):
    """The run folder, the device and the seed."""

    folder: Folder = Field(description="Run folder: resolved recipe, versions, metrics, TensorBoard, states, results.")
    device: Device = Field(default="auto", description="`auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.")
    seed: Seed = Field(default=0, description="Seed of weights, masks, jitter, drop path and augmentation.")
    threads: Threads | None = Field(default=None, description="Torch's intra-op threads. Default: torch's choice.")
    log_every: Positive = Field(default=20, description="Steps between lines of metrics.")
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        default=("tensorboard",),
        description="Places of metrics beside metrics.jsonl; `wandb` and `mlflow` are extras (docs/training.md).",
    )


class MaskConfig(Section):
    """Hidden patches of a view, drawn from (seed, sample key, view index) alone (I1)."""

    version: Literal[1] = Field(default=1, description="Version of the law of masks.")
    ratio: float = Field(default=0.75, gt=0, lt=1, description="Share of hidden patches.")
    unit: Side = Field(default=1, description="Patches are hidden in squares of N x N (1: MAE; SimMIM: 32 pixels).")
    seed: Seed = Field(default=0, description="Seed of all masks.")

    def num_visible(self, rows: int, columns: int, ratio: str = "mask.ratio", unit: str = "mask.unit") -> int:
        """Visible patches of a grid, a whole number of units; `ratio` and `unit` are the fields' names in messages.

        Raises:
            RecipeError: the unit does not divide the grid, or all patches would be hidden, or none.
        """
        if rows % self.unit or columns % self.unit:
            raise RecipeError(
                f"{unit} does not divide the patch grid",
                got=f"{self.unit}, grid {rows} x {columns}",
                expected=f"a divisor of {math.gcd(rows, columns)}",
            )
        units = rows * columns // self.unit**2
        visible = round(units * (1 - self.ratio))
        if not 0 < visible < units:
            raise RecipeError(
                f"{ratio} leaves no patch to see or none to predict",
                got=f"{self.ratio} of {units} {'patches' if self.unit == 1 else 'units'}",
                expected=f"{1 / units:.3g} to {1 - 1 / units:.3g}" if units > 1 else f"smaller {unit}",
            )
        return visible * self.unit**2


class StudentMaskConfig(MaskConfig):
    """Hidden patches of the student's view (docs/views.md). Of a masked layer, the mask must be the teacher's."""

    hide: Literal["drop", "token"] = Field(
        default="drop",
        description="`drop` runs the student on visible patches alone, `token` puts a learned token in place of each "
        "hidden patch, which is not exported.",
    )


class PredictedConfig(Section):
    """What is predicted of hidden squares."""

    name: Literal["hog", "pixels"] = Field(
        default="hog", description="`hog`: histograms of oriented gradients in cells of 8 x 8 pixels; `pixels`."
    )
    normalise: bool = Field(
        default=True,
        description="Divide the histogram of each cell and colour by its length; normalise pixels per cell.",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_teacher(cls, data: Any) -> Any:
        name = data.get("name") if isinstance(data, dict) else data
        if name in ("tokens", "features", "teacher"):
            raise ValueError(
                f"'{name}' cannot be computed from an image alone; hog and pixels can. To predict a teacher's tokens, "
                "cache them and give `mask` to `tinymim train-student`; start from the recipe tinyimagenet40-masked"
            )
        return data


class LightDecoderConfig(Section):
    """The decoder: transformer blocks on the encoder's last grid. Defaults are FastMIM's for ViT-B."""

    dim: Width = Field(default=256, description="Width.")
    depth: Depth = Field(default=1, description="Blocks.")
    heads: Width = Field(default=8, description="Attention heads.")
    position: bool = Field(default=False, description="Add a fixed position embedding. `mask.hide: drop` needs it.")

    @model_validator(mode="after")
    def _whole_heads(self) -> "LightDecoderConfig":
        if self.dim % self.heads or (self.position and self.dim % 4):
            raise ValueError(f"dim must be a multiple of heads, and of 4 with position; got {self.dim}, {self.heads}")
        return self


class DecoderConfig(Section):
    """A decoder that predicts hidden patches. Defaults are MAE-Lite's decoder for ViT-T."""

    decoder_dim: Width = Field(default=96, description="Width of the decoder.")
    decoder_depth: Depth = Field(default=1, description="Blocks of the decoder.")
    decoder_heads: Width = Field(default=3, description="Attention heads of the decoder.")
    norm_pixels: bool = Field(default=True, description="Predict pixels that are normalised per patch.")

    @model_validator(mode="after")
    def _whole_heads(self) -> "DecoderConfig":
        if self.decoder_dim % 4 or self.decoder_dim % self.decoder_heads:
            raise ValueError(
                f"decoder_dim must be a multiple of 4 and of decoder_heads; "
                f"got {self.decoder_dim} and {self.decoder_heads}"
            )
        return self


class MaeConfig(DecoderConfig):
    """Masked autoencoder (He et al., CVPR 2022). Defaults are MAE-Lite's decoder for ViT-T."""

    mask_ratio: float = Field(default=0.75, gt=0, lt=1, description="Share of patches hidden from the encoder.")
    mask_unit: Side = Field(
        default=1, description="Patches are hidden in squares of N x N (1: MAE; SimMIM, FastMIM: 32 pixels)."
    )

    def num_visible(self, rows: int, columns: int) -> int:
        """As `MaskConfig.num_visible`."""
        mask = MaskConfig(ratio=self.mask_ratio, unit=self.mask_unit)
        return mask.num_visible(rows, columns, "mae.mask_ratio", "mae.mask_unit")


class MimConfig(DecoderConfig):
    """A loss beside those of the layers: the squared error of pixels that a light decoder predicts of hidden patches.

    The pixels are those of the student's own image. The decoder is dropped at export.
    """

    weight: Weight = Field(default=1.0, description="Factor on the loss.")
    block: Positive | None = Field(
        default=None,
        description="The decoder reads the tokens after this block of the student, counted from 1, through a norm of "
        "its own. Default: the final tokens.",
    )


class PretrainMaskConfig(Section):
    """Hidden squares of an image, drawn from (seed, sample key) alone (I1)."""

    hide: Literal["paint", "token", "drop"] = Field(
        default="paint",
        description="`paint` gives hidden pixels a learned colour (any model), `token` replaces embedded patches "
        "(ViTs, Swin), `drop` leaves patches out (ViTs, Hiera).",
    )
    ratio: float = Field(default=0.75, gt=0, lt=1, description="Share of hidden squares.")
    block: Side = Field(default=32, description="Width of a square in pixels.")

    def num_visible(self, img_size: int) -> int:
        """Visible squares of an image.

        Raises:
            RecipeError: squares do not fill the image, or all would be hidden, or none.
        """
        if img_size % self.block:
            raise RecipeError("mask.block does not divide the image", got=f"{self.block} and {img_size} pixels")
        squares = (img_size // self.block) ** 2
        visible = round(squares * (1 - self.ratio))
        if not 0 < visible < squares:
            raise RecipeError(
                "mask.ratio leaves no square to see or none to predict",
                got=f"{self.ratio} of {squares} squares",
                expected=f"{1 / squares:.3g} to {1 - 1 / squares:.3g}" if squares > 1 else "a smaller mask.block",
            )
        return visible


class JitterConfig(Section):
    """Colour jitter for the student only, fresh at every step (I3). The factor is drawn from 1 - x to 1 + x."""

    brightness: Fraction = Field(default=0.4, description="Largest change x of brightness.")
    contrast: Fraction = Field(default=0.4, description="Largest change x of contrast.")
    saturation: Fraction = Field(default=0.4, description="Largest change x of saturation.")


class AugmentConfig(Section):
    """Augmentation in fine-tuning, by timm's laws. If mixup and CutMix are both on, each batch of a lane gets one."""

    rand_augment: Annotated[str | None, AfterValidator(checked_rand_augment)] = Field(
        default="rand-m9-mstd0.5-inc1", description="RandAugment in timm's notation. null: none."
    )
    erasing: Fraction = Field(default=0.25, description="Share of images in which a box becomes noise.")
    mixup: float = Field(default=0.8, ge=0, le=1000, description="Alpha of mixup. 0: none.")
    cutmix: float = Field(default=1.0, ge=0, le=1000, description="Alpha of CutMix. 0: none.")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


class VerifyConfig(Section):
    """Comparison of replayed pixels with the stored digests: are these the teacher's pixels? (I2)"""

    first: Whole = Field(default=4096, description="Compare the first N samples after a start or resume.")
    every: Whole = Field(default=16, description="Then compare one sample in N. 0: none.")


class EmaConfig(Section):
    """Moving average of the weights (timm's ModelEmaV3), written beside them as `*-ema.safetensors`."""

    decay: float = Field(default=0.9999, ge=0, lt=1, description="Share of the average that a step keeps.")
    warmup: bool = Field(default=True, description="Raise the decay from 0 as 1 - (1 + step)^(-2/3), up to `decay`.")


class CheckpointConfig(Section):
    """Training states for resume, each written atomically."""

    every_steps: Positive = Field(default=1000, description="Steps between states (`state-STEP.pt`).")
    keep: Positive = Field(default=2, description="Newest states kept. A damaged state is skipped with a message.")
    resume: bool = Field(default=True, description="Continue from the newest state of the run folder, if there is one.")


class ClusterConfig(Section):
    """Workers of `cache-teacher` on a Ray cluster, each with its own teacher (docs/cluster.md)."""

    address: Annotated[str, Field(pattern=r"^(local|auto|(ray://)?[^/\s]+:\d+)$")] = Field(
        default="auto",
        description="`auto` (RAY_ADDRESS, else a running Ray, else `local`), `local`, `HOST:PORT` or `ray://HOST:PORT`.",
    )
    workers: Positive | None = Field(default=None, description="Number of workers. Default: as many as fit.")
    gpus_per_worker: float = Field(
        default=1.0, ge=0, description="GPUs per worker. 0.5: two workers on a GPU; 0: CPUs."
    )
    cpus_per_worker: float = Field(
        default=2.0, ge=1e-4, le=4096, description="CPU cores that Ray reserves per worker: `loader.workers` + 1."
    )

    @model_validator(mode="after")
    def _whole_gpus(self) -> "ClusterConfig":
        if self.gpus_per_worker not in (0.0, 1.0) and not 1e-4 <= self.gpus_per_worker < 1:
            raise ValueError(
                f"gpus_per_worker must be 0, a fraction or 1, because a worker uses one GPU; got {self.gpus_per_worker}"
            )
        return self


class ValidationConfig(Section):
    """Accuracy on `val` during fine-tuning, and always after the last step."""

    every_epochs: Positive = Field(default=1, description="Epochs between validations.")
    batch_size: Batch = Field(default=256, description="Images per forward pass and rank. Does not affect results.")
    resize_ratio: ResizeRatio = Field(default=1.143, description=RESIZE_RATIO_DESCRIPTION)


class KnnConfig(Section):
    """Weighted k-NN on l2-normalised features (Wu et al., CVPR 2018; Caron et al., ICCV 2021)."""

    k: Positive = Field(default=20, description="Number of neighbours.")
    temperature: float = Field(default=0.07, ge=1e-3, description="Temperature of the neighbours' weights.")


class KnnEvaluator(KnnConfig):
    """An evaluator: top-1 and top-5 accuracy of k-NN."""

    name: Literal["knn"] = Field(description="This evaluator.")


class LinearEvaluator(Section):
    """An evaluator: accuracy of multinomial logistic regression on standardised features by L-BFGS, full batch."""

    name: Literal["linear"] = Field(description="This evaluator.")
    l2: float = Field(default=1e-3, ge=0, le=1e6, description="Weight of the L2 penalty.")
    max_iter: Positive = Field(default=200, description="Largest number of L-BFGS iterations.")


class ClassifierEvaluator(Section):
    """An evaluator: accuracy of the classifier in the weights, as it is; nothing is trained."""

    name: Literal["classifier"] = Field(description="This evaluator.")
    class_map: Folder | None = Field(
        default=None,
        description="Text file with the classifier's class of label 0, 1, ..., one a line; -1: none. Default: labels "
        "are the classifier's classes.",
    )
    real_labels: Literal["timm"] | Folder | None = Field(
        default=None,
        description="Also measure accuracy on ImageNet ReaL's labels: its `real.json`, a JSON object {image name: "
        "labels}, or `timm` for the copy in timm.",
    )


class ThroughputEvaluator(Section):
    """An evaluator: images per second of a forward pass on random pixels, parameters, and multiply-adds."""

    name: Literal["throughput"] = Field(description="This evaluator.")
    batch_size: Batch = Field(default=64, description="Images per forward pass.")
    precision: Precision = Field(default="fp32", description="Precision of the forward pass.")
    passes: Positive = Field(default=30, description="Passes that are timed; the median counts.")
    warmup_passes: Positive = Field(default=5, description="Passes before them.")


Evaluator = Annotated[
    KnnEvaluator | LinearEvaluator | ClassifierEvaluator | ThroughputEvaluator, Field(discriminator="name")
]


class AuditKnnConfig(KnnConfig):
    """k-NN accuracy of the student at each audit, on centre crops of labelled shards."""

    train: SourceConfig = Field(description="Labelled images that serve as neighbours.")
    val: SourceConfig = Field(description="Labelled images that are classified.")
    resize_ratio: ResizeRatio = Field(default=1.143, description=RESIZE_RATIO_DESCRIPTION)
    batch_size: Batch = Field(default=256, description="Images per forward pass. Does not affect results.")


class AuditConfig(Section):
    """Student audits: compare students with dense targets of held-out images during training (docs/audits.md)."""

    cache: Place = Field(description="Cache with codec `dense` or `hidden`, of the same teacher and view size.")
    layer: LayerName | None = Field(default=None, description="Layer of that cache. Default: the only one.")
    source: SourceConfig = Field(description="Images of the audit's cache, held out from training.")
    every_epochs: float = Field(
        default=10.0,
        ge=1e-6,
        le=1e9,
        description="Epochs between audits. Audits also run before the first and after the last step.",
    )
    num_images: int = Field(
        default=64, ge=8, le=LARGEST, description="Images per audit: the first N of the cache, one view each."
    )
    knn: AuditKnnConfig | None = Field(default=None, description="Also measure k-NN accuracy. Default: no.")
    on_alarm: Literal["warn", "stop"] = Field(
        default="warn", description="`warn` prints a message; `stop` saves the state and exits with code 2."
    )
