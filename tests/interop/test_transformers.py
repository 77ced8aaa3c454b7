"""Models of transformers read here, and models from here read by transformers."""

import json
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.model_oracle import moved
from support.quick import built

from capibara_eqx.interop import load_hf, save_hf
from capibara_eqx.layers import (
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    YaRNScaling,
)
from capibara_eqx.models import (
    LanguageModel,
    generate,
    mamba2_language_model,
    mamba_language_model,
    transformer_language_model,
)


pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch", reason="needs the extra `peers`")
transformers = pytest.importorskip("transformers", reason="needs the extra `peers`")

VOCAB, BATCH, LENGTH, NEW = 61, 2, 12, 6
# Valid tokens of each row in the padded batch.
LENGTHS = (12, 7)
# Float32, logits of size about 3, sums of up to 64 terms through two layers.
ATOL = 2e-5

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SCALES = {"beta_fast": 16.0, "mscale": 0.8, "mscale_all_dim": 0.5}


def rope(base: float = 100.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": base, **parameters}}


# name: (class, what its config has besides the sizes, scanned here)
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("Llama", rope(), True),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, False),
    "llama-biases": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 6},
        False,
    ),
    "llama-linear": ("Llama", rope(rope_type="linear", factor=3.0), True),
    "llama-llama3": ("Llama", rope(**LLAMA3), True),
    "llama-yarn": ("Llama", rope(**YARN), True),
    "qwen3-yarn-scales": ("Qwen3", {"head_dim": 12} | rope(**YARN, **SCALES), True),
    "mistral": ("Mistral", {"sliding_window": None}, True),
    "mistral-window": ("Mistral", {"sliding_window": 5} | rope(), True),
    "qwen2": ("Qwen2", rope(), True),
    "qwen2-windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        False,
    ),
    "qwen3": ("Qwen3", {"head_dim": 12, "num_attention_heads": 6} | rope(), True),
    "qwen3-windows-biases": (
        "Qwen3",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        False,
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}, True),
    "mixtral-window": (
        "Mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 5},
        False,
    ),
    "mamba": ("Mamba", {}, True),
    "mamba-odd": (
        "Mamba",
        {
            "use_bias": True,
            "use_conv_bias": False,
            "tie_word_embeddings": False,
            "expand": 3,
            "time_step_rank": 5,
            "conv_kernel": 2,
            "hidden_act": "gelu",
            "layer_norm_epsilon": 1e-3,
        },
        False,
    ),
    "mamba2": ("Mamba2", {}, True),
    "mamba2-odd": (
        "Mamba2",
        {
            "use_bias": True,
            "use_conv_bias": False,
            "tie_word_embeddings": True,
            "expand": 3,
            "num_heads": 12,
            "n_groups": 4,
            "conv_kernel": 2,
            "hidden_act": "gelu",
            "layer_norm_epsilon": 1e-3,
            # In transformers of the whole text only.
            "time_step_limit": (0.4, 0.8),
            "chunk_size": 4,
        },
        False,
    ),
}
# With a bias of its first map transformers' convolution sees that bias at padding.
PADDING_IS_SEEN = ("mamba-odd", "mamba2-odd")


# Where a text is generated as well: every architecture, every kind of cache.
GENERATING = (
    "llama",
    "mistral-window",
    "qwen2",
    "qwen3-windows-biases",
    "mixtral",
    "mamba",
    "mamba2",
)

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ATTENTION_SIZES = {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
OWN_SIZES = {
    "Mamba": {"state_size": 5},
    "Mamba2": {"state_size": 5, "num_heads": 8, "head_dim": 8, "n_groups": 2},
}


class Pair(NamedTuple):
    """One model on either side."""

    theirs: Any
    ours: LanguageModel
    padding_is_seen: bool


def their_model(name: str, options: dict[str, Any]) -> Any:
    """A tiny model with random parameters, none of them zero or one."""
    arguments = SIZES | OWN_SIZES.get(name, ATTENTION_SIZES) | options
    config = getattr(transformers, f"{name}Config")(**arguments)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            centre = 1.0 if "norm" in key else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory) -> Pair:
    name, options, scan = CASES[request.param]
    theirs = their_model(name, options)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    seen = request.param in PADDING_IS_SEEN
    return Pair(theirs, load_hf(folder, scan=scan), seen)


def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, (BATCH, LENGTH))


def padding() -> np.ndarray:
    """The mask of a batch that is padded on the left."""
    return np.arange(LENGTH)[None] >= LENGTH - np.array(LENGTHS)[:, None]


def their_logits(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> Any:
    arguments = {}
    if mask is not None:
        # As its `generate` counts positions.
        positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
        arguments["attention_mask"] = torch.tensor(mask.astype(int))
        arguments["position_ids"] = torch.tensor(positions)
    with torch.no_grad():
        return model(torch.tensor(ids), **arguments).logits.numpy()


def assert_equal_logits(ours: Any, theirs: np.ndarray) -> None:
    assert np.max(np.abs(theirs)) > 1  # so that the tolerance means something
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=ATOL, rtol=0)


@eqx.filter_jit
def every_way(model, ids, segment_ids):
    """Logits of the text and of the padded one, of it in chunks, and one by one."""
    fresh = model.init_cache((BATCH,), max_len=LENGTH)

    def read(cache, chunk):
        logits, cache = model.prefill(chunk, cache)
        return cache, logits

    def step(cache, token):
        logits, cache = model.step(token, cache)
        return cache, logits

    _, chunks = jax.lax.scan(read, fresh, ids.reshape(BATCH, 3, -1).swapaxes(0, 1))
    _, steps = jax.lax.scan(step, fresh, ids.T)
    both = jnp.concatenate([jnp.zeros_like(segment_ids), segment_ids])
    whole, padded = jnp.split(model(jnp.tile(ids, (2, 1)), segment_ids=both), 2)
    chunks = jnp.moveaxis(chunks, 0, 1).reshape(whole.shape)
    return {
        "whole": whole,
        "chunks": chunks,
        "steps": jnp.swapaxes(steps, 0, 1),
    }, padded


def test_logits_are_those_of_transformers(pair):
    ids, mask = tokens(), padding()
    expected = their_logits(pair.theirs, ids)
    logits, padded = every_way(
        pair.ours, jnp.asarray(ids, "int32"), jnp.where(mask, 0, -1).astype("int32")
    )
    for found in logits.values():
        assert_equal_logits(found, expected)
    if pair.padding_is_seen:
        return
    expected = their_logits(pair.theirs, ids, mask)
    assert_equal_logits(np.asarray(padded)[mask], expected[mask])


@pytest.mark.parametrize("pair", GENERATING, indirect=True)
def test_greedy_text_is_that_of_transformers(pair):
    ids, mask = tokens(), padding()
    with torch.no_grad():
        expected = pair.theirs.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask.astype(int)),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        ).numpy()[:, LENGTH:]
    out = generate(
        pair.ours,
        jnp.asarray(ids, "int32"),
        segment_ids=jnp.where(mask, 0, -1).astype("int32"),
        max_new_tokens=NEW,
        temperature=0,
    )
    np.testing.assert_array_equal(np.asarray(out.tokens), expected)


def test_what_is_written_here_is_the_same_model_there(pair, tmp_path):
    save_hf(pair.ours, tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    before, after = pair.theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    ids = tokens()
    expected = their_logits(pair.theirs, ids)
    assert_equal_logits(their_logits(again.eval(), ids), expected)


OWN: list[dict[str, Any]] = [
    {"rope_scaling": NTKScaling(4.0), "rope_base": 100.0},
    {"rope_scaling": YaRNScaling(4.0, 40, 20.0, 2.0, 1.25), "qk_norm": True},
    {"rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 32), "window": 5, "scan": True},
    {"n_heads": 6, "head_dim": 4, "rope_scaling": LinearScaling(2.0)},
    {"use_bias": True, "use_out_bias": False, "head_dim": 12, "window": 5},
]


@pytest.mark.parametrize("options", OWN, ids=str)
def test_transformers_that_were_made_here(options, tmp_path):
    arguments: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 2} | options
    key = jax.random.key(0)
    ours = transformer_language_model(VOCAB, 32, 2, **arguments, key=key)
    ours = moved(ours, 1)
    save_hf(ours, tmp_path, config={"max_position_embeddings": 4096})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    logits = eqx.filter_jit(ours)(jnp.asarray(tokens(), "int32"))
    assert_equal_logits(logits, their_logits(theirs.eval(), tokens()))


MAMBAS: list[tuple[Any, dict[str, Any]]] = [
    (mamba_language_model, {"dt_rank": 3, "expand": 1}),
    (mamba2_language_model, {"head_dim": 4, "n_groups": 4, "dt_limit": (0.1, 2.0)}),
]


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(("make", "options"), MAMBAS, ids=["1", "2"])
def test_mambas_that_were_made_here(make, options, scan, tmp_path):
    options = {"d_state": 5, "scan": scan} | options
    ours = moved(built(make, VOCAB, 32, 3, key=jax.random.key(0), **options), 1)
    save_hf(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    logits = eqx.filter_jit(ours)(jnp.asarray(tokens(), "int32"))
    assert_equal_logits(logits, their_logits(theirs.eval(), tokens()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shards_and_narrow_dtypes_of_transformers(dtype, tmp_path):
    theirs = their_model("Mixtral", {"num_local_experts": 3})
    theirs = theirs.to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = load_hf(tmp_path)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(eqx.filter(ours, eqx.is_array))}
    assert dtypes == {jnp.dtype(dtype)}
    save_hf(ours, tmp_path / "again", max_shard_size="20KB")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.dtype == getattr(torch, dtype)
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # What transformers computes in float32 with the rounded parameters.
    wide = load_hf(tmp_path, dtype=jnp.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="float32"
    )
    expected = their_logits(theirs.eval(), tokens())
    assert_equal_logits(eqx.filter_jit(wide)(jnp.asarray(tokens(), "int32")), expected)


def test_names_of_older_files(tmp_path):
    """`rope_theta` and `rope_scaling` as transformers 4 wrote them."""
    theirs = their_model("Llama", rope(**LLAMA3))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    logits = eqx.filter_jit(load_hf(tmp_path))(jnp.asarray(tokens(), "int32"))
    assert_equal_logits(logits, their_logits(theirs, tokens()))
