"""Ranks: the processes that train together, as the environment names them (RANK, WORLD_SIZE, LOCAL_RANK).

torchrun sets these variables, and so do `stages/training/launch.py` and Ray Train. Without them there is one rank and
no communication.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tinymim.configs.errors import RecipeError
from tinymim.configs.schema import TrainingRecipe
from tinymim.configs.sections import RunConfig
from tinymim.stages.run.device import pick_device
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.run.progress import silence

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: its number, below `world_size`; rank 0 alone writes, logs and speaks.
        world_size: how many there are.
        local_rank: its number on this machine, and that of its GPU.
        local_world_size: how many there are on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and logs."""
        return self.rank == 0

    def least(self, *values: int) -> list[int]:
        """The smallest of all ranks' values, each for itself: how ranks agree. Waits for no GPU.

        Args:
            values: 64-bit integers, as many on every rank.
        """
        if self.world_size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        return [int(value) for value in agreed]

    def mean(self, values: Tensor) -> Tensor:
        """float [n] on the CPU: the mean over ranks of each value."""
        values = values.detach().double().cpu()
        if self.world_size > 1:
            dist.all_reduce(values)
        return values / self.world_size

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks, on the CPU: exact for int64, of any shape."""
        values = values.detach().cpu().clone()
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """Every rank's bytes, by rank."""
        if self.world_size == 1:
            return [payload]
        sizes = self.gather(len(payload))
        own = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        own[: len(payload)] = torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)[: len(payload)]
        found = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(found, own)
        return [each[:size].numpy().tobytes() for each, size in zip(found, sizes, strict=True)]

    def gather(self, value: int) -> list[int]:
        """Every rank's value, by rank."""
        if self.world_size == 1:
            return [value]
        found = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(found, torch.tensor([value]))
        return [int(each) for each in found]

    def from_first(self, payload: bytes | None) -> bytes | None:
        """Rank 0's bytes, on every rank; what the others pass is not looked at."""
        if self.world_size == 1:
            return payload
        size = torch.tensor([-1 if payload is None else len(payload)])
        dist.broadcast(size, 0)
        if size < 0:
            return None
        data = torch.frombuffer(bytearray(payload or b""), dtype=torch.uint8) if self.first else None
        if data is None:
            data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0)
        return data.numpy().tobytes()


def environment_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """The ranks that the environment variables of torchrun describe; one rank where they are not all there."""
    variables = os.environ if environment is None else environment
    if not launched(variables):
        return Ranks()
    rank, world_size, local_rank = (int(variables[name]) for name in _VARIABLES)
    return Ranks(rank, world_size, local_rank, int(variables.get("LOCAL_WORLD_SIZE", world_size)))


def launched(environment: Mapping[str, str] | None = None) -> bool:
    """Whether somebody has started this process as a rank."""
    variables = os.environ if environment is None else environment
    return all(name in variables for name in _VARIABLES)


@contextlib.contextmanager
def joined(run: RunConfig) -> Iterator[Ranks]:
    """The process group of all ranks: gloo for agreements and CPUs, NCCL for the gradients of GPUs.

    Also sets what every rank must have of its own: its GPU, its share of the cores.

    Raises:
        RecipeError: `run.device` does not give every rank of this machine a device.
    """
    ranks = environment_ranks()
    if ranks.world_size == 1:
        yield ranks
        return
    if not ranks.first:
        silence()
    with_gpus = rank_device(run.device, ranks).type == "cuda"
    if with_gpus:
        torch.cuda.set_device(ranks.local_rank)
    if run.threads is None:
        # torch takes every core of the machine for itself, in each of the ranks.
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks.local_world_size))
    ours = not dist.is_initialized()  # Ray Train has done it, and undoes it
    if ours:
        dist.init_process_group(backend_of(with_gpus))
    # After any other error the process ends without leaving: NCCL would wait here for ranks that wait themselves.
    try:
        yield ranks
    except Interrupted:
        _leave(ranks, ours)
        raise
    _leave(ranks, ours)


def backend_of(with_gpus: bool) -> str:
    """torch's name of the process group's backend."""
    return "cpu:gloo,cuda:nccl" if with_gpus else "gloo"


def _leave(ranks: Ranks, ours: bool) -> None:
    ranks.least(0)  # rank 0 may still write
    if ours:
        dist.destroy_process_group()


def rank_device(name: str, ranks: Ranks) -> torch.device:
    """The device of this rank for `run.device`: of many ranks each has a GPU of its own.

    Raises:
        RecipeError: CUDA is asked for and absent, or there are fewer GPUs than ranks on this machine.
    """
    device = pick_device(name)
    if device.type == "cpu" or ranks.world_size == 1:
        return device
    if ":" in name:
        raise RecipeError(
            "run.device names one GPU for several workers",
            got=f"{name} for {ranks.world_size} workers",
            expected="cuda: worker r of a machine takes its GPU r",
            hint="CUDA_VISIBLE_DEVICES says which GPUs those are",
        )
    if ranks.local_world_size > torch.cuda.device_count():
        raise RecipeError(
            "there are more workers than GPUs",
            got=f"{ranks.local_world_size} workers, {torch.cuda.device_count()} GPUs",
            hint="lower workers, or train on the CPU with run.device=cpu",
        )
    return torch.device("cuda", ranks.local_rank)


def set_up(recipe: TrainingRecipe, ranks: Ranks) -> torch.device:
    """What every training begins with on each rank: its threads, its device, and a batch that divides.

    Raises:
        RecipeError: there is no such device, or the batch has no equal parts.
    """
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    require_equal_parts(recipe.optim.batch_size, ranks, recipe.optim.accumulate)
    return rank_device(recipe.run.device, ranks)


def require_equal_parts(batch_size: int, ranks: Ranks, accumulate: int) -> None:
    """Raises RecipeError where a step's batch does not divide by ranks and accumulated parts."""
    parts = ranks.world_size * accumulate
    if batch_size % parts:
        raise RecipeError(
            "optim.batch_size does not divide into equal parts",
            got=f"batches of {batch_size}, {ranks.world_size} ranks x {accumulate} accumulated parts",
            expected=f"a multiple of {parts}",
            hint="optim.batch_size is the whole batch of a step, over all ranks and parts",
        )


def batch_arithmetic(batch_size: int, ranks: Ranks, accumulate: int) -> str:
    """What a step consists of, said aloud: "4,096 = 8 ranks x 128 x 4 accumulated"; of one part just "4,096"."""
    factors = [
        *([f"{ranks.world_size} ranks"] if ranks.world_size > 1 else []),
        f"{batch_size // (ranks.world_size * accumulate):,}",
        *([f"{accumulate} accumulated"] if accumulate > 1 else []),
    ]
    return f"{batch_size:,}" + (f" = {' x '.join(factors)}" if len(factors) > 1 else "")
