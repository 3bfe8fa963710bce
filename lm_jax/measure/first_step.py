"""A process that trains one step of a config and says when it was where: `python -m lm_jax.measure.first_step FILE`.

It imports what `train` imports and does what `train` does, so that its times are a user's; `starts` runs it twice, with
an empty cache of compiled programs and with a full one. FILE is a config whose data are prepared.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax

from lm_jax import config, hosts, log, parallel
from lm_jax.clock import age
from lm_jax.measure import subject
from lm_jax.recipes import report, run  # noqa: F401  what train imports too


def timed(file: str) -> dict:
    """Seconds since the process began at the end of each part, and bytes of this host's memory before and after."""
    at = {"import": age()}
    c = config.from_dict(json.loads(Path(file).read_text()))
    hosts.start(None, None, None)
    parallel.use(c.mesh)
    bare = log.peak_memory()["host_memory_peak"]
    with tempfile.TemporaryDirectory() as place, subject.opened_in(c, Path(place)) as it:
        jax.block_until_ready(it.trainer.state)
        at["build"] = age()
        batch = hosts.put_batch(it.pretraining.loader.batch(0), c.train.batch)
        key = jax.random.key(0)
        step = it.trainer.step.lower(it.trainer.state, batch, key).compile()
        at["compile"] = age()
        it.trainer.step = step
        with it.recipe.batches(0) as batches:
            it.trainer.send(batches, subject.unwatched(it))
            it.trainer.meter.flush()
            at["first step"] = age()
            it.trainer.send(batches, subject.unwatched(it))
            it.trainer.meter.flush()
    return {"seconds": at, "bare": bare, "peak": log.peak_memory()["host_memory_peak"]}


if __name__ == "__main__":
    print(json.dumps(timed(sys.argv[1])))
