"""Names that hold any bytes: shown without harm, written so that they are read back exactly."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from imgcls_fast.core.bundle import read_bundle
from imgcls_fast.core.config import RunConfig
from imgcls_fast.core.diary import append_event, append_log
from imgcls_fast.core.errors import DataError
from imgcls_fast.core.files import plain_path, read_json, write_json, write_text
from imgcls_fast.core.labels import LabelSpace
from imgcls_fast.core.predictions import Predictions
from imgcls_fast.core.run import Run
from imgcls_fast.core.settings import build_config, replace_settings, to_yaml
from imgcls_fast.core.text import command, printable, to_csv, to_json

EVERY_BYTE = os.fsdecode(bytes(range(1, 256)))
NAMES = {
    "every byte": EVERY_BYTE,
    "latin-1": os.fsdecode(b"Gr\xfcn"),
    "lines": 'a\nb\rc\r\nd\te"f,g\u2028h\x85i\x0bj',
    "terminal": "\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b2J\x7f\b",
    "right to left": "\u202egnp.exe\u2066x\u200f\u061c",
    "html": "<img src=x onerror=alert(1)>&\"'</script>",
    "escapes": "\\n \\ud800 %s {0} $x$ =1+1",
    "spaces": " edge \u3000\xa0",
    "scripts": "日本 مرحبا ქ é e\u0301 🙂",
    "empty": "",
}
named = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


@named
def test_what_is_shown_is_one_line_that_changes_nothing_else_on_the_terminal(name: str) -> None:
    shown = printable(name)
    assert shown.isprintable() and shown.encode("utf-8").decode("utf-8") == shown
    assert printable(shown) == shown
    assert printable(f"{name}\n{name}", keep="\n").split("\n")[0].isprintable()


def test_different_bytes_are_shown_differently() -> None:
    assert len({printable(os.fsdecode(bytes([byte]))) for byte in range(1, 256)}) == 255


def test_readable_text_of_any_script_stays_readable() -> None:
    assert printable("日本 مرحبا é 🙂 Grün") == "日本 مرحبا é 🙂 Grün"
    assert "Grün" in to_json(["Grün"]) and "Grün" in to_yaml(replace_settings(build_config(), {"data.source": "Grün"}))


@named
@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_read_back_exactly_by_any_reader_and_shows_nothing_else(name: str, indent: int | None) -> None:
    value = {name: [name, {"x": name + name}], "n": [1, 2.5, None, True]}
    text = to_json(value, indent=indent)
    assert json.loads(text.encode("utf-8")) == value
    assert all(line.isprintable() for line in text.split("\n"))


@named
def test_a_json_file_is_utf8_and_comes_back(name: str, tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"name": name})
    assert json.loads((tmp_path / "x.json").read_bytes().decode("utf-8")) == {"name": name}


def test_json_that_a_version_before_wrote_with_bare_bytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'{"name": "Gr\xfcn"}')
    assert read_json(tmp_path / "x.json") == {"name": NAMES["latin-1"]}
    (tmp_path / "data.json").write_bytes(b'{"source": "Gr\xfcn"}')
    assert Run(tmp_path).read_json("data.json") == {"source": NAMES["latin-1"]}


@named
def test_csv_is_read_back_exactly(name: str, tmp_path: Path) -> None:
    rows = [[name, 1, "x"], ["x", name + name, ""], [name, name, name]]
    write_text(tmp_path / "x.csv", to_csv(rows))
    with open(tmp_path / "x.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert list(csv.reader(file)) == [[str(cell) for cell in row] for row in rows]


@named
def test_settings_are_read_back_exactly_from_yaml(name: str, tmp_path: Path) -> None:
    config: RunConfig = replace_settings(build_config(), {"data.source": name or None})
    text = to_yaml(config)
    assert all(line.isprintable() for line in text.split("\n"))
    assert yaml.safe_load(text)["data"]["source"] == (name or None)
    (tmp_path / "x.yaml").write_text(text, "utf-8")
    assert build_config(file=tmp_path / "x.yaml") == config


@named
def test_a_line_of_the_log_stays_one_line(name: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    append_log(run.directory, f"warning: {name}")
    append_event(run.directory, {"event": "warning", "text": name})
    lines = (tmp_path / "log.txt").read_bytes().decode("utf-8").split("\n")
    assert len(lines) == 2 and lines[0].isprintable()
    assert json.loads((tmp_path / "events.jsonl").read_bytes().decode("ascii"))["text"] == name


@named
def test_a_name_in_an_error_cannot_write_a_line_of_its_own(name: str) -> None:
    error = DataError("D001", f"{name} is missing", where=name, try_=f"imgcls-fast data check {name}")
    lines = str(error).split("\n")
    assert [line.split()[0] for line in lines] == ["error[D001]:", *(["where:"] if name else []), "try:"]
    assert all(line.isprintable() for line in lines)
    assert error.to_dict()["message"] == f"{name} is missing"  # JSON holds it exactly


def test_predictions_of_any_names_are_read_back(tmp_path: Path) -> None:
    import numpy as np

    names = [name for name in NAMES.values() if name]
    scores = np.eye(len(names), dtype=np.float32)
    found = Predictions(np.arange(len(names)), scores, scores, LabelSpace.single(names), tuple(names))
    found.save(tmp_path)
    again = Predictions.load(tmp_path)
    assert again.paths == found.paths and again.labels == found.labels
    np.testing.assert_array_equal(again.truth, found.truth)


def test_a_bundle_of_any_names_in_a_folder_of_any_name_is_opened(tmp_path: Path) -> None:
    from safetensors.torch import save

    from imgcls_fast.core.bundle import write_bundle
    from imgcls_fast.core.pixels import Pixels
    from imgcls_fast.engines.torch_runtime import load_model
    from imgcls_fast.models.build import ModelSpec, build_model

    spec = ModelSpec(
        "small-cnn", num_outputs=3, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3, image_size=32, arch_args={"width": 4}
    )
    state = {key: value.contiguous() for key, value in build_model(spec).state_dict().items()}
    labels = LabelSpace.single([NAMES["every byte"], NAMES["latin-1"], NAMES["right to left"]])
    place = tmp_path / os.fsdecode(b"t\xe4st\n\x1b") / "bundle"
    write_bundle(
        place, lambda file: file.write(save(state)) and None, arch=spec.to_dict(), labels=labels, temperature=1.0,
        pixels=Pixels(32, 0.875, "bilinear", "rgb", "apply", (0.5,) * 3, (0.2,) * 3), provenance={"run": str(place)},
    )  # fmt: skip
    bundle = read_bundle(place)
    assert bundle.labels == labels and bundle.provenance == {"run": str(place)}
    load_model(bundle)


def test_a_library_that_takes_only_utf8_gets_a_link(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"t\xe4st")
    folder.mkdir()
    (folder / "x.bin").write_bytes(b"content")
    assert plain_path(tmp_path / "Grün") == tmp_path / "Grün"
    for path in (folder / "x.bin", plain_path(folder) / "x.bin", plain_path(folder / "x.bin")):
        assert path.read_bytes() == b"content"
    link = plain_path(folder / "x.bin")
    assert link.suffix == ".bin" and str(link).encode("utf-8") and plain_path(folder / "x.bin") == link


def test_the_command_line_shows_names_without_harm(capsys: pytest.CaptureFixture[str]) -> None:
    from imgcls_fast.cli.answer import Answer, Session
    from imgcls_fast.cli.show import facts, say, table
    from imgcls_fast.tracking.console import ConsoleSink

    out = io.StringIO()
    session = Session(stdout=out)
    for name in NAMES.values():
        session.note(name)
        session.warn(name)
        session.fail(DataError("D001", name))

        def show(console: object, name: str = name) -> None:
            say(console, name)
            facts(console, {name: name, "inner": {name: 1}, "list": [name], "rows": [{name: name}]})
            table(console, [name], [[name]])

        session.answer(Answer({}, show))
        session.quiet = True
        session.answer(Answer({}, line=name.replace("\n", "")))
        session.quiet = False
        sink = ConsoleSink(out)
        sink({"event": "warning", "text": name})
        sink({"event": "quarantine", "path": name, "reason": name})
        sink({"event": "interrupted", "path": name, "command": name})
    told = out.getvalue() + "".join(capsys.readouterr())
    assert {character for character in told if not character.isprintable()} <= {"\n", "\t"}


@pytest.mark.parametrize(
    "word", ["my photos", "it's", "$HOME", "a;b", "*", "ünï cödé", "line\nbreak", "t\udce4st", "tab\tback\\slash'", "~/x"]
)
def test_a_printed_command_gives_the_shell_back_each_word(word: str) -> None:
    line = command("train", word, "", None, "--resume")
    assert line.isprintable()
    told = subprocess.run(
        ["bash", "-c", line.replace("imgcls-fast", "printf '%s\\0'", 1)], capture_output=True, check=True
    ).stdout
    assert told.split(b"\0")[:-1] == [b"train", os.fsencode(word), b"--resume"]
    assert command("predict", "photos/a-1.jpg", "--lr=1e-3") == "imgcls-fast predict photos/a-1.jpg --lr=1e-3"
