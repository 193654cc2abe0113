"""The content of a run folder, for a report."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from dreamprm_dist.errors import InputError
from dreamprm_dist.files import whole_lines

MOST_POINTS = 400  # of a curve; more would only make the page heavy


@dataclass
class Run:
    """A run folder, as far as it is there.

    Attributes:
        name: the folder's.
        metrics: rows of `metrics.jsonl`, one per iteration; may be empty.
        config: `config.yaml`; may be empty.
        weights: final weights by sample ID; empty for a run without any.
    """

    name: str
    metrics: pd.DataFrame
    config: dict
    weights: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> "Run":
        path = folder / "metrics.jsonl"
        lines = whole_lines(path) if path.exists() else []
        # A resumed run writes some iterations again.
        rows = {row["iteration"]: row for row in map(json.loads, lines)}
        config, weights = folder / "config.yaml", folder / "export" / "instance_weights.parquet"
        return cls(
            folder.resolve().name,
            pd.DataFrame(rows.values()),
            (yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else None) or {},
            pd.read_parquet(weights).sort_values("sample_id")["weight"].to_numpy()
            if weights.exists()
            else np.empty(0),
        )

    def curve(self, *columns: str) -> pd.DataFrame:
        """`iteration` and `columns`; of a long run the means of neighbouring rows."""
        rows = self.metrics[["iteration", *columns]].dropna()
        return rows.groupby(np.arange(len(rows)) // math.ceil(len(rows) / MOST_POINTS)).mean()

    def seconds(self, phase: str) -> float:
        """Mean of an iteration; a row holds those of all iterations since the row before."""
        column = f"seconds_{phase}"
        measured = column in self.metrics
        return self.metrics[column].sum() / self.metrics["iteration"].max() if measured else 0.0


def read_json(path: Path) -> Any:
    """The content of a JSON file, None without such a file; InputError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
