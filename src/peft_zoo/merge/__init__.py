"""Floor 4 of peft-zoo: weights in, weights out; works on models and on adapter files.

`base` reads and writes adapter files without the model they belong to. A file is taken for something a stranger made:
everything about it is checked before anything of a tensor's size is allocated, and no text in it is ever executed, be
it as a pickle, as a regular expression or as the name of something to import.
"""

from peft_zoo.common.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__, {"peft_zoo.merge.squeeze.api": ["rank_report", "squeeze_adapter", "squeeze_model"]}
)
