"""The data: regular expressions, tasks, splits and tokens.

A task maps inputs to outputs. It is never named to the model, only described by instructions: strings sampled
from regular expressions (figure 1 of Wu & Varshney, arXiv 2402.12151). Four parts: an exact sampler of
regular languages; configuration and tasks; the splits a model is trained and probed on; the command line.

    python data.py                        print a one-page summary of the default data set
    python data.py --tasks mine.json      the same for a tasks file

The paper gives neither its regexes nor its sizes; ours are in `random_pattern` and `DataConfig`.
"""
import json
import math
import random
import re
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from re import _parser          # Python's own parser of regexes: private, but the same in 3.11 to 3.14
from string import ascii_lowercase
from typing import NamedTuple

from runs import BadInput, Flags, check, command_line, read_json, write_json

import numpy as np

# ---------------------------------------------------------------- regular expressions

PRINTABLE = frozenset(map(chr, range(0x20, 0x7F)))
CATEGORIES = {"CATEGORY_DIGIT": r"\d", "CATEGORY_SPACE": r"\s", "CATEGORY_WORD": r"\w",
              "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_NOT_SPACE": r"\S", "CATEGORY_NOT_WORD": r"\W"}
# What we cannot count, by the first word of its name in Python's parser, and what to write instead.
REFUSED = {
    "AT": "an anchor: drop it (the whole string is always matched), or escape ^ and $",
    "ASSERT": "a look-ahead or look-behind: write out the strings it allows",
    "FAILURE": "an empty look-ahead, which nothing passes: leave out this alternative",
    "GROUPREF": "a back-reference: write out what it can match",
    "ATOMIC": "an atomic group: write (?: ), which may match more strings",
    "POSSESSIVE": "a possessive repetition: drop its second +, which may match more strings"}
FLAGS = "a flag such as (?i): drop it, and write [aA] to match both cases"
END = (("",), 1, 1)         # the item (see Regex) that reads the end of a string, as if it were a character
DONE = frozenset([()])      # the state after END: nothing is left to read
MAX_WORK = 1_200_000        # units of work to build one Regex: one to two seconds


class Regex:
    """The language {s : re.fullmatch(pattern, s), len(s) <= max_len}: counted, indexed and sampled exactly.

    The pattern becomes a deterministic automaton, in which every string has exactly one path, even if the
    pattern is ambiguous. Dynamic programming counts the paths, and walking them in a fixed order turns an
    index into a string (Goldberg & Sipser 1985), so a uniform index gives a uniform string.

    Python's own parser reads the pattern. `.`, negated classes, `\\d \\w \\s` and their complements cover
    printable ASCII (0x20 to 0x7e) only. A tuple of patterns stands for the union of their languages. Raises
    BadInput for what Python cannot read, for flags and what REFUSED lists, and if counting takes too long.

    A branch is one way to go on: a tuple of items that are still to be read (see `_branch`). A state of the
    automaton is the set of branches that a string may be in (subset construction, Rabin & Scott 1959).
    """

    def __init__(self, pattern, max_len=64):
        self.pattern, self.max_len = pattern, max_len
        self._work = 0
        self._edges_of = {}                     # state -> its edges
        patterns = pattern if isinstance(pattern, tuple) else [pattern]
        self._start = frozenset((*self._parse(text), END) for text in patterns)
        levels = [{self._start}]                # levels[n]: the states after n characters, END counted as one
        while levels[-1] and len(levels) < max_len + 2:         # max_len characters and the end
            levels.append({target for state in levels[-1] for target in self._edges(state)})
            self._spend(len(levels[-1]))
        # built from the end: _ways[n][state], the number of ways to finish a string after n characters
        self._ways = [{}]
        for level in reversed(levels):
            after = self._ways[0]               # the counts one character later
            ways = {}
            for state in level:
                edges = self._edges(state)
                ways[state] = sum(len(chars) * after.get(target, 0) for target, chars in edges.items())
                self._spend(len(edges))
            ways[DONE] = 1                      # nothing is left to read: one way
            self._ways.insert(0, ways)
        self.count = ways[self._start]          # the last `ways` is that of level 0

    def _spend(self, steps):
        self._work += steps
        if self._work > MAX_WORK:
            raise BadInput(f"{self.pattern!r:.60} is too large or ambiguous: simplify it or lower max_len")

    def _parse(self, pattern):
        try:
            tree = _parser.parse(pattern)
            if tree.state.flags != re.UNICODE:          # the default
                raise BadInput(f"{pattern!r:.60} has {FLAGS}")
            return self._branch(tree)
        except (re.error, OverflowError, RecursionError) as e:
            raise BadInput(f"{pattern!r:.60}: {e} (a \\ makes a special character an ordinary one)") from None

    def _branch(self, tree):
        """Turn a tree of Python's parser into a branch: a tuple of items (what, least, most).

        `what` is a tuple of characters, to read one of them once, or a frozenset of branches, to read one of
        them at least `least` and at most `most` times. `[ab]c?` is the branch
        ((("a", "b"), 1, 1), (frozenset({((("c",), 1, 1),)}), 0, 1)).
        """
        items = []
        for op, value in tree:
            least = most = 1
            match str(op):
                case "BRANCH":                          # alternatives
                    what = frozenset(map(self._branch, value[1]))
                case "SUBPATTERN":                      # a group, with flags that it sets and unsets
                    _, added, removed, inside = value
                    if added or removed:
                        raise BadInput(f"{self.pattern!r:.60} has {FLAGS}")
                    what = frozenset([self._branch(inside)])
                case "MAX_REPEAT" | "MIN_REPEAT":       # a lazy repetition matches the same strings
                    least, most, inside = value
                    what = frozenset([self._branch(inside)])
                case _:
                    what = tuple(sorted(self._characters(op, value)))
            if most > self.max_len:
                most = math.inf
            if isinstance(what, frozenset) and _may_be_empty(what):
                least = 0       # a round that reads nothing is skipped instead, so each round reads something
            if most > 0:
                items.append((what, least, most))
        return tuple(items)

    def _characters(self, op, value):
        """The set of characters that a node of Python's parser matches."""
        match str(op):
            case "LITERAL":
                return {chr(value)}
            case "NOT_LITERAL":
                return PRINTABLE - {chr(value)}
            case "ANY":
                return PRINTABLE
            case "CATEGORY":
                return {c for c in PRINTABLE if re.match(CATEGORIES[str(value)], c)}
            case "RANGE":
                low, high = value
                self._spend(high - low)
                return {*map(chr, range(low, high + 1))}
            case "IN":                                  # a class, such as [^a-z_]
                if value[0][0] is _parser.NEGATE:
                    return PRINTABLE - self._characters(op, value[1:])
                return set().union(*(self._characters(*part) for part in value))
        raise BadInput(f"{self.pattern!r:.60} has {REFUSED[str(op).split('_')[0]]}")

    def _edges(self, state):
        """The edges of a state: next state -> the characters that lead there."""
        if state not in self._edges_of:
            rests = defaultdict(set)                    # character -> the rests of branches after it
            for branch in state:
                for chars, rest in self._steps(branch):
                    self._spend(len(chars) * (1 + len(rest) // 50))         # long branches cost more
                    for c in chars:
                        rests[c].add(rest)
            edges = self._edges_of[state] = defaultdict(list)
            for c in sorted(rests):
                edges[frozenset(rests[c])].append(c)
        return self._edges_of[state]

    def _steps(self, branch):
        """Yield (characters, rest of the branch) for each item that may be read first (Antimirov 1996)."""
        for i, (what, least, most) in enumerate(branch):
            self._spend(1)
            rest = branch[i + 1:]
            if most > 1:
                rest = ((what, max(least - 1, 0), most - 1), *rest)     # one repetition fewer is left
            if isinstance(what, tuple):
                yield what, rest
            else:
                for inside in what:
                    for chars, rest_inside in self._steps(inside):
                        yield chars, rest_inside + rest
            if least > 0:       # this item must be read before the next
                return

    def unrank(self, i):
        """Return the i-th string, 0 <= i < count, in a fixed order. Raises BadInput for any other i."""
        if not 0 <= i < self.count:
            raise BadInput(f"{self.pattern!r:.60} has no string {i!r:.60}: use 0 to count - 1")
        string = ""
        state = self._start
        while state != DONE:
            ways = self._ways[len(string) + 1]
            for target, chars in self._edges(state).items():
                if i < len(chars) * ways[target]:       # the string goes on along this edge
                    break
                i -= len(chars) * ways[target]
            # on the edge that was found: which character, and which string after it
            which, i = divmod(i, ways[target])
            string += chars[which]
            state = target
        return string

    def sample(self, n, rng, unique=True):
        """Draw n strings uniformly, distinct if unique. Raises BadInput if the language has too few."""
        # n distinct strings need n to draw from; with repeats, one is enough
        if not 0 <= n <= (self.count if unique else n * self.count):
            raise BadInput(f"{n} strings of at most {self.max_len} characters were asked for, but "
                           f"{self.pattern!r:.60} has only {self.count}: make it more "
                           "general, lower n_train or n_val, or raise max_len")
        if not unique:
            return [self.unrank(rng.randrange(self.count)) for _ in range(n)]
        drawn = {}                              # a dict keeps the order of the draws
        while len(drawn) < n:
            drawn[rng.randrange(self.count)] = True
        return [self.unrank(i) for i in drawn]


def _may_be_empty(branches):
    """Whether one of these branches matches the empty string: none of its items has to be read."""
    return any(all(least == 0 for _, least, _ in branch) for branch in branches)


cached_regex = lru_cache(maxsize=10_000)(Regex)        # cache: overlap checks and sampling share it


def find_overlap(patterns, max_len):
    """Find two patterns that have a string in common: return their indices i < j, or None.

    Languages are disjoint if and only if the size of their union is the sum of their sizes. Raises BadInput
    if the union is too large to count.
    """
    def overlap(*group):
        total = sum(cached_regex(pattern, max_len).count for pattern in group)
        return Regex(group, max_len).count < total

    if not overlap(*patterns):
        return None
    # bisect for the first `last` at which patterns 0 to last overlap: from there on they always do
    j = bisect_left(range(len(patterns)), True, key=lambda last: overlap(*patterns[:last + 1]))
    i = next(i for i in range(j) if overlap(patterns[i], patterns[j]))
    return i, j


# ---------------------------------------------------------------- configuration and tasks


@dataclass
class DataConfig:
    """Every setting of the data; `train.Config` adds the rest.

    TO ADD A SETTING, WRITE A LINE LIKE THESE: `--help` PRINTS THE COMMENT BEHIND IT.
    """
    seed: int = 0                   # determines every random draw
    tasks: str = ""                 # a tasks file to use instead of random tasks
    n_tasks: int = 16               # number of random tasks
    n_regexes: int = 3              # regexes per random task, plus one that is held out
    n_mappings: int = 5             # input-output pairs per random task
    n_inputs: int = 10              # size of the pool of inputs that random tasks share
    n_outputs: int = 20             # size of the pool of outputs that random tasks share
    twins: bool = False             # random tasks come in pairs with the same inputs and different outputs
    n_train: int = 20               # training instructions per regex
    n_val: int = 10                 # instructions per regex in each of subset, val and ood
    n_asked: int = 8                # inputs per instruction; split `pairs` asks up to as many again
    asks_for: str = "output"        # what to answer: output; task, its number; nothing, without an input
    n_probed: int = 64              # tasks in subset, val, ood and pairs; any others are only trained on
    max_len: int = 128              # maximum length of an instruction, in characters
    shuffle_tasks: bool = False     # give every instruction a random task, which can only be memorised

    # for runs.check: the values a setting may have; another maximum than a million: at_most = {"name": 1}
    choices = {"asks_for": ("output", "task", "nothing")}


class Task(NamedTuple):
    """A function from inputs to outputs, the regexes that describe it, and one that is never trained on."""
    name: str
    map: dict               # input -> output
    regexes: list
    held_out: str


TWO_LETTERS = [a + b for a in ascii_lowercase for b in ascii_lowercase]


def random_pattern(rng):
    """Draw a regex: two literals like ab, two classes like [abcd]{2}, one choice (ab|cd|ef), in random order.

    It has 16 * 16 * 3 = 768 strings, all of 10 letters, so length says nothing about the task.
    """
    classes = [f"[{''.join(sorted(rng.sample(ascii_lowercase, 4)))}]{{2}}" for _ in range(2)]
    *choices, one, other = rng.sample(TWO_LETTERS, 5)
    pieces = [one, other, *classes, f"({'|'.join(choices)})"]
    return "".join(rng.sample(pieces, len(pieces)))


def random_maps(cfg, rng):
    """Draw a map for each task, using all inputs and outputs evenly; no two tasks share an input-output pair.

    No two tasks have the same set of inputs until all sets are used; with cfg.twins, tasks 0 and 1 share one,
    2 and 3 another, and so on. Raises BadInput for impossible sizes, or if fewer than two tasks use a word.
    """
    k = cfg.n_mappings
    if k > min(cfg.n_inputs, cfg.n_outputs):
        raise BadInput(f"n_mappings is {k}: it must not exceed n_inputs or n_outputs")
    inputs = [chr(ord("A") + i % 26) * (1 + i // 26) for i in range(cfg.n_inputs)]      # A ... Z, AA, BB ...
    outputs = [str(i) for i in range(cfg.n_outputs)]
    maps, uses = [], Counter()

    def least_used(pool, attempt):      # the k words used least; after every 500 attempts, with more noise
        return sorted(pool, key=lambda word: uses[word] + (1 + attempt // 500) * rng.random())[:k]

    for t in range(cfg.n_tasks):
        twin = cfg.twins and t % 2      # it has the inputs of the task before it
        sets = {*map(frozenset, maps)}
        may_repeat = twin or len(sets) == math.comb(cfg.n_inputs, k)
        for attempt in range(10_000):
            chosen = maps[-1] if twin else sorted(least_used(inputs, attempt))
            mapping = dict(zip(chosen, rng.sample(least_used(outputs, attempt), k)))
            shared = any(mapping.items() & other.items() for other in maps)
            if not shared and (may_repeat or frozenset(mapping) not in sets):
                break
        else:
            raise BadInput(f"raise n_outputs ({cfg.n_outputs}): an input needs a new output in each task")
        maps.append(mapping)
        uses.update([*mapping, *mapping.values()])
    if any(uses[word] < 2 for word in inputs + outputs):
        raise BadInput("fewer than two tasks use some input or output, which would give the task away: lower "
                       "n_inputs or n_outputs, or raise n_tasks")
    return maps


def random_tasks(cfg):
    """Draw tasks; no two regexes share a string. Raises BadInput as random_maps and find_overlap do."""
    rng = random.Random(f"{cfg.seed}/tasks")
    maps, tasks = random_maps(cfg, rng), []
    patterns = [random_pattern(rng) for _ in range((cfg.n_regexes + 1) * cfg.n_tasks)]
    while overlap := find_overlap(patterns, cfg.max_len):
        patterns[overlap[1]] = random_pattern(rng)
    for t, mapping in enumerate(maps):
        held_out, *regexes = patterns[t::cfg.n_tasks]           # task t has patterns t, t + n_tasks, ...
        tasks.append(Task(f"t{t:02d}", mapping, regexes, held_out))
    return tasks


def write_tasks(path, cut_into, tasks):
    """Write a tasks file; `cut_into` says how instructions are cut: into "characters" or "words"."""
    write_json(path, {"tokens": cut_into, "tasks": [task._asdict() for task in tasks]})


def read_tasks(path, max_len):
    """Read a tasks file; return what instructions are cut into ("characters" or "words") and the tasks.

    Raises BadInput if the file cannot be read or a task is wrong; the message names the task.
    """
    spec = read_json(path, "it must be JSON, which writes \\ as \\\\")
    match spec:
        case {"tokens": "characters" | "words" as cut_into, "tasks": [_, *_] as entries}:
            pass
        case _:
            raise BadInput(f'{path} needs "tokens": "characters" or "words", and "tasks": a list, not empty')
    tasks = {}
    for number, entry in enumerate(entries):
        name = isinstance(entry, dict) and entry.get("name") or number      # its number if it has no name
        try:
            task = read_task(entry, max_len)
            if task.name in tasks:
                raise BadInput("another task has this name")
        except BadInput as e:
            raise BadInput(f"{path}, task {name!s:.60}: {e}") from e
        tasks[name] = task
    patterns = [pattern for task in tasks.values() for pattern in [*task.regexes, task.held_out]]
    overlap = find_overlap(patterns, max_len)
    if overlap:
        one, other = (patterns[i] for i in overlap)
        raise BadInput(f"{path}: {one!r:.60} and {other!r:.60} have strings in common: make them disjoint")
    return cut_into, [*tasks.values()]


def read_task(entry, max_len):
    """Turn an entry of a tasks file into a Task. Raises BadInput that says what is wrong with it.

    Inputs and outputs are normalised to what the network reads: words separated by single spaces.
    """
    match entry:
        case {"name": str(name), "map": dict(mapping), "regexes": list(regexes), "held_out": str(held_out)
              } if name and mapping and regexes:
            pass
        case _:
            raise BadInput('it needs "name": text, "map": inputs and their outputs, "regexes" (not '
                           '"distributions"): a list, none of these empty, and "held_out": a regex')
    if re.search("[\ud800-\udfff]", json.dumps(entry, ensure_ascii=False)):
        raise BadInput("it has half a character (a surrogate, U+D800 to U+DFFF): use whole ones")
    if not all(isinstance(text, str) for text in [*mapping.values(), *regexes]):
        raise BadInput("every output and every regex must be text")
    pairs = [[" ".join(words(text)) for text in pair] for pair in mapping.items()]
    if not all(map(all, pairs)) or len(dict(pairs)) < len(pairs):
        raise BadInput("an input or output is blank, or two inputs are the same words")
    for pattern in [*regexes, held_out]:
        cached_regex(pattern, max_len)
    return Task(name, dict(pairs), regexes, held_out)


# ---------------------------------------------------------------- splits and tokens

PAD, SEP, ANS, EOS = SPECIALS = "<pad>", "<sep>", "<ans>", "<eos>"      # <pad> is token 0
WORD = re.compile(r"""[.,;:!?()<>"…]|[^\s.,;:!?()<>"…]+""")
# Soft hyphens, marks of direction, zero-width spaces. Zero-width joiners stay: they change how letters look.
INVISIBLE = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")


def clean(text):
    """A text in Unicode form NFC, without characters that nobody can see."""
    return unicodedata.normalize("NFC", INVISIBLE.sub("", text))


def words(text):
    """Cut a text into words and punctuation; "what's" and "ice-cream" are words."""
    return WORD.findall(clean(text))


def cut(instruction, cut_into):
    """Cut an instruction into tokens: "characters", or lower-case "words"."""
    if cut_into == "words":
        return words(instruction.lower())
    return list(clean(instruction))


class Instance(NamedTuple):
    """One example: its texts, and the indices of its task, regex and input set."""
    instruction: str
    input: str
    output: str
    task: int
    regex: int              # held-out ones are numbered, too
    input_set: int          # index of the first task that has this set of inputs


# What instances can be grouped by. To add an identity: IDENTITIES["name"] = a function of an Instance.
IDENTITIES = {key: attrgetter(key) for key in ("task", "regex", "input", "output", "input_set")}
IDENTITIES["text"] = attrgetter("instruction")          # not to group by: probe.py counts its letters

# The parts of a row: padding; the instruction and <sep>; the input and <ans>; the output and <eos>.
PADDING, INSTRUCTION, INPUT, OUTPUT = range(4)


class Split(NamedTuple):
    """N instances as rows of T tokens, padded on the right; rows with the same instruction are adjacent.

    A position says where n states are read, by three arrays: rows, ascending; first columns; last columns. A
    state is the mean over its row's columns from first to last. For a single token, the two are the same.
    """
    instances: list
    tokens: np.ndarray          # (N, T) int64
    part: np.ndarray            # (N, T): the part each token belongs to, e.g. INPUT
    identities: dict            # name -> (N,) numbers or text
    positions: dict             # name -> (rows, first columns, last columns), (n,) each

    def state_of(self, position):
        """For each instance, the index of its state among the n states read at `position`: (N,)."""
        # a state belongs to all instances from its row up to the next state's
        return np.searchsorted(self.positions[position][0], np.arange(len(self.tokens)), side="right") - 1

    def labels(self, position):
        """Label the n states read at `position`: identity -> (n,) numbers or text.

        Where instances share a state, as at `instruction`, identities on which they differ are left out.
        """
        rows = self.positions[position][0]
        state_of = self.state_of(position)
        return {key: ids[rows] for key, ids in self.identities.items() if (ids == ids[rows][state_of]).all()}


class Dataset(NamedTuple):
    """The data of a run; token i is vocabulary[i]."""
    cut_into: str               # "characters" or "words": the tokens of an instruction
    tasks: list
    vocabulary: list
    splits: dict                # name -> Split: train, subset, val, ood; pairs if a task has > n_asked inputs


def encode(instances, cut_into):
    """Turn name -> instances into the vocabulary and name -> Split.

    Instances of one instruction must be adjacent. Raises BadInput if two instructions have the same tokens.
    """
    everything = set().union(*instances.values())
    seen = {}                   # tokens -> the first instruction with these tokens
    for string in sorted({x.instruction for x in everything}):
        first = seen.setdefault(tuple(cut(string, cut_into)), string)
        if first != string:
            raise BadInput(f"{first!r} and {string!r} are the same tokens: make regexes allow only one")
    texts = {x: [*cut(x.instruction, cut_into), SEP, *x.input.split(), ANS, *x.output.split(), EOS]
             for x in everything}
    vocabulary = [*SPECIALS, *sorted(set().union(*texts.values()) - set(SPECIALS))]
    number = {token: i for i, token in enumerate(vocabulary)}
    width = max(map(len, texts.values()))
    columns = np.arange(width)
    splits = {}
    for name, members in instances.items():
        padded = [texts[x] + [PAD] * (width - len(texts[x])) for x in members]
        tokens = np.array([[number[token] for token in row] for row in padded])
        sep = (tokens == number[SEP]).argmax(1)                                 # (N,) columns
        ans = (tokens == number[ANS]).argmax(1)
        part = np.select([tokens == 0, columns <= sep[:, None], columns <= ans[:, None]],
                         [PADDING, INSTRUCTION, INPUT], OUTPUT)
        identities = {key: np.array([identity(x) for x in members]) for key, identity in IDENTITIES.items()}
        # the first row of each instruction
        starts = np.sort(np.unique([x.instruction for x in members], return_index=True)[1])
        splits[name] = Split(members, tokens, part, identities, {
            "instruction": (starts, sep[starts], sep[starts]),
            "answer": (np.arange(len(members)), ans, ans)})
    return vocabulary, splits


def make_dataset(cfg):
    """Make the tasks, vocabulary and splits: the same cfg gives the same data on any machine.

    Each instruction comes with n_asked inputs of its task. If there are more, inputs take turns, and split
    `pairs` has subset's instructions with up to n_asked others. Raises BadInput for impossible sizes.
    """
    check(cfg)
    if cfg.tasks:
        cut_into, tasks = read_tasks(cfg.tasks, cfg.max_len)
    else:
        cut_into, tasks = "characters", random_tasks(cfg)
    sets = [{*task.map} for task in tasks]
    most = max(map(len, sets))
    if cfg.n_val > cfg.n_train or most > cfg.n_train * cfg.n_asked:
        raise BadInput(f"n_train is {cfg.n_train}: it must be at least n_val ({cfg.n_val}), and n_train * "
                       f"n_asked at least {most}, the inputs of the largest task")
    sources = []                                # (number of a task, its regex, split of unseen strings)
    for t, task in enumerate(tasks):
        sources += [(t, pattern, "val") for pattern in task.regexes]
        sources.append((t, task.held_out, "ood"))
    instances = defaultdict(list)               # name of a split -> its instances
    for r, (t, pattern, unseen) in enumerate(sources):
        rng = random.Random(f"{cfg.seed}/instructions/{r}")
        n_train = cfg.n_train if unseen == "val" else 0
        strings = cached_regex(pattern, cfg.max_len).sample(n_train + cfg.n_val, rng)
        queues = {}                             # task -> its input-output pairs, those whose turn it is first
        for i, string in enumerate(strings):
            taught = rng.randrange(len(tasks)) if cfg.shuffle_tasks else t
            if taught not in queues:            # one queue serves all strings of this regex and task
                queues[taught] = [*tasks[taught].map.items()]
                if cfg.asks_for == "nothing":
                    queues[taught] = [("", "")]
                rng.shuffle(queues[taught])
            asked, others = queues[taught][:cfg.n_asked], queues[taught][cfg.n_asked:]
            queues[taught] = others + asked     # the next string asks the others first
            if i >= n_train:
                by_split = {unseen: asked}
            elif i >= cfg.n_val:
                by_split = {"train": asked}
            else:
                by_split = {"train": asked, "subset": asked, "pairs": others[:cfg.n_asked]}
            for name in by_split:
                # train has all tasks, the other splits only the first n_probed
                if name == "train" or t < cfg.n_probed:
                    for word, output in by_split[name]:
                        if cfg.asks_for == "task":
                            output = f"task{taught}"
                        instances[name].append(
                            Instance(string, word, output, taught, r, sets.index(sets[taught])))
    return Dataset(cut_into, tasks, *encode(instances, cut_into))


# ---------------------------------------------------------------- the command line


def main():
    """Print a one-page summary of a data set."""
    cfg = DataConfig(**vars(Flags(DataConfig, description=main.__doc__).parse_args()))
    data = make_dataset(cfg)
    task = data.tasks[0]
    print(f"{len(data.tasks)} tasks. Task {task.name} maps {', '.join(map(' to '.join, task.map.items()))}.\n"
          "Its regexes, of which the last one is held out:")
    for pattern in [*task.regexes, task.held_out]:
        regex = cached_regex(pattern, cfg.max_len)
        strings = ", ".join(regex.sample(3, random.Random(0), unique=False))
        print(f"  {pattern}   {regex.count:,} strings, e.g. {strings}")
    for name, split in data.splits.items():
        print(f"\n{name}: {len(split.positions['instruction'][0]):,} instructions, {len(split.instances):,} "
              "instances, such as")
        for x in random.Random(0).choices(split.instances, k=4):
            instruction = " ".join(cut(x.instruction, data.cut_into))
            task = data.tasks[x.task]
            print(f"  {instruction} {SEP} {x.input} {ANS} {x.output} {EOS}   (task {task.name})")


if __name__ == "__main__":
    command_line(main)
