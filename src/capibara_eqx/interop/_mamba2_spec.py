from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from jaxtyping import DTypeLike, PRNGKeyArray

from ..layers import GatedRMSNorm, Mamba2, RMSNorm
from ..models import ResidualBlock
from ._conv_problems import conv_problems
from ._structure import BlockSpec


@dataclass(frozen=True)
class Mamba2Spec(BlockSpec):
    """A residual block of Mamba-2, by the names of its arguments; see `BlockSpec`."""

    d_state: int
    d_conv: int
    expand: int
    head_dim: int
    n_groups: int
    dt_limit: tuple[float, float]
    norm_before_gate: bool
    bias: bool
    conv_bias: bool
    activation: str

    kind: ClassVar[str] = "ResidualBlock of Mamba2"

    @classmethod
    def problems(cls, block: Any) -> list[str]:
        """See `BlockSpec`."""
        norm, n_groups = block.mixer.norm, block.mixer.n_groups
        problems = conv_problems(block.mixer.conv)
        if type(norm) is not GatedRMSNorm:
            problems.append(f"the mixer's norm is {type(norm).__name__}")
        elif norm.groups != n_groups:
            problems.append(
                f"the mixer's norm has {norm.groups} groups, not {n_groups}"
            )
        return problems

    @classmethod
    def of(cls, block: Any) -> "Mamba2Spec":
        """See `BlockSpec`."""
        mixer = block.mixer
        return cls(
            d_state=mixer.d_state,
            d_conv=mixer.conv.kernel_size,
            expand=mixer.d_inner // mixer.d_model,
            head_dim=mixer.head_dim,
            n_groups=mixer.n_groups,
            dt_limit=mixer.dt_limit,
            norm_before_gate=mixer.norm.norm_before_gate,
            bias=mixer.in_proj.bias is not None,
            conv_bias=mixer.conv.bias is not None,
            activation=mixer.conv.activation,
        )

    @staticmethod
    def norms(block: Any) -> list[RMSNorm | GatedRMSNorm]:
        """See `BlockSpec`."""
        return [block.norm, block.mixer.norm]

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
        mixer = Mamba2(
            d_model,
            **asdict(self),
            norm_eps=eps,
            implementation=implementation,
            dtype=dtype,
            key=key,
        )
        return ResidualBlock(mixer, d_model, eps=eps, dtype=dtype)
