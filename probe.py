"""Do hidden states form clusters? Are the clusters the tasks? Do answers depend on them?

    python probe.py runs/default                      score every capture against chance, into probe.jsonl
    python probe.py runs/default --view raw centred   also subtract from each state the mean of its input
    python probe.py runs/default --patch              exchange states (activation patching), into patch.jsonl
    python probe.py FOLDER                            any model's states, in FOLDER/states: see README.md

Figures 2 and 4 of the paper, with controls. Scores come with a null, the same score computed on shuffled
labels. Clusterings by `task` face a harder one as well, `regrouped`: whole regexes are assigned to tasks at
random. Other controls: step 0 is the untrained network, layer 0 has not seen the instruction, and position
`surface` uses no network at all, only counts of tokens and bigrams. The paper does not say which F1 it uses;
ours is pairwise, over pairs of points.

Shapes: N points, C width, K classes or clusters, S captures (in k-means: starts), L blocks; (...) stands for
any batch dimensions, usually (S, L + 1).
"""
import math
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

from runs import (BadInput, Flags, capture_path, command_line, kept_steps, make_generator, pick_device,
                  read_arrays, write_rows)

import numpy as np
import torch
import torch.nn.functional as F

from data import cut
from train import load_model, make_labels, read_data

# ---------------------------------------------------------------- k-means

AT_ONCE = 2_000_000     # about how many distances to hold in memory at a time
SHORT = 4               # iterations before the worse half of the starts is dropped
FAR = 1e18              # in place of infinity, e.g. the coordinates of a centroid that has no points


def kmeans(x, k, n_init=8, max_iter=100, seed=0):
    """k-means: Lloyd's algorithm (1982), started by greedy k-means++ (Arthur & Vassilvitskii 2007).

    x (..., N, C), one or more problems -> labels (..., N), centroids (..., k, C) and inertia (...), the sum
    of squared distances to the centroids. All n_init starts run for SHORT iterations, the better half of them
    for SHORT more, and so on (successive halving); the last one left runs until it converges, for at most
    max_iter iterations. With fewer than k distinct points, some clusters stay empty; their centroids are nan.

    Raises BadInput for k outside 1..N and for points that are not finite.
    """
    x = torch.as_tensor(x).double()
    *batch, N, C = x.shape
    if not 1 <= k <= N:
        raise BadInput(f"k = {k} must be in 1..{N}, the number of points")
    size = k, n_init, 2 + int(math.log(k))              # (k, S, T): T candidates, as in scikit-learn
    draws = torch.rand(size, generator=make_generator(f"{seed}/kmeans")).to(x.device)
    found = []
    for points in x.reshape(-1, N, C):
        scaled = normalise(points)
        starts = plus_plus(scaled, draws)
        while len(starts) > 1:
            _, starts, costs = lloyd(scaled, starts, SHORT)
            starts = starts[costs.argsort()[:len(starts) // 2]]
        labels = lloyd(scaled, starts, max_iter)[0][0]
        centroids = means(points, labels, k)                    # of the original points
        inertia = (points - centroids[labels]).square().sum()
        found.append((labels, centroids, inertia))
    labels, centroids, inertia = map(torch.stack, zip(*found))
    return labels.view(*batch, N), centroids.view(*batch, k, C), inertia.view(batch)


def normalise(x):
    """Subtract the mean of points x (..., N, C) and divide by the largest absolute coordinate; float32.

    Clusters stay the same, and float32 is then precise enough whatever the origin and unit of x, unless one
    direction or point is 1,000 times larger than all others. Raises BadInput for nan and infinity.
    """
    x = x.double()
    x = x - x.mean(-2, keepdim=True)
    largest = x.abs().amax((-1, -2), keepdim=True)
    if not largest.isfinite().all():
        raise BadInput("points must be finite, but these contain nan or infinity: remove them")
    return (x / largest.clamp(min=1e-300)).float()


def squared_distances(centroids, x):
    """Squared distances from centroids (S, k, C) to points x (N, C): (S, k, N), some slightly below 0.

    |c - x|^2 = |c|^2 + |x|^2 - 2 c.x, with |x|^2 reduced a little, so that rounding leaves no point at a
    positive distance from itself. So points within 1e-3 |x| of each other count as one in plus_plus.
    """
    lengths = centroids.square().sum(2, keepdim=True) + x.square().sum(1) * (1 - 1e-6)
    return lengths.sub_(centroids @ x.T, alpha=2)


def plus_plus(x, draws):
    """Greedy k-means++: points x (N, C), uniform draws in 0..1 (k, S, T) -> S starts (S, k, C).

    For each new centroid, draw T candidate points, each with probability proportional to its squared distance
    from the nearest centroid so far, and keep the one that most reduces the sum of these distances. Once
    they are all 0, the remaining centroids are FAR.
    """
    N, C = x.shape
    k, S, _ = draws.shape
    centroids = x.new_empty(S, k, C)
    closest = x.new_full((S, N), FAR)                           # equal weights: any point may be first
    for j, draw in enumerate(draws):
        cumulative = closest.cumsum(1)
        # sample by inverting the cumulative distribution; right=True skips points of weight 0
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
    """Lloyd's algorithm on points x (N, C), from S starts at once: centroids (S, k, C).

    Returns labels (S, N), centroids (S, k, C), and for each start the sum of squared distances to the nearest
    centroid, before the centroids last moved (S,).
    """
    S, k, _ = centroids.shape
    labels = None
    for _ in range(max_iter):
        # each point joins its nearest centroid
        distance = x.new_empty(S, len(x))
        joined = torch.empty_like(distance, dtype=torch.long)
        step = AT_ONCE // (S * k) + 1
        # near and label are slices of distance and joined, filled by torch.min
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
    """Class means: x (..., N, C), classes (N,) numbered from 0 -> (..., K, C), nan if empty; K >= n."""
    classes = torch.as_tensor(classes, device=x.device)
    sizes = classes.bincount(minlength=n)
    totals = x.new_zeros(*x.shape[:-2], len(sizes), x.shape[-1]).index_add_(-2, classes, x)
    return totals / sizes[:, None]


def silhouette(x, clusters):
    """How well points x (N, C) fit their clusters (N,): the mean of (b - a) / max(a, b); -1 to 1.

    a is a point's mean distance to the other points of its cluster, b that to the points of the nearest other
    cluster. A point alone in its cluster counts as 0, as do all points if there is only one cluster.
    (Rousseeuw 1987.)
    """
    x = x.double()
    clusters = clusters.unique(return_inverse=True)[1]          # renumbered, to skip empty clusters
    own = range(len(x)), clusters
    distances = means(torch.cdist(x, x), clusters).T            # (N, k), from points to clusters
    sizes = clusters.bincount()[clusters]
    a = distances[own] * sizes / (sizes - 1)                    # leave out the point itself
    distances[own] = math.inf
    b = distances.amin(1)
    return ((b - a) / b.maximum(a)).nan_to_num().mean()


def choose_k(x):
    """How many clusters do points x (N, C) form, to within a tenth?

    Returns the k with the best silhouette among 1, 2, 3, 4, 5, 7, 9, 11, 14, 17, 21 and so on up to N / 5;
    k = 1 counts as 0. Needs memory for N x N distances.
    """
    scores = {1: 0}
    k = 2
    while k <= len(x) / 5:
        scores[k] = silhouette(x, kmeans(x, k, n_init=2)[0])
        k += 1 + k // 5
    return max(scores, key=scores.get)


# ---------------------------------------------------------------- scores of a clustering
# A measure takes classes (..., N) and clusters (..., N), whole numbers, and returns a float or array (...).
# n_ij: number of points of class i in cluster j; a_i: points of class i; b_j: points in cluster j.
# T, A, B: the sums of f(n_ij), f(a_i) and f(b_j), where f(x) is C2(x) = x (x - 1) / 2 or x log x.


def contingency(classes, clusters):
    """The contingency table n_ij, (..., rows, columns), as floats: rows are classes, columns clusters.

    Labels in 0..N serve as row and column numbers. Others are renumbered first, or the table could be huge.
    Raises ValueError for labels that are not whole numbers.
    """
    classes, clusters = np.broadcast_arrays(classes, clusters)
    *batch, N = classes.shape
    if not {classes.dtype.kind, clusters.dtype.kind} <= {*"biu"}:
        raise ValueError("classes and clusters must be whole numbers, one per point")
    classes, clusters = (
        (labels if 0 <= labels.min() <= labels.max() <= N else numbered(labels)).astype(int).ravel()
        for labels in (classes, clusters))
    rows = classes.max() + 1
    columns = clusters.max() + 1
    tables = math.prod(batch)
    row = np.arange(tables).repeat(N) * rows + classes          # tables stacked into one tall table
    n = np.bincount(row * columns + clusters, minlength=tables * rows * columns)
    return n.reshape(*batch, rows, columns).astype(float)


def numbered(labels):
    """Replace labels of any type by 0, 1, 2 and so on, in sorted order."""
    return np.unique(labels, return_inverse=True)[1]


def sums(n, f):
    """T, A, B and f(N), from which most of the measures are built."""
    return (f(n).sum((-1, -2)),
            f(n.sum(-1)).sum(-1),
            f(n.sum(-2)).sum(-1),
            f(n.sum((-1, -2))))


def pairs(x):
    """C2, the number of pairs among x points."""
    return x * (x - 1) / 2


def x_log_x(x):
    """x log x in nats, 0 at 0. If counts x add up to N, their entropy is log N - (sum of x log x) / N."""
    return x * np.log(np.maximum(x, 1))


def ratio(x, y):
    """x / y, but 1 where y is 0: there both partitions are trivial and identical."""
    return np.where(y > 1e-6, x / np.maximum(y, 1e-6), 1.0)[()]


def f1(classes, clusters):
    """Pairwise F1: over all pairs of points, how well does "same cluster" predict "same class"? 0 to 1.

    With f = C2, precision is T / B, recall T / A, and F1 = 2 T / (A + B); 1 if neither partition puts two
    points together. Chance: 1 / K for clusters of equal size, 2 / (K + 1) for a single cluster. (Manning,
    Raghavan & Schuetze 2008, chapter 16.)
    """
    T, A, B, _ = sums(contingency(classes, clusters), pairs)
    return ratio(2 * T, A + B)


def class_f1(classes, clusters):
    """Each class's best F1 over the clusters, max_j 2 n_ij / (a_i + b_j), averaged over classes; 0 to 1.

    Chance: somewhat above 1 / K, as each class takes the best of many clusters. (van Rijsbergen 1979; Larsen
    & Aone 1999, who weight classes by size.)
    """
    n = contingency(classes, clusters)
    a = n.sum(-1, keepdims=True)
    b = n.sum(-2, keepdims=True)
    return (2 * n / np.maximum(a + b, 1)).max(-1).sum(-1) / (a > 0).sum((-1, -2))


def ari(classes, clusters):
    """Adjusted Rand index (Hubert & Arabie 1985): 1 for identical partitions, 0 at chance, negative below.

    With f = C2, (T - E) / ((A + B) / 2 - E), where E = A B / C2(N) is the mean of T over all partitions with
    these cluster sizes. 1 if both partitions are a single cluster, or both put each point on its own.
    """
    T, A, B, whole = sums(contingency(classes, clusters), pairs)
    expected = A * B / np.maximum(whole, 1)
    return ratio(T - expected, (A + B) / 2 - expected)


def nmi(classes, clusters):
    """Normalised mutual information, i.e. divided by the mean of the two entropies; 0 to 1.

    With f = x log x, the entropies are log N - A / N and log N - B / N, and the mutual information is
    log N + (T - A - B) / N. 1 if both partitions are a single cluster. Chance is above 0, more so for small
    clusters. (Kvalseth 1987; with the arithmetic mean, this is the V-measure of Rosenberg & Hirschberg 2007.)
    """
    T, A, B, whole = sums(contingency(classes, clusters), x_log_x)
    return ratio(whole + T - A - B, whole - (A + B) / 2)


def ami(classes, clusters):
    """Adjusted mutual information: 1 for identical partitions, 0 at chance, negative below.

    (T - E) / ((A + B) / 2 - E) as in ari, but with f = x log x. (Vinh, Epps & Bailey 2010.)
    """
    n = contingency(classes, clusters)
    T, A, B, _ = sums(n, x_log_x)
    expected = np.reshape([expected_x_log_x(tuple(table.sum(1)), tuple(table.sum(0)))
                           for table in n.reshape(-1, *n.shape[-2:])], T.shape)
    return ratio(T - expected, (A + B) / 2 - expected)


@cache                                      # permuting labels leaves the sizes alone
def expected_x_log_x(a, b):
    """The mean of T = sum n_ij log n_ij over all pairs of partitions with class sizes a and cluster sizes b.

    Over these, each n_ij follows a hypergeometric distribution.
    """
    def log_choose(n, k):                   # -inf if impossible, hence probability 0
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
    """Share of points that belong to the most frequent class of their cluster; above 0, up to 1.

    Chance: above 1 / K. Splitting a class does not lower it: one cluster per point has purity 1. (Manning et
    al. 2008.)
    """
    n = contingency(classes, clusters)
    return n.max(-2).sum(-1) / n.sum((-1, -2))


# One more line adds a measure: MEASURES["name"] = a function of classes and clusters. (See LOWER, too.)
MEASURES = {"f1": f1, "class_f1": class_f1, "ari": ari, "nmi": nmi, "ami": ami, "purity": purity}


# ---------------------------------------------------------------- scores without a clustering


def nc1(x, classes):
    """Within-class over between-class scatter, trace(S_W S_B^+) / K: x (..., N, C), classes (N,) -> (...).

    S_W is the covariance of points about their class means, S_B that of the K class means about their own
    mean. 0 if each class has collapsed into one point; nan or inf if all class means coincide. The chance
    level depends strongly on the width, so compare only spaces of equal width. (Papyan, Han & Donoho 2020.)
    """
    x = torch.as_tensor(x)
    classes = numbered(classes)
    m = means(x, classes)
    m = m - m.mean(-2, keepdim=True)                            # S_B^+ / K = P P^T, where P = m^+ (C, K)
    along = x @ torch.linalg.pinv(m, rtol=1e-5)                 # project on P, (..., N, K)
    within = (along - means(along, classes)[..., classes, :]).square().sum((-1, -2)) / len(classes)
    apart = m.square().sum((-1, -2)) > 1e-12 * x.square().sum((-1, -2))
    return (within / apart).cpu().numpy()                       # 0 / 0 is nan


def regex_distances(x, units, inputs):
    """Distances between the mean states of every two units with the same input: (S, L + 1, D) for D pairs.

    x (S, L + 1, N, C). A unit is all points of one regex, task and input; units and inputs, both (N,), give
    those of each point. Also returns the index of one point from each unit of a pair, (D,) and (D,).
    """
    first = np.unique(units, return_index=True)[1]              # a point of each unit
    a, b = np.triu_indices(len(first), 1)
    a, b = np.compress(inputs[first[a]] == inputs[first[b]], [a, b], 1)
    # one capture at a time, to save memory
    distances = [(m[:, a] - m[:, b]).norm(dim=2).cpu().numpy() for m in means(x, numbered(units))]
    return np.array(distances), first[a], first[b]


def merge_ratio(distances, same):
    """Mean distance between regexes of the same task, divided by that between regexes of different tasks.

    distances (..., D) of pairs of regexes; same (D,) bool: do both describe the same task? 1 at chance, 0 if
    each task's regexes have merged; nan if one kind of pair is missing, or all regexes coincide.
    """
    with np.errstate(all="ignore"):
        return (distances @ same / same.sum()) / (distances @ ~same / (~same).sum())


def knn(train, query, k):
    """The k points of train (N, C) nearest to each point of query (Q, C): (Q, k) indices, nearest first.

    Distances are Euclidean, in float64; among equal distances, the lower index comes first. Raises BadInput
    for k outside 1..N and for points that are not finite.
    """
    train = torch.as_tensor(train).double()
    query = torch.as_tensor(query).double()
    if not (1 <= k <= len(train) and train.isfinite().all() and query.isfinite().all()):
        raise BadInput(f"k = {k} must be in 1..{len(train)}, the number of points, and the points finite")
    origin = train.median(0).values                             # near 0, rounding errors are smallest
    found = []
    for some in query.split(AT_ONCE // len(train) + 1):
        distances = torch.cdist(some - origin, train - origin)
        nearest = distances.topk(k, largest=False)
        tied = (distances <= nearest.values[:, -1:]).sum(1).max()
        if tied > k:                                            # topk chose freely among ties: get them all
            nearest = distances.topk(tied, largest=False)
        index = nearest.indices.sort(1).values                  # so that a stable sort puts lower ones first
        order = distances.gather(1, index).argsort(dim=1, stable=True)[:, :k]
        found.append(index.gather(1, order))
    return torch.cat(found)


def cosines(x, tasks):
    """Mean cosine between states of every two tasks: x (..., N, C), tasks (N,) -> (..., K, K).

    The mean of all states is subtracted first.
    """
    m = means(F.normalize(normalise(x), dim=-1), tasks)         # a mean of products u.v is a product of means
    return (m @ m.mT).cpu().numpy().round(5)                    # further digits are rounding error


def rsa(similar, overlap):
    """Representational similarity analysis (Kriegeskorte, Mur & Bandettini 2008).

    Pearson correlation, over all pairs of different tasks, between how similar their states are, (..., K, K),
    and how much the tasks overlap, (K, K). Returns (...), nan if either is constant.
    """
    one, other = np.triu_indices(len(overlap), 1)
    x = similar[..., one, other].reshape(-1, len(one))
    with np.errstate(all="ignore"):
        return np.corrcoef(overlap[one, other], x)[0, 1:].reshape(similar.shape[:-2])


# ---------------------------------------------------------------- from states to rows

N_NULL = 20             # draws per null
NEIGHBOURS = 10         # nearest states of subset to look at, for each state of another split
LOWER = "nc1", "merge_ratio"    # measures for which lower means more clustered

# View -> a label: before scoring, subtract from each state the mean of all states with the same label.
VIEWS = {"raw": None, "centred": "input", "unphrased": "phrasing"}


def deal(labels, units, groups, seed):
    """N_NULL random relabellings: within each group, shuffle the labels among units.

    labels, units and groups (N,) give the label, unit and group of each point. All points of a unit must have
    the same label and group; they move together, to the same new label. Each relabelling is (N,).
    """
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    labels = labels[first]
    group = groups[first]
    draws = []
    for i in range(N_NULL):
        keys = torch.rand(len(first), generator=make_generator(f"{seed}/null/{i}"))
        dealt = labels.copy()
        # both lists go group by group, the second shuffled within each: hand its labels to the first
        dealt[np.argsort(group, kind="stable")] = labels[np.lexsort((keys, group))]
        draws.append(dealt[unit])
    return draws


def make_rows(steps, identity, measure, score, labels, **nulls):
    """Score true and shuffled labels; return a row for each step and layer of score(labels), (S, L + 1).

    Each null, name -> a list of shuffled labels, adds NAME_mean and NAME_95: the mean of their scores and the
    most extreme. By chance, a score beats the best of 20 once in 21 times, so about 95 % do not. Undefined
    numbers are None.
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
    """Score states (S, L + 1, N, C) by every identity in labels, name -> (N,) of any type; return rows.

    A row has step, layer, identity, measure, value, and NAME_mean and NAME_95 of each null. k-means is fitted
    to the states that are scored. The nulls:
    - `null`: labels move between single states; given labels `input`, only between states of one input, so
      that clusters by input do not beat it. If the input determines the label, as it does the family in
      facts, whole inputs swap labels.
    - `regrouped`, for `task`, given labels `regex`: whole regexes move between tasks, so that clusters
      by regex do not beat it. Given `input`, N_NULL draws are made anew for each input and N_NULL once for
      all inputs, and a score must beat both.
    With few regexes (fewer than 4 tasks x 3) draws are often the true grouping, and no score can beat them.
    Other labels have `null` only: if alike within each regex, they beat it by clusters of regexes alone.
    Beware: states that add a part from the input to a part from the regex beat both (use view `centred`); and
    in view `unphrased`, nc1 and merge_ratio beat `regrouped` too easily (use F1).
    `rsa` compares tasks with overlaps, name -> (K, K), their other similarities; its null permutes the tasks.
    `best_k`, of identity `any`, is how many clusters the states form by themselves (choose_k): last step
    only, for at most 2,000 states, and only without labels `input`. It has no null.
    """
    x = normalise(torch.as_tensor(states))
    N = x.shape[2]
    rows = []

    ids = {identity: numbered(of) for identity, of in labels.items()}
    if "input" not in ids and N <= 2000:    # states that have seen an input cluster in several ways at once
        rows += make_rows(steps[-1:], "any", "best_k", lambda last: np.array([[*map(choose_k, last)]]), x[-1])
    inputs = ids.get("input", np.zeros(N, int))
    for identity, classes in ids.items():
        if identity == "input_set" and f1(ids.get("task", 0), classes) == 1:
            continue                        # no two tasks have the same inputs: this would repeat `task`
        fixed = len({*zip(inputs, classes)}) == len({*inputs})          # does the input determine the label?
        within = 0 * inputs if fixed else inputs                        # then whole inputs swap labels
        units = inputs if fixed and identity != "input" else np.arange(N)
        nulls = {"null": deal(classes, units, within, seed)}
        if identity == "task":
            if "regex" in ids:
                parts = ids["regex"] * N + classes       # (regex, task): of one task, unless shuffled
                cells = inputs if fixed else parts * N + inputs         # (regex, task, input)
                nulls["regrouped"] = deal(classes, cells, within, seed)
                if "input" in ids:                              # also draw once for all inputs
                    nulls["regrouped"] += deal(classes, parts, 0 * inputs, seed)
                distances, a, b = regex_distances(x, cells, inputs)
                rows += make_rows(steps, "task", "merge_ratio",
                                  lambda c: merge_ratio(distances, c[a] == c[b]), classes,
                                  regrouped=nulls["regrouped"])
            rows += make_rows(steps, "task", "nc1", lambda c: nc1(x, c), classes, **nulls)
            similar = cosines(x, classes)
            tasks = np.unique(classes)
            permuted = deal(tasks, tasks, 0 * tasks, seed)
            for name, overlap in overlaps.items():
                if len(overlap) == len(tasks) > 2:              # two tasks make only one pair
                    rows += make_rows(steps, name, "rsa",
                                      lambda p: rsa(similar, overlap[p][:, p]), tasks, null=permuted)
        clusters = kmeans(x, classes.max() + 1, seed=seed)[0].cpu().numpy()                 # (S, L + 1, N)
        for name, measure in MEASURES.items():
            rows += make_rows(steps, identity, name,
                              lambda c: measure(c, clusters), classes, **nulls)
    return rows


def score_neighbours(states, labels, known, known_labels, steps):
    """Score states (S, L + 1, N, C) by the labels of their nearest neighbours in known (S, L + 1, M, C).

    knn_LABEL: share of states whose neighbours' most frequent label (if tied, the lowest) is right.
    knn_share: share of neighbours with the right label. knn_share_other: the same, skipping neighbours of the
    state's own regex, if there are labels `regex`.
    Labels are whole numbers that mean the same for both. The null permutes those of known, within each input.
    Returns rows; none if known may hold too few states of other regexes, or has another width or depth.
    """
    M = known.shape[2]
    rows = []
    regex = known_labels.get("regex", np.arange(M))
    k = NEIGHBOURS + max(Counter(regex).values())               # enough, even without those of one regex
    if k > M or known.shape[1::2] != states.shape[1::2]:        # layers and width
        return rows
    near = np.array([[knn(*layer, k).cpu() for layer in zip(*some)]
                     for some in zip(known, states)])           # (S, L + 1, N, k)
    own_regex = regex[near] == labels.get("regex", np.full(1, -1))[:, None]
    others_first = np.argsort(own_regex, -1, kind="stable")     # False < True; ties stay nearest first
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


def task_similarities(labels, counts, name):
    """How similar are two tasks apart from their states? For `name`, a "split/position", identity -> (K, K).

    `input` and `output`: how many they share; `surface`: how alike their texts are. labels comes from
    read_labels, counts from surface. A position without inputs or outputs, such as `instruction`, borrows
    them from another position of its split, which must have the same tasks.
    """
    overlaps = {}
    for other in sorted(labels, key=lambda other: other == name):       # its own labels last: they win
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
    """Counts of tokens and bigrams, in place of states: name -> texts (N,) becomes name -> (N, grams)."""
    if not texts:
        return {}
    everything = [text for some in texts.values() for text in some]
    rows = []
    grams = []
    cut_into = "words" if " " in "".join(everything) else "characters"
    for i, text in enumerate(everything):
        tokens = cut(text, cut_into)
        # count "" once in every text, so that an empty text has a row, too
        some = ["", *tokens, *map(" ".join, zip(tokens, tokens[1:]))]
        rows += [i] * len(some)
        grams += some
    counts = torch.from_numpy(contingency(rows, numbered(grams))).split([*map(len, texts.values())])
    return dict(zip(texts, counts))


def read_labels(folder):
    """Read labels.npz: "split/position" -> identity -> labels (N,).

    For a run, labels are computed anew, so as to include identities added since. All but `text` are turned
    into whole numbers. The first position of a split that has `text` also becomes position `surface`, a
    reserved name. Raises BadInput if there is no labels.npz, or if identities differ in their number of
    labels.
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
        if where.count("/") != 1 or of.shape != (ids[next(iter(ids))].size,) or "/surface/" in name:
            raise BadInput(f"{path}: {name} must be named split/position/identity and hold one label per "
                           "state, as many as the other identities at that position")
        if identity == "text":
            labels.setdefault(f"{where.split('/')[0]}/surface", ids)
        else:                               # one numbering for all splits, so that they can be compared
            ids[identity] = np.array([numbers.setdefault(label, len(numbers))
                                      for label in ids[identity]])
    return labels


def read_states(folder, steps, name, n):
    """The states (S, L + 1, n, C) stored as `name`, e.g. val/answer. Raises BadInput if they do not fit."""
    captures = []
    for step in steps:
        path = capture_path(folder, step)
        x = read_arrays(path).get(name)
        if x is None:
            raise BadInput(f"{path} has no {name}: if its position is new in data.py, train again; in a folder "
                           "of your own, every capture must hold all that labels.npz has labels for")
        if x.dtype.kind != "f" or x.ndim != 3 or x.shape[1] != n or not x.size or not np.isfinite(x).all():
            raise BadInput(f"{path}: {name} must be finite floats, layers x {n} (as many as labels) x width, "
                           f"but it has the shape {x.shape} and type {x.dtype}")
        captures.append(x)
    if len({x.shape for x in captures}) != 1:
        raise BadInput(f"{folder}/states: {name} needs at least one capture, and the same shape in all; name "
                       "captures by six digits, 000100.npz")
    return torch.from_numpy(np.stack(captures))


def probe(folder, views=("raw",)):
    """Score every capture of a run, or of any folder of states, at every layer, position and split.

    Returns rows like those of score_states, plus view, position and split, and writes them to probe.jsonl.
    Position `surface` uses no network: counts of the tokens and bigrams in labels `text`, stored as step 0.
    View `centred` needs labels `input`, `unphrased` needs `phrasing`. Neighbours are from split `subset`.
    Raises BadInput if a view has nothing to score, or if the folder is damaged.
    """
    steps = kept_steps(folder)
    labels = read_labels(folder)
    counts = surface({name: ids["text"] for name, ids in labels.items() if name.endswith("/surface")})
    rows = []
    known = {}                              # (view, position) -> states and labels of subset
    # subset comes first, as the other splits look for neighbours in it
    for name in sorted(labels, key=lambda name: not name.startswith("subset/")):
        split, position = name.split("/")
        ids = {identity: of for identity, of in labels[name].items() if identity != "text"}
        if not ids:
            continue
        n = len(ids[min(ids)])              # of any identity
        if name in counts:
            at, states = [0], counts[name][None, None]
        else:
            at, states = steps, read_states(folder, steps, name, n)
        print(f"{name}: {n} states, {len(states[-1, -1].unique(dim=0))} distinct in the last layer")
        overlaps = task_similarities(labels, counts, name)
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
        raise BadInput(
            f"{folder}: labels.npz needs labels to score and, for each view, the one it subtracts: {VIEWS}")
    write_rows(f"{folder}/probe.jsonl", rows)
    print(f"{len(rows):,} scores are in {folder}/probe.jsonl")
    return rows


# ---------------------------------------------------------------- the report

SHADES = "·░▒▓█"        # the first marks scores no better than their null


def is_beyond(row):
    """Does a score beat its null, the harder one if there are two? False if score or null is undefined."""
    null = row.get("regrouped_95", row.get("null_95", 0))       # without a null, any positive score does
    if None in (null, row["value"]):
        return False
    return row["value"] < null if row["measure"] in LOWER else row["value"] > null


def print_report(rows):
    """Print the scores in the rows of one view: those of split val or, without val, of the first split."""
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
        # the table keeps only the last step; the heat table shows every step, but only one measure
        name = f"{row['position']} {row['identity']} {row['measure']}"
        dot = "" if beyond else "·"
        table[name][row["layer"]] = ("-" if value is None else f"{dot}{value:.2f}").rjust(7)
        if name == f"{row['position']} task f1":
            layer = f"{row['position']:12}layer {row['layer']:2}  "
            heat[layer] += 2 * SHADES[1 + min(3, int(4 * value)) if beyond else 0]

    print(f"\nAt a glance: pairwise F1 of task on {split}, two characters per capture, at steps "
          f"{', '.join(map(str, steps))}.\n"
          "· no better than chance; ░ better, ▒ from 0.25, ▓ from 0.5, █ from 0.75")
    for layer in sorted(heat, reverse=True):
        print(f"{layer}{heat[layer]}")
    print(f"\nScores of {split}, last step, view {rows[0]['view']}; lower is better: {', '.join(LOWER)}.\n"
          f"{SHADES[0]} no better than the best of {N_NULL} random relabellings; by chance, at most one in "
          f"{N_NULL + 1} is better.\n{'layer':36}{''.join(f'{layer:7}' for layer in layers)}")
    for name, cells in table.items():
        print(f"{name:36}{''.join(cells.values())}")
    missing = {"task", "regex", "input", "output", "surface", "subset"} - found
    if missing:
        print(f"Not scored (not in this view, or no labels): {', '.join(sorted(missing))}.")


# ---------------------------------------------------------------- the causal test


def exchanges(x, y, centroids, columns):
    """All exchanges to try: (position, patch) -> (mask, new states), which both broadcast to (n, T, C).

    x (n, T, C) are the states of n prompts at one layer, y those of their donors.
    columns: position -> (n,), the column of that position in each prompt.
    centroids: position -> (2, n, inputs, C), for each prompt and input the mean state of its own task (first)
    and of its donor's task (second), nan where the task lacks the input.
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
    """Do answers depend on the clusters? Replace states of val's prompts at one layer and see what changes.

    A prompt's donor has the same input, a different answer, and <sep> and <ans> in the same columns; prompts
    without a donor are left out. The state at one position is replaced by
        donor, centroid         the donor's state, or the mean state of the donor's task
        shift                   itself plus that mean minus the mean of its own task, over shared inputs
        random, random shift    a random vector of about its norm, or itself plus one as long as that shift
    or all states in a `span` by the donor's (`letters, <sep>` is the positive control). Means are over the
    prompts that have a donor. Answers are compared by their first token.

    Writes and returns the rows of patch.jsonl: layer, position, patch, n, the shares of n answers that equal
    the donor's (`donor`) and the prompt's own (`right`), and `next`, the total probability at <sep> of the
    inputs of the donor's task. Raises BadInput if the run has no checkpoint, or no prompt has a donor.
    """
    data = read_data(run)
    model = load_model(run, data).cpu()
    val = data.splits["val"]
    task = val.identities["task"]
    word = numbered(val.identities["input"])

    # the columns of <sep> and <ans>, and the tokens after them: the first of the input and of the answer
    at = {name: val.positions[name][1][val.state_of(name)] for name in ("instruction", "answer")}
    input_token, output_token = (val.tokens[range(len(task)), columns + 1] for columns in at.values())

    # sort prompts by input and columns, ties at random; the donor is the previous one, if it fits
    key = numbered([*map(str, zip(word, *at.values()))])
    luck = torch.rand(len(key), generator=make_generator("donors"))
    own = np.lexsort((luck, key))
    donor = np.roll(own, 1)
    fits = (key[own] == key[donor]) & (output_token[own] != output_token[donor])
    own, donor = own[fits], donor[fits]
    each = range(len(own))
    if not each:
        raise BadInput("no two prompts have the same input and different answers: nothing to exchange")
    expected = contingency(task, numbered(input_token))[task[donor]] > 0        # (n, tokens) of its task
    kept = {name: torch.from_numpy(columns[own]) for name, columns in at.items()}
    shape = len(data.tasks), word.max() + 1

    # at each layer, make every exchange and run the rest of the network
    rows = []
    tokens = torch.from_numpy(val.tokens[:, :-1])
    for layer, states in enumerate(model(tokens)[1]):
        x = states[own]
        centroids = {}
        for name, columns in kept.items():
            cells = means(x[each, columns], task[own] * shape[1] + word[own], math.prod(shape))
            centroids[name] = cells.unflatten(0, shape)[task[[own, donor]]]     # (2, n, inputs, C)
        for (position, name), (here, new) in exchanges(x, states[donor], centroids, kept).items():
            logits, _ = model.run_from(layer, new.where(here, x), tokens[own])
            answer = logits[each, kept["answer"]].argmax(1).numpy()
            p = logits[each, kept["instruction"]].softmax(1).numpy()
            rows.append({"layer": layer, "position": position, "patch": name, "n": len(each),
                         "donor": (answer == output_token[donor]).mean(),
                         "right": (answer == output_token[own]).mean(),
                         "next": float((p[:, np.unique(input_token)] * expected).sum(1).mean())})
    write_rows(f"{run}/patch.jsonl", rows)
    return rows


def print_patch(rows):
    """Print, for every patch and layer, what the network answers and which inputs it expects."""
    lines = defaultdict(str)
    for row in rows:
        shares = "/".join(f"{100 * row[share]:3.0f}" for share in ("donor", "right", "next"))
        lines[row["position"], row["patch"]] += f"   {shares}"
    print(f"What does the network answer if states are exchanged? {rows[0]['n']:,} val prompts, in percent:\n"
          "donor's answer / prompt's own answer / probability at <sep> of the inputs of the donor's task.\n"
          "States are exchanged at position instruction or answer, or over a span of tokens;\n"
          f"one column per layer, 0 to {rows[-1]['layer']}")
    for (position, name), cells in lines.items():
        print(f"{position:12}{name:14}{cells}")


def main():
    """Cluster the states of a run, or of any folder of states, and compare the scores with chance."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("folder", help="a run folder made by train.py, or any folder of states")
    flags.add_argument("--view", nargs="+", choices=VIEWS, default=["raw"],
                       help="subtract nothing (raw), the input's mean (centred), the phrasing's (unphrased)")
    flags.add_argument("--patch", action="store_true", help="activation patching of a run instead of scores")
    given = flags.parse_args()
    if given.patch:
        return print_patch(patch(given.folder))
    rows = probe(given.folder, given.view)
    for view in given.view:
        print_report([row for row in rows if row["view"] == view])


if __name__ == "__main__":
    command_line(main)
