r"""Quantizes a checkpoint from its files, one weight at a time, into a standalone model.

    quantize_checkpoint("Llama-3-8B", "Llama-3-8B-2.75bit", LqLoraConfig(budget_bits=2.75, target_modules="all-linear"))

Memory holds one tensor and some float32 copies of it. Finished weights are stored in `<out_dir>.partial`; after a kill
the same call resumes there. The result equals that of `get_peft_model` and `standalone`, Q to the bit, and
`get_peft_model` with an `LqLoraConfig` trains it.

Source: LQ-LoRA (arXiv 2311.12023), algorithm 1 and eq. 7.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

import peft_zoo
from peft_zoo.adapters.lq_lora.config import LqLoraConfig, nf_config
from peft_zoo.adapters.lq_lora.decompose import decompose, rank_of
from peft_zoo.adapters.lq_lora.importance import Importance
from peft_zoo.adapters.lq_lora.nf_linear import NFLinear, weight_matrix
from peft_zoo.adapters.lq_lora.plan import assign_by_budget, assign_uniform, error_table, refuse_budget
from peft_zoo.adapters.lq_lora.standalone import GUARD, NFkConfig, complete_card, guard
from peft_zoo.adapters.lq_lora.targets import check_values, target_layers, with_default_targets
from peft_zoo.adapters.lq_lora.ties import tying_configs
from peft_zoo.calibration.fisher import ImportanceWeights
from peft_zoo.common.atomic import check_new_folder, new_file, new_folder
from peft_zoo.common.lock import only_process
from peft_zoo.common.progress import Progress, silent
from peft_zoo.io import TensorFile, TensorInfo, TensorWriter, read_json
from peft_zoo.io.checkpoint import CONFIG, Checkpoint, write_shards
from peft_zoo.kernels.normal_float.quantize import packed_bits
from peft_zoo.kernels.planning.bits import BitChoice, MatrixErrors
from peft_zoo.merge.base.empty_model import empty_model, finite_pieces
from peft_zoo.merge.base.placement import Placements
from peft_zoo.merge.lq_lora.matrix import QuantizedMatrix
from peft_zoo.merge.lq_lora.untie import path_in_config, untied
from peft_zoo.merge.lq_lora.verify import verify_folder

STATE, LOCK = "state.json", "lock"
_log = logging.getLogger(__name__)


def quantize_checkpoint(
    folder: str | Path,
    out_dir: str | Path,
    config: LqLoraConfig,
    *,
    importance: Importance | None = None,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
    verify: bool = True,
) -> list[QuantizedMatrix]:
    """Quantizes a checkpoint on disk.

    Args:
        folder: Model saved by transformers, in floating-point: `config.json` and safetensors, sharded or not.
        out_dir: A folder that does not exist or is empty; written atomically. `from_pretrained` loads it once
            `peft_zoo` is imported; tokenizer, templates and other files are copied, also those in subfolders.
        config: Configuration of the quantization, not modified. Fields that only concern training have no effect.
        importance: Importance weights by module name, from `preprocess_lq_lora`, if `config.weighting` needs them.
        device: Device of the decomposition.
        max_shard_bytes: Largest size of a file of the result.
        progress: Wraps the module names to iterate over, given them and a description, as `tqdm` does.
        verify: Whether the result is loaded once, in a child process, before it appears at `out_dir`; needs memory for
            the quantized model.

    Returns:
        One row for each target layer.

    Raises:
        ValueError: If a layer cannot be quantized, `<out_dir>.partial` belongs to a call with other arguments or is in
            use by another process, or the result does not load; there is no `out_dir` then, and finished weights are
            kept.

    Examples:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from peft_zoo import LqLoraConfig
        >>> base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base.save_pretrained(f"{folder}/base")
        ...     config = LqLoraConfig(r=4, target_modules=["c_attn"])
        ...     (row,) = quantize_checkpoint(f"{folder}/base", f"{folder}/quantized", config, verify=False)
        ...     loaded = GPT2LMHeadModel.from_pretrained(f"{folder}/quantized")
        >>> row.name, row.num_weights
        ('transformer.h.0.attn.c_attn', 3072)
    """
    target = Path(os.path.abspath(out_dir))
    check_new_folder(target)
    _check_device(device)
    _check_config(config)
    partial = target.with_name(f"{target.name}.partial")
    with Checkpoint(folder) as source:
        job = _Job(source, copy.deepcopy(config), importance or {}, torch.device(device), progress or silent)
        job.resume(partial)
        with only_process(partial / LOCK, f"{partial} is in use by another process that writes {target}; wait for it"):
            check_new_folder(target)  # again: another process may have been faster
            job.plan()
            rows = [job.quantize(name) for name in job.progress(job.layers, "quantizing")]
            with new_folder(target) as work:
                job.write(work, max_shard_bytes)
                if verify:
                    verify_folder(work)
            shutil.rmtree(partial)
    _log.info("unquantized: %s", unquantized_summary(target))
    return rows


@dataclass(frozen=True)
class UnquantizedSummary:
    """Summary of the tensors that `quantize_checkpoint` left unquantized.

    Attributes:
        tensors: Number of tensors: embeddings, norms, biases, layers that are not targeted, and experts that are fused
            into one tensor.
        num_weights: Number of values in them.
        nbytes: Their size in bytes.
        largest: Name of the largest one in the files; empty if there is none.
    """

    tensors: int
    num_weights: int
    nbytes: int
    largest: str

    def __str__(self) -> str:
        size = f"{self.num_weights:,} weights in {self.tensors:,} tensors, {self.nbytes / 1e6:,.1f} MB"
        return f"{size}; the largest is {self.largest}" if self.largest else size


def unquantized_summary(folder: str | Path) -> UnquantizedSummary:
    """Counts the tensors of a standalone model that are not quantized.

    Args:
        folder: Folder of `quantize_checkpoint` or of a standalone model's `save_pretrained`; only the headers of its
            files are read.

    Raises:
        ValueError: If the folder contains no model in safetensors.

    Examples:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from peft_zoo.lq_lora import LqLoraConfig, standalone
        >>> base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = standalone(get_peft_model(base, LqLoraConfig(r=4, target_modules=["c_attn"])))
        ...     model.save_pretrained(folder)
        ...     found = unquantized_summary(folder)
        >>> found.tensors, found.largest
        (15, 'transformer.h.0.mlp.c_fc.weight')
    """
    with Checkpoint(folder) as source:
        tensors = {key: info for key, info in source.tensors.items() if not _is_quantized(key, source)}
    sizes = {key: math.prod(info.shape) for key, info in tensors.items()}
    largest, nbytes = max(sizes, key=sizes.__getitem__, default=""), sum(info.nbytes for info in tensors.values())
    return UnquantizedSummary(len(tensors), sum(sizes.values()), nbytes, largest)


def _is_quantized(key: str, source: Checkpoint) -> bool:
    """Whether a tensor of a standalone model belongs to a quantized layer, as every tensor beside packed codes does."""
    stem, _, part = key.rpartition(".")
    return part in NFLinear.ALL or (part == GUARD and f"{stem}.codes" in source.tensors)


def _check_config(config: LqLoraConfig) -> None:
    """Refuses fields that belong to a quantized base, or would leave the base unquantized."""
    for field, value, fix in (
        ("save_base", "quantized", "a standalone model contains the quantized weights; use 'quantized'"),
        ("lq_state", "new", "'decomposed' is for loading a quantized base; use 'new'"),
        ("base_sha256", None, "it belongs to a base that is quantized already; leave it out"),
        ("init_lora_weights", True, "False quantizes nothing; use True"),
    ):
        if getattr(config, field) != value:
            raise ValueError(f"{field}={getattr(config, field)!r}: {fix}.")


def _check_device(device: torch.device | str) -> None:
    try:
        device = torch.device(device)
    except RuntimeError as error:  # its message lists all device types of torch
        raise ValueError(f"device={device!r} is no device of torch; use 'cpu' or 'cuda'.") from error
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        raise ValueError(f"device={str(device)!r} cannot be used ({str(error).splitlines()[0]}); use 'cpu'.") from error


UNRELATED = ("runtime_config", "weights_sha256")
"""Fields of a configuration that do not change what is written."""


class _Job:
    """State of one call: the source, the plan, and the folder of finished weights."""

    def __init__(
        self,
        source: Checkpoint,
        config: LqLoraConfig,
        importance: Importance,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.source, self.importance, self.device, self.progress = source, importance, device, progress
        if "quantization_config" in source.config:
            raise ValueError(f"{source.folder}: the model is quantized already; give it in floating-point.")
        skeleton = empty_model(source)
        self.config = with_default_targets(config, skeleton)
        self.layers = dict(target_layers(self.config, skeleton, check_target_module_exists, loaded=False))
        if not self.layers:
            raise ValueError(f"target_modules={config.target_modules!r} targets no linear layer; name some.")
        source.other_files()  # refuses what must not be copied before anything is quantized
        self.names = Placements(skeleton, source.tensors)
        self.names.check_tensors(source.tensors)
        tying = tying_configs(skeleton, self.layers.keys(), lambda name: name not in self.names.absent)
        self.untied = [path_in_config(source, skeleton, one) for one in tying]
        self.keys = {name: self._key(name, layer) for name, layer in self.layers.items()}
        if self.config.budget_bits is not None and self.config.qconfig_map is None:
            refuse_budget(self.config, self.layers)
        if importance and config.weighting == "none":
            raise ValueError("importance: weighting='none' uses none; set it to 'fisher' or 'activation'.")
        missing = sorted(self.layers.keys() - importance.keys()) if config.weighting != "none" else []
        if missing:
            raise ValueError(
                f"importance of {missing[0]} (and {len(missing) - 1} more) is missing, which "
                f"weighting={config.weighting!r} needs; pass the result of preprocess_lq_lora."
            )
        for name in self.layers.keys() & importance.keys():
            sizes = tuple(weight_matrix(self.layers[name]).shape)
            if tuple(len(part) for part in importance[name]) != sizes:
                raise ValueError(
                    f"importance of {name} must have {sizes[0]} rows and {sizes[1]} columns; measure it again."
                )
        self.numbers = {name: number for number, name in enumerate(self.layers)}
        self.partial = Path()

    def _key(self, name: str, layer: Any) -> str:
        """Returns the key of a layer's weight in the files."""
        key = self.names.key(f"{name}.weight")
        info = self.source.tensors[key]
        if info.shape != tuple(layer.weight.shape) or not info.dtype.is_floating_point or info.dtype.itemsize == 1:
            raise ValueError(
                f"{key} is {info.dtype} of shape {info.shape}, and config.json says {tuple(layer.weight.shape)}; give "
                "a model in floating-point."
            )
        return key

    # ---- resuming ----

    def resume(self, partial: Path) -> None:
        """Resumes from the partial output of an interrupted call with the same arguments, or starts a new one.

        Error tables serve every budget, so the budget may differ until a weight is quantized.
        """
        state = json.loads(json.dumps(self._arguments(), default=sorted))
        if not partial.exists():
            with new_folder(partial) as folder:
                (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
        old = read_json(partial / STATE)
        only_tables = not any(partial.glob("*.safetensors"))
        if old != state and not (only_tables and _without_budget(old) == _without_budget(state)):
            raise ValueError(
                f"{partial} belongs to an interrupted call with another model or other settings; repeat that call, or "
                "remove the folder."
            )
        draft = partial / f"{STATE}.new"
        draft.write_text(json.dumps(state), encoding="utf-8")
        os.replace(draft, partial / STATE)
        self.partial = partial

    def _arguments(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name in sorted(self.importance.keys() & self.layers.keys()):
            for part in self.importance[name]:
                digest.update(part.float().cpu().numpy().tobytes())
        changed = ("runtime_config", "weights_sha256", "initial_sha256", "made_with")
        fields = {key: value for key, value in asdict(self.config).items() if key not in changed}
        fields["keep_init"] = False  # files have the factors in float32 whatever it is
        return {
            "version": peft_zoo.__version__,
            "source": self.source.identity(),
            "config": fields,
            "weights": digest.hexdigest(),
        }

    # ---- one layer ----

    def _layer(self, name: str) -> Any:
        """Returns a copy of a layer with its weight read from the file, and without bias."""
        weight = self.source.read(self.keys[name])
        check_values(name, weight)
        layer: Any = copy.copy(self.layers[name])
        layer._parameters = {"weight": nn.Parameter(weight.to(self.device), requires_grad=False), "bias": None}
        return layer

    def _importance(self, name: str) -> ImportanceWeights | None:
        found = self.importance.get(name)
        return None if found is None else ImportanceWeights(*(part.to(self.device) for part in found))

    def plan(self) -> None:
        """Chooses the quantization config and rank of each layer."""
        if self.config.qconfig_map is not None or self.config.budget_bits is None:
            columns = {name: weight_matrix(layer).shape[1] for name, layer in self.layers.items()}
            assign_uniform(self.config, columns).fill_in(self.config)
            return
        tables = {name: self._error_table(name) for name in self.progress(self.layers, "measuring")}
        assign_by_budget(self.config, tables, refuse_budget(self.config, self.layers)).fill_in(self.config)

    def _error_table(self, name: str) -> MatrixErrors:
        """Measures the options of a layer, or reads them from the partial output."""
        path = self.partial / f"{self.numbers[name]:05d}.json"
        if not path.exists():
            choices = error_table(self.config, name, self._layer(name), self._importance(name))
            with new_file(path) as draft:
                draft.write_text(json.dumps({"choices": [asdict(choice) for choice in choices]}), encoding="utf-8")
        choices = read_json(path)["choices"]
        return tuple(BitChoice(**{**c, "config": c["config"] and nf_config(c["config"])}) for c in choices)

    def _path(self, name: str) -> Path:
        return self.partial / f"{self.numbers[name]:05d}.safetensors"

    def quantize(self, name: str) -> QuantizedMatrix:
        """Quantizes a layer into the partial output, unless it is there, and returns its row of the result."""
        listed, size = (self.config.qconfig_map or {}).get(name), self.layers[name].weight.numel()
        if listed is None:
            bits = 8.0 * self.source.tensors[self.keys[name]].dtype.itemsize
            return QuantizedMatrix(name, size, None, 0, bits, 0.0)
        nf = nf_config(listed)
        if not self._path(name).exists():
            layer = self._layer(name)
            rank = rank_of(self.config, name, layer)
            found = decompose(self.config, nf, weight_matrix(layer), rank, name, self._importance(name))
            tensors = {**found.Q._asdict(), **dict(zip(NFLinear.INITIAL, (found.B, found.A), strict=True))}
            infos = {part: TensorInfo.of(tensor) for part, tensor in tensors.items()}
            with TensorWriter(self._path(name), infos, {"error": repr(found.error)}) as writer:
                for part, tensor in tensors.items():
                    writer.write(part, tensor)
        with TensorFile(self._path(name)) as file:
            rank = file.tensors["initial_A"].shape[0]
            return QuantizedMatrix(
                name, size, tuple(nf), rank, packed_bits(nf, size) / size, float(file.metadata["error"])
            )

    # ---- the result ----

    def write(self, folder: Path, max_bytes: int) -> None:
        """Writes the model's files."""
        source, infos, origin, ranks = self.source, dict[str, TensorInfo](), dict[str, tuple[Path, str]](), {}
        modules = {name: nf for name, nf in (self.config.qconfig_map or {}).items() if nf and name in self.layers}
        owner = {self.keys[name]: name for name in modules}
        for key, info in source.tensors.items():
            if key not in owner:
                infos[key] = info
                continue
            infos[key] = TensorInfo.of(guard())
            path = self._path(owner[key])
            with TensorFile(path) as file:
                for part, its in file.tensors.items():
                    new = self.names.sibling_key(f"{owner[key]}.weight", part)
                    infos[new], origin[new] = its, (path, part)
                ranks[owner[key]] = file.tensors["initial_A"].shape[0]

        def read(key: str) -> tuple[str, Tensor | Iterator[Tensor]]:
            if key in owner:
                return key, guard()
            if key not in origin:
                return key, finite_pieces(key, source)
            path, part = origin[key]
            with TensorFile(path) as file:
                return key, file.read(part)

        write_shards(folder, infos, map(read, infos), max_bytes)
        quantization = NFkConfig(modules=modules, ranks=ranks).to_dict()
        content = untied({**source.config, "quantization_config": quantization}, self.untied)
        (folder / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
        source.copy_others(folder)
        complete_card(folder / "README.md")


def _without_budget(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state that compares equal for all budgets."""
    return {**state, "config": {**state["config"], "budget_bits": None}}
