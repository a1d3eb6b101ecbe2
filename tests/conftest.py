"""Tiny real bases, tokenizers and datasets for the tests; no network."""

import os
import sys
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" not in os.environ:  # else it shares the folder of the process that has started it
    session = tempfile.mkdtemp(prefix="lora-kit-tests-")
    Path(session).chmod(0o755)  # tests let other users read what is in it
    os.environ.update(LORA_KIT_TESTS=session, LORA_KIT_CACHE=f"{session}/cache")
# a run computes with all cores; its idle threads must not spin while other tests compute on the same cores
os.environ.update(OMP_NUM_THREADS="1", MKL_CBWR="AUTO,STRICT")  # MKL reads it once, before a run could set it
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # one core for each worker and all that it starts: tiny models are slower with threads that wait for each other
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process of a test compiles all of lora_kit

import torch

if not torch.cuda.is_available():
    os.environ.update(TRITON_INTERPRET="1")  # before Triton is imported: its kernels run here too, slowly

import gc
import hashlib
import json
import random
import shlex
import shutil
import signal
import string
import subprocess
from contextlib import suppress
from functools import cache, wraps
from importlib import import_module

import jaxtyping
import pytest
import runs
from filelock import FileLock

gc.disable()  # until all tests are collected: collections of garbage would take a third of the time of the imports
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
WORKER = "PYTEST_XDIST_WORKER" in os.environ  # one of several processes of this session

# shapes and dtypes in the annotations are checked at every call while the tests run
CHECKED = [
    "training.objectives.sft",
    "training.objectives.cross_entropy",
    "training.optim",
    "training.processes",
    "model.adapter",
    "model.state",
]
KERNELS = ("attention", "blocks", "cpu.backend", "fusing", "lora", "loss", "mlp", "norm", "plain", "rotary", "segments")
CHECKED += [f"kernels.{name}" for name in KERNELS]


def check_once(jaxtyped):
    """Let `jaxtyped` check only the first call with each combination of shapes and dtypes: a check takes 40 us."""

    def decorator(**options):
        decorate = jaxtyped(**options)

        def wrap(function):
            if isinstance(function, type):
                plain = function.__init__
                checked = decorate(function)
                if checked.__init__ is not plain:  # a dataclass
                    checked.__init__ = once(plain, checked.__init__)
                return checked
            return once(function, decorate(function))

        return wrap

    def once(function, checked):
        seen = set()

        @wraps(function)
        def call(*arguments, **named):
            key = signature(arguments), *((name, signature(value)) for name, value in named.items())
            if key in seen:
                return function(*arguments, **named)
            result = checked(*arguments, **named)
            seen.add(key)
            return result

        return call

    return decorator


def signature(value):
    """Return all that the annotations can tell of a value."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape
    kind = type(value)
    if isinstance(value, (list, tuple)):  # a union takes three times as long
        return kind, *map(signature, value)
    return kind, value if isinstance(value, (int, str)) else None


jaxtyping.jaxtyped = check_once(jaxtyping.jaxtyped)
# not what Triton reads
hook = jaxtyping.install_import_hook([f"lora_kit.{name}" for name in CHECKED], "beartype.beartype")


def pytest_runtest_setup(item):
    """Skip what needs a GPU where there is none."""
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session):
    """Compile a share of the files of tests in each worker: compiling all takes a quarter of a minute.

    Every worker then imports what the others have compiled.
    """
    sys.dont_write_bytecode = False
    if WORKER:
        named = [Path(argument.partition("::")[0]) for argument in session.config.args]
        files = sorted({file for path in named for file in (path.rglob("test_*.py") if path.is_dir() else [path])})
        mine = slice(int(worker.removeprefix("gw")), None, int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
        for file in files[mine]:
            if str(file.parent.absolute()) not in sys.path:
                sys.path.insert(0, str(file.parent.absolute()))
            with suppress(Exception, pytest.skip.Exception):  # the collection tells
                import_module(file.stem)


def pytest_collection_finish():
    """Collect garbage from now on, but never look at what was imported again: that would take a third of a second."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """Let each worker begin with its share of what takes long, so that none is alone with it in the end.

    The scheduler cuts the list into as many parts of one length as there are workers.
    """
    slow, rest = ([one for one in items if bool(one.get_closest_marker("slow")) == kind] for kind in (True, False))
    workers, ordered = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), []
    for worker in range(workers):
        share = slow[worker::workers]
        others = max(0, (len(items) - len(ordered)) // (workers - worker) - len(share))
        ordered += [*share, *rest[:others]]
        del rest[:others]
    items[:] = ordered


@pytest.fixture(autouse=True)
def no_run_is_left():
    """Kill what a test that failed has started and not waited for."""
    yield
    runs.kill_all()


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    """Put back the handlers of signals that `lora-kit train` has set in this process."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def keepers_are_forked():
    """Fork the keeper of a run in this process, which else would import for half a second."""
    from lora_kit.training import publisher

    start = publisher.start_keeper
    publisher.start_keeper = runs.fork_keeper
    yield start
    publisher.start_keeper = start


@pytest.fixture
def fresh_keeper(keepers_are_forked, monkeypatch):
    """Start the keeper of a run in this process as a user's keeper starts."""
    monkeypatch.setattr("lora_kit.training.publisher.start_keeper", keepers_are_forked)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where a test computes; a run of it too."""
    import torch

    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return torch.device(request.param)


@pytest.fixture(params=["compiled", "plain"])
def way(request, monkeypatch):
    """The backend of the fast path: compiled kernels where there are some, and plain PyTorch."""
    if request.param == "plain":
        without_compiled(monkeypatch)
    return request.param


def without_compiled(monkeypatch):
    """Let the fast path compute everything by PyTorch."""
    from lora_kit.kernels import dispatch

    for compiled in ("_c", "_triton"):
        monkeypatch.setattr(dispatch, compiled, lambda: dispatch.PLAIN)


def need_c():
    """Skip what needs the kernels in C where their flags compile nothing or the CPU does not know bf16."""
    if why := without_c():
        pytest.skip(why)


@cache
def without_c():
    """Why there are no kernels in C here, if so; a fault of theirs is no reason."""
    import torch

    from lora_kit.kernels.cpu.build import FLAGS

    if not torch.cpu._is_avx512_bf16_supported():
        return "the CPU does not multiply bf16 by AVX-512"
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(compiler[0]) is None:
        return "there is no C compiler"
    command, nothing = [*compiler, *FLAGS, "-c", "-x", "c", "-", "-o", os.devnull], "#include <immintrin.h>\n"
    able = subprocess.run(command, input=nothing, capture_output=True, text=True, check=False).returncode == 0
    return None if able else f"{compiler[0]} does not know AVX-512 bf16"


def pytest_unconfigure():
    """Leave no folder behind."""
    if not WORKER:
        shutil.rmtree(os.environ["LORA_KIT_TESTS"], ignore_errors=True)


TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '>' + message.content }}"
    "{% if message.role == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def make_tokenizer(folder):
    """Save a character-level tokenizer with role tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<user>", "<assistant>", "<system>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*special, *string.printable])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special[2:5],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def make_base(folder, *, seed=0, **changes):
    """Save a tiny random Llama with its tokenizer and return the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = make_tokenizer(folder)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # logits far from uniform, so that differences show
    }
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocabulary, eos_token_id=1, pad_token_id=0, bos_token_id=None, **sizes | changes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_records(count, *, seed=0):
    """Return conversations of one to three turns with answers of very different lengths."""
    rng = random.Random(seed)

    def words(most):
        return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(rng.randint(1, most)))

    def conversation():
        turns = []
        for _ in range(rng.randint(1, 3)):
            turns += [{"role": "user", "content": words(6)}, {"role": "assistant", "content": words(8)}]
        return {"messages": turns}

    return [conversation() for _ in range(count)]


def labels_of(tokens):
    """The ids of all trained tokens; the first token of an example is never trained."""
    counted = tokens.trained.copy()
    counted[tokens.offsets[:-1]] = False
    return tokens.ids[counted]


def write_jsonl(path, records):
    """Write records a line each and return the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A function that lets one worker of this session fill a folder for all of them; nobody may change what is in it.

    Its arguments are the folder's name and a function that fills it, given its path.
    """
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if WORKER else own) / "shared"
    root.mkdir(exist_ok=True)

    def folder(name, fill):
        path, complete = root / name, root / f"{name}.complete"
        with FileLock(root / f"{name}.lock", timeout=2 * runs.WAIT_SECONDS):
            if not complete.exists():
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
                fill(path)
                complete.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def reference(shared):
    """A function that returns the folder of a run that nothing disturbed, made once for each recipe and its changes."""

    def run(recipe, *changes):
        text = "\n".join([recipe.read_text(), *changes])

        def fill(folder):
            shutil.copy(recipe, folder / "recipe.yaml")
            options = [part for change in changes for part in ("--set", change)]
            runs.train(folder / "recipe.yaml", folder / "run", *options)

        return shared(f"run-{hashlib.sha256(text.encode()).hexdigest()[:16]}", fill) / "run"

    return run


@pytest.fixture
def copied(reference, tmp_path):
    """A function that copies a run that nothing disturbed into this test's folder and returns the copy's path."""
    return lambda recipe, *changes: shutil.copytree(reference(recipe, *changes), tmp_path / "run")


@pytest.fixture(scope="session")
def base_folder(shared):
    """A tiny random Llama."""
    return shared("base", make_base)


@pytest.fixture(scope="session")
def data_file(shared):
    """23 conversations: a prime, so that no batch size divides an epoch."""
    return shared("data", lambda folder: write_jsonl(folder / "train.jsonl", make_records(23))) / "train.jsonl"


RECIPE = """
base: {{repo: {base}, dtype: float32}}
data: {{train: {data}, sequence_length: 256}}
adapter: {{rank: 4, alpha: 8, dropout: 0.1}}
optim: {{learning_rate: 1e-2}}
train: {{steps: 8, batch_size: 5, micro_batch_tokens: 256}}
checkpoint: {{every_steps: 3}}
"""


@pytest.fixture
def recipe_file(tmp_path, base_folder, data_file):
    """A recipe over the tiny base whose steps hold several micro-batches."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(base=base_folder, data=data_file))
    return path


@pytest.fixture(scope="module")
def recipe(request, tmp_path_factory, base_folder, data_file):
    """A recipe with as many steps as the module's STEPS says."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    steps = f"steps: {request.module.STEPS}"
    path.write_text(RECIPE.format(base=base_folder, data=data_file).replace("steps: 8", steps))
    return path


@pytest.fixture(scope="module")
def undisturbed(request, recipe, reference):
    """The hash of the state with which a run that nothing disturbed ends."""
    return runs.state_hash(reference(recipe), request.module.STEPS)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, base_folder, data_file, reference):
    """A finished run of four steps whose adapter answers other than its base."""
    recipe = tmp_path_factory.mktemp("trained") / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=base_folder, data=data_file))
    return reference(recipe, "train.steps=4", "optim.learning_rate=0.05", "checkpoint.every_steps=2")


class Faults:
    """The faults of a run's processes, which faults/inject applies, each once.

    Args:
        folder: Where is noted which faults have happened.
    """

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def __call__(self, *plan, sleep=0.0):
        """Return the environment of a run in which a plan happens and every step takes `sleep` seconds longer."""
        plan, done = json.dumps(plan), str(self.folder)
        return {"FAULTS": plan, "FAULTS_SLEEP": str(sleep), "FAULTS_DONE": done, "PYTHONPATH": runs.with_faults()}

    def happened(self):
        """Return how many faults have happened."""
        return len(list(self.folder.glob("*.[0-9]*")))

    def release(self, number=0):
        """Let the process that holds because of the fault of this number go on."""
        (self.folder / f"{number}.released").touch()


def hold(step, **more):
    """Return the fault that lets process 0 wait in a step, so that what a test does by then is never too late."""
    return {"step": step, "phase": "forward", "kind": "hold"} | more


@pytest.fixture
def faults(tmp_path):
    """The faults of this test's runs."""
    return Faults(tmp_path / "faults")


@pytest.fixture(scope="session")
def shared_data():
    """Real models and datasets beside the checkout; tests that need them skip without."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder of real data beside this checkout")
    return folder


@pytest.fixture
def captured(monkeypatch):
    """The flat gradient and weights that reach the optimizer in each step, before its update."""
    from lora_kit.training import loop

    seen = []
    update = loop.optim.adamw

    def spy(weights, gradient, *rest, **named):
        seen.append((weights.clone(), gradient.clone()))
        update(weights, gradient, *rest, **named)

    monkeypatch.setattr(loop.optim, "adamw", spy)
    return seen


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that the trainer prepares."""
    from lora_kit.training import loop

    seen = []
    make_job = loop.make_job
    monkeypatch.setattr(loop, "make_job", lambda *a, **k: seen.append(make_job(*a, **k)) or seen[-1])
    return seen
