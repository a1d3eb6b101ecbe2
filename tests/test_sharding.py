"""A sharded base changes no bit: gradients, losses, answers and checkpoints are those of whole weights, and a run may
change between the two at every resume. No process holds more than its share, and no file a tensor of the base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import RECIPE, make_base, write_jsonl
from preferences import preference_records
from runs import run_code, started, state_hash
from safetensors.torch import load_file
from test_families import FAMILIES, save_family
from transformers import GPT2Config

from lora_kit.errors import BaseError
from lora_kit.model import sharding
from lora_kit.model.base import _quantized, empty_base, load_base
from lora_kit.model.source import locate
from lora_kit.recipe.schema import Base
from lora_kit.supervise import launch

TESTS = Path(__file__).parent
STEPS = 2
DTYPES = (torch.float32, torch.bfloat16)
CHANGES = [f"train.steps={STEPS}", "checkpoint.every_steps=2", "optim.max_grad_norm=null", "train.kernels=none"]
EVALUATED = ["data.validation=0.2", "evaluate.every_steps=2"]
ANSWERING = [*EVALUATED, "evaluate.generate=1"]
FAST = ["train.kernels=auto"]
ON_TWO = {
    "float32": [*FAST, *ANSWERING],
    "bfloat16": [
        *FAST,
        "base.dtype=bfloat16",
        "train.activation_checkpointing=true",
        "adapter.targets=[q_proj,lm_head]",
    ],
    "by transformers": ANSWERING,
    "nf4 and olora": [*FAST, "base.quantization=nf4", "adapter.init=olora"],
    "nf4 by transformers": ["base.quantization=nf4", "base.dtype=bfloat16", "train.activation_checkpointing=true"],
    "dora": [*FAST, "adapter.variant=dora", "adapter.dropout=0", "train.activation_checkpointing=true"],
    "dora by peft": ["adapter.variant=dora", "base.dtype=bfloat16"],
    "nf4 and dora by peft": ["adapter.variant=dora", "base.quantization=nf4", "base.dtype=bfloat16"],
    "pissa": [*FAST, "adapter.init=pissa", "base.dtype=bfloat16"],
}
ON_FOUR = {  # a step and the validation data have fewer micro-batches than there are processes
    "float32": [*FAST, *ANSWERING, "train.batch_size=2"],
    "by transformers": ["train.batch_size=1"],
    "eva": [*FAST, "adapter.init=eva", "train.batch_size=3"],
    "dpo": [*FAST, *EVALUATED, "train.batch_size=2"],
    "kto": [*EVALUATED, "train.batch_size=3"],
}

WORKER = """
import os, sys, json, hashlib
from lora_kit.recipe.load import load_recipe
from lora_kit.supervise.zygote import STORE
from lora_kit.training import loop, publisher
sys.path.append(sys.argv[2])
from runs import fork_keeper
publisher.start_keeper = fork_keeper
seen, update, cache = [], loop.optim.adamw, os.environ["LORA_KIT_CACHE"]
def spy(weights, gradient, *rest, **named):
    seen.append(hashlib.sha256(gradient.numpy().tobytes()).hexdigest())
    update(weights, gradient, *rest, **named)
loop.optim.adamw = spy
rank, build, built = os.environ.get("RANK", "0"), loop.build_model, []
loop.build_model = lambda *a: built.append(build(*a)) or built[-1]
for out, recipe, changes in json.loads(sys.argv[1]):
    seen.clear()
    print(out, changes, flush=True)
    preferences = any(change.startswith("objective.kind=") for change in changes)
    os.environ["LORA_KIT_CACHE"] = f"{out}.cache" if preferences else cache  # each computes its own reference
    loop.train(load_recipe(recipe, changes), out)
    os.environ.pop(STORE, None)  # the group remains
    held = [p for p in built.pop().model.parameters() if not p.requires_grad]
    held = sum(getattr(p, "_local_tensor", p).nbytes for p in held)
    with open(f"{out}/seen.{rank}", "w") as file:
        json.dump({"gradients": seen, "held": held}, file)
"""


def train_all(jobs, processes):
    """Train several (run, recipe, changes) one after the other in the same processes; return what was printed."""
    told = json.dumps([(str(out), str(recipe), changes) for out, recipe, changes in jobs])
    workers = [started([told, TESTS], environment, code=WORKER) for environment in launch.environments(processes)]
    printed = [worker.communicate()[0] for worker in workers]
    assert not any(worker.returncode for worker in workers), "\n".join(printed)
    return printed[0]


def seen(run, processes, what):
    """Return what each process has seen: the gradients of every step, or the bytes of the base that it holds."""
    return [json.loads((run / f"seen.{rank}").read_text())[what] for rank in range(processes)]


def files_of(run):
    names = {path.relative_to(run): path for path in run.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if not name.name.startswith("seen.")}


def numbers(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: line[name] for name in ("step", "loss", "grad_norm")} for line in lines]
    return kept, json.loads((run / "result.json").read_text())["metrics"]


def placement(run):
    return json.loads((run / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())["resolved"]["placement"]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "tied", "cases"), [(2, False, ON_TWO), (4, True, ON_FOUR)])
def test_sharded_and_replicated_runs_have_the_same_bits(processes, tied, cases, tmp_path, data_file):
    base = make_base(tmp_path / "base", tie_word_embeddings=tied)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=base, data=data_file))
    pairs, jobs = write_jsonl(tmp_path / "pairs.jsonl", preference_records(13)), []
    for name, changes in cases.items():
        if name in ("dpo", "kto"):
            changes = [f"data.train={pairs}", f"objective.kind={name}", "train.micro_batch_tokens=512", *changes]
        for where in ("replicated", "sharded"):
            jobs.append((tmp_path / f"{name} {where}", recipe, [*CHANGES, *changes, f"base.placement={where}"]))
    train_all(jobs, processes)
    rows = [tensor.contiguous().flatten()[:16] for tensor in load_file(base / "model.safetensors").values()]
    of_the_base = [row.to(dtype).view(torch.uint8).numpy().tobytes() for row in rows for dtype in DTYPES if row.std()]
    for name in cases:
        whole, sharded = (tmp_path / f"{name} {where}" for where in ("replicated", "sharded"))
        assert (placement(whole), placement(sharded)) == ("replicated", "sharded")
        found, expected = (seen(run, processes, "gradients") for run in (sharded, whole))
        assert found == expected and len(set(found[0])) == STEPS, name
        assert numbers(whole) == numbers(sharded), name
        assert state_hash(whole, STEPS) == state_hash(sharded, STEPS), name
        held, everything = (seen(run, processes, "held") for run in (sharded, whole))
        assert max(held) < 1.1 * everything[0] / processes, (name, held, everything)
        files, others = files_of(sharded), files_of(whole)
        assert files.keys() == others.keys()
        assert not [path for path, content in files.items() if any(row in content for row in of_the_base)]


ONE_PROCESS = """
import sys
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from pathlib import Path
from lora_kit.kernels.attention import use_attention
from lora_kit.errors import RecipeError
from lora_kit.kernels.fusing import use_kernels
from lora_kit.model.adapter import inject
from lora_kit.model.base import load_base
from lora_kit.model.forward import model_inputs
from lora_kit.model.probe import probe_batch
from lora_kit.model.source import locate
from lora_kit.model.state import flatten
from lora_kit.recipe.schema import Adapter, Base
from lora_kit.training.objectives.sft import Sft
device, folder = torch.device(sys.argv[1]), Path(sys.argv[2])
backend = "nccl" if device.type == "cuda" else "gloo"
dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
mesh, found = init_device_mesh(device.type, (1,)), []
batch = probe_batch([np.arange(3, 40), np.arange(5, 25)])
for changes in ({"dtype": "float32"}, {"dtype": "bfloat16"}):
    section, found = Base(repo="x", **changes), []
    for where in (None, mesh):
        base = load_base(locate(section, folder), section, device, where)
        use_attention(base, "segment")
        model = inject(base, Adapter(rank=4), seed=0, name="x", revision=None).train()
        state = flatten(model)
        state.weights.copy_(torch.randn(state.size, generator=torch.Generator().manual_seed(1)) / 10)
        used = use_kernels(model, None, model_inputs(model, batch, device))
        loss = Sft().loss(model, batch, device)
        loss.total.backward()
        found.append((used, loss.total.detach(), state.gradient.clone()))
    (used, loss, gradient), (used_too, loss_too, gradient_too) = found
    assert used == used_too and len(used) == 6, (used, used_too)
    assert torch.equal(loss, loss_too) and torch.equal(gradient, gradient_too) and gradient.any(), changes
try:
    base = load_base(locate(section, folder), section, device, mesh)
    inject(base, Adapter(rank=4, variant="dora", targets=["q_proj", "lm_head"]), seed=0, name="x", revision=None)
    raise AssertionError("not refused")
except RecipeError as error:
    assert str(error).startswith("adapter.variant: dora with base.placement: sharded: lm_head is gathered"), error
"""


def test_a_base_sharded_over_one_device_has_the_same_loss_and_gradient(device, base_folder):
    run_code(ONE_PROCESS, device.type, base_folder)


FAMILY = """
import sys, json
import numpy as np
import torch
from lora_kit.errors import BaseError
from lora_kit.kernels.fusing import use_kernels
from lora_kit.model.adapter import inject
from lora_kit.model.base import load_base
from lora_kit.model.forward import model_inputs
from lora_kit.model.probe import choose_attention, probe_batch
from lora_kit.model.source import locate
from lora_kit.model.state import flatten
from lora_kit.recipe.schema import Adapter, Base
from lora_kit.training.objectives.sft import Sft
from lora_kit.training.processes import Processes
from pathlib import Path
processes = Processes.start("float32")
device, mesh = processes.device, processes.mesh()
for folder, targets in json.loads(sys.argv[1]):
    section, found = Base(repo="x", dtype="float32"), []
    for where in (None, mesh):
        try:
            base = load_base(locate(section, Path(folder)), section, device, where)
        except BaseError as error:
            print("refused", Path(folder).name, error, flush=True)
            break
        attention, layout = choose_attention(base, section, device)
        model = inject(base, Adapter(rank=4, targets=targets), seed=0, name="x", revision=None).train()
        state = flatten(model)
        state.weights.copy_(torch.randn(state.size, generator=torch.Generator().manual_seed(1)) / 10)
        examples = [np.arange(3, 40), np.arange(5, 25)]
        batch = probe_batch(examples if layout == "packed" else examples[:1])
        used = use_kernels(model, None, model_inputs(model, batch, device))
        loss = Sft().loss(model, batch, device)
        loss.total.backward()
        found.append((used, attention, layout, loss.total.detach(), state.gradient.clone()))
    if len(found) < 2:
        continue
    (*chosen, loss, gradient), (*chosen_too, loss_too, gradient_too) = found
    assert chosen == chosen_too, (folder, chosen, chosen_too)
    same = torch.equal(loss, loss_too) and torch.equal(gradient, gradient_too) and bool(gradient.any())
    if Path(folder).name == "mamba":  # its reference code in PyTorch rounds otherwise with other addresses
        pairs = ((loss, loss_too), (gradient, gradient_too))
        same = all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in pairs)
    assert same, (folder, targets, loss, loss_too, (gradient - gradient_too).abs().max())
    print(folder, targets, *chosen, flush=True)
"""


@pytest.mark.slow
def test_a_family_trains_sharded_or_is_refused_with_the_reason(base_folder, tmp_path):
    folders = [str(save_family(tmp_path / family, family, base_folder)) for family in FAMILIES]
    told = json.dumps([[folder, "all-linear"] for folder in folders])
    workers = [started([told], environment, code=FAMILY) for environment in launch.environments(2)]
    printed = [worker.communicate()[0] for worker in workers]
    assert not any(worker.returncode for worker in workers), "\n".join(printed)
    refused = [line for line in printed[0].splitlines() if line.startswith("refused ")]
    assert all("from several tensors of its files" in line for line in refused), refused


def empty(config, **section):
    return empty_base(config, Base(repo="tiny", **section))


def test_a_base_that_cannot_be_divided_is_refused_with_the_reason(base_folder, tmp_path, monkeypatch):
    published = shutil.copytree(base_folder, tmp_path / "published")
    config = json.loads((published / "config.json").read_text())
    four_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (published / "config.json").write_text(json.dumps(config | {"quantization_config": four_bits}))
    section = Base(repo=str(published), quantization="nf4")
    with pytest.raises(BaseError, match=r"^base.placement: .* was published in nf4, and only plain weights"):
        load_base(locate(section, published), section, torch.device("cpu"), object())
    transposed = tmp_path / "gpt2"
    GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64).save_pretrained(transposed)
    with pytest.raises(BaseError, match=r"nf4: transformer\.h\.0\..* of GPT2LMHeadModel is a Conv1D"):
        sharding.load_shards(empty(transposed), None, None, None, _quantized(section))
    model = empty(base_folder)
    model._no_split_modules = None
    with pytest.raises(BaseError, match=r"^base.placement: LlamaForCausalLM does not name its layers"):
        sharding.shard(model, None)
    monkeypatch.setattr(sharding, "OLDEST", {"torch": "99.1"})
    with pytest.raises(BaseError, match=r"^base.placement: sharded needs torch 99.1, found .*; upgrade it$"):
        sharding.shard(model, None)
