"""InternVL's dynamic tiling: one image becomes a grid of square tiles and a thumbnail."""

import numpy as np
import torch
from PIL import Image

from dreamprm_dist.data.images import decode_image
from dreamprm_dist.prm.grid import num_tiles, tile_grid

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def image_tiles(data: bytes, max_tiles: int, tile_size: int = 448) -> torch.Tensor:
    """Decode an image and cut it into normalised tiles.

    Args:
        data: an encoded image, of which `data.images.decode_image` gives the picture.

    Returns:
        float32 tensor of shape (tiles, 3, tile_size, tile_size): the grid row by row, then the
        thumbnail.

    Raises:
        RecordError: as `decode_image`; not where the image was checked when it was sharded.
    """
    image = decode_image(data)
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
