"""Print README's table of which base fits on which GPU, from the estimate of `lora-kit check`.

python benchmarks/memory_table.py
"""

from pathlib import Path

from lora_kit.model.sizes import Estimate, Shape, estimate_memory, read_config
from lora_kit.recipe.schema import Recipe
from lora_kit.training.micro_batches import MEMORY_SHARE, Machine, choose

SHAPES = Path(__file__).parents[1] / "tests" / "shapes"
BASES = {
    "Llama 3.2 1B": ("meta-llama--Llama-3.2-1B-Instruct", ["none"]),
    "Llama 3.2 3B": ("meta-llama--Llama-3.2-3B-Instruct", ["none"]),
    "Llama 3.1 8B": ("meta-llama--Llama-3.1-8B-Instruct", ["none", "int8", "nf4"]),
    "Llama 3.1 70B": ("meta-llama--Llama-3.1-70B-Instruct", ["none", "int8", "nf4"]),
}
GPU_GB = (24, 48, 80, 141)


def table() -> str:
    """Return a Markdown table: for each base and quantisation, what `auto` chooses on each GPU."""
    heads = ["base", "`base.quantization`", "weights", *(f"{size} GB" for size in GPU_GB)]
    rows = [heads, ["---"] * len(heads)]
    for name, (file, quantizations) in BASES.items():
        shape = read_config(SHAPES / f"{file}.json")
        for quantization in quantizations:
            recipe = recipe_with(quantization)
            weights = estimate(shape, recipe, tokens=2048, recompute=True).base_bytes
            cells = [cell(shape, recipe, size) for size in GPU_GB]
            label = "none (bf16)" if quantization == "none" else quantization
            rows.append([name, label, f"{weights / 1e9:.1f} GB", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def recipe_with(quantization: str) -> Recipe:
    """Return a recipe with rank 16 and examples of at most 2,048 tokens."""
    base = {"repo": "a/base", "quantization": quantization}
    return Recipe.model_validate({"base": base, "data": {"train": "data"}, "train": {"epochs": 1}})


def cell(shape: Shape, recipe: Recipe, gigabytes: int) -> str:
    """Return the micro-batch that `auto` chooses on a GPU, with * if activations are recomputed; - if none fits."""
    memory = gigabytes * 10**9
    chosen = choose(recipe, shape, Machine("cuda", memory))
    tokens, recompute = chosen.micro_batch_tokens, chosen.activation_checkpointing
    if estimate(shape, recipe, tokens=tokens, recompute=recompute).device_bytes > MEMORY_SHARE["cuda"] * memory:
        return "-"
    return f"{tokens:,}" + "*" * recompute


def estimate(shape: Shape, recipe: Recipe, *, tokens: int, recompute: bool) -> Estimate:
    """Return the estimate for a GPU."""
    return estimate_memory(shape, recipe, tokens=tokens, recompute=recompute, device="cuda")


if __name__ == "__main__":
    print(table())
