"""A bit flipped, a file cut off or deleted in the newest checkpoint, any file: is it seen, and does the run go on?"""

import contextlib
import hashlib
import io
import random
import shutil
from pathlib import Path

from ground import finish, make_base, make_data, make_recipe, ours, peer, state_hash

STEPS, STOPPED_AT = 16, 8


def measure(folder: Path, *, trials: int = 200, peer_trials: int = 20, seed: int = 0) -> dict:
    """Return how many damaged checkpoints were noticed and survived by falling back to the one before."""
    base, data, rng = make_base(folder, "tiny"), make_data(folder, 200), random.Random(seed)
    recipe = make_recipe(folder, "damage", "tiny", data, steps=STEPS, every=4)
    assert finish(ours(recipe, folder / "damage-undisturbed")) == 0
    expected, half = state_hash(folder / "damage-undisturbed", STEPS), folder / "damage-half"
    shutil.copytree(folder / "damage-undisturbed", half)
    (half / "result.json").unlink()
    for path in (half / "checkpoints").glob("step-*"):  # as if it had been killed after step 16: 12 and 16 are there
        assert int(path.name[5:]) in (STEPS - 4, STEPS)
    own = _ours(folder, recipe, half, expected, trials, rng)
    return {"ours": own, "trainer": _peer(folder, base, data, peer_trials, rng)}


def _ours(folder: Path, recipe: Path, half: Path, expected: str, trials: int, rng: random.Random) -> dict:
    from lora_kit.recipe.load import load_recipe
    from lora_kit.training.loop import train

    files = sorted(path.name for path in (half / "checkpoints" / f"step-{STEPS:08d}").iterdir())
    noticed = survived = 0
    for trial in range(trials):
        out, kind = folder / "damage-run", ("flip", "truncate", "delete")[trial % 3]
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(half, out)
        target = out / "checkpoints" / f"step-{STEPS:08d}" / files[trial % len(files)]
        _damage(target, kind, rng)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(load_recipe(recipe), out)
        reasons = (out / "checkpoints" / ".quarantine").glob("*.reason.txt")
        noticed += any(target.name in path.read_text() for path in reasons)
        survived += state_hash(out, STEPS) == expected
    return {"trials": trials, "files": files, "noticed_by_name": noticed, "final_bytes_equal": survived}


def _damage(path: Path, kind: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
        return
    place = rng.randrange(len(content))
    if kind == "flip":
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content if kind == "flip" else content[:place])


def _peer(folder: Path, base: Path, data: Path, trials: int, rng: random.Random) -> dict:
    """Flip a bit in the tensors of the newest checkpoint, resume, and look whether anybody notices."""
    whole = folder / "damage-peer-whole"
    assert finish(peer(base, data, whole, "--steps", STEPS, "--save-steps", STOPPED_AT)) == 0
    expected, found = _final(whole), {}
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        silent = refused = 0
        for trial in range(trials):
            out = folder / f"damage-peer-{trial}"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(whole, out, ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}", "final"))
            target = out / f"checkpoint-{STOPPED_AT}" / name
            content = bytearray(target.read_bytes())
            content[rng.randrange(len(content) // 4, len(content) * 3 // 4)] ^= 1 << rng.randrange(8)
            target.write_bytes(content)
            code = finish(peer(base, data, out, "--steps", STEPS, "--save-steps", STOPPED_AT))
            refused += code != 0
            silent += code == 0 and _final(out) != expected
        found[name] = {"flips": trials, "resumed_in_silence_with_another_model": silent, "refused": refused}
    return found


def _final(out: Path) -> str:
    return hashlib.sha256((out / "final" / "adapter_model.safetensors").read_bytes()).hexdigest()
