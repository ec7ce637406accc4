#!/usr/bin/env bash
# The steps of docker/Dockerfile.cuda, which .ci/run takes as well: no container engine is needed to know that they work.
#   steps.sh wheel DIST                    compiles the package; IMGCLS_CUDA and IMGCLS_CUDA_ARCHS as in CMakeLists.txt
#   steps.sh environment VENV DIST EXTRAS  installs the wheel with its extras, pinned by constraints.txt
#   steps.sh sbom VENV                     lists all that is installed in VENV/sbom.cdx.json (CycloneDX)
#   steps.sh check VENV                    fails where something is missing, or is there that an image should not hold
# PYTHON chooses the interpreter (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_CONSTRAINT="$PWD/constraints.txt" PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
python="${PYTHON:-python3}"
sbom_tool="cyclonedx-bom==7.5.0"

wheel() {
  local tools
  tools="$(mktemp -d)"
  "$python" -m venv "$tools"
  "$tools/bin/pip" wheel --quiet --no-deps --wheel-dir "$1" .
  rm -rf "$tools"
}

environment() {
  local wheels=("$2"/imgcls_fast-*.whl)
  [ "${#wheels[@]}" = 1 ] && [ -f "${wheels[0]}" ] || { echo "steps.sh: $2 must hold one wheel of imgcls-fast" >&2; exit 1; }
  "$python" -m venv "$1"
  "$1/bin/pip" install --quiet "${wheels[0]}[$3]"
}

sbom() {
  local tools
  tools="$(mktemp -d)" # in an environment of its own: the tool is no part of the image
  "$python" -m venv "$tools"
  "$tools/bin/pip" install --quiet "$sbom_tool"
  "$tools/bin/cyclonedx-py" environment --output-format JSON --spec-version 1.6 --output-file "$1/sbom.cdx.json" "$1/bin/python"
  rm -rf "$tools"
}

check() {
  "$1/bin/python" - "$1" <<'PYTHON'
import json
import sys
from importlib import metadata
from pathlib import Path

from imgcls_fast import _C

place = Path(sys.argv[1])
installed = {dist.metadata["Name"].lower().replace("_", "-") for dist in metadata.distributions()}
unwanted = installed & {"pytest", "hypothesis", "ruff", "mypy", "jupyter", "jupyterlab", "notebook", "ipykernel", "ipython"}
listed = {part["name"].lower().replace("_", "-") for part in json.loads((place / "sbom.cdx.json").read_text())["components"]}
missing = installed - listed - {"pip", "setuptools"}
tests = [str(path) for path in Path(_C.__file__).parent.rglob("test_*.py")]
if unwanted or missing or tests:
    sys.exit(f"steps.sh: not for an image: {sorted(unwanted) + tests}; not in the SBOM: {sorted(missing)}")
print(f"{len(listed)} packages listed, compiled half: {_C.build_info()}")
PYTHON
  "$1/bin/python" docker/healthcheck.py
}

case "${1:-}" in
  wheel | environment | sbom | check) "$@" ;;
  *) echo "usage: steps.sh wheel DIST | environment VENV DIST EXTRAS | sbom VENV | check VENV" >&2; exit 2 ;;
esac
