"""`models list`: names, parameters, image sizes and weights of the classifiers, without building them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torchvision

from imgcls_fast.api.models import list_models
from imgcls_fast.cli.app import main
from imgcls_fast.core.errors import ModelError
from imgcls_fast.measuring import doctor
from imgcls_fast.models import ModelSpec, build_model, catalogue
from imgcls_fast.models import list_models as names_like
from imgcls_fast.models.names import resolve_arch


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of torch and Hugging Face."""
    import huggingface_hub.constants

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path


def _put(caches: Path, content: bytes) -> Path:
    path = caches / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def test_a_name_is_listed_with_place_address_and_licence(caches: Path) -> None:
    (found,) = list_models("torchvision/resnet18")
    path = caches / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    assert found == {
        "name": "torchvision/resnet18", "parameters": 11_689_512, "image_size": 224, "weights": None, "damaged": "",
        "place": str(path), "url": "https://download.pytorch.org/models/resnet18-f37072fd.pth", "licence": "BSD-3-Clause",
    }  # fmt: skip
    (found,) = list_models("timm/resnet10t.c3_in1k")
    assert (found["image_size"], found["licence"]) == (176, "apache-2.0")
    assert found["place"] == str(caches / "hf" / "models--timm--resnet10t.c3_in1k") and found["url"].startswith("https://huggingface.co/timm/")
    (found,) = list_models("small-cnn")
    assert not found["url"] and not found["licence"] and not found["place"]


def test_patterns_parts_and_exact_names_narrow_the_list(caches: Path) -> None:
    assert [model["name"] for model in list_models("resnet18")] == ["torchvision/resnet18", "timm/resnet18"]
    assert {model["name"] for model in list_models("vit_tiny_p")} == set(names_like("*vit_tiny_p*"))
    assert [model["name"] for model in list_models("tv/resnet18")] == ["torchvision/resnet18"]
    with pytest.raises(ModelError, match="no model matches 'resnet81'") as caught:
        list_models("resnet81")
    assert caught.value.code == "M001" and "models list resnet" in caught.value.try_


def test_every_classifier_is_listed_and_none_of_the_table_is_built(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "count_parameters", lambda arch: pytest.fail(f"built {arch}"))
    header = (Path(catalogue.__file__).parent / "parameters.txt").read_text("utf-8").splitlines()[0]
    here = f"torchvision {torchvision.__version__.split('+')[0]}, timm {timm.__version__};"
    found = list_models()
    assert [model["name"] for model in found] == names_like() and len(found) > 1000
    if here in header:
        assert all(model["parameters"] > 0 for model in found)


@pytest.mark.parametrize("arch", ["small-cnn", "torchvision/squeezenet1_1", "timm/resnet10t.c3_in1k", "timm/test_resnet"])
def test_the_table_has_the_parameters_of_the_real_network(arch: str) -> None:
    network = build_model(ModelSpec(arch, num_outputs=1000)).backbone
    assert list_models(arch)[0]["parameters"] == sum(parameter.numel() for parameter in network.parameters())


def test_a_network_newer_than_the_table_is_counted(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_counts", dict)
    assert list_models("torchvision/alexnet")[0]["parameters"] == 61_100_840
    assert all(model["parameters"] is None for model in list_models("timm/*"))


@pytest.mark.parametrize("whole", [True, False])
def test_weights_in_a_cache_are_listed_and_doctor_names_them(
    whole: bool, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _put(caches, bytes(45 << 20) if whole else b"cut")
    if whole:
        monkeypatch.setattr("imgcls_fast.models.published.sha256_file", lambda path: "f37072fd")
    (found,) = list_models("torchvision/resnet18")
    assert found["weights"] == str(path) and bool(found["damaged"]) is not whole
    rows: dict[str, Any] = {item: (value, fine, hint) for item, value, fine, hint in doctor._weights()}
    assert rows["torch's cache"][0] == str(path.parent)
    value, fine, hint = rows["torchvision/resnet18"]
    assert (value == str(path), fine, hint == f"rm {path}") == (whole, whole, not whole)


def test_doctor_names_the_caches_where_nothing_lies(caches: Path) -> None:
    rows = {item: value for item, value, _, _ in doctor._weights()}
    assert rows["Hugging Face's cache"] == str(caches / "hf") and rows["weights"].startswith("none here")


def test_the_command_line_lists_models_as_lines_and_as_json(caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list", "torchvision/resnet18"]) == 0
    heads, line = capsys.readouterr().out.splitlines()
    cells = dict(zip(heads.split("\t"), line.split("\t"), strict=True))
    assert (cells["name"], cells["parameters"], cells["pixels"], cells["weights"]) == ("torchvision/resnet18", "11.7 M", "224", "not here")
    assert cells["place"].endswith("resnet18-f37072fd.pth") and cells["url"].startswith("https://") and cells["licence"] == "BSD-3-Clause"
    assert main(["models", "list", "vgg1?", "--json"]) == 0
    assert {"torchvision/vgg11", "timm/vgg16"} <= {model["name"] for model in json.loads(capsys.readouterr().out)["models"]}
    assert main(["models", "list", "nothing-of-the-kind"]) == 2


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("vit_tiny", "vit_tiny_patch16_224"), ("timm/convnext_n", "timm/convnext_nano"), ("resnet51", "resnet")],
)
def test_the_beginning_of_a_name_is_answered_with_names_that_begin_so(typed: str, meant: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_arch(typed)
    assert f"did you mean '{meant}" in caught.value.message and caught.value.try_.startswith(f"--model {meant}")
    if meant != "resnet":
        assert f"imgcls-fast models list '{typed.removeprefix('timm/')}*'" in caught.value.try_
