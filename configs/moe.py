"""OLMoE's shape: 64 small experts, 8 a token: 1.3B of 6.9B parameters at work (Muennighoff et al. 2024)."""

from lm_jax import config


def get_config():
    c = config.default()
    c.name = "moe"
    c.model.width = 2048
    c.model.depth = c.model.heads = 16
    c.model.hidden = 1024  # of each expert
    c.model.moe.experts = 64
    c.model.moe.top_k = 8
    c.model.qk_norm = True
    c.model.tied = False
    c.model.norm_eps = 1e-5
    c.model.init_std = 0.02
    c.model.remat = "full"
    c.data.sources = "jsonl:corpora/dclm/*.jsonl.zst"
    c.data.vocab = 50_304
    c.data.length = c.model.max_length = 4096
    c.data.validation = 0.0001
    c.optim.lr = 4e-4
    c.optim.warmup = 2_000
    c.train.steps = 30_000  # 126B tokens, a hundred for each parameter at work
    c.train.batch = 1_024
    c.train.log_every = 10
    c.train.eval_every = c.train.checkpoint_every = 1_000
    c.train.eval_rows = 4_096
    c.mesh.expert = 8
    return c
