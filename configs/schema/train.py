"""The recipe of `train-student`."""

from typing import Any, Literal

from pydantic import Field, model_validator

from tinymim.configs.codecs.kinds import CodecConfig
from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.schema.training import TrainingFields
from tinymim.configs.sections import words
from tinymim.configs.sections.audits import AuditConfig
from tinymim.configs.sections.augment import JitterConfig
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.decoders import MimConfig
from tinymim.configs.sections.loader import VerifyConfig
from tinymim.configs.sections.masks import StudentMaskConfig
from tinymim.configs.sections.models import ModelConfig, TeacherConfig
from tinymim.configs.sections.optim import EmaConfig, OptimConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.values import Device, DropRate, Fraction, LayerName, Name, Place, Positive, Weight
from tinymim.configs.sections.views import ViewConfig

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


class TrainStudentRecipe(TrainingFields):
    """`tinymim train-student`: train one student, or several, from a cache and the same views."""

    stage: Literal["train-student"] = Field(description=words.STAGE)
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
