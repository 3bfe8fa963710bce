"""One cross-entropy for every pretraining objective: causal, prefix, masked and corrupted data differ in the batch."""

from functools import partial

import jax
import jax.numpy as jnp

from lm_jax import parallel
from lm_jax.batch import Batch, Mean

CHUNK = 2**26  # most logits a device holds at once: 256 MiB in float32
LOWEST = -1e30  # below any logit, and finite


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

    The vocabulary is taken in `parts_of` parts, one after another, each made again in the backward pass: no more than
    `CHUNK` logits are held at once, and a part of the output table is gathered, and its gradient scattered, once.
    """
    x_BTD, (table, bias_V) = model.outward(x_BTD), model.output()
    ids_V = parallel.constrain(jnp.arange(model.cfg.vocab), "V")
    wide_BTD = x_BTD.astype(jnp.float32)  # the gradients of the parts add up in float32

    def add(sums, part):
        highest_BT, total_BT, target_BT, sum_BT = sums
        ids_V, *output = part
        logits_BTV = model.unembedded(wide_BTD.astype(x_BTD.dtype), *output)
        if filled:
            logits_BTV = jnp.where(ids_V >= 0, logits_BTV, LOWEST)
        higher_BT = jnp.maximum(highest_BT, jax.lax.stop_gradient(logits_BTV.max(-1)))
        total_BT = total_BT * jnp.exp(highest_BT - higher_BT) + jnp.exp(logits_BTV - higher_BT[..., None]).sum(-1)
        hit_BTV = ids_V == targets_BT[..., None]  # a gather would bring all of V together
        target_BT += jnp.where(hit_BTV, logits_BTV, 0).sum(-1)
        sum_BT += (jnp.where(ids_V >= 0, logits_BTV, 0) if filled else logits_BTV).sum(-1)
        return (higher_BT, total_BT, target_BT, sum_BT), None

    parts, own = parts_of(*targets_BT.shape, model.cfg.vocab), parallel.local_size("V", ids_V.shape)
    filled = own % parts > 0  # with ids of -1, which nothing predicts
    none_BT = jnp.zeros_like(targets_BT, jnp.float32)
    sums, whole = (none_BT + LOWEST, none_BT, none_BT, none_BT), (ids_V, table, bias_V)
    if parts == 1:
        sums, _ = add(sums, whole)
    else:
        cut = partial(parallel.split, parts=parts, shards=model.cfg.vocab // own)
        cuts = (cut(ids_V, axis=0, fill=-1), cut(table, axis=model.output_letters.index("V")),
                None if bias_V is None else cut(bias_V, axis=0))
        sums, _ = jax.lax.scan(jax.checkpoint(add, prevent_cse=False), sums, cuts)
    highest_BT, total_BT, target_BT, sum_BT = sums
    z_BT = highest_BT + jnp.log(total_BT)
    return z_BT - target_BT, z_BT, z_BT - sum_BT / model.cfg.vocab, target_BT >= highest_BT


def parts_of(B: int, T: int, V: int) -> int:
    """In how many parts the logits [B, T, V] are made on the mesh in use."""
    return min(-(-parallel.local_size("BTV", (B, T, V)) // CHUNK), parallel.local_size("V", (V,)))


def _pair_scores(model, x_BTD, batch):
    """Next-sentence cross-entropy and accuracy of each row, read off its first token."""
    _, logits_BTC = model.pooler(x_BTD)
    targets_B = parallel.constrain(batch["pair_targets"], "BS")[:, 0]
    logp_BC = jax.nn.log_softmax(logits_BTC[:, 0].astype(jnp.float32))
    hit_BC = jnp.arange(2) == targets_B[:, None]
    return -jnp.where(hit_BC, logp_BC, 0).sum(-1), logp_BC.argmax(-1) == targets_B
