"""Figures of generated answers, each a mean over the prompts between 0 and 1.

| name | of an answer |
|---|---|
| exact_match | it is the expected text, without blanks at both ends |
| contains | it contains the expected text |
| regex | the recipe's regular expression is found in it |
| json | it is JSON |
| tool_names | it calls the functions that the expected answer calls, in the same order |
| tool_arguments | and with the same arguments |
| rouge | ROUGE-L: the F-measure of the longest common subsequence of words, by rouge-score |
| bleu | BLEU of all answers together, by sacrebleu, divided by 100 |

tool_names and tool_arguments are means over the prompts whose expected answer calls a function.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, NamedTuple

from lora_kit.data import strict_json
from lora_kit.errors import DataError, LaunchError
from lora_kit.recipe.schema import EXACT_MATCH, Evaluate

PACKAGES = {"rouge": "rouge_score", "bleu": "sacrebleu"}
NAMES_OF_ARGUMENTS = ("arguments", "parameters")


class Answered(NamedTuple):
    """A prompt's answer; None if the prompt left no position for one. And the expected answer."""

    answer: str | None
    expected: str


class Call(NamedTuple):
    """A call of a function in an answer."""

    name: str
    arguments: Any


def require_packages(settings: Evaluate) -> None:
    """Refuse metrics whose packages are not installed.

    Raises:
        LaunchError: A package is missing; the message names each such metric.
    """
    missing = [name for name in settings.metrics if name in PACKAGES and find_spec(PACKAGES[name]) is None]
    if missing:
        packages = " and ".join(PACKAGES[name] for name in missing)
        raise LaunchError(
            f"evaluate.metrics: {', '.join(missing)}: {packages} not installed; "
            "pip install 'lora_kit[metrics]', or remove the name"
        )


def figures_of_answers(answered: Sequence[Answered], settings: Evaluate) -> dict[str, float | None]:
    """Return exact match and the figures of the recipe's `evaluate.metrics`; None for the mean of nothing."""
    found: dict[str, float | None] = {}
    for name in (EXACT_MATCH, *settings.metrics):
        if name == "bleu":
            found[name] = _bleu(answered) if answered else None
            continue
        counted, score = answered, _scorer(name, settings)
        if name in ("tool_names", "tool_arguments"):
            counted = [each for each in answered if calls_in(each.expected)]
        scores = [0.0 if each.answer is None else float(score(each.answer, each.expected)) for each in counted]
        found[name] = sum(scores) / len(scores) if scores else None
    return found


def _scorer(name: str, settings: Evaluate) -> Callable[[str, str], float]:
    """Return the function from an answer and the expected answer to a figure between 0 and 1."""
    if name == "rouge":
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"])
        return lambda answer, expected: scorer.score(expected, answer)["rougeL"].fmeasure
    if name == "regex":
        pattern = re.compile(settings.regex or "")
        return lambda answer, expected: pattern.search(answer) is not None
    return _SCORERS[name]


def _is_json(answer: str) -> bool:
    try:
        strict_json.loads(answer.strip())
    except DataError:
        return False
    return True


_SCORERS: dict[str, Callable[[str, str], float]] = {
    EXACT_MATCH: lambda answer, expected: answer.strip() == expected.strip(),
    "contains": lambda answer, expected: expected.strip() in answer,
    "json": lambda answer, expected: _is_json(answer),
    "tool_names": lambda answer, expected: (
        [call.name for call in calls_in(answer)] == [call.name for call in calls_in(expected)]
    ),
    "tool_arguments": lambda answer, expected: calls_in(answer) == calls_in(expected),
}


def _bleu(answered: Sequence[Answered]) -> float:
    from sacrebleu.metrics.bleu import BLEU

    answers, expected = [each.answer or "" for each in answered], [each.expected for each in answered]
    return float(BLEU().corpus_score(answers, [expected]).score) / 100


def calls_in(answer: str) -> list[Call]:
    """Return the calls of functions in an answer, in order, however the chat template marks them.

    A call is a JSON object with `name` and with `arguments` or `parameters`, also inside `function`, alone, in a list,
    or between tags. Arguments that are a string with JSON count as that JSON.
    """
    found = list[Call]()
    for value in _objects(answer):
        call = value.get("function", value)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            continue
        given = next((call[key] for key in NAMES_OF_ARGUMENTS if key in call), None)
        if isinstance(given, str):
            with suppress(ValueError):
                given = json.loads(given)
        if given is not None:
            found.append(Call(call["name"], given))
    return found


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a text that are not inside another one."""
    decoder, place = json.JSONDecoder(), text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
            yield value
        except (ValueError, RecursionError):
            end = place + 1
        place = text.find("{", end)
