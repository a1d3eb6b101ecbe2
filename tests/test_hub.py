"""An adapter goes to the Hub in one commit and comes back with the same logits; no fault of the Hub fails a run, makes
a second commit, or shows a token."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import RECIPE, TEMPLATE, make_base
from hub_standin import TOKEN, environment, serve
from huggingface_hub import constants
from runs import WAIT_SECONDS
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lora_kit as lk
from lora_kit.artifacts import hub as door
from lora_kit.cli import app
from lora_kit.errors import BaseError, CheckpointError, ContractError, HubError, InputError, RecipeError
from lora_kit.model.source import locate
from lora_kit.recipe.schema import Base
from lora_kit.runs.journal import Journal
from lora_kit.runs.status import status

SHORT = ["train.steps=2", "checkpoint.every_steps=1", "data.validation=0.2"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in that this process takes for the Hub."""
    with serve() as standin:
        here = {"HF_HUB_OFFLINE": False, "ENDPOINT": standin.url, "HF_HUB_DISABLE_XET": True}
        here |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "no-token")}
        here["HUGGINGFACE_CO_URL_TEMPLATE"] = standin.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in here.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(door, "RETRY_PAUSES", (0.0, 0.0))
        yield standin


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base_folder, data_file):
    """A finished run over a local base."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base_folder, data=data_file))
    return lk.train(lk.load_recipe(folder / "recipe.yaml", [*SHORT, "hub.licence=apache-2.0"]), folder / "run")


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def everything_in(folder):
    return b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.quick
def test_one_commit_has_all_that_a_stranger_needs(hub, trained):
    pushed = lk.push(trained.latest, "me/first", private=True)
    (commit,) = hub.commits("me/first")
    assert (pushed.commit, pushed.made, pushed.url) == (commit.id, True, f"{hub.url}/me/first")
    assert hub.repos["me/first"].private
    ours = {"adapter_model.safetensors", "adapter_config.json", "manifest.json", "recipe.yaml", "README.md"}
    ours |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(commit.files) == ours | {".gitattributes"}
    assert commit.files["adapter_model.safetensors"] == (trained.latest / "adapter_model.safetensors").read_bytes()


def test_what_is_published_names_no_place_of_this_machine_and_no_token(hub, trained, base_folder, tmp_path):
    lk.push(trained.folder, "me/first")
    published = b"\n".join(hub.files("me/first").values())
    for secret in (TOKEN, str(base_folder.parent), str(trained.folder.parent)):
        assert secret.encode() not in published
    assert json.loads(hub.files("me/first")["adapter_config.json"])["base_model_name_or_path"] == base_folder.name


def test_pushing_again_makes_no_commit(hub, trained):
    first, second = (lk.push(trained.latest, "me/first") for _ in range(2))
    assert second.commit == first.commit and not second.made
    assert len(hub.commits("me/first")) == 1


def test_it_comes_back_with_the_same_logits(hub, trained, base_folder):
    lk.push(trained.latest, "me/first", revision="a/branch")
    assert hub.commits("me/first") == [] and "adapter_config.json" in hub.files("me/first", "a/branch")
    model, tokenizer = lk.load("me/first@a/branch", base=base_folder)
    local, own = lk.load(trained.latest)
    assert torch.equal(logits(model), logits(local))
    assert tokenizer.get_chat_template() == own.get_chat_template()


WITHOUT_US = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "me/first").eval()
with torch.no_grad():
    torch.save(model(torch.arange(40)[None]).logits, sys.argv[2])
asked = [{"role": "user", "content": "hello"}]
print(AutoTokenizer.from_pretrained("me/first").apply_chat_template(asked, tokenize=False))
"""


def test_peft_and_transformers_read_it_without_lora_kit(hub, trained, base_folder, tmp_path):
    lk.push(trained.latest, "me/first")
    command = [sys.executable, "-c", WITHOUT_US, str(base_folder), str(tmp_path / "logits")]
    talk = os.environ | environment(hub, tmp_path / "cache")
    told = subprocess.run(command, env=talk, capture_output=True, text=True, timeout=WAIT_SECONDS, check=True).stdout
    local, _ = lk.load(trained.latest)
    assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), logits(local))
    assert told == "<user>hello\n"


def test_eval_takes_a_hub_name_and_finds_the_base_through_the_recipe(hub, trained, recipe_file):
    lk.push(trained.latest, "me/first")
    recipe = lk.load_recipe(recipe_file, SHORT)
    assert lk.evaluate(recipe, "me/first") == lk.evaluate(recipe, trained.latest)
    told = CliRunner().invoke(app, ["eval", str(recipe_file), "me/first", "--set", "data.validation=0.2", "--json"])
    assert json.loads(told.stdout)["adapter"]["loss"] == trained.result["metrics"]["adapter"]["loss"]


def test_without_its_local_base_it_says_how_to_name_one(hub, trained):
    lk.push(trained.latest, "me/first")
    with pytest.raises(BaseError, match=r"it was a local folder .* --base-path FOLDER, in Python base=FOLDER"):
        lk.load("me/first")


def test_a_damaged_download_is_not_loaded(hub, trained, base_folder):
    lk.push(trained.latest, "me/first")
    hub.files("me/first")["adapter_config.json"] += b" "
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        lk.load("me/first", base=base_folder)


PASSING = {
    "busy": ("/commit/", [429]),
    "another commit": ("/commit/", [409]),
    "a fault": ("/commit/", [503, 500]),
    "a fault when the repository is made": ("/repos/create", [502]),
    "a cut before the repository": ("/repos/create", ["cut"]),
    "a cut in the large file": ("/large/", ["cut"]),
    "a cut in the commit": ("/commit/", ["cut", "cut"]),
    "a made commit whose answer is lost": ("/commit/", ["lost"]),
    "a made repository whose answer is lost": ("/repos/create", ["lost"]),
}


@pytest.mark.parametrize("case", PASSING)
def test_a_fault_that_passes_leaves_one_commit(hub, trained, case):
    path, faults = PASSING[case]
    hub.faults[path] = list(faults)
    pushed = lk.push(trained.latest, "me/first")
    assert [commit.id for commit in hub.commits("me/first")] == [pushed.commit]
    assert not hub.faults[path]


LASTING = {
    "401": ("/commit/", [401], "does not accept the token; log in with `hf auth login` or set HF_TOKEN"),
    "403": ("/commit/", [403], "the token has no write access to the repository"),
    "404": ("/branch/", [404], "the repository or file does not exist on the Hub"),
    "409": ("/commit/", [409] * 3, "another commit to the repository is in progress"),
    "412": ("/commit/", [412] * 3, "the repository got another commit in the meantime"),
    "418": ("/commit/", [418], "the Hub refused the request"),
    "429": ("/commit/", [429] * 3, "too many requests; wait a few minutes"),
    "503": ("/commit/", [503] * 3, "the Hub reports an internal error"),
    "cut": ("/commit/", ["cut"] * 3, r"the connection to the Hub failed \(\w+\)"),
    "lost": ("/commit/", ["lost", "cut", 500], "the Hub reports an internal error|connection"),
    "large": ("/large/", [403], "has no write access"),
}


@pytest.mark.parametrize("case", LASTING)
def test_a_fault_that_lasts_says_how_to_repeat_and_repeating_makes_one_commit(hub, trained, case):
    path, faults, reason = LASTING[case]
    hub.faults[path] = list(faults)
    again = f"to repeat the push: lora-kit push {trained.latest} --to me/first --private --revision new"
    with pytest.raises(HubError, match=reason) as caught:
        door.push(trained.latest, "me/first", private=True, revision="new", pause=lambda _: case == "lost")
    assert again in str(caught.value)
    shown = "".join(__import__("traceback").format_exception(caught.value))
    assert TOKEN not in shown and "SIGNED" not in shown
    hub.faults.clear()
    lk.push(trained.latest, "me/first", private=True, revision="new")
    assert len(hub.commits("me/first", "new")) == 1


def test_nobody_listening_is_told(hub, trained, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"the connection to the Hub failed \(ConnectError\)"):
        lk.push(trained.latest, "me/first")


def test_offline_and_without_a_token_nothing_is_asked(hub, trained, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        lk.push(trained.latest, "me/first")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no token for the Hub was found; log in with `hf auth login` or set HF_TOKEN"):
        lk.push(trained.latest, "me/first")
    assert hub.requests == []


def test_a_run_that_will_push_says_at_its_start_that_it_has_no_token(hub, recipe_file, tmp_path, monkeypatch, capsys):
    recipe = lk.load_recipe(recipe_file, ["train.steps=1", "hub.repo=me/run"])
    assert door.push_notes(recipe) == []
    monkeypatch.delenv("HF_TOKEN")
    run = lk.train(recipe, tmp_path / "run")
    before, _, after = capsys.readouterr().out.partition("step 1/1")
    assert (
        "no token was found for the push to me/run after the run" in before
        and "no token for the Hub was found; log in" in after
    )
    assert run.result["step"] == 1


def test_private_never_means_public(hub, trained):
    lk.push(trained.latest, "me/first")
    with pytest.raises(InputError, match="the repository exists and is public"):
        lk.push(trained.latest, "me/first", private=True)


def test_a_wrong_name_is_refused_before_anything(trained, recipe_file):
    with pytest.raises(InputError, match="'first' is not a Hub name; expected user/name"):
        lk.push(trained.latest, "first")
    with pytest.raises(RecipeError, match=r"hub: repo is 'first'; expected user/name, e\.g\. me/first-adapter"):
        lk.load_recipe(recipe_file, ["hub.repo=first"])
    with pytest.raises(CheckpointError, match="train first"):
        lk.push(trained.folder / "checkpoints", "me/first")


def test_a_token_in_what_is_published_is_refused(hub, recipe_file, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{# " + TOKEN + " #}" + TEMPLATE)
    run = lk.train(lk.load_recipe(recipe_file, ["train.steps=1", f"data.template={template}"]), tmp_path / "run")
    with pytest.raises(InputError, match="contains a Hub token") as caught:
        lk.push(run.latest, "me/first")
    assert TOKEN not in str(caught.value) and not hub.requests


def test_a_changed_tokenizer_is_not_published(recipe_file, tmp_path):
    base = make_base(tmp_path / "base")
    run = lk.train(lk.load_recipe(recipe_file, ["train.steps=1", f"base.repo={base}"]), tmp_path / "run")
    (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text() + " ")
    with pytest.raises(BaseError, match=r"tokenizer\.json: the file changed after the training"):
        lk.push(run.latest, "me/first")


def test_what_is_not_on_the_hub_is_reported(hub, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    hub.add("me/other", tmp_path / "other")
    for name, reason in {
        "me/nothing": "not found; check the name and, if it is private",
        "me/other": r"has no manifest\.json, so lora_kit did not train it; `lora-kit train --from me/other`",
        "me/other@gone": "has no revision 'gone'",
    }.items():
        with pytest.raises(HubError, match=f"^{name.split('@')[0]}: not a local folder; the Hub repository .*{reason}"):
            lk.load(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="the Hub repository cannot be downloaded: HF_HUB_OFFLINE is set"):
        lk.load("me/never-seen")


def test_the_verb_prints_where_it_is(hub, trained, monkeypatch):
    first = CliRunner().invoke(app, ["push", str(trained.folder), "--to", "me/first", "--json"])
    again = CliRunner().invoke(app, ["push", str(trained.folder), "--to", "me/first"])
    monkeypatch.setenv("HF_TOKEN", wrong := "hf_" + "wrong" * 6)
    refused = CliRunner().invoke(app, ["push", str(trained.folder), "--to", "me/first"])
    assert json.loads(first.stdout)["made"] is True
    assert again.stdout.startswith(f"already at {hub.url}/me/first")
    assert refused.exit_code == 1 and "hf auth login" in refused.stderr and wrong not in refused.output


def test_a_run_is_published_at_its_end_and_only_once(hub, recipe_file, tmp_path):
    recipe = lk.load_recipe(recipe_file, [*SHORT, "hub.repo=me/run", "hub.private=true", "hub.revision=new"])
    run = lk.train(recipe, tmp_path / "run")
    (event,) = [event for event in run.events if event["kind"] == "pushed"]
    assert (event["step"], event["to"]) == (2, "me/run") and event["commit"] == hub.commits("me/run", "new")[0].id
    asked = len(hub.requests)
    lk.train(recipe, tmp_path / "run")
    assert len(hub.requests) == asked and status(run.folder).state == "finished"


def test_a_failed_push_fails_no_run_and_the_same_command_repeats_it(hub, recipe_file, tmp_path, capsys):
    hub.faults |= {"/commit/": ["lost"], "/repos/create": ["pass", 503, 503]}
    recipe = lk.load_recipe(recipe_file, [*SHORT, "hub.repo=me/run"])
    run = lk.train(recipe, tmp_path / "run")
    assert run.result["step"] == 2 and status(run.folder).state == "finished" and len(status(run.folder).faults) == 1
    told = capsys.readouterr().out
    assert f"to repeat the push: lora-kit push {run.folder} --to me/run" in told.replace("\n", " ")
    assert TOKEN.encode() not in everything_in(run.folder) and TOKEN not in told
    assert len(hub.commits("me/run")) == 1
    lk.train(recipe, tmp_path / "run")
    assert len(hub.commits("me/run")) == 1
    assert [event["made"] for event in Journal(run.folder).read_events() if event["kind"] == "pushed"] == [False]


@pytest.mark.parametrize("error", [TypeError(f"answer {TOKEN}"), ZeroDivisionError()])
def test_not_even_an_unforeseen_error_fails_a_run(hub, recipe_file, tmp_path, monkeypatch, error):
    def broken(*arguments, **named):
        raise error

    monkeypatch.setattr(door, "_commit", broken)
    run = lk.train(lk.load_recipe(recipe_file, ["train.steps=1", "hub.repo=me/run"]), tmp_path / "run")
    assert run.events[-1]["what"].startswith(f"me/run: push failed: {type(error).__name__}")
    assert TOKEN.encode() not in everything_in(run.folder)


def test_a_stop_signal_ends_the_waiting(hub, trained, monkeypatch):
    hub.faults["/commit/"] = [503] * 3
    with pytest.raises(HubError, match="503"):
        door.push(trained.latest, "me/first", pause=lambda _: True)
    assert hub.faults["/commit/"] == [503, 503]


@pytest.mark.slow
def test_only_the_files_of_a_base_that_are_loaded_are_downloaded(hub, tmp_path):
    folder = make_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20kB")
    (folder / "original").mkdir()
    unused = ["consolidated.safetensors", "original/model.safetensors", "original/params.json", "pytorch_model.bin"]
    unused += ["README.md", "LICENSE.txt", "adapter_config.json"]
    for name in unused:
        (folder / name).write_text("{}")
    hub.add("them/base", folder)
    source = locate(Base(repo="them/base"), None)
    asked = {request.rpartition("/resolve/")[2].partition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert asked >= set(source.files) and not asked.intersection(unused)
    assert sum(name.startswith("model-") for name in source.files) > 2


def test_a_base_that_moved_on_the_hub_is_refused_only_if_model_or_tokenizer_changed(
    hub, recipe_file, tmp_path, base_folder, capsys
):
    commit = hub.add("them/base", base_folder)
    recipe = lk.load_recipe(recipe_file, ["base.repo=them/base", "train.steps=1"])
    lk.train(recipe, tmp_path / "run")
    files = commit.files | {"generation_config.json": b'{"temperature": 0.5}', "LICENSE.txt": b"free"}
    moved = hub.repos["them/base"].commit("main", files, "other settings of generation")
    lk.train(recipe, tmp_path / "run")
    assert f"fingerprints.base.commit: {commit.id} -> {moved.id}" in capsys.readouterr().out
    config = json.loads(files["config.json"]) | {"rope_theta": 5.0}
    hub.repos["them/base"].commit("main", files | {"config.json": json.dumps(config).encode()}, "another model")
    hint = f"--set base.revision={commit.id}"
    with pytest.raises(ContractError, match=hint):
        lk.train(recipe, tmp_path / "run")
    lk.train(lk.load_recipe(recipe_file, ["base.repo=them/base", "train.steps=1", hint[6:]]), tmp_path / "run")


@pytest.mark.slow
def test_a_base_from_the_hub_is_pinned_and_found_again(hub, recipe_file, tmp_path, base_folder):
    """As a user has it: trained and pushed in one process, answered in another one with an empty cache."""
    commit = hub.add("them/base", base_folder)

    def run(*arguments, cache="cache", expect=0):
        done = subprocess.run(
            [sys.executable, "-m", "lora_kit", *map(str, arguments)],
            env=os.environ | environment(hub, tmp_path / cache),
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout

    changes = [part for change in [*SHORT, "base.repo=them/base", "hub.repo=me/run"] for part in ("--set", change)]
    told = run("train", recipe_file, "--out", tmp_path / "run", "--processes", 2, *changes)
    assert f"pushed to {hub.url}/me/run" in told
    assert len(hub.commits("me/run")) == 1
    files = hub.files("me/run")
    assert json.loads(files["adapter_config.json"])["revision"] == commit.id
    assert "base_model: them/base\n" in files["README.md"].decode() and commit.id in files["README.md"].decode()
    hub.repos["them/base"].commit("main", {"config.json": b"{}"}, "the base moves on")
    answer = run("generate", "me/run", "hello", "--max-new-tokens", 8, cache="another cache")
    assert answer.strip() == lk.generate(*lk.load(tmp_path / "run", base=base_folder), ["hello"], max_new_tokens=8)[0]
    assert TOKEN.encode() not in everything_in(tmp_path / "run")
