"""Questions: every answer is found again from the text and the scene's records, and no shortcut finds it."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from perceptio_hf.world import QUESTION_KINDS, ask, render_scene, text_corpus
from perceptio_hf.world.scene import COLORS, SHAPES

SCENES = 1400
RATIO = 1.15

NOUNS = {"sphere": "ball", "cube": "box", "thing": None, "object": None} | {shape: shape for shape in SHAPES}
LOOKS = rf"(?:small |large )?(?:matte |shiny )?(?:(?:{'|'.join(COLORS)}) )?(?:{'|'.join(NOUNS)})(?:e?s)?"
RANKS = "leftmost|rightmost|nearest|closest|farthest|most distant|second|third|fourth"
RELATIONS = "left of|to the left of|right of|to the right of|in front of|nearer than|behind|farther away than"
EXPRESSION = re.compile(
    rf"\bthe (?:(?P<rank>{RANKS}) )?(?P<looks>{LOOKS})\b(?: from the (?P<origin>left|right))?"
    rf"(?: (?P<relation>{RELATIONS}) the (?P<anchor>{LOOKS})\b)?",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def asked():
    """(scene, question) of many scenes."""
    pairs = []
    for seed in range(SCENES):
        scene = render_scene(seed)
        pairs += [(scene, question) for question in ask(scene, np.random.default_rng(seed))]
    return pairs


def of_kind(asked, kind, choices=None):
    return [(s, q) for s, q in asked if q.kind == kind and choices in (None, q.choices)]


def fitting(scene, looks):
    """Numbers of the objects that words such as "small red balls" fit."""
    words = looks.lower().split()
    noun = words.pop()
    noun = noun if noun in NOUNS else noun[:-1] if noun[:-1] in NOUNS else noun[:-2]
    wanted = set(words) | ({NOUNS[noun]} - {None})
    things = enumerate(scene.objects, 1)
    return [n for n, o in things if wanted <= {o.shape, o.color, o.size, o.material}]


def meant(scene, text):
    """The objects that the first expression of a text means, read with a margin of zero."""
    return meant_by(scene, EXPRESSION.search(text))


def meant_by(scene, match):
    numbers = fitting(scene, match["looks"])
    if match["relation"]:
        (anchor,) = fitting(scene, match["anchor"])
        numbers = [n for n in numbers if n != anchor and related(scene, n, anchor, match["relation"])]
    if not match["rank"]:
        return numbers
    rank, origin = match["rank"].lower(), match["origin"]
    by_depth = rank in ("nearest", "closest", "farthest", "most distant")
    order = sorted(numbers, key=lambda n: scene.objects[n - 1].depth if by_depth else scene.objects[n - 1].center[0])
    if rank in ("rightmost", "farthest", "most distant") or origin == "right":
        order.reverse()
    place = {"second": 1, "third": 2, "fourth": 3}.get(rank, 0)
    return order[place : place + 1]


def related(scene, a, b, relation):
    a, b = scene.objects[a - 1], scene.objects[b - 1]
    if "left" in relation or "right" in relation:
        return (a.center[0] < b.center[0]) == ("left" in relation)
    return (a.depth < b.depth) == (relation in ("in front of", "nearer than"))


def test_questions_are_the_same_for_the_same_generator():
    scene = render_scene(8)
    assert ask(scene, np.random.default_rng(1)) == ask(scene, np.random.default_rng(1))
    assert ask(scene, np.random.default_rng(1)) != ask(scene, np.random.default_rng(2))


def test_kinds_restrict(asked):
    assert {q.kind for _, q in asked} == set(QUESTION_KINDS)
    scene = render_scene(8)
    assert {q.kind for q in ask(scene, np.random.default_rng(0), ["count", "depth"])} <= {"count", "depth"}
    with pytest.raises(ValueError, match="closest_point"):
        ask(scene, np.random.default_rng(0), ["counting"])


def test_every_scene_gives_about_a_dozen(asked):
    counts = Counter(q.kind for _, q in asked)
    per_scene = {kind: counts[kind] / SCENES for kind in QUESTION_KINDS}
    assert per_scene["depth"] == 1
    assert per_scene["refer"] > 2.5 and per_scene["attribute"] > 2 and per_scene["count"] > 1.2
    assert per_scene["closer_object"] > 1 and per_scene["closest_point"] > 0.5


def test_referring_expressions_mean_their_target_only(asked):
    questions = of_kind(asked, "refer")
    forms = Counter()
    for scene, question in questions:
        match = EXPRESSION.search(question.text)
        assert meant_by(scene, match) == list(question.targets), question.text
        assert scene.objects[question.targets[0] - 1].pixels >= 40
        forms["rank" if match["rank"] else "relation" if match["relation"] else "looks"] += 1
        named = EXPRESSION.search(question.answer)
        assert named is None or question.targets[0] in meant_by(scene, named)
    assert min(forms.values()) > 0.08 * len(questions), forms


def test_counts_are_right_and_balanced(asked):
    questions = of_kind(asked, "count")
    for scene, question in questions:
        assert len(fitting(scene, re.search(LOOKS, question.text)[0])) == int(question.answer), question.text
        assert question.answer in question.choices
    assert majority([q for _, q in questions]) < 0.25


def test_attributes_are_right_and_balanced(asked):
    for scene, question in of_kind(asked, "attribute"):
        if question.choices == ("yes", "no"):
            assert question.answer == truth(scene, question.text), question.text
        else:
            (target,) = meant(scene, question.text)
            thing = scene.objects[target - 1]
            assert question.answer in (thing.shape, thing.color, thing.size, thing.material), question.text
            assert question.answer in question.choices
    by_choices = defaultdict(list)
    for _, question in of_kind(asked, "attribute"):
        by_choices[question.choices].append(question)
    assert len(by_choices) == 5
    for choices, questions in by_choices.items():
        assert majority(questions) < 1 / len(choices) + 0.06, choices


def truth(scene, text):
    """Whether "is there a red ball" or "is the ball red" holds."""
    existence = re.search(rf"\ban? ({LOOKS})\b", text, re.IGNORECASE)
    if existence:
        return "yes" if fitting(scene, existence[1]) else "no"
    (target,) = meant(scene, text)
    thing = scene.objects[target - 1]
    return "yes" if text.rstrip("?").split()[-1] in (thing.color, thing.size, thing.material) else "no"


def majority(questions):
    return Counter(q.answer for q in questions).most_common(1)[0][1] / len(questions)


def test_no_word_goes_with_yes(asked):
    answers = defaultdict(Counter)
    for _, question in of_kind(asked, "attribute", ("yes", "no")):
        for word in set(re.findall("[a-z]+", question.text.lower())):
            answers[word][question.answer] += 1
    for word, counts in answers.items():
        if counts.total() >= 200:
            assert 0.38 < counts["yes"] / counts.total() < 0.62, word


@pytest.mark.parametrize("kind", ["count", "attribute", "closer_object"])
def test_templates_do_not_tell_the_answer(asked, kind):
    """The best guess by template is hardly better than the best guess without it."""
    by_choices = defaultdict(list)
    for _, question in of_kind(asked, kind):
        choices = question.choices if kind != "closer_object" else ("first", "second")
        answer = question.answer if kind != "closer_object" else choices[question.choices.index(question.answer)]
        by_choices[choices].append((template(question.text), answer))
    for choices, pairs in by_choices.items():
        overall = Counter(answer for _, answer in pairs).most_common(1)[0][1]
        groups = defaultdict(Counter)
        for text, answer in pairs:
            groups[text][answer] += 1
        by_template = sum(c.most_common(1)[0][1] for c in groups.values() if c.total() > 20)
        counted = sum(c.total() for c in groups.values() if c.total() > 20)
        assert by_template / counted < overall / len(pairs) + 0.06, choices


def template(text):
    """A question's text with its expressions taken out."""
    text = EXPRESSION.sub("X", text)
    return re.sub(rf"\b{LOOKS}\b", "X", text, flags=re.IGNORECASE)


def test_closer_object_is_right_and_no_rule_finds_it(asked):
    questions = of_kind(asked, "closer_object")
    rules = Counter()
    for scene, question in questions:
        numbers = [meant_by(scene, match) for match in EXPRESSION.finditer(question.text)]
        assert [list(n) for n in numbers] == [[t] for t in question.targets], question.text
        first, second = (scene.objects[t - 1] for t in question.targets)
        assert max(first.depth, second.depth) / min(first.depth, second.depth) >= RATIO
        near, far = (first, second) if first.depth < second.depth else (second, first)
        assert question.answer == question.choices[int(near is second)]
        rules["first named"] += near is first
        rules["lower"] += near.center[1] > far.center[1]
        rules["bigger"] += near.pixels > far.pixels
    for rule, right in rules.items():
        assert abs(right / len(questions) - 0.5) < 0.07, (rule, right / len(questions))


def test_closest_point_is_right(asked):
    for scene, question in of_kind(asked, "closest_point"):
        assert 3 <= len(question.points) <= 5 and question.letters == tuple("ABCDE"[: len(question.points)])
        depths = [float(scene.depth[y, x]) for x, y in question.points]
        nearest, second = sorted(depths)[:2]
        assert question.letters[depths.index(nearest)] == question.answer
        assert second / nearest >= RATIO * 0.9999
        for x, y in question.points:
            assert 8 <= x < 120 and 8 <= y < 120
            around = scene.depth[y - 1 : y + 2, x - 1 : x + 2]
            assert (around.max() - around.min()) / scene.depth[y, x] <= 0.041
        distances = [np.hypot(a[0] - b[0], a[1] - b[1]) for a in question.points for b in question.points if a != b]
        assert min(distances) >= 10


def test_no_simple_rule_finds_the_closest_point(asked):
    questions = of_kind(asked, "closest_point")
    assert len(questions) >= 400
    rules, chance = Counter(), 0.0
    for scene, question in questions:
        x, y = np.array(question.points).T
        off = (x - scene.size / 2) ** 2 + (y - scene.size / 2) ** 2
        right = question.letters.index(question.answer)
        guesses = {"lowest": y.argmax(), "highest": y.argmin(), "most central": off.argmin(), "outermost": off.argmax()}
        guesses |= {"leftmost": x.argmin(), "rightmost": x.argmax()}
        rules.update(name for name, guess in guesses.items() if guess == right)
        chance += 1 / len(question.points)
    for rule in ("lowest", "highest", "most central", "outermost", "leftmost", "rightmost"):
        assert abs(rules[rule] - chance) / len(questions) < 0.05, (rule, rules[rule] / len(questions))


def test_letters_are_balanced(asked):
    for count in (3, 4, 5):
        answers = [q.answer for _, q in of_kind(asked, "closest_point") if len(q.points) == count]
        assert max(Counter(answers).values()) / len(answers) < 1 / count + 0.09


def test_depth_answers_are_true(asked):
    for scene, question in of_kind(asked, "depth"):
        order = sorted(range(1, len(scene.objects) + 1), key=lambda n: scene.objects[n - 1].depth)
        for match in EXPRESSION.finditer(question.answer):
            said_nearest = question.answer[match.end() :].startswith(" is nearest")
            assert (order[0] if said_nearest else order[-1]) in meant_by(scene, match), question.answer


def test_corpus_is_text_of_a_moderate_vocabulary():
    texts = text_corpus(120)
    assert texts == text_corpus(120) != text_corpus(120, seed=500)
    words = {word for text in texts for word in re.findall(r"[a-z]+|\d+", text.lower())}
    assert 110 < len(words) < 260
