"""A conversation is what `generate` would answer turn by turn, with the adapter on or off as told."""

import subprocess
import sys

import pytest
from runs import ENVIRONMENT, WAIT_SECONDS

import lora_kit as lk
from lora_kit.artifacts.chat import HELP, chat


def talk(loaded, *lines):
    written = []
    messages = chat(*loaded, lines, written.append, max_new_tokens=8)
    return "".join(written), messages


def test_a_turn_is_what_generate_answers_and_comes_in_pieces(trained_run):
    loaded = lk.load(trained_run)
    pieces = []
    messages = chat(*loaded, ["hello there"], pieces.append, max_new_tokens=8)
    assert (
        "".join(pieces).strip() == messages[-1]["content"] == lk.generate(*loaded, ["hello there"], max_new_tokens=8)[0]
    )


def test_the_adapter_is_off_for_as_long_as_it_was_asked(trained_run):
    loaded = lk.load(trained_run)
    with loaded[0].disable_adapter():
        base = lk.generate(*loaded, ["hello there"], max_new_tokens=8)[0]
    adapter = lk.generate(*loaded, ["hello there"], max_new_tokens=8)[0]
    assert base != adapter
    written, messages = talk(loaded, "hello there", "/adapter off", "/again", "/adapter on", "/again", "/quit", "never")
    assert written == f"{adapter}\n[base] {base}\n{adapter}\n"
    assert [one["role"] for one in messages] == ["user", "assistant"]


@pytest.mark.quick
def test_turns_build_on_each_other_until_reset(trained_run):
    loaded = lk.load(trained_run)
    _, messages = talk(loaded, "one", "two", "/help")
    assert [one["content"] for one in messages if one["role"] == "user"] == ["one", "two"]
    assert talk(loaded, "one", "/reset", "two")[1] == talk(loaded, "two")[1]
    assert talk(loaded, "/again", "", "/what")[0] == f"{HELP}\n" * 2


def test_ctrl_c_cuts_an_answer_and_the_conversation_goes_on(trained_run):
    written = []

    def impatient(piece):
        written.append(piece)
        if len(written) == 2:
            raise KeyboardInterrupt

    messages = chat(*lk.load(trained_run), ["hello there", "go on"], impatient, max_new_tokens=200)
    assert " [stopped]" in written and [one["role"] for one in messages] == ["user", "assistant"] * 2


def test_it_is_driven_by_a_pipe(trained_run):
    command = [sys.executable, "-m", "lora_kit", "chat", str(trained_run), "--max-new-tokens", "8"]
    done = subprocess.run(
        command, input="hello there\n", env=ENVIRONMENT, capture_output=True, text=True, timeout=WAIT_SECONDS
    )
    assert done.returncode == 0 and "/help" in done.stderr
    assert done.stdout.strip() == lk.generate(*lk.load(trained_run), ["hello there"], max_new_tokens=8)[0]
