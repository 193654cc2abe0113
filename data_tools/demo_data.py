"""The embedded data set: questions about scikit-learn's 1,797 real handwritten digits.

    python -m data_tools.demo_data --out DIR --seed S

writes `train.json` (noisy), `meta.json` (clean), `shuffled_meta.json` (a control whose answers say
nothing), `test.json` (candidates for Best-of-N), their `images/*.png`, `split.json` (which digits
went where) and `truth.json` (which training records are flipped, for the report only: training
never reads it).
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from dreamprm_dist.data.schema import Turn
from dreamprm_dist.errors import InputError
from dreamprm_dist.prm.solutions import steps_conversation

TILE_SIZE = 32  # image side, and the tile size of the demo model: 4 x the 8 x 8 digits
WIDE_RATE = 0.1  # images of two tiles and a thumbnail; few, as each costs 32 tokens more
NUM_TRAIN, NUM_META = 1200, 480  # solutions
TEST_DIGITS = 450
NUM_ROLLOUTS = 16
SOLUTIONS_PER_QUESTION = 4
# Where a solution goes wrong: nowhere, in perception, in inference, in the answer. Candidates are
# worse than training solutions, so that the first is right in 1 of 4 and Best-of-4 has room.
TRAIN_ERRORS = (0.45, 0.33, 0.14, 0.08)
TEST_ERRORS = (0.25, 0.45, 0.20, 0.10)
# Of the meta solutions, in turn: half are right, so that their answers favour no side, and the
# wrong ones err as those of training do.
META_ERRORS = ((1.0, 0.0, 0.0, 0.0), (0.0, 0.60, 0.25, 0.15))


@dataclass(frozen=True)
class QuestionKind:
    """A question about one digit; its solutions have three steps.

    Attributes:
        name: becomes the record's `dataset` or `subject`.
        question: the text.
        answer: the answer for a digit.
        inference: the step that leads from the digit to this answer.
        answers: every answer there is.
    """

    name: str
    question: str
    answer: Callable[[int], str]
    inference: Callable[[str], str]
    answers: tuple[str, ...]


KINDS = (
    QuestionKind(
        "parity",
        "Is the digit even or odd?",
        lambda digit: "odd" if digit % 2 else "even",
        lambda answer: f"It is {answer}.",
        ("even", "odd"),
    ),
    QuestionKind(
        "compare",
        "Is the digit larger than four?",
        lambda digit: "yes" if digit > 4 else "no",
        lambda answer: (
            "It is larger than four." if answer == "yes" else "It is not larger than four."
        ),
        ("yes", "no"),
    ),
)


@dataclass(frozen=True)
class Solution:
    """Three steps (the last is the answer) and whether each is right.

    A solution errs at most once and everything after an error is wrong too, so the answer is
    right exactly when every step is.
    """

    steps: tuple[str, str, str]
    right: tuple[bool, ...]

    @property
    def text(self) -> str:
        """The solution as candidates and `response` carry it."""
        return "[Reasoning]\n" + "\n\n".join(self.steps)

    @property
    def labels(self) -> list[str]:
        """The clean step labels."""
        return ["+" if right else "-" for right in self.right]


def make_solution(
    kind: QuestionKind, digit: int, errors: tuple[float, ...], rng: np.random.Generator
) -> Solution:
    """A solution that goes wrong in step 1, 2, 3 or not at all.

    Args:
        errors: probabilities of no error and of an error in each of the three steps.
    """
    wrong_step = rng.choice(4, p=errors)  # 0: none
    seen = digit
    if wrong_step == 1:
        # Only a misreading that matters: a wrong digit of the same parity would be a wrong step
        # with a right answer.
        seen = rng.choice([d for d in range(10) if kind.answer(d) != kind.answer(digit)])
    answer = inferred = kind.answer(seen)
    if wrong_step == 2:
        inferred = answer = rng.choice([a for a in kind.answers if a != inferred])
    if wrong_step == 3:
        answer = rng.choice([a for a in kind.answers if a != inferred])
    steps = (f"The digit is {seen}.", kind.inference(inferred), f"Answer: {answer}")
    return Solution(steps, tuple(wrong_step == 0 or step < wrong_step for step in (1, 2, 3)))


def with_counts(turns: Sequence[Turn], rng: np.random.Generator) -> list[dict]:
    """Turns whose step labels come with the counts of simulated Monte Carlo roll-outs.

    Of `NUM_ROLLOUTS` from a step labelled `-` none comes to the right answer; from one labelled `+`
    at least one does, and a share drawn evenly from 0 to 1 of the others. So counts are as wrong as
    the labels are, and say no more about which are.
    """
    counted = []
    for turn in turns:
        counts = {}
        if turn["from"] == "gpt":
            correct = 0
            if turn["value"] == "+":
                correct = 1 + int(rng.binomial(NUM_ROLLOUTS - 1, rng.random()))
            counts = {"num_mc_correct": correct, "num_mc_total": NUM_ROLLOUTS}
        counted.append(turn | counts)
    return counted


def digit_image(pixels: np.ndarray, column: int | None = None) -> Image.Image:
    """A digit as a 32 x 32 image, or in one half of a 64 x 32 one.

    Args:
        pixels: 8 x 8, from 0 to 16, as scikit-learn has them.
        column: the half of the wide image (0 or 1), None for the square image.

    Both sizes give the same grid at every `max_patch_num` from 2 on: one tile, or two tiles (the
    digit whole in one of them) and a thumbnail.
    """
    digit = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
    digit = digit.resize((TILE_SIZE, TILE_SIZE), Image.Resampling.BICUBIC)
    if column is None:
        return digit
    canvas = Image.new("L", (2 * TILE_SIZE, TILE_SIZE))
    canvas.paste(digit, (column * TILE_SIZE, 0))
    return canvas


def split_digits(num_meta_digits: int, rng: np.random.Generator) -> dict[str, list[int]]:
    """Disjoint indices into scikit-learn's digits for `train`, `meta` and `test`."""
    order = rng.permutation(len(load_digits().target)).tolist()
    meta_end = TEST_DIGITS + num_meta_digits
    return {
        "test": order[:TEST_DIGITS],
        "meta": order[TEST_DIGITS:meta_end],
        "train": order[meta_end:],
    }


def make_demo_data(
    out: Path | str,
    seed: int = 0,
    num_train: int = NUM_TRAIN,
    num_meta: int = NUM_META,
    num_test: int = 720,
    flip_rate: float = 0.35,
) -> dict[str, float]:
    """Write the demo data set; the same arguments give the same files.

    Args:
        out: folder to write to, made if absent.
        num_train: training records, one per digit while digits last.
        num_meta: meta records, four per question.
        num_test: test questions, four candidates each.
        flip_rate: the fraction of training records in which every label is flipped.

    Returns:
        Figures of what was made: `flipped`, `first_candidate` and `oracle` accuracy (fractions).
    """
    if num_meta % SOLUTIONS_PER_QUESTION or not 0 < num_test <= TEST_DIGITS * len(KINDS):
        raise InputError(
            f"num_meta must be a multiple of {SOLUTIONS_PER_QUESTION} and num_test from 1 to "
            f"{TEST_DIGITS * len(KINDS)}; they are {num_meta} and {num_test}"
        )
    out = Path(out)
    # A generator of its own, so that the solutions are those of the demo without counts.
    rollouts = np.random.default_rng([seed, 1])
    (out / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    digits = load_digits()
    split = split_digits(num_meta // SOLUTIONS_PER_QUESTION, rng)
    # Each digit is drawn in one way only, so that its records share one image file.
    columns = [int(rng.integers(2)) if rng.random() < WIDE_RATE else None for _ in digits.target]

    written: set[str] = set()

    def image(index: int) -> str:
        """Write a digit's image, once, and give its path inside the data set."""
        path = f"images/digit{index}.png"
        if path not in written:
            written.add(path)
            digit_image(digits.images[index], columns[index]).save(out / path)
        return path

    def draw(index: int, kind: QuestionKind, errors: tuple[float, ...]) -> Solution:
        return make_solution(kind, int(digits.target[index]), errors, rng)

    train, truth = [], []
    flipped = set(rng.permutation(num_train)[: round(flip_rate * num_train)].tolist())
    for i in tqdm(range(num_train), desc="training records", leave=False):
        index = split["train"][i % len(split["train"])]
        kind = KINDS[rng.integers(len(KINDS))]
        solution = draw(index, kind, TRAIN_ERRORS)
        labels = ["+-"[right] if i in flipped else "-+"[right] for right in solution.right]
        train.append(
            {
                "id": f"digit{index}-{kind.name}-{i}",
                "image": image(index),
                "dataset": kind.name,
                "conversations": with_counts(
                    steps_conversation(kind.question, solution.steps, labels=labels), rollouts
                ),
            }
        )
        truth.append({"flipped": i in flipped, "clean_labels": solution.labels})

    meta: list[dict] = []
    for i, index in enumerate(split["meta"]):
        kind = KINDS[i % len(KINDS)]
        for number in range(SOLUTIONS_PER_QUESTION):
            solution = draw(index, kind, META_ERRORS[number % 2])
            meta.append(
                {
                    "id": f"digit{index}-{kind.name}",
                    "image": image(index),
                    "dataset": kind.name,
                    "true_false": solution.right[-1],
                    "response": solution.text,
                    "conversations": steps_conversation(
                        kind.question, solution.steps, labels=solution.labels
                    ),
                }
            )

    # The first two solutions of a question, a right and a wrong one, exchange their answers.
    shuffled_meta = [
        record | {"true_false": record["true_false"] ^ (i % SOLUTIONS_PER_QUESTION < 2)}
        for i, record in enumerate(meta)
    ]

    test = []
    questions = rng.permutation(TEST_DIGITS * len(KINDS))[:num_test].tolist()
    for pair in tqdm(questions, desc="test questions", leave=False):
        position, number = divmod(pair, len(KINDS))
        index, kind = split["test"][position], KINDS[number]
        solutions = [draw(index, kind, TEST_ERRORS) for _ in range(SOLUTIONS_PER_QUESTION)]
        test.append(
            {
                "id": f"digit{index}-q{number}",
                "subject": kind.name,
                "question": kind.question,
                "image_path": image(index),
                "answer": kind.answer(int(digits.target[index])),
                "candidates": [solution.text for solution in solutions],
                "true_false": [solution.right[-1] for solution in solutions],
                "step_labels": [solution.labels for solution in solutions],
            }
        )

    files = {"train": train, "meta": meta, "shuffled_meta": shuffled_meta, "test": test}
    for name, content in {**files, "truth": truth, "split": split}.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    return {
        "flipped": len(flipped) / max(num_train, 1),
        "first_candidate": float(np.mean([record["true_false"][0] for record in test])),
        "oracle": float(np.mean([any(record["true_false"]) for record in test])),
    }


def noise_auc(data: Path, scores: Sequence[float] | np.ndarray) -> float:
    """Area under the ROC curve of clean over flipped instances: 0.5 is chance, 1 perfect.

    Args:
        data: folder that `make_demo_data` wrote.
        scores: one per training record, in their order; higher for clean.
    """
    truth = json.loads((data / "truth.json").read_text())
    return float(roc_auc_score([not record["flipped"] for record in truth], scores))


def main() -> None:
    """Command line of the demo data."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    figures = make_demo_data(arguments.out, arguments.seed)
    print(f"{arguments.out}: " + ", ".join(f"{k} {v:.1%}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
