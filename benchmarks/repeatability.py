"""Do two runs of the suite agree, and would a delay of any row be seen between them?

    python benchmarks/repeatability.py FIRST SECOND [--delay 0.2] [--out FILE]

FIRST and SECOND are folders of results of the same machine. Of every ratio: does it lie inside the interval of the other run, and inside
twice the width of it? Then each row of SECOND is made slower by `--delay`, alone, by adding ln(1 + delay) to what each of its
processes found, and compared with FIRST among all the other rows; and SECOND as it is, where no row may be flagged.
Exit code 1 when fewer than 95 % lie inside, one lies outside twice the width, or a row is flagged as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from alarm import with_row

from imgcls_fast.measuring.results import Area, Row, compare, read_results


def inside(row: Row, other: Row, times: float) -> bool:
    """Whether a ratio lies in the other's interval, made wider about its middle on the logarithmic scale."""
    half = times * (math.log(other.high) - math.log(other.low)) / 2
    middle = (math.log(other.high) + math.log(other.low)) / 2
    return abs(math.log(row.ratio) - middle) <= half + 1e-3  # ratios and ends are stored with four digits


def slowed(run: dict[str, Area], share: float) -> dict[str, Area]:
    """The run with every row slower by `share`: what `compare` asks for are the log ratios."""
    return {
        name: area.model_copy(
            update={
                "rows": [
                    row.model_copy(update={"log_ratios": [log + math.log1p(share) for log in row.log_ratios]})
                    for row in area.rows
                ]
            }
        )
        for name, area in run.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--delay", type=float, default=0.2)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    first, second = read_results(options.first), read_results(options.second)
    there = {(name, *row.key): row for name, area in second.items() for row in area.rows}
    both = [
        ((name, *row.key), row, there[name, *row.key])
        for name, area in first.items()
        for row in area.rows
        if (name, *row.key) in there
    ]
    looks = [(key, a, b) for key, x, y in both for a, b in ((x, y), (y, x))]
    out = [(key, a, b) for key, a, b in looks if not inside(a, b, 1)]
    far = [(key, a, b) for key, a, b in looks if not inside(a, b, 2)]
    for key, a, b in out:
        much = "outside twice the width" if (key, a, b) in far else "outside"
        print(f"{much}: {', '.join(key)}: {a.ratio:.3f}x, the other {b.ratio:.3f}x [{b.low:.3f}, {b.high:.3f}]")
    keys = [key for key, _, _ in both]
    alarms = [change.key for change in compare(first, second).flagged]
    delayed = slowed(second, options.delay)
    unseen = [key for key in keys if key not in {c.key for c in compare(first, with_row(second, delayed, key)).flagged}]
    for key in unseen:
        print(f"a delay of {options.delay:.0%} is not seen: {', '.join(key)}")
    share = 1 - len(out) / len(looks)
    print(
        f"{share:.1%} of {len(looks)} looks at {len(both)} ratios lie inside the other's interval, {len(far)} outside twice its width"
    )
    print(f"{len(alarms)} rows flagged as they are; of {len(keys)} rows slowed alone {len(keys) - len(unseen)} flagged")
    if options.out:
        result = {
            "rows": len(both), "inside": round(share, 4), "outside": sorted({", ".join(key) for key, _, _ in out}),
            "outside_twice_the_width": sorted({", ".join(key) for key, _, _ in far}), "flagged": [", ".join(key) for key in alarms],
            "delay": options.delay, "delays_seen": len(keys) - len(unseen), "delays_not_seen": [", ".join(key) for key in unseen],
        }  # fmt: skip
        options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 1 if share < 0.95 or far or alarms else 0


if __name__ == "__main__":
    sys.exit(main())
