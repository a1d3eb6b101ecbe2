"""Print README's table of which base fits on which GPU, from the estimate of `lora-kit check`.

python benchmarks/memory_table.py
"""

from pathlib import Path

from lora_kit.model.sizes import estimate_memory, read_config
from lora_kit.recipe.schema import Recipe
from lora_kit.training.estimate import GPU_GB, Fit, fits

SHAPES = Path(__file__).parents[1] / "tests" / "shapes"
BASES = {
    "Llama 3.2 1B": ("meta-llama--Llama-3.2-1B-Instruct", ["none"]),
    "Llama 3.2 3B": ("meta-llama--Llama-3.2-3B-Instruct", ["none"]),
    "Llama 3.1 8B": ("meta-llama--Llama-3.1-8B-Instruct", ["none", "int8", "nf4"]),
    "Llama 3.1 70B": ("meta-llama--Llama-3.1-70B-Instruct", ["none", "int8", "nf4"]),
}


def table() -> str:
    """Return a Markdown table: for each base and quantisation, what `auto` chooses on each GPU."""
    heads = ["base", "`base.quantization`", "weights", *(f"{size} GB" for size in GPU_GB)]
    rows = [heads, ["---"] * len(heads)]
    for name, (file, quantizations) in BASES.items():
        shape = read_config(SHAPES / f"{file}.json")
        for quantization in quantizations:
            recipe = recipe_with(quantization)
            sizes = estimate_memory(shape, recipe, tokens=2048, recompute=True, device="cuda")
            cells = [cell(found) for found in fits(shape, recipe)]
            label = "none (bf16)" if quantization == "none" else quantization
            rows.append([name, label, f"{sizes.base_bytes / 1e9:.1f} GB", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def recipe_with(quantization: str) -> Recipe:
    """Return a recipe with rank 16 and examples of at most 2,048 tokens."""
    base = {"repo": "a/base", "quantization": quantization}
    return Recipe.model_validate({"base": base, "data": {"train": "data"}, "train": {"epochs": 1}})


def cell(found: Fit) -> str:
    """Return the micro-batch that `auto` chooses on a GPU, with * if activations are recomputed; - if none fits."""
    if found.micro_batch_tokens is None:
        return "-"
    return f"{found.micro_batch_tokens:,}{'*' * bool(found.activation_checkpointing)}"


if __name__ == "__main__":
    print(table())
