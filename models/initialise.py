"""The initial state of a model: MAE's position table and weights, and one rate of stochastic depth.

Shapes: N patch, C channel.
"""

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from tinymim.configs.errors import RecipeError
from tinymim.models.backbone import PlainViT, positions


def sincos_table(dim: int, rows: int, columns: int, prefix: int) -> Tensor:
    """MAE's fixed 2-D position table, float32 [1, prefix + rows x columns, dim]; prefix rows are zero.

    The first half of the channels encodes the column, the second the row (the order of MAE's and TinyMIM's tables),
    each as sin, cos of position / 10000^(2i / (dim / 2)). Raises RecipeError unless 4 divides `dim`.
    """
    if dim % 4:
        raise RecipeError("a 2-D sine-cosine position table needs a width divisible by 4", got=dim)
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    parts = []
    for position in (x, y):
        angle = position.reshape(-1, 1) * omega
        parts += [angle.sin(), angle.cos()]
    table = torch.cat(parts, dim=1).to(torch.float32)
    return torch.cat([torch.zeros(prefix, dim), table])[None]


def initialise_linear(model: nn.Module) -> None:
    """Xavier-uniform weights and zero biases in all linear layers, as He et al. (2022); nothing else changes."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialise_like_mae(vit: PlainViT, table: Tensor | None) -> None:
    """Initialise like He et al. (2022): Xavier-uniform linear layers, `table` [1, prefix + N, C] as fixed positions.

    `table` is None for a model without a position table.
    """
    initialise_linear(vit)
    projection = vit.patch_embed.proj.weight
    nn.init.xavier_uniform_(projection.view(projection.shape[0], -1))
    if vit.cls_token is not None:
        nn.init.normal_(vit.cls_token, std=0.02)
    held = positions(vit)
    if table is None:
        return
    assert held is not None
    held.table.data.copy_(table)
    held.table.requires_grad_(False)


def set_drop_path(vit: PlainViT, rate: float) -> None:
    """Set stochastic depth to one rate in every block but the last, as TinyMIM does; timm's rate rises from 0."""
    for block in vit.blocks[:-1]:
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
    vit.blocks[-1].drop_path1, vit.blocks[-1].drop_path2 = nn.Identity(), nn.Identity()
