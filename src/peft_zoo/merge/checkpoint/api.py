"""Merges adapters into a checkpoint on disk, one module at a time.

The result is what loading the base with the adapters, merging in memory and saving gives, without the memory: each
module's update is added to its weight in float32 and rounded once, and everything else is copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_zoo.common.atomic import check_new_folder
from peft_zoo.common.checks import check, make_options
from peft_zoo.common.progress import Progress, silent
from peft_zoo.io.checkpoint import CONFIG
from peft_zoo.merge.checkpoint.in_memory import merge_in_memory
from peft_zoo.merge.checkpoint.one_folder import merge_folder
from peft_zoo.merge.checkpoint.options import Adapters, MergeOptions, weighted_adapters
from peft_zoo.merge.checkpoint.pipeline import PIPELINE, merge_pipeline
from peft_zoo.merge.checkpoint.report import MergeReport


def merge_checkpoint(
    base: str | Path,
    adapter: Adapters,
    out: str | Path,
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> MergeReport:
    """Merges one or more saved adapters into a model of transformers or diffusers on disk without loading it.

    Args:
        base: Folder with `config.json` and safetensors files, sharded or not, or of a pipeline of diffusers with
            `model_index.json`.
        adapter: Folder of an adapter of any type that peft or peft-zoo can merge, a list of folders, or a mapping from
            folder to weight. For a pipeline also a folder of adapters in folders named by component, such as `unet`
            and `text_encoder`; an adapter without one belongs to the only component that has its modules.
        out: Folder to create. It appears complete or not at all; after a kill the same call goes on. That of a pipeline
            starts anew, and has the files of the other components as hard links where the file system has them.
        weights: Factor of the update of each adapter, in their order or by name; default 1.
        dry_run: Whether to check everything and write nothing.
        progress: Wraps the loop over the files of the result, such as a progress bar; None shows nothing.
        **options: Fields of `MergeOptions`:

            * `dtype`: `"keep"` (default), `"float32"`, `"bfloat16"` or `"float16"`, of all floating-point tensors.
            * `rounding`: `"nearest"` (default) or `"stochastic"`, with `seed`: updates below the precision of 16 bits
              survive on average.
            * `tied`: `"auto"` (default) unties embeddings that differ after the merge, `"share"` changes both as peft
              does in memory, `"refuse"` raises.
            * `vocab`: `"auto"` (default) keeps rows of the base beyond the adapter's tokens, `"adapter"` cuts them.
            * `quantized`: what to do if adapted tensors of the base are quantized: `"refuse"` (default),
              `"dequantize"` or `"requantize"`.
            * `arithmetic`: `"exact"` (default), in float32 with one rounding, or `"peft"`, in the dtype of the base
              with the bits of peft's own merge.
            * `max_shard_bytes`: size of the files of the result; None (default) keeps those of the base.
            * `readers`: number of modules that are computed at a time, default 2.
            * `resume`: whether to use the finished files of an earlier call, default True.
            * `in_memory`: whether to load the whole base and merge by the adapter's own method, default False: for one
              adapter of a type whose layers are made from the base weights.
            * `trust_patterns`: whether expressions in configurations may be run, default False.

    Returns:
        What became of each tensor; written as `merge_report.json` too. For a pipeline the names start with the
        component.

    Raises:
        ValueError: If an input is invalid or does not fit, the disk has not enough space, or `<out>.partial` belongs to
            another call; there is no `out` then.
        NotImplementedError: If an adapter's type cannot be merged from files.

    Examples:
        >>> import tempfile
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from peft_zoo.merge import merge_checkpoint
        >>> base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base.save_pretrained(f"{folder}/base")
        ...     config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        ...     get_peft_model(base, config).save_pretrained(f"{folder}/adapter")
        ...     report = merge_checkpoint(f"{folder}/base", f"{folder}/adapter", f"{folder}/merged")
        ...     merged = GPT2LMHeadModel.from_pretrained(f"{folder}/merged")
        >>> [tensor.key for tensor in report.tensors], report.copied
        (['transformer.h.0.attn.c_attn.weight'], 15)
    """
    chosen = make_options(MergeOptions, **options)
    given = weighted_adapters(adapter, weights)
    base, out = Path(base), Path(out)
    check_new_folder(out, "out")
    is_pipeline = (base / PIPELINE).is_file() and not (base / CONFIG).is_file()
    check(not (is_pipeline and chosen.in_memory), "in_memory", True, "merge into the folder of one component instead")
    merge = merge_pipeline if is_pipeline else merge_in_memory if chosen.in_memory else merge_folder
    return merge(base, given, out, chosen, progress or silent, dry_run)
