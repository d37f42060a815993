"""Look into hidden states: do they form clusters, are these the tasks, are they used?

    python probe.py runs/default                      score every capture, beside chance, into probe.jsonl
    python probe.py runs/default --view raw centred   also with every input's mean state taken out
    python probe.py runs/default --patch              exchange states: is the answer read from them?
    python probe.py FOLDER                            states of any model, in FOLDER/states, see README.md

Figures 2 and 4 of the paper, and controls. Beside every score stands its null, the same score for permuted
labels, and for clusterings by task a harder one, regrouped: regexes stay whole and are dealt to tasks at
random. Step 0 is the untrained network, layer 0 has not seen the instruction, and position `surface` is no
network at all. The paper does not say which F1 it means: ours counts pairs of points. Nothing is centred or
scaled unless --view says so, and k is the number of classes.

N points, C width, K classes or clusters, S captures, L blocks, (...) a batch: most often (S, L + 1).
"""
import functools
import itertools
import math
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

from data import Flags, command_line, cut

import numpy as np
import torch                # after data, which sets how torch's threads wait
import torch.nn.functional as F

from train import (capture_path, load_model, make_generator, make_labels, observe, pick_device, read_arrays,
                   read_config, read_data, read_rows, write_rows)

# ---------------------------------------------------------------- k-means

AT_ONCE = {"cpu": 2_000_000, "cuda": 16_000_000}    # distances held at a time
SHORT = 10              # iterations after which only the best start goes on
ROUNDING = 1e-6         # a squared distance below this share of |x|^2 may be rounding alone: it counts as 0
FAR = 1e18              # the coordinates of a centroid that no point chooses


def kmeans(x, k, n_init=8, max_iter=100, seed=0):
    """Lloyd's algorithm (1982) from greedy k-means++ (Arthur & Vassilvitskii 2007), best of n_init starts.

    x (..., N, C), a batch of problems -> labels (..., N), centroids (..., k, C), inertia (...), the sum of
    squared distances to the centroids; the last two in float64. With fewer distinct points than k, clusters
    stay empty and their centroids are nan. All starts run SHORT iterations, the best goes on to max_iter.
    Raises ValueError for k outside 1..N, n_init or max_iter below 1, and values that are not finite.
    """
    x = torch.as_tensor(x)
    *batch, N, C = x.shape
    if not 1 <= k <= N or min(n_init, max_iter) < 1:
        raise ValueError(f"k = {k} must be in 1..{N}, n_init = {n_init} and max_iter = {max_iter} at least 1")
    trials = 2 + int(math.log(k))
    draws = torch.rand(n_init, k, trials, generator=make_generator(f"{seed}/kmeans")).to(x.device)
    results = []
    for some in x.reshape(-1, N, C).split(max(1, AT_ONCE[x.device.type] // (N * n_init * trials))):
        # centred in float64 and scaled: then float32 will do, whatever the origin and the unit
        mean = some.mean(1, keepdim=True, dtype=torch.float64)
        scale = (some - mean).abs().amax((1, 2), keepdim=True)
        if not scale.isfinite().all():
            raise ValueError("k-means needs finite points, these hold nan or infinity")
        points = ((some - mean) / scale.clamp(min=1e-300)).float()
        lifted, p = _lift(points), torch.arange(len(some), device=x.device)
        _, centroids, costs = _lloyd(lifted, _plus_plus(lifted, draws), min(SHORT, max_iter))
        best = centroids[p, _least(costs)][:, None]                             # (P, 1, k, C)
        labels, centroids, _ = (a[:, 0] for a in _lloyd(lifted, best, max(1, max_iter - SHORT)))
        inertia = (points - centroids[p[:, None], labels]).square().sum((1, 2)) * scale[:, 0, 0] ** 2
        results.append((labels, (centroids * scale + mean).where(centroids < FAR, math.nan), inertia))
    labels, centroids, inertia = map(torch.cat, zip(*results))
    return labels.view(*batch, N), centroids.view(*batch, k, C), inertia.view(batch)


def _least(costs):
    """(..., M) -> (...), the index of the least; of costs equal but for rounding, the first."""
    return (costs <= (1 + 1e-5) * costs.amin(-1, keepdim=True)).int().argmax(-1)


def _lift(x, rounding=ROUNDING):
    """(..., C) -> (..., C + 2), [x, 1, |x|^2]: its product with [-2c, |c|^2, 1] is a squared distance.

    |x|^2 is a little short, so that rounding leaves no distance > 0 between a point and itself.
    """
    length = x.square().sum(-1, keepdim=True)
    return torch.cat([x, torch.ones_like(length), (1 - rounding) * length], -1)


def _squared(centroids, lifted):
    """Squared distances (..., M, N) between centroids (..., M, C) and lifted points (..., N, C + 2)."""
    length = centroids.square().sum(-1, keepdim=True)
    return torch.cat([-2 * centroids, length, torch.ones_like(length)], -1) @ lifted.mT


def _plus_plus(x, draws):
    """Greedy k-means++: lifted x (P, N, C + 2), uniform draws (S, k, T) -> first centroids (P, S, k, C).

    Each centroid is the best of T points, drawn by their squared distance to the nearest centroid so far: the
    one that lowers the sum of these distances most. It is FAR if all points are centroids already.
    """
    (P, N, _), (S, k, T) = x.shape, draws.shape
    p, s = torch.arange(P, device=x.device)[:, None], torch.arange(S, device=x.device)
    centroids = x.new_empty(P, S, k, x.shape[2] - 2)
    closest = x.new_full((P, S, N), FAR)                        # at first all alike: the first is any point
    for j in range(k):
        up_to = closest.cumsum(2)
        drawn = torch.searchsorted(up_to, draws[:, j] * up_to[..., -1:], right=True).clamp(max=N - 1)
        candidates = x[p, drawn.flatten(1), :-2]                # (P, S T, C)
        distances = _squared(candidates, x).view(P, S, T, N).minimum(closest[:, :, None])
        best = _least(distances.sum(3))                         # (P, S)
        chosen = candidates.view(P, S, T, -1)[p, s, best]
        centroids[:, :, j] = chosen.where(up_to[..., -1:] > 0, FAR)
        closest = distances[p, s, best].clamp(min=0)
    return centroids


def _lloyd(x, centroids, max_iter):
    """Lloyd's algorithm: lifted x (P, N, C + 2), S starts each, (P, S, k, C).

    Returns labels (P, S, N), centroids (P, S, k, C) and costs (P, S), the sums of squared distances.
    A problem drops out once the labels of all its starts stand still.
    """
    (P, S, k, C), N = centroids.shape, x.shape[1]
    centroids, costs = centroids.clone(), x.new_empty(P, S)
    labels = torch.full((P, S, N), -1, device=x.device)
    moving = torch.arange(P, device=x.device)
    for _ in range(max_iter):
        nearest, new, sums = x.new_empty(len(moving), S, N), labels[moving], 0
        step = max(1, AT_ONCE[x.device.type] // (len(moving) * S * k))
        for some, near, label in zip(x[moving].split(step, 1), nearest.split(step, 2), new.split(step, 2)):
            distances = _squared(centroids[moving].flatten(1, 2), some).view(-1, S, k, some.shape[1])
            torch.min(distances, 2, out=(near, label))
            member = torch.zeros_like(distances).scatter_(2, label[:, :, None], 1)
            sums = sums + member.flatten(1, 2) @ some           # (P, S k, C + 2): the ones add up to sizes
        nearest.clamp_(min=0)
        sums, sizes, _ = sums.view(-1, S, k, C + 2).split([C, 1, 1], 3)
        means = (sums / sizes).where(sizes > 0, FAR)
        for p, s, j in (sizes[..., 0] == 0).nonzero().tolist():
            # an emptied cluster starts anew at the point farthest from its centroid, if there is one apart
            far = nearest[p, s].argmax()
            if nearest[p, s, far] > 0:
                means[p, s, j] = x[moving[p], far, :C]
                nearest[p, s, far] = 0
        moved = (new != labels[moving]).flatten(1).any(1)
        labels[moving], centroids[moving], costs[moving] = new, means, nearest.sum(2)
        moving = moving[moved]
        if not len(moving):
            break
    return labels, centroids, costs


# ---------------------------------------------------------------- scores of a clustering
# A measure takes classes (..., N) and clusters (..., N), whole numbers, and gives a float or array (...).
# n_ij counts points of class i in cluster j, a_i and b_j are its sums over j and i, C2(x) = x (x - 1) / 2.


def contingency(classes, clusters):
    """n_ij (..., classes, clusters), as floats. Raises ValueError for labels that do not belong together."""
    classes, clusters = np.asarray(classes), np.asarray(clusters)
    whole = classes.dtype.kind in "biu" and clusters.dtype.kind in "biu"
    if not whole or not classes.size or classes.shape[-1] != clusters.shape[-1]:
        raise ValueError("a clustering needs two whole numbers for each point, its class and its cluster")
    if min(classes.min(), clusters.min()) < 0 or max(classes.max(), clusters.max()) > classes.shape[-1]:
        classes, clusters = numbered(classes), numbered(clusters)       # or the table would be huge
    classes, clusters = classes.astype(np.int64), clusters.astype(np.int64)     # small types would overflow
    shape = *np.broadcast(classes, clusters).shape[:-1], classes.max() + 1, clusters.max() + 1
    cell = classes * shape[-1] + clusters                       # (..., N): which n_ij a point adds to
    cell = cell.reshape(-1, cell.shape[-1])
    cell = cell + shape[-1] * shape[-2] * np.arange(len(cell))[:, None]
    return np.bincount(cell.ravel(), minlength=math.prod(shape)).reshape(shape).astype(float)


def numbered(labels):
    """Labels of any type as 0, 1, 2 and so on, in sorted order."""
    return np.unique(labels, return_inverse=True)[1].reshape(np.shape(labels))


def pairs(x):
    """C2."""
    return x * (x - 1) / 2


def ratio(x, y):
    """x / y, and 1 where y is 0: where there is nothing to tell apart, all is as it should be."""
    return np.where(y > 1e-9, x / np.where(y > 1e-9, y, 1), 1.0)[()]


def f1(classes, clusters):
    """Pairwise F1: how well "in one cluster" predicts "of one class", over all pairs of points; 0 to 1.

    TP = sum C2(n_ij), P = TP / sum C2(b_j), R = TP / sum C2(a_i), F1 = 2 P R / (P + R); 1 if there are no
    pairs in either. Chance: 1 / K for even clusters, 2 / (K + 1) for a single one. (Manning, Raghavan &
    Schuetze 2008, chapter 16.)
    """
    n = contingency(classes, clusters)
    return ratio(2 * pairs(n).sum((-1, -2)), pairs(n.sum(-1)).sum(-1) + pairs(n.sum(-2)).sum(-1))


def class_f1(classes, clusters):
    """The mean over classes of max_j 2 n_ij / (a_i + b_j), F1 with the cluster that suits it best; 0 to 1.

    Chance: somewhat over 1 / K, as the best of many is taken. (van Rijsbergen 1979; Larsen & Aone 1999.)
    """
    n = contingency(classes, clusters)
    a, b = n.sum(-1, keepdims=True), n.sum(-2, keepdims=True)
    return (2 * n / np.maximum(a + b, 1)).max(-1).sum(-1) / (a > 0).sum((-1, -2))


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

    Chance is above 0, and the more so the fewer points a cluster has. (Kvalseth 1987; with this mean it is
    the V-measure, Rosenberg & Hirschberg 2007.)
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
def expected_information(a, b):
    """Mutual information, on average, of random partitions into sizes a and b: n_ij is hypergeometric."""
    total, value = sum(a), 0.0
    log_factorial = np.concatenate([[0], np.log(np.arange(1, total + 1)).cumsum()])
    for (x, many), (y, times) in itertools.product(*(Counter(size).items() for size in (a, b))):
        n = np.arange(max(1, x + y - total), min(x, y) + 1)
        log_p = (log_factorial[[x, y, total - x, total - y]].sum() - log_factorial[total] - log_factorial[n]
                 - log_factorial[x - n] - log_factorial[y - n] - log_factorial[total - x - y + n])
        value += many * times * (n / total * np.log(total * n / max(1, x * y)) * np.exp(log_p)).sum()
    return value


def purity(classes, clusters):
    """The share of points that are of the most frequent class of their cluster; above 0, to 1.

    Chance: over 1 / K. Blind to classes that are split: single points have purity 1. (Manning et al. 2008.)
    """
    n = contingency(classes, clusters)
    return n.max(-2).sum(-1) / n.sum((-1, -2))


# One more line adds a measure to every row: MEASURES["name"] = a function of classes and clusters.
MEASURES = {"f1": f1, "class_f1": class_f1, "ari": ari, "nmi": nmi, "ami": ami, "purity": purity}


# ---------------------------------------------------------------- scores without a clustering


def means(x, classes):
    """x (..., N, C), classes (N,) from 0 -> the mean of each class (..., K, C), nan if it has no points."""
    member = F.one_hot(torch.as_tensor(classes, device=x.device)).to(x.dtype)
    return member.T @ x / member.sum(0)[:, None]


def nc1(x, classes):
    """Within-class over between-class scatter, trace(S_W S_B^+) / K: x (..., N, C), classes (N,) -> (...).

    From 0, where each class has collapsed into one point; at chance large, and the larger the more dimensions
    there are. nan where all means coincide. S_W is the mean square of a point about its class, S_B of a class
    about their mean. (Papyan, Han & Donoho 2020.)
    """
    x, classes = torch.as_tensor(x).double(), numbered(classes)
    x = x - x.mean(-2, keepdim=True)
    of_class = means(x, classes)
    m = of_class - of_class.mean(-2, keepdim=True)              # S_B = M^T M / K, and the two K cancel
    inverse = torch.linalg.pinv(m @ m.mT, rtol=1e-10, hermitian=True)
    along = (x - of_class[..., classes, :]) @ m.mT @ inverse    # (..., N, K): nothing of C x C is built
    value = along.square().sum((-1, -2)) / len(classes)
    apart = m.square().sum((-1, -2)) > 1e-12 * x.square().sum((-1, -2))
    return torch.where(apart, value, math.nan).cpu().numpy()


def regex_distances(x, units):
    """Distances (S, L + 1, D, D) between the mean states of units: x (S, L + 1, N, C), units (N,)."""
    centroids = (means(some.float(), numbered(units)) for some in x)
    return np.stack([torch.cdist(c, c, compute_mode="donot_use_mm_for_euclid_dist").cpu() for c in centroids])


def merge_ratio(distances, tasks, groups):
    """Mean distance between regexes of one task over that between regexes of different tasks.

    Only regexes of one group, say, of one input, are compared: distances holds (..., D, D) for each group,
    tasks and groups (sum of D,) say of which task and group each regex is. 1 at chance, 0 where a task's
    regexes have merged; nan where no task has two, no two are of different tasks, or all coincide.
    """
    total, count = [0, 0], [0, 0]
    for group, distance in zip(np.unique(groups), distances):
        own = tasks[groups == group]
        same = own[:, None] == own
        for i, some in enumerate([same & ~np.eye(len(own), dtype=bool), ~same]):
            total[i] += distance[..., some].sum(-1)
            count[i] += some.sum()
    with np.errstate(invalid="ignore"):
        return (total[0] / count[0]) / (total[1] / count[1])


def knn(train, query, k):
    """The k points of train (N, C) nearest to each of query (Q, C): (Q, k) indices, nearest first.

    Distances are Euclidean; equal ones go by the index. Raises ValueError for k outside 1..N and values that
    are not finite.
    """
    train, query = torch.as_tensor(train).double(), torch.as_tensor(query).double()
    if not 1 <= k <= len(train):
        raise ValueError(f"k is {k}, it must be from 1 to the number of points, {len(train)}")
    if not (train.isfinite().all() and query.isfinite().all()):
        raise ValueError("neighbours need finite points, these hold nan or infinity")
    origin = train.median(0).values                             # where most points are, rounding is least
    unit = 2 ** (train - origin).abs().max().clamp(min=1e-300).log2().floor()       # keeps ties exact
    lifted, query, found = _lift((train - origin) / unit, 0), (query - origin) / unit, []
    for some in query.split(max(1, 4 * AT_ONCE[train.device.type] // len(train))):
        squared = _squared(some, lifted)
        farthest = squared.topk(k, largest=False).values[:, -1:]
        near = squared.topk(int((squared <= farthest).sum(1).max()), largest=False).indices.sort(1).values
        order = squared.gather(1, near).argsort(dim=1, stable=True)[:, :k]     # equal ones stay in order
        found.append(near.gather(1, order))
    return torch.cat(found)


def vote(labels):
    """The majority of labels (..., K), those of the nearest first -> (...); of a tie the nearest counts."""
    votes = sum(labels == labels[..., k:k + 1] for k in range(labels.shape[-1]))
    return np.take_along_axis(labels, votes.argmax(-1)[..., None], -1)[..., 0]


def cosines(x, tasks):
    """x (..., N, C), tasks (N,) -> (..., K, K), the mean cosine between centred states of every two tasks."""
    x = F.normalize(x.float() - x.float().mean(-2, keepdim=True), dim=-1)
    m = means(x, tasks)
    return (m @ m.mT).cpu().numpy()


def rsa(similar, overlap):
    """Correlation over pairs of tasks of two similarities (..., K, K) -> (...); nan where one does not vary.

    (Kriegeskorte, Mur & Bandettini 2008.)
    """
    above = np.triu_indices(len(overlap), 1)
    x, y = (z[..., *above] - z[..., *above].mean(-1, keepdims=True) for z in (similar, overlap))
    size = np.sqrt((x ** 2).sum(-1) * (y ** 2).sum(-1))
    return np.where(size > 1e-9, (x * y).sum(-1) / np.where(size > 1e-9, size, 1), math.nan)


# ---------------------------------------------------------------- from states to rows

N_NULL = 20             # draws of every null
NEIGHBOURS = 10         # states of subset that each state of another split is compared with
LOWER = "nc1", "merge_ratio"    # the less, the more clustered: these pass their null_95 from above

VIEWS = {       # what is done to states (..., N, C), whose inputs are numbered `inputs`, at first
    "raw": lambda x, inputs: x,                     # which may stay float16, half the memory
    "centred": lambda x, inputs: x.float() - means(x.float(), inputs)[..., inputs, :],
    "standardised": lambda x, inputs: F.layer_norm(x.float().mT, x.shape[2:3], eps=1e-12).mT,
}


def deal(labels, units, groups, seed):
    """The draws of a null: labels of units, dealt to the units at random within each group. All are (N,)."""
    first = np.unique(units, return_index=True)[1]              # a point of each unit
    labels, group, units = labels[first], groups[first], numbered(units)
    draws = []
    for i in range(N_NULL):
        order = torch.randperm(len(first), generator=make_generator(f"{seed}/null/{i}")).numpy()
        shuffled = order[np.argsort(group[order], kind="stable")]       # group by group, at random within
        dealt = np.empty_like(labels)
        dealt[np.argsort(group, kind="stable")] = labels[shuffled]
        draws.append(dealt[units])
    return draws


def beside(score, labels, **nulls):
    """score(labels) (S, L + 1) as `value`; of each null the mean, and the bounds that 95 % of draws keep."""
    columns = {"value": score(labels)}
    for name, draws in nulls.items():
        scores = [score(draw) for draw in draws]
        columns[f"{name}_mean"] = np.mean(scores, 0)
        columns[f"{name}_95"] = np.quantile(scores, 0.95, 0, method="higher")
        columns[f"{name}_5"] = np.quantile(scores, 0.05, 0, method="lower")
    return columns


def score_states(states, labels, steps, seed=0, known=None, overlaps=()):
    """Score states (S, L + 1, N, C) by every identity of labels, name -> (N,) of any type; return rows.

    A row has step, layer, identity, measure, value and its nulls: null_mean and null_95, of permuted labels,
    and for `task`, if there are labels `distribution`, regrouped_mean and regrouped_95: whole regexes are
    dealt to the tasks. If there are labels `input`, both are dealt within each input. A number that is not
    defined is None. k-means is fitted to these states: the question is whether there are clusters, not
    whether those of others are found again.

    known: (states, labels) to find neighbours among. overlaps: name -> (K, K), how much tasks have in common.
    """
    x, rows = torch.as_tensor(states), []
    number = {identity: numbered(of) for identity, of in labels.items()}
    everyone, task, regex = np.arange(x.shape[2]), number.get("task"), number.get("distribution")
    inputs = number.get("input", np.zeros(len(everyone), int))

    def add(identity, measure, columns):
        for s, layer in np.ndindex(columns["value"].shape):
            row = {"step": steps[s], "layer": layer, "identity": identity, "measure": measure}
            for name in "value", "null_mean", "null_95", "regrouped_mean", "regrouped_95":
                column = columns.get(name.replace("95", "5") if measure in LOWER else name)
                value = math.nan if column is None else float(column[s, layer])
                row[name] = None if math.isnan(value) else value
            rows.append(row)

    if task is not None and regex is not None:
        units = numbered([f"{i} {r} {t}" for i, r, t in zip(inputs, regex, task)])
    for identity, classes in number.items():
        if identity == "input_set" and task is not None and f1(task, classes) == 1:
            continue                        # each task has inputs of its own: this says what `task` does
        nulls = {"null": deal(classes, everyone, 0 * inputs if identity == "input" else inputs, seed)}
        if identity == "task" and regex is not None:
            nulls["regrouped"] = deal(classes, units, inputs, seed)
        clusters = kmeans(x, int(classes.max()) + 1, seed=seed)[0].cpu().numpy()            # (S, L + 1, N)
        for name, measure in MEASURES.items():
            add(identity, name, beside(lambda c: measure(c, clusters), classes, **nulls))
        if identity == "task":
            add(identity, "nc1", beside(lambda c: np.stack([nc1(some, c) for some in x]), classes, **nulls))

    if task is not None and regex is not None:
        first = np.unique(units, return_index=True)[1]
        group, of_unit = inputs[first], task[first]
        distances = [regex_distances(x[:, :, inputs == i], units[inputs == i]) for i in np.unique(inputs)]
        dealt = deal(of_unit, np.arange(len(first)), group, seed)
        add("task", "merge_ratio", beside(lambda c: merge_ratio(distances, c, group), of_unit, null=dealt))
    if task is not None and overlaps:
        similar = np.stack([cosines(some, task) for some in x])
        tasks = np.arange(similar.shape[-1])
        orders = deal(tasks, tasks, 0 * tasks, seed)
        for name, overlap in overlaps.items():
            if overlap.shape != similar.shape[-2:] or len(overlap) < 2:
                continue                    # of other tasks, or of a single one
            shuffled = [overlap[order][:, order] for order in orders]
            add(name, "rsa", beside(lambda o: rsa(similar, o), overlap, null=shuffled))
    if known and known[0].shape[-1] == x.shape[-1] and len(known[0][0]) == len(x[0]):
        others, of_others = torch.as_tensor(known[0]), known[1]
        near = find_neighbours(others, x, of_others.get("distribution", everyone[:1]))
        closest = near[..., :NEIGHBOURS]
        theirs = numbered(of_others["input"]) if "input" in of_others else np.zeros(others.shape[2], int)
        for identity in ("task", "output"):
            if identity in labels and identity in of_others:
                own, other = np.asarray(labels[identity]), np.asarray(of_others[identity])
                dealt = deal(other, np.arange(len(other)), theirs, seed)
                add(identity, f"knn_{identity}",
                    beside(lambda c: (vote(c[closest]) == own).mean(-1), other, null=dealt))
                if identity == "task":
                    add(identity, "knn_share",
                        beside(lambda c: (c[closest] == own[:, None]).mean((-1, -2)), other, null=dealt))
                    if regex is not None and "distribution" in of_others:
                        theirs_too = np.asarray(of_others["distribution"])[near]
                        of_own = theirs_too == np.asarray(labels["distribution"])[:, None]
                        if (~of_own).sum(-1).min() < NEIGHBOURS:
                            continue                                    # too few others
                        others_first = np.argsort(of_own, -1, kind="stable")[..., :NEIGHBOURS]
                        apart = np.take_along_axis(near, others_first, -1)
                        add(identity, "knn_share_other",
                            beside(lambda c: (c[apart] == own[:, None]).mean((-1, -2)), other, null=dealt))
    return rows


def find_neighbours(known, query, regex):
    """Indices (S, L + 1, Q, k) of the states of known that are nearest to each of query, nearest first.

    So many that NEIGHBOURS are left without those of any one regex.
    """
    k = min(NEIGHBOURS + np.unique(regex, return_counts=True)[1].max(), known.shape[2])
    near = [knn(a, b, int(k)) for a, b in zip(known.flatten(0, 1), query.flatten(0, 1))]
    return torch.stack(near).view(*query.shape[:3], -1).cpu().numpy()


def kept_steps(folder):
    """The steps whose captures are there; other files, as editors leave them, do not count."""
    return sorted(int(path.stem) for path in Path(folder).glob("states/*.npz") if path.stem.isdecimal())


def read_labels(folder):
    """position -> split -> identity -> (N,), from labels.npz, or made anew for a run: identities may be new.

    Raises ValueError if there are none, or not as many of every identity.
    """
    path = f"{folder}/states/labels.npz"
    arrays = make_labels(read_data(folder)) if is_run(folder) else read_arrays(path)
    labels = {}
    for name, of in arrays.items():
        split, position, identity, *more = [*name.split("/"), "", ""][:4]
        ids = labels.setdefault(position, {}).setdefault(split, {})
        ids[identity] = of
        if not identity or position == "surface" or of.ndim != 1 or not len(of) == len(ids[min(ids)]) > 0:
            raise ValueError(f"{path}: {name} must be called split/position/identity, and have as many "
                             "labels as other identities of that split and position")
    return labels


def is_run(folder):
    """Whether a folder is a run, rather than nothing but states."""
    return Path(folder, "config.json").exists()


def read_states(folder, steps, name, n):
    """The states (S, L + 1, n, C) called name, as split/position. Raises ValueError if they do not fit."""
    states = []
    for step in steps:
        path = capture_path(folder, step)
        x = read_arrays(path).get(name, np.zeros(0))
        states.append(x)
        if x.ndim != 3 or not x.size or x.shape[1] != n or x.shape != states[0].shape or x.dtype.kind != "f":
            raise ValueError(f"{path} and labels.npz do not fit: {name} must be floats, layers x {n} states "
                             "x width, at every step")
        if not np.isfinite(x).all() or float(np.abs(x).max()) > 1e30:
            raise ValueError(f"{path}: {name} holds nan or infinity, or over 1e30; train with a lower lr")
    return torch.from_numpy(np.stack(states))


def surface(texts):
    """No network at all: split -> texts (N,) becomes split -> (1, 1, N, F), counts of tokens and bigrams."""
    spaced = any(" " in text for some in texts.values() for text in some)
    bags = {}
    for split, some in texts.items():
        tokens = [cut(text, "words" if spaced else "characters") for text in some]
        bags[split] = [Counter([*of, *zip(of, of[1:])]) for of in tokens]
    grams = sorted({gram for some in bags.values() for bag in some for gram in bag}, key=str) or [""]
    return {split: torch.tensor([[[[bag[gram] for gram in grams] for bag in some]]], dtype=torch.float)
            for split, some in bags.items()}


def find_overlaps(labels, split, bags):
    """name -> (K, K), how many inputs and outputs every two tasks share, and how alike their letters are."""
    overlaps = {}
    for position, of in labels.items():
        ids = of.get(split, {})
        for identity in [key for key in ("input", "output") if key in ids and "task" in ids]:
            has = (contingency(numbered(ids["task"]), numbered(ids[identity])) > 0).astype(float)
            overlaps[identity] = has @ has.T
        if position == "surface" and "task" in ids:
            letters = F.normalize(means(bags[split][0, 0], numbered(ids["task"])), dim=-1)
            overlaps["surface"] = (letters @ letters.T).numpy()
    return overlaps


def progress(text):
    """Show what is being done in a line of a terminal that the next one replaces."""
    if sys.stderr and sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="\r", file=sys.stderr, flush=True)


def probe(folder, views=("raw",)):
    """Score every capture of a run, or of any folder of states, at every layer, position and split.

    Returns the rows of score_states, with view, position and split, and writes them to probe.jsonl if it can.
    Position `surface` is no network's: counts of the tokens and bigrams of labels `text`, step 0. View
    `centred` is only for states with labels `input`. Neighbours are sought among split `subset`. Raises
    ValueError if nothing was captured, and for a folder that is damaged.
    """
    steps, labels, rows, bags = kept_steps(folder), read_labels(folder), [], {}
    if not steps:
        raise ValueError(f"{folder} has no captures: train it first")
    seed = read_config(folder).seed if is_run(folder) else 0
    with_text = [of for of in labels.values() if all("text" in ids for ids in of.values())]
    if with_text:
        labels["surface"] = with_text[0]
        bags = surface({split: ids["text"].astype(str) for split, ids in with_text[0].items()})
    splits = {split for of in labels.values() for split in of}
    overlaps = {split: find_overlaps(labels, split, bags) for split in splits}
    for view, (position, of) in itertools.product(dict.fromkeys(views), labels.items()):
        known = None
        for split in sorted(of, key=lambda split: split != "subset"):       # first, to seek neighbours there
            ids = {identity: x for identity, x in of[split].items() if identity != "text"}
            if not ids or view == "centred" and "input" not in ids:
                continue
            progress(f"{view} states at {position} of {split}")
            n = len(ids[min(ids)])
            if position == "surface":
                at, states = [0], bags[split]
            else:
                at, states = steps, read_states(folder, steps, f"{split}/{position}", n)
            states = VIEWS[view](states.to(pick_device()), numbered(ids.get("input", np.zeros(n))))
            scored = score_states(states, ids, at, seed, known, overlaps[split])
            rows += [{"view": view, "position": position, "split": split, **row} for row in scored]
            if split == "subset":
                known = states, ids
    progress("")
    if not rows:
        raise ValueError(f"{folder}: labels.npz has no identity to score, or no `input` for view centred")
    try:
        write_rows(f"{folder}/probe.jsonl", rows)
    except OSError as e:
        print(f"the scores could not be kept: {e}")
    return rows


def emergence(steps, values, null):
    """The first step since which values stay beyond null, and the first from there on at 90 % of the last.

    None if they are not beyond null at the end.
    """
    beyond = [x > bound for x, bound in zip(values, null)]
    since = len(beyond) - beyond[::-1].index(False) if False in beyond else 0
    return next(((steps[since], step) for step, x in zip(steps[since:], values[since:])
                 if x >= 0.9 * values[-1]), None)


def bound(row):
    """The null that a score has to pass: of clusterings by task the harder one."""
    return row["null_95"] if row["regrouped_95"] is None else row["regrouped_95"]


def is_beyond(row):
    """Whether a score is beyond its null; not if one of them is undefined."""
    if row["value"] is None or bound(row) is None:
        return False
    return row["value"] < bound(row) if row["measure"] in LOWER else row["value"] > bound(row)


def print_report(folder, rows):
    """Print what the rows of one view say of val, or of the first split there is."""
    split = "val" if any(row["split"] == "val" for row in rows) else rows[0]["split"]
    cells = {(row["position"], row["identity"], row["measure"], row["step"], row["layer"]): row
             for row in rows if row["split"] == split}
    scored = list(dict.fromkeys(key[:3] for key in cells))
    steps, layers = (sorted({key[i] for key in cells if key[0] != "surface"}) for i in (3, 4))
    accuracy = {}
    if is_run(folder):
        accuracy = {row["step"]: row[f"acc_{split}"] for row in read_rows(f"{folder}/metrics.jsonl")}
    heat = [key for key in scored if key[1:] == ("task", "f1") and key[0] != "surface"]
    print_heat(cells, heat, steps, layers, accuracy)
    print(f"\nScores of {split}, step {steps[-1]}, view {rows[0]['view']}; less is more: nc1, merge_ratio.\n"
          "A dot: within its own null, the most extreme of 20 draws. By chance one score in 21 is beyond.\n"
          f"{'':36}layer{''.join(f'{layer:2}     ' for layer in layers)}")
    for key in scored:
        some = [cells.get((*key, 0 if key[0] == "surface" else steps[-1], layer)) for layer in layers]
        print(f"{' '.join(key):36}{''.join(map(cell, some))}")
    for key in heat:
        layers = sorted({layer for *other, _, layer in cells if tuple(other) == key})
        top = [cells[*key, step, layers[-1]] for step in steps]
        found = emergence(steps, [row["value"] for row in top], [bound(row) for row in top])
        print(f"\nAt `{key[0]}`, layer {layers[-1]}, F1 of task is beyond its null "
              f"{f'from step {found[0]} on' if found else 'at the end of training: never'}"
              f"; accuracy passes 0.5 at step {next((s for s, x in accuracy.items() if x > 0.5), '-')}.")


def cell(row):
    """A number of the table, with a dot if it is within its null; nothing where there is no row."""
    if row is None:
        return ""
    if row["value"] is None:
        return "-".rjust(7)
    return f"{'' if is_beyond(row) else shades()[0]}{row['value']:.2f}".rjust(7)


def shades():
    """Five shades that standard output can show; the first is for what is within its null."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    return "·░▒▓█" if "█".encode(encoding, "ignore") else ".-+*#"


def print_heat(rows, keys, steps, layers, accuracy):
    """Print a heat table of scores and accuracy, as many captures as fit the terminal, in characters alone.

    rows: (*key, step, layer) -> row of probe.jsonl, for each of keys (position, identity, measure).
    """

    def shade(value):
        return "-" if value is None else shades()[0 if value == 0 else 1 + min(3, int(4 * value))]

    every = math.ceil(len(steps) / max(1, (shutil.get_terminal_size().columns - 9) // 2))
    shown = steps[::-1][::every][::-1]
    print(f"\nAt a glance: pairwise F1 of task, val, a column a capture, steps {shown[0]} to {shown[-1]}.\n"
          "{0} within its null, regrouped; beyond it {1}, from 0.25 {2}, 0.5 {3}, 0.75 {4}; of accuracy, "
          "{0} is 0".format(*shades()))
    for key in keys:
        print(f"at `{key[0]}`")
        for layer in reversed(layers):
            cells = [rows[*key, step, layer] for step in shown if (*key, step, layer) in rows]
            if cells:
                values = (x["value"] if is_beyond(x) else 0 for x in cells)
                print(f"layer {layer:2} " + "".join(2 * shade(value) for value in values))
    print("accuracy " + "".join(2 * shade(accuracy.get(step)) for step in shown))


# ---------------------------------------------------------------- the causal test


def donors(split, read, tasks, seed):
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
def patch(run):
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


def print_patch(rows):
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
    """Cluster the states of a run, or of any folder of states, and score the clusters, beside chance."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("folder", help="a run folder, as train.py makes it, or any folder of states")
    flags.add_argument("--view", nargs="+", choices=VIEWS, default=["raw"], help="how to look at states: as "
                       "they are, less the mean of their input's, each coordinate scaled (default: raw)")
    flags.add_argument("--patch", action="store_true", help="instead, exchange states: what is answered?")
    given = flags.parse_args()
    if given.patch:
        print_patch(patch(given.folder))
        return
    rows = probe(given.folder, given.view)
    for view in dict.fromkeys(given.view):
        print_report(given.folder, [row for row in rows if row["view"] == view])
    print(f"\n{len(rows):,} rows in {given.folder}/probe.jsonl")


if __name__ == "__main__":
    command_line(main)
