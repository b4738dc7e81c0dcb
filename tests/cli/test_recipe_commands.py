"""`kw list`, `show`, `check`, `diff`, `new`, `lock`, `schema`, and what the shell completes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from kw_lightning.cli import application
from kw_lightning.cli.completion import complete_override, complete_recipe
from kw_lightning.cli.new import globs
from kw_lightning.planning import plan
from kw_lightning.recipe import load_recipe
from kw_lightning.recipe.schema import editor_schema
from kw_lightning.recipe.sources import names, open_source


def kw(*arguments: object) -> Any:
    """Run `kw` with arguments and return what came of it; a traceback fails the test."""
    result = CliRunner().invoke(application(), [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    file = tmp_path / "wrong.yaml"
    file.write_text("kw: 1\ntrain:\n  epochs: ten\n  optimiser: {}\n")
    return file


class TestList:
    def test_table_has_every_recipe_with_its_line(self) -> None:
        result = kw("list")
        assert result.exit_code == 0
        lines = {line.split()[0]: line for line in result.output.splitlines() if line.strip()}
        assert set(names()) <= set(lines)
        assert "11.93M parameters" in lines["resnet18-kw-1x"]

    def test_pattern_and_json(self) -> None:
        rows = json.loads(kw("list", "resnet50", "--json").output)
        assert {row["name"] for row in rows} == {name for name in names() if "resnet50" in name}
        assert rows[0]["file"].startswith("recipes/")
        none = kw("list", "resnet18-wk-1x")
        assert (none.stdout, none.stderr) == ("", 'no name contains "resnet18-wk-1x"; did you mean "resnet18-kw-1x"?\n')


class TestShow:
    def test_file_as_it_is_written(self) -> None:
        result = kw("show", "resnet18-kw-1d2x")
        assert result.output == open_source("resnet18-kw-1d2x").read().decode()

    def test_resolved_has_the_origin_of_every_value_and_reads_back(self, tmp_path: Path) -> None:
        result = kw("show", "resnet18-kw-1d2x", "train.epochs=5")
        lines = result.output.splitlines()
        assert any(
            line.startswith("  backbone: torchvision/resnet18") and "# resnet18-kw-1x:" in line for line in lines
        )
        assert any(line.startswith("  budget: 1/2") and "# resnet18-kw-1d2x:" in line for line in lines)
        assert any(line.startswith("  epochs: 5 ") and "<command line>:1" in line for line in lines)
        assert all("  # " in line for line in lines)
        again = tmp_path / "again.yaml"
        again.write_text(result.output)
        assert load_recipe(again).document.data == load_recipe("resnet18-kw-1d2x", ["train.epochs=5"]).document.data
        assert "  # " not in kw("show", "resnet18-kw-1d2x", "--resolved", "--no-origin").output

    def test_resolved_keeps_a_text_that_only_looks_like_a_variable(self, tmp_path: Path) -> None:
        file, again = tmp_path / "r.yaml", tmp_path / "again.yaml"
        file.write_text("kw: 1\nname: r\ndescription: costs $${price}\n")
        again.write_text(kw("show", file, "--resolved").output)
        assert load_recipe(again).description == load_recipe(file).description == "costs ${price}"

    def test_control_characters_of_a_file_do_not_reach_the_terminal(self, tmp_path: Path) -> None:
        file = tmp_path / "r.yaml"
        file.write_bytes(b"kw: 1\n# \x1b]0;title\x07 \xff\n")
        output = kw("show", file).output
        assert "\x1b" not in output
        assert "title" in output

    def test_a_missing_recipe_is_told_with_the_nearest_name(self) -> None:
        result = kw("show", "resnet18-kw")
        assert result.exit_code == 2
        assert 'did you mean "resnet18-kw-' in result.stderr


class TestCheck:
    def test_all_mistakes_of_all_files(self, wrong: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.yaml"
        other.write_text("kw: 1\nwarehouses: {a: {layers: []}}\n")
        right = tmp_path / "right.yaml"
        right.write_text("kw: 1\nwarehouses: {a: {layers: [x]}}\n")
        result = kw("check", wrong, right, other, tmp_path / "missing.yaml")
        assert result.exit_code == 2
        lines = result.output.splitlines()
        assert lines[0] == f'{wrong}:3:11: train.epochs: found "ten", allowed: a whole number of at least 0'
        assert lines[1].startswith(f'{wrong}:4:3: train.optimiser: found the unknown key "optimiser"')
        assert lines[2].startswith(f"{other}:2:18: warehouses.a.layers: found an empty list")
        assert "missing.yaml" in lines[3]
        assert lines[4] == f"{right}: no mistakes"
        assert kw("check", right).exit_code == 0

    def test_mistake_of_a_shared_base_is_said_once(self, wrong: Path, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / f"{name}.yaml").write_text("kw: 1\nextends: wrong.yaml\n")
        result = kw("check", tmp_path / "a.yaml", tmp_path / "b.yaml")
        assert len(result.output.splitlines()) == 2

    def test_layers_are_compared_with_the_network_unless_told_otherwise(self, tmp_path: Path) -> None:
        file = tmp_path / "r.yaml"
        file.write_text(
            "kw: 1\nmodel: {backbone: torchvision/resnet18}\nwarehouses:\n  a: {layers: [layer1.*.conw?, fc]}\n"
            "  b: {layers: [fc, bn1]}\n"
        )
        result = kw("check", file)
        assert result.exit_code == 2
        assert [line.split(" ")[0] for line in result.output.splitlines()] == [
            f"{file}:4:16:",
            f"{file}:5:16:",
            f"{file}:5:20:",
        ]
        assert kw("check", file, "--no-network").exit_code == 0

    def test_static_network_and_unknown_backbone(self, tmp_path: Path) -> None:
        file = tmp_path / "static.yaml"
        file.write_text("kw: 1\nmodel: {backbone: torchvision/resnet18}\n")
        assert kw("check", file).exit_code == 0
        file.write_text("kw: 1\nmodel: {backbone: torchvision/resnet81}\n")
        result = kw("check", file)
        assert result.exit_code == 2
        assert f"{file}:2:19: model.backbone" in result.output

    def test_mistakes_are_annotations_for_github(self, wrong: Path) -> None:
        lines = kw("check", wrong, "--format", "github").output.splitlines()
        assert lines[0].startswith(f"::error file={wrong},line=3,col=11::train.epochs: found")
        assert len(lines) == 2

    def test_mistakes_are_a_json_list(self, wrong: Path) -> None:
        result = kw("check", wrong, "--format", "json")
        assert result.exit_code == 2
        first = json.loads(result.output)[0]
        assert first == {
            "file": str(wrong),
            "line": 3,
            "column": 11,
            "path": "train.epochs",
            "message": 'found "ten", allowed: a whole number of at least 0',
        }
        assert json.loads(kw("check", "resnet18-kw-1x", "--no-network", "--format", "json").output) == []

    def test_mistakes_of_training_are_found_with_those_of_the_network(self, tmp_path: Path) -> None:
        file = tmp_path / "r.yaml"

        def check(
            layer: str, *, stem: str = "stem", name: str = "AdamW", metric: str = "loss", argument: str = "benchmark"
        ) -> tuple[int, list[str]]:
            file.write_text(
                f"kw: 1\nextends: digits-resnet\nwarehouses: {{stage2: {{layers: [{layer}]}}}}\n"
                f"trainer: {{{argument}: true}}\ntrain:\n  freeze: [{stem}]\n  optimizer: {{name: {name}}}\n"
                f"  monitor: val/{metric}\n  devices: 64\n"
            )
            done = kw("check", file)
            assert kw("fit", file, "--dry-run").exit_code == done.exit_code
            return done.exit_code, done.stdout.splitlines()

        assert check("stage2.*") == (0, [f"{file}: no mistakes"])  # whatever devices are here
        code, lines = check("stage3", name="AdamWW", metric="los", argument="benchmarks")
        assert code == 2
        for line, hint in zip(lines, ("stem", "AdamW", "val/loss", "benchmark"), strict=True):
            assert line.endswith(f'did you mean "{hint}"?')
        assert check("stage2.*", stem="stam")[1][0].startswith(f'{file}:6:12: train.freeze[0]: found "stam"')

    def test_names_of_weights_and_strategies_are_checked_and_a_teacher_where_it_is_needed(self, tmp_path: Path) -> None:
        file = tmp_path / "r.yaml"
        file.write_text("kw: 1\nextends: resnet18-kw-1x\nmodel: {pretrained: IMAGENET1K_V2}\ntrain: {strategy: dpp}\n")
        done = kw("check", file)
        weights, strategy = done.stdout.splitlines()
        assert weights.startswith(
            f'{file}:3:21: model.pretrained: found the unknown weights "IMAGENET1K_V2", allowed: a'
        )
        assert strategy.startswith(
            f'{file}:4:19: train.strategy: found the unknown strategy "dpp", allowed: auto, ddp,'
        )
        file.write_text("kw: 1\nextends: resnet18-kw-1x\nmodel: {pretrained: published}\n")
        assert kw("check", file).exit_code == 0
        file.write_text("kw: 1\nextends: digits-resnet\ntrain: {distill: {teacher: runs/none}}\n")
        assert kw("check", file).exit_code == 0  # it may lie on another machine, or be trained before
        done = kw("fit", file, "--dry-run")
        assert done.exit_code == 1
        assert done.stderr.startswith(f"{file}:3:28: train.distill.teacher: runs/none: no such file or folder; ")

    def test_code_that_a_recipe_names_is_not_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "evil_package.py").write_text("raise SystemExit('imported')\n")
        monkeypatch.syspath_prepend(tmp_path)
        file = tmp_path / "r.yaml"
        file.write_text("kw: 1\nmodel: {backbone: 'python:evil_package:net'}\nwarehouses: {a: {layers: ['*']}}\n")
        assert kw("check", file).exit_code == 0
        assert kw("show", file, "--resolved").exit_code == 0
        assert kw("plan", file).exit_code == 2
        assert "evil_package" not in sys.modules

    def test_without_the_network_torch_is_not_loaded(self) -> None:
        code = (
            "import sys; sys.argv = ['kw', 'check', 'resnet18-kw-1x', '--no-network']\n"
            "from kw_lightning.cli import main\n"
            "try: main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == ["resnet18-kw-1x: no mistakes", "0 False"]


class TestDiff:
    def test_keys_and_plans_side_by_side(self) -> None:
        result = kw("diff", "resnet18-kw-1d2x", "resnet18-kw-1x")
        assert result.exit_code == 0
        rows = [line.split() for line in result.output.splitlines()]
        assert ["defaults.budget", '"1/2"', "1"] in rows
        assert ["network:", "parameters", "7,431,044", "11,932,148", "+4,501,104", "(×", "1.61)"] in rows
        assert not any(row[:2] == ["network:", "parameters,"] for row in rows)  # the static ones are the same

    def test_json_and_recipes_without_a_network(self, tmp_path: Path) -> None:
        for name, layers in (("a", "[x, y]"), ("b", "[x, z]")):
            (tmp_path / f"{name}.yaml").write_text(f"kw: 1\nwarehouses: {{w: {{layers: {layers}}}}}\n")
        result = json.loads(kw("diff", tmp_path / "a.yaml", tmp_path / "b.yaml", "--json").output)
        assert result == {"recipe": [{"key": "warehouses.w.layers[1]", "a": "y", "b": "z"}], "plan": None}
        assert "say the same" in kw("diff", tmp_path / "a.yaml", tmp_path / "a.yaml").output


class TestNew:
    @pytest.mark.parametrize("backbone", ["torchvision/resnet34", "torchvision/mobilenet_v2"])
    def test_recipe_that_plans_as_stages_auto_does(
        self, backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert kw("new", "mine", "--from", backbone).exit_code == 0
        written = load_recipe("mine.yaml")
        assert written.train is not None
        assert written.data is not None
        found = plan(load_recipe({"kw": 1, "model": {"backbone": backbone}, "stages": "auto"}))
        planned = plan(written)
        assert planned.parameters == found.parameters
        assert [w.name for w in planned.warehouses] == [w.name for w in found.warehouses]
        assert kw("new", "mine", "--from", backbone).exit_code == 1  # it is there already

    @pytest.mark.parametrize(
        ("backbone", "line"),
        [
            ("torchvision/shufflenet_v2_x0_5", "  args: {num_classes: 1000} # as many as the data has"),
            ("torchvision/fcn_resnet50", "  args: {num_classes: 21}   # as many as the data has"),
            ("python:callers_own:network", None),
        ],
    )
    def test_number_of_classes_is_written_where_the_constructor_takes_it(
        self, backbone: str, line: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "callers_own.py").write_text(
            "from torchvision import models\n\ndef network():\n    return models.resnet18(num_classes=5)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        output = tmp_path / "x.yaml"
        given = ("--from", backbone, "--output", output, "--input", "3,64,64", "--allow-python", "callers_own")
        assert kw("new", "x", *given).exit_code == 0
        lines = output.read_text().splitlines()
        assert line in lines if line else not any("num_classes" in written for written in lines)
        assert not any("# 1 layers" in written for written in lines)
        assert plan(load_recipe(output), allow_python=["callers_own"]).parameters.static > 0

    def test_images_are_read_as_the_weights_want_them(self, tmp_path: Path) -> None:
        from kw_lightning.preprocessing import own_preprocessing, preprocessing

        output = tmp_path / "x.yaml"
        assert kw("new", "x", "--from", "torchvision/resnet50", "--output", output).exit_code == 0
        steps, own = preprocessing(load_recipe(output)), own_preprocessing(load_recipe(output))
        assert steps is not None
        assert own is not None
        assert (steps.mean, steps.std, steps.resize, steps.size) == (own.mean, own.std, 232, 224)

    def test_what_cannot_be_written_is_refused(self, tmp_path: Path) -> None:
        output = tmp_path / "x.yaml"
        assert kw("new", "x", "--from", "torchvision/resnet43", "--output", output).exit_code == 2
        assert kw("new", "../x", "--from", "torchvision/resnet18", "--output", output).exit_code == 2
        assert not output.exists()

    def test_shape_of_the_input(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "shapeless.py").write_text("from torchvision.models import resnet18 as network\n")
        monkeypatch.syspath_prepend(tmp_path)
        output = tmp_path / "x.yaml"
        backbone = ("--from", "python:shapeless:network", "--allow-python", "shapeless", "--output", output)
        result = kw("new", "x", *backbone)
        assert result.exit_code == 1
        assert "give it, as --input 3,224,224" in result.stderr
        assert kw("new", "x", *backbone, "--input", "3,a").exit_code == 2
        assert kw("new", "x", *backbone, "--input", "3,96,96").exit_code == 0
        model = load_recipe(output).model
        assert model is not None
        assert model.input == (3, 96, 96)

    @pytest.mark.parametrize(
        ("wanted", "names", "expected"),
        [
            (["a.0.x", "a.1.x"], ["a.0.x", "a.1.x", "b"], ["a.*.x"]),
            (["a.0.x1", "a.0.x2"], ["a.0.x1", "a.0.x2", "a.1.x1"], ["a.0.x?"]),
            (["a.1.x", "a.2.x"], ["a.0.x", "a.1.x", "a.2.x"], ["a.[!0].x"]),
            (["a.0.x", "a.2.x"], ["a.0.x", "a.1.x", "a.2.x"], ["a.0.x", "a.2.x"]),
            (["a.0.q[2/3:]", "a.1.q[2/3:]", "a.0.p"], ["a.0.q", "a.1.q", "a.0.p"], ["a.*.q[2/3:]", "a.0.p"]),
        ],
    )
    def test_globs_match_what_is_wanted_and_nothing_else(
        self, wanted: list[str], names: list[str], expected: list[str]
    ) -> None:
        assert globs(wanted, names) == expected


class TestLock:
    def test_lock_is_written_checked_and_refused_when_changed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert kw("lock", "resnet18-kw-1d2x", "train.epochs=5").exit_code == 0
        file = tmp_path / "resnet18-kw-1d2x.lock.yaml"
        assert kw("check", file, "--no-network").exit_code == 0
        assert load_recipe(file).warehouses == load_recipe("resnet18-kw-1d2x").warehouses
        assert kw("lock", "resnet18-kw-1d2x").exit_code == 0  # a lock may be written over
        file.write_text(file.read_text().replace("num_classes: 1000", "num_classes: 10"))
        result = kw("check", file, "--no-network")
        assert result.exit_code == 2
        assert "the file was changed after it was locked" in result.output

    def test_other_files_are_not_written_over(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("kw: 1\n")
        result = kw("lock", file, "--output", file)
        assert result.exit_code == 1
        assert file.read_text() == "kw: 1\n"
        assert kw("lock", file, "--output", "-").output.startswith("# mine, resolved and locked")


def test_a_new_recipe_leaves_answers_out_that_only_training_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert kw("new", "x", "--from", "torchvision/googlenet", "--input", "3,64,64").exit_code == 0
    recipe = load_recipe("x.yaml")
    assert recipe.model is not None
    assert recipe.model.args == {"num_classes": 1000, "aux_logits": False}
    assert "aux" not in (tmp_path / "x.yaml").read_text().partition("warehouses:")[2]


def test_pre_commit_hook_runs(wrong: Path) -> None:
    hooks = yaml.safe_load((Path(__file__).parents[2] / ".pre-commit-hooks.yaml").read_text())
    assert [hook["id"] for hook in hooks] == ["kw-check"]
    program, *arguments = hooks[0]["entry"].split()
    assert program == "kw"
    assert kw(*arguments, wrong).exit_code == 2
    assert kw(*arguments, "resnet18-kw-1x").exit_code == 0


def test_schema_is_printed() -> None:
    assert json.loads(kw("schema").output) == editor_schema()


class TestCompletion:
    def keys(self, incomplete: str, recipe: str | None = None) -> Sequence[str]:
        context: Any = SimpleNamespace(params={"recipe": recipe})
        return complete_override(context, incomplete)

    def test_recipes_and_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "resnet-mine.yaml").write_text("kw: 1\n")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "inner.yml").write_text("kw: 1\n")
        monkeypatch.chdir(tmp_path)
        assert {"resnet18-kw-1x", "resnet-mine.yaml"} <= set(complete_recipe("res"))
        assert complete_recipe("fol") == ["folder/"]
        assert complete_recipe("folder/") == ["folder/inner.yml"]

    def test_keys_and_values_of_overrides(self) -> None:
        assert self.keys("train.ep") == ["train.epochs="]
        assert self.keys("temperature.shape=c") == ["temperature.shape=cosine", "temperature.shape=constant"]
        assert self.keys("train.deterministic=") == ["train.deterministic=true", "train.deterministic=false"]
        assert "train.compile=reduce-overhead" in self.keys("train.compile=")
        assert self.keys("warehouses.stage4.bu", "resnet18-kw-1x") == [
            "warehouses.stage4.budget.cells=",
            "warehouses.stage4.budget.parameters=",
            "warehouses.stage4.budget=",
        ]
        assert self.keys("warehouses.", "no-such-recipe") == []
        assert self.keys("a..b=") == []

    def test_shell_gets_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        environment: dict[str, Any] = {
            "_KW_COMPLETE": "complete_zsh",
            "_TYPER_COMPLETE_ARGS": "kw plan resnet18-kw-1x train.ep",
        }
        code = "from kw_lightning.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, "PATH": "/usr/bin:/bin"}
        )
        assert "train.epochs=" in done.stdout
