"""Ranks: the processes that train together, from the environment (RANK, WORLD_SIZE, LOCAL_RANK).

torchrun, `start_local` and Ray Train set these variables. Without them there is one rank and no communication.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tinymim.configs.errors import RecipeError
from tinymim.configs.schema.recipes import TrainingRecipe
from tinymim.configs.sections.run import RunConfig
from tinymim.stages.run.device import pick_device
from tinymim.stages.run.interrupt import Interrupted
from tinymim.stages.run.progress import silence

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: its number, below `world_size`; rank 0 alone writes, logs and prints.
        world_size: number of ranks.
        local_rank: its number on this machine, and the number of its GPU.
        local_world_size: number of ranks on this machine.
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
        """The minimum over ranks of each value, by which ranks agree.

        Args:
            values: 64-bit integers; every rank passes the same number of them.
        """
        if self.world_size == 1:
            return list(values)
        agreed = torch.tensor(values, dtype=torch.int64)  # on the CPU, so gloo exchanges it and no GPU is waited for
        dist.all_reduce(agreed, dist.ReduceOp.MIN)
        return [int(value) for value in agreed]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks of each value, float64 on the CPU, of any shape."""
        values = values.detach().double().cpu()
        if self.world_size > 1:
            dist.all_reduce(values)
        return values / self.world_size

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks of each value, on the CPU, of any shape; exact for int64."""
        values = values.detach().cpu().clone()
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """Every rank's bytes, by rank."""
        if self.world_size == 1:
            return [payload]
        sizes = self.gather(len(payload))  # all_gather needs equal sizes, so payloads are padded to the longest
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
        """Rank 0's bytes, on every rank; payloads of the others are ignored."""
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
    """The ranks in torchrun's environment variables; a single rank unless all of them are set."""
    variables = os.environ if environment is None else environment
    if not launched(variables):
        return Ranks()
    rank, world_size, local_rank = (int(variables[name]) for name in _VARIABLES)
    return Ranks(rank, world_size, local_rank, int(variables.get("LOCAL_WORLD_SIZE", world_size)))


def launched(environment: Mapping[str, str] | None = None) -> bool:
    """Whether a launcher started this process as a rank."""
    variables = os.environ if environment is None else environment
    return all(name in variables for name in _VARIABLES)


@contextlib.contextmanager
def joined(run: RunConfig) -> Iterator[Ranks]:
    """Join the process group of all ranks: NCCL for gradients on GPUs, gloo for everything else.

    Each rank also gets its own GPU and its share of the cores.

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
        # torch uses all cores by default, in each of the ranks.
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks.local_world_size))
    ours = not dist.is_initialized()  # Ray Train makes and destroys the group itself
    if ours:
        dist.init_process_group(backend_of(with_gpus))
    # All ranks raise Interrupted together. After any other error the others may be waiting in a collective, and
    # leaving the group would wait for them: the process just ends.
    try:
        yield ranks
    except Interrupted:
        _leave(ranks, ours)
        raise
    _leave(ranks, ours)


def backend_of(with_gpus: bool) -> str:
    """torch's name for the process group's backend."""
    return "cpu:gloo,cuda:nccl" if with_gpus else "gloo"


_left: list[Any] = []  # process groups that this process has left; they live as long as it does


def _leave(ranks: Ranks, ours: bool) -> None:
    ranks.least(0)  # a barrier, because rank 0 may still be writing
    if ours:
        # Otherwise the last reference may go with a frame that holds a DDP model. The group's destructor then joins
        # gloo's thread while it holds the GIL, and that thread may wait for the GIL to free a tensor: a deadlock, seen
        # with torch 2.11.
        _left.append(dist.group.WORLD)
        dist.destroy_process_group()


def rank_device(name: str, ranks: Ranks) -> torch.device:
    """The device of this rank for `run.device`; each of many ranks has a GPU of its own.

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
            hint="CUDA_VISIBLE_DEVICES selects the GPUs",
        )
    if ranks.local_world_size > torch.cuda.device_count():
        raise RecipeError(
            "there are more workers than GPUs",
            got=f"{ranks.local_world_size} workers, {torch.cuda.device_count()} GPUs",
            hint="lower workers, or train on the CPU with run.device=cpu",
        )
    return torch.device("cuda", ranks.local_rank)


def set_up(recipe: TrainingRecipe, ranks: Ranks) -> torch.device:
    """Set this rank's threads, check that the batch divides, and return the rank's device.

    Raises:
        RecipeError: the device does not exist, or the batch does not divide into equal parts.
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
    """The batch of a step as text: "4,096 = 8 ranks x 128 x 4 accumulated", or "4,096" if it is one part."""
    factors = [
        *([f"{ranks.world_size} ranks"] if ranks.world_size > 1 else []),
        f"{batch_size // (ranks.world_size * accumulate):,}",
        *([f"{accumulate} accumulated"] if accumulate > 1 else []),
    ]
    return f"{batch_size:,}" + (f" = {' x '.join(factors)}" if len(factors) > 1 else "")
