"""What the commands that score with a PRM are told about it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dreamprm_dist.api import PRM
from dreamprm_dist.config import flag


@dataclass
class ScoringConfig:
    """How a PRM reads and scores; commands add flags of their own."""

    max_patch_num: int = flag(12, "Most tiles of an image, thumbnail not counted.")
    score_over: Literal["vocabulary", "pair"] = flag(
        "vocabulary", "Softmax over all words, or over + and - alone as VisualPRM does."
    )
    precision: Literal["bf16", "fp32"] = flag("bf16", "Parameters and activations.")
    device: Literal["auto", "cuda", "cpu"] = flag("auto", "auto: cuda where there is one.")

    def __post_init__(self) -> None:
        if self.max_patch_num < 1:
            raise ValueError(f"max_patch_num is {self.max_patch_num}; it must be at least 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch sees no GPU; use --device cpu")

    def load(self, model: str) -> PRM:
        """The PRM of a local folder or a hub name; ValueError as `PRM.from_pretrained`."""
        return PRM.from_pretrained(
            model,
            precision=self.precision,
            device=None if self.device == "auto" else self.device,
            max_patch_num=self.max_patch_num,
            score_over=self.score_over,
        )


def prm_name(model: str) -> str:
    """What a PRM is called: a run's `export` folder as its run, anything else by its own name."""
    path = Path(model).absolute()  # the name of "." is empty
    return path.resolve().parent.name if path.name == "export" else path.name
