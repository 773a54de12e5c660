"""Sections of a run: its folder and device, its training states, its workers on a cluster."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tinymim.configs.sections.base import Section
from tinymim.configs.sections.values import Device, Folder, Positive, Seed, Threads


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
