"""Floor 4 of peft-zoo: compresses, converts and quantizes adapters and checkpoints, in files or in models.

Files are untrusted: they are validated before any allocation, and nothing in them is executed, neither as a pickle nor
as a regular expression nor as an import.
"""

from peft_zoo.common.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "peft_zoo.merge.export.api": ["export_lora"],
        "peft_zoo.merge.base.exportable": ["exportable"],
        "peft_zoo.merge.export.report": ["ExportReport", "ExportedModule"],
        "peft_zoo.merge.export.vllm": ["check_vllm"],
        "peft_zoo.merge.extract.api": ["extract_lora"],
        "peft_zoo.merge.extract.report": ["ExtractReport", "ExtractedModule"],
        "peft_zoo.merge.checkpoint.api": ["merge_checkpoint"],
        "peft_zoo.merge.checkpoint.report": ["MergeReport", "TensorReport"],
        "peft_zoo.merge.combining.api": ["combine"],
        "peft_zoo.merge.combining.checkpoints": ["CheckpointReport", "combine_checkpoints"],
        "peft_zoo.merge.combining.report": ["CombineReport", "CombinedModule"],
        "peft_zoo.merge.combining.similarity": ["Similarity", "SimilarityReport", "analyze"],
        "peft_zoo.merge.formats.api": ["convert"],
        "peft_zoo.merge.formats.report": ["ConvertReport"],
        "peft_zoo.merge.squeeze.api": ["rank_report", "squeeze_adapter", "squeeze_model"],
        "peft_zoo.merge.squeeze.html": ["squeeze_html"],
        "peft_zoo.merge.squeeze.report": ["ModuleReport", "RankReport", "SqueezeReport"],
    },
)
