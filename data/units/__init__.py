"""Where the units of knowledge masking come from: spans of a text that belong together.

Found on the text, so that they do not depend on how a tokenizer cuts it. A class here is named by `_target_`
in an objective's YAML.
"""

from data.units.chinese import Jieba, JiebaEntities
from data.units.lexicon import Lexicon, PythonNames
from data.units.phrases import MinedPhrases

__all__ = ["Jieba", "JiebaEntities", "Lexicon", "MinedPhrases", "PythonNames"]
