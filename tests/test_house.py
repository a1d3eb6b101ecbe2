"""The house's rules that can be checked: layers, cycles, sizes, who imports what, three frames to the model."""

import ast
import json
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from lora_kit import trainer
from lora_kit.kernels.attention import inner_of
from lora_kit.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_kit"
LAYERS = [
    {"errors"},
    {"recipe", "schema", "journal", "console", "notebook"},
    {"data", "source", "base", "adapter", "targets", "objective", "processes", "kernels"},
    {"checkpoint", "supervise", "stopping", "optim"},
    {
        "trainer",
        "job",
        "run",
        "trackers",
        "check",
        "shapes",
        "portions",
        "evaluation",
        "generation",
        "export",
        "hub",
        "card",
        "chat",
        "merging",
        "report",
        "drill",
        "progress",
        "profiling",
        "publisher",
        "resolved",
    },
    {"cli", "__init__", "__main__", "integrations"},
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "assets" not in path.parts)


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports_of(path):
    """Every module that a file imports, with whether it does so at its top level."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, top
            yield from ((f"{node.module}.{alias.name}", top) for alias in node.names)


def layer_of(module):
    room = module.split(".")[1] if "." in module else "__init__"
    return next((number for number, rooms in enumerate(LAYERS) if room in rooms), None)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down_the_layers(path):
    own = layer_of(name_of(path))
    assert own is not None, f"{path} is in no layer"
    for module, _ in imports_of(path):
        if module.startswith("lora_kit."):
            assert layer_of(module) <= own, f"{name_of(path)} imports {module} from a higher layer"


def test_there_are_no_import_cycles():
    names = {name_of(path): path for path in MODULES}
    edges = {name: {module for module, _ in imports_of(path) if module in names} for name, path in names.items()}
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_, name])
        if name not in done:
            open_.append(name)
            for other in edges[name] - {name}:
                visit(other)
            done.add(open_.pop())

    for name in names:
        visit(name)


ONLY = {
    "accelerate": {"processes", "base", "trainer", "trackers"},
    "peft": {"adapter", "targets", "kernels", "generation", "evaluation", "job", "chat"},
}


@pytest.mark.parametrize("library", ONLY)
def test_only_a_few_rooms_import(library):
    for path in MODULES:
        used = any(module.split(".")[0] == library for module, _ in imports_of(path))
        assert not used or name_of(path).split(".")[1] in ONLY[library], f"{path} imports {library}"


LIGHT = ["recipe", "journal", "console", "errors", "cli", "data.order", "data.packing", "checkpoint.store"]
LIGHT += [
    "checkpoint.lease",
    "checkpoint.live",
    "checkpoint.resume",
    "supervise.launch",
    "supervise.keeper",
    "stopping",
]
LIGHT += ["source", "check", "shapes", "portions", "trackers", "card", "hub"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_no_torch(module):
    code = f"import sys, lora_kit.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_takes_half_a_second_of_cpu_at_most():
    code = "import time\nfrom lora_kit.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass\n"
    code += "import sys; sys.exit(f'{time.process_time():.2f} s' if time.process_time() > 0.5 else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("path", [*MODULES, *sorted((PACKAGE / "assets").glob("*.py"))], ids=name_of)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{path}:{node.lineno} {node.name}"


def test_nothing_unpickles():
    for path in MODULES:
        assert not {"pickle", "torch.load", "joblib", "dill"} & {module for module, _ in imports_of(path)}, path
        assert "torch.load(" not in path.read_text(), path


def test_three_frames_of_ours_lead_from_the_command_to_the_model(recipe_file, tmp_path, monkeypatch):
    from lora_kit.cli import app

    stacks = []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as a launcher does: else a process of its own trains
    prepare = trainer.prepare_job

    def watched(*arguments, **named):
        job = prepare(*arguments, **named)
        inner_of(job.model).base_model.register_forward_pre_hook(lambda *_: stacks.append(traceback.extract_stack()))
        return job

    monkeypatch.setattr(trainer, "prepare_job", watched)
    with pytest.raises(SystemExit):
        app(
            [
                "train",
                str(recipe_file),
                "--out",
                str(tmp_path / "run"),
                "--set",
                "train.steps=1",
            ]
        )
    ours = [frame.name for frame in stacks[0] if Path(frame.filename).is_relative_to(PACKAGE)]
    assert ours == ["train", "train", "sft"]


def test_every_test_file_states_its_promise():
    for path in (ROOT / "tests").glob("test_*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_package_promises_nothing_it_does_not_have():
    import lora_kit

    assert all(hasattr(lora_kit, name) for name in lora_kit.__all__)
    assert load_recipe is lora_kit.load_recipe


def test_the_readme_has_a_line_for_every_room():
    map_ = (ROOT / "README.md").read_text().split("```\nlora_kit/\n")[1].split("```")[0]
    rooms = {path.relative_to(PACKAGE) for path in MODULES if not path.name.startswith("__")}
    whole = ("checkpoint", "supervise", "kernels")
    missing = [room for room in rooms if not re.search(rf"^  {room}\s", map_, re.M) and room.parts[0] not in whole]
    assert not missing and all(f"  {room}/ " in map_ for room in whole)


PAGE = ROOT / "docs" / "reliability.md"


def test_every_test_that_a_page_names_exists():
    texts = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    defined = set(re.findall(r"^def (test_\w+)\(", "\n".join(texts), re.M))
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert len(named) > 50 and not named - defined


def test_the_page_on_reliability_quotes_what_was_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "resilience.json").read_text())["measures"]
    kills, stall, sizes = found["kills"], found["stall"], [found["resume_time"][one] for one in ("30M", "160M")]
    own, restart = kills["ours"], found["restart"]
    resumed = own["kills"] - own["resumes_that_failed"]
    quoted = [
        f"{resumed} of {own['kills']} resumes, {own['finished_steps_lost']} finished steps lost",
        f"{kills['trainer']['resumes_that_failed']} of {kills['trainer']['kills']} resumes fail",
        f"{restart['ours']['final_bytes_equal']} of {restart['ours']['trials']} go on by themselves",
        f"{restart['trainer']['went_on_by_themselves']} of {restart['trainer']['trials']} go on",
        " and ".join(f"{one['ours_seconds']} s" for one in sizes),
        " and ".join(f"{one['trainer_seconds']} s" for one in sizes),
        f"{stall['ours_stall_share']:.3%} of the step; the whole step x {stall['ours_step_with_over_without']:.3f}",
        f"durable and exited in {found['sigterm']['ours_median_seconds']} s",
        f"{found['damage']['ours']['final_bytes_equal']} of {found['damage']['ours']['trials']} noticed",
        found["crash_states"]["said"],
        found["writer_kills"]["said"],
    ]
    page = PAGE.read_text()
    assert all(one["reached"] for one in found.values()) and not [text for text in quoted if text not in page]
