"""InternVL's dynamic tiling: one image becomes a grid of square tiles and a thumbnail."""

import io

import numpy as np
import torch
from PIL import Image

from dreamprm_dist.prm.grid import num_tiles, tile_grid

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def image_tiles(data: bytes, max_tiles: int, tile_size: int = 448) -> torch.Tensor:
    """Decode an image and cut it into normalised tiles.

    Args:
        data: an encoded image, checked when it was sharded (`data.images.decode_image`).

    Returns:
        float32 tensor of shape (tiles, 3, tile_size, tile_size): the grid row by row, then the
        thumbnail.
    """
    image = Image.open(io.BytesIO(data)).convert("RGB")
    columns, rows = tile_grid(*image.size, max_tiles, tile_size)
    canvas = image.resize((columns * tile_size, rows * tile_size), Image.Resampling.BICUBIC)
    tiles = torch.empty(num_tiles(*image.size, max_tiles, tile_size), 3, tile_size, tile_size)
    count = columns * rows
    grid = torch.from_numpy(np.array(canvas)).view(rows, tile_size, columns, tile_size, 3)
    tiles[:count].view(rows, columns, 3, tile_size, tile_size).copy_(grid.permute(0, 2, 4, 1, 3))
    if count < len(tiles):
        thumbnail = image.resize((tile_size, tile_size), Image.Resampling.BICUBIC)
        tiles[count].copy_(torch.from_numpy(np.array(thumbnail)).permute(2, 0, 1))
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return tiles.div_(255).sub_(mean).div_(std)
