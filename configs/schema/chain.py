"""The recipe of `chain`."""

from typing import Literal

from pydantic import Field

from tinymim.configs.sections import words
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.values import Folder


class ChainStep(Section):
    """One command of a chain."""

    stage: Literal["pretrain-mae", "pretrain", "cache-teacher", "train-student", "finetune"] = Field(
        description="Command to run."
    )
    recipe: Folder = Field(description="A file, or the name of a shipped recipe.")
    set: tuple[str, ...] = Field(default=(), description="`--set` values for this step, applied after the chain's own.")


class ChainRecipe(Section):
    """`tinymim chain`: run commands one after another; a student may become the next teacher.

    All recipes are read and checked before the first command starts. The same command resumes a stopped chain.
    """

    stage: Literal["chain"] = Field(description=words.STAGE)
    steps: tuple[ChainStep, ...] = Field(min_length=1, description="Commands in order.")
    set: tuple[str, ...] = Field(default=(), description="`--set` values for every step: `source.shards=shards/mine`.")
