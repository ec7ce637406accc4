"""The one place that reads the environment: caches, versions, machine facts, what was built."""

from __future__ import annotations

import os
import platform
import re
import sys
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from . import homes
from .compilers import Lack, compiler_lack, compiler_name
from .cpus import Cpus, count_cpus
from .errors import HardwareError

LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "nvidia-dali-cuda130",
    "numpy",
    "pillow",
    "scikit-learn",
    "safetensors",
    "pydantic",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "nvidia-modelopt",
    "tensorrt",
    "tensorboard",
)
_NAME = "imgcls-fast"
_lowered: dict[str, str | None] = {}  # OMP_NUM_THREADS as it was found, and what `calm_threads` made of it
_COMMIT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_lent: list[Path] = []  # the home that this process was given because its user has none
_DRIVER = Path("/proc/driver/nvidia/version")
# the libraries whose version can change the bits of a resumed run
NUMERIC_LIBRARIES = ("torch", "torchvision", "timm", "nvidia-dali-cuda130", "numpy", "pillow")


def calm_threads() -> None:
    """Let waiting OpenMP threads spin for microseconds and then sleep, unless the user has decided otherwise.

    Must be called before torch is loaded. Loader threads and other processes share the cores with training, and by
    default a waiting thread spins through the very time slice that the thread it waits for needs. A training step of
    small-cnn at 32 pixels, 2 threads on 2 cores: 47 ms by default and 40 ms with this on a quiet machine; with 8 more
    runnable processes 5,140 ms by default, and with 4 more 196 ms with this. Never spinning at all
    (OMP_WAIT_POLICY=PASSIVE) took 132 ms on the quiet machine.

    And let every library start as many threads as there are cores to run on: by themselves they count the whole machine's,
    of which a container may use a share only (see `cpus`).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    counted = cpus()
    if counted.cores < (counted.asked or counted.affinity):
        _lowered.update(found=os.environ.get("OMP_NUM_THREADS"), now=str(counted.threads))
        os.environ["OMP_NUM_THREADS"] = str(counted.threads)


def distrust_folder() -> None:
    """Look for no program and, in processes that this one starts, for no module in the current folder.

    For the command line: torch starts compilers by name and workers with `python -m`.
    """
    os.environ.update(child_environment())


def folder_is_distrusted() -> bool:
    """Whether nothing of the current folder may shape what this process does: so in the command line."""
    return bool(os.environ.get("PYTHONSAFEPATH"))


def terminal_moves() -> bool:
    """Whether a terminal of this kind can draw over what it has shown."""
    return os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def child_environment() -> dict[str, str]:
    """The environment of a process that is started: no module and no program is looked for in its current folder.

    An empty or relative entry of PATH or PYTHONPATH means a place in the current folder, whoever's folder that is.
    """
    changed = {"PYTHONSAFEPATH": "1"}
    for name, default in (("PATH", os.defpath.lstrip(":")), ("PYTHONPATH", "")):
        if name in os.environ:
            places = [place for place in os.environ[name].split(os.pathsep) if os.path.isabs(place)]
            changed[name] = os.pathsep.join(places) or default
    return {**os.environ, **changed}


def cache_dir() -> Path:
    """Where extracted archives and the embedded data go: $IMGCLS_CACHE, else the user's cache folder.

    Where that cannot be written, or there is no home, a folder below $TMPDIR that only this user can open, with one warning.

    Raises:
        HardwareError: H003 when there is no such place either.
    """
    own = os.environ.get("IMGCLS_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = homes.home(os.environ)
    usual = Path(base) if os.path.isabs(base) else home / ".cache" if home else None
    if usual is not None and homes.is_writable(usual / "imgcls-fast"):
        if home in _lent and not base:
            _warn_of_home(None, usual / "imgcls-fast")
        return usual / "imgcls-fast"
    folder = homes.below_temporary(os.environ) / ".cache" / "imgcls-fast"
    _warn_of_home(usual, folder)
    return folder


@cache
def _warn_of_home(usual: Path | None, folder: Path) -> None:
    why = f"{usual} cannot be written" if usual else f"user {os.geteuid()} has no home folder"
    text = f"{why}: cached files go to {folder} (IMGCLS_CACHE names another place)"
    warnings.warn(text, stacklevel=3)


def config_dir() -> Path | None:
    """Path of the user's own key: $IMGCLS_CONFIG, else the user's configuration folder, else one below $TMPDIR; None: nowhere."""
    own, base = os.environ.get("IMGCLS_CONFIG"), os.environ.get("XDG_CONFIG_HOME", "")
    if own:
        return Path(own)
    home = homes.home(os.environ)
    usual = Path(base) if os.path.isabs(base) else home / ".config" if home else None
    if usual is not None and (os.path.isdir(usual / "imgcls-fast") or homes.is_writable(usual)):
        return usual / "imgcls-fast"
    try:
        return homes.below_temporary(os.environ) / ".config" / "imgcls-fast"
    except HardwareError:
        return None


def lend_home() -> None:
    """Name a home for libraries where this user has none: they would make a folder called ~ in the current one. For the command line."""
    if homes.home(os.environ) is None:
        with suppress(HardwareError):  # what needs a place of its own will name it
            _lent.append(homes.below_temporary(os.environ))
            os.environ["HOME"] = str(_lent[-1])


def lend_matplotlib_home() -> None:
    """Name a folder for matplotlib's list of fonts where its own cannot be written: it would complain, and list them each time again."""
    home, base = homes.home(os.environ), os.environ.get("XDG_CONFIG_HOME")
    usual = Path(base) if base else home / ".config" if home else None
    if "MPLCONFIGDIR" not in os.environ and (usual is None or not homes.is_writable(usual / "matplotlib")):
        with suppress(HardwareError):
            os.environ["MPLCONFIGDIR"] = str(homes.below_temporary(os.environ) / ".config" / "matplotlib")


def runs_dir() -> Path:
    """Where runs go when no place is named: $IMGCLS_RUNS, else ./runs."""
    return Path(os.environ.get("IMGCLS_RUNS", "runs"))


def cpus() -> Cpus:
    """What bounds the number of threads of this process: affinity mask, CPU quota of the container, OMP_NUM_THREADS."""
    value = os.environ.get("OMP_NUM_THREADS")
    return count_cpus(_lowered["found"] if _lowered and _lowered["now"] == value else value)


def usable_cpus() -> int:
    """Threads for any one piece of work: the only count of cores that the package makes."""
    return cpus().threads


def lacks_compiler(device: str, *, package: bool = False) -> Lack | None:
    """What torch.compile, or AOTInductor for a `package`, would miss on this machine; None if nothing. See `compilers`."""
    return compiler_lack(device, os.environ, package=package)


def cxx_compiler() -> str | None:
    """Path of the C++ compiler that torch would call; None without one."""
    return compiler_name(os.environ)


def require_compiler(device: str, purpose: str, otherwise: str, *, package: bool = False) -> None:
    """Refuse before anything was done for nothing.

    Args:
        purpose: what needs the compiler.
        otherwise: what can be done without one.

    Raises:
        HardwareError: H004, with the line that installs what is missing.
    """
    if lack := lacks_compiler(device, package=package):
        raise HardwareError("H004", f"{lack.what}, and {purpose} needs it", try_=f"{lack.remedy}   (or {otherwise})")


def cpu_name() -> str:
    """The processor's model name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def busy_s() -> float | None:
    """CPU seconds that all processes of the machine have used since it started; None where the system does not say."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, irq, softirq = map(int, file.readline().split()[1:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str | None]:
    """Installed version of each library; None where it is not installed."""
    from importlib import metadata

    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def package_version() -> str:
    """The version of imgcls-fast itself."""
    return versions((_NAME,))[_NAME] or "0+unknown"


def own_revision(package: Path | None = None) -> str | None:
    """The commit that a checkout of imgcls-fast itself stands at; None where the package was installed without one.

    Read from files. `git` is never run: the configuration of a repository names programs that git starts, and the current
    folder may be a stranger's.
    """
    package = package or Path(__file__).resolve().parents[1]
    if package.parent.name != "python":  # <checkout>/python/imgcls_fast
        return None
    try:
        return _revision(package.parents[1] / ".git")
    except (OSError, ValueError):
        return None


def _revision(git: Path) -> str | None:
    if git.is_file():  # of a second working tree
        git = git.parent / git.read_text("utf-8").removeprefix("gitdir:").strip()
    shared = git / "commondir"
    common = git / shared.read_text("utf-8").strip() if shared.is_file() else git
    head = (git / "HEAD").read_text("utf-8").strip()
    name = head.removeprefix("ref:").strip()
    if name == head:
        return head if _COMMIT.fullmatch(head) else None
    if (common / name).is_file():
        found = (common / name).read_text("utf-8").strip()
    else:
        lines = (common / "packed-refs").read_text("utf-8").splitlines()
        found = next((line.split()[0] for line in lines if line.split()[1:] == [name]), "")
    return found if _COMMIT.fullmatch(found) else None


def gpu_driver() -> str | None:
    """Version of NVIDIA's driver, None where there is none."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text("utf-8"))
    except OSError:
        return None
    return found.group() if found else None


def install_hint(extra: str) -> str:
    """The pip line that adds an extra to this very installation.

    Nobody has registered the bare name on a public index, and whoever does so would be installed by it. So the line names what
    this installation was made from (direct_url.json, PEP 610) while that is still there, the exact version where it came
    from an index, and otherwise only the libraries that the extra asks for.
    """
    words = _origin(f"[{extra}]") or _requirements(extra)
    # a copied folder without metadata or pyproject.toml: an empty pip line helps nobody
    return _pip(*words) if words else f"what the extra {extra!r} of the project's pyproject.toml lists"


def reinstall_hint() -> str:
    """The command that makes this installation once more, compiled half included."""
    found = _distribution()
    if found is None:
        return "scripts/dev_build.sh, or pip install . in its checkout"
    origin = _origin("") if found.read_text("direct_url.json") else []
    if origin:
        return _pip("--force-reinstall", "--no-deps", *origin)
    # by its name alone pip would fetch it from whatever index it asks first
    return f"install {_NAME} {found.version} again from the file, the folder or the index that it came from"


def requirement_hint(name: str) -> str:
    """The pip line for one of our own requirements, within the versions that we ask for."""
    wanted = [line for line in _requirements("") if re.split(r"[^\w.-]", line)[0] == name]
    return _pip(*(wanted or [name]))


def _pip(*words: str) -> str:
    import shlex

    found = _distribution()
    uv = found is not None and (found.read_text("INSTALLER") or "").strip() == "uv"
    return f"{'uv ' if uv else ''}pip install {shlex.join(words)}"


def _distribution() -> Any:
    from importlib import metadata

    try:
        return metadata.distribution(_NAME)
    except metadata.PackageNotFoundError:
        return None


def _origin(extra: str) -> list[str]:
    """The words that name what this installation was made from, with an extra in brackets; none where it is gone or not known."""
    import json
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    found = _distribution()
    if found is None:
        return []
    text = found.read_text("direct_url.json")
    if text is None:
        asked = (found.read_text("INSTALLER") or "").strip() in ("pip", "uv")
        return [f"{_NAME}{extra}=={found.version}"] if asked else []
    origin = json.loads(text)
    url = str(origin.get("url", ""))
    path = Path(url2pathname(urlsplit(url).path)) if url.startswith("file:") else None
    if "dir_info" in origin:
        if path is None or not (path / "pyproject.toml").is_file():
            return []
        return [*(["-e"] if origin["dir_info"].get("editable") else []), f"{path}{extra}"]
    if path is not None:  # a wheel or an archive on this disk
        return [f"{path}{extra}"] if path.is_file() else []
    vcs = origin.get("vcs_info")
    return [f"{_NAME}{extra} @ {vcs['vcs']}+{url}@{vcs['commit_id']}" if vcs else f"{_NAME}{extra} @ {url}"]


def _requirements(extra: str) -> list[str]:
    """What an extra ("": no extra) requires, by the package's own metadata or the checkout's; extras of ours are followed."""
    found = _distribution()
    if found is not None:
        lines = [tuple(line.partition(";")[::2]) for line in found.requires or []]
        marked = [(line.strip(), re.search(r"""extra\s*==\s*["']([^"']+)""", marker)) for line, marker in lines]
        wanted = [line for line, one in marked if (one.group(1) if one else "") == extra]
    else:
        wanted = [line.partition(";")[0].strip() for line in _checkout_requires(extra)]
    plain = [line for line in wanted if not line.startswith(f"{_NAME}[")]
    inner = [name for line in wanted if line.startswith(f"{_NAME}[") for name in line[len(_NAME) + 1 : -1].split(",")]
    return list(dict.fromkeys([*(one for name in inner for one in _requirements(name.strip())), *plain]))


def _checkout_requires(extra: str) -> list[str]:
    import tomllib

    package = Path(__file__).resolve().parents[1]
    try:
        project = tomllib.loads((package.parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    except (OSError, LookupError, ValueError):
        return []
    return list(project["optional-dependencies"].get(extra, ()) if extra else project["dependencies"])


def machine_facts() -> dict[str, Any]:
    """What a reader needs to judge a figure: interpreter, system, processor, versions."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "cpus": cpus().cores,
        "imgcls_fast": package_version(),
        "libraries": versions(),
    }


def machine_slug(device: str | None = None) -> str:
    """A folder name for figures of this machine: "intel-xeon-processor-2core", or the GPU's name where one is given."""
    text = device if device is not None else f"{cpu_name()} {cpus().cores}core"
    return "-".join(re.sub(r"\((r|tm)\)|[^a-z0-9]", " ", text.lower()).split())


def run_facts(seed: int) -> dict[str, Any]:
    """`machine_facts` with the command line, our own commit and the seed: env.json of a run."""
    return machine_facts() | {"command": sys.argv, "git": own_revision(), "seed": seed}


def build_info() -> dict[str, Any]:
    """What the compiled extension holds, and why not more.

    Raises:
        HardwareError: H004 when the extension was not built.
    """
    try:
        from imgcls_fast import _C
    except ImportError as error:
        raise HardwareError(
            "H004",
            f"the compiled extension imgcls_fast._C cannot be loaded: {error}",
            try_=reinstall_hint(),
        ) from error
    return dict(_C.build_info())


def require(module: str, extra: str, purpose: str) -> Any:
    """Import an optional library; without it, raise an error that names the extra.

    Raises:
        HardwareError: H004, with the exact pip line.
    """
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise HardwareError(
            "H004",
            f"{module.split('.')[0]} is not installed, and {purpose} needs it",
            try_=install_hint(extra),
        ) from error
