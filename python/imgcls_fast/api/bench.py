"""Time engines on this machine, and draw and compare the results of benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core.run import Run
from .common import RunLike, run_of, say_warning, usual_device


def benchmark(
    run: RunLike = None,
    *,
    runtimes: Sequence[str] = (),
    batches: Sequence[int] = (),
    duration_s: float = 3.0,
    device: str | None = None,
    out: str | Path | None = None,
    say: Callable[[str], None] | None = None,
    trust: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Time the engines of a run on this machine: latency, rate, what they compute in and what they are worth.

    Args:
        run: a run, or the folder (or file) of one of its exports, which is then timed alone beside torch.
        runtimes: torch, compile, aoti, onnx, openvino, trt; empty: all that are here.
        batches: sizes; empty: 1, 2, 4, ... until the rate falls.
        duration_s: seconds of each timing.
        device: cpu or cuda; None: a GPU if there is one.
        out: also write the result there, as JSON; bench/efficiency.json of the run is always written.
        say: called with sentences about what happens.
        force: replace a file at `out` that `bench` has not written.

    Returns:
        model, engines (latency in ms, images per second, ratio to torch with its interval, precision, accuracy), data
        (images per second from files), absent (with reasons), machine. See `measuring.efficiency`.

    Raises:
        UsageError: U002 when `out` would replace somebody else's file.
        ConfigError: C003 for an unknown runtime or batch size; ModelError M004, M005; ExportError E001, E005.
    """
    from ..core.outputs import TIMES, claim_file

    if out is not None:
        claim_file(Path(out), TIMES, force=force)
    from ..measuring.efficiency import examine

    return examine(
        *_run_or_export(run),
        runtimes=tuple(runtimes),
        batches=tuple(batches),
        duration_s=duration_s,
        device=device or usual_device(),
        out=None if out is None else Path(out),
        say=say or say_warning,
        trust=trust,
    )


def bench_report(
    results: Sequence[str | Path] | str | Path, out: str | Path = "bench", *, force: bool = False
) -> dict[str, Any]:
    """Draw results of `pytest benchmarks`: one picture an area, the engines' accuracy against latency, one HTML page.

    Args:
        results: folders `results/<machine>`.
        out: folder for the page and the pictures.
        force: replace files there that no report of benchmarks has written.

    Returns:
        page, pictures (paths), tables (text of each area).

    Raises:
        UsageError: U004 when there are no results, or they cannot be read; U002 when somebody else's files would be replaced.
    """
    from ..measuring.charts import write_bench_report

    given = [results] if isinstance(results, str | Path) else results
    return write_bench_report([Path(folder) for folder in given], Path(out), force=force)


def bench_compare(before: str | Path, after: str | Path) -> dict[str, Any]:
    """Which ratios to a rival became worse by more than 5 %, between two results of one machine and one set of versions.

    Returns:
        rows (area, case, contender, rival, before, after, change, low, p, adjusted, flagged), flagged (their number),
        only_before and only_after (rows without a partner), and table: the same as text.

    Raises:
        UsageError: U004 when they cannot be read or must not be compared.
    """
    from ..measuring.results import compare, read_results

    return compare(*(read_results(Path(folder)) for folder in (before, after))).to_dict()


def _run_or_export(run: RunLike) -> tuple[Run, Path | None]:
    """A run; or the run to which an export belongs, and the export's folder."""
    from ..core.exports import export_folder

    folder = export_folder(Path(run)) if isinstance(run, str | Path) and str(run) != "last" else None
    return (run_of(run), None) if folder is None else (run_of(folder.parent.parent), folder)
