from .api import causal_conv as causal_conv
