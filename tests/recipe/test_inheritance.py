"""`extends`: where recipes are found, how they are laid over each other, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kw_lightning.errors import RecipeError
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.limits import MAX_EXTENDS_DEPTH, MAX_FILES

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / (name.replace("__", "/") + ".yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of an importable package whose import would fail, and which announces its recipes."""
    site = tmp_path / "site"
    folder = site / "team_recipes"
    (folder / "vision").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('a recipe made somebody import this')\n")
    (folder / "base.yaml").write_text("kw: 1\ntrain: {epochs: 7}\n")
    (folder / "vision" / "long.yaml").write_text("kw: 1\ntrain: {epochs: 700}\n")
    info = site / "team_recipes-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: team-recipes\nVersion: 1.2.3\n")
    (info / "entry_points.txt").write_text("[kw_lightning.recipes]\nteam = team_recipes.vision\n")
    (info / "RECORD").write_text("team_recipes/__init__.py,,\n")
    monkeypatch.syspath_prepend(site)
    return folder


def test_maps_merge_lists_replace_null_removes_and_plus_appends(write: Write) -> None:
    folder = write(
        base=(
            "kw: 1\nname: base\ndescription: of the base\n"
            "defaults: {budget: 1/2, attention: {norm: layer, reduction: 1/8}}\n"
            "warehouses:\n"
            "  a: {layers: [one, two], budget: 2}\n"
            "  b: {layers: [three]}\n"
            "  c: {layers: [four]}\n"
            "train: {epochs: 3, optimizer: {name: SGD, lr: 0.1}}\n"
        ),
        leaf=(
            "kw: 1\nextends: base.yaml\n"
            "defaults: {attention: {reduction: 1/4}}\n"
            "warehouses:\n"
            "  a: {layers+: [five], budget: null}\n"
            "  b: {layers: [six]}\n"
            "  c: null\n"
            "train: {optimizer: {lr: 0.2}}\n"
        ),
    )
    recipe = load_recipe(folder / "leaf.yaml")
    assert recipe.name == "leaf"
    assert recipe.description == ""
    assert recipe.document.data["warehouses"] == {"a": {"layers": ["one", "two", "five"]}, "b": {"layers": ["six"]}}
    assert recipe.document.data["defaults"] == {"budget": "1/2", "attention": {"norm": "layer", "reduction": "1/4"}}
    assert recipe.document.data["train"] == {"epochs": 3, "optimizer": {"name": "SGD", "lr": 0.2}}
    assert [source.file for source in recipe.document.sources] == [str(folder / "base.yaml"), str(folder / "leaf.yaml")]


def test_later_bases_lie_over_earlier_ones_and_a_base_has_bases(write: Write) -> None:
    folder = write(
        root="kw: 1\ntrain: {epochs: 1, seed: 1, accumulate: 1}\n",
        common__one="kw: 1\nextends: two.yaml\ntrain: {seed: 2}\n",
        common__two="kw: 1\nextends: ../root.yaml\ntrain: {accumulate: 2}\n",
        three="kw: 1\ntrain: {seed: 3}\n",
        leaf="kw: 1\nextends: [common/one.yaml, three.yaml]\n",
    )
    train = load_recipe(folder / "leaf.yaml").train
    assert train is not None
    assert (train.epochs, train.accumulate, train.seed) == (1, 2, 3)


def test_mistake_of_a_base_is_reported_in_its_file(write: Write) -> None:
    folder = write(
        base="kw: 1\ntrain:\n  epochs: ten\n  lr: 3\n",
        leaf="kw: 1\nextends: base.yaml\ntrain: {seed: x}\n",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / "leaf.yaml")
    places = [str(problem.location) for problem in caught.value.problems]
    assert places == [f"{folder}/base.yaml:3:11", f"{folder}/base.yaml:4:3", f"{folder}/leaf.yaml:3:15"]


def test_mistake_of_yaml_in_a_base_and_mistakes_of_the_leaf_come_together(write: Write) -> None:
    folder = write(base="kw: 1\ntrain: [\n", leaf="kw: 1\nextends: base.yaml\ntrain: {seed: x}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / "leaf.yaml")
    assert [problem.location and problem.location.line for problem in caught.value.problems] == [3, 3]
    assert "base.yaml" in str(caught.value.problems[0])


def test_overridden_mistake_of_a_base_is_none(write: Write) -> None:
    folder = write(base="kw: 1\ntrain: {epochs: ten}\n", leaf="kw: 1\nextends: base.yaml\ntrain: {epochs: 10}\n")
    recipe = load_recipe(folder / "leaf.yaml")
    assert recipe.train is not None
    assert recipe.train.epochs == 10


def test_shipped_recipe_is_extended_by_name() -> None:
    recipe = load_recipe({"kw": 1, "extends": "resnet18-kw-1x", "defaults": {"budget": "1/8"}})
    assert recipe.model is not None
    assert recipe.model.backbone == "torchvision/resnet18"
    assert recipe.name == "recipe"
    assert float(recipe.warehouses[0].budget.ratio or 0) == 1 / 8


def test_a_folder_with_the_name_of_a_shipped_recipe_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits-resnet").mkdir()  # as of kw-fit digits-resnet --output digits-resnet
    assert load_recipe("digits-resnet").name == "digits-resnet"


def test_package_is_extended_without_importing_it(write: Write, package: Path) -> None:
    folder = write(
        leaf="kw: 1\nextends: package://team_recipes/base.yaml\n",
        announced="kw: 1\nextends: team/long\n",
    )
    recipe = load_recipe(folder / "leaf.yaml")
    assert recipe.train is not None
    assert recipe.train.epochs == 7
    source = recipe.document.sources[0]
    assert (source.file, source.package, source.version) == (
        "package://team_recipes/base.yaml",
        "team-recipes",
        "1.2.3",
    )
    announced = load_recipe(folder / "announced.yaml")
    assert announced.train is not None
    assert announced.train.epochs == 700
    assert load_recipe("team/long").document.data["train"] == {"epochs": 700}
    assert "team_recipes" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package://team_recipes/../other/x.yaml", "lies outside of the folder"),
        (
            "package://team_recipes/bse.yaml",
            'found the unknown file "bse.yaml", allowed: a recipe of the package "team_recipes"; did you '
            'mean "base.yaml"?',
        ),
        ("package://team_recipes/secret.txt", "allowed: package://PACKAGE/FILE.yaml"),
        ("package://team.recipes/base.yaml", "allowed: package://PACKAGE/FILE.yaml"),
        ("package://sys/base.yaml", 'the package "sys" of'),
        ("/etc/passwd", "found the unknown recipe"),
        ("/etc/secret.yaml", "lies outside of the folder"),
        ("outside.yaml", "lies outside of the folder"),
        ("notes.txt", "found the unknown recipe"),
        ("bse.yaml", 'did you mean "base.yaml"?'),
        ("nul\\0.yaml", "found the unknown recipe"),
        ("loop.yaml", "found the unknown recipe"),
    ],
)
def test_nothing_is_read_outside_the_folder_and_packages(
    name: str, message: str, write: Write, package: Path, tmp_path: Path
) -> None:
    folder = write(inside__leaf=f'kw: 1\nextends: "{name}"\n', inside__base="kw: 1\n", secret="kw: 1\n") / "inside"
    (folder / "notes.txt").write_text("kw: 1\n")
    (folder / "outside.yaml").symlink_to(tmp_path / "secret.yaml")
    (folder / "loop.yaml").symlink_to(folder / "loop.yaml")
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / "leaf.yaml")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(f"{folder}/leaf.yaml:2:10: extends: ")


def test_cycle_is_refused_with_its_way(write: Write) -> None:
    folder = write(
        a="kw: 1\nextends: b.yaml\n",
        b="kw: 1\nextends: c.yaml\n",
        c="kw: 1\nextends: a.yaml\n",
        d="kw: 1\nextends: d.yaml",
    )
    with pytest.raises(
        RecipeError, match=r"c\.yaml:2:10: extends: a recipe cannot extend itself: .*a.* → .*b.* → .*c.* → .*a"
    ):
        load_recipe(folder / "a.yaml")
    with pytest.raises(RecipeError, match=r"d\.yaml:2:10: extends: a recipe cannot extend itself"):
        load_recipe(folder / "d.yaml")


def test_depth_and_number_of_files_are_bounded(write: Write) -> None:
    chain = {f"r{index}": f"kw: 1\nextends: r{index + 1}.yaml\n" for index in range(MAX_EXTENDS_DEPTH + 1)}
    folder = write(**chain, **{f"r{MAX_EXTENDS_DEPTH + 1}": "kw: 1\n"})
    assert load_recipe(folder / "r2.yaml").name == "r2"
    with pytest.raises(RecipeError, match=f"more than {MAX_EXTENDS_DEPTH} recipes extend each other"):
        load_recipe(folder / "r0.yaml")
    # Twice as many at each level: 2⁸ files without the limit.
    double = {f"d{index}": f"kw: 1\nextends: [d{index + 1}.yaml, d{index + 1}.yaml]\n" for index in range(7)}
    with pytest.raises(RecipeError, match=f"a recipe comes from at most {MAX_FILES} files"):
        load_recipe(write(**double, d7="kw: 1\n") / "d0.yaml")


def test_version_is_asked_of_every_file(write: Write) -> None:
    folder = write(base="train: {epochs: 1}\n", leaf="kw: 1\nextends: base.yaml\n")
    with pytest.raises(RecipeError, match=r'base\.yaml:1:1: the key "kw" is missing'):
        load_recipe(folder / "leaf.yaml")


def test_append_needs_an_inherited_list_or_makes_one(write: Write) -> None:
    folder = write(
        base="kw: 1\nwarehouses: {a: {layers: one}}\n",
        leaf="kw: 1\nextends: base.yaml\nwarehouses:\n  a: {layers+: [two]}\n  b: {layers+: [three]}\n",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / "leaf.yaml")
    assert "leaf.yaml:4:7: warehouses.a.layers+: there is no list to append to" in str(caught.value)
    assert len(caught.value.problems) == 2


def test_keys_for_anchors_are_not_read_and_merge_keys_work(write: Write) -> None:
    folder = write(
        leaf=(
            "kw: 1\n"
            "x-warehouse: &small {budget: 1/4, attention: {norm: layer}}\n"
            "x-notes: [anything, {goes: here}]\n"
            "warehouses:\n"
            "  a: {<<: *small, layers: [x]}\n"
            "  b: {<<: [{budget: 2}, *small], layers: [y]}\n"
        )
    )
    recipe = load_recipe(folder / "leaf.yaml")
    first, second = recipe.warehouses
    assert (str(first.budget.ratio), first.attention.norm) == ("1/4", "layer")
    assert (str(second.budget.ratio), second.attention.norm) == ("2", "layer")
    assert set(recipe.document.data) == {"kw", "name", "warehouses"}


def test_place_of_an_inherited_default_is_where_it_stands(write: Write) -> None:
    folder = write(
        base="kw: 1\ndefaults:\n  budget: 1/2\n", leaf="kw: 1\nextends: base.yaml\nwarehouses:\n  a: {layers: [x]}\n"
    )
    document = load_recipe(folder / "leaf.yaml").document
    assert str(document.location("warehouses.a.budget")) == f"{folder}/base.yaml:3:11"
    assert str(document.location("warehouses.a.cell.out")) == f"{folder}/leaf.yaml:4:3"
    assert str(document.location("warehouses.a.layers[0]")) == f"{folder}/leaf.yaml:4:16"
    assert str(document.problem("nowhere.at.all", "x")) == f"{folder}/leaf.yaml:1:1: nowhere.at.all: x"


def test_a_place_in_a_shipped_recipe_has_its_name_and_no_path_of_the_installation(write: Write) -> None:
    folder = write(leaf="kw: 1\nextends: digits-resnet\n")
    for document in (load_recipe(folder / "leaf.yaml").document, load_recipe("digits-resnet").document):
        place = document.location("data.name")
        assert place is not None
        assert place.file == "digits-resnet"
        assert str(document.problem("data.name", "x")).startswith(f"{place}: data.name")
