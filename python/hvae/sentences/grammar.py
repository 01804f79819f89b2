"""A probabilistic grammar of English sentences, without recursion: exact probabilities and entropy."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Sequence

Symbols = tuple[str, ...]
Rules = dict[str, list[tuple[float, Symbols]]]

#: What a sentence is about, when, how many, and how it is said: all its words hang together by these.
PROPERTIES = ("topic", "tense", "number", "tone")

#: Of a topic: who, what they do (base, third person, past), with what (one, several), where.
TOPICS = {
    "kitchen": (
        "cook cooks, baker bakers, waiter waiters, guest guests",
        "bake bakes baked, serve serves served, taste tastes tasted, burn burns burned",
        "pie pies, cake cakes, pudding puddings, loaf loaves",
        "in the kitchen, at the table, near the oven",
    ),
    "sea": (
        "sailor sailors, captain captains, pirate pirates, fisherman fishermen",
        "repair repairs repaired, paint paints painted, steer steers steered, sink sinks sank",
        "boat boats, ship ships, raft rafts, ferry ferries",
        "in the harbour, near the island, off the coast",
    ),
    "school": (
        "teacher teachers, pupil pupils, student students, tutor tutors",
        "explain explains explained, solve solves solved, discuss discusses discussed, copy copies copied",
        "lesson lessons, riddle riddles, proof proofs, theorem theorems",
        "in the classroom, at the blackboard, before the exam",
    ),
    "music": (
        "singer singers, pianist pianists, drummer drummers, composer composers",
        "play plays played, record records recorded, hum hums hummed, rehearse rehearses rehearsed",
        "song songs, waltz waltzes, tune tunes, melody melodies",
        "on the stage, at the concert, in the theatre",
    ),
    "garden": (
        "gardener gardeners, farmer farmers, neighbour neighbours, florist florists",
        "plant plants planted, water waters watered, pick picks picked, trim trims trimmed",
        "rose roses, tulip tulips, bush bushes, tree trees",
        "in the garden, by the fence, behind the greenhouse",
    ),
    "court": (
        "lawyer lawyers, judge judges, witness witnesses, clerk clerks",
        "deny denies denied, sign signs signed, dispute disputes disputed, examine examines examined",
        "claim claims, contract contracts, verdict verdicts, letter letters",
        "in the courtroom, before the jury, at the hearing",
    ),
    "hospital": (
        "doctor doctors, nurse nurses, surgeon surgeons, dentist dentists",
        "treat treats treated, examine examines examined, clean cleans cleaned, heal heals healed",
        "patient patients, wound wounds, tooth teeth, fracture fractures",
        "in the ward, at the clinic, beside the bed",
    ),
    "castle": (
        "knight knights, queen queens, dragon dragons, wizard wizards",
        "guard guards guarded, attack attacks attacked, defend defends defended, curse curses cursed",
        "tower towers, gate gates, bridge bridges, treasure treasures",
        "in the valley, at the border, under the walls",
    ),
}
TENSES = {
    "past": "yesterday, recently, earlier",
    "present": "nowadays, always, often",
    "future": "tomorrow, soon, later",
}
NUMBERS = {"one": ("the, a, every", "alone"), "several": ("the, some, many", "together")}
TONES = {"plain": (3.0, "", "."), "report": (1.0, "people say", "."), "question": (1.0, "do you think", "?")}
TONES["call"] = (1.0, "listen ,", "!")
ADJECTIVES = "young, tall, clever, quiet, famous"


class Grammar:
    """Sentences by rules, each taken with its probability.

    Args:
        rules: for each symbol that is no word the ways to rewrite it, with their weights; what has no rules is a word.
            No symbol may come back in what it is rewritten as, and each way of the start must end with a word.
        start: the symbol of a whole sentence.
    """

    def __init__(self, rules: Rules, start: str = "Text"):
        self.rules = {symbol: _normalised(ways) for symbol, ways in rules.items()}
        self.start = start
        self._arcs: dict[Symbols, dict[str, list[tuple[float, Symbols]]]] = {}

    def entropy(self) -> float:
        """Of a sentence, in nats: exact where no sentence can be made in two ways (:meth:`ambiguous`)."""
        return self._mean(lambda probability: -math.log(probability), lambda word: 0.0)

    def mean_length(self) -> float:
        """Expected words of a sentence."""
        return self._mean(lambda probability: 0.0, lambda word: 1.0)

    def _mean(self, of_choice, of_word) -> float:
        @functools.cache
        def mean(symbol: str) -> float:
            if symbol not in self.rules:
                return of_word(symbol)
            return sum(p * (of_choice(p) + sum(map(mean, way))) for p, way in self.rules[symbol])

        return mean(self.start)

    def sample(self, generator: random.Random) -> list[str]:
        """The words of a sentence."""
        words, left = [], [self.start]
        while left:
            symbol = left.pop()
            if symbol not in self.rules:
                words.append(symbol)
                continue
            ways = self.rules[symbol]
            (way,) = generator.choices([way for _, way in ways], [p for p, _ in ways])
            left.extend(reversed(way))
        return words

    def log_prob(self, words: Sequence[str]) -> float:
        """Of a sentence, summed over all ways to make it; -inf where there is none."""
        total = sum(self.by_kind(words).values())
        return math.log(total) if total else -math.inf

    def by_kind(self, words: Sequence[str]) -> dict[Symbols, float]:
        """The sentence's probability by the way in which the start is rewritten, the impossible left out."""
        ends: dict[Symbols, float] = defaultdict(float)
        for probability, way in self.rules[self.start]:
            states = {way: probability}
            for word in words:
                after: dict[Symbols, float] = defaultdict(float)
                for state, mass in states.items():
                    for p, rest in self.arcs(state).get(word, ()):
                        after[rest] += mass * p
                states = after
            if () in states:
                ends[way] += states[()]
        return dict(ends)

    def arcs(self, state: Symbols) -> dict[str, list[tuple[float, Symbols]]]:
        """The words that can come first of what these symbols make: with which probability, and what then is left."""
        if state not in self._arcs:
            found: dict[str, list[tuple[float, Symbols]]] = defaultdict(list)
            first, rest = state[:1], state[1:]
            if first and first[0] not in self.rules:
                found[first[0]].append((1.0, rest))
            for p, way in self.rules.get(first[0], ()) if first else ():
                for word, arcs in self.arcs(way + rest).items():
                    found[word] += [(p * q, after) for q, after in arcs]
            self._arcs[state] = dict(found)
        return self._arcs[state]

    def ambiguous(self) -> bool:
        """Whether any sentence can be made in two ways.

        Two ways through the automaton of :meth:`arcs` are followed at once, by the same words: one that parted, or that
        took two arcs to the same state, and can still end is an ambiguity.
        """

        @functools.cache
        def meets(one: Symbols, other: Symbols, parted: bool) -> bool:
            if not one and not other:
                return parted
            ours, theirs = self.arcs(one), self.arcs(other)
            return any(
                meets(a, b, parted or i != j)
                for word in ours.keys() & theirs.keys()
                for (i, (_, a)), (j, (_, b)) in itertools.product(enumerate(ours[word]), enumerate(theirs[word]))
                if parted or i <= j
            )

        return meets((self.start,), (self.start,), False)

    def words(self) -> list[str]:
        """All words, in order."""
        ways = itertools.chain.from_iterable(self.rules.values())
        return sorted({symbol for _, way in ways for symbol in way if symbol not in self.rules})


def _normalised(ways: list[tuple[float, Symbols]]) -> list[tuple[float, Symbols]]:
    total = sum(weight for weight, _ in ways)
    return [(weight / total, way) for weight, way in ways]


def english() -> Grammar:
    """Some millions of sentences of 6 to 15 words: of 8 topics, 3 tenses, one or several who act, and 4 tones.

    A tense shows in the verb and at the end, the number in article, noun, verb and at the end, the tone in the first
    words and the last, the topic in all that has meaning.
    """
    rules: Rules = {"Adjective": [(5.0, ()), *_ways(ADJECTIVES)]}
    kinds = itertools.product(TOPICS, TENSES, NUMBERS, TONES)
    rules["Text"] = [(TONES[kind[3]][0], (f"Sentence {' '.join(kind)}",)) for kind in kinds]
    for topic, (people, _, things, places) in TOPICS.items():
        for index, number in enumerate(NUMBERS):
            rules[f"People {topic} {number}"] = _ways(people, index)
        things_one, things_several = _ways(things, 0), _ways(things, 1)
        several = [(weight / 2, ("some", *way)) for weight, way in things_several]
        rules[f"Thing {topic}"] = [(w, (article, *way)) for article in ("the", "a") for w, way in things_one] + several
        rules[f"Place {topic}"] = [(5.0, ()), *_ways(places)]
    for number, (articles, _) in NUMBERS.items():
        rules[f"Article {number}"] = _ways(articles)
    for topic, tense, number in itertools.product(TOPICS, TENSES, NUMBERS):
        form = {"past": 2, "future": 0, "present": 1 if number == "one" else 0}[tense]
        rules[f"Verb {topic} {tense} {number}"] = _ways(TOPICS[topic][1], form)
    for tense, number in itertools.product(TENSES, NUMBERS):
        rules[f"End {tense} {number}"] = [(3.0, ()), (3.0, (NUMBERS[number][1],)), *_ways(TENSES[tense])]
    for topic, tense, number, tone in itertools.product(TOPICS, TENSES, NUMBERS, TONES):
        _, opening, mark = TONES[tone]
        subject = (f"Article {number}", "Adjective", f"People {topic} {number}")
        verb = ("will",) * (tense == "future") + (f"Verb {topic} {tense} {number}",)
        rest = (f"Thing {topic}", f"Place {topic}", f"End {tense} {number}", mark)
        rules[f"Sentence {topic} {tense} {number} {tone}"] = [(1.0, (*opening.split(), *subject, *verb, *rest))]
    return Grammar(rules)


def properties(grammar: Grammar, words: Sequence[str]) -> tuple[str, ...] | None:
    """Topic, tense, number and tone of a sentence of :func:`english`; None of any other."""
    kinds = grammar.by_kind(words)
    return tuple(next(iter(kinds))[0].split()[1:]) if kinds else None


def _ways(text: str, form: int | None = None) -> list[tuple[float, Symbols]]:
    """Phrases between commas, the first the likeliest; of the words of each one alone where ``form`` says which."""
    phrases = [phrase.split() for phrase in text.split(",")]
    chosen = [tuple(phrase) if form is None else (phrase[form],) for phrase in phrases]
    return [(float(len(chosen) - place + 1), way) for place, way in enumerate(chosen)]
