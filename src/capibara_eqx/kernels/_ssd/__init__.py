from .api import ssd as ssd
