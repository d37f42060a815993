"""Look into hidden states: do they form clusters, are these the tasks, and do answers depend on them?

    python probe.py runs/default                      score every capture, beside chance, into probe.jsonl
    python probe.py runs/default --view raw centred   also with each input's mean state subtracted
    python probe.py runs/default --patch              exchange states and see what is answered
    python probe.py FOLDER                            any model's states, in FOLDER/states: see README.md

Figures 2 and 4 of the paper, and controls. Every score stands beside its null, the same score of
randomly dealt labels. Scores by task have a second, harder null, `regrouped`: whole regexes are dealt to
tasks. Step 0 is the untrained network, layer 0 has not seen the instruction, and position `surface` is no
network at all. The paper does not say which F1 it uses; ours counts pairs of points. k is the number of
classes.

N points, C width, K classes or clusters, S captures, L blocks; (...) a batch, most often (S, L + 1).
"""
import math
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

from data import Flags, command_line, cut

import numpy as np
import torch                # after data, which sets how torch's threads wait
import torch.nn.functional as F

from train import (capture_path, load_model, make_generator, make_labels, pick_device, read_arrays,
                   read_data, read_rows, reading, write_rows)

# ---------------------------------------------------------------- k-means

AT_ONCE = 2_000_000     # distances held in memory at a time
SHORT = 10              # iterations after which only the best start goes on
FAR = 1e18              # the coordinates of a centroid that has no points


def kmeans(x, k, n_init=8, max_iter=100, seed=0):
    """Lloyd's algorithm (1982) from greedy k-means++ (Arthur & Vassilvitskii 2007).

    x (..., N, C), a batch of problems -> labels (..., N), centroids (..., k, C) and inertia (...), the sum
    of squared distances to the centroids. All n_init starts run for SHORT iterations, then the best one for
    max_iter. With fewer distinct points than k, some clusters stay empty and their centroids are nan.

    Raises ValueError for k outside 1..N, n_init or max_iter below 1, and points that are not finite.
    """
    x = torch.as_tensor(x).double()
    *batch, N, C = x.shape
    if not 1 <= k <= N or min(n_init, max_iter) < 1:
        raise ValueError(f"k = {k} must be in 1..{N}, n_init = {n_init} and max_iter = {max_iter} "
                         "at least 1")
    size = k, n_init, 2 + int(math.log(k))
    draws = torch.rand(size, generator=make_generator(f"{seed}/kmeans")).to(x.device)
    found = []
    for points in x.reshape(-1, N, C):
        lifted = lift(normalise(points))
        starts = plus_plus(lifted, draws)
        _, starts, costs = lloyd(lifted, starts, min(SHORT, max_iter))
        best = starts[costs.argmin()]
        labels = lloyd(lifted, best[None], max_iter)[0][0]
        centroids = means(points, labels, k)                    # in float64
        inertia = (points - centroids[labels]).square().sum()
        found.append((labels, centroids, inertia))
    labels, centroids, inertia = map(torch.stack, zip(*found))
    return labels.view(*batch, N), centroids.view(*batch, k, C), inertia.view(batch)


def normalise(x):
    """x (..., N, C) minus its mean, divided by its largest coordinate, in float32.

    Clusters stay the same, and float32 becomes precise enough whatever the origin and the unit. Raises
    ValueError for nan and infinity.
    """
    x = x.double()
    x = x - x.mean(-2, keepdim=True)
    largest = x.abs().amax((-1, -2), keepdim=True)
    if not largest.isfinite().all():
        raise ValueError("points must be finite, these hold nan or infinity")
    return (x / largest.clamp(min=1e-300)).float()


def lift(x):
    """(N, C) -> (N, C + 2), [x, 1, |x|^2], whose product with [-2 c, |c|^2, 1] is a squared distance.

    |x|^2 is made a little too small, so that rounding never puts a distance between a point and itself.
    """
    length = x.square().sum(1, keepdim=True)
    return torch.cat([x, torch.ones_like(length), length * (1 - 1e-6)], 1)


def squared_distances(centroids, lifted):
    """From centroids (S, M, C) to lifted points (N, C + 2): (S, M, N)."""
    length = centroids.square().sum(2, keepdim=True)
    return torch.cat([-2 * centroids, length, torch.ones_like(length)], 2) @ lifted.T


def plus_plus(lifted, draws):
    """Greedy k-means++: lifted points (N, C + 2), uniform draws in 0..1 (k, S, T) -> S starts (S, k, C).

    The next centroid of a start is one of T points, drawn in proportion to their squared distance to the
    nearest centroid so far: the one that reduces the sum of these distances most. Once they are all 0, the
    next centroid is FAR.
    """
    N = len(lifted)
    k, S, _ = draws.shape
    centroids = lifted.new_empty(S, k, lifted.shape[1] - 2)
    closest = torch.full((S, N), FAR, device=draws.device)      # all equal: the first is any point
    for j, draw in enumerate(draws):
        up_to = closest.cumsum(1)
        drawn = torch.searchsorted(up_to, draw * up_to[:, -1:], right=True).clamp(max=N - 1)
        candidates = lifted[drawn, :-2]                         # (S, T, C)
        distances = squared_distances(candidates, lifted).clamp(min=0)
        distances = distances.minimum(closest[:, None])         # (S, T, N)
        best = distances.sum(2).argmin(1)
        chosen = candidates[range(S), best]
        centroids[:, j] = chosen.where(up_to[:, -1:] > 0, FAR)
        closest = distances[range(S), best]
    return centroids


def lloyd(lifted, centroids, max_iter):
    """Lloyd's algorithm on lifted points (N, C + 2) from several starts at once, (S, k, C).

    Returns labels (S, N), centroids (S, k, C) and the sums of squared distances (S,).
    """
    S, k, C = centroids.shape
    labels = None
    for _ in range(max_iter):
        # each point joins its nearest centroid
        nearest = lifted.new_empty(S, len(lifted))              # squared distances to these
        new = torch.empty_like(nearest, dtype=torch.long)       # and labels
        sums = lifted.new_zeros(S, k, C + 2)
        step = max(1, AT_ONCE // (S * k))
        for some, near, label in zip(lifted.split(step), nearest.split(step, 1), new.split(step, 1)):
            torch.min(squared_distances(centroids, some), 1, out=(near, label))
            for s in range(S):
                sums[s].index_add_(0, label[s], some)           # its ones add up to the cluster sizes

        # each centroid moves to the mean of its points
        sizes = sums[:, :, C, None]
        centroids = (sums[:, :, :C] / sizes).where(sizes > 0, FAR)
        for s, j, _ in (sizes == 0).nonzero():
            far = nearest[s].argmax()
            if nearest[s, far] > 0:                 # an empty cluster restarts at the farthest point
                centroids[s, j] = lifted[far, :C]
                nearest[s, far] = 0
        if labels is not None and torch.equal(new, labels):
            break
        labels = new
    return new, centroids, nearest.clamp(min=0).sum(1)


def means(x, classes, n=0):
    """x (..., N, C), classes (N,) -> the mean of each class (..., n, C), nan if empty; of n or more."""
    classes = torch.as_tensor(classes, device=x.device)
    sizes = classes.bincount(minlength=n)
    sums = x.new_zeros(*x.shape[:-2], len(sizes), x.shape[-1]).index_add_(-2, classes, x)
    return sums / sizes[:, None]


# ---------------------------------------------------------------- scores of a clustering
# A measure takes classes (..., N) and clusters (..., N), whole numbers, and gives a float or array (...).
# n_ij counts the points of class i in cluster j; a_i and b_j, its sums over j and over i, are the sizes of
# classes and clusters; C2(x) = x (x - 1) / 2.


def contingency(classes, clusters):
    """n_ij (..., classes, clusters), as floats. Raises ValueError for labels that are not whole numbers."""
    classes, clusters = np.broadcast_arrays(classes, clusters)
    *batch, N = classes.shape
    if not {classes.dtype.kind, clusters.dtype.kind} <= {*"biu"}:
        raise ValueError("classes and clusters must be whole numbers, one for each point")
    classes, clusters = (labels if 0 <= labels.min() <= labels.max() <= N else numbered(labels)
                         for labels in (classes, clusters))             # or the table would be huge
    classes = classes.astype(int).ravel()
    clusters = clusters.astype(int).ravel()
    rows = classes.max() + 1
    columns = clusters.max() + 1
    tables = math.prod(batch)
    row = np.arange(tables).repeat(N) * rows + classes          # all tables stand on top of one another
    n = np.bincount(row * columns + clusters, minlength=tables * rows * columns)
    return n.reshape(*batch, rows, columns).astype(float)


def numbered(labels):
    """Labels of any type as 0, 1, 2 and so on, in sorted order."""
    return np.unique(labels, return_inverse=True)[1].reshape(np.shape(labels))


def sums(n, f):
    """T, the sum of f(n_ij), A of f(a_i), B of f(b_j), and f(N): what scores of clusterings are made of."""
    return (f(n).sum((-1, -2)),
            f(n.sum(-1)).sum(-1),
            f(n.sum(-2)).sum(-1),
            f(n.sum((-1, -2))))


def pairs(x):
    """C2, the number of pairs among x points."""
    return x * (x - 1) / 2


def x_log_x(x):
    """In nats; counts x of N points have the entropy log N - sum x log x / N."""
    return x * np.log(np.maximum(x, 1))


def ratio(x, y):
    """x / y, and 1 where y is 0: where there is nothing to tell apart, nothing is told apart wrongly."""
    return np.where(y > 1e-6, x / np.maximum(y, 1e-6), 1.0)[()]


def f1(classes, clusters):
    """Pairwise F1: how well "in one cluster" predicts "of one class", over all pairs of points; 0 to 1.

    With f = C2, the precision is T / B, the recall T / A, and F1 = 2 T / (A + B); 1 if there are no pairs in
    either. Chance: 1 / K for even clusters, 2 / (K + 1) for a single one. (Manning, Raghavan & Schuetze
    2008, chapter 16.)
    """
    together, a, b, _ = sums(contingency(classes, clusters), pairs)
    return ratio(2 * together, a + b)


def class_f1(classes, clusters):
    """The mean over classes of max_j 2 n_ij / (a_i + b_j), F1 with the cluster that suits it best; 0 to 1.

    Chance: somewhat over 1 / K, as the best of many is taken. (van Rijsbergen 1979; Larsen & Aone 1999.)
    """
    n = contingency(classes, clusters)
    a = n.sum(-1, keepdims=True)
    b = n.sum(-2, keepdims=True)
    return (2 * n / np.maximum(a + b, 1)).max(-1).sum(-1) / (a > 0).sum((-1, -2))


def ari(classes, clusters):
    """Adjusted Rand index (Hubert & Arabie 1985): 1 for the same partition, 0 at chance, negative below it.

    With f = C2, (T - E) / ((A + B) / 2 - E). E = A B / C2(N) is what T is on average over all clusterings of
    the same sizes. 1 if both are one cluster, or single points.
    """
    together, a, b, every = sums(contingency(classes, clusters), pairs)
    expected = a * b / np.maximum(every, 1)
    return ratio(together - expected, (a + b) / 2 - expected)


def nmi(classes, clusters):
    """Mutual information over the mean of the two entropies; 0 to 1, 1 if both partitions are one cluster.

    With f = x log x, the entropies are log N - A / N and log N - B / N, and the mutual information is
    log N + (T - A - B) / N. Chance is above 0, and higher the fewer points a cluster has. (Kvalseth 1987;
    with this mean it is the V-measure, Rosenberg & Hirschberg 2007.)
    """
    together, a, b, every = sums(contingency(classes, clusters), x_log_x)
    return ratio(every + together - a - b, every - (a + b) / 2)


def ami(classes, clusters):
    """Adjusted mutual information: 1 for the same partition, 0 at chance, negative below it.

    (T - E) / ((A + B) / 2 - E) as for ari, with f = x log x. (Vinh, Epps & Bailey 2010.)
    """
    n = contingency(classes, clusters)
    together, a, b, _ = sums(n, x_log_x)
    expected = [expected_x_log_x(tuple(table.sum(1)), tuple(table.sum(0)))
                for table in n.reshape(-1, *n.shape[-2:])]
    expected = np.reshape(expected, together.shape)
    return ratio(together - expected, (a + b) / 2 - expected)


@lru_cache(maxsize=1024)                    # permuted labels ask for the same sizes again
def expected_x_log_x(a, b):
    """The sum of n_ij log n_ij, on average over all partitions into sizes a and b.

    n_ij is the number of cluster j's points among those of class i: hypergeometric.
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

    Chance: over 1 / K. Blind to classes that are split: single points have purity 1. (Manning et al. 2008.)
    """
    n = contingency(classes, clusters)
    return n.max(-2).sum(-1) / n.sum((-1, -2))


# One more line adds a measure to every row: MEASURES["name"] = a function of classes and clusters.
MEASURES = {"f1": f1, "class_f1": class_f1, "ari": ari, "nmi": nmi, "ami": ami, "purity": purity}


# ---------------------------------------------------------------- scores without a clustering


def nc1(x, classes):
    """Within-class over between-class scatter, trace(S_W S_B^+) / K: x (..., N, C), classes (N,) -> (...).

    0 if each class has collapsed into one point; at chance large, and larger in more dimensions, so compare
    only spaces of the same width. nan if all class means coincide. S_W is the mean square of a point about
    its class, S_B of a class about their mean. (Papyan, Han & Donoho 2020.)
    """
    x = torch.as_tensor(x)
    classes = numbered(classes)
    m = means(x, classes)
    m = m - m.mean(-2, keepdim=True)                            # S_B = M^T M / K, and the two K cancel
    along = x @ torch.linalg.pinv(m, rtol=1e-5)                 # (..., N, K): nothing of C x C is built
    within = (along - means(along, classes)[..., classes, :]).square().sum((-1, -2)) / len(classes)
    apart = m.square().sum((-1, -2)) > 1e-12 * x.square().sum((-1, -2))
    return (within / apart).cpu().numpy()                       # 0 / 0 is nan


def regex_distances(x, units, inputs):
    """Distances (S, L + 1, D) between the means of every two units with the same input.

    x (S, L + 1, N, C); a unit is a regex of a task with one input; units and inputs are (N,). Also returns a
    point of the one unit (D,) and of the other (D,).
    """
    first = np.unique(units, return_index=True)[1]              # a point of each unit
    a, b = np.triu_indices(len(first), 1)
    a, b = np.compress(inputs[first[a]] == inputs[first[b]], [a, b], 1)
    distances = [(m[:, a] - m[:, b]).norm(dim=2).cpu().numpy() for m in means(x, numbered(units))]
    return np.array(distances), first[a], first[b]


def merge_ratio(distances, same):
    """Mean distance between regexes of one task over that between regexes of different tasks.

    distances (..., D) between pairs of regexes, same (D,): are they of one task? 1 at chance, 0 if each
    task's regexes have merged; nan if no task has two, no two are of different tasks, or all coincide.
    """
    with np.errstate(invalid="ignore"):
        return (distances @ same / same.sum()) / (distances @ ~same / (~same).sum())


def knn(train, query, k):
    """The k points of train (N, C) nearest to each of query (Q, C): (Q, k) indices, nearest first.

    Distances are Euclidean; of equal ones the lower index comes first. Raises ValueError for k outside 1..N
    and points that are not finite.
    """
    train = torch.as_tensor(train).double()
    query = torch.as_tensor(query).double()
    if not (1 <= k <= len(train) and train.isfinite().all() and query.isfinite().all()):
        raise ValueError(f"k = {k} must be in 1..{len(train)}, the number of points, and the points finite")
    origin = train.median(0).values                             # amid the points, where rounding is least
    found = []
    for some in query.split(max(1, AT_ONCE // len(train))):
        distances = torch.cdist(some - origin, train - origin)
        nearest = distances.topk(k, largest=False)
        tied = int((distances <= nearest.values[:, -1:]).sum(1).max())
        if tied > k:                                            # topk took any of them: take them all
            nearest = distances.topk(tied, largest=False)
        index = nearest.indices.sort(1).values
        order = distances.gather(1, index).argsort(dim=1, stable=True)[:, :k]
        found.append(index.gather(1, order))
    return torch.cat(found)


def majority(labels):
    """The most frequent of labels (..., k), of several the lowest: (...)."""
    return torch.as_tensor(labels).mode().values.numpy()


def cosines(x, tasks):
    """x (..., N, C), tasks (N,) -> (..., K, K), the mean cosine between centred states of every two tasks."""
    m = means(F.normalize(normalise(x), dim=-1), tasks)
    return (m @ m.mT).cpu().numpy().round(5)                    # the rest is rounding error


def rsa(similar, overlap):
    """Correlation over pairs of tasks of two similarities (..., K, K) -> (...); nan if one does not vary.

    Representational similarity analysis (Kriegeskorte, Mur & Bandettini 2008).
    """
    one, other = np.triu_indices(len(overlap), 1)
    x = similar[..., one, other].reshape(-1, len(one))
    with np.errstate(all="ignore"):
        return np.corrcoef(overlap[one, other], x)[0, 1:].reshape(similar.shape[:-2])


# ---------------------------------------------------------------- from states to rows

N_NULL = 20             # draws of every null
NEIGHBOURS = 10         # states of subset that each state of another split is compared with
LOWER = "nc1", "merge_ratio"    # the less, the more clustered

VIEWS = {       # what is done first to states (..., N, C), whose inputs are numbered `inputs`
    "raw": lambda x, inputs: x,
    "centred": lambda x, inputs: x.double() - means(x.double(), inputs)[..., inputs, :],
}


def deal(labels, units, groups, seed):
    """The draws of a null: the labels of units, dealt to the units of each group at random. All are (N,)."""
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    labels = labels[first]
    group = groups[first]
    draws = []
    for i in range(N_NULL):
        luck = torch.rand(len(first), generator=make_generator(f"{seed}/null/{i}"))
        dealt = labels.copy()
        # both orders go group by group, the second at random within each
        dealt[np.argsort(group, kind="stable")] = labels[np.lexsort((luck, group))]
        draws.append(dealt[unit])
    return draws


def make_rows(steps, identity, measure, score, labels, **nulls):
    """A row per step and layer: score(labels) (S, L + 1), and the mean and the extreme of each null's draws.

    By chance a score passes the most extreme of 20 draws, `null_95`, once in 21 times. Undefined numbers are
    None.
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
                     **{name: None if math.isnan(x) else x for name, x in numbers.items()}})
    return rows


def score_states(states, labels, steps, seed=0, overlaps={}):
    """Score states (S, L + 1, N, C) by every identity of labels, name -> (N,) of any type; returns rows.

    A row has step, layer, identity, measure, value and its nulls: null_mean and null_95 of permuted labels;
    for the identity `task`, if there are labels `distribution`, regrouped_mean and regrouped_95 of whole
    regexes dealt to the tasks. If there are labels `input`, both deal within each input. k-means is fitted
    to these very states: the question is whether they cluster, not whether clusters of other states are
    found again.

    overlaps: name -> (K, K), how much every two tasks have in common, for `rsa`; its null permutes tasks.
    """
    x = normalise(torch.as_tensor(states))
    N = x.shape[2]
    rows = []

    ids = {identity: numbered(of) for identity, of in labels.items()}
    task = ids.get("task")
    regex = ids.get("distribution")
    inputs = ids.get("input", np.zeros(N, int))
    for identity, classes in ids.items():
        if identity == "input_set" and task is not None and f1(task, classes) == 1:
            continue                        # each task has its own inputs: this would repeat `task`
        within = 0 * inputs if identity == "input" else inputs
        nulls = {"null": deal(classes, np.arange(N), within, seed)}
        if identity == "task":
            if regex is not None:
                units = (regex * N + task) * N + inputs
                nulls["regrouped"] = deal(task, units, inputs, seed)
                distances, a, b = regex_distances(x, units, inputs)
                rows += make_rows(steps, "task", "merge_ratio",
                                  lambda c: merge_ratio(distances, c[a] == c[b]), task,
                                  regrouped=nulls["regrouped"])
            rows += make_rows(steps, "task", "nc1", lambda c: nc1(x, c), task, **nulls)
            similar = cosines(x, task)
            order = np.unique(task)
            orders = deal(order, order, 0 * order, seed)
            for name, overlap in overlaps.items():
                if len(overlap) == len(order) > 2:
                    rows += make_rows(steps, name, "rsa",
                                      lambda to: rsa(similar, overlap[to][:, to]), order, null=orders)
        clusters = kmeans(x, classes.max() + 1, seed=seed)[0].cpu().numpy()                 # (S, L + 1, N)
        for name, measure in MEASURES.items():
            rows += make_rows(steps, identity, name,
                              lambda c: measure(c, clusters), classes, **nulls)
    return rows


def score_neighbours(states, labels, known, known_labels, steps):
    """Score states (S, L + 1, N, C) by the labels of the nearest known ones (S, L + 1, M, C); returns rows.

    Labels are whole numbers. The null deals the known ones, within each input. knn_share_other ignores
    neighbours of a state's own regex. There are no rows if that could leave too few neighbours, or if the
    states are of another network.
    """
    M = known.shape[2]
    rows = []
    regex = known_labels.get("distribution", np.arange(M))
    k = NEIGHBOURS + max(Counter(regex).values())
    if k > M or known.shape[1::2] != states.shape[1::2]:        # layers and width
        return rows
    near = np.array([[knn(*layer, k).cpu() for layer in zip(*some)]
                     for some in zip(known, states)])           # (S, L + 1, N, k)
    own_regex = regex[near] == labels.get("distribution", np.full(states.shape[2], -1))[:, None]
    others_first = np.argsort(own_regex, -1, kind="stable")
    others = np.take_along_axis(near, others_first, -1)[..., :NEIGHBOURS]
    near = near[..., :NEIGHBOURS]
    for identity in ("task", "output"):
        if identity in labels and identity in known_labels:
            own = labels[identity]
            theirs = known_labels[identity]
            null = deal(theirs, np.arange(M), known_labels.get("input", 0 * theirs), 0)
            scores = {f"knn_{identity}": lambda c: (majority(c[near]) == own).mean(-1),
                      "knn_share": lambda c: (c[near] == own[:, None]).mean((-1, -2)),
                      "knn_share_other": lambda c: (c[others] == own[:, None]).mean((-1, -2))}
            for name, score in scores.items():
                rows += make_rows(steps, identity, name, score, theirs, null=null)
    return rows


def find_overlaps(labels, counts, split):
    """name -> (K, K): how many inputs and outputs every two tasks of a split share, how alike their letters.

    labels and counts are those of read_labels and surface.
    """
    overlaps = {}
    for name, ids in labels.items():
        if name.startswith(f"{split}/") and "task" in ids:
            tasks = numbered(ids["task"])
            for identity in ("input", "output"):
                if identity in ids:
                    has = contingency(tasks, ids[identity]).clip(max=1)
                    overlaps[identity] = has @ has.T
            if name in counts:
                overlaps["surface"] = cosines(counts[name], tasks)
    return overlaps


def surface(texts):
    """No network at all: name -> texts (N,) becomes name -> counts of tokens and bigrams (N, F)."""
    if not texts:
        return {}
    everything = [text for some in texts.values() for text in some]
    rows = []
    grams = []
    cut_into = "words" if " " in "".join(everything) else "characters"
    for i, text in enumerate(everything):
        tokens = cut(text, cut_into)
        some = ["", *tokens, *map(" ".join, zip(tokens, tokens[1:]))]       # "": no text has a row, too
        rows += [i] * len(some)
        grams += some
    counts = torch.from_numpy(contingency(rows, numbered(grams))).split([*map(len, texts.values())])
    return dict(zip(texts, counts))


def kept_steps(folder):
    """The steps whose captures are in a folder."""
    return sorted(int(path.stem) for path in Path(folder).glob("states/*.npz") if path.stem.isdecimal())


def read_labels(folder):
    """"split/position" -> identity -> (N,), from labels.npz; for a run, made anew: identities may be new.

    Labels are numbered, except `text`. The first position of a split that has it is also its `surface`.
    Raises ValueError if there are no labels, or not as many of every identity.
    """
    path = f"{folder}/states/labels.npz"
    is_run = Path(folder, "config.json").exists()
    arrays = make_labels(read_data(folder)) if is_run else read_arrays(path)
    labels = {}
    numbers = {}
    for name, of in arrays.items():
        where, _, identity = name.rpartition("/")
        ids = labels.setdefault(where, {})
        ids[identity] = of.astype(str)
        if where.count("/") != 1 or of.shape != (len(ids[min(ids)]),):
            raise ValueError(f"{path}: {name} must be named split/position/identity, and hold a label for "
                             "each state, as many as other identities there")
        if identity == "text":
            labels.setdefault(f"{where.split('/')[0]}/surface", ids)
        else:                               # the same number wherever a label occurs
            ids[identity] = np.array([numbers.setdefault(label, len(numbers))
                                      for label in ids[identity]])
    return labels


def read_states(folder, steps, name, n):
    """The states (S, L + 1, n, C) called name, as split/position. Raises ValueError if they do not fit."""
    with reading(f"{folder}/states", f"every capture must have {name}, finite numbers, layers x {n} labelled "
                 "states x width, the same at every step"):
        x = np.stack([read_arrays(capture_path(folder, step))[name] for step in steps])
        S, L, N, C = x.shape
        if N != n or not np.isfinite(x).all():
            raise ValueError(x.shape)
        return torch.from_numpy(x)


def probe(folder, views=("raw",)):
    """Score every capture of a run, or of any folder of states, at every layer, position and split.

    Returns rows, as score_states does, with view, position and split, and writes them to probe.jsonl if it
    can. Position `surface` is no network: counts of the tokens and bigrams in labels `text`, at step 0. View
    `centred` is only for states with labels `input`. Neighbours are looked for in split `subset`. Raises
    ValueError if nothing was captured, and for a folder that is damaged.
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
        for view in views:
            if not ids or view == "centred" and "input" not in ids:
                continue
            n = len(ids[min(ids)])
            at = [0] if name in counts else steps
            x = counts[name][None, None] if name in counts else read_states(folder, steps, name, n)
            distinct = len(x[-1, -1].unique(dim=0))
            print(f"{view} {name}: {n} states, {distinct} of them distinct in the last layer", flush=True)
            x = VIEWS[view](x.to(pick_device()), ids.get("input"))
            overlaps = find_overlaps(labels, counts, split)
            scored = score_states(x, ids, at, overlaps=overlaps)
            if split == "subset":
                known[view, position] = x, ids
            elif (view, position) in known:
                scored += score_neighbours(x, ids, *known[view, position], at)
            rows += [{"view": view, "position": position, "split": split, **row}
                     for row in scored]
    if not rows:
        raise ValueError(f"{folder}: labels.npz has no identity to score, or no `input` for view centred")
    try:
        write_rows(f"{folder}/probe.jsonl", rows)
        print(f"{len(rows):,} scores are in {folder}/probe.jsonl")
    except OSError as e:
        print(f"the scores could not be kept: {e}")
    return rows


# ---------------------------------------------------------------- the report

SHADES = "·░▒▓█"        # the first is for what is within its null


def is_beyond(row):
    """Whether a score passes its null, the harder one if there are two; None if it has no null."""
    null = row.get("regrouped_95", row.get("null_95"))
    if None in (null, row["value"]):
        return None
    return row["value"] < null if row["measure"] in LOWER else row["value"] > null


def print_report(folder, rows):
    """Print what the rows of one view say of val, or of the first split there is."""
    def shade(value):
        return 2 * SHADES[1 + min(3, int(4 * value)) if value else 0]

    splits = [row["split"] for row in rows]
    split = "val" if "val" in splits else splits[0]
    last = max(row["step"] for row in rows)
    heat = defaultdict(str)
    since = {}
    table = defaultdict(str)
    for row in rows:
        if row["split"] != split:
            continue
        # the table has the last step, the heat table every step of one measure
        name = f"{row['position']} {row['identity']} {row['measure']}"
        if row["step"] == last or row["position"] == "surface":
            dot = SHADES[0] * (is_beyond(row) is False)
            table[name] += ("-" if row["value"] is None else f"{dot}{row['value']:.2f}").rjust(7)
        if name == f"{row['position']} task f1" != "surface task f1":
            layer = f"{row['position']:12}layer {row['layer']:2}  "
            heat[layer] += shade(is_beyond(row) and row["value"])
            since.setdefault(layer, row["step"])
            if not is_beyond(row):
                since.pop(layer)

    print(f"\nAt a glance: pairwise F1 of task, {split}, a column per capture, then the step since which it "
          "is beyond its null.\n"
          "{} within the null; beyond it {}, from 0.25 {}, 0.5 {}, 0.75 {}".format(*SHADES))
    for layer in sorted(heat, reverse=True):
        print(f"{layer}{heat[layer]}  {since.get(layer, '')}")
    if Path(folder, "metrics.jsonl").exists():
        accuracies = [row[f"acc_{split}"] for row in read_rows(f"{folder}/metrics.jsonl")]
        print(f"{'accuracy':22}{''.join(map(shade, accuracies))}")
    layers = sorted({row["layer"] for row in rows})
    print(f"\nScores of {split} at the last step, view {rows[0]['view']}; less is more: {', '.join(LOWER)}.\n"
          f"{SHADES[0]} is within its own null, the most extreme of {N_NULL} draws: by chance one score in "
          f"{N_NULL + 1} is beyond it.\n{'layer':36}{''.join(f'{layer:7}' for layer in layers)}")
    for name, cells in table.items():
        print(f"{name:36}{cells}")
    found = {row[key] for row in rows for key in ("identity", "position", "split")}
    missing = {"task", "distribution", "input", "output", "surface", "subset"} - found
    if missing:
        print(f"Left out, for want of labels: {', '.join(sorted(missing))}.")


# ---------------------------------------------------------------- the causal test


def exchanges(x, y, centroids, columns):
    """(position, patch) -> where (n, T, 1) states x of prompts (n, T, C) change, and into what (n, T, C).

    y are the donors' states; columns: position -> (n,); centroids: position -> the mean states of both tasks
    by input (2, n, inputs, C), nan where a task lacks an input.
    """
    column = torch.arange(x.shape[1])[:, None]
    sep = columns["instruction"][:, None, None]
    spans = {"nothing": column < 0,
             "letters": column < sep,
             "instruction": column <= sep,
             "from <sep> on": column >= sep}
    patches = {("span", name): (here, y) for name, here in spans.items()}
    noise = torch.randn(len(x), 1, x.shape[2], generator=make_generator("noise"))
    noise = noise / x.shape[2] ** 0.5                           # about as long as 1
    for position, at in columns.items():
        own, other = centroids[position]
        shift = (other - own).nanmean(1, keepdim=True)          # over the inputs that both tasks have
        new = {"donor": y,
               "centroid": other.nanmean(1, keepdim=True),
               "own centroid": own.nanmean(1, keepdim=True),
               "random": noise * x.norm(dim=2, keepdim=True),
               "shift": x + shift,
               "random shift": x + noise * shift.norm(dim=2, keepdim=True)}
        for name, states in new.items():
            patches[position, name] = column == at[:, None, None], states
    return patches


@torch.no_grad()
def patch(run):
    """Do answers depend on the clusters? Exchange states of val's prompts at one layer and see.

    Each prompt has a donor, a prompt with the same input, of another task and with another output. The
    state at a position becomes the donor's, the centroid of the donor's task or of its own, or a random
    vector as long; or it is shifted by the difference of the two centroids, or randomly as far. A `span` of
    states becomes the donor's; the whole instruction is the positive control. Centroids are means over val,
    answers are known by their first token.

    Writes and returns the rows of patch.jsonl: layer, position, patch, n, the shares of n answers that
    become the donor's and that stay right, and `next`, the probability at <sep> of the inputs of the donor's
    task. Raises ValueError if the run has no checkpoint, or no prompt has a donor.
    """
    data = read_data(run)
    model = load_model(run, data).cpu()
    val = data.splits["val"]
    task = val.identities["task"]
    word = numbered(val.identities["input"])

    # the columns of both positions, and the tokens that follow them
    at = {name: val.positions[name][1][val.state_of(name)] for name in ("instruction", "answer")}
    asked, answers = (val.tokens[range(len(task)), columns + 1] for columns in at.values())

    # pairs of a prompt and its donor
    key = numbered([*map(str, zip(word, *at.values()))])
    luck = torch.rand(len(key), generator=make_generator("donors"))
    own = np.lexsort((luck, key))                               # key by key, at random within each
    donor = np.roll(own, 1)
    fits = (key[own] == key[donor]) & (answers[own] != answers[donor])
    own, donor = own[fits], donor[fits]
    n = range(len(own))
    if not n:
        raise ValueError("no two prompts have one input and two answers: there is nothing to exchange")
    inputs = contingency(task, asked)[task[donor]] > 0          # (n, tokens): those of the donor's task
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
                         "next": float((p[:, :inputs.shape[1]] * inputs).sum(1).mean())})
    write_rows(f"{run}/patch.jsonl", rows)
    if len(val.positions) > len(at):
        print(f"Only exchanged at {' and '.join(at)}.")
    return rows


def print_patch(rows):
    """Print the shares of answers that become the donor's and that stay right, and the next inputs."""
    lines = defaultdict(str)
    for row in rows:
        shares = "/".join(f"{100 * row[share]:3.0f}" for share in ("donor", "right", "next"))
        lines[row["position"], row["patch"]] += f"   {shares}"
    print(f"What is answered if states are exchanged? {rows[0]['n']:,} prompts of val, in percent:\n"
          "answers that become the donor's / that stay right / probability at <sep> of its task's inputs,\n"
          f"a column per layer, 0 to {rows[-1]['layer']}")
    for (position, name), cells in lines.items():
        print(f"{position:12}{name:14}{cells}")


def main():
    """Cluster the states of a run, or of any folder of states, and score the clusters, beside chance."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("folder", help="a run folder, as train.py makes it, or any folder of states")
    flags.add_argument("--view", nargs="+", choices=VIEWS, default=["raw"], help="how to look at states: as "
                       "they are, less the mean of their input's, each coordinate scaled (default: raw)")
    flags.add_argument("--patch", action="store_true", help="instead, exchange states: what is answered?")
    given = flags.parse_args()
    if given.patch:
        return print_patch(patch(given.folder))
    rows = probe(given.folder, given.view)
    for view in given.view:
        print_report(given.folder, [row for row in rows if row["view"] == view])


if __name__ == "__main__":
    command_line(main)
