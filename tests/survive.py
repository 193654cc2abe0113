"""Kill a run again and again, change its number of ranks, and hold it against one left alone.

    KILLS=20 make test-survive

Writes `survive.json` and exits with 1 unless the killed run's export, weights and metrics are those
of the run left alone, byte for byte, and those of the run on changing ranks are within rounding.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import runpy
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, as for all tests
from started_run import Run, differing_files, export_differences, metric_differences

from data_tools.demo_data import make_demo_data
from data_tools.demo_model import data_texts, make_tiny_model
from data_tools.shard import shard_file
from dreamprm_dist.training import trainer  # noqa: F401 (imported here once, and not by every rank)

KILLS = int(os.environ.get("KILLS", "20"))
SEED = int(os.environ.get("SEED", "1"))
SAVE_EVERY = 2
ITERATIONS = 12 + 4 * KILLS
FLAGS = ("--iteration_num", str(ITERATIONS), "--save_every_iterations", str(SAVE_EVERY))
TOLERANCE = 1e-5  # sums in another order, carried on by AdamW


class Rank:
    """A rank forked off this process, which has its imports already; like a `Popen`."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path, log: Path):
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _be_rank(command, environment, folder, log)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float = 240) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < end, f"process {self.pid} does not end"
            time.sleep(0.01)
        return self._code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _be_rank(command: list[str], environment: dict[str, str], folder: Path, log: Path) -> None:
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.chdir(folder)
        os.environ.update(environment)
        sys.argv = command[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        print(stop, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:  # and not back into the code that this process is a copy of
        atexit._run_exitfuncs()
        os._exit(code)


class ForkedRun(Run):
    """A run whose ranks start in a second."""

    def start_rank(self, command: list[str], environment: dict[str, str], log: Path) -> Rank:
        log.write_text("")
        return Rank(command, environment, self.folder, log)

    @property
    def newest(self) -> int:
        return max(self.checkpoints(), default=0)

    def half_written(self) -> set[tuple[str, int]]:
        """Checkpoints that are being saved, or were when all ranks were killed."""
        folders = (self.run_folder / "checkpoints").glob("*.new")
        with contextlib.suppress(FileNotFoundError):  # finished in this moment
            return {(folder.name, folder.stat().st_mtime_ns) for folder in folders}
        return set()


def kill_somewhere(run: ForkedRun, chance: random.Random, seconds_of_save: float) -> bool:
    """Start a run, kill one rank or both with SIGKILL; whether that was inside a save.

    The moment is drawn: while it starts, while it trains, or while it saves.
    """
    before, leftover = run.newest, run.half_written()
    when = chance.choices(["start", "training", "save"], [1, 4, 5])[0]
    # A rank that others have not met yet is waited for by its launcher, which is not there.
    victims = [0, 1] if when == "start" else chance.choice([[0], [1], [0, 1]])
    saves = chance.randint(0, 1)  # that are let through
    lines = before + chance.randint(1, 2 * SAVE_EVERY)
    with run.started(*FLAGS) as ranks:
        if when == "start":
            time.sleep(chance.uniform(0, 3))
        else:
            # Until then files are those of the start before.
            run.wait_for(lambda: "bi-level: " in run.log(), ranks)
            if when == "training":
                run.wait_for(lambda: len(run.metrics()) >= lines, ranks)
            else:
                run.wait_for(lambda: run.newest >= before + saves * SAVE_EVERY, ranks)
                run.wait_for(lambda: run.half_written() - leftover, ranks)
            time.sleep(chance.uniform(0, seconds_of_save / 2))
        for rank in victims:
            ranks[rank].kill()
        codes = [process.wait(timeout=120) for process in ranks]  # the other one notices
        assert any(codes), "the run ended before it was killed"
    inside = bool(run.half_written() - leftover)
    print(f"killed {victims} at iteration {len(run.metrics())}, {when}, {inside=}", flush=True)
    return inside


def killed(run: ForkedRun, whole: ForkedRun) -> dict:
    chance = random.Random(SEED)
    lines = (whole.run_folder / "metrics.jsonl").read_text().splitlines()
    seconds = statistics.median(
        line["seconds_checkpoint"]
        for line in map(json.loads, lines)
        if "seconds_checkpoint" in line
    )
    inside = sum(kill_somewhere(run, chance, seconds) for _ in range(KILLS))
    run.finish(*FLAGS)
    differing = differing_files(run.run_folder / "export", whole.run_folder / "export")
    differing += ["metrics.jsonl"] if run.metrics() != whole.metrics() else []
    return {"kills": KILLS, "kills_inside_save": inside, "differing_files": differing}


def on_changing_ranks(run: ForkedRun, whole: ForkedRun) -> list[dict]:
    """2, 1, 2 and 4 ranks one after another, each killed after some checkpoints of its own."""
    changes, numbers = [], (2, 1, 2, 4)
    for place, number in enumerate(numbers):
        begin = run.newest
        if number == numbers[-1]:
            run.finish(*FLAGS, num_ranks=number)
        else:
            with run.started(*FLAGS, num_ranks=number) as ranks:
                run.wait_for(lambda begin=begin: run.newest >= begin + 2 * SAVE_EVERY, ranks)
        if place:
            part = slice(begin, run.newest)
            found = metric_differences(run.metrics()[part], whole.metrics()[part])
            metric = max(found, key=found.__getitem__)
            changes.append(
                {
                    "from": numbers[place - 1],
                    "to": number,
                    "iterations": [begin + 1, run.newest],
                    "metric_that_differs_most": metric,
                    "largest_relative_difference": found[metric],
                }
            )
    return changes


def main() -> None:
    start = time.perf_counter()
    base = Path(tempfile.mkdtemp())  # a TemporaryDirectory would end with the first forked rank
    try:
        shards = base / "shards"
        make_demo_data(base / "data", seed=0, num_train=64, num_meta=32, num_test=4)
        model = make_tiny_model(base / "model", data_texts(base / "data"), seed=0)
        for kind, level in (("train", "training"), ("meta", "meta")):
            shard_file(base / "data" / f"{kind}.json", shards / kind, level, 4, progress=False)

        def new_run(name: str) -> ForkedRun:
            (base / name).mkdir()
            return ForkedRun(base / name, model, shards)

        whole, hurt, changing = (new_run(name) for name in ("whole", "killed", "changing"))
        whole.finish(*FLAGS)
        result = {"seed": SEED, "iterations": ITERATIONS, **killed(hurt, whole)}
        changes = result["world_changes"] = on_changing_ranks(changing, whole)
        changed = max(export_differences(changing, whole).values())
        result["export_largest_relative_difference"] = changed
    finally:
        shutil.rmtree(base)
    result["seconds"] = round(time.perf_counter() - start)
    text = json.dumps(result, indent=2)
    Path("survive.json").write_text(text + "\n")
    print(text)
    largest = max(changed, *(change["largest_relative_difference"] for change in changes))
    if result["differing_files"] or largest > TOLERANCE:
        sys.exit("the run did not survive: see survive.json")


if __name__ == "__main__":
    main()
