r"""LQ-LoRA from files: a checkpoint is quantized one matrix at a time, into a model that loads without its base.

    quantize_checkpoint("Llama-3-8B", "Llama-3-8B-2.75bit", LqLoraConfig(budget_bits=2.75, target_modules="all-linear"))

No tensor but the one in work is in memory, with some copies of it in float32. What is done lies in `<out_dir>.partial`
until all is; after a kill the same call goes on from there. The result is that of `get_peft_model` and `standalone`, Q
to the bit, and `get_peft_model` with an `LqLoraConfig` trains it.

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
import transformers
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

import peft_zoo
from peft_zoo.adapters.lq_lora.config import LqLoraConfig, nf_config
from peft_zoo.adapters.lq_lora.nf_config import NFkConfig
from peft_zoo.adapters.lq_lora.nf_linear import NFLinear, oriented
from peft_zoo.adapters.lq_lora.plan import decompose, rank_of, refuse_budget, spend, table, without_tables
from peft_zoo.adapters.lq_lora.targets import check_values, named, targets
from peft_zoo.calibration.fisher import ATTRIBUTE, Weights, uses
from peft_zoo.common.atomic import check_new_folder, new_file, new_folder
from peft_zoo.common.progress import Progress, silent
from peft_zoo.io import TensorFile, TensorInfo, TensorWriter, read_json
from peft_zoo.io.checkpoint import CONFIG, Checkpoint, write_shards
from peft_zoo.kernels.normal_float.quantize import packed_bits
from peft_zoo.kernels.planning.bits import BitChoice, MatrixErrors
from peft_zoo.merge.lq_lora.export import QuantizedMatrix
from peft_zoo.merge.lq_lora.tensor_names import Names

__all__ = ["Left", "left_as_it_was", "quantize_checkpoint"]

STATE = "state.json"
_log = logging.getLogger(__name__)


def quantize_checkpoint(
    folder: str | Path,
    out_dir: str | Path,
    config: LqLoraConfig,
    *,
    weights: Mapping[str, Weights] | None = None,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
) -> list[QuantizedMatrix]:
    """Quantize a model in files.

    Args:
        folder: A model that transformers saved, in floating-point: `config.json` and safetensors, sharded or not.
        out_dir: A folder that does not exist or is empty; it appears whole or not at all. `from_pretrained` loads it
            once `peft_zoo` is imported; tokenizer and other files are copied.
        config: As for `get_peft_model`. Fields of the adapter that is trained later have no effect here.
        weights: By module, from `preprocess_lq_lora`, if `config.weighting` wants them.
        device: Where matrices are decomposed.
        max_shard_bytes: Of a file of the result.
        progress: Wraps the names of what is worked on, with a word for what is done, as `tqdm` does.

    Returns:
        A row for every targeted matrix.

    Raises:
        ValueError: If something cannot be quantized, or `<out_dir>.partial` is of a call with other arguments; then
            there is no `out_dir`, and what was done before is kept.
    """
    target = Path(os.path.abspath(out_dir))
    check_new_folder(target)
    _check_device(device)
    _check_config(config)
    partial = target.with_name(f"{target.name}.partial")
    with Checkpoint(folder) as source:
        job = _Job(source, copy.deepcopy(config), weights, torch.device(device), progress or silent)
        job.resume(partial)
        job.choose()
        rows = [job.quantize(name) for name in job.progress(job.layers, "quantizing")]
        with new_folder(target) as work:
            job.write(work, max_shard_bytes)
    shutil.rmtree(partial)
    _log.info("as they were: %s", left_as_it_was(target))
    return rows


@dataclass(frozen=True)
class Left:
    """What `quantize_checkpoint` copied as it was.

    Attributes:
        tensors: How many: embeddings, norms, biases, what is not targeted, and experts that are one tensor for all.
        numbers: In them.
        nbytes: Of them.
        largest: Name of the largest in the files; empty if there is none.
    """

    tensors: int
    numbers: int
    nbytes: int
    largest: str

    def __str__(self) -> str:
        size = f"{self.numbers:,} numbers in {self.tensors:,} tensors, {self.nbytes / 1e6:,.1f} MB"
        return f"{size}; the largest is {self.largest}" if self.largest else size


def left_as_it_was(folder: str | Path) -> Left:
    """Count what is not quantized in a model of the standalone form.

    Args:
        folder: That `quantize_checkpoint` or `save_pretrained` wrote; only the headers of its files are read.

    Raises:
        ValueError: If it is no folder with a model in safetensors.
    """
    with Checkpoint(folder) as source:
        tensors = {key: info for key, info in source.tensors.items() if key.rpartition(".")[2] not in NFLinear.ALL}
    numbers = {key: math.prod(info.shape) for key, info in tensors.items()}
    largest = max(numbers, key=numbers.__getitem__, default="")
    return Left(len(tensors), sum(numbers.values()), sum(info.nbytes for info in tensors.values()), largest)


def _check_config(config: LqLoraConfig) -> None:
    """Refuse what is of a matrix that is quantized already, or would leave it as it is."""
    for field, value, fix in (
        ("save_base", "quantized", "a model without its base needs Q; use 'quantized'"),
        ("lq_state", "new", "it is for loading what is quantized; use 'new'"),
        ("base_sha256", None, "it names matrices that are quantized already; leave it out"),
        ("init_lora_weights", True, "it would quantize nothing; use True"),
    ):
        if getattr(config, field) != value:
            raise ValueError(f"{field}={getattr(config, field)!r}: {fix}.")


def _check_device(device: torch.device | str) -> None:
    try:
        device = torch.device(device)
    except RuntimeError as error:  # it lists every device that there ever was
        raise ValueError(f"device={device!r} is none that torch knows; use 'cpu' or 'cuda'.") from error
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        raise ValueError(f"device={str(device)!r} cannot be used ({str(error).splitlines()[0]}); use 'cpu'.") from error


class _Job:
    """One call: what is to be done, and where what is done lies."""

    def __init__(
        self,
        source: Checkpoint,
        config: LqLoraConfig,
        weights: Mapping[str, Weights] | None,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.source, self.device, self.progress = source, device, progress
        skeleton = _skeleton(source)
        self.config = named(config, skeleton)
        self.layers = dict(targets(self.config, skeleton, check_target_module_exists, loaded=False))
        if not self.layers:
            raise ValueError(f"target_modules={config.target_modules!r} names no layer of the model that is quantized.")
        self.names = Names(source.folder, skeleton, source.tensors)
        self.keys = {name: self._key(name, layer) for name, layer in self.layers.items()}
        if self.config.budget_bits is not None and self.config.qconfig_map is None:
            refuse_budget(self.config, self.layers)
        if weights and config.weighting == "none":
            raise ValueError("weights: weighting='none' uses none; set it to what they are, 'fisher' or 'activation'.")
        self.weights = weights or {}
        lost = sorted(self.layers.keys() - self.weights.keys()) if config.weighting != "none" else []
        if lost:
            raise ValueError(
                f"weights of {lost[0]} (and {len(lost) - 1} more) are missing, which weighting={config.weighting!r} "
                "needs; pass those that preprocess_lq_lora returned."
            )
        self.numbers = {name: number for number, name in enumerate(self.layers)}
        self.partial = Path()

    def _key(self, name: str, layer: Any) -> str:
        """Where the weight of a layer is."""
        key = self.names.key(f"{name}.weight")
        info = self.source.tensors[key]
        if info.shape != tuple(layer.weight.shape) or not info.dtype.is_floating_point or info.dtype.itemsize == 1:
            raise ValueError(
                f"{key} is {info.dtype} of shape {info.shape}, and config.json says {tuple(layer.weight.shape)}; give "
                "a model in floating-point."
            )
        return key

    # ---- what was done before ----

    def resume(self, partial: Path) -> None:
        """Take over what a call with the same arguments left, or begin.

        Tables of errors serve every budget, so until a matrix is quantized the budget may differ.
        """
        state = json.loads(json.dumps(self._arguments(), default=sorted))
        if not partial.exists():
            with new_folder(partial) as folder:
                (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
        old = read_json(partial / STATE)
        free = not any(partial.glob("*.safetensors"))
        if old != state and not (free and _but_budget(old) == _but_budget(state)):
            raise ValueError(
                f"{partial} is what another call left, of another model or with other settings; repeat that call, or "
                "remove the folder."
            )
        draft = partial / f"{STATE}.new"
        draft.write_text(json.dumps(state), encoding="utf-8")
        os.replace(draft, partial / STATE)
        self.partial = partial

    def _arguments(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name in sorted(self.weights.keys() & self.layers.keys()):
            for part in self.weights[name]:
                digest.update(part.float().cpu().numpy().tobytes())
        fields = {key: value for key, value in asdict(self.config).items() if key != "runtime_config"}
        return {
            "version": peft_zoo.__version__,
            "source": self.source.identity(),
            "config": fields,
            "weights": digest.hexdigest(),
        }

    # ---- one matrix ----

    def _layer(self, name: str) -> Any:
        """A layer like the model's, with its weight and nothing else of it."""
        weight = self.source.read(self.keys[name])
        check_values(name, weight)
        layer: Any = copy.copy(self.layers[name])
        layer._parameters = {"weight": nn.Parameter(weight.to(self.device), requires_grad=False), "bias": None}
        if name in self.weights:
            setattr(layer, ATTRIBUTE, Weights(*(part.to(self.device) for part in self.weights[name])))
        return layer

    def choose(self) -> None:
        """How each matrix is quantized."""
        if self.config.qconfig_map is not None or self.config.budget_bits is None:
            without_tables(self.config, {name: oriented(layer).shape[1] for name, layer in self.layers.items()})
            return
        tables = {name: self._table(name) for name in self.progress(self.layers, "measuring")}
        spend(self.config, tables, refuse_budget(self.config, self.layers))

    def _table(self, name: str) -> MatrixErrors:
        path = self.partial / f"{self.numbers[name]:05d}.json"
        if not path.exists():
            choices = table(self.config, name, self._layer(name))
            with new_file(path) as draft:
                draft.write_text(json.dumps({"choices": [asdict(choice) for choice in choices]}), encoding="utf-8")
        choices = read_json(path)["choices"]
        return tuple(BitChoice(**{**c, "config": c["config"] and nf_config(c["config"])}) for c in choices)

    def _path(self, name: str) -> Path:
        return self.partial / f"{self.numbers[name]:05d}.safetensors"

    def quantize(self, name: str) -> QuantizedMatrix:
        """Quantize a matrix, unless that has been done."""
        listed, numbers = (self.config.qconfig_map or {}).get(name), self.layers[name].weight.numel()
        if listed is None:
            return QuantizedMatrix(
                name, numbers, None, 0, 8.0 * self.source.tensors[self.keys[name]].dtype.itemsize, 0.0
            )
        way = nf_config(listed)
        if not self._path(name).exists():
            layer = self._layer(name)
            rank = rank_of(self.config, name, layer)
            found = decompose(self.config, way, oriented(layer), rank, *uses(self.config, name, layer))
            tensors = {**found.Q._asdict(), **dict(zip(NFLinear.INITIAL, (found.B, found.A), strict=True))}
            infos = {part: TensorInfo.of(tensor) for part, tensor in tensors.items()}
            with TensorWriter(self._path(name), infos, {"error": repr(found.error)}) as writer:
                for part, tensor in tensors.items():
                    writer.write(part, tensor)
        with TensorFile(self._path(name)) as file:
            rank = file.tensors["initial_A"].shape[0]
            bits = packed_bits(way, numbers) / numbers
            return QuantizedMatrix(name, numbers, tuple(way), rank, bits, float(file.metadata["error"]))

    # ---- the result ----

    def write(self, folder: Path, max_bytes: int) -> None:
        """Write the model."""
        source, infos, origin, ranks = self.source, dict[str, TensorInfo](), dict[str, tuple[Path, str]](), {}
        modules = {name: way for name, way in (self.config.qconfig_map or {}).items() if way and name in self.layers}
        owner = {self.keys[name]: name for name in modules}
        for key, info in source.tensors.items():
            if key not in owner:
                infos[key] = info
                continue
            path = self._path(owner[key])
            with TensorFile(path) as file:
                for part, its in file.tensors.items():
                    new = self.names.beside(f"{owner[key]}.weight", part)
                    infos[new], origin[new] = its, (path, part)
                ranks[owner[key]] = file.tensors["initial_A"].shape[0]

        def read(key: str) -> tuple[str, Tensor | Iterator[Tensor]]:
            if key not in origin:
                return key, source.pieces(key)
            path, part = origin[key]
            with TensorFile(path) as file:
                return key, file.read(part)

        write_shards(folder, infos, map(read, infos), max_bytes)
        quantization = NFkConfig(modules=modules, ranks=ranks).to_dict()
        content = json.dumps({**source.config, "quantization_config": quantization}, indent=2, sort_keys=True)
        (folder / CONFIG).write_text(content, encoding="utf-8")
        source.copy_others(folder)


def _but_budget(state: Mapping[str, Any]) -> dict[str, Any]:
    return {**state, "config": {**state["config"], "budget_bits": None}}


def _skeleton(source: Checkpoint) -> Any:
    """The model without values.

    Raises:
        ValueError: If it is quantized, or of no class that transformers has.
    """
    if "quantization_config" in source.config:
        raise ValueError(f"{source.folder}: is quantized already; give the model in floating-point.")
    (architecture, *_) = source.config.get("architectures") or [None]
    kind = getattr(transformers, str(architecture), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"{source.folder}: architectures={architecture!r} is no model that transformers has.")
    configuration: Any = kind.config_class
    with torch.device("meta"):
        return kind(configuration.from_pretrained(source.folder))
