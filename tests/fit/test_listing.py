"""Images of one's own in class folders and tables: what is taken, and every kind of mistake in a line."""

import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kw_lightning import load_recipe
from kw_lightning.errors import RecipeError, RunError
from kw_lightning.fit.data import ImageData, data_module
from kw_lightning.fit.data.listing import (
    SEPARATORS,
    files_under,
    list_folder,
    list_images,
    list_table,
    rarest,
    separator_of,
)
from kw_lightning.fit.data.sets import even_subset
from kw_lightning.inference.images import find_images


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def data_of(name: str, root: Path, **args: Any) -> ImageData:
    recipe = {
        "kw": 1,
        "model": {"backbone": "torchvision/resnet18", "input": [3, 8, 8]},
        "data": {"name": name, "root": str(root), "train": {"size": 8}, **({"args": args} if args else {})},
    }
    module = data_module(load_recipe(recipe))
    assert isinstance(module, ImageData)
    return module


def table(folder: Path, text: str, name: str = "pets.csv") -> Path:
    for label in ("cat", "dog"):
        for number in range(3):
            picture(folder / label / f"{number}.png")
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_folder_of_class_folders_holds_some_of_every_class_out(tmp_path: Path) -> None:
    for label, count in (("cat", 20), ("dog", 4), ("eel", 1)):
        for number in range(count):
            picture(tmp_path / label / f"{number}.png")
    picture(tmp_path / ".hidden" / "1.png")
    data = data_of("image_folder", tmp_path)
    assert data.classes == ("cat", "dog", "eel")
    assert (len(data.parts["train"]), len(data.parts["val"])) == (22, 3)
    held = [data.parts["val"].samples[index][1] for index in range(3)]
    assert held == [0, 0, 1]  # two of the cats, a dog, and not the only eel
    assert data.split is not None
    assert all(str(name).startswith(("cat/", "dog/")) for name in data.split.validation)
    assert data_of("image_folder", tmp_path).split == data.split
    assert [note.removeprefix(f"data: {tmp_path}: ") for note in data.notes] == [
        "of a class with a single image none validates: eel",
        "no validation part: 3 of the 25 training images validate, evenly from every class; "
        "data.validation says how many",
    ]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_parts_are_found_by_their_usual_names(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "train/cat/1.png")
    picture(tmp_path / "train/dog/1.png")
    picture(tmp_path / name / "dog/1.png")  # not every class needs to be evaluated
    data = data_of("image_folder", tmp_path)
    assert (len(data.parts["train"]), len(data.parts["val"]), data.notes) == (2, 1, ())
    assert data.parts["val"][0][1] == 1


def test_a_class_that_training_has_not_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "train/cat/1.png")
    picture(tmp_path / "val/cot/1.png")
    with pytest.raises(RunError, match="train and val differ in classes: cot of val is not in train"):
        data_of("image_folder", tmp_path)


def test_names_of_classes_are_alike_however_their_accents_are_written(tmp_path: Path) -> None:
    composed, apart = "größe", unicodedata.normalize("NFD", "größe")
    assert composed != apart
    for part, name in (("train", composed), ("train", "rot"), ("val", apart), ("val", "rot")):
        picture(tmp_path / part / name / "0.png")
    found = list_folder(tmp_path)
    assert found.classes == ("größe", "rot")
    assert found.counts("validation") == {"größe": 1, "rot": 1}
    picture(tmp_path / "a.png")
    rows = f"path,label,split\na.png,{composed},\ntrain/rot/0.png,{apart},val\n"
    (tmp_path / "pictures.csv").write_text(rows, encoding="utf-8")
    assert {entry.label for entry in list_table(tmp_path / "pictures.csv").entries} == {composed}


def test_a_folder_that_is_named_and_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "cat/1.png")
    with pytest.raises(RunError, match="photos holds no images in class folders: there is no such folder"):
        data_of("image_folder", tmp_path, train="photos")
    with pytest.raises(RunError, match="no images in class folders: no folders in it"):
        data_of("image_folder", tmp_path / "cat")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=rf"data: pets holds no images .*: there is no such folder in {tmp_path}$"):
        data_of("image_folder", Path("pets"))


def test_empty_classes_and_other_files_are_listed(tmp_path: Path) -> None:
    picture(tmp_path / "cat/1.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "cat/notes.txt").write_text("x")
    listing = list_folder(tmp_path)
    assert listing.empty == (str(tmp_path / "dog"),)
    assert listing.passed_over == (str(tmp_path / "cat/notes.txt"),)
    assert listing.classes == ("cat",)


@pytest.mark.parametrize(
    ("name", "between"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("a.tsv", ","), ("a", "\t")]
)
def test_a_table_names_images_labels_and_parts(tmp_path: Path, name: str, between: str) -> None:
    rows = ["\ufeffPath,label,Split", "cat/0.png,10,train", "cat/1.png,9,", " dog/0.png ,9,VAL", "dog/1.png,10,test"]
    file = table(tmp_path, "\n".join(rows).replace(",", between), name)
    listing = list_images(file)
    assert [entry.part for entry in listing.entries] == ["train", "", "validation", "test"]
    data = data_of("csv", file)
    assert data.classes == ("9", "10")  # numbers in the order of their values
    assert [(part, len(images)) for part, images in data.parts.items()] == [("train", 2), ("test", 1), ("val", 1)]
    assert (data.parts["val"][0][1], data.parts["test"][0][1]) == (0, 1)


def test_mistakes_of_a_table_are_a_line_for_each_kind(tmp_path: Path) -> None:
    rows = [
        "path,label,split",
        "cat/0.png,cat,trian",
        "cat/7.png,cat,",
        "cat/8.png,cat,",
        "cat/1.png,,",
        "cat/2.png,cat",
        "dog/0.png,dog,",
        "dog/0.png,cat,",
        "dog/0.png,dog,",
        "cat/nul\\0.png,cat,",
    ]
    file = table(tmp_path, "\n".join(rows))
    with pytest.raises(RunError) as caught:
        list_table(file)
    lines = [line.removeprefix(str(file)) for line in str(caught.value).splitlines()]
    assert lines == [
        ':2: found the split "trian", allowed: train, val, test or nothing; did you mean "train"?',
        f":3: there is no file {tmp_path}/cat/7.png (2 more such, line 4, 10)",
        ":5: no label",
        ":6: another number of values than the first line has names",
        ':8: dog/0.png is "cat" here and "dog" in line 7; an image has one label',
        ":9: dog/0.png stands in line 7 already",
    ]


@pytest.mark.parametrize("mark", [";", "|", " / "])
def test_rows_of_several_labels(tmp_path: Path, mark: str) -> None:
    rows = ["path,label,split", "cat/0.png,b;a;b,", "cat/1.png,,", "cat/2.png,a ; c,", "dog/0.png,b;c,val"]
    file = table(tmp_path, "\n".join(rows).replace(";", mark))
    listing = list_table(file, separator=mark)
    assert [listing.labels(entry) for entry in listing.entries] == [("b", "a"), (), ("a", "c"), ("b", "c")]
    assert (listing.classes, listing.counts("train")) == (("a", "b", "c"), {"a": 2, "b": 1, "c": 1})
    assert separator_of(file) == (mark if mark in SEPARATORS else None)  # of others it has to be told
    data = {"name": "csv", "root": str(file), "labels": "several", "args": {"separator": mark}, "train": {"size": 8}}
    images = ImageData(load_recipe({"kw": 1, "data": data}))
    assert images.class_counts == [2, 1, 1]
    assert images.parts["train"].read([0, 1, 2])[1].tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert images.parts["val"][0][1].tolist() == [0, 1, 1]


def test_images_of_several_labels_are_told_apart_by_their_rarest(tmp_path: Path) -> None:
    assert rarest([["a", "b"], ["a"], [], ["a", "b"], ["c", "a"]]) == ["b", "a", "", "b", "c"]
    rows = ["path,label", *(f"cat/{number}.png,a;{'b' if number % 2 else 'c'}" for number in range(3))]
    file = table(tmp_path, "\n".join([*rows, "dog/0.png,d;c", "dog/1.png,d;b;a"]))
    data = {"name": "csv", "root": str(file), "labels": "several"}
    images = ImageData(load_recipe({"kw": 1, "data": data}))
    assert len(images.parts["val"]) >= 1  # no two images have the same labels but the first and the third
    subset = even_subset(images.parts["train"].samples, 2)
    assert len(subset) == 2  # type: ignore[arg-type]


def test_several_labels_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no image to train with has a label"):
        list_table(table(tmp_path, "path,label\ncat/0.png,;\n"), separator=";")
    with pytest.raises(RunError, match=r"an image has one row, with all its labels, as a;b$"):
        list_table(table(tmp_path, "path,label\ncat/0.png,a\ncat/0.png,b\n"), separator=";")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,lable\na.png,cat\n", ':1: the column "label" is missing: found path, lable, allowed:.*is it "lable"'),
        (b"", ':1: the column "path" is missing: found an empty file'),
        (b"path,label\n", "no row names an image to train with"),
        (b"path,label\n\xff\xfe,cat\n", "this is no text in UTF-8"),
        (b"path,label,Label\na.png,cat,dog\n", ':1: the column "label" stands there 2 times'),
        (b"path,label\ncat\\0.png,cat\n", r":2: there is no file .*cat.0\.png; write / between folders"),
        (b'path,label\n"' + b"x" * 200_000 + b'",cat\n', "field larger than field limit"),
    ],
)
def test_a_file_that_is_no_such_table_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "pets.csv").write_bytes(content)
    with pytest.raises(RunError, match=message) as caught:
        list_table(tmp_path / "pets.csv")
    assert len(str(caught.value).splitlines()) == 1


def test_csv_needs_the_table_itself(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is a folder; data\.root of csv is the table itself"):
        data_of("csv", tmp_path)
    with pytest.raises(RunError, match=r"none\.csv: No such file"):
        data_of("csv", tmp_path / "none.csv")
    with pytest.raises(RecipeError, match="unknown key"):
        data_of("csv", tmp_path, train="x")


def test_what_is_hidden_inside_a_class_is_no_image_of_it(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/.ipynb_checkpoints/1-checkpoint.png", "cat/._1.png", "cat/more/2.png", "dog/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [Path(entry.file).relative_to(tmp_path).as_posix() for entry in list_folder(tmp_path).entries]
    assert found == ["cat/1.png", "cat/more/2.png", "dog/3.png"]


def test_links_to_folders_are_followed_but_not_back_to_where_they_come_from(tmp_path: Path) -> None:
    picture(tmp_path / "data" / "a" / "1.png")
    picture(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "data" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data" / "a" / "again").symlink_to(tmp_path / "data")
    assert [Path(file).name for file in files_under(tmp_path / "data" / "a")] == ["1.png", "2.png"]


def test_labels_that_are_measurements_are_refused_and_classes_that_are_numbers_are_not(tmp_path: Path) -> None:
    images = [picture(tmp_path / f"{number}.png").name for number in range(8)]
    file = tmp_path / "a.csv"

    def write(labels: list[str]) -> Path:
        rows = [f"{image},{label}\n" for image, label in zip(images, labels, strict=True)]
        file.write_text("".join(["path,label\n", *rows]))
        return file

    with pytest.raises(
        RunError, match=r"found 7 decimal numbers among the labels of 8 images: 0\.5, -1\.25, 3\.1e-1 and 4 m"
    ):
        list_images(write(["0.5", "-1.25", "3.1e-1", ".75", "2.0", "0.4", "1.7", "0.9"]))
    for stars in (["0.5", "4.5"], ["1.0", "2.0"], ["1", "2"]):
        assert list_images(write(stars * 4)).classes == tuple(stars)
    years = [str(1990 + number) for number in range(8)]
    assert list_images(write(years)).classes == tuple(years)


@contextmanager
def without_rights() -> Iterator[None]:
    """Be a user who may not read everything, where the tests are run by root."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("folder", ["cat", "cat/more"])
def test_a_folder_that_may_not_be_read_is_told_and_not_left_out(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat/1.png", "cat/more/2.png", "dog/3.png", "eel/4.png"):
        picture(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    Path(folder).chmod(0)
    try:
        with without_rights(), pytest.raises(RunError, match=f"data: {folder}: Permission denied"):
            list_folder(Path())
        with without_rights(), pytest.raises(RunError, match=f"{folder}: Permission denied"):
            find_images("cat")
    finally:
        Path(folder).chmod(0o755)


def test_a_class_that_is_a_link_to_nowhere_is_told(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        picture(tmp_path / "data" / name / "1.png")
    (tmp_path / "data" / "eel").symlink_to(tmp_path / "disk" / "eel")
    with pytest.raises(RunError, match=r"data: .*/data/eel: No such file or directory"):
        list_folder(tmp_path / "data")


def test_a_class_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    for name in (b"cat", b"k\xe4fer"):  # as archives of other systems unpack
        (tmp_path / os.fsdecode(name)).mkdir()
        (tmp_path / os.fsdecode(name) / "1.png").touch()
    with pytest.raises(RunError, match=r"k\\udce4fer: found a class with a name that is no text in UTF-8"):
        list_folder(tmp_path)
