"""Every family against `transformers` itself, on random models that it makes and saves; needs the test-hf extra."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import json  # noqa: E402

import hf  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from checkpoints import close, same_tensors  # noqa: E402
from flax import nnx  # noqa: E402

from lm_jax import hub  # noqa: E402
from lm_jax.config import OVER_WORDS  # noqa: E402
from lm_jax.hub import tensors  # noqa: E402
from lm_jax.hub.model import _own_prefix  # noqa: E402
from lm_jax.hub.families import of_type  # noqa: E402
from lm_jax.hub.places import places  # noqa: E402
from lm_jax.hub.stream import Writer  # noqa: E402

transformers.logging.set_verbosity_error()
LENGTHS = (19, 30)  # of two rows; beyond the windows, and the length that scaled positions start from


@pytest.fixture(scope="module", params=hf.MODELS)
def pair(request, tmp_path_factory):
    """(model of transformers, ours, the folder) of a name."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = hf.made(request.param)
    theirs.save_pretrained(folder)
    return theirs, hub.load(folder), folder


def rows(lengths=LENGTHS):
    rng = np.random.default_rng(1)
    return [rng.integers(3, 99, length).tolist() for length in lengths]


def test_outputs_of_padded_rows(pair):
    """One batch of rows of unequal length, padded, on both sides."""
    theirs, ours, _ = pair
    short, long = rows()
    padded = torch.tensor([short + [0] * (len(long) - len(short)), long])
    mask = torch.tensor([[1] * len(short) + [0] * (len(long) - len(short)), [1] * len(long)])
    more = {"decoder_tokens": [short, long]} if ours.cfg.encoder_depth else {}
    out = hub.logits(ours, [short, long], **more)
    with torch.no_grad():
        expected = hf.outputs(theirs, padded, attention_mask=mask).numpy()
    for row, length in enumerate(LENGTHS):
        real = slice(length) if expected.ndim == 3 else slice(None)
        close(out[row][real], expected[row][real])


def test_outputs_of_packed_rows(pair):
    """Documents in one row give what they give alone in the other's."""
    theirs, ours, _ = pair
    one, two = rows()
    if ours.cfg.head == "classes":
        pytest.skip("scores of rows are of one document each")
    row = {"tokens": [one + two], "positions": [[*range(len(one)), *range(len(two))]],
           "segments": [[1] * len(one) + [2] * len(two)], "types": [[0] * (len(one) + len(two))]}
    row = {key: jnp.asarray(value) for key, value in row.items()}
    out = np.asarray(jax.jit(lambda model, row: model(row))(ours, row | {"source": row}), np.float32)[0]
    with torch.no_grad():
        expected = [hf.outputs(theirs, torch.tensor([each]))[0].numpy() for each in (one, two)]
    close(out, np.concatenate(expected))


def test_hidden_states_of_long_rows(pair):
    """As many tokens as there are positions; the states under the head."""
    theirs, ours, _ = pair
    (long,) = rows([64])
    given = {"input_ids": torch.tensor([long])}
    with torch.no_grad():
        if ours.cfg.encoder_depth:
            out = theirs.base_model(**given, decoder_input_ids=given["input_ids"], output_hidden_states=True)
            expected = out.decoder_hidden_states[-1]
        else:
            expected = theirs.base_model(**given).last_hidden_state
    batch = hub.batch(ours.cfg, [long])
    hidden = jax.jit(lambda model, batch: model.hidden(batch)[0])(ours, batch | {"source": batch})
    close(np.asarray(hidden), expected.numpy())


def test_loss_and_gradients(pair):
    """Of every parameter, by its name on disk: the other's gradients are saved as if they were a model."""
    theirs, ours, folder = pair
    _, long = rows()
    batch = hub.batch(ours.cfg, [long])
    theirs.zero_grad()
    out = hf.outputs(theirs, torch.tensor([long]))
    draws = np.random.default_rng(2).standard_normal(out.shape).astype(np.float32)
    words = ours.cfg.head in OVER_WORDS
    loss = (torch.nn.functional.cross_entropy(out[0], torch.tensor(long)) if words
            else (out * torch.tensor(draws)).sum())
    loss.backward()
    saved = _gradients(theirs, folder)

    graph, params = nnx.split(ours)

    @jax.jit
    @jax.value_and_grad
    def value(params):
        out = nnx.merge(graph, params)(batch | {"source": batch})
        if not words:
            return (out.reshape(draws.shape) * draws).sum()
        return -jnp.take_along_axis(jax.nn.log_softmax(out[0]), jnp.asarray(long)[:, None], 1).mean()

    ours_loss, grads = value(params)
    close(ours_loss, loss.item())
    family = of_type(json.loads((folder / "config.json").read_text())["model_type"])
    flat = {way: leaf.get_value() for way, leaf in nnx.to_flat_state(grads)}
    writer = Writer(flat, places(ours.cfg, family, _own_prefix(family, ours.cfg)))
    largest = max(np.abs(tensor).max() for tensor in saved.values())
    seen = 0
    for name in writer.entries():
        if name in saved:
            np.testing.assert_allclose(writer.tensor(name), saved[name], rtol=0, atol=1e-4 * max(1.0, largest))
            np.testing.assert_allclose(writer.tensor(name), saved[name], rtol=1e-2, atol=1e-5 * max(1.0, largest))
            seen += np.abs(saved[name]).max() > 0
    assert seen > 0.6 * len(writer.entries())


def test_it_goes_out_bit_for_bit_and_as_a_new_model_that_transformers_reads(pair, tmp_path):
    theirs, ours, folder = pair
    hub.save(ours, tmp_path / "same")
    assert (tmp_path / "same/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "same/config.json").read_text()) == json.loads((folder / "config.json").read_text())
    hub.save(ours, tmp_path / "new", like="")
    same_tensors(tmp_path / "new", folder)
    name = json.loads((tmp_path / "new/config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(
        tmp_path / "new", attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    tokens = torch.tensor([rows()[1]])
    with torch.no_grad():
        close(hf.outputs(model.eval(), tokens).numpy(), hf.outputs(theirs, tokens).numpy(), 1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert", "t5", "deepseek"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_goes_out_bit_for_bit_in_shards(name, dtype, tmp_path):
    model = hf.made(name, dtype=dtype)
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    ours = hub.load(tmp_path / "in")
    hub.save(ours, tmp_path / "out", shard=20_000)
    same_tensors(tmp_path / "out", tmp_path / "in")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_an_untied_table_in_a_t5_is_kept(tmp_path):
    """A new T5 v1.1 is saved without one; published ones have it."""
    hf.made("t5-v1.1").save_pretrained(tmp_path / "in")
    file = tmp_path / "in/model.safetensors"
    arrays = {name: tensor.rows() for name, tensor in tensors.read(file).items()}
    arrays["lm_head.weight"] = np.random.default_rng(0).standard_normal((99, 32)).astype(np.float32)
    tensors.write(file, {name: (array.dtype, array.shape) for name, array in arrays.items()}, arrays.values())
    ours = hub.load(tmp_path / "in")
    assert not ours.cfg.tied
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "in").eval()
    (row,) = rows([20])
    with torch.no_grad():
        close(hub.logits(ours, [row], [row]), hf.outputs(theirs, torch.tensor([row])).numpy())
    hub.save(ours, tmp_path / "out")
    same_tensors(tmp_path / "out", tmp_path / "in")


def _gradients(model, folder) -> dict:
    """Gradients by the names that the parameters have on disk."""
    kept = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
        model.save_pretrained(folder / "gradients")
        for name, weight in model.named_parameters():
            weight.copy_(kept[name])
    found = tensors.read(folder / "gradients/model.safetensors")
    return {name: tensor.rows() for name, tensor in found.items() if "correction_bias" not in name}
