from .api import experts as experts
