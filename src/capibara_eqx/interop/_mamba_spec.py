from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from jaxtyping import DTypeLike, PRNGKeyArray

from ..layers import GatedRMSNorm, Mamba, RMSNorm
from ..models import ResidualBlock
from ._conv_problems import conv_problems
from ._structure import BlockSpec


@dataclass(frozen=True)
class MambaSpec(BlockSpec):
    """A residual block of Mamba, by the names of its arguments; see `BlockSpec`."""

    d_state: int
    d_conv: int
    expand: int
    dt_rank: int
    bias: bool
    conv_bias: bool
    activation: str

    kind: ClassVar[str] = "ResidualBlock of Mamba"

    @classmethod
    def problems(cls, block: Any) -> list[str]:
        """See `BlockSpec`."""
        return conv_problems(block.mixer.conv)

    @classmethod
    def of(cls, block: Any) -> "MambaSpec":
        """See `BlockSpec`."""
        mixer = block.mixer
        return cls(
            d_state=mixer.d_state,
            d_conv=mixer.conv.kernel_size,
            expand=mixer.d_inner // mixer.d_model,
            dt_rank=mixer.dt_rank,
            bias=mixer.in_proj.bias is not None,
            conv_bias=mixer.conv.bias is not None,
            activation=mixer.conv.activation,
        )

    @staticmethod
    def norms(block: Any) -> list[RMSNorm | GatedRMSNorm]:
        """See `BlockSpec`."""
        return [block.norm]

    def build(
        self,
        d_model: int,
        eps: float,
        *,
        implementation: str | None,
        dtype: DTypeLike | None,
        key: PRNGKeyArray,
    ) -> ResidualBlock:
        """See `BlockSpec`."""
        mixer = Mamba(
            d_model,
            **asdict(self),
            implementation=implementation,
            dtype=dtype,
            key=key,
        )
        return ResidualBlock(mixer, d_model, eps=eps, dtype=dtype)
