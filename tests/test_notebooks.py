"""The notebooks run from top to bottom, are kept without outputs, and agree with their text."""

import json
import re
import shutil
from pathlib import Path

import pytest
from runs import WAIT_SECONDS

nbformat = pytest.importorskip("nbformat")
jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHORT = {  # what a minute on one core allows
    "01_first_adapter": ["train.steps=4", "evaluate.generate=2", "data.max_examples=60", "data.validation=0.2"],
    "02_your_data": ["train.steps=4", "evaluate.generate=2"],
    "03_two_processes": ["train.steps=2", "data.max_examples=60", "data.validation=null", "evaluate.generate=0"],
    "04_preferences": ["train.steps=3", "train.epochs=null", "data.max_examples=30", "data.validation=0.2"],
    "05_kill_and_resume": ["train.steps=24", "data.validation=null", "evaluate.generate=0"],
}
SHARED_IMPORTS = "import datasets, torch._dynamo, transformers.models.llama.modeling_llama\n"
QUIET = r"\x1b|Warning|ipywidgets|Traceback|DIFFERENT"  # nothing of this is for a newcomer's eyes


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook, kind):
    """Return what a notebook's cells show, as text of one kind."""
    for cell in code_cells(notebook):
        for one in cell.outputs:
            yield one.text if one.output_type == "stream" else one.get("data", {}).get(kind, "")


def copy_checkout(folder):
    """Copy what the notebooks need."""
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns("runs", "orders"))


def execute(path, *more):
    """Run a notebook with few steps and further parameters, and return it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += "\n".join(["", f"changes = {SHORT[path.stem]}", *more])
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=WAIT_SECONDS, resources=resources).execute()
    return notebook


def share_imports(folder, monkeypatch):
    """Let a kernel import at its start what each process of its launches would import in five seconds."""
    startup = folder / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "imports.py").write_text(SHARED_IMPORTS)
    monkeypatch.setenv("IPYTHONDIR", str(folder))


@pytest.fixture
def executed(shared, tmp_path, monkeypatch):
    """Run a notebook once for all workers; return it and the folder in which it ran."""

    def run(name):
        def fill(folder):
            copy_checkout(folder)
            with monkeypatch.context() as patch:
                if name == "03_two_processes":  # the others show that imports print nothing
                    share_imports(tmp_path / "ipython", patch)
                nbformat.write(execute(folder / "notebooks" / f"{name}.ipynb"), folder / "executed.ipynb")

        folder = shared(f"notebook-{name}", fill)
        return nbformat.read(folder / "executed.ipynb", as_version=4), folder / "notebooks"

    return run


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """Be somebody without a Hub token, whose Python finds this checkout."""
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_not_kept(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in code_cells(notebook)), "run `make notebooks`"
    assert set(notebook.metadata) == {"kernelspec"}, "run `make notebooks`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_and_text_agree(path):
    def plain(notebook):
        return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]

    text = jupytext.read(path.with_suffix(".py"))
    assert plain(text) == plain(nbformat.read(path, as_version=4)), "run `make notebooks`"


def test_each_notebook_is_executed_here():
    assert [path.stem for path in NOTEBOOKS] == sorted(SHORT)
    assert [path.stem for path in sorted((ROOT / "notebooks").glob("*.py"))] == sorted(SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_runs_and_shows_nothing_ugly(name, executed):
    notebook, _ = executed(name)
    shown = "\n".join([*outputs(notebook, "text/plain"), *outputs(notebook, "text/html")])
    assert not re.search(QUIET, shown), re.search(f".*({QUIET}).*", shown).group()


def test_the_first_shows_progress_losses_and_both_answers(executed):
    notebook, place = executed("01_first_adapter")
    html = "".join(outputs(notebook, "text/html"))
    assert "step 4 of 4" in html and "<polyline" in html and "held-out, adapter" in html
    text = "".join(outputs(notebook, "text/plain"))
    assert text.count("before:") == text.count("after:") == 3
    assert "Not pushed: there is no Hub token" in text
    assert (place / "runs" / "first" / "result.json").is_file()


def test_the_first_pushes_with_a_token_and_a_name(executed, monkeypatch, tmp_path):
    standin = pytest.importorskip("hub_standin")
    _, place = executed("01_first_adapter")
    shutil.copytree(place.parent, tmp_path / "checkout")  # with its run, so that nothing is left to train
    with standin.serve() as hub:
        for name, value in standin.environment(hub, tmp_path).items():
            monkeypatch.setenv(name, value)
        notebook = execute(tmp_path / "checkout" / "notebooks" / "01_first_adapter.ipynb", "hub_name = 'me/first'")
        assert "me/first" in "".join(outputs(notebook, "text/plain"))
        assert "adapter_model.safetensors" in hub.files("me/first") and hub.repos["me/first"].private


def test_the_second_colours_what_is_trained_and_finds_both_mistakes(executed):
    notebook, _ = executed("02_your_data")
    html = "".join(outputs(notebook, "text/html"))
    assert re.search(r'<span style="[^"]*background-color[^"]*">\d x \w+ -&gt; \w+&lt;\|end\|&gt;</span>', html)
    assert "orders.jsonl:3: messages[1].role is" in html and "orders.jsonl:7:" in html
    assert "the recipe cannot start" in html and "the recipe can start" in html


def test_the_third_makes_equal_bytes(executed):
    notebook, place = executed("03_two_processes")
    assert "".join(outputs(notebook, "text/plain")).count("equal") >= 2
    (started,) = (line for line in (place / "runs/two/events.jsonl").read_text().splitlines() if "started" in line)
    assert '"processes": 2' in started


def test_the_fifth_kills_a_run_twice_and_ends_with_equal_bytes(executed):
    notebook, place = executed("05_kill_and_resume")
    told = "".join(outputs(notebook, "text/plain"))
    assert told.count("   equal\n") == 2 and "finished all 24 steps" in told
    assert re.search(r"steps lost +0\n", told) and told.count("interrupted ") == 2, told
    kinds = [json.loads(line)["kind"] for line in (place / "runs/killed/events.jsonl").read_text().splitlines()]
    assert kinds.count("resumed") == 2 and "restart" in kinds
