"""Write the model for other runtimes, compare them, and write manifests that serve it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import RunLike, overrides_from, run_of, say_warning, usual_device

if TYPE_CHECKING:
    from ..core.exports import Export


def export(
    run: RunLike = None,
    target: str = "onnx",
    *,
    precision: str | None = None,
    out: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
    progress: Callable[[str, float], None] | None = None,
    force: bool = False,
    **settings: Any,
) -> Export:
    """Write the model for another runtime; compare it with the original and judge it before it is called done.

    Args:
        target: onnx, trt, pt2, aoti, torchscript or triton.
        precision: fp32, fp16, bf16 or int8; None: fp16 for trt, else fp32.
        out: also copy the file there, under the ending of its format.
        overrides: dotted setting names to values, for this export.
        say: called with sentences about what happens; None: Python warnings.
        progress: called with (phase, fraction) while an engine is built.
        force: replace a file at `out` that is not an earlier copy of an export.
        settings: flags by their Python names: `max_drop=0.5, gate_data="more/", batch=8`.

    Returns:
        `.path`, `.folder`, `.meta` (comparison, latency, quantisation, ...), `.gate` (the judgement), `.to_dict()`.

    Raises:
        UsageError: U002 when `out` has another format's ending, or would replace somebody else's file.
        ConfigError: C001 to C004 for a wrong target, precision or setting.
        ExportError: E001 to E004.
        GateFailed: E901 when the file disagrees with the original, E902 when it lost accuracy, E903 when the rows cannot tell.
        HardwareError: H004, H001 where a library or a GPU is missing; what could be made stays.
    """
    from ..core.files import copy_whole
    from ..core.outputs import claim_file, exported_model

    found = run_of(run)
    if out is not None:
        claim_file(Path(out), exported_model(found.exports, target), force=force)
    from ..exporting.session import export_run

    made = export_run(
        found, target, precision, overrides_from(overrides, settings), say=say or say_warning, progress=progress
    )
    if out is not None:
        copy_whole(made.path, Path(out))
    return made


def verify(
    run: RunLike = None,
    *,
    images: int | None = None,
    out: str | Path | None = None,
    trust: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Compare the pixels of every loader and the scores of every runtime that is here, on real images of the run.

    Args:
        images: how many; None: the run's setting.
        out: also write the result there, as JSON.
        force: replace a file at `out` that `verify` has not written.

    Returns:
        images, undecodable, pixels and scores (reference, allowed, compared, absent with reasons), and table: the same as rows.

    Raises:
        UsageError: U002 when `out` would replace somebody else's file.
        GateFailed: E904 when pixels differ by more than 2 levels (0.25 on average), or FP32 scores by more than 1e-4.
    """
    from ..core.bundle import read_bundle
    from ..core.files import write_json
    from ..core.outputs import COMPARED, claim_file

    if out is not None:
        claim_file(Path(out), COMPARED, force=force)
    from ..measuring.verify import engines_of, verify_run, verify_table

    found = run_of(run)
    bundle = read_bundle(found.bundle_path)
    reference, engines = engines_of(bundle, found.exports, usual_device(), trust=trust)
    result = verify_run(
        bundle,
        found.manifest,
        reference,
        engines,
        images=images or found.config.export.verify_images,
        run=str(found.directory),
    )
    if out is not None:
        write_json(Path(out), result)
    return result | {"table": verify_table(result)}


def deploy(run: RunLike = None, kind: str = "kserve", **options: Any) -> str:
    """A manifest that serves the Triton export of a run: for KServe, or for plain Kubernetes.

    Args:
        kind: kserve or k8s.
        options: further arguments of `serving.deploy.render`.

    Returns:
        YAML.

    Raises:
        ConfigError: C003 for an unknown kind; ExportError: E001 without a Triton export.
    """
    from ..core.bundle import read_bundle
    from ..core.exports import find_export
    from ..serving.deploy import render

    found = run_of(run)
    made = find_export(found.exports, read_bundle(found.bundle_path), "triton")
    return render(kind, name=options.pop("name", None) or "classifier", export=made, **options)
