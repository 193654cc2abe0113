"""Build the wheel, install it where no checkout is, and make data, train and evaluate with it.

    make test-wheel

The environment it makes has the libraries of the one it runs in, and of this project the wheel.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]
INPUTS = """
import sys
from importlib.metadata import version
from pathlib import Path

import data_tools
import dreamprm_dist
from data_tools.demo_data import make_demo_data
from data_tools.demo_model import data_texts, make_tiny_model

for package in (data_tools, dreamprm_dist):
    assert package.__file__.startswith(sys.prefix), package.__file__
assert dreamprm_dist.__version__ == version("dreamprm_dist")
make_demo_data(Path("data"), num_train=16, num_meta=16, num_test=4)
make_tiny_model(Path("model"), data_texts(Path("data")))
"""
SHARD = ("-m", "data_tools.shard", "--train", "data/train.json", "--meta", "data/meta.json")
CPU = ("--precision", "fp32", "--device", "cpu")
COMMANDS = (
    ("inputs.py",),
    (*SHARD, "--out", "shards", "--num_shards", "2"),
    (
        *("launch/train.py", "--train_json_file", "shards/train", "--meta_json_file"),
        *("shards/meta", "--reward_model", "model", "--weights_path", "run", *CPU),
        *("--iteration_num", "2", "--num_workers", "0"),
    ),
    (
        *("launch/evaluate.py", "--model", "run/export", "--test_json_file", "data/test.json"),
        *("--output_dir", "evaluation", *CPU),
    ),
    ("launch/report.py", "run", "--results", "evaluation/results.json"),
    *((f"launch/{name}.py", "--help") for name in ("demo", "export", "score", "serve")),
)


def run(*command: object, folder: Path) -> None:
    """Run a command without what PYTHONPATH may add; stop with what it said when it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        **{"cwd": folder, "env": environment | {"OMP_NUM_THREADS": "1"}, "text": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        check=False,
    )
    print(*command[1:], flush=True)
    if done.returncode:
        sys.exit(done.stdout)


def build(folder: Path) -> Path:
    """The wheel, which must hold all files of the packages but their READMEs, and no other."""
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    # In a copy: what an older build has left in build/ would go into the wheel.
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", "dist", ".", folder=folder)
    (wheel,) = (folder / "dist").iterdir()
    held = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {name for name in names if name.startswith(("data_tools/", "dreamprm_dist/"))}
    expected |= {f"dreamprm_dist/{name}" for name in names if name.startswith("ds_configs/")}
    expected -= {name for name in expected if name.endswith(".md")}
    if held != expected:
        sys.exit(f"lacking: {sorted(expected - held)}; too much: {sorted(held - expected)}")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """The Python of a new environment with the wheel and this one's libraries."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, folder=folder)
    # A path in a .pth file is searched, but its own .pth files are not read: that of the editable
    # install of this checkout is among them.
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return python


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        base = Path(name).resolve()
        source, away = base / "source", base / "away"
        python = install(build(source), base / "venv")
        shutil.copytree(source / "launch", away / "launch")
        (away / "inputs.py").write_text(INPUTS)
        for command in COMMANDS:
            run(python, *command, folder=away)


if __name__ == "__main__":
    main()
