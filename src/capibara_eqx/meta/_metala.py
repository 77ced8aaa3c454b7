import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from ..internal import (
    check_choice,
    check_positive,
    check_probability,
    check_segment_ids,
    check_sequence,
    check_size,
    split_or_none,
)
from ..layers import Linear, RMSNorm
from ..transforms import trainable_spec
from ._adapt import adapt
from ._fast_head import Targets, check_examples, check_targets, fit_loss, ridge_fit
from ._few_shot_net import (
    AdaptedParams,
    AttentionEncoder,
    FewShotNet,
    arrays_like,
    check_like,
)
from ._inner_loop import check_steps
from ._sgd import sgd


METHODS = ("maml", "anil", "ridge")


class MetaLA(eqx.Module):
    r"""Meta-Learning Attention: an attention encoder and a head that learns in a call.

    $$z = \mathrm{norm}(\mathrm{encoder}(x)) / \sqrt{d_{model}}, \qquad
    \hat y = W z + b, \qquad
    \phi_S = \mathrm{adapt}(\phi, S)$$

    $\phi$, the `meta_weights`, are the start of what adapts to a support set $S$, and
    are themselves learned by derivatives through the adaptation:

    - `method="maml"`: encoder and head, by `adaptation_steps` steps of gradient descent
        at `inner_rate`. Finn et al., arXiv 1703.03400.
    - `method="anil"`: the head alone, by such steps. Raghu et al., arXiv 1909.09157.
    - `method="ridge"`: the head alone, in closed form, $\arg\min_{W, b} |Z W^T + b -
        Y|^2 + \lambda |(W, b) - (W_0, b_0)|^2$. Bertinetto et al., arXiv 1805.08136,
        with the learned start in the place of zero.

    Descent is on half of the squared error, summed over the outputs and averaged over
    examples and steps, or on the cross-entropy of labels; labels go to ridge regression
    as rows of the identity. The features have unit length, so that steps of the head
    cannot diverge at a rate below 1, whatever the width.

    The encoder is a pre-norm block of attention and a feed-forward layer. An example is
    there as a whole when it is learned from, so every step sees all others, in both
    directions; positions are rotary.

    It is not Meta Linear Attention (arXiv 2411.10741), which is called MetaLA too: that
    is `layers.MetaLinearAttention`.

    !!! example

        ```python
        layer = MetaLA(64, 8, 10, dropout_rate=0.0, key=jax.random.key(0))
        support_y = jnp.ones((2, 5, 10))               # a target a step
        y = layer.fast_adapt(x, support_y, x)          # (2, 5, 10)
        y = layer.fast_adapt(x, jnp.array([3, 7]), x)  # (2, 10): logits of labels

        def task_loss(layer, task, *, key=None):       # for `make_meta_step`
            y = layer.fast_adapt(*task.support, task.query[0], key=key)
            return jnp.mean((y - task.query[1]) ** 2)
        ```
    """

    net: FewShotNet
    inner_rate: Float[Array, ""] | None
    log_lambda: Float[Array, ""] | None
    log_scale: Float[Array, ""] | None
    d_model: int = eqx.field(static=True)
    d_out: int = eqx.field(static=True)
    adaptation_steps: int = eqx.field(static=True)
    method: str = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_out: int,
        dropout_rate: float = 0.1,
        adaptation_steps: int = 5,
        inner_rate: float = 0.5,
        method: str = "maml",
        dtype: DTypeLike | None = None,
        *,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: width of input and encoding.
        - `n_heads`: heads of the attention; `d_model / n_heads` must be even.
        - `d_out`: number of targets of a step, or of classes.
        - `dropout_rate`: probability of dropping an element of what the two parts of
            the encoder add.
        - `adaptation_steps`: of gradient descent, 0 or more; 0 leaves `meta_weights`
            as they are. Ridge regression has none.
        - `inner_rate`: of these steps, at first. It is a parameter, learned by outer
            gradients of the layer, and kept as it is: they may make it negative. Ridge
            regression has $\log \lambda$, at first that of 0.1, and the logarithm of a
            scale of logits, at first 0, instead.
        - `method`: `"maml"`, `"anil"` or `"ridge"`.
        - `dtype`: of the parameters; float32 if not given.
        - `key`: for the initial values.

        **Raises:**

        `ValueError` for sizes that are not positive or cannot be divided, a
        `dropout_rate` outside [0, 1], negative `adaptation_steps`, an `inner_rate` that
        is not positive, or an unknown `method`.
        """
        check_size("d_out", d_out)
        check_probability("dropout_rate", dropout_rate)
        check_choice("method", method, METHODS)
        check_positive("inner_rate", inner_rate)
        check_steps("MetaLA", "adaptation_steps", adaptation_steps)
        encoder_key, head_key = jax.random.split(key)
        self.net = FewShotNet(
            AttentionEncoder(d_model, n_heads, dropout_rate, dtype, key=encoder_key),
            RMSNorm(d_model, dtype=dtype),
            Linear(d_model, d_out, dtype=dtype, key=head_key),
        )
        ridge = method == "ridge"
        dtype = jnp.float32 if dtype is None else dtype
        self.inner_rate = None if ridge else jnp.asarray(inner_rate, dtype)
        self.log_lambda = jnp.asarray(math.log(0.1), dtype) if ridge else None
        self.log_scale = jnp.zeros((), dtype) if ridge else None
        self.d_model = d_model
        self.d_out = d_out
        self.adaptation_steps = adaptation_steps
        self.method = method

    @jax.named_scope("capibara_eqx.meta.MetaLA")
    def __call__(
        self,
        x: Float[Array, "*batch seq d_model"],
        *,
        segment_ids: Int[Array, "*batch seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch seq d_model"]:
        """The encoding of sequences, without adaptation.

        **Arguments:**

        - `x`: `(*batch, seq, d_model)`.
        - `segment_ids`: document of each token, `(*batch, seq)`; negative is padding.
        - `key`: for dropout.

        **Returns:**

        `(*batch, seq, d_model)`, in the dtype of `x`; zero at padding.

        **Raises:**

        `ValueError` for an input that does not fit, or active dropout without a key.
        """
        check_sequence("MetaLA", "x", x, self.d_model)
        check_segment_ids("MetaLA", segment_ids, x.shape[:-1])
        return self.net.encoder(x, segment_ids=segment_ids, key=key)

    @property
    def meta_weights(self) -> FewShotNet:
        """The start of what adapts: arrays, and `None` for what does not.

        A PyTree for `jax.grad` and optax: of encoder and head with `method="maml"`,
        else of the head. Of either it is what `transforms.trainable_spec` chooses: all
        floating point arrays, but adapters alone if there are any, and no steps of
        weights that are kept as codes.
        """
        return eqx.filter(self.net, self._adapts())

    def with_meta_weights(self, meta_weights: FewShotNet) -> "MetaLA":
        """The layer with another start, such as one that was learned.

        **Arguments:**

        - `meta_weights`: like the property of this name.

        **Raises:**

        `ValueError` for arrays of other names or shapes.
        """
        net = self._net("meta_weights", meta_weights)
        return eqx.tree_at(lambda layer: layer.net, self, net)

    @jax.named_scope("capibara_eqx.meta.MetaLA.adapt_parameters")
    def adapt_parameters(
        self,
        meta_weights: FewShotNet,
        support_x: Float[Array, "n seq d_model"],
        support_y: Targets,
        *,
        key: PRNGKeyArray | None = None,
    ) -> AdaptedParams:
        """What `meta_weights` become on a support set; a pure function of them.

        **Arguments:**

        - `meta_weights`: like the property of this name; outer gradients reach them.
        - `support_x`: `(n, seq, d_model)`, the examples of one task; `jax.vmap` is for
            several.
        - `support_y`: floating point targets, `(n, seq, d_out)`, one a step, or
            `(n, d_out)`, one an example; or labels in [0, d_out), `(n, seq)` or `(n,)`.
            Of what is one an example the features are the mean over the sequence.
        - `key`: for dropout.

        **Returns:**

        For `apply_adapted_params`.

        **Raises:**

        `ValueError` for arguments that do not fit or an empty support set, or active
        dropout without a key. At run time for a label out of range, for a loss that is
        not finite, naming the step, and what `ridge_head` raises.
        """
        net = self._net("meta_weights", meta_weights)
        check_examples("support_x", support_x, self.d_model)
        targets, pooled = check_targets(support_x, support_y, self.d_out)
        if self.method == "maml":
            net = self._descend(net, support_x, targets, pooled, key)
        else:
            z = net.features(support_x, pooled=pooled, key=key)
            head = self._fit_head(net.head, z, targets)
            net = eqx.tree_at(lambda net: net.head, net, head)
        return AdaptedParams(arrays_like(net, meta_weights), pooled)

    @jax.named_scope("capibara_eqx.meta.MetaLA.apply_adapted_params")
    def apply_adapted_params(
        self,
        query_x: Float[Array, "n seq d_model"],
        params: AdaptedParams,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "n *seq d_out"]:
        """Predictions of adapted parameters; a pure function of them.

        **Arguments:**

        - `query_x`: `(n, seq, d_model)`.
        - `params`: what `adapt_parameters` returned.
        - `key`: for dropout.

        **Returns:**

        `(n, seq, d_out)`, or `(n, d_out)` if the support set had one target an example;
        logits if it had labels. In the dtype of `query_x`.

        **Raises:**

        `ValueError` for arguments that do not fit, or active dropout without a key.
        """
        if not isinstance(params, AdaptedParams):
            raise ValueError(
                "MetaLA: `params` must be what `adapt_parameters` returns, got "
                f"{type(params).__name__}. To predict without adapting build the layer "
                "with `adaptation_steps=0`."
            )
        check_examples("query_x", query_x, self.d_model)
        net = self._net("params", params.weights)
        return net(query_x, pooled=params.pooled, key=key).astype(query_x.dtype)

    def fast_adapt(
        self,
        support_x: Float[Array, "n seq d_model"],
        support_y: Targets,
        query_x: Float[Array, "m query_seq d_model"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "m *query_seq d_out"]:
        """Predictions after adapting `meta_weights` to a support set.

        **Arguments:**

        As of `adapt_parameters` and `apply_adapted_params`.

        **Returns:**

        As `apply_adapted_params`.

        **Raises:**

        As both.
        """
        adapt_key, query_key = split_or_none(key, 2)
        params = self.adapt_parameters(
            self.meta_weights, support_x, support_y, key=adapt_key
        )
        return self.apply_adapted_params(query_x, params, key=query_key)

    def _descend(self, net, x, targets, pooled, key):
        """Steps of encoder and head together."""

        def loss(net, batch, *, key=None):
            x, targets = batch
            return fit_loss(net(x, pooled=pooled, key=key), targets)

        where = self._adapts()
        return adapt(loss, net, (x, targets), key=key, where=where, **self._how())

    def _fit_head(self, head: Linear, z: Array, targets: Targets) -> Linear:
        if self.log_lambda is not None and self.log_scale is not None:
            return ridge_fit(head, z, targets, self.log_lambda, self.log_scale)

        def loss(head, batch):
            z, targets = batch
            return fit_loss(head(z), targets)

        where = self._adapts().head
        return adapt(loss, head, (z, targets), where=where, **self._how())

    def _adapts(self):
        """True for the arrays that do."""
        net = self.net
        mask = jax.tree.map(lambda _: False, net)
        mask = eqx.tree_at(lambda net: net.head, mask, trainable_spec(net.head))
        if self.method != "maml":
            return mask
        # Together, so that adapters of the encoder leave its norm alone.
        rest = trainable_spec((net.encoder, net.norm))
        return eqx.tree_at(lambda net: (net.encoder, net.norm), mask, rest)

    def _how(self):
        return {"optimizer": sgd(self.inner_rate), "steps": self.adaptation_steps}

    def _net(self, argument: str, weights: FewShotNet) -> FewShotNet:
        """All of the network, with `weights` where it adapts."""
        check_like(argument, weights, self.meta_weights, self.method)
        return eqx.combine(weights, self.net)
