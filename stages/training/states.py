"""Training states on disk: `state-STEP.pt`, written atomically, a SHA-256 first, then tensors and plain types only.

A state holds no generator's state: every random draw is a function of (seed, step, place). Schedule and order of
samples are functions of the step (`SampleOrder`).
"""

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinymim.configs.errors import CheckpointError, UserError
from tinymim.stages.run.preflight import no_state
from tinymim.stages.run.progress import logger
from tinymim.stages.training.ranks import Ranks
from tinymim.storage.atomic import PARTIAL_SUFFIX, write_bytes_atomic
from tinymim.storage.identity import Identity

OLD_NAME = "state.pt"  # the only state of runs by older versions; it still loads
_DIGEST_BYTES = 32


def state_path(folder: Path, step: int) -> Path:
    """The path of the state after `step` steps."""
    return folder / f"state-{step:08d}.pt"


def save_state(folder: Path, step: int, identity: Identity, parts: Mapping[str, Any]) -> None:
    """Write the state after `step` steps.

    Args:
        folder: the run folder of one model.
        step: number of steps done.
        identity: what the state depends on, from `state_identity`.
        parts: by name, objects with a `state_dict`.

    Raises:
        UserError: a parameter is not finite (a finite loss can still have had an infinite gradient).
    """
    for part in parts.values():
        if isinstance(part, nn.Module) and not all(bool(p.isfinite().all()) for p in part.parameters()):
            raise UserError(
                f"the parameters are not finite after step {step}",
                got=str(folder),
                hint="lower optim.base_lr, set optim.clip_norm, or train in fp32; the last saved state is intact",
            )
    write_state(state_path(folder, step), {"step": step, **identity.stated(), "parts": _states(parts)})


def _states(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in parts.items()}


def dump_state(path: Path, step: int, identity: Identity, parts: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write a state for a post-mortem, finite or not; `about` is plain values that describe the failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_state(path, {"step": step, **identity.stated(), "parts": _states(parts), "about": dict(about)})


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write digest and serialised state, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    write_bytes_atomic(path, hashlib.sha256(payload).digest() + payload)


def drop_states(folder: Path, first_step: int, but: int) -> None:
    """Remove the states after `first_step`, except that of step `but`.

    A run that resumed from `first_step` could not use them: they are damaged, or older than a start from scratch, or
    another student has none of the same step.
    """
    for step, path in _numbered(folder).items():
        if step > first_step and step != but:
            path.unlink(missing_ok=True)
    if first_step == 0:
        (folder / OLD_NAME).unlink(missing_ok=True)


def prune_states(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest states, and files that a kill left half written."""
    for path in _newest_first(folder)[keep:]:
        path.unlink(missing_ok=True)
    for path in folder.glob(f"state-*{PARTIAL_SUFFIX}"):
        path.unlink(missing_ok=True)


def _numbered(folder: Path) -> dict[int, Path]:
    """The states of a run folder by step, newest first."""
    matches = ((re.fullmatch(r"state-(\d+)\.pt", path.name), path) for path in folder.glob("state-*.pt"))
    return dict(sorted(((int(match[1]), path) for match, path in matches if match), reverse=True))


def _newest_first(folder: Path) -> list[Path]:
    """All states of a run folder; `OLD_NAME` counts as the oldest."""
    return [*_numbered(folder).values(), *(path for path in (folder / OLD_NAME,) if path.exists())]


def _candidates(folders: Sequence[Path]) -> Iterator[list[Path]]:
    """One state of every folder, all after the same step, newest first."""
    if len(folders) == 1:
        yield from ([path] for path in _newest_first(folders[0]))
        return
    numbered = [_numbered(folder) for folder in folders]
    for step in numbered[0]:
        if all(step in paths for paths in numbered):
            yield [paths[step] for paths in numbered]


def has_state(folder: Path) -> bool:
    """Whether a run folder holds a state, intact or not."""
    return bool(_newest_first(folder))


def newest_payloads(folders: Sequence[Path]) -> list[bytes] | None:
    """The newest intact states of one step that all `folders` have, serialised; None: there is no state.

    A damaged state causes a warning, and the one before is used.

    Raises:
        CheckpointError: there are states, and all of them are damaged.
    """
    first_error: CheckpointError | None = None
    for paths in _candidates(folders):
        try:
            return [_intact(path) for path in paths]
        except CheckpointError as error:
            first_error = first_error or error
            logger.info(f"warning: {error.what}; using the state before it, if there is one")
    if first_error is not None:
        raise first_error
    return None


def _intact(path: Path) -> bytes:
    raw = path.read_bytes()
    if hashlib.sha256(raw[_DIGEST_BYTES:]).digest() != raw[:_DIGEST_BYTES]:
        raise CheckpointError(f"{path} is damaged (its digest differs)", hint="remove it to start from step 0")
    return raw[_DIGEST_BYTES:]


def _decoded(payload: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """A run folder's newest intact state, on the CPU: {"step", "identity", "fields", "parts": {name: state dict}}.

    Raises:
        CheckpointError: there is none, or all are damaged.
    """
    payloads = newest_payloads([folder])
    if payloads is None:
        raise no_state(folder)
    return _decoded(payloads[0])


def load_states(
    folders: Sequence[Path],
    identities: Sequence[Identity],
    parts: Sequence[Mapping[str, Any]],
    ranks: Ranks | None = None,
) -> int:
    """Restore the parts of one or more models in place.

    Args:
        folders: each model's run folder.
        identities: each model's `state_identity`.
        parts: each model's parts, as in `save_state`.
        ranks: the ranks of the run; None: this process alone.

    Returns:
        number of steps done, the same for all models; 0 without a state.

    Raises:
        CheckpointError: all states are damaged, or one belongs to another recipe.
    """
    ranks = ranks or Ranks()
    # Rank 0 alone reads: others may not see its folder, or find another state there.
    found = newest_payloads(folders) if ranks.first else None
    payloads = [ranks.from_first(found[number] if found else None) for number in range(len(folders))]
    step = 0
    for folder, identity, own, payload in zip(folders, identities, parts, payloads, strict=True):
        if payload is None:
            return 0
        state = _decoded(payload)
        identity.require(
            state,
            f"the state in {folder} belongs to another recipe or other data",
            f"compare with {folder}/recipe.yaml, which made it; use another run.folder, or checkpoint.resume=false to "
            "start again",
        )
        for name, part in own.items():
            part.load_state_dict(state["parts"][name])
        step = int(state["step"])
    return step
