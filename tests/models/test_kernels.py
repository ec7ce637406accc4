"""The swap test: whole models of timm and torchvision give the same results with our attention kernels."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imgcls_fast.core.errors import ConfigError
from imgcls_fast.models.build import ModelSpec, build_model
from imgcls_fast.models.kernels import use_kernels
from imgcls_fast.models.map_attention import CBAM

#         name, side, number of attention modules
MODELS = [
    ("timm/swin_tiny_patch4_window7_224", 224, 12),
    ("timm/swinv2_tiny_window8_256", 256, 12),
    ("timm/vit_small_patch16_224", 224, 12),
    ("timm/deit_small_patch16_224", 224, 12),
    ("timm/beit_base_patch16_224", 224, 12),
    ("timm/maxvit_tiny_tf_224", 224, 22),
]
MORE_MODELS = [
    ("torchvision/swin_t", 224, 12),
    ("torchvision/swin_v2_t", 256, 12),
    ("torchvision/vit_b_32", 224, 12),
    ("torchvision/maxvit_t", 224, 22),
]


def build(name: str, side: int | None = None, **arguments: Any) -> nn.Module:
    """A model in eval mode whose constant parameters (zero tables, biases and scales would hide faults) are random."""
    import timm
    import torchvision

    torch.manual_seed(0)
    library, _, arch = name.partition("/")
    if library == "timm":
        network = timm.create_model(arch, num_classes=10, **arguments)
    else:
        network = getattr(torchvision.models, arch)(num_classes=10, **arguments)
    return randomised(network).eval()


@torch.no_grad()
def randomised(network: nn.Module) -> nn.Module:
    for key, parameter in network.named_parameters():
        if "table" in key or "logit_scale" in key:
            parameter.add_(0.5 * torch.randn_like(parameter))
        elif float(parameter.max() - parameter.min()) == 0:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def pair(name: str, **arguments: Any) -> tuple[nn.Module, nn.Module, int]:
    plain = build(name, **arguments)
    ours = copy.deepcopy(plain)
    count = use_kernels(ours, "on")
    return plain, ours, count


def outputs_and_gradients(
    network: nn.Module, pixels: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor]]:
    """The last hidden features (or logits), and every parameter's gradient under a random projection."""
    network.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = network.forward_features(pixels) if hasattr(network, "forward_features") else network(pixels)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out.float() * direction).sum().backward()
    return out.detach().float(), [p.grad for p in network.parameters() if p.grad is not None]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def whole(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "modules"), MODELS + MORE_MODELS, ids=[m[0] for m in MODELS + MORE_MODELS])
def test_swapped_models_give_the_same_outputs_and_gradients(name: str, side: int, modules: int) -> None:
    plain, ours, count = pair(name)
    assert count == modules
    assert list(ours.state_dict()) == list(plain.state_dict())
    pixels = torch.randn(1, 3, side, side)
    out, gradients = outputs_and_gradients(plain, pixels)
    found, own = outputs_and_gradients(ours, pixels)
    assert error(found, out) <= 5e-6
    assert len(own) == len(gradients) > 50
    # torchvision's sums over a dense bias differ from themselves by 1e-5 when the order of windows changes
    gate = 1e-5 if name.startswith("timm") else 3e-5
    worst = max(error(a, b) for a, b in zip(own, gradients, strict=True))
    assert worst <= gate, f"{worst:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "side", "modules"), MODELS, ids=[m[0] for m in MODELS])
def test_half_precision_errs_no_more_than_the_original(name: str, side: int, modules: int, dtype: torch.dtype) -> None:
    plain, ours, _ = pair(name)
    pixels = torch.randn(1, 3, side, side)
    truth, true_gradients = outputs_and_gradients(plain, pixels)
    true_gradients = [g.clone() for g in true_gradients]
    out, gradients = outputs_and_gradients(plain, pixels, dtype)
    found, own = outputs_and_gradients(ours, pixels, dtype)
    assert error(found, truth) <= 1.2 * error(out, truth)
    assert error(whole(own), whole(true_gradients)) <= 1.2 * error(whole(gradients), whole(true_gradients))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "arguments"),
    [
        (
            "timm/swin_tiny_patch4_window7_224",
            (160, 192),
            {"img_size": (160, 192), "depths": (2, 2), "always_partition": True},
        ),
        ("torchvision/swin_t", (160, 192), {}),
        ("timm/swin_tiny_patch4_window7_224", (224, 224), {"window_size": 12, "depths": (2, 2)}),
        ("timm/swinv2_tiny_window8_256", (192, 192), {"img_size": 192, "depths": (2, 2), "always_partition": True}),
    ],
    ids=str,
)
def test_images_that_windows_do_not_divide(name: str, side: tuple[int, int], arguments: dict[str, Any]) -> None:
    plain, ours, _ = pair(name, **arguments)
    pixels = torch.randn(2, 3, *side)
    out, gradients = outputs_and_gradients(plain, pixels)
    found, own = outputs_and_gradients(ours, pixels)
    assert error(found, out) <= 5e-6
    assert max(error(a, b) for a, b in zip(own, gradients, strict=True)) <= 3e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "attention", "modules"),
    [
        ("timm/resnet50", "cbam@every-block", 16),
        ("torchvision/resnet50", "cbam@stage2,cbam@stage4", 2),
        ("timm/convnext_tiny", "cbam@stage4", 1),
        ("torchvision/convnext_tiny", "cbam@every-block", 18),
    ],
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_networks_with_cbam_give_the_same_outputs_and_gradients(
    arch: str, attention: str, modules: int, training: bool
) -> None:
    torch.manual_seed(0)
    spec = ModelSpec(arch, num_outputs=10, image_size=64, attention=tuple(attention.split(",")), drop_path=0.0)
    plain = randomised(build_model(spec)).eval()  # ResNets begin with branches that are zero, and CBAM of zero is zero
    for module in plain.modules():  # the norm inside CBAM couples the images of a batch in training
        if isinstance(module, CBAM):
            module.train(training)
    assert use_kernels(plain, "off") == 0
    ours, double = copy.deepcopy(plain), copy.deepcopy(plain).double()
    assert use_kernels(ours, "on") == modules
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    out, gradients = outputs_and_gradients(plain, pixels)
    found, own = outputs_and_gradients(ours, pixels)
    assert len(own) == len(gradients)
    assert error(found, out) <= 5e-6
    if error(whole(own), whole(gradients)) > 1e-5:  # two nearly equal maxima: in float32 either may win
        _, exact = outputs_and_gradients(double, pixels)
        assert error(whole(own), whole(exact)) <= max(1e-5, 1.25 * error(whole(gradients), whole(exact)))
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):  # running statistics of the norms
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("arch", "attention"), [("timm/resnet50", "cbam@every-block"), ("torchvision/convnext_tiny", "cbam@stage4")]
)
def test_networks_with_cbam_err_no_more_than_the_formula(arch: str, attention: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = randomised(build_model(ModelSpec(arch, num_outputs=10, image_size=64, attention=(attention,)))).eval()
    use_kernels(plain, "off")
    ours = copy.deepcopy(plain)
    use_kernels(ours, "on")
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    truth, true_gradients = outputs_and_gradients(plain, pixels)
    true_gradients = [g.clone() for g in true_gradients]
    out, gradients = outputs_and_gradients(plain, pixels, dtype)
    found, own = outputs_and_gradients(ours, pixels, dtype)
    assert error(found, truth) <= 1.2 * error(out, truth)
    assert error(whole(own), whole(true_gradients)) <= 1.2 * error(whole(gradients), whole(true_gradients))


def test_modules_and_the_switch_are_part_of_the_python_api() -> None:
    import imgcls_fast as ic

    assert ic.use_kernels is use_kernels
    module = ic.attention.CBAM(64)
    x = torch.randn(2, 64, 5, 6).contiguous(memory_format=torch.channels_last)
    assert ic.use_kernels(module, "on") == 1
    assert module(x).shape == x.shape


_RANK = """
import sys, timm, torch
from safetensors.torch import load_file, save_file
from imgcls_fast.models.kernels import use_kernels

rank, folder, arguments = int(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **arguments).eval()
network.load_state_dict(load_file(f"{folder}/weights.safetensors"))
assert use_kernels(network, "on") == 4
pixels = load_file(f"{folder}/pixels.safetensors")["pixels"]
parallel = torch.nn.parallel.DistributedDataParallel(network)
parallel(pixels[rank::2]).square().mean().backward()
if rank == 0:
    save_file({key: p.grad for key, p in network.named_parameters()}, f"{folder}/gradients.safetensors")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_one(small: nn.Module, tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    pixels = torch.randn(4, 3, 56, 56)
    save_file(small.state_dict(), tmp_path / "weights.safetensors")
    save_file({"pixels": pixels}, tmp_path / "pixels.safetensors")
    words = [sys.executable, "-c", _RANK]
    ranks = [subprocess.Popen([*words, str(rank), str(tmp_path), repr(SMALL)]) for rank in (0, 1)]
    assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    found = load_file(tmp_path / "gradients.safetensors")
    small(pixels).square().mean().backward()
    for key, parameter in small.named_parameters():
        assert error(found[key], parameter.grad) <= 1e-5, key


SMALL = {"img_size": 56, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4), "window_size": 7}


@pytest.fixture
def small() -> nn.Module:
    return build("timm/swin_tiny_patch4_window7_224", **SMALL)


def test_modes_can_be_changed_and_taken_back(small: nn.Module) -> None:
    classes = [type(m) for m in small.modules()]
    identities = {key: id(p) for key, p in small.named_parameters()}
    for mode, count in (("proven", 4), ("on", 4), ("proven", 4), ("off", 0)):
        assert use_kernels(small, mode) == count  # type: ignore[arg-type]
        assert {key: id(p) for key, p in small.named_parameters()} == identities
    assert [type(m) for m in small.modules()] == classes
    assert use_kernels(nn.Sequential(nn.Linear(3, 3)), "on") == 0


def test_on_refuses_what_no_kernel_does_and_proven_goes_on_without(small: nn.Module) -> None:
    pixels = torch.randn(1, 3, 56, 56)
    small.double()
    use_kernels(small, "on")
    with pytest.raises(ConfigError, match="float64 has no kernel") as caught:
        small(pixels.double())
    assert caught.value.code == "C004"
    use_kernels(small, "proven")
    expected = small(pixels.double())
    use_kernels(small, "off")
    assert torch.equal(small(pixels.double()), expected)


def test_attention_dropout_stays_with_the_library() -> None:
    network = build("timm/swin_tiny_patch4_window7_224", **SMALL, attn_drop_rate=0.5).train()
    use_kernels(network, "on")
    with pytest.raises(ConfigError, match="drops attention weights"):
        network(torch.randn(1, 3, 56, 56))
    network.eval()(torch.randn(1, 3, 56, 56))


def test_the_swap_survives_copies_and_leaves_state_dicts_alone(small: nn.Module, tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file

    pixels = torch.randn(1, 3, 56, 56)
    expected = small(pixels)
    use_kernels(small, "on")
    twin = copy.deepcopy(small)
    torch.testing.assert_close(twin(pixels), expected, rtol=1e-5, atol=1e-5)
    save_file(twin.state_dict(), tmp_path / "w.safetensors")
    fresh = build("timm/swin_tiny_patch4_window7_224", **SMALL)
    fresh.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert torch.equal(fresh(pixels), expected)


@pytest.mark.slow
def test_compiled_and_exported_models(small: nn.Module) -> None:
    pixels = torch.randn(2, 3, 56, 56)
    expected = small(pixels)
    use_kernels(small, "on")
    torch._dynamo.reset()
    compiled = torch.compile(small, fullgraph=True)
    torch.testing.assert_close(compiled(pixels), expected, rtol=1e-5, atol=1e-5)
    compiled(pixels).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    program = torch.export.export(small, (pixels,))
    assert not [node for node in program.graph.nodes if "imgcls" in str(node.target)]
    torch.testing.assert_close(program.module()(pixels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_onnx_file_of_a_swapped_model_holds_standard_operators_and_agrees(small: nn.Module, tmp_path: Any) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pixels = torch.randn(2, 3, 56, 56)
    expected = small(pixels).detach()
    use_kernels(small, "on")
    path = str(tmp_path / "swin.onnx")
    torch.onnx.export(small, (pixels,), path, dynamo=True, external_data=False, verbose=False)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
