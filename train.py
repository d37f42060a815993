"""Train a causal language model on instructions and keep its hidden states along the way.

    python train.py                                   the default run, into runs/default
    python train.py --preset quick                    a smaller run, into runs/quick; also: facts, large
    python train.py --tasks mine.json --n-layer 6     your own tasks, any knob (--help lists them)
    python train.py --resume                          go on from the last evaluation of a run that was stopped
    torchrun --standalone --nproc_per_node=2 train.py     two processes share every batch; one of them writes

Figures 2 and 3 of the paper start here: loss, accuracies and the captures that probe.py reads. The paper
fixes neither sizes nor optimiser. We take Muon for the blocks' matrices, as it needs fewer steps than AdamW,
and a learning rate that warms up and then falls linearly.
"""
import contextlib
import dataclasses
import json
import os
import random
import shlex
import time
from collections import defaultdict
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
    out: str = "runs/default"       # run folder; with --preset, runs/PRESET
    start: str = ""                 # a run whose final weights to start from
    n_layer: int = 4                # blocks
    n_head: int = 2                 # attention heads per block
    n_embd: int = 64                # width
    steps: int = 400                # training steps
    batch_size: int = 48            # instances per step
    loss_on: str = "all"            # all: every next token, a causal language model; answer: the output alone
    optimizer: str = "muon"         # muon: Muon for the blocks' matrices, AdamW for the rest; adamw: no Muon
    lr: float = 0.014               # peak learning rate of AdamW
    muon_lr: float = 0.055          # peak learning rate of Muon
    weight_decay: float = 0.1       # decoupled weight decay of both
    warmup: float = 0.1             # share of the steps with a rising rate; after them it falls to 0
    n_captures: int = 9             # evaluations, each of which keeps the states; closer together at first

    choices = {**DataConfig.choices, "loss_on": ("all", "answer"), "optimizer": ("muon", "adamw")}


PRESETS = {
    "default": {},
    "quick": dict(n_tasks=8, n_distributions=2, n_layer=3, n_embd=48, steps=300),
    "facts": dict(tasks=str(Path(__file__).with_name("facts.json")), n_val=6, steps=800),
    "large": dict(n_tasks=128, n_distributions=4, n_inputs=32, n_outputs=64, n_val=5,
                  n_layer=6, n_embd=128, steps=1200, batch_size=256, lr=0.004, muon_lr=0.04),
}
CAPTURED = "subset", "val", "ood"       # the splits whose states are kept; of `pairs`, the accuracy only

# ---------------------------------------------------------------- training


def train(cfg, resume=False, data=None):
    """Train as cfg says, or go on with the run in cfg.out; return that folder, laid out as README.md tells.

    `data`, a data.Dataset with subset, val and ood, replaces what cfg describes; pass it again to resume.
    Raises ValueError for impossible settings or a folder in use, with nothing written, and if states become
    nan or infinite.
    """
    cfg.check()
    check_folder(cfg, resume)
    device = pick_device()
    data = read_data(cfg.out, data) if resume else data or make_dataset(cfg)
    model = make_model(cfg, data).to(device)
    optimizers = make_optimizers(model, cfg)
    rank, world = start_processes()         # they wait here: all have checked the folder before one writes
    rows = load_checkpoint(cfg.out, model, data, optimizers) if resume else []
    if cfg.start and not resume:
        init_from(cfg.start, model, data)
    if rank == 0 and not resume:
        create_run(cfg, data, model, optimizers)
    tokens, targets = make_targets(cfg, data.splits["train"], device)
    due, begun = capture_steps(cfg)[len(rows):], time.perf_counter()
    for step in range(rows[-1]["step"] if rows else 0, cfg.steps + 1):
        # forward and backward: the mean loss over the scored tokens of the whole batch
        batch = pick_batch(cfg, len(tokens), step).to(device)
        mine = batch[rank::world]                       # of several processes, each takes its share
        with torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
            logits, _ = model(tokens[mine, :-1])                                    # (B, T - 1, V)
            loss = F.cross_entropy(logits.flatten(0, 1), targets[mine, 1:].flatten(), reduction="sum")
        loss = loss / (targets[batch, 1:] != -100).sum()                            # -100: not scored
        loss.backward()
        if world > 1:                               # one message sums loss and gradients over the processes
            parts = [loss.detach_(), *(p.grad for p in model.parameters())]
            dist.all_reduce(sums := parameters_to_vector(parts))
            vector_to_parameters(sums, parts)       # write the sums back

        # every so often evaluate and save
        if rank == 0 and step in due:
            rows.append({"step": step, "loss": round(loss.item(), 4),
                         **evaluate(model, data, capture_path(cfg.out, step)),
                         "seconds": round(time.perf_counter() - begun, 1)})
            save_checkpoint(cfg.out, rows, model, optimizers)
            print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        if step == cfg.steps:
            break

        # update the weights: AdamW, then Muon
        for optimizer, peak in zip(optimizers, (cfg.lr, cfg.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(step, cfg)
            optimizer.step()
            optimizer.zero_grad()
    if rank == 0:
        print(f"done; next: python probe.py {shlex.quote(cfg.out)}")
    if world > 1:
        dist.destroy_process_group()
    return Path(cfg.out)


def schedule(step, cfg):
    """The learning rate of a step, as a share of its peak: up to 1 during warmup, then linearly down."""
    warm = max(1, round(min(cfg.warmup, 1) * cfg.steps))
    return min((step + 1) / warm, (cfg.steps - step) / (cfg.steps - warm + 1))


def capture_steps(cfg):
    """n_captures steps from 0 to the last, fewer in a short run, evenly spaced in the step's square root."""
    return sorted({round(cfg.steps * x * x) for x in np.linspace(1, 0, cfg.n_captures)})


def make_generator(purpose):
    """A generator of its own for each purpose, e.g. "0/order/3" for the order of epoch 3 with seed 0."""
    return torch.Generator().manual_seed(random.Random(purpose).getrandbits(63))


def make_targets(cfg, split, device):
    """Tokens (N, T) of a split, and targets: the same tokens, but -100 where they are not scored."""
    tokens = torch.from_numpy(split.tokens).to(device)
    scored = split.is_output if cfg.loss_on == "answer" else split.tokens != 0
    return tokens, tokens.where(torch.from_numpy(scored).to(device), -100)


def pick_batch(cfg, n, step):
    """(B,): which of n instances a step takes. Each epoch is shuffled, and leaves out its last n % B."""
    size = min(cfg.batch_size, n)
    epoch, i = divmod(step, n // size)
    return torch.randperm(n, generator=make_generator(f"{cfg.seed}/order/{epoch}"))[i * size:(i + 1) * size]


def make_model(cfg, data):
    """The network of a run, with its initial weights."""
    length = data.splits["train"].tokens.shape[1] - 1       # the last token has nothing to predict
    sizes = ModelConfig(len(data.vocabulary), length, cfg.n_layer, cfg.n_head, cfg.n_embd)
    return GPT(sizes, make_generator(f"{cfg.seed}/weights"))


def make_optimizers(model, cfg):
    """[AdamW] or [AdamW, Muon]: Muon takes the blocks' matrices. `train` sets the learning rates."""
    groups = defaultdict(list)
    for name, p in model.named_parameters():
        by_muon = cfg.optimizer == "muon" and name.startswith("blocks") and p.dim() == 2
        groups[p.shape if by_muon else "rest"].append(p)
    decay = {"weight_decay": cfg.weight_decay}
    adamw = torch.optim.AdamW(groups.pop("rest"), betas=(0.9, 0.95), fused=True, **decay)
    same_shape = [{"params": params} for params in groups.values()]
    return [adamw, Muon(same_shape, decay)] if same_shape else [adamw]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): a matrix moves by the running mean of its gradients, made orthogonal.

    As torch.optim.Muon, but twice as fast on CPU: a parameter group is the matrices of one shape, which are
    updated together, in float32, as few CPUs are fast in bfloat16.
    """

    @torch.no_grad()
    def step(self):
        """Update the parameters by their gradients."""
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            grads = torch.stack([p.grad for p in params])
            mean = self.state[params[0]].setdefault("mean", torch.zeros_like(grads))    # of the group
            mean.lerp_(grads, 0.05)
            updates = orthogonal(grads.lerp(mean, 0.95))                        # Nesterov
            rate = lr * max(1, grads.shape[1] / grads.shape[2]) ** 0.5       # tall ones move further
            for p, update in zip(params, updates):
                p.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=rate)


def orthogonal(x):
    """P matrices (P, m, n) -> the same with singular values brought near 1 (0.5 to 1.5).

    Five steps of a quintic Newton-Schulz iteration, with the coefficients of Jordan et al.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = F.normalize(x, dim=(1, 2))
    for _ in range(5):
        gram = x @ x.mT         # below, x <- 3.4445 x + (2.0315 gram @ gram - 4.775 gram) @ x
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x


def pick_device():
    """The GPU of this process, or the CPU where there is none. CUDA_VISIBLE_DEVICES="" hides all GPUs."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def start_processes():
    """The number of this process, and how many there are: 0 and 1 unless torchrun started several."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group()
    return dist.get_rank(), dist.get_world_size()


@torch.inference_mode()
def observe(model, split):
    """Which instances are answered right, (N,) bool, and position -> its n states (L + 1, n, C), float16.

    Right means that the greedy output is exactly the true one. That is so if, and only if, each of its tokens
    and the <eos> after it is the likeliest next token given the true ones before it, so one pass is enough.
    """
    tokens = torch.from_numpy(split.tokens).to(pick_device())
    guesses, states = [], defaultdict(list)
    for start in range(0, len(tokens), 256):
        logits, layers = model(tokens[start:start + 256, :-1])      # (B, T - 1, V)
        guesses.append(logits.argmax(-1).cpu())
        states_of_all = torch.stack(layers)                         # (L + 1, B, T - 1, C)
        for position, (rows, columns) in split.positions.items():
            here = (start <= rows) & (rows < start + 256)
            states[position].append(states_of_all[:, rows[here] - start, columns[here]].half().cpu())
    right = (torch.cat(guesses).numpy() == split.tokens[:, 1:]) | ~split.is_output[:, 1:]
    return right.all(1), {position: torch.cat(x, 1).numpy() for position, x in states.items()}


def evaluate(model, data, path):
    """Write a capture to `path`; return {"acc_subset": accuracy, ...}, of every split but train.

    Raises ValueError if the states are not finite.
    """
    accuracies, states = {}, {}
    for name, split in data.splits.items():
        if name != "train":
            right, read = observe(model, split)
            accuracies[f"acc_{name}"] = round(right.mean().item(), 4)
            if name in CAPTURED:
                states |= {f"{name}/{position}": x for position, x in read.items()}
    if not all(np.isfinite(x).all() for x in states.values()):
        raise ValueError("the states are nan or infinite: choose another --out and a lower --lr or --muon-lr "
                         "(the last good checkpoint is kept)")
    write_arrays(path, states)
    return accuracies


# ---------------------------------------------------------------- the run folder


def check_folder(cfg, resume):
    """Raises ValueError if the folder of a new run is in use, or the settings of a resumed one changed."""
    if resume:
        stored = vars(read_config(cfg.out))
        changed = [key for key in stored if key != "out" and stored[key] != vars(cfg)[key]]
        if changed:
            raise ValueError(f"{cfg.out} was begun with another {', '.join(changed)}: drop those flags to go "
                             "on, or choose another --out")
    elif (not cfg.out or Path(f"{cfg.out}/config.json").exists()
          or Path(f"{cfg.out}/states/000000.npz").exists()):
        raise ValueError(f"{cfg.out!r} is in use, or no name: choose another --out, delete it, or go on with "
                         "--resume")


def create_run(cfg, data, model, optimizers):
    """Write the fixed files and the initial weights; config.json comes last and marks the run as begun."""
    os.makedirs(f"{cfg.out}/states", exist_ok=True)
    write_tasks(f"{cfg.out}/tasks.json", data.cut_into, data.tasks)
    write_arrays(f"{cfg.out}/states/labels.npz", make_labels(data))
    save_checkpoint(cfg.out, [], model, optimizers)
    versions = {"torch": torch.__version__, "numpy": np.__version__, "device": str(pick_device())}
    write(f"{cfg.out}/config.json", json.dumps({**vars(cfg), "versions": versions}, indent=1))


def save_checkpoint(run, rows, model, optimizers):
    """Write all that is needed to go on: the metrics so far, the weights and the optimizers."""
    write_rows(f"{run}/metrics.jsonl", rows)
    torch.save({"rows": rows, "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, f"{run}/ckpt.tmp")
    os.replace(f"{run}/ckpt.tmp", f"{run}/ckpt.pt")


def load_checkpoint(run, model, data, optimizers=()):
    """Load the last checkpoint of a run; return the metrics so far, one row per evaluation.

    Raises ValueError if it is damaged, or if the model no longer gives the states that were captured then.
    """
    with reading(f"{run}/ckpt.pt", "model.py or data.py has changed since, or it is damaged: undo that or "
                 "train again"):
        saved = torch.load(f"{run}/ckpt.pt", map_location=pick_device(), weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        if saved["rows"]:
            then = read_arrays(capture_path(run, saved["rows"][-1]["step"]))["subset/answer"]
            now = observe(model, data.splits["subset"])[1]["answer"]
            # float16 and devices differ by less; nan fails, too
            if not np.abs(then - now).max() <= 0.002 * np.abs(then).max():
                raise ValueError("its weights do not give the states of the last capture")
        return saved["rows"]


def load_model(run, data):
    """The network of a run as it was last saved. Raises ValueError if there is no sound checkpoint."""
    model = make_model(read_config(run), data).to(pick_device())
    load_checkpoint(run, model, data)
    return model


def init_from(run, model, data):
    """Copy another run's last weights; of the embeddings, those of tokens and positions that both runs have.

    Raises ValueError if that run cannot be read, or its blocks are not like the model's.
    """
    other = read_data(run)
    source = load_model(run, other)
    cfg = source.cfg
    if dataclasses.replace(model.cfg, vocab_size=cfg.vocab_size, block_size=cfg.block_size) != cfg:
        raise ValueError(f"--start: {run} has other blocks, use its n_layer, n_head and n_embd")
    new = model.state_dict()                            # writing into these writes into the model
    known = [token for token in data.vocabulary if token in other.vocabulary]
    for key, old in source.state_dict().items():
        here = there = slice(min(len(old), len(new[key])))      # of positions those both have
        if key == "token.weight":
            here, there = ([d.vocabulary.index(token) for token in known] for d in (data, other))
        new[key][here] = old[there]


def read_config(run):
    """The configuration of a run folder. Raises ValueError if it is not one."""
    path = f"{run}/config.json"
    with reading(path, "make a run with train.py"), open(path, encoding="utf-8") as file:
        stored = json.load(file)
        del stored["versions"]
        cfg = Config(**stored)              # a knob added since has its default
        cfg.check()
        return cfg


def read_data(run, data=None):
    """The data of a run, made again from its tasks.json unless `data` is given.

    Raises ValueError if it is not what the run had.
    """
    data = data or make_dataset(dataclasses.replace(read_config(run), tasks=f"{run}/tasks.json"))
    stored = read_arrays(f"{run}/states/labels.npz")
    for name, labels in make_labels(data).items():
        if not np.array_equal(labels, stored.get(name, labels)):        # an identity added since is no change
            raise ValueError(f"{run}: {name} in labels.npz is not what it was: tasks.json, config.json or "
                             "data.py has changed since; undo that or train again")
    return data


def make_labels(data):
    """The content of labels.npz: "split/position/identity" -> (n,), a label for each state of a capture.

    "split/position/text" is the instruction itself.
    """
    labels = {}
    for name in CAPTURED:
        split = data.splits[name]
        for position, (rows, _) in split.positions.items():
            for identity, values in split.labels(position).items():
                labels[f"{name}/{position}/{identity}"] = values
            labels[f"{name}/{position}/text"] = np.array([split.instances[i].instruction for i in rows])
    return labels


def capture_path(run, step):
    """Where the capture of a step is kept."""
    return f"{run}/states/{step:06d}.npz"


@contextlib.contextmanager
def reading(path, way_out):
    """Whatever goes wrong inside becomes a ValueError naming the file: a damaged one can raise anything."""
    try:
        yield
    except Exception as e:
        raise ValueError(f"{path} cannot be read: {way_out} ({e!r:.200})") from None


def read_rows(path):
    """The rows of a .jsonl file. Raises ValueError, naming it, if it is damaged."""
    with reading(path, "it is damaged, make it again"), open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(path, rows):
    """Write a .jsonl file."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_arrays(path):
    """The arrays of an .npz file by name. Raises ValueError, naming it, if it is damaged."""
    with reading(path, "it is damaged or missing; train the run again, or see README on states of any model"):
        return dict(np.load(path, allow_pickle=False))


def write_arrays(path, arrays):
    """Write an .npz file."""
    np.savez(f"{path}.tmp.npz", **arrays)
    os.replace(f"{path}.tmp.npz", path)


# ---------------------------------------------------------------- the command line


def main():
    """Train a causal language model on instructions and keep its hidden states."""
    flags = Flags(Config, description=main.__doc__)
    flags.add_argument("--preset", choices=PRESETS, default="default", help="settings to start from")
    flags.add_argument("--resume", action="store_true", help="go on from the last evaluation of --out")
    given = vars(flags.parse_args())
    name, resume = given.pop("preset"), given.pop("resume")
    given.setdefault("out", f"runs/{name}")
    cfg = dataclasses.replace(read_config(given["out"]) if resume else Config(**PRESETS[name]), **given)
    try:
        train(cfg, resume)
    except KeyboardInterrupt:
        print(f"stopped; to go on: python train.py --resume --out {shlex.quote(cfg.out)}")
        raise


if __name__ == "__main__":
    command_line(main)
