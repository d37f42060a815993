"""What `make train probe` does, written in the usual way with transformers and scikit-learn.

    pip install transformers scikit-learn
    python examples/peer.py

speed.py times it. Data, network shape, captures and number of clusterings are the same; AdamW trains at a
common learning rate for as many epochs as it needs. Nulls, neighbours and half of the scores are left out.
"""
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from runs import command_line

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import pair_confusion_matrix
from transformers import GPT2Config, GPT2LMHeadModel

from data import OUTPUT, make_dataset
from train import CAPTURED, Config, capture_steps, pick_batch

EPOCHS = 40
IDENTITIES = {"task", "regex", "input", "output"}
warnings.simplefilter("ignore")         # k-means warns about layer 0, where all points coincide


def make_gpt2(cfg, vocab_size, length):
    """GPT-2 of the same shape as our network, without dropout."""
    torch.manual_seed(cfg.seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=vocab_size, n_positions=length, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None))


def pairwise_f1(classes, clusters):
    """F1 of "in one cluster" as a predictor of "of one class", over pairs of points."""
    (_, fp), (fn, tp) = pair_confusion_matrix(classes, clusters)
    return 2 * tp / (2 * tp + fp + fn)


SCORES = pairwise_f1, adjusted_rand_score, normalized_mutual_info_score, adjusted_mutual_info_score


@torch.no_grad()
def capture(network, data):
    """Hidden states (layers, N, T, C) of each split, and accuracy on val."""
    states = {}
    for name in CAPTURED:
        split = data.splits[name]
        out = network(torch.from_numpy(split.tokens), output_hidden_states=True)
        states[name] = torch.stack(out.hidden_states).half().numpy()
        if name == "val":
            guesses = out.logits[:, :-1].argmax(-1).numpy()
            right = (guesses == split.tokens[:, 1:]) | (split.part[:, 1:] != OUTPUT)
    return states, right.all(1).mean()


def main():
    """Train, capture, cluster, score."""
    cfg = Config()
    data = make_dataset(cfg)
    tokens = torch.from_numpy(data.splits["train"].tokens)
    cfg.steps = EPOCHS * (len(tokens) // cfg.batch_size)
    network = make_gpt2(cfg, len(data.vocabulary), tokens.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    captures = []
    for step in range(cfg.steps + 1):
        if step in capture_steps(cfg):
            states, accuracy = capture(network, data)
            captures.append(states)
        batch = pick_batch(cfg, len(tokens), step)
        logits = network(tokens[batch, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[batch, 1:].flatten(), ignore_index=0)    # <pad>
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"accuracy on val {accuracy:.3f}")
    for states in captures:
        for name in CAPTURED:
            split = data.splits[name]
            for position, (rows, columns, _) in split.positions.items():
                labels = split.labels(position)
                for identity in IDENTITIES & labels.keys():
                    classes = labels[identity]
                    for x in states[name][:, rows, columns].astype(np.float32):
                        clusters = KMeans(len(set(classes)), n_init=8, random_state=0).fit_predict(x)
                        scores = [score(classes, clusters) for score in SCORES]
                    print(name, position, identity, *(f"{score:.2f}" for score in scores), "in the top layer")


if __name__ == "__main__":
    command_line(main)
