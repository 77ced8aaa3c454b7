from ._corpus import Corpus as Corpus
from ._corpus import read_stdlib_corpus as read_stdlib_corpus
from ._corpus import read_text_corpus as read_text_corpus
from ._dataset import ByteDataset as ByteDataset
from ._references import reference_bits_per_byte as reference_bits_per_byte
