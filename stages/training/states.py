"""Training states on disk: `state-STEP.pt`, each whole or absent, a digest in front, tensors and plain types only.

Every random draw of a training is a function of (seed, step, place), so a state holds no generator's state; the
schedule is a function of the step, and the order of samples likewise (`SampleOrder`).
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
from tinymim.stages.run.progress import say
from tinymim.stages.training.ranks import Ranks
from tinymim.storage.atomic import PARTIAL_SUFFIX, write_bytes_atomic

OLD_NAME = "state.pt"  # the one state of runs from before there were several; it still loads
_DIGEST_BYTES = 32


def state_path(folder: Path, step: int) -> Path:
    """Where the state after `step` steps lies."""
    return folder / f"state-{step:08d}.pt"


def save_state(folder: Path, step: int, identity: str, parts: Mapping[str, Any]) -> None:
    """Write the state after `step` steps of the recipe that `identity` is the digest of.

    Args:
        folder: the run folder of one model.
        step: steps done.
        identity: from `state_identity`.
        parts: by name, what has a `state_dict`.

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
    write_state(state_path(folder, step), {"step": step, "identity": identity, "parts": _states(parts)})


def _states(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in parts.items()}


def dump_state(path: Path, step: int, identity: str, parts: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write a state for a post-mortem, whatever is in it, with plain values `about` what happened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_state(path, {"step": step, "identity": identity, "parts": _states(parts), "about": dict(about)})


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Serialise with the digest in front, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    write_bytes_atomic(path, hashlib.sha256(payload).digest() + payload)


def drop_states(folder: Path, first_step: int, but: int) -> None:
    """Remove the states that the run which continues after `first_step` did not go on from, except that of `but`.

    They are damaged, of a run that is begun anew, or of one that another student could not follow.
    """
    for step, path in _numbered(folder).items():
        if step > first_step and step != but:
            path.unlink(missing_ok=True)
    if first_step == 0:
        (folder / OLD_NAME).unlink(missing_ok=True)


def prune_states(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest states, and what a kill in the middle of writing has left."""
    for path in _newest_first(folder)[keep:]:
        path.unlink(missing_ok=True)
    for path in folder.glob(f"state-*{PARTIAL_SUFFIX}"):
        path.unlink(missing_ok=True)


def _numbered(folder: Path) -> dict[int, Path]:
    """The states of a run folder by step, newest first."""
    matches = ((re.fullmatch(r"state-(\d+)\.pt", path.name), path) for path in folder.glob("state-*.pt"))
    return dict(sorted(((int(match[1]), path) for match, path in matches if match), reverse=True))


def _newest_first(folder: Path) -> list[Path]:
    """All states of a run folder; the one of an old run is the oldest."""
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


def newest_payloads(folders: Sequence[Path]) -> list[bytes] | None:
    """The newest states that are intact and after the same step in all `folders`, serialised; None: there is none.

    A damaged state is said aloud, and the one before is taken.

    Raises:
        CheckpointError: there are states, and all of them are damaged.
    """
    first_error: CheckpointError | None = None
    for paths in _candidates(folders):
        try:
            return [_intact(path) for path in paths]
        except CheckpointError as error:
            first_error = first_error or error
            say(f"warning: {error.what}; taking the state before it, if there is one")
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
    """A run folder's newest intact state, on the CPU: {"step", "identity", "parts": {name: state dict}}.

    Raises:
        CheckpointError: there is none, or all are damaged.
    """
    payloads = newest_payloads([folder])
    if payloads is None:
        raise no_state(folder)
    return _decoded(payloads[0])


def load_states(
    folders: Sequence[Path],
    identities: Sequence[str],
    parts: Sequence[Mapping[str, Any]],
    ranks: Ranks | None = None,
) -> int:
    """Restore the parts of one or more models in place; rank 0 reads, all ranks get the same.

    Args:
        folders: each model's run folder.
        identities: each model's `state_identity`.
        parts: each model's parts as they were saved.
        ranks: who trains together; None: this process alone.

    Returns:
        steps done, the same for all models; 0 where there is no state.

    Raises:
        CheckpointError: all states are damaged, or one belongs to another recipe.
    """
    ranks = ranks or Ranks()
    found = newest_payloads(folders) if ranks.first else None
    payloads = [ranks.from_first(found[number] if found else None) for number in range(len(folders))]
    step = 0
    for folder, identity, own, payload in zip(folders, identities, parts, payloads, strict=True):
        if payload is None:
            return 0
        state = _decoded(payload)
        if state["identity"] != identity:
            raise CheckpointError(
                f"the state in {folder} belongs to another recipe or other data",
                got=state["identity"],
                expected=identity,
                hint="use another run.folder, set checkpoint.resume=false, or restore the recipe",
            )
        for name, part in own.items():
            part.load_state_dict(state["parts"][name])
        step = int(state["step"])
    return step
