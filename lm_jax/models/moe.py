"""Mixture of experts: every token visits its top-k experts, none is dropped."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax import parallel
from lm_jax.config import TransformerConfig
from lm_jax.models.layers import ACTIVATIONS, MLP, Einsum, activated, constant, initial_std, normal, residual_gain


class MoE(nnx.Module):
    """A router and E gated or plain MLPs, of which each token visits the k of the largest scores."""

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg = replace(cfg, hidden=cfg.moe.hidden or cfg.sizes["F"])
        into, back = initial_std("D", cfg), residual_gain(cfg) * initial_std("F", cfg)
        table = partial(normal, cfg=cfg, rngs=rngs, role="matrix")
        self.router = Einsum("BTD,DE->BTE", cfg, rngs=rngs)
        self.sway = constant("E", cfg, 0.0) if cfg.moe.bias else None
        self.up = table("EDF", std=into, fan_in="D")
        self.gate = table("EDF", std=into, fan_in="D") if cfg.gated else None
        self.down = table("EFD", std=back, fan_in="F")
        # m experts that everyone visits are one MLP m times as wide
        wide = replace(cfg, hidden=cfg.sizes["F"] * cfg.moe.shared)
        self.shared = MLP(wide, rngs=rngs) if cfg.moe.shared else None

    def __call__(self, x_BTD, real_BT):
        """y_BTD and the router's losses per row, each a mean over the row's `real_BT` tokens."""
        moe = self.cfg.moe
        logits_BTE = parallel.constrain(self.router(x_BTD.astype(jnp.float32)), "BTA")  # each device sees all experts
        scores_BTE = SCORES[moe.score](logits_BTE)
        sway_E = None if self.sway is None else self.sway[...].astype(jnp.float32)
        # by itself, XLA brings all rows to every device for a top_k
        gates_BTA, chosen_BTA = parallel.per_shard(partial(choose, moe), scores_BTE, sway_E, letters=("BTA", "A"))
        if moe.normalized:
            gates_BTA = gates_BTA / (gates_BTA.sum(-1, keepdims=True) + 1e-20)  # sigmoids may all be 0
        gates_BTA = gates_BTA * moe.scale if moe.scale != 1 else gates_BTA
        probs_BTE = scores_BTE / scores_BTE.sum(-1, keepdims=True) if moe.score == "sigmoid" else scores_BTE
        tables = [parallel.gather(w[...].astype(x_BTD.dtype), letters)
                  for w, letters in ((self.up, "EDF"), (self.gate, "EDF"), (self.down, "EFD")) if w is not None]
        y_BTD = parallel.per_rows(partial(_experts, ACTIVATIONS[self.cfg.activation]), x_BTD, gates_BTA, chosen_BTA,
                                  tables=tables)
        y_BTD = y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)
        return y_BTD, _router_losses(moe, logits_BTE, probs_BTE, chosen_BTA, real_BT.astype(jnp.float32))


SCORES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}


def choose(moe, scores_BTE, sway_E=None):
    """Scores of the experts that each token visits and which they are, each [B, T, A]: the A = top_k largest, or those
    of score + `sway_E`, within the groups that win (DeepSeek-V3, eq. 13-16)."""
    if sway_E is None and moe.groups == 1:
        return jax.lax.top_k(scores_BTE, moe.top_k)
    swayed_BTE = scores_BTE if sway_E is None else scores_BTE + sway_E
    if moe.groups > 1:
        B, T, E = swayed_BTE.shape
        swayed_BTgE = swayed_BTE.reshape(B, T, moe.groups, E // moe.groups)
        group_BTg = jax.lax.top_k(swayed_BTgE, min(2, E // moe.groups))[0].sum(-1)
        lost_BTg = ~jax.nn.one_hot(jax.lax.top_k(group_BTg, moe.top_groups)[1], moe.groups, dtype=bool).any(2)
        swayed_BTE = jnp.where(lost_BTg[..., None], -jnp.inf, swayed_BTgE).reshape(B, T, E)
    chosen_BTA = jax.lax.top_k(swayed_BTE, moe.top_k)[1]
    return jnp.take_along_axis(scores_BTE, chosen_BTA, -1), chosen_BTA


def _experts(act, x_BTD, gates_BTA, chosen_BTA, *tables):
    """Each token's experts, weighed and summed: sort token-expert pairs by expert, a ragged matmul a table, sort back.

    XLA's CPU backend computes every expert for every pair and masks: right, but E times the work.
    """
    B, T, D = x_BTD.shape
    A = chosen_BTA.shape[-1]
    order = jnp.argsort(chosen_BTA.reshape(-1), stable=True)
    counts_E = jnp.bincount(chosen_BTA.reshape(-1), length=tables[0].shape[0])
    x_PD = x_BTD.reshape(B * T, D)[order // A]
    ragged = partial(jax.lax.ragged_dot, group_sizes=counts_E)
    *into, down_EFD = tables
    h = [ragged(x_PD, w_EDF) for w_EDF in into]
    h_PF = activated(act, *reversed(h))
    y_PD = ragged(h_PF, down_EFD) * gates_BTA.reshape(-1)[order][:, None].astype(x_BTD.dtype)
    return jnp.zeros((B * T, D), x_BTD.dtype).at[order // A].add(y_PD).reshape(B, T, D)


def _router_losses(moe, logits_BTE, probs_BTE, chosen_BTA, real_BT):
    """Balance (DeepSeek-V3 eq. 17-20) and router-z (ST-MoE eq. 5), weighed, [B]: per row, so that they add up."""
    tokens_B = jnp.maximum(real_BT.sum(1), 1)
    visits_BE = (jax.nn.one_hot(chosen_BTA, moe.experts).sum(2) * real_BT[..., None]).sum(1)
    share_BE = visits_BE * moe.experts / moe.top_k / tokens_B[:, None]
    prob_BE = (probs_BTE * real_BT[..., None]).sum(1) / tokens_B[:, None]
    z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, -1))
    return {"balance": moe.balance * (share_BE * prob_BE).sum(-1),
            "router_z": moe.router_z * (z_BT * real_BT).sum(1) / tokens_B}
