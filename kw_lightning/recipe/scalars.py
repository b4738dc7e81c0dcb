"""How a plain scalar is read, and the numbers of the language: fractions `1/4` and sizes `7.5M`.

Scalars follow YAML 1.2, in which `yes`, `on` and `1:30` are texts, `010` is ten and `1e-3` is a number; with the
underscores of `1_000_000` besides.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from kw_lightning.recipe.limits import MAX_DIGITS

Scalar = str | int | float | bool | None

NULLS = ("~", "null", "Null", "NULL")
"""How YAML writes null; an empty value means it, too."""
_CONSTANTS: dict[str, Scalar] = {
    **dict.fromkeys(("", *NULLS)),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF|nan|NaN|NAN)")
_FRACTION = re.compile(r"([0-9]+)/([0-9]+)")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s?([KMG])")
_FACTORS = {"K": 10**3, "M": 10**6, "G": 10**9}


def is_unicode(text: str) -> bool:
    """Return whether a text can be written: halves of surrogate pairs, as in "\\ud800", cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def read_plain(text: str) -> Scalar:
    """Return what an unquoted scalar means.

    Raises:
        ValueError: a number that is not finite **or** has more than `MAX_DIGITS` digits.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if len(text) > 400:  # no number: a text
        return text
    if _INTEGER.fullmatch(text):
        _check_digits(text)
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        number = float(text.replace("_", ""))
        if math.isinf(number):
            raise ValueError(f"the number {_shorten(text)} is too large")
        return number
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number")
    return text


def read_ratio(value: object) -> Fraction:
    """Return a number or a fraction such as `1/4` exactly: 0.1 means a tenth.

    Raises:
        ValueError: anything else, too many digits, **or** the denominator 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("no number")
    if isinstance(value, int | float):
        return Fraction(str(value))
    match = _FRACTION.fullmatch(value)
    if match is None:
        raise ValueError("no fraction such as 1/4")
    numerator, denominator = match.groups()
    _check_digits(numerator)
    _check_digits(denominator)
    if int(denominator) == 0:
        raise ValueError("a fraction with the denominator 0")
    return Fraction(int(numerator), int(denominator))


def read_size(value: object) -> int:
    """Return a whole number or a size such as `7.5M` (K, M, G are thousand, million, thousand million).

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("no size such as 7.5M")
    number, unit = match.groups()
    _check_digits(number)
    return math.floor(Fraction(number) * _FACTORS[unit])


def _check_digits(text: str) -> None:
    digits = sum(character.isdigit() for character in text)
    if digits > MAX_DIGITS:
        raise ValueError(f"a number of {digits:,} digits; at most {MAX_DIGITS} are read")


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"
