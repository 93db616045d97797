"""Orthogonal matrices that spread a vector's entries: Hadamard matrices of many orders, and random ones."""

from __future__ import annotations

import torch


def hadamard(order: int) -> torch.Tensor | None:
    """A matrix of ±1, int8 ``[order, order]``, with orthogonal rows; None if none is known here.

    It is the Kronecker product of Sylvester's matrix, of a power of two, with one of Paley's (1933) over a prime field,
    the smallest that will do: 576 is 16 · 36.
    """
    power = order & -order
    while power:
        core = paley(order // power)
        if core is not None:
            return torch.kron(_sylvester(power), core)
        power //= 2
    return None


def _sylvester(order: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.int8)
    while matrix.shape[0] < order:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), matrix)
    return matrix


def paley(order: int) -> torch.Tensor | None:
    """Paley's Hadamard matrix of ``order``, int8; of order 1 and 2 the trivial ones; None if there is none.

    For a prime q ≡ 3 (mod 4) it has the order q + 1, for a prime q ≡ 1 (mod 4) the order 2(q + 1).
    """
    if order in (1, 2):
        return _sylvester(order)
    if order % 4:
        return None
    if _is_prime(order - 1):  # ≡ 3 (mod 4), as 4 divides the order
        matrix = _bordered(order - 1)
        matrix[1:, 0] = -1
        return matrix + torch.eye(order, dtype=torch.int8)
    half = order // 2
    if half % 2 or not _is_prime(half - 1) or (half - 1) % 4 != 1:
        return None
    diagonal = torch.kron(torch.eye(half, dtype=torch.int8), torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8))
    return torch.kron(_bordered(half - 1), torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)) + diagonal


def _bordered(prime: int) -> torch.Tensor:
    """Jacobsthal's matrix of a prime, whose entries are the quadratic characters of i − j, with a border of ones."""
    squares = (torch.arange(1, prime) ** 2) % prime
    character = torch.full((prime,), -1, dtype=torch.int8)
    character[squares] = 1
    character[0] = 0
    index = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.int8)
    matrix[0, 0] = 0
    matrix[1:, 1:] = character[(index[:, None] - index) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def random_hadamard(order: int, generator: torch.Generator) -> torch.Tensor | None:
    """``diag(±1) · H / √order``, float64, with signs drawn from ``generator`` (QuaRot, Ashkboos et al. 2024, §3)."""
    matrix = hadamard(order)
    if matrix is None:
        return None
    signs = torch.randint(0, 2, (order, 1), generator=generator) * 2 - 1
    basis: torch.Tensor = signs * matrix.double() / order**0.5
    return basis


def random_orthogonal(order: int, generator: torch.Generator) -> torch.Tensor:
    """A uniformly random orthogonal matrix, float64: the Q of a Gaussian matrix whose R has a positive diagonal."""
    q, r = torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=torch.float64))
    basis: torch.Tensor = q * r.diagonal().sign()
    return basis
