from .api import attention as attention
