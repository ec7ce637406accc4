"""Writes the embedded data: 1,797 real handwritten digits that scikit-learn ships, as image files, with planted faults.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(CC BY 4.0), as packaged by scikit-learn.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..core.files import explained_write

_SIDE = 32  # pixels; the originals are 8 x 8
_NAME = "digits-v1"


def write_digits(cache: Path) -> Path:
    """Write the digits to train/val/test/CLASS/*.png, once and whole, and return their folder.

    Three files are broken on purpose (cut, empty, HTML) and one test image is also among the training images, so that
    the first run shows what happens to such files.

    Raises:
        HardwareError: H003 when the cache cannot be written.
    """
    folder = cache / _NAME
    if folder.is_dir():
        return folder
    temporary = cache / f".{_NAME}.{os.getpid()}"
    with explained_write(folder, "IMGCLS_CACHE"):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            _write(temporary)
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write(folder: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = [0] * 10
    for pixels, label in zip(digits.images, digits.target, strict=True):
        k = seen[label]
        seen[label] += 1
        split = {0: "val", 5: "test"}.get(k % 10, "test" if k % 10 == 9 else "train")  # 10 % val, 20 % test
        place = folder / split / str(label)
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * (255 / 16)).astype("uint8"), "L")
        image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(place / f"{label}_{k:03}.png")
    good = folder / "train" / "3" / "3_001.png"
    (folder / "train" / "3" / "cut.png").write_bytes(good.read_bytes()[:-60])
    (folder / "train" / "7" / "empty.png").write_bytes(b"")
    (folder / "train" / "8" / "not_found.png").write_text("<html><body>404 Not Found</body></html>")
    shutil.copy2(folder / "test" / "4" / "4_005.png", folder / "train" / "4" / "copy_of_a_test_image.png")
