"""Bounds on what a file may ask of its reader: bytes, entries and depth, hence time and memory.

One table for all parsers. Files come from strangers (an archive, a table, a run folder, weights, a graph), so each
reader refuses what is larger than anything a person makes, before it is in memory. `docs/security.md` shows the table
under "Bounds", and a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# archives
ARCHIVE_ENTRIES = 10_000_000
ARCHIVE_UNPACKED_BYTES = 2 << 40  # larger than any set of photos in one archive; the disk usually ends first
ARCHIVE_RATIO = 200  # bytes out per byte in; photos hardly compress at all
ARCHIVE_RATIO_FROM_BYTES = GIB  # the ratio counts from here on, so that flat test pictures pass
ARCHIVE_NAME_BYTES = 4096  # PATH_MAX
ARCHIVE_FOLDERS = 64  # one inside the other
TAR_HEADER_BYTES = 64 * KIB  # of one pax or GNU header; a long name needs 4 KiB
XZ_MEMORY_BYTES = 256 * MIB  # `xz -9` needs 65 MiB
ZIP_ENTRIES = 2_000_000  # `zipfile` keeps about 0.7 KiB of each in memory
ZIP_DIRECTORY_BYTES = 512 * MIB

# settings
YAML_BYTES = 128 * KIB  # the parser is pure Python; the largest preset has 1 KiB
YAML_DEPTH = 16

# tables of images
TABLE_BYTES = 8 * GIB
TABLE_ROWS = 20_000_000
TABLE_LINE_CHARACTERS = MIB
TABLE_CELL_CHARACTERS = 128 * KIB
TABLE_COLUMNS = 1000
TABLE_PATH_CHARACTERS = 4096
TABLE_PROBLEMS = 10_000  # a table with more of them is no list of images

# images: image_bounds.py

# weights
TENSOR_HEADER_BYTES = 16 * MIB
TENSORS = 50_000
PICKLE_STEPS = 1_000_000  # of the part of a .pt file that is a program; a tensor takes about 50

# graphs
ONNX_BYTES = 2 * GIB  # what protobuf can hold at all
ONNX_FIELDS = 500_000  # of all messages; a transformer of 5,000 nodes has a quarter of it
ONNX_DEPTH = 32
TRIAL_BYTES = 8 * GIB  # address space of the process that tries a stranger's file, and 16 bytes per byte of it
TRIAL_SECONDS = 60  # its CPU time, for loading the runtime, opening the file, and one image

# a run folder
JSON_BYTES = 16 * MIB
STATE_BYTES = 64 * MIB  # state.json of a checkpoint holds one entry per epoch and per quarantined row
TEXT_BYTES = 64 * MIB  # metrics.csv; the end of events.jsonl
QUARANTINE_BYTES = GIB  # a line per bad image
MANIFEST_BYTES = 4 * GIB
MANIFEST_UNPACKED_BYTES = 8 * GIB
MANIFEST_RATIO = 200
MANIFEST_RATIO_FROM_BYTES = 64 * MIB


@dataclass(frozen=True)
class Bound:
    """One row of the table: what is read, what its reader bounds, by how much, and the error beyond it."""

    file: str
    what: str
    limit: int
    unit: str
    code: str


BOUNDS: tuple[Bound, ...] = (
    Bound("archive", "entries", ARCHIVE_ENTRIES, "", "D007"),
    Bound("archive", "unpacked size", ARCHIVE_UNPACKED_BYTES, "bytes", "D007"),
    Bound("archive", "bytes out per byte in, beyond 1 GiB", ARCHIVE_RATIO, "", "D007"),
    Bound("archive", "length of a name", ARCHIVE_NAME_BYTES, "bytes", "D007"),
    Bound("archive", "folders inside each other", ARCHIVE_FOLDERS, "", "D007"),
    Bound(".tar", "pax or GNU header", TAR_HEADER_BYTES, "bytes", "D007"),
    Bound(".tar.xz", "memory of the decompressor", XZ_MEMORY_BYTES, "bytes", "D007"),
    Bound(".zip", "entries", ZIP_ENTRIES, "", "D007"),
    Bound(".zip", "central directory", ZIP_DIRECTORY_BYTES, "bytes", "D007"),
    Bound("YAML", "size", YAML_BYTES, "bytes", "C005"),
    Bound("YAML", "nesting", YAML_DEPTH, "levels", "C005"),
    Bound("CSV, TSV, JSONL", "size", TABLE_BYTES, "bytes", "D004"),
    Bound("CSV, TSV, JSONL", "rows", TABLE_ROWS, "", "D004"),
    Bound("CSV, TSV, JSONL", "line", TABLE_LINE_CHARACTERS, "characters", "D004"),
    Bound("CSV, TSV", "cell", TABLE_CELL_CHARACTERS, "characters", "D004"),
    Bound("CSV, TSV, JSONL", "columns", TABLE_COLUMNS, "", "D004"),
    Bound("CSV, TSV, JSONL", "path or label", TABLE_PATH_CHARACTERS, "characters", "D004"),
    Bound("CSV, TSV, JSONL", "faulty rows", TABLE_PROBLEMS, "", "D004"),
    Bound(".safetensors", "header", TENSOR_HEADER_BYTES, "bytes", "M003"),
    Bound(".safetensors", "tensors", TENSORS, "", "M003"),
    Bound(".pt, .pth, .bin, .ckpt", "steps of the pickle", PICKLE_STEPS, "", "M003"),
    Bound(".onnx", "size", ONNX_BYTES, "bytes", "E005"),
    Bound(".onnx", "fields of all messages", ONNX_FIELDS, "", "E005"),
    Bound(".onnx", "graphs inside each other", ONNX_DEPTH, "", "E005"),
    Bound(".onnx of others, opened and run once", "memory", TRIAL_BYTES, "bytes", "E005"),
    Bound(".onnx of others, opened and run once", "CPU time", TRIAL_SECONDS, "s", "E005"),
    Bound("JSON of a run, bundle or export", "size", JSON_BYTES, "bytes", "D016, M004, E001"),
    Bound("state.json of a checkpoint", "size", STATE_BYTES, "bytes", "M005"),
    Bound("metrics.csv of a run", "size", TEXT_BYTES, "bytes", "D016"),
    Bound("quarantine.csv of a run", "size", QUARANTINE_BYTES, "bytes", "D016"),
    Bound("manifest.npz", "size", MANIFEST_BYTES, "bytes", "D009"),
    Bound("manifest.npz", "unpacked size", MANIFEST_UNPACKED_BYTES, "bytes", "D009"),
    Bound("manifest.npz", "bytes out per byte in, beyond 64 MiB", MANIFEST_RATIO, "", "D009"),
)


def markdown() -> str:
    """The table as docs/security.md shows it."""
    lines = ["| file | bound on | limit | error beyond it |", "| --- | --- | --- | --- |"]
    return "\n".join(lines + [f"| {b.file} | {b.what} | {_number(b)} | {b.code} |" for b in BOUNDS])


def _number(bound: Bound) -> str:
    if bound.unit != "bytes":
        return f"{bound.limit:,} {bound.unit}".strip()
    for size, name in ((1 << 40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if bound.limit >= size:
            return f"{bound.limit / size:g} {name}"
    return f"{bound.limit} bytes"
