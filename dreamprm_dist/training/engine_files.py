"""DeepSpeed's own checkpoint files: noting a failed write, reading at another world size."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from pathlib import Path

import torch
from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal
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


def make_universal(folder: Path, scratch: Path) -> None:
    """DeepSpeed's universal checkpoint, which any number of ranks reads, of ZeRO 1 or 2 files.

    Args:
        folder: the files, which are pickles: verify them first.
        scratch: made anew; takes twice what the parameters and both moments do in float32.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    settings = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(scratch),
        # In this process: forking one that is in a process group is not safe.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal(settings)
