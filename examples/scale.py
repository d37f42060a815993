"""Do clusters still match tasks when there are more of them? Trains, probes and draws 16 to 128 tasks.

    make scale                                two seeds of each size, into runs/scale, and a figure
    python examples/scale.py --seeds 2 3      other seeds; existing runs are reused

Uses the project as a library. All sizes share the pools of inputs and outputs and the shape of the network;
more tasks get more training steps and larger batches, enough for an accuracy above 0.97 on another seed. Of
128 tasks, 64 are probed (see n_probed).
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from runs import Flags, as_rows, command_line, print_table, read_rows, select, write_rows

import plot
from apply import run_arm, step_to
from probe import probe
from train import Config

SIZES = {16: dict(steps=500, batch_size=48),
         32: dict(steps=800, batch_size=64),
         64: dict(steps=1300, batch_size=96),
         128: dict(steps=3000, batch_size=192)}
KNOBS = dict(n_inputs=20, n_outputs=40, n_val=5, lr=0.01)


def run_size(out, seed, n_tasks, knobs):
    """Train and probe one run; return rows with seed, n_tasks, measure and value."""
    cfg = Config(seed=seed, n_tasks=n_tasks, out=f"{out}/{n_tasks}-{seed}", **KNOBS, **knobs)
    run = run_arm(cfg)
    if not (run / "probe.jsonl").exists():
        probe(run)
    metrics = read_rows(run / "metrics.jsonl")
    f1 = select(read_rows(run / "probe.jsonl"), step=cfg.steps, **plot.TASK_F1)
    numbers = {f"F1, layer {row['layer']}": row["value"] for row in f1}
    numbers["chance, top layer"] = f1[-1]["regrouped_95"]
    numbers |= {"accuracy on val": metrics[-1]["acc_val"], "steps to 0.9": step_to(0.9, metrics)}
    return as_rows({"seed": seed, "n_tasks": n_tasks}, numbers)


def draw(rows):
    """A figure of F1 of task in each layer, and of steps to 0.9 accuracy, against the number of tasks."""
    scores = {row["measure"]: row["measure"].removeprefix("F1, ") for row in rows if "F1" in row["measure"]}
    _, colors = plot.name_layers(range(len(scores)))
    fig = plot.Figure(figsize=(10, 3.4))
    left, right = fig.subplots(1, 2)
    plot.draw_lines(left, rows, "n_tasks", "measure", scores, colors)
    plot.draw_lines(left, rows, "n_tasks", "measure", {"chance, top layer": "chance, top layer"}, ["0.5"])
    plot.draw_lines(right, rows, "n_tasks", "measure", {"steps to 0.9": "val"})
    left.set(title="Do clusters still match tasks?", ylabel="pairwise F1 of task, last step", ylim=(0, 1.02))
    right.set(title="How long does learning take?", ylabel="steps to 0.9 accuracy on val", ylim=(0, None))
    for ax in left, right:
        ax.set(xlim=(min(SIZES) * 0.9, max(SIZES) * 1.1), xlabel="number of tasks (of 128, 64 are probed)")
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(SIZES), SIZES)
    fig.legend(*left.get_legend_handles_labels(), loc="outside right center")
    return fig


def main():
    """Train and probe 16 to 128 tasks; draw F1 and steps against the number of tasks."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("--out", default="runs/scale", help="folder for the runs (default: runs/scale)")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of each size (default: 0 1)")
    given = flags.parse_args()
    rows = [row for n_tasks, knobs in SIZES.items() for seed in dict.fromkeys(given.seeds)
            for row in run_size(given.out, seed, n_tasks, knobs)]
    write_rows(f"{given.out}/scale.jsonl", rows)
    lines = [{**row, "arm": row["measure"]} for row in rows]
    print_table("By number of tasks", [row for row in lines if row["arm"] != "steps to 0.9"], "n_tasks")
    print_table("Training", select(lines, arm="steps to 0.9"), "n_tasks", digits=0)
    if plot.matplotlib:                     # make scale installs it
        with plot.own_style():
            draw(rows).savefig(f"{given.out}/scale.png", dpi=130)
        print(f"\nthe figure is {given.out}/scale.png")


if __name__ == "__main__":
    command_line(main)
