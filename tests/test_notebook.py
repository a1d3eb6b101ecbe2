"""What a cell shows is right and safe HTML, and a kernel can be used again whatever happened in it."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest
from runs import WAIT_SECONDS, state_hash, wait_until

import lora_kit as lk
from lora_kit.check import check
from lora_kit.errors import DataError, Stopped
from lora_kit.kernels.cpu.allocator import PRODUCTS_KEPT
from lora_kit.views import notebook
from lora_kit.views.preview import Example, Piece, Preview

jupyter = pytest.importorskip("jupyter_client.manager")


def records(*losses, **more):
    return [{"step": step, "loss": loss, **more} for step, loss in enumerate(losses, start=1)]


def points(svg):
    (line,) = ElementTree.fromstring(svg).findall("{*}polyline")
    return [tuple(map(float, point.split(","))) for point in line.get("points").split()]


@pytest.mark.quick
def test_a_curve_falls_with_the_loss_and_leaves_room_for_the_steps_to_come():
    drawn = points(notebook.curve(records(4.0, 2.0, 1.0), steps=6))
    (first, high), (_, middle), (last, low) = drawn
    floor = notebook.HEIGHT - notebook.BOTTOM
    assert high < middle < low < floor, "pixels grow downwards"
    assert floor - middle == pytest.approx((floor - high) / 2, abs=0.1)
    assert last - notebook.LEFT == pytest.approx((notebook.WIDTH - notebook.RIGHT - notebook.LEFT) / 2, abs=0.1)
    assert first < last


@pytest.mark.parametrize("losses", [(), (1.0,), (float("nan"), 1.0), (float("inf"), float("nan"))])
def test_there_is_no_curve_of_less_than_two_numbers(losses):
    assert notebook.curve(records(*losses), steps=9) == ""


def test_a_long_run_is_drawn_with_few_points_up_to_its_last():
    drawn = points(notebook.curve(records(*(1 / step for step in range(1, 9000))), steps=8999))
    assert len(drawn) <= notebook.MAX_POINTS
    assert drawn[-1][0] == notebook.WIDTH - notebook.RIGHT


def test_held_out_losses_are_dots():
    svg = notebook.curve([*records(3.0, 2.0), {"step": 3, "loss": 1.0, "held_out_loss": 1.5}], steps=3)
    assert len(ElementTree.fromstring(svg).findall("{*}circle")) == 1 and "held-out loss" in svg


def test_nothing_of_the_user_becomes_markup(recipe_file):
    hostile = "<script>alert('&')</script>"
    pieces = tuple(Piece(hostile, trained, (1,), (hostile,)) for trained in (False, True))
    shown = Preview((Example(0, hostile, pieces),))
    assert "<script" not in shown._repr_html_() + notebook.table(hostile, [(hostile, hostile)], caption=hostile)
    assert f"{hostile}⟦{hostile}⟧" in repr(shown)
    report = check(lk.load_recipe(recipe_file))
    assert "<user>" not in report._repr_html_() and "&lt;user&gt;" in report._repr_html_()
    assert repr(report).endswith("the recipe can start")


def test_an_error_is_shown_without_its_frames():
    assert DataError("a.jsonl:1: no\na.jsonl:2: no")._render_traceback_() == ["error: a.jsonl:1: no", "a.jsonl:2: no"]
    assert Stopped("after step 3")._render_traceback_() == ["stopped: after step 3"]


def test_a_run_shows_itself(recipe_file, tmp_path, copied):
    assert "nothing was trained here yet" in lk.Run(tmp_path)._repr_html_()
    run = lk.Run(copied(recipe_file))
    shown = lk.Run(str(run.folder))._repr_html_()
    assert "finished, step 8 of 8" in shown and "step-00000008" in shown and "<polyline" in shown


class Kernel:
    """A kernel, as a notebook has one."""

    def __init__(self, folder):
        self.manager, self.client = jupyter.start_new_kernel(cwd=str(folder), startup_timeout=WAIT_SECONDS)

    def run(self, code):
        """Run a cell to its end; return its reply, what it printed and the last state of what it displayed."""
        printed, displayed = [], {}

        def note(message):
            content = message["content"]
            if message["msg_type"] == "stream":
                printed.append(content["text"])
            elif message["msg_type"] in ("display_data", "update_display_data"):
                displayed[content["transient"].get("display_id")] = content["data"]
            elif message["msg_type"] == "error":
                printed.extend(content["traceback"])

        reply = self.client.execute_interactive(code, timeout=WAIT_SECONDS, output_hook=note)
        return reply["content"], "".join(printed), list(displayed.values())

    def interrupt(self, code, when):
        """Run a cell, press stop when `when()` is true, and return the cell's reply."""
        cell = self.client.execute(code, stop_on_error=False)  # else what is asked next may be dropped
        wait_until(when)
        self.manager.interrupt_kernel()
        while (reply := self.client.get_shell_msg(timeout=WAIT_SECONDS))["parent_header"]["msg_id"] != cell:
            pass
        return reply["content"]

    def begin_again(self):
        """Be a kernel in which nothing happened."""
        self.manager.restart_kernel(now=True)
        self.client.wait_for_ready(timeout=WAIT_SECONDS)


@pytest.fixture(scope="module")
def started_kernel(tmp_path_factory):
    """One kernel for all tests, because a kernel can be used again whatever happened in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(lk.__file__).parents[1]))
        patch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRODUCTS_KEPT)  # as a run leaves it
        one = Kernel(tmp_path_factory.mktemp("kernel"))
        yield one
    one.client.stop_channels()
    one.manager.shutdown_kernel(now=True)


def go_to(folder, kernel):
    reply, printed, _ = kernel.run(f"import os; os.chdir({str(folder)!r})")
    assert reply["status"] == "ok", printed


@pytest.fixture
def kernel(started_kernel, tmp_path):
    """The kernel, in this test's folder."""
    go_to(tmp_path, started_kernel)
    return started_kernel


# most of what a process of a launch imports, once for all of them: each would take five seconds
SHARED_IMPORTS = "import datasets, torch._dynamo, transformers.models.llama.modeling_llama"


@pytest.fixture
def launching_kernel(kernel, tmp_path):
    """The kernel before it trains: accelerate launches nothing from one with bitsandbytes imported, as peft does."""
    if kernel.run("import sys; assert 'peft' not in sys.modules")[0]["status"] == "error":
        kernel.begin_again()
        go_to(tmp_path, kernel)
    reply, printed, _ = kernel.run(SHARED_IMPORTS)
    assert reply["status"] == "ok", printed
    return kernel


LAUNCH = """
free_port = dict(rdzv_backend='c10d', rdzv_endpoint='localhost:0')  # another test may be using accelerate's
import os, psutil, torch
import lora_kit as lk
from accelerate import notebook_launcher
recipe = lk.load_recipe('recipe.yaml')
def found():
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    environment = {key: one for key, one in os.environ.items() if not key.startswith('TORCHELASTIC_')}  # torch's own
    return environment, torch.get_num_threads(), torch.distributed.is_initialized(), children
torch.set_num_threads(2)
before = found()
lk.train(recipe, 'one')
lk.train(recipe, 'again')
notebook_launcher(lambda: lk.train(recipe, 'two'), num_processes=2, **free_port)
lk.train(recipe, 'alone')
assert found() == before, (found(), before)
"""


@pytest.mark.slow
def test_the_stop_button_ends_all_processes_of_a_launch(recipe_file, tmp_path, launching_kernel):
    run = lk.Run(tmp_path / "two")
    cell = LAUNCH.split("torch.set_num_threads")[0].replace("'recipe.yaml'", "'recipe.yaml', ['train.steps=1000000']")
    cell += "notebook_launcher(lambda: lk.train(recipe, 'two'), num_processes=2, **free_port)"
    reply = launching_kernel.interrupt(cell, lambda: len(run.metrics) > 3)
    assert reply["status"] == "error", reply
    assert run.latest.name == f"step-{run.metrics[-1]['step']:08d}"
    assert json.loads((run.folder / "lease.json").read_text())["holder"] is None
    reply, printed, _ = launching_kernel.run("assert not found()[2] and not found()[3], found()")
    assert reply["status"] == "ok", printed


@pytest.mark.slow
def test_alone_together_and_alone_again_in_one_kernel(recipe_file, tmp_path, launching_kernel):
    alone, together = LAUNCH[LAUNCH.index("lk.train") : LAUNCH.index("notebook_launcher(")], LAUNCH.splitlines(True)[-3]
    cell = LAUNCH.replace(alone + together, together + alone) if find_spec("bitsandbytes") else LAUNCH
    reply, printed, shown = launching_kernel.run(cell)
    assert reply["status"] == "ok", printed
    names = [one["text/plain"].split(":")[0] for one in shown[1::2]]
    assert sorted(names) == ["again", "alone", "one", "two"] and names[-1] == "alone"
    hashes = {state_hash(tmp_path / name, 8) for name in ("one", "again", "two", "alone")}
    assert len(hashes) == 1
    assert "Warning" not in printed and "2 process(es) on cpu" in printed


TRAIN = "import lora_kit as lk\nlk.train(lk.load_recipe('recipe.yaml', {changes}), '{out}')"


def test_the_stop_button_saves_and_the_same_cell_goes_on(recipe_file, tmp_path, kernel):
    run = lk.Run(tmp_path / "run")
    cell = TRAIN.format(changes=["train.steps=1000000"], out="run")
    for reached in (3, 9):
        reply = kernel.interrupt(cell, lambda: len(run.metrics) > reached)  # noqa: B023
        assert reply["status"] == "error" and reply["ename"] == "Stopped", reply
        assert re.fullmatch(r"stopped: run: stopped by a signal after step \d+ of 1000000.*", *reply["traceback"])
        assert run.latest.name == f"step-{run.metrics[-1]['step']:08d}"
        assert json.loads((run.folder / "lease.json").read_text())["holder"] is None
    first, second = (event["step"] for event in run.events if event["kind"] == "stopped")
    (resumed,) = (event["step"] for event in run.events if event["kind"] == "resumed")
    assert first == resumed < second


def test_a_resumed_panel_shows_the_whole_curve(recipe_file, copied, kernel):
    (copied(recipe_file) / "result.json").unlink()
    more = TRAIN.replace("'{out}')", "'run', accept=['train.steps'])").format(changes=["train.steps=10"])
    reply, printed, (panel, table) = kernel.run(more)
    assert reply["status"] == "ok", printed
    assert "\x1b" not in printed
    assert len(points(re.search("<svg.*</svg>", panel["text/html"]).group())) >= 10
    assert panel["text/plain"].startswith("step 10 of 10 · loss ")
    assert table["text/plain"].startswith("run: 10 steps done")
