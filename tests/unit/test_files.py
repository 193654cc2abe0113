"""Files appear whole or not at all, JSON lines survive a kill, and bad input is one sentence."""

import json
import logging
import os
from pathlib import Path

import pytest
from started_run import held_by_another

from dreamprm_dist.errors import (
    BAD_INPUT,
    BUG,
    INTERRUPTED,
    LOCAL_RANKS,
    InputError,
    RecordError,
    report_error,
)
from dreamprm_dist.errors import start_logging as start
from dreamprm_dist.files import (
    LOCK,
    JsonLines,
    sole_use,
    whole_file,
    whole_folder,
    whole_lines,
    write_whole,
)
from dreamprm_dist.flags import run


def test_a_file_is_replaced_when_the_block_ends_and_untouched_when_it_fails(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_whole(path, "before")
    with pytest.raises(RuntimeError), whole_file(path) as unfinished:
        unfinished.write_text("half")
        assert path.read_text() == "before"
        raise RuntimeError
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    write_whole(path, "ä")
    assert path.read_bytes() == "ä".encode()


def test_a_folder_is_replaced_when_the_block_ends_and_untouched_when_it_fails(tmp_path: Path):
    path = tmp_path / "export"
    for name in ("one", "two"):
        with whole_folder(path) as folder:
            (folder / name).touch()
    with pytest.raises(RuntimeError), whole_folder(path) as folder:
        (folder / "three").touch()
        raise RuntimeError
    assert [file.name for file in path.iterdir()] == ["two"]


def test_lines_go_on_behind_the_last_whole_one(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    lines = JsonLines(path, lock=True)
    lines.add({"a": "\ud800"})
    # On disk at once, for a kill may come now.
    assert [json.loads(line) for line in whole_lines(path)] == [{"a": 1}, {"a": "\ud800"}]
    with pytest.raises(InputError, match=r"rows.jsonl: another run is writing it"):
        JsonLines(path, lock=True)
    lines.close()
    JsonLines(path, lock=True).close()


def test_a_folder_is_held_until_its_process_ends(tmp_path: Path):
    """And by whom it is held is said; a worker that outlives its parent holds nothing."""
    folder = tmp_path / "run"
    with held_by_another(folder) as (process, worker):
        mine = process.pid
        with pytest.raises(InputError, match=f"run is in use by process {mine} on "):
            sole_use(folder).__enter__()
        process.kill()
        process.wait()
        with sole_use(folder):
            assert f"process {os.getpid()} on " in (folder / LOCK).read_text()
        os.kill(worker, 0)  # it is alive
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file; give a folder"):
        sole_use(tmp_path / "file").__enter__()


@pytest.mark.parametrize("name", LOCAL_RANKS)
def test_the_first_process_of_a_machine_speaks_and_the_others_wait_for_it_to(
    name: str, monkeypatch, capsys
):
    for variable in LOCAL_RANKS:
        monkeypatch.delenv(variable, raising=False)
    waited: list[str] = []  # what was said until then
    monkeypatch.setattr("time.sleep", lambda seconds: waited.append(capsys.readouterr().err))
    for local_rank, waits in (("0", []), ("3", [""])):
        monkeypatch.setenv(name, local_rank)
        assert report_error(InputError("wrong")) == BAD_INPUT
        assert waited == waits and capsys.readouterr().err == "error: wrong\n"
    assert report_error(ValueError("a bug")) == BUG
    assert "ValueError: a bug" in capsys.readouterr().err


def test_ctrl_c_is_one_line(capsys):
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == INTERRUPTED
    assert capsys.readouterr().err == "\ninterrupted; start the same command again to go on\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("wrong"), BAD_INPUT),
        (RecordError("wrong"), BAD_INPUT),
        (FileNotFoundError("wrong"), BAD_INPUT),
        (ValueError("wrong"), BUG),
        (KeyError("wrong"), BUG),
    ],
)
def test_only_bad_input_is_one_sentence(error: Exception, code: int, capsys):
    assert report_error(error) == code
    said = capsys.readouterr().err
    assert (said == "error: wrong\n") == (code == BAD_INPUT)
    assert "wrong" in said


@pytest.mark.parametrize(("rank", "lines"), [(0, "goes on\nwarning: odd\n"), (1, "")])
def test_rank_0_speaks_for_all(rank: int, lines: str, capsys):
    start(rank)
    logger = logging.getLogger("dreamprm_dist.training")
    logger.info("goes %s", "on")
    logger.warning("odd")
    assert capsys.readouterr().err == lines
    start()
