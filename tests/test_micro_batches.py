"""What `auto` chooses fits, depends on nothing but recipe, base and memory, and is chosen once in a run's life."""

import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import RECIPE, make_records, make_tokenizer, without_compiled, write_jsonl
from runs import state_hash, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from lora_kit import check as checking
from lora_kit import host
from lora_kit.errors import BaseError, ContractError
from lora_kit.kernels import fusing
from lora_kit.kernels.attention import inner_of
from lora_kit.model.sizes import estimate_memory, read_config
from lora_kit.recipe.load import load_recipe
from lora_kit.runs import store
from lora_kit.runs.manifest import MANIFEST
from lora_kit.training import choices, loop, micro_batches
from lora_kit.training.micro_batches import MEMORY_SHARE, Machine, MicroBatches, choose, place

ROOT = Path(__file__).parents[1]
GB = 1_000_000_000
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
LEFT_OPEN = ["train.micro_batch_tokens=auto", "train.activation_checkpointing=auto"]


WAYS = ["bfloat16", "float32", "dropout", "none", "gemma2", "qwen3", "attention alone", "eager", "dora", "dora dropout"]
WAYS += ["pissa", "nf4", "int8", "dpo"]


@pytest.fixture(params=WAYS)
def micro_batch(request, recipe_file, tmp_path, jobs):
    """A job of one of the ways to train, and a full micro-batch of it."""
    changes = ["adapter.rank=4", "data.sequence_length=512", "train.micro_batch_tokens=512", "train.steps=1"]
    changes += ["train.batch_size=1"]
    changes += ["train.activation_checkpointing=false", "base.dtype=bfloat16", "adapter.dropout=0"]
    more = {
        "float32": ["base.dtype=float32"],
        "dropout": ["adapter.dropout=0.1"],
        "none": ["train.kernels=none"],
        "eager": ["base.attention=eager"],
        "attention alone": ["adapter.targets=[q_proj, v_proj]"],
        "dora": ["adapter.variant=dora"],
        "dora dropout": ["adapter.variant=dora", "adapter.dropout=0.1"],
        "pissa": ["adapter.init=pissa"],
        "nf4": ["base.quantization=nf4"],
        "int8": ["base.quantization=int8"],
        "dpo": ["objective.kind=dpo", "data.sequence_length=256"],
    }
    changes += more.get(request.param, [])
    family = request.param if request.param in ("gemma2", "qwen3") else "llama"
    folder = base_of(tmp_path / "base", family)
    record = {"prompt": "a" * 40, "completion": "b" * 470}
    if request.param == "dpo":
        record = {"prompt": "a" * 8, "chosen": "b" * 246, "rejected": "c" * 246}
    data = write_jsonl(tmp_path / "long.jsonl", [record] * 4)
    recipe = load_recipe(recipe_file, [*changes, f"base.repo={folder}", f"data.train={data}"])
    loop.train(recipe, tmp_path / "run")
    job = jobs[0]
    batch = loop.collate(job.inputs.data.train, [0], padded=False)
    assert batch.ids.size > 500
    return job, batch


def base_of(folder, family):
    config = AutoConfig.for_model(family, vocab_size=make_tokenizer(folder), pad_token_id=0, eos_token_id=1, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def expected(job, *, recompute):
    shape = read_config(job.inputs.source.folder / "config.json")
    return estimate_memory(shape, job.recipe, tokens=512, recompute=recompute)


class Live(TorchDispatchMode):
    """The bytes of all tensors that are made while it is on, at the moment when they are most."""

    def __init__(self, known):
        super().__init__()
        self.sizes, self.now, self.most = dict.fromkeys(known, 0), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            storage = one.untyped_storage() if isinstance(one, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return result

    def _gone(self, key):
        self.now -= self.sizes.pop(key)


def of_the_model(job):
    tensors = [*job.model.parameters(), *job.model.buffers(), job.state.weights, job.state.gradient, *job.state.kept]
    return {one.untyped_storage()._cdata for one in tensors}


def kept_by_autograd(job, batch):
    """The bytes of all storages that a forward pass saves, beside the model's own."""
    known, saved = of_the_model(job), {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = job.objective.loss(job.model, batch, torch.device("cpu")).total
    del loss
    return sum(storage.nbytes() for key, storage in saved.items() if key not in known)


def most_live(job, batch):
    """The bytes of all tensors of a forward and backward pass at the moment when they are most."""
    with Live(of_the_model(job)) as live:
        job.objective.loss(job.model, batch, torch.device("cpu")).total.backward()
    return live.most


def test_a_pass_keeps_what_was_estimated_or_a_little_less_and_no_more_is_ever_live(micro_batch, monkeypatch):
    job, batch = micro_batch
    kept, estimate = kept_by_autograd(job, batch), expected(job, recompute=False)
    assert kept <= 1.01 * estimate.activation_bytes <= 1.25 * kept  # all tokens are there, and rows are a multiple
    for recompute in (False, True):
        if recompute:
            fusing.checkpoint_activations(inner_of(job.model))
        estimate = expected(job, recompute=recompute)
        estimated = estimate.activation_bytes + estimate.working_bytes
        assert most_live(job, batch) <= estimated, f"compiled kernels, recompute={recompute}"
        with monkeypatch.context() as patch:
            without_compiled(patch)
            most = most_live(job, batch)
        assert most <= estimated <= 1.6 * most, f"plain, recompute={recompute}"  # compiled ones need less for attention


def shape_of(name):
    return read_config(ROOT / "tests" / "shapes" / f"meta-llama--{name}-Instruct.json")


def large(name, *changes):
    return load_recipe(ROOT / "recipes" / f"{name}.yaml", changes)


@pytest.mark.parametrize(
    ("name", "model", "changes", "machine", "expected"),
    [
        ("sft-bf16-70b-fsdp", "Llama-3.1-70B", ["base.placement=auto"], ("cuda", 80 * GB, 8), 8),
        ("sft-bf16-8b", "Llama-3.1-8B", [], ("cuda", 80 * GB, 8), 1),
        ("sft-bf16-8b", "Llama-3.1-8B", [], ("cuda", 16 * GB, 2), 2),
        ("sft-bf16-8b", "Llama-3.1-8B", [], ("cuda", 16 * GB, 1), 1),
        ("sft-bf16-8b", "Llama-3.1-8B", ["base.placement=replicated"], ("cuda", 16 * GB, 2), 1),
        ("sft-bf16-8b", "Llama-3.1-8B", ["base.placement=sharded"], ("cuda", 80 * GB, 4), 4),
        ("sft-int8-8b", "Llama-3.1-8B", [], ("cuda", 8 * GB, 2), 1),
        ("sft-bf16-8b", None, [], ("cuda", 16 * GB, 2), 2),  # the files alone have 17 GB
        ("sft-bf16-8b", None, [], ("cuda", 24 * GB, 2), 1),
    ],
)
def test_auto_shards_a_base_that_does_not_fit_whole(name, model, changes, machine, expected):
    shape, machine = model and shape_of(model), Machine(*machine)
    placed = place(large(name, *changes), shape, machine, 17 * GB)
    assert placed.shards == expected and placed.why
    assert placed.placement == ("sharded" if expected > 1 else "replicated")


@pytest.mark.parametrize(
    ("quantization", "advice"),
    [("int8", "set base.quantization: nf4 or none"), ("fp8", "choose .* in bfloat16")],
)
def test_some_quantisations_are_not_sharded(quantization, advice):
    recipe = large("sft-int8-8b", "base.placement=sharded", f"base.quantization={quantization}")
    with pytest.raises(BaseError, match=rf"^base.placement: sharded with .*{quantization}: .*; {advice}$"):
        place(recipe, shape_of("Llama-3.1-8B"), Machine("cuda", 80 * GB, 2), 0)


@pytest.mark.parametrize(("name", "machine"), [("bf16", ("cuda", 80 * GB, 8)), ("nf4", ("cuda", 48 * GB, 4))])
def test_the_large_recipes_fit_where_they_say_and_only_sharded(name, machine):
    recipe, shape, machine = large(f"sft-{name}-70b-fsdp"), shape_of("Llama-3.1-70B"), Machine(*machine)
    text = (ROOT / "recipes" / f"sft-{name}-70b-fsdp.yaml").read_text()
    assert f"{machine.processes} GPUs with {machine.memory // GB} GB" in text
    whole, sharded = (fitted(recipe, shape, machine, shards) for shards in (1, machine.processes))
    assert sharded.device_bytes <= machine.limit < whole.device_bytes
    assert sharded.base_bytes == -(-whole.base_bytes // machine.processes)
    layer = sum(linear.inputs * linear.outputs for linear in shape.linears) * {"bf16": 2, "nf4": 0.5}[name]
    ends = shape.vocabulary * shape.width * 2
    assert max(3 * layer, 2 * ends) <= sharded.gathered_bytes <= 1.05 * max(3 * layer, 2 * ends)
    assert any("gathered layers" in line for line in sharded.lines())
    assert not any("gathered layers" in line for line in whole.lines())


def fitted(recipe, shape, machine, shards):
    chosen = choose(recipe, shape, machine, shards)
    tokens, recompute = chosen.micro_batch_tokens, chosen.activation_checkpointing
    return estimate_memory(shape, recipe, tokens=tokens, recompute=recompute, device=machine.device, shards=shards)


@pytest.mark.parametrize("gigabytes", [8, 12, 16, 24, 40, 48, 80, 141])
@pytest.mark.parametrize("name", ["sft-bf16-1b", "sft-bf16-8b", "sft-nf4-8b", "sft-int8-8b"])
def test_a_gpu_is_filled_as_far_as_the_estimate_allows_and_no_further(name, gigabytes):
    recipe = large(name, "data.sequence_length=2048", *LEFT_OPEN)
    shape = shape_of("Llama-3.2-1B" if "1b" in name else "Llama-3.1-8B")
    found = choose(recipe, shape, Machine("cuda", gigabytes * GB))

    def fits(tokens, recompute):
        estimate = estimate_memory(shape, recipe, tokens=tokens, recompute=recompute, device="cuda")
        return estimate.device_bytes <= MEMORY_SHARE["cuda"] * gigabytes * GB

    tokens, twice = found.micro_batch_tokens, found.activation_checkpointing
    most = 16384 if shape.width < 4096 else 8192
    assert tokens in (2048, 4096, 8192, most) and twice is not fits(4096, False)
    if fits(2048, twice):
        assert fits(tokens, twice) and (tokens == most or not fits(2 * tokens, twice))
    else:
        assert (tokens, twice) == (2048, True)


def test_a_narrow_base_on_a_large_gpu_gets_more_tokens_and_long_examples_always_fit(recipe_file):
    gpu = Machine("cuda", 80 * GB)
    tiny = read_config(Path(load_recipe(recipe_file).base.repo) / "config.json")
    assert choose(load_recipe(recipe_file, LEFT_OPEN), tiny, gpu) == MicroBatches(16384, False)
    for name, tokens in {"1b": 16384, "8b": 8192}.items():
        shape = shape_of(f"Llama-3.{2 if name == '1b' else 1}-{name.upper()}")
        assert choose(large(f"sft-bf16-{name}", *LEFT_OPEN), shape, gpu) == MicroBatches(tokens, False)
    recipe = large("sft-bf16-8b", "data.sequence_length=10000", *LEFT_OPEN)
    assert choose(recipe, shape_of("Llama-3.1-8B"), gpu).micro_batch_tokens == 10000


def test_on_a_cpu_memory_decides_nothing_but_whether_to_compute_twice():
    recipe, shape = large("sft-bf16-1b", *LEFT_OPEN), shape_of("Llama-3.2-1B")
    found = [choose(recipe, shape, Machine("cpu", size * GB)) for size in (1, 2, 4, 8, 16, 64)]
    assert {one.micro_batch_tokens for one in found} == {2048}
    assert [one.activation_checkpointing for one in found] == [True] * 4 + [False] * 2
    longer = large("sft-bf16-1b", "data.sequence_length=5000", *LEFT_OPEN)
    assert choose(longer, shape, Machine("cpu", 64 * GB)) == MicroBatches(5000, False)


@pytest.mark.quick
def test_what_a_recipe_names_is_what_it_gets_whether_it_fits_or_not():
    shape, small = shape_of("Llama-3.1-8B"), Machine("cuda", GB)
    named = large("sft-bf16-8b", "train.micro_batch_tokens=9000", "train.activation_checkpointing=false")
    assert choose(named, shape, small) == MicroBatches(9000, False)
    half = large("sft-bf16-8b", "train.micro_batch_tokens=9000", "train.activation_checkpointing=auto")
    assert choose(half, shape, small) == MicroBatches(9000, True)
    other = large("sft-bf16-1b", "train.micro_batch_tokens=auto", "train.activation_checkpointing=false")
    assert choose(other, shape, Machine("cuda", 24 * GB)) == MicroBatches(2048, False)


def test_attention_that_weighs_every_pair_of_a_row_gets_short_rows():
    recipe = large("sft-bf16-8b", "data.sequence_length=2048", "base.attention=eager", *LEFT_OPEN)
    assert choose(recipe, shape_of("Llama-3.1-8B"), Machine("cuda", 80 * GB)) == MicroBatches(8192, True)
    assert choose(recipe, shape_of("Llama-3.1-8B"), Machine("cuda", 40 * GB)) == MicroBatches(4096, True)


def test_a_base_that_is_not_counted_fills_no_gpu():
    recipe = large("sft-bf16-1b", *LEFT_OPEN)
    assert choose(recipe, None, Machine("cuda", 80 * GB)) == MicroBatches(4096, True)
    assert choose(recipe, None, Machine("cpu", 80 * GB)) == MicroBatches(2048, False)


@pytest.mark.parametrize(("limit", "least"), [("max\n", None), (f"{GB}\n", GB)])
def test_a_container_has_what_it_may_use(monkeypatch, limit, least):
    monkeypatch.setattr(Path, "read_text", lambda _: limit)
    assert micro_batches.host_memory() == least or (least is None and micro_batches.host_memory() > GB)


def test_a_check_reads_the_memory_of_the_gpus_that_a_run_would_see(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$*" in *--id=*) echo 24000;; *) printf "80000\\n24000\\n";; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert micro_batches.this_machine() == Machine("cuda", 24000 << 20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert micro_batches.this_machine() == Machine("cuda", 24000 << 20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert micro_batches.this_machine(2) == Machine("cpu", micro_batches.host_memory() // 2, 2)


@pytest.fixture
def open_recipe(tmp_path, base_folder):
    """A recipe that leaves both open, with steps of more than 2,048 tokens."""
    data = write_jsonl(tmp_path / "train.jsonl", make_records(80))
    text = RECIPE.format(base=base_folder, data=data).replace("micro_batch_tokens: 256", "micro_batch_tokens: auto")
    path = tmp_path / "open.yaml"
    path.write_text(text.replace("batch_size: 5", "batch_size: 40").replace("steps: 8", "steps: 4"))
    return path


def manifest_of(run):
    return json.loads((store.find(run).latest.path / MANIFEST).read_text())


def test_auto_gives_the_bits_of_the_number_that_it_stands_for(open_recipe, tmp_path, jobs):
    for name, tokens in {"auto": "auto", "named": 2048, "fewer": 512}.items():
        loop.train(load_recipe(open_recipe, [f"train.micro_batch_tokens={tokens}"]), tmp_path / name)
    assert len(jobs[0].plan.micro_batches(0)) > 1, "or every number would do"
    assert state_hash(tmp_path / "auto", 4) == state_hash(tmp_path / "named", 4) != state_hash(tmp_path / "fewer", 4)
    recorded, names = manifest_of(tmp_path / "auto"), ("micro_batch_tokens", "activation_checkpointing")
    assert [recorded["recipe"]["train"][name] for name in names] == ["auto", "auto"]
    assert [recorded["resolved"][name] for name in names] == [2048, False]
    assert manifest_of(tmp_path / "named")["resolved"] == recorded["resolved"]


def test_a_run_keeps_its_choice_when_memory_is_another(open_recipe, tmp_path, monkeypatch, jobs, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(choices, "host_memory", lambda: 1000)
    loop.train(load_recipe(open_recipe), out)
    assert "micro-batches: at most 2,048 tokens, activations recomputed in backward" in capsys.readouterr().out
    expected = state_hash(out, 4)
    monkeypatch.setattr(choices, "host_memory", lambda: 64 * GB)
    monkeypatch.setattr(micro_batches, "CPU_TOKENS", 512)
    shutil.rmtree(store.checkpoint_folder(out, 4))
    (out / "result.json").unlink()
    loop.train(load_recipe(open_recipe), out)
    printed = capsys.readouterr().out
    assert (
        "same recipe, base, data, versions and machine" in printed and "activations recomputed in backward" in printed
    )
    assert inner_of(jobs[-1].model).is_gradient_checkpointing and jobs[-1].plan.micro_batch_tokens == 2048
    assert state_hash(out, 4) == expected
    assert manifest_of(out)["resolved"]["micro_batch_tokens"] == 2048


def test_only_an_accepted_change_of_the_recipe_changes_what_was_chosen(open_recipe, tmp_path):
    out, key = tmp_path / "run", "train.micro_batch_tokens"
    loop.train(load_recipe(open_recipe, ["train.steps=3"]), out)
    with pytest.raises(ContractError, match=rf"needs --accept +{key}: auto -> 512"):
        loop.train(load_recipe(open_recipe, ["train.steps=3", f"{key}=512"]), out)
    changes = ["train.steps=4", f"{key}=512"]
    loop.train(load_recipe(open_recipe, changes), out, accept=["train.steps", key])
    assert manifest_of(out)["resolved"]["micro_batch_tokens"] == 512
    loop.train(load_recipe(open_recipe, ["train.steps=5"]), out, accept=["train.steps", key])
    assert manifest_of(out)["resolved"]["micro_batch_tokens"] == 2048


@pytest.mark.slow
def test_a_resume_on_another_number_of_processes_keeps_the_choice_and_the_bits(open_recipe, tmp_path):
    for name, processes in {"one": 1, "two": 2}.items():
        train(open_recipe, tmp_path / name, processes=processes)
    first, second = (manifest_of(tmp_path / name)["resolved"] for name in ("one", "two"))
    assert first | {"threads": second["threads"]} == second and first["micro_batch_tokens"] == 2048
    expected = state_hash(tmp_path / "one", 4)
    assert state_hash(tmp_path / "two", 4) == expected
    shutil.rmtree(store.checkpoint_folder(tmp_path / "one", 4))
    (tmp_path / "one" / "result.json").unlink()
    printed = train(open_recipe, tmp_path / "one", processes=2)
    assert "machine.processes: 1 -> 2" in printed and "at most 2,048 tokens, activations kept" in printed
    assert manifest_of(tmp_path / "one")["resolved"] == first and state_hash(tmp_path / "one", 4) == expected


def test_the_process_with_least_memory_decides_for_all(monkeypatch):
    class Two:
        device, count = torch.device("cpu"), 2
        gather = staticmethod(lambda mine: [*mine, 3 * GB])

    monkeypatch.setattr(choices, "host_memory", lambda: 10 * GB)
    assert choices.smallest_machine(Two) == Machine("cpu", 3 * GB, 2)


class Two:
    """Two processes; the other process runs on a machine with 12 cores."""

    device, count = torch.device("cpu"), 2
    gather = staticmethod(lambda mine: [*mine, 12])


@pytest.mark.parametrize(
    ("megabytes", "cores", "expected"),
    [(1000, 16, 6), (1000, 4, 2), (1000, 2, 1), (12, 16, 3), (0.1, 16, 2), (0.1, 2, 1)],
    ids=["the fewest cores decide", "shared", "one core each", "small base", "tiny base", "tiny base, one core each"],
)
def test_threads_follow_from_the_base_and_the_cores(monkeypatch, megabytes, cores, expected):
    monkeypatch.setattr(choices, "host_cores", lambda: cores)
    assert choices.threads(SimpleNamespace(weight_bytes=int(megabytes * 1e6)), Two) == expected


def test_cores_outside_the_affinity_mask_or_the_limit_of_a_container_do_not_count(monkeypatch):
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 64)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda process: set(range(16)))
    limit = "max 100000\n"
    monkeypatch.setattr(host, "Path", lambda path: SimpleNamespace(read_text=lambda: limit))
    assert host.host_cores() == 16
    limit = "250000 100000\n"
    assert host.host_cores() == 2
    limit = "50000 100000\n"
    assert host.host_cores() == 1


def test_a_check_tells_what_a_run_would_choose(open_recipe, monkeypatch):
    monkeypatch.setattr(checking, "this_machine", lambda processes=1: Machine("cuda", 80 * GB))
    report = checking.check(load_recipe(open_recipe))
    assert report.micro_batches == MicroBatches(16384, False) and report.estimate.memory.micro_batch_tokens < 16384
    assert "micro-batches: at most 16,384 tokens, activations kept (cuda with 80 GB)" in repr(report)
    assert json.loads(json.dumps(report.to_dict()))["micro_batches"]["micro_batch_tokens"] == 16384
    found = checking.estimate(load_recipe(open_recipe))  # without the data, of a full micro-batch
    assert found.memory.micro_batch_tokens == 16384 and found.gpus == report.estimate.gpus
