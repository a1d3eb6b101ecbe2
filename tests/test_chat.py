"""A conversation is what `generate` would answer turn by turn, with the adapter on or off as told."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from runs import ENVIRONMENT, WAIT_SECONDS
from typer.testing import CliRunner

import lora_kit as lk
from lora_kit.artifacts.answering import read_questions
from lora_kit.artifacts.chat import HELP, chat
from lora_kit.cli import app
from lora_kit.data.formats import to_example
from lora_kit.errors import DataError


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
    assert written == f"{adapter}\n[base] {base} [cut at 8 tokens; --max-new-tokens allows more]\n{adapter}\n"
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


def test_an_answer_that_the_limit_cut_is_marked_and_another_is_not(trained_run):
    loaded = lk.load(trained_run)
    written, mark = [], " [cut at 8 tokens; --max-new-tokens allows more]"
    messages = chat(*loaded, ["/adapter off", "hello there", "/adapter on", "/again"], written.append, max_new_tokens=8)
    assert written.count(mark) == 1 and written.index(mark) < written.index("")
    assert messages[-1]["content"] == lk.generate(*loaded, ["hello there"], max_new_tokens=8)[0]
    cut = chat(*loaded, ["/adapter off", "hello there"], written.append, max_new_tokens=8)[-1]["content"]
    with loaded[0].disable_adapter():
        assert cut == lk.generate(*loaded, ["hello there"], max_new_tokens=8)[0]


def test_a_text_of_several_lines_is_one_message(trained_run):
    loaded = lk.load(trained_run)
    _, messages = talk(loaded, "/first line\nsecond line\nthird line")
    assert [one["content"] for one in messages if one["role"] == "user"] == ["/first line\nsecond line\nthird line"]


def test_it_begins_with_messages_and_tools(trained_run):
    """The result of a tool is typed with /tool. The template of this base ignores tools, so it gets another."""
    loaded = lk.load(trained_run)
    loaded[1].chat_template = "{{ tools | length if tools }}" + loaded[1].chat_template
    seen = []
    beginning = lk.question([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}], [TOOL])
    messages = chat(*loaded, ["/tool 5", "three"], seen.append, beginning=beginning, max_new_tokens=4)
    assert [one["role"] for one in messages] == ["user", "assistant", "tool", "assistant", "user", "assistant"]
    assert messages[3]["content"] == lk.generate(*loaded, [lk.question(messages[:3], [TOOL])], max_new_tokens=4)[0]
    assert messages[3]["content"] != lk.generate(*loaded, [lk.question(messages[:3])], max_new_tokens=4)[0]


TOOL = {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}


def test_a_question_has_the_context_of_a_record(tmp_path):
    """The same columns as in training; an error names the line of the file."""
    asked = tmp_path / "asked.jsonl"
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    record = {"messages": turns[:1], "system": "Be brief.", "functions": [TOOL]}
    asked.write_text(f"\n{json.dumps(record)}\n\n{json.dumps(record | {'system': 5})}\n")
    with pytest.raises(DataError, match=r"asked\.jsonl:4: system is a number; expected a string"):
        read_questions(asked)
    asked.write_text(json.dumps(record))
    (question,) = read_questions(asked)
    trained = to_example(record | {"messages": turns}, "messages", {})
    assert (question.messages, question.tools) == (trained.messages[:2], trained.tools)
    assert question.label(1) == "messages[0]"


def test_a_template_that_refuses_a_message_does_not_end_the_chat(trained_run):
    loaded = lk.load(trained_run)
    refusing = "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    loaded[1].chat_template = refusing + loaded[1].chat_template
    written, messages = talk(loaded, "one", "/tool 5", "two")
    assert "no tools here" in written and "Traceback" not in written
    assert messages == talk(loaded, "one", "two")[1]


def test_generate_continues_the_conversations_of_a_file(trained_run, tmp_path):
    loaded = lk.load(trained_run)
    records = [{"messages": [{"role": "user", "content": text}], "tools": [TOOL]} for text in ("one", "two")]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "one.json").write_text(json.dumps(records[0]["messages"]))
    for name, count in (("asked.jsonl", 2), ("one.json", 1)):
        told = CliRunner().invoke(
            app, ["generate", str(trained_run), "--messages", str(tmp_path / name), "--json", "--max-new-tokens", "4"]
        )
        answers = [one["answer"] for one in json.loads(told.stdout)]
        assert answers == lk.generate(*loaded, ["one", "two"][:count], max_new_tokens=4)
    (tmp_path / "bad.json").write_text('[{"role": "nobody", "content": "x"}]')
    told = CliRunner().invoke(app, ["generate", str(trained_run), "--messages", str(tmp_path / "bad.json")])
    assert told.exit_code == 2 and "bad.json:1: messages[0].role is 'nobody'" in told.stderr
    assert CliRunner().invoke(app, ["generate", str(trained_run)]).exit_code == 2


def test_notices_of_transformers_stay_out_of_the_answers(trained_run, capfd):
    model, tokenizer = lk.load(trained_run)
    model.generation_config.temperature, model.generation_config.top_k = 0.3, 7  # unused without sampling
    written = []
    chat(model, tokenizer, ["hello"], written.append, max_new_tokens=2)
    lk.generate(model, tokenizer, ["hello"], max_new_tokens=2)
    assert capfd.readouterr() == ("", "")


class Terminal:
    """What `lora-kit chat` reads at a terminal, with the keys that a person types; each message is shown as it came."""

    def __init__(self):
        pid, self.descriptor = pty.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it in what it runs in the background
            code = "from lora_kit.cli import _typed\nfor line in _typed(): print('read', ascii(line))"
            os.execve(sys.executable, [sys.executable, "-c", code], ENVIRONMENT | {"TERM": "xterm"})
        self.pid, self.screen = pid, ""

    def wait_for(self, text):
        end = time.monotonic() + WAIT_SECONDS
        while text not in self.screen:
            assert time.monotonic() < end, self.screen
            if select.select([self.descriptor], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self.descriptor, 4096).decode()
                except OSError:
                    break
        seen, found, self.screen = self.screen.partition(text)
        assert found, seen
        return seen

    def type(self, keys):
        os.write(self.descriptor, keys.encode())


def test_at_a_terminal_a_paste_is_one_message_and_ctrl_c_leaves_only_when_repeated():
    terminal = Terminal()
    try:
        terminal.wait_for("> ")
        terminal.type("\x1b[200~one\ntwo\nthree\x1b[201~\r")
        terminal.wait_for(r"read 'one\ntwo\nthree'")
        terminal.wait_for("> ")
        terminal.type("\x03")
        terminal.wait_for("Ctrl-C again")
        terminal.wait_for("> ")
        terminal.type("/again\r")
        terminal.wait_for("read '/again'")
        terminal.wait_for("> ")
        terminal.type("\x03")
        terminal.wait_for("Ctrl-C again")
        terminal.wait_for("> ")
        terminal.type("\x03")
        assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 0
    except BaseException:
        os.kill(terminal.pid, signal.SIGKILL)
        raise
    finally:
        os.close(terminal.descriptor)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, rb'[{"role": "user", "content": "\ud800"}]', b"\xff", b"", b"null", b"[]", b"[1]"]
)
def test_messages_that_cannot_be_asked_are_named(content, trained_run, tmp_path):
    (tmp_path / "asked.json").write_bytes(content)
    told = CliRunner().invoke(app, ["generate", str(trained_run), "--messages", str(tmp_path / "asked.json")])
    assert told.exit_code == 2 and isinstance(told.exception, SystemExit), told.exception


def test_a_prompt_that_is_not_utf_8_is_answered(trained_run):
    asked = ["generate", str(trained_run), os.fsdecode(b"hello \xff"), "--max-new-tokens", "2"]
    assert CliRunner().invoke(app, asked).exit_code == 0
    asked = ["chat", str(trained_run), "--system", os.fsdecode(b"\xff"), "--max-new-tokens", "2"]
    assert CliRunner().invoke(app, asked, input=b"hello \xff\n").exit_code == 0
