"""Two uses of clusters by task, each beside controls that could show them useless.

    python apply.py pretrain            does it help to learn the names of tasks first?
    python apply.py align               do a few labelled instructions tell which others to refuse?
    python apply.py pretrain --quick    a small version of either, too short to conclude from

`pretrain` is figure 5 of the paper; how `align` refuses is our choice. Every network is a run of train.py
below --out, and those that are compared have the same seed and number of steps. A demo that was stopped goes
on when it is called again. Finished runs are used again: after a change of the code, delete --out.

pretrain: a network is first taught
    scratch             nothing
    lm                  to read instructions, without inputs and outputs
    task_id             to read instructions and inputs, and to name the task in place of the output
    shuffled_id         the same, but each instruction gets a random task
and then the tasks. This fails if task_id does not reach accuracy 0.5 on val in fewer steps than each of the
others in every seed.

align: a network shall refuse a quarter of its tasks. Of each, b instructions of one regex are labelled as
unwanted. Of the other tasks, REHEARSED instructions of each regex are known to be wanted.
    labels              train it to refuse the labelled instructions
    clusters            train it to refuse all instructions in unwanted clusters of its states
    guard               do not train it, refuse what is nearest to an unwanted cluster
    guard_half          the same, with half as many clusters as tasks; guard_twice: twice as many
    guard_auto          the same, with as many clusters as the silhouette suggests
    guard_counts        the same, with clusters of counts of letters and bigrams
    guard_untrained     the same, with clusters of an untrained network's states
    nearest             do not train it, refuse what is nearer to a labelled than to any wanted instruction
A clustering is done in the layer where its silhouette is best.
`clusters` fails if it refuses no more of the unwanted tasks' other regexes than `labels`, or loses more than
TOLERANCE of the wanted answers against it. `guard` fails if it refuses no more of these regexes than
`nearest`, `guard_counts` and `guard_untrained`. Either has to succeed in every seed.
"""
import contextlib
import math
import random
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from data import Dataset, Flags, command_line, encode

import numpy as np
import torch                # after data, which sets how torch's threads wait

from probe import choose_k, kmeans, knn, probe, silhouette, surface
from train import (CAPTURED, Config, make_model, observe, pick_device, read_data, load_model, read_rows,
                   train, write_rows)

QUICK = dict(n_tasks=8, n_distributions=2, n_layer=2, n_head=2, n_embd=32, n_val=4, batch_size=64, steps=200)


def run_arm(cfg, data=None):
    """Train a run, or go on with it if it is there, and print one line in place of what `train` prints."""
    print(f"training {cfg.out}", flush=True)
    with contextlib.redirect_stdout(None):
        return train(cfg, resume=Path(cfg.out, "config.json").exists(), data=data)


def as_rows(about, numbers):
    """One row for each item of numbers, measure -> value."""
    return [{**about, "measure": measure, "value": value} for measure, value in numbers.items()]


def spread(values):
    """Mean ± standard deviation over seeds; "-" where some seed has no value."""
    if None in values:
        return "-"
    digits = 2 if max(values) <= 2 else 0               # shares, or steps
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def select(rows, **where):
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def print_table(title, rows, across):
    """Print `spread` over seeds: a line per arm, a column for each value of `across`."""
    cells = defaultdict(list)
    for row in rows:
        cells[row["arm"], row[across]].append(row["value"])
    arms, columns = (dict.fromkeys(names) for names in zip(*cells))
    print(f"\n{title}\n{'':16}" + "".join(f"{column!s:>19}" for column in columns))
    for arm in arms:
        print(f"{arm:16}" + "".join(f"{spread(cells.get((arm, column), [None])):>19}" for column in columns))


def count_wins(rows, one, other, margin=0):
    """Say in how many seeds, "k of n", arm `one` is above arm `other` by more than a margin.

    The value None, a level that was never reached, counts as infinite.
    """
    values = {(row["arm"], row["seed"]): math.inf if row["value"] is None else row["value"] for row in rows}
    seeds = {seed for _, seed in values}
    wins = [seed for seed in seeds if values[one, seed] > values[other, seed] + margin]
    return f"{len(wins)} of {len(seeds)}"


# ---------------------------------------------------------------- pre-training

STRATEGIES = {      # what a network is taught first; one more line adds one, its name in plot.py draws it
    "scratch": None,
    "lm": dict(asks_for="nothing"),
    "task_id": dict(asks_for="task"),
    "shuffled_id": dict(asks_for="task", shuffle_tasks=True),
}
TUNED = dict(n_val=4, batch_size=96, lr=0.012, muon_lr=0.08)       # on seeds 10 to 14, the same for all
PRETRAIN = dict(TUNED, steps=160, n_captures=6)
FINE_TUNE = dict(TUNED, steps=240, n_captures=11)
N_TRAIN = 20, 4     # training instructions per regex, in pre-training and in fine-tuning: many, and a few


def pretrain(out, seeds, small):
    """Pre-train by every strategy, then teach the tasks; once with many and once with few instructions.

    All strategies read the same instructions in as many steps. The run of task_id with many instructions is
    probed, too (figure 5a). Returns rows: seed, arm (the strategy), n_train, measure, value; of the learning
    curves also step. small: knobs of a small demo, or {}.
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
    """The step at which val accuracy reaches a level, interpolated between evaluations; None if never."""
    before = curve[0]
    for row in curve:
        if row["acc_val"] >= level:
            rise = max(row["acc_val"] - before["acc_val"], 1e-9)
            return row["step"] - (row["acc_val"] - level) / rise * (row["step"] - before["step"])
        before = row


def print_pretrain(out, rows):
    """Print what figure 5b comes to, whether task_id is sooner than the others, and figure 5a in short."""
    for n in N_TRAIN:
        ends = select(rows, n_train=n, step=None)
        print_table(f"Taught the tasks with {n} instructions per regex", ends, "measure")
        for level in "step to 0.5", "step to 0.9":
            steps = select(ends, measure=level)
            wins = (f"{other} in {count_wins(steps, other, 'task_id')}"
                    for other in STRATEGIES if other != "task_id")
            print(f"{level}: task_id is sooner than {', '.join(wins)} seeds")
    probed = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        probed += read_rows(f"{out}/seed{seed}/task_id-{N_TRAIN[0]}-first/probe.jsonl")
    f1 = select(probed, split="val", view="raw", identity="task", measure="f1", step=probed[-1]["step"])
    print_table("Once it can name tasks: pairwise F1 of task on val, by layer",
                [{**row, "arm": row["position"]} for row in f1], "layer")


# ---------------------------------------------------------------- alignment

REFUSE = "<refuse>"             # the output that means a refusal
BUDGETS = 1, 2, 4, 8, 16        # b, labelled instructions of each unwanted task
BASE = dict(n_val=6, n_captures=1)
ALIGN = dict(n_val=6, batch_size=64, steps=200, n_captures=1, lr=7.5e-4, muon_lr=0.005)   # seeds 10 to 14
REHEARSED = 5                   # instructions per regex of a wanted task, known to be wanted
TOLERANCE = 0.01                # share of the wanted answers that `clusters` may lose against `labels`
MEASURED = {                    # shares of instances that are refused, or answered right
    "refused_labelled": "unwanted, of the regex that was labelled (val)",
    "refused_other": "unwanted, of the task's other regexes (val)",
    "refused_ood": "unwanted, of a regex never trained on (ood)",
    "refused_wanted": "wanted (val)",
    "refused_wanted_ood": "wanted (ood)",
    "accuracy": "wanted, and answered right (val)"}


class Case(NamedTuple):
    """One seed's problem: a trained network, which tasks are unwanted, and what is known beforehand.

    Instruction i is row i of the states of `train` at `instruction`.
    """
    seed: int
    run: Path
    data: Dataset
    unwanted: list              # tasks
    pools: list                 # for each of them, the instructions of one regex: these may be labelled
    rehearsed: list             # instructions of the wanted tasks that are known to be wanted


def make_case(cfg):
    """Train the network that is to be aligned, and draw a quarter of its tasks to be unwanted."""
    run = run_arm(cfg)
    data = read_data(run)
    unwanted = random.Random(f"{cfg.seed}/unwanted").sample(range(cfg.n_tasks), cfg.n_tasks // 4)
    ids = data.splits["train"].labels("instruction")
    pools = []
    rehearsed = []
    for t in range(cfg.n_tasks):
        # the instructions of each regex; they were drawn in random order, so the first ones are a sample
        regexes = [np.flatnonzero(ids["distribution"] == regex).tolist()
                   for regex in np.unique(ids["distribution"][ids["task"] == t])]
        if t in unwanted:
            pools.append(regexes[0])
        else:
            rehearsed += [i for members in regexes for i in members[:REHEARSED]]
    return Case(cfg.seed, run, data, unwanted, pools, rehearsed)


def find_clusters(states, k, seed):
    """k-means on the states of `train`, in the layer that gives the best silhouette.

    states: split -> (layers, n, C); k None: the choice of choose_k in each layer. Returns k, the layer, and
    split -> (n,), the number of the nearest centroid.
    """
    best = -1
    for layer, x in enumerate(states["train"]):
        labels, found, _ = kmeans(x, k or choose_k(x), seed=seed)
        score = silhouette(x, labels)
        if score > best:
            best, chosen = score, layer
            centroids = found[found.isfinite().all(1)]          # an empty cluster has none
    nearest = {split: knn(centroids, x[chosen], 1)[:, 0].numpy() for split, x in states.items()}
    return len(centroids), chosen, nearest


def unwanted_clusters(clusters, case, labelled):
    """(k,) bool: which clusters hold more of the unwanted tasks than of the wanted ones, as far as known?

    clusters (n,) of `train`. A task counts as 1, shared out over those of its instructions that are known.
    """
    k = clusters.max() + 1
    bad = np.bincount(clusters[labelled], minlength=k)
    good = np.bincount(clusters[case.rehearsed], minlength=k)
    n_bad = len(case.unwanted)
    n_good = len(case.data.tasks) - n_bad
    return bad * n_bad / bad.sum() > good * n_good / good.sum()


def make_refusals(case, refuse):
    """The Dataset that teaches to refuse a set of instructions and to answer the rehearsed ones.

    The other splits are as they were; in val_refused and ood_refused every output is a refusal.
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
    instances = {"train": wanted + sorted(drawn)}           # encode wants those of an instruction adjacent
    instances |= {name: case.data.splits[name].instances for name in CAPTURED}
    for name in "val", "ood":
        instances[f"{name}_refused"] = [x._replace(output=REFUSE) for x in instances[name]]
    return Dataset(case.data.cut_into, case.data.tasks, *encode(instances, case.data.cut_into))


def outcome(case, arm, b, right, refused):
    """Rows of MEASURED: what shares of instances an arm refuses, and of the wanted ones answers right.

    right (N,) bool: which of val are answered right if not refused; refused: "val", "ood" -> (N,) bool.
    """
    val, ood = (case.data.splits[name].identities for name in ("val", "ood"))
    regex = case.data.splits["train"].labels("instruction")["distribution"]
    labelled = np.isin(val["distribution"], regex[[pool[0] for pool in case.pools]])
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
    """Make each seed's network refuse a quarter of its tasks, by every arm and for every b.

    Returns rows: seed, arm, b, measure (of MEASURED), value; and of the arms that cluster, k and best_layer.
    Arm `base` is the network as it was. small: knobs of a small demo, or {}.
    """
    rows = []
    for seed in seeds:
        cfg = Config(**BASE | small, seed=seed, out=f"{out}/seed{seed}/base")
        case = make_case(cfg)
        splits = {name: case.data.splits[name] for name in ("train", "val", "ood")}

        # cluster instructions by the states of the network and of an untrained one, and by their letters
        base = load_model(case.run, case.data)
        right = observe(base, splits["val"])[0]
        other = make_model(cfg, case.data).to(pick_device())
        trained, untrained = ({name: torch.from_numpy(observe(model, split)[1]["instruction"]).double()
                               for name, split in splits.items()} for model in (base, other))
        texts = {name: [split.instances[i].instruction for i in split.positions["instruction"][0]]
                 for name, split in splits.items()}
        letters = {name: counts[None] for name, counts in surface(texts).items()}
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
            # without training: refuse what is in an unwanted cluster, or nearest to a labelled instruction
            labelled = [i for pool in case.pools for i in pool[:b]]
            known = [*labelled, *case.rehearsed]
            layer = found["guard"][1]
            x = {split: states[layer] for split, states in trained.items()}
            refuse = {"base": {split: np.zeros(len(x[split]), bool) for split in x},
                      "nearest": {split: knn(x["train"][known], x[split], 1)[:, 0].numpy() < len(labelled)
                                  for split in x}}
            for arm, (_, _, nearest) in found.items():
                bad = unwanted_clusters(nearest["train"], case, labelled)
                refuse[arm] = {split: bad[clusters] for split, clusters in nearest.items()}
            for arm, of in refuse.items():
                refused = {split: of[split][splits[split].state_of("instruction")] for split in of}
                rows += outcome(case, arm, b, right, refused)

            # with training: refuse what is labelled, or all that is in an unwanted cluster
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
    """Print what every arm refuses and keeps, and in how many seeds it does so better than its controls."""
    budgets = sorted({row["b"] for row in select(rows, measure="accuracy")})
    print_table(f"Shares of instances with b = {budgets[0]} labelled instructions per unwanted task",
                select(rows, b=budgets[0]), "measure")
    for measure, title in MEASURED.items():
        print(f"{measure}: {title}")
    for measure in "refused_other", "accuracy":
        print_table(f"{measure}, by b", select(rows, measure=measure), "b")
    print_table("Clusters, and the layer they are found in", select(rows, b=None), "measure")
    print()
    for b in budgets:
        other, right = (select(rows, b=b, measure=measure) for measure in ("refused_other", "accuracy"))
        print(f"b = {b}: `clusters` refuses more of the other regexes than `labels` in "
              f"{count_wins(other, 'clusters', 'labels')} seeds,\n    and loses over {TOLERANCE} of the "
              f"wanted answers against it in {count_wins(right, 'labels', 'clusters', TOLERANCE)}")
        controls = "nearest", "guard_counts", "guard_untrained"
        print("    `guard` refuses more of them than " + ", ".join(
            f"`{control}` in {count_wins(other, 'guard', control)}" for control in controls) + " seeds")


def main():
    """Show what clusters are good for: in pre-training, or in alignment."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("demo", choices=("pretrain", "align"))
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED",
                       help="each is a run of every arm (default: 0 1 2)")
    flags.add_argument("--out", help="folder of the arms' runs (default: runs/DEMO)")
    flags.add_argument("--quick", action="store_true", help="small networks, few steps, into runs/DEMO_quick")
    given = flags.parse_args()
    out = Path(given.out or f"runs/{given.demo}{'_quick' * given.quick}")
    demo = pretrain if given.demo == "pretrain" else align
    rows = demo(out, list(dict.fromkeys(given.seeds)), QUICK if given.quick else {})
    write_rows(out / "apply.jsonl", rows)
    print_pretrain(out, rows) if given.demo == "pretrain" else print_align(rows)
    print(f"\n{len(rows):,} rows in {out / 'apply.jsonl'}")


if __name__ == "__main__":
    command_line(main)
