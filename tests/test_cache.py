"""The cache returns tokens made earlier, and never those of other data, another tokenizer, template or limit."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import labels_of, make_records, make_tokenizer, write_jsonl
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from lora_kit import files
from lora_kit.data import arrays, cache, plan
from lora_kit.data.plan import prepare_data
from lora_kit.data.rendering import Renderer
from lora_kit.data.tokens import Tokens
from lora_kit.errors import DataError
from lora_kit.files import sha256_of
from lora_kit.model.source import locate
from lora_kit.model.tokenizer import load_renderer
from lora_kit.recipe.load import load_recipe, resolve_path
from lora_kit.training import ahead, setup
from lora_kit.training import processes as processes_module
from lora_kit.training.processes import Processes
from lora_kit.training.request import TrainRequest
from lora_kit.views.console import Console

RECIPE = """
base: {repo: base}
data: {train: train.jsonl, validation: 0.2, sequence_length: 200, overlong: truncate}
train: {steps: 1}
evaluate: {generate: 2}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe's folder with its data, and a cache of its own."""
    import datasets

    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    make_tokenizer(tmp_path / "base")
    write_jsonl(tmp_path / "train.jsonl", make_records(30))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def made(monkeypatch):
    """How often data was tokenised."""
    calls = []
    prepare = plan.prepare
    monkeypatch.setattr(plan, "prepare", lambda *a, **k: calls.append(a) or prepare(*a, **k))
    return calls


def data_of(folder, *changes, **renderer):
    recipe = load_recipe(folder / "recipe.yaml", changes)
    return prepare_data(recipe, Renderer(AutoTokenizer.from_pretrained(folder / "base"), **renderer))


def entries(folder):
    return list((folder / "cache" / "tokens").iterdir())


def same(one, other):
    arrays = [
        np.array_equal(getattr(getattr(one, part), name), getattr(getattr(other, part), name))
        for part in ("train", "validation")
        for name in ("ids", "trained", "offsets")
    ]
    return all(arrays) and (one.prompts, one.counts, one.notes) == (other.prompts, other.counts, other.notes)


@pytest.mark.quick
def test_a_second_start_tokenises_nothing_and_has_the_same(folder, made):
    first, again = data_of(folder), data_of(folder)
    assert len(made) == 1 and same(first, again)
    assert [array.dtype for array in (again.train.ids, again.train.trained, again.train.offsets)] == [
        np.int32,
        np.bool_,
        np.int64,
    ]
    assert len(again.prompts) == 2 and all(type(one.ids) is list for one in again.prompts)


def test_data_without_a_validation_part_is_cached_too(folder, made):
    first, again = (data_of(folder, "data.validation=null", "evaluate.generate=0") for _ in range(2))
    assert len(made) == 1 and again.validation is None and again.train.fingerprint == first.train.fingerprint


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_byte_of_the_data_makes_new_tokens(folder, made, place):
    first = data_of(folder)
    path, stat = folder / "train.jsonl", (folder / "train.jsonl").stat()
    text = bytearray(path.read_bytes())
    letters = [index for index in range(len(text)) if text[index : index + 12] == b'"content": "']
    letter = letters[place * (len(letters) // 3)] + 12
    text[letter] = ord("z")
    path.write_bytes(text)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rsync and tar leave it: same size, same time
    changed = data_of(folder)
    assert len(made) == 2 and not same(first, changed)
    letters = "".join(map(chr, text))
    assert letters.count("z") == 1  # and it is among the tokens that were made
    ids = np.concatenate([changed.train.ids, changed.validation.ids])
    z = AutoTokenizer.from_pretrained(folder / "base").convert_tokens_to_ids("z")
    assert (ids == z).sum() == 1


def test_another_tokenizer_makes_new_tokens(folder, made):
    first = data_of(folder)
    path = folder / "base" / "tokenizer.json"
    inner = json.loads(path.read_text())
    vocabulary = inner["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(inner))
    assert not same(first, data_of(folder)) and len(made) == 2


@pytest.mark.parametrize("where", ["base", "recipe"])
def test_another_template_makes_new_tokens(folder, made, where):
    first = data_of(folder)
    path = folder / "base" / "chat_template.jinja"
    other = path.read_text().replace("'>'", "'> '")
    if where == "base":
        path.write_text(other)
        changed = data_of(folder)
    else:
        changed = data_of(folder, template=other)
    assert not same(first, changed) and len(made) == 2


@pytest.mark.parametrize(
    "change",
    [
        "data.sequence_length=20",
        "data.max_examples=10",
        "data.validation=0.5",
        "train.seed=1",
        "evaluate.generate=1",
        "data.overlong=drop",
        "data.format=messages",
    ],
)
def test_another_setting_is_another_entry(folder, made, change):
    data_of(folder)
    changed = data_of(folder, change)
    assert len(made) == 2 and len(entries(folder)) == 2
    assert same(changed, data_of(folder, change)) and len(made) == 2


MIXTURE = "data.train=[{{source: train.jsonl, weight: {}}}, {{source: other.jsonl, weight: 1}}]"


@pytest.mark.parametrize("change", ["train.seed=1", "data.overlap=9", MIXTURE.format(4)])
def test_a_setting_that_decides_no_token_takes_the_same_entry(folder, made, change):
    write_jsonl(folder / "other.jsonl", make_records(9, seed=3))
    whole = [MIXTURE.format(3), "data.validation=other.jsonl"]
    data_of(folder, *whole)
    data_of(folder, *whole, change)
    assert len(made) == 1


@pytest.mark.parametrize("renderer", [{"train_on": "all"}, {"stop_token": "<user>", "train_on": "all"}])
def test_another_way_to_train_is_another_entry(folder, made, renderer):
    source = "train.jsonl" if "stop_token" not in renderer else "text.jsonl"
    write_jsonl(folder / "text.jsonl", [{"text": text} for text in "abcdef"])
    changes = [f"data.train={source}", "evaluate.generate=0"]
    first, changed = data_of(folder, *changes), data_of(folder, *changes, **renderer)
    assert len(made) == 2 and not same(first, changed)


def test_other_code_is_another_entry(folder, made, monkeypatch):
    data_of(folder)
    monkeypatch.setattr(cache, "_code", lambda: ["edited"])
    data_of(folder)
    assert len(made) == 2


def test_a_damaged_entry_is_made_again(folder, made):
    first = data_of(folder)
    (path,) = entries(folder)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for count, place in enumerate([0, 9, 200, len(whole) - 1, *rng.integers(0, len(whole), 20).tolist()], 1):
        broken = bytearray(whole)
        broken[place] ^= 1
        path.write_bytes(broken)
        assert same(first, data_of(folder)) and len(made) == 1 + count, f"byte {place}"
    for length in (0, 4, len(whole) // 2):
        path.write_bytes(whole[:length])
        assert same(first, data_of(folder))
    made.clear()
    assert same(first, data_of(folder)) and entries(folder) == [path] and not made


def resident_kb(path):
    """Return how much of a mapped file is in the memory of this process."""
    maps = Path("/proc/self/smaps").read_text().split(str(path))[1:]
    return sum(int(part.split("Rss:")[1].split()[0]) for part in maps)


def test_a_large_entry_is_mapped_and_the_same_and_damage_in_it_is_noticed(folder, made, monkeypatch):
    first = data_of(folder)
    monkeypatch.setattr(arrays, "SPILL_BYTES", 100)
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 1000)  # several pieces
    (path,) = entries(folder)
    mapped = data_of(folder)
    assert same(first, mapped) and len(made) == 1 and str(path) in Path("/proc/self/maps").read_text()
    copied = Tokens(*(np.array(getattr(mapped.train, name)) for name in ("ids", "trained", "offsets")))
    assert copied.fingerprint == mapped.train.fingerprint == first.train.fingerprint
    assert copied.largest == mapped.train.largest == copied.ids.max()
    assert (copied.label_counts() == np.bincount(labels_of(copied), minlength=copied.largest + 1)).all()
    assert resident_kb(path) > 0
    assert sum(int(chunk.sum()) for chunk in arrays.chunks(mapped.train.ids)) == copied.ids.sum()
    assert resident_kb(path) == 0, "what was read as a whole leaves the memory"
    whole = path.read_bytes()
    for place in range(0, len(whole), 997):
        broken = bytearray(whole)
        broken[place] ^= 1
        path.write_bytes(broken)
        assert cache.read(path) is None, f"byte {place}"
    path.write_bytes(whole + b"x")
    assert cache.read(path) is None
    assert same(first, data_of(folder)) and len(made) == 2


def test_an_entry_is_a_safetensors_file(folder):
    made = data_of(folder)
    (path,) = entries(folder)
    assert (load_file(path)["train.ids"] == made.train.ids).all()


def test_a_resume_makes_no_pass_over_the_tokens(folder, monkeypatch):
    first = data_of(folder)
    monkeypatch.setattr("lora_kit.data.tokens.chunks", lambda array: pytest.fail("a pass over the tokens"))
    again = data_of(folder)
    assert again.train.fingerprint == first.train.fingerprint and again.train.largest == first.train.largest
    assert again.train.lengths_of([3, 0]) == again.train.lengths[[3, 0]].tolist()


def test_another_process_opens_the_entry_that_is_named_and_no_other(folder):
    first = data_of(folder)
    name = cache.name_entry(first)
    assert same(cache.open_entry(name), first)
    other = data_of(folder, "train.seed=1")
    other.entry.path.replace(first.entry.path)
    assert cache.open_entry(name) is None and cache.open_entry(cache.name_entry(None)) is None


@pytest.mark.parametrize("place", ["cached", "not cached"])
def test_data_is_copied_to_a_process_that_cannot_open_the_entry(folder, monkeypatch, place):
    """The main process sends pieces, and the other one appends them; each is played in turn."""
    recipe, renderer = load_recipe(folder / "recipe.yaml"), Renderer(AutoTokenizer.from_pretrained(folder / "base"))
    if place == "not cached":
        (folder / "cache").write_text("in the way")
    sent = []

    class Main:
        is_main = True

        def main_decides(self, decide, dump, load):
            sent.append(dump(decided := decide()))
            return decided

        gather = staticmethod(lambda items: [*items, True])
        copy_to_all = Processes.copy_to_all

    class Other(Main):
        is_main = False

        def main_decides(self, decide, dump, load):
            message = sent.pop(0)
            return None if load is cache.open_entry else load(message)

    monkeypatch.setattr(processes_module, "COPIED_BYTES", 1000)
    data = [setup.read_data(recipe, renderer, process, Console(silent=True)) for process in (Main(), Other())]
    assert same(*data) and not sent


def test_the_hash_of_a_large_file_is_remembered_until_the_file_changes(folder, monkeypatch):
    path = folder / "train.jsonl"
    hashed = []
    monkeypatch.setattr(files, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    monkeypatch.setattr(cache, "WORTH_REMEMBERING", 0)
    monkeypatch.setattr(cache, "SETTLED_SECONDS", -1e9)
    first = cache._content_hash(path)
    assert first == cache._content_hash(path) == sha256_of(path) and len(hashed) == 1
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"user", b"USER"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache._content_hash(path) == sha256_of(path) != first and len(hashed) == 2
    monkeypatch.setattr(cache, "SETTLED_SECONDS", 1e9)
    assert cache._content_hash(path) == sha256_of(path) and len(hashed) == 2, "not remembered, so not looked up"


def test_a_file_that_a_killed_process_left_unfinished_is_deleted_later(folder):
    data_of(folder)
    left = [folder / "cache" / "tokens" / f".{number}.safetensors.1.partial" for number in range(2)]
    for path in left:
        path.write_bytes(b"x")
    os.utime(left[0], (0, 0))
    data_of(folder, "train.seed=1")
    assert not left[0].exists() and left[1].exists()


@pytest.mark.parametrize("package", cache.PACKAGES)
def test_another_version_of_a_package_is_another_entry(folder, monkeypatch, package):
    recipe, renderer = load_recipe(folder / "recipe.yaml"), Renderer(AutoTokenizer.from_pretrained(folder / "base"))
    before, installed = cache.key_of(recipe, renderer), cache.version
    monkeypatch.setattr(cache, "version", lambda name: "0" if name == package else installed(name))
    assert cache.key_of(recipe, renderer) != before


def test_data_that_changes_while_it_is_read_is_not_cached(folder, monkeypatch):
    prepare = plan.prepare

    def slow(*arguments, **named):
        result = prepare(*arguments, **named)
        write_jsonl(folder / "train.jsonl", make_records(31))
        return result

    monkeypatch.setattr(plan, "prepare", slow)
    data_of(folder)
    assert not entries(folder)


def test_data_that_cannot_be_hashed_is_not_cached(folder, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    renderer = Renderer(tokenizer)
    floating, pinned = (
        load_recipe(folder / "recipe.yaml", [f"data.train=someone/set@{revision}"]) for revision in ("main", "0a" * 20)
    )
    assert cache.key_of(floating, renderer) is None and cache.key_of(pinned, renderer)
    assert cache.key_of(load_recipe(folder / "recipe.yaml"), renderer)
    own = type("Own", (type(tokenizer),), {"__module__": "code_of_the_base"})
    foreign = replace(renderer, tokenizer=own.from_pretrained(folder / "base"))
    assert cache.key_of(load_recipe(folder / "recipe.yaml"), foreign) is None


def test_problems_of_the_data_are_reported_as_without_a_cache(folder):
    (folder / "train.jsonl").write_text('{"messages": 1}\n')
    for _ in range(2):
        with pytest.raises(DataError, match=r"train.jsonl:1: "):
            data_of(folder, "data.validation=null", "evaluate.generate=0")
    with pytest.raises(DataError, match="does not exist"):
        data_of(folder, "data.train=gone.jsonl")


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    def homeless(name):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv(files.CACHE)
    monkeypatch.setattr(files.platformdirs, "user_cache_dir", homeless)
    assert files.cache_folder("tokens") == Path(f"/tmp/lora_kit-{os.getuid()}/tokens")


def test_a_read_only_cache_folder_is_no_error(folder, made):
    (folder / "cache").write_text("in the way")
    assert same(data_of(folder), data_of(folder)) and len(made) == 2


def test_entries_are_bounded_and_the_last_used_stay(folder, monkeypatch):
    monkeypatch.setattr(cache, "MAX_ENTRIES", 3)
    first = data_of(folder)
    (oldest,) = entries(folder)
    for seed in (1, 2, 3):
        data_of(folder, f"train.seed={seed}")
        assert same(data_of(folder), first)  # used again, so newest again
    assert len(entries(folder)) == 3 and oldest in entries(folder)
    monkeypatch.setattr(cache, "MAX_BYTES", 1)
    data_of(folder, "train.seed=4")
    (newest,) = entries(folder)
    assert newest != oldest


def test_what_is_prepared_while_torch_is_imported_is_what_the_run_looks_up(recipe_file, tmp_path, monkeypatch, made):
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(recipe_file)
    ahead.prepare(TrainRequest(recipe, tmp_path / "run", accept=(), start_from=None, profile=False).to_json())
    assert len(made) == 1
    source = locate(recipe.base, resolve_path(recipe, recipe.base.repo))
    prepare_data(recipe, load_renderer(source, recipe))
    assert len(made) == 1
    remote = load_recipe(recipe_file, ["data.train=owner/name"])
    ahead.prepare(TrainRequest(remote, tmp_path / "run", accept=(), start_from=None, profile=False).to_json())
    assert len(made) == 1, "the training process itself asks the Hub"


def test_a_template_of_a_source_that_is_a_pipe_does_not_block(folder, monkeypatch):
    os.mkfifo(folder / "t.jinja")
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *a, **k: pytest.fail("blocks") if path.is_fifo() else opened(path, *a, **k)
    )
    recipe = load_recipe(folder / "recipe.yaml", ["data.train=[{source: train.jsonl, template: t.jinja}]"])
    assert cache.key_of(recipe, Renderer(AutoTokenizer.from_pretrained(folder / "base"))) is None
    (folder / "t.jinja").unlink()
    (folder / "t.jinja").write_text("{{ x }}")
    assert cache.key_of(recipe, Renderer(AutoTokenizer.from_pretrained(folder / "base")))


def test_a_file_whose_name_is_not_utf_8_can_have_a_note_that_names_it(folder, made):
    (folder / "d").mkdir()
    records = [record | {"id": 1} for record in make_records(30)]
    write_jsonl(folder / "d" / os.fsdecode(b"caf\xe9.jsonl"), records)
    first = data_of(folder, "data.train=d")
    assert any(r"d/caf\xe9.jsonl:1" in note for note in first.notes)
    assert same(first, data_of(folder, "data.train=d")) and len(made) == 1


def test_another_name_of_a_file_in_a_folder_makes_new_tokens(folder, made):
    (folder / "d").mkdir()
    path = folder / "d" / "a.jsonl"
    write_jsonl(path, [record | {"id": 1} for record in make_records(30)])
    data_of(folder, "data.train=d")
    path.rename(folder / "d" / "b.jsonl")
    changed = data_of(folder, "data.train=d")
    assert any("d/b.jsonl:1" in note for note in changed.notes) and len(made) == 2
