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
        metrics: rows of `metrics.jsonl`, one per iteration; NaN where a value is no number; may be
            empty.
        config: `config.yaml`; may be empty.
        weights: final weights by sample ID; empty for a run without any.
        exported: whether the run came to its end.
    """

    name: str
    metrics: pd.DataFrame
    config: dict
    weights: np.ndarray
    exported: bool

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a run folder; InputError where a file of it is not what it should be."""
        return cls(
            folder.resolve().name,
            _metrics(folder / "metrics.jsonl"),
            read_yaml(folder / "config.yaml"),
            _weights(folder / "export" / "instance_weights.parquet"),
            (folder / "export").is_dir(),
        )

    def missing(self) -> list[str]:
        """What a finished run has and this one has not, in sentences."""
        found = []
        last = int(self.metrics["iteration"].max()) if len(self.metrics) else 0
        if not last:
            found.append("no metrics: no iteration was finished")
        if not self.exported:
            end = f" of {total}" if (total := self.config.get("iteration_num")) else ""
            found.append(f"unfinished, at iteration {last}{end}: no export, no final weights")
        for column in ("lower_loss", "meta_loss"):
            # Both stand in every row of a run that has them at all.
            if rows := int(self.metrics[column].isna().sum()) if column in self.metrics else 0:
                found.append(f"{column} is no number in {rows:,} of {len(self.metrics):,} rows")
        if rows := int((~np.isfinite(self.weights)).sum()):
            found.append(f"{rows:,} of {len(self.weights):,} weights are no numbers")
        return [f"{self.name}: {sentence}." for sentence in found]

    def curve(self, *columns: str) -> pd.DataFrame:
        """`iteration` and `columns`; of a long run the means of neighbouring rows."""
        rows = self.metrics[["iteration", *columns]].dropna()
        return rows.groupby(np.arange(len(rows)) // math.ceil(len(rows) / MOST_POINTS or 1)).mean()

    def has(self, *columns: str) -> bool:
        """Whether there is a row with numbers in all columns."""
        return {*columns} <= {*self.metrics} and bool(
            self.metrics[[*columns]].notna().all(axis=1).any()
        )

    def seconds(self, phase: str) -> float:
        """Mean of an iteration; a row holds those of all iterations since the row before."""
        column = f"seconds_{phase}"
        if not self.has(column):
            return 0.0
        return self.metrics[column].sum() / max(1, self.metrics["iteration"].max())


def _metrics(path: Path) -> pd.DataFrame:
    rows: dict[int, dict] = {}
    number = 0
    try:
        for text in whole_lines(path) if path.exists() else []:
            number += 1
            row = json.loads(text)
            rows[int(row["iteration"])] = row  # a resumed run writes some iterations again
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); restore it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}, line {number}: no metrics of an iteration ({error!r}); remove the line"
        ) from error
    metrics = pd.DataFrame(rows.values())
    return metrics.apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan)


def read_yaml(path: Path) -> dict:
    """The settings in a YAML file, none without such a file; InputError where it is not YAML."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return config if isinstance(config, dict) else {}


def _weights(path: Path) -> np.ndarray:
    if not path.exists():
        return np.empty(0)
    try:
        return pd.read_parquet(path).sort_values("sample_id")["weight"].to_numpy(dtype=float)
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
        raise InputError(f"{path} is no table of weights ({error}); export again") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file, None without such a file; InputError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
