import argparse

import jax
import jax.numpy as jnp

from ..internal import check_seed, check_size
from ..models import generate
from ..train import RunFolder, load_model
from ._console import Console
from ._train import decode


def run_generate(arguments: argparse.Namespace) -> int:
    """`capibara generate`."""
    console = Console()
    prompt = list(arguments.prompt.encode())
    if not prompt:
        raise ValueError("`--prompt` must hold at least one character.")
    check_size("--max-new-bytes", arguments.max_new_bytes)
    check_seed("--seed", arguments.seed)
    run, config = RunFolder.open(arguments.run)
    model = load_model(run, config)
    stop = arguments.stop_byte
    out = generate(
        model,
        jnp.asarray(prompt, jnp.int32),
        max_new_tokens=arguments.max_new_bytes,
        temperature=0.0 if arguments.greedy else arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        stop_token=stop,
        key=jax.random.key(arguments.seed),
    )
    new = out.tokens[: int(out.lengths)].tolist()
    if new and new[-1] == stop:
        new.pop()
    console.say(decode(prompt + new))
    return 0
