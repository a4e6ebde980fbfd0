"""A short continuation of a prompt, to see with one's own eyes what the model has learnt."""

import torch

from megagate.data.tokenizer import AnyTokenizer
from megagate.model.lm import LanguageModel
from megagate.parallel.comm import broadcast

TEMPERATURE = 0.8
TOP_K = 40


@torch.no_grad()
def continuation(model: LanguageModel, tokenizer: AnyTokenizer, prompt: str, *, tokens: int, window: int, seed: int) -> str:
    """Sample from the model (temperature 0.8 among the 40 likeliest). Collective over the world.

    Args:
        model: In evaluation mode.
        tokenizer: Of the model's data.
        prompt: Text to continue.
        tokens: How many tokens to draw at most; an end of document ends it.
        window: The model sees at most this many of the last tokens; a multiple of tp.
        seed: Of the draw.
    """
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    ids = tokenizer.encode(prompt)
    drawn: list[int] = []
    for _ in range(tokens):
        seen = (ids + drawn)[-window:]
        # A fixed length, so that it divides by tp; the padding comes after and is not seen, but by the scales of FP8's `current`, which
        # are of whole tensors: there it moves rounding.
        padded = torch.tensor([seen + [0] * (window - len(seen))], device=device)
        # The model may have more rows than the tokenizer has tokens.
        likely = model.logits(padded)[0, len(seen) - 1, : tokenizer.vocab_size] / TEMPERATURE
        values, choices = likely.topk(min(TOP_K, tokenizer.vocab_size))
        token = choices[torch.multinomial(values.softmax(-1), 1, generator=generator)]
        drawn.append(int(broadcast(token, model.mesh.world)))
        if drawn[-1] == tokenizer.eod_id:
            break
    return tokenizer.decode(drawn)
