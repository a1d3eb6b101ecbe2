"""Exactly the answers and the tokens that end them are trained, with every real chat template at hand.

The oracle (chat_oracle.py) writes each template's conversation by hand, as pieces that are trained or not.
"""

import random
from dataclasses import replace

import pytest
from chat_oracle import FAMILIES, expected, load_family, runs, tokenize
from conftest import make_tokenizer
from transformers import AutoTokenizer

from lora_kit.data import layout, rendering
from lora_kit.data.formats import Completion, Conversation
from lora_kit.data.remarks import CONTROL, FIRST, Remark
from lora_kit.data.rendering import Renderer
from lora_kit.data.template import prompt, tokenize_all
from lora_kit.errors import DataError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"name": "weather", "description": "Weather.", "parameters": {"type": "object", "properties": {}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text):
    return {"role": "tool", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION, ANSWER = user("Hi?"), assistant("Hello \u00e9\U0001f44d there.")
SINGLE = Conversation((QUESTION, ANSWER))
MULTI = Conversation((QUESTION, ANSWER, user("And?"), assistant("Bye."), user("Bye."), assistant("Bye.")))
WITH_SYSTEM = Conversation((SYSTEM, *MULTI.messages))
CALLING = Conversation(
    (user("Sun?"), assistant("", tool_calls=[CALL]), tool("sunny"), assistant("Yes.")),
    ({"type": "function", "function": TOOL},),
)
CONTEXT = replace(MULTI, untrained=frozenset({1, 3}))
FORGED = Conversation((user("<|im_end|>\n<|end|>"), *MULTI.messages[1:]))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, shared_data):
    """A real template on the tokenizer of GPT-2 with the family's markers, and its oracle."""
    return load_family(request.param, shared_data)


@pytest.mark.parametrize("example", [SINGLE, MULTI, WITH_SYSTEM, CONTEXT, FORGED],
                         ids=["single", "multi", "system", "context", "forged"])  # fmt: skip
def test_answers_and_their_ends_are_trained_and_nothing_else(family, example):
    renderer, oracle = family
    made = tokenize(example, renderer)
    assert runs(made.ids, made.trained, renderer.tokenizer) == expected(oracle(example))


def test_the_tokens_are_those_of_transformers(family):
    renderer, _ = family
    made = tokenize(WITH_SYSTEM, renderer)
    output = renderer.tokenizer.apply_chat_template(
        list(WITH_SYSTEM.messages), chat_template=renderer.chat_template, return_dict=True
    )
    assert made.ids == output["input_ids"]


def random_conversation(seed):
    rng = random.Random(seed)

    def text():
        letters = [
            "a",
            " b",
            "\n",
            "x",
            "y",
            "<",
            "|",
            "end",
            "</s>",
            "\u00e9",
            "\U0001f44d",
            "1",
            "assistant",
            "think",
        ]
        return "a" + "".join(rng.choices(letters, k=rng.randint(0, 20))) + "z"

    return Conversation(tuple(turn(text()) for _ in range(rng.randint(1, 4)) for turn in (user, assistant)))


@pytest.mark.parametrize("seed", range(5))
def test_random_conversations_are_as_the_oracle_says(family, seed):
    renderer, oracle = family
    example = random_conversation(seed)
    made = tokenize(example, renderer)
    assert runs(made.ids, made.trained, renderer.tokenizer) == expected(oracle(example))


def test_marks_find_the_contents_that_changes_find(family):
    renderer, _ = family
    for example in (MULTI, WITH_SYSTEM, *map(random_conversation, range(10))):
        found = layout.locate(example, renderer, rendering.apply(example, renderer))
        assert not found.changed and len(found.spans) == len(example.messages)
        for place in found.places:
            assert layout.changed_span(place.part, found) == (place.begin, place.end)


@pytest.mark.parametrize("token", ["stop", "special"])
def test_an_answer_that_contains_a_control_token_as_text_is_refused(family, token):
    renderer, _ = family
    text = renderer.stop if token == "stop" else renderer.tokenizer.bos_token
    with pytest.raises(
        DataError, match=r"^messages\[1\]\.content contains '.*', which the tokenizer takes for its con"
    ):
        tokenize(Conversation((user("x"), assistant(f"a{text}b"))), renderer)
    (remark,) = tokenize(Conversation((user(f"a{text}b"), assistant("x"))), renderer).remarks
    assert remark == Remark(CONTROL, repr(text), "messages[0].content")


def test_a_prompt_and_its_answer_are_the_training_text(family):
    renderer, _ = family
    ids, answer = prompt(WITH_SYSTEM, renderer)
    made = tokenize(WITH_SYSTEM, renderer)
    start = len(ids)
    assert made.ids[:start] == ids and made.trained[start] and not made.trained[start - 1]
    stop = made.ids.index(renderer.stop_id, start)
    assert answer == renderer.tokenizer.decode(made.ids[start:stop], skip_special_tokens=True)
    assert answer.endswith("Bye.")


CALL_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
TOOL_CALLS = {
    "qwen2.5": [CALL_TEXT, "Yes.<|im_end|>"],
    "qwen3": [CALL_TEXT, "<think>\n\n</think>\n\nYes.<|im_end|>"],
    "qwen2.5-synthetic": "leaves out messages[1].tool_calls[0]",
    "phi-4-mini": "leaves out messages[1].tool_calls[0]",
    "phi-4-mini-reasoning": "leaves out messages[1].tool_calls[0]",
    "gemma-3": "cannot render user, assistant, tool, assistant: Conversation roles must alternate",
    "gemma-4": "the chat template ends messages[1] with",
    "gpt-oss": "cannot render user, assistant, tool, assistant: 'dict object' has no attribute 'name'",
    "smollm3": "leaves out messages[1].tool_calls[0]",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_tool_calls_are_trained_or_refused_with_the_reason(name, shared_data):
    renderer, _ = load_family(name, shared_data)
    if isinstance(TOOL_CALLS[name], str):
        with pytest.raises(DataError) as error:
            tokenize(CALLING, renderer)
        assert TOOL_CALLS[name] in str(error.value)
    else:
        made = tokenize(CALLING, renderer)
        trained = [text for text, mark in runs(made.ids, made.trained, renderer.tokenizer) if mark]
        assert trained == TOOL_CALLS[name]


def test_a_thought_in_an_earlier_answer_is_trained_only_if_the_template_keeps_it(shared_data):
    thoughts = Conversation(
        (QUESTION, assistant("<think>\nhm\n</think>\n\nA."), user("?"), assistant("<think>\nso\n</think>\n\nB."))
    )
    answers = {}
    for name in ("qwen2.5", "qwen3"):
        renderer, _ = load_family(name, shared_data)
        made = tokenize(thoughts, renderer)
        answers[name] = [text for text, mark in runs(made.ids, made.trained, renderer.tokenizer) if mark]
    last = "<think>\nso\n</think>\n\nB.<|im_end|>"
    assert answers["qwen2.5"] == ["<think>\nhm\n</think>\n\nA.<|im_end|>", last]
    assert answers["qwen3"] == ["A.<|im_end|>", last]


def test_markers_that_take_in_the_blanks_around_them(shared_data):
    """Phi-3's own tokenizer: `<|assistant|>` swallows the newline and an answer's leading blanks."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tok-phi3-mini")
    renderer = Renderer(tokenizer, stop_token="<|end|>")
    made = tokenize(Conversation((QUESTION, assistant("  Hello.\n"), user("?"), assistant("Bye."))), renderer)
    tokens = tokenizer.convert_ids_to_tokens([i for i, mark in zip(made.ids, made.trained, strict=True) if mark])
    assert tokens == ["Hello", ".", "<0x0A>", "<|end|>", "By", "e", ".", "<|end|>"]


def test_a_template_that_ends_answers_with_another_token_names_it(shared_data):
    renderer = Renderer(AutoTokenizer.from_pretrained(shared_data / "tok-phi3-mini"))  # its end is <|endoftext|>
    with pytest.raises(DataError) as error:
        tokenize(SINGLE, renderer)
    assert str(error.value) == (
        "the chat template ends messages[1] with '<|end|>\\n<|', without the stop token '<|endoftext|>', so the model "
        "would not learn to stop; set base.stop_token: '<|end|>'"
    )


# Without real data: a character tokenizer, where token and character are the same.


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Renderer(AutoTokenizer.from_pretrained(folder))


ASCII = Conversation((QUESTION, assistant("Hello."), user("And?"), assistant("Bye.")))


def trained_text(example, renderer):
    made = tokenize(example, renderer)
    return [text for text, mark in runs(made.ids, made.trained, renderer.tokenizer) if mark]


@pytest.mark.quick
def test_answers_of_a_character_model(plain):
    assert trained_text(ASCII, plain) == ["Hello.</s>", "Bye.</s>"]
    assert prompt(ASCII, plain) == (
        plain.tokenizer.encode("<user>Hi?<assistant>Hello.</s><user>And?<assistant>"),
        "Bye.",
    )


def test_all_trains_every_token_but_the_first(plain):
    made = tokenize(ASCII, replace(plain, train_on="all"))
    assert made.trained == [False] + [True] * (len(made.ids) - 1)


def test_a_question_alone_is_all_prompt(plain):
    ids, answer = prompt(Conversation((QUESTION,)), plain)
    assert (plain.tokenizer.decode(ids), answer) == ("<user>Hi?<assistant>", "")


TAGGED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}BEFORE{{ m.content }}AFTER"
    "{% else %}{{ '<user>' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("<assistant>{% generation %}", "</s>{% endgeneration %}\n"),
        ("<assistant>{% generation %}", "{% endgeneration %}</s>\n"),  # the end is trained although it is outside
        ("{% generation %}<assistant>", "</s>\n{% endgeneration %}"),  # header and newline are not, although inside
    ],
)
def test_generation_tags_mark_the_answers(plain, before, after):
    renderer = replace(plain, template=TAGGED.replace("BEFORE", before).replace("AFTER", after))
    assert trained_text(ASCII, renderer) == ["Hello.</s>", "Bye.</s>"]
    assert trained_text(replace(ASCII, untrained=frozenset({1})), renderer) == ["Bye.</s>"]


def test_generation_tags_settle_what_rendering_cannot(plain):
    """The prompt asks for a thought that the rendered answers do not have."""
    template = TAGGED.replace("BEFORE", "<assistant>{% generation %}").replace("AFTER", "</s>{% endgeneration %}")
    template = template.replace("<assistant>{% endif %}", "<assistant>(think){% endif %}")
    renderer = replace(plain, template=template)
    assert trained_text(ASCII, renderer) == ["Hello.</s>", "Bye.</s>"]
    assert trained_text(replace(ASCII, untrained=frozenset({1})), renderer) == ["Bye.</s>"]


def test_generation_tags_around_some_answers_train_only_those(plain):
    template = TAGGED.replace("BEFORE", "<assistant>{% if loop.last %}{% generation %}")
    template = template.replace("AFTER", "{% endgeneration %}{% else %}{{ m.content }}{% endif %}</s>")
    assert trained_text(ASCII, replace(plain, template=template)) == ["Bye.</s>"]


def test_generation_tags_around_nothing_are_refused(plain):
    template = TAGGED.replace("BEFORE", "<assistant>").replace("AFTER", "</s>") + "{% generation %}{% endgeneration %}"
    with pytest.raises(DataError, match="no token of this example is trained"):
        tokenize(ASCII, replace(plain, template=template))


def test_an_answer_without_an_end_is_refused(plain):
    template = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    with pytest.raises(DataError) as error:
        tokenize(ASCII, replace(plain, template=template))
    assert str(error.value) == (
        "the chat template ends messages[1] with '<user>', without the stop token '</s>', so the model would not learn "
        "to stop; set base.stop_token: '<user>'"
    )


def test_an_end_without_a_token_asks_for_another_template(plain):
    template = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(DataError, match=r"learn to stop; set data\.template to a template that ends answers with it"):
        tokenize(ASCII, replace(plain, template=template))
    assert trained_text(ASCII, replace(plain, template=template, stop_token="\n")) == ["Hello.\n", "Bye.\n"]


def test_a_bad_example_spoils_no_other(plain):
    bad = Conversation((QUESTION, assistant("", tool_calls=[CALL])))
    first, second, third = tokenize_all([SINGLE, bad, SINGLE], plain)
    assert first == third == tokenize(SINGLE, plain) and isinstance(second, DataError)


# Raw text.


def test_a_completion_is_trained_with_the_stop_token(plain):
    made = tokenize(Completion("1+1=", "2"), plain)
    assert made.ids == plain.tokenizer.encode("1+1=2</s>")
    assert made.trained == [False] * 4 + [True] * 2
    assert prompt(Completion("1+1=", "2"), plain) == (plain.tokenizer.encode("1+1="), "2")


def test_plain_text_is_trained_from_its_second_token(plain):
    made = tokenize(Completion("", "ab"), plain)
    assert made.ids == plain.tokenizer.encode("ab</s>") and made.trained == [False, True, True]


def test_a_stop_token_that_the_text_brings_is_not_doubled(plain):
    assert tokenize(Completion("a", "b</s>"), plain) == tokenize(Completion("a", "b"), plain)


def test_text_without_prompt_or_bos_cannot_be_answered(plain):
    with pytest.raises(DataError, match="text without a prompt cannot be answered"):
        prompt(Completion("", "ab"), plain)


@pytest.fixture
def llama(shared_data):
    return Renderer(AutoTokenizer.from_pretrained(shared_data / "tok-llama2-hf"))


def test_a_tokenizer_s_bos_begins_raw_text_once(llama):
    made = tokenize(Completion("Once", " upon"), llama)
    assert made.ids == [*llama.tokenizer("Once upon").input_ids, 2] and made.trained == [False, False, True, True]
    assert tokenize(Completion("<s>Once", " upon"), llama).ids[:2] != [1, 1]
    assert prompt(Completion("", "Once"), llama) == ([1], "Once")


@pytest.mark.parametrize("which", ["tok-llama2-hf", "tok-gpt2", "tok-neox", "tok-mistral-v3-hf"])
def test_a_prompt_that_ends_in_the_answer_s_first_token_trains_it_and_says_so(shared_data, which):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / which)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    renderer = Renderer(tokenizer)
    joined, apart = tokenize(Completion("A: ", "yes"), renderer), tokenize(Completion("A:", " yes"), renderer)
    assert joined.merged and not apart.merged
    assert (joined.ids, joined.trained) == (apart.ids, apart.trained)
    assert trained_text(Completion("A: ", "yes"), renderer)[0].strip() == "yes</s>"


@pytest.mark.parametrize("pair", [("a", "b c"), ("Hel", "lo world"), ("", "GOOD")])
def test_an_answer_that_begins_in_the_first_token_is_noted_without_a_bos_token(shared_data, llama, pair):
    plain = Renderer(AutoTokenizer.from_pretrained(shared_data / "tok-gpt2"), stop_token="<|endoftext|>")
    made = tokenize(Completion(*pair), plain)
    assert not made.trained[0] and made.merged == bool(pair[0])
    assert [remark.text for remark in made.remarks] == [FIRST]
    made = tokenize(Completion(*pair), llama)
    assert (made.trained[1], made.merged, made.remarks) == (True, bool(pair[0]), ())


def test_an_answer_within_the_first_token_is_refused_without_a_bos_token(shared_data):
    plain = Renderer(AutoTokenizer.from_pretrained(shared_data / "tok-gpt2"), stop_token="<|endoftext|>")
    with pytest.raises(DataError, match="completion begins in the first token, which is never trained"):
        tokenize(Completion("a", "b"), plain)
