"""Floor 2 of peft-zoo: statistics of a model's inputs, outputs and gradients, collected with hooks."""

from peft_zoo.common.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "peft_zoo.calibration.moments": [
            "Moments",
            "calibrate",
            "collect_moments",
            "load_moments",
            "merge_moments",
            "save_moments",
        ]
    },
)
