"""The documents of a batch, found from its tokens: attention does not cross their borders and positions begin anew at each."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie. A row begins with one, perhaps in its middle, and each token after an end begins the next.

    Args:
        starts: Of each token, the place in its row of its document's first token; [b, s] int64. Kernels in blocks read this.
        cu_seqlens: The borders in the tokens of all rows, one row after the other: 0, ..., b*s; [documents + 1] int32. Kernels of variable
            length read this.
    """

    starts: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, tokens: Tensor, *, eod_id: int) -> "Documents":
        """The documents of rows of tokens; `eod_id` is the last token of its document. On a GPU it waits for the device, once.

        Shapes: tokens [b, s].
        """
        starts = document_starts(tokens, eod_id=eod_id)
        is_first = starts == torch.arange(tokens.shape[1], device=tokens.device)
        borders = is_first.flatten().nonzero().squeeze(1)
        return cls(starts, torch.cat([borders, borders.new_tensor([tokens.numel()])]).int())

    @property
    def positions(self) -> Tensor:
        """Of each token in its document, counted from 0; [b, s] int64."""
        return _positions(self.starts)


def document_starts(tokens: Tensor, *, eod_id: int) -> Tensor:
    """`Documents.starts` alone, without waiting for the device.

    Shapes: [..., s] -> the same, int64.
    """
    is_first = torch.ones_like(tokens, dtype=torch.bool)
    is_first[..., 1:] = tokens[..., :-1] == eod_id
    return torch.where(is_first, torch.arange(tokens.shape[-1], device=tokens.device), 0).cummax(-1).values


def squared_lengths(tokens: Tensor, *, eod_id: int) -> Tensor:
    """The sum of the squared lengths of all documents, to which the work of attention within them is proportional; a scalar, int64.

    Shapes: tokens [..., s].
    """
    return (2 * _positions(document_starts(tokens, eod_id=eod_id)) + 1).sum()


def _positions(starts: Tensor) -> Tensor:
    return torch.arange(starts.shape[-1], device=starts.device) - starts
