"""The choice among the targets that a cache holds, and the losses on them."""

from typing import Literal

from pydantic import Field

from tinymim.configs.codecs.relations import Relations
from tinymim.configs.sections.base import Section
from tinymim.configs.sections.values import Weight, Width

VectorLoss = Literal["mse", "cosine", "smooth_l1", "l1"]
RelationLoss = Literal["kl", "mse", "cosine", "l1"]
FIRST_TARGETS = ("relations", "relation_heads", "rows")  # others are no part of a state's identity where they are off


class TargetsConfig(Section):
    """A choice among the targets that the cache holds, and what a student is compared by.

    A `hidden` cache rebuilds any relation with any number of heads and rows. A `dense` or `sketch` cache can leave
    relations out, and a `dense` one rows.
    """

    relations: Relations | None = Field(
        default=None, description="Relations to learn from. Default: the cache's; `qk` and `vv` of a `hidden` cache."
    )
    relation_heads: Width | None = Field(
        default=None, description="Heads of the relations. Default: the cache's; the teacher's of a `hidden` cache."
    )
    rows: Width | None = Field(
        default=None, description="Query rows per view, relation and head. Default: all that the cache holds."
    )
    loss: Literal[VectorLoss, RelationLoss] | None = Field(
        default=None,
        description="Loss of features, class embeddings and relations. Default: `mse`, `cosine` of class embeddings, "
        "`kl` of relations. `smooth_l1` and `l1` are biased with `dither`.",
    )
    before_softmax: bool = Field(
        default=False, description="Compare the logits of relations, by `mse` as default. Needs a `hidden` cache."
    )
    projector: Literal["linear", "mlp"] | None = Field(
        default=None, description="From the student's width to the teacher's, for features. Default: `linear`."
    )
    keep_projector: bool = Field(
        default=False, description="Write the trained projector beside the student's weights (docs/targets.md)."
    )
    temperature: float | None = Field(
        default=None,
        gt=0,
        description="Temperature of class logits in the loss, of teacher and student. Default: the codec's; `draws` "
        "takes no other.",
    )
    label_weight: Weight = Field(
        default=0.0, description="Weight of a cross entropy with the images' labels, beside class logits. 0: none."
    )
