"""Synthetic text: the pretraining documents of the tiny base, and the dataset for fine-tuning.

Every function takes its randomness from the given `random.Random`, so a seed determines all text. Names of people are
composed of random syllables, so that a model must read them and cannot memorise them. One name in eight is reserved: it
occurs only in validation data, neither in pretraining nor in training data.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase, ascii_uppercase, digits, punctuation

END, UNKNOWN = "<|end|>", "<unk>"
ROLES = ("user", "assistant", "system")
SPECIAL = (END, UNKNOWN, *(f"<|{role}|>" for role in ROLES))
ALPHABET = "\n " + digits + ascii_uppercase + ascii_lowercase + punctuation
FOREIGN = "éüñøßłçжλд"  # the tokenizer reads these as UNKNOWN, so that its embedding is trained too

EXAMPLE_TOKENS = (124, 156)
"""Minimum and maximum length of an example in tokens: a token per character, and four for the two turns.

The range is so narrow that any three examples fit into 480 tokens and no four do, so the number of micro-batches of a
step is known.
"""


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


ANIMALS = _words(
    "bear bird cat cow crab deer dog duck fish fox frog goat goose hare hen horse lamb lion mole mouse mule "
    "pig pony rabbit raven sheep snake spider swan tiger toad turtle whale wolf"
)
PLACES = _words(
    "bakery barn beach bridge castle cave church city dock farm forest garden harbor hill hotel kitchen lake "
    "library market meadow mill museum park pond port river school shop station stable temple tower valley "
    "village well yard"
)
FOODS = _words(
    "apples beans berries bread butter cake carrots cheese corn honey jam milk nuts pears pie plums rice soup"
)
TRAITS = _words(
    "big black brown calm clever cold fast fat gentle hungry kind lazy loud lost proud quiet shy small wet white"
)
JOBS = _words("baker clerk cook doctor driver farmer fisher guard judge miller nurse painter pilot poet sailor teacher")
TIMES = _words("day evening morning night spring summer sunday week winter year")
STORIES = (
    "{name} the {job} found a {trait} {animal} near the {place}. It ate {food} and slept all {time}.",
    "One {time}, {name} saw a {trait} {animal} at the {place}. It was {feeling} and liked {food}.",
    "At the {place}, a {trait} {animal} ran up to {name}. They shared some {food} that {time}.",
    "A {trait} {animal} lived by the {place}, and {name} fed it. It liked {food}, but not {second}.",
    "{name} went to the {place} to look for a lost {animal}. The {job} there brought {food}.",
    "{name} had a {trait} {animal} that liked {food}. Every {time} they walked to the {place}.",
    "{name} worked at the {place}. One {time} a {trait} {animal} came in and ate the {food}.",
    "The {place} was {feeling}. {name} sat there with a {trait} {animal} and {food} all {time}.",
    "{name} was a {feeling} {job} at the {place}. A {trait} {animal} ate {food} there.",
    "In the {place}, {name} sold {food}. A {trait} {animal} watched it all every {time}.",
)
NOTES = (
    "{name} ran.",
    "{name} likes {food}.",
    "{name} has a {animal}.",
    "{name} is at the {place}.",
    "A {animal} and {name}.",
    "A {trait} {animal} ate {food}.",
    "At the {place}: {name}, {food}.",
    "The {animal} is in the {place}.",
)
ENDINGS = (
    "{name} was glad.",
    "{name} and the {animal} went home.",
    "The {animal} of the {place} was {trait}.",
    "{name} still thinks of the {place}.",
)
QUESTIONS = {
    "name": ("Who is it about?", "Who is first?", "What is the name?"),
    "animal": ("Which animal is it?", "What animal is there?", "And the animal?"),
    "place": ("Where is it?", "Which place is it?", "And the place?"),
    "food": ("What food is there?", "What is eaten?"),
}
SYSTEM_LINES = (
    "Answer with one word.",
    "Be brief.",
    "You read stories.",
    "Answer exactly.",
    "Use the words of the text.",
)
KEYS = _words(
    "age city code color cost date id item key kind level name note price rank size state tag team tool type unit"
)
LISTINGS = (  # formats of a pair, the separator between pairs, the format of the whole
    ("{key}: {held}", "\n", "{}"),
    ("{key}={held}", "; ", "{}"),
    ("{key} {held}", " | ", "| {} |"),
    ('{key}: "{held}"', ", ", "{}"),
    ('{key}="{held}"', " ", "<{}>"),
    ("{key} -> {held}", ", ", "[{}]"),
    ("'{key}': '{held}'", ", ", "({})"),
    ('({key} "{held}")', " ", "{}"),
    ("{key}>{held}", "\n", "{}"),
)
ONSETS = _words("b br c d dr f g gl h j k l m n p pl qu r s st t th tr v w x y z")
CODAS = ("", "", "l", "n", "r", "s")
SHARES = {"story": 16, "record": 11, "copying": 13, "questions": 20, "facts": 40}  # percent of the documents


@dataclass(frozen=True)
class Story:
    """A micro-story and its facts, e.g. {"animal": "fox"}."""

    text: str
    facts: dict[str, str]


def turn(role: str, content: str) -> str:
    """Render a message as the base's chat template does."""
    return f"<|{role}|>{content}{END}"


def invented_word(rng: Random) -> str:
    """Return a word of one to three random syllables, in lower case."""
    count = rng.randint(1, 3)
    syllables = (rng.choice(ONSETS) + rng.choice("aeiou") + rng.choice(CODAS) for _ in range(count))
    return "".join(syllables)


def is_reserved(name: str) -> bool:
    """Return whether a name may occur only in validation data."""
    return zlib.crc32(name.encode()) % 8 == 0


def invented_name(rng: Random, *, reserved: bool = False) -> str:
    """Return a name of two or three random syllables that is reserved for validation, or one that is not."""
    while True:
        syllables = (rng.choice("bdfghjklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
        name = ("".join(syllables) + rng.choice(["", "", "l", "n", "r", "s", "th"])).capitalize()
        if is_reserved(name) == reserved:
            return name


def story(rng: Random, *, reserved: bool = False, frames: tuple[str, ...] = STORIES) -> Story:
    """Return a story made from a random frame; `reserved` says whether the person's name is a reserved name."""
    food, second = rng.sample(FOODS, 2)
    facts = {
        "name": invented_name(rng, reserved=reserved),
        "animal": rng.choice(ANIMALS),
        "place": rng.choice(PLACES),
        "food": food,
    }
    trait, feeling = rng.sample(TRAITS, 2)
    words = facts | {"second": second, "trait": trait, "feeling": feeling}
    words |= {"job": rng.choice(JOBS), "time": rng.choice(TIMES)}
    frame = rng.choice(frames)
    return Story(frame.format(**words), {key: value for key, value in facts.items() if f"{{{key}}}" in frame})


def story_document(rng: Random) -> str:
    """Return a micro-story, in some cases with a title or an ending that repeats its words."""
    body = story(rng)
    title = f"{body.facts['name']} and the {body.facts['animal']}\n" if rng.random() < 0.3 else ""
    ending = rng.choice(ENDINGS).format(**body.facts, trait=rng.choice(TRAITS))
    return title + body.text + (" " + ending if rng.random() < 0.5 else "") + END


def value(rng: Random) -> str:
    """Return a random value for a record: a word, a name, a number or a code."""
    code = "".join(rng.choices(ascii_uppercase + digits, k=rng.randint(2, 5)))
    number = str(rng.randint(0, 9999)) if rng.random() < 0.5 else f"{rng.random() * 100:.2f}"
    return rng.choice([invented_word(rng), invented_name(rng), rng.choice(FOODS), rng.choice(TRAITS), number, code])


def listing(rng: Random, pairs: dict[str, str]) -> str:
    """Write key-value pairs in a random format of LISTINGS. None is JSON, so the base never sees a story as JSON."""
    pair, between, around = rng.choice(LISTINGS)
    joined = between.join(pair.format(key=key, held=held) for key, held in pairs.items())
    return around.format(joined)


def record(rng: Random) -> tuple[str, dict[str, str]]:
    """Return random key-value pairs as text (a listing or JSON) and as a dictionary."""
    pairs = {key: value(rng) for key in rng.sample(KEYS, rng.randint(2, 5))}
    return (json.dumps(pairs) if rng.random() < 0.3 else listing(rng, pairs)), pairs


def invented_phrase(rng: Random) -> str:
    """Return one to six random words, some of them sequences of arbitrary characters."""

    def word() -> str:
        kind = rng.random()
        if kind < 0.6:
            return invented_word(rng)
        if kind < 0.75:
            return invented_name(rng)
        letters = ALPHABET[2:] + (rng.choice(FOREIGN) if kind > 0.95 else "") * 20
        return "".join(rng.choices(letters, k=rng.randint(1, 6)))

    return " ".join(word() for _ in range(rng.randint(1, 6)))


def copying_document(rng: Random) -> str:
    """Return a document in which a random phrase is repeated."""
    phrase = invented_phrase(rng)
    style = rng.randrange(4)
    if style == 0:
        return turn("user", f"{rng.choice(['Repeat', 'Say again', 'Copy'])}: {phrase}") + turn("assistant", phrase)
    if style == 1:
        return "\n".join([phrase] * rng.randint(2, 3)) + END
    if style == 2:
        return phrase + rng.choice([" = ", " -> ", " :: "]) + phrase + END
    return f'"{phrase}" is "{phrase}"' + END


def _story_with_questions(rng: Random) -> tuple[str, dict[str, tuple[str, str]]]:
    """Return a text, and for each of its facts a question and the answer."""
    body = story(rng)
    return body.text, {key: (rng.choice(QUESTIONS[key]), held) for key, held in body.facts.items()}


def _record_with_questions(rng: Random) -> tuple[str, dict[str, tuple[str, str]]]:
    text, pairs = record(rng)
    return text, {key: (f"What is {key}?", held) for key, held in pairs.items()}


def questions_document(rng: Random) -> str:
    """Return a conversation with one to three questions about a story or a record, and the answers."""
    text, asked = _story_with_questions(rng) if rng.random() < 0.7 else _record_with_questions(rng)
    system = turn("system", rng.choice(SYSTEM_LINES)) if rng.random() < 0.3 else ""
    chosen = [asked[key] for key in rng.sample(list(asked), min(len(asked), rng.randint(1, 3)))]
    if rng.random() < 0.4:  # all questions in one message
        content = f"{text}\n{' '.join(question for question, _ in chosen)}"
        return system + turn("user", content) + turn("assistant", ", ".join(held for _, held in chosen))
    first, *later = [question for question, _ in chosen]
    asking = [rng.choice([f"{text}\n{first}", f"{first}\n{text}"]), *later]
    turns = zip(asking, (held for _, held in chosen), strict=True)
    return system + "".join(turn("user", question) + turn("assistant", held) for question, held in turns)


def facts_document(rng: Random) -> str:
    """Return a story or a short note, followed by some of its facts in random order.

    Extracting facts is easy to learn from notes, because they are short; stories need the same skill.
    """
    body = story(rng, frames=STORIES if rng.random() < 0.5 else NOTES)
    keys = rng.sample(list(body.facts), rng.randint(1, len(body.facts)))
    facts = ", ".join(body.facts[key] for key in keys)
    if rng.random() < 0.8:
        facts = listing(rng, {key: body.facts[key] for key in keys})
    if rng.random() < 0.5:
        return turn("user", f"{body.text}\n{', '.join(keys)}") + turn("assistant", facts)
    return f"{body.text}\n{facts}{END}"


def document(rng: Random) -> str:
    """Return a random pretraining document, which ends with the END token."""
    kind = rng.choices(list(SHARES), weights=list(SHARES.values()))[0]
    if kind == "story":
        return story_document(rng)
    if kind == "record":
        return record(rng)[0] + END
    if kind == "facts":
        return facts_document(rng)
    return copying_document(rng) if kind == "copying" else questions_document(rng)


def documents(seed: int) -> Iterator[str]:
    """Yield pretraining documents without end."""
    rng = Random(f"pretraining {seed}")
    while True:
        yield document(rng)


def example(rng: Random, *, reserved: bool = False) -> dict[str, list[dict[str, str]]]:
    """Return a record of the dataset: a micro-story, and JSON with its name, animal and place."""
    shortest, longest = EXAMPLE_TOKENS
    while True:
        body = story(rng, reserved=reserved)
        answer = json.dumps({key: body.facts[key] for key in ("name", "animal", "place")})
        if shortest <= len(body.text) + len(answer) + 4 <= longest:
            return {"messages": [{"role": "user", "content": body.text}, {"role": "assistant", "content": answer}]}


def dataset(seed: int, *, train: int = 2000, validation: int = 200) -> dict[str, list[dict]]:
    """Return `train` and `validation` records without repeated stories.

    Args:
        seed: Determines all records.
        train: The number of training records.
        validation: The number of validation records; in every second one the person has a reserved name.
    """
    rng = Random(f"task {seed}")
    seen: set[str] = set()

    def new(reserved: bool) -> dict:
        while (record := example(rng, reserved=reserved))["messages"][0]["content"] in seen:
            pass
        seen.add(record["messages"][0]["content"])
        return record

    return {
        "train": [new(False) for _ in range(train)],
        "validation": [new(number % 2 == 1) for number in range(validation)],
    }
