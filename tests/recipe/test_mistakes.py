"""Every mistake is reported with its place, what was found and what is allowed; add a line for each new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from kw_lightning.errors import Problem, RecipeError
from kw_lightning.recipe import load_recipe

# name: (the recipe, with ‸ before the place that is reported, what the message holds)
MISTAKES: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown key": (
        "kw: 1\n‸modle: {}\n",
        ('modle: found the unknown key "modle"', "allowed: kw, name,", 'did you mean "model"?'),
    ),
    "unknown key inside": (
        "kw: 1\ntrain:\n  epochs: 3\n  ‸epoch: 3\n",
        ('train.epoch: found the unknown key "epoch"', "allowed: epochs, max_steps,", 'did you mean "epochs"?'),
    ),
    "key of another section": (
        "kw: 1\ntrain: {‸weight_decay: 0.1}\n",
        ('found the unknown key "weight_decay"', 'did you mean "train.optimizer.weight_decay"?'),
    ),
    "key of another section, somewhat like one of this": (
        "kw: 1\n‸seed: 1\n",
        ('found the unknown key "seed"', 'did you mean "train.seed"?'),
    ),
    "key of several other sections": (
        "kw: 1\n‸epochs: 3\n",
        ('found the unknown key "epochs"', 'did you mean "temperature.epochs" or "train.epochs"?'),
    ),
    "duplicate key": (
        "kw: 1\ntrain:\n  epochs: 3\n  seed: 1\n  ‸epochs: 4\n",
        ('the key "epochs" stands here again, first in line 3',),
    ),
    "no version": ("‸name: x\n", ('the key "kw" is missing, the version of the language; write "kw: 1"',)),
    "version of the future, whose other keys may be right there": (
        "kw: ‸2\nlater: {}\n",
        ("kw: found 2, allowed: 1; it is newer than this kw_lightning: pip install --upgrade kw-lightning",),
    ),
    "text instead of a number": (
        "kw: 1\ntrain: {epochs: ‸ten}\n",
        ('train.epochs: found "ten", allowed: a whole number of at least 0',),
    ),
    "fraction of an epoch": ("kw: 1\ntrain: {epochs: ‸1.5}\n", ("found 1.5, allowed: a whole number of at least 0",)),
    "number in quotes": ("kw: 1\ntrain: {epochs: ‸'5'}\n", ('found "5", allowed: a whole number',)),
    "number instead of a text": (
        "kw: 1\nname: ‸18\n",
        ("name: found 18, allowed: a name of letters", "put it in quotes"),
    ),
    "yes": ("kw: 1\ntrain: {deterministic: ‸yes}\n", ('found "yes", allowed: true or false; did you mean true?',)),
    "mode of a compiler": (
        "kw: 1\ntrain: {compile: ‸reduce-overheads}\n",
        ("allowed: true or false or reduce-overhead, max-autotune, ", 'did you mean "reduce-overhead"?'),
    ),
    "CUDA graphs that accumulate": (
        "kw: 1\ntrain: {accumulate: 4, compile: ‸reduce-overhead}\n",
        (
            "train.compile: found reduce-overhead with accumulate: 4, allowed: accumulate: 1, or compile: true or ",
            "CUDA graphs write each gradient over the one before",
        ),
    ),
    "off": ("kw: 1\nlog: {tensorboard: ‸off}\n", ('found "off", allowed: true or false; did you mean false?',)),
    "number too small": ("kw: 1\ntrain: {accumulate: ‸0}\n", ("found 0, allowed: a whole number of at least 1",)),
    "number too large": (
        "kw: 1\ntrain: {label_smoothing: ‸1.0}\n",
        ("found 1.0, allowed: a number of at least 0 and under 1",),
    ),
    "number absurdly large": (
        "kw: 1\ntrain: {epochs: ‸2000000}\n",
        ("found 2000000, allowed: a whole number of at least 0 and at most 1,000,000",),
    ),
    "name of a choice": (
        "kw: 1\ntemperature: {shape: ‸cosin}\n",
        ('found "cosin", allowed: linear, cosine, constant; did you mean "cosine"?',),
    ),
    "precision as a number": ("kw: 1\ntrain: {precision: ‸32}\n", ("found 32, allowed: 32-true, bf16-mixed,",)),
    "data set": (
        "kw: 1\ndata: {name: ‸cifar1O}\n",
        ('found "cifar1O"', "allowed: digits, image_folder, csv, cifar10,", 'did you mean "cifar10"?'),
    ),
    "data without a name": ("kw: 1\n‸data: {args: {download: true}}\n", ('data: the key "name" is missing',)),
    "backbone without its library": (
        "kw: 1\nmodel: {backbone: ‸resnet18}\n",
        ('found "resnet18", allowed: torchvision/NAME, timm/NAME or python:package.module:callable',),
    ),
    "budget of zero": (
        "kw: 1\ndefaults: {budget: ‸0}\n",
        ("found 0, allowed: a number over 0 and at most 64, a fraction such as 1/4 or a map with cells or parameters",),
    ),
    "budget that is no fraction": ("kw: 1\ndefaults: {budget: ‸half}\n", ('found "half"', "a fraction such as 1/4")),
    "fraction with the denominator 0": (
        "kw: 1\ndefaults: {budget: ‸1/0}\n",
        ('found "1/0", allowed: a number over 0',),
    ),
    "negative fraction": ("kw: 1\ndefaults: {budget: ‸-1/2}\n", ('found "-1/2", allowed: a number over 0',)),
    "two budgets": (
        "kw: 1\ndefaults:\n  ‸budget: {cells: 3, parameters: 1M}\n",
        ("found a map with cells, parameters, allowed: a map with cells or parameters",),
    ),
    "size without a unit that is known": (
        "kw: 1\ndefaults: {budget: {parameters: ‸7.5T}}\n",
        ('defaults.budget.parameters: found "7.5T", allowed:', "a size such as 7.5M"),
    ),
    "cell larger than its divisor": (
        "kw: 1\ndefaults: {cell: {out: ‸3/2}}\n",
        ('found "3/2", allowed: a number over 0 and at most 1 or a fraction such as 1/4',),
    ),
    "basis": ("kw: 1\ndefaults: {attention: {basis: ‸non}}\n", ('found "non", allowed: none,', 'did you mean "none"?')),
    "one layer instead of a list": (
        "kw: 1\nwarehouses:\n  a:\n    layers: ‸layer1.*\n",
        ('warehouses.a.layers: found "layer1.*", allowed: a list of at least 1 value; write [layer1.*]',),
    ),
    "no layers": ("kw: 1\nwarehouses:\n  ‸a: {budget: 2}\n", ('warehouses.a: the key "layers" is missing, allowed:',)),
    "empty list of layers": (
        "kw: 1\nwarehouses:\n  a: {‸layers: []}\n",
        ("found an empty list, allowed: a list of at",),
    ),
    "selector that is a number": (
        "kw: 1\nwarehouses:\n  a: {layers: [x, ‸1]}\n",
        ("warehouses.a.layers[1]: found 1, allowed: a text or a map with name, type, kernel_size",),
    ),
    "selector with an unknown condition": (
        "kw: 1\nwarehouses:\n  a: {layers: [{‸typ: Conv2d}]}\n",
        ('warehouses.a.layers[0].typ: found the unknown key "typ"', 'did you mean "type"?'),
    ),
    "slice that is none": (
        "kw: 1\nwarehouses:\n  a: {layers: [‸'qkv[x:]']}\n",
        ("found the slice [x:], allowed: shares of the output channels, as [2/3:]",),
    ),
    "slice backwards": (
        "kw: 1\nwarehouses:\n  a: {layers: [{name: ‸'qkv[2/3:1/3]'}]}\n",
        ("warehouses.a.layers[0].name: found the slice [2/3:1/3], allowed: 0 ≤ from < to ≤ 1",),
    ),
    "name of a warehouse": (
        "kw: 1\nwarehouses:\n  ‸stage.1: {layers: [x]}\n",
        ('found the key "stage.1", allowed: a name of letters, digits, dashes and underscores',),
    ),
    "warehouses as a list": ("kw: 1\n‸warehouses:\n  - a\n", ("found a list of 1 value, allowed: a map",)),
    "epochs and steps": (
        "kw: 1\ntemperature: {epochs: 3, ‸steps: 100}\n",
        ("found epochs and steps, allowed: one of them",),
    ),
    "scale backwards": (
        "kw: 1\ndata: {name: digits, train: {‸scale: [1, 0.5]}}\n",
        ("found 1 before 0.5, allowed: the smaller one first",),
    ),
    "one beta": (
        "kw: 1\ntrain: {optimizer: {‸betas: [0.9]}}\n",
        ("found a list of 1 value, allowed: a list of 2 values",),
    ),
    "shape as a number": ("kw: 1\nmodel: {input: ‸224}\n", ("allowed: a list of at least 1 value; write [224]",)),
    "two budgets of the whole": (
        "kw: 1\nmodel: {‸budget: {}}\n",
        ("found an empty map, allowed: a map with parameters",),
    ),
    "stages": ("kw: 1\nstages: ‸automatic\n", ('found "automatic", allowed: auto or a map with handover', '"auto"?')),
    "engine": ("kw: 1\nengine: ‸mix_kernel\n", ('did you mean "mix_kernels"?',)),
    "empty file": ("‸", ('the recipe is empty, allowed: a map that starts with "kw: 1"',)),
    "only a comment": ("‸# nothing\n", ("the recipe is empty",)),
    "a list": ("‸- kw: 1\n", ("found a list of 1 value, allowed: a map of a recipe's keys",)),
    "a text": ("‸resnet18\n", ('found "resnet18", allowed: a map',)),
    "tab": ("kw: 1\ntrain:\n‸\tepochs: 3\n", ("not YAML:", "indent with spaces, a tab is not allowed there")),
    "open bracket": (
        "kw: 1\nmodel: {backbone: x\n‸",
        ("not YAML: while parsing a flow mapping that starts in line 2",),
    ),
    "colon in a value": ("kw: 1\ndescription: a‸: b\n", ("not YAML: mapping values are not allowed",)),
    "two documents": ("kw: 1\n‸---\nkw: 1\n", ("a second document starts here; a recipe is one document",)),
    "python tag": (
        "kw: 1\nname: ‸!!python/object/apply:os.system [id]\n",
        ('found the tag "!!python/object/apply:os.system"; a recipe has no tags',),
    ),
    "tag of one's own": ("kw: 1\nname: ‸!env HOME\n", ('found the tag "!env"; a recipe has no tags',)),
    "alias without an anchor": ("kw: 1\ntrain: ‸*base\n", ('the alias "*base" has no anchor above it',)),
    "glob without quotes": (
        "kw: 1\nwarehouses:\n  a: {layers: [*‸.conv?]}\n",
        ("not YAML: while scanning an alias", "put a glob that starts with * in quotes"),
    ),
    "glob that reads as an alias": (
        "kw: 1\nwarehouses:\n  a: {layers: [‸*conv1]}\n",
        ('the alias "*conv1" has no anchor above it; put a glob that starts with * in quotes',),
    ),
    "alias of itself": ("kw: 1\nx-a: &a\n  b: ‸*a\n", ('the alias "*a" stands inside the value it names',)),
    "key that is a list": ("kw: 1\n? ‸[a]\n: b\n", ("found a key that is no text",)),
    "merge of a text": ("kw: 1\ntrain: {‸<<: abc}\n", ('"<<" takes a map, or a list of maps',)),
    "infinity": ("kw: 1\ntrain: {optimizer: {lr: ‸.inf}}\n", ("found .inf is not a finite number",)),
    "too large for a float": ("kw: 1\ntrain: {optimizer: {lr: ‸1e999}}\n", ("the number 1e999 is too large",)),
    "control character": ("kw: 1\nname: ‸\x07\n", ("not YAML: control characters are not allowed",)),
    "unknown variable": (
        "kw: 1\nvars: {width: 3}\nname: ‸a-${widht}\n",
        ('found the unknown variable "widht", allowed: a name of vars; did you mean "width"?',),
    ),
    "variable of a variable": ("kw: 1\nvars: {a: 1, b: ‸'${a}'}\n", ("a value of vars cannot use another one",)),
    "map inside a text": (
        "kw: 1\nvars: {a: {b: 1}}\nname: ‸x${a}\n",
        ('"a" is no text or number, and can only stand alone',),
    ),
    "extends nothing that is there": (
        "kw: 1\nextends: ‸resnet18-kw-1\n",
        ('extends: found the unknown recipe "resnet18-kw-1", allowed: a file beside', 'did you mean "resnet18-kw-1x"?'),
    ),
    "extends out of the folder": ("kw: 1\nextends: ‸../secret.yaml\n", ("lies outside of the folder of the recipe",)),
    "extends a package that is not there": (
        "kw: 1\nextends: [‸package://no_such_package/a.yaml]\n",
        ('extends[0]: the package "no_such_package" of', "is not installed"),
    ),
    "extends a number": ("kw: 1\nextends: [‸1]\n", ("extends[0]: found 1, allowed: a text",)),
    "appends to no list": (
        "kw: 1\nwarehouses:\n  a: {layers: [x], layers+: ‸y}\n",
        ('found "y", allowed: a list of what is appended',),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_reported_at_its_place(name: str, tmp_path: Path) -> None:
    marked, parts = MISTAKES[name]
    before, mark, after = marked.partition("‸")
    assert mark, "the table needs the place"
    file = tmp_path / "recipe.yaml"
    file.write_text(before + after, encoding="utf-8")
    place = f"{file}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}:"

    with pytest.raises(RecipeError) as caught:
        load_recipe(file)

    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.problems) == 1, "one mistake is one line"
    assert lines[0].startswith(place)
    for part in parts:
        assert part in lines[0]


def test_all_mistakes_of_a_file_come_at_once_and_in_order(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "kw: one\n"
        "nam: x\n"
        "warehouses:\n"
        "  a: {layers: layer1, budget: 0}\n"
        "  b: {budget: {cells: x}}\n"
        "temperature: {epochs: 1, steps: 1, shape: round}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    found = [(problem.path, problem.location and problem.location.line) for problem in caught.value.problems]
    assert found == [
        ("kw", 1),
        ("nam", 2),
        ("warehouses.a.layers", 4),
        ("warehouses.a.budget", 4),
        ("warehouses.b", 5),
        ("warehouses.b.budget.cells", 5),
        ("temperature.steps", 6),
        ("temperature.shape", 6),
    ]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "resnet18-kw-1y",
            (
                'found the unknown recipe "resnet18-kw-1y", allowed: a file, or a name that `kw list` shows',
                'did you mean "resnet18-kw-1x"?',
            ),
        ),
        ("no/such/resnet18-kw-2x.yml", ('did you mean "resnet18-kw-2x"?',)),
        ("", ('found the folder "',)),
    ],
)
def test_missing_recipe_names_the_nearest(name: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    for part in parts:
        assert part in str(caught.value)


def test_folder_is_refused_with_the_recipes_in_it(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("kw: 1\n")
    with pytest.raises(RecipeError, match=r'found the folder ".*", allowed: a recipe file; it has one\.yaml$'):
        load_recipe(tmp_path)


def test_bytes_that_are_no_utf8_have_a_place(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes("kw: 1\nname: Größe\n".encode("latin-1"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert str(caught.value) == f"{file}:2:9: not UTF-8: found the byte 0xf6"


def test_many_mistakes_are_counted_and_not_all_shown() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"kw": 1, **{f"key{index}": index for index in range(5000)}})
    assert len(caught.value.problems) == 101
    assert "more than 100 mistakes; the others are not shown" in str(caught.value)


def test_mistakes_of_a_mapping_have_a_path_and_no_file() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"kw": 1, "train": {"epochs": "x"}})
    assert str(caught.value) == 'train.epochs: found "x", allowed: a whole number of at least 0'
    with pytest.raises(RecipeError, match="train: found a Python set, allowed: text, number"):
        load_recipe({"kw": 1, "train": {1, 2}})
    with pytest.raises(RecipeError, match="found the key 1, allowed: a text"):
        load_recipe({"kw": 1, 1: 2})


def test_problem_is_one_line_without_control_characters() -> None:
    problem = Problem("found a\nb\x1b[31m\ud800 ü", "x\ty")
    assert str(problem) == "x\\ty: found a\\nb\\x1b[31m\\ud800 ü"
    assert str(RecipeError([problem, problem])).splitlines() == [str(problem)] * 2
