"""`jax-gptq inspect PATH`: what a checkpoint holds, what it costs, and what looks wrong.

Every quantized module is decoded once, one at a time, so that a report without errors means that
the checkpoint loads.
"""

import argparse
import collections
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_gptq.checkpoint.config import CONFIG_FILES, QuantConfig, parse_config
from jax_gptq.checkpoint.files import ModuleTensors, read_json
from jax_gptq.checkpoint.planar import PLANES
from jax_gptq.checkpoint.reader import Checkpoint, open_checkpoint
from jax_gptq.errors import JaxGptqError
from jax_gptq.stores import LAYOUTS, PACKED_LAYOUTS, prepare
from jax_gptq.weight import GptqWeight


@dataclasses.dataclass(frozen=True)
class ModuleReport:
    """One quantized module.

    Attributes:
      order: "none" (k // group_size), "sorted" (uneven groups in order) or "permuted" (act-order).
      disk_bytes: bytes of its tensors in the files.
      memory_bytes: layout -> bytes of its store, or None where the layout cannot hold it.
      unsupported: layout -> why it cannot hold the module.
    """

    name: str
    bits: int
    group_size: int
    in_features: int
    out_features: int
    order: str
    sym: bool
    bias: bool
    scale_dtype: str
    disk_bytes: int
    memory_bytes: dict[str, int | None]
    unsupported: dict[str, str]


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint: its format, its modules, its sizes.

    Attributes:
      path: the folder or file.
      files: names of the files that hold tensors.
      disk_bytes: their size, all tensors together.
      quant_method, checkpoint_format, quantizer, config_source: of the configuration; None where
        there is none.
      modules: the quantized modules.
      dense_tensors, dense_bytes: the tensors that belong to no quantized module.
      suspicious: what works but deserves a look, one sentence each.
      errors: why modules cannot be loaded, one message each.
    """

    path: str
    files: list[str]
    disk_bytes: int
    quant_method: str | None
    checkpoint_format: str | None
    quantizer: str | None
    config_source: str | None
    modules: list[ModuleReport]
    dense_tensors: int
    dense_bytes: int
    suspicious: list[str]
    errors: list[str]

    def text(self) -> str:
        """The report for a terminal."""
        return "\n".join(_render(self))


def inspect_checkpoint(path: str | Path) -> CheckpointReport:
    """Decode every module of a checkpoint and report on it.

    Args:
      path: as for `open_checkpoint`.

    Raises:
      What `open_checkpoint` raises. A module that cannot be decoded is in `errors` instead.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = open_checkpoint(path)
        modules, errors, remarks = _modules(checkpoint)
    sizes = {name: checkpoint.info(name).nbytes for name in checkpoint.names()}
    quantized = set(checkpoint.quantized_modules())
    packed = {
        name
        for name in sizes
        if name.rpartition(".")[0] in quantized and not name.endswith(".weight")
    }
    config = checkpoint.config
    suspicious = [str(warning.message) for warning in caught]
    suspicious += _doubts_about_files(checkpoint)
    if config is not None:
        suspicious += _doubts_about_config(checkpoint, config, modules)
    return CheckpointReport(
        path=str(checkpoint.path),
        files=sorted({checkpoint.info(name).path.name for name in sizes}),
        disk_bytes=sum(sizes.values()),
        quant_method=None if config is None else config.quant_method,
        checkpoint_format=None if config is None else config.checkpoint_format,
        quantizer=None if config is None else _quantizer(config),
        config_source=None if config is None else config.source,
        modules=modules,
        dense_tensors=len(sizes) - len(packed),
        dense_bytes=sum(size for name, size in sizes.items() if name not in packed),
        suspicious=suspicious + remarks,
        errors=errors,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `jax-gptq inspect`."""
    parser.add_argument("path", type=Path, metavar="PATH", help="checkpoint folder or .safetensors")
    parser.add_argument("--json", action="store_true", help="the report as JSON, module by module")


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 where a module cannot be loaded."""
    report = inspect_checkpoint(args.path)
    print(json.dumps(dataclasses.asdict(report), indent=2) if args.json else report.text())
    return 1 if report.errors else 0


# Looking at the modules -----------------------------------------------------------------------


def _modules(checkpoint: Checkpoint) -> tuple[list[ModuleReport], list[str], list[str]]:
    """Reports, errors, and remarks on the values found."""
    modules, errors = [], []
    zero_biases, zero_scales, mislabelled = [], [], []
    sizes: dict[Any, dict[str, int | None]] = {}
    for name in checkpoint.quantized_modules():
        try:
            weight, bias = checkpoint.weight(name), checkpoint.bias(name)
        except JaxGptqError as error:
            errors.append(str(error))
            continue
        tensors = ModuleTensors(checkpoint.files, name)
        if bias is None and "bias" in tensors:
            zero_biases.append(name)
        if not np.asarray(weight.scales).all():
            zero_scales.append(name)
        if _label_contradicts(checkpoint, tensors, weight):
            mislabelled.append(name)
        modules.append(_module(checkpoint, name, weight, bias is not None, sizes))
    remarks = [
        _list(zero_biases, "have a bias of zeros (AutoGPTQ writes them); it is dropped"),
        _list(zero_scales, "have scales of 0: the weights of those groups are all 0"),
        _list(mislabelled, "store zero points of the other version than checkpoint_format says"),
    ]
    return modules, errors, [remark for remark in remarks if remark]


def _module(
    checkpoint: Checkpoint, name: str, weight: GptqWeight, bias: bool, sizes: dict
) -> ModuleReport:
    unsupported = {
        layout: reason
        for layout, store in PACKED_LAYOUTS.items()
        if (reason := store.unsupported(weight)) is not None
    }
    g_idx = None if weight.g_idx is None else np.asarray(weight.g_idx)
    # Stores of one kind have one size, so one of each is packed.
    kind = (weight.bits, weight.group_size, weight.shape, weight.groups, weight.scales.dtype.name)
    kind += () if g_idx is None else tuple(np.bincount(g_idx).tolist())
    if kind not in sizes:
        sizes[kind] = {
            layout: None if layout in unsupported else _memory_bytes(weight, layout)
            for layout in LAYOUTS
        }
    order = "none" if g_idx is None else "permuted" if (np.diff(g_idx) < 0).any() else "sorted"
    own = ModuleTensors(checkpoint.files, name).names()
    return ModuleReport(
        name=name,
        bits=weight.bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.out_features,
        order=order,
        sym=bool((np.asarray(weight.qzeros) == 2 ** (weight.bits - 1)).all()),
        bias=bias,
        scale_dtype=weight.scales.dtype.name,
        disk_bytes=sum(checkpoint.info(tensor).nbytes for tensor in own),
        memory_bytes=sizes[kind],
        unsupported=unsupported,
    )


def _memory_bytes(weight: GptqWeight, layout: str) -> int:
    if layout == "dense":  # Known without dequantizing.
        return weight.in_features * weight.out_features * 4
    return sum(leaf.nbytes for leaf in jax.tree.leaves(prepare(weight, layout)))


def _label_contradicts(checkpoint: Checkpoint, tensors: ModuleTensors, weight: GptqWeight) -> bool:
    """Whether a symmetric GPTQ module stores v2 zeros labelled v1, or the reverse."""
    config = checkpoint.config
    if config is None or config.quant_method != "gptq" or weight.bits in PLANES:
        return False
    if not config.module(tensors.module).sym:
        return False
    first = int(tensors.get("qzeros").view(np.uint32)[0, 0]) & (2**weight.bits - 1)
    return (first == 2 ** (weight.bits - 1)) != (config.checkpoint_format != "gptq")


# Doubts ---------------------------------------------------------------------------------------


def _doubts_about_files(checkpoint: Checkpoint) -> list[str]:
    """An index that disagrees with the headers; safetensors files that are not read."""
    path = checkpoint.path
    if not path.is_dir():
        return []
    doubts = []
    read = {checkpoint.info(name).path.name for name in checkpoint.names()}
    extra = sorted(file.name for file in path.glob("*.safetensors") if file.name not in read)
    if extra:
        doubts.append(f"{', '.join(extra)}: not part of the checkpoint that is read")
    for index in sorted(path.glob("*.safetensors.index.json")):
        weight_map = read_json(index).get("weight_map", {})
        held = {name: checkpoint.info(name).path.name for name in checkpoint.names()}
        stale = {n for n in weight_map.keys() | held.keys() if weight_map.get(n) != held.get(n)}
        if stale:
            doubts.append(
                f"{index.name}: stale for {len(stale)} tensors ({min(stale)}, ...); the headers "
                f"decide"
            )
    return doubts


def _doubts_about_config(
    checkpoint: Checkpoint, config: QuantConfig, modules: list[ModuleReport]
) -> list[str]:
    skipped = [module.name for module in modules if config.module(module.name).skipped]
    doubts = [_list(skipped, "are quantized, though a `dynamic` rule says that they are not")]
    if config.quant_method == "gptq" and modules:
        ordered = [m.name for m in modules if m.order == "permuted"]
        expected = [m for m in modules if config.module(m.name).desc_act]
        if expected and not ordered:
            doubts.append("desc_act is true, but every g_idx is in order")
        unexpected = [name for name in ordered if not config.module(name).desc_act]
        doubts.append(
            _list(unexpected, "have a permuted g_idx, though desc_act is false; it is honoured")
        )
        if not config.sym and all(module.sym for module in modules):
            doubts.append("sym is false, but every zero point is symmetric")
        if config.lm_head and "lm_head" not in {m.name.rpartition(".")[2] for m in modules}:
            doubts.append("lm_head is true, but no quantized lm_head is there")
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    for source, other in _other_configs(folder, checkpoint.hf_config, config.source):
        differing = [
            f"{key} {getattr(config, key)!r} and {getattr(other, key)!r}"
            for key in ("quant_method", "checkpoint_format", "bits", "group_size", "sym")
            if getattr(config, key) != getattr(other, key)
        ]
        if differing:
            doubts.append(f"{config.source} and {source} disagree: {'; '.join(differing)}")
    return [doubt for doubt in doubts if doubt]


def _other_configs(
    folder: Path, hf_config: dict[str, Any], used: str
) -> Iterable[tuple[str, QuantConfig]]:
    """The configurations that the one in use hides."""
    found = [(str(folder / name), folder / name) for name in CONFIG_FILES]
    raws = [(source, read_json(path)) for source, path in found if path.exists()]
    if isinstance(hf_config.get("quantization_config"), dict):
        raws.append((str(folder / "config.json"), hf_config["quantization_config"]))
    for source, raw in raws:
        if source != used:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Said of the one in use, where it matters.
                yield source, parse_config(raw, source)


def _quantizer(config: QuantConfig) -> str | None:
    meta = config.raw.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    return ", ".join(quantizer) if isinstance(quantizer, list) else quantizer


def _list(names: list[str], what: str) -> str:
    """ "3 modules (a, ...) have ...", or nothing."""
    if not names:
        return ""
    if len(names) == 1:
        return f"{names[0]}: {what}"
    return f"{len(names)} modules ({names[0]}, ...): {what}"


# Rendering ------------------------------------------------------------------------------------


def _render(report: CheckpointReport) -> Iterable[str]:
    yield report.path
    more = ", ..." if len(report.files) > 1 else ""
    yield f"  files     {len(report.files)} ({', '.join(report.files[:1])}{more})"
    if report.quant_method is None:
        yield f"  format    float: {report.dense_tensors} tensors, {_size(report.dense_bytes)}"
    else:
        writer = f", written by {report.quantizer}" if report.quantizer else ""
        yield f"  format    {report.quant_method}, {report.checkpoint_format}{writer}"
        yield f"  config    {report.config_source}"
        yield (
            f"  modules   {len(report.modules)} quantized; {report.dense_tensors} other tensors, "
            f"{_size(report.dense_bytes)}"
        )
    if report.modules:
        yield ""
        yield from _table(report.modules)
        yield from _unsupported(report.modules)
    for title, messages in (("suspicious", report.suspicious), ("errors", report.errors)):
        if messages:
            yield ""
            yield f"{title}:"
            yield from (f"  - {message}" for message in messages)
    if not report.suspicious and not report.errors:
        yield ""
        yield "nothing suspicious"


def _table(modules: list[ModuleReport]) -> Iterable[str]:
    """One row for the modules that are alike, and the sums; sizes are those of all together."""
    key: Callable[[ModuleReport], tuple] = lambda m: (
        (m.in_features, m.out_features),
        (m.bits, m.group_size, m.sym, m.order, m.bias, m.scale_dtype),
    )
    alike: dict[tuple, list[ModuleReport]] = collections.defaultdict(list)
    for module in modules:
        alike[key(module)].append(module)
    rows = [
        ["modules", "in", "out", "bits", "group", "zeros", "g_idx", "bias", "scales", "disk"],
    ]
    rows[0] += LAYOUTS
    for ((k, n), (bits, group, sym, order, bias, dtype)), members in alike.items():
        cells: list[Any] = [len(members), k, n, bits, group, "sym" if sym else "asym", order]
        cells += ["yes" if bias else "no", dtype, *_sizes(members)]
        rows.append([str(cell) for cell in cells])
    rows.append(["total", *[""] * 8, *_sizes(modules)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _sizes(modules: list[ModuleReport]) -> list[str]:
    sizes = [_size(sum(module.disk_bytes for module in modules))]
    for layout in LAYOUTS:
        held = [module.memory_bytes[layout] for module in modules]
        sizes.append("-" if None in held else _size(sum(size or 0 for size in held)))
    return sizes


def _unsupported(modules: list[ModuleReport]) -> Iterable[str]:
    reasons: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for module in modules:
        for layout, reason in module.unsupported.items():
            reasons[layout, reason].append(module.name)
    if reasons:
        yield ""
        yield "held in the reference layout instead:"
    for (layout, reason), names in reasons.items():
        yield f"  - {_list(names, f'not {layout}: {reason}')}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
