"""The Hub's way of saving and loading, against a stand-in for it on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, hub_server

from kw_lightning.errors import RunError
from kw_lightning.inference import ImageClassifier
from kw_lightning.inference.hub import split_name

# huggingface_hub reads its address when it is imported, so each of these runs in a process of its own.
PUSH = """
import sys, kw_lightning
model = kw_lightning.load(sys.argv[1])
print(model.push_to_hub("team/digits", commit_message="first"))
"""
LOAD = """
import sys, kw_lightning
print(",".join(kw_lightning.load(sys.argv[1]).classes))
"""


def run(program: str, argument: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, argument],
        env={**os.environ, "HF_TOKEN": "hf_local", **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_pushed_network_is_loaded_again_and_then_offline(classifier: ImageClassifier, tmp_path: Path) -> None:
    classifier.save_pretrained(tmp_path / "model")
    cache = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    (tmp_path / "hub").mkdir()
    with hub_server(tmp_path / "hub") as address:
        pushed = run(PUSH, str(tmp_path / "model"), HF_ENDPOINT=address, **cache)
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.strip() == f"{address}/team/digits/commit/{COMMIT}"
        loaded = run(LOAD, "hf://team/digits@v1", HF_ENDPOINT=address, **cache)
        assert loaded.stdout.strip() == ",".join(classifier.classes), loaded.stderr
        missing = run(LOAD, "hf://team/nothing", HF_ENDPOINT=address, **cache)
        assert missing.returncode == 1
        assert "hf://team/nothing: " in missing.stderr
    offline = run(LOAD, f"hf://team/digits@{COMMIT}", HF_HUB_OFFLINE="1", **cache)
    assert offline.stdout.strip() == ",".join(classifier.classes), offline.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf://team/digits", ("team/digits", None)),
        ("hf://team/digits@v1.0", ("team/digits", "v1.0")),
        ("team/digits@refs/pr/1", ("team/digits", "refs/pr/1")),
    ],
)
def test_a_name_is_split_into_repository_and_revision(name: str, expected: tuple[str, str | None]) -> None:
    assert split_name(name) == expected


@pytest.mark.parametrize("name", ["hf://", "hf://a/b/c", "hf://../../etc/passwd", "hf://a b"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(RunError, match="allowed: a folder, hf://organisation/name"):
        split_name(name)
