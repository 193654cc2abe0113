"""The README names every flag with its default, every metric, and files that exist."""

import dataclasses
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from dreamprm_dist.training.config import TrainConfig, parse_train_config
from dreamprm_dist.training.metrics import FIELDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def flag_rows() -> list[str]:
    """A line for each flag, as the README must have it."""
    config = parse_train_config([])
    rows = []
    for part in dataclasses.fields(TrainConfig):
        section = getattr(config, part.name)
        hints = get_type_hints(type(section))
        rows.append(f"### {type(section)._argument_group_name.capitalize()}")
        for field in dataclasses.fields(section):
            default = getattr(section, field.name)
            text = field.metadata["help"].replace("%%", "%")
            if choices := get_args(hints[field.name]):
                names = [f"`{name}`" for name in choices if isinstance(name, str)]
                text += f" One of {', '.join(names)}." if names else ""
            rows.append(f"| `{field.name}` | `{default}` | {text} |")
    return rows


@pytest.mark.parametrize("row", flag_rows())
def test_every_flag_is_there_with_its_default(row: str):
    assert row in README.splitlines()


@pytest.mark.parametrize("name", FIELDS)
def test_every_metric_is_there(name: str):
    assert f"| `{name}` | {FIELDS[name]} |" in README.splitlines()


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(path: str):
    assert (ROOT / path).exists()
