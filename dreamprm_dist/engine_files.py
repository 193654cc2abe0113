"""DeepSpeed's own checkpoint files."""

from __future__ import annotations

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine


class CheckpointWriter(TorchCheckpointEngine):
    """Notes that a file could not be written and goes on.

    DeepSpeed's ranks meet in barriers after their writes; one that left early would keep the others
    waiting.

    Attributes:
        error: of the last save; None when all was written.
    """

    error: Exception | None = None

    def save(self, state_dict: dict, path: str) -> None:
        try:
            # The older of torch's formats, whose error is the system's: "No space left on device".
            torch.save(state_dict, path, _use_new_zipfile_serialization=False)
        except (OSError, RuntimeError) as error:
            self.error = error
