"""The estimate is what a run takes: its bytes are those of real tensors and files, its seconds and its cost follow from
the rates by a calculation by hand, and a run says once how far it was from what was measured."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from test_micro_batches import GB, Live, large, shape_of
from typer.testing import CliRunner

import lora_kit as lk
from lora_kit.check import check, estimate
from lora_kit.cli import app
from lora_kit.data import cache
from lora_kit.data.packing import IGNORE, collate
from lora_kit.kernels.fp8 import BlockFp8Linear
from lora_kit.model.sizes import DEQUANTISED, estimate_memory
from lora_kit.recipe.load import load_recipe
from lora_kit.runs.live import region_bytes
from lora_kit.runs.serving import serving
from lora_kit.training import comparison, loop, speed
from lora_kit.training import estimate as estimating
from lora_kit.training.estimate import Contents, contents_of, duration_of
from lora_kit.training.micro_batches import MEMORY_SHARE, Machine, choose
from lora_kit.training.speed import Attention, BothWays, MicroBatchWork, Rates, Speed, work_of

STATES = {
    "adamw": [],
    "adamw-8bit": ["optim.name=adamw-8bit", "adapter.rank=16"],
    "pissa": ["adapter.init=pissa"],
    "dora": ["adapter.variant=dora", "adapter.dropout=0"],
    "ranks": ["adapter.rank_pattern={down_proj: 2}"],
}
UNITS = (
    "_bytes",
    "_tokens",
    "_parameters",
    "_gigabytes",
    "_hours",
    "_seconds",
    "_per_second",
    "_per_step",
    "_per_hour",
)
COUNTS = {"processes", "steps", "checkpoints", "vocabulary", "context", "cost", "activation_checkpointing"}


@pytest.mark.parametrize("changes", STATES.values(), ids=STATES)
def test_the_state_and_its_files_take_the_bytes_of_the_real_ones(changes, recipe_file, tmp_path, jobs):
    recipe = load_recipe(recipe_file, ["train.steps=3", "checkpoint.every_steps=1", "checkpoint.keep=2", *changes])
    run = loop.train(recipe, tmp_path / "run")
    (job,) = jobs
    state, found = job.state, estimate(recipe)
    constants = 0 if state.constants is None else state.constants.nbytes
    assert found.memory.adapter_bytes == state.weights.nbytes + constants
    moments = sum(moment.nbytes for moment in state.moments)
    assert found.memory.moment_bytes == moments
    assert found.memory.trainable_parameters == state.size
    copies = found.memory.gradient_bytes / state.gradient.nbytes  # the gradient, and partial sums of five examples
    assert copies == 1 + 3
    assert found.memory.live_bytes == region_bytes(sum(buffer.nbytes for buffer in state.kept))
    written = sum(path.stat().st_size for folder in run.checkpoints for path in folder.iterdir())
    assert len(run.checkpoints) == 2 and found.disk.checkpoints == 3  # one more while it is written
    assert 1.5 * written <= found.disk.run_bytes <= 3 * written


def test_work_is_what_the_micro_batches_of_a_step_contain(recipe_file, tmp_path, jobs):
    loop.train(load_recipe(recipe_file, ["train.steps=2"]), tmp_path / "run")
    (job,) = jobs
    for step in range(2):
        found = work_of(job.plan, step)
        batches = [collate(job.inputs.data.train, group, padded=False) for group in job.plan.micro_batches(step)]
        assert [one.tokens for one in found] == [batch.ids.size for batch in batches]
        assert [one.trained for one in found] == [int((batch.labels != IGNORE).sum()) for batch in batches]
        assert [one.pairs for one in found] == [sum(length**2 for length in batch.segments) for batch in batches]
    contents = contents_of(job.plan, job.inputs.data)
    saved = tmp_path / "cached"
    with saved.open("w+b") as file:
        cache.save(file, job.inputs.data)
    assert contents.cache_bytes <= saved.stat().st_size <= contents.cache_bytes + 20_000
    assert contents.largest == max(batch.tokens for step in (0, 1) for batch in work_of(job.plan, step))


RATES = Rates(
    mixing=BothWays(1.0, 10.0),
    mlp=BothWays(100.0, 1000.0),
    head=6.0,
    attention=Attention(BothWays(0.5, 0.25), BothWays(0.01, 0.02)),
    weights=BothWays(3.0, 7.0),
    optimizer=0.0,
    flops_per_second=1e12,
)
WORK = [MicroBatchWork(tokens=10, trained=4, pairs=50), MicroBatchWork(tokens=2, trained=1, pairs=4)]


@pytest.fixture
def speed_of(monkeypatch):
    """A function that returns the speed of a recipe for a Llama of 16 layers, with rates that are easy to add up."""
    monkeypatch.setattr(speed, "LAYER_SECONDS", {"cpu": 0.0, "cuda": 0.0})
    monkeypatch.setattr(speed, "WEIGHT_SECONDS", {"cpu": 0.0, "cuda": 0.0})
    monkeypatch.setattr(speed, "STEP_SECONDS", 0.0)
    monkeypatch.setattr(speed, "SNAPSHOT_BYTES_PER_SECOND", float("inf"))
    shape = shape_of("Llama-3.2-1B")

    def make(*changes, recompute=False, **settings):
        recipe = large("sft-bf16-1b", *changes)
        sizes = estimate_memory(shape, recipe, tokens=2048, recompute=recompute)
        return Speed(shape, recipe, sizes, RATES, "cpu", **settings)

    return make


def test_the_seconds_of_a_step_are_the_sum_of_its_parts(speed_of):
    def forward(tokens, trained, pairs):
        return 16 * tokens * 1.5 + (15 * tokens + trained) * 100 + 16 * pairs * 0.01 + trained * 3 + 16 * 3

    def backward(tokens, trained, pairs):
        return 16 * tokens * 10.25 + (15 * tokens + trained) * 1000 + 16 * pairs * 0.02 + trained * 3 + 16 * 7

    each = [forward(*parts) + backward(*parts) for parts in ((10, 4, 50), (2, 1, 4))]
    assert speed_of().step(WORK) == pytest.approx(sum(each))
    again = sum(forward(*parts) - parts[1] * 3 for parts in ((10, 4, 50), (2, 1, 4)))
    assert speed_of(recompute=True).step(WORK) == pytest.approx(sum(each) + again)
    two = speed_of(processes=2)
    assert two.step(WORK) == pytest.approx(max(each) + two.communication(WORK))
    kto = speed_of("objective.kind=kto").step(WORK)
    assert kto == pytest.approx(sum(each) + sum(forward(*parts) for parts in ((10, 4, 50), (2, 1, 4))))
    upper = speed_of("adapter.layers=[8-15]")  # the gradient does not go below the first layer with an adapter
    reached = [
        8 * t * 10.25 + (7 * t + n) * 1000 + 8 * p * 0.02 + n * 3 + 8 * 7 for t, n, p in ((10, 4, 50), (2, 1, 4))
    ]
    assert upper.first_layer == 8
    assert upper.step(WORK) == pytest.approx(sum(reached) + forward(10, 4, 50) + forward(2, 1, 4))


def test_processes_send_the_gradient_twice_and_gather_a_sharded_base_twice_for_each_micro_batch(speed_of):
    assert speed_of().communication_bytes(WORK) == 0
    four = speed_of(processes=4)
    assert four.communication_bytes(WORK) == 2 * 4 * four.sizes.trainable_parameters * 3 // 4
    sharded = speed_of(processes=2, sharded=True)
    gradient = 4 * sharded.sizes.trainable_parameters
    assert sharded.communication_bytes([*WORK, *WORK]) == gradient + 2 * 2 * sharded.sizes.base_bytes
    linear = sum(layer.inputs * layer.outputs for layer in four.shape.linears)
    assert four.flops(WORK) == 4 * 12 * 16 * linear + 4 * 5 * 128256 * 2048


def test_hours_and_cost_are_those_of_all_steps_evaluations_and_the_reference(speed_of):
    whole, held_out = MicroBatchWork(1200, 480, 5000), MicroBatchWork(120, 48, 500)
    contents = Contents(30, ((WORK[0],), (WORK[0],)), whole, held_out, longest=10, examples=9, cache_bytes=1000)
    made = speed_of("evaluate.every_steps=10", "data.validation=0.1")
    step, forward = made.step([WORK[0]]), made.forward(WORK[0])
    found = duration_of(made, contents, price_per_hour=3.0)
    evaluations = (2 + 3) * 12 * forward
    assert found.evaluation_seconds == pytest.approx(evaluations, rel=0.01) and found.reference_seconds == 0
    assert found.total_hours == pytest.approx((30 * step + evaluations) / 3600, rel=0.01)
    assert found.cost == pytest.approx(3 * found.total_hours) and found.tokens_per_second == pytest.approx(10 / step)
    dpo = speed_of("objective.kind=dpo")
    assert duration_of(dpo, contents).reference_seconds == pytest.approx((120 + 12) * dpo.forward(WORK[0]), rel=0.01)
    assert duration_of(dpo, contents).cost is None
    disk = estimating.disk_of(dpo.recipe, dpo.sizes, contents)
    assert disk.cache_bytes == 1000 + 4 * 2 * 9


@pytest.mark.quick
@pytest.mark.parametrize("name", ["sft-bf16-8b", "sft-nf4-8b", "sft-bf16-1b"])
def test_a_recipe_fits_where_auto_finds_a_micro_batch_and_elsewhere_with_the_named_change(name):
    shape = shape_of("Llama-3.2-1B" if "1b" in name else "Llama-3.1-8B")
    open_ = ["train.micro_batch_tokens=auto", "train.activation_checkpointing=auto"]

    def needed(changes, gigabytes):
        recipe = large(name, *open_, *changes)
        found = choose(recipe, shape, Machine("cuda", gigabytes * GB))
        tokens, recompute = found.micro_batch_tokens, found.activation_checkpointing
        sizes = estimate_memory(shape, recipe, tokens=tokens, recompute=recompute, device="cuda")
        return sizes.device_bytes, found

    for gigabytes in (4, 8, 16, 24, 48, 80, 141):
        (fits,), limit = estimating.fits(shape, large(name), [gigabytes]), MEMORY_SHARE["cuda"] * gigabytes * GB
        size, found = needed([], gigabytes)
        assert (fits.micro_batch_tokens is not None) == (size <= limit)
        if fits.micro_batch_tokens is not None:
            assert (fits.micro_batch_tokens, fits.activation_checkpointing) == tuple(asdict(found).values())
        elif fits.change:
            changes = [change.replace(": ", "=") for change in fits.change.split(" and ")]
            assert needed(changes, gigabytes)[0] <= limit and str(fits) == f"no; {fits.change}"
        else:
            assert str(fits) == "no; choose a smaller base"
            smallest = ["base.quantization=nf4", "data.sequence_length=256"]
            assert needed(smallest, gigabytes)[0] > limit


def test_a_sharded_base_is_a_share_on_each_device_with_the_layers_that_are_gathered():
    shape, recipe = shape_of("Llama-3.1-70B"), large("sft-bf16-8b")
    whole, sharded = (estimate_memory(shape, recipe, tokens=2048, recompute=True, shards=count) for count in (1, 8))
    assert sharded.base_bytes == -(-whole.base_bytes // 8) and whole.gathered_bytes == 0
    layer = 2 * sum(linear.inputs * linear.outputs for linear in shape.linears)
    assert 3 * layer <= sharded.gathered_bytes <= 1.05 * max(3 * layer, 4 * shape.vocabulary * shape.width)
    assert "gathered layers" in sharded.lines()[2] and "gathered layers" not in whole.lines()[2]
    assert sharded.device_bytes < whole.device_bytes


def test_the_categories_add_up_to_the_memory_of_the_device():
    for name in ("bf16", "nf4", "int8"):
        sizes = estimate_memory(shape_of("Llama-3.1-8B"), large(f"sft-{name}-8b"), tokens=2048, recompute=True)
        parts = sizes.categories
        layer = parts.pop("layer in backward") + parts.pop("dequantised weights", 0)
        passes = sum(parts.values()) - parts["logits and loss"] + max(parts["logits and loss"], layer)
        assert passes == sizes.device_bytes + sizes.runtime_bytes
        assert ("dequantised" in sizes.lines()[3]) is (name != "bf16")


def test_dequantising_takes_the_bytes_that_are_estimated_for_a_weight():
    codes = torch.zeros(256, 512, dtype=torch.float8_e4m3fn)
    layer = BlockFp8Linear(512, 256, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(codes, requires_grad=False)
    layer.weight_scale_inv, layer.block_size = torch.ones(2, 4), (128, 128)
    with Live(set()) as live:
        dense = layer.dequantized(torch.bfloat16)
    each = live.most / dense.numel()
    assert 0.8 * each <= DEQUANTISED["fp8"] + 2 <= 1.2 * each
    weight, scales = torch.zeros(256, 512, dtype=torch.int8), torch.ones(256)
    with Live(set()) as live:
        dense = (weight * (scales[:, None] / 127)).to(torch.bfloat16)
    each = live.most / dense.numel()
    assert 0.9 * each <= DEQUANTISED["int8"] + 2 <= 1.1 * each


def test_json_of_a_check_has_everything_with_its_unit(recipe_file):
    result = CliRunner().invoke(app, ["check", str(recipe_file), "--json", "--price-per-hour", "2"])
    report = json.loads(result.stdout)
    found = report["estimate"]
    assert found["duration"]["cost"] == pytest.approx(2 * found["duration"]["total_hours"])
    assert found["duration"]["seconds_per_step"] > 0 and found["duration"]["matmul_flops_per_second"] > 1e6
    assert [gpu["gpu_gigabytes"] for gpu in found["gpus"]] == [16, 24, 48, 80, 141]
    parts = [found, found["memory"], found["disk"], found["duration"], *found["gpus"]]
    named = {key for part in parts for key, value in part.items() if isinstance(value, int | float)}
    assert not [name for name in named if not name.endswith(UNITS) and name not in COUNTS]
    assert report["serving"] == serving(load_recipe(recipe_file).adapter)


def test_the_time_is_measured_only_on_request_and_shown_with_the_cost(recipe_file):
    assert check(load_recipe(recipe_file)).estimate.duration is None
    shown = repr(check(load_recipe(recipe_file), price_per_hour=1.5, processes=2))
    assert "s a step (" in shown and "at 1.5 per hour: " in shown and "sent by each process" in shown
    assert "fits on a GPU with 16 GB: 16,384 tokens" in shown and "live region in /dev/shm" in shown
    assert str(estimate(load_recipe(recipe_file), time=True)).count("\n") == 8


def test_a_run_compares_the_estimate_with_the_measurement_once(recipe_file, tmp_path, capsys, monkeypatch):
    out, changes = tmp_path / "run", ["checkpoint.every_steps=7", "checkpoint.keep=9"]
    loop.train(load_recipe(recipe_file, [*changes, "train.steps=22"]), out)
    loop.train(load_recipe(recipe_file, [*changes, "train.steps=24"]), out, accept=["train.steps"])
    (event,) = [event for event in lk.Run(out).events if event["kind"] == "estimate"]
    assert event["step"] == 20
    assert event["seconds_per_step_estimated"] > 0
    assert event["memory_measured_bytes"] > 10 * 2**20 and event["memory_estimated_bytes"] > 10 * 2**20
    measured = [line["tokens"] / line["tokens_per_second"] for line in lk.Run(out).metrics[2:19]]
    assert event["seconds_per_step_measured"] == pytest.approx(np.mean(measured), rel=1e-6)
    assert capsys.readouterr().out.count("after 20 steps: memory: estimated") == 1
    back, recipe = out / "checkpoints" / "step-00000014", load_recipe(recipe_file, [*changes, "train.steps=24"])
    monkeypatch.setattr(comparison, "host_memory", lambda: event["memory_measured_bytes"])  # no room for measurements
    loop.train(recipe, out, start_from=back, accept=["train.steps"])
    (again,) = [event for event in lk.Run(out).events if event["kind"] == "estimate"]
    assert again["memory_measured_bytes"] > 0 and again["seconds_per_step_estimated"] is None


@pytest.mark.quick
def test_what_serves_an_adapter_is_said_before_and_after_the_run(recipe_file, tmp_path, capsys):
    recipe = load_recipe(recipe_file, ["train.steps=1"])
    loop.train(recipe, tmp_path / "run")
    printed = "".join(capsys.readouterr().out.replace("│", " ").split())
    assert "".join(serving(recipe.adapter, str(tmp_path / "run")).split()) in printed
    assert f"serve: {serving(recipe.adapter)}" in repr(check(recipe))
    adapter = recipe.adapter
    assert f"vLLM (--max-lora-rank {adapter.rank} or more), SGLang and TGI as it is" in serving(adapter)
    pissa = adapter.model_copy(update={"init": "pissa"})
    assert f"--max-lora-rank {2 * adapter.rank} " in serving(pissa)
    dora = adapter.model_copy(update={"variant": "dora"})
    assert serving(dora) == "peft and transformers; other engines after lora-kit merge RUN --out MERGED"
    experts = adapter.model_copy(update={"targets": ("q_proj", "experts.down_proj")})
    assert "vLLM after lora-kit export RUN --to vllm" in serving(experts) and "--max-lora-rank" not in serving(experts)
