"""Look into the hidden states of a run: do they form clusters, and are these the tasks?

    python probe.py runs/default      cluster and score every capture, beside chance; writes probe.jsonl

Figures 2 and 4 of the paper. Beside every score stands its null, the same score for permuted labels; step 0
is the untrained network, and layer 0 has not seen the instruction. The paper does not say which F1 it means:
ours counts pairs of points. Nothing is centred or scaled before k-means, and k is the number of classes.

N points, C width, K clusters, (...) a batch: most often captures x layers, (S, L + 1).
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from data import Flags, command_line, write
from train import CAPTURED, make_generator, read_config

# ---------------------------------------------------------------- k-means

GROUP = 4_000_000       # floats of points and distances worked on at a time, about what a cache holds
ROUNDING = 1e-6         # squared distances below this share of the points' variance are taken for 0


def kmeans(x, k: int, n_init: int = 8, max_iter: int = 100, seed: int = 0):
    """Lloyd's algorithm (1982) from greedy k-means++ (Arthur & Vassilvitskii 2007), best of n_init starts.

    x (..., N, C): leading dimensions are a batch, whose members come out as they would alone. Returns labels
    (..., N) int64, centroids (..., k, C) and inertia (...), the sum of squared distances to the centroids. A
    cluster that loses its last point is sown anew at the point farthest from its centroid; if there are fewer
    distinct points than k, the clusters left over stay empty and their centroids are nan.
    Raises ValueError for k outside 1..N and for values that are not finite.
    """
    x, k = torch.as_tensor(x).float(), int(k)
    *batch, n, width = x.shape
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, it must be from 1 to the number of points, {n}")
    if not x.isfinite().all():
        raise ValueError("k-means needs finite points, these hold nan or infinity")
    x = x.reshape(-1, n, width)
    mean = x.mean(1, keepdim=True, dtype=torch.float64).float()     # near the origin fewer digits are lost
    draws = torch.rand(n_init, k, 2 + int(math.log(k)), generator=make_generator(seed, "kmeans")).to(x.device)
    parts = []
    for some in (x - mean).split(max(1, GROUP // (n_init * n * (k + width)))):
        runs = some.repeat_interleave(n_init, 0)
        labels, centroids, inertia = _lloyd(runs, _sow(runs, draws.repeat(len(some), 1, 1)), max_iter)
        best = inertia.view(-1, n_init).argmin(1) + n_init * torch.arange(len(some), device=x.device)
        parts.append((labels[best], centroids[best], inertia[best]))
    labels, centroids, inertia = map(torch.cat, zip(*parts))
    return labels.view(*batch, n), (centroids + mean).view(*batch, k, width), inertia.view(batch)


def _sow(x, draws):
    """Greedy k-means++: R runs (R, N, C) and uniform draws (R, k, trials) -> the first centroids (R, k, C).

    Each centroid is one of `trials` points, drawn by their squared distance to the centroids so far: the one
    that lowers the sum of these distances the most. It is nan if every point is a centroid already.
    """
    norms, run = x.square().sum(-1), torch.arange(len(x), device=x.device)
    closest = torch.full_like(norms, math.inf)                              # (R, N)
    centroids = x.new_empty(len(x), draws.shape[1], x.shape[2])
    for j in range(draws.shape[1]):
        up_to = (closest if j else torch.ones_like(closest)).cumsum(1)
        drawn = torch.searchsorted(up_to, draws[:, j] * up_to[:, -1:]).clamp(max=x.shape[1] - 1)
        points = x[run[:, None], drawn]                                     # (R, trials, C)
        distances = torch.baddbmm(norms[:, None], points, x.transpose(1, 2), alpha=-2)
        distances += norms.gather(1, drawn)[..., None]                      # (R, trials, N)
        distances = distances.clamp_(min=0).minimum(closest[:, None])
        best = distances.sum(2).argmin(1)
        apart = closest.amax(1) > ROUNDING * norms.mean(1)
        centroids[:, j] = torch.where(apart[:, None], points[run, best], math.nan)
        closest = distances[run, best]
    return centroids


def _lloyd(x, centroids, max_iter):
    """R runs (R, N, C) from (R, k, C) -> labels, centroids, inertia. A run that has converged drops out."""
    k, norms = centroids.shape[1], x.square().sum(-1)
    labels = torch.full(x.shape[:2], -1, device=x.device)
    run, points, c = torch.arange(len(x), device=x.device), x, centroids    # those that still move
    for _ in range(max_iter):
        sizes = c.square().sum(-1).nan_to_num(math.inf)[:, None]            # nan is infinitely far
        nearest, new = torch.baddbmm(sizes, points, c.nan_to_num(0).transpose(1, 2), alpha=-2).min(-1)
        moving = (new != labels[run]).any(1)
        labels[run] = new
        flat = (new + k * torch.arange(len(run), device=x.device)[:, None]).flatten()
        counts = torch.bincount(flat, minlength=len(run) * k).view(-1, k, 1)
        sums = points.new_zeros(len(run) * k, x.shape[2]).index_add_(0, flat, points.flatten(0, 1))
        c = sums.view(-1, k, x.shape[2]) / counts
        for r in (counts == 0).any(1).flatten().nonzero().flatten().tolist():
            empty = counts[r, :, 0] == 0
            far = (nearest[r] + norms[run[r]]).topk(int(empty.sum()))
            apart = far.values > ROUNDING * norms[run[r]].mean()
            c[r, empty] = torch.where(apart[:, None], points[r, far.indices], math.nan)
        centroids[run] = c
        run, points, c = run[moving], points[moving], c[moving]
        if not len(run):
            break
    own = centroids.gather(1, labels[..., None].expand_as(x))
    return labels, centroids, (x - own).square().sum((1, 2))


# ---------------------------------------------------------------- scores of a clustering
# A measure takes classes (..., N) and clusters (..., N), integers from 0, and gives a float or array (...).
# n_ij counts points of class i in cluster j, a_i and b_j are its sums over j and i, C2(x) = x (x - 1) / 2.


def contingency(classes, clusters) -> np.ndarray:
    """n_ij (..., classes, clusters), as floats. Raises ValueError for labels that do not belong together."""
    classes, clusters = np.asarray(classes), np.asarray(clusters)
    if not classes.size or classes.shape[-1] != clusters.shape[-1] or min(classes.min(), clusters.min()) < 0 \
            or classes.dtype.kind not in "biu" or clusters.dtype.kind not in "biu":
        raise ValueError("a clustering needs two integers from 0 for each point, its class and its cluster")
    classes, clusters = classes.astype(np.int64), clusters.astype(np.int64)     # small types would overflow
    shape = classes.max() + 1, clusters.max() + 1
    flat = classes * shape[1] + clusters
    batch = flat.shape[:-1]
    tables, cells = math.prod(batch), math.prod(shape)
    flat = flat.reshape(tables, -1) + cells * np.arange(tables)[:, None]
    return np.bincount(flat.ravel(), minlength=tables * cells).reshape(*batch, *shape).astype(float)


def pairs(x):
    """C2."""
    return x * (x - 1) / 2


def f1(classes, clusters):
    """Pairwise F1: how well "in one cluster" tells "of one class", over all pairs of points; 0 to 1.

    TP = sum C2(n_ij), P = TP / sum C2(b_j), R = TP / sum C2(a_i), F1 = 2 P R / (P + R); 1 if there are no
    pairs in either. Chance: 1 / K for even clusters, 2 / (K + 1) for a single one. (Manning, Raghavan &
    Schuetze 2008, chapter 16.)
    """
    n = contingency(classes, clusters)
    both = pairs(n.sum(-1)).sum(-1) + pairs(n.sum(-2)).sum(-1)
    return np.where(both > 0, 2 * pairs(n).sum((-1, -2)) / np.maximum(both, 1), 1.0)[()]


def matched_f1(classes, clusters):
    """The mean F1 of the classes, each matched to a cluster of its own so that most points agree; 0 to 1.

    F1 of class i and cluster j is 2 n_ij / (a_i + b_j), 0 for a class without a cluster; of matchings with as
    many points the one of highest F1 counts. Chance: somewhat over 1 / K, as the best of many is taken.
    """
    n = contingency(classes, clusters)
    size = max(n.shape[-2:])
    table = np.zeros((*n.shape[:-2], size, size))
    table[..., :n.shape[-2], :n.shape[-1]] = n
    of_pair = 2 * table / np.maximum(table.sum(-1, keepdims=True) + table.sum(-2, keepdims=True), 1)
    value = table + of_pair / (size + 1)                    # one point outweighs all F1 together
    column = match(value.reshape(-1, size, size)).reshape(*table.shape[:-1], 1)
    return np.take_along_axis(of_pair, column, -1).sum((-1, -2)) / (table.sum(-1) > 0).sum(-1)


def match(value: np.ndarray) -> np.ndarray:
    """(B, n, n) -> (B, n): a column for each row, all different, so that the sum of the values is largest.

    The Hungarian method (Kuhn 1955) by shortest augmenting paths (Jonker & Volgenant 1987): rows enter one by
    one, and the cheapest chain of swaps that ends in a free column makes room. The batch goes in step.
    """
    batch, n, _ = value.shape
    cost = value.max((1, 2), keepdims=True) - value
    u, v = cost.min(2), np.zeros((batch, n))            # potentials: cost - u - v >= 0, and 0 where matched
    row_of, column_of = np.full((batch, n), -1), np.full((batch, n), -1)
    for start in range(n):
        length, came_from = np.full((batch, n), math.inf), np.zeros((batch, n), int)    # of paths to columns
        reached, done = np.zeros(batch), np.zeros((batch, n), bool)
        b, row, sink = np.arange(batch), np.full(batch, start), np.zeros(batch, int)
        while len(b):                                   # Dijkstra, in those (b) that have no free column yet
            new = (reached[b] - u[b, row])[:, None] + cost[b, row] - v[b]
            shorter = ~done[b] & (new < length[b])
            came_from[b] = np.where(shorter, row[:, None], came_from[b])
            length[b] = np.where(shorter, new, length[b])
            ahead = np.where(done[b], math.inf, length[b])
            ties = ahead == ahead.min(1, keepdims=True)
            j = (ties * (1 + (row_of[b] < 0))).argmax(1)    # the nearest column, a free one if it can be
            reached[b], done[b, j], sink[b] = length[b, j], True, j
            taken = row_of[b, j] >= 0
            b, row = b[taken], row_of[b, j][taken]
        slack = np.where(done, reached[:, None] - length, 0)
        v -= slack
        u[:, start] += reached
        b, j = np.nonzero(done & (row_of >= 0))
        u[b, row_of[b, j]] += slack[b, j]
        b, j = np.arange(batch), sink
        while len(b):                                   # back along the path, each row takes the next column
            row = came_from[b, j]
            row_of[b, j] = row
            column_of[b, row], j = j, column_of[b, row]
            b, j = b[row != start], j[row != start]
    return column_of


def ari(classes, clusters):
    """Adjusted Rand index (Hubert & Arabie 1985): 1 for the same partition, 0 at chance, negative below it.

    (T - E) / ((A + B) / 2 - E) with T = sum C2(n_ij), A = sum C2(a_i), B = sum C2(b_j), E = A B / C2(N); 1 if
    both are one cluster, or single points.
    """
    n = contingency(classes, clusters)
    a, b = pairs(n.sum(-1)).sum(-1), pairs(n.sum(-2)).sum(-1)
    expected = a * b / np.maximum(pairs(n.sum((-1, -2))), 1)
    most = (a + b) / 2 - expected
    return np.where(most > 0, (pairs(n).sum((-1, -2)) - expected) / np.where(most > 0, most, 1), 1.0)[()]


MEASURES = {"f1": f1, "matched_f1": matched_f1, "ari": ari}     # one more line adds a measure to every row


# ---------------------------------------------------------------- nearest neighbours


def knn(train, query, k: int) -> torch.Tensor:
    """(Q, k) indices of the k points of train (N, C) nearest to each of query (Q, C), nearest first.

    The distance is Euclidean; equal ones come in order of the index. Raises ValueError for k outside 1..N and
    for values that are not finite.
    """
    train, query = torch.as_tensor(train).float(), torch.as_tensor(query).float()
    if not 1 <= k <= len(train):
        raise ValueError(f"k is {k}, it must be from 1 to the number of points, {len(train)}")
    if not (train.isfinite().all() and query.isfinite().all()):
        raise ValueError("neighbours need finite points, these hold nan or infinity")
    # Near the origin fewer digits are lost; a mean rounded to a coarse power of two keeps exact ties exact.
    grid = 2 ** train.std(correction=0).clamp(min=1e-30).log2().floor()
    mean = (train.mean(0, dtype=torch.float64) / grid).round().float() * grid
    train, query = train - mean, query - mean
    norms, index, found = train.square().sum(1), torch.arange(len(train), device=train.device), []
    for some in query.split(max(1, GROUP // (4 * len(train)))):     # floats, keys, and what topk copies
        squared = torch.addmm(norms, some, train.T, alpha=-2) + some.square().sum(1, keepdim=True)
        # The bits of a float >= 0 order as the float does; the index in the bits below them settles ties.
        keys = squared.clamp(min=0).abs().view(torch.int32).long() << 32 | index
        found.append(keys.topk(k, largest=False).values & 0xFFFFFFFF)
    return torch.cat(found)


# ---------------------------------------------------------------- the probe of a run

N_NULL = 20             # permutations of the labels behind every null
NEIGHBOURS = 10         # states of subset that each state of val and ood is compared with


def captured(run: str | Path) -> tuple[list[int], dict]:
    """The steps at which a run was captured, and position -> split -> identity -> (n,) labels of the states.

    Raises ValueError if nothing was captured.
    """
    folder, labels = Path(run) / "states", {}
    steps = sorted(int(path.stem) for path in folder.glob("[0-9]*.npz"))
    if not steps:
        raise ValueError(f"{run} has no captures: train it first")
    with np.load(folder / "labels.npz") as arrays:
        for name in arrays:
            split, position, identity = name.split("/")
            labels.setdefault(position, {}).setdefault(split, {})[identity] = arrays[name]
    return steps, labels


def load(run: str | Path, steps: list[int], split: str, position: str) -> torch.Tensor:
    """The states (S, L + 1, n, C) of a split at a position, float16."""
    files = (np.load(Path(run) / "states" / f"{step:06d}.npz") for step in steps)
    return torch.from_numpy(np.stack([arrays[f"{split}/{position}"] for arrays in files]))


def rows_of(score, labels: np.ndarray, seed: int, steps: list[int], **where) -> list[dict]:
    """Rows of probe.jsonl: score(labels), an array (S, L + 1), beside the same for permuted labels."""
    orders = (torch.randperm(len(labels), generator=make_generator(seed, "null", i)) for i in range(N_NULL))
    values, null = score(labels), np.stack([score(labels[order]) for order in orders])
    mean, high = null.mean(0), np.quantile(null, 0.95, 0)
    return [{"step": steps[s], "layer": layer, **where, "value": float(value),
             "null_mean": float(mean[s, layer]), "null_95": float(high[s, layer])}
            for (s, layer), value in np.ndenumerate(values)]


def probe(run: str | Path) -> list[dict]:
    """Cluster and score every capture of a run, at every layer, position and split, by every identity.

    Writes and returns the rows of probe.jsonl: step, layer, position, split, identity, measure, value,
    null_mean and null_95. k-means is fitted anew on each split: the question is whether there are clusters.
    """
    seed, rows, (steps, labels) = read_config(run).seed, [], captured(run)
    for position, of_split in labels.items():
        for split in CAPTURED:
            states, where = load(run, steps, split, position), {"position": position, "split": split}
            for identity, ids in of_split[split].items():
                if sys.stderr.isatty():
                    print(f"\r\x1b[Kprobing {position}, {split}, {identity} ...", end="\r", file=sys.stderr)
                names, classes = np.unique(ids, return_inverse=True)
                clusters = kmeans(states, len(names), seed=seed)[0].numpy()         # (S, L + 1, n)
                for name, measure in MEASURES.items():
                    rows += rows_of(lambda c: measure(c, clusters), classes, seed, steps, **where,
                                    identity=identity, measure=name)
            if split == "subset":       # which comes first: the points that neighbours are sought among
                known = states
            else:
                near = torch.stack([knn(a, b, min(NEIGHBOURS, len(a))) for a, b in
                                    zip(known.flatten(0, 1), states.flatten(0, 1))])
                near = near.view(*states.shape[:3], -1).numpy()                     # (S, L + 1, n, K)
                own = of_split[split]["task"][:, None]
                task = of_split["subset"]["task"]
                rows += rows_of(lambda c: (c[near] == own).mean((2, 3)), task, seed, steps, **where,
                                identity="task", measure="knn_share")
    write(Path(run) / "probe.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def print_report(run: str | Path, rows: list[dict]):
    """Print what the rows say of val: task clusters by step and layer, then all identities at the end."""
    value = {tuple(row[key] for key in ("position", "identity", "measure", "step", "layer")): row
             for row in rows if row["split"] == "val"}
    steps, layers = sorted({key[3] for key in value}), sorted({key[4] for key in value})
    metrics = map(json.loads, (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    accuracy = {row["step"]: row["acc_val"] for row in metrics}

    def line(head, *key, column="value"):
        scores = [value[(*key, layer)][column] for layer in layers]
        print(f"{head:25}" + "".join(f"{x:7.2f}{' ░▒▓█'[min(4, int(5 * max(0, x)))]}" for x in scores))

    for position in dict.fromkeys(key[0] for key in value):
        print(f"\nDo states at `{position}` cluster by task? Pairwise F1 on unseen instructions (val)\n"
              "    step   val accuracy  layer" + "".join(f"{layer:2}      " for layer in layers))
        for step in steps:
            line(f"{step:8}{accuracy.get(step, math.nan):12.3f}", position, "task", "f1", step)
        line("    null: labels permuted", position, "task", "f1", steps[-1], column="null_mean")
    print(f"\nBy what else, at step {steps[-1]}? NN: of the {NEIGHBOURS} nearest, the share of the same task")
    for position, identity, measure in dict.fromkeys(key[:3] for key in value):
        if measure in ("f1", "knn_share"):
            head = f"{position:11} {identity}{', NN' if measure == 'knn_share' else ''}"
            line(head, position, identity, measure, steps[-1])


def main():
    """Cluster the captured states of a run and score the clusters, beside chance."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("run", help="a run folder, as train.py makes it")
    run = flags.parse_args().run
    rows = probe(run)
    print_report(run, rows)
    print(f"\n{len(rows):,} rows in {Path(run) / 'probe.jsonl'}")


if __name__ == "__main__":
    command_line(main)
