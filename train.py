"""Train a causal language model on instructions and keep its hidden states along the way.

    python train.py                                   the default run, into runs/default
    python train.py --preset quick                    a smaller run, into runs/quick; also: facts, large
    python train.py --tasks mine.json --n-layer 6     your own tasks, any knob (--help lists them)
    python train.py --resume                          go on from the last evaluation of a run that was stopped
    torchrun --standalone --nproc_per_node=2 train.py     two processes share every batch, and one writes

Figures 2 and 3 of the paper start here: loss, accuracies and the captures that probe.py reads. The paper
fixes neither sizes nor optimiser. We take Muon for the blocks' matrices, as it needs fewer steps than AdamW,
and a learning rate that warms up and then falls linearly.
"""
import contextlib
import dataclasses
import io
import json
import os
import random
import shlex
import time
from pathlib import Path

from data import DataConfig, Flags, command_line, make_dataset, write, write_tasks

import numpy as np
import torch                # after data, which sets how torch's threads wait
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from model import GPT, ModelConfig

# ---------------------------------------------------------------- configuration


@dataclasses.dataclass
class Config(DataConfig):
    """Every knob of a run: the data's, and these."""
    out: str = "runs/default"       # run folder
    start: str = ""                 # a run whose final weights to start from
    n_layer: int = 4                # blocks
    n_head: int = 4                 # attention heads per block
    n_embd: int = 64                # width
    steps: int = 480                # training steps
    batch_size: int = 32            # instances per step
    loss_on: str = "all"            # all: every next token, a causal language model; answer: the output alone
    optimizer: str = "muon"         # muon: Muon for the blocks' matrices, AdamW for the rest; adamw: no Muon
    lr: float = 0.008               # peak learning rate of AdamW
    muon_lr: float = 0.05           # peak learning rate of Muon
    weight_decay: float = 0.1       # decoupled weight decay of both
    warmup: float = 0.1             # share of the steps in which the rate rises, before it falls to 0
    n_captures: int = 12            # how often the states are kept, denser at first
    eval_every: int = 0             # steps between further evaluations, without captures; 0: none
    device: str = "auto"            # cpu, cuda, or auto: cuda if there is one

    choices = {**DataConfig.choices, "loss_on": ("all", "answer"), "optimizer": ("muon", "adamw"),
               "device": ("auto", "cpu", "cuda")}


PRESETS = {
    "default": {},
    "quick": dict(out="runs/quick", n_tasks=8, n_distributions=2, n_layer=3, n_head=3, n_embd=48, steps=300,
                  n_captures=10),
    "facts": dict(out="runs/facts", tasks=str(Path(__file__).with_name("facts.json")), n_val=6, steps=800,
                  batch_size=64, lr=0.006, muon_lr=0.04, n_captures=10),
    "large": dict(out="runs/large", n_tasks=128, n_distributions=4, n_inputs=32, n_outputs=64, n_val=5,
                  n_layer=6, n_embd=128, steps=1200, batch_size=256, lr=0.004, muon_lr=0.04, n_captures=10),
}
CAPTURED = "subset", "val", "ood"       # the splits whose states are kept; of `pairs`, the accuracy only

# ---------------------------------------------------------------- training


def train(cfg, resume=False, data=None):
    """Train as cfg says, or go on with the run in cfg.out; return that folder, laid out as README.md tells.

    `data`, a data.Dataset, is taught in place of what cfg describes; give it again to resume. Raises
    ValueError for impossible settings or a folder in use, with nothing written, and if weights become nan.
    """
    cfg.check()
    out, device = Path(cfg.out), pick_device(cfg.device)
    check_folder(cfg, resume)
    data = read_data(out, data) if resume else (data or make_dataset(cfg))
    model = make_model(cfg, data).to(device)
    optimizers = make_optimizers(model, cfg)
    rank, world = start_processes()
    if cfg.batch_size < world:
        raise ValueError(f"{world} processes cannot share a batch of {cfg.batch_size}: start fewer")
    first, rows = load_checkpoint(out, model, data, optimizers) if resume else (0, [])
    if cfg.start and not rows:
        init_from(cfg.start, model, data)
    if rank == 0 and not resume:
        create_run(cfg, data, world)
    tokens, targets = make_targets(cfg, data.splits["train"], device)
    due = {*capture_steps(cfg), *range(0, cfg.steps, cfg.eval_every or cfg.steps)}
    due -= {row["step"] for row in rows}                # a resumed run has evaluated its first step
    seconds = rows[-1]["seconds"] if rows else 0
    losses, clock = [], time.perf_counter()
    for step in range(first, cfg.steps + 1):
        # every so often evaluate, capture and save; this does not count as training time
        if step in due and rank == 0:
            seconds += time.perf_counter() - clock
            loss = torch.stack(losses).mean().item() if losses else None
            rows.append({"step": step, "loss": loss, **evaluate(model, data, cfg, step), "seconds": seconds})
            save_checkpoint(out, step, rows, model, optimizers)
            print_row(rows)
            losses, clock = [], time.perf_counter()
        if step == cfg.steps:
            break

        # forward and backward: the mean loss over the scored tokens of the whole batch
        batch = pick_batch(cfg, len(tokens), step).to(device)
        mine = batch[rank::world]                       # of several processes, each takes its share
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, _ = model(tokens[mine, :-1])                                    # (B, T - 1, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets[mine, 1:].flatten(), reduction="sum")
        loss = loss / (targets[batch, 1:] != -100).sum()
        loss.backward()
        losses.append(loss.detach())
        if world > 1:                               # one message sums loss and gradients over the processes
            parts = [losses[-1], *(p.grad for p in model.parameters())]
            dist.all_reduce(sums := parameters_to_vector(parts))
            vector_to_parameters(sums, parts)
        for optimizer, peak in zip(optimizers, (cfg.lr, cfg.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(step, cfg)
            optimizer.step()
            optimizer.zero_grad()
    if rank == 0:
        print("done; next: python probe.py", shlex.quote(cfg.out))
    if dist.is_initialized():
        dist.destroy_process_group()
    return out


def schedule(step, cfg):
    """The learning rate of a step, as a share of its peak: up to 1 in the first steps, then linearly down."""
    warm = max(1, round(min(cfg.warmup, 1) * cfg.steps))
    return min((step + 1) / warm, (cfg.steps - step) / (cfg.steps - warm + 1))


def capture_steps(cfg):
    """n_captures steps from 0 to the last, fewer in a short run, evenly spaced in the step's square root."""
    return sorted({round(cfg.steps * x * x) for x in np.linspace(1, 0, cfg.n_captures)})


def make_generator(*key):
    """A torch.Generator for each purpose, e.g. (seed, "order", epoch): no draw depends on any other."""
    return torch.Generator().manual_seed(random.Random("/".join(map(str, key))).getrandbits(63))


def make_targets(cfg, split, device):
    """Tokens (N, T) of a split, and the same as targets: -100 where a token is not scored."""
    tokens = torch.from_numpy(split.tokens).to(device)
    scored = split.is_output if cfg.loss_on == "answer" else split.tokens != 0
    return tokens, tokens.where(torch.from_numpy(scored).to(device), -100)


def pick_batch(cfg, n, step):
    """(B,): which of n instances a step takes. Each epoch has a random order; no batch spans two epochs."""
    size = min(cfg.batch_size, n)
    epoch, i = divmod(step, n // size)
    return torch.randperm(n, generator=make_generator(cfg.seed, "order", epoch))[i * size:(i + 1) * size]


def make_model(cfg, data):
    """The network of a run, with its initial weights."""
    length = data.splits["train"].tokens.shape[1] - 1       # the last token has nothing to predict
    sizes = ModelConfig(len(data.vocabulary), length, cfg.n_layer, cfg.n_head, cfg.n_embd)
    return GPT(sizes, make_generator(cfg.seed, "weights"))


def make_optimizers(model, cfg):
    """[AdamW], and Muon for the blocks' matrices; `train` sets their learning rates."""
    alike, rest = {}, []
    for name, p in model.named_parameters():
        matrix = cfg.optimizer == "muon" and name.startswith("blocks") and p.dim() == 2
        group = alike.setdefault(p.shape, []) if matrix else rest
        group.append(p)
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    return [adamw, Muon(alike.values(), cfg.weight_decay)] if alike else [adamw]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): a matrix moves by the running mean of its gradients, made orthogonal.

    The same as torch.optim.Muon, but at least twice as fast on CPU: it takes lists of parameters of one
    shape, which go together, and in float32, as few CPUs are fast in bfloat16.
    """

    def __init__(self, alike, weight_decay):
        super().__init__([{"params": params} for params in alike], {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """Update the parameters by their gradients."""
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            grads = torch.stack([p.grad for p in params])
            mean = self.state[params[0]].setdefault("mean", torch.zeros_like(grads))
            mean.lerp_(grads, 0.05)
            updates = orthogonal(grads.lerp(mean, 0.95))                        # Nesterov
            rate = lr * max(1, grads.shape[1] / grads.shape[2]) ** 0.5
            for p, update in zip(params, updates):
                p.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=rate)


def orthogonal(x):
    """Matrices (P, m, n) -> the same with singular values brought near 1 (0.5 to 1.5).

    Five steps of a quintic Newton-Schulz iteration, with the coefficients of Jordan et al.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


def pick_device(wanted="auto"):
    """Where to run; each process of torchrun's has a GPU of its own. Raises ValueError if there is none."""
    if wanted == "cpu" or wanted == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", 0))
    if number >= torch.cuda.device_count():
        raise ValueError(f"there is no CUDA device {number}: use --device cpu or fewer processes")
    return torch.device("cuda", number)


def start_processes():
    """The number of this process, and how many there are: 0 and 1 unless torchrun started several."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group()
    return dist.get_rank(), dist.get_world_size()


@torch.no_grad()
def observe(model, split, batch=128):
    """Which instances are answered right, (N,) bool, and position -> (L + 1, n, C) float16 states.

    Right means that the greedy output is exactly the true one. That is so if, and only if, each of its tokens
    and the <eos> after it is the likeliest next token given the true ones before it: one forward pass tells.
    """
    device = next(model.parameters()).device
    tokens, is_output = (torch.from_numpy(x).to(device) for x in (split.tokens, split.is_output))
    right, states = [], {position: [] for position in split.positions}
    for start in range(0, len(tokens), batch):
        some = slice(start, start + batch)
        logits, layers = model(tokens[some, :-1])           # (B, T - 1, V)
        layers = torch.stack(layers)                        # (L + 1, B, T - 1, C)
        wrong = (logits.argmax(-1) != tokens[some, 1:]) & is_output[some, 1:]
        right.append(~wrong.any(1).cpu())
        for position, (rows, columns) in split.positions.items():
            here = (rows >= start) & (rows < start + batch)
            states[position].append(layers[:, rows[here] - start, columns[here]].half().cpu())
    return torch.cat(right).numpy(), {position: torch.cat(x, 1).numpy() for position, x in states.items()}


def evaluate(model, data, cfg, step):
    """{"acc_subset": accuracy, ...} of every split but train; where it is due, write the capture of the step.

    Raises ValueError if the states are not finite.
    """
    accuracies = {}
    states = {}
    for name, split in data.splits.items():
        if name == "train":
            continue
        right, read = observe(model, split)
        accuracies[f"acc_{name}"] = float(right.mean())
        if name in CAPTURED:
            states |= {f"{name}/{position}": x for position, x in read.items()}
    if not all(np.isfinite(x).all() for x in states.values()):
        raise ValueError("the weights are nan or infinite: choose another --out and a lower --lr or "
                         "--muon-lr (the last good checkpoint is kept)")
    if step in capture_steps(cfg):
        write_arrays(capture_path(cfg.out, step), states)
    return accuracies


# ---------------------------------------------------------------- the run folder


def check_folder(cfg, resume):
    """Raises ValueError if a new run would overwrite one, or a resumed one has other settings."""
    if not resume:
        if Path(cfg.out, "config.json").exists() or kept_steps(cfg.out):
            raise ValueError(f"{cfg.out} exists: choose another --out, delete it, or go on with --resume")
        return
    stored = vars(read_config(cfg.out))
    changed = [key for key in stored if key not in ("out", "device") and stored[key] != vars(cfg)[key]]
    if changed:
        raise ValueError(f"{cfg.out} was begun with another {', '.join(changed)}: leave that out to go on, "
                         "or choose another --out")


def create_run(cfg, data, world):
    """Write what does not change in training, config.json last: without it, a run has not begun."""
    out = Path(cfg.out)
    (out / "states").mkdir(parents=True, exist_ok=True)
    write_tasks(out / "tasks.json", data.cut_into, data.tasks)
    write_arrays(out / "states" / "labels.npz", make_labels(data))
    versions = {"torch": torch.__version__, "numpy": np.__version__, "processes": world}
    write(out / "config.json", json.dumps({**vars(cfg), "versions": versions}, indent=1) + "\n")


def save_checkpoint(run, step, rows, model, optimizers):
    """Write the metrics so far, then all that is needed to go on from a step."""
    write_rows(run / "metrics.jsonl", rows)
    buffer = io.BytesIO()
    torch.save({"step": step, "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, buffer)
    write(run / "ckpt.pt", buffer.getvalue())


def load_checkpoint(run, model, data, optimizers=()):
    """Load the last checkpoint of a run; return its step and the metrics so far, 0 and [] if there is none.

    Raises ValueError if it is damaged, or if the model no longer gives the states that were captured then.
    """
    path = Path(run, "ckpt.pt")
    if not path.exists():
        return 0, []
    with reading(path, "model.py has changed since, or it is damaged; undo that or train again"):
        saved = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        step = saved["step"]
        capture = capture_path(run, step)
    if capture.exists():
        then = read_arrays(capture, "subset/answer")["subset/answer"]
        now = observe(model, data.splits["subset"])[1]["answer"]
        if then.shape != now.shape or not np.abs(then - now).max() <= 0.01 * np.abs(then).max():
            raise ValueError(f"{run}: its weights no longer give the states in {capture.name}: model.py or "
                             "data.py has changed since; undo that or train again")
    path = Path(run, "metrics.jsonl")
    rows = read_rows(path)
    with reading(path, "it is damaged, train the run again"):
        rows = [row for row in rows if row["step"] <= step]
        rows[-1]["seconds"] += 0                            # there is a last row, and it is a number
    return step, rows


def load_model(run, data, device):
    """The network of a run as it was last saved. Raises ValueError if there is no sound checkpoint."""
    model = make_model(read_config(run), data).to(device)
    if not load_checkpoint(run, model, data)[1]:
        raise ValueError(f"{run} has no checkpoint: train it first")
    return model


def init_from(run, model, data):
    """Start from the last weights of another run; of its embeddings, take the tokens and positions both have.

    Raises ValueError if that run cannot be read, or its blocks are not like the model's.
    """
    cfg = read_config(run)
    other = read_data(run)
    if any(getattr(cfg, key) != getattr(model.cfg, key) for key in ("n_layer", "n_head", "n_embd")):
        raise ValueError(f"start: {run} has other blocks: give its n_layer, n_head and n_embd")
    old = load_model(run, other, next(model.parameters()).device).state_dict()
    known = [token for token in data.vocabulary if token in other.vocabulary]
    for key, new in model.state_dict().items():         # these share their memory with the model
        here = there = slice(None)
        if key == "token.weight":
            here, there = ([d.vocabulary.index(token) for token in known] for d in (data, other))
        elif key == "position.weight":
            here = there = slice(min(len(new), len(old[key])))
        new[here] = old[key][there]


def read_config(run):
    """The configuration of a run folder. Raises ValueError if it is not one."""
    path = Path(run, "config.json")
    with reading(path, "make a run with train.py"):
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored["versions"]      # every run has it; a knob that came after the run has its default
        cfg = Config(**{key.name: stored.get(key.name, key.default) for key in dataclasses.fields(Config)})
        cfg.check()
        return cfg


def read_data(run, data=None):
    """The data of a run, made again from its tasks.json, or what `train` was given for it.

    Raises ValueError if it is not the same as then.
    """
    data = data or make_dataset(dataclasses.replace(read_config(run), tasks=str(Path(run, "tasks.json"))))
    stored = read_arrays(Path(run, "states", "labels.npz"))
    for name, labels in make_labels(data).items():
        if not np.array_equal(labels, stored.get(name, labels)):        # an identity added since is no change
            raise ValueError(f"{run}: {name} in labels.npz is not what it was: tasks.json, config.json or "
                             "data.py has changed since; undo that or train again")
    return data


def make_labels(data):
    """The content of labels.npz: "split/position/identity" -> (n,), a label for each state of a capture.

    One more, `text`, is the instruction itself.
    """
    labels = {}
    for name in CAPTURED:
        split = data.splits[name]
        for position, (rows, _) in split.positions.items():
            text = np.array([split.instances[row].instruction for row in rows])
            for identity, values in {**split.labels(position), "text": text}.items():
                labels[f"{name}/{position}/{identity}"] = values
    return labels


def capture_path(run, step):
    """Where the capture of a step is kept."""
    return Path(run, "states", f"{step:06d}.npz")


def kept_steps(run):
    """The steps whose captures are there; other files, as editors leave them, do not count."""
    paths = Path(run, "states").glob("*.npz")
    return sorted(int(path.stem) for path in paths if path.stem.isdecimal())


@contextlib.contextmanager
def reading(path, way_out):
    """Whatever goes wrong inside becomes a ValueError naming the file: a damaged one can raise anything."""
    try:
        yield
    except Exception as e:
        raise ValueError(f"{path} cannot be read: {way_out} ({e!r:.200})") from None


def read_rows(path):
    """The rows of a .jsonl file. Raises ValueError, naming it, if it is damaged."""
    with reading(path, "it is damaged, make it again"):
        return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_rows(path, rows):
    """Write a .jsonl file."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_arrays(path, *names):
    """The arrays of an .npz file, all or those with these names. Raises ValueError, naming it, if damaged."""
    with reading(path, "it is damaged, train the run again"), np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names or arrays.files}


def write_arrays(path, arrays):
    """Write an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write(path, buffer.getvalue())


# ---------------------------------------------------------------- the command line


def print_row(rows):
    """One line per evaluation, the first one under a heading; seconds are those of training."""
    if len(rows) == 1:
        print(*(f"{key.removeprefix('acc_'):>8}" for key in rows[0]))
    print(*(f"{'-' if value is None else round(value, 3):>8}" for value in rows[-1].values()), flush=True)


def main():
    """Train a causal language model on instructions and keep its hidden states."""
    flags = Flags(Config, description=main.__doc__)
    flags.add_argument("--preset", choices=PRESETS, default="default", help="what the other flags start from")
    flags.add_argument("--resume", action="store_true", help="go on from the last evaluation of --out")
    given = vars(flags.parse_args())
    preset = PRESETS[given.pop("preset")]
    resume = given.pop("resume")
    out = given.setdefault("out", preset.get("out", Config.out))
    cfg = dataclasses.replace(read_config(out) if resume else Config(**preset), **given)
    try:
        train(cfg, resume)
    except KeyboardInterrupt:
        print("stopped; to go on from the last evaluation: python train.py --resume --out", shlex.quote(out))
        raise


if __name__ == "__main__":
    command_line(main)
