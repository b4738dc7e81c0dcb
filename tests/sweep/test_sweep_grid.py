"""What stands on the command line of a sweep, taken apart."""

import pytest

from kw_lightning.errors import RecipeError
from kw_lightning.recipe import load_recipe
from kw_lightning.sweep.grid import MAX_NAME, MAX_ROWS, labels, make_grid, parse_axis, split_values
from kw_lightning.sweep.loading import load_rows


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1,0.05", ["0.1", "0.05"]),
        ("[8,8],[4,4]", ["[8,8]", "[4,4]"]),
        ("{out: 1/2, in: 1}, {out: 1, in: 1}", ["{out: 1/2, in: 1}", "{out: 1, in: 1}"]),
        ("'a,b',\"c,]d\"", ["'a,b'", '"c,]d"']),
        ("[[a,b],{c: [d,e]}]", ["[[a,b],{c: [d,e]}]"]),
        ("it's,that's", ["it's", "that's"]),
        ("1/4,1/2,null", ["1/4", "1/2", "null"]),
        ("a,,b,", ["a", "", "b", ""]),
        ("[a,b", ["[a,b"]),
    ],
)
def test_commas_part_values_but_for_those_in_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_the_grid_is_every_combination_with_telling_names_and_one_value_holds_for_all() -> None:
    grid = make_grid(["net.yaml"], ["train.optimizer.lr=0.1,0.05", "train.epochs=9", "a.cell=[8,8],1/2"], seeds=3)
    assert [row.name for row in grid.rows] == [
        "lr=0.1,cell=8-8",
        "lr=0.1,cell=1-2",
        "lr=0.05,cell=8-8",
        "lr=0.05,cell=1-2",
    ]
    assert grid.rows[1].changes == ("train.optimizer.lr=0.1", "train.epochs=9", "a.cell=1/2")
    assert grid.rows[0].label == "lr=0.1, cell=[8,8]"
    assert grid.seeds == (0, 1, 2)


def test_several_recipes_are_an_axis_and_the_first_is_the_first_row() -> None:
    grid = make_grid(["a/static.yaml", "digits-resnet"], ["train.epochs=1,2"])
    assert [row.name for row in grid.rows][:3] == [
        "recipe=static,epochs=1",
        "recipe=static,epochs=2",
        "recipe=digits-resnet,epochs=1",
    ]
    assert [row.name for row in make_grid(["a/net.yaml", "b/net.yaml"], []).rows] == [
        "recipe=a-net.yaml",
        "recipe=b-net.yaml",
    ]
    assert [row.name for row in make_grid(["a/net.yaml"], []).rows] == ["net"]


def test_labels_are_the_shortest_ends_that_differ() -> None:
    keys = ["train.optimizer.lr", "warehouses.a.budget", "warehouses.b.budget", "callbacks+"]
    assert labels(keys) == ["lr", "a.budget", "b.budget", "callbacks"]


def test_names_that_fall_together_or_are_long_are_told_apart() -> None:
    rows = make_grid(["net.yaml"], [f"description=1/2,1-2,{'x' * 200},{'x' * 201}"]).rows
    assert len({row.name for row in rows}) == 4
    assert all(len(row.name) <= MAX_NAME + 7 and "/" not in row.name for row in rows)
    assert rows == make_grid(["net.yaml"], [f"description=1/2,1-2,{'x' * 200},{'x' * 201}"]).rows


def test_train_seed_names_the_seeds_and_is_no_axis() -> None:
    grid = make_grid(["net.yaml"], ["train.seed=100,7", "train.epochs=1,2"])
    assert (grid.seeds, [row.name for row in grid.rows]) == ((100, 7), ["epochs=1", "epochs=2"])
    assert grid.rows[0].changes == ("train.epochs=1",)
    with pytest.raises(RecipeError, match="seeds given twice, allowed: --seeds N"):
        make_grid(["net.yaml"], ["train.seed=1,2"], seeds=2)
    with pytest.raises(RecipeError, match=r'1:12: train\.seed: found "x", allowed: whole numbers'):
        make_grid(["net.yaml"], ["train.seed=x,2"])


def test_values_given_twice_and_too_many_rows_are_refused() -> None:
    with pytest.raises(RecipeError, match=r'train.epochs: found several times the value "1", allowed: each value once'):
        parse_axis("train.epochs=1,2,1")
    with pytest.raises(RecipeError, match=f"allowed: at most {MAX_ROWS:,}"):
        make_grid(["net.yaml"], [f"a.k{axis}=1,2,3" for axis in range(8)])


def test_a_key_that_is_varied_is_given_once() -> None:
    with pytest.raises(RecipeError, match=r"line>:3:1: a\.b: found this key .*, allowed: each once, as a.b=1,2,3$"):
        make_grid(["net.yaml"], ["a.b=1,2", "a.c=1,2", "a.b=2,3"])
    assert len(make_grid(["net.yaml"], ["a+=[1],[2]", "a+=[3],[4]"]).rows) == 4  # one after the other
    assert len(make_grid(["net.yaml"], ["b=1", "b=2"]).rows) == 1  # the last counts, as in kw-fit


def test_mistakes_of_all_rows_come_together_each_once_with_the_nearest_name() -> None:
    grid = make_grid(["digits-resnet"], ["train.optimizr.lr=0.1,0.2", "train.epochs=1,two", "engine=auto,mix_kernel"])
    with pytest.raises(RecipeError) as caught:
        load_rows(grid.rows)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert 'did you mean "optimizer"?' in lines[0]
    assert "(row" not in lines[0]  # all rows have it
    assert 'train.epochs: found "two"' in lines[1]
    assert lines[1].endswith("(row lr=0.1, epochs=two, engine=auto and 3 more)")
    assert 'did you mean "mix_kernels"?' in lines[2]


def test_rows_that_are_the_same_recipe_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"lr=0\.1 and lr=1e-1 are the same recipe"):
        load_rows(make_grid(["digits-resnet"], ["train.optimizer.lr=0.1,1e-1"]).rows)


def test_a_star_in_an_override_is_every_key_of_a_map() -> None:
    recipe = load_recipe("digits-resnet", ["warehouses.*.budget=1/4", "warehouses.*.layers+=[stem]"])
    assert [str(warehouse.budget.ratio) for warehouse in recipe.warehouses] == ["1/4", "1/4"]
    assert all(warehouse.layers[-1].name == "stem" for warehouse in recipe.warehouses)
    for key, found in {"vars.*.budget": "no map", "train.epochs.*.a": "every key of a map: found 20"}.items():
        with pytest.raises(RecipeError, match=found):
            load_recipe("digits-resnet", [f"{key}=1/4"])
