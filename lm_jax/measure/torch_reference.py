"""The other side of the comparison: a GPT of nanoGPT's shape in PyTorch as its users write it, and its training step.

PyTorch is imported when it is asked for: nothing else of the house wants it.
"""

import contextlib
import importlib
from dataclasses import dataclass

import numpy as np

from lm_jax.config import OptimConfig, TransformerConfig
from lm_jax.errors import ConfigError
from lm_jax.models import zoo

ADAMW = OptimConfig(lr=6e-4, schedule="constant", warmup=1)  # of both sides


@dataclass(frozen=True)
class Case:
    """A model's shape and a batch."""

    name: str
    depth: int
    width: int
    heads: int
    vocab: int
    length: int  # T
    batch: int  # B

    def config(self, dtype: str) -> TransformerConfig:
        """The same shape on our side."""
        return TransformerConfig(**zoo.get("gpt2-small") | dict(
            depth=self.depth, width=self.width, heads=self.heads, hidden=4 * self.width, vocab=self.vocab,
            max_length=self.length, dtype=dtype))

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets of a batch: random ids, the targets a token ahead."""
        ids = np.random.default_rng(0).integers(0, self.vocab, (self.batch, self.length + 1), np.int32)
        return ids[:, :-1], ids[:, 1:]


def package(name: str):
    """A package of the bench extra; ConfigError where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"this comparison needs {name}, which is not here ({error}): pip install -e '.[bench]'"
                          ) from error


def model(case: Case):
    """The model, with PyTorch's own attention kernel and tied tables; its names are those of GPT-2's files."""
    torch = package("torch")
    nn, F = torch.nn, torch.nn.functional

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn, self.c_proj = nn.Linear(case.width, 3 * case.width), nn.Linear(case.width, case.width)

        def forward(self, x):
            B, T, D = x.shape
            heads = (a.view(B, T, case.heads, -1).transpose(1, 2) for a in self.c_attn(x).split(D, dim=2))
            y = F.scaled_dot_product_attention(*heads, is_causal=True)
            return self.c_proj(y.transpose(1, 2).reshape(B, T, D))

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_fc, self.c_proj = nn.Linear(case.width, 4 * case.width), nn.Linear(4 * case.width, case.width)

        def forward(self, x):
            return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.attn = nn.LayerNorm(case.width), Attention()
            self.ln_2, self.mlp = nn.LayerNorm(case.width), MLP()

        def forward(self, x):
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(case.vocab, case.width), nn.Embedding(case.length, case.width)
            self.h, self.ln_f = nn.ModuleList(Block() for _ in range(case.depth)), nn.LayerNorm(case.width)

        def forward(self, tokens, targets):
            x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
            for block in self.h:
                x = block(x)
            logits = self.ln_f(x) @ self.wte.weight.T
            return F.cross_entropy(logits.view(-1, case.vocab), targets.reshape(-1))

    return GPT()


def load(gpt, params: dict):
    """Give the model the weights of one of ours, nested dicts of arrays."""
    torch = package("torch")
    blocks, D = params["decoder"]["blocks"], gpt.wte.weight.shape[1]
    told = {"wte.weight": params["embed"]["table"], "wpe.weight": params["places"]["table"],
            "ln_f.weight": params["decoder"]["norm"]["scale"], "ln_f.bias": params["decoder"]["norm"]["bias"]}
    for i in range(len(gpt.h)):
        three = [blocks["attention"][part] for part in ("query", "key", "value")]
        layer = {"attn.c_attn.weight": np.concatenate([p["w"][i].reshape(D, -1) for p in three], 1).T,
                 "attn.c_attn.bias": np.concatenate([p["b"][i].reshape(-1) for p in three]),
                 "attn.c_proj.weight": np.asarray(blocks["attention"]["out"]["w"][i]).reshape(-1, D).T,
                 "attn.c_proj.bias": blocks["attention"]["out"]["b"][i]}
        for ours, theirs in (("up", "c_fc"), ("down", "c_proj")):
            layer |= {f"mlp.{theirs}.weight": np.asarray(blocks["mlp"][ours]["w"][i]).T,
                      f"mlp.{theirs}.bias": blocks["mlp"][ours]["b"][i]}
        for ours, theirs in (("attention_residual", "ln_1"), ("mlp_residual", "ln_2")):
            layer |= {f"{theirs}.weight": blocks[ours]["before"]["scale"][i],
                      f"{theirs}.bias": blocks[ours]["before"]["bias"][i]}
        told |= {f"h.{i}.{name}": array for name, array in layer.items()}
    gpt.load_state_dict({name: torch.from_numpy(np.array(array, np.float32)) for name, array in told.items()})


def step(case: Case, *, dtype: str, compiled: bool, device: str, params: dict | None = None):
    """A function that makes one training step and gives its loss: forward, backward, clipping and AdamW."""
    torch = package("torch")
    torch.manual_seed(0)
    gpt = model(case)
    if params is not None:
        load(gpt, params)
    gpt = gpt.to(device)
    optimizer = _adamw(torch, gpt)
    run = torch.compile(gpt) if compiled else gpt
    tokens, targets = (torch.from_numpy(a.astype(np.int64)).to(device) for a in case.rows())
    half = torch.autocast(device, dtype=torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as JAX does unasked

    def once() -> float:
        with half:
            loss = run(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), ADAMW.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    return once


def _adamw(torch, gpt):
    """AdamW in one kernel, decay on matrices alone, as ours."""
    spared = lambda name, p: p.dim() < 2 or name in ("wte.weight", "wpe.weight")
    groups = [{"params": [p for name, p in gpt.named_parameters() if spared(name, p) == free],
               "weight_decay": 0.0 if free else ADAMW.weight_decay} for free in (False, True)]
    return torch.optim.AdamW(groups, lr=ADAMW.lr, betas=ADAMW.betas, eps=ADAMW.eps, fused=True)
