"""Draw what the other files have measured, as PNG and SVG: the only file that needs matplotlib.

    make figures                              of what `make` has left in runs/
    python plot.py runs/default               into runs/default/figures
    python plot.py runs/s0 runs/s1 runs/s2    runs that differ in their seeds: their mean, and how sure it is
    python plot.py runs/pretrain              a demo of apply.py

Drawn are rows of metrics.jsonl, probe.jsonl, patch.jsonl and apply.jsonl, and for the film strip captures.
Colours are those of Okabe & Ito (2008), which the colour-blind tell apart; layers go from yellow, the
embedding, to dark blue, the top.
"""
import math
import random
from itertools import cycle, product
from pathlib import Path

import numpy as np
import torch

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:                 # main says so
    plt = None

from data import Flags, Regex, command_line
from probe import LOWER, load, onset
from train import captured, read_config, read_data, read_rows

STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False, "svg.hashsalt": "0", "svg.fonttype": "none", "savefig.dpi": 130,
         "figure.constrained_layout.use": True}
LOOKS = [dict(color=color, marker=marker, ms=4) for color, marker in zip(
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"), "osD^vPX")]
T_95 = {5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}      # of Student's t with n - 1 degrees
TITLES = {"f1": "pairwise F1", "matched_f1": "matched F1", "bcubed_f1": "BCubed F1", "nmi": "NMI",
          "ami": "AMI", "ari": "adjusted Rand index", "nc1": "NC1 (0: collapsed)",
          "merge_ratio": "merge ratio (0: merged)",
          "knn_share": "share of 10 neighbours\nwith the same task",
          "knn_task": "majority of 10 neighbours\nhas the task",
          "knn_output": "majority of 10 neighbours\nhas the output"}


def shade(layer: int, n: int):
    """The look of a layer, 0 to n - 1."""
    return dict(color=plt.cm.viridis(0.95 - 0.95 * layer / max(1, n - 1)))


def select(runs: list[list[dict]], x: str, y: str = "value", **where) -> tuple[list, np.ndarray]:
    """The x (n,) that all runs have, and each run's y there (runs, n), of the rows with these values."""
    found = [{row[x]: row[y] for row in rows if all(row.get(key) == value for key, value in where.items())}
             for rows in runs]
    both = sorted(set.intersection(*map(set, found)))
    return both, np.array([[math.nan if of[at] is None else of[at] for at in both] for of in found], float)


def line(ax, x, values, **look):
    """The mean of values (runs, n); about it its 95 % interval, or all runs if there are fewer than five."""
    n, mean = len(values), values.mean(0)
    ax.plot(x, mean, **look)
    if n in T_95 or n > 10:
        half = T_95.get(n, 2) * values.std(0, ddof=1) / math.sqrt(n)
        ax.fill_between(x, mean - half, mean + half, color=look["color"], alpha=0.2, lw=0)
    elif n > 1:
        ax.plot(x, values.T, color=look["color"], lw=0.5, alpha=0.5)


def over_steps(ax, last: int):
    """Make x a log axis of steps that has room for step 0."""
    ax.set_xscale("symlog", linthresh=1, linscale=0.3)
    ticks = [0, *(10 ** i for i in range(6) if 2 * 10 ** i <= last), last]
    ax.set_xticks(ticks, map(str, ticks))
    ax.minorticks_off()
    ax.set(xlim=(0, last), xlabel="training step")


# ---------------------------------------------------------------- figures of runs
# Each takes run folders that differ in their seeds, and yields names and figures.


def draw_data(runs):
    """Figure 1: the first task, how it is said and what it maps; and what every task maps to what."""
    data, max_len, rng = read_data(runs[0]), read_config(runs[0]).max_len, random.Random(0)
    task, inputs = data.tasks[0], sorted({i for task in data.tasks for i in task.map})
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5), width_ratios=(1, 1))
    text = []
    for m, pattern in enumerate((*task.distributions, task.held_out)):
        name = f"regex {m}, taught" if m < len(task.distributions) else "held out: never taught (ood)"
        strings = Regex(pattern, max_len).sample(3, rng)
        text += [f"{name}\n   {pattern:.72}", *(f"      {s:.66}" for s in strings), ""]
    some, said = [*task.map.items()][:5], Regex(task.distributions[0], max_len).unrank(0)
    text += ["maps " + ", ".join(f"{i} to {o}" for i, o in some), "", "the network reads, and answers",
             f"   {said} <sep> {some[0][0]} <ans>   {some[0][1]} <eos>"]
    left.text(0, 1, "\n".join(text), family="monospace", va="top", fontsize=8, transform=left.transAxes)
    left.set_title(f"One of {len(data.tasks)} tasks, {task.name}: instructions that mean it")
    left.axis("off")
    outputs = dict.fromkeys(output for task in data.tasks for output in task.map.values())
    number = {output: n for n, output in enumerate(outputs)}
    table = np.array([[number.get(task.map.get(i), math.nan) for i in inputs] for task in data.tasks])
    right.imshow(table, cmap="cividis", aspect="auto", interpolation="nearest")
    if table.size <= 400:
        for t, i in zip(*np.nonzero(~np.isnan(table))):
            right.text(i, t, data.tasks[t].map[inputs[i]], ha="center", va="center", fontsize=7,
                       color="white" if table[t, i] < len(number) / 2 else "black")
        right.set_xticks(range(len(inputs)), inputs)
    right.set_yticks(range(len(data.tasks)), [task.name for task in data.tasks])
    right.set(xlabel="input", ylabel="task", title="The output, by task and input (blank: not its input)")
    yield "data", fig


def draw_training(runs):
    """Figure 3: loss and accuracies."""
    rows = [read_rows(run / "metrics.jsonl", "step", "loss", "acc_val") for run in runs]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    line(left, *select([some[1:] for some in rows], "step", "loss"), color="black")     # step 0 has no loss
    left.set(ylabel="nats a token", title="Training loss", ylim=(0, None))
    for key, look in zip((key for key in rows[0][0] if key.startswith("acc_")), LOOKS):
        line(right, *select(rows, "step", key), label=key[4:], **look)
    right.set(ylabel="share of instances answered right", title="Task accuracy", ylim=(-0.02, 1.02))
    right.legend()
    for ax in left, right:
        over_steps(ax, rows[0][-1]["step"])
    yield "training", fig


def draw_measures(runs):
    """Figures 2 and 4, and the like for every measure: a row a split, a column a position and identity."""
    probed = [[row for row in read_rows(run / "probe.jsonl", "view", "value") if row["view"] == "raw"
               and row["position"] != "surface"] for run in runs]
    layers, steps = (sorted({row[key] for row in probed[0]}) for key in ("layer", "step"))
    for measure in dict.fromkeys(row["measure"] for row in probed[0]):
        mine = [[row for row in rows if row["measure"] == measure] for rows in probed]
        splits = [split for split in dict.fromkeys(row["split"] for row in mine[0])
                  if split != "ood" or measure.startswith("knn")]       # there a task has one regex only
        columns = list(dict.fromkeys((row["position"], row["identity"]) for row in mine[0]))
        fig, axes = plt.subplots(len(splits), len(columns), sharey=True, sharex=True, squeeze=False,
                                 figsize=(2 + 2.4 * len(columns), 0.6 + 2 * len(splits)))
        for ax, (split, (position, identity)) in zip(axes.flat, product(splits, columns)):
            where = dict(split=split, position=position, identity=identity)
            for layer in layers:
                line(ax, *select(mine, "step", layer=layer, **where), label=f"layer {layer}",
                     **shade(layer, len(layers)))
            for column, grey, null in (("regrouped_95", "0.88", "regexes\nregrouped"),
                                       ("null_95", "0.75", "labels\npermuted")):
                edge = np.array([select(mine, "step", column, layer=layer, **where)[1].mean(0)
                                 for layer in layers])
                if not np.isnan(edge).all():        # of the layers' nulls, the one that is hardest to beat
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
        yield measure, fig


def draw_film(runs):
    """States of val, layer by capture: on the first two principal components of the layer's last capture."""
    data, steps = read_data(runs[0]), captured(runs[0])
    rows = read_rows(runs[0] / "metrics.jsonl", "step", "acc_val")
    accuracy = {row["step"]: row["acc_val"] for row in rows}
    shown = [steps[i] for i in np.linspace(0, len(steps) - 1, min(6, len(steps))).round().astype(int)]
    for position in data.splits["val"].positions:
        ids = data.splits["val"].labels(position)
        task, some = ids["task"], np.random.default_rng(0).permutation(len(ids["task"]))[:500]
        regex = np.array([np.unique(ids["distribution"][task == t]).searchsorted(d)
                          for t, d in zip(task[some], ids["distribution"][some])])
        states = load(runs[0], shown, "val", position, len(task)).float()               # (S, L + 1, n, C)
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
                               marker="osD^vPX"[r % 7])
                ax.set(xticks=[], yticks=[], xlim=(-reach, reach), ylim=(-reach, reach))
                ax.spines[:].set_visible(True)
                if layer == 0:
                    ax.set_title(f"step {step}\nval accuracy {accuracy.get(step, math.nan):.2f}")
            for t in range(task.max() + 1) if layer else ():                # colours alone are too many
                row[-1].text(*flat[-1][task == t].mean(0), t, ha="center", va="center", fontsize=7)
            row[0].set_ylabel(f"layer {layer}")
        fig.suptitle(f"Unseen instructions, states at `{position}`: a colour and number a task, a marker a "
                     "regex of it.\nA layer's axes are its principal components at the last step", fontsize=9)
        yield f"film_{position}", fig


def draw_events(runs):
    """What comes first, the cluster or the answer?"""
    rows = [row for row in read_rows(runs[0] / "probe.jsonl", "view", "value") if row["position"] != "surface"
            and (row["view"], row["measure"], row["split"]) == ("raw", "f1", "val")]
    metrics = read_rows(runs[0] / "metrics.jsonl", "step", "acc_val")
    kinds = list(dict.fromkeys((row["position"], row["identity"]) for row in rows))
    n = 1 + max(row["layer"] for row in rows)
    fig, ax = plt.subplots(figsize=(8, 1 + 0.45 * len(kinds)))
    for (y, (position, identity)), layer in product(enumerate(kinds), range(n)):
        where = dict(position=position, identity=identity, layer=layer)
        steps, [values] = select([rows], "step", **where)
        [null] = select([rows], "step", "regrouped_95" if identity == "task" else "null_95", **where)[1]
        since = onset(steps, values > null)
        if since is not None:
            near = max(since, steps[np.argmax(values >= 0.9 * values[-1])])
            height = y + 0.7 * (layer + 0.5) / n - 0.35
            ax.plot([since, near], [height, height], marker="|", lw=2, **shade(layer, n))
    for layer in range(n):
        ax.plot([], [], label=f"layer {layer}", **shade(layer, n))
    for level, dashes in (0.5, ":"), (0.9, "--"):
        for step in [row["step"] for row in metrics if row["acc_val"] > level][:1]:
            ax.axvline(step, color="black", ls=dashes, lw=1, label=f"val accuracy over {level}")
    ax.set_yticks(range(len(kinds)), [f"{identity}, at `{position}`" for position, identity in kinds])
    ax.set(ylim=(len(kinds) - 0.5, -0.5), title="Pairwise F1, val: from the step since which it is beyond "
           "its null to the first at 90 % of its end")
    over_steps(ax, metrics[-1]["step"])
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    yield "events", fig


def draw_patch(runs):
    """Are the clusters used? What is answered if a state is exchanged."""
    rows = [read_rows(run / "patch.jsonl", "layer", "donor") for run in runs]
    positions = list(dict.fromkeys(row["position"] for row in rows[0]))
    fig, axes = plt.subplots(2, len(positions), figsize=(3.4 * len(positions), 5), sharex=True, sharey=True)
    shares = {"donor": "answers the donor's output", "right": "still answers right"}
    for ax, (share, position) in zip(axes.flat, product(shares, positions)):
        patches = dict.fromkeys(row["patch"] for row in rows[0] if row["position"] == position)
        for patch, look in zip(patches, cycle(LOOKS)):
            line(ax, *select(rows, "layer", share, position=position, patch=patch), label=patch, **look)
        ax.set(title=f"exchanged at `{position}`", xlabel="layer", ylim=(-0.03, 1.03), ylabel=shares[share])
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.label_outer()
    for ax in axes[0]:
        ax.legend(fontsize=7)
    yield "patch", fig


# ---------------------------------------------------------------- figures of demos
# Each takes the rows of apply.jsonl, a list for each seed.


def draw_pretrain(seeds):
    """Figure 5b: how soon the tasks are learnt, by what was learnt before."""
    sizes, strategies = (list(dict.fromkeys(row[key] for row in seeds[0])) for key in ("n_train", "strategy"))
    fig, axes = plt.subplots(1, len(sizes), figsize=(4.5 * len(sizes), 3.6), sharey=True)
    for ax, n in zip(axes, sizes):
        for strategy, look in zip(strategies, LOOKS):
            curve = select(seeds, "step", measure="acc_val", strategy=strategy, n_train=n)
            line(ax, *curve, label=strategy, **look)
        ax.set(xlabel="step of learning the tasks", title=f"{n} training instructions a regex")
    axes[0].set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("task accuracy, val")
    axes[0].legend(title="learnt before")
    yield "pretrain", fig


def draw_align(seeds):
    """What is refused and what kept, by the number of labels."""
    titles = {"refused_labelled": "refused: unwanted,\nof the labelled regex (val)",
              "refused_other": "refused: unwanted,\nof its other regexes (val)",
              "refused_ood": "refused: unwanted,\nof an unseen regex (ood)",
              "refused_wanted": "refused though wanted\n(val)",
              "accuracy": "wanted and answered right\n(val)"}
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in seeds[0]) if arm != "base"]
    fig, axes = plt.subplots(1, len(titles), figsize=(2.4 * len(titles), 3.6), sharey=True)
    for ax, (measure, title) in zip(axes, titles.items()):
        for arm, look in zip(arms, LOOKS):
            budgets, values = select(seeds, "b", measure=measure, arm=arm)
            line(ax, budgets, values, label=arm, **look)
        ax.set_xscale("log", base=2)
        ax.set_xticks(budgets, map(str, budgets))
        ax.set(xlabel="labels a task, b", title=title, ylim=(-0.03, 1.03))
    axes[0].set_ylabel("share of instances")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(arms))
    yield "align", fig


# ---------------------------------------------------------------- all of them

NEEDED = {draw_data: "tasks.json", draw_training: "metrics.jsonl", draw_measures: "probe.jsonl",
          draw_film: "states/labels.npz", draw_events: "probe.jsonl", draw_patch: "patch.jsonl"}


def save(figures, out: Path, what: str, seeds: list[int]):
    """Write every figure as PNG and SVG; what was run goes below it, in small print."""
    how = "" if len(seeds) == 1 else ": mean, and each" if len(seeds) < 5 else ": mean, and its 95 % interval"
    out.mkdir(parents=True, exist_ok=True)
    for name, fig in figures:
        small = f"{what}; seed {', '.join(map(str, seeds))}{how}"
        fig.supxlabel(small, x=0.01, ha="left", fontsize=6, color="0.4")
        fig.savefig(out / f"{name}.png")
        fig.savefig(out / f"{name}.svg", metadata={"Date": None})
        plt.close(fig)
        print(out / f"{name}.png")


def main():
    """Draw runs that differ in their seeds, or a demo of apply.py."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("runs", nargs="+", type=Path, help="run folders, or the folder of one demo")
    flags.add_argument("--out", type=Path, help="folder of the figures (default: figures/ in the first)")
    given = flags.parse_args()
    if plt is None:
        raise ValueError("matplotlib is missing: make figures installs it")
    runs, out = given.runs, given.out or given.runs[0] / "figures"
    with plt.rc_context(STYLE):
        if (runs[0] / "apply.jsonl").exists():
            rows = read_rows(runs[0] / "apply.jsonl", "seed", "measure", "value")
            seeds = list(dict.fromkeys(row["seed"] for row in rows))
            draw = draw_align if "arm" in rows[0] else draw_pretrain
            by_seed = [[row for row in rows if row["seed"] == seed] for seed in seeds]
            return save(draw(by_seed), out, f"apply.py {draw.__name__[5:]}", seeds)
        cfg, seeds = read_config(runs[0]), [read_config(run).seed for run in runs]
        tasks = cfg.tasks or f"{cfg.n_tasks} tasks of {cfg.n_distributions} regexes"
        what = f"{tasks}, {cfg.n_layer} blocks of width {cfg.n_embd}, {cfg.optimizer}, loss on {cfg.loss_on}"
        for draw, needs in NEEDED.items():
            if all((run / needs).exists() for run in runs):
                one = draw in (draw_data, draw_film, draw_events)       # these show the first run alone
                save(draw(runs), out, what, seeds[:1] if one else seeds)


if __name__ == "__main__":
    command_line(main)
