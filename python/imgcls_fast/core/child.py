"""How this package starts Python processes: with nothing of the current folder among the places where code is looked for.

`python -c` and `python -m` look for modules in the current folder first, and so would run a `csv.py` that lies among somebody's
images. `start` and `run` start this file by its path with -P. It loads exactly the package that it lies in, wherever that is,
and runs one of its modules.
"""

import sys

if __name__ == "__main__":  # before anything else is imported: Python reads -P itself, and this is only a second lock
    sys.path[:] = [place for place in sys.path if place not in ("", ".")]

import subprocess
from collections.abc import Mapping
from typing import Any


def command(module: str, *words: str, options: tuple[str, ...] = ()) -> list[str]:
    """The words that run a module of this package in a process of its own.

    Args:
        module: "measuring.race", as it is called inside the package.
        words: what it finds in `sys.argv[1:]`.
        options: for the interpreter: ("-W", "ignore").
    """
    return [sys.executable, "-P", *options, __file__, module, *words]


def start(
    module: str,
    *words: str,
    options: tuple[str, ...] = (),
    variables: Mapping[str, str] | None = None,
    **arguments: Any,
) -> "subprocess.Popen[bytes]":
    """`subprocess.Popen` of a module of this package.

    Args:
        module, words, options: as for `command`.
        variables: environment variables, beside this process's own.
        arguments: Popen's, without `env`.
    """
    from .env import child_environment

    environment = {**child_environment(), **(variables or {})}
    return subprocess.Popen(command(module, *words, options=options), env=environment, **arguments)


def run(
    module: str, *words: str, options: tuple[str, ...] = (), timeout: float | None = None
) -> "subprocess.CompletedProcess[bytes]":
    """`start`, until its end, with all that it wrote; never left alive, at Ctrl-C neither.

    Args:
        module, words, options: as for `command`.
        timeout: seconds.

    Raises:
        subprocess.TimeoutExpired: it was killed because it took longer.
    """
    pipe = subprocess.PIPE
    with start(module, *words, options=options, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as process:
        try:
            out, errors = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def start_alone(file: str, *words: str, **arguments: Any) -> "subprocess.Popen[bytes]":
    """`subprocess.Popen` of a file of this package that imports the standard library alone: the interpreter looks at nothing else."""
    return subprocess.Popen([sys.executable, "-I", "-S", file, *words], **arguments)


def _main() -> None:
    import runpy
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    home = Path(__file__).resolve().parents[1]
    spec = spec_from_file_location(home.name, home / "__init__.py", submodule_search_locations=[str(home)])
    assert spec is not None and spec.loader is not None
    package = sys.modules[home.name] = module_from_spec(spec)
    spec.loader.exec_module(package)
    module = f"{home.name}.{sys.argv.pop(1)}"
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
