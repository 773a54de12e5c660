"""The recipe of `cache-teacher`."""

import re
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from tinymim.configs.codecs.kinds import CodecConfig, codec_label
from tinymim.configs.codecs.relations import SketchCodec
from tinymim.configs.sections import words
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.loader import LoaderConfig
from tinymim.configs.sections.masks import MaskConfig
from tinymim.configs.sections.models import TeacherConfig
from tinymim.configs.sections.run import ClusterConfig, RunConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.values import Batch, Fraction, LayerName, Place, Positive, Whole, Width
from tinymim.configs.sections.views import ViewConfig


class LayerTarget(NamedTuple):
    """What a layer holds: a codec, and the teacher's block that it taps."""

    codec: CodecConfig
    block: int


# A layer's or teacher's name without dots, which would divide the path of a --set.
TargetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


class TargetConfig(Section):
    """One of several layers that one pass of the teacher writes (docs/targets.md)."""

    teacher: TargetName | None = Field(
        default=None, description="Teacher of this layer, one of `teachers`. Default: the recipe's `teacher`."
    )
    block: Positive | None = Field(default=None, description="Tapped block. Default: `block` of the layer's teacher.")
    codec: CodecConfig = Field(default=SketchCodec(), description="As `codec` of the recipe.")
    mask: MaskConfig | None = Field(default=None, description="As `mask` of the recipe.")


class CacheTeacherRecipe(Section):
    """`tinymim cache-teacher`: run the teacher once over every view and store its targets."""

    stage: Literal["cache-teacher"] = Field(description=words.STAGE)
    source: SourceConfig = Field(description=words.SOURCE)
    views: ViewConfig = Field(default=ViewConfig(), description=words.VIEWS)
    num_views: Width = Field(default=2, description="Views per image. Raising it later adds views to the cache.")
    teacher: TeacherConfig = Field(description="Teacher and tapped block.")
    teachers: dict[TargetName, TeacherConfig] = Field(
        default={},
        description="Further teachers of the same views, by name; `targets.LAYER.teacher` names one. Each sees the "
        "boxes at its own `img_size` (docs/caches.md).",
    )
    codec: CodecConfig | None = Field(
        default=SketchCodec(),
        description="How a target becomes bytes. Part of a layer's identity.",
        json_schema_extra={"default": "a sketch; none with `targets`"},
    )
    mask: MaskConfig | None = Field(
        default=None,
        description="Run the teacher on visible patches alone; part of the layer's identity (docs/views.md). Default: "
        "on the whole view.",
    )
    targets: dict[TargetName, TargetConfig] | None = Field(
        default=None,
        description="Several layers from one pass of the teacher, by name. Instead of `codec`, `mask` and `layer`.",
    )
    cache: Place | None = Field(default=None, description="The cache to write: a folder, or a URL in an object store.")
    cache_root: Place | None = Field(
        default=None,
        description="Instead of `cache`: a folder of shared caches, each named by the `spec_id` of what it holds.",
    )
    layer: LayerName | None = Field(
        default=None,
        description="Name of the layer to write. Default: teacher, block and codec, as in `vit_base-b10-sketch`.",
    )
    batch_size: Batch | Literal["auto"] = Field(
        default=64,
        description="Images per batch, each with up to `views_per_decode` views. `auto`: as many as fit into memory.",
    )
    views_per_decode: Positive = Field(
        default=8,
        description="Views made from one decode. Memory grows with it; an image is decoded again for further views.",
    )
    views_per_unit: Positive = Field(
        default=50, description="Most views in one unit: what a killed job loses, and the size of the largest file."
    )
    max_unreadable: Fraction = Field(default=0.01, description="Share of unreadable images above which a unit fails.")
    retries: Whole = Field(default=2, description="Further attempts at a failed unit, after all other units.")
    audit_views: Whole = Field(
        default=16, description="Views per unit whose records are compared with the dense target (I5). 0: none."
    )
    lease_s: float = Field(
        default=60.0,
        gt=0,
        le=86_400,
        description="Seconds without a heartbeat after which other jobs take over a job's shard.",
    )
    cluster: ClusterConfig | None = Field(
        default=None, description="Ray workers. Default: this process alone, without Ray."
    )
    loader: LoaderConfig = Field(default=LoaderConfig(), description=words.LOADER)
    run: RunConfig = Field(description=words.RUN)

    @property
    def layers(self) -> dict[str, LayerTarget]:
        """The layers to write, by name."""
        if self.targets is not None:
            found = {}
            for name, own in self.targets.items():
                found[name] = LayerTarget(own.codec, own.block or self._teacher(own.teacher).block)
            return found
        assert self.codec is not None  # by `_one_or_several`
        return {self.layer_name: LayerTarget(self.codec, self.teacher.block)}

    @property
    def masks(self) -> dict[str, MaskConfig | None]:
        """The mask of every layer, by name."""
        if self.targets is not None:
            return {name: own.mask for name, own in self.targets.items()}
        return {self.layer_name: self.mask}

    @property
    def teacher_names(self) -> dict[str, str]:
        """The name of each layer's teacher among `teachers`; "": the recipe's `teacher`."""
        if self.targets is None:
            return {self.layer_name: ""}
        return {name: own.teacher or "" for name, own in self.targets.items()}

    @property
    def used_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers of the layers, by the names of `teacher_names`."""
        return {name: self._teacher(name) for name in dict.fromkeys(self.teacher_names.values())}

    @property
    def further_sizes(self) -> list[int]:
        """The sizes of views besides `views.size` that teachers see, ascending."""
        return sorted({teacher.img_size for teacher in self.used_teachers.values()} - {self.views.size})

    def changed_teachers(self, change: Callable[[TeacherConfig], TeacherConfig]) -> "CacheTeacherRecipe":
        """The recipe with a change in every teacher."""
        teachers = {name: change(teacher) for name, teacher in self.teachers.items()}
        return self.model_copy(update={"teacher": change(self.teacher), "teachers": teachers})

    def _teacher(self, name: str | None) -> TeacherConfig:
        return self.teachers[name] if name else self.teacher

    @property
    def layer_name(self) -> str:
        """The name of the only layer: `layer`, or one made from teacher, block and codec."""
        assert self.codec is not None, "a recipe with `targets` has several layers"
        made = f"{self.teacher.name}-{codec_label(self.codec, self.teacher.block)}".lower()
        made += "" if self.mask is None else "-masked"
        return self.layer or re.sub(r"[^a-z0-9._-]", "-", made)[-64:].lstrip("._-")

    def only(self, names: Collection[str]) -> "CacheTeacherRecipe":
        """The recipe for some of its layers."""
        if self.targets is None:
            return self
        return self.model_copy(update={"targets": {name: own for name, own in self.targets.items() if name in names}})

    @property
    def views_per_batch(self) -> int:
        """The largest number of views of an image in one batch."""
        return min(self.num_views, self.views_per_decode, self.views_per_unit)

    @property
    def given_batch_size(self) -> int:
        """`batch_size`, or 64 for `auto`: used by calibration and checks, where speed does not matter."""
        return 64 if self.batch_size == "auto" else self.batch_size

    @model_validator(mode="before")
    @classmethod
    def _no_codec_beside_targets(cls, data: Any) -> Any:
        return {"codec": None, **data} if isinstance(data, dict) and data.get("targets") is not None else data

    @model_validator(mode="after")
    def _each_teacher_used(self) -> "CacheTeacherRecipe":
        named = {own.teacher for own in (self.targets or {}).values() if own.teacher is not None}
        if unknown := sorted(named - self.teachers.keys()):
            known = ", ".join(self.teachers) or "none"
            raise ValueError(f"targets name the teacher {unknown[0]}, which is not in teachers; got {known}")
        if unused := sorted(self.teachers.keys() - named):
            raise ValueError(f"no target names the teacher {unused[0]}: set targets.LAYER.teacher, or remove it")
        return self

    @model_validator(mode="after")
    def _one_or_several(self) -> "CacheTeacherRecipe":
        if self.targets is None and self.codec is None:
            raise ValueError("codec: null needs targets, the layers to write by name")
        if self.targets is not None:
            given = [name for name in ("codec", "mask", "layer") if getattr(self, name) is not None]
            if given:
                raise ValueError(
                    f"{' and '.join(given)} of the recipe and targets exclude each other: targets has its own for each"
                )
            if not self.targets:
                raise ValueError("targets is empty: name at least one layer")
        if "views" in self.layers:
            raise ValueError("no target layer can be named views, which is the view layer's name")
        return self

    @model_validator(mode="after")
    def _one_place(self) -> "CacheTeacherRecipe":
        if "hf" in {str(place).partition("://")[0] for place in (self.cache, self.cache_root)}:
            raise ValueError("caches on the hub are only read: write to a folder, then `tinymim hub push` it")
        if (self.cache is None) == (self.cache_root is None):
            raise ValueError(
                f"give cache or cache_root, exactly one; got cache={self.cache}, cache_root={self.cache_root}"
            )
        return self
