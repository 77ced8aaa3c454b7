from .api import selective_scan as selective_scan
