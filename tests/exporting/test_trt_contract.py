"""Our use of TensorRT against the real Python bindings of 10.13, 10.16 and 11.4, which are imported without TensorRT.

Three links make the chain: mypy checks our modules against typings/tensorrt, stubtest and the checks below compare that file with
the bindings, and the doubles of the other tests are made of that file.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import imgcls_fast
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.engines import trt_plan

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(imgcls_fast.__file__).parent
TYPINGS = ROOT / "typings"
SOURCES = ("engines/trt_plan.py", "engines/trt_runtime.py", "exporting/trt_reports.py", "exporting/trt_engine.py")
VERSIONS = ("10.13.3.9", "10.16.1.11", "11.4.0.106")


def helper(name: str) -> ModuleType:
    """tests/trt/<name>.py as a module."""
    full = f"trt_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, ROOT / "tests" / "trt" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[full] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full]


bindings, doubles = helper("bindings"), helper("doubles")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where wheels are kept: in the cache if one is set, so that they are fetched once."""
    own = os.environ.get("IMGCLS_CACHE")
    return Path(own) / "trt-bindings" if own else tmp_path_factory.mktemp("wheels")


@pytest.fixture(scope="module", params=VERSIONS)
def real(
    request: pytest.FixtureRequest, wheels: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, str]]:
    """A version, and the environment in which `import tensorrt` gives its real bindings."""
    try:
        folder = tmp_path_factory.mktemp(f"bindings-{request.param}")
        return request.param, bindings.install(bindings.fetch(request.param, wheels), folder)
    except bindings.Unavailable as reason:
        pytest.skip(str(reason))


def child(code: str, environment: dict[str, str], *arguments: str) -> Any:
    """What a Python that sees the real bindings prints as JSON on its last line."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- the declared API against the bindings

# What stubtest says of every pybind11 class, and of a declared buffer before Python 3.12
NOISE = re.compile(
    r"metaclass differs$|__init__ is inconsistent, stub does not have \*args parameter \"args\"$"
    r"|IHostMemory\.__buffer__ is not present at runtime$"
)


@pytest.mark.slow
def test_stubtest_finds_every_declared_name_in_the_bindings(real: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    version, environment = real
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "tensorrt", "--ignore-missing-stub"],
        env={**environment, "MYPYPATH": str(TYPINGS)}, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    errors = re.findall(r"^error: (.*)$", done.stdout, re.MULTILINE)
    assert len(errors) > 20, (
        f"stubtest did not run: {done.stdout}{done.stderr}"
    )  # the noise itself shows that it saw the classes
    assert [error for error in errors if not NOISE.search(error)] == [], version


class Declared(NamedTuple):
    """The members of the .pyi: enumeration members, methods with their argument names, attributes and whether they are read-only."""

    members: list[str]
    methods: dict[str, list[str]]
    settable: list[str]
    readonly: list[str]


def declared() -> Declared:
    found = Declared([], {}, [], [])

    def visit(node: ast.ClassDef, prefix: str) -> None:
        path = f"{prefix}{node.name}"
        for entry in node.body:
            if isinstance(entry, ast.ClassDef):
                visit(entry, f"{path}.")
            elif isinstance(entry, ast.AnnAssign):
                name = f"{path}.{ast.unparse(entry.target)}"
                (found.members if "ClassVar" in ast.unparse(entry.annotation) else found.settable).append(name)
            elif isinstance(entry, ast.FunctionDef) and entry.decorator_list:
                found.readonly.append(f"{path}.{entry.name}")
            elif isinstance(entry, ast.FunctionDef) and entry.name != "__buffer__":
                found.methods[f"{path}.{entry.name}"] = [arg.arg for arg in entry.args.args[1:]]

    for node in ast.parse((TYPINGS / "tensorrt" / "__init__.pyi").read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef):
            visit(node, "")
    return found


LOOK = """
import json, sys, tensorrt
def look(path):
    value = tensorrt
    for name in path.split("."):
        value = getattr(value, name, None)
    return value
names = json.loads(sys.argv[1])
print(json.dumps({
    "version": tensorrt.__version__,
    "missing": [name for name in names["members"] if look(name) is None],
    "docs": {name: getattr(look(name), "__doc__", None) for name in names["methods"]},
    "setters": {name: getattr(look(name), "fset", None) is not None for name in names["settable"] + names["readonly"]},
}))
"""


@pytest.mark.slow
def test_every_member_argument_and_property_is_as_declared(real: tuple[str, dict[str, str]]) -> None:
    version, environment = real
    names = declared()
    assert len(names.members) >= 20 and len(names.methods) >= 60
    seen = child(LOOK, environment, json.dumps(names._asdict()))
    assert seen["version"] == version
    assert seen["missing"] == []
    assert [name for name in names.settable if not seen["setters"][name]] == []
    assert [name for name in names.readonly if seen["setters"][name]] == []
    wrong = {
        name: (arguments, signatures(seen["docs"][name]))
        for name, arguments in names.methods.items()
        if not any(accepts(form, arguments) for form in signatures(seen["docs"][name]))
    }
    assert wrong == {}


def signatures(doc: str | None) -> list[list[str]]:
    """Argument names of every overload that a pybind11 docstring lists; a default ends with "="."""
    forms = []
    for line in re.findall(r"^(?:\d+\. )?\w+\(self\b.*$", doc or "", re.MULTILINE):
        inside = line[line.index("(") + 1 : line.rindex(")")]
        parts = re.findall(r"(?:^|, )(\w+)(?=:)(?:: (?:[^,=\[<]|\[[^\]]*\])*(= )?)?", inside)
        forms.append([name + ("=" if default else "") for name, default in parts if name != "self"])
    return forms


def accepts(form: list[str], arguments: list[str]) -> bool:
    """Whether a call with the declared arguments fits; what is beyond them must have defaults."""
    return [name.rstrip("=") for name in form[: len(arguments)]] == arguments and all(
        name.endswith("=") for name in form[len(arguments) :]
    )


def test_signatures_are_read_from_the_docstrings_of_pybind11() -> None:
    doc = """f(*args, **kwargs)
        Overloaded function."""
    assert signatures(doc) == []
    text = "build(self: t.Builder, network: t.INetworkDefinition, config: list[int], text: object = <E.A: 0>) -> t.IHostMemory"
    assert signatures(f"1. {text}") == [["network", "config", "text="]]
    assert signatures("serialize(self: t.ITimingCache) -> t.IHostMemory") == [[]]
    assert accepts(["network", "config", "text="], ["network", "config"])
    assert not accepts(["network", "config", "text"], ["network", "config"])
    assert not accepts(["stream_handle"], ["stream"])


LISTEN = """
import json, tensorrt as trt
from imgcls_fast.engines import trt_plan
from imgcls_fast.exporting.trt_reports import Progress, error_recorder, progress_monitor
out = {"missing": trt_plan.trt_missing()}
with trt_plan.listening() as heard:
    trt.ILogger.log(trt_plan.logger(), trt.ILogger.Severity.ERROR, "an error")
    trt.ILogger.log(trt_plan.logger(), trt.ILogger.Severity.WARNING, "a warning")
    recorder = error_recorder(heard)
    trt.IErrorRecorder.report_error(recorder, trt.ErrorCodeTRT.UNSPECIFIED_ERROR, "for node /conv_1")
    out["memory"] = [heard.out_of_memory]
    trt.IErrorRecorder.report_error(recorder, trt.ErrorCodeTRT.FAILED_ALLOCATION, "too large")
    out["memory"].append(heard.out_of_memory)
out["heard"] = list(heard.texts)
out["recorded"] = trt.IErrorRecorder.num_errors(recorder)
out["first"] = trt.IErrorRecorder.get_error_desc(recorder, 0)
trt.IErrorRecorder.clear(recorder)
out["cleared"] = trt.IErrorRecorder.num_errors(recorder)
told = []
progress = Progress(lambda name, fraction: told.append((name, fraction)), lambda: len(told) > 2)
monitor = progress_monitor(progress)
trt.IProgressMonitor.phase_start(monitor, "Building", "", 4)
out["steps"] = [trt.IProgressMonitor.step_complete(monitor, "Building", step) for step in range(3)]
trt.IProgressMonitor.phase_finish(monitor, "Building")
out["told"] = told
print(json.dumps(out))
"""


@pytest.mark.slow
def test_our_listeners_are_reached_from_the_c_side_of_the_bindings(real: tuple[str, dict[str, str]]) -> None:
    _, environment = real
    environment = {**environment, "PYTHONPATH": f"{environment['PYTHONPATH']}{os.pathsep}{PACKAGE.parent}"}
    seen = child(LISTEN, environment)
    assert seen["heard"] == ["an error", "for node /conv_1", "too large"]
    assert seen["memory"] == [False, True]
    assert (seen["recorded"], seen["first"], seen["cleared"]) == (2, "for node /conv_1", 0)
    assert seen["steps"] == [True, False, False]
    assert seen["told"] == [["Building", 0.0], ["Building", 0.25], ["Building", 0.5]]
    assert seen["missing"] in ("", "there is no usable GPU")


START = """
import json, sys
from pathlib import Path
import torch
from imgcls_fast.core.errors import HardwareError
from imgcls_fast.core.files import sha256_file
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.engines import trt_plan, trt_runtime
from imgcls_fast.exporting import trt_engine
facts = {"gpu": "a", "compute_capability": [9, 0], "driver": "", "cuda": ""}
from contextlib import nullcontext
for name, value in {"count": staticmethod(lambda: 1), "facts": lambda self: facts, "active": lambda self: nullcontext()}.items():
    setattr(trt_plan.CudaDevice, name, value)
onnx, plan = Path(sys.argv[1]), Path(sys.argv[2])
said = []
def attempt(do):
    try:
        do()
    except HardwareError as error:
        said.append([error.code, error.message])
attempt(lambda: trt_engine.build_plan(onnx, plan, trt_engine.TrtOptions(batches=(1, 4, 8))))
said.append(plan.exists())
plan.write_bytes(b"plan")
meta = {"sha256": sha256_file(plan), "classes": ["a", "b", "c"], "hardware": "this", **trt_plan.machine(trt_plan.CudaDevice())}
pixels = Pixels(4, 0.875, "bilinear", "rgb", "apply", (0.5,) * 3, (0.25,) * 3)
attempt(lambda: trt_runtime.TrtEngine(plan, meta, LabelSpace.single(["a", "b", "c"]), pixels))
print(json.dumps(said))
"""


@pytest.mark.slow
def test_factories_that_give_nothing_are_h001_with_the_real_bindings_too(
    real: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    version, environment = real
    environment = {**environment, "PYTHONPATH": f"{environment['PYTHONPATH']}{os.pathsep}{PACKAGE.parent}"}
    onnx = doubles.tiny_onnx(tmp_path / "model.onnx")
    built, left, opened = child(START, environment, str(onnx), str(tmp_path / "model.plan"))
    assert (
        built
        == opened
        == ["H001", f"TensorRT {version} cannot start: pybind11::init(): factory function returned nullptr"]
    )
    assert left is False


@pytest.mark.slow
def test_a_python_without_wheels_is_told_as_the_reason_of_a_skip(tmp_path: Path) -> None:
    with pytest.raises(
        bindings.Unavailable, match=r"TensorRT 10\.16\.1\.11 bindings.*(for Python 2\.7|could not be fetched)"
    ):
        bindings.fetch("10.16.1.11", tmp_path, python="2.7")


# ---------------------------------------------------------------- our modules against the declared API


class Planted(NamedTuple):
    """A mistake: what to replace in which file, what mypy shall say, and what the doubles shall raise."""

    source: str
    old: str
    new: str
    said: str
    raised: type[Exception] | None


PLANTED = {
    "flag_of_weak_typing": Planted(
        "exporting/trt_engine.py", "config.clear_flag(trt.BuilderFlag.TF32)", "config.set_flag(trt.BuilderFlag.FP16)",
        'has no attribute "FP16"', AttributeError,
    ),
    "calibrator": Planted(
        "exporting/trt_engine.py", "config.builder_optimization_level = options.level", "config.int8_calibrator = None",
        '"IBuilderConfig" has no attribute "int8_calibrator"', AttributeError,
    ),
    "argument_type": Planted(
        "exporting/trt_engine.py", "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, round(",
        "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, str(", 'incompatible type "str"; expected "int"', TypeError,
    ),
    "path_for_text": Planted(
        "exporting/trt_engine.py", "parser.parse_from_file(str(onnx))", "parser.parse_from_file(onnx)",
        'incompatible type "Path"; expected "str"', TypeError,
    ),
    "misspelt_method": Planted(
        "engines/trt_runtime.py", "context.set_tensor_address(", "context.set_tensor_adress(",
        'has no attribute "set_tensor_adress"', AttributeError,
    ),
    "argument_left_out": Planted(
        "engines/trt_runtime.py", "context.execute_async_v3(self.stream.cuda_stream)", "context.execute_async_v3()",
        'Missing positional argument "stream_handle"', TypeError,
    ),
    "unchecked_none": Planted(
        "engines/trt_runtime.py", "if context is None:", "if not self.sizes and False:", '"IExecutionContext | None"', None,
    ),
}  # fmt: skip

CONFIG = """
[mypy]
python_version = 3.11
strict = True
follow_imports = silent
explicit_package_bases = True
mypy_path = {paths}
cache_dir = {cache}
[mypy-torch.*]
follow_imports = skip
ignore_missing_imports = True
[mypy-onnx.*,nvidia.*,timm.*,sklearn.*,torchvision.*]
ignore_missing_imports = True
"""


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with each planted mistake as a module of its own beside the module that it changes."""
    package = tmp_path_factory.mktemp("copies") / "imgcls_fast"
    shutil.copytree(
        PACKAGE, package, ignore=lambda folder, names: [n for n in names if n.endswith((".so", "__pycache__"))]
    )
    for name, planted in PLANTED.items():
        text = (PACKAGE / planted.source).read_text("utf-8")
        assert text.count(planted.old) == 1, f"{planted.old!r} is no longer in {planted.source}"
        (package / planted.source).with_name(f"planted_{name}.py").write_text(text.replace(planted.old, planted.new))
    return package


@pytest.fixture(scope="module")
def told(copies: Path) -> dict[str, list[str]]:
    """Errors of one strict run of mypy, by module: of ours and of the planted ones."""
    config = copies.parent / "mypy.ini"
    config.write_text(CONFIG.format(paths=f"{copies.parent}:{TYPINGS}", cache=copies.parent / "cache"))
    planted = [(copies / entry.source).with_name(f"planted_{name}.py") for name, entry in PLANTED.items()]
    files = [*(copies / source for source in SOURCES), *planted]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(config), "--no-error-summary", *map(str, files)],
        cwd=copies.parent, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    found: dict[str, list[str]] = {file.stem: [] for file in files}
    for line in done.stdout.splitlines():
        path, _, rest = line.partition(":")
        if " error: " in line:
            found.setdefault(Path(path).stem, []).append(rest)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_mypy_finds_nothing_in_our_modules_in_strict_mode(told: dict[str, list[str]], source: str) -> None:
    assert told[Path(source).stem] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_mypy_finds_the_planted_mistake_and_nothing_else(told: dict[str, list[str]], name: str) -> None:
    errors = told[f"planted_{name}"]
    assert errors and all(PLANTED[name].said in error for error in errors), errors


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made = doubles.World()
    with doubles.installed(made, monkeypatch):
        yield made


@pytest.mark.parametrize("name", [name for name, planted in PLANTED.items() if planted.raised])
def test_the_doubles_find_the_planted_mistake(world: Any, copies: Path, tmp_path: Path, name: str) -> None:
    planted = PLANTED[name]
    room = planted.source.partition("/")[0]
    path = (copies / planted.source).with_name(f"planted_{name}.py")
    spec = importlib.util.spec_from_file_location(f"imgcls_fast.{room}.planted_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        assert planted.raised is not None
        with pytest.raises(planted.raised):
            use(module, tmp_path)
    finally:
        del sys.modules[spec.name]


def use(module: ModuleType, folder: Path) -> None:
    """Build with a planted builder, or build well and run with a planted runner."""
    from imgcls_fast.exporting import trt_engine

    module.CudaDevice = trt_plan.CudaDevice  # type: ignore[attr-defined]
    builder: Any = module if hasattr(module, "build_plan") else trt_engine
    onnx, plan = doubles.tiny_onnx(folder / "model.onnx"), folder / "model.plan"
    meta = builder.build_plan(onnx, plan, builder.TrtOptions(batches=(1, 4, 8)))
    runner: Any = module
    pixels = Pixels(4, 0.875, "bilinear", "rgb", "apply", (0.5,) * 3, (0.25,) * 3)
    engine = runner.TrtEngine(plan, {**meta, "classes": ["a", "b", "c"]}, LabelSpace.single(["a", "b", "c"]), pixels)
    engine.warmup(1)
