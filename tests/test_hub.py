"""Published families give the numbers that `transformers` gives (kept in tests/golden), and go out bit for bit."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from checkpoints import GOLDEN, SHOWN, TOKENS, close, same_tensors

from lm_jax import hub
from lm_jax.config import ConfigError, MoEConfig, RopeConfig, TransformerConfig
from lm_jax.hub import families, tensors
from lm_jax.hub.model import _names
from lm_jax.hub.settled import settled
from lm_jax.models import flops, zoo


@pytest.mark.parametrize("name", GOLDEN)
def test_a_family_gives_the_numbers_of_transformers_and_goes_out_as_it_came_in(name, folder, tmp_path):
    model = hub.load(folder(name))
    more = {"decoder_tokens": [TOKENS]} if model.cfg.encoder_depth else {}
    out, expected = hub.logits(model, [TOKENS], **more)[0], np.array(GOLDEN[name]["outputs"])
    close(out[list(SHOWN)] if out.ndim == 2 else out, expected)
    hub.save(model, tmp_path / "same")
    same_tensors(folder(name), tmp_path / "same")
    assert json.loads((tmp_path / "same/config.json").read_text()) == GOLDEN[name]["config"]
    hub.save(model, tmp_path / "new", like="")
    same_tensors(folder(name), tmp_path / "new")
    said = json.loads((tmp_path / "new/config.json").read_text())
    told = families.of_type(said["model_type"]).read(said, set(GOLDEN[name]["tensors"]))
    assert settled(told) == settled(model.cfg)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["t5", "t5-classes", "t5-tags"])
def test_a_t5_whose_table_has_its_other_name_is_read(name, part, folder, tmp_path):
    """As programs write it that keep one name of what several modules share."""
    source = tensors.read(folder(name) / "model.safetensors")
    arrays = {key.replace("shared", f"{part}.embed_tokens"): tensor.rows() for key, tensor in source.items()}
    assert arrays.keys() != source.keys()
    tensors.write(tmp_path / "model.safetensors", {n: (a.dtype, a.shape) for n, a in arrays.items()}, arrays.values())
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN[name]["config"]))
    close(hub.logits(hub.load(tmp_path), [TOKENS]), hub.logits(hub.load(folder(name)), [TOKENS]), 1e-7)


def test_padded_and_packed_rows_give_what_their_documents_give_alone(folder):
    model = hub.load(folder("gemma2"))
    one, two = TOKENS[:11], TOKENS[11:]
    alone = [hub.logits(model, [row])[0] for row in (one, two)]
    together = hub.logits(model, [one, two])
    close(together[0, :11], alone[0])
    close(together[1], alone[1])
    packed = {"tokens": [one + two], "positions": [[*range(len(one)), *range(len(two))]],
              "segments": [[1] * len(one) + [2] * len(two)]}
    close(model({key: jnp.asarray(rows) for key, rows in packed.items()})[0], np.concatenate(alone))


V4 = {  # config.json of well-known models as version 4 wrote them, and what they must become
    "llama-3.2-1b": (dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=2048, head_dim=64,
        intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
        max_position_embeddings=131072, rope_theta=500000.0, tie_word_embeddings=True, rope_scaling=dict(
            factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
            rope_type="llama3")), 1_235_814_400),
    "gpt2-small": (dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=50257, n_ctx=1024, n_embd=768,
                        n_head=12, n_layer=12, n_positions=1024, activation_function="gelu_new",
                        layer_norm_epsilon=1e-5), 124_439_808),
    "bert-base": (dict(
        model_type="bert", architectures=["BertForPreTraining"], vocab_size=30522, hidden_size=768, hidden_act="gelu",
        num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, max_position_embeddings=512,
        type_vocab_size=2, layer_norm_eps=1e-12, position_embedding_type="absolute"), 110_106_428),
    "t5-v1.1-base": (dict(
        model_type="t5", architectures=["T5ForConditionalGeneration"], vocab_size=32128, d_model=768, d_kv=64,
        d_ff=2048, num_heads=12, num_layers=12, num_decoder_layers=12,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        relative_attention_num_buckets=32, layer_norm_epsilon=1e-6), 247_577_856),
    "qwen2.5-7b": (dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=152064, hidden_size=3584,
        intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, rope_theta=1e6,
        max_position_embeddings=131072, rms_norm_eps=1e-6, use_sliding_window=False, sliding_window=131072,
        max_window_layers=28, tie_word_embeddings=False), 7_615_616_512),
    "gemma-3-1b": (dict(
        model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], vocab_size=262144, hidden_size=1152,
        head_dim=256, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1,
        sliding_window=512, sliding_window_pattern=6, query_pre_attn_scalar=256, rope_theta=1e6,
        rope_local_base_freq=10000, max_position_embeddings=32768, rms_norm_eps=1e-6,
        hidden_activation="gelu_pytorch_tanh"), 999_885_952),
    "mixtral-8x7b": (dict(
        model_type="mixtral", architectures=["MixtralForCausalLM"], vocab_size=32000, hidden_size=4096,
        intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, rope_theta=1e6,
        num_local_experts=8, num_experts_per_tok=2, sliding_window=None, rms_norm_eps=1e-5), 46_702_792_704),
    "qwen3-30b-a3b": (dict(
        model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], vocab_size=151936, hidden_size=2048,
        head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[], rope_theta=1e6, rms_norm_eps=1e-6), 30_532_122_624),
    "deepseek-v3": (dict(
        model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"], vocab_size=129280, hidden_size=7168,
        intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61, num_attention_heads=128,
        num_key_value_heads=128, n_shared_experts=1, n_routed_experts=256, routed_scaling_factor=2.5, kv_lora_rank=512,
        q_lora_rank=1536, qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128, n_group=8, topk_group=4,
        num_experts_per_tok=8, first_k_dense_replace=3, norm_topk_prob=True, rms_norm_eps=1e-6, rope_theta=10000,
        max_position_embeddings=163840, num_nextn_predict_layers=1, rope_scaling=dict(
            beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0, type="yarn",
            original_max_position_embeddings=4096)), 671_026_419_200),
}


@pytest.mark.parametrize("name", V4)
def test_configs_of_version_4_are_read_and_models_have_their_published_size(name):
    hf, size = V4[name]
    family = families.of_type(hf["model_type"])
    cfg = family.read(hf, {"lm_head.weight"})
    assert flops.parameters(cfg)["total"] == size
    said = family.write(cfg)
    assert settled(family.read(said, {"lm_head.weight"})) == settled(cfg)
    for key in ("rope_theta", "rope_local_base_freq", "sliding_window", "query_pre_attn_scalar"):
        if hf.get(key) and not hf.get("use_sliding_window") is False:
            assert said[key] == hf[key], "version 4 reads it there"


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_named_model_of_the_zoo_can_be_said_in_its_own_family(name):
    values = zoo.get(name)
    rope, moe = RopeConfig(**values.pop("rope", {})), MoEConfig(**values.pop("moe", {}))
    cfg = TransformerConfig(**values, rope=rope, moe=moe)
    family = families.of_model(cfg, lambda family: _names(cfg, family))
    assert family.kind == name.split("-")[0].rstrip("23.") or family.kind == {
        "qwen3": "qwen3", "gpt2": "gpt2", "gemma": "gemma2", "t5": "t5"}[name.split("-")[0]]


def test_a_model_that_no_family_has_is_told_what_is_its_own(tmp_path):
    odd = tiny.model(positions="alibi")
    with pytest.raises(ConfigError, match="nearest is 'llama'.*\n.*model.positions='alibi', where it has 'rope'"):
        hub.save(odd, tmp_path)
    mup = tiny.model(base_width=16, head_size=8)
    with pytest.raises(ConfigError, match="model.base_width=16, where it has 0"):
        hub.save(mup, tmp_path)


def test_what_was_changed_since_it_was_loaded_is_said_anew(folder, tmp_path):
    model = hub.load(folder("llama"))
    model.cfg = dataclasses.replace(model.cfg, logit_softcap=20.0)
    with pytest.raises(ConfigError, match="model.logit_softcap=20.0, where it has 0.0"):
        hub.save(model, tmp_path)
    longer = hub.load(folder("llama"))
    longer.cfg = dataclasses.replace(longer.cfg, rope=RopeConfig(theta=1e4, scaling="linear", factor=2.0))
    hub.save(longer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["rope_type"] == "linear"
    assert dataclasses.replace(hub.load(tmp_path).cfg, max_length=0) == dataclasses.replace(longer.cfg, max_length=0)
