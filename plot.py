"""Draw everything the other files measure, as PNG and GIF. The only file that needs matplotlib.

    python plot.py                            everything in runs/, each run into its own folder figures/
    python plot.py runs/default               one run, or any folder of states that probe.py has scored
    python plot.py runs/s0 runs/s1 runs/s2    runs that differ only in their seeds, drawn together
    python plot.py runs/pretrain              a demo of apply.py

Lines are means over runs, bands their range. Grey marks scores no better than the best of 20 random
relabellings. Arms have the colours of Okabe & Ito (2008), which colour-blind readers can tell apart.
"""
import contextlib
import io
import os
import random
import warnings
from collections import defaultdict
from itertools import cycle
from pathlib import Path

from runs import BadInput, Flags, command_line, read_run, select

import numpy as np
import torch.nn.functional as F

os.environ.pop("MPLBACKEND", None)          # unused here, and an unknown one would break the import
try:
    import matplotlib
    from matplotlib.figure import Figure
    from PIL import Image
except ImportError:                         # main reports it
    matplotlib = None

from data import Regex
from probe import (LOWER, is_beyond, means, normalise, numbered, read_labels, read_states,
                   task_similarities)
from train import read_config, read_data

STYLE = {"axes.titlesize": "medium",
         "axes.spines.top": False,
         "axes.spines.right": False,
         "figure.constrained_layout.use": True,
         "text.parse_math": False}          # draw the $ of a tasks file as a $
NIGHT = {"figure.facecolor": "#0d1117",     # for the hero figure and its film
         "axes.facecolor": "black",
         "axes.labelcolor": "0.9",
         "text.color": "0.9",
         "xtick.color": "0.9",
         "ytick.color": "0.9"}
COLORS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
WORDS = {"f1": "pairwise F1",
         "regex": "regular expression",
         "input_set": "set of inputs",
         "step": "training step",
         "b": "labelled instructions per unwanted task"}
TASK_F1 = {"measure": "f1",             # selects the headline score
           "identity": "task",
           "position": "instruction",
           "split": "val",
           "view": "raw"}


@contextlib.contextmanager
def own_style():
    """Within a `with` block, use matplotlib's defaults and STYLE in place of the user's settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


# ---------------------------------------------------------------- rows and lines


def curve(rows, x, number="value"):
    """The n values of key x in ascending order, and at each the mean, minimum and maximum of a number."""
    found = defaultdict(list)
    for row in rows:
        found[row[x]].append(row.get(number))
    at = sorted(found)
    numbers = [np.array(found[key], float) for key in at]               # None becomes nan
    return at, *([f(some) for some in numbers] for f in (np.mean, np.min, np.max))


def draw_lines(ax, rows, x, by, names, colors=COLORS):
    """Draw a line over x for each value of key `by`: the mean and range over runs. names: value -> label."""
    for (value, label), color in zip(names.items(), cycle(colors)):
        some = select(rows, **{by: value})
        if some:
            at, mean, low, high = curve(some, x)
            ax.plot(at, mean, color=color, label=label, marker=".")
            ax.fill_between(at, low, high, color=color, alpha=0.2)


def shade_chance(ax, rows, x):
    """Shade the scores that chance reaches; over steps, in the layer where chance does best."""
    for null, label, alpha in (("regrouped_95", "chance: regexes regrouped", 0.4),
                               ("null_95", "chance: labels permuted", 0.6)):
        some = [row for row in rows if row.get(null) is not None]
        if some:
            at, _, low, high = curve(some, x, null)
            edge, far = (low, 99) if some[0]["measure"] in LOWER else (high, 0)
            ax.fill_between(at, edge, far, color="0.5", alpha=alpha, label=label)


def draw_panels(title, ylabel, panels, x, by, names, colors=COLORS, ylim=(-0.03, 1.03), shade=False):
    """A figure with a panel for each item of panels, title -> rows; the rest is passed to draw_lines."""
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
    """The layers' legend labels, layer -> label, and their colours, visible on white and on black."""
    # legends omit labels that begin with _: at most ten are left
    names = {layer: f"{'_' * (layer % (1 + len(layers) // 9) > 0)}layer {layer}" for layer in layers}
    return names, matplotlib.colormaps["cool"].resampled(len(layers))(range(len(layers)))


# ---------------------------------------------------------------- similarity of states


def order_tasks(overlap):
    """Order the K tasks so that similar ones are adjacent: from task 0, always on to the most similar left.

    overlap (K, K): how much any two tasks have in common.
    """
    order = [0]
    while len(order) < len(overlap):
        left = {*range(len(overlap))} - {*order}
        order.append(max(left, key=lambda task: overlap[order[-1], task]))
    return order


def sort_states(folder, labels, steps, name, identity):
    """Read states (S, L + 1, N, C) of a split/position; sort N by identity, similar tasks together."""
    ids = {key: numbered(of) for key, of in labels[name].items()}
    shared = task_similarities(labels, {}, name)
    if "input" in shared:
        ids["task"] = np.argsort(order_tasks(shared["input"]))[ids["task"]]
    order = np.lexsort([ids[key] for key in ("regex", "task", identity) if key in ids])
    return read_states(folder, steps, name, len(order))[:, :, order]


def show_cosines(ax, x, title, n=480):
    """Show cosines between centred states x (N, C) as an image; if N > n, as means of n x n blocks."""
    x = F.normalize(normalise(x), dim=1)
    n = min(n, len(x))
    x = means(x, np.arange(len(x)) * n // len(x))
    ax.set(xticks=[], yticks=[], title=title)
    ax.imshow(x @ x.T, cmap="magma", vmin=0, vmax=1)


def show_score(row):
    """A score and the harder of its nulls, as text."""
    return f"F1 {row['value']:.2f} (chance {row.get('regrouped_95', row['null_95']):.2f})"


def draw_hero(rows, right, steps, states, shared):
    """README's first figure: how similar are states of unseen instructions, through training and by layer?

    right: step -> accuracy on val; states (S, L + 1, N, C) are those of val at `instruction`, sorted by task;
    shared (K, K): how many inputs two tasks share.
    """
    f1 = {(row["step"], row["layer"]): show_score(row) for row in select(rows, **TASK_F1)}
    N = states.shape[2]
    top = states.shape[1] - 1
    tasks = order_tasks(shared)

    fig = Figure(figsize=(11.5, 7.9))
    fig.get_layout_engine().set(rect=(0, 0, 0.98, 0.86))
    fig.text(0.02, 0.95, "No task is ever named, yet the network groups instructions by task", size=18)
    fig.text(0.02, 0.88,
             f"{N} instructions not seen in training, each compared with every other, sorted by their "
             f"{len(tasks)} tasks.\n"
             "Bright: the network's states after the two instructions are similar. Black: cosine 0 or less.")
    upper, lower = fig.subplots(2, 4, subplot_kw={"xticks": [], "yticks": []})

    # the top layer, at the steps where accuracy is closest to these levels
    moves = {min(steps, key=lambda step: abs(right[step] - level)) for level in (0, 0.3, 0.65, 1)}
    for ax, step in zip(upper, sorted(moves)):
        show_cosines(ax, states[steps.index(step), top],
                     f"step {step}: accuracy {right[step]:.0%}\n{f1[step, top]}")
    upper[0].set(ylabel=f"layer {top}, through training", xlabel="each small block: one regex")
    # a white bar, as long as one task
    ax.plot([1.02, 1.02], [0, 1 / len(tasks)], color="white", transform=ax.transAxes, clip_on=False)
    ax.text(1.04, 0, f"one task,\n{N // len(tasks)} of {N}", transform=ax.transAxes)

    # the layers below it, at the last step
    for ax, layer in zip(lower, range(1, top)[-3:]):
        show_cosines(ax, states[-1, layer], f"layer {layer}\n{f1[steps[-1], layer]}")
    lower[0].set_ylabel(f"step {steps[-1]}, lower layers")

    # no network: what tasks have in common
    ax = lower[3]
    ax.imshow(shared[tasks][:, tasks], cmap="bone")
    ax.set_title("no network: number of\ninputs two tasks share")
    for row in select(rows, step=steps[-1], layer=top, **TASK_F1 | {"measure": "rsa", "identity": "input"}):
        ax.set_xlabel(f"white: most. Correlation with layer {top}: {row['value'] or 0:.2f}")
    yield "hero", fig


def draw_film(rows, right, steps, states, path):
    """Write a GIF with a frame per capture: similarity in the top layers, above the F1 curves so far."""
    f1 = select(rows, **TASK_F1)
    layers = range(1, states.shape[1])[-4:]
    names, colors = name_layers(layers)
    frames = []
    for step, x in zip(steps, states):
        so_far = [row for row in f1 if row["step"] <= step]
        fig = Figure(figsize=(8.4, 4.5))
        upper, lower = fig.subfigures(2, height_ratios=(1.4, 1))
        upper.suptitle("No task is ever named, yet states group by task (sorted by task; bright: similar)")
        for ax, layer in zip(upper.subplots(1, len(layers), squeeze=False)[0], layers):
            show_cosines(ax, x[layer], f"layer {layer}", 96)
        ax = lower.subplots()
        draw_lines(ax, so_far, "step", "layer", names, colors)
        shade_chance(ax, so_far, "step")
        ax.set(xlim=(0, steps[-1]),
               ylim=(0, 1.02),
               xlabel="training step",
               ylabel="do clusters match\ntasks? (pairwise F1)",
               title=f"step {step}: accuracy on unseen instructions {right[step]:.0%}")
        lower.legend(loc="outside right center")
        png = io.BytesIO()
        fig.savefig(png, dpi=100)
        frames.append(Image.open(png).convert("RGB"))
    palette = frames[-1].quantize(200)                          # one for all frames, so that lines stay sharp
    first, *others = (frame.quantize(palette=palette, dither=0) for frame in frames)
    first.save(path,
               save_all=True,
               append_images=others,
               duration=[600] * len(others) + [3000],           # milliseconds
               loop=0)


def draw_similarity(folder, labels, rows):
    """Similarity of val's states in the last capture, by layer: one figure per position and identity."""
    f1 = select(rows, measure="f1", split="val", view="raw")
    keys = dict.fromkeys((row["position"], row["identity"]) for row in f1 if row["layer"] > 0)
    for position, identity in keys:
        scores = select(f1, position=position, identity=identity)
        states = sort_states(folder, labels, [scores[-1]["step"]], f"val/{position}", identity)[0]
        scores = scores[-len(states):]
        layers = range(1, len(states))[::1 + len(states) // 8]              # at most eight of them
        fig = Figure(figsize=(2.2 * len(layers), 3.3))
        for ax, layer in zip(fig.subplots(1, len(layers), squeeze=False)[0], layers):
            show_cosines(ax, states[layer], f"layer {layer}\n{show_score(scores[layer])}")
        fig.suptitle(f"States at {position}, step {scores[0]['step']}, sorted by "
                     f"{WORDS.get(identity, identity)}. Bright: similar")
        yield f"similarity_{position}_{identity}", fig


# ---------------------------------------------------------------- figures of runs


def draw_data(data, max_len):
    """Figure 1: the regexes of one task with sampled strings; and each task's output for each input."""
    task = data.tasks[0]
    x = data.splits["train"].instances[0]
    text = ["The network reads",
            f"    {x.instruction} <sep> {x.input} <ans>",
            f"and answers {x.output}. Regexes of this task, each with",
            "three sampled instructions (the last regex is held out):"]
    for pattern in [*task.regexes, task.held_out]:
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
              title=f"Outputs of {len(order)} tasks (top row: the task on the left)")
    yield "data", fig


def draw_training(rows):
    """Figure 3: training loss, and accuracy on subset, val and ood."""
    names = {"acc_subset": "subset: trained on",
             "acc_val": "val: new strings of trained regexes",
             "acc_ood": "ood: strings of held-out regexes"}
    yield "loss", draw_panels(
        "Training loss",
        "nats per token",
        {"": rows},
        "step",
        "measure",
        {"loss": "current batch"},
        ylim=(0, None))
    yield "accuracy", draw_panels(
        "Accuracy: the output is exactly right",
        "share of instances",
        {"": rows},
        "step",
        "measure",
        names)


def draw_measures(rows):
    """Figures 2 and 4: one figure per measure, position and split, with one panel per identity.

    Each layer is a line over training steps; if there is only one capture, the layers are on the x axis.
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
            f"States at {position}, {split}. Grey: no better than chance",
            WORDS.get(measure, measure),
            panels,
            "step" if some[0]["step"] < some[-1]["step"] else "layer",
            "layer",
            names,
            colors,
            ylim=(None, 6 if measure == "nc1" else 1.05),
            shade=True)


def draw_patch(rows):
    """What does the network answer, and which inputs does it expect, when states are replaced?"""
    shares = {"donor": "gives the donor's answer",
              "right": "still gives its own answer",
              "next": "expects an input of the donor's task"}
    rows = [row for row in rows if "patch" in row]
    patches = {"donor": "state of the donor",
               "centroid": "mean of the donor's task",
               "random": "random vector",
               "shift": "shifted to the donor's task",
               "random shift": "shifted at random",
               "letters": "letters: states of the donor",
               "letters, <sep>": "letters, <sep>: states of the donor",
               "from <sep> on": "from <sep> on: states of the donor"}
    for position in dict.fromkeys(row["position"] for row in rows):
        panels = {title: select(rows, measure=share, position=position) for share, title in shares.items()}
        yield f"patch_{position}", draw_panels(
            f"What changes when states of one layer are replaced? ({position})",
            "share of prompts, or probability",
            panels,
            "layer",
            "patch",
            patches)


# ---------------------------------------------------------------- figures of demos


def draw_pretrain(rows):
    """Figure 5b: how fast the tasks are learnt after each kind of pre-training."""
    names = {"scratch": "no pre-training",
             "lm": "pre-trained on instructions alone",
             "task_id": "pre-trained on task IDs",
             "shuffled_id": "pre-trained on random task IDs"}
    panels = {f"{n} training instructions per regex": select(rows, measure="acc_val", n_train=n)
              for n in dict.fromkeys(row["n_train"] for row in rows)}
    yield "pretrain", draw_panels(
        "How fast are the tasks learnt? (Pre-training steps are not counted)",
        "accuracy on val",
        panels,
        "step",
        "arm",
        names)


def draw_align(rows):
    """What each arm refuses and answers, against the number of labels and with the fewest labels."""
    arms = {"labels": "labels: baseline, trained on labels",
            "nearest": "nearest: baseline, nearest to a label",
            "clusters": "clusters: trained on whole clusters",
            "guard": "guard: refuses unwanted clusters"}
    others = {"guard_auto": "guard_auto: k by silhouette",
              "guard_half": "guard_half: half as many clusters",
              "guard_twice": "guard_twice: twice as many clusters",
              "guard_counts": "guard_counts: letters, no states",
              "guard_untrained": "guard_untrained: untrained network"}
    panels = {"refused: unwanted, other regexes\n(higher is better)": select(rows, measure="refused_other"),
              "refused: wanted\n(lower is better)": select(rows, measure="refused_wanted"),
              "answered correctly: wanted\n(higher is better)": select(rows, measure="accuracy")}
    yield "align_budgets", draw_panels(
        "Do more labels help?",
        "share of instances",
        panels,
        "b",
        "arm",
        arms)

    # all arms with the fewest labels, one dot per run
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
    fig.suptitle(f"Shares with {fewest} labelled instruction per unwanted task (one dot per run)")
    yield "align", fig


# ---------------------------------------------------------------- all of them


def group_runs(folders):
    """Group folders that are drawn together: runs that differ only in their seeds; others stay alone."""
    groups = defaultdict(dict)
    for folder in folders:
        cfg = {"seed": 0, "folder": folder}
        if (folder / "config.json").exists():
            cfg = vars(read_config(folder)) | {"out": ""}
        seed = cfg.pop("seed")
        key = str(cfg).replace(f"seed{seed}/", "")              # `start` may be a run of its seed
        while seed in groups[key]:
            key += "again"                  # a second run of this seed gets a group of its own
        groups[key][seed] = folder
    return [list(group.values()) for group in groups.values()]


def draw(runs, out):
    """Draw a group of runs that differ only in their seeds, or one demo, or one folder of states."""
    first = runs[0]
    mine, *others = map(read_run, runs)
    rows = sum(others, mine)
    if not rows:
        raise BadInput(f"{first}: nothing to draw; train it, then score it: python probe.py {first}")
    out.mkdir(parents=True, exist_ok=True)
    if "arm" in rows[0]:
        figures = draw_pretrain(rows) if "n_train" in rows[0] else draw_align(rows)
    else:
        labels = read_labels(first)
        figures = [*draw_measures(rows), *draw_patch(rows), *draw_similarity(first, labels, mine)]
    if (first / "config.json").exists():
        cfg = read_config(first)
        figures += draw_training(rows)
        if cfg.asks_for == "output" and not cfg.shuffle_tasks:          # else its outputs are not the tasks'
            figures += draw_data(read_data(first), cfg.max_len)
            f1 = select(mine, **TASK_F1)
            # draw the hero if the top layer clusters by task at the last step
            if any(row["value"] > 0.5 and is_beyond(row) for row in f1[-1:]):
                right = {row["step"]: row["value"] for row in select(mine, measure="acc_val")}
                steps = sorted({row["step"] for row in f1} & {*right})
                states = sort_states(first, labels, steps, "val/instruction", "task")
                shared = task_similarities(labels, {}, "val/instruction")["input"]
                with matplotlib.rc_context(NIGHT):
                    figures += draw_hero(mine, right, steps, states, shared)
                    draw_film(mine, right, steps, states, out / "hero.gif")
    for name, fig in figures:
        fig.supxlabel(f"runs: {', '.join(run.name for run in runs)}"
                      f"{' (matrices: first run)' * (len(runs) > 1)}", size=8, color="0.5")
        fig.savefig(out / f"{name}.png", dpi=130)
    print(f"figures are in {out}")


def main():
    """Draw runs, demos of apply.py, or any folders of states."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("folders", nargs="*", type=Path, help="what to draw (default: everything in runs/)")
    flags.add_argument("--out", type=Path, help="output folder (default: figures/ in the first folder)")
    given = flags.parse_args()
    if matplotlib is None:
        raise BadInput("matplotlib is missing: make figures installs it")
    # apply.jsonl, metrics.jsonl, patch.jsonl, probe.jsonl
    found = sorted({path.parent for path in Path("runs").glob("*/[amp]*.jsonl")})
    with warnings.catch_warnings(record=True) as caught, own_style():
        groups = group_runs(given.folders or found or [Path("runs/default")])
        if given.out and len(groups) > 1:
            raise BadInput("--out: these folders differ in more than their seeds, draw them one at a time")
        for runs in groups:
            draw(runs, given.out or runs[0] / "figures")
    if caught:
        print(f"note: {caught[0].message} (and {len(caught) - 1} more warnings)")


if __name__ == "__main__":
    command_line(main)
