"""MMMU's questions as downloaded to records, and with candidates to meta and test records."""

import json
from pathlib import Path

import datasets
import pytest
from json_lines import lines, write
from PIL import Image

from data_tools.convert import main
from data_tools.mmmu import question_record
from data_tools.shard import shard_file
from dreamprm_dist.data.schema import parse_meta_record, parse_test_record, step_labels
from dreamprm_dist.errors import InputError, RecordError


def mmmu_rows(tmp_path):
    paths = {name: tmp_path / f"{name}.png" for name in ("red", "blue")}
    for name, path in paths.items():
        Image.new("RGB", (12, 8), name).save(path)
    pictures = [path.read_bytes() for path in paths.values()]
    rows = [
        ("q1", "What is in <image 1>?", "['It\\'s \"$6\", or', 'é, ü']", "B", 1),
        ("q2", "Compare <image 1> and <image 2>.", "[]", "['0.5', '1/2']", 2),
        ("q3", "See <image 2>.", "['a', 'b']", "A", 1),
        ("q4", "No list", "__import__('os')", "A", 0),
        ("q1", "Again", "['a', 'b']", "A", 0),
    ]
    return [
        {
            "id": id,
            "question": question,
            "options": options,
            "answer": answer,
            "question_type": "multiple-choice" if options != "[]" else "open",
            "subfield": "Art",
            **{
                f"image_{i}": {"bytes": pictures[i - 1], "path": None} if i <= images else None
                for i in range(1, 8)
            },
        }
        for id, question, options, answer, images in rows
    ]


def mmmu_dataset(tmp_path):
    features = {name: datasets.Value("string") for name in mmmu_rows(tmp_path)[0]}
    features |= {f"image_{i}": datasets.Image() for i in range(1, 8)}
    return datasets.Dataset.from_list(mmmu_rows(tmp_path), datasets.Features(features))


@pytest.fixture
def questions(tmp_path):
    parquet = tmp_path / "mmmu" / "Art" / "validation-00000-of-00001.parquet"
    parquet.parent.mkdir(parents=True)
    mmmu_dataset(tmp_path).to_parquet(parquet)
    out = tmp_path / "out" / "questions.jsonl"
    main(["mmmu", str(tmp_path / "mmmu"), "--out", str(out)])
    return out


def test_mmmu_questions_from_parquet(questions, tmp_path):
    first, second = lines(questions)
    assert first["question"] == (
        'Question: What is in <image 1>?\n\nOptions: (A) It\'s "$6", or (B) é, ü'
    )
    assert first["options"] == ['It\'s "$6", or', "é, ü"]
    assert (first["id"], first["answer"], first["subject"]) == ("q1", "B", "Art")
    assert second["question"] == "Question: Compare <image 1> and <image 2>."
    assert (second["question_type"], second["answer"]) == ("open", "['0.5', '1/2']")
    for path, name in zip(second["image_path"], ("red", "blue"), strict=True):
        stored = questions.parent / path
        assert stored.read_bytes() == (tmp_path / f"{name}.png").read_bytes()
    rejected = lines(questions.with_suffix(".rejected.jsonl"))
    assert [(entry["line"], entry["id"]) for entry in rejected] == [(3, "q3"), (4, "q4"), (5, "q1")]
    for entry, reason in zip(rejected, ("<image 2>", "Python list", "came before"), strict=True):
        assert reason in entry["reason"]


def test_the_first_rows_only(questions, tmp_path):
    out = questions.with_name("first.jsonl")
    main(["mmmu", str(tmp_path / "mmmu"), "--out", str(out), "--limit", "1"])
    assert [record["id"] for record in lines(out)] == ["q1"]
    assert lines(out.with_suffix(".rejected.jsonl")) == []


def test_a_datasets_folder_gives_the_same_as_parquet(questions, tmp_path):
    folder = tmp_path / "saved"
    parts = {"validation": mmmu_dataset(tmp_path), "dev": mmmu_dataset(tmp_path).select([0])}
    datasets.DatasetDict(parts).save_to_disk(folder)
    out = tmp_path / "out" / "again.jsonl"
    with pytest.raises(InputError, match="--split: dev, validation"):
        main(["mmmu", str(folder), "--out", str(out)])
    command = ["mmmu", str(folder), "--out", str(out), "--split", "validation"]
    main([*command, "--image_dir", str(questions.with_name("questions_images"))])
    assert out.read_bytes() == questions.read_bytes()
    with pytest.raises(FileNotFoundError, match="nowhere: not there"):
        main(["mmmu", str(tmp_path / "nowhere"), "--out", str(out), "--overwrite"])
    (tmp_path / "mmmu" / "Art" / "test-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="--split: test, validation"):
        main(["mmmu", str(tmp_path / "mmmu"), "--out", str(out), "--overwrite"])


@pytest.mark.parametrize(
    ("fields", "subject"),
    [
        ({"id": "test_History_256", "subject": "History"}, "History"),  # MMMU-Pro
        ({"id": "validation_Art_Theory_12", "subfield": "Renaissance Art"}, "Art Theory"),  # MMMU
        ({"id": "q1", "subfield": "Renaissance Art"}, "Renaissance Art"),
        ({"id": "q1"}, ""),
    ],
)
def test_subjects(fields, subject, tmp_path):
    row = {"question": "Which?", "answer": "A", "options": "['a', 'b']", **fields}
    assert question_record(row, tmp_path, "")["subject"] == subject


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"answer": "(b)"}, "B"),
        ({"answer": "B, the second"}, None),
        ({"answer": "B. b"}, "B"),
        ({"answer": "b.", "options": "A. a\nB. b"}, "B"),
        ({"answer": "second", "options": "['first' 'second']"}, "B"),
        ({"answer": ["A", "b"]}, "['A', 'B']"),
        ({"answer": "C"}, None),
        ({"answer": " "}, None),
        ({"answer": None}, None),
        ({"answer": "?"}, "?"),  # MMMU's test split
        ({"answer": 42, "options": "[]"}, "42"),
        ({"answer": ["x", "y"], "options": None}, "['x', 'y']"),
        ({"options": "[]", "question_type": "multiple-choice"}, None),
    ],
)
def test_keys_become_letters_of_their_question(fields, answer, tmp_path):
    row = {"id": "q1", "question": "Which?", "answer": "A", "options": "['a', 'b']", **fields}
    if answer is None:
        with pytest.raises(RecordError, match=r"answer|options"):
            question_record(row, tmp_path, "")
    else:
        assert question_record(row, tmp_path, "")["answer"] == answer


def test_candidates_become_test_and_meta_records(questions, tmp_path, capsys):
    candidates = [
        {"id": "q1", "response": "[Reasoning]\nOne.\n\nTwo.\n\nAnswer: B"},
        {"id": "q2", "response": "Answer: 0.5", "true_false": True},
        {"id": "q1", "response": "No idea", "true_false": None},
        {"id": "q2", "response": "Answer: 1/2"},
        {"id": "q2", "response": "Answer: 7"},
        {"id": "q9", "response": "Answer: A"},
        {"id": "q1", "response": " "},
    ]
    source = write(tmp_path / "candidates.jsonl", candidates)
    for kind in ("test", "meta"):
        out = str(tmp_path / "out" / f"{kind}.jsonl")
        arguments = ["--candidates", str(source), "--kind", kind, "--out", out]
        main(["candidates", str(questions), *arguments])
    test = [parse_test_record(record) for record in lines(tmp_path / "out" / "test.jsonl")]
    assert [record.true_false for record in test] == [[True, False, False], [True, True, False]]
    assert "2 candidates unparsed" in capsys.readouterr().out
    assert test[0].candidates == [candidates[0]["response"], "No idea", " "]
    meta = lines(tmp_path / "out" / "meta.jsonl")
    assert [(record["id"], record["true_false"]) for record in meta] == [
        ("q1", True),
        ("q1", False),
        ("q2", True),
        ("q2", True),
        ("q2", False),
    ]
    assert step_labels(meta[0]["conversations"]) == [None] * 3
    assert parse_meta_record(meta[0]).dataset == "Art"
    rejected = lines(tmp_path / "out" / "meta.rejected.jsonl")
    assert [entry["line"] for entry in rejected] == [7, 6]
    shard_file(tmp_path / "out" / "meta.jsonl", tmp_path / "shards", "meta", 2)


def test_a_bad_candidate_costs_neither_its_question_nor_the_others(questions, tmp_path):
    """It is named by its own line; a test record keeps what a model wrote, as a wrong answer."""
    strange = ["<|im_end|>", "<image> <image>", "</img>B", "<|im_start|>assistant\n+", "\x00"]
    empty = ["", " \n\t", "\u3000", "[Reasoning]\n", "\r\n\r\n", None]
    good = ["Answer: B", *(f"{text}\n\nAnswer: B" for text in strange)]
    no_text = [7, ["Answer: B"], "half \ud83d"]
    responses = [*empty, *good, *no_text]
    source = tmp_path / "c.jsonl"
    source.write_text(
        "".join(json.dumps({"id": "q1", "response": response}) + "\n" for response in responses)
    )
    for kind in ("meta", "test"):
        out = tmp_path / "out" / f"{kind}.jsonl"
        arguments = ["--candidates", str(source), "--kind", kind, "--out", str(out)]
        main(["candidates", str(questions), *arguments])
        bad = [i for i, response in enumerate(responses, 1) if response in no_text]
        bad += range(1, 7) if kind == "meta" else []
        rejected = lines(out.with_suffix(".rejected.jsonl"))
        assert [(Path(entry["file"]).name, entry["line"]) for entry in rejected] == [
            *(("c.jsonl", line) for line in sorted(bad)),
            ("questions.jsonl", 2),  # q2 has no candidate
        ]
    meta = lines(tmp_path / "out" / "meta.jsonl")
    assert [record["response"] for record in meta] == good
    assert all(record["true_false"] for record in meta)
    (test,) = lines(tmp_path / "out" / "test.jsonl")
    assert test["candidates"] == [*empty[:5], "", *good]
    assert test["true_false"] == [False] * 6 + [True] * 6
    shard_file(tmp_path / "out" / "meta.jsonl", tmp_path / "shards", "meta", 1)
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text())["num_rejected"] == 0


def test_a_question_that_cannot_be_taken_is_rejected_as_a_whole(questions, tmp_path):
    records = lines(questions)
    bad = [records[0] | {"question": "<image> <image>"}, records[1] | {"question": None}]
    changed = write(tmp_path / "out" / "changed.jsonl", [*bad, records[0] | {"id": "q3"}])
    source = write(
        tmp_path / "c.jsonl", [{"id": f"q{i}", "response": "Answer: B"} for i in (1, 2, 3)]
    )
    for kind in ("meta", "test"):
        out = tmp_path / "out" / f"{kind}.jsonl"
        arguments = ["--candidates", str(source), "--kind", kind, "--out", str(out)]
        main(["candidates", str(changed), *arguments])
        assert [record["id"] for record in lines(out)] == ["q3"]
        rejected = lines(out.with_suffix(".rejected.jsonl"))
        assert [(Path(r["file"]).name, r["line"]) for r in rejected] == [
            ("changed.jsonl", 1),
            ("changed.jsonl", 2),
        ]
        assert "2 <image> for 1 image" in rejected[0]["reason"]


@pytest.mark.parametrize("fields", [{"answer": "?"}, {"answer": None}, {"options": "[1]"}])
def test_a_question_that_cannot_be_graded_needs_the_verdict(questions, tmp_path, fields):
    changed = write(questions, [record | fields for record in lines(questions)])
    response = {"id": "q1", "response": "Answer: B"}
    source = write(tmp_path / "c.jsonl", [response, response | {"true_false": True}])
    out = tmp_path / "out" / "meta.jsonl"
    arguments = ["--candidates", str(source), "--kind", "meta", "--out", str(out)]
    main(["candidates", str(changed), *arguments])
    assert [record["true_false"] for record in lines(out)] == [True]


def test_candidates_are_graded_by_any_form_of_key_and_none_by_a_key_that_is_no_option(tmp_path):
    keys = ["b", "[B]", " B) ", "GREEN", "B: green", "['B', 'A']", "E", "yellow", "A or B", 7, ""]
    options = ["red", "green"]
    questions = [
        {"id": f"q{i}", "question": "Which?", "image_path": [], "options": options, "answer": key}
        for i, key in enumerate(keys)
    ]
    questions[0]["options"] = "(A) red (B) green"
    replies = ["**Answer:** B", "A. red"]
    given = [{"id": q["id"], "response": reply} for q in questions for reply in replies]
    given.append({"id": "q6", "response": "Answer: B", "true_false": True})
    source, candidates = (
        write(tmp_path / f"{n}.jsonl", r) for n, r in [("q", questions), ("c", given)]
    )
    out = tmp_path / "test.jsonl"
    arguments = ["--candidates", str(candidates), "--kind", "test", "--out", str(out)]
    main(["candidates", str(source), *arguments])
    records = {record["id"]: record for record in lines(out)}
    assert [records[f"q{i}"]["true_false"] for i in range(5)] == [[True, False]] * 5
    assert records["q0"]["options"] == options
    assert {records[f"q{i}"]["answer"] for i in range(5)} == {"B"}
    assert (records["q5"]["true_false"], records["q5"]["answer"]) == ([True, True], "['B', 'A']")
    assert records["q6"]["true_false"] == [True]  # a verdict needs no key
    assert len(records) == 7
    rejected = lines(out.with_suffix(".rejected.jsonl"))
    reasons = {entry["id"]: entry["reason"] for entry in rejected if entry["file"] == str(source)}
    assert list(reasons) == ["q7", "q8", "q9", "q10"]
    assert all("none of the 2 options" in reasons[x] for x in ("q7", "q8", "q9"))
    assert "'answer' is empty" in reasons["q10"]
