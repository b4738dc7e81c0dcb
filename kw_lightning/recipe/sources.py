"""Where recipes are found and how they are read: files, shipped ones, and those of installed packages.

A recipe from a stranger may extend others, so what a file names is looked up in three places only: the folder of the
recipe that was asked for, the shipped recipes, and installed packages, whose code is not imported for it. Links and
`..` that lead out of these are refused, and so is every file that is not called `.yaml` or `.yml`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from kw_lightning.errors import RunError, did_you_mean, mistake, sentence, shown
from kw_lightning.paths import user_path
from kw_lightning.recipe.limits import MAX_BYTES
from kw_lightning.resources import shipped
from kw_lightning.versions import OWN

ENTRY_POINTS = "kw_lightning.recipes"
PACKAGE = "package://"
SHIPPED_BY = OWN
SUFFIXES = (".yaml", ".yml")
_VERSION = re.compile(rb"^['\"]?kw['\"]?\s*:", re.MULTILINE)


class NotFoundError(ValueError):
    """A recipe that does not exist or may not be read; the message says what was looked for."""


@dataclass(frozen=True)
class Source:
    """One recipe file.

    Attributes:
        name: what it is called in messages and locks.
        path: the file.
        root: the folder that nothing it extends by path may lie outside of.
        package: distribution whose file it is, None for one's own.
    """

    name: str
    path: Path
    root: Path
    package: str | None = None

    @property
    def title(self) -> str:
        """Return what places in it begin with: a shipped recipe's name, which `kw list` shows; else the file's."""
        return self.path.stem if self.package == SHIPPED_BY and self.name.startswith("recipes/") else self.name

    def read(self) -> bytes:
        """Return the file's bytes, one more than allowed at most.

        Raises:
            NotFoundError: it cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                return file.read(MAX_BYTES + 1)
        except OSError as error:
            raise NotFoundError(f'"{self.name}" cannot be read: {error.strerror or error}') from None


def sha256(content: bytes) -> str:
    """Return the hash of a file's bytes, as locks have it."""
    return hashlib.sha256(content).hexdigest()


def open_source(source: str | Path) -> Source:
    """Return the recipe that a user asks for: a path, else the name of a shipped or announced one.

    Raises:
        NotFoundError: neither is there; the message has the nearest name.
    """
    try:
        path = user_path(source)
    except RunError as error:
        raise NotFoundError(f"found no recipe {error}") from None
    if path.is_file():
        return Source(str(source), path, path.parent.resolve())
    if isinstance(source, str) and (named := find_named(source)) is not None:  # a run's folder may have that name, too
        return named
    if path.is_dir():
        inside = sorted(child.name for child in path.iterdir() if child.suffix in SUFFIXES)
        hint = f"it has {', '.join(inside[:5])}" if inside else ""
        raise NotFoundError(sentence(f'the folder "{source}"', "a recipe file", hint))
    if path.exists():
        raise NotFoundError(f'"{source}" is no ordinary file')
    name = Path(source).name.removesuffix(".yaml").removesuffix(".yml")
    hint = did_you_mean(str(source), names()) or did_you_mean(name, names())
    allowed = "a file, or a name that `kw list` shows"
    raise NotFoundError(sentence(f'the unknown recipe "{source}"', allowed, hint))


def find_base(name: str, parent: Source | None) -> Source:
    """Return the recipe that another one extends.

    Args:
        name: a path beside the parent, a name, or `package://PACKAGE/FILE.yaml`.
        parent: the recipe that says so, None when it came from Python and has no folder.

    Raises:
        NotFoundError: it is not there **or** lies outside of what may be read.
    """
    if name.startswith(PACKAGE):
        return _in_package(name)
    beside = None
    if parent is not None and name.endswith(SUFFIXES):
        beside = _inside(parent.path.parent / name, parent.root, name)
        if beside is not None and _is_file(beside):
            shown = str(Path(parent.name).parent / name)
            return Source(shown, beside, parent.root, parent.package)
    if (named := find_named(name)) is not None:
        return named
    near = [*names(), *_neighbours(parent)]
    allowed = "a file beside this one, or a name that `kw list` shows"
    raise NotFoundError(mistake(name, allowed, what="the unknown recipe", names=near))


def find_named(name: str) -> Source | None:
    """Return a shipped recipe (`digits-resnet`, or its path in the shipped folder) or a package's (`team/base`)."""
    known = names()
    for candidate in (name, name.removesuffix(".yaml").removesuffix(".yml")):
        if candidate in known:
            return known[candidate]
    return next((source for source in known.values() if source.name == f"recipes/{name}"), None)


def names() -> dict[str, Source]:
    """Return the recipes that are known by name: the shipped ones, then those that packages announce."""
    return dict((*_shipped(), *_announced()))


def _shipped() -> Iterator[tuple[str, Source]]:
    root = Path(str(shipped("recipes"))).resolve()
    for path in _recipe_files(root):
        if root / "examples" in path.parents:  # they belong to the scripts there, and are not all recipes
            continue
        yield path.stem, Source(f"recipes/{path.relative_to(root).as_posix()}", path, root, SHIPPED_BY)


def _announced() -> Iterator[tuple[str, Source]]:
    """Yield the recipes of each entry point `NAME = "package.folder"` as NAME/file."""
    for entry in sorted(metadata.entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        package, _, folders = entry.value.partition(":")[0].partition(".")
        distribution = entry.dist.name if entry.dist is not None else package
        for root in _package_folders(package):
            folder = root.joinpath(*folders.split(".")) if folders else root
            for path in _recipe_files(folder):
                shown = f"{PACKAGE}{package}/{path.relative_to(root).as_posix()}"
                yield f"{entry.name}/{path.stem}", Source(shown, path, root, distribution)


def _recipe_files(folder: Path) -> list[Path]:
    """Return the recipes in a folder and below: YAML files that say the version of the language."""
    files = (path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return sorted(path for path in files if _VERSION.search(path.read_bytes()[:MAX_BYTES]))


def _in_package(name: str) -> Source:
    package, _, inside = name.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier() or not inside.endswith(SUFFIXES):
        raise NotFoundError(mistake(name, f"{PACKAGE}PACKAGE/FILE.yaml"))
    folders = _package_folders(package)
    if not folders:
        raise NotFoundError(f'the package "{package}" of {shown(name)} is not installed')
    for root in folders:
        path = _inside(root / inside, root, name)
        if path is not None and _is_file(path):
            return Source(name, path, root, _distribution(package))
    files = [str(file.relative_to(root)) for root in folders for file in _recipe_files(root)]
    raise NotFoundError(mistake(inside, f'a recipe of the package "{package}"', what="the unknown file", names=files))


def _package_folders(package: str) -> list[Path]:
    """Return where a package lies, without importing it."""
    try:
        spec = find_spec(package)
    except ValueError:  # a module without a specification, as __main__
        return []
    return [Path(folder).resolve() for folder in spec.submodule_search_locations or ()] if spec else []


def _distribution(package: str) -> str:
    """Return the distribution that a package belongs to; an editable one lists no files, and is looked up by name."""
    try:
        return (
            next(iter(metadata.packages_distributions().get(package, ())), None) or metadata.distribution(package).name
        )
    except metadata.PackageNotFoundError:
        return package


def _inside(path: Path, root: Path, name: str) -> Path | None:
    """Return the path with links followed, None when there is none.

    Raises:
        NotFoundError: it lies outside of the folder.
    """
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError):  # a link to itself, a null character
        return None
    if not resolved.is_relative_to(root):
        raise NotFoundError(
            f"{shown(name)} lies outside of the folder of the recipe; extend by name or {PACKAGE} instead"
        )
    return resolved


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _neighbours(parent: Source | None) -> list[str]:
    if parent is None:
        return []
    return [path.name for path in parent.path.parent.iterdir() if path.suffix in SUFFIXES and path != parent.path]
