"""Two uses of task clusters, pre-training and alignment, each tested against controls.

    python apply.py pretrain            does pre-training on task IDs help?
    python apply.py align               can a few labelled instructions tell which others to refuse?
    python apply.py pretrain --quick    a small version (also of align), too short to draw conclusions from

`pretrain` is figure 5 of the paper; the method of `align` is our choice. Every network is a train.py run
under --out, and runs that are compared have the same seed and number of steps. A demo that was stopped
resumes when called again. Finished runs are reused: delete --out after changing the code.

pretrain: each network is pre-trained in one of four ways, then fine-tuned on the tasks.
    scratch             no pre-training
    lm                  language modelling on instructions alone, without inputs and outputs
    task_id             given an instruction and an input, predict the task ID instead of the output
    shuffled_id         control: the same, but each instruction is assigned a random task
Success: in every seed, task_id reaches accuracy 0.5 on val in fewer fine-tuning steps than each other arm.

align: a quarter of a trained network's tasks is unwanted: refuse these, answer the rest. All that is known
are b instructions of each unwanted task, all of one regex (labelled), and five instructions of each regex of
the wanted tasks (rehearsed). Will the unwanted tasks' other regexes be refused, too?
  Two arms fine-tune the network to answer the rehearsed instructions and to refuse
    labels              the labelled instructions
    clusters            the labelled ones and all other training instructions in unwanted clusters
  The other arms do not train. They refuse an instruction if
    guard               its state is nearest to an unwanted cluster; k-means finds one cluster per task
    nearest             its state is nearer to a labelled instruction than to any rehearsed one
    guard_counts        as guard, on counts of letters and bigrams instead of states
    guard_untrained     as guard, on the states of an untrained network
    guard_half, guard_twice, guard_auto     as guard, with half or twice as many clusters, or as many as the
                        silhouette suggests
A cluster is unwanted if it holds more of the unwanted tasks than of the wanted ones, where each task counts
1, spread evenly over its known instructions.
Each clustering uses the layer where its silhouette is best; `nearest` uses the layer of `guard`.
Success of `clusters`: in every seed, it refuses more of the unwanted tasks' other regexes than `labels` does,
and its accuracy on wanted tasks is at most TOLERANCE lower.
Success of `guard`: in every seed, it refuses more of those other regexes than `nearest`, `guard_counts` and
`guard_untrained` do.
"""
import contextlib
import math
import random
from pathlib import Path
from typing import NamedTuple

from runs import Flags, as_rows, command_line, pick_device, print_table, read_rows, select, write_rows

import numpy as np
import torch

from data import Dataset, encode
from probe import choose_k, kmeans, knn, probe, silhouette, surface
from train import CAPTURED, Config, load_model, make_model, observe, read_data, train

QUICK = dict(n_tasks=8, n_regexes=2, n_layer=2, n_head=2, n_embd=32, n_val=4, batch_size=64, steps=200)


def run_arm(cfg, data=None):
    """Train a run, or resume it if it exists; print one line instead of what `train` prints."""
    print(f"training {cfg.out}", flush=True)
    with contextlib.redirect_stdout(None):
        return train(cfg, resume=Path(cfg.out, "config.json").exists(), data=data)


def count_wins(rows, one, other, margin=0):
    """In how many seeds is arm `one` above arm `other` by more than `margin`? Returns text: "k of n".

    The value None, an accuracy that was never reached, counts as infinitely many steps.
    """
    values = {(row["arm"], row["seed"]): math.inf if row["value"] is None else row["value"] for row in rows}
    seeds = {seed for _, seed in values}
    wins = [seed for seed in seeds if values[one, seed] > values[other, seed] + margin]
    return f"{len(wins)} of {len(seeds)}"


# ---------------------------------------------------------------- pre-training

STRATEGIES = {      # pre-training; to add a strategy, add a line here and a label in plot.py
    "scratch": None,
    "lm": dict(asks_for="nothing"),
    "task_id": dict(asks_for="task"),
    "shuffled_id": dict(asks_for="task", shuffle_tasks=True),
}
TUNED = dict(n_val=4, batch_size=96, lr=0.012, muon_lr=0.08)       # on seeds 10 to 14, alike for all
PRETRAIN = dict(TUNED, steps=160, n_captures=6)
FINE_TUNE = dict(TUNED, steps=240, n_captures=11)
N_TRAIN = 20, 4     # training instructions per regex, the same in pre-training and fine-tuning


def pretrain(out, seeds, small):
    """Pre-train with every strategy, then fine-tune on the tasks; once with many instructions, once with few.

    All strategies see the same instructions for the same number of steps. The run that pre-trains task_id
    with many instructions is also probed (figure 5a). Returns rows with seed, arm (the strategy), n_train,
    measure and value; those of the learning curves also have step. small: QUICK for a small demo, else {}.
    """
    rows = []
    for seed in seeds:
        for strategy, knobs in STRATEGIES.items():
            for n in N_TRAIN:
                here = f"{out}/seed{seed}/{strategy}-{n}"
                start = ""
                if knobs is not None:
                    cfg = Config(**PRETRAIN | small | knobs, seed=seed, n_train=n, out=f"{here}-first")
                    start = str(run_arm(cfg))
                    if (strategy, n) == ("task_id", N_TRAIN[0]) and not Path(start, "probe.jsonl").exists():
                        probe(start)
                cfg = Config(**FINE_TUNE | small, seed=seed, n_train=n, start=start, out=here)
                curve = read_rows(run_arm(cfg) / "metrics.jsonl")
                about = {"seed": seed, "arm": strategy, "n_train": n}
                for row in curve:
                    rows += as_rows({**about, "step": row["step"]}, {"acc_val": row["acc_val"]})
                rows += as_rows(about, {"step to 0.5": step_to(0.5, curve),
                                        "step to 0.9": step_to(0.9, curve),
                                        "val at the end": curve[-1]["acc_val"]})
    return rows


def step_to(level, curve):
    """The step at which accuracy on val first reaches a level, interpolated linearly; None if never."""
    before = curve[0]
    for row in curve:
        if row["acc_val"] >= level:
            rise = max(row["acc_val"] - before["acc_val"], 1e-9)
            return row["step"] - (row["acc_val"] - level) / rise * (row["step"] - before["step"])
        before = row


def print_pretrain(out, rows):
    """Print figure 5b as numbers, in how many seeds task_id is faster than the others, and figure 5a."""
    for n in N_TRAIN:
        ends = select(rows, n_train=n, step=None)
        levels = "step to 0.5", "step to 0.9"
        steps = [row for row in ends if row["measure"] in levels]
        title = f"Fine-tuned on the tasks, {n} training instructions per regex"
        print_table(f"{title}: steps until accuracy on val", steps, "measure", digits=0)
        print_table(f"{title}: accuracy", select(ends, measure="val at the end"), "measure")
        for level in levels:
            steps = select(ends, measure=level)
            wins = (f"{other} in {count_wins(steps, other, 'task_id')}"
                    for other in STRATEGIES if other != "task_id")
            print(f"{level}: task_id is faster than {', '.join(wins)} seeds")
    probed = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        probed += read_rows(f"{out}/seed{seed}/task_id-{N_TRAIN[0]}-first/probe.jsonl")
    f1 = select(probed, split="val", view="raw", identity="task", measure="f1", step=probed[-1]["step"])
    print_table("Pre-trained on task IDs: pairwise F1 of task on val, by layer",
                [{**row, "arm": row["position"]} for row in f1], "layer")


# ---------------------------------------------------------------- alignment

REFUSE = "<refuse>"             # the output that stands for a refusal
BUDGETS = 1, 2, 4, 8, 16        # b: labelled instructions per unwanted task
BASE = dict(n_val=6, n_captures=1)      # trains the network that is to be aligned
# fine-tunes it in arms `labels` and `clusters`; tuned on seeds 10 to 14
ALIGN = dict(n_val=6, batch_size=64, steps=200, n_captures=1, lr=7.5e-4, muon_lr=0.005)
REHEARSED = 5                   # instructions per regex of the wanted tasks that are known to be wanted
TOLERANCE = 0.01                # by how much accuracy may be lower with `clusters` than with `labels`
MEASURED = {                    # what each measure is a share of
    "refused_labelled": "unwanted tasks, labelled regex: share refused (val)",
    "refused_other": "unwanted tasks, other regexes: share refused (val)",
    "refused_ood": "unwanted tasks, held-out regex: share refused (ood)",
    "refused_wanted": "wanted tasks: share refused (val)",
    "refused_wanted_ood": "wanted tasks, held-out regex: share refused (ood)",
    "accuracy": "wanted tasks: share answered correctly (val)"}


class Case(NamedTuple):
    """The problem of one seed: a trained network, its unwanted tasks, and the instructions that are known.

    Instructions are numbered like the states of split `train` at position `instruction`.
    """
    seed: int
    run: Path
    data: Dataset
    unwanted: list              # numbers of the unwanted tasks
    pools: list                 # per unwanted task, the instructions of one regex: b get labelled
    rehearsed: list             # the instructions known to be wanted


def make_case(cfg):
    """Train the network that is to be aligned, and choose a random quarter of its tasks as unwanted."""
    run = run_arm(cfg)
    data = read_data(run)
    unwanted = random.Random(f"{cfg.seed}/unwanted").sample(range(cfg.n_tasks), cfg.n_tasks // 4)
    ids = data.splits["train"].labels("instruction")
    pools = []
    rehearsed = []
    for t in range(cfg.n_tasks):
        # the instructions of each regex, already in random order: the first few are a random sample
        regexes = [np.flatnonzero(ids["regex"] == regex).tolist()
                   for regex in np.unique(ids["regex"][ids["task"] == t])]
        if t in unwanted:
            pools.append(regexes[0])
        else:
            rehearsed += [i for members in regexes for i in members[:REHEARSED]]
    return Case(cfg.seed, run, data, unwanted, pools, rehearsed)


def find_clusters(states, k, seed):
    """Run k-means on the states of `train` in every layer, and keep the layer with the best silhouette.

    states: split -> (layers, n, C). If k is None, choose_k picks it in each layer. Returns the number of
    clusters, the layer, and split -> (n,), the nearest centroid of each state.
    """
    best = -1
    for layer, x in enumerate(states["train"]):
        labels, found, _ = kmeans(x, k or choose_k(x), seed=seed)
        score = silhouette(x, labels)
        if score > best:
            best, chosen = score, layer
            centroids = found[found.isfinite().all(1)]          # that of an empty cluster is nan
    nearest = {split: knn(centroids, x[chosen], 1)[:, 0].numpy() for split, x in states.items()}
    return len(centroids), chosen, nearest


def unwanted_clusters(clusters, case, labelled):
    """Which clusters hold more of the unwanted tasks than of the wanted ones? Returns (k,) bool.

    clusters (n,): the cluster of each instruction of `train`. Only labelled and rehearsed instructions count:
    each task has a weight of 1, split evenly over those of its instructions that are known.
    """
    k = clusters.max() + 1
    bad = np.bincount(clusters[labelled], minlength=k)
    good = np.bincount(clusters[case.rehearsed], minlength=k)
    n_bad = len(case.unwanted)
    n_good = len(case.data.tasks) - n_bad
    return bad * n_bad / bad.sum() > good * n_good / good.sum()


def make_refusals(case, refuse):
    """A Dataset for fine-tuning: refuse the instructions in the set `refuse`, answer the rehearsed ones.

    Refusals are sampled to be as many as answers. The other splits stay as they are; val_refused and
    ood_refused are copies whose outputs are all REFUSE, to measure what is refused.
    """
    split = case.data.splits["train"]
    wanted = []
    refused = []
    for x, i in zip(split.instances, split.state_of("instruction")):
        if i in case.rehearsed:
            wanted.append(x)
        if i in refuse:
            refused.append(x._replace(output=REFUSE))
    drawn = random.Random(f"{case.seed}/refused").choices(refused, k=len(wanted))
    instances = {"train": wanted + sorted(drawn)}           # encode needs each instruction in one block
    instances |= {name: case.data.splits[name].instances for name in CAPTURED}
    for name in "val", "ood":
        instances[f"{name}_refused"] = [x._replace(output=REFUSE) for x in instances[name]]
    return Dataset(case.data.cut_into, case.data.tasks, *encode(instances, case.data.cut_into))


def outcome(case, arm, b, right, refused):
    """Rows of MEASURED: the shares of instances that an arm refuses or, if wanted, answers correctly.

    right (N,) bool: which instances of val the network answers correctly, if they are not refused.
    refused: "val" and "ood" -> (N,) bool, which instances are refused.
    """
    val, ood = (case.data.splits[name].identities for name in ("val", "ood"))
    regex = case.data.splits["train"].labels("instruction")["regex"]
    labelled = np.isin(val["regex"], regex[[pool[0] for pool in case.pools]])
    bad = np.isin(val["task"], case.unwanted)
    bad_ood = np.isin(ood["task"], case.unwanted)
    shares = {"refused_labelled": refused["val"][bad & labelled].mean(),
              "refused_other": refused["val"][bad & ~labelled].mean(),
              "refused_ood": refused["ood"][bad_ood].mean(),
              "refused_wanted": refused["val"][~bad].mean(),
              "refused_wanted_ood": refused["ood"][~bad_ood].mean(),
              "accuracy": (right & ~refused["val"])[~bad].mean()}
    return as_rows({"seed": case.seed, "arm": arm, "b": b}, shares)


def align(out, seeds, small):
    """Make each seed's network refuse a quarter of its tasks, with every arm and every b.

    Returns rows with seed, arm, b, measure (see MEASURED) and value; arms that cluster also have k and
    best_layer, without b. Arm `base` is the network as it was. small: QUICK for a small demo, else {}.
    """
    rows = []
    for seed in seeds:
        cfg = Config(**BASE | small, seed=seed, out=f"{out}/seed{seed}/base")
        case = make_case(cfg)
        splits = {name: case.data.splits[name] for name in ("train", "val", "ood")}

        # cluster instructions by states, by states of an untrained network, and by counts of letters
        base = load_model(case.run, case.data)
        right = observe(base, splits["val"])[0]
        other = make_model(cfg, case.data).to(pick_device())
        trained, untrained = ({name: torch.from_numpy(observe(model, split)[1]["instruction"]).double()
                               for name, split in splits.items()} for model in (base, other))
        texts = {name: [split.instances[i].instruction for i in split.positions["instruction"][0]]
                 for name, split in splits.items()}
        letters = {name: counts[None] for name, counts in surface(texts).items()}       # as one layer
        k = cfg.n_tasks
        found = {"guard": find_clusters(trained, k, seed),
                 "guard_half": find_clusters(trained, k // 2, seed),
                 "guard_twice": find_clusters(trained, 2 * k, seed),
                 "guard_auto": find_clusters(trained, None, seed),
                 "guard_counts": find_clusters(letters, k, seed),
                 "guard_untrained": find_clusters(untrained, k, seed)}
        for arm, (size, layer, _) in found.items():
            rows += as_rows({"seed": seed, "arm": arm}, {"k": size, "best_layer": layer})

        for b in (1, 4) if small else BUDGETS:
            # without training: refuse what is nearest to an unwanted cluster, or to a labelled instruction
            labelled = [i for pool in case.pools for i in pool[:b]]
            known = [*labelled, *case.rehearsed]            # labelled first: see below
            layer = found["guard"][1]
            x = {split: states[layer] for split, states in trained.items()}
            refuse = {"base": {split: np.zeros(len(x[split]), bool) for split in x},
                      # refuse if the nearest known instruction is one of the first, the labelled ones
                      "nearest": {split: knn(x["train"][known], x[split], 1)[:, 0].numpy() < len(labelled)
                                  for split in x}}
            for arm, (_, _, clusters) in found.items():
                bad = unwanted_clusters(clusters["train"], case, labelled)
                refuse[arm] = {split: bad[numbers] for split, numbers in clusters.items()}
            for arm, marks in refuse.items():       # from instructions to instances
                refused = {split: marks[split][splits[split].state_of("instruction")] for split in marks}
                rows += outcome(case, arm, b, right, refused)

            # with training: learn to refuse the labelled instructions, or all in unwanted clusters
            members = np.flatnonzero(refuse["guard"]["train"])
            for arm, some in {"labels": labelled, "clusters": [*labelled, *members]}.items():
                data = make_refusals(case, {*some} - {*case.rehearsed})
                cfg = Config(**ALIGN | small, seed=seed, start=str(case.run),
                             out=f"{out}/seed{seed}/{arm}-{b}")
                model = load_model(run_arm(cfg, data), data)
                right_now = observe(model, data.splits["val"])[0]
                refused = {split: observe(model, data.splits[f"{split}_refused"])[0]
                           for split in ("val", "ood")}
                rows += outcome(case, arm, b, right_now, refused)
    return rows


def print_align(rows):
    """Print what each arm refuses and answers, and in how many seeds it beats its controls."""
    budgets = sorted({row["b"] for row in select(rows, measure="accuracy")})
    print_table(f"Shares of instances, labelled instructions per unwanted task: b = {budgets[0]}",
                select(rows, b=budgets[0]), "measure")
    for measure, title in MEASURED.items():
        print(f"{measure}: {title}")
    for measure in "refused_other", "accuracy":
        print_table(f"{measure}, by b", select(rows, measure=measure), "b")
    print_table("Number of clusters, and the layer they are found in", select(rows, b=None), "measure",
                digits=0)
    print()
    for b in budgets:
        other, right = (select(rows, b=b, measure=measure) for measure in ("refused_other", "accuracy"))
        print(f"b = {b}: `clusters` has a higher refused_other than `labels` in "
              f"{count_wins(other, 'clusters', 'labels')} seeds,\n    and an accuracy more than {TOLERANCE} "
              f"lower in {count_wins(right, 'labels', 'clusters', TOLERANCE)}")
        controls = "nearest", "guard_counts", "guard_untrained"
        print("    `guard` has a higher refused_other than " + ", ".join(
            f"`{control}` in {count_wins(other, 'guard', control)}" for control in controls) + " seeds")


def main():
    """Test a use of task clusters: pre-training or alignment."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("demo", choices=("pretrain", "align"))
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED",
                       help="every arm is run once per seed (default: 0 1 2)")
    flags.add_argument("--out", help="folder for the runs (default: runs/DEMO)")
    flags.add_argument("--quick", action="store_true", help="small networks, few steps, in runs/DEMO_quick")
    given = flags.parse_args()
    out = Path(given.out or f"runs/{given.demo}{'_quick' * given.quick}")
    demo = pretrain if given.demo == "pretrain" else align
    rows = demo(out, list(dict.fromkeys(given.seeds)), QUICK if given.quick else {})
    write_rows(out / "apply.jsonl", rows)
    print_pretrain(out, rows) if given.demo == "pretrain" else print_align(rows)
    print(f"\n{len(rows):,} rows in {out / 'apply.jsonl'}")


if __name__ == "__main__":
    command_line(main)
