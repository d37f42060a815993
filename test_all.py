"""Why you may believe it: every test is a claim, checked against something that does not share our code.

    make test                              all of it, half a minute on two cores
    .venv/bin/pytest -k regex test_all.py  the claims with that word in their name
"""
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import data
import model
import probe
import train
from data import DataConfig, Regex, make_dataset

HERE = Path(__file__).parent
settings.register_profile("all", deadline=None, derandomize=True)
settings.load_profile("all")
SMALL = dict(n_tasks=4, n_distributions=2, n_mappings=3, n_inputs=5, n_outputs=6, n_train=12, n_val=6)
TINY = dict(SMALL, n_layer=2, n_head=2, n_embd=16, epochs=6, batch_size=64, n_captures=6)


@pytest.fixture(scope="module")
def dataset():
    return make_dataset(DataConfig())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train.train(train.Config(**TINY, out=str(tmp_path_factory.mktemp("runs") / "tiny") + "/"))


def exit_status(module, *argv):
    """Run a command line that is to fail in this process; return its exit status."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, argv)])
        data.command_line(module.main)
    return stop.value.code


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
        assert re.search(r"at position \d+ of|needs more than|too ", str(error))
        return
    assert regex.matches(string) == bool(re.fullmatch(pattern, string))
    for s in regex.sample(min(3, regex.count), random.Random(0)):
        assert re.fullmatch(pattern, s) and len(s) <= 8


@pytest.mark.parametrize("pattern, count", [
    ("a|a", 1), ("(a|ab)(c|bc)", 3), ("(a|a){10}", 1), ("(a|b)?a?", 5), ("a|b|a", 2), ("", 1), ("[^ -~]", 0),
    ("(a|a)*", 65), ("(a*)*", 65), ("a*", 65), ("a{1000}", 0), ("[a-z]{40}", 26 ** 40), ("[]a]", 2),
    ("(" * 200 + "a" + ")" * 200, 1), ("(" * 200 + "a" + ")*" * 200, 65), (r"\w", 63), (r"\W", 32),
    (r"[^\d]", 85), ("(" + "|" * 9000 + "){2000}", 1),
    ("|".join(map("".join, list(itertools.product("abcde", repeat=4))[:300])), 300),
    ("(a|b|ab|ba){8}", 12866)])     # the last by listing them all
def test_regex_counts_strings_and_not_derivations(pattern, count):
    assert Regex(pattern).count == count
    if pattern.endswith("{8}"):
        assert len({"".join(s) for s in itertools.product(["a", "b", "ab", "ba"], repeat=8)}) == count


@pytest.mark.parametrize("pattern", [
    "[ab]{0,60}a[ab]{60}", "[ab]*a[ab]{13}", "(a?){9999}", "((((a{99}){99}){99}){99})", "(|a){99999}",
    "a{0,15000}", "(" * 6000 + "a" + ")*" * 6000, "[\u0100-\u0400]?" * 2000, "a{" + "9" * 5000 + "}",
    "(.*a.{12})|(.*b.{11})", ".{0,50}a.{50}|.{0,40}b.{40}", "(((a?){20}b?){20}c?){20}"])
def test_regex_that_would_explode_is_refused_in_two_seconds(pattern):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="too|more than"):
        Regex(pattern)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("pattern, construct, position", [
    ("a^b", "anchor ^", 1), ("ab$", "anchor $", 2), (r"a\b", r"anchor \b", 1), (r"\Aa", r"anchor \A", 0),
    (r"(a)\1", r"back-reference \1", 3), (r"\q", r"escape \q", 0), ("a\\", "escape \\", 1),
    (r"[\n]", r"escape \n", 1),
    ("a(?=b)", "group (?=", 1), ("(?P<x>a)", "group (?P", 0), ("a*?", "lazy quantifier ?", 2),
    ("a++", "possessive quantifier +", 2), ("a**", "doubled quantifier *", 2),
    ("a{2}{3}", "doubled quantifier {", 4),
    ("*a", "leading quantifier *", 0), ("a|+", "leading quantifier +", 2), ("a{", "bare or empty {", 1),
    ("a{,3}", "bare or empty {", 1), ("a{3,2}", "bare or empty {3,2}", 1), ("a]", "bare ]", 1),
    ("}", "bare }", 0), ("(a", "unclosed (", 0), ("a)", "unmatched )", 1), ("x[a", "unclosed [", 1),
    ("[b-a]", "bad range b-a", 1), (r"[a-\d]", r"bad range a-\d", 1),
    (r"[\s-a]", r"bad range \s-a", 1)])
def test_regex_names_what_it_does_not_support_and_where(pattern, construct, position):
    with pytest.raises(ValueError, match=re.escape(f"{construct} at position {position} of")):
        Regex(pattern)


def test_regex_refuses_strings_it_does_not_have():
    with pytest.raises(ValueError, match="has only 2 strings"):
        Regex("a|b").sample(3, random.Random(0))
    with pytest.raises(ValueError, match="has only 0 strings"):
        Regex("[^ -~]").sample(1, random.Random(0), unique=False)
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


def test_regex_compiles_and_samples_fast():
    rng = random.Random(0)
    patterns = [data.random_pattern(rng) for _ in range(50)]
    start = time.perf_counter()
    regexes = [Regex(pattern) for pattern in patterns]
    compiled = time.perf_counter()
    n = sum(len(regex.sample(700, rng)) for regex in regexes)
    assert (compiled - start) / 50 < 0.005 and n / (time.perf_counter() - compiled) > 100_000


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
                     n_inputs=n_tasks * n_mappings // 2, n_outputs=n_tasks * n_mappings // 2)
    tasks = data.random_tasks(cfg)
    languages = [set(r.sample(r.count, random.Random(0)))
                 for task in tasks for r in map(Regex, (*task.distributions, task.held_out))]
    assert len(languages) == n_tasks * (n_distributions + 1)
    assert len(set().union(*languages)) == sum(map(len, languages))


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
    assert len({len(x.instruction) for split in dataset.splits.values() for x in split.instances}) == 1


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
    once = set(split.labels("instruction"))
    assert {"task", "distribution"} <= once and not {"input", "output"} & once
    assert list(split.labels("answer")) == list(data.IDENTITIES)
    assert split.labels("instruction")["task"].tolist() == [split.instances[r].task for r in rows]


def test_tasks_file_round_trip_gives_the_same_data(tmp_path, dataset):
    data.write_tasks(tmp_path / "tasks.json", dataset.cut_into, dataset.tasks)
    again = make_dataset(DataConfig(tasks=str(tmp_path / "tasks.json")))
    assert again.tasks == dataset.tasks and again.vocabulary == dataset.vocabulary
    assert all((again.splits[name].tokens == dataset.splits[name].tokens).all() for name in dataset.splits)


WORDS = json.loads(re.search(r"```json\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.S)[1])


def test_the_tasks_file_of_the_readme_trains(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(WORDS))
    out = train.train(train.Config(tasks=str(tmp_path / "mine.json"), epochs=2, out=str(tmp_path / "run")))
    d = make_dataset(train.read_config(out))
    texts = [" ".join(d.vocabulary[i] for i in row) for row in d.splits["train"].tokens]
    assert any("New Zealand <ans> Wellington <eos>" in text for text in texts)
    assert {row["measure"] for row in probe.probe(out)} == {*probe.MEASURES, "knn_share"}


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
        return x @ w[name + ".weight"].T + w[name + ".bias"]

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
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_runs_a_fused_kernel_with_the_same_result(gpt):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    expected = gpt(IDX)[0]
    with sdpa_kernel(fused):                # raises if only the unfused kernel could run
        assert torch.allclose(gpt.cuda()(IDX.cuda())[0].cpu(), expected, atol=1e-3)
    gpt.cpu()


# ---------------------------------------------------------------- training


@given(st.integers(1, 5000), st.integers(1, 40))
def test_captures_are_about_n_from_start_to_end(total, n):
    steps = train.capture_steps(total, n)
    assert steps[0] == 0 and steps[-1] == total and steps == sorted(set(steps))
    assert len(steps) <= max(n, 3) and (len(steps) >= n - 1 or len(steps) == total + 1 or total < 4 * n)


def test_capture_schedule_is_logarithmic_then_linear():
    steps = train.capture_steps(360, 20)
    assert steps[:6] == [0, 1, 2, 4, 8, 16] and len(steps) == 20
    assert set(np.diff(steps[5:])) <= {24, 25}


def test_run_folder_is_laid_out_as_promised(run):
    rows, cfg = lines(run / "metrics.jsonl"), json.loads((run / "config.json").read_text())
    for name in "config.json", "tasks.json", "metrics.jsonl", "ckpt.pt", "states/labels.npz":
        assert (run / name).exists()
    assert set(rows[0]) == {"step", "epoch", "loss", "acc_subset", "acc_val", "acc_ood", "seconds"}
    assert set(cfg["versions"]) == {"python", "torch", "numpy"} and cfg["runs_on"] in ("cpu", "cuda")
    steps = train.capture_steps(rows[-1]["step"], 6)
    assert [row["step"] for row in rows] == steps
    assert {f"{step:06d}" for step in steps} | {"labels"} == {p.stem for p in (run / "states").iterdir()}
    assert not list(run.rglob("*.tmp"))


def load_model(run):
    d = make_dataset(train.read_config(run))
    net = model.GPT(model.ModelConfig(len(d.vocabulary), d.splits["val"].tokens.shape[1] - 1, 2, 2, 16))
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
        assert train.observe(net, split, batch=50)[0] == pytest.approx(right / len(split.tokens))


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
    again, other = trained("again"), trained("other", n_captures=3, eval_every=2)
    assert equal(weights, again[0]) and rows == again[1] and states == again[2]
    assert equal(weights, other[0]) and len(other[1]) > len(rows)
    assert not equal(weights, trained("seed", seed=1)[0])


def test_resuming_keeps_the_tasks_the_run_began_with(tmp_path, dataset):
    (tmp_path / "mine.json").write_text(json.dumps(WORDS))
    cfg = train.Config(tasks=str(tmp_path / "mine.json"), epochs=1, out=str(tmp_path / "run"))
    before = outcome(train.train(cfg))
    (tmp_path / "mine.json").unlink()
    (tmp_path / "run" / "ckpt.pt").unlink()
    after = outcome(train.train(cfg, resume=True))
    assert equal(before[0], after[0]) and before[1:] == after[1:]


def test_a_resumed_run_equals_one_never_stopped(run, tmp_path, monkeypatch):
    cfg = train.Config(**TINY, out=str(tmp_path / "stopped"))
    evaluate, calls = train.evaluate, itertools.count(1)

    def stop_at_4(*args):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", stop_at_4)
    with pytest.raises(KeyboardInterrupt):
        train.train(cfg)
    stopped = outcome(train.train(cfg, resume=True))
    weights, rows, states = outcome(run)
    assert equal(weights, stopped[0]) and rows == stopped[1] and states == stopped[2]
    assert outcome(train.train(cfg, resume=True))[1] == rows                # there is nothing left to do


@pytest.mark.parametrize("optimizer, loss_on", [("muon", "answer"), ("adamw", "all")])
def test_it_learns(tmp_path, optimizer, loss_on):
    out = train.train(train.Config(**{**TINY, "epochs": 150, "n_embd": 32, "lr": 6e-3}, optimizer=optimizer,
                                   loss_on=loss_on, out=str(tmp_path / "run")))
    rows = lines(out / "metrics.jsonl")
    assert rows[0]["acc_subset"] < 0.2 and rows[-1]["acc_subset"] > 0.9 and rows[-1]["acc_val"] > 0.6


def test_loss_counts_what_it_says(run):
    d = make_dataset(train.read_config(run))
    uniform = math.log(len(d.vocabulary))       # an untrained network knows nothing about any token
    rows = lines(run / "metrics.jsonl")
    assert rows[0]["loss"] is None and rows[1]["loss"] == pytest.approx(uniform, rel=0.02)


# ---------------------------------------------------------------- the probe


def exhaustive_inertia(x, k):
    """The least sum of squared distances to the means of k groups, over all ways to group the points."""
    best = math.inf
    for labels in itertools.product(range(k), repeat=len(x)):
        groups = [[p for p, label in zip(x, labels) if label == j] for j in range(k)]
        best = min(best, sum(((p - np.mean(g, 0)) ** 2).sum() for g in groups for p in g))
    return best


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_finds_the_best_grouping_of_a_few_points(seed):
    x = np.random.default_rng(seed).normal(size=(8, 2))
    assert probe.kmeans(x, 3, n_init=30)[2].item() == pytest.approx(exhaustive_inertia(x, 3), rel=1e-4)


def blobs(g, n, c, k, noise, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(g, k, c))[:, np.arange(n) % k]
    return (centres + noise * rng.normal(size=(g, n, c))).astype(np.float32)


@pytest.mark.parametrize("noise", [0.05, 1.0])
def test_kmeans_ends_where_lloyd_cannot_improve(noise):
    x = blobs(6, 120, 5, 7, noise)
    labels, centroids, inertia = (a.numpy() for a in probe.kmeans(x, 7))
    for g in range(6):
        d = ((x[g, :, None] - centroids[g]) ** 2).sum(-1)
        assert np.allclose(d[np.arange(120), labels[g]], d.min(1), atol=1e-4)
        assert inertia[g] == pytest.approx(d.min(1).sum(), rel=1e-4)
        for j in range(7):
            assert np.allclose(centroids[g, j], x[g, labels[g] == j].mean(0), atol=1e-4)


def test_kmeans_on_a_batch_gives_what_each_member_gives_alone():
    x = np.concatenate([blobs(3, 90, 4, 6, 0.7), blobs(3, 90, 4, 2, 0.1)]).reshape(2, 3, 90, 4)
    together = probe.kmeans(x, 6, seed=5)
    for i, j in itertools.product(range(2), range(3)):
        for a, b in zip(together, probe.kmeans(x[i, j], 6, seed=5)):
            assert torch.allclose(a[i, j].double(), b.double(), rtol=1e-4, atol=1e-5)


def test_kmeans_on_few_distinct_points_leaves_clusters_empty():
    x = np.repeat(np.random.default_rng(0).normal(size=(3, 6)), 40, 0)
    labels, centroids, inertia = probe.kmeans(np.stack([x, np.zeros_like(x)]), 5)
    assert sorted(Counter(labels[0].tolist()).values()) == [40, 40, 40] and set(labels[1].tolist()) == {0}
    assert all(len(set(labels[0, i:i + 40].tolist())) == 1 for i in (0, 40, 80))
    assert inertia.max() < 1e-9 and centroids.isnan().any(-1).sum(-1).tolist() == [2, 4]


def test_kmeans_sows_an_emptied_cluster_anew():
    x = torch.tensor([[[0.0], [1.0], [10.0], [11.0], [30.0]]])
    labels, centroids, inertia = probe._lloyd(x, torch.tensor([[[0.5], [10.5], [1000.0]]]), 100)
    assert len(set(labels[0].tolist())) == 3 and inertia.item() == pytest.approx(1.0)


def test_kmeans_refuses_what_has_no_answer():
    x = np.zeros((4, 2))
    for bad, k in (x, 5), (x, 0), (x + np.nan, 2), (x + np.inf, 2):
        with pytest.raises(ValueError):
            probe.kmeans(bad, k)


labelings = st.integers(2, 14).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 4), min_size=n, max_size=n)] * 2))


@given(labelings)
def test_f1_and_ari_equal_counting_pairs(labels):
    classes, clusters = labels
    tp = fp = fn = tn = 0
    for i, j in itertools.combinations(range(len(classes)), 2):
        same_class, same_cluster = classes[i] == classes[j], clusters[i] == clusters[j]
        tp, fp = tp + (same_class and same_cluster), fp + (not same_class and same_cluster)
        fn, tn = fn + (same_class and not same_cluster), tn + (not same_class and not same_cluster)
    assert probe.f1(*labels) == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1)
    below = (tp + fn) * (fn + tn) + (tp + fp) * (fp + tn)       # Hubert & Arabie in terms of pairs
    assert probe.ari(*labels) == pytest.approx(2 * (tp * tn - fn * fp) / below if below else 1)


def test_scores_of_the_textbook_table():
    classes = [0] * 8 + [1] * 5 + [2] * 4               # Manning, Raghavan & Schuetze, figure 16.4
    clusters = [0] * 5 + [1] + [2] * 2 + [0] + [1] * 4 + [1] + [2] * 3
    assert probe.contingency(classes, clusters).tolist() == [[5, 1, 2], [1, 4, 0], [0, 1, 3]]
    p, r = 20 / 40, 20 / 44         # 40 pairs are within a cluster, 44 within a class, 20 within both
    assert probe.f1(classes, clusters) == pytest.approx(2 * p * r / (p + r))
    assert probe.matched_f1(classes, clusters) == pytest.approx((10 / 14 + 8 / 11 + 6 / 9) / 3)
    assert probe.ari(classes, clusters) == pytest.approx((20 - 40 * 44 / 136) / (42 - 40 * 44 / 136))


@given(labelings)
def test_matched_f1_equals_trying_all_permutations(labels):
    n = probe.contingency(*labels)
    size = max(n.shape)
    table = np.pad(n, [(0, size - n.shape[0]), (0, size - n.shape[1])])
    sizes = np.add.outer(table.sum(1), table.sum(0))
    best = (-1, -1)
    for p in itertools.permutations(range(size)):
        f = sum(2 * table[i, j] / sizes[i, j] for i, j in enumerate(p) if sizes[i, j])
        f /= (table.sum(1) > 0).sum()
        best = max(best, (sum(table[i, j] for i, j in enumerate(p)), f))
    assert probe.matched_f1(*labels) == pytest.approx(best[1])


@given(st.integers(1, 6), st.integers(0, 10 ** 6), st.sampled_from([2, 50]))
def test_match_equals_brute_force(n, seed, high):
    value = np.random.default_rng(seed).integers(0, high, (5, n, n)).astype(float)
    for table, column in zip(value, probe.match(value)):
        assert sorted(column) == list(range(n))
        assert table[np.arange(n), column].sum() == max(
            sum(table[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(n)))


def test_match_takes_under_a_second_at_500_classes():
    rng = np.random.default_rng(0)
    for table in rng.poisson(0.1, (1, 500, 500)), rng.integers(0, 1000, (1, 500, 500)):
        start = time.perf_counter()
        probe.match(table.astype(float))
        assert time.perf_counter() - start < 1


@pytest.mark.parametrize("measure", probe.MEASURES.values(), ids=probe.MEASURES)
def test_measures_are_1_for_the_same_partition_and_at_chance_for_another(measure):
    rng = np.random.default_rng(0)
    classes = np.arange(1_000_000) % 10
    assert isinstance(measure(classes, classes), float)
    assert measure(classes, (classes + 3) % 10) == pytest.approx(1)
    assert measure(classes, rng.permutation(classes)) < {"ari": 1e-3}.get(measure.__name__, 0.102)
    batch = rng.integers(0, 4, (2, 3, 50))
    one_by_one = [[measure(classes[:50], batch[i, j]) for j in range(3)] for i in range(2)]
    assert np.allclose(measure(classes[:50], batch), one_by_one)
    for bad in ([0, 1], [0]), ([], []), ([0, -1], [0, 1]), ([0.5, 1], [0, 1]):
        with pytest.raises(ValueError):
            measure(*bad)


@given(st.integers(1, 30), st.integers(1, 10), st.integers(1, 30), st.integers(0, 10 ** 6))
def test_knn_equals_a_literal_loop_with_ties_by_index(n, q, k, seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(-3, 4, (m, 2)).astype(float) for m in (n, q))      # whole numbers: many exact ties
    if k > n:
        with pytest.raises(ValueError):
            probe.knn(a, b, k)
    else:
        expected = [sorted(range(n), key=lambda i: (((a[i] - p) ** 2).sum(), i))[:k] for p in b]
        assert probe.knn(a, b, k).tolist() == expected


def test_probe_rows_are_complete_and_layer_0_is_its_null(run):
    rows = probe.probe(run)
    assert rows == lines(run / "probe.jsonl")
    assert " ".join(rows[0]) == "step layer position split identity measure value null_mean null_95"
    captures, labels = probe.captured(run)
    identities = sum(len(of_split[name]) for of_split in labels.values() for name in train.CAPTURED)
    assert len(rows) == len(captures) * 3 * (identities * len(probe.MEASURES) + 2 * len(labels))
    for row in rows:
        assert row["null_mean"] <= row["null_95"] + 1e-9
        if row["layer"] == 0:               # before any attention all states at a position are one point
            assert row["value"] == pytest.approx(row["null_mean"], abs=0.02)


def test_knn_share_equals_counting(run):
    rows = {(r["step"], r["layer"], r["position"], r["split"]): r["value"] for r in probe.probe(run)
            if r["measure"] == "knn_share"}
    labels, last = np.load(run / "states" / "labels.npz"), max((run / "states").glob("0*.npz"))
    states = np.load(last)
    for position, split, layer in itertools.product(("instruction", "answer"), ("val", "ood"), (1, 2)):
        a, b = (states[f"{s}/{position}"][layer].astype(float) for s in ("subset", split))
        near = [np.argsort(((a - p) ** 2).sum(1), kind="stable")[:10] for p in b]
        tasks, own = labels[f"subset/{position}/task"], labels[f"{split}/{position}/task"]
        same = [tasks[i] == t for i, t in zip(near, own)]
        assert rows[int(last.stem), layer, position, split] == pytest.approx(np.mean(same), abs=0.01)


# ---------------------------------------------------------------- bad input


BAD_TASKS = {
    "not JSON": "{", "a list": "[]", "no tasks": {"tokens": "words"},
    "empty": {"tokens": "words", "tasks": []},
    "tokens": {**WORDS, "tokens": "bytes"}, "not an object": {"tokens": "words", "tasks": [3]},
    **{f"no {key}": {"tokens": "words", "tasks": [{k: v for k, v in WORDS["tasks"][0].items() if k != key}]}
       for key in data.Task._fields},
    "bad regex": {"tokens": "words", "tasks": [{**WORDS["tasks"][0], "held_out": "a(b"}]},
    "blank word": {"tokens": "words", "tasks": [{**WORDS["tasks"][0], "map": {"France": " "}}]},
    "same words": {"tokens": "words", "tasks": [{**WORDS["tasks"][0], "held_out": "a {1,40}b"}]},
    "same name": {"tokens": "words", "tasks": [WORDS["tasks"][0]] * 2},
    "overlap": {"tokens": "words", "tasks": [{**WORDS["tasks"][0], "held_out": "capital o[f-h]"}]},
    "regex not text": {"tokens": "words", "tasks": [{**WORDS["tasks"][0], "distributions": [7]}]},
    "too few strings": {"tokens": "words", "tasks": [{**WORDS["tasks"][0], "held_out": "only this"}]}}


@pytest.mark.parametrize("module, argv", [
    *[(data, argv) for argv in (
        "--no-such-flag", "--n-tasks many", "--n-mappings 11", "--n-tasks 1", "--n-val 0", "--n-train 5",
        "--n-outputs 500", "--tasks no.json", "--n-train 800", "--max-len 5")],
    *[(train, argv) for argv in (
        "--preset huge", "--n-embd 66", "--epochs 0", "--optimizer sgd", "--n-train 800", "--lr nan",
        "--warmup 1", "--lr inf", "--device tpu", "--resume", "--n-mappings 11", "--n-lay 3", "--tasks .",
        "--n-head 0", "--seed x")],
    *[(probe, argv) for argv in ("", "nowhere", ".", "a b", "--k 3")]])
def test_bad_flags_give_one_line_and_status_2_and_write_nothing(module, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_status(module, *argv.split()) == 2
    assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spec", BAD_TASKS.values(), ids=BAD_TASKS)
def test_a_bad_tasks_file_gives_one_line_that_names_it(spec, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text(spec if isinstance(spec, str) else json.dumps(spec))
    assert exit_status(train, "--tasks", "mine.json") == 2
    assert re.fullmatch(r"error: (mine\.json|task capital)[^\n]+\n", capsys.readouterr().err)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.json"]


def test_a_run_in_the_way_is_not_overwritten(run, capsys):
    before = outcome(run)[1]
    assert exit_status(train, "--out", run) == 2 and "--resume" in capsys.readouterr().err
    assert exit_status(train, "--out", run, "--resume", "--lr", 1) == 2
    assert "another lr" in capsys.readouterr().err
    assert outcome(run)[1] == before


def test_commands_run_from_the_shell(tmp_path):
    def shell(*argv):
        return subprocess.run([sys.executable, *map(str, argv)], cwd=HERE, capture_output=True, text=True)

    page = shell("data.py")
    assert page.returncode == 0 and page.stdout.count("<ans>") == 20 and len(page.stdout.splitlines()) < 60
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in TINY.items()]
    trained = shell("train.py", "--preset", "quick", "--out", tmp_path / "run", *flags)
    assert trained.returncode == 0 and trained.stdout.endswith(f"next: python probe.py {tmp_path / 'run'}\n")
    probed = shell("probe.py", tmp_path / "run")
    assert probed.returncode == 0 and "null: labels permuted" in probed.stdout and not probed.stderr
    wrong = shell("train.py", "--frobnicate")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stderr.startswith("error: ")
