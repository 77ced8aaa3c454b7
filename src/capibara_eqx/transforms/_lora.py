from collections.abc import Sequence

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray, PyTree

from ..arrays import AbstractWeight, LoRA, LoRAArray
from ..internal import check_choice
from ..layers import CompressedConv, MoE
from ._places import Place, as_matrix, places, replace
from ._report import Report, report
from ._rules import Rule, choose


# What the maps of attention are called, here and in Equinox.
_MAPS = {
    "q": ("q_proj", "query_proj"),
    "k": ("k_proj", "key_proj"),
    "v": ("v_proj", "value_proj"),
    "o": ("o_proj", "output_proj"),
}


def lora(
    model: PyTree, rules: Sequence[Rule], *, key: PRNGKeyArray
) -> tuple[PyTree, Report]:
    """The model with adapters of low rank on some of its weights.

    They change nothing at first. `trainable_spec` is the filter with which they alone
    learn; `merge` makes plain weights of them. A weight may be compressed, before or
    after, by `quantize`: its codes stay as they are and the adapter learns (Dettmers et
    al., *QLoRA: Efficient Finetuning of Quantized LLMs*, arXiv 2305.14314).

    What can have an adapter is what `quantize` can compress. In a stack of layers or
    experts each matrix has its own. Dropout acts where a layer multiplies by its
    weight, and needs `with_dropout_key`.

    **Arguments:**

    - `model`: any PyTree.
    - `rules`: which weight gets which adapter, a `LoRA` or `None`. The first that
        matches counts. `attention_rules` makes those for attention.
    - `key`: for the initial values.

    **Returns:**

    `(model, report)`: the report lists the form and the bytes of each weight, adapters
    included, and everything that was left alone.

    **Raises:**

    `ValueError` for a rule that matches nothing or that earlier rules leave nothing, a
    rank above that of the weight, a weight that has another adapter already, or dropout
    for convolutions or experts, which do not multiply by a weight: the message names
    it.

    !!! example

        ```python
        rules = [Rule(r".*(q_proj|v_proj)/weight", LoRA(8, alpha=16))]
        model, found = lora(model, rules, key=key)
        learns, rest = eqx.partition(model, trainable_spec(model))
        ```
    """
    found = places(model)
    weights = {place.path: place for place in found if place.is_matrix}
    others = [place.path for place in found if not place.is_matrix]
    chosen = choose("lora", rules, weights, others)
    wanted = {path: rule.spec for path, rule in chosen.items() if rule.spec is not None}
    new = {}
    keys = jax.random.split(key, max(1, len(wanted)))
    for (path, spec), own_key in zip(wanted.items(), keys, strict=False):
        place = weights[path]
        _check(place, spec)
        if place.adapter is not None:
            continue
        node = _adapted(place, spec, own_key)
        if isinstance(place.holder, eqx.nn.Conv | eqx.nn.ConvTranspose):
            new[place.keys[:-1]] = CompressedConv(place.holder, node)
        else:
            new[place.keys] = node
    model = replace(model, new)
    return model, report(model)


def attention_rules(spec: LoRA, targets: Sequence[str] = ("q", "v")) -> list[Rule]:
    """Rules that select maps of attention layers by their names, here and in Equinox.

    Those of `DecoupledAttention`, which has two kinds of queries and keys, have other
    names.

    **Arguments:**

    - `spec`: the adapter.
    - `targets`: some of `"q"`, `"k"`, `"v"` and `"o"`: the maps to queries, keys and
        values, and that of the output.

    **Returns:**

    Rules for `lora`.

    **Raises:**

    `ValueError` for no target, or an unknown one.

    !!! example

        ```python
        model, _ = lora(model, attention_rules(LoRA(8), "qkvo"), key=key)
        ```
    """
    if not targets:
        raise ValueError(
            "`targets` must name a map of attention, such as 'q', got none."
        )
    for target in targets:
        check_choice("targets", target, _MAPS)
    names = "|".join(name for target in targets for name in _MAPS[target])
    return [Rule(rf"(.*/)?({names})/weight", spec)]


def with_dropout_key(model: PyTree, key: PRNGKeyArray) -> PyTree:
    """The model whose adapters drop inputs at random, by a key of their own each.

    Call it inside the loss, with a new key a step. A weight that several rows share
    under `jax.vmap` drops the same inputs in all of them; `vmap` over keys as well
    where they should differ.

    **Arguments:**

    - `model`: any PyTree.
    - `key`: split over all adapters with dropout, and over the matrices of a stack.

    **Returns:**

    The model; without such adapters as it is.

    !!! example

        ```python
        @eqx.filter_grad
        def grads(learns, rest, x, key):
            model = with_dropout_key(eqx.combine(learns, rest), key)
            return jnp.mean(model(x) ** 2)
        ```
    """
    nodes = [
        place
        for place in places(model)
        if place.adapter is not None and place.adapter.spec.dropout > 0
    ]
    keys = jax.random.split(key, max(1, len(nodes)))
    return replace(
        model,
        {
            place.keys[:-1]: place.adapter.with_key(own_key)
            for place, own_key in zip(nodes, keys, strict=False)
            if place.adapter is not None
        },
    )


def _adapted(place: Place, spec: LoRA, key: PRNGKeyArray) -> LoRAArray:
    weight = place.value
    if not isinstance(weight, AbstractWeight):
        weight = as_matrix(weight, place)
    try:
        return LoRAArray.of(weight, spec, key=key)
    except ValueError as error:
        raise ValueError(
            f"lora: the weight {place.path!r} cannot have this adapter: {error}"
        ) from error


def _check(place: Place, spec: LoRA) -> None:
    if not isinstance(spec, LoRA):
        raise ValueError(
            f"lora: the `spec` of a Rule must be a LoRA or None, got {spec!r}."
        )
    if place.adapter is not None and place.adapter.spec != spec:
        raise ValueError(
            f"lora: {place.path!r} has an adapter already ({place.adapter.spec}), the "
            f"rule asks for {spec}. `merge` that one first."
        )
    no_product = CompressedConv | MoE | eqx.nn.Conv | eqx.nn.ConvTranspose
    if spec.dropout > 0 and isinstance(place.holder, no_product):
        kind = type(place.holder).__name__
        raise ValueError(
            f"lora: `dropout` cannot act on {place.path!r}: {kind} takes its weight as "
            "an array and does not multiply by it. Give it a rule with dropout=0."
        )
