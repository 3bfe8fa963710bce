"""Rotary positions and their scalings in a config.json.

transformers 5 writes all of it as `rope_parameters`, of each kind of layer where those differ; 4 wrote `rope_theta` and
`rope_scaling`, with "type" for "rope_type" before. All are read, and both are written.
"""

from dataclasses import replace

from lm_jax.config import RopeConfig
from lm_jax.errors import ConfigError
from lm_jax.hub.settings import LAYER_TYPES, Piece, needed

ROPES = {"default": "none", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "llama3": "llama3"}


def rope(theta: float = 1e4, *, sharper: bool = False) -> Piece:
    """Rotary positions and their scaling, which may make attention `sharper` too."""
    def read(hf):
        given = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        if given.get("mscale_all_dim") and not sharper:
            raise ConfigError(f"config.json: rope_scaling {given!r}: mscale_all_dim is DeepSeek's, and not supported")
        return _rope(hf, given, hf.get("rope_theta", theta))

    def write(cfg):
        turned = replace(cfg.rope, fraction=1.0) if cfg.latent else cfg.rope  # which says by itself what it rotates
        said = _said(turned, cfg.max_length)
        return {"rope_parameters": said, "rope_theta": cfg.rope.theta,
                "rope_scaling": said if cfg.rope.scaling != "none" else None}

    return Piece(read, write)


def local_rope() -> Piece:
    """Gemma 3's two thetas: of layers that see all, which may be scaled, and of sliding ones, which are not."""
    def read(hf):
        both = hf.get("rope_parameters") or {}
        near = both.get("sliding_attention") or {}
        if near.get("rope_type", "default") != "default":
            raise ConfigError(f"config.json: rope_parameters of sliding_attention {near!r}: only those of "
                              "full_attention can be scaled")
        given = both.get("full_attention") or hf.get("rope_scaling") or {}
        slides = hf.get("sliding_window", 4096) and "sliding_attention" in (hf.get("layer_types") or LAYER_TYPES)
        local = near.get("rope_theta", hf.get("rope_local_base_freq", 1e4)) if slides else 0.0
        return _rope(hf, given, hf.get("rope_theta", 1e6)) | {"rope.local_theta": float(local)}

    def write(cfg):
        said = _said(cfg.rope, cfg.max_length)
        local = cfg.rope.local_theta or 1e4  # which no layer reads where none slides
        near = {"rope_type": "default", "rope_theta": local}
        return {"rope_parameters": {"full_attention": said, "sliding_attention": near}, "rope_theta": cfg.rope.theta,
                "rope_scaling": said if cfg.rope.scaling != "none" else None,
                "rope_local_base_freq": local}

    return Piece(read, write)


def _rope(hf, given, theta):
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPES:
        raise ConfigError(f"config.json: rope_type={kind!r} is not supported, only {', '.join(ROPES)}")
    found = {"rope.theta": given.get("rope_theta", theta), "rope.scaling": ROPES[kind],
             "rope.fraction": given.get("partial_rotary_factor", hf.get("partial_rotary_factor")) or 1.0}
    if kind == "default":
        return found
    if given.get("attention_factor") is not None or given.get("truncate", True) is not True:
        raise ConfigError(f"config.json: rope_scaling {given!r}: attention_factor and truncate are not supported")
    trained = given.get("original_max_position_embeddings", hf.get("original_max_position_embeddings")) or 0
    found |= {"rope.original": trained if kind in ("yarn", "llama3") else 0,
              "rope.factor": given.get("factor") or needed(hf, "max_position_embeddings") / (trained or 1)}
    if kind == "llama3":
        found |= {"rope.slow": given["low_freq_factor"], "rope.fast": given["high_freq_factor"]}
    if kind == "yarn":
        found |= {"rope.slow": given.get("beta_slow") or 1.0, "rope.fast": given.get("beta_fast") or 32.0,
                  "rope.mscale": given.get("mscale") or 0.0, "rope.mscale_all": given.get("mscale_all_dim") or 0.0}
    return found


def _said(rope_config: RopeConfig, max_length: int) -> dict:
    """rope_parameters for a rotary config."""
    kind = next((word for word, scaling in ROPES.items() if scaling == rope_config.scaling), rope_config.scaling)
    said = {"rope_type": kind, "rope_theta": rope_config.theta}
    if rope_config.fraction != 1:
        said["partial_rotary_factor"] = rope_config.fraction
    if kind == "default":
        return said
    said["factor"] = rope_config.factor
    if kind in ("yarn", "llama3"):
        said["original_max_position_embeddings"] = rope_config.original or max_length
    if kind == "llama3":
        said |= {"low_freq_factor": rope_config.slow, "high_freq_factor": rope_config.fast or 4.0}
    if kind == "yarn":
        said |= {"beta_slow": rope_config.slow, "beta_fast": rope_config.fast or 32.0}
        said |= {"mscale": rope_config.mscale} if rope_config.mscale else {}
        said |= {"mscale_all_dim": rope_config.mscale_all} if rope_config.mscale_all else {}
    return said
