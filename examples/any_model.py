"""Run a pretrained language model on instructions and save its hidden states for probe.py.

    python examples/any_model.py --model DIR_OR_GGUF --tasks facts.json --out runs/mine
    python probe.py runs/mine --view raw unphrased      do its states cluster by task?
    make smollm2                                        a study of SmolLM2-135M-Instruct with this file

The model can be any causal one that transformers can load, with a fast tokenizer that has an end-of-text
token. Position `instruction` is the token with the last character of the instruction, `answer` the last token
of the prompt. Unlike <sep> in our own networks, the token at `instruction` varies, so even layer 0 can tell
"?" from ".". Layer 0 is the embedding, layer l the output of block l; the last block is left out, because
transformers returns its output only after the final norm. The label `phrasing` is the number of a regex
within its task (so do not use --shuffle-tasks): in facts.json the first is a question, followed by a command,
a terse phrase and a polite request.
"""
import os
import sys
from dataclasses import dataclass

sys.path.append(f"{sys.path[0]}/..")

from runs import Flags, command_line, write_arrays, write_rows

import numpy as np
import torch

from data import DataConfig, make_dataset
from train import make_labels


@dataclass
class Config(DataConfig):
    """Settings of the data, three of them with other defaults, and of the language model.

    Only split val is read. n_train * n_asked must be at least the number of inputs of a task. With n_asked
    of 1, states at `instruction` would be labelled with an input that the model has not read yet.
    """
    n_train: int = 24
    n_val: int = 3
    n_asked: int = 2
    model: str = ""                 # language model: a folder or a GGUF file, as a path from ./ or /
    out: str = "runs/any_model"     # output folder
    template: str = "Instruction: {instruction}\nInput: {input}\nAnswer: "  # prompt; must end in white space
    untrained: bool = False         # control: random weights from a fixed seed


def load(cfg):
    """Load the network, in float32 on the CPU, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer        # make smollm2 installs it
    folder, file = os.path.split(cfg.model) if ".gguf" in cfg.model else (cfg.model, None)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    if cfg.untrained:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model.config)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


@torch.inference_mode()
def read(model, tokenizer, pairs):
    """For each pair (prompt, Instance), yield its states and whether the model answers correctly.

    The states (layers, 2, C) are read at the end of the instruction and of the prompt. Correct means that
    greedy decoding begins with the true output, token for token.
    """
    for i in range(0, len(pairs), 16):
        print(f"\r{i} of {len(pairs)} prompts", end="")
        some = pairs[i:i + 16]
        batch = tokenizer([prompt + x.output for prompt, x in some], padding=True, return_tensors="pt")
        out = model(**batch, output_hidden_states=True)
        layers = torch.stack(out.hidden_states[:-1])                            # (L, B, T, C)
        # logits at t predict token t + 1; padding, which is on the right, counts as a hit
        hits = (out.logits.argmax(2).roll(1, 1) == batch.input_ids) | (batch.attention_mask == 0)
        for j, (prompt, x) in enumerate(some):
            told = batch.char_to_token(j, prompt.rindex(x.instruction) + len(x.instruction) - 1)
            end = batch.char_to_token(j, len(prompt.rstrip(" ")) - 1)
            yield layers[:, j, [told, end]].numpy(), hits[j, end + 1:].all()


def write_folder(cfg, network, make_prompt):
    """Run a network, as returned by `load`, on split val and write a folder that probe.py can read.

    make_prompt: Instance -> text. States are read at the last occurrence of the instruction in its prompt. If
    prompts of one instruction differ before it, the first prompt's state is used. Raises OSError if cfg.out
    already has states.
    """
    data = make_dataset(cfg)
    os.makedirs(f"{cfg.out}/states")        # fails if it exists
    val = data.splits["val"]
    pairs = [(make_prompt(x), x) for x in val.instances]
    states, right = map(np.array, zip(*read(*network, pairs)))                  # (n, L, 2, C), (n,)
    states = states.swapaxes(0, 1)

    ids = val.identities                    # what is added here, make_labels includes
    first = ids["regex"][np.unique(ids["task"], return_index=True)[1]]   # first regex of each
    ids["phrasing"] = ids["regex"] - first[ids["task"]]
    labels = {name: of for name, of in make_labels(data).items() if "val/" in name}
    write_arrays(f"{cfg.out}/states/labels.npz", labels)
    write_arrays(f"{cfg.out}/states/000000.npz", {
        "val/instruction": states[:, val.positions["instruction"][0], 0],
        "val/answer": states[:, :, 1]})
    write_rows(f"{cfg.out}/metrics.jsonl", [{"step": 0, "acc_val": right.mean()}])
    print(f"\r{right.mean():.1%} of {len(right)} right; next: python probe.py {cfg.out} --view raw unphrased")


def main():
    """Run a language model on instructions and save its hidden states for probe.py."""
    cfg = Config(**vars(Flags(Config, description=main.__doc__).parse_args()))
    write_folder(cfg, load(cfg), lambda x: cfg.template.format(**x._asdict()))


if __name__ == "__main__":
    command_line(main)
