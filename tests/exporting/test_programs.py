"""torch.export, AOTInductor and TorchScript: compared with torch before they are named, and free of code of ours."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imgcls_fast.core.config_verbs import ExportConfig
from imgcls_fast.core.errors import ConfigError, ExportError, GateFailed
from imgcls_fast.core.exports import find_export, way_of
from imgcls_fast.core.files import read_sealed, write_sealed
from imgcls_fast.core.trust import signed
from imgcls_fast.engines.predictor import Predictor
from imgcls_fast.engines.runtimes import open_engine
from imgcls_fast.engines.torch_runtime import scorer_of
from imgcls_fast.exporting import programs
from imgcls_fast.exporting.programs import PROGRAMS, pickled_payloads, program_of, write_program

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3}


def batches(bundle: Any, pictures: list[np.ndarray], size: int = 16) -> list[np.ndarray]:
    predictor = Predictor(open_engine(bundle))
    x = np.stack([predictor.preprocess(picture) for picture in pictures])
    return [x[first : first + size] for first in range(0, len(x), size)]


def exports_of(bundle: Any) -> Path:
    return Path(bundle.directory.parent / "exports")


# what a user without imgcls-fast does with the file
_ALONE = """
import sys, torch, numpy as np
path, kind, shape = sys.argv[1], sys.argv[2], tuple(map(int, sys.argv[3].split(",")))
model = torch.export.load(path).module() if kind == "pt2" else torch.jit.load(path)
x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
assert not [name for name in sys.modules if name.startswith("imgcls_fast")]
print(model(x).tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["pt2", "torchscript"])
@pytest.mark.parametrize(
    ("arch", "size", "args"),
    [("small-cnn", 32, None), ("timm/vit_tiny_patch16_224", 64, VIT)],
    ids=["small-cnn", "vit"],
)
def test_a_program_gives_the_scores_of_torch_in_a_process_that_knows_nothing_of_us(
    arch: str, size: int, args: dict[str, Any] | None, target: str, bundle_of: Callable[..., Any],
    pictures: list[np.ndarray],
) -> None:  # fmt: skip
    bundle = bundle_of(arch, size=size, args=args, temperature=2.5)
    export = write_program(bundle, exports_of(bundle), batches(bundle, pictures[:20]), way_of(target))
    assert export.meta["comparison"]["images"] == 21  # one is asked a second time, alone
    assert export.meta["comparison"]["max_score_diff"] <= 1e-4
    assert export.meta["effective_precision"] == "fp32"
    assert find_export(exports_of(bundle), bundle, target, "fp32").folder == export.folder
    shape = (5, size, size, 3)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ALONE, str(export.path), target, ",".join(map(str, shape))],
        capture_output=True, text=True, timeout=300, cwd=export.folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = open_engine(bundle).scores(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    np.testing.assert_allclose(json.loads(done.stdout), expected, atol=1e-4)
    assert ("deprecated" in export.meta["note"]) == (target == "torchscript")


@pytest.fixture(scope="module")
def _threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_package_of_aotinductor_runs_with_any_number_of_threads_and_images(
    bundle_of: Callable[..., Any], pictures: list[np.ndarray], _threads: Callable[[int], None]
) -> None:
    bundle = bundle_of()
    parts = batches(bundle, pictures[:20])
    _threads(1)  # code that is written for the threads of the moment would now never use a second one
    export = write_program(bundle, exports_of(bundle), parts, way_of("aoti"))
    engine = open_engine(bundle, "aoti")
    assert (engine.runtime, engine.precision) == ("aoti", "fp32")
    expected = open_engine(bundle).scores(parts[0])
    for threads in (1, 2):
        _threads(threads)
        for n in (1, 7, 16):
            np.testing.assert_allclose(engine.scores(parts[0][:n]), expected[:n], atol=1e-4)
    bound = engine.bind(3)  # type: ignore[attr-defined]
    bound.input.copy_(torch.from_numpy(parts[0][:3]))
    bound.replay()
    bound.wait()
    np.testing.assert_allclose(bound.output.numpy(), expected[:3], atol=1e-4)
    engine.close()

    before = export.path.stat().st_mtime_ns
    assert write_program(bundle, exports_of(bundle), parts, way_of("aoti")).path.stat().st_mtime_ns == before  # nothing is made twice

    meta = read_sealed(export.folder / "meta.json")
    meta["host"]["instructions"].append("avx9000")
    write_sealed(export.folder / "meta.json", signed(meta))  # this user's own, from another machine
    with pytest.raises(ExportError) as foreign:
        open_engine(bundle, "aoti")
    assert (foreign.value.code, "avx9000" in foreign.value.message) == ("E005", True)
    content = bytearray(export.path.read_bytes())
    content[len(content) // 2] ^= 1
    export.path.write_bytes(bytes(content))
    with pytest.raises(ExportError) as damaged:
        open_engine(bundle, "aoti")
    assert (damaged.value.code, "--aoti" in damaged.value.try_) == ("E001", True)


@pytest.mark.parametrize("target", ["pt2", "torchscript"])
def test_a_fixed_batch_and_half_precision_are_kept_to(
    target: str, bundle_of: Callable[..., Any], pictures: list[np.ndarray]
) -> None:
    bundle = bundle_of()
    settings = ExportConfig(batch=4)  # type: ignore[call-arg]
    parts = batches(bundle, pictures[:10])
    export = write_program(bundle, exports_of(bundle), parts, way_of(target, "bf16"), settings=settings)
    assert (export.meta["batch"], export.meta["input"]["shape"][0]) == (4, 4)
    assert (export.meta["effective_precision"], export.meta["precision"]) == ("bf16", "bf16")
    assert export.meta["comparison"]["images"] == 10  # in batches of 4, the last one padded
    assert "CPU" in export.meta["note"]
    assert export.folder.name.startswith(f"{target}-bf16-")


@pytest.mark.parametrize("target", ["pt2", "torchscript"])
def test_a_program_that_disagrees_is_refused_and_nothing_is_left(
    target: str, bundle_of: Callable[..., Any], pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of()

    def wrong(*arguments: Any) -> Any:
        scorer = scorer_of(*arguments)
        scorer.temperature = tuple(1.5 * heat for heat in scorer.temperature)
        return scorer

    monkeypatch.setattr(programs, "scorer_of", wrong)
    with pytest.raises(GateFailed) as refused:
        write_program(bundle, exports_of(bundle), batches(bundle, pictures[:8]), way_of(target))
    assert (refused.value.code, refused.value.exit_code) == ("E901", 5)
    assert list(exports_of(bundle).iterdir()) == []


@pytest.mark.parametrize("target", list(PROGRAMS))
def test_a_network_that_cannot_be_exported_is_e001_and_nothing_is_left(
    target: str, bundle_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("data-dependent control flow\nand twenty more lines")

    monkeypatch.setattr(torch.export, "export", fail)
    monkeypatch.setattr(torch.jit, "trace", fail)
    bundle = bundle_of()
    with pytest.raises(ExportError, match="data-dependent control flow") as refused:
        write_program(bundle, exports_of(bundle), [], way_of(target))
    assert refused.value.code == "E001"
    assert "\n" not in refused.value.message
    assert list(exports_of(bundle).iterdir()) == []


def test_a_trace_that_took_the_batch_size_for_a_constant_is_e001(
    bundle_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fixed(nn.Module):
        def __init__(self, scorer: Any) -> None:
            super().__init__()
            self.inner = scorer

        def forward(self, pixels: Tensor) -> Tensor:
            return self.inner(pixels) + torch.zeros(int(pixels.shape[0]), 1)

    monkeypatch.setattr(programs, "scorer_of", lambda *arguments: Fixed(scorer_of(*arguments)).eval())
    bundle = bundle_of()
    with pytest.raises(ExportError, match="does not run with") as refused:
        write_program(bundle, exports_of(bundle), [np.zeros((5, 32, 32, 3), np.uint8)], way_of("torchscript"))
    assert (refused.value.code, "--batch" in refused.value.try_) == ("E001", True)
    assert list(exports_of(bundle).iterdir()) == []


def test_without_images_nothing_is_exported(bundle_of: Callable[..., Any]) -> None:
    bundle = bundle_of()
    with pytest.raises(ExportError, match="no images"):
        write_program(bundle, exports_of(bundle), [], way_of("pt2"))
    assert list(exports_of(bundle).iterdir()) == []


@pytest.mark.parametrize(("precision", "code"), [("int8", "C004"), ("fp61", "C003")])
def test_another_precision_is_refused_at_once(precision: str, code: str, bundle_of: Callable[..., Any]) -> None:
    bundle = bundle_of()
    with pytest.raises(ConfigError) as refused:
        write_program(bundle, exports_of(bundle), [], way_of("pt2", precision))
    assert refused.value.code == code
    assert not exports_of(bundle).exists()


def test_an_operator_that_is_not_pytorchs_own_is_e001(bundle_of: Callable[..., Any]) -> None:
    @torch.library.custom_op("imgcls_test_programs::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)

    class Odd(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return twice(pixels.float().mean((1, 2)))

    odd: Any = Odd()
    with pytest.raises(ExportError, match="imgcls_test_programs") as refused:
        program_of(odd, bundle_of(), None)
    assert refused.value.code == "E001"


def test_pickled_tensors_in_an_archive_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for kind, pickled in (("weights", False), ("constants", True)):
            config = {"config": {f"{kind}.0": {"path_name": "x", "use_pickle": pickled}}}
            archive.writestr(f"model/data/{kind}/model_{kind}_config.json", json.dumps(config))
    assert pickled_payloads(path) == ["constants.0"]


def test_our_pt2_files_say_how_their_tensors_are_stored(bundle_of: Callable[..., Any]) -> None:
    """Else `pickled_payloads` would look in the wrong place and find nothing."""
    bundle = bundle_of()
    path = bundle.directory.parent / "model.pt2"
    torch.export.save(program_of(scorer_of(bundle), bundle, None), path)
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("weights_config.json")]
        stored = [json.loads(archive.read(name))["config"] for name in names]
    assert sum(len(config) for config in stored) >= 5
    assert all("use_pickle" in payload for config in stored for payload in config.values())
    assert pickled_payloads(path) == []
