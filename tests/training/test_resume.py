"""Stopping and continuing: the resumed run ends in the bits of the uninterrupted one, or says why it cannot."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from imgcls_fast.core.errors import DataError, Interrupted, ModelError
from imgcls_fast.core.run import Run
from imgcls_fast.data import reach
from imgcls_fast.training import checkpoint, judging, session
from imgcls_fast.training.fit import Fit
from imgcls_fast.training.step import Step

STEPS = 5  # of an epoch: 42 // 8


def run_of(config: Any) -> Run:
    return Run(Path(config.out))


def interrupted(config: Any) -> Run:
    """Start a run that a signal stops."""
    with pytest.raises(Interrupted) as stopped:
        session.start(config)
    assert stopped.value.exit_code == 130
    assert stopped.value.try_ == f"imgcls-fast train {config.out} --resume"
    return run_of(config)


def change_environment(run: Run, change: Callable[[dict[str, Any]], None]) -> None:
    """Change where and by what the newest checkpoint was computed, with its digest."""
    change_state(run, lambda state: change(state["environment"]))


def change_state(run: Run, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the newest checkpoint recorded beside its tensors, with its digest."""
    folder = run.checkpoints / "last"
    state = json.loads((folder / checkpoint.STATE).read_text())
    change(state)
    (folder / checkpoint.STATE).write_text(json.dumps(state))
    digests = json.loads((folder / checkpoint.DIGESTS).read_text())
    digests[checkpoint.STATE] = hashlib.sha256((folder / checkpoint.STATE).read_bytes()).hexdigest()
    (folder / checkpoint.DIGESTS).write_text(json.dumps(digests))


WAYS = {
    "fp32-sgd-cosine-torch0": {"train.precision": "fp32", "optim.opt": "sgd", "optim.sched": "cosine"},
    "fp32-adamw-onecycle-torch2": {"optim.opt": "adamw", "optim.sched": "onecycle", "train.loader": "torch", "train.workers": 2},
    "bf16-adamw-plateau-dali": {"train.precision": "bf16", "optim.opt": "adamw", "optim.sched": "plateau", "optim.plateau_patience": 1,
                                "train.loader": "dali-cpu", "train.workers": 2, "train.epochs": 4},
    "bf16-sgd-onecycle-torch0": {"train.precision": "bf16", "optim.opt": "sgd", "optim.sched": "onecycle", "optim.clip": 1.0},
    "fp32-sgd-step-dali-accum": {"optim.opt": "sgd", "optim.sched": "step", "train.loader": "dali-cpu", "train.workers": 1,
                                 "train.accum": 3, "optim.ema": 0, "loss.class_weights": "auto"},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", [2, STEPS, STEPS + 3], ids=lambda s: f"step{s}")
@pytest.mark.usefixtures("no_judging")
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(
    way: str, step: int, configure: Callable[..., Any], stop_at: Callable[..., None], same_result: Callable[..., None]
) -> None:
    straight = session.start(configure(WAYS[way]))
    stop_at(step)
    broken = interrupted(configure(WAYS[way]))
    progress = checkpoint.read_checkpoint(broken.checkpoints / "last").progress
    assert progress.step == step
    torch.manual_seed(99)  # what the process did in between must not matter
    session.resume(broken, {})
    same_result(straight, broken)


@pytest.mark.usefixtures("no_judging")
def test_stopping_at_every_single_step_ends_in_the_same_bits(
    configure: Callable[..., Any], stop_at: Callable[..., None], same_result: Callable[..., None]
) -> None:
    straight = session.start(configure())
    stop_at(1)
    run = interrupted(configure())
    for step in range(2, 2 * STEPS):
        stop_at(step)
        with pytest.raises(Interrupted):
            session.resume(run, {})
    session.resume(run, {})
    same_result(straight, run)


@pytest.mark.usefixtures("no_judging")
def test_a_checkpoint_of_the_schema_before_is_continued_with_the_same_bits(
    configure: Callable[..., Any], stop_at: Callable[..., None], same_result: Callable[..., None]
) -> None:
    plateau = {"optim.sched": "plateau", "optim.plateau_patience": 1, "train.micro_batch": 4}
    straight = session.start(configure(plateau))
    stop_at(3)
    broken = interrupted(configure(plateau))

    def as_before(state: dict[str, Any]) -> None:
        state["schema"] = 1
        state["progress"] |= state.pop("parts")["step"]

    change_state(broken, as_before)
    session.resume(broken, {})
    same_result(straight, broken)


@pytest.mark.usefixtures("no_judging")
def test_a_signal_during_validation_saves_and_resumes_with_the_same_bits(
    configure: Callable[..., Any], stop_at: Callable[..., None], same_result: Callable[..., None]
) -> None:
    straight = session.start(configure())
    stop_at(STEPS, where="validate")
    broken = interrupted(configure())
    progress = checkpoint.read_checkpoint(broken.checkpoints / "last").progress
    assert (progress.epoch, progress.index, progress.step) == (0, STEPS, STEPS)
    session.resume(broken, {})
    same_result(straight, broken)


@pytest.mark.usefixtures("no_judging")
def test_a_signal_after_the_last_step_is_not_lost(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, same_result: Callable[..., None]
) -> None:
    straight = session.start(configure())
    original = Fit._finish_epoch

    def finish(self: Fit, *arguments: Any) -> None:
        if self.progress.epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "_finish_epoch", finish)
        broken = interrupted(configure())
    session.resume(broken, {})
    same_result(straight, broken)


@pytest.mark.parametrize("victim", ["make_bundle", "report_run"])
def test_a_run_killed_between_training_and_bundle_or_report_is_finished_by_resume(
    victim: str, configure: Callable[..., Any], monkeypatch: Any
) -> None:
    config = configure({"train.epochs": 1})

    def die(*arguments: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(judging, victim, die)
        run = interrupted(config)
    assert not run.report_path.exists()
    assert run.finished == (victim == "report_run")
    session.resume(run, {})
    assert run.finished
    assert run.report_path.exists()
    assert len(run.epochs) == 1


@pytest.mark.usefixtures("no_judging")
def test_metrics_csv_is_complete_after_a_kill_between_checkpoint_and_csv(
    configure: Callable[..., Any], monkeypatch: Any
) -> None:
    config = configure()

    def die(self: Run, epochs: Any) -> None:
        if len(epochs) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_epochs", die)
        run = interrupted(config)
    session.resume(run, {})
    assert [line["epoch"] for line in run.epochs] == [1, 2]


def test_resuming_a_finished_run_says_so_and_changes_nothing(configure: Callable[..., Any]) -> None:
    run = session.start(configure({"train.epochs": 1}))
    before = {path: path.read_bytes() for path in (run.bundle_path / "weights.safetensors", run.report_path)}
    heard: list[dict[str, Any]] = []
    session.resume(run, {}, [heard.append])
    assert any("finished" in e.get("text", "") and "--init" in e["text"] for e in heard if e["event"] == "warning")
    assert not any(e["event"] == "start" for e in heard)
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.usefixtures("no_judging")
class TestWhatMayChange:
    """Settings, files, versions."""

    @pytest.fixture
    def broken(self, configure: Callable[..., Any], stop_at: Callable[..., None], own_data: Path) -> Run:
        stop_at(2)
        return interrupted(configure({}, own_data))

    @pytest.mark.parametrize(
        ("name", "value"),
        [("optim.lr", 0.5), ("train.epochs", 9), ("train.batch_size", 4), ("pixels.size", 48), ("train.seed", 5)],
    )
    def test_a_setting_that_shapes_the_weights_is_refused_by_name(self, broken: Run, name: str, value: Any) -> None:
        with pytest.raises(ModelError, match=name) as refused:
            session.resume(broken, {name: value})
        assert refused.value.code == "M006"

    @pytest.mark.parametrize(
        ("name", "line"),
        [("optim.lr", "  lr: 0.5\n"), ("train.epochs", "  epochs: 9\n"), ("train.batch_size", "  batch_size: 4\n")],
    )
    def test_an_edited_config_yaml_is_refused_by_name(self, broken: Run, name: str, line: str) -> None:
        text = broken.config_path.read_text()
        edited = re.sub(rf"^{line.split(':')[0]}:.*\n", line, text, count=1, flags=re.MULTILINE)
        assert edited != text
        broken.config_path.write_text(edited)
        for _ in range(2):  # recorded twice: in the plan, and in each checkpoint
            with pytest.raises(ModelError, match=name) as refused:
                session.resume(broken, {})
            assert refused.value.code == "M006"
            facts = broken.read_json("plan.json")
            facts.pop("trajectory", None)
            broken.write_json("plan.json", facts)
        broken.config_path.write_text(text)
        session.resume(broken, {})

    def test_an_edited_plan_is_refused_by_name(self, broken: Run) -> None:
        facts = broken.read_json("plan.json")
        facts["augment"]["flip"] = 0.25
        broken.write_json("plan.json", facts)
        with pytest.raises(ModelError, match=r"augment\.flip") as refused:
            session.resume(broken, {})
        assert refused.value.code == "M006"

    @pytest.mark.parametrize("what", ["sampler", "draws", "augmentation"])
    def test_another_layout_of_random_numbers_is_refused_by_name(
        self, broken: Run, what: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from imgcls_fast.training import identity

        name = {"sampler": "SAMPLER_LAYOUT", "draws": "DRAW_LAYOUT", "augmentation": "AUGMENT_LAYOUT"}[what]
        monkeypatch.setattr(identity, name, 99)
        with pytest.raises(ModelError, match=f"layout of the {what} was 1 and is now 99"):
            session.resume(broken, {})

    def test_names_that_an_earlier_version_did_not_record_do_not_refuse_resume(self, broken: Run) -> None:
        def forget(environment: dict[str, Any]) -> None:
            del environment["trajectory"]["optim.gamma"]  # a setting with a default, which the run has
            del environment["trajectory"]["plan spec.drop_path"]
            del environment["trajectory"]["layout of the draws"]  # the first one, until it was recorded

        facts = broken.read_json("plan.json")
        forget(facts)
        broken.write_json("plan.json", facts)
        change_environment(broken, forget)
        heard: list[dict[str, Any]] = []
        session.resume(broken, {}, [heard.append])
        texts = [e["text"] for e in heard if e["event"] == "warning"]
        assert len(texts) == 1
        assert "plan spec.drop_path was not recorded, is 0" in texts[0]
        assert "bitwise" in texts[0]

    def test_an_unrecorded_setting_that_is_not_at_its_default_is_refused_by_name(self, broken: Run) -> None:
        def forget(environment: dict[str, Any]) -> None:
            environment["trajectory"].pop("optim.gamma")

        facts = broken.read_json("plan.json")
        forget(facts)
        broken.write_json("plan.json", facts)
        text = broken.config_path.read_text()
        broken.config_path.write_text(text.replace("gamma: 0.1", "gamma: 0.2"))
        with pytest.raises(ModelError, match=r"optim\.gamma was 0\.1 and is now 0\.2") as refused:
            session.resume(broken, {})
        assert refused.value.code == "M006"

    def test_a_checkpoint_of_an_earlier_version_resumes_with_a_warning(self, broken: Run) -> None:
        def forget(environment: dict[str, Any]) -> None:
            del environment["trajectory"], environment["versions"]["imgcls-fast"]

        facts = broken.read_json("plan.json")
        facts.pop("trajectory")
        broken.write_json("plan.json", facts)
        change_environment(broken, forget)
        heard: list[dict[str, Any]] = []
        session.resume(broken, {}, [heard.append])
        texts = [e["text"] for e in heard if e["event"] == "warning"]
        assert len(texts) == 1
        assert "earlier version" in texts[0]

    def test_another_gpu_driver_or_own_version_is_reported_by_name(self) -> None:
        from imgcls_fast.training.identity import environment_differences, environment_key

        before = environment_key(1, "off") | {"GPU": "H100", "driver": "570", "CUDA": "13.0", "cuDNN": 90000}
        now = {**before, "driver": "580", "cuDNN": 91000, "versions": {**before["versions"], "imgcls-fast": "9"}}
        texts = "; ".join(environment_differences(before, now))
        assert "driver was 570, is 580" in texts
        assert "cuDNN was 90000, is 91000" in texts
        assert "imgcls-fast was" in texts
        assert "GPU" not in texts
        assert environment_differences(before, before) == []

    def test_free_settings_may_change_and_are_kept(self, broken: Run, tmp_path: Path) -> None:
        where = broken.config.out
        session.resume(
            broken,
            {"train.workers": 1, "train.save_every": 5.0, "evaluate.bootstrap": 33, "out": str(tmp_path / "elsewhere")},
        )
        assert (broken.config.train.workers, broken.config.train.save_every, broken.config.evaluate.bootstrap) == (
            1,
            5.0,
            33,
        )
        assert broken.config.out == where
        assert not (tmp_path / "elsewhere").exists()

    def test_another_thread_count_warns_that_the_bits_may_differ(self, broken: Run) -> None:
        heard: list[dict[str, Any]] = []
        session.resume(broken, {"train.threads": 2}, [heard.append])
        texts = [e["text"] for e in heard if e["event"] == "warning"]
        assert any("threads was 1, is 2" in text and "bitwise" in text for text in texts)

    def test_other_versions_warn_by_name(self, broken: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        from imgcls_fast.training import identity

        monkeypatch.setattr(identity.env, "versions", lambda names: {**dict.fromkeys(names, "1"), "torch": "9.9"})
        heard: list[dict[str, Any]] = []
        session.resume(broken, {}, [heard.append])
        assert any("torch was" in e["text"] and "is 9.9" in e["text"] for e in heard if e["event"] == "warning")

    def test_no_warning_when_nothing_differs(self, broken: Run) -> None:
        heard: list[dict[str, Any]] = []
        session.resume(broken, {}, [heard.append])
        assert not [e for e in heard if e["event"] == "warning"]

    @pytest.mark.parametrize(("change", "code"), [("deleted", "D015"), ("other bytes", "D010"), ("both", "D010")])
    def test_changed_files_are_refused_by_name(
        self, broken: Run, change: str, code: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reach, "WAITS_S", (0.05,))
        victim = broken.manifest.path(int(broken.manifest.rows("train")[3]))
        if change == "deleted":
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes() + b"x")
        if change == "both":
            broken.manifest.path(int(broken.manifest.rows("train")[4])).unlink()
        with pytest.raises(DataError) as refused:
            session.resume(broken, {})
        assert refused.value.code == code
        assert victim.name in refused.value.where

    def test_files_that_come_back_while_resume_looks_for_them_are_no_change(
        self, broken: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reach, "WAITS_S", (0.1,) * 200)
        victim = broken.manifest.path(int(broken.manifest.rows("train")[3]))
        aside = victim.rename(victim.with_suffix(".away"))
        back = threading.Timer(0.5, aside.rename, [victim])
        back.start()
        heard: list[dict[str, Any]] = []
        session.resume(broken, {}, [heard.append])
        back.join()
        assert heard[-1]["event"] not in ("failed", "interrupted") and any(e["event"] == "epoch" for e in heard)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "one bit":
        content[len(content) // 2] ^= 1
    elif how == "zeroed":
        middle = len(content) // 2
        content[middle : middle + 4096] = bytes(len(content[middle : middle + 4096]))
    path.unlink()  # `best` may share the file
    path.write_bytes(bytes(content))


@pytest.mark.usefixtures("no_judging")
@pytest.mark.parametrize("how", ["truncated", "one bit", "zeroed", "state", "missing"])
def test_a_damaged_checkpoint_is_detected_and_the_one_before_it_used(
    how: str, configure: Callable[..., Any], stop_at: Callable[..., None], same_result: Callable[..., None]
) -> None:
    straight = session.start(configure())
    stop_at(STEPS + 2)
    broken = interrupted(configure())
    last = broken.checkpoints / "last"
    if how == "missing":
        (last / checkpoint.TENSORS).unlink()
    elif how == "state":
        damage(last / checkpoint.STATE, "one bit")
    else:
        damage(last / checkpoint.TENSORS, how)
    heard: list[dict[str, Any]] = []
    session.resume(broken, {}, [heard.append])
    texts = [e["text"] for e in heard if e["event"] == "warning"]
    assert any(str(last) in text and "using previous" in text for text in texts), texts
    same_result(straight, broken)


@pytest.mark.usefixtures("no_judging")
def test_nothing_is_trained_when_every_checkpoint_is_damaged(
    configure: Callable[..., Any], stop_at: Callable[..., None]
) -> None:
    stop_at(STEPS + 2)
    broken = interrupted(configure())
    for folder in broken.checkpoints.iterdir():
        damage(folder / checkpoint.TENSORS, "truncated")
    with pytest.raises(ModelError) as refused:
        session.resume(broken, {})
    assert refused.value.code == "M005"
    assert not [path for path in broken.checkpoints.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("no_judging")
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    configure: Callable[..., Any], stop_at: Callable[..., None], same_result: Callable[..., None]
) -> None:
    straight = session.start(configure())
    stop_at(1)
    broken = interrupted(configure())
    shutil.rmtree(broken.checkpoints)
    session.resume(broken, {})
    same_result(straight, broken)


@pytest.mark.usefixtures("no_judging")
def test_resume_obeys_an_out_of_memory_revision(
    configure: Callable[..., Any],
    stop_at: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    same_result: Callable[..., None],
) -> None:
    original = Step._accumulate

    def scarce(self: Step, batch: Any, totals: list[float]) -> Any:
        if self.loss_weight > 0 and self.micro_batch > 4:  # from the second step on
            raise torch.OutOfMemoryError("injected")
        return original(self, batch, totals)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "_accumulate", scarce)
        straight = session.start(configure())
        stop_at(3)
        broken = interrupted(configure())
    assert checkpoint.read_checkpoint(broken.checkpoints / "last").parts["step"]["micro_batch"] == 4
    session.resume(broken, {})
    same_result(straight, broken)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signalled_process_exits_with_130_and_its_resume_command_works(
    number: int, tiny_data: Path, tmp_path: Path
) -> None:
    run, start = command_line(tiny_data, tmp_path)
    process = subprocess.Popen(
        start,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout or ():
        if line.startswith("ep") and line.split("/")[0].split()[-1] == "2":
            break
    os.killpg(process.pid, number)  # as a terminal and a service manager do it: loader workers get it too
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "error[X130]" in errors
    assert f"imgcls-fast train {run} --resume" in errors
    stored = json.loads((run / "checkpoints" / "last" / "state.json").read_text())["progress"]
    assert 2 <= stored["epoch"] + 1 < 400
    again = [sys.executable, "-m", "imgcls_fast", "train", str(run), "--resume", "--json"]
    process = subprocess.Popen(
        again,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stderr or ():
        if line.startswith("ep "):
            assert int(line.split("/")[0].split()[-1]) > stored["epoch"]
            break
    process.send_signal(number)
    process.send_signal(number)  # the second one acts at once, and still leaves a readable checkpoint
    _out, errors = process.communicate(timeout=120)
    assert process.returncode in (130, -number), errors
    found = checkpoint.find_checkpoint(run.joinpath("checkpoints"))
    assert found is not None
    assert found[1].progress.step >= stored["step"]


def command_line(data: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    run = tmp_path / "signalled"
    sets = {
        "model.arch": "small-cnn", "model.args": '{"width": 8}', "pixels.size": 32, "train.epochs": 400, "train.batch_size": 8,
        "train.threads": 1, "train.workers": 1, "train.loader": "torch", "train.baseline": "false",
    }  # fmt: skip
    words = [sys.executable, "-m", "imgcls_fast", "train", str(data), "--out", str(run)]
    for name, value in sets.items():
        words += ["--set", f"{name}={value}"]
    return run, words


def environment(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "IMGCLS_RUNS": str(tmp_path / "runs"),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
    }


@pytest.mark.usefixtures("no_judging")
def test_resume_does_not_need_the_weights_that_the_run_began_with(
    configure: Callable[..., Any],
    make_fit: Any,
    stop_at: Callable[..., None],
    tmp_path: Path,
    same_result: Callable[..., None],
) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "begin.safetensors"
    start = {
        name.removeprefix("backbone."): value.contiguous() for name, value in make_fit().step.model.state_dict().items()
    }
    save_file(start, path)
    straight = session.start(configure({"model.init": str(path)}))
    stop_at(3)
    broken = interrupted(configure({"model.init": str(path)}))
    path.unlink()
    session.resume(broken, {})
    same_result(straight, broken)
