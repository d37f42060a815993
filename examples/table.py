"""Write one table of several runs: a row for each number, a column for each seed.

    python examples/table.py runs/default-0 runs/default-1 --out results/default/numbers.csv
    python examples/table.py runs/pretrain --out results/pretrain/numbers.csv     a demo of apply.py
    python examples/table.py runs/smollm2/smollm2.jsonl --out results/smollm2/numbers.csv

All rows of probe.jsonl would take megabytes, so the table keeps F1 on val at every step and, at the first and
last step, every measure on val and ood, F1 on subset, and F1 in other views. null_95 and regrouped_95 are
means over seeds; `beyond` is the number of seeds in which a score beats its own null, the harder one if there
are two.
"""
import csv
import io
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from runs import BadInput, Flags, command_line, read_rows, read_run, write

import numpy as np

from probe import is_beyond
from train import read_config

ABOUT = ("arm", "n_tasks", "n_train", "b", "split", "position", "identity", "measure", "view", "patch",
         "layer", "step")
NULLS = "null_95", "regrouped_95"


def is_kept(row, last):
    """Does the table keep this row? Of files other than probe.jsonl, all but times and the keys of ABOUT."""
    if "split" not in row:
        return row["measure"] not in ("seconds", "n", *ABOUT)
    if row["split"] == "val" and (row["measure"], row["view"]) == ("f1", "raw"):
        return True
    if row["step"] not in (0, last):
        return False
    return row["measure"] == "f1" or row["split"] != "subset" and row["view"] == "raw"


def main():
    """Write one table of runs that differ only in their seeds, or of a demo."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("runs", nargs="+", type=Path)
    flags.add_argument("--out", required=True, help=".csv file to write")
    given = flags.parse_args()

    found = defaultdict(dict)               # what a row is about -> seed -> row
    for run in given.runs:
        seed = read_config(run).seed if (run / "config.json").exists() else 0
        rows = read_rows(run) if run.suffix == ".jsonl" else read_run(run)
        if not rows:
            raise BadInput(f"{run}: no numbers here, train and probe it first")
        last = max((row["step"] for row in rows if "split" in row), default=0)
        for row in rows:
            by_seed = found[tuple(row.get(key) for key in ABOUT)]
            own = row.get("seed", seed)
            if is_kept(row, last):
                if own in by_seed:
                    raise BadInput(f"{run}: another of these runs has seed {own}, too")
                by_seed[own] = row
    found = {about: by_seed for about, by_seed in found.items() if by_seed}
    seeds = sorted({seed for by_seed in found.values() for seed in by_seed})

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*ABOUT, *NULLS, "beyond", *(f"seed {seed}" for seed in seeds)])
    for about, by_seed in found.items():
        cells = []
        for null in NULLS:
            values = [row[null] for row in by_seed.values() if row.get(null) is not None]
            cells.append(np.mean(values) if values else None)
        cells.append(sum(map(is_beyond, by_seed.values())) if cells != [None, None] else None)
        cells += [by_seed[seed]["value"] if seed in by_seed else None for seed in seeds]
        table.writerow([*about, *("" if x is None else f"{x:.5g}" for x in cells)])
    Path(given.out).parent.mkdir(parents=True, exist_ok=True)
    write(given.out, text.getvalue())
    print(f"{len(found):,} numbers are in {given.out}")


if __name__ == "__main__":
    command_line(main)
