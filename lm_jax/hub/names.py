"""How each family of published models names its tensors.

A table maps a module of ours to its name on disk, `{L}` standing for a layer and `{E}` for an expert; weights, biases
and scales are named after it. "0/3" is the first of three tensors that are one on disk. A table is read in both
directions, and lists what any member of the family may have: what a model lacks is passed over.
"""

LAYER = "decoder.blocks."


def _llama(norms: dict[str, str], more: dict[str, str] = {}) -> dict[str, str]:
    """LLaMA's names, which its successors kept, with a family's norms and what it has besides or otherwise."""
    parts = {"attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
             "attention.value": "self_attn.v_proj", "attention.out": "self_attn.o_proj",
             "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm",
             "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
    layers = {LAYER + ours: "layers.{L}." + disk for ours, disk in (parts | norms | more).items()}
    return {"embed": "embed_tokens", **layers, "decoder.norm": "norm"}


PRE = {"attention_residual.before": "input_layernorm", "mlp_residual.before": "post_attention_layernorm"}
SANDWICH = {"attention_residual.before": "input_layernorm", "attention_residual.after": "post_attention_layernorm",
            "mlp_residual.before": "pre_feedforward_layernorm", "mlp_residual.after": "post_feedforward_layernorm"}
EXPERTS = {"mlp": "mlp.gate", "mlp.router": "mlp.gate"} | {
    f"mlp.{each}.{{E}}": f"mlp.experts.{{E}}.{each}_proj" for each in ("gate", "up", "down")}
SHARED = {f"mlp.shared.{each}": f"mlp.shared_experts.{each}_proj" for each in ("gate", "up", "down")}
SPARSE = {"mlp.router": "block_sparse_moe.gate"} | {
    f"mlp.{each}.{{E}}": f"block_sparse_moe.experts.{{E}}.{disk}"
    for each, disk in dict(gate="w1", down="w2", up="w3").items()}
LATENT = {"attention.query_down": "self_attn.q_a_proj", "attention.query_norm": "self_attn.q_a_layernorm",
          "attention.query": "self_attn.q_b_proj", "attention.down": "self_attn.kv_a_proj_with_mqa",
          "attention.norm": "self_attn.kv_a_layernorm", "attention.up": "self_attn.kv_b_proj"}
LLAMA, GEMMA = _llama(PRE), _llama(SANDWICH)
MIXTRAL, QWEN_MOE = _llama(PRE, SPARSE), _llama(PRE, EXPERTS)
DEEPSEEK = _llama(PRE, EXPERTS | SHARED | LATENT)
DEEPSEEK_DIRECT = DEEPSEEK | {LAYER + "attention.query": LLAMA[LAYER + "attention.query"]}  # no latent of queries
GPT2 = {"embed": "wte", "places": "wpe", "decoder.norm": "ln_f"} | {
    LAYER + ours: "h.{L}." + disk for ours, disk in {
        "attention_residual.before": "ln_1", "mlp_residual.before": "ln_2", "attention.query": "attn.c_attn 0/3",
        "attention.key": "attn.c_attn 1/3", "attention.value": "attn.c_attn 2/3", "attention.out": "attn.c_proj",
        "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}.items()}
BERT = {"embed": "embeddings.word_embeddings", "places": "embeddings.position_embeddings",
        "types": "embeddings.token_type_embeddings", "embed_norm": "embeddings.LayerNorm",
        "pooler.dense": "pooler.dense", "pool.dense": "pooler.dense"} | {
    LAYER + ours: "encoder.layer.{L}." + disk for ours, disk in {
        "attention.query": "attention.self.query", "attention.key": "attention.self.key",
        "attention.value": "attention.self.value", "attention.out": "attention.output.dense",
        "attention_residual.after": "attention.output.LayerNorm", "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense", "mlp_residual.after": "output.LayerNorm"}.items()}
BERT_HEAD = {"transform": "cls.predictions", "transform.dense": "cls.predictions.transform.dense",
             "transform.norm": "cls.predictions.transform.LayerNorm", "pooler.next": "cls.seq_relationship"}
DISTILBERT = {"embed": "embeddings.word_embeddings", "places": "embeddings.position_embeddings",
              "embed_norm": "embeddings.LayerNorm"} | {
    LAYER + ours: "transformer.layer.{L}." + disk for ours, disk in {
        "attention.query": "attention.q_lin", "attention.key": "attention.k_lin", "attention.value": "attention.v_lin",
        "attention.out": "attention.out_lin", "attention_residual.after": "sa_layer_norm", "mlp.up": "ffn.lin1",
        "mlp.down": "ffn.lin2", "mlp_residual.after": "output_layer_norm"}.items()}
DISTILBERT_HEAD = {"transform": "vocab_projector", "transform.dense": "vocab_transform",
                   "transform.norm": "vocab_layer_norm", "pool.dense": "pre_classifier"}


def _t5() -> dict[str, str]:
    """Self-attention, in the decoder attention to the encoder, and an MLP are a block's numbered layers."""
    table = {"embed": "shared"}
    for stack, parts in (("encoder", ("attention", "mlp")), ("decoder", ("attention", "cross", "mlp"))):
        table |= {f"{stack}.norm": f"{stack}.final_layer_norm",
                  f"{stack}.bias": f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"}
        for i, part in enumerate(parts):
            here, names = f"{stack}.block.{{L}}.layer.{i}.", dict(query="q", key="k", value="v", out="o")
            kind = {"attention": "SelfAttention.", "cross": "EncDecAttention."}.get(part)
            if kind is None:
                kind, names = "DenseReluDense.", dict(up="wi", down="wo")
            table |= {f"{stack}.blocks.{part}.{ours}": here + kind + disk for ours, disk in names.items()}
            table[f"{stack}.blocks.{part}_residual.before"] = here + "layer_norm"
    return table


T5 = _t5()
T5_GATED = T5 | {f"{stack}.blocks.mlp.{ours}": T5[f"{stack}.blocks.mlp.up"] + f"_{i}"
                 for stack in ("encoder", "decoder") for i, ours in enumerate(("gate", "up"))}


def t5(*, gated: bool, alone: bool) -> dict[str, str]:
    """T5's names; where its encoder is `alone`, it is the only stack."""
    table = T5_GATED if gated else T5
    if not alone:
        return table
    return {ours.replace("encoder.", "decoder."): disk for ours, disk in table.items() if "decoder." not in ours}
