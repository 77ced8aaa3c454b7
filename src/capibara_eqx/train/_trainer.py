import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..models import LanguageModel, mamba_language_model
from ..transforms import check
from ._compression import compress_like
from ._config import RunConfig
from ._corpus import Corpus
from ._dataset import ByteDataset
from ._optimizer import learning_rate_at, make_optimizer, set_learning_rate
from ._run import RunFolder
from ._step import TrainState, init_train_state, make_train_step


VOCABULARY = 256


def build_model(config: RunConfig) -> LanguageModel:
    """The model that `config` describes, with the initial values of its seed."""
    return mamba_language_model(
        VOCABULARY,
        config.d_model,
        config.n_layers,
        dropout=config.dropout,
        scan=config.scan,
        remat=config.remat,
        tie_embeddings=config.tie_embeddings,
        key=jax.random.key(config.seed),
        d_state=config.d_state,
        d_conv=config.d_conv,
        expand=config.expand,
        dt_rank=config.dt_rank,
        dt_min=config.dt_min,
        dt_max=config.dt_max,
        dt_init=config.dt_init,
        dt_scale=config.dt_scale,
        dt_init_floor=config.dt_init_floor,
        bias=config.bias,
        conv_bias=config.conv_bias,
        activation=config.activation,
        implementation=config.implementation,
    )


class Trainer:
    """A run without its clock and its folder: states in, states out.

    A step is a function of the state, of its number and of the run's progress, so that
    a run continued from a saved state is the run that was never stopped.
    """

    def __init__(self, config: RunConfig, corpus: Corpus):
        """**Arguments:**

        - `config`: the settings.
        - `corpus`: what to train on.

        **Raises:**

        `ValueError` if the text is too short for one batch.
        """
        self.config = config
        self.dataset = ByteDataset(
            corpus.train, config.seq_len, config.batch_size, config.seed
        )
        self.optimizer = make_optimizer(
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
        )
        half = config.compute_dtype == "bfloat16"
        self._step = make_train_step(
            self.optimizer,
            accumulation=config.accumulation,
            compute_dtype=jnp.bfloat16 if half else None,
        )

    @property
    def tokens_per_step(self) -> int:
        """Bytes that one step predicts."""
        return self.config.batch_size * self.config.seq_len

    def init_state(self) -> TrainState:
        """The state before the first step."""
        return init_train_state(build_model(self.config), self.optimizer)

    def learning_rate(self, progress: float) -> float:
        """The rate at a share of the run, 0 to 1."""
        return learning_rate_at(
            progress,
            peak=self.config.learning_rate,
            warmup_fraction=self.config.warmup_fraction,
            final_fraction=self.config.final_fraction,
        )

    def step(
        self, state: TrainState, number: int, progress: float
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """Step `number`, counted from 0; the buffers of `state` are reused."""
        key = None
        if self.config.dropout > 0:
            # Another stream than the initial values, which fold nothing in.
            key = jax.random.fold_in(jax.random.key(self.config.seed), number)
        rate = self.learning_rate(progress)
        opt_state = set_learning_rate(state.opt_state, rate)
        state = eqx.tree_at(lambda s: s.opt_state, state, opt_state)
        return self._step(state, self.dataset.batch(number), key)


def load_model(run: RunFolder, config: RunConfig) -> LanguageModel:
    """The model of a run, from its newest checkpoint; of a compressed run too.

    The folder is only read, so that the run may be in training meanwhile.

    **Raises:**

    `CheckpointError` if there is no checkpoint, `ValueError` if it is not said in the
    folder how a compressed one is kept, or if what it keeps cannot be.
    """
    if run.compression_path.exists():
        template = compress_like(run, build_model(config))
        with run.checkpoints(read_only=True) as checkpoints:
            return check(checkpoints.restore(template)[0])
    # The optimiser's state is read with it: the checkpoint is one PyTree.
    optimizer = make_optimizer(clip_norm=config.clip_norm)
    with run.checkpoints(read_only=True) as checkpoints:
        state, _ = checkpoints.restore(init_train_state(build_model(config), optimizer))
    return state.model
