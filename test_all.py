"""Why you may believe it: every test is a claim, checked against something that does not share our code.

    make test                              all of it, about five minutes on two cores
    .venv/bin/pytest -k "not slow" test_all.py
    .venv/bin/pytest -k regex test_all.py  the claims with that word in their name
"""
import contextlib
import copy
import csv
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import data             # before torch: it sets how torch's threads wait
from data import DataConfig, Regex, make_dataset

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import apply
import model
import plot
import probe
import train

HERE = Path(__file__).parent
settings.register_profile("all", deadline=None, derandomize=True)
settings.load_profile("all")
SMALL = dict(n_tasks=4, n_distributions=2, n_mappings=3, n_inputs=5, n_outputs=6, n_train=12, n_val=6)
TINY = dict(SMALL, n_layer=2, n_head=2, n_embd=16, steps=24, batch_size=64, n_captures=6)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
drawn = pytest.mark.skipif(plot.matplotlib is None, reason="needs matplotlib, which make figures installs")
reads = pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers, which make smollm2 installs")


WORDS = {"tokens": "words", "tasks": [      # the example of README, too
    {"name": "young", "map": {"dog": "puppy", "cow": "calf", "guinea pig": "pup"}, "distributions": [
        "(What|Which) (word|name) do (we|you|they|farmers) (use|have) for its young\\?",
        "(Name|Give|State) (the |its )?(baby|offspring|little one)( name)?(, please)?\\."],
     "held_out": "(Name|Give|State) (the|one|its) young( one)?( of it)?\\."},
    {"name": "sound", "map": {"dog": "bark", "cow": "moo", "guinea pig": "wheek"}, "distributions": [
        "(What|Which) (sound|noise) (does|would|can) (it|this one|that one) make\\?",
        "(the |its )?(call|voice|cry)( here)?( wanted| needed|, please)?:?"],
     "held_out": "(Name|Give|State) (the|one|its) (sound|noise|call|voice)( of it)?\\."}]}


@pytest.fixture(scope="module")
def dataset():
    return make_dataset(DataConfig())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train.train(train.Config(**TINY, out=str(tmp_path_factory.mktemp("runs") / "tiny") + "/"))


@pytest.fixture(scope="module")
def raw_rows(run):
    return probe.probe(run)


def exit_status(module, *argv):
    """Run a command line that is to fail in this process; return its exit status."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, argv)])
        data.command_line(module.main)
    return stop.value.code


def as_flags(knobs):
    """A configuration as the command line takes it."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in knobs.items()]


def lines(path):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- regular expressions

atoms = st.sampled_from(["a", "b", "[ab]", "[^a]", ".", "", r"\d", "[b-d]", r"\."])
quantifiers = st.sampled_from(["?", "*", "+", "{2}", "{0,2}", "{1,}", "{0}"])
patterns = st.recursive(atoms, lambda p: st.one_of(
    st.tuples(p, p).map("".join), st.tuples(p, p).map("({0[0]}|{0[1]})".format),
    st.tuples(p, quantifiers).map("(?:{0[0]}){0[1]}".format)), max_leaves=6)
STRINGS = ["".join(s) for n in range(5) for s in itertools.product("abc.1", repeat=n)]


@given(patterns)
@settings(max_examples=150)
def test_regex_language_is_what_fullmatch_accepts(pattern):
    regex = Regex(pattern, max_len=4)
    assert [s for s in STRINGS if regex.matches(s)] == [s for s in STRINGS if re.fullmatch(pattern, s)]


@given(patterns)
@settings(max_examples=150)
def test_regex_count_is_brute_force_and_a_full_sample_is_the_language(pattern):
    for wide, narrow in (r"\.", "c"), (r"\d", "d"), ("[^a]", "[bc]"), (".", "[a-c]"):
        pattern = pattern.replace(wide, narrow)
    language = {"".join(s) for n in range(5) for s in itertools.product("abcd", repeat=n)
                if re.fullmatch(pattern, "".join(s))}
    regex = Regex(pattern, max_len=4)
    assert regex.count == len(language)
    assert {regex.unrank(i) for i in range(regex.count)} == language
    assert sorted(regex.sample(regex.count, random.Random(0))) == sorted(language)


@given(patterns, patterns)
@settings(max_examples=150)
def test_regex_isdisjoint_agrees_with_listing_both_languages(p, q):
    a, b = Regex(p, max_len=4), Regex(q, max_len=3)
    common = any(b.matches(a.unrank(i)) for i in range(min(a.count, 20000)))
    assert a.isdisjoint(b) == b.isdisjoint(a)
    assert a.isdisjoint(b) != common or a.count > 20000


@given(st.text("ab|()[]{}?*+.^$\\-,012dwsDWSé ", max_size=14), st.text("ab-,012 |(^", max_size=5))
@settings(max_examples=2000)
def test_regex_on_any_text_raises_valueerror_or_agrees_with_re(pattern, string):
    try:
        regex = Regex(pattern, max_len=8)
    except ValueError as error:
        assert re.search(r"at position \d+ of|too ", str(error))
        return
    assert regex.matches(string) == bool(re.fullmatch(pattern, string))
    for s in regex.sample(min(3, regex.count), random.Random(0)):
        assert re.fullmatch(pattern, s) and len(s) <= 8


@pytest.mark.parametrize("pattern, count", [
    ("a|a", 1), ("(a|ab)(c|bc)", 3), ("(a|a){10}", 1), ("(a|b)?a?", 5), ("a|b|a", 2), ("", 1), ("[^ -~]", 0),
    ("(a|a)*", 65), ("(a*)*", 65), ("a*", 65), ("a{1000}", 0), ("[a-z]{40}", 26 ** 40), ("[]a]", 2),
    ("(" * 50 + "a" + ")" * 50, 1), ("(" * 50 + "a" + ")*" * 50, 65), (r"[\d.]", 11), ("a{0,15000}", 65),
    ("(a?){9999}", 65), ("a{0000000005}", 1), ("()*" * 20_000, 1), ("(|a){99999}", 65), ("((((a{99}){99}){99}){99})", 0), ("a{" + "9" * 5000 + "}", 0), (r"\w", 63), (r"\W", 32),
    (r"[^\d]", 85), ("(" + "|" * 9000 + "){2000}", 1),
    ("|".join(map("".join, list(itertools.product("abcde", repeat=4))[:300])), 300),
    ("(a|b|ab|ba){8}", 12866)])     # the last by listing them all
def test_regex_counts_strings_and_not_derivations(pattern, count):
    assert Regex(pattern).count == count
    assert Regex("a" * 1415, 1415).count == 1
    if pattern.endswith("{8}"):
        assert len({"".join(s) for s in itertools.product(["a", "b", "ab", "ba"], repeat=8)}) == count


@pytest.mark.parametrize("pattern", [
    "[ab]{0,60}a[ab]{60}", "[ab]*a[ab]{13}", "(" * 6000 + "a" + ")*" * 6000, "[\u0100-\u0400]?" * 2000,
    "(" * 200 + "a?b?c?" + "){0,50}" * 200, "a?" * 20_000, "[\x01-\U0010ffff]*",
    "[ -\U0010ffff]" * 40, "(.*a.{12})|(.*b.{11})", ".{0,50}a.{50}|.{0,40}b.{40}", "(((a?){20}b?){20}c?){20}"])
def test_regex_that_would_explode_is_refused(pattern):
    with pytest.raises(ValueError, match="too"):
        Regex(pattern)


@pytest.mark.parametrize("pattern, construct, position", [
    ("a^b", "anchor ^", 1), ("ab$", "anchor $", 2), (r"a\b", r"anchor \b", 1), (r"\Aa", r"anchor \A", 0),
    (r"(a)\1", r"back-reference \1", 3), (r"\q", r"escape \q", 0), ("a\\", "escape \\", 1),
    (r"[\n]", r"escape \n", 1),
    ("a(?=b)", "group (?=", 1), ("(?P<x>a)", "group (?P", 0), ("a*?", "second quantifier ?", 2),
    ("a++", "second quantifier +", 2),
    (r"\101", r"escape \1", 0), (r"[\b]", r"escape \b", 1), (r"[\1]", r"escape \1", 1), ("(?", "group (?", 0),
    ("a**", "second quantifier *", 2),
    ("a{2}{3}", "second quantifier {", 4),
    ("[]b", "unclosed [", 0), ("[a][^]", "unclosed [", 3), ("*a", "leading quantifier *", 0), ("a|+", "leading quantifier +", 2), ("a{", "bare {", 1),
    ("a{,3}", "bare {", 1), ("a{3,2}", "empty repetition {3,2}", 1), ("a]", "bare ]", 1),
    ("}", "bare }", 0), ("(a", "unclosed (", 0), ("a)", "unmatched )", 1), ("x[a", "unclosed [", 1),
    ("[b-a]", "bad range b-a", 1), (r"[a-\d]", r"bad range a-\d", 1),
    (r"[\s-a]", r"bad range \s-a", 1)])
def test_regex_names_what_it_does_not_support_and_where(pattern, construct, position):
    with pytest.raises(ValueError, match=re.escape(f"{construct} at position {position} of")):
        Regex(pattern)


def test_regex_refuses_strings_it_does_not_have():
    with pytest.raises(ValueError, match="has only 2"):
        Regex("a|b").sample(3, random.Random(0))
    with pytest.raises(ValueError, match="has only 0"):
        Regex("[^ -~]").sample(1, random.Random(0), unique=False)
    with pytest.raises(ValueError, match="-1 strings"):
        Regex("a|b").sample(-1, random.Random(0))
    assert Regex("[^ -~]").sample(0, random.Random(0)) == []
    for wrong in ("a", -1), ("a", 1.5), (None, 4):
        with pytest.raises(ValueError):
            Regex(*wrong)
    for i in -1, 2, 0.5:
        with pytest.raises(ValueError):
            Regex("a|b").unrank(i)


@pytest.mark.parametrize("unique", [False, True])
def test_regex_sampling_is_uniform(unique):
    regex, rng = Regex("(a|ab|b)(c|bc)?|x{0,20}"), random.Random(0)     # ambiguous, with unequal branches
    k, n = (1, 30000) if not unique else (3, 10000)
    seen = Counter(s for _ in range(n) for s in regex.sample(k, rng, unique))
    expected = n * k / regex.count
    chi2 = sum((seen[regex.unrank(i)] - expected) ** 2 / expected for i in range(regex.count))
    df = regex.count - 1
    assert len(seen) == regex.count and abs(chi2 - df) < 4 * math.sqrt(2 * df)


def test_regex_sampling_is_uniform_beyond_64_bits():
    strings = Regex("[a-z]{40}|[0-9]{3}").sample(4000, random.Random(1))
    assert len(set(strings)) == 4000 and not any(s.isdigit() for s in strings)
    for place in 0, 39:
        counts = Counter(s[place] for s in strings)
        chi2 = sum((counts[c] - 4000 / 26) ** 2 / (4000 / 26) for c in data.ascii_lowercase)
        assert chi2 < 25 + 4 * math.sqrt(50)


# ---------------------------------------------------------------- tasks, splits, tokens


def test_same_seed_same_data_whatever_the_hash_seed():
    code = "import data; d = data.make_dataset(data.DataConfig()); print(d.tasks, d.splits['val'].instances)"
    printed = [subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, check=True,
                              env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in "12"]
    assert printed[0] == printed[1] and len(printed[0]) > 10000
    assert make_dataset(DataConfig(seed=3)).tasks != make_dataset(DataConfig(seed=4)).tasks


@given(st.integers(0, 10 ** 6), st.integers(2, 6), st.integers(1, 3), st.integers(2, 4))
@settings(max_examples=15)
def test_languages_are_pairwise_disjoint(seed, n_tasks, n_distributions, n_mappings):
    cfg = DataConfig(seed=seed, n_tasks=n_tasks, n_distributions=n_distributions, n_mappings=n_mappings,
                     n_inputs=n_mappings, n_outputs=max(n_mappings, n_tasks))
    tasks = data.random_tasks(cfg)
    languages = [set(r.sample(r.count, random.Random(0)))
                 for task in tasks for r in map(Regex, (*task.distributions, task.held_out))]
    assert len(languages) == n_tasks * (n_distributions + 1)
    assert len(set().union(*languages)) == sum(map(len, languages))


@given(st.lists(patterns, min_size=2, max_size=5))
@settings(max_examples=60)
def test_find_overlap_names_two_languages_that_share_a_string_if_there_are_any(some):
    some = [p.replace(r"\.", "c").replace("[^a]", "[b1]").replace(r"\d", "1").replace(".", "[a1]") for p in some]
    some = [p.replace("[b-d]", "[bc]") for p in some]
    languages = [{s for s in STRINGS if re.fullmatch(p, s)} for p in some]
    shared = [(i, j) for j in range(len(some)) for i in range(j) if languages[i] & languages[j]]
    found = data.find_overlap(some, 4)
    assert (found in shared) if shared else found is None


def test_no_instruction_is_in_two_of_train_val_ood(dataset):
    strings = {name: {x.instruction for x in split.instances} for name, split in dataset.splits.items()}
    assert [len(strings[name]) for name in ("train", "subset", "val", "ood")] == [960, 480, 480, 160]
    assert strings["subset"] < strings["train"]
    assert not strings["train"] & strings["val"] and not (strings["train"] | strings["val"]) & strings["ood"]


def test_every_instance_comes_from_its_regex_and_its_map(dataset):
    patterns = [(t, p) for t, task in enumerate(dataset.tasks) for p in (*task.distributions, task.held_out)]
    for name, split in dataset.splits.items():
        for x in split.instances:
            t, pattern = patterns[x.distribution]
            assert t == x.task and re.fullmatch(pattern, x.instruction)
            assert (pattern == dataset.tasks[t].held_out) == (name == "ood")
            assert dataset.tasks[t].map[x.input] == x.output
        assert len(set(split.instances)) == len(split.instances)


def test_input_and_output_alone_do_not_give_the_task_away(dataset):
    for key in "input", "output":
        tasks_of = {}
        for x in dataset.splits["train"].instances:
            tasks_of.setdefault(getattr(x, key), set()).add(x.task)
        sizes = sorted(map(len, tasks_of.values()))
        assert sizes[0] >= 2 and sizes[-1] - sizes[0] <= 1      # all in as many tasks, give or take one
    pairs = [pair for task in dataset.tasks for pair in task.map.items()]
    assert len(set(pairs)) == len(pairs)        # an input has another output in each of its tasks
    assert len({frozenset(task.map) for task in dataset.tasks}) == 16
    assert len({len(x.instruction) for split in dataset.splits.values() for x in split.instances}) == 1


def test_random_tasks_are_found_where_pairs_are_scarce():
    tasks = data.random_tasks(DataConfig(n_tasks=28, n_distributions=1, seed=1))    # 140 of 200 pairs
    pairs = [pair for task in tasks for pair in task.map.items()]
    assert len(set(pairs)) == len(pairs) == 140
    uses = Counter(output for _, output in pairs)
    assert len(uses) == 20 and max(uses.values()) - min(uses.values()) <= 2


@given(st.integers(0, 10 ** 6), st.integers(1, 6), st.integers(0, 3), st.booleans())
@settings(max_examples=60)
def test_sets_of_inputs_differ_as_far_as_the_pool_allows_and_twins_share_theirs(seed, pairs, more, twins):
    n, k = 2 * pairs + 2, 3
    cfg = DataConfig(n_tasks=n, n_mappings=k, n_inputs=min(k + more, n * k // 4), n_outputs=n, twins=twins)
    maps = data.random_maps(cfg, random.Random(seed))
    sets = [frozenset(task) for task in maps]
    some = sets[::2] if twins else sets
    assert not twins or sets[::2] == sets[1::2]
    assert len(set(some)) == min(len(some), math.comb(cfg.n_inputs, k))
    assert all(a[word] != b[word] for i, a in enumerate(maps) for b in maps[:i] for word in {*a} & {*b})


def test_identity_input_set_is_which_inputs_the_task_has():
    d = make_dataset(DataConfig(twins=True, n_tasks=6, n_inputs=8, n_outputs=12))
    split = d.splits["val"]
    sets = [frozenset(d.tasks[x.task].map) for x in split.instances]
    ids = split.identities["input_set"]
    assert len(set(ids)) == 3 and len(set(zip(ids.tolist(), sets))) == 3
    assert "input_set" in split.labels("instruction")


def test_tokens_read_instruction_sep_input_ans_output_eos(dataset):
    for split in dataset.splits.values():
        ids = {"instruction": "<sep>", "answer": "<ans>"}
        for x, row, answer in zip(split.instances, split.tokens, split.is_output):
            words = [dataset.vocabulary[i] for i in row]
            text = [*x.instruction, "<sep>", x.input, "<ans>", x.output, "<eos>"]
            assert words == text + ["<pad>"] * (len(words) - len(text))
            assert [w for w, a in zip(words, answer) if a] == [x.output, "<eos>"]
        for position, (rows, columns) in split.positions.items():
            assert {dataset.vocabulary[i] for i in split.tokens[rows, columns]} == {ids[position]}


def test_at_instruction_each_string_counts_once_by_task_and_distribution(dataset):
    split = dataset.splits["val"]
    rows, _ = split.positions["instruction"]
    assert len(rows) == len({x.instruction for x in split.instances}) == len({split.instances[r].instruction
                                                                              for r in rows})
    assert set(split.labels("instruction")) == {"task", "distribution", "input_set"}
    assert list(split.labels("answer")) == list(data.IDENTITIES)
    assert split.labels("instruction")["task"].tolist() == [split.instances[r].task for r in rows]


def test_tasks_file_round_trip_gives_the_same_data(tmp_path, dataset):
    data.write_tasks(tmp_path / "tasks.json", dataset.cut_into, dataset.tasks)
    again = make_dataset(DataConfig(tasks=str(tmp_path / "tasks.json")))
    assert again.tasks == dataset.tasks and again.vocabulary == dataset.vocabulary
    assert all((again.splits[name].tokens == dataset.splits[name].tokens).all() for name in dataset.splits)


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 3))


@given(SIZES, st.integers(0, 99), st.booleans())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_large_task_is_taught_in_turns_and_pairs_are_the_rest(tmp_path, sizes, seed, shuffle):
    n_asked, n_inputs, n_regexes = sizes
    tasks = [data.Task(name, {f"{i}": f"{name}{i}" for i in range(n_inputs)},
                       [f"{name}{m}[a-z]" for m in range(n_regexes)], f"{name}x[a-z]") for name in "ab"]
    data.write_tasks(tmp_path / "tasks.json", "words", tasks)
    d = make_dataset(DataConfig(tasks=str(tmp_path / "tasks.json"), n_asked=n_asked, n_train=12, n_val=5,
                                seed=seed, shuffle_tasks=shuffle))
    asked = {name: Counter((x.instruction, x.input) for x in split.instances)
             for name, split in d.splits.items()}
    assert ("pairs" in asked) == (n_inputs > n_asked)
    assert all(set(some.values()) == {1} for some in asked.values())
    per_string = Counter(string for string, _ in asked["train"])
    assert set(per_string.values()) == {min(n_asked, n_inputs)}
    assert asked["subset"].keys() < asked["train"].keys()
    if n_inputs > n_asked:
        assert not asked["pairs"].keys() & asked["train"].keys()
        assert {s for s, _ in asked["pairs"]} == {s for s, _ in asked["subset"]}
        assert set(Counter(s for s, _ in asked["pairs"]).values()) == {min(n_asked, n_inputs - n_asked)}
    if not shuffle:         # a regex teaches all inputs, and asks as often for each, give or take one
        for number in {x.distribution for x in d.splits["train"].instances}:
            taught, seen = ([x.input for x in d.splits[name].instances if x.distribution == number]
                            for name in ("train", "val"))
            times = Counter(taught + seen)
            assert len(set(taught)) == n_inputs and max(times.values()) - min(times.values()) <= 1


def test_words_are_cut_as_a_reader_would(tmp_path):
    task = data.Task("t", {"St. John's": "U.S. dollar"}, ["What's (it|this)(, then)?\\?"], "Ice-cream (a|b)")
    data.write_tasks(tmp_path / "tasks.json", "words", [task])
    d = make_dataset(DataConfig(tasks=str(tmp_path / "tasks.json"), n_train=3, n_val=1))
    texts = {" ".join(d.vocabulary[i] for i in row) for split in d.splits.values() for row in split.tokens}
    end = "<sep> St . John's <ans> U . S . dollar <eos>"
    assert {text.replace(" <pad>", "") for text in texts} >= {
        f"what's it ? {end}", f"what's this , then ? {end}"}
    assert any(text.startswith("ice-cream ") for text in texts)


@pytest.mark.parametrize("mark", ["<sep>", "<ans>", "<eos>", "<pad>"])
def test_no_text_is_read_as_a_special_token(mark, tmp_path):
    task = data.Task("t", {mark: "1", "x": mark}, [f"(go|sit) {mark} [a-e]"], f"{mark} [a-e]")
    data.write_tasks(tmp_path / "tasks.json", "words", [task])
    d = make_dataset(DataConfig(tasks=str(tmp_path / "tasks.json"), n_train=3, n_val=1))
    for split in d.splits.values():
        texts = [[d.vocabulary[i] for i in row if i] for row in split.tokens]
        assert all(Counter(text) >= Counter(["<sep>", "<ans>", "<eos>"]) for text in texts)
        assert all(max(Counter(text)[special] for special in data.SPECIALS) == 1 for text in texts)
        assert (split.positions["answer"][1] == [text.index("<ans>") for text in texts]).all()


def test_text_is_what_its_tokens_are_whatever_its_spaces_and_unicode_form(tmp_path):
    def made(*inputs, outputs="New York", mark="\u00e9"):
        tasks = [data.Task(f"t{i}", {word: outputs, "x": "y"}, [f"{i} caf{mark} [a-e]"], f"{i} th{mark} [a-e]")
                 for i, word in enumerate(inputs)]
        data.write_tasks(tmp_path / "tasks.json", "words", tasks)
        return make_dataset(DataConfig(tasks=str(tmp_path / "tasks.json"), n_train=3, n_val=1))

    plain = made("cow", "cow")
    for other in made("cow", " cow\u00a0"), made("cow", "cow", outputs="New \t York"), made(
            "cow", "cow", mark="e\u0301"):
        for name, split in plain.splits.items():
            assert np.array_equal(split.tokens, other.splits[name].tokens)
            assert all(np.array_equal(ids, other.splits[name].identities[key])
                       for key, ids in split.identities.items())
    with pytest.raises(ValueError, match="are the same tokens"):
        tasks = [data.Task("t", {"x": "y"}, ["caf\u00e9 [a-e]"], "cafe\u0301 [a-e]")]
        data.write_tasks(tmp_path / "tasks.json", "words", tasks)
        make_dataset(DataConfig(tasks=str(tmp_path / "tasks.json"), n_train=3, n_val=2))


@pytest.mark.parametrize("text, expected", [
    ("हिन्दी में", ["हिन्दी", "में"]), ("น้ำ ที่", ["น้ำ", "ที่"]), ("Tie\u0302\u0301ng Vie\u0323\u0302t", ["Tiếng", "Việt"]),
    ("İstanbul".lower(), ["i\u0307stanbul"]), ("can't e-mail; 3.5", ["can't", "e-mail", ";", "3", ".", "5"])])
def test_letters_and_their_marks_are_one_word(text, expected):
    assert data.words(text) == expected


@pytest.mark.parametrize("asks_for", ["task", "distribution", "nothing"])
def test_identities_stand_in_place_of_outputs_and_where_nothing_is_asked_is_no_input(asks_for, dataset):
    d = make_dataset(DataConfig(asks_for=asks_for))
    for name, split in d.splits.items():
        asked = [(x.instruction, x.input) for x in dataset.splits[name].instances]      # in the same splits
        if asks_for == "nothing":
            asked = [(instruction, "") for instruction in dict.fromkeys(s for s, _ in asked)]
        assert [(x.instruction, x.input) for x in split.instances] == asked
        for row, x in zip(split.tokens, split.instances):
            word = {"task": f"task{x.task}", "distribution": f"distribution{x.distribution}", "nothing": ""}
            text = " ".join(d.vocabulary[token] for token in row if token)
            said = *x.instruction, "<sep>", x.input, "<ans>", word[asks_for], "<eos>"
            assert text == " ".join(filter(None, said))


# ---------------------------------------------------------------- facts


@pytest.fixture(scope="module")
def facts():
    return make_dataset(train.Config(**train.PRESETS["facts"]))


def test_facts_are_tasks_in_three_families_that_share_their_inputs(facts):
    families = {}
    for task in facts.tasks:
        families.setdefault(frozenset(task.map), []).append(task.name)
    sizes = sorted((len(inputs), len(names)) for inputs, names in families.items())
    assert sizes == [(36, 5), (40, 5), (48, 6)]
    several = [task for task in facts.tasks if len(set(task.map.values())) <= len(task.map) / 2]
    assert len(several) >= 6 and any(" " in output for task in facts.tasks for output in task.map.values())


def test_facts_have_four_phrasings_of_200_strings_and_one_held_out(facts):
    for task in facts.tasks:
        assert len(task.distributions) == 4
        assert min(Regex(pattern, 128).count for pattern in (*task.distributions, task.held_out)) >= 200
        for pattern in (*task.distributions, task.held_out):        # and none is cut short, or badly spaced
            regex = Regex(pattern, 128)
            assert regex.count == Regex(pattern, 200).count
            some = regex.sample(50, random.Random(0))
            assert all(re.fullmatch(r"(?! )(?!.*(  | [?.,:]))[A-Za-z0-9 ,-]+[a-z0-9][?.:]?", s) for s in some)


def test_every_fact_is_taught_and_held_out_phrasings_use_taught_words(facts):
    taught = {(x.task, x.input) for x in facts.splits["train"].instances}
    assert taught == {(t, i) for t, task in enumerate(facts.tasks) for i in task.map}
    words = {name: set(split.tokens[~split.is_output].tolist()) for name, split in facts.splits.items()}
    assert words["ood"] <= words["train"]


def test_facts_that_follow_from_one_another_agree(facts):
    task = {task.name: task.map for task in facts.tasks}
    doubled = {"begin", "forget", "sit", "win"}
    for verb in task["opposite"]:
        stem = verb[:-2] + "y" if verb.endswith("ie") else verb.removesuffix("e")
        assert task["participle"][verb] == stem + stem[-1] * (verb in doubled) + "ing"
        ies = verb.endswith("y") and verb[-2] not in "aeou"
        assert task["third person"][verb] == (verb[:-1] + "ies" if ies else verb + "s")
        assert task["first letter"][verb] == verb[0]
    assert not set(task["opposite"]) & set(task["opposite"].values())
    number = {element: int(z) for element, z in task["atomic number"].items()}
    assert sorted(number.values()) == list(range(1, 37))
    noble = [number[element] for element in ("helium", "neon", "argon", "krypton")]
    for element, z in number.items():
        assert number.get(task["next element"][element], 37) == z + 1
        assert task["period"][element] == str(1 + sum(z > last for last in noble))
        assert re.fullmatch("[A-Z][a-z]?", task["symbol"][element])
    assert len(set(task["symbol"].values())) == 36 and len(set(task["capital"].values())) == 48


def test_all_probes_and_controls_take_facts(tmp_path):
    knobs = dict(train.PRESETS["facts"], n_probed=2, n_train=6, n_val=3, steps=4, n_captures=1, n_layer=1)
    run, shuffled = tmp_path / "run", tmp_path / "shuffled"
    train.train(train.Config(**{**knobs, "out": str(run)}))
    train.train(train.Config(**{**knobs, "out": str(shuffled), "shuffle_tasks": True}))
    assert {*lines(run / "metrics.jsonl")[0]} >= {"acc_subset", "acc_pairs", "acc_val", "acc_ood"}
    rows = probe.probe(run, ["raw", "centred"])
    assert {row["position"] for row in rows} == {"instruction", "answer", "surface"}
    assert {row["measure"] for row in rows} == {*probe.MEASURES, *UNCLUSTERED} - {"rsa"}     # of one pair
    probe.print_report([row for row in rows if row["view"] == "raw"])
    assert {row["patch"] for row in probe.patch(run)} >= {"donor", "shift", "centroid", "letters"}
    assert probe.probe(shuffled)


UNCLUSTERED = "knn_share", "knn_share_other", "knn_task", "knn_output", "nc1", "merge_ratio", "rsa", "best_k"


# ---------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def gpt():
    cfg = model.ModelConfig(vocab_size=11, block_size=7, n_layer=3, n_head=2, n_embd=8)
    net = model.GPT(cfg, torch.Generator().manual_seed(0))
    for p in net.parameters():              # large random weights and biases, so that every term matters
        torch.nn.init.normal_(p, std=0.4, generator=torch.Generator().manual_seed(p.numel()))
    return net


IDX = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))


def test_model_equals_a_naive_transformer(gpt):
    w = {name: p.detach().double() for name, p in gpt.named_parameters()}

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T

    logits, states = gpt(IDX)
    for b in range(3):
        x = torch.stack([w["token.weight"][IDX[b, t]] + w["position.weight"][t] for t in range(7)])
        assert torch.allclose(x.float(), states[0][b], atol=1e-5)
        for layer in range(3):
            h = norm(x, f"blocks.{layer}.norm_attention")
            q, k, v = linear(h, f"blocks.{layer}.attention.qkv").split(8, -1)
            y = torch.zeros(7, 8, dtype=torch.double)
            for head in (slice(0, 4), slice(4, 8)):
                for t in range(7):
                    weight = torch.tensor([math.exp(q[t, head] @ k[s, head] / 2) for s in range(t + 1)])
                    y[t, head] = sum(weight[s] / weight.sum() * v[s, head] for s in range(t + 1))
            x = x + linear(y, f"blocks.{layer}.attention.out")
            h = linear(norm(x, f"blocks.{layer}.norm_mlp"), f"blocks.{layer}.mlp.up")
            h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
            x = x + linear(h, f"blocks.{layer}.mlp.out")
            assert torch.allclose(x.float(), states[layer + 1][b], atol=1e-4)
        assert torch.allclose((norm(x, "norm") @ w["token.weight"].T).float(), logits[b], atol=1e-4)


def test_model_is_causal(gpt):
    logits, states = gpt(IDX)
    for t in range(7):
        edited = IDX.clone()
        edited[:, t] = (edited[:, t] + 1) % 11
        logits2, states2 = gpt(edited)
        for a, b in zip([logits, *states], [logits2, *states2]):
            assert torch.equal(a[:, :t], b[:, :t]) and not torch.equal(a[:, t], b[:, t])


def test_last_state_through_norm_and_head_gives_the_logits(gpt):
    logits, states = gpt(IDX)
    assert len(states) == 4 and logits.shape == (3, 7, 11) and all(x.shape == (3, 7, 8) for x in states)
    normed = F.layer_norm(states[-1], (8,), gpt.norm.weight, gpt.norm.bias)
    assert torch.allclose(normed @ gpt.token.weight.T, logits, atol=1e-5)


def test_model_starts_as_gpt2_does():
    net = model.GPT(model.ModelConfig(500, 64, n_layer=8), torch.Generator().manual_seed(0))
    for name, p in net.named_parameters():
        if p.dim() == 1:
            assert (p == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("out.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name


@cuda
def test_cuda_runs_a_fused_kernel_with_the_same_result(gpt):
    expected, there = gpt(IDX)[0], copy.deepcopy(gpt).to("cuda")
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):           # raises if another one were needed
        assert torch.allclose(there(IDX.to("cuda"))[0].cpu(), expected, atol=1e-3)
    wide = model.GPT(model.ModelConfig(11, 7, n_layer=3, n_head=4, n_embd=64)).to("cuda")   # as in training
    exact = wide(IDX.to("cuda"))[0]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cuda", torch.bfloat16):
        logits = wide(IDX.to("cuda"))[0]
        logits.sum().backward()
    assert torch.allclose(logits.float(), exact, atol=0.02)


# ---------------------------------------------------------------- training


@given(st.integers(1, 5000), st.integers(1, 40))
def test_captures_go_from_start_to_end_evenly_in_the_square_root_of_the_step(total, n):
    steps = train.capture_steps(train.Config(steps=total, n_captures=n))
    assert steps == sorted(set(steps)) and steps[-1] == total and (steps[0] == 0 or n == 1)
    assert len(steps) == n or len(steps) < n and total < (n - 1) ** 2
    roots = np.sqrt(steps)
    assert n == 1 or np.abs(roots[:, None] - np.linspace(0, total ** 0.5, n)).min(1).max() < 1


@given(st.integers(1, 500), st.floats(0, 2))
def test_the_learning_rate_is_positive_reaches_its_peak_and_never_passes_it(steps, warmup):
    cfg = train.Config(steps=steps, warmup=warmup)
    rates = [train.schedule(step, cfg) for step in range(steps)]
    assert min(rates) > 0 and max(rates) == 1
    peak = rates.index(1)
    assert rates[:peak + 1] == sorted(rates[:peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_run_folder_is_laid_out_as_promised(run):
    rows, cfg = lines(run / "metrics.jsonl"), json.loads((run / "config.json").read_text())
    for name in "config.json", "tasks.json", "metrics.jsonl", "ckpt.pt", "states/labels.npz":
        assert (run / name).exists()
    assert set(rows[0]) == {"step", "loss", "acc_subset", "acc_val", "acc_ood", "seconds"}
    assert set(cfg["versions"]) == {"torch", "numpy", "device"}
    steps = train.capture_steps(train.read_config(run))
    assert [row["step"] for row in rows] == steps
    assert {f"{step:06d}" for step in steps} | {"labels"} == {p.stem for p in (run / "states").iterdir()}
    assert not list(run.rglob("*.tmp"))


def load_model(run):
    cfg = train.read_config(run)
    d = make_dataset(cfg)
    length = d.splits["val"].tokens.shape[1] - 1
    net = model.GPT(model.ModelConfig(len(d.vocabulary), length, cfg.n_layer, cfg.n_head, cfg.n_embd))
    net.load_state_dict(torch.load(run / "ckpt.pt", weights_only=True)["model"])
    return d, net


def test_captures_are_the_states_of_the_model_at_each_position(run):
    d, net = load_model(run)
    last = np.load(max((run / "states").glob("0*.npz")))
    labels = np.load(run / "states" / "labels.npz")
    for name in train.CAPTURED:
        split = d.splits[name]
        for position, mark in ("instruction", "<sep>"), ("answer", "<ans>"):
            x, i = last[f"{name}/{position}"], 0
            seen = set()
            for row, instance in zip(split.tokens, split.instances):
                if position == "instruction" and instance.instruction in seen:
                    continue
                seen.add(instance.instruction)
                column = [d.vocabulary[t] for t in row].index(mark)
                states = net(torch.from_numpy(row[None, :column + 1]))[1]   # nothing behind it is read
                expected = torch.stack([s[0, -1] for s in states]).detach().numpy()
                assert np.allclose(x[:, i], expected, rtol=2e-3, atol=2e-3)
                assert labels[f"{name}/{position}/task"][i] == instance.task
                i += 1
            assert x.shape == (3, i, 16) and x.dtype == np.float16


def test_task_accuracy_is_greedy_decoding(run, tmp_path):
    d, net = load_model(run)
    for split in d.splits["val"], d.splits["train"]:
        right = 0
        for row, x in zip(split.tokens, split.instances):
            text = row[:[d.vocabulary[t] for t in row].index("<ans>") + 1].tolist()
            while d.vocabulary[text[-1]] != "<eos>" and len(text) < len(row):
                text.append(net(torch.tensor([text]))[0][0, -1].argmax().item())
            right += [d.vocabulary[t] for t in text[-2:]] == [x.output, "<eos>"]
        assert train.observe(net, split)[0].sum() == right


def stopped_at(n, cfg, **given):
    """Train until the n-th evaluation, as if Ctrl-C had come in it."""
    evaluate, calls = train.evaluate, itertools.count(1)

    def stop(*args):
        if next(calls) == n:
            raise KeyboardInterrupt
        return evaluate(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "evaluate", stop)
        train.train(cfg, **given)


def test_muon_does_what_torchs_does_and_makes_updates_orthogonal():
    shapes, generator = [(24, 8), (8, 8), (8, 24), (24, 8), (8, 24)], torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    alike = [{"params": [p for p in ours if p.shape == shape]} for shape in dict.fromkeys(shapes)]
    muon, reference = train.Muon(alike, {"weight_decay": 0.3}), torch.optim.Muon(theirs, 0.0, weight_decay=0.3)
    for lr in 0.1, 0.2, 0.05, 0.0:
        before = [p.detach().clone() for p in ours]
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for group in [*reference.param_groups, *muon.param_groups]:
            group["lr"] = lr
        muon.step(), reference.step()
        for p, q, old in zip(ours, theirs, before):
            assert torch.allclose(p, q, atol=0.06 * lr + 1e-6)              # torch's computes in bfloat16
            update = (old * (1 - 0.3 * lr) - p.detach()) / max(1, p.shape[0] / p.shape[1]) ** 0.5
            singular = torch.linalg.svdvals(update)
            assert (singular > 0.55 * lr - 1e-6).all() and (singular < 1.3 * lr + 1e-6).all()
            q.data.copy_(p.data)


@pytest.mark.parametrize("loss_on", ["all", "answer"])
def test_training_is_what_a_plain_loop_does_one_instance_at_a_time(loss_on, tmp_path):
    cfg = train.Config(**{**TINY, "steps": 10, "n_captures": 1000}, optimizer="adamw",
                       loss_on=loss_on, out=str(tmp_path / "run"))
    out = train.train(cfg)
    d = make_dataset(cfg)
    plain = train.make_model(cfg, d)
    instances = [row[row != 0].tolist() for row in d.splits["train"].tokens]
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    per_epoch, order = len(instances) // 64, []
    for step, row in enumerate(lines(out / "metrics.jsonl")[:-1]):
        epoch, i = divmod(step, per_epoch)
        if i == 0:
            order = torch.randperm(len(instances), generator=train.make_generator(f"0/order/{epoch}")).tolist()
        losses = []
        for n in order[64 * i:64 * (i + 1)]:
            ids = torch.tensor([instances[n]])
            every = F.cross_entropy(plain(ids[:, :-1])[0][0], ids[0, 1:], reduction="none")
            answer = torch.from_numpy(d.splits["train"].is_output[n, 1:len(instances[n])])
            losses += every[answer if loss_on == "answer" else slice(None)]
        loss = torch.stack(losses).mean()
        optimizer.param_groups[0]["lr"] = cfg.lr * (10 - step) / 10         # the warm-up is one step of ten
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert row["step"] == step and row["loss"] == pytest.approx(loss.item(), abs=1e-4)
    trained = torch.load(out / "ckpt.pt", weights_only=True)["model"]
    assert all(torch.allclose(p, trained[name], atol=1e-4) for name, p in plain.named_parameters())


def test_slow_two_processes_learn_what_one_does_and_one_writes(tmp_path):
    changes = {**TINY, "optimizer": "adamw", "batch_size": 63}     # two halves of 63 differ

    def by_two(out, *flags):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run([*torchrun, "train.py", *as_flags({**changes, "out": out}), *flags], cwd=HERE,
                              text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    one = train.train(train.Config(**changes, out=str(tmp_path / "one")))
    assert by_two(tmp_path / "two").count("done; next") == 1
    stopped_at(5, train.Config(**changes, out=str(tmp_path / "both")))
    by_two(tmp_path / "both", "--resume")
    weights, rows, states = outcome(one)
    for run in tmp_path / "two", tmp_path / "both":
        weights2, rows2, states2 = outcome(run)
        assert [row["step"] for row in rows] == [row["step"] for row in rows2] and [*states] == [*states2]
        assert np.allclose([row["loss"] for row in rows], [row["loss"] for row in rows2], atol=2e-4)
        assert all(torch.allclose(weights[key], weights2[key], atol=1e-3) for key in weights)


@contextlib.contextmanager
def on_cpu():
    """As on a machine without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@cuda
def test_cuda_captures_agree_with_those_of_cpu(run):
    d, net = load_model(run)
    for name in train.CAPTURED:
        with on_cpu():
            right, states = train.observe(net.to("cpu"), d.splits[name])
        right2, states2 = train.observe(net.to("cuda"), d.splits[name])
        assert (right != right2).mean() < 0.01
        assert all(np.allclose(states[p], states2[p], rtol=2e-3, atol=2e-3) for p in states)


@cuda
@pytest.mark.parametrize("first, then", [*itertools.product([contextlib.nullcontext, on_cpu], repeat=2)])
def test_cuda_trains_captures_and_goes_on_also_where_cpu_stopped(first, then, tmp_path):
    with on_cpu():
        whole = train.train(train.Config(**TINY, out=str(tmp_path / "whole")))
    cfg = train.Config(**TINY, out=str(tmp_path / "run"))
    with first():
        stopped_at(5, cfg)
    with then():
        train.train(cfg, resume=True)
    losses, never = ([row["loss"] for row in lines(x / "metrics.jsonl")] for x in (tmp_path / "run", whole))
    assert np.allclose(losses, never, atol=5e-3)
    probe.probe(tmp_path / "run")


def outcome(run):
    """The bytes that a run's numbers are made of."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in lines(run / "metrics.jsonl")]
    states = {p.name: p.read_bytes() for p in (run / "states").iterdir()}
    return torch.load(run / "ckpt.pt", weights_only=True)["model"], rows, states


def equal(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def test_same_seed_same_bits_whatever_is_evaluated_and_captured(run, tmp_path):
    def trained(name, **changes):
        return outcome(train.train(train.Config(**{**TINY, **changes}, out=str(tmp_path / name))))

    weights, rows, states = outcome(run)
    again, other = trained("again"), trained("other", n_captures=20)
    assert equal(weights, again[0]) and rows == again[1] and states == again[2]
    assert equal(weights, other[0]) and len(other[1]) > len(rows)
    assert not equal(weights, trained("seed", seed=1)[0])


def test_resuming_keeps_the_tasks_the_run_began_with(tmp_path, dataset):
    (tmp_path / "mine.json").write_text(json.dumps(WORDS))
    cfg = train.Config(tasks=str(tmp_path / "mine.json"), steps=5, out=str(tmp_path / "run"))
    before = outcome(train.train(dataclasses.replace(cfg, out=str(tmp_path / "whole"))))
    stopped_at(1, cfg)
    (tmp_path / "mine.json").unlink()
    after = outcome(train.train(cfg, resume=True))
    assert equal(before[0], after[0]) and before[1:] == after[1:]


def test_a_resumed_run_equals_one_never_stopped(run, tmp_path):
    cfg = train.Config(**TINY, out=str(tmp_path / "stopped"))
    stopped_at(4, cfg)
    stopped = outcome(train.train(cfg, resume=True))
    weights, rows, states = outcome(run)
    assert equal(weights, stopped[0]) and rows == stopped[1] and states == stopped[2]
    assert outcome(train.train(cfg, resume=True))[1] == rows                # there is nothing left to do


def test_slow_a_run_killed_at_twenty_moments_ends_in_the_same_bits(run, tmp_path):
    cfg = train.Config(**{**TINY, "n_captures": 20}, out=str(tmp_path / "killed"))
    context = multiprocessing.get_context("forkserver")         # children that find torch imported
    context.set_forkserver_preload(["train"])

    def trained(cfg):
        process = context.Process(target=train.train, args=(cfg, (Path(cfg.out) / "config.json").exists()))
        process.start()
        return process

    whole = dataclasses.replace(cfg, out=str(tmp_path / "whole"))
    for _ in range(2):                                          # the first also starts the server
        shutil.rmtree(whole.out, ignore_errors=True)
        start, process = time.perf_counter(), trained(whole)
        process.join()
        took = time.perf_counter() - start
    rng, kills, ends = random.Random(0), 0, 0
    while kills < 20:
        process = trained(cfg)
        process.join(rng.uniform(0, took))
        if process.exitcode is None:
            process.kill()                                      # SIGKILL
            kills += 1
        elif ends < 3:
            ends += 1                                           # done before it was killed: from the start
            shutil.rmtree(cfg.out)
        process.join()
    process = trained(cfg)
    process.join()
    assert process.exitcode == 0
    killed, never = outcome(Path(cfg.out)), outcome(Path(whole.out))
    assert equal(killed[0], never[0]) and killed[1:] == never[1:] and equal(killed[0], outcome(run)[0])


def test_slow_ctrl_c_says_how_to_go_on_from_the_last_evaluation_and_exits_with_130(tmp_path):
    out = tmp_path / "my run; ls"
    command = [sys.executable, "-u", "train.py", *as_flags({**TINY, "steps": 2500, "n_captures": 40, "out": out})]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for line in iter(process.stdout.readline, ""):              # so that training is under way
        if line.startswith("step=59 "):
            break
    process.send_signal(signal.SIGINT)
    said, complaint = process.communicate(timeout=60)
    assert process.returncode == 130 and not complaint
    going_on = shlex.split(said.splitlines()[-1].split("python ")[1])
    assert going_on == ["train.py", "--resume", "--out", str(out)]
    step = torch.load(out / "ckpt.pt", weights_only=True)["rows"][-1]["step"]
    assert 59 <= step < 2500 and step == lines(out / "metrics.jsonl")[-1]["step"]
    subprocess.run([sys.executable, *going_on], cwd=HERE, check=True, capture_output=True)
    whole = train.train(dataclasses.replace(train.read_config(out), out=str(tmp_path / "whole")))
    went_on, never = outcome(out), outcome(whole)
    assert equal(went_on[0], never[0]) and went_on[1:] == never[1:]


@pytest.mark.parametrize("left_over", ["tasks.json", "states/labels.npz", "ckpt.pt.tmp"])
def test_a_folder_without_a_config_has_not_begun(run, left_over, tmp_path):
    (tmp_path / "run" / "states").mkdir(parents=True)
    (tmp_path / "run" / left_over).write_text("cut off")
    assert equal(outcome(train.train(train.Config(**TINY, out=str(tmp_path / "run"))))[0], outcome(run)[0])


def test_stray_files_among_the_captures_are_ignored(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for name in "000012 2.npz", "000012 (conflicted copy).npz", ".000012.npz.swp", "notes.npz":
        (tmp_path / "run" / "states" / name).write_text("no capture")
    assert probe.kept_steps(tmp_path / "run") == probe.kept_steps(run)


@pytest.mark.parametrize("change", ["gelu", "average", "layer"])
def test_weights_are_refused_when_model_py_has_changed(run, change, tmp_path, monkeypatch, capsys):
    if change == "gelu":
        monkeypatch.setattr(model.MLP, "forward", lambda self, x: self.out(F.relu(self.up(x))))
    elif change == "average":
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, is_causal: v.cumsum(2) / torch.arange(
            1, v.shape[2] + 1)[:, None])
    else:
        init = model.GPT.__init__
        monkeypatch.setattr(model.GPT, "__init__", lambda self, *args: (
            init(self, *args), setattr(self, "more", torch.nn.Linear(2, 2)))[0])
    for module, *argv in (probe, run, "--patch"), (train, "--out", run, "--resume"):
        assert exit_status(module, *argv) == 2
        assert re.fullmatch(r"error: [^\n]*model\.py[^\n]* has changed[^\n]*\n", capsys.readouterr().err)


def test_a_run_starts_from_a_model_without_learned_positions(tmp_path, monkeypatch):
    class NoPositions(model.GPT):
        def __init__(self, *args):
            super().__init__(*args)
            del self.position

        def forward(self, idx):
            states = [self.token(idx)]
            for block in self.blocks:
                states.append(block(states[-1]))
            return self.head(states[-1]), states

    monkeypatch.setattr(train, "GPT", NoPositions)
    first = train.train(train.Config(**TINY, out=str(tmp_path / "first")))
    then = train.train(train.Config(**{**TINY, "steps": 1}, start=str(first), out=str(tmp_path / "then")))
    assert lines(then / "metrics.jsonl")[0]["acc_val"] == lines(first / "metrics.jsonl")[-1]["acc_val"]


@pytest.mark.parametrize("closing", [">&-", "2>&-", "> /dev/null 2>&1 < /dev/null"])
def test_slow_streams_may_be_closed(closing, tmp_path):
    command = f"{sys.executable} train.py {' '.join(as_flags({**TINY, 'steps': 2, 'out': tmp_path / 'run'}))}"
    assert subprocess.run(f"{command} {closing}", shell=True, cwd=HERE).returncode == 0
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 2
    probing = subprocess.run(f"{sys.executable} probe.py {tmp_path / 'run'} {closing}", shell=True, cwd=HERE)
    assert probing.returncode == 0


def test_a_loss_of_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    wild = {**TINY, "optimizer": "adamw", "lr": 9e5, "weight_decay": 9e5, "warmup": 0}
    assert exit_status(train, "--out", tmp_path / "run", *as_flags(wild)) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]*nan or infinite: [^\n]*lower --lr[^\n]*\n", said)
    saved = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert all(p.isfinite().all() for p in saved["model"].values())


def test_a_run_that_starts_from_another_begins_where_that_ended(run, tmp_path):
    cfg = train.Config(**{**TINY, "steps": 1}, start=str(run), out=str(tmp_path / "next"))
    out = train.train(cfg)
    first, last = np.load(out / "states" / "000000.npz"), np.load(max((run / "states").glob("0*.npz")))
    assert all(np.array_equal(first[name], last[name]) for name in last.files)
    assert lines(out / "metrics.jsonl")[-1]["step"] == 1


def test_weights_of_tokens_and_places_go_by_name_and_others_are_fresh(run, tmp_path):
    old, old_data = load_model(run)[1].state_dict(), train.read_data(run)
    cfg = train.Config(**TINY, asks_for="nothing", start=str(run), out=str(tmp_path / "next"))
    d = make_dataset(cfg)
    d = d._replace(vocabulary=[*d.vocabulary, "new"])           # fewer places, other numbers, a token more
    fresh, new = train.make_model(cfg, d).state_dict(), train.make_model(cfg, d)
    train.init_from(run, new, d)
    seen = {token: old_data.vocabulary.index(token) for token in d.vocabulary if token != "new"}
    assert list(seen.values()) != list(range(len(seen)))
    for key, weight in new.state_dict().items():
        if key == "token.weight":
            expected = [old[key][seen[x]] if x in seen else fresh[key][i] for i, x in enumerate(d.vocabulary)]
            assert torch.equal(weight, torch.stack(expected))
        else:
            assert torch.equal(weight, old[key][:len(weight)])
    with pytest.raises(ValueError, match="has other blocks"):
        train.train(dataclasses.replace(cfg, n_layer=3, n_embd=32))
    assert not Path(cfg.out).exists()


def test_a_run_on_data_that_it_was_given_goes_on_with_that_only(run, tmp_path):
    d = train.read_data(run)
    few = d._replace(splits={**d.splits, "train": d.splits["val"]})
    cfg = train.Config(**{**TINY, "steps": 9}, out=str(tmp_path / "few"))
    out, other = train.train(cfg, data=few), dataclasses.replace(cfg, out=str(tmp_path / "other"))
    stopped_at(3, other, data=few)
    assert equal(outcome(train.train(other, resume=True, data=few))[0], outcome(out)[0])
    assert equal(train.load_model(out, few).state_dict(), outcome(out)[0])
    unlike = d._replace(splits={**d.splits, "val": d.splits["ood"]})
    with pytest.raises(ValueError, match="is not what it was"):
        train.train(cfg, resume=True, data=unlike)


class Bomb:
    """A pickle that writes a file when it is opened."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name, old, new", [
    ("tasks.json", "[", "("), ("tasks.json", '"held_out": "', '"held_out": "a'),
    ("config.json", '"seed": 0', '"seed": 1'),
    ("config.json", '"n_val": 6', '"n_val": 7'), ("config.json", '"n_val": 6', '"n_val": "6"'),
    ("config.json", '"steps": 24', '"steps": 24.5'),
    ("config.json", '"n_embd": 16', '"n_embd": 32'), ("config.json", '"n_layer": 2', '"n_layer": "x"')])
def test_an_altered_file_is_noticed(run, name, old, new, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert exit_status(train, "--out", tmp_path / "run", "--resume") == 2
    assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)


def test_probing_works_on_what_is_there_yet(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    steps = probe.kept_steps(run)
    (tmp_path / "run" / "states" / f"{steps[-1]:06d}.npz").unlink()
    (tmp_path / "run" / "ckpt.pt").unlink()
    rows = probe.probe(tmp_path / "run")
    assert {row["step"] for row in rows} == set(steps[:-1])
    probe.print_report(rows)


def test_opening_a_strangers_run_runs_no_code(run, tmp_path, capsys):
    copy, mark = tmp_path / "run", tmp_path / "run-was-code"
    shutil.copytree(run, copy)
    torch.save({"step": 1, "model": Bomb(mark)}, copy / "ckpt.pt")
    np.savez(max((copy / "states").glob("0*.npz")), **{"val/answer": np.array([Bomb(mark)], dtype=object)})
    for argv in ("probe", copy), ("probe", copy, "--patch"), ("train", "--out", copy, "--resume"):
        assert exit_status({"probe": probe, "train": train}[argv[0]], *argv[1:]) == 2
        assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)
    assert not mark.exists()


@pytest.mark.parametrize("optimizer, loss_on", [("muon", "answer"), ("adamw", "all")])
def test_it_learns(tmp_path, optimizer, loss_on):
    out = train.train(train.Config(**{**TINY, "steps": 400, "n_embd": 32, "lr": 6e-3}, optimizer=optimizer,
                                   loss_on=loss_on, out=str(tmp_path / "run")))
    rows = lines(out / "metrics.jsonl")
    assert rows[0]["acc_subset"] < 0.2 and rows[-1]["acc_subset"] > 0.9 and rows[-1]["acc_val"] > 0.6


def test_loss_counts_what_it_says(run):
    d = make_dataset(train.read_config(run))
    uniform = math.log(len(d.vocabulary))       # an untrained network knows nothing about any token
    rows = lines(run / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(uniform, rel=0.02)


# ---------------------------------------------------------------- the probe: clusters and neighbours


def around(labels, noise=0.1, seed=0):
    """States (N, 8) about a random place for each label."""
    rng = np.random.default_rng(seed)
    places = rng.normal(size=(labels.max() + 1, 8))
    x = places[labels]
    return x + noise * rng.normal(size=x.shape)


BLOBS = np.stack([
    around(np.arange(120) % 6, 0.5, seed)
    for seed in range(3)])

TASK = np.arange(240) // 30                                 # 8 tasks
REGEX = np.arange(240) // 10                                # of 3 regexes each
INPUT = (TASK + np.arange(240) % 5) % 10                    # and of 5 inputs, shared with other tasks


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_finds_the_best_grouping_of_a_few_points(seed):
    x = np.random.default_rng(seed).normal(size=(8, 2))
    best = math.inf
    for labels in itertools.product(range(3), repeat=8):
        groups = [
            x[np.equal(labels, j)]
            for j in {*labels}]
        inertia = sum(
            ((group - group.mean(0)) ** 2).sum()
            for group in groups)
        best = min(best, inertia)
    _, _, found = probe.kmeans(x, 3, n_init=30)
    assert found.item() == pytest.approx(best, rel=1e-4)


def test_kmeans_ends_where_lloyd_cannot_improve():
    found = probe.kmeans(BLOBS, 6)
    for x, labels, centroids, inertia in zip(BLOBS, *map(np.asarray, found)):
        means = [
            x[labels == j].mean(0)
            for j in range(6)]
        squared = ((x[:, None] - means) ** 2).sum(-1)
        assert np.allclose(centroids, means, atol=1e-4)
        assert np.array_equal(labels, squared.argmin(1))
        assert inertia == pytest.approx(squared.min(1).sum(), rel=1e-4)


def test_kmeans_on_a_batch_gives_what_each_member_gives_alone():
    together = probe.kmeans(BLOBS[:, None], 6)
    for i, x in enumerate(BLOBS):
        alone = probe.kmeans(x, 6)
        for a, b in zip(together, alone):
            assert torch.equal(a[i, 0], b)


@pytest.mark.parametrize("scale, origin", [
    (1, 1e8),
    (1e18, 0),
    (1e-18, 0)])
def test_kmeans_finds_the_same_clusters_at_any_origin_and_scale(scale, origin):
    labels, _, inertia = probe.kmeans(BLOBS, 6)
    same, _, scaled = probe.kmeans(scale * BLOBS + origin, 6)
    assert torch.equal(labels, same)
    assert torch.allclose(scaled / scale ** 2, inertia, rtol=1e-4)


@given(st.lists(st.integers(0, 5), min_size=6), st.integers(1, 6))
def test_kmeans_fills_as_many_clusters_as_there_are_distinct_points(points, k):
    x = np.array(points)[:, None]
    labels, centroids, inertia = probe.kmeans(x, k)
    filled = min(k, len({*points}))
    assert len(labels.unique()) == filled
    assert centroids.isnan().sum() == k - filled
    assert filled == k or inertia < 1e-9


def clusters_and_neighbours(x):
    return *probe.kmeans(x, 6), probe.knn(x[0], x[1], 7)


def test_kmeans_and_knn_in_small_pieces_give_the_same(monkeypatch):
    whole = clusters_and_neighbours(BLOBS)
    monkeypatch.setattr(probe, "AT_ONCE", 500)              # some ten points at a time
    pieces = clusters_and_neighbours(BLOBS)
    assert all(map(torch.allclose, whole, pieces))


@cuda
def test_cuda_finds_the_clusters_and_neighbours_that_cpu_finds():
    x = torch.from_numpy(9 * BLOBS).round()                 # so that all distances are exact
    there = clusters_and_neighbours(x.cuda())
    here = clusters_and_neighbours(x)
    for a, b in zip(there, here):
        assert torch.allclose(a.cpu(), b, rtol=1e-4)


@pytest.mark.parametrize("call", [
    "kmeans(x, 512, n_init=4, max_iter=2)",
    "knn(x, x[:2000], 10)"])
def test_memory_stays_far_below_a_table_of_all_distances(call):
    code = f"""
import resource, torch, probe
x = torch.randn(50000, 16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
probe.{call}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    env = {**os.environ, "MALLOC_ARENA_MAX": "1"}           # what malloc keeps for itself is not ours
    kib = subprocess.check_output([sys.executable, "-c", code], cwd=HERE, env=env)
    assert int(kib) < 200 * 1024                            # 50,000 x 2,000 distances are 381 MiB


@pytest.mark.parametrize("given", [
    dict(k=5),
    dict(k=0),
    dict(x=[[0], [math.nan]]),
    dict(x=[[0], [math.inf]])])
def test_kmeans_refuses_what_has_no_answer(given):
    with pytest.raises(ValueError):
        probe.kmeans(**{"x": np.zeros((4, 2)), "k": 2, **given})


@given(st.integers(2, 25), st.integers(1, 6), st.integers(0, 10 ** 6))
def test_silhouette_equals_its_definition_point_by_point(n, k, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 4, (n, 2)).astype(float)               # whole numbers: points coincide
    labels = rng.integers(0, k, n) * 3                          # some numbers are nobody's
    scores = []
    for i in range(n):
        distance = {c: [math.dist(x[i], x[j]) for j in range(n) if labels[j] == c and j != i] for c in labels}
        own = distance.pop(labels[i])
        others = [np.mean(some) for some in distance.values()]
        a, b = np.mean(own) if own else 0, min(others, default=0)
        scores.append((b - a) / max(a, b) if own and others and max(a, b) > 0 else 0)
    found = probe.silhouette(torch.from_numpy(x), torch.from_numpy(labels))
    assert found == pytest.approx(np.mean(scores), abs=1e-6)


@pytest.mark.parametrize("k", [1, 4, 7, 21])
def test_the_silhouette_finds_how_many_clusters_were_planted(k):
    labels = np.arange(240) % k
    x = torch.from_numpy(around(labels, 0.05 if k > 1 else 0, seed=k))
    assert probe.choose_k(x) == k
    rows = probe.score_states(x[None, None], {"task": labels}, [5])
    assert [row["value"] for row in rows if row["measure"] == "best_k"] == [k]
    assert not any(row["measure"] == "best_k" for row in
                   probe.score_states(x[None, None], {"task": labels, "input": labels}, [5]))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10 ** 6))
def test_knn_equals_a_literal_loop_with_ties_by_index(a, b, seed):
    k, n = sorted([a, b])
    rng = np.random.default_rng(seed)
    train = rng.integers(-3, 4, (n, 2))                     # whole numbers: many exact ties
    query = rng.integers(-3, 4, (5, 2))
    for point, found in zip(query, probe.knn(train, query, k)):
        squared = ((train - point) ** 2).sum(1)
        nearest = sorted(range(n), key=squared.item)        # equal ones stay in their order
        assert found.tolist() == nearest[:k]


def test_knn_is_exact_beside_a_far_point():
    train = np.array([0, 1, 2, 3, 1e6])[:, None]
    assert probe.knn(train, [[2.2]], 3).tolist() == [[2, 3, 1]]


@pytest.mark.parametrize("k, point", [
    (0, 0),
    (4, 0),
    (2, math.inf)])
def test_knn_refuses_what_has_no_answer(k, point):
    with pytest.raises(ValueError):
        probe.knn(np.zeros((3, 1)), [[point]], k)


# ---------------------------------------------------------------- the probe: scores

points = st.tuples(st.integers(0, 4), st.integers(0, 4))    # class, cluster
clusterings = st.lists(points, min_size=2, max_size=14)


@given(clusterings)
def test_f1_and_ari_equal_counting_pairs(points):
    kinds = Counter(
        (i == k, j == m)
        for (i, j), (k, m) in itertools.combinations(points, 2))
    tp, fn = kinds[True, True], kinds[True, False]
    fp, tn = kinds[False, True], kinds[False, False]
    f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1
    below = (tp + fn) * (fn + tn) + (tp + fp) * (fp + tn)   # Hubert & Arabie in terms of pairs
    ari = 2 * (tp * tn - fn * fp) / below if below else 1
    assert probe.f1(*zip(*points)) == pytest.approx(f1)
    assert probe.ari(*zip(*points)) == pytest.approx(ari)


@given(clusterings)
def test_class_f1_equals_a_loop_over_classes_and_clusters(points):
    of_class, of_cluster = map(Counter, zip(*points))
    best = dict.fromkeys(of_class, 0)
    for i, j in itertools.product(of_class, of_cluster):
        score = 2 * points.count((i, j)) / (of_class[i] + of_cluster[j])
        best[i] = max(best[i], score)
    mean = sum(best.values()) / len(best)
    assert probe.class_f1(*zip(*points)) == pytest.approx(mean)


def information(points):
    """Mutual information, and the mean of both entropies."""
    n, shared, entropy = len(points), 0, 0
    of_class, of_cluster = map(Counter, zip(*points))
    for i, j in points:
        a, b = of_class[i] / n, of_cluster[j] / n
        shared += math.log(points.count((i, j)) / n / a / b) / n
        entropy -= math.log(a * b) / 2 / n
    return shared, entropy


@given(clusterings)
def test_nmi_and_purity_equal_a_loop_over_points(points):
    shared, entropy = information(points)
    nmi = shared / entropy if entropy else 1
    assert probe.nmi(*zip(*points)) == pytest.approx(nmi, abs=1e-9)
    majority = {}
    for i, j in points:
        majority[j] = max(majority.get(j, 0), points.count((i, j)))
    purity = sum(majority.values()) / len(points)
    assert probe.purity(*zip(*points)) == pytest.approx(purity)


@given(clusterings)
@settings(max_examples=40)
def test_ami_takes_off_the_mean_over_all_permutations(points):
    classes, clusters = zip(*points[:6])
    shared, entropy = information(points[:6])
    chance = np.mean([
        information([*zip(classes, order)])[0]
        for order in itertools.permutations(clusters)])
    most = entropy - chance
    ami = (shared - chance) / most if most > 1e-9 else 1
    assert probe.ami(classes, clusters) == pytest.approx(ami, abs=1e-6)


def test_ami_of_a_table_worked_by_hand():
    # 2 + 2 points against 2 + 2: of the three ways, one is the same partition, log 2, and two share nothing
    assert probe.ami([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx((0 - 1 / 3) / (1 - 1 / 3))


@pytest.mark.parametrize("name, value", [
    ("f1", 2 * 20 / (40 + 44)),     # 40 pairs are within a cluster, 44 within a class, 20 within both
    ("ari", (20 - 40 * 44 / 136) / (42 - 40 * 44 / 136)),
    ("class_f1", (10 / 14 + 8 / 11 + 6 / 9) / 3),
    ("purity", 12 / 17),            # 0.71 in the book
    ("nmi", 0.3646)])               # 0.36 in the book
def test_scores_of_the_textbook_table(name, value):
    classes = [*map(int, "00000000" "11111" "2222")]        # Manning, Raghavan & Schuetze, figure 16.4
    clusters = [*map(int, "00000122" "01111" "1222")]
    assert probe.MEASURES[name](classes, clusters) == pytest.approx(value, abs=1e-4)


every_measure = pytest.mark.parametrize("measure", probe.MEASURES.values(), ids=probe.MEASURES)


@every_measure
def test_measures_are_1_for_the_same_partition_and_at_chance_for_another(measure):
    classes = np.arange(1_000_000) % 10
    others = np.random.default_rng(0).permutation(classes)
    chance = 0 if measure in (probe.ari, probe.ami, probe.nmi) else 0.1
    assert isinstance(measure(classes, classes), float)
    assert measure(classes, (classes + 3) % 10) == pytest.approx(1)
    assert measure([0] * 5, [0] * 5) == pytest.approx(1)
    assert measure(classes, others) == pytest.approx(chance, abs=2e-3)


@every_measure
def test_measures_take_batches_of_any_whole_numbers(measure):
    classes, batch = np.random.default_rng(0).integers(0, 2, (2, 3, 50))
    scores = measure(classes, batch)
    assert np.allclose(scores, [*map(measure, classes, batch)])
    assert np.allclose(scores, measure(100_000 * classes, batch))
    assert np.allclose(scores, measure(classes, -batch))


@every_measure
@pytest.mark.parametrize("clusters", [[0, 1, 1], [0, 0.5], ["a", "b"]], ids=str)
def test_measures_refuse_labels_that_are_no_whole_number_for_each_point(measure, clusters):
    with pytest.raises(ValueError):
        measure([0, 1], clusters)


@given(st.integers(0, 1000), st.integers(2, 5))
@settings(max_examples=20)
def test_nc1_equals_its_definition(seed, k):
    classes = np.arange(25) % k
    x = around(classes, 1, seed)
    centres = np.array([
        x[classes == j].mean(0)
        for j in range(k)])
    within = np.cov((x - centres[classes]).T, bias=True)
    between = np.cov(centres.T, bias=True)
    nc1 = np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / k
    assert probe.nc1(x, classes) == pytest.approx(nc1, rel=1e-6)
    assert probe.nc1(centres[classes], classes) == pytest.approx(0, abs=1e-9)
    assert np.isnan(probe.nc1(x, 0 * classes))


@pytest.mark.parametrize("view, label", [("centred", "input"), ("unphrased", "phrasing")])
def test_a_view_shows_tasks_where_another_identity_hid_them(view, label, tmp_path):
    groups = np.arange(240) % 10                                # crossed with tasks, and 20 times as far apart
    write_folder(tmp_path, (20 * around(groups, 0) + around(TASK))[None])
    labels = {"val/last/task": TASK, f"val/last/{label}": groups}
    np.savez(tmp_path / "states/labels.npz", **labels)
    rows = probe.probe(tmp_path, ["raw", view])
    f1 = {row["view"]: row["value"] for row in rows if (row["identity"], row["measure"]) == ("task", "f1")}
    assert f1["raw"] < 0.4 and f1[view] == 1


def test_labels_that_the_input_fixes_are_dealt_to_whole_inputs():
    inputs = np.arange(240) % 24
    family = inputs % 3
    beyond = []
    for seed in range(20):
        only_inputs = around(inputs, 0.1, seed)                 # tight clusters, but no families
        states = torch.from_numpy(only_inputs)[None, None]
        rows = probe.score_states(states, {"input": inputs, "family": family}, [0])
        beyond += [probe.is_beyond(row) for row in rows if (row["identity"], row["measure"]) == ("family", "f1")]
    assert sum(beyond) <= 4                                     # 1 in 21 by chance
    rows = probe.score_states(torch.from_numpy(around(family))[None, None], {"input": inputs, "family": family}, [0])
    assert all(probe.is_beyond(row) for row in rows if row["identity"] == "family")
    # each task has its own inputs, and two regexes, each with all of them
    task = inputs % 8
    labels = {"input": inputs, "task": task, "distribution": 2 * task + np.arange(240) // 24 % 2}
    beyond = []
    for seed in range(20):
        for classes in inputs, task, labels["distribution"]:
            rows = probe.score_states(torch.from_numpy(around(classes, 0.1, seed))[None, None], labels, [0])
            beyond += [probe.is_beyond(row) for row in rows if (row["identity"], row["measure"]) == ("task", "f1")]
    assert sum(beyond[::3]) <= 4 and all(beyond[1::3]) and sum(beyond[2::3]) <= 4


@pytest.mark.parametrize("texts", [
    ["abab", "bba", "c"],
    ["the cat", "Cat the cat?", "a dog"]])
def test_surface_counts_tokens_and_pairs_of_tokens(texts):
    counts = probe.surface({"val": texts[:2], "ood": texts[2:]})
    x = torch.cat([*counts.values()])
    token = r"\w+|\?" if " " in texts[0] else "."
    bags = []
    for text in texts:
        tokens = re.findall(token, text.lower())
        bags.append(Counter([*tokens, *zip(tokens, tokens[1:])]))
    for i, j in np.ndindex(3, 3):
        product = sum(m * bags[j][gram] for gram, m in bags[i].items())
        assert x[i] @ x[j] == product + 1                   # a column of ones, the others in any order


def test_shuffled_tasks_are_random_and_still_obey_their_maps():
    plain, shuffled = (
        make_dataset(DataConfig(shuffle_tasks=shuffle)).splits
        for shuffle in (False, True))
    maps = {(x.task, x.input): x.output for x in plain["train"].instances}
    told, regexes = {}, {}
    for name, split in shuffled.items():
        strings = {x.instruction for x in plain[name].instances}
        assert strings == {x.instruction for x in split.instances}
        for x in split.instances:
            assert told.setdefault(x.instruction, x.task) == x.task
            assert maps[x.task, x.input] == x.output
            regexes.setdefault(x.distribution, {})[x.instruction] = x.task
    same = [
        s == t
        for tasks in regexes.values()
        for s, t in itertools.combinations(tasks.values(), 2)]
    chance = 1 / 16                                         # that two strings of a regex have one task
    assert abs(np.mean(same) - chance) < 4 * math.sqrt(chance / len(same))


# ---------------------------------------------------------------- the probe: nulls

def of_task(states, seed=0, **labels):
    """measure -> its row, of the identity task."""
    labels = {"task": TASK, "distribution": REGEX, **labels}
    rows = probe.score_states(states[None, None], labels, [0], seed)
    return {row["measure"]: row for row in rows if row["identity"] == "task"}


def passed(*given, **labels):
    """Which nulls the pairwise F1 of tasks passes."""
    row = of_task(*given, **labels)["f1"]
    return {null for null in ("null", "regrouped") if row["value"] > row[f"{null}_95"]}


def test_a_null_deals_labels_to_whole_units_within_groups_and_every_deal_occurs():
    units = np.array([*"abacddeb"])
    labels = np.array([*"12134452"])
    groups = np.isin(units, ["d", "e"])
    deals = Counter()
    for seed in range(30):
        for draw in probe.deal(labels, units, groups, seed):
            dealt = dict(zip(units, draw))
            assert [dealt[unit] for unit in units] == draw.tolist()
            deals["".join(dealt[unit] for unit in "abcde")] += 1
    within = itertools.permutations("123"), itertools.permutations("45")
    assert {*deals} == {"".join(x + y) for x, y in itertools.product(*within)}
    assert min(deals.values()) > 20                         # of 600 / 12


@pytest.mark.parametrize("measure, extreme", [
    ("f1", max),
    ("nc1", min)])
def test_beside_a_score_stand_the_mean_and_the_extreme_of_its_draws(measure, extreme):
    draws = np.random.default_rng(0).normal(size=(20, 2, 3))
    draws[:, 1, 2] = math.nan
    rows = probe.make_rows([0, 7], "task", measure, np.exp, draws[0], null=draws)
    assert [(row["step"], row["layer"]) for row in rows] == [*itertools.product((0, 7), range(3))]
    for s, layer in np.ndindex(2, 3):
        row, some = rows[3 * s + layer], np.exp(draws[:, s, layer])
        expected = some[0], np.mean(some), extreme(some)
        if math.isnan(some[0]):
            expected = None, None, None
        assert (row["value"], row["null_mean"], row["null_95"]) == pytest.approx(expected)


@pytest.mark.parametrize("clumps, nulls", [
    (TASK, {"null", "regrouped"}),
    (np.random.default_rng(0).permutation(24)[REGEX] // 3, {"null"}),       # three regexes of any task
    (np.arange(240) % 8, set())])
def test_regexes_that_clump_pass_one_null_and_only_merged_tasks_pass_both(clumps, nulls):
    assert passed(around(clumps)) == nulls


def test_states_that_group_by_input_or_regex_alone_are_within_the_nulls_of_task():
    beyond = Counter()
    for seed in range(12):
        by_input = around(INPUT, seed=seed)
        by_regex = around(np.random.default_rng(seed).permutation(24)[REGEX], seed=seed)
        beyond.update(passed(by_input, seed, input=INPUT))
        beyond["by regex"] += "regrouped" in passed(by_regex, seed, input=INPUT)
        assert passed(by_input, seed)                       # where labels go to states of other inputs
        assert passed(by_input + around(TASK), seed, input=INPUT) == {"null", "regrouped"}
    assert max(beyond.values(), default=0) <= 3             # by chance one in 21


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_network_is_beyond_its_nulls_unless_its_tasks_were_shuffled(shuffled, tmp_path):
    knobs = {**TINY, "n_tasks": 8, "n_distributions": 3, "n_inputs": 10, "n_outputs": 12, "n_embd": 32}
    knobs |= {"steps": 300, "n_captures": 2, "shuffle_tasks": shuffled}
    cfg = train.Config(**knobs, out=str(tmp_path))
    about = dict(identity="task", measure="f1", split="val")
    beyond = {"instruction": [], "answer": [], "surface": []}
    for row in probe.probe(train.train(cfg)):
        if about.items() <= row.items():
            beyond[row["position"]].append(probe.is_beyond(row))
    if shuffled:
        assert sum(beyond["instruction"]) <= 1 and sum(beyond["answer"]) <= 1       # by chance one in 21
    else:
        assert beyond["instruction"][-1] and beyond["answer"][-1]                   # last step, last layer


def test_merge_ratio_equals_a_loop_over_pairs_of_regexes_with_one_input():
    x, centres = around(REGEX, 1), {}
    for t, r, i in {*zip(TASK, REGEX, INPUT)}:
        centres[t, r, i] = x[(REGEX == r) & (INPUT == i)].mean(0)
    distances = {True: [], False: []}
    for a, b in itertools.combinations(centres, 2):
        if a[2] == b[2]:
            distances[a[0] == b[0]].append(math.dist(centres[a], centres[b]))
    row = of_task(x, input=INPUT)["merge_ratio"]
    ratio = np.mean(distances[True]) / np.mean(distances[False])
    assert row["value"] == pytest.approx(ratio, rel=1e-4)


def test_labels_may_be_text_or_numbers_and_all_but_one_are_optional():
    numbers = {"task": TASK, "distribution": REGEX, "output": INPUT}
    text = {name: np.char.mod("%02d", of) for name, of in numbers.items()}
    states = around(REGEX, 0.5)[None, None]
    rows, same = (probe.score_states(states, labels, [7]) for labels in (numbers, text))
    assert rows == same
    fewer = probe.score_states(states, {"task": TASK}, [7])
    assert {row["measure"] for row in fewer} == {*probe.MEASURES, "nc1", "best_k"}
    for row in fewer:
        assert any(row.items() <= fuller.items() for fuller in rows)


# ---------------------------------------------------------------- the probe: runs and folders


def last_states(run, name):
    """The last states (L + 1, N, C) of split/position, and their identities."""
    states = np.load(run / "states/000024.npz")[name].astype(float)
    labels = np.load(run / "states/labels.npz")
    return states, {
        key.rpartition("/")[2]: labels[key]
        for key in labels if key.startswith(name)}


def last_rows(rows, **where):
    """The rows of the last capture that are about this."""
    where["step"] = 24
    return [row for row in rows if where.items() <= row.items()]


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("split", ["val", "ood"])
@pytest.mark.parametrize("position", ["instruction", "answer"])
def test_scores_of_neighbours_equal_a_literal_loop(run, raw_rows, position, split, layer):
    known, _ = last_states(run, f"subset/{position}")
    states, _ = last_states(run, f"{split}/{position}")
    labels = probe.read_labels(run)
    own, theirs = labels[f"{split}/{position}"], labels[f"subset/{position}"]
    scores = {}
    for i, point in enumerate(states[layer]):
        squared = ((known[layer] - point) ** 2).sum(1)
        order = squared.argsort(kind="stable")
        foreign = theirs["distribution"][order] != own["distribution"][i]
        for identity in {"task", "output"} & {*own}:
            alike = theirs[identity][order] == own[identity][i]
            votes = sorted(theirs[identity][order[:10]])
            majority = max(votes, key=votes.count)          # of a tie the lowest
            for measure, score in {
                    "knn_share": alike[:10].mean(),
                    "knn_share_other": alike[foreign][:10].mean(),
                    f"knn_{identity}": majority == own[identity][i]}.items():
                scores.setdefault((identity, measure), []).append(score)
    for (identity, measure), some in scores.items():
        about = dict(position=position, split=split, layer=layer, identity=identity, measure=measure)
        [row] = last_rows(raw_rows, **about)
        assert row["value"] == pytest.approx(np.mean(some))


def test_rsa_of_a_run_equals_loops_over_pairs_of_states_and_tasks(run, raw_rows):
    states, ids = last_states(run, "val/instruction")
    instances = train.read_data(run).splits["val"].instances
    x = states[2] - states[2].mean(0)
    alike, shared = [], {"input": [], "output": []}
    for tasks in itertools.combinations(range(4), 2):
        a, b = (x[ids["task"] == t] for t in tasks)
        alike.append(np.mean([
            y @ z / math.hypot(*y) / math.hypot(*z)
            for y, z in itertools.product(a, b)]))
        for name, counts in shared.items():
            mine, theirs = (
                {getattr(x, name) for x in instances if x.task == t}
                for t in tasks)
            counts.append(len(mine & theirs))
    found = probe.cosines(torch.from_numpy(states[2]), ids["task"])
    assert found[np.triu_indices(4, 1)] == pytest.approx(alike, abs=1e-5)
    for name, counts in shared.items():
        about = dict(position="instruction", split="val", layer=2, measure="rsa", identity=name)
        [row] = last_rows(raw_rows, **about)
        r = np.corrcoef(alike, counts)[0, 1]
        assert row["value"] == pytest.approx(r, abs=1e-4)


def test_the_heat_table_shows_the_scores_that_are_beyond_their_null(raw_rows, capsys):
    probe.print_report(raw_rows)
    said = capsys.readouterr().out
    assert f"at steps {', '.join(map(str, sorted({row['step'] for row in raw_rows})))}." in said
    for position, layer in itertools.product(("instruction", "answer"), range(3)):
        about = dict(position=position, layer=layer, identity="task", measure="f1", split="val")
        shown = ""
        for row in raw_rows:
            if about.items() <= row.items():
                beyond = row["value"] > row["regrouped_95"]
                shown += 2 * "·░▒▓█"[1 + int(4 * min(0.99, row["value"])) if beyond else 0]
        assert f"\n{position:12}layer {layer:2}  {shown}\n" in said


def test_the_report_marks_exactly_the_scores_within_their_own_null(raw_rows, capsys):
    probe.print_report(raw_rows)
    said = capsys.readouterr().out
    expected = {}
    for row in raw_rows:
        step = 0 if row["position"] == "surface" else 24
        if (row["split"], row["step"]) != ("val", step):
            continue
        text, score = "-", row["value"]
        if score is not None:
            null = row.get("regrouped_95", row.get("null_95"))
            less = row["measure"] in ("nc1", "merge_ratio")
            beyond = (score < null if less else score > null) if null is not None else "null_95" not in row
            text = f"{'' if beyond else '·'}{score:.2f}"
        key = row["position"], row["identity"], row["measure"]
        expected.setdefault(key, []).append(text)
    for key, some in expected.items():
        [scores] = re.findall(rf"^{' '.join(key)} +(\S.*)", said, re.M)
        assert re.findall(r"·?-?\d+\.\d\d|-", scores) == some


def test_probe_rows_are_complete_and_layer_0_is_within_its_null(run):
    views = "raw", "centred"                                # no run has phrasings
    rows = probe.probe(run, views)
    assert rows == lines(run / "probe.jsonl")
    found, captures = {}, 3 * len(probe.kept_steps(run))
    for row in rows:
        about = row["view"], row["position"], row["split"]
        score = f"{row['identity']} {row['measure']}"
        found.setdefault(about, Counter())[score] += 1
        if row["value"] is None:            # what a split does not have: two regexes a task, distinct points
            assert row["measure"] == "merge_ratio" and row["split"] == "ood" or row["layer"] == 0
        elif row["layer"] == 0 and row["position"] != "surface" and row["measure"] != "best_k":
            assert not probe.is_beyond(row)                 # before any attention all states are one
    positions = "instruction", "answer", "surface"
    for about in itertools.product(views, positions, train.CAPTURED):
        view, position, split = about
        identities = ["task", "distribution"]               # input_set says here what task does
        scores = {"task nc1", "task merge_ratio", "input rsa", "output rsa", "surface rsa"}
        if split != "subset":
            scores |= {"task knn_task", "task knn_share", "task knn_share_other"}
            if position == "answer":
                scores |= {"output knn_output", "output knn_share", "output knn_share_other"}
        if position == "answer":
            identities += ["input", "output"]
        elif view == "centred":
            assert about not in found
            continue
        scores.update(map(" ".join, itertools.product(identities, probe.MEASURES)))
        expected = Counter(dict.fromkeys(scores, 1 if position == "surface" else captures))
        if position != "answer":
            expected["any best_k"] = 1 if position == "surface" else 3          # of the last step
        assert found[about] == expected


ZEROS = np.zeros((3, 240, 8), np.float32)


def write_folder(folder, states=ZEROS, task=TASK):
    """A folder that has nothing but states of val, at position last."""
    (folder / "states").mkdir()
    np.savez(folder / "states/000000.npz", **{"val/last": states})
    np.savez(folder / "states/labels.npz", **{"val/last/task": task})


def test_any_folder_of_states_is_probed(tmp_path, monkeypatch, capsys):
    x = np.random.default_rng(0).normal(size=ZEROS.shape)
    x[1] = around(TASK)
    write_folder(tmp_path, x, np.array([f"task {t}" for t in TASK]))
    monkeypatch.setattr(sys, "argv", ["probe.py", str(tmp_path)])
    probe.main()
    f1 = [row for row in lines(tmp_path / "probe.jsonl") if row["measure"] == "f1"]
    assert [row["value"] > row["null_95"] for row in f1] == [False, True, False]
    assert f1[1]["value"] == 1
    assert re.search(r"\nlast task f1 +·0\.\d\d +1\.00 +·0\.\d\d\n", capsys.readouterr().out)


def test_the_states_of_a_run_alone_give_the_rows_of_the_run(run, raw_rows, tmp_path):
    shutil.copytree(run / "states", tmp_path / "states")
    assert probe.probe(tmp_path) == raw_rows
    probe.print_report(raw_rows)


@pytest.mark.parametrize("file, name, array", [
    ("000000", "val/last", ZEROS[:, 1:]),
    ("000000", "val/first", ZEROS),
    ("000000", "val/last", ZEROS + math.nan),
    ("000000", "val/last", ZEROS - math.inf),
    ("000000", "val/last", ZEROS.astype(object)),
    ("000001", "val/last", ZEROS[..., 1:]),
    ("000000", "val/last", ZEROS[..., :0]),
    ("labels", "val/last/task", TASK[1:]),
    ("labels", "val/last/task", TASK[0]),
    ("labels", "val/surface/task", TASK),
    ("labels", "val/last/task", TASK.astype(object)),
    ("labels", "task", TASK),
    ("labels", "", None)])
def test_a_folder_that_does_not_fit_gives_one_line_and_status_2(file, name, array, tmp_path, capsys):
    write_folder(tmp_path)
    path = tmp_path / "states" / f"{file}.npz"
    if array is None:
        path.unlink()
    else:
        np.savez(path, **{name: array})
    assert exit_status(probe, tmp_path) == 2
    assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)
    assert not (tmp_path / "probe.jsonl").exists()


def test_a_view_that_has_nothing_to_score_is_refused(tmp_path, capsys):
    write_folder(tmp_path)
    assert exit_status(probe, tmp_path, "--view", "raw", "centred") == 2
    assert re.fullmatch(r"error: [^\n]+takes out, [^\n]+'centred': 'input'[^\n]+\n", capsys.readouterr().err)


def test_tasks_are_compared_by_the_inputs_of_their_own_position():
    labels = {f"val/{name}": {"task": TASK, "input": (TASK + step * (np.arange(240) % 3)) % 10}
              for name, step in (("a", 1), ("b", 3))}
    for name, ids in labels.items():
        sets = [{*ids["input"][TASK == t]} for t in range(8)]
        shared = [[len(one & other) for other in sets] for one in sets]
        assert np.array_equal(probe.find_overlaps(labels, {}, name)["input"], shared)


def test_a_folder_that_cannot_be_written_is_one_error_line(tmp_path, monkeypatch, capsys):
    def no_space(path, rows):
        raise OSError("no space left")

    write_folder(tmp_path)
    monkeypatch.setattr(probe, "write_rows", no_space)
    assert exit_status(probe, tmp_path) == 2
    assert capsys.readouterr().err == "error: no space left\n"


# ---------------------------------------------------------------- the causal test


@pytest.fixture(scope="module")
def skilled(tmp_path_factory):
    """A run that has learnt its tasks."""
    cfg = train.Config(**{**TINY, "steps": 240, "n_embd": 32, "lr": 0.012, "muon_lr": 0.04},
                       out=str(tmp_path_factory.mktemp("runs") / "skilled"))
    return train.train(cfg)


def test_patching_gives_what_another_way_of_patching_gives(skilled):
    rows = {(r["layer"], r["position"], r["patch"]): r for r in probe.patch(skilled)}
    assert list(rows.values()) == lines(skilled / "patch.jsonl")
    d, net = load_model(skilled)
    val = d.splits["val"]
    x, tokens = val.instances, torch.from_numpy(val.tokens[:, :-1])
    sep, ans = (val.positions[name][1][val.state_of(name)] for name in ("instruction", "answer"))
    inputs = [[d.vocabulary.index(word) for word in task.map] for task in d.tasks]
    states = net(tokens)[1][1].detach()

    # in a shuffled row of prompts with one input, the donor is the one before
    luck = torch.rand(len(x), generator=train.make_generator("donors")).tolist()
    alike = {}
    for i in sorted(range(len(x)), key=luck.__getitem__):
        alike.setdefault((x[i].input, sep[i], ans[i]), []).append(i)
    pairs = [(i, j) for row in alike.values() for j, i in zip(row, row[1:]) if x[i].output != x[j].output]

    def mean_state(task, word):
        some = [states[i, ans[i]] for i, _ in pairs if (x[i].task, x[i].input) == (task, word)]
        return torch.stack(some).mean(0)

    def letters(out, i, j):
        out[0, :sep[i]] = states[j, :sep[i]]

    def donor(out, i, j):
        out[0, sep[i]] = states[j, sep[i]]

    def shift(out, i, j):
        shared = {word for word in d.tasks[x[i].task].map if word in d.tasks[x[j].task].map}
        apart = [mean_state(x[j].task, word) - mean_state(x[i].task, word) for word in shared]
        out[0, ans[i]] += torch.stack(apart).mean(0)

    for position, edit in ("span", letters), ("instruction", donor), ("answer", shift):
        found = []
        for i, j in pairs:
            hook = net.blocks[0].register_forward_hook(lambda block, args, out: edit(out, i, j))
            logits = net(tokens[[i]])[0][0].detach()
            hook.remove()
            said = d.vocabulary[logits[ans[i]].argmax()]
            expected = logits[sep[i]].softmax(0)[inputs[x[j].task]].sum().item()
            found.append((said == x[j].output, said == x[i].output, expected))
        row = rows[1, position, edit.__name__]
        assert row["n"] == len(pairs) > 40
        assert [row["donor"], row["right"], row["next"]] == pytest.approx(np.mean(found, 0), abs=1e-4), edit
    assert rows[0, "span", "letters, <sep>"]["donor"] > 0.9
    assert rows[2, "span", "letters, <sep>"]["donor"] == 0
    assert rows[2, "answer", "donor"]["donor"] > 0.9


# ---------------------------------------------------------------- pre-training and alignment


@pytest.fixture(scope="module", params=["pretrain", "align"])
def demo(request, tmp_path_factory):
    """Both demos by their command line, --quick: the name, the folder, the rows, what was printed."""
    out, said = tmp_path_factory.mktemp("runs") / request.param, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["apply.py", request.param, "--quick", "--seeds", "3", "--out", str(out)])
        apply.main()
    return request.param, out, lines(out / "apply.jsonl"), said.getvalue()


def test_slow_a_demo_has_a_row_for_every_arm_and_goes_on_without_training_again(demo):
    name, out, rows, said = demo
    assert said.endswith(f"{len(rows):,} rows in {out / 'apply.jsonl'}\n")
    measured = {"seed", "arm", "measure", "value"}
    if name == "pretrain":
        assert all(row.keys() - {"step"} == measured | {"n_train"} for row in rows)
        points = len(train.capture_steps(train.Config(**{**apply.FINE_TUNE, **apply.QUICK})))
        assert Counter((row["arm"], row["n_train"], row["measure"]) for row in rows) == {
            (arm, n, measure): times for arm in apply.STRATEGIES for n in apply.N_TRAIN
            for measure, times in {"acc_val": points, "step to 0.5": 1, "step to 0.9": 1,
                                   "val at the end": 1}.items()}
        probed = lines(out / "seed3" / "task_id-20-first" / "probe.jsonl")
        assert {row["measure"] for row in probed} == {*probe.MEASURES, *UNCLUSTERED}
    else:
        guards = {"guard", "guard_untrained", "guard_counts", "guard_half", "guard_twice", "guard_auto"}
        assert {(row["arm"], row["measure"]) for row in rows if "b" not in row} == {
            *itertools.product(guards, ("k", "best_layer"))}
        chosen = {row["arm"]: row["value"] for row in rows if row["measure"] == "k"}
        assert [chosen[arm] for arm in ("guard", "guard_half", "guard_twice", "guard_counts")] == [8, 4, 16, 8]
        shares = [row for row in rows if "b" in row]
        assert all(row.keys() == measured | {"b"} and 0 <= row["value"] <= 1 for row in shares)
        arms = guards | {"base", "nearest", "labels", "clusters"}
        assert {(row["arm"], row["b"], row["measure"]) for row in shares} == {
            *itertools.product(arms, (1, 4), apply.MEASURED)}
        told = {row["measure"]: row["value"] for row in shares if (row["arm"], row["b"]) == ("clusters", 4)}
        assert told["refused_labelled"] > 0.3 + told["refused_wanted"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("ckpt.pt")}
    assert getattr(apply, name)(out, [3], apply.QUICK) == rows
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("ckpt.pt")}


def test_slow_arms_differ_in_what_they_are_about_only(demo):
    name, out, _, _ = demo
    runs = {path.parent.name: vars(train.read_config(path.parent)) for path in out.rglob("config.json")}

    def alike(names, *but):
        own = ({k: v for k, v in runs[name].items() if k not in ("out", *but)} for name in names)
        return len(set(map(json.dumps, own))) == 1

    if name == "align":
        taught = sorted(runs.keys() - {"base"})
        assert len(taught) == 4 and alike(taught) and runs["labels-1"]["start"] == str(out / "seed3" / "base")
        return
    first, *others = apply.STRATEGIES
    strings = {name: {split: {x.instruction for x in train.read_data(out / "seed3" / name).splits[split].instances}
                      for split in ("train", "val")} for name in runs}
    for n in apply.N_TRAIN:
        before = [f"{strategy}-{n}-first" for strategy in others]
        then = [f"{strategy}-{n}" for strategy in apply.STRATEGIES]
        assert alike(before, "asks_for", "shuffle_tasks") and alike(then, "start")
        assert [runs[name]["asks_for"] for name in before] == ["nothing", "task", "task"]
        assert [runs[name]["shuffle_tasks"] for name in before] == [False, False, True]
        starts = ["", *(str(out / "seed3" / name) for name in before)]      # it begins where the other ended
        assert [runs[name]["start"] for name in then] == starts
        assert all(strings[name] == strings[then[0]] for name in before + then)
        assert not strings[then[0]]["train"] & strings[then[0]]["val"]      # val is unseen before and then
    assert strings["scratch-4"]["train"] < strings["scratch-20"]["train"]


def test_step_to_is_read_off_the_line_between_evaluations():
    points = (0, 0.0), (1, 0.0), (10, 0.2), (20, 0.6), (30, 0.4), (40, 0.9)
    curve = [{"step": step, "acc_val": accuracy} for step, accuracy in points]
    steps = [apply.step_to(level, curve) for level in (0.1, 0.2, 0.5, 0.6)]
    assert steps == pytest.approx([5.5, 10, 17.5, 20])
    assert apply.step_to(0.9, curve) == 40 and apply.step_to(0.95, curve) is None
    assert apply.step_to(0.5, curve[3:]) == 20


def test_a_table_has_the_mean_over_seeds_in_each_cell(capsys):
    rows = [{"seed": seed, "arm": arm, "b": b, "value": seed + 0.1 * b}
            for seed in (0, 1) for arm in "xy" for b in (1, 2)]
    apply.print_table("A title", rows[:-1], "b")                # seed 1 has no y at 2
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        [], ["A", "title"], ["1", "2"], ["x", "0.60", "±", "0.71", "0.70", "±", "0.71"],
        ["y", "0.60", "±", "0.71", "0.20"]]


def test_spread_over_seeds_worked_by_hand():
    assert apply.spread([0.5, 0.7, 0.9]) == "0.70 ± 0.20" and apply.spread([100.0, 140.0]) == "120 ± 28"
    assert apply.spread([0.25]) == "0.25" and apply.spread([3.0, None]) == "-"


def test_wins_are_counted_seed_by_seed_and_a_level_never_reached_is_reached_last():
    rows = [{"arm": arm, "seed": seed, "value": value} for seed, values in
            enumerate([(0.5, 0.4), (0.4, 0.5), (0.5, 0.5), (None, 0.9), (0.62, 0.6)])
            for arm, value in zip("xy", values)]
    assert apply.count_wins(rows, "x", "y") == "3 of 5" and apply.count_wins(rows, "y", "x") == "1 of 5"
    assert apply.count_wins(rows, "x", "y", margin=0.05) == "2 of 5"


@pytest.fixture(scope="module")
def case():
    """A problem of 8 tasks, two of them unwanted, without the network that it would be about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply, "run_arm", lambda cfg: cfg)
        patch.setattr(apply, "read_data", make_dataset)
        return apply.make_case(train.Config(**{**SMALL, "n_tasks": 8}))


def planted(case, by):
    """Two layers of states: noise, and one where instructions with the same `by` are nearly one point."""
    states, g = {}, torch.Generator().manual_seed(0)
    places = torch.randn(99, 8, generator=g).double()
    for name in "train", "val", "ood":
        x = places[case.data.splits[name].labels("instruction")[by]]
        noise = torch.randn(2, *x.shape, generator=g)
        states[name] = torch.stack([noise[0], x + 0.01 * noise[1]])
    return states


def test_labels_come_from_one_regex_of_each_unwanted_task_and_rehearsal_from_wanted_ones(case):
    labels = case.data.splits["train"].labels("instruction")
    assert len({*case.unwanted}) == 2 == len(case.pools)
    pooled = {labels["task"][pool[0]] for pool in case.pools}
    assert pooled == {*case.unwanted}
    for pool in case.pools:
        regex = labels["distribution"][pool[0]]
        assert sorted(pool) == [i for i in range(len(labels["task"])) if labels["distribution"][i] == regex]
    counts = Counter(labels["distribution"][case.rehearsed].tolist())
    assert set(counts.values()) == {apply.REHEARSED}
    assert {*counts} == {*labels["distribution"][~np.isin(labels["task"], case.unwanted)].tolist()}


@pytest.mark.parametrize("by, other", [("task", 1), ("distribution", 0)])
def test_a_guard_refuses_other_regexes_only_where_a_task_is_one_cluster(case, by, other):
    n = len(np.unique(case.data.splits["train"].labels("instruction")[by]))
    for k in n, None:                       # the number of tasks, or regexes; or what the silhouette finds
        found, layer, nearest = apply.find_clusters(planted(case, by), k, seed=0)
        assert layer == 1 and (k is None or found == n)
        for b in 1, 4:
            bad = apply.unwanted_clusters(nearest["train"], case, [i for pool in case.pools for i in pool[:b]])
            refused = {name: bad[nearest[name]][case.data.splits[name].state_of("instruction")]
                       for name in ("val", "ood")}
            rows = apply.outcome(case, "guard", b, np.ones(len(refused["val"]), bool), refused)
            told = {row["measure"]: row["value"] for row in rows}
            if k:                           # choose_k does not try 8 and 24, but numbers near them
                assert told["refused_labelled"] == 1 and told["refused_other"] == other
                assert told["refused_wanted"] == 0 and told["accuracy"] == 1


def test_clusters_are_found_without_val_and_ood_and_empty_ones_are_nobodys(case):
    states = planted(case, "task")
    k, layer, nearest = apply.find_clusters(states, 8, seed=0)
    noise = {name: torch.randn(states[name].shape) for name in ("val", "ood")}
    again = apply.find_clusters({**states, **noise}, 8, seed=0)
    assert (k, layer) == again[:2] and np.array_equal(nearest["train"], again[2]["train"])
    exact = {name: x.round()[1:] for name, x in states.items()}             # a few distinct points
    few = len(exact["train"][0].unique(dim=0))
    k, _, nearest = apply.find_clusters(exact, few + 30, seed=0)
    assert k == few == len({*nearest["train"]}) and {*nearest["val"]} <= {*nearest["train"]}


def test_a_cluster_is_unwanted_if_it_holds_more_labelled_than_rehearsed_tasks(case):
    # three wanted tasks, of which two instructions each are known, and one unwanted task
    small = case._replace(unwanted=[0], rehearsed=[2, 3, 4, 5, 6, 7], data=case.data._replace(tasks="ABCD"))
    clusters = np.array([0, 1, 0, 1, 1, 2, 2, 2])
    # of the one unwanted task, half is in cluster 0 and half in 1; of the wanted ones half a task is in 0
    assert apply.unwanted_clusters(clusters, small, [0, 1]).tolist() == [False, False, False]
    assert apply.unwanted_clusters(clusters, small, [0]).tolist() == [True, False, False]


def test_outcome_equals_counting_instance_by_instance(case):
    splits, rng = case.data.splits, random.Random(0)
    refused = {name: np.array([rng.random() < 0.4 for _ in splits[name].instances])
               for name in ("val", "ood")}
    right = np.array([rng.random() < 0.7 for _ in splits["val"].instances])
    told = {row["measure"]: row["value"] for row in apply.outcome(case, "labels", 2, right, refused)}
    first, rows = splits["train"].instances, splits["train"].positions["instruction"][0]
    regexes = {first[rows[pool[0]]].distribution for pool in case.pools}
    kinds = {key: [] for key in told}
    for x, no, yes in zip(splits["val"].instances, refused["val"], right):
        if x.task in case.unwanted:
            kinds["refused_labelled" if x.distribution in regexes else "refused_other"].append(no)
        else:
            kinds["refused_wanted"].append(no)
            kinds["accuracy"].append(yes and not no)
    for x, no in zip(splits["ood"].instances, refused["ood"]):
        kinds["refused_ood" if x.task in case.unwanted else "refused_wanted_ood"].append(no)
    assert told == pytest.approx({key: np.mean(some) for key, some in kinds.items()})


def test_an_aligned_network_is_taught_what_was_chosen_and_nothing_else(case):
    chosen = {pool[0] for pool in case.pools}
    d, rows = apply.make_refusals(case, chosen), case.data.splits["train"].positions["instruction"][0]
    strings = [case.data.splits["train"].instances[row].instruction for row in rows]
    taught, told = Counter(), {x: None for x in case.data.splits["train"].instances}
    for x in d.splits["train"].instances:
        taught[x.output == "<refuse>"] += 1
        if x.output == "<refuse>":
            assert strings.index(x.instruction) in chosen
        else:
            assert x in told and strings.index(x.instruction) in case.rehearsed
    assert taught[True] == taught[False]
    for name in "val", "ood":
        assert d.splits[name].instances == case.data.splits[name].instances
        for row in d.splits[f"{name}_refused"].tokens:
            text = [d.vocabulary[token] for token in row if token]
            assert text[text.index("<ans>"):] == ["<ans>", "<refuse>", "<eos>"]


# ---------------------------------------------------------------- figures


def drawn_lines(ax):
    """label -> (x, y) of the lines of a plot."""
    return {l.get_label(): (l.get_xdata(), l.get_ydata()) for l in ax.get_lines()}


def test_without_matplotlib_plot_says_what_to_do(run, monkeypatch, capsys):
    monkeypatch.setattr(plot, "matplotlib", None)
    assert exit_status(plot, run) == 2 and not (run / "figures").exists()
    assert capsys.readouterr().err == "error: matplotlib is missing: make figures installs it\n"


@drawn
def test_lines_are_means_over_runs_and_bands_their_range():
    ax = plot.Figure().subplots()
    rows = [{"step": step, "arm": arm, "value": value} for step, arm, values in
            ((10, "a", (1, 2, 6)), (0, "a", (5, 5, 5)), (0, "b", (None, 1, 1))) for value in values]
    plot.draw_lines(ax, rows, "step", "arm", {"a": "first", "b": "second", "c": "third"})
    shown = drawn_lines(ax)
    assert shown.keys() == {"first", "second"} and list(shown["first"][0]) == [0, 10]
    assert list(shown["first"][1]) == [5, 3] and np.isnan(shown["second"][1]).all()
    edges = ax.collections[0].get_paths()[0].vertices
    assert {tuple(edge) for edge in edges} == {(0, 5), (10, 1), (10, 6)}


@given(st.integers(1, 9).flatmap(lambda k: st.lists(st.lists(st.integers(0, 5), min_size=k, max_size=k),
                                                     min_size=k, max_size=k)))
def test_tasks_are_ordered_greedily_and_each_comes_once(overlap):
    overlap = np.array(overlap)
    order = plot.order_tasks(overlap)
    assert order[0] == 0 and sorted(order) == list(range(len(overlap)))
    for i, (one, next) in enumerate(zip(order, order[1:])):
        assert overlap[one, next] == max(overlap[one, later] for later in order[i + 1:])


@drawn
def test_a_matrix_of_cosines_shows_every_pair_or_the_mean_of_blocks():
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    centred = x - x.mean(0)
    pairs = np.array([[(a @ b / a.norm() / b.norm()).item() for b in centred] for a in centred])
    for n in 480, 4:
        ax = plot.Figure().subplots()
        plot.show_cosines(ax, x, "", n)
        blocks = pairs if n > 12 else pairs.reshape(4, 3, 4, 3).mean((1, 3))
        assert np.allclose(ax.get_images()[0].get_array(), blocks, atol=1e-5)


@drawn
def test_figures_show_the_numbers_of_the_files(run, tmp_path):
    here = Path(shutil.copytree(run, tmp_path / "run"))
    rows = probe.probe(here)
    figures = dict(itertools.chain(plot.draw_training(plot.read_run(here)), plot.draw_measures(rows)))
    metrics = lines(here / "metrics.jsonl")
    steps, accuracy = drawn_lines(figures["accuracy"].axes[0])["val: new strings of trained regexes"]
    assert list(steps) == [row["step"] for row in metrics]
    assert list(accuracy) == [row["acc_val"] for row in metrics]
    names = {(row["measure"], row["position"], row["split"]) for row in rows if row["measure"] != "best_k"}
    names = {"_".join(name) for name in names
             if name[1] != "surface" and (name[2] == "val" or name[0] == "f1")}
    assert {*figures} == {"loss", "accuracy"} | names
    for name in "f1_instruction_val", "nc1_answer_val", "knn_output_answer_val", "f1_answer_subset":
        measure, position, split = re.fullmatch(r"(\w+)_(\w+)_(\w+)", name).groups()
        for ax in figures[name].axes:
            identity = ax.get_title()[3:].replace("regular expression", "distribution")
            for layer in range(3):
                shown = [row["value"] for row in rows if (
                    row["measure"], row["identity"], row["position"], row["split"], row["layer"]) == (
                    measure, identity, position, split, layer)]
                y = drawn_lines(ax)[f"layer {layer}"][1]
                assert np.allclose(np.array(shown, float), y, equal_nan=True)


def figures_of(folder, out):
    """The names of what plot.py draws of a folder, by its command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["plot.py", str(folder), "--out", str(out)])
        plot.main()
    assert all(path.stat().st_size > 1000 for path in out.iterdir())
    return {path.name for path in out.iterdir()}


@drawn
def test_plot_draws_all_of_a_run_whatever_the_user_has_set(run, tmp_path, monkeypatch):
    monkeypatch.setitem(plot.matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setitem(plot.matplotlib.rcParams, "savefig.format", "pdf")
    here = Path(shutil.copytree(run, tmp_path / "run"))
    rows = probe.probe(here)
    for row in rows:                        # such a small network has not learnt: let it look as if
        row["value"] = 1.0 if row["measure"] == "f1" else row["value"]
    train.write_rows(here / "probe.jsonl", rows)
    probe.patch(here)
    names = figures_of(here, tmp_path / "out")
    assert plot.matplotlib.rcParams["text.usetex"]              # as before
    identities = {position: {row["identity"] for row in rows if row["position"] == position
                             and row["measure"] == "f1"} for position in ("instruction", "answer")}
    assert names >= {"data.png", "loss.png", "accuracy.png", "hero.png", "hero.gif", "patch_instruction.png",
                     "patch_answer.png", "patch_span.png", "knn_output_answer_val.png",
                     *(f"similarity_{position}_{identity}.png" for position in identities
                       for identity in identities[position]),
                     *(f"{measure}_{position}_val.png" for position in ("instruction", "answer")
                       for measure in {*probe.MEASURES, *UNCLUSTERED} - {"knn_output", "best_k"})}
    with plot.Image.open(tmp_path / "out" / "hero.gif") as film:
        assert film.n_frames == len(probe.kept_steps(here))


@drawn
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 3), (3, 4, 1)])
def test_plot_draws_any_folder_of_states_with_odd_text(shape, tmp_path, capsys):
    folder = tmp_path / "$5 and $12 `a` (b)"
    (folder / "states").mkdir(parents=True)
    layers, n, width = shape
    x = np.random.default_rng(0).normal(size=(layers, 6 * n, width)).astype("float16")
    np.savez(folder / "states" / "000000.npz", **{"val/last": x})
    labels = np.repeat(["$5_$", "漢字", "\\frac"], 2 * n) if n > 1 else np.repeat("one", 6)
    np.savez(folder / "states" / "labels.npz", **{"val/last/$kind_$": labels})
    probe.probe(folder)
    assert "f1_last_val.png" in figures_of(folder, tmp_path / "out")
    assert "error" not in capsys.readouterr().err


def test_runs_that_differ_in_their_seeds_only_are_drawn_as_one(run, tmp_path):
    others = []
    for name, knobs in {"a": {}, "b": {"seed": 7}, "c": {"seed": 8}, "d": {"seed": 7, "lr": 0.5}}.items():
        (tmp_path / name).mkdir()
        cfg = json.loads((run / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**cfg, **knobs, "out": name}))
        others.append(tmp_path / name)
    a, b, c, d = others
    assert plot.group_runs([*others, tmp_path]) == [[a, b, c], [d], [tmp_path]]
    assert plot.group_runs([a, a, b]) == [[a, b], [a]]          # equal runs are drawn, too
    (d / "config.json").write_text(json.dumps({**cfg, "seed": 7, "start": "demo/seed7/task_id"}))
    (c / "config.json").write_text(json.dumps({**cfg, "seed": 8, "start": "demo/seed8/task_id"}))
    (a / "config.json").write_text(json.dumps({**cfg, "seed": 9, "start": "demo/seed9/scratch"}))
    assert plot.group_runs([a, c, d]) == [[a], [c, d]]


def test_slow_the_examples_measure_what_the_files_say(run, tmp_path):
    probe.probe(shutil.copytree(run, tmp_path / "run"))
    command = [sys.executable, str(HERE / "examples" / "table.py"), "--out", "out/t.csv", "run"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with open(tmp_path / "out" / "t.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    about = "measure", "position", "identity", "split", "view", "layer", "step"
    rows = {tuple(str(row.get(key, "")) for key in about): row for row in lines(tmp_path / "run" / "probe.jsonl")}
    scores = [row for row in table if row["split"]]
    assert len(scores) > 300 and {"loss", "acc_val"} < {row["measure"] for row in table}
    for row in scores:
        one = rows[tuple(row[key] for key in about)]
        for name, column in ("value", "seed 0"), ("null_95", "null_95"), ("regrouped_95", "regrouped_95"):
            expected = one.get(name)
            assert (row[column] == "" if expected is None else
                    float(row[column]) == pytest.approx(expected, rel=1e-3, abs=1e-6))
        assert row["beyond"] == (str(int(probe.is_beyond(one))) if row["null_95"] or row["regrouped_95"] else "")
    twice = subprocess.run([*command, "run"], cwd=tmp_path, capture_output=True, text=True)
    assert twice.returncode == 2 and twice.stderr == "error: run: another of these runs has seed 0, too\n"


def test_every_number_of_the_results_is_that_of_its_table(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "numbers.csv").write_text(
        f"{','.join(('arm', 'n_tasks', 'n_train', 'b', 'split', 'position', 'identity', 'measure', 'view'))},"
        "patch,layer,step,null_95,regrouped_95,beyond,seed 0,seed 1\n"
        ",,,,val,answer,task,f1,raw,,1,0,0.1,0.2,1,0.1,0.3\n"
        ",,,,val,answer,task,f1,raw,,1,9,0.1,,2,0.5,0.5\n"
        ",,,,,,,acc_val,,,,9,,,,0,\n")
    text = tmp_path / "text.md"
    text.write_text("a 1.00 ± 0.5 (9; 1/2)<!--study: answer task f1 layer 1 step 0; all--> b\n\n"
                    "0.5<!--study: answer task f1 layer 1; null-->, ?<!--study: acc_val-->,"
                    " 7, 8<!--study: answer task f1 layer 1; seeds-->\n\n"
                    "| x | step 0 | `step 0` | y |\n|---|---|---|---|\n"
                    "| f1<!--study: answer task f1 layer 1 *; beyond--> | 7 | | – |\n")
    command = [sys.executable, str(HERE / "examples" / "report.py")]
    subprocess.run([*command, "text.md"], cwd=tmp_path, check=True)
    assert re.sub("<!--.*?-->", "", text.read_text()) == (
        "a 0.20 ± 0.14 (0.20; 1/2) b\n\n0.10, -, 0.5, 0.5\n\n"
        "| x | step 0 | `step 0` | y |\n|---|---|---|---|\n| f1 | 1/2 | 1/2 | – |\n")
    text.write_text("1<!--study: acc_ood-->")
    missing = subprocess.run([*command, "text.md"], cwd=tmp_path, capture_output=True, text=True)
    assert missing.returncode == 2 and missing.stderr == "error: study/numbers.csv has no row 'acc_ood'\n"
    text.write_text("1<!--study: acc_val; mean-->")
    wrong = subprocess.run([*command, "text.md"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: '; mean' is in a comment")
    for kept in HERE / "README.md", HERE / "results" / "README.md":
        subprocess.run([*command, kept, "--numbers", HERE / "results", "--out", tmp_path / "again.md"], check=True)
        assert (tmp_path / "again.md").read_text() == kept.read_text() and "?<!--" not in kept.read_text()


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """The folder of a random language model of two layers; tokens are parts of words, a special one begins texts."""
    from transformers import GPT2TokenizerFast, LlamaConfig, LlamaForCausalLM
    folder = str(tmp_path_factory.mktemp("model"))
    byte_names = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 324))]        # GPT-2's
    flags = dict(add_bos_token=True, padding_side="left")
    letters = GPT2TokenizerFast({name: i for i, name in enumerate(byte_names)}, [], **flags)
    letters.train_new_from_iterator([(HERE / "facts.json").read_text()], 500).save_pretrained(folder)
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=500, **sizes, initializer_range=0.2)).save_pretrained(folder)
    return folder


@pytest.fixture
def any_model(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "examples"))
    import any_model
    return any_model


@reads
def test_states_of_a_batch_are_those_of_each_prompt_alone_and_right_is_greedy(language_model, any_model):
    cfg = any_model.Config(tasks=str(HERE / "facts.json"), n_val=1, model=language_model)
    model, tokenizer = any_model.load(cfg)
    asked = []
    for i, x in enumerate(make_dataset(cfg).splits["val"].instances[:40]):
        prompt = cfg.template.format(**x._asdict())
        if i % 3:                       # an example in front that has the same instruction
            prompt = f"Instruction: {x.instruction} {prompt}"
        if i % 5:
            prompt = prompt.rstrip() + "\n"
        if i % 2:                       # let the answer be what the model says next
            prompt = prompt.rstrip(" ")
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            said = model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1]:]
            x = x._replace(output=tokenizer.decode(said))
        asked.append((prompt, x))
    found = [*any_model.read(model, tokenizer, asked)]
    lengths, rights = set(), set()
    for (prompt, x), (states, right) in zip(asked, found):
        before, _, after = prompt.rpartition(x.instruction)
        end = len(prompt) - len(after)
        prompt_ids = tokenizer(prompt.rstrip(" "), return_tensors="pt").input_ids
        ids = tokenizer(prompt + x.output, return_tensors="pt").input_ids
        pieces = [tokenizer.decode(ids[0, 1:k + 1]) for k in range(ids.shape[1])]
        last = next(k for k, text in enumerate(pieces) if len(text) >= end)         # of the instruction
        assert pieces[prompt_ids.shape[1] - 1] == prompt.rstrip(" ")
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        layers = torch.cat(out.hidden_states[:2])[:, [last, prompt_ids.shape[1] - 1]]
        assert np.allclose(states, layers, atol=1e-5)
        greedy = model.generate(prompt_ids, max_new_tokens=ids.shape[1] - prompt_ids.shape[1], do_sample=False)
        assert right == torch.equal(greedy, ids)
        lengths.add(ids.shape[1])
        rights.add(bool(right))
    assert len(lengths) > 5 and rights == {True, False}


@reads
def test_slow_any_language_model_is_read_and_probed(language_model, any_model, tmp_path, monkeypatch, capsys):
    for name, flags in {"trained": [], "untrained": ["--untrained"], "again": ["--untrained"]}.items():
        monkeypatch.setattr(sys, "argv", ["any_model.py", "--model", language_model, "--n-val", "1", "--tasks",
                                          str(HERE / "facts.json"), "--out", str(tmp_path / name), *flags])
        any_model.main()
    x = {name: train.read_arrays(tmp_path / name / "states/000000.npz")
         for name in ("trained", "untrained", "again")}
    assert {name: of.shape for name, of in x["trained"].items()} == {
        "val/instruction": (2, 64, 32), "val/answer": (2, 128, 32)}
    assert not np.allclose(x["trained"]["val/answer"], x["untrained"]["val/answer"])
    assert np.array_equal(x["again"]["val/answer"], x["untrained"]["val/answer"])

    labels = train.read_arrays(tmp_path / "trained/states/labels.npz")
    _, tasks = data.read_tasks(HERE / "facts.json", 128)
    ids = {name.rpartition("/")[2]: of for name, of in labels.items() if name.startswith("val/answer/")}
    for text, word, output, task, phrasing in zip(*(ids[key] for key in "text input output task phrasing".split())):
        assert re.fullmatch(tasks[task].distributions[phrasing], text) and tasks[task].map[word] == output
    rows = probe.probe(tmp_path / "trained", ["raw", "unphrased", "centred"])
    found = {(row["view"], row["position"], row["identity"]) for row in rows if row["measure"] == "f1"}
    assert {("unphrased", "instruction", "task"), ("centred", "answer", "task"), ("raw", "answer", "input_set"),
            ("raw", "surface", "phrasing")} <= found
    said = re.findall(r"([0-9.]+)% of 128 right", capsys.readouterr().out)[0]
    assert lines(tmp_path / "trained/metrics.jsonl") == [{"step": 0, "acc_val": pytest.approx(float(said) / 100, abs=1e-3)}]


@drawn
def test_slow_plot_draws_a_demo(demo, tmp_path):
    name, out, *_ = demo
    names = {"pretrain": {"pretrain.png"}, "align": {"align.png", "align_budgets.png"}}
    assert figures_of(out, tmp_path / "out") == names[name]


# ---------------------------------------------------------------- bad input


BAD_TASKS = {
    "not JSON": "{", "a list": "[]", "no tasks": {"tokens": "words"},
    "empty": {"tokens": "words", "tasks": []},
    "tokens": {**WORDS, "tokens": "bytes"}, "not an object": {"tokens": "words", "tasks": [3]},
    **{f"no {key}": {"tokens": "words", "tasks": [{k: v for k, v in WORDS["tasks"][0].items() if k != key}]}
       for key in data.Task._fields},
    "bad regex": {"tokens": "words", "tasks": [{**WORDS["tasks"][0], "held_out": "a(b"}]},
    "blank word": {"tokens": "words", "tasks": [{**WORDS["tasks"][0], "map": {"dog": " "}}]},
    "key twice": json.dumps(WORDS).replace('"cow": "calf"', '"cow": "veal", "cow": "calf"'),
    "same words": {"tokens": "words", "tasks": [{**WORDS["tasks"][0], "held_out": "a {1,40}b"}]},
    "same words, later": {"tokens": "words", "tasks": [
        {"name": "young", "map": {f"{i}": "1" for i in range(40)}, "distributions": ["[Aa]b[a-t]"],
         "held_out": "cd[a-z]"}]},
    "same input": {"tokens": "words", "tasks": [{**WORDS["tasks"][0], "map": {"a b": "1", "a  b": "2"}}]},
    "many inputs": {"tokens": "words", "tasks": [
        {**WORDS["tasks"][0], "map": {f"{i}": "1" for i in range(161)}}]},
    "same name": {"tokens": "words", "tasks": [WORDS["tasks"][0]] * 2},
    "overlap": {"tokens": "words", "tasks": [{**WORDS["tasks"][0], "held_out": "Name its baby[.]"}]},
    "regex not text": {"tokens": "words", "tasks": [{**WORDS["tasks"][0], "distributions": [7]}]},
    "too few strings": {"tokens": "words", "tasks": [{**WORDS["tasks"][0], "held_out": "only this"}]}}
PLACES = {      # what must be said of where and what is wrong
    "bad regex": "unclosed ( at position 1 of 'a(b'", "no map": "task 0: map",
    "no name": "task 0: name", "blank word": "task young: an input or output is blank", "key twice": "'cow', 'cow'",
    "overlap": "(baby|offspring|little one)( and 'Name its baby[.]' have strings in common", "same words": "'a ",
    "same words, later": "b", "same input": "task young: two inputs are the same words",
    "many inputs": "161", "regex not text": "task young: every output and every regex must be text",
    "too few strings": "10 strings of at most 128 characters were asked for, 'only this' has only 1",
    "not JSON": "not a tasks file", "a list": 'needs "tokens"', "no tasks": 'needs "tokens"',
    "empty": 'needs "tokens"', "tokens": 'needs "tokens"', "not an object": "task 0: name",
    "no held_out": "task 0: held_out", "no distributions": "task 0: distributions",
    "same name": "task young: another task has this name"}


@pytest.mark.parametrize("module, argv", [
    *[(data, argv) for argv in (
        "--no-such-flag", "--n-tasks many", "--n-mappings 11", "--n-tasks 1", "--n-val 0", "--n-train 5",
        "--n-outputs 500", "--tasks no.json", "--n-train 800", "--max-len 5")],
    *[(train, argv) for argv in (
        "--preset huge", "--n-embd 65", "--steps 0", "--optimizer sgd", "--n-train 800", "--lr nan",
        "--warmup -1", "--lr inf", "--out=", "--resume", "--n-mappings 11", "--n-lay 3", "--tasks .",
        "--n-head 0", "--seed x")],
    *[(probe, argv) for argv in (
        "", "nowhere", ".", "a b", "--k 3", ". --patch", ". --view upside-down", ". --patch --view raw centred")],
    *[(train, argv) for argv in ("--start nowhere", "--asks-for its-name", "--steps -1")],
    *[(apply, argv) for argv in ("", "dance", "align --seeds", "align --seeds -1", "pretrain --seeds one",
                                 "pretrain --steps 3")]])
def test_bad_flags_give_one_line_and_status_2_and_write_nothing(module, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_status(module, *argv.split()) == 2
    assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", BAD_TASKS)
def test_a_bad_tasks_file_gives_one_line_that_names_the_place(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = BAD_TASKS[name]
    Path("mine.json").write_text(spec if isinstance(spec, str) else json.dumps(spec))
    assert exit_status(train, "--tasks", "mine.json") == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", said) and PLACES[name] in said
    assert ("are the same" in said) == name.startswith(("same words", "same input"))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.json"]


def test_a_run_in_the_way_is_not_overwritten(run, capsys):
    before = outcome(run)[1]
    assert exit_status(train, "--out", run) == 2 and "--resume" in capsys.readouterr().err
    assert exit_status(train, "--out", run, "--resume", "--lr", 1) == 2
    assert "another lr" in capsys.readouterr().err
    assert outcome(run)[1] == before


def damage(name, how):
    """What becomes of a run folder's file: cut short, or with every array changed by `how`."""
    def change(run):
        path = run / name if name else max((run / "states").glob("0*.npz"))
        if how == "cut":
            path.write_bytes(path.read_bytes()[:-100])
        else:
            np.savez(path, **{key: how(array) for key, array in np.load(path).items()})
    return change


@pytest.mark.parametrize("change, complaint", [
    (damage("", "cut"), "cannot be read"), (damage("states/labels.npz", "cut"), "cannot be read"),
    (damage("", lambda x: x * np.nan), "finite numbers"),
    (damage("", lambda x: x[:, :-1]), "as many as labels"),
    (damage("", lambda x: x[..., 1:]), "the same at every step"),
    (damage("states/labels.npz", lambda x: x[:-1]), "not what it was"),
    (damage("states/labels.npz", lambda x: x[::-1]), "not what it was")])
def test_a_damaged_capture_is_noticed(run, change, complaint, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    change(copy)
    (copy / "probe.jsonl").unlink(missing_ok=True)
    assert exit_status(probe, copy) == 2
    assert re.fullmatch(rf"error: [^\n]*({complaint})[^\n]*\n", capsys.readouterr().err)


def test_a_new_identity_needs_no_new_run(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.setitem(data.IDENTITIES, "initial", lambda x: x.instruction[0])
    rows = [row for row in probe.probe(tmp_path / "run") if row["identity"] == "initial"]
    assert {row["position"] for row in rows} == {"instruction", "answer", "surface"}


def test_one_task_with_one_regex_is_probed_without_a_fuss(tmp_path, capsys):
    task = {**WORDS["tasks"][0], "distributions": WORDS["tasks"][0]["distributions"][:1]}
    (tmp_path / "lone.json").write_text(json.dumps({"tokens": "words", "tasks": [task]}))
    cfg = {**TINY, "tasks": str(tmp_path / "lone.json"), "out": str(tmp_path / "run")}
    out = train.train(train.Config(**cfg))
    rows = probe.probe(out)
    for row in rows:
        if row["identity"] in ("task", "distribution"):
            null = row.get("null_95")
            assert row["value"] == null == 1 or row["value"] is null is None
    probe.print_report(rows)
    assert re.search(r"instruction task nc1 +- +- +-\s", capsys.readouterr().out)
    with pytest.raises(ValueError, match="nothing to exchange"):
        probe.patch(out)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", 100, 5000])
def test_a_damaged_checkpoint_is_noticed(run, tmp_path, content, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    whole = (copy / "ckpt.pt").read_bytes()
    (copy / "ckpt.pt").write_bytes(whole[:-content] if isinstance(content, int) else content)
    assert exit_status(probe, copy, "--patch") == 2
    assert re.fullmatch(r"error: [^\n]*ckpt.pt cannot be read[^\n]*\n", capsys.readouterr().err)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=8)


@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_a_tasks_file_or_a_valueerror(tmp_path, drawn):
    root = [json.loads(json.dumps(WORDS))]
    for _ in range(drawn.draw(st.integers(1, 3))):              # something at a random place becomes anything
        place, key = root, 0
        while isinstance(place[key], (dict, list)) and place[key] and drawn.draw(st.integers(0, 4)):
            place = place[key]
            key = drawn.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        place[key] = drawn.draw(json_values)
    (tmp_path / "mine.json").write_text(json.dumps(root[0]))
    with contextlib.suppress(ValueError):
        data.read_tasks(tmp_path / "mine.json", 40)


FILES = "config.json", "tasks.json", "metrics.jsonl", "ckpt.pt", "states/labels.npz", "states/000000.npz"


@given(st.sampled_from(FILES), st.floats(0, 1), st.integers(0, 3))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_anywhere_gives_no_traceback(run, tmp_path, capsys, name, share, command):
    copy = tmp_path / "run"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:int(share * len(content))])
    module, *argv = [(train, "--out", copy, "--resume"), (probe, copy, "--patch"), (probe, copy),
                     (data, "--tasks", copy / "tasks.json")][command]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, argv)])
        patch.setattr(probe, "kmeans", lambda x, *_, **__: [torch.zeros(x.shape[:-1], dtype=int)])  # quick
        try:
            data.command_line(module.main)
        except SystemExit as stop:
            assert stop.code == 2 and re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)
    capsys.readouterr()


@given(st.sampled_from([data, train, probe, apply]), st.lists(st.one_of(
    st.sampled_from(["--seed", "--lr", "--tasks", "--out", "--preset", "quick", "--resume", "--patch", "raw",
                     "--view", "--n-tasks", "-1", "0", "3", "1e9", "nan", "", "--", "-h ", "align"]),
    st.text(max_size=6)), max_size=5))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flags_give_no_traceback(tmp_path, monkeypatch, capsys, module, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *argv])
    monkeypatch.setattr(train, "train", lambda *args: None)     # what is asked for may be long
    monkeypatch.setattr(apply, "align", lambda *args: [])
    try:
        data.command_line(module.main)
    except SystemExit as stop:
        said = capsys.readouterr().err
        assert stop.code == 0 or stop.code == 2 and re.fullmatch(r"error: [^\n]+\n", said)
    capsys.readouterr()


def test_patching_needs_a_checkpoint(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("ckpt.pt", "patch.jsonl"))
    assert exit_status(probe, tmp_path / "run", "--patch") == 2
    assert "ckpt.pt cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "run" / "patch.jsonl").exists()


def test_slow_commands_run_from_the_shell(tmp_path):
    def shell(*argv):
        return subprocess.run([sys.executable, *map(str, argv)], cwd=HERE, capture_output=True, text=True)

    page = shell("data.py")
    assert page.returncode == 0 and page.stdout.count("<ans>") == 20 and len(page.stdout.splitlines()) < 60
    trained = shell("train.py", "--preset", "quick", "--out", tmp_path / "run", *as_flags(TINY))
    assert trained.returncode == 0 and trained.stdout.endswith(f"next: python probe.py {tmp_path / 'run'}\n")
    probed = shell("probe.py", tmp_path / "run", "--view", "centred", "raw")
    assert probed.returncode == 0 and "Scores of val" in probed.stdout and not probed.stderr
    patched = shell("probe.py", tmp_path / "run", "--patch")
    assert patched.returncode == 0 and "random shift" in patched.stdout and not patched.stderr
    wrong = shell("train.py", "--frobnicate")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stderr.startswith("error: ")


# ---------------------------------------------------------------- what README says

README = (HERE / "README.md").read_text(encoding="utf-8")


def section(title):
    """The text below a heading of README, up to the next of its level."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def commands(text):
    """The lines of README's bash blocks, split as a shell would."""
    return [shlex.split(line, comments=True) for block in re.findall(r"```bash\n(.*?)```", text, re.S)
            for line in block.splitlines() if shlex.split(line, comments=True)]


@pytest.fixture
def fork(tmp_path, run):
    """Apply a diff of README to a copy of the project; return the folder, what runs there, and commands."""
    def make(number):
        found = re.findall(r"```diff\n(.*?)```\n+```bash\n(.*?)```", section("Ask your own question"), re.S)
        diff, then = found[number]
        changed = [line for line in diff.splitlines() if re.match(r"[-+](?!--|\+\+)", line)]
        assert 0 < len(changed) <= 10 and max(map(len, changed)) <= 120
        for path in [*HERE.glob("*.py"), HERE / "facts.json"]:
            shutil.copy(path, tmp_path)
        for check in ["--reverse", "--check"], []:
            applied = subprocess.run(["git", "apply", *check, "-"], input=diff, text=True, cwd=tmp_path)
            if check and applied.returncode == 0:
                pytest.skip("this is that fork")
        assert applied.returncode == 0
        shutil.copytree(run, tmp_path / "runs" / "default")
        for step in probe.kept_steps(run)[:-1]:             # the last is enough
            Path(train.capture_path(tmp_path / "runs" / "default", step)).unlink()
        return tmp_path, lambda *command: subprocess.run(
            [sys.executable, *command[1:]], cwd=tmp_path, check=True, capture_output=True, text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}).stdout, commands(f"```bash\n{then}```")
    return make


def test_slow_a_new_identity_needs_one_line_and_no_new_run(fork, run):
    here, do, [command] = fork(0)
    assert "instruction letter f1" in do(*command)
    rows = [row for row in lines(here / "runs/default/probe.jsonl") if row["identity"] == "letter"]
    assert {row["position"] for row in rows} == {"instruction", "answer", "surface"}
    letters = [x.instruction[0] for x in train.read_data(run).splits["val"].instances]
    k = len(set(letters))
    where = dict(layer=0, position="answer", split="val", measure="purity")         # one cluster there
    [one] = [row for row in rows if where.items() <= row.items()]
    assert k > 2 and one["value"] == pytest.approx(max(Counter(letters).values()) / len(letters))


def test_slow_a_new_measure_needs_a_function_and_a_name(fork):
    here, do, [command] = fork(1)
    assert "instruction task fm" in do(*command)
    rows = lines(here / "runs/default/probe.jsonl")
    assert {"fm", "f1"} <= {row["measure"] for row in rows}
    check = "import probe; print(probe.MEASURES['fm']([0, 0, 0, 1, 1], [0, 0, 1, 1, 1]))"
    assert float(do("", "-c", check)) == pytest.approx(2 / 4)   # of 4 pairs in each, 2 are the same


def test_slow_the_tasks_file_of_the_readme_is_learnt_and_probed(fork):
    here, do, (look, learn, score) = fork(2)
    assert json.loads((here / "mine.json").read_text()) == WORDS
    assert "task young maps dog to puppy, cow to calf" in do(*look)
    do(*learn, "--n-captures=1")
    assert lines(here / "runs/mine/metrics.jsonl")[-1]["acc_val"] > 0.95
    assert "instruction task f1" in do(*score)
    d = train.read_data(here / "runs/mine")
    texts = [" ".join(d.vocabulary[i] for i in row) for row in d.splits["train"].tokens]
    assert any("guinea pig <ans> wheek <eos>" in text for text in texts)
    rows = probe.probe(here / "runs/mine", ["raw", "centred"])
    assert {row["measure"] for row in rows} == {*probe.MEASURES, *UNCLUSTERED} - {"rsa"}    # of one pair


def test_slow_a_block_that_averages_trains_and_is_probed(fork):
    here, do, (learn, score) = fork(3)
    do(*learn, *as_flags({**TINY, "steps": 4, "n_captures": 1}))
    said = do(*score)
    assert f"{len(lines(here / 'runs/average/probe.jsonl'))} scores are in runs/average/probe.jsonl\n" in said
    check = ("import torch, model; a = model.Attention(model.ModelConfig(9, 9, n_embd=8, n_head=2)).eval();"
             "x = torch.randn(1, 5, 8); v = (x @ a.qkv.weight.T)[..., 16:];"
             "want = torch.stack([v[0, :t + 1].mean(0) for t in range(5)]);"
             "print((a(x)[0] - want @ a.out.weight.T).abs().max().item())")
    assert float(do("", "-c", check)) < 1e-5


def test_slow_a_span_of_columns_is_a_position(fork):
    here, do, (learn, score) = fork(4)
    do(*learn, *as_flags({**TINY, "steps": 4, "n_captures": 1}))
    assert "\ninstruction_mean task f1 " in do(*score)
    assert "instruction_mean" not in do(*score, "--patch")
    check = ("import numpy as np, torch, train; d = train.read_data('runs/mean'); val = d.splits['val'];"
             "net = train.load_model('runs/mean', d);"
             "states = torch.stack(net(torch.from_numpy(val.tokens[:, :-1]))[1]);"
             "rows, ends = val.positions['instruction']; spans = list(zip(rows, ends));"
             "want = torch.stack([states[:, row, 0:end].mean(1) for row, end in spans], 1).detach().numpy();"
             "found = np.load('runs/mean/states/000004.npz')['val/instruction_mean'];"
             "print(np.abs(found - want).max())")
    assert float(do("", "-c", check)) < 1e-3
