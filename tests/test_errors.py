"""The one function that tells mistakes, and what it shows of the values found."""

from __future__ import annotations

import importlib
import os
import pickle
from pathlib import Path

import pytest

from kw_lightning.errors import RunError, argument, first_line, in_options, listed, mistake, needs, sentence, shown


def test_a_name_that_is_close_to_a_valid_one() -> None:
    message = mistake("mix_kernel", ["auto", "mix_kernels"], what="the unknown engine")
    assert message == 'found the unknown engine "mix_kernel", allowed: auto, mix_kernels; did you mean "mix_kernels"?'


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (mistake("zzz", ["val/accuracy", "val/loss"]), 'found "zzz", allowed: val/accuracy, val/loss'),
        (
            mistake("clases", "arguments", names=["classes"]),
            'found "clases", allowed: arguments; did you mean "classes"?',
        ),
        (mistake("x", []), 'found "x", allowed: none'),
        (mistake(True, "a whole number"), "found true, allowed: a whole number"),
        (mistake(None, ["a", "b"]), "found nothing, allowed: a, b"),
        (mistake("5", "a number", hint="write [5]"), 'found "5", allowed: a number; write [5]'),
        (mistake("auto", ["auto"], hint="put it in quotes"), 'found "auto", allowed: auto; put it in quotes'),
        (mistake("a" * 10_000, ["a" * 10_000]).partition(", ")[0], f'found "{"a" * 60}…"'),
        (sentence("3 inputs", "one"), "found 3 inputs, allowed: one"),
    ],
)
def test_the_whole_sentence(message: str, expected: str) -> None:
    assert message == expected


def test_of_many_names_the_first_are_listed_and_the_rest_is_counted() -> None:
    assert listed(["a", "b", "c"], 3) == "a, b, c"
    assert listed(list(map(str, range(1_003))), most=2, between="; ") == "0; 1 and 1,001 more"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (False, "false"),
        (1.5, "1.5"),
        (10**100, "1" + "0" * 59 + "…"),
        ("a\nb", '"a\\nb"'),
        ([], "an empty list"),
        ((1,), "a list of 1 value"),
        ([0] * 1000, "a list of 1,000 values"),
        ({}, "an empty map"),
        ({"a": 1, "\x1b": 2}, 'a map with a, "\\u001b"'),
        ({1: 2}, "a map with 1"),
    ],
)
def test_values_are_shown_in_the_words_of_yaml(value: object, expected: str) -> None:
    assert shown(value) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ValueError(), "ValueError"), (ValueError("\n \n"), "ValueError"), (ValueError("\n one\ntwo"), "one")],
)
def test_the_first_line_of_an_exception_is_never_empty(error: Exception, expected: str) -> None:
    assert first_line(error) == expected


def test_the_error_of_a_run_is_one_line_for_each_that_is_given() -> None:
    error = RunError("a\nb\x1b[31m", "c\x1e")
    assert str(error) == "a\\nb\\x1b[31m\nc\\x1e"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # as it comes from another process


def test_an_argument_is_named_as_its_reader_gives_it() -> None:
    def arguments() -> list[str]:
        return [argument("resume", Path("runs/a")), argument("allow_python", ["team"]), argument("output")]

    with in_options():
        assert arguments() == ["--resume runs/a", "--allow-python team", "--output"]
    assert arguments() == ['resume="runs/a"', 'allow_python=["team"]', "output=…"]


@pytest.mark.parametrize(
    ("content", "ending"),
    [
        (None, "'kw-lightning[onnx]'"),
        ("raise ImportError('libx.so: not found\\nmore')", "; what is there cannot be imported: libx.so: not found"),
        ("import kw_absent", "; what is there cannot be imported: No module named 'kw_absent'"),
        ("from os import absent", f"cannot import name 'absent' from 'os' ({os.__file__})"),
    ],
    ids=["absent", "broken", "without its own needs", "of another version"],
)
def test_a_package_that_is_there_but_broken_is_told_from_one_that_is_not(
    content: str | None, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    if content is not None:
        (tmp_path / "kw_broken.py").write_text(content)
    with pytest.raises(ImportError) as caught:
        importlib.import_module("kw_broken")
    told = needs("ONNX", "onnx and kw_broken", "onnx", caught.value)
    assert told.startswith("ONNX needs onnx and kw_broken: pip install 'kw-lightning[onnx]'")
    assert told.endswith(ending)
