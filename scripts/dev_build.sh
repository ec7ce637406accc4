#!/usr/bin/env bash
# Compiles imgcls_fast._C in place and makes the source tree importable by this Python, so that `pytest` and the
# console see every edit at once. PYTHON chooses the interpreter (default: .venv/bin/python, else python3).
# Needs pybind11 in that Python (pip install 'pybind11>=3,<4'), CMake and Ninja or make. JOBS=N compiles N files at once.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
python="$(realpath -s "$python")" # not resolved: a link into a virtual environment must stay one
build="build/dev"
version="$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml | head -n 1)"
generator=()
command -v ninja >/dev/null && [ ! -f "$build/CMakeCache.txt" ] && generator=(-G Ninja)
cmake -S . -B "$build" "${generator[@]}" \
  -DSKBUILD_PROJECT_VERSION="$version" \
  -DPython_EXECUTABLE="$python" \
  -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')"
cmake --build "$build" --parallel "${JOBS:-1}"
cp "$build"/_C.*.so python/imgcls_fast/
"$python" - <<'PYTHON'
import pathlib, sysconfig

site = pathlib.Path(sysconfig.get_path("purelib"))
(site / "imgcls_fast_dev.pth").write_text(f"{pathlib.Path('python').resolve()}\n")
PYTHON
"$python" -c 'from imgcls_fast import _C; print(_C.build_info())'
