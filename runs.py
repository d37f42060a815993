"""What is not the subject: flags, error lines, the files and rows of a run folder. Read it last, or never.

Every file imports this one first: it sets GOMP_SPINCOUNT, which torch reads when it is imported.
"""
import argparse
import contextlib
import dataclasses
import inspect
import io
import json
import os
import random
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

# On a busy machine, threads that spin while they wait can make small training steps 20 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


# ---------------------------------------------------------------- the command line


class BadInput(ValueError):
    """What a user can fix: a setting, a file, a folder. The message says what to do, in one line."""


class Flags(argparse.ArgumentParser):
    """A parser with a flag for every setting of the dataclass `config`; flags not given are left out.

    The help text of a flag is the comment behind its setting, which must be of a plain type such as int. With
    no config, there are no such flags. Options are those of ArgumentParser.
    """

    def __init__(self, config=None, **options):
        super().__init__(allow_abbrev=False, **options)
        if config is None:
            return
        # base classes first, without `object`; a line is `name: type = default  # comment`
        source = "".join(inspect.getsource(part) for part in config.__mro__[-2::-1])
        comments = dict(re.findall(r"(\w+): \w+ = .*?# (.*)", source))
        for field in dataclasses.fields(config):
            comment = comments.get(field.name, "").replace("%", "%%")
            takes = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
            self.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS,
                              help=f"{comment} (default: {field.default!r})", **takes)

    def error(self, message):
        raise BadInput(f"{message}; --help lists the flags")


def check(cfg):
    """Raise BadInput if a setting of the dataclass cfg has the wrong type or is out of range.

    cfg.choices lists the values that some settings may have. Whole numbers start at 1, or at 0 if that is
    their default; other numbers start at 0. They end at cfg.at_most or at a million.
    """
    choices = getattr(cfg, "choices", {})
    at_most = getattr(cfg, "at_most", {})
    for field in dataclasses.fields(cfg):
        name, kind, value = field.name, field.type, getattr(cfg, field.name)
        if type(value) is not kind and (kind, type(value)) != (float, int):        # an int may serve as float
            raise BadInput(f"{name} is {value!r:.60}: it must be of type {kind.__name__}")
        if value not in choices.get(name, [value]):
            raise BadInput(f"{name} is {value!r}: choose from {', '.join(choices[name])}")
        least = 1 if kind is int and field.default else 0
        most = at_most.get(name, 10 ** 6)
        if kind in (int, float) and not least <= value <= most:
            raise BadInput(f"{name} is {value}: it must be from {least} to {most:,}")


def command_line(main):
    """Run main(). What a user can fix becomes one line on stderr, `error: what to do`, and exit status 2.

    That is BadInput, a file that cannot be opened, and a missing module. Any other exception keeps its
    traceback: it shows the place of a mistake in the code. Characters that the terminal lacks are escaped.
    """
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):              # a notebook's streams take any character
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:                             # the reader of our output, say `head`, closed it
        os._exit(141)                                   # 128 + SIGPIPE
    except KeyboardInterrupt:
        sys.exit(130)                                   # 128 + SIGINT
    except (BadInput, OSError, ModuleNotFoundError) as e:
        if isinstance(e, OSError) and e.filename is None:
            raise
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------- files


def write(path, content):
    """Write text or bytes to a file, creating its folder. Nobody reads half a file: it is renamed when whole.

    Raises BadInput if it cannot be written, for example because the disk is full.
    """
    if isinstance(content, str):
        content = content.encode()
    path = Path(path)
    aside = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise BadInput(f"{path} cannot be written: {e.strerror}") from e


@contextlib.contextmanager
def reading(path, remedy):
    """Turn any exception inside into a BadInput with path and remedy: damaged files can raise anything.

    Only the reading itself belongs inside, so that a mistake in the code is not taken for a damaged file.
    """
    try:
        yield
    except Exception as e:
        raise BadInput(f"{path} cannot be read: {remedy} ({e!r:.200})") from e


def write_json(path, content):
    """Write a JSON file."""
    write(path, json.dumps(content, indent=1, ensure_ascii=False))


def read_json(path, remedy):
    """What a JSON file holds. Raises BadInput if it is damaged or repeats a key, which json overlooks."""
    def without_repeats(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a key is there twice among {[key for key, _ in pairs]}")
        return dict(pairs)

    with reading(path, remedy):
        return json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=without_repeats)


def write_rows(path, rows):
    """Write a .jsonl file: one JSON object a line."""
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path):
    """The rows of a .jsonl file. Raises BadInput if it is missing or damaged."""
    with reading(path, "it is missing or damaged, so make it again"), open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_arrays(path, arrays):
    """Write an .npz file of arrays, name -> array."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    write(path, file.getbuffer())


def read_arrays(path):
    """The arrays of an .npz file, name -> array. Raises BadInput if it is missing, damaged or not plain."""
    with reading(path, "it is missing or damaged, so train again; or it holds Python objects, as columns of "
                 "pandas do: save them with .astype(str)"):
        return dict(np.load(path, allow_pickle=False))


def capture_path(run, step):
    """The file that holds the states of a step."""
    return f"{run}/states/{step:06d}.npz"


def kept_steps(folder):
    """The steps with a capture in the folder, in ascending order."""
    return sorted(int(path.stem) for path in Path(folder).glob("states/[0-9][0-9][0-9][0-9][0-9][0-9].npz"))


# ---------------------------------------------------------------- torch, imported late: data.py works without


def make_generator(purpose):
    """A random generator of torch, seeded by its purpose, e.g. "0/order/3": seed 0, the order of epoch 3."""
    import torch
    return torch.Generator().manual_seed(random.Random(purpose).getrandbits(63))


@contextlib.contextmanager
def seeded(purpose):
    """Within a `with` block, networks draw what the purpose says: it seeds torch's global generator."""
    import torch
    with torch.random.fork_rng(devices=[]):             # afterwards, the generator is as it was
        torch.manual_seed(make_generator(purpose).initial_seed())
        yield


def pick_device():
    """The GPU, or the CPU if there is none. CUDA_VISIBLE_DEVICES="" hides all GPUs."""
    import torch
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def write_tensors(path, content):
    """Write a .pt file of tensors in dicts and lists."""
    import torch
    file = io.BytesIO()
    torch.save(content, file)
    write(path, file.getbuffer())


def read_tensors(path, device):
    """What a .pt file holds. Raises BadInput if it is missing or damaged."""
    import torch
    with reading(path, "it is missing or damaged, so train again"):
        return torch.load(path, map_location=device, weights_only=True)


# ---------------------------------------------------------------- rows


def read_run(run):
    """All numbers of a run or of a demo of apply.py: rows with measure, value, and keys that say of what."""
    rows = []
    for name in "metrics", "probe", "patch", "apply":
        path = Path(run, f"{name}.jsonl")
        for row in read_rows(path) if path.exists() else []:
            if "measure" in row:
                rows.append(row)
            else:                           # each of its numbers becomes a row
                rows += as_rows(row, row)
    return rows


def as_rows(about, numbers):
    """Rows for numbers, measure -> value: one each, with the keys of `about` as well."""
    return [{**about, "measure": measure, "value": value} for measure, value in numbers.items()]


def select(rows, **where):
    """The rows that have these values; None also matches rows without the key."""
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def spread(values, digits=2):
    """Mean ± standard deviation over seeds, as text with so many decimals; "-" if any seed has no value."""
    if None in values:
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def print_table(title, rows, across, digits=2):
    """Print a table with a line per arm (what is compared) and a column per value of the key `across`.

    A cell shows the spread over seeds.
    """
    cells = defaultdict(list)
    for row in rows:
        cells[row["arm"], row[across]].append(row["value"])
    arms, columns = (dict.fromkeys(names) for names in zip(*cells))     # each name once, in order
    print(f"\n{title}\n{'':16}" + "".join(f"{column!s:>19}" for column in columns))
    for arm in arms:
        texts = [spread(cells.get((arm, column), [None]), digits) for column in columns]
        print(f"{arm:16}" + "".join(f"{text:>19}" for text in texts))
