"""Codes of 1 to 8 bits in bytes and words: streams, and the layouts that checkpoints and runtimes read.

All layouts here are one stream in different arrangements: code ``k`` of a row occupies the bits ``k·b`` to
``k·b + b − 1``, counted from the least significant bit of the first byte; a 32-bit word is four such bytes, lowest
first. This is what GPTQ's 3-bit kernels read (Frantar et al. 2023, ``Quant3Linear``), what AutoGPTQ, GPTQModel and
compressed-tensors store as int32, ONNX as int4 and int2, and onnxruntime's ``MatMulNBits`` as uint8. The layouts differ
in the axis, in where a row must end, and in how signs and zero points are written.

Codes are unsigned here, ``0 … 2^b − 1``, in uint8; :func:`unsigned` and :func:`signed` go between them and the signed
codes of symmetric grids by adding ``2^(b−1)``. Every ``pack`` has an exact inverse.
"""

from __future__ import annotations

import torch

from bitlower.ir.diagnostics import BitlowerError

WORD = 32
"""Bits of a word."""
GPTQ_VERSIONS = (1, 2)
"""Version 1 stores zero points less one (AutoGPTQ), version 2 as they are."""


def unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes ``−2^(b−1) … 2^(b−1) − 1`` as unsigned ones; unsigned (uint8) codes as they are.

    Raises:
        BitlowerError: ``codes`` are neither int8 nor uint8.
    """
    if codes.dtype == torch.uint8:
        return codes
    if codes.dtype != torch.int8:
        raise BitlowerError(f"codes of up to 8 bits are int8 or uint8, not {codes.dtype}")
    return codes.view(torch.uint8) + (1 << (_width(bits) - 1))


def signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes as signed ones, int8: the inverse of :func:`unsigned`."""
    return (codes - (1 << (_width(bits) - 1))).view(torch.int8)


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes ``count`` codes take."""
    return -(-count * _width(bits) // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., n] as a stream of bytes along the last axis, uint8 [..., ⌈n·bits / 8⌉]; bits left over are 0.

    Raises:
        BitlowerError: ``bits`` is not 1 to 8, or a code does not fit.
    """
    _check(codes, bits)
    if 8 % bits == 0:
        return _pack_whole(codes, bits)
    count = codes.shape[-1]
    word = torch.zeros((*codes.shape[:-1], -(-count // 8)), dtype=torch.int64)
    for position in range(8):
        lane = codes[..., position::8]
        word[..., : lane.shape[-1]] |= lane.to(torch.int64) << (bits * position)
    stream = word.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    return _dense(stream[..., : packed_bytes(count, bits)])


def unpack(stream: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` codes of each row of ``stream``, uint8 [..., count]: the inverse of :func:`pack`.

    Raises:
        BitlowerError: ``bits`` is not 1 to 8, or ``stream`` is not uint8 with room for exactly so many codes.
    """
    if stream.dtype != torch.uint8 or stream.shape[-1] != packed_bytes(count, bits):
        shape = f"{str(stream.dtype).removeprefix('torch.')}{list(stream.shape)}"
        raise BitlowerError(f"{count} codes of {bits} bits are {packed_bytes(count, bits)} bytes a row, not {shape}")
    if 8 % bits == 0:
        return _unpack_whole(stream, bits, count)
    groups = -(-count // 8)
    padded = torch.nn.functional.pad(stream, (0, groups * bits - stream.shape[-1]))
    padded = padded.reshape(*stream.shape[:-1], groups, bits)
    word = torch.nn.functional.pad(padded, (0, 8 - bits)).view(torch.int64).squeeze(-1)
    codes = torch.empty((*stream.shape[:-1], groups, 8), dtype=torch.uint8)
    for position in range(8):
        codes[..., position] = (word >> (bits * position) & ((1 << bits) - 1)).to(torch.uint8)
    return _dense(codes.flatten(-2)[..., :count])


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., n] as a stream of int32 words along the last axis, [..., ⌈n·bits / 32⌉]; bits left over are 0.

    Raises:
        BitlowerError: see :func:`pack`.
    """
    stream = pack(codes, bits)
    return _dense(torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 4))).view(torch.int32)


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` codes of each row of ``words``, uint8: the inverse of :func:`pack_words`.

    Raises:
        BitlowerError: ``words`` are not int32 with room for exactly so many codes.
    """
    needed = -(-packed_bytes(count, bits) // 4)
    if words.dtype != torch.int32 or words.shape[-1] != needed:
        shape = f"{str(words.dtype).removeprefix('torch.')}{list(words.shape)}"
        raise BitlowerError(f"{count} codes of {bits} bits are {needed} int32 words a row, not {shape}")
    return unpack(_dense(words).view(torch.uint8)[..., : packed_bytes(count, bits)], bits, count)


def pack_gptq(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Weight codes [out, in] as GPTQ's ``qweight``, int32 [in·bits / 32, out]: streams down the input channels.

    Raises:
        BitlowerError: the streams do not end at a word, or a code does not fit.
    """
    _check_words(codes.shape[-1], bits, "input channels")
    return pack_words(codes, bits).T.contiguous()


def unpack_gptq(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Weight codes [out, in], uint8, of ``qweight``: the inverse of :func:`pack_gptq`."""
    return unpack_words(qweight.T, bits, qweight.shape[0] * WORD // _width(bits))


def pack_gptq_zeros(zeros: torch.Tensor, bits: int, *, version: int = 2) -> torch.Tensor:
    """Zero points [out, groups] as GPTQ's ``qzeros``, int32 [groups, out·bits / 32]: streams along the outputs.

    Version 2 (``checkpoint_format: gptq_v2``) stores zero points as they are. Version 1 (``gptq``, what AutoGPTQ wrote)
    stores one less, so a zero point of 0 has no form in it: it would borrow from its neighbours in the word.

    Raises:
        BitlowerError: the streams do not end at a word, a zero point does not fit, or is 0 in version 1.
    """
    _check_words(zeros.shape[0], bits, "output channels")
    if _version(version) == 1 and bool((zeros == 0).any()):
        raise BitlowerError("version 1 of the GPTQ format cannot hold a zero point of 0", hint="write version 2")
    return pack_words((zeros - (2 - version)).T.contiguous(), bits)


def unpack_gptq_zeros(qzeros: torch.Tensor, bits: int, *, version: int = 2) -> torch.Tensor:
    """Zero points [out, groups], uint8, of ``qzeros``: the inverse of :func:`pack_gptq_zeros`."""
    zeros = unpack_words(qzeros, bits, qzeros.shape[1] * WORD // _width(bits)).T.contiguous()
    return zeros + (2 - _version(version))


def gptq_groups(columns: int, group: int) -> torch.Tensor:
    """GPTQ's ``g_idx`` for groups of ``group`` consecutive input channels: the group of each, int32 [columns]."""
    return torch.arange(columns, dtype=torch.int32) // group


def pack_compressed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Weight codes [out, in] as compressed-tensors' ``weight_packed``, int32 [out, ⌈in·bits / 32⌉] (pack-quantized).

    That library's signed codes, with ``2^(b−1)`` added before it packs them, are the unsigned codes here.

    Raises:
        BitlowerError: a code does not fit.
    """
    return pack_words(codes, bits)


def unpack_compressed(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Weight codes [out, columns], uint8, of ``weight_packed``: the inverse of :func:`pack_compressed`."""
    return unpack_words(packed, bits, columns)


def pack_compressed_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points [out, groups] as compressed-tensors' ``weight_zero_point``, int32 [⌈out·bits / 32⌉, groups].

    Raises:
        BitlowerError: a zero point does not fit.
    """
    return pack_words(zeros.T.contiguous(), bits).T.contiguous()


def unpack_compressed_zeros(packed: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """Zero points [rows, groups], uint8, of ``weight_zero_point``: the inverse of :func:`pack_compressed_zeros`."""
    return unpack_words(packed.T, bits, rows).T.contiguous()


def pack_matmul_nbits(codes: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """Weight codes [N, K] as onnxruntime's ``MatMulNBits`` reads ``B``: uint8 [N, ⌈K / block⌉, block·bits / 8].

    A last block that is not full is filled up with code 0; the kernel reads no further than K.

    Raises:
        BitlowerError: a block does not end at a byte, or a code does not fit.
    """
    _check_block(block, bits)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % block))
    return pack(padded.reshape(*codes.shape[:-1], -1, block), bits)


def unpack_matmul_nbits(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Weight codes [N, columns], uint8, of ``B``: the inverse of :func:`pack_matmul_nbits`."""
    return unpack(packed, bits, packed.shape[-1] * 8 // _width(bits)).flatten(-2)[..., :columns].contiguous()


def pack_matmul_nbits_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points [N, blocks] as ``MatMulNBits`` reads them: uint8 [N, ⌈blocks·bits / 8⌉], streams along the blocks.

    Raises:
        BitlowerError: a zero point does not fit.
    """
    return pack(zeros, bits)


def unpack_matmul_nbits_zeros(packed: torch.Tensor, bits: int, blocks: int) -> torch.Tensor:
    """Zero points [N, blocks], uint8: the inverse of :func:`pack_matmul_nbits_zeros`."""
    return unpack(packed, bits, blocks)


def pack_onnx(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of any shape as the raw data of an ONNX tensor of 2 or 4 bits: uint8 [⌈numel·bits / 8⌉], row-major.

    Signed (int8) codes are written in two's complement, as ``INT4`` and ``INT2`` are; uint8 ones as ``UINT4``.

    Raises:
        BitlowerError: ``bits`` is not 2 or 4, or a code does not fit.
    """
    if bits not in (2, 4):
        raise BitlowerError(f"ONNX packs codes of 2 and 4 bits, not of {bits}")
    if codes.dtype == torch.int8:
        codes = unsigned(codes, bits)
        _check(codes, bits)
        codes = codes ^ (1 << (bits - 1))
    return pack(codes.reshape(-1), bits)


def unpack_onnx(data: torch.Tensor, bits: int, shape: tuple[int, ...], *, is_signed: bool) -> torch.Tensor:
    """Codes of ``shape``, int8 if ``is_signed`` else uint8: the inverse of :func:`pack_onnx`."""
    codes = unpack(data, bits, torch.Size(shape).numel()).reshape(shape)
    return signed(codes ^ (1 << (bits - 1)), bits) if is_signed else codes


def _pack_whole(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Widths that divide a byte: no code lies across two."""
    lanes = 8 // bits
    stream = codes[..., ::lanes].clone()
    for lane in range(1, lanes):
        part = codes[..., lane::lanes]
        stream[..., : part.shape[-1]] |= part << (bits * lane)
    return stream


def _unpack_whole(stream: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    lanes = 8 // bits
    if lanes == 1:
        return stream.clone()
    codes = torch.empty((*stream.shape, lanes), dtype=torch.uint8)
    for lane in range(lanes):
        codes[..., lane] = stream >> (bits * lane) & ((1 << bits) - 1)
    return _dense(codes.flatten(-2)[..., :count])


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the strides of its shape: a dimension of length 1 keeps others otherwise, and has no view."""
    if tensor.stride() == torch.empty(tensor.shape, device="meta").stride():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _check(codes: torch.Tensor, bits: int) -> None:
    """The codes are unsigned and fit.

    Raises:
        BitlowerError: they are not, or do not.
    """
    limit = (1 << _width(bits)) - 1
    if codes.dtype != torch.uint8:
        raise BitlowerError(f"codes are packed as uint8, not as {codes.dtype}", hint="see `unsigned`")
    if bits < 8 and codes.numel() and int(codes.max()) > limit:
        raise BitlowerError(f"the code {int(codes.max())} does not fit into {bits} bits")


def _check_words(count: int, bits: int, what: str) -> None:
    if count * _width(bits) % WORD:
        step = next(n for n in (4, 8, 16, 32) if n * bits % WORD == 0)
        raise BitlowerError(f"{count} {what} of {bits} bits do not fill 32-bit words; GPTQ needs a multiple of {step}")


def _check_block(block: int, bits: int) -> None:
    if block < 1 or block * _width(bits) % 8:
        raise BitlowerError(f"a block of {block} codes of {bits} bits does not end at a byte")


def _width(bits: int) -> int:
    """``bits`` if codes of that width can be packed.

    Raises:
        BitlowerError: they cannot.
    """
    if not 1 <= bits <= 8:
        raise BitlowerError(f"codes of 1 to 8 bits can be packed, not of {bits}")
    return bits


def _version(version: int) -> int:
    if version not in GPTQ_VERSIONS:
        raise BitlowerError(f"there is no version {version} of the GPTQ format", hint="known: 1, 2")
    return version
