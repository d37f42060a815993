"""The data: regular expressions, tasks, splits and tokens.

A task maps inputs to outputs. It is never named to the model, only described by instructions: strings sampled
from regular expressions (figure 1 of Wu & Varshney, arXiv 2402.12151). Four parts: an exact sampler of
regular languages; configuration and tasks; the splits a model is trained and probed on; the command line.

    python data.py                        print a one-page summary of the default data set
    python data.py --tasks mine.json      the same for a tasks file

The paper gives neither its regexes nor its sizes; ours are in `random_pattern` and `DataConfig`.
"""
import argparse
import dataclasses
import inspect
import json
import math
import os
import random
import re
import sys
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from string import ascii_letters, ascii_lowercase, digits
from typing import NamedTuple

import numpy as np

# On a busy machine, threads that spin while waiting can make small training steps 20 times slower. torch
# reads this setting when it is imported, so import this file first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# ---------------------------------------------------------------- regular expressions

PRINTABLE = frozenset(map(chr, range(0x20, 0x7F)))
SETS = {r"\d": frozenset(digits), r"\s": frozenset(" "), r"\w": frozenset(ascii_letters + digits + "_")}
SETS |= {name.upper(): PRINTABLE - chars for name, chars in SETS.items()}
QUANTIFIER = re.compile(r"[?*+]|\{[0-9]+(,[0-9]*)?\}|")           # an empty match: no quantifier
CLASS = re.compile(r"\[(\^?+)(\]?+(?:\\.|[^]\\])*)\]", re.DOTALL)     # a ] right after [ or [^ is a literal
MEMBER = re.compile(r"(\\?.)(?:-(\\?.))?", re.DOTALL)               # in a class: a character or a range
# Unsupported constructs: a regex that detects one, its name for the error message, how to fix the pattern.
BAD_ESCAPE = (
    r"\\(?:(?![dswDSW])[0-9A-Za-z]|\Z)", "escape", "only punctuation, or one of d w s D W S, may follow a \\")
BAD = [
    (r"\\[1-9](?![0-7]{2})", "back-reference", "write out what it can match"),     # \123 is octal: BAD_ESCAPE
    (r"[\^$]|\\[bBAZ]", "anchor", "drop it (the whole string is always matched), or escape ^ and $"),
    (r"\(\?(?!:).?", "group", "only ( ) and (?: ) are supported"),
    (r"(?<=[?*+}])[?*+{]", "second quantifier", "drop a lazy ?; otherwise wrap what it repeats in (?: )"),
    (r"[?*+]", "leading quantifier", "escape it, or put something before it to repeat"),
    (r"[{}\]]", "bare", "escape it, or write a repetition as {m}, {m,} or {m,n}"),
    BAD_ESCAPE]
MAX_DEPTH = 50          # levels of nested groups
MAX_CLASS = 10_000      # characters in one class
MAX_WORK = 700_000      # steps to build one Regex: about a second


class Regex:
    """The language {s : re.fullmatch(pattern, s), len(s) <= max_len}: counted, indexed and sampled exactly.

    The pattern becomes a deterministic automaton, in which every string has exactly one path, even if the
    pattern is ambiguous. Dynamic programming counts the paths, and walking them in a fixed order turns an
    index into a string (Goldberg & Sipser 1985), so a uniform index gives a uniform string.

    Supported: literals, escaped punctuation, `.`, classes, `\\d \\w \\s \\D \\W \\S`, `( )`, `(?: )`, `|` and
    `? * + {m} {m,} {m,n}`. `.`, negated classes and these escapes cover printable ASCII (0x20 to 0x7e) only.
    Raises ValueError for anything else, naming the construct and its position, or if counting takes too long.
    """

    def __init__(self, pattern, max_len=64):
        if not isinstance(pattern, str) or not isinstance(max_len, int) or max_len < 0:
            raise ValueError(f"Regex({pattern!r:.60}, {max_len!r:.60}) needs a string and an integer >= 0")
        self.pattern, self.max_len = pattern, max_len
        self._work, self._known = 0, {}
        self._start, end = _parse(pattern, 0)
        if end < len(pattern):
            _fail(pattern, "unmatched )", end, "escape it, or open a group")
        levels = [{self._start}]                # levels[n]: the states reachable with n characters
        while levels[-1] and len(levels) <= max_len:
            levels.append({target for state in levels[-1] for _, target in self._read(state)[1]})
            self._spend(len(levels[-1]))
        self._ways = [{}]       # in the end, _ways[n][state]: how many strings can follow n characters there
        for level in reversed(levels):          # from the last character back to the first
            ways = {}
            for state in level:
                ends, edges = self._read(state)
                after = self._ways[0]           # the counts one character later
                ways[state] = ends + sum(len(chars) * after.get(target, 0) for chars, target in edges)
                self._spend(len(edges) * (1 + ways[state].bit_length() // 1000))    # big integers cost more
            self._ways.insert(0, ways)
        self.count = ways[self._start]

    def _spend(self, steps):
        self._work += steps
        if self._work > MAX_WORK:
            raise ValueError(f"{self.pattern!r:.60} is too large or ambiguous: simplify it or lower max_len")

    def _read(self, state):
        """Return whether a string may end in this state, and the state's edges [(characters, next state)].

        A state is a set of branches (see `_parse`): the alternatives for the rest of the string (subset
        construction, Rabin & Scott 1959).
        """
        if state not in self._known:
            left_after, edges = defaultdict(set), defaultdict(str)
            for branch in state:
                for chars, left in _steps(branch):
                    self._spend((1 + len(chars)) * (1 + len(left) // 50))           # long branches cost more
                    for c in chars:
                        left_after[c].add(left)
            for c in sorted(left_after):
                edges[frozenset(left_after[c])] += c        # one edge per next state
            self._known[state] = _may_end(state), [(chars, target) for target, chars in edges.items()]
        return self._known[state]

    def unrank(self, i):
        """Return the i-th string, 0 <= i < count, in a fixed order. Raises ValueError for any other i."""
        if not (isinstance(i, int) and 0 <= i < self.count):
            raise ValueError(f"{self.pattern!r:.60} has no string {i!r:.60}: use 0 to count - 1")
        string = ""
        ends, edges = self._read(self._start)
        while i or not ends:
            i -= ends                           # the string that ends here, if any, comes first
            ways = self._ways[len(string) + 1]
            for chars, state in edges:
                if i < len(chars) * ways[state]:        # the string goes on along this edge
                    break
                i -= len(chars) * ways[state]
            which, i = divmod(i, ways[state])           # which character, and which string after it
            string += chars[which]
            ends, edges = self._read(state)
        return string

    def sample(self, n, rng, unique=True):
        """Draw n strings uniformly, distinct if unique. Raises ValueError if the language has too few."""
        if not 0 <= n <= (self.count if unique else n * self.count):      # with repeats, one string is enough
            raise ValueError(f"{n} strings of at most {self.max_len} characters were asked for, but "
                             f"{self.pattern!r:.60} has only {min(self.count, 10 ** 18)}: make it more "
                             "general, lower n_train or n_val, or raise max_len")
        strings = []
        moved = {}              # a Fisher-Yates shuffle: place j holds moved[j], or j if not in there
        for i in range(n):
            j = rng.randrange(i if unique else 0, self.count)
            strings.append(self.unrank(moved.get(j, j)))
            if unique:
                moved[j] = moved.get(i, i)
        return strings

    def matches(self, s):
        """Whether s is in the language."""
        state = self._start
        for c in s[:self.max_len]:
            state = next((target for chars, target in self._read(state)[1] if c in chars), frozenset())
        return len(s) <= self.max_len and self._read(state)[0]

    def isdisjoint(self, other):
        """Whether no string is in both languages. Raises ValueError if they are too large to compare."""
        return find_overlap([self.pattern, other.pattern], min(self.max_len, other.max_len)) is None


def find_overlap(patterns, max_len):
    """Find two patterns that have a string in common: return their indices i < j, or None.

    Languages are disjoint if and only if the size of their union is the sum of their sizes. Raises ValueError
    if the union is too large to count.
    """
    def overlap(group):
        total = sum(compile_regex(pattern, max_len).count for pattern in group)
        return Regex("|".join(group), max_len).count < total

    if not overlap(patterns):
        return None
    # bisect for the first `last` at which patterns 0 to last overlap: from there on they always do
    j = bisect_left(range(len(patterns)), True, key=lambda last: overlap(patterns[:last + 1]))
    i = next(i for i in range(j) if overlap([patterns[i], patterns[j]]))
    return i, j


compile_regex = lru_cache(maxsize=10_000)(Regex)        # cache: overlap checks and sampling share it


def _fail(pattern, what, i, way_out):
    raise ValueError(f"{what} at position {i} of {pattern!r:.60}: {way_out}")


def _refuse(pattern, i, *unsupported):
    for construct, what, way_out in unsupported:
        if found := re.compile(construct).match(pattern, i):
            _fail(pattern, f"{what} {found[0]}", i, way_out)


def _parse(pattern, i, depth=0):
    """Parse from position i to a ) or the end by recursive descent; return the branches and the end position.

    A branch, one alternative of |, is a tuple of items (branches, least, most): `ab?` has one branch,
    ((A, 1, 1), (B, 0, 1)). Recursion ends at single characters: A is {({a},)}, one branch of a bare set of
    characters. least and most are floats, as most may be inf.
    """
    branches = [[]]
    while i < len(pattern) and pattern[i] != ")":
        _refuse(pattern, i, *BAD)
        start, c = i, pattern[i]
        i += 1
        if c == "|":
            branches.append([])
            continue
        if c == "(":
            if depth == MAX_DEPTH:
                _fail(pattern, "too many nested groups", start, f"nest at most {MAX_DEPTH}")
            inside, i = _parse(pattern, i + 2 * pattern.startswith("?:", i), depth + 1)     # skip a ?:
            if i == len(pattern):
                _fail(pattern, "unclosed (", start, "close it, or escape it")
            i += 1
        else:
            if c == "[":
                chars, i = _char_class(pattern, start)
            elif c == "\\":
                chars, i = SETS.get(c + pattern[i], pattern[i]), i + 1
            else:
                chars = PRINTABLE if c == "." else c
            inside = frozenset([(frozenset(chars),)])
        least, most, i = _repetition(pattern, i)
        if _may_end(inside):
            least = 0           # skipping it stands for matching nothing, so each round reads a character
        if most > 0:
            branches[-1].append((inside, least, most))
    return frozenset(map(tuple, branches)), i


def _char_class(pattern, i):
    """Parse the [...] at position i; return its characters and the end position."""
    found = CLASS.match(pattern, i)
    if not found:
        _fail(pattern, "unclosed [", i, "close it, or escape it")
    chars = set()
    for member in MEMBER.finditer(pattern, *found.span(2)):
        low, high = member[1], member[2] or member[1]           # [-1] below drops the backslash
        _refuse(pattern, member.start(), BAD_ESCAPE)
        _refuse(pattern, member.end() - len(high), BAD_ESCAPE)
        if member[2] and {low, high} & {*SETS} or high[-1] < low[-1]:
            _fail(pattern, f"bad range {member[0]}", member.start(), "write two characters, the lower first")
        chars |= SETS.get(low) or {*map(chr, range(ord(low[-1]), ord(high[-1]) + 1))}
        if len(chars) > MAX_CLASS:
            _fail(pattern, "too large a class", i, f"use at most {MAX_CLASS} characters")
    return PRINTABLE - chars if found[1] else chars, found.end()


def _repetition(pattern, i):
    """Parse the quantifier at position i, if any; return least, most (1, 1 if none) and the end position."""
    found = QUANTIFIER.match(pattern, i)
    text = {"": "1", "?": "0,1", "*": "0,", "+": "1,"}.get(found[0], found[0][1:-1])
    least, comma, most = text.partition(",")
    least, most = float(least), float(most or ("inf" if comma else least))
    if most < least:
        _fail(pattern, f"empty repetition {found[0]}", i, "write {m,n} with m <= n")
    return least, most, found.end()


def _may_end(branches):
    """Whether one of these branches matches the empty string: all its items are groups with least = 0."""
    return any(all(type(item) is tuple and item[1] == 0 for item in branch) for branch in branches)


def _steps(branch):
    """Yield (characters, rest of the branch) for every way to read its first character (Antimirov 1996)."""
    for i, item in enumerate(branch):
        rest = branch[i + 1:]
        if isinstance(item, frozenset):
            yield item, rest
            return
        group, least, most = item
        if most > 1:
            rest = ((group, max(least - 1, 0), most - 1), *rest)        # one repetition fewer is left
        for inside in group:
            for chars, left in _steps(inside):
                yield chars, left + rest
        if least > 0:           # this item must be read before the next
            return


# ---------------------------------------------------------------- configuration and tasks


@dataclass
class DataConfig:
    """Every setting of the data; `train.Config` adds the rest. `--help` prints the comments."""
    seed: int = 0                   # determines every random draw
    tasks: str = ""                 # a tasks file to use instead of random tasks
    n_tasks: int = 16               # number of random tasks
    n_distributions: int = 3        # regexes per random task, plus one that is held out
    n_mappings: int = 5             # input-output pairs per random task
    n_inputs: int = 10              # size of the pool of inputs that random tasks share
    n_outputs: int = 20             # size of the pool of outputs that random tasks share
    twins: bool = False             # random tasks come in pairs with the same inputs and different outputs
    n_train: int = 20               # training instructions per regex
    n_val: int = 10                 # instructions per regex in each of subset, val and ood
    n_asked: int = 8                # inputs per instruction; split `pairs` asks up to as many again
    asks_for: str = "output"        # target: output, task or distribution; nothing: instructions only
    n_probed: int = 64              # tasks in subset, val, ood and pairs; any others are only trained on
    max_len: int = 128              # maximum length of an instruction, in characters
    shuffle_tasks: bool = False     # give every instruction a random task, which can only be memorised

    choices = {"asks_for": ("output", "task", "distribution", "nothing")}       # no annotation, so no field

    def check(self):
        """Raise ValueError for a setting out of range. Integers start at 1, or at 0 if the default is 0."""
        for field in dataclasses.fields(self):
            name, kind, value = field.name, field.type, getattr(self, field.name)
            if type(value) is not kind and (kind, type(value)) != (float, int):    # an int may serve as float
                raise ValueError(f"{name} is {value!r:.60}: it must be of type {kind.__name__}")
            if value not in self.choices.get(name, [value]):
                raise ValueError(f"{name} is {value!r}: choose from {', '.join(self.choices[name])}")
            least = 1 if kind is int and field.default else 0
            if kind in (int, float) and not least <= value < 10 ** 6:
                raise ValueError(f"{name} is {value}: it must be at least {least} and below a million")


class Task(NamedTuple):
    """A function from inputs to outputs, the regexes that describe it, and one that is never trained on."""
    name: str
    map: dict               # input -> output
    distributions: list     # regexes
    held_out: str


TWO_LETTERS = [a + b for a in ascii_lowercase for b in ascii_lowercase]


def random_pattern(rng):
    """Draw a regex: two literals like ab, two classes like [abcd]{2}, one choice (ab|cd|ef), in random order.

    It has 16 * 16 * 3 = 768 strings, all of 10 letters, so length says nothing about the task.
    """
    classes = [f"[{''.join(sorted(rng.sample(ascii_lowercase, 4)))}]{{2}}" for _ in range(2)]
    choice = f"({'|'.join(rng.sample(TWO_LETTERS, 3))})"
    parts = [*rng.sample(TWO_LETTERS, 2), *classes, choice]
    return "".join(rng.sample(parts, len(parts)))


def random_maps(cfg, rng):
    """Draw a map for each task, using all inputs and outputs evenly; no two tasks share an input-output pair.

    No two tasks have the same set of inputs until all sets are used; with cfg.twins, tasks 0 and 1 share one,
    2 and 3 another, and so on. Raises ValueError for impossible sizes, or if only one task uses a word.
    """
    k = cfg.n_mappings
    if k > min(cfg.n_inputs, cfg.n_outputs):
        raise ValueError(f"n_mappings is {k}: it must not exceed n_inputs or n_outputs")
    inputs = [chr(ord("A") + i % 26) * (1 + i // 26) for i in range(cfg.n_inputs)]      # A ... Z, AA, BB ...
    outputs = [str(i) for i in range(cfg.n_outputs)]
    maps, sets, pairs, uses = [], set(), set(), Counter()

    def deal(pool, attempt):        # k words, least used first; more at random every 500 attempts
        return sorted(pool, key=lambda word: uses[word] + (1 + attempt // 500) * rng.random())[:k]

    for t in range(cfg.n_tasks):
        twin = cfg.twins and t % 2
        if len(sets) == math.comb(cfg.n_inputs, k):
            sets.clear()            # all sets are used up: allow repeats
        for attempt in range(10_000):
            chosen = tuple(maps[-1] if twin else sorted(deal(inputs, attempt)))
            mapping = dict(zip(chosen, rng.sample(deal(outputs, attempt), k)))
            if pairs.isdisjoint(mapping.items()) and (twin or chosen not in sets):
                break
        else:
            raise ValueError(f"raise n_outputs ({cfg.n_outputs}): an input needs a new output in each task")
        maps.append(mapping)
        sets.add(chosen)
        pairs.update(mapping.items())
        uses.update([*mapping, *mapping.values()])
    if any(uses[word] < 2 for word in inputs + outputs):
        raise ValueError("an input or output that only one task uses would give it away: lower n_inputs or "
                         "n_outputs, or raise n_tasks")
    return maps


def random_tasks(cfg):
    """Draw tasks; no two regexes have a string in common. Raises ValueError as `random_maps` does."""
    rng = random.Random(f"{cfg.seed}/tasks")
    maps, tasks = random_maps(cfg, rng), []
    patterns = [random_pattern(rng) for _ in range((cfg.n_distributions + 1) * cfg.n_tasks)]
    while overlap := find_overlap(patterns, cfg.max_len):
        patterns[overlap[1]] = random_pattern(rng)
    for t, mapping in enumerate(maps):
        held_out, *distributions = patterns[t::cfg.n_tasks]
        tasks.append(Task(f"t{t:02d}", mapping, distributions, held_out))
    return tasks


def write(path, content):
    """Write a text file: first a temporary one, then rename it, so that nobody reads half a file."""
    aside = Path(f"{path}.tmp")
    aside.write_bytes(content.encode())
    os.replace(aside, path)


def write_tasks(path, cut_into, tasks):
    """Write a tasks file; `cut_into` says how instructions are cut: into "characters" or "words"."""
    spec = {"tokens": cut_into, "tasks": [task._asdict() for task in tasks]}
    write(path, json.dumps(spec, indent=1, ensure_ascii=False))


def read_tasks(path, max_len):
    """Read a tasks file; return what instructions are cut into ("characters" or "words") and the tasks.

    Inputs and outputs are normalised to what the network reads: words separated by single spaces.
    Raises ValueError naming the task and what is wrong with it, OSError if the file cannot be read.
    """
    def check(right, rule):         # `where`, set below, names the current task
        if not right:
            raise ValueError(f"{path}, {where}: {rule}")

    def unique(pairs):              # json alone would silently keep the last of duplicate keys
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a key is there twice among {[key for key, _ in pairs]}")
        return dict(pairs)

    try:
        spec = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not a tasks file: {e} (JSON writes \\ as \\\\)") from None
    where, tasks = "top level", {}
    check(isinstance(spec, dict) and spec.get("tokens") in ("characters", "words")
          and isinstance(spec.get("tasks"), list) and spec["tasks"],
          'needs "tokens": "characters" or "words", and "tasks": a list that is not empty')
    for number, entry in enumerate(spec["tasks"]):
        where = f"task {number}"
        for key, kind in Task.__annotations__.items():
            check(isinstance(entry, dict) and isinstance(entry.get(key), kind) and entry[key],
                  f"{key} is missing, empty or not of type {kind.__name__}")
        name, mapping, distributions, held_out = (entry[key] for key in Task._fields)
        where = f"task {name}"
        check(name not in tasks, "another task has this name")
        texts = [*mapping.values(), *distributions]
        check(all(isinstance(text, str) for text in texts), "every output and every regex must be text")
        pairs = [[" ".join(words(text)) for text in pair] for pair in mapping.items()]
        check(all(map(all, pairs)), "an input or output is blank")
        check(len(dict(pairs)) == len(pairs), "two inputs are the same words")
        tasks[name] = Task(name, dict(pairs), distributions, held_out)
    patterns = [p for task in tasks.values() for p in [*task.distributions, task.held_out]]
    overlap = find_overlap(patterns, max_len)
    if overlap:
        one, other = (patterns[i] for i in overlap)
        raise ValueError(f"{path}: {one!r:.60} and {other!r:.60} have strings in common: make them disjoint")
    return spec["tokens"], [*tasks.values()]


# ---------------------------------------------------------------- splits and tokens

PAD, SEP, ANS, EOS = SPECIALS = "<pad>", "<sep>", "<ans>", "<eos>"      # <pad> is token 0
WORD = re.compile(r"""[.,;:!?()<>"…]|[^\s.,;:!?()<>"…]+""")


def words(text):
    """Split a text, in Unicode form NFC, into words and punctuation; "what's" and "ice-cream" are words."""
    return WORD.findall(unicodedata.normalize("NFC", text))


def cut(instruction, cut_into):
    """Cut an instruction into tokens: "characters", or lower-case "words"."""
    if cut_into == "words":
        return words(instruction.lower())
    return list(unicodedata.normalize("NFC", instruction))


class Instance(NamedTuple):
    """One example: its texts, and the indices of its task, distribution and input set."""
    instruction: str
    input: str
    output: str
    task: int
    distribution: int
    input_set: int          # index of the first task that has this set of inputs


# What instances can be grouped by. To add an identity: IDENTITIES["name"] = a function of an Instance.
IDENTITIES = {key: attrgetter(key) for key in ("task", "distribution", "input", "output", "input_set")}


class Split(NamedTuple):
    """N instances as rows of T tokens, padded on the right; rows with the same instruction are adjacent."""
    instances: list
    tokens: np.ndarray          # (N, T) int64
    is_output: np.ndarray       # (N, T) bool: True for the output and its <eos>
    identities: dict            # name -> (N,) numbers or text
    positions: dict             # name -> (rows, columns), (n,) each: the tokens whose states are read

    def state_of(self, position):
        """For each instance, the index of its state among the n states read at `position`: (N,)."""
        # rows ascend, and a state belongs to all instances from its row up to the next state's
        return np.searchsorted(self.positions[position][0], np.arange(len(self.tokens)), side="right") - 1

    def labels(self, position):
        """Label the n states read at `position`: identity -> (n,) numbers or text.

        Where instances share a state, as at `instruction`, identities on which they differ are left out.
        """
        rows, state_of = self.positions[position][0], self.state_of(position)
        return {key: ids[rows] for key, ids in self.identities.items() if (ids == ids[rows][state_of]).all()}


class Dataset(NamedTuple):
    """The data of a run; token i is vocabulary[i]."""
    cut_into: str               # "characters" or "words": the tokens of an instruction
    tasks: list
    vocabulary: list
    splits: dict                # name -> Split: train, subset, val, ood; pairs if a task has > n_asked inputs


def encode(instances, cut_into):
    """Turn name -> instances into the vocabulary and name -> Split.

    Instances of one instruction must be adjacent. Raises ValueError if two instructions have the same tokens.
    """
    everything = set().union(*instances.values())
    cuts, known = {}, {}
    for string in sorted({x.instruction for x in everything}):
        cuts[string] = cut(string, cut_into)
        first = known.setdefault(tuple(cuts[string]), string)
        if first != string:
            raise ValueError(f"{first!r} and {string!r} are the same tokens: make regexes allow only one")
    texts = {x: [*cuts[x.instruction], SEP, *x.input.split(), ANS, *x.output.split(), EOS]
             for x in everything}
    vocabulary = [*SPECIALS, *sorted(set().union(*texts.values()) - set(SPECIALS))]
    number = {token: i for i, token in enumerate(vocabulary)}
    width = max(map(len, texts.values()))
    splits = {}
    for name, some in instances.items():
        rows = [[number[token] for token in texts[x]] for x in some]
        tokens = np.array([row + [0] * (width - len(row)) for row in rows])                 # 0 is <pad>
        sep = (tokens == number[SEP]).argmax(1)                         # (N,) columns
        ans = (tokens == number[ANS]).argmax(1)
        is_output = (np.arange(width) > ans[:, None]) & (tokens != 0)
        identities = {key: np.array([identity(x) for x in some]) for key, identity in IDENTITIES.items()}
        first = np.sort(np.unique([x.instruction for x in some], return_index=True)[1])    # where each starts
        splits[name] = Split(some, tokens, is_output, identities, {
            "instruction": (first, sep[first]), "answer": (np.arange(len(some)), ans)})
    return vocabulary, splits


def make_dataset(cfg):
    """Make the tasks, vocabulary and splits: the same cfg gives the same data on any machine.

    Each instruction comes with n_asked inputs of its task. If there are more, inputs take turns, and split
    `pairs` has subset's instructions with up to n_asked others. Raises ValueError for impossible sizes.
    """
    cfg.check()
    cut_into, tasks = read_tasks(cfg.tasks, cfg.max_len) if cfg.tasks else ("characters", random_tasks(cfg))
    sets, n = [{*task.map} for task in tasks], cfg.n_asked
    input_sets = [sets.index(some) for some in sets]
    most = max(map(len, sets))
    if cfg.n_val > cfg.n_train or most > cfg.n_train * n:
        raise ValueError(f"n_train is {cfg.n_train}: it must be at least n_val ({cfg.n_val}), and n_train * "
                         f"n_asked at least {most}, the inputs of the largest task")
    instances = defaultdict(list)
    regexes = [(t, p) for t, task in enumerate(tasks) for p in [*task.distributions, task.held_out]]
    for number, (t, pattern) in enumerate(regexes):
        rng = random.Random(f"{cfg.seed}/instructions/{number}")
        held_out = pattern == tasks[t].held_out
        n_strings = cfg.n_val if held_out else cfg.n_train + cfg.n_val
        turns = Counter()                       # task -> how many inputs have had their turn
        for i, string in enumerate(compile_regex(pattern, cfg.max_len).sample(n_strings, rng)):
            described = rng.randrange(len(tasks)) if cfg.shuffle_tasks else t      # the task taught
            questions = [("", "")] if cfg.asks_for == "nothing" else [*tasks[described].map.items()]
            random.Random(f"{cfg.seed}/turns/{number}/{described}").shuffle(questions)     # always alike
            turn = turns[described] % len(questions)
            turns[described] += n
            questions = questions[turn:] + questions[:turn]            # start with those whose turn it is
            split = "ood" if held_out else "train" if i < cfg.n_train else "val"
            parts = {split: questions[:n]}
            if split == "train" and i < cfg.n_val:
                parts |= {"subset": questions[:n], "pairs": questions[n:2 * n]}
            for part, asked in parts.items():
                # train has all tasks, the other splits only the first n_probed
                for word, output in asked if part == "train" or t < cfg.n_probed else []:
                    answers = {"task": f"task{described}", "distribution": f"distribution{number}"}
                    output = answers.get(cfg.asks_for, output)
                    instances[part].append(
                        Instance(string, word, output, described, number, input_sets[described]))
    return Dataset(cut_into, tasks, *encode(instances, cut_into))


# ---------------------------------------------------------------- the command line


class Flags(argparse.ArgumentParser):
    """An argument parser with a flag for every setting of `config`; those not given are left out."""

    def __init__(self, config=object, **texts):
        super().__init__(allow_abbrev=False, **texts)
        source = "".join(inspect.getsource(part) for part in config.__mro__[:-1])
        for name, why in re.findall(r"(\w+): \w+ = .*?# (.*)", source):      # its comment is the help text
            default = getattr(config, name)
            takes = {"action": "store_true"} if default is False else {"type": type(default)}
            self.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS,
                              help=f"{why} (default: {default!r})", **takes)

    def error(self, message):
        raise ValueError(f"{message}; --help lists the flags")


def command_line(main):
    """Run main(). Bad input is reported as one line on stderr, `error: what to do`, with exit status 2."""
    try:
        main()
    except BrokenPipeError:                     # the reader of our output, say `head`, closed it
        os._exit(141)                           # 128 + SIGPIPE
    except KeyboardInterrupt:
        sys.exit(130)                           # 128 + SIGINT
    except (ValueError, OSError, ImportError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)


def main():
    """Print a one-page summary of a data set."""
    cfg = DataConfig(**vars(Flags(DataConfig, description=main.__doc__).parse_args()))
    data = make_dataset(cfg)
    print(f"{len(data.tasks)} tasks, {len(data.vocabulary)} different tokens, sequences of at most "
          f"{data.splits['train'].tokens.shape[1]} tokens; instructions are cut into {data.cut_into}\n\n"
          "split   instructions  instances  tasks  regexes")
    for name, split in data.splits.items():
        print(f"{name:6}{len(split.positions['instruction'][0]):14,}{len(split.instances):11,}"
              f"{len(set(split.identities['task'])):7,}{len(set(split.identities['distribution'])):9,}")
    task = data.tasks[0]
    print(f"\ntask {task.name} maps {', '.join(map(' to '.join, task.map.items()))}")
    for pattern in [*task.distributions, task.held_out]:
        regex = compile_regex(pattern, cfg.max_len)
        print(f"  {'held out' if pattern == task.held_out else 'regex'}  {pattern}   "
              f"{min(regex.count, 10 ** 18):,} strings, e.g. "
              f"{', '.join(regex.sample(3, random.Random(0), unique=False))}")
    for name, split in data.splits.items():
        print(f"\n{name}")
        for x in random.Random(0).choices(split.instances, k=5):
            instruction = " ".join(cut(x.instruction, data.cut_into))
            print(f"  {instruction} {SEP} {x.input} {ANS} {x.output} {EOS}   "
                  f"(task {data.tasks[x.task].name})")


if __name__ == "__main__":
    command_line(main)
