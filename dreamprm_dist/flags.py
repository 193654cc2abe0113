"""Command lines: dataclass defaults < YAML recipe < flags, and how a command ends."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf, isfinite
from pathlib import Path
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    NoReturn,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from dreamprm_dist.errors import InputError, report_error, start_logging


class Bounds(NamedTuple):
    """Bounds of a number that is a flag."""

    at_least: float = -inf
    above: float = -inf
    below: float = inf

    def hold(self, value: float) -> bool:
        return self.at_least <= value < self.below and value > self.above

    def __str__(self) -> str:
        shown = (f"{k.replace('_', ' ')} {v:g}" for k, v in self._asdict().items() if isfinite(v))
        return " and ".join(shown)


AtLeastOne = Annotated[int, Bounds(at_least=1)]
Count = Annotated[int, Bounds(at_least=0)]
NotNegative = Annotated[float, Bounds(at_least=0)]
Positive = Annotated[float, Bounds(above=0)]
Fraction = Annotated[float, Bounds(at_least=0, below=1)]


def flag(
    default: Any, help: str, aliases: Sequence[str] = (), choices: Iterable[str] | None = None
) -> Any:
    """A dataclass field that is a command-line flag.

    Args:
        aliases: other spellings of it.
        choices: all its values, such as the names of a registry.
    """
    metadata: dict[str, Any] = {"help": help}
    if aliases:
        metadata["aliases"] = [f"--{alias}" for alias in aliases]
    if choices is not None:
        metadata["choices"] = list(choices)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class FlagGroup:
    """A dataclass of flags that refuses values which cannot be meant.

    Attributes:
        removed: values that flags once had, and what to use instead.

    Raises:
        InputError: naming the flag, its value and what it must be.
    """

    removed: ClassVar[Mapping[str, Mapping[str, str]]] = {}

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            hint = hints[name]
            if type(None) in get_args(hint):  # of `kind | None` the kind
                hint = get_args(hint)[0]
            bounds = [*getattr(hint, "__metadata__", ()), Bounds()][0]
            literals = get_args(hint) if get_origin(hint) is Literal else [value]
            choices = field.metadata.get("choices", literals)
            if isinstance(value, str) and (instead := self.removed.get(name, {}).get(value)):
                raise InputError(f"{name} {value} is no longer there; {instead}")
            if value not in choices:
                raise InputError(f"{name} {value!r} is unknown; use one of {', '.join(choices)}")
            if isinstance(value, float) and not isfinite(value):
                raise InputError(f"{name} is {value}; it must be a finite number")
            if isinstance(value, int | float) and not bounds.hold(value):
                raise InputError(f"{name} is {value}; it must be {bounds}")


class CommandParser(argparse.ArgumentParser):
    """A command line that is refused as all bad input is: an InputError of one sentence."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def parse_args(
    config_classes: tuple[Any, ...], argv: Sequence[str] | None, description: str
) -> tuple[Any, ...]:
    """Read `--config recipe.yaml` (any number of them, later ones win), then the flags.

    Returns:
        One instance of each of `config_classes`.

    Raises:
        InputError: an unknown flag, a value of the wrong kind or an unreadable recipe.
        SystemExit: from argparse, for `--help`.
    """
    # Not for whoever only runs a command.
    from transformers.hf_argparser import HfArgumentParser, string_to_bool

    class Parser(CommandParser, HfArgumentParser):
        pass

    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        config_classes,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        help="YAML recipe; flags override what it says. Paths in it, as those of flags, start at "
        "the folder that the command runs in.",
    )
    removed = {k: v for c in config_classes for k, v in getattr(c, "removed", {}).items()}
    for action in parser._actions:
        if action.type is string_to_bool:
            action.type = lambda text: string_to_bool(_SWITCHES.get(text.lower(), text))
        if action.dest in removed:  # for the group to refuse, saying what to use instead
            valid = list(action.choices or [])
            action.metavar = f"{{{','.join(valid)}}}"
            action.choices = [*valid, *removed[action.dest]]
    known = {
        option.lstrip("-"): action for action in parser._actions for option in action.option_strings
    }
    _refuse_unknown_flags(argv, known)
    required = [action for action in parser._actions if action.required]
    for action in required:  # by the command as a whole, and not by each recipe
        action.required = False
    # Recipe values go through argparse as flags before the real ones, so that both are read and
    # refused by the same rules.
    recipe_argv = []
    for file in parser.parse_args(argv).config:
        flags = _recipe_flags(Path(file), known)
        try:
            parser.parse_args(flags)
        except InputError as error:
            raise InputError(f"recipe {file}: {error}") from error
        recipe_argv += flags
    for action in required:
        action.required = True
    namespace = parser.parse_args(recipe_argv + argv)
    return tuple(
        cls(**{f.name: getattr(namespace, f.name) for f in fields(cls)}) for cls in config_classes
    )


_SWITCHES = {"on": "yes", "off": "no"}  # words of YAML that transformers does not know


class _AsWritten(yaml.SafeLoader):
    """YAML whose values are the text that was written: YAML would read `No` as false, `007` as 7.

    Only nothing (`null`, `~`) is not text.
    """


_AsWritten.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _recipe_flags(file: Path, known: Mapping[str, argparse.Action]) -> list[str]:
    if not file.is_file():
        raise InputError(f"recipe {file} does not exist; recipes lie in launch/recipes/")
    try:
        recipe = yaml.compose(file.read_text(encoding="utf-8"), _AsWritten)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {file} is not YAML: {error}") from error
    if recipe is None:
        return []
    if not isinstance(recipe, yaml.MappingNode):
        raise InputError(f"recipe {file} must hold `flag: value` lines")
    allowed = known.keys() - {"config", "help", "h"}
    flags: list[str] = []
    lines: dict[str, int] = {}
    for key, node in recipe.value:
        line, name = key.start_mark.line + 1, str(key.value)
        where = f"recipe {file}, line {line}"
        if name not in allowed:
            raise InputError(f"{where}: {_unknown(name, allowed)}")
        if (before := lines.setdefault(known[name].dest, line)) != line:
            raise InputError(f"{where}: {name} is given on line {before} too; remove one of them")
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not items:
            raise InputError(f"{where}: {name} has an empty list; leave it out for the default")
        if not all(isinstance(item, yaml.ScalarNode) for item in items):
            raise InputError(f"{where}: {name} must be a value or a list of values")
        if node is not items[0]:
            flags += [f"--{name}", *(item.value for item in items)]
        elif not node.tag.endswith(":null"):
            flags.append(f"--{name}={node.value}")
    return flags


def _refuse_unknown_flags(argv: Sequence[str], known: Iterable[str]) -> None:
    for item in argv:
        name = item.removeprefix("--").split("=")[0]
        if item.startswith("--") and name not in known:
            raise InputError(_unknown(name, known))


def _unknown(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
    return f"unknown flag {name!r}; the nearest valid one is {nearest!r} (see --help)"


def run(main: Callable[[], None]) -> None:
    """Run a command and end the process with its exit code; see `report_error`."""
    start_logging()
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report_error(error))
