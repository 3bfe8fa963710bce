"""One cross-entropy for every pretraining objective: causal, prefix, masked and corrupted data differ in the batch."""

import jax
import jax.numpy as jnp

from lm_jax import parallel
from lm_jax.batch import Batch, Mean

CHUNK = 2**26  # most logits a device holds at once: 256 MiB in float32


def next_token(model, batch: Batch, key=None, *, z_loss: float = 0.0, smoothing: float = 0.0) -> dict[str, Mean]:
    """Cross-entropy in nats at weighted positions, plus what regularises it.

    "loss" is the plain cross-entropy; "objective" is what is differentiated: the loss, smoothed if asked, plus the
    z-loss (PaLM: `z_loss` * logsumexp^2), the router's losses, and next-sentence prediction where the model has it.
    Rows weigh in by their loss weights throughout, so that all terms share one denominator and microbatches add up.
    """
    x_BTD, _, router = model.hidden(batch, key=key)
    weights_BT, targets_BT = batch["weights"], batch["targets"]
    nll_BT, z_BT, flat_BT, right_BT = token_scores(model, x_BTD, targets_BT)
    weight_B = weights_BT.sum(1)
    metrics = {"loss": Mean.of(nll_BT, weights_BT), "accuracy": Mean.of(right_BT, weights_BT)}
    parts = [metrics["loss"] if not smoothing else Mean.of((1 - smoothing) * nll_BT + smoothing * flat_BT, weights_BT)]
    if z_loss:
        metrics["z_loss"] = Mean.of(z_loss * jnp.square(z_BT), weights_BT)
        parts.append(metrics["z_loss"])
    for name, loss_B in router.items():
        metrics[name] = Mean.of(loss_B, weight_B)
        parts.append(metrics[name])
    if model.pooler is not None:
        pair_B, right_B = _pair_scores(model, x_BTD, batch)
        pair_weight_B = weight_B * parallel.constrain(batch["pair_weights"], "BS")[:, 0]  # 0: a row that has no pair
        metrics |= {"pair_loss": Mean.of(pair_B, pair_weight_B), "pair_accuracy": Mean.of(right_B, pair_weight_B)}
        parts.append(metrics["pair_loss"])
    objective = Mean(sum(part.total for part in parts), metrics["loss"].weight)
    return {"objective": objective} | metrics


def row_sums(model, batch: Batch) -> dict[str, jax.Array]:
    """Sums over the rows of a batch that give the mean loss and its standard error: rows are the independent units.

    The batch says beside its usual keys how many `bytes` of text each target stands for.
    """
    x_BTD, _, _ = model.hidden(batch)
    nll_BT, _, _, right_BT = token_scores(model, x_BTD, batch["targets"])
    nll_B, weight_B = (nll_BT * batch["weights"]).sum(1), batch["weights"].sum(1)
    pairs = {}
    if model.pooler is not None:
        pair_B, pair_right_B = _pair_scores(model, x_BTD, batch)
        real_B = parallel.constrain(batch["pair_weights"], "BS")[:, 0]
        pairs = {"pair_nll": pair_B * real_B, "pair_right": pair_right_B * real_B, "pairs": real_B}
    weighed = {"right": right_BT * batch["weights"], "bytes": batch["bytes"] * batch["weights"]}
    rows = {"nll": nll_B, "weight": weight_B, "rows": weight_B > 0, "nll2": nll_B**2, "nll_weight": nll_B * weight_B,
            "weight2": weight_B**2}
    return {name: values.sum() for name, values in (pairs | weighed | rows).items()}


def token_scores(model, x_BTD, targets_BT):
    """Per token, [B, T] in float32: cross-entropy, log-partition, mean of it over the vocabulary, whether right.

    Logits are made for one chunk of tokens at a time and again in the backward pass, so that a large vocabulary never
    needs more than `CHUNK` of them; small ones are made once.
    """
    chunks = chunks_of(*x_BTD.shape[:2], model.cfg.vocab)
    if chunks == 1:
        return _scores(model, x_BTD, targets_BT)
    scores = jax.checkpoint(lambda xs: _scores(model, *xs), prevent_cse=False)
    parts = jax.lax.map(scores, (parallel.split(x_BTD, chunks, axis=1), parallel.split(targets_BT, chunks, axis=1)))
    return tuple(parallel.join(part, axis=1) for part in parts)


def chunks_of(B: int, T: int, V: int) -> int:
    """In how many parts, one after another, the logits [B, T, V] are made on the mesh in use."""
    size = parallel.local_size("BTV", (B, T, V))
    local = parallel.local_size("T", (T,))  # no chunk may need another device's tokens
    return next(n for n in range(1, local + 1) if local % n == 0 and (size <= n * CHUNK or n == local))


def _scores(model, x_BTD, targets_BT):
    logits_BTV = model.logits(x_BTD)
    ids_V = parallel.constrain(jnp.arange(logits_BTV.shape[-1]), "V")
    hit_BTV = ids_V == targets_BT[..., None]  # a gather would bring all of V together
    z_BT = jax.nn.logsumexp(logits_BTV, -1)
    target_BT = jnp.where(hit_BTV, logits_BTV, 0).sum(-1)
    right_BT = target_BT >= jax.lax.stop_gradient(logits_BTV.max(-1))
    return z_BT - target_BT, z_BT, z_BT - logits_BTV.mean(-1), right_BT


def _pair_scores(model, x_BTD, batch):
    """Next-sentence cross-entropy and accuracy of each row, read off its first token."""
    _, logits_BTC = model.pooler(x_BTD)
    targets_B = parallel.constrain(batch["pair_targets"], "BS")[:, 0]
    logp_BC = jax.nn.log_softmax(logits_BTC[:, 0].astype(jnp.float32))
    hit_BC = jnp.arange(2) == targets_B[:, None]
    return -jnp.where(hit_BC, logp_BC, 0).sum(-1), logp_BC.argmax(-1) == targets_B
