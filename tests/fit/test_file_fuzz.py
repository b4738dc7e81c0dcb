"""Damaged files that a run reads: checkpoints, metrics.csv, images. Each is used, or refused in one line; no traceback.

The continuous integration runs few cases of each kind; `pytest -m slow tests/fit/test_file_fuzz.py` runs ten thousand
of checkpoints, of tables and of images, and prints how many came out how.
"""

from __future__ import annotations

import copy
import io
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from quick_run import QUICK

from kw_lightning.callbacks.exact_checkpoint import KEY as EXACT
from kw_lightning.errors import KWError, RecipeError
from kw_lightning.fit import fit
from kw_lightning.fit.data import ImageData, data_module
from kw_lightning.fit.evaluation import load_classifier, read_checkpoint, trained_preprocessing
from kw_lightning.fit.folder import RunFolder
from kw_lightning.fit.metrics import parse_metrics
from kw_lightning.fit.resuming import prepare
from kw_lightning.fit.starting import Restoring, Start
from kw_lightning.fit.trainer import make_loggers
from kw_lightning.preprocessing import PREPROCESSING
from kw_lightning.recipe import load_recipe

sys.path.append(str(Path(__file__).parents[1]))

from fuzzing import MANY, broken, fuzz, hold_lines

SECONDS = 5.0
"""CPU time of one case: a checkpoint's network may be built."""

BYTES = st.one_of(
    st.sampled_from((b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0" * 40)),
    st.binary(min_size=1, max_size=8),
)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.binary(max_size=9),
        st.just(torch.ones(2)), st.just(torch.ones(2, dtype=torch.complex64)), st.just(torch.zeros(0)),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)  # fmt: skip


READ = ("epoch", "global_step", "hyper_parameters", "state_dict", "loops", EXACT, PREPROCESSING)
"""What of a checkpoint is read before Lightning reads the rest; for that see `test_starting.py`."""


@dataclass(frozen=True)
class Kind:
    """A kind of file: what is drawn, what is tried with a case, and how many cases are tried."""

    cases: st.SearchStrategy[Any]
    try_one: Callable[[Any], str]
    few: int
    many: int = MANY


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit("digits-resnet", QUICK, output=tmp_path_factory.mktemp("runs") / "run").folder


def outcome(try_it: Callable[[], object]) -> str:
    try:
        try_it()
    except KWError as error:
        hold_lines(messages(error))
        return "refused"
    return "used"


def messages(error: KWError) -> list[str]:
    """Return what is said of an error: one line of a file, one for each mistake of a recipe inside it."""
    return [str(problem) for problem in error.problems] if isinstance(error, RecipeError) else [str(error)]


def checkpoints(run: Path, folder: Path) -> dict[str, Kind]:
    """Return kinds of checkpoints: with damaged bytes, an altered pickle of the right checksum, and other values."""
    content, file = (run / "checkpoints/last.ckpt").read_bytes(), folder / "damaged.ckpt"
    known = load_classifier(read_checkpoint(run / "checkpoints/last.ckpt"), file)
    whole = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    state = {key: whole[key] for key in READ}

    def use() -> None:
        found = read_checkpoint(file)
        trained_preprocessing(found, file)
        load_classifier(found, file)
        with Restoring(file).readable():
            prepare(known.recipe, known, Start(RunFolder(folder), file, found))
            make_loggers(known.recipe, RunFolder(folder), found)

    def use_bytes(content: bytes) -> str:
        file.write_bytes(content)
        return outcome(use)

    assert use_bytes(content) == "used"

    def use_changed(change: Change) -> str:
        torch.save(change.of(state), file)
        return outcome(use)

    archive = zipfile.ZipFile(io.BytesIO(content))
    pickle = next(name for name in archive.namelist() if name.endswith("data.pkl"))
    return {
        "checkpoints with damaged bytes": Kind(broken(st.just(content), BYTES), use_bytes, 60, 4000),
        "checkpoints with an altered pickle": Kind(
            broken(st.just(archive.read(pickle)), BYTES).map(lambda altered: put_in(archive, pickle, altered)),
            use_bytes,
            40,
            3000,
        ),
        "checkpoints with other values": Kind(changes(state), use_changed, 40, 3000),
    }


def put_in(archive: zipfile.ZipFile, name: str, content: bytes) -> bytes:
    """Return a copy of an archive with another content of one file, the checksums right."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as copied:
        for other in archive.namelist():
            copied.writestr(other, content if other == name else archive.read(other))
    return written.getvalue()


@dataclass(frozen=True)
class Change:
    """A value of a checkpoint, at a path of keys, replaced or taken away."""

    path: tuple[Any, ...]
    value: Any = None
    removed: bool = False

    def of(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint with this change."""
        changed = copy.deepcopy(state)
        place: Any = changed
        for key in self.path[:-1]:
            place = place[key]
        if self.removed:
            del place[self.path[-1]]
        else:
            place[self.path[-1]] = self.value
        return changed


@st.composite
def changes(draw: st.DrawFn, state: dict[str, Any]) -> Change:
    """Return a change somewhere inside what is read of a checkpoint before training."""
    path: list[Any] = [draw(st.sampled_from(READ))]
    place = state[path[0]]
    while isinstance(place, dict | list) and place and draw(st.integers(0, 3)):
        path.append(draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))))
        place = place[path[-1]]
    removed = draw(st.integers(0, 3)) == 0
    return Change(tuple(path), None if removed else draw(VALUES), removed)


def tables(run: Path, folder: Path) -> dict[str, Kind]:
    """Return damaged metrics.csv, with which a run goes on."""
    recipe = load_recipe(run / "recipe.lock.yaml", ["log.tensorboard=false"])
    file = folder / "metrics.csv"
    pieces = st.one_of(
        BYTES,
        st.sampled_from((b",", b"\n", b'"', b"\r", b"nan", b"1e999", b"-1", b"9" * 30, b"x", b"step", b"\xef\xbb\xbf")),
    )

    def go_on(content: bytes) -> str:
        file.write_bytes(content)
        try:
            (table,) = make_loggers(recipe, RunFolder(folder), {"global_step": 4, "epoch": 1})
            table.log_metrics({"train/loss": 0.5, "epoch": 1}, step=4)
        except KWError as error:
            hold_lines(messages(error))
            return "refused"
        rows, damaged = parse_metrics(file)  # as they were kept
        assert damaged == 0
        assert rows[-1]["train/loss"] == 0.5
        assert all(isinstance(value, int | float) for row in rows for value in row.values())
        return "used" if len(rows) > 1 else "begun anew"

    return {"metrics.csv": Kind(broken(st.just((run / "metrics.csv").read_bytes()), pieces), go_on, 200)}


def images(folder: Path) -> dict[str, Kind]:
    """Return damaged images, read as those of a data set for training and for evaluation."""
    for place in (folder / part / name for part in ("train", "val") for name in ("a", "b")):
        place.mkdir(parents=True)
        Image.new("RGB", (9, 7)).save(place / "0.png")
    recipe = load_recipe(
        {
            "kw": 1,
            "data": {
                "name": "image_folder",
                "root": str(folder),
                "train": {"size": 8, "crop": "random", "flip": True, "mean": [0.5] * 3, "std": [0.2] * 3},
            },
        }
    )
    data = data_module(recipe)
    assert isinstance(data, ImageData)

    def load(content: bytes) -> str:
        for part in ("train", "val"):
            (folder / part / "a" / "0.png").write_bytes(content)

        def use() -> None:
            for part in (data.parts["train"], data.parts["val"]):
                image, target = part[0]
                assert image.shape == (3, 8, 8)
                assert image.isfinite().all()
                assert target == 0

        return outcome(use)

    return {"images": Kind(broken(st.sampled_from(pictures()), BYTES, places=3), load, 250)}


def pictures() -> list[bytes]:
    """Return a small picture in every format and mode that Pillow writes of those that `image_folder` looks for."""
    generator = torch.Generator().manual_seed(0)
    picture = Image.fromarray(torch.randint(0, 256, (7, 9, 4), dtype=torch.uint8, generator=generator).numpy())
    found = []
    for form in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF"):
        for mode in ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "LA"):
            written = io.BytesIO()
            try:
                converted = Image.new(mode, picture.size, 40_000) if mode == "I;16" else picture.convert(mode)
                converted.save(written, form)
            except (OSError, ValueError, KeyError):  # a format that does not know the mode
                continue
            found.append(written.getvalue())
    assert len(found) > 20
    return found


NAMES = (
    "checkpoints with damaged bytes",
    "checkpoints with an altered pickle",
    "checkpoints with other values",
    "metrics.csv",
    "images",
)


def kind(name: str, request: pytest.FixtureRequest, folder: Path) -> Kind:
    if name == "images":
        return images(folder)[name]
    run = request.getfixturevalue("run")
    return (tables if name == "metrics.csv" else checkpoints)(run, folder)[name]


# what the readers say of a file that they can use although it is damaged
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_used_or_refused(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    found = kind(name, request, tmp_path)
    outcomes = fuzz(name, found.cases, found.try_one, found.few, SECONDS)
    assert len(outcomes) > 1, "cases that all come out alike would show little"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_damaged_files(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = kind(name, request, tmp_path)
    fuzz(name, found.cases, found.try_one, found.many, SECONDS, capsys)
