"""Draw what the other files have measured, as PNG and GIF: the only file that needs matplotlib.

    python plot.py                            everything in runs/, each into its folder figures/
    python plot.py runs/default               one run, or any folder of states that probe.py has scored
    python plot.py runs/s0 runs/s1 runs/s2    runs that differ in their seeds: means, and their range
    python plot.py runs/pretrain              a demo of apply.py

Lines are means over runs, with their range. Grey is where chance gets, the best of 20 random relabellings.
Colours of arms are those of Okabe & Ito (2008), which colour-blind people can tell apart.
"""
import contextlib
import io
import os
import random
import warnings
from collections import defaultdict
from itertools import cycle
from pathlib import Path

import numpy as np
import torch.nn.functional as F

os.environ.pop("MPLBACKEND", None)          # we need none, and an unknown one would stop the import
try:
    import matplotlib
    from matplotlib.figure import Figure
    from PIL import Image
except ImportError:                         # main says so
    matplotlib = None

from apply import select
from data import Flags, Regex, command_line
from probe import LOWER, find_overlaps, is_beyond, means, normalise, numbered, read_labels, read_states
from train import read_config, read_data, read_rows

STYLE = {"axes.titlesize": "medium",
         "axes.spines.top": False,
         "axes.spines.right": False,
         "figure.constrained_layout.use": True,
         "text.parse_math": False}          # a $ in a tasks file is a $
NIGHT = {"figure.facecolor": "#0d1117",
         "axes.facecolor": "black",
         "axes.labelcolor": "0.9",
         "text.color": "0.9",
         "xtick.color": "0.9",
         "ytick.color": "0.9"}
COLORS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
WORDS = {"f1": "pairwise F1",
         "distribution": "regular expression",
         "input_set": "set of inputs",
         "step": "training step",
         "b": "labelled instructions per unwanted task"}
TASK_F1 = {"measure": "f1",
           "identity": "task",
           "position": "instruction",
           "split": "val",
           "view": "raw"}


@contextlib.contextmanager
def own_style():
    """matplotlib's defaults and STYLE in place of what the user has set, until the end of a `with` block."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


# ---------------------------------------------------------------- rows and lines


def read_run(run):
    """Every number that a run or a demo has: rows with measure, value, and what they are about."""
    rows = []
    for name in "metrics", "probe", "patch", "apply":
        path = run / f"{name}.jsonl"
        for row in read_rows(path) if path.exists() else []:
            if "measure" in row:
                rows.append(row)
            else:                           # each of its numbers is a measure
                rows += [{**row, "measure": key, "value": value} for key, value in row.items()]
    return rows


def curve(rows, x, number="value"):
    """The values of x in rows, ascending, and mean, least and largest of the numbers at each; all (n,)."""
    found = defaultdict(list)
    for row in rows:
        found[row[x]].append(row.get(number))
    at = sorted(found)
    numbers = [np.array(found[key], float) for key in at]               # None becomes nan
    return at, *([f(some) for some in numbers] for f in (np.mean, np.min, np.max))


def draw_lines(ax, rows, x, by, names, colors=COLORS):
    """A line over x for each value of `by` in names, value -> label: the mean over runs, and their range."""
    for (value, label), color in zip(names.items(), cycle(colors)):
        some = select(rows, **{by: value})
        if some:
            at, mean, low, high = curve(some, x)
            ax.plot(at, mean, color=color, label=label, marker=".")
            ax.fill_between(at, low, high, color=color, alpha=0.2)


def shade_chance(ax, rows, x):
    """Shade what chance reaches; over steps, in the layer where it reaches most."""
    for null, label, alpha in (("regrouped_95", "chance: regexes regrouped", 0.4),
                               ("null_95", "chance: labels permuted", 0.6)):
        some = [row for row in rows if row.get(null) is not None]
        if some:
            at, _, low, high = curve(some, x, null)
            edge, far = (low, 99) if some[0]["measure"] in LOWER else (high, 0)
            ax.fill_between(at, edge, far, color="0.5", alpha=alpha, label=label)


def draw_panels(title, ylabel, panels, x, by, names, colors=COLORS, ylim=(-0.03, 1.03), shade=False):
    """A figure with a panel for each of panels, title -> rows; the rest is as for draw_lines."""
    fig = Figure(figsize=(3 + 3 * len(panels), 3.2))
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)
    for ax, (name, rows) in zip(axes[0], panels.items()):
        draw_lines(ax, rows, x, by, names, colors)
        if shade:
            shade_chance(ax, rows, x)
        ax.set(title=name, xlabel=WORDS.get(x, x), ylim=ylim)
    fig.supylabel(ylabel)
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside right center")
    fig.suptitle(title)
    return fig


def name_layers(layers):
    """layer -> label, and a colour for each, visible on white and on black."""
    # a legend leaves out labels that begin with _, so that it has at most ten
    names = {layer: f"{'_' * (layer % (1 + len(layers) // 9) > 0)}layer {layer}" for layer in layers}
    return names, matplotlib.colormaps["cool"].resampled(len(layers))(range(len(layers)))


# ---------------------------------------------------------------- similarity of states


def order_tasks(overlap):
    """The K tasks in a chain from task 0: next comes, of those left, the one most similar to the last.

    overlap (K, K): how much two tasks have in common.
    """
    order = [0]
    while len(order) < len(overlap):
        left = {*range(len(overlap))} - {*order}
        order.append(max(left, key=lambda task: overlap[order[-1], task]))
    return order


def sort_states(folder, labels, steps, name, identity):
    """States (S, L + 1, N, C) of split/position with N sorted by an identity, similar tasks together."""
    ids = {key: numbered(of) for key, of in labels[name].items()}
    shared = find_overlaps(labels, {}, name)
    if "input" in shared:
        ids["task"] = np.argsort(order_tasks(shared["input"]))[ids["task"]]
    order = np.lexsort([ids[key] for key in ("distribution", "task", identity) if key in ids])
    return read_states(folder, steps, name, len(order))[:, :, order]


def show_cosines(ax, x, title, n=480):
    """Show the cosines between centred states x (N, C); if N > n, the means of n x n blocks."""
    x = F.normalize(normalise(x), dim=1)
    n = min(n, len(x))
    x = means(x, np.arange(len(x)) * n // len(x))
    ax.set(xticks=[], yticks=[], title=title)
    ax.imshow(x @ x.T, cmap="magma", vmin=0, vmax=1)


def show_score(row):
    """A score beside the harder of its nulls, as text."""
    return f"F1 {row['value']:.2f} (chance {row.get('regrouped_95', row['null_95']):.2f})"


def draw_hero(rows, right, steps, states, shared):
    """How alike are the states of val's instructions? Through training, by layer, beside shared inputs.

    right: step -> accuracy; states (S, L + 1, N, C) are sorted by task; shared (K, K): how many inputs two
    tasks share.
    """
    f1 = {(row["step"], row["layer"]): show_score(row) for row in select(rows, **TASK_F1)}
    N = states.shape[2]
    top = states.shape[1] - 1
    tasks = order_tasks(shared)

    fig = Figure(figsize=(11.5, 7.9))
    fig.get_layout_engine().set(rect=(0, 0, 0.98, 0.86))
    fig.text(0.02, 0.95, "No task is ever named, yet the network groups what it reads by task", size=18)
    fig.text(0.02, 0.88,
             f"{N} instructions that a small Transformer never saw, each against each, sorted by their "
             f"{len(tasks)} tasks.\n"
             "Bright: the network's states after the two are alike. Black: cosine 0 or less.")
    upper, lower = fig.subplots(2, 4, subplot_kw={"xticks": [], "yticks": []})

    # the top layer, at four steps where accuracy moves
    moves = {min(steps, key=lambda step: abs(right[step] - level)) for level in (0, 0.3, 0.65, 1)}
    for ax, step in zip(upper, sorted(moves)):
        show_cosines(ax, states[steps.index(step), top],
                     f"step {step}: {right[step]:.0%} right\n{f1[step, top]}")
    upper[0].set(ylabel=f"layer {top}, through training", xlabel="small blocks: instructions of one regex")
    ax.plot([1.02, 1.02], [0, 1 / len(tasks)], color="white", transform=ax.transAxes, clip_on=False)
    ax.text(1.04, 0, f"one task,\n{N // len(tasks)} of {N}", transform=ax.transAxes)

    # the last step, in lower layers
    for ax, layer in zip(lower, range(1, top)[-3:]):
        show_cosines(ax, states[-1, layer], f"layer {layer}\n{f1[steps[-1], layer]}")
    lower[0].set_ylabel(f"step {steps[-1]}, lower layers")

    # no network: what tasks have in common
    ax = lower[3]
    ax.imshow(shared[tasks][:, tasks], cmap="bone")
    ax.set_title("no network: how many\ninputs two tasks share")
    for row in select(rows, step=steps[-1], layer=top, **TASK_F1 | {"measure": "rsa", "identity": "input"}):
        ax.set_xlabel(f"white: most. Correlation with layer {top}: {row['value'] or 0:.2f}")
    yield "hero", fig


def draw_film(rows, right, steps, states, path):
    """Write a GIF, a frame per capture: the same states, layer by layer, above F1 so far."""
    f1 = select(rows, **TASK_F1)
    layers = range(1, states.shape[1])[-4:]
    names, colors = name_layers(layers)
    frames = []
    for step, x in zip(steps, states):
        so_far = [row for row in f1 if row["step"] <= step]
        fig = Figure(figsize=(8.4, 4.5))
        upper, lower = fig.subfigures(2, height_ratios=(1.4, 1))
        upper.suptitle("No task is named, yet states group by task (sorted by task; bright: two are alike)")
        for ax, layer in zip(upper.subplots(1, len(layers), squeeze=False)[0], layers):
            show_cosines(ax, x[layer], f"layer {layer}", 96)
        ax = lower.subplots()
        draw_lines(ax, so_far, "step", "layer", names, colors)
        shade_chance(ax, so_far, "step")
        ax.set(xlim=(0, steps[-1]),
               ylim=(0, 1.02),
               xlabel="training step",
               ylabel="clusters are tasks\n(pairwise F1)",
               title=f"step {step}: {right[step]:.0%} of unseen instructions answered right")
        lower.legend(loc="outside right center")
        png = io.BytesIO()
        fig.savefig(png, dpi=100)
        frames.append(Image.open(png).convert("RGB"))
    palette = frames[-1].quantize(200)                          # one for all, so that lines stay sharp
    first, *others = (frame.quantize(palette=palette, dither=0) for frame in frames)
    first.save(path,
               save_all=True,
               append_images=others,
               duration=[600] * len(others) + [3000],           # milliseconds
               loop=0)


def draw_similarity(folder, labels, rows):
    """States of val in the last capture, layer by layer: a figure for each position and identity."""
    f1 = select(rows, measure="f1", split="val", view="raw")
    keys = dict.fromkeys((row["position"], row["identity"]) for row in f1 if row["layer"] > 0)
    for position, identity in keys:
        scores = select(f1, position=position, identity=identity)
        states = sort_states(folder, labels, [scores[-1]["step"]], f"val/{position}", identity)[0]
        scores = scores[-len(states):]
        layers = range(1, len(states))[::1 + len(states) // 8]              # at most eight
        fig = Figure(figsize=(2.2 * len(layers), 3.3))
        for ax, layer in zip(fig.subplots(1, len(layers), squeeze=False)[0], layers):
            show_cosines(ax, states[layer], f"layer {layer}\n{show_score(scores[layer])}")
        fig.suptitle(f"States at the {position}, step {scores[0]['step']}, sorted by "
                     f"{WORDS.get(identity, identity)}. Bright: alike")
        yield f"similarity_{position}_{identity}", fig


# ---------------------------------------------------------------- figures of runs


def draw_data(data, max_len):
    """Figure 1: the regexes of a task and what they say; and the output of every task for every input."""
    task = data.tasks[0]
    x = data.splits["train"].instances[0]
    text = ["The network reads",
            f"    {x.instruction} <sep> {x.input} <ans>",
            f"and answers {x.output}. The regexes of this task,",
            "and instructions (the last regex is held out):"]
    for pattern in [*task.distributions, task.held_out]:
        strings = Regex(pattern, max_len).sample(3, random.Random(0), unique=False)
        text += ["", pattern, *(f"    {string}" for string in strings)]
    fig = Figure(figsize=(10, 0.21 * len(text)))
    left, right = fig.subplots(1, 2, width_ratios=(0.8, 1))
    left.text(0, 1, "\n".join(line[:70] for line in text), family="monospace", va="top", size=8)
    left.axis("off")

    inputs = sorted({word for task in data.tasks for word in task.map})
    has = np.array([[word in task.map for word in inputs] for task in data.tasks], int)
    order = order_tasks(has @ has.T)
    right.imshow(has[order], cmap="Blues", vmax=4, aspect="auto")
    if has.size <= 400:
        right.set_xticks(range(len(inputs)), inputs)
        for i, t in enumerate(order):
            for word, output in data.tasks[t].map.items():
                right.text(inputs.index(word), i, output, ha="center", va="center", size=7)
    right.set(xlabel="input", yticks=[], ylabel="tasks, similar ones adjacent",
              title=f"Outputs of {len(order)} tasks (first row: the task at the left)")
    yield "data", fig


def draw_training(rows):
    """Figure 3: loss and accuracies."""
    names = {"acc_subset": "subset: trained on",
             "acc_val": "val: new strings of trained regexes",
             "acc_ood": "ood: strings of new regexes"}
    yield "loss", draw_panels(
        "Training loss",
        "nats per token",
        {"": rows},
        "step",
        "measure",
        {"loss": "one batch"},
        ylim=(0, None))
    yield "accuracy", draw_panels(
        "How many answers are right?",
        "share of instances",
        {"": rows},
        "step",
        "measure",
        names)


def draw_measures(rows):
    """Figures 2 and 4: of each measure, position and split a figure, with a panel for each identity.

    A line over training steps for each layer; of a single capture, a point for each layer.
    """
    rows = [row for row in select(rows, view="raw")
            if row["position"] != "surface"
            and row["measure"] != "best_k"
            and (row["split"] == "val" or row["measure"] == "f1")]
    keys = dict.fromkeys((row["measure"], row["position"], row["split"]) for row in rows)
    for measure, position, split in keys:
        some = select(rows, measure=measure, position=position, split=split)
        panels = {f"by {WORDS.get(identity, identity)}": select(some, identity=identity)
                  for identity in dict.fromkeys(row["identity"] for row in some)}
        names, colors = name_layers(sorted({row["layer"] for row in some}))
        yield f"{measure}_{position}_{split}", draw_panels(
            f"States at the {position}, {split}. Grey is what chance reaches",
            WORDS.get(measure, measure),
            panels,
            "step" if some[0]["step"] < some[-1]["step"] else "layer",
            "layer",
            names,
            colors,
            ylim=(None, 6 if measure == "nc1" else 1.2),
            shade=True)


def draw_patch(rows):
    """What is answered, and which inputs are expected next, if states are exchanged?"""
    shares = {"donor": "answers as the donor",
              "right": "still answers right",
              "next": "expects an input of the donor's task"}
    rows = [row for row in rows if "patch" in row]
    patches = {"donor": "the donor's",
               "centroid": "mean of the donor's task",
               "random": "random",
               "shift": "moved to the donor's task",
               "random shift": "moved at random",
               "letters": "letters: the donor's",
               "letters, <sep>": "letters, <sep>: the donor's",
               "from <sep> on": "from <sep> on: the donor's"}
    for position in dict.fromkeys(row["position"] for row in rows):
        panels = {title: select(rows, measure=share, position=position) for share, title in shares.items()}
        yield f"patch_{position}", draw_panels(
            f"What changes if states of one layer are replaced? ({position})",
            "share, or probability",
            panels,
            "layer",
            "patch",
            patches)


# ---------------------------------------------------------------- figures of demos


def draw_pretrain(rows):
    """Figure 5b: how soon the tasks are learnt, by what was learnt before."""
    names = {"scratch": "no pre-training",
             "lm": "pre-trained to read instructions",
             "task_id": "pre-trained to name their tasks",
             "shuffled_id": "pre-trained to name random tasks"}
    panels = {f"{n} training instructions per regex": select(rows, measure="acc_val", n_train=n)
              for n in dict.fromkeys(row["n_train"] for row in rows)}
    yield "pretrain", draw_panels(
        "How soon are the tasks learnt? (Steps of pre-training are not counted)",
        "accuracy on val",
        panels,
        "step",
        "arm",
        names)


def draw_align(rows):
    """What each arm refuses with the fewest labels, and by the number of labels."""
    arms = {"labels": "baseline: train to refuse the labelled",
            "nearest": "baseline: refuse the nearest to them",
            "clusters": "train to refuse their clusters",
            "guard": "refuse their clusters, no training"}
    others = {"guard_auto": "no training, number by silhouette",
              "guard_half": "no training, half as many clusters",
              "guard_twice": "no training, twice as many",
              "guard_counts": "no training, clusters of letters",
              "guard_untrained": "no training, untrained network"}
    panels = {"unwanted, other phrasing: refused\n(more is better)": select(rows, measure="refused_other"),
              "wanted: refused\n(less is better)": select(rows, measure="refused_wanted"),
              "wanted: answered right\n(more is better)": select(rows, measure="accuracy")}
    yield "align_budgets", draw_panels(
        "Do more labels help?",
        "share of instances",
        panels,
        "b",
        "arm",
        arms)

    # with the fewest labels, the controls, too: a dot for each run
    arms |= others
    fewest = min(row["b"] for row in rows if "b" in row)
    fig = Figure(figsize=(10, 3.4))
    for ax, (title, some) in zip(fig.subplots(1, len(panels), sharey=True), panels.items()):
        for y, (arm, color) in enumerate(zip(arms, [*COLORS[:4], *["0.5"] * 5])):
            shares = [row["value"] for row in select(some, arm=arm, b=fewest)]
            ax.plot(shares, [y] * len(shares), "o-", color=color)
        ax.set(title=title, xlabel="share of instances", xlim=(-0.03, 1.03))
    ax.set_yticks(range(len(arms)), arms.values())
    ax.invert_yaxis()
    fig.suptitle(f"What is refused, knowing {fewest} instruction of each unwanted task? (A dot is a run)")
    yield "align", fig


# ---------------------------------------------------------------- all of them


def group_runs(folders):
    """Lists of folders to draw as one: runs that differ in their seeds only, or any other folder."""
    groups = defaultdict(dict)
    for folder in folders:
        cfg = {"seed": 0, "folder": folder}
        if (folder / "config.json").exists():
            cfg = vars(read_config(folder)) | {"out": ""}
        seed = cfg.pop("seed")
        key = str(cfg).replace(f"seed{seed}/", "")              # a run may start from one of its seed
        while seed in groups[key]:
            key += "again"
        groups[key][seed] = folder
    return [list(group.values()) for group in groups.values()]


def draw(runs, out):
    """Draw runs that differ in their seeds only, or one demo, or one folder of states."""
    first = runs[0]
    mine, *others = map(read_run, runs)
    rows = sum(others, mine)
    if not rows:
        raise ValueError(f"{first}: there is nothing to draw. Train and probe it first: make train probe")
    out.mkdir(parents=True, exist_ok=True)
    if "arm" in rows[0]:
        figures = draw_pretrain(rows) if "n_train" in rows[0] else draw_align(rows)
    else:
        labels = read_labels(first)
        figures = [*draw_measures(rows), *draw_patch(rows), *draw_similarity(first, labels, mine)]
    if (first / "config.json").exists():
        cfg = read_config(first)
        figures += draw_training(rows)
        if cfg.asks_for == "output" and not cfg.shuffle_tasks:          # else it would be wrong
            figures += draw_data(read_data(first), cfg.max_len)
            f1 = select(mine, **TASK_F1)
            # are there clusters in the top layer, at the last step?
            if any(row["value"] > 0.5 and is_beyond(row) for row in f1[-1:]):
                right = {row["step"]: row["value"] for row in select(mine, measure="acc_val")}
                steps = sorted({row["step"] for row in f1} & {*right})
                states = sort_states(first, labels, steps, "val/instruction", "task")
                shared = find_overlaps(labels, {}, "val/instruction")["input"]
                with matplotlib.rc_context(NIGHT):
                    figures += draw_hero(mine, right, steps, states, shared)
                    draw_film(mine, right, steps, states, out / "hero.gif")
    for name, fig in figures:
        fig.supxlabel(f"runs: {', '.join(run.name for run in runs)}"
                      f"{' (matrices: the first)' * (len(runs) > 1)}", size=8, color="0.5")
        fig.savefig(out / f"{name}.png", dpi=130)
    print(f"the figures are in {out}")


def main():
    """Draw runs, demos of apply.py, or any folders of states."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("folders", nargs="*", type=Path, help="what to draw (default: all in runs/)")
    flags.add_argument("--out", type=Path, help="where to (default: figures/ in the first folder)")
    given = flags.parse_args()
    if matplotlib is None:
        raise ValueError("matplotlib is missing: make figures installs it")
    found = sorted({path.parent for path in Path("runs").glob("*/[amp]*.jsonl")})
    with warnings.catch_warnings(record=True) as caught, own_style():
        groups = group_runs(given.folders or found or [Path("runs/default")])
        if given.out and len(groups) > 1:
            raise ValueError("--out: these differ in more than their seeds, draw one after the other")
        for runs in groups:
            draw(runs, given.out or runs[0] / "figures")
    if caught:
        print(f"note: {caught[0].message}, and {len(caught) - 1} more like it")


if __name__ == "__main__":
    command_line(main)
