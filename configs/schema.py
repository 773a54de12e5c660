"""The one schema of all recipes, one class per command.

A recipe is a YAML file. Its `stage:` line names the command it is for. Every other key is a field below, and most
fields are sections (`configs/sections.py`).
"""

import re
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from tinymim.configs.codecs import CodecConfig, SketchCodec, TargetsConfig, codec_label
from tinymim.configs.sections import (
    LARGEST,
    MEAN_DESCRIPTION,
    RESIZE_RATIO_DESCRIPTION,
    STD_DESCRIPTION,
    AuditConfig,
    AugmentConfig,
    Batch,
    CheckpointConfig,
    ClassTeacherConfig,
    Cluster,
    ClusterConfig,
    Device,
    DropRate,
    EmaConfig,
    Evaluator,
    Folder,
    Fraction,
    JitterConfig,
    KnnEvaluator,
    LayerName,
    LayerwiseOptimConfig,
    LightDecoderConfig,
    LinearEvaluator,
    LoaderConfig,
    MaeConfig,
    MaskConfig,
    Mean,
    MimConfig,
    ModelConfig,
    Name,
    OptimConfig,
    OrderConfig,
    Place,
    Positive,
    Precision,
    PredictedConfig,
    PretrainMaskConfig,
    Processes,
    ResizeRatio,
    RunConfig,
    Section,
    SourceConfig,
    Std,
    StudentMaskConfig,
    TeacherConfig,
    Title,
    ValidationConfig,
    VerifyConfig,
    ViewConfig,
    Weight,
    Whole,
    Width,
)

_STAGE = "Command that the recipe is for."
_SOURCE = "Images."
_VIEWS = "View law."
_RUN = "Run folder, device and seed."
_LOADER = "Loader processes."
_WEIGHTS = "`random`, `hub`, `package:NAME`, or a .safetensors or .pth file (docs/parity.md)."
_TRAIN = "Labelled images to train on."
_VAL = "Labelled images to test on."


class _Training(Section):
    """Fields that all training commands share."""

    stage: str
    optim: OptimConfig = Field(description="Optimiser, schedule and length.")
    ema: EmaConfig | None = Field(
        default=None, description="Moving average of the weights. Default: none; `{}` turns it on."
    )
    order: OrderConfig = Field(default=OrderConfig(), description="Order of the samples.")
    loader: LoaderConfig = Field(default=LoaderConfig(), description="Loader processes.")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig(), description="States for resume.")
    precision: Precision = Field(default="fp32", description="Precision of training; `fp16` uses loss scaling.")
    batch_norm: Literal["train", "frozen", "sync"] = Field(
        default="train",
        description="Batch norms use each rank's batch (train), their stored statistics (frozen; weights still train), "
        "or the batch of all ranks (sync; GPUs).",
    )
    recompute: bool = Field(
        default=False,
        description="Recompute activations in the backward pass: less memory, more time. With `batch_norm: train` the "
        "stored statistics then see each batch twice.",
    )
    workers: Processes = Field(
        default=1,
        description="Training processes on this machine, one per GPU. Ignored under torchrun (docs/training.md).",
    )
    cluster: Cluster = Field(
        default="local", description="`local` starts the workers on this machine, `ray` by Ray Train on a cluster."
    )
    max_restarts: Whole = Field(
        default=3, description="Restarts of all workers after one was killed or crashed, per training run."
    )
    run: RunConfig = Field(description=_RUN)

    @model_validator(mode="after")
    def _whole_shares(self) -> "_Training":
        for name, value in (("order.lanes", self.order.lanes), ("optim.batch_size", self.optim.batch_size)):
            if value % self.workers:
                raise ValueError(f"workers must divide {name}; got {self.workers} workers, {name} {value}")
        return self


class PretrainMaeRecipe(_Training):
    """`tinymim pretrain-mae`: train a teacher, or a baseline student, from images alone."""

    stage: Literal["pretrain-mae"] = Field(description=_STAGE)
    source: SourceConfig = Field(description=_SOURCE)
    views: ViewConfig = Field(default=ViewConfig(), description=_VIEWS)
    model: ModelConfig = Field(description="Encoder to train.")
    mae: MaeConfig = Field(default=MaeConfig(), description="Mask and decoder.")


class PretrainRecipe(_Training):
    """`tinymim pretrain`: train any model from images alone, by what it predicts of hidden squares."""

    stage: Literal["pretrain"] = Field(description=_STAGE)
    source: SourceConfig = Field(description=_SOURCE)
    views: ViewConfig = Field(default=ViewConfig(size=128), description=_VIEWS)
    model: ModelConfig = Field(description="Model to train.")
    weights: str = Field(
        default="random",
        description="Weights to start from: `random`, or a file, also of another input size; a run at a higher "
        "resolution continues one at a lower.",
    )
    mean: Mean | None = Field(default=None, description=MEAN_DESCRIPTION)
    std: Std | None = Field(default=None, description=STD_DESCRIPTION)
    mask: PretrainMaskConfig = Field(default=PretrainMaskConfig(), description="Hidden squares.")
    target: PredictedConfig = Field(default=PredictedConfig(), description="What is predicted of them.")
    decoder: LightDecoderConfig = Field(default=LightDecoderConfig(), description="Decoder, dropped at export.")

    @model_validator(mode="after")
    def _dropped_patches_have_positions(self) -> "PretrainRecipe":
        if self.mask.hide == "drop" and not self.decoder.position:
            raise ValueError("mask.hide: drop needs decoder.position: true; dropped patches differ in nothing else")
        return self


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

    stage: Literal["cache-teacher"] = Field(description=_STAGE)
    source: SourceConfig = Field(description=_SOURCE)
    views: ViewConfig = Field(default=ViewConfig(), description=_VIEWS)
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
    loader: LoaderConfig = Field(default=LoaderConfig(), description=_LOADER)
    run: RunConfig = Field(description=_RUN)

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


_INHERITED: dict[str, Any] = {"default": "the recipe's"}  # filled in by `TrainStudentRecipe._inherit`


class LayerConfig(Section):
    """One of several layers that students learn from at once (docs/training.md)."""

    weight: Weight = Field(default=1.0, description="Factor on the layer's loss, from the first step on.")
    end_weight: Weight | None = Field(
        default=None,
        description="Factor in the last step, linear from `weight`.",
        json_schema_extra={"default": "`weight`: constant"},
    )
    targets: TargetsConfig = Field(
        description="A choice among its targets, instead of the recipe's.", json_schema_extra=_INHERITED
    )
    student_block: Positive | None = Field(
        default=None,
        description="Block of the student, counted from 1, that learns it (docs/training.md). Default: a head on the "
        "final tokens.",
    )
    teacher: TeacherConfig | None = Field(
        default=None,
        description="With `on_missing: teacher`: its teacher. Default: the one that the cache's layer states.",
    )
    codec: CodecConfig | None = Field(
        default=None,
        description="With `teacher`: how its targets become bytes.",
        json_schema_extra={"default": "the layer's; a sketch where the cache has none"},
    )

    @model_validator(mode="after")
    def _projector_at_the_end(self) -> "LayerConfig":
        if self.student_block is not None and self.targets.keep_projector:
            raise ValueError(
                "targets.keep_projector exports a projector of the final tokens, and student_block reads others; "
                f"got student_block {self.student_block}"
            )
        return self


class StudentConfig(Section):
    """One of several students of a run (docs/training.md). A field left out, also in `optim`, is the recipe's."""

    model: ModelConfig = Field(description="The student.")
    optim: OptimConfig = Field(description="Its optimiser.", json_schema_extra=_INHERITED)
    drop_path: DropRate = Field(description="Its stochastic depth.", json_schema_extra=_INHERITED)
    jitter: JitterConfig = Field(description="Its colour jitter.", json_schema_extra=_INHERITED)
    ema: EmaConfig | None = Field(description="Its moving average of the weights.", json_schema_extra=_INHERITED)
    device: Device | None = Field(
        default=None, description="Its device, such as `cuda:1`; with one process only. Default: `run.device`."
    )


OnMissing = Literal["refuse", "skip", "teacher"]
_OWN = ("optim", "drop_path", "jitter", "ema")  # fields that a student may override
_OF_THE_STREAM = ("batch_size", "epochs", "steps", "accumulate")  # fields of `optim` that all students share


class TrainStudentRecipe(_Training):
    """`tinymim train-student`: train one student, or several, from a cache and the same views."""

    stage: Literal["train-student"] = Field(description=_STAGE)
    source: SourceConfig = Field(description="Images that the cache was made from.")
    cache: Place = Field(description="The cache to read: a folder or URL, or a root that holds exactly one cache.")
    layer: LayerName | None = Field(
        default=None, description="Layer of the cache to learn from. Default: the only one."
    )
    layers: dict[LayerName, LayerConfig] | None = Field(
        default=None, description="Instead of `layer`: several layers by name; their losses are added by weight."
    )
    num_views: Positive | None = Field(
        default=None, description="Use the first N views of every image. Default: those that all shards have."
    )
    on_missing: OnMissing = Field(
        default="refuse",
        description="Images without a record: `refuse` is an error, `skip` leaves them out and counts them, `teacher` "
        "computes what is missing (docs/training.md).",
    )
    fresh: Fraction = Field(
        default=0.0,
        description="With `on_missing: teacher`: share of the views that are new, with indices from `num_views` on.",
    )
    write_back: bool = Field(
        default=False, description="With `on_missing: teacher`: write whole units that were computed into the cache."
    )
    views: ViewConfig | None = Field(
        default=None,
        description="With `on_missing: teacher`: view law, where there is no cache yet. Default: the cache's.",
    )
    student: ModelConfig | None = Field(default=None, description="The student. Give `student` or `students`.")
    students: dict[Name, StudentConfig] | None = Field(
        default=None, description="Several students on one stream, each under a name of your choice."
    )
    targets: TargetsConfig = Field(
        default=TargetsConfig(), description="A choice among the cached targets, where a layer has none of its own."
    )
    mask: StudentMaskConfig | None = Field(
        default=None,
        description="Hidden patches of the students' views. Default: as the layers' teachers saw them.",
    )
    mim: MimConfig | None = Field(
        default=None, description="A loss on the pixels of hidden patches, beside those of the layers. Default: none."
    )
    drop_path: DropRate = Field(default=0.1, description="Stochastic depth: one rate in every block but the last.")
    jitter: JitterConfig = Field(default=JitterConfig(), description="Colour jitter of the student.")
    verify: VerifyConfig = Field(default=VerifyConfig(), description="Comparison of pixels with the stored digests.")
    audit: AuditConfig | None = Field(default=None, description="Student audits. Default: none.")

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data: Any) -> Any:
        """Fill the fields that a student or a layer leaves out; each field's own check reports problems."""
        if not isinstance(data, dict):
            return data
        if isinstance(data.get("layers"), dict):
            targets = {"targets": data.get("targets", {})}
            layers = {name: targets | own if isinstance(own, dict) else own for name, own in data["layers"].items()}
            data = data | {"layers": layers}
        if not isinstance(data.get("students"), dict):
            return data
        shared = {name: data.get(name, cls.model_fields[name].get_default()) for name in _OWN}
        optim = data.get("optim")
        optim = optim.model_dump(exclude_unset=True) if isinstance(optim, Section) else optim
        students = {}
        for name, own in data["students"].items():
            students[name] = shared | own if isinstance(own, dict) else own
            if isinstance(own, dict) and isinstance(own.get("optim"), dict) and isinstance(optim, dict):
                students[name]["optim"] = optim | own["optim"]
        return data | {"students": students}

    @model_validator(mode="after")
    def _one_stream(self) -> "TrainStudentRecipe":
        if (self.student is None) == (not self.students):
            raise ValueError("give student, or students with at least one name, and not both")
        for name, student in (self.students or {}).items():
            for field in _OF_THE_STREAM:
                own, shared = getattr(student.optim, field), getattr(self.optim, field)
                if own != shared:
                    what = f"students.{name}.optim.{field} must be the recipe's, because all students share one stream"
                    raise ValueError(f"{what}; got {own} and {shared}")
        return self

    @model_validator(mode="after")
    def _whole_teacher(self) -> "TrainStudentRecipe":
        layers = self.layers or {}
        given = [name for name in ("fresh", "write_back", "views") if getattr(self, name)]
        given += [f"layers.{name}.teacher" for name, each in layers.items() if each.teacher is not None]
        if self.on_missing != "teacher" and given:
            raise ValueError(f"on_missing must be teacher for {', '.join(given)}; got {self.on_missing}")
        if lone := [name for name, each in layers.items() if each.codec is not None and each.teacher is None]:
            raise ValueError(f"layers.{lone[0]}.codec needs layers.{lone[0]}.teacher; got none")
        if self.on_missing == "teacher" and self.num_views is None and self.fresh < 1:
            raise ValueError(
                "on_missing: teacher needs num_views, the views per image that the cache will hold; got null. "
                "fresh: 1 needs none"
            )
        return self

    @model_validator(mode="after")
    def _some_weight(self) -> "TrainStudentRecipe":
        if self.layers is None:
            return self
        if self.layer is not None:
            raise ValueError(f"give layer or layers, not both; got layer {self.layer}, layers {', '.join(self.layers)}")
        if not any(each.weight or each.end_weight for each in self.layers.values()):
            given = ", ".join(f"{name} 0" for name in self.layers) or "no layer"
            raise ValueError(f"layers needs a layer with a weight above 0; got {given}")
        return self

    def each_layer(self) -> tuple[tuple[str | None, LayerConfig], ...]:
        """The layers to learn from, by name; None: the cache's only one."""
        if self.layers is None:
            return ((self.layer, LayerConfig(targets=self.targets)),)
        return tuple(self.layers.items())

    def each(self) -> dict[str, "TrainStudentRecipe"]:
        """The recipes that train each student alone, into `<run.folder>/<name>`, by name; `student` has the name ""."""
        if self.students is None:
            return {"": self}
        return {
            name: self.model_copy(
                update={
                    "students": None,
                    "student": own.model,
                    "run": self.run.model_copy(
                        update={"folder": self.run.folder / name, "device": own.device or self.run.device}
                    ),
                }
                | {field: getattr(own, field) for field in _OWN}
            )
            for name, own in self.students.items()
        }


class FinetuneRecipe(_Training):
    """`tinymim finetune`: train an encoder and a new head on labelled images (docs/finetune.md)."""

    stage: Literal["finetune"] = Field(description=_STAGE)
    train: SourceConfig = Field(description=_TRAIN)
    val: SourceConfig = Field(description=_VAL)
    views: ViewConfig = Field(
        default=ViewConfig(), description="View law; epoch e uses view e. Papers: `scale: [0.08, 1.0]`."
    )
    model: ModelConfig = Field(description="Encoder.")
    weights: str = Field(description=_WEIGHTS)
    class_map: Folder | None = Field(
        default=None,
        description="Start with rows of the weights' head: a text file with their class of label 0, 1, ..., one a "
        "line; -1: the mean of the others. Default: see docs/finetune.md.",
    )
    pool: Literal["mean", "cls"] = Field(
        default="mean", description="Input of the head: the mean over patches through a new norm, or the class token."
    )
    mean: Mean | None = Field(default=None, description=MEAN_DESCRIPTION)
    std: Std | None = Field(default=None, description=STD_DESCRIPTION)
    drop_path: DropRate = Field(
        default=0.1, description="Stochastic depth; the rate rises from 0 to this value (timm)."
    )
    distil: ClassTeacherConfig | None = Field(
        default=None, description="Class distillation by a classifier in the loop (docs/finetune.md). Default: none."
    )
    smoothing: float = Field(default=0.1, ge=0, lt=1, description="Label smoothing.")
    augment: AugmentConfig = Field(default=AugmentConfig(), description="Augmentation.")
    optim: LayerwiseOptimConfig = Field(description="Optimiser, schedule and length.")
    validation: ValidationConfig = Field(default=ValidationConfig(), description="Validation during training.")

    @model_validator(mode="after")
    def _whole_pairs(self) -> "FinetuneRecipe":
        for name in ("operations", "pairs"):
            if getattr(self.views, name) is not None:
                raise ValueError(f"views.{name} is for caches and pre-training; fine-tuning has `augment` instead")
        pool = "mean" if self.model.name.startswith("mae_lite_distilled") else "cls"
        if self.distil is not None and self.pool != pool:
            raise ValueError(f"distil trains two heads, of which {self.model.name} reads others; set pool: {pool}")
        if self.augment.mixes and self.optim.batch_size % (2 * self.order.lanes):
            raise ValueError(
                "mixup and cutmix pair samples of a lane, so optim.batch_size must be a multiple of 2 x order.lanes; "
                f"got {self.optim.batch_size} and {self.order.lanes} lanes"
            )
        return self


TrainingRecipe = PretrainMaeRecipe | PretrainRecipe | TrainStudentRecipe | FinetuneRecipe


class EvaluateRecipe(Section):
    """`tinymim evaluate`: evaluators of a frozen model: k-NN, a linear probe, its own classifier, its throughput."""

    stage: Literal["evaluate"] = Field(description=_STAGE)
    train: SourceConfig | None = Field(default=None, description=f"{_TRAIN} `knn` and `linear` need them.")
    val: SourceConfig | None = Field(default=None, description=f"{_VAL} All evaluators but `throughput` need them.")
    model: ModelConfig = Field(description="Encoder.")
    weights: str = Field(description=_WEIGHTS)
    block: Positive | None = Field(
        default=None, description="Take features after this block, counted from 1. Default: the last, with its norm."
    )
    pool: Literal["mean", "cls"] = Field(
        default="mean", description="Features: mean over patch tokens, or class token."
    )
    mean: Mean | None = Field(default=None, description=MEAN_DESCRIPTION)
    std: Std | None = Field(default=None, description=STD_DESCRIPTION)
    resize_ratio: ResizeRatio = Field(default=1.143, description=RESIZE_RATIO_DESCRIPTION)
    batch_size: Batch = Field(default=256, description="Images per forward pass. Does not affect results.")
    evaluators: tuple[Evaluator, ...] = Field(
        default=(KnnEvaluator(name="knn"), LinearEvaluator(name="linear")),
        description="What is measured, each evaluator once. --set replaces the whole list.",
    )
    loader: LoaderConfig = Field(default=LoaderConfig(), description=_LOADER)
    run: RunConfig = Field(description=_RUN)

    @model_validator(mode="after")
    def _each_once(self) -> "EvaluateRecipe":
        names = [each.name for each in self.evaluators]
        if not names:
            raise ValueError("evaluators is empty: name at least one")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"evaluators names {', '.join(twice)} twice: the results have one place for each")
        return self

    @model_validator(mode="after")
    def _what_they_need(self) -> "EvaluateRecipe":
        for each in self.evaluators:
            needed = {"knn": ("train", "val"), "linear": ("train", "val"), "classifier": ("val",)}.get(each.name, ())
            if lacking := [name for name in needed if getattr(self, name) is None]:
                raise ValueError(f"evaluator {each.name} needs {' and '.join(lacking)}: labelled images")
            if each.name == "classifier" and self.weights == "random":
                raise ValueError("evaluator classifier needs weights with a classifier; got weights: random")
        return self


class FidelityRecipe(Section):
    """`tinymim fidelity`: compare codecs by the gradients that they give a student, on the same views."""

    stage: Literal["fidelity"] = Field(description=_STAGE)
    source: SourceConfig = Field(description=_SOURCE)
    views: ViewConfig = Field(default=ViewConfig(), description=_VIEWS)
    teacher: TeacherConfig = Field(description="Teacher and tapped block.")
    codecs: dict[Title, CodecConfig] = Field(description="Codecs to compare, each under a name of your choice.")
    targets: TargetsConfig = Field(
        default=TargetsConfig(), description="Targets that codecs are compared on; each takes its own fields."
    )
    student: ModelConfig = Field(description="Student whose gradient is compared.")
    student_state: Folder | None = Field(
        default=None, description="Run folder of `train-student`: also compare with this trained student."
    )
    num_images: int = Field(default=64, ge=4, le=LARGEST, description="Number of images, one view each.")
    draws: Positive = Field(default=2, description="Independent encodings of every view by a codec that draws.")
    batch_size: Batch = Field(default=16, description="Views per forward pass of the teacher.")
    loader: LoaderConfig = Field(default=LoaderConfig(), description=_LOADER)
    run: RunConfig = Field(description=_RUN)

    @model_validator(mode="after")
    def _some_codec(self) -> "FidelityRecipe":
        if not self.codecs:
            raise ValueError("codecs is empty: name at least one")
        return self


class ChainStep(Section):
    """One command of a chain."""

    stage: Literal["pretrain-mae", "pretrain", "cache-teacher", "train-student", "finetune"] = Field(
        description="Command to run."
    )
    recipe: Folder = Field(description="A file, or the name of a shipped recipe.")
    set: tuple[str, ...] = Field(default=(), description="`--set` values for this step, applied after the chain's own.")


class ChainRecipe(Section):
    """`tinymim chain`: run commands one after another; a student may become the next teacher.

    All recipes are read and checked before the first command starts. The same command resumes a stopped chain.
    """

    stage: Literal["chain"] = Field(description=_STAGE)
    steps: tuple[ChainStep, ...] = Field(min_length=1, description="Commands in order.")
    set: tuple[str, ...] = Field(default=(), description="`--set` values for every step: `source.shards=shards/mine`.")


RunRecipe = (
    PretrainMaeRecipe
    | PretrainRecipe
    | CacheTeacherRecipe
    | TrainStudentRecipe
    | EvaluateRecipe
    | FidelityRecipe
    | FinetuneRecipe
)
Recipe = RunRecipe | ChainRecipe
RECIPES: dict[str, type[Recipe]] = {
    "pretrain-mae": PretrainMaeRecipe,
    "pretrain": PretrainRecipe,
    "cache-teacher": CacheTeacherRecipe,
    "train-student": TrainStudentRecipe,
    "evaluate": EvaluateRecipe,
    "fidelity": FidelityRecipe,
    "finetune": FinetuneRecipe,
    "chain": ChainRecipe,
}
