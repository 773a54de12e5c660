"""What both training stages share: device, AdamW with its parameter groups, the schedule, resumable state."""

import contextlib
import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinymim.configs.errors import CheckpointError, RecipeError, UserError
from tinymim.configs.schema import ModelConfig, OptimConfig, PretrainMaeRecipe, TrainStudentRecipe
from tinymim.storage.atomic import canonical_json, digest_hex, write_bytes_atomic

STATE_NAME = "state.pt"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises RecipeError where CUDA is asked for and absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError("run.device asks for CUDA", got=name, expected="a machine with CUDA, or device: cpu")
    return torch.device(name)


def require_view_size(size: int, model: ModelConfig, section: str) -> None:
    """Raises RecipeError where views of `size` pixels do not fit the model that `section` of the recipe describes."""
    if size != model.img_size:
        raise RecipeError(f"views.size is not {section}.img_size", got=size, expected=model.img_size)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Mixed precision for one forward pass; fp32 is a no-op."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up from 0, then a cosine to `min_lr` at `total_steps`."""

    peak_lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def lr(self, step: int) -> float:
        """The rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_schedule(config: OptimConfig, steps_per_epoch: int) -> Schedule:
    """Resolve epochs to steps and scale the base rate: lr = base_lr x batch / 256.

    Raises:
        UserError: the source holds less than one batch.
    """
    if steps_per_epoch == 0:
        raise UserError("the source holds less than one batch", got=0, hint="lower optim.batch_size")
    total = config.steps if config.steps is not None else (config.epochs or 0) * steps_per_epoch
    peak_lr = config.base_lr * config.batch_size / 256
    return Schedule(peak_lr, config.min_lr, round(config.warmup * total), total)


def make_optimiser(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; no weight decay on biases, norms and other 1-D parameters, nor on tokens of shape [1, 1, C]."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if p.squeeze().ndim <= 1]
    decayed = [p for name, p in trained if p.squeeze().ndim > 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas)


def optimiser_step(
    loss: Tensor,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    lr: float,
    clip_norm: float | None,
) -> None:
    """One backward and update at learning rate `lr`; `scaler` is inactive outside fp16."""
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    if clip_norm is not None:
        scaler.unscale_(optimiser)
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    scaler.step(optimiser)
    scaler.update()


def make_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Loss scaling, active for fp16 only."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def seeded(device: torch.device, *identity: int) -> torch.Generator:
    """A generator named by integers (run seed, step): the same on a resumed run as on an uninterrupted one."""
    digest = hashlib.blake2b("/".join(map(str, identity)).encode(), digest_size=8, person=b"tinymim/step").digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


@contextlib.contextmanager
def step_seed(*identity: int) -> Iterator[None]:
    """Seed torch's global generators for one step (drop path draws from them) and leave the caller's state alone."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seeded(torch.device("cpu"), *identity).initial_seed())
        yield


def require_finite(loss: Tensor, step: int) -> float:
    """The loss as a float. Raises UserError naming the step where it is not finite."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise UserError(
            f"the loss is not finite at step {step}",
            got=value,
            hint="lower optim.base_lr, set optim.clip_norm, or train in fp32; the last saved state is intact",
        )
    return value


def state_identity(recipe: PretrainMaeRecipe | TrainStudentRecipe, content: Sequence[str]) -> str:
    """Digest of all that a training state depends on.

    Paths, workers, threads, device and how often to log, check or save may change between stop and resume (I10);
    the data may move but not change, so it counts by its content hashes.
    """
    free = {"loader": True, "checkpoint": True, "verify": True, "source": True, "cache": True}
    fields = recipe.model_dump(mode="json", exclude=free | {"run": {"folder", "device", "threads", "log_every"}})
    return digest_hex(canonical_json({"recipe": fields, "content": list(content)}))


def save_state(folder: Path, step: int, identity: str, parts: dict[str, Any]) -> None:
    """Write `state.pt` (atomic, with its own digest): the state after `step` steps of the recipe.

    Raises:
        UserError: a parameter is not finite (a finite loss can still have had an infinite gradient).
    """
    for part in parts.values():
        if isinstance(part, nn.Module) and not all(bool(p.isfinite().all()) for p in part.parameters()):
            raise UserError(
                f"the parameters are not finite after step {step}",
                hint="lower optim.base_lr, set optim.clip_norm, or train in fp32; the last saved state is intact",
            )
    buffer = io.BytesIO()
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"step": step, "identity": identity, "parts": states}, buffer)
    payload = buffer.getvalue()
    write_bytes_atomic(folder / STATE_NAME, hashlib.sha256(payload).digest() + payload)


def load_state(folder: Path, identity: str, parts: dict[str, Any], device: torch.device) -> int:
    """Restore `parts` in place from `state.pt`; returns the number of steps done, 0 where there is no state.

    Raises:
        CheckpointError: the file is damaged, or belongs to another recipe.
    """
    path = folder / STATE_NAME
    if not path.exists():
        return 0
    state = read_state(folder, device)
    if state["identity"] != identity:
        raise CheckpointError(
            f"{path} belongs to another recipe or other data",
            got=state["identity"],
            expected=identity,
            hint="use another run.folder, set checkpoint.resume=false, or restore the recipe",
        )
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    return int(state["step"])


def read_state(folder: Path, device: torch.device) -> dict[str, Any]:
    """A run folder's state as it was saved: {"step", "identity", "parts": {name: state dict}}.

    Raises:
        CheckpointError: there is none, or the file is damaged.
    """
    path = folder / STATE_NAME
    if not path.exists():
        raise CheckpointError("there is no training state", got=path, hint="name a run folder of train-student")
    raw = path.read_bytes()
    if hashlib.sha256(raw[32:]).digest() != raw[:32]:
        raise CheckpointError(f"{path} is damaged (its digest differs)", hint="remove it to start from step 0")
    state: dict[str, Any] = torch.load(io.BytesIO(raw[32:]), map_location=device, weights_only=True)
    return state
