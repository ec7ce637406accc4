"""Mutated image files through the scan, both loaders and predict: nothing dies, and all agree on what is bad.

    python benchmarks/mutate_images.py --count 10000

Pictures of six formats in 27 variants get bytes changed, cut, spliced and inserted, and their chunks, segments and
directories dropped, doubled, exchanged and given wrong lengths (with the checksum mended). Each batch is

1. scanned anew; both loaders then read what the scan let through, and find nothing more;
2. put in the place of good files that were scanned before, and read by both loaders and by predict.

Everything runs in a child process, so that a death is counted and not suffered. Exits with 1 when a process died, a
batch raised, or two of the four disagree.
"""

from __future__ import annotations

import argparse
import io
import json
import selectors
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

BATCH = 250
TIMEOUT_S = 600.0  # for one batch: longer is a hang
SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "GIF": "gif"}

# ---------------------------------------------------------------- pictures


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (90, 70)) -> Image.Image:
    """A picture with soft shapes and a little noise."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (7, 9, 4), dtype=np.uint8), "RGBA").resize(size)
    noisy = np.clip(np.asarray(coarse).astype(int) + draw.integers(-9, 10, (size[1], size[0], 4)), 0, 255)
    image = Image.fromarray(noisy.astype(np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[274], exif[270] = 6, "outside of its entry"
    return exif


def _text() -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", "any", zip=True)
    text.add_itxt("XML:com.adobe.xmp", "<x/>" * 50, zip=True)
    return text


def variants(seed: int) -> list[tuple[str, bytes]]:
    """(kind, file) of each variant that is mutated."""
    rgb, gray, alpha = picture(seed), picture(seed, "L"), picture(seed, "RGBA")
    more = [picture(seed + k) for k in (1, 2)]
    pages: dict[str, Any] = {"save_all": True, "append_images": more}
    return [
        ("JPEG", _saved(rgb, "JPEG", quality=90)),
        ("JPEG", _saved(rgb, "JPEG", progressive=True, exif=_exif())),
        ("JPEG", _saved(rgb, "JPEG", subsampling=0, restart_marker_blocks=3, icc_profile=bytes(3000))),
        ("JPEG", _saved(gray, "JPEG")),
        ("JPEG", _saved(rgb.convert("CMYK"), "JPEG", optimize=True)),
        ("PNG", _saved(rgb, "PNG")),
        ("PNG", _saved(alpha, "PNG", pnginfo=_text(), exif=_exif())),
        ("PNG", _saved(rgb.convert("P"), "PNG", transparency=3)),
        ("PNG", _saved(gray.point(lambda v: v * 257, "I").convert("I;16"), "PNG")),
        ("PNG", _saved(rgb.convert("1"), "PNG", icc_profile=bytes(3000))),
        ("PNG", _saved(rgb, "PNG", **pages)),
        ("WEBP", _saved(rgb, "WEBP", quality=80)),
        ("WEBP", _saved(rgb, "WEBP", lossless=True, exif=_exif())),
        ("WEBP", _saved(alpha, "WEBP", quality=80)),
        ("WEBP", _saved(rgb, "WEBP", **pages)),
        ("BMP", _saved(rgb, "BMP")),
        ("BMP", _saved(rgb.convert("P"), "BMP")),
        ("BMP", _saved(rgb.convert("1"), "BMP")),
        ("TIFF", _saved(rgb, "TIFF", exif=_exif(), **pages)),
        ("TIFF", _saved(rgb, "TIFF", compression="tiff_lzw")),
        ("TIFF", _saved(rgb, "TIFF", compression="tiff_adobe_deflate")),
        ("TIFF", _saved(rgb, "TIFF", compression="jpeg")),
        ("TIFF", _saved(gray, "TIFF", compression="packbits")),
        ("TIFF", _saved(rgb.convert("1"), "TIFF", compression="group4")),
        ("GIF", _saved(rgb.convert("P"), "GIF")),
        ("GIF", _saved(rgb.convert("P"), "GIF", interlace=1, comment=b"a comment")),
        ("GIF", _saved(rgb.convert("P"), "GIF", **pages)),
    ]


# ---------------------------------------------------------------- mutations

Draw = np.random.Generator


def change_bytes(content: bytes, other: bytes, draw: Draw, kind: str) -> bytes:
    """One to ten bytes, half the time near the beginning."""
    out = bytearray(content)
    most = min(len(out), 400) if draw.random() < 0.5 else len(out)
    for at in draw.integers(0, most, int(draw.integers(1, 11))):
        out[at] = int(draw.choice([0, 1, 127, 255, out[at] ^ (1 << int(draw.integers(8)))]))
    return bytes(out)


def cut(content: bytes, other: bytes, draw: Draw, kind: str) -> bytes:
    return content[: int(draw.integers(0, len(content)))]


def splice(content: bytes, other: bytes, draw: Draw, kind: str) -> bytes:
    """A stretch of another file over one of this file, or behind its first part."""
    at, length = int(draw.integers(0, len(content))), int(draw.integers(1, 500))
    start = int(draw.integers(0, len(other)))
    if draw.random() < 0.3:
        return content[:at] + other[start:]
    return content[:at] + other[start : start + length] + content[at + length :]


def insert(content: bytes, other: bytes, draw: Draw, kind: str) -> bytes:
    at = int(draw.integers(0, len(content)))
    extra = bytes(int(draw.integers(1, 300))) if draw.random() < 0.5 else draw.bytes(int(draw.integers(1, 300)))
    return content[:at] + extra + content[at:]


def zero(content: bytes, other: bytes, draw: Draw, kind: str) -> bytes:
    """A stretch of zeros: a page that was never written."""
    at, length = int(draw.integers(0, len(content))), int(draw.choice([16, 128, 512, 4096]))
    return (content[:at] + bytes(length) + content[at + length :])[: len(content)]


def edit_parts(content: bytes, other: bytes, draw: Draw, kind: str) -> bytes:
    """Drop, double, exchange, fill or mis-measure one part (chunk, segment, directory entry, block)."""
    parts = parts_of(content, kind)
    if len(parts) < 3:
        return change_bytes(content, other, draw, kind)
    k, j = (int(v) for v in draw.integers(0, len(parts), 2))
    action = int(draw.integers(5))
    if action == 0:
        del parts[k]
    elif action == 1:
        parts.insert(j, parts[k])
    elif action == 2:
        parts[k], parts[j] = parts[j], parts[k]
    elif action == 3:
        parts[k] = mended(change_bytes(parts[k], other, draw, kind) if parts[k] else b"", kind)
    else:
        at = 4 if kind in ("WEBP", "TIFF") else 0 if kind == "PNG" else 2
        size = int(draw.choice([0, 1, 2, 255, 65535, 2**31 - 1, 2**32 - 1]))
        field = struct.pack(
            ">H" if kind == "JPEG" else ">I" if kind == "PNG" else "<I", size & (65535 if kind == "JPEG" else 2**32 - 1)
        )
        parts[k] = parts[k][:at] + field + parts[k][at + len(field) :]
    return b"".join(parts)


def parts_of(content: bytes, kind: str) -> list[bytes]:
    """The parts of a good file, whose concatenation it is."""
    at, ends = {"JPEG": 2, "PNG": 8, "WEBP": 12, "TIFF": 8, "GIF": 13, "BMP": 14}[kind], [0]
    while at < len(content) - 8:
        ends.append(at)
        if kind == "PNG":
            at += 12 + int.from_bytes(content[at : at + 4], "big")
        elif kind == "WEBP":
            size = int.from_bytes(content[at + 4 : at + 8], "little")
            at += 8 + size + size % 2
        elif kind == "JPEG":
            if content[at] != 0xFF or content[at + 1] == 0xDA:
                following = content.find(b"\xff\xda", at + 2)
                at = following if following > 0 else len(content)
            else:
                at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        else:
            at += {"TIFF": 12, "GIF": 256, "BMP": 4}[kind]
    return [content[a:b] for a, b in zip(ends, [*ends[1:], len(content)], strict=True)]


def mended(part: bytes, kind: str) -> bytes:
    """A changed PNG chunk with a right checksum: the damage is for the decoder to find."""
    if kind != "PNG" or len(part) < 12:
        return part
    return part[:-4] + struct.pack(">I", zlib.crc32(part[4:-4]))


MUTATIONS: tuple[Callable[[bytes, bytes, Draw, str], bytes], ...] = (
    change_bytes, change_bytes, cut, splice, insert, zero, edit_parts, edit_parts, edit_parts,
)  # fmt: skip


def mutated(seed: int, count: int) -> list[tuple[str, bytes, bytes]]:
    """(kind, original, mutated) of a batch; a pure function of its arguments."""
    draw = np.random.default_rng(seed)
    sources = variants(seed)
    out = []
    for k in range(count):
        kind, content = sources[k % len(sources)]
        _, other = sources[int(draw.integers(len(sources)))]
        changed = content
        for _ in range(1 if draw.random() < 0.7 else 2):
            changed = MUTATIONS[int(draw.integers(len(MUTATIONS)))](changed, other, draw, kind) or b"\0"
        out.append((kind, content, changed))
    return out


# ---------------------------------------------------------------- the four


class _Answers:
    """An engine that scores nothing: predict's reading and decoding is what is looked at."""

    runtime, device, max_batch, thresholds = "none", "cpu", 64, None

    def __init__(self, pixels: Any, labels: Any) -> None:
        self.pixels, self.labels = pixels, labels

    def scores(self, pixels: np.ndarray) -> np.ndarray:
        return np.full((len(pixels), self.labels.size), 0.5, np.float32)

    def close(self) -> None:
        """Nothing is held."""


def examine_batch(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """What the four found in one batch, as plain values."""
    from imgcls_fast.core.pixels import Pixels
    from imgcls_fast.data.findings import ScanOptions
    from imgcls_fast.data.scan import scan
    from imgcls_fast.engines.predictor import Predictor
    from imgcls_fast.loading.augment import Augment
    from imgcls_fast.loading.loader import dali_missing
    from imgcls_fast.loading.sampler import Sampler

    files = mutated(seed, count)
    options = ScanOptions(max_bad=10**9, duplicates="keep", threads=2, verify="suspect")
    pixels = Pixels(32, 0.875, "bilinear", "rgb", "apply", (0.5,) * 3, (0.5,) * 3)
    backends = ("torch",) if dali_missing() else ("torch", "dali-cpu")
    names = [f"{'ab'[k % 2]}/{k:05}.{SUFFIX[kind]}" for k, (kind, _, _) in enumerate(files)]

    def write(which: int) -> None:
        for name, versions in zip(names, files, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(versions[which])

    def read(manifest: Any, backend: str, training: bool) -> dict[str, str]:
        from imgcls_fast.loading.loader import open_loader

        augment = Augment((0.2, 1.0)) if training else None
        sampler = Sampler(manifest, np.arange(len(manifest)), pixels, 32, seed=seed, augment=augment)
        loader = open_loader(sampler, backend, workers=0 if backend == "torch" else 2)
        for epoch in (0, 1) if training else (0,):  # the tail of a training epoch is dropped
            for _ in loader.epoch(epoch):
                pass
        loader.close()
        return {manifest.paths[row]: reason for row, reason in loader.bad.items()}

    write(1)
    clean = scan(folder, options).manifest
    write(2)
    found = scan(folder, options)
    at_scan = {bad.path: bad.reason for bad in found.quarantine}
    after = {backend: read(found.manifest, backend, False) for backend in backends}
    after |= {f"{backend}, training": read(found.manifest, backend, True) for backend in backends}
    exchanged = {backend: read(clean, backend, False) for backend in backends}
    predictor = Predictor(_Answers(pixels, clean.labels), batch=64)  # type: ignore[arg-type]
    predicted = {
        name: answer.error
        for name, answer in zip(names, predictor([folder / n for n in names]), strict=True)
        if answer.error
    }
    damaged = {
        backend: {name for name, reason in bad.items() if not reason.startswith("changed since the scan")}
        for backend, bad in exchanged.items()
    }
    kinds = dict(zip(names, (kind for kind, _, _ in files), strict=True))
    return {
        "seed": seed,
        "files": Counter(kinds.values()),
        "bad": Counter(kinds[name] for name in predicted),
        "disagree": {
            "scan and predict": sorted(at_scan.keys() ^ predicted.keys()),
            "a loader behind the scan": {who: bad for who, bad in after.items() if bad},
            "the loaders": sorted(exchanged["torch"].items() ^ exchanged[backends[-1]].items()),
            "a loader and predict": {
                who: sorted(bad ^ (predicted.keys() & set(clean.paths))) for who, bad in damaged.items()
                if bad ^ (predicted.keys() & set(clean.paths))
            },
        },
    }  # fmt: skip


# ---------------------------------------------------------------- the campaign


def serve(first: int, batches: int, size: int, seed: int) -> None:
    """The child: one JSON line a batch on stdout."""
    for k in range(first, batches):
        with tempfile.TemporaryDirectory() as place:
            line = json.dumps({"batch": k, **examine_batch(seed + k, size, Path(place) / "images")})
        print(line, flush=True)


def campaign(count: int, seed: int) -> dict[str, Any]:
    """Run all batches in a child that is started again after each death; returns the figures."""
    size = min(BATCH, count)
    batches = -(-count // size)
    totals: dict[str, Counter[str]] = {"files": Counter(), "bad": Counter()}
    deaths: list[dict[str, Any]] = []
    disagree: list[dict[str, Any]] = []
    done, began = 0, time.monotonic()
    while done < batches:
        command = [
            sys.executable,
            __file__,
            "--serve",
            str(done),
            "--count",
            str(batches * size),
            "--seed",
            str(seed),
            "--size",
            str(size),
        ]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        reason = ""
        while done < batches and not reason:
            line = _next_line(child)
            if not line:
                child.kill()
                reason = f"batch {done}: exit {child.wait()}: {(child.stderr.read() if child.stderr else '')[-600:]}"
                break
            answer = json.loads(line)
            for name, total in totals.items():
                total.update(answer[name])
            wrong = {name: value for name, value in answer["disagree"].items() if value}
            if wrong:
                disagree.append({"seed": answer["seed"], **wrong})
            done = answer["batch"] + 1
            print(
                f"{done * size:,} files, {len(deaths)} deaths, {len(disagree)} batches with a disagreement",
                file=sys.stderr,
            )
        child.kill()
        child.communicate()
        if reason:
            deaths.append({"seed": seed + done, "reason": reason})
            done += 1
    return {
        "files": sum(totals["files"].values()), "bad": sum(totals["bad"].values()), "seed": seed, "batch": size,
        "by_format": {kind: {"files": totals["files"][kind], "bad": totals["bad"][kind]} for kind in SUFFIX},
        "deaths": deaths, "disagreements": disagree, "wall_s": round(time.monotonic() - began, 1),
    }  # fmt: skip


def _next_line(child: subprocess.Popen[str]) -> str:
    """The child's next line; empty when it died or does not answer."""
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        return child.stdout.readline() if selector.select(TIMEOUT_S) else ""


def main() -> int:
    from imgcls_fast.core import env

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="mutated files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file (default: results/MACHINE/mutate_images.json)")
    parser.add_argument("--keep", type=Path, help="write the batch of this --seed into a folder, and do nothing else")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=BATCH, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve, options.count // options.size, options.size, options.seed)
        return 0
    if options.keep is not None:
        shutil.rmtree(options.keep, ignore_errors=True)
        options.keep.mkdir(parents=True)
        for k, (kind, _, changed) in enumerate(mutated(options.seed, options.size)):
            (options.keep / f"{k:05}.{SUFFIX[kind]}").write_bytes(changed)
        return 0
    figures = campaign(options.count, options.seed)
    out = options.out or Path(__file__).parent / "results" / env.machine_slug() / "mutate_images.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": env.machine_facts(), **figures}, indent=1) + "\n", "utf-8")
    print(
        f"{figures['files']:,} files, {figures['bad']:,} bad; {len(figures['deaths'])} deaths, "
        f"{len(figures['disagreements'])} batches with a disagreement: {out}"
    )
    return 1 if figures["deaths"] or figures["disagreements"] else 0


if __name__ == "__main__":
    sys.exit(main())
