"""A solution's text: its steps, and the conversation in which the PRM judges it."""

import re
from collections.abc import Iterable, Sequence

from dreamprm_dist.data.schema import QUESTION_PREFIX, Turn

# The released checkpoints were trained with exactly this text.
SYSTEM_PROMPT = """\
You are an advanced AI assistant, designed to serve as a process supervision model. \
In this task, I will provide a problem statement followed by the first step of the solution \
process. For each subsequent turn, I will give you a new step in the solution. Your role is to \
assess whether the solution process is correct up to the current step.

- In the **first round**, I will input the problem and the first step of the solution process.
- In **each subsequent round**, I will provide the next step in the solution.

For each step, you should:
- Respond with **"+"** if you believe the solution process is correct up to this step.
- Respond with **"-"** if you detect any issues or errors in the process up to this step.

Please note:
- Only respond with **"+"** or **"-"**. Do not provide any additional explanations, comments, or \
justifications.

Your task is to verify the accuracy and correctness of each step in the given solution process."""

REASONING_MARKER = re.compile(r"\A\s*\[Reasoning\]")
_ANSWER = r"[ \t]*[*_#]*[ \t]*(?:Final )?Answer[*_]*:[*_]*"
# `Answer:` alone on its line belongs to the text that follows it.
_ANSWER_SPACE = re.compile(rf"^({_ANSWER})\s+(?=\S)", re.MULTILINE)
# A step begins after a blank line, at a numbered line (`2. …`, `2) …`) and at the answer. The
# boundaries consume white space only, so no number can be lost with them.
_STEP_BOUNDARY = re.compile(rf"\n[^\S\n]*\n|\n(?=\d{{1,3}}[.)]\s)|\n(?={_ANSWER})")


def split_steps(solution: str) -> list[str]:
    """Split a solution into its steps.

    A leading `[Reasoning]` marker is dropped. Steps are separated by blank lines; a line that
    starts with a number (`2. …`, `2) …`) and an `Answer: …` line, in markdown or not, also begin a
    step of their own.
    Every other character is kept but the white space around a step.

    Returns:
        The steps in order; empty for a solution without text.
    """
    text = REASONING_MARKER.sub("", solution.replace("\r\n", "\n"))
    text = _ANSWER_SPACE.sub(r"\1 ", text)
    return [step for part in _STEP_BOUNDARY.split(text) if (step := part.strip())]


def step_turns(steps: Iterable[str], labels: Iterable[str | None]) -> list[Turn]:
    """For each step a human turn with its text and a `gpt` turn with its label."""
    turns: list[Turn] = []
    for step, label in zip(steps, labels, strict=True):
        turns += [{"from": "human", "value": step}, {"from": "gpt", "value": label}]
    return turns


def steps_conversation(
    question: str,
    steps: Sequence[str],
    system_prompt: str = SYSTEM_PROMPT,
    labels: Sequence[str | None] | None = None,
) -> list[Turn]:
    """The conversation in which the PRM scores every step of a solution.

    Args:
        question: the question, with its options where it has any.
        steps: texts of the steps.
        system_prompt: as the PRM was given it in training.
        labels: of the steps; by default they are unlabelled.

    Returns:
        The system prompt, the question, then for each step a human turn and a `gpt` turn.
    """
    return [
        {"from": "system", "value": system_prompt},
        {"from": "human", "value": QUESTION_PREFIX + question},
        *step_turns(steps, [None] * len(steps) if labels is None else labels),
    ]
