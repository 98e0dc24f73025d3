"""The embedded default: a small grammar of English, a CoLA-like task made with it, and a tiny GPT-2 that learned it.

Where no model hub can be reached, `run.py` serves itself from here, so that every mode works on a bare laptop:

    python tiny.py        prints an acceptable and an unacceptable sentence of each phenomenon

The grammar makes minimal pairs, as BLiMP does (Warstadt et al. 2020): a pair of templates, the second with one
violation of the phenomenon's rule, is filled with the same words; a row of the task is one side of a pair. The
language model learns from acceptable sentences only, held-out words among them but no sentence of the task: like
GPT-2, it knows the language and has never seen a judgement.
"""

import hashlib
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from record import machine

SEED = 20240229
ACCEPTABLE_SHARE = 0.62  # CoLA has 0.70; the majority baseline must not be 0.5
N_TRAIN, N_DEV = 4000, 500  # rows
N_CORPUS = 30_000  # sentences that the language model learns from
VOCABULARY = 1536  # byte-level BPE tokens: enough for every word to be one, which lets a small model learn agreement
POSITIONS, LAYERS, CHANNELS, HEADS = 128, 6, 128, 4
STEPS, TOKENS_PER_STEP, LEARNING_RATE = 800, 1024, 3e-3

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
# says how each slot is drawn. Mind, in adding one, that past tenses hide agreement, and that single words should not
# give the label away: what stands in a spoilt sentence stands in acceptable ones too.
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
    """A noun phrase and what agrees with it; gender is "m", "f" or "n"."""

    text: str
    plural: bool
    gender: str

    @property
    def self(self) -> str:
        return "themselves" if self.plural else {"m": "himself", "f": "herself"}[self.gender]

    def __str__(self) -> str:
        return self.text


class Verb(NamedTuple):
    """A verb's five forms."""

    base: str
    s: str
    past: str
    part: str
    ing: str


def add_s(word: str) -> str:
    """The plural of a regular noun, the third person of a verb."""
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|ch|sh)$", word) else "s")


def inflect(entry: str) -> Verb:
    """`sleep/slept/slept` or `arrive` to its forms; the lexicon gives what the rules would get wrong."""
    base, *given = entry.split("/")
    past = re.sub(r"([^aeiou])y$", r"\1i", base).removesuffix("e") + "ed"
    regular = [past, past, base.removesuffix("e") + "ing"]
    return Verb(base, add_s(base), *given, *regular[len(given):])


def finish(text: str) -> str:
    """Capital first letter, `a` to `an` before a vowel."""
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return text[0].upper() + text[1:]


class Scene(dict):
    """The words of one pair: a slot is drawn when a template first names it, and stays the same for both sentences."""

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
        """Singular and plural."""
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
        """A modifier that puts the noun `other` between a subject and its verb."""
        verb, who = self.verb("praise"), self.pick("who", "that")
        seen = self.pick(verb.past, verb.base if other.plural else verb.s)
        return self.pick(f" {self['near']} {other}", f" {who} {verb.past} {other}", f" {who} {other} {seen}")

    def verb_phrase(self) -> tuple[Verb, str]:
        """A verb and its objects, with the space before them."""
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
        """A subject and a finite verb."""
        subject = self.person(names=0.2)
        return f"{subject} {self.finite(self.verb(kind), subject.plural, self.pick('present', 'past'))}"

    def end(self) -> str:
        place = f" {self['near']} the {self['place']}"
        return self.pick(place, place, " again", " today") if self.chance(0.3) else ""

    def queen(self) -> Noun:
        """Somebody whom the reflexive of {king} cannot mean."""
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


def pair(phenomenon: str, rng: random.Random, entries: dict[str, list[str]]) -> tuple[str, str]:
    """An acceptable sentence of the phenomenon, and the same with one violation."""
    templates = re.sub(r"\s+\|", " |", {**IN_DOMAIN, **HELD_OUT}[phenomenon].strip()).splitlines()
    scene = Scene(rng, entries)
    good, *spoilt = rng.choice(templates).strip().split(" | ")
    good, bad = (template.format_map(scene) for template in (good, rng.choice(spoilt)))
    if good.endswith(".") and bad.endswith(".") and scene.chance(0.1):
        good, bad = f"{scene['thinks']} that {good}", f"{scene['thinks']} that {bad}"
    return finish(good), finish(bad)


def lexicon(words: str) -> dict[str, list[str]]:
    """The entries of each class: "train" (none held out), "held-out" (only those, if a class has any) or "all"."""
    chosen = {}
    for kind, text in LEXICON.items():
        entries = text.split()
        held_out = entries[HELD_OUT_EVERY - 1::HELD_OUT_EVERY]
        train = [entry for entry in entries if entry not in held_out]
        chosen[kind] = {"train": train, "held-out": held_out or entries, "all": entries}[words]
    return chosen


def draw(phenomena: list[str], words: str, n: int, share: float, rng: random.Random, seen: set[str]) -> list[Row]:
    """`n` rows, `share` of them acceptable, of the phenomena in turn, then shuffled; none in `seen`, which grows."""
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
    """The rows of the task's three files; `seen` grows by their sentences."""
    out_of_domain = [*IN_DOMAIN, *HELD_OUT, *HELD_OUT]  # four rows of 16 are of a held-out phenomenon
    return {
        "in_domain_train.tsv": draw([*IN_DOMAIN], "train", N_TRAIN, ACCEPTABLE_SHARE, rng, seen),
        "in_domain_dev.tsv": draw([*IN_DOMAIN], "train", N_DEV, ACCEPTABLE_SHARE, rng, seen),
        "out_of_domain_dev.tsv": draw(out_of_domain, "held-out", N_DEV, ACCEPTABLE_SHARE, rng, seen),
    }


def draw_corpus() -> list[str]:
    """What the language model learns from: acceptable sentences, all words, all phenomena, none of the task's."""
    rng, seen = random.Random(SEED), set()
    draw_task(rng, seen)
    return [sentence for _, _, sentence in draw([*IN_DOMAIN, *HELD_OUT], "all", N_CORPUS, 1.0, rng, seen)]


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


def train_tokenizer(corpus: list[str]):
    """GPT-2's kind of tokenizer: byte-level BPE, <|endoftext|> as begin and end, no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    ))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end, model_max_length=POSITIONS
    )


def equal_length_batches(sequences: list[list[int]], rng: random.Random) -> Iterator[list[list[int]]]:
    """Endless batches of about TOKENS_PER_STEP tokens; the sentences of one have one length, so no pad is computed."""
    by_length: dict[int, list[list[int]]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence), []).append(sequence)
    while True:
        batches = []
        for length, group in by_length.items():
            rng.shuffle(group)
            size = TOKENS_PER_STEP // length
            batches += [group[start:start + size] for start in range(0, len(group), size)]
        rng.shuffle(batches)
        yield from batches


def train_model(folder: Path) -> None:
    """Trains the tokenizer and the GPT-2 on the corpus, and saves both in `folder`."""
    import torch
    from tqdm import tqdm
    from transformers import GPT2Config, GPT2LMHeadModel

    corpus = draw_corpus()
    tokenizer = train_tokenizer(corpus)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=POSITIONS, n_embd=CHANNELS, n_layer=LAYERS, n_head=HEADS,
        bos_token_id=end, eos_token_id=end, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # gelu_new, fused
    )
    machine.keep_freed_memory()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)  # torch.manual_seed would reseed the caller's GPU as well
        model = GPT2LMHeadModel(config)
    # Half of the sentences start with <|endoftext|>, as text generated from nothing does; half at position 0 without
    # it, as a prompt or a sentence to classify does.
    rng = random.Random(SEED)
    texts = [sentence + tokenizer.eos_token for sentence in corpus]
    sequences = [[end] * (rng.random() < 0.5) + ids for ids in tokenizer(texts)["input_ids"]]
    batches = equal_length_batches(sequences, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1, cycle_momentum=False
    )
    with tqdm(range(STEPS), desc="tiny GPT-2, first use", unit="step") as progress:
        for step in progress:
            input_ids = torch.tensor(next(batches))  # (B, T)
            loss = model(input_ids, labels=input_ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if step % 50 == 0:
                progress.set_postfix(loss=f"{loss.item():.2f}")
    model.config.activation_function = "gelu_new"  # as stock GPT-2 has it
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_model_folder(cache: Path | None = None) -> Path:
    """The folder of the tiny GPT-2 and its tokenizer, for `from_pretrained`; trained on first use (a minute or so).

    The folder is `lora-distil/tiny-<hash of this file>` below `cache`. It appears whole or not at all, and two
    processes that need it at once train it once. The caller's random state is untouched.

    Args:
        cache: the user's cache folder; by default `$XDG_CACHE_HOME`, or else `~/.cache`.

    Raises:
        OSError: the cache folder cannot be written.
    """
    import torch
    from filelock import FileLock

    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = cache / "lora-distil" / f"tiny-{recipe}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            threads = torch.get_num_threads()
            # Two threads, whatever the machine has: more would wait for each other, and the bytes are the same on a
            # laptop and on a server.
            torch.set_num_threads(min(2, os.cpu_count() or 1))
            try:
                train_model(partial)
                partial.rename(folder)
            finally:
                torch.set_num_threads(threads)
                shutil.rmtree(partial, ignore_errors=True)
    return folder


if __name__ == "__main__":
    for name in (*IN_DOMAIN, *HELD_OUT):
        print(name, *pair(name, random.Random(), lexicon("all")), sep="\n    ")
