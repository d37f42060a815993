"""Why you may believe it: each test is a claim, checked in an independent way.

    make test                                       all tests, 1 to 2 minutes
    .venv/bin/pytest test_all.py -k regex           tests with this word in their name
    .venv/bin/pytest test_all.py -k "not page"      without those that read README.md

Tests that need a GPU, matplotlib or transformers are skipped where it is missing.
"""
import ast
import copy
import dataclasses
import io
import math
import multiprocessing
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import chain, combinations, count, permutations, product
from math import dist, inf
from pathlib import Path

import runs
from runs import BadInput, read_rows, select

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from pytest import approx, fixture, importorskip, mark, raises
from torch.nn.attention import SDPBackend, sdpa_kernel

import apply
import data
import model
import plot
import probe
import train
from data import DataConfig, Regex, Task, make_dataset

HERE = Path(__file__).parent
settings.register_profile(
    "all",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("all")
TINY = dict(
    n_tasks=4,
    n_regexes=2,
    n_mappings=3,
    n_inputs=5,
    n_outputs=6,
    n_train=12,
    n_val=6,
    n_layer=2,
    n_embd=16,
    steps=24,
    batch_size=64,
    n_captures=6)
cuda = mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def tiny(out, **changes):
    """The configuration of a run that takes about a second."""
    return train.Config(**TINY | changes, out=str(out))


def as_flags(knobs):
    """Settings as command-line flags."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in knobs.items()]


@fixture(scope="module")
def dataset():
    return make_dataset(DataConfig())


@fixture(scope="module")
def run(tmp_path_factory):
    return train.train(tiny(tmp_path_factory.mktemp("runs") / "tiny"))


@fixture(scope="module")
def trained(run):
    """The data and the network of `run`."""
    d = train.read_data(run)
    return d, train.load_model(run, d)


@fixture(scope="module")
def rows(run):
    return probe.probe(run)


@fixture
def call(monkeypatch):
    """A function that runs the command line of a module in this process."""
    def main(module, *argv):
        monkeypatch.setattr(sys, "argv", ["", *map(str, argv)])
        runs.command_line(module.main)
    return main


@fixture
def error(call, capsys):
    """A function that runs a command line, which must fail with status 2, and returns its message."""
    def main(*argv):
        with raises(SystemExit, match="2"):
            call(*argv)
        said = capsys.readouterr().err
        assert re.fullmatch("error: .+\n", said)
        return said
    return main


# ---------------------------------------------------------------- regular expressions


def patterns(*atoms):
    """Random patterns composed of these atoms."""
    quantifiers = st.sampled_from(["?", "*", "+", "{2}", "{0,2}", "{1,}", "{0}"])
    return st.recursive(st.sampled_from(atoms), lambda p: st.one_of(
        st.tuples(p, p).map("".join),
        st.tuples(p, p).map("({0[0]}|{0[1]})".format),
        st.tuples(p, quantifiers).map("(?:{0[0]}){0[1]}".format)), max_leaves=6)


def language(pattern, alphabet):
    """All strings of at most four characters from the alphabet that `re` accepts."""
    strings = map(
        "".join,
        chain(*(product(alphabet, repeat=n) for n in range(5))))
    return [s for s in strings if re.fullmatch(pattern, s)]


ABCD = patterns("a", "b", "", "[ab]", "[b-d]", "[a-c]")         # languages small enough to list


@given(patterns("a", "b", "", ".", "[ab]", "[^a]", r"\d", r"\.", r"\W"))
def test_regex_contains_what_fullmatch_matches_and_nothing_else(pattern):
    every = language(".*", "abc.1")
    inside = language(pattern, "abc.1")
    count = Regex(pattern, 4).count
    others = tuple(re.escape(s) for s in {*every} - {*inside})
    assert Regex((pattern, *map(re.escape, inside)), 4).count == count
    assert Regex((pattern, *others), 4).count == count + len(others)


@given(ABCD)
def test_regex_counts_indexes_and_samples_exactly_the_strings_that_brute_force_finds(pattern):
    strings = language(pattern, "abcd")
    regex = Regex(pattern, max_len=4)
    assert regex.count == len(strings)
    assert {regex.unrank(i) for i in range(regex.count)} == {*strings}
    assert {*regex.sample(regex.count, random.Random(0))} == {*strings}


@given(st.lists(ABCD, min_size=2, max_size=5))
def test_regex_overlap_is_found_exactly_if_two_languages_share_a_string(some):
    languages = [{*language(pattern, "abcd")} for pattern in some]
    shared = [
        (i, j)
        for j in range(len(some))
        for i in range(j)
        if languages[i] & languages[j]]
    found = data.find_overlap(some, 4)
    assert found in shared if shared else found is None


@given(st.text("ab|()[]{}?*+.^$\\-,012dwsDWSé ", max_size=14), st.text("ab-,012 |(^", max_size=5))
@settings(max_examples=1000)
def test_regex_agrees_with_re_on_any_text_or_says_what_is_wrong(pattern, string):
    try:
        regex = Regex(pattern, max_len=8)
    except BadInput as wrong:
        assert re.search(r"at position \d+|has an? |too ", str(wrong))
        return
    shares = data.find_overlap([pattern, re.escape(string)], 8)
    assert bool(shares) == bool(re.fullmatch(pattern, string))
    for s in regex.sample(min(3, regex.count), random.Random(0)):
        assert re.fullmatch(pattern, s) and len(s) <= 8


@mark.parametrize("pattern, count", [
    ("(a|ab)(c|bc)", 3),                    # abc in two ways
    ("(a*)*", 65),
    ("a{1000}", 0),                         # too long
    (r"[^\w]", 32),
    ("a{,2}?", 3),                          # lazy
    ("(?P<name>a|b)(?#comment)", 2),
    ("((((((((((a){0,9}){0,9}){0,9}){0,9}){0,9}){0,9}){0,9}){0,9}){0,9}){0,9}", None),
    ("[a-z]{40}", 26 ** 40)])
def test_regex_counts_strings_not_derivations_or_says_that_it_cannot(pattern, count):
    try:
        assert Regex(pattern).count == count
    except BadInput as wrong:
        assert count is None and "too large or ambiguous" in str(wrong)


UNSUPPORTED = r"""
a^b         has an anchor
a\b         has an anchor
(a)\1       has a back-reference
(a)(?(1)b)  has a back-reference
a(?=b)      has a look-ahead
(?<!a)b     has a look-ahead
a(?!)       look-ahead
(?>a)       has an atomic group
a*+         has a possessive repetition
(?i)a       has a flag
(?i:a)      has a flag
\q          bad escape \q at position 0
a|+         nothing to repeat at position 2
a{3,2}      min repeat greater than max repeat at position 2
(a          missing ), unterminated subpattern at position 0
a)          unbalanced parenthesis at position 1
[a][^]      unterminated character set at position 3
[b-a]       bad character range b-a at position 1
"""


@mark.parametrize("line", UNSUPPORTED.strip().split("\n"))
def test_regex_errors_name_what_is_wrong(line):
    pattern, message = re.split("  +", line)
    with raises(BadInput, match=re.escape(message)):
        Regex(pattern)


@mark.parametrize("unique, k", [(False, 1), (True, 3)])
def test_regex_sampling_is_uniform(unique, k):
    regex = Regex("(a|ab|b)(c|bc)?|x{0,20}")                    # ambiguous, with unequal branches
    rng = random.Random(0)
    seen = Counter()
    for _ in range(9000):
        seen.update(regex.sample(k, rng, unique))
    expected = 9000 * k / regex.count
    chi2 = sum((n - expected) ** 2 / expected for n in seen.values())
    freedom = regex.count - 1
    assert len(seen) == regex.count
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)


# ---------------------------------------------------------------- tasks, splits, tokens


@given(st.integers(0, 10 ** 6), st.integers(2, 5), st.integers(0, 3), st.booleans())
def test_random_tasks_have_disjoint_languages_and_different_maps(seed, pairs, more, twins):
    n = 2 * pairs
    n_inputs = min(3 + more, n * 3 // 4)
    tasks = data.random_tasks(DataConfig(
        seed=seed,
        n_tasks=n,
        n_regexes=1,
        n_mappings=3,
        n_inputs=n_inputs,
        n_outputs=n,
        twins=twins))
    patterns = [pattern for task in tasks for pattern in (task.regexes[0], task.held_out)]
    whole = {
        s
        for pattern in patterns
        for s in Regex(pattern).sample(768, random.Random(0))}
    assert len(whole) == 768 * 2 * n
    sets = [frozenset(task.map) for task in tasks]
    if twins:
        assert sets[::2] == sets[1::2]
        sets = sets[::2]
    assert len({*sets}) == min(len(sets), math.comb(n_inputs, 3))
    for one, other in combinations(tasks, 2):
        assert not one.map.items() & other.map.items()          # shared inputs have different outputs


def test_train_val_and_ood_share_no_instruction(dataset):
    taught, subset, val, ood = (
        {x.instruction for x in split.instances}
        for split in dataset.splits.values())
    assert [len(some) for some in (taught, subset, val, ood)] == [960, 480, 480, 160]
    assert subset < taught
    assert len(taught | val | ood) == 960 + 480 + 160


def test_every_instance_comes_from_its_regex_and_its_map(dataset):
    regexes = [pattern for task in dataset.tasks for pattern in [*task.regexes, task.held_out]]
    for name, split in dataset.splits.items():
        for x in split.instances:
            task = dataset.tasks[x.task]
            pattern = regexes[x.regex]
            assert re.fullmatch(pattern, x.instruction)
            assert pattern in ([task.held_out] if name == "ood" else task.regexes)
            assert task.map[x.input] == x.output


def test_inputs_outputs_and_lengths_do_not_give_the_task_away(dataset):
    tasks = defaultdict(set)
    for x in dataset.splits["train"].instances:
        tasks[x.input].add(x.task)
        tasks[x.output].add(x.task)
        assert len(x.instruction) == 10
    assert {len(tasks[word]) for word in "ABCDEFGHIJ"} == {8}               # used equally often
    assert {len(tasks[str(number)]) for number in range(20)} == {4}


def test_a_row_of_tokens_is_the_instance_and_states_are_read_at_sep_and_ans(dataset):
    split = dataset.splits["val"]
    texts = [[dataset.vocabulary[i] for i in row] for row in split.tokens]
    for x, text, part in zip(split.instances, texts, split.part):
        assert text == [*x.instruction, "<sep>", x.input, "<ans>", x.output, "<eos>"]
        assert part.tolist() == [1] * 11 + [2] * 2 + [3] * 2        # instruction, input, output, with ends
    for position, token, n in ("instruction", "<sep>", 480), ("answer", "<ans>", 2400):
        rows, columns, last = split.positions[position]
        assert np.array_equal(columns, last)
        assert len(rows) == n
        assert {texts[row][column] for row, column in zip(rows, columns)} == {token}
        assert split.labels(position)["task"].tolist() == [split.instances[row].task for row in rows]
    assert "input" not in split.labels("instruction")           # one state, several inputs


def test_twins_have_the_same_input_set():
    twins = make_dataset(DataConfig(twins=True)).splits["val"].instances
    assert all(x.input_set == x.task // 2 * 2 for x in twins)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_inputs_of_a_large_task_take_turns_and_pairs_asks_the_rest(tmp_path, n_asked, n_inputs, seed):
    task = Task(
        "t",
        {f"{i}": "x" for i in range(n_inputs)},
        ["a[a-z]", "b[a-z]"],
        "x[a-z]")
    data.write_tasks(tmp_path / "tasks.json", "words", [task])
    cfg = DataConfig(tasks=f"{tmp_path}/tasks.json", n_asked=n_asked, n_train=12, n_val=5, seed=seed)
    d = make_dataset(cfg)
    asked = {
        name: [(x.instruction, x.input) for x in split.instances]
        for name, split in d.splits.items()}
    pairs = asked.get("pairs", [])
    assert {*asked["subset"]} < {*asked["train"]}
    assert {*pairs}.isdisjoint(asked["train"])
    assert len(asked["subset"]) == 10 * min(n_asked, n_inputs)
    assert len(pairs) == 10 * max(0, min(n_asked, n_inputs - n_asked))
    for regex in "ab":                                          # each teaches every input equally often
        turns = Counter(
            word
            for string, word in asked["train"] + asked["val"]
            if string[0] == regex)
        assert len(turns) == n_inputs and max(turns.values()) - min(turns.values()) <= 1


def test_text_is_cut_into_words_in_any_script_without_what_nobody_can_see():
    assert data.words("dog\u200b \ufeffcow guinea\u00adpig") == ["dog", "cow", "guineapig"]
    assert data.words("\u06cc\u200c\u06a9") == ["\u06cc\u200c\u06a9"]          # a non-joiner: it can be seen
    assert data.words("What's e-mail; 3.5?") == ["What's", "e-mail", ";", "3", ".", "5", "?"]
    assert data.words("हिन्दी में น้ำ Tie\u0302\u0301ng") == ["हिन्दी", "में", "น้ำ", "Tiếng"]


def test_shuffled_tasks_are_random_and_still_obey_their_maps(dataset):
    regexes = defaultdict(dict)
    for split in make_dataset(DataConfig(shuffle_tasks=True)).splits.values():
        for x in split.instances:
            assert dataset.tasks[x.task].map[x.input] == x.output
            assert regexes[x.regex].setdefault(x.instruction, x.task) == x.task
    same = []
    for tasks in regexes.values():
        same += [one == other for one, other in combinations(tasks.values(), 2)]
    assert abs(np.mean(same) - 1 / 16) < 4 * math.sqrt(1 / 16 / len(same))


def test_facts_are_consistent_with_each_other():
    _, tasks = data.read_tasks(HERE / "facts.json", 128)
    task = {task.name: task.map for task in tasks}
    for verb, third in task["third person"].items():
        assert third == re.sub("([^aeou])y$", r"\1ie", verb) + "s"
    for element, z in task["atomic number"].items():
        after = task["next element"][element]
        assert int(task["atomic number"].get(after, 37)) == int(z) + 1


# ---------------------------------------------------------------- the model


@fixture(scope="module")
def gpt():
    net = model.GPT(model.ModelConfig(vocab_size=11, block_size=7, n_layer=3, n_head=2, n_embd=8))
    for p in net.parameters():              # large random weights and biases, so that every term matters
        torch.nn.init.normal_(
            p,
            std=0.4,
            generator=torch.Generator().manual_seed(p.numel()))
    return net


IDX = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))


def test_model_equals_a_naive_transformer(gpt):
    w = {name: p.detach().double() for name, p in gpt.named_parameters()}

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T

    logits, states = gpt(IDX)
    for b, row in enumerate(IDX):
        x = w["token.weight"][row] + w["position.weight"]
        found = [x]
        for layer in range(3):
            block = f"blocks.{layer}"
            q, k, v = linear(norm(x, f"{block}.norm_attention"), f"{block}.attention.qkv").split(8, -1)
            y = torch.zeros_like(x)
            for head in slice(0, 4), slice(4, 8):
                for t in range(7):
                    weights = torch.tensor([math.exp(q[t, head] @ k[s, head] / 2) for s in range(t + 1)])
                    for s, weight in enumerate(weights / weights.sum()):
                        y[t, head] += weight * v[s, head]
            x = x + linear(y, f"{block}.attention.out")
            h = linear(norm(x, f"{block}.norm_mlp"), f"{block}.mlp.up")
            h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
            x = x + linear(h, f"{block}.mlp.out")
            found.append(x)
        assert torch.allclose(
            torch.stack(found).float(),
            torch.stack(states)[:, b],
            atol=1e-4)
        assert torch.allclose(
            linear(norm(x, "norm"), "token").float(),
            logits[b],
            atol=1e-4)


def test_the_network_can_be_run_from_any_layer(gpt):
    logits, states = gpt(IDX)
    for layer, x in enumerate(states):
        again, rest = gpt.run_from(layer, x, IDX)
        assert torch.equal(again, logits)
        assert len(rest) == 4 - layer


@cuda
def test_cuda_trains_with_the_flash_kernel_and_gives_the_same_logits():
    net = model.GPT(model.ModelConfig(11, 7))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cuda", torch.bfloat16):
        logits = copy.deepcopy(net).cuda()(IDX.cuda())[0]       # raises if another kernel were needed
        logits.sum().backward()
    assert torch.allclose(
        logits.float().cpu(),
        net(IDX)[0],
        atol=0.02)


# ---------------------------------------------------------------- training


def test_captures_are_the_states_of_the_network_at_each_position(run, trained):
    d, net = trained
    val = d.splits["val"]
    once = dict(zip([x.instruction for x in val.instances], val.tokens))
    for position, token, some in (("instruction", "<sep>", once.values()),
                                 ("answer", "<ans>", val.tokens)):
        states = []
        for row in some:
            end = row.tolist().index(d.vocabulary.index(token)) + 1
            _, layers = net(torch.from_numpy(row[None, :end]))          # without what follows
            states.append(torch.cat(layers)[:, -1].detach())
        capture = np.load(run / "states/000024.npz")[f"val/{position}"]
        assert np.allclose(capture, torch.stack(states, 1), rtol=2e-3, atol=2e-3)


def test_a_state_is_the_mean_over_its_span(trained):
    d, net = trained
    split = copy.deepcopy(d.splits["train"])
    rows = np.arange(0, len(split.tokens), 3)
    first, last = np.sort(np.random.default_rng(0).integers(0, 13, (2, len(rows))), 0)
    split.positions["span"] = rows, first, last
    found = train.observe(net, split)[1]["span"]
    layers = net(torch.from_numpy(split.tokens[:, :-1]))[1]
    for x, row, a, b in zip(found[2].astype(float), rows, first, last):
        mean = sum(layers[2][row, column] for column in range(a, b + 1)) / (b - a + 1)
        assert np.allclose(x, mean.detach(), atol=2e-3)


def test_accuracy_equals_greedy_decoding(trained):
    d, net = trained
    split = d.splits["val"]
    right = []
    for row in split.tokens.tolist():
        text = row[:row.index(d.vocabulary.index("<ans>")) + 1]
        while len(text) < len(row):
            logits, _ = net(torch.tensor([text]))
            text.append(logits[0, -1].argmax().item())
        right.append(text == row)
    assert train.observe(net, split)[0].tolist() == right


@mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)])
def test_muon_matches_the_one_in_torch(shape):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for _ in range(2)]
    theirs = copy.deepcopy(ours)
    muon = train.Muon([{"params": ours}], {"weight_decay": 0.3, "lr": 0.1})
    reference = torch.optim.Muon(theirs, 0.1, weight_decay=0.3)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            q.data = p.data.clone()
            p.grad = q.grad = torch.randn(shape)
        muon.step()
        reference.step()
        for p, q in zip(ours, theirs):
            assert torch.allclose(p, q, atol=0.006)                     # torch computes in bfloat16


@mark.parametrize("instruction, input", [(1, 1), (0, 0), (0.3, 0)])
def test_training_matches_a_plain_loop_over_single_instances(instruction, input, tmp_path):
    cfg = tiny(
        tmp_path,
        steps=10,
        n_captures=99,
        optimizer="adamw",
        instruction_weight=instruction,
        input_weight=input)
    train.train(cfg)
    d = make_dataset(cfg)
    net = train.make_model(cfg, d)
    optimizer = torch.optim.AdamW(
        net.parameters(),
        betas=(0.9, 0.95),
        weight_decay=cfg.weight_decay)
    instances = d.splits["train"].tokens
    order = torch.randperm(len(instances), generator=runs.make_generator("0/order/0"))
    for step, row in enumerate(read_rows(tmp_path / "metrics.jsonl")[:3]):      # one epoch
        losses, weights = [], []
        for n in order[64 * step:64 * (step + 1)]:
            text = torch.from_numpy(instances[n])
            logits, _ = net(text[None, :-1])
            losses += F.cross_entropy(logits[0], text[1:], reduction="none")
            weights += [instruction] * 10 + [input] * 2 + [1] * 2           # up to <sep>, <ans> and <eos>
        loss = sum(w * x for w, x in zip(weights, losses)) / sum(weights)
        assert row["loss"] == approx(loss.item(), abs=1e-4)
        optimizer.param_groups[0]["lr"] = cfg.lr * (10 - step) / 10             # warm-up is one step of ten
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def losses(run):
    return [row["loss"] for row in read_rows(run / "metrics.jsonl")]


class Recurrent(torch.nn.Module):
    """An LSTM with dropout; it has no blocks, norms or positions. Bidirectional, it reads ahead."""

    def __init__(self, size, both=False):
        super().__init__()
        self.embed = torch.nn.Embedding(size, 16)
        self.lstm = torch.nn.LSTM(16, 16, batch_first=True, bidirectional=both)
        self.drop = torch.nn.Dropout(0.5)
        self.out = torch.nn.LazyLinear(size)

    def forward(self, tokens):
        x = self.embed(tokens)
        y = self.drop(self.lstm(x)[0])
        return self.out(y), [x, y[..., :16]]


def test_a_network_of_ones_own_is_trained_reproducibly_and_resumed(run, tmp_path, monkeypatch):
    def make(cfg, data):
        return Recurrent(len(data.vocabulary))

    for name in "one", "two":
        torch.manual_seed(len(name))                                # no matter
        train.train(tiny(tmp_path / name), make=make)
    with monkeypatch.context() as patch, raises(KeyboardInterrupt):
        stop_in_evaluation(4, patch)
        train.train(tiny(tmp_path / "three"), make=make)
    train.train(tiny(tmp_path / "three"), resume=True, make=make)
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two") == outcome(tmp_path / "three")
    assert losses(tmp_path / "one")[-1] < losses(tmp_path / "one")[0]
    assert np.load(tmp_path / "one/states/000024.npz")["val/answer"].shape == (2, 144, 16)
    d = make_dataset(tiny(tmp_path))
    net = train.load_model(tmp_path / "one", d, make)
    assert not net(torch.from_numpy(d.splits["val"].tokens))[0].isnan().any()


def test_a_network_that_reads_ahead_is_refused_before_anything_is_written(tmp_path):
    with raises(BadInput, match="reads ahead"):
        train.train(tiny(tmp_path / "run"), make=lambda cfg, data: Recurrent(len(data.vocabulary), both=True))
    assert not [*tmp_path.iterdir()]


def outcome(run):
    """All numbers of a run: weights, captures and metrics, except the time it took."""
    weights = torch.load(f"{run}/ckpt.pt", weights_only=True)["model"]
    return ({name: p.tolist() for name, p in weights.items()},
            {path.name: path.read_bytes() for path in Path(run).glob("states/*")},
            [row | {"seconds": 0} for row in read_rows(f"{run}/metrics.jsonl")])


def stop_in_evaluation(n, monkeypatch):
    """Simulate Ctrl-C in the n-th evaluation."""
    evaluate = train.evaluate
    calls = count(1)

    def stop(*args):
        if next(calls) == n:
            raise KeyboardInterrupt
        return evaluate(*args)
    monkeypatch.setattr(train, "evaluate", stop)


def test_a_stopped_run_says_how_to_resume_and_then_ends_in_the_same_bits(
        run, call, tmp_path, monkeypatch, capsys):
    stop_in_evaluation(4, monkeypatch)
    with raises(SystemExit, match="130"):
        call(train, *as_flags(TINY), "--out", f"{tmp_path}/my run")
    said = capsys.readouterr().out.split("python train.py ")[-1]
    call(train, *shlex.split(said))
    assert outcome(f"{tmp_path}/my run") == outcome(run)
    assert capsys.readouterr().out.startswith(f"resuming {tmp_path}/my run at step 4\n")
    seconds = [row["seconds"] for row in read_rows(tmp_path / "my run/metrics.jsonl")]
    assert seconds == sorted(seconds)


def test_a_run_killed_at_any_moment_resumes_and_ends_in_the_same_bits(run, tmp_path):
    context = multiprocessing.get_context("forkserver")         # so that processes start fast
    context.set_forkserver_preload(["train"])
    kills = 0
    process = None
    while process is None or process.exitcode != 0:
        begun = (tmp_path / "config.json").exists()
        process = context.Process(target=train.train, args=(tiny(tmp_path), begun))
        process.start()
        process.join(random.Random(kills).uniform(0, 1) if kills < 5 else None)
        if process.exitcode is None:
            process.kill()                                      # SIGKILL
            process.join()
            kills += 1
    assert kills > 2
    assert outcome(tmp_path) == outcome(run)                    # although string hashes differ


@cuda
def test_cuda_resumes_a_run_of_the_cpu_with_the_same_numbers(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, raises(KeyboardInterrupt):
        patch.setattr(torch.cuda, "is_available", lambda: False)
        stop_in_evaluation(4, patch)
        train.train(tiny(tmp_path))
    train.train(tiny(tmp_path), resume=True)
    assert losses(tmp_path) == approx(losses(run), abs=5e-3)


def test_start_copies_weights_and_matches_embeddings_by_token(run, trained, tmp_path):
    d, net = trained
    cfg = tiny(tmp_path, asks_for="nothing")        # shorter sequences and other token numbers
    other = make_dataset(cfg)
    new = train.make_model(cfg, other)
    train.init_from(run, new, other)
    numbers = [d.vocabulary.index(token) for token in other.vocabulary]
    for key, weight in new.state_dict().items():
        old = net.state_dict()[key]
        assert torch.equal(weight, old[numbers] if key == "token.weight" else old[:len(weight)])
    with raises(ValueError, match="another n_embd"):
        train.train(tiny(tmp_path, start=str(run), n_embd=32))


# ---------------------------------------------------------------- the probe: clusters and neighbours


def around(labels, noise=0.1, seed=0):
    """States (N, 8) scattered around one random centre per label."""
    rng = np.random.default_rng(seed)
    places = rng.normal(size=(labels.max() + 1, 8))
    return places[labels] + noise * rng.normal(size=(len(labels), 8))


@mark.parametrize("seed", range(3))
def test_kmeans_finds_the_best_grouping_of_a_few_points(seed):
    x = np.random.default_rng(seed).normal(size=(8, 2))
    best = inf
    for labels in product(range(3), repeat=8):
        groups = [x[np.equal(labels, j)] for j in {*labels}]
        inertia = sum(
            ((group - group.mean(0)) ** 2).sum()
            for group in groups)
        best = min(best, inertia)
    assert probe.kmeans(x, 3, n_init=30)[2].item() == approx(best, rel=1e-4)


@mark.parametrize("scale, origin", [(1, 0), (1, 1e8), (1e18, 0), (1e-18, 0)])
def test_kmeans_ends_at_a_fixed_point_at_any_scale_and_in_any_batch(scale, origin):
    batch = np.stack([scale * around(np.arange(120) % 6, 0.5, seed) + origin for seed in range(3)])
    found = probe.kmeans(batch, 6)
    for x, labels, centroids, inertia in zip(batch, *map(np.asarray, found)):
        means = [x[labels == j].mean(0) for j in range(6)]
        squared = ((x[:, None] - means) ** 2).sum(-1)
        assert np.allclose(centroids, means, rtol=1e-4)
        assert np.array_equal(labels, squared.argmin(1))
        assert inertia == approx(squared.min(1).sum(), rel=1e-4)
        assert np.array_equal(labels, probe.kmeans(x, 6)[0])


@given(st.lists(st.integers(0, 5), min_size=6), st.integers(1, 6))
def test_kmeans_fills_as_many_clusters_as_there_are_distinct_points(points, k):
    labels, centroids, _ = probe.kmeans(np.array(points)[:, None], k)
    filled = min(k, len({*points}))
    assert len(labels.unique()) == filled
    assert centroids.isnan().sum() == k - filled


@given(st.integers(2, 25), st.integers(1, 6), st.integers(0, 10 ** 6))
def test_silhouette_equals_its_definition_point_by_point(n, k, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 4, (n, 2)).astype(float)               # whole numbers: points coincide
    clusters = rng.integers(0, k, n)
    scores = []
    for i, own in enumerate(clusters):
        distances = {cluster: [] for cluster in clusters}
        for j in {*range(n)} - {i}:
            distances[clusters[j]].append(dist(x[i], x[j]))
        a = np.mean(distances.pop(own) or inf)             # inf: alone in its cluster
        b = min(map(np.mean, distances.values()), default=inf)
        scores.append((b - a) / max(a, b) if 0 < max(a, b) < inf else 0)
    found = probe.silhouette(torch.from_numpy(x), torch.from_numpy(clusters))
    assert found == approx(np.mean(scores), abs=1e-6)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10 ** 6))
def test_knn_equals_a_plain_loop_with_ties_by_index(a, b, seed):
    k, n = sorted([a, b])
    rng = np.random.default_rng(seed)
    known = rng.integers(-3, 4, (n, 2))                         # whole numbers: many exact ties
    query = rng.integers(-3, 4, (5, 2))
    for point, found in zip(query, probe.knn(known, query, k)):
        squared = ((known - point) ** 2).sum(1)
        assert found.tolist() == sorted(range(n), key=squared.item)[:k]


# ---------------------------------------------------------------- the probe: scores


def information(points):
    """Mutual information, and the mean of both entropies."""
    n, shared, entropy = len(points), 0, 0
    of_class, of_cluster = map(Counter, zip(*points))
    for i, j in points:
        a, b = of_class[i] / n, of_cluster[j] / n
        shared += math.log(points.count((i, j)) / n / a / b) / n
        entropy -= math.log(a * b) / 2 / n
    return shared, entropy


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=6))
def test_scores_equal_brute_force_over_points_pairs_and_permutations(points):
    classes, clusters = zip(*points)
    kinds = Counter(
        (i == k, j == m)
        for (i, j), (k, m) in combinations(points, 2))
    tp, fn = kinds[True, True], kinds[True, False]
    fp, tn = kinds[False, True], kinds[False, False]
    below = (tp + fn) * (fn + tn) + (tp + fp) * (fp + tn)       # Hubert & Arabie in terms of pairs
    best, majority = Counter(), Counter()
    for i, j in points:
        together = points.count((i, j))
        f = 2 * together / (classes.count(i) + clusters.count(j))
        best[i] = max(best[i], f)
        majority[j] = max(majority[j], together)
    shared, entropy = information(points)
    chance = np.mean([information([*zip(classes, order)])[0] for order in permutations(clusters)])
    expected = {
        "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1,
        "ari": 2 * (tp * tn - fn * fp) / below if below else 1,
        "class_f1": np.mean([*best.values()]),
        "purity": sum(majority.values()) / len(points),
        "nmi": shared / entropy if entropy else 1,
        "ami": (shared - chance) / (entropy - chance) if entropy - chance > 1e-9 else 1}
    for name, value in expected.items():
        assert probe.MEASURES[name](classes, clusters) == approx(value, abs=1e-6)


@mark.parametrize("name, value", [
    ("f1", 2 * 20 / (40 + 44)),     # 40 pairs are within a cluster, 44 within a class, 20 within both
    ("ari", (20 - 40 * 44 / 136) / (42 - 40 * 44 / 136)),
    ("class_f1", (10 / 14 + 8 / 11 + 6 / 9) / 3),
    ("purity", 12 / 17),            # 0.71 in the book
    ("nmi", 0.3646)])               # 0.36 in the book
def test_scores_match_the_textbook_example(name, value):
    classes = [*map(int, "00000000111112222")]                  # Manning, Raghavan & Schuetze, figure 16.4
    clusters = [*map(int, "00000122011111222")]
    assert probe.MEASURES[name](classes, clusters) == approx(value, abs=1e-4)


@mark.parametrize("measure", probe.MEASURES.values(), ids=probe.MEASURES)
def test_measures_take_any_whole_numbers_and_are_1_for_identical_partitions(measure):
    classes, *batch = np.random.default_rng(0).integers(0, 3, (4, 50))
    assert np.allclose(measure(classes, batch), [measure(classes, clusters) for clusters in batch])
    assert measure(classes, -1000 * classes) == approx(1)
    assert measure(0 * classes, 0 * classes) == approx(1)
    for wrong in classes[1:], classes / 2, classes.astype(str):
        with raises(ValueError):
            measure(classes, wrong)


@given(st.integers(0, 1000), st.integers(2, 5))
def test_nc1_equals_its_definition(seed, k):
    classes = np.arange(25) % k
    x = around(classes, 1, seed)
    centres = np.array([x[classes == j].mean(0) for j in range(k)])
    within = np.cov((x - centres[classes]).T, bias=True)
    between = np.cov(centres.T, bias=True)
    nc1 = np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / k
    assert probe.nc1(x, classes) == approx(nc1, rel=1e-6)


# ---------------------------------------------------------------- the probe: nulls

TASK = np.arange(240) // 30                                 # 8 tasks
REGEX = np.arange(240) // 10                                # of 3 regexes each
INPUT = (TASK + np.arange(240) % 5) % 10                    # and of 5 inputs, shared with other tasks


def score(states, measure, seed=0, **labels):
    """The row of one measure of `task`."""
    labels = {"task": TASK, "regex": REGEX, **labels}
    rows = probe.score_states(states[None, None], labels, [0], seed)
    [row] = select(rows, identity="task", measure=measure)
    return row


def beaten(states, seed=0, **labels):
    """The nulls that the pairwise F1 of `task` beats."""
    row = score(states, "f1", seed, **labels)
    return {null for null in ("null", "regrouped") if row["value"] > row[f"{null}_95"]}


def test_a_null_shuffles_labels_among_whole_units_within_each_group():
    units = np.array([*"abacddeb"])
    labels = np.array([*"12134452"])
    groups = np.isin(units, ["d", "e"])
    deals = Counter()
    for seed in range(30):
        for draw in probe.deal(labels, units, groups, seed):
            dealt = dict(zip(units, draw))
            assert [dealt[unit] for unit in units] == draw.tolist()
            deals["".join(dealt[unit] for unit in "abcde")] += 1
    within = permutations("123"), permutations("45")
    assert {*deals} == {"".join(x + y) for x, y in product(*within)}
    assert min(deals.values()) > 20                             # of 600 / 12


@mark.parametrize("measure, extreme", [("f1", max), ("nc1", min)])
def test_rows_hold_the_mean_and_the_extreme_of_the_null(measure, extreme):
    draws = np.random.default_rng(0).normal(size=(20, 1, 1))
    [row] = probe.make_rows([7], "task", measure, np.exp, draws[0], null=draws)
    first, *some = np.exp(draws).ravel()
    found = row["value"], row["null_mean"], row["null_95"]
    assert found == approx((first, np.mean([first, *some]), extreme(first, *some)))


@mark.parametrize("clumps, nulls", [
    (TASK, {"null", "regrouped"}),
    (np.random.default_rng(0).permutation(24)[REGEX] // 3, {"null"}),       # three regexes of any task
    (np.arange(240) % 8, set())])
def test_clusters_of_regexes_beat_one_null_and_only_clusters_of_tasks_beat_both(clumps, nulls):
    assert beaten(around(clumps)) == nulls


def test_clusters_by_input_or_regex_alone_do_not_beat_the_nulls_of_task():
    beyond = Counter()
    for seed in range(8):
        by_input = around(INPUT, seed=seed)
        by_regex = around(np.random.default_rng(seed).permutation(24)[REGEX], seed=seed)
        beyond.update(beaten(by_input, seed, input=INPUT))
        beyond["by regex"] += "regrouped" in beaten(by_regex, seed, input=INPUT)
        assert beaten(by_input, seed)                           # if labels may move between inputs
        assert beaten(by_input + around(TASK), seed, input=INPUT) == {"null", "regrouped"}
    assert max(beyond.values()) <= 3                            # by chance one in 21


def test_labels_determined_by_the_input_are_shuffled_among_whole_inputs():
    inputs = np.arange(240) % 24
    task = inputs % 8
    regex = 2 * task + np.arange(240) // 24 % 2                 # two per task, each with all inputs
    beyond = Counter()
    for seed in range(8):
        for by, classes in {"input": inputs, "task": task, "regex": regex}.items():
            nulls = beaten(
                around(classes, 0.1, seed),
                seed,
                input=inputs,
                task=task,
                regex=regex)
            beyond[by] += len(nulls) == 2
    assert beyond["input"] <= 3             # by chance one in 21
    assert beyond["regex"] <= 3
    assert beyond["task"] == 8


def test_a_trained_network_beats_its_nulls_unless_its_tasks_were_shuffled(tmp_path):
    sizes = dict(
        n_tasks=8,
        n_regexes=3,
        n_inputs=10,
        n_outputs=12,
        n_embd=32,
        steps=200,
        n_captures=1)
    for shuffled in False, True:
        out = train.train(tiny(tmp_path / f"{shuffled}", **sizes, shuffle_tasks=shuffled))
        rows = probe.probe(out)
        for position in "instruction", "answer":
            f1 = select(rows, identity="task", measure="f1", split="val", position=position)
            beyond = [probe.is_beyond(row) for row in f1]
            assert sum(beyond) <= 1 if shuffled else beyond[-1]             # by chance one in 21


def test_merge_ratio_equals_a_loop_over_pairs_of_regexes_with_one_input():
    x = around(REGEX, 1)
    centres = {
        (t, r, i): x[(REGEX == r) & (INPUT == i)].mean(0)
        for t, r, i in zip(TASK, REGEX, INPUT)}
    distances = defaultdict(list)
    for a, b in combinations(centres, 2):
        if a[2] == b[2]:
            distances[a[0] == b[0]].append(dist(centres[a], centres[b]))
    ratio = np.mean(distances[True]) / np.mean(distances[False])
    assert score(x, "merge_ratio", input=INPUT)["value"] == approx(ratio, rel=1e-4)


# ---------------------------------------------------------------- the probe: runs and folders


def last_states(run, name, layer):
    """The last states (N, C) of split/position, and their labels."""
    states = np.load(run / "states/000024.npz")[name][layer].astype(float)
    labels = np.load(run / "states/labels.npz")
    return states, labels[f"{name}/task"], labels[f"{name}/regex"]


@mark.parametrize("position, layer", [("instruction", 1), ("answer", 2)])
def test_knn_scores_equal_a_plain_loop(run, rows, position, layer):
    known, tasks, regexes = last_states(run, f"subset/{position}", layer)
    scores = defaultdict(list)
    for point, task, regex in zip(*last_states(run, f"val/{position}", layer)):
        order = ((known - point) ** 2).sum(1).argsort(kind="stable")
        votes = sorted(tasks[order[:10]])
        alike = tasks[order] == task
        scores["knn_task"].append(max(votes, key=votes.count) == task)      # if tied, the lowest
        scores["knn_share"].append(alike[:10].mean())
        scores["knn_share_other"].append(alike[regexes[order] != regex][:10].mean())
    last = select(
        rows,
        step=24,
        position=position,
        split="val",
        layer=layer,
        identity="task")
    for measure, some in scores.items():
        [row] = select(last, measure=measure)
        assert row["value"] == approx(np.mean(some))


def test_rsa_equals_loops_over_pairs_of_states_and_of_tasks(run, rows, trained):
    x, tasks, _ = last_states(run, "val/instruction", 2)
    x -= x.mean(0)
    x /= np.linalg.norm(x, axis=1)[:, None]
    maps = [{*task.map} for task in trained[0].tasks]
    alike, shared = [], []
    for a, b in combinations(range(4), 2):
        alike.append(np.mean([y @ z for y in x[tasks == a] for z in x[tasks == b]]))
        shared.append(len(maps[a] & maps[b]))
    last = select(rows, step=24, position="instruction", split="val", layer=2)
    [row] = select(last, measure="rsa", identity="input")
    assert row["value"] == approx(np.corrcoef(alike, shared)[0, 1], abs=1e-4)


def test_the_report_marks_scores_that_do_not_beat_their_null(rows, capsys):
    probe.print_report(rows)
    said = re.sub(" +", " ", capsys.readouterr().out)
    lines = defaultdict(str)
    for row in select(rows, split="val"):
        value = row["value"]
        null = row.get("regrouped_95", row.get("null_95", -1))
        lower = row["measure"] in ("nc1", "merge_ratio")
        beyond = None not in (value, null) and (value < null if lower else value > null)
        if row["step"] == 24 or row["position"] == "surface":
            cell = " -" if value is None else f" {value:.2f}" if beyond else f" ·{value:.2f}"
            lines[f"{row['position']} {row['identity']} {row['measure']}"] += cell
        if (row["identity"], row["measure"]) == ("task", "f1"):
            shade = "░▒▓█"[min(3, int(4 * value))] if beyond else "·"
            lines[f"{row['position']} layer {row['layer']} "] += 2 * shade
    assert all(f"\n{name}{cells}\n" in said for name, cells in lines.items())


def write_folder(folder, states, **labels):
    """Write a folder with nothing but states of val at position `last`."""
    (folder / "states").mkdir(parents=True)
    np.savez(folder / "states/000000.npz", **{"val/last": states})
    np.savez(folder / "states/labels.npz", **{f"val/last/{name}": of for name, of in labels.items()})


def test_any_folder_of_states_can_be_probed_with_labels_as_numbers_or_text(run, rows, tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 240, 8))
    x[1] = around(TASK)
    write_folder(tmp_path / "numbers", x, task=TASK)
    write_folder(tmp_path / "text", x, task=np.array([f"task {t}" for t in TASK]))
    found = probe.probe(tmp_path / "text")
    assert found == probe.probe(tmp_path / "numbers")
    assert found == read_rows(tmp_path / "text/probe.jsonl")
    beyond = [probe.is_beyond(row) for row in select(found, measure="f1")]
    assert beyond == [False, True, False]
    shutil.copytree(run / "states", tmp_path / "run/states")
    assert probe.probe(tmp_path / "run") == rows                # the states are all it needs


def test_view_centred_uncovers_tasks_hidden_by_inputs(tmp_path):
    groups = np.arange(240) % 10                                # crossed with tasks
    x = 20 * around(groups, 0) + around(TASK)
    write_folder(tmp_path, x[None], task=TASK, input=groups)
    hidden, shown = select(
        probe.probe(tmp_path, ["raw", "centred"]),
        identity="task",
        measure="f1")
    assert hidden["value"] < 0.4
    assert shown["value"] == 1


ZEROS = np.zeros((3, 240, 8), np.float32)


@mark.parametrize("file, name, array, complaint", [
    ("000000", "val/last", ZEROS[:, 1:], "as many as labels"),
    ("000000", "val/last", ZEROS + math.nan, "finite"),
    ("000000", "val/first", ZEROS, "train again"),
    ("000001", "val/last", ZEROS[..., 1:], "the same shape"),
    ("labels", "val/last/task", TASK[1:], "one label per state"),
    ("labels", "val/last/task", TASK.astype(object), ".astype(str)"),
    ("labels", "task", TASK, "split/position/identity")])
def test_a_folder_with_mismatched_files_gives_a_one_line_error(file, name, array, complaint, tmp_path, error):
    write_folder(tmp_path, ZEROS, task=TASK, part=TASK)
    np.savez(tmp_path / f"states/{file}.npz", **{"val/last/part": TASK, name: array})
    assert complaint in error(probe, tmp_path)
    assert not (tmp_path / "probe.jsonl").exists()


# ---------------------------------------------------------------- the causal test


def test_patching_equals_patching_with_hooks(tmp_path):
    run = train.train(tiny(tmp_path, steps=240, n_embd=32))
    rows = probe.patch(run)
    d = train.read_data(run)
    net = train.load_model(run, d)
    val = d.splits["val"]
    x = val.instances
    tokens = torch.from_numpy(val.tokens[:, :-1])
    states = net(tokens)[1][1].detach()                         # of layer 1; <sep> is column 10, <ans> 12

    # among prompts with the same input, in random order, the donor is the previous one
    luck = torch.rand(len(x), generator=runs.make_generator("donors"))
    alike = defaultdict(list)
    for i in luck.argsort().tolist():
        alike[x[i].input].append(i)
    pairs = []
    for some in alike.values():
        pairs += [
            (i, j)
            for j, i in zip(some, some[1:])
            if x[i].output != x[j].output]

    def mean(task, word):
        some = [
            i
            for i, _ in pairs
            if (x[i].task, x[i].input) == (task, word)]
        return states[some, 12].mean(0)

    def shifted(i, j):
        own, other = x[i].task, x[j].task
        shared = d.tasks[own].map.keys() & d.tasks[other].map.keys()
        shift = sum(mean(other, word) - mean(own, word) for word in shared) / len(shared)
        return states[i, 12] + shift

    for position, patch, column, new in (
            ("span", "letters", range(10), lambda i, j: states[j, :10]),
            ("instruction", "donor", 10, lambda i, j: states[j, 10]),
            ("answer", "shift", 12, shifted)):
        found = []
        for i, j in pairs:
            def edit(block, args, out):
                out[0, column] = new(i, j)
            hook = net.blocks[0].register_forward_hook(edit)
            logits = net(tokens[[i]])[0][0].detach()
            hook.remove()
            said = d.vocabulary[logits[12].argmax()]
            inputs = [
                d.vocabulary.index(word)
                for word in d.tasks[x[j].task].map]
            expected = logits[10].softmax(0)[inputs].sum()
            found.append([said == x[j].output, said == x[i].output, expected.item()])
        [row] = select(rows, layer=1, position=position, patch=patch)
        measured = row["donor"], row["right"], row["next"]
        assert measured == approx(np.mean(found, 0), abs=1e-4)
    assert row["n"] == len(pairs) > 40


# ---------------------------------------------------------------- pre-training and alignment


def configs(folder):
    """Name -> configuration, of every run in a folder."""
    return {
        path.parent.name: vars(train.read_config(path.parent))
        for path in folder.rglob("config.json")}


def test_pretraining_arms_differ_only_in_what_is_taught_first(tmp_path):
    rows = apply.pretrain(tmp_path, [3], apply.QUICK | {"steps": 4, "n_captures": 2})
    arms = {*product(apply.STRATEGIES, apply.N_TRAIN)}
    assert {(row["arm"], row["n_train"]) for row in rows} == arms
    made = configs(tmp_path)
    for name, n in arms:
        run = made[f"{name}-{n}"]
        assert run == made[f"scratch-{n}"] | {"out": run["out"], "start": run["start"]}
        if run["start"]:
            knobs = {"shuffle_tasks": False, **apply.STRATEGIES[name], "out": run["start"]}
            assert made[f"{name}-{n}-first"] == made[f"lm-{n}-first"] | knobs


def test_alignment_arms_differ_only_in_what_is_refused(call, tmp_path, monkeypatch):
    monkeypatch.setattr(apply, "QUICK", apply.QUICK | {"steps": 30})
    call(apply, "align", "--quick", "--seeds", 3, "--out", tmp_path)
    shares = [row for row in read_rows(tmp_path / "apply.jsonl") if "b" in row]
    assert {row["measure"] for row in shares} == {*apply.MEASURED}
    made = configs(tmp_path)
    base = made.pop("base")["out"]
    for run in made.values():
        assert run == made["labels-1"] | {"out": run["out"]}
        assert run["start"] == base


@mark.parametrize("by, other", [("task", 1), ("regex", 0)])
def test_a_guard_refuses_other_regexes_only_if_each_task_is_one_cluster(by, other, monkeypatch):
    monkeypatch.setattr(apply, "run_arm", lambda cfg: cfg)
    monkeypatch.setattr(apply, "read_data", make_dataset)
    case = apply.make_case(tiny("", n_tasks=8))
    splits = case.data.splits
    states = {}
    for name in "train", "val", "ood":
        labels = splits[name].labels("instruction")[by]
        clumps = around(labels, 0.01)
        noise = around(np.arange(len(labels)))
        states[name] = torch.from_numpy(np.stack([noise, clumps]))
    k = {"task": 8, "regex": 16}[by]
    _, layer, nearest = apply.find_clusters(states, k, 0)
    assert layer == 1
    bad = apply.unwanted_clusters(nearest["train"], case, [pool[0] for pool in case.pools])
    refused = {
        name: bad[nearest[name]][splits[name].state_of("instruction")]
        for name in ("val", "ood")}
    right = np.arange(len(refused["val"])) % 3 > 0
    rows = apply.outcome(case, "guard", 1, right, refused)
    shares = {row["measure"]: row["value"] for row in rows}
    assert shares["refused_labelled"] == 1
    assert shares["refused_other"] == other
    assert shares["refused_wanted"] == 0
    wanted = [x.task not in case.unwanted for x in splits["val"].instances]
    assert shares["accuracy"] == right[wanted].mean()


def test_step_to_interpolates_between_evaluations():
    points = (0, 0), (10, 0.2), (20, 0.6), (30, 0.4)
    curve = [{"step": step, "acc_val": accuracy} for step, accuracy in points]
    assert apply.step_to(0.5, curve) == approx(17.5)


# ---------------------------------------------------------------- figures and examples


def test_figures_show_the_mean_and_the_range_over_runs():
    rows = [{"step": 10, "value": value} for value in (1, 2, 6)]
    rows += [{"step": 0, "value": 5}] * 3
    assert plot.curve(rows, "step") == ([0, 10], [5, 3], [5, 1], [5, 6])        # steps, means, ranges


@mark.skipif(not plot.matplotlib, reason="needs matplotlib, which make figures installs")
def test_plot_draws_every_kind_of_figure(run, rows, call, tmp_path):
    here = shutil.copytree(run, tmp_path / "run")
    probe.patch(here)
    as_if_learnt = [row | {"value": 1.0} if row["measure"] == "f1" else row for row in rows]
    runs.write_rows(here / "probe.jsonl", as_if_learnt)
    call(plot, here)
    names = {path.name for path in (here / "figures").iterdir()}
    assert names >= {
        "data.png",
        "loss.png",
        "accuracy.png",
        "hero.png",
        "hero.gif",
        "patch_span.png",
        "f1_answer_val.png",
        "similarity_answer_output.png"}


def test_page_numbers_come_from_tables_and_tables_from_runs(run, rows, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(f"{HERE}/examples")
    monkeypatch.chdir(tmp_path)

    def example(name, *argv):
        monkeypatch.setattr(sys, "argv", ["", *map(str, argv)])
        runpy.run_path(f"{HERE}/examples/{name}.py", run_name="__main__")

    shutil.copytree(run, "run")
    runs.write_rows("run/probe.jsonl", rows)
    example("table", "run", "--out", "study/numbers.csv")
    text = tmp_path / "text.md"
    text.write_text("?<!--study: answer task f1 layer 2; all-->")
    example("report", "text.md")
    [row] = select(
        rows,
        step=24,
        split="val",
        position="answer",
        identity="task",
        measure="f1",
        layer=2)
    beyond = int(row["value"] > row["regrouped_95"])
    number = f"{row['value']:.2f} ({row['regrouped_95']:.2f}; {beyond}/1)"
    assert text.read_text() == f"{number}<!--study: answer task f1 layer 2; all-->"


@mark.skip(reason="the numbers on the pages are the second edition's, until all results are made anew")
@mark.parametrize("page", ["README.md", "results/README.md"])
def test_page_numbers_are_those_of_the_tables(page, call, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(f"{HERE}/examples")
    import report
    call(report, HERE / page, "--numbers", HERE / "results", "--out", tmp_path / "text.md")
    assert (tmp_path / "text.md").read_text() == (HERE / page).read_text()


def test_a_language_model_reads_a_batch_as_it_reads_single_prompts(tmp_path, monkeypatch):
    transformers = importorskip("transformers")
    monkeypatch.syspath_prepend(f"{HERE}/examples")
    import any_model
    letters = {                                                 # one token per byte, named as GPT-2 does
        chr(i): n
        for n, i in enumerate([*range(33, 127), *range(161, 173), *range(174, 324)])}
    tokenizer = transformers.GPT2TokenizerFast(letters, [], add_bos_token=True, padding_side="left")
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(1)
    sizes = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2)
    transformers.LlamaForCausalLM(sizes).save_pretrained(tmp_path)
    net, tokenizer = any_model.load(any_model.Config(model=str(tmp_path)))
    asked = []
    for n in range(1, 30):
        ids = tokenizer(f"Do: {n * 'x'}\nSay:", return_tensors="pt").input_ids
        said = tokenizer.decode(net.generate(ids, max_new_tokens=2, do_sample=False)[0, -2:])
        x = data.Instance(n * "x", "", said if said.isascii() else "no", 0, 0, 0)
        asked.append((f"Do: {n * 'x'}\nSay:", x))
    for (prompt, x), (states, right) in zip(asked, any_model.read(net, tokenizer, asked)):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        end = len(x.instruction) + 4                            # one token per letter, after a first one
        layers = torch.cat(net(ids, output_hidden_states=True).hidden_states[:2])
        assert np.allclose(
            states,
            layers[:, [end, -1]].detach(),
            atol=1e-5)
        assert right == (x.output != "no")


# ---------------------------------------------------------------- what README says

README = (HERE / "README.md").read_text(encoding="utf-8")


def fork(title):
    """Language and text of the first block below a title in README, and the commands after it."""
    blocks = rf"\*\*{title}.*?```(\w+)\n(.*?)```\n+```bash\n(.*?)```"
    return re.search(blocks, README, re.S).groups()


CHANGED = r"^[-+](?![-+]{2})(.*)"           # a changed line of a diff


@mark.parametrize("title, said", [
    ("Another identity", "instruction letter f1"),
    ("Another measure", "instruction task fm"),
    ("Another position", "input task f1"),
    ("Another block", "instruction task f1"),
    ("Other tasks", "instruction task f1"),
    ("States of any model", "last task f1")])
def test_page_forks_have_at_most_ten_lines_and_run(title, said, run, tmp_path):
    kind, text, then = fork(title)
    for path in [*HERE.glob("*.py"), HERE / "facts.json"]:
        shutil.copy(path, tmp_path)
    early = shutil.ignore_patterns("0000[01]*")                 # one capture is enough
    shutil.copytree(run, tmp_path / "runs/default", ignore=early)
    changed = re.findall(CHANGED if kind == "diff" else "^.+", text, re.M)
    assert len(changed) <= 10
    command = {"diff": "git apply", "python": f"'{sys.executable}'", "json": "tee mine.json"}[kind]
    subprocess.run(command, shell=True, input=text, text=True, cwd=tmp_path, check=True)
    for line in then.splitlines():
        _, *command = shlex.split(line, comments=True)
        if "train.py" in command:
            command += as_flags({**TINY, "steps": 4, "n_captures": 1})
        printed = subprocess.check_output([sys.executable, *command], cwd=tmp_path, text=True)
    assert f"\n{said} " in printed


def test_page_measure_is_right_at_its_edges(monkeypatch):
    monkeypatch.setattr(probe, "MEASURES", {})
    _, text, _ = fork("Another measure")
    exec("\n".join(re.findall(CHANGED, text, re.M)), vars(probe))
    fm = probe.MEASURES["fm"]
    assert fm([0, 0, 0], [0, 1, 2]) == fm([0, 1, 2], [0, 0, 0]) == 0
    assert fm([0, 0, 0], [0, 0, 0]) == fm([0, 1, 2], [0, 1, 2]) == 1
    assert fm([0, 0, 0, 1, 1], [0, 0, 1, 1, 1]) == approx(2 / 4)            # 4 pairs each, 2 in common


# ---------------------------------------------------------------- bad input

FLAGS = """
data.py --no-such-flag
data.py --n-tasks many
data.py --n-mappings 11
data.py --n-train 800
data.py --tasks nowhere.json
train.py --preset huge
train.py --n-embd 65
train.py --steps 0
train.py --lr nan
train.py --warmup 1.1
train.py --input-weight -1
train.py --asks-for regex
train.py --n-lay 3
train.py --start nowhere
train.py --resume
probe.py nowhere
probe.py . --patch
probe.py . --view upside-down
apply.py dance
apply.py align --seeds -1
"""


@mark.parametrize("line", FLAGS.strip().split("\n"))
def test_bad_flags_give_a_one_line_error_and_write_nothing(line, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *flags = line.split()
    error(sys.modules[name.removesuffix(".py")], *flags)
    assert not [*tmp_path.iterdir()]


BAD_TASKS = r"""
"words"                 "bytes"         needs "tokens"
"name": "young"         "name": ""      task 0: it needs "name"
"name": "young", "map"  "map"           task 0: it needs "name"
"puppy"                 7               task young: every output and every regex must be text
"puppy"                 " "             task young: an input or output is blank
"puppy"                 "\ud800"        task young: it has half a character
"regexes"               "distributions"  "regexes" (not "distributions")
"cow": "calf"           "dog": "calf"   a key is there twice
"sound", "map"          "young", "map"  task young: another task has this name
(What|Which) (word      (What (word     task young: '(What (word
(Name|Give|State) (the|one      (Name) (one     has only 8
its) young( one)?( of it)?      its) baby       have strings in common
"""


@mark.parametrize("line", BAD_TASKS.strip().split("\n"))
def test_a_bad_tasks_file_gives_a_one_line_error_that_says_where(line, error, tmp_path):
    old, new, complaint = re.split("  +", line)
    _, text, _ = fork("Other tasks")
    (tmp_path / "mine.json").write_text(text.replace(old, new, 1))
    assert complaint in error(train, "--tasks", tmp_path / "mine.json", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@mark.parametrize("name", ["config.json", "tasks.json", "ckpt.pt", "states/labels.npz", "states/000024.npz"])
def test_a_damaged_file_gives_a_one_line_error_that_names_it(name, run, error, tmp_path):
    file = shutil.copytree(run, tmp_path / "run") / name
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    assert name in error(train, "--resume", "--out", tmp_path / "run")


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(run, error):
    before = outcome(run)
    assert "is in use" in error(train, "--out", run)
    assert "another lr" in error(train, "--out", run, "--resume", "--lr", 1)
    assert "another n_" in error(train, "--out", run, "--resume", "--preset", "quick")
    assert outcome(run) == before


def test_a_full_disk_gives_a_one_line_error_and_the_run_can_be_resumed(
        run, error, call, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes
    attempts = count()

    def fill_up(path, content):
        if path.name == "ckpt.pt.tmp" and next(attempts) == 3:
            write_bytes(path, content[:99])
            raise OSError(28, "No space left on device")
        write_bytes(path, content)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill_up)
        assert "ckpt.pt cannot be written: No space" in error(train, *as_flags(TINY), "--out", tmp_path)
    assert not [*tmp_path.glob("*.tmp")]
    call(train, "--resume", "--out", tmp_path)
    assert outcome(tmp_path) == outcome(run)


@mark.parametrize("place", ["a measure", "an identity", "a layer", "a reader of tasks"])
def test_a_mistake_in_the_code_keeps_its_traceback(place, run, call, tmp_path, monkeypatch):
    def mistake(*args):
        return np.zeros(3) + np.zeros(4)
    if place == "a measure":
        monkeypatch.setitem(probe.MEASURES, "mine", mistake)
    elif place == "an identity":
        monkeypatch.setitem(data.IDENTITIES, "mine", mistake)
    elif place == "a layer":
        monkeypatch.setattr(model.MLP, "forward", mistake)
    else:
        monkeypatch.setattr(data, "read_task", mistake)
    command = (train, "--resume") if place == "a layer" else (probe,)
    with raises(ValueError, match="could not be broadcast") as caught:
        call(*command, *["--out"] * (place == "a layer"), shutil.copytree(run, tmp_path / "run"))
    assert caught.type is ValueError


def test_output_that_a_terminal_cannot_show_is_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    runs.command_line(lambda: print("\u2591 0.5", flush=True))
    assert out.buffer.getvalue() == b"\\u2591 0.5\n"


def test_a_setting_is_one_line_and_its_comment_the_help():
    @dataclasses.dataclass
    class Mine(DataConfig):
        share: float = 0        # between 0 and 100 % of it
        kept: bool = True
        at_most = {"share": 0.9}
    flags = runs.Flags(Mine)
    assert "between 0 and 100 % of it" in re.sub(r"\s+", " ", flags.format_help())
    assert vars(flags.parse_args(["--share", "0.5", "--no-kept"])) == {"share": 0.5, "kept": False}
    with raises(BadInput, match="share is 1: it must be from 0 to 0.9"):
        runs.check(Mine(share=1))


@mark.parametrize("path", [*HERE.glob("*.py"), *HERE.glob("examples/*.py")], ids=lambda path: path.name)
def test_every_file_imports_runs_first(path):
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    others = [name for name in names if name.split(".")[0] not in sys.stdlib_module_names]
    assert others[0] == ("numpy" if path.name == "runs.py" else "runs")
