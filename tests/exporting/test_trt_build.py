"""Building TensorRT plans, with doubles that are as strict as the declared API; on a GPU, building them really."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from imgcls_fast.core.config_verbs import ExportConfig
from imgcls_fast.core.env import install_hint
from imgcls_fast.core.errors import ConfigError, ExportError, HardwareError, Interrupted
from imgcls_fast.core.files import sha256_file
from imgcls_fast.engines import trt_plan
from imgcls_fast.exporting.trt_engine import (
    TrtOptions,
    build_plan,
    check_onnx,
    refit_plan,
    require_builder,
    timing_cache_path,
    trtexec_line,
)  # fmt: skip
from imgcls_fast.exporting.trt_reports import Progress, interruptible, layer_of, summarise


def _doubles() -> ModuleType:
    name = "trt_doubles"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "trt" / "doubles.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


doubles = _doubles()
OPTIONS = TrtOptions(batches=(1, 4, 8))


@pytest.fixture(params=["10.13.3.9", "11.4.0.106"])
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made = doubles.World(version=request.param)
    with doubles.installed(made, monkeypatch):
        yield made


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    path: Path = doubles.tiny_onnx(tmp_path / "model.onnx")
    return path


def refused(onnx: Path, options: TrtOptions = OPTIONS, **given: Any) -> ExportError:
    plan = onnx.with_name("model.plan")
    with pytest.raises(ExportError) as caught:
        build_plan(onnx, plan, options, **given)
    assert caught.value.code == "E004"
    assert not plan.exists()
    return caught.value


# ---------------------------------------------------------------- a build that succeeds


def test_the_network_is_strongly_typed_in_both_numberings_and_no_flag_asks_for_a_precision(
    world: Any, onnx: Path
) -> None:
    build_plan(onnx, onnx.with_name("model.plan"), OPTIONS)
    assert world.network_flags == (2 if world.version.startswith("10") else 1)
    assert world.config["_flags"] == set()  # TF32, which is on by default, was cleared
    assert "parser.NATIVE_INSTANCENORM" in world.calls


def test_options_reach_the_builder(world: Any, onnx: Path) -> None:
    options = TrtOptions(5, 2.5, "ampere+", refit=True, batches=(2, 4, 16))
    facts = build_plan(onnx, onnx.with_name("model.plan"), options)
    config = world.config
    assert config["builder_optimization_level"] == 5
    assert config["_workspace"] == int(2.5 * 2**30)
    assert config["_flags"] == {"REFIT"}
    assert repr(config["hardware_compatibility_level"]) == "HardwareCompatibilityLevel.AMPERE_PLUS"
    assert repr(config["profiling_verbosity"]) == "ProfilingVerbosity.DETAILED"
    assert world.profile == (("pixels", (2, 4, 4, 3), (4, 4, 4, 3), (16, 4, 4, 3)),)
    assert (facts["level"], facts["hardware"], facts["refit"], facts["refittable"]) == (5, "ampere+", True, True)
    assert world.config["host_code"] is False


def test_a_plan_for_several_versions_carries_its_lean_runtime_and_may_run_it(world: Any, onnx: Path) -> None:
    facts = build_plan(onnx, onnx.with_name("model.plan"), TrtOptions(version_compatible=True))
    assert world.config["_flags"] == {"VERSION_COMPATIBLE"}  # and not EXCLUDE_LEAN_RUNTIME
    assert world.config["host_code"] is True and facts["version_compatible"] is True


def test_facts_say_what_the_plan_is_tied_to_and_what_became_of_its_layers(world: Any, onnx: Path) -> None:
    plan = onnx.with_name("model.plan")
    facts = build_plan(onnx, plan, OPTIONS)
    assert facts["tensorrt"] == world.version
    assert (facts["gpu"], facts["compute_capability"], facts["driver"]) == (world.gpu, [9, 0], "580.65.06")
    assert facts["sha256"] == sha256_file(plan) and facts["bytes"] == plan.stat().st_size
    assert facts["onnx_sha256"] == sha256_file(onnx)
    assert facts["profile"] == {"min": [1, 4, 4, 3], "opt": [4, 4, 4, 3], "max": [8, 4, 4, 3]}
    assert facts["input"] == {"name": "pixels", "dtype": "uint8", "shape": ["batch", 4, 4, 3]}
    assert facts["layers"] == {"count": 1, "by_type": {"CaskConvolution": 1}, "by_precision": {"fp16": 1}}
    assert facts["effective_precision"] == "fp16" and facts["tf32"] is False
    json.dumps(facts)  # goes into meta.json as it is


def test_a_fixed_batch_needs_no_profile_and_wins_over_the_options(world: Any, tmp_path: Path) -> None:
    onnx = doubles.tiny_onnx(tmp_path / "fixed.onnx", batch=5)
    facts = build_plan(onnx, tmp_path / "fixed.plan", OPTIONS)
    assert world.profile == ()
    assert facts["profile"]["min"] == facts["profile"]["max"] == [5, 4, 4, 3]
    assert facts["input"]["shape"] == [5, 4, 4, 3]


def test_progress_rises_to_the_end_over_phases_inside_each_other(world: Any, onnx: Path) -> None:
    told: list[tuple[str, float]] = []
    build_plan(onnx, onnx.with_name("model.plan"), OPTIONS, progress=lambda *seen: told.append(seen))
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions) and fractions[0] == 0.0 and fractions[-1] == 1.0
    assert {name for name, _ in told} == {"Building", "Tactics"}
    assert len(set(fractions)) > 4  # the inner phase moves the outer one


# ---------------------------------------------------------------- every way to fail


def test_errors_of_the_parser_name_node_operator_and_reason(world: Any, onnx: Path) -> None:
    world.parser_errors = [
        (n, f"/head/Op{n}", "GridSample", f"In node {n}: no importer\n registered") for n in range(5)
    ]
    message = refused(onnx).message
    assert "node /head/Op0 (GridSample): In node 0: no importer registered" in message
    assert "/head/Op2" in message and "/head/Op3" not in message and "and 2 more" in message


def test_a_parser_that_fails_without_an_error_still_says_which_file(world: Any, onnx: Path) -> None:
    world.refuse = {"parse_from_file"}
    assert str(onnx) in refused(onnx).message


def test_a_nameless_node_is_told_by_its_number(world: Any, onnx: Path) -> None:
    world.parser_errors = [(7, "", "NonZero", "data dependent"), (-1, "", "", "Failed to parse ONNX model from file")]
    assert "node number 7 (NonZero): data dependent; Failed to parse" in refused(onnx).message


def test_a_build_without_a_plan_names_the_layer(world: Any, onnx: Path) -> None:
    world.build_errors = [
        ("INTERNAL_ERROR", "Could not find any implementation for node {ForeignNode[/blocks.0/norm...]}.")
    ]
    world.build_errors = [("UNSPECIFIED_ERROR", text) for _, text in world.build_errors]
    error = refused(onnx)
    assert "layer {ForeignNode[/blocks.0/norm...]}" in error.message
    assert error.why.count("Could not find any implementation") == 1  # recorder and logger told the same
    assert error.try_ == "imgcls-fast export --trt --set export.trt_workspace_gb=8"


def test_a_build_that_gives_none_without_a_word_is_an_error(world: Any, onnx: Path) -> None:
    world.refuse = {"build_serialized_network"}
    assert refused(onnx).why == "it gave no reason"


@pytest.mark.parametrize(
    "error",
    [("FAILED_ALLOCATION", "Requested size was 9 GiB"), ("UNSPECIFIED_ERROR", "Cuda Runtime (out of memory)")],
    ids=str,
)
def test_too_little_gpu_memory_is_h002(world: Any, onnx: Path, error: tuple[str, str]) -> None:
    world.build_errors = [error]
    with pytest.raises(HardwareError) as caught:
        build_plan(onnx, onnx.with_name("model.plan"), OPTIONS)
    assert caught.value.code == "H002" and caught.value.try_ == "imgcls-fast export --trt --max-batch 4"


def test_a_refused_profile_and_a_plan_that_does_not_load_are_errors(world: Any, onnx: Path) -> None:
    world.refuse = {"add_optimization_profile"}
    assert "(1, 4, 8)" in refused(onnx).message
    world.refuse = {"deserialize_cuda_engine"}
    assert "cannot load" in refused(onnx).message


@pytest.mark.parametrize("call", ["create_execution_context", "create_engine_inspector", "set_input_shape"])
def test_an_inspector_that_fails_costs_only_what_it_would_have_told(world: Any, onnx: Path, call: str) -> None:
    world.refuse = {call}
    facts = build_plan(onnx, onnx.with_name("model.plan"), OPTIONS)
    assert facts["layers"]["count"] == 0 and facts["effective_precision"] == ""


def test_a_graph_with_other_tensors_is_refused(world: Any, tmp_path: Path) -> None:
    import onnx

    path = doubles.tiny_onnx(tmp_path / "model.onnx")
    model = onnx.load(str(path))
    model.graph.input[0].name = model.graph.node[0].input[0] = "image"
    onnx.save(model, str(path))
    assert "'image'" in refused(path).message
    floats = doubles.tiny_onnx(tmp_path / "floats.onnx", dtype="float32")
    assert "uint8 pixels" in refused(floats).message


def test_a_tensorrt_that_cannot_start_is_h001_with_its_own_words(world: Any, onnx: Path) -> None:
    world.starts = False
    with pytest.raises(HardwareError) as caught:
        build_plan(onnx, onnx.with_name("model.plan"), OPTIONS)
    assert caught.value.code == "H001" and "CUDA initialization failure with error: 35" in caught.value.message


def test_an_engine_for_ampere_is_not_begun_on_an_older_gpu(world: Any, onnx: Path) -> None:
    world.gpu, world.capability = "Tesla T4", (7, 5)
    assert "Tesla T4" in refused(onnx, TrtOptions(hardware="ampere+")).message
    assert "parse_from_file" not in world.calls


def test_a_full_disk_is_h003_and_leaves_nothing(world: Any, onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HardwareError) as caught:
        build_plan(onnx, onnx.with_name("model.plan"), OPTIONS)
    assert caught.value.code == "H003"
    assert [path.name for path in onnx.parent.iterdir()] == ["model.onnx"]


def test_later_builds_hear_their_own_errors_although_tensorrt_keeps_the_first_logger(world: Any, onnx: Path) -> None:
    build_plan(onnx, onnx.with_name("first.plan"), OPTIONS)
    first = world.first_logger
    world.refuse = {"deserialize_cuda_engine"}
    assert "magicTag mismatch" in refused(onnx).why
    assert world.logger is first


# ---------------------------------------------------------------- stopping


def test_should_stop_ends_the_build_and_is_told_as_interrupted(world: Any, onnx: Path) -> None:
    plan, steps = onnx.with_name("model.plan"), iter([False, False, False, True])
    with pytest.raises(Interrupted) as caught:
        build_plan(onnx, plan, OPTIONS, should_stop=lambda: next(steps))
    assert caught.value.code == "X130" and not plan.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("a fault of ours")], ids=repr)
def test_what_the_callback_raises_passes_tensorrt_by_and_is_raised(
    world: Any, onnx: Path, error: BaseException
) -> None:
    def progress(name: str, fraction: float) -> None:
        if fraction > 0:
            raise error

    with pytest.raises(type(error)) as caught:
        build_plan(onnx, onnx.with_name("model.plan"), OPTIONS, progress=progress)
    assert caught.value is error
    assert not onnx.with_name("model.plan").exists()


def test_a_signal_stops_a_build_whose_steps_are_told_from_another_thread(world: Any, onnx: Path) -> None:
    world.endless, world.during = True, lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_plan(onnx, onnx.with_name("model.plan"), OPTIONS)
    assert not onnx.with_name("model.plan").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tensorrt")]


def test_a_signal_at_any_moment_stops_the_work_and_no_thread_is_left() -> None:
    former = signal.getsignal(signal.SIGINT)
    for after_s in [
        index * 2e-6 for index in range(300)
    ]:  # from inside the thread's start until the work is waited for
        progress = Progress(None, None)

        def work(progress: Progress = progress, after_s: float = after_s) -> None:
            end = time.perf_counter() + after_s
            while time.perf_counter() < end:
                pass
            os.kill(os.getpid(), signal.SIGINT)
            while progress.step("tactics", 0):
                time.sleep(0.001)

        with pytest.raises(KeyboardInterrupt):
            interruptible(work, progress)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("tensorrt")]
    assert signal.getsignal(signal.SIGINT) is former


def test_after_a_failure_no_callback_is_asked_again() -> None:
    asked: list[str] = []

    def told(name: str, fraction: float) -> None:
        asked.append(name)
        raise KeyboardInterrupt

    progress = Progress(told, None)
    progress.start("a", None, 3)
    assert progress.step("a", 0) is False and progress.step("a", 1) is False
    progress.finish("a")
    assert asked == ["a"]
    with pytest.raises(KeyboardInterrupt):
        progress.demand_done()


def test_a_phase_with_no_parent_begins_a_new_count_and_unknown_steps_are_harmless() -> None:
    told: list[float] = []
    progress = Progress(lambda name, fraction: told.append(fraction), None)
    for root in ("first", "second"):
        progress.start(root, None, 2)
        progress.step("unknown", 9)
        progress.step(root, 0)
        progress.step(root, 1)
        progress.finish(root)
    assert told == [0.0, 0.0, 0.5, 1.0] * 2


# ---------------------------------------------------------------- timings


def test_timings_are_kept_and_read_again(world: Any, onnx: Path) -> None:
    cache = onnx.parent / "cache" / "gpu.timings"
    options = TrtOptions(batches=(1, 4, 8), timing_cache=cache)
    assert build_plan(onnx, onnx.with_name("a.plan"), options)["timing_cache"] == "new"
    assert cache.read_bytes() == b"TIMINGS:1"
    assert build_plan(onnx, onnx.with_name("a.plan"), options)["timing_cache"] == "read"
    assert sorted(path.name for path in cache.parent.iterdir()) == ["gpu.timings"]


@pytest.mark.parametrize("content", [b"\x00garbage", b"TIMINGS:foreign"])
def test_a_damaged_or_foreign_cache_is_begun_anew_and_never_kills_a_build(
    world: Any, onnx: Path, content: bytes
) -> None:
    cache = onnx.with_name("gpu.timings")
    cache.write_bytes(content)
    facts = build_plan(onnx, onnx.with_name("a.plan"), TrtOptions(batches=(1, 4, 8), timing_cache=cache))
    assert facts["timing_cache"] == "damaged" and cache.read_bytes() == b"TIMINGS:1"
    cache.write_bytes(content)
    world.build_errors = [("UNSPECIFIED_ERROR", "no tactic")]
    assert "timing cache" not in refused(onnx, TrtOptions(batches=(1, 4, 8), timing_cache=cache)).why


def test_a_cache_that_cannot_be_used_or_written_costs_only_time(world: Any, onnx: Path) -> None:
    blocked = onnx.with_name("file") / "gpu.timings"
    blocked.parent.write_text("no folder")
    facts = build_plan(onnx, onnx.with_name("a.plan"), TrtOptions(batches=(1, 4, 8), timing_cache=blocked))
    assert facts["timing_cache"].startswith("new, not written")
    world.refuse = {"set_timing_cache"}
    facts = build_plan(onnx, onnx.with_name("a.plan"), TrtOptions(batches=(1, 4, 8), timing_cache=onnx.with_name("t")))
    assert facts["timing_cache"] == "unused" and not onnx.with_name("t").exists()


def test_the_cache_of_each_version_and_gpu_is_a_file_of_its_own(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path))
    first = timing_cache_path()
    world.gpu = "NVIDIA L4"
    assert first.parent == tmp_path / "tensorrt" and first != timing_cache_path()


# ---------------------------------------------------------------- the file, before TensorRT reads it


@pytest.mark.parametrize(
    ("location", "said"),
    [("../secret.bin", "outside its folder"), ("/etc/hostname", "outside its folder"), ("link.bin", "outside its folder"),
     ("absent.bin", "not there")],
)  # fmt: skip
@pytest.mark.parametrize("hidden", ["initializer", "attribute"])
def test_weights_outside_the_folder_are_refused_before_anything_opens_them(
    world: Any, onnx: Path, location: str, said: str, hidden: str
) -> None:
    import onnx as library

    (onnx.parent.parent / "secret.bin").write_bytes(b"x" * 64)
    (onnx.parent / "link.bin").symlink_to(onnx.parent.parent / "secret.bin")
    model = library.load(str(onnx))
    tensor = library.TensorProto(name="w", data_type=1, dims=[1], data_location=library.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    if hidden == "initializer":
        model.graph.initializer.append(tensor)
    else:
        branch = library.helper.make_graph([], "branch", [], [], [tensor])
        model.graph.node[0].attribute.append(library.helper.make_attribute("then_branch", branch))
    onnx.write_bytes(model.SerializeToString())
    message = refused(onnx).message
    assert location in message and said in message
    assert "parse_from_file" not in world.calls


def test_weights_beside_the_file_are_read(onnx: Path) -> None:
    import onnx as library

    model = library.load(str(onnx))
    library.save(model, str(onnx), save_as_external_data=True, location="weights.bin", size_threshold=0)
    check_onnx(onnx)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xff\xff not ONNX"])
def test_a_file_that_is_no_onnx_is_refused(world: Any, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refused(path).message


# ---------------------------------------------------------------- where TensorRT or a GPU is missing


def test_without_a_gpu_the_error_names_the_file_left_behind_and_the_command_for_elsewhere(
    world: Any, onnx: Path
) -> None:
    world.gpus = 0
    with pytest.raises(HardwareError) as caught:
        require_builder(onnx, Path("model.plan"), OPTIONS)
    error = caught.value
    assert error.code == "H001" and error.exit_code == 4
    assert str(onnx) in error.where and f"trtexec --onnx={onnx}" in error.why


def test_an_old_tensorrt_is_told_with_the_pip_line(world: Any, onnx: Path) -> None:
    sys.modules["tensorrt"].__version__ = "10.9.0.34"  # type: ignore[attr-defined]
    with pytest.raises(HardwareError, match=r"TensorRT is 10\.9\.0\.34, and 10\.13 or later is needed") as caught:
        build_plan(onnx, onnx.with_name("model.plan"), OPTIONS)
    assert caught.value.code == "H004" and caught.value.try_ == install_hint("trt")


@pytest.mark.parametrize(
    ("error", "said"),
    [(ModuleNotFoundError("No module named 'tensorrt'"), "TensorRT is not installed, and"),
     (ImportError("libnvinfer.so.10: cannot open shared object file"), "cannot be loaded: libnvinfer.so.10")],
    ids=["absent", "without its libraries"],
)  # fmt: skip
def test_a_missing_tensorrt_is_h004_and_names_what_was_left(
    onnx: Path, monkeypatch: pytest.MonkeyPatch, error: ImportError, said: str
) -> None:
    import builtins

    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "tensorrt":
            raise error
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(HardwareError) as caught:
        build_plan(onnx, onnx.with_name("model.plan"), OPTIONS)
    assert caught.value.code == "H004" and said in caught.value.message
    assert str(onnx) in caught.value.where and "trtexec" in caught.value.why


# ---------------------------------------------------------------- trtexec


def test_the_trtexec_line_builds_the_same_engine(onnx: Path) -> None:
    options = TrtOptions(4, 2.5, "same-cc", refit=True, batches=(1, 16, 32), timing_cache=Path("/a/t.timings"))
    words = shlex.split(trtexec_line(onnx, Path("my model.plan"), options))
    assert words == [
        "trtexec", f"--onnx={onnx}", "--saveEngine=my model.plan", "--stronglyTyped", "--noTF32", "--builderOptimizationLevel=4",
        "--memPoolSize=workspace:2560", "--minShapes=pixels:1x4x4x3", "--optShapes=pixels:16x4x4x3", "--maxShapes=pixels:32x4x4x3",
        "--hardwareCompatibilityLevel=sameComputeCapability", "--refit", "--timingCacheFile=t.timings",
        "--profilingVerbosity=detailed", "--skipInference",
    ]  # fmt: skip


def test_the_trtexec_line_knows_versions_and_fixed_batches(tmp_path: Path) -> None:
    onnx = doubles.tiny_onnx(tmp_path / "model.onnx", batch=5)
    assert "--stronglyTyped" in trtexec_line(onnx, Path("p"), OPTIONS, "10.16.1.11")
    eleven = trtexec_line(onnx, Path("p"), OPTIONS, "11.4.0.106")
    assert "--stronglyTyped" not in eleven and "Shapes" not in eleven
    assert "--versionCompatible" in trtexec_line(onnx, Path("p"), TrtOptions(version_compatible=True))
    assert not {"--fp16", "--int8", "--bf16", "--best"} & set(shlex.split(eleven))


# ---------------------------------------------------------------- options


def test_options_come_from_the_settings() -> None:
    settings = ExportConfig(max_batch=32, trt_level=4, trt_hardware="same-cc", trt_refit=True)  # type: ignore[call-arg]
    assert TrtOptions.of(settings) == TrtOptions(4, 4.0, "same-cc", False, True, (1, 32, 32))
    assert TrtOptions.of(ExportConfig(max_batch=32, best_batch=8)).batches == (1, 8, 32)  # type: ignore[call-arg]
    assert TrtOptions.of(ExportConfig(batch=7)).batches == (7, 7, 7)  # type: ignore[call-arg]
    assert "timing_cache" not in TrtOptions().shaping()


@pytest.mark.parametrize("batches", [(0, 1, 2), (1, 9, 8), (4, 2, 8)])
def test_batches_out_of_order_are_c004(batches: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError) as caught:
        TrtOptions(batches=batches)
    assert caught.value.code == "C004"


def test_a_refittable_engine_for_several_versions_is_c004() -> None:
    with pytest.raises(ConfigError) as caught:
        TrtOptions(version_compatible=True, refit=True)
    assert caught.value.code == "C004"


# ---------------------------------------------------------------- reading what TensorRT says


@pytest.mark.parametrize(
    ("text", "layer"),
    [
        ("Error Code 10: Internal Error (Could not find any implementation for node Conv_119 + Add_182.)", "Conv_119 + Add_182"),
        ("Could not find any implementation for node {ForeignNode[a...b]}.", "{ForeignNode[a...b]}"),
        ("Could not find any implementation for node node_conv_3 due to insufficient workspace. See verbose log.", "node_conv_3"),
        ("Network layer has no name and node 12 failed", ""),
        ("[graphShapeAnalyzer.cpp] Error Code 4: Internal Error (IShuffleLayer /head/Reshape: reshaping failed)", "/head/Reshape"),
        ("In node 12 with name: /blocks.0/Gelu and operator: Gelu (parseNode): UNSUPPORTED_NODE", "/blocks.0/Gelu"),
        ("Error Code 4: API Usage Error (/features/0/Conv: kernel weights has count 9 but 27 was expected)", "/features/0/Conv"),
        ("Error Code 9: API Usage Error (Target GPU SM 61 is not supported by this TensorRT release.)", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_the_layer_is_found_in_messages_as_tensorrt_writes_them(text: str, layer: str) -> None:
    assert layer_of(text) == layer


def test_layers_are_counted_by_type_and_by_the_type_that_they_compute_in() -> None:
    def layer(kind: str, inputs: str, outputs: str = "", weights: str = "") -> dict[str, Any]:
        made: dict[str, Any] = {
            "Name": kind, "LayerType": kind, "Inputs": [{"Format/Datatype": inputs}], "Outputs": [{"Format/Datatype": outputs}],
        }  # fmt: skip
        return made | ({"Weights": {"Type": weights, "Count": 9}} if weights else {})

    eight = "Thirty-two wide channel vectorized row major Int8 format"
    layers = [
        layer("kgen", "Row major UINT8 format", "Row major linear FP32"),
        layer("Reformat", "Row major linear FP32", "Channel major FP16 format where channel % 8 == 0"),
        layer("CaskConvolution", "Channel major FP16 format where channel % 8 == 0", eight, "Half"),
        layer("CaskConvolution", eight, eight, "Int8"),
        layer("CaskGemmConvolution", eight, eight, "Int8"),
        layer("PointWiseV2", "Row major linear BFloat16 format"),
    ]
    found = summarise(json.dumps({"Layers": layers}))
    assert found["layers"]["by_precision"] == {"fp32": 2, "fp16": 1, "int8": 2, "bf16": 1}
    assert found["layers"]["by_type"]["CaskConvolution"] == 2 and found["layers"]["count"] == 6
    assert found["effective_precision"] == "int8"


def test_quantising_a_graph_that_is_computed_in_float_does_not_make_it_int8() -> None:
    def layer(kind: str, inputs: str) -> dict[str, Any]:
        return {"LayerType": kind, "Inputs": [{"Format/Datatype": inputs}]}

    layers = [
        layer("Dequantize", "Row major Int8 format"),
        layer("CaskConvolution", "Row major FP16 format"),
        layer("kgen", "Float"),
    ]
    assert summarise(json.dumps({"Layers": layers}))["effective_precision"] == "fp16"


@pytest.mark.parametrize("text", ["", "{not json", "[]", '{"Layers": ["conv1 + relu", "fc"]}'])
def test_an_inspector_that_tells_no_types_gives_no_precision(text: str) -> None:
    assert summarise(text)["effective_precision"] == ""


# ---------------------------------------------------------------- refit


def test_new_weights_go_into_an_old_plan(world: Any, onnx: Path) -> None:
    plan, new = onnx.with_name("old.plan"), onnx.with_name("new.plan")
    build_plan(onnx, plan, TrtOptions(batches=(1, 4, 8), refit=True))
    other = doubles.tiny_onnx(onnx.with_name("other.onnx"), seed=9)
    facts = refit_plan(plan, other, new)
    assert facts["sha256"] == sha256_file(new) and facts["refitted_from"] == sha256_file(plan)
    assert facts["onnx_sha256"] == sha256_file(other)
    assert json.loads(new.read_bytes().removeprefix(b"PLAN"))["onnx"] == doubles.read_graph(other)["onnx"]


def test_every_way_in_which_a_refit_fails_is_e004_and_leaves_no_file(world: Any, onnx: Path) -> None:
    plan, fixed, new = (onnx.with_name(name) for name in ("old.plan", "fixed.plan", "new.plan"))
    build_plan(onnx, plan, TrtOptions(batches=(1, 4, 8), refit=True))
    build_plan(onnx, fixed, OPTIONS)

    def said(path: Path) -> str:
        with pytest.raises(ExportError) as caught:
            refit_plan(path, onnx, new)
        assert caught.value.code == "E004" and not new.exists()
        return caught.value.message

    assert "built without refit" in said(fixed)
    for call, words in {
        "get_missing_weights": "1 weights are not in it, first /conv/weight",
        "refit_cuda_engine": "no reason given",
        "serialize": "cannot write the refitted engine",
        "deserialize_cuda_engine": "cannot load",
    }.items():
        world.refuse = {call}
        assert words in said(plan), call
    world.refuse, world.parser_errors = set(), [(0, "/conv", "Conv", "weights of another shape")]
    assert "node /conv (Conv): weights of another shape" in said(plan)


# ---------------------------------------------------------------- really, where TensorRT and a GPU are


def real_missing() -> str:
    return trt_plan.trt_missing()


@pytest.mark.gpu
@pytest.mark.skipif(bool(real_missing()), reason=f"needs TensorRT and a GPU: {real_missing()}")
class TestOnAGpu:
    def test_a_plan_is_built_with_everything_that_meta_json_needs(self, onnx: Path) -> None:
        told: list[float] = []
        plan = onnx.with_name("model.plan")
        options = TrtOptions(batches=(1, 4, 8), timing_cache=onnx.with_name("t.timings"), refit=True)
        facts = build_plan(onnx, plan, options, progress=lambda name, fraction: told.append(fraction))
        assert facts["sha256"] == sha256_file(plan) and facts["layers"]["count"] > 0 and facts["refittable"]
        assert told == sorted(told) and told
        assert build_plan(onnx, plan, options)["timing_cache"] == "read"
        assert (
            refit_plan(plan, doubles.tiny_onnx(onnx.with_name("b.onnx"), seed=9), onnx.with_name("b.plan"))["bytes"] > 0
        )

    def test_a_build_can_be_stopped(self, onnx: Path) -> None:
        with pytest.raises(Interrupted):
            build_plan(onnx, onnx.with_name("model.plan"), OPTIONS, should_stop=lambda: True)

    def test_a_graph_that_tensorrt_does_not_know_is_told_with_its_node(self, onnx: Path) -> None:
        import onnx as library

        model = library.load(str(onnx))
        model.graph.node[5].op_type = "Det"
        onnx.write_bytes(model.SerializeToString())
        assert "/softmax" in refused(onnx).message
