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
from pathlib import Path
from random import Random
from string import ascii_lowercase, ascii_uppercase, digits, punctuation
from typing import NamedTuple

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


class Passage(NamedTuple):
    """A micro-story, a note or a record, and its facts, e.g. {"animal": "fox"}."""

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


def story(rng: Random, *, reserved: bool = False, kind: str = "stories") -> Passage:
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
    job, time = rng.choice(WORDS["jobs"]), rng.choice(WORDS["times"])
    frame = rng.choice(SENTENCES[kind])
    text = frame.format(**facts, second=second, trait=trait, feeling=feeling, job=job, time=time)
    return Passage(text, {key: value for key, value in facts.items() if f"{{{key}}}" in frame})


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


def record(rng: Random) -> Passage:
    """Return random key-value pairs, written as a listing or as JSON."""
    pairs = {key: value(rng) for key in rng.sample(WORDS["keys"], rng.randint(2, 5))}
    return Passage(json.dumps(pairs) if rng.random() < 0.3 else listing(rng, pairs), pairs)


def record_document(rng: Random) -> str:
    """Return a record."""
    return record(rng).text + END


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


def questions_document(rng: Random) -> str:
    """Return a conversation with one to three questions about a story or a record, and the answers."""
    if rng.random() < 0.7:
        text, facts = story(rng)
        questions = {key: rng.choice(QUESTIONS[key]) for key in facts}
    else:
        text, facts = record(rng)
        questions = {key: f"What is {key}?" for key in facts}
    system = turn("system", rng.choice(SENTENCES["instructions"])) if rng.random() < 0.3 else ""
    keys = rng.sample(list(facts), min(len(facts), rng.randint(1, 3)))
    if rng.random() < 0.4:  # all questions in one message
        content = f"{text}\n{' '.join(questions[key] for key in keys)}"
        return system + turn("user", content) + turn("assistant", ", ".join(facts[key] for key in keys))
    first = questions[keys[0]]
    questions[keys[0]] = rng.choice([f"{text}\n{first}", f"{first}\n{text}"])
    return system + "".join(turn("user", questions[key]) + turn("assistant", facts[key]) for key in keys)


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


SHARES = {  # percent of the documents
    story_document: 16,
    record_document: 11,
    copying_document: 13,
    questions_document: 20,
    facts_document: 40,
}


def documents(seed: int) -> Iterator[str]:
    """Yield pretraining documents without end; each ends with the END token."""
    rng = Random(f"pretraining {seed}")
    while True:
        (document,) = rng.choices(list(SHARES), weights=list(SHARES.values()))
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


def preference(rng: Random) -> dict[str, str | list[dict[str, str]]]:
    """Return a pair of answers to a micro-story: JSON with its facts, and the same with one fact of another story."""
    record = example(rng)
    prompt, answer = record["messages"]
    facts, key = json.loads(answer["content"]), rng.choice(("name", "animal", "place"))
    while (other := json.loads(example(rng)["messages"][1]["content"])[key]) in prompt["content"]:
        pass
    return {"prompt": [prompt], "chosen": answer["content"], "rejected": json.dumps(facts | {key: other})}


def preferences(seed: int, *, train: int = 300, validation: int = 100) -> dict[str, list[dict]]:
    """Return `train` and `validation` records of the format preference."""
    rng = Random(f"preferences {seed}")
    return {
        "train": [preference(rng) for _ in range(train)],
        "validation": [preference(rng) for _ in range(validation)],
    }
