"""Do hidden states form clusters? Are the clusters the tasks? Do answers depend on them?

    python probe.py runs/default                      score every capture against chance, into probe.jsonl
    python probe.py runs/default --view raw centred   also states minus the mean state of their input
    python probe.py runs/default --patch              exchange states (activation patching), into patch.jsonl
    python probe.py FOLDER                            any model's states, in FOLDER/states: see README.md

Figures 2 and 4 of the paper, with controls. Every score has a null: the same score of randomly permuted
labels. Scores by `task` have a harder one, `regrouped`: whole regexes are assigned to tasks at random. Step 0
is the untrained network, layer 0 has not seen the instruction, and position `surface` is no network but
counts of tokens and bigrams. The paper does not say which F1 it uses; ours counts pairs of points.

N points, C width, K classes or clusters, S captures (in k-means: starts), L blocks; (...) is any batch of
problems, usually (S, L + 1).
"""
import math
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

from data import Flags, command_line, cut

import numpy as np
import torch                # after data, which sets how torch's threads wait
import torch.nn.functional as F

from train import (capture_path, load_model, make_generator, make_labels, pick_device, read_arrays,
                   read_data, reading, write_rows)

# ---------------------------------------------------------------- k-means

AT_ONCE = 2_000_000     # distances held in memory at a time
SHORT = 4               # iterations after which only the better half of the starts goes on
FAR = 1e18              # stands for the coordinates of a centroid without points


def kmeans(x, k, n_init=8, max_iter=100, seed=0):
    """Lloyd's algorithm (1982) from greedy k-means++ (Arthur & Vassilvitskii 2007).

    x (..., N, C), one or more problems -> labels (..., N), centroids (..., k, C) and inertia (...), the sum
    of squared distances to the centroids. The n_init starts run for SHORT iterations, then the better half of
    them, and so on; the last one runs to its end, or for max_iter. With fewer distinct points than k, some
    clusters stay empty and their centroids are nan.

    Raises ValueError for k outside 1..N and for points that are not finite.
    """
    x = torch.as_tensor(x).double()
    *batch, N, C = x.shape
    if not 1 <= k <= N:
        raise ValueError(f"k = {k} must be in 1..{N}, the number of points")
    size = k, n_init, 2 + int(math.log(k))              # as many candidates as scikit-learn takes
    draws = torch.rand(size, generator=make_generator(f"{seed}/kmeans")).to(x.device)
    found = []
    for points in x.reshape(-1, N, C):
        scaled = normalise(points)
        starts = plus_plus(scaled, draws)
        while len(starts) > 1:
            _, starts, costs = lloyd(scaled, starts, SHORT)
            starts = starts[costs.argsort()[:len(starts) // 2]]
        labels = lloyd(scaled, starts, max_iter)[0][0]
        centroids = means(points, labels, k)                    # of the points as given
        inertia = (points - centroids[labels]).square().sum()
        found.append((labels, centroids, inertia))
    labels, centroids, inertia = map(torch.stack, zip(*found))
    return labels.view(*batch, N), centroids.view(*batch, k, C), inertia.view(batch)


def normalise(x):
    """x (..., N, C) minus its mean, divided by its largest absolute coordinate.

    Clusters stay the same, and float32 is then precise enough for any origin and unit, but not where one
    direction or point is 1,000 times larger than all others. Raises ValueError for nan and infinity.
    """
    x = x.double()
    x = x - x.mean(-2, keepdim=True)
    largest = x.abs().amax((-1, -2), keepdim=True)
    if not largest.isfinite().all():
        raise ValueError("points must be finite, these hold nan or infinity")
    return (x / largest.clamp(min=1e-300)).float()


def squared_distances(centroids, x):
    """From centroids (S, k, C) to points x (N, C): (S, k, N), some a little below 0.

    |x|^2 is made a little too small, so that rounding does not put a point away from itself. Points within
    1e-3 |x| of each other thus count as one when centroids are chosen.
    """
    lengths = centroids.square().sum(2, keepdim=True) + x.square().sum(1) * (1 - 1e-6)
    return lengths.sub_(centroids @ x.T, alpha=2)


def plus_plus(x, draws):
    """Greedy k-means++: points x (N, C), uniform draws in 0..1 (k, S, T) -> S starts (S, k, C).

    For each next centroid, T candidates are drawn in proportion to their squared distance to the nearest
    centroid so far, and the one that reduces the sum of these distances most is kept. Once they are all 0,
    the remaining centroids are FAR.
    """
    N, C = x.shape
    k, S, _ = draws.shape
    centroids = x.new_empty(S, k, C)
    closest = x.new_full((S, N), FAR)                           # equal weights: the first is any point
    for j, draw in enumerate(draws):
        cumulative = closest.cumsum(1)
        # inverse of the cumulative distribution; right=True skips points of weight 0
        drawn = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True).clamp(max=N - 1)
        candidates = x[drawn]                                   # (S, T, C)
        distances = squared_distances(candidates, x).clamp(min=0)
        distances = distances.minimum(closest[:, None])         # (S, T, N)
        best = distances.sum(2).argmin(1)
        chosen = candidates[range(S), best]
        centroids[:, j] = chosen.where(cumulative[:, -1:] > 0, FAR)
        closest = distances[range(S), best]
    return centroids


def lloyd(x, centroids, max_iter):
    """Lloyd's algorithm on points x (N, C) from several starts at once, (S, k, C).

    Returns labels (S, N), centroids (S, k, C), and the sums of squared distances before their last move (S,).
    """
    S, k, _ = centroids.shape
    labels = None
    for _ in range(max_iter):
        # each point joins its nearest centroid
        distance = x.new_empty(S, len(x))
        joined = torch.empty_like(distance, dtype=torch.long)
        step = AT_ONCE // (S * k) + 1
        for some, near, label in zip(x.split(step), distance.split(step, 1), joined.split(step, 1)):
            torch.min(squared_distances(centroids, some), 1, out=(near, label))

        # each centroid moves to the mean of its points
        centroids = torch.stack([means(x, label, k) for label in joined])
        empty = centroids[:, :, 0].isnan()
        centroids[empty] = FAR
        for s, j in empty.nonzero():
            far = distance[s].argmax()
            if distance[s, far] > 0:                # an empty cluster restarts at the farthest point
                centroids[s, j] = x[far]
                distance[s, far] = 0                # and the next empty one elsewhere
        if labels is not None and torch.equal(joined, labels):
            break
        labels = joined
    return joined, centroids, distance.clamp(min=0).sum(1)


def means(x, classes, n=0):
    """x (..., N, C), classes (N,) from 0 -> the mean of each class (..., K, C), nan if empty; K >= n."""
    classes = torch.as_tensor(classes, device=x.device)
    sizes = classes.bincount(minlength=n)
    totals = x.new_zeros(*x.shape[:-2], len(sizes), x.shape[-1]).index_add_(-2, classes, x)
    return totals / sizes[:, None]


def silhouette(x, clusters):
    """How well points x (N, C) fit their clusters (N,): the mean of (b - a) / max(a, b); -1 to 1.

    a is a point's mean distance to the others of its cluster, b to those of the nearest other cluster; a
    point alone in its cluster, or a single cluster, counts 0. (Rousseeuw 1987.)
    """
    x = x.double()
    clusters = clusters.unique(return_inverse=True)[1]          # without numbers that are nobody's
    own = range(len(x)), clusters
    distances = means(torch.cdist(x, x), clusters).T            # (N, k), of points to clusters
    sizes = clusters.bincount()[clusters]
    a = distances[own] * sizes / (sizes - 1)                    # the point itself does not count
    distances[own] = math.inf
    b = distances.amin(1)
    return ((b - a) / b.maximum(a)).nan_to_num().mean()


def choose_k(x):
    """How many clusters do points x (N, C) form, to within a tenth?

    Of k = 1, 2, 3, 4, 5, 7, 9, 11, 14, 17, 21 and so on to N / 5, the one with the best silhouette; that of 1
    counts as 0. Needs memory for N x N distances.
    """
    scores = {1: 0}
    k = 2
    while k <= len(x) / 5:
        scores[k] = silhouette(x, kmeans(x, k, n_init=2)[0])
        k += 1 + k // 5
    return max(scores, key=scores.get)


# ---------------------------------------------------------------- scores of a clustering
# A measure takes classes (..., N) and clusters (..., N), whole numbers, and gives a float or array (...).
# n_ij: the points of class i in cluster j; a_i: the points of class i; b_j: the points of cluster j.
# T, A, B: the sums of f(n_ij), f(a_i), f(b_j), where f is C2(x) = x (x - 1) / 2, or x log x.


def contingency(classes, clusters):
    """n_ij as floats, (..., K, K). Raises ValueError for labels that are not whole numbers.

    Numbers in 0..N are row and column numbers, others are renumbered, or the table would be huge.
    """
    classes, clusters = np.broadcast_arrays(classes, clusters)
    *batch, N = classes.shape
    if not {classes.dtype.kind, clusters.dtype.kind} <= {*"biu"}:
        raise ValueError("classes and clusters must be whole numbers, one for each point")
    classes, clusters = (
        (labels if 0 <= labels.min() <= labels.max() <= N else numbered(labels)).astype(int).ravel()
        for labels in (classes, clusters))
    rows = classes.max() + 1
    columns = clusters.max() + 1
    tables = math.prod(batch)
    row = np.arange(tables).repeat(N) * rows + classes          # the tables stacked by rows
    n = np.bincount(row * columns + clusters, minlength=tables * rows * columns)
    return n.reshape(*batch, rows, columns).astype(float)


def numbered(labels):
    """Labels of any type as 0, 1, 2 and so on, in sorted order."""
    return np.unique(labels, return_inverse=True)[1]


def sums(n, f):
    """T, A, B and f(N), which most scores of clusterings are made of."""
    return (f(n).sum((-1, -2)),
            f(n.sum(-1)).sum(-1),
            f(n.sum(-2)).sum(-1),
            f(n.sum((-1, -2))))


def pairs(x):
    """C2, the number of pairs among x points."""
    return x * (x - 1) / 2


def x_log_x(x):
    """x log x in nats, 0 at 0. Counts x that add up to N have entropy log N - sum x log x / N."""
    return x * np.log(np.maximum(x, 1))


def ratio(x, y):
    """x / y, but 1 where y is 0: both partitions are trivial, and the same."""
    return np.where(y > 1e-6, x / np.maximum(y, 1e-6), 1.0)[()]


def f1(classes, clusters):
    """Pairwise F1: how well "in one cluster" predicts "of one class", over all pairs of points; 0 to 1.

    With f = C2, precision is T / B, recall T / A, and F1 = 2 T / (A + B); 1 if neither puts two points
    together. Chance: 1 / K for even clusters, 2 / (K + 1) for a single one. (Manning, Raghavan & Schuetze
    2008, chapter 16.)
    """
    T, A, B, _ = sums(contingency(classes, clusters), pairs)
    return ratio(2 * T, A + B)


def class_f1(classes, clusters):
    """Each class's best F1 over the clusters, max_j 2 n_ij / (a_i + b_j), averaged over classes; 0 to 1.

    Chance: somewhat over 1 / K, as the best of many is taken. (van Rijsbergen 1979; Larsen & Aone 1999,
    who weight classes by size.)
    """
    n = contingency(classes, clusters)
    a = n.sum(-1, keepdims=True)
    b = n.sum(-2, keepdims=True)
    return (2 * n / np.maximum(a + b, 1)).max(-1).sum(-1) / (a > 0).sum((-1, -2))


def ari(classes, clusters):
    """Adjusted Rand index (Hubert & Arabie 1985): 1 for the same partition, 0 at chance, negative below it.

    With f = C2, (T - E) / ((A + B) / 2 - E), where E = A B / C2(N) is T on average over all partitions of
    these sizes. 1 if both are one cluster, or single points.
    """
    T, A, B, whole = sums(contingency(classes, clusters), pairs)
    expected = A * B / np.maximum(whole, 1)
    return ratio(T - expected, (A + B) / 2 - expected)


def nmi(classes, clusters):
    """Mutual information over the mean of the two entropies; 0 to 1, 1 if both partitions are one cluster.

    With f = x log x, the entropies are log N - A / N and log N - B / N, and the mutual information is
    log N + (T - A - B) / N. Chance is above 0, more so for small clusters. (Kvalseth 1987; with this mean it
    is the V-measure, Rosenberg & Hirschberg 2007.)
    """
    T, A, B, whole = sums(contingency(classes, clusters), x_log_x)
    return ratio(whole + T - A - B, whole - (A + B) / 2)


def ami(classes, clusters):
    """Adjusted mutual information: 1 for the same partition, 0 at chance, negative below it.

    As ari, (T - E) / ((A + B) / 2 - E), but with f = x log x. (Vinh, Epps & Bailey 2010.)
    """
    n = contingency(classes, clusters)
    T, A, B, _ = sums(n, x_log_x)
    expected = np.reshape([expected_x_log_x(tuple(table.sum(1)), tuple(table.sum(0)))
                           for table in n.reshape(-1, *n.shape[-2:])], T.shape)
    return ratio(T - expected, (A + B) / 2 - expected)


@cache                                      # permuted labels have the same sizes
def expected_x_log_x(a, b):
    """The sum of n_ij log n_ij, on average over all partitions into sizes a and b.

    Each n_ij has a hypergeometric distribution.
    """
    def log_choose(n, k):                   # -inf for what is impossible, which gets probability 0
        return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)

    b = torch.tensor(b)[:, None]
    total = b.sum()
    n = torch.arange(1, int(b.max()) + 1).double()
    value = 0
    for size, times in Counter(a).items():
        size = torch.tensor(size)
        log_p = log_choose(size, n) + log_choose(total - size, b - n) - log_choose(total, b)
        value += times * (log_p.exp() * n * n.log()).sum().item()
    return value


def purity(classes, clusters):
    """The share of points that are of the most frequent class of their cluster; above 0, to 1.

    Chance: over 1 / K. Splitting a class does not lower it: single points have purity 1. (Manning et al.)
    """
    n = contingency(classes, clusters)
    return n.max(-2).sum(-1) / n.sum((-1, -2))


# One more line adds a measure to every row: MEASURES["name"] = a function of classes and clusters.
MEASURES = {"f1": f1, "class_f1": class_f1, "ari": ari, "nmi": nmi, "ami": ami, "purity": purity}


# ---------------------------------------------------------------- scores without a clustering


def nc1(x, classes):
    """Within-class over between-class scatter, trace(S_W S_B^+) / K: x (..., N, C), classes (N,) -> (...).

    0 if each class has collapsed into one point. What chance gives depends strongly on the width, so compare
    only spaces of one width. nan or inf if all class means coincide. S_W is the mean square of a point about
    its class, S_B of a class about the mean of all classes. (Papyan, Han & Donoho 2020.)
    """
    x = torch.as_tensor(x)
    classes = numbered(classes)
    m = means(x, classes)
    m = m - m.mean(-2, keepdim=True)                            # S_B = m^T m / K, and the two K cancel
    along = x @ torch.linalg.pinv(m, rtol=1e-5)                 # (..., N, K): nothing of C x C is built
    within = (along - means(along, classes)[..., classes, :]).square().sum((-1, -2)) / len(classes)
    apart = m.square().sum((-1, -2)) > 1e-12 * x.square().sum((-1, -2))
    return (within / apart).cpu().numpy()                       # 0 / 0 is nan


def regex_distances(x, units, inputs):
    """Distances (S, L + 1, D) of the D pairs of units with the same input, between their mean states.

    x (S, L + 1, N, C). A unit is a regex of a task, with one input; units and inputs are (N,). Also returns a
    point of either unit of each pair, (D,) and (D,).
    """
    first = np.unique(units, return_index=True)[1]              # a point of each unit
    a, b = np.triu_indices(len(first), 1)
    a, b = np.compress(inputs[first[a]] == inputs[first[b]], [a, b], 1)
    # step by step, to save memory
    distances = [(m[:, a] - m[:, b]).norm(dim=2).cpu().numpy() for m in means(x, numbered(units))]
    return np.array(distances), first[a], first[b]


def merge_ratio(distances, same):
    """Mean distance between regexes of one task over that between regexes of different tasks.

    distances (..., D) of pairs of regexes; same (D,): are both of one task? 1 at chance, 0 if each task's
    regexes have merged; nan if no pair is of one task, or none is of two, or all coincide.
    """
    with np.errstate(all="ignore"):
        return (distances @ same / same.sum()) / (distances @ ~same / (~same).sum())


def knn(train, query, k):
    """The k points of train (N, C) nearest to each of query (Q, C): (Q, k) indices, nearest first.

    Distances are Euclidean, in float64; of those that come out equal the lower index comes first. Raises
    ValueError for k outside 1..N and points that are not finite.
    """
    train = torch.as_tensor(train).double()
    query = torch.as_tensor(query).double()
    if not (1 <= k <= len(train) and train.isfinite().all() and query.isfinite().all()):
        raise ValueError(f"k = {k} must be in 1..{len(train)}, the number of points, and the points finite")
    origin = train.median(0).values                             # distances near 0 are rounded least
    found = []
    for some in query.split(AT_ONCE // len(train) + 1):
        distances = torch.cdist(some - origin, train - origin)
        nearest = distances.topk(k, largest=False)
        tied = (distances <= nearest.values[:, -1:]).sum(1).max()
        if tied > k:                                            # topk took any of these: take them all
            nearest = distances.topk(tied, largest=False)
        index = nearest.indices.sort(1).values
        order = distances.gather(1, index).argsort(dim=1, stable=True)[:, :k]
        found.append(index.gather(1, order))
    return torch.cat(found)


def cosines(x, tasks):
    """x (..., N, C), tasks (N,) -> (..., K, K), the mean cosine between centred states of every two tasks."""
    m = means(F.normalize(normalise(x), dim=-1), tasks)
    return (m @ m.mT).cpu().numpy().round(5)                    # beyond that is rounding error


def rsa(similar, overlap):
    """Correlation of similar (..., K, K) and overlap (K, K) over pairs of tasks; nan if one is constant.

    Representational similarity analysis (Kriegeskorte, Mur & Bandettini 2008).
    """
    one, other = np.triu_indices(len(overlap), 1)
    x = similar[..., one, other].reshape(-1, len(one))
    with np.errstate(all="ignore"):
        return np.corrcoef(overlap[one, other], x)[0, 1:].reshape(similar.shape[:-2])


# ---------------------------------------------------------------- from states to rows

N_NULL = 20             # draws of every null
NEIGHBOURS = 10         # states of subset that each state of another split is compared with
LOWER = "nc1", "merge_ratio"    # lower is more clustered

# View -> the label whose mean state is subtracted from states before they are scored.
VIEWS = {"raw": None, "centred": "input", "unphrased": "phrasing"}


def deal(labels, units, groups, seed):
    """N_NULL relabellings of points: the units of a group swap their labels at random.

    labels, units and groups are (N,), as is each relabelling. All points of a unit have one label.
    """
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    labels = labels[first]
    group = groups[first]
    draws = []
    for i in range(N_NULL):
        keys = torch.rand(len(first), generator=make_generator(f"{seed}/null/{i}"))
        dealt = labels.copy()
        # a group's i-th unit gets the label of its i-th unit in a shuffled order
        dealt[np.argsort(group, kind="stable")] = labels[np.lexsort((keys, group))]
        draws.append(dealt[unit])
    return draws


def make_rows(steps, identity, measure, score, labels, **nulls):
    """Rows of score(labels) (S, L + 1), one per step and layer, beside what the nulls' labels score.

    A null, name -> draws of labels, adds NAME_mean and NAME_95: of 20 draws the most extreme, which a score
    passes by chance once in 21 times. Undefined numbers are None.
    """
    columns = {"value": score(labels)}
    rows = []
    for name, draws in nulls.items():
        scores = [score(draw) for draw in draws]
        columns[f"{name}_mean"] = np.mean(scores, 0)
        columns[f"{name}_95"] = np.min(scores, 0) if measure in LOWER else np.max(scores, 0)
    for s, layer in np.ndindex(columns["value"].shape):
        numbers = {name: float(column[s, layer]) for name, column in columns.items()}
        rows.append({"step": steps[s],
                     "layer": layer,
                     "identity": identity,
                     "measure": measure,
                     **{name: x if math.isfinite(x) else None for name, x in numbers.items()}})
    return rows


def score_states(states, labels, steps, seed=0, overlaps={}):
    """Score states (S, L + 1, N, C) by every identity of labels, name -> (N,) of any type; returns rows.

    A row has step, layer, identity, measure, value and its nulls: null_mean and null_95 of permuted labels;
    for the identity `task`, if there are labels `distribution`, regrouped_mean and regrouped_95 of regexes
    assigned to tasks at random. If there are labels `input`, labels are permuted among states of one input,
    since a task fixes its inputs; labels that the input fixes, as it does the family in facts, among whole
    inputs. Regexes are regrouped within each input and whole: states that know only the one are not to pass.
    (Those that know both, as two summands, do: see view centred. And in view unphrased the regrouped null is
    too easy for nc1 and merge_ratio, as it may put regexes of one phrasing together: read F1 there.)
    k-means is fitted to the states that are scored. At the last step, measure `best_k` of identity `any` says
    how many clusters up to 2,000 states have by themselves (choose_k), unless there are labels `input`.

    overlaps: name -> (K, K), how similar tasks are otherwise, for `rsa`, whose null permutes the tasks.
    """
    x = normalise(torch.as_tensor(states))
    N = x.shape[2]
    rows = []

    ids = {identity: numbered(of) for identity, of in labels.items()}
    if "input" not in ids and N <= 2000:    # where an input has been seen there are clusters of many kinds
        rows += make_rows(steps[-1:], "any", "best_k", lambda last: np.array([[*map(choose_k, last)]]), x[-1])
    inputs = ids.get("input", np.zeros(N, int))
    for identity, classes in ids.items():
        if identity == "input_set" and f1(ids.get("task", 0), classes) == 1:
            continue                        # each task has its own inputs: this would repeat `task`
        # does the input fix it, as it does the family in facts? Then all inputs are one group
        fixed = (classes[np.unique(inputs, return_index=True)[1]][inputs] == classes).all()
        within = inputs * ~fixed
        units = inputs if fixed and identity != "input" else np.arange(N)
        nulls = {"null": deal(classes, units, within, seed)}
        if identity == "task":
            if "distribution" in ids:
                parts = ids["distribution"] * N + classes       # shuffled tasks have parts of regexes
                units = parts * N * ~fixed + inputs             # if fixed, whole inputs are regrouped
                nulls["regrouped"] = deal(classes, units, within, seed)
                if "input" in ids:                              # else these would be the same draws
                    nulls["regrouped"] += deal(classes, parts, 0 * inputs, seed)
                distances, a, b = regex_distances(x, units, inputs)
                rows += make_rows(steps, "task", "merge_ratio",
                                  lambda c: merge_ratio(distances, c[a] == c[b]), classes,
                                  regrouped=nulls["regrouped"])
            rows += make_rows(steps, "task", "nc1", lambda c: nc1(x, c), classes, **nulls)
            similar = cosines(x, classes)
            tasks = np.unique(classes)
            permuted = deal(tasks, tasks, 0 * tasks, seed)
            for name, overlap in overlaps.items():
                if len(overlap) == len(tasks) > 2:              # two tasks are one pair: no correlation
                    rows += make_rows(steps, name, "rsa",
                                      lambda p: rsa(similar, overlap[p][:, p]), tasks, null=permuted)
        clusters = kmeans(x, classes.max() + 1, seed=seed)[0].cpu().numpy()                 # (S, L + 1, N)
        for name, measure in MEASURES.items():
            rows += make_rows(steps, identity, name,
                              lambda c: measure(c, clusters), classes, **nulls)
    return rows


def score_neighbours(states, labels, known, known_labels, steps):
    """Score states (S, L + 1, N, C) by the labels of the nearest known ones (S, L + 1, M, C); returns rows.

    knn_LABEL: does the majority of the nearest have the right label (of several majorities the lowest)?
    knn_share: what share of them has it? knn_share_other: the same, skipping states of the query's own regex,
    if regexes are known.
    Labels are whole numbers. The null permutes the known ones, within each input. No rows if too few could be
    left, or if states have another width or number of layers.
    """
    M = known.shape[2]
    rows = []
    regex = known_labels.get("distribution", np.arange(M))
    k = NEIGHBOURS + max(Counter(regex).values())
    if k > M or known.shape[1::2] != states.shape[1::2]:        # layers and width
        return rows
    near = np.array([[knn(*layer, k).cpu() for layer in zip(*some)]
                     for some in zip(known, states)])           # (S, L + 1, N, k)
    own_regex = regex[near] == labels.get("distribution", np.full(1, -1))[:, None]
    others_first = np.argsort(own_regex, -1, kind="stable")     # False comes first, nearest first
    others = np.take_along_axis(near, others_first, -1)[..., :NEIGHBOURS]
    near = near[..., :NEIGHBOURS]
    for identity in ("task", "output"):
        if identity in labels and identity in known_labels:
            own = labels[identity]
            theirs = known_labels[identity]
            null = deal(theirs, np.arange(M), known_labels.get("input", 0 * theirs), 0)
            scores = {f"knn_{identity}":
                      lambda c: (torch.as_tensor(c[near]).mode().values.numpy() == own).mean(-1),
                      "knn_share": lambda c: (c[near] == own[:, None]).mean((-1, -2)),
                      "knn_share_other": lambda c: (c[others] == own[:, None]).mean((-1, -2))}
            for name, score in scores.items():
                rows += make_rows(steps, identity, name, score, theirs, null=null)
    return rows


def find_overlaps(labels, counts, name):
    """identity -> (K, K): how many inputs, and outputs, two tasks share, how alike their texts are.

    labels and counts are those of read_labels and surface. A position without inputs or outputs, as
    `instruction`, takes them from another position of its split, and so must have the same tasks.
    """
    overlaps = {}
    for other in sorted(labels, key=lambda other: other == name):       # its own labels come last
        ids = labels[other]
        if other.startswith(f"{name.split('/')[0]}/") and "task" in ids:
            tasks = numbered(ids["task"])
            for identity in ("input", "output"):
                if identity in ids:
                    has = contingency(tasks, ids[identity]).clip(max=1)
                    overlaps[identity] = has @ has.T
            if other in counts:
                overlaps["surface"] = cosines(counts[other], tasks)
    return overlaps


def surface(texts):
    """No network at all: name -> texts (N,) becomes name -> counts of tokens and bigrams (N, grams)."""
    if not texts:
        return {}
    everything = [text for some in texts.values() for text in some]
    rows = []
    grams = []
    cut_into = "words" if " " in "".join(everything) else "characters"
    for i, text in enumerate(everything):
        tokens = cut(text, cut_into)
        # "" is in every text, so that an empty one has a row, too
        some = ["", *tokens, *map(" ".join, zip(tokens, tokens[1:]))]
        rows += [i] * len(some)
        grams += some
    counts = torch.from_numpy(contingency(rows, numbered(grams))).split([*map(len, texts.values())])
    return dict(zip(texts, counts))


def kept_steps(folder):
    """The steps whose captures are in a folder."""
    return sorted(int(path.stem) for path in Path(folder).glob("states/[0-9][0-9][0-9][0-9][0-9][0-9].npz"))


def read_labels(folder):
    """Labels (N,) by "split/position" and identity, from labels.npz.

    Those of a run are computed anew, so that identities added since are there. Labels are numbered, except
    `text`. The first position of a split with `text` is also its `surface`, a reserved name. Raises
    ValueError if there are no labels, or not as many of every identity.
    """
    path = f"{folder}/states/labels.npz"
    if Path(folder, "config.json").exists():
        arrays = make_labels(read_data(folder))
    else:
        arrays = read_arrays(path)
    labels = {}
    numbers = {}
    for name, of in arrays.items():
        where, _, identity = name.rpartition("/")
        ids = labels.setdefault(where, {})
        ids[identity] = of.astype(str)
        if where.count("/") != 1 or of.shape != (ids[min(ids)].size,) or "/surface/" in name:
            raise ValueError(f"{path}: {name} must be named split/position/identity, and hold a label for "
                             "each state, as many as other identities there")
        if identity == "text":
            labels.setdefault(f"{where.split('/')[0]}/surface", ids)
        else:                               # one numbering for all, so that splits can be compared
            ids[identity] = np.array([numbers.setdefault(label, len(numbers))
                                      for label in ids[identity]])
    return labels


def read_states(folder, steps, name, n):
    """The states (S, L + 1, n, C) stored as `name`, say val/answer. Raises ValueError if they do not fit."""
    with reading(f"{folder}/states", f"there must be captures, all with {name}, finite numbers, layers x {n} "
                 "(as many as labels) x width, the same at every step"):
        x = np.stack([read_arrays(capture_path(folder, step))[name] for step in steps])
        S, L, N, C = x.shape
        if N != n or not x.size or not np.isfinite(x).all():
            raise ValueError(x.shape)
        return torch.from_numpy(x)


def probe(folder, views=("raw",)):
    """Score every capture of a run, or of any folder of states, at every layer, position and split.

    Returns rows, as score_states does, with view, position and split, and writes them to probe.jsonl.
    Position `surface` is no network: counts of the tokens and bigrams in labels `text`, at step 0.
    View `centred` needs labels `input`, `unphrased` needs `phrasing`. Neighbours are those in split `subset`.
    Raises ValueError if there is nothing to score in some view, and for a folder that is damaged.
    """
    steps = kept_steps(folder)
    labels = read_labels(folder)
    counts = surface({name: ids["text"] for name, ids in labels.items() if name.endswith("/surface")})
    rows = []
    known = {}                              # (view, position) -> states and labels of subset
    # subset comes first, so that the others find their neighbours in it
    for name in sorted(labels, key=lambda name: not name.startswith("subset/")):
        split, position = name.split("/")
        ids = {identity: of for identity, of in labels[name].items() if identity != "text"}
        if not ids:
            continue
        n = len(ids[min(ids)])
        if name in counts:
            at, states = [0], counts[name][None, None]
        else:
            at, states = steps, read_states(folder, steps, name, n)
        print(f"{name}: {n} states, {len(states[-1, -1].unique(dim=0))} distinct in the last layer")
        overlaps = find_overlaps(labels, counts, name)
        for view in views:
            by = VIEWS[view]
            x = states.to(pick_device())
            if by in ids:
                x = x - means(x.double(), ids[by])[..., ids[by], :]
            elif by:
                continue
            scored = score_states(x, ids, at, overlaps=overlaps)
            if split == "subset":
                known[view, position] = x, ids
            elif (view, position) in known:
                scored += score_neighbours(x, ids, *known[view, position], at)
            rows += [{"view": view, "position": position, "split": split, **row}
                     for row in scored]
    if {row["view"] for row in rows} != {*views}:
        raise ValueError(f"{folder}: labels.npz lacks labels, or those that a view takes out, {VIEWS}")
    write_rows(f"{folder}/probe.jsonl", rows)
    print(f"{len(rows):,} scores are in {folder}/probe.jsonl")
    return rows


# ---------------------------------------------------------------- the report

SHADES = "·░▒▓█"        # the first is for what is not beyond its null


def is_beyond(row):
    """Does a score beat its null, the harder one if there are two? False if either is undefined."""
    null = row.get("regrouped_95", row.get("null_95", 0))       # no null: any positive number does
    if None in (null, row["value"]):
        return False
    return row["value"] < null if row["measure"] in LOWER else row["value"] > null


def print_report(rows):
    """Print what the rows of one view say of val, or of the first split there is."""
    found = {row[key] for row in rows for key in ("identity", "position", "split")}
    split = "val" if "val" in found else rows[0]["split"]
    steps = sorted({row["step"] for row in rows})
    layers = sorted({row["layer"] for row in rows})
    layers = [*layers[:-1:1 + len(layers) // 12], layers[-1]]   # at most 13 of them fit
    heat = defaultdict(str)
    table = defaultdict(dict)
    for row in rows:
        if row["split"] != split or row["layer"] not in layers:
            continue
        beyond = is_beyond(row)
        value = row["value"]
        # the table shows the last step, the heat table one measure at every step
        name = f"{row['position']} {row['identity']} {row['measure']}"
        dot = SHADES[0] * (not beyond)
        table[name][row["layer"]] = ("-" if value is None else f"{dot}{value:.2f}").rjust(7)
        if name == f"{row['position']} task f1":
            layer = f"{row['position']:12}layer {row['layer']:2}  "
            heat[layer] += 2 * SHADES[beyond and 1 + min(3, int(4 * value))]

    print(f"\nAt a glance: pairwise F1 of task on {split}, two characters per capture, at steps "
          f"{', '.join(map(str, steps))}.\n"
          f"{SHADES[0]} no better than chance; better: {SHADES[1]}, from 0.25 {SHADES[2]}, 0.5 {SHADES[3]}, "
          f"0.75 {SHADES[4]}")
    for layer in sorted(heat, reverse=True):
        print(f"{layer}{heat[layer]}")
    print(f"\nScores of {split}, last step, view {rows[0]['view']}; lower is better: {', '.join(LOWER)}.\n"
          f"{SHADES[0]} no better than the best of {N_NULL} random relabellings; by chance, one score in "
          f"{N_NULL + 1} is better.\n{'layer':36}{''.join(f'{layer:7}' for layer in layers)}")
    for name, cells in table.items():
        print(f"{name:36}{''.join(cells.values())}")
    missing = {"task", "distribution", "input", "output", "surface", "subset"} - found
    if missing:
        print(f"Not scored in this view, or for want of labels: {', '.join(sorted(missing))}.")


# ---------------------------------------------------------------- the causal test


def exchanges(x, y, centroids, columns):
    """(position, patch) -> a mask and new states, which both broadcast to (n, T, C).

    x (n, T, C) are states of n prompts, y those of their donors; columns: position -> (n,); centroids:
    position -> (2, n, inputs, C), the mean states of the own and the donor's task by input, nan where a task
    lacks an input.
    """
    column = torch.arange(x.shape[1])[:, None]
    sep = columns["instruction"][:, None, None]
    spans = {"letters": column < sep,
             "letters, <sep>": column <= sep,
             "from <sep> on": column >= sep}
    patches = {("span", name): (here, y) for name, here in spans.items()}
    noise = torch.randn(len(x), 1, x.shape[2], generator=make_generator("noise")) / x.shape[2] ** 0.5
    for position, at in columns.items():
        own, other = centroids[position]
        shift = (other - own).nanmean(1, keepdim=True)          # over the inputs that both tasks have
        new = {"donor": y,
               "centroid": other.nanmean(1, keepdim=True),
               "random": noise * x.norm(dim=2, keepdim=True),
               "shift": x + shift,
               "random shift": x + noise * shift.norm(dim=2, keepdim=True)}
        for name, states in new.items():
            patches[position, name] = column == at[:, None, None], states
    return patches


@torch.no_grad()
def patch(run):
    """Do answers depend on the clusters? Exchange states of val's prompts at one layer and see.

    A prompt's donor has the same input, another answer, and <sep> and <ans> in the same columns; prompts
    without a donor are left out. The state at a position becomes the donor's; the centroid of the donor's
    task or of its own; a random vector of the same norm; itself plus the difference of the two centroids;
    or itself plus a random vector of that norm. A `span` of states becomes the donor's: `letters, <sep>` is
    the positive control. Centroids are means over these prompts. An answer is known by its first token.

    Writes and returns the rows of patch.jsonl: layer, position, patch, n, the shares of n answers that equal
    the donor's (`donor`) and the own (`right`), and `next`, the probability at <sep> of the inputs of the
    donor's task. Raises ValueError if the run has no checkpoint, or no prompt has a donor.
    """
    data = read_data(run)
    model = load_model(run, data).cpu()
    val = data.splits["val"]
    task = val.identities["task"]
    word = numbered(val.identities["input"])

    # the columns of instruction and answer, and the tokens that follow them
    at = {name: val.positions[name][1][val.state_of(name)] for name in ("instruction", "answer")}
    asked, answers = (val.tokens[range(len(task)), columns + 1] for columns in at.values())

    # sort prompts by input and columns, at random among equals: the donor is the one before
    key = numbered([*map(str, zip(word, *at.values()))])
    luck = torch.rand(len(key), generator=make_generator("donors"))
    own = np.lexsort((luck, key))
    donor = np.roll(own, 1)
    fits = (key[own] == key[donor]) & (answers[own] != answers[donor])
    own, donor = own[fits], donor[fits]
    n = range(len(own))
    if not n:
        raise ValueError("no two prompts have one input and two answers: there is nothing to exchange")
    inputs = contingency(task, numbered(asked))[task[donor]] > 0        # of the donor's task (n, inputs)
    at = {name: torch.from_numpy(columns[own]) for name, columns in at.items()}
    size = len(data.tasks), word.max() + 1

    # at each layer, make every exchange and run the rest of the network
    rows = []
    for layer, states in enumerate(model(torch.from_numpy(val.tokens[:, :-1]))[1]):
        x = states[own]
        centroids = {}
        for name, columns in at.items():
            cells = means(x[n, columns], task[own] * size[1] + word[own], math.prod(size))
            centroids[name] = cells.unflatten(0, size)[task[[own, donor]]]
        for (position, name), (here, new) in exchanges(x, states[donor], centroids, at).items():
            z = new.where(here, x)
            for block in model.blocks[layer:]:
                z = block(z)
            logits = model.head(z)
            answer = logits[n, at["answer"]].argmax(1).numpy()
            p = logits[n, at["instruction"]].softmax(1).numpy()
            rows.append({"layer": layer, "position": position, "patch": name, "n": len(n),
                         "donor": (answer == answers[donor]).mean(),
                         "right": (answer == answers[own]).mean(),
                         "next": float((p[:, np.unique(asked)] * inputs).sum(1).mean())})
    write_rows(f"{run}/patch.jsonl", rows)
    return rows


def print_patch(rows):
    """Print, for every patch and layer, what is answered and what is expected next."""
    lines = defaultdict(str)
    for row in rows:
        shares = "/".join(f"{100 * row[share]:3.0f}" for share in ("donor", "right", "next"))
        lines[row["position"], row["patch"]] += f"   {shares}"
    print(f"What is answered if states are exchanged? {rows[0]['n']:,} prompts of val, in percent:\n"
          "the donor's answer / the own answer / probability at <sep> of the inputs of the donor's task,\n"
          "at positions instruction and answer, no others, and over spans of tokens;\n"
          f"a column per layer, 0 to {rows[-1]['layer']}")
    for (position, name), cells in lines.items():
        print(f"{position:12}{name:14}{cells}")


def main():
    """Cluster the states of a run, or of any folder of states, and score the clusters, beside chance."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("folder", help="a run folder, as train.py makes it, or any folder of states")
    flags.add_argument("--view", nargs="+", choices=VIEWS, default=["raw"],
                       help="states as they are (default), or minus the mean of their input, or phrasing")
    flags.add_argument("--patch", action="store_true", help="causal test of a run, instead")
    given = flags.parse_args()
    if given.patch:
        return print_patch(patch(given.folder))
    rows = probe(given.folder, given.view)
    for view in given.view:
        print_report([row for row in rows if row["view"] == view])


if __name__ == "__main__":
    command_line(main)
