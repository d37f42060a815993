"""Train a causal language model on instructions, and keep its hidden states along the way.

    python train.py                                   the default run, into runs/default
    python train.py --preset quick                    seconds, into runs/quick; facts and large, likewise
    python train.py --tasks mine.json --n-layer 6     your own tasks, any knob (--help lists them)
    python train.py --resume                          go on where a run was stopped

Figures 2 and 3 of the paper start here: the loss, the accuracies, and the captures that probe.py reads. Our
choices, since the paper fixes none of it: the sizes, Muon for the blocks' matrices (it needs half the epochs
that AdamW does), a rate that warms up and then falls linearly.
"""
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
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
import torch.nn.functional as F

from data import DataConfig, Dataset, Flags, Split, command_line, knob, make_dataset, write, write_tasks
from model import GPT, ModelConfig

# ---------------------------------------------------------------- configuration

CAPTURED = "subset", "val", "ood"       # the splits whose states are kept; of `pairs`, the accuracy only


@dataclass
class Config(DataConfig):
    """Every knob of a run: the data's, and these."""
    out: str = knob("runs/default", "run folder")
    start: str = knob("", "a run whose last weights to begin with; of tokens and places, those of both")
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
    n_captures: int = knob(20, "how often the states are kept, about")
    eval_every: int = knob(0, "steps between evaluations besides those at captures; 0: no others", least=0)
    init_seed: int = knob(-1, "of the initial weights, if not --seed", least=-1, most=2 ** 63)
    order_seed: int = knob(-1, "of the order of the instances, if not --seed", least=-1, most=2 ** 63)
    device: str = knob("auto", "cpu, cuda, or auto: cuda if there is one", choices=("auto", "cpu", "cuda"))


PRESETS = {
    "quick": dict(out="runs/quick", n_tasks=8, n_distributions=2, n_layer=3, n_head=3, n_embd=48, epochs=30,
                  n_captures=10),
    "default": {},
    "facts": dict(tasks="facts.json", out="runs/facts", n_val=6, epochs=15, n_captures=14),
    "large": dict(out="runs/large", n_tasks=512, n_distributions=4, n_inputs=64, n_outputs=256, n_val=5,
                  n_layer=8, n_head=8, n_embd=256, batch_size=1024, epochs=10, n_captures=12),
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


def pick_device(cfg: Config) -> torch.device:
    """Where to run. Raises ValueError if it is not there."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here: use --device cpu")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(auto if cfg.device == "auto" else cfg.device)


# ---------------------------------------------------------------- the run folder


def read_config(run: str | Path) -> Config:
    """The configuration of a run folder. Raises ValueError if it is not one."""
    try:
        stored = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
        stored["versions"]      # a knob that came after the run has its default; this one every run has
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
    except (ValueError, KeyError, TypeError, RecursionError) as e:
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


def captured(run: str | Path) -> list[int]:
    """The steps whose captures are there."""
    return sorted(int(path.stem) for path in (Path(run) / "states").glob("[0-9]*.npz"))


def labels_of(data: Dataset) -> dict[str, np.ndarray]:
    """The content of labels.npz: "split/position/identity" -> (n,), a label for each state of a capture."""
    return {f"{name}/{position}/{identity}": ids
            for name in CAPTURED for position in data.splits[name].positions
            for identity, ids in data.splits[name].labels(position).items()}


def digest(data: Dataset) -> str:
    """Tells data sets apart: a hash of all their tokens."""
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
             "versions": versions}
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
    """Set model and optimisers to a run's checkpoint; return its step, metrics, losses since, and seconds.

    That is 0, [], [], 0.0 if there is none. Raises ValueError for a checkpoint that is damaged, or of another
    configuration.
    """
    if not (out / "ckpt.pt").exists():
        return 0, [], [], 0.0
    try:
        with zipfile.ZipFile(out / "ckpt.pt") as parts:     # torch does not look at the checksums it writes
            if bad := parts.testzip():
                raise ValueError(f"{bad} has changed")
        saved = torch.load(out / "ckpt.pt", map_location=model.token.weight.device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        step, rows, losses, seconds = (saved[key] for key in ("step", "rows", "losses", "seconds"))
        changed = [key for key, x in vars(cfg).items() if key != "out" and saved["config"].get(key, x) != x]
        lost = sorted({*saved["captures"]} - {*captured(out)})
        if changed or lost:
            raise ValueError(f"config.json has another {', '.join(changed)}" if changed else
                             f"the capture of step {lost[0]} is lost")
    except Exception as e:          # a damaged file can raise nearly anything
        raise ValueError(f"{out}/ckpt.pt is damaged or does not fit, begin another --out: {e!r:.200}"
                         ) from None
    return step, rows, list(losses), seconds


def record(cfg: Config, out: Path, model: GPT, optimizers: list[torch.optim.Optimizer], step: int,
           rows: list[dict], losses: list[torch.Tensor], seconds: float):
    """Write a checkpoint, all that `restore` gives back, and the metrics so far."""
    buffer = io.BytesIO()
    torch.save({"step": step, "rows": rows, "losses": torch.tensor(losses), "seconds": seconds,
                "captures": captured(out), "config": vars(cfg), "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, buffer)
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
    """Give a model the weights of another run; of tokens and places only those that both have.

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
        changed = [key for key, x in vars(read_config(out)).items() if x != vars(cfg)[key] and key != "out"]
        if changed:
            raise ValueError(f"{out} was begun with another {', '.join(changed)}: leave that out to go on, "
                             "or choose another --out")
    elif out.exists():
        raise ValueError(f"{out} exists: choose another --out, delete it, or go on with it by --resume")
    # a run goes on with the tasks it began with, whatever has become of the file they came from
    return (read_data(out, data) if resume else data or make_dataset(cfg)), pick_device(cfg)


# ---------------------------------------------------------------- what is measured


@torch.no_grad()
def observe(model: GPT, split: Split, batch: int = 512) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Which instances are answered right, (N,) bool, and position -> (L + 1, n, C) float16 states.

    Task accuracy is the share of the right ones. The greedy output is exactly the true one if, and only if,
    each of its tokens and the <eos> after it is the likeliest next token given the true ones before it: one
    forward pass tells.
    """
    device = model.token.weight.device
    right, states = [], {position: [] for position in split.positions}
    for start in range(0, len(split.tokens), batch):
        some = slice(start, start + batch)
        tokens = torch.from_numpy(split.tokens[some]).to(device)
        logits, layers = model(tokens[:, :-1])                          # (B, T, V), L + 1 times (B, T, C)
        wrong = (logits.argmax(-1) != tokens[:, 1:]).cpu().numpy() & split.is_output[some, 1:]
        right.append(~wrong.any(1))
        for position, (rows, columns) in split.positions.items():
            mine = (start <= rows) & (rows < start + batch)
            read = [x[rows[mine] - start, columns[mine]] for x in layers]
            states[position].append(torch.stack(read).half().cpu())
    states = {position: torch.cat(parts, 1).numpy() for position, parts in states.items()}
    return np.concatenate(right), states


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


def make_optimizers(model: GPT, cfg: Config) -> list[torch.optim.Optimizer]:
    """AdamW, and for the blocks' matrices Muon (Jordan et al. 2024), which orthogonalises its updates."""
    muon = [p for p in model.blocks.parameters() if p.dim() == 2] if cfg.optimizer == "muon" else []
    rest = [p for p in model.parameters() if all(p is not q for q in muon)]
    adamw = torch.optim.AdamW(rest, cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    return [adamw, torch.optim.Muon(muon, cfg.muon_lr, weight_decay=cfg.weight_decay)] if muon else [adamw]


def check_finite(model: GPT, losses: list[torch.Tensor], step: int):
    """Raises ValueError if a loss or a weight is nan or infinite."""
    if not all(x.isfinite().all() for x in [*losses, *model.parameters()]):
        raise ValueError(f"the loss or a weight is nan or infinite by step {step}: begin another --out "
                         "with a lower --lr or --muon-lr (the last good checkpoint is kept)")


def train(cfg: Config, resume: bool = False, asked: list = (), data: Dataset | None = None) -> Path:
    """Train as cfg says, or go on with the run in cfg.out; return that folder, laid out as README.md tells.

    `data`, if given, is taught in place of what cfg describes (splits train, subset, val, ood, and any more);
    whoever goes on with the run or reads it gives it again. Once `asked` is not empty, the run is saved and
    KeyboardInterrupt raised. Raises ValueError for a loss that is not finite, and, with nothing written, for
    a configuration that cannot be or a folder in the way.
    """
    data, device = prepare(cfg, resume, data)
    out, split = Path(cfg.out), data.splits["train"]
    scored = split.is_output if cfg.loss_on == "answer" else split.tokens != 0      # 0 is <pad>
    targets = torch.from_numpy(np.where(scored, split.tokens, -100)).to(device)     # (N, T), -100: not scored
    tokens = torch.from_numpy(split.tokens).to(device)                              # (N, T)
    length = (split.tokens != 0).sum() / len(tokens)                                # tokens an instance
    batch = min(cfg.batch_size, len(tokens))
    per_epoch = len(tokens) // batch                    # what is left over waits for another epoch's order
    total = cfg.steps or cfg.epochs * per_epoch
    captures = capture_steps(total, cfg.n_captures)
    evaluations = {*range(0, total, cfg.eval_every or total), *captures}
    model = make_model(cfg, data).to(device)
    if cfg.start and not (out / "ckpt.pt").exists():
        begin_with(cfg.start, model, data)
    optimizers = make_optimizers(model, cfg)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    if not resume:
        begin(cfg, data, device)
    size = 2 * cfg.n_embd * (cfg.n_layer + 1) * sum(
        len(read) for name in CAPTURED for read, _ in data.splits[name].positions.values())
    weights = sum(p.numel() for p in model.parameters())
    print(f"{out}: {weights:,} parameters, {total} steps of {batch} instances on {device}; "
          f"{len(captures)} captures, {len(captures) * size / 1e6:.0f} MB\n\n"
          "       step  epoch    loss" + "".join(f"{name:>8}" for name in list(data.splits)[1:])
          + "  tokens/s    left", flush=True)

    with hold(out):
        first, rows, losses, seconds = restore(cfg, out, model, optimizers)
        write_rows(out / "metrics.jsonl", rows)         # whatever has become of them
        order, launched = None, time.perf_counter()
        clock = launched                                # it stops where something else than training is done
        for step in range(first, total + 1):
            epoch, i = divmod(step, per_epoch)
            if step in evaluations and not (rows and rows[-1]["step"] == step):
                check_finite(model, losses, step)
                loss = torch.stack(losses).mean().item() if losses else None    # waits for the device
                seconds += time.perf_counter() - clock
                rows.append({"step": step, "epoch": step / per_epoch, "loss": loss,
                             **evaluate(model, data, out, step, step in captures), "seconds": seconds})
                losses = []
                record(cfg, out, model, optimizers, step, rows, losses, seconds)
                print_row(rows[-1], total, step * batch * length / seconds,
                          (total - step) * (time.perf_counter() - launched) / max(1, step - first))
                clock = time.perf_counter()
            if step == total:
                break
            if asked:
                check_finite(model, losses, step)
                record(cfg, out, model, optimizers, step, rows, losses, seconds + time.perf_counter() - clock)
                print(f"stopped and saved at step {step}; to go on: python train.py --resume --out {out}")
                raise KeyboardInterrupt
            if i == 0 or order is None:
                generator = make_generator(cfg.seed_of("order"), "order", epoch)
                order = torch.randperm(len(tokens), generator=generator).to(device)
            chosen = order[i * batch:(i + 1) * batch]
            rate = min((step + 1) / max(1, cfg.warmup * total), (total - step) / ((1 - cfg.warmup) * total))
            for optimizer, peak in zip(optimizers, peaks):
                optimizer.param_groups[0]["lr"] = rate * peak
            logits, _ = model(tokens[chosen, :-1])                              # (B, T - 1, V)
            loss = F.cross_entropy(logits.flatten(0, 1), targets[chosen, 1:].flatten(), ignore_index=-100)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
    print(f"done; next: python probe.py {out}")
    return out


def print_row(row: dict, total: int, speed: float, left: float):
    """One line an evaluation, under the header that `train` prints."""
    loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
    accuracies = "".join(f"{value:8.3f}" for key, value in row.items() if key.startswith("acc_"))
    print(f"{row['step']:5}/{total:<5}{row['epoch']:7.1f}{loss:>8}{accuracies}{speed:10,.0f}{left:7.0f}s",
          flush=True)


def main():
    """Train a causal language model on instructions and keep its hidden states."""
    flags = Flags(Config, description=main.__doc__)
    flags.add_argument("--preset", choices=PRESETS, default="default", help="what the other flags start from")
    flags.add_argument("--resume", action="store_true", help="go on with the run in --out, as it was begun")
    given = vars(flags.parse_args())
    preset, resume = PRESETS[given.pop("preset")], given.pop("resume")
    given = {"out": preset.get("out", Config.out), **given}
    cfg = read_config(given["out"]) if resume else Config(**preset)
    asked = []                      # Ctrl-C asks to save and stop after the step; a second one stops at once

    def ask(*_):
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        train(dataclasses.replace(cfg, **given), resume, asked)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        again = "go on with --resume" if Path(given["out"]).exists() else "run this again"
        raise ValueError(f"{e.filename or 'stdout'}: {e.strerror}; make room, then {again}") from None
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    command_line(main)
