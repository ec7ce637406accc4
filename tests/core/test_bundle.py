"""Bundles: written once, whole, checked before use."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from imgcls_fast.core import bundle as bundle_module
from imgcls_fast.core.bundle import bundle_around, read_bundle, write_bundle
from imgcls_fast.core.errors import HardwareError, ModelError
from imgcls_fast.core.files import read_sealed, sha256_file, write_sealed
from imgcls_fast.core.labels import LabelSpace, Task


def rewrite(bundle: Any, write: Callable[[Any], None]) -> Any:
    return write_bundle(
        bundle.directory, write, arch=bundle.arch, labels=bundle.labels, pixels=bundle.pixels, temperature=1.0, provenance={}
    )  # fmt: skip


def test_what_was_written_is_read_back(bundle_of: Callable[..., Any]) -> None:
    bundle = bundle_of(temperature=1.25)
    again = read_bundle(bundle.directory)
    assert again == bundle
    assert again.temperature == 1.25
    assert again.digest == sha256_file(again.weights)
    assert sorted(path.name for path in bundle.directory.iterdir()) == ["bundle.json", "weights.safetensors"]


def test_a_bundle_is_never_rewritten(bundle_of: Callable[..., Any]) -> None:
    bundle = bundle_of()
    before = bundle.weights.read_bytes()
    with pytest.raises(ModelError) as refused:
        rewrite(bundle, lambda file: file.write(b"other") and None)
    assert refused.value.code == "M004"
    assert bundle.weights.read_bytes() == before


def test_a_write_that_fails_leaves_nothing_and_a_killed_one_is_swept(
    bundle_of: Callable[..., Any], tmp_path: Any
) -> None:
    from dataclasses import replace

    bundle = bundle_of()
    other = replace(bundle, directory=tmp_path / "fresh" / "bundle")
    killed = tmp_path / "fresh" / ".bundle.99999.tmp"
    killed.mkdir(parents=True)

    def full(file: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(HardwareError):
        rewrite(other, full)
    assert list((tmp_path / "fresh").iterdir()) == []


@pytest.mark.parametrize("how", ["one bit", "cut", "gone"])
def test_damaged_weights_are_refused(how: str, bundle_of: Callable[..., Any]) -> None:
    bundle = bundle_of()
    content = bytearray(bundle.weights.read_bytes())
    if how == "gone":
        bundle.weights.unlink()
    else:
        content[len(content) // 2] ^= 4
        bundle.weights.write_bytes(bytes(content if how == "one bit" else content[:-10]))
    with pytest.raises(ModelError) as refused:
        read_bundle(bundle.directory)
    assert refused.value.code == "M004"
    assert "weights.safetensors" in refused.value.message


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"schema": "one"}', "\udcff"])
def test_a_damaged_description_is_refused(text: str, bundle_of: Callable[..., Any]) -> None:
    bundle = bundle_of()
    (bundle.directory / "bundle.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError) as refused:
        read_bundle(bundle.directory)
    assert refused.value.code == "M004"


def test_a_newer_schema_is_refused_with_the_version_that_reads_it(bundle_of: Callable[..., Any]) -> None:
    bundle = bundle_of()
    path = bundle.directory / "bundle.json"
    write_sealed(path, {**read_sealed(path), "schema": 99})
    with pytest.raises(ModelError, match="newer") as refused:
        read_bundle(bundle.directory)
    assert "a newer one" in refused.value.try_ and "pip" not in refused.value.try_


def test_a_bundle_of_another_kind_has_its_own_file_and_digest(
    bundle_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    torch = bundle_of()
    assert "kind" not in read_sealed(torch.directory / "bundle.json")  # as before there were kinds
    monkeypatch.setitem(bundle_module.KINDS, "sklearn", "model.skops")
    made = write_bundle(
        tmp_path / "bundle",
        lambda file: file.write(b"a forest") and None,
        arch={},
        labels=torch.labels,
        pixels=torch.pixels,
        temperature=1.0,
        provenance={},
        kind="sklearn",
    )
    again = read_bundle(made.directory)
    assert again == made and again.weights.name == "model.skops"
    assert again.digest == sha256_file(again.weights)
    assert bundle_around(again.weights) == made.directory
    monkeypatch.undo()
    with pytest.raises(ModelError, match=r"newer imgcls-fast \(kind sklearn") as refused:
        read_bundle(made.directory)
    assert refused.value.code == "M004"


# bundle.json as the version before labels of every kind wrote it, around weights of seven bytes
OLD = """{
  "schema": 1,
  "arch": {
    "arch": "small-cnn",
    "num_outputs": 2
  },
  "labels": {
    "tasks": [
      {
        "name": "label",
        "classes": [
          "cat",
          "dog"
        ],
        "kind": "one_of"
      }
    ]
  },
  "pixels": {
    "size": 32,
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "color": "rgb",
    "exif": "apply",
    "mean": [
      0.5,
      0.5,
      0.5
    ],
    "std": [
      0.25,
      0.25,
      0.25
    ],
    "max_megapixels": 50.0
  },
  "temperature": 1.75,
  "provenance": {
    "run": "r"
  },
  "digests": {
    "weights.safetensors": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
  },
  "seal": "408274b17dc68d2f3323565fb219cc4350a923b17b65c98e3b69f305d34ae0fb"
}
"""


def test_a_bundle_of_the_version_before_opens_and_is_still_written_so(tmp_path: Any) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "bundle.json").write_text(OLD)
    (old / "weights.safetensors").write_bytes(b"weights")
    bundle = read_bundle(old)
    assert (bundle.kind, bundle.temperature, bundle.temperatures, bundle.thresholds) == ("torch", 1.75, (1.75,), None)
    again = write_bundle(
        tmp_path / "new",
        lambda file: file.write(b"weights") and None,
        arch=bundle.arch,
        labels=bundle.labels,
        pixels=bundle.pixels,
        temperature=bundle.temperature,
        provenance=bundle.provenance,
    )
    assert (again.directory / "bundle.json").read_text() == OLD


def test_each_task_keeps_its_temperature_and_each_class_its_threshold(bundle_of: Callable[..., Any]) -> None:
    labels = LabelSpace((Task("kind", ("a", "b")), Task("marks", ("x", "y"), "any_of")))
    bundle = bundle_of(labels=labels, temperature=(1.5, 0.75), thresholds=(0.5, 0.5, 0.25, 0.875))
    again = read_bundle(bundle.directory)
    assert again == bundle and again.temperatures == (1.5, 0.75) and again.thresholds == (0.5, 0.5, 0.25, 0.875)
    meta = read_sealed(bundle.directory / "bundle.json")
    assert meta["schema"] == 2 and "temperature" not in meta  # versions before refuse it as newer
    with pytest.raises(ValueError, match="2 tasks"):
        again.temperature  # noqa: B018
    for wrong in ({"temperature": (1.0,)}, {"temperature": (1.0, 0.0)}, {"thresholds": (0.5,)}, {"thresholds": (0.5, 0.5, 1.5, 0.5)}):
        with pytest.raises(ValueError):
            bundle_of(labels=labels, **wrong)


@pytest.mark.parametrize("name", ["../elsewhere.txt", "/etc/hostname"])
def test_a_digest_list_cannot_point_outside_of_the_bundle(name: str, bundle_of: Callable[..., Any]) -> None:
    bundle = bundle_of()
    path = bundle.directory / "bundle.json"
    content = json.loads(path.read_text())
    content["digests"][name] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError) as refused:
        read_bundle(bundle.directory)
    assert refused.value.code == "M004"
