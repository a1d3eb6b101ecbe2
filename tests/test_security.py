"""What a stranger's files can do, and what other users of the machine can do; docs/security.md names these tests."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import RECIPE, TEMPLATE, make_base
from runs import start, train, wait_for_lines, wait_until
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

import lora_kit as lk
from lora_kit.cli import app
from lora_kit.data import cache, sandbox
from lora_kit.data.answers import render
from lora_kit.data.messages import Conversation
from lora_kit.data.plan import prepare_data
from lora_kit.data.rendering import Renderer
from lora_kit.data.sandbox import render_all
from lora_kit.errors import BaseError, CheckpointError, ContractError, DataError
from lora_kit.files import sha256_of
from lora_kit.model.source import file_hash, locate
from lora_kit.model.tokenizer import load_renderer
from lora_kit.runs.manifest import manifest_bytes
from lora_kit.supervise import launch

HOSTILE = {
    "loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "computes for more than",
    ),
    "memory": ("{% set x = 'x' * 9999999999 %}{{ x }}", "needs more than 1 GB of memory"),
    "doubling": (
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "needs more than 1 GB of memory",
    ),
    "output": ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "writes more than 67,108,864 characters"),
}
ESCAPES = (
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.getpid() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ ('{0.__class__.__mro__}').format(messages) }}",
    "{{ messages.sort.__self__.__class__ }}",
)
CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"

    def __init__(self, *arguments, **named):
        Path({mark!r}).touch()
        super().__init__(*arguments, **named)
"""
MODEL = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


class WithCode:
    """A run on a base that brings Python files of its own, which create the file `mark` when they run."""

    def __init__(self, folder, data):
        self.mark, base = folder / "the code ran", make_base(folder / "base")
        (base / "configuration_own.py").write_text(CONFIGURATION.format(mark=str(self.mark)))
        (base / "modeling_own.py").write_text(MODEL)
        classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
        edit(base / "config.json", model_type="own", auto_map=classes)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(RECIPE.format(base=base, data=data))
        changes = ["train.steps=1", "data.validation=0.2", "base.trust_remote_code=true"]
        self.run = lk.train(lk.load_recipe(self.recipe, changes), folder / "run")
        assert self.ran()

    def ran(self):
        """Return whether the code ran since the last call."""
        ran = self.mark.exists()
        self.mark.unlink(missing_ok=True)
        return ran


@pytest.fixture(scope="module")
def with_code(tmp_path_factory, data_file):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("code")
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
        yield WithCode(folder, data_file)


def edit(path, **changes):
    """Change keys of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def forge(checkpoint, **changes):
    """Seal a checkpoint again after its files were changed, with other keys in its manifest, as anyone can."""
    manifest = json.loads((checkpoint / "manifest.json").read_text()) | changes
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if (checkpoint / name).exists()}
    for name, entry in manifest["files"].items():
        entry |= {"size": (checkpoint / name).stat().st_size, "sha256": sha256_of(checkpoint / name)}
    (checkpoint / "manifest.json").write_bytes(manifest_bytes(manifest))


@pytest.fixture
def stranger(trained_run, tmp_path):
    """A copy of a checkpoint, to be changed as a stranger would."""
    return shutil.copytree(trained_run / "checkpoints" / "step-00000004", tmp_path / "stranger")


def run_command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input="hello\n")


DOORS = {
    "generate": ["hello", "--max-new-tokens", "2"],
    "chat": ["--max-new-tokens", "2"],
    "merge": ["--out", "merged"],
    "push": ["--to", "me/first"],
}


@pytest.mark.parametrize("door", DOORS)
def test_a_checkpoint_cannot_allow_the_code_of_its_base(door, with_code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    refused = run_command(door, with_code.run.latest, *DOORS[door])
    assert refused.exit_code == 2 and not with_code.ran()
    assert "which runs Python files from the base" in refused.stderr and "--trust-remote-code" in refused.stderr
    allowed = run_command(door, with_code.run.latest, *DOORS[door], "--trust-remote-code")
    assert allowed.exit_code == (1 if door == "push" else 0), allowed.output  # there is no token to push with
    assert with_code.ran() or door == "push"  # the tokenizer of this base has no code


def test_eval_runs_the_code_of_a_base_only_if_the_callers_recipe_says_so(with_code):
    arguments = ["eval", with_code.recipe, with_code.run.latest, "--set", "data.validation=0.2"]
    refused = run_command(*arguments)
    assert refused.exit_code == 2 and "--trust-remote-code" in refused.stderr and not with_code.ran()
    assert run_command(*arguments, "--set", "base.trust_remote_code=true").exit_code == 0 and with_code.ran()


def test_a_run_that_begins_with_a_strangers_adapter_runs_no_code_of_its_base(with_code, recipe_file, tmp_path):
    with pytest.raises(ContractError, match="trained on a base with other files"):
        lk.train(lk.load_recipe(recipe_file), tmp_path / "run", start_from=with_code.run.latest)
    assert not with_code.ran()


def test_a_resume_runs_the_code_of_a_base_only_if_its_recipe_says_so(with_code):
    with pytest.raises(ContractError, match="trust_remote_code: True -> False"):
        lk.train(lk.load_recipe(with_code.recipe, ["train.steps=1", "data.validation=0.2"]), with_code.run.folder)
    assert not with_code.ran()


def test_a_base_with_code_is_refused_whatever_the_checkpoint_says(with_code, tmp_path):
    checkpoint = shutil.copytree(with_code.run.latest, tmp_path / "checkpoint")
    recipe = json.loads((checkpoint / "manifest.json").read_text())["recipe"]
    recipe["base"]["trust_remote_code"] = False
    forge(checkpoint, recipe=recipe)
    with pytest.raises(BaseError, match="differs from the base"):
        lk.load(checkpoint)
    assert not with_code.ran()


def test_a_base_cannot_choose_an_attention_kernel_to_download(tmp_path, recipe_file, monkeypatch):
    base = make_base(tmp_path / "base")
    edit(base / "config.json", attn_implementation="someone/kernel", _attn_implementation="someone/kernel")
    run = lk.train(lk.load_recipe(recipe_file, [f"base.repo={base}", "train.steps=1"]), tmp_path / "run")
    model, _ = lk.load(run.latest)
    assert model.config._attn_implementation == "sdpa"


def test_a_pickled_adapter_is_never_read(stranger, monkeypatch):
    """Neither beside the adapter nor in its place, though peft would take it."""
    loads = []
    monkeypatch.setattr(torch, "load", lambda *arguments, **named: loads.append(arguments))
    monkeypatch.setattr("peft.utils.save_and_load.torch_load", lambda *arguments, **named: loads.append(arguments))
    (stranger / "adapter_model.bin").write_bytes(b"a pickle")
    assert lk.load(stranger)
    (stranger / "adapter_model.safetensors").unlink()
    manifest = json.loads((stranger / "manifest.json").read_text())
    del manifest["files"]["adapter_model.safetensors"]
    forge(stranger, files=manifest["files"])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        lk.load(stranger)
    assert not loads


@pytest.mark.parametrize("change", ["missing", "superfluous", "shape"])
def test_an_adapter_has_exactly_its_tensors(change, stranger):
    weights = load_file(stranger / "adapter_model.safetensors")
    name = min(weights)
    if change == "missing":
        del weights[name]
    elif change == "superfluous":
        weights["base_model.model.lm_head.weight"] = np.zeros((1, 1), np.float32)
    else:
        weights[name] = weights[name][:, :-1].copy()
    save_file(weights, stranger / "adapter_model.safetensors")
    (stranger / "optimizer.safetensors").unlink()  # its moments would show another number of weights
    forge(stranger)
    with pytest.raises(CheckpointError, match=r"tensor names differ|has shape"):
        lk.load(stranger)


def test_a_rank_that_the_tensors_do_not_have_allocates_nothing(stranger):
    recipe = json.loads((stranger / "manifest.json").read_text())["recipe"]
    forge(stranger, recipe=recipe | {"adapter": recipe["adapter"] | {"rank": 10**9}})
    with pytest.raises(CheckpointError, match=r"has shape \(4, 32\), expected \(1000000000, 32\)"):
        lk.load(stranger)


def test_an_adapters_configuration_imports_nothing_and_chooses_no_other_method(stranger, tmp_path, monkeypatch):
    (tmp_path / "chosen.py").write_text("raise SystemExit('the module was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    expected = lk.load(stranger)[0](torch.arange(9)[None]).logits
    edit(
        stranger / "adapter_config.json",
        megatron_config={"x": 1},
        megatron_core="chosen",
        auto_mapping={"base_model_class": "x", "parent_library": "chosen"},
        peft_type="IA3",
        init_lora_weights="pissa",
        use_rslora=True,
    )
    forge(stranger)
    assert torch.equal(lk.load(stranger)[0](torch.arange(9)[None]).logits, expected)


def test_an_adapters_configuration_is_no_pattern(stranger):
    edit(stranger / "adapter_config.json", target_modules="(.*)*x")
    forge(stranger)
    with pytest.raises(CheckpointError, match="not lists of names"):
        lk.load(stranger)


def hashed(folder, path):
    return file_hash(path)


def tokenised(folder, path):
    """Return the tokens of a recipe's data, from the cache if it has them."""
    recipe = lk.load_recipe(path)
    return prepare_data(recipe, load_renderer(locate(recipe.base, Path(recipe.base.repo)), recipe)).train.fingerprint


def open_to_all(path):
    path.chmod(path.stat().st_mode | 0o022)


def owned_by_another(path):
    if os.getuid():
        pytest.skip("only root can give a file away")
    os.chown(path, 12345, -1)


@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("spoil", [open_to_all, owned_by_another])
@pytest.mark.parametrize(("name", "read"), [("sha256", hashed), ("tokens", tokenised)])
def test_a_cache_that_another_user_may_change_is_not_read(name, read, spoil, what, recipe_file, tmp_path, monkeypatch):
    """The other user replaces every entry by one of his own that is well formed."""
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    expected, folder = read(tmp_path, recipe_file), tmp_path / "cache" / name
    (entry,) = [file for file in folder.iterdir() if name == "tokens" or file.read_text() == expected]
    if name == "sha256":
        entry.write_text("ab" * 32)
    else:
        prepared = cache.read(entry)
        train = replace(prepared.train, ids=prepared.train.ids + 1)
        with entry.open("wb+") as file:
            cache.save(file, replace(prepared, train=train))
    assert read(tmp_path, recipe_file) != expected, "the test's own forgery is well formed"
    spoil(folder if what == "folder" else entry)
    assert read(tmp_path, recipe_file) == expected


def test_a_cache_entry_is_not_read_through_a_link(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    expected = file_hash(recipe_file)
    (entry,) = (tmp_path / "cache" / "sha256").iterdir()
    (tmp_path / "other").write_text("ab" * 32)
    entry.unlink()
    entry.symlink_to(tmp_path / "other")
    assert file_hash(recipe_file) == expected


def with_template(recipe_file, tmp_path, text):
    """Return the arguments that make a recipe use a template; it also renders as the usual one."""
    path = tmp_path / "template.jinja"
    path.write_text(text + TEMPLATE)
    return ["--set", f"data.template={path}"]


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_that_takes_too_much_ends_check_with_a_message(kind, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    template, problem = HOSTILE[kind]
    told = run_command("check", recipe_file, *with_template(recipe_file, tmp_path, template))
    assert told.exit_code == 2 and f"template: the chat template {problem}" in " ".join(told.output.split())
    assert not sandbox._child


def test_a_template_that_takes_too_much_ends_training_and_nothing_is_left_running(recipe_file, tmp_path):
    process = start(recipe_file, tmp_path / "run", *with_template(recipe_file, tmp_path, HOSTILE["memory"][0]))
    printed, _ = process.communicate()
    assert process.returncode == 2 and "Traceback" not in printed, printed
    assert "template: the chat template needs more than 1 GB of memory" in printed
    wait_until(lambda: not of_session(process.pid))


def of_session(number):
    """Return the processes of a session; a run is one."""
    found = []
    for process in psutil.pids():
        with suppress(ProcessLookupError):
            found += [process] if os.getsid(process) == number else []
    return found


def test_a_template_of_a_base_cannot_hang_an_answer(trained_run, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    model, tokenizer = lk.load(trained_run)
    tokenizer.chat_template = HOSTILE["loop"][0] + TEMPLATE
    with pytest.raises(DataError, match="computes for more than 1 s"):
        lk.generate(model, tokenizer, ["hello"])
    tokenizer.chat_template = TEMPLATE
    assert lk.generate(model, tokenizer, ["hello"], max_new_tokens=2)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_cannot_reach_pythons_objects(template, recipe_file, tmp_path):
    told = run_command("check", recipe_file, *with_template(recipe_file, tmp_path, template))
    text = told.output + told.stderr
    assert "<class" not in text and str(os.getpid()) not in text
    assert told.exit_code == 2 or "⟦" in text  # an undefined attribute renders as nothing


def test_the_child_that_renders_holds_no_file_of_this_process(base_folder):
    renderer = Renderer(AutoTokenizer.from_pretrained(base_folder))
    example = Conversation(({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}))
    with Path("/dev/zero").open("rb") as kept:
        assert render_all([example], renderer)
        child = Path(f"/proc/{sandbox._child[0]._process}/fd")
        held = {str(descriptor.readlink()) for descriptor in child.iterdir()}
        assert kept.name not in held and all(name == "/dev/null" or name.startswith("socket:") for name in held)
    process = psutil.Process(sandbox._child[0]._process)
    sandbox.close()
    assert not process.is_running()


def test_an_interrupted_rendering_leaves_no_answers_to_the_next(base_folder, monkeypatch):
    renderer = Renderer(AutoTokenizer.from_pretrained(base_folder))
    first, second = (
        Conversation(({"role": "user", "content": text}, {"role": "assistant", "content": text})) for text in "ab"
    )
    expected = render_all([second], renderer)  # and the child is there
    loads = sandbox.json.loads
    monkeypatch.setattr(sandbox.json, "loads", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        render_all([first, first], renderer)
    monkeypatch.setattr(sandbox.json, "loads", loads)
    assert render_all([second], renderer) == expected == [render(second, renderer)]


def test_processes_of_a_run_listen_to_this_machine_alone_and_meet_through_a_file_without_a_name(recipe_file, tmp_path):
    process = start(recipe_file, tmp_path / "run", "--set", "train.steps=500", processes=2)
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2, process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    sockets = [one.laddr.ip for member in family for one in member.net_connections("tcp") if one.status == "LISTEN"]
    assert all(ip.startswith("127.") or ip == "::1" for ip in sockets), sockets
    files = Path(f"/proc/{process.pid}/fd")
    (store,) = [file for file in files.iterdir() if "LORA_KIT_STORE" in str(file.readlink())]
    assert store.stat().st_size and str(store.readlink()).startswith("/memfd:"), "a killed keeper leaves no file behind"
    assert files.stat().st_mode & 0o777 == 0o500, "only this user can open it"
    process.terminate()
    process.communicate()
    assert process.returncode == 75


def test_a_restart_meets_through_another_file():
    first, second = (launch.environments(2) for _ in range(2))
    assert first[0][launch.STORE] == first[1][launch.STORE] != second[0][launch.STORE]
    assert "MASTER_PORT" not in first[0]


SECRETS = (
    "https://me:pa55word@example.com/base",
    "https://hf_abcdefghijklmnopqrstuvwxyz@huggingface.co/me/base",
    "hf_abcdefghijklmnopqrstuvwxyz",
    "s3://key:secret@bucket/train.jsonl",
    "https://example.com/train.jsonl?token=abc123",
)


@pytest.mark.parametrize("field", ["base.repo", "base.revision", "data.train", "data.validation", "data.template"])
@pytest.mark.parametrize("secret", SECRETS)
def test_a_recipe_with_credentials_is_refused_without_quoting_them(field, secret, recipe_file, tmp_path):
    told = run_command("train", recipe_file, "--out", tmp_path / "run", "--set", f"{field}={secret}")
    assert told.exit_code == 2 and f"{field}: it contains a token or a password" in told.stderr
    assert secret not in told.output + told.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "form", ["{secret}", "base.repo=[{secret}", "base.{secret}=x", "{secret}.x=y", "base={secret}"]
)
def test_an_override_with_credentials_is_not_quoted(form, secret, recipe_file, tmp_path):
    told = run_command("train", recipe_file, "--out", tmp_path / "run", "--set", form.format(secret=secret))
    assert told.exit_code == 2 and secret not in told.output + told.stderr


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("text", ["{secret!r}", "base: {secret!r}", "token: {secret!r}", "{secret!r}: 1"])
def test_credentials_in_any_place_of_a_recipe_are_not_quoted(text, secret, tmp_path):
    (tmp_path / "r.yaml").write_text(text.format(secret=secret) + "\n")
    told = run_command("check", tmp_path / "r.yaml")
    assert told.exit_code == 2 and secret not in told.output + told.stderr
    assert "a token or a password" in told.stderr


def test_secrets_of_the_environment_reach_no_file_of_a_run(recipe_file, tmp_path):
    names = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY")
    secrets = {name: f"http://me:s3cret{name}@example.com" for name in names}
    printed = train(recipe_file, tmp_path / "run", "--set", "train.steps=1", environment=secrets)
    files = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert files and b"s3cret" not in files + printed.encode()


@pytest.mark.parametrize("train_section", [{"steps": 4}, {"steps": 4, "micro_batch_tokens": "auto"}])
def test_a_checkpoint_that_does_not_record_how_it_was_packed_is_measured_with_a_size_of_its_own(
    train_section, stranger, recipe_file
):
    manifest = json.loads((stranger / "manifest.json").read_text())
    recipe = manifest["recipe"] | {"train": train_section}
    forge(stranger, recipe=recipe, resolved=manifest["resolved"] | {"micro_batch_tokens": None})
    evaluated = ("eval", recipe_file, stranger, "--set", "data.validation=0.2")
    told = run_command(*evaluated, "--set", "train.micro_batch_tokens=auto")
    assert told.exit_code == 2 and "train.micro_batch_tokens: " in told.stderr and "set a number" in told.stderr
    assert run_command(*evaluated).exit_code == 0


def test_a_base_that_has_moved_is_named_on_the_command_line(stranger, base_folder):
    edit(stranger / "adapter_config.json", base_model_name_or_path="/gone/base")
    forge(stranger)
    asked = ("generate", stranger, "hello", "--max-new-tokens", "2")
    told = run_command(*asked)
    assert told.exit_code == 2 and "/gone/base" in told.stderr
    assert run_command(*asked, "--base-path", base_folder).exit_code == 0
