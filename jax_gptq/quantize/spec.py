"""What the compiled functions are specialised on."""

import dataclasses

# Rows whose updates are applied one by one; whole sub-blocks are applied as matrix products.
_SUB_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static facts of one solve: hashable, one compilation each.

    Attributes:
      bits: code width.
      group_size: rows per group, at most K.
      sym: all zero points are 2**(bits-1).
      mse: exponent of the clip search, 0 for none.
      scale_dtype: name of the dtype that scales are stored in.
      block_size: rows that are solved before the rest of the matrix hears of it.
      static_groups: grids come from the weights as given, before any update.
    """

    bits: int
    group_size: int
    sym: bool
    mse: float
    scale_dtype: str
    block_size: int
    static_groups: bool

    @property
    def span(self) -> int:
        """Rows of one outer step: whole groups, or for static groups a block."""
        if self.static_groups:
            return self.block_size
        return self.group_size * max(1, self.block_size // self.group_size)


def sub_block(rows: int) -> int:
    """The largest divisor of `rows` up to 16; `rows` itself where there is none but small ones."""
    best = largest_divisor(rows, _SUB_BLOCK)
    return best if best >= 4 or rows > 64 else rows


def largest_divisor(number: int, limit: int) -> int:
    """Of `number`, up to `limit`."""
    return max(d for d in range(1, min(limit, number) + 1) if number % d == 0)


def padded(rows: int, multiple: int) -> int:
    """`rows` rounded up."""
    return -(-rows // multiple) * multiple
