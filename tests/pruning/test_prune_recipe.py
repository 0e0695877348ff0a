from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsparse.errors import RecipeError
from llmsparse.pruners import PRUNERS, DSnoT, Magnitude, SparseGPT, Wanda
from llmsparse.pruning.recipe import PruneRecipe
from llmsparse.runs import recipe_file
from llmsparse.sparsity.fraction import parse_fraction
from llmsparse.sparsity.patterns import NofM, Unstructured


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(recipe: Path | str | None = None, *assignments: str, **flags: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        PruneRecipe.load(recipe, {"model": "org/name", **flags}, assignments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("value", [0.7, "0.7", "70%", " 70%", "7e-1"])
def test_sparsity_is_a_fraction_or_a_percentage(value: object) -> None:
    assert parse_fraction(value) == 0.7


@pytest.mark.parametrize(
    "value",
    ["70", "1.0", "-0.1", "abc", "100%", "nan", "", "0.5.5", "1%%", "1e9999999999999999999", "1e-9999999999999999999"],
)
def test_other_sparsities_are_refused_by_value_with_a_way_out(value: str) -> None:
    message = refusal(sparsity=value)
    assert message.startswith("--sparsity: ")
    assert value in message
    assert "0.7 or 70%" in message or "0.7, or 70%" in message


def test_a_whole_number_of_percent_is_shown_as_it_should_be_written() -> None:
    assert "write 0.62 or 62%" in refusal(sparsity="62")


@given(st.integers(0, 9999))
def test_percentages_are_exact(hundredths: int) -> None:
    assert parse_fraction(f"{hundredths / 100}%") == float(f"{hundredths}e-4")


def test_something_must_say_how_much_is_pruned() -> None:
    assert "--sparsity 0.5" in refusal() and "--pattern 2:4" in refusal()
    assert PruneRecipe(model="m", pattern="2:4").pattern_for("any") == NofM(2, 4)


@pytest.mark.parametrize("pattern", ["4:2", "0:4", "4:4", "2-4", "diagonal"])
def test_patterns_that_cannot_be_are_refused(pattern: str) -> None:
    message = refusal(pattern=pattern)
    assert message.startswith("--pattern: ") and pattern in message and "2:4" in message


def test_a_sparsity_beside_an_n_of_m_must_be_the_one_it_implies(write: Any) -> None:
    assert "means sparsity 0.5, not 0.7" in refusal(sparsity="0.7", pattern="2:4")
    assert "means sparsity 0.5, not 0.7" in refusal(write("pattern: 2:4\n"), sparsity="70%")
    assert PruneRecipe.load(None, {"model": "m", "sparsity": "50%", "pattern": "2:4"}).pattern_for("any") == NofM(2, 4)


def test_two_of_four_needs_no_quotes_in_yaml(write: Any) -> None:
    assert PruneRecipe.load(write("pattern: 2:4\n"), {"model": "m"}).pattern == "2:4"  # YAML 1.1 reads 124


def test_an_unknown_key_is_named_with_file_line_and_the_likely_one(write: Any) -> None:
    path = write("# mine\nsparsity: 0.5\ncalibration_sample: 3\n")
    assert refusal(path).startswith(f"{path}:3: unknown key 'calibration_sample'; did you mean 'calibration_samples'?")


def test_an_unknown_key_of_a_rule_is_named_with_its_line(write: Any) -> None:
    path = write("sparsity: 0.5\nrules:\n  - match: '*.q_proj'\n    sparsty: 0.5\n")
    assert refusal(path).startswith(f"{path}:4: unknown key 'rules[0].sparsty'; did you mean 'sparsity'?")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("seed: x", "a whole number"),
        ("seed: true", "a whole number"),
        ("seed: -1", "at least 0"),
        ("calibration_samples: 0", "at least 1"),
        ("seq_len: 1", "at least 2"),
        ("batch_size: 1.5", "a whole number"),
        ("true_sequential: 3", "true or false"),
        ("dtype: fp32", "auto, float32, bfloat16 or float16"),
        ("scope: column", "auto, row or matrix"),
        ("match_steps: -1", "auto, or a number of steps"),
        ("device: gpu", "auto, cpu, cuda or cuda:0"),
        ("max_shard_size: 5 parsecs", "5GB"),
        ("revision: 123", "quote it"),
        ("only: 3", "a list"),
        ("rules: 3", "a list"),
        ("rules: [3]", "a mapping"),
        ("rules: [{sparsity: 0.5}]", "match is missing"),
        ("rules: [{match: '*'}]", "a sparsity, a pattern or a method"),
        ("rules: [{match: '*', pattern: 4:2}]", "0 < N < M"),
        ("rules: [{match: '*', method: wandaa}]", "did you mean 'wanda'?"),
        ("method: wandaa", "did you mean 'wanda'?"),
        ("method: {damp: 1}", "a name such as wanda"),
        ("method: [wanda]", "a name such as wanda"),
        ("method: {name: sparsegpt, dampp: 1}", "did you mean 'damp'? known: block, damp"),
        ("method: {name: sparsegpt, damp: abc}", "wanted a number"),
        ("method: {name: sparsegpt, damp: true}", "wanted a number"),
        ("method: {name: sparsegpt, block: 1.5}", "wanted a whole number"),
        ("method: {name: magnitude, damp: 1}", "has no option 'damp'; it has none"),
        ("method: {name: dsnot, criterion: best}", "expected or paper"),
        ("method: {name: dsnot, initial: wandaa}", "did you mean 'wanda'?"),
        ("sparsity: 0.6", "stands twice"),
        ("{", "is not YAML"),
    ],
)
def test_a_wrong_value_is_named_with_file_line_and_what_is_wanted(write: Any, line: str, wanted: str) -> None:
    path = write(f"sparsity: 0.5\n{line}\n")
    message = refusal(path)
    assert message.startswith(f"{path}:2: ") or line == "{"
    assert wanted in message


def test_an_option_in_a_nested_mapping_is_named_with_its_own_line(write: Any) -> None:
    path = write("sparsity: 0.5\nmethod:\n  name: dsnot\n  initial:\n    name: sparsegpt\n    damp: abc\n")
    assert refusal(path) == f"{path}:6: method.initial.damp: got 'abc', wanted a number"


@pytest.mark.parametrize("text", ["- 1\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_refused(write: Any, text: str) -> None:
    assert ":1: holds no `key: value` lines" in refusal(write(text))


def test_a_file_that_nests_too_deep_is_refused(write: Any) -> None:
    assert "nests too deep for a recipe" in refusal(write("rules: " + "[" * 3000))


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not text" in refusal(tmp_path / "r.yaml")


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "did you mean 'wanda-50'?" in refusal("wanda-5")
    assert "no such recipe file" in refusal(tmp_path / "none.yaml")
    assert "is a folder" in refusal(tmp_path)


def test_defaults_yield_to_the_recipe_and_the_recipe_to_flags_and_assignments(write: Any) -> None:
    path = write("sparsity: 0.5\nseed: 1\ncalibration_samples: 8\nonly: ['*.q_proj']\n")
    recipe = PruneRecipe.load(path, {"model": "m", "seed": "2", "seq_len": None}, ["calibration_samples=9"])
    assert (recipe.sparsity, recipe.seed, recipe.calibration_samples, recipe.seq_len) == (0.5, 2, 9, None)
    assert recipe.only == ("*.q_proj",)
    assert (recipe.method, recipe.match_steps, recipe.calibration) == ("sparsegpt", "auto", "auto")


def test_dotted_assignments_reach_into_methods_and_rules(write: Any) -> None:
    path = write("sparsity: 0.5\nrules:\n  - {match: '*.q_proj', sparsity: 0.6}\n")
    recipe = PruneRecipe.load(path, {"model": "m"}, ["method.damp=1e-3", "rules.0.sparsity=70%"])
    assert recipe.pruner == SparseGPT(damp=0.001)
    assert recipe.rules[0].sparsity == 0.7
    nested = ["method={name: dsnot, initial: {name: sparsegpt}}", "method.initial.block=64"]
    assert PruneRecipe.load(path, {"model": "m"}, nested).pruner == DSnoT(initial=SparseGPT(block=64))


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ("outdir", "wanted key=value"),
        ("sed=3", "sed=3: unknown key 'sed'; did you mean 'seed'?"),
        ("seed=x", "seed=x: got 'x', wanted a whole number"),
        ("method.dampp=1", "did you mean 'damp'?"),
        ("rules.0.sparsity=0.5", "rules: got"),
        ("seed.deep=1", "seed.deep=1: seed is 0, which has no keys"),
        ("model.x=1", "which has no keys"),
        ("0=1", "0=1: unknown key '0'"),
        ("rules=" + "[" * 3000, "nests too deep for a recipe"),
    ],
)
def test_a_wrong_assignment_is_quoted(assignment: str, complaint: str) -> None:
    assert complaint in refusal(None, assignment, sparsity="0.5", seed=0)


def test_the_last_rule_that_matches_wins() -> None:
    recipe = PruneRecipe(
        model="m",
        sparsity=0.5,
        method="wanda",
        rules=[
            {"match": "*_proj", "sparsity": 0.6, "method": "magnitude"},
            {"match": "*.down_proj", "sparsity": 0.7},
            {"match": "*.k_proj", "pattern": "2:8"},
        ],
    )
    assert recipe.pattern_for("a.mlp.up_proj") == Unstructured(0.6, "matrix")
    assert recipe.pattern_for("a.mlp.down_proj") == Unstructured(0.7, "row")
    assert recipe.pattern_for("a.k_proj") == NofM(2, 8)
    assert recipe.pattern_for("a.dense") == Unstructured(0.5, "row")
    assert recipe.pruner_for("a.mlp.up_proj") == Magnitude() and recipe.method_for("a.mlp.up_proj") == "magnitude"
    assert recipe.pruner_for("a.mlp.down_proj") == Wanda() and recipe.method_for("a.mlp.down_proj") == "wanda"


def test_the_last_rule_counts_alone_whatever_an_earlier_one_says() -> None:
    rules = [{"match": "*", "sparsity": 0.9, "method": "magnitude"}, {"match": "*.k_proj", "method": "sparsegpt"}]
    recipe = PruneRecipe(model="m", sparsity=0.5, method="wanda", rules=rules)
    assert recipe.pattern_for("a.k_proj") == Unstructured(0.5, "matrix")  # the recipe's sparsity, not 0.9
    assert recipe.pruner_for("a.k_proj") == SparseGPT()
    reversed_ = recipe.replace(rules=rules[::-1])
    assert reversed_.pattern_for("a.k_proj") == Unstructured(0.9, "matrix")
    assert reversed_.pruner_for("a.k_proj") == Magnitude()


def test_a_method_is_built_once_for_all_weights() -> None:
    recipe = PruneRecipe(model="m", sparsity=0.5, rules=[{"match": "*.k_proj", "method": "wanda"}])
    assert recipe.pruner_for("a.q_proj") is recipe.pruner_for("b.q_proj")
    assert recipe.pruner_for("a.k_proj") is recipe.pruner_for("b.k_proj")
    assert recipe == recipe.replace() and hash(recipe.rules) == hash(recipe.replace().rules)


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    recipe = PruneRecipe(model="m", sparsity=0.5, rules=[{"match": "*.down_prj", "sparsity": 0.6}])
    with pytest.raises(RecipeError, match=r"rules\[0\]: match '\*.down_prj' matches none of 2 weights"):
        recipe.check_rules(["a.down_proj", "a.up_proj"])
    PruneRecipe(model="m", sparsity=0.5, rules=[{"match": "*.down_*", "sparsity": 0.6}]).check_rules(["a.down_proj"])


def test_scope_is_the_methods_own_unless_asked() -> None:
    assert PruneRecipe(model="m", sparsity=0.5, method="wanda").pattern_for("w") == Unstructured(0.5, "row")
    assert PruneRecipe(model="m", sparsity=0.5, method="sparsegpt").pattern_for("w") == Unstructured(0.5, "matrix")
    assert PruneRecipe(model="m", sparsity=0.5, method="wanda", scope="matrix").pattern_for("w") == Unstructured(
        0.5, "matrix"
    )


@pytest.mark.parametrize(
    ("keys", "folder"),
    [
        ({"model": "org/Name-1B", "sparsity": 0.7}, "Name-1B-sparsegpt-70"),
        ({"model": "/some/where/tiny/", "sparsity": 0.625, "method": "wanda"}, "tiny-wanda-62.5"),
        ({"model": "tiny", "pattern": "2:4", "sparsity": 0.5}, "tiny-sparsegpt-2of4"),
        ({"model": "tiny", "sparsity": 0.57}, "tiny-sparsegpt-57"),
        ({"model": "tiny", "sparsity": 0.5, "output": "/x/y"}, "/x/y"),
    ],
)
def test_output_has_a_name_that_says_what_it_is(keys: dict[str, Any], folder: str) -> None:
    assert PruneRecipe(**keys).output_folder == Path(folder)


def test_output_of_the_current_folder_is_named_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "tiny" / "sub")
    assert PruneRecipe(model=".", sparsity=0.5).output_folder == Path("sub-sparsegpt-50")
    assert PruneRecipe(model="..", sparsity=0.5).output_folder == Path("tiny-sparsegpt-50")


def test_python_gives_the_same_errors() -> None:
    with pytest.raises(RecipeError, match="sparsity: got 70"):
        PruneRecipe(model="m", sparsity=70)
    with pytest.raises(RecipeError, match="did you mean 'sparsity'"):
        PruneRecipe(model="m", sparsty=0.5)
    with pytest.raises(RecipeError, match="model is missing; name a folder, a hub id or builtin"):
        PruneRecipe(sparsity=0.5)


def test_a_pruner_can_be_given_as_an_object() -> None:
    recipe = PruneRecipe(model="m", sparsity=0.5, method=DSnoT(initial=SparseGPT(damp=0.5), max_cycles=3))
    assert recipe.method_name == "dsnot"
    assert recipe.pruner == DSnoT(initial=SparseGPT(damp=0.5), max_cycles=3)


@pytest.mark.parametrize("name", list(PRUNERS))
def test_dump_spells_out_every_default_and_loads_to_the_same_run(name: str, tmp_path: Path) -> None:
    recipe = PruneRecipe(
        model="org/m",
        method=name,
        pattern="2:4",
        rules=[{"match": "*.q", "pattern": "4:8"}, {"match": "*.k", "pattern": "unstructured", "sparsity": 0.1}],
        exclude="*.v",
        revision="12e45",
        calibration="true",
        output="1.5",
    )
    (tmp_path / "r.yaml").write_text(recipe.dump({"torch": "2.13"}))
    again = PruneRecipe.load(tmp_path / "r.yaml")
    assert again.dump() == recipe.dump()
    assert again.pruner == recipe.pruner and again.allocator == recipe.allocator
    spelt_out = {"method", "allocation"}
    assert again.model_dump(exclude=spelt_out) == recipe.model_dump(exclude=spelt_out)
    assert recipe.dump({"torch": "2.13"}).startswith("# torch: 2.13\nmodel: org/m\n")


def test_replace_checks_what_it_changes() -> None:
    recipe = PruneRecipe(model="m", sparsity=0.5)
    assert recipe.replace(seq_len=64).seq_len == 64
    with pytest.raises(RecipeError, match="seq_len: got 1"):
        recipe.replace(seq_len=1)


def test_a_method_is_added_by_writing_its_class_and_naming_it(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Loudest:
        share: float = 0.5
        shape: tuple[int, ...] = (1, 2)

        scope: ClassVar[str] = "row"

        def __post_init__(self) -> None:
            if self.share > 1:
                raise ValueError(f"share {self.share} is above 1")

    monkeypatch.setitem(PRUNERS, "loudest", Loudest)
    recipe = PruneRecipe(model="m", sparsity=0.5, method={"name": "loudest", "shape": [3]})
    assert recipe.pruner == Loudest(shape=(3,))
    assert recipe.resolved()["method"] == {"name": "loudest", "share": 0.5, "shape": [3]}
    with pytest.raises(RecipeError, match=r"method: method loudest: share 2\.0 is above 1"):
        PruneRecipe(model="m", sparsity=0.5, method={"name": "loudest", "share": 2.0})


LINES = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | LINES


@given(st.dictionaries(LINES, SCALARS | st.lists(SCALARS)))
def test_yaml_round_trips(data: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_text(recipe_file.write(data, {}), encoding="utf-8")
        assert recipe_file.read(path)[0] == data
