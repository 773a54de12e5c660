"""The recipe of `fidelity`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tinymim.configs.codecs.kinds import CodecConfig
from tinymim.configs.codecs.targets import TargetsConfig
from tinymim.configs.sections import words
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.loader import LoaderConfig
from tinymim.configs.sections.models import ModelConfig, TeacherConfig
from tinymim.configs.sections.run import RunConfig
from tinymim.configs.sections.source import SourceConfig
from tinymim.configs.sections.values import LARGEST, Batch, Folder, Positive
from tinymim.configs.sections.views import ViewConfig

Title = Annotated[str, Field(min_length=1, max_length=100)]


class FidelityRecipe(Section):
    """`tinymim fidelity`: compare codecs by the gradients that they give a student, on the same views."""

    stage: Literal["fidelity"] = Field(description=words.STAGE)
    source: SourceConfig = Field(description=words.SOURCE)
    views: ViewConfig = Field(default=ViewConfig(), description=words.VIEWS)
    teacher: TeacherConfig = Field(description="Teacher and tapped block.")
    codecs: dict[Title, CodecConfig] = Field(description="Codecs to compare, each under a name of your choice.")
    targets: TargetsConfig = Field(
        default=TargetsConfig(), description="Targets that codecs are compared on; each takes its own fields."
    )
    student: ModelConfig = Field(description="Student whose gradient is compared.")
    student_state: Folder | None = Field(
        default=None, description="Run folder of `train-student`: also compare with this trained student."
    )
    num_images: int = Field(default=64, ge=4, le=LARGEST, description="Number of images, one view each.")
    draws: Positive = Field(default=2, description="Independent encodings of every view by a codec that draws.")
    batch_size: Batch = Field(default=16, description="Views per forward pass of the teacher.")
    loader: LoaderConfig = Field(default=LoaderConfig(), description=words.LOADER)
    run: RunConfig = Field(description=words.RUN)

    @model_validator(mode="after")
    def _some_codec(self) -> "FidelityRecipe":
        if not self.codecs:
            raise ValueError("codecs is empty: name at least one")
        return self
