"""InternVL's dynamic tiling: one image becomes a grid of square tiles and a thumbnail.

The grid follows `dynamic_preprocess` of InternVL (Chen et al., arXiv:2404.16821).
"""

import io
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@lru_cache
def _candidate_grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with at most `max_tiles` cells, fewest cells first."""
    # The order among grids of equal size decides ties; it is that of the reference, which sorts
    # a set of pairs built in this order by their product.
    grids = {
        (columns, rows)
        for n in range(1, max_tiles + 1)
        for columns in range(1, n + 1)
        for rows in range(1, n + 1)
        if columns * rows <= max_tiles
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def tile_grid(width: int, height: int, max_tiles: int, tile_size: int = 448) -> tuple[int, int]:
    """The grid whose aspect ratio is nearest to the image's.

    Among equally near grids the larger one wins when the image has more than half its pixels.

    Args:
        width, height: image size in pixels.
        max_tiles: most tiles in the grid, thumbnail not counted.
        tile_size: side of a tile in pixels.

    Returns:
        (columns, rows).
    """
    if width < 1 or height < 1 or max_tiles < 1:
        raise ValueError(
            f"cannot tile an image of {width} x {height} pixels into at most {max_tiles} tiles: "
            "all three must be at least 1"
        )
    aspect = width / height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in _candidate_grids(max_tiles):
        difference = abs(aspect - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif (
            difference == best_difference
            and width * height > 0.5 * tile_size * tile_size * columns * rows
        ):
            best = (columns, rows)
    return best


def num_tiles(width: int, height: int, max_tiles: int, tile_size: int = 448) -> int:
    """Tiles of an image, the thumbnail included (there is one when the grid has several tiles)."""
    columns, rows = tile_grid(width, height, max_tiles, tile_size)
    return columns * rows + (columns * rows > 1)


def image_tiles(data: bytes, max_tiles: int, tile_size: int = 448) -> torch.Tensor:
    """Decode an image and cut it into normalised tiles.

    Args:
        data: an encoded image, checked when it was sharded (`data.schema.check_image`).

    Returns:
        float32 tensor of shape (tiles, 3, tile_size, tile_size): the grid row by row, then the
        thumbnail.
    """
    image = Image.open(io.BytesIO(data)).convert("RGB")
    columns, rows = tile_grid(*image.size, max_tiles, tile_size)
    canvas = image.resize((columns * tile_size, rows * tile_size), Image.Resampling.BICUBIC)
    grid = np.asarray(canvas).reshape(rows, tile_size, columns, tile_size, 3)
    tiles = grid.transpose(0, 2, 1, 3, 4).reshape(-1, tile_size, tile_size, 3)
    if columns * rows > 1:
        thumbnail = image.resize((tile_size, tile_size), Image.Resampling.BICUBIC)
        tiles = np.concatenate([tiles, np.asarray(thumbnail)[None]])
    scaled = (tiles.astype(np.float32) / 255 - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))
