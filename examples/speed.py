"""How fast is this project, next to its first edition, transformers and scikit-learn? How does it scale?

    make speed          takes half an hour; run nothing else meanwhile

Everything is timed three times, in turns, so that whatever slows the machine down affects all alike. Writes
speed.jsonl and memory.jsonl to runs/speed. examples/peer.py does the default run's job with those libraries.
"""
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from runs import BadInput, Flags, as_rows, command_line, print_table, select, write_rows

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

from data import make_dataset
from peer import make_gpt2
from probe import kmeans, read_states
from train import Config, make_model

HERE = Path(__file__).parents[1]
JOB = "{python} train.py --out {out} && {python} probe.py {out}"
# runs a script, then prints its peak memory; getrusage would include the process it was forked from
MEASURED = """{python} -c "import runpy, sys; del sys.argv[0]; sys.path[0] = ''
runpy.run_path(sys.argv[0], run_name='__main__'); print(open('/proc/self/status').read())" """
TRAIN = MEASURED + "train.py --out {out} --n-tasks {n} --n-inputs 20 --n-outputs 40 --steps 100 --n-captures 2"
PROBE = MEASURED + "probe.py {out}"


def run(command, where, **names):
    """Run a shell command in a folder; return the seconds it takes and its output."""
    begun = time.perf_counter()
    done = subprocess.run(command.format(python=sys.executable, **names), shell=True, cwd=where,
                          stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise BadInput(f"in {where}, this command failed, see above: {command}")
    return time.perf_counter() - begun, done.stdout


def time_steps(network, logits_of, tokens):
    """Median milliseconds of a training step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=True)
    times = []
    for _ in range(60):
        begun = time.perf_counter()
        logits = logits_of(network(tokens[:, :-1]))
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def time_kmeans(x, k, seed):
    """Seconds that our k-means and scikit-learn's need for x (G, N, C), and our inertia / theirs."""
    begun = time.perf_counter()
    ours = kmeans(x, k, seed=seed)[2]
    between = time.perf_counter()
    theirs = [KMeans(k, n_init=8, random_state=seed).fit(points).inertia_ for points in x.numpy()]
    ended = time.perf_counter()
    ratio = (ours / torch.tensor(theirs)).mean().item()
    return {"this project": between - begun, "libraries": ended - between}, ratio


def main():
    """Time this project against others, three times."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("--first", required=True, help="folder with the first edition, commit 909407e")
    flags.add_argument("--out", default="runs/speed", help="folder for the runs (default: runs/speed)")
    given = flags.parse_args()
    out = Path(given.out).absolute()
    cfg = Config()
    data = make_dataset(cfg)
    tokens = torch.from_numpy(data.splits["train"].tokens[:cfg.batch_size])
    gpt2 = make_gpt2(cfg, len(data.vocabulary), tokens.shape[1])
    rows, memory = [], []
    for seed in range(3):
        name = f"{out}/{time.time_ns()}"                        # a name no run has yet
        job = {"this project": run(JOB, HERE, out=name)[0],
               "first edition": run(JOB, given.first, out=f"{name}-first")[0],
               "libraries": run("{python} examples/peer.py", HERE)[0]}
        step = {"this project": time_steps(make_model(cfg, data), lambda out: out[0], tokens),
                "libraries": time_steps(gpt2, lambda out: out.logits, tokens)}
        x = read_states(name, [cfg.steps], "val/answer", len(data.splits["val"].instances))[0, 1:].float()
        clustering, inertia = time_kmeans(x, 16, seed)
        for measure, times in ("default run, s", job), ("step, ms", step), ("k-means, s", clustering):
            for arm, value in times.items():
                rows += as_rows({"seed": seed, "arm": arm}, {
                    measure: value, f"{measure}, ratio": value / times["this project"]})
        rows += as_rows({"seed": seed, "arm": "this project"}, {"inertia, ratio": inertia})
        for n in 16, 32, 64, 128:
            for measure, command in ("train", TRAIN), ("probe", PROBE):
                seconds, printed = run(command, HERE, n=n, out=f"{name}-{n}")
                peak = int(printed.split("VmHWM:")[1].split()[0]) / 1024            # from KiB
                rows += as_rows({"seed": seed, "arm": measure, "n_tasks": n}, {"s": seconds})
                if seed == 0:                                   # memory is measured once
                    memory += as_rows({"arm": measure, "n_tasks": n}, {"MiB": peak})
        write_rows(out / "speed.jsonl", rows)
        write_rows(out / "memory.jsonl", memory)
    print_table("Compared with others", select(rows, n_tasks=None), "measure")
    for title, some in ("seconds", select(rows, measure="s")), ("peak memory, MiB", memory):
        print_table(f"By number of tasks, {title}", some, "n_tasks")


if __name__ == "__main__":
    command_line(main)
