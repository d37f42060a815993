"""The model: a small GPT-2 that also returns its hidden states.

    logits, states = GPT(ModelConfig(vocab_size=60, block_size=14))(tokens)

`forward` always returns two things: the logits at every position, and the residual stream at every layer,
which is what this project studies. Layer 0 is the embedding output, layer l the stream after block l. No
layer is normalised: the final norm belongs to the head.

As in GPT-2: normalisation before each sublayer, learned positions, GELU, a head tied to the embedding.
Unlike GPT-2: GELU is exact, linear maps have no biases, which is faster, and there is no dropout.

Shapes, here and in the other files: B batch, T tokens, C width, H heads, L blocks, V vocabulary.
"""
import math
from dataclasses import dataclass

from runs import BadInput

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ModelConfig:
    """Sizes of a GPT. Raises BadInput if n_embd is not a multiple of n_head."""
    vocab_size: int         # V
    block_size: int         # longest sequence, in tokens
    n_layer: int = 4        # L
    n_head: int = 2         # H
    n_embd: int = 64        # C

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise BadInput(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017): (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.out = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                            # each (B, H, T, C/H)
        # Padding is on the right, so the causal mask is the only one needed: no real token ever sees a pad.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two linear maps with a GELU in between, 4 C wide inside: (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.up = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=False)
        self.out = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x):
        return self.out(F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention, then MLP; each reads the normalised stream and adds to it: (B, T, C) -> (B, T, C)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.norm_attention, self.attention = nn.LayerNorm(cfg.n_embd), Attention(cfg)
        self.norm_mlp, self.mlp = nn.LayerNorm(cfg.n_embd), MLP(cfg)

    def forward(self, x):
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """The whole network. Its initial weights come from torch's global generator, distributed as in GPT-2:

    | weights                                       | initial values N(mean, sd) |
    |-----------------------------------------------|----------------------------|
    | embeddings and linear maps                    | N(0, 0.02)                 |
    | the maps back into the stream (`out.weight`)  | N(0, 0.02 / sqrt(2 L))     |
    | norms                                         | bias 0, gain 1             |
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.token = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.position = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(cfg.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # in both sublayers, `out` is the map back into the stream (name no other matrix like that)
                std = 0.02 / math.sqrt(2 * cfg.n_layer) if name.endswith("out.weight") else 0.02
                nn.init.normal_(p, std=std)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Tokens (B, T) int64 -> logits (B, T, V) and a list of L + 1 states (B, T, C), one per layer."""
        return self.run_from(0, self.token(tokens) + self.position.weight[:tokens.shape[1]], tokens)

    def run_from(self, layer, x, tokens):
        """The rest of the network: states x (B, T, C) of a layer -> logits, and states from that layer on.

        The tokens (B, T) are not used: they are for blocks of your own that need more than x.
        """
        states = [x]
        for block in self.blocks[layer:]:
            x = block(x)
            states.append(x)
        return self.head(x), states

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """States of the last layer (..., C) -> logits (..., V): final norm, then the tied embedding."""
        return F.linear(self.norm(x), self.token.weight)
