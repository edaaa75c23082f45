"""A name or a factory becomes a module with its weights, or an error that names what to change."""

from __future__ import annotations

import logging
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import run
from safetensors.torch import save_file
from torch import Tensor, nn

from cswap_deploy.artifacts import Architecture, InputSpec, Network
from cswap_deploy.checkpoint import load_state, read_checkpoint
from cswap_deploy.errors import ModelError, reason
from cswap_deploy.factory import code_files
from cswap_deploy.model import FACTORY_INPUT, build, count, count_by_module, describe, expected_outputs, load, quiet
from cswap_deploy.prune.cut import restore
from cswap_deploy.recipe import ModelSettings

SIDE = 8
INPUT = {"size": SIDE, "interpolation": "bilinear", "crop_pct": 1.0}
VIT = {"img_size": SIDE, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
NET = """
from torch import nn


def net(classes=3, width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width * 36, classes))
"""


def load_into(out: Path, **settings: Any) -> Network:
    made = ModelSettings(**{"input": INPUT, **settings})
    out.mkdir(exist_ok=True)
    return load(out, made, code_files(made.factory))


def refused(hint: str, message: str, call: Callable[[], object]) -> ModelError:
    """What the call is refused with; both fragments are plain text."""
    with pytest.raises(ModelError) as caught:
        call()
    assert caught.value.exit_code == 4
    assert message in caught.value.message
    assert hint in caught.value.hint and caught.value.hint
    return caught.value


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a factory's file and gives the reference to its function."""

    def write(text: str, name: str = "net.py", function: str = "net") -> str:
        (tmp_path / name).write_text(text)
        return f"{tmp_path / name}:{function}"

    return write


@pytest.fixture
def net(write: Callable[..., str]) -> str:
    return write(NET)


# --- timm


def test_timm_name_with_kwargs(tmp_path: Path) -> None:
    network = load_into(
        tmp_path, name="vit_tiny_patch16_224", kwargs=VIT, num_classes=5, pretrained=False, checkpoint=None
    )
    assert network.architecture.source == "timm"
    assert network.architecture.kwargs == {**VIT, "num_classes": 5}
    assert network.architecture.library == f"timm {timm.__version__}"
    assert (network.outputs, network.plan, network.license) == (5, None, None)
    module = restore(network)
    assert not module.training and not any(weight.requires_grad for weight in module.parameters())
    assert (network.params, network.macs) == count(module, network.input)
    saved = read_checkpoint(network.weights.path)
    assert all(torch.equal(saved[name], tensor) for name, tensor in module.state_dict().items())


def test_unknown_name_tells_the_nearest() -> None:
    settings = ModelSettings(name="resnet_18", pretrained=False)
    refused("did you mean 'resnet18'?", "has no model named 'resnet_18'", lambda: expected_outputs(settings))
    refused("timm.list_models()", "has no model named 'hf-hub:some/model'",
            lambda: expected_outputs(ModelSettings(name="hf-hub:some/model")))  # fmt: skip


def test_unknown_tag_lists_the_known(tmp_path: Path) -> None:
    for settings in ({"pretrained": True}, {"pretrained": False}):
        made = ModelSettings(name="test_vit.r1_none", **settings)
        refused("test_vit.r160_in1k", "has no weights 'r1_none' of 'test_vit'", lambda: expected_outputs(made))  # noqa: B023
    refused("it has", "no weights", lambda: load_into(tmp_path, name="test_vit.r1_none", pretrained=False))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"bogus": 1}, "TypeError: "),
        ({"num_heads": 5}, "AssertionError: "),
        ({"patch_size": 0}, "ZeroDivisionError: "),
        ({"act_layer": "none"}, "none"),
    ],
)
def test_kwargs_that_timm_refuses(tmp_path: Path, kwargs: dict[str, Any], words: str) -> None:
    error = refused(
        "correct model.kwargs",
        "timm cannot build 'vit_tiny_patch16_224' with kwargs {",
        lambda: load_into(tmp_path, name="vit_tiny_patch16_224", kwargs=VIT | kwargs, pretrained=False),
    )
    assert words in error.message


def test_pretrained_with_other_classes_is_refused_before_any_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("asked for the network"))
    message = "have 1000 classes, model.num_classes asks for 10"
    refused("remove model.num_classes", message, lambda: load_into(tmp_path, name="resnet18", num_classes=10))
    refused("model.checkpoint", message, lambda: expected_outputs(ModelSettings(name="resnet18", num_classes=10)))
    refused("model.pretrained: false", "publishes no pretrained weights for 'vit_tiny_patch16_18x'",
            lambda: monkeypatch.setattr(timm, "is_model", lambda name: True)
            or monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
            or expected_outputs(ModelSettings(name="vit_tiny_patch16_18x")))  # fmt: skip


def test_pretrained_with_neither_network_nor_cache(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "r.yaml").write_text("name: r\nmodel: {name: test_vit}\ncalibration: {images: images}\n")
    start = time.monotonic()
    done = run("-m", "cswap_deploy", "prepare", tmp_path / "r.yaml", "--quiet", "--work", tmp_path / "work",
               HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))  # fmt: skip
    assert (done.returncode, done.stdout) == (4, "")
    said = "the pretrained weights of 'test_vit' are neither in the local cache nor to be had"
    assert f"error: {tmp_path / 'r.yaml'}:2: {said}" in done.stderr
    assert "hint: connect to the network once, or set model.checkpoint to a local file" in done.stderr
    assert time.monotonic() - start < 60


def test_pretrained_weights_that_do_not_fit_the_kwargs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mismatch(*_: object, **__: object) -> None:
        raise RuntimeError("Error(s) in loading state_dict for ResNet:\n\tsize mismatch")

    monkeypatch.setattr(timm, "create_model", mismatch)
    refused("model.kwargs", "cannot build 'resnet18' with its weights with kwargs {'width': 1}: RuntimeError: Error(s)",
            lambda: load_into(tmp_path, name="resnet18", kwargs={"width": 1}))  # fmt: skip


def test_expected_outputs_and_describe(tmp_path: Path, net: str) -> None:
    (tmp_path / "w.pth").touch()
    cases: list[tuple[dict[str, Any], int | None, str]] = [
        ({"name": "resnet18"}, 1000, "resnet18 (pretrained)"),
        ({"name": "resnet18", "pretrained": False, "num_classes": 7}, 7, "resnet18 (untrained)"),
        ({"name": "resnet18", "checkpoint": tmp_path / "w.pth"}, 1000, "resnet18 (w.pth)"),
        ({"factory": net}, None, "net.py:net (untrained)"),
        ({"factory": net, "num_classes": 4}, 4, "net.py:net (untrained)"),
        ({"factory": "some.package:net"}, None, "some.package:net (untrained)"),
    ]
    for settings, outputs, words in cases:
        made = ModelSettings(**settings)
        assert (expected_outputs(made), describe(made)) == (outputs, words)
    gone = tmp_path / "gone.py"
    refused("recipe's folder", "gone.py does not exist", lambda: expected_outputs(ModelSettings(factory=f"{gone}:f")))
    refused("model.checkpoint", "no.pth does not exist",
            lambda: expected_outputs(ModelSettings(name="resnet18", checkpoint=tmp_path / "no.pth")))  # fmt: skip


# --- input and counting


def test_timm_input_is_overridden_key_by_key(tmp_path: Path) -> None:
    timms = InputSpec((3, 160, 160), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.95)
    changes: list[tuple[dict[str, Any] | None, dict[str, Any]]] = [
        (None, {}),
        ({"mean": [0.1, 0.2, 0.3]}, {"mean": (0.1, 0.2, 0.3)}),
        ({"std": [0.1, 0.2, 0.3]}, {"std": (0.1, 0.2, 0.3)}),
        ({"interpolation": "nearest"}, {"interpolation": "nearest"}),
        ({"crop_pct": 0.5}, {"crop_pct": 0.5}),
        ({"mean": [0, 0, 0]}, {"mean": (0, 0, 0)}),
    ]
    for given, changed in changes:
        network = load_into(tmp_path, name="test_vit", pretrained=False, input=given)
        assert network.input == replace(timms, **changed)
    size = load_into(tmp_path, name="test_resnet", pretrained=False, input={"size": [64, 96]}).input
    assert size.shape == (3, 64, 96) and size.crop_pct == 0.95


def test_gray_timm_network_takes_one_channel(tmp_path: Path) -> None:
    network = load_into(
        tmp_path, name="test_resnet", kwargs={"in_chans": 1}, pretrained=False, num_classes=3, input={"size": 32}
    )
    assert network.input.shape == (1, 32, 32)


def test_factory_input_defaults_to_imagenet(tmp_path: Path, write: Callable[..., str]) -> None:
    pooled = (
        "from torch import nn\ndef net(): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))"
    )
    assert load_into(tmp_path, factory=write(pooled), input=None).input == FACTORY_INPUT


def test_count_is_what_one_counts_by_hand() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, 2, 1, groups=2, bias=False), nn.Flatten(), nn.Linear(4 * 9, 5)
    ).eval()
    spec = InputSpec((3, SIDE, SIDE), (0, 0, 0), (1, 1, 1), "bilinear", 1.0)
    macs = {"0": 4 * 3 * 9 * 36, "1": 4 * 2 * 9 * 9, "3": 36 * 5}
    assert count(module, spec) == ((4 * 27 + 4) + 4 * 2 * 9 + (36 * 5 + 5), sum(macs.values()))
    assert count_by_module(module, spec) == macs | {"": 0, "2": 0}


def test_count_holds_both_products_of_an_attention() -> None:
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 5}
    module = build(Architecture("timm", "vit_tiny_patch16_224", settings, ""))
    spec = InputSpec((3, 32, 32), (0, 0, 0), (1, 1, 1), "bilinear", 1.0)
    tokens, width = 17, 24
    assert count_by_module(module, spec)["blocks.0.attn"] == 2 * tokens**2 * width


class Tokens(nn.Module):
    """Attention of PyTorch's own over 4x4 patches, alone or inside its encoder layer: without gradients one fused operator each."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4, bias=False)
        self.layer = layer
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("within", [False, True], ids=["attention", "encoder layer"])
def test_count_holds_all_products_of_attention_that_pytorch_fuses(within: bool) -> None:
    width, hidden, tokens = 8, 12, 16
    layer = (
        nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True)
        if within
        else nn.MultiheadAttention(width, 2, batch_first=True)
    )
    spec = InputSpec((3, 16, 16), (0, 0, 0), (1, 1, 1), "bilinear", 1.0)
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    around = tokens * width * 48 + width * 5 + 2 * tokens * width * hidden * within
    assert count(Tokens(layer, width).eval(), spec)[1] == attention + around
    assert torch.backends.mha.get_fastpath_enabled()


def test_counting_leaves_the_fused_operators_off_where_they_were_and_on_after_a_failure() -> None:
    spec = InputSpec((3, 15, 15), (0, 0, 0), (1, 1, 1), "bilinear", 1.0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    with pytest.raises(RuntimeError):
        count(module, spec)
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        count(nn.Sequential(nn.Flatten(), nn.Linear(3 * 225, 2)), spec)
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class Added(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + pair[1]


class GivenParameter(nn.Module):
    """Its inner module is given a view of a parameter, as a class token is handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.inner, self.head = (
            nn.Parameter(torch.zeros(1, 3, 1, 1)),
            Added(),
            nn.Conv2d(3, 2, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner((x, self.token.expand(len(x), -1, -1, -1)))).mean((2, 3))  # type: ignore[no-any-return]


def test_a_parameter_that_a_module_is_given_is_counted_once_and_stays_trainable() -> None:
    module = GivenParameter()
    assert count(module, InputSpec((3, 8, 8), (0, 0, 0), (1, 1, 1), "bilinear", 1.0)) == (3 + 6, 6 * 64)
    assert module.token.requires_grad


def test_a_module_that_two_others_share_counts_each_of_its_calls_under_its_first_name() -> None:
    shared = nn.Conv2d(3, 3, 1, bias=False)
    module = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared, nn.Conv2d(3, 2, 1)), nn.Flatten())
    spec = InputSpec((3, 8, 8), (0, 0, 0), (1, 1, 1), "bilinear", 1.0)
    assert {name: macs for name, macs in count_by_module(module, spec).items() if macs} == {
        "0.0": 2 * 9 * 64,
        "1.1": 6 * 64,
    }


@pytest.mark.parametrize("size", [4, 9])
def test_input_that_does_not_fit(tmp_path: Path, net: str, size: int) -> None:
    refused("model.input.size", f"cannot run on an input of shape (3, {size}, {size}): RuntimeError: ",
            lambda: load_into(tmp_path / "out", factory=net, input={"size": size}))  # fmt: skip


# --- checkpoints


def states() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).state_dict()


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in states().items()}


@pytest.mark.parametrize(
    "saved",
    [
        states(),
        {"state_dict": states(), "epoch": 3},
        {"model": states()},
        {"model_state_dict": prefixed("module.")},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        {name: tensor for name, tensor in states().items() if "num_batches" not in name},
    ],
    ids=["plain", "state_dict", "model", "parallel in a container", "parallel", "compiled", "both", "no counters"],
)
def test_pth_in_all_its_wrappings(tmp_path: Path, net: str, saved: dict[str, Any]) -> None:
    torch.save(saved, tmp_path / "w.pth")
    module = restore(load_into(tmp_path / "out", factory=net, checkpoint=tmp_path / "w.pth"))
    assert all(torch.equal(tensor, states()[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors(tmp_path: Path, net: str, prefix: str) -> None:
    save_file(prefixed(prefix), tmp_path / "w.safetensors")
    module = restore(load_into(tmp_path / "out", factory=net, checkpoint=tmp_path / "w.safetensors"))
    assert torch.equal(module.get_submodule("3").weight, states()["3.weight"])


def test_names_that_begin_like_a_wrapper_are_the_networks_own(tmp_path: Path, write: Callable[..., str]) -> None:
    wrapped = NET + "\n\nclass Wrap(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    wrapped += "        self.module = net()\n    def forward(self, x):\n        return self.module(x)\n"
    torch.save(prefixed("module."), tmp_path / "w.pth")
    network = load_into(tmp_path / "out", factory=write(wrapped, function="Wrap"), checkpoint=tmp_path / "w.pth")
    assert torch.equal(restore(network).state_dict()["module.3.bias"], states()["3.bias"])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_are_cast_to_the_modules_type(tmp_path: Path, net: str, kind: torch.dtype) -> None:
    cast = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in states().items()}
    torch.save(cast, tmp_path / "w.pth")
    module = restore(load_into(tmp_path / "out", factory=net, checkpoint=tmp_path / "w.pth"))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert torch.equal(module.get_submodule("3").weight, states()["3.weight"].to(kind).float())


def test_quantised_tensors_are_not_cast(net: str) -> None:
    state = states() | {"3.weight": torch.ones(3, 144, dtype=torch.int8)}
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    refused("model.name", "w does not fit the network: 1 not of floating point: 3.weight is int8",
            lambda: load_state(module, state, "w"))  # fmt: skip


def test_keys_that_do_not_fit_are_named() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = {**states(), "3.bias": torch.zeros(7), "head.weight": torch.zeros(1)}
    for name in ("0.weight", "0.bias", "1.bias", "1.weight", "1.num_batches_tracked"):
        del state[name]
    error = refused("model.num_classes", "checkpoint w does not fit", lambda: load_state(module, state, "checkpoint w"))
    assert error.message.endswith(
        "4 missing: 0.bias, 0.weight, 1.bias and 1 more; 1 unknown: head.weight; "
        "1 of another shape: 3.bias is (7,), expected (3,)"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool, suffix: str) -> None:
    file, marker = tmp_path / f"w.{suffix}", tmp_path / "marker"
    torch.save({**states(), "x": Attack(marker)}, file, _use_new_zipfile_serialization=zipped)
    refused("save the state_dict alone", "and was refused; nothing in it was run", lambda: read_checkpoint(file))
    assert not marker.exists()
    with file.open("wb") as stream:
        pickle.dump(Attack(marker), stream, protocol=2 if zipped else 0)
    refused("state_dict", "w.", lambda: read_checkpoint(file))
    assert not marker.exists()
    pickle.loads(file.read_bytes())  # the attack itself works
    assert marker.exists()


def test_a_pickled_module_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
    refused("save the state_dict alone", "Python objects besides tensors (torch.nn.modules.linear.Linear)",
            lambda: read_checkpoint(tmp_path / "w.pth"))  # fmt: skip


def saved(path: Path, *, zipped: bool) -> bytes:
    torch.save(states(), path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (lambda path: saved(path, zipped=True)[:700], "cannot be read: ", "copy it again"),
        (lambda path: saved(path, zipped=True)[:-30], "cannot be read: ", "copy it again"),
        (lambda path: saved(path, zipped=False)[:300], "w.pth ", ""),
        (lambda path: saved(path, zipped=False)[:-300], "cannot be read: ", "copy it again"),
        (lambda path: b"", "is not a PyTorch file: it begins with b''", "torch.save"),
        (lambda path: b"a text, renamed\n", "is not a PyTorch file: it begins with b'a te'", "torch.save"),
        (lambda path: b"<!DOCTYPE html>", "is not a PyTorch file: it begins with b'<!DO'", "torch.save"),
        (lambda path: bytes(200), "is not a PyTorch file", "safetensors"),
        (lambda path: b"\x80\x02garbage", "is damaged or holds more than tensors", "state_dict alone"),
        (lambda path: b"PK\x03\x04" + bytes(99), "cannot be read: ", "copy it again"),
    ],
)
def test_damaged_pth(tmp_path: Path, content: Callable[[Path], bytes], message: str, hint: str) -> None:
    file = tmp_path / "w.pth"
    file.write_bytes(content(file))
    refused(hint, message, lambda: read_checkpoint(file))


def test_damaged_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file(states(), file)
    whole = file.read_bytes()
    for content in (whole[:-4], whole[:100], b"", b"text", b"PK\x03\x04"):
        file.write_bytes(content)
        refused("copy or convert it again", "is not a valid safetensors file: ", lambda: read_checkpoint(file))
    refused("model.checkpoint", "does not exist", lambda: read_checkpoint(tmp_path))


@pytest.mark.parametrize("content", [{}, [], {"epoch": 1}, {"state_dict": 1}, {0: torch.ones(1)}, torch.ones(2)])
def test_pth_that_holds_something_else(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    refused("save model.state_dict()", "is not a state_dict of tensors", lambda: read_checkpoint(tmp_path / "w.pth"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["3.weight", "1.running_var"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, net: str, bad: float, where: str) -> None:
    state = states()
    state[where].view(-1)[:2] = bad
    torch.save(state, tmp_path / "w.pth")
    refused("before the training diverged", f"weight '{where}' holds 2 values that are NaN or infinite",
            lambda: load_into(tmp_path / "out", factory=net, checkpoint=tmp_path / "w.pth"))  # fmt: skip


# --- factories


def test_factory_from_a_file_with_kwargs(tmp_path: Path, net: str) -> None:
    network = load_into(tmp_path / "out", factory=net, kwargs={"classes": 4, "width": 5})
    assert network.architecture.name == "net.py:net" and network.architecture.location == net
    assert network.architecture.library.startswith("sha256:")
    assert (network.outputs, network.params) == (4, 5 * 27 + 5 + 10 + 180 * 4 + 4)
    assert network.macs == 5 * 27 * 36 + 180 * 4


def test_factory_from_a_module_and_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "nets.py").write_text(NET)
    (tmp_path / "own_package" / "broken.py").write_text("import math\nmath.sqrt(-1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    network = load_into(tmp_path / "out", factory="own_package.nets:net", num_classes=None)
    assert (network.architecture.name, network.outputs) == ("own_package.nets:net", 3)
    refused("install it", "'own_package.gone' cannot be imported: ModuleNotFoundError",
            lambda: load_into(tmp_path / "out", factory="own_package.gone:net"))  # fmt: skip
    refused("install it", "'own_package.broken' cannot be imported: ValueError: ",
            lambda: load_into(tmp_path / "out", factory="own_package.broken:net"))  # fmt: skip
    refused("did you mean 'net'?", "'own_package.nets' has no function 'nett'",
            lambda: load_into(tmp_path / "out", factory="own_package.nets:nett"))  # fmt: skip


def test_what_lies_beside_a_factory_can_be_imported(tmp_path: Path, write: Callable[..., str]) -> None:
    (tmp_path / "helper.py").write_text("WIDTH = 6\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "late.py").write_text("CLASSES = 7\n")
    late = (
        "import helper\n"
        + NET
        + "\n\ndef late():\n    from parts.late import CLASSES\n    return net(CLASSES, helper.WIDTH)\n"
    )
    path, modules, silent = list(sys.path), set(sys.modules), sys.dont_write_bytecode
    network = load_into(tmp_path / "out", factory=write(late, function="late"))
    assert (network.outputs, network.macs) == (7, 6 * 27 * 36 + 216 * 7)
    assert sys.path == path and sys.dont_write_bytecode == silent
    assert not {"helper", "parts", "parts.late"} & (set(sys.modules) - modules)
    assert not list(tmp_path.rglob("__pycache__"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "helper.py").write_text("WIDTH = 2\n")
    (other / "net.py").write_text("import helper\n" + NET + "\n\ndef late():\n    return net(3, helper.WIDTH)\n")
    assert load_into(tmp_path / "out", factory=f"{other / 'net.py'}:late").macs == 2 * 27 * 36 + 72 * 3
    assert build(network.architecture).get_submodule("3").out_features == 7


def test_an_environment_in_the_factorys_folder_stays_loaded(
    tmp_path: Path, write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / ".venv" / "packages"
    packages.mkdir(parents=True)
    (packages / "installed_library.py").write_text("")
    monkeypatch.syspath_prepend(packages)
    load_into(tmp_path / "out", factory=write("import installed_library\n" + NET))
    assert sys.modules.pop("installed_library")


def test_an_edited_factory_is_read_again_at_once(write: Callable[..., str], tmp_path: Path) -> None:
    for width in (4, 5, 6):
        network = load_into(tmp_path / "out", factory=write(NET.replace("width=4", f"width={width}")))
        assert network.macs == width * 27 * 36 + width * 36 * 3


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("def net(:\n", "net.py cannot be imported: SyntaxError: ", "correct the file"),
        ("\nimport no_such_library", "No module named 'no_such_library' (line 2)", "correct the file"),
        ("import sys\nsys.exit(3)", "cannot be imported: SystemExit: 3 (line 2)", "correct the file"),
        ("def net():\n    raise KeyError('w')", "net.py:net' failed: KeyError: 'w' (line 2)", "correct the factory"),
        ("def net():\n    assert False", "failed: AssertionError (line 2)", "correct the factory"),
        ("def net():\n    exit()", "failed: SystemExit", "correct the factory"),
        ("def net():\n    return {'state_dict': 1}", "net' returned dict", "must return a torch.nn.Module"),
        ("def net():\n    pass", "net' returned NoneType", "must return a torch.nn.Module"),
        ("def nets():\n    pass", "has no function 'net'", "did you mean 'nets'?"),
        ("net = 3", "has no function 'net'", "name a function"),
        ("def net(width):\n    pass", "does not take these arguments: missing a required argument: 'width'", "kwargs"),
        ("from torch import nn\ndef net():\n    return nn.Flatten()", "has no parameters", "with weights"),
        (NET + "    \nold = net\ndef net():\n    return old().half()", "weight '0.weight' is float16", ".float()"),
    ],
)
def test_factory_that_fails(tmp_path: Path, write: Callable[..., str], text: str, message: str, hint: str) -> None:
    path = list(sys.path)
    refused(hint, message, lambda: load_into(tmp_path / "out", factory=write(text)))
    assert sys.path == path


def test_factory_file_that_is_gone(tmp_path: Path) -> None:
    refused(
        "recipe's folder", "gone.py does not exist", lambda: load_into(tmp_path, factory=f"{tmp_path / 'gone.py'}:f")
    )


def test_factory_with_other_arguments(tmp_path: Path, net: str) -> None:
    refused("correct model.kwargs", "does not take these arguments: got an unexpected keyword argument 'depth'",
            lambda: load_into(tmp_path / "out", factory=net, kwargs={"depth": 2}))  # fmt: skip
    refused("correct model.kwargs", "unexpected keyword argument 'num_classes'",
            lambda: load_into(tmp_path / "out", factory=net, num_classes=3))  # fmt: skip


@pytest.mark.parametrize(
    ("result", "message", "hint"),
    [
        ("(y, y)", "the network returns tuple, not logits", "wrap it"),
        ("{'logits': y}", "the network returns dict, not logits", "wrap it"),
        ("y[:, :, None]", "the network returns (2, 3, 1), not logits", "wrap it"),
        ("y.flatten()", "the network returns (6,), not logits", "wrap it"),
        ("y[:1]", "the network returns (1, 3), not logits", "wrap it"),
        ("y[:, :1]", "the network has 1 output; a classifier needs two", "num_classes"),
        ("1 / 0", "ZeroDivisionError: division by zero", "model.input.size"),
        ("self.gone", "AttributeError: ", "model.input.size"),
        ("[].pop()", "IndexError: ", "model.input.size"),
    ],
)
def test_outputs_that_are_not_logits(
    tmp_path: Path, write: Callable[..., str], result: str, message: str, hint: str
) -> None:
    own = f"{NET}\n\nclass Own(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.net = net()\n"
    own += f"    def forward(self, x):\n        y = self.net(x)\n        return {result}\n"
    refused(hint, message, lambda: load_into(tmp_path / "out", factory=write(own, function="Own")))


@pytest.mark.parametrize(("given", "key"), [({"input": {"size": 9}}, "model.input.size"), ({"input": None}, "")])
def test_an_input_is_at_fault_where_the_recipe_gives_it(
    tmp_path: Path, write: Callable[..., str], given: dict[str, Any], key: str
) -> None:
    flat = "from torch import nn\n\ndef net(**kwargs):\n    return nn.Sequential(nn.Flatten(), nn.Linear(5, 3))\n"
    with pytest.raises(ModelError, match="cannot run on an input of shape") as refusal:
        load_into(tmp_path / "out", factory=write(flat), **given)
    assert refusal.value.key == key and refusal.value.at("here").key == key


def test_classes_that_a_factory_ignores(tmp_path: Path, write: Callable[..., str]) -> None:
    deaf = f"{NET}\n\ndef deaf(**kwargs):\n    return net()\n"
    refused("correct model.num_classes", "model.num_classes is 5, and the network has 3 outputs",
            lambda: load_into(tmp_path / "out", factory=write(deaf, function="deaf"), num_classes=5))  # fmt: skip


# --- what is left behind


def test_loggers_are_left_as_they_were(tmp_path: Path) -> None:
    logger = logging.getLogger("timm")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        load_into(tmp_path, name="test_resnet", pretrained=False, input={"size": 32})
        assert logger.level == logging.INFO
        with pytest.raises(ValueError), quiet("timm", logging.ERROR):
            assert logger.level == logging.ERROR
            raise ValueError
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(before)


def test_reason_is_one_line_whatever_the_error() -> None:
    assert [reason(error) for error in (EOFError(), ValueError("\n\n a\nb"), KeyError("k"))] == [
        "EOFError",
        "ValueError: a",
        "KeyError: 'k'",
    ]
