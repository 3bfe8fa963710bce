"""One cross-entropy for every pretraining objective: causal, prefix, masked and corrupted data differ in the batch."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from lm_jax import parallel
from lm_jax.batch import Batch, Mean
from lm_jax.models import heads

CHUNK = 2**26  # most logits a device holds at once: 256 MiB in float32


def next_token(model, batch: Batch, key=None, *, z_loss: float = 0.0, smoothing: float = 0.0) -> dict[str, Mean]:
    """Cross-entropy in nats at weighted positions, plus what regularises it.

    "loss" is the plain cross-entropy; "objective" is what is differentiated: the loss, smoothed if asked, plus the
    z-loss (PaLM: `z_loss` * logsumexp^2), the router's losses, and next-sentence prediction where the model has it.
    Rows weigh in by their loss weights throughout, so that all terms share one denominator and microbatches add up.
    """
    x_BTD, _, router = model.hidden(batch, key=key)
    total, nll_BT, z_BT, right_BT = token_scores(model, x_BTD, batch, z_loss=z_loss, smoothing=smoothing)
    weights_BT, weight_B = batch["weights"], batch["weights"].sum(1)
    metrics = {"loss": Mean.of(nll_BT, weights_BT), "accuracy": Mean.of(right_BT, weights_BT)}
    if z_loss:
        metrics["z_loss"] = Mean.of(z_loss * jnp.square(z_BT), weights_BT)
    for name, loss_B in router.items():
        metrics[name] = Mean.of(loss_B, weight_B)
        total += metrics[name].total
    if model.pooler is not None:
        pair_B, right_B = _pair_scores(model, x_BTD, batch)
        pair_weight_B = weight_B * parallel.constrain(batch["pair_weights"], "BS")[:, 0]  # 0: a row that has no pair
        metrics |= {"pair_loss": Mean.of(pair_B, pair_weight_B), "pair_accuracy": Mean.of(right_B, pair_weight_B)}
        total += metrics["pair_loss"].total
    return {"objective": Mean(total, metrics["loss"].weight)} | metrics


def row_sums(model, batch: Batch) -> dict[str, jax.Array]:
    """Sums over the rows of a batch that give the mean loss and its standard error: rows are the independent units.

    The batch says beside its usual keys how many `bytes` of text each target stands for.
    """
    x_BTD, _, _ = model.hidden(batch)
    _, nll_BT, _, right_BT = token_scores(model, x_BTD, batch)
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


def token_scores(model, x_BTD, batch: Batch, **terms):
    """The objective's sum over weighted tokens, and per token, [B, T] in float32: cross-entropy, log-partition, whether
    right. `terms` of the objective: z_loss, smoothing.

    Only the sum has a gradient. It is made in the forward pass, beside the logits, so that none of these is kept or
    made twice (Hsu et al. 2024). A device takes its tokens in `parts_of` parts, one after another, with at most `CHUNK`
    logits at once; the output table is brought together once, and its gradient summed and scattered once.
    """
    (table, bias_V), cfg = model.output(), model.cfg
    rule = Rule(model.output_letters, cfg.logit_softcap, cfg.vocab, parallel.activation_axes("V", cfg.vocab), **terms)
    bias_V = None if bias_V is None else parallel.constrain(bias_V, "V")
    return _scores(rule, model.outward(x_BTD), table, bias_V, batch["targets"], batch["weights"])


def parts_of(B: int, T: int, V: int) -> int:
    """In how many parts the logits [B, T, V] are made on the mesh in use, each of some tokens of every row."""
    tokens = parallel.local_size("T", (T,))
    each = max(1, CHUNK * tokens // parallel.local_size("BTV", (B, T, V)))
    return -(-tokens // each)


@dataclass(frozen=True)
class Rule:
    """What of the output and the objective is known when they are traced."""

    letters: str  # of the output table
    softcap: float
    V: int
    axes: tuple[str, ...]  # of the mesh, that divide the vocabulary
    z_loss: float = 0.0
    smoothing: float = 0.0

    def scores(self, logits_BTV, ids_V, targets_BT, weights_BT):
        """Per token, what is summed to the objective, cross-entropy, log-partition, whether right; and the gradient of
        the sum."""
        over = lambda collective, x_BT: collective(x_BT, self.axes) if self.axes else x_BT
        highest_BT = over(jax.lax.pmax, logits_BTV.max(-1))
        total_BT = over(jax.lax.psum, jnp.exp(logits_BTV - highest_BT[..., None]).sum(-1))
        hit_BTV = ids_V == targets_BT[..., None]  # a gather would bring all of V together
        target_BT = over(jax.lax.psum, jnp.where(hit_BTV, logits_BTV, 0).sum(-1))
        z_BT, even = highest_BT + jnp.log(total_BT), self.smoothing / self.V
        aim_BT = (1 - self.smoothing) * target_BT
        if self.smoothing:
            aim_BT += even * over(jax.lax.psum, logits_BTV.sum(-1))
        objective_BT = weights_BT * (z_BT - aim_BT + self.z_loss * jnp.square(z_BT))
        slope_BT = weights_BT * (1 + 2 * self.z_loss * z_BT)
        d_BTV = slope_BT[..., None] * jnp.exp(logits_BTV - z_BT[..., None])
        d_BTV -= weights_BT[..., None] * (even + jnp.where(hit_BTV, 1 - self.smoothing, 0))
        return (objective_BT, z_BT - target_BT, z_BT, target_BT >= highest_BT), d_BTV


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(rule: Rule, x_BTD, table, bias_V, targets_BT, weights_BT):
    objective_BT, *scores = _walk(rule, x_BTD, table, bias_V, targets_BT, weights_BT, graded=False)[0]
    return objective_BT.sum(), *scores


def _forward(rule: Rule, x_BTD, table, bias_V, targets_BT, weights_BT):
    (objective_BT, *scores), gradients = _walk(rule, x_BTD, table, bias_V, targets_BT, weights_BT, graded=True)
    dx_BTD, dtable, dbias = gradients
    dtable = parallel.sum_of_tokens(dtable, "DV")
    if rule.letters == "VD":
        dtable = jax.lax.optimization_barrier(dtable).T  # or XLA would turn the product's wide operand
    dbias_V = None if dbias is None else parallel.sum_of_tokens(dbias, "V")
    return (objective_BT.sum(), *scores), (dx_BTD, dtable.astype(table.dtype), dbias_V)


def _backward(rule: Rule, gradients, cotangents):
    return *jax.tree.map(lambda d: (cotangents[0] * d).astype(d.dtype), gradients), None, None


_scores.defvjp(_forward, _backward)


def _walk(rule: Rule, x_BTD, table, bias_V, targets_BT, weights_BT, *, graded: bool):
    """Scores, and gradients: of the hidden states whole, and each device's share [1, 1, ...] of the table's and the
    bias's. The table's has the narrow side first, which is how a CPU makes it without turning the wide operand."""
    parts, dtype = parts_of(*targets_BT.shape, rule.V), x_BTD.dtype

    def local(x_BTD, table, bias_V, ids_V, targets_BT, weights_BT):
        def part(sums, tokens):
            x_BTD, targets_BT, weights_BT = tokens
            raw_BTV = _product(f"BTD,{rule.letters}->BTV", x_BTD, table)
            logits_BTV, pull = jax.vjp(partial(heads.softened, cap=rule.softcap), raw_BTV, bias_V)
            scores, d_BTV = rule.scores(logits_BTV, ids_V, targets_BT, weights_BT)
            if not graded:
                return sums, (scores, None)
            d_BTV, dbias_V = pull(d_BTV)
            d_BTV = jax.lax.optimization_barrier(d_BTV.astype(dtype))  # made once for the two products that read it
            dx_BTD = _product(f"BTV,{rule.letters}->BTD", d_BTV, table).astype(dtype)
            more = _product("BTD,BTV->DV", x_BTD, d_BTV), dbias_V
            return jax.tree.map(jnp.add, sums, more), (scores, dx_BTD)

        none = (jnp.zeros((x_BTD.shape[2], len(ids_V))), None if bias_V is None else jnp.zeros_like(bias_V))
        cut = jax.tree.map(partial(_cut, parts=parts), (x_BTD, targets_BT, weights_BT))
        sums, made = jax.lax.scan(part, none if graded else None, cut, unroll=parts == 1)
        scores, dx_BTD = jax.tree.map(partial(_joined, T=targets_BT.shape[1]), made)
        if not graded:
            return scores
        dx_BTD = jax.lax.psum(dx_BTD, rule.axes) if rule.axes else dx_BTD
        return *scores, dx_BTD, *jax.tree.map(lambda d: d[None, None], sums)

    whole = parallel.gather(table.astype(dtype), rule.letters)
    ids_V = parallel.constrain(jnp.arange(rule.V), "V")
    out = ("BT",) * 4 + (("BTD", "BTDV", "BTV") if graded else ())
    made = parallel.per_shard(local, x_BTD, whole, bias_V, ids_V, targets_BT, weights_BT, out=out,
                              letters=("BTD", rule.letters, "V", "V", "BT", "BT"))
    return made[:4], made[4:]


def _cut(x_BT, parts: int):
    """Tokens of every row in so many leading parts, the last filled up with zeros."""
    B, T, *rest = x_BT.shape
    x_BT = jnp.pad(x_BT, [(0, 0), (0, -T % parts)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(x_BT.reshape(B, parts, -1, *rest), 1, 0)


def _joined(parts, T: int):
    """The first T tokens of rows that come in leading parts."""
    n, B, size, *rest = parts.shape
    return jnp.moveaxis(parts, 0, 1).reshape(B, n * size, *rest)[:, :T]


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _pair_scores(model, x_BTD, batch):
    """Next-sentence cross-entropy and accuracy of each row, read off its first token."""
    _, logits_BTC = model.pooler(x_BTD)
    targets_B = parallel.constrain(batch["pair_targets"], "BS")[:, 0]
    logp_BC = jax.nn.log_softmax(logits_BTC[:, 0].astype(jnp.float32))
    hit_BC = jnp.arange(2) == targets_B[:, None]
    return -jnp.where(hit_BC, logp_BC, 0).sum(-1), logp_BC.argmax(-1) == targets_B
