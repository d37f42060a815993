"""Do instructions cluster by task in the hidden states of a pretrained language model?

    python examples/any_model.py --model DIR_OR_GGUF --tasks facts.json --out runs/mine
    python probe.py runs/mine --view raw unphrased            scores the states
    make smollm2                                              a study, of a model that pip installs: smollm2.py

The model is any causal one that transformers can load, from a folder or a GGUF file.

Position `instruction` is the last token of the instruction, `answer` that of the prompt. Layer 0 is the
embedding, layer l the output of block l; the last block is left out, as transformers gives its output only
after the final norm. `phrasing` is the number of a regex within its task.
"""
import os
import sys
from dataclasses import dataclass

sys.path.append(f"{sys.path[0]}/..")

from data import DataConfig, Flags, command_line, make_dataset
from train import make_labels, write_arrays, write_rows

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Config(DataConfig):
    """The knobs of the data, three of them with other defaults, and of the language model."""
    n_train: int = 24
    n_val: int = 3
    n_asked: int = 2
    model: str = ""                 # folder of a causal language model of transformers, or GGUF file
    out: str = ""                   # folder to write
    template: str = "Instruction: {instruction}\nInput: {input}\nAnswer: "      # the prompt
    untrained: bool = False         # control: random weights, the same at each call


def load(cfg):
    """The network, in float32, and its tokenizer."""
    folder, file = os.path.split(cfg.model) if ".gguf" in cfg.model else (cfg.model, None)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    if cfg.untrained:
        model = AutoModelForCausalLM.from_config(model.config)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


@torch.inference_mode()
def read(model, tokenizer, asked):
    """For pairs of a prompt and its Instance, yield the states (L, 2, C) at the ends of instruction and prompt,
    and whether the greedy answer is the true one.
    """
    for i in range(0, len(asked), 16):
        print(f"\r{i} of {len(asked)} prompts", end="")
        some = asked[i:i + 16]
        batch = tokenizer([prompt + x.output for prompt, x in some], padding=True, return_tensors="pt")
        out = model(**batch, output_hidden_states=True)
        layers = torch.stack(out.hidden_states[:-1])                            # (L, B, T, C)
        # a guess is about the next token; padding, on the right, does not count
        hits = (out.logits.argmax(2).roll(1, 1) == batch.input_ids) | (batch.attention_mask == 0)
        for j, (prompt, x) in enumerate(some):
            said = batch.char_to_token(j, prompt.rindex(x.instruction) + len(x.instruction) - 1)
            end = batch.char_to_token(j, len(prompt.rstrip(" ")) - 1)
            yield layers[:, j, [said, end]].numpy(), hits[j, end + 1:].all()


def write_folder(cfg, network, make_prompt):
    """Write what probe.py reads. network is what `load` returns; make_prompt takes an Instance."""
    data = make_dataset(cfg)
    val = data.splits["val"]
    asked = [(make_prompt(x), x) for x in val.instances]
    states, right = map(np.array, zip(*read(*network, asked)))                 # (n, L, 2, C), (n,)
    states = states.swapaxes(0, 1)

    ids = val.identities
    first = ids["distribution"][np.unique(ids["task"], return_index=True)[1]]      # regex of each task
    ids["phrasing"] = ids["distribution"] - first[ids["task"]]
    labels = {name: of for name, of in make_labels(data).items() if "val/" in name}
    os.makedirs(f"{cfg.out}/states", exist_ok=True)
    write_arrays(f"{cfg.out}/states/labels.npz", labels)
    write_arrays(f"{cfg.out}/states/000000.npz", {
        "val/instruction": states[:, val.positions["instruction"][0], 0],
        "val/answer": states[:, :, 1]})
    write_rows(f"{cfg.out}/metrics.jsonl", [{"step": 0, "acc_val": right.mean()}])
    print(f"\r{right.mean():.1%} of {len(right)} right; next: python probe.py {cfg.out}")


def main():
    """Write the hidden states of a language model that reads instructions, for probe.py."""
    cfg = Config(**vars(Flags(Config, description=main.__doc__, conflict_handler="resolve").parse_args()))
    write_folder(cfg, load(cfg), lambda x: cfg.template.format(**x._asdict()))


if __name__ == "__main__":
    command_line(main)
