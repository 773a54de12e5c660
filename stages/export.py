"""`tinymim export`: a run's weights in the layout of MAE and TinyMIM."""

from pathlib import Path
from typing import Any

from tinymim.configs.errors import CheckpointError, UserError
from tinymim.models.checkpoints import count_blocks, read_checkpoint, to_official
from tinymim.models.files import WeightsFile, weights_file
from tinymim.models.heads import stated_heads
from tinymim.stages.run.folder import ENCODER_NAME, PROJECTOR_NAME, STUDENT_NAME
from tinymim.stages.run.progress import logger
from tinymim.storage.atomic import write_bytes_atomic

# Heads by width in the fine-tuning code of MAE and TinyMIM; a checkpoint does not state its number of heads.
_THEIR_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


def run(source: Path, target: Path) -> dict[str, Any]:
    """Write the weights in `source`, a run folder or a file, to `target`, a new `.pth`.

    Returns:
        file, source, tensors, embed_dim, depth, and num_heads (None where the source does not state it); projector, the
        file beside `target`, where the student has kept its projector.

    Raises:
        CheckpointError: there are no weights, they cannot be read, or they do not fit the layout.
        UserError: `target` exists or has another suffix.
    """
    weights = _weights(source)
    if target.suffix != ".pth":
        raise UserError("MAE and TinyMIM read .pth files only", got=target, expected="FILE.pth")
    if target.exists():
        raise UserError(f"{target} exists", hint="remove it, or give another name")
    tensors, metadata = read_checkpoint(*weights)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(target, to_official(tensors, metadata))
    width, heads = tensors["cls_token"].shape[-1], stated_heads(metadata)
    theirs = _THEIR_HEADS.get(width)
    if None not in (heads, theirs) and heads != theirs:
        logger.info(f"export: warning: this model has {heads} heads; MAE and TinyMIM have {theirs} at width {width}")
    found: dict[str, Any] = {"embed_dim": width, "depth": count_blocks(tensors), "num_heads": heads}
    projector = weights.path.with_suffix("") / PROJECTOR_NAME
    if projector.is_file():
        beside = target.with_name(f"{target.stem}-{PROJECTOR_NAME}")
        write_bytes_atomic(beside, projector.read_bytes())
        found["projector"] = str(beside)
    return {"file": str(target), "source": str(weights.path), "tensors": len(tensors)} | found


def _weights(source: Path) -> WeightsFile:
    if not source.is_dir():
        return weights_file(str(source))
    for name in (STUDENT_NAME, ENCODER_NAME):
        if (source / name).is_file():
            return WeightsFile(source / name)
    below = sorted(path.parent.name for path in source.glob(f"*/{STUDENT_NAME}"))
    raise CheckpointError(
        f"{source} holds no finished weights",
        expected=f"{STUDENT_NAME} or {ENCODER_NAME}",
        hint=f"name one of its folders: {', '.join(below)}" if below else "let the run come to its end",
    )
