"""Words for objects: descriptions that pick out one object, by its looks or by where it is.

A *description* is a tuple of (attribute, value) pairs in the order of English adjectives, for example
`(("size", "small"), ("color", "red"))`; the empty one fits everything. An *expression* is text for one object
("the leftmost red ball") that is true, and of that object alone, with a margin where it speaks of places.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

from .parts import pick
from .scene import ATTRIBUTES, SceneObject

Description = tuple[tuple[str, str], ...]

DEPTH_RATIO = 1.15  # nearer and farther are only said of depths this far apart
SIDE_MARGIN = 0.08  # left and right only of centres this far apart, as a share of the picture's width
CLEARLY_NOT = 0.3  # share of these margins by which a rival must be on the wrong side

SUBSETS = tuple(names for k in range(5) for names in combinations(ATTRIBUTES, k))
NOUNS = {
    "ball": ("ball", "ball", "sphere"),
    "box": ("box", "box", "cube"),
    "cylinder": ("cylinder",),
    "cone": ("cone",),
}
GENERIC = ("thing", "object")
PLURALS = {"box": "boxes"}
ORDINALS = ("second", "third", "fourth")


def describe(thing: SceneObject, names: Iterable[str]) -> Description:
    """The description of `thing` by the attributes `names`."""
    return tuple((name, getattr(thing, name)) for name in names)


def index_descriptions(objects: Sequence[SceneObject]) -> dict[Description, tuple[int, ...]]:
    """Every description that fits something, with the instance numbers (from 1) of all objects that it fits."""
    index: dict[Description, tuple[int, ...]] = {}
    for number, thing in enumerate(objects, 1):
        for names in SUBSETS:
            key = describe(thing, names)
            index[key] = (*index.get(key, ()), number)
    return index


def noun_phrase(r: random.Random, description: Description, plural: bool = False) -> str:
    """Words for a description without an article: "small red ball", "shiny things"."""
    values = dict(description)
    noun = pick(r, NOUNS[values["shape"]]) if "shape" in values else pick(r, GENERIC)
    noun = PLURALS.get(noun, noun + "s") if plural else noun
    return " ".join([value for name, value in description if name != "shape"] + [noun])


def plain_name(thing: SceneObject) -> str:
    """What answers call an object: "the red ball"; always the same words for the same looks."""
    return f"the {thing.color} {thing.shape}"


def any_name(r: random.Random) -> str:
    """A name such as a question may use, "the small red ball", of a thing that need not be anywhere."""
    names = pick(r, SUBSETS)
    return "the " + noun_phrase(r, tuple((name, pick(r, ATTRIBUTES[name])) for name in names))


def with_article(phrase: str) -> str:
    """The phrase behind "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def capitalized(text: str) -> str:
    """`text` with a large first letter; the others stay as they are."""
    return text[:1].upper() + text[1:]


class Speaker:
    """Finds expressions for the objects of one picture of `size` pixels; all choices come from `r`."""

    def __init__(self, objects: Sequence[SceneObject], size: int, r: random.Random):
        self.objects, self.size, self.r = objects, size, r
        self.index = index_descriptions(objects)
        self.numbers = range(1, len(objects) + 1)

    def fitting(self, description: Description) -> tuple[int, ...]:
        """The instance numbers of the objects that a description fits."""
        return self.index.get(description, ())

    def unique(self, number: int, without: str | None = None) -> list[Description]:
        """All descriptions that fit this object alone, leaving out the attribute `without`."""
        thing = self.objects[number - 1]
        found = (describe(thing, names) for names in SUBSETS if without not in names)
        return [d for d in found if self.index[d] == (number,)]

    def by_looks(self, number: int, without: str | None = None) -> str | None:
        """ "the small red ball", as short as possible half of the time; None if another object looks the same."""
        options = self.unique(number, without)
        if not options:
            return None
        if self.r.random() < 0.5:
            shortest = min(len(d) for d in options)
            options = [d for d in options if len(d) == shortest]
        return "the " + noun_phrase(self.r, pick(self.r, options))

    def by_place(self, number: int, without: str | None = None) -> str | None:
        """An expression by rank or by relation to another object; None if there is none with a safe margin."""
        forms = [self._by_rank, self._by_rank, self._by_relation]
        return pick(self.r, forms)(number, without)

    def by_any(self, number: int, without: str | None = None) -> str | None:
        """An expression of any form, or None."""
        if self.r.random() < 0.7:
            return self.by_looks(number, without) or self.by_place(number, without)
        return self.by_place(number, without) or self.by_looks(number, without)

    def _class(self, number: int, without: str | None, least: int) -> tuple[Description, tuple[int, ...]] | None:
        """A short description that fits this object and at least `least` in all."""
        options = [names for names in SUBSETS if len(names) <= 2 and without not in names]
        keys = [describe(self.objects[number - 1], names) for names in options]
        keys = [key for key in keys if len(self.index[key]) >= least]
        if not keys:
            return None
        key = pick(self.r, keys)
        return key, self.index[key]

    def _by_rank(self, number: int, without: str | None) -> str | None:
        chosen = self._class(number, without, 2)
        if chosen is None:
            return None
        phrase, rivals = noun_phrase(self.r, chosen[0]), chosen[1]
        ranks = [text for text in (self._rank(number, rivals, phrase, *axis) for axis in self._axes()) if text]
        return pick(self.r, ranks) if ranks else None

    def _axes(self) -> tuple[tuple[Callable[[int], float], Callable[[float, float], bool], tuple[str, ...], str], ...]:
        """(key, certainly smaller, words for the first, place it is counted from) of every ordering."""

        def left(n: int) -> float:
            return self.objects[n - 1].center[0]

        def depth(n: int) -> float:
            return self.objects[n - 1].depth

        def beside(a: float, b: float) -> bool:
            return b - a >= SIDE_MARGIN * self.size

        def nearer(a: float, b: float) -> bool:
            return b >= a * DEPTH_RATIO if a > 0 else a <= b * DEPTH_RATIO

        return (
            (left, beside, ("leftmost",), "left"),
            (lambda n: -left(n), beside, ("rightmost",), "right"),
            (depth, nearer, ("nearest", "closest"), ""),
            (lambda n: -depth(n), nearer, ("farthest", "most distant"), ""),
        )

    def _rank(
        self,
        number: int,
        rivals: Sequence[int],
        phrase: str,
        key: Callable[[int], float],
        smaller: Callable[[float, float], bool],
        words: tuple[str, ...],
        origin: str,
    ) -> str | None:
        """ "the leftmost ball" or "the second ball from the left", if the order is certain around this object."""
        order = sorted(rivals, key=key)
        place, values = order.index(number), [key(n) for n in order]
        before = place == 0 or smaller(values[place - 1], values[place])
        after = place == len(order) - 1 or smaller(values[place], values[place + 1])
        if not (before and after):
            return None
        if place == 0:
            return f"the {pick(self.r, words)} {phrase}"
        if origin and place < min(len(order) - 1, len(ORDINALS) + 1):
            return f"the {ORDINALS[place - 1]} {phrase} from the {origin}"
        return None

    def _by_relation(self, number: int, without: str | None) -> str | None:
        chosen = self._class(number, without, 1 if self.r.random() < 0.3 else 2)
        others = [n for n in self.numbers if n != number]
        reference = pick(self.r, others)
        anchor = self.by_looks(reference, without)
        if chosen is None or anchor is None:
            return None
        rivals = [n for n in chosen[1] if n not in (number, reference)]
        fitting = [
            words
            for words, test in self._relations()
            if test(number, reference) > 1 and all(test(n, reference) < -CLEARLY_NOT for n in rivals)
        ]
        if not fitting:
            return None
        return f"the {noun_phrase(self.r, chosen[0])} {pick(self.r, pick(self.r, fitting))} {anchor}"

    def _relations(self) -> tuple[tuple[tuple[str, ...], Callable[[int, int], float]], ...]:
        """(words, how certainly they hold of two objects): above 1 they do, below -CLEARLY_NOT they do not."""

        def left(a: int, b: int) -> float:
            return (self.objects[b - 1].center[0] - self.objects[a - 1].center[0]) / (SIDE_MARGIN * self.size)

        def front(a: int, b: int) -> float:
            near, far = self.objects[a - 1].depth, self.objects[b - 1].depth
            return (far / near - 1 if far > near else 1 - near / far) / (DEPTH_RATIO - 1)

        return (
            (("left of", "to the left of"), left),
            (("right of", "to the right of"), lambda a, b: left(b, a)),
            (("in front of", "nearer than"), front),
            (("behind", "farther away than"), lambda a, b: front(b, a)),
        )
