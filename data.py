"""The data: regular expressions, tasks, splits, tokens.

A task maps inputs to outputs and is only ever described by instructions: strings sampled from regular
expressions (figure 1 of Wu & Varshney, arXiv 2402.12151). Four chapters: an exact sampler of regular
languages; knobs and tasks; the splits that a model is trained and probed on; what all command lines share.

    python data.py                        print the default data set on a page
    python data.py --tasks mine.json      print the data set of a tasks file

Our choices, since the paper gives no regexes and no sizes: `random_pattern` and `DataConfig`.
"""
import argparse
import dataclasses
import json
import os
import random
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_letters, ascii_lowercase, ascii_uppercase, digits
from typing import NamedTuple

import numpy as np

# ---------------------------------------------------------------- regular expressions

PRINTABLE = frozenset(map(chr, range(0x20, 0x7F)))
ESCAPES = {"d": frozenset(digits), "s": frozenset(" "), "w": frozenset(ascii_letters + digits + "_")}
ESCAPES |= {name.upper(): PRINTABLE - chars for name, chars in ESCAPES.items()}
COUNTED = re.compile(r"\{([0-9]+)(?:,([0-9]*))?\}")
MAX_STATES = 20_000     # of an automaton, beyond it a pattern is refused
MAX_WORK = 2_000_000    # steps of one construction, likewise: about half a second


class Regex:
    """The language {s : re.fullmatch(pattern, s), len(s) <= max_len}: counted, indexed and sampled exactly.

    The pattern becomes a Thompson automaton and that a deterministic one, in which a string has one path,
    however ambiguous the pattern (Cox, swtch.com/~rsc/regexp/regexp1.html). Dynamic programming counts the
    paths, and walking them in a fixed order turns an index into a string (Goldberg & Sipser 1985): a uniform
    index is a uniform string.

    Supported: literals, escaped punctuation, `.`, classes, `\\d \\w \\s \\D \\W \\S`, `( )`, `(?: )`, `|` and
    `? * + {m} {m,} {m,n}`. `.`, negated classes and these escapes stay within printable ASCII (0x20 to 0x7e).
    Raises ValueError for anything else, naming construct and position, and for what is too large to count.
    """

    def __init__(self, pattern: str, max_len: int = 64):
        if not isinstance(pattern, str) or not isinstance(max_len, int) or max_len < 0:
            raise ValueError(f"not a string and a length of at least 0: {pattern!r:.60}, {max_len!r:.60}")
        self.pattern, self.max_len = pattern, max_len
        self._edges, self._accept = _determinise(pattern, *_thompson(pattern))
        # counts[r][q]: strings of at most r characters that lead from state q to acceptance; the last row is
        # that of max_len, or an earlier one that all after it would only repeat
        self._counts, work, n_edges = [[int(a) for a in self._accept]], 0, sum(map(len, self._edges))
        for r in range(max_len):
            row = [a + sum(len(chars) * self._counts[r][q] for chars, q in edges)
                   for a, edges in zip(self._accept, self._edges)]
            if row == self._counts[r]:
                break
            self._counts.append(row)
            work += n_edges * (1 + max(row).bit_length() // 1000)
            if work > MAX_WORK:
                raise ValueError(f"{pattern!r:.60} is too large to count: lower max_len, it is {max_len}")
        self.count = self._counts[-1][0]

    def unrank(self, i: int) -> str:
        """The i-th string, 0 <= i < count, in a fixed order. Raises ValueError for any other i."""
        if not (isinstance(i, int) and 0 <= i < self.count):
            raise ValueError(f"{self.pattern!r:.60} has {show(self.count)} strings, none numbered {i!r:.60}")
        state, left, string = 0, len(self._counts) - 1, ""
        while not (self._accept[state] and i == 0):
            i -= self._accept[state]    # the string that ends here came first
            left -= 1
            counts = self._counts[left]
            for chars, target in self._edges[state]:
                block = counts[target]
                if i < block * len(chars):
                    break
                i -= block * len(chars)
            which, i = divmod(i, block)
            string += chars[which]
            state = target
        return string

    def sample(self, n: int, rng: random.Random, unique: bool = True) -> list[str]:
        """n strings, uniform over the language, distinct if unique. Raises ValueError if it has too few."""
        if self.count < (n if unique else min(n, 1)):
            raise ValueError(f"{self.pattern!r:.60} has only {show(self.count)} strings of at most "
                             f"{self.max_len} characters, {n} were asked for")
        if not unique:
            return [self.unrank(rng.randrange(self.count)) for _ in range(n)]
        moved, strings = {}, []         # a Fisher-Yates shuffle that stores only what it has moved
        for i in range(n):
            j = rng.randrange(i, self.count)
            strings.append(self.unrank(moved.get(j, j)))
            moved[j] = moved.get(i, i)
        return strings

    def matches(self, s: str) -> bool:
        """Whether s is in the language."""
        state = 0
        for c in s:
            state = next((target for chars, target in self._edges[state] if c in chars), None)
            if state is None:
                return False
        return self._accept[state] and len(s) <= self.max_len

    def isdisjoint(self, other: "Regex") -> bool:
        """Whether no string is in both languages: no pair of accepting states is reached by one string.

        Raises ValueError if the product automaton is too large to walk.
        """
        seen, pairs, work = {(0, 0)}, [(0, 0, 0)], 0
        for p, q, length in pairs:      # grows while it is walked, shortest strings first
            if length > min(self.max_len, other.max_len):
                break
            if self._accept[p] and other._accept[q]:
                return False
            for (a, t), (b, u) in product(self._edges[p], other._edges[q]):
                if (t, u) not in seen and not set(a).isdisjoint(b):
                    seen.add((t, u))
                    pairs.append((t, u, length + 1))
            work += len(self._edges[p]) * len(other._edges[q])
            if work > MAX_WORK:
                raise ValueError(f"{self.pattern!r:.60} and {other.pattern!r:.60} are too large to compare")
        return True


def show(count: int) -> str:
    """A count as text; Python refuses to write out the largest ones."""
    return f"{count:,}" if count < 10 ** 18 else f"about 2^{count.bit_length() - 1}"


def _fail(pattern, what, at, way_out):
    raise ValueError(f"{what} at position {at} of {pattern!r:.60}: {way_out}")


def _lex(pattern):
    """Yield (position, kind, value): "set" and characters, "repeat" and bounds, or one of ( | ) and None."""
    def element(at):                        # a character, or what an escape stands for, and where it ends
        if pattern[at] != "\\":
            return frozenset(pattern[at]), at + 1
        c = pattern[at + 1:at + 2]
        if c not in ESCAPES and (not c or c.isascii() and c.isalnum()):
            what = "anchor" if c and c in "bBAZ" else "back-reference" if c.isdigit() else "escape"
            _fail(pattern, f"{what} \\{c}", at, "only punctuation, d, w, s, D, W and S go with a backslash; "
                  "the whole string is always matched")
        return ESCAPES.get(c, frozenset(c)), at + 2

    def char_class(at):
        negated = pattern.startswith("^", at + 1)
        chars, i = set(), at + 1 + negated
        while i == at + 1 + negated or not pattern.startswith("]", i):      # a "]" in front is a character
            if i >= len(pattern):
                _fail(pattern, "unclosed [", at, "close it, or escape it")
            start, (low, i) = i, element(i)
            if pattern.startswith("-", i) and pattern[i + 1:i + 2] not in ("]", ""):
                (high, i), middle = element(i + 1), i
                single = pattern[start + 1:middle] not in ESCAPES and pattern[middle + 2:i] not in ESCAPES
                if not single or not 0 <= ord(min(high)) - ord(min(low)) < 1000:
                    _fail(pattern, f"bad range {pattern[start:i]}", start,
                          "it needs two characters, in order, at most 999 apart")
                low = map(chr, range(ord(min(low)), ord(min(high)) + 1))
            chars.update(low)
        return (PRINTABLE - chars if negated else frozenset(chars)), i + 1

    i = 0
    while i < len(pattern):
        at, c = i, pattern[i]
        i += 1
        if c in "?*+{":
            counted = COUNTED.match(pattern, at)
            least, most = {"?": (0, 1), "*": (0, None), "+": (1, None), "{": (1, 0)}[c]
            if counted:
                least, most, i = int(counted[1][:9]), counted[2], counted.end()     # nine are too many
                most = least if most is None else int(most[:9]) if most else None
            if most is not None and most < least:
                _fail(pattern, f"bare or empty {pattern[at:i]}", at, "escape it, or write {m}, {m,} or {m,n}")
            yield at, "repeat", (least, most)
        elif c in "(|)":
            i += 2 * pattern.startswith("(?:", at)
            if pattern.startswith("(?", at) and i == at + 1:
                _fail(pattern, f"group {pattern[at:at + 3]}", at, "only ( ) and (?: ) are supported")
            yield at, c, None
        elif c in "^$]}":
            _fail(pattern, f"{'anchor' if c in '^$' else 'bare'} {c}", at, "escape it, or leave it out: "
                  "the whole string is always matched")
        else:
            chars, i = char_class(at) if c == "[" else (PRINTABLE, i) if c == "." else element(at)
            yield at, "set", chars


def _thompson(pattern):
    """Parse into an automaton: reads[s], what state s consumes (None: nothing), and leads[s], where it goes.

    Open groups wait on a list, so nesting is not limited by Python's. An atom is (low, enter, leave): entered
    and left at these two, it is made of the states from low up to the newest one when it was finished.
    """
    reads, leads = [], []

    def state(chars=None, targets=()):
        if len(leads) >= MAX_STATES:
            raise ValueError(f"{pattern!r:.60} needs more than {MAX_STATES} states: make it smaller")
        reads.append(chars)
        leads.append(list(targets))
        return len(leads) - 1

    def close(branches):                    # an alternation of concatenations of atoms
        first, last = state(), state()
        for atoms in [*filter(None, branches), *[[]] * ([] in branches)]:       # one empty branch is enough
            here = first
            for _, enter, leave in atoms:
                leads[here].append(enter)
                here = leave
            leads[here].append(last)
        return first, last

    def repeat(low, enter, leave, least, most):     # most is None: open, a loop on the last copy
        shifts = [0] if most != 0 else []
        copies = (max(least, 1) if most is None else most) - 1
        body = list(zip(reads[low:], map(tuple, leads[low:]))) if copies > 0 else []
        for _ in range(copies):
            shifts.append(len(leads) - low)
            for chars, targets in body:
                state(chars, [t + shifts[-1] for t in targets])
        first, last = state(), state()
        here = first
        for i, shift in enumerate(shifts):
            leads[here] += [enter + shift, last] if i >= least else [enter + shift]
            here = leave + shift
        leads[here] += [enter + shifts[-1], last] if most is None else [last]
        return low, first, last

    groups, branches, previous = [], [[]], None     # groups: where each began, and the branches around it
    for at, kind, value in _lex(pattern):
        if kind == "set":
            last = state()
            branches[-1].append((last, state(value, [last]), last))
        elif kind == "repeat":
            if not branches[-1] or previous == "repeat":
                c, what = pattern[at], {"?": "lazy", "+": "possessive"}
                what = what.get(c, "doubled") if branches[-1] else "leading"
                _fail(pattern, f"{what} quantifier {c}", at, "escape it, or put what it repeats in (?: )")
            branches[-1].append(repeat(*branches[-1].pop(), *value))
        elif kind == "(":
            groups.append((at, len(leads), branches))
            branches = [[]]
        elif kind == "|":
            branches.append([])
        else:
            if not groups:
                _fail(pattern, "unmatched )", at, "escape it, or open a group")
            inside, (_, low, branches) = close(branches), groups.pop()
            branches[-1].append((low, *inside))
        previous = kind
    if groups:
        _fail(pattern, "unclosed (", groups[-1][0], "close it, or escape it")
    return reads, leads, *close(branches)


def _determinise(pattern, reads, leads, first, last):
    """Subset construction (Rabin & Scott 1959): edges[q], pairs (characters, target), and accept[q].

    State 0 is the start. Characters that no set of the pattern tells apart move together, so [a-z]{40} has
    one edge a state.
    """
    work, closures = 0, {}

    def spend(steps):
        nonlocal work
        work += steps
        if work > MAX_WORK:
            raise ValueError(f"{pattern!r:.60} is too ambiguous for {MAX_WORK} steps: make it smaller")

    def closure(s):                         # the reading or final states that s leads to without reading
        if s not in closures:
            seen, stack = {s}, [s]
            while stack:
                t = stack.pop()
                if reads[t] is None:
                    spend(len(leads[t]))
                    stack += set(leads[t]) - seen
                    seen.update(leads[t])
            closures[s] = frozenset(t for t in seen if reads[t] is not None or t == last)
        spend(len(closures[s]))
        return closures[s]

    kinds, alike = set(reads) - {None}, {}
    alphabet = sorted(set().union(*kinds))
    spend(len(alphabet) * len(kinds))
    for c in alphabet:
        alike.setdefault(tuple(c in chars for chars in kinds), []).append(c)
    blocks = ["".join(block) for block in alike.values()]
    blocks_of = {chars: [b for b, block in enumerate(blocks) if block[0] in chars] for chars in kinds}

    number, edges = {closure(first): 0}, []
    subsets = list(number)
    for subset in subsets:                  # grows while it is walked
        moves, targets = defaultdict(set), defaultdict(str)
        for s in subset:
            for b in blocks_of.get(reads[s], ()):
                moves[b].update(closure(leads[s][0]))
        for b in sorted(moves):
            target = frozenset(moves[b])
            if target not in number:
                number[target] = len(number)
                subsets.append(target)
            targets[number[target]] += blocks[b]
        edges.append([(chars, q) for q, chars in targets.items()])
        if len(subsets) > MAX_STATES:
            raise ValueError(f"{pattern!r:.60} is too ambiguous for {MAX_STATES} states: make it smaller")
    return edges, [last in subset for subset in subsets]


# ---------------------------------------------------------------- tasks


def knob(default, why, least=None, most=10 ** 6, choices=()):
    """A field of a configuration: its default, what `--help` says of it, and what it may be.

    The least is 0 for a float and 1 for an integer, unless given.
    """
    least = least if least is not None else 0 if isinstance(default, float) else 1
    return dataclasses.field(default=default, metadata=dict(why=why, least=least, most=most, choices=choices))


@dataclass
class DataConfig:
    """Every knob of the data; `train.Config` adds the rest."""
    seed: int = knob(0, "every random draw follows from it", least=0, most=2 ** 63)
    data_seed: int = knob(-1, "of tasks and instructions, if not --seed", least=-1, most=2 ** 63)
    tasks: str = knob("", "a tasks file, in place of random tasks")
    n_tasks: int = knob(16, "random tasks")
    n_distributions: int = knob(3, "regexes a random task, and one more that is held out")
    n_mappings: int = knob(5, "inputs a random task is defined on")
    n_inputs: int = knob(10, "pool of inputs that random tasks share")
    n_outputs: int = knob(20, "pool of outputs that random tasks share")
    n_train: int = knob(20, "training instructions a regex")
    n_val: int = knob(10, "instructions a regex in subset, in val and in ood")
    n_asked: int = knob(8, "inputs an instruction is taught with, and at most as many others in `pairs`")
    asks_for: str = knob("output", "what is to be answered: the output of an input; in its place, which task "
                         "or distribution the instruction is of; or nothing, then there is no input",
                         choices=("output", "task", "distribution", "nothing"))
    n_probed: int = knob(64, "tasks that subset, val and ood are about; any more are only trained on")
    max_len: int = knob(128, "longest instruction, in characters")
    shuffle_tasks: bool = knob(False, "give every instruction a random task, to be memorised", least=0)

    def seed_of(self, what: str) -> int:
        """The seed of "data", "init" or "order": its own if it has one, else `seed`."""
        own = getattr(self, what + "_seed")
        return self.seed if own < 0 else own

    def check(self):
        """Raises ValueError for a knob of another type or outside its range."""
        for field in dataclasses.fields(self):
            value, may = getattr(self, field.name), field.metadata
            if type(value) not in (field.type, {float: int}.get(field.type)):
                raise ValueError(f"{field.name} is {value!r:.60}, it must be of type {field.type.__name__}")
            if may["choices"] and value not in may["choices"]:
                raise ValueError(f"{field.name} is {value!r}, choose from {', '.join(may['choices'])}")
            if field.type is not str and not may["least"] <= value <= may["most"]:
                raise ValueError(f"{field.name} is {value}, it must be from {may['least']} to {may['most']}")


class Task(NamedTuple):
    """A function from inputs to outputs, the regexes that describe it, and one never trained on."""
    name: str
    map: dict[str, str]
    distributions: list[str]
    held_out: str


TWO_LETTERS = ["".join(letters) for letters in product(ascii_lowercase, repeat=2)]


def random_pattern(rng: random.Random) -> str:
    """Five parts in random order: two literals, two times two letters of a class of four, one of three words.

    768 strings, all of 10 letters: the length gives nothing away.
    """
    classes = ["[" + "".join(sorted(rng.sample(ascii_lowercase, 4))) + "]{2}" for _ in range(2)]
    parts = [*rng.sample(TWO_LETTERS, 2), *classes, "(" + "|".join(rng.sample(TWO_LETTERS, 3)) + ")"]
    return "".join(rng.sample(parts, len(parts)))


def random_tasks(cfg: DataConfig) -> list[Task]:
    """Tasks whose languages are all disjoint, with inputs and outputs dealt evenly from shared pools.

    An input has another output in each of its tasks. Raises ValueError for impossible sizes, and for pools so
    large that a word gives its task away.
    """
    for name, pool in ("n_inputs", cfg.n_inputs), ("n_outputs", cfg.n_outputs):
        most = cfg.n_tasks * cfg.n_mappings // 2
        if not cfg.n_mappings <= pool <= most:
            raise ValueError(f"{name} is {pool}, it must be from n_mappings ({cfg.n_mappings}) to "
                             f"n_tasks * n_mappings / 2 ({most}), or some word would give its task away")
    rng, begun, taken = random.Random(f"{cfg.seed_of('data')}/tasks"), defaultdict(list), set()
    names = ("".join(letters) for n in range(1, 6) for letters in product(ascii_uppercase, repeat=n))
    inputs = dict.fromkeys(islice(names, cfg.n_inputs), 0)
    outputs = dict.fromkeys(map(str, range(cfg.n_outputs)), 0)

    def deal(used, slack):              # the least used first: all end up in as many tasks, give or take one
        return sorted(used, key=lambda word: used[word] + (1 + slack) * rng.random())[:cfg.n_mappings]

    def fresh_map():
        chosen = deal(inputs, 0)
        for slack in range(20):         # the outputs less evenly, only where all these pairs are taken
            partners = deal(outputs, slack)
            for _ in range(500):
                rng.shuffle(partners)
                if taken.isdisjoint(zip(chosen, partners)):
                    taken.update(zip(chosen, partners))
                    for used, words in (inputs, chosen), (outputs, partners):
                        used.update({word: used[word] + 1 for word in words})
                    return dict(zip(chosen, partners))
        raise ValueError(f"n_outputs is {cfg.n_outputs}, raise it: an input is to have another in each task")

    def fresh_pattern():
        while True:
            regex = Regex(random_pattern(rng), cfg.max_len)
            letters = {c for chars, _ in regex._edges[0] for c in chars}
            if all(regex.isdisjoint(other) for c in letters for other in begun[c]):
                for c in letters:       # with those that begin otherwise there is nothing to compare
                    begun[c].append(regex)
                return regex.pattern

    return [Task(f"t{t:02d}", fresh_map(), [fresh_pattern() for _ in range(cfg.n_distributions)],
                 fresh_pattern()) for t in range(cfg.n_tasks)]


def write(path: str | Path, content: str | bytes):
    """Write a file aside and rename it: whoever looks finds the old file or the new one, whole."""
    aside = Path(f"{path}.tmp")
    try:
        aside.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(aside, path)
    except OSError as e:            # a full disk, most likely: a part of the file helps nobody
        aside.unlink(missing_ok=True)
        raise OSError(e.errno, e.strerror, str(path)) from None


def write_tasks(path: str | Path, cut_into: str, tasks: list[Task]):
    """Write a tasks file; cut_into, "characters" or "words", are the tokens of instructions."""
    spec = {"tokens": cut_into, "tasks": [task._asdict() for task in tasks]}
    write(path, json.dumps(spec, indent=1, ensure_ascii=False) + "\n")


def place(task: Task, m: int) -> str:
    """Where the m-th regex of a task stands in a tasks file, the held-out one after the others."""
    last = m == len(task.distributions)
    return f"task {task.name}, " + ("held_out" if last else f"distributions[{m}]")


def read_tasks(path: str | Path, max_len: int) -> tuple[str, list[Task]]:
    """Read a tasks file. Raises ValueError naming task, key and fault, OSError if it cannot be read."""
    def check(right, where, rule):
        if not right:
            raise ValueError(f"{path}, {where}: {rule}")

    def once(pairs):        # json keeps the last value of a key given twice; None is refused below
        times = Counter(key for key, _ in pairs)
        return {key: value if times[key] == 1 else None for key, value in pairs}

    try:
        spec = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=once)
        json.dumps(spec, ensure_ascii=False).encode()           # a lone surrogate is no text
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not a tasks file, it is not JSON: {e}") from None
    check(isinstance(spec, dict) and isinstance(spec.get("tasks"), list), "tasks",
          "must be a list, and there once")
    check(spec["tasks"], "tasks", "must not be empty")
    check(spec.get("tokens") in ("characters", "words"), "tokens",
          'must be "characters" or "words", and there once')
    tasks, regexes = {}, []
    for number, entry in enumerate(spec["tasks"]):
        where = f"task {isinstance(entry, dict) and entry.get('name') or number}"
        for key, kind in {"name": str, "map": dict, "distributions": list, "held_out": str}.items():
            check(isinstance(entry, dict) and isinstance(entry.get(key), kind) and entry[key],
                  f"{where}, {key}", f"is missing, empty, there twice or not a {kind.__name__}")
        task = Task(**{key: entry[key] for key in Task._fields})
        check(task.name not in tasks, f"{where}, name", "is another task's, too")
        for io in task.map.items():
            check(all(isinstance(word, str) and word.strip() for word in io), f"{where}, map, {io[0]!r:.60}",
                  "needs one output, and both must be text that is not blank")
        check(len({*map(tuple, map(WORD.findall, task.map))}) == len(task.map), f"{where}, map",
              "has two inputs that are the same words")
        tasks[task.name] = task
        for m, pattern in enumerate((*task.distributions, task.held_out)):
            check(isinstance(pattern, str), place(task, m), "must be text")
            try:
                regex = Regex(pattern, max_len)
                twin = next((one for one, other in regexes if not regex.isdisjoint(other)), None)
            except ValueError as e:
                raise ValueError(f"{path}, {place(task, m)}: {e}") from None
            check(twin is None, place(task, m), f"{pattern!r} has strings in common with {twin}: make them "
                  "disjoint")
            regexes.append((place(task, m), regex))
    return spec["tokens"], list(tasks.values())


# ---------------------------------------------------------------- splits and tokens

PAD, SEP, ANS, EOS = SPECIALS = "<pad>", "<sep>", "<ans>", "<eos>"      # <pad> is token 0
REFUSE = "<refuse>"         # an output that apply.py teaches
WORD = re.compile(REFUSE + r"|\w+(?:['’-]\w+)*|[^\w\s]")     # "what's" and "ice-cream" are one token each


class Instance(NamedTuple):
    """One line of the data: what is read and answered, and the numbers of its task and of its regex."""
    instruction: str
    input: str
    output: str
    task: int
    distribution: int


IDENTITIES = {      # what an instance can be grouped by; one more line adds one
    "task": lambda x: x.task,
    "distribution": lambda x: x.distribution,
    "input": lambda x: x.input,
    "output": lambda x: x.output,
}


class Split(NamedTuple):
    """N instances, instruction by instruction, as rows of T tokens, padded on the right."""
    instances: list[Instance]
    tokens: np.ndarray                      # (N, T) int64
    is_output: np.ndarray                   # (N, T) bool: the tokens of the output and its <eos>
    identities: dict[str, np.ndarray]       # name -> (N,) int64
    positions: dict[str, tuple]             # name -> rows and columns of `tokens` where a state is read

    def state_of(self, position: str) -> np.ndarray:
        """(N,): which of the states read at a position is each instance's."""
        return np.searchsorted(self.positions[position][0], np.arange(len(self.tokens)), side="right") - 1

    def labels(self, position: str) -> dict[str, np.ndarray]:
        """name -> (n,) int64, a label for each state read at a position.

        Where a state is read for several instances, as at `instruction`, only the identities they agree on.
        """
        rows, state_of = self.positions[position][0], self.state_of(position)
        return {key: ids[rows] for key, ids in self.identities.items() if (ids == ids[rows][state_of]).all()}


class Dataset(NamedTuple):
    """What a run is about; token i reads vocabulary[i]."""
    cut_into: str                           # "characters" or "words": the tokens of instructions
    tasks: list[Task]
    vocabulary: list[str]
    splits: dict[str, Split]                # train, subset, val, ood, and pairs if a task is large


def cut(instruction: str, cut_into: str) -> list[str]:
    """The tokens of an instruction."""
    return list(instruction) if cut_into == "characters" else WORD.findall(instruction.lower())


def encode(instances: dict[str, list[Instance]], cut_into: str) -> tuple[list[str], dict[str, Split]]:
    """The vocabulary of lists of instances, and each list as a split; an instruction's are to be adjacent."""
    everything = set().union(*instances.values())
    texts = {x: [*cut(x.instruction, cut_into), SEP, *WORD.findall(x.input),
                 ANS, *WORD.findall(x.output), EOS] for x in everything}
    vocabulary = [*SPECIALS, *sorted(set().union(*texts.values()) - set(SPECIALS))]
    width, id_of = max(map(len, texts.values())), {token: i for i, token in enumerate(vocabulary)}
    values = {name: sorted({identity(x) for x in everything}) for name, identity in IDENTITIES.items()}
    splits = {}
    for name, some in instances.items():
        rows = np.array([[id_of[token] for token in texts[x]] + [0] * (width - len(texts[x])) for x in some])
        sep, ans = ((rows == id_of[mark]).argmax(1) for mark in (SEP, ANS))
        first = np.sort(np.unique([x.instruction for x in some], return_index=True)[1])
        identities = {key: np.searchsorted(values[key], [identity(x) for x in some])
                      for key, identity in IDENTITIES.items()}
        splits[name] = Split(some, rows, (np.arange(width) > ans[:, None]) & (rows != 0), identities, {
            "instruction": (first, sep[first]), "answer": (np.arange(len(some)), ans)})
    return vocabulary, splits


def take_turns(pairs: list, n: int, rng: random.Random):
    """Yield n pairs for an instruction to be taught with and up to n others, again and again, all in turn."""
    deck = rng.sample(pairs, len(pairs)) if len(pairs) > n else pairs
    while True:
        yield deck[:n], deck[n:2 * n]
        deck = deck[n:] + deck[:n]


def make_dataset(cfg: DataConfig) -> Dataset:
    """Tasks, vocabulary and splits: the same cfg gives the same anywhere.

    In a task of more than n_asked inputs these take turns, n_asked an instruction; split `pairs` asks the
    instructions of subset with at most as many others. Raises ValueError for sizes that cannot be.
    """
    cfg.check()
    if cfg.n_val > cfg.n_train:
        raise ValueError(f"n_val ({cfg.n_val}) is above n_train ({cfg.n_train}), subset would be smaller")
    cut_into, tasks = read_tasks(cfg.tasks, cfg.max_len) if cfg.tasks else ("characters", random_tasks(cfg))
    file = f"{cfg.tasks}, " if cfg.tasks else ""
    instances, places = {"train": [], "subset": [], "val": [], "ood": [], "pairs": []}, []
    for t, task in enumerate(tasks):
        if len(task.map) > cfg.n_train * cfg.n_asked:
            raise ValueError(f"{file}task {task.name}, map: {len(task.map)} inputs are more than a regex "
                             f"teaches: raise n_asked ({cfg.n_asked}) or n_train ({cfg.n_train})")
        for m, pattern in enumerate((*task.distributions, task.held_out)):
            number, trained = len(places), m < len(task.distributions)
            places.append(file + place(task, m))
            rng = random.Random(f"{cfg.seed_of('data')}/instructions/{number}")
            try:                            # distinct strings, so none is in train and val
                strings = Regex(pattern, cfg.max_len).sample(cfg.n_val + trained * cfg.n_train, rng)
            except ValueError as e:
                raise ValueError(f"{places[number]}: {e}; widen it, lower n_train or n_val, or raise max_len"
                                 ) from None
            told = {s: rng.randrange(len(tasks)) if cfg.shuffle_tasks else t for s in strings}
            turns = {u: take_turns([("", "")] if cfg.asks_for == "nothing" else [*tasks[u].map.items()],
                                   cfg.n_asked, rng) for u in {*told.values()}}
            asked = {s: next(turns[told[s]]) for s in strings}
            unseen, train = strings[:cfg.n_val], strings[cfg.n_val:]
            subset = train[:cfg.n_val]
            for name, some, part in [("train", train, 0), ("subset", subset, 0), ("pairs", subset, 1),
                                     ("val" if trained else "ood", unseen, 0)]:
                if name == "train" or t < cfg.n_probed:
                    instances[name] += [
                        Instance(s, *io, told[s], number) for s in some for io in asked[s][part]]

    instances = {name: some for name, some in instances.items() if some}    # there may be no `pairs`
    if cfg.asks_for in ("task", "distribution"):
        instances = {name: [x._replace(output=f"{cfg.asks_for}{getattr(x, cfg.asks_for)}") for x in some]
                     for name, some in instances.items()}
    first_cut = {}
    for s, number in {x.instruction: x.distribution for some in instances.values() for x in some}.items():
        twin = first_cut.setdefault(tuple(cut(s, cut_into)), s)
        if twin != s:
            raise ValueError(f"{places[number]}: {twin!r} and {s!r} are the same words, "
                             "let them differ in more than spaces and capitals")
    return Dataset(cut_into, tasks, *encode(instances, cut_into))


# ---------------------------------------------------------------- the command line


class Flags(argparse.ArgumentParser):
    """A command line with a flag for every knob of a configuration; only what was given is parsed."""

    def __init__(self, config: type | None = None, **texts):
        super().__init__(allow_abbrev=False, **texts)
        for field in dataclasses.fields(config) if config else ():
            takes = dict(type=field.type, metavar=field.type.__name__.upper())
            takes = dict(action="store_true") if field.type is bool else takes
            self.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **takes,
                              help=f"{field.metadata['why']} (default: {field.default!r})")

    def error(self, message):
        raise ValueError(f"{message}; --help lists the flags")


def command_line(main):
    """Run main(). Bad input becomes one line, `error: what to do`, on stderr and exit status 2."""
    sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except BrokenPipeError:         # whoever read our output, say `head`, has seen enough
        os._exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as e:
        what = f"{e.filename}: {e.strerror}, check the path" if isinstance(e, OSError) and e.filename else e
        print("error:", " ".join(str(what).split()), file=sys.stderr)
        sys.exit(2)


def main():
    """Print a data set on a page."""
    cfg = DataConfig(**vars(Flags(DataConfig, description=main.__doc__).parse_args()))
    data = make_dataset(cfg)
    print(f"{len(data.tasks)} tasks, {len(data.vocabulary)} tokens, sequences of at most "
          f"{data.splits['train'].tokens.shape[1]}; instructions are cut into {data.cut_into}\n\n"
          "split   instructions  instances  tasks  regexes")
    for name, split in data.splits.items():
        sizes = (len(np.unique(split.identities[key])) for key in ("task", "distribution"))
        print(f"{name:6}{len(split.positions['instruction'][0]):14,}{len(split.instances):11,}"
              + "{:7}{:9}".format(*sizes))
    task = data.tasks[0]
    some = islice(task.map.items(), cfg.n_asked)
    print(f"\ntask {task.name} maps " + ", ".join(f"{i} to {o}" for i, o in some)
          + f" and {len(task.map) - cfg.n_asked} more" * (len(task.map) > cfg.n_asked))
    for m, pattern in enumerate((*task.distributions, task.held_out)):
        regex = Regex(pattern, cfg.max_len)
        some = ", ".join(regex.sample(3, random.Random(0), unique=False))
        print(f"  {f'regex {m}' if m < len(task.distributions) else 'held out'}  {pattern}   "
              f"{show(regex.count)} strings, as {some}")
    for name, split in data.splits.items():
        print(f"\n{name}")
        for row in random.Random(f"{cfg.seed}/print").choices(range(len(split.tokens)), k=5):
            text = " ".join(data.vocabulary[i] for i in split.tokens[row] if i)     # 0 is <pad>
            print(f"  {text}   (task {data.tasks[split.instances[row].task].name})")


if __name__ == "__main__":
    command_line(main)
