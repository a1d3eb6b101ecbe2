"""Every variant of LoRA trains what peft trains, resumes to the byte after a kill, and loads in plain peft."""

import random
import re
import signal
from fnmatch import fnmatchcase

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.optimizers import create_loraplus_optimizer
from peft.utils.other import get_pattern_key
from plain_loop import plain_loop, relative
from runs import go_on, started, state_hash, train
from safetensors.torch import load_file
from test_families import FAMILIES, SMALL
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from lora_kit.artifacts.merging import merge
from lora_kit.check import estimate
from lora_kit.cli import app
from lora_kit.errors import ContractError, DataError, RecipeError
from lora_kit.kernels import fusing
from lora_kit.kernels.attention import own_attention
from lora_kit.kernels.dora import is_dora, magnitude_of, row_norms
from lora_kit.kernels.lora import adapted_linear, adapters_of
from lora_kit.model.adapter import inject
from lora_kit.model.base import load_base
from lora_kit.model.patterns import as_regex, named
from lora_kit.model.source import locate
from lora_kit.model.state import Kind, flatten
from lora_kit.model.variants import attach_constants, start_from_inputs, start_from_weights
from lora_kit.recipe.load import load_recipe
from lora_kit.recipe.schema import Adapter, Base, Optim
from lora_kit.runs.journal import Journal
from lora_kit.runs.layout import Layout
from lora_kit.runs.store import open_checkpoint
from lora_kit.training import loop, optim

VARIANTS = {
    "rslora": ["adapter.scaling=rslora"],
    "patterns": [
        "adapter.rank_pattern={layers.1.*.q_proj: 2, '[gu]*_proj': 6}",
        "adapter.alpha_pattern={'*.down_proj': 3}",
        "adapter.layers=[1]",
        "adapter.exclude=[o_proj]",
        "adapter.scaling=rslora",
    ],
    "dora": ["adapter.variant=dora", "optim.b_ratio=2", "optim.weight_decay=0.1"],
    "pissa": ["adapter.init=pissa", "adapter.rank_pattern={q_proj: 2}"],
    "olora": ["adapter.init=olora", "adapter.scaling=rslora", "adapter.alpha=2"],
    "eva": ["adapter.init=eva"],
    "adamw-8bit": ["optim.name=adamw-8bit", "optim.b_ratio=2"],
    "loraplus": ["optim.b_ratio=4", "optim.weight_decay=0.1", "optim.schedule=wsd", "optim.decay=0.5"],
}
KILLED_AFTER_TWO_STEPS = """
import os, sys
from lora_kit.recipe.load import load_recipe
from lora_kit.training import loop

def killed(step, every):
    if step == 3:
        os.kill(os.getpid(), 9)
    return False

loop.due = killed
recipe, out, *changes = sys.argv[1:]
loop.train(load_recipe(recipe, changes), out)
"""
NO_DROPOUT = ["train.steps=3", "adapter.dropout=0", "optim.max_grad_norm=null"]


def peft_logits(checkpoint, base_folder, ids):
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(checkpoint)).eval()(ids).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_and_logits_are_those_of_peft(variant, recipe_file, tmp_path, base_folder, captured, jobs):
    recipe = load_recipe(recipe_file, [*NO_DROPOUT, *VARIANTS[variant]])
    run = loop.train(recipe, tmp_path / "run")
    (job,) = jobs
    for step, (weights, gradient) in enumerate(captured):
        members = [index for group in job.plan.micro_batches(step) for index in group]
        expected, loss = plain_loop(job, weights, members)
        assert relative(gradient, expected) < 1e-5
        assert run.metrics[step]["loss"] == pytest.approx(loss, rel=1e-5)
    ids = torch.arange(40)[None]
    with torch.no_grad(), own_attention(job.model):
        ours = job.model.eval()(ids).logits
    assert relative(peft_logits(run.latest, base_folder, ids), ours) < 1e-5
    assert estimate(recipe).memory.trainable_parameters == job.state.size


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(variant, recipe_file, tmp_path):
    changes = ["train.steps=4", "checkpoint.every_steps=100", *VARIANTS[variant]]
    go_on(recipe_file, tmp_path / "whole", *changes)
    process = started([recipe_file, tmp_path / "run", *changes], None, code=KILLED_AFTER_TWO_STEPS)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    go_on(recipe_file, tmp_path / "run", *changes)
    resumed = [event for event in Journal(tmp_path / "run").read_events() if event["kind"] == "resumed"]
    assert [event["step"] for event in resumed] == [2]
    assert state_hash(tmp_path / "run", 4) == state_hash(tmp_path / "whole", 4)


def test_patterns_select_in_peft_what_they_select_here():
    rng, parts = random.Random(0), ["model", "layers", "1", "11", "mlp", "q_proj", "down_proj", "a[b"]
    for _ in range(3000):
        path = ".".join(rng.choices(parts, k=rng.randint(1, 5)))
        pattern = ".".join(
            rng.choices([*parts, "*", "?", "1?", "*_proj", "[qd]*", "[!q]*", "l*s"], k=rng.randint(1, 3))
        )
        ours = bool(named(pattern, [path]))
        assert ours == (
            get_pattern_key([as_regex(pattern)], path) != path or bool(re.fullmatch(as_regex(pattern), path))
        )
        assert ours == (fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}"))


def test_the_rates_of_a_and_b_are_those_of_peft(recipe_file, tmp_path, base_folder, captured, jobs):
    settings = [*NO_DROPOUT, "optim.b_ratio=4", "optim.schedule=constant", "optim.warmup=0"]
    run = loop.train(load_recipe(recipe_file, settings), tmp_path / "run")
    (job,) = jobs
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(run.latest), is_trainable=True)
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4, eps=1e-8)
    by_name = {name.replace(".default.", "."): tensor for name, tensor in theirs.named_parameters()}
    parameters = [by_name[name] for name in job.state.names]
    torch.nn.utils.vector_to_parameters(captured[0][0], parameters)
    for _, gradient in captured:
        flat = gradient.split([tensor.numel() for tensor in parameters])
        for tensor, piece in zip(parameters, flat, strict=True):
            tensor.grad = piece.view_as(tensor)
        optimizer.step()
    ours = load_file(run.latest / "adapter_model.safetensors")
    assert all(relative(ours[name], by_name[name]) < 1e-5 for name in ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("adapter.layers=[5]", "adapter.layers: 5 is no decoder layer with a target; they have 0 to 1"),
        ("adapter.exclude=[query]", r"adapter.exclude: \['query'\] match no layer of the base; choose from"),
        ("adapter.exclude=['*_proj']", "adapter.exclude: it leaves no layer of adapter.targets; exclude fewer layers"),
        ("adapter.rank_pattern={lm_head: 2}", r"adapter.rank_pattern: \['lm_head'\] match no layer"),
        ("adapter.alpha_pattern={w1: 2}", r"adapter.alpha_pattern: \['w1'\] match no layer"),
    ],
)
def test_a_layer_that_is_not_there_is_named_by_run_and_check(change, message, recipe_file, tmp_path):
    with pytest.raises(RecipeError, match=message):
        loop.train(load_recipe(recipe_file, [change]), tmp_path / "run")
    result = CliRunner().invoke(app, ["check", str(recipe_file), "--set", change])
    assert result.exit_code == 2 and re.search(message, " ".join(result.stdout.split()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("adapter.layers=[3-1]", "layers: the range 3-1 is empty; write 1-3"),
        ("adapter.layers=[last]", "adapter.layers"),
        ("adapter.modules_to_save=[lm_head]", "12.6 GB in each checkpoint for embedding and head"),
    ],
)
def test_what_a_recipe_cannot_say_is_refused_with_the_reason(change, message, recipe_file):
    with pytest.raises(RecipeError, match=re.escape(message)) as refusal:
        load_recipe(recipe_file, [change])
    print(refusal.value)


def tiny_with(family, settings, dtype=torch.float32):
    """Return a tiny model of a family with a random adapter, and the model's state."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | FAMILIES[family])
    model = inject(AutoModelForCausalLM.from_config(config, dtype=dtype), settings, seed=0, name="x", revision=None)
    state = flatten(model.eval())
    state.weights.add_(torch.rand_like(state.weights).sub_(0.5).mul_(0.1))
    return model, state


def loss_and_gradient(model, state):
    state.reduced.zero_()
    loss = torch.tanh(model(torch.arange(60).view(2, 30)).logits.float()).square().sum()
    loss.backward()
    return loss.detach(), state.gradient.clone()


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])  # with biases, and with transposed weights
def test_dora_on_the_fast_path_is_dora_of_peft(family):
    model, state = tiny_with(family, Adapter(rank=4, variant="dora"))
    theirs = loss_and_gradient(model, state)
    fusing.use_kernels(model, ["lora", "mlp"])
    assert re.match(r"fused adapters \((\d+) of \1\)", fusing.about(model, ["lora"]))
    ours = loss_and_gradient(model, state)
    assert relative(ours[0], theirs[0]) < 1e-5 and relative(ours[1], theirs[1]) < 1e-5
    magnitudes = state.ranges[Kind.MAGNITUDE]
    assert relative(ours[1][magnitudes], theirs[1][magnitudes]) < 1e-5 and theirs[1][magnitudes].norm() > 0


def test_dora_with_dropout_is_left_to_peft_which_is_said():
    model, _ = tiny_with("llama", Adapter(rank=4, variant="dora", dropout=0.1))
    assert fusing.use_kernels(model, ["lora", "mlp"]) == []
    assert "(0 of 14; down_proj" in fusing.about(model, ["lora"]) and "by peft" in fusing.about(model, ["lora"])


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_fresh_dora_adapter_changes_nothing_also_in_bf16_and_on_a_quantised_base(quantization, base_folder):
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    settings = Base(repo="x", quantization=quantization)
    base = load_base(locate(settings, base_folder), settings, torch.device("cpu"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = base(ids).logits if quantization != "int8" else None  # whose own product rounds activations
        model = inject(base, Adapter(rank=4, variant="dora"), seed=0, name="x", revision=None)
        fusing.use_kernels(model, ["lora"])
        after = model(ids).logits
        linear = adapted_linear(next(module for module in model.modules() if is_dora(module)))
        module = next(module for module in model.modules() if is_dora(module))
        factor = magnitude_of(module) / row_norms(linear.weight(torch.bfloat16), *adapters_of([module]), linear.scale)
    assert torch.equal(factor, torch.ones_like(factor))
    assert before is None or torch.equal(before, after)


def test_a_dora_adapter_merges(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["train.steps=2", "adapter.variant=dora", "adapter.dropout=0"])
    merged = merge(loop.train(recipe, tmp_path / "run").latest, tmp_path / "merged")
    assert merged.top1_agreement == 1 and merged.largest_difference < 1e-4 * merged.largest_logit


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("kernels", [[], ["lora", "mlp"]])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_weights_changes_neither_base_nor_output(init, kernels, quantization, base_folder):
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    settings, ids = Base(repo="x", dtype="float32", quantization=quantization), torch.arange(40)[None]
    base = load_base(locate(settings, base_folder), settings, torch.device("cpu"))
    frozen = {name: tensor.clone() for name, tensor in base.named_parameters()}
    adapter = Adapter(rank=4, init=init)
    with torch.no_grad():
        before = base(ids).logits
        model = inject(base, adapter, seed=0, name="x", revision=None)
        state = flatten(model, constants=True)
        attach_constants(model, state)
        start_from_weights(model, adapter)
        fusing.use_kernels(model, kernels)
        assert relative(model(ids).logits, before) < 1e-5
        own = {
            name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in model.named_parameters()
        }
        assert all(torch.equal(own[name], tensor) for name, tensor in frozen.items())
        state.weights.mul_(1.1)
        assert relative(model(ids).logits, before) > 1e-3, "A and B have no effect, so this proves nothing"


def test_a_run_without_its_constants_would_not_resume(recipe_file, tmp_path):
    """The proof above fails if a snapshot leaves out A0 and -B0."""
    changes = ["train.steps=4", *VARIANTS["pissa"]]
    run = go_on(recipe_file, tmp_path / "run", *changes)
    whole = open_checkpoint(run.latest)
    layout = Layout.of({name: one.shape for name, one in whole.state().weights.items()}, whole.manifest.run.recipe)
    assert layout.saved_shapes == {name: one.shape for name, one in whole.weights().items()}
    assert {"wide": sum(one.size for one in whole.state().constants.values())} == {"wide": layout.size}
    assert all(one.any() for one in whole.state().constants.values())


@torch.no_grad()
def test_the_start_of_eva_is_that_of_peft(base_folder):
    base = (AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32) for _ in range(2))
    ids = torch.randint(3, 100, (4, 60), generator=torch.Generator().manual_seed(0))
    calls = [({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool))] * 3  # else peft follows too few directions
    ours = inject(next(base), Adapter(rank=4, init="eva"), seed=0, name="x", revision=None)
    start_from_inputs(ours, calls)
    config = LoraConfig(r=4, target_modules=ours.peft_config["default"].target_modules, init_lora_weights="eva")
    config.eva_config = EvaConfig(rho=1.0, tau=0.9)  # the same rank for each layer
    theirs, found = get_peft_model(next(base), config), {}
    initialize_lora_eva_weights(theirs, [arguments for arguments, _ in calls], show_progress_bar=False)
    for name, tensor in theirs.named_parameters():
        if "lora_A" in name:
            mine = ours.get_parameter(name)
            found[name] = torch.linalg.matrix_norm(mine @ tensor.T) ** 2 / 4  # 1 if both span the same directions
    assert len(found) == 14 and min(found.values()) > 0.98  # by chance it would be 0.13
    rows, layer = [], next(module for name, module in ours.named_modules() if name.endswith("layers.1.mlp.down_proj"))
    handle = layer.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].flatten(0, 1)))
    for arguments, _ in calls:
        ours(**arguments)
    handle.remove()
    everything = torch.cat(rows)
    exact = torch.linalg.svd(everything - everything.mean(0), full_matrices=False)[2][:4]
    assert torch.linalg.matrix_norm(layer.lora_A["default"].weight @ exact.T) ** 2 / 4 > 0.97


def test_moments_in_8_bits_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert all(
        torch.equal(optim.code_map(signed=signed), functional.create_dynamic_map(signed)) for signed in (True, False)
    )
    torch.manual_seed(0)
    size, settings = 5 * 256, Optim(learning_rate=1e-2, weight_decay=0.1)
    weights = torch.randn(size)
    theirs, codes = weights.clone(), [torch.zeros(size, dtype=torch.uint8) for _ in range(4)]
    scales = [torch.zeros(5) for _ in range(4)]
    tables = [functional.create_dynamic_map(signed) for signed in (True, False)]
    for step in range(20):
        gradient = torch.randn(size) * torch.logspace(-3, 0, size)
        optim.adamw_8bit(
            weights, gradient, (*scales[:2], *codes[:2]), step=step, learning_rate=1e-2, optim=settings,
            taken=torch.tensor(True), ranges={Kind.A: slice(0, 700), Kind.B: slice(700, size)},
        )  # fmt: skip
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam", gradient, theirs, codes[2], codes[3], 0.9, 0.999, 0.0, 0.0, 1e-8, step + 1, 1e-2,
            *tables, scales[2], scales[3], 0.1, 1.0, False,
        )  # fmt: skip
    for table, ours, bits in zip(tables, codes[:2], codes[2:], strict=True):
        assert (ours != bits).float().mean() < 0.05
        torch.testing.assert_close(table[ours.int()], table[bits.int()], rtol=0, atol=0.02)  # a step of the code at 1
    torch.testing.assert_close(weights, theirs, rtol=0, atol=5e-3)  # of the 0.2 that they move
    assert not torch.equal(weights, torch.zeros(size))


def test_a_skipped_step_leaves_moments_in_8_bits_as_they_are():
    scales, codes = (
        [torch.rand(2) for _ in range(2)],
        [torch.randint(0, 256, (512,), dtype=torch.uint8) for _ in range(2)],
    )
    kept = [buffer.clone() for buffer in (*scales, *codes)]
    optim.adamw_8bit(
        torch.ones(500), torch.full((500,), torch.nan), (*scales, *codes), step=3, learning_rate=1e-2, optim=Optim(),
        taken=torch.tensor(False), ranges={Kind.B: slice(0, 500)},
    )  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(kept, (*scales, *codes), strict=True))


def test_chunks_change_no_bit(monkeypatch):
    def updated():
        torch.manual_seed(0)
        weights, moments = torch.randn(2000), [torch.zeros(8), torch.zeros(8)]
        moments += [torch.zeros(2048, dtype=torch.uint8) for _ in range(2)]
        for step in range(3):
            optim.adamw_8bit(
                weights, torch.randn(2000), moments, step=step, learning_rate=1e-2, optim=Optim(b_ratio=3),
                taken=torch.tensor(True), ranges={Kind.A: slice(0, 900), Kind.B: slice(900, 2000)},
            )  # fmt: skip
        return [weights, *moments]

    whole = updated()
    monkeypatch.setattr(optim, "CHUNK", 512)
    assert all(torch.equal(*pair) for pair in zip(whole, updated(), strict=True))


def test_a_checkpoint_takes_six_bytes_a_parameter_and_two_processes_write_the_same(recipe_file, tmp_path):
    changes = ["train.steps=2", "adapter.init=pissa", "adapter.rank=16", "optim.name=adamw-8bit"]
    options = [part for change in changes for part in ("--set", change)]
    train(recipe_file, tmp_path / "two", *options, processes=2)
    run = go_on(recipe_file, tmp_path / "one", *changes)
    assert state_hash(run.folder, 2) == state_hash(tmp_path / "two", 2)
    trained = open_checkpoint(run.latest).state()
    parameters = sum(one.size for one in trained.weights.values())
    assert sum(one.nbytes for one in trained.moments.values()) <= 2.05 * parameters
    recipe = load_recipe(recipe_file, changes)
    assert estimate(recipe).memory.checkpoint_bytes == pytest.approx(open_checkpoint(run.latest).size, rel=0.2)


def test_an_adapter_that_starts_from_the_weights_merges_and_a_run_begins_with_it(recipe_file, tmp_path):
    changes = ["train.steps=2", "adapter.init=pissa", "adapter.dropout=0"]
    run = go_on(recipe_file, tmp_path / "run", *changes)
    merged = merge(run.latest, tmp_path / "merged")
    assert merged.top1_agreement == 1 and merged.largest_difference < 1e-3 * merged.largest_logit
    loss = run.metrics[-1]["loss"]
    again = loop.train(load_recipe(recipe_file, changes), tmp_path / "again", start_from=run.latest)
    assert again.metrics[0]["loss"] < loss


def test_what_does_not_go_together_is_refused_with_the_reason(recipe_file, tmp_path):
    with pytest.raises(RecipeError, match="variant dora starts from the base's own norms; remove init: pissa"):
        load_recipe(recipe_file, ["adapter.variant=dora", "adapter.init=pissa"])
    with pytest.raises(RecipeError, match=r"adapter\.init: eva needs linear layers, and adapter.targets names experts"):
        tiny_with("mixtral", Adapter(targets=("experts.down_proj",), init="eva"))
    with pytest.raises(RecipeError, match=r"adapter\.rank: 64 is more than the 32 directions of a layer"):
        go_on(recipe_file, tmp_path / "run", "adapter.rank=64", "adapter.init=olora")
    model, _ = tiny_with("llama", Adapter(rank=4, init="eva"))
    with pytest.raises(DataError, match=r"eva needs 8 trained tokens in the first step; raise train\.batch_size"):
        start_from_inputs(model, [({"input_ids": torch.arange(3)[None]}, torch.ones(1, 3, dtype=torch.bool))])
    run = go_on(recipe_file, tmp_path / "other", "train.steps=2")
    with pytest.raises(ContractError, match=r"REFUSED +optim\.name"):
        go_on(recipe_file, run.folder, "train.steps=2", "optim.name=adamw-8bit")
