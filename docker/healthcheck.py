#!/opt/imgcls-fast/bin/python
"""Health of a container: everything that `imgcls-fast doctor` looks at works. Exit code 1 and the reasons, where not."""

from __future__ import annotations

import sys

from imgcls_fast.api.runs import doctor

LEFT_OUT = "torch.compile, GPU"  # needs a compiler, which the image does not hold on purpose; training goes on eagerly


def main() -> int:
    """Print what does not work, and return the exit code."""
    rows = [item for _, items in doctor()["sections"] for item in items]
    wrong = [(name, hint) for name, _, works, hint in rows if works is False and name != LEFT_OUT]
    for name, hint in wrong:
        sys.stderr.write(f"{name}: {hint or 'missing'}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
