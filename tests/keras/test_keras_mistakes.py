"""Every mistake of a network: at its place, with the shapes and the way through blocks, all in one go, and at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from kw_lightning.errors import RecipeError
from kw_lightning.keras import read_network
from kw_lightning.limits import MAX_ARGUMENT, MAX_MODULES
from kw_lightning.recipe import load_recipe

CONV = "Conv2D: {filters: 8, kernel_size: 3"

# One mistake each: layers, blocks if any, key path, and every whole message there.
MISTAKES: dict[str, tuple[str, str, str, list[str]]] = {
    "unknown layer": ("[Conv2d: {filters: 8, kernel_size: 3}]", "", "model.layers[0].Conv2d",
        ['found the unknown layer "Conv2d", allowed: Keras\'s layers; did you mean "Conv2D"?']),
    "unknown layer by name": ("[Relu]", "", "model.layers[0]",
        ['found the unknown layer "Relu", allowed: Keras\'s layers; did you mean "ReLU"?']),
    "unknown argument": ("[Conv2D: {filtres: 8, kernel_size: 3, filters: 8}]", "", "model.layers[0].Conv2D.filtres",
        ['found the unknown argument "filtres", allowed: kernel_size, strides, padding, dilation_rate, '
         'activation, use_bias, bias_initializer, filters, groups, kernel_initializer, warehouse, name, '
         'inputs, repeat; did you mean "filters"?']),
    "missing argument": ("[Dense]", "", "model.layers[0]",
        [f'the argument "units" is missing, allowed: a whole number from 1 to {MAX_ARGUMENT:,}']),
    "wrong type": ('[Dense: {units: "many"}]', "", "model.layers[0].Dense.units",
        [f'found "many", allowed: a whole number from 1 to {MAX_ARGUMENT:,}']),
    "wrong number of sides": ("[Conv2D: {filters: 8, kernel_size: [3, 3, 3]}]", "",
                              "model.layers[0].Conv2D.kernel_size",
        [f"found a list of 3 values, allowed: a whole number from 1 to {MAX_ARGUMENT:,}, or 2 of them in a list"]),
    "unknown activation": ("[Dense: {units: 3, activation: rleu}]", "", "model.layers[0].Dense.activation",
        ['found "rleu", allowed: one of linear, relu, relu6, leaky_relu, elu, selu, gelu, silu, swish, mish, '
         'hard_sigmoid, hard_silu, hard_swish, sigmoid, log_sigmoid, tanh, softplus, softsign, exponential, '
         'softmax, log_softmax, or nothing; did you mean "relu"?']),
    "unknown padding": ("[Conv2D: {filters: 8, kernel_size: 3, padding: full}]", "", "model.layers[0].Conv2D.padding",
        [f'found "full", allowed: one of valid, same, or a whole number from 0 to {MAX_ARGUMENT:,}, or 2 of '
         f'them in a list']),
    "rate of 1": ("[Dropout: {rate: 1}]", "", "model.layers[0].Dropout.rate",
        ["found 1, allowed: a number at least 0 and under 1"]),
    "true for a number": ("[Dense: {units: true}]", "", "model.layers[0].Dense.units",
        [f"found true, allowed: a whole number from 1 to {MAX_ARGUMENT:,}"]),
    "two layers in one": ("[{ReLU: , GELU: }]", "", "model.layers[0]",
        ["found a map with ReLU, GELU, allowed: the name of a layer, or one name with arguments, as Conv2D: "
         "{filters: 32}"]),
    "arguments in a list": ("[Dense: [10]]", "", "model.layers[0].Dense",
        ["found a list of 1 value, allowed: a map of the arguments of Dense"]),
    "number for a layer": ("[ReLU, [ReLU]]", "", "model.layers[1]",
        ["found a list of 1 value, allowed: a text or a map"]),
    "negative size": (f"[MaxPooling2D: {{pool_size: 8}}, {CONV}}}]", "", "model.layers[1].Conv2D",
        ["a window of 3 does not fit in 1 positions of the input [3, 1, 1] (the size would be -1); use "
         "padding: same, a smaller window or less pooling before"]),
    "window larger than the image": (f"[{CONV}, dilation_rate: 4}}]", "", "model.layers[0].Conv2D",
        ["a window of 9 does not fit in 8 positions of the input [3, 8, 8] (the size would be 0); use "
         "padding: same, a smaller window or less pooling before"]),
    "image layer on features": (f"[Flatten, {CONV}}}]", "", "model.layers[1].Conv2D",
        ["found an input [192], allowed: [channels, height, width]"]),
    "groups": (f"[{CONV}, groups: 2}}]", "", "model.layers[0].Conv2D",
        ["found 2 groups, 3 channels of the input [3, 8, 8], 8 filters, allowed: a number of groups that "
         "divides channels and filters"]),
    "add of different shapes": (f"[{CONV}, name: c}}, Add: {{inputs: [input, c]}}]", "", "model.layers[1].Add",
        ["the inputs have different shapes: [3, 8, 8] and [8, 6, 6]; input is [3, 8, 8], c is [8, 6, 6]"]),
    "one input for Add": ("[Add]", "", "model.layers[0]",
        ["found 1 input, allowed: at least 2 inputs (inputs: [a, b]) of Add"]),
    "two inputs for ReLU": ("[ReLU: {name: r}, ReLU: {inputs: [input, r]}]", "", "model.layers[1].ReLU",
        ["found 2 inputs, allowed: 1 input of ReLU"]),
    "concatenate": (f"[{CONV}, name: c}}, Concatenate: {{inputs: [input, c]}}]", "", "model.layers[1].Concatenate",
        ["the inputs differ in more than axis 1, along which they are joined: [3, 8, 8] and [8, 6, 6]; input "
         "is [3, 8, 8], c is [8, 6, 6]"]),
    "reshape": ("[Reshape: {target_shape: [5, -1]}]", "", "model.layers[0].Reshape",
        ["cannot reshape [3, 8, 8] (192 numbers) to [5, -1] (5 numbers)"]),
    "permute": ("[Permute: {dims: [2, 1]}]", "", "model.layers[0].Permute",
        ["found the dims [2, 1], allowed: each axis of [3, 8, 8] once, from 1 to 3"]),
    "unknown input": ("[ReLU: {name: main}, Add: {inputs: [main, shortcat]}]", "", "model.layers[1].Add.inputs",
        ['found the unknown input "shortcat", allowed: input, main, add']),
    "nearest input": ("[ReLU: {name: shortcut}, Add: {inputs: [input, shortcat]}]", "", "model.layers[1].Add.inputs",
        ['found the unknown input "shortcat", allowed: input, shortcut, add; did you mean "shortcut"?']),
    "cycle": ("[ReLU: {name: a, inputs: c}, ReLU: {name: b}, ReLU: {name: c}, GELU]", "", "model.layers[0].ReLU",
        ["the layers wait for each other: a → b → c → a"]),
    "unused layer": ("[ReLU: {name: lost}, ReLU: {inputs: input}]", "", "model.layers[0].ReLU",
        ['no layer uses the output of "lost", and only the last layer is the output']),
    "unused input": ("[ReLU: {name: a, inputs: b}, ReLU: {name: b, inputs: a}]", "", "model.layers",
        ['no layer uses "input"']),
    "name taken": ("[ReLU: {name: a}, ReLU: {name: a}]", "", "model.layers[1].ReLU.name",
        ['the name "a" is taken in the same list of layers']),
    "name of Module": ("[ReLU: {name: forward}]", "", "model.layers[0].ReLU.name",
        ['"forward" has a meaning of its own in a module; take another name']),
    "no name": ('[ReLU: {name: "a.b"}]', "", "model.layers[0].ReLU.name",
        ['found "a.b", allowed: a word such as conv_a']),
    "inputs of no kind": ("[ReLU: {inputs: {a: b}}]", "", "model.layers[0].ReLU.inputs",
        ["found a map with a, allowed: the name of a layer, or a list of them"]),
    "repeat 0": ("[ReLU: {repeat: 0}]", "", "model.layers[0].ReLU.repeat",
        [f"found 0, allowed: a whole number from 1 to {MAX_MODULES:,}"]),
    "repeat of a million": ("[ReLU: {repeat: 1000000000}]", "", "model.layers[0].ReLU.repeat",
        [f"found 1000000000, allowed: a whole number from 1 to {MAX_MODULES:,}"]),
    "repeat of a merge": ("[ReLU: {name: a}, Add: {inputs: [a, input], repeat: 2}]", "", "model.layers[1].Add.repeat",
        ["found 2 inputs, allowed: one, of a layer that is repeated"]),
    "reference outside a block": ("[Dense: {units: $units}]", "", "model.layers[0].Dense.units",
        ["$units stands outside a block; only the layers of a block have parameters",
         f'found "$units", allowed: a whole number from 1 to {MAX_ARGUMENT:,}']),
    "unknown reference": ("[b: {units: 3}]",
                          "b: {parameters: {units: }, layers: [Dense: {units: $units, use_bias: $unit}]}",
                          "model.blocks.b.layers[0].Dense.use_bias",
        ['found the unknown parameter "$unit", allowed: $warehouse, $units; did you mean "$units"?',
         'found "$unit", allowed: true or false (in b, by model.layers[0].b (line 5))']),
    "missing parameter": ("[b]", "b: {parameters: {units: }, layers: [Dense: {units: $units}]}", "model.layers[0]",
        ['block "b" needs units']),
    "unknown parameter": ("[b: {unit: 3, units: 3}]", "b: {parameters: {units: }, layers: [Dense: {units: $units}]}",
                          "model.layers[0].b.unit",
        ['found the unknown parameter "unit", allowed: warehouse, units, name, inputs, repeat; did you mean "units"?']),
    "unused parameter": ("[b]", "b: {parameters: {units: 3}, layers: [ReLU]}", "model.blocks.b.parameters.units",
        ["no layer of the block uses $units"]),
    "reserved parameter": ("[b]", "b: {parameters: {repeat: 3}, layers: [ReLU: {repeat: $repeat}]}",
                           "model.blocks.b.parameters.repeat",
        ['every layer and block has "repeat"; give the parameter another name']),
    "warehouse of a block": ("[b: {warehouse: w}]", "b: {layers: [ReLU]}", "model.layers[0].b.warehouse",
        ['no layer of block "b" says warehouse: $warehouse']),
    "undeclared warehouse": (f"[{CONV}, warehouse: w1}}]", "", "model.layers[0].Conv2D.warehouse",
        ['found the unknown warehouse "w1", allowed: w; did you mean "w"?']),
    "block named like a layer": ("[ReLU]", "Dense: {layers: [ReLU]}", "model.blocks.Dense",
        ['"Dense" is a layer of the vocabulary; give the block another name']),
    "block without layers": ("[b]", "b: {layers: []}", "model.blocks.b.layers",
        ["found an empty list, allowed: a list of at least one layer"]),
    "key of a block": ("[b]", "b: {layer: [], layers: [ReLU]}", "model.blocks.b.layer",
        ['found the unknown key "layer", allowed: parameters, inputs, layers; did you mean "layers"?']),
    "endless block": ("[a]", "{a: {layers: [b]}, b: {layers: [a]}}", "model.blocks.a",
        ["the block uses itself: a → b → a"]),
    "inputs of a block": ("[b]", "b: {inputs: [p, q], layers: [Add: {inputs: [p, q]}]}", "model.layers[0]",
        ['found 1 input, allowed: the 2 inputs of block "b", p, q']),
    "first layer of several inputs": ("[ReLU: {name: r}, b: {inputs: [r, input]}]",
                                      "b: {inputs: [p, q], layers: [ReLU: {name: s}, Add: {inputs: [s, q]}]}",
                                      "model.blocks.b.layers[0].ReLU",
        ["the first layer says which of the block's inputs it takes: p, q (in b, by model.layers[1].b (line 5))"]),
    "absurd filters": (f"[{CONV[:9]}filters: 1000000000000, kernel_size: 1}}]", "", "model.layers[0].Conv2D.filters",
        [f"found 1000000000000, allowed: a whole number from 1 to {MAX_ARGUMENT:,}"]),
    "absurd output": ("[UpSampling2D: {size: 100000}]", "", "model.layers[0].UpSampling2D",
        ["found an output [3, 800000, 800000], allowed: at most 268,435,456 numbers"]),
}  # fmt: skip


def problems_of(text: str, folder: Path) -> list[str]:
    """Return the problems of a recipe in a file; both the language's own and the network's."""
    file = folder / "recipe.yaml"
    file.write_text(text)
    started = time.process_time()
    with pytest.raises(RecipeError) as caught:
        read_network(load_recipe(file))
    assert time.process_time() - started < 1
    return [str(problem) for problem in caught.value.problems]


def recipe(layers: str, blocks: str = "") -> str:
    """Return a recipe's text."""
    blocks = blocks if blocks.startswith("{") or not blocks else f"{{{blocks}}}"
    lines = ["kw: 1", "model:", "  input: [3, 8, 8]", f"  blocks: {blocks}" if blocks else "", f"  layers: {layers}"]
    return "\n".join([*lines, "warehouses:", "  w: {budget: 1}", ""])


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_place(name: str, tmp_path: Path) -> None:
    layers, blocks, path, messages = MISTAKES[name]
    found = problems_of(recipe(layers, blocks), tmp_path)
    assert [problem.split(f": {path}: ", 1)[1] for problem in found if f": {path}: " in problem] == messages
    assert all(problem.startswith(str(tmp_path / "recipe.yaml")) or "recipe.yaml:" in problem for problem in found)


def test_all_mistakes_at_once_with_the_way_through_blocks(tmp_path: Path) -> None:
    text = """\
kw: 1
model:
  input: [3, 8, 8]
  blocks:
    branch:
      parameters: {filters: }
      layers:
        - Conv2D: {name: wide, filters: $filters, kernel_size: 3}
        - Add: {inputs: [input, wide]}
    stage:
      parameters: {filters: }
      layers:
        - branch: {filters: $filters, repeat: 3}
  layers:
    - stage: {name: first, filters: 16}
    - Dens: {units: 10}
    - Dropout: {rate: 2}
"""
    found = problems_of(text, tmp_path)
    assert len(found) == 3
    (add,) = (problem for problem in found if "different shapes" in problem)
    assert "recipe.yaml:9:11: model.blocks.branch.layers[1].Add" in add
    assert "input is [3, 8, 8], wide is [16, 6, 6]" in add
    assert (
        "(in first.branch.0, by model.layers[0].stage (line 15) → model.blocks.stage.layers[0].branch (line 13))" in add
    )
    assert any("recipe.yaml:16" in p and 'found the unknown layer "Dens"' in p and '"Dense"' in p for p in found)
    assert any("recipe.yaml:17" in p and "found 2, allowed: " in p for p in found)


def test_the_same_mistake_in_many_places_is_told_once(tmp_path: Path) -> None:
    blocks = "b: {parameters: {n: }, layers: [Dense: {units: $n}]}"
    found = problems_of(recipe("[b: {n: none}, b: {n: none}, b: {n: none}]", blocks), tmp_path)
    assert len(found) == 1
    assert (
        'found "none", allowed: a whole number from 1 to 100,000 (in b, by model.layers[0].b (line 5)) and '
        "in 2 other places" in found[0]
    )


NEST = {f"b{i}": {"layers": [f"b{i + 1}", f"b{i + 1}"]} for i in range(30)} | {"b30": {"layers": ["ReLU"]}}
DEEP = {f"b{i}": {"layers": [f"b{i + 1}"]} for i in range(900)} | {"b900": {"layers": ["ReLU"]}}
BLOCK = {"parameters": {"n": None}, "layers": [{"ReLU": {"repeat": "$n"}}]}
ABSURD: dict[str, tuple[dict[str, Any], str]] = {
    "doubling blocks": ({"blocks": NEST, "layers": ["b0"]}, f"more than {MAX_MODULES:,} layers"),
    "deep blocks": ({"blocks": DEEP, "layers": ["b0"]}, "more than 32 deep"),
    "repeat of repeat": ({"blocks": {"b": BLOCK}, "layers": [{"b": {"n": MAX_MODULES, "repeat": MAX_MODULES}}]},
                         "the most a recipe may ask"),
    "wide layers": ({"layers": ["Flatten", *[{"Dense": {"units": MAX_ARGUMENT}}] * 12]}, "parameters"),
    "large output": ({"layers": [{"UpSampling2D": {"size": MAX_ARGUMENT}}]}, "found an output .* allowed: at "
                                                                             "most 268,435,456 numbers"),
    "large input": ({"input": [100_000, 100_000, 100_000], "layers": ["ReLU"]}, "268,435,456"),
    "deep attention": ({"layers": ["Flatten", {"Reshape": {"target_shape": [1, -1]}},
                                   {"MultiHeadAttention": {"num_heads": MAX_ARGUMENT, "key_dim": MAX_ARGUMENT}}]},
                       "parameters"),
}  # fmt: skip


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_networks_are_refused_at_once(name: str, tmp_path: Path) -> None:
    model, message = ABSURD[name]
    file = tmp_path / "absurd.yaml"
    file.write_text(yaml.safe_dump({"kw": 1, "model": {"input": [3, 8, 8], **model}}))
    recipe = load_recipe(file)
    started = time.process_time()
    with pytest.raises(RecipeError, match=message):
        read_network(recipe).build()
    assert time.process_time() - started < 1


def test_a_network_needs_its_input() -> None:
    with pytest.raises(RecipeError, match=r"needs model\.input"):
        read_network(load_recipe({"kw": 1, "model": {"layers": ["ReLU"]}}))


def test_a_backbone_that_does_not_run_is_a_mistake_of_the_recipe() -> None:
    model = {"backbone": "torchvision/resnet18", "input": [3, 8, 8, 8], "layers": ["ReLU"]}
    with pytest.raises(RecipeError, match="the backbone does not run on one input of"):
        read_network(load_recipe({"kw": 1, "model": model}))
