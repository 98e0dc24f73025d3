"""Samples acceptable and unacceptable sentences from a small grammar of English, and makes a CoLA-like task of them.

    python -m data.grammar        prints an acceptable and an unacceptable sentence of each phenomenon

Where no model hub can be reached, `run.py` falls back to this task and to the tiny GPT-2 of data/tiny.py, so that every
mode works on a bare laptop.

The grammar makes minimal pairs, as BLiMP does (Warstadt et al. 2020): a pair of templates, the second with one
violation of the phenomenon's rule, is filled with the same words; a row of the task is one side of a pair. The
language model learns from acceptable sentences only, held-out words among them but no sentence of the task: like
GPT-2, it knows the language and has never seen a judgement.
"""

import functools
import random
import re
from pathlib import Path
from typing import NamedTuple

SEED = 20240229
ACCEPTABLE_SHARE = 0.62  # CoLA has 0.70; the majority baseline must not be 0.5
N_TRAIN, N_DEV = 4000, 500  # rows
N_CORPUS = 30_000  # sentences that the language model learns from

Row = tuple[str, int, str]  # source code, label (1 acceptable), sentence

# Open word classes. Every fourth word of a class is held out: it occurs in the language model's corpus and in
# out_of_domain_dev.tsv, never in the in-domain files. Irregular forms follow a slash: plural, or past/participle/-ing.
# Violations lean on these classes, so they are strict: a transitive verb here cannot lose its object ("eat" could), an
# intransitive one cannot gain one, and none that takes a thing takes two objects ("find me a book").
LEXICON = {
    "m": "boy man/men king uncle father brother prince nephew",
    "f": "girl woman/women queen aunt mother sister princess niece",
    "n": "teacher doctor student lawyer farmer pilot baker nurse artist guest singer manager child/children tourist "
         "neighbor judge poet dancer sailor banker",
    "name_m": "John Peter Thomas Henry",
    "name_f": "Mary Anna Susan Emily",
    "thing": "book letter table lamp clock guitar mirror camera bicycle painting basket bottle chair ladder wallet map "
             "computer boat carpet candle jacket kettle ring shirt",
    "place": "garden kitchen station library park museum bridge office",
    "old": "old young clever famous tall strange happy tired",
    "heavy": "heavy new old expensive small large strange fragile",
    "sneeze": "sneeze arrive smile cough sleep/slept/slept vanish yawn faint giggle hesitate weep/wept/wept shiver "
              "tremble sigh kneel/knelt/knelt blush",
    "praise": "praise admire blame greet thank insult ignore recognize rescue betray welcome accompany congratulate "
              "encourage arrest imitate",
    "fix": "repair destroy discard inspect damage examine replace remove wreck seize abandon protect locate handle "
           "restore acquire",
    "give": "give/gave/given send/sent/sent offer show/showed/shown lend/lent/lent hand sell/sold/sold mail",
    "explain": "explain describe reveal display donate introduce demonstrate exhibit",
    "rely": "rely:on listen:to stare:at glance:at disagree:with look:at depend:on compete:with",
    "think": "think/thought/thought believe claim suspect hope assume conclude suppose",
    "ask": "ask inquire",
    "know": "know/knew/known remember discover",
    "want": "want refuse decide promise manage agree fail consent",
    "enjoy": "enjoy avoid finish postpone keep/kept/kept deny risk resent",
}
HELD_OUT_EVERY = 4

# The phenomena. Each name is a source code of the task; each line is an acceptable sentence, then ways to spoil it.
# {boy}, {girl}, {monk} are people; {has}, {is}, {goes} agree with {boy}; {go}{rest} is any verb with its objects; SLOTS
# says how each slot is filled. Mind, in adding one, that past tenses hide agreement, and that single words should not
# give the label away: each word of a spoilt sentence stands in acceptable ones too.
IN_DOMAIN = {
    "agreement": """
        {boy}{beside_girl} {goes}{rest}. | {boy}{beside_girl} {goes_wrong}{rest}.
        {boy}{beside_girl} {is} {old}{end}. | {boy}{beside_girl} {is_wrong} {old}{end}.""",
    # A reflexive takes its number and gender from the subject of its own clause.
    "reflexive": """
        {king}{beside_queen} {praise.past} {king.self}{end}. | {king}{beside_queen} {praise.past} {queen.self}{end}.
        {queen} {think.past} that {king} {praise.past} {king.self}.
            | {queen} {think.past} that {king} {praise.past} {queen.self}.""",
    # Each verb takes its own objects, by its own preposition.
    "argument": """
        {boy} {sneeze.past}{end}. | {boy} {fix.past}{end}. | {boy} {praise.past}{end}.
        {boy} {fix.past} {lamp}{end}. | {boy} {sneeze.past} {lamp}{end}.
        {boy} {give.past} {monk} {lamp}{end}. | {boy} {explain.past} {monk} {lamp}{end}.
        {boy} {rely.past} {on} {monk}{end}. | {boy} {rely.past} {monk}{end}.""",
    "order": """
        the {old} {man} {will} {fix.base} {lamp}{end}. | the {man} {old} {will} {fix.base} {lamp}{end}.
        {boy} {will} {fix.base} {lamp}{end}. | {boy} {will} {lamp} {fix.base}{end}.
        {boy} {will} {fix.base} {lamp} {near} the {place}. | {boy} {will} {fix.base} {lamp} the {place} {near}.""",
    # A fronted wh-phrase leaves one gap, and none in an adjunct clause.
    "wh_gap": """
        {what} {did} {boy} {fix.base}? | {what} {did} {boy} {fix.base} {lamp}? | {what} {did} {boy} {sneeze.base}?
        {did} {boy} {fix.base} {lamp}? | {did} {boy} {fix.base}?
        {what} {did} {girl} {think.base} that {boy} {fix.past}?
            | {what} {did} {girl} {think.base} that {boy} {fix.past} {lamp}?
            | {what} {did} {girl} {sneeze.base} {after} {boy} {fix.past}?
        {did} {girl} {sneeze.base} {after} {boy} {fix.past} {lamp}?
            | {did} {girl} {think.base} that {boy} {fix.past}?""",
    # In a direct question the main clause's first auxiliary, and only it, goes before the subject.
    "question": """
        {has} {boy} {go.part}{rest}? | {has} {go.part} {boy}{rest}?
        {what} {has} {boy} {fix.part}? | {what} {boy} {has} {fix.part}?
        {knows} {what} {boy} {has} {fix.part}. | {knows} {what} {has} {boy} {fix.part}.
        will {boy} {who} {has} {sneeze.part} {go.base}{rest}?
            | {has} {boy} {who} {sneeze.part} will {go.base}{rest}?""",
    # A polarity item needs a negation or a question above it; a negation inside a relative clause is not above.
    "polarity": """
        no {man} {who} the {nurse} {praise.past} {has} ever {go.part}{rest}.
            | the {man} {who} no {nurse} {praise.past} {has} ever {go.part}{rest}.
        {boy} {who} {sneeze.past} did not {fix.base} any {lamps}{end}.
            | {boy} {who} did not {sneeze.base} {fix.past} any {lamps}{end}.
        {has} {boy} ever {go.part}{rest}? | {boy} {has} ever {go.part}{rest}.""",
    # A determiner counts its noun.
    "determiner": """
        {many} {man} {will} {go.base}{rest}. | {many} {man_wrong} {will} {go.base}{rest}.
        {girl} {praise.past} {many} {man}{end}. | {girl} {praise.past} {many} {man_wrong}{end}.""",
    # An auxiliary takes one form of the verb.
    "auxiliary": """
        {boy} {has} {go.part}{rest}. | {boy} {has} {go.base}{rest}.
        {boy} {is} {go.ing}{rest}. | {boy} {is} {go.base}{rest}.
        {boy} {will} {go.base}{rest}. | {boy} {will} {go.past}{rest}. | {boy} {will} {go.ing}{rest}.""",
    # A person takes `who`, a thing `which`; the clause has one gap, and cannot lack `who` where the gap is its subject.
    "relative": """
        {boy} who {girl} {praise.past} {is} {old}. | {boy} which {girl} {praise.past} {is} {old}.
        {lamp} which {girl} {fix.past} {lamp_was} {heavy}. | {lamp} who {girl} {fix.past} {lamp_was} {heavy}.
        {boy} {who} {girl} {praise.past} {is} {old}. | {boy} {who} {girl} {praise.past} {monk} {is} {old}.
        {boy} {who} {sneeze.past} {goes}{rest}. | {boy} {sneeze.past} {goes}{rest}.""",
    "case": """
        {he} {will} {go.base}{rest}. | {him} {will} {go.base}{rest}.
        {thinks} that {he} {go.past}{rest}. | {thinks} that {him} {go.past}{rest}.
        {boy} {praise.past} {him}{end}. | {boy} {praise.past} {he}{end}.""",
    # A verb chooses its clause, `think that` or `ask whether`, and either is finite.
    "embedding": """
        {thinks} that {boy} {go.past}{rest}. | {thinks} whether {boy} {go.past}{rest}.
        {asks} whether {boy} {go.past}{rest}. | {asks} that {boy} {go.past}{rest}.
        {thinks} that {boy} will {go.base}{rest}. | {thinks} that {boy} to {go.base}{rest}.""",
}
HELD_OUT = {
    # A passive has the participle of a transitive verb, and no object left.
    "passive": """
        {lamp} {lamp_was} {fix.part} by {girl}{end}. | {lamp} {lamp_was} {sneeze.part} by {girl}{end}.
        {boy} {was} {praise.part} by {girl}{end}. | {boy} {was} {praise.part} {monk} by {girl}{end}.
        {boy} {was} {praise.part} by {girl}{end}. | {boy} {was} {praise.ing} by {girl}{end}.""",
    # `want` takes an infinitive, `enjoy` a gerund.
    "complement": """
        {wants} to {fix.base} {lamp}{end}. | {wants} {fix.ing} {lamp}{end}. | {wants} to {fix.past} {lamp}{end}.
        {enjoys} {fix.ing} {lamp}{end}. | {enjoys} to {fix.base} {lamp}{end}. | {enjoys} {fix.base} {lamp}{end}.""",
}


class Noun(NamedTuple):
    """Holds a noun phrase and its agreement; gender is "m", "f" or "n"."""

    text: str
    plural: bool
    gender: str

    @property
    def self(self) -> str:
        return "themselves" if self.plural else {"m": "himself", "f": "herself"}[self.gender]

    def __str__(self) -> str:
        return self.text


class Verb(NamedTuple):
    """Holds a verb's five forms."""

    base: str
    s: str
    past: str
    part: str
    ing: str


@functools.cache
def add_s(word: str) -> str:
    """Returns the plural of a regular noun, or the third person of a verb."""
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|ch|sh)$", word) else "s")


@functools.cache
def inflect(entry: str) -> Verb:
    """Returns the forms of `sleep/slept/slept` or `arrive`; the lexicon gives irregular forms."""
    base, *given = entry.split("/")
    past = re.sub(r"([^aeiou])y$", r"\1i", base).removesuffix("e") + "ed"
    regular = [past, past, base.removesuffix("e") + "ing"]
    return Verb(base, add_s(base), *given, *regular[len(given):])


def finish(text: str) -> str:
    """Capitalises the first letter, and makes `a` before a vowel `an`."""
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return text[0].upper() + text[1:]


class Scene(dict):
    """Picks the words of one pair: a slot when a template first names it, and the same word for both sentences."""

    def __init__(self, rng: random.Random, entries: dict[str, list[str]]):
        super().__init__()
        self.rng, self.entries = rng, entries

    def __missing__(self, slot: str):
        if slot in SLOTS:
            self[slot] = SLOTS[slot](self)
        elif slot in CHOICES:
            self[slot] = self.pick(*CHOICES[slot])
        else:
            self[slot] = self.verb(slot)
        return self[slot]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, *options):
        return self.rng.choice(options)

    def word(self, kind: str) -> str:
        return self.rng.choice(self.entries[kind])

    def verb(self, kind: str) -> Verb:
        return inflect(self.word(kind))

    def noun(self, kind: str) -> tuple[str, str]:
        """Returns singular and plural."""
        singular, _, irregular = self.word(kind).partition("/")
        return singular, irregular or add_s(singular)

    def phrase(self, kind: str, adjective: str, plural: bool) -> str:
        # No determiner here licenses a polarity item (no, few, every) or reads as a complementizer (that).
        rare = ("these", "some", "two", "three", "my", "your") if plural else ("a", "this", "my", "your")
        determiner = "the" if self.chance(0.6) else self.pick(*rare)
        return f"{determiner} {self.word(adjective) + ' ' if self.chance(0.1) else ''}{self.noun(kind)[plural]}"

    def person(self, plural: bool | None = None, genders: str = "mfnn", names: float = 0.0) -> Noun:
        plural = self.chance(0.5) if plural is None else plural
        gender = self.pick(*genders)
        if gender != "n" and not plural and self.chance(names):
            return Noun(self.word("name_" + gender), False, gender)
        return Noun(self.phrase(gender, "old", plural), plural, gender)

    def thing(self) -> Noun:
        plural = self.chance(0.5)
        return Noun(self.phrase("thing", "heavy", plural), plural, "n")

    def beside(self, other: Noun) -> str:
        """Returns a modifier that puts the noun `other` between a subject and its verb."""
        verb, who = self.verb("praise"), self.pick("who", "that")
        seen = self.pick(verb.past, verb.base if other.plural else verb.s)
        return self.pick(f" {self['near']} {other}", f" {who} {verb.past} {other}", f" {who} {other} {seen}")

    def verb_phrase(self) -> tuple[Verb, str]:
        """Returns a verb and its objects, with the space before them."""
        person, thing = self.person(names=0.2), self.thing()
        kind, *rests = self.pick(
            ("sneeze", ""), ("praise", f" {person}"), ("fix", f" {thing}"), ("rely", f" {person}"),
            ("explain", f" {thing} to {person}"), ("give", f" {person} {thing}", f" {thing} to {person}"),
        )
        entry, colon, preposition = self.word(kind).partition(":")
        return inflect(entry), (" " + preposition if colon else "") + self.pick(*rests)

    def finite(self, verb: Verb, plural: bool, tense: str) -> str:
        return {
            "present": verb.base if plural else verb.s,
            "perfect": f"{'have' if plural else 'has'} {verb.part}",
            "progressive": f"{'are' if plural else 'is'} {verb.ing}",
            "negative": f"{'do' if plural else 'does'} not {verb.base}",
            "past": verb.past,
        }[tense]

    def clause(self, kind: str) -> str:
        """Returns a subject and a finite verb."""
        subject = self.person(names=0.2)
        return f"{subject} {self.finite(self.verb(kind), subject.plural, self.pick('present', 'past'))}"

    def end(self) -> str:
        place = f" {self['near']} the {self['place']}"
        return self.pick(place, place, " again", " today") if self.chance(0.3) else ""

    def queen(self) -> Noun:
        """Returns a person whom the reflexive of {king} cannot mean."""
        while True:
            queen = self.person(genders="mf", names=0.2)
            if queen.self != self["king"].self:
                return queen


# A slot that is in neither of these tables is a verb of that class of the lexicon.
CHOICES = {
    "near": ("near", "behind", "beside"),
    "who": ("who", "that"),
    "after": ("after", "because"),
    "will": ("will", "can", "must", "did not"),
    "did": ("did", "will", "can"),
    "pronoun": (("he", "him"), ("she", "her"), ("they", "them"), ("we", "us")),
    "tense": ("present", "perfect", "progressive", "negative"),
}
SLOTS = {
    "boy": lambda s: s.person(),
    "girl": lambda s: s.person(plural=s["boy"].plural ^ s.chance(0.7), names=0.3),
    "monk": lambda s: s.person(names=0.2),
    "king": lambda s: s.person(genders="mf"),
    "queen": lambda s: s.queen(),
    "beside_girl": lambda s: s.beside(s["girl"]),
    "beside_queen": lambda s: s.beside(s["queen"]),
    "he": lambda s: s["pronoun"][0],
    "him": lambda s: s["pronoun"][1],
    "lamp": lambda s: s.thing(),
    "place": lambda s: s.noun("place")[False],
    "end": lambda s: s.end(),
    "what": lambda s: s.pick("what", f"which {s.noun('thing')[s.chance(0.5)]}"),
    "old": lambda s: s.word("old"),
    "heavy": lambda s: s.word("heavy"),
    # A determiner, and nouns without one: in the number of {boy}, or in the wrong one.
    "many": lambda s: s.pick(*("this that every each a", "these those many several two")[s["boy"].plural].split()),
    "man_forms": lambda s: s.noun(s.pick("m", "f", "n", "n")),
    "man": lambda s: s["man_forms"][s["boy"].plural],
    "man_wrong": lambda s: s["man_forms"][not s["boy"].plural],
    "nurse": lambda s: s.noun("n")[s.chance(0.5)],
    "lamps": lambda s: s.noun("thing")[True],
    # Verbs, where the number of a subject shows.
    "has": lambda s: ("has", "have")[s["boy"].plural],
    "is": lambda s: ("is", "are")[s["boy"].plural],
    "is_wrong": lambda s: ("are", "is")[s["boy"].plural],
    "was": lambda s: ("was", "were")[s["boy"].plural],
    "lamp_was": lambda s: ("was", "were")[s["lamp"].plural],
    "relying": lambda s: s.word("rely").split(":"),
    "rely": lambda s: inflect(s["relying"][0]),
    "on": lambda s: s["relying"][1],
    "verb_phrase": lambda s: s.verb_phrase(),
    "go": lambda s: s["verb_phrase"][0],
    "rest": lambda s: s["verb_phrase"][1] + s["end"],
    "goes": lambda s: s.finite(s["go"], s["boy"].plural, s["tense"]),
    "goes_wrong": lambda s: s.finite(s["go"], not s["boy"].plural, s["tense"]),
    "thinks": lambda s: s.clause("think"),
    "asks": lambda s: s.clause("ask"),
    "knows": lambda s: s.clause("know"),
    "wants": lambda s: s.clause("want"),
    "enjoys": lambda s: s.clause("enjoy"),
}


@functools.cache
def templates_of(phenomenon: str) -> list[list[str]]:
    """Returns a phenomenon's templates: each an acceptable one, and its violations."""
    text = re.sub(r"\s+\|", " |", {**IN_DOMAIN, **HELD_OUT}[phenomenon].strip())
    return [line.strip().split(" | ") for line in text.splitlines()]


def pair(phenomenon: str, rng: random.Random, entries: dict[str, list[str]]) -> tuple[str, str]:
    """Samples an acceptable sentence of the phenomenon, and the same with one violation."""
    scene = Scene(rng, entries)
    good, *spoilt = rng.choice(templates_of(phenomenon))
    good, bad = (template.format_map(scene) for template in (good, rng.choice(spoilt)))
    if good.endswith(".") and bad.endswith(".") and scene.chance(0.1):
        good, bad = f"{scene['thinks']} that {good}", f"{scene['thinks']} that {bad}"
    return finish(good), finish(bad)


def lexicon(words: str) -> dict[str, list[str]]:
    """Returns the entries of each class: "train" (none held out), "held-out" (only those, if a class has any) or "all"."""
    chosen = {}
    for kind, text in LEXICON.items():
        entries = text.split()
        held_out = entries[HELD_OUT_EVERY - 1::HELD_OUT_EVERY]
        train = [entry for entry in entries if entry not in held_out]
        chosen[kind] = {"train": train, "held-out": held_out or entries, "all": entries}[words]
    return chosen


def draw(phenomena: list[str], words: str, n: int, share: float, rng: random.Random, seen: set[str]) -> list[Row]:
    """Samples `n` rows, `share` of them acceptable, of the phenomena in turn, and shuffles them.

    No sentence in `seen` is sampled again; `seen` grows by the new ones.
    """
    entries, rows = lexicon(words), []
    while len(rows) < n:
        phenomenon, label = phenomena[len(rows) % len(phenomena)], int(rng.random() < share)
        sentence = pair(phenomenon, rng, entries)[1 - label]
        if sentence not in seen:
            seen.add(sentence)
            rows.append((phenomenon, label, sentence))
    rng.shuffle(rows)
    return rows


def draw_task(rng: random.Random, seen: set[str]) -> dict[str, list[Row]]:
    """Samples the rows of the task's three files; `seen` grows by their sentences."""
    out_of_domain = [*IN_DOMAIN, *HELD_OUT, *HELD_OUT]  # four rows of 16 are of a held-out phenomenon
    return {
        "in_domain_train.tsv": draw([*IN_DOMAIN], "train", N_TRAIN, ACCEPTABLE_SHARE, rng, seen),
        "in_domain_dev.tsv": draw([*IN_DOMAIN], "train", N_DEV, ACCEPTABLE_SHARE, rng, seen),
        "out_of_domain_dev.tsv": draw(out_of_domain, "held-out", N_DEV, ACCEPTABLE_SHARE, rng, seen),
    }


def draw_corpus() -> list[str]:
    """Samples the corpus of the language model: acceptable sentences, all words and phenomena, no sentence of the task."""
    rng, seen = random.Random(SEED), set()
    draw_task(rng, seen)
    return [sentence for _, _, sentence in draw([*IN_DOMAIN, *HELD_OUT], "all", N_CORPUS, 1.0, rng, seen)]


def draw_pairs(n: int) -> list[tuple[str, str, str]]:
    """Samples minimal pairs: phenomenon, the acceptable sentence, the same with one violation; the same pairs each time.

    Of held-out words, and none of their sentences is in the task or in the language model's corpus.

    Args:
        n: pairs of each phenomenon.
    """
    seen = set(draw_corpus())
    for rows in draw_task(random.Random(SEED), set()).values():
        seen.update(sentence for _, _, sentence in rows)
    rng, entries, found = random.Random(SEED + 1), lexicon("held-out"), []
    for phenomenon in (*IN_DOMAIN, *HELD_OUT):
        kept = 0
        while kept < n:
            both = pair(phenomenon, rng, entries)
            if not seen.intersection(both):
                seen.update(both)
                found.append((phenomenon, *both))
                kept += 1
    return found


def write_tiny_task(folder: Path) -> None:
    """Writes the task as CoLA's files: source code, label (1 acceptable), author's mark (`*` or nothing), sentence.

    `in_domain_train.tsv` (4,000 rows), `in_domain_dev.tsv` (500) and `out_of_domain_dev.tsv` (500: held-out words, and
    held-out phenomena); tab-separated, no header, UTF-8; no sentence twice. The same bytes each time.

    Args:
        folder: made where it does not exist; files of these names in it are overwritten.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in draw_task(random.Random(SEED), set()).items():
        lines = [f"{source}\t{label}\t{'' if label else '*'}\t{sentence}\n" for source, label, sentence in rows]
        (folder / name).write_bytes("".join(lines).encode())


if __name__ == "__main__":
    for name in (*IN_DOMAIN, *HELD_OUT):
        print(name, *pair(name, random.Random(), lexicon("all")), sep="\n    ")
