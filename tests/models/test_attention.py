"""The fifteen attention modules against their formulas, and their places in the networks of every family."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from imgcls_fast.cli.app import main
from imgcls_fast.core.errors import ConfigError, ModelError
from imgcls_fast.core.settings import build_config
from imgcls_fast.models import ModelSpec, build_model, load_weights
from imgcls_fast.models.attention import MODULES
from imgcls_fast.models.attention_parts import LEAST_GROUP
from imgcls_fast.models.backbones import make_backbone
from imgcls_fast.models.placement import (
    ALIASES,
    CONTAINER,
    FAMILIES,
    PLACES,
    Attend,
    attention_to_train,
    family_of,
    insert_attention,
    parse_attention,
    resolve_attention,
)

CHANNELS_LAST = torch.channels_last
Weights = dict[str, np.ndarray]

# ---------------------------------------------------------------- formulas, written a second time in NumPy, float64


def sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def softmax(a: np.ndarray, axis: int) -> np.ndarray:
    shifted = np.exp(a - a.max(axis, keepdims=True))
    return shifted / shifted.sum(axis, keepdims=True)


def relu(a: np.ndarray) -> np.ndarray:
    return np.maximum(a, 0)


def dense(w: Weights, name: str, a: np.ndarray) -> np.ndarray:
    return a @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def norm(w: Weights, name: str, a: np.ndarray) -> np.ndarray:
    """Batch norm in evaluation; axis 1 holds the channels."""
    shape = (1, -1) + (1,) * (a.ndim - 2)
    mean, variance, scale, shift = (
        w[f"{name}.{key}"].reshape(shape) for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (a - mean) / np.sqrt(variance + 1e-5) * scale + shift


def conv(w: Weights, name: str, a: np.ndarray, *, dilation: int = 1, groups: int = 1) -> np.ndarray:
    """A convolution that keeps the size of the map, one position of the kernel after the other."""
    kernel = w[f"{name}.weight"]
    count, inner, side, _ = kernel.shape
    reach = dilation * (side // 2)
    padded = np.pad(a, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    height, width = a.shape[2:]
    out = np.zeros((len(a), count, height, width)) + w.get(f"{name}.bias", np.zeros(count))[:, None, None]
    for group in range(groups):
        mine = slice(group * count // groups, (group + 1) * count // groups)
        for i in range(side):
            for j in range(side):
                part = padded[:, group * inner : (group + 1) * inner]
                part = part[:, :, i * dilation : i * dilation + height, j * dilation : j * dilation + width]
                out[:, mine] += np.einsum("nchw,oc->nohw", part, kernel[mine, :, i, j])
    return out


def flat(a: np.ndarray) -> np.ndarray:
    return a.reshape(*a.shape[:2], -1)


def gated(x: np.ndarray, gate: np.ndarray) -> np.ndarray:
    return x * gate[:, :, None, None]


def se(w: Weights, x: np.ndarray) -> np.ndarray:
    return gated(x, sigmoid(dense(w, "excite", relu(dense(w, "squeeze", x.mean((2, 3)))))))


def cbam(w: Weights, x: np.ndarray) -> np.ndarray:
    mlp = [relu(pooled @ w["w1"].T) @ w["w2"].T for pooled in (x.mean((2, 3)), x.max((2, 3)))]
    y = gated(x, sigmoid(mlp[0] + mlp[1]))
    return y * sigmoid(norm(w, "norm", conv(w, "conv", np.stack((y.mean(1), y.max(1)), 1))))


def bam(w: Weights, x: np.ndarray) -> np.ndarray:
    channel = norm(w, "channel.3", dense(w, "channel.2", relu(dense(w, "channel.0", x.mean((2, 3))))))
    hidden = relu(conv(w, "spatial.0", x))
    for layer in ("spatial.2", "spatial.4"):
        hidden = relu(conv(w, layer, hidden, dilation=4))
    spatial = norm(w, "spatial.7", conv(w, "spatial.6", hidden))
    return x * (1 + sigmoid(channel[:, :, None, None] + spatial))


def double(w: Weights, x: np.ndarray) -> np.ndarray:
    a, b, v = (flat(conv(w, name, x)) for name in ("features", "gather", "distribute"))
    out = np.zeros_like(a)
    for n in range(len(x)):
        descriptors = [a[n] @ softmax(row, 0) for row in b[n]]  # one for each attention map over positions
        for position in range(a.shape[2]):
            shares = softmax(v[n, :, position], 0)
            out[n, :, position] = sum(s * d for s, d in zip(shares, descriptors, strict=True))
    return x + conv(w, "expand", out.reshape(*out.shape[:2], *x.shape[2:]))


def srm(w: Weights, x: np.ndarray) -> np.ndarray:
    mean, deviation = x.mean((2, 3)), np.sqrt(x.var((2, 3)) + 1e-5)
    return gated(x, sigmoid(norm(w, "norm", w["weight"][:, 0] * mean + w["weight"][:, 1] * deviation)))


def gc(w: Weights, x: np.ndarray) -> np.ndarray:
    shares = softmax(flat(conv(w, "key", x))[:, 0], 1)
    hidden = dense(w, "transform.0", np.einsum("ncp,np->nc", flat(x), shares))
    hidden = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-5)
    hidden = relu(hidden * w["transform.1.weight"] + w["transform.1.bias"])
    return x + dense(w, "transform.3", hidden)[:, :, None, None]


def sk(w: Weights, x: np.ndarray) -> np.ndarray:
    groups = math.gcd(x.shape[1], 32)
    maps = []
    for i in range(2):
        convolved = conv(w, f"branches.{i}.0", x, dilation=i + 1, groups=groups)
        maps.append(relu(norm(w, f"branches.{i}.1", convolved)))
    z = relu(norm(w, "fuse.1", dense(w, "fuse.0", (maps[0] + maps[1]).mean((2, 3)))))
    a, b = np.split(np.exp(dense(w, "select", z)), 2, axis=1)
    return gated(maps[0], a / (a + b)) + gated(maps[1], b / (a + b))


def lct(w: Weights, x: np.ndarray) -> np.ndarray:
    z = x.mean((2, 3)).reshape(len(x), -1, LEAST_GROUP)  # 24 channels in 6 groups
    z = (z - z.mean(2, keepdims=True)) / np.sqrt(z.var(2, keepdims=True) + 1e-5)
    return gated(x, sigmoid(z.reshape(len(x), -1) * w["norm.weight"] + w["norm.bias"]))


def gct(w: Weights, x: np.ndarray) -> np.ndarray:
    s = w["alpha"] * np.sqrt((x**2).sum((2, 3)) + 1e-5)
    s = np.sqrt(x.shape[1]) * s / np.sqrt((s**2).sum(1, keepdims=True) + 1e-5)
    return gated(x, 1 + np.tanh(w["gamma"] * s + w["beta"]))


def eca(w: Weights, x: np.ndarray) -> np.ndarray:
    kernel = w["conv.weight"][0, 0]
    padded = np.pad(x.mean((2, 3)), ((0, 0), (len(kernel) // 2,) * 2))
    return gated(x, sigmoid(np.stack([np.convolve(row, kernel[::-1], "valid") for row in padded])))


def triplet(w: Weights, x: np.ndarray) -> np.ndarray:
    """The paper's way: bring one axis to where the channels are, gate, and bring it back."""
    out = np.zeros_like(x)
    for branch, axis in (("over_channels", 1), ("over_rows", 2), ("over_columns", 3)):
        others = [k for k in (1, 2, 3) if k != axis]
        turned = x.transpose(0, axis, *others)
        pooled = np.stack((turned.max(1), turned.mean(1)), 1)
        turned = turned * sigmoid(norm(w, f"{branch}.1", conv(w, f"{branch}.0", pooled)))
        out += turned.transpose(np.argsort((0, axis, *others))) / 3
    return out


def coord(w: Weights, x: np.ndarray) -> np.ndarray:
    def along(axis: int) -> np.ndarray:
        pooled = norm(w, "shared.1", np.einsum("ncp,oc->nop", x.mean(axis), w["shared.0.weight"][..., 0]))
        return pooled * np.clip(pooled + 3, 0, 6) / 6

    rows, columns = (
        sigmoid(np.einsum("ncp,oc->nop", along(axis), w[f"{name}.weight"][..., 0]) + w[f"{name}.bias"][:, None])
        for name, axis in (("rows", 3), ("columns", 2))
    )
    return x * rows[:, :, :, None] * columns[:, :, None, :]


def simam(w: Weights, x: np.ndarray) -> np.ndarray:
    squares = (x - x.mean((2, 3), keepdims=True)) ** 2
    variance = x.var((2, 3), ddof=1, keepdims=True)
    energy = 4 * (variance + 1e-4) / (squares + 2 * variance + 2 * 1e-4)
    return x * sigmoid(1 / energy)


def pam(w: Weights, x: np.ndarray) -> np.ndarray:
    q, k, v = (flat(conv(w, name, x)) for name in ("query", "key", "value"))
    shares = softmax(np.einsum("ncj,nci->nji", q, k), 2)
    return x + w["gamma"] * np.einsum("nji,nci->ncj", shares, v).reshape(x.shape)


def cam(w: Weights, x: np.ndarray) -> np.ndarray:
    shares = softmax(np.einsum("njp,nip->nji", flat(x), flat(x)), 2)
    return x + w["gamma"] * np.einsum("nji,nip->njp", shares, flat(x)).reshape(x.shape)


FORMULAS: dict[str, Callable[[Weights, np.ndarray], np.ndarray]] = {
    "se": se, "cbam": cbam, "bam": bam, "double": double, "srm": srm, "gc": gc, "sk": sk, "lct": lct, "gct": gct,
    "eca": eca, "triplet": triplet, "coord": coord, "simam": simam, "pam": pam, "cam": cam,
}  # fmt: skip


def shaken(module: nn.Module) -> nn.Module:
    """Weights and statistics such that no part of the module hides behind a 0 or a 1."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.2)
        for inner in module.modules():
            if isinstance(inner, _BatchNorm):
                inner.running_var.abs_().add_(0.1)
    return module


def test_there_are_fifteen_modules_and_a_formula_for_each() -> None:
    assert len(MODULES) == 15 and list(FORMULAS) == list(MODULES)
    assert set(ALIASES.values()) <= set(MODULES) and not set(ALIASES) & set(MODULES)


MAPS = [(2, 24, 5, 7), (1, 24, 1, 1), (2, 24, 1, 6), (3, 24, 9, 2)]


@pytest.mark.parametrize(
    ("name", "shape"),  # SimAM's variance of one position is not defined by the paper
    [(name, shape) for name in MODULES for shape in MAPS if name != "simam" or shape[2:] != (1, 1)],
    ids=str,
)
def test_is_its_papers_formula_on_any_map(name: str, shape: tuple[int, ...]) -> None:
    module = shaken(MODULES[name](shape[1])).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    weights = {key: value.numpy() for key, value in module.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(module(x), torch.from_numpy(FORMULAS[name](weights, x.numpy())))


def test_simam_gives_one_position_the_gate_of_a_mean() -> None:
    x = torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(MODULES["simam"](3)(x), x * torch.sigmoid(torch.tensor(0.5)))


@pytest.mark.parametrize(("channels", "width"), [(16, 3), (64, 3), (128, 5), (256, 5), (512, 5), (2048, 7)])
def test_the_width_of_eca_follows_the_channels(channels: int, width: int) -> None:
    assert MODULES["eca"](channels).conv.kernel_size == (width,)


def test_the_parts_of_cbam_have_the_shapes_that_a_kernel_can_take() -> None:
    module = MODULES["cbam"](256)
    assert module.w1.shape == (16, 256) and module.w2.shape == (256, 16)
    assert module.conv.weight.shape == (1, 2, 7, 7) and module.conv.bias is None
    assert isinstance(module.norm, nn.BatchNorm2d) and module.norm.num_features == 1


def test_equal_maxima_of_cbam_share_their_gradient() -> None:
    """ReLU leaves many zeros: on an all-equal map no position may be preferred."""
    module = MODULES["cbam"](8).eval()
    x = torch.full((1, 8, 3, 3), 0.5, requires_grad=True)
    with torch.no_grad():
        module.conv.weight.zero_()
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, x.grad[:, :, :1, :1].expand_as(x))


@pytest.mark.parametrize("name", ["pam", "cam", "gct"])
def test_the_papers_start_is_the_identity_and_ours_is_not(name: str) -> None:
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(MODULES[name](16, gamma_init=0.0)(x), x)
    assert (MODULES[name](16)(x) - x).norm() > 0.01 * x.norm()


@pytest.mark.parametrize("name", MODULES)
def test_keeps_dtype_and_memory_format_also_under_autocast(name: str) -> None:
    module = shaken(MODULES[name](24)).eval()
    x = torch.randn(2, 24, 6, 5).to(memory_format=CHANNELS_LAST)
    with torch.no_grad():
        expected = module(x)
        for dtype, form in ((torch.float32, CHANNELS_LAST), (torch.bfloat16, CHANNELS_LAST), (torch.bfloat16, None)):
            given = x.to(dtype) if form else x.to(dtype).contiguous()
            with torch.autocast("cpu", torch.bfloat16):
                out = module(given)
            assert out.dtype == dtype
            assert out.is_contiguous(memory_format=form or torch.contiguous_format)
            assert (out.float() - expected).norm() < 0.02 * expected.norm()
    assert expected.is_contiguous(memory_format=CHANNELS_LAST)


def test_affinities_of_cam_stay_finite_where_half_precision_overflows() -> None:
    x = 40 * torch.rand(1, 4, 64, 64)  # X X^T is about two million
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        assert torch.isfinite(MODULES["cam"](4)(x.half())).all()
        assert torch.isfinite(MODULES["simam"](4)(10 * x.half())).all()
        assert torch.isfinite(MODULES["gct"](4)(10 * x.half())).all()


@pytest.mark.parametrize("name", MODULES)
def test_compiles_whole_and_runs_on_one_channel(name: str) -> None:
    torch._dynamo.reset()
    module, x = MODULES[name](1), torch.randn(3, 1, 4, 6)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("name", MODULES)
def test_has_named_parameters_only_and_refuses_what_is_out_of_range(name: str) -> None:
    parameters = list(inspect.signature(MODULES[name]).parameters.values())[1:]
    assert all(p.kind is p.KEYWORD_ONLY and isinstance(p.default, int | float) for p in parameters)
    for p in parameters:
        if isinstance(p.default, int):
            with pytest.raises(ValueError, match=p.name):
                MODULES[name](16, **{p.name: 0})


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("cbam@stage4", "cbam(reduction=16, kernel_size=7)@stage4"),
        ("cbam@4", "cbam(reduction=16, kernel_size=7)@stage4"),
        (" SE ( reduction = 8 ) @ every-block ", "se(reduction=8)@every-block"),
        ("se()@1", "se(reduction=16)@stage1"),
        ("ECA(gamma=2)@2", "eca(gamma=2.0, b=1.0)@stage2"),
        ("SimAM(lam=1e-5)@3", "simam(lam=1e-05)@stage3"),
        ("Double_Attention@3", "double(reduction=4)@stage3"),
        ("pam(gamma_init=0)@4", "pam(reduction=8, gamma_init=0.0)@stage4"),
    ],
)
def test_a_text_is_read_and_written_out_in_full(text: str, full: str) -> None:
    assert str(parse_attention(text)) == full == str(parse_attention(full))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cbam", "NAME@PLACE"),
        ("cbam@", "NAME@PLACE"),
        ("@stage4", "NAME@PLACE"),
        ("cbam(reduction=8@stage4", "NAME@PLACE"),
        ("", "NAME@PLACE"),
        ("cbma@stage4", "did you mean 'cbam'"),
        ("tripplet@stage4", "did you mean 'triplet'"),
        ("transformer@stage4", "there are se, cbam"),
        ("cbam@stage5", "expected one of stage1, stage2, stage3, stage4, every-block"),
        ("cbam@0", "expected one of stage1"),
        ("cbam@every-blok", "attention=['cbam@every-block']"),
        ("se(ratio=4)@stage4", "its parameters: reduction=16"),
        ("se(reductoin=4)@stage4", "did you mean 'reduction'"),
        ("simam(4)@stage4", "no parameter '4'"),
        ("se(reduction=2.5)@stage4", "must be a whole number, got '2.5'"),
        ("pam(gamma_init=x)@stage4", "must be a number, got 'x'"),
        ("se(reduction=0)@stage4", "reduction must be at least 1"),
        ("cbam(kernel_size=4)@stage4", "kernel_size must be odd"),
        ("simam(lam=0)@stage4", "lam must be above 0"),
    ],
)
def test_a_wrong_text_is_one_error_that_names_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_attention("torchvision/resnet18", [text])
    assert caught.value.code == "C003"
    assert said in str(caught.value)
    assert caught.value.try_


def test_reading_a_text_draws_nothing_at_random() -> None:
    before = torch.random.get_rng_state()
    resolve_attention("torchvision/resnet18", [f"{name}@stage4" for name in MODULES])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "arch",
    [
        "torchvision/vit_b_16", "torchvision/swin_t", "torchvision/googlenet", "torchvision/mnasnet0_5",
        "torchvision/maxvit_t", "timm/vit_tiny_patch16_224", "timm/mnasnet_100", "timm/mobilenetv4_conv_small", "timm/skresnet18",
        "timm/res2net50_14w_8s", "timm/resnest14d", "timm/repvgg_a0", "timm/fbnetv3_b", "timm/resnetv2_50",
    ],
)  # fmt: skip
def test_an_architecture_without_places_is_refused_by_name(arch: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_attention(arch, ["se@stage4"])
    assert caught.value.code == "C004"
    assert arch in caught.value.message and "ShuffleNetV2" in caught.value.why
    assert resolve_attention(arch, []) == ()


def test_one_module_twice_in_one_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="se is given twice for stage4") as caught:
        resolve_attention("small-cnn", ["se@4", "cbam@4", "se(reduction=4)@stage4"])
    assert caught.value.code == "C004"


# ---------------------------------------------------------------- places

# family -> architecture, channels of the maps after the stages 1 to 4, residual or repeated blocks
SMALLEST: dict[str, tuple[str, tuple[int, int, int, int], int]] = {
    "small-cnn": ("small-cnn", (32, 64, 128, 256), 4),
    "ResNet": ("torchvision/resnet18", (64, 128, 256, 512), 8),
    "ResNeXt": ("torchvision/resnext50_32x4d", (256, 512, 1024, 2048), 16),
    "RegNet": ("torchvision/regnet_y_400mf", (48, 104, 208, 440), 16),
    "DenseNet": ("torchvision/densenet121", (256, 512, 1024, 1024), 58),
    "EfficientNet": ("torchvision/efficientnet_b0", (24, 40, 112, 320), 16),
    "MobileNetV2": ("torchvision/mobilenet_v2", (24, 32, 96, 320), 17),
    "MobileNetV3": ("torchvision/mobilenet_v3_small", (16, 24, 48, 96), 11),
    "ConvNeXt": ("torchvision/convnext_tiny", (96, 192, 384, 768), 18),
    "VGG": ("torchvision/vgg11_bn", (128, 256, 512, 512), 8),
    "ShuffleNetV2": ("torchvision/shufflenet_v2_x0_5", (24, 48, 96, 192), 16),
}
SMALLEST_OF_TIMM: dict[str, tuple[str, tuple[int, int, int, int], int]] = {
    "ResNet": ("timm/resnet10t", (64, 128, 256, 512), 4),
    "ResNeXt": ("timm/seresnext26d_32x4d", (256, 512, 1024, 2048), 8),
    "RegNet": ("timm/regnetx_002", (24, 56, 152, 368), 13),
    "RegNetV": ("timm/regnetv_040", (128, 192, 512, 1088), 22),
    "DenseNet": ("timm/densenet121", (256, 512, 1024, 1024), 58),
    "EfficientNet": ("timm/efficientnet_lite0", (24, 40, 112, 320), 16),
    "EfficientNetV2": ("timm/efficientnetv2_rw_t", (40, 48, 128, 208), 39),
    "MobileNetV2": ("timm/mobilenetv2_035", (8, 16, 32, 112), 17),
    "MobileNetV3": ("timm/mobilenetv3_small_050", (8, 16, 24, 48), 11),
    "ConvNeXt": ("timm/convnext_atto", (40, 80, 160, 320), 12),
    "ConvNeXt, 1x1 convolutions": ("timm/test_convnext", (24, 32, 48, 64), 9),
    "VGG": ("timm/vgg11", (128, 256, 512, 512), 8),
}
ALL = [*SMALLEST.values(), *SMALLEST_OF_TIMM.values()]


def spec_of(arch: str, *attention: str) -> ModelSpec:
    """Without anything random in training, so that two passes can be compared."""
    drop_path = None if arch == "small-cnn" or "vgg" in arch or "densenet" in arch else 0.0
    return ModelSpec(arch, num_outputs=3, drop_rate=0.0, drop_path=drop_path, attention=attention)


@functools.lru_cache(maxsize=1)
def bare_network(arch: str) -> tuple[nn.Module, Tensor, Tensor]:
    """(network without gradients, pixels, its output in training mode); scales that start at nothing are awake."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make_backbone(spec_of(arch)).train()
        for parameter in network.parameters():
            parameter.requires_grad_(False)
            start = parameter.flatten()[0].item()
            if parameter.numel() > 1 and bool((parameter == start).all()):  # norms and layer scales
                parameter.uniform_(0.5, 1.5) if start else parameter.normal_(0, 0.1)
        pixels = torch.randn(6, 3, 64, 64).to(memory_format=CHANNELS_LAST)
        return network, pixels, network(pixels)


def with_attention(arch: str, *attention: str) -> nn.Module:
    """A copy of the bare network that shares its weights, with modules inserted."""
    network, _, _ = bare_network(arch)
    torch.manual_seed(1)
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    network = copy.deepcopy(network, shared)
    insert_attention(network, spec_of(arch, *attention))
    return network.train()


def count_calls(network: nn.Module) -> dict[str, int]:
    calls: dict[str, int] = {}
    for name, module in network.named_modules():
        if type(module) in MODULES.values():
            calls[name] = 0

            def note(module: nn.Module, inputs: Any, name: str = name) -> None:
                calls[name] += 1

            module.register_forward_pre_hook(note)
    return calls


def check_it_acts(arch: str, *attention: str) -> dict[str, int]:
    """Called once each, the output changes, every parameter learns, no key of the backbone differs."""
    bare, pixels, before = bare_network(arch)
    network = with_attention(arch, *attention)
    calls = count_calls(network)
    own = dict(network.get_submodule(CONTAINER).named_parameters())
    pixels = pixels.clone().requires_grad_(not own)  # SimAM has nothing to learn: it must pass gradients on
    out = network(pixels)
    (out * torch.randn_like(out)).sum().backward()
    assert calls and set(calls.values()) == {1}
    assert own or bool(pixels.grad.abs().sum() > 0)
    assert out.isfinite().all() and (out - before).norm() > 1e-4 * before.norm()
    dead = [name for name, p in own.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead, dead
    keys = list(network.state_dict())
    assert [key for key in keys if key.split(".")[0] != CONTAINER] == list(bare.state_dict())
    return calls


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("family", SMALLEST)
def test_every_module_acts_and_learns_in_every_family(family: str, name: str) -> None:
    """The old program's modules crashed, or were registered and never called (regression 17)."""
    check_it_acts(SMALLEST[family][0], f"{name}@stage4")


@pytest.mark.parametrize("name", MODULES)
def test_every_module_acts_in_every_block(name: str) -> None:
    assert len(check_it_acts("small-cnn", f"{name}@every-block")) == 4


@pytest.mark.parametrize(
    ("arch", "channels", "blocks"),
    [pytest.param(*row, id=row[0]) for row in ALL],
)
def test_stages_end_and_blocks_lie_where_the_table_says(
    arch: str, channels: tuple[int, ...], blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = check_it_acts(arch, *(f"eca@stage{k}" for k in (1, 2, 3, 4)), "simam@every-block")
    assert sum(".simam_every_block." in f".{name}" for name in calls) == blocks
    network = with_attention(arch, *(f"eca@stage{k}" for k in (1, 2, 3, 4)))
    seen = []
    for module in network.modules():
        if isinstance(module, MODULES["eca"]):
            module.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[1:])))
    with torch.no_grad():
        network(bare_network(arch)[1])
    first = 32 if "vgg" in arch else 16  # the four smallest maps of VGG lie before its four last pools
    assert seen == [(c, first >> k, first >> k) for k, c in enumerate(channels)]


RESIDUAL = [
    ("small-cnn", "stages.0.0"), ("torchvision/resnet18", "layer1.1"), ("torchvision/resnext50_32x4d", "layer1.1"),
    ("torchvision/regnet_y_400mf", "trunk_output.block4.block4-1"), ("torchvision/efficientnet_b0", "features.2.1"),
    ("torchvision/mobilenet_v2", "features.3"), ("torchvision/mobilenet_v3_small", "features.3"),
    ("torchvision/convnext_tiny", "features.1.0"), ("timm/resnet18", "layer1.1"), ("timm/seresnext26d_32x4d", "layer1.1"),
    ("timm/regnetx_002", "s3.b2"), ("timm/efficientnet_lite0", "blocks.1.1"), ("timm/efficientnetv2_rw_t", "blocks.0.1"),
    ("timm/mobilenetv2_035", "blocks.1.1"), ("timm/mobilenetv3_small_050", "blocks.1.1"),
    ("timm/convnext_atto", "stages.0.blocks.0"), ("timm/test_convnext", "stages.0.blocks.0"),
]  # fmt: skip


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


@pytest.mark.parametrize(("arch", "block"), RESIDUAL, ids=[arch for arch, _ in RESIDUAL])
def test_in_a_residual_block_it_acts_on_the_branch_before_the_add(arch: str, block: str) -> None:
    """A module that gives nothing leaves the shortcut, and after it at most the block's ReLU of what is no less than 0."""
    network = with_attention(arch, "simam@every-block").eval()
    for module in network.modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, Attend):
                hook.attention = Nothing()
    inside = network.get_submodule(block)
    channels = next(m for m in inside.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = torch.rand(2, channels, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(inside(x.clone()), x)


def test_families_cover_both_libraries_and_names_decide() -> None:
    names = {family.name for family in FAMILIES}
    assert {family_of(arch).name for arch, _, _ in ALL} == names
    assert family_of("timm/mobilenetv2_100.ra_in1k").name == "MobileNetV2"
    assert family_of("timm/tf_efficientnetv2_s").name == "EfficientNet"


def test_modules_of_one_place_act_in_the_order_given() -> None:
    network = with_attention("small-cnn", "gct@stage2", "se@stage2", "eca@every-block")
    order: list[str] = []
    for module in network.modules():
        if type(module) in MODULES.values():
            module.register_forward_pre_hook(lambda module, inputs: order.append(type(module).__name__))
    with torch.no_grad():
        network(bare_network("small-cnn")[1])
    assert order == ["ECA", "ECA", "GCT", "SE", "ECA", "ECA"]


def test_a_network_without_four_stages_refuses_the_missing_ones() -> None:
    spec = ModelSpec("small-cnn", num_outputs=3, arch_args={"depths": [1, 1]}, attention=("se@2",))
    assert "attention.se_stage2.stages_1.squeeze.weight" in build_model(spec).backbone.state_dict()
    with pytest.raises(ConfigError, match=r"has 2 stages, and .* needs stage 3") as caught:
        build_model(ModelSpec("small-cnn", num_outputs=3, arch_args={"depths": [1, 1]}, attention=("se@3",)))
    assert caught.value.code == "C004"


# ---------------------------------------------------------------- inside a classifier


def tiny(*attention: str, **changes: Any) -> ModelSpec:
    return ModelSpec("small-cnn", **{"num_outputs": 3, "arch_args": {"width": 8}, "attention": attention, **changes})


def photos(count: int = 4, size: int = 64) -> Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)


def awake(model: nn.Module) -> nn.Module:
    """Heads and last norms of small-cnn start near nothing."""
    return shaken(model).eval()


def test_backbone_head_and_random_draws_are_those_of_the_bare_model() -> None:
    torch.manual_seed(1)
    bare = build_model(tiny())
    torch.manual_seed(1)
    model = build_model(tiny("cbam@every-block", "pam@4"))
    assert model.head_keys == bare.head_keys
    theirs = bare.state_dict()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in theirs.items())
    assert set(model.backbone_parameters()) | set(model.head_parameters()) == set(model.backbone.parameters())


def test_bare_weights_load_and_only_the_modules_stay_fresh(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    donor = awake(build_model(tiny()))
    save_file({k: v.contiguous() for k, v in donor.backbone.state_dict().items()}, tmp_path / "bare.safetensors")
    model = build_model(tiny("se@stage4"), weights=tmp_path / "bare.safetensors")
    assert model.report is not None and not model.report.ignored and not model.report.adapted
    assert set(model.report.loaded) == set(donor.backbone.state_dict())
    assert set(model.report.fresh) == {f"attention.se_stage4.stages_3.{n}.weight" for n in ("squeeze", "excite")}


def test_published_weights_of_another_channel_count_load_beside_attention() -> None:
    donor = build_model(ModelSpec("timm/resnet10t", num_outputs=3, attention=("se@4",)))
    gray = {"channels": 1, "mean": (0.5,), "std": (0.5,)}
    model = build_model(ModelSpec("timm/resnet10t", num_outputs=3, attention=("se@4",), **gray))
    report = load_weights(model, donor.state_dict())
    assert report.adapted == ("conv1.0.weight",) and not report.fresh
    key = "attention.se_stage4.layer4.squeeze.weight"
    assert torch.equal(model.backbone.state_dict()[key], donor.backbone.state_dict()[key])


def test_weights_of_another_module_never_fill_this_one() -> None:
    donor = build_model(tiny("se@stage4"))
    for attention in ((), ("se@stage3",), ("cbam@stage4",)):
        with pytest.raises(ModelError) as caught:
            load_weights(build_model(tiny(*attention)), donor.state_dict())
        assert caught.value.code == "M002" and "attention.se_stage4" in caught.value.message
    report = load_weights(build_model(tiny("se@stage4", "eca@stage1")), donor.state_dict())
    assert report.fresh == ("attention.eca_stage1.stages_0.conv.weight",)


def test_a_copy_has_modules_of_its_own() -> None:
    model = awake(build_model(tiny("cbam@every-block", "gct@4")))
    twin, x = copy.deepcopy(model), photos()
    with torch.no_grad():
        before = model(x)
        assert torch.equal(twin(x), before)
        for parameter in twin.backbone.get_submodule(CONTAINER).parameters():
            parameter.normal_()
        assert torch.equal(model(x), before)
        assert not torch.allclose(twin(x), before)


def test_a_spec_with_modules_survives_json_and_one_without_the_key_is_read() -> None:
    spec = tiny("cbam@stage4", "se(reduction=8)@every-block")
    stored = json.loads(json.dumps(spec.to_dict()))
    assert ModelSpec.from_dict(stored) == spec
    del stored["attention"]
    assert ModelSpec.from_dict(stored) == tiny()


@pytest.mark.parametrize("name", MODULES)
def test_freezing_counts_a_module_into_the_stage_that_it_follows(name: str) -> None:
    """Coordinate attention's means of rows and columns look like a smaller map, and gates like none at all."""
    model, bare = build_model(tiny(*(f"{name}@stage{k}" for k in (1, 2, 3, 4)), image_size=64)), build_model(tiny())
    stages = model.stages()
    for key, stage in stages.items():
        if key.startswith("attention."):
            assert key.startswith(f"attention.{name}_stage{stage}.")
    assert {k: v for k, v in stages.items() if not k.startswith("attention.")} == bare.stages()
    model.freeze(2)
    frozen = {
        key.split(".")[1] for key, p in model.backbone.named_parameters() if not p.requires_grad and "attention" in key
    }
    assert frozen == ({f"{name}_stage1", f"{name}_stage2"} if name != "simam" else set())
    model.train().freeze("backbone")
    norms = [m for m in model.backbone.get_submodule(CONTAINER).modules() if isinstance(m, _BatchNorm)]
    assert not any(m.training for m in norms)


def test_compiles_whole_with_a_module_in_every_block() -> None:
    torch._dynamo.reset()
    model, x = awake(build_model(tiny("cbam@every-block", "pam@4"))), photos()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["se", "cbam"])
def test_compiled_kernels_compute_the_same_gradients(name: str) -> None:
    torch._dynamo.reset()
    module, x = shaken(MODULES[name](16)), torch.randn(4, 16, 5, 6).relu()
    grads = []
    for run in (copy.deepcopy(module), torch.compile(copy.deepcopy(module), fullgraph=True)):
        run(x).square().sum().backward()
        grads.append([p.grad for p in run.parameters()])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_exports_with_its_keys_unchanged() -> None:
    model, x = awake(build_model(tiny(*(f"{name}@stage3" for name in MODULES)))), photos()
    exported = torch.export.export(model, (x,))
    assert set(exported.state_dict) == set(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.slow
def test_onnx_runtime_agrees_with_all_fifteen(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = awake(build_model(tiny(*(f"{name}@stage3" for name in MODULES)))), photos(2)
    torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=True, opset_version=20, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(scores, model(x).numpy(), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- settings and runs


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("se@4", ("se@4",)),
        ("se@4, cbam@every-block", ("se@4", "cbam@every-block")),
        (["se(reduction=8)@4,gct(eps=1e-5, gamma_init=0)@3", "cbam@1"],
         ("se(reduction=8)@4", "gct(eps=1e-5, gamma_init=0)@3", "cbam@1")),
        ([], ()),
        ("", ()),
    ],
)  # fmt: skip
def test_texts_may_be_repeated_or_separated_by_commas(given: Any, texts: tuple[str, ...]) -> None:
    assert build_config({"model.attention": given}).model.attention == texts


def test_a_setting_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.attention"):
        build_config({"model.attention": 4})


SMALL = {
    "model.arch": "small-cnn", "model.args": {"width": 8}, "pixels.size": 32, "train.epochs": 1, "train.batch_size": 64,
    "train.threads": 1, "train.workers": 1, "train.baseline": False, "evaluate.bootstrap": 20, "optim.ema": 0,
}  # fmt: skip


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGCLS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "planned"),
    [
        (["--attention", "cbam@4,eca@1", "--attention", "se(reduction=8)@every-block"],
         "cbam(reduction=16, kernel_size=7)@stage4, eca(gamma=2.0, b=1.0)@stage1, se(reduction=8)@every-block"),
        (["--attention_name", "DoubleAttention", "--attention_index", "2"], "double(reduction=4)@stage2"),
        ([], None),
    ],
    ids=["new", "old", "none"],
)  # fmt: skip
def test_a_command_line_plans_the_modules(
    words: list[str], planned: str | None, own_folders: None, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [word for key, value in SMALL.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert main(["train", "--dry-run", "--json", *sets, *words]) == 0
    answer = json.loads(capsys.readouterr().out)
    rows = {name: (value, reason) for name, value, reason in answer["rows"]}
    assert rows.get("model.attention") == ((planned, "as asked") if planned else None)
    bare = sum(p.numel() for p in build_model(tiny(num_outputs=10)).parameters())
    assert (answer["parameters"] > bare) == bool(planned)
    resolved = build_config({"model.attention": answer["config"]["model"]["attention"]}).model.attention
    assert ", ".join(resolved) == (planned or "")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--attention", "cbma@4"], "C003", "did you mean 'cbam'"),
        (["--attention", "cbam@7"], "C003", "expected one of stage1"),
        (["--attention_name", "cbam", "--attention_index", "7"], "C003", "expected one of stage1"),
        (["--attention", "cbam@4", "-m", "vit_b_16"], "C004", "torchvision/vit_b_16 takes no attention modules"),
        (["--attention", "cbam@4", "--freeze", "backbone"], "C004", "would keep cbam"),
    ],
)
def test_a_wrong_command_line_is_one_error(
    words: list[str], code: str, said: str, own_folders: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--dry-run", "--init", "scratch", *words]) == 2
    told = capsys.readouterr().err
    assert f"error[{code}]" in told and said in told


def test_a_model_that_starts_from_another_keeps_its_modules_and_may_freeze_them() -> None:
    start = {"arch": "small-cnn", "attention": ["se(reduction=8)@stage4"]}
    kept = tuple(start["attention"])
    assert attention_to_train("small-cnn", (), start, frozen=True) == kept
    assert attention_to_train("small-cnn", ["se(reduction=8)@4"], start, frozen=True) == kept
    assert attention_to_train("torchvision/resnet18", (), start, frozen=False) == ()
    assert attention_to_train("small-cnn", (), {"arch": "small-cnn"}, frozen=True) == ()  # of an older version
    with pytest.raises(ConfigError, match="random start"):
        attention_to_train("small-cnn", [*kept, "eca@1"], start, frozen=True)


@pytest.mark.slow
def test_a_run_trains_a_module_and_its_bundle_gives_the_same_scores(tmp_path: Path, own_folders: None) -> None:
    import imgcls_fast
    from imgcls_fast.core.bundle import read_bundle
    from imgcls_fast.core.run import Run
    from imgcls_fast.engines.torch_runtime import load_model
    from imgcls_fast.training.judging import best_model

    directory = tmp_path / "one"
    imgcls_fast.train(out=str(directory), attention="cbam@4", overrides=SMALL)
    bundle = read_bundle(directory / "bundle")
    assert bundle.arch["attention"] == ["cbam(reduction=16, kernel_size=7)@stage4"]
    model, (trained, _, _), x = load_model(bundle), best_model(Run(directory)), photos(size=32)
    with torch.no_grad():
        assert torch.equal(model(x), trained(x))
    steps = model.backbone.state_dict()["attention.cbam_stage4.stages_3.norm.num_batches_tracked"]
    assert steps > 0, "the module was never called in training"

    again = {key: value for key, value in SMALL.items() if not key.startswith("model.")}
    imgcls_fast.train(out=str(tmp_path / "two"), overrides={**again, "model.init": str(directory)})
    assert read_bundle(tmp_path / "two" / "bundle").arch["attention"] == bundle.arch["attention"]


def test_a_bundle_that_lost_its_module_is_refused(bundle_of: Callable[..., Any]) -> None:
    import dataclasses

    from imgcls_fast.engines.torch_runtime import load_model

    bundle = bundle_of("small-cnn")
    with pytest.raises(ModelError) as caught:
        load_model(dataclasses.replace(bundle, arch={**bundle.arch, "attention": ["se@4"]}))
    assert caught.value.code == "M004"


def test_the_documentation_gives_every_module_with_its_defaults() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "attention.md").read_text("utf-8")
    for name in MODULES:
        full = str(parse_attention(f"{name}@4")).removesuffix("@stage4")
        assert f"`{full}`" in text, full
    for place in PLACES:
        assert place in text
    for family in FAMILIES:
        assert family.name in text
