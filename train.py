"""Train a causal language model on instructions and save its hidden states along the way.

    python train.py                                   the default run, into runs/default
    python train.py --preset quick                    a smaller run, into runs/quick; also: facts, large
    python train.py --tasks mine.json --n-layer 6     your own tasks, any setting (see --help)
    python train.py --resume                          continue a stopped run from its last evaluation

This records the loss and accuracies of the paper's figure 3, and the captures that probe.py scores for the
paper's figures 2 and 4. The paper gives neither sizes nor an optimiser. We use Muon for the blocks' matrices,
as it needs fewer steps than AdamW, and learning rates that warm up and then fall linearly.
"""
import dataclasses
import shlex
import time
from collections import defaultdict
from pathlib import Path

from runs import (BadInput, Flags, capture_path, check, command_line, kept_steps, make_generator, pick_device,
                  read_arrays, read_json, read_tensors, reading, seeded, write_arrays, write_json, write_rows,
                  write_tensors)

import numpy as np
import torch
import torch.nn.functional as F

from data import OUTPUT, DataConfig, make_dataset, write_tasks
from model import GPT, ModelConfig

# ---------------------------------------------------------------- configuration


@dataclasses.dataclass
class Config(DataConfig):
    """All settings of a run: those of the data, and these.

    TO ADD A SETTING, WRITE A LINE LIKE THESE: `--help` PRINTS THE COMMENT BEHIND IT.
    """
    out: str = "runs/default"       # run folder; with --preset NAME, the default is runs/NAME
    start: str = ""                 # run folder whose last weights to start from
    n_layer: int = 4                # number of blocks
    n_head: int = 2                 # attention heads per block
    n_embd: int = 64                # width of the residual stream
    steps: int = 400                # training steps
    batch_size: int = 48            # instances per step
    instruction_weight: float = 1.0     # loss weight of the instruction and <sep>; that of the output is 1
    input_weight: float = 1.0       # loss weight of the input, whose first token <sep> predicts, and <ans>
    optimizer: str = "muon"         # muon: for blocks' matrices, AdamW for the rest; adamw: needs 1000 steps
    lr: float = 0.014               # peak learning rate of AdamW
    muon_lr: float = 0.055          # peak learning rate of Muon
    weight_decay: float = 0.1       # each step, weights shrink by this fraction times the learning rate
    warmup: float = 0.1             # share of the steps in which learning rates rise; then they fall to 0
    n_captures: int = 9             # number of evaluations, each saving a capture; more frequent early on

    choices = DataConfig.choices | {"optimizer": ("muon", "adamw")}
    at_most = {"warmup": 1}


PRESETS = {
    "default": {},          # as Config has them
    "quick": dict(n_tasks=8, n_regexes=2, n_layer=3, n_embd=48, steps=300),
    "facts": dict(tasks=str(Path(__file__).with_name("facts.json")), n_val=6, steps=800),
    "large": dict(n_tasks=128, n_regexes=4, n_inputs=32, n_outputs=64, n_val=5,
                  n_layer=6, n_embd=128, steps=1200, batch_size=256, lr=0.004, muon_lr=0.04),
}
CAPTURED = "subset", "val", "ood"       # splits whose states are saved; for `pairs`, only the accuracy


def make_model(cfg, data):
    """A GPT sized for the data, with initial weights drawn from cfg.seed."""
    length = data.splits["train"].tokens.shape[1] - 1       # the last token of a row is only ever a target
    with seeded(f"{cfg.seed}/weights"):
        return GPT(ModelConfig(len(data.vocabulary), length, cfg.n_layer, cfg.n_head, cfg.n_embd))


# ---------------------------------------------------------------- training


def train(cfg, resume=False, data=None, make=make_model):
    """Train as cfg says, or resume the run in cfg.out; return that folder, whose files README.md describes.

    `data`, a data.Dataset, replaces the data of cfg. make(cfg, data) returns the network, any causal module:
    tokens (B, T) -> logits (B, T, V) and L + 1 states (B, T, C). To resume, pass both again. Raises BadInput
    for settings out of range and networks that read ahead, before it writes anything, and for nan in states.
    """
    check(cfg)
    check_folder(cfg, resume)
    device = pick_device()
    if resume:
        data = read_data(cfg.out, data)         # checks their labels
    elif data is None:
        data = make_dataset(cfg)
    tokens, loss_weights = make_targets(cfg, data.splits["train"], device)
    with seeded(f"{cfg.seed}/weights"):         # `make` need not do so; some networks draw when first called
        model = make(cfg, data).to(device)
        check_causal(model, tokens[:8, :-1])
    optimizers = make_optimizers(model, cfg)
    rows = load_checkpoint(cfg.out, model, data, optimizers) if resume else []
    last = rows[-1] if rows else {"step": 0, "seconds": 0}      # saved before its update, so go on with that
    if resume:
        print(f"resuming {cfg.out} at step {last['step']}")
    else:
        if cfg.start:
            init_from(cfg.start, model, data)
        create_run(cfg, data, model, optimizers)
    autocast = torch.autocast(device.type, torch.bfloat16, device.type == "cuda")        # not on CPU
    due = capture_steps(cfg)[len(rows):]        # steps still to be evaluated: each has a row
    begun = time.perf_counter() - last["seconds"]
    model.train()
    for step in range(last["step"], cfg.steps + 1):
        # forward and backward: the weighted mean loss over the tokens of the batch
        batch = pick_batch(cfg, len(tokens), step)
        x, y, w = tokens[batch, :-1], tokens[batch, 1:], loss_weights[batch, 1:]         # (B, T - 1) each
        with autocast, seeded(f"{cfg.seed}/step/{step}"):       # seeded for networks with dropout
            logits, _ = model(x)                                                    # (B, T - 1, V)
            losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        loss = losses @ w.flatten() / w.sum()
        loss.backward()

        # every so often, evaluate and save the network that has this loss
        if step in due:
            accuracies, states = evaluate(model, data)
            model.train()
            write_arrays(capture_path(cfg.out, step), states)
            rows.append({"step": step, "loss": round(loss.item(), 4), **accuracies,
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
    return Path(cfg.out)


def schedule(step, cfg):
    """The learning rate at a step, relative to its peak: it rises to 1 during warmup, then falls linearly."""
    warm = max(1, round(cfg.warmup * cfg.steps))
    return min((step + 1) / warm, (cfg.steps - step) / (cfg.steps - warm + 1))


def capture_steps(cfg):
    """Steps to evaluate at, 0 to the last: n_captures (fewer in a short run), evenly spaced in sqrt(step)."""
    # down from 1 to 0, so that a single capture is that of the last step
    return sorted({round(cfg.steps * x * x) for x in np.linspace(1, 0, cfg.n_captures)})


def make_targets(cfg, split, device):
    """What to predict and how much each counts: tokens and loss weights, both (N, T)."""
    # of padding, instruction, input and output: the order of their numbers in data.py
    by_part = np.float32([0, cfg.instruction_weight, cfg.input_weight, 1])
    return torch.as_tensor(split.tokens, device=device), torch.as_tensor(by_part[split.part], device=device)


def pick_batch(cfg, n, step):
    """Indices (B,) of a step's batch among n instances. Each epoch is reshuffled and drops its last n % B."""
    size = min(cfg.batch_size, n)
    epoch, i = divmod(step, n // size)
    return torch.randperm(n, generator=make_generator(f"{cfg.seed}/order/{epoch}"))[i * size:(i + 1) * size]


@torch.no_grad()
def check_causal(model, tokens):
    """Raise BadInput if a token changes a logit before it: the network could read what it should predict."""
    model.eval()
    logits, _ = model(tokens)                                       # (B, T, V)
    for t in range(1, tokens.shape[1]):
        edited = tokens.clone()
        edited[:, t] = 0                                            # <pad>
        change = model(edited)[0] - logits
        if change[:, :t].abs().max() > 1e-5:
            raise BadInput(f"the network reads ahead: token {t} changes logits before it. Make it causal")


def make_optimizers(model, cfg):
    """[AdamW, Muon], or [AdamW] if there is nothing for Muon. `train` sets the learning rates.

    Muon gets the matrices in parameters called blocks..., if cfg.optimizer says so, and AdamW all the rest.
    """
    groups = defaultdict(list)          # shape -> matrices for Muon; "rest" -> parameters for AdamW
    for name, p in model.named_parameters():
        by_muon = cfg.optimizer == "muon" and name.startswith("blocks") and p.dim() == 2
        groups[p.shape if by_muon else "rest"].append(p)
    decay = {"weight_decay": cfg.weight_decay}
    adamw = torch.optim.AdamW(groups.pop("rest"), betas=(0.9, 0.95), fused=True, **decay)
    muon_groups = [{"params": params} for params in groups.values()]
    return [adamw, Muon(muon_groups, decay)] if muon_groups else [adamw]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): step along the running mean of the gradients, orthogonalised.

    The algorithm of torch.optim.Muon, but twice as fast on CPU: all matrices of one shape form a parameter
    group and are updated together, in float32, because few CPUs are fast in bfloat16.
    """

    @torch.no_grad()
    def step(self):
        """Update all parameters from their gradients. There is no closure, so no loss to return."""
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            grads = torch.stack([p.grad for p in params])       # (P, m, n)
            # torch keeps state by parameter: that of a whole group goes with its first one
            mean = self.state[params[0]].setdefault("mean", torch.zeros_like(grads))
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


@torch.inference_mode()
def observe(model, split):
    """Run the model on a split. Returns (N,) bool, is each answer right?, and position -> states.

    States are (L + 1, n, C) float16. Right means that greedy decoding gives exactly the true output. This is
    so if and only if each of its tokens, <eos> included, is the likeliest after the true tokens before it, so
    one pass is enough.
    """
    model.eval()
    tokens = torch.as_tensor(split.tokens, device=pick_device())
    guesses, states = [], defaultdict(list)
    for start in range(0, len(tokens), 256):
        logits, layers = model(tokens[start:start + 256, :-1])          # (B, T - 1, V)
        guesses.append(logits.argmax(-1).cpu())
        layers = torch.stack(layers).cpu()                              # (L + 1, B, T - 1, C)
        for position, where in split.positions.items():
            here = (start <= where[0]) & (where[0] < start + 256)       # the rows of this batch
            rows, first, last = np.stack(where)[:, here]                # (n,) each
            x = layers[:, rows - start, first]
            for i in range(1, 1 + max(last - first, default=0)):        # add the other columns of the spans
                longer = first + i <= last
                x[:, longer] += layers[:, rows[longer] - start, first[longer] + i]
            states[position].append((x / torch.from_numpy(last - first + 1)[:, None]).half())
    # all that is not output counts as right, (N, T - 1)
    right = (torch.cat(guesses).numpy() == split.tokens[:, 1:]) | (split.part[:, 1:] != OUTPUT)
    return right.all(1), {position: torch.cat(x, 1).numpy() for position, x in states.items()}


def evaluate(model, data):
    """The accuracy on every split but train, {"acc_subset": accuracy, ...}, and the states of a capture.

    Raises BadInput if any state is nan or infinite.
    """
    accuracies, states = {}, {}
    for name, split in data.splits.items():
        if name != "train":
            right, of_split = observe(model, split)
            accuracies[f"acc_{name}"] = round(right.mean().item(), 4)
            if name in CAPTURED:
                for position, x in of_split.items():
                    if not np.isfinite(x).all():
                        raise BadInput("the states are nan or infinite: lower --lr or --muon-lr and choose "
                                       "another --out (the last good checkpoint is kept)")
                    states[f"{name}/{position}"] = x
    return accuracies, states


# ---------------------------------------------------------------- the run folder


def check_folder(cfg, resume):
    """Raise BadInput if the folder of a new run is in use, or if a resumed run would change settings."""
    if resume:
        for key, value in vars(read_config(cfg.out)).items():
            if key != "out" and value != getattr(cfg, key):
                raise BadInput(f"{cfg.out} was created with another {key}: to resume it, drop that flag (or "
                               "--preset); for a new run, choose another --out")
    elif not cfg.out or Path(cfg.out, "config.json").exists() or kept_steps(cfg.out):
        raise BadInput(f"{cfg.out!r} is in use, or not a folder name: choose another --out, delete it, or "
                       "continue it with --resume")


def create_run(cfg, data, model, optimizers):
    """Write the fixed files and a first checkpoint; config.json comes last: it marks the folder as a run."""
    write_tasks(f"{cfg.out}/tasks.json", data.cut_into, data.tasks)
    write_arrays(f"{cfg.out}/states/labels.npz", make_labels(data))
    save_checkpoint(cfg.out, [], model, optimizers)
    versions = f"torch {torch.__version__}, numpy {np.__version__}, {pick_device()}"
    write_json(f"{cfg.out}/config.json", {**vars(cfg), "versions": versions})


def save_checkpoint(run, rows, model, optimizers):
    """Write all that is needed to resume: weights, optimizers' states and, to match them, the metrics."""
    write_rows(f"{run}/metrics.jsonl", rows)
    write_tensors(f"{run}/ckpt.pt", {"rows": rows, "model": model.state_dict(),
                                     "optimizers": [optimizer.state_dict() for optimizer in optimizers]})


def load_checkpoint(run, model, data, optimizers=()):
    """Load a run's last checkpoint into model and optimizers; return its metrics, one row per evaluation.

    Raises BadInput if it is missing or damaged, or if the model does not reproduce the last capture.
    """
    path = f"{run}/ckpt.pt"
    saved = read_tensors(path, pick_device())
    with reading(path, "model.py or data.py has changed since; undo the change or train again"):
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
    rows = saved["rows"]
    if rows:
        then = read_arrays(capture_path(run, rows[-1]["step"]))["subset/answer"]
        now = observe(model, data.splits["subset"])[1]["answer"]
        # float16 or another device changes states by less
        if not np.allclose(now, then, 0, 0.002 * np.abs(then).max()):
            raise BadInput(f"{path} does not reproduce the states of the last capture: model.py or data.py "
                           "has changed since; undo the change or train again")
    return rows


def load_model(run, data, make=make_model):
    """The network of a run, with its last saved weights. Raises BadInput if they cannot be loaded."""
    model = make(read_config(run), data).to(pick_device())
    load_checkpoint(run, model, data)
    return model


def init_from(run, model, data):
    """Copy another run's last weights into a GPT; embeddings only of tokens and positions that both have.

    Raises BadInput if that run cannot be read, or if its n_layer, n_head or n_embd differs.
    """
    other = read_data(run)
    source = load_model(run, other)
    for key in "n_layer", "n_head", "n_embd":
        if getattr(model.cfg, key) != getattr(source.cfg, key):
            raise BadInput(f"--start: {run} has another {key} than this run: use the same")
    new = model.state_dict()                            # shares memory with the model's weights
    for key, old in source.state_dict().items():
        if key == "token.weight":
            for i, token in enumerate(data.vocabulary):
                if token in other.vocabulary:
                    new[key][i] = old[other.vocabulary.index(token)]
        else:
            n = min(len(old), len(new[key]))            # only the embedding of positions can differ in length
            new[key][:n] = old[:n]


def read_config(run):
    """The settings of a run. Raises BadInput if the folder is not a run, or its config.json is damaged."""
    path = f"{run}/config.json"
    remedy = "choose a run of this edition, or make one with train.py"
    stored = read_json(path, remedy)
    with reading(path, remedy):
        del stored["versions"]
        cfg = Config(**stored)              # settings added to Config since then get their defaults
    check(cfg)
    return cfg


def read_data(run, data=None):
    """The data of a run, generated again from its tasks.json unless `data` is given.

    Raises BadInput if the labels of its captures are not those of the data the run was trained on.
    """
    data = data or make_dataset(dataclasses.replace(read_config(run), tasks=f"{run}/tasks.json"))
    stored = read_arrays(f"{run}/states/labels.npz")
    for name, labels in make_labels(data).items():
        if not np.array_equal(labels, stored.get(name, labels)):        # an identity added since passes
            raise BadInput(f"{run}: {name} in labels.npz is not what it was: tasks.json, config.json or "
                           "data.py has changed since; undo the change or train again")
    return data


def make_labels(data):
    """The arrays of labels.npz: "split/position/identity" -> (n,), one label per state in a capture."""
    labels = {}
    for name in CAPTURED:
        split = data.splits[name]
        for position in split.positions:
            for identity, values in split.labels(position).items():
                labels[f"{name}/{position}/{identity}"] = values
    return labels


# ---------------------------------------------------------------- the command line


def main():
    """Train a causal language model on instructions and save its hidden states along the way."""
    flags = Flags(Config, description=main.__doc__)
    flags.add_argument("--preset", choices=PRESETS, help="a set of defaults for the settings")
    flags.add_argument("--resume", action="store_true", help="continue --out from its last evaluation")
    given = vars(flags.parse_args())
    preset, resume = given.pop("preset"), given.pop("resume")
    given.setdefault("out", f"runs/{preset or 'default'}")
    if resume and preset is None:
        cfg = read_config(given["out"])
    else:
        cfg = Config(**PRESETS[preset or "default"])
    cfg = dataclasses.replace(cfg, **given)
    try:
        train(cfg, resume)
        print(f"done; next: python probe.py {shlex.quote(cfg.out)}")
    except KeyboardInterrupt:
        print(f"stopped; to resume: python train.py --resume --out {shlex.quote(cfg.out)}")
        raise


if __name__ == "__main__":
    command_line(main)
