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
        is_first = torch.ones_like(tokens, dtype=torch.bool)
        is_first[:, 1:] = tokens[:, :-1] == eod_id
        places = torch.arange(tokens.shape[1], device=tokens.device)
        starts = torch.where(is_first, places, 0).cummax(1).values
        borders = is_first.flatten().nonzero().squeeze(1)
        return cls(starts, torch.cat([borders, borders.new_tensor([tokens.numel()])]).int())

    @property
    def positions(self) -> Tensor:
        """Of each token in its document, counted from 0; [b, s] int64."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts
