"""The model that exports carry along as code is our model."""

import pytest
import torch
from parity.sharded import assert_close
from remote_models import ALL_VARIANTS, our_model, random_ids, remote_model


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_every_variant_is_our_model_and_goes_on_from_its_cache(variant):
    model = our_model(ALL_VARIANTS[variant])
    peer = remote_model(model)
    tokens = random_ids(2, 12)
    with torch.no_grad():
        logits = peer(tokens, use_cache=False).logits
        assert_close(logits, model.logits(tokens), to=1e-5, what="logits")
        continued = peer.generate(tokens, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
        again = peer(continued.sequences, use_cache=False).logits[:, 11:-1]
    assert_close(torch.stack(continued.logits, dim=1), again, to=1e-5, what="logits with a cache")
    assert torch.equal(continued.sequences[:, 12:], again.argmax(-1))
