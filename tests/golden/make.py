"""What `transformers` makes of checkpoints whose numbers follow from their names; writes one small JSON a model.

    python tests/golden/make.py          # needs torch and transformers: pip install -e ".[test-hf]"

A file holds the config.json and the names and shapes of the tensors, as transformers saves them, and what the model
gives for a row of tokens; of one that writes also how it goes on from the row's beginning, the likeliest each time.
tests/checkpoints.py makes the same folder again where there is no torch.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np

NAMES = ("llama", "llama-3.1", "llama-3.2", "llama-span", "mistral", "qwen2-yarn", "qwen3", "gpt2", "gpt2-classes",
         "gemma2", "gemma3", "bert", "bert-base", "bert-classes", "distilbert", "distilbert-classes", "distilbert-tags",
         "t5", "t5-v1.1", "t5-classes", "t5-tags", "mixtral", "qwen3-moe-mixed", "deepseek")


def main():
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    import hf
    import torch
    from checkpoints import HERE, PROMPT, SHOWN, TOKENS, checkpoint

    from lm_jax.hub import tensors

    for name in NAMES:
        with tempfile.TemporaryDirectory() as place:
            folder = pathlib.Path(place)
            hf.made(name).save_pretrained(folder)
            shapes = {key: list(tensor.shape) for key, tensor in tensors.read(folder / "model.safetensors").items()}
            config = json.loads((folder / "config.json").read_text())
            golden = {"config": config, "tensors": dict(sorted(shapes.items()))}
            if name == "t5-v1.1":  # as published; a new one has no output table of its own
                golden["tensors"]["lm_head.weight"] = [99, 32]
            model = hf.MODELS[name][2].from_pretrained(checkpoint(golden, folder), attn_implementation="eager")
            with torch.no_grad():
                out = hf.outputs(model.eval(), torch.tensor([TOKENS]))[0].numpy()
                if model.can_generate():
                    golden["greedy"] = written(model, torch.tensor([TOKENS[:PROMPT]]))
        golden["outputs"] = np.round(out[list(SHOWN)] if out.ndim == 2 else out, 6).tolist()
        (HERE / f"{name}.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
        print(name, out.shape)


def written(model, prompt) -> list[int]:
    """Ten tokens that nothing ends."""
    settings, both = model.generation_config, model.config.is_encoder_decoder
    settings.eos_token_id, settings.pad_token_id, settings.decoder_start_token_id = None, 0, 0
    # its cache counts the layers of the encoder, where the decoder may have more
    ids = model.generate(prompt, do_sample=False, max_new_tokens=10, use_cache=not both)[0].tolist()
    return ids[1 if both else prompt.shape[1]:]


if __name__ == "__main__":
    main()
