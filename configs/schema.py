"""The one schema of all recipes, one class per command.

A recipe is a YAML file with a `stage:` line that names the command it is for; every other key is a field
below, and most fields are sections (`configs/sections.py`).
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tinymim.configs.codecs import CodecConfig, SketchCodec, TargetsConfig
from tinymim.configs.place import Place
from tinymim.configs.sections import (
    AuditConfig,
    AugmentConfig,
    CheckpointConfig,
    Cluster,
    ClusterConfig,
    Device,
    EmaConfig,
    Evaluator,
    Fraction,
    JitterConfig,
    KnnEvaluator,
    LayerwiseOptimConfig,
    LinearEvaluator,
    LoaderConfig,
    MaeConfig,
    ModelConfig,
    OptimConfig,
    OrderConfig,
    Positive,
    Precision,
    Restarts,
    RunConfig,
    Section,
    SourceConfig,
    TeacherConfig,
    ValidationConfig,
    VerifyConfig,
    ViewConfig,
    Workers,
)


class _Training(Section):
    """What all trainings have: how long, how fast, in what order, on what, and where it is kept."""

    stage: str
    optim: OptimConfig
    ema: EmaConfig | None = None
    order: OrderConfig = OrderConfig()
    loader: LoaderConfig = LoaderConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    precision: Precision = "fp32"
    workers: Workers = 1
    cluster: Cluster = "local"
    max_restarts: Restarts = 3
    run: RunConfig

    @model_validator(mode="after")
    def _whole_shares(self) -> "_Training":
        for name, value in (("order.lanes", self.order.lanes), ("optim.batch_size", self.optim.batch_size)):
            if value % self.workers:
                raise ValueError(f"workers must divide {name}; got {self.workers} workers, {name} {value}")
        return self


class PretrainMaeRecipe(_Training):
    """`tinymim pretrain-mae`: make a teacher (or a baseline student) from images alone."""

    stage: Literal["pretrain-mae"]
    source: SourceConfig
    views: ViewConfig = ViewConfig()
    model: ModelConfig
    mae: MaeConfig = MaeConfig()


class CacheTeacherRecipe(Section):
    """`tinymim cache-teacher`: run the teacher once over every view and store the sketches."""

    stage: Literal["cache-teacher"]
    source: SourceConfig
    views: ViewConfig = ViewConfig()
    num_views: Positive = 2
    teacher: TeacherConfig
    codec: CodecConfig = SketchCodec()
    cache: Place | None = None  # where the cache is, or is to be: a folder, or the URL of one in an object store
    cache_root: Place | None = None  # instead of `cache`: where caches are shared, each below its spec_id
    # Images; each carries num_views views through the teacher. "auto": as many as fit into memory.
    batch_size: Positive | Literal["auto"] = 64
    max_unreadable: Fraction = 0.01  # share of unreadable images above which a unit fails
    retries: Annotated[int, Field(ge=0)] = 2  # times that a failed unit is tried again, after all others
    audit_views: Annotated[int, Field(ge=0)] = 16  # views per unit whose records are compared with the dense maps (I5)
    # Jobs on one cache share its shards; after so many seconds without a sign of life others take over a job's shard.
    lease_s: Annotated[float, Field(gt=0)] = 60.0
    cluster: ClusterConfig | None = None  # None: this process alone, without Ray
    loader: LoaderConfig = LoaderConfig()
    run: RunConfig

    @property
    def given_batch_size(self) -> int:
        """`batch_size`, or 64: for calibration and checks, which are no matter of speed."""
        return 64 if self.batch_size == "auto" else self.batch_size

    @model_validator(mode="after")
    def _one_place(self) -> "CacheTeacherRecipe":
        if (self.cache is None) == (self.cache_root is None):
            raise ValueError(f"give cache or cache_root, exactly one; got cache={self.cache}, root={self.cache_root}")
        return self


class StudentConfig(Section):
    """One of several students of a run. What it leaves out, also within `optim`, is as the recipe has it."""

    model: ModelConfig
    optim: OptimConfig
    drop_path: Fraction
    jitter: JitterConfig
    ema: EmaConfig | None
    device: Device | None = None  # None: run.device


_OWN = ("optim", "drop_path", "jitter", "ema")  # what a student may have for itself
_OF_THE_STREAM = ("batch_size", "epochs", "steps", "accumulate")  # of `optim`: the same for all students


class TrainStudentRecipe(_Training):
    """`tinymim train-student`: stream the cache joined with the same views into one student, or into several."""

    stage: Literal["train-student"]
    source: SourceConfig
    cache: Place  # a cache, or a root that holds just one
    num_views: Positive | None = None  # use the first so many views of every image; None: as many as the cache is for
    on_missing: Literal["refuse", "skip"] = "refuse"  # images of the source that the cache holds no record of
    student: ModelConfig | None = None  # either this
    students: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], StudentConfig] | None = None  # or this, by names
    targets: TargetsConfig = TargetsConfig()
    drop_path: Fraction = 0.1
    jitter: JitterConfig = JitterConfig()
    verify: VerifyConfig = VerifyConfig()
    audit: AuditConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data: Any) -> Any:
        """Write into every student what it has from the recipe; problems are left to the fields' own checks."""
        if not isinstance(data, dict) or not isinstance(data.get("students"), dict):
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
            raise ValueError("give student, or students with at least one name in it, and not both")
        for name, student in (self.students or {}).items():
            for field in _OF_THE_STREAM:
                own, shared = getattr(student.optim, field), getattr(self.optim, field)
                if own != shared:
                    what = f"students.{name}.optim.{field} must be the recipe's: the students share one stream"
                    raise ValueError(f"{what}; got {own} and {shared}")
        return self

    def each(self) -> dict[str, "TrainStudentRecipe"]:
        """By name, the recipe that trains each student alone, into `<run.folder>/<name>`; that of `student` is ""."""
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
    """`tinymim finetune`: train an encoder and a new head on labelled images."""

    stage: Literal["finetune"]
    train: SourceConfig
    val: SourceConfig
    views: ViewConfig = ViewConfig()
    model: ModelConfig
    weights: str  # "random" (supervised from scratch), "hub", "package:NAME", or a file
    pool: Literal["mean", "cls"] = "mean"  # what the head sees: the mean over patches, or the class token
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    drop_path: Fraction = 0.1
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of labels
    augment: AugmentConfig = AugmentConfig()
    optim: LayerwiseOptimConfig
    validation: ValidationConfig = ValidationConfig()

    @model_validator(mode="after")
    def _whole_pairs(self) -> "FinetuneRecipe":
        if self.augment.mixes and self.optim.batch_size % (2 * self.order.lanes):
            raise ValueError(
                "mixup and cutmix pair the samples of a lane: optim.batch_size must be a multiple of 2 x order.lanes; "
                f"got {self.optim.batch_size} and {self.order.lanes} lanes"
            )
        return self


TrainingRecipe = PretrainMaeRecipe | TrainStudentRecipe | FinetuneRecipe


class EvaluateRecipe(Section):
    """`tinymim evaluate`: evaluators of a frozen encoder, such as k-NN and a linear probe, on labelled shards."""

    stage: Literal["evaluate"]
    train: SourceConfig
    val: SourceConfig
    model: ModelConfig
    weights: str  # "random", "hub", "package:NAME", or a file
    block: Positive | None = None  # features after this block, counted from 1; None: the last, with final norm
    pool: Literal["mean", "cls"] = "mean"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    resize_ratio: Annotated[float, Field(ge=1)] = 1.143  # short side = size x ratio, then centre crop (256/224)
    batch_size: Positive = 256
    evaluators: tuple[Evaluator, ...] = (KnnEvaluator(name="knn"), LinearEvaluator(name="linear"))
    loader: LoaderConfig = LoaderConfig()
    run: RunConfig

    @model_validator(mode="after")
    def _each_once(self) -> "EvaluateRecipe":
        names = [each.name for each in self.evaluators]
        if not names:
            raise ValueError("evaluators is empty: name at least one")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"evaluators names {', '.join(twice)} twice: the results have one place for each")
        return self


class FidelityRecipe(Section):
    """`tinymim fidelity`: compare codecs by the gradients that they give a student, on the same views."""

    stage: Literal["fidelity"]
    source: SourceConfig
    views: ViewConfig = ViewConfig()
    teacher: TeacherConfig
    codecs: dict[str, CodecConfig]  # by a name of your choice
    targets: TargetsConfig = TargetsConfig()  # what all of them are asked for
    student: ModelConfig
    student_state: Path | None = None  # run folder of train-student: judge by that student too, not only at its start
    num_images: Annotated[int, Field(ge=4)] = 64  # one view of each
    draws: Positive = 2  # independent encodings of every view by a codec that draws
    batch_size: Positive = 16  # views that the teacher sees at a time
    loader: LoaderConfig = LoaderConfig()
    run: RunConfig

    @model_validator(mode="after")
    def _some_codec(self) -> "FidelityRecipe":
        if not self.codecs:
            raise ValueError("codecs is empty: name at least one")
        return self


class ChainStep(Section):
    """One command of a chain."""

    stage: Literal["pretrain-mae", "cache-teacher", "train-student", "finetune"]
    recipe: Path  # a file, or the name of a shipped recipe
    set: tuple[str, ...] = ()  # as --set: `cache=caches/mine`; later than the chain's own


class ChainRecipe(Section):
    """`tinymim chain`: commands one after the other, such as a student that becomes the next one's teacher."""

    stage: Literal["chain"]
    steps: Annotated[tuple[ChainStep, ...], Field(min_length=1)]
    set: tuple[str, ...] = ()  # as --set, for every step: `source.shards=shards/mine`


RunRecipe = (
    PretrainMaeRecipe | CacheTeacherRecipe | TrainStudentRecipe | EvaluateRecipe | FidelityRecipe | FinetuneRecipe
)
Recipe = RunRecipe | ChainRecipe
RECIPES: dict[str, type[Recipe]] = {
    "pretrain-mae": PretrainMaeRecipe,
    "cache-teacher": CacheTeacherRecipe,
    "train-student": TrainStudentRecipe,
    "evaluate": EvaluateRecipe,
    "fidelity": FidelityRecipe,
    "finetune": FinetuneRecipe,
    "chain": ChainRecipe,
}
