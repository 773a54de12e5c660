"""Sections of the models: an encoder, the teacher that is tapped, the classifier that teaches in fine-tuning."""

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from tinymim.configs.sections import words
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.values import Depth, DropRate, Fraction, Positive, Precision, Side, Width

Factory = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$", max_length=200)]
Mean = tuple[Fraction, Fraction, Fraction]
Deviation = Annotated[float, Field(gt=0.0, le=1.0)]
Std = tuple[Deviation, Deviation, Deviation]
HUB = "hub"  # words for weights that no file names
FACTORY = "factory"
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
    mean: Mean | None = Field(default=None, description=words.MEAN)
    std: Std | None = Field(default=None, description=words.STD)

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


class ClassTeacherConfig(ModelConfig):
    """A classifier that teaches the distillation token of a DeiT during fine-tuning (Touvron et al., ICML 2021)."""

    name: str = Field(default="regnety_160.deit_in1k", description="Model name in timm.")
    weights: str = Field(default="hub", description="`hub`, or a file of a classifier of the same classes.")
    loss: Literal["hard", "soft"] = Field(
        default="hard", description="Learn the teacher's class (hard), or its probabilities (soft)."
    )
    weight: Fraction = Field(default=0.5, description="Weight of this loss; the labels have the rest.")
    temperature: float = Field(default=1.0, gt=0, le=1000, description="Temperature of `soft`.")
    mean: Mean | None = Field(default=None, description=words.MEAN)
    std: Std | None = Field(default=None, description=words.STD)
