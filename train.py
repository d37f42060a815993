"""Train a causal language model on instructions, and keep its hidden states along the way.

    python train.py                                   the default run, into runs/default
    python train.py --preset quick                    seconds, into runs/quick; also: facts, and large (a GPU)
    python train.py --tasks mine.json --n-layer 6     your own tasks, any knob (--help lists them)
    python train.py --resume                          go on where a run was stopped
    torchrun --standalone --nproc_per_node=2 train.py     two processes share every batch, and one writes

Figures 2 and 3 of the paper start here: the loss, the accuracies, and the captures that probe.py reads. Our
choices, since the paper fixes none of it: the sizes, Muon for the blocks' matrices (it needs half the epochs
that AdamW does), a rate that warms up and then falls linearly.
"""
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import platform
import random
import shutil
import signal
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn         # before there is a group: if DDP imports it later, it keeps the group
import torch.nn.functional as F

from data import DataConfig, Dataset, Flags, Split, command_line, knob, make_dataset, write, write_tasks
from model import GPT, ModelConfig

# ---------------------------------------------------------------- configuration

CAPTURED = "subset", "val", "ood"       # the splits whose states are kept; of `pairs`, the accuracy only


@dataclass
class Config(DataConfig):
    """Every knob of a run: the data's, and these."""
    out: str = knob("runs/default", "run folder")
    start: str = knob("", "a run whose last weights to begin with; of embeddings, the rows that both have")
    n_layer: int = knob(4, "blocks", most=1000)
    n_head: int = knob(4, "attention heads a block")
    n_embd: int = knob(64, "width", most=2 ** 14)
    epochs: int = knob(20, "passes over the training instances, if --steps is not given")
    steps: int = knob(0, "training steps; 0: as many as epochs says", least=0)
    batch_size: int = knob(256, "instances a step")
    loss_on: str = knob("all", "all: every next token, a causal language model; answer: the output alone",
                        choices=("all", "answer"))
    optimizer: str = knob("muon", "muon: Muon for the blocks' matrices, AdamW for the rest; adamw: no Muon",
                          choices=("muon", "adamw"))
    lr: float = knob(3e-3, "peak learning rate of AdamW")
    muon_lr: float = knob(0.02, "peak learning rate of Muon")
    weight_decay: float = knob(0.1, "decoupled weight decay of both")
    warmup: float = knob(0.1, "share of the steps in which the rate rises, before it falls to 0", most=0.99)
    precision: str = knob("auto", "of a training step's products: float32, bfloat16 (weights stay float32), "
                          "or auto, which is bfloat16 on cuda", choices=("auto", "float32", "bfloat16"))
    n_captures: int = knob(20, "how often the states are kept, about")
    eval_every: int = knob(0, "steps between evaluations, with a checkpoint each, besides those at captures; "
                           "0: no others", least=0)
    init_seed: int = knob(-1, "of the initial weights, if not --seed", least=-1, most=2 ** 63)
    order_seed: int = knob(-1, "of the order of the instances, if not --seed", least=-1, most=2 ** 63)
    device: str = knob("auto", "cpu, cuda, or auto: cuda if there is one", choices=("auto", "cpu", "cuda"))


PRESETS = {
    "quick": dict(out="runs/quick", n_tasks=8, n_distributions=2, n_layer=3, n_head=3, n_embd=48, epochs=30,
                  n_captures=10),
    "default": {},
    "facts": dict(tasks="facts.json", out="runs/facts", n_val=6, epochs=15, n_captures=14),
    "large": dict(out="runs/large", n_tasks=512, n_distributions=4, n_inputs=64, n_outputs=256, n_val=5,
                  n_layer=8, n_head=8, n_embd=256, batch_size=1024, epochs=10, n_captures=12, eval_every=100),
}


def make_generator(*key) -> torch.Generator:
    """A generator for each purpose, e.g. (seed, "order", epoch): no draw depends on any other."""
    return torch.Generator().manual_seed(random.Random("/".join(map(str, key))).getrandbits(63))


def capture_steps(total: int, n: int) -> list[int]:
    """About n steps from 0 to total: powers of two while those are denser than even steps, then these."""
    steps, n = [0, 1], min(n, total + 1)
    while len(steps) < n // 2 and 2 * steps[-1] <= (total - steps[-1]) / (n - len(steps)):
        steps.append(2 * steps[-1])
    even = np.linspace(steps[-1], total, max(2, n - len(steps) + 1)).round()
    return sorted({*steps, *even.astype(int).tolist()})


def pick_device(wanted: str = "auto") -> torch.device:
    """Where to run; every process of torchrun's has a GPU of its own. Raises ValueError if there is none."""
    if wanted == "cpu" or wanted == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    number, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= there:
        raise ValueError(f"CUDA device {number} is wanted, {there} are here: use --device cpu"
                         + ", or start fewer processes" * (number > 0))
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


# ---------------------------------------------------------------- the run folder


def read_config(run: str | Path) -> Config:
    """The configuration of a run folder. Raises ValueError if it is not one."""
    try:
        stored = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
        stored["versions"]      # every run has it; a knob that came after the run has its default
        return Config(**{key.name: stored.get(key.name, key.default) for key in dataclasses.fields(Config)})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{run} is not a run folder, make one with train.py (config.json: {e!r})") from None


def read_rows(path: str | Path, *columns: str) -> list[dict]:
    """The rows of a .jsonl file. Raises ValueError, naming it, if one is damaged or lacks a column."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        if not all(key in row for row in rows for key in columns):
            raise ValueError("every row needs " + ", ".join(columns))
        return rows
    except (ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{path} is damaged, make it again: {e!r:.200}") from None


def write_rows(path: str | Path, rows: list[dict]):
    """Write a .jsonl file."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_arrays(path: str | Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, all or those with these names. Raises ValueError, naming it, if damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names or arrays.files}
    except Exception as e:          # a file that was cut short can raise nearly anything
        raise ValueError(f"{path} cannot be read, train the run again: {e!r}") from None


def write_arrays(path: Path, arrays: dict[str, np.ndarray]):
    """Write an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write(path, buffer.getvalue())


def capture_path(run: str | Path, step: int) -> Path:
    """Where the capture of a step is kept."""
    return Path(run) / "states" / f"{step:06d}.npz"


def kept_steps(run: str | Path) -> list[int]:
    """The steps whose captures are there."""
    return sorted(int(path.stem) for path in (Path(run) / "states").glob("[0-9]*.npz"))


def labels_of(data: Dataset) -> dict[str, np.ndarray]:
    """The content of labels.npz: "split/position/identity" -> (n,), a label for each state of a capture."""
    return {f"{name}/{position}/{identity}": ids
            for name in CAPTURED for position in data.splits[name].positions
            for identity, ids in data.splits[name].labels(position).items()}


def digest(data: Dataset) -> str:
    """Tells data sets apart: a hash of all their tokens, as numbers, not of how the words are spelt."""
    return hashlib.sha256(b"".join(split.tokens.tobytes() for split in data.splits.values())).hexdigest()


def read_data(run: str | Path, data: Dataset | None = None) -> Dataset:
    """The data of a run folder: made again from its tasks.json, or what `train` was given for it.

    Raises ValueError if it is not the same as then.
    """
    data = data or make_dataset(dataclasses.replace(read_config(run), tasks=str(Path(run) / "tasks.json")))
    if json.loads((Path(run) / "config.json").read_text(encoding="utf-8")).get("data") != digest(data):
        raise ValueError(f"{run}: tasks.json, config.json or data.py has changed since, or it was taught "
                         "other data, which `train` was given: train again, or give it")
    made = labels_of(data)
    for name, ids in read_arrays(Path(run) / "states" / "labels.npz").items():
        if not np.array_equal(ids, made.get(name)):
            raise ValueError(f"{run}: {name} in labels.npz does not fit its other files: train again")
    return data


def begin(cfg: Config, data: Dataset, device: torch.device):
    """Make a run folder, aside and then in one move, with all that does not change while it is trained."""
    out = Path(cfg.out)
    aside = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    about = {**vars(cfg), "data": digest(data), "runs_on": str(device), "threads": torch.get_num_threads(),
             "processes": processes()[1], "versions": versions}
    shutil.rmtree(aside, ignore_errors=True)
    try:
        (aside / "states").mkdir(parents=True)
        write(aside / "config.json", json.dumps(about, indent=1) + "\n")
        write_tasks(aside / "tasks.json", data.cut_into, data.tasks)
        write_arrays(aside / "states" / "labels.npz", labels_of(data))
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)        # there is something only if that failed


def hold(out: Path):
    """Keep a run folder to this process for as long as the file that is returned is open, kill or no kill."""
    file = open(out / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{out} is being trained by another process: wait for it, or stop it") from None
    return file


def restore(cfg: Config, out: Path, model: GPT, optimizers: list[torch.optim.Optimizer]):
    """Set model and optimisers to a run's checkpoint; return its step, metrics, sum of losses, and seconds.

    That is 0, [], 0.0, 0.0 if there is none. Raises ValueError for a checkpoint that is damaged, or is of
    another configuration.
    """
    if not (out / "ckpt.pt").exists():
        return 0, [], 0.0, 0.0
    try:
        with zipfile.ZipFile(out / "ckpt.pt") as parts:     # torch does not look at the checksums it writes
            if bad := parts.testzip():
                raise ValueError(f"{bad} has changed")
        saved = torch.load(out / "ckpt.pt", map_location=model.token.weight.device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            if "param_groups" in state:
                raise ValueError("it is of an older train.py")
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        step, rows, losses, seconds = (saved[key] for key in ("step", "rows", "losses", "seconds"))
        changed = [key for key, x in vars(cfg).items()
                   if key not in ("out", "device") and saved["config"].get(key, x) != x]
        lost = sorted({*saved["captures"]} - {*kept_steps(out)})
        if changed or lost:
            raise ValueError(f"config.json has another {', '.join(changed)}" if changed else
                             f"the capture of step {lost[0]} is lost")
    except Exception as e:          # a damaged file can raise nearly anything
        raise ValueError(f"{out}/ckpt.pt is damaged or does not fit, begin another --out: {e!r:.200}"
                         ) from None
    return step, rows, losses, seconds


def record(stepper: "Stepper", out: Path, step: int, rows: list[dict], losses: float, seconds: float):
    """Write a checkpoint, all that `restore` gives back, and the metrics so far."""
    buffer = io.BytesIO()
    torch.save({"step": step, "rows": rows, "losses": losses, "seconds": seconds, "captures": kept_steps(out),
                "config": vars(stepper.cfg), "model": stepper.model.state_dict(),
                "optimizers": [optimizer.state_dict()["state"] for optimizer in stepper.optimizers]}, buffer)
    write(out / "ckpt.pt", buffer.getvalue())
    write_rows(out / "metrics.jsonl", rows)


def read_model(run: str | Path, data: Dataset, device: torch.device) -> GPT:
    """The network of a run as it was last saved. Raises ValueError if there is no sound checkpoint."""
    cfg = read_config(run)
    model = make_model(cfg, data).to(device)
    if not restore(cfg, Path(run), model, [])[1]:
        raise ValueError(f"{run} has no checkpoint: train it first")
    return model


def begin_with(run: str | Path, model: GPT, data: Dataset):
    """Give a model the weights of another run; of the two embeddings only the rows that both have.

    Raises ValueError if that run is not sound, or its blocks are not like the model's.
    """
    cfg, of_run = read_config(run), read_data(run)
    other = [key for key in ("n_layer", "n_head", "n_embd") if getattr(cfg, key) != getattr(model.cfg, key)]
    if other:
        raise ValueError(f"start: {run} has another {', '.join(other)}: give the same")
    own, old = model.state_dict(), read_model(run, of_run, model.token.weight.device).state_dict()
    id_of = {token: i for i, token in enumerate(of_run.vocabulary)}
    both = [(i, id_of[token]) for i, token in enumerate(data.vocabulary) if token in id_of]
    mine, theirs = map(list, zip(*both))
    n = min(model.cfg.block_size, len(old["position.weight"]))
    own["token.weight"][mine] = old["token.weight"][theirs]
    own["position.weight"][:n] = old["position.weight"][:n]
    model.load_state_dict({**old, **{key: own[key] for key in ("token.weight", "position.weight")}})


def prepare(cfg: Config, resume: bool, data: Dataset | None) -> tuple[Dataset, torch.device]:
    """The data and the device of a run, or a ValueError if it cannot be, or if a folder is in the way."""
    cfg.check()
    out = Path(cfg.out)
    if resume:
        changed = [key for key, x in vars(read_config(out)).items()
                   if key not in ("out", "device") and x != vars(cfg)[key]]
        if changed:
            raise ValueError(f"{out} was begun with another {', '.join(changed)}: leave that out to go on, "
                             "or choose another --out")
    elif out.exists():
        raise ValueError(f"{out} exists: choose another --out, delete it, or go on with it by --resume")
    # a run goes on with the tasks it began with, whatever has become of the file they came from
    return (read_data(out, data) if resume else data or make_dataset(cfg)), pick_device(cfg.device)


# ---------------------------------------------------------------- what is measured


@torch.no_grad()
def observe(model: GPT, split: Split, batch: int = 512) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Which instances are answered right, (N,) bool, and position -> (L + 1, n, C) float16 states.

    Task accuracy is the share of the right ones. The greedy output is exactly the true one if, and only if,
    each of its tokens and the <eos> after it is the likeliest next token given the true ones before it: one
    forward pass tells.
    """
    device, cfg = model.token.weight.device, model.cfg
    tokens, is_output = (torch.from_numpy(x).to(device) for x in (split.tokens, split.is_output))
    places = {name: torch.from_numpy(np.stack(at)).to(device)           # (2, n)
              for name, at in split.positions.items()}
    # a GPU copies into pinned memory while it goes on computing
    states = {name: torch.empty(cfg.n_layer + 1, at.shape[1], cfg.n_embd, dtype=torch.float16,
                                pin_memory=device.type == "cuda") for name, at in places.items()}
    right = []
    for start in range(0, len(tokens), batch):
        some = slice(start, start + batch)
        logits, layers = model(tokens[some, :-1])           # (B, T - 1, V), L + 1 times (B, T - 1, C)
        right.append(~((logits.argmax(-1) != tokens[some, 1:]) & is_output[some, 1:]).any(1))
        for name, (rows, _) in split.positions.items():
            mine = slice(*np.searchsorted(rows, (start, start + batch)))
            row, column = places[name][:, mine]
            for kept, x in zip(states[name], layers):
                kept[mine].copy_(x[row - start, column].half(), non_blocking=True)
    right = torch.cat(right).cpu().numpy()                              # waits for the copies, too
    return right, {name: x.numpy() for name, x in states.items()}


def evaluate(model: GPT, data: Dataset, out: Path, step: int, keep: bool) -> dict[str, float]:
    """Task accuracy on every split but train; if keep, the states become the capture of this step."""
    seen = {name: observe(model, split) for name, split in data.splits.items() if name != "train"}
    if keep:
        write_arrays(capture_path(out, step), {
            f"{name}/{position}": x for name in CAPTURED for position, x in seen[name][1].items()})
    return {f"acc_{name}": float(right.mean()) for name, (right, _) in seen.items()}


# ---------------------------------------------------------------- training


def make_model(cfg: Config, data: Dataset) -> GPT:
    """The network of a run, with its initial weights."""
    length = data.splits["train"].tokens.shape[1] - 1           # the last token has nothing to predict
    return GPT(ModelConfig(len(data.vocabulary), length, cfg.n_layer, cfg.n_head, cfg.n_embd),
               make_generator(cfg.seed_of("init"), "weights"))


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices: a mean of the gradients, made orthogonal, is the update.

    It does what torch.optim.Muon does, but faster, as matrices of one shape go together, and takes its rate
    from a tensor on the device, as a CUDA graph must.
    """

    def __init__(self, params, lr: torch.Tensor, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """Update the parameters by their gradients."""
        [group], alike = self.param_groups, {}
        momentum, keep = group["momentum"], 1 - group["lr"] * group["weight_decay"]
        for p in group["params"]:
            alike.setdefault(p.shape, []).append(p)
        for (m, n), params in alike.items():
            grads = torch.stack([p.grad for p in params])
            state = self.state[params[0]]                       # of all of this shape
            if not state:
                state["mean"] = torch.zeros_like(grads)
            state["mean"].lerp_(grads, 1 - momentum)
            updates = orthogonal(grads.lerp(state["mean"], momentum)).float()
            rate = -group["lr"] * max(1, m / n) ** 0.5
            for p, update in zip(params, updates):
                p.mul_(keep).addcmul_(update, rate)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Matrices (..., m, n) -> the same with singular values brought near 1 (0.5 to 1.5), in bfloat16.

    Five steps of a quintic Newton-Schulz iteration, with the coefficients of Jordan et al.: it takes products
    alone, no decomposition.
    """
    x, tall = x.bfloat16(), x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def make_optimizers(model: GPT, cfg: Config) -> list[torch.optim.Optimizer]:
    """AdamW, then Muon for the blocks' matrices. Their rates are tensors, which `Stepper` sets."""
    muon = [p for p in model.blocks.parameters() if p.dim() == 2] if cfg.optimizer == "muon" else []
    rest = [p for p in model.parameters() if all(p is not q for q in muon)]
    device, cuda = model.token.weight.device, model.token.weight.is_cuda
    # AdamW's kernel for CUDA wants its rate in single precision
    rate = torch.zeros((), dtype=torch.float32 if cuda else torch.float64, device=device)
    adamw = torch.optim.AdamW(rest, rate, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True,
                              capturable=cuda)
    return [adamw, Muon(muon, rate.clone(), cfg.weight_decay)] if muon else [adamw]


class Stepper:
    """Takes a training step whenever it is called: batch, forward, backward, schedule, optimisers.

    All it needs is on the device, even which step it is, and nothing is read back, so that the host can go
    ahead of a GPU. Where torchrun started several processes, each takes its share of every batch. Raises
    ValueError if there are more processes than instances in a batch.
    """

    def __init__(self, cfg: Config, data: Dataset, model: GPT):
        self.cfg, self.model, self.optimizers = cfg, model, make_optimizers(model, cfg)
        device, split = model.token.weight.device, data.splits["train"]
        self.bfloat16 = cfg.precision == "bfloat16" or cfg.precision == "auto" and device.type == "cuda"
        scored = split.is_output if cfg.loss_on == "answer" else split.tokens != 0      # 0 is <pad>
        self.tokens = torch.from_numpy(split.tokens).to(device)                         # (N, T)
        self.targets = torch.from_numpy(np.where(scored, split.tokens, -100)).to(device)    # -100: not scored
        self.batch = min(cfg.batch_size, len(self.tokens))
        self.per_epoch = len(self.tokens) // self.batch         # the rest waits for another epoch's order
        self.total = cfg.steps or cfg.epochs * self.per_epoch
        self.order = torch.zeros(len(self.tokens), dtype=torch.int64, device=device)
        self.in_batch = torch.arange(self.batch, device=device)
        self.at = torch.zeros((), dtype=torch.float64, device=device)   # the step to come
        self.losses = torch.zeros_like(self.at)                         # sum since `take_losses`
        self.rank, self.world = processes()
        if self.batch < self.world:
            raise ValueError(f"{self.world} processes cannot share {self.batch} instances: start fewer")
        # what is called, in place of the model: DDP averages the gradients over the processes
        self.net = torch.nn.parallel.DistributedDataParallel(model) if self.world > 1 else model

    def shuffle(self, at: int):
        """Set the step to come and the order of its epoch: call it at first, and whenever an epoch begins."""
        generator = make_generator(self.cfg.seed_of("order"), "order", at // self.per_epoch)
        order = torch.randperm(len(self.order), generator=generator, pin_memory=self.order.is_cuda)
        self.order.copy_(order, non_blocking=True)
        self.at.fill_(at)

    def __call__(self):
        """Take the step `at`, and add its mean loss over the scored tokens of the batch to `losses`."""
        chosen = self.order[(self.at % self.per_epoch).long() * self.batch + self.in_batch]     # (B,)
        mine = chosen[self.rank::self.world]
        with torch.autocast(self.at.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits, _ = self.net(self.tokens[mine, :-1])                                # (B, T - 1, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), self.targets[mine, 1:].flatten(),
                               ignore_index=-100, reduction="sum")
        # mean over the scored tokens of the whole batch; times world, by which DDP divides
        loss = loss * self.world / (self.targets[chosen, 1:] != -100).sum()
        loss.backward()
        warmup = self.cfg.warmup
        rate = torch.minimum((self.at + 1) / max(1, warmup * self.total),
                             (self.total - self.at) / ((1 - warmup) * self.total))
        for optimizer, peak in zip(self.optimizers, (self.cfg.lr, self.cfg.muon_lr)):
            optimizer.param_groups[0]["lr"].copy_(rate * peak)
            optimizer.step()
            optimizer.zero_grad()
        self.losses += loss.detach()
        self.at += 1

    def take_losses(self) -> float:
        """The sum of the losses since this was last called; waits for the device, and for other processes.

        Raises ValueError if it or a weight is nan or infinite.
        """
        if self.world > 1:
            dist.all_reduce(self.losses)
        losses = self.losses.item() / self.world        # each has been multiplied by it
        self.losses.zero_()
        if not (math.isfinite(losses) and all(x.isfinite().all() for x in self.model.parameters())):
            raise ValueError(f"the loss or a weight is nan or infinite by step {self.at.item():.0f}: "
                             "begin another --out with a lower --lr or --muon-lr (the last good checkpoint "
                             "is kept)")
        return losses


def processes() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def replayed(step):
    """A function for CUDA that does what step does, in one launch.

    The first three calls run it, in which libraries set themselves up; the next records it as a CUDA graph;
    this is replayed then and ever after.
    """
    calls, graph, stream = itertools.count(), torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def take():
        call = next(calls)
        if call < 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if call == 3:
                with torch.cuda.graph(graph, stream=stream):    # records, runs nothing
                    step()
            graph.replay()
    return take


def train(cfg: Config, resume: bool = False, stop: list = (), data: Dataset | None = None) -> Path:
    """Train as cfg says, or go on with the run in cfg.out; return that folder, laid out as README.md tells.

    `data`, if given, is taught in place of what cfg describes (splits train, subset, val, ood, and any more);
    whoever goes on with the run or reads it gives it again. Once `stop` is not empty, the run is saved and
    KeyboardInterrupt raised, if this is the only process. Raises ValueError for a loss that is not finite,
    and, with nothing written, for a configuration that cannot be or a folder in the way.
    """
    data, device = prepare(cfg, resume, data)
    out = Path(cfg.out)
    model = make_model(cfg, data).to(device)
    if cfg.start and not (out / "ckpt.pt").exists():
        begin_with(cfg.start, model, data)
    torchrun, cuda = dist.is_torchelastic_launched(), device.type == "cuda"
    if torchrun:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    stepper = Stepper(cfg, data, model)
    if stepper.rank == 0 and not resume:
        begin(cfg, data, device)
    with hold(out) if stepper.rank == 0 else contextlib.redirect_stdout(None):      # one writes and prints
        loop(stepper, data, out, stop)
    if torchrun:
        del stepper                         # with DDP: nothing may hold the group, whose threads end with it
        dist.destroy_process_group()        # not after an error: it would wait for the others
    return out


def loop(stepper: Stepper, data: Dataset, out: Path, stop: list):
    """Take the steps that a run still lacks, and evaluate, capture and record on the way; for `train`."""
    cfg, total, per_epoch = stepper.cfg, stepper.total, stepper.per_epoch
    captures = capture_steps(total, cfg.n_captures)
    print_header(stepper, data, len(captures))
    first, rows, losses, seconds = restore(cfg, out, stepper.model, stepper.optimizers)
    if stepper.world > 1:
        dist.barrier()                                  # all have read before one writes
    if stepper.rank == 0:
        write_rows(out / "metrics.jsonl", rows)         # whatever has become of them
    due = {*range(0, total, cfg.eval_every or total), *captures} - {row["step"] for row in rows}
    stepper.losses.fill_(losses)
    tokens_each = (stepper.tokens != 0).sum().item() / len(stepper.tokens)      # of an instance
    # a graph that spans processes is more than `replayed` sets up
    step = replayed(stepper) if stepper.at.is_cuda and stepper.world == 1 else stepper
    launched = clock = time.perf_counter()              # the clock stops while it is not training
    for at in range(first, total + 1):
        if at in due:
            losses = stepper.take_losses()
            seconds += time.perf_counter() - clock
            if stepper.rank == 0:
                loss = losses / (at - rows[-1]["step"]) if rows else None
                rows.append({"step": at, "epoch": at / per_epoch, "loss": loss,
                             **evaluate(stepper.model, data, out, at, at in captures), "seconds": seconds})
                record(stepper, out, at, rows, 0.0, seconds)
                left = (total - at) * (time.perf_counter() - launched) / (at - first) if at > first else None
                print_row(rows[-1], total, at * stepper.batch * tokens_each / seconds, left)
            clock = time.perf_counter()
        if at == total:
            break
        if stop and stepper.world == 1:
            losses = stepper.take_losses()
            record(stepper, out, at, rows, losses, seconds + time.perf_counter() - clock)
            print(f"stopped and saved at step {at}; to go on: python train.py --resume --out {out}")
            raise KeyboardInterrupt
        if at == first or at % per_epoch == 0:
            stepper.shuffle(at)
        step()
    print(f"done; next: python probe.py {out}")


def print_header(stepper: Stepper, data: Dataset, n_captures: int):
    """What is about to be trained, and the columns of `print_row`."""
    cfg, device = stepper.cfg, stepper.at.device
    size = 2 * cfg.n_embd * (cfg.n_layer + 1) * sum(
        len(read) for name in CAPTURED for read, _ in data.splits[name].positions.values())
    weights = sum(p.numel() for p in stepper.model.parameters())
    shared = f", {stepper.world} processes" if stepper.world > 1 else ""
    print(f"{cfg.out}: {weights:,} parameters, {stepper.total} steps of {stepper.batch} instances on "
          f"{device.type}{' in bfloat16' if stepper.bfloat16 else ''}{shared}; {n_captures} captures, "
          f"{n_captures * size / 1e6:.0f} MB\n\n"
          "       step  epoch    loss" + "".join(f"{name:>8}" for name in data.splits if name != "train")
          + "  tokens/s    left", flush=True)


def print_row(row: dict, total: int, speed: float, left: float | None):
    """One line an evaluation, under `print_header`."""
    loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
    accuracies = "".join(f"{value:8.3f}" for key, value in row.items() if key.startswith("acc_"))
    print(f"{row['step']:5}/{total:<5}{row['epoch']:7.1f}{loss:>8}{accuracies}{speed:10,.0f}"
          + (f"{'-':>8}" if left is None else f"{left:7.0f}s"), flush=True)


def main():
    """Train a causal language model on instructions and keep its hidden states."""
    flags = Flags(Config, description=main.__doc__)
    flags.add_argument("--preset", choices=PRESETS, default="default", help="what the other flags start from")
    flags.add_argument("--resume", action="store_true", help="go on with the run in --out, as it was begun")
    given = vars(flags.parse_args())
    preset, resume = PRESETS[given.pop("preset")], given.pop("resume")
    given.setdefault("out", preset.get("out", Config.out))
    cfg = read_config(given["out"]) if resume else Config(**preset)
    stop = []                       # Ctrl-C asks to save and stop after the step; a second one stops at once

    def ask(*_):
        stop.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # of several processes, one that stopped after its step would leave the others waiting
    torchrun = dist.is_torchelastic_launched()
    before = signal.signal(signal.SIGINT, signal.default_int_handler if torchrun else ask)
    try:
        train(dataclasses.replace(cfg, **given), resume, stop)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        again = "go on with --resume" if Path(given["out"]).exists() else "run this again"
        raise ValueError(f"{e.filename or 'stdout'}: {e.strerror}; make room, then {again}") from None
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    command_line(main)
