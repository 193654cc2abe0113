"""The process reward model: chat format, image tiling, model."""

from dreamprm_dist.prm.chat import EncodedConversation, encode_conversation
from dreamprm_dist.prm.tiling import tile_grid

__all__ = ["EncodedConversation", "encode_conversation", "tile_grid"]
