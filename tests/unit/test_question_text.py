"""When a prompt asks a protected question: in any form around it, and only that question."""

import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.question_text import LONG_QUESTION, QuestionIndex, question_tokens

STEM = "Which of the marked organs in the drawing of the frog pumps the blood through its body?"
SHORT = "Which organ is marked?"
INSTRUCTION = (
    "<image>\nYour task is to solve what follows. Reason in steps first, and when you are done, "
    'write "Final answer: ..".\n\nQuestion:\n\n{}'
)
TRAILING = "{}\nAnswer the preceding question. The last line is your 'Answer: $VALUE'. Think first."
PROMPTS = (
    "{}",
    "### Question:\n{}\n\n### Solution Process:\nThe frog lies on its back.",
    "### Question:\nQuestion: {}",
    INSTRUCTION,
    "### Question:\n" + INSTRUCTION,
    TRAILING,
    "Hint: give the letter, e.g., A, B, C, D, at the end.\nQuestion: {}",
    "<image>\n{}\nAnswer with the option's letter from the given choices directly.",
    "{} Please answer directly with a word.",
    "[Question]\n{}",
    "**Question 12:** {}",
    "请看图。\n问题：{}",
    "<question>{}</question>",
    "<image>\nUSER: {}\nASSISTANT:",
    "3. {}",
    "Q7. {}",
    "## Problem\n{}",
    "【题目】{}",
    "{}\nLet's think step by step.",
    "{} Please select the correct one of the options.",
    "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
    "{}请选择正确答案。",
)
FORMATS = (
    "\nA. {}\nB. {}\nC. {}\nD. {}",
    "\n(A) {} (B) {} (C) {} (D) {}",
    " A) {} B) {} C) {} D) {}",
    "\nChoices:\n(A) {}\n(B) {}\n(C) {}\n(D) {}",
    "\nChoices:\nA:{}\nB:{}\nC:{}\nD:{}",
    "\n\nOptions: (A) {} (B) {} (C) {} (D) {}",
    "\n**Options**:\n- A: {}\n- B: {}\n- C: {}\n- D: {}",
    " Answer choices: a. {}; b. {}; c. {}; d. {}",
    "\n选项：\nA、{}\nB、{}\nC、{}\nD、{}",
    "\n[A] {}\n[B] {}\n[C] {}\n[D] {}",
    "\n【A】{}\n【B】{}\n【C】{}\n【D】{}",
    "\nOption A: {}\nOption B: {}\nOption C: {}\nOption D: {}",
    "\n<A> {}\n<B> {}\n<C> {}\n<D> {}",
    "\nA | {}\nB | {}\nC | {}\nD | {}",
    "\nPossible answers:\n{}\n{}\n{}\n{}",
    "\nChoose from: {}; {}; {}; {}",
)
words = st.text(string.ascii_lowercase, min_size=2, max_size=8)


def asks(question, prompt):
    index = QuestionIndex()
    index.add(question, "here")
    return index.find([prompt]) == "here"


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("stem", [STEM, SHORT], ids=["long", "short"])
def test_whatever_stands_around_a_question_does_not_matter(prompt, stem):
    assert len(question_tokens(SHORT)) < LONG_QUESTION < len(question_tokens(STEM))
    options = FORMATS[5].format("heart", "liver", "lung", "eye")
    for asked in (stem, stem + FORMATS[1].format("liver", "heart", "bone", "skin")):
        assert asks(f"Question: {stem}{options}", prompt.format(asked))
        assert asks(prompt.format(asked), f"Question: {stem}{options}")
    assert not asks(f"Question: {stem}", prompt.format(stem.replace("organ", "muscle")))


@settings(deadline=None)  # a busy machine is slow, not wrong
@given(
    st.lists(words, min_size=3, max_size=20),
    st.lists(words, min_size=8, max_size=8),
    st.sampled_from(FORMATS),
    st.sampled_from(FORMATS),
    st.sampled_from(["?", ":", "."]),
)
def test_a_question_is_the_same_in_any_format_of_its_options(stem, options, one, other, end):
    text = "Of " + " ".join(stem) + end
    assert asks(text + one.format(*options[:4]), text + other.format(*options[4:]))
    assert question_tokens(text + one.format(*options[:4])) == question_tokens(text)


@settings(deadline=None)  # a busy machine is slow, not wrong
@given(
    st.lists(st.sampled_from("3 4.5 17 x y (a".split()), min_size=3, max_size=6),
    st.randoms(),
    st.sampled_from(
        ["Find {}.", "Determine the value of {} for the two numbers shown in the figure."]
    ),
)
def test_formulas_that_differ_in_one_sign_are_different_questions(terms, rng, text):
    signs = [rng.choice("+-×/<>=^") for _ in terms[1:]]
    changed = list(signs)
    place = rng.randrange(len(signs))
    changed[place] = random.Random(rng.random()).choice(sorted(set("+-×/<>=^") - {signs[place]}))

    def formula(signs):
        parts = [f" {sign} {term}" for sign, term in zip(signs, terms[1:], strict=True)]
        return text.format(terms[0] + "".join(parts))

    assert asks(formula(signs), TRAILING.format(formula(signs)))
    assert not asks(formula(signs), TRAILING.format(formula(changed)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Find 3 − 4.", "find 3-4"),
        ("Which organ is it?\na) liver\nb) heart", "Which organ is it?"),
        ("The organ is:\n(a) liver\n(b) heart", "The organ is"),
        ("Find Δx.", r"Find $\Delta x$."),
        ("Is A∉B?", r"Is $A \not\in B$?"),
        ("Is x ≠ 5?", r"Is x \not= 5?"),
        ("Is ABC ≅ DEF?", r"Is $ABC \cong DEF$?"),
        ("Is p ⇒ q?", r"Is $p \Rightarrow q$?"),
        ("Is p ⇒ q?", "Is p => q?"),
        ("Find 1½.", r"Find $1\frac{1}{2}$."),
        ("Find (a+1)/b.", r"Find $\frac{a+1}{b}$."),
        ("Find √(x+1).", r"Find $\sqrt{x+1}$."),
        ("Is <b>it</b> H<i>x</i>?", "Is it Hx?"),
        ("Find 3 · 4.", "Find 3 * 4"),
        ("Find 3 x 4.", "Find $3 \\times 4$."),
        ("Find x² + y₁.", "Find $x^{2} + y_1$."),
        ("Is x ≤ 3?", "Is x <= 3?"),
        ("Is x ≠ 3?", r"Is \(x \neq 3\)?"),
        ("Find 10⁻³ m.", "Find $10^{-3}$ m."),
        ("If θ = 30°, find sin θ.", r"If $\theta=30^\circ$, find $\sin\theta$."),
        ("Find ½ of 1,500.", r"Find $\frac{1}{2}$ of 1500."),
        ("Is .5 < 1?", "Is 0.5 &lt; 1?"),
        ("A well-known x-axis", "a well known x axis"),
        ("＜image 1＞ What’s the Ａrea?", "<image 1>what's the area"),
        ("See the figure (<image 1>).", "See the figure."),
        ("Find √2 ÷ π.", r"Find $\sqrt{2} / \pi$"),
    ],
)
def test_forms_of_one_question(one, other):
    assert asks(one.replace("＜", "<").replace("＞", ">"), other)
    assert question_tokens(one.replace("＜", "<").replace("＞", ">")) == question_tokens(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Find 1.5 m.", "Find 15 m."),
        ("Find 1½.", "Find 11/2."),
        (r"Find \frac{a+1}{b}.", r"Find a+\frac{1}{b}."),
        (r"Find \sqrt{x+1}.", r"Find \sqrt{x}+1."),
        ("Find e^{x+1}.", "Find e^x+1."),
        ("Is A ∈ B?", r"Is A \notin B?"),
        ("Is p ⇒ q?", "Is p → q?"),
        ("See the circle. Please provide its area.", "See the circle."),
        ("Find f(x).", "Find f'(x)."),
        ("Find 2(x + 1).", "Find 2x + 1."),
        ("Find x^2.", "Find x_2."),
        ("Find 5!", "Find 5"),
        ("Is it 3:4?", "Is it 3/4?"),
        ("Is it 5%?", "Is it 5?"),
        ("Find |x|.", "Find x."),
        ("Is x ≤ 3?", "Is x < 3?"),
        ("Find ∫x.", "Find ∑x."),
        ("Find -x.", "Find x."),
        ("Is p ⇒ q?", "Is p ⇐ q?"),
        ("What is 3 △ 4?", "What is 3 □ 4?"),
        ("How much is €5?", "How much is £5?"),
        ("Find 30°.", "Find 30."),
        ("If P(A) = 0.5 and P(B) = 1, find P(A).", "If P(A) = 0.5 and P(B) = 1, find P(B)."),
        ("It goes from point A. It stops at B. How far?", "It goes from point A. How far?"),
        ("It goes from point A. It stops at point B. Why?", "It goes from point A. How far?"),
        ("Do (A), (B) and (C) touch?", "Do (A), (B) and (C) overlap?"),
        ("Do (A) and (B) touch?", "Do (A) and (C) touch?"),
        ("何が見えますか", "何が聞こえますか"),
    ],
)
def test_different_questions(one, other):
    assert not asks(one, other)
    assert not asks(other, one)


def test_a_short_question_in_the_midst_of_another_is_not_asked():
    for prompt in (
        "What is shown in the left picture?",
        "Look closely. What is shown? Then name its colour.",
        "A cat sits there.\nWhat is shown besides it?",
        "Explain what is shown",
    ):
        assert not asks("What is shown?", prompt)


def test_a_long_question_is_asked_as_a_sentence_of_a_longer_prompt_but_not_as_its_piece():
    assert asks(STEM, f"Look at the drawing. {STEM} Reason step by step.")
    assert asks(STEM, f'Tell me, "{STEM}"')
    assert asks(STEM.rstrip("?"), f"Now ({STEM}) in one word")
    assert not asks(STEM, STEM.rstrip("?") + " and its legs?")
    formula = "What is the value of the expression in the box, which is 3 + 4"
    assert asks(formula, formula + "?")
    assert not asks(formula, formula + " × 2?")
    value = "3 + 4 is what the box of the picture shows as its value"
    assert asks(value, f"Look: {value}.")
    assert not asks(value, f"2 × {value}.")


@pytest.mark.parametrize(
    "text", ["<image>?", "", "...", "\n\nOptions: (A) 1 (B) 2", "### Question:\n"]
)
def test_what_has_no_words_is_no_question(text):
    assert not asks(text, text)


@pytest.mark.parametrize(
    "text",
    [
        "(A) (B) ",
        "A. B. ",
        "\n",
        " ",
        "options: ",
        "\\frac{",
        "question:",
        "- * ",
        "1 x ",
        "((",
        "^",
    ],
)
def test_hostile_texts_take_no_longer_than_others(text):
    assert len(question_tokens(text * (200_000 // len(text)) + "end")) >= 0


@pytest.mark.parametrize("options", [" (A) old (B) new (C) odd", " A. old B. new C. odd"])
def test_options_may_end_the_sentence_that_the_question_begins(options):
    assert question_tokens(f"The style of this is{options}") == "the style of this is".split()


def test_the_parts_of_a_problem_are_no_options():
    assert question_tokens("See it.\n(a) Find x.\n(b) Find y.")[-2:] == ["find", "y"]
