"""Files of a stranger who means harm. Run as a program it loads each and prints what that took, as JSON."""

from __future__ import annotations

import json
import re
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

MIB = 1 << 20
ADDITIONS = 0.04  # seconds for a million on the machine that the second is meant for; slower ones get in proportion


def attacks(folder: Path) -> Iterator[tuple[str, str | bytes]]:
    """Yield (name, content) of files that must be refused."""
    yield "file over 1 MiB", "kw: 1\n# " + "x" * MIB
    yield "zeros", b"\0" * MIB
    yield "nested lists", "kw: 1\nx-a: " + "[" * 65 + "]" * 65
    yield "nested without end", "kw: 1\nx-a: " + "[" * (MIB - 100)
    yield "nested maps in one line", "kw: 1\nx-a: " + "{a: " * 200_000
    yield "nested dashes", "kw: 1\nx-a:\n  " + "- " * 400_000 + "x"
    yield "nested maps", "kw: 1\n" + "".join(f"{' ' * depth}a{depth}:\n" for depth in range(1400))
    yield "question marks", "? " * 500_000
    laughs = "".join(f"x-{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 20))
    yield "billion laughs", "kw: 1\nx-0: &a0 [lol]\n" + laughs
    yield (
        "billion laughs of maps",
        "kw: 1\nx-0: &a0 {k: lol}\n"
        + "".join(f"x-{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(10))}}}\n" for n in range(1, 20)),
    )
    yield (
        "billion laughs of merges",
        "kw: 1\nx-0: &a0 {k: lol}\n"
        + "".join(
            f"x-{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], k{n}: {{<<: *a{n - 1}}}}}\n" for n in range(1, 20)
        ),
    )
    deep = "".join(f"x-{n}: &d{n} [[[[[[[[[[*d{n - 1}]]]]]]]]]]\n" for n in range(1, 20))
    yield "depth by aliases", "kw: 1\nx-0: &d0 x\n" + deep
    yield "alias of itself", "kw: 1\nx-a: &a [*a]\n"
    yield (
        "a long text many times",
        f"kw: 1\nx-a: &a {'x' * 60_000}\nwarehouses:\n  a: {{layers: [{'*a, ' * 15_000}]}}\n",
    )
    yield "a million digits", "kw: " + "9" * 1_000_000
    yield "twenty digits", "kw: 1\ntrain: {seed: 99999999999999999999}"
    yield "large exponent", "kw: 1\ntrain: {epochs: 1e999999999}"
    yield "fraction of many digits", f"kw: 1\ndefaults: {{budget: {'9' * 300}/{'9' * 300}}}"
    yield "small exponent of a ratio", "kw: 1\ndefaults: {budget: -1e-300}"
    yield "500,000 layer patterns", "kw: 1\nwarehouses: {a: {layers: [" + "a," * 500_000 + "]}}"
    yield (
        "a million layer patterns by aliases",
        (f"kw: 1\nx-a: &a [{'x,' * 1000}]\nx-b: &b [{'*a,' * 1000}]\nwarehouses: {{a: {{layers: *b}}}}\n"),
    )
    yield "9,000 layer patterns", "kw: 1\nwarehouses: {a: {layers: [" + "layer.*," * 9_000 + "]}}"
    yield (
        "a million layer patterns by vars",
        "kw: 1\nvars: {a: [" + "x," * 1000 + "]}\nwarehouses:\n  a:\n    layers:\n" + "    - ${a}\n" * 1000,
    )
    yield "text by vars", f"kw: 1\nvars: {{a: {'x' * 60_000}}}\ndescription: {'${a}' * 10_000}\n"
    yield (
        "unknown vars",
        f"kw: 1\nvars: {{{', '.join(f'name{n}: 1' for n in range(999))}}}\ndescription: {'${nam}' * 9000}",
    )
    yield "4,000 unknown keys", "kw: 1\n" + "".join(f"epoch{n}: 1\n" for n in range(4000))
    yield "3,000 mistakes of type", "kw: 1\nwarehouses:\n" + "".join(f"  a{n}: {{layers: 1}}\n" for n in range(3000))
    yield "9,000 tags", "kw: 1\nx-a: [" + "!a x," * 9_000 + "]"
    yield "4,000 duplicates", "kw: 1\n" + "a: 1\n" * 4_000
    yield "100,000 anchors", "kw: 1\nx-a: [" + "&a x," * 100_000 + "]"
    yield "a long key", f"kw: 1\n{'k' * 100_000}: 1\n"
    yield "long keys that are alike", "kw: 1\ntrain:\n" + "".join(f"  {'epochs' * 30}{n}: 1\n" for n in range(3000))
    yield "python objects", "kw: 1\nx-a: !!python/object/apply:time.sleep [100]\n"
    yield "control characters", "kw: 1\nname: \x1b]0;title\x07\n"
    yield "one long line of colons", "kw: " + ": " * 300_000
    yield "quotes without end", 'kw: "' + "\\x41" * 200_000
    for name in range(40):
        (folder / f"big{name}.yaml").write_text("kw: 1\n" + "# x\n" * 250_000)
    yield "many large files", "kw: 1\nextends: [" + ", ".join(f"big{n % 40}.yaml" for n in range(16)) + "]\nx: 1\n"
    (folder / "wide.yaml").write_text("kw: 1\nx-a: [" + "x," * 8_000 + "]\n")
    yield "many values in many files", "kw: 1\nextends: [" + "wide.yaml, " * 16 + "]\n"
    for level in range(7):
        below = f"extends: [{', '.join([f'level{level + 1}.yaml'] * 16)}]\n" if level < 6 else ""
        (folder / f"level{level}.yaml").write_text(f"kw: 1\n{below}")
    yield "16⁶ files", "kw: 1\nextends: level0.yaml\n"


def main() -> None:
    """Load every attack with both of PyYAML's parsers; print name → [seconds, error], and the memory at most."""
    from kw_lightning.recipe import load_recipe, reading

    load_recipe({"kw": 1})  # reads the schema
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for parser in {yaml.SafeLoader, reading._LOADER}:
            reading._LOADER = parser
            for attack, content in attacks(folder):
                file = folder / "attack.yaml"
                file.write_bytes(content.encode() if isinstance(content, str) else content)
                tries = [loaded(file)]
                while tries[-1][0] > 0.7 and len(tries) < 4:  # others at work only lengthen a time
                    slow = max(1.0, million_additions() / ADDITIONS)
                    seconds, error = loaded(file)
                    tries.append((seconds / slow, error))
                results[f"{attack} ({parser.__name__})"] = min(tries)
    print(json.dumps({"results": results, "memory": peak_bytes()}))


def loaded(file: Path) -> tuple[float, str | None]:
    """Return the processor's seconds for loading a file, and why it was refused."""
    from kw_lightning.errors import RecipeError
    from kw_lightning.recipe import load_recipe

    start = time.process_time()
    try:
        load_recipe(file)
        error = None
    except RecipeError as caught:
        error = str(caught)
    return time.process_time() - start, error


def million_additions() -> float:
    """Return the processor's seconds for a million additions: how slow this machine is."""
    start = time.process_time()
    total = 0
    for number in range(1_000_000):
        total += number * number
    return time.process_time() - start


def peak_bytes() -> int:
    """Return the most memory that this process had at once."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: ru_maxrss is inherited from the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
