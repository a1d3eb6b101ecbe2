"""The fast path: what transformers would compute, without the work that packed examples do not need."""
