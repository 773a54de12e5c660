"""The base of all sections: frozen, typed, unknown keys refused, all problems reported at once.

Each field's `description` is its documentation: `tinymim recipes --fields STAGE` prints it, and `docs/recipes.md` is
generated from it. Defaults are TinyMIM's (Ren et al., CVPR 2023) if it has one.
"""

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, defaults checked like given values."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, defer_build=True, allow_inf_nan=False)

    @classmethod
    def choice(cls) -> dict[str, str]:
        """The values that select this section among possible ones: `kind`, and `name` unless `kind` implies it."""
        fields = {name: cls.model_fields.get(name) for name in ("kind", "name")}
        single = {n: f for n, f in fields.items() if f is not None and get_origin(f.annotation) is Literal}
        found = {n: f for n, f in single.items() if len(get_args(f.annotation)) == 1}
        return {
            name: get_args(field.annotation)[0]
            for name, field in found.items()
            if name == "kind" or field.is_required() or "kind" not in found
        }


def sections_in(annotation: Any) -> list[type[Section]]:
    """The section classes that an annotation names, in order."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [kind for inner in get_args(annotation) for kind in sections_in(inner)]
