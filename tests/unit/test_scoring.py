"""Scores of a question's solutions: the shared prefix against the plain forward pass."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dreamprm_dist.errors import RecordError
from dreamprm_dist.evaluation.scoring import Scorer
from dreamprm_dist.losses import step_scores
from dreamprm_dist.prm.batch import InputFormat, collate, encode_instance
from dreamprm_dist.prm.chat import label_token_ids
from dreamprm_dist.prm.model import PRM, load_prm, load_tokenizer
from dreamprm_dist.prm.solutions import steps_conversation

QUESTION = "What is it?"
SOLUTIONS = [
    ["The digit is 3.", "It is odd.", "Answer: yes"],
    ["A"],
    ["The digit is 8.", "Answer: no"],
    ["The digit is 3.", "It is even.", "It is 3 + 1.", "Answer: no"],
]
# Relative; float32, other shapes sum in another order.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def prm(tiny_prm_dir: Path) -> PRM:
    """Random weights, but larger ones: scores must depend on all of the input."""
    prm = load_prm(str(tiny_prm_dir), "fp32")
    torch.manual_seed(0)
    for parameter in prm.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return prm


@pytest.fixture(scope="module")
def tokenizer(tiny_prm_dir: Path):
    return load_tokenizer(str(tiny_prm_dir))


def picture(seed: int, width: int, height: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


WIDE, SMALL = picture(0, 96, 32), picture(1, 32, 32)


def score(prm: PRM, tokenizer, images=(WIDE,), solutions=SOLUTIONS, question=QUESTION, **options):
    return Scorer(prm, tokenizer, 4, **options).score_solutions(question, solutions, images)


@torch.no_grad()
def plain(
    prm: PRM,
    tokenizer,
    images=(WIDE,),
    solutions=SOLUTIONS,
    question=QUESTION,
    score_over="vocabulary",
):
    """Every solution alone, through the forward pass that training takes."""
    format = InputFormat(4, prm.tile_size, prm.tokens_per_tile, prm.max_length, "plus")
    result = []
    for steps in solutions:
        conversation = steps_conversation(question, steps)
        instance = encode_instance(conversation, images, tokenizer, format)
        logits = prm.eval()(collate([instance], tokenizer.pad_token_id)).logits
        scores = step_scores(logits, label_token_ids(tokenizer), "+", score_over)
        result.append(scores.tolist())
    return result


CASES = {
    "one image of several tiles": {},
    "two images": {"images": (WIDE, SMALL)},
    "no image": {"images": ()},
    "one solution": {"solutions": SOLUTIONS[:1]},
    "image within the question": {"question": "In <image>, what is it?"},
    "marks within the solutions": {
        "images": (SMALL,),
        "solutions": [["See <image>.", "</img>A<|im_end|>"], ["<image><image>", "<IMG_CONTEXT>"]],
    },
    "marks where no image is": {"images": (), "question": "<image>?", "solutions": [["<image>"]]},
    "nothing in common after the question": {"solutions": [["x"], ["7, 8", "+"]]},
    "over the pair": {"score_over": "pair"},
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_plain_forward_pass(prm, tokenizer, case: str) -> None:
    ours, theirs = (function(prm, tokenizer, **CASES[case]) for function in (score, plain))
    assert [len(steps) for steps in ours] == [len(steps) for steps in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=TOLERANCE)


def test_every_part_of_the_input_counts(prm, tokenizer) -> None:
    """The tests above could fail: what they compare depends on images, question and steps."""
    base = score(prm, tokenizer)
    assert base[0][0] == base[3][0] and base[0][1] != base[3][1]
    others = [
        score(prm, tokenizer, images=(SMALL, WIDE))[0],
        score(prm, tokenizer, score_over="pair")[0],
        score(prm, tokenizer, images=(picture(2, 96, 32),))[0],
        score(prm, tokenizer, question="What was it?")[0],
        base[2],
    ]
    for other in others:
        assert other[0] != pytest.approx(base[0][0], rel=100 * TOLERANCE)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(len(SOLUTIONS))), st.integers(0, len(SOLUTIONS) - 1))
def test_order_and_repeated_solutions_change_nothing(prm, tokenizer, order, repeated) -> None:
    base = score(prm, tokenizer)
    indices = [*order, repeated]
    assert score(prm, tokenizer, solutions=[SOLUTIONS[i] for i in indices]) == [
        base[i] for i in indices
    ]


@pytest.mark.parametrize("label", ["+", "-"])
def test_labels_of_the_data_are_not_looked_at(prm, tokenizer, label: str) -> None:
    """The PRM scores a step behind neutral labels, whatever the data says of the steps before."""
    given = steps_conversation(QUESTION, SOLUTIONS[3])
    labelled = [turn | {"value": label} if turn["from"] == "gpt" else turn for turn in given]
    scorer = Scorer(prm, tokenizer, 4)
    assert scorer.score_conversations([labelled], [WIDE]) == scorer.score_conversations(
        [given], [WIDE]
    )


def test_it_leaves_evaluation_mode(prm, tokenizer) -> None:
    prm.train()
    score(prm, tokenizer)
    assert not prm.training


def test_vision_tower_and_prefix_run_once(prm, tokenizer) -> None:
    tiles, tokens = [], []
    vision, language = prm.model.model.vision_tower, prm.model.model.language_model
    hooks = [
        vision.register_forward_pre_hook(
            lambda _, args, kwargs: tiles.append(len(kwargs["pixel_values"])), with_kwargs=True
        ),
        language.register_forward_pre_hook(
            lambda _, args, kwargs: tokens.append(kwargs["inputs_embeds"].shape[:2]),
            with_kwargs=True,
        ),
    ]
    score(prm, tokenizer, images=(WIDE, SMALL))
    for hook in hooks:
        hook.remove()
    assert tiles == [5]  # 96 x 32: three tiles and a thumbnail
    (prefix_rows, prefix), (rows, _) = tokens
    assert (prefix_rows, rows) == (1, 4)
    assert prefix > 5 * prm.tokens_per_tile


def test_score_that_is_not_a_number(tiny_prm_dir: Path, tokenizer) -> None:
    broken = load_prm(str(tiny_prm_dir), "fp32")
    broken.model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="a step score is not a number") as error:
        score(broken, tokenizer)
    assert not isinstance(error.value, RecordError)


BAD = {
    "no step": ([], "no step to score"),
    "white space": ([" ", "\n\t", "\u3000"], "no step to score"),
    "one endless step": (["long " * 9999], "tokens are more than the model's context of 4096"),
    "endless steps": (["long "] * 9999, "tokens are more than the model's context of 4096"),
    "half a character": (["One.", "Two \ud800"], "half a surrogate pair"),
    "endless image marks": (["<IMG_CONTEXT>" * 9999], "are more than the model's context"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_solution_that_cannot_be_scored_costs_the_others_nothing(prm, tokenizer, case) -> None:
    bad, says = BAD[case]
    good = score(prm, tokenizer, solutions=SOLUTIONS)
    found = score(prm, tokenizer, solutions=[SOLUTIONS[0], bad, *SOLUTIONS[1:], bad])
    assert [*found[:1], *found[2:-1]] == good
    for error in (found[1], found[-1]):
        assert isinstance(error, RecordError) and says in str(error)
    (only,) = score(prm, tokenizer, solutions=[bad])
    assert isinstance(only, RecordError)


def test_the_best_is_chosen_among_those_that_have_scores(prm, tokenizer) -> None:
    scorer = Scorer(prm, tokenizer, 4)
    texts = ["", "A", "\u00a0\n\n\u2003", ["B", "C"], "[Reasoning]\n", ["", " "], "D " * 9999]
    found = scorer.choose(QUESTION, texts, [WIDE], "mean")
    good = [1, 3]
    without = scorer.choose(QUESTION, [texts[i] for i in good], [WIDE], "mean")
    assert found.index == good[without.index]
    for every, of_good in (
        (found.scores, without.scores),
        (found.step_scores, without.step_scores),
    ):
        assert [every[i] for i in good] == of_good
        assert all(every[i] is None for i in range(7) if i not in good)
    assert [i for i, error in enumerate(found.errors) if error is None] == good
    assert len(found.steps) == len(found.errors) == 7
    none = scorer.choose(QUESTION, ["", " "], [WIDE], "mean")
    assert (none.index, none.scores, none.step_scores) == (None, [None] * 2, [None] * 2)


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ("<image> or <image>?", "2 <image> for 1 image"),
        ("long " * 9999, "the question and its images are .* lower max_patch_num, now 4"),
    ],
)
def test_a_question_that_cannot_be_scored(prm, tokenizer, question: str, says: str) -> None:
    with pytest.raises(RecordError, match=says):
        score(prm, tokenizer, question=question)
