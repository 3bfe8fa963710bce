"""Multi-head latent attention (DeepSeek-V2, 2024): all heads' keys and values are made of one small latent a token."""

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx

from lm_jax import parallel
from lm_jax.config import TransformerConfig
from lm_jax.models import positions
from lm_jax.models.attention import Attention, attention_scale, written
from lm_jax.models.layers import Einsum, Norm, matmul, residual_gain
from lm_jax.models.layouts import Layout
from lm_jax.models.xla import xla


class LatentAttention(Attention):
    """Attention whose cache holds, for each token, a latent of W numbers and one rotated key of J that heads share.

    A head's query and key are H - J sizes without a position and J rotated ones; its value has O. A row is attended to
    with keys and values written out. A cache is attended to as it is: what would make keys of latents is put on the
    queries instead, and what would make values on the outcome, so that all heads read the latent as one key and value.
    """

    def __init__(self, cfg: TransformerConfig, *, rngs: nnx.Rngs):
        self.cfg, self.sinks = cfg, None
        small = replace(cfg, norm_eps=1e-6)  # of the latents' norms, whatever the others have (DeepSeek's code)
        if cfg.query_latent:
            self.query_down = Einsum("BTD,DQ->BTQ", cfg, rngs=rngs)
            self.query_norm = Norm("Q", small)
            self.query = Einsum("BTQ,QNH->BTNH", cfg, rngs=rngs)
        else:
            self.query_down = self.query_norm = None
            self.query = Einsum("BTD,DNH->BTNH", cfg, rngs=rngs)
        self.down = Einsum("BTD,DY->BTY", cfg, rngs=rngs)  # the latent, then the shared key
        self.norm = Norm("W", small)
        self.up = Einsum("BTW,WNZ->BTNZ", cfg, rngs=rngs)  # each head's unrotated key, then its value
        self.out = Einsum("BTNO,NOD->BTD", cfg, rngs=rngs, gain=residual_gain(cfg))

    def __call__(self, x_BTD, layout: Layout, slots: Layout, *, angles=None, cache=None, at=0, key=None, **asked):
        """As `Attention` does; what is kept are latents and shared keys."""
        q_BTQ = x_BTD if self.query_down is None else self.query_norm(self.query_down(x_BTD))
        q_BTNH = self.query(q_BTQ)
        plain = self.cfg.sizes["H"] - self.cfg.sizes["J"]
        q_BTNH = jnp.concatenate(
            [q_BTNH[..., :plain], positions.rotate(q_BTNH[..., plain:], *angles, self.cfg)], -1)
        row = self.project(x_BTD, angles=angles)
        if cache is None:
            return self.attend(q_BTNH, self.written_out(*row), layout, slots, use="row", key=key, **asked), None
        kept, here = written(*cache, row, at)
        return self.read(q_BTNH, here, layout, slots, **asked), kept

    def project(self, x_BTD, *, angles=None):
        """What a token keeps: its latent [B, T, 1, W] and its shared key [B, T, 1, J]."""
        y_BTY = self.down(x_BTD)
        latent_BTW, key_BTJ = jnp.split(y_BTY, [self.cfg.latent], -1)
        return self.norm(latent_BTW)[:, :, None], positions.rotate(key_BTJ[:, :, None], *angles, self.cfg)

    def written_out(self, latent_BT1W, key_BT1J):
        """Keys k_BTNH and values v_BTNO of every head."""
        kv_BTNZ = self.up(latent_BT1W[:, :, 0])
        k_BTNI, v_BTNO = jnp.split(kv_BTNZ, [self.cfg.sizes["H"] - self.cfg.sizes["J"]], -1)
        shared = (*k_BTNI.shape[:3], key_BT1J.shape[3])
        shared_BTNJ = jnp.broadcast_to(key_BT1J, shared, out_sharding=parallel.activation("BTNJ", shared))
        return jnp.concatenate([k_BTNI, shared_BTNJ], -1), v_BTNO

    def read(self, q_BTNH, kept, layout: Layout, slots: Layout, **asked):
        """y_BTD of queries over a cache, whose latents are never written out."""
        plain, dtype = self.cfg.sizes["H"] - self.cfg.sizes["J"], q_BTNH.dtype
        latent_BS1W, key_BS1J = (a.astype(dtype) for a in kept)
        w_WNZ = self.up.w[...]
        q_BTNW = matmul("BTNI,WNI->BTNW", dtype, q_BTNH[..., :plain], w_WNZ[..., :plain])
        wide_BTNH = jnp.concatenate([q_BTNW, q_BTNH[..., plain:]], -1)
        y_BTNW = xla(wide_BTNH, jnp.concatenate([latent_BS1W, key_BS1J], -1), latent_BS1W, layout, slots,
                     scale=attention_scale(self.cfg), softcap=self.cfg.attention_softcap, **asked)
        return self.out(matmul("BTNW,WNO->BTNO", dtype, y_BTNW, w_WNZ[..., plain:]))

    @staticmethod
    def kept(cfg: TransformerConfig) -> tuple[tuple[int, int], ...]:
        """Heads and sizes of what a cache keeps of a token: the latent and the shared key."""
        return (1, cfg.latent), (1, cfg.sizes["J"])
