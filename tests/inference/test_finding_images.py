"""Finding images by files, folders, globs and tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from kw_lightning.errors import RunError
from kw_lightning.inference import find_images


def test_folder_is_searched_below_too_and_other_files_are_left_out(pictures: Path) -> None:
    names = [file.relative_to(pictures).as_posix() for file in find_images([pictures])]
    assert names == ["0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "below/grey.jpg"]


def test_a_folder_is_searched_as_training_does(pictures: Path, tmp_path: Path) -> None:
    for name in ("._0.png", ".thumbnails/0.png", "below/.ipynb_checkpoints/grey-checkpoint.jpg"):
        (pictures / name).parent.mkdir(exist_ok=True)
        (pictures / name).write_bytes(b"hidden")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "linked").symlink_to(pictures, target_is_directory=True)
    names = [file.relative_to(tmp_path / "all" / "linked").as_posix() for file in find_images([tmp_path / "all"])]
    assert names == ["0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "below/grey.jpg"]


def test_one_name_is_one_name(pictures: Path) -> None:
    assert find_images(str(pictures)) == find_images(pictures) == find_images([pictures])


def test_order_is_that_of_the_names(pictures: Path) -> None:
    found = find_images([pictures / "3.png", str(pictures / "[01].png"), pictures / "below"])
    assert [file.name for file in found] == ["3.png", "0.png", "1.png", "grey.jpg"]


def test_glob_with_folders(pictures: Path) -> None:
    assert [file.name for file in find_images([f"{pictures}/**/*.jpg"])] == ["grey.jpg"]


@pytest.mark.parametrize(("name", "mark"), [("list.csv", ","), ("list.tsv", "\t")])
def test_table_names_files_beside_it(name: str, mark: str, pictures: Path) -> None:
    lines = [["label", "path"], ["a", "2.png"], ["b", "below/grey.jpg"]]
    (pictures / name).write_text("\n".join(mark.join(line) for line in lines))
    assert find_images([pictures / name]) == [pictures / "2.png", pictures / "below" / "grey.jpg"]


def test_table_without_paths_is_refused(pictures: Path) -> None:
    (pictures / "list.csv").write_text("file,label\n2.png,a\n")
    with pytest.raises(RunError, match=r'list\.csv:1: the column "path" is missing: found file, label, allowed: path'):
        find_images([pictures / "list.csv"])


def test_table_is_read_as_for_training(pictures: Path) -> None:
    (pictures / "list.csv").write_text("Label;Path\ncat;2.png\n", encoding="utf-8-sig")
    assert find_images([pictures / "list.csv"]) == [pictures / "2.png"]
    (pictures / "list.csv").write_text("path\n2.png\n", encoding="utf-16")
    with pytest.raises(RunError, match=r"list\.csv: this is no text in UTF-8"):
        find_images([pictures / "list.csv"])


def test_all_names_without_an_image_are_told_at_once(pictures: Path) -> None:
    (pictures / "empty").mkdir()
    with pytest.raises(RunError) as caught:
        find_images([pictures / "nope.png", pictures / "0.png", pictures / "empty"])
    first, second = str(caught.value).splitlines()
    assert first == f"{pictures}/nope.png: no such file, and no file matches it"
    assert second == f"{pictures}/empty: no image in this folder"
