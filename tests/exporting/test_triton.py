"""Triton model repositories: parsed by Triton's own protobuf, compared with their graphs, and their decoder run on real photos."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core.errors import ConfigError, ExportError, HardwareError
from imgcls_fast.core.exports import GATE, Export, choose, find_export, finish, list_exports, new_export
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.exporting import triton
from imgcls_fast.exporting.triton import TritonOptions, export_triton, write_triton
from imgcls_fast.exporting.triton_config import CONFIG, Word, check_repository, from_pbtxt, to_pbtxt
from imgcls_fast.loading.loader import dali_missing

onnx = pytest.importorskip("onnx")
model_config_pb2 = pytest.importorskip("tritonclient.grpc").model_config_pb2
text_format = pytest.importorskip("google.protobuf.text_format")

needs_dali = pytest.mark.skipif(dali_missing() is not None, reason=str(dali_missing()))
SIZE, CLASSES = 32, 3


def tiny_graph(
    path: Path, *, batch: int | str = "batch", side: int = SIZE, channels: int = 3, classes: int = CLASSES
) -> None:
    """A graph with the inputs and outputs of every export: mean colour, a matrix, softmax."""
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).normal(size=(channels, classes)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["colour"], keepdims=0),
        helper.make_node("MatMul", ["colour", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=1),
    ]
    graph = helper.make_graph(
        nodes, "tiny",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, [batch, side, side, channels])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(weights / 100, "weights"), numpy_helper.from_array(np.array([1, 2], np.int64), "axes")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))


def onnx_export(bundle: Any, *, batch: int | None = None, precision: str = "fp32", **meta: Any) -> Export:
    with new_export(bundle.directory.parent / "exports", "onnx", precision, "00000000") as temporary:
        tiny_graph(
            temporary / "model.onnx", batch=batch or "batch", side=bundle.pixels.size, channels=bundle.pixels.channels,
            classes=bundle.labels.size,
        )  # fmt: skip
        return finish(temporary, bundle, "onnx", precision, "model.onnx", {"opset": 20, "batch": batch, **meta})


def plan_export(bundle: Any, **meta: Any) -> Export:
    """A plan as the TensorRT builder describes it; its bytes are nobody's business here."""
    facts = {
        "tensorrt": "10.16.0.72", "gpu": "NVIDIA H100 80GB HBM3", "compute_capability": [9, 0], "hardware": "this",
        "version_compatible": False,
        "profile": {"min": [1, SIZE, SIZE, 3], "opt": [16, SIZE, SIZE, 3], "max": [64, SIZE, SIZE, 3]},
    }  # fmt: skip
    with new_export(bundle.directory.parent / "exports", "trt", "fp16", "00000000") as temporary:
        (temporary / "model.plan").write_bytes(b"ftrt" + bytes(range(256)))
        return finish(temporary, bundle, "trt", "fp16", "model.plan", {**facts, **meta})


def parsed(folder: Path) -> Any:
    """A configuration, read by Triton's own message."""
    return text_format.Parse((folder / CONFIG).read_text("utf-8"), model_config_pb2.ModelConfig())


def type_of(value: int) -> str:
    return model_config_pb2.DataType.Name(value)


@pytest.fixture
def repository(bundle_of: Callable[..., Any], tmp_path: Path) -> tuple[Any, Path]:
    bundle = bundle_of()
    write_triton(bundle, onnx_export(bundle), tmp_path / "repository", TritonOptions(name="flowers"))
    return bundle, tmp_path / "repository"


# ---------------------------------------------------------------- what is written


@needs_dali
def test_configurations_are_tritons_and_say_what_the_graph_says(repository):
    bundle, folder = repository
    assert sorted(path.name for path in folder.iterdir()) == ["flowers", "flowers_decode", "flowers_ensemble"]
    config = parsed(folder / "flowers")
    graph = onnx.load(str(folder / "flowers" / "1" / "model.onnx")).graph
    names = {1: "TYPE_FP32", 2: "TYPE_UINT8"}
    for told, real in ((config.input, graph.input), (config.output, graph.output)):
        assert [t.name for t in told] == [t.name for t in real]
        for tensor, value in zip(told, real, strict=True):
            kind = value.type.tensor_type
            assert type_of(tensor.data_type) == names[kind.elem_type]
            assert kind.shape.dim[0].dim_param and list(tensor.dims) == [d.dim_value for d in kind.shape.dim][1:]
    assert config.name == "flowers" and config.backend == "onnxruntime" and config.max_batch_size == 64
    assert list(config.dynamic_batching.preferred_batch_size) == [32, 64]
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    assert config.output[0].label_filename == "labels.txt"
    assert (folder / "flowers" / "labels.txt").read_text("utf-8") == "class 0\nclass 1\nclass 2\n"
    assert [sample.batch_size for sample in config.model_warmup] == [1, 32, 64]
    warm = config.model_warmup[0].inputs["pixels"]
    assert (
        warm.zero_data and list(warm.dims) == list(config.input[0].dims) and warm.data_type == config.input[0].data_type
    )
    assert check_repository(folder) == [] and check_repository(folder, bundle) == []


@needs_dali
def test_the_ensemble_hands_on_what_the_next_step_takes(repository):
    bundle, folder = repository
    models = {path.name: parsed(path) for path in folder.iterdir()}
    ensemble = models["flowers_ensemble"]
    assert ensemble.platform == "ensemble" and not ensemble.instance_group and not ensemble.model_warmup
    known = {t.name: (t.data_type, list(t.dims)) for t in ensemble.input}
    assert known == {"encoded": (model_config_pb2.TYPE_UINT8, [-1])}
    for step in ensemble.ensemble_scheduling.step:
        model = models[step.model_name]
        assert model.max_batch_size >= ensemble.max_batch_size >= 1
        for tensor in model.input:
            assert known[step.input_map[tensor.name]] == (tensor.data_type, list(tensor.dims))
        known |= {step.output_map[t.name]: (t.data_type, list(t.dims)) for t in model.output}
    assert [known[t.name] for t in ensemble.output] == [(t.data_type, list(t.dims)) for t in ensemble.output]
    assert list(ensemble.output[0].dims) == [bundle.labels.size]
    assert (folder / "flowers_ensemble" / "1").is_dir(), "without a version folder it is not served"


@needs_dali
def test_the_decoder_is_warmed_up_with_an_image_and_decodes_strangers_apart(repository):
    _, folder = repository
    config = parsed(folder / "flowers_decode")
    assert config.backend == "dali" and config.max_batch_size == 1 and config.input[0].allow_ragged_batch
    sample = config.model_warmup[0].inputs["encoded"]
    picture = (folder / "flowers_decode" / "warmup" / sample.input_data_file).read_bytes()
    assert list(sample.dims) == [len(picture)] and Image.open(io.BytesIO(picture)).format == "JPEG"


def test_a_fixed_batch_stays_in_the_dims_and_is_not_batched(bundle_of, tmp_path):
    bundle = bundle_of()
    facts = write_triton(bundle, onnx_export(bundle, batch=8), tmp_path / "repository", TritonOptions(name="m"))
    config = parsed(tmp_path / "repository" / "m")
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [8, SIZE, SIZE, 3] and list(config.output[0].dims) == [8, CLASSES]
    assert config.model_warmup[0].batch_size == 1 and list(config.model_warmup[0].inputs["pixels"].dims) == [
        8,
        SIZE,
        SIZE,
        3,
    ]
    assert facts["models"] == ["m"] and not facts["decode"], "eight images at once cannot come from single requests"
    with pytest.raises(ConfigError, match="takes exactly 8 images"):
        write_triton(bundle, onnx_export(bundle, batch=8), tmp_path / "other", TritonOptions(dali=True))


@needs_dali
def test_a_fixed_batch_of_one_fits_behind_the_decoder(bundle_of, tmp_path):
    bundle = bundle_of()
    facts = write_triton(bundle, onnx_export(bundle, batch=1), tmp_path / "repository", TritonOptions(name="m"))
    assert facts["models"] == ["m", "m_decode", "m_ensemble"]
    assert parsed(tmp_path / "repository" / "m").max_batch_size == 0
    with pytest.raises(ConfigError, match="decode_batch is 2, and the model takes 1"):
        write_triton(bundle, onnx_export(bundle, batch=1), tmp_path / "other", TritonOptions(decode_batch=2))


@needs_dali
def test_a_plan_is_bound_to_its_gpu_and_its_profile(bundle_of, tmp_path):
    bundle = bundle_of()
    options = TritonOptions(name="m", cuda_graphs=True, instances=2)
    facts = write_triton(bundle, plan_export(bundle), tmp_path / "repository", options)
    config = parsed(tmp_path / "repository" / "m")
    assert config.platform == "tensorrt_plan" and config.max_batch_size == 64 and config.optimization.cuda.graphs
    assert dict(config.cc_model_filenames) == {"9.0": "model_sm90.plan"} and not config.default_model_filename
    assert [path.name for path in (tmp_path / "repository" / "m" / "1").iterdir()] == ["model_sm90.plan"], (
        "no file may be left for another GPU to find"
    )
    assert list(config.dynamic_batching.preferred_batch_size) == [16, 64]
    group = config.instance_group[0]
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU and group.count == 2
    assert facts["plan"]["tensorrt"] == "10.16.0.72" and facts["server_args"] == []
    decoder = parsed(tmp_path / "repository" / "m_decode")
    assert decoder.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert b"mixed" in (tmp_path / "repository" / "m_decode" / "1" / "model.dali").read_bytes()


def test_plans_for_more_gpus_and_versions_say_so(bundle_of, tmp_path):
    bundle = bundle_of()
    export = plan_export(
        bundle,
        hardware="ampere+",
        version_compatible=True,
        profile={key: [4, SIZE, SIZE, 3] for key in ("min", "opt", "max")},
    )
    facts = write_triton(bundle, export, tmp_path / "repository", TritonOptions(name="m", gpu=True))
    config = parsed(tmp_path / "repository" / "m")
    assert not config.cc_model_filenames and (tmp_path / "repository" / "m" / "1" / "model.plan").is_file()
    assert facts["server_args"] == ["--backend-config=tensorrt,version-compatible=true"]
    assert config.max_batch_size == 0 and list(config.input[0].dims) == [4, SIZE, SIZE, 3]


def test_int8_on_onnx_runtime_runs_without_the_optimiser_that_breaks_it(bundle_of, tmp_path):
    bundle = bundle_of()
    write_triton(
        bundle, onnx_export(bundle, precision="int8"), tmp_path / "int8", TritonOptions(name="m", dali=False, threads=2)
    )
    config = parsed(tmp_path / "int8" / "m")
    assert config.optimization.graph.level == 2 and config.parameters["intra_op_thread_count"].string_value == "2"
    write_triton(bundle, onnx_export(bundle), tmp_path / "fp32", TritonOptions(name="m", dali=False, warmup=False))
    config = parsed(tmp_path / "fp32" / "m")
    assert not config.HasField("optimization") and not config.model_warmup


def test_the_name_of_an_architecture_becomes_one_that_a_url_can_hold(bundle_of, tmp_path):
    bundle = bundle_of()
    bundle.arch["arch"] = "timm/vit_tiny_patch16_224.augreg_in21k"
    facts = write_triton(bundle, onnx_export(bundle), tmp_path / "repository", TritonOptions(dali=False))
    assert facts["name"] == "timm-vit_tiny_patch16_224.augreg_in21k"


def test_text_format_is_read_back_as_it_was_written_and_as_triton_reads_it():
    message = {
        "name": 'a "quoted" \\ name, Ä', "max_batch_size": 4, "input": [{"name": "x", "dims": [-1, 3]}, {"name": "y", "dims": [2]}],
        "dynamic_batching": {}, "optimization": {"cuda": {"graphs": True}}, "instance_group": [{"kind": Word("KIND_CPU"), "count": 2}],
    }  # fmt: skip
    text = to_pbtxt(message)
    real = text_format.Parse(text, model_config_pb2.ModelConfig())
    for found in (from_pbtxt(text), from_pbtxt(text_format.MessageToString(real, as_utf8=True))):
        assert found["name"] == [message["name"]] and found["max_batch_size"] == [4]
        assert [t["dims"] for t in found["input"]] == [[-1, 3], [2]] and found["dynamic_batching"] == [{}]
        assert found["instance_group"][0]["kind"] == ["KIND_CPU"]
    assert real.name == message["name"] and list(real.input[0].dims) == [-1, 3]
    for broken in ("name: ", "input [ {", "input { name: 'a", "a: 1 }", "= 3", "name }"):
        with pytest.raises(ValueError, match=r"."):
            from_pbtxt(broken)


# ---------------------------------------------------------------- what must not be handed over

_PLANTED = {
    "another name": ("flowers", 'name: "flowers"', 'name: "roses"', "calls it 'roses'"),
    "an input that is not there": ("flowers", 'name: "pixels"', 'name: "image"', "input image is not in the graph"),
    "another type": ("flowers", "data_type: TYPE_UINT8", "data_type: TYPE_FP32", "TYPE_FP32"),
    "another size": ("flowers", "dims: [ 32, 32, 3 ]", "dims: [ 3, 32, 32 ]", r"\[-1, 3, 32, 32\] in the configuration"),
    "another number of classes": ("flowers", "dims: [ 3 ]", "dims: [ 4 ]", r"\[-1, 4\] in the configuration"),
    "a batch in the dims": ("flowers", "dims: [ 32, 32, 3 ]", "dims: [ 64, 32, 32, 3 ]", r"\[-1, 64, 32, 32, 3\]"),
    "no batching although the graph batches": ("flowers", "max_batch_size: 64", "max_batch_size: 0", "batch is fixed"),
    "a preferred batch above the largest": ("flowers", "[ 32, 64 ]", "[ 32, 128 ]", "preferred batch size 128"),
    "a warm-up of another input": ("flowers", 'key: "pixels"', 'key: "image"', "warm-up"),
    "a missing label file": ("flowers", "labels.txt", "names.txt", "names.txt"),
    "a missing backend": ("flowers", 'backend: "onnxruntime"', 'backend: "onnx"', "unknown backend"),
    "another file name": ("flowers", 'name: "flowers"', 'name: "flowers"\ndefault_model_filename: "net.onnx"', "net.onnx is missing"),
    "text that is no configuration": ("flowers", "max_batch_size: 64", "max_batch_size = 64", "cannot be read"),
    "a decoder of another size": ("flowers_decode", "dims: [ 32, 32, 3 ]", "dims: [ 48, 48, 3 ]", "from the pipeline"),
    "a decoder of another input": ("flowers_decode", 'name: "encoded"', 'name: "bytes"', "bytes is not in the pipeline"),
    "a decoder that wants floats": ("flowers_decode", "data_type: TYPE_UINT8", "data_type: TYPE_FP32", "an encoded image is"),
    "a missing warm-up picture": ("flowers_decode", "picture.jpg", "photo.jpg", "warmup/photo.jpg is missing"),
    "an unknown step": ("flowers_ensemble", 'model_name: "flowers"', 'model_name: "roses"', "step roses is not in the repository"),
    "a tensor that nobody makes": ("flowers_ensemble", 'value: "scores"', 'value: "answers"', "nothing gives scores"),
    "a mapping of an unknown input": (
        "flowers_ensemble", 'key: "pixels"\n      value: "pixels"', 'key: "x"\n      value: "pixels"', "has no input x",
    ),
    "a larger batch than a step takes": ("flowers_ensemble", "max_batch_size: 1", "max_batch_size: 16", "step flowers_decode takes 1"),
    "other classes of the ensemble": ("flowers_ensemble", "dims: [ 3 ]", "dims: [ 5 ]", "the answer takes scores"),
    "instances of an ensemble": (
        "flowers_ensemble", "max_batch_size: 1", "max_batch_size: 1\ninstance_group { count: 1 }", "has no instance_group",
    ),
}  # fmt: skip


@needs_dali
@pytest.mark.parametrize("planted", _PLANTED)
def test_a_planted_mismatch_is_found_without_tritons_client(repository, planted):
    _, folder = repository
    model, old, new, told = _PLANTED[planted]
    path = folder / model / CONFIG
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")
    found = check_repository(folder)
    assert any(re.search(told, reason) for reason in found), found


@needs_dali
@pytest.mark.parametrize(
    ("path", "content", "told"),
    [
        ("flowers/1/model.onnx", None, "missing or empty"),
        ("flowers/1/model.onnx", b"", "missing or empty"),
        ("flowers/1/model.onnx", b"\x00 no graph", "no readable ONNX file"),
        ("flowers/labels.txt", b"class 0\nclass 1\n", "2 lines for 3 scores"),
        ("flowers/labels.txt", b"class 0\nclass 2\nclass 1\n", "names other classes"),
        ("flowers/labels.txt", b"class 0\n\xff\nclass 2\n", "label file"),
        ("flowers_decode/1/model.dali", b"encoded, and no pipeline", "does not run"),
        ("flowers_ensemble/config.pbtxt", None, "cannot be read"),
    ],
)
def test_a_damaged_file_is_found(repository, path, content, told):
    bundle, folder = repository
    if content is None:
        (folder / path).unlink()
    else:
        (folder / path).write_bytes(content)
    found = check_repository(folder, bundle)
    assert any(told in reason for reason in found), found
    assert check_repository(folder / "nowhere") == [f"{folder / 'nowhere'} holds no model"]


def test_a_repository_that_would_be_wrong_is_never_handed_over(bundle_of, tmp_path, monkeypatch):
    bundle = bundle_of()
    source = onnx_export(bundle)
    real = triton._model_config
    monkeypatch.setattr(triton, "_model_config", lambda *a: {**real(*a), "max_batch_size": 0})
    with pytest.raises(ExportError, match="would be wrong") as error:
        export_triton(bundle, source.folder.parent, source, TritonOptions(dali=False))
    assert error.value.code == "E001"
    assert [export.meta["target"] for export in list_exports(source.folder.parent)] == ["onnx"]
    assert not list(source.folder.parent.glob(".*")), "nothing half-made is left"


def test_a_graph_of_another_model_is_found_even_if_its_sidecar_lies(bundle_of, tmp_path):
    bundle = bundle_of(classes=5)
    source = onnx_export(bundle)
    tiny_graph(source.path, classes=3)
    from imgcls_fast.core.files import sha256_file

    lie = Export(source.folder, {**source.meta, "sha256": sha256_file(source.path)})
    with pytest.raises(
        ExportError, match=r"scores TYPE_FP32 \[-1, 5\] in the configuration, scores TYPE_FP32 \[-1, 3\]"
    ):
        write_triton(bundle, lie, tmp_path / "repository", TritonOptions(dali=False))


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "-x", ".hidden", "a b", "a\n", "ä", "x" * 101])
def test_names_that_triton_or_a_url_cannot_hold_are_refused(bundle_of, tmp_path, name):
    bundle = bundle_of()
    with pytest.raises(ConfigError, match="a Triton model's name") as error:
        write_triton(bundle, onnx_export(bundle), tmp_path / "repository", TritonOptions(name=name))
    assert error.value.code == "C003" and not (tmp_path / "repository").exists()


@pytest.mark.parametrize(
    ("options", "told", "code"),
    [
        ({"instances": 0}, "instances must be at least 1", "C003"),
        ({"max_batch": 0}, "max_batch must be at least 1", "C003"),
        ({"queue_delay_us": -1}, "queue_delay_us must be at least 0", "C003"),
        ({"preferred": (128,)}, "preferred batches are 1 to 64", "C003"),
        ({"decode_batch": 8, "max_batch": 4, "dali": True}, "decode_batch is 8", "C004"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(bundle_of, tmp_path, options, told, code):
    if options.get("dali") and dali_missing():
        pytest.skip(str(dali_missing()))
    bundle = bundle_of()
    with pytest.raises(ConfigError, match=told) as error:
        write_triton(bundle, onnx_export(bundle), tmp_path / "repository", TritonOptions(**options))
    assert error.value.code == code and not (tmp_path / "repository").exists()


def test_sources_that_cannot_be_served_are_refused(bundle_of, tmp_path):
    bundle, other = bundle_of(), bundle_of()
    target = tmp_path / "repository"
    with pytest.raises(ExportError, match="made from another model"):
        write_triton(bundle, onnx_export(other), target)
    source = onnx_export(bundle)
    with pytest.raises(ExportError, match="ONNX or a TensorRT export, got 'pt2'"):
        write_triton(bundle, Export(source.folder, {**source.meta, "target": "pt2"}), target)
    with pytest.raises(ConfigError, match="runs on GPUs only"):
        write_triton(bundle, plan_export(bundle), target, TritonOptions(gpu=False))
    with pytest.raises(ConfigError, match="built for at most 64"):
        write_triton(bundle, plan_export(bundle), target, TritonOptions(max_batch=128))
    with pytest.raises(ExportError, match="bfloat16"):
        write_triton(bundle, onnx_export(bundle, precision="bf16"), target)
    source.path.write_bytes(source.path.read_bytes()[:-1])
    with pytest.raises(ExportError, match="missing or damaged"):
        write_triton(bundle, source, target)
    source.path.unlink()
    with pytest.raises(ExportError, match="missing or damaged"):
        write_triton(bundle, source, target)
    assert not target.exists()
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(ExportError, match="not empty"):
        write_triton(bundle, onnx_export(bundle), target)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("two\nlines", "two\\nlines"),
        ("carriage\rreturn", "carriage\\rreturn"),
        ("nul\0", "nul\\x00"),
        ("not utf-8 \udcff", "not utf-8 \\udcff"),
    ],
)
def test_class_names_that_would_shift_the_label_file_are_escaped_in_it_and_that_is_said(bundle_of, tmp_path, name, line):
    from dataclasses import replace

    from imgcls_fast.core.labels import LabelSpace

    bundle = replace(bundle_of(), labels=LabelSpace.single(["rose", name, "tulip \x1b"]))
    with pytest.warns(UserWarning, match="clients get escapes for 1 class"):
        write_triton(bundle, onnx_export(bundle), tmp_path / "repository")
    written = [path.read_text("utf-8").split("\n") for path in (tmp_path / "repository").glob("*/labels.txt")]
    assert written and all(lines == ["rose", line, "tulip \x1b", ""] for lines in written)
    twins = replace(bundle, labels=LabelSpace.single(["rose", name, line]))
    with pytest.raises(ExportError, match="the same line") as error:
        write_triton(twins, onnx_export(twins), tmp_path / "other")
    assert error.value.code == "E001" and not (tmp_path / "other").exists()


def test_odd_class_names_that_fit_on_a_line_are_kept_as_they_are(bundle_of, tmp_path):
    from dataclasses import replace

    from imgcls_fast.core.labels import LabelSpace

    names = ['a "quoted" name', "Gänseblümchen: weiß", "日本 \u2028 line separator"]
    bundle = replace(bundle_of(), labels=LabelSpace.single(names))
    write_triton(bundle, onnx_export(bundle), tmp_path / "repository", TritonOptions(name="m", dali=False))
    assert (tmp_path / "repository" / "m" / "labels.txt").read_bytes() == "".join(f"{n}\n" for n in names).encode()


def test_rgba_gets_a_model_without_a_decoder(bundle_of, tmp_path):
    bundle = bundle_of(color="rgba")
    facts = write_triton(bundle, onnx_export(bundle), tmp_path / "repository")
    assert facts["decode"] is False and "RGBA" in facts["no_decoder"]
    with pytest.raises(ConfigError, match="RGBA"):
        write_triton(bundle, onnx_export(bundle), tmp_path / "other", TritonOptions(dali=True))


def test_without_dali_the_model_is_served_alone_unless_the_decoder_was_asked_for(bundle_of, tmp_path, monkeypatch):
    monkeypatch.setattr(triton, "dali_missing", lambda: "not installed")
    bundle = bundle_of()
    assert write_triton(bundle, onnx_export(bundle), tmp_path / "repository")["decode"] is False
    with pytest.raises(HardwareError) as error:
        write_triton(bundle, onnx_export(bundle), tmp_path / "other", TritonOptions(dali=True))
    assert error.value.code == "H004"


# ---------------------------------------------------------------- as an export


@needs_dali
def test_a_repository_is_an_export_with_the_judgement_of_its_source(bundle_of, tmp_path):
    bundle = bundle_of()
    source = onnx_export(bundle)
    (source.folder / GATE).write_text('{"verdict": "pass"}', "utf-8")
    choose(source)
    exports = source.folder.parent
    export = export_triton(bundle, exports, source)
    assert export.path.name == "model_repository" and export.path.is_dir() and export.gate == {"verdict": "pass"}
    assert find_export(exports, bundle, "triton", "fp32").folder == export.folder
    assert export.meta["source"]["sha256"] == source.meta["sha256"] and export.meta["decode_difference"]["largest"] <= 2
    before = {path: path.stat().st_mtime_ns for path in export.folder.rglob("*")}
    assert export_triton(bundle, exports, source).folder == export.folder
    assert {path: path.stat().st_mtime_ns for path in export.folder.rglob("*")} == before, (
        "an equal export is taken as it is"
    )
    other = export_triton(bundle, exports, source, TritonOptions(instances=2))
    assert other.folder != export.folder
    (other.path / "small-cnn" / "labels.txt").write_text("x\n", "utf-8")
    with pytest.raises(ExportError, match="damaged"):
        find_export(exports, bundle, "triton")


# ---------------------------------------------------------------- the decoder, run


def spec(size: int = 224, **more: Any) -> Pixels:
    channels = 1 if more.get("color") == "gray" else 3
    values = {"crop_pct": 0.875, "interpolation": "bilinear", "color": "rgb", "exif": "apply", **more}
    return Pixels(size, mean=(0.5,) * channels, std=(0.25,) * channels, **values)


def differences(pixels: Pixels, files: list[bytes]) -> np.ndarray:
    """(n, S, S, C) levels between the served pipeline and the pixel specification."""
    from imgcls_fast.exporting.triton_decode import decode_pipeline, run_pipeline, specified_pixels

    found = run_pipeline(decode_pipeline(pixels, gpu=False), files)
    return np.stack([np.abs(a.astype(int) - specified_pixels(f, pixels)) for a, f in zip(found, files, strict=True)])


@needs_dali
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("color", ["rgb", "gray"])
def test_photos_are_within_two_levels_of_the_specification(shared_data, interpolation, color):
    files = [path.read_bytes() for path in sorted((shared_data / "jpeg_full" / "images").iterdir())[::4]]
    found = differences(spec(interpolation=interpolation, color=color), files)
    print(f"\n{len(files)} photos {interpolation} {color}: largest {found.max()}, mean {found.mean():.4f} levels")  # noqa: T201
    assert len(files) >= 50 and found.max() <= 2 and found.mean() <= 0.05, (found.max(), found.mean())


@needs_dali
@pytest.mark.parametrize(("interpolation", "reach"), [("bilinear", 1), ("bicubic", 2)])
def test_without_a_margin_only_the_outermost_pixels_leave_the_two_levels(shared_data, interpolation, reach):
    """DALI repeats the last pixel where Pillow renormalises its filter."""
    files = [path.read_bytes() for path in sorted((shared_data / "jpeg_full" / "images").iterdir())[::11]]
    found = differences(spec(192, crop_pct=1.0, interpolation=interpolation), files)
    inner = found[:, reach:-reach, reach:-reach]
    assert inner.max() <= 2 and found.mean() <= 0.25 and (found > 2).mean() <= 2e-3, (inner.max(), found.mean())


@needs_dali
@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_every_variant_of_the_flower_photos_is_within_two_levels(shared_data, exif):
    """EXIF orientations, gray, CMYK, PNG, WebP, progressive, tiny, large."""
    with open(shared_data / "photos" / "MANIFEST.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    chosen: dict[str, list[Path]] = {}
    for row in rows:
        if len(chosen.setdefault(row["variant"], [])) < 2:
            chosen[row["variant"]].append(shared_data / "photos" / row["path"])
    assert len(chosen) >= 15
    for variant, paths in chosen.items():
        found = differences(spec(128, exif=exif), [path.read_bytes() for path in paths])
        assert found.max() <= 2 and found.mean() <= 0.25, (variant, found.max(), found.mean())


@needs_dali
def test_all_photos_are_within_two_levels_of_the_specification(shared_data):
    files = [path.read_bytes() for path in sorted((shared_data / "jpeg_full" / "images").iterdir())]
    found = differences(spec(), files)
    print(f"\n{len(files)} photos: largest {found.max()}, mean {found.mean():.4f} levels")  # noqa: T201 (the figure)
    assert len(files) >= 200 and found.max() <= 2 and found.mean() <= 0.05


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@needs_dali
@pytest.mark.parametrize("color", ["rgb", "gray"])
@pytest.mark.parametrize("size", [8, 32, 33])
def test_embedded_digits_are_decoded_as_specified(pictures, size, color):
    from sklearn.datasets import load_digits

    digits = [Image.fromarray((digit * 15).astype(np.uint8)) for digit in load_digits().images[:12]]
    files = [encoded(image, kind) for image in digits for kind in ("PNG", "BMP")]  # 8 x 8, one channel, enlarged
    files += [
        encoded(Image.fromarray(p), kind, **o)
        for p in pictures[:12]
        for kind, o in (("PNG", {}), ("JPEG", {"quality": 90}))
    ]
    found = differences(spec(size, color=color), files)
    assert found.max() <= 2 and found.mean() <= 0.25, (found.max(), found.mean())


@needs_dali
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 9), (9, 1), (31, 47), (47, 31), (32, 33), (100, 101), (225, 224), (390, 33)], ids=str
)
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_the_window_is_torchvisions_for_every_parity(shape, crop_pct):
    """A step at each pixel: a window that is off by one, or a long side that is rounded up, would be far off."""
    height, width = shape
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack(
        [x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + y) * 255 // max(1, height + width - 2)], 2
    )
    found = differences(spec(32, crop_pct=crop_pct), [encoded(Image.fromarray(image.astype(np.uint8)), "PNG")])[0]
    inner = found[1:-1, 1:-1]  # enlarged images reach further over their own edge
    assert inner.max() <= 3 and found.mean() <= 0.5, (inner.max(), found.mean())


@needs_dali
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned(orientation):
    from imgcls_fast.exporting.triton_decode import made_picture

    found = differences(spec(32), [made_picture(90, 61, "JPEG", orientation)])
    assert found.max() <= 2


@needs_dali
def test_what_training_would_not_see_alike_is_refused_before_it_is_decoded():
    from imgcls_fast.exporting.triton_decode import decode_pipeline, made_picture, run_pipeline

    pixels = spec(32, max_megapixels=0.01)
    model = decode_pipeline(pixels, gpu=False)
    good = made_picture(100, 100, "PNG")
    assert run_pipeline(model, [good])[0].shape == (32, 32, 3)
    image = Image.new("RGB", (20, 20), "red")
    for name, file in {
        "one pixel row too many": encoded(Image.new("RGB", (100, 101)), "PNG"), "TIFF": encoded(image, "TIFF"),
        "GIF": encoded(image, "GIF"), "PPM": encoded(image, "PPM"), "JPEG 2000": encoded(image, "JPEG2000"),
        "cut": good[: len(good) // 2], "text": b"<html>not an image</html>", "one byte": b"\xff", "zeros": bytes(64),
    }.items():  # fmt: skip
        with pytest.raises(RuntimeError):
            run_pipeline(model, [file])
            pytest.fail(name)


@needs_dali
def test_an_extreme_shape_is_the_centre_of_the_resized_whole_which_is_never_built():
    """16,000 x 2 pixels, resized whole, would be two million pixels wide. The loaders cut such shapes first, and are off by that."""
    from imgcls_fast.exporting.triton_decode import decode_pipeline, run_pipeline
    from imgcls_fast.loading.render import resize_region

    def slope(width: int, height: int) -> np.ndarray:
        return np.repeat(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], 3, 2).repeat(height, 0)

    files = [encoded(Image.fromarray(slope(640, 33)), "PNG"), encoded(Image.fromarray(slope(16000, 2)), "PNG")]
    middle, huge = run_pipeline(decode_pipeline(spec(32), gpu=False), files)
    whole = resize_region(slope(640, 33), (36, 36 * 640 // 33), spec(32))
    left = round((whole.shape[1] - 32) / 2)
    assert np.abs(middle.astype(int) - whole[2:34, left : left + 32]).max() <= 2
    assert np.ptp(huge) <= 1 and abs(int(huge.mean()) - 127) <= 1


@needs_dali
def test_the_server_may_set_batch_size_threads_and_executor_when_it_loads_the_pipeline(pictures):
    from nvidia.dali.pipeline import Pipeline

    from imgcls_fast.exporting.triton_decode import decode_pipeline, run_pipeline

    model = decode_pipeline(spec(32), gpu=False)
    files = [encoded(Image.fromarray(p), "JPEG") for p in pictures[:5]]
    alone = run_pipeline(model, files)
    pipeline = Pipeline.deserialize(
        model, batch_size=8, num_threads=3, exec_pipelined=True, exec_async=True, prefetch_queue_depth=1
    )
    for chosen in ([0, 1, 2, 3, 4], [3, 1], [4]):
        pipeline.feed_input("encoded", [np.frombuffer(files[k], np.uint8) for k in chosen])
        np.testing.assert_array_equal(pipeline.run()[0].as_array(), np.stack([alone[k] for k in chosen]))


@needs_dali
def test_the_pipeline_names_no_path_of_the_machine_that_made_it_and_is_the_same_each_time():
    from nvidia.dali._utils import dali_trace

    from imgcls_fast.exporting.triton_decode import decode_pipeline

    model = decode_pipeline(spec(), gpu=True)
    assert b"triton_decode" not in model and b".py" not in model and model == decode_pipeline(spec(), gpu=True)
    assert dali_trace.is_tracing_enabled(), "others want their traces"
    with pytest.raises(ValueError, match="RGBA"):
        decode_pipeline(Pixels(32, 1.0, "bilinear", "rgba", "apply", (0.5,) * 4, (0.25,) * 4), gpu=False)


@needs_dali
def test_a_decoder_that_gives_other_pixels_is_not_handed_over(bundle_of, tmp_path, monkeypatch):
    from imgcls_fast.exporting import triton_decode

    real = triton_decode._view
    wrong = Pixels(SIZE, 0.6, "bilinear", "rgb", "apply", (0.5,) * 3, (0.25,) * 3)
    monkeypatch.setattr(triton_decode, "_view", lambda images, whole, _: real(images, whole, wrong))
    bundle = bundle_of()
    with pytest.raises(ExportError, match="other pixels than the model was trained on"):
        write_triton(bundle, onnx_export(bundle), tmp_path / "repository")


@needs_dali
@pytest.mark.slow
def test_an_encoded_image_gets_the_scores_of_torch_from_the_repositorys_own_files(bundle_of, pictures, tmp_path):
    """What the ensemble does, with its files, without the server."""
    from imgcls_fast.engines.torch_runtime import TorchEngine, load_model
    from imgcls_fast.exporting.triton_decode import run_pipeline, specified_pixels
    from imgcls_fast.graphs.onnx_graph import export_onnx

    runtime = pytest.importorskip("onnxruntime")
    bundle = bundle_of()
    files = [encoded(Image.fromarray(p), "JPEG", quality=95) for p in pictures]
    specified = np.stack([specified_pixels(file, bundle.pixels) for file in files])
    source = export_onnx(bundle, tmp_path / "exports", [specified])
    folder = export_triton(bundle, tmp_path / "exports", source, TritonOptions(name="m")).path
    decoded = np.stack(run_pipeline((folder / "m_decode" / "1" / "model.dali").read_bytes(), files))
    session = runtime.InferenceSession(str(folder / "m" / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    served = session.run(["scores"], {"pixels": decoded})[0]
    own = TorchEngine(load_model(bundle), bundle.labels, bundle.pixels, temperature=bundle.temperatures).scores(
        specified
    )
    assert np.ptp(own, axis=0).max() > 0.1, "the untrained network must not answer the same to everything"
    assert np.abs(served - own).max() <= 0.02 and (served.argmax(1) == own.argmax(1)).mean() >= 0.95
