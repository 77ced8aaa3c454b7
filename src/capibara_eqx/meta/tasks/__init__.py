from ._class_pool import ClassPool as ClassPool
from ._digits import digits as digits
from ._episodes import sample_episodes as sample_episodes
from ._linear_regressions import sample_linear_regressions as sample_linear_regressions
from ._omniglot import omniglot as omniglot
from ._sinusoids import sample_sinusoids as sample_sinusoids
from ._splits import split_classes as split_classes
from ._splits import split_examples as split_examples
