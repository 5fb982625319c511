"""NF4: four-bit weights in bitsandbytes' format, bit for bit (QLoRA, arXiv 2305.14314).

A weight is flattened row by row and cut into blocks of 64. Each block keeps its largest magnitude (absmax) and, per
weight, the index of the nearest of 16 codes. Double quantisation stores the absmax themselves in 8 bits: one byte each
into a 256-entry code, a float per 256 of them, and one offset.

Three paths give the same bits: "torch" (here, anywhere), "cpu" (nf4_cpu.py, where numba is installed) and "triton"
(nf4_triton.py, on CUDA and ROCm). `path_of` says which one a device takes; every call can ask for another.
"""

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' CUDA thresholds (csrc/kernels.cu): a scaled weight gets code i where exactly i of them are below it.
# They are the midpoints of CODE, rounded to fp32.
THRESHOLDS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip
ZERO = 7  # the index whose code is 0.0
NESTED_BLOCK = 256
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STATE = "quant_state.bitsandbytes__nf4"
Path = Literal["torch", "cpu", "triton"]


@dataclass(frozen=True, eq=False)
class NF4:
    """A quantised tensor of n weights.

    packed: uint8 [(n + 1) // 2, 1], the first weight of each pair in the high four bits, odd n padded with zero bits.
    absmax: per block of `blocksize` weights, fp32; or uint8 indices into `nested_code` where doubly quantised, and then
    absmax[i] = nested_code[index[i]] * nested_absmax[i // nested_blocksize] + offset. dtype: of the weights before.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int = 64
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: Tensor | None = None
    nested_blocksize: int = NESTED_BLOCK

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, those that are set."""
        names = ("packed", "absmax", "nested_absmax", "nested_code", "offset")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> "NF4":
        return replace(self, **{name: value.to(device) for name, value in self.tensors().items()})  # type: ignore[arg-type]


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


@cache
def _quads(device: torch.device) -> Tensor:
    """fp32 (65536, 4): the four codes of each pair of bytes, read as one little-endian number. 1 MB."""
    with torch.inference_mode(False):
        code = torch.tensor(CODE, dtype=torch.float32)
        pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)
        both = torch.arange(65536)
        return torch.cat([pairs[both & 255], pairs[both >> 8]], dim=1).contiguous().to(device)


@cache
def dynamic_code() -> tuple[float, ...]:
    """The signed 8-bit dynamic code of double quantisation (arXiv 1511.04561): 256 ascending values, each power of ten
    from 1e-6 to 1 cut into twice as many steps as the one below it, with 0 and 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        values += (10 ** (exponent - 6) * middles).tolist()
        values += (-(10 ** (exponent - 6)) * middles).tolist()
    return tuple(sorted(values))


@cache
def _module(path: str) -> tuple[ModuleType | None, str]:
    """The module of a compiled path, or why there is none here."""
    try:
        return importlib.import_module(f".nf4_{path}", __package__), ""
    except ImportError as missing:
        return None, f"NF4 path {path!r} cannot be taken here: {missing}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def path_of(device: torch.device | str, path: Path | None = None) -> Path:
    """The path that quantise and dequantise take on `device`, or `path` if it can be taken there; else ValueError.

    By default "cpu" on a CPU with numba, "triton" on CUDA with triton, else "torch". "triton" on a CPU is its
    interpreter, where TRITON_INTERPRET=1 was set before triton was imported.
    """
    kind = torch.device(device).type
    if path is None:
        wanted: Path = "triton" if kind == "cuda" else "cpu"
        return wanted if kind in ("cpu", "cuda") and _module(wanted)[0] is not None else "torch"
    if path not in get_args(Path):
        raise ValueError(f"NF4 path {path!r} is not one of {get_args(Path)}")
    if path == "torch":
        return path
    module, reason = _module(path)
    if module is None:
        raise ValueError(reason)
    if kind not in module.devices():
        raise ValueError(f"the path {path!r} does not run on a {kind} tensor")
    return path


def _traced(tensor: Tensor) -> bool:
    """Whether the call must go through torch's dispatcher, which takes 150 microseconds: a small layer takes 20."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def _scaled(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """`flat` (fp32) over its blocks' absmax, and the absmax (fp32, one a block).

    Zero where a block is all zero, or so small (below 3e-39) that 1 / absmax overflows.
    """
    n = flat.numel()
    short = -n % blocksize
    blocks = torch.nn.functional.pad(flat, (0, short)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    inverse = 1.0 / absmax
    inverse = torch.where(torch.isinf(inverse), torch.zeros_like(inverse), inverse)
    return (blocks * inverse[:, None]).view(-1)[:n], absmax


def _quantise(weight: Tensor, blocksize: int, path: str) -> tuple[Tensor, Tensor]:
    flat = weight.reshape(-1).contiguous()
    if path == "torch":
        packed, absmax = _torch_quantise(flat, blocksize)
    else:
        module, reason = _module(path)
        assert module is not None, reason
        packed, absmax = module.quantise(flat, blocksize)
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError(f"cannot quantise a weight of shape {tuple(weight.shape)} that holds inf or NaN")
    return packed, absmax


_quantise_op = torch.library.custom_op("gristmill::nf4_quantise", mutates_args=())(_quantise)


@_quantise_op.register_fake
def _(weight: Tensor, blocksize: int, path: str) -> tuple[Tensor, Tensor]:
    n = weight.numel()
    packed = weight.new_empty(((n + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty((n + blocksize - 1) // blocksize, dtype=torch.float32)


def _torch_quantise(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    scaled, absmax = _scaled(flat.float(), blocksize)
    index = torch.bucketize(scaled, constant(THRESHOLDS, flat.device), out_int32=True).to(torch.uint8)
    if flat.numel() % 2:  # 0.0, as bitsandbytes pads
        index = torch.nn.functional.pad(index, (0, 1), value=ZERO)
    return ((index[::2] << 4) | index[1::2]).unsqueeze(1), absmax


def quantise(weight: Tensor, *, blocksize: int = 64, double: bool = True, path: Path | None = None) -> NF4:
    """`weight` (any shape; fp32, fp16 or bf16) in NF4, by the rule of bitsandbytes' CUDA kernels.

    double: quantise the block constants too, 4.127 bits a weight instead of 4.5. A block of zeros becomes exact zeros,
    and so does one below 3e-39. path: as of `path_of`.
    Raises ValueError for another dtype or block size, an empty weight, or one that holds inf or NaN.
    """
    if weight.dtype not in DTYPES.values():
        raise ValueError(f"NF4 holds fp32, fp16 or bf16 weights, not {weight.dtype}")
    if blocksize not in BLOCKS:
        raise ValueError(f"NF4 block size {blocksize} is not one of {BLOCKS}")
    if not weight.numel():
        raise ValueError(f"cannot quantise an empty weight of shape {tuple(weight.shape)}")
    run = _quantise_op if _traced(weight) else _quantise
    packed, absmax = run(weight.detach(), blocksize, path_of(weight.device, path))
    plain = NF4(packed, absmax, tuple(weight.shape), weight.dtype, blocksize)
    if not double:
        return plain
    index, nested_absmax, code, offset = (_double_op if _traced(weight) else _double)(absmax)
    return replace(plain, absmax=index, nested_absmax=nested_absmax, nested_code=code, offset=offset)


def _double(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(index, nested_absmax, nested_code, offset) of block constants in 8 bits."""
    offset = absmax.mean()
    scaled, nested_absmax = _scaled(absmax - offset, NESTED_BLOCK)
    code = constant(dynamic_code(), absmax.device).clone()
    index = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
    return index, nested_absmax, code, offset


_double_op = torch.library.custom_op("gristmill::nf4_double", mutates_args=())(_double)


@_double_op.register_fake
def _(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nested = absmax.new_empty((absmax.numel() + NESTED_BLOCK - 1) // NESTED_BLOCK)
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), nested, absmax.new_empty(256), absmax.new_empty(())


def block_absmax(q: NF4) -> Tensor:
    """The block constants of `q` in fp32."""
    if q.nested_absmax is None:
        return q.absmax
    if q.nested_code is None or q.offset is None:
        raise ValueError("a doubly quantised NF4 needs nested_absmax, nested_code and offset")
    value = q.nested_code[q.absmax.int()]
    nested = q.nested_absmax.repeat_interleave(q.nested_blocksize)[: value.numel()]
    return value.mul_(nested).add_(q.offset)


def _check(q: NF4, n: int, out: Tensor | None) -> None:
    """What a compiled path reads and writes by address must be there."""
    blocks = -(-n // q.blocksize)
    if q.blocksize not in BLOCKS:
        raise ValueError(f"NF4 block size {q.blocksize} is not one of {BLOCKS}")
    if q.packed.dtype != torch.uint8 or q.packed.numel() != (n + 1) // 2 or q.absmax.numel() != blocks:
        raise ValueError(
            f"NF4 of shape {q.shape} needs {(n + 1) // 2} bytes and {blocks} block constants, "
            f"has {q.packed.numel()} ({q.packed.dtype}) and {q.absmax.numel()}"
        )
    constants = q.absmax if q.nested_absmax is None else q.nested_absmax
    if constants.dtype != torch.float32:  # a module-wide .to(bf16) would do this, and change every weight
        raise ValueError(f"NF4 block constants must stay fp32, not {constants.dtype}: move the module, do not cast it")
    if q.nested_absmax is not None:
        code, offset = q.nested_code, q.offset
        if code is None or offset is None:
            raise ValueError("a doubly quantised NF4 needs nested_absmax, nested_code and offset")
        right = q.nested_blocksize > 0 and q.nested_absmax.numel() == -(-blocks // q.nested_blocksize)
        if not right or q.absmax.dtype != torch.uint8 or code.numel() != 256 or offset.numel() != 1:
            raise ValueError(
                f"{blocks} doubly quantised block constants need a byte each ({q.absmax.dtype}), one float in "
                f"{q.nested_blocksize} ({q.nested_absmax.numel()}), a code of 256 ({code.numel()}) and one offset"
            )
        if code.dtype != torch.float32 or offset.dtype != torch.float32:
            raise ValueError(f"NF4 nested_code and offset must stay fp32, not {code.dtype} and {offset.dtype}")
    if out is not None and (out.shape != torch.Size(q.shape) or not out.is_contiguous()):
        raise ValueError(f"out must be contiguous of shape {q.shape}, not {tuple(out.shape)}")
    elsewhere = {str(t.device) for t in q.tensors().values()} | {str(q.device if out is None else out.device)}
    if len(elsewhere) > 1:
        raise ValueError(f"the tensors of an NF4 and its result must lie on one device, not {sorted(elsewhere)}")


def _dequantise(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    blocksize: int,
    nested_blocksize: int,
    path: str,
) -> None:
    if path == "torch":
        q = NF4(
            packed, absmax, tuple(out.shape), out.dtype, blocksize, nested_absmax, nested_code, offset, nested_blocksize
        )
        return _torch_dequantise(q, out)
    module, reason = _module(path)
    assert module is not None, reason
    given = (None if t is None else t.contiguous() for t in (packed, absmax, nested_absmax, nested_code, offset))
    module.dequantise(*given, out, blocksize, nested_blocksize)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)  # written by address: autograd would not know


_dequantise_op = torch.library.custom_op("gristmill::nf4_dequantise", mutates_args=("out",))(_dequantise)


@_dequantise_op.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    blocksize: int,
    nested_blocksize: int,
    path: str,
) -> None:
    return None


@torch.no_grad()
def dequantise(
    q: NF4, dtype: torch.dtype | None = None, out: Tensor | None = None, *, path: Path | None = None
) -> Tensor:
    """The weights of `q`, bit-equal to bitsandbytes: code * absmax in fp32, rounded once to `dtype` (default q.dtype).

    out: a contiguous tensor of q.shape to write into; its dtype is then the result's. path: as of `path_of`.
    ValueError where the parts of `q` do not fit together.
    """
    _check(q, math.prod(q.shape), out)
    if out is None:
        out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    elif dtype is not None and out.dtype != dtype:
        raise ValueError(f"out is {out.dtype}, asked for {dtype}")
    if out.dtype not in DTYPES.values():
        raise ValueError(f"NF4 becomes fp32, fp16 or bf16, not {out.dtype}")
    run = _dequantise_op if _traced(q.packed) else _dequantise
    run(
        q.packed, q.absmax, q.nested_absmax, q.nested_code, q.offset, out, q.blocksize, q.nested_blocksize,
        path_of(q.device, path),
    )  # fmt: skip
    return out


def _torch_dequantise(q: NF4, out: Tensor) -> None:
    n = out.numel()
    absmax = block_absmax(q)
    code = _codes(q.packed.reshape(-1), n, out)
    flat, full = out.view(-1), n - n % q.blocksize
    torch.mul(
        code[:full].view(-1, q.blocksize), absmax[: full // q.blocksize, None], out=flat[:full].view(-1, q.blocksize)
    )
    if full < n:
        torch.mul(code[full:n], absmax[-1], out=flat[full:])


def _codes(packed: Tensor, n: int, out: Tensor) -> Tensor:
    """fp32 codes of at least `n` packed weights; written into `out` itself where they fit it.

    Two bytes are looked up at once: 17 ms for 2048 x 2048 on one core, 20 ms byte by byte.
    """
    quads = _quads(packed.device)
    even = packed.numel() - packed.numel() % 2
    direct = out.dtype == torch.float32 and n == 2 * even
    buffer = out.view(-1, 4) if direct else torch.empty((-(-packed.numel() // 2), 4), device=packed.device)
    if packed.storage_offset() % 2:
        packed = packed.clone()
    torch.index_select(quads, 0, packed[:even].view(torch.uint16).int(), out=buffer[: even // 2])
    if even < packed.numel():
        buffer[-1] = quads[packed[-1].int()]
    return buffer.view(-1)


def naive_dequantise(q: NF4, dtype: torch.dtype | None = None) -> Tensor:
    """The definition, weight by weight: the oracle of `dequantise`."""
    n = torch.Size(q.shape).numel()
    packed = q.packed.reshape(-1)
    index = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n]
    absmax = block_absmax(q).repeat_interleave(q.blocksize)[:n]
    return (torch.tensor(CODE, device=q.device)[index.long()] * absmax).view(q.shape).to(dtype or q.dtype)


def to_tensors(q: NF4, prefix: str = "weight", storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """`q` under the keys of bitsandbytes' files: PREFIX, PREFIX.absmax, PREFIX.quant_map, …

    storage: bitsandbytes' bnb_4bit_quant_storage, the dtype that the packed bytes are shown as (FSDP shards weights of
    one dtype). ValueError where they do not fill whole numbers of it.
    """
    state = {
        "quant_type": "nf4",
        "blocksize": q.blocksize,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    packed = q.packed
    if storage != torch.uint8:
        if packed.numel() % storage.itemsize:
            raise ValueError(f"{prefix}: {packed.numel()} packed bytes are no whole numbers of {storage}")
        packed = packed.reshape(-1).view(storage).unsqueeze(1)
    tensors = {
        prefix: packed,
        f"{prefix}.absmax": q.absmax,
        f"{prefix}.quant_map": constant(CODE, q.device).clone(),
    }
    if q.nested_absmax is not None and q.nested_code is not None and q.offset is not None:
        state |= {"nested_blocksize": q.nested_blocksize, "nested_dtype": "float32", "nested_offset": q.offset.item()}
        tensors |= {f"{prefix}.nested_absmax": q.nested_absmax, f"{prefix}.nested_quant_map": q.nested_code}
    raw = json.dumps(state).encode()
    return tensors | {f"{prefix}.{STATE}": torch.tensor(list(raw), dtype=torch.uint8, device=q.device)}


def from_tensors(tensors: Mapping[str, Tensor], prefix: str = "weight") -> NF4:
    """The NF4 under `prefix` among bitsandbytes' keys, its packed bytes under any dtype.

    ValueError where a key is missing, the code is not NF4's, or the parts do not fit together.
    """
    try:
        state = json.loads(bytes(tensors[f"{prefix}.{STATE}"].tolist()))
        packed = tensors[prefix]
        absmax, code = tensors[f"{prefix}.absmax"], tensors[f"{prefix}.quant_map"]
        kind, shape, dtype, blocksize = (state[key] for key in ("quant_type", "shape", "dtype", "blocksize"))
        if kind != "nf4" or not torch.equal(code.cpu().float(), torch.tensor(CODE)):
            raise ValueError(f"{prefix}: quant_type {kind!r} with a code book that is not NF4's")
        if dtype not in DTYPES:
            raise ValueError(f"{prefix}: weights of {dtype}, not one of {', '.join(DTYPES)}")
        if packed.dtype != torch.uint8 or packed.shape[1:] != (1,):
            packed = packed.contiguous().view(-1).view(torch.uint8).view(-1, 1)
        q = NF4(packed, absmax, tuple(shape), DTYPES[dtype], blocksize)
        if "nested_offset" in state:
            q = replace(
                q,
                nested_absmax=tensors[f"{prefix}.nested_absmax"],
                nested_code=tensors[f"{prefix}.nested_quant_map"],
                offset=torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device),
                nested_blocksize=state["nested_blocksize"],
            )
    except KeyError as missing:
        raise ValueError(f"no NF4 weight under {prefix!r}: key {missing} is missing") from None
    except json.JSONDecodeError as broken:
        raise ValueError(f"{prefix}.{STATE} is no JSON: {broken}") from None
    _check(q, math.prod(q.shape), None)
    return q
