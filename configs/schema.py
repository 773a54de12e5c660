"""The one schema of all recipes: frozen, typed, unknown keys refused, all problems reported at once.

A recipe is a YAML file with a `stage:` line that names the command it is for; every other key is a field
below. `docs/recipes.md` explains them in prose. Defaults are TinyMIM's (Ren et al., CVPR 2023) where it has one.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, model_validator

from tinymim.configs.place import Place

Relation = Literal["qk", "vv", "qq", "kk"]
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


class SourceConfig(Section):
    """Where images come from: webdataset tars, with the index `make-shards` wrote or without one."""

    shards: Place  # a folder, or the URL of one in an object store
    pattern: str = "*.tar"  # which tars of the folder belong to the set


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


def _distinct(relations: tuple[Relation, ...]) -> tuple[Relation, ...]:
    if not relations or len(set(relations)) != len(relations):
        raise ValueError(f"relations must be a non-empty list without repeats, got {relations}")
    return relations


Relations = Annotated[tuple[Relation, ...], AfterValidator(_distinct)]


class SketchCodec(Section):
    """Sampled rows of the relation maps, a few tokens each (I4): unbiased with `tail: sampled`, the default."""

    name: Literal["sketch"] = "sketch"
    relations: Relations = ("qk", "vv")
    # Into how many heads the teacher's channels are split for the relations; None: the teacher's own.
    relation_heads: Positive | None = None
    rows: Positive = 64  # query rows drawn per view, relation and head (capped at the token count)
    head_k: Annotated[int, Field(ge=0)] = 0  # largest entries of a row kept with their value
    tail_k: Annotated[int, Field(ge=0)] = 8  # systematic draws from the rest of the row; 0 unless tail: sampled
    # What stands for the entries outside the head. The published top-k tails are biased: for comparison.
    tail: Literal["sampled", "uniform", "ghost", "renormalise"] = "sampled"

    @model_validator(mode="before")
    @classmethod
    def _no_draws_with_a_biased_tail(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("tail", "sampled") != "sampled":
            return {"tail_k": 0, **data}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "SketchCodec":
        if self.tail == "sampled" and self.tail_k == 0:
            raise ValueError("tail: sampled needs tail_k >= 1 (without draws the sketch is biased)")
        if self.tail != "sampled" and self.tail_k:
            raise ValueError(f"tail: {self.tail} draws nothing, leave tail_k out; got tail_k={self.tail_k}")
        if self.tail != "sampled" and self.head_k == 0:
            raise ValueError(f"tail: {self.tail} needs head_k >= 1")
        return self


class HiddenCodec(Section):
    """The input of the block's qkv projection, quantised; any relation is rebuilt from it at read."""

    name: Literal["hidden"]
    basis: Literal["channels", "pca"] = "channels"  # what is quantised: the channels, or principal components of qkv
    bits: Annotated[float, Field(gt=0, le=8)] = 8  # mean bits per channel and token; `channels` takes 4 or 8
    calibration_views: Positive = 256  # views that fix the scales, once per cache

    @model_validator(mode="after")
    def _whole_bits(self) -> "HiddenCodec":
        if self.basis == "channels" and self.bits not in (4, 8):
            raise ValueError(f"basis: channels takes bits 4 or 8, got {self.bits}")
        return self


class DenseCodec(Section):
    """Every row in fp16, for audits."""

    name: Literal["dense"]
    relations: Relations = ("qk", "vv")
    relation_heads: Positive | None = None


def _codec_name(value: Any) -> str:
    """The tag of a codec section; a section without a name is a sketch."""
    return str(value.get("name", "sketch") if isinstance(value, dict) else getattr(value, "name", "sketch"))


# How a target becomes bytes; `name` says which.
CodecConfig = Annotated[
    Annotated[SketchCodec, Tag("sketch")] | Annotated[HiddenCodec, Tag("hidden")] | Annotated[DenseCodec, Tag("dense")],
    Discriminator(_codec_name),
]


def codec_config(**fields: Any) -> CodecConfig:
    """The codec section with these fields. Raises pydantic's ValidationError."""
    return TypeAdapter(CodecConfig).validate_python(fields)


class TargetsConfig(Section):
    """What a student is compared on, where that is not all that the cache holds.

    A `hidden` cache rebuilds any relation with any number of heads and rows; from a `dense` or `sketch` cache
    relations can be left out, and from a `dense` one rows.
    """

    relations: Relations | None = None  # None: the cache's; of a hidden cache qk and vv
    relation_heads: Positive | None = None  # None: the cache's; of a hidden cache the teacher's
    rows: Positive | None = None  # query rows per view, relation and head; None: all that the cache holds


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


def _require_whole_shares(workers: int, order: OrderConfig, optim: OptimConfig) -> None:
    for name, value in (("order.lanes", order.lanes), ("optim.batch_size", optim.batch_size)):
        if value % workers:
            raise ValueError(f"workers must divide {name}; got {workers} workers, {name} {value}")


class PretrainMaeRecipe(Section):
    """`tinymim pretrain-mae`: make a teacher (or a baseline student) from images alone."""

    stage: Literal["pretrain-mae"]
    source: SourceConfig
    views: ViewConfig = ViewConfig()
    model: ModelConfig
    mae: MaeConfig = MaeConfig()
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
    def _whole_shares(self) -> "PretrainMaeRecipe":
        _require_whole_shares(self.workers, self.order, self.optim)
        return self


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


_OWN = ("optim", "drop_path", "jitter", "ema")  # what a student may have for itself
_OF_THE_STREAM = ("batch_size", "epochs", "steps", "accumulate")  # of `optim`: the same for all students


class TrainStudentRecipe(Section):
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
    optim: OptimConfig
    ema: EmaConfig | None = None
    order: OrderConfig = OrderConfig()
    verify: VerifyConfig = VerifyConfig()
    loader: LoaderConfig = LoaderConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    precision: Precision = "fp32"
    workers: Workers = 1
    cluster: Cluster = "local"
    max_restarts: Restarts = 3
    run: RunConfig

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
        _require_whole_shares(self.workers, self.order, self.optim)
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
                    "run": self.run.model_copy(update={"folder": self.run.folder / name}),
                }
                | {field: getattr(own, field) for field in _OWN}
            )
            for name, own in self.students.items()
        }


TrainingRecipe = PretrainMaeRecipe | TrainStudentRecipe


class KnnConfig(Section):
    """Weighted k-NN on l2-normalised features (Wu et al., CVPR 2018; Caron et al., ICCV 2021)."""

    k: Positive = 20
    temperature: Annotated[float, Field(gt=0)] = 0.07


class LinearProbeConfig(Section):
    """Multinomial logistic regression on standardised features by L-BFGS, full batch."""

    l2: Annotated[float, Field(ge=0)] = 1e-3
    max_iter: Positive = 200


class EvaluateRecipe(Section):
    """`tinymim evaluate`: k-NN and linear probe of a frozen encoder on labelled shards."""

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
    knn: KnnConfig = KnnConfig()
    linear: LinearProbeConfig = LinearProbeConfig()
    loader: LoaderConfig = LoaderConfig()
    run: RunConfig


class FidelityRecipe(Section):
    """`tinymim fidelity`: compare codecs by the gradients that they give a student, on the same views."""

    stage: Literal["fidelity"]
    source: SourceConfig
    views: ViewConfig = ViewConfig()
    teacher: TeacherConfig
    codecs: dict[str, CodecConfig]  # by a name of your choice
    targets: TargetsConfig = TargetsConfig()  # what a hidden codec is asked for
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

    stage: Literal["pretrain-mae", "cache-teacher", "train-student"]
    recipe: Path  # a file, or the name of a shipped recipe
    set: tuple[str, ...] = ()  # as --set: `cache=caches/mine`; later than the chain's own


class ChainRecipe(Section):
    """`tinymim chain`: commands one after the other, such as a student that becomes the next one's teacher."""

    stage: Literal["chain"]
    steps: Annotated[tuple[ChainStep, ...], Field(min_length=1)]
    set: tuple[str, ...] = ()  # as --set, for every step: `source.shards=shards/mine`


RunRecipe = PretrainMaeRecipe | CacheTeacherRecipe | TrainStudentRecipe | EvaluateRecipe | FidelityRecipe
Recipe = RunRecipe | ChainRecipe
RECIPES: dict[str, type[Recipe]] = {
    "pretrain-mae": PretrainMaeRecipe,
    "cache-teacher": CacheTeacherRecipe,
    "train-student": TrainStudentRecipe,
    "evaluate": EvaluateRecipe,
    "fidelity": FidelityRecipe,
    "chain": ChainRecipe,
}
