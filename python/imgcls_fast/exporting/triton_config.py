"""Triton's config.pbtxt: written, read back, and a whole model repository compared with the graphs that lie in it.

Text format of protocol buffers: https://protobuf.dev/reference/protobuf/textformat-spec/. Fields: model_config.proto of
triton-inference-server/common. The rules below are those of triton-inference-server/core (`ensemble_utils.cc`,
`model_config_utils.cc`), so that what passes here is not refused there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..core import env
from ..core.bundle import Bundle
from ..core.labels import THRESHOLD, LabelSpace
from ..core.text import printable, to_json

CONFIG = "config.pbtxt"
PIXELS, SCORES = "pixels", "scores"

_TYPES = {
    1: "TYPE_FP32",
    2: "TYPE_UINT8",
    3: "TYPE_INT8",
    6: "TYPE_INT32",
    7: "TYPE_INT64",
    10: "TYPE_FP16",
    11: "TYPE_FP64",
}
_FILES = {"onnxruntime": "model.onnx", "tensorrt_plan": "model.plan", "dali": "model.dali"}


class Word(str):
    """An enum value or another word that stands without quotes."""


def to_pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """A message in text format. Values: str, Word, bool, int, a mapping (a message), a list of these (repeated)."""
    return "".join(_field(name, value, indent) for name, value in message.items())


def _field(name: str, value: Any, indent: str) -> str:
    if isinstance(value, Mapping):
        return f"{indent}{name} {{\n{to_pbtxt(value, indent + '  ')}{indent}}}\n"
    if isinstance(value, list):
        if value and isinstance(value[0], Mapping):
            return "".join(_field(name, item, indent) for item in value)
        return f"{indent}{name}: [ {', '.join(_scalar(item) for item in value)} ]\n"
    return f"{indent}{name}: {_scalar(value)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not isinstance(value, Word):
        return to_json(value)
    return str(value)


_BREAKS = re.compile("[\\0\n\r\ud800-\udfff]")


def label_lines(labels: LabelSpace) -> list[str]:
    """The lines of a label file, one per class in UTF-8; a name that would break this is written with escapes."""
    return [printable(name) if _BREAKS.search(name) else name for name in labels.classes]


def score_facts(bundle: Bundle) -> dict[str, str]:
    """Parameters from which a client learns how scores become answers, as JSON; none for one-label data, where the highest wins.

    They are served at /v2/models/NAME/config; no backend looks at them.

    Returns:
        "tasks" (name, classes and kind, in the order of the columns), and "thresholds" (one per column, used by those of any_of
        tasks) where a task is any_of.
    """
    if bundle.labels.is_single:
        return {}
    facts = {"tasks": json.dumps(bundle.labels.to_dict()["tasks"])}
    if bundle.labels.any_of.any():
        facts["thresholds"] = json.dumps(list(bundle.thresholds or [THRESHOLD] * bundle.labels.size))
    return facts


_TOKEN = re.compile(r'\s+|#[^\n]*|("(?:[^"\\\n]|\\.)*")|([A-Za-z_][\w.]*)|(-?\d+(?:\.\d+)?)|([{}\[\]:,;<>])')


def from_pbtxt(text: str) -> dict[str, list[Any]]:
    """Read text format into {field: values}; every field is a list, because any may be repeated.

    Raises:
        ValueError: the text is no message, with the place.
    """
    tokens: list[tuple[str, Any]] = []
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if not found:
            raise ValueError(f"line {text.count(chr(10), 0, at) + 1}: unexpected {text[at : at + 20]!r}")
        quoted, word, number, sign = found.groups()
        if quoted:
            tokens.append(("value", json.loads(quoted)))
        elif word:
            tokens.append(("word", Word(word)))
        elif number:
            tokens.append(("value", float(number) if "." in number else int(number)))
        elif sign:
            tokens.append((sign, sign))
        at = found.end()
    message, rest = _message(tokens, 0)
    if rest != len(tokens):
        raise ValueError(f"unexpected {tokens[rest][1]!r} behind the end")
    return message


def _message(tokens: list[tuple[str, Any]], at: int) -> tuple[dict[str, list[Any]], int]:
    message: dict[str, list[Any]] = {}
    while at < len(tokens) and tokens[at][0] != "}":
        kind, name = tokens[at]
        if kind in (",", ";"):
            at += 1
            continue
        if kind != "word":
            raise ValueError(f"expected a field, got {name!r}")
        at += 1
        if at < len(tokens) and tokens[at][0] == ":":
            at += 1
        value, at = _value(tokens, at)
        message.setdefault(str(name), []).extend(value)
    return message, at


def _value(tokens: list[tuple[str, Any]], at: int) -> tuple[list[Any], int]:
    if at >= len(tokens):
        raise ValueError("the text ends in the middle of a field")
    kind, value = tokens[at]
    if kind == "{":
        inner, at = _message(tokens, at + 1)
        if at >= len(tokens):
            raise ValueError("a { without its }")
        return [inner], at + 1
    if kind == "[":
        values: list[Any] = []
        at += 1
        while at < len(tokens) and tokens[at][0] != "]":
            if tokens[at][0] == ",":
                at += 1
                continue
            more, at = _value(tokens, at)
            values += more
        if at >= len(tokens):
            raise ValueError("a [ without its ]")
        return values, at + 1
    if kind not in ("word", "value"):
        raise ValueError(f"expected a value, got {value!r}")
    return [value], at + 1


# ---------------------------------------------------------------- checking a repository


class Tensor(NamedTuple):
    """One input or output: Triton's name of the type, and dimensions, -1 where any number is allowed."""

    name: str
    type: str
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.type} {list(self.dims)}"


class _Model:
    """One model of a repository, as its configuration describes it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.config = from_pbtxt((folder / CONFIG).read_text("utf-8"))
        self.kind = str(one(self.config, "backend") or one(self.config, "platform") or "")
        self.max_batch = int(one(self.config, "max_batch_size") or 0)
        self.inputs, self.outputs = (_tensors(self.config, side) for side in ("input", "output"))

    def full(self, tensor: Tensor) -> tuple[int, ...]:
        """The dimensions with the batch, as the graph has them."""
        return (-1, *tensor.dims) if self.max_batch else tensor.dims

    def versions(self) -> list[Path]:
        return [path for path in sorted(self.folder.iterdir()) if path.is_dir() and path.name.isdigit()]

    def files(self) -> list[str]:
        """Names of the model files that some GPU of the fleet will ask for."""
        named = [str(one(entry, "value")) for entry in self.config.get("cc_model_filenames", [])]
        default = one(self.config, "default_model_filename")
        return named or [str(default or _FILES.get(self.kind, ""))]


def one(message: Mapping[str, list[Any]], name: str) -> Any:
    """The value of a field that is not repeated, or None."""
    return message[name][-1] if message.get(name) else None


def _tensors(config: Mapping[str, list[Any]], side: str) -> list[Tensor]:
    return [
        Tensor(str(one(t, "name")), str(one(t, "data_type")), tuple(int(d) for d in t.get("dims", [])))
        for t in config.get(side, [])
    ]


def check_repository(folder: Path, bundle: Bundle | None = None) -> list[str]:
    """Everything that is wrong with a model repository; empty when it can be handed over.

    Needs neither Triton nor its client: configurations are parsed here, and compared with the ONNX graphs, the label files, with
    each other, and (`bundle` given) with the model that was asked for. A plan cannot be opened without a GPU: it is held
    against the bundle alone.

    Raises:
        HardwareError: H004 when there is an ONNX model and onnx is not installed.
    """
    models: dict[str, _Model] = {}
    wrong: list[str] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.is_dir():
            continue
        try:
            models[path.name] = _Model(path)
        except (OSError, ValueError, TypeError) as error:
            wrong.append(f"{path.name}: {CONFIG} cannot be read: {error}")
    if not models and not wrong:
        return [f"{folder} holds no model"]
    for model in models.values():
        wrong += [f"{model.name}: {reason}" for reason in _check_model(model, models, bundle)]
    return wrong


def _check_model(model: _Model, models: Mapping[str, _Model], bundle: Bundle | None) -> list[str]:
    wrong = _check_common(model)
    if model.kind == "ensemble":
        return (
            wrong
            + _check_ensemble(model, models)
            + _check_contract(model, bundle, raw=True)
            + _check_labels(model, bundle)
            + _check_score_facts(model, bundle)
        )
    if model.kind not in _FILES:
        return [*wrong, f"unknown backend {model.kind!r}"]
    wrong += _check_files(model)
    if model.kind == "dali":
        return wrong + _check_decode(model)
    if model.kind == "onnxruntime":
        wrong += _check_graph(model)
    wrong += _check_contract(model, bundle, raw=False) + _check_labels(model, bundle)
    return wrong + _check_score_facts(model, bundle)


def _check_common(model: _Model) -> list[str]:
    wrong = []
    if one(model.config, "name") != model.name:
        wrong.append(f"its configuration calls it {one(model.config, 'name')!r}")
    if not model.inputs or not model.outputs:
        wrong.append("no inputs, or no outputs")
    batching = one(model.config, "dynamic_batching")
    if batching is not None and model.max_batch < 1:
        wrong.append("dynamic batching of a model whose batch is fixed")
    for size in (batching or {}).get("preferred_batch_size", []):
        if not 1 <= size <= model.max_batch:
            wrong.append(f"preferred batch size {size} is outside 1..{model.max_batch}")
    for sample in model.config.get("model_warmup", []):
        if int(one(sample, "batch_size") or 0) > max(1, model.max_batch):
            wrong.append(
                f"warm-up with a batch of {one(sample, 'batch_size')}, the largest is {max(1, model.max_batch)}"
            )
        wrong += _check_warmup(model, sample)
    return wrong


def _check_warmup(model: _Model, sample: Mapping[str, list[Any]]) -> list[str]:
    wrong = []
    given = {str(one(entry, "key")): one(entry, "value") for entry in sample.get("inputs", [])}
    for tensor in model.inputs:
        value = given.pop(tensor.name, None)
        if value is None:
            wrong.append(f"warm-up without input {tensor.name}")
        elif one(value, "data_type") != tensor.type or not _match(tuple(value.get("dims", [])), tensor.dims):
            wrong.append(f"warm-up of {tensor} with {one(value, 'data_type')} {value.get('dims', [])}")
        elif (file := one(value, "input_data_file")) and not (model.folder / "warmup" / file).is_file():
            wrong.append(f"warm-up file warmup/{file} is missing")
    return wrong + [f"warm-up of {name}, which is no input" for name in given]


def _check_files(model: _Model) -> list[str]:
    versions = model.versions()
    if not versions:
        return ["no version folder"]
    return [
        f"{version.name}/{name} is missing or empty"
        for version in versions
        for name in model.files()
        if not (version / name).is_file() or not (version / name).stat().st_size
    ]


def _check_graph(model: _Model) -> list[str]:
    """The ONNX file of each version against the configuration."""
    onnx = env.require("onnx", "onnx", "export --triton")
    damaged = env.require("google.protobuf.message", "onnx", "export --triton").DecodeError
    wrong = []
    for version in model.versions():
        path = version / model.files()[0]
        if not path.is_file():
            continue
        try:
            graph = onnx.load(str(path), load_external_data=False).graph
        except (OSError, ValueError, damaged) as error:
            wrong.append(f"{version.name}/{path.name} is no readable ONNX file: {error}")
            continue
        for side, told, real in (("input", model.inputs, graph.input), ("output", model.outputs, graph.output)):
            wrong += _compare(side, [t._replace(dims=model.full(t)) for t in told], [_onnx_tensor(v) for v in real])
    return wrong


def _onnx_tensor(value: Any) -> Tensor:
    kind = value.type.tensor_type
    dims = tuple(int(d.dim_value) if d.HasField("dim_value") else -1 for d in kind.shape.dim)
    return Tensor(value.name, _TYPES.get(kind.elem_type, f"ONNX type {kind.elem_type}"), dims)


def _compare(side: str, told: Sequence[Tensor], real: Sequence[Tensor]) -> list[str]:
    names = {tensor.name: tensor for tensor in real}
    wrong = [
        f"{side} {tensor.name} is not in the graph, which has {sorted(names)}"
        for tensor in told
        if tensor.name not in names
    ]
    wrong += [
        f"{side} {name} of the graph is not in the configuration" for name in names.keys() - {t.name for t in told}
    ]
    for tensor in told:
        if tensor.name in names and tensor != names[tensor.name]:
            wrong.append(f"{side} {tensor} in the configuration, {names[tensor.name]} in the graph")
    return wrong


def _check_contract(model: _Model, bundle: Bundle | None, *, raw: bool) -> list[str]:
    """Inputs and outputs against what every export of this bundle has."""
    if bundle is None:
        return []
    side, channels = bundle.pixels.size, bundle.pixels.channels
    fixed = () if model.max_batch or not model.inputs else model.inputs[0].dims[:1]
    pixels = (
        Tensor("encoded", "TYPE_UINT8", (-1,)) if raw else Tensor(PIXELS, "TYPE_UINT8", (*fixed, side, side, channels))
    )
    scores = Tensor(SCORES, "TYPE_FP32", (*(() if raw else fixed), bundle.labels.size))
    return [
        f"{found or 'nothing'} instead of {expected} for the model that was asked for"
        for found, expected in ((model.inputs, [pixels]), (model.outputs, [scores]))
        if found != expected
    ]


def _check_labels(model: _Model, bundle: Bundle | None) -> list[str]:
    wrong = []
    for output, tensor in zip(model.config.get("output", []), model.outputs, strict=True):
        name = one(output, "label_filename")
        if name is None:
            continue
        try:
            labels = (model.folder / str(name)).read_bytes().decode("utf-8").split("\n")
        except (OSError, ValueError) as error:
            wrong.append(f"label file {name}: {error}")
            continue
        if labels[-1] != "" or len(labels) - 1 != tensor.dims[-1]:
            wrong.append(f"label file {name} has {len(labels) - 1} lines for {tensor.dims[-1]} scores")
        elif bundle is not None and labels[:-1] != label_lines(bundle.labels):
            wrong.append(f"label file {name} names other classes than the model")
    return wrong


def _check_score_facts(model: _Model, bundle: Bundle | None) -> list[str]:
    if bundle is None:
        return []
    told = {str(one(entry, "key")): one(one(entry, "value"), "string_value") for entry in model.config.get("parameters", [])}
    return [
        f"parameter {name} is not that of the model"
        for name, value in score_facts(bundle).items()
        if told.get(name) != value
    ]


def _check_decode(model: _Model) -> list[str]:
    """A DALI model: its own input and output, and what the pipeline does where it can run without a GPU."""
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        return ["a decoder has one input and one output"]
    path = model.versions()[0] / model.files()[0] if model.versions() else None
    if path is None or not path.is_file():
        return []  # `_check_files` reports it
    encoded, pixels = model.inputs[0], model.outputs[0]
    wrong = []
    if (encoded.type, encoded.dims) != ("TYPE_UINT8", (-1,)):
        wrong.append(f"input {encoded}, and an encoded image is TYPE_UINT8 [-1]")
    if encoded.name.encode() not in path.read_bytes():
        wrong.append(f"input {encoded.name} is not in the pipeline")
    elif one(one(model.config, "instance_group") or {}, "kind") == "KIND_CPU":
        wrong += _run_decode(path, pixels)
    return wrong


def _run_decode(path: Path, pixels: Tensor) -> list[str]:
    from ..loading.loader import dali_missing

    if dali_missing():
        return []
    from .triton_decode import made_picture, run_pipeline

    try:
        found = run_pipeline(path.read_bytes(), [made_picture(40, 30, "PNG")])[0]
    except RuntimeError as error:
        return [f"the pipeline does not run: {str(error).splitlines()[0]}"]
    real = pixels._replace(type="TYPE_UINT8" if found.dtype == "uint8" else str(found.dtype), dims=found.shape)
    return [] if real == pixels else [f"output {pixels} in the configuration, {real} from the pipeline"]


def _check_ensemble(model: _Model, models: Mapping[str, _Model]) -> list[str]:
    """Each step takes what exists by then and fits, and every output is made."""
    forbidden = [name for name in ("instance_group", "model_warmup", "optimization") if name in model.config]
    wrong = [f"an ensemble has no {name}" for name in forbidden]
    known = {t.name: (model.full(t), t.type, "the request") for t in model.inputs}
    for step in (one(model.config, "ensemble_scheduling") or {}).get("step", []):
        name = str(one(step, "model_name"))
        other = models.get(name)
        if other is None:
            wrong.append(f"step {name} is not in the repository")
            continue
        if other.max_batch and other.max_batch < model.max_batch:
            wrong.append(f"a batch of {model.max_batch}, and step {name} takes {other.max_batch}")
        takes, gives = (_mapping(step, side) for side in ("input_map", "output_map"))
        wrong += [f"step {name} has no input {key}" for key in takes.keys() - {t.name for t in other.inputs}]
        wrong += [f"step {name} has no output {key}" for key in gives.keys() - {t.name for t in other.outputs}]
        for tensor in other.inputs:
            wrong += _fits(name, other.full(tensor), tensor, known, takes.get(tensor.name))
        for tensor in other.outputs:
            if tensor.name in gives:
                known[gives[tensor.name]] = (other.full(tensor), tensor.type, name)
    for tensor in model.outputs:
        wrong += _fits("the answer", model.full(tensor), tensor, known, tensor.name)
    return wrong


def _mapping(step: Mapping[str, list[Any]], side: str) -> dict[str, str]:
    return {str(one(entry, "key")): str(one(entry, "value")) for entry in step.get(side, [])}


def _fits(
    who: str,
    dims: tuple[int, ...],
    tensor: Tensor,
    known: Mapping[str, tuple[tuple[int, ...], str, str]],
    source: str | None,
) -> list[str]:
    if source is None or source not in known:
        return [f"nothing gives {tensor.name} to {who}" + (f" ({source} is unknown)" if source else "")]
    found, kind, maker = known[source]
    if kind == tensor.type and _match(found, dims):
        return []
    return [f"{who} takes {tensor.name} as {tensor.type} {list(dims)}, and {maker} gives {kind} {list(found)}"]


def _match(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == len(b) and all(x == y or -1 in (x, y) for x, y in zip(a, b, strict=True))
