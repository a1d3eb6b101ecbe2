"""Where answers stand in a rendered text is established by rendering, or refused with what to do."""

from dataclasses import replace

import pytest
from conftest import make_tokenizer
from transformers import AutoTokenizer

from lora_kit.data.answers import render
from lora_kit.data.formats import Completion, Conversation
from lora_kit.data.rendering import Renderer, apply, check_renderer
from lora_kit.data.sandbox import check_template
from lora_kit.errors import BaseError, DataError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOLS = ({"type": "function", "function": {"name": "weather"}},)
BARE = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CHAT = Conversation((user("Hi?"), assistant("Hello."), user("And?"), assistant("Bye.")))


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Renderer(AutoTokenizer.from_pretrained(folder))


def pieces(example, renderer):
    """What stands before each answer, the answer, and up to its limit."""
    made = render(example, renderer)
    return [(made.text[: a.start], made.text[a.start : a.end], made.text[a.end : a.limit]) for a in made.answers]


def refusal(example, renderer):
    with pytest.raises(DataError) as error:
        render(example, renderer)
    return str(error.value)


@pytest.mark.quick
def test_an_answer_stands_between_the_prompt_and_what_ends_it(renderer):
    assert pieces(CHAT, renderer) == [
        ("<user>Hi?<assistant>", "Hello.", "</s><user>"),
        ("<user>Hi?<assistant>Hello.</s><user>And?<assistant>", "Bye.", "</s>"),
    ]


def test_equal_texts_everywhere_confuse_nothing(renderer):
    same = Conversation(tuple(turn("x<u>") for turn in (user, assistant) * 3))
    assert [answer for _, answer, _ in pieces(same, renderer)] == ["x<u>"] * 3
    assert [len(before) for before, _, _ in pieces(same, renderer)] == [21, 50, 79]


def test_a_template_that_renders_earlier_answers_differently(renderer):
    """As Qwen 3: an empty thought before the last answer only."""
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}"
        "{% if loop.last and m.role == 'assistant' %}{{ '(thought)' }}{% endif %}{{ m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    found = pieces(CHAT, replace(renderer, template=template))
    assert [answer for _, answer, _ in found] == ["Hello.", "(thought)Bye."]


def test_what_is_only_there_without_a_prompt_is_not_the_answer_s(renderer):
    """As Phi: the end of the text has a token of its own."""
    template = BARE + "{% if add_generation_prompt %}assistant:{% else %}</s>{% endif %}"
    assert pieces(CHAT, replace(renderer, template=template))[-1][1:] == ("Bye.", ";")


def test_a_name_that_a_tool_s_response_repeats_moves_no_end(renderer):
    template = (
        "{% for m in messages %}{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
        "{{ 'assistant:' + call.name + call.arguments|tojson + ';' }}{% elif m.role == 'tool' %}"
        "{{ 'weather says:' + m.content + ';' }}{% else %}{{ m.role + ':' + m.content + ';' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turns = (user("?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "sunny"}, assistant("Sun."))
    first, last = pieces(Conversation(turns), replace(renderer, template=template))
    assert first[1] + first[2] == 'weather{"city": "Rome"};weather says:' and ";" in first[2]
    assert last[1:] == ("Sun.", ";")


def test_raw_text_knows_where_its_completion_begins(renderer):
    made = render(Completion("1+1=", "2"), renderer)
    assert (made.text, made.boundary, made.answers) == ("1+1=2", 4, ())


def test_todays_date_is_fixed(renderer):
    template = "{{ strftime_now('%Y-%m-%d %d %B %b') }}|" + renderer.chat_template
    assert apply(CHAT, replace(renderer, template=template)).startswith("2025-01-01 01 January Jan|<user>")


def test_the_date_is_fixed_inside_a_macro_and_leaves_blanks_alone(renderer):
    template = "\n  {% macro head() %}[{{ strftime_now('%Y') }}]{% endmacro %}\n {{ head() }}" + renderer.chat_template
    plain = template.replace("strftime_now('%Y')", "'2025'")
    assert apply(CHAT, replace(renderer, template=template)) == apply(CHAT, replace(renderer, template=plain))


@pytest.mark.parametrize(
    ("turns", "tools", "part"),
    [
        ((user("Hi?"), assistant("", tool_calls=[CALL])), None, "messages[1].tool_calls[0] (role assistant)"),
        ((user("Hi?"), assistant("x"), {"role": "tool", "content": "Hi?"}), None, "messages[2].content (role tool)"),
        ((user("Hi?"), assistant("x"), {"role": "tool", "content": ""}), None, "messages[2].content (role tool)"),
        (({"role": "developer", "content": "x"}, user("x"), assistant("x")), None, "messages[0].content (role dev"),
        ((user("Hi?"), assistant("x")), TOOLS, "`tools`"),
    ],
)  # fmt: skip
def test_a_part_that_the_template_leaves_out_is_refused(renderer, turns, tools, part):
    template = renderer.chat_template.replace(
        "{% for message in messages %}", "{% for message in messages if message.role in ['user', 'assistant'] %}"
    )
    found = refusal(Conversation(turns, tools), replace(renderer, template=template))
    assert found.startswith(f"the chat template leaves out {part}")
    assert found.endswith("; set data.template to a template that renders it, or remove it from the record")


def test_a_second_call_that_is_left_out_is_noticed(renderer):
    template = (
        BARE.replace("m.content", "(m.tool_calls[0].function|tojson if m.tool_calls else m.content)")
        + "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turns = (user("Hi?"), assistant("", tool_calls=[CALL, CALL]))
    assert "leaves out messages[1].tool_calls[1]" in refusal(Conversation(turns), replace(renderer, template=template))


def test_a_call_without_arguments_is_noticed_though_its_name_stands_among_the_tools(renderer):
    first = "{{ messages[0].content[0] }};"  # differs before the first mark, so no part gets a mark in the end
    calls = "{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{% endfor %}"
    tools = "{% for t in tools %}{{ t.function.name }};{% endfor %}"
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    chat = Conversation((user("Hi?"), assistant("x", tool_calls=[call])), TOOLS)

    def template(after):
        turns = BARE.replace("';' }}", f"'' }}}}{after};")
        return replace(renderer, template=first + tools + turns + "{% if add_generation_prompt %}assistant:{% endif %}")

    assert "leaves out messages[1].tool_calls[0]" in refusal(chat, template(""))
    assert render(chat, template(calls)).text == "H;weather;user:Hi?;assistant:x<weather>;"


def test_a_prompt_that_the_answer_does_not_continue_is_refused(renderer):
    template = BARE + "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    found = refusal(CHAT, replace(renderer, template=template))
    assert found.startswith("the chat template renders what comes before messages[1] differently when the answer follo")
    assert "`weight: 0` in this message" in found and "{% generation %}" in found


def test_a_template_without_a_generation_prompt_is_refused(renderer):
    found = refusal(CHAT, replace(renderer, template=BARE))
    assert found.startswith("the chat template ignores add_generation_prompt and puts 'assistant:' before mess")


def test_a_template_that_needs_no_prompt_is_fine(renderer):
    """As Llama 2: nothing but a blank stands between question and answer."""
    template = "{{ '[' + m.content + ']' if m.role == 'user' else ' ' + m.content + '</s>' }}"
    template = "{% for m in messages %}" + template + "{% endfor %}"
    assert pieces(CHAT, replace(renderer, template=template))[0] == ("[Hi?]", " Hello.", "</s>[")


def test_a_template_that_fails_is_told_with_its_reason(renderer):
    template = "{% if messages[0].role == 'user' %}{{ raise_exception('a system message must come first') }}{% endif %}"
    found = refusal(CHAT, replace(renderer, template=template))
    assert found.startswith("the chat template cannot render user, assistant, user, assistant: a system message must ")


def test_no_template_says_where_to_name_one(renderer, tmp_path):
    make_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    plain = Renderer(AutoTokenizer.from_pretrained(tmp_path))
    found = refusal(CHAT, plain)
    assert found.startswith("the tokenizer has no chat template, and the data is conversations; set data.template to ")


def test_the_stop_token_is_the_recipe_s_or_the_tokenizer_s(renderer):
    tokenizer = renderer.tokenizer
    assert (renderer.stop, renderer.stop_id) == ("</s>", tokenizer.eos_token_id)
    assert replace(renderer, stop_token="\n").stop_id == tokenizer.convert_tokens_to_ids("\n")


def test_a_stop_token_that_is_not_a_token_is_refused_with_a_list(renderer):
    with pytest.raises(BaseError) as error:
        check_renderer(replace(renderer, stop_token="<|end|>"))
    assert str(error.value).startswith(
        "base.stop_token: '<|end|>' is not a single token of the tokenizer; its added tokens: "
    )
    assert "'</s>'" in str(error.value)


def test_a_tokenizer_without_an_end_needs_one_named(renderer, tmp_path):
    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.eos_token = None
    with pytest.raises(BaseError, match=r"^base\.stop_token: the tokenizer has no end-of-sequence token"):
        check_renderer(Renderer(tokenizer))


@pytest.mark.parametrize("extra", ["", "{{ strftime_now('%Y') }}"])
def test_a_template_that_is_not_jinja_is_reported_with_its_line(renderer, extra):
    with pytest.raises(DataError, match=r"^data\.template: line 3 is not valid Jinja: "):
        check_template(replace(renderer, template=f"{extra}\n\n{{% if %}}x{{% endif %}}\n"))


def test_a_template_that_only_refuses_a_lone_question_passes_the_check(renderer):
    check_template(replace(renderer, template="{{ raise_exception('no') }}"))
