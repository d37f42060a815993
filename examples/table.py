"""One table of several runs: a row for each number, a column for each seed.

    python examples/table.py runs/default-0 runs/default-1 --out results/default/numbers.csv
    python examples/table.py runs/pretrain --out results/pretrain/numbers.csv     a demo of apply.py

All rows of probe.py would fill megabytes. Kept are raw F1 of subset and val at every step; and, at the first
and the last step, every raw measure of val and ood, and F1 in other views. Nulls are means over seeds.
"""
import csv
import io
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import Flags, command_line, write
from plot import read_run
from train import read_config

import numpy as np

ABOUT = ("measure", "arm", "n_train", "b", "position", "identity", "split", "view", "patch", "layer", "step")
NULLS = "null_95", "regrouped_95"


def is_kept(row, last):
    """Is a row of probe.py kept? All others are, but for what rows are about and times."""
    if "split" not in row:
        return row["measure"] not in ("seconds", "n", *ABOUT)
    f1 = row["measure"] == "f1"
    raw = row["view"] == "raw"
    at_ends = row["step"] in (0, last) and row["split"] != "subset"
    return f1 and raw and row["split"] != "ood" or at_ends and (f1 or raw)


def main():
    """Write one table of runs that differ in their seeds, or of a demo."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("runs", nargs="+", type=Path)
    flags.add_argument("--out", required=True, help="a .csv file")
    given = flags.parse_args()

    found = defaultdict(dict)               # what a row is about -> seed -> row
    for run in given.runs:
        seed = read_config(run).seed if (run / "config.json").exists() else None
        rows = read_run(run)
        last = max(row.get("step", 0) for row in rows)
        for row in rows:
            if is_kept(row, last):
                about = tuple(row.get(key) for key in ABOUT)
                found[about][row.get("seed", seed)] = row
    seeds = sorted({seed for rows in found.values() for seed in rows})

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*ABOUT, *NULLS, *(f"seed {seed}" for seed in seeds)])
    for about, rows in found.items():
        numbers = [[row[null] for row in rows.values() if row.get(null) is not None] for null in NULLS]
        numbers = [np.mean(some) if some else None for some in numbers]
        numbers += [rows[seed]["value"] if seed in rows else None for seed in seeds]
        table.writerow([*about, *("" if x is None else f"{x:.5g}" for x in numbers)])
    Path(given.out).parent.mkdir(parents=True, exist_ok=True)
    write(given.out, text.getvalue())
    print(f"{len(found):,} numbers are in {given.out}")


if __name__ == "__main__":
    command_line(main)
