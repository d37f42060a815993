"""Draw what the other files have measured, as PNG and SVG: the only file that needs matplotlib.

    make figures                              of what `make` has left in runs/
    python plot.py runs/default               into runs/default/figures
    python plot.py runs/s0 runs/s1 runs/s2    runs that differ in their seeds: their mean, and how sure it is
    python plot.py runs/pretrain              a demo of apply.py

Drawn are the tasks, rows of metrics.jsonl, probe.jsonl, patch.jsonl and apply.jsonl, and for the film strip
captures. Of several seeds, numbers.csv has each one's numbers. Colours are those of Okabe & Ito (2008), which
the colour-blind tell apart; layers go from yellow, the embedding, to violet, the top.
"""
import csv
import io
import math
import random
import textwrap
from itertools import chain, cycle, product
from pathlib import Path

import numpy as np
import torch

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:                 # main says so
    plt = None

from apply import MEASURED
from data import Flags, Regex, command_line, write
from probe import LOWER, kept_steps, read_states
from train import Config, read_config, read_data, read_rows

STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False, "svg.hashsalt": "0", "svg.fonttype": "none", "savefig.dpi": 130,
         "figure.constrained_layout.use": True}
MARKERS = "osD^vPX"
LOOKS = [dict(color=color, marker=marker, ms=4) for color, marker in zip(
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"), MARKERS)]
T_95 = {5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}        # of Student's t with n - 1 degrees; then 2.26
TITLES = {"f1": "pairwise F1", "nc1": "nc1 (0: collapsed)", "merge_ratio": "merge_ratio (0: merged)"}
NUMBERS = "value", "null_95", "regrouped_95"
ABOUT = ("measure", "strategy", "n_train", "arm", "b", "position", "identity", "split", "view", "patch",
         "layer", "step")


def merge(seeds: list[list[dict]]) -> list[dict]:
    """The rows that all seeds have, in one: keys of ABOUT, and for each of NUMBERS a list, a place a seed.

    A row without a measure, of metrics.jsonl or patch.jsonl, becomes one for each loss, accuracy or share.
    """
    merged = {}
    for row in chain(*seeds):
        values = {row["measure"]: row["value"]} if "measure" in row else {
            key: row[key] for key in row if key in ("loss", "donor", "right") or key.startswith("acc_")}
        for measure, value in values.items():
            whole = {**row, "measure": measure, "value": value}
            about = tuple((key, whole[key]) for key in ABOUT if key in whole)
            merged.setdefault(about, []).append([whole.get(number) for number in NUMBERS])
    return [{**dict(about), **dict(zip(NUMBERS, map(list, zip(*found))))}
            for about, found in merged.items() if len(found) == len(seeds)]


def select(rows: list[dict], x: str, number: str = "value", **where) -> tuple[list, np.ndarray]:
    """x (n,) and a number (seeds, n), in order of x, of the merged rows that are about this."""
    found = {row[x]: row[number] for row in rows
             if x in row and all(row.get(key) == value for key, value in where.items())}
    return sorted(found), np.array([found[at] for at in sorted(found)], float).T


def write_numbers(path: Path, rows: list[dict], seeds: list[int]):
    """Write merged rows as a table, a column a seed; nulls are means.

    All of probe's rows would fill megabytes. Kept are those that README needs: raw F1 of subset and val at
    every step; of val and ood, at the first and the last, F1 in other views and every raw measure.
    """
    text, last = io.StringIO(), max(row["step"] for row in rows if "step" in row)
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*ABOUT, *NUMBERS[1:], *(f"seed {seed}" for seed in seeds)])
    for row in rows:
        f1, raw = row["measure"] == "f1", row.get("view", "raw") == "raw"
        if "split" not in row or f1 and raw and row["split"] != "ood" or (
                (f1 or raw) and row["split"] != "subset" and row["step"] in (0, last)):
            nulls = (None if None in row[null] else np.mean(row[null]) for null in NUMBERS[1:])
            table.writerow([*map(row.get, ABOUT), *("" if x is None else f"{x:.5g}"
                                                    for x in (*nulls, *row["value"]))])
    write(path, text.getvalue())


def shade(layer: int, n: int):
    """The look of a layer, 0 to n - 1."""
    return dict(color=plt.cm.viridis(0.95 - 0.95 * layer / max(1, n - 1)))


def line(ax, x, values, **look):
    """The mean of values (runs, n); about it its 95 % interval, or all runs if there are fewer than five."""
    n, mean = len(values), values.mean(0)
    ax.plot(x, mean, **look)
    if n > 4:
        half = T_95.get(n, 2.26) * values.std(0, ddof=1) / math.sqrt(n)
        ax.fill_between(x, mean - half, mean + half, color=look["color"], alpha=0.15, lw=0)
    elif n > 1:
        ax.plot(x, values.T, color=look["color"], lw=0.5, alpha=0.5)


def curves(ax, rows: list[dict], x: str, by: str, **where):
    """A line over x for each value of `by`, always in the same look, if any rows are about this."""
    for value, look in zip(dict.fromkeys(row[by] for row in rows), cycle(LOOKS)):
        at, values = select(rows, x, **{by: value}, **where)
        if at:
            line(ax, at, values, label=value, **look)


def over_steps(ax, last: int):
    """Make x a log axis of steps that has room for step 0."""
    ax.set_xscale("symlog", linthresh=1, linscale=0.3)
    ticks = [0, *(10 ** i for i in range(6) if 2 * 10 ** i <= last), last]
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()
    ax.set(xlim=(0, last), xlabel="training step")


# ---------------------------------------------------------------- figures of runs
# Each yields names and figures: of merged rows, or of what the first run has seen.


def draw_data(data, max_len):
    """Figure 1: the first task, how it is said and what it maps; and what every task maps to what."""
    task, rng, text = data.tasks[0], random.Random(0), []
    for m, pattern in enumerate((*task.distributions, task.held_out)):
        name = f"regex {m}, taught" if m < len(task.distributions) else "held out: never taught (ood)"
        strings = Regex(pattern, max_len).sample(3, rng)
        text += [f"{name}\n   {pattern:.66}", *(f"      {s:.63}" for s in strings), ""]
    some, first = [*task.map.items()][:5], Regex(task.distributions[0], max_len).unrank(0)
    text += [*textwrap.wrap("maps " + ", ".join(f"{i} to {o}" for i, o in some), 69), "", "the network reads",
             f"   {first} <sep> {some[0][0]} <ans>", f"and answers\n   {some[0][1]} <eos>"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 0.17 * "\n".join(text).count("\n")),
                                      width_ratios=(0.8, 1))
    left.text(0, 1, "\n".join(text), family="monospace", va="top", fontsize=8, transform=left.transAxes)
    left.set_title(f"One of {len(data.tasks)} tasks, {task.name}, and how it is said", loc="left")
    left.axis("off")
    inputs = list(dict.fromkeys(i for task in data.tasks for i in task.map))
    inputs = sorted(inputs) if len(inputs) <= 20 else inputs
    outputs = dict.fromkeys(output for task in data.tasks for output in task.map.values())
    number = {output: n for n, output in enumerate(outputs)}
    table = np.array([[number.get(task.map.get(i), math.nan) for i in inputs] for task in data.tasks])
    right.imshow(table, cmap="cividis", aspect="auto", interpolation="nearest")
    if len(inputs) <= 20:
        for t, i in zip(*np.nonzero(~np.isnan(table))):
            right.text(i, t, data.tasks[t].map[inputs[i]], ha="center", va="center", fontsize=7,
                       color="white" if table[t, i] < len(number) / 2 else "black")
        right.set_xticks(range(len(inputs)), inputs)
    right.set_yticks(range(len(data.tasks)), [task.name for task in data.tasks])
    right.set(xlabel="input", ylabel="task", title="The output, by task and input (blank: none)")
    yield "data", fig


def draw_training(metrics):
    """Figure 3: loss and accuracies."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    steps, loss = select(metrics, "step", measure="loss")
    line(left, steps, loss, color="black")                          # nan at step 0
    left.set(ylabel="nats a token", title="Training loss", ylim=(0, None))
    accuracies = dict.fromkeys(row["measure"] for row in metrics if row["measure"] != "loss")
    for measure, look in zip(accuracies, LOOKS):
        line(right, *select(metrics, "step", measure=measure), label=measure[4:], **look)
    right.set(ylabel="share of instances answered right", title="Task accuracy", ylim=(-0.02, 1.02))
    right.legend()
    for ax in left, right:
        over_steps(ax, steps[-1])
    yield "training", fig


def draw_measures(rows):
    """Figures 2 and 4, and the like for every measure and position: a row a split, a column an identity."""
    rows = [row for row in rows if row["view"] == "raw" and row["position"] != "surface"]
    layers, steps = (sorted({row[key] for row in rows}) for key in ("layer", "step"))
    for measure, position in dict.fromkeys((row["measure"], row["position"]) for row in rows):
        here = dict(measure=measure, position=position)
        mine = [row for row in rows if here.items() <= row.items()]
        splits = [split for split in dict.fromkeys(row["split"] for row in mine)
                  if split != "ood" or measure.startswith("knn")]       # there a task has one regex only
        identities = list(dict.fromkeys(row["identity"] for row in mine))
        fig, axes = plt.subplots(len(splits), len(identities), sharey=True, sharex=True, squeeze=False,
                                 figsize=(2 + 2.6 * len(identities), 0.6 + 2 * len(splits)))
        for ax, (split, identity) in zip(axes.flat, product(splits, identities)):
            where = dict(here, split=split, identity=identity)
            for layer in layers:
                line(ax, *select(mine, "step", layer=layer, **where), label=f"layer {layer}",
                     **shade(layer, len(layers)))
            for number, grey, null in (("regrouped_95", "0.88", "regexes\nregrouped"),
                                       ("null_95", "0.75", "labels\npermuted")):
                edge = np.array([select(mine, "step", number, layer=layer, **where)[1].mean(0)
                                 for layer in layers[1:]])      # layer 0 has seen too little to matter
                if not np.isnan(edge).all():        # of their nulls, the one that is hardest to beat
                    best, far = (np.nanmin, 99) if measure in LOWER else (np.nanmax, 0)
                    ax.fill_between(steps, best(edge, 0), far, color=grey, lw=0, zorder=0,
                                    label=f"null: {null}, 95 %")
            top = {"nc1": 6, "merge_ratio": 1.3}.get(measure, 1.02)
            ax.set(title=f"{identity}, at `{position}`, {split}", ylim=(0, top))
            over_steps(ax, steps[-1])
            ax.label_outer()
        for ax in axes[:, 0]:
            ax.set_ylabel(TITLES.get(measure, measure))
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
        yield f"{measure}_{position}", fig


def draw_film(run, data):
    """States of val, layer by capture: on the first two principal components of the layer's last capture."""
    steps = kept_steps(run)
    accuracy = {row["step"]: row["acc_val"] for row in read_rows(run / "metrics.jsonl")}
    shown = sorted({min(steps, key=lambda step: abs(step - even)) for even in np.linspace(0, steps[-1], 6)})
    for position in data.splits["val"].positions:
        ids = data.splits["val"].labels(position)
        task, some = ids["task"], np.random.default_rng(0).permutation(len(ids["task"]))[:500]
        regex = np.array([np.unique(ids["distribution"][task == t]).searchsorted(d)
                          for t, d in zip(task[some], ids["distribution"][some])])
        states = read_states(run, shown, f"val/{position}", len(task)).float()            # (S, L + 1, n, C)
        states -= states.mean(2, keepdim=True)
        S, L = states.shape[:2]
        fig, axes = plt.subplots(L, S, squeeze=False, figsize=(1.8 * S, 1.8 * L + 0.5))
        for layer, row in enumerate(axes):
            axis = torch.linalg.svd(states[-1, layer], full_matrices=False)[2][:2].T    # (C, 2)
            flat = (states[:, layer] @ axis).numpy()                                    # (S, n, 2)
            reach = 1.1 * max(1e-3, np.abs(flat[-1]).max())
            for ax, points, step in zip(row, flat, shown):
                for r in range(regex.max() + 1):
                    of = some[regex == r]
                    ax.scatter(*points[of].T, c=task[of], cmap="turbo", vmin=0, vmax=task.max(), s=8, lw=0,
                               marker=MARKERS[r % len(MARKERS)], rasterized=True)
                ax.set(xticks=[], yticks=[], xlim=(-reach, reach), ylim=(-reach, reach))
                ax.spines[:].set_visible(True)
                if layer == 0:
                    ax.set_title(f"step {step}\nval accuracy {accuracy.get(step, math.nan):.2f}")
            for t in np.unique(task) if layer else ():          # more tasks than colours one can tell apart
                row[-1].text(*flat[-1][task == t].mean(0), t, ha="center", va="center", fontsize=7)
            row[0].set_ylabel(f"layer {layer}")
        fig.suptitle(f"Unseen instructions, states at `{position}`: a colour and number a task, a marker a "
                     "regex of it.\nA layer's axes are its principal components at the last step", fontsize=9)
        yield f"film_{position}", fig


def draw_patch(rows):
    """Are the clusters used? What is answered if a state is exchanged."""
    positions = list(dict.fromkeys(row["position"] for row in rows))
    fig, axes = plt.subplots(2, len(positions), figsize=(3.4 * len(positions), 5), sharex=True, sharey=True)
    shares = {"donor": "answers the donor's output", "right": "still answers right"}
    for ax, (share, position) in zip(axes.flat, product(shares, positions)):
        curves(ax, rows, "layer", "patch", measure=share, position=position)
        ax.set(title=f"exchanged at `{position}`", xlabel="layer", ylim=(-0.03, 1.03), ylabel=shares[share])
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.label_outer()
    for ax in axes[0]:
        ax.legend(fontsize=7)
    yield "patch", fig


# ---------------------------------------------------------------- figures of demos


def draw_pretrain(rows):
    """Figure 5b: how soon the tasks are learnt, by what was learnt before."""
    sizes = list(dict.fromkeys(row["n_train"] for row in rows))
    fig, axes = plt.subplots(1, len(sizes), figsize=(4.5 * len(sizes), 3.6), sharey=True)
    for ax, n in zip(axes, sizes):
        curves(ax, rows, "step", "strategy", measure="acc_val", n_train=n)
        ax.set(xlabel="step of learning the tasks", title=f"{n} training instructions a regex")
    axes[0].set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("task accuracy, val")
    axes[0].legend(title="learnt before")
    yield "pretrain", fig


def draw_align(rows):
    """What is refused and what kept, by the number of labels."""
    rows = [row for row in rows if row["arm"] != "base"]
    budgets = sorted({row["b"] for row in rows})
    fig, axes = plt.subplots(2, 3, figsize=(9, 6), sharey=True, sharex=True)
    for ax, (measure, title) in zip(axes.flat, MEASURED.items()):
        curves(ax, rows, "b", "arm", measure=measure)
        ax.set_xscale("log", base=2)
        ax.set_xticks(budgets, map(str, budgets))
        ax.set(xlabel="labels a task, b", ylabel="share of instances", title=textwrap.fill(title, 32),
               ylim=(-0.03, 1.03))
        ax.label_outer()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    yield "align", fig


# ---------------------------------------------------------------- all of them


def of_seeds(seeds: list[int]) -> str:
    """Which seeds a figure shows, and how."""
    how = "" if len(seeds) == 1 else ": mean, and each" if len(seeds) < 5 else ": mean, and its 95 % interval"
    return f"seed {', '.join(map(str, seeds))}{how}"


def save(figures, out: Path, caption: str):
    """Write every figure as PNG and SVG, with what was run below it in small print."""
    out.mkdir(parents=True, exist_ok=True)
    for name, fig in figures:
        fig.supxlabel(caption, x=0.01, ha="left", fontsize=6, color="0.4")
        fig.savefig(out / f"{name}.png")
        fig.savefig(out / f"{name}.svg", metadata={"Date": None})
        plt.close(fig)
        print(out / f"{name}.png")


def draw_demo(folder: Path, out: Path):
    """Draw a demo of apply.py; return the merged rows and the seeds."""
    rows = read_rows(folder / "apply.jsonl")
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    draw = draw_align if "arm" in rows[0] else draw_pretrain
    rows = merge([[row for row in rows if row["seed"] == seed] for seed in seeds])
    save(draw(rows), out, f"apply.py {draw.__name__[5:]}\n" + of_seeds(seeds))
    return rows, seeds


def draw_runs(runs: list[Path], out: Path):
    """Draw runs that differ in their seeds; return the merged rows and the seeds.

    Raises ValueError if they differ in more, or have nothing in common.
    """
    configs = [read_config(run) for run in runs]
    seeds = [cfg.seed for cfg in configs]
    knobs = [{key: x for key, x in vars(cfg).items() if key not in ("out", "start", "device")
              and not key.endswith("seed")} for cfg in configs]
    if any(some != knobs[0] for some in knobs):
        raise ValueError("runs that are drawn as one may differ in their seeds only")
    if len({*seeds}) < len(seeds):
        raise ValueError("runs that are drawn as one must differ in --seed")
    changed = [f"{key} {x}" for key, x in knobs[0].items() if x != getattr(Config, key)]
    what = (", ".join(changed) or "the default run") + "\n"
    metrics, probed, patched = (
        merge([read_rows(run / name) for run in runs])
        if any((run / name).exists() for run in runs) else []
        for name in ("metrics.jsonl", "probe.jsonl", "patch.jsonl"))
    if not metrics:
        raise ValueError(f"{', '.join(map(str, runs))}: no evaluation in common, train them first")
    data = read_data(runs[0])
    if knobs[0]["asks_for"] == "output" and not knobs[0]["shuffle_tasks"]:          # else it would be wrong
        save(draw_data(data, knobs[0]["max_len"]), out, what + of_seeds(seeds[:1]))
    save(draw_film(runs[0], data), out, what + of_seeds(seeds[:1]))
    save(draw_training(metrics), out, what + of_seeds(seeds))
    if any(row["view"] == "raw" for row in probed):
        save(draw_measures(probed), out, what + of_seeds(seeds))
    if patched:
        save(draw_patch(patched), out, what + of_seeds(seeds))
    return metrics + probed + patched, seeds


def main():
    """Draw runs that differ in their seeds, or a demo of apply.py."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("runs", nargs="+", type=Path, help="run folders, or the folder of one demo")
    flags.add_argument("--out", type=Path, help="folder of the figures (default: figures/ in the first)")
    given = flags.parse_args()
    if plt is None:
        raise ValueError("matplotlib is missing: make figures installs it")
    runs, out = given.runs, given.out or given.runs[0] / "figures"
    plt.rcParams.update(STYLE)
    rows, seeds = draw_demo(runs[0], out) if (runs[0] / "apply.jsonl").exists() else draw_runs(runs, out)
    if len(seeds) > 1:
        write_numbers(out / "numbers.csv", rows, seeds)


if __name__ == "__main__":
    command_line(main)
