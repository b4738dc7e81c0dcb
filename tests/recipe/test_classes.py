"""`num_classes: auto` and `units: auto`: filled in with the number that the data says."""

from kw_lightning import load_recipe
from kw_lightning.recipe.classes import open_classes, with_classes

LAYERS = {
    "kw": 1,
    "model": {
        "input": [4],
        "blocks": {"head": {"layers": [{"Dense": {"units": "auto"}}]}},
        "layers": [{"Dense": {"units": 8}}, "head", {"Dense": {"units": "auto"}}],
    },
}


def test_every_open_number_is_filled_in_and_nothing_else() -> None:
    recipe = load_recipe(LAYERS)
    assert open_classes(recipe) == ["model.blocks.head.layers[0].Dense.units", "model.layers[2].Dense.units"]
    filled = with_classes(recipe, 3)
    assert open_classes(filled) == []
    assert filled.document.data["model"]["layers"][0] == {"Dense": {"units": 8}}
    assert filled.model is not None
    assert filled.model.layers[2] == {"Dense": {"units": 3}}
    assert open_classes(recipe) != []  # the recipe itself stays


def test_a_recipe_with_numbers_stays_the_same_object() -> None:
    recipe = load_recipe({"kw": 1, "model": {"backbone": "torchvision/resnet18", "args": {"num_classes": 3}}})
    assert with_classes(recipe, 5) is recipe
