"""A stranger's folder runs no code: not by modules that lie in it, not by a .git, not by programs named like a compiler."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imgcls_fast
from imgcls_fast.core import child, env
from imgcls_fast.core.files import read_sealed, write_sealed

PACKAGE = Path(imgcls_fast.__file__).parent
# `python -m` itself imports these, from the current folder, before it has read a line of ours
BEFORE_US = {
    "importlib",
    "warnings",
    "contextlib",
    "collections",
    "functools",
    "types",
    "operator",
    "keyword",
    "reprlib",
}
FOREIGN = (
    "numpy",
    "torch",
    "torchvision",
    "timm",
    "PIL",
    "yaml",
    "pydantic",
    "rich",
    "safetensors",
    "sklearn",
    "onnx",
    "jinja2",
)
PROGRAMS = (
    "git",
    "gcc",
    "g++",
    "c++",
    "cc",
    "clang",
    "nvcc",
    "trtexec",
    "nvidia-smi",
    "ptxas",
    "ld",
    "python",
    "python3",
    "ldconfig",
)


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that does something (writes ../ran) wherever anything of it is run."""
    folder = tmp_path_factory.mktemp("stranger") / "photos"
    ran = folder.parent / "ran"
    draw = np.random.default_rng(0)
    for label, level in (("cat", 60), ("dog", 190)):
        (folder / "data" / label).mkdir(parents=True)
        for k in range(12):
            pixels = draw.integers(level - 50, level + 50, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "data" / label / (f"{k}.tif" if k == 0 else f"{k}.png"))
    for name in (*sys.stdlib_module_names, *FOREIGN, "sitecustomize", "usercustomize"):
        (folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'a').write('module {name}\\n')\n")
    for name in PROGRAMS:
        (folder / name).write_text(f"#!/bin/sh\necho program {name} >> {ran}\nexit 1\n")
        (folder / name).chmod(0o755)
    (folder / "matplotlibrc").write_bytes(b"text.usetex: True\n# \xff\n")
    git = folder / ".git"
    (git / "objects").mkdir(parents=True)
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "refs" / "heads" / "main").write_text("0" * 40 + "\n")
    (git / "config").write_text(f'[core]\n\trepositoryformatversion = 0\n\tfsmonitor = "echo git >> {ran}"\n')
    return folder


def run(trap: Path, *words: str, how: str = "script", runs: bool = False) -> str:
    """One command line in the trap, with the current folder on PATH as careless people have it; its output."""
    (trap.parent / "ran").unlink(missing_ok=True)
    script = trap.parent / "imgcls-fast"  # what pip makes of an entry point
    script.write_text("import sys\nfrom imgcls_fast.cli.app import main\nsys.exit(main())\n")
    start = [str(script)] if how == "script" else ["-m", "imgcls_fast"]
    environment = os.environ | {"PATH": f".:{os.environ['PATH']}:"}
    environment |= {f"IMGCLS_{name.upper()}": str(trap.parent / name) for name in ("runs", "cache", "config")}
    done = subprocess.run(
        [sys.executable, *start, *words], cwd=trap, env=environment, capture_output=True, text=True, timeout=600
    )
    ran = trap.parent / "ran"
    assert ran.exists() == runs, f"{' '.join(words)}: {ran.read_text() if ran.exists() else done.stderr}"
    return done.stdout + done.stderr


def test_a_check_of_strange_images_in_their_folder_runs_nothing_of_it(trap: Path) -> None:
    assert "24 images, 2 classes" in run(trap, "data", "check", "data")


def test_python_m_runs_nothing_of_the_current_folder_from_our_first_line_on(trap: Path) -> None:
    aside = trap.parent / "aside"
    aside.mkdir()
    for name in BEFORE_US:
        (trap / f"{name}.py").rename(aside / f"{name}.py")
    try:
        assert run(trap, "--version", how="module").startswith("imgcls-fast ")
        assert "24 images, 2 classes" in run(trap, "data", "check", "data", how="module")
    finally:
        for path in aside.iterdir():
            path.rename(trap / path.name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_verb_runs_anything_of_the_current_folder(trap: Path) -> None:
    quick = ("--img-size", "32", "-m", "small-cnn", "-e", "1", "-b", "8", "--seed", "1")
    assert "accuracy" in run(trap, "train", "data", *quick, "--set", "data.split=.5,.25,.25", "-o", "../runs/a")
    for words in (
        "eval a", "predict a data/cat/0.tif", "report a", "runs list", "runs show a", "doctor", "data split data -o ../split.csv",
        "data stats data", "deploy render kserve a", "bench compare . .", "bench report . -o ../page", "demo --help",
        "export a --onnx --precision int8 --search 0", "export a --aoti", "bench a --runtime onnx -b 1 --duration 0.1s",
        "train ../runs/a --resume",
    ):  # fmt: skip
        assert "X001" not in run(trap, *words.split()), words

    plant_native_code(trap.parent / "runs" / "a", trap.parent)
    for words in (
        "verify a",
        "bench a -b 1 --duration 0.1s",
        "predict a data/cat/0.tif --runtime auto",
        "export a --aoti",
    ):
        assert "X001" not in run(trap, *words.split()), words
    assert "ran" not in run(
        trap, "predict", "a", "data/cat/0.tif", "--runtime", "aoti"
    )  # `export` has made an own one again
    plant_native_code(trap.parent / "runs" / "a", trap.parent)
    assert "error[E006]" in run(trap, "predict", "a", "data/cat/0.tif", "--runtime", "aoti")
    assert "error[E006]" in run(trap, "eval", "a", "--runtime", "aoti")
    said = run(trap, "predict", "a", "data/cat/0.tif", "--runtime", "aoti", "--trust", runs=True)
    assert "native code of unknown origin" in said


def plant_native_code(place: Path, here: Path) -> None:
    """Exchange the code in a run's AOTInductor package for a stranger's, and rewrite the digest in meta.json."""
    (here / "evil.c").write_text(
        "#include <stdio.h>\n__attribute__((constructor)) void run(void) "
        f'{{ FILE* f = fopen("{here / "ran"}", "a"); fputs("native code\\n", f); fclose(f); }}\n'
    )
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(here / "evil.so"), str(here / "evil.c")], check=True)
    (folder,) = (place / "exports").glob("aoti-*")
    package = folder / "model.pt2"
    with zipfile.ZipFile(package) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(package, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, (here / "evil.so").read_bytes() if name.endswith(".so") else data)
    meta = read_sealed(folder / "meta.json")
    meta |= {"sha256": hashlib.sha256(package.read_bytes()).hexdigest(), "bytes": package.stat().st_size}
    write_sealed(folder / "meta.json", meta)


@pytest.mark.parametrize("content", [b"text.usetex: True\n", b"\xff\n"], ids=["latex", "no text"])
@pytest.mark.parametrize(
    "draw",
    [
        "training_curves([{'epoch': 1, 'train_loss': 0.5}])['curves_loss']",
        "confusion(np.eye(2, dtype=int), ['a', 'b'])",
    ],
)
def test_settings_of_pictures_in_the_current_folder_are_not_read(content: bytes, draw: str, tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_bytes(content)
    text = (
        "from imgcls_fast.core.env import distrust_folder; distrust_folder()\n"
        "import numpy as np; from imgcls_fast.evaluation.plots import confusion, training_curves\n"
        f"assert {draw}.startswith(b'\\x89PNG')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_one_file_starts_processes() -> None:
    starts = {
        "Popen",
        "run",
        "call",
        "check_output",
        "check_call",
        "system",
        "popen",
        "execv",
        "execvp",
        "posix_spawn",
        "spawnv",
    }
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        called = [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]
        found = [
            name
            for name in called
            if name.rpartition(".")[0] in ("subprocess", "os") and name.rpartition(".")[2] in starts
        ]
        found += [
            ast.unparse(node)
            for node in nodes
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.executable"
        ]
        assert not found or path.relative_to(PACKAGE).as_posix() == "core/child.py", (path.name, found)


def test_a_child_is_this_package_wherever_it_starts(trap: Path) -> None:
    process = child.start("core.env", cwd=trap, stdout=subprocess.PIPE)
    assert process.communicate()[0] == b"" and process.returncode == 0
    assert not (trap.parent / "ran").exists()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/usr/bin:/bin", "/usr/bin:/bin"),
        (":/usr/bin", "/usr/bin"),
        ("/usr/bin:.:bin:/bin:", "/usr/bin:/bin"),
        ("", "/bin:/usr/bin"),
    ],
)
def test_programs_are_never_looked_for_in_the_current_folder(
    given: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", given)
    monkeypatch.setenv("PYTHONPATH", f"{given}::lib")
    found = env.child_environment()
    assert found["PATH"] == kept and "" not in found["PYTHONPATH"].split(":")[1:] and found["PYTHONSAFEPATH"] == "1"
    assert all(os.path.isabs(place) for place in found["PYTHONPATH"].split(":") if place)


def repository(place: Path, *, packed: bool, worktree: bool) -> Path:
    """A checkout of ours, as git lays it out; returns the package's folder."""
    commit = "ab" * 20
    git = place / ".git"
    if worktree:
        git = place.parent / "main" / ".git"
        own = git / "worktrees" / "x"
        own.mkdir(parents=True)
        (place).mkdir()
        (place / ".git").write_text(f"gitdir: {own}\n")
        (own / "HEAD").write_text("ref: refs/heads/topic\n")
        (own / "commondir").write_text("../..\n")
    else:
        git.mkdir(parents=True)
        (git / "HEAD").write_text("ref: refs/heads/topic\n")
    if packed:
        (git / "packed-refs").write_text(
            f"# pack-refs with: peeled\n{'cd' * 20} refs/heads/main\n{commit} refs/heads/topic\n"
        )
    else:
        (git / "refs" / "heads").mkdir(parents=True)
        (git / "refs" / "heads" / "topic").write_text(commit + "\n")
    return place / "python" / "imgcls_fast"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("worktree", [False, True])
def test_the_revision_of_our_own_checkout_is_read_from_files(tmp_path: Path, packed: bool, worktree: bool) -> None:
    assert env.own_revision(repository(tmp_path / "here", packed=packed, worktree=worktree)) == "ab" * 20


def test_there_is_no_revision_outside_a_checkout_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = repository(tmp_path / "here", packed=False, worktree=False)
    assert env.own_revision(tmp_path / "site-packages" / "imgcls_fast") is None
    (tmp_path / "here" / ".git" / "HEAD").write_text("nonsense")
    assert env.own_revision(package) is None
    (tmp_path / "here" / ".git" / "HEAD").unlink()
    assert env.own_revision(package) is None
