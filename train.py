"""Train a causal language model on instructions and save its hidden states along the way.

    python train.py                                   the default run, into runs/default
    python train.py --preset quick                    a smaller run, into runs/quick; also: facts, large
    python train.py --tasks mine.json --n-layer 6     your own tasks, any setting (see --help)
    python train.py --resume                          continue a stopped run from its last evaluation
    torchrun --standalone --nproc_per_node=2 train.py     two processes split every batch; one writes files

This records the loss and accuracies of the paper's figure 3, and the captures that probe.py scores for its
figures 2 and 4. The paper gives neither sizes nor an optimiser. We use Muon for the blocks' matrices, as it
needs fewer steps than AdamW, and learning rates that warm up and then fall linearly.
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
import torch                # must come after data, which sets how torch's threads wait
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from model import GPT, ModelConfig

# ---------------------------------------------------------------- configuration


@dataclasses.dataclass
class Config(DataConfig):
    """All settings of a run: those of the data, and these. The comments are what `--help` says."""
    out: str = "runs/default"       # run folder; with --preset NAME, the default is runs/NAME
    start: str = ""                 # run folder whose last weights to start from
    n_layer: int = 4                # number of blocks
    n_head: int = 2                 # attention heads per block
    n_embd: int = 64                # width of the residual stream
    steps: int = 400                # training steps
    batch_size: int = 48            # instances per step
    loss_on: str = "all"            # all: predict every token, as language models do; answer: only the output
    optimizer: str = "muon"         # muon: Muon for blocks' matrices, AdamW for the rest; adamw: only AdamW
    lr: float = 0.014               # peak learning rate of AdamW
    muon_lr: float = 0.055          # peak learning rate of Muon
    weight_decay: float = 0.1       # decoupled weight decay, for AdamW and Muon
    warmup: float = 0.1             # share of the steps in which learning rates rise; then they fall to 0
    n_captures: int = 9             # number of evaluations, each saving a capture; more frequent early on

    choices = {**DataConfig.choices, "loss_on": ("all", "answer"), "optimizer": ("muon", "adamw")}


PRESETS = {
    "default": {},
    "quick": dict(n_tasks=8, n_distributions=2, n_layer=3, n_embd=48, steps=300),
    "facts": dict(tasks=str(Path(__file__).with_name("facts.json")), n_val=6, steps=800),
    "large": dict(n_tasks=128, n_distributions=4, n_inputs=32, n_outputs=64, n_val=5,
                  n_layer=6, n_embd=128, steps=1200, batch_size=256, lr=0.004, muon_lr=0.04),
}
CAPTURED = "subset", "val", "ood"       # splits whose states are saved; for `pairs`, only the accuracy

# ---------------------------------------------------------------- training


def train(cfg, resume=False, data=None):
    """Train as cfg says, or resume the run in cfg.out; return that folder, whose files README.md describes.

    `data`, a data.Dataset with train, subset, val and ood, replaces the data cfg describes; to resume, pass
    it again. Raises ValueError before writing anything if settings are impossible or the folder is in use,
    and during training if states become nan or infinite.
    """
    cfg.check()
    check_folder(cfg, resume)
    device = pick_device()
    # on resuming, read_data checks that the data are still the same
    data = read_data(cfg.out, data) if resume else data or make_dataset(cfg)
    model = make_model(cfg, data).to(device)
    optimizers = make_optimizers(model, cfg)
    rank, world = start_processes()         # waits until all have checked the folder; then one writes
    rows = load_checkpoint(cfg.out, model, data, optimizers) if resume else []
    if cfg.start and not resume:
        init_from(cfg.start, model, data)
    if rank == 0 and not resume:
        create_run(cfg, data, model, optimizers)
    tokens, targets = make_targets(cfg, data.splits["train"], device)
    due, begun = capture_steps(cfg)[len(rows):], time.perf_counter()    # steps still to be evaluated
    # a resumed run repeats the last step it evaluated, whose update was not saved
    for step in range(rows[-1]["step"] if rows else 0, cfg.steps + 1):
        # forward and backward: the mean loss over the scored tokens of the whole batch
        batch = pick_batch(cfg, len(tokens), step).to(device)
        mine = batch[rank::world]                       # this process's share
        with torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):       # not on CPU
            logits, _ = model(tokens[mine, :-1])                                    # (B, T - 1, V)
            loss = F.cross_entropy(logits.flatten(0, 1), targets[mine, 1:].flatten(), reduction="sum")
        loss = loss / (targets[batch, 1:] != -100).sum()            # of the whole batch; -100: not scored
        loss.backward()
        if world > 1:                               # sum loss and gradients over processes, in one message
            parts = [loss.detach_(), *(p.grad for p in model.parameters())]
            dist.all_reduce(sums := parameters_to_vector(parts))
            vector_to_parameters(sums, parts)       # copy the sums back

        # every so often, evaluate and save
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
    """The learning rate at a step, relative to its peak: it rises to 1 during warmup, then falls linearly."""
    warm = max(1, round(min(cfg.warmup, 1) * cfg.steps))
    return min((step + 1) / warm, (cfg.steps - step) / (cfg.steps - warm + 1))


def capture_steps(cfg):
    """Steps to evaluate at, 0 to the last: n_captures (fewer in a short run), evenly spaced in sqrt(step)."""
    return sorted({round(cfg.steps * x * x) for x in np.linspace(1, 0, cfg.n_captures)})


def make_generator(purpose):
    """A random generator seeded by its purpose, e.g. "0/order/3": seed 0, the order of epoch 3."""
    return torch.Generator().manual_seed(random.Random(purpose).getrandbits(63))


def make_targets(cfg, split, device):
    """The tokens (N, T) of a split, and targets (N, T): the same, but -100 where the loss ignores them."""
    tokens = torch.from_numpy(split.tokens).to(device)
    scored = split.is_output if cfg.loss_on == "answer" else split.tokens != 0
    return tokens, tokens.where(torch.from_numpy(scored).to(device), -100)


def pick_batch(cfg, n, step):
    """Indices (B,) of a step's batch among n instances. Each epoch is reshuffled and drops its last n % B."""
    size = min(cfg.batch_size, n)
    epoch, i = divmod(step, n // size)
    return torch.randperm(n, generator=make_generator(f"{cfg.seed}/order/{epoch}"))[i * size:(i + 1) * size]


def make_model(cfg, data):
    """A network sized for the data, with initial weights drawn from cfg.seed."""
    length = data.splits["train"].tokens.shape[1] - 1       # the last token is only ever a target
    sizes = ModelConfig(len(data.vocabulary), length, cfg.n_layer, cfg.n_head, cfg.n_embd)
    return GPT(sizes, make_generator(f"{cfg.seed}/weights"))


def make_optimizers(model, cfg):
    """[AdamW, Muon], with Muon for the blocks' matrices, or [AdamW]. `train` sets the learning rates."""
    groups = defaultdict(list)          # shape -> matrices for Muon; "rest" -> parameters for AdamW
    for name, p in model.named_parameters():
        by_muon = cfg.optimizer == "muon" and name.startswith("blocks") and p.dim() == 2
        groups[p.shape if by_muon else "rest"].append(p)
    decay = {"weight_decay": cfg.weight_decay}
    adamw = torch.optim.AdamW(groups.pop("rest"), betas=(0.9, 0.95), fused=True, **decay)
    same_shape = [{"params": params} for params in groups.values()]
    return [adamw, Muon(same_shape, decay)] if same_shape else [adamw]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): step along the running mean of the gradients, orthogonalised.

    The algorithm of torch.optim.Muon, but twice as fast on CPU: all matrices of one shape form a parameter
    group and are updated together, in float32, because few CPUs are fast in bfloat16.
    """

    @torch.no_grad()
    def step(self):
        """Update all parameters from their gradients."""
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            grads = torch.stack([p.grad for p in params])       # (P, m, n)
            mean = self.state[params[0]].setdefault("mean", torch.zeros_like(grads))    # kept at its first
            mean.lerp_(grads, 0.05)
            updates = orthogonal(grads.lerp(mean, 0.95))                        # Nesterov momentum
            rate = lr * max(1, grads.shape[1] / grads.shape[2]) ** 0.5       # tall matrices move further
            for p, update in zip(params, updates):
                p.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=rate)


def orthogonal(x):
    """Make P matrices (P, m, n) roughly orthogonal: their singular values move close to 1 (0.5 to 1.5).

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
    """The GPU of this process, or the CPU if there is none. CUDA_VISIBLE_DEVICES="" hides all GPUs."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def start_processes():
    """The rank of this process and the number of processes: 0 and 1 unless torchrun started several."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group()
    return dist.get_rank(), dist.get_world_size()


@torch.inference_mode()
def observe(model, split):
    """Run the model on a split: which answers are right, (N,) bool; position -> states (L + 1, n, C) float16.

    Right means that greedy decoding gives exactly the true output. This is so if and only if each of its
    tokens, <eos> included, is the likeliest after the true tokens before it, so one pass is enough.
    """
    tokens = torch.from_numpy(split.tokens).to(pick_device())
    guesses, states = [], defaultdict(list)
    for start in range(0, len(tokens), 256):
        logits, layers = model(tokens[start:start + 256, :-1])      # (B, T - 1, V)
        guesses.append(logits.argmax(-1).cpu())
        states_of_all = torch.stack(layers)                         # (L + 1, B, T - 1, C)
        for position, (rows, columns) in split.positions.items():   # (n,) each
            here = (start <= rows) & (rows < start + 256)           # those in this batch
            states[position].append(states_of_all[:, rows[here] - start, columns[here]].half().cpu())
    right = (torch.cat(guesses).numpy() == split.tokens[:, 1:]) | ~split.is_output[:, 1:]       # (N, T - 1)
    return right.all(1), {position: torch.cat(x, 1).numpy() for position, x in states.items()}


def evaluate(model, data, path):
    """Write a capture to `path`; return the accuracy on every split but train, {"acc_subset": accuracy, ...}.

    Raises ValueError if any state is nan or infinite.
    """
    accuracies, states = {}, {}
    for name, split in data.splits.items():
        if name != "train":
            right, read = observe(model, split)
            accuracies[f"acc_{name}"] = round(right.mean().item(), 4)
            if name in CAPTURED:
                states |= {f"{name}/{position}": x for position, x in read.items()}
    if not all(np.isfinite(x).all() for x in states.values()):
        raise ValueError("the states are nan or infinite: lower --lr or --muon-lr and choose another --out "
                         "(the last good checkpoint is kept)")
    write_arrays(path, states)
    return accuracies


# ---------------------------------------------------------------- the run folder


def check_folder(cfg, resume):
    """Raises ValueError if the folder of a new run is in use, or if a resumed run would change settings."""
    if resume:
        stored = vars(read_config(cfg.out))
        changed = [key for key in stored if key != "out" and stored[key] != vars(cfg)[key]]
        if changed:
            raise ValueError(f"{cfg.out} was created with another {', '.join(changed)}: drop those flags to "
                             "resume it, or choose another --out for a new run")
    elif (not cfg.out or Path(f"{cfg.out}/config.json").exists()
          or Path(f"{cfg.out}/states/000000.npz").exists()):
        raise ValueError(f"{cfg.out!r} is in use, or not a folder name: choose another --out, delete it, or "
                         "continue it with --resume")


def create_run(cfg, data, model, optimizers):
    """Write the fixed files and a first checkpoint; config.json comes last: it marks the folder as a run."""
    os.makedirs(f"{cfg.out}/states", exist_ok=True)
    write_tasks(f"{cfg.out}/tasks.json", data.cut_into, data.tasks)
    write_arrays(f"{cfg.out}/states/labels.npz", make_labels(data))
    save_checkpoint(cfg.out, [], model, optimizers)
    versions = {"torch": torch.__version__, "numpy": np.__version__, "device": str(pick_device())}
    write(f"{cfg.out}/config.json", json.dumps({**vars(cfg), "versions": versions}, indent=1))


def save_checkpoint(run, rows, model, optimizers):
    """Write all that is needed to resume: the metrics so far, the weights and the optimizers' states."""
    write_rows(f"{run}/metrics.jsonl", rows)
    torch.save({"rows": rows, "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, f"{run}/ckpt.tmp")
    os.replace(f"{run}/ckpt.tmp", f"{run}/ckpt.pt")


def load_checkpoint(run, model, data, optimizers=()):
    """Load a run's last checkpoint into model and optimizers; return its metrics, one row per evaluation.

    Raises ValueError if it is missing or damaged, or if the model does not reproduce the last capture.
    """
    with reading(f"{run}/ckpt.pt", "it is missing or damaged, or model.py or data.py has changed; undo "
                 "the change or train again"):
        saved = torch.load(f"{run}/ckpt.pt", map_location=pick_device(), weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        if saved["rows"]:
            then = read_arrays(capture_path(run, saved["rows"][-1]["step"]))["subset/answer"]
            now = observe(model, data.splits["subset"])[1]["answer"]
            # float16 or another device changes states by less; `not ... <=` also catches nan
            if not np.abs(then - now).max() <= 0.002 * np.abs(then).max():
                raise ValueError("its weights do not reproduce the states of the last capture")
        return saved["rows"]


def load_model(run, data):
    """The network of a run, with its last saved weights. Raises ValueError if they cannot be loaded."""
    model = make_model(read_config(run), data).to(pick_device())
    load_checkpoint(run, model, data)
    return model


def init_from(run, model, data):
    """Copy another run's last weights into the model; embeddings only of tokens and positions that both have.

    Raises ValueError if that run cannot be read, or if its n_layer, n_head or n_embd differs.
    """
    other = read_data(run)
    source = load_model(run, other)
    cfg = source.cfg
    if dataclasses.replace(model.cfg, vocab_size=cfg.vocab_size, block_size=cfg.block_size) != cfg:
        raise ValueError(f"--start: {run} has other blocks than this run: use its n_layer, n_head and n_embd")
    new = model.state_dict()                            # shares memory with the model's weights
    known = [token for token in data.vocabulary if token in other.vocabulary]
    for key, old in source.state_dict().items():
        here = there = slice(min(len(old), len(new[key])))      # all rows, or the positions both have
        if key == "token.weight":
            here, there = ([d.vocabulary.index(token) for token in known] for d in (data, other))
        new[key][here] = old[there]


def read_config(run):
    """The settings of a run. Raises ValueError if the folder is not a run, or its config.json is damaged."""
    path = f"{run}/config.json"
    with reading(path, "choose a run, or make one with train.py"), open(path, encoding="utf-8") as file:
        stored = json.load(file)
        del stored["versions"]
        cfg = Config(**stored)              # settings added to Config since then get their defaults
        cfg.check()
        return cfg


def read_data(run, data=None):
    """The data of a run, generated again from its tasks.json unless `data` is given.

    Raises ValueError if it differs from the data the run was trained on.
    """
    data = data or make_dataset(dataclasses.replace(read_config(run), tasks=f"{run}/tasks.json"))
    stored = read_arrays(f"{run}/states/labels.npz")
    for name, labels in make_labels(data).items():
        if not np.array_equal(labels, stored.get(name, labels)):        # identities added since are fine
            raise ValueError(f"{run}: {name} in labels.npz is not what it was: tasks.json, config.json or "
                             "data.py has changed since; undo the change or train again")
    return data


def make_labels(data):
    """The arrays of labels.npz: "split/position/identity" -> (n,), one label per state in a capture.

    "split/position/text" holds the instructions themselves.
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
    """The file that holds the capture of a step."""
    return f"{run}/states/{step:06d}.npz"


@contextlib.contextmanager
def reading(path, way_out):
    """Turn any exception inside into a ValueError with path and way_out: damaged files can raise anything."""
    try:
        yield
    except Exception as e:
        raise ValueError(f"{path} cannot be read: {way_out} ({e!r:.200})") from None


def read_rows(path):
    """The rows of a .jsonl file. Raises ValueError, naming the file, if it is missing or damaged."""
    with reading(path, "it is missing or damaged, so make it again"), open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(path, rows):
    """Write a .jsonl file."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_arrays(path):
    """Arrays of an .npz file, by name. Raises ValueError, naming the file, if it is missing or damaged."""
    with reading(path, "it is missing or damaged; train again, or see README.md on states of any model"):
        return dict(np.load(path, allow_pickle=False))


def write_arrays(path, arrays):
    """Write an .npz file."""
    np.savez(f"{path}.tmp.npz", **arrays)
    os.replace(f"{path}.tmp.npz", path)


# ---------------------------------------------------------------- the command line


def main():
    """Train a causal language model on instructions and save its hidden states along the way."""
    flags = Flags(Config, description=main.__doc__)
    flags.add_argument("--preset", choices=PRESETS, default="default", help="a set of defaults")
    flags.add_argument("--resume", action="store_true", help="continue --out from its last evaluation")
    given = vars(flags.parse_args())
    name, resume = given.pop("preset"), given.pop("resume")
    given.setdefault("out", f"runs/{name}")
    cfg = dataclasses.replace(read_config(given["out"]) if resume else Config(**PRESETS[name]), **given)
    try:
        train(cfg, resume)
    except KeyboardInterrupt:
        print(f"stopped; to resume: python train.py --resume --out {shlex.quote(cfg.out)}")
        raise


if __name__ == "__main__":
    command_line(main)
