from typing import Any

from ..layers import Conv1DBlock


def conv_problems(conv: Any) -> list[str]:
    """What the convolution of a Mamba layer has that none of its arguments gives."""
    if type(conv) is not Conv1DBlock:
        return [f"the convolution is {type(conv).__name__}, not Conv1DBlock"]
    plain = {"causal": True, "dilation": 1, "norm": None, "residual": False}
    plain |= {"groups": conv.in_channels}
    problems = [
        f"the convolution's `{name}` is {getattr(conv, name)!r}, not {value!r}"
        for name, value in plain.items()
        if getattr(conv, name) != value
    ]
    if conv.activation is None:
        problems.append("the convolution has no `activation`")
    return problems
