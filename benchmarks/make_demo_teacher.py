"""Make the demo's teacher again: draw its images, run the recipe `demo-teacher`, pack the encoder as fp16.

    python benchmarks/make_demo_teacher.py runs/demo-teacher/encoder.safetensors     # packs what a run has made
    python benchmarks/make_demo_teacher.py                                           # draws and trains first

Writes models/weights/demo-teacher.safetensors and demo-teacher.metrics.jsonl beside it.
"""

import shutil
import sys
from pathlib import Path

from tinymim.configs.load import load_recipe
from tinymim.configs.schema.pretrain import PretrainMaeRecipe
from tinymim.models.checkpoints import read_checkpoint, to_safetensors
from tinymim.stages import make_shards, pretrain
from tinymim.stages.run.folder import ENCODER_NAME, METRICS_NAME
from tinymim.storage.atomic import write_bytes_atomic

WEIGHTS = Path(__file__).parent.parent / "models" / "weights"


def main() -> None:
    """Draw, train, pack; the first two only where no encoder is named."""
    if len(sys.argv) > 1:
        encoder = Path(sys.argv[1])
    else:
        recipe = load_recipe(Path("demo-teacher"), "pretrain-mae")
        assert isinstance(recipe, PretrainMaeRecipe)
        shards = Path(recipe.source.shards)
        if not (shards / "index.json").exists():
            make_shards.run("drawn", shards, make_shards.Options(count=10_000, seed=1))
        pretrain.run(recipe)
        encoder = recipe.run.folder / ENCODER_NAME
    packed = to_safetensors(*read_checkpoint(encoder), half=True)
    write_bytes_atomic(WEIGHTS / "demo-teacher.safetensors", packed)
    shutil.copyfile(encoder.parent / METRICS_NAME, WEIGHTS / "demo-teacher.metrics.jsonl")
    print(f"{WEIGHTS / 'demo-teacher.safetensors'}: {len(packed):,} bytes")


if __name__ == "__main__":
    main()
