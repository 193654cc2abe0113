"""The READMEs name every flag with its default, every metric, and what exists."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from dreamprm_dist.evaluation.benchmarks.run import BenchmarkConfig
from dreamprm_dist.planning.plan import PlanConfig
from dreamprm_dist.training.config import TrainConfig, parse_train_config
from dreamprm_dist.training.metrics import FIELDS

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 250  # of the page that everyone reads
FOLDERS = (".", "data_tools", "launch", "dreamprm_dist")
READMES = {
    str(Path(folder, "README.md")): (ROOT / folder / "README.md").read_text(encoding="utf-8")
    for folder in FOLDERS
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_of(text: str) -> str:
    """What stands in code blocks and between backticks, line by line."""
    blocks = [block for _, block in FENCED.findall(text)]
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", FENCED.sub("", text))])


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", FENCED.sub("", text), re.MULTILINE):
        shown = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = unique = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        count = 0
        while unique in found:
            count += 1
            unique = f"{name}-{count}"
        found.add(unique)
    return found


def links() -> list[tuple[str, str]]:
    """(README, target) of every link and picture that leads into the project."""
    return [
        (name, target)
        for name, text in READMES.items()
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text))
        if not re.match(r"[a-z]+:", target)
    ]


def named(pattern: str, code_only: bool = False) -> list[tuple[str, str]]:
    """(README, name) for each distinct match of a pattern."""
    texts = {name: code_of(text) if code_only else text for name, text in READMES.items()}
    return [
        (name, found)
        for name, text in texts.items()
        for found in sorted(set(re.findall(pattern, text, re.MULTILINE)))
    ]


def train_commands() -> list[tuple[str, list[str]]]:
    """(README, arguments) of each `launch/train.py` in a code block."""
    return [
        (name, shlex.split(command, comments=True))
        for name, text in READMES.items()
        for language, block in FENCED.findall(text)
        if language == "bash"
        for command in re.findall(
            r"^.*launch/(?:train\.py|slurm/train\.sbatch)(.*)$",
            block.replace("\\\n", " "),
            re.MULTILINE,
        )
    ]


def flag_rows() -> list[str]:
    """A line for each flag, as the README must have it."""
    config = parse_train_config([])
    rows = []
    sections = [getattr(config, part.name) for part in dataclasses.fields(TrainConfig)]
    for section in [*sections, PlanConfig(), BenchmarkConfig()]:
        hints = get_type_hints(type(section))
        rows.append(f"### {type(section)._argument_group_name.capitalize()}")
        for field in dataclasses.fields(section):
            default = getattr(section, field.name)
            text = field.metadata["help"].replace("%%", "%")
            if choices := field.metadata.get("choices") or get_args(hints[field.name]):
                names = [f"`{name}`" for name in choices if isinstance(name, str)]
                text += f" One of {', '.join(names)}." if names else ""
            rows.append(f"| `{field.name}` | `{default}` | {text} |")
    return rows


def test_the_first_page_is_short():
    assert len(READMES["README.md"].splitlines()) <= MOST_LINES


@pytest.mark.parametrize("row", flag_rows())
def test_every_flag_is_there_with_its_default(row: str):
    assert row in READMES["launch/README.md"].splitlines()


def test_no_flag_is_there_that_is_not():
    rows = re.findall(r"^\| `\w+` \| `[^`]*` \| .*\|$", READMES["launch/README.md"], re.MULTILINE)
    assert rows and set(rows) <= {*flag_rows()}


@pytest.mark.parametrize("name", FIELDS)
def test_every_metric_is_there(name: str):
    assert f"| `{name}` | {FIELDS[name]} |" in READMES["launch/README.md"].splitlines()


@pytest.mark.parametrize(("readme", "target"), links())
def test_links_lead_somewhere(readme: str, target: str):
    path, _, anchor = target.partition("#")
    page = (ROOT / readme).parent / path if path else ROOT / readme
    assert page.resolve().is_relative_to(ROOT) and page.exists()
    if anchor:
        assert anchor in anchors(page.read_text(encoding="utf-8"))


def test_anchors_are_githubs():
    text = "# A `b.py` and c\n## What's *new*?\n```\n# no heading\n```\n## A b_py\n## A b_py\n"
    assert anchors(text) == {"a-bpy-and-c", "whats-new", "a-b_py", "a-b_py-1"}


@pytest.mark.parametrize(
    ("readme", "target"), named(r"(?:^|\s)make ([a-z][a-z-]*)", code_only=True)
)
def test_make_has_every_target(readme: str, target: str):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("readme", "tool"), named(r"python -m data_tools\.(\w+)"))
def test_every_data_tool_is_there(readme: str, tool: str):
    assert (ROOT / "data_tools" / f"{tool}.py").is_file()


@pytest.mark.parametrize(("readme", "path"), named(r"(?<![\w./])launch/[\w/]+\.\w+"))
def test_every_script_and_recipe_is_there(readme: str, path: str):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize(("readme", "arguments"), train_commands())
def test_every_training_command_is_understood(readme: str, arguments: list[str], monkeypatch):
    monkeypatch.chdir(ROOT)
    parse_train_config(arguments)
