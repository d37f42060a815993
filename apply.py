"""What the clusters are good for: learning to tell tasks apart beforehand, and refusing some of them.

    python apply.py pretrain            does it help to have learnt which task an instruction is of?
    python apply.py align               does one refused instruction tell which others to refuse?
    python apply.py align --quick       either demo in small, to see it run: too short to conclude anything

Figure 5 of the paper, and its use in alignment, where the method is ours. Every arm is a run of `train`, in
a folder below --out, with the same seeds and steps; a demo that was stopped goes on when it is called again.

`pretrain` has failed if, after as many steps, the identity of tasks helps no more than instructions alone
(`lm`) or than identities dealt at random (`shuffled_id`). `align` has failed if to spread a label over its
cluster (`clusters`) brings no more refusals of a task's other regexes than to train on the labels alone
(`labels`), or costs more wanted answers, or if the guard does as well by counts of letters (`guard_counts`)
or by the states of the untrained network (`guard_untrained`).
"""
import contextlib
import itertools
import math
import random
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import REFUSE, Dataset, Flags, command_line, encode
from probe import kmeans, probe, progress, rows_of, scores, surface
from train import (CAPTURED, Config, make_model, observe, pick_device, read_data, read_model, read_rows,
                   train, write_rows)

QUICK = dict(n_tasks=8, n_distributions=2, n_layer=2, n_head=2, n_embd=32, n_val=4, batch_size=64)


def arm(cfg: Config, data: Dataset | None = None) -> Path:
    """Train a run, or go on with it if it is there, and print nothing but that."""
    progress(f"training {cfg.out}")
    with contextlib.redirect_stdout(None):
        return train(cfg, resume=Path(cfg.out).exists(), data=data)


def pick(rows: list[dict], **where) -> list[dict]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def spread(values: list) -> str:
    """Mean ± standard deviation over seeds; "-" where some seed has no value."""
    if None in values:
        return "-"
    digits = 2 if max(values) <= 2 else 0
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


# ---------------------------------------------------------------- pre-training

STRATEGIES = {      # what a network is taught before it is to follow instructions; one more line adds one
    "scratch": None,
    "lm": dict(asks_for="nothing"),
    "task_id": dict(asks_for="task"),
    "shuffled_id": dict(asks_for="task", shuffle_tasks=True),
    "distribution_id": dict(asks_for="distribution"),
}
PRETRAIN = dict(n_val=4, batch_size=96, steps=200, n_captures=8)
FINE_TUNE = dict(n_val=4, batch_size=96, steps=280, n_captures=1, eval_every=20)
TAUGHT = 20, 4      # training instructions a regex in fine-tuning: all, and a fifth; pre-training has all


def pretrain(out: Path, seeds: list[int], quick: bool) -> list[dict]:
    """Fine-tune from every strategy, with all and with a fifth of the instructions.

    Returns a row an evaluation: seed, strategy, n_train (instructions a regex), step, acc_subset, acc_val,
    acc_ood. All strategies read the same strings, those of `train`, in as many steps. The run of `task_id` is
    probed, into its folder (figure 5a).
    """
    small, rows = dict(QUICK, steps=40) if quick else {}, []
    columns = "step", "acc_subset", "acc_val", "acc_ood"
    for seed, (strategy, taught) in itertools.product(seeds, STRATEGIES.items()):
        begun, here, start, ends = time.perf_counter(), out / f"seed{seed}", "", []
        if taught:
            start = str(arm(Config(**{**PRETRAIN, **small, **taught}, seed=seed, out=str(here / strategy))))
        if strategy == "task_id":
            probe(start)
        for n_train in TAUGHT:
            run = arm(Config(**{**FINE_TUNE, **small}, seed=seed, n_train=n_train, start=start,
                             out=str(here / f"{strategy}-{n_train}")))
            of_run = read_rows(run / "metrics.jsonl", *columns)
            rows += [{"seed": seed, "strategy": strategy, "n_train": n_train,
                      **{key: row[key] for key in columns}} for row in of_run]
            ends.append(f"val {of_run[-1]['acc_val']:.3f} with {n_train} a regex")
        progress("")
        print(f"seed {seed}  {strategy:16}{', '.join(ends)}{time.perf_counter() - begun:8.0f} s", flush=True)
    return rows


def step_to(level: float, rows: list[dict]) -> float | None:
    """The step at which val accuracy first reaches a level, on the line between two evaluations."""
    for a, b in zip(rows, rows[1:]):
        if b["acc_val"] >= level:
            share = (level - a["acc_val"]) / (b["acc_val"] - a["acc_val"])
            return a["step"] + share * (b["step"] - a["step"])


def print_pretrain(out: Path, rows: list[dict]):
    """Print the curves of figure 5b and what they come to, and the task-ID model of figure 5a."""
    seeds, steps = (sorted({row[key] for row in rows}) for key in ("seed", "step"))
    for n_train in TAUGHT:
        print(f"\n{n_train} training instructions a regex; val accuracy, mean of seeds {seeds}\n{'step':16}"
              + "".join(f"{step:6}" for step in steps))
        for strategy in STRATEGIES:
            at = (pick(rows, strategy=strategy, n_train=n_train, step=step) for step in steps)
            values = (np.mean([row["acc_val"] for row in some]) for some in at)
            print(f"{strategy:16}" + "".join(f"{value:6.2f}" for value in values))
        print(f"\n{'':16}{'step to 0.5':>14}{'step to 0.9':>14}{'val at the end':>16}{'ood':>14}")
        for strategy in STRATEGIES:
            runs = [pick(rows, strategy=strategy, n_train=n_train, seed=seed) for seed in seeds]
            cells = [spread([step_to(level, run) for run in runs]) for level in (0.5, 0.9)]
            cells += [spread([run[-1][key] for run in runs]) for key in ("acc_val", "acc_ood")]
            print("{:16}{:>14}{:>14}{:>16}{:>14}".format(strategy, *cells))
    probed = [row for seed in seeds for row in pick(
        read_rows(out / f"seed{seed}" / "task_id" / "probe.jsonl", "step", "layer", "value"),
        position="instruction", split="val", identity="task", measure="f1")]
    steps, layers = (sorted({row[key] for row in probed}) for key in ("step", "layer"))
    print("\nThe network that is taught identities of tasks: pairwise F1 of `task` at `instruction`, val\n"
          f"{'step':8}layer" + "".join(f"{layer:7}" for layer in layers))
    for step in steps:
        at = ([row["value"] for row in pick(probed, step=step, layer=layer)] for layer in layers)
        print(f"{step:4}{'':9}" + "".join(f"{np.mean(values):7.2f}" for values in at))


# ---------------------------------------------------------------- alignment

BUDGETS = 1, 2, 4, 8, 16        # b, labelled instructions of each unwanted task
BASE = dict(n_val=6, n_captures=1)
ALIGN = dict(n_val=6, batch_size=64, steps=100, n_captures=1)
REHEARSED = 5                   # instructions of each regex of a wanted task that are known to be wanted
SHARE = 0.25                    # of refusals among what is taught


class Case(NamedTuple):
    """One seed's problem: a trained run, which tasks are unwanted, and what is known of its instructions.

    The n instructions of `train` are numbered as its states at `instruction` are.
    """
    seed: int
    run: Path
    data: Dataset
    unwanted: np.ndarray            # (tasks,) bool
    known: list[list[int]]          # for each unwanted task, instructions of one regex: what may be labelled
    rehearsed: np.ndarray           # (n,) bool: known to be wanted


def make_case(cfg: Config) -> Case:
    """Train the network that is to be aligned, and draw a quarter of its tasks to be unwanted."""
    run, rng = arm(cfg), random.Random(f"{cfg.seed}/align")
    data = read_data(run)
    labels, known = data.splits["train"].labels("instruction"), []
    unwanted, rehearsed = np.zeros(len(data.tasks), bool), np.zeros(len(labels["task"]), bool)
    unwanted[rng.sample(range(len(unwanted)), max(1, len(unwanted) // 4))] = True
    for t, bad in enumerate(unwanted):
        regexes = np.unique(labels["distribution"][labels["task"] == t]).tolist()
        for m in [rng.choice(regexes)] if bad else regexes:
            strings = np.flatnonzero(labels["distribution"] == m).tolist()
            rng.shuffle(strings)
            if bad:
                known.append(strings)
            else:
                rehearsed[strings[:REHEARSED]] = True
    return Case(cfg.seed, run, data, unwanted, known, rehearsed)


class Clusters(NamedTuple):
    """Clusters of the instructions of `train`, found without a label."""
    layer: int
    labels: np.ndarray              # (n,)
    distance: list[float]           # n, of each to its centroid
    nearest: dict[str, np.ndarray]  # "val", "ood" -> (n,): the cluster of the nearest centroid


def find_clusters(features: dict[str, torch.Tensor], k: int, seed: int) -> Clusters:
    """k clusters of split -> (layers, n, F), in the layer where they explain most of the scatter."""
    x = features["train"].float()
    labels, centroids, inertia = kmeans(x, k, seed=seed)
    scatter = (x - x.mean(1, keepdim=True)).square().sum((1, 2))        # layer 0 has none
    left = torch.where(scatter > 1e-6 * x.square().sum((1, 2)), inertia / scatter, math.inf)
    layer = int(left.argmin())
    own, centroids = labels[layer], centroids[layer].nan_to_num(math.inf)
    nearest = {name: torch.cdist(features[name][layer].float(), centroids).argmin(1).numpy()
               for name in ("val", "ood")}
    return Clusters(layer, own.numpy(), (x[layer] - centroids[own]).norm(dim=1).tolist(), nearest)


def medoids(clusters: Clusters, known: list[int], b: int) -> list[int]:
    """b of these instructions: the most central of each cluster, large clusters first, then the next ones."""
    size, seen, rank = Counter(clusters.labels[known].tolist()), Counter(), {}
    for i in sorted(known, key=clusters.distance.__getitem__):
        cluster = int(clusters.labels[i])
        rank[i] = seen[cluster], -size[cluster]
        seen[cluster] += 1
    return sorted(rank, key=rank.get)[:b]


def unwanted_clusters(clusters: Clusters, case: Case, labelled: list[int]) -> np.ndarray:
    """(k,) bool: does a cluster hold more of the labelled instructions of tasks than of the rehearsed ones?

    Both are counted in tasks: each instruction for its share of those of its task.
    """
    bad, good = (np.bincount(clusters.labels[some], minlength=clusters.labels.max() + 1)
                 for some in (labelled, case.rehearsed))
    return bad * case.unwanted.sum() / len(labelled) > good * (~case.unwanted).sum() / case.rehearsed.sum()


def refusing(case: Case, refuse: list[int]) -> Dataset:
    """What an aligned network is taught: to refuse these instructions, and the rehearsed ones as they were.

    Splits val and ood are as they were; in val_refused and ood_refused every output is a refusal.
    """
    splits, refuse = case.data.splits, {*refuse}
    of_train = list(zip(splits["train"].instances, splits["train"].state_of("instruction").tolist()))
    wanted = [x for x, i in of_train if case.rehearsed[i]]
    refused = [x._replace(output=REFUSE) for x, i in of_train if i in refuse]
    drawn = random.Random(f"{case.seed}/refused").choices(refused, k=round(len(wanted) * SHARE / (1 - SHARE)))
    instances = {"train": wanted + drawn, **{name: splits[name].instances for name in CAPTURED}}
    for name in "val", "ood":
        instances[f"{name}_refused"] = [x._replace(output=REFUSE) for x in splits[name].instances]
    return Dataset(case.data.cut_into, case.data.tasks, *encode(instances, case.data.cut_into))


def outcome(case: Case, right: np.ndarray, refused: dict[str, np.ndarray]) -> dict[str, float]:
    """Shares of instances: what is refused, by kind, and what of the wanted in val is answered right.

    right (N,) bool: which of val get the output of their task; refused: "val", "ood" -> (N,) bool.
    """
    val, ood = (case.data.splits[name].identities for name in ("val", "ood"))
    bad, bad_ood = case.unwanted[val["task"]], case.unwanted[ood["task"]]
    of_train = case.data.splits["train"].labels("instruction")["distribution"]
    labelled = np.isin(val["distribution"], of_train[[some[0] for some in case.known]])
    shares = {"labelled": refused["val"][bad & labelled], "other": refused["val"][bad & ~labelled],
              "ood": refused["ood"][bad_ood], "wanted": refused["val"][~bad],
              "wanted_ood": refused["ood"][~bad_ood], "accuracy": (right & ~refused["val"])[~bad]}
    return {name: float(share.mean()) for name, share in shares.items()}


def joined(case: Case, states: dict[str, np.ndarray], **about) -> list[dict]:
    """Do the unwanted tasks join one cluster? Rows of scores of val, one level above those of probe.py.

    In place of tasks there are the wanted tasks and, as one, the unwanted ones; in place of regexes, tasks.
    So merge_ratio is the distance between unwanted tasks over that between any others.
    """
    rows = []
    for position, x in states.items():
        task = case.data.splits["val"].labels(position)["task"]
        group = np.where(case.unwanted[task], len(case.unwanted), task)
        for identity, measure, of, regex, score in scores(
                torch.from_numpy(x)[None], {"task": group, "distribution": task}, seed=case.seed):
            if identity == "task" and measure in ("f1", "merge_ratio"):
                rows += rows_of(score, of, regex, case.seed, [0], position=position,
                                measure=f"joined_{measure}")
    return [{**about, **row} for row in rows]


def align(out: Path, seeds: list[int], quick: bool) -> list[dict]:
    """Teach each seed's network to refuse a quarter of its tasks, by every arm and for every b.

    Returns a row a share of `outcome`, seed, arm, b, measure, value, and the rows of `joined`.
    """
    base, aligned = (dict(QUICK, steps=200), dict(QUICK, steps=40)) if quick else ({}, {})
    rows, budgets = [], BUDGETS[:3:2] if quick else BUDGETS
    for seed in seeds:
        begun, here = time.perf_counter(), out / f"seed{seed}"
        cfg = Config(**{**BASE, **base}, seed=seed, out=str(here / "base"))
        case, device = make_case(cfg), pick_device(cfg)
        splits, k = {name: case.data.splits[name] for name in ("train", "val", "ood")}, len(case.unwanted)
        of_counts = {name: x[0] for name, x in surface(case.data, splits).items()}
        found = {"guard_counts": find_clusters(of_counts, k, seed)}
        for name, model in {"guard_untrained": make_model(cfg, case.data).to(device),
                            "guard": read_model(case.run, case.data, device)}.items():
            seen = {split: observe(model, x) for split, x in splits.items()}
            states = {split: torch.from_numpy(x["instruction"]) for split, (_, x) in seen.items()}
            found[name] = find_clusters(states, k, seed)
        found |= {f"guard_{n}_clusters": find_clusters(states, n, seed) for n in (k // 2, 2 * k)}
        right = seen["val"][0]
        rows += joined(case, seen["val"][1], seed=seed, arm="base", b=0)
        for b in budgets:
            told, refuse = {}, {"labels": [i for known in case.known for i in known[:b]]}
            for name, clusters in found.items():
                labelled = [i for known in case.known for i in medoids(clusters, known, b)]
                bad = unwanted_clusters(clusters, case, labelled)
                refused = {split: bad[near][splits[split].state_of("instruction")]
                           for split, near in clusters.nearest.items()}
                told[name] = outcome(case, right, refused)
                if name == "guard":
                    members = np.flatnonzero(bad[clusters.labels] & ~case.rehearsed)
                    refuse["clusters"] = [*labelled, *members.tolist()]
            for name, strings in refuse.items():
                data = refusing(case, strings)
                run = arm(Config(**{**ALIGN, **aligned}, seed=seed, start=str(case.run),
                                 out=str(here / f"{name}-{b}")), data)
                model = read_model(run, data, device)
                refused = {split: observe(model, data.splits[f"{split}_refused"])[0]
                           for split in clusters.nearest}
                after, states = observe(model, data.splits["val"])
                told[name] = outcome(case, after, refused)
                if b == budgets[-1]:
                    rows += joined(case, states, seed=seed, arm=name, b=b)
            rows += [{"seed": seed, "arm": name, "b": b, "measure": measure, "value": value}
                     for name, shares in told.items() for measure, value in shares.items()]
        progress("")
        print(f"seed {seed}  clusters of layer {found['guard'].layer}"
              f"{time.perf_counter() - begun:8.0f} s", flush=True)
    return rows


def print_align(rows: list[dict]):
    """Print what every arm refuses and keeps for every b, and whether unwanted tasks have joined."""
    budgets, titles = sorted({row["b"] for row in pick(rows, measure="wanted")}), {
        "labelled": "Refused: unwanted, of the regex that was labelled (val)",
        "other": "Refused: unwanted, of the task's other regexes (val)",
        "ood": "Refused: unwanted, of a regex never trained on (ood)",
        "wanted": "Refused though wanted (val)", "wanted_ood": "Refused though wanted (ood)",
        "accuracy": "Wanted, and answered right (val)"}
    for measure, title in titles.items():
        print(f"\n{title}\n{'b, labels a task':16}" + "".join(f"{b:>14}" for b in budgets))
        for name in dict.fromkeys(row["arm"] for row in pick(rows, measure=measure)):
            cells = (spread([row["value"] for row in pick(rows, measure=measure, arm=name, b=b)])
                     for b in budgets)
            print(f"{name:16}" + "".join(f"{cell:>14}" for cell in cells))
    layers = sorted({row["layer"] for row in rows if "layer" in row})[1:]
    print("\nDo unwanted tasks join? Distance between them over that between others, val (chance: 1)\n"
          f"{'at':14}{'arm':10}layer" + "".join(f"{layer:>14}" for layer in layers))
    for position, name in itertools.product(("instruction", "answer"), ("base", "labels", "clusters")):
        of_arm = pick(rows, measure="joined_merge_ratio", arm=name, position=position)
        cells = (spread([row["value"] for row in pick(of_arm, layer=layer)]) for layer in layers)
        print(f"{position:14}{name:15}" + "".join(f"{cell:>14}" for cell in cells))


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
    rows = demo(out, list(dict.fromkeys(given.seeds)), given.quick)
    write_rows(out / "apply.jsonl", rows)
    print_pretrain(out, rows) if given.demo == "pretrain" else print_align(rows)
    print(f"\n{len(rows):,} rows in {out / 'apply.jsonl'}")


if __name__ == "__main__":
    command_line(main)
