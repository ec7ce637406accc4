"""Manifests: loaded as YAML, and held against what Kubernetes and KServe require of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from imgcls_fast.core.errors import ConfigError
from imgcls_fast.core.exports import Export
from imgcls_fast.serving import deploy
from imgcls_fast.serving.deploy import RELEASES, render


def meta(**more: Any) -> dict[str, Any]:
    """What meta.json of a Triton export says that matters here."""
    base = {
        "target": "triton", "name": "resnet50", "models": ["resnet50", "resnet50_decode", "resnet50_ensemble"], "precision": "fp32",
        "on_gpu": False, "decode": True, "bundle": "ab" * 32, "sha256": "cd" * 32, "plan": None, "server_args": [],
    }  # fmt: skip
    return {**base, **more}


def plan(**more: Any) -> dict[str, Any]:
    facts = {
        "tensorrt": "10.16.0.72", "gpu": "NVIDIA H100 80GB HBM3", "compute_capability": [9, 0], "hardware": "this",
        "version_compatible": False, **more,
    }  # fmt: skip
    return meta(on_gpu=True, precision="fp16", plan=facts)


def load(text: str) -> dict[str, dict[str, Any]]:
    """Documents by kind."""
    documents = list(yaml.safe_load_all(text))
    assert all(document.keys() >= {"apiVersion", "kind", "metadata", "spec"} for document in documents)
    return {document["kind"]: document for document in documents}


def plain(export: dict[str, Any], **more: Any) -> dict[str, dict[str, Any]]:
    return load(render("k8s", name="flowers", export=export, **more))


def container(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (found,) = documents["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


def notes(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith("#"))


# ---------------------------------------------------------------- structure


@pytest.mark.parametrize("export", [meta(), plan()], ids=["cpu", "plan"])
def test_the_four_objects_belong_together(export):
    documents = plain(export, namespace="vision", replicas=3, max_replicas=9)
    versions = {kind: document["apiVersion"] for kind, document in documents.items()}
    assert versions == {
        "Deployment": "apps/v1", "Service": "v1", "HorizontalPodAutoscaler": "autoscaling/v2", "PodDisruptionBudget": "policy/v1",
    }  # fmt: skip
    for document in documents.values():
        assert document["metadata"]["name"] == "flowers" and document["metadata"]["namespace"] == "vision"
    spec = documents["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    for selector in (
        spec["selector"]["matchLabels"],
        documents["Service"]["spec"]["selector"],
        documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        spec["template"]["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ):
        assert selector and selector.items() <= labels.items()
    scaler = documents["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "flowers"}
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (3, 9) and "replicas" not in spec
    assert documents["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1, (
        "one server may go, or a node can never be drained"
    )


def test_ports_probes_and_scraping_agree():
    documents = plain(meta())
    server = container(documents)
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    for port in documents["Service"]["spec"]["ports"]:
        assert port["port"] == ports[port["targetPort"]] and port["name"] in ports
    probes = {kind: server[kind]["httpGet"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert all(probe["port"] == "http" for probe in probes.values())
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startupProbe": "/v2/health/ready", "readinessProbe": "/v2/health/ready", "livenessProbe": "/v2/health/live",
    }  # fmt: skip
    annotations = documents["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true" and annotations["prometheus.io/path"] == "/metrics"
    assert annotations["prometheus.io/port"] == str(ports["metrics"])
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    timeout = next(int(word.split("=")[1]) for word in server["args"] if word.startswith("--exit-timeout-secs"))
    assert timeout < pod["terminationGracePeriodSeconds"], "the server must finish before it is killed"


def test_nobody_is_root_and_the_models_are_read_only():
    documents = plain(meta(), storage="pvc://shared-models/teams/vision/v3")
    pod, server = documents["Deployment"]["spec"]["template"]["spec"], container(documents)
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert (
        pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        and pod["automountServiceAccountToken"] is False
    )
    assert server["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    (mount,), (volume,) = server["volumeMounts"], pod["volumes"]
    assert mount == {"name": "models", "mountPath": "/models", "readOnly": True, "subPath": "teams/vision/v3"}
    assert volume == {"name": "models", "persistentVolumeClaim": {"claimName": "shared-models", "readOnly": True}}
    assert "--model-repository=/models" in server["args"]


def test_another_export_starts_other_pods():
    first, second = (plain(meta(sha256=digest * 32)) for digest in ("aa", "bb"))
    a, b = (d["Deployment"]["spec"]["template"]["metadata"]["annotations"] for d in (first, second))
    assert a != b and a["imgcls-fast/bundle"] == b["imgcls-fast/bundle"]


def test_kserve_gets_its_own_ports_and_runtime():
    documents = load(
        render("kserve", name="flowers", export=meta(), storage="s3://models/flowers", replicas=1, max_replicas=5)
    )
    service = documents["InferenceService"]
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    predictor = service["spec"]["predictor"]
    model = predictor["model"]
    assert (
        model["modelFormat"] == {"name": "triton"}
        and model["runtime"] == "kserve-tritonserver"
        and model["protocolVersion"] == "v2"
    )
    assert model["storageUri"] == "s3://models/flowers" and "args" not in model
    assert {model[p]["httpGet"]["port"] for p in ("startupProbe", "readinessProbe", "livenessProbe")} == {8080}
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (1, 5)
    assert model["securityContext"]["runAsNonRoot"] and model["resources"]["requests"]["memory"] == "4Gi"
    assert "nodeSelector" not in predictor and "nvidia.com/gpu" not in model["resources"]["limits"]


# ---------------------------------------------------------------- GPUs and versions


@pytest.mark.parametrize("kind", ["k8s", "kserve"])
def test_a_plan_goes_to_the_gpu_and_the_release_that_it_was_built_for(kind):
    text = render(kind, name="flowers", export=plan(), gpus=2)
    documents = load(text)
    if kind == "k8s":
        pod, server = documents["Deployment"]["spec"]["template"]["spec"], container(documents)
        metrics = {m["type"] for m in documents["HorizontalPodAutoscaler"]["spec"]["metrics"]}
        assert metrics == {"Resource", "Pods"} and "triton_queue_us" in notes(text)
    else:
        pod = documents["InferenceService"]["spec"]["predictor"]
        server = pod["model"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert server["resources"]["limits"]["nvidia.com/gpu"] == server["resources"]["requests"]["nvidia.com/gpu"] == 2
    assert server["image"] == "nvcr.io/nvidia/tritonserver:26.03-py3" and RELEASES["26.03"].tensorrt == "10.16.0.72"
    assert "chosen for TensorRT 10.16.0.72" in notes(text) and "docker run" in notes(text)


def test_an_unknown_tensorrt_is_said_and_never_guessed():
    text = render("k8s", name="flowers", export=plan(tensorrt="10.14.1.48.post1"))
    assert "TensorRT 10.14.1.48.post1, and it is not known here" in notes(text) and "docker run" in notes(text)
    own = render("k8s", name="flowers", export=plan(tensorrt="10.14.1.48"), image="registry.example/triton:25.12-py3")
    assert container(load(own))["image"] == "registry.example/triton:25.12-py3"
    assert "needs TensorRT 10.14.1.48, and no other version" in notes(own)


def test_a_version_compatible_plan_starts_the_server_so_and_goes_to_a_later_release():
    argument = "--backend-config=tensorrt,version-compatible=true"
    export = {**plan(version_compatible=True, hardware="ampere+"), "server_args": [argument]}
    documents = plain(export)
    assert argument in container(documents)["args"]
    (term,) = documents["Deployment"]["spec"]["template"]["spec"]["affinity"]["nodeAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": "nvidia.com/gpu.compute.major", "operator": "Gt", "values": ["7"]}]
    text = render("kserve", name="flowers", export=export)
    assert load(text)["InferenceService"]["spec"]["predictor"]["model"]["args"] == [argument]
    assert "TensorRT 10.16.0.72 or a later version" in notes(text)


def test_a_plan_for_one_compute_capability_goes_to_every_gpu_of_it():
    pod = plain(plan(hardware="same-cc", compute_capability="8.6"))["Deployment"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.compute.major": "8", "nvidia.com/gpu.compute.minor": "6"}


def test_onnx_on_a_gpu_runs_on_any_and_on_a_cpu_without():
    pod = plain(meta(on_gpu=True))["Deployment"]["spec"]["template"]["spec"]
    assert "nodeSelector" not in pod and pod["tolerations"]
    pod = plain(meta())["Deployment"]["spec"]["template"]["spec"]
    assert "tolerations" not in pod and pod["containers"][0]["resources"] == {
        "requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "4Gi"},
    }  # fmt: skip


def test_every_release_of_the_table_loads_the_decoder():
    pytest.importorskip("nvidia.dali")
    from imgcls_fast.exporting.triton_decode import OLDEST_DALI

    oldest = tuple(int(part) for part in OLDEST_DALI.split("."))
    for name, release in RELEASES.items():
        assert re.fullmatch(r"\d\d\.\d\d", name) and tuple(int(part) for part in release.dali.split(".")) >= oldest
    assert max(RELEASES) == deploy.USUAL_RELEASE


def test_what_the_export_says_is_in_the_comments_and_cannot_leave_them(tmp_path):
    (tmp_path / "gate.json").write_text('{"verdict": "pass", "simulated": true}', "utf-8")
    export = Export(tmp_path, meta(name="x\nkind: Secret", file="model_repository"))
    text = render("kserve", name="flowers", export=export)
    assert "Judged before export: pass, simulated." in notes(text) and "resnet50_ensemble" in notes(text)
    assert set(load(text)) == {"InferenceService"}
    assert "DALI" not in render("kserve", name="flowers", export=meta(decode=False))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kind", "guess"), [("ksreve", "kserve"), ("K8S", "k8s"), ("k8", "k8s"), ("helm", "kserve"), ("", "kserve")]
)
def test_an_unknown_kind_is_refused_with_the_near_name(kind, guess):
    with pytest.raises(ConfigError, match="one of kserve, k8s") as error:
        render(kind, name="flowers", export=meta())
    assert error.value.code == "C003" and error.value.try_ == f"imgcls-fast deploy render {guess}"


@pytest.mark.parametrize(
    "name", ["", "Flowers", "flowers_v2", "-x", "x-", "9x", "a.b", "a b", "x\n", "é", "a" * 46, "x: y"]
)
def test_names_that_kubernetes_refuses_are_refused(name):
    with pytest.raises(ConfigError, match="RFC 1123") as error:
        render("k8s", name=name, export=meta())
    assert error.value.code == "C003"
    guess = error.value.try_.removeprefix("the name ")
    assert render("k8s", name=guess, export=meta())


@pytest.mark.parametrize(
    "options",
    [
        {"image": "nvcr.io/nvidia/tritonserver"}, {"image": "nvcr.io/nvidia/tritonserver:latest"}, {"image": "a b:1"}, {"image": ""},
        {"image": "registry:5000/triton"},
        {"image": "x:1\nkind: Secret"}, {"storage": "models"}, {"storage": "s3://bucket/path"}, {"storage": "pvc://claim/../other"},
        {"storage": "pvc://Claim/x"}, {"storage": "pvc://claim/a\nb"}, {"storage": "file:///models"}, {"replicas": 0},
        {"replicas": 3, "max_replicas": 2}, {"cpu": "two"}, {"cpu": "0"}, {"memory": "4"}, {"memory": "4GB"}, {"gpus": 0},
        {"namespace": "Vision"}, {"namespace": ""},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_cannot_be_are_refused(options):
    with pytest.raises(ConfigError) as error:
        render("k8s", name="flowers", export=meta(), **options)
    assert error.value.code == "C003"


def test_only_a_triton_export_has_a_manifest():
    with pytest.raises(ConfigError, match="target 'onnx'") as error:
        render("k8s", name="flowers", export=meta(target="onnx"))
    assert error.value.code == "C004"


@pytest.mark.parametrize(
    "image", ["registry:5000/team/triton:26.05-py3", "triton@sha256:" + "0" * 64, "x/y:1.0@sha256:" + "a" * 64]
)
def test_images_pinned_by_tag_or_digest_are_taken(image):
    assert container(plain(meta(), image=image))["image"] == image
