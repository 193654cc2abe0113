"""Records in exactly the form of the benchmarks' published files."""

import json
from pathlib import Path

# A record of each, with all its fields. Whatever is given replaces its field.


def visualprocessbench(steps: list[str], marks: list[int], **fields: object) -> dict:
    """A line of `test.jsonl`; images are a list, and some questions name them: `<image 1>`."""
    return {
        "image": ["images/MathVision_MINI/15.png"],
        "question": "Hint: Please answer it.\nQuestion: Where does <image1> go?\n<image 2>",
        "answer": "A",
        "response": {"steps": steps, "process_correctness": marks},
        "policy_model": "GPT4o_20241120_tem07",
        "data_source": "MathVision_MINI",
    } | fields


def processbench(steps: list[str], label: int, **fields: object) -> dict:
    """An entry of `gsm8k.json`; the others have ids such as `olympiadbench-7`."""
    return {
        "id": "gsm8k-0",
        "generator": "Qwen2-7B-Instruct",
        "problem": "Sue lives in a fun neighborhood. How many?",
        "steps": steps,
        "final_answer_correct": label == -1,
        "label": label,
    } | fields


def prmbench(steps: list[str], error_steps: list[int], **fields: object) -> dict:
    """A line of a category's file, with its spelling of redundancy; steps count from 1."""
    return {
        "original_question": "What is the cost of a pencil, in cents?",
        "modified_question": "What is the cost of a pencil?",
        "original_process": ["Let it be p.", "So p = 29."],
        "modified_process": steps,
        "modified_steps": error_steps,
        "error_steps": error_steps,
        "reason": "Step 2 is redundant.",
        "idx": "prm_test_p1_0",
        "question": "What is the cost of a pencil, in cents? $\\$1.24$",
        "classification": "redundency",
    } | fields


EXAMPLES = {
    "visualprocessbench": visualprocessbench(["So:", "1. Start.", "A"], [0, 1, -1]),
    "processbench": processbench(["First.", "Then.", "So 3."], 1),
    "prmbench": prmbench(["Let it be p.", "It is p.", "So p = 29."], [2]),
}


def write_lines(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)
