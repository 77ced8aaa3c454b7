from ._library import Unavailable as Unavailable
from ._library import handlers as handlers
