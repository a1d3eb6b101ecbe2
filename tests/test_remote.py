"""Copies of checkpoints at a URL: complete or absent, verified before use, only the newest; nobody waits for them."""

import hashlib
import json
import os
import random
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import fsspec
import psutil
import pytest
import runs
from conftest import hold
from fsspec.implementations.memory import MemoryFileSystem
from hub_standin import TOKEN, serve
from huggingface_hub import constants
from manifests import files_of, run_facts, step_facts
from runs import wait_until
from stores import SIGNATURE, Interrupted, Unsteady, s3
from typer.testing import CliRunner

from lora_kit.artifacts import remotes
from lora_kit.artifacts.hub import without_paths
from lora_kit.artifacts.hub_remote import HubRemote
from lora_kit.artifacts.locate import checkpoint_at
from lora_kit.cli import app
from lora_kit.errors import InputError, LeaseError, RecipeError, RemoteError
from lora_kit.recipe.load import load_recipe
from lora_kit.runs import remote as station
from lora_kit.runs import store
from lora_kit.runs.file_remote import FileRemote
from lora_kit.runs.lease import take
from lora_kit.runs.manifest import MANIFEST, manifest_bytes
from lora_kit.runs.remote import Backoff, Uploader, bring, name_of, read_outbox, restore, waiting
from lora_kit.supervise.uploads import Uploads

URL = "flaky://store/run"


@pytest.fixture(autouse=True)
def fresh():
    """An empty store."""
    Unsteady.reset()


def commit(run, step, *, token=1, run_id="r", seed=None):
    """Commit a checkpoint that differs from those of other steps."""
    facts = run_facts(fencing_token=token, run_id=run_id)
    return store.commit(run, files_of(step if seed is None else seed), facts, step_facts(step))


def uploader(run, remote=None, **options):
    """An uploader whose clock and pauses are those of the store."""

    def pause(seconds):
        Unsteady.now += seconds

    settings = {"backoff": Backoff(pause, random.Random(1).random), "clock": lambda: Unsteady.now}
    return Uploader(run, remote or FileRemote(URL), options.pop("keep", 3), **settings | options)


def content(folder):
    """The files of a folder by name."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def fetched(tmp_path, remote=None, **options):
    """The newest whole copy at the URL, downloaded; its messages."""
    told = []
    quick = Backoff(lambda seconds: None)
    target = tmp_path / f"fetched-{len(list(tmp_path.iterdir()))}"
    path = bring(remote or FileRemote(URL), target, lambda copy: "copy", tell=told.append, backoff=quick, **options)
    return path, told


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["memory", "file", "flaky"])
def test_the_newest_checkpoint_is_copied_byte_for_byte_and_comes_back(tmp_path, kind):
    """Through fsspec's own memory and local file systems, and the one of these tests."""
    url = f"file://{tmp_path}/kept" if kind == "file" else f"{kind}://{tmp_path.name}/run"
    run, told = tmp_path / "run", []
    for step in (3, 6, 9, 12):
        checkpoint = commit(run, step)
        up = uploader(run, FileRemote(url), keep=2, on_upload=lambda **facts: told.append(facts))
        assert up.seconds_left() == 0 and up.attempt() and up.seconds_left() is None
    assert [facts["step"] for facts in told] == [3, 6, 9, 12] and told[-1]["bytes"] == checkpoint.size
    names = {path.rsplit("/", 2)[-2] for path in fsspec.open_files(f"{url}/*/*").fs.find(url)}
    assert names == {name_of(step, (store.checkpoint_folder(run, step) / MANIFEST).read_bytes()) for step in (9, 12)}
    path, messages = fetched(tmp_path, FileRemote(url))
    assert content(path) == content(checkpoint.path) and not messages
    restore(FileRemote(url), tmp_path / "empty", tell=told.append)
    assert told[-1] == f"step 12 was downloaded from {url} and verified"
    assert content(store.checkpoint_folder(tmp_path / "empty", 12)) == content(checkpoint.path)
    assert waiting(tmp_path / "empty", url) is None  # what came from there need not go there


def whole_copies():
    """The copies in the store, each verified by its manifest without this package's reader of stores."""
    names = {path.split("/")[3] for path in Unsteady.store}
    for name in names:
        files = {path.rsplit("/", 1)[1]: file.getvalue() for path, file in Unsteady.store.items() if name in path}
        try:
            manifest = json.loads(files[MANIFEST])
        except (KeyError, ValueError):
            continue
        listed = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        assert listed == {
            name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items() if name != MANIFEST
        }
        yield manifest["step"]


def test_an_upload_that_dies_at_any_request_leaves_no_manifest_without_its_files(tmp_path):
    """Every request of an upload and of the deletion after it is the last, carried out, in part or not at all."""
    now, later = tmp_path / "now", tmp_path / "later"
    for step in (1, 2):
        commit(now, step)
        assert uploader(now, keep=2).attempt()
    before, outbox = (
        {path: file.getvalue() for path, file in Unsteady.store.items()},
        (now / station.OUTBOX).read_text(),
    )
    commit(now, 3)
    shutil.copytree(now, later)
    commit(later, 4)
    died = 0
    for seed in range(6):
        for number in range(1, 100):
            Unsteady.reset(seed=seed)
            for path, data in before.items():
                MemoryFileSystem.pipe_file(Unsteady(), path, data)
            (now / station.OUTBOX).write_text(outbox)
            Unsteady.dies_at = number
            try:
                uploader(now, keep=2).attempt()
                break
            except Interrupted:
                died += 1
            assert 2 in whole_copies(), "the copies of before are there"
            Unsteady.dies_at = None
            assert uploader(now, keep=2).attempt()  # the next process goes on
            assert max(whole_copies()) == 3
            path, _ = fetched(tmp_path)
            assert content(path) == content(store.checkpoint_folder(now, 3))
            shutil.copy(now / station.OUTBOX, later)
            assert uploader(later, keep=2).attempt()
            assert sorted(whole_copies()) == [3, 4]
            assert len({path.split("/")[3] for path in Unsteady.store}) == 2, "nothing of the dead upload stays"
    assert died >= 6 * 10


def test_with_latency_and_a_third_of_all_requests_failing_the_newest_arrives_and_nothing_else_waits(tmp_path):
    """An hour of the store's clock: 10 s for a request, 30% errors, a checkpoint every 30 s."""
    Unsteady.reset(share=0.3, latency=10.0, seed=4)
    run, told, faults = tmp_path / "run", [], []
    up = uploader(run, on_upload=lambda **facts: told.append(facts["step"]), on_fault=faults.append)
    step = 0
    while Unsteady.now < 3600:
        while 30 * step <= Unsteady.now:
            step += 1
            commit(run, step)
            store.prune(run, 3)
        if (left := up.seconds_left()) is None or left > 0:
            Unsteady.now += left or 30
        else:
            up.attempt()
    assert len(told) > 10 and told == sorted(set(told)) and told[-1] > step - 30
    assert step > 3 * len(told), "most were replaced while they waited"
    Unsteady.share = 0.0
    up.hurry()
    assert up.attempt() and told[-1] == step
    path, _ = fetched(tmp_path)
    assert content(path) == content(store.checkpoint_folder(run, step))
    assert all(SIGNATURE not in text for text in [*faults, (run / station.OUTBOX).read_text()])


def test_a_newer_checkpoint_replaces_one_that_waits_and_the_outbox_outlives_the_process(tmp_path):
    Unsteady.reset(share=1.0)
    run, faults = tmp_path / "run", []
    commit(run, 1)
    up = uploader(run, on_fault=faults.append)
    for failures in range(1, 7):
        Unsteady.now += up.seconds_left()
        before = Unsteady.now
        assert not up.attempt()
        assert read_outbox(run, URL).failures == failures
        pause = up.seconds_left() - 0.0
        assert 0.5 * 2 ** (failures - 1) <= pause <= 2 ** (failures - 1) and Unsteady.now > before
        commit(run, failures + 1)
        assert up.seconds_left() == pause, "a newer one does not shorten the pause"
    (fault,) = faults  # once for the series
    assert "step 3 is not uploaded yet, 3 attempt(s) failed: OSError" in fault and SIGNATURE not in fault
    Unsteady.share = 0.0
    later = uploader(run)  # another process
    assert read_outbox(run, URL).problem and later.seconds_left() == 0 and later.attempt()
    assert list(whole_copies()) == [7] and not read_outbox(run, URL).problem


def test_pauses_grow_to_five_minutes_and_differ_between_runs():
    pauses = [Backoff(draw=lambda: 0.0).seconds(failures) for failures in range(1, 40)]
    assert pauses[:4] == [0.5, 1, 2, 4] and pauses[-1] == 150
    assert Backoff(draw=lambda: 1.0).seconds(100) == 300
    assert len({Backoff().seconds(5) for _ in range(20)}) == 20


def test_a_checkpoint_that_is_pruned_while_it_is_uploaded_arrives_whole(tmp_path):
    run = tmp_path / "run"
    expected = content(commit(run, 1).path)

    def prune(verb, path):
        if verb == "put":
            store.remove(store.checkpoint_folder(run, 1))

    Unsteady.before = prune
    uploader(run).attempt()
    path, _ = fetched(tmp_path)
    assert content(path) == expected


def test_a_damaged_checkpoint_is_not_uploaded(tmp_path):
    run, faults = tmp_path / "run", []
    path = commit(run, 1).path / store.OPTIMIZER
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert not uploader(run, on_fault=faults.append).attempt()
    assert "SHA-256" in faults[0] and not Unsteady.store


def damage(name, change):
    """Change the file of the newest copy."""
    (path,) = [path for path in Unsteady.store if "step-00000002" in path and path.endswith(name)]
    data = change(Unsteady.store[path].getvalue())
    if data is None:
        MemoryFileSystem.rm_file(Unsteady(), path)
    else:
        MemoryFileSystem.pipe_file(Unsteady(), path, data)


def resealed(data, **changes):
    """A manifest with another content and the right checksum of its own."""
    return manifest_bytes(json.loads(data) | changes)


DAMAGES = {
    "a flipped bit": (store.ADAPTER, lambda data: data[:-1] + bytes([data[-1] ^ 1]), "SHA-256"),
    "a file that was cut": (store.OPTIMIZER, lambda data: data[:-1], "missing, or not of the size"),
    "a file that is missing": (store.ADAPTER, lambda data: None, "missing, or not of the size"),
    "a manifest that was cut": (MANIFEST, lambda data: data[:-9], "checksum"),
    "a manifest that is empty": (MANIFEST, lambda data: b"", "checksum"),
    "another manifest": (MANIFEST, partial(resealed, run_id="stranger"), "not the manifest that the folder's name"),
}


@pytest.mark.parametrize("damaged", DAMAGES)
def test_a_broken_newest_copy_is_told_and_the_one_before_is_used(tmp_path, damaged):
    run = tmp_path / "run"
    for step in (1, 2):
        commit(run, step)
        uploader(run).attempt()
    name, change, message = DAMAGES[damaged]
    damage(name, change)
    path, told = fetched(tmp_path)
    assert content(path) == content(store.checkpoint_folder(run, 1))
    assert message in told[0] and "step-00000002" in told[0]


def test_if_no_copy_is_whole_nothing_begins_anew(tmp_path):
    run = tmp_path / "run"
    commit(run, 2)
    uploader(run).attempt()
    damage(store.ADAPTER, lambda data: data + b"x")
    with pytest.raises(RemoteError, match="no copy there is whole"):
        fetched(tmp_path)
    Unsteady.share = 1.0
    with pytest.raises(RemoteError, match="cannot be read: OSError") as caught:
        fetched(tmp_path)
    assert SIGNATURE not in str(caught.value)


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "evil.py"])
def test_a_strangers_manifest_writes_no_other_files(tmp_path, name):
    """The copy has the name that fits its manifest, so only what the manifest lists can stop it."""
    checkpoint = commit(tmp_path / "run", 1)
    stranger = json.loads((checkpoint.path / MANIFEST).read_bytes())
    stranger["files"][name] = {"size": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
    data = manifest_bytes(stranger)
    folder = f"/store/run/{name_of(1, data)}"
    for file, written in {**content(checkpoint.path), MANIFEST: data, name: b"evil"}.items():
        MemoryFileSystem.pipe_file(Unsteady(), f"{folder}/{file}", written)
    with pytest.raises(RemoteError, match=r"no copy there is whole[\s\S]*(expected|not the name of a file)"):
        fetched(tmp_path)
    assert not list(tmp_path.rglob("*outside")) and not list(tmp_path.rglob("evil.py"))


def test_a_url_belongs_to_one_run_and_to_its_newest_start(tmp_path):
    commit(tmp_path / "one", 5, token=2)
    assert uploader(tmp_path / "one").attempt()
    for step, token, run_id, message in ((9, 3, "other", "another run"), (6, 1, "r", "a later start of this run")):
        run, faults = tmp_path / f"{run_id}{token}", []
        commit(run, step, token=token, run_id=run_id)
        up = uploader(run, on_fault=faults.append)
        assert not up.attempt() and message in faults[0] and up.seconds_left() == station.MOST_SECONDS
    assert list(whole_copies()) == [5]
    commit(tmp_path / "one", 4, token=3)  # it went back, and the later start counts
    assert uploader(tmp_path / "one").attempt()
    path, _ = fetched(tmp_path)
    assert store.open_checkpoint(path).step == 4


def test_without_the_lease_no_manifest_is_written(tmp_path):
    def require():
        raise LeaseError("lost")

    commit(tmp_path / "run", 1)
    with pytest.raises(LeaseError):
        uploader(tmp_path / "run", require=require).attempt()
    assert not list(whole_copies())


def test_two_processes_that_restore_into_one_folder_do_not_disturb_each_other(tmp_path, monkeypatch):
    """The second begins and ends while the first downloads."""
    commit(tmp_path / "run", 1)
    uploader(tmp_path / "run").attempt()
    folder = tmp_path / "empty"

    def second(verb, path):
        if verb == "get":
            Unsteady.before = lambda verb, path: None
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 1)
                restore(FileRemote(URL), folder, tell=lambda text: None)

    Unsteady.before = second
    restore(FileRemote(URL), folder, tell=lambda text: None)
    assert content(store.checkpoint_folder(folder, 1)) == content(store.checkpoint_folder(tmp_path / "run", 1))
    assert not list((folder / "checkpoints").glob(".tmp*"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://bucket/run", r"s4:// is not known; did you mean s3://\?"),
        ("gs://bucket/run", "gs:// needs the package gcsfs, which is not installed; pip install gcsfs"),
        ("sftp://host/run", "sftp:// cannot be used: .*paramiko"),
    ],
)
def test_a_missing_package_is_named_before_anything_begins(tmp_path, recipe_file, url, message):
    recipe = load_recipe(recipe_file, [f"checkpoint.remote={url}"])
    with pytest.raises(InputError, match=f"checkpoint.remote: {message}"):
        remotes.require_remote(recipe)
    done = CliRunner().invoke(app, ["check", str(recipe_file), "--set", f"checkpoint.remote={url}"])
    assert done.exit_code == 2 and "checkpoint.remote" in done.output


def test_the_package_of_s3_comes_with_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(InputError, match=r"s3:// needs the package s3fs.*pip install 'lora_kit\[remote\]'"):
        FileRemote("s3://bucket/run")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("/mnt/run", "expected a URL such as"),
        ("file://run", "expected a URL such as"),
        ("hf://run", "expected hf://user/name"),
        ("s3://bucket/run?version=1", "expected a URL such as"),
        ("s3://AKIA:secret@bucket/run", "a token or a password"),
        ("https://host/run?X-Amz-Signature=abc", "a token or a password"),
        ("hf://me/first", "the same branch of me/first"),
    ],
)
def test_what_is_no_url_of_a_run_is_refused_with_the_reason(recipe_file, url, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(recipe_file, [f"checkpoint.remote={url}", "hub.repo=me/first"])
    assert "secret" not in str(caught.value) and "abc" not in str(caught.value)


def test_where_checkpoints_are_copied_to_is_not_published(recipe_file):
    recipe = load_recipe(recipe_file, ["checkpoint.remote=s3://bucket/run"])
    assert recipe.checkpoint.remote and without_paths(recipe)["checkpoint"]["remote"] is None


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
        yield standin


HUB = "hf://me/first@checkpoints"


def checkpoints_on(hub):
    """The steps of the commits on the branch, each with all files that its manifest lists."""
    for one in hub.repos["me/first"].branches.get("checkpoints", [])[1:] if "me/first" in hub.repos else []:
        listed = json.loads(one.files[MANIFEST])["files"]
        assert listed == {
            name: {"size": len(one.files[name]), "sha256": hashlib.sha256(one.files[name]).hexdigest()}
            for name in listed
        }
        yield json.loads(one.files[MANIFEST])["step"]


def test_on_the_hub_a_checkpoint_is_one_commit_of_a_private_repository(tmp_path, hub):
    run = tmp_path / "run"
    for step in (1, 2):
        commit(run, step)
        up = uploader(run, HubRemote(HUB))
        assert up.attempt()
    assert list(checkpoints_on(hub)) == [1, 2] and hub.repos["me/first"].private
    path, told = fetched(tmp_path, HubRemote(HUB))
    assert content(path) == content(store.checkpoint_folder(run, 2)) and not told
    assert content(checkpoint_at(HUB)) == content(path)
    assert not uploader(run, HubRemote(HUB)).seconds_left()  # nothing waits


def test_commits_of_the_hub_are_at_least_a_minute_apart(tmp_path, hub):
    """The Hub allows so many commits in an hour."""
    run = tmp_path / "run"
    up = uploader(run, HubRemote(HUB))
    commit(run, 1)
    assert up.seconds_left() == 0 and up.attempt()
    commit(run, 2)
    assert up.seconds_left() == 60
    up.hurry()
    assert up.seconds_left() == 0 and up.attempt()


def test_a_branch_begins_beside_what_was_published_of_another_run(tmp_path, hub):
    """A new branch has the files of the default branch."""
    published = commit(tmp_path / "other", 3, run_id="other").path
    facts = json.loads((published / MANIFEST).read_bytes())
    del facts["files"][store.OPTIMIZER]
    (published / MANIFEST).write_bytes(manifest_bytes(facts))
    (published / store.OPTIMIZER).unlink()
    hub.add("me/first", published, private=True)
    assert fetched(tmp_path, HubRemote(HUB))[0] is None
    commit(tmp_path / "run", 1)
    assert uploader(tmp_path / "run", HubRemote(HUB)).attempt()
    assert list(checkpoints_on(hub)) == [1]


@pytest.mark.parametrize(
    ("place", "fault"),
    [("/commit/", fault) for fault in (409, 429, 500, "cut", "lost")] + [("/large/", "cut"), ("/preupload/", 503)],
)
def test_whatever_the_hub_does_there_is_one_whole_commit(tmp_path, hub, place, fault):
    """Connections end in the middle of a request, or after it was carried out."""
    run = tmp_path / "run"
    commit(run, 1)
    hub.faults[place] = [fault]
    up = uploader(run, HubRemote(HUB))
    while not up.attempt():
        assert list(checkpoints_on(hub)) == []
        up.hurry()
    assert list(checkpoints_on(hub)) == [1] and not hub.faults[place]
    path, _ = fetched(tmp_path, HubRemote(HUB))
    assert content(path) == content(store.checkpoint_folder(run, 1))


def test_a_hub_that_takes_no_token_is_told_at_once_without_the_token(tmp_path, hub):
    run, faults = tmp_path / "run", []
    commit(run, 1)
    hub.faults["/api/"] = [401] * 50
    assert not uploader(run, HubRemote(HUB), on_fault=faults.append).attempt()
    assert "does not accept the token" in faults[0] and TOKEN not in faults[0] + (run / station.OUTBOX).read_text()


def test_a_public_repository_and_a_missing_token_are_refused(tmp_path, hub, monkeypatch):
    run, faults = tmp_path / "run", []
    commit(run, 1)
    hub.add("me/first", Path(__file__).parent / "faults")
    assert not uploader(run, HubRemote(HUB), on_fault=faults.append).attempt()
    assert "the repository is public" in faults[0] and not list(checkpoints_on(hub))
    monkeypatch.delenv("HF_TOKEN")
    assert not uploader(run, HubRemote("hf://me/second"), on_fault=faults.append).attempt()
    assert "not found without a valid token for the Hub; log in with `hf auth login` or set HF_TOKEN" in faults[1]


def test_a_broken_newest_commit_falls_back_to_the_one_before(tmp_path, hub):
    run = tmp_path / "run"
    for step in (1, 2):
        commit(run, step)
        uploader(run, HubRemote(HUB)).attempt()
    tip = hub.repos["me/first"].branches["checkpoints"][-1]
    tip.files = {**tip.files, store.ADAPTER: b"x" * len(tip.files[store.ADAPTER])}
    path, told = fetched(tmp_path, HubRemote(HUB))
    assert content(path) == content(store.checkpoint_folder(run, 1)) and "SHA-256" in told[0]


@pytest.fixture(scope="module")
def server():
    """A server that speaks S3, with an empty bucket."""
    with s3() as found:
        yield found


@pytest.fixture
def bucket(server, monkeypatch):
    """The server, for this process too."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.hold, server.faults = None, {}
    server.held.clear()
    server.release.clear()
    fsspec.filesystem("s3", skip_instance_cache=True).makedirs("bucket", exist_ok=True)
    yield server
    server.release.set()


def test_s3_keeps_and_gives_back_a_checkpoint_and_answers_with_errors(tmp_path, bucket):
    run, url = tmp_path / "run", f"s3://bucket/{tmp_path.name}"
    bucket.faults = {rf"PUT .*{tmp_path.name}": [500, 503], rf"GET .*{tmp_path.name}": [429]}
    for step in (1, 2, 3, 4):
        checkpoint = commit(run, step)
        assert uploader(run, FileRemote(url), keep=2).attempt()
    assert {name.split("/")[1][:13] for name in bucket.names(tmp_path.name)} == {"step-00000003", "step-00000004"}
    path, _ = fetched(tmp_path, FileRemote(url))
    assert content(path) == content(checkpoint.path) == content(checkpoint_at(url))
    older = bucket.names(tmp_path.name)[0].split("/")[1]
    assert store.open_checkpoint(checkpoint_at(f"{url}/{older}")).step == 3


def test_a_bucket_that_does_not_exist_is_told_and_not_made(tmp_path, bucket):
    run, faults = tmp_path / "run", []
    commit(run, 1)
    assert not uploader(run, FileRemote("s3://nowhere/run"), on_fault=faults.append).attempt()
    assert "FileNotFoundError: The specified bucket does not exist" in faults[0]


STEPS = 8


def test_the_keeper_dies_in_the_middle_of_an_upload_and_the_run_goes_on_elsewhere(
    tmp_path, bucket, recipe_file, reference, faults
):
    """Real processes: the store holds an upload, training goes on, the keeper is killed, an empty folder resumes."""
    url = f"s3://bucket/{tmp_path.name}"
    more = ("--set", f"checkpoint.remote={url}", "--set", "checkpoint.every_steps=2")
    process = runs.start(recipe_file, tmp_path / "run", *more, environment=faults(hold(3)) | bucket.environment)
    wait_until(lambda: any(name.endswith(MANIFEST) for name in bucket.names(tmp_path.name)), process)
    bucket.hold = rf"PUT .*{tmp_path.name}/step-0000000[468].*{store.OPTIMIZER}"
    faults.release()
    wait_until(lambda: bucket.held, process)
    wait_until(lambda: runs.steps_shown(tmp_path / "run")[-1:] == [STEPS], process)  # nobody waits for the store
    keeper = psutil.Process(process.pid)
    family = [keeper, *keeper.children(recursive=True)]
    process.kill()
    wait_until(lambda: runs.gone(family))
    bucket.hold = None
    bucket.release.set()
    names = bucket.names(tmp_path.name)
    assert {name.split("/")[1][:13] for name in names if name.endswith(MANIFEST)} == {"step-00000002"}
    assert any(re.search("step-0000000[468]", name) for name in names)
    printed = runs.train(recipe_file, tmp_path / "elsewhere", *more, environment=bucket.environment)
    assert f"step 2 was downloaded from {url} and verified" in printed
    assert runs.state_hash(tmp_path / "elsewhere", STEPS) == runs.state_hash(reference(recipe_file), STEPS)
    assert runs.steps_shown(tmp_path / "elsewhere") == list(range(2, STEPS + 1))  # of step 2 only the line
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(bucket.environment[name].encode() in written for name in bucket.environment if "KEY" in name)
    assert runs.events(tmp_path / "elsewhere", "uploaded")[-1]["step"] == STEPS


def test_an_end_of_a_run_waits_a_limited_time_and_push_uploads_the_rest(tmp_path, bucket, recipe_file, copied):
    """The process that uploads is real; the store does not answer."""
    url = f"s3://bucket/{tmp_path.name}"
    run = copied(recipe_file)
    newest = store.find(run).latest
    changed = newest.manifest.to_dict()
    changed["recipe"]["checkpoint"]["remote"] = url
    (newest.path / MANIFEST).write_bytes(manifest_bytes(changed))
    lease = take(run, run_id=newest.manifest.run.run_id, above=1)
    bucket.hold = rf"PUT .*{tmp_path.name}"
    told, faults = [], []
    sending = Uploads(lease, url, 3, on_upload=lambda **facts: told.append(facts), on_fault=faults.append)
    sending.poll()
    wait_until(lambda: bucket.held)
    child = psutil.Process(sending._process.pid)
    message = sending.finish(lambda: 0.1)
    assert f"{url}: step {STEPS} is not uploaded yet" in message and f"`lora-kit push {run}`" in message
    assert not child.is_running() and not told and not faults
    in_use = CliRunner().invoke(app, ["push", str(run)])
    assert in_use.exit_code == 2 and "is training here" in in_use.output
    lease.release()
    bucket.hold = None
    bucket.release.set()
    first = CliRunner().invoke(app, ["push", str(run)])
    assert first.exit_code == 0 and f"uploaded {url} (step {STEPS})" in first.output
    again = CliRunner().invoke(app, ["push", str(run), "--json"])
    assert json.loads(again.output) == {"step": STEPS, "url": url, "made": False}
