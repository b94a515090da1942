"""Answers as models write them, each with what it says; None where it says nothing definite."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceptio_hf.evaluation.metrics.answer_parsing import answer_choice, answer_letter, reference_letter
from perceptio_hf.evaluation.metrics.answer_statements import without_steps

SAID = [
    # a letter on its own
    ("A", "A"),
    ("(A)", "A"),
    ("A.", "A"),
    (" B\n", "B"),
    ("b", "B"),
    ("(c)", "C"),
    ("c)", "C"),
    ("[D]", "D"),
    ("**B**", "B"),
    ('"C"', "C"),
    ("`A`", "A"),
    ("（Ｂ）", "B"),
    ("Point B", "B"),
    ("point c.", "C"),
    ("Option D", "D"),
    ("A p27 d21 B p03 d09: A", "A"),  # steps as a Perceptio writes them
    ("The point labeled B.", "B"),
    ("The red circle marked with (C)", "C"),
    ("So, B.", "B"),
    ("<answer>B</answer>", "B"),
    ("B<|im_end|>", "B"),
    ("[SEG] <DEPTH_START><DEPTH_17><DEPTH_3><DEPTH_END> B", "B"),
    ("<think>A is near. The answer is A, or B?</think>C", "C"),
    # a letter that leads
    ("B. The chair", "B"),
    ("B.The chair", "B"),
    ("(B) because it is lowest in the picture", "B"),
    ("C: the one on the table", "C"),
    ("D - it is on the sofa", "D"),
    ("A, because it lies on the floor", "A"),
    ("(C) Point C is the closest to the camera.", "C"),
    # the answer is
    ("The answer is C", "C"),
    ("the answer is c.", "C"),
    ("The answer is (B).", "B"),
    ("Answer: (D)", "D"),
    ("Answer: b", "B"),
    ("**Answer:** A", "A"),
    ("### Final answer:\n\nB", "B"),
    ("The correct answer is option B, the chair.", "B"),
    ("The correct answer to this question would be: (A)", "A"),
    ("Option B is correct.", "B"),
    ("C is the right answer.", "C"),
    (r"So the answer is $\boxed{\text{D}}$.", "D"),
    ("The answer is A because the point is on the floor", "A"),
    ("I think it's B.", "B"),
    ("I would say point C.", "C"),
    ("I'd go with D", "D"),
    ("It is point A.", "A"),
    ("My guess would be (C).", "C"),
    ("The answer is not A but B.", "B"),
    ("The answer is B, not A.", "B"),
    ("It could be A or B, but the answer is A.", "A"),
    ("The answer is A. Wait, C lies lower. So the answer is C.", "C"),
    # is closest
    ("Point B is closest", "B"),
    ("Point B is the closest to the camera.", "B"),
    ("point a is closest to the camera", "A"),
    ("A is closest", "A"),
    ("B appears to be the closest point.", "B"),
    ("Point B, where the child is sitting, is the nearest.", "B"),
    ("The point closest to the camera is B.", "B"),
    ("The closest point to the camera is the one labeled C.", "C"),
    ("Closest: D", "D"),
    ("Among A, B, C and D, point C is the closest.", "C"),
    ("Of the three points (A, B, C), B seems to be nearest to the viewer.", "B"),
    ("Compared to A and C, B is closest.", "B"),
    ("Point A is farthest, while point C is closest.", "C"),
    ("The farthest point is A, the nearest is B.", "B"),
    ("The farthest is C, the closest A.", "A"),
    ("Farthest: A, nearest: B", "B"),
    ("The middle point is B, closest is C", "C"),
    ("The second is C, nearest is A", "A"),
    ("A, the closest of all, then B and C", "A"),
    ("Ans: B", "B"),
    ("Result: B", "B"),
    ("I choose B", "B"),
    ("Answer - B", "B"),
    ("Point D is closest, followed by A, and then B.", "D"),
    ("A is on the wall, B is on the floor, and C is on the sofa. Therefore, B is the closest.", "B"),
    ("(A) is on the wall. (B) is on the floor. (C) is on the sofa. The closest one is (B).", "B"),
    ("At first A looks the closest. But B overlaps it, so B is closest.", "B"),
    ("I'm not sure, but B seems closest.", "B"),
    ("If I had to choose, point B is the closest.", "B"),
    ("Which point is closest to the camera? Point B.", "B"),
    ("Point B is closer to the camera than all the others.", "B"),
    ("B is closer than A, C and D.", "B"),
    ("The lamp labeled B is the closest, and the second closest is D.", "B"),
    ("B (closest)", "B"),
    ("A is closer than the lamp, which is circled in red and labeled C. The closest point is A.", "A"),
    ("Point B is closer to the camera.", "B"),
    ("A point near the door is far away. Point C is closest.", "C"),
    # Chinese
    ("选项B", "B"),
    ("选项（Ｂ）", "B"),
    ("B选项", "B"),
    ("选B", "B"),
    ("我选择B", "B"),
    ("答案是B", "B"),
    ("答案：B。", "B"),
    ("正确答案是(B)。", "B"),
    ("因此，答案是 C。", "C"),
    ("根据图片，答案选D", "D"),
    ("我认为是B", "B"),
    ("B是正确的", "B"),
    ("答案是A而不是B", "A"),
    ("点B离相机最近", "B"),
    ("离相机最近的点是B。", "B"),
    ("图中有A点、B点和C点，其中C点离相机最近。", "C"),
]
NOTHING = [
    # no answer
    "",
    "  \n",
    "?",
    "...",
    "I cannot tell.",
    "I can't determine which point is closest.",
    "I'm sorry, but I cannot help with that.",
    "None of the points is closest.",
    "The points are at different depths.",
    "closest",
    "42",
    "A is",
    "ABC",
    "[SEG] <DEPTH_START><DEPTH_1><DEPTH_END>",
    "<think>The answer is B",
    # the article, and letters that name nothing
    "A point is closest when it lies low in the picture.",
    "A red circle is on the chair.",
    "A chair",
    "Answer: A chair",
    "The answer is a chair.",
    "a car is closest",
    "A Ferrari is the closest.",
    "I am a model.",
    "The T-shirt is closest.",
    "It looks like a U.S. flag.",
    # more than one
    "A or B",
    "A or B.",
    "A/B",
    "A, B",
    "A and C",
    "(A) or (B)",
    "A\nB",
    "Both A and C",
    "Both point A and point C are closest.",
    "either A or B",
    "The answer is A or B.",
    "The answer is A and C",
    "The answer is either B or D.",
    "Points A and B are the closest.",
    "A and B are equally close.",
    "Options: A, B, C, D",
    "(A) The chair. (B) The table. (C) The lamp.",
    "A: the chair, B: the table",
    "(A) the chair (B) the table (C) the lamp",
    "Neither A nor B",
    "B. Point C is the closest.",
    "Point A is closest. Point B is closest.",
    "The order is B, A, C, D.",
    # said of something else
    "Not A",
    "A is not the closest.",
    "Point B isn't closest.",
    "The answer is not C.",
    "Point A is farthest from the camera.",
    "Point B is on the chair.",
    "Point A is close to point B.",
    "Point A is closer than point B.",
    "A is closer to the camera than B, and C is closer than A.",
    "The second closest is B.",
    "Choose A if it is nearer.",
    "Is it B?",
    "B?",
    "It is unclear whether B is closest.",
    "If point A is closest then point B is not.",
    "It is hard to tell if A is the nearest",
    # Chinese
    "答案不是B",
    "A和B",
    "A或B",
    "无法确定",
    "A点比B点更近",
    "是B吗？",
    # beyond the four choices
    "E",
    "(F)",
    "The answer is E.",
    "Point G is closest.",
]


def test_there_are_enough_strings():
    assert len(SAID) >= 60 and len(NOTHING) >= 50
    assert len({text for text, _ in SAID} | set(NOTHING)) == len(SAID) + len(NOTHING)


@pytest.mark.parametrize(("text", "letter"), SAID)
def test_what_answers_say(text, letter):
    assert answer_letter(text, 4) == letter


@pytest.mark.parametrize("text", NOTHING)
def test_what_says_nothing_definite(text):
    assert answer_letter(text, 4) is None


def test_the_number_of_choices_counts():
    assert answer_letter("E", 5) == "E" and answer_letter("D", 3) is None and answer_letter("(H)") == "H"
    assert answer_letter("Point A is closer than point B.", 2) == "A"
    assert answer_letter("Point A is closer than points B and C.", 3) == "A"
    assert answer_letter("Point A is closer than points B and C.", 4) is None
    for count in (0, 1, 9):
        with pytest.raises(ValueError, match="2 to 8"):
            answer_letter("A", count)


@settings(deadline=None)
@given(st.text())
def test_any_text_can_be_read(text):
    assert answer_letter(text, 4) in (None, "A", "B", "C", "D")
    assert answer_choice(text, ["cat", "dog"]) in (None, "A", "B")


@settings(deadline=None)
@given(
    st.sampled_from("ABCDE"),
    st.sampled_from(["{}", "({})", "{}.", "**{}**", "Point {}", "The answer is {}", "Point {} is closest.", "[{}]"]),
    st.sampled_from(["", "  ", "\n"]),
)
def test_every_letter_is_read_alike(letter, form, space):
    assert answer_letter(space + form.format(letter) + space, 5) == letter


ANIMALS = ["cat", "dog", "black dog", "no animal"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. dog", "B"),
        ("B. cat", "B"),  # the letter decides
        ("dog", "B"),
        ("Dog.", "B"),
        ("It is a dog!", "B"),
        ("A cat", "A"),
        ("Answer: A cat", "A"),
        ("a black dog", "C"),  # not also "dog"
        ("No animal", "D"),
        ("a cat and a dog", None),
        ("a black dog beside another dog", None),
        ("It is not a cat.", None),
        ("dogs", None),
        ("a horse", None),
        ("", None),
        ("Is it a cat?", None),
    ],
)
def test_the_text_of_one_choice(text, letter):
    assert answer_choice(text, ANIMALS) == letter


@pytest.mark.parametrize(
    ("text", "choices", "letter"),
    [
        ("I cannot tell, there is no information.", "yes no", None),
        ("There is no way to know", "yes no", None),
        ("No object is visible, so I cannot say.", "yes no", None),
        ("There is no cup.", "yes no", None),
        ("No object is closer.", "yes no", None),
        ("There is no cat in the picture.", "cat dog", None),
        ("It is neither a cat nor anything else", "cat dog", None),
        ("I don't know whether it is red", "red blue", None),
        ("No.", "yes no", "B"),
        ("No, it is not.", "yes no", "B"),
        ("No it isn't", "yes no", "B"),
        ("There is no red cup, so no", "yes no", "B"),
        ("The answer is no.", "yes no", "B"),
        ("Yes, there is no doubt.", "yes no", "A"),
        ("I would say yes", "yes no", "A"),
        ("It is a dog, not a cat.", "cat dog", "B"),
    ],
)
def test_what_denies_or_declines_takes_no_choice(text, choices, letter):
    assert answer_choice(text, choices.split()) == letter


def test_choices_in_numbers_and_other_scripts():
    assert answer_choice("1.5 m", ["1 m", "1.5 m", "5 m"]) == "B"
    assert answer_choice("There are 12.", ["1", "2", "12"]) == "C"
    assert answer_choice("это кошка", ["кошка", "собака"]) == "A"
    assert answer_choice("the same", ["same", "same"]) is None
    assert answer_choice("anything", ["", "!"]) is None


FIGURES, VITAMINS = ["Figure B", "Figure A"], ["Vitamin C", "Vitamin A"]


@pytest.mark.parametrize(
    ("text", "choices", "letter"),
    [
        ("Figure B", FIGURES, "A"),
        ("figure b.", FIGURES, "A"),
        ("The answer is Figure B.", FIGURES, "A"),
        ("B. Figure A", FIGURES, "B"),
        ("(A) Figure B", FIGURES, "A"),
        ("B", FIGURES, "B"),
        ("The answer is A.", FIGURES, "A"),
        ("It is point B", ["Point B", "Point A"], "A"),
        ("Vitamin A", VITAMINS, "B"),
        ("B", ["C", "D", "A", "B"], "B"),  # the letter was asked for
        ("C++", ["C", "C++"], "B"),
        ("5%", ["5", "5%"], "B"),
        ("猫", ["狗", "猫"], "B"),
        ("最近的点", ["最近的点", "最远的点"], "A"),
    ],
)
def test_the_exact_text_of_a_choice_wins(text, choices, letter):
    assert answer_choice(text, choices) == letter


@pytest.mark.parametrize(
    ("text", "choices", "letter"),
    [
        ("-3", ["3", "5"], None),
        ("−3", ["3", "5"], None),
        ("–3.", ["3", "5"], None),
        ("minus 3", ["3", "5"], None),
        ("The answer is -3", ["3", "5"], None),
        ("-3", ["3", "-3"], "B"),
        ("negative 3", ["3", "-3"], "B"),
        ("3", ["-3", "3"], "B"),
        (".5", ["5", "0.5"], "B"),
        ("5 - 3", ["3", "7"], None),
        ("10³", ["103", "1000"], None),
        ("2^3", ["2", "5"], None),
        ("½", ["1", "2"], None),
        ("½", ["2", "1/2"], "B"),
        ("H2O", ["2", "5"], None),
        ("CO2", ["CO", "NO"], None),
        ("12cm", ["5 cm", "12 cm"], "B"),
        ("It isn't a cat.", ["cat", "dog"], None),
    ],
)
def test_a_choice_within_another_number_or_formula_is_not_said(text, choices, letter):
    assert answer_choice(text, choices) == letter


def test_references():
    for reference in ("B", "(B)", "b", " B. ", 1):
        assert reference_letter(reference, 4) == "B"
    for reference in ("E", "(E)", 4, -1, "", "AB", "the chair", "1"):
        with pytest.raises(ValueError, match="A to D or 0 to 3"):
            reference_letter(reference, 4)


def test_published_answers_are_references(shared):
    import json

    for points in (3, 4):
        lines = (shared / f"hardblink/answers/blink_{points}pointscenter_answers.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        assert len(texts) == 124 and {reference_letter(text, points) for text in texts} == set("ABCD"[:points])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" p12 d03 p40 d10: the red ball", "the red ball"),
        ("p12: p13: x", "p13: x"),
        ("steps: A", "steps: A"),
        ("A p1 d2: B", "A p1 d2: B"),
        ("Note: p12 d03: A", "Note: p12 d03: A"),
    ],
)
def test_only_steps_are_skipped(text, expected):
    assert without_steps(text) == expected
