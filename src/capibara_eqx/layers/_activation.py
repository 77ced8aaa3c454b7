from ..internal import activate as activate
from ..internal import check_activation as check_activation
