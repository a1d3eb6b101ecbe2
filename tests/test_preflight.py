"""The preflight counts what was put into the arrays by hand, and says where the first of it is."""

import numpy as np
import pytest
from conftest import TEMPLATE, make_tokenizer, write_jsonl
from transformers import AutoTokenizer

from lora_kit.data import preflight
from lora_kit.data.formats import Completion
from lora_kit.data.messages import question
from lora_kit.data.packing import cost
from lora_kit.data.preflight import (
    KINDS,
    Signs,
    costs,
    findings,
    headers_of,
    histogram,
    inspect_all,
    judge,
    roles,
    signs_of,
    sources_of,
)
from lora_kit.data.rendering import Renderer
from lora_kit.data.template import tokenize_all
from lora_kit.data.tokens import Tokens, prepare
from lora_kit.recipe.schema import Preflight, Recipe

STOP, BOS, UNKNOWN, ASK, ANSWER, OPEN, CLOSE, NEWLINE = 1, 2, 3, 4, 5, 6, 7, 8
SIGNS = Signs(
    stop=STOP,
    bos=BOS,
    adds_bos=True,
    unknown=UNKNOWN,
    prompt=(ASK, ANSWER),
    blank=NEWLINE,
    thoughts=((OPEN, CLOSE), (OPEN, NEWLINE, CLOSE)),
)


def inspect(tokens, signs):
    """Inspect the examples of a single source."""
    return preflight.inspect(tokens, [signs], [len(tokens)])


def tokens(*examples):
    """Examples written as ids, negative where they are trained."""
    return Tokens.of([(np.abs(np.array(ids, np.int32)), np.array(ids) < 0) for ids in examples])


GOOD = [BOS, 20, ASK, ANSWER, NEWLINE, -21, -22, -STOP]
CASES = {  # an example, and what must be found in it
    "good": (GOOD, set()),
    "two answers": ([*GOOD, *GOOD[1:]], set()),
    "masked": ([BOS, 20, ASK, ANSWER, NEWLINE, 21, STOP], {"masked"}),
    "only its first token": ([-BOS, 20, ASK, ANSWER, NEWLINE, 21, STOP], {"masked"}),
    "a single token": ([-BOS], {"masked"}),
    "cut": (GOOD[:-1], {"unstopped"}),
    "first answer without stop": ([*GOOD[:-1], ASK, ANSWER, NEWLINE, -21, -STOP], {"unstopped"}),
    "whole text": ([BOS, -20, -21, -STOP], set()),
    "whole text without end": ([BOS, -20, -21], {"endless"}),
    "whole text with the generation prompt": ([BOS, -20, -ASK, -ANSWER, -NEWLINE, -21, -STOP], set()),
    "doubled": ([BOS, *GOOD], {"doubled_bos"}),
    "missing": (GOOD[1:], {"missing_bos"}),
    "unknown": ([BOS, UNKNOWN, ASK, ANSWER, NEWLINE, -21, -STOP], {"unknown"}),
    "empty thought": ([*GOOD[:5], -OPEN, -CLOSE, -21, -STOP], {"empty_thoughts"}),
    "empty thought of a line": ([*GOOD[:5], -OPEN, -NEWLINE, -CLOSE, -21, -STOP], {"empty_thoughts"}),
    "empty thought in a question": ([BOS, OPEN, CLOSE, *GOOD[1:]], set()),
    "thought": ([*GOOD[:5], -OPEN, -30, -CLOSE, -21, -STOP], set()),
    "prompt trained": ([BOS, 20, -ASK, -ANSWER, -NEWLINE, -21, -STOP], {"prompted"}),
    "last word of the prompt trained": ([BOS, 20, ASK, -ANSWER, -9, -21, -STOP], {"prompted"}),
    "end of the prompt trained": ([BOS, 20, ASK, ANSWER, -NEWLINE, -21, -STOP], {"prompted"}),
    "other blank after the prompt": ([BOS, 20, ASK, ANSWER, -9, -21, -STOP], set()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_kind_is_found_and_no_other(case):
    ids, expected = CASES[case]
    found = inspect(tokens(ids), SIGNS).found
    assert set(found) == expected and all((one.count, one.first) == (1, 0) for one in found.values())


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_all_kinds_are_counted_over_any_chunks(monkeypatch, size):
    """With neighbours on both sides: nothing that begins in an example ends in the next one."""
    monkeypatch.setattr(preflight, "CHUNK_TOKENS", size)
    examples = [ids for ids, _ in CASES.values()]
    examples = [[BOS, 100 + n, *ids[1:]] if ids[:2] == GOOD[:2] else ids for n, ids in enumerate(examples)]
    kinds = [kinds for _, kinds in CASES.values()]
    inspection = inspect(tokens(*examples), SIGNS)
    for kind in set(KINDS) - {"duplicates", "leaked"}:
        having = [index for index, found in enumerate(kinds) if kind in found]
        assert (inspection.found[kind].count, inspection.found[kind].first) == (len(having), having[0]), kind
    assert inspection.found["duplicates"].count == 1, "the ids of one are those of another, with other trained tokens"
    assert inspection.weights.tolist() == [sum(number < 0 for number in ids[1:]) for ids in examples]


def test_nothing_spans_two_examples():
    pair = tokens([BOS, 20, ASK, ANSWER, NEWLINE, -21, -STOP], [BOS, 30, ASK], [ANSWER, -NEWLINE, -STOP],
                  [BOS, -40, -STOP, OPEN], [-CLOSE, -50, -STOP])  # fmt: skip
    assert not {"prompted", "empty_thoughts"} & set(inspect(pair, SIGNS).found)


def test_a_template_that_marks_parts_of_an_answer_is_judged_by_its_last_part():
    ids = [BOS, 20, ASK, ANSWER, NEWLINE, -21, 22, -23, -STOP]
    assert set(inspect(tokens(ids), SIGNS).found) == {"unstopped"}
    assert not inspect(tokens(ids), SIGNS._replace(parts=True)).found
    assert set(inspect(tokens(ids[:-1]), SIGNS._replace(parts=True)).found) == {"unstopped"}


def test_where_everything_is_trained_an_untrained_message_is_no_cut():
    ids = [BOS, -20, -ASK, -ANSWER, -NEWLINE, 21, STOP, -ASK, -ANSWER, -NEWLINE, -21, -STOP]
    assert set(inspect(tokens(ids), SIGNS).found) == {"unstopped", "prompted"}
    assert not inspect(tokens(ids), SIGNS._replace(answers=False)).found
    assert set(inspect(tokens(ids[:5]), SIGNS._replace(answers=False)).found) == {"endless"}


def test_pieces_of_a_text_may_end_anywhere():
    pieces = tokens([BOS, -20, -21], [BOS, 20, 21, -22, -23], [22, 23, -24, -STOP])
    assert set(inspect(pieces, SIGNS).found) == {"unstopped", "endless", "missing_bos"}
    assert not inspect(pieces, SIGNS._replace(pieces=True)).found
    broken = tokens([BOS, 20, -21, 22, -STOP])
    assert set(inspect(broken, SIGNS._replace(pieces=True)).found) == {"unstopped"}


def test_without_a_sign_its_kind_is_not_looked_for():
    ids = [[UNKNOWN, *GOOD[2:]], [OPEN, CLOSE, -STOP]]
    assert not inspect(tokens(*ids), Signs(stop=STOP)).found


def test_repeated_examples_are_named_with_the_first_of_their_kind():
    other = [BOS, 30, ASK, ANSWER, NEWLINE, -21, -22, -STOP]
    swapped = [BOS, 20, ASK, ANSWER, NEWLINE, -22, -21, -STOP]
    train = inspect(tokens(other, GOOD, swapped, GOOD, other, GOOD), SIGNS)
    held_out = inspect(tokens([*swapped[:-1], -9, -STOP], swapped, other), SIGNS)
    found = {(one.part, one.kind): (one.count, one.first, one.original) for one in findings(train, held_out)}
    assert found == {("training", "duplicates"): (3, 3, 1), ("validation", "leaked"): (2, 1, 2)}


def test_random_examples_are_repeated_as_often_as_sets_say():
    rng = np.random.default_rng(0)
    examples = [tuple(rng.integers(1, 4, rng.integers(1, 6))) for _ in range(400)]
    count = inspect(tokens(*examples), Signs(stop=0)).found["duplicates"].count
    assert count == len(examples) - len(set(examples))


@pytest.mark.parametrize(("limit", "errors"), [(0.0, 1), (0.24, 1), (0.25, 0), (1.0, 0)])
def test_a_finding_of_more_examples_than_the_recipe_allows_is_an_error(limit, errors):
    train = inspect(tokens(GOOD, [BOS, 30, *GOOD[2:-1]], [BOS, 31, *GOOD[2:]], [BOS, 32, *GOOD[2:]]), SIGNS)
    found = judge(findings(train, None), Preflight(unstopped=limit), lambda part, index: f"{part}.jsonl:{index + 1}")
    assert [len(texts) for texts in found] == [errors, 1 - errors]
    (text,) = (*found[0], *found[1])
    assert text.startswith(
        "training.jsonl:2: the only training example (25.0%) with an answer that does not end with the stop token, so "
        "it does not teach to stop; most often it is cut; raise data.sequence_length"
    )
    assert text.endswith(f"(preflight.unstopped allows {limit:.4g} of the examples)") is bool(errors)


def test_unknown_tokens_are_told_by_the_preparation_and_refused_here():
    found = findings(inspect(tokens(GOOD, [BOS, UNKNOWN, *GOOD[2:]]), SIGNS), None)
    assert judge(found, Preflight(), lambda part, index: "here") == ([], [])
    ((error,), warnings) = judge(found, Preflight(unknown=0.1), lambda part, index: "here")
    assert error.startswith("here: the only training example (50.0%) with the unknown token") and not warnings


@pytest.mark.parametrize("kind", KINDS)
def test_every_message_has_one_line_with_place_and_remedy(kind):
    original, origin = 4 if kind in ("duplicates", "leaked") else None, "training" if kind == "leaked" else "validation"
    text = preflight.Finding("validation", kind, 4, 2000, 7, original).text(lambda part, index: f"{part}:{index}")
    place = f"validation:7 (as {origin}:4): " if original else "validation:7: "
    assert text.startswith(f"{place}the first of 4 validation examples (0.2%) ")
    assert "\n" not in text and "; " in text


def tokenizer_of(tmp_path, **changes):
    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_the_signs_of_a_tokenizer(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    ids = tokenizer.convert_tokens_to_ids
    signs = signs_of(Renderer(tokenizer), raw=False)
    assert signs[:4] == (ids("</s>"), None, False, ids("<unk>")) and signs.prompt == (ids("<assistant>"),)
    assert tuple(map(ids, "<think></think>")) in signs.thoughts and not signs.parts
    assert signs_of(Renderer(tokenizer), raw=True).prompt == ()
    plain = TEMPLATE.partition("{% if add_generation_prompt")[0]
    ended = plain.replace("{% if message.role == 'assistant' %}{{ '</s>' }}{% endif %}", "</s>")
    assert signs_of(Renderer(tokenizer, ended), raw=False).prompt == (), "there is no generation prompt"
    lined = signs_of(Renderer(tokenizer, TEMPLATE.replace("'<assistant>' }}", "'<assistant>\\n' }}")), raw=False)
    assert (lined.prompt, lined.blank) == ((ids("<assistant>"),), ids("\n"))
    tokenizer.unk_token = "</s>"
    assert signs_of(Renderer(tokenizer), raw=False).unknown is None, "as GPT-2, whose unknown token is its end"
    tokenizer.chat_template = "{{ raise_exception('a system message is needed') }}"
    assert signs_of(Renderer(tokenizer), raw=False).prompt == ()


def test_what_a_template_does_is_found_in_the_tokens_that_it_makes(tmp_path):
    """Qwen 3 writes an empty thought; a wrong template marks its header for training; a record repeats its BOS."""
    tokenizer = tokenizer_of(tmp_path, bos_token="<system>")
    record = question([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}])
    example = [type(record)(record.messages)]

    def found(template, text=example):
        renderer = Renderer(tokenizer, template)
        (made,) = tokenize_all(text, renderer)
        data = Tokens.of([(np.array(made.ids, np.int32), np.array(made.trained))])
        return set(inspect(data, signs_of(renderer, raw=text is not example)).found)

    answer = "'<assistant>' + message.content"
    assert found(TEMPLATE) == set()
    thinking = (
        "('<assistant><think>\\n\\n</think>\\n\\n' if message.role == 'assistant' else '<user>') + message.content"
    )
    assert found(TEMPLATE.replace("'<' + message.role + '>' + message.content", thinking)) == {"empty_thoughts"}
    marked = (
        "{% for message in messages %}{% if message.role == 'user' %}<user>{{ message.content }}{% else %}"
        "{% generation %}{{ " + answer + " }}</s>{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert found(marked) == set(), "training begins behind the prompt, where the template begins as generation does"
    assert found("{{ messages | length }}" + marked) == {"prompted"}
    right = marked.replace("{% generation %}{{ " + answer, "<assistant>{% generation %}{{ message.content")
    assert found(right) == set()
    assert found("<system><system>" + TEMPLATE) == {"doubled_bos"}
    assert found(TEMPLATE, [Completion("é:", "a")]) == {"unknown"}


def test_every_kind_has_a_limit_in_the_recipe():
    assert [*Preflight.model_fields] == [*KINDS]
    for kind in KINDS:
        found = [preflight.Finding("validation", kind, 4, 2000, 7)]
        errors, _ = judge(found, Preflight(**{kind: 0.001}), lambda part, index: "here")
        assert [error.endswith(f"(preflight.{kind} allows 0.001 of the examples)") for error in errors] == [True]
        assert judge(found, Preflight(**{kind: 0.002}), lambda part, index: "here")[0] == []


def test_each_source_is_judged_by_its_own_template_and_cuts(tmp_path):
    """A template with {% generation %} may leave out the middle of an answer, and only pieces may end anywhere."""
    tokenizer = tokenizer_of(tmp_path)
    tokenizer.chat_template = None
    trained = "{{% generation %}}{{{{ {} }}}}{{% endgeneration %}}".format
    template = (
        "{% for m in messages if m.role in ('user', 'assistant') %}{% if m.role == 'user' %}<user>{{ m.content }}"
        "{% else %}<assistant>ANSWER{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    answer = trained("m.thinking") + "<think>" + trained("m.content + '</s>'")
    (tmp_path / "marked.jinja").write_text(template.replace("ANSWER", answer))
    (tmp_path / "own.jinja").write_text(
        template.replace("<user>", "<tool>").replace("ANSWER", "{{ m.content + '</s>' }}")
    )
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "thinking": "why"}]
    write_jsonl(tmp_path / "marked.jsonl", [{"messages": turns}])
    write_jsonl(tmp_path / "own.jsonl", [{"messages": [turns[0], {"role": "assistant", "content": "no"}]}])
    (tmp_path / "text.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 2)
    sources = [{"source": f"{name}.jsonl", "template": f"{name}.jinja"} for name in ("marked", "own")]
    settings = {"train": [*sources, "text.txt"], "validation": {"own": sources[1]}}
    data = {**settings, "overlong": "split", "sequence_length": 20}
    recipe = Recipe.model_validate({"base": {"repo": "x"}, "data": data, "train": {"epochs": 1}})
    recipe._folder = tmp_path
    made = prepare(recipe.data, Renderer(tokenizer), base_dir=tmp_path, seed=0)
    sources = sources_of(recipe, made, Renderer(tokenizer))
    assert [(signs.parts, signs.pieces) for signs in sources["training"].signs] == [
        (True, False), (False, False), (False, True)
    ]  # fmt: skip
    train, held_out = inspect_all(made, sources)
    assert not train.found and not held_out.found and len(train.weights) == len(made.train) > 4
    headers = [headers_of(own) for own in sources["training"].renderers[:2]]
    counted = roles(made.train, [*headers, ()], sources["training"].sizes)
    assert counted == {"user": (4, 0), "assistant": (14 + 3, 7 + 3)}


def test_costs_and_lengths_are_those_of_a_count_by_hand():
    data = tokens([1, -2], [1, 2, -3], [1, -2, -3, -4, -5], [1, -2])
    weights = inspect(data, Signs(stop=0)).weights
    first, second = costs(data, weights, {"a.jsonl": (0, 2), "b.jsonl": (2, 4)})
    assert (first.source, first.examples, first.tokens, first.trained) == ("a.jsonl", 2, 5, 2)
    assert (second.source, second.examples, second.tokens, second.trained) == ("b.jsonl", 2, 7, 5)
    assert first.share == pytest.approx(cost([2, 3]) / cost([2, 3, 5, 2])) and first.share + second.share == 1
    assert histogram(np.array([1, 2, 3, 10, 20]), bins=4) == [(1, 5, 3), (6, 10, 1), (11, 15, 0), (16, 20, 1)]
    assert histogram(np.array([7, 7])) == [(7, 7, 2)]
    assert histogram(np.array([5, 9, 6]), bins=2) == [(5, 7, 2), (8, 10, 1)]


@pytest.mark.parametrize("size", [1, 9, 1 << 20])
@pytest.mark.parametrize("blank", ["", "\\n"])
def test_trained_tokens_are_counted_by_role(tmp_path, monkeypatch, size, blank):
    """The last answer counts with its stop token; the others end where the next header begins."""
    monkeypatch.setattr(preflight, "CHUNK_TOKENS", size)
    tokenizer = tokenizer_of(tmp_path)
    template = TEMPLATE.replace("message.role + '>'", f"message.role + '>{blank}'").replace(
        "<assistant>'", f"<assistant>{blank}'"
    )
    texts = [
        [("system", "be"), ("user", "hi"), ("assistant", "yes"), ("user", "more?"), ("assistant", "no")],
        [("user", "x"), ("assistant", "seven")],
    ]
    conversations = [question([{"role": role, "content": content} for role, content in messages]) for messages in texts]
    conversations = [type(each)(each.messages) for each in conversations]
    renderer = Renderer(tokenizer, template)
    made = tokenize_all(conversations, renderer)
    data = Tokens.of([(np.array(each.ids, np.int32), np.array(each.trained)) for each in made])
    counted = {role: pair for role, pair in roles(data, [headers_of(renderer)], [len(data)]).items() if pair[0]}
    assert counted == {"system": (2, 0), "user": (8, 0), "assistant": (12, 12)}
    everything = Tokens(data.ids, np.ones_like(data.trained), data.offsets)
    assert roles(everything, [headers_of(renderer)], [len(everything)])["user"] == (8, 8)


def test_a_template_that_renders_no_probe_has_no_headers(tmp_path):
    renderer = Renderer(tokenizer_of(tmp_path), "{{ raise_exception('no') }}")
    assert headers_of(renderer) == () and roles(tokens(GOOD), [()], [1]) == {}
