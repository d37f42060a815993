"""Look into the hidden states of a run: do they form clusters, are these the tasks, are they used?

    python probe.py runs/default                          score every capture, beside chance, into probe.jsonl
    python probe.py runs/default --view raw centred       also with every input's mean state taken out
    python probe.py runs/default --beside runs/shuffled   print the last scores of a probed run for comparison
    python probe.py runs/default --patch                  exchange states: is the answer read from them?

Figures 2 and 4 of the paper, and controls. Beside every score stands its null, the same score for permuted
labels, and for clusterings by task a harder one, regrouped: regexes stay whole and are dealt to tasks at
random. Step 0 is the untrained network, layer 0 has not seen the instruction, and position `surface` is no
network at all. The paper does not say which F1 it means: ours counts pairs of points. Nothing is centred or
scaled unless --view says so, and k is the number of classes.

N points, C width, K clusters, (...) a batch: most often captures x layers, (S, L + 1).
"""
import functools
import itertools
import math
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

from data import Dataset, Flags, Split, command_line

import numpy as np
import torch                # after data, which sets how torch's threads wait
import torch.nn.functional as F

from train import (CAPTURED, capture_path, make_generator, observe, pick_device, read_arrays,
                   read_config, read_data, load_model, read_rows, write_rows)

# ---------------------------------------------------------------- k-means

GROUP = {"cpu": 4_000_000, "cuda": 64_000_000}      # distances at a time: 16 MB fill a cache, 256 MB a GPU
ROUNDING = 1e-6         # squared distances below this share of the points' variance are taken for 0
SHORT = 10              # iterations after which only the best start goes on
FAR = 1e18              # the coordinates of a centroid that no point is to choose


def kmeans(x, k: int, n_init: int = 8, max_iter: int = 100, seed: int = 0):
    """Lloyd's algorithm (1982) from greedy k-means++ (Arthur & Vassilvitskii 2007), best of n_init starts.

    All starts run for SHORT iterations; the one that is best by then goes on until it stands still.
    x (..., N, C): leading dimensions are a batch, whose members come out as they would alone. Returns labels
    (..., N) int64, centroids (..., k, C) and inertia (...), the sum of squared distances to the centroids. A
    cluster that loses its last point is sown anew at the point farthest from its centroid; if there are fewer
    distinct points than k, the clusters left over stay empty and their centroids are nan. Points count as one
    if they are closer than a thousandth of the standard deviation, beyond what float32 tells apart.
    Raises ValueError for k outside 1..N and for values that are not finite.
    """
    x, k = torch.as_tensor(x), int(k)
    *batch, n, width = x.shape
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, it must be from 1 to the number of points, {n}")
    draws = torch.rand(n_init, k, 2 + int(math.log(k)), generator=make_generator(f"{seed}/kmeans")).to(x.device)
    parts = []
    for some in x.reshape(-1, n, width).split(max(1, GROUP[x.device.type] // (n * draws[:, 0].numel()))):
        mean = some.mean(1, keepdim=True, dtype=torch.float64).float()  # near the origin digits last longer
        if not mean.isfinite().all():
            raise ValueError("k-means needs finite points, these hold nan or infinity")
        some, problem = some.float() - mean, torch.arange(len(some), device=x.device)
        _, starts, inertia = _lloyd(some, _sow(some, draws), min(SHORT, max_iter))
        as_good = inertia <= (1 + 1e-5) * inertia.amin(1, keepdim=True)     # rounding is not to decide
        best = starts[problem, as_good.int().argmax(1), None]               # (P, 1, k, C)
        labels = _lloyd(some, best, max(1, max_iter - SHORT))[0][:, 0].long()
        flat = (labels + k * problem[:, None]).flatten()
        sums = some.new_zeros(len(some) * k, width).index_add_(0, flat, some.flatten(0, 1))
        centroids = (sums / torch.bincount(flat, minlength=len(sums))[:, None]).view(-1, k, width)
        own = centroids.gather(1, labels[..., None].expand_as(some))
        parts.append((labels, centroids + mean, (some - own).square().sum((1, 2))))
    labels, centroids, inertia = map(torch.cat, zip(*parts))
    return labels.view(*batch, n), centroids.view(*batch, k, width), inertia.view(batch)


def _lift(x):
    """x (P, N, C) -> [x, |x|^2, 1] (P, N, C + 2), the form in which a distance is one product."""
    return torch.cat([x, x.square().sum(-1, keepdim=True), torch.ones_like(x[..., :1])], -1)


def _squared(centroids, lifted, room):
    """Squared distances (P, M, N) from centroids (P, M, C), -2 c x + |x|^2 + |c|^2.

    They are written into `room`, a flat array: to have fresh memory each time takes as long as the product.
    """
    (P, M, _), N = centroids.shape, lifted.shape[1]
    sizes = centroids.square().sum(-1, keepdim=True)
    left = torch.cat([-2 * centroids, torch.ones_like(sizes), sizes], -1)
    return torch.bmm(left, lifted.mT, out=room[:P * M * N].view(P, M, N))


def _sow(x, draws):
    """Greedy k-means++: P problems (P, N, C) and uniform draws (I, k, trials) -> I starts each (P, I, k, C).

    Each centroid is one of `trials` points, drawn by their squared distance to the centroids so far: the one
    that lowers the sum of these distances the most. It is FAR if every point is a centroid already.
    """
    (P, N, C), (I, k, trials), lifted = x.shape, draws.shape, _lift(x)
    p, i = torch.arange(P, device=x.device)[:, None], torch.arange(I, device=x.device)
    little = ROUNDING * lifted[..., C].mean(1, keepdim=True)
    closest = torch.full((P, I, N), math.inf, device=x.device)
    centroids, room = x.new_empty(P, I, k, C), x.new_empty(P * I * trials * N)
    for j in range(k):
        up_to = (closest if j else torch.ones_like(closest)).cumsum(2)
        drawn = torch.searchsorted(up_to, draws[:, j] * up_to[..., -1:]).clamp(max=N - 1)   # (P, I, trials)
        points = x[p, drawn.flatten(1)]
        distances = _squared(points, lifted, room).view(P, I, trials, N)
        torch.minimum(distances, closest[:, :, None], out=distances)
        best = distances.sum(3).argmin(2)                                                   # (P, I)
        chosen = points.view(P, I, trials, C)[p, i, best]
        centroids[:, :, j] = torch.where((closest.amax(2) > little)[..., None], chosen, FAR)
        closest = distances[p, i, best].clamp_(min=0)
    return centroids


def _lloyd(x, centroids, max_iter):
    """P problems (P, N, C), I starts each (P, I, k, C) -> labels (P, I, N), centroids, rough inertia (P, I).

    A problem whose starts have all converged drops out. The sums change by the points that change cluster; as
    they are sums of lifted points, their last column is the clusters' sizes.
    """
    (_, N, C), (P, I, k, _), device = x.shape, centroids.shape, x.device
    labels, inertia = torch.empty(P, I, N, dtype=torch.int32, device=device), x.new_empty(P, I)
    ends = torch.empty_like(centroids)
    problem, own, nearest = torch.arange(P, device=device), torch.zeros_like(labels), x.new_empty(P, I, N)
    group = GROUP[device.type]
    sums, room = x.new_zeros(P, I, k, C + 2), x.new_empty(min(max(group, P * I * k), P * I * k * N))
    number, low = torch.arange(k, dtype=torch.int32, device=device)[:, None], 2 ** (k - 1).bit_length() - 1
    x = _lift(x)
    for iteration in range(max_iter):
        P, nearest = len(x), nearest[:len(x)]
        moved = torch.zeros(P, dtype=torch.bool, device=device)
        step = max(1, group // (P * I * max(k, C // 4)))
        for s in (slice(start, start + step) for start in range(0, N, step)):
            # The bits of a float >= 0 order as the float does: with the cluster's number in the lowest bits,
            # the least key tells distance and cluster, many times as fast as min with an index would.
            keys = _squared(centroids.flatten(1, 2), x[:, s], room).clamp_(min=0).view(torch.int32)
            keys = keys.bitwise_and_(~low).view(P, I, k, -1).bitwise_or_(number).amin(2)
            nearest[..., s], new = (keys & ~low).view(torch.float32), keys & low
            if iteration == 0:                          # all are new: a product is faster
                member = x.new_zeros(P, I, k, new.shape[2]).scatter_(2, new.long()[:, :, None], 1)
                sums += (member.flatten(1, 2) @ x[:, s]).view_as(sums)
                moved[:] = True
            else:
                p, i, n = (new != own[..., s]).nonzero(as_tuple=True)
                points, first = x[p, n + s.start], (p * I + i) * k
                for cluster, sign in (new[p, i, n], 1), (own[p, i, n + s.start], -1):
                    sums.view(-1, C + 2).index_add_(0, first + cluster, points, alpha=sign)
                moved[p] = True
            own[..., s] = new
        centroids = sums[..., :C] / sums[..., -1:]
        for p, i in (sums[..., -1] == 0).any(2).nonzero().tolist():
            empty = sums[p, i, :, -1] == 0
            far = nearest[p, i].topk(int(empty.sum()))
            apart = far.values > ROUNDING * x[p, :, C].mean()
            centroids[p, i, empty] = torch.where(apart[:, None], x[p, far.indices, :C], FAR)
        labels[problem], ends[problem], inertia[problem] = own, centroids, nearest.sum(2)
        if not moved.all():
            problem, x, centroids, own, sums = (a[moved] for a in (problem, x, centroids, own, sums))
        if not len(x):
            break
    return labels, ends, inertia


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


def ratio(x, y):
    """x / y, and 1 where y is 0: where there is nothing to tell apart, all is as it should be."""
    return np.where(y > 1e-9, x / np.where(y > 1e-9, y, 1), 1.0)[()]


def f1(classes, clusters):
    """Pairwise F1: how well "in one cluster" tells "of one class", over all pairs of points; 0 to 1.

    TP = sum C2(n_ij), P = TP / sum C2(b_j), R = TP / sum C2(a_i), F1 = 2 P R / (P + R); 1 if there are no
    pairs in either. Chance: 1 / K for even clusters, 2 / (K + 1) for a single one. (Manning, Raghavan &
    Schuetze 2008, chapter 16.)
    """
    n = contingency(classes, clusters)
    return ratio(2 * pairs(n).sum((-1, -2)), pairs(n.sum(-1)).sum(-1) + pairs(n.sum(-2)).sum(-1))


def matched_f1(classes, clusters):
    """The mean F1 of the classes, each matched to a cluster of its own so that most points agree; 0 to 1.

    F1 of class i and cluster j is 2 n_ij / (a_i + b_j), 0 for a class without a cluster; of matchings with as
    many points the one of highest F1 counts. Chance: somewhat over 1 / K, as the best of many is taken. (The
    matching is that of clustering accuracy, Yang et al. 2010.)
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
        late = 1e-12 * (row_of >= 0)                    # of columns as near, a free one is to come first
        length, came_from, price = np.full((batch, n), math.inf), np.zeros((batch, n), int), v.copy()
        done, reached, sink = np.full((batch, n), math.inf), np.zeros(batch), np.zeros(batch, int)
        b, row, came = np.arange(batch), np.full(batch, start), came_from
        # Dijkstra, in those (b) that have no free column yet; length, price, came and late are theirs alone,
        # and a column that is done has length inf and price -inf, so that it stays so
        while len(b):
            new = cost[b, row]
            new -= price
            new += (reached[b] - u[b, row])[:, None]
            shorter = new < length
            np.copyto(length, new, where=shorter)
            np.copyto(came, row[:, None], where=shorter)
            i, j = np.arange(len(b)), np.add(length, late, out=new).argmin(1)
            reached[b] = done[b, j] = length[i, j]
            length[i, j], price[i, j], sink[b], row = math.inf, -math.inf, j, row_of[b, j]
            if (row < 0).any():
                came_from[b], on = came, row >= 0
                b, row, length, price, came, late = (a[on] for a in (b, row, length, price, came, late))
        slack = np.where(done < math.inf, reached[:, None] - done, 0)
        v -= slack
        u[:, start] += reached
        b, j = np.nonzero((done < math.inf) & (row_of >= 0))
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
    return ratio(pairs(n).sum((-1, -2)) - expected, (a + b) / 2 - expected)


def information(n):
    """Entropies of classes and of clusters, and what they share, their mutual information; in nats."""
    def entropy(counts):
        p = counts / counts.sum(-1, keepdims=True)
        return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)

    of_classes, of_clusters = entropy(n.sum(-1)), entropy(n.sum(-2))
    return of_classes, of_clusters, of_classes + of_clusters - entropy(n.reshape(*n.shape[:-2], -1))


def nmi(classes, clusters):
    """Mutual information over the mean of the two entropies; 0 to 1, 1 if both partitions are one cluster.

    Chance is above 0, and the more so the fewer points a cluster has. (Strehl & Ghosh 2002; with this mean it
    is the V-measure, Rosenberg & Hirschberg 2007.)
    """
    a, b, shared = information(contingency(classes, clusters))
    return ratio(2 * shared, a + b)


def ami(classes, clusters):
    """Adjusted mutual information: 1 for the same partition, 0 at chance, negative below it.

    (I - E) / ((A + B) / 2 - E), where I is the mutual information, A and B the entropies, and E what I is on
    average over all clusterings of the same sizes; 1 if both partitions are one cluster, or single points.
    (Vinh, Epps & Bailey 2010.)
    """
    n = contingency(classes, clusters)
    a, b, shared = information(n)
    sizes = (np.sort(n.sum(axis).astype(int)).reshape(shared.size, -1).tolist() for axis in (-1, -2))
    expected = [expected_information(tuple(i), tuple(j)) for i, j in zip(*sizes)]
    expected = np.array(expected).reshape(shared.shape)
    return ratio(shared - expected, (a + b) / 2 - expected)


@functools.lru_cache(maxsize=1024)          # permuted labels ask for the same sizes again
def expected_information(a: tuple, b: tuple) -> float:
    """Mutual information, on average, of random partitions into sizes a and b: n_ij is hypergeometric."""
    total, value = sum(a), 0.0
    log_factorial = np.concatenate([[0], np.log(np.arange(1, total + 1)).cumsum()])
    for (x, many), (y, times) in itertools.product(*(Counter(size).items() for size in (a, b))):
        n = np.arange(max(1, x + y - total), min(x, y) + 1)
        log_p = (log_factorial[[x, y, total - x, total - y]].sum() - log_factorial[total] - log_factorial[n]
                 - log_factorial[x - n] - log_factorial[y - n] - log_factorial[total - x - y + n])
        value += many * times * (n / total * np.log(total * n / max(1, x * y)) * np.exp(log_p)).sum()
    return value


def bcubed_f1(classes, clusters):
    """The harmonic mean of precision and recall of a point, averaged over the points; above 0, to 1.

    A point's precision is the share of its cluster, itself included, that is of its class; its recall the
    share of its class that is in its cluster. Chance: somewhat over 1 / K, more if clusters are small. (Bagga
    & Baldwin 1998; Amigo et al. 2009.)
    """
    n = contingency(classes, clusters)
    precision, recall = (
        (n ** 2 / np.maximum(n.sum(axis, keepdims=True), 1)).sum((-1, -2)) for axis in (-2, -1))
    return 2 * precision * recall / (precision + recall) / n.sum((-1, -2))


def purity(classes, clusters):
    """The share of points that are of the most frequent class of their cluster; above 0, to 1.

    Chance: over 1 / K. Blind to classes that are split: single points have purity 1. (Manning et al. 2008.)
    """
    n = contingency(classes, clusters)
    return n.max(-2).sum(-1) / n.sum((-1, -2))


MEASURES = {        # one more line adds a measure to every row
    "f1": f1, "matched_f1": matched_f1, "ari": ari, "nmi": nmi, "ami": ami, "bcubed_f1": bcubed_f1,
    "purity": purity}


# ---------------------------------------------------------------- scores without a clustering


def means(x: torch.Tensor, classes) -> torch.Tensor:
    """x (..., N, C), classes (N,) from 0 -> the mean of each class (..., K, C), nan if it has no points."""
    member = F.one_hot(torch.as_tensor(classes, device=x.device)).to(x.dtype)
    return member.T @ x / member.sum(0)[:, None]


def nc1(x: torch.Tensor, classes) -> np.ndarray:
    """Within-class over between-class scatter, trace(S_W S_B^+) / K: x (..., N, C), classes (N,) -> (...).

    From 0, where each class has collapsed into one point; at chance, large. nan where all means are one.
    S_W is the mean square of a point about its class, S_B of a class about their mean. (Papyan, Han & Donoho
    2020.)
    """
    x, classes = x.double(), np.unique(classes, return_inverse=True)[1]
    x = x - x.mean(-2, keepdim=True)
    between, share = means(x, classes), np.bincount(classes) / len(classes)
    within = x.mT @ x / len(classes) - between.mT * torch.from_numpy(share).to(x.device) @ between
    between = between - between.mean(-2, keepdim=True)          # M: S_B = M^T M / K, and the two K cancel
    inverse = torch.linalg.pinv(between @ between.mT, rtol=1e-10, hermitian=True)
    value = (inverse @ between @ within @ between.mT @ inverse).diagonal(dim1=-2, dim2=-1).sum(-1)
    apart = between.square().sum((-1, -2)) > 1e-12 * x.square().sum((-1, -2))
    return torch.where(apart, value, math.nan).cpu().numpy()


def merge_ratio(distances: torch.Tensor, tasks) -> np.ndarray:
    """Mean distance between centroids of regexes of one task over that of regexes of different tasks.

    distances (..., D, D) between the centroids, tasks (D,) -> (...). 1 at chance, 0 where a task's regexes
    have merged; nan where no task has two, no two are of different tasks, or all centroids are one.
    """
    tasks = torch.as_tensor(tasks)
    same, off = tasks[:, None] == tasks, ~torch.eye(len(tasks), dtype=torch.bool)
    return (distances[..., same & off].mean(-1) / distances[..., ~same].mean(-1)).numpy()


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
    # Near the origin digits last longer; a mean rounded to a coarse power of two keeps exact ties exact.
    grid = 2 ** train.std(correction=0).clamp(min=1e-30).log2().floor()
    mean = (train.mean(0, dtype=torch.float64) / grid).round().float() * grid
    train, query = train - mean, query - mean
    norms, index = train.square().sum(1), torch.arange(len(train), device=train.device)
    found = index.new_empty(len(query), k)
    step = max(32, GROUP[train.device.type] // (8 * len(train)))
    squared, keys = train.new_empty(step, len(train)), index.new_empty(step, len(train))
    for some, into in zip(query.split(step), found.split(step)):
        near, key = squared[:len(some)], keys[:len(some)]
        torch.addmm(norms, some, train.T, alpha=-2, out=near).add_(some.square().sum(1, keepdim=True))
        # the bits of the distance (-0 made 0) order as it does, and the index below them settles ties
        key.copy_(near.clamp_(min=0).abs_().view(torch.int32)).bitwise_left_shift_(32).bitwise_or_(index)
        into.copy_(key.topk(k, largest=False).values & 0xFFFFFFFF)
    return found


def vote(labels: np.ndarray) -> np.ndarray:
    """The majority of labels (..., K), those of the nearest first -> (...); of a tie the nearest counts."""
    votes = sum(labels == labels[..., k:k + 1] for k in range(labels.shape[-1]))
    return np.take_along_axis(labels, votes.argmax(-1)[..., None], -1)[..., 0]


# ---------------------------------------------------------------- the probe of a run

N_NULL = 20             # permutations of the labels behind every null
NEIGHBOURS = 10         # states of subset that each state of val and ood is compared with
LOWER = "nc1", "merge_ratio"    # the less, the more clustered: these pass their null_95 from above

def numbered(labels):
    """Labels of any type as 0, 1, 2 and so on."""
    return np.unique(labels, return_inverse=True)[1]


VIEWS = {       # what is done to the states (..., n, C) of a split, whose identities are `ids`, at first
    "raw": lambda x, ids: x,
    "centred": lambda x, ids: x - means(x, numbered(ids["input"]))[..., numbered(ids["input"]), :],
    "standardised": lambda x, ids: (
        x - x.mean(-2, keepdim=True)) / x.std(-2, correction=0, keepdim=True).clamp(min=1e-6),
}


def kept_steps(run):
    """The steps whose captures are there; other files, as editors leave them, do not count."""
    return sorted(int(path.stem) for path in Path(run).glob("states/*.npz") if path.stem.isdecimal())


def read_states(run: str | Path, steps: list[int], split: str, position: str, n: int) -> torch.Tensor:
    """The states (S, L + 1, n, C) of a split at a position, float16. Raises ValueError for a damaged file."""
    name, states = f"{split}/{position}", []
    for step in steps:
        path = capture_path(run, step)
        states.append(read_arrays(path)[name])
        if states[-1].shape[1:2] != (n,) or states[-1].shape != states[0].shape:
            raise ValueError(f"{path} and {run}/states/labels.npz do not fit together: train the run again")
        if not np.isfinite(states[-1]).all():
            raise ValueError(f"{path} holds nan or infinity: train again with a lower lr")
    return torch.from_numpy(np.stack(states))


def surface(data: Dataset, names=CAPTURED) -> dict[str, torch.Tensor]:
    """No network at all: split -> (1, 1, n, F), how often each token and bigram is in an instruction."""
    bags = {}
    for name in names:
        split = data.splits[name]
        texts = (split.tokens[row, :column].tolist() for row, column in zip(*split.positions["instruction"]))
        bags[name] = [Counter([*text, *zip(text, text[1:])]) for text in texts]
    grams = {gram: None for some in bags.values() for bag in some for gram in bag}
    return {name: torch.tensor([[bag[gram] for gram in grams] for bag in some], dtype=torch.float)[None, None]
            for name, some in bags.items()}


def scores(states: torch.Tensor, ids: dict[str, np.ndarray], known=None, seed: int = 0):
    """Yield (identity, measure, labels, regex, score) for states (S, L + 1, n, C).

    score(labels) is (S, L + 1). regex (n,) numbers the regexes of the states where labels are their tasks, or
    is None. `known`, if given, is states and identities to find neighbours among. k-means is fitted to these
    states: the question is whether there are clusters, not whether those of others are found again.
    """
    task = ids["task"]
    pair = task * (1 + ids["distribution"].max()) + ids["distribution"]     # shuffled, a regex has many tasks
    _, one, regex = np.unique(pair, return_index=True, return_inverse=True)
    for identity, classes in ids.items():
        classes = np.unique(classes, return_inverse=True)[1]
        if identity == "input_set" and classes.max() == task.max() == len(set(zip(classes, task))) - 1:
            continue                        # each task has inputs of its own: this says what `task` does
        clusters = kmeans(states, classes.max() + 1, seed=seed)[0].cpu().numpy()    # (S, L + 1, n)
        for name, measure in MEASURES.items():
            yield (identity, name, classes, regex if identity == "task" else None,
                   lambda c, measure=measure, clusters=clusters: measure(c, clusters))
    yield "task", "nc1", task, regex, lambda c: np.stack([nc1(x, c) for x in states])
    centroids = torch.stack([means(x.float(), regex) for x in states])
    distances = torch.cdist(centroids, centroids, compute_mode="donot_use_mm_for_euclid_dist").cpu()
    yield "task", "merge_ratio", task[one], None, lambda c: merge_ratio(distances, c)
    if known:
        others, of_others = known
        near = torch.stack([knn(a, b, min(NEIGHBOURS, len(a))) for a, b in
                            zip(others.flatten(0, 1), states.flatten(0, 1))])
        near = near.view(*states.shape[:3], -1).cpu().numpy()                       # (S, L + 1, n, K)
        yield "task", "knn_share", of_others["task"], None, lambda c: (c[near] == task[:, None]).mean((2, 3))
        for identity in (key for key in ids if key in ("task", "output")):
            yield (identity, f"knn_{identity}", of_others[identity], None,
                   lambda c, own=ids[identity]: (vote(c[near]) == own).mean(2))


def progress(text: str):
    """Show what is being done in a line of a terminal that the next one replaces."""
    if sys.stderr and sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="\r", file=sys.stderr, flush=True)


def rows_of(score, labels, regex, seed: int, steps: list[int], **where) -> list[dict]:
    """Rows of probe.jsonl: score(labels), an array (S, L + 1), beside the same for permuted labels.

    Given the regex of each state there is a harder null, too, regrouped: the states of a regex stay together,
    and the regexes are dealt to the tasks at random.
    """
    def shuffled(array):
        generators = (make_generator(f"{seed}/null/{i}") for i in range(N_NULL))
        return (array[torch.randperm(len(array), generator=g).numpy()] for g in generators)

    values, low = score(labels), where["measure"] in LOWER
    nulls = {"null": [score(c) for c in shuffled(labels)], "regrouped": [np.full(values.shape, np.nan)]}
    if regex is not None:
        of_regex = labels[np.unique(regex, return_index=True)[1]]
        nulls["regrouped"] = [score(c[regex]) for c in shuffled(of_regex)]
    columns = {"value": values}
    for name, null in nulls.items():
        columns[name + "_mean"] = np.mean(null, 0)
        columns[name + "_95"] = (np.quantile(null, 0.05, 0, method="lower") if low else
                                 np.quantile(null, 0.95, 0, method="higher"))
    return [{"step": steps[s], "layer": layer, **where,
             **{name: None if math.isnan(x[s, layer]) else float(x[s, layer]) for name, x in columns.items()}}
            for s, layer in np.ndindex(values.shape)]


def probe(run: str | Path, views=("raw",)) -> list[dict]:
    """Score every capture of a run, at every layer, position and split, by every identity.

    Writes and returns the rows of probe.jsonl: step, layer, position, split, identity, measure, view, value,
    null_mean, null_95, and for clusterings by task regrouped_mean and regrouped_95; a number that is not
    defined is None. Position `surface` is no network's: counts of the instruction's tokens and bigrams, step
    0. View `centred` is only for states that have seen an input. Raises ValueError if nothing was captured,
    and for a run folder that is damaged.
    """
    seed, device, steps, rows = read_config(run).seed, pick_device(), kept_steps(run), []
    if not steps:
        raise ValueError(f"{run} has no captures: train it first")
    data = read_data(run)
    labels = {position: {split: data.splits[split].labels(position) for split in CAPTURED}
              for position in data.splits["val"].positions}     # position -> split -> identity -> (n,)
    labels["surface"], bags = labels["instruction"], surface(data)
    parts = [(view, position, split) for view, position, split in
             itertools.product(dict.fromkeys(views), labels, CAPTURED)
             if view != "centred" or "input" in labels[position][split]]
    for done, (view, position, split) in enumerate(parts):
        progress(f"{done} of {len(parts)} parts probed; now {view} states at {position} of {split}")
        ids, at = labels[position][split], [0] if position == "surface" else steps
        states = (bags[split] if position == "surface" else
                  read_states(run, steps, split, position, len(ids["task"])))
        states = states.to(device)
        if view != "raw":               # which may stay float16, half the memory
            states = VIEWS[view](states.float(), ids)
        if split == "subset":           # which comes first: the points that neighbours are sought among
            known = states, ids
        for identity, measure, of, regex, score in scores(
                states, ids, None if split == "subset" else known, seed):
            rows += rows_of(score, of, regex, seed, at, position=position, split=split, identity=identity,
                            measure=measure, view=view)
    progress("")
    write_rows(Path(run) / "probe.jsonl", rows)
    return rows


def emergence(steps: list[int], values, null) -> tuple[int, int] | None:
    """The first step since which values stay beyond null, and the first from there on at 90 % of the last.

    None if they are not beyond null at the end.
    """
    beyond = [x > bound for x, bound in zip(values, null)]
    since = len(beyond) - beyond[::-1].index(False) if False in beyond else 0
    return next(((steps[since], step) for step, x in zip(steps[since:], values[since:])
                 if x >= 0.9 * values[-1]), None)


def print_report(run: str | Path, rows: list[dict], beside: list[dict] = ()):
    """Print what the rows of one view say of val, and the last scores of task in another run, if given."""
    def val(some):
        return {tuple(row[key] for key in ("position", "identity", "measure", "step", "layer")): row
                for row in some if row["split"] == "val"}

    def line(head, *key, of, column="value", bound=False):
        at = [of[*key, layer] for layer in layers if (*key, layer) in of]
        if at:
            print(f"{head:30}" + "".join(f"{'-':>7} " if row[column] is None else f"{row[column]:7.2f} "
                                         for row in at)
                  + (f"   null {at[-1]['null_95']:.2f}" if bound and at[-1]["null_95"] is not None else ""))

    here, there = val(rows), val(beside)
    steps, layers = (sorted({row[key] for row in rows if row["position"] != "surface"})
                     for key in ("step", "layer"))
    accuracy = {row["step"]: row["acc_val"] for row in read_rows(f"{run}/metrics.jsonl")}
    scored = list(dict.fromkeys(key[:3] for key in here))
    clustered = [key for key in scored if key[1:] == ("task", "f1") and key[0] != "surface"]
    numbers = "layer" + "".join(f"{layer:2}      " for layer in layers)
    for key in clustered:
        print(f"\nDo states at `{key[0]}` cluster by task? Pairwise F1, unseen instructions (val), view "
              f"{rows[0]['view']}\n    step   val accuracy       {numbers}")
        for step in steps:
            line(f"{step:8}{accuracy.get(step, math.nan):12.3f}", *key, step, of=here)
        line("  null: labels permuted, 95 %", *key, steps[-1], of=here, column="null_95")
        line("  null: regrouped, 95 %", *key, steps[-1], of=here, column="regrouped_95")
        if key[0] == "instruction":
            line("  surface: counts, no network", "surface", *key[1:], 0, of=here)
        line("  the run beside, at its end", *key, max((key[3] for key in there), default=0), of=there)

    print(f"\nThe other scores, val, step {steps[-1]} (of nc1 and merge_ratio less is more). At the end\n"
          f"last layer, permuted, 95 %    {numbers}")
    for position, identity, measure in scored:
        if measure == "f1" or measure.startswith("knn") or (position, identity) == ("instruction", "task"):
            at = 0 if position == "surface" else steps[-1]
            line(f"{position} {identity} {measure}", position, identity, measure, at, of=here, bound=True)

    first = (next((step for step, x in accuracy.items() if x > level), "-") for level in (0.5, 0.9))
    print("\nWhat comes first, the cluster or the answer? Val accuracy passes 0.5 at step {}, 0.9 at {}.\n"
          "Pairwise F1: from which step on it is beyond its null (task: regrouped) / is at 90 % of its end"
          .format(*first) + f"\n{'':30}{numbers}")
    for position, identity, measure in scored:
        if measure == "f1" and position != "surface":
            null, cells = "regrouped_95" if identity == "task" else "null_95", []
            for layer in layers:
                at = [here[position, identity, measure, step, layer] for step in steps]
                both = emergence(steps, *([row[key] for row in at] for key in ("value", null)))
                cells.append("{}/{}".format(*both) if both else "-")
            print(f"{position + ' ' + identity:30}" + "".join(f"{cell:>8}" for cell in cells))

    print_heat(here, clustered, steps, layers, accuracy)


def print_heat(rows: dict, keys: list[tuple], steps: list[int], layers: list[int], accuracy: dict):
    """Print a heat table of scores and accuracy, as many captures as fit the terminal, in characters alone.

    rows: (*key, step, layer) -> row of probe.jsonl, for each of keys (position, identity, measure).
    """
    shades = "·░▒▓█" if "█".encode(getattr(sys.stdout, "encoding", None) or "ascii", "ignore") else ".-+*#"

    def shade(value, null=0):
        return "-" if value is None else shades[0 if value <= null else 1 + min(3, int(4 * value))]

    every = math.ceil(len(steps) / max(1, (shutil.get_terminal_size().columns - 9) // 2))
    shown = steps[::-1][::every][::-1]
    print(f"\nAt a glance: pairwise F1 of task, val, a column a capture, steps {shown[0]} to {shown[-1]}.\n"
          f"{shades[0]} within its null, regrouped; beyond it {shades[1]}, from 0.25 {shades[2]}, "
          f"0.5 {shades[3]}, 0.75 {shades[4]}; of accuracy, {shades[0]} is 0")
    for key in keys:
        print(f"at `{key[0]}`")
        for layer in reversed(layers):
            cells = (rows[*key, step, layer] for step in shown)
            print(f"layer {layer:2} " + "".join(2 * shade(x["value"], x["regrouped_95"]) for x in cells))
    print("accuracy " + "".join(2 * shade(accuracy.get(step)) for step in shown))


# ---------------------------------------------------------------- the causal test


def donors(split: Split, read: dict[str, np.ndarray], tasks: set[int], seed: int) -> np.ndarray:
    """(N,): for each prompt one of its input and columns, and another output; -1 if there is none.

    Both are of these tasks.
    """
    alike, rng, x = {}, random.Random(f"{seed}/donors"), split.instances
    keys = list(zip((one.input for one in x), *(columns.tolist() for columns in read.values())))
    for i, key in enumerate(keys):
        if x[i].task in tasks:
            alike.setdefault(key, []).append(i)
    others = ([j for j in alike.get(key, ()) if x[j].output != x[i].output and x[i].task in tasks]
              for i, key in enumerate(keys))
    return np.array([rng.choice(some) if some else -1 for some in others])


def exchanges(x, y, at, own, theirs, noise):
    """Yield (position, patch, mask (B, T), new (B, 1 or T, C)) for states x of prompts, y of their donors.

    `at` is where positions are read (B,), own and theirs both tasks' centroids there, noise unit vectors.
    """
    column = torch.arange(x.shape[1], device=x.device)
    for position, here in at.items():
        mask = column == here[:, None]
        state, apart = x[mask], theirs[position] - own[position]
        for name, new in {
                "own centroid": own[position], "centroid": theirs[position], "donor": y[mask],
                "random": state.norm(dim=1, keepdim=True) * noise, "shift": state + apart,
                "random shift": state + apart.norm(dim=1, keepdim=True) * noise}.items():
            yield position, name, mask, new[:, None]
    yield "span", "nothing", column[None] < 0, x
    yield "span", "donor", column <= at["instruction"][:, None], y


@torch.no_grad()
def patch(run: str | Path) -> list[dict]:
    """Are the clusters used? Exchange states of val's prompts, layer by layer, and see what is answered.

    Each prompt has a donor, a prompt of another task with the same input and another output. The state at a
    position becomes the centroid of its own task or of the donor's, the donor's state, or a random vector as
    long; or it is shifted by the difference of the two centroids, or randomly as far. Centroids are those of
    subset. The positive control, `span`, exchanges the states of the whole instruction. Writes and returns
    the rows of patch.jsonl: layer, position, patch, and the shares of n answers that become the donor's, stay
    right, do neither. Raises ValueError if the run has no checkpoint, or no prompt has a donor.
    """
    cfg, data = read_config(run), read_data(run)
    device = pick_device()          # wherever it was trained
    model = load_model(run, data)
    val, subset, generator = data.splits["val"], data.splits["subset"], make_generator(f"{cfg.seed}/patch")
    read = {position: columns[val.state_of(position)] for position, (_, columns) in val.positions.items()}
    donor = donors(val, read, {x.task for x in subset.instances}, cfg.seed)     # centroids are of subset
    if (donor < 0).all():
        raise ValueError("no two prompts of val have one input and two outputs: there is nothing to exchange")
    centroids = {position: means(torch.from_numpy(x).float(), subset.labels(position)["task"]).to(device)
                 for position, x in observe(model, subset)[1].items()}              # (L + 1, tasks, C)
    tokens, is_output, task = map(torch.from_numpy, (val.tokens, val.is_output, val.identities["task"]))
    told = Counter()
    parts = torch.from_numpy(np.flatnonzero(donor >= 0)).split(256)
    for done, own in enumerate(parts):
        progress(f"{done} of {len(parts)} parts exchanged")
        other = torch.from_numpy(donor)[own]
        prompt = torch.arange(tokens.shape[1]) <= torch.from_numpy(read["answer"])[own, None]
        # each prompt twice, answered as itself and as its donor
        texts = torch.cat([tokens[own], torch.where(prompt, tokens[own], tokens[other])]).to(device)
        scored = torch.cat([is_output[own], is_output[other]])[:, 1:].to(device)
        noise = F.normalize(torch.randn(len(own), cfg.n_embd, generator=generator)).repeat(2, 1).to(device)
        own, other = own.repeat(2), other.repeat(2)
        at = {position: torch.from_numpy(columns)[own].to(device) for position, columns in read.items()}
        states, of_donors = model(texts[:, :-1])[1], model(tokens[other, :-1].to(device))[1]
        for layer, (x, y) in enumerate(zip(states, of_donors)):
            both = ({position: c[layer, task[i]] for position, c in centroids.items()} for i in (own, other))
            for position, name, mask, new in exchanges(x, y, at, *both, noise):
                z = torch.where(mask[..., None], new, x)
                for block in model.blocks[layer:]:
                    z = block(z)
                said = (model.head(z).argmax(-1) == texts[:, 1:]) | ~scored             # (2 B, T - 1)
                told[layer, position, name] += said.all(1).view(2, -1).sum(1).cpu().numpy()
    progress("")
    n = int((donor >= 0).sum())
    rows = [{"layer": layer, "position": position, "patch": name, "donor": theirs / n, "right": right / n,
             "neither": (n - right - theirs) / n, "n": n}
            for (layer, position, name), (right, theirs) in ((key, x.tolist()) for key, x in told.items())]
    write_rows(Path(run) / "patch.jsonl", rows)
    return rows


def print_patch(rows: list[dict]):
    """Print the shares of answers that become the donor's and that stay right."""
    shares = {(row["position"], row["patch"], row["layer"]): row for row in rows}
    layers = sorted({row["layer"] for row in rows})
    print(f"Is the answer read from there? States of {rows[0]['n']:,} val prompts, exchanged at one layer:\n"
          "the share of answers that become the donor's, of another task / that stay right.\n"
          "Where `span donor` changes nothing, no state of the instruction is read any more.\n"
          f"{'':26}layer" + "".join(f"{layer:2}         " for layer in layers))
    for position, name in dict.fromkeys(key[:2] for key in shares):
        cells = (shares[position, name, layer] for layer in layers)
        print(f"{position:12}{name:16}" + "".join(f"{row['donor']:6.2f}/{row['right']:.2f}" for row in cells))


def main():
    """Cluster the captured states of a run and score the clusters, beside chance."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("run", help="a run folder, as train.py makes it")
    flags.add_argument("--view", nargs="+", choices=VIEWS, default=["raw"], help="how to look at states: as "
                       "they are, less the mean of their input's, each coordinate scaled (default: raw)")
    flags.add_argument("--beside", metavar="RUN", help="show the last scores of this run, too, probed before")
    flags.add_argument("--patch", action="store_true", help="instead, exchange states: what is answered?")
    given = flags.parse_args()
    if given.patch and (given.beside or given.view != ["raw"]):
        flags.error("--patch goes without --view and --beside")
    if given.patch:
        rows, name = patch(given.run), "patch.jsonl"
        print_patch(rows)
    else:
        beside = read_rows(Path(given.beside) / "probe.jsonl") if given.beside else []
        for view in given.view if given.beside else ():
            if all(row.get("view") != view for row in beside):
                raise ValueError(f"{given.beside} has no scores of view {view}: probe it with --view {view}")
        rows, name = probe(given.run, given.view), "probe.jsonl"
        for view in dict.fromkeys(given.view):
            of_view = [[row for row in some if row["view"] == view] for some in (rows, beside)]
            print_report(given.run, *of_view)
    print(f"\n{len(rows):,} rows in {Path(given.run) / name}")


if __name__ == "__main__":
    command_line(main)
