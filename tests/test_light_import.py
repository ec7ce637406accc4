"""Help, the version and a typing mistake must answer at once: nothing but the standard library is imported for them."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROBE = """
import sys
before = set(sys.modules)
from imgcls_fast.cli.app import main
code = main({argv!r})
new = {{name.split('.')[0] for name in set(sys.modules) - before}}
foreign = sorted(new - set(sys.stdlib_module_names) - {{'imgcls_fast'}})
print('CODE', code, 'FOREIGN', [name for name in foreign if not name.startswith('_')])
"""


def run_python(text: str) -> str:
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["data", "check", "--help"], 0),
        (["trian"], 2),
        (["train", "--epoch", "3"], 2),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_help_version_and_typing_mistakes_import_only_the_standard_library(argv: list[str], code: int) -> None:
    assert run_python(_PROBE.format(argv=argv)).splitlines()[-1] == f"CODE {code} FOREIGN []"


def test_importing_the_package_imports_no_library() -> None:
    text = "import sys; import imgcls_fast; print(sorted({'torch', 'numpy', 'pydantic', 'PIL', 'sklearn'} & set(sys.modules)))"
    assert run_python(text).strip() == "[]"


def test_a_wrong_setting_costs_no_import_of_torch() -> None:
    text = (
        "import sys; from imgcls_fast.cli.app import main; code = main(['train', 'x', '--set', 'train.epohs=3']);"
        "print(code, 'torch' in sys.modules)"
    )
    assert run_python(text).splitlines()[-1] == "2 False"


@pytest.mark.parametrize(
    "room", ["core.run", "loading.loader", "evaluation.metrics", "models.build", "training.plan", "engines.base"]
)
def test_importing_a_room_starts_no_gpu_and_reads_no_environment(room: str) -> None:
    text = (
        "import os, sys\n"
        f"import imgcls_fast.{room}\n"
        "torch = sys.modules.get('torch')\n"
        "print(bool(torch and torch.cuda.is_initialized()))"
    )
    assert run_python(text).strip() == "False"
