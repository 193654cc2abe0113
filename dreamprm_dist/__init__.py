"""A distributed trainer for multimodal process reward models with learned instance weights."""
