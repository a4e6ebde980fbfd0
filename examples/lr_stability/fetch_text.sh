#!/usr/bin/env bash
# Makes a data set of real English for the CPU studies: documentation of Debian, tokenized as bytes.
#   bash examples/lr_stability/fetch_text.sh [FOLDER]        default runs/lr_stability_text; the data set is FOLDER/data
# Needs a Debian or Ubuntu with package lists (apt-get update) and a network, no root: packages are downloaded and unpacked, not installed.
# Elsewhere, or for other text: TEXT=/path/to/files bash examples/lr_stability/fetch_text.sh takes the .txt, .rst and .md files there.
# At the end it prints the entropies of the bytes in nats: that of pairs is the bar `collapsed_above` of the specs.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="${1:-runs/lr_stability_text}"
python="${PYTHON:-python3}"
least_mb=30
mkdir -p "$out"
out="$(cd "$out" && pwd)"

if [[ -f "$out/data/dataset.json" ]]; then
  echo "fetch_text.sh: $out/data is there already; remove $out to make it again"
  [[ -f "$out/entropy.txt" ]] && cat "$out/entropy.txt"
  exit 0
fi

if [[ -z "${TEXT:-}" ]]; then
  for tool in apt-get apt-cache dpkg-deb; do
    if ! command -v "$tool" > /dev/null; then
      echo "fetch_text.sh: there is no $tool here; name a folder of text: TEXT=/path/to/files bash $0" >&2
      exit 2
    fi
  done
  # linux-doc is a name for the newest linux-doc-VERSION.
  kernel="$(apt-cache depends linux-doc 2> /dev/null | sed -n 's/^ *Depends: //p' | head -n 1)"
  mkdir -p "$out/packages" "$out/files"
  for package in "${kernel:-linux-doc}" dict-gcide debian-reference-en debian-policy; do
    compgen -G "$out/packages/${package}_*.deb" > /dev/null && continue
    # apt as root downloads as itself where its own user may not write, and says so.
    if ! (cd "$out/packages" && apt-get download "$package" 2> "$out/apt.log"); then
      cat "$out/apt.log" >&2
      echo "fetch_text.sh: $package cannot be downloaded; run apt-get update, or name a folder of text: TEXT=/path/to/files bash $0" >&2
      exit 2
    fi
  done
  for package in "$out"/packages/*.deb; do
    dpkg-deb -x "$package" "$out/files"
  done
  TEXT="$out/files"
fi

"$python" - "$TEXT" "$out" "$least_mb" << 'PYTHON'
import gzip
import json
import re
import sys
from pathlib import Path

import numpy as np

source, out, least = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
BLOCK = 65_536  # characters of a document: a dictionary of one file becomes many, so that the held-out part is of all files
ENDINGS = (".txt", ".rst", ".md", ".dict.dz", ".txt.gz", ".rst.gz", ".md.gz")


def blocks(text):
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[^\S\n]+", " ", text)).strip()
    while text:
        cut = len(text) if len(text) <= BLOCK else text.rfind("\n", 1, BLOCK)
        cut = cut if cut > 0 else BLOCK
        yield text[:cut].strip()
        text = text[cut:].strip()


files = sorted(path for path in source.rglob("*") if path.name.endswith(ENDINGS) and path.is_file() and not path.is_symlink())
seen, single, pairs, size = set(), np.zeros(256, np.int64), np.zeros(65_536, np.int64), 0
new = out / "text.jsonl.tmp"
with new.open("w", encoding="utf-8") as stream:
    for path in files:
        content = path.read_bytes()
        if path.suffix in (".gz", ".dz"):
            content = gzip.decompress(content)
        for text in blocks(content.decode("utf-8", errors="replace").replace("\ufffd", "")):
            if len(text) < 200 or text in seen:
                continue
            seen.add(text)
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
            single += np.bincount(codes, minlength=256)
            pairs += np.bincount(codes[:-1] * 256 + codes[1:], minlength=65_536)
            size += codes.size
if size < least * 1_000_000:
    print(f"fetch_text.sh: {source} holds {size / 1e6:.1f} MB of text in {len(files)} files; at least {least} MB are needed: name more", file=sys.stderr)
    sys.exit(2)
new.replace(out / "text.jsonl")


def entropy(counts):
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


first = pairs.reshape(256, 256).sum(1)
found = f"{len(seen)} documents, {size / 1e6:.1f} MB; entropy of a byte {entropy(single):.3f} nats, "
found += f"given the byte before it {entropy(pairs) - entropy(first):.3f} nats (collapsed_above)"
(out / "entropy.txt").write_text(found + "\n")
PYTHON

"$python" "$here/../../tools/preprocess_data.py" --input "$out/text.jsonl" --tokenizer bytes --output "$out/data" --split 0.98,0.02,0 \
  --workers "${WORKERS:-1}"
cat "$out/entropy.txt"
