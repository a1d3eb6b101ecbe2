"""The house's rules that can be checked: layers, cycles, sizes, who imports what, four frames to the model."""

import ast
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from runs import WAIT_SECONDS

from lora_kit.kernels.attention import inner_of
from lora_kit.recipe.load import load_recipe
from lora_kit.training import loop

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_kit"
LAYERS = [
    {"version", "files", "host", "randomness", "errors", "views", "assets"},
    {"recipe", "kernels"},
    {"data"},
    {"runs"},
    {"model", "supervise"},
    {"artifacts"},
    {"training"},
    {"check"},
    {"integrations"},
    {"cli", "__init__"},
    {"__main__"},
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "assets" not in path.parts)


ROOMS = set().union(*LAYERS)


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
            if node.module != "lora_kit" or any(alias.name not in ROOMS for alias in node.names):
                yield node.module, top
            yield from ((f"{node.module}.{alias.name}", top) for alias in node.names)


def room_of(module):
    """The room of a module; what is imported from `lora_kit` itself comes from its `__init__`, the highest."""
    return module.split(".")[1] if module.split(".")[1:2] and module.split(".")[1] in ROOMS else "__init__"


def layer_of(room):
    return next(number for number, rooms in enumerate(LAYERS) if room in rooms)


def test_the_layers_name_what_exists_and_all_of_it():
    flat = {path.stem for path in PACKAGE.glob("*.py")}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert flat | folders == ROOMS and len(flat) <= 9


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down_the_layers(path):
    own = room_of(name_of(path))
    for module, _ in imports_of(path):
        if module.split(".")[0] == "lora_kit" and room_of(module) != own:
            assert layer_of(room_of(module)) < layer_of(own), f"{name_of(path)} imports {module}, which is not below it"


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
    "accelerate": {"training", "runs", "integrations"},
    "peft": {"model", "kernels", "artifacts", "training", "integrations"},
}


@pytest.mark.parametrize("library", ONLY)
def test_only_a_few_rooms_import(library):
    for path in MODULES:
        used = any(module.split(".")[0] == library for module, _ in imports_of(path))
        assert not used or name_of(path).split(".")[1] in ONLY[library], f"{path} imports {library}"


LIGHT = [
    "cli",
    "check",
    "data.order",
    "data.packing",
    "model.source",
    "model.sizes",
    "training.ahead",
    "training.estimate",
    "training.micro_batches",
    "training.request",
]
LIGHT += ["artifacts.card", "artifacts.hub", "kernels.limits"]
LIGHT += [
    name_of(path).removeprefix("lora_kit.") for path in MODULES if room_of(name_of(path)) in ("runs", "supervise")
]
LIGHT += ["recipe.load", "views.console", "views.notebook"]


def test_light_modules_import_no_torch():
    """In one process, which is as strict as one each: torch is there in the end if any of them imports it."""
    code = "import sys\nfrom importlib import import_module\nfor module in sys.argv[1:]:\n"
    code += "    import_module(f'lora_kit.{module}')\n    assert 'torch' not in sys.modules, module"
    done = subprocess.run([sys.executable, "-c", code, *LIGHT], capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], {"torch", "numpy", "pydantic", "transformers", "datasets"}),
        (["check", str(ROOT / "recipes" / "quickstart.yaml")], {"torch", "peft", "accelerate"}),
    ],
)
def test_what_takes_seconds_is_not_imported_for_an_answer_at_once(arguments, heavy):
    """benchmarks/startup.py measures the time."""
    code = "import sys\nfrom lora_kit.cli import app\ntry: app(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=WAIT_SECONDS)
    assert not heavy & set(done.stdout.splitlines()[-1].split())


def test_nothing_unpickles():
    for path in MODULES:
        assert not {"pickle", "torch.load", "joblib", "dill"} & {module for module, _ in imports_of(path)}, path
        assert "torch.load(" not in path.read_text(), path
        assert not re.search(r"(broadcast|gather|scatter|send|recv)_object", path.read_text()), path


def test_four_frames_of_ours_lead_from_the_command_to_the_model(recipe_file, tmp_path, monkeypatch):
    from lora_kit.cli import app

    stacks = []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as a launcher does: else a process of its own trains
    make_job = loop.make_job

    def watched(*arguments, **named):
        job = make_job(*arguments, **named)
        inner_of(job.model).base_model.register_forward_pre_hook(lambda *_: stacks.append(traceback.extract_stack()))
        return job

    monkeypatch.setattr(loop, "make_job", watched)
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
    assert ours == ["train", "train", "loss", "cross_entropy_of_groups"]


def test_every_test_file_states_its_promise():
    for path in (ROOT / "tests").glob("test_*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_package_promises_nothing_it_does_not_have():
    import lora_kit

    assert all(hasattr(lora_kit, name) for name in lora_kit.__all__)
    assert load_recipe is lora_kit.load_recipe


def test_the_readme_has_a_line_for_every_room():
    map_ = (ROOT / "README.md").read_text().split("```\nlora_kit/\n")[1].split("```")[0]
    flat = {f"{room}.py" for room in ROOMS if (PACKAGE / f"{room}.py").is_file() and not room.startswith("__")}
    folders = {f"{room}/" for room in ROOMS if (PACKAGE / room).is_dir()}
    assert {line.split()[0] for line in map_.splitlines() if re.match(r"  \S", line)} == flat | folders
