"""Tiny random models that `transformers` makes, every parameter perturbed, so that no error hides by a zero."""

import torch
import transformers as hf

SMALL = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GPT2 = dict(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2)
T5 = dict(vocab_size=99, d_model=32, d_kv=6, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
          relative_attention_num_buckets=12, relative_attention_max_distance=20, pad_token_id=0)
BERT = SMALL | dict(num_key_value_heads=4)
DISTIL = dict(vocab_size=99, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=64)
EXPERTS = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
DEEPSEEK = SMALL | dict(
    num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, n_group=4, topk_group=2,
    first_k_dense_replace=1, q_lora_rank=20, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10,
    rms_norm_eps=1e-5, rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.0, beta_fast=8.0, beta_slow=2.0))

# name -> class of the config, its settings, class of the model
MODELS = {
    "llama": (hf.LlamaConfig, SMALL, hf.LlamaForCausalLM),
    "llama-3.1": (hf.LlamaConfig, SMALL | dict(rope_parameters=LLAMA3), hf.LlamaForCausalLM),
    "llama-3.2": (hf.LlamaConfig, SMALL | dict(tie_word_embeddings=True, head_dim=12, attention_bias=True),
                  hf.LlamaForCausalLM),
    "llama-linear": (hf.LlamaConfig, SMALL | dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
                     hf.LlamaForCausalLM),
    "llama-dynamic": (hf.LlamaConfig, SMALL | dict(max_position_embeddings=32, rope_parameters=dict(
        rope_type="dynamic", rope_theta=1e4, factor=4.0)), hf.LlamaForCausalLM),
    "llama-base": (hf.LlamaConfig, SMALL, hf.LlamaModel),
    "llama-classes": (hf.LlamaConfig, SMALL | dict(num_labels=5), hf.LlamaForSequenceClassification),
    "llama-tags": (hf.LlamaConfig, SMALL | dict(num_labels=5), hf.LlamaForTokenClassification),
    "llama-span": (hf.LlamaConfig, SMALL, hf.LlamaForQuestionAnswering),
    "mistral": (hf.MistralConfig, SMALL | dict(sliding_window=7), hf.MistralForCausalLM),
    "mistral-span": (hf.MistralConfig, SMALL | dict(sliding_window=7), hf.MistralForQuestionAnswering),
    "mistral-full": (hf.MistralConfig, SMALL | dict(sliding_window=None, head_dim=16), hf.MistralForCausalLM),
    "qwen2": (hf.Qwen2Config, SMALL, hf.Qwen2ForCausalLM),
    "qwen2-yarn": (hf.Qwen2Config, SMALL | dict(use_sliding_window=True, sliding_window=6, max_window_layers=1,
                                                tie_word_embeddings=True, rope_parameters=YARN), hf.Qwen2ForCausalLM),
    "qwen3": (hf.Qwen3Config, SMALL | dict(head_dim=12), hf.Qwen3ForCausalLM),
    "qwen3-tags": (hf.Qwen3Config, SMALL | dict(head_dim=12, num_labels=5), hf.Qwen3ForTokenClassification),
    "gpt2": (hf.GPT2Config, GPT2, hf.GPT2LMHeadModel),
    "gpt2-odd": (hf.GPT2Config, GPT2 | dict(scale_attn_weights=False, n_inner=50, activation_function="gelu",
                                            tie_word_embeddings=False), hf.GPT2LMHeadModel),
    "gpt2-classes": (hf.GPT2Config, GPT2 | dict(num_labels=3), hf.GPT2ForSequenceClassification),
    "gpt2-tags": (hf.GPT2Config, GPT2 | dict(num_labels=3), hf.GPT2ForTokenClassification),
    "gpt2-span": (hf.GPT2Config, GPT2, hf.GPT2ForQuestionAnswering),
    "gemma2": (hf.Gemma2Config, SMALL | dict(head_dim=12, query_pre_attn_scalar=20, sliding_window=6),
               hf.Gemma2ForCausalLM),
    "gemma3": (hf.Gemma3TextConfig, SMALL | dict(
        head_dim=12, query_pre_attn_scalar=20, sliding_window=6, num_hidden_layers=7, rope_parameters={
            "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
            "sliding_attention": dict(rope_type="default", rope_theta=1e4)}), hf.Gemma3ForCausalLM),
    "gemma3-full": (hf.Gemma3TextConfig, SMALL | dict(
        head_dim=12, attention_bias=True, final_logit_softcapping=5.0, num_hidden_layers=2,
        layer_types=["full_attention"] * 2), hf.Gemma3ForCausalLM),
    "bert": (hf.BertConfig, BERT, hf.BertForPreTraining),
    "bert-base": (hf.BertConfig, BERT, hf.BertModel),
    "bert-mlm": (hf.BertConfig, BERT, hf.BertForMaskedLM),
    "bert-classes": (hf.BertConfig, BERT | dict(num_labels=4), hf.BertForSequenceClassification),
    "bert-tags": (hf.BertConfig, BERT | dict(num_labels=4), hf.BertForTokenClassification),
    "bert-span": (hf.BertConfig, BERT, hf.BertForQuestionAnswering),
    "distilbert": (hf.DistilBertConfig, DISTIL, hf.DistilBertForMaskedLM),
    "distilbert-base": (hf.DistilBertConfig, DISTIL, hf.DistilBertModel),
    "distilbert-classes": (hf.DistilBertConfig, DISTIL, hf.DistilBertForSequenceClassification),
    "distilbert-tags": (hf.DistilBertConfig, DISTIL, hf.DistilBertForTokenClassification),
    "distilbert-span": (hf.DistilBertConfig, DISTIL, hf.DistilBertForQuestionAnswering),
    "t5": (hf.T5Config, T5, hf.T5ForConditionalGeneration),
    "t5-v1.1": (hf.T5Config, T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
                hf.T5ForConditionalGeneration),
    "t5-classes": (hf.T5Config, T5 | dict(num_labels=4), hf.T5ForSequenceClassification),
    "t5-tags": (hf.T5Config, T5 | dict(num_labels=4, feed_forward_proj="gated-gelu"), hf.T5ForTokenClassification),
    "t5-span": (hf.T5Config, T5, hf.T5ForQuestionAnswering),
    "mixtral": (hf.MixtralConfig, SMALL | dict(num_local_experts=4, num_experts_per_tok=2), hf.MixtralForCausalLM),
    "qwen3-moe": (hf.Qwen3MoeConfig, SMALL | EXPERTS | dict(head_dim=12, norm_topk_prob=True), hf.Qwen3MoeForCausalLM),
    "qwen3-moe-mixed": (hf.Qwen3MoeConfig, SMALL | EXPERTS | dict(head_dim=12, mlp_only_layers=[1]),
                        hf.Qwen3MoeForCausalLM),
    "deepseek": (hf.DeepseekV3Config, DEEPSEEK, hf.DeepseekV3ForCausalLM),
    "deepseek-classes": (hf.DeepseekV3Config, DEEPSEEK | dict(num_labels=5), hf.DeepseekV3ForSequenceClassification),
    "deepseek-plain": (hf.DeepseekV3Config, DEEPSEEK | dict(
        q_lora_rank=None, norm_topk_prob=False, rope_parameters=dict(rope_type="default", rope_theta=1e4)),
        hf.DeepseekV3ForCausalLM),
}


def made(name: str, *, dtype=torch.float32, seed: int = 0):
    """A model of `MODELS` in evaluation mode, with parameters and buffers that are trained of their own drawn too."""
    config, settings, cls = MODELS[name]
    torch.manual_seed(seed)
    model = cls._from_config(config(**settings), attn_implementation="eager").eval()
    trained = [b for key, b in model.named_buffers() if "correction_bias" in key]
    with torch.no_grad():
        for weight in [*model.parameters(), *trained]:
            weight.add_(torch.randn_like(weight) * (0.1 if weight.ndim == 1 else 0.25 / weight.shape[-1] ** 0.5))
    return model.to(dtype)


def outputs(model, tokens, **more):
    """What the head of a model gives: logits, the two of question answering as one, or hidden states; of an
    encoder-decoder, which reads `tokens` twice, its decoder's."""
    if hasattr(model.base_model, "decoder"):
        more = {"decoder_input_ids": tokens} | more
    if hasattr(model, "classification_head"):  # it wants rows to end in </s>, whose state it reads
        states = model.transformer(input_ids=tokens, **more).last_hidden_state
        last = more["attention_mask"].sum(1) - 1 if "attention_mask" in more else [-1] * len(tokens)
        return model.classification_head(states[range(len(tokens)), last])
    out = model(input_ids=tokens, **more)
    if hasattr(out, "start_logits"):
        return torch.stack([out.start_logits, out.end_logits], -1)
    return next(out[key] for key in ("logits", "prediction_logits", "last_hidden_state") if key in out)
