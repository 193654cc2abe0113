"""A distributed trainer for multimodal process reward models with learned instance weights.

    from dreamprm_dist import PRM

is the model as its users have it: loaded, and ready to score solutions.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dreamprm_dist.api import PRM, BestOfN

__version__ = "0.1.0"
__all__ = ["PRM", "BestOfN"]


def __getattr__(name: str) -> object:
    # On first use: whoever only reads records or shards need not wait for torch and transformers.
    if name in __all__:
        from dreamprm_dist import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
