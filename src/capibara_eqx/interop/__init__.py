from ._load import load_hf as load_hf
from ._load_peft import load_peft as load_peft
from ._save import save_hf as save_hf
from ._save_peft import save_peft as save_peft
