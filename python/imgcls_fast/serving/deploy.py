"""Manifests for a Triton export: a KServe InferenceService, or a plain Deployment with everything around it.

The image is pinned. A TensorRT plan runs in the TensorRT that built it and in no other (unless it was built version
compatible), and the decoder needs DALI 2: the table below lists what each release of Triton holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..core.errors import ConfigError, near
from ..core.exports import Export
from ..core.text import command

KINDS = ("kserve", "k8s")
HTTP, GRPC, METRICS = 8000, 8001, 8002
REGISTRY = "nvcr.io/nvidia/tritonserver"


class Release(NamedTuple):
    """What a release of Triton holds; None: not known here.

    DALI: the file DALI_VERSION of the release's branch of triton-inference-server/dali_backend. TensorRT: NVIDIA's containers of
    one month hold one version (Frameworks Support Matrix); 26.03 as in tensorrt:26.03-py3, 26.05 as in the release notes of
    PyTorch 26.05. For a release without an entry, ask the image: see `how_to_ask`.
    """

    dali: str
    tensorrt: str | None


# Releases before 26.03 hold DALI 1, which does not load the decoder
RELEASES = {
    "26.03": Release("2.0.0", "10.16.0.72"),
    "26.04": Release("2.0.0", None),
    "26.05": Release("2.1.0", "10.16.1.11"),
    "26.06": Release("2.1.1", None),
}
USUAL_RELEASE = "26.06"

# Services want RFC 1035: a letter first. KServe appends "-predictor-default" to a name and makes it a host name of 63.
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LONGEST_NAME = 45
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_CPU = re.compile(r"[1-9]\d*m?")
_MEMORY = re.compile(r"[1-9]\d*(Mi|Gi)")
_IMAGE = re.compile(r"[A-Za-z0-9][\w.:/-]*?(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?")
_STORAGE = re.compile(r"(pvc|s3|gs|hdfs|webhdfs|https?|oci)://[^\s\"'\\]+")
_CLAIM = re.compile(r"pvc://([a-z0-9]([-.a-z0-9]*[a-z0-9])?)(?:/([\w./-]+))?")


@dataclass(frozen=True)
class _Service:
    """The content of a manifest, checked."""

    name: str
    namespace: str | None
    meta: Mapping[str, Any]
    image: str
    notes: tuple[str, ...]
    storage: str
    replicas: int
    max_replicas: int
    resources: dict[str, Any]
    server_args: tuple[str, ...]
    placement: dict[str, Any]


def render(
    kind: str,
    *,
    name: str,
    export: Export | Mapping[str, Any],
    image: str | None = None,
    storage: str | None = None,
    namespace: str | None = None,
    replicas: int = 2,
    max_replicas: int | None = None,
    cpu: str = "2",
    memory: str = "4Gi",
    gpus: int = 1,
) -> str:
    """YAML that serves a Triton export.

    Args:
        kind: "kserve" (InferenceService) or "k8s" (Deployment, Service, HorizontalPodAutoscaler, PodDisruptionBudget).
        name: name of the service, an RFC 1123 label that begins with a letter, at most 45 characters.
        export: an export of target "triton", or its meta.json.
        image: pinned by tag or digest; None: the release of Triton that fits the export.
        storage: where `model_repository` was copied to; k8s: pvc://CLAIM/PATH; None: pvc://NAME-models/model_repository.
        replicas, max_replicas: smallest and largest number of servers; None: four times the smallest.
        cpu, memory: requested for each server, e.g. "2" or "500m", "4Gi".
        gpus: for each server, when the export runs on GPUs.

    Raises:
        ConfigError: C003 for a kind, name, image, storage or quantity that cannot be; C004 for an export of another target.
    """
    if kind not in KINDS:
        guess = near(kind, KINDS)
        raise ConfigError(
            "C003",
            f"a manifest is for one of {', '.join(KINDS)}, got {kind!r}",
            try_=command("deploy", "render", guess or KINDS[0]),
        )
    meta, gate = (export.meta, export.gate) if isinstance(export, Export) else (export, None)
    if meta.get("target") != "triton":
        raise ConfigError(
            "C004",
            f"a manifest serves a Triton export, got one of target {meta.get('target')!r}",
            try_="imgcls-fast export RUN --triton",
        )
    _check_name(name)
    if namespace is not None and not (_NAMESPACE.fullmatch(namespace) and len(namespace) <= 63):
        raise ConfigError("C003", f"a namespace is an RFC 1123 label, got {namespace!r}")
    most = 4 * replicas if max_replicas is None else max_replicas
    _check_quantities(replicas, most, cpu, memory, gpus)
    storage = storage if storage is not None else f"pvc://{name}-models/model_repository"
    _check_storage(kind, storage)
    chosen, notes = _image(meta, image)
    service = _Service(
        name,
        namespace,
        meta,
        chosen,
        (*notes, *_notes(kind, meta, gate)),
        storage,
        replicas,
        most,
        _resources(cpu, memory, gpus if meta.get("on_gpu") else 0),
        tuple(meta.get("server_args") or ()),
        _placement(meta),
    )
    documents = [_inference_service(service)] if kind == "kserve" else _plain(service)
    return _header(kind, service) + _yaml(documents)


# ---------------------------------------------------------------- what is legal


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) and len(name) <= _LONGEST_NAME:
        return
    guess = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_LONGEST_NAME].strip("-")
    guess = guess if _NAME.fullmatch(guess) else "classifier"
    raise ConfigError(
        "C003",
        f"a service's name is an RFC 1123 label that begins with a letter (a-z, 0-9, '-', at most {_LONGEST_NAME}), got {name!r}",
        try_=f"the name {guess}",
    )


def _check_quantities(replicas: int, most: int, cpu: str, memory: str, gpus: int) -> None:
    if replicas < 1 or most < replicas:
        raise ConfigError("C003", f"replicas are 1 or more, and at most max_replicas, got {replicas} and {most}")
    if gpus < 1:
        raise ConfigError("C003", f"gpus must be at least 1, got {gpus}")
    for word, legal, example in ((cpu, _CPU, "2 or 500m"), (memory, _MEMORY, "4Gi or 900Mi")):
        if not legal.fullmatch(word):
            raise ConfigError("C003", f"{word!r} is no quantity like {example}")


def _check_storage(kind: str, storage: str) -> None:
    if not _STORAGE.fullmatch(storage):
        raise ConfigError(
            "C003", f"storage is a URL like pvc://claim/path, s3://bucket/path or gs://bucket/path, got {storage!r}"
        )
    if not storage.startswith("pvc://"):
        if kind == "k8s":
            raise ConfigError(
                "C003",
                f"a plain Deployment mounts a volume claim, pvc://CLAIM/PATH, got {storage!r}",
                why="only KServe has somebody who downloads",
                try_="imgcls-fast deploy render kserve",
            )
        return
    claim = _CLAIM.fullmatch(storage)
    if not claim or ".." in (claim.group(3) or "").split("/"):
        raise ConfigError("C003", f"a volume claim is pvc://CLAIM/PATH, without '..', got {storage!r}")


# ---------------------------------------------------------------- the image


def _image(meta: Mapping[str, Any], image: str | None) -> tuple[str, tuple[str, ...]]:
    """The image, and remarks about it."""
    plan = meta.get("plan") or {}
    built = str(plan.get("tensorrt") or "an unknown version")
    if image is not None:
        found = _IMAGE.fullmatch(image)
        if not found or not (found.group(1) or found.group(2)) or found.group(1) == ":latest":
            raise ConfigError(
                "C003",
                f"the image must be pinned by a tag other than latest, or by a digest, got {image!r}",
                try_=f"{REGISTRY}:{USUAL_RELEASE}-py3",
            )
    usual = image or f"{REGISTRY}:{USUAL_RELEASE}-py3"
    if not plan:
        return usual, ()
    if plan.get("version_compatible"):
        return usual, (f"This plan needs TensorRT {built} or a later version. {how_to_ask(usual)}",)
    if image is not None:
        return image, (f"This plan needs TensorRT {built}, and no other version. {how_to_ask(image)}",)
    release = next((name for name, holds in RELEASES.items() if holds.tensorrt and _same(holds.tensorrt, built)), None)
    if release is None:
        return usual, (
            f"This plan was built by TensorRT {built}, and it is not known here which release of Triton holds that version: "
            f"the image below is probably the wrong one, and a plan does not load in another version. {how_to_ask(usual)}",
        )
    chosen = f"{REGISTRY}:{release}-py3"
    return chosen, (f"Release {release} was chosen for TensorRT {built}. {how_to_ask(chosen)}",)


def how_to_ask(image: str) -> str:
    """The command that shows which TensorRT an image holds."""
    return f"To see: docker run --rm --entrypoint sh {image} -c 'ls /usr/lib/*/libnvinfer.so.*.*.*'"


def _same(a: str, b: str) -> bool:
    return re.findall(r"\d+", a)[:4] == re.findall(r"\d+", b)[:4]  # 10.14.1.48.post1 is 10.14.1.48


def _notes(kind: str, meta: Mapping[str, Any], gate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """What a reader must know before this is applied."""
    notes = []
    if gate:
        notes.append(f"Judged before export: {gate.get('verdict')}{', simulated' if gate.get('simulated') else ''}.")
    if meta.get("decode"):
        notes.append(f"Encoded images go to {meta['models'][-1]}. Its decoder needs DALI 2: Triton 26.03 or later.")
    if meta.get("on_gpu") and kind == "k8s":
        notes.append(
            "The autoscaler's metric triton_queue_us is a rule of the Prometheus adapter: "
            "rate(nv_inference_queue_duration_us[1m]) / clamp_min(rate(nv_inference_request_success[1m]), 1)."
        )
    return tuple(notes)


# ---------------------------------------------------------------- resources and nodes


def _resources(cpu: str, memory: str, gpus: int) -> dict[str, Any]:
    """Memory is limited to what is requested; CPU is not limited, because throttling shows as latency."""
    gpu = {"nvidia.com/gpu": gpus} if gpus else {}
    return {"requests": {"cpu": cpu, "memory": memory, **gpu}, "limits": {"memory": memory, **gpu}}


def _placement(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Nodes whose GPU runs the plan, by the labels of NVIDIA's GPU feature discovery."""
    if not meta.get("on_gpu"):
        return {}
    taint = {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]}
    plan = meta.get("plan") or {}
    capability = plan.get("compute_capability")
    hardware = plan.get("hardware", "this")
    if not plan:
        return taint
    if hardware == "this" and plan.get("gpu"):
        product = re.sub(r"[^A-Za-z0-9._-]+", "-", str(plan["gpu"]).strip()).strip("-._")
        return {"nodeSelector": {"nvidia.com/gpu.product": product}, **taint}
    if hardware == "ampere+":
        return {"affinity": _node_affinity("nvidia.com/gpu.compute.major", "Gt", "7"), **taint}
    if capability:
        major, minor = (str(part) for part in (capability.split(".") if isinstance(capability, str) else capability))
        return {"nodeSelector": {"nvidia.com/gpu.compute.major": major, "nvidia.com/gpu.compute.minor": minor}, **taint}
    return taint


def _node_affinity(key: str, operator: str, value: str) -> dict[str, Any]:
    terms = [{"matchExpressions": [{"key": key, "operator": operator, "values": [value]}]}]
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}


# Triton's images have a user for this, triton-server (1000)
_POD_SECURITY = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000,
                 "seccompProfile": {"type": "RuntimeDefault"}}  # fmt: skip
_CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _probes(port: int | str) -> dict[str, Any]:
    """Loading and warming up may take five minutes; after that a server that does not answer is replaced."""

    def probe(path: str, period: int, failures: int) -> dict[str, Any]:
        return {
            "httpGet": {"path": path, "port": port},
            "periodSeconds": period,
            "failureThreshold": failures,
            "timeoutSeconds": 5,
        }

    return {
        "startupProbe": probe("/v2/health/ready", 5, 60),
        "readinessProbe": probe("/v2/health/ready", 5, 3),
        "livenessProbe": probe("/v2/health/live", 10, 6),
    }


# ---------------------------------------------------------------- documents


def _inference_service(service: _Service) -> dict[str, Any]:
    """KServe v1beta1 with its Triton runtime, which listens on 8080 (HTTP) and 9000 (gRPC) instead of Triton's own ports."""
    model: dict[str, Any] = {
        "modelFormat": {"name": "triton"},
        "runtime": "kserve-tritonserver",
        "protocolVersion": "v2",
        "storageUri": service.storage,
        "image": service.image,
        "resources": service.resources,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, **_CONTAINER_SECURITY},
        **_probes(8080),
    }
    if service.server_args:
        model["args"] = list(service.server_args)  # KServe appends them to the runtime's
    predictor: dict[str, Any] = {
        "minReplicas": service.replicas,
        "maxReplicas": service.max_replicas,
        "scaleMetric": "cpu",
        "scaleTarget": 70,
        **service.placement,
        "model": model,
    }
    annotations = {"serving.kserve.io/deploymentMode": "RawDeployment", **_origin(service)}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": _metadata(service, annotations),
        "spec": {"predictor": predictor},
    }


def _plain(service: _Service) -> list[dict[str, Any]]:
    return [_deployment(service), _service_object(service), _autoscaler(service), _disruption_budget(service)]


def _deployment(service: _Service) -> dict[str, Any]:
    claim = _CLAIM.fullmatch(service.storage)
    assert claim is not None  # _check_storage
    mount: dict[str, Any] = {"name": "models", "mountPath": "/models", "readOnly": True}
    if claim.group(3):
        mount["subPath"] = claim.group(3).strip("/")
    container = {
        "name": "triton",
        "image": service.image,
        "imagePullPolicy": "IfNotPresent",
        "args": ["tritonserver", "--model-repository=/models", "--exit-timeout-secs=45", *service.server_args],
        "ports": [
            {"name": name, "containerPort": port}
            for name, port in (("http", HTTP), ("grpc", GRPC), ("metrics", METRICS))
        ],
        **_probes("http"),
        "resources": service.resources,
        "securityContext": _CONTAINER_SECURITY,
        "volumeMounts": [mount],
    }
    pod = {
        "securityContext": _POD_SECURITY,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 60,
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": _selector(service)},
            }
        ],
        **service.placement,
        "containers": [container],
        "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": claim.group(1), "readOnly": True}}],
    }
    scraped = {"prometheus.io/scrape": "true", "prometheus.io/port": str(METRICS), "prometheus.io/path": "/metrics"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(service, _origin(service)),
        "spec": {
            # no replicas: they are the autoscaler's, and applying this again would reset them
            "selector": {"matchLabels": _selector(service)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                # the origin is in the pods too, so that another export starts other pods
                "metadata": {"labels": _labels(service), "annotations": {**scraped, **_origin(service)}},
                "spec": pod,
            },
        },
    }


def _service_object(service: _Service) -> dict[str, Any]:
    ports = [
        {"name": name, "port": port, "targetPort": name}
        for name, port in (("http", HTTP), ("grpc", GRPC), ("metrics", METRICS))
    ]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(service),
        "spec": {"type": "ClusterIP", "selector": _selector(service), "ports": ports},
    }


def _autoscaler(service: _Service) -> dict[str, Any]:
    metrics: list[dict[str, Any]] = [
        {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}}
    ]
    if service.meta.get("on_gpu"):  # a busy GPU does not show in the CPU; waiting requests do
        target = {"type": "AverageValue", "averageValue": "20000"}  # 20 ms
        metrics.append({"type": "Pods", "pods": {"metric": {"name": "triton_queue_us"}, "target": target}})
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _metadata(service),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": service.name},
            "minReplicas": service.replicas,
            "maxReplicas": service.max_replicas,
            "metrics": metrics,
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 300}},
        },
    }


def _disruption_budget(service: _Service) -> dict[str, Any]:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(service),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": _selector(service)}},
    }


def _metadata(service: _Service, annotations: Mapping[str, str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": service.name, "labels": _labels(service)}
    if service.namespace:
        found["namespace"] = service.namespace
    if annotations:
        found["annotations"] = dict(annotations)
    return found


def _selector(service: _Service) -> dict[str, str]:
    return {"app.kubernetes.io/name": "triton", "app.kubernetes.io/instance": service.name}


def _labels(service: _Service) -> dict[str, str]:
    return {**_selector(service), "app.kubernetes.io/managed-by": "imgcls-fast"}


def _origin(service: _Service) -> dict[str, str]:
    return {
        f"imgcls-fast/{key}": str(service.meta[key])
        for key in ("bundle", "sha256", "precision")
        if service.meta.get(key)
    }


# ---------------------------------------------------------------- text


def _header(kind: str, service: _Service) -> str:
    lines = [
        f"{kind} manifest for {service.meta.get('name')} ({service.meta.get('precision')}), written by imgcls-fast."
    ]
    lines.append(f"Copy the export's folder model_repository to {service.storage} before it is applied.")
    lines += service.notes
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def _yaml(documents: list[dict[str, Any]]) -> str:
    import yaml

    class Plain(yaml.SafeDumper):
        """Repeats what occurs twice: anchors are legal YAML, and hard to read in a manifest."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    return "".join(
        "---\n" + yaml.dump(document, Dumper=Plain, sort_keys=False, allow_unicode=True, width=120)
        for document in documents
    )
