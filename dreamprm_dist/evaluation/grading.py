"""Whether a solution's final answer is right, by MMMU's published rules made deterministic.

The rules are those of MMMU's own evaluation (Yue et al., arXiv:2311.16502) and of MMMU-Pro's
(arXiv:2409.02813). They differ here on purpose:

- an answer that cannot be parsed is "unparsed" (None), never a random choice;
- markup around an answer or around `Answer:` is no part of either (see `markup`), nor are brackets
  and quotes around the whole answer;
- what follows the last `Answer:`, or without one what is in the last `\\boxed{}`, is the answer;
  the rest of the reasoning is not searched when nothing can be made of it;
- several options there (`(A) or (B)`) are no answer; elsewhere the last one counts, as in MMMU;
- letters inside of an option's text are not looked at, and the label before a text rules over
  letters in it: `B. Vitamin C`, `B - point A` and `(B) Plan C` are B;
- `the answer is B`, a last line that is only a letter and, after `Answer:`, a small letter count;
- a letter that is ruled out (`not B`, `neither A nor B`, `(B) is wrong`) is not chosen;
- the article "A" and the pronoun "I" are no options, and an empty option is never found; an article
  before an answer does not count (`the fern` is `fern`);
- texts are found as whole words: neither `10` in `100` nor `red` in `colored`, and what follows
  the `is` of `Paris` is no answer;
- equal numbers are equal however they are written (`1/2`, `0.5`, `\\frac12`; `1 000`, `10^3`), but
  `1,5` is not 15; numbers below 0.005, which all round to 0.00, are compared to two digits; `5kg`
  is the number 5 and `CO2` is none; nan and inf are words; `2.5 million` is 2,500,000, `minus 5` is
  -5, and the parts of `5-10`, `12:30` and `2024-05-01` are no numbers;
- a unit may be left out: `42` is right where the key is `42 apples`, but `2` not for `2x`;
- an answer that is the key as a whole is right (`y = 2x`, or `5` for `x = 5`), and a last paragraph
  of a few words is an answer to an open question.
"""

from collections.abc import Sequence

from dreamprm_dist.evaluation.answer_keys import read_key
from dreamprm_dist.evaluation.answers import (
    numbers,
    open_texts,
    open_votes,
    read,
    same_number,
    tail,
    unwrap,
    value,
    whole_words,
)
from dreamprm_dist.evaluation.choices import parse_choice
from dreamprm_dist.evaluation.markup import plain


def grade(solution: str, answer: str | Sequence[str], options: Sequence[str] = ()) -> bool | None:
    """Whether a solution's final answer is right; None when it has no answer to be read.

    Args:
        answer: the key, as `read_key` takes it.
        options: texts of the options; none for an open question.

    Raises:
        RecordError: the key is no answer to the question.
    """
    accepted = read_key(answer, options)
    if options:
        choice = parse_choice(solution, options)
        return None if choice is None else choice in accepted
    reading = read(solution)
    texts = open_texts(reading)
    if not texts:
        return None
    return any(_is_right([*texts, reading.text], plain(text)) for text in accepted)


def _is_right(texts: Sequence[str], key: str) -> bool:
    """Whether plain texts hold the key; the last of them only as a whole."""
    *have, whole = map(value, texts)
    want = value(key)
    if want.number is None:
        words = whole_words([want.text])
        named = value(tail(key))  # the 5 of `x = 5`
        if whole == want or (whole.number is not None and whole == named):
            return True
        return any(x.number is None and words.search(x.text) for x in have)
    same = [x for x in have if x.number is not None and same_number(x.number, want.number)]
    if want.text:
        words = whole_words([unwrap(key)])
        return any(x.text in ("", want.text) for x in same) or any(map(words.search, texts[:-1]))
    found = (number for text in texts[:-1] for number in numbers(text))
    return bool(same) or any(same_number(number, want.number) for number in found)


def votes(solutions: Sequence[str], options: Sequence[str] = ()) -> list[str | None]:
    """The answer of each solution of one question, None where it is unparsed.

    Answers that `grade` takes for the same are equal: letters of a choice, normal forms of others.
    """
    if options:
        return [parse_choice(solution, options) for solution in solutions]
    return open_votes(solutions)
