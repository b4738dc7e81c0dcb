"""Networks by name: what is found, what is refused, and pretrained weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent / "planning"))
from networks import recipe

from kw_lightning import backbones
from kw_lightning.builder import build
from kw_lightning.errors import KWError, RecipeError, RunError
from kw_lightning.pretrained import check_pretrained
from kw_lightning.recipe.types import Recipe


def named(backbone: str, **model: Any) -> Recipe:
    """Return a recipe with this backbone."""
    return recipe(["*"], model={"backbone": backbone, **model})


@pytest.mark.parametrize(
    ("backbone", "args", "message"),
    [
        (
            "torchvision/resnet19",
            {},
            'found the unknown network "resnet19", allowed: the names of torchvision.models.list_models(); '
            'did you mean "resnet18"?',
        ),
        (
            "timm/resnet19",
            {},
            'model.backbone: found the unknown network "resnet19", allowed: the names of timm.list_models(); '
            'did you mean "resnet18"?',
        ),
        (
            "torchvision/resnet18",
            {"num_clases": 3},
            "unexpected keyword argument 'num_clases'; did you mean \"num_classes\"?",
        ),
        (
            "timm/resnet18.a1_in",
            {"num_classes": 3},
            'model.backbone: found the unknown weights of timm/resnet18 "a1_in", allowed: ',
        ),
        ("torchvision/resnet18", {"num_classes": "many"}, 'model.args: "torchvision/resnet18" does not take these'),
        (
            "torchvision/resnet18",
            {"weights": "DEFAULT"},
            "model.args.weights: weights are asked for by model.pre",
        ),
        ("python:os:getcwd", {}, 'would run code of the package "os"; allow it by allow_python=["os"]'),
    ],
)
def test_a_mistake_in_the_backbone_is_one_message(backbone: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        backbones.create(named(backbone, args=args), device="meta")
    assert message in str(caught.value)


def test_timm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RecipeError, match=r"needs timm: pip install 'kw-lightning\[timm\]'"):
        backbones.create(named("timm/resnet18"))


def test_python_networks_are_made_where_their_package_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "team_nets.py").write_text(
        "import torch\n"
        "def small(width=4):\n    return torch.nn.Sequential(torch.nn.Linear(width, width))\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    asked = named("python:team_nets:small", args={"width": 6})
    with pytest.raises(RecipeError, match="would run code"):
        backbones.create(asked)
    assert "team_nets" not in sys.modules
    with pytest.raises(RecipeError, match="would run code"):
        backbones.create(asked, allow_python=["team"])
    model = build(asked, allow_python=["team_nets"])
    assert model(torch.randn(2, 6)).shape == (2, 6)
    for name, message in [
        ("python:team_nets:wrong", "it returned a int, and no torch.nn.Module"),
        ("python:team_nets:missing", "cannot be imported: module 'team_nets' has no attribute 'missing'"),
        ("python:team_nets.sub:x", "cannot be imported: No module named 'team_nets.sub'"),
        ("python:team_nets:torch", "is no callable but a module"),
    ]:
        with pytest.raises(RecipeError) as caught:
            backbones.create(named(name), allow_python=["team_nets"])
        assert message in str(caught.value)


@pytest.mark.parametrize("backbone", ["torchvision/regnet_y_400mf", "torchvision/fasterrcnn_resnet50_fpn"])
def test_constructors_that_the_meta_device_cannot_run(backbone: str) -> None:
    """RegNet computes its widths with tensors, a detector would fetch weights: neither keeps a plan from being made."""
    model = backbones.create(named(backbone), device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("backbone", "shape"),
    [
        ("torchvision/resnet18", (3, 224, 224)),
        ("torchvision/inception_v3", (3, 299, 299)),
        ("torchvision/fasterrcnn_mobilenet_v3_large_fpn", (3, 800, 800)),
        ("torchvision/ssdlite320_mobilenet_v3_large", (3, 320, 320)),
        ("torchvision/lraspp_mobilenet_v3_large", (3, 520, 520)),
        ("torchvision/r3d_18", (3, 16, 112, 112)),
        ("torchvision/raft_small", (3, 520, 960)),
        ("timm/efficientnet_b1", (3, 240, 240)),
    ],
)
def test_the_input_is_the_recipes_or_the_usual_one_of_the_network(backbone: str, shape: tuple[int, ...]) -> None:
    args = {"init_weights": False} if "inception" in backbone else {}
    asked = named(backbone, args=args)
    assert backbones.input_shape(asked, backbones.create(asked, device="meta")) == shape
    assert backbones.input_shape(named(backbone, input=[1, 2, 3]), torch.nn.Identity()) == (1, 2, 3)


def test_input_that_the_arguments_change() -> None:
    pytest.importorskip("timm")
    asked = named("timm/deit_tiny_patch16_224", args={"img_size": 32, "in_chans": 1})
    assert backbones.input_shape(asked, backbones.create(asked, device="meta")) == (1, 32, 32)
    huge = named("torchvision/vit_h_14")  # its weights are for 518×518, its constructor's default is 224×224
    assert backbones.input_shape(huge, backbones.create(huge, device="meta")) == (3, 224, 224)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_from_a_file(tmp_path: Path, suffix: str) -> None:
    source = backbones.create(named("torchvision/mobilenet_v2", args={"width_mult": 0.25}))
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{key}": value for key, value in source.state_dict().items()}}, path)
    else:
        save_file(source.state_dict(), path)
    asked = recipe(
        ["features.18.0"],
        model={"backbone": "torchvision/mobilenet_v2", "args": {"width_mult": 0.25}, "pretrained": str(path)},
    )
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(build(asked).eval()(x), source.eval()(x), atol=1e-5)  # a warm start, without asking for it
    fewer = named("torchvision/mobilenet_v2", args={"width_mult": 0.25, "num_classes": 7}, pretrained=str(path))
    model = backbones.create(fewer)
    assert model.classifier[1].weight.shape[0] == 7
    assert torch.equal(model.features[0][0].weight, source.features[0][0].weight)
    with pytest.raises(RecipeError) as caught:
        backbones.create(named("torchvision/resnet18", pretrained=str(path)))
    message = str(caught.value)
    assert "conv1.weight: missing" in message
    assert "and " in message
    assert "more" in message
    with pytest.raises(RecipeError, match=r"features\.0\.0\.weight: "):
        backbones.create(named("torchvision/mobilenet_v2", args={"width_mult": 0.5}, pretrained=str(path)))


def test_weights_that_are_no_weights(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "evil.pt"
    torch.save(Evil(), path)
    with pytest.raises(
        RunError, match=r"evil\.pt: not a checkpoint, or a damaged one: it holds other things.*state_dict"
    ):
        backbones.create(named("torchvision/resnet18", pretrained=str(path)))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(RecipeError, match=r"there is no file nothing\.pt"):
        backbones.create(named("torchvision/resnet18", pretrained="nothing.pt"))
    with pytest.raises(
        RecipeError,
        match=r'found the unknown weights "IMAGENET1K_V3", allowed: a file, IMAGENET1K_V1; did you mean '
        r'"IMAGENET1K_V1"\?$',
    ):
        backbones.create(named("torchvision/resnet18", pretrained="IMAGENET1K_V3"))
    assert issubclass(RunError, KWError)


def test_an_argument_that_is_known_is_not_proposed() -> None:
    pytest.importorskip("timm")
    with pytest.raises(RecipeError, match=r"unexpected keyword argument 'nothing'$"):
        backbones.create(named("timm/mobilenetv3_small_050", args={"num_classes": 3, "nothing": 1}), device="meta")


@pytest.mark.parametrize(
    ("backbone", "weights", "message"),
    [
        ("timm/resnet18", "a1_in", r'unknown weights "a1_in", allowed: a file, a1_in1k, .*; did you mean "a1_in1k"\?$'),
        ("timm/botnet50ts_256", True, r"found the unknown weights true, allowed: a file$"),
        ("torchvision/resnet18", "IMAGENET1K_V3", r'did you mean "IMAGENET1K_V1"\?$'),
        ("torchvision/resnet18", "nothing.pt", r"there is no file nothing\.pt, neither here nor beside the recipe$"),
    ],
)
def test_weights_are_looked_up_without_being_fetched(backbone: str, weights: str | bool, message: str) -> None:
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    with pytest.raises(RecipeError, match=message):
        check_pretrained(named(backbone, pretrained=weights))
    for known in ("nothing.pt", True, False, "IMAGENET1K_V1"):
        check_pretrained(named("torchvision/resnet18", pretrained=known), here=False)
    for known in ("a1_in1k", True):
        check_pretrained(named("timm/resnet18", pretrained=known), here=False)


def test_stochastic_depth_in_resnets() -> None:
    asked = named("torchvision/resnet18", args={"stochastic_depth_prob": 0.5})
    plain, model = backbones.create(named("torchvision/resnet18")), backbones.create(asked)
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        block = model.layer1[0]
        block.eval()
        seen: list[torch.Tensor] = []
        block.bn2.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
        features = torch.rand(64, 64, 2, 2)
        block(features)
        block.bn2.train()
        block(features)
    kept = (seen[1].abs().sum((1, 2, 3)) > 0).float().mean()
    assert (seen[0].abs().sum((1, 2, 3)) > 0).all()
    assert 0.2 < kept < 0.8  # every block's branch is left out for half of the samples, the first one's too
    assert model.train()(x).shape == (8, 1000)
    with pytest.raises(RecipeError, match="found stochastic_depth_prob 2, allowed: 0 ≤ p < 1"):
        backbones.create(named("torchvision/resnet18", args={"stochastic_depth_prob": 2}))
