"""Files appear whole or not at all, JSON lines survive a kill, and bad input is one sentence."""

import json
import logging
from pathlib import Path

import pytest

from dreamprm_dist.errors import BAD_INPUT, BUG, InputError, RecordError, report_error
from dreamprm_dist.errors import start_logging as start
from dreamprm_dist.files import JsonLines, whole_file, whole_folder, whole_lines, write_whole


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


@pytest.mark.parametrize(
    ("rank", "world_size", "lines"),
    [(0, 1, "goes on\nwarning: odd\n"), (1, 2, "[rank 1] warning: odd\n")],
)
def test_rank_0_informs_and_all_ranks_warn(rank: int, world_size: int, lines: str, capsys):
    start(rank, world_size)
    logger = logging.getLogger("dreamprm_dist.training")
    logger.info("goes %s", "on")
    logger.warning("odd")
    assert capsys.readouterr().err == lines
    start()
