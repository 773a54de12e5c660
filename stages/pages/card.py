"""The cards of a packed cache and of a trained model: pages for a model hub, with the front matter that hubs read."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tinymim.stages.pages.numbers import format_bytes, format_value, view_law
from tinymim.stages.pages.tables import markdown_table

# Names that hubs know, by what teachers call their licences.
_LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "bsd-3-clause"}

UNKNOWN: Final = "unknown"


def licence(teacher: Mapping[str, Any]) -> str:
    """The licence of a teacher's weights, from its description; older caches and runs do not state it."""
    return str(teacher.get("license") or UNKNOWN)


def card(info: Mapping[str, Any], images_licence: str | None = None) -> str:
    """The card in Markdown.

    Args:
        info: the description of the cache (`stages/cache/info.py`).
        images_licence: the licence of the images, as its user states it.
    """
    targets = [layer for layer in info["layers"] if "teacher" in layer]
    licenses = sorted({licence(layer["teacher"]) for layer in targets})
    teachers = sorted({layer["teacher"]["name"] for layer in targets})
    front = [
        "---",
        *_license_lines(licenses),
        "task_categories:",
        "- image-feature-extraction",
        "tags:",
        "- tinymim",
        "- distillation",
        *(f"- {_quoted(name)}" for name in teachers),
        "---",
    ]
    views = info["layers"][0]["coverage"]
    lines = [
        *front,
        "",
        f"# Targets of {', '.join(teachers) or 'no teacher yet'} for distillation",
        "",
        f"What a large vision teacher says about {views['most_views']} random views of each of "
        f"{info['num_images']:,} images, in {format_bytes(info['bytes'])}. tinymim trains small students on it without "
        "the teacher. It holds no images: you need the same source shards, which every view is checked against.",
        "",
        "| layer | teacher | taps | codec | views | records | bytes a view | size |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for layer in targets:
        coverage = layer["coverage"]
        cells = [
            layer["name"],
            layer["teacher"]["name"],
            ", ".join(layer["target"]["taps"]),
            f"{layer['target']['name']} {layer['target']['version']}",
            f"{coverage['most_views']}" + ("" if coverage["complete"] else ", partial"),
            f"{coverage['num_records']:,}",
            f"{layer['bytes_per_view']:,.1f}",
            format_bytes(layer["bytes"]),
        ]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    lines += [
        "",
        f"Views: {view_law(info['views'])}. Cache {info['spec_id']}, "
        f"format {info['format_version']}, {info['num_shards']:,} shards.",
        "",
        "## Teachers and licences",
        "",
    ]
    for layer in targets:
        teacher = layer["teacher"]
        lines.append(
            f"- `{layer['name']}`: {_cell(teacher['name'])}, weights {_cell(teacher['weights_origin'])} "
            f"(sha256 {teacher['weights_sha256'][:16]}), licence **{_cell(licence(teacher))}**, "
            f"{teacher['precision']}"
        )
    stated = f"**{_cell(images_licence)}**" if images_licence else "not stated"
    lines += [f"- images (not included): licence {stated}"]
    lines += ["", "The licence of a teacher's weights may bind what is made from them, this cache included.", ""]
    lines += _fidelity(targets)
    name = targets[0]["name"] if targets else "LAYER"
    lines += [
        "## Train from it",
        "",
        "    tinymim cache verify THIS_FOLDER          # every byte",
        "    tinymim cache copy THIS_FOLDER cache      # unpack; resumes where it stopped",
        f"    tinymim train-student RECIPE --set cache=cache --set layer={name}",
        "",
        "Plain `tar` unpacks it as well: `for f in cache-*.tar; do tar -xf $f -C cache; done`.",
        "",
    ]
    return "\n".join(lines)


def model_card(
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    teachers: Mapping[str, Any],
    licences: Sequence[str],
    metrics: Mapping[str, float],
) -> str:
    """The card of a trained model in Markdown.

    Args:
        config: the `config.json` beside its weights.
        metadata: the metadata of its weights.
        teachers: by layer, name, licence and digest of the teacher's weights; may be empty.
        licences: the licences of the teachers.
        metrics: the last line of the run's metrics; may be empty.
    """
    name = config.get("architecture") or config.get("factory") or "model"
    pixels = config.get("pretrained_cfg", config)
    lines = [
        "---",
        *_license_lines(licences),
        "library_name: timm",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        "- tinymim",
        "- timm",
        "---",
        "",
        f"# {_cell(name)}, made by {_cell(metadata.get('made_by', 'tinymim'))}",
        "",
        "    timm.create_model('hf-hub:OWNER/NAME', pretrained=True)",
        "",
        f"Pixels: mean {pixels.get('mean')}, std {pixels.get('std')}, for values in 0..1.",
        "",
        "## Teachers and licences",
        "",
        *(
            f"- layer `{_cell(layer)}`: {_cell(own.get('name'))} (sha256 {_cell(own.get('weights_sha256'))[:16]}), "
            f"licence **{_cell(licence(own))}**"
            for layer, own in teachers.items()
        ),
        *(
            []
            if teachers
            else [f"- licence of what it was made from: {_cell('; '.join(licences) or 'made from none')}"]
        ),
        "",
        f"Cache spec {_cell(metadata.get('cache_spec_id', 'none'))}, layers "
        f"{_cell(metadata.get('layer_spec_id', 'none'))}, {_cell(metadata.get('steps', 'unknown'))} steps.",
        "",
    ]
    if metrics:
        rows = [[_cell(name), format_value(value)] for name, value in metrics.items()]
        lines += ["## Last metrics", "", *markdown_table(["metric", "value"], rows), ""]
    if recipe := metadata.get("recipe"):
        lines += ["## Recipe", "", *(f"    {line}" for line in recipe.splitlines()), ""]
    return "\n".join(lines)


def _license_lines(licenses: Sequence[str]) -> list[str]:
    """The front matter of the licences: hubs know few names, the others are `other`."""
    known = licenses[0].lower() if len(licenses) == 1 and licenses[0].lower() in _LICENSES else "other"
    named = [f"license_name: {_quoted('; '.join(licenses))}"] if known == "other" and licenses else []
    return [f"license: {known}", *named]


def _fidelity(layers: list[Mapping[str, Any]]) -> list[str]:
    measured = [layer for layer in layers if layer["fidelity"]]
    if not measured:
        return []
    lines = [
        "## Fidelity",
        "",
        "Against dense targets; means over parts and units, as in `tinymim cache info`.",
    ]
    for layer in measured:
        rows = [[_cell(name), format_value(value)] for name, value in layer["fidelity"].items()]
        lines += ["", *markdown_table(["measure", _cell(layer["name"])], rows)]
    return [*lines, ""]


def _cell(value: object) -> str:
    """Foreign text inside Markdown: one line, without the signs of a table, of HTML or of a link."""
    text = "".join(char if char.isprintable() else " " for char in str(value))
    for sign in "\\|<>[]`*":
        text = text.replace(sign, f"\\{sign}")
    return text


def _quoted(text: str) -> str:
    """A YAML string."""
    return json.dumps(text)
