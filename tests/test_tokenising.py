"""Tokenising in several processes: the same bytes as in one, limits for each example, and nothing left behind."""

import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import TEMPLATE, make_records, make_tokenizer, write_jsonl
from runs import WAIT_SECONDS
from transformers import AutoTokenizer

from lora_kit.data import arrays, sandbox, template, tokenising, tokens
from lora_kit.data.rendering import Renderer
from lora_kit.data.template import tokenize_all
from lora_kit.data.tokens import prepare
from lora_kit.errors import DataError
from lora_kit.recipe.schema import Data

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Renderer(AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def make(renderer, tmp_path, monkeypatch):
    """Return a function that prepares 60 records, in ranges of at most 7, in so many children."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(tokenising, "BATCH", 7)
    monkeypatch.setattr(tokenising, "FIRST_BATCH", 3)
    write_jsonl(tmp_path / "train.jsonl", make_records(60))

    def function(children, template=None, tell=lambda *_: None, **data):
        monkeypatch.setattr(tokens, "children", lambda records: children)
        settings = {"train": "train.jsonl", "validation": 0.2} | data
        made = Renderer(renderer.tokenizer, template)
        return prepare(Data(**settings), made, base_dir=tmp_path, seed=0, tell=tell)

    function.folder, function.renderer = tmp_path, renderer
    return function


def children_of_this():
    return {process.pid for process in psutil.Process().children()}


def test_any_number_of_children_makes_the_same_bytes(make):
    one, two, three = (make(children, sequence_length=40, overlong="truncate") for children in (1, 2, 3))
    assert one.train.fingerprint == two.train.fingerprint == three.train.fingerprint
    assert (one.counts, one.notes) == (two.counts, two.notes) == (three.counts, three.notes)
    assert one.validation.fingerprint == three.validation.fingerprint


def test_the_tokens_are_those_of_each_example_alone(make):
    from lora_kit.data import sources
    from lora_kit.data.formats import to_example

    made = make(3, validation=None).train
    records = sources.load("train.jsonl", base_dir=make.folder).read(0, 60)
    alone = [tokenize_all([to_example(record, "messages", {})], make.renderer)[0] for record in records]
    assert [list(made.example(index)[0]) for index in range(60)] == [example.ids for example in alone]
    assert [list(made.example(index)[1]) for index in range(60)] == [example.trained for example in alone]


def test_large_arrays_lie_in_a_file_without_a_name(make, monkeypatch):
    monkeypatch.setenv("LORA_KIT_CACHE", str(make.folder / "cache"))
    expected = make(1)
    monkeypatch.setattr(arrays, "SPILL_BYTES", 100)
    made = make(2)
    assert made.train.fingerprint == expected.train.fingerprint and made.counts == expected.counts
    assert f"{make.folder}/cache/tokens/" in Path("/proc/self/maps").read_text()
    assert not list((make.folder / "cache" / "tokens").iterdir())


def test_progress_is_told_up_to_the_last_record(make):
    told = []
    make(2, tell=lambda *progress: told.append(progress))
    assert told == sorted(told) and told[-1] == (60, 60) and len(told) > 8


def test_problems_come_in_the_order_of_the_records_and_are_bounded(make):
    records = make_records(60)
    for index in range(5, 60, 2):
        records[index]["messages"][-1]["role"] = "nobody"
    write_jsonl(make.folder / "bad.jsonl", records)
    messages = set()
    for children in (1, 3):
        with pytest.raises(DataError) as error:
            make(children, train="bad.jsonl", validation=None)
        messages.add(str(error.value))
    (message,) = messages
    lines = message.splitlines()
    assert [line.split(": ")[0] for line in lines[:20]] == [f"bad.jsonl:{line}" for line in range(6, 46, 2)]
    assert lines[20:] == ["and 8 more problems of 28"]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "computes for more than 1 s",
        ),
        ("{{ 'x' * 70000000 }}", "writes more than 67,108,864 characters"),
        ("{% set x = messages[0].content * 999999999 %}", "needs more than 1 GB of memory"),
    ],
    ids=["time", "output", "memory"],
)
def test_a_record_for_which_the_template_exceeds_a_limit_is_named(make, monkeypatch, spoil, problem):
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    records, before = make_records(60), children_of_this()
    records[37]["messages"][0]["content"] = "spoil"
    write_jsonl(make.folder / "bad.jsonl", records)
    template = "{% if messages[0].content == 'spoil' %}" + spoil + "{% endif %}" + TEMPLATE
    with pytest.raises(DataError, match=rf"bad.jsonl:38: the chat template {problem} for one example; set data.temp"):
        make(2, template, train="bad.jsonl", validation=None)
    assert children_of_this() <= before


def a_child(before):
    return psutil.Process(min(children_of_this() - before))


def test_the_work_of_a_killed_child_is_done_by_another(make):
    expected, before, killed = make(1, validation=None), children_of_this(), []

    def kill(done, total):
        if not killed:
            killed.append(a_child(before))
            killed[0].kill()

    made = make(2, tell=kill, validation=None)
    assert killed and made.train.fingerprint == expected.train.fingerprint
    assert children_of_this() <= before


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        (sandbox, "render", r"bad\.jsonl:31: the chat template ended the process that renders it \(SIGKILL\)"),
        (
            template,
            "_encode",
            r"bad\.jsonl:\d+: the process that tokenises the records from here on ended \(SIGKILL\); free",
        ),
    ],
)
def test_a_record_that_kills_every_child_is_named_and_the_template_blamed_if_it_runs(
    make, monkeypatch, module, name, expected
):
    original = getattr(module, name)

    def fatal(what, renderer):
        if "spoil" in str(what):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(what, renderer)

    monkeypatch.setattr(module, name, fatal)
    records = make_records(60)
    records[30]["messages"][0]["content"] = "spoil"
    write_jsonl(make.folder / "bad.jsonl", records)
    with pytest.raises(DataError, match=expected):
        make(2, train="bad.jsonl", validation=None)


def test_only_a_child_that_renders_the_same_example_too_long_is_killed(make, monkeypatch):
    """A range of raw text may take as long as it wants, since no template renders it."""
    monkeypatch.setattr(sandbox, "RENDER_SECONDS", 0.05)
    encode = template._encode
    monkeypatch.setattr(template, "_encode", lambda *both: time.sleep(0.1) or encode(*both))
    write_jsonl(make.folder / "text.jsonl", [{"text": "abc"}] * 7)
    assert len(make(1, train="text.jsonl", validation=None).train) == 7
    render = sandbox.render
    monkeypatch.setattr(sandbox, "render", lambda *both: time.sleep(0.5) or render(*both))
    with pytest.raises(DataError, match=r"train\.jsonl:1: the chat template ended .* \(SIGKILL\)"):
        make(1, validation=None)


def test_an_error_of_the_program_in_a_child_is_no_error_of_the_data(make, monkeypatch):
    monkeypatch.setattr(tokenising, "tokenize_all", lambda *_: 1 / 0)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        make(2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_no_process_and_no_file(make, monkeypatch, error):
    monkeypatch.setenv("LORA_KIT_CACHE", str(make.folder / "cache"))
    monkeypatch.setattr(arrays, "SPILL_BYTES", 100)
    before = children_of_this()

    def interrupt(done, total):
        if done > 20:
            raise error

    with pytest.raises(error):
        make(3, tell=interrupt)
    assert children_of_this() <= before and not list((make.folder / "cache" / "tokens").iterdir())


def test_children_end_with_their_parent(make):
    before, pipe = children_of_this(), os.pipe()
    parent = os.fork()
    if parent == 0:
        make(2, tell=lambda *_: (os.write(pipe[1], b"%d " % a_child(set()).pid), os.kill(os.getpid(), signal.SIGKILL)))
        os._exit(0)
    child = psutil.Process(int(os.read(pipe[0], 100)))
    os.waitpid(parent, 0)
    child.wait(WAIT_SECONDS)
    assert children_of_this() <= before
    for descriptor in pipe:
        os.close(descriptor)


def test_few_records_take_one_child_and_many_one_per_core(monkeypatch):
    monkeypatch.setattr(tokenising, "host_cores", lambda: 8)
    assert [tokenising.children(records) for records in (1, 2000, 3000, 10**6)] == [1, 1, 2, 8]


def test_ranges_cover_all_records_and_shrink_for_long_examples():
    pace = tokenising.Pace()
    requests = []
    for request in pace.ranges(2000):
        start, stop = map(int, request.decode().strip("[]").split(","))
        requests.append((start, stop))
        pace.note(stop - start, (stop - start) * 10 * tokenising.BATCH_TOKENS)
    assert requests[0][0] == 0 and requests[-1][1] == 2000
    assert all(first[1] == second[0] for first, second in pairwise(requests))
    assert np.diff(requests, axis=1).max() == tokenising.FIRST_BATCH and requests[5][1] - requests[5][0] == 1


def test_few_answers_wait_for_an_earlier_one(tmp_path):
    """The first request is answered only when another child has answered all that may be dealt meanwhile."""
    dealt, opened, gate = [], [], tmp_path / "gate"
    os.mkfifo(gate)

    def work(request):
        if request == b"0":
            gate.read_bytes()
        return [request]

    def requests():
        for number in range(1000):
            dealt.append(number)
            yield b"%d" % number

    class Watched(sandbox.Pool):
        def _deal(self, requests, end):
            super()._deal(requests, end)
            if not opened and not any(asked and asked[0][0] for asked in self._asked.values()):
                opened.append(len(dealt))
                gate.write_bytes(b"x")

    with Watched(work, 2) as pool:
        answers = [bytes(answer) for answer in pool.map(requests())]
    assert answers == [b"%d" % number for number in range(1000)]
    assert opened == [2 * sandbox.WINDOW]


def test_prompts_leave_no_child_behind_and_an_error_names_the_record(make, monkeypatch):
    before, asked = children_of_this(), []

    def refuse(example, renderer):
        asked.append(sandbox.render_all([example], renderer))
        if len(asked) > 1:
            raise DataError("the template does not end the turn")

    monkeypatch.setattr(tokens, "prompt", refuse)
    data = Data(train="train.jsonl", validation="train.jsonl")
    prepare(data, make.renderer, base_dir=make.folder, seed=0, prompts=1)
    assert asked and children_of_this() <= before
    with pytest.raises(DataError, match=r"^train\.jsonl:1: the template does not end the turn$"):
        prepare(data, make.renderer, base_dir=make.folder, seed=0, prompts=1)
    assert children_of_this() <= before
