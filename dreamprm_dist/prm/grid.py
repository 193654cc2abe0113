"""The grid of tiles that an image is cut into, by its size alone.

The grid follows `dynamic_preprocess` of InternVL (Chen et al., arXiv:2404.16821).
"""

from fractions import Fraction
from functools import lru_cache
from math import ceil

from dreamprm_dist.errors import InputError


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
        raise InputError(
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


@lru_cache(maxsize=4096)
def usable_size(width: int, height: int, max_tiles: int, tile_size: int = 448) -> tuple[int, int]:
    """The smallest size that an image can be shrunk to without being enlarged when it is tiled.

    Holds for every number of tiles up to `max_tiles`, with the same grids as the image itself.

    Returns:
        (width, height) in pixels; the image's own where it has nothing to spare.
    """
    grids = [tile_grid(width, height, tiles, tile_size) for tiles in range(1, max_tiles + 1)]
    scale = max(
        max(Fraction(columns * tile_size, width), Fraction(rows * tile_size, height))
        for columns, rows in grids
    )
    if scale >= 1:
        return width, height
    size = ceil(width * scale), ceil(height * scale)
    # Rounding may move an aspect ratio across the border between two grids.
    same = grids == [tile_grid(*size, tiles, tile_size) for tiles in range(1, max_tiles + 1)]
    return size if same else (width, height)
