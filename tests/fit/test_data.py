"""The data sets by name, their parts and their transforms."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from kw_lightning import KWError, load_recipe
from kw_lightning.errors import RecipeError, RunError
from kw_lightning.fit.data import DATA_SETS, ImageData, data_module
from kw_lightning.fit.data.augmentation import RandAugment
from kw_lightning.fit.data.sets import Images, digits, even_subset
from kw_lightning.fit.data.transforms import Shift, transform
from kw_lightning.fit.evaluation import trained_preprocessing
from kw_lightning.fit.module import Classifier
from kw_lightning.preprocessing import PREPROCESSING, Preprocessing, preprocessing
from kw_lightning.recipe.types import Data, Recipe


def recipe_with(data: dict[str, Any], **train: Any) -> Recipe:
    return load_recipe({"kw": 1, "model": {"backbone": "torchvision/resnet18"}, "data": data, "train": train})


def images(data: Any) -> torch.Tensor:
    return torch.stack([data[index][0] for index in range(len(data))])


def test_digits_are_the_published_ones() -> None:
    source = digits(Data("digits"))
    train, test = source.parts["train"], source.parts["test"]
    assert source.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    assert isinstance(train, Images)
    assert isinstance(test, Images)
    assert (len(train), len(test), source.num_classes) == (1200, 597, 10)
    counts = torch.bincount(torch.cat([train.targets, test.targets])).tolist()
    assert counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as UCI describes the file
    assert train.targets[:10].tolist() == list(range(10))
    assert train.images.shape == (1200, 1, 8, 8)
    assert int(train.images.max()) == 255


def test_digits_ship_small_and_with_their_licence() -> None:
    folder = files("kw_lightning.fit.data")
    assert len((folder / "digits.npz").read_bytes()) < 100_000
    text = (folder / "digits.md").read_text()
    assert "CC BY 4.0" in text
    assert "archive.ics.uci.edu" in text


def test_evaluation_noise_and_shifts_are_the_same_every_time() -> None:
    options = {
        "name": "digits",
        "eval": {"samples": 20, "noise": 0.3, "shift": 1},
        "train": {"samples": 20, "noise": 0.3},
    }
    first, second = (ImageData(recipe_with(options)) for _ in range(2))
    torch.manual_seed(1)
    a = images(first.parts["val"])
    torch.manual_seed(2)
    assert torch.equal(a, images(second.parts["val"]))
    assert not torch.equal(a, images(ImageData(recipe_with({"name": "digits", "eval": {"samples": 20}})).parts["val"]))
    before = images(first.parts["train"])
    first.parts["train"].epoch.fill_(1)
    assert not torch.equal(before, images(first.parts["train"]))  # training draws anew in every epoch


def test_seeded_evaluation_leaves_the_global_random_numbers_alone() -> None:
    data = ImageData(recipe_with({"name": "digits", "eval": {"samples": 5, "noise": 0.3}}))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    images(data.parts["val"])
    assert torch.equal(torch.rand(3), expected)


def test_order_of_training_follows_from_the_seed() -> None:
    def order(seed: int) -> list[int]:
        data = ImageData(recipe_with({"name": "digits", "batch_size": 32, "train": {"samples": 64}}, seed=seed))
        return [int(target) for _, targets in data.train_dataloader() for target in targets]

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize(
    ("count", "batch_size", "expected"),
    [(33, 8, [8] * 4), (34, 8, [8] * 4 + [2]), (32, 8, [8] * 4), (33, 1, [1] * 33), (1, 8, [1])],
)
def test_a_single_image_that_is_left_over_does_not_train_alone(
    count: int, batch_size: int, expected: list[int]
) -> None:
    data = {"name": "digits", "batch_size": batch_size, "validation": "none", "train": {"samples": count}}
    loader = ImageData(recipe_with(data)).train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        batches = list(loader)
        assert [len(images) for images, _ in batches] == expected
        assert len(loader) == len(expected)
        epochs.append(torch.cat([images for images, _ in batches]).sum(dim=(1, 2, 3)).sort().values)
    if count == 33 and batch_size == 8:
        assert not torch.equal(*epochs)  # another one in each epoch


def test_even_subset_takes_from_every_class_in_turn() -> None:
    samples = Images(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), [0, 0, 0, 0, 1, 1, 2, 2])
    subset = even_subset(samples, 5)
    assert sorted(subset[index][1] for index in range(5)) == [0, 0, 1, 1, 2]
    assert even_subset(samples, None) is samples


def test_every_name_of_the_schema_is_a_data_set() -> None:
    import json

    from kw_lightning.resources import shipped

    schema = json.loads((shipped("schemas") / "recipe-1.schema.json").read_text())
    assert set(schema["$defs"]["data"]["properties"]["name"]["anyOf"][0]["enum"]) == set(DATA_SETS)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist", "image_folder"])
def test_missing_data_is_one_message(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=str(tmp_path)):
        data_module(recipe_with({"name": name, "root": str(tmp_path)}))


def test_image_folder_reads_class_folders(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name, value in (("cat", 0), ("dog", 255)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            v2.functional.to_pil_image(torch.full((3, 12, 16), value, dtype=torch.uint8)).save(folder / "1.png")
    section = {"resize": 10, "crop": "center", "size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]}
    data = data_module(recipe_with({"name": "image_folder", "root": str(tmp_path), "train": section, "eval": section}))
    assert isinstance(data, ImageData)
    assert (data.num_classes, data.classes) == (2, ("cat", "dog"))
    image, target = data.parts["val"][1]
    assert (image.shape, target) == ((3, 8, 8), 1)
    assert torch.all(image == 1)


@pytest.mark.parametrize("labels", ["one", "several"])
def test_a_single_class_is_refused(tmp_path: Path, labels: str) -> None:
    v2.functional.to_pil_image(torch.zeros(3, 4, 4)).save(tmp_path / "1.png")
    (tmp_path / "table.csv").write_text("path,label\n1.png,cat\n")
    with pytest.raises(RunError, match='found a single class, "cat", allowed: two or more'):
        data_module(recipe_with({"name": "csv", "root": str(tmp_path / "table.csv"), "labels": labels}))


def test_image_folder_with_other_classes_in_evaluation(tmp_path: Path) -> None:
    for folder in ("train/cat", "val/dog"):
        (tmp_path / folder).mkdir(parents=True)
        v2.functional.to_pil_image(torch.zeros(3, 4, 4)).save(tmp_path / folder / "1.png")
    with pytest.raises(RunError, match="train and val differ in classes: dog of val is not in train"):
        data_module(recipe_with({"name": "image_folder", "root": str(tmp_path)}))


@pytest.mark.parametrize(
    ("name", "args", "path", "message"),
    [
        ("fake", {"clases": 3}, "data.args.clases", r'found the unknown key "clases".*did you mean "classes"\?'),
        ("fake", {"classes": 0}, "data.args.classes", "found 0, allowed: a whole number of at least 1"),
        ("fake", {"classes": "ten"}, "data.args.classes", 'found "ten", allowed: a whole number'),
        ("fake", {"train": 999_999_999_999}, "data.args.train", "at most 10,000,000"),
        ("fake", {"evaluation": -1}, "data.args.evaluation", "found -1"),
        ("fake", {"shape": 8}, "data.args.shape", r"found 8, allowed: a list"),
        ("fake", {"shape": [3, "a", 8]}, "data.args.shape[1]", 'found "a", allowed: a whole number'),
        ("fake", {"shape": [9999, 9999, 9999]}, "data.args.shape", "found an image of 999,700,029,999 numbers"),
        ("image_folder", {"train": 5}, "data.args.train", "found 5, allowed: a text"),
        ("mnist", {"download": "soon"}, "data.args.download", 'found "soon", allowed: true or false'),
        ("digits", {"download": True}, "data.args.download", 'found the unknown key "download"'),
    ],
)
def test_wrong_arguments_of_data_are_placed_mistakes_of_the_recipe(
    name: str, args: dict[str, Any], path: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        recipe_with({"name": name, "args": args})
    assert [problem.path for problem in caught.value.problems] == [path]


@pytest.mark.parametrize(
    ("sections", "path", "message"),
    [
        ({"train": {"mean": [0.5]}}, "data.train.mean", "found mean without std, allowed: both or neither"),
        ({"eval": {"std": [0.5]}}, "data.eval.std", "found std without mean, allowed: both or neither"),
        ({"train": {"mean": [0.5], "std": [1, 1]}}, "data.train.std", "found 1 values in mean and 2 in std"),
        (
            {"train": {"mean": [0.5], "std": [1]}, "eval": {"mean": [0, 0, 0]}},
            "data.eval.mean",
            "found 3 values in mean",
        ),
    ],
)
def test_mean_and_std_go_together(sections: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        recipe_with({"name": "digits", **sections})
    assert [problem.path for problem in caught.value.problems] == [path]


def test_mean_and_std_have_a_value_for_each_channel_of_the_images() -> None:
    options = {"mean": [0.5] * 3, "std": [1] * 3}
    with pytest.raises(RecipeError, match=r"data\.train\.std: found 3 values, allowed: 1, one for each channel"):
        data_module(recipe_with({"name": "digits", "train": options}))


def test_fake_data_has_the_shape_asked_for() -> None:
    data = data_module(recipe_with({"name": "fake", "args": {"shape": [3, 16, 16], "classes": 7, "train": 100}}))
    assert isinstance(data, ImageData)
    assert (len(data.parts["train"]), data.parts["train"][99][0].shape, data.num_classes) == (100, (3, 16, 16), 7)


def test_python_data_needs_permission() -> None:
    with pytest.raises(KWError, match=r"allow_python=.*collections"):
        data_module(recipe_with({"name": "python:collections:OrderedDict"}))
    with pytest.raises(RecipeError, match="a LightningDataModule is needed"):
        data_module(recipe_with({"name": "python:collections:OrderedDict"}), allow_python=["collections"])


def test_images_are_prepared_anew_where_data_eval_is_changed_and_nowhere_else() -> None:
    state, path = {PREPROCESSING: Preprocessing(size=8).to_dict()}, Path("last.ckpt")
    for change in ("data.eval.size=16", "data.eval={size: 16}"):
        assert trained_preprocessing(state, path, [change]) is None
    assert trained_preprocessing(state, path, ["data.eval_batch_size=7"]) == Preprocessing(size=8)


def test_evaluation_of_a_checkpoint_reads_images_as_it_was_trained() -> None:
    recipe = recipe_with({"name": "digits", "train": {"mean": [0.5], "std": [0.25]}})
    trained = Preprocessing(mean=(0.0,), std=(2.0,))
    checkpoint: dict[str, Any] = {}
    Classifier(load_recipe("digits-resnet")).on_save_checkpoint(checkpoint)
    assert trained_preprocessing(checkpoint, Path("last.ckpt")) == preprocessing(load_recipe("digits-resnet"))
    assert trained_preprocessing({}, Path("last.ckpt")) is None
    ours, theirs = data_module(recipe), data_module(recipe, trained=trained)
    assert isinstance(ours, ImageData)
    assert isinstance(theirs, ImageData)
    assert torch.allclose(theirs.parts["val"][0][0], (ours.parts["val"][0][0] * 0.25 + 0.5) / 2)


def test_evaluation_takes_normalisation_from_training() -> None:
    recipe = recipe_with({"name": "digits", "train": {"mean": [0.5], "std": [0.25]}})
    image = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    assert torch.allclose(transform(recipe, "eval")(image), torch.full((1, 8, 8), 2.0))


def test_crop_needs_a_size() -> None:
    with pytest.raises(RecipeError, match=r'data\.train\.crop: "random" needs data\.train\.size'):
        transform(recipe_with({"name": "digits", "train": {"crop": "random"}}), "train")


@pytest.mark.parametrize(
    "options",
    [
        {"crop": "random", "size": 12, "padding": 3},
        {"crop": "random_resized", "size": 12, "scale": [0.5, 1]},
        {"resize": 14, "crop": "center", "size": 12},
        {"size": 12},
        {"size": 12, "flip": True, "rand_augment": {"std": 2}, "random_erasing": 1.0},
    ],
)
def test_transforms_give_the_size(options: dict[str, Any]) -> None:
    result = transform(recipe_with({"name": "digits", "train": options}), "train")(
        torch.randint(0, 256, (3, 16, 20), dtype=torch.uint8)
    )
    assert (result.shape, result.dtype) == ((3, 12, 12), torch.float32)


def test_shift_moves_by_whole_pixels_and_fills_with_zeros() -> None:
    torch.manual_seed(0)
    image = torch.zeros(1, 7, 7, dtype=torch.uint8)
    image[0, 3, 3] = 200
    places = set()
    for _ in range(100):
        moved = v2.Compose([v2.ToImage(), Shift(1), v2.ToPureTensor()])(image)
        assert sorted(moved.flatten().tolist())[-2:] == [0, 200]
        places.add(tuple((moved[0] == 200).nonzero()[0].tolist()))
    assert places == {(row, column) for row in (2, 3, 4) for column in (2, 3, 4)}


def test_rand_augment_draws_its_strength() -> None:
    torch.manual_seed(0)
    augment = RandAugment(magnitude=28, std=3)
    seen = set()
    for _ in range(50):
        augment(torch.zeros(3, 8, 8, dtype=torch.uint8))
        seen.add(augment.magnitude)
    assert len(seen) > 3
    assert 0 <= min(seen) <= max(seen) <= 30
