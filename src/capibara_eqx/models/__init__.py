from ._aux import aux_losses as aux_losses
from ._block import ResidualBlock as ResidualBlock
from ._generate import Generation as Generation
from ._generate import generate as generate
from ._language_model import LanguageModel as LanguageModel
from ._language_model import ModelOutput as ModelOutput
from ._mamba_lm import mamba_language_model as mamba_language_model
from ._stack import Stack as Stack
