"""Images that are decoded in a child: the same pixels and reasons, and whatever happens to the child is a reason."""

from __future__ import annotations

import io
import os
import signal
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgcls_fast.core.image_bounds import webp_is_sound
from imgcls_fast.data import shelter
from imgcls_fast.data.decode import Undecodable, decode_pixels
from imgcls_fast.data.shelter import is_needed

PICTURE = Image.fromarray(np.random.default_rng(2).integers(0, 256, (31, 45, 3), dtype=np.uint8))


def encoded(kind: str, image: Image.Image = PICTURE, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def fresh(monkeypatch):
    """Children of this test alone, ended with it."""
    mine: dict[int, Any] = {}
    monkeypatch.setattr(shelter, "_shelters", mine)
    yield mine
    for one in mine.values():
        for each in one._idle:
            each.end()


def children_of(mine: dict[int, Any]) -> list[int]:
    return [each.process.pid for one in mine.values() for each in one._idle]


@pytest.mark.parametrize("color", ["gray", "rgb", "rgba"])
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg"])
def test_pixels_of_a_child_are_those_of_this_process(fresh, monkeypatch, color, compression):
    exif = Image.Exif()
    exif[274] = 6
    content = encoded("TIFF", compression=compression, exif=exif)
    assert is_needed("TIFF", content)
    ours = decode_pixels(content, color=color)
    assert len(children_of(fresh)) == 1
    monkeypatch.setattr(shelter, "_inside", True)
    np.testing.assert_array_equal(ours, decode_pixels(content, color=color))
    assert ours.flags.writeable and ours.flags.c_contiguous


def test_a_child_takes_no_memory_for_threads_that_it_does_not_need(fresh, monkeypatch):
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "2")
    decode_pixels(encoded("TIFF", compression="tiff_lzw"))
    (one,) = children_of(fresh)
    assert {b"OPENBLAS_NUM_THREADS=1", b"OMP_NUM_THREADS=1"} <= set(
        Path(f"/proc/{one}/environ").read_bytes().split(b"\0")
    )
    assert len(os.listdir(f"/proc/{one}/task")) == 1


def test_one_child_serves_many_and_each_thread_has_its_own(fresh):
    content = encoded("TIFF", compression="tiff_lzw")
    for _ in range(3):
        decode_pixels(content)
    assert len(children_of(fresh)) == 1
    threads = [threading.Thread(target=decode_pixels, args=(content,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= len(children_of(fresh)) <= 3


def test_a_reason_crosses_the_border_and_the_child_lives_on(fresh):
    content = encoded("TIFF", compression="tiff_adobe_deflate")
    decode_pixels(content)
    (pid,) = children_of(fresh)
    for bad in (content[: len(content) // 2], content[:8] + b"\xff" * (len(content) - 8)):
        with pytest.raises(Undecodable) as caught:
            decode_pixels(bad, name="x.tif")
        assert caught.value.reason and caught.value.path == "x.tif"
    assert children_of(fresh) == [pid]


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_a_child_that_dies_or_hangs_is_a_reason_and_the_next_image_gets_another(fresh, monkeypatch, how):
    content = encoded("TIFF", compression="tiff_lzw")
    monkeypatch.setattr(shelter, "TIMEOUT_S", 0.2)  # the first image has START_S beside it
    decode_pixels(content)
    (pid,) = children_of(fresh)
    os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    with pytest.raises(Undecodable) as caught:
        decode_pixels(content)
    assert caught.value.reason == (
        "decoder crashed (SIGKILL)" if how == "killed" else "decoder hung: no answer in 0.2 s"
    )
    monkeypatch.setattr(shelter, "TIMEOUT_S", 30.0)
    assert decode_pixels(content).shape == (31, 45, 3)
    assert children_of(fresh) != [pid]


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}], ids=str)
def test_a_webp_as_encoders_write_it_is_decoded_here(fresh, options):
    for image in (PICTURE, PICTURE.convert("RGBA")):
        content = encoded("WEBP", image, **options)
        assert webp_is_sound(content)
        assert decode_pixels(content).shape == (31, 45, 3)
    assert not children_of(fresh)


def test_a_webp_with_a_wrong_container_is_not_sound():
    whole = encoded("WEBP", PICTURE.convert("RGBA"))
    assert not any(webp_is_sound(whole[:n]) for n in range(len(whole)))
    for at in (4, 16):  # of the file, of the first chunk
        for size in (0, 1, 2**31, 2**32 - 1):
            assert not webp_is_sound(whole[:at] + struct.pack("<I", size) + whole[at + 4 :])
    twice = whole[12:] * 2
    assert not webp_is_sound(b"RIFF" + struct.pack("<I", 4 + len(twice)) + b"WEBP" + twice)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_other_kinds_need_no_child(fresh, tmp_path: Path, kind):
    path = tmp_path / "x"
    path.write_bytes(encoded(kind))
    decode_pixels(path)
    assert not children_of(fresh)
