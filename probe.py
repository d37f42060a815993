"""Look into the hidden states of a run: do they form clusters, and are those the tasks?

    python probe.py runs/default      k-means, its scores and neighbours for every capture of a run, beside chance

Figures 2 and 4 of the paper. Every score stands beside its null, the same score for permuted labels: pairwise F1 of
16 equal classes is 0.06 by chance if clusters are even, and 0.12 if all points share one. The paper does not say which
F1 it means; ours is over pairs of points. What a layer is: see model.py. Nothing is centred or scaled before k-means.

N points, C width, K clusters; (...) is a batch, here most often captures x layers.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from data import Flags, command_line, write, write
from train import CAPTURED, make_generator, read_config

# ---------------------------------------------------------------- k-means

GROUP = 4_000_000       # floats of points and distances that are worked on at a time: about what a cache holds


def kmeans(x, k: int, n_init: int = 8, max_iter: int = 100, seed: int = 0):
    """Lloyd's algorithm (1982) from greedy k-means++ (Arthur & Vassilvitskii 2007), the best of n_init starts.

    x (..., N, C): the leading dimensions are a batch; each member comes out as it would alone. Returns labels
    (..., N) int64, centroids (..., k, C) and inertia (...), the sum of squared distances to the nearest centroid.
    A cluster that loses its last point is sown again at the point farthest from its centroid; where there are fewer
    distinct points than k, the clusters left over stay empty and their centroids are nan.
    Raises ValueError for k outside 1..N and for values that are not finite.
    """
    x = torch.as_tensor(x).float()
    *batch, n, width = x.shape
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, it must be from 1 to the number of points, {n}")
    if not x.isfinite().all():
        raise ValueError("k-means needs finite points: these hold nan or infinity")
    x = x.reshape(-1, n, width)
    mean = x.double().mean(1, keepdim=True).float()     # distances lose fewer digits near the origin
    trials = 2 + int(math.log(k))
    draws = torch.rand(n_init, k, trials, generator=make_generator(seed, "kmeans")).to(x.device)
    parts = []
    for some in (x - mean).split(max(1, GROUP // (n_init * n * (k + width)))):
        starts = some.repeat_interleave(n_init, 0)
        labels, centroids, inertia = _lloyd(starts, _sow(starts, draws.repeat(len(some), 1, 1)), max_iter)
        best = inertia.view(-1, n_init).argmin(1) + n_init * torch.arange(len(some), device=x.device)
        parts.append((labels[best], centroids[best], inertia[best]))
    labels, centroids, inertia = map(torch.cat, zip(*parts))
    return labels.view(*batch, n), (centroids + mean).view(*batch, k, width), inertia.view(batch)


def _sow(x, draws):
    """Greedy k-means++: (R, N, C) and draws (R, k, trials) in [0, 1) -> the first centroids (R, k, C).

    Each centroid is one of `trials` points, drawn by their squared distance to the centroids so far: the one that
    lowers the sum of these the most. nan where every point already is a centroid.
    """
    norms = x.square().sum(-1)                                              # (R, N)
    run = torch.arange(len(x), device=x.device)
    closest, centroids = torch.full_like(norms, math.inf), x.new_empty(len(x), draws.shape[1], x.shape[2])
    for j in range(draws.shape[1]):
        up_to = (closest if j else torch.ones_like(closest)).cumsum(1)
        drawn = torch.searchsorted(up_to, draws[:, j] * up_to[:, -1:]).clamp(max=x.shape[1] - 1)    # (R, trials)
        points = x[run[:, None], drawn]
        distances = torch.baddbmm(norms[:, None], points, x.transpose(1, 2), alpha=-2)              # (R, trials, N)
        distances = (distances + norms.gather(1, drawn)[..., None]).clamp_(min=0).minimum(closest[:, None])
        best = distances.sum(2).argmin(1)
        spread = closest.amax(1) > 1e-6 * norms.mean(1)                     # else only rounding tells points apart
        centroids[:, j] = torch.where(spread[:, None], points[run, best], math.nan)
        closest = distances[run, best]
    return centroids


def _lloyd(x, centroids, max_iter):
    """(R, N, C) and first centroids (R, k, C) -> labels (R, N), centroids, inertia (R,). A converged run drops out."""
    k, norms = centroids.shape[1], x.square().sum(-1)
    labels = torch.full(x.shape[:2], -1, device=x.device)
    run = torch.arange(len(x), device=x.device)                             # those still moving
    points, c = x, centroids
    for _ in range(max_iter):
        sizes = c.square().sum(-1).nan_to_num(math.inf)                     # an empty cluster is infinitely far
        nearest, new = torch.baddbmm(sizes[:, None], points, c.nan_to_num(0).transpose(1, 2), alpha=-2).min(-1)
        moving = (new != labels[run]).any(1)
        labels[run] = new
        flat = (new + k * torch.arange(len(run), device=x.device)[:, None]).flatten()
        counts = torch.bincount(flat, minlength=len(run) * k).view(-1, k, 1)
        c = points.new_zeros(len(run) * k, x.shape[2]).index_add_(0, flat, points.flatten(0, 1)).view(c.shape) / counts
        for r in (counts == 0).any(1).flatten().nonzero().flatten().tolist():
            far = (nearest[r] + norms[run[r]]).topk(int((counts[r] == 0).sum()))
            apart = far.values > 1e-6 * norms[run[r]].mean()
            c[r, counts[r, :, 0] == 0] = torch.where(apart[:, None], points[r, far.indices], math.nan)
        centroids[run] = c
        run, points, c = run[moving], points[moving], c[moving]
        if not len(run):
            break
    nearest = centroids.nan_to_num(0)[torch.arange(len(x), device=x.device)[:, None], labels]
    return labels, centroids, (x - nearest).square().sum((1, 2))


# ---------------------------------------------------------------- scores of a clustering
# Each takes classes (..., N) and clusters (..., N), integers from 0, and gives a float, or an array (...). In formulas
# n_ij counts the points of class i in cluster j, a_i and b_j are its sums over j and i, and C2(x) = x (x - 1) / 2.


def contingency(classes, clusters) -> np.ndarray:
    """n_ij: (..., classes, clusters) float64. Raises ValueError if the labels do not belong together."""
    classes, clusters = np.asarray(classes), np.asarray(clusters)
    if classes.shape[-1:] != clusters.shape[-1:] or not classes.size or min(classes.min(), clusters.min()) < 0:
        raise ValueError("classes and clusters must be integers from 0, one of each a point")
    shape = classes.max() + 1, clusters.max() + 1
    flat = classes * shape[1] + clusters                                    # broadcast: (..., N)
    batch = flat.shape[:-1]
    flat = flat.reshape(-1, flat.shape[-1]) + np.arange(math.prod(batch))[:, None] * math.prod(shape)
    return np.bincount(flat.ravel(), minlength=math.prod(batch) * math.prod(shape)).reshape(*batch, *shape).astype(float)


def pairs(x):
    """C2."""
    return x * (x - 1) / 2


def f1(classes, clusters):
    """Pairwise F1: precision and recall of "same cluster" as a guess at "same class", over all pairs of points.

    TP = sum C2(n_ij), P = TP / sum C2(b_j), R = TP / sum C2(a_i), F1 = 2 P R / (P + R), from 0 to 1; 1 if there are
    no pairs in either. Chance: about 1/K for even clusters. (Manning, Raghavan & Schuetze 2008, ch. 16.)
    """
    n = contingency(classes, clusters)
    total = pairs(n.sum(-1)).sum(-1) + pairs(n.sum(-2)).sum(-1)
    return np.where(total > 0, 2 * pairs(n).sum((-1, -2)) / np.maximum(total, 1), 1.0)[()]


def matched_f1(classes, clusters):
    """Clusters matched one-to-one to classes so that the most points agree, then the mean of the classes' F1.

    F1 of class i matched to cluster j is 2 n_ij / (a_i + b_j), 0 for a class without a cluster. From 0 to 1; chance:
    1/K and somewhat more, as the matching picks the best of many.
    """
    n = contingency(classes, clusters)
    size = max(n.shape[-2:])
    table = np.zeros((*n.shape[:-2], size, size))
    table[..., :n.shape[-2], :n.shape[-1]] = n
    column = match(table.reshape(-1, size, size)).reshape(*table.shape[:-1], 1)
    hits = np.take_along_axis(table, column, -1)[..., 0]                    # n_ij of each class and its cluster
    sizes = table.sum(-1) + np.take_along_axis(table.sum(-2), column[..., 0], -1)
    return (2 * hits / np.maximum(sizes, 1)).sum(-1) / (table.sum(-1) > 0).sum(-1)


def match(value: np.ndarray) -> np.ndarray:
    """(B, n, n) -> (B, n): the column matched to each row, one-to-one, for the largest sum of values.

    The Hungarian method (Kuhn 1955) by shortest augmenting paths (Jonker & Volgenant 1987): rows enter one by one, and
    the cheapest path of swaps to a free column makes room. All problems of the batch take each step together.
    """
    batch, n, _ = value.shape
    cost = value.max((1, 2), keepdims=True) - value
    u, v = cost.min(2), np.zeros((batch, n))                # potentials: cost - u - v >= 0, 0 where matched
    row_of, column_of = np.full((batch, n), -1), np.full((batch, n), -1)
    for start in range(n):
        length, came_from = np.full((batch, n), math.inf), np.zeros((batch, n), int)    # of paths to each column
        reached, done = np.zeros(batch), np.zeros((batch, n), bool)
        b, row, sink = np.arange(batch), np.full(batch, start), np.zeros(batch, int)
        while len(b):                                       # Dijkstra, for the problems b without a free column yet
            new = (reached[b] - u[b, row])[:, None] + cost[b, row] - v[b]
            came_from[b] = np.where(~done[b] & (new < length[b]), row[:, None], came_from[b])
            length[b] = np.where(done[b], length[b], np.minimum(new, length[b]))
            open_ = np.where(done[b], math.inf, length[b])
            ties = open_ == open_.min(1, keepdims=True)     # of the nearest columns, a free one if there is one
            j = (ties * (1 + (row_of[b] < 0))).argmax(1)
            reached[b], done[b, j], sink[b] = length[b, j], True, j
            taken = row_of[b, j] >= 0
            b, row = b[taken], row_of[b, j][taken]
        slack = np.where(done, reached[:, None] - length, 0)
        v -= slack
        u[:, start] += reached
        b, j = np.nonzero(done & (row_of >= 0))
        u[b, row_of[b, j]] += slack[b, j]
        b, j = np.arange(batch), sink
        while len(b):                                       # walk the path back, handing each column on
            row = came_from[b, j]
            row_of[b, j] = row
            column_of[b, row], j = j, column_of[b, row]
            b, j = b[row != start], j[row != start]
    return column_of


def ari(classes, clusters):
    """Adjusted Rand index (Hubert & Arabie 1985): pairs together in both, from 0 at chance to 1; it can be negative.

    (T - E) / ((A + B) / 2 - E), T = sum C2(n_ij), A = sum C2(a_i), B = sum C2(b_j), E = A B / C2(N); 1 if A, B and T
    agree that all pairs are together, or none.
    """
    n = contingency(classes, clusters)
    a, b = pairs(n.sum(-1)).sum(-1), pairs(n.sum(-2)).sum(-1)
    expected = a * b / np.maximum(pairs(n.sum((-1, -2))), 1)
    spread = (a + b) / 2 - expected
    return np.where(spread > 0, (pairs(n).sum((-1, -2)) - expected) / np.where(spread > 0, spread, 1), 1.0)[()]


MEASURES = {"f1": f1, "matched_f1": matched_f1, "ari": ari}     # one more line adds a measure to every table


# ---------------------------------------------------------------- nearest neighbours


def knn(train, query, k: int) -> torch.Tensor:
    """(Q, k) indices of the k points of train (N, C) nearest to each of query (Q, C): Euclidean, nearest first.

    Equal distances come in order of the index. Raises ValueError for k outside 1..N.
    """
    train, query = torch.as_tensor(train).float(), torch.as_tensor(query).float()
    if not 1 <= k <= len(train):
        raise ValueError(f"k is {k}, it must be from 1 to the number of points, {len(train)}")
    mean = train.double().mean(0).float()
    train, query = train - mean, query - mean
    found = []
    for some in query.split(max(1, GROUP // len(train))):
        squared = torch.addmm(train.square().sum(1), some, train.T, alpha=-2) + some.square().sum(1, keepdim=True)
        # the bits of a float that is not negative order as the float does; with the index below them there are no ties
        key = squared.clamp(min=0).abs().view(torch.int32).long() << 32 | torch.arange(len(train), device=train.device)
        found.append(key.topk(k, largest=False).values & 0xFFFFFFFF)
    return torch.cat(found)


# ---------------------------------------------------------------- the probe of a run

N_NULL = 20             # permutations of the labels behind every null
NEIGHBOURS = 10         # of the subset, for each state of val and ood


def captures(run: str | Path) -> list[int]:
    """The steps at which a run was captured. Raises ValueError if there are none."""
    steps = sorted(int(path.stem) for path in (Path(run) / "states").glob("[0-9]*.npz"))
    if not steps:
        raise ValueError(f"{run} has no captures in states/: train it first")
    return steps


def load(run: str | Path, split: str, position: str) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """All states of a split read at a position, (captures, L + 1, n, C) float16, and identity -> (n,) labels."""
    folder, key = Path(run) / "states", f"{split}/{position}"
    states = np.stack([np.load(folder / f"{step:06d}.npz")[key] for step in captures(run)])
    with np.load(folder / "labels.npz") as labels:
        return torch.from_numpy(states), {name[len(key) + 1:]: labels[name] for name in labels if name.startswith(key)}


def probe(run: str | Path) -> list[dict]:
    """Cluster and score every capture of a run at every layer, position, split and identity.

    Writes and returns the rows of probe.jsonl: step, layer, position, split, identity, measure, value, null_mean and
    null_95. k-means is fitted anew on each split, so it asks whether there are clusters, not whether they are the same.
    """
    seed, steps, rows = read_config(run).seed, captures(run), []

    def add(score, labels, **key):              # score: (n,) labels -> (captures, L + 1)
        rng = np.random.default_rng([seed, len(rows)])
        null = np.stack([score(rng.permutation(labels)) for _ in range(N_NULL)])
        for (s, layer), value in np.ndenumerate(score(labels)):
            rows.append({"step": steps[s], "layer": layer, **key, "value": float(value),
                         "null_mean": null[:, s, layer].mean(), "null_95": np.quantile(null[:, s, layer], 0.95)})

    for position in "instruction", "answer":
        known, known_labels = load(run, "subset", position)
        for split in CAPTURED:
            states, labels = load(run, split, position)
            for identity, label in labels.items():
                if sys.stderr.isatty():
                    print(f"\r\x1b[Kprobing {position}, {split}: {identity}", end="\r", file=sys.stderr, flush=True)
                key = {"position": position, "split": split, "identity": identity}
                names, classes = np.unique(label, return_inverse=True)
                clusters = kmeans(states, len(names), seed=seed)[0].numpy()             # (captures, L + 1, n)
                for measure, score in MEASURES.items():
                    add(lambda labels: score(labels, clusters), classes, **key, measure=measure)
            if split != "subset":
                near = torch.stack([torch.stack([knn(*layer, NEIGHBOURS) for layer in zip(*step)])
                                    for step in zip(known, states)]).numpy()            # (captures, L + 1, n, K)
                add(lambda labels_: (labels_[near] == labels["task"][:, None]).mean((2, 3)), known_labels["task"],
                    position=position, split=split, identity="task", measure="knn_share")
    write(Path(run) / "probe.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def print_report(run: str | Path, rows: list[dict]):
    """Print what the rows of a probe say of val: task by layer and step at each position, then all identities."""
    values = {tuple(row[name] for name in ("step", "layer", "position", "identity", "measure")): row for row in rows
              if row["split"] == "val"}
    steps, layers = sorted({key[0] for key in values}), sorted({key[1] for key in values})
    metrics = map(json.loads, (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    accuracy = {row["step"]: row["acc_val"] for row in metrics}

    def line(head, step, *key, column="value"):
        cells = (values[step, layer, *key][column] for layer in layers)
        print(f"{head:36}" + "".join(f"{x:6.2f} {' ░▒▓█'[min(4, int(5 * max(0, x)))]}" for x in cells))

    def header(head):
        print(f"\n{head:36}" + "".join(f"{'layer ' + str(layer):>7} " for layer in layers))

    for position in "instruction", "answer":
        header(f"task clusters at `{position}`")
        print(f"pairwise F1, val")
        for step in steps:
            line(f"  step {step:6}, val accuracy {accuracy.get(step, math.nan):.2f}", step, position, "task", "f1")
        line("  null: labels permuted", steps[-1], position, "task", "f1", column="null_mean")
    header(f"step {steps[-1]}, val")
    for position, identity, measure in dict.fromkeys(key[2:] for key in values):
        if measure in ("f1", "knn_share"):
            name = {"f1": "pairwise F1", "knn_share": f"share of {NEIGHBOURS} nearest"}[measure]
            line(f"  {position:12}{identity:13}{name}", steps[-1], position, identity, measure)


def main():
    """The command line."""
    flags = Flags(description="Cluster the captured states of a run and score the clusters, beside chance.")
    flags.add_argument("run", help="a run folder, as train.py makes it")
    run = flags.parse_args().run
    rows = probe(run)
    print_report(run, rows)
    print(f"\n{len(rows):,} rows in {Path(run) / 'probe.jsonl'}")


if __name__ == "__main__":
    command_line(main)
