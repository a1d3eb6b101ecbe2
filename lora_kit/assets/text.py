"""Synthetic text: the pretraining documents of the tiny base, and the dataset for fine-tuning.

The words and sentences are in text.toml. Every function takes its randomness from the given `random.Random`, so a seed
determines all text. Names of people are composed of random syllables, so that a model must read them and cannot
memorise them. One name in eight is reserved: it occurs only in validation data, neither in pretraining nor in training
data.
"""

import json
import tomllib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
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

_TABLES = tomllib.loads(Path(__file__).with_name("text.toml").read_text(encoding="utf-8"))
WORDS: dict[str, list[str]] = {name: words.split() for name, words in _TABLES["words"].items()}
SENTENCES: dict[str, list[str]] = _TABLES["sentences"]
QUESTIONS: dict[str, list[str]] = _TABLES["questions"]
LISTINGS: list[dict[str, str]] = _TABLES["listings"]
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
    syllables = (rng.choice(WORDS["onsets"]) + rng.choice("aeiou") + rng.choice(CODAS) for _ in range(count))
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


def story(rng: Random, *, reserved: bool = False, kind: str = "stories") -> Story:
    """Return a story made from a random frame.

    Args:
        rng: The source of randomness.
        reserved: Whether the person's name is a reserved name.
        kind: "stories", or "notes" for a short note.
    """
    food, second = rng.sample(WORDS["foods"], 2)
    facts = {
        "name": invented_name(rng, reserved=reserved),
        "animal": rng.choice(WORDS["animals"]),
        "place": rng.choice(WORDS["places"]),
        "food": food,
    }
    trait, feeling = rng.sample(WORDS["traits"], 2)
    words = facts | {"second": second, "trait": trait, "feeling": feeling}
    words |= {"job": rng.choice(WORDS["jobs"]), "time": rng.choice(WORDS["times"])}
    frame = rng.choice(SENTENCES[kind])
    return Story(frame.format(**words), {key: value for key, value in facts.items() if f"{{{key}}}" in frame})


def story_document(rng: Random) -> str:
    """Return a micro-story, in some cases with a title or an ending that repeats its words."""
    body = story(rng)
    title = f"{body.facts['name']} and the {body.facts['animal']}\n" if rng.random() < 0.3 else ""
    ending = rng.choice(SENTENCES["endings"]).format(**body.facts, trait=rng.choice(WORDS["traits"]))
    return title + body.text + (" " + ending if rng.random() < 0.5 else "") + END


def value(rng: Random) -> str:
    """Return a random value for a record: a word, a name, a number or a code."""
    code = "".join(rng.choices(ascii_uppercase + digits, k=rng.randint(2, 5)))
    number = str(rng.randint(0, 9999)) if rng.random() < 0.5 else f"{rng.random() * 100:.2f}"
    return rng.choice(
        [invented_word(rng), invented_name(rng), rng.choice(WORDS["foods"]), rng.choice(WORDS["traits"]), number, code]
    )


def listing(rng: Random, pairs: dict[str, str]) -> str:
    """Write key-value pairs in a random format of LISTINGS. None is JSON, so the base never sees a story as JSON."""
    form = rng.choice(LISTINGS)
    joined = form["between"].join(form["pair"].format(key=key, held=held) for key, held in pairs.items())
    return form["around"].format(joined)


def record(rng: Random) -> tuple[str, dict[str, str]]:
    """Return random key-value pairs as text (a listing or JSON) and as a dictionary."""
    pairs = {key: value(rng) for key in rng.sample(WORDS["keys"], rng.randint(2, 5))}
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
    system = turn("system", rng.choice(SENTENCES["instructions"])) if rng.random() < 0.3 else ""
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
    body = story(rng, kind="stories" if rng.random() < 0.5 else "notes")
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
