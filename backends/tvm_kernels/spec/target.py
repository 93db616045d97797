"""Whose code, a row for each target, and how linears are computed there; nothing here imports TVM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from bitlower.ir import BitlowerError, nearest

WARP = 32
"""The threads of a GPU that go together."""
FRAGMENT = 16
"""The side of what matrix instructions multiply, and the threads along a side of a tile of products of bytes."""


@dataclass(frozen=True, kw_only=True)
class GemmConfig:
    """How a linear is computed, whatever it computes: results differ by the order of float32 sums alone.

    Args:
        row_tiles: on CPUs, how many rows go together in registers; ascending from 1.
        many_rows: from so many rows on CPUs unpack the weight of a panel once into scratch memory, and GPUs compute
            tiles; below that GPUs have a warp an output.
        prefetch_bytes: on CPUs, between the codes that a single row reads and those that it asks memory for.
        block_m: on GPUs, rows of a tile.
        block_n: on GPUs, outputs of a tile.
        block_k: on GPUs, the most inputs of a tile that are in shared memory at a time.
        warps_m: that share the rows of a tile, where it goes by matrix instructions.
        warps_n: that share its outputs.
    """

    row_tiles: tuple[int, ...] = (1, 2, 4)
    many_rows: int = 64
    prefetch_bytes: int = 6144
    block_m: int = 64
    block_n: int = 64
    block_k: int = 32
    warps_m: int = 2
    warps_n: int = 2

    def __post_init__(self) -> None:
        if self.row_tiles[:1] != (1,) or list(self.row_tiles) != sorted(set(self.row_tiles)):
            raise BitlowerError(f"row tiles {list(self.row_tiles)} must rise from 1")
        if self.many_rows < 1 or self.prefetch_bytes < 1:
            raise BitlowerError("`many_rows` and `prefetch_bytes` of a configuration are at least 1")
        for block, warps in ((self.block_m, self.warps_m), (self.block_n, self.warps_n)):
            if warps < 1 or block < 1 or block % (FRAGMENT * warps):
                raise BitlowerError(f"a block of {block} is no multiple of {FRAGMENT} for each of {warps} warps")
        if self.block_k not in (16, 32, 64):
            raise BitlowerError(f"blocks of {self.block_k} inputs: 16, 32 and 64 are possible")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How an attention is computed, whatever it computes: results differ by the order of float32 sums alone.

    Args:
        query_tiles: on CPUs, how many queries of a head go together in registers; ascending from 1. With fewer queries
            than the most of them each is a task, else a head is.
        key_vectors: on CPUs, vectors of keys whose scores are summed at a time.
        value_vectors: on CPUs, vectors of values that are summed at a time.
        warps: on GPUs, of a block.
        queries: on GPUs, the most of a warp; half of it from heads of more than 128 columns on, a quarter from 256 on.
        chunk: on GPUs, words of a key, or columns of a value, that are staged at a time.
        blocks: on GPUs, of a multiprocessor, which registers leave room for; one fewer where heads are wider than
            ``chunk``.
    """

    query_tiles: tuple[int, ...] = (1, 4)
    key_vectors: int = 2
    value_vectors: int = 4
    warps: int = 4
    queries: int = 4
    chunk: int = 64
    blocks: int = 4

    def __post_init__(self) -> None:
        if self.query_tiles[:1] != (1,) or list(self.query_tiles) != sorted(set(self.query_tiles)):
            raise BitlowerError(f"query tiles {list(self.query_tiles)} must rise from 1")
        counts = (self.key_vectors, self.value_vectors, self.warps, self.queries)
        if min(counts) < 1 or self.blocks < 2:
            raise BitlowerError("an attention takes one vector, warp and query at least, and two blocks")
        if self.chunk < WARP or self.chunk % WARP:
            raise BitlowerError(f"a chunk of {self.chunk} is no multiple of the {WARP} lanes of a warp")


@dataclass(frozen=True, kw_only=True, repr=False)
class Target:
    """A kind of device.

    Args:
        name: of it.
        kind: as TVM calls it: ``llvm``, ``cuda``, ``opencl``.
        device: the attribute of TVM that finds one.
        features: of the processor, in LLVM's words, that must be there.
        byte_products: the instruction that adds products of four bytes: ``vpdpbusd``, ``dp4a``; empty: none.
        fragments: whether there are matrix instructions.
        half: whether activations may be float16.
        graphs: whether launches of static shapes can be one graph.
        shared: bytes of memory that a block of threads may share.
        options: of TVM's target.
        needs: what must be there to run it, for people.
        gemm: the configuration of linears that has served best.
        attention: that of attentions.
    """

    name: str
    kind: str
    device: str
    features: tuple[str, ...] = ()
    byte_products: str = ""
    fragments: bool = False
    half: bool = False
    graphs: bool = False
    shared: int = 48 << 10
    options: tuple[tuple[str, Any], ...] = ()
    needs: str = ""
    gemm: GemmConfig = field(default_factory=GemmConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    LLVM: ClassVar[Target]
    VNNI: ClassVar[Target]
    CUDA: ClassVar[Target]
    OPENCL: ClassVar[Target]

    @property
    def on_cpu(self) -> bool:
        """Whether the kernel runs on the host."""
        return self.kind == "llvm"

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<target {self.name}>"


_THREADS = ("max_num_threads", 256)
"""Of a block: TVM's rule takes the most that the target allows."""
Target.LLVM = Target(
    name="llvm", kind="llvm", device="cpu", needs="a processor of this kind", gemm=GemmConfig(many_rows=16)
)
Target.VNNI = Target(
    name="llvm-avx512-vnni",
    kind="llvm",
    device="cpu",
    features=("avx512f", "avx512bw", "avx512vl", "avx512vnni"),
    byte_products="vpdpbusd",
    needs="a processor with AVX512-VNNI",
)
Target.CUDA = Target(
    name="cuda",
    kind="cuda",
    device="cuda",
    byte_products="dp4a",
    fragments=True,
    half=True,
    graphs=True,
    options=(_THREADS,),
    needs="a GPU with its driver and libcudart.so.13",
    gemm=GemmConfig(many_rows=16),
)
Target.OPENCL = Target(
    name="opencl",
    kind="opencl",
    device="opencl",
    options=(("thread_warp_size", 1), _THREADS),
    needs="a TVM with OpenCL",
    gemm=GemmConfig(many_rows=16),
)
TARGETS = {target.name: target for target in (Target.LLVM, Target.VNNI, Target.CUDA, Target.OPENCL)}


def find_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        BitlowerError: there is none; the nearest match is named.
    """
    if name not in TARGETS:
        raise BitlowerError(f"unknown target {name!r}", hint=nearest(name, TARGETS))
    return TARGETS[name]
