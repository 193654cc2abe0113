"""Imports point down only, and each outside library that one file owns is imported by it alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dreamprm_dist"
GROUND = {"errors", "files", "flags", "launchers", "distributed"}
# What each room may import beside itself. Training and evaluation never import each other.
BELOW = {"data": GROUND}
BELOW["prm"] = BELOW["data"] | {"data"}
BELOW["losses"] = BELOW["prm"] | {"prm"}
BELOW["hypergradient"] = BELOW["reweighters"] = BELOW["losses"] | {"losses"}
BELOW["training"] = BELOW["hypergradient"] | {"hypergradient", "reweighters"}
BELOW["planning"] = BELOW["training"] | {"training"}
BELOW["evaluation"] = BELOW["losses"] | {"losses"}
BELOW["api"] = BELOW["evaluation"] | {"evaluation"}
BELOW["report"] = BELOW["serving"] = BELOW["api"] | {"api"}
BELOW["__init__"] = {"api"}
BELOW |= dict.fromkeys(GROUND, GROUND)
OWNERS = {
    "deepspeed": {
        "dreamprm_dist/training/engine.py",
        "dreamprm_dist/training/engine_files.py",
        "dreamprm_dist/training/zero_state.py",
    },
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
    for other in own_imports(file) - {module}:
        assert other in BELOW[module], f"{module} imports {other}"


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_has_one_owner(library: str):
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    users = {
        str(file.relative_to(ROOT))
        for file in files
        if any(name == library or name.startswith(f"{library}.") for name in imports(file))
    }
    assert users == OWNERS[library]
