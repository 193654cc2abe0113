"""Answers are read whatever stands around them, and equal answers are equal votes."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamprm_dist.evaluation.answers import extract_answer
from dreamprm_dist.evaluation.grading import grade, parse_choice, votes
from dreamprm_dist.evaluation.markup import plain
from dreamprm_dist.evaluation.questions import read_meta_questions, read_test_questions
from dreamprm_dist.prm.solutions import steps_conversation

VITAMINS = ["Vitamin A", "Vitamin C", "Vitamin D", "Vitamin K"]
PLANTS = ["a rose", "a fern", "A Venus flytrap", "A 45 degree angle"]
PLANS = ["Plan A", "Plan B", "Hepatitis B", "point A"]
PAIRS = ["A only", "B only", "Both A and B", "Neither A nor B"]
NUMBERS = ["12", "24", "36 cm", "4,800"]
BLOOD = ["A+", "A-", "AB-", "O"]

# Whatever is nested of these around an answer, or half of it, is no part of the answer.
WRAPPERS = [
    "**{}**", "__{}__", "*{}*", "_{}_", "`{}`", "***{}***", "<b>{}</b>", "<strong>{}</strong>",
    '<span class="x">{}</span>', "${}$", "$${}$$", r"\({}\)", r"\[{}\]", r"\boxed{{{}}}",
    r"\text{{{}}}", r"\mathbf{{{}}}", r"\mathrm{{{}}}", r"\textbf{{{}}}", r"\emph{{{}}}",
    "({})", "[{}]", "{{{}}}", '"{}"', "“{}”", "«{}»", "「{}」", "【{}】", "（{}）", "〔{}〕", "{}.",
    "{}。", "\u200b{}\u2060", "{}</s>", "{}<|im_end|>", "**{}", "{}**",
    "`{}", "({}", "{}]", "<b>{}", r"\boxed{{{}", "${}",
]  # fmt: skip
LABELS = [
    "Answer: {}", "Answer:\u3000{}\xa0", "**Answer:** {}", "**Answer:**\n{}",
    "**Answer:**\n\n{}", "**Answer: {}**", "### Answer: {}", "## Final Answer\n\n{}",
    "Answer：{}", "__Answer__: {}", "`Answer: {}`",
    "> Answer: {}", "- **Answer:** {}", "1. Answer: {}", "[Answer]: {}", "<answer>{}</answer>",
    "<answer>\n{}\n</answer>", "<b>Answer:</b> {}", r"\textbf{{Answer:}} {}", "ANSWER: {}",
    "Final Answer: {}", "The final answer is: {}", "✅ **Answer:** {}", "Answer:\n$$\n{}\n$$",
    "<think>Answer: A</think>\nAnswer: {}", r"\boxed{{{}}}", "{}",
]  # fmt: skip


def in_wrappers(text: str, wrappers: list[str]) -> str:
    for wrapper in wrappers:
        text = wrapper.format(text)
    return text


nested = st.lists(st.sampled_from(WRAPPERS), max_size=3)
labels = st.sampled_from(LABELS)


@settings(max_examples=200)
@given(st.sampled_from("ABCD"), nested, labels)
def test_a_letter_is_read_in_any_wrapper(letter: str, wrappers: list[str], label: str) -> None:
    solution = "Look at (C) and vitamin B.\n\n" + label.format(in_wrappers(letter, wrappers))
    assert parse_choice(solution, VITAMINS) == letter
    assert grade(solution, letter, VITAMINS) is True
    assert votes([solution, letter], VITAMINS) == [letter, letter]


@settings(max_examples=200)
@given(
    st.sampled_from(
        ["42", "-3.5", "1,000", "1/2", "Paris", "left kidney", "H2O", "π", "42 apples"]
    ),
    nested,
    labels,
)
def test_an_open_answer_is_read_in_any_wrapper(answer, wrappers, label) -> None:
    solution = "It grows by 7.\n\n" + label.format(in_wrappers(answer, wrappers))
    assert grade(solution, answer) is True
    assert grade(solution, "7") is False
    first, second = votes([solution, f"Answer: {answer}"])
    assert first == second is not None


# What a solution says, its options, and the letter that this is; None: nothing can be read.
CHOICES = [
    # the label rules over letters in the text behind it, with and without `Answer:`
    ("B. Vitamin C", VITAMINS, "B"),
    ("(B) Vitamin C", VITAMINS, "B"),
    ("**B)** Vitamin C", VITAMINS, "B"),
    ("B - Vitamin D", VITAMINS, "B"),
    ("b) vitamin C", VITAMINS, "B"),
    ("Answer: B; Vitamin C", VITAMINS, "B"),
    ("Answer: **B** Vitamin C", VITAMINS, "B"),
    ("Answer: B, for vitamin C is an acid", VITAMINS, "B"),
    ("The answer is B – Vitamin C.", VITAMINS, "B"),
    (r"\boxed{\text{B: Vitamin C}}", VITAMINS, "B"),
    ("Some are fat-soluble.\n\nB. Vitamin C", VITAMINS, "B"),
    ("B. Vitamin C\n\nIt is an acid, unlike vitamin D.", VITAMINS, "B"),
    ("C: A Venus flytrap", PLANTS, "C"),
    ("D. A 45 degree angle", PLANTS, "D"),
    ("C. A venus fly trap", PLANTS, "C"),
    ("Answer: A a rose", PLANTS, "A"),
    ("C) Hepatitis B", PLANS, "C"),
    ("Answer: D, point A", PLANS, "D"),
    ("B. Plan B", PLANS, "B"),
    ("A: Plan A, and not plan B", PLANS, "A"),
    ("C. Both A and B", PAIRS, "C"),
    # letters inside of an option's text choose nothing
    ("It is Vitamin C.", VITAMINS, "B"),
    ("The answer is A Venus flytrap", PLANTS, "C"),
    ("The answer is A 45 degree angle.", PLANTS, "D"),
    ("Answer: Hepatitis B", PLANS, "C"),
    ("The patient has, by all of these signs, Hepatitis B", PLANS, "C"),
    ("I think that both A and B are right here", PAIRS, "C"),
    ("Answer: Neither A nor B", PAIRS, "D"),
    ("I take B here, for A 45 degree bend is shown", PLANTS, "B"),
    ("I take B here, for A Venus it is not", PLANTS, "B"),
    # an option's text or number
    (r"So it is $\boxed{24}$.", NUMBERS, "B"),
    ("Answer: 24.0", NUMBERS, "B"),
    (r"\boxed{36}", NUMBERS, "C"),
    ("Answer: 24 cm", NUMBERS, "B"),
    ("x + 12 = 4800", NUMBERS, "D"),
    ("Answer: A-", BLOOD, "B"),
    ("Answer: O", BLOOD, "D"),
    ("It measures exactly 24.5 cm in all of these pictures", NUMBERS, None),
    # what is stated in other words
    ("<think>Answer: A</think>\nB", VITAMINS, "B"),
    ("B", VITAMINS, "B"),
    ("~~A~~ B", VITAMINS, "B"),
    ("It is so.\n\n[B]", VITAMINS, "B"),
    ('{"reasoning": "(A) is near", "answer": "B"}', VITAMINS, "B"),
    ('```json\n{\n  "answer": "B"\n}\n```', VITAMINS, "B"),
    ("The answer is 'B'", VITAMINS, "B"),
    ("Answer: A because it is red", VITAMINS, "A"),
    ("Answer: B. C is too large.", VITAMINS, "B"),
    ("(A)? No.\n\nAnswer: \\boxed{B}", VITAMINS, "B"),
    ("First \\boxed{A}, but then\n\n$$\n\\boxed{B}\n$$", VITAMINS, "B"),
    ("(D) would go too far. Hence (C).", VITAMINS, "C"),
    ("Hmm.\n◁/think▷B", VITAMINS, "B"),
    ("Is it (A)?[/THINK]B", VITAMINS, "B"),
    ("<|channel|>analysis<|message|>A?<|end|><|channel|>final<|message|>B", VITAMINS, "B"),
    ("Answer: 🅑", VITAMINS, "B"),
    ("Answer: 🅱\ufe0f Vitamin C", VITAMINS, "B"),
    ("Answer: ⒝", VITAMINS, "B"),
    ("因此答案是B", VITAMINS, "B"),
    ("维生素不同，故选B。", VITAMINS, "B"),
    ("正确选项为 B", VITAMINS, "B"),
    ("Answer: A rose", ["cactus", "rose"], "B"),
    ("Answer: the fern", PLANTS, "B"),
    ("Answer: Rose", PLANTS, "A"),
    ("Answer: Not A, but B", VITAMINS, "B"),
    ("Answer: B (not A)", VITAMINS, "B"),
    ("[answer]B[/answer]", VITAMINS, "B"),
    ("【答案】B", VITAMINS, "B"),
    ("因此选择B。", VITAMINS, "B"),
    ("So boxed{B}", VITAMINS, "B"),
    ("So \x08oxed{\text{B}}", VITAMINS, "B"),  # of JSON with one backslash
    ("The answer is b.", VITAMINS, "B"),
    ("Answer: It is not A, so it is B", VITAMINS, "B"),
    ("Answer: 2 π", ["$2\\pi$", "$\\pi$"], "A"),
    # a letter that is ruled out is not chosen
    ("None of A, B, C, and D", VITAMINS, None),
    ("选A和B", VITAMINS, None),
    ("Answer: probably B, but could be D", VITAMINS, None),
    ("The answer is not B.", VITAMINS, None),
    ("The answer isn't (B)", VITAMINS, None),
    ("Answer: not option B", VITAMINS, None),
    ("Answer: B is wrong", VITAMINS, None),
    ("Answer: neither A nor B", VITAMINS, None),
    ("It is not (A), not (B), not (C) and not (D).", VITAMINS, None),
    ("(B) is incorrect", VITAMINS, None),
    ("Answer: A to C", VITAMINS, None),
    # nothing to be read
    ("Answer: **A** or **B**", VITAMINS, None),
    (r"Answer: \boxed{A} or \boxed{B}", VITAMINS, None),
    ("Answer: A/B", VITAMINS, None),
    ("Answer: [A, B]", VITAMINS, None),
    ("Answer: A, B are right", VITAMINS, None),
    ("Answer: A cat", VITAMINS, None),
    ("(A), or rather (B).\n\n**Answer:**", VITAMINS, None),
    ("The side is a", VITAMINS, None),
    ("I have no idea", ["yes", "no"], None),
    ("Answer: (F)", VITAMINS, None),
]


@pytest.mark.parametrize(("solution", "options", "letter"), CHOICES)
def test_choices(solution: str, options: list[str], letter: str | None) -> None:
    assert parse_choice(solution, options) == letter


# In each line the ways of writing one answer, the key first.
EQUAL = [
    ["42", "42.0", "４２", "+42", "42 apples", "$42", r"42\text{ apples}", r"\frac{84}{2}", "≈ 42",
     "4.2e1", r"4.2\times 10^{1}", "about 42", "approximately 42", "approx. 42", "USD 42"],
    ["1000", "1,000", "1 000", r"1\,000", "1{,}000", "1'000", "1\u202f000", "1,000.00", "1000 km",
     "10^3", "10³"],
    ["42 cm^2", "42 cm²", r"42\,\mathrm{cm}^2", r"\textcolor{red}{42}"],
    ["0.5", "1/2", r"\frac12", r"\dfrac{1}{2}", "½", ".5", "0.50", "5e-1"],
    ["1.5", "1 1/2", "1½", "3/2"],
    ["-5", "−5", "–5", "-5.0", "－5", "-5 °C", "minus 5", "negative 5"],
    ["50%", r"50\%", "50 percent", "50％", "50"],
    ["42 apples", "42", "42 Apples", "**42** apples"],
    ["Paris", "PARIS", "Ｐａｒｉｓ", "𝐏𝐚𝐫𝐢𝐬", r"\text{Paris}", "“Paris”"],
    ["left kidney", "Left  kidney", "left\xa0kidney", "left kid\u00adney"],
    ["don't know", "don’t know", "'Don't know.'"],
    ["well-known", "well‑known", "well–known"],
    ["élan", "e\u0301lan", "&eacute;lan"],
    ["H2O", "H₂O", r"\mathrm{H_2O}", "H<sub>2</sub>O"],
    ["x^2", "x²", "x^{2}", "x<sup>2</sup>"],
    ["90°", r"90^\circ", r"90^{\circ}", "90º", "90 degrees"],
    ["20 °C", "20°C", "20 degrees Celsius", "20 degrees C"],
    ["5 N", r"5\ \mathrm{N}", "5.0 N", "5"],
    ["5 μC", r"$5\ \mu\text{C}$", "5 µC"],
    ["x > 5", r"x \gt 5", "x&gt;5"],
    ["lord of the rings", "The Lord of the Rings"],
    ["1.6e-19 C", "1.6 × 10⁻¹⁹ C", "1.6e-19"],
    ["2500000", "2.5 million", "2,500 thousand"],
    ["2:3", "2 : 3", "2∶3"],
    ["±5", r"\pm 5", "± 5"],
    ["√2", r"\sqrt 2", r"\sqrt{2}", "sqrt(2)"],
    ["π/2", "pi/2", r"\frac{\pi}{2}"],
    ["Ca2+", "Ca²⁺", r"\mathrm{Ca}^{2+}"],
    ["(3, 4)", "(3,4)", r"\left( 3, 4 \right)"],
    ["y = 2x + 3", "y=2x+3", "$y = 2x + 3$"],
    ["π", r"\pi", r"$\boxed{\pi}$"],
    ["λ", r"\lambda", r"$\mathbf{\lambda}$"],
    ["Δ", r"\Delta", r"$\text{\Delta}$"],
]  # fmt: skip


@pytest.mark.parametrize("forms", EQUAL, ids=lambda forms: forms[0])
def test_equal_answers_are_right_and_equal_votes(forms: list[str]) -> None:
    solutions = [f"So it is.\n\nAnswer: {form}" for form in forms]
    assert [grade(solution, forms[0]) for solution in solutions] == [True] * len(forms)
    assert len({*votes([f"Answer: {form}" for form in forms])} - {None}) == 1


def test_the_number_alone_is_right_where_the_key_names_it() -> None:
    assert grade("Answer: 5", "x = 5") is True
    assert grade("Answer: y = 5", "x = 5") is False
    assert grade("Answer: 4", "x = 5") is False


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        ("1,5", "15"), ("10²", "102"), ("10<sup>2</sup>", "102"), ("1½", "11/2"), ("1/2", "2"),
        ("5 m", "5 km"), ("42 pears", "42 apples"), ("about 142 apples", "42 apples"), ("5", "-5"),
        ("4.2", "42"), ("[0, 1)", "(0, 1)"), ("x^2", "x2"), ("H2O", "H2"), ("5!", "5"),
        ("< 5", "> 5"), ("0.001", "0.002"), ("~~42~~ 41", "42"),
        ("2", "2x"), ("3", "3π"), ("2", "2 sin x"), ("5 cm", "5 cm²"), ("10^3", "103"),
        ("e^{2x}", "e^2x"), (r"\sqrt{x+1}", r"\sqrt{x}+1"), ("minus 5", "5"), ("5-10", "5"),
        ("12:30", "12"), ("2024-05-01", "5"), ("2:3", "3"), ("2.5", "2.5 million"),
        ("5 N", "5 A"), ("sum of the parts", "sum of parts"), ("x^2+1", "x2+1"),
    ],
)  # fmt: skip
def test_different_answers_are_wrong_and_different_votes(answer: str, key: str) -> None:
    assert grade(f"Answer: {answer}", key) is (answer == "5!")  # it holds a 5, by MMMU
    first, second = votes([f"Answer: {answer}", f"Answer: {key}"])
    assert first != second


def test_a_unit_may_be_left_out_unless_several_are_in_question() -> None:
    assert votes(["Answer: 5 km", "Answer: 5", "It is 5 km"]) == ["5", "5", "5"]
    assert votes(["Answer: 5 km", "Answer: 5", "Answer: 5 m"]) == ["5 km", "5", "5 m"]


def test_options_written_in_the_question_are_options(tmp_path) -> None:
    question = "Which?\n\nOptions: (A) Vitamin A (B) Vitamin C"
    responses = ["Answer: B", "B. Vitamin C", "Answer: Vitamin C", "**Answer:** (A)", "No idea"]
    test = {"question": question, "candidates": responses, "true_false": [True] * 5}
    meta = [
        {
            "id": "7",
            "true_false": True,
            "response": response,
            "conversations": steps_conversation(question, [response]),
        }
        for response in responses
    ]
    for name, records in (("test", [test]), ("meta", meta)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, records)))
    (read,) = read_test_questions(str(tmp_path / "test"))
    assert read.answers == ["B", "B", "B", "A", None]
    (read,) = read_meta_questions(str(tmp_path / "meta"), tmp_path)
    assert read.answers == ["B", "B", "B", "A", None]


def test_letters_of_real_solutions_are_their_verdicts(reference_dir: Path, tmp_path) -> None:
    records = (reference_dir / "mmmu_pro_meta_sample.json").read_text(encoding="utf-8")
    (tmp_path / "meta.json").write_text(
        json.dumps([record | {"image": None} for record in json.loads(records)])
    )
    questions = read_meta_questions(str(tmp_path / "meta.json"), tmp_path)
    assert sum(answer is None for question in questions for answer in question.answers) == 3
    for question in questions:
        verdicts = {*zip(question.answers, question.true_false, strict=True)}
        assert sum(right for _, right in verdicts) <= 1  # one letter is right, and always
        assert len({answer for answer, _ in verdicts}) == len(verdicts)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("So it is.\n\nAnswer: B", "B"),
        ("Answer: A\n\nNo, wait.\n\nAnswer: c", "C"),
        ("Answer: C\nbecause of that", "C"),
        ("Answer: 3.14", "3.14"),
        ("Answer: 3.14159", "3.14"),
        ("Answer: C > D > A > B", "c>d>a>b"),
        ("Answer: (a) or (b)", "(a) or (b)"),
        ("Answer: No", "no"),
        ("[Reasoning]\n(b)", "B"),
        ("It is B", "B"),
        ("7", "7"),
        ("One.\n\n42", "42"),
        ("Two and two are, as is known, = 4", "4"),
        ("I will have to think of this some more", None),
        ("First 3.\nThen 4.", None),
        ("Answer:", None),
        ("Answer: **.**", None),
        ("Answer: B\n\nAnswer:", None),
        ("", None),
    ],
)
def test_extract_answer(solution: str, answer: str | None) -> None:
    assert extract_answer(solution) == answer


hostile_texts = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(
            [*"()[]{}<>'\"*_`$\\^~=.,:;!?-+/ AbI1\n", "\\boxed{", "<b>", "is ", "1,000"]
        ),
        max_size=12,
    ).map("".join),
)


@pytest.mark.parametrize("forms", EQUAL, ids=lambda forms: forms[0])
def test_a_normal_answer_stays_as_it_is(forms: list[str]) -> None:
    for form in forms:
        answer = extract_answer(f"Answer: {form}")
        assert extract_answer(f"Answer: {answer}") == answer


@given(hostile_texts)
def test_any_text_has_one_answer_in_one_line_or_none(text: str) -> None:
    answer = extract_answer(text)
    assert answer is None or (answer.strip() == answer != "" and "\n" not in answer)
    assert len({*votes([text, text])}) == 1


@given(hostile_texts)
def test_plain_text_is_plain(text: str) -> None:
    once = plain(text)
    assert not any(mark in once for mark in ("\\", "$", "`", "  ", "\u200b", "\t"))


@pytest.mark.parametrize(
    "part",
    [
        "*", "_", "`", "~", "(", "[", "{", "<", "((((a", "'", '"', "'a' ", "$", "\\", "\\boxed{",
        "\\frac{", "\\text{", "^{", "<b>", "<a b=", "<answer>", "&amp;", "#", "> ", "- ", "is ",
        "=", "1,", "1/", "1 ", "1.", "1e", "10^", "(A) ", "A ", "or A ", "Answer:", "Answer:\n",
        "\n", " \n", "½", "²", "…", "the final correct ",
    ],
)  # fmt: skip
def test_hostile_text_takes_time_in_proportion(part: str) -> None:
    def seconds(length: int) -> float:
        text = (part * length)[:length]
        start = time.process_time()
        for solution in (text, f"Answer: {text}"):
            grade(solution, "A", VITAMINS)
            grade(solution, "42")
            extract_answer(solution)
        return time.process_time() - start

    short, long = (min(seconds(length) for _ in range(2)) for length in (3_000, 24_000))
    assert long < 0.2 + 24 * short  # 8 times as long: linear is 8, quadratic 64
