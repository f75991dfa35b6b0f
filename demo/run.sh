#!/usr/bin/env bash
# The demo checkpoint from nothing: corpus, base model, stage 1, stage 2, publication with held-out evaluation.
#
#   bash demo/run.sh
#
# Needs espeak-ng and flite. Everything lands in work/ (some GB) but the published checkpoint. A run that was
# stopped goes on where it was; only the evaluation and the publication are always done anew.
set -euo pipefail
cd "$(dirname "$0")/.."

python -m fastlongspeech.demo.corpus work/corpus
if [ ! -e work/base/model ]; then
    # The language model and the encoder learn side by side, a core each.
    python -m fastlongspeech.demo.base work/corpus work/base --only tokenizer
    OMP_NUM_THREADS=1 python -m fastlongspeech.demo.base work/corpus work/base --only language &
    OMP_NUM_THREADS=1 python -m fastlongspeech.demo.base work/corpus work/base --only encoder
    wait $!
    python -m fastlongspeech.demo.base work/corpus work/base
fi
[ -e work/ctc/config.json ] || python -m fastlongspeech.train.ctc demo/ctc.yaml
[ -e work/dct/config.json ] || python -m fastlongspeech.train.dct demo/dct.yaml
python -m fastlongspeech.demo.evaluate work/dct work/corpus --output work/heldout.json
python -m fastlongspeech.demo.publish work checkpoints/fastlongspeech-demo
