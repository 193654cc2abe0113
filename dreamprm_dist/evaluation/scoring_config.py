"""Flags of the commands that score with a PRM."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from dreamprm_dist import distributed
from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.scoring import AnyScorer
from dreamprm_dist.files import file_sha256
from dreamprm_dist.flags import AtLeastOne, Count, FlagGroup, flag
from dreamprm_dist.prm.model_folder import EXPORT, resolve_model

# Ranks finish at different times, for images have different sizes; less would end long work at its
# last barrier.
TIMEOUT_MINUTES = 12 * 60.0


@dataclass
class ScoringConfig(FlagGroup):
    """How a PRM reads and scores; commands add flags of their own."""

    max_patch_num: AtLeastOne = flag(12, "Most tiles of an image, thumbnail not counted.")
    score_over: Literal["vocabulary", "pair"] = flag(
        "vocabulary", "Softmax over all words, or over + and - alone as VisualPRM does."
    )
    precision: Literal["bf16", "fp32"] = flag("bf16", "Parameters and activations.")
    device: Literal["auto", "cuda", "cpu"] = flag("auto", "auto: cuda where there is one.")
    local_rank: int = flag(-1, "Set by launchers; the environment counts.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("device is cuda, but torch sees no GPU; use --device cpu")

    def load(
        self, kind: type[AnyScorer], model: str, device: torch.device | None = None
    ) -> AnyScorer:
        """The PRM of a local folder or a hub name; InputError as `Scorer.from_pretrained`."""
        return kind.from_pretrained(
            model,
            precision=self.precision,
            device=device or (None if self.device == "auto" else self.device),
            max_patch_num=self.max_patch_num,
            score_over=self.score_over,
        )

    def joined(self) -> AbstractContextManager[torch.device]:
        """Score as one of the ranks that a launcher has started; see `distributed.joined`."""
        return distributed.joined(self.device, TIMEOUT_MINUTES)

    def settings(
        self, models: Mapping[str, str], files: Mapping[str, str | None], device: torch.device
    ) -> dict:
        """All that scores depend on: flags, and whatever shows that models or files changed.

        Args:
            models: label -> local folder or hub name.
            files: flag -> the file that it names.
        """
        # Each PRM by itself: its scores stay good when another is taken in or left out.
        return {f"model {label}": [m, *_weights_state(m)] for label, m in models.items()} | {
            **{name: file and file_sha256(file) for name, file in files.items()},
            "max_patch_num": self.max_patch_num,
            "score_over": self.score_over,
            "precision": self.precision,
            "device": device.type,
        }


@dataclass
class FileScoringConfig(ScoringConfig):
    """Flags of the commands that score a file of questions."""

    limit: AtLeastOne | None = flag(None, "Only the first N records of the file.")
    dry_run: bool = flag(False, "Say what would be scored, and write nothing.")


@dataclass
class ComparisonConfig(FileScoringConfig):
    """Flags of the commands that compare PRMs on files, with intervals."""

    model: list[str] = field(
        default_factory=lambda: ["./weights/export"],
        metadata={"help": "PRMs: local folders, run folders or hub names, or label=folder."},
    )
    image_root: str | None = flag(
        None, "Folder that image paths start at (default: the file's own folder)."
    )
    seed: Count = flag(0, "Seed of the bootstrap.")


def _weights_state(model: str) -> list[list]:
    files = sorted(Path(resolve_model(model)).glob("*.safetensors"))
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def prm_name(model: str) -> str:
    """A PRM's name: of a run's `export` folder that of the run, of anything else its own."""
    path = Path(model).absolute()  # the name of "." is empty
    return path.resolve().parent.name if path.name == EXPORT else path.name
