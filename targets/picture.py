"""Lines of a target's picture, for the kinds: rows of maps at selective patches, colours of vectors, bars.

What a record does not hold is nan. Shapes: H head, T token, N vector of a view, C width.
"""

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from tinymim.configs.taps import Shapes
from tinymim.targets.contract import PictureLine

_MOST_BARS = 12


def written_out(values: Float[Tensor, "... Q C"], index: Int64[Tensor, "... Q"] | None, count: int) -> Tensor:
    """Rows [..., count, C] with `values` at the places of `index`, and nan elsewhere; `index` None: as they are."""
    if index is None:
        return values
    whole = values.new_full((*values.shape[:-2], count, values.shape[-1]), torch.nan)
    return whole.scatter(-2, index[..., None].expand(values.shape), values)


def query_lines(
    maps: Mapping[str, Mapping[str, Float[Tensor, "H T T"]]],
    prefix: int,
    grid: tuple[int, int],
    lines: int,
    shares: Callable[[Tensor], Tensor] = torch.nan_to_num,
    own_scale: Collection[str] = (),
) -> list[PictureLine]:
    """The most selective rows that all columns hold, each of another head.

    Args:
        maps: by group and column, the rows of one view.
        prefix: number of tokens before the patches; they are not shown.
        grid: rows and columns of patches.
        lines: most lines; a single head gives several.
        shares: turns rows into shares that sum to one; the row of least entropy is the most selective.
        own_scale: see `PictureLine`.
    """
    lead = _lead({column: [rows[column] for rows in maps.values()] for column in next(iter(maps.values()))})
    held = torch.stack([~rows.isnan().all(-1) for group in maps.values() for rows in group.values()]).all(0)
    held[:, :prefix] = False
    entropy = torch.stack([torch.special.entr(shares(group[lead])).sum(-1) for group in maps.values()]).sum(0)
    entropy = entropy.masked_fill(~held, torch.inf)
    heads = len(entropy)
    found = []
    for head, query in _most_selective(entropy, lines):
        place = divmod(query - prefix, grid[1])
        panels = {
            group: {column: rows[head, query, prefix:].reshape(grid) for column, rows in columns.items()}
            for group, columns in maps.items()
        }
        title = f"head {head + 1}" if heads > 1 else f"patch {place[0] + 1}, {place[1] + 1}"
        found.append(PictureLine(title, place, panels, frozenset(own_scale)))
    return found


def _most_selective(entropy: Float[Tensor, "H T"], lines: int) -> list[tuple[int, int]]:
    """(head, query) of least entropy: one of each head, or several of the only one."""
    if len(entropy) == 1:
        order = entropy[0].argsort(stable=True)[:lines].tolist()
        return [(0, query) for query in order if entropy[0, query] < torch.inf]
    least, query = entropy.min(dim=1)
    heads = [head for head in least.argsort().tolist() if least[head] < torch.inf]
    return [(head, int(query[head])) for head in heads[:lines]]


def logit_shares(rows: Tensor, temperature: float = 1.0) -> Tensor:
    """Softmax over the entries that are not nan."""
    return rows.masked_fill(rows.isnan(), -torch.inf).div(temperature).softmax(-1)


def colour_line(group: str, vectors: Mapping[str, Float[Tensor, "N C"]], shapes: Shapes, unit: bool) -> PictureLine:
    """Vectors of the patches as colours: their first three principal components, those of the first whole column.

    Args:
        group: the title.
        vectors: by column, all vectors of one view.
        shapes: the teacher's shapes.
        unit: whether the lengths of the vectors have no meaning.
    """
    given = {column: normalize(each.double(), dim=-1) if unit else each.double() for column, each in vectors.items()}
    lead = given[_lead({column: [each] for column, each in given.items()})]
    lead = lead[~lead.isnan().any(-1)]
    mean = lead.mean(0)
    _, axes = torch.linalg.eigh((lead - mean).T @ (lead - mean))
    axes = axes[:, -3:].flip(-1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # an axis has no sign of its own
    shown = (lead - mean) @ axes
    low, high = shown.amin(0), shown.amax(0)
    width = (high - low).clamp(min=torch.finfo(torch.float32).tiny)
    panels = {column: (((each - mean) @ axes - low) / width).clamp(0, 1) for column, each in given.items()}
    maps = {column: each.reshape(*shapes.grid, -1).float() for column, each in panels.items()}
    return PictureLine("first 3 components", None, {group: maps})


def bar_line(group: str, values: Mapping[str, Float[Tensor, " N"]]) -> PictureLine:
    """The components of one vector, as bars."""
    return PictureLine("components", None, {group: dict(values)})


def class_line(group: str, shares: Mapping[str, Float[Tensor, " N"]], leads: Iterable[str]) -> PictureLine:
    """The largest shares of the first of `leads` that is a column, or of the first column, as bars."""
    lead = next((column for column in leads if column in shares), next(iter(shares)))
    top = shares[lead].topk(min(_MOST_BARS, len(shares[lead]))).indices
    labels = tuple(map(str, top.tolist()))
    panels = {group: {column: each[top] for column, each in shares.items()}}
    return PictureLine("largest", None, panels, labels=labels)


def _lead(columns: Mapping[str, list[Tensor]]) -> str:
    """The first column without nan, or the first one."""
    whole = (name for name, each in columns.items() if not any(values.isnan().any() for values in each))
    return next(whole, next(iter(columns)))
