from ._load import load_hf as load_hf
from ._save import save_hf as save_hf
