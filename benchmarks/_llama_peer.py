"""transformers' Llama on PyTorch, with the weights that it is given."""

from typing import Any

import numpy as np

from ._environment import cores
from ._harness import Prepared
from ._peers import peer_module, torch_module


Array = np.ndarray


def generate(
    weights: dict[str, Array],
    sizes: dict[str, int],
    prompt: Array,
    count: int,
    *,
    cache: str | None = None,
    threads: int | None = None,
) -> Prepared:
    """The best token, `count` times, by the model's own `generate`.

    **Arguments:**

    - `weights`: by their names in a checkpoint.
    - `sizes`: as `transformer_language_model` names them.
    - `prompt`: ids, `(batch, length)`.
    - `count`: number of tokens.
    - `cache`: kind of cache; the default of `generate` if not given.
    - `threads`: that PyTorch uses; one a core if not given.

    **Raises:**

    `Absent` if torch or transformers is not installed.
    """
    torch = torch_module()
    transformers = peer_module("transformers")
    model = _model(torch, transformers, weights, sizes)
    settings = transformers.GenerationConfig(
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation=cache,
    )
    tokens = torch.from_numpy(prompt)
    seen = torch.ones_like(tokens)

    def run():
        # Of the process, and others in it want theirs.
        torch.set_num_threads(cores() if threads is None else threads)
        return model.generate(tokens, attention_mask=seen, generation_config=settings)

    return Prepared(run, outputs=lambda y: y[:, prompt.shape[1] :].numpy())


def _model(torch: Any, transformers: Any, weights, sizes: dict[str, int]) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["d_model"],
        intermediate_size=sizes["d_ff"],
        num_hidden_layers=sizes["n_layers"],
        num_attention_heads=sizes["n_heads"],
        num_key_value_heads=sizes["n_kv_heads"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    state = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
    model.load_state_dict(state)
    return model
