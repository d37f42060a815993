"""What clusters are good for: to have learnt which task an instruction is of, and to refuse some tasks.

    python apply.py pretrain            does it help to have learnt which task an instruction is of?
    python apply.py align               do a few refused instructions tell which others to refuse?
    python apply.py align --quick       either demo in small, to see it run: too short to conclude anything

Figure 5 of the paper, and alignment by clusters, where the method is ours. All that is trained is a run of
`train` below --out; runs that are compared have the same seeds and steps. A demo that was stopped goes on
when it is called again; a run that is there is not trained anew: after a change of this file, delete --out.

`pretrain` has failed if to have learnt the identity of tasks (`task_id`) does not lower the step to 0.5 below
that of instructions alone (`lm`) and of identities dealt at random (`shuffled_id`), beyond what seeds differ.

An arm of `align` is one way to refuse: to train on the labelled instructions (`labels`) or on all of their
clusters (`clusters`), or not to train but to refuse what is nearest to an unwanted cluster (`guard`; with
another number of clusters, by counts of letters, by an untrained network). It has failed if `clusters` brings
no more refusals of the other regexes of a task than `labels`, or costs wanted answers, or if `guard` refuses
no more of them than `guard_counts` and `guard_untrained`.
"""
import contextlib
import itertools
import math
import random
import time
from pathlib import Path
from typing import NamedTuple

from data import Dataset, Flags, command_line, encode

import numpy as np
import torch                # after data, which sets how torch's threads wait

from probe import kmeans, probe, score_states, surface
from train import (CAPTURED, Config, make_model, observe, pick_device, read_data, load_model, read_rows,
                   train, write_rows)

QUICK = dict(n_tasks=8, n_distributions=2, n_layer=2, n_head=2, n_embd=32, n_val=4, batch_size=64, steps=40,
             lr=0.006, muon_lr=0.04)


def arm(cfg: Config, data: Dataset | None = None) -> Path:
    """Train a run, or go on with it if it is there; a line stands in for what `train` prints."""
    print(f"training {cfg.out}", flush=True)
    with contextlib.redirect_stdout(None):
        return train(cfg, resume=(Path(cfg.out) / "config.json").exists(), data=data)


def done(seed: int, what: str, begun: float):
    """Say that a part of a demo is done, and how long it took."""
    print(f"seed {seed}: {what} done in {time.perf_counter() - begun:.0f} s", flush=True)


def spread(values: list) -> str:
    """Mean ± standard deviation over seeds; "-" where some seed has no value."""
    if None in values:
        return "-"
    digits = 2 if max(values) <= 2 else 0               # shares, or steps
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def table(title: str, rows: list[dict], down: str, across: str, **where):
    """Print `spread` of the rows that have these values: a line for each `down`, a cell for each `across`."""
    cells = {}
    for row in rows:
        if all(row.get(key) == value for key, value in where.items()):
            cells.setdefault(row[down], {}).setdefault(row[across], []).append(row["value"])
    columns = dict.fromkeys(column for line in cells.values() for column in line)
    print(f"\n{title}\n{down + ' / ' + across:18}" + "".join(f"{column!s:>16}" for column in columns))
    for name, line in cells.items():
        print(f"{name!s:18}" + "".join(f"{spread(line.get(column, [None])):>16}" for column in columns))


# ---------------------------------------------------------------- pre-training

STRATEGIES = {      # what a network is taught before it is taught to answer; one more line adds one
    "scratch": None,
    "lm": dict(asks_for="nothing"),
    "task_id": dict(asks_for="task"),
    "shuffled_id": dict(asks_for="task", shuffle_tasks=True),
    "distribution_id": dict(asks_for="distribution"),
}
TUNED = dict(n_val=4, batch_size=96, lr=0.012, muon_lr=0.08)       # for every strategy; README tells how
PRETRAIN = dict(TUNED, steps=160, n_captures=8)
FINE_TUNE = dict(TUNED, steps=240, n_captures=16)
TAUGHT = 20, 4      # training instructions a regex in fine-tuning: all, and a fifth; pre-training has all


def pretrain(out: Path, seeds: list[int], small: dict) -> list[dict]:
    """Pre-train by every strategy, then teach the tasks with all and with a fifth of the instructions.

    Returns rows: seed, strategy, n_train (instructions a regex), measure, value; of the curves also step. All
    strategies read the same instructions, those of `train`, in as many steps; `lm` reads no inputs, the
    others learn an identity in place of the output. The run of `task_id` is probed, into its folder (figure
    5a). `small`: knobs of a small demo, or {}.
    """
    rows = []
    for seed, (strategy, taught) in itertools.product(seeds, STRATEGIES.items()):
        begun, here, start = time.perf_counter(), out / f"seed{seed}", ""
        if taught is not None:
            start = str(arm(Config(**{**PRETRAIN, **small, **taught}, seed=seed, n_train=TAUGHT[0],
                                   out=str(here / strategy))))
        if strategy == "task_id" and not (Path(start) / "probe.jsonl").exists():
            probe(start)
        for n_train in TAUGHT:
            run = arm(Config(**{**FINE_TUNE, **small}, seed=seed, n_train=n_train, start=start,
                             out=str(here / f"{strategy}-{n_train}")))
            curve = read_rows(run / "metrics.jsonl")
            about = {"seed": seed, "strategy": strategy, "n_train": n_train}
            rows += [{**about, "step": row["step"], "measure": key, "value": row[key]}
                     for row in curve for key in ("acc_val", "acc_ood")]
            rows += [{**about, "measure": name, "value": value} for name, value in {
                "step to 0.5": step_to(0.5, curve), "step to 0.9": step_to(0.9, curve),
                "val at the end": curve[-1]["acc_val"], "ood at the end": curve[-1]["acc_ood"]}.items()]
        done(seed, strategy, begun)
    return rows


def step_to(level: float, curve: list[dict]) -> float | None:
    """The step at which val accuracy reaches a level, on the line between evaluations; None if never."""
    if curve[0]["acc_val"] >= level:
        return curve[0]["step"]
    for a, b in zip(curve, curve[1:]):
        if a["acc_val"] < level <= b["acc_val"]:
            share = (level - a["acc_val"]) / (b["acc_val"] - a["acc_val"])
            return a["step"] + share * (b["step"] - a["step"])


def print_pretrain(out: Path, rows: list[dict]):
    """Print the curves of figure 5b and what they come to, and the task-ID model of figure 5a."""
    for n in TAUGHT:
        table(f"Taught with {n} instructions a regex: val accuracy", rows, "step", "strategy", n_train=n,
              measure="acc_val")
        table("What that comes to", rows, "strategy", "measure", n_train=n, step=None)
    probed = [row for seed in dict.fromkeys(row["seed"] for row in rows)
              for row in read_rows(out / f"seed{seed}" / "task_id" / "probe.jsonl")]
    for position in "instruction", "answer":
        table(f"`task_id` in pre-training: pairwise F1 of `task` at `{position}`, val", probed, "step",
              "layer", position=position, split="val", identity="task", measure="f1", view="raw")


# ---------------------------------------------------------------- alignment

REFUSE = "<refuse>"             # the output that is taught
BUDGETS = 1, 2, 4, 8, 16        # b, labelled instructions of each unwanted task
BASE = dict(n_val=6, n_captures=1)
ALIGN = dict(n_val=6, batch_size=64, steps=200, n_captures=1, lr=7.5e-4, muon_lr=0.005)   # tuned like TUNED
REHEARSED = 5                   # instructions of each regex of a wanted task that are known to be wanted
SHARE = 0.5                     # of refusals among what is taught
MEASURED = {        # what `outcome` measures; shares of instances
    "refused_labelled": "Refused: unwanted, of the regex that was labelled (val)",
    "refused_other": "Refused: unwanted, of the task's other regexes (val)",
    "refused_ood": "Refused: unwanted, of a regex never trained on (ood)",
    "refused_wanted": "Refused though wanted (val)",
    "refused_wanted_ood": "Refused though wanted (ood)",
    "accuracy": "Wanted, and answered right (val)"}


class Case(NamedTuple):
    """One seed's problem: a trained run, which tasks are unwanted, and what is known of its instructions.

    The n instructions of `train` are numbered as its states at `instruction` are.
    """
    seed: int
    run: Path
    data: Dataset
    unwanted: np.ndarray            # (tasks,) bool
    pools: list[list[int]]          # what may be labelled: one regex of each unwanted task, in random order
    rehearsed: np.ndarray           # (n,) bool: known to be wanted


def make_case(cfg: Config) -> Case:
    """Train the network that is to be aligned, and draw a quarter of its tasks to be unwanted."""
    run, rng = arm(cfg), random.Random(f"{cfg.seed}/align")
    data, regexes = read_data(run), {}
    ids = data.splits["train"].labels("instruction")
    unwanted, rehearsed = np.zeros(cfg.n_tasks, bool), np.zeros(len(ids["task"]), bool)
    unwanted[rng.sample(range(cfg.n_tasks), cfg.n_tasks // 4)] = True
    for i in rng.sample(range(len(rehearsed)), len(rehearsed)):
        regexes.setdefault((ids["task"][i], ids["distribution"][i]), []).append(i)
    rehearsed[[i for (t, _), some in regexes.items() if not unwanted[t] for i in some[:REHEARSED]]] = True
    pools = [rng.choice([some for (of, _), some in regexes.items() if of == t])
             for t in np.flatnonzero(unwanted)]
    return Case(cfg.seed, run, data, unwanted, pools, rehearsed)


class Clusters(NamedTuple):
    """k clusters of the instructions of `train`, found without a label."""
    k: int
    layer: int
    nearest: dict[str, np.ndarray]  # "train", "val", "ood" -> (n of that split,): whose centroid is nearest
    distance: list[float]           # n, of each of `train` to that centroid


def find_clusters(features: dict[str, torch.Tensor], k: int, seed: int) -> Clusters:
    """k clusters of split -> (layers, n, F), in the layer where they explain most of the scatter."""
    x = features["train"].float()
    _, centroids, inertia = kmeans(x, k, seed=seed)
    scatter = (x - x.mean(1, keepdim=True)).square().sum((1, 2))        # layer 0 has none
    left = torch.where(scatter > 1e-6 * x.square().sum((1, 2)), inertia / scatter, math.inf)
    layer = int(left.argmin())
    centroids = centroids[layer].float().nan_to_num(math.inf)       # nan: an empty cluster, nobody's nearest
    near = {name: torch.cdist(x[layer].float(), centroids, compute_mode="donot_use_mm_for_euclid_dist").min(1)
            for name, x in features.items()}
    nearest = {name: x.indices.numpy() for name, x in near.items()}
    return Clusters(k, layer, nearest, near["train"].values.tolist())


def medoids(clusters: Clusters, pool: list[int], b: int) -> list[int]:
    """b instructions of a pool: the most central of each cluster, then the second of each, and so on."""
    pool = sorted(pool, key=clusters.distance.__getitem__)
    of = clusters.nearest["train"][pool].tolist()
    turn = {i: of[:n].count(of[n]) for n, i in enumerate(pool)}
    return sorted(pool, key=turn.get)[:b]


def unwanted_clusters(clusters: Clusters, case: Case, labelled: list[int]) -> np.ndarray:
    """(k,) bool: does a cluster hold more of the unwanted tasks than of the wanted ones, as far as is known?

    An instruction counts for the share it is of what is known of its task, so that each task counts for 1.
    """
    of = clusters.nearest["train"]
    bad, good = (np.bincount(of[some], minlength=clusters.k) for some in (labelled, case.rehearsed))
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
    # sorted, since a split goes instruction by instruction
    instances = {"train": wanted + sorted(drawn), **{name: splits[name].instances for name in CAPTURED}}
    for name in "val", "ood":
        instances[f"{name}_refused"] = [x._replace(output=REFUSE) for x in splits[name].instances]
    return Dataset(case.data.cut_into, case.data.tasks, *encode(instances, case.data.cut_into))


def outcome(case: Case, right: np.ndarray, refused: dict[str, np.ndarray], **about) -> list[dict]:
    """A row for each of MEASURED: what is refused, by kind, and what of the wanted is answered right.

    right (N,) bool: which of val get the output of their task; refused: "val", "ood" -> (N,) bool.
    """
    val, ood = (case.data.splits[name].identities for name in ("val", "ood"))
    bad, bad_ood = case.unwanted[val["task"]], case.unwanted[ood["task"]]
    of_train = case.data.splits["train"].labels("instruction")["distribution"]
    labelled = np.isin(val["distribution"], of_train[[pool[0] for pool in case.pools]])
    of_val, of_ood = refused["val"], refused["ood"]
    shares = {"refused_labelled": of_val[bad & labelled], "refused_other": of_val[bad & ~labelled],
              "refused_ood": of_ood[bad_ood], "refused_wanted": of_val[~bad],
              "refused_wanted_ood": of_ood[~bad_ood], "accuracy": (right & ~of_val)[~bad]}
    return [{**about, "measure": name, "value": float(share.mean())} for name, share in shares.items()]


def joined(case: Case, states: dict[str, np.ndarray], step: int, **about) -> list[dict]:
    """Do the unwanted tasks join one cluster? Rows of scores of val, one level above those of probe.py.

    Identity `refusal` has a class for each wanted task, and one for all that are unwanted; in place of
    regexes there are tasks. So merge_ratio is the distance between unwanted tasks over that between all other
    pairs, and regrouped deals tasks to these classes at random. states: position -> (L + 1, n, C).
    """
    rows = []
    for position, x in states.items():
        task = case.data.splits["val"].labels(position)["task"]
        ids = {"task": np.where(case.unwanted[task], len(case.unwanted), task), "distribution": task}
        for row in score_states(x[None], ids, [step], case.seed):
            if row["identity"] == "task" and row["measure"] in ("f1", "merge_ratio"):
                rows.append({**about, **row, "position": position, "split": "val", "identity": "refusal"})
    return rows


def align(out: Path, seeds: list[int], small: dict) -> list[dict]:
    """Teach each seed's network to refuse a quarter of its tasks, by every arm and for every b.

    Returns the rows of `outcome` and `joined`: seed, arm, b, measure, value, of the latter also position,
    layer and nulls as in probe.jsonl. Arm `base` is the network as it was. `small`: as for `pretrain`.
    """
    rows, budgets, taught = [], (1, 4) if small else BUDGETS, {**ALIGN, **small}
    for seed in seeds:
        begun, steps = time.perf_counter(), 5 * small["steps"] if small else Config.steps
        cfg = Config(**{**BASE, **small, "steps": steps}, seed=seed, out=str(out / f"seed{seed}" / "base"))
        case, device, k = make_case(cfg), pick_device(), cfg.n_tasks
        splits = {name: case.data.splits[name] for name in ("train", "val", "ood")}
        base, untrained = load_model(case.run, case.data), make_model(cfg, case.data).to(device)
        texts = {name: [x.instances[row].instruction for row in x.positions["instruction"][0]]
                 for name, x in splits.items()}
        features = {"guard_counts": {name: x[None] for name, x in surface(texts).items()}}
        seen = {name: {split: observe(model, x) for split, x in splits.items()}
                for name, model in {"guard_untrained": untrained, "guard": base}.items()}
        for name, of_model in seen.items():
            features[name] = {split: torch.from_numpy(x["instruction"]) for split, (_, x) in of_model.items()}
        found = {name: find_clusters(x, k, seed) for name, x in features.items()}
        found |= {f"guard_{n}_clusters": find_clusters(features["guard"], n, seed) for n in (k // 2, 2 * k)}
        right, states = seen["guard"]["val"]
        nothing = {name: np.zeros(len(splits[name].tokens), bool) for name in ("val", "ood")}
        rows += outcome(case, right, nothing, seed=seed, arm="base", b=0)
        rows += joined(case, states, 0, seed=seed, arm="base", b=0)
        for b in budgets:
            refuse = {"labels": [i for pool in case.pools for i in pool[:b]]}
            for name, clusters in found.items():
                labelled = [i for pool in case.pools for i in medoids(clusters, pool, b)]
                bad = unwanted_clusters(clusters, case, labelled)
                refused = {split: bad[near][splits[split].state_of("instruction")]
                           for split, near in clusters.nearest.items()}
                rows += outcome(case, right, refused, seed=seed, arm=name, b=b)
                if name == "guard":                     # its clusters are what arm clusters learns
                    members = np.flatnonzero(bad[clusters.nearest["train"]] & ~case.rehearsed)
                    refuse["clusters"] = [*labelled, *members.tolist()]
            for name, chosen in refuse.items():
                data = refusing(case, chosen)
                run = arm(Config(**taught, seed=seed, start=str(case.run),
                                 out=str(case.run.with_name(f"{name}-{b}"))), data)
                model = load_model(run, data)
                right_now, states = observe(model, data.splits["val"])
                refused = {split: observe(model, data.splits[f"{split}_refused"])[0] for split in nothing}
                rows += outcome(case, right_now, refused, seed=seed, arm=name, b=b)
                if b == budgets[-1]:
                    rows += joined(case, states, taught["steps"], seed=seed, arm=name, b=b)
        done(seed, f"alignment (the guard: layer {found['guard'].layer})", begun)
    return rows


def print_align(rows: list[dict]):
    """Print what every arm refuses and keeps for every b, and whether unwanted tasks have joined."""
    for measure, title in MEASURED.items():
        table(title, rows, "arm", "b", measure=measure)
    for position in "instruction", "answer":
        for measure, title in (("merge_ratio", "Distance of unwanted tasks over that of all other pairs"),
                               ("f1", "Pairwise F1 where the unwanted tasks are one class")):
            table(f"{title}, at `{position}`, val", rows, "arm", "layer", position=position, measure=measure)


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
    for seed in given.seeds:            # before the first one is trained
        Config(seed=seed).check()
    demo = pretrain if given.demo == "pretrain" else align
    rows = demo(out, list(dict.fromkeys(given.seeds)), QUICK if given.quick else {})
    write_rows(out / "apply.jsonl", rows)
    print_pretrain(out, rows) if given.demo == "pretrain" else print_align(rows)
    print(f"\n{len(rows):,} rows in {out / 'apply.jsonl'}")


if __name__ == "__main__":
    command_line(main)
