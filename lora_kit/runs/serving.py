"""Which programs read the adapter of a run as it is, and what to do for the others."""

from lora_kit.recipe.schema import Adapter
from lora_kit.runs.layout import WITH_CONSTANTS

MERGE = "lora-kit merge {run} --out MERGED"
EXPORT = "lora-kit export {run} --to vllm --out SERVED"


def serving(adapter: Adapter, run: str = "RUN") -> str:
    """Return which programs read the adapter.

    Args:
        adapter: The recipe's section.
        run: The run's folder, as it is typed in a shell.

    Source: `vllm/lora/peft_helper.py` refuses `use_dora`; docs.vllm.ai, docs.sglang.io, the documentation of TGI and
    llama.cpp's `convert_lora_to_gguf.py`. None of these programs was run.
    """
    merged = f"other engines after {MERGE.format(run=run)}"
    if adapter.variant == "dora":
        return f"peft and transformers; {merged}"
    if adapts_experts(adapter):
        return f"peft and transformers; vLLM after {EXPORT.format(run=run)}; {merged}"
    rank = max([adapter.rank, *adapter.rank_pattern.values()]) * (2 if adapter.init in WITH_CONSTANTS else 1)
    as_it_is = f"peft, vLLM (--max-lora-rank {rank} or more), SGLang and TGI as it is"
    return f"{as_it_is}; llama.cpp after its convert_lora_to_gguf.py; {merged}"


def adapts_experts(adapter: Adapter) -> bool:
    """Return whether the recipe names parameters of experts."""
    return not isinstance(adapter.targets, str) and any("experts" in name for name in adapter.targets)
