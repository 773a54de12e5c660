"""`tinymim export`: a run's weights for the code of MAE and TinyMIM, timm, torch.export, ONNX or Transformers."""

import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from tinymim.configs.errors import CheckpointError, InternalError, UserError
from tinymim.models.checkpoints import count_blocks, read_checkpoint, to_official
from tinymim.models.files import WeightsFile, weights_file
from tinymim.models.heads import stated_heads
from tinymim.models.runtimes import (
    Forward,
    Trained,
    load_trained,
    to_graph,
    to_onnx,
    to_torch_export,
    to_transformers,
)
from tinymim.stages.run.folder import BEST_NAME, ENCODER_NAME, PROJECTOR_NAME, STUDENT_NAME
from tinymim.stages.run.progress import logger
from tinymim.storage.atomic import write_bytes_atomic

Format = Literal["mae", "timm", "onnx", "torch-export", "transformers"]
_SUFFIXES: Final = {"mae": ".pth", "timm": "", "onnx": ".onnx", "torch-export": ".pt2", "transformers": ""}
INSIDE_NAME: Final = "model.safetensors"  # of a folder for timm
MOST_DIFFERENCE: Final = 1e-3  # of a runtime's answers from timm's, relative to the largest

# Heads by width in the fine-tuning code of MAE and TinyMIM; a checkpoint does not state its number of heads.
_THEIR_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


def run(source: str | Path, target: str | Path, to: Format = "mae") -> dict[str, Any]:
    """Write trained weights for other code.

    Every format but `mae` is loaded again by its runtime, if that is installed, and compared with timm.

    Args:
        source: a run folder with finished weights, a weights file, or a folder for timm.
        target: a new file or folder.
        to: the format, `mae`, `timm`, `onnx`, `torch-export` or `transformers`.

    Returns:
        For `mae`: file, source, tensors, embed_dim, depth, and num_heads (None where the source does not state it);
        projector, the file beside `target`, where the student has kept its projector. For the others: file, source,
        mean, std, img_size, and max_difference, the largest from timm's answers (None where the runtime is absent);
        for graphs also dynamic, what of the input may vary.

    Raises:
        CheckpointError: there are no weights, they cannot be read, or they do not fit the format.
        UserError: `target` exists or has another suffix, or a package is missing.
        InternalError: the exported model answers otherwise than timm.
    """
    source, target, suffix = Path(source), Path(target), _SUFFIXES[to]
    if suffix and target.suffix != suffix:
        raise UserError(f"{to} reads {suffix} files only", got=target, expected=f"FILE{suffix}")
    if target.exists():
        raise UserError(f"{target} exists", hint="remove it, or give another name")
    if to == "mae":
        return _to_mae(_weights(source), target)
    return _to_runtime(_weights(source), target, to)


def _to_runtime(weights: WeightsFile, target: Path, to: Format) -> dict[str, Any]:
    # A file inside such a folder is the folder's; beside a file of a run lies the folder of its name.
    folder = weights.path.parent if weights.path.name == INSIDE_NAME else weights.path.with_suffix("")
    trained = load_trained(folder)
    tensors, metadata = read_checkpoint(*weights)
    found: dict[str, Any] = {}
    target.parent.mkdir(parents=True, exist_ok=True)
    if to == "timm":
        _write_folder(target, {name: (folder / name).read_bytes() for name in ("config.json", INSIDE_NAME)})
    elif to == "transformers":
        _write_folder(target, to_transformers(trained, tensors, metadata))
    else:
        graph = to_graph(trained)
        write_bytes_atomic(target, (to_onnx if to == "onnx" else to_torch_export)(graph, trained))
        found["dynamic"] = graph.dynamic
    found["max_difference"] = _difference(trained, target, to)
    about = {"mean": trained.mean, "std": trained.std, "img_size": trained.size}
    return {"file": str(target), "source": str(weights.path)} | about | found


def _write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    target.mkdir(parents=True)
    for name, data in files.items():
        write_bytes_atomic(target / name, data)


def _difference(trained: Trained, target: Path, to: Format) -> float | None:
    """The largest difference of the exported model's answers from timm's, for noise; None: no runtime to compare with.

    Raises:
        InternalError: it is more than rounding makes.
    """
    answer = answers(target, to)
    if answer is None:
        logger.info(f"export: {target} was not compared with timm, because the packages of {to} are not installed")
        return None
    size = trained.size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = Forward(trained.model)(images)
    difference = float((answer(images) - wanted).abs().max())
    most = MOST_DIFFERENCE * max(1.0, float(wanted.abs().max()))
    if not difference <= most:
        raise InternalError(
            f"the exported model {target} answers otherwise than timm's", got=difference, expected=f"at most {most:.1e}"
        )
    return difference


def answers(target: Path, to: Format) -> Callable[[Tensor], Tensor] | None:
    """An exported model, loaded by its runtime, as a function of normalised images; None: the runtime is absent."""
    if to == "timm":
        model = Forward(load_trained(target).model)
        return lambda images: model(images).detach()
    if to == "torch-export":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(target).module()
        return lambda images: program(images).detach()
    if to == "onnx":
        if find_spec("onnxruntime") is None:
            return None
        import onnxruntime

        session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    assert to == "transformers", "the layout of MAE has no runtime but our own"
    if find_spec("transformers") is None:
        return None
    from transformers import ViTModel

    vit = ViTModel.from_pretrained(target, add_pooling_layer=False, local_files_only=True).eval()
    return lambda images: vit(images).last_hidden_state.detach()


def _to_mae(weights: WeightsFile, target: Path) -> dict[str, Any]:
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
    for name in (STUDENT_NAME, ENCODER_NAME, BEST_NAME, INSIDE_NAME):
        if (source / name).is_file():
            return WeightsFile(source / name)
    below = sorted(path.parent.name for path in source.glob(f"*/{STUDENT_NAME}"))
    raise CheckpointError(
        f"{source} holds no finished weights",
        expected=f"{STUDENT_NAME}, {ENCODER_NAME} or {BEST_NAME}",
        hint=f"name one of its folders: {', '.join(below)}" if below else "let the run come to its end",
    )
