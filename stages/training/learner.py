"""One model in training, with its optimiser, schedule, average, log and states; on one rank or on many."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tinymim.configs.errors import RecipeError, UserError
from tinymim.configs.schema.recipes import TrainingRecipe
from tinymim.pipeline.order import Items, SampleOrder
from tinymim.stages.run.folder import RunFolder
from tinymim.stages.training.optim import (
    make_optimiser,
    make_scaler,
    make_schedule,
    optimiser_step,
    require_batch,
    state_identity,
)
from tinymim.stages.training.ranks import Ranks
from tinymim.stages.training.states import drop_states, dump_state, prune_states, save_state

NEVER = 2**62  # later than any step


class Learner:
    """A model and its optimiser. The training loop belongs to the stage and may feed several learners.

    Args:
        name: the student's name among several; empty for a single model.
        about: a description of the model, printed at the start.
        recipe: the recipe that trains this model alone.
        part: the model's name in a state, e.g. "student".
        module: the model, on its device; it is put into training mode.
        example: arguments of its forward pass, with two samples, because gradients of one have other strides.
        ranks: the ranks of the run.
        order: the order of samples.
        content: digests of the data that the state depends on.

    Attributes:
        module: the model itself.
        model: the model for the loop to call; on many ranks DistributedDataParallel around `module`.
        ema: the moving average of the model; None where the recipe has none.
    """

    def __init__(
        self,
        name: str,
        about: str,
        recipe: TrainingRecipe,
        part: str,
        module: nn.Module,
        example: tuple[Tensor, ...],
        ranks: Ranks,
        order: SampleOrder,
        content: list[str],
    ) -> None:
        self.name, self.about, self.recipe, self.ranks = name, about, recipe, ranks
        self.device = next(module.parameters()).device
        module = _with_batch_norm(module, recipe.batch_norm, self.device, ranks)
        self.module, self._example = module.train(), example
        self.folder: Path = recipe.run.folder
        self.optimiser = make_optimiser(module, recipe.optim)
        self.scaler = make_scaler(self.device, recipe.precision)
        require_batch(order, ranks.world_size * recipe.optim.accumulate)
        self.schedule = make_schedule(recipe.optim, order.steps_per_epoch)
        self.identity = state_identity(recipe, content)
        self.parts: dict[str, Any] = {part: module, "optimiser": self.optimiser, "scaler": self.scaler}
        self.ema: ModelEmaV3 | None = None
        if recipe.ema is not None:
            self.ema = ModelEmaV3(module, decay=recipe.ema.decay, use_warmup=recipe.ema.warmup)
            self.parts["ema"] = self.ema
        self.model: nn.Module = module
        self.watch = LossWatch(self.device)
        self.losses: dict[str, Tensor] = {}  # this rank's share of the last step's losses; "loss" is the trained one
        self._log: RunFolder | None = None

    def distribute(self) -> None:
        """Make gradients means over all ranks; call it once, after a state was loaded."""
        if self.ranks.world_size == 1:
            return
        self.model.eval()  # no drop path in passes that train nothing
        self._backward_of_example()
        # DDP waits for a gradient of every parameter unless it is set to search for unused ones, which costs time.
        unused = any(p.requires_grad and p.grad is None for p in self.module.parameters())
        self.optimiser.zero_grad(set_to_none=True)
        self.model = DistributedDataParallel(
            self.module,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=unused,
        )
        # DDP regroups gradients after its first backward pass, and the grouping decides the order in which ranks are
        # summed. After this pass all steps sum alike, also the first one after a resume.
        self._backward_of_example()
        self.optimiser.zero_grad(set_to_none=True)
        self.model.train()

    def _backward_of_example(self) -> None:
        sums = [out.float().sum() for out in _tensors(self.model(*self._example))]
        torch.stack(sums).sum().backward()

    @contextlib.contextmanager
    def logging(self, first_step: int, models: int) -> Iterator[None]:
        """Open the run folder's log, on rank 0 only; `models` models share the device and divide its time."""
        if not self.ranks.first:
            yield
            return
        with RunFolder(self.recipe, first_step, self.ranks.world_size / models) as self._log:
            yield

    # ---- a step

    @contextlib.contextmanager
    def part_of_step(self, first: bool, last: bool) -> Iterator[None]:
        """Enclose the forward and backward pass of one part of a step."""
        if first:
            self.losses = {}
        # Ranks exchange gradients after the last part only: the sum of all parts costs one exchange.
        waits = not last and isinstance(self.model, DistributedDataParallel)
        with self.model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]  # DDP has it
            yield

    def backward(self, losses: Mapping[str, Tensor], share: float) -> None:
        """Add the gradient of one part.

        Args:
            losses: scalars, means over the part's samples; "loss" is trained, the others are logged.
            share: the part's samples, divided by the samples that this rank should have in a step.
        """
        weighted = {name: loss * share for name, loss in losses.items()} if share != 1.0 else dict(losses)
        self.scaler.scale(weighted["loss"]).backward()
        for name, loss in weighted.items():
            self.losses[name] = self.losses[name] + loss.detach() if name in self.losses else loss.detach()

    def update(self, step: int) -> None:
        """Update weights and average, at the end of step `step`, counted from 0."""
        self.watch.note(step, self.losses["loss"])  # checked a step later, not here, where it would wait for the GPU
        lr = self.schedule.lr(step)
        optimiser_step(self.module, self.optimiser, self.scaler, lr, self.recipe.optim.clip_norm)
        if self.ema is not None:
            self.ema.update(self.module, step=step + 1)

    # ---- now and then

    def means(self) -> dict[str, float]:
        """The losses of the last step, means over all ranks; all ranks must call it."""
        means = self.ranks.mean(torch.stack([loss.float() for loss in self.losses.values()]))
        return dict(zip(self.losses, means.tolist(), strict=True))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of step `step`; rank 0 only."""
        if self._log is not None:
            self._log.log(step, **values)

    def save(self, step: int, order: SampleOrder) -> None:
        """Write the state after `step` steps; rank 0 only. Raises UserError where a parameter is not finite."""
        if self.ranks.first:
            save_state(self.folder, step, self.identity, self.parts | {"order": order})

    def prune(self, step: int, first_step: int | None) -> None:
        """Remove older states; with `first_step`, at the first save of a process, also those it did not resume from."""
        if not self.ranks.first:
            return
        if first_step is not None:
            drop_states(self.folder, first_step, but=step)
        prune_states(self.folder, self.recipe.checkpoint.keep)

    def raise_not_finite(self, step: int, done: int, items: Items, shards: list[str]) -> None:
        """Write a dump and raise, on all ranks, for a loss that was not finite on some of them.

        Args:
            step: the step of the loss, counted from 0.
            done: number of steps done by now; the check may lag behind the GPU by a few.
            items: the step's samples over all ranks, int64 [B, 3 or more].
            shards: names of shards, by the first column of `items`.

        Raises:
            UserError: always; names the step and the dump.
        """
        first_by_rank = self.ranks.gather(self.watch.first_broken(True))
        found_by = [rank for rank, first in enumerate(first_by_rank) if first == step]
        dump = self.folder / f"not-finite-{step:08d}.pt"
        about = {"step": step, "ranks": found_by, "items": torch.from_numpy(items[:, :3].copy()), "shards": shards}
        if self.ranks.first:
            dump_state(dump, done, self.identity, self.parts, about)
        student = f" of student {self.name}" if self.name else ""
        raise UserError(
            f"the loss{student} is not finite at step {step}",
            got=f"found by rank {', '.join(map(str, found_by))}; the state and the step's samples are in {dump}",
            hint="lower optim.base_lr, set optim.clip_norm, or train in fp32; the last saved state is intact",
        )


def _with_batch_norm(module: nn.Module, mode: str, device: torch.device, ranks: Ranks) -> nn.Module:
    """The module with its batch norms in the mode of the recipe.

    Raises:
        RecipeError: "sync" on several ranks without GPUs, which torch does not offer.
    """
    if mode == "sync" and ranks.world_size > 1:
        if device.type != "cuda":
            raise RecipeError("batch_norm: sync needs GPUs", got=device.type, hint="set batch_norm: train or frozen")
        synchronous: nn.Module = convert_sync_batchnorm(module)
        return synchronous
    if mode == "frozen":
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.register_forward_pre_hook(_freeze)  # `train` turns the mode on again
    return module


def _freeze(layer: nn.Module, _args: Any) -> None:
    layer.training = False


def _tensors(outputs: Any) -> list[Tensor]:
    """The tensors in nested tuples."""
    return [outputs] if isinstance(outputs, Tensor) else [each for part in outputs for each in _tensors(part)]


@dataclass
class _Seen:
    step: int
    finite: Tensor  # bool [], valid on the CPU once `event` has passed
    event: Any  # torch.cuda.Event; None: `finite` is valid


class LossWatch:
    """Finds the first step whose loss is not finite, without waiting for a GPU: the result is read a step later."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seen: list[_Seen] = []
        self._first = NEVER

    def note(self, step: int, loss: Tensor) -> None:
        """Record whether the loss of a step, a scalar on the device, is finite."""
        finite = loss.detach().isfinite()
        event = None
        if self._on_gpu:
            finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(loss.device))  # not the current device's: that may be another one
        self._seen.append(_Seen(step, finite, event))

    def first_broken(self, wait: bool) -> int:
        """The first step known to have a loss that is not finite; `NEVER` if there is none.

        Args:
            wait: wait for steps that the GPU has not computed yet. False leaves them out.
        """
        while self._seen and (wait or self._seen[0].event is None or self._seen[0].event.query()):
            seen = self._seen.pop(0)
            if seen.event is not None:
                seen.event.synchronize()
            if not bool(seen.finite) and self._first == NEVER:
                self._first = seen.step
        return self._first
