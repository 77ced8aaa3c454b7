from ._attention import attention as attention
from ._causal_conv import causal_conv as causal_conv
from ._experts import experts as experts
from ._implementations import Implementation as Implementation
from ._implementations import check_implementation as check_implementation
from ._implementations import implementations as implementations
from ._linear_recurrence import linear_recurrence as linear_recurrence
from ._selective_scan import selective_scan as selective_scan
