"""Train a causal language model on instructions, and keep its hidden states along the way.

    python train.py                                     the default run, into runs/default
    python train.py --preset quick                      seconds, into runs/quick; there is large, too
    python train.py --tasks mine.json --n-layer 6       your own tasks, any knob (--help lists them)
    python train.py --resume                            go on where a run was stopped

Figures 2 and 3 of the paper start here: the loss, the accuracies, and the captures that `probe.py` reads. Our choices,
since the paper fixes none of it: the sizes, Muon for the blocks' matrices (it needs half the epochs AdamW does), and a
rate that warms up and then falls linearly.
"""
import dataclasses
import io
import json
import math
import platform
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import DataConfig, Dataset, Flags, Split, command_line, knob, make_dataset, write, write_tasks
from model import GPT, ModelConfig

CAPTURED = "subset", "val", "ood"       # the splits that are evaluated, and whose states are kept

# ---------------------------------------------------------------- configuration


@dataclass
class Config(DataConfig):
    """Every knob of a run: the data's, and these."""
    out: str = knob("runs/default", "run folder")
    n_layer: int = knob(4, "blocks")
    n_head: int = knob(4, "attention heads a block")
    n_embd: int = knob(64, "width")
    epochs: int = knob(20, "passes over the training instances")
    batch_size: int = knob(256, "instances a step")
    loss_on: str = knob("all", "all: every next token, as a causal language model; answer: the output alone")
    optimizer: str = knob("muon", "muon: Muon for the blocks' matrices, AdamW for the rest; adamw: AdamW for all")
    lr: float = knob(3e-3, "peak learning rate of AdamW")
    muon_lr: float = knob(0.02, "peak learning rate of Muon")
    weight_decay: float = knob(0.1, "decoupled weight decay of both")
    warmup: float = knob(0.1, "share of the steps in which the rate rises, to fall linearly afterwards")
    n_captures: int = knob(20, "how often the states are kept, about")
    eval_every: int = knob(0, "evaluate at every so many steps, too; 0: only at captures")
    device: str = knob("auto", "cpu, cuda, or auto: cuda if there is one")

    def check(self):
        """Raises ValueError for a knob that is out of its range."""
        for name, value in vars(self).items():
            choices = {"loss_on": ("all", "answer"), "optimizer": ("muon", "adamw"), "device": ("auto", "cpu", "cuda")}
            if name in choices and value not in choices[name]:
                raise ValueError(f"{name} is {value!r}: choose from {', '.join(choices[name])}")
            if name in ("epochs", "batch_size") and value < 1 or name == "eval_every" and value < 0:
                raise ValueError(f"{name} is {value}, it must be at least {int(name != 'eval_every')}")
            if isinstance(value, float) and not 0 <= value < (1 if name == "warmup" else math.inf):
                raise ValueError(f"{name} is {value}, it must be from 0 up to {'1' if name == 'warmup' else 'infinity'}")


PRESETS = {
    "quick": dict(out="runs/quick", n_tasks=8, n_distributions=2, n_layer=3, n_head=3, n_embd=48, epochs=30,
                  n_captures=10),
    "default": {},
    "large": dict(out="runs/large", n_tasks=512, n_distributions=4, n_inputs=64, n_outputs=256, n_val=1, n_layer=8,
                  n_head=8, n_embd=256, batch_size=1024, epochs=10, n_captures=12),
}


def read_config(run: str | Path) -> Config:
    """The configuration of a run folder. Raises ValueError if it is not one."""
    try:
        stored = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
        return Config(**{field.name: stored[field.name] for field in dataclasses.fields(Config)})
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{run} is not a run folder (config.json: {e!r}); train.py makes one") from None


def make_generator(*key) -> torch.Generator:
    """One generator for each purpose, e.g. (seed, "order", epoch), so that no draw depends on what was drawn before."""
    return torch.Generator().manual_seed(random.Random("/".join(map(str, key))).getrandbits(63))


def capture_steps(total: int, n: int) -> list[int]:
    """About n steps from 0 to total: powers of two while they are denser than even steps would be, then even steps."""
    steps = [0, 1]
    while len(steps) < n - 1 and 2 * steps[-1] <= (total - steps[-1]) / (n - len(steps)):
        steps.append(2 * steps[-1])
    return sorted({*steps, *np.linspace(steps[-1], total, max(2, n - len(steps) + 1)).round().astype(int).tolist()})


# ---------------------------------------------------------------- what is measured


@torch.no_grad()
def observe(model: GPT, split: Split, batch: int = 512) -> tuple[float, dict[str, np.ndarray]]:
    """Task accuracy, and position -> (L + 1, n, C) float16 states.

    The greedy output is exactly the true one if, and only if, each of its tokens and the <eos> after it is the
    likeliest next token given the true ones before it: one forward pass tells.
    """
    device = model.token.weight.device
    right, states = [], {position: [] for position in split.positions}
    for start in range(0, len(split.tokens), batch):
        some = slice(start, start + batch)
        tokens = torch.from_numpy(split.tokens[some]).to(device)
        logits, layers = model(tokens[:, :-1])                              # (B, T, V), L + 1 times (B, T, C)
        wrong = (logits.argmax(-1) != tokens[:, 1:]).cpu().numpy() & split.answer[some, 1:]
        right.append(~wrong.any(1))
        for position, (rows, columns) in split.positions.items():
            mine = (start <= rows) & (rows < start + batch)
            states[position].append(torch.stack([x[rows[mine] - start, columns[mine]] for x in layers]).half().cpu())
    return float(np.concatenate(right).mean()), {name: torch.cat(parts, 1).numpy() for name, parts in states.items()}


def write_arrays(path: Path, arrays: dict[str, np.ndarray]):
    """Write an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write(path, buffer.getvalue())


# ---------------------------------------------------------------- training


def make_optimizers(model: GPT, cfg: Config) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon (Jordan et al. 2024), which orthogonalises its updates, for the matrices of the blocks."""
    muon = {p: cfg.optimizer == "muon" and p.dim() == 2 and name.startswith("blocks")
            for name, p in model.named_parameters()}
    optimizers = [torch.optim.AdamW([p for p in muon if not muon[p]], lr=cfg.lr, betas=(0.9, 0.95),
                                    weight_decay=cfg.weight_decay, fused=True)]
    if any(muon.values()):
        optimizers.append(torch.optim.Muon([p for p in muon if muon[p]], lr=cfg.muon_lr,
                                           weight_decay=cfg.weight_decay))
    return optimizers


def begin(cfg: Config, data: Dataset, device: torch.device):
    """Lay out a new run folder with all that does not change while it is trained."""
    out = Path(cfg.out)
    (out / "states").mkdir(parents=True, exist_ok=True)
    write_tasks(out / "tasks.json", data.tokens, data.tasks)
    write_arrays(out / "states" / "labels.npz", {
        f"{name}/{position}/{identity}": ids for name in CAPTURED for position in data.splits[name].positions
        for identity, ids in data.splits[name].labels(position).items()})
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    write(out / "config.json", json.dumps({**asdict(cfg), "runs_on": str(device), "versions": versions}, indent=1))


def evaluate(model: GPT, data: Dataset, out: Path, step: int, keep: bool) -> dict[str, float]:
    """Task accuracy on each captured split; if keep, the states become the capture of this step."""
    seen = {name: observe(model, data.splits[name]) for name in CAPTURED}
    if keep:
        write_arrays(out / "states" / f"{step:06d}.npz", {
            f"{name}/{position}": x for name, (_, states) in seen.items() for position, x in states.items()})
    return {f"acc_{name}": accuracy for name, (accuracy, _) in seen.items()}


def train(cfg: Config, resume: bool = False) -> Path:
    """Train as cfg says, or go on with the run in cfg.out; return that folder, laid out as README.md tells.

    Raises ValueError, before anything is written, for a configuration that cannot be and for a folder in the way.
    """
    cfg.check()
    out = Path(cfg.out)
    if resume and (changed := [name for name, value in vars(read_config(out)).items() if value != vars(cfg)[name]]):
        raise ValueError(f"{out} was begun with another {', '.join(changed)}: leave such flags out to resume it")
    if out.exists() and not resume:
        raise ValueError(f"{out} exists: go on with it by --resume, delete it, or choose another --out")
    data = make_dataset(cfg)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
    split = data.splits["train"]
    scored = split.answer if cfg.loss_on == "answer" else split.tokens != 0
    targets = torch.from_numpy(np.where(scored, split.tokens, -100)).to(device)         # (N, T), -100: not scored
    tokens = torch.from_numpy(split.tokens).to(device)                                  # (N, T)
    model = GPT(ModelConfig(len(data.vocabulary), tokens.shape[1] - 1, cfg.n_layer, cfg.n_head, cfg.n_embd),
                make_generator(cfg.seed, "weights")).to(device)
    optimizers = make_optimizers(model, cfg)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    batch = min(cfg.batch_size, len(tokens))
    per_epoch = len(tokens) // batch                        # what is left over waits for the next epoch's order
    total = cfg.epochs * per_epoch
    captures = capture_steps(total, cfg.n_captures)
    evaluations = {*range(0, total, cfg.eval_every or total), *captures}

    first, seconds, rows = 0, 0.0, []
    if (out / "ckpt.pt").exists():
        saved = torch.load(out / "ckpt.pt", map_location=device, weights_only=True)
        first, seconds = saved["step"], saved["seconds"]
        for part, state in zip([model, *optimizers], saved["parts"]):
            part.load_state_dict(state)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["step"] <= first]
    else:
        begin(cfg, data, device)
    read = sum(len(rows) for name in CAPTURED for rows, _ in data.splits[name].positions.values())
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {total} steps of {batch} instances, "
          f"{device}; {len(captures)} captures of {2 * read * (cfg.n_layer + 1) * cfg.n_embd / 1e6:.1f} MB each\n"
          f"     step  epoch    loss  subset     val     ood  tokens/s   left", flush=True)
    loss_sum, since, launched = torch.zeros((), device=device), first, time.perf_counter()
    clock = launched
    for step in range(first, total + 1):
        epoch, i = divmod(step, per_epoch)
        if step in evaluations and not (rows and rows[-1]["step"] == step):
            loss = loss_sum.item() / (step - since) if step > since else None       # .item() waits for the device
            seconds += time.perf_counter() - clock
            rows.append({"step": step, "epoch": step / per_epoch, "loss": loss,
                         **evaluate(model, data, out, step, step in captures), "seconds": seconds})
            write(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            parts = io.BytesIO()
            torch.save({"step": step, "seconds": seconds, "parts": [x.state_dict() for x in (model, *optimizers)]}, parts)
            write(out / "ckpt.pt", parts.getvalue())
            left = (time.perf_counter() - launched) / max(1, step - first) * (total - step)
            rate = (split.tokens != 0).mean() * tokens[0].numel() * batch * step / seconds if step else 0
            print(f"{step:5}/{total:<5}{step / per_epoch:5.1f}{loss or math.nan:8.3f}" + "".join(f"{rows[-1]['acc_' + name]:8.3f}" for name in CAPTURED)
                  + f"{rate:10,.0f}{left:6.0f}s", flush=True)
            loss_sum, since, clock = torch.zeros((), device=device), step, time.perf_counter()
        if step == total:
            break
        if i == 0 or step == first:
            order = torch.randperm(len(tokens), generator=make_generator(cfg.seed, "order", epoch)).to(device)
        chosen = order[i * batch:(i + 1) * batch]
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / max(1, cfg.warmup * total),
                                                         (total - step) / ((1 - cfg.warmup) * total))
        logits, _ = model(tokens[chosen, :-1])                                          # (B, T - 1, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets[chosen, 1:].flatten(), ignore_index=-100)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss_sum += loss.detach()
    print(f"done, {seconds:.0f} s of training; next: python probe.py {out}")
    return out


def main():
    """The command line."""
    flags = Flags(Config, description="Train a causal language model on instructions and keep its hidden states.")
    flags.add_argument("--preset", choices=PRESETS, default="default", help="where the other flags start from")
    flags.add_argument("--resume", action="store_true", help="go on with the run in --out")
    given = vars(flags.parse_args())
    preset, resume = PRESETS[given.pop("preset")], given.pop("resume")
    out = given.get("out", preset.get("out", Config.out))
    train(dataclasses.replace(read_config(out) if resume else Config(**preset), **given), resume)


if __name__ == "__main__":
    command_line(main)
