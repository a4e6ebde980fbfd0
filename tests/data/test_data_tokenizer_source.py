"""`--tokenizer NAME_OR_PATH`: what bare files need, what becomes of their bytes, and what is said where one cannot be used."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from megagate.data.files import file_sha256
from megagate.data.preprocess.tokenizer_source import find_tokenizer
from megagate.data.tokenizer import Tokenizer, load_tokenizer
from megagate.errors import DataError


def test_a_tokenizer_needs_no_padding_and_keeps_its_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Model

    place = tmp_path / "tokenizer.json"
    model = Model.from_str(Tokenizer.train(["some text to learn from"], vocab_size=270).to_json())
    parts = json.loads(model.to_str())
    names = {"<|endoftext|>": "</s>", "<|pad|>": "<fill>"}
    parts["added_tokens"] = [token | {"content": names[token["content"]]} for token in parts["added_tokens"]]
    parts["model"]["vocab"] = {names.get(token, token): index for token, index in parts["model"]["vocab"].items()}
    place.write_text(json.dumps(parts))  # not as the package would write it
    with pytest.raises(DataError, match=r"has no <\|endoftext\|>, .* name one with --eod-token \(likely: '</s>'\)"):
        find_tokenizer(str(place))
    found = find_tokenizer(str(place), eod="</s>")
    assert (found.eod_id, found.pad_id) == (0, -1)
    identity = found.save(tmp_path / "out.json")
    assert (tmp_path / "out.json").read_bytes() == place.read_bytes()
    assert identity.sha256 == file_sha256(place) == found.identity().sha256
    again = load_tokenizer(tmp_path, identity)
    assert again is not None and again.identity("out.json") == identity
    place.write_text(json.dumps(parts, indent=1))
    assert found.identity("out.json") == identity
    with pytest.raises(DataError, match="tokenizer.json has changed since it was read"):
        found.save(tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()
    (tmp_path / "README.md").write_text("# Words")
    with pytest.raises(DataError, match=r"README.md is not a tokenizer.json \(.*\); name a file that is one"):
        find_tokenizer(str(tmp_path / "README.md"))


def test_the_hub_is_asked_once_for_a_name_that_may_be_misspelled() -> None:
    class Busy(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:  # noqa: N802  the package's name
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            pass

    asked: list[str] = []
    pytest.importorskip("huggingface_hub")
    program = "from megagate.data.preprocess.tokenizer_source import find_tokenizer; find_tokenizer('no-one/tokeniser')"
    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-c", program], env=os.environ | place, capture_output=True, text=True, check=False)
        server.shutdown()
    assert "--tokenizer no-one/tokeniser: neither a file or folder here nor to be had from the hub (" in done.stderr, done.stderr
    assert len(asked) == 1 and "no-one/tokeniser" in asked[0]
