"""Data sets as they lie on disk: which rows belong to which split, whatever names it."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.dataset_files import find_parts, read_rows
from dreamprm_dist.errors import InputError


def parquet(path, ids=None):
    """A file whose rows have its own path as id."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": i, "question": "Which?"} for i in ids or [path.as_posix()]]
    pq.write_table(pa.Table.from_pylist(rows), path)


def saved(path, split=None, **fields):
    table = {"id": [path.as_posix()], "question": ["Which?"], **fields}
    datasets.Dataset.from_dict(table, split=split).save_to_disk(path)


def ids(source, split=None):
    return [row["id"] for _, _, row in read_rows(source, split)]


LAYOUTS = {
    "of the hub's Parquet copies": {
        "dev": ["Art/dev/0000.parquet", "Music/dev/0000.parquet"],
        "test": ["Art/partial-test/0000.parquet", "Art/partial-test/0001.parquet"],
    },
    "a folder for each split": {
        "train": ["train/split.parquet"],
        "valid": ["valid/data-00000-of-00002.parquet", "valid/data-00001-of-00002.parquet"],
    },
    "files in data/": {
        "test": [f"data/test-0000{i}-of-00002-9fa3c0d2e1b44a7f.parquet" for i in (0, 1)],
        "testmini": ["data/testmini-00000-of-00001.parquet"],
    },
    "a name that is no usual split": {
        "testmini": ["default/testmini/0000.parquet"],
        "test": ["default/test/0000.parquet"],
    },
    "subjects as files": {
        "validation": ["Art_validation.parquet", "Music_validation.parquet"],
        "dev": ["Art_dev.parquet", "Music-dev.parquet"],
    },
    "pieces without their number of pieces": {
        "Validation": ["Validation/part-00000-5e0f-c000.snappy.parquet"],
        "test": ["test_0.parquet", "test_1.parquet"],
    },
    "pieces that say what they are": {
        "train": ["train-part-1.parquet", "train_shard_00002.parquet"],
        "validation": ["validation.chunk.0.parquet"],
    },
    "of Hive": {"val": ["split=val/0.parquet"], "eval": ["split=eval/0.parquet"]},
    "a split's name on a subject": {
        "test": ["test/test/0000.parquet"],
        "validation": ["test/validation/0000.parquet"],
    },
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path, layout):
    for path in (path for paths in layout.values() for path in paths):
        parquet(tmp_path / path)
    names = ", ".join(sorted(layout))
    for wrong in (None, "0000", "nowhere"):
        with pytest.raises(InputError, match=f"with --split: {names}\\.$"):
            read_rows(tmp_path, wrong)
    for split, paths in layout.items():
        assert ids(tmp_path, split) == [(tmp_path / path).as_posix() for path in sorted(paths)]


def test_a_split_that_was_asked_for_by_its_folder_or_file(tmp_path):
    parquet(tmp_path / "Art" / "validation" / "0000.parquet")
    parquet(tmp_path / "Art" / "test" / "0000.parquet")
    for source in (tmp_path / "Art" / "test", tmp_path / "Art" / "test" / "0000.parquet"):
        assert ids(source) == ids(source, "test") == ids(tmp_path, "test")
        with pytest.raises(InputError, match="--split: test"):
            read_rows(source, "validation")


def test_what_is_hidden_or_no_data_does_not_count(tmp_path):
    root = tmp_path / ".cache" / "hub"  # where a download lies may be hidden itself
    parquet(root / "Art" / "validation-00000-of-00001.parquet")
    expected = ids(root)
    parquet(root / ".cache" / "huggingface" / "download" / "test-00000-of-00001.parquet")
    parquet(root / "Art" / "._test.parquet")
    (root / "README.md").write_text("---\nconfigs: []\n")
    # What load_dataset keeps for itself: this description, and Arrow files that it wrote.
    (root / "dataset_info.json").write_text("{}")
    (root / "mmmu-test.arrow").write_bytes(b"")
    (root / "other").mkdir()
    (root / "other" / "state.json").write_text("{}")
    assert ids(root) == expected
    with pytest.raises(FileNotFoundError, match="neither Parquet"):
        read_rows(root / "other", None)


def test_saved_folders_of_several_subjects(tmp_path):
    for subject in ("Art", "Music"):
        for split in ("validation", "held-out"):
            saved(tmp_path / "dicts" / subject / split)
            (tmp_path / "dicts" / subject / "dataset_dict.json").write_text(
                '{"splits": ["validation", "held-out"]}'
            )
        saved(tmp_path / "single" / subject, datasets.Split.VALIDATION)
        saved(tmp_path / "unnamed" / "test" / subject)
    subjects = [f"{tmp_path}/dicts/{name}/held-out" for name in ("Art", "Music")]
    assert ids(tmp_path / "dicts", "held-out") == subjects
    with pytest.raises(InputError, match="--split: held-out, validation"):
        read_rows(tmp_path / "dicts", None)
    assert ids(tmp_path / "dicts" / "Art", "held-out") == subjects[:1]
    single = [f"{tmp_path}/single/{name}" for name in ("Art", "Music")]
    assert ids(tmp_path / "single") == ids(tmp_path / "single", "validation") == single
    assert set(find_parts(tmp_path / "unnamed").values()) == {"test"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("id", "image", "options", "answer"), "stands in the picture.*named standard"),
        (("a", "b"), r"no column 'question' \(but a, b\)"),
    ],
)
def test_a_config_without_question_texts(tmp_path, columns, message):
    parquet(tmp_path / "standard" / "test-00000-of-00001.parquet")
    vision = tmp_path / "vision" / "test-00000-of-00001.parquet"
    vision.parent.mkdir()
    pq.write_table(pa.table({name: ["x"] for name in columns}), vision)
    with pytest.raises(InputError, match=f"vision/test-00000-of-00001.parquet: .*{message}"):
        read_rows(tmp_path, None)
    assert len(ids(tmp_path / "standard")) == 1


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n" * 3])
def test_a_file_that_is_no_parquet_file(tmp_path, content):
    (tmp_path / "test.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"test\.parquet: no Parquet file; download it again"):
        read_rows(tmp_path, None)
