"""The process reward model: chat format, image tiling, model."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dreamprm_dist.prm.chat import EncodedConversation, encode_conversation
    from dreamprm_dist.prm.grid import tile_grid

__all__ = ["EncodedConversation", "encode_conversation", "tile_grid"]


def __getattr__(name: str) -> object:
    # On first use: whoever only asks for the tiles of an image need not wait for torch.
    if name == "tile_grid":
        from dreamprm_dist.prm import grid

        return grid.tile_grid
    if name in __all__:
        from dreamprm_dist.prm import chat

        return getattr(chat, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
