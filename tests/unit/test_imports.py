"""Imports point down only, and each outside library that one file owns is imported by it alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dreamprm_dist"
# A module may import from its own level and below. Levels are those of the design.
LEVELS = [
    {"config", "command", "distributed", "trackers", "bad_steps"},
    {"schedules", "preemption", "prm", "data", "aggregation", "solutions", "grading", "model_card"},
    {"losses", "metrics", "export", "hypergradient", "reweighters"},
    {"checkpoint", "checkpoint_files", "engine", "engine_files", "resume"},
    {
        "trainer",
        "whole_passes",
        "best_of_n",
        "scoring",
        "questions",
        "score_parts",
        "evaluation_table",
    },
    {"api", "scoring_config", "evaluation", "report"},
    {"serving"},
]
OWNERS = {
    "deepspeed": {"dreamprm_dist/engine.py", "dreamprm_dist/engine_files.py"},
    "torch.distributed": {"dreamprm_dist/distributed.py"},
}


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def level(module: str) -> int:
    found = [number for number, names in enumerate(LEVELS) if module in names]
    assert found, f"{module} has no level: add it to LEVELS"
    return found[0]


def own_imports(file: Path) -> set[str]:
    parts = (name.split(".") for name in imports(file))
    return {p[1] for p in parts if p[0] == "dreamprm_dist" and len(p) > 1}


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE))
)
def test_imports_point_down(file: Path):
    module = file.relative_to(PACKAGE).with_suffix("").parts[0]
    names = imports(file)
    assert not any(name.split(".")[0] in ("data_tools", "launch") for name in names)
    for other in own_imports(file) - {module} if module != "__init__" else set():
        assert level(other) <= level(module), f"{module} imports {other}"


def test_hypergradient_and_reweighters_do_not_know_each_other():
    for one, other in (("hypergradient", "reweighters"), ("reweighters", "hypergradient")):
        for file in (PACKAGE / one).glob("*.py"):
            assert other not in own_imports(file) and "engine" not in own_imports(file)


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_has_one_owner(library: str):
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    users = {
        str(file.relative_to(ROOT))
        for file in files
        if any(name == library or name.startswith(f"{library}.") for name in imports(file))
    }
    assert users == OWNERS[library]
