from .causal_conv import sharded_causal_conv as sharded_causal_conv
from .linear_recurrence import sharded_linear_recurrence as sharded_linear_recurrence
from .selective_scan import sharded_selective_scan as sharded_selective_scan
from .ssd import sharded_ssd as sharded_ssd
