"""Every problem of a recipe is reported at once, with its file, line and the likely intention; none is ignored."""

import ast
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_kit.data.preflight import KINDS
from lora_kit.data.sources import load as load_records
from lora_kit.errors import DataError, RecipeError
from lora_kit.recipe.load import SECTIONS, difference, dump, load_recipe, resolve_path, similar_path
from lora_kit.recipe.reference import json_schema, reference

ROOT = Path(__file__).parents[1]
MINIMAL = "base: {repo: a/b}\ndata: {train: x.jsonl}\ntrain: {steps: 3}\n"


@pytest.fixture
def problems_of(tmp_path):
    """The lines of the error that loading a recipe raises, without the folder."""

    def load(text, *overrides):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(RecipeError) as caught:
            load_recipe(tmp_path / "r.yaml", overrides)
        return str(caught.value).replace(f"{tmp_path}/", "").splitlines()

    return load


def load(tmp_path, text, *overrides):
    (tmp_path / "r.yaml").write_text(text)
    return load_recipe(tmp_path / "r.yaml", overrides)


@pytest.mark.quick
def test_all_problems_are_reported_at_once_with_their_lines(problems_of):
    lines = problems_of(
        "base:\n  rep: x\n  dtype: float16\ndata:\n  train: 5\ntrain:\n  steps: 1.5\nadaptor: {}\n",
        "optim.warmup=2",
    )
    assert lines == [
        "r.yaml:1: base.repo: missing; A Hub name, a local folder, or `builtin:base` for the tiny model in lora_kit.",
        "r.yaml:3: base.dtype: found 'float16', expected 'bfloat16' or 'float32'",
        "r.yaml:2: base.rep: unknown key; did you mean 'repo'?",
        "r.yaml:5: data.train: found 5, expected string",
        "--set optim.warmup=2: optim.warmup: found 2, expected less than or equal to 1",
        "r.yaml:7: train.steps: found 1.5, expected integer",
        "r.yaml:8: adaptor: unknown key; did you mean 'adapter'?",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "base: {repo: a/b}\nbase: {repo: c/d}\n",
            'r.yaml:2: found duplicate key "base"; write each key once',
        ),
        ("base: [1,\n", "r.yaml:2: not YAML: expected the node content, but found '<stream end>'"),
        ("", "r.yaml: a recipe is a mapping of sections"),
        ("- base\n", "r.yaml: a recipe is a mapping of sections"),
        (MINIMAL + "optim: 3\n", "r.yaml:4: optim: found 3, expected dictionary or instance of Optim"),
        (MINIMAL.replace("{steps: 3}", "{}"), "r.yaml:3: train: set exactly one of steps and epochs"),
        (
            MINIMAL.replace("steps: 3", "steps: 3, epochs: 1"),
            "r.yaml:3: train: set exactly one of steps and epochs",
        ),
        (
            MINIMAL.replace("x.jsonl", "x.jsonl, validation: 1.5"),
            "r.yaml:2: data.validation: found 1.5, expected",
        ),
        (MINIMAL + "adapter: {rank: no}\n", "r.yaml:4: adapter.rank: found 'no', expected integer"),
        (MINIMAL + "1: 2\n", "r.yaml:1: 1: unknown key; expected one of base, data, adapter, objective"),
        (MINIMAL + "adapter: {targets: !own a}\n", "r.yaml:4: not YAML: could not determine a constructor for the tag"),
        (MINIMAL + "adapter: {targets: []}\n", "r.yaml:4: adapter.targets: found [], expected"),
        (
            MINIMAL + "quantization: nf4\n",
            "r.yaml:4: quantization: unknown key; did you mean base.quantization?",
        ),
        (
            MINIMAL.replace("steps: 3", "steps: 3, micro_batch_tokens: 100"),
            "r.yaml:1: train.micro_batch_tokens is 100, less than data.sequence_length (2048)",
        ),
    ],
)
def test_a_problem_is_reported_with_its_file_and_line(problems_of, text, line):
    assert any(problem.startswith(line) for problem in problems_of(text)), problems_of(text)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.lr=1", "--set optim.lr=1: optim.lr: unknown key; did you mean optim.learning_rate?"),
        ("optim.nope=1", "--set optim.nope=1: optim.nope: unknown key; expected one of name"),
        ("train.learning_rate=1", "--set train.learning_rate=1: train.learning_rate: unknown key; did you mean optim."),
        ("train.epochs=1e300", "--set train.epochs=1e300: train.epochs: found 1e300, expected less than or equal to 1"),
        ("optim.learning_rate=1e308", "--set optim.learning_rate=1e308: optim.learning_rate: found 1e308, expected "),
        ("data.train=a\x01b", "--set data.train=a\x01b: 'a\\x01b' is not a YAML value"),
        ('data.train="a\\0b"', "r.yaml:2: data: train is 'a\\x00b', which contains a control character"),
        ("data.train=2024-99-99", "--set data.train=2024-99-99: '2024-99-99' is not a YAML value"),
        ("train.steps=" + "9" * 5000, "--set train.steps=999"),
        ("nope.x=1", "--set nope.x=1: nope: unknown key; expected one of"),
        ("foo", "--set foo: expected SECTION.FIELD=VALUE, e.g. optim.learning_rate=1e-4"),
        ("train.seed=[1", "--set train.seed=[1: '[1' is not a YAML value"),
        ("train.seed=-1", "--set train.seed=-1: train.seed: found -1, expected greater than or equal to 0"),
    ],
)
def test_a_wrong_override_is_quoted_as_it_was_typed(problems_of, override, line):
    (found,) = problems_of(MINIMAL, override)
    assert found.startswith(line)


MIXED = MINIMAL.replace("{train: x.jsonl}", "\n  train:\n{}\n")


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        (["{source: a, wieght: 1}"], "r.yaml:4: data.train[0].wieght: unknown key; did you mean 'weight'?"),
        (["a", "{source: b, weight: x}"], "r.yaml:5: data.train[1].weight: found 'x', expected number"),
        (["a", "5"], "r.yaml:5: data.train[1]: found 5, expected string"),
        (["{name: x}"], "r.yaml:4: data.train[0].source: missing; A file, a folder, a Hub dataset"),
        (["{source: a, name: 'x y'}"], "r.yaml:4: data.train[0].name: a name has at most 64 letters"),
        (["a.jsonl", "b/a.csv"], "r.yaml:2: data: train has 2 sources named a; give each a `name` of its own"),
        (["{source: a, weight: 1}", "b"], "r.yaml:2: data: train: b without a weight; give every source a weight"),
        (["{source: a, weight: 1, epochs: 2}"], "r.yaml:2: data: train: weight and epochs both decide how often"),
        (["{source: a, epochs: 2}"], "r.yaml:1: data.train: epochs of a source count inside an epoch of the mixture"),
        (['{source: "a\\x01"}'], "r.yaml:4: data.train[0]: source is 'a\\x01', which contains a control character"),
    ],
)
def test_a_problem_of_a_mixture_names_the_source_and_its_line(problems_of, entries, problem):
    text = MIXED.replace("{}", "\n".join(f"    - {entry}" for entry in entries))
    assert problems_of(text)[0].startswith(problem)


def test_weights_need_steps_and_a_mapping_of_validation_sets_needs_names(problems_of):
    weighted = MIXED.replace("{}", "    - {source: a, weight: 1}").replace("steps: 3", "epochs: 3")
    assert "a mixture with weights has no epochs" in problems_of(weighted)[0]
    for given, problem in (
        ("{source: x}", "data: validation maps names to sources, not source; write NAME: {source: ...}"),
        ("{code: {source: 4}}", "data.validation.code.source: found 4, expected string"),
        ("{code: 4}", "data.validation.code: found 4, expected string"),
        ("{}", "data: train and validation need at least one source"),
    ):
        (found,) = problems_of(MINIMAL, f"data.validation={given}")
        assert problem in found


def test_a_dumped_mixture_has_absolute_paths_and_its_differences_have_the_names_of_its_sources(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    text = MIXED.replace("{}", "    - {source: a.jsonl, weight: 2}\n    - {source: o/b, weight: 1}")
    recipe = load(tmp_path, text, "data.validation={a: a.jsonl, b: {source: a.jsonl}}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "r.yaml").write_text(dump(recipe))
    again, path = load_recipe(tmp_path / "other" / "r.yaml"), str(tmp_path / "a.jsonl")
    assert [source.source for source in again.data.sources] == [path, "o/b", path, path]
    heavier = load(tmp_path, text.replace("weight: 2", "weight: 3"), "data.validation={b: a.jsonl}")
    assert difference(recipe.model_dump(mode="json"), heavier) == [
        ("data.train.a.weight", 2.0, 3.0),
        ("data.validation.a.source", "a.jsonl", None),
    ]
    assert [row[0] for row in difference(load(tmp_path, MINIMAL).model_dump(mode="json"), heavier)][:3] == [
        "data.train.a.source",
        "data.train.a.weight",
        "data.train.b.source",
    ]


BOMB = "a: &a [x, x]\n" + "".join(
    f"b{number}: &b{number} [{', '.join(['*a' if number == 0 else f'*b{number - 1}'] * 9)}]\n" for number in range(9)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"b{number}: &b{number} {{<<: [{', '.join(['*a' if number == 0 else f'*b{number - 1}'] * 9)}]}}\n"
    for number in range(9)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "r.yaml: 81 aliases (*name), more than 20; write the values out"),
        (MERGES, "r.yaml: 81 aliases (*name), more than 20; write the values out"),
        ("a: &a [*a]\n", "r.yaml:1: base: missing"),
        ("# comment\n" * 2_000_000, "r.yaml: longer than the 100,000 bytes that a recipe may have"),
        ("a" * 99_999 + "é", "r.yaml: longer than the 100,000 bytes that a recipe may have"),
        ("[" * 5_000, "r.yaml: not YAML: maximum recursion depth exceeded"),
        (MINIMAL + "\x01", "r.yaml: not YAML: unacceptable character #x0001"),
        (MINIMAL + "optim: {learning_rate: " + "9" * 5000 + "}\n", "r.yaml: not YAML: Exceeds the limit"),
        (
            MINIMAL.replace("a/b", '"a\\ud800"'),
            "r.yaml:1: base: repo is 'a\\ud800', which contains a control character",
        ),
    ],
    ids=["aliases", "merges", "recursion", "comments", "cut", "depth", "control", "digits", "surrogate"],
)
def test_hostile_yaml_is_refused_at_once(problems_of, text, reason):
    assert problems_of(text)[0].startswith(reason)


def test_a_few_aliases_are_allowed(tmp_path):
    text = MINIMAL.replace("{repo: a/b}", "{repo: &name a/b}").replace("x.jsonl", "*name")
    assert load(tmp_path, text).data.train == "a/b"


def test_a_recipe_may_come_from_a_pipe(tmp_path, monkeypatch):
    """It is read once, and its relative paths start in the working folder."""
    monkeypatch.chdir(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as threads:
        written = threads.submit(pipe.write_text, MINIMAL)
        recipe = load_recipe(pipe)
        written.result()
    assert (recipe.base.repo, recipe.folder) == ("a/b", tmp_path)


@pytest.mark.parametrize("name", ["./bse", "bse/", "my base", "a/b/c", "/nowhere/base", "~/nobase", "../bse"])
def test_what_cannot_be_a_hub_name_is_a_missing_folder(tmp_path, name):
    (tmp_path / "base").mkdir()
    recipe = load(tmp_path, MINIMAL, f"base.repo={name}")
    with pytest.raises(RecipeError, match="does not exist; "):
        resolve_path(recipe, name)
    assert similar_path(recipe, "./bse") == "base"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./" + "x" * 300, "File name too long"),
        ("x" * 5000, "File name too long"),
        ("~nobody.of.this.name/base", "Could not determine home directory"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused_with_the_reason(tmp_path, name, reason):
    recipe = load(tmp_path, MINIMAL)
    for function in (resolve_path, similar_path):
        with pytest.raises(RecipeError) as told:
            function(recipe, name)
        assert str(told.value) == f"{name}: the path cannot be used: {reason}; check its spelling and permissions"


def test_a_broken_link_does_not_suggest_itself(tmp_path):
    (tmp_path / "mybase").symlink_to(tmp_path / "gone")
    with pytest.raises(RecipeError, match="does not exist; relative paths start"):
        resolve_path(load(tmp_path, MINIMAL), "./mybase")


@pytest.mark.parametrize("name", ["../cli.py", "/etc/passwd", "base/..", "x" * 300, ""])
def test_only_what_is_shipped_has_a_builtin_name(tmp_path, name):
    with pytest.raises(RecipeError, match="not shipped with lora_kit"):
        resolve_path(load(tmp_path, MINIMAL), f"builtin:{name}")
    with pytest.raises(DataError, match="not shipped with lora_kit"):
        load_records(f"builtin:{name}", base_dir=tmp_path)


def test_a_missing_file_suggests_a_similar_name(tmp_path):
    (tmp_path / "quickstart.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"quickstrat\.yaml: no such file; did you mean .*quickstart\.yaml"):
        load_recipe(tmp_path / "quickstrat.yaml")


def test_yaml_1_2_reads_1e_minus_4_as_a_number_and_no_as_a_string(tmp_path):
    recipe = load(tmp_path, MINIMAL + "optim: {learning_rate: 1e-4}\n", "base.revision=no", "optim.warmup=0")
    assert recipe.optim.learning_rate == 1e-4
    assert recipe.base.revision == "no"
    assert recipe.optim.warmup == 0.0


def test_overrides_win_and_keep_the_other_fields(tmp_path):
    recipe = load(tmp_path, MINIMAL + "optim: {learning_rate: 1, warmup: 0.5}\n", "optim.learning_rate=2e-3")
    assert (recipe.optim.learning_rate, recipe.optim.warmup) == (2e-3, 0.5)
    recipe = load(tmp_path, MINIMAL, "adapter.targets=[q_proj, v_proj]", "data.columns={prompt: q}")
    assert (recipe.adapter.targets, recipe.data.columns) == (("q_proj", "v_proj"), {"prompt": "q"})


def test_a_dumped_recipe_loads_back_equal_from_any_folder(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}")
    recipe = load(tmp_path, MINIMAL, "optim.learning_rate=1e-5", "adapter.targets=[a]", "data.columns={a: b}")
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "recipe.yaml").write_text(dump(recipe))
    again = load_recipe(other / "recipe.yaml")
    assert resolve_path(again, again.data.train) == resolve_path(recipe, "x.jsonl") == tmp_path / "x.jsonl"
    assert again.model_copy(update={"data": recipe.data}).model_dump() == recipe.model_dump()


def test_a_dumped_split_of_a_folder_is_still_found(tmp_path):
    (tmp_path / "chats").mkdir()
    recipe = load(tmp_path, MINIMAL, "data.train=chats[train]", "data.validation=a/b[test]")
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    again = load_recipe(tmp_path / "recipe.yaml").data
    assert (again.train, again.validation) == (f"{tmp_path / 'chats'}[train]", "a/b[test]")


def test_differences_are_listed_by_key(tmp_path):
    old, new = load(tmp_path, MINIMAL), load(tmp_path, MINIMAL, "optim.warmup=0.5", "train.steps=4")
    assert difference(old.model_dump(mode="json"), old) == []
    assert difference(old.model_dump(mode="json"), new) == [
        ("optim.warmup", 0.03, 0.5),
        ("train.steps", 3, 4),
    ]


def test_fields_that_only_the_other_version_of_a_recipe_has_are_differences(tmp_path):
    new = load(tmp_path, MINIMAL)
    later = new.model_dump(mode="json") | {"sharding": {"size": 2, "layout": None}}
    later["adapter"] = later["adapter"] | {"shape": "wide"}
    assert difference(later, new) == [
        ("adapter.shape", "wide", None),
        ("sharding.size", 2, None),
    ]


def test_a_field_that_an_older_recipe_lacks_had_its_default(tmp_path):
    """A checkpoint from before `objective.reasoning` and the section `preflight` can be resumed."""
    new = load(tmp_path, MINIMAL)
    older = new.model_dump(mode="json")
    del older["objective"]["reasoning"], older["preflight"], older["optim"]["betas"]
    assert difference(older, new) == []
    changed = load(tmp_path, MINIMAL, "objective.reasoning=mask", "optim.betas=[0.9, 0.99]")
    assert difference(older, changed) == [
        ("objective.reasoning", "train", "mask"),
        ("optim.betas", [0.9, 0.999], [0.9, 0.99]),
    ]


def test_paths_start_from_the_recipes_folder_and_hub_names_are_not_paths(tmp_path):
    recipe = load(tmp_path, MINIMAL)
    (tmp_path / "model").mkdir()
    assert resolve_path(recipe, "model") == tmp_path / "model"
    assert resolve_path(recipe, "meta-llama/Llama-3.2-1B") is None
    assert resolve_path(recipe, "builtin:base").is_dir()
    with pytest.raises(RecipeError, match="not shipped with lora_kit; choose one of builtin:base"):
        resolve_path(recipe, "builtin:other")
    with pytest.raises(RecipeError, match=r"\./gone: .*gone does not exist; relative paths start"):
        resolve_path(recipe, "./gone")


SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load_are_short_and_say_how_to_launch(path):
    load_recipe(path)
    text = path.read_text()
    assert text.count("\n") < 40
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any("lora-kit train" in line for line in header)


def test_the_expected_recipes_ship():
    assert {path.stem for path in SHIPPED} >= {"quickstart", "sft-bf16-1b", "sft-bf16-8b"}


def fields():
    return [
        (name, field)
        for name, kinds in SECTIONS.items()
        for field in dict.fromkeys(each for kind in kinds for each in kind.model_fields)
    ]


def test_the_number_of_fields_changes_only_on_purpose():
    assert len(fields()) == 94


@pytest.mark.parametrize("field", fields(), ids=".".join)
def test_every_field_is_read_by_the_code(field):
    section, name = field
    if section == "preflight" and name in KINDS:  # `judge` reads the limit of each kind by its name
        return
    for path in (ROOT / "lora_kit").rglob("*.py"):
        if path.stem in {"schema", "recipe"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == name:
                owner = ast.unparse(node.value)
                if owner.split(".")[-1] in {section, "settings", f"self.{section}"}:
                    return
    pytest.fail(f"{section}.{name} is read nowhere")


def test_every_field_and_section_is_documented():
    for kind in (kind for kinds in SECTIONS.values() for kind in kinds):
        assert kind.__doc__
        assert all(field.description for field in kind.model_fields.values())


def test_the_reference_and_the_json_schema_are_not_stale():
    hint = "run `python -m lora_kit.recipe.reference`"
    assert (ROOT / "docs" / "recipes.md").read_text() == reference(), hint
    assert json.loads((ROOT / "docs" / "recipe.schema.json").read_text()) == json_schema(), hint
