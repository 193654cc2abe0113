"""A PRM's folder: what the name of a model stands for, and which of its files hold its tensors."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dreamprm_dist.errors import InputError

logger = logging.getLogger(__name__)

# What a model's folder holds, and the folder of a run that is one.
CONFIG, CARD, EXPORT = "config.json", "README.md", "export"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_TEXT_FILES = ["*.json", "*.jinja", "*.txt", "*.model", CARD]
_MOST_NAMED = 3  # of files or tensors, in a message


def resolve_model(name_or_path: str) -> str:
    """The name of a model; of a run folder that of its export. Nothing is fetched.

    Raises:
        InputError: a local file or folder that holds no model.
    """
    path = Path(name_or_path)
    if path.is_file():
        raise InputError(f"model {path} is a file; give the folder that it lies in")
    if not path.is_dir() or (path / CONFIG).is_file():
        return name_or_path
    if (path / EXPORT / CONFIG).is_file():
        return str(path / EXPORT)
    place = path.absolute()
    if "checkpoints" in (place.name, place.parent.name):
        run = path if place.name == "checkpoints" else path / ".."
        raise InputError(
            f"model {path} holds checkpoints, which only training goes on from; give the run's "
            f"folder or its export, {(run / '..' / EXPORT).resolve()}, which is written when the "
            "run ends"
        )
    if (path / "config.yaml").is_file() and (
        (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir()
    ):
        raise InputError(
            f"model {path} is a run without an export, which is written when it ends; go on with "
            f"it: launch/train.py --config {path / 'config.yaml'}"
        )
    held = sorted(file.name for file in path.iterdir())
    raise InputError(
        f"model {path} is no model: the folder lacks {CONFIG} ({_listed(held) or 'it is empty'}); "
        "give the folder of a Hugging Face model, a run, or its export"
    )


def fetch_model(name_or_path: str, weights: bool = False) -> Path:
    """The local folder of a model; of one of the hub what was fetched, or what is in the cache.

    Args:
        weights: have the safetensors files too.

    Raises:
        InputError: as `resolve_model`, or no such model is within reach.
    """
    folder = Path(name := resolve_model(name_or_path))
    if not folder.is_dir():
        patterns = _TEXT_FILES + (["*.safetensors"] if weights else [])
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            raise InputError(
                f"model {name}: neither a folder here nor a model of the hub within reach "
                f"({str(error).splitlines()[0]})"
            ) from error
        if not (folder / CONFIG).is_file():
            raise InputError(f"model {name}: what the hub, or its cache, has of it lacks {CONFIG}")
    return folder


def read_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model.

    The index decides which files are read, and which of them a tensor is taken from: a folder may
    hold files of an earlier save, too. Without an index there is one file.

    Raises:
        InputError: no such files (pickled weights are not read), a broken one, or an index that
            names what is not there.
    """
    index = _read_index(folder)
    files = sorted(set(index.values())) or [SINGLE]
    if missing := [file for file in files if not (folder / file).is_file()]:
        if index:
            raise InputError(f"{INDEX} names files that are not there; fetch {_listed(missing)}")
        found = sorted(file.name for file in folder.glob("*.safetensors"))
        why = f"it has {_listed(found)}" if found else "pickled weights (*.bin, *.pt) are not read"
        raise InputError(f"it has no safetensors file named {SINGLE} and no {INDEX}; {why}")
    if SINGLE not in files and (folder / SINGLE).is_file():
        logger.warning("%s: %s is not read, for %s does not name it", folder, SINGLE, INDEX)
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                names = [name for name in tensors.keys() if index.get(name, file) == file]  # noqa: SIM118
                state |= {name: tensors.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is broken ({error}); fetch it again") from error
    if absent := sorted(f"{name} in {file}" for name, file in index.items() if name not in state):
        raise InputError(f"{INDEX} names tensors that are not there: {_listed(absent)}")
    return state


def _read_index(folder: Path) -> Mapping[str, str]:
    """The file of each tensor, as the index has it; empty without an index."""
    if not (folder / INDEX).is_file():
        return {}
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {name: PurePosixPath(file) for name, file in index.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{INDEX} is no index of tensors; fetch it again") from error
    for file in files.values():
        # Another place of this machine, or a pickle, is nothing that a checkpoint may name.
        if file.is_absolute() or ".." in file.parts or file.suffix != ".safetensors":
            raise InputError(
                f"{INDEX} names {str(file)!r}; it may name safetensors files of its own folder only"
            )
    if not files:
        raise InputError(f"{INDEX} names no tensor; fetch it again")
    return index


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
