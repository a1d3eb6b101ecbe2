"""What the scripts write at their end, so that two runs can be compared to the last bit."""

import hashlib
import json
from pathlib import Path

TIMES = ("runtime", "per_second")  # in the names of logged figures that measure time


def write_outcome(trainer, out):
    """Write the digests of weights, optimizer and random generators, and all that was logged but times."""
    import random

    import numpy as np
    import torch

    weights, moments = hashlib.sha256(), hashlib.sha256()
    for name, parameter in trainer.model.named_parameters():
        weights.update(name.encode() + parameter.detach().numpy().tobytes())
    for state in trainer.optimizer.state.values():
        for name in sorted(state):
            moments.update(name.encode() + torch.as_tensor(state[name]).numpy().tobytes())
    generators = repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))
    history = [
        {key: value for key, value in entry.items() if not any(word in key for word in TIMES)}
        for entry in trainer.state.log_history
    ]
    outcome = {
        "step": trainer.state.global_step,
        "weights": weights.hexdigest(),
        "optimizer": moments.hexdigest(),
        "random": hashlib.sha256(generators.encode()).hexdigest(),
        "logged": history,
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "outcome.json").write_text(json.dumps(outcome, indent=1))
