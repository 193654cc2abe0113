"""The process reward model: chat format, image tiling, model."""
