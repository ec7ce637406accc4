"""Looks at each file once: header probe, digest, and a full decode of what is suspicious."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from ..core.errors import DataError
from ..core.manifest import FLAG_PILLOW, FLAG_SUSPECT, FLAG_WIDE
from ..core.phases import counted_off, phase
from . import decode, duplicates, proof, reach
from .findings import ScanOptions
from .listing import Listing, is_named_as_image
from .quarantine import Verdict, examine, examine_isolated

_JPEG, _PNG, _WEBP, _BMP, _TIFF, _GIF = 1, 2, 3, 4, 5, 6  # the probe's `format`
_ODD_JPEG, _ODD_BMP = 1, 16  # bits of the probe's `detail`
_SOUND, _UNREADABLE, _EMPTY, _FOREIGN, _DAMAGED = 0, 1, 2, 3, 4  # the probe's `status`
_CHUNK = 20_000  # rows in flight, so that ten million rows do not become ten million futures
_HASH_WHOLE = 64 << 20  # larger files are hashed in pieces


def is_no_image(path: str, status: int) -> bool:
    """Whether a file that was found in a folder is none of ours to judge: neither content nor name is an image's."""
    return status not in (_SOUND, _DAMAGED) and not is_named_as_image(path)


def probe(paths: list[bytes], threads: int) -> dict[str, np.ndarray]:
    """Headers of many files, by the compiled probe.

    Raises:
        HardwareError: H004 when the package was installed without its compiled half.
    """
    return dict(proof.compiled().probe(paths, threads))  # a TypedDict, used by column name


@dataclass
class Files:
    """What is known of each row's file, column by column."""

    listing: Listing
    options: ScanOptions
    threads: int
    skip: np.ndarray = field(init=False)  # (N,) bool, not an image at all
    digest: np.ndarray = field(init=False)  # (N, 16) uint8
    flags: np.ndarray = field(init=False)  # (N,) uint8
    reasons: dict[int, str] = field(default_factory=dict)  # row -> why it is bad
    head: dict[str, np.ndarray] = field(default_factory=dict)  # the probe's columns

    def full(self, row: int) -> str:
        return os.path.join(self.listing.root, self.listing.paths[row])

    def look(self) -> None:
        """Probe, judge headers, hash, and decode what is suspicious."""
        n = len(self.listing.paths)
        with phase("looking at the files", n, "files") as current:
            pieces = [range(s, min(s + _CHUNK, n)) for s in range(0, n, _CHUNK)] or [range(0)]
            parts = []
            for piece in pieces:
                parts.append(probe([os.fsencode(self.full(row)) for row in piece], self.threads))
                current.to(piece.stop)
        self.head = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        self._wait_for_unreachable()
        self.skip = np.zeros(n, bool)
        self.digest = np.zeros((n, 16), np.uint8)
        self.flags = pillow_flags(self.head)
        suspects = self._judge_headers()
        unsound = self._hash()
        suspects |= unsound
        self._decode_suspects(sorted(suspects - self.reasons.keys()), unsound)
        if self.options.verify == "full":
            self._decode_all(suspects)

    def _wait_for_unreachable(self) -> None:
        """Probe again, together and with growing waits, what the listing saw and the probe could not open.

        Raises:
            DataError: D015 when something stays out of reach.
        """
        for wait in (*reach.WAITS_S, None):
            away = [
                (row, fault)
                for row in np.flatnonzero(self.head["status"] == _UNREADABLE).tolist()
                if (fault := _fault_of_disk(self.full(row)))
            ]
            if not away:
                return
            if wait is None:
                row, fault = away[0]
                raise reach.unreachable(self.full(row), fault, sum(reach.WAITS_S), others=len(away) - 1)
            time.sleep(wait)
            again = probe([os.fsencode(self.full(row)) for row, _ in away], self.threads)
            for name, column in again.items():
                self.head[name][[row for row, _ in away]] = column

    def good(self) -> np.ndarray:
        """(n,) int64 rows that are images and not bad."""
        good = ~self.skip
        good[list(self.reasons)] = False
        return np.flatnonzero(good)

    def _judge_headers(self) -> set[int]:
        """Sort out what the header alone decides; the rows returned need a full decode."""
        head, limit = self.head, self.options.max_megapixels
        status, kind = head["status"], head["format"]
        area = head["width"].astype(np.float64) * head["height"]
        for row in np.flatnonzero((status != 0) & (status != _DAMAGED)).tolist():
            self._judge_foreign(row, int(status[row]))
        large = (status == 0) & (area > limit * 1e6)
        for row in np.flatnonzero(large).tolist():
            self.reasons[row] = decode.too_large(int(head["width"][row]), int(head["height"][row]), limit)
        # Near the limit, or far more pixels than bytes: a possible bomb. What is inside a WebP, TIFF or GIF only a
        # decoder can tell, and the containers allow what makes decoders crash.
        heavy = (area > limit * 0.5e6) | ((area > 4e6) & (area > 1000.0 * head["size_bytes"]))
        suspect = (status == _DAMAGED) | (head["truncated"] != 0) | heavy | (kind == _TIFF) | (kind == _GIF)
        suspect |= (kind == _WEBP) | ((kind == _BMP) & ((head["detail"] & _ODD_BMP) != 0))
        suspect &= ((status == 0) | (status == _DAMAGED)) & ~large
        return set(np.flatnonzero(suspect).tolist())

    def _judge_foreign(self, row: int, status: int) -> None:
        path = self.full(row)
        if not self.listing.explicit and is_no_image(path, status):
            self.skip[row] = True
        elif status == _EMPTY:
            self.reasons[row] = decode.why_not("empty")
        else:
            self.reasons[row] = _why_foreign(path)

    def _hash(self) -> set[int]:
        """Digest every row; files whose chunks or segments are out of order are suspects, too."""
        rows = self.good().tolist()
        kind = self.head["format"]
        wrong: set[int] = set()

        def one(row: int) -> tuple[bytes, bool]:
            return _digest(self.full(row), int(kind[row]))

        answers = _in_threads(one, rows, self.threads, "reading the images")
        for row, answer in zip(rows, answers, strict=True):
            if isinstance(answer, reach.NotAFile):
                self.reasons[row] = answer.reason
                continue
            self.digest[row] = np.frombuffer(answer[0], np.uint8)
            if not answer[1]:
                wrong.add(row)
        return wrong

    def _decode_suspects(self, rows: list[int], unsound: set[int]) -> None:
        """Decode in child processes: these are the files that make decoders crash."""
        if not rows:
            return
        workers = max(1, min(self.threads, len(rows) // 16))
        with phase(f"decoding {len(rows):,} unusual images"):
            verdicts = examine_isolated(
                [self.full(r) for r in rows], max_megapixels=self.options.max_megapixels, workers=workers
            )
        unusual = (self.head["truncated"] != 0) | (self.head["status"] == _DAMAGED)
        for row, verdict in zip(rows, map(self._final, rows, verdicts), strict=True):
            if not verdict.ok:
                self.reasons[row] = verdict.reason
                continue
            if unusual[row] or row in unsound:
                self.flags[row] |= FLAG_SUSPECT | FLAG_PILLOW  # good for Pillow; other decoders may be stricter
            if self.head["status"][row] == _DAMAGED:
                self._take_size(row, verdict)

    def _final(self, row: int, verdict: Verdict) -> Verdict:
        """The same verdict; where the child could not reach the file, another one or D015."""
        if not verdict.unreachable:
            return verdict
        reach.with_file(self.full(row), lambda file: file.read(1))  # waits, or raises
        (again,) = examine_isolated([self.full(row)], max_megapixels=self.options.max_megapixels)
        if again.unreachable:
            raise reach.unreachable(self.full(row), OSError(again.reason))
        return again

    def _take_size(self, row: int, verdict: Verdict) -> None:
        self.head["width"][row], self.head["height"][row] = verdict.width, verdict.height
        self.head["orientation"][row] = verdict.orientation

    def _decode_all(self, done: set[int]) -> None:
        rows = [r for r in self.good().tolist() if r not in done]
        limit = self.options.max_megapixels

        def one(row: int) -> Verdict:
            return examine(self.full(row), limit)

        verdicts = _in_threads(one, rows, self.threads, "decoding every image")
        for row, verdict in zip(rows, verdicts, strict=True):
            if not (final := self._final(row, verdict)).ok:
                self.reasons[row] = final.reason

    def perceptual(self, rows: np.ndarray) -> np.ndarray:
        """(n,) uint64 difference hashes; rows that turn out to be bad are noted and get 0."""
        limit, exif = self.options.max_megapixels, self.options.exif

        def one(row: int) -> int:
            try:
                return duplicates.dhash(
                    decode.decode_pixels(self.full(row), color="gray", exif=exif, max_megapixels=limit)
                )
            except decode.Undecodable as error:
                self.reasons[row] = error.reason
                return 0

        hashes = _in_threads(one, rows.tolist(), self.threads, "looking for near duplicates")
        return np.fromiter(hashes, np.uint64, len(rows))


def pillow_flags(head: dict[str, np.ndarray]) -> np.ndarray:
    """(N,) uint8 with FLAG_PILLOW where DALI's decoder does not give the pixels of `decode.decode_pixels`, and FLAG_WIDE.

    Found by comparing both over malformed and unusual files (tests/data/test_scan_shared.py).
    """
    kind, detail = head["format"], head["detail"]
    odd = (kind == _GIF) | (kind == _TIFF) | (head["bit_depth"] > 8) | (head["animated"] != 0)
    odd |= (detail & (_ODD_JPEG | _ODD_BMP)) != 0
    odd |= (kind != _JPEG) & (head["orientation"] > 1)  # DALI turns JPEG by its tag, WebP never, PNG only by eXIf
    wide = (head["bit_depth"] > 8) & (head["channels"] == 1)
    return (np.where(odd, FLAG_PILLOW, 0) | np.where(wide, FLAG_WIDE, 0)).astype(np.uint8)


def _in_threads(work: Callable[[int], Any], rows: Sequence[int], threads: int, what: str) -> Iterator[Any]:
    """Yield results in order, counted in a phase of this name; NotAFile becomes a result, any other error ends the work at once."""

    def guarded(row: int) -> Any:
        try:
            return work(row)
        except reach.NotAFile as error:
            return error

    pool = ThreadPoolExecutor(max(1, threads))
    try:
        with phase(what, len(rows), "images") as current:
            for start in range(0, len(rows), _CHUNK):
                yield from counted_off(pool.map(guarded, rows[start : start + _CHUNK]), current)
    finally:
        pool.shutdown(cancel_futures=True)  # else thousands of rows would each wait for a disk that is away


def _fault_of_disk(path: str) -> OSError | None:
    """Why the probe could not read a file that was listed; None when that is no fault of the disk."""
    try:
        reach.with_file(path, lambda file: file.read(1), waits=())
    except reach.NotAFile:
        return None
    except DataError as error:
        fault = error.__cause__
        assert isinstance(fault, OSError)
        broken = os.path.islink(path) and fault.errno == errno.ENOENT
        return None if broken else fault
    return OSError(errno.EIO, os.strerror(errno.EIO))  # it can be read now, and could not a moment ago


def _why_foreign(path: str) -> str:
    try:
        head = reach.with_file(path, lambda file: file.read(1024), seen=not os.path.islink(path))
    except (OSError, reach.NotAFile) as error:
        broken = os.path.islink(path) and not os.path.exists(path)
        return "broken symbolic link" if broken else getattr(error, "reason", str(error))
    return decode.why_not(decode.sniff(head))


def _digest(path: str, kind: int) -> tuple[bytes, bool]:
    """(first 16 bytes of the SHA-256, structure sound). All bytes pass through here anyway, so looking costs little."""

    def work(file: BinaryIO) -> bytes | None:
        if os.fstat(file.fileno()).st_size > _HASH_WHOLE:
            return None
        return file.read()

    content = reach.with_file(path, work)
    if content is None:
        whole = reach.with_file(path, lambda file: hashlib.file_digest(file, "sha256"))  # type: ignore[arg-type]
        return whole.digest()[:16], kind not in (_JPEG, _PNG)  # not walked through, so it will be decoded
    sound = proof.prove(content).sound if kind in (_JPEG, _PNG) else True
    return hashlib.sha256(content).digest()[:16], sound
