"""The whole chain against known truths: tiny models of each family learn a source to within 0.05 nats of the truth."""

import json
import math

import numpy as np
import pytest

from lm_jax import config, trainer
from lm_jax.data import loader, store, synthetic
from lm_jax.recipes import pretrain
from lm_jax.workdir import Workdir

TOLERANCE = 0.05  # nats a predicted token
MARKOV = "markov:documents=4000,symbols=4,seed=3,length="
MODEL = dict(width=48, depth=2, heads=2, dtype="float32")


def settings(root, **sections):
    c = config.default()
    c.model.update(MODEL)
    c.data.update(root=str(root), tokenizer="byte", validation=0.05)
    c.optim.update(lr=4e-3, warmup=20, schedule="linear", floor=0.0, weight_decay=0.0)
    c.train.update(steps=200, batch=32, eval_every=1000, checkpoint_every=1000, log_every=50)
    for section, values in sections.items():
        c[section].update(values)
    return config.resolve(c)


def trained(c, path):
    """Train as `train` does; (recipe, model, validation figures)."""
    recipe = pretrain.Pretraining(c, store.prepare(c.data, say=lambda line: None))
    evaluation = pretrain.Evaluation(recipe)
    workdir = Workdir(path / "run")
    workdir.open(config.to_dict(c))
    run = trainer.Trainer(c, recipe.model(), recipe.recipe(), workdir, say=lambda line: None)
    assert run.fit() == "ok"
    run.log.close()
    workdir.close()
    return recipe, run.state.model, evaluation(run.state.model, 0)["markov"]


def test_a_decoder_learns_a_markov_chain_to_its_entropy(tmp_path):
    c = settings(tmp_path, data=dict(sources=MARKOV + "31", length=32))
    recipe, _, found = trained(c, tmp_path)
    split = recipe.store.manifest["splits"]["validation"]["markov"]
    assert found["val_tokens"] == split["tokens"], "each held-out token is predicted once"
    assert found["true_loss"] == pytest.approx(split["nats"] / split["tokens"])
    assert -0.005 < found["excess_loss"] < TOLERANCE
    assert found["val_loss_stderr"] < 0.02
    bits = found["val_loss"] * split["tokens"] / split["bytes"] / math.log(2)
    assert found["val_bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert {row["step"] for row in rows} == {1, 50, 100, 150, 200}
    assert rows[0]["loss"] > 2 > rows[-1]["loss"] and all(row["data_wait_fraction"] <= 1 for row in rows)


def test_an_encoder_learns_masked_symbols_to_the_entropy_that_their_neighbours_leave(tmp_path):
    c = settings(tmp_path, model=dict(causal=False, head="mlm"),
                 data=dict(sources=MARKOV + "30", length=32, objective="masked"), train=dict(steps=400))
    recipe, _, found = trained(c, tmp_path)
    truth = np.mean([nats for batch in loader.validation(recipe.store, c.data, "markov", batch=32, rows=0)
                     for nats in masked_costs(batch, recipe.store.tokenizer)])
    assert abs(found["val_loss"] - truth) < TOLERANCE


def test_an_encoder_decoder_learns_a_corrupted_span_to_its_entropy(tmp_path):
    # one span of 8 of 32 tokens is the row's end: 7 symbols that follow the chain, and the text's end
    c = settings(tmp_path, model=dict(encoder_depth=1, depth=1), train=dict(steps=400),
                 data=dict(sources=MARKOV + "30", length=26, objective="span", noise=0.25, span=8.0))
    recipe, _, found = trained(c, tmp_path)
    costs = [chain_cost(text, last=7) for text in recipe.store.held_out("markov")]
    assert abs(found["val_loss"] - np.mean(costs) / 10) < TOLERANCE  # of 10 targets, sentinel and two ends are certain


def table():
    """The chain's P(next | this)."""
    return synthetic.make(MARKOV + "30").table


def codes(text):
    return [bytes(synthetic.ALPHABET).decode().index(symbol) for symbol in text]


def chain_cost(text, *, last):
    """Nats of a text's last symbols, given those before."""
    path = codes(text)
    return -sum(math.log(table()[a, b]) for a, b in zip(path[-last - 1:-1], path[-last:]))


def masked_costs(batch, tokenizer, share=0.15):
    """What a perfect reader pays at each hidden position: forward-backward over the chain seen through BERT's noise."""
    chain = table()
    symbols = [tokenizer.encode(bytes([byte]).decode())[0] for byte in synthetic.ALPHABET[: len(chain)]]
    ordinary = (tokenizer.byte_lengths > 0).sum()
    for b in range(len(batch["tokens"])):
        hidden = np.flatnonzero(batch["weights"][b])
        if not len(hidden):
            continue
        seen, truth = batch["tokens"][b, 1:31], batch["targets"][b, 1:31]
        same = (seen[:, None] == np.array(symbols)).astype(float)
        masked = (seen == tokenizer.mask)[:, None]
        chosen = 0.8 * masked + 0.1 * ~masked / ordinary + 0.1 * same
        emission = share * chosen + (1 - share) * same
        forward, backward = np.zeros_like(same), np.ones_like(same)
        before = chain[0]
        for t in range(30):
            forward[t] = before
            after = before * emission[t]
            before = after / after.sum() @ chain
        for t in reversed(range(29)):
            backward[t] = chain @ (emission[t + 1] * backward[t + 1])
            backward[t] /= backward[t].sum()
        for t in hidden - 1:
            posterior = forward[t] * backward[t] * chosen[t]
            yield -math.log((posterior / posterior.sum())[symbols.index(truth[t])])
